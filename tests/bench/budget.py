"""How long each run may take, so that all of them end within the time that was given."""

import time
from collections.abc import Callable
from typing import Final

LEAST_SECONDS: Final = 0.5  # below, a run says nothing
MOST_SECONDS: Final = 4.0  # above, it says nothing more
# Of a run, besides its load: a process that starts, and the wait for export and delivery. Learned while it goes.
OVERHEAD_SECONDS: Final = 1.5


class Budget:
    """Divides what is left of the time among the runs that are left.

    Args:
        seconds: for all; None: no bound, and each run takes `fixed_seconds`.
        clock: a monotonic one, in seconds.
    """

    def __init__(
        self, seconds: float | None, *, fixed_seconds: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._ends = None if seconds is None else clock() + seconds
        self._fixed_seconds = fixed_seconds
        self._overhead = OVERHEAD_SECONDS

    def seconds_each(self, runs: int, *, reserved_seconds: float = 0.0) -> float:
        """For the load of each of so many runs.

        Args:
            reserved_seconds: for what comes besides them.
        """
        if self._ends is None or not runs:
            return self._fixed_seconds
        left = self._ends - self._clock() - reserved_seconds
        return min(max(left / runs - self._overhead, LEAST_SECONDS), MOST_SECONDS)

    def took(self, run_seconds: float, load_seconds: float) -> None:
        """Learn from a run what one takes besides its load."""
        self._overhead += (max(0.0, run_seconds - load_seconds) - self._overhead) / 10


def duration(text: str) -> float:
    """Seconds of a duration: `90s`, `20m`, `1h`, or a number of seconds.

    Raises:
        ValueError: it is none.
    """
    factors = {"s": 1, "m": 60, "h": 3600}
    number, factor = (text[:-1], factors[text[-1]]) if text[-1:] in factors else (text, 1)
    seconds = float(number) * factor
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds
