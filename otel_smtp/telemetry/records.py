"""Finished spans and log records as plain values, and the interfaces of their sinks.

A span is never a live object here. Most finished spans exist as octets only (`shapes.EncodedSpan`); a `SpanRecord` is
made for those who want to read one: the log, the SDK's processors, the status page.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from opentelemetry.trace import SpanKind

from otel_smtp.telemetry.attributes import Attributes, AttributeValue
from otel_smtp.telemetry.propagation import TraceContext


class EventRecord(NamedTuple):
    """A span event."""

    time_ns: int  # since the epoch
    name: str
    attributes: Attributes


class LinkRecord(NamedTuple):
    """A span link."""

    context: TraceContext
    attributes: Attributes


class SpanRecord(NamedTuple):
    """A finished span.

    Attributes:
        is_recording: its trace is sampled (or recorded all the same by the sampler's wish). Records that are not are
            made for the access log only; they have no events.
        has_failed: the status is ERROR; why is in `error.type`.
        description: of the status; "" where `error.type` says it all.
    """

    name: str
    kind: SpanKind
    context: TraceContext
    parent: TraceContext | None
    start_ns: int  # since the epoch
    end_ns: int
    attributes: dict[str, AttributeValue]
    events: Sequence[EventRecord]
    links: Sequence[LinkRecord]
    has_failed: bool
    is_recording: bool
    description: str = ""

    @property
    def duration_seconds(self) -> float:
        """Its duration."""
        return (self.end_ns - self.start_ns) / 1e9


class SpanSink(Protocol):
    """Takes finished, decoded spans; called on the event loop, so it must neither block nor raise."""

    def take(self, record: SpanRecord) -> None:
        """Take one span."""
        ...


class StateLog(Protocol):
    """Takes state events as log records, as they happen."""

    def take(self, name: str, time_ns: int, attributes: Attributes, context: TraceContext) -> None:
        """Take one event that occurred within the span of `context`."""
        ...


class LogRecord(NamedTuple):
    """A log record, as OTLP has it.

    Attributes:
        severity: from 1 to 24.
        event_name: "" for a record that is no event.
        trace_id, span_id: 16 and 8 octets, or none.
        flags: of the span's context (W3C trace-flags).
    """

    time_ns: int
    observed_ns: int
    severity: int
    severity_text: str
    body: str
    attributes: Mapping[str, AttributeValue]
    event_name: str = ""
    trace_id: bytes = b""
    span_id: bytes = b""
    flags: int = 0
