"""One client connection: a stream, the protocol engine, a forwarder, and the deadlines between them.

The way of a mail, seen from here::

    client octets -> data_received -> ServerProtocol -> mail_requested       -> forwarder.begin
                                                        recipients_requested -> transaction.recipients
                                                        content_begun        -> transaction.content
                                                        header_received      -> transaction.write: our Received field
                                                                                and the header block
                                                        content_received     -> transaction.write
                                                        content_ended        -> transaction.finish
                     replies, one write <- _conclude  <-            the decisions, at once or by a call back later

All of it happens in plain calls: within the call in which the transport delivers the octets, or the upstream's answer.
Every such call from outside begins with the time, ends with `_conclude`, and lets nothing out but through it: there the
replies are written, after what observers are to know has been recorded. Coroutines are left to what is rare: PROXY
headers, TLS handshakes, AUTH, and a gentle end.

Reading stops, so that what a client sends stays with the kernel, for each of these reasons: the forwarder takes the
content slower than it comes, a decision is awaited and more has come already, the client does not read its replies, or
it has pipelined more than its turn. What the engine holds is bounded by that.

The client may vanish at any moment. Before its content is complete the transaction is aborted, and nothing is relayed.
After that the delivery goes on to its end, so that its outcome is known and recorded, and only the reply is lost.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from enum import IntEnum
from typing import Any, Final

from otel_smtp.forwarding.base import DeliveryFailed, MailTransaction
from otel_smtp.net import CLOCK_SLACK_SECONDS, Stream
from otel_smtp.observing import ConnectionRecord, Outcome, TraceHeaders, TransactionRecord
from otel_smtp.server.policy import House, ListenerPolicy, is_in
from otel_smtp.server.proxy_protocol import ProxyHeader, ProxyHeaderParser, ProxyProtocolError
from otel_smtp.server.users import Accepted, Challenge, Exchange
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.handler import Asked
from otel_smtp.smtp.received import HeaderFacts, received_field, received_head, with_protocol
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.sequence import Phase
from otel_smtp.smtp.server import ServerProtocol
from otel_smtp.smtp.states import CloseReason, TlsMode

logger: Final = logging.getLogger("otel_smtp.server.session")

# A PROXY header comes from our own load balancer, at once; Postfix gives it the same five seconds.
PROXY_HEADER_SECONDS: Final = 5.0
# A client that takes none of our replies: RFC 5321 4.5.3.2.5 gives a block of octets three minutes.
UNREAD_REPLIES_SECONDS: Final = 180.0
# We end the session while the client may be in the middle of sending: it gets the time to read why. Not at a shutdown,
# which has one grace for all, nor where the client has ended it or speaks another protocol.
_GENTLE_ENDS: Final = frozenset(
    {CloseReason.TIMEOUT, CloseReason.TOO_MANY_ERRORS, CloseReason.REFUSED, CloseReason.INTERNAL_ERROR}
)
_NO_TRACE: Final = TraceHeaders()
# A segment is cut between transactions. One that has grown to so many times its size is cut wherever it is, so that a
# client cannot make it grow without end within one transaction.
_HARD_SEGMENTS: Final = 4


class _Pause(IntEnum):
    """Why nothing is read."""

    CONTENT = 1  # the forwarder holds it back
    DECISION = 2  # one is awaited, and more has come
    UNREAD = 4  # the client does not read its replies
    TURN = 8  # other connections come first
    TLS = 16  # what comes next is the TLS layer's


class Session:
    """Serves one accepted connection until it is closed. It is the engine's `Handler` and the stream's `Receiver`.

    Args:
        stream: the accepted connection.
        record: what observers will know of it; nothing has been recorded yet.
        policy: how its listener speaks.
        house: the server.

    Attributes:
        record: see above; it grows as things happen.
        client_counted: the address that this session is counted under, where it is; the server's own note.
    """

    __slots__ = (
        "_allows",
        "_auth",
        "_batch",
        "_began",
        "_failed_content",
        "_forwarded",
        "_has_ended",
        "_held_back_at",
        "_house",
        "_is_busy",
        "_is_served",
        "_loop",
        "_most_transitions",
        "_pauses",
        "_policy",
        "_protocol",
        "_received_head",
        "_refusal",
        "_request_octets",
        "_session_ends",
        "_stream",
        "_task",
        "_told",
        "_trace_id",
        "_transaction",
        "client_counted",
        "record",
    )

    def __init__(self, stream: Stream, record: ConnectionRecord, policy: ListenerPolicy, house: House) -> None:
        self._loop = asyncio.get_running_loop()
        self._stream = stream
        self.record = record
        self._policy = policy
        self._house = house
        self._protocol = ServerProtocol(
            policy.protocol,
            self,
            offer=house.offer,
            recorded=record.transitions,
            said=record.replies,
            on_illegal=house.illegal_step,
        )
        self._protocol.states.now_ns = record.opened_ns
        self.client_counted: str | None = None
        self._forwarded: MailTransaction | None = None
        self._transaction: TransactionRecord | None = None
        self._trace_id: str | None = None  # of the message at hand
        self._failed_content: Reply | None = None  # the forwarder has failed while the client was still sending
        self._batch: Sequence[Recipient] = ()
        self._auth: Exchange | None = None
        self._task: asyncio.Task[None] | None = None  # what is rare enough to be a coroutine
        self._refusal: Reply | None = None  # of the connection itself
        self._allows: bool | None = None  # whether this client may relay without AUTH; None: not looked up yet
        self._received_head: bytes | None = None  # of this session's Received fields, but for SMTPUTF8 messages
        self._pauses = 0
        self._began = self._loop.time()  # when the request at hand began
        self._request_octets = 0  # received before it
        self._held_back_at = 0.0  # when the forwarder stopped the content
        self._session_ends: float | None = None
        self._most_transitions = house.segments.transitions
        self._told = 0  # transitions of the present segment that `conn_state` observers know
        self._is_busy = False  # a call is under way that ends with `_conclude`
        self._is_served = False  # not refused at accept: a flood of those must not hold sockets
        self._has_ended = False

    # The beginning -----------------------------------------------------------------------------------------------

    def begin(self, refusal: Reply | None) -> None:
        """Serve the connection, from now on.

        Args:
            refusal: answer it with this instead (capacity).
        """
        self._refusal = refusal
        self._house.observer.connection_opened(self.record)
        policy = self._policy
        if policy.timeouts.session is not None:
            self._session_ends = self._began + policy.timeouts.session
        self._protocol.accepted(policy.protocol.tls_mode)
        if policy.protocol.tls_mode is TlsMode.IMPLICIT or is_in(
            policy.proxy_protocol_from, self.record.info.peer.host
        ):
            # What comes first is for the TLS layer, or is a PROXY header and not one octet more.
            self._stream.pause_reading()
            self._start(self._prepare())
        else:
            self._call(self._open)

    async def _prepare(self) -> None:
        """What comes before the session itself: the PROXY header, implicit TLS."""
        policy = self._policy
        if is_in(policy.proxy_protocol_from, self.record.info.peer.host) and not await self._read_proxy_header():
            return
        if policy.protocol.tls_mode is TlsMode.IMPLICIT:
            refusal = self._refusal or self._access_refusal()
            if refusal is not None:
                self._protocol.refuse(refusal)
                return
            self._protocol.handshake_begins()
            if not await self._shake_hands():
                return
        self._task = None
        self._open()  # concluded with this task

    def _open(self) -> None:
        """Refuse the connection, or greet it: at once, or, where it has spoken already, when that has been heard."""
        refusal = self._refusal or self._access_refusal()
        if refusal is not None:
            self._protocol.refuse(refusal)
            return
        self._is_served = True
        is_early = self._stream.has_input()
        self._stream.receive_by(self)
        self._stream.resume_reading()
        if not is_early:
            self._protocol.greet()

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
                    self._protocol.fail(None, CloseReason.CLIENT_DISCONNECT)
                    return False
                header = parser.feed(data)
        except (ProxyProtocolError, TimeoutError):
            logger.warning("bad PROXY header", extra={"connection_id": self.record.info.id})
            self._protocol.refuse(replies.BAD_PROXY_HEADER)
            return False
        finally:
            stream.deadline = None
        if header.source is not None and header.destination is not None:
            self.record.client = header.source
            self.record.server = header.destination
            self._refusal = self._refusal or self._house.admit(self, header.source)
        return True

    def _access_refusal(self) -> Reply | None:
        if not self._house.may_authenticate(self.record.client):
            return replies.TOO_MANY_AUTH_FAILURES
        if self._is_allowed() or self._policy.protocol.auth_mechanisms:
            return None
        return replies.ACCESS_DENIED

    def _is_allowed(self) -> bool:
        """Whether this client may relay without AUTH."""
        if self._allows is None:
            record = self.record
            self._allows = record.info.transport == "unix" or is_in(self._policy.allow, record.client.host)
        return self._allows

    # What the stream tells ---------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """See `Receiver`."""
        # As `_call`, which would be one call more for each of the four reads of a mail.
        protocol = self._protocol
        protocol.states.now_ns = time.monotonic_ns()
        self._is_busy = True
        try:
            protocol.receive_data(data)
            if protocol.phase is Phase.UNGREETED:
                protocol.greet()
        except Exception:
            logger.exception("session failed", extra={"connection_id": self.record.info.id})
            protocol.fail(replies.INTERNAL_CLOSING, CloseReason.INTERNAL_ERROR)
        self._conclude()

    def input_ended(self) -> None:
        """See `Receiver`."""
        self._call(self._end_input)

    def _end_input(self) -> None:
        if self._protocol.phase is Phase.UNGREETED:
            self._protocol.greet()
        self._protocol.receive_eof()

    def writing_resumed(self) -> None:
        """See `Receiver`."""
        self._resume(_Pause.UNREAD)
        self._take_turn()

    def _call(self, work: Callable[..., None], *arguments: Any) -> None:
        """Do `work` as a call from outside: with its own time, and concluded. A bug of ours ends the session, and
        nothing else."""
        if self._has_ended:
            return
        if self._is_busy:
            work(*arguments)  # within such a call
            return
        self._protocol.states.now_ns = time.monotonic_ns()
        self._is_busy = True
        try:
            work(*arguments)
        except Exception:
            logger.exception("session failed", extra={"connection_id": self.record.info.id})
            self._protocol.fail(replies.INTERNAL_CLOSING, CloseReason.INTERNAL_ERROR)
        self._conclude()

    def _conclude(self) -> None:
        """Every call from outside ends here: observers hear what was recorded, what was decided is written, and what
        has ended is closed."""
        self._is_busy = False
        protocol, house, record = self._protocol, self._house, self.record
        if house.is_draining and not protocol.is_in_transaction:
            protocol.fail(replies.SHUTTING_DOWN, CloseReason.SHUTDOWN)
        record.errors = protocol.errors
        record.messages = protocol.messages
        if house.observer.wants_transitions:
            self._tell_transitions()
        if out := protocol.out:
            stream = self._stream
            stream.write(out[0] if len(out) == 1 else b"".join(out))
            out.clear()
            if stream.is_write_paused:
                self._pause(_Pause.UNREAD)
            if protocol.phase is not Phase.CONTENT:
                self._began = self._loop.time()
        if protocol.close_reason is not None:
            self._finish(protocol.close_reason)
            return
        if protocol.received.held or self._pauses:
            self._manage_reading()
        if len(record.transitions) >= self._most_transitions:
            self._end_full_segment()

    def _manage_reading(self) -> None:
        """Leave with the kernel what comes beyond what is held and cannot be run now."""
        protocol = self._protocol
        if protocol.asked is Asked.NOTHING:
            self._resume(_Pause.DECISION)
        elif protocol.received.held:
            self._pause(_Pause.DECISION)
        if protocol.wants_turn and not self._pauses & _Pause.TURN:
            self._pause(_Pause.TURN)
            self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        """Run the commands that other connections went before; not while the client does not read the replies."""
        if self._pauses & _Pause.UNREAD or self._has_ended:
            return
        self._resume(_Pause.TURN)
        self._call(self._protocol.run)

    def _pause(self, why: _Pause) -> None:
        if not self._pauses:
            self._stream.pause_reading()
        self._pauses |= why

    def _resume(self, why: _Pause) -> None:
        if self._pauses:
            self._pauses &= ~why
            if not self._pauses:
                self._stream.resume_reading()

    def _tell_transitions(self) -> None:
        transitions = self.record.transitions
        while self._told < len(transitions):
            self._told += 1
            self._house.observer.conn_state(self.record, transitions[self._told - 1])

    # Time --------------------------------------------------------------------------------------------------------

    def look_at_clock(self, now: float) -> None:
        """Act on what is due at `now`, by the loop's clock: a deadline, the age of the segment."""
        protocol = self._protocol
        if self._has_ended:
            return
        record = self.record
        if not protocol.is_in_transaction and time.monotonic_ns() - record.begun_ns >= self._segment_age_ns:
            self._end_segment()
        if self._pauses & _Pause.UNREAD:
            if now >= self._began + UNREAD_REPLIES_SECONDS:
                self._end_from_outside(None, CloseReason.TIMEOUT)
        elif self._is_reading and now >= self._deadline() - CLOCK_SLACK_SECONDS:
            self._end_from_outside(replies.TIMED_OUT, CloseReason.TIMEOUT)

    @property
    def _is_reading(self) -> bool:
        """Whether it is the client's turn to speak."""
        return (
            self._is_served
            and self._task is None
            and self._protocol.asked is Asked.NOTHING
            and not self._pauses & _Pause.CONTENT
        )

    @property
    def _segment_age_ns(self) -> int:
        return int(self._house.segments.age_seconds * 1e9)

    def _deadline(self) -> float:
        """When the request at hand must be complete: octets buy time at the minimum rate, within a hard bound."""
        timeouts = self._policy.timeouts
        if self._protocol.awaits_content:
            bought = (self._stream.octets_received - self._request_octets) / timeouts.octets_per_second
            deadline = self._began + min(timeouts.command + bought, timeouts.data)
        elif self._house.is_stressed:
            deadline = self._began + min(timeouts.command, timeouts.command_under_stress)
        else:
            deadline = self._began + timeouts.command
        return deadline if self._session_ends is None else min(deadline, self._session_ends)

    def drain(self) -> None:
        """The gateway shuts down: end the session now if it is between transactions, else after the open one."""
        if not self._protocol.is_in_transaction:
            self.cancel()

    def cancel(self) -> None:
        """The gateway shuts down, and waits no longer."""
        self._end_from_outside(replies.SHUTTING_DOWN, CloseReason.SHUTDOWN)

    def _end_from_outside(self, reply: Reply | None, reason: CloseReason) -> None:
        self._call(self._protocol.fail, reply, reason)

    # Segments ----------------------------------------------------------------------------------------------------

    def _end_full_segment(self) -> None:
        is_in_transaction = self._protocol.is_in_transaction
        if not is_in_transaction or len(self.record.transitions) >= _HARD_SEGMENTS * self._most_transitions:
            self._end_segment()

    def _end_segment(self) -> None:
        record, protocol = self.record, self._protocol
        self._house.observer.segment_ended(record)
        record.begin_segment(time.monotonic_ns())
        protocol.states.recorded = record.transitions
        protocol.said = record.replies
        self._told = 0

    # The end -----------------------------------------------------------------------------------------------------

    def _finish(self, reason: CloseReason) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        stream, protocol, record = self._stream, self._protocol, self.record
        protocol.closed(reason)
        record.close_reason = protocol.close_reason
        record.closed_ns = protocol.states.now_ns
        record.octets_received = stream.octets_received
        record.octets_sent = stream.octets_sent
        if self._house.observer.wants_transitions:
            self._tell_transitions()
        stream.receive_by(None)
        task, self._task = self._task, None
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        self._house.observer.connection_closed(record)
        if self._is_served and record.close_reason in _GENTLE_ENDS and not stream.is_eof:
            # The socket counts towards the limit of connections while it is open.
            self._task = self._loop.create_task(self._close_gently())
        else:
            stream.close()
            self._house.ended(self)

    async def _close_gently(self) -> None:
        try:
            await self._stream.close_gently()
        finally:
            self._house.ended(self)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Do in a task what is rare and waits for long."""
        self._task = self._loop.create_task(self._run(work))

    async def _run(self, work: Coroutine[Any, Any, None]) -> None:
        """The whole of such a task: its end is a call from outside like any other."""
        mine = asyncio.current_task()
        try:
            await work
        except Exception:
            logger.exception("session failed", extra={"connection_id": self.record.info.id})
            self._protocol.states.now_ns = time.monotonic_ns()
            self._protocol.fail(replies.INTERNAL_CLOSING, CloseReason.INTERNAL_ERROR)
        finally:
            if self._task is mine:
                self._task = None
        if not self._has_ended:
            self._conclude()

    # TLS and AUTH ------------------------------------------------------------------------------------------------

    def hello_received(self, verb: str, name: str) -> None:
        """See `Handler`."""
        self.record.hello_verb = verb
        self.record.hello_name = name
        self._received_head = None

    def tls_requested(self) -> None:
        """See `Handler`."""
        # Reading stops before the 220 goes out: a ClientHello that comes early must wait in the kernel for the TLS
        # layer. What has come in clear behind STARTTLS the engine has, and refuses.
        self._pause(_Pause.TLS)
        self._stream.receive_by(None)
        self._loop.call_soon(self._upgrade)
        self._protocol.reply(replies.TLS_READY)

    def _upgrade(self) -> None:
        if self._protocol.phase is Phase.HANDSHAKE and not self._has_ended:
            self._start(self._upgraded())

    async def _upgraded(self) -> None:
        self._pauses = 0
        if await self._shake_hands():
            self._began = self._loop.time()
            self._stream.receive_by(self)

    async def _shake_hands(self) -> bool:
        context = self._policy.tls_context
        assert context is not None
        try:
            tls = await self._stream.start_tls(
                context(),
                server_side=True,
                timeout_seconds=self._policy.timeouts.tls_handshake,
                from_first_octet=self.record.info.tls_mode is TlsMode.IMPLICIT,
            )
        except (OSError, TimeoutError) as error:  # ssl.SSLError is an OSError
            logger.info(
                "TLS handshake failed", extra={"connection_id": self.record.info.id, "error": type(error).__name__}
            )
            self._protocol.states.now_ns = time.monotonic_ns()
            self._protocol.tls_failed()
            return False
        record = self.record
        record.hello_verb = record.hello_name = ""
        record.tls = tls
        self._received_head = None
        self._protocol.states.now_ns = time.monotonic_ns()
        self._protocol.tls_started(tls.version, tls.cipher)
        return True

    def auth_requested(self, mechanism: str, initial_response: bytes | None) -> None:
        """See `Handler`."""
        authenticator = self._policy.authenticator
        assert authenticator is not None
        self._auth = authenticator.begin(mechanism)
        self._start(self._authenticate(self._auth, initial_response))

    def auth_responded(self, response: bytes) -> None:
        """See `Handler`."""
        assert self._auth is not None
        self._start(self._authenticate(self._auth, response))

    async def _authenticate(self, exchange: Exchange, response: bytes | None) -> None:
        record, protocol = self.record, self._protocol
        try:
            step = await exchange.step(response)
        except Exception:
            logger.exception("authentication failed to run", extra={"connection_id": record.info.id})
            self._call(self._protocol.reply, replies.AUTH_UNAVAILABLE)
            return
        protocol.states.now_ns = time.monotonic_ns()
        match step:
            case Challenge(data):
                self._task = None
                self._call(protocol.challenge, data)
            case Accepted(user):
                record.user = user
                record.auth_mechanism = exchange.mechanism
                self._received_head = None
                self._call(self._protocol.reply, replies.AUTH_SUCCEEDED)
            case _:
                record.auth_mechanism = exchange.mechanism
                self._house.auth_failed(record.client)
                self._call(self._protocol.reply, replies.AUTH_FAILED)

    # The transaction ---------------------------------------------------------------------------------------------

    def mail_requested(self, mail: Mail) -> None:
        """See `Handler`."""
        protocol, record, house = self._protocol, self.record, self._house
        if self._policy.protocol.auth_mechanisms and not protocol.is_authenticated and not self._is_allowed():
            protocol.reply(replies.AUTH_REQUIRED)
            return
        transaction = TransactionRecord(
            mail, protocol.transactions + 1, record, protocol.states.now_ns, record.wall_offset_ns
        )
        try:
            forwarded = house.forwarder.begin(mail, transaction)
        except DeliveryFailed as failure:
            self._refuse_mail(transaction, failure.reply)
        except Exception:  # noqa: BLE001 - logged there
            self._log_forwarder("MAIL")
            self._refuse_mail(transaction, replies.INTERNAL)
        else:
            self._transaction = transaction
            self._forwarded = forwarded
            protocol.reply(replies.SENDER_OK)

    def _refuse_mail(self, transaction: TransactionRecord, reply: Reply) -> None:
        transaction.end(outcome_of(reply), reply, self._protocol.states.now_ns)
        self._house.observer.transaction_ended(transaction)
        self._protocol.reply(reply)

    def recipients_requested(self, recipients: Sequence[Recipient]) -> None:
        """See `Handler`."""
        forwarded = self._forwarded
        assert forwarded is not None
        self._batch = recipients
        try:
            forwarded.recipients(recipients, self._recipients_answered)
        except Exception:  # noqa: BLE001 - logged there
            self._log_forwarder("RCPT")
            self._recipients_answered([replies.INTERNAL] * len(recipients))

    def _recipients_answered(self, decided: Sequence[Reply]) -> None:
        transaction = self._transaction
        batch, self._batch = self._batch, ()
        if transaction is None or not batch:
            return  # the transaction was given up while the upstream was asked
        for recipient, reply in zip(batch, decided, strict=True):
            if 200 <= reply.code < 300:
                transaction.accepted.append(recipient)
            else:
                transaction.refuse(recipient, reply)
        self._call(self._protocol.reply, *decided)

    def content_begun(self) -> None:
        """See `Handler`."""
        forwarded = self._forwarded
        assert forwarded is not None
        self._began = self._loop.time()
        self._request_octets = self._stream.octets_received
        self._failed_content = None
        try:
            forwarded.content(self._content_resumed)
        except Exception:  # noqa: BLE001 - logged there
            self._fail_content()

    def header_received(self, block: bytes, facts: HeaderFacts) -> None:
        """See `Handler`."""
        transaction = self._transaction
        assert transaction is not None
        has_trace = facts.traceparents or facts.tracestate
        transaction.trace_headers = TraceHeaders(facts.traceparents, facts.tracestate) if has_trace else _NO_TRACE
        transaction.message_id = facts.message_id
        self.content_received(self._received_field(transaction) + block)

    def content_received(self, data: bytes) -> None:
        """See `Handler`."""
        if self._failed_content is not None:
            return  # the client is read to its end all the same
        forwarded = self._forwarded
        assert forwarded is not None
        try:
            goes_on = forwarded.write(data)
        except Exception:  # noqa: BLE001 - logged there
            self._fail_content()
        else:
            if not goes_on:
                self._pause(_Pause.CONTENT)
                self._held_back_at = self._loop.time()

    def _content_resumed(self) -> None:
        if self._pauses & _Pause.CONTENT:
            self._began += self._loop.time() - self._held_back_at  # the time was not the client's
            self._resume(_Pause.CONTENT)

    def _fail_content(self) -> None:
        self._log_forwarder("content")
        self._failed_content = replies.INTERNAL

    def content_ended(self, octets: int) -> None:
        """See `Handler`."""
        transaction, forwarded = self._transaction, self._forwarded
        assert transaction is not None
        assert forwarded is not None
        transaction.octets = octets
        self._content_resumed()  # there is no more of it to hold back
        if self._failed_content is None:
            try:
                forwarded.finish(self._message_answered)
            except Exception:  # noqa: BLE001 - logged there
                self._fail_content()
        if self._failed_content is not None:
            forwarded.abort()
            self._message_answered(self._failed_content, ())

    def _message_answered(self, reply: Reply, verdicts: Sequence[Reply]) -> None:
        transaction, forwarded = self._transaction, self._forwarded
        if transaction is None or forwarded is None:
            return  # given up, at a shutdown
        if 200 <= reply.code < 300:
            outcome = Outcome.RELAYED
            if (spool_id := forwarded.spool_id) is not None:
                transaction.spool_id = spool_id
                outcome = Outcome.QUEUED
            reply = replies.message_accepted(self._trace_id if self._policy.trace_in_reply else None)
        else:
            outcome = outcome_of(reply)
        self._transaction = self._forwarded = None
        transaction.end(outcome, reply, time.monotonic_ns())
        self._house.observer.transaction_ended(transaction)
        if self._policy.protocol.is_lmtp:
            self._call(self._protocol.reply, *[reply] * len(transaction.accepted))
        else:
            self._call(self._protocol.reply, reply)

    def transaction_aborted(self, reply: Reply | None) -> None:
        """See `Handler`."""
        transaction, forwarded = self._transaction, self._forwarded
        self._transaction = self._forwarded = None
        if transaction is None or forwarded is None:
            return
        self._content_resumed()
        outcome = Outcome.ABORTED if reply is None else outcome_of(reply)
        if reply is None and not transaction.accepted and transaction.refused:
            # No recipient was left, so there was no mail to send: the last refusal is how it ended.
            reply = transaction.refused[-1][1]
            outcome = outcome_of(reply)
        try:
            forwarded.abort()  # first, so that its attempts are over with it
        except Exception:  # noqa: BLE001 - logged there
            self._log_forwarder("abort")
        transaction.end(outcome, reply, self._protocol.states.now_ns)
        self._house.observer.transaction_ended(transaction)

    def _log_forwarder(self, step: str) -> None:
        logger.exception("the forwarder failed", extra={"connection_id": self.record.info.id, "step": step})

    def _received_field(self, transaction: TransactionRecord) -> bytes:
        """Our Received field for the message at hand (RFC 5321 4.4)."""
        is_utf8 = transaction.mail.smtputf8
        head = None if is_utf8 else self._received_head
        if head is None:
            head = self._make_received_head(is_utf8=is_utf8)
            if not is_utf8:
                self._received_head = head
        self._trace_id = self._house.observer.trace_id(transaction)
        return received_field(head, self._trace_id or self.record.info.id, time.time())

    def _make_received_head(self, *, is_utf8: bool) -> bytes:
        record, protocol, tls = self.record, self._protocol, self.record.tls
        return received_head(
            helo=record.hello_name,
            peer_host=record.client.host,
            by=self._policy.protocol.hostname,
            with_protocol=with_protocol(
                is_extended=record.hello_verb == "EHLO" or record.hello_verb == "LHLO",
                is_tls=protocol.is_tls,
                is_authenticated=protocol.is_authenticated,
                is_lmtp=self._policy.protocol.is_lmtp,
                is_utf8=is_utf8,
            ),
            tls=f"{tls.version} {tls.cipher}" if tls is not None else None,
        )


def outcome_of(reply: Reply) -> Outcome:
    """How a transaction ended whose final reply is `reply`."""
    if 200 <= reply.code < 300:
        return Outcome.RELAYED
    if reply.error_type is ErrorType.OUTCOME_UNKNOWN:
        return Outcome.UNKNOWN
    return Outcome.REFUSED if reply.is_permanent else Outcome.DEFERRED
