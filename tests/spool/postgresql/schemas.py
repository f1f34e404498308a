"""Queues in schemas of their own."""

import itertools
import os
from collections.abc import Iterator

from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation, migrate_place
from tests.support.postgresql import Server, server

_numbers: Iterator[int] = itertools.count()


async def new_place(running: Server | None = None, *, takeover_seconds: float = 10.0) -> QueueLocation:
    """An empty queue that no other test has."""
    place = QueueLocation((running or server()).url(), f"queue_{os.getpid()}_{next(_numbers)}", takeover_seconds)
    await migrate_to(place)
    return place


async def migrate_to(place: QueueLocation) -> None:
    """What `otel-smtp queue migrate` does."""
    await migrate_place(place, dry_run=False)


def store(place: QueueLocation, name: str = "a gateway") -> PostgresqlStore:
    """A store of one more gateway."""
    return PostgresqlStore(place, name=name, version="0")
