"""One connection to an upstream: a stream joined to a ClientProtocol, with its deadlines.

The one rule that matters: while an exchange is under way the connection is out of step, and only the last awaited
answer brings it back. Whatever ends the exchange otherwise (a deadline, a cancel, a fault, our own bug) leaves it out
of step, and such a connection is closed and never used again. There is nothing to remember and nothing to clean up.
"""

import asyncio
import ipaddress
import ssl
from collections.abc import Set as AbstractSet
from typing import Final

from otel_smtp.forwarding import authentication
from otel_smtp.forwarding.faults import ConnectFailed, ConnectionLost, OutOfStep, TimedOut, UpstreamFault
from otel_smtp.forwarding.settings import Credentials, PoolLimits, ReplyLimits, Timeouts, UpstreamSettings
from otel_smtp.net import Stream, connect, connect_unix
from otel_smtp.observing import DeliveryObserver, DeliveryPhase
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import Answer, ClientProtocol, Extensions, Verb, challenge_of
from otel_smtp.smtp.errors import RemoteProtocolError
from otel_smtp.smtp.events import NEED_DATA
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import TlsMode

_NOTHING: Final[AbstractSet[Verb]] = frozenset()


class UpstreamConnection:
    """A connection that has been greeted, put under TLS and authenticated as its upstream wants.

    Attributes:
        stream, protocol: what it is made of; the transaction writes content through them.
        messages: transactions that were begun on it.
        opened_at, used_at: by the loop's clock; when it was opened, and released last.
        needs_reset: the last transaction was left open: RSET goes before the next MAIL, in the same group.
        round_trips: since it was opened, each wait for an answer to something that was sent.
    """

    __slots__ = (
        "_has_sent",
        "_is_out_of_step",
        "_loop",
        "_timeouts",
        "messages",
        "needs_reset",
        "opened_at",
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
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.stream = stream
        self.protocol = ClientProtocol(
            is_lmtp=is_lmtp,
            max_reply_line_octets=reply_limits.line_octets,
            max_reply_lines=reply_limits.lines,
        )
        self.messages = 0
        self.opened_at = self.used_at = self._loop.time()
        self.needs_reset = False
        self.round_trips = 0
        self._timeouts = timeouts
        self._has_sent = False
        self._is_out_of_step = False

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
        most = min(limits.messages, self.extensions.limits.get("MAILMAX", limits.messages))
        return self.is_alive and self.messages < most and now - self.opened_at < limits.age_seconds

    @property
    def is_alive(self) -> bool:
        """In step, and nothing has been heard of it since its last answer: neither octets nor its end."""
        return (
            not self._is_out_of_step
            and not self.stream.is_eof
            and self.protocol.is_in_step
            and not self.stream.has_unread
        )

    def ensure_alive(self) -> None:
        """Look, before an exchange begins: what is sent to a connection that is known to be dead has no known outcome.

        Raises:
            ConnectionLost: the upstream is gone, or has said 421.
            OutOfStep: it has said something else.
        """
        if not self.is_alive:
            if self.take_answer() is not None:
                raise OutOfStep("a reply that nobody had asked for")
            raise ConnectionLost("connection lost between two exchanges")

    async def settle(
        self,
        *,
        stop_at: AbstractSet[Verb] = _NOTHING,
        answers: list[Answer] | None = None,
    ) -> list[Answer]:
        """Send what is queued, and wait until everything is answered; each answer has its own time.

        Args:
            stop_at: verbs whose refusal makes what is queued and not sent yet pointless; it is taken back.
            answers: where the answers go; so they are known too when this is cut short, and can be gone on with by
                another call.

        Raises:
            ConnectionLost: the upstream went away, is silent for too long (then TimedOut), or said 421.
            OutOfStep: it broke the protocol.
        """
        if answers is None:
            answers = []
        self._is_out_of_step = True
        try:
            await self._settle(answers, stop_at)
        except RemoteProtocolError as error:
            raise OutOfStep(str(error)) from error
        self._is_out_of_step = False
        return answers

    async def _settle(self, answers: list[Answer], stop_at: AbstractSet[Verb]) -> None:
        protocol, stream = self.protocol, self.stream
        self.flush()
        is_fresh = True
        while not protocol.is_settled:
            answer = protocol.next_answer()
            if answer is not NEED_DATA:
                assert isinstance(answer, Answer)
                answers.append(answer)
                if answer.reply.code == 421:
                    raise ConnectionLost("421", upstream_reply=answer.reply)
                if answer.reply.code >= 400 and answer.verb in stop_at:
                    protocol.cancel_queued()
                if protocol.has_queued:
                    self.flush()
                is_fresh = True
                continue
            if is_fresh:
                stream.deadline = self._loop.time() + self._seconds_for(protocol.awaited)
                is_fresh = False
            if self._has_sent:
                self._has_sent = False
                self.round_trips += 1
            try:
                data = await stream.read()
            except TimeoutError as error:
                raise TimedOut("no answer in time") from error
            if not data:
                raise ConnectionLost("connection lost")
            protocol.receive_data(data)

    def _seconds_for(self, verb: Verb | None) -> float:
        match verb:
            case Verb.CONTENT:
                return self._timeouts.reply
            case Verb.GREETING:
                return self._timeouts.greeting
            case Verb.DATA:
                return self._timeouts.data
            case _:
                return self._timeouts.command

    def flush(self) -> None:
        """Write what may travel now, in one piece."""
        if data := self.protocol.data_to_send():
            self._has_sent = True
            self.stream.write(data)

    async def write_content(self) -> None:
        """Write a piece of content, and wait while the upstream takes it slower than we give it.

        Raises:
            ConnectionLost: it takes no more.
        """
        self._is_out_of_step = True
        self.flush()
        try:
            await self.stream.drain(timeout_seconds=self._timeouts.block)
        except TimeoutError as error:
            raise TimedOut("the upstream takes no more content") from error
        except ConnectionError as error:
            raise ConnectionLost("connection lost") from error

    def take_answer(self) -> Answer | None:
        """An answer that has arrived unasked, without waiting; None where none has.

        Raises:
            ConnectionLost: it is a 421.
            OutOfStep: it is not a refusal of the content that is being sent.
        """
        self.protocol.receive_data(self.stream.take_pending())
        try:
            answer = self.protocol.next_answer()
        except RemoteProtocolError as error:
            raise OutOfStep(str(error)) from error
        if answer is NEED_DATA:
            return None
        assert isinstance(answer, Answer)
        if answer.reply.code == 421:
            raise ConnectionLost("421", upstream_reply=answer.reply)
        return answer

    def close(self) -> None:
        """End it: QUIT without waiting for the answer if it is in step, else at once. Idempotent."""
        self.stream.on_lost = None
        if not self.is_alive:
            self.stream.abort()
            return
        # RFC 5321 4.1.1.10 asks a client to wait for the reply; nobody gains anything by that.
        self._is_out_of_step = True
        self.protocol.send_quit()
        self.flush()
        self.stream.close()


# Opening ------------------------------------------------------------------------------------------------------


async def open_connection(
    settings: UpstreamSettings, context: ssl.SSLContext | None, hostname: str, seen: DeliveryObserver
) -> UpstreamConnection:
    """Connect, shake hands, say EHLO and AUTH, as `settings` want it.

    Args:
        context: for TLS; None only where `settings.tls` is OFF.
        hostname: what we call ourselves in EHLO.
        seen: is told each phase.

    Raises:
        ConnectFailed: it did not come to a connection that can take mail. Nothing of it is left.
    """
    stream = await _connect(settings, context)
    seen.phase(DeliveryPhase.CONNECT)
    connection = UpstreamConnection(
        stream, settings.timeouts, is_lmtp=settings.is_lmtp, reply_limits=settings.reply_limits
    )
    try:
        await introduce(connection, settings, context, hostname, seen)
    except BaseException:
        stream.abort()
        raise
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
        raise ConnectFailed(_tls_failure(error), replies.UPSTREAM_TLS) from error
    except OSError as error:  # TimeoutError, refused, no such name
        raise ConnectFailed(f"no connection: {type(error).__name__}") from error


def _tls_failure(error: ssl.SSLError) -> str:
    return f"TLS: {getattr(error, 'verify_message', None) or error.reason or 'handshake failed'}"


async def introduce(
    connection: UpstreamConnection,
    settings: UpstreamSettings,
    context: ssl.SSLContext | None,
    hostname: str,
    seen: DeliveryObserver,
) -> None:
    """All that comes before the first mail on a new connection; arguments and errors as `open_connection`."""
    try:
        await _introduce(connection, settings, context, hostname, seen)
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
    seen: DeliveryObserver,
) -> None:
    greeting = (await connection.settle())[0].reply
    seen.phase(DeliveryPhase.GREETING, greeting)
    if greeting.code != 220:
        # A 5yz here is about our configuration, not about anybody's mail: never passed on.
        raise ConnectFailed("refused in the greeting", upstream_reply=greeting)
    await _hello(connection, settings, hostname, seen)
    if settings.tls is TlsMode.STARTTLS:
        assert context is not None
        await _start_tls(connection, settings, context, seen)
        await _hello(connection, settings, hostname, seen)
    if settings.credentials is not None and settings.auth != "off":
        await _authenticate(connection, settings, settings.credentials, seen)


async def _hello(
    connection: UpstreamConnection, settings: UpstreamSettings, hostname: str, seen: DeliveryObserver
) -> None:
    connection.protocol.send_hello(hostname)
    reply = (await connection.settle())[0].reply
    # RFC 5321 3.2: a client falls back to HELO where EHLO is refused. LMTP has no such thing.
    if reply.is_permanent and not settings.is_lmtp:
        connection.protocol.send_helo(hostname)
        reply = (await connection.settle())[0].reply
    seen.phase(DeliveryPhase.EHLO, reply)
    if not reply.is_positive:
        raise ConnectFailed("EHLO refused", upstream_reply=reply)


async def _start_tls(
    connection: UpstreamConnection, settings: UpstreamSettings, context: ssl.SSLContext, seen: DeliveryObserver
) -> None:
    if not connection.extensions.starttls:
        raise ConnectFailed("STARTTLS is not offered", replies.UPSTREAM_TLS)
    connection.protocol.send_starttls()
    reply = (await connection.settle())[0].reply
    if not reply.is_positive:
        seen.phase(DeliveryPhase.STARTTLS, reply)
        raise ConnectFailed("STARTTLS refused", replies.UPSTREAM_TLS, reply)
    stream = connection.stream
    try:
        # What is there already was written by somebody in the middle (E3): the engine refuses it.
        connection.protocol.receive_data(stream.take_pending())
        connection.protocol.tls_started()
        await stream.start_tls(
            context,
            server_side=False,
            server_hostname=settings.verified_name,
            timeout_seconds=settings.timeouts.connect,
        )
    except ssl.SSLError as error:
        raise ConnectFailed(_tls_failure(error), replies.UPSTREAM_TLS) from error
    except OSError as error:
        raise ConnectFailed("connection lost in the TLS handshake") from error
    seen.phase(DeliveryPhase.STARTTLS, reply)


async def _authenticate(
    connection: UpstreamConnection, settings: UpstreamSettings, credentials: Credentials, seen: DeliveryObserver
) -> None:
    if connection.stream.tls is None and not _is_local(connection.stream):
        raise ConnectFailed("no credential goes over an unverified channel", replies.UPSTREAM_TLS)  # P7
    protocol = connection.protocol
    try:
        mechanism = authentication.choose(settings.auth, protocol.extensions.auth, credentials)
        if mechanism is None:
            raise ConnectFailed("no wanted AUTH mechanism is offered")
        protocol.send_auth(mechanism.name, await mechanism.initial_response())
        reply = (await connection.settle())[0].reply
        while reply.code < 400 and not reply.is_positive:
            protocol.send_auth_response(await mechanism.respond(challenge_of(reply)))
            reply = (await connection.settle())[0].reply
        if reply.is_positive:
            mechanism.check_success()
    except authentication.ExchangeFailed as error:
        raise ConnectFailed(f"AUTH broken off: {error}") from error
    seen.phase(DeliveryPhase.AUTH, _without_text(reply))
    if not reply.is_positive:
        raise ConnectFailed("AUTH refused", upstream_reply=_without_text(reply))


def _without_text(reply: Reply) -> Reply:
    """`reply` with its codes alone: servers repeat user names, and worse, in what they say to AUTH."""
    return reply.with_text("AUTH")


def _is_local(stream: Stream) -> bool:
    """Whether the octets stay on this machine."""
    if stream.peer.port is None:
        return True
    try:
        return ipaddress.ip_address(stream.peer.host).is_loopback
    except ValueError:
        return False
