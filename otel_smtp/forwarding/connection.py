"""One connection to an upstream: a stream joined to a ClientProtocol, with its deadlines.

The one rule that matters: while an exchange is under way the connection is out of step, and only the last awaited
answer brings it back. Whatever ends the exchange otherwise (a deadline, a mail that gives up, a fault, our own bug)
leaves it out of step, and such a connection is closed and never used again. There is nothing to remember and nothing to
clean up.

An exchange is begun by `exchange`, and ends by one call back. What arrives is pushed here by the stream, in the call in
which the transport delivers it. Only opening a connection is written as coroutines: it waits long, and comes seldom.
"""

import asyncio
import ipaddress
import math
import ssl
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

from otel_smtp.forwarding import authentication
from otel_smtp.forwarding.authentication import without_secrets
from otel_smtp.forwarding.faults import ConnectFailed, ConnectionLost, OutOfStep, TimedOut, UpstreamFault
from otel_smtp.forwarding.settings import (
    DEFAULT_RECIPIENTS,
    Credentials,
    PoolLimits,
    ReplyLimits,
    Timeouts,
    UpstreamSettings,
)
from otel_smtp.net import Stream, connect, connect_unix
from otel_smtp.net.reasons import reason_of
from otel_smtp.observing import DeliveryPhase
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import Answer, Awaited, ClientProtocol, challenge_of
from otel_smtp.smtp.errors import RemoteProtocolError
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import TlsMode

_NOTHING: Final[AbstractSet[Awaited]] = frozenset()

Settled = Callable[[list[Answer], UpstreamFault | None], None]
"""Takes the answers of an exchange, in order, and what ended it before its last answer; None where nothing did. It must
not raise."""

NotePhase = Callable[[DeliveryPhase, Reply | None], None]
"""Takes each step of opening a connection, with the upstream's reply where it gave one."""


class UpstreamConnection:
    """A connection that has been greeted, put under TLS and authenticated as its upstream wants.

    Attributes:
        stream, protocol: what it is made of; commands and content are queued in the protocol.
        is_alive: in step, and nothing has been heard of it since its last answer: neither octets nor its end.
        opening: the steps of its opening, where it was opened for no mail and has served none yet; else None.
        messages: transactions that were begun on it. `most_recipients`: of one of them.
        opened_at, used_at: by the loop's clock; when it was opened, and released last.
        deadline: when the exchange under way fails, by the loop's clock; see `check_deadline`.
        is_spent: no further transaction is begun on it.
        needs_reset: the last transaction was left open: RSET goes before the next MAIL, in the same group.
        round_trips: since it was opened, each wait for an answer to something that was sent.
        on_lost: called when the connection stops being alive between two exchanges.
    """

    __slots__ = (
        "_answers",
        "_is_in_content",
        "_loop",
        "_on_settled",
        "_on_writable",
        "_patience_seconds",
        "_stop_at",
        "_timeouts",
        "deadline",
        "is_alive",
        "is_spent",
        "messages",
        "most_recipients",
        "needs_reset",
        "on_lost",
        "opened_at",
        "opening",
        "protocol",
        "round_trips",
        "stream",
        "used_at",
    )

    def __init__(
        self,
        stream: Stream,
        timeouts: Timeouts,
        *,
        is_lmtp: bool = False,
        reply_limits: ReplyLimits = ReplyLimits(),  # noqa: B008 - frozen
        disabled: Collection[str] = (),
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.stream = stream
        self.protocol = ClientProtocol(
            is_lmtp=is_lmtp,
            max_reply_line_octets=reply_limits.line_octets,
            max_reply_lines=reply_limits.lines,
            disabled=disabled,
        )
        self.is_alive = self.is_spent = False
        self.messages = 0
        self.opening: Sequence[tuple[DeliveryPhase, Reply | None]] | None = None
        self.most_recipients = DEFAULT_RECIPIENTS
        self.opened_at = self.used_at = self._loop.time()
        self.deadline = math.inf
        self.needs_reset = False
        self.round_trips = 0
        self.on_lost: Callable[[UpstreamConnection], None] | None = None
        self._timeouts = timeouts
        self._patience_seconds: dict[Awaited | None, float] = {
            Awaited.GREETING: timeouts.greeting,
            Awaited.DATA: timeouts.data,
            Awaited.CONTENT: timeouts.reply,
        }
        self._answers: list[Answer] = []  # of the exchange under way
        self._on_settled: Settled | None = None  # None: no exchange is under way
        self._stop_at = _NOTHING
        self._is_in_content = False  # its end has not been sent; whatever is answered now ends the exchange
        self._on_writable: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<UpstreamConnection {self.stream!r} {self.messages} messages>"

    @property
    def extensions(self) -> Extensions:
        """What the upstream offers on this connection."""
        return self.protocol.extensions

    @property
    def idle_seconds(self) -> float:
        """Since it was released last, or opened."""
        return self._loop.time() - self.used_at

    def is_reusable(self, now: float, limits: PoolLimits) -> bool:
        """Whether another transaction may be begun on it."""
        messages = self.messages
        return (
            self.is_alive
            and not self.is_spent
            and messages < limits.messages
            and messages < self.protocol.extensions.limits.get("MAILMAX", limits.messages)
            and now - self.opened_at < limits.age_seconds
        )

    def ensure_alive(self) -> None:
        """Look, before an exchange begins: what is sent to a connection that is known to be dead has no known outcome.

        Raises:
            ConnectionLost: the upstream is gone, or has said 421.
            OutOfStep: it has said something else.
        """
        if self.is_alive:
            return
        farewell = self._answers or self.protocol.receive(b"")
        if self.protocol.fault is not None:
            raise OutOfStep(str(self.protocol.fault)) from self.protocol.fault
        if farewell:
            raise ConnectionLost("the upstream closed the connection with 421", upstream_reply=farewell[-1].reply)
        raise ConnectionLost("connection lost between two exchanges")

    # Exchanges --------------------------------------------------------------------------------------------

    def exchange(self, on_settled: Settled, *, stop_at: AbstractSet[Awaited] = _NOTHING) -> None:
        """Send what is queued, and call `on_settled` when everything is answered; each answer has its own time.

        The fault is ConnectionLost where the upstream went away, was silent for too long (then TimedOut) or said 421;
        OutOfStep where it broke the protocol. The answers that came before it count.

        Args:
            stop_at: verbs whose refusal makes what is queued and not sent yet pointless; it is taken back.
        """
        self.is_alive = False
        self._is_in_content = False
        self._on_settled = on_settled
        self._stop_at = stop_at
        protocol = self.protocol
        if data := protocol.data_to_send():
            self.round_trips += 1
            self.stream.write(data)
        verb = protocol.awaited[0] if protocol.awaited else None
        self.deadline = self._loop.time() + self._patience_seconds.get(verb, self._timeouts.command)
        if self.stream.is_eof and self.stream.receiver is self:
            self._end(self._lost())

    def send_content(self, on_settled: Settled, on_writable: Callable[[], None]) -> bool:
        """Send a piece of content that was queued, and that is not the last: `exchange` sends that.

        Meanwhile the upstream may refuse the content, or go away: then `on_settled` is called, as for an exchange, and
        `on_writable` is not called any more.

        Returns:
            Whether more can be sent at once. Else `on_writable` is called when it can.
        """
        self.is_alive = False
        self._is_in_content = True
        self._on_settled = on_settled
        self.stream.write(self.protocol.data_to_send())
        if self.stream.is_eof:
            self._end(self._lost())
            return False
        if not self.stream.is_write_paused:
            self.deadline = math.inf
            return True
        self._on_writable = on_writable
        self.deadline = self._loop.time() + self._timeouts.block
        return False

    async def settled(self) -> list[Answer]:
        """`exchange`, for a coroutine; the stream is read from the first one on.

        Raises:
            UpstreamFault: as for `exchange`.
        """
        waiting: asyncio.Future[UpstreamFault | None] = self._loop.create_future()
        got: list[Answer] = []

        def on_settled(answers: list[Answer], fault: UpstreamFault | None) -> None:
            got.extend(answers)
            if not waiting.done():
                waiting.set_result(fault)

        if self.stream.receiver is self:
            self.ensure_alive()
        self.exchange(on_settled)
        if self.stream.receiver is None:
            self.stream.receive_by(self)
        try:
            if not waiting.done():
                async with asyncio.timeout_at(self.deadline):
                    await waiting
        except TimeoutError as error:
            raise self._late() from error
        finally:
            self.abandon()
        if (fault := waiting.result()) is not None:
            raise fault
        return got

    def check_deadline(self, now: float) -> None:
        """End an exchange that takes too long; to be called a few times a second while one may be under way."""
        if now >= self.deadline and self._on_settled is not None:
            self._end(self._late())

    def _late(self) -> TimedOut:
        if self._is_in_content:
            return TimedOut(f"the upstream took no more content within {self._timeouts.block:g} s")
        verb = self._awaited
        seconds = self._patience_seconds.get(verb, self._timeouts.command)
        return TimedOut(f"no {_answer_to(verb)} within {seconds:g} s")

    def _lost(self) -> ConnectionLost:
        if self._is_in_content:
            return ConnectionLost("connection lost within the content")
        return ConnectionLost(f"connection lost before the {_answer_to(self._awaited)}")

    @property
    def _awaited(self) -> Awaited | None:
        return self.protocol.awaited[0] if self.protocol.awaited else None

    def abandon(self) -> None:
        """The exchange under way is of interest to nobody any more; the connection stays out of step."""
        self._on_settled = self._on_writable = None
        self.deadline = math.inf

    def close(self) -> None:
        """End it: QUIT without waiting for the answer if it is in step, else at once. Idempotent."""
        self.on_lost = None
        if not self.is_alive:
            self.stream.abort()
            return
        # RFC 5321 4.1.1.10 asks a client to wait for the reply; nobody gains anything by that.
        self.is_alive = False
        self.protocol.send_quit()
        self._flush()
        self.stream.close()

    def _flush(self) -> None:
        """Write what may travel now, in one piece."""
        if data := self.protocol.data_to_send():
            self.round_trips += 1
            self.stream.write(data)

    def _end(self, fault: UpstreamFault | None) -> None:
        """The exchange is over."""
        on_settled = self._on_settled
        assert on_settled is not None
        answers, self._answers = self._answers, []
        self._on_settled = self._on_writable = None
        self.deadline = math.inf
        self.is_alive = fault is None and self.protocol.is_in_step
        on_settled(answers, fault)

    # Receiver ---------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Match what arrived with what was asked."""
        protocol = self.protocol
        answers = protocol.receive(data)
        self._answers += answers
        if self._on_settled is None:
            self._be_lost()
            return
        for verb, reply in answers:
            if reply.code == 421:
                self._end(ConnectionLost("the upstream closed the connection with 421", upstream_reply=reply))
                return
            if reply.code >= 400 and verb in self._stop_at:
                protocol.cancel_queued()
        if protocol.fault is not None:
            fault = OutOfStep(str(protocol.fault))
            fault.__cause__ = protocol.fault
            self._end(fault)
        elif answers:
            # Before the end of the content the engine takes nothing but a refusal of it.
            if not (protocol.awaited or protocol.queued) or self._is_in_content:
                self._end(None)
                return
            if protocol.queued:
                self._flush()
            self.deadline = self._loop.time() + self._patience_seconds.get(protocol.awaited[0], self._timeouts.command)

    def input_ended(self) -> None:
        """The upstream is gone."""
        if self._on_settled is not None:
            self._end(self._lost())
        else:
            self._be_lost()

    def writing_resumed(self) -> None:
        """The upstream takes more content."""
        on_writable, self._on_writable = self._on_writable, None
        if on_writable is not None:
            self.deadline = math.inf
            on_writable()

    def _be_lost(self) -> None:
        self.is_alive = False
        if self.on_lost is not None:
            self.on_lost(self)


def _answer_to(verb: Awaited | None) -> str:
    match verb:
        case None:
            return "reply"
        case Awaited.GREETING:
            return "greeting"
        case Awaited.CONTENT:
            return "reply to the end of DATA"  # BDAT LAST as well
        case _:
            return f"reply to {verb}"


# Opening ------------------------------------------------------------------------------------------------------


async def open_connection(
    settings: UpstreamSettings, context: ssl.SSLContext | None, hostname: str, note: NotePhase
) -> UpstreamConnection:
    """Connect, shake hands, say EHLO and AUTH, as `settings` want it.

    Args:
        context: for TLS; None only where `settings.tls` is OFF.
        hostname: what we call ourselves in EHLO.
        note: called with each phase.

    Raises:
        ConnectFailed: it did not come to a connection that can take mail. Nothing of it is left.
    """
    stream = await _connect(settings, context)
    note(DeliveryPhase.CONNECT, None)
    connection = UpstreamConnection(
        stream,
        settings.timeouts,
        is_lmtp=settings.is_lmtp,
        reply_limits=settings.reply_limits,
        disabled=settings.disabled,
    )
    try:
        await introduce(connection, settings, context, hostname, note)
    except BaseException:
        stream.abort()
        raise
    connection.most_recipients = settings.most_recipients(connection.extensions)
    return connection


async def _connect(settings: UpstreamSettings, context: ssl.SSLContext | None) -> Stream:
    seconds = settings.timeouts.connect
    try:
        if settings.port is None:
            return await connect_unix(settings.host, timeout_seconds=seconds)
        return await connect(
            settings.host,
            settings.port,
            timeout_seconds=seconds,
            context=context if settings.tls is TlsMode.IMPLICIT else None,
            server_hostname=settings.verified_name,
        )
    except ssl.SSLError as error:
        raise ConnectFailed(reason_of(error), replies.UPSTREAM_TLS) from error
    except ConnectionResetError as error:  # somebody was there
        raise ConnectFailed("connection lost before the greeting", replies.UPSTREAM_LOST) from error
    except TimeoutError as error:
        raise ConnectFailed(f"no connection within {seconds:g} s") from error
    except OSError as error:  # refused, no such name
        raise ConnectFailed(reason_of(error)) from error


async def introduce(
    connection: UpstreamConnection,
    settings: UpstreamSettings,
    context: ssl.SSLContext | None,
    hostname: str,
    note: NotePhase,
) -> None:
    """All that comes before the first mail on a new connection; arguments and errors as `open_connection`."""
    try:
        await _introduce(connection, settings, context, hostname, note)
    except ConnectFailed:
        raise
    except UpstreamFault as fault:
        raise ConnectFailed(str(fault), fault.reply, fault.upstream_reply) from fault
    except RemoteProtocolError as error:
        raise ConnectFailed(str(error), error.reply) from error


async def _introduce(
    connection: UpstreamConnection,
    settings: UpstreamSettings,
    context: ssl.SSLContext | None,
    hostname: str,
    note: NotePhase,
) -> None:
    greeting = await _answer(connection, DeliveryPhase.GREETING, note)
    note(DeliveryPhase.GREETING, greeting)
    if greeting.code != 220:
        # A 5yz here is about our configuration, not about anybody's mail: never passed on.
        raise ConnectFailed("refused in the greeting", upstream_reply=greeting)
    await _hello(connection, settings, hostname, note)
    if settings.tls is TlsMode.STARTTLS:
        assert context is not None
        await _start_tls(connection, settings, context, note)
        await _hello(connection, settings, hostname, note)
    if settings.credentials is not None and settings.auth != "off":
        await _authenticate(connection, settings, settings.credentials, note)


async def _answer(
    connection: UpstreamConnection,
    phase: DeliveryPhase,
    note: NotePhase,
    shown: Callable[[Reply], Reply] = lambda reply: reply,
) -> Reply:
    """The answer to the one command that was queued.

    Args:
        shown: what others may see of it.

    Raises:
        UpstreamFault: there is none, or it is 421; that is noted as the answer of `phase`.
    """
    try:
        return (await connection.settled())[0].reply
    except UpstreamFault as fault:
        if fault.upstream_reply is not None:
            fault.upstream_reply = shown(fault.upstream_reply)
            note(phase, fault.upstream_reply)
        raise


async def _hello(connection: UpstreamConnection, settings: UpstreamSettings, hostname: str, note: NotePhase) -> None:
    connection.protocol.send_hello(hostname)
    reply = await _answer(connection, DeliveryPhase.EHLO, note)
    # RFC 5321 3.2: a client falls back to HELO where EHLO is refused. LMTP has no such thing.
    if reply.is_permanent and not settings.is_lmtp:
        refusal = reply
        try:
            connection.ensure_alive()
            connection.protocol.send_helo(hostname)
            reply = await _answer(connection, DeliveryPhase.EHLO, note)
        except ConnectionLost as fault:
            if fault.upstream_reply is not None:
                raise
            # It refused EHLO and hung up: that is what it has to say, not the silence after it.
            note(DeliveryPhase.EHLO, refusal)
            raise ConnectFailed("EHLO refused", upstream_reply=refusal) from fault
    note(DeliveryPhase.EHLO, reply)
    if not reply.is_positive:
        raise ConnectFailed("EHLO refused", upstream_reply=reply)


async def _start_tls(
    connection: UpstreamConnection, settings: UpstreamSettings, context: ssl.SSLContext, note: NotePhase
) -> None:
    if not connection.extensions.starttls:
        raise ConnectFailed("STARTTLS is not offered", replies.UPSTREAM_TLS)
    connection.protocol.send_starttls()
    reply = await _answer(connection, DeliveryPhase.STARTTLS, note)
    if not reply.is_positive:
        note(DeliveryPhase.STARTTLS, reply)
        raise ConnectFailed("STARTTLS refused", replies.UPSTREAM_TLS, reply)
    stream = connection.stream
    try:
        # What has arrived since was written by somebody in the middle: the engine refuses it.
        connection.protocol.tls_started()
        await stream.start_tls(
            context,
            server_side=False,
            server_hostname=settings.verified_name,
            timeout_seconds=settings.timeouts.connect,
        )
    except ssl.SSLError as error:
        raise ConnectFailed(reason_of(error), replies.UPSTREAM_TLS) from error
    except TimeoutError as error:
        seconds = settings.timeouts.connect
        raise ConnectFailed(f"no TLS handshake within {seconds:g} s", replies.UPSTREAM_LOST) from error
    except OSError as error:
        raise ConnectFailed("connection lost in the TLS handshake", replies.UPSTREAM_LOST) from error
    note(DeliveryPhase.STARTTLS, reply)


async def _authenticate(
    connection: UpstreamConnection, settings: UpstreamSettings, credentials: Credentials, note: NotePhase
) -> None:
    if connection.stream.tls is None and not _is_local(connection.stream):
        raise ConnectFailed("no credential goes over an unverified channel", replies.UPSTREAM_TLS)
    protocol = connection.protocol

    def shown(reply: Reply) -> Reply:
        return without_secrets(reply, credentials)

    try:
        mechanism = authentication.choose(settings.auth, protocol.extensions.auth_mechanisms, credentials)
        if mechanism is None:
            raise ConnectFailed("no wanted AUTH mechanism is offered", replies.UPSTREAM_LOGIN)
        protocol.send_auth(mechanism.name, await mechanism.initial_response())
        reply = await _answer(connection, DeliveryPhase.AUTH, note, shown)
        while reply.code < 400 and not reply.is_positive:
            protocol.send_auth_response(await mechanism.respond(challenge_of(reply)))
            reply = await _answer(connection, DeliveryPhase.AUTH, note, shown)
        if reply.is_positive:
            mechanism.check_success()
    except authentication.ExchangeFailed as error:
        raise ConnectFailed(f"AUTH broken off: {error}", replies.UPSTREAM_LOGIN) from error
    reply = shown(reply)
    note(DeliveryPhase.AUTH, reply)
    if not reply.is_positive:
        raise ConnectFailed("AUTH refused", replies.UPSTREAM_LOGIN, reply)


def _is_local(stream: Stream) -> bool:
    """Whether the octets stay on this machine."""
    if stream.peer.port is None:
        return True
    try:
        return ipaddress.ip_address(stream.peer.host).is_loopback
    except ValueError:
        return False
