"""Two sessions at once: a statement that began before another committed, and goes on after it.

What gives leases holds the row of its gateway first. So a test that holds that row stops such a statement with the view
of the queue that it began with.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.messages import End, StorageAway, Verdict
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
from otel_smtp.spool.postgresql import leasing as leasing_module
from otel_smtp.spool.postgresql import store as store_module
from tests.spool.messages import leased, message, queued, written
from tests.spool.postgresql.cutting import CuttingProxy
from tests.spool.postgresql.schemas import new_place, store
from tests.spool.queueing import eventually
from tests.support.postgresql import connected, server

T = TypeVar("T")

DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)
WAITING = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE $1"


@pytest.fixture
async def place() -> QueueLocation:
    return await new_place()


@asynccontextmanager
async def gateways(place: QueueLocation) -> AsyncIterator[tuple[PostgresqlStore, PostgresqlStore]]:
    """The one that is stopped in the middle, and another one."""
    both = store(place, "slow"), store(place, "quick")
    for one in both:
        await one.open()
    try:
        yield both
    finally:
        for one in both:
            await one.close()


@asynccontextmanager
async def begun(
    place: QueueLocation, slow: PostgresqlStore, work: Coroutine[Any, Any, T]
) -> AsyncIterator["asyncio.Task[T]"]:
    """Work that has begun, and goes on after the block."""
    async with connected(place.url) as holding:
        holds = holding.transaction()
        await holds.start()
        await holding.execute(f"SELECT FROM {place.schema}.gateway WHERE id = $1 FOR UPDATE", slow.beats.incarnation)
        task = asyncio.create_task(work)
        async with connected(place.url) as looking:
            async with asyncio.timeout(30):
                while not await looking.fetch(WAITING, f'%"{place.schema}".gateway%FOR KEY SHARE%'):
                    assert not task.done()
        try:
            yield task
        finally:
            await holds.rollback()
            await asyncio.wait({task})


async def test_what_was_deferred_since_a_claim_began_is_not_claimed_before_its_time(place: QueueLocation) -> None:
    async with gateways(place) as (slow, quick):
        one = await queued(slow)
        async with begun(place, slow, leased(slow)) as claiming:
            (lease,) = await leased(quick)
            await quick.finish(lease, (), retry_in=1000)
        assert await claiming == []
        assert [shown.attempts for shown in await quick.page("", 9)] == [1]
        assert (await quick.show(one)).gateways == []


@pytest.mark.parametrize("verb", ["reset", "hold"])
async def test_what_was_given_more_time_since_a_look_at_ages_began_is_not_expired(
    place: QueueLocation, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateways(place) as (slow, quick):
        monkeypatch.setattr(slow.beats, "is_housekeeper", True)
        one = await queued(slow, message(max_age_seconds=0.0))
        async with begun(place, slow, slow.end_overdue(9)) as ending:
            await (quick.reset(one, 500.0) if verb == "reset" else quick.hold(one))
        assert await ending == []


async def test_what_is_being_claimed_while_it_is_withdrawn_is_not_withdrawn(
    place: QueueLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer delivers it: then it is told of, and its result counts."""
    monkeypatch.setattr(store_module, "KEEP_SECONDS", 0.05)
    async with gateways(place) as (slow, quick):
        one = await queued(slow)
        async with connected(place.url) as claiming:
            claim = claiming.transaction()
            await claim.start()
            await claiming.fetch(quick._statements.claim, quick.beats.incarnation, "up", 9)
            slow._withdrawn[one] = 0
            async with connected(place.url) as looking, asyncio.timeout(30):
                while not await looking.fetch(WAITING, f'%"{place.schema}".dlv%'):
                    assert one in slow._withdrawn
            await claim.commit()
        await eventually(lambda: slow.figures.unanswered == 1)
        assert (await quick.show(one)).gateways == ["quick"]


async def test_a_claim_that_fails_for_one_destination_keeps_what_it_has_for_another(place: QueueLocation) -> None:
    """As where the disk of the database is full: nobody else would ever let go of those that are leased."""
    async with gateways(place) as (gateway, _), connected(place.url) as other:
        await queued(gateway)
        await queued(gateway, message(destination="second"))
        await other.execute(
            f"CREATE FUNCTION {place.schema}.no_room() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'no room' USING ERRCODE = 'disk_full'; END $$;"
            f" CREATE TRIGGER no_room BEFORE UPDATE ON {place.schema}.dlv FOR EACH ROW WHEN (NEW.dest = 'second')"
            f" EXECUTE FUNCTION {place.schema}.no_room()"
        )
        claimed, _ = await gateway.claim({"up": 9, "second": 9})
        assert [lease.destination for lease, _ in claimed] == ["up"]


async def test_what_ends_while_lost_leases_are_looked_for_is_not_delivered_again(
    place: QueueLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look sees a delivery that is leased; when its answer comes, that has ended, and nobody knows of it."""
    async with CuttingProxy(server().port) as proxy:
        behind = dataclasses.replace(place, url=place.url.replace(str(server().port), str(proxy.port)))
        gateway = store(behind)
        await gateway.open()
        lost, new = await queued(gateway), message(destination="elsewhere")
        proxy.cut("claims")
        with pytest.raises(StorageAway):
            await leased(gateway)
        known = gateway._unknown_leases

        async def ends_meanwhile(*asked: Any) -> Sequence[Any]:
            (lease,) = await gateway.submit(new, await written(gateway.draft()), lease=True)
            held = gateway._held.copy()
            gateway._held.clear()
            rows = await known(*asked)  # as the database saw it before that ended
            gateway._held.update(held)
            await gateway.finish(lease, DELIVERED)
            monkeypatch.setattr(gateway, "_unknown_leases", known)
            return rows

        monkeypatch.setattr(gateway, "_unknown_leases", ends_meanwhile)
        found: list[str] = []
        async with asyncio.timeout(leasing_module.ADOPT_SECONDS):
            while not found:
                try:
                    found = [lease.message_id for lease in await leased(gateway)]
                except StorageAway:
                    await asyncio.sleep(0.01)
        assert found == [lost]
        await gateway.close()
