"""One client connection: a stream, the protocol engine, a forwarder, and the deadlines between them.

The way of a mail, seen from here::

    client octets -> ServerProtocol -> MailRequested       -> forwarder.begin
                                       RecipientRequested* -> transaction.recipients (a pipelined group is one batch)
                                       ContentStarted      -> transaction.content(chunks)
                                         HeaderReceived       first chunk: our Received field and the header block
                                         ContentReceived      further chunks, as the forwarder asks for them
                                         ContentEnded         the forwarder's reply is the client's

The forwarder pulls the content, so its pace is the client's pace; nothing is read that nobody has asked for.

The client may vanish at any moment. Before the content is complete, the iterator raises `ContentAborted` and nothing is
relayed. After that the delivery goes on to its end, so that its outcome is known and recorded, and only the reply is
lost.
"""

import asyncio
import ipaddress
import logging
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, Self

from otel_smtp.forwarding.base import Capabilities, ContentAborted, DeliveryFailed, Forwarder, MailTransaction
from otel_smtp.net import CLOCK_SLACK_SECONDS, Stream
from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionObserver,
    Endpoint,
    Outcome,
    TraceHeaders,
    TransactionObserver,
)
from otel_smtp.server.proxy_protocol import ProxyHeader, ProxyHeaderParser, ProxyProtocolError
from otel_smtp.server.users import Accepted, Authenticator, Challenge, Exchange
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.events import (
    NEED_DATA,
    PAUSED,
    AuthRequested,
    AuthResponded,
    ConnectionEnding,
    ContentEnded,
    ContentReceived,
    ContentStarted,
    Event,
    HeaderReceived,
    HelloReceived,
    MailRequested,
    RecipientRequested,
    TlsRequested,
    TransactionAborted,
    Wait,
)
from otel_smtp.smtp.extensions import Offer
from otel_smtp.smtp.received import HeaderFacts, received_header, rfc5322_date, with_protocol
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.server import ServerPolicy, ServerProtocol
from otel_smtp.smtp.states import CloseReason, IllegalTransition, TlsMode

logger: Final = logging.getLogger("otel_smtp.server.connection")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# A PROXY header comes from our own load balancer, at once; Postfix gives it the same five seconds.
PROXY_HEADER_SECONDS: Final = 5.0
# We end the session while the client may be in the middle of sending: it gets the time to read why. Not at a shutdown,
# which has one grace for all, nor where the client has ended it or speaks another protocol.
_GENTLE_ENDS: Final = frozenset(
    {CloseReason.TIMEOUT, CloseReason.TOO_MANY_ERRORS, CloseReason.REFUSED, CloseReason.INTERNAL_ERROR}
)


@dataclass(frozen=True, slots=True)
class ServerTimeouts:
    """Deadlines towards clients, in seconds; the defaults are those of wire.md.

    Attributes:
        command: from the last reply to the end of the next command line (RFC 5321 4.5.3.2.7 asks for 300).
        command_under_stress: the same, while most of the allowed connections are taken.
        data: a whole DATA or BDAT exchange.
        tls_handshake: one handshake.
        session: the whole connection; None: no bound.
        octets_per_second: content buys time beyond `command` at this rate; Postfix's smtpd_min_data_rate.
    """

    command: float = 300.0
    command_under_stress: float = 10.0
    data: float = 1200.0
    tls_handshake: float = 30.0
    session: float | None = None
    octets_per_second: int = 500


@dataclass(frozen=True, slots=True)
class ListenerPolicy:
    """What holds for every connection of one listener.

    Attributes:
        tls_context: gives the context of the next handshake (it is replaced when certificates are reloaded).
        allow: networks that may relay without AUTH; unix sockets always may.
        proxy_protocol_from: networks whose PROXY header is required and believed.
        trace_in_reply: the final 250 names the trace.
    """

    name: str
    protocol: ServerPolicy
    timeouts: ServerTimeouts
    tls_context: Callable[[], ssl.SSLContext] | None = None
    authenticator: Authenticator | None = None
    allow: tuple[Network, ...] = ()
    proxy_protocol_from: tuple[Network, ...] = ()
    trace_in_reply: bool = True


class Load(Protocol):
    """What a connection asks of the listener that it belongs to."""

    @property
    def is_stressed(self) -> bool:
        """Whether most of the allowed connections are taken."""
        ...

    @property
    def is_draining(self) -> bool:
        """Whether the gateway shuts down."""
        ...

    def admit(self, connection: "Connection", client: Endpoint) -> Reply | None:
        """Count a client that its PROXY header named; the refusal, where it has too many connections."""
        ...

    def may_authenticate(self, client: Endpoint) -> bool:
        """Whether this address has not failed to authenticate too often."""
        ...

    def auth_failed(self, client: Endpoint) -> None:
        """An AUTH from this address failed."""
        ...


def is_in(networks: Sequence[Network], host: str) -> bool:
    """Whether the IP address `host` lies in one of `networks`; an IPv4-mapped IPv6 address counts as IPv4."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if address.version == 6 and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks if network.version == address.version)


class _OpenTransaction:
    """The transaction that is open on a connection: what the forwarder holds and what has been answered."""

    __slots__ = ("accepted", "forwarded", "is_utf8", "refusal", "seen")

    def __init__(self, forwarded: MailTransaction, seen: TransactionObserver, *, is_utf8: bool) -> None:
        self.forwarded = forwarded
        self.seen = seen
        self.is_utf8 = is_utf8  # SMTPUTF8 was given: the Received field says so (RFC 6531 4.3)
        self.accepted: list[Recipient] = []
        self.refusal: Reply | None = None  # of the recipient refused last


class Connection:
    """Serves one accepted socket until it is closed.

    Args:
        stream: the accepted connection.
        info: its identity, as the observers know it.
        policy: how its listener speaks.
        forwarder: where accepted mail goes.
        seen: the observers of this connection.
        load: what the listener knows of all its connections.
        refusal: answer the connection with this instead of serving it (capacity).
        on_illegal: told of a state step that the table does not hold.
    """

    __slots__ = (
        "_allowed_client",
        "_allows",
        "_auth",
        "_can",
        "_client",
        "_forwarder",
        "_helo",
        "_info",
        "_is_extended",
        "_is_served",
        "_load",
        "_loop",
        "_offer",
        "_policy",
        "_protocol",
        "_refusal",
        "_request_began",
        "_request_octets",
        "_returned",
        "_seen",
        "_session_ends",
        "_stream",
        "_transaction",
    )

    def __init__(
        self,
        stream: Stream,
        info: ConnectionInfo,
        policy: ListenerPolicy,
        forwarder: Forwarder,
        seen: ConnectionObserver,
        load: Load,
        *,
        refusal: Reply | None = None,
        on_illegal: Callable[[IllegalTransition], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self._info = info
        self._client = info.peer
        self._allowed_client: Endpoint | None = None  # the one that `_allows` is about
        self._allows = False
        self._policy = policy
        self._forwarder = forwarder
        self._seen = seen
        self._load = load
        self._refusal = refusal
        self._protocol = ServerProtocol(
            policy.protocol, seen.conn_state, offer=self._current_offer, on_reply=seen.replied, on_illegal=on_illegal
        )
        self._can: Capabilities | None = None
        self._offer = Offer()
        self._transaction: _OpenTransaction | None = None
        self._auth: Exchange | None = None
        self._helo = ""
        self._is_extended = False
        self._is_served = False  # not refused at accept: a flood of those must not hold sockets
        self._request_began = 0.0
        self._request_octets = 0
        self._returned: Event | None = None
        self._session_ends: float | None = None

    @property
    def info(self) -> ConnectionInfo:
        """The connection's identity."""
        return self._info

    # The whole life ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the connection to its end, when the transport is closing. Raises nothing but CancelledError."""
        protocol = self._protocol
        reason = CloseReason.CLIENT_DISCONNECT
        try:
            protocol.accepted(self._info.tls_mode)
            await self._serve()
        except TimeoutError:
            reason = CloseReason.TIMEOUT
            self._fail_on_deadline()
        except ConnectionError:
            pass
        except asyncio.CancelledError:
            reason = CloseReason.SHUTDOWN
            protocol.fail(replies.SHUTTING_DOWN, reason)
            raise
        except Exception:  # the top of the task: our bug is nobody's lost mail
            logger.exception("connection failed", extra={"connection_id": self._info.id})
            reason = CloseReason.INTERNAL_ERROR
            protocol.fail(replies.INTERNAL_CLOSING, reason)
        finally:
            await self._finish(reason)

    def drain(self) -> None:
        """The gateway shuts down: end the session now if it is between transactions, else after the open one."""
        if not self._protocol.is_in_transaction:
            self._stream.deadline = self._loop.time()

    def hurry(self) -> None:
        """Most of the allowed connections are taken from now on: the wait that is under way gets shorter too."""
        if self._is_served and self._protocol.close_reason is None:
            self._stream.deadline = self._read_deadline()

    async def _finish(self, reason: CloseReason) -> None:
        await self._abort_transaction(Outcome.ABORTED, None)
        stream, protocol = self._stream, self._protocol
        if data := protocol.data_to_send():
            stream.write(data)
        protocol.closed(reason)
        reason = protocol.close_reason or reason
        ends_gently = self._is_served and reason in _GENTLE_ENDS
        if not ends_gently:
            stream.close()
        self._seen.closed(reason, octets_received=stream.octets_received, octets_sent=stream.octets_sent)
        if ends_gently:
            # Within this task, so that the socket counts towards the limit of connections while it is open.
            await stream.close_gently()

    def _fail_on_deadline(self) -> None:
        if self._load.is_draining:
            self._protocol.fail(replies.SHUTTING_DOWN, CloseReason.SHUTDOWN)
        else:
            self._protocol.fail(replies.TIMED_OUT, CloseReason.TIMEOUT)

    async def _serve(self) -> None:
        timeouts = self._policy.timeouts
        if timeouts.session is not None:
            self._session_ends = self._loop.time() + timeouts.session
        if is_in(self._policy.proxy_protocol_from, self._info.peer.host) and not await self._read_proxy_header():
            return
        if self._info.tls_mode is not TlsMode.IMPLICIT:
            self._stream.resume_reading()
        refusal = self._refusal or self._access_refusal()
        if refusal is not None:
            self._protocol.refuse(refusal)
            return
        if self._info.tls_mode is TlsMode.IMPLICIT:
            self._protocol.handshake_begins()
            if not await self._shake_hands():
                return
        # A client that has already spoken is heard before it is greeted: one turn of the loop is enough for what had
        # arrived with the connection.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if early := self._stream.take_pending():
            self._protocol.receive_data(early)
        self._is_served = True
        self._protocol.greet()
        await self._converse()

    async def _converse(self) -> None:
        protocol = self._protocol
        batch: list[Recipient] = []
        self._begin_request()
        while True:
            event: Event | Wait
            if self._returned is not None:
                event, self._returned = self._returned, None
            else:
                event = protocol.next_event()
            if isinstance(event, RecipientRequested):
                batch.append(event.recipient)
                continue
            if batch:
                await self._answer_recipients(batch)
                batch = []
                if isinstance(event, Wait):
                    continue
            if event is NEED_DATA:
                await self._read_more()
            elif event is PAUSED:
                raise RuntimeError("the engine waits for an answer that nobody gives")
            elif isinstance(event, ConnectionEnding):
                return
            else:
                await self._handle(event)

    async def _handle(self, event: Event) -> None:
        match event:
            case MailRequested():
                await self._begin_transaction(event)
            case ContentStarted():
                await self._relay_content()
            case TransactionAborted(reply):
                await self._abort_transaction(_outcome_of_abort(reply), reply)
            case HelloReceived(verb, name):
                self._helo = name
                self._is_extended = verb != "HELO"
                self._seen.hello(verb, name)
            case TlsRequested():
                await self._upgrade()
            case AuthRequested() | AuthResponded():
                await self._authenticate(event)
            case _:
                raise RuntimeError(f"unexpected event {type(event).__name__}")

    # Reading and writing -----------------------------------------------------------------------------------------

    def _begin_request(self) -> None:
        self._request_began = self._loop.time()
        self._request_octets = self._stream.octets_received

    async def _read_more(self) -> None:
        """Write what is to be said, then wait for more, within the deadline of the request at hand."""
        protocol, stream = self._protocol, self._stream
        if data := protocol.data_to_send():
            stream.write(data)
            await stream.drain()
            if not protocol.awaits_content:
                self._begin_request()
        if self._load.is_draining and not protocol.is_in_transaction:
            protocol.fail(replies.SHUTTING_DOWN, CloseReason.SHUTDOWN)
            return
        data = await self._read_in_time()
        if data:
            protocol.receive_data(data)
        else:
            protocol.receive_eof()

    async def _read_in_time(self) -> bytes:
        stream = self._stream
        while True:
            stream.deadline = self._read_deadline()
            try:
                return await stream.read()
            except TimeoutError:
                # Stress that is over again, while we waited, cost nobody its connection.
                if self._load.is_draining or self._loop.time() >= self._read_deadline() - CLOCK_SLACK_SECONDS:
                    raise

    def _read_deadline(self) -> float:
        """When the request at hand must be complete: octets buy time at the minimum rate, within a hard bound."""
        timeouts = self._policy.timeouts
        began = self._request_began
        if self._protocol.awaits_content:
            bought = (self._stream.octets_received - self._request_octets) / timeouts.octets_per_second
            deadline = began + min(timeouts.command + bought, timeouts.data)
        elif self._load.is_stressed:
            deadline = began + min(timeouts.command, timeouts.command_under_stress)
        else:
            deadline = began + timeouts.command
        return deadline if self._session_ends is None else min(deadline, self._session_ends)

    # Before the session ------------------------------------------------------------------------------------------

    async def _read_proxy_header(self) -> bool:
        """Read the PROXY header that a listed network must send; whether the connection goes on."""
        stream = self._stream
        parser = ProxyHeaderParser()
        stream.deadline = self._loop.time() + PROXY_HEADER_SECONDS
        header: ProxyHeader | None = None
        try:
            while header is None:
                data = await stream.read_sparingly(parser.octets_wanted)
                if not data:
                    return False
                header = parser.feed(data)
        except (ProxyProtocolError, TimeoutError):
            logger.warning("bad PROXY header", extra={"connection_id": self._info.id})
            self._protocol.refuse(replies.BAD_PROXY_HEADER)
            return False
        if header.source is not None and header.destination is not None:
            self._client = header.source
            self._seen.proxied(header.source, header.destination)
            self._refusal = self._refusal or self._load.admit(self, header.source)
        return True

    def _access_refusal(self) -> Reply | None:
        if not self._load.may_authenticate(self._client):
            return replies.TOO_MANY_AUTH_FAILURES
        if self._is_allowed() or self._policy.protocol.auth_mechanisms:
            return None
        return replies.ACCESS_DENIED

    def _is_allowed(self) -> bool:
        """Whether this client may relay without AUTH; asked at each MAIL, and looked up once for each client."""
        if self._allowed_client is not self._client:
            self._allowed_client = self._client
            self._allows = self._info.transport == "unix" or is_in(self._policy.allow, self._client.host)
        return self._allows

    # TLS and AUTH ------------------------------------------------------------------------------------------------

    async def _upgrade(self) -> None:
        # Reading stops before the 220 goes out: a ClientHello that comes early must wait in the kernel for the TLS
        # layer, and what has come in clear behind STARTTLS must be seen by the engine.
        self._stream.pause_reading()
        if pending := self._stream.take_pending():
            self._protocol.receive_data(pending)
        self._protocol.reply(replies.TLS_READY)
        if data := self._protocol.data_to_send():
            self._stream.write(data)
        if self._protocol.close_reason is None:
            await self._shake_hands()

    async def _shake_hands(self) -> bool:
        context = self._policy.tls_context
        assert context is not None
        try:
            tls = await self._stream.start_tls(
                context(),
                server_side=True,
                timeout_seconds=self._policy.timeouts.tls_handshake,
                from_first_octet=self._info.tls_mode is TlsMode.IMPLICIT,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            logger.info("TLS handshake failed", extra={"connection_id": self._info.id, "error": type(error).__name__})
            self._protocol.tls_failed()
            return False
        self._helo = ""
        self._seen.tls_established(tls)
        self._protocol.tls_started(tls.version, tls.cipher)
        self._begin_request()
        return True

    async def _authenticate(self, event: AuthRequested | AuthResponded) -> None:
        authenticator = self._policy.authenticator
        assert authenticator is not None
        if isinstance(event, AuthRequested):
            self._auth = authenticator.begin(event.mechanism)
            response = event.initial_response
        else:
            response = event.response
        exchange = self._auth
        assert exchange is not None
        try:
            step = await exchange.step(response)
        except Exception:
            logger.exception("authentication failed to run", extra={"connection_id": self._info.id})
            self._protocol.reply(replies.AUTH_UNAVAILABLE)
            return
        match step:
            case Challenge(data):
                self._protocol.challenge(data)
            case Accepted(user):
                self._seen.authenticated(user, exchange.mechanism)
                self._protocol.reply(replies.AUTH_SUCCEEDED)
            case _:
                self._load.auth_failed(self._client)
                self._seen.auth_failed(exchange.mechanism)
                self._protocol.reply(replies.AUTH_FAILED)

    # The transaction ---------------------------------------------------------------------------------------------

    def _current_offer(self) -> Offer:
        can = self._forwarder.capabilities()
        if can is not self._can:
            self._can = can
            self._offer = Offer(
                size=can.size,
                eight_bit_mime=can.eight_bit_mime,
                smtputf8=can.smtputf8,
                binary_mime=can.binary_mime,
                chunking=True,
                dsn=can.dsn,
                require_tls=can.require_tls,
            )
        return self._offer

    async def _begin_transaction(self, event: MailRequested) -> None:
        mail = event.mail
        if self._policy.protocol.auth_mechanisms and not (self._is_allowed() or self._protocol.is_authenticated):
            self._protocol.reply(replies.AUTH_REQUIRED)
            return
        seen = self._seen.transaction_begun(mail, self._protocol.transactions + 1)
        try:
            forwarded = await self._forwarder.begin(mail, seen)
        except DeliveryFailed as failure:
            seen.ended(outcome_of(failure.reply), failure.reply, error_type=failure.reply.error_type)
            self._protocol.reply(failure.reply)
            return
        except Exception:
            logger.exception("the forwarder failed at MAIL", extra={"connection_id": self._info.id})
            seen.ended(Outcome.DEFERRED, replies.INTERNAL, error_type=ErrorType.INTERNAL)
            self._protocol.reply(replies.INTERNAL)
            return
        self._transaction = _OpenTransaction(forwarded, seen, is_utf8=mail.smtputf8)
        self._protocol.reply(replies.SENDER_OK)

    async def _answer_recipients(self, batch: list[Recipient]) -> None:
        transaction = self._transaction
        assert transaction is not None
        try:
            answers = await transaction.forwarded.recipients(batch)
        except DeliveryFailed as failure:
            answers = [failure.reply] * len(batch)
        except Exception:
            logger.exception("the forwarder failed at RCPT", extra={"connection_id": self._info.id})
            answers = [replies.INTERNAL] * len(batch)
        for recipient, reply in zip(batch, answers, strict=True):
            if reply.is_positive:
                transaction.accepted.append(recipient)
            else:
                transaction.refusal = reply
            transaction.seen.recipient_answered(recipient, reply)
            self._protocol.reply(reply)

    async def _relay_content(self) -> None:
        transaction = self._transaction
        assert transaction is not None
        self._begin_request()
        chunks = _ContentChunks(self, transaction)
        try:
            reply = await transaction.forwarded.content(chunks)
        except ContentAborted:
            chunks.raise_fault()
            return  # the engine has told why, by the event that follows
        except DeliveryFailed as failure:
            reply = failure.reply
        except Exception:
            logger.exception("the forwarder failed at the content", extra={"connection_id": self._info.id})
            reply = replies.INTERNAL
        try:
            # A forwarder may answer before it has read everything (a full disk, say); the client is still sending.
            async for _ in chunks:
                pass
        except ContentAborted:
            chunks.raise_fault()
            return
        self._end_transaction(transaction, reply)

    def _end_transaction(self, transaction: _OpenTransaction, reply: Reply) -> None:
        spool_id = transaction.forwarded.spool_id
        outcome = outcome_of(reply)
        if reply.is_positive:
            if spool_id is not None:
                outcome = Outcome.QUEUED
            reply = replies.message_accepted(transaction.seen.trace_id() if self._policy.trace_in_reply else None)
        self._transaction = None
        transaction.seen.ended(outcome, reply, error_type=reply.error_type)
        recipients = len(transaction.accepted) if self._policy.protocol.is_lmtp else 1
        self._protocol.reply(*[reply] * recipients)

    async def _abort_transaction(self, outcome: Outcome, reply: Reply | None) -> None:
        transaction, self._transaction = self._transaction, None
        if transaction is None:
            return
        if reply is None and not transaction.accepted and transaction.refusal is not None:
            # No recipient was left, so there was no mail to send: the refusal is how it ended.
            reply = transaction.refusal
            outcome = outcome_of(reply)
        transaction.seen.ended(outcome, reply, error_type=reply.error_type if reply is not None else None)
        await transaction.forwarded.abort()

    async def next_content_event(self) -> Event:
        """The next event while content is received; reads as needed."""
        while True:
            event = self._protocol.next_event()
            if not isinstance(event, Wait):
                return event
            if event is PAUSED:
                raise RuntimeError("the engine waits for an answer in the middle of content")
            await self._read_more()

    def put_back(self, event: Event) -> None:
        """Handle `event` in the main loop after all: it ended the content."""
        self._returned = event

    def received_field(self, seen: TransactionObserver, is_utf8: bool) -> bytes:
        """Our Received field for the message at hand (RFC 5321 4.4)."""
        stream, protocol = self._stream, self._protocol
        return received_header(
            helo=self._helo,
            peer_host=self._client.host,
            by=self._policy.protocol.hostname,
            with_protocol=with_protocol(
                is_extended=self._is_extended,
                is_tls=protocol.is_tls,
                is_authenticated=protocol.is_authenticated,
                is_lmtp=self._policy.protocol.is_lmtp,
                is_utf8=is_utf8,
            ),
            identifier=seen.trace_id() or self._info.id,
            date=rfc5322_date(time.time()),
            tls=f"{stream.tls.version} {stream.tls.cipher}" if stream.tls is not None else None,
        )


class _ContentChunks:
    """The content of one message as the forwarder pulls it: `MailTransaction.content` says what the chunks are.

    Attributes:
        fault: what kept the content from being read to its end, where it was not the engine's verdict.
    """

    __slots__ = ("_connection", "_is_ended", "_transaction", "fault")

    def __init__(self, connection: Connection, transaction: _OpenTransaction) -> None:
        self._connection = connection
        self._transaction = transaction
        self._is_ended = False
        self.fault: Exception | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        if self._is_ended:
            raise StopAsyncIteration
        try:
            event = await self._connection.next_content_event()
        except (TimeoutError, ConnectionError) as fault:
            # A deadline or loss on the client's side: the forwarder must not take it for its upstream's.
            self._is_ended = True
            self.fault = fault
            raise ContentAborted("the client's connection failed") from fault
        match event:
            case ContentReceived(data):
                return data
            case HeaderReceived(block, facts):
                return self._header_chunk(block, facts)
            case ContentEnded(octets):
                self._is_ended = True
                self._transaction.seen.content_received(octets)
                raise StopAsyncIteration
            case _:
                self._is_ended = True
                self._connection.put_back(event)
                raise ContentAborted("the content was refused or broken off")

    def _header_chunk(self, block: bytes, facts: HeaderFacts) -> bytes:
        seen = self._transaction.seen
        seen.header_received(TraceHeaders(facts.traceparents, facts.tracestate), message_id=facts.message_id)
        return self._connection.received_field(seen, self._transaction.is_utf8) + block

    def raise_fault(self) -> None:
        """Raise what happened to the client's connection, if it was that."""
        if self.fault is not None:
            raise self.fault


def outcome_of(reply: Reply) -> Outcome:
    """How a transaction ended whose final reply is `reply`."""
    if reply.is_positive:
        return Outcome.RELAYED
    if reply.error_type is ErrorType.OUTCOME_UNKNOWN:
        return Outcome.UNKNOWN
    return Outcome.REFUSED if reply.is_permanent else Outcome.DEFERRED


def _outcome_of_abort(refusal: Reply | None) -> Outcome:
    return Outcome.ABORTED if refusal is None else outcome_of(refusal)
