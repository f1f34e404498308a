"""Opening a connection to an upstream: connecting, greeting, EHLO, STARTTLS, AUTH.

Written as coroutines, unlike the mail path: it waits long, and is rare.
"""

import ipaddress
import ssl
from collections.abc import Callable

from otel_smtp.forwarding import authentication
from otel_smtp.forwarding.authentication import without_secrets
from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.faults import ConnectFailed, ConnectionLost, UpstreamFault
from otel_smtp.forwarding.settings import Credentials, UpstreamSettings
from otel_smtp.net import Stream, connect, connect_unix
from otel_smtp.net.reasons import reason_of
from otel_smtp.observing import DeliveryPhase
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import challenge_of
from otel_smtp.smtp.errors import RemoteProtocolError
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import TlsMode

NotePhase = Callable[[DeliveryPhase, Reply | None], None]
"""Takes each step of opening a connection, with the upstream's reply, if any."""


async def open_connection(
    settings: UpstreamSettings, context: ssl.SSLContext | None, hostname: str, note: NotePhase
) -> UpstreamConnection:
    """Connect, shake hands, send EHLO and AUTH, as `settings` demand.

    Args:
        context: for TLS; None only where `settings.tls` is OFF.
        hostname: our name in EHLO.
        note: called with each phase.

    Raises:
        ConnectFailed: no connection for mail could be opened. Nothing of it remains.
    """
    stream = await _connect(settings, context)
    note(DeliveryPhase.CONNECT, None)
    connection = UpstreamConnection(
        stream,
        settings.timeouts,
        is_lmtp=settings.is_lmtp,
        limits=settings.limits,
        reply_limits=settings.reply_limits,
        disabled=settings.disabled,
    )
    try:
        await introduce(connection, settings, context, hostname, note)
    except BaseException:
        stream.abort()
        raise
    connection.most_recipients = settings.most_recipients(connection.extensions)
    most_messages = settings.limits.messages
    connection.most_messages = min(most_messages, connection.extensions.limits.get("MAILMAX", most_messages))
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
    except ConnectionResetError as error:  # a server accepted the connection
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
    """Do the steps before the first mail on a new connection; arguments and errors as `open_connection`."""
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
        # A 5yz here is about our configuration, not about a mail: never passed on.
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
    """Exchange the one queued command for its answer.

    Args:
        shown: makes the version of the answer that others may see.

    Raises:
        UpstreamFault: there is no answer, or it is 421; noted as the answer of `phase`.
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
    # RFC 5321 3.2: a client falls back to HELO if EHLO is refused. LMTP has no fallback.
    if reply.is_permanent and not settings.is_lmtp:
        refusal = reply
        try:
            connection.ensure_alive()
            connection.protocol.send_helo(hostname)
            reply = await _answer(connection, DeliveryPhase.EHLO, note)
        except ConnectionLost as fault:
            if fault.upstream_reply is not None:
                raise
            # It refused EHLO and hung up: the refusal is its answer, not the silence after it.
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
        # A man in the middle injected any octets that have arrived since: the engine refuses them.
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
