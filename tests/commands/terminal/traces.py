"""Traces as values, for drawing."""

from dataclasses import dataclass, field
from typing import Any

TRACE_ID = 0x8120F0945E1C4F6A9D0B7A2C33D1E870


@dataclass(frozen=True)
class Event:
    name: str
    time_ns: int
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    trace_id: int
    span_id: int


@dataclass(frozen=True)
class Link:
    context: Context


@dataclass(frozen=True)
class Span:
    name: str
    span_id: int
    parent_id: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    links_to: int | None = None

    @property
    def context(self) -> Context:
        return Context(TRACE_ID, self.span_id)

    @property
    def parent(self) -> Context | None:
        return Context(TRACE_ID, self.parent_id) if self.parent_id else None

    @property
    def links(self) -> tuple[Link, ...]:
        return (Link(Context(TRACE_ID, self.links_to)),) if self.links_to else ()


def at(milliseconds: float) -> int:
    """Nanoseconds since the epoch, of a trace that began at a round hour."""
    return 1_750_000_000_000_000_000 + round(milliseconds * 1e6)


def state(name: str, milliseconds: float, **attributes: Any) -> Event:
    """A state event; attributes are given with `_` for the dots behind `smtp`."""
    return Event(f"smtp.state.{name.lower()}", at(milliseconds), {"smtp.state": name, **attributes})


def phase(name: str, milliseconds: float, code: int | None = None, enhanced: str | None = None) -> Event:
    """A delivery event with the upstream's code."""
    attributes: dict[str, Any] = {}
    if code is not None:
        attributes["smtp.reply.code"] = code
    if enhanced is not None:
        attributes["smtp.reply.enhanced_code"] = enhanced
    return Event(f"smtp.upstream.{name}", at(milliseconds), attributes)


def refused_mail() -> list[Span]:
    """A mail over STARTTLS that the upstream refuses at its end; in the order in which the spans end."""
    delivery = Span(
        "smtp.delivery",
        3,
        2,
        at(6.4),
        at(52.5),
        {
            "server.address": "127.0.0.1",
            "server.port": 1025,
            "smtp.upstream.name": "provider",
            "smtp.delivery.attempt": 1,
            "smtp.pool.reused": False,
            "smtp.pool.wait": 0.0001,
            "smtp.reply.code": 550,
            "smtp.reply.enhanced_code": "5.1.1",
            "smtp.reply.text": "No such user here",
            "smtp.round_trips": 4,
            "smtp.outcome": "refused",
            "error.type": "upstream_refused",
        },
        (
            phase("pool", 6.5),
            phase("connect", 7.1),
            phase("greeting", 8.0, 220),
            phase("ehlo", 8.8, 250),
            phase("mail", 9.9, 250, "2.1.0"),
            phase("rcpt", 10.0, 250, "2.1.5"),
            phase("data", 12.0, 354),
            phase("content", 20.0),
            phase("reply", 52.4, 550, "5.1.1"),
        ),
    )
    transaction = Span(
        "smtp.transaction",
        2,
        1,
        at(6.2),
        at(52.6),
        {
            "smtp.outcome": "refused",
            "smtp.reply.code": 550,
            "smtp.reply.enhanced_code": "5.1.1",
            "smtp.mail.from.domain": "shop.example",
            "smtp.rcpt.domains": ("example.org", "example.net"),
            "smtp.transaction.number": 1,
            "smtp.transaction.recipient_count": 2,
            "smtp.transaction.recipients_refused": 1,
            "smtp.message.size": 1284,
            "smtp.body": "8bitmime",
        },
    )
    connection = Span(
        "smtp.connection",
        1,
        0,
        at(0),
        at(53.1),
        {
            "smtp.connection.id": "7d4f",
            "smtp.listener": "local",
            "client.address": "127.0.0.1",
            "client.port": 48122,
            "server.address": "::1",
            "server.port": 2525,
            "network.transport": "tcp",
            "smtp.helo": "app.example",
            "smtp.connection.messages": 1,
            "smtp.connection.errors": 1,
            "smtp.connection.octets_received": 1500,
            "smtp.connection.octets_sent": 900,
            "smtp.close.reason": "quit",
        },
        (
            state("New", 0.0, **{"smtp.tls.mode": "starttls"}),
            state("Active", 0.3),
            state("StartTLS", 2.0),
            state("Active", 5.5, **{"tls.protocol.version": "1.3", "tls.cipher": "TLS_AES_256_GCM_SHA384"}),
            state("Data", 11.0, **{"smtp.transaction.number": 1, "smtp.transaction.recipient_count": 2}),
            state(
                "Error",
                52.6,
                **{
                    "smtp.verb": "DATA",
                    "smtp.reply.code": 550,
                    "smtp.reply.enhanced_code": "5.1.1",
                    "error.type": "upstream_refused",
                },
            ),
            state("Idle", 52.7),
            state("Closed", 53.1, **{"smtp.close.reason": "quit"}),
        ),
    )
    return [delivery, transaction, connection]


def vanished_client() -> list[Span]:
    """A client that connects and goes."""
    return [
        Span(
            "smtp.connection",
            1,
            0,
            at(0),
            at(1.25),
            {"client.address": "127.0.0.1", "client.port": 5, "server.address": "127.0.0.1", "server.port": 2525},
            (
                state("New", 0.0, **{"smtp.tls.mode": "off"}),
                state("Active", 0.1),
                state("Closed", 1.25, **{"smtp.close.reason": "client_disconnect"}),
            ),
        )
    ]


def two_mails_with_failover() -> list[Span]:
    """Two mails on one connection; the second is tried at two upstreams, one after the other."""
    spans = [
        Span("smtp.delivery", 10, 2, at(12), at(18), {"server.address": "a.example", "server.port": 25}),
        Span("smtp.transaction", 2, 1, at(10), at(20), {"smtp.outcome": "relayed", "smtp.reply.code": 250}),
        Span("smtp.delivery", 11, 3, at(42), at(50), {"server.address": "a.example", "server.port": 25}),
        Span("smtp.delivery", 12, 3, at(50), at(58), {"server.address": "b.example", "server.port": 25}),
        Span("smtp.transaction", 3, 1, at(40), at(60), {"smtp.outcome": "relayed", "smtp.reply.code": 250}),
    ]
    events = tuple(state(name, when) for name, when in [("New", 0), ("Active", 1), ("Idle", 20), ("Closed", 70)])
    return [*spans, Span("smtp.connection", 1, 0, at(0), at(70), {}, events)]
