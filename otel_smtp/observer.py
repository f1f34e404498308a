"""What happened, told to whoever wants to know: tracing, metrics, logs, the status page, a user's callback.

The tree of handles is the tree of spans: connection > transaction > delivery. No context variables travel along; who
holds the handle of a transaction is in it. All methods have empty defaults, so an observer implements what it needs.

Rules for observers: a method is called on the event loop and must not block; it must not raise. One that raises all the
same is logged once and dropped for the rest of the process (`fan_out`); mail never notices.

What never comes here, by construction: AUTH arguments and content (P10).
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import CloseReason, TlsMode, Transition


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address of one side of a connection; for a unix socket `host` is its path and `port` None."""

    host: str
    port: int | None = None

    def __str__(self) -> str:
        if self.port is None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """A client connection, from accept on.

    Attributes:
        id: 32 hexadecimal digits, unique; the identity of the connection for its whole life.
        peer: the socket's other end. Where a PROXY header is believed, `proxied` tells the client behind it.
        local: the address that was connected to.
        listener: the listener's configured name.
        protocol: "smtp" or "lmtp".
        transport: "tcp" or "unix".
    """

    id: str
    peer: Endpoint
    local: Endpoint
    listener: str
    protocol: str = "smtp"
    transport: str = "tcp"
    tls_mode: TlsMode = TlsMode.OFF


@dataclass(frozen=True, slots=True)
class TlsInfo:
    """What a handshake agreed on."""

    version: str  # "1.2", "1.3"
    cipher: str
    resumed: bool = False
    server_name: str | None = None


@dataclass(frozen=True, slots=True)
class TraceHeaders:
    """Trace headers found in a message's header block, unfolded, not yet judged.

    Attributes:
        traceparents: the values of all `traceparent` fields, at most two (two are ignored as one forged).
        tracestate: the value of the first `tracestate` field, "" where none.
    """

    traceparents: tuple[str, ...] = ()
    tracestate: str = ""


class Outcome(StrEnum):
    """How a transaction, or a delivery, ended: `smtp.outcome`."""

    __hash__ = str.__hash__  # of Enum it is a function of Python, called several times an event

    RELAYED = "relayed"  # the upstream said 2yz to the end of data
    QUEUED = "queued"  # durable in the spool
    REFUSED = "refused"  # 5yz
    DEFERRED = "deferred"  # 4yz
    ABORTED = "aborted"  # RSET, EHLO, the client vanished, content refused before any upstream took it
    UNKNOWN = "unknown"  # lost between our final dot and the upstream's reply


class DeliveryPhase(StrEnum):
    """A step of one delivery attempt: the last part of the delivery event's name."""

    __hash__ = str.__hash__  # of Enum it is a function of Python, called several times an event

    POOL = "pool"
    CONNECT = "connect"
    GREETING = "greeting"
    EHLO = "ehlo"
    STARTTLS = "starttls"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    CONTENT = "content"
    REPLY = "reply"


class DeliveryObserver:
    """One attempt at one upstream, from the wait for a connection to the final reply."""

    def phase(self, phase: DeliveryPhase, reply: Reply | None = None) -> None:
        """A phase is done; `reply` is the upstream's, where it gave one."""

    def pooled(self, *, wait_seconds: float, reused: bool) -> None:
        """A connection is at hand, after waiting for it."""

    def connected(self, peer: Endpoint, tls: TlsInfo | None) -> None:
        """The connection that serves this attempt: its address, and its TLS."""

    def carrier(self) -> Mapping[str, str]:
        """Trace headers for the message that this attempt relays; empty where there is no trace."""
        return {}

    def ended(
        self,
        outcome: Outcome,
        reply: Reply | None,
        *,
        round_trips: int,
        error_type: ErrorType | None = None,
    ) -> None:
        """The attempt is over. `reply` is the upstream's own final reply, None where it gave none."""


class TransactionObserver:
    """One mail transaction: MAIL to its final reply, RSET or loss."""

    def recipient_answered(self, recipient: Recipient, reply: Reply) -> None:
        """A recipient was accepted or refused."""

    def header_received(self, trace: TraceHeaders, *, message_id: str | None) -> None:
        """The header block was read; called once, before `carrier` and `trace_id` are asked."""

    def content_received(self, octets: int) -> None:
        """The content is complete: its size in octets."""

    def delivery_begun(self, upstream: str, server: Endpoint, *, attempt: int = 1) -> DeliveryObserver:
        """An attempt at the upstream named `upstream`, configured as `server`, begins."""
        return DeliveryObserver()

    def spooled(self, spool_id: str) -> None:
        """The message is durable under this id."""

    def carrier(self) -> Mapping[str, str]:
        """The transaction's trace context as headers, for what outlives it (the spool); empty where none."""
        return {}

    def trace_id(self) -> str | None:
        """The trace id that people are shown, 32 hexadecimal digits; None where there is no trace."""
        return None

    def ended(self, outcome: Outcome, reply: Reply | None, *, error_type: ErrorType | None = None) -> None:
        """The transaction is over. `reply` is what the client was told, None where it was told nothing."""


class ConnectionObserver:
    """One client connection."""

    def conn_state(self, transition: Transition) -> None:
        """The connection entered a state; called before the client can see the reply that goes with it."""

    def proxied(self, client: Endpoint, server: Endpoint) -> None:
        """A believed PROXY header named the real client and the address that it had connected to."""

    def hello(self, verb: str, name: str) -> None:
        """EHLO, HELO or LHLO was accepted. `name` is the peer's word."""

    def tls_established(self, tls: TlsInfo) -> None:
        """A handshake was completed."""

    def authenticated(self, user: str, mechanism: str) -> None:
        """AUTH succeeded. Never called with a credential."""

    def auth_failed(self, mechanism: str) -> None:
        """AUTH failed."""

    def replied(self, verb: str | None, reply: Reply) -> None:
        """A reply is about to be written; `verb` is a known verb, "other", or None where no command is answered."""

    def transaction_begun(self, mail: Mail, number: int) -> TransactionObserver:
        """MAIL was accepted; `number` counts from 1 on this connection."""
        return TransactionObserver()

    def closed(self, reason: CloseReason, *, octets_received: int, octets_sent: int) -> None:
        """The transport is gone; the last call, after `conn_state` told Closed."""


class Observer:
    """Everything that happens in one gateway process."""

    def connection_opened(self, connection: ConnectionInfo) -> ConnectionObserver:
        """A socket was accepted."""
        return ConnectionObserver()

    def connection_refused(self, reason: str) -> None:
        """A connection was refused at accept; `reason` comes from a closed set (capacity, client_limit, ...)."""

    def delivery_resumed(
        self, spool_id: str, carrier: Mapping[str, str], mail: Mail, *, is_possible_duplicate: bool = False
    ) -> TransactionObserver:
        """A spooled message is attempted again; `carrier` is what `TransactionObserver.carrier` gave at its time.

        Args:
            is_possible_duplicate: an attempt before may have been taken by an upstream.
        """
        return TransactionObserver()


logger: Final = logging.getLogger("otel_smtp.observer")


class _Member:
    """One observer of a fan, and whether it has raised: shared by all the handles it gave."""

    __slots__ = ("observer", "raised")

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.raised = False

    def drop(self, method: str) -> None:
        """Log the exception at hand, once, and drop the member."""
        if not self.raised:
            self.raised = True
            logger.exception(
                "observer raised and is dropped; mail is unaffected",
                extra={"observer": type(self.observer).__qualname__, "method": method},
            )


class _Fan:
    """The handles of several observers as one.

    The methods of an interface are told by name so that one guarded loop serves them all: whatever a member raises
    ends here, for this call, its siblings and the mail.
    """

    __slots__ = ("_handles",)

    def __init__(self, handles: Sequence[tuple[_Member, Any]]) -> None:
        self._handles = handles

    def _tell(self, method: str, *args: Any, **kwargs: Any) -> None:
        for member, handle in self._handles:
            if not member.raised:
                try:
                    getattr(handle, method)(*args, **kwargs)
                except Exception:  # noqa: BLE001 - telemetry never touches mail (P10)
                    member.drop(method)

    # What comes many times a message is told by a loop of its own, below: naming the method costs as much as the call.

    def _ask(self, method: str, *args: Any, **kwargs: Any) -> list[tuple[_Member, Any]]:
        answers: list[tuple[_Member, Any]] = []
        for member, handle in self._handles:
            if not member.raised:
                try:
                    answers.append((member, getattr(handle, method)(*args, **kwargs)))
                except Exception:  # noqa: BLE001 - telemetry never touches mail (P10)
                    member.drop(method)
        return answers


class _DeliveryFan(_Fan, DeliveryObserver):
    __slots__ = ()

    def phase(self, phase: DeliveryPhase, reply: Reply | None = None) -> None:
        for member, handle in self._handles:
            if not member.raised:
                try:
                    handle.phase(phase, reply)
                except Exception:  # noqa: BLE001 - telemetry never touches mail (P10)
                    member.drop("phase")

    def pooled(self, *, wait_seconds: float, reused: bool) -> None:
        self._tell("pooled", wait_seconds=wait_seconds, reused=reused)

    def connected(self, peer: Endpoint, tls: TlsInfo | None) -> None:
        self._tell("connected", peer, tls)

    def carrier(self) -> Mapping[str, str]:
        return next((carrier for _, carrier in self._ask("carrier") if carrier), {})

    def ended(
        self,
        outcome: Outcome,
        reply: Reply | None,
        *,
        round_trips: int,
        error_type: ErrorType | None = None,
    ) -> None:
        self._tell("ended", outcome, reply, round_trips=round_trips, error_type=error_type)


class _TransactionFan(_Fan, TransactionObserver):
    __slots__ = ()

    def recipient_answered(self, recipient: Recipient, reply: Reply) -> None:
        self._tell("recipient_answered", recipient, reply)

    def header_received(self, trace: TraceHeaders, *, message_id: str | None) -> None:
        self._tell("header_received", trace, message_id=message_id)

    def content_received(self, octets: int) -> None:
        self._tell("content_received", octets)

    def delivery_begun(self, upstream: str, server: Endpoint, *, attempt: int = 1) -> DeliveryObserver:
        return _DeliveryFan(self._ask("delivery_begun", upstream, server, attempt=attempt))

    def spooled(self, spool_id: str) -> None:
        self._tell("spooled", spool_id)

    def carrier(self) -> Mapping[str, str]:
        return next((carrier for _, carrier in self._ask("carrier") if carrier), {})

    def trace_id(self) -> str | None:
        return next((trace_id for _, trace_id in self._ask("trace_id") if trace_id), None)

    def ended(self, outcome: Outcome, reply: Reply | None, *, error_type: ErrorType | None = None) -> None:
        self._tell("ended", outcome, reply, error_type=error_type)


class _ConnectionFan(_Fan, ConnectionObserver):
    __slots__ = ()

    def conn_state(self, transition: Transition) -> None:
        for member, handle in self._handles:
            if not member.raised:
                try:
                    handle.conn_state(transition)
                except Exception:  # noqa: BLE001 - telemetry never touches mail (P10)
                    member.drop("conn_state")

    def proxied(self, client: Endpoint, server: Endpoint) -> None:
        self._tell("proxied", client, server)

    def hello(self, verb: str, name: str) -> None:
        self._tell("hello", verb, name)

    def tls_established(self, tls: TlsInfo) -> None:
        self._tell("tls_established", tls)

    def authenticated(self, user: str, mechanism: str) -> None:
        self._tell("authenticated", user, mechanism)

    def auth_failed(self, mechanism: str) -> None:
        self._tell("auth_failed", mechanism)

    def replied(self, verb: str | None, reply: Reply) -> None:
        for member, handle in self._handles:
            if not member.raised:
                try:
                    handle.replied(verb, reply)
                except Exception:  # noqa: BLE001 - telemetry never touches mail (P10)
                    member.drop("replied")

    def transaction_begun(self, mail: Mail, number: int) -> TransactionObserver:
        return _TransactionFan(self._ask("transaction_begun", mail, number))

    def closed(self, reason: CloseReason, *, octets_received: int, octets_sent: int) -> None:
        self._tell("closed", reason, octets_received=octets_received, octets_sent=octets_sent)


class _ObserverFan(_Fan, Observer):
    __slots__ = ()

    def connection_opened(self, connection: ConnectionInfo) -> ConnectionObserver:
        return _ConnectionFan(self._ask("connection_opened", connection))

    def connection_refused(self, reason: str) -> None:
        self._tell("connection_refused", reason)

    def delivery_resumed(
        self, spool_id: str, carrier: Mapping[str, str], mail: Mail, *, is_possible_duplicate: bool = False
    ) -> TransactionObserver:
        return _TransactionFan(
            self._ask("delivery_resumed", spool_id, carrier, mail, is_possible_duplicate=is_possible_duplicate)
        )


def fan_out(observers: Iterable[Observer]) -> Observer:
    """One observer that tells all of `observers`; one that raises is logged once and dropped.

    Where several could answer (`carrier`, `trace_id`) the first answer that is not empty holds.
    """
    return _ObserverFan([(_Member(observer), observer) for observer in observers])


class _StateCallback(ConnectionObserver):
    def __init__(self, callback: Callable[[ConnectionInfo, Transition], None], connection: ConnectionInfo) -> None:
        self._callback = callback
        self._connection = connection

    def conn_state(self, transition: Transition) -> None:
        self._callback(self._connection, transition)


class StateCallback(Observer):
    """A user's `conn_state` callback as an observer: called with the connection and each transition."""

    def __init__(self, callback: Callable[[ConnectionInfo, Transition], None]) -> None:
        self._callback = callback

    def connection_opened(self, connection: ConnectionInfo) -> ConnectionObserver:
        return _StateCallback(self._callback, connection)
