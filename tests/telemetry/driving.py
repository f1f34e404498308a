"""A connection as the server would tell it to an observer, without a server: the real state machine, fake clocks."""

from collections.abc import Mapping
from typing import Self

from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionObserver,
    DeliveryObserver,
    DeliveryPhase,
    Endpoint,
    Observer,
    Outcome,
    TlsInfo,
    TraceHeaders,
    TransactionObserver,
)
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import CloseReason, ConnState, ResetCause, StateMachine, TlsMode
from otel_smtp.telemetry.records import SpanRecord

UPSTREAM = Endpoint("smtp.provider.example", 587)
QUEUED = Reply(250, replies.OK.enhanced, ("Ok: queued as 4XyZ12",))
TLS = TlsInfo("1.3", "TLS_AES_256_GCM_SHA384")


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
    """One client connection, told to an observer in the order in which the server tells it."""

    ids = 0

    def __init__(
        self,
        observer: Observer,
        *,
        peer: str = "192.0.2.7",
        listener: str = "local",
        tls_mode: TlsMode = TlsMode.OFF,
        transport: str = "tcp",
    ) -> None:
        Client.ids += 1
        local = Endpoint("/run/smtp.sock") if transport == "unix" else Endpoint("127.0.0.1", 2525)
        remote = Endpoint("") if transport == "unix" else Endpoint(peer, 50732)
        self.info = ConnectionInfo(f"{Client.ids:032x}", remote, local, listener, "smtp", transport, tls_mode)
        self.seen: ConnectionObserver = observer.connection_opened(self.info)
        self.machine = StateMachine(self.seen.conn_state)
        self.transaction: TransactionObserver | None = None
        self.transactions = 0
        self.messages = 0
        self.recipients = 0
        self.octets_received = 0
        self.octets_sent = 0
        self.machine.enter(ConnState.NEW, tls_mode=tls_mode)
        if tls_mode is TlsMode.IMPLICIT:
            self.machine.enter(ConnState.STARTTLS, tls_mode=tls_mode)
            self._handshake()
            self._reply(None, replies.greeting("gw"))
        else:
            self._active(None, replies.greeting("gw"))

    def _reply(self, verb: str | None, reply: Reply) -> None:
        self.octets_sent += len(reply.wire)
        if verb is not None:
            self.octets_received += 20
        if reply.code >= 400:
            self.machine.enter(
                ConnState.ERROR,
                verb=verb,
                reply_code=reply.code,
                enhanced_code=str(reply.enhanced),
                error_type=reply.error_type,
            )
        self.seen.replied(verb, reply)

    def _active(self, verb: str | None, reply: Reply) -> None:
        self.machine.enter(ConnState.ACTIVE)
        self._reply(verb, reply)

    def _handshake(self) -> None:
        self.seen.tls_established(TLS)
        self.machine.enter(ConnState.ACTIVE, tls_version=TLS.version, tls_cipher=TLS.cipher)

    def ehlo(self, name: str = "client.example") -> Self:
        if self.transaction is not None:
            self._reset(ResetCause.EHLO)
        self.seen.hello("EHLO", name)
        self._reply("EHLO", replies.hello("gw"))
        return self

    def starttls(self) -> Self:
        self.machine.enter(ConnState.STARTTLS, tls_mode=TlsMode.STARTTLS)
        self._reply("STARTTLS", replies.TLS_READY)
        self._handshake()
        return self

    def auth(self, user: str = "alice", reply: Reply = replies.AUTH_SUCCEEDED) -> Self:
        self.machine.enter(ConnState.AUTH, mechanism="PLAIN")
        if reply.is_positive:
            self.seen.authenticated(user, "PLAIN")
            self.machine.enter(ConnState.ACTIVE, mechanism="PLAIN")
            self._reply("AUTH", reply)
        else:
            self.seen.auth_failed("PLAIN")
            self._reply("AUTH", reply)
            self.machine.fall_back(ConnState.ACTIVE)
        return self

    def refused(self, verb: str, reply: Reply) -> Self:
        self._reply(verb, reply)
        return self

    def mail(self, sender: str = "news@example.com", mail: Mail | None = None) -> Self:
        self.transactions += 1
        self.machine.enter(ConnState.ACTIVE)
        self.transaction = self.seen.transaction_begun(mail or Mail(sender), self.transactions)
        self.recipients = 0
        self._reply("MAIL", replies.SENDER_OK)
        return self

    def rcpt(self, address: str = "bob@example.net", reply: Reply = replies.RECIPIENT_OK) -> Self:
        assert self.transaction is not None
        self.transaction.recipient_answered(Recipient(address), reply)
        self.recipients += reply.is_positive
        self._reply("RCPT", reply)
        return self

    def data(self, verb: str = "DATA") -> Self:
        self.machine.enter(ConnState.DATA, transaction=self.transactions, recipients=self.recipients)
        self._reply(verb, replies.SEND_CONTENT if verb == "DATA" else replies.chunk_received(5))
        return self

    def header(self, *traceparents: str, tracestate: str = "", message_id: str | None = "<1@example.com>") -> Self:
        assert self.transaction is not None
        self.transaction.header_received(TraceHeaders(traceparents, tracestate), message_id=message_id)
        return self

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
        transaction.content_received(octets)
        reply = reply or replies.message_accepted(transaction.trace_id())
        self.messages += 1
        if reply.is_positive:
            self.machine.enter(ConnState.ACTIVE)
        self._reply("DATA", reply)
        self.machine.enter(ConnState.IDLE, messages=self.messages)
        transaction.ended(outcome, reply, error_type=error_type)
        self.transaction = None
        return self

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
        return deliver(self.transaction, reply, outcome, error_type=error_type, upstream=upstream, attempt=attempt)

    def _reset(self, cause: ResetCause) -> None:
        self.machine.enter(ConnState.RESET, cause=cause)
        self.machine.enter(ConnState.ACTIVE)
        if self.transaction is not None:
            self.transaction.ended(Outcome.ABORTED, None)
            self.transaction = None

    def rset(self) -> Self:
        self._reset(ResetCause.RSET)
        self._reply("RSET", replies.OK)
        return self

    def quit(self) -> None:
        self._reply("QUIT", replies.CLOSING)
        self.close(CloseReason.QUIT)

    def close(self, reason: CloseReason = CloseReason.CLIENT_DISCONNECT) -> None:
        if self.transaction is not None:
            self.transaction.ended(Outcome.ABORTED, None)
            self.transaction = None
        self.machine.enter(ConnState.CLOSED, reason=reason, messages=self.messages)
        self.seen.closed(reason, octets_received=self.octets_received, octets_sent=self.octets_sent)


def deliver(
    transaction: TransactionObserver,
    reply: Reply | None = QUEUED,
    outcome: Outcome = Outcome.RELAYED,
    *,
    error_type: ErrorType | None = None,
    upstream: str = "provider",
    attempt: int = 1,
) -> Mapping[str, str]:
    """One whole attempt at an upstream; returns what it had the message carry."""
    delivery: DeliveryObserver = transaction.delivery_begun(upstream, UPSTREAM, attempt=attempt)
    delivery.pooled(wait_seconds=0.25, reused=True)
    delivery.phase(DeliveryPhase.POOL)
    delivery.connected(Endpoint("198.51.100.4", 587), TLS)
    delivery.phase(DeliveryPhase.MAIL, replies.SENDER_OK)
    delivery.phase(DeliveryPhase.RCPT, replies.RECIPIENT_OK)
    delivery.phase(DeliveryPhase.DATA, replies.SEND_CONTENT)
    carried = delivery.carrier()
    delivery.phase(DeliveryPhase.CONTENT)
    if reply is not None:
        delivery.phase(DeliveryPhase.REPLY, reply)
    delivery.ended(outcome, reply, round_trips=2, error_type=error_type)
    return carried
