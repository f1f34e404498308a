"""Values in the records for observers: addresses, identities, outcomes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from otel_smtp.smtp.states import TlsMode

# W3C Trace Context 3.2.2: version, trace id, parent id and flags.
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-(?:([0-9a-f]{2})(?![^-]))?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address of one side of a connection; for a unix socket `host` is its path and `port` None."""

    host: str
    port: int | None = None

    def __str__(self) -> str:
        if self.port is None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """A client connection, from accept on.

    Attributes:
        id: 32 hexadecimal digits, unique; the identity of the connection for its whole life.
        peer: the socket's other end. Where a PROXY header is trusted, `proxied` has the client behind it.
        local: the address that was connected to.
        listener: the listener's configured name.
        protocol: "smtp" or "lmtp".
        transport: "tcp" or "unix".
    """

    id: str
    peer: Endpoint
    local: Endpoint
    listener: str
    protocol: str = "smtp"
    transport: str = "tcp"
    tls_mode: TlsMode = TlsMode.OFF


@dataclass(frozen=True, slots=True)
class TlsInfo:
    """The parameters agreed in a handshake."""

    version: str  # "1.2", "1.3"
    cipher: str
    resumed: bool = False
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class TraceHeaders:
    """Trace headers found in a message's header block: unfolded, not yet validated.

    Attributes:
        traceparents: the values of all `traceparent` fields, at most two (of two, one may be forged, so both are
            ignored).
        tracestate: the value of the first `tracestate` field, "" without one.
    """

    traceparents: tuple[str, ...] = ()
    tracestate: str = ""


def trace_fields(carrier: Mapping[str, str]) -> dict[str, Any]:
    """A log record's fields for its span, from a trace context as headers: `trace_id` and `span_id` in hexadecimal, and
    `trace_flags`, which no line shows; empty without a context.
    """
    found = _TRACEPARENT.match(carrier.get("traceparent", ""))
    if found is None:
        return {}
    trace_id, span_id, flags = found.groups("0")  # flags not written by us
    return {"trace_id": trace_id, "span_id": span_id, "trace_flags": int(flags, 16)}


class Outcome(StrEnum):
    """How a transaction, or a delivery, ended: `smtp.outcome`."""

    __hash__ = str.__hash__  # Enum's own is a Python function; this is called several times per event

    RELAYED = "relayed"  # the upstream said 2yz to the end of data
    PARTLY_RELAYED = "partly_relayed"  # likewise, and at least one recipient was refused or deferred, by it or by us
    QUEUED = "queued"  # durable in the spool
    REFUSED = "refused"  # 5yz
    DEFERRED = "deferred"  # 4yz
    ABORTED = "aborted"  # RSET, EHLO, the client vanished, content refused before any upstream took it
    UNKNOWN = "unknown"  # lost between our final dot and the upstream's reply


class Fate(StrEnum):
    """The fate of a recipient that did not get the mail, or not yet: `smtp.recipient.fate`."""

    __hash__ = str.__hash__

    REFUSED = "refused"  # 5yz
    DEFERRED = "deferred"  # 4yz
    BOUNCED = "bounced"  # refused from the spool, for good
    EXPIRED = "expired"  # given up in the spool for the mail's age
    REMOVED = "removed"  # from the spool, by an operator
    HELD = "held"  # in the spool, until an operator lets it go on


class MessageKind(StrEnum):
    """The kind of a delivered message: `smtp.message.kind`."""

    __hash__ = str.__hash__

    MAIL = "mail"  # a client's
    # Messages of our own, from the spool, that report on a mail:
    BOUNCE = "bounce"
    DELAY_WARNING = "delay_warning"
    SUCCESS_REPORT = "success_report"


class SpoolAction(StrEnum):
    """What happened to a message in the spool without an attempt: `smtp.spool.action`."""

    __hash__ = str.__hash__

    EXPIRED = "expired"  # it was too old, or an operator gave it up
    REMOVED = "removed"  # by an operator
    HELD = "held"  # by an operator; or it was part of too many crashes, or is an expired notice
    RELEASED = "released"  # by an operator
    GIVEN_UP = "given_up"  # by an operator: it expires next
    SUPERSEDED = "superseded"  # the result of an attempt came too late: another gateway has the delivery


class DeliveryPhase(StrEnum):
    """A step of one delivery attempt: the last part of the delivery event's name."""

    __hash__ = str.__hash__  # Enum's own is a Python function; this is called several times per event

    PACED = "paced"
    POOL = "pool"
    CONNECT = "connect"
    GREETING = "greeting"
    EHLO = "ehlo"
    STARTTLS = "starttls"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    CONTENT = "content"
    REPLY = "reply"
