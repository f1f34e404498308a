"""How many connections one upstream is given: none after repeated failures, few at first, more with each success.

Postfix's destination concurrency feedback, as a value machine without a clock. Only failures to open a connection for
mail count (no connection, TLS, greeting, EHLO, AUTH); a refused mail says nothing about the upstream's health.
"""

from enum import StrEnum
from typing import Final

INITIAL_WINDOW: Final = 5.0  # as Postfix begins: few enough for any upstream
DEAD_AFTER_FAILURES: Final = 3  # in a row, and at least a whole window of them
FIRST_BACKOFF_SECONDS: Final = 1.0
LONGEST_BACKOFF_SECONDS: Final = 60.0


class BreakerState(StrEnum):
    """CLOSED: in use. OPEN: in backoff. PROBING: one attempt decides."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Breaker:
    """The health of one upstream.

    Args:
        most: the most connections ever allowed.

    Attributes:
        window: connections allowed now; grows by one with each window of successes, shrinks by one with each failure.
        is_at_best: another success would change nothing.
    """

    __slots__ = (
        "_backoff_seconds",
        "_failed_windows",
        "_failures",
        "_most",
        "_retry_at",
        "_state",
        "is_at_best",
        "window",
    )

    def __init__(self, most: int) -> None:
        self._most = most
        self.window = min(INITIAL_WINDOW, float(most))
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._failed_windows = 0.0
        self._backoff_seconds = FIRST_BACKOFF_SECONDS
        self._retry_at = 0.0
        self.is_at_best = False

    def __repr__(self) -> str:
        return f"<Breaker {self._state} window {self.window:.1f} of {self._most}, {self._failures} failures>"

    @property
    def state(self) -> BreakerState:
        """For people; `allows` decides."""
        return self._state

    @property
    def retry_at(self) -> float | None:
        """When the next attempt is allowed; None if the upstream is not in backoff."""
        return self._retry_at if self._state is BreakerState.OPEN else None

    def allows(self, now: float, connections: int) -> bool:
        """Whether one more connection may be opened beside `connections` open and opening ones."""
        match self._state:
            case BreakerState.CLOSED:
                return connections < int(self.window)
            case BreakerState.OPEN:
                return now >= self._retry_at
            case BreakerState.PROBING:
                return False

    def is_dead(self, now: float) -> bool:
        """Whether waiting is pointless: the upstream is in backoff."""
        return self._state is BreakerState.OPEN and now < self._retry_at

    def concurrency(self, now: float) -> int:
        """How many mails may be under way: the window; none during a backoff; and one, the probe, after it."""
        if self._state is BreakerState.CLOSED:
            return int(self.window)
        return 0 if self.is_dead(now) else 1

    def begin(self) -> None:
        """An attempt to open a connection begins; the first one after a backoff is the probe."""
        if self._state is BreakerState.OPEN:
            self._state = BreakerState.PROBING

    def give_up(self) -> None:
        """An attempt ended without a verdict, for example by a cancellation."""
        if self._state is BreakerState.PROBING:
            self._state = BreakerState.OPEN

    def succeeded(self) -> None:
        """A connection was opened, or a mail was answered."""
        self._failures = 0
        self._failed_windows = 0.0
        if self._state is not BreakerState.CLOSED:
            # Slow start: an upstream that returns does not get all waiting mail at once.
            self._state = BreakerState.CLOSED
            self._backoff_seconds = FIRST_BACKOFF_SECONDS
            self.window = 1.0
        if self.window < self._most:
            self.window = min(float(self._most), self.window + 1 / self.window)
        self.is_at_best = self.window >= self._most

    def failed(self, now: float) -> None:
        """No connection for mail could be opened."""
        if self._state is BreakerState.OPEN:
            return  # attempts begun before the verdict do not count
        self.is_at_best = False
        if self._state is BreakerState.PROBING:
            self._backoff_seconds = min(LONGEST_BACKOFF_SECONDS, self._backoff_seconds * 2)
            self._back_off(now)
            return
        self._failures += 1
        self._failed_windows += 1 / self.window
        self.window = max(1.0, self.window - 1)
        if self._failures >= DEAD_AFTER_FAILURES and self._failed_windows >= 1:
            self._back_off(now)

    def _back_off(self, now: float) -> None:
        self._state = BreakerState.OPEN
        self._retry_at = now + self._backoff_seconds
