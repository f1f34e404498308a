"""An event loop whose clock a test moves: deadlines are met without waiting for them."""

import asyncio


class MovableClockLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop, with a clock that can be put forward."""

    def __init__(self) -> None:
        self._ahead_seconds = 0.0
        super().__init__()

    def time(self) -> float:
        """The time by which all deadlines of this loop go."""
        return super().time() + self._ahead_seconds

    def advance(self, seconds: float) -> None:
        """Put the clock forward; what is due by then runs in the next turns of the loop."""
        self._ahead_seconds += seconds


def advance(seconds: float) -> None:
    """Put the clock of the running loop forward; the test is marked `movable_clock`."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, MovableClockLoop), "mark the test movable_clock"
    loop.advance(seconds)
