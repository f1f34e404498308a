"""The gateway's traces, as plain values for assertions."""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from typing import Any, Final, TypeAlias, TypeVar

_T = TypeVar("_T")
# What identifies a message: itself; or a trace id, or a reply or a client library's exception whose text has the trace
# id.
Told: TypeAlias = "Message[Any, Any] | str | bytes | BaseException"

TRANSACTION: Final = "smtp.transaction"
DELIVERY: Final = "smtp.delivery"
CONNECTION: Final = "smtp.connection"
_STATE_EVENTS: Final = "smtp.state."

WAIT_SECONDS: Final = 5.0
_TRACE_ID: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Event:
    """A span event."""

    name: str
    time_ns: int  # since the epoch
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """A finished span.

    Attributes:
        kind: SERVER, CLIENT, INTERNAL.
        trace_id, span_id, parent_id: hexadecimal digits; parent_id None for a root.
        start_ns, end_ns: since the epoch.
        links: pairs of trace id and span id.
        has_failed: its status is ERROR; why is in `attributes["error.type"]`.
    """

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str | None
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    events: tuple[Event, ...]
    links: tuple[tuple[str, str], ...]
    has_failed: bool

    @property
    def event_names(self) -> list[str]:
        """The names of the events, in order."""
        return [event.name for event in self.events]

    def __str__(self) -> str:
        outcome = self.attributes.get("smtp.outcome", "")
        code = self.attributes.get("smtp.reply.code", "")
        milliseconds = (self.end_ns - self.start_ns) / 1e6
        return " ".join(f"{self.name} {milliseconds:.1f} ms {outcome} {code}".split())


class Recorder:
    """Collects the spans that a gateway finishes; one of its `SpanSink`s."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._spans: list[Span] = []

    def take(self, record: Any) -> None:
        """Keep a finished span; called by the gateway, on its own thread."""
        span = _span(record)
        with self._changed:
            self._spans.append(span)
            self._changed.notify_all()

    @property
    def spans(self) -> list[Span]:
        """All spans, in the order of their ends."""
        with self._changed:
            return list(self._spans)

    def wait_for(self, wanted: Callable[[Sequence[Span]], _T | None], timeout_seconds: float, what: str) -> _T:
        """Wait until `wanted` finds something in the spans, and return it.

        Raises:
            TimeoutError: it found nothing in time; the message lists the spans.
        """
        with self._changed:
            self._changed.wait_for(lambda: wanted(self._spans) is not None, timeout_seconds)
            found = wanted(self._spans)
            if found is None:
                there = "; ".join(map(str, self._spans)) or "no spans at all"
                raise TimeoutError(f"{what}: not within {timeout_seconds} s. There are: {there}")
            return found


class Trace:
    """The gateway's trace of one message.

    Attributes:
        transaction: the span of its transaction.
    """

    def __init__(self, recorder: Recorder, transaction: Span) -> None:
        self._recorder = recorder
        self.transaction = transaction

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits: the application's trace, where the message carried its context."""
        return self.transaction.trace_id

    @property
    def outcome(self) -> str:
        """The message's outcome: relayed, queued, refused, deferred, aborted, unknown."""
        return str(self.transaction.attributes["smtp.outcome"])

    @property
    def deliveries(self) -> list[Span]:
        """The attempts to deliver it so far, in order."""
        return [
            span
            for span in self._recorder.spans
            if span.name == DELIVERY and span.parent_id == self.transaction.span_id
        ]

    @property
    def connection(self) -> Span:
        """The span of the connection that carried it; waits until the client has closed it.

        Raises:
            TimeoutError: it is still open.
        """
        return self._connections("the connection's span, which ends when the client quits")[-1]

    @property
    def states(self) -> list[str]:
        """The states that the connection went through, from New to Closed; waits as `connection` does."""
        return [
            str(event.attributes["smtp.state"])
            for span in self._connections("the connection's span, which ends when the client quits")
            for event in span.events
            if event.name.startswith(_STATE_EVENTS)
        ]

    def _connections(self, what: str) -> list[Span]:
        """The spans of the connection, one for each segment; the last is closed."""
        id_ = self.transaction.attributes["smtp.connection.id"]

        def closed(spans: Sequence[Span]) -> list[Span] | None:
            segments = [
                span for span in spans if span.name == CONNECTION and span.attributes.get("smtp.connection.id") == id_
            ]
            return segments if segments and "smtp.close.reason" in segments[-1].attributes else None

        return self._recorder.wait_for(closed, WAIT_SECONDS, what)

    def __str__(self) -> str:
        lines = [f"trace {self.trace_id}", str(self.transaction), *(f"  {span}" for span in self.deliveries)]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Trace {self.trace_id} {self.outcome}>"


def find_transaction(spans: Sequence[Span], told: Told) -> Span | None:
    """The transaction that `told` identifies: of several, the newest."""
    transactions = [span for span in reversed(spans) if span.name == TRANSACTION]
    if isinstance(told, Message):
        return _of_message(spans, transactions, told)
    text = told.decode("utf-8", "replace") if isinstance(told, bytes) else str(told)
    ids = set(_TRACE_ID.findall(text))
    return next((span for span in transactions if span.trace_id in ids), None)


def _of_message(spans: Sequence[Span], transactions: Sequence[Span], message: "Message[Any, Any]") -> Span | None:
    ids = {match[2] for value in message.get_all("traceparent", []) if (match := _TRACEPARENT.search(str(value)))}
    # A delivered message carries the delivery's context, one from the application that of the transaction's parent.
    parents = {span.parent_id for span in spans if span.name == DELIVERY and span.span_id in ids}
    message_id = str(message.get("Message-ID", "")).strip()
    for span in transactions:
        if span.span_id in parents or span.parent_id in ids:
            return span
    for span in transactions:
        if message_id and span.attributes.get("smtp.message.id") == message_id:
            return span
    return None


def _span(record: Any) -> Span:
    """Convert a span that the gateway gave to its sinks."""
    parent = record.parent
    return Span(
        name=record.name,
        kind=record.kind.name,
        trace_id=record.context.trace_id_hex,
        span_id=record.context.span_id_hex,
        parent_id=parent.span_id_hex if parent is not None else None,
        start_ns=record.start_ns,
        end_ns=record.end_ns,
        attributes=dict(record.attributes),
        events=tuple(Event(event.name, event.time_ns, dict(event.attributes)) for event in record.events),
        links=tuple((link.context.trace_id_hex, link.context.span_id_hex) for link in record.links),
        has_failed=record.has_failed,
    )
