"""Scheduling work on the event loop: long work in steps, one per turn; deferrable work together at its end."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final

PATIENCE_SECONDS: Final = 0.005
_DONE: Final = object()


class StepByStep:
    """Does work in steps, one per turn of the event loop, so that no mail waits for more than a step.

    While several pieces of work wait, a turn does as many steps, so the backlog stays bounded, however much happens in
    a turn. Only for the thread of one event loop.
    """

    __slots__ = ("_due_in", "_waiting")

    def __init__(self) -> None:
        self._waiting: Final[deque[Iterator[None]]] = deque()
        self._due_in: asyncio.AbstractEventLoop | None = None  # a callback of this loop will go on

    def do(self, work: Iterator[None]) -> None:
        """Do `work` soon, after what waits already; at once where no loop runs.

        Args:
            work: each of its items is the end of a step.
        """
        self._waiting.append(work)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.finish()
            return
        if self._due_in is not loop:
            self._due_in = loop
            loop.call_soon(self._go_on, loop)

    def finish(self) -> None:
        """Do all waiting work."""
        while self._waiting:
            for _ in self._waiting.popleft():
                pass

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting = self._waiting
        try:
            for _ in range(len(waiting)):
                work = waiting.popleft()
                if next(work, _DONE) is not _DONE:
                    waiting.appendleft(work)
        finally:
            if waiting:
                loop.call_soon(self._go_on, loop)
            else:
                self._due_in = None


class AtEndOfTurn:
    """Does work at the end of this turn of the event loop; under load, where one turn follows the other, at most every
    `PATIENCE_SECONDS`, so that there is work on several mails to be done in one go.
    """

    __slots__ = ("_last_at",)

    def __init__(self) -> None:
        self._last_at = 0.0  # by the loop's clock

    def __call__(self, work: Callable[[], None]) -> None:
        """Do `work` then; at once if no loop runs."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            work()
            return
        left = self._last_at + PATIENCE_SECONDS - loop.time()
        if 0 < left <= PATIENCE_SECONDS:
            loop.call_later(left, self._do, loop, work)
        else:
            loop.call_soon(self._do, loop, work)

    def _do(self, loop: asyncio.AbstractEventLoop, work: Callable[[], None]) -> None:
        self._last_at = loop.time()
        work()
