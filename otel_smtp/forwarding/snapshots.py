"""Snapshots of upstreams and their pools, for the status page."""

from dataclasses import dataclass

from otel_smtp.forwarding.breaker import BreakerState
from otel_smtp.observing import Endpoint


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """A pool at one moment, for people."""

    idle: int
    busy: int
    opening: int
    waiting: int
    most: int
    window: int
    breaker: BreakerState


@dataclass(frozen=True, slots=True)
class UpstreamSnapshot:
    """One upstream at one moment, for the status page.

    Attributes:
        retry_seconds: until the next attempt is allowed; None if it is not in backoff.
        last_success_seconds, last_failure_seconds: ago; None: never. `last_failure`: its kind, in a word.
    """

    name: str
    endpoint: Endpoint
    pool: PoolSnapshot
    is_reachable: bool = True
    retry_seconds: float | None = None
    last_success_seconds: float | None = None
    last_failure_seconds: float | None = None
    last_failure: str | None = None
