"""Observers side by side: one that raises is dropped, and nobody else notices."""

import logging
from collections.abc import Mapping

import pytest

from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionObserver,
    DeliveryObserver,
    DeliveryPhase,
    Endpoint,
    Observer,
    Outcome,
    StateCallback,
    TraceHeaders,
    TransactionObserver,
    fan_out,
)
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.states import CloseReason, ConnState, Transition

CONNECTION = ConnectionInfo("0" * 32, Endpoint("127.0.0.1", 40000), Endpoint("127.0.0.1", 2525), "local")
NEW = Transition(ConnState.NEW, None, ConnState.NEW, 1)
ACTIVE = Transition(ConnState.ACTIVE, ConnState.NEW, ConnState.ACTIVE, 2)


class Recording(Observer, ConnectionObserver, TransactionObserver, DeliveryObserver):
    """Every handle of the tree in one object; notes what it is told."""

    def __init__(self, name: str, *, raises_at: str = "", trace: str = "") -> None:
        self.name = name
        self.raises_at = raises_at
        self.trace = trace
        self.told: list[str] = []

    def note(self, what: str) -> None:
        self.told.append(what)
        if what == self.raises_at:
            raise ValueError(what)

    def connection_opened(self, connection: ConnectionInfo) -> ConnectionObserver:
        self.note("connection_opened")
        return self

    def conn_state(self, transition: Transition) -> None:
        self.note(f"conn_state {transition.state}")

    def transaction_begun(self, mail: Mail, number: int) -> TransactionObserver:
        self.note("transaction_begun")
        return self

    def header_received(self, trace: TraceHeaders, *, message_id: str | None) -> None:
        self.note("header_received")

    def delivery_begun(self, upstream: str, server: Endpoint, *, attempt: int = 1) -> DeliveryObserver:
        self.note(f"delivery_begun {attempt}")
        return self

    def phase(self, phase: DeliveryPhase, reply: replies.Reply | None = None) -> None:
        self.note(f"phase {phase}")

    def carrier(self) -> Mapping[str, str]:
        return {"traceparent": self.trace} if self.trace else {}

    def trace_id(self) -> str | None:
        return self.trace or None

    def ended(self, outcome: Outcome, reply: replies.Reply | None, **more: object) -> None:
        self.note(f"ended {outcome}")

    def closed(self, reason: CloseReason, *, octets_received: int, octets_sent: int) -> None:
        self.note(f"closed {reason}")


def tell_a_mail(observer: Observer) -> tuple[str | None, Mapping[str, str]]:
    connection = observer.connection_opened(CONNECTION)
    connection.conn_state(NEW)
    transaction = connection.transaction_begun(Mail("a@example.com"), 1)
    transaction.recipient_answered(Recipient("b@example.org"), replies.RECIPIENT_OK)
    transaction.header_received(TraceHeaders(), message_id=None)
    delivery = transaction.delivery_begun("provider", Endpoint("upstream.example", 25))
    delivery.phase(DeliveryPhase.MAIL, replies.OK)
    delivery.ended(Outcome.RELAYED, replies.OK, round_trips=2)
    transaction.ended(Outcome.RELAYED, replies.OK)
    connection.closed(CloseReason.QUIT, octets_received=1, octets_sent=2)
    return transaction.trace_id(), delivery.carrier()


ALL = [
    "connection_opened",
    "conn_state New",
    "transaction_begun",
    "header_received",
    "delivery_begun 1",
    "phase mail",
    "ended relayed",
    "ended relayed",
    "closed quit",
]


def test_every_member_is_told_everything_in_order() -> None:
    members = [Recording("a"), Recording("b")]
    tell_a_mail(fan_out(members))
    assert [member.told for member in members] == [ALL, ALL]


@pytest.mark.parametrize("method", sorted(set(ALL)))
def test_a_member_that_raises_is_dropped_for_good_and_logged_once(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Recording("bad", raises_at=method), Recording("good")
    fan = fan_out([bad, good])
    with caplog.at_level(logging.ERROR, "otel_smtp"):
        tell_a_mail(fan)
        tell_a_mail(fan)
    assert good.told == ALL * 2
    assert bad.told == ALL[: ALL.index(method) + 1]
    assert len(caplog.records) == 1


def test_the_first_answer_that_is_not_empty_holds() -> None:
    assert tell_a_mail(fan_out([Recording("a"), Recording("b", trace="t1"), Recording("c", trace="t2")])) == (
        "t1",
        {"traceparent": "t1"},
    )
    assert tell_a_mail(fan_out([Recording("a")])) == (None, {})


def test_a_conn_state_callback_gets_the_connection_and_each_transition() -> None:
    told: list[tuple[ConnectionInfo, Transition]] = []
    handle = StateCallback(lambda connection, transition: told.append((connection, transition))).connection_opened(
        CONNECTION
    )
    handle.conn_state(NEW)
    handle.conn_state(ACTIVE)
    assert told == [(CONNECTION, NEW), (CONNECTION, ACTIVE)]


@pytest.mark.parametrize(
    ("endpoint", "text"),
    [
        (Endpoint("127.0.0.1", 25), "127.0.0.1:25"),
        (Endpoint("::1", 25), "[::1]:25"),
        (Endpoint("/run/smtp.sock"), "/run/smtp.sock"),
    ],
)
def test_an_endpoint_reads_as_people_write_it(endpoint: Endpoint, text: str) -> None:
    assert str(endpoint) == text
