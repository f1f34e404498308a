"""The receivers of outcomes: their settings, health and backlogs."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from otel_smtp.spool.messages import OUTCOME_PREFIX, Backlog
from otel_smtp.spool.outcomes.events import RecipientOutcome

logger: Final = logging.getLogger("otel_smtp.spool.outcomes.receivers")

FIRST_REST_SECONDS: Final = 1.0
LONGEST_REST_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class ReceiverSettings:
    """One receiver.

    Attributes:
        name: in metrics and logs, and of its backlog.
        url: https, or http on this machine.
        key: signs what is sent.
        outcomes: the kinds that it receives.
        ca_file: authorities to trust; None: the system's.
        connections: the most outcomes sent to it at once.
        timeout_seconds: of a whole exchange.
        most_pending: beyond this, outcomes are dropped and counted.
    """

    name: str
    url: str
    key: bytes = field(repr=False)
    outcomes: frozenset[RecipientOutcome] = frozenset(RecipientOutcome)
    ca_file: str | None = None
    connections: int = 4
    timeout_seconds: float = 10.0
    most_pending: int = 100_000

    @property
    def destination(self) -> str:
        """The destination of its outcomes."""
        return f"{OUTCOME_PREFIX}{self.name}"


@dataclass(slots=True)
class OutcomeFigures:
    """This process's counts of outcomes, for metrics.

    Attributes:
        sent: accepted by the receiver. failed: failed attempts. expired: given up for their age.
        dropped: never stored, because too many waited.
    """

    sent: int = 0
    failed: int = 0
    expired: int = 0
    dropped: int = 0

    def by_result(self) -> Mapping[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in RESULTS}


RESULTS: Final = ("sent", "failed", "expired", "dropped")


class OutcomeReceiver:
    """One receiver's health and backlog.

    Attributes:
        settings: may be replaced.
        backlog: its waiting outcomes at the last count.
        under_way: exchanges now.
    """

    def __init__(self, settings: ReceiverSettings) -> None:
        self.settings = settings
        self.figures = OutcomeFigures()
        self.backlog = Backlog()
        self.under_way = 0
        self._noted = 0  # stored since the backlog was counted
        self._failures = 0  # consecutive failures
        self._failing_since = 0.0
        self._rests_until = float("-inf")
        self._is_full = False

    @property
    def pending(self) -> int:
        """How many outcomes wait for it, as far as this process knows."""
        return self.backlog.pending + self._noted

    def has_room(self) -> bool:
        """Whether another outcome may wait for it; logs the first that may not, and counts all."""
        if self.pending < self.settings.most_pending:
            self._is_full = False
            return True
        if not self._is_full:
            self._is_full = True
            logger.error(
                "outcomes dropped: too many wait for their receiver",
                extra={"receiver": self.settings.name, "pending": self.pending},
            )
        self.figures.dropped += 1
        return False

    def note_stored(self) -> None:
        """Another outcome waits for it."""
        self._noted += 1

    def count(self, backlog: Backlog) -> None:
        """Update the backlog."""
        self.backlog, self._noted = backlog, 0

    def room(self, now: float) -> int:
        """How many exchanges may begin. While it fails, one at a time, with growing pauses."""
        if self._failures:
            return int(not self.under_way and now >= self._rests_until)
        return max(0, self.settings.connections - self.under_way)

    def rests_for(self, now: float) -> float:
        """Seconds until it may be tried again."""
        return max(0.0, self._rests_until - now)

    def succeeded(self) -> None:
        """It accepted an outcome."""
        self.figures.sent += 1
        if self._failures:
            logger.info(
                "receiver of outcomes recovered",
                extra={
                    "receiver": self.settings.name,
                    "failures": self._failures,
                    "seconds": round(time.monotonic() - self._failing_since, 1),
                },
            )
        self._failures = 0

    def failed(self, why: str, retry_in: float) -> None:
        """It did not accept an outcome.

        Args:
            retry_in: the pause it asked for, in seconds; 0: none.
        """
        now = time.monotonic()
        self.figures.failed += 1
        if not self._failures:
            self._failing_since = now
            logger.warning("receiver of outcomes failing", extra={"receiver": self.settings.name, "fault": why})
        rest = min(LONGEST_REST_SECONDS, FIRST_REST_SECONDS * 2 ** min(self._failures, 10))
        self._failures += 1
        self._rests_until = now + max(rest, retry_in)


class Receivers:
    """All receivers, by the destination of their outcomes."""

    def __init__(self) -> None:
        self.by_destination: dict[str, OutcomeReceiver] = {}

    def replace(self, settings: Sequence[ReceiverSettings]) -> None:
        """Replace the receivers; those that stay keep their state."""
        known = self.by_destination
        self.by_destination = {}
        for one in settings:
            receiver = known.get(one.destination) or OutcomeReceiver(one)
            receiver.settings = one
            self.by_destination[one.destination] = receiver

    def figures(self) -> list[tuple[str, OutcomeFigures, int, float | None]]:
        """For metrics: name, figures, number waiting, and the oldest's time in seconds since the epoch."""
        return [
            (one.settings.name, one.figures, one.pending, one.backlog.oldest_arrived_at)
            for one in self.by_destination.values()
        ]
