"""All verbs at once, by many, while the threads of log and index take their time: nothing is lost or given twice.

What each verb does alone, the conformance suite says. Here each meets the others halfway: what is being recorded, what
goes into the index, what is read back from it, what is moved to another segment.
"""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded.files import write_durably
from otel_smtp.spool.embedded.index_thread import IndexThread
from tests.spool.embedded.books import books, recount
from tests.spool.embedded.test_recovery import ids_in, left_by_a_crash
from tests.spool.embedded.working import Ledger, Worker

WORKERS = 12
SEGMENT_OCTETS = 512 * 1024  # small: so that segments are moved out of and used again meanwhile


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
async def test_many_do_everything_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    call = IndexThread.call

    def write_slowly(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
        time.sleep(chance.choice((0.0, 0.0, 0.002, 0.01)))  # in the log's thread
        return write_durably(file, data, at, in_one_call=in_one_call)

    def call_slowly(thread: IndexThread, work: Callable[[], Any]) -> Any:
        def slowly() -> Any:
            time.sleep(chance.choice((0.0, 0.0, 0.002, 0.01)))  # in the index's thread
            return work()

        return call(thread, slowly)

    monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", write_slowly)
    monkeypatch.setattr(IndexThread, "call", call_slowly)
    ledger, compacting = Ledger(), asyncio.Lock()
    store = EmbeddedStore(tmp_path / "spool", least_free_octets=0, segment_octets=SEGMENT_OCTETS)
    await store.open()
    try:
        if store._keeper is not None:
            store._keeper.cancel()  # what it does, workers do, at all moments
        async with asyncio.timeout(120):
            await asyncio.gather(
                *[Worker(store, ledger, seed * 100 + number, compacting).run() for number in range(WORKERS)]
            )
        assert await ids_in(store) == sorted(ledger.bodies)
        assert dict(await store.tally()) == ledger.counted
        assert await books(store) == await recount(store)
        crashed = left_by_a_crash(store)
    finally:
        await store.close()
    monkeypatch.undo()
    for loses_index in (False, True):
        if loses_index:
            for file in crashed.glob("index.db*"):
                file.unlink()
        store = EmbeddedStore(crashed, least_free_octets=0, segment_octets=SEGMENT_OCTETS)
        recovery = await store.open()
        try:
            assert (list(recovery.lost), list(recovery.alarms)) == ([], [])
            assert await ids_in(store) == sorted(ledger.bodies)
            assert dict(await store.tally()) == ledger.counted
            assert await books(store) == await recount(store)
            for shown in await store.page("", 10_000):
                assert await store.read(shown.content, 0, shown.content.octets) == ledger.bodies[shown.id]
                assert await store.is_intact(shown.content)
        finally:
            await store.close()
