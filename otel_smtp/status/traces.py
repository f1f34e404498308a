"""Recent traces, kept in memory so that a mail can be looked up without any backend.

Encoded spans come one by one as they end, of any trace in any order; only their octets are kept. Adding one is an
append; grouping them by trace, its summary (`KeptTrace.summary`) and its full form (`KeptTrace.otlp_json`) are decoded
only on request.

Two bounded shelves: the recent spans, and behind them those of traces in which something failed, so that an error of
last night is still found after ten thousand good mails. Octets are bounded for the sake of memory, spans for the
duration of a search.
"""

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, Protocol

from otel_smtp.observing import Faults, Outcome
from otel_smtp.smtp.states import ConnState
from otel_smtp.status.search import Query, TraceIndex
from otel_smtp.telemetry import attributes as names

logger: Final = logging.getLogger("otel_smtp.status.traces")

AttributeValue = str | bool | int | float | Sequence[str]


class SpanIdentity(Protocol):
    """A span's ids."""

    @property
    def trace_id(self) -> int: ...
    @property
    def span_id(self) -> int: ...


class SpanKind(Protocol):
    """INTERNAL, SERVER, CLIENT: OpenTelemetry's enumeration, or one like it."""

    @property
    def name(self) -> str: ...


class SpanEvent(Protocol):
    """An event on a finished span; its time is since the epoch."""

    @property
    def name(self) -> str: ...
    @property
    def time_ns(self) -> int: ...
    @property
    def attributes(self) -> Mapping[str, AttributeValue]: ...


class SpanLink(Protocol):
    """A span's link to another."""

    @property
    def context(self) -> SpanIdentity: ...
    @property
    def attributes(self) -> Mapping[str, AttributeValue]: ...


class FinishedSpan(Protocol):
    """A finished span, as far as it is read; times are since the epoch."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> SpanKind: ...
    @property
    def context(self) -> SpanIdentity: ...
    @property
    def parent(self) -> SpanIdentity | None: ...
    @property
    def start_ns(self) -> int: ...
    @property
    def end_ns(self) -> int: ...
    @property
    def attributes(self) -> Mapping[str, AttributeValue]: ...
    @property
    def events(self) -> Sequence[SpanEvent]: ...
    @property
    def links(self) -> Sequence[SpanLink]: ...
    @property
    def has_failed(self) -> bool: ...
    @property
    def description(self) -> str: ...


class SpanOctets(Protocol):
    """A finished span as octets, or several that ended together.

    Attributes:
        spans: their number.
    """

    @property
    def spans(self) -> int: ...
    @property
    def trace_id(self) -> bytes: ...
    def __len__(self) -> int: ...
    def to_records(self) -> Sequence[FinishedSpan]:
        """The spans as values, in the order in which they ended."""
        ...


class Severity(StrEnum):
    """The worst that happened in a trace."""

    FAILED = "failed"  # the gateway, or what it depends on
    REFUSED = "refused"  # a client's fault, policy, or the upstream's verdict on the mail
    ABORTED = "aborted"  # a client gave up a mail that was not refused
    OK = "ok"


_VERDICTS: Final = frozenset({Outcome.REFUSED, Outcome.PARTLY_RELAYED})
_ERROR_EVENT: Final = names.STATE_EVENTS[ConnState.ERROR]

# OTLP's numbers.
_KINDS: Final = {"INTERNAL": 1, "SERVER": 2, "CLIENT": 3, "PRODUCER": 4, "CONSUMER": 5}
_STATUS_UNSET: Final = 0
_STATUS_ERROR: Final = 2

# A mail's spans have some 2 KiB, so these hold some 4000 mails, and half as many failed ones.
RECENT_SPANS: Final = 20_000
RECENT_OCTETS: Final = 8 * 1024 * 1024
FAILED_SPANS: Final = 10_000
FAILED_OCTETS: Final = 4 * 1024 * 1024
# A full shelf drops a hundredth of its spans at once, so that not every new span has to.
_MADE_AT_ONCE: Final = 100
# Of the object that holds a span's octets, and of its place on a shelf.
_OCTETS_BESIDE: Final = 48
# A batch job may send a hundred thousand mails in one trace of its own.
TRACE_ITEMS: Final = 2_000
FAILED_TRACES: Final = 2_000
_STATES_SHOWN: Final = 64
_VALUES_SHOWN: Final = 10

_WORDS_SHOWN: Final = 3
_HEXADECIMAL: Final = re.compile(r"[0-9a-fA-F]{1,32}")


class KeptTrace:
    """Finished spans of one trace, in the order in which they ended; only the newest of very many.

    Args:
        faults: learns of spans that cannot be read; they are left out.

    Attributes:
        held: their number.
    """

    __slots__ = ("_encoded", "_faults", "_index", "_summary", "held", "trace_id")

    def __init__(self, trace_id: bytes, spans: Sequence[SpanOctets], faults: Faults) -> None:
        self.trace_id = trace_id.hex()
        self.held = sum(one.spans for one in spans)
        self._encoded = spans
        self._faults = faults
        self._summary: dict[str, Any] | None = None
        self._index: TraceIndex | None = None

    def spans(self) -> list[FinishedSpan]:
        """The newest spans that together have no more than `TRACE_ITEMS` spans and events; decoded at each call."""
        found: list[FinishedSpan] = []
        items = 0
        for span in (one for encoded in reversed(self._encoded) for one in reversed(_read(encoded, self._faults))):
            items += 1 + len(span.events)
            if found and items > TRACE_ITEMS:
                break
            found.append(span)
        return found[::-1]

    def summary(self) -> dict[str, Any]:
        """The trace in short, for a list; computed again only after a span was added."""
        return self._worked_out()[0]

    def matches(self, query: Query) -> bool:
        """Whether the trace matches the query."""
        return self._worked_out()[1].has(query)

    def _worked_out(self) -> tuple[dict[str, Any], TraceIndex]:
        """Computes both at once, as decoding the spans takes the time."""
        if self._summary is None or self._index is None:
            spans = sorted(self.spans(), key=lambda span: span.start_ns)
            self._summary = self._summarize(spans)
            carried = [*(span.attributes for span in spans), *(e.attributes for span in spans for e in span.events)]
            self._index = TraceIndex(self.trace_id, carried, (self._summary["severity"],))
        return self._summary, self._index

    def _summarize(self, spans: Sequence[FinishedSpan]) -> dict[str, Any]:
        start = spans[0].start_ns
        end = max(span.end_ns for span in spans)
        events = [event for span in spans for event in span.events]
        events.sort(key=lambda event: event.time_ns)
        codes = [span.attributes.get(names.REPLY_CODE) for span in spans if span.name != names.SPAN_CONNECTION]
        codes += [event.attributes.get(names.REPLY_CODE) for event in events]
        states = [event.attributes[names.STATE] for event in events if names.STATE in event.attributes]
        return {
            "trace_id": self.trace_id,
            "start_unix_milliseconds": start / 1e6,
            "end_unix_milliseconds": end / 1e6,
            "duration_milliseconds": (end - start) / 1e6,
            "severity": str(_severity(spans)),
            "spans": len(spans),
            "events": len(events),
            "dropped_spans": self.held - len(spans),
            "listeners": _values(spans, names.LISTENER),
            "clients": _values(spans, names.CLIENT_ADDRESS),
            "senders": _values(spans, names.MAIL_FROM_DOMAIN),
            "domains": _values(spans, names.RCPT_DOMAINS),
            "outcomes": _values((span for span in spans if span.name == names.SPAN_TRANSACTION), names.OUTCOME),
            "upstreams": _values(spans, names.UPSTREAM_NAME),
            "replies": _distinct(code for code in codes if isinstance(code, int) and code >= 400),
            "codes": _distinct(code for code in codes if isinstance(code, int)),
            "error_types": _distinct(
                attributes[names.ERROR_TYPE]
                for attributes in [*(span.attributes for span in spans), *(event.attributes for event in events)]
                if names.ERROR_TYPE in attributes
            ),
            "words": _words(spans, events),
            "states": states[:_STATES_SHOWN],
        }

    def otlp_json(self, resource: Mapping[str, AttributeValue]) -> dict[str, Any]:
        """The trace in OTLP's JSON, so that Jaeger and Grafana can open the saved answer."""
        shown: list[dict[str, Any]] = []
        for span in sorted(self.spans(), key=lambda span: span.start_ns):
            try:
                shown.append(_otlp_span(span))
            except Exception:  # noqa: BLE001 - logged once; the others are shown
                self._faults.note("span")
        return {
            "resourceSpans": [
                {
                    "resource": {"attributes": _key_values(resource)},
                    "scopeSpans": [{"scope": {"name": names.SCOPE_NAME}, "spans": shown}],
                }
            ]
        }


class _Shelf:
    """Spans in order, with those that ended together as one entry, bounded in number and octets; always has room for
    one.
    """

    __slots__ = ("octets", "octets_room", "spans", "spans_room")

    def __init__(self, spans_room: int, octets_room: int) -> None:
        self.spans: deque[SpanOctets] = deque()
        self.octets = 0
        self.spans_room = spans_room
        self.octets_room = octets_room

    def make_room(self) -> list[SpanOctets]:
        """If there are too many spans, remove the oldest, and some more for the next ones; returns the removed."""
        spans = self.spans
        gone: list[SpanOctets] = []
        if self.octets <= self.octets_room and len(spans) <= self.spans_room:
            return gone
        octets, number = (room - room // _MADE_AT_ONCE for room in (self.octets_room, self.spans_room))
        while len(spans) > 1 and (self.octets > octets or len(spans) > number):
            gone.append(spans.popleft())
            self.octets -= len(gone[-1]) + _OCTETS_BESIDE
        return gone


class RecentTraces:
    """Finished spans, the oldest dropped first; those of traces in which something failed outlive the others.

    Args:
        recent_spans, recent_octets, failed_spans, failed_octets: how much each shelf may hold.
        catch_up: makes and adds the spans of mails that have ended; called before reading.

    Attributes:
        version: grows with every span.
        faults: what cannot be read, and is left out.
    """

    def __init__(
        self,
        *,
        recent_spans: int = RECENT_SPANS,
        recent_octets: int = RECENT_OCTETS,
        failed_spans: int = FAILED_SPANS,
        failed_octets: int = FAILED_OCTETS,
        catch_up: Callable[[], None] = lambda: None,
    ) -> None:
        self._catch_up = catch_up
        self._recent = _Shelf(recent_spans, recent_octets)
        self._failed = _Shelf(failed_spans, failed_octets)
        self._failed_traces: dict[bytes, None] = {}  # in order of their first failure
        self._known: dict[bytes, KeptTrace] = {}
        self.faults = Faults(logger, "recent trace unreadable: internal error")
        self._started_ns = time.time_ns()
        self._has_dropped = False
        self.version = 0

    def add(self, spans: Sequence[SpanOctets], is_trouble: bool = False) -> None:
        """Keep finished spans, each one or some of one trace that ended together. Called on the event loop.

        Args:
            is_trouble: something in them failed.
        """
        self.version += len(spans)
        recent = self._recent
        held = recent.spans
        held.extend(spans)
        recent.octets = octets = recent.octets + sum(map(len, spans)) + len(spans) * _OCTETS_BESIDE
        if is_trouble:
            for span in spans:
                self._note_failure(span.trace_id)
        if octets > recent.octets_room or len(held) > recent.spans_room:
            self._has_dropped = True
            self._outlive(recent.make_room())

    def complete_since_ns(self) -> int:
        """All spans that ended since then are held: since the start, or since the oldest one not dropped.

        Nanoseconds since the epoch.
        """
        if not self._has_dropped:
            return self._started_ns
        readable = (span.end_ns for encoded in self._recent.spans for span in _read(encoded, self.faults))
        return max(next(readable, self._started_ns), self._started_ns)

    def spans(self) -> list[SpanOctets]:
        """All spans held now, the newest first."""
        self._catch_up()
        return [*reversed(self._recent.spans), *reversed(self._failed.spans)]

    def group(self, spans: Iterable[SpanOctets], found: dict[bytes, list[SpanOctets]]) -> None:
        """Put `spans`, newest first, into `found` by their trace; may be called piece by piece."""
        for span in spans:
            trace_id = span.trace_id
            if trace_id in found:
                found[trace_id].append(span)
            else:
                found[trace_id] = [span]

    def trace(self, trace_id: bytes, spans: Sequence[SpanOctets]) -> KeptTrace:
        """The trace of `spans`, newest first; the same object as last time while nothing was added."""
        known = self._known.get(trace_id)
        if known is None or known.held != sum(one.spans for one in spans):
            known = self._known[trace_id] = KeptTrace(trace_id, spans[::-1], self.faults)
        return known

    def forget_all_but(self, trace_ids: Container[bytes]) -> None:
        """Forget the cached results of dropped traces."""
        for trace_id in [known for known in self._known if known not in trace_ids]:
            del self._known[trace_id]

    def get(self, trace_id: str) -> KeptTrace | None:
        """The trace with this id in hexadecimal; leading zeros may be missing."""
        if not _HEXADECIMAL.fullmatch(trace_id):
            return None
        octets = bytes.fromhex(trace_id.zfill(32))
        spans = [span for span in self.spans() if span.trace_id == octets]
        return KeptTrace(octets, spans[::-1], self.faults) if spans else None

    def _note_failure(self, trace_id: bytes) -> None:
        self._failed_traces[trace_id] = None
        if len(self._failed_traces) > FAILED_TRACES:
            del self._failed_traces[next(iter(self._failed_traces))]

    def _outlive(self, gone: Iterable[SpanOctets]) -> None:
        """Keep those whose trace has failed."""
        failed = self._failed
        if not self._failed_traces:
            return
        for span in gone:
            if span.trace_id in self._failed_traces:
                failed.spans.append(span)
                failed.octets += len(span) + _OCTETS_BESIDE
        failed.make_room()


def _read(encoded: SpanOctets, faults: Faults) -> Sequence[FinishedSpan]:
    """The spans as values; none where they cannot be read."""
    try:
        return encoded.to_records()
    except Exception:  # noqa: BLE001 - logged once; the others are shown
        faults.note("span")
        return ()


def _severity(spans: Sequence[FinishedSpan]) -> Severity:
    """The worst that happened in a trace, as far as known.

    A delivery that ended in a 5yz, for all recipients or for some, has the status ERROR, as conventions for clients
    want it; yet the upstream did its work.
    """
    failed = [span for span in spans if span.has_failed]
    if any(span.attributes.get(names.OUTCOME) not in _VERDICTS for span in failed):
        return Severity.FAILED
    if failed or any(event.name == _ERROR_EVENT for span in spans for event in span.events):
        return Severity.REFUSED
    mails = (span for span in spans if span.name == names.SPAN_TRANSACTION)
    if any(mail.attributes.get(names.OUTCOME) == Outcome.ABORTED for mail in mails):
        return Severity.ABORTED
    return Severity.OK


def _words(spans: Sequence[FinishedSpan], events: Sequence[SpanEvent]) -> list[str]:
    """The words about the mail: refusals and failures if there are any, otherwise the upstreams' replies."""
    told = [span.attributes for span in spans] + [event.attributes for event in events]
    reasons = [attributes[names.FAILURE_REASON] for attributes in told if names.FAILURE_REASON in attributes]
    refusals = [_reply(attributes) for attributes in told if _is_refusal(attributes)]
    # One refusal is on several spans and events, and not on each in full.
    refusals = [one for one in refusals if not any(other.startswith(f"{one} ") for other in refusals)]
    if reasons or refusals:
        return _distinct([*reasons, *refusals])[:_WORDS_SHOWN]
    deliveries = (span.attributes for span in spans if span.name == names.SPAN_DELIVERY)
    return _distinct(_reply(attributes) for attributes in deliveries if names.REPLY_TEXT in attributes)[:_WORDS_SHOWN]


def _is_refusal(attributes: Mapping[str, AttributeValue]) -> bool:
    code = attributes.get(names.REPLY_CODE)
    return isinstance(code, int) and code >= 400


def _reply(attributes: Mapping[str, AttributeValue]) -> str:
    """Code, enhanced code and text of a reply, as far as known."""
    parts = (attributes.get(name) for name in (names.REPLY_CODE, names.REPLY_ENHANCED_CODE, names.REPLY_TEXT))
    return " ".join(str(part) for part in parts if part not in (None, ""))


def _distinct(values: Iterable[Any]) -> list[Any]:
    """The first few distinct values, in order of appearance."""
    return list(dict.fromkeys(values))[:_VALUES_SHOWN]


def _values(spans: Iterable[FinishedSpan], name: str) -> list[Any]:
    found: list[Any] = []
    for span in spans:
        value = span.attributes.get(name)
        if isinstance(value, (list, tuple)):
            found.extend(value)
        elif value is not None:
            found.append(value)
    return _distinct(found)


def _otlp_span(span: FinishedSpan) -> dict[str, Any]:
    return {
        "traceId": f"{span.context.trace_id:032x}",
        "spanId": f"{span.context.span_id:016x}",
        **({} if span.parent is None else {"parentSpanId": f"{span.parent.span_id:016x}"}),
        "name": span.name,
        "kind": _KINDS[span.kind.name],
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _key_values(span.attributes),
        "events": [
            {"timeUnixNano": str(event.time_ns), "name": event.name, "attributes": _key_values(event.attributes)}
            for event in span.events
        ],
        "links": [
            {
                "traceId": f"{link.context.trace_id:032x}",
                "spanId": f"{link.context.span_id:016x}",
                "attributes": _key_values(link.attributes),
            }
            for link in span.links
        ],
        "status": {
            "code": _STATUS_ERROR if span.has_failed else _STATUS_UNSET,
            **({"message": span.description} if span.description else {}),
        },
    }


def _key_values(attributes: Mapping[str, AttributeValue]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: AttributeValue) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}  # protobuf's JSON writes 64-bit integers as text
        case float():
            return {"doubleValue": value}
        case str():
            return {"stringValue": value}
        case _:
            return {"arrayValue": {"values": [_value(each) for each in value]}}
