"""A connection as the session would record and tell it, without a server: the real records and state machine."""

import time
from collections.abc import Mapping, Sequence
from typing import Protocol, Self

from otel_smtp.observing import (
    ConnectionEnd,
    ConnectionInfo,
    ConnectionRecord,
    DeliveryPhase,
    DeliveryRecord,
    Endpoint,
    FanOut,
    Observer,
    Outcome,
    TlsInfo,
    TraceHeaders,
    TransactionRecord,
    fan_out,
)
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import (
    AuthBegun,
    CloseReason,
    ConnectionOver,
    ConnState,
    ContentBegun,
    ErrorReply,
    ResetBy,
    ResetCause,
    StateMachine,
    TlsAgreed,
    TlsMode,
    TlsOffer,
    TransactionOver,
    Transition,
)
from otel_smtp.telemetry.records import SpanRecord
from otel_smtp.telemetry.shapes import EncodedPair, EncodedSpan
from otel_smtp.telemetry.tracing import Take

UPSTREAM = Endpoint("smtp.provider.example", 587)
QUEUED = Reply(250, replies.OK.enhanced, ("Ok: queued as 4XyZ12",))
TLS = TlsInfo("1.3", "TLS_AES_256_GCM_SHA384")


def each_to(spans: list[EncodedSpan]) -> Take:
    """What puts every span that is exported into `spans`, each by itself."""

    def take(given: Sequence[EncodedSpan], items: int) -> None:
        each = [one for span in given for one in (span.each() if isinstance(span, EncodedPair) else (span,))]
        assert len(each) == items
        spans.extend(each)

    return take


class Clock(Protocol):
    """A monotonic and a wall clock."""

    def monotonic_ns(self) -> int: ...
    def time_ns(self) -> int: ...


class FakeClock:
    """A monotonic and a wall clock that move when told to, and a nanosecond at each look."""

    def __init__(self) -> None:
        self.now_ns = 5_000_000_000
        self.wall_minus_monotonic_ns = 1_700_000_000_000_000_000

    def monotonic_ns(self) -> int:
        self.now_ns += 1
        return self.now_ns

    def time_ns(self) -> int:
        return self.now_ns + self.wall_minus_monotonic_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


class Kept:
    """A sink that keeps what it takes."""

    def __init__(self) -> None:
        self.records: list[SpanRecord] = []

    def take(self, record: SpanRecord) -> None:
        self.records.append(record)

    def named(self, name: str) -> list[SpanRecord]:
        return [record for record in self.records if record.name == name]

    def one(self, name: str) -> SpanRecord:
        [record] = self.named(name)
        return record


class Client:
    """One client connection, recorded and told to an observer in the order in which the session does it.

    Args:
        segment_events, segment_age_seconds: a segment ends between transactions when it has so many transitions or is
            so old.
    """

    ids = 0

    def __init__(
        self,
        observer: Observer | Sequence[Observer],
        *,
        peer: str = "192.0.2.7",
        listener: str = "local",
        tls_mode: TlsMode = TlsMode.OFF,
        transport: str = "tcp",
        clock: Clock = time,
        segment_events: int = 500,
        segment_age_seconds: float = 300.0,
    ) -> None:
        Client.ids += 1
        local = Endpoint("/run/smtp.sock") if transport == "unix" else Endpoint("127.0.0.1", 2525)
        remote = Endpoint("") if transport == "unix" else Endpoint(peer, 50732)
        self.info = ConnectionInfo(f"{Client.ids:032x}", remote, local, listener, "smtp", transport, tls_mode)
        if not isinstance(observer, FanOut):
            observer = fan_out([observer] if isinstance(observer, Observer) else observer)
        self.observer = observer
        self.clock = clock
        self._segment_events = segment_events
        self._segment_age_ns = int(segment_age_seconds * 1e9)
        now_ns = clock.monotonic_ns()
        self.record = ConnectionRecord(self.info, now_ns, clock.time_ns() - now_ns)
        observer.connection_opened(self.record)
        self.machine = StateMachine(self)
        self.transaction: TransactionRecord | None = None
        self.transactions = 0
        self.recipients = 0
        self.octets_received = 0
        self.octets_sent = 0
        self._enter(ConnState.NEW, TlsOffer(tls_mode))
        if tls_mode is TlsMode.IMPLICIT:
            self._enter(ConnState.STARTTLS, TlsOffer(tls_mode))
            self._handshake()
            self._reply(None, replies.greeting("gw"))
        else:
            self._active(None, replies.greeting("gw"))

    def append(self, transition: Transition) -> None:
        """Take a transition from the state machine."""
        self.record.transitions.append(transition)
        self.observer.conn_state(self.record, transition)

    def _enter(self, state: ConnState, *detail: TlsOffer | TlsAgreed | AuthBegun | ContentBegun | TransactionOver
               | ResetBy | ErrorReply | ConnectionOver) -> None:  # fmt: skip
        self.machine.now_ns = self.clock.monotonic_ns()
        self.machine.enter(state, *detail)

    def _reply(self, verb: str | None, reply: Reply) -> None:
        self.octets_sent += len(reply.wire)
        if verb is not None:
            self.octets_received += 20
        if reply.code >= 400:
            self.record.errors += 1
            number = None if self.transaction is None else self.transactions
            self._enter(ConnState.ERROR, ErrorReply(verb, reply, reply.error_type, number))
        self.record.replies.append((verb, reply))

    def _active(self, verb: str | None, reply: Reply) -> None:
        self._enter(ConnState.ACTIVE)
        self._reply(verb, reply)

    def _handshake(self) -> None:
        self.record.tls = TLS
        self._enter(ConnState.ACTIVE, TlsAgreed(TLS.version, TLS.cipher))

    def proxied(self, client: Endpoint, server: Endpoint) -> Self:
        self.record.proxied(client, server)
        return self

    def ehlo(self, name: str = "client.example") -> Self:
        if self.transaction is not None:
            self._reset(ResetCause.EHLO)
        self.record.hello_verb, self.record.hello_name = "EHLO", name
        self._reply("EHLO", replies.hello("gw"))
        return self

    def starttls(self) -> Self:
        self._enter(ConnState.STARTTLS, TlsOffer(TlsMode.STARTTLS))
        self._reply("STARTTLS", replies.TLS_READY)
        self._handshake()
        return self

    def auth(self, user: str = "alice", reply: Reply = replies.AUTH_SUCCEEDED) -> Self:
        self._enter(ConnState.AUTH, AuthBegun("PLAIN"))
        self.record.auth_mechanism = "PLAIN"
        if reply.is_positive:
            self.record.user = user
            self._enter(ConnState.ACTIVE, AuthBegun("PLAIN"))
            self._reply("AUTH", reply)
        else:
            self._reply("AUTH", reply)
            self.machine.fall_back(ConnState.ACTIVE)
        return self

    def refused(self, verb: str, reply: Reply) -> Self:
        self._reply(verb, reply)
        return self

    def mail(self, sender: str = "news@example.com", mail: Mail | None = None) -> Self:
        self.rotate_if_due()
        self.transactions += 1
        self._enter(ConnState.ACTIVE)
        record = self.record
        now_ns = self.clock.monotonic_ns()
        self.transaction = TransactionRecord(
            mail or Mail(sender), self.transactions, record, now_ns, record.wall_offset_ns
        )
        self.recipients = 0
        self._reply("MAIL", replies.SENDER_OK)
        return self

    def rcpt(self, address: str = "bob@example.net", reply: Reply = replies.RECIPIENT_OK) -> Self:
        assert self.transaction is not None
        if reply.is_positive:
            self.transaction.accepted.append(Recipient(address))
        else:
            self.transaction.refuse(Recipient(address), reply, self.clock.monotonic_ns())
        self.recipients += reply.is_positive
        self._reply("RCPT", reply)
        return self

    def data(self, verb: str = "DATA") -> Self:
        self._enter(ConnState.DATA, ContentBegun(self.transactions, self.recipients))
        self._reply(verb, replies.SEND_CONTENT if verb == "DATA" else replies.chunk_received(5))
        return self

    def header(self, *traceparents: str, tracestate: str = "", message_id: str | None = "<1@example.com>") -> Self:
        assert self.transaction is not None
        self.transaction.trace_headers = TraceHeaders(traceparents, tracestate)
        self.transaction.message_id = message_id
        return self

    def trace_id(self) -> str | None:
        """The trace id that the client is shown."""
        assert self.transaction is not None
        return self.observer.trace_id(self.transaction)

    def final(
        self,
        reply: Reply | None = None,
        outcome: Outcome = Outcome.RELAYED,
        *,
        octets: int = 2000,
        error_type: ErrorType | None = None,
    ) -> Self:
        transaction = self.transaction
        assert transaction is not None
        self.octets_received += octets
        transaction.octets = octets
        reply = reply or replies.message_accepted(self.trace_id())
        self.record.messages += 1
        if reply.is_positive:
            self._enter(ConnState.ACTIVE)
        self._reply("DATA", reply)
        self._enter(ConnState.IDLE, TransactionOver(self.record.messages))
        self._end(transaction, outcome, reply, error_type)
        return self

    def _end(
        self,
        transaction: TransactionRecord,
        outcome: Outcome,
        reply: Reply | None = None,
        error_type: ErrorType | None = None,
    ) -> None:
        transaction.end(outcome, reply, self.clock.monotonic_ns())
        if error_type is not None:
            transaction.error_type = error_type
        self.transaction = None
        self.observer.transaction_ended(transaction)

    def message(self, *traceparents: str, tracestate: str = "") -> Self:
        """A whole mail, relayed by one delivery."""
        self.mail().rcpt().data().header(*traceparents, tracestate=tracestate)
        self.deliver()
        return self.final()

    def deliver(
        self,
        reply: Reply | None = QUEUED,
        outcome: Outcome = Outcome.RELAYED,
        *,
        error_type: ErrorType | None = None,
        upstream: str = "provider",
        attempt: int = 1,
    ) -> Mapping[str, str]:
        """A whole delivery; returns what it had the message carry."""
        assert self.transaction is not None
        delivery = begin_delivery(self.transaction, upstream, attempt, self.clock)
        return finish_delivery(self.observer, delivery, reply, outcome, error_type=error_type, clock=self.clock)

    def _reset(self, cause: ResetCause) -> None:
        self._enter(ConnState.RESET, ResetBy(cause))
        self._enter(ConnState.ACTIVE)
        if self.transaction is not None:
            self._end(self.transaction, Outcome.ABORTED)

    def rset(self) -> Self:
        self._reset(ResetCause.RSET)
        self._reply("RSET", replies.OK)
        return self

    def rotate_if_due(self) -> None:
        """End the segment if that is due and no transaction is open."""
        record = self.record
        is_old = self.clock.monotonic_ns() - record.begun_ns >= self._segment_age_ns
        if self.transaction is None and (is_old or len(record.transitions) >= self._segment_events):
            self.rotate()

    def rotate(self) -> None:
        """End the segment."""
        self.observer.segment_ended(self.record)
        self.record.begin_segment(self.clock.monotonic_ns())

    def quit(self) -> None:
        self._reply("QUIT", replies.CLOSING)
        self.close(CloseReason.QUIT)

    def close(self, reason: CloseReason = CloseReason.CLIENT_DISCONNECT) -> None:
        record = self.record
        if self.transaction is not None:
            self._end(self.transaction, Outcome.ABORTED)
        self._enter(ConnState.CLOSED, ConnectionOver(reason, record.messages))
        record.end = ConnectionEnd(self.octets_received, self.octets_sent, reason, self.clock.monotonic_ns())
        self.observer.connection_closed(record)


def begin_delivery(
    transaction: TransactionRecord, upstream: str = "provider", attempt: int = 1, clock: Clock = time
) -> DeliveryRecord:
    """An attempt at an upstream, as the forwarder begins it."""
    delivery = DeliveryRecord(transaction, upstream, UPSTREAM, attempt, clock.monotonic_ns())
    transaction.deliveries.append(delivery)
    return delivery


def finish_delivery(
    observer: Observer,
    delivery: DeliveryRecord,
    reply: Reply | None = QUEUED,
    outcome: Outcome = Outcome.RELAYED,
    *,
    error_type: ErrorType | None = None,
    clock: Clock = time,
) -> Mapping[str, str]:
    """All the rest of an attempt; returns what it had the message carry."""
    now = clock.monotonic_ns
    delivery.pool_wait_ns = 250_000_000
    delivery.is_reused = True
    delivery.phases.append((now(), DeliveryPhase.POOL, None))
    delivery.peer, delivery.tls = Endpoint("198.51.100.4", 587), TLS
    delivery.phases.append((now(), DeliveryPhase.MAIL, replies.SENDER_OK))
    delivery.recipient_phase(now(), replies.RECIPIENT_OK)
    delivery.accepted_count = 1
    delivery.phases.append((now(), DeliveryPhase.DATA, replies.SEND_CONTENT))
    carried = observer.delivery_carrier(delivery)
    delivery.phases.append((now(), DeliveryPhase.CONTENT, None))
    if reply is not None:
        delivery.phases.append((now(), DeliveryPhase.REPLY, reply))
    delivery.round_trips = 2
    delivery.end(outcome, reply, error_type, now())
    if delivery.transaction.ended_ns or delivery.transaction.connection is None:
        (observer if isinstance(observer, FanOut) else fan_out([observer])).delivery_ended(delivery)
    return carried


def resume(
    observer: Observer,
    carrier: Mapping[str, str],
    *,
    attempt: int = 2,
    spool_id: str = "01J9ZQ4T3M",
    is_possible_duplicate: bool = False,
    waited_seconds: float | None = None,
    reply: Reply | None = QUEUED,
    outcome: Outcome = Outcome.RELAYED,
) -> Mapping[str, str]:
    """One attempt at a message from the spool; returns what it had the message carry."""
    record = TransactionRecord.resumed(
        spool_id,
        carrier,
        Mail("news@example.com"),
        attempt=attempt,
        is_possible_duplicate=is_possible_duplicate,
        waited_seconds=waited_seconds,
    )
    assert observer.carrier(record) == carrier
    assert observer.trace_id(record) == (carrier["traceparent"][3:35] if carrier else None)
    return finish_delivery(observer, begin_delivery(record), reply, outcome)
