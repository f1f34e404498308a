"""A primary that is lost under load, with a synchronous standby that takes its place."""

import asyncio
import itertools
import time
from collections.abc import Iterator

import pytest

from otel_smtp.spool.messages import SpoolError
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation, migrate_place
from tests.spool.messages import message, written
from tests.spool.postgresql.schemas import store
from tests.support.postgresql import OWNER, Server

SUBMITTERS = 10


@pytest.fixture
def pair() -> Iterator[tuple[Server, Server]]:
    """A primary, and a standby without which it commits nothing."""
    primary = Server().start()
    standby = Server(standby_of=primary).start()
    primary.wait_for("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'")
    primary.do("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'", "SELECT pg_reload_conf()")
    primary.wait_for("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'quorum'")
    yield primary, standby
    primary.remove()
    standby.remove()


async def test_what_was_acknowledged_is_there_after_a_failover(pair: tuple[Server, Server]) -> None:
    primary, standby = pair
    place = QueueLocation(f"postgresql://{OWNER}@127.0.0.1:{primary.port},127.0.0.1:{standby.port}/postgres", "queue")
    await migrate_place(place, dry_run=False)
    gateway = store(place)
    recovery = await gateway.open()
    assert recovery.remarks == []
    acknowledged: dict[str, float] = {}
    is_over = asyncio.Event()

    async def submit(to: PostgresqlStore) -> None:
        while not is_over.is_set():
            new = message()
            try:
                await to.submit(new, await written(to.draft()), lease=False)
            except SpoolError:
                continue
            acknowledged[new.id] = time.monotonic()

    async def count(least: int) -> None:
        async with asyncio.timeout(60):
            while len(acknowledged) < least:  # noqa: ASYNC110 - they count in tasks of their own
                await asyncio.sleep(0.01)

    submitting = [asyncio.create_task(submit(gateway)) for _ in range(SUBMITTERS)]
    await count(500)
    primary.stop()
    standby.do("ALTER SYSTEM SET synchronous_standby_names = ''", "SELECT pg_reload_conf()")
    await asyncio.to_thread(standby.promote)
    await count(len(acknowledged) + 500)
    is_over.set()
    await asyncio.gather(*submitting)
    found = {row[0] for row in standby.do("SELECT id FROM queue.msg")}
    times = sorted(acknowledged.values())
    gap = max(later - earlier for earlier, later in itertools.pairwise(times))
    print(f"{len(acknowledged)} acknowledged, {len(acknowledged.keys() - found)} lost, longest gap {gap:.1f} s")
    assert acknowledged.keys() - found == set()
    assert gap < 10
    await gateway.close()
