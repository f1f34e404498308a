"""Messages that go from memory to the index while something else is done with them."""

import asyncio
import threading
from pathlib import Path

from otel_smtp.spool.embedded import EmbeddedStore
from tests.spool.messages import message, queued
from tests.spool.stores import SEGMENT_OCTETS


def _at(path: Path) -> EmbeddedStore:
    return EmbeddedStore(path, least_free_octets=0, segment_octets=SEGMENT_OCTETS)


async def test_what_is_written_to_the_index_while_it_is_claimed_is_claimed_once(tmp_path: Path) -> None:
    before = _at(tmp_path / "spool")
    await before.open()
    in_the_index = await queued(before, message(sender="one@example.com"))
    await before.close()
    store = _at(tmp_path / "spool")
    await store.open()
    in_memory = await queued(store, message(sender="two@example.com"))
    may_go_on = threading.Event()
    held = asyncio.ensure_future(store._in_index(lambda: may_go_on.wait(30)))
    await asyncio.sleep(0)
    flushing = asyncio.ensure_future(store.page("", 10))
    await asyncio.sleep(0)
    claiming = asyncio.ensure_future(store.claim({"up": 10}))
    await asyncio.sleep(0)
    may_go_on.set()
    claimed, _ = await claiming
    await asyncio.gather(held, flushing)
    assert sorted(lease.message_id for lease, _ in claimed) == [in_the_index, in_memory]
    await store.close()
