"""Every kind of store, made alike for the tests that any of them has to pass."""

import time
import zlib
from collections.abc import Callable
from pathlib import Path

from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
from otel_smtp.spool.postgresql.schema import STEPS, VERSION
from otel_smtp.spool.store import Store
from tests.spool.memory_store import Memory, MemoryStore
from tests.support import postgresql


class Clock:
    """A wall clock that tests set; it starts at the present."""

    def __init__(self) -> None:
        self._ahead = 0.0
        self._followers: list[Callable[[float], None]] = []

    def __call__(self) -> float:
        return time.time() + self._ahead

    @property
    def ahead(self) -> float:
        """Seconds before the present."""
        return self._ahead

    @ahead.setter
    def ahead(self, seconds: float) -> None:
        self._ahead = seconds
        for follow in self._followers:
            follow(seconds)

    def follow(self, told: Callable[[float], None]) -> None:
        """Report each change, and the present state."""
        self._followers.append(told)
        told(self._ahead)


def embedded(path: Path, clock: Callable[[], float]) -> Store:
    return EmbeddedStore(path, least_free_octets=0, segment_octets=SEGMENT_OCTETS, clock=clock)


SEGMENT_OCTETS = 2 * 1024 * 1024  # quicker to make than those of a gateway


def in_memory(path: Path, clock: Callable[[], float]) -> Store:
    return MemoryStore(_MEMORIES.setdefault(path, Memory()), clock)


_MEMORIES: dict[Path, Memory] = {}  # by place; a test's directory is its own


def in_database(path: Path, clock: Callable[[], float]) -> Store:
    """A store in a schema of its own, whose server has the test's clock."""
    schema = f"s{zlib.crc32(str(path).encode()):08x}"
    running = postgresql.server()
    if schema not in _SCHEMAS:
        _SCHEMAS.add(schema)
        migrated(running, schema)
        ahead = running.directory / f"{schema}.ahead"
        running.do(
            f"CREATE SCHEMA {schema}_clock",
            # What statements call by its bare name is looked for here first. The lives of gateways go by another.
            f"CREATE FUNCTION {schema}_clock.now() RETURNS timestamptz STABLE LANGUAGE sql AS "
            f"$$ SELECT pg_catalog.now() + pg_catalog.pg_read_file('{ahead}')::interval $$",
        )
        assert isinstance(clock, Clock)

        def follow(seconds: float) -> None:
            new = ahead.with_suffix(".new")
            new.write_text(f"{seconds} seconds")
            new.replace(ahead)

        clock.follow(follow)
    url = running.url(search_path=f"{schema}_clock,pg_catalog")
    return PostgresqlStore(QueueLocation(url, schema), name="a gateway", version="0")


def migrated(running: postgresql.Server, schema: str) -> None:
    """What `otel-smtp queue migrate` runs."""
    running.do(
        f"CREATE SCHEMA {schema}",
        *(step.statements.format(schema=schema) for step in STEPS),
        f"INSERT INTO {schema}.meta VALUES ({VERSION}, 1, gen_random_uuid())",
    )


_SCHEMAS: set[str] = set()

STORES = {"embedded": embedded, "memory": in_memory, "postgresql": in_database}
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
