"""Finished spans as values and as octets, for the tests that read them."""

from collections.abc import Sequence

from opentelemetry.trace import SpanKind as Kind

from otel_smtp.telemetry.attributes import AttributeValue as Value
from otel_smtp.telemetry.propagation import TraceContext
from otel_smtp.telemetry.records import EventRecord as Event
from otel_smtp.telemetry.records import LinkRecord as Link
from otel_smtp.telemetry.records import SpanRecord
from otel_smtp.telemetry.shapes import EncodedSpan, EventShape, SpanShape, encode, encode_event

__all__ = [
    "MILLISECOND",
    "START",
    "Event",
    "Identity",
    "Kind",
    "Link",
    "Span",
    "Value",
    "encoded",
    "mail_trace",
    "state_events",
]


def Identity(trace_id: int, span_id: int) -> TraceContext:
    return TraceContext(trace_id, span_id, 0)


def Span(
    name: str,
    kind: Kind,
    context: TraceContext,
    parent: TraceContext | None,
    start_ns: int,
    end_ns: int,
    attributes: dict[str, Value],
    events: Sequence[Event],
    links: Sequence[Link],
    has_failed: bool,
) -> SpanRecord:
    return SpanRecord(name, kind, context, parent, start_ns, end_ns, attributes, events, links, has_failed, True)


def encoded(record: SpanRecord, constant: int = 0) -> EncodedSpan:
    """`record` as octets.

    Args:
        constant: so many of the attributes, of the span and of each event, belong to its shape.
    """
    attributes = list(record.attributes.items())
    constants, why = dict(attributes[:constant]), record.description
    shape = SpanShape(record.name, record.kind, constants, has_failed=record.has_failed, description=why)
    events: list[bytes] = []
    for event in record.events:
        of_event = list(event.attributes.items())
        events.append(
            encode_event(event.time_ns, EventShape(event.name, dict(of_event[:constant])), of_event[constant:])
        )
    return encode(
        shape,
        record.context,
        record.parent,
        record.start_ns,
        record.end_ns,
        attributes[constant:],
        events,
        record.links,
    )


MILLISECOND = 1_000_000
START = 1_800_000_000_000_000_000


def state_events(states: str, start_ns: int, *, code: int = 550, step_ns: int = 2 * MILLISECOND) -> list[Event]:
    """Events for `states`, as "New Active Data", one step apart; an Error carries `code`."""
    previous = None
    events = []
    for number, state in enumerate(states.split()):
        attributes: dict[str, Value] = {"smtp.state": state, "smtp.state.sequence": number + 1}
        if previous is not None:
            attributes["smtp.state.previous"] = previous
        if state == "Error":
            attributes |= {"smtp.reply.code": code, "smtp.verb": "RCPT", "error.type": "address"}
        events.append(Event(start_ns + number * step_ns, f"smtp.state.{state.lower()}", attributes))
        previous = state
    return events


def mail_trace(
    trace_id: int,
    *,
    states: str = "New Active Data Active Idle Closed",
    outcome: str = "relayed",
    code: int = 250,
    domain: str = "example.net",
    upstream: str = "provider",
    has_failed: bool = False,
    start_ns: int = START,
) -> list[EncodedSpan]:
    """One connection with one mail and one delivery, in the order in which they end."""
    connection = Identity(trace_id, 1)
    transaction = Identity(trace_id, 2)
    attributes: dict[str, Value] = {"smtp.upstream.name": upstream, "smtp.reply.code": code, "smtp.outcome": outcome}
    if has_failed:
        attributes["error.type"] = "upstream_unavailable"
    spans = [
        Span(
            "smtp.delivery", Kind.CLIENT, Identity(trace_id, 3), transaction,
            start_ns + 4 * MILLISECOND, start_ns + 9 * MILLISECOND, attributes,
            [
                Event(start_ns + 4 * MILLISECOND, "smtp.upstream.pool", {"smtp.pool.reused": True}),
                Event(start_ns + 9 * MILLISECOND, "smtp.upstream.reply", {"smtp.reply.code": code}),
            ],
            [], has_failed,
        ),
        Span(
            "smtp.transaction", Kind.INTERNAL, transaction, connection,
            start_ns + 3 * MILLISECOND, start_ns + 9 * MILLISECOND,
            {
                "smtp.outcome": outcome, "smtp.reply.code": code, "smtp.rcpt.domains": (domain,),
                "smtp.mail.from.domain": "shop.example", "smtp.message.size": 20480,
            },
            [], [], has_failed,
        ),
        Span(
            "smtp.connection", Kind.SERVER, connection, None, start_ns, start_ns + 11 * MILLISECOND,
            {
                "smtp.listener": "local", "client.address": "127.0.0.1", "smtp.connection.messages": 1,
                "smtp.connection.errors": states.split().count("Error"),
            },
            state_events(states, start_ns, code=code), [], False,
        ),
    ]  # fmt: skip
    return list(map(encoded, spans))
