"""The store's clocks: the time, and how much has really passed, as a wall clock may be wrong and be corrected.

Times of mail are by the wall clock, since they outlive processes. If it jumps, they move with it, so that the age of
mail is the time that has really passed. The time since boot measures that, even between two processes. Across boots it
is unknown, and a long time counts as a day.
"""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

JUMP_MS: Final = 60_000  # less is drift
MOST_DOWNTIME_MS: Final = 86_400_000  # between two boots, the most that counts towards the age of mail


@dataclass(frozen=True, slots=True)
class Uptime:
    """How long the machine has been up.

    Attributes:
        boot: the id of the boot; "": unknown.
    """

    boot: str
    milliseconds: int


@functools.cache
def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def uptime() -> Uptime:
    """The machine's, by the kernel."""
    try:
        return Uptime(_boot(), round(float(Path("/proc/uptime").read_text(encoding="ascii").split()[0]) * 1000))
    except (OSError, ValueError):
        return Uptime("", round(time.monotonic() * 1000))


class Clocks:
    """The clocks of one store.

    Args:
        wall: seconds since the epoch.
        up: how long the machine has been up.
    """

    def __init__(self, wall: Callable[[], float], up: Callable[[], Uptime]) -> None:
        self._wall = wall
        self._up = up
        self._base = (self.now_ms(), up().milliseconds)  # a moment at which the wall clock gave the right age of mail

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return round(self._wall() * 1000)

    def jump_ms(self) -> int:
        """How far the wall clock was set ahead or back without mail having moved with it; 0: it was not."""
        wall, up = self.now_ms(), self._up().milliseconds
        jump = (wall - self._base[0]) - (up - self._base[1])
        if abs(jump) >= JUMP_MS:
            return jump
        self._base = (wall, up)
        return 0

    def have_moved(self, jump_ms: int) -> None:
        """Note that all mail has moved with a jump."""
        self._base = (self._base[0] + jump_ms, self._base[1])

    def seen(self) -> dict[str, int | str]:
        """This moment, for the next process, by the clock in step with the age of mail."""
        up = self._up()
        seen_ms = self._base[0] + up.milliseconds - self._base[1]
        return {"seen_ms": seen_ms, "seen_boot": up.boot, "seen_up_ms": up.milliseconds}

    def jump_since_ms(self, seen: Mapping[str, Any]) -> int:
        """How far the wall clock was set since the moment of `seen`; 0 if unknown."""
        if "seen_ms" not in seen:
            return 0
        gap, up = self.now_ms() - int(seen["seen_ms"]), self._up()
        if up.boot and seen.get("seen_boot") == up.boot:
            passed = up.milliseconds - int(seen["seen_up_ms"])
        else:
            passed = min(max(gap, 0), MOST_DOWNTIME_MS)
        jump = gap - passed
        return jump if abs(jump) >= JUMP_MS else 0
