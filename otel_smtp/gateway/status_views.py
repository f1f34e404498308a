"""Makes the status page's values about upstreams and the queue."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from otel_smtp.forwarding.breaker import BreakerState
from otel_smtp.forwarding.snapshots import UpstreamSnapshot
from otel_smtp.gateway.status_port import age_seconds
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.spool.messages import Company, DeliveryState, Departure, MessageView, Peer
from otel_smtp.spool.service import Spool
from otel_smtp.status.views import DepartureView, GatewayView, QueuedMessage, QueueView, UpstreamView
from otel_smtp.telemetry.propagation import from_carrier
from otel_smtp.telemetry.redaction import Redaction

logger: Final = logging.getLogger("otel_smtp.gateway.status_views")

_BREAKERS: Final = {BreakerState.PROBING: "half-open"}


def upstream_views(snapshots: Iterable[UpstreamSnapshot], tls: Mapping[str, str]) -> Sequence[UpstreamView]:
    """The upstreams.

    Args:
        tls: the policy of each, by name.
    """
    return [
        UpstreamView(
            name=snapshot.name,
            address=str(snapshot.endpoint),
            tls=tls[snapshot.name],
            idle=snapshot.pool.idle,
            busy=snapshot.pool.busy + snapshot.pool.opening,
            limit=snapshot.pool.most,
            waiting=snapshot.pool.waiting,
            breaker=_BREAKERS.get(snapshot.pool.breaker, str(snapshot.pool.breaker)),
            retry_seconds=snapshot.retry_seconds,
            last_success_seconds=snapshot.last_success_seconds,
            last_failure_seconds=snapshot.last_failure_seconds,
            last_failure=snapshot.last_failure,
        )
        for snapshot in snapshots
    ]


def queue_view(spool: Spool, redaction: Redaction) -> QueueView:
    """The queue, and the gateways that share it."""
    now = time.time()
    company = spool.company or Company(())
    return QueueView(
        counts=spool.counts.by_state(),
        oldest_age_seconds=age_seconds(spool.counts.oldest_arrived_at),
        messages=_each_queued(spool.oldest, now, redaction),
        gateways=[_gateway(peer, now) for peer in company.gateways],
        departures=[_departed(one, now) for one in company.departures],
    )


def _each_queued(messages: Iterable[MessageView], now: float, redaction: Redaction) -> Sequence[QueuedMessage]:
    shown: list[QueuedMessage] = []
    for message in messages:
        try:
            shown.append(_queued(message, now, redaction))
        except Exception:
            logger.exception("queued message not shown: internal error", extra={"queue_id": message.id})
    return shown


def _queued(message: MessageView, now: float, redaction: Redaction) -> QueuedMessage:
    """A queued message for the page: domains, no addresses, and why it waits."""
    replies = [last for _, _, last in message.recipients if last]
    trace = from_carrier(message.carrier)
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
        last_reply=redaction.text(replies[0]) if replies else None,
        trace_id=trace.trace_id_hex if trace is not None else None,
        gateways=message.gateways,
        held_seconds=max(0.0, now - message.leased_at) if message.leased_at is not None else None,
    )


def _gateway(peer: Peer, now: float) -> GatewayView:
    return GatewayView(
        id=peer.id,
        name=peer.name,
        version=peer.version,
        up_seconds=max(0.0, now - peer.started_at),
        alive_seconds=peer.alive_for,
        delivering=peer.leases,
        is_this=peer.is_this,
    )


def _departed(one: Departure, now: float) -> DepartureView:
    return DepartureView(
        id=one.id,
        name=one.name,
        ago_seconds=max(0.0, now - one.at),
        silent_seconds=one.silent_seconds,
        deliveries=one.deliveries,
        found_by=one.found_by,
    )
