"""When to retry a message, when to warn its sender of a delay, and when it expires."""

import math
from dataclasses import dataclass
from typing import Final

_MINUTE: Final = 60.0
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR

# RFC 5321 4.5.4.1 asks for 30 minutes between attempts across the Internet; the smarthost is our own, so the first
# retries come sooner, and the breaker decides whether it can be asked at all.
DEFAULT_WAITS_SECONDS: Final = (
    30.0, _MINUTE, 2 * _MINUTE, 5 * _MINUTE, 10 * _MINUTE, 20 * _MINUTE, 40 * _MINUTE, _HOUR,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Schedule:
    """The retry schedule (RFC 5321 4.5.4.1).

    Attributes:
        waits_seconds: after the first attempt, the second, and so on; the last one repeats.
        jitter: the fraction by which each wait is lengthened or shortened, so that mail deferred together is not
            retried together.
        max_age_seconds: since arrival; RFC 5321 demands at least four to five days.
        warn_after_seconds: since arrival, once; None: never.

    Raises:
        ValueError: there are no waits, or a number is out of range.
    """

    waits_seconds: tuple[float, ...] = DEFAULT_WAITS_SECONDS
    jitter: float = 0.2
    max_age_seconds: float = 5 * _DAY
    warn_after_seconds: float | None = 4 * _HOUR

    def __post_init__(self) -> None:
        if not self.waits_seconds or not all(0 < wait < math.inf for wait in self.waits_seconds):
            raise ValueError(f"waits are one or more positive numbers, not {self.waits_seconds}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is from 0 to below 1, not {self.jitter}")
        if not self.max_age_seconds > 0:
            raise ValueError(f"a message may become some seconds old, not {self.max_age_seconds}")
        if self.warn_after_seconds is not None and not self.warn_after_seconds > 0:
            raise ValueError(f"a warning comes after some seconds, not {self.warn_after_seconds}")

    def next_delay(self, attempts: int, chance: float) -> float:
        """The wait after attempt number `attempts`, from 1, in seconds.

        Args:
            chance: evenly distributed from 0 to 1: the position within the range of the jitter.
        """
        wait = self.waits_seconds[min(max(attempts, 1), len(self.waits_seconds)) - 1]
        return wait * (1 + self.jitter * (2 * chance - 1))
