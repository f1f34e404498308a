"""Recent traces, kept in memory so that a mail can be looked up without any backend.

Spans come one by one as they end, of any trace in any order. Adding one is an append; which spans make a trace, what it
says in short (`Trace.summary`) and in full (`Trace.otlp_json`) is worked out for who looks.

Two bounded shelves: the recent spans, and behind them those of traces in which something failed, so that an error of
last night is still found after ten thousand good mails. The bound is on spans and events together, since they are
what takes memory.
"""

import re
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, Protocol

from otel_smtp.observing import Outcome

AttributeValue = str | bool | int | float | Sequence[str]


class SpanIdentity(Protocol):
    """Which span of which trace."""

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
    """What is read of a span that is over; times are since the epoch."""

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


class Severity(StrEnum):
    """How a trace went."""

    FAILED = "failed"  # the gateway, or what it depends on
    REFUSED = "refused"  # a client's fault, policy, or the upstream's verdict on the mail
    OK = "ok"


# Names of telemetry.md that a trace's summary is read from.
_ERROR_EVENT: Final = "smtp.state.error"
_STATE: Final = "smtp.state"
_OUTCOME: Final = "smtp.outcome"
_REPLY_CODE: Final = "smtp.reply.code"
_ERROR_TYPE: Final = "error.type"
_CONNECTION_ERRORS: Final = "smtp.connection.errors"
_SPAN_CONNECTION: Final = "smtp.connection"
_SPAN_TRANSACTION: Final = "smtp.transaction"
_SPAN_DELIVERY: Final = "smtp.delivery"

# OTLP's numbers.
_KINDS: Final = {"INTERNAL": 1, "SERVER": 2, "CLIENT": 3, "PRODUCER": 4, "CONSUMER": 5}
_STATUS_UNSET: Final = 0
_STATUS_ERROR: Final = 2

# About 1 KiB an item at worst and a third of it usually: some 7 MB for the recent ones, half for the failed.
RECENT_ITEMS: Final = 20_000
FAILED_ITEMS: Final = 10_000
# A batch job may send a hundred thousand mails in one trace of its own.
TRACE_ITEMS: Final = 2_000
FAILED_TRACES: Final = 2_000
_STATES_SHOWN: Final = 64
_VALUES_SHOWN: Final = 10

_TRACE_ID: Final = re.compile(r"[0-9a-f]{6,32}")
_HEXADECIMAL: Final = re.compile(r"[0-9a-fA-F]{1,32}")
_CODE: Final = re.compile(r"[2-5]\d\d")


class Trace:
    """Finished spans of one trace, in the order in which they ended: the newest of them where they are very many."""

    __slots__ = ("_summary", "dropped_spans", "held", "spans", "trace_id")

    def __init__(self, trace_id: int, spans: Sequence[FinishedSpan]) -> None:
        self.trace_id = f"{trace_id:032x}"
        self.held = len(spans)  # tells whether more have come since
        items = 0
        first = len(spans)
        while first and (first == len(spans) or items + 1 + len(spans[first - 1].events) <= TRACE_ITEMS):
            first -= 1
            items += 1 + len(spans[first].events)
        self.spans = spans[first:]
        self.dropped_spans = first
        self._summary: dict[str, Any] | None = None

    @property
    def severity(self) -> Severity:
        """How it went, as far as it is known.

        A delivery that ended in a 5yz has the status ERROR, as conventions for clients want it; yet the upstream did
        its work.
        """
        failed = [span for span in self.spans if span.has_failed]
        if any(span.attributes.get(_OUTCOME) != Outcome.REFUSED for span in failed):
            return Severity.FAILED
        if failed or any(event.name == _ERROR_EVENT for span in self.spans for event in span.events):
            return Severity.REFUSED
        return Severity.OK

    def summary(self) -> dict[str, Any]:
        """The trace in short, for a list; worked out once and again after a span was added."""
        if self._summary is None:
            self._summary = self._summarize()
        return self._summary

    def _summarize(self) -> dict[str, Any]:
        spans = sorted(self.spans, key=lambda span: span.start_ns)
        start = spans[0].start_ns
        end = max(span.end_ns for span in spans)
        events = [event for span in spans for event in span.events]
        events.sort(key=lambda event: event.time_ns)
        codes = [span.attributes.get(_REPLY_CODE) for span in spans if span.name != _SPAN_CONNECTION]
        codes += [event.attributes.get(_REPLY_CODE) for event in events]
        states = [event.attributes[_STATE] for event in events if _STATE in event.attributes]
        return {
            "trace_id": self.trace_id,
            "start_unix_milliseconds": start / 1e6,
            "duration_milliseconds": (end - start) / 1e6,
            "severity": str(self.severity),
            "spans": len(spans),
            "events": len(events),
            "dropped_spans": self.dropped_spans,
            "listeners": _values(spans, "smtp.listener"),
            "clients": _values(spans, "client.address"),
            "senders": _values(spans, "smtp.mail.from.domain"),
            "domains": _values(spans, "smtp.rcpt.domains"),
            "outcomes": _values((span for span in spans if span.name == _SPAN_TRANSACTION), _OUTCOME),
            "upstreams": _values(spans, "smtp.upstream.name"),
            "replies": _distinct(code for code in codes if isinstance(code, int) and code >= 400),
            "codes": _distinct(code for code in codes if isinstance(code, int)),
            "error_types": _distinct(
                attributes[_ERROR_TYPE]
                for attributes in [*(span.attributes for span in spans), *(event.attributes for event in events)]
                if _ERROR_TYPE in attributes
            ),
            "states": states[:_STATES_SHOWN],
        }

    def matches(self, terms: Sequence[str]) -> bool:
        """Whether the trace has all of `terms` (lower case).

        A term is the beginning of a trace id, a reply code, a severity, or part of an outcome, domain, upstream,
        listener, client, error type or state.
        """
        summary = self.summary()
        return all(self._matches(summary, term) for term in terms)

    def _matches(self, summary: Mapping[str, Any], term: str) -> bool:
        if _CODE.fullmatch(term):
            return int(term) in summary["codes"]
        # Backends print a trace id without its leading zeros.
        if _TRACE_ID.fullmatch(term) and (
            self.trace_id.startswith(term) or self.trace_id.lstrip("0").startswith(term.lstrip("0") or "0")
        ):
            return True
        if term == summary["severity"]:
            return True
        return any(
            term in str(value).lower()
            for field in (
                "outcomes",
                "domains",
                "senders",
                "upstreams",
                "listeners",
                "clients",
                "error_types",
                "states",
            )
            for value in summary[field]
        )

    def otlp_json(self, resource: Mapping[str, AttributeValue]) -> dict[str, Any]:
        """The trace as OTLP writes it in JSON, so that Jaeger and Grafana can open the saved answer."""
        spans = sorted(self.spans, key=lambda span: span.start_ns)
        return {
            "resourceSpans": [
                {
                    "resource": {"attributes": _key_values(resource)},
                    "scopeSpans": [{"scope": {"name": "otel_smtp"}, "spans": [_otlp_span(span) for span in spans]}],
                }
            ]
        }


class RecentTraces:
    """Finished spans, the oldest dropped first; those of traces in which something failed outlive the others.

    Args:
        recent_items, failed_items: how many spans and events each shelf may hold.

    Attributes:
        version: grows with every span.
    """

    def __init__(self, *, recent_items: int = RECENT_ITEMS, failed_items: int = FAILED_ITEMS) -> None:
        self._recent: deque[FinishedSpan] = deque()
        self._recent_room = recent_items
        self._failed: deque[FinishedSpan] = deque()
        self._failed_room = failed_items
        self._failed_traces: dict[int, None] = {}  # in order of their first failure
        self._known: dict[int, Trace] = {}
        self.version = 0

    def add(self, span: FinishedSpan) -> None:
        """Keep a finished span. Called on the mail path."""
        self.version += 1
        self._recent.append(span)
        self._recent_room -= 1 + len(span.events)
        if span.has_failed or span.attributes.get(_CONNECTION_ERRORS):
            self._note_failure(span.context.trace_id)
        while self._recent_room < 0 and len(self._recent) > 1:
            oldest = self._recent.popleft()
            self._recent_room += 1 + len(oldest.events)
            if oldest.context.trace_id in self._failed_traces:
                self._outlive(oldest)

    def spans(self) -> list[FinishedSpan]:
        """All that is held now, the newest first."""
        return [*reversed(self._recent), *reversed(self._failed)]

    def group(self, spans: Iterable[FinishedSpan], found: dict[int, list[FinishedSpan]]) -> None:
        """Put `spans`, newest first, into `found` by their trace; may be called piece by piece."""
        for span in spans:
            trace_id = span.context.trace_id
            if trace_id in found:
                found[trace_id].append(span)
            else:
                found[trace_id] = [span]

    def trace(self, trace_id: int, spans: Sequence[FinishedSpan]) -> Trace:
        """The trace of `spans`, newest first; the same object as last time while nothing was added."""
        known = self._known.get(trace_id)
        if known is None or known.held != len(spans):
            known = self._known[trace_id] = Trace(trace_id, spans[::-1])
        return known

    def forget_all_but(self, trace_ids: Container[int]) -> None:
        """Forget what was worked out for traces that are gone."""
        for trace_id in [known for known in self._known if known not in trace_ids]:
            del self._known[trace_id]

    def get(self, trace_id: str) -> Trace | None:
        """The trace with this id in hexadecimal; leading zeros may be missing."""
        if not _HEXADECIMAL.fullmatch(trace_id):
            return None
        number = int(trace_id, 16)
        spans = [span for span in self.spans() if span.context.trace_id == number]
        return Trace(number, spans[::-1]) if spans else None

    def newest_first(self) -> Iterator[Trace]:
        """All traces as they are now, by the end of their last span."""
        found: dict[int, list[FinishedSpan]] = {}
        self.group(self.spans(), found)
        for trace_id, spans in found.items():
            yield self.trace(trace_id, spans)

    def _note_failure(self, trace_id: int) -> None:
        self._failed_traces[trace_id] = None
        if len(self._failed_traces) > FAILED_TRACES:
            del self._failed_traces[next(iter(self._failed_traces))]

    def _outlive(self, span: FinishedSpan) -> None:
        self._failed.append(span)
        self._failed_room -= 1 + len(span.events)
        while self._failed_room < 0 and len(self._failed) > 1:
            self._failed_room += 1 + len(self._failed.popleft().events)


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
        "status": {"code": _STATUS_ERROR if span.has_failed else _STATUS_UNSET},
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
