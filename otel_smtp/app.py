"""The composition root: builds the gateway out of its rooms, starts it, drains it, and flushes what it knows.

There is no `if` about mail here. Adapters meet only as constructor arguments.
"""

import asyncio
import contextlib
import logging
import signal
import ssl
from collections.abc import Callable, Sequence
from typing import Final

from otel_smtp.config import Listener, Settings, Upstream
from otel_smtp.forwarding.base import Forwarder
from otel_smtp.forwarding.upstream import UpstreamForwarder, UpstreamSettings, UpstreamTimeouts
from otel_smtp.observer import ConnectionInfo, Endpoint, Observer, StateCallback, fan_out
from otel_smtp.server.connection import ListenerPolicy, ServerTimeouts
from otel_smtp.server.listener import Listening, Server
from otel_smtp.server.tls import ServerTls
from otel_smtp.server.users import Authenticator, load_users
from otel_smtp.smtp.server import ServerLimits, ServerPolicy
from otel_smtp.smtp.states import TlsMode, Transition
from otel_smtp.telemetry.records import SpanRecord
from otel_smtp.telemetry.setup import Telemetry, TelemetrySettings

logger: Final = logging.getLogger("otel_smtp.app")

# telemetry.md: the flush at exit has a budget of its own, so that a dead collector cannot hold a pod's shutdown.
TELEMETRY_FLUSH_SECONDS: Final = 2.0


class Gateway:
    """One gateway in one process.

    Args:
        settings: checked settings.
        observers: told of everything that happens, beside the gateway's own telemetry.
        conn_state: called at each state transition of each client connection. One that raises is logged once and
            dropped.
        span_sink: called with each finished span, sampled or not exported: for views in this process.

    Use as an asynchronous context manager, or call `start` and `stop`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        observers: Sequence[Observer] = (),
        conn_state: Callable[[ConnectionInfo, Transition], None] | None = None,
        span_sink: Callable[[SpanRecord], None] | None = None,
    ) -> None:
        self._settings = settings
        self._telemetry = Telemetry(_telemetry_settings(settings), span_sink=span_sink)
        members = [self._telemetry.observer, *observers]
        if conn_state is not None:
            members.append(StateCallback(conn_state))
        self._observer = fan_out(members)
        self._forwarder = _forwarder(settings)
        self._tls: list[ServerTls] = []
        self._server = Server(
            [self._listening(listener) for listener in settings.listener],
            self._forwarder,
            self._observer,
            connections=settings.limits.connections,
            connections_per_client=settings.limits.connections_per_client,
        )
        self.addresses: dict[str, list[Endpoint]] = {}

    @property
    def settings(self) -> Settings:
        """The settings that the gateway runs with."""
        return self._settings

    @property
    def trace_export(self) -> str:
        """Where traces go, for people."""
        return self._telemetry.destination

    async def start(self) -> None:
        """Bind the listeners and accept connections; `addresses` tells where.

        Raises:
            OSError: an address cannot be bound.
        """
        self._telemetry.start()
        self.addresses = await self._server.start()

    async def stop(self, *, immediately: bool = False) -> None:
        """Drain: stop accepting, 421 to idle connections, the grace for open transactions, close the pool, flush.

        Args:
            immediately: without the grace.
        """
        await self._server.drain(0.0 if immediately else self._settings.timeouts.shutdown_grace)
        await self._forwarder.close()
        await asyncio.to_thread(self._telemetry.flush_and_shutdown, TELEMETRY_FLUSH_SECONDS)

    def reload_certificates(self) -> None:
        """Read the certificates again; open connections keep theirs, and a broken file keeps the old one in use."""
        for tls in self._tls:
            tls.reload()

    async def __aenter__(self) -> "Gateway":
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    def _listening(self, listener: Listener) -> Listening:
        settings = self._settings
        context: Callable[[], ssl.SSLContext] | None = None
        if listener.tls is not TlsMode.OFF:
            assert listener.tls_cert is not None
            assert listener.tls_key is not None
            tls = ServerTls(listener.tls_cert, listener.tls_key)
            self._tls.append(tls)
            context = tls.context
        authenticator: Authenticator | None = None
        if listener.auth != "off" and listener.auth_users_file is not None:
            authenticator = Authenticator(load_users(listener.auth_users_file))
        protocol = ServerPolicy(
            hostname=settings.hostname,
            is_lmtp=listener.protocol == "lmtp",
            tls_mode=listener.tls,
            tls_required=listener.tls_required,
            auth_mechanisms=authenticator.mechanisms if authenticator is not None else (),
            auth_required=listener.auth == "required",
            auth_in_clear=listener.auth_in_clear,
            rejects_bare_line_ends=settings.delivery.content_newlines == "reject",
            limits=_limits(settings),
        )
        timeouts = settings.timeouts
        return Listening(
            ListenerPolicy(
                name=listener.name,
                protocol=protocol,
                timeouts=ServerTimeouts(
                    command=timeouts.command,
                    data=timeouts.data,
                    tls_handshake=timeouts.tls_handshake,
                    session=timeouts.session,
                ),
                tls_context=context,
                authenticator=authenticator,
                allow=listener.allow,
                proxy_protocol_from=listener.proxy_protocol_from,
                trace_in_reply=settings.telemetry.trace_in_reply,
            ),
            listener.address,
        )


def _limits(settings: Settings) -> ServerLimits:
    limits = settings.limits
    return ServerLimits(
        message_size=limits.message_size,
        recipients=limits.recipients,
        messages_per_connection=limits.messages_per_connection,
        errors=limits.errors,
        junk_commands=limits.junk_commands,
        command_line=limits.command_line,
        text_line=limits.text_line,
        header_size=limits.header_size,
        header_lines=limits.header_lines,
        hops=limits.hops,
        auth_failures=limits.auth_failures,
    )


async def serve(settings: Settings, on_ready: Callable[[Gateway], None]) -> None:
    """Run a gateway until SIGTERM or SIGINT; a second signal ends the drain at once. SIGHUP reloads certificates."""
    gateway = Gateway(settings)
    await gateway.start()
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    again = asyncio.Event()

    def on_signal() -> None:
        (again if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    loop.add_signal_handler(signal.SIGHUP, gateway.reload_certificates)
    on_ready(gateway)
    await asked.wait()
    logger.info("draining", extra={"grace_seconds": settings.timeouts.shutdown_grace})
    drain = loop.create_task(gateway.stop())
    second = loop.create_task(again.wait())
    await asyncio.wait({drain, second}, return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        logger.warning("second signal: stopping at once")
        drain.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drain
        await gateway.stop(immediately=True)
    second.cancel()
    await asyncio.gather(drain, return_exceptions=True)


def run(settings: Settings, *, on_ready: Callable[[Gateway], None]) -> int:
    """Run a gateway in this process on uvloop where it is installed.

    Returns:
        The exit status: 0 after a drain, 1 where it could not start.
    """
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serve(settings, on_ready))
    except OSError as error:
        logger.error("cannot start: %s", error)  # noqa: TRY400 - a traceback would hide the one line that says it
        return 1
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
