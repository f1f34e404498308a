"""The composition root: builds the gateway out of its rooms, starts it, drains it, and flushes what it knows.

There is no `if` about mail here. Adapters meet only as constructor arguments.
"""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from otel_smtp import __version__
from otel_smtp.config import Listener, Settings, Upstream
from otel_smtp.forwarding.breaker import BreakerState
from otel_smtp.forwarding.oauth import OAuthSettings, OAuthTokens
from otel_smtp.forwarding.settings import (
    Credentials,
    PoolLimits,
    ReplyLimits,
    Strategy,
    Timeouts,
    TracePolicy,
    UpstreamSettings,
)
from otel_smtp.forwarding.upstream import CLOSE_GRACE_SECONDS, UpstreamForwarder, UpstreamSnapshot
from otel_smtp.gateway.systemd import ServiceManager
from otel_smtp.gateway.workers import AT_ONCE, REPLACED, Supervisor, reserve
from otel_smtp.net import is_accept_exhausted
from otel_smtp.observing import ConnectionInfo, Endpoint, Observer, StateCallback, fan_out
from otel_smtp.server.connection import ListenerPolicy, ServerTimeouts
from otel_smtp.server.listener import Listening, Server
from otel_smtp.server.tls import CertificateError, ServerTls
from otel_smtp.server.users import Authenticator, TokenVerifier, UsersFileError, load_users
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.server import ServerLimits, ServerPolicy
from otel_smtp.smtp.states import TlsMode, Transition
from otel_smtp.spool.messages import DeliveryState, Shown, SpoolError
from otel_smtp.status.live import LiveView
from otel_smtp.status.traces import RecentTraces
from otel_smtp.status.views import QueuedMessage, QueueView, UpstreamView
from otel_smtp.telemetry.environment import TelemetrySettingError
from otel_smtp.telemetry.propagation import InboundPolicy
from otel_smtp.telemetry.records import SpanRecord, SpanSink
from otel_smtp.telemetry.redaction import Addresses, ClientIp, Redaction
from otel_smtp.telemetry.setup import TelemetryOptions, describe_destination, set_up
from otel_smtp.telemetry.state_events import StateEvents

if TYPE_CHECKING:
    from otel_smtp.spool.service import Spool
    from otel_smtp.status.server import StatusServer

logger: Final = logging.getLogger("otel_smtp.gateway.app")

# telemetry.md: the flush at exit has a budget of its own, so that a dead collector cannot hold a pod's shutdown.
TELEMETRY_FLUSH_SECONDS: Final = 2.0
# How often old spans of living connections are looked for; segment_age is minutes.
SEGMENT_ROTATION_SECONDS: Final = 5.0
# asyncio alone wrote over a thousand tracebacks in five seconds when descriptors ran out.
EXHAUSTION_LOG_SECONDS: Final = 10.0

WRONG_FILES: Final = (TelemetrySettingError, CertificateError, UsersFileError)
"""What a gateway raises when it is made of settings that are right and name what is not."""


class Process(NamedTuple):
    """One of the processes of a gateway.

    Attributes:
        number: its own.
        status_ports: where each process, by its number, tells its status on the loopback; the first's is not used: it
            has the operator's status port.
        token: what they answer to.
    """

    number: int
    status_ports: Sequence[int]
    token: str


class Ready(NamedTuple):
    """What is told when the gateway serves.

    Attributes:
        addresses: of each listener by its name, with real ports.
        traces_to: where traces go, for people.
        status: where the status port listens; None: nowhere.
    """

    settings: Settings
    addresses: Mapping[str, Sequence[Endpoint]]
    traces_to: str
    status: Endpoint | None


class Gateway:
    """One gateway in one process.

    Args:
        settings: checked settings.
        observers: told of everything that happens, beside the gateway's own telemetry.
        conn_state: called at each state transition of each client connection. One that raises is logged once and
            dropped.
        span_sinks: given each finished span, exported or not: for views in this process.
        token_verifier: judges the bearer tokens of XOAUTH2 and OAUTHBEARER clients, where a listener's `auth` is on.
            `load` has to know of it (`verifies_tokens`) where a listener has no users file.
        process: other processes listen on the same ports; which of them this one is.

    Raises:
        TelemetrySettingError, CertificateError, UsersFileError: see `WRONG_FILES`.
        ValueError: a listener asks for AUTH, and there is neither a users file nor a token verifier.

    Use as an asynchronous context manager, or call `start` and `stop`.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        observers: Sequence[Observer] = (),
        conn_state: Callable[[ConnectionInfo, Transition], None] | None = None,
        span_sinks: Sequence[SpanSink] = (),
        token_verifier: TokenVerifier | None = None,
        process: Process | None = None,
    ) -> None:
        self._settings = settings = _on_present_addresses(settings)
        redaction = _redaction(settings)
        members = list(observers)
        self._status_port: _StatusPort | None = None
        if settings.status.address is not None:
            self._status_port = _StatusPort(self, settings.status.address, redaction, process)
            members.append(self._status_port.live)
            span_sinks = [*span_sinks, self._status_port]
        self._spool: Spool | None = None
        self._telemetry = set_up(
            _telemetry_options(settings, redaction, span_sinks, self._upstream_connections, self._spool_counts)
        )
        members.insert(0, self._telemetry.observer)
        if conn_state is not None:
            members.append(StateCallback(conn_state))
        self._observer = fan_out(members)
        self._forwarder = UpstreamForwarder(
            [upstream_settings(upstream) for upstream in settings.upstream],
            strategy=Strategy(settings.delivery.strategy),
            hostname=settings.hostname,
        )
        self._spool = self._make_spool()
        self._rotation: asyncio.Task[None] | None = None
        self._tls: list[ServerTls] = []
        self._token_verifier = token_verifier
        self._server = Server(
            [self._listening(listener) for listener in settings.listener],
            self._forwarder if self._spool is None else self._spool.forwarder,
            self._observer,
            connections=settings.limits.connections,
            connections_per_client=settings.limits.connections_per_client,
            stress_percent=settings.limits.stress,
            auth_failures_per_minute=settings.limits.auth_failures_per_minute,
            reuse_port=process is not None,
        )
        self.addresses: dict[str, list[Endpoint]] = {}

    @property
    def ready(self) -> Ready:
        """What is told when the gateway serves."""
        return Ready(
            self._settings,
            self.addresses,
            describe_destination(os.environ),
            self._status_port.listening if self._status_port is not None else None,
        )

    @property
    def settings(self) -> Settings:
        """The settings that the gateway runs with."""
        return self._settings

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """The metrics page, and its content type, for a scraper that accepts `accept`."""
        return self._telemetry.metrics_page(accept)

    @property
    def is_draining(self) -> bool:
        """Whether the gateway shuts down."""
        return self._server.is_draining

    def _upstream_connections(self) -> Iterator[tuple[str, str, int]]:
        for upstream in self._forwarder.snapshot():
            yield upstream.name, "idle", upstream.pool.idle
            yield upstream.name, "busy", upstream.pool.busy
            yield upstream.name, "opening", upstream.pool.opening

    def _spool_counts(self) -> tuple[Mapping[str, int], float] | None:
        if self._spool is None:
            return None
        counts = self._spool.counts
        return counts.by_state(), _age(counts.oldest_arrived_at) or 0.0

    def can_reach_an_upstream(self) -> bool:
        """Whether an upstream can be reached, as far as is known; what is long ago is looked at anew meanwhile."""
        self._forwarder.look_if_stale()
        return self._forwarder.is_reachable

    def upstreams(self) -> Sequence[UpstreamSnapshot]:
        """The upstreams at this moment, in the order of preference."""
        return self._forwarder.snapshot()

    async def start(self) -> None:
        """Bind the listeners and accept connections; `addresses` tells where.

        Raises:
            OSError: an address cannot be bound.
            SpoolError: the spool cannot be used.
        """
        if self._spool is not None:
            await self._spool.start()
        try:
            self.addresses = await self._server.start()
        except BaseException:
            if self._spool is not None:
                await self._spool.stop(grace_seconds=0)
            raise
        if self._status_port is not None:
            # Last: a cold start is measured to the first greeting, and this imports a web server.
            await self._status_port.start(is_required="status.address" in self._settings.origins)
        self._telemetry.start()
        self._rotation = asyncio.get_running_loop().create_task(self._rotate_segments())

    async def stop(self, *, immediately: bool = False) -> None:
        """Drain: stop accepting, 421 to idle connections, the grace for open transactions, close the pool, flush.

        Args:
            immediately: without any grace.
        """
        loop = asyncio.get_running_loop()
        # One grace for all: what the drain leaves of it, deliveries have whose client is gone. Together with the flush
        # it stays below the 30 s after which Kubernetes kills.
        ends = loop.time() + (0.0 if immediately else self._settings.timeouts.shutdown_grace)
        await self._server.drain(max(0.0, ends - loop.time()))
        if self._spool is not None:
            await self._spool.stop(grace_seconds=max(0.0, ends - loop.time()))
        await self._forwarder.close(grace_seconds=min(CLOSE_GRACE_SECONDS, max(0.0, ends - loop.time())))
        if self._rotation is not None:
            self._rotation.cancel()
        if self._status_port is not None:
            await self._status_port.stop()
        await asyncio.to_thread(self._telemetry.flush_and_shutdown, TELEMETRY_FLUSH_SECONDS)

    async def leave_status_port(self) -> None:
        """Stop listening on the status port, within about a second, and go on with everything else.

        For a process whose successor listens on the same port. Shared for as long as a drain takes, the port would
        answer for either by turns: probes would take a healthy gateway for one that shuts down, and every change from
        one process's counters to the other's would be a reset that never was.
        """
        if self._status_port is not None:
            await self._status_port.stop()

    async def _rotate_segments(self) -> None:
        """Let connections that live long be seen while they live: their spans end and begin anew."""
        while True:
            await asyncio.sleep(SEGMENT_ROTATION_SECONDS)
            self._telemetry.rotate()

    def reload_certificates(self) -> None:
        """Read the certificates again; open connections keep theirs, and a broken file keeps the old one in use."""
        for tls in self._tls:
            tls.reload()

    async def __aenter__(self) -> "Gateway":
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    def _make_spool(self) -> "Spool | None":
        settings = self._settings
        mode, spool = settings.delivery.mode, settings.spool
        if mode == "direct":
            return None
        from otel_smtp.spool.embedded import EmbeddedStore, control_path
        from otel_smtp.spool.schedule import Schedule
        from otel_smtp.spool.service import Spool, SpoolSettings

        assert spool.directory is not None
        wanted = SpoolSettings(
            control_path=control_path(spool.directory),
            schedule=Schedule(spool.retry, max_age_seconds=spool.max_age, warn_after_seconds=spool.warn_after),
            bounce=spool.bounce,
            hostname=settings.hostname,
        )
        store = EmbeddedStore(spool.directory, least_free_octets=settings.limits.message_size * 3 // 2)
        relay = self._forwarder.for_spool()
        direct = self._forwarder if mode == "direct-then-queue" else None
        return Spool(wanted, store, relay, direct, self._observer)

    @property
    def spool(self) -> "Spool | None":
        """The durable queue; None in mode direct."""
        return self._spool

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
        if listener.auth != "off":
            users = load_users(listener.auth_users_file) if listener.auth_users_file is not None else None
            if users is None and self._token_verifier is None:
                raise ValueError(f"listener {listener.name!r} has AUTH, but neither a users file nor a token verifier")
            authenticator = Authenticator(users, token_verifier=self._token_verifier)
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
                    command_under_stress=timeouts.command_under_stress,
                    data=timeouts.data,
                    tls_handshake=timeouts.tls_handshake,
                    session=timeouts.session,
                    octets_per_second=settings.limits.octets_per_second,
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
        auth_line=limits.auth_line,
        text_line=limits.text_line,
        header_size=limits.header_size,
        header_lines=limits.header_lines,
        hops=limits.hops,
        auth_failures=limits.auth_failures,
    )


class _StatusPort:
    """The status page and probes of one gateway: what they show, and the server, imported when it starts."""

    def __init__(
        self, gateway: Gateway, address: Endpoint, redaction: Redaction, process: Process | None = None
    ) -> None:
        self._gateway = gateway
        self._process = process
        self._address = address
        self._redaction = redaction
        self._traces = RecentTraces()
        self._server: StatusServer | None = None
        self.live = LiveView(shown_host=redaction.ip, shown_name=redaction.host_name)
        self.listening: Endpoint | None = None

    def take(self, record: SpanRecord) -> None:
        """Keep a finished span for the page."""
        self._traces.add(record)

    async def start(self, *, is_required: bool) -> None:
        """Listen.

        Args:
            is_required: the operator asked for this very address; else mail goes on without a status port where its
                default is taken, by another gateway say.

        Raises:
            OSError: the address cannot be bound, and it is required.
        """
        from otel_smtp.status.server import LOOPBACK, Network, StatusServer
        from otel_smtp.status.siblings import Siblings

        gateway, process = self._gateway, self._process
        siblings: Siblings | None = None
        address, token = self._address, ""
        allow: Sequence[Network] = gateway.settings.status.allow
        if process is not None and process.number == 0:
            siblings = Siblings(0, dict(enumerate(process.status_ports[1:], start=1)), process.token)
        elif process is not None:
            is_required = False
            address, allow = Endpoint("127.0.0.1", process.status_ports[process.number]), LOOPBACK
            token = process.token
        self._server = StatusServer(
            address,
            live=self.live,
            traces=self._traces,
            checks={"draining": self._draining, **self._delivery_checks()},
            metrics=gateway.metrics,
            upstreams=self._upstreams,
            queue=self._queue if gateway.spool is not None else None,
            trace_url=gateway.settings.status.trace_url,
            allow=allow,
            about=_about(gateway.settings, gateway.ready.traces_to),
            siblings=siblings,
            token=token,
            reuse_port=process is not None,
        )
        try:
            self.listening = await self._server.start()
        except OSError as error:
            if is_required:
                raise
            logger.warning("no status port: %s is taken", address, extra={"error": str(error)})

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None and self.listening is not None:
            await self._server.stop()

    def _draining(self) -> str | None:
        return "shutting down" if self._gateway.is_draining else None

    def _no_upstream(self) -> str | None:
        return None if self._gateway.can_reach_an_upstream() else "no upstream can be reached"

    async def _queue(self) -> QueueView:
        spool = self._gateway.spool
        assert spool is not None
        now = time.time()
        return QueueView(
            counts=spool.counts.by_state(),
            oldest_age_seconds=_age(spool.counts.oldest_arrived_at),
            messages=[_queued(message, now, self._redaction) for message in spool.oldest],
        )

    def _delivery_checks(self) -> Mapping[str, Callable[[], str | None]]:
        """What keeps mail from being taken: with a queue, its own state; an upstream that is away is what it is for."""
        spool = self._gateway.spool
        return {"upstream": self._no_upstream} if spool is None else {"spool": spool.problem}

    def _upstreams(self) -> Sequence[UpstreamView]:
        tls = {upstream.name: str(upstream.url.tls) for upstream in self._gateway.settings.upstream}
        words = {BreakerState.PROBING: "half-open"}
        return [
            UpstreamView(
                name=snapshot.name,
                address=str(snapshot.endpoint),
                tls=tls[snapshot.name],
                idle=snapshot.pool.idle,
                busy=snapshot.pool.busy + snapshot.pool.opening,
                limit=snapshot.pool.most,
                waiting=snapshot.pool.waiting,
                breaker=words.get(snapshot.pool.breaker, str(snapshot.pool.breaker)),
                last_success_seconds=snapshot.last_success_seconds,
                last_failure_seconds=snapshot.last_failure_seconds,
                last_failure=snapshot.last_failure,
            )
            for snapshot in self._gateway.upstreams()
        ]


def _age(since: float | None) -> float | None:
    return None if since is None else max(0.0, time.time() - since)


def _queued(message: Shown, now: float, redaction: Redaction) -> QueuedMessage:
    """A queued message for the page: domains, no addresses."""
    replies = [last for _, _, last in message.recipients if last]
    trace = message.carrier.get("traceparent", "").split("-")
    is_deferred = message.state is DeliveryState.READY and message.next_attempt_at > now
    return QueuedMessage(
        spool_id=message.id,
        state="deferred" if is_deferred else message.state.value,
        age_seconds=max(0.0, now - message.arrived_at),
        attempts=message.attempts,
        recipients=len(message.recipients),
        domains=redaction.domains([Recipient(address) for address, _, _ in message.recipients]) or (),
        next_attempt_seconds=(
            max(0.0, message.next_attempt_at - now) if message.state is DeliveryState.READY else None
        ),
        last_reply=" ".join(replies[0].split()[:2]) if replies else None,
        trace_id=trace[1] if len(trace) == 4 else None,
    )


def _about(settings: Settings, traces_to: str) -> Mapping[str, str]:
    """What the page's head says."""
    about = {"hostname": settings.hostname, "version": __version__, "traces to": traces_to}
    if settings.workers > 1:
        about["processes"] = str(settings.workers)
    return about


def _redaction(settings: Settings) -> Redaction:
    telemetry = settings.telemetry
    key = telemetry.addresses_hash_key
    return Redaction(
        addresses=Addresses(telemetry.addresses),
        client_ip=ClientIp(telemetry.client_ip),
        hash_key=key.reveal().encode() if key is not None else b"",
    )


def _telemetry_options(
    settings: Settings,
    redaction: Redaction,
    span_sinks: Sequence[SpanSink],
    upstream_connections: Callable[[], Iterator[tuple[str, str, int]]],
    spool: Callable[[], tuple[Mapping[str, int], float] | None],
) -> TelemetryOptions:
    telemetry = settings.telemetry
    return TelemetryOptions(
        version=__version__,
        redaction=redaction,
        policies={listener.name: InboundPolicy(listener.trace_context) for listener in settings.listener},
        state_events=StateEvents(telemetry.state_events),
        segment_events=telemetry.segment_events,
        segment_age_seconds=telemetry.segment_age,
        probes=telemetry.probes,
        with_message_id=telemetry.message_id,
        listeners=span_sinks,
        upstream_connections=upstream_connections,
        spool=spool,
    )


def _tokens(upstream: Upstream) -> OAuthTokens | None:
    if not upstream.token_url:
        return None
    secret, refresh = upstream.client_secret, upstream.refresh_token
    return OAuthTokens(
        OAuthSettings(
            upstream.token_url,
            upstream.client_id,
            client_secret=secret.reveal() if secret is not None else "",
            refresh_token=refresh.reveal() if refresh is not None else "",
            scope=upstream.scope,
        )
    )


def upstream_settings(upstream: Upstream) -> UpstreamSettings:
    """An upstream of the settings, in the forwarding's own words."""
    credentials: Credentials | None = None
    if upstream.username and upstream.auth != "off":
        credentials = Credentials(
            upstream.username,
            upstream.password.reveal() if upstream.password is not None else "",
            _tokens(upstream),
        )
    timeout = upstream.timeout
    assert upstream.trace_context is not None
    return UpstreamSettings(
        name=upstream.name,
        host=upstream.url.endpoint.host,
        port=upstream.url.endpoint.port,
        is_lmtp=upstream.url.protocol == "lmtp",
        tls=upstream.url.tls,
        credentials=credentials,
        auth=upstream.auth,
        ca_file=str(upstream.ca_file) if upstream.ca_file is not None else None,
        certificate_file=str(upstream.tls_cert) if upstream.tls_cert is not None else None,
        key_file=str(upstream.tls_key) if upstream.tls_key is not None else None,
        server_name=upstream.server_name or None,
        limits=PoolLimits(
            connections=upstream.connections,
            messages=upstream.messages_per_connection,
            age_seconds=upstream.connection_age,
            idle_seconds=upstream.connection_idle,
        ),
        reply_limits=ReplyLimits(upstream.reply_line, upstream.reply_lines),
        timeouts=Timeouts(
            connect=timeout.connect,
            greeting=timeout.greeting,
            command=timeout.command,
            data=timeout.data,
            block=timeout.block,
            reply=timeout.reply,
        ),
        senders=upstream.senders,
        recipients=upstream.recipients,
        trace_context=TracePolicy(upstream.trace_context),
    )


class _LoopFaults:
    """The event loop's exception handler: accept that runs out of descriptors is one log line in a while, not a flood.

    The loop itself goes on: it tries again after a second, and clients wait in the kernel's queue.
    """

    def __init__(self) -> None:
        self._quiet_until = 0.0
        self._count = 0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not is_accept_exhausted(context):
            loop.default_exception_handler(context)
            return
        self._count += 1
        if loop.time() >= self._quiet_until:
            logger.error("no file descriptors left to accept connections", extra={"times": self._count})
            self._quiet_until = loop.time() + EXHAUSTION_LOG_SECONDS
            self._count = 0


OnReady = Callable[[Ready], None]


def leave_out_of_garbage_collection() -> None:
    """Let Python's collector of cyclic garbage look no more at what start-up made.

    That is some hundred thousand objects that live as long as the process: to look through them stopped all mail for 37
    ms each time; without them it takes 4. They are not looked through a last time either, since the first client may be
    waiting for its greeting. For a process that is a gateway; whoever uses the library decides for themselves.
    """
    gc.freeze()


async def serve(
    settings: Settings,
    on_ready: OnReady,
    *,
    process: Process | None = None,
    at_once: signal.Signals | None = None,
    replaced: signal.Signals | None = None,
) -> None:
    """Run a gateway until SIGTERM or SIGINT, and its drain. SIGHUP reloads certificates.

    Args:
        on_ready: called when the gateway serves.
        process: other processes listen on the same ports; which of them this one is.
        at_once: the signal that ends the drain at once; None: a second SIGTERM or SIGINT.
        replaced: the signal that begins the drain and says that a successor has the status port; None: there is none.

    Raises:
        OSError: an address cannot be bound.
    """
    gateway = Gateway(settings, process=process)
    await gateway.start()
    leave_out_of_garbage_collection()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_LoopFaults())
    asked = asyncio.Event()
    again = asyncio.Event()
    has_successor = asyncio.Event()

    def on_signal() -> None:
        if asked.is_set() and at_once is None:
            again.set()
        asked.set()

    def on_at_once() -> None:
        asked.set()
        again.set()

    def on_replaced() -> None:
        has_successor.set()
        asked.set()

    async def drained() -> None:
        if has_successor.is_set():
            await gateway.leave_status_port()  # first: it would tell of a drain that is its own affair
        await gateway.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    if at_once is not None:
        loop.add_signal_handler(at_once, on_at_once)
    if replaced is not None:
        loop.add_signal_handler(replaced, on_replaced)
    loop.add_signal_handler(signal.SIGHUP, gateway.reload_certificates)
    on_ready(gateway.ready)
    manager = ServiceManager(os.environ.get("NOTIFY_SOCKET"))
    manager.ready(f"relaying, pid {os.getpid()}")
    await asked.wait()
    manager.stopping(settings.timeouts.shutdown_grace)
    logger.info("draining", extra={"grace_seconds": settings.timeouts.shutdown_grace})
    drain = loop.create_task(drained())
    second = loop.create_task(again.wait())
    await asyncio.wait({drain, second}, return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        logger.warning("told again: stopping at once")
        drain.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drain
        await gateway.stop(immediately=True)
    second.cancel()
    await asyncio.gather(drain, return_exceptions=True)


def run(settings: Settings, *, on_ready: OnReady) -> int:
    """Run the gateway, on uvloop where it is installed, in as many processes as the settings say.

    Returns:
        The exit status: 0 after a drain, 1 where it could not start, 2 where what the settings name is wrong.
    """
    if settings.workers == 1:
        return _run_here(serve(settings, on_ready))
    settings = _on_present_addresses(settings)
    held: list[socket.socket] = []
    try:
        settings = _with_fixed_ports(_with_status_port(settings, held), held)
        status_ports = _status_ports(settings, held)
    except OSError as error:
        for sock in held:
            sock.close()
        logger.error("cannot start: %s", error)
        return 1
    token = secrets.token_hex()

    def work(number: int, announce: Callable[[], None]) -> int:
        # The first has the operator's status port, and asks the others for what they have to tell.
        process = Process(number, status_ports, token)
        serving = serve(settings, lambda _: announce(), process=process, at_once=AT_ONCE, replaced=REPLACED)
        return _run_here(serving)

    addresses = {listener.name: listener.address for listener in settings.listener}
    ready = Ready(settings, addresses, describe_destination(os.environ), settings.status.address)
    try:
        return Supervisor(settings.workers, work, on_ready=lambda: on_ready(ready)).run()
    finally:
        for sock in held:
            sock.close()


def _on_present_addresses(settings: Settings) -> Settings:
    """The default listens on both loopback addresses; a machine without IPv6, as many containers are, has one of them.

    Addresses that somebody asked for are left as they are: there, a missing one is an error.
    """
    if _has_ipv6_loopback():
        return settings
    listeners = tuple(
        listener
        if f"listener.{index}.address" in settings.origins
        else msgspec.structs.replace(listener, address=tuple(each for each in listener.address if each.host != "::1"))
        for index, listener in enumerate(settings.listener)
    )
    return msgspec.structs.replace(settings, listener=listeners)


def _has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _run_here(serving: Coroutine[Any, Any, None]) -> int:
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(serving)
    except WRONG_FILES as error:
        logger.error("cannot start: %s", error)
        return 2
    except (OSError, SpoolError) as error:
        logger.error("cannot start: %s", error)
        return 1
    return 0


def _with_fixed_ports(settings: Settings, held: list[socket.socket]) -> Settings:
    """The settings with every port 0 replaced by one that all workers share.

    Args:
        held: gets the sockets that hold those ports.
    """
    listeners: list[Listener] = []
    for listener in settings.listener:
        addresses, sockets = reserve(listener.address)
        held += sockets
        listeners.append(msgspec.structs.replace(listener, address=tuple(addresses)))
    return msgspec.structs.replace(settings, listener=tuple(listeners))


def _with_status_port(settings: Settings, held: list[socket.socket]) -> Settings:
    """The settings with a status port that one worker after the other can have; without one where it is taken.

    Raises:
        OSError: it is taken, and the operator asked for it. See `_with_fixed_ports` for `held`.
    """
    address = settings.status.address
    if address is None:
        return settings
    try:
        # Alone first: a port that is to be shared with whoever asks would be shared with another gateway, too.
        with _bound(address, socket.SO_REUSEADDR) as alone:
            address = Endpoint(address.host, alone.getsockname()[1])
        held.append(_bound(address, socket.SO_REUSEADDR, socket.SO_REUSEPORT))
    except OSError as error:
        if "status.address" in settings.origins:
            raise
        logger.warning("no status port: %s is taken", address, extra={"error": str(error)})
        address = None
    return msgspec.structs.replace(settings, status=msgspec.structs.replace(settings.status, address=address))


def _bound(address: Endpoint, *options: int) -> socket.socket:
    family, kind, protocol, _, name = socket.getaddrinfo(
        address.host, address.port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        for option in options:
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        sock.bind(name)
    except OSError:
        sock.close()
        raise
    return sock


def _status_ports(settings: Settings, held: list[socket.socket]) -> Sequence[int]:
    """A loopback port for each worker's status; none where nobody is to ask. `held` as above."""
    if settings.status.address is None:
        return ()
    addresses, sockets = reserve([Endpoint("127.0.0.1", 0)] * settings.workers)
    held += sockets
    return [address.port for address in addresses if address.port is not None]


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
