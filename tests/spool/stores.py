"""Every kind of store, made alike for the tests that any of them has to pass."""

import time
from collections.abc import Callable
from pathlib import Path

from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.store import Store


class Clock:
    """A wall clock that tests set; it starts at the present."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def embedded(path: Path, clock: Callable[[], float]) -> Store:
    return EmbeddedStore(path, reserve_octets=4096, least_free_octets=0, clock=clock)


STORES = {"embedded": embedded}
"""Each is made in a directory of its own, on a clock; made again on the same directory, it finds what was there."""
