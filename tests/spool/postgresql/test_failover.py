"""A primary that is lost under load, with a synchronous standby that takes its place."""

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from otel_smtp.spool.messages import SpoolError, StorageAway
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation, migrate_place
from otel_smtp.spool.postgresql import store as store_module
from tests.spool.messages import leased, message, queued, written
from tests.spool.postgresql.schemas import new_place, store
from tests.spool.postgresql.verbs import VERBS, call, empty, state_of, waiting
from tests.support.postgresql import OWNER, Server, connected
from tests.support.waiting import until

SUBMITTERS = 10

pytestmark = pytest.mark.xdist_group("standby")


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Server, Server]]:
    """A primary, and a standby without which it commits nothing. The last test of the module uses them up."""
    primary = Server().start()
    standby = Server(standby_of=primary).start()
    primary.wait_for("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'")
    primary.do("ALTER SYSTEM SET synchronous_standby_names = 'ANY 1 (*)'", "SELECT pg_reload_conf()")
    primary.wait_for("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'quorum'")
    yield primary, standby
    primary.remove()
    standby.remove()


@contextlib.contextmanager
def stopped(standby: Server) -> Iterator[Callable[[], None]]:
    """A standby that hears of nothing until it is let go on."""
    ((pid,),) = standby.do("SELECT pid FROM pg_stat_wal_receiver")
    is_stopped = True

    def go_on() -> None:
        nonlocal is_stopped
        if is_stopped:
            is_stopped = False
            os.kill(int(pid), signal.SIGCONT)

    os.kill(int(pid), signal.SIGSTOP)
    try:
        yield go_on
    finally:
        go_on()


@pytest.mark.parametrize("label", [label for label, verb in VERBS.items() if verb.is_promise])
async def test_nothing_is_promised_that_the_standby_does_not_have(pair: tuple[Server, Server], label: str) -> None:
    """Nor where the primary has it: its backend was killed while it waited for the standby, and asked again."""
    primary, standby = pair
    place, verb, states = await new_place(primary), VERBS[label], []
    gateway = store(place)
    await gateway.open()
    async with connected(place.url) as other:
        await verb.call(gateway, await verb.prepare(gateway))
        states.append(await state_of(place, other))
        await empty(place, other)
        ready = await verb.prepare(gateway)
        with stopped(standby) as go_on:
            doing = call(verb, gateway, ready)
            pid = await waiting(other, verb.line, "SyncRep")
            assert not doing.done()
            await other.execute("SELECT pg_terminate_backend($1)", pid)
            if not verb.repeats_itself:
                with pytest.raises(StorageAway):
                    await doing
                doing = call(verb, gateway, ready)
            again = asyncio.create_task(waiting(other, verb.line, "SyncRep", but=pid))
            await asyncio.wait((doing, again), return_when=asyncio.FIRST_COMPLETED)
            assert not doing.done()
            await again
            go_on()
            await doing
        states.append(await state_of(place, other))
    assert states[0] == states[1]
    await gateway.close()


async def test_who_gives_up_waiting_for_the_standby_does_not_make_the_primary_commit(
    pair: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cancelled statement would: the row is on the primary alone then, for all to see."""
    primary, standby = pair
    place = await new_place(primary)
    gateway = store(place)
    await gateway.open()
    one = await queued(gateway)  # which has all the time that it needs
    monkeypatch.setattr("otel_smtp.spool.postgresql.submitting.SUBMIT_SECONDS", 0.3)
    monkeypatch.setattr(store_module, "KEEP_SECONDS", 0.1)
    async with connected(place.url) as other:
        with stopped(standby) as go_on:
            submitting = gateway.submit(message(), await written(gateway.draft()), lease=False)
            claiming = asyncio.create_task(leased(gateway))
            pids = {await waiting(other, line, "SyncRep") for line in ("accepts", "claims")}
            claiming.cancel()
            with pytest.raises(StorageAway):
                await submitting
            assert await other.fetch(f"SELECT msg_id, state::text FROM {place.schema}.dlv") == [(one, "r")]
            waiting_still = await other.fetch("SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
            assert pids <= {row["pid"] for row in waiting_still}
            go_on()
        # Withdrawn, since its client was told 451.
        await until(lambda: gateway.figures.unanswered == 0 and not gateway._withdrawn, timeout_seconds=30)
        assert [row["id"] for row in await other.fetch(f"SELECT id FROM {place.schema}.msg")] == [one]
    await gateway.close()
    assert "user request" not in (primary.directory / "log").read_text()


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
    assert gap < 40  # a few seconds on a machine that does nothing else
    await gateway.close()
