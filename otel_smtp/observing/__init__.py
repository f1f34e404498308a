"""The records that are observed, the observer interface, and the fan-out to several observers."""

from otel_smtp.observing.fan_out import FanOut, fan_out
from otel_smtp.observing.faults import Faults
from otel_smtp.observing.interface import HOOKS, Observer, StateCallback
from otel_smtp.observing.records import (
    ConnectionEnd,
    ConnectionRecord,
    DeliveryRecord,
    RecipientRecord,
    TransactionRecord,
)
from otel_smtp.observing.values import (
    ConnectionInfo,
    DeliveryPhase,
    Endpoint,
    Fate,
    MessageKind,
    Outcome,
    SpoolAction,
    TlsInfo,
    TraceHeaders,
    trace_fields,
)

__all__ = [
    "HOOKS",
    "ConnectionEnd",
    "ConnectionInfo",
    "ConnectionRecord",
    "DeliveryPhase",
    "DeliveryRecord",
    "Endpoint",
    "FanOut",
    "Fate",
    "Faults",
    "MessageKind",
    "Observer",
    "Outcome",
    "RecipientRecord",
    "SpoolAction",
    "StateCallback",
    "TlsInfo",
    "TraceHeaders",
    "TransactionRecord",
    "fan_out",
    "trace_fields",
]
