"""The gateway as one object: builds the parts from settings, starts them, drains them, and flushes telemetry.

No decision about mail is made here. The parts meet only as constructor arguments.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from otel_smtp.config import ListenerTable, Settings
from otel_smtp.forwarding.base import Forwarder
from otel_smtp.forwarding.pace import AnyLimit
from otel_smtp.forwarding.rewriting import SenderRewritingForwarder
from otel_smtp.forwarding.settings import PACE_PATIENCE_SECONDS, Strategy
from otel_smtp.forwarding.snapshots import UpstreamSnapshot
from otel_smtp.forwarding.tls import TlsFileError, UpstreamTlsContext
from otel_smtp.forwarding.upstream import CLOSE_GRACE_SECONDS, UpstreamForwarder
from otel_smtp.gateway import wiring
from otel_smtp.gateway.ports import naming_settings, with_addresses_of, with_present_addresses
from otel_smtp.gateway.status_port import Process, StatusPort, age_seconds
from otel_smtp.net import Sweep
from otel_smtp.observing import ConnectionInfo, ConnectionRecord, Endpoint, Observer, StateCallback, fan_out
from otel_smtp.server.errors import UsersFileError
from otel_smtp.server.exchanges import Authenticator, TokenVerifier
from otel_smtp.server.listener import ListenerSpec, Server
from otel_smtp.server.policy import ListenerPolicy
from otel_smtp.server.tls import CertificateError, server_context
from otel_smtp.smtp.states import TlsMode, Transition
from otel_smtp.telemetry.environment import own_instance_id
from otel_smtp.telemetry.gauges import SharedQueue
from otel_smtp.telemetry.records import SpanSink
from otel_smtp.telemetry.setup import Telemetry, TelemetryOptions, set_up
from otel_smtp.telemetry.tail import MailTail
from otel_smtp.telemetry.turns import AtEndOfTurn

if TYPE_CHECKING:
    from otel_smtp.spool.outcomes.receivers import ReceiverSettings
    from otel_smtp.spool.service import Spool
    from otel_smtp.spool.store import Store

logger: Final = logging.getLogger("otel_smtp.gateway")

# The flush at exit has its own budget, so that a dead collector cannot delay a pod's shutdown.
TELEMETRY_FLUSH_SECONDS: Final = 2.0
# How long existing connections are served as before when a successor takes over: most send one mail and leave.
NEWCOMERS_SECONDS: Final = 1.0
# How long the listeners wait for the upstream's extensions, which they offer to clients: a few round trips.
LEARN_SECONDS: Final = 0.3
# How often exported metrics catch up with open connections; OTLP exports them once a minute.
MAILS_COUNTED_SECONDS: Final = 1.0
METRICS_CATCH_UP_SECONDS: Final = 5.0

WRONG_FILES: Final = (CertificateError, UsersFileError)
"""Raised by a gateway if the settings are right, but a file or variable that they name is not."""


class Ready(NamedTuple):
    """A serving gateway's report.

    Attributes:
        addresses: of each listener by its name, with real ports.
        traces_to: where traces go, in words.
        status: the status port's address, if any.
    """

    settings: Settings
    addresses: Mapping[str, Sequence[Endpoint]]
    traces_to: str
    status: Endpoint | None


def _set_up(options: TelemetryOptions) -> Telemetry:
    """Set telemetry up; if that fails, go on as with OTEL_SDK_DISABLED: its faults stop no mail."""
    try:
        return set_up(options)
    except Exception:
        logger.exception("telemetry cannot be set up: no traces, no export, and only the metrics of the status port")
        return set_up(options, {"OTEL_SDK_DISABLED": "true"})


@contextlib.contextmanager
def _mail_unaffected(what: str) -> Iterator[None]:
    """Log an error of telemetry, and go on."""
    try:
        yield
    except Exception:
        logger.exception("%s; mail is unaffected", what)


class Gateway:
    """One gateway in one process.

    Args:
        settings: checked settings.
        observers: receive everything that happens, as the gateway's own telemetry does.
        conn_state: called at each state transition of each client connection. One that raises is logged once and
            dropped.
        span_sinks: receive each finished span, exported or not: for views in this process.
        token_verifier: verifies the bearer tokens of XOAUTH2 and OAUTHBEARER clients, if a listener's `auth` is on.
            Pass `verifies_tokens=True` to `load` if a listener has no users file.
        process: this one among several processes that listen on the same ports; None: it is the only one.

    Raises:
        CertificateError, UsersFileError: see `WRONG_FILES`.
        ValueError: a listener offers AUTH, and there is neither a users file nor a token verifier.

    Use as an asynchronous context manager, or call `start` and `stop`.

    Attributes:
        addresses: of each listener by its name, with real ports, once it is started.
        told_of_reloads: what the status port reports about reloads, as plain values.
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
        self._settings = settings = with_present_addresses(settings)
        self._redaction = redaction = wiring.redaction(settings)
        members = list(observers)
        self._status_port: StatusPort | None = None
        if settings.status.address is not None:
            self._status_port = StatusPort(self, settings.status.address, redaction, process)
            members.append(self._status_port.live)
        self._spool: Spool | None = None
        self._telemetry = _set_up(
            wiring.telemetry_options(
                settings,
                redaction,
                span_sinks=span_sinks,
                memories=[self._status_port.keep] if self._status_port is not None else [],
                open_connections=self._open_connections,
                upstream_connections=self._upstream_connections,
                spool=self._spool_counts,
                shared_queue=self._shared_queue,
                store_timings=self._store_timings,
                receivers=self._receiver_counts,
                worker=None if process is None else process.number,
            )
        )
        members[:0] = self._telemetry.observers
        if conn_state is not None:
            members.append(StateCallback(conn_state))
        # In this process a mail's spans can be read as soon as its reply has come.
        self._observer = fan_out(members, None if span_sinks else AtEndOfTurn())
        self._sweep = Sweep()
        store: Store | None = None
        if settings.delivery.mode != "direct":
            store = wiring.spool_store(settings, name=own_instance_id(None if process is None else process.number))
        self._kept_limits = wiring.kept_limits(settings)
        shared_limits: Mapping[str, AnyLimit] | None = None
        if self._kept_limits is not None:
            shared_limits = self._kept_limits.limits
        elif process is not None and process.limits is not None:
            shared_limits = process.limits.limits
        with _usable_tls_files():
            self._forwarder = UpstreamForwarder(
                [wiring.upstream_settings(upstream) for upstream in settings.upstream],
                strategy=Strategy(settings.delivery.strategy),
                hostname=settings.hostname,
                observer=self._observer,
                sweep=self._sweep,
                limits=wiring.limits(settings, store, shared_limits),
                slots=wiring.slots(
                    settings, store, process.slots.slots if process is not None and process.slots else None
                ),
                # Mail for which its client would have to wait is queued there instead.
                pace_patience_seconds=0.0 if settings.delivery.mode == "direct-then-queue" else PACE_PATIENCE_SECONDS,
                ceilings=process.ceilings.claim(process.number) if process is not None and process.ceilings else None,
                shown=lambda words: self._redaction.text(words),
            )
        if store is not None:
            self._spool = self._make_spool(store)
        forwarder: Forwarder = self._forwarder if self._spool is None else self._spool.forwarder
        if settings.rewrite.sender:
            forwarder = SenderRewritingForwarder(forwarder, settings.rewrite.sender)
        self._catching_up: asyncio.Task[None] | None = None
        self._token_verifier = token_verifier
        policies = [self._policy(settings, listener) for listener in settings.listener]
        self._server = Server(
            [
                ListenerSpec(policy, listener.address)
                for policy, listener in zip(policies, settings.listener, strict=True)
            ],
            forwarder,
            self._observer,
            inherited=None if process is None else process.sockets,
            sweep=self._sweep,
            **wiring.admission(settings),
        )
        self.addresses: dict[str, list[Endpoint]] = {}
        self.told_of_reloads: Callable[[], Mapping[str, Any]] = dict

    @property
    def ready(self) -> Ready:
        """What the gateway reports once it serves."""
        return Ready(
            self._settings,
            self.addresses,
            self._telemetry.traces_to,
            self._status_port.listening if self._status_port is not None else None,
        )

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        return self._settings

    def metrics(self, accept: str) -> tuple[bytes, str]:
        """The metrics page, and its content type, for a scraper that accepts `accept`."""
        self._observer.catch_up()
        return self._telemetry.metrics_page(accept)

    def catch_up(self) -> None:
        """Make the spans of all finished mails; call it before reading spans."""
        self._observer.catch_up()

    @property
    def mail_tail(self) -> MailTail | None:
        """The log lines of mails, for followers; None if telemetry makes none."""
        return self._telemetry.tail

    @property
    def untraced(self) -> str:
        """Which mails have no trace, in words; "" if all have one."""
        return self._telemetry.leaves_out

    @property
    def is_draining(self) -> bool:
        """Whether the gateway shuts down."""
        return self._server.is_draining

    def _open_connections(self) -> Iterator[ConnectionRecord]:
        return self._server.open_connections()

    def _upstream_connections(self) -> Iterator[tuple[str, str, int]]:
        for upstream in self._forwarder.snapshot():
            yield upstream.name, "idle", upstream.pool.idle
            yield upstream.name, "busy", upstream.pool.busy
            yield upstream.name, "opening", upstream.pool.opening

    def _spool_counts(self) -> tuple[Mapping[str, int], float, int] | None:
        if self._spool is None:
            return None
        counts = self._spool.counts
        return counts.by_state(), age_seconds(counts.oldest_arrived_at) or 0.0, counts.dead_octets

    def _shared_queue(self) -> SharedQueue | None:
        standing = None if self._spool is None else self._spool.store.standing()
        if standing is None:
            return None
        return SharedQueue(
            standing.is_housekeeper,
            standing.gateways,
            standing.away_seconds,
            standing.taken_over,
            standing.stale,
            standing.unanswered,
        )

    def _store_timings(self) -> Iterator[tuple[str, float, int]]:
        """Reading removes them."""
        timings = () if self._spool is None else self._spool.store.timings
        while timings:
            verb, seconds, items = timings.popleft()
            yield verb.value, seconds, items

    def _receiver_counts(self) -> Iterator[tuple[str, Mapping[str, int], int, float]]:
        if self._spool is not None:
            for name, figures, pending, oldest in self._spool.receivers():
                yield name, figures.by_result(), pending, age_seconds(oldest) or 0.0

    def can_reach_an_upstream(self) -> bool:
        """Whether an upstream can be reached, as far as known. Stale knowledge is renewed in the background."""
        self._forwarder.probe_if_stale()
        return self._forwarder.is_reachable

    def upstreams(self) -> Sequence[UpstreamSnapshot]:
        """The upstreams at this moment, in the order of preference."""
        return self._forwarder.snapshot()

    async def start(self, *, before_listening: Callable[[], None] = lambda: None) -> None:
        """Bind the listeners and accept connections at `addresses`.

        Args:
            before_listening: called when all but the ports is prepared, before the first client can connect.

        Raises:
            CannotListen: an address cannot be listened at.
            SpoolError: the spool cannot be used.
        """
        if self._spool is not None:
            await self._spool.start(None if self._kept_limits is None else self._kept_limits.open)
        try:
            await self._forwarder.learn(wait_seconds=LEARN_SECONDS)
            before_listening()
            with naming_settings(self._settings):
                self.addresses = await self._server.start()
                if self._status_port is not None:
                    # Last, as it imports a web server. Clients get their greeting meanwhile.
                    await self._status_port.start(is_required="status.address" in self._settings.origins)
        except BaseException:
            await self._server.drain(0.0)
            if self._spool is not None:
                await self._spool.stop(grace_seconds=0)
            await self._forwarder.close(grace_seconds=0)
            raise
        with _mail_unaffected("start of telemetry failed"):
            self._telemetry.start()
        self._catching_up = asyncio.get_running_loop().create_task(self._catch_up())

    async def stop(self, *, immediately: bool = False) -> None:
        """Drain: stop accepting, 421 to idle connections, a grace period for open transactions, close the pool, flush.

        Args:
            immediately: without a grace period.
        """
        loop = asyncio.get_running_loop()
        # One grace period for all: deliveries whose client has left get what the drain leaves of it. Together with the
        # flush it stays below the 30 s after which Kubernetes kills a pod.
        ends = loop.time() + (0.0 if immediately else self._settings.timeouts.shutdown_grace)
        await self._server.drain(max(0.0, ends - loop.time()))
        if self._spool is not None:
            await self._spool.stop(grace_seconds=max(0.0, ends - loop.time()), before_leaving=self._leave_spool)
        await self._forwarder.close(grace_seconds=min(CLOSE_GRACE_SECONDS, max(0.0, ends - loop.time())))
        if self._catching_up is not None:
            self._catching_up.cancel()
        if self._status_port is not None:
            await self._status_port.stop()
        self._observer.catch_up()
        with _mail_unaffected("end of telemetry failed"):
            self._telemetry.finish()
            await asyncio.to_thread(self._telemetry.flush_and_shutdown, TELEMETRY_FLUSH_SECONDS)

    async def _leave_spool(self) -> None:
        """Called when no attempt is under way any more, and the spool is still ours."""
        await self._forwarder.give_slots_back()
        if self._kept_limits is not None:
            self._kept_limits.close()

    async def leave_ports(self) -> None:
        """Stop listening, on the status port first, and continue all else for a second or two.

        For a process whose successor listens on the same ports. If both kept the status port during the drain, each
        would answer some of the requests: probes would take a healthy gateway for one that shuts down, and each change
        from one process's counters to the other's would look like a counter reset. And a client that has just connected
        gets its mail through; the drain would answer 421 before it can say anything.
        """
        if self._status_port is not None:
            await self._status_port.stop()
        await self._server.leave_ports()
        await asyncio.sleep(NEWCOMERS_SECONDS)

    async def _catch_up(self) -> None:
        """Count mails soon after their end, and the work of long-lived connections while they are open."""
        has_failed = False
        while True:
            try:
                for _ in range(round(METRICS_CATCH_UP_SECONDS / MAILS_COUNTED_SECONDS)):
                    await asyncio.sleep(MAILS_COUNTED_SECONDS)
                    self._telemetry.count_mails()
                for _ in self._telemetry.catching_up():
                    await asyncio.sleep(0)
            except Exception:
                if not has_failed:
                    has_failed = True
                    logger.exception("metrics cannot catch up; mail is unaffected")
                await asyncio.sleep(MAILS_COUNTED_SECONDS)

    def reload(self, settings: Settings) -> None:
        """Apply new settings without dropping a connection; certificates and users are read again in any case.

        Open connections keep the policy under which they were accepted, and transactions their upstreams.

        Args:
            settings: checked settings. Settings that need a restart according to `config.changing` are left unchanged.

        Raises:
            CertificateError, UsersFileError: see `WRONG_FILES`. Then nothing has changed.
        """
        settings = with_addresses_of(settings, self._settings)
        redaction = wiring.redaction(settings)
        policies = [self._policy(settings, listener) for listener in settings.listener]
        upstreams = [wiring.upstream_settings(upstream) for upstream in settings.upstream]
        receivers = _usable(wiring.receivers(settings))
        unchanged = {upstream.name for upstream in settings.upstream if upstream in self._settings.upstream}
        strategy = Strategy(settings.delivery.strategy)
        with _usable_tls_files():
            relay_by_them = self._forwarder.replacement(upstreams, strategy=strategy, unchanged=unchanged)
        # Here nothing can fail any more.
        relay_by_them()
        self._server.hold_to(policies, **wiring.admission(settings))
        if self._spool is not None:
            self._spool.report_to(receivers)
        telemetry = settings.telemetry
        inbound = wiring.inbound_policies(settings)
        self._telemetry.show(redaction, inbound, probes=telemetry.probes, with_message_id=telemetry.message_id)
        if self._status_port is not None:
            self._status_port.show(redaction)
        self._redaction = redaction
        self._settings = settings

    def heed_log_level(self) -> None:
        """Switch the access log on or off according to the log's current level."""
        self._telemetry.heed_log_level()

    async def __aenter__(self) -> "Gateway":
        await self.start()
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    def _make_spool(self, store: "Store") -> "Spool":
        from otel_smtp.spool.service import Spool

        relay = self._forwarder.for_spool()
        direct = self._forwarder if self._settings.delivery.mode == "direct-then-queue" else None
        spool = Spool(wiring.spool_settings(self._settings), store, relay, direct, self._observer)
        spool.report_to(_usable(wiring.receivers(self._settings)))
        return spool

    @property
    def spool(self) -> "Spool | None":
        """The durable queue; None in mode direct."""
        return self._spool

    def _policy(self, settings: Settings, listener: ListenerTable) -> ListenerPolicy:
        tls_context: ssl.SSLContext | None = None
        if listener.tls is not TlsMode.OFF:
            assert listener.tls_cert is not None
            assert listener.tls_key is not None
            tls_context = server_context(listener.tls_cert, listener.tls_key)
        authenticator: Authenticator | None = None
        if listener.auth != "off":
            users = None
            if listener.auth_users_file is not None:
                from otel_smtp.server.users import load_users  # late: it imports two password libraries

                users = load_users(listener.auth_users_file)
            if users is None and self._token_verifier is None:
                raise ValueError(f"listener {listener.name!r} has AUTH, but neither a users file nor a token verifier")
            authenticator = Authenticator(users, token_verifier=self._token_verifier)
        return wiring.listener_policy(settings, listener, tls_context=tls_context, authenticator=authenticator)


@contextlib.contextmanager
def _usable_tls_files(whose: str = "an upstream") -> Iterator[None]:
    """Report TLS files that cannot be used in the same way as those of a listener."""
    try:
        yield
    except TlsFileError as error:
        raise CertificateError(f"cannot use the TLS files of {whose}: {error}") from error


def _usable(receivers: "Sequence[ReceiverSettings]") -> "Sequence[ReceiverSettings]":
    """The receivers of outcomes, if their authorities can be used: the first outcome may be hours away."""
    for receiver in receivers:
        if receiver.ca_file is not None:
            with _usable_tls_files(f"notify {receiver.name}"):
                UpstreamTlsContext.create(ca_file=receiver.ca_file)
    return receivers
