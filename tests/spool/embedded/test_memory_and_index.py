"""Messages that go from memory to the index, or change, while something else is done with them."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.messages import DeliveryState, End, Verdict
from tests.spool.embedded.test_recovery import left_by_a_crash
from tests.spool.messages import HEADER, leased, message, queued
from tests.spool.stores import SEGMENT_OCTETS

DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[EmbeddedStore]:
    store = EmbeddedStore(path, least_free_octets=0, segment_octets=SEGMENT_OCTETS)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def in_the_index(tmp_path: Path) -> str:
    """The id of a message for `up` in the spool below `tmp_path`, which no store has in memory."""
    async with opened(tmp_path / "spool") as store:
        return await queued(store, message(sender="one@example.com"))


@asynccontextmanager
async def index_held(store: EmbeddedStore) -> AsyncIterator[None]:
    """Within, the index does nothing yet of what it is asked."""
    may_go_on = threading.Event()
    held = asyncio.ensure_future(store.index.call(lambda: may_go_on.wait(30)))
    await asyncio.sleep(0)
    try:
        yield
    finally:
        may_go_on.set()
        await held


async def test_what_is_written_to_the_index_while_it_is_claimed_is_claimed_once(
    tmp_path: Path, in_the_index: str
) -> None:
    async with opened(tmp_path / "spool") as store:
        in_memory = await queued(store, message(sender="two@example.com"))
        async with index_held(store):
            flushing = asyncio.ensure_future(store.page("", 10))
            await asyncio.sleep(0)
            claiming = asyncio.ensure_future(store.claim({"up": 10}))
            await asyncio.sleep(0)
        claimed, _ = await claiming
        await flushing
        assert sorted(lease.message_id for lease, _ in claimed) == [in_the_index, in_memory]


async def test_what_an_operator_holds_while_another_destination_is_looked_at_is_not_claimed(
    tmp_path: Path, in_the_index: str
) -> None:
    async with opened(tmp_path / "spool") as store:
        in_memory = await queued(store, message(destination="elsewhere"))
        async with index_held(store):
            claiming = asyncio.ensure_future(store.claim({"elsewhere": 10, "up": 10}))
            await asyncio.sleep(0)
            assert await store.hold(in_memory)
        claimed, _ = await claiming
        assert [lease.message_id for lease, _ in claimed] == [in_the_index]
        assert (await store.show(in_memory)).state is DeliveryState.HELD


async def test_what_an_operator_makes_due_while_another_destination_is_looked_at_is_claimed_the_next_time(
    tmp_path: Path, in_the_index: str
) -> None:
    async with opened(tmp_path / "spool") as store:
        in_memory = await queued(store, message(destination="elsewhere"))
        async with index_held(store):
            claiming = asyncio.ensure_future(store.claim({"elsewhere": 10, "up": 10}))
            await asyncio.sleep(0)
            assert await store.retry(in_memory)
        claimed, _ = await claiming
        assert [lease.message_id for lease, _ in claimed] == [in_the_index]
        claimed, _ = await store.claim({"elsewhere": 10})
        assert [lease.message_id for lease, _ in claimed] == [in_memory]


async def test_no_message_is_passed_over_between_pages_where_one_ends_meanwhile(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool") as store:
        ids = [await queued(store) for _ in range(4)]
        await store.page("", 10)  # they are in the index
        leases = await leased(store, most=2)
        assert [lease.message_id for lease in leases] == ids[:2]
        async with index_held(store):
            paging = asyncio.ensure_future(store.page("", 1))
            await asyncio.sleep(0)
            for lease in leases:
                await store.finish(lease, DELIVERED, is_possible_duplicate=False)
            last = await queued(store)
        found = [shown.id for shown in await paging]
        assert found, "no page is empty before the last one"
        while page := await store.page(found[-1], 1):
            found += [shown.id for shown in page]
        assert found == [*ids[2:], last]


async def test_an_id_that_comes_again_once_its_message_has_ended_is_another_message(tmp_path: Path) -> None:
    """As where mail is moved away and back. The index knows the first one still; the log tells them apart."""
    async with opened(tmp_path / "spool") as store:
        new = message()
        await queued(store, new, HEADER, b"\r\nfirst\r\n")
        assert [shown.id for shown in await store.page("", 10)] == [new.id]  # it is in the index
        (lease,) = await leased(store)
        await store.finish(lease, DELIVERED)
        between = await queued(store)
        await queued(store, new, HEADER, b"\r\nsecond\r\n")
        crashed = left_by_a_crash(store)
        await is_second(store, new.id, between)
    async with opened(crashed) as store:
        await is_second(store, new.id, between)


async def is_second(store: EmbeddedStore, again: str, between: str) -> None:
    assert [shown.id for shown in await store.page("", 10)] == sorted([again, between])
    assert (await store.counts()).total == 2
    content = (await store.show(again)).content
    assert await store.read(content, 0, 1000) == HEADER + b"\r\nsecond\r\n"
    assert sorted(lease.message_id for lease in await leased(store)) == sorted([again, between])
