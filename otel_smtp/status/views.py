"""Values for the status page from packages that `status` does not import. The gateway makes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class UpstreamView:
    """An upstream at this moment.

    Attributes:
        tls: "off", "starttls" or "implicit".
        breaker: "closed" (in use), "open" (in backoff for `retry_seconds` more) or "half-open" (one probe).
        waiting: transactions waiting for a connection.
        last_success_seconds, last_failure_seconds: ages; None if there was none.
        last_failure: its class, never a peer's text.
    """

    name: str
    address: str
    tls: str
    idle: int
    busy: int
    limit: int
    waiting: int = 0
    breaker: str = "closed"
    retry_seconds: float | None = None
    last_success_seconds: float | None = None
    last_failure_seconds: float | None = None
    last_failure: str | None = None


@dataclass(frozen=True, slots=True)
class QueuedMessage:
    """A message in the spool; domains only, as redaction allows.

    Attributes:
        next_attempt_seconds: until the next attempt; None if none is scheduled (held).
        gateways: those that attempt it now, if several share the spool; `held_seconds`: for how long.
        last_reply: the reply about a recipient at the last attempt, as redaction allows: "451 4.4.1 No answer".
    """

    spool_id: str
    state: str
    age_seconds: float
    attempts: int
    recipients: int
    domains: Sequence[str]
    next_attempt_seconds: float | None
    last_reply: str | None
    trace_id: str | None
    gateways: Sequence[str] = ()
    held_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class GatewayView:
    """A gateway that shares the queue.

    Attributes:
        id: of its incarnation: a gateway that was declared dead returns with another.
        name: its `service.instance.id`.
        alive_seconds: for how long its deliveries are certainly its own; negative: since when others may have taken
            them over.
        delivering: the number of deliveries that it attempts.
        is_this: it is the one that shows the page.
    """

    id: str
    name: str
    version: str
    up_seconds: float
    alive_seconds: float
    delivering: int
    is_this: bool


@dataclass(frozen=True, slots=True)
class DepartureView:
    """A gateway that no longer shares the queue.

    Attributes:
        silent_seconds: for how long it had been silent when another took over; None: it left in order.
        deliveries: how many it had, which continue elsewhere.
        found_by: the gateway that took over; "" if it left in order.
    """

    id: str
    name: str
    ago_seconds: float
    silent_seconds: float | None
    deliveries: int
    found_by: str


@dataclass(frozen=True, slots=True)
class QueueView:
    """The spool at this moment.

    Attributes:
        counts: messages by state.
        oldest_age_seconds: None if it is empty.
        messages: the oldest few.
        gateways: those that share it; empty if it is not shared.
        departures: gateways that left since this one started, the latest first; at most 20.
    """

    counts: Mapping[str, int]
    oldest_age_seconds: float | None
    messages: Sequence[QueuedMessage]
    gateways: Sequence[GatewayView] = ()
    departures: Sequence[DepartureView] = ()
