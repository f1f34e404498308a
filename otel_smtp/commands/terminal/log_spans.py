"""Makes spans from lines of the gateway's JSON log, so that a log alone shows the fate of a mail.

A line has its span's data, except events other than recipients', and its parent, which is found by connection, queue id
and time.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from otel_smtp.commands.terminal.otlp_spans import OtlpEvent, OtlpSpan, SpanId
from otel_smtp.telemetry import attributes as names

_SPANS: Final = frozenset({names.SPAN_CONNECTION, names.SPAN_TRANSACTION, names.SPAN_DELIVERY, names.SPAN_SPOOL})
_OF_THE_LINE: Final = frozenset(
    {
        names.LOG_TIMESTAMP,
        names.LOG_LEVEL,
        names.LOG_LOGGER,
        names.LOG_EVENT,
        names.LOG_TRACE_ID,
        names.LOG_SPAN_ID,
        names.LOG_DURATION,
    }
)
_NO_SPAN: Final = 0  # the root of spans whose parent is not in the log


def spans_of_lines(lines: Iterable[Mapping[str, Any]]) -> list[OtlpSpan]:
    """The spans that the lines of one trace describe, in order of their start.

    Raises:
        ValueError, KeyError, TypeError: a line is not the gateway's.
    """
    spans: list[OtlpSpan] = []
    told: dict[int, list[OtlpEvent]] = {}
    for line in lines:
        attributes = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in line.items()
            if name not in _OF_THE_LINE
        }
        span_id, end_ns = int(line[names.LOG_SPAN_ID], 16), _nanoseconds(line[names.LOG_TIMESTAMP])
        if line[names.LOG_EVENT] == names.RECIPIENT_EVENT:
            told.setdefault(span_id, []).append(OtlpEvent(names.RECIPIENT_EVENT, end_ns, attributes))
        elif line[names.LOG_EVENT] in _SPANS:
            start_ns = end_ns - round(float(line.get(names.LOG_DURATION, 0.0)) * 1e9)
            context = SpanId(int(line[names.LOG_TRACE_ID], 16), span_id)
            has_failed = line.get(names.LOG_LEVEL) == "warning"
            spans.append(
                OtlpSpan(line[names.LOG_EVENT], context, None, (), start_ns, end_ns, attributes, (), has_failed)
            )
    spans.sort(key=lambda span: span.start_ns)
    return [span._replace(parent=_parent(span, spans), events=told.get(span.context.span_id, ())) for span in spans]


def _parent(span: OtlpSpan, spans: Sequence[OtlpSpan]) -> SpanId | None:
    match span.name:
        case names.SPAN_TRANSACTION:
            above = [one for one in spans if one.name == names.SPAN_CONNECTION and _have_same(one, span)]
        case names.SPAN_DELIVERY | names.SPAN_SPOOL:
            above = [one for one in spans if one.name == names.SPAN_TRANSACTION and _belongs_to(span, one)]
            # Of a connection's transactions, the one whose line came next.
            above.sort(key=lambda one: -one.end_ns)
            if not above:
                return SpanId(span.context.trace_id, _NO_SPAN)
        case _:
            above = []
    return above[-1].context if above else None


def _belongs_to(delivery: OtlpSpan, transaction: OtlpSpan) -> bool:
    spool_id = delivery.attributes.get(names.SPOOL_ID)
    if spool_id is not None:
        return bool(transaction.attributes.get(names.SPOOL_ID) == spool_id)
    return _have_same(delivery, transaction) and delivery.end_ns <= transaction.end_ns


def _have_same(one: OtlpSpan, other: OtlpSpan) -> bool:
    connection = one.attributes.get(names.CONNECTION_ID)
    return connection is not None and connection == other.attributes.get(names.CONNECTION_ID)


def _nanoseconds(timestamp: str) -> int:
    return round(datetime.fromisoformat(timestamp).timestamp() * 1e6) * 1000
