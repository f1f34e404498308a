"""The one periodic look at the clock: deadlines are numbers, and no mail or command has a timer.

An owner of deadlines registers a function, which is called a few times per second with the loop's time, compares, and
acts. So a deadline fires at most `SWEEP_SECONDS` late, and moving one costs an assignment.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

SWEEP_SECONDS: Final = 0.25

logger: Final = logging.getLogger("otel_smtp.net.sweep")


class Sweep:
    """Calls every registered function with `loop.time()` every `SWEEP_SECONDS`, while any is registered."""

    __slots__ = ("_handle", "_swept")

    def __init__(self) -> None:
        self._swept: dict[Callable[[float], None], None] = {}
        self._handle: asyncio.TimerHandle | None = None

    def add(self, swept: Callable[[float], None]) -> None:
        """Call `swept` from now on; needs a running loop. Idempotent."""
        self._swept[swept] = None
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    def remove(self, swept: Callable[[float], None]) -> None:
        """Stop calling `swept`. Idempotent."""
        self._swept.pop(swept, None)
        if not self._swept and self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._handle = loop.call_later(SWEEP_SECONDS, self._sweep)
        now = loop.time()
        for swept in list(self._swept):
            if swept in self._swept:
                try:
                    swept(now)
                except Exception:
                    logger.exception("deadline sweep failed")
