"""Every kind of store, made alike for the tests that any of them has to pass."""

import time
from collections.abc import Callable
from pathlib import Path

from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.store import Store
from tests.spool.memory_store import Memory, MemoryStore


class Clock:
    """A wall clock that tests set; it starts at the present."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def embedded(path: Path, clock: Callable[[], float]) -> Store:
    return EmbeddedStore(path, least_free_octets=0, segment_octets=SEGMENT_OCTETS, clock=clock)


SEGMENT_OCTETS = 2 * 1024 * 1024  # quicker to make than those of a gateway


def in_memory(path: Path, clock: Callable[[], float]) -> Store:
    return MemoryStore(_MEMORIES.setdefault(path, Memory()), clock)


_MEMORIES: dict[Path, Memory] = {}  # by place; a test's directory is its own

STORES = {"embedded": embedded, "memory": in_memory}
"""Each is made in a directory of its own, on a clock; made again on the same directory, it finds what was there."""


def alter(directory: Path, what: bytes, by: bytes) -> int:
    """Change what the log of a spool holds; how many segments that were."""
    altered = 0
    for segment in (directory / "log").iterdir():
        data = segment.read_bytes()
        if what in data and segment.name != "spare":
            segment.write_bytes(data.replace(what, by))
            altered += 1
    return altered
