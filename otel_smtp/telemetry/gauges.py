"""The gateway's functions from which gauges are read when the metrics are requested."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from otel_smtp.observing import ConnectionRecord

ConnectionCounts = Callable[[], Iterable[tuple[str, str, int]]]
"""Connections to upstreams now: upstream, state, how many."""
OpenConnections = Callable[[], Iterable[ConnectionRecord]]
"""The client connections that are open now."""
SpoolCounts = Callable[[], tuple[Mapping[str, int], float, int] | None]
"""The spool: messages by state, the age of the oldest in seconds, octets that no message needs; None: there is none."""


class SharedQueue(NamedTuple):
    """This gateway's part in a shared queue.

    Attributes:
        tells_messages: it reports the messages for all, since the counts of several reporters would add up.
        gateways, away_seconds, taken_over, stale, unanswered: see the registry.
    """

    tells_messages: bool
    gateways: int
    away_seconds: float
    taken_over: int
    stale: int
    unanswered: int


StoreTimings = Callable[[], Iterable[tuple[str, float, int]]]
"""What the spool's store did since this was asked last: verb, seconds, and how many shared it; 0: that is
reported elsewhere."""
SharedQueueFigures = Callable[[], SharedQueue | None]
ReceiverCounts = Callable[[], Iterable[tuple[str, Mapping[str, int], int, float]]]
"""The receivers of outcomes: name, outcomes by result, how many wait, and the age of the oldest in seconds."""
