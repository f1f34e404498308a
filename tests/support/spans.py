"""Finished spans as plain values, for whoever reads them."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

Value = str | bool | int | float | Sequence[str]


class Kind(Enum):
    """OpenTelemetry's span kinds, with its Python numbers."""

    INTERNAL = 0
    SERVER = 1
    CLIENT = 2


class Identity(NamedTuple):
    trace_id: int
    span_id: int


class Event(NamedTuple):
    name: str
    time_ns: int
    attributes: Mapping[str, Value]


class Link(NamedTuple):
    context: Identity
    attributes: Mapping[str, Value]


class Span(NamedTuple):
    name: str
    kind: Kind
    context: Identity
    parent: Identity | None
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Value]
    events: Sequence[Event]
    links: Sequence[Link]
    has_failed: bool


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
        events.append(Event(f"smtp.state.{state.lower()}", start_ns + number * step_ns, attributes))
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
) -> list[Span]:
    """One connection with one mail and one delivery, in the order in which they end."""
    connection = Identity(trace_id, 1)
    transaction = Identity(trace_id, 2)
    attributes: dict[str, Value] = {"smtp.upstream.name": upstream, "smtp.reply.code": code, "smtp.outcome": outcome}
    if has_failed:
        attributes["error.type"] = "upstream_unavailable"
    return [
        Span(
            "smtp.delivery", Kind.CLIENT, Identity(trace_id, 3), transaction,
            start_ns + 4 * MILLISECOND, start_ns + 9 * MILLISECOND, attributes,
            [
                Event("smtp.upstream.pool", start_ns + 4 * MILLISECOND, {"smtp.pool.reused": True}),
                Event("smtp.upstream.reply", start_ns + 9 * MILLISECOND, {"smtp.reply.code": code}),
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
