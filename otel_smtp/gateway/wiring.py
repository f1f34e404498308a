"""Makes each package's values from the settings: the one place that knows both.

Each function takes settings checked by `config`, and returns one package's value object. Nothing is opened or started
here, and no file is read. All defaults are in `config.settings`; tests/gateway/test_wiring.py compares those that a
package repeats, for use without settings.
"""

import dataclasses
import ssl
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, cast

from otel_smtp import __version__
from otel_smtp.config import ListenerTable, Settings, UpstreamTable
from otel_smtp.config.settings import SpoolTable, Table
from otel_smtp.config.settings import TelemetryTable as TelemetrySettings
from otel_smtp.forwarding.global_limits import GlobalLimit
from otel_smtp.forwarding.global_slots import GlobalSlots
from otel_smtp.forwarding.limits import LimitSettings, limits_of
from otel_smtp.forwarding.oauth import OAuthSettings, OAuthTokens
from otel_smtp.forwarding.pace import AnyLimit
from otel_smtp.forwarding.settings import (
    Credentials,
    PoolLimits,
    ReplyLimits,
    Timeouts,
    TracePolicy,
    UpstreamSettings,
)
from otel_smtp.forwarding.slots import IDLE_SECONDS, TURN_MESSAGES, AnySlots, SlotSettings, slots_of
from otel_smtp.server.exchanges import Authenticator
from otel_smtp.server.policy import ListenerPolicy, Segments, ServerTimeouts
from otel_smtp.smtp.policy import ServerLimits, ServerPolicy
from otel_smtp.smtp.sasl import MECHANISMS
from otel_smtp.telemetry.gauges import OpenConnections, ReceiverCounts, SharedQueueFigures, StoreTimings
from otel_smtp.telemetry.keeping import Keep as KeepReason
from otel_smtp.telemetry.keeping import Keeping
from otel_smtp.telemetry.propagation import InboundPolicy
from otel_smtp.telemetry.records import SpanSink
from otel_smtp.telemetry.redaction import Addresses, ClientIp, Redaction
from otel_smtp.telemetry.setup import TelemetryOptions
from otel_smtp.telemetry.state_events import StateEvents
from otel_smtp.telemetry.tracing import Keep

if TYPE_CHECKING:
    from otel_smtp.gateway.kept_limits import KeptLimits
    from otel_smtp.spool.outcomes.receivers import ReceiverSettings
    from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
    from otel_smtp.spool.service import SpoolSettings
    from otel_smtp.spool.store import Store

T = TypeVar("T")


def listener_policy(
    settings: Settings,
    listener: ListenerTable,
    *,
    tls_context: ssl.SSLContext | None,
    authenticator: Authenticator | None,
) -> ListenerPolicy:
    """A listener's policy.

    Args:
        tls_context: for its handshakes; None without TLS.
        authenticator: verifies logins; None without AUTH.
    """
    return ListenerPolicy(
        name=listener.name,
        protocol=ServerPolicy(
            hostname=settings.hostname,
            is_lmtp=listener.protocol == "lmtp",
            tls_mode=listener.tls,
            tls_required=listener.tls_required,
            auth_mechanisms=authenticator.mechanisms if authenticator is not None else (),
            auth_required=listener.auth == "required",
            auth_in_clear=listener.auth_in_clear,
            default_domain=listener.default_domain,
            rejects_bare_line_ends=settings.delivery.content_newlines == "reject",
            limits=_by_name(ServerLimits, settings.limits),
        ),
        timeouts=_by_name(ServerTimeouts, settings.timeouts, octets_per_second=settings.limits.octets_per_second),
        tls_context=tls_context,
        authenticator=authenticator,
        allow=listener.allow,
        proxy_protocol_from=listener.proxy_protocol_from,
        trace_in_reply=settings.telemetry.trace_in_reply,
        names_client=listener.received == "full",
    )


class ServerArguments(TypedDict):
    """Arguments of `Server` and `Server.hold_to`."""

    connections: int
    connections_per_client: int
    stress_percent: int
    auth_failures_per_minute: int
    segments: Segments


def admission(settings: Settings) -> ServerArguments:
    """Admission over all listeners, and where to cut records."""
    limits, telemetry = settings.limits, settings.telemetry
    return ServerArguments(
        connections=limits.connections,
        connections_per_client=limits.connections_per_client,
        stress_percent=limits.stress,
        auth_failures_per_minute=limits.auth_failures_per_minute,
        segments=Segments(telemetry.segment_events, telemetry.segment_age),
    )


def _by_name(room: Callable[..., T], table: Table, *, without: Collection[str] = (), **others: object) -> T:
    """Fill a package's value object with the settings of the same names.

    Args:
        room: its dataclass.
        without: fields that are not settings, and keep their default.
        others: fields whose setting has another name, or is in another table.

    Raises:
        AttributeError: a field is neither of these nor a setting of the table.
    """
    names = [field.name for field in dataclasses.fields(cast(Any, room))]
    same = {name: getattr(table, name) for name in names if name not in others and name not in without}
    return room(**same, **others)


def upstream_settings(upstream: UpstreamTable) -> UpstreamSettings:
    """One upstream's settings for `forwarding`."""
    credentials: Credentials | None = None
    if upstream.username and upstream.auth != "off":
        credentials = Credentials(
            upstream.username,
            upstream.password.reveal() if upstream.password is not None else "",
            _tokens(upstream),
        )
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
        limits=_pool_limits(upstream),
        reply_limits=ReplyLimits(upstream.reply_line, upstream.reply_lines),
        timeouts=_by_name(Timeouts, upstream.timeout, without=("pool",)),
        senders=upstream.senders,
        recipients=upstream.recipients,
        trace_context=TracePolicy(upstream.trace_context),
        recipients_per_transaction=upstream.recipients_per_transaction,
        reencode_8bit=upstream.reencode_8bit,
        disabled=frozenset(upstream.disable),
        paced_by=upstream.limits,
    )


def _pool_limits(upstream: UpstreamTable) -> PoolLimits:
    limits = PoolLimits(
        connections=upstream.connections,
        messages=upstream.messages_per_connection,
        age_seconds=upstream.connection_age,
        idle_seconds=upstream.connection_idle,
    )
    if upstream.connections_total is None:
        return limits
    return dataclasses.replace(
        limits,
        connections=min(limits.connections, upstream.connections_total),
        messages=min(limits.messages, TURN_MESSAGES),
        idle_seconds=min(limits.idle_seconds, IDLE_SECONDS),
    )


def receivers(settings: Settings) -> "list[ReceiverSettings]":
    """The receivers of outcomes; without any, nothing is imported."""
    if not settings.notify:
        return []
    from otel_smtp.spool.outcomes.events import RecipientOutcome, key_of
    from otel_smtp.spool.outcomes.receivers import ReceiverSettings

    return [
        ReceiverSettings(
            name=one.name,
            url=one.url,
            key=key_of(one.key.reveal() if one.key is not None else ""),
            outcomes=frozenset(map(RecipientOutcome, one.events)),
            ca_file=str(one.ca_file) if one.ca_file is not None else None,
            connections=one.connections,
            timeout_seconds=one.timeout,
            most_pending=one.most_pending,
        )
        for one in settings.notify
    ]


def limit_settings(settings: Settings) -> list[LimitSettings]:
    """The limits for upstreams."""
    return [
        LimitSettings(
            limit.name,
            limit.rate.amount,
            limit.rate.period_seconds,
            limit.burst,
            per_recipient=limit.per == "recipients",
        )
        for limit in settings.limit
    ]


def kept_limits(settings: Settings) -> "KeptLimits | None":
    """The limits of a gateway with its queue in a directory; None: there are none, or they are kept elsewhere."""
    directory = settings.spool.directory
    if settings.delivery.mode == "direct" or directory is None or not settings.limit:
        return None
    from otel_smtp.gateway.kept_limits import KeptLimits  # late: it brings SQLite

    return KeptLimits(limit_settings(settings), Path(directory) / "limits")


def limits(settings: Settings, store: "Store | None", shared: Mapping[str, AnyLimit] | None) -> Mapping[str, AnyLimit]:
    """The limits themselves, by name.

    Args:
        store: of the durable queue; gateways that share one keep their limits there.
        shared: limits shared by a gateway's workers, or surviving a restart.
    """
    if store is not None and store.ledger is not None:
        return {one.name: GlobalLimit(one, store.ledger) for one in limit_settings(settings)}
    return shared if shared is not None else limits_of(limit_settings(settings))


def slot_settings(settings: Settings) -> list[SlotSettings]:
    """The upstreams whose connections need slots."""
    return [
        SlotSettings(upstream.name, upstream.connections_total)
        for upstream in settings.upstream
        if upstream.connections_total is not None
    ]


def slots(settings: Settings, store: "Store | None", shared: Mapping[str, AnySlots] | None) -> Mapping[str, AnySlots]:
    """The connection slots themselves, by the upstreams' names; arguments as for `limits`."""
    if store is not None and store.ledger is not None:
        return {one.name: GlobalSlots(one, store.ledger) for one in slot_settings(settings)}
    return shared if shared is not None else slots_of(slot_settings(settings))


def _tokens(upstream: UpstreamTable) -> OAuthTokens | None:
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


def spool_settings(settings: Settings) -> "SpoolSettings":
    """The durable queue, in a mode that has one."""
    # Imported here: a gateway in mode direct starts without SQLite.
    from otel_smtp.spool.embedded import control_path
    from otel_smtp.spool.schedule import Schedule
    from otel_smtp.spool.service import SpoolSettings

    spool = settings.spool
    return SpoolSettings(
        control_path=control_path(spool.directory) if spool.directory is not None else None,
        schedule=Schedule(spool.retry, max_age_seconds=spool.max_age, warn_after_seconds=spool.warn_after),
        bounce=spool.bounce,
        hostname=settings.hostname,
        notice_sender=spool.notice_sender,
    )


def spool_store(settings: Settings, *, name: str) -> "Store":
    """The store of the durable queue, in a mode that has one.

    Args:
        name: of this process in telemetry.
    """
    if settings.spool.url is not None:
        return shared_store(settings.spool, name=name)
    from otel_smtp.spool.embedded import EmbeddedStore

    assert settings.spool.directory is not None
    return EmbeddedStore(
        settings.spool.directory,
        most_messages=settings.spool.most_messages,
        most_octets=settings.spool.most_octets,
        least_free_octets=least_free_octets(settings),
    )


def shared_store(spool: SpoolTable, *, name: str, is_gateway: bool = True) -> "PostgresqlStore":
    """The queue of several gateways.

    Args:
        is_gateway: False: an operator's command.

    Raises:
        SpoolError: asyncpg is not installed.
    """
    from otel_smtp.spool.messages import SpoolError

    try:
        from otel_smtp.spool.postgresql import PostgresqlStore
    except ModuleNotFoundError as error:
        raise SpoolError("spool.url needs asyncpg: pip install 'otel-smtp[postgresql]'") from error
    return PostgresqlStore(
        shared_place(spool),
        name=name,
        version=__version__,
        most_messages=spool.most_messages,
        most_octets=spool.most_octets,
        is_gateway=is_gateway,
    )


def store_verbs() -> Sequence[str]:
    """The operations of a store, as metrics distinguish them."""
    from otel_smtp.spool.messages import StoreVerb

    return [verb.value for verb in StoreVerb]


async def migrate_shared(spool: SpoolTable, *, dry_run: bool) -> Sequence[str]:
    """Create a shared queue's schema, or bring it up to date; returns the statements.

    Raises:
        SpoolError: it cannot be done; the text says why.
    """
    from otel_smtp.spool.messages import SpoolError

    try:
        from otel_smtp.spool.postgresql import migrate_place
    except ModuleNotFoundError as error:
        raise SpoolError("spool.url needs asyncpg: pip install 'otel-smtp[postgresql]'") from error
    return await migrate_place(shared_place(spool), dry_run=dry_run)


def shared_place(spool: SpoolTable) -> "QueueLocation":
    """Where the queue of several gateways is."""
    from otel_smtp.spool.postgresql import QueueLocation

    assert spool.url is not None
    return QueueLocation(spool.url.reveal(), spool.schema, spool.takeover_after)


def least_free_octets(settings: Settings) -> int:
    """Free space below which the spool refuses mail: the largest message, and half as much again."""
    return settings.limits.message_size * 3 // 2


def redaction(settings: Settings) -> Redaction:
    """What telemetry and the status page may show of addresses and hosts."""
    telemetry = settings.telemetry
    key = telemetry.addresses_hash_key
    return Redaction(
        addresses=Addresses(telemetry.addresses),
        client_ip=ClientIp(telemetry.client_ip),
        hash_key=key.reveal().encode() if key is not None else b"",
    )


def inbound_policies(settings: Settings) -> Mapping[str, InboundPolicy]:
    """The policies for a message's trace context, by listener's name."""
    return {listener.name: InboundPolicy(listener.trace_context) for listener in settings.listener}


def _keeping(telemetry: TelemetrySettings) -> Keeping | None:
    if not telemetry.keep:
        return None
    rate = telemetry.keep_rate
    per_second = rate.amount / rate.period_seconds
    reasons = [KeepReason(one) for one in telemetry.keep]
    return Keeping(reasons, slow_seconds=telemetry.slow, per_second=per_second)


def telemetry_options(
    settings: Settings,
    redaction: Redaction,
    *,
    span_sinks: Sequence[SpanSink],
    memories: Sequence[Keep],
    open_connections: OpenConnections,
    upstream_connections: Callable[[], Iterator[tuple[str, str, int]]],
    spool: Callable[[], tuple[Mapping[str, int], float, int] | None],
    shared_queue: SharedQueueFigures,
    store_timings: StoreTimings,
    receivers: ReceiverCounts,
    worker: int | None = None,
) -> TelemetryOptions:
    """The options of telemetry.

    Args:
        span_sinks: receive each finished span, exported or not.
        memories: receive each recorded span as octets, and whether it has a fault.
        open_connections: yields the records of the open connections when the metrics are read.
        upstream_connections: yields (upstream, state, connections) when the gauges are read.
        spool: returns the messages by state, the age of the oldest in seconds, and octets of the disk that no message
            needs; None without a spool.
        shared_queue: returns this gateway's part in a shared queue; None without one.
        store_timings: returns the store's operations since the last call.
        receivers: returns the figures of the receivers of outcomes, when the metrics are read.
        worker: the number of this process among several; None: there is one.
    """
    telemetry = settings.telemetry
    return TelemetryOptions(
        version=__version__,
        worker=worker,
        redaction=redaction,
        policies=inbound_policies(settings),
        upstreams=[upstream.name for upstream in settings.upstream],
        limits=tuple(limit.name for limit in settings.limit),
        mechanisms=MECHANISMS,
        state_events=StateEvents(telemetry.state_events),
        probes=telemetry.probes,
        with_message_id=telemetry.message_id,
        keeping=_keeping(telemetry),
        listeners=span_sinks,
        memories=memories,
        open_connections=open_connections,
        upstream_connections=upstream_connections,
        spool=spool,
        shared_queue=shared_queue,
        store_timings=store_timings,
        store_verbs=() if settings.delivery.mode == "direct" else store_verbs(),
        receivers=receivers,
    )
