"""Segments that are moved out of and used again while everything else goes on."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.files import write_durably
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.messages import DeliveryState, End, Lease, Verdict
from tests.spool.embedded.test_recovery import ids_in, left_by_a_crash, opened, segments
from tests.spool.messages import BODY, HEADER, leased, message, queued, written
from tests.spool.queueing import eventually

SEGMENT_OCTETS = 256 * 1024
FILLING = b"\r\n" + b"x" * 60_000
DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)
PATIENCE_SECONDS = 30

T = TypeVar("T")


@asynccontextmanager
async def opened_without_keeper(path: Path) -> AsyncIterator[EmbeddedStore]:
    """A store whose keeping is left to the test."""
    async with opened(path, segment_octets=SEGMENT_OCTETS) as (store, _):
        assert store._keeper is not None
        store._keeper.cancel()
        yield store


async def begin_segments(store: EmbeddedStore, up_to: int) -> None:
    """Let mail come and go until the log is in a segment of that number."""
    while store.journal.log.told[0] < up_to:
        for lease in await store.submit(message(), await written(store.draft(), HEADER, FILLING), lease=True):
            await store.finish(lease, DELIVERED)


async def is_found_after_a_crash(store: EmbeddedStore, kept: str) -> None:
    """It is there, whole, now and after a crash, with the index and without."""
    assert await store.is_intact((await store.show(kept)).content)
    crashed = left_by_a_crash(store)
    for loses_index in (False, True):
        if loses_index:
            (crashed / "index.db").unlink()
        async with opened(crashed, segment_octets=SEGMENT_OCTETS) as (after, recovery):
            assert (list(recovery.lost), list(recovery.alarms)) == ([], [])
            assert await ids_in(after) == [kept]
            assert await after.is_intact((await after.show(kept)).content)


async def test_a_message_that_is_moved_while_the_index_takes_it_is_found_where_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempt has just ended, and the index is being given its row, with its place of before."""
    async with opened_without_keeper(tmp_path / "spool") as store:
        kept = await queued(store)
        (lease,) = await leased(store)
        await begin_segments(store, 5)
        loop = asyncio.get_running_loop()
        in_segment, write = Index.in_segment, Index.write
        writing: list[asyncio.Task[None]] = []
        has_moved = threading.Event()

        async def end_attempt_and_write() -> None:
            await store.finish(lease, (), retry_in=900.0)
            writing.append(loop.create_task(store.indexing.write_all()))  # as sweeps and operators' questions do

        def find(index: Index, segment: int, most: int) -> list[str]:
            if not writing:
                asyncio.run_coroutine_threadsafe(end_attempt_and_write(), loop).result(PATIENCE_SECONDS)
            return in_segment(index, segment, most)

        def write_once_it_has_moved(index: Index, *what: Any) -> None:
            if writing:
                assert has_moved.wait(PATIENCE_SECONDS)
            write(index, *what)

        monkeypatch.setattr(Index, "in_segment", find)
        monkeypatch.setattr(Index, "write", write_once_it_has_moved)
        compacting = asyncio.ensure_future(store.compaction.compact())
        await eventually(lambda: (entry := store.memory.hot.get(kept)) and entry.place and entry.place.segment > 1)
        has_moved.set()
        await compacting
        await asyncio.gather(*writing)
        await store.indexing.write_all()
        assert segments(tmp_path / "spool")[0].name > "000000000001"
        assert kept not in store.memory.hot, "the index is asked for it"
        await is_found_after_a_crash(store, kept)


class SlowDisk:
    """Lets the log's thread write when it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._may_write = threading.Event()
        self._may_write.set()
        self._is_asked = threading.Event()
        monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", self._write)

    def _write(self, file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
        self._is_asked.set()
        assert self._may_write.wait(PATIENCE_SECONDS)
        return write_durably(file, data, at, in_one_call=in_one_call)

    async def hold(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin something, and hold its record up."""
        self._is_asked.clear()
        self._may_write.clear()
        task = asyncio.ensure_future(work)
        await eventually(self._is_asked.is_set)
        return task

    def go_on(self) -> None:
        self._may_write.set()


async def test_a_message_whose_move_nobody_waits_for_is_changed_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    async with opened_without_keeper(tmp_path / "spool") as store:
        kept = await queued(store, message(due_in_seconds=900.0))
        await begin_segments(store, 5)
        compacting = await disk.hold(store.compaction.compact())
        compacting.cancel()
        await asyncio.wait([compacting])
        holding = asyncio.ensure_future(store.hold(kept))
        await asyncio.sleep(0)  # it has begun
        disk.go_on()
        assert await holding
        await store.compaction.compact()
        assert segments(tmp_path / "spool")[0].name > "000000000001"
        assert (await store.show(kept)).state is DeliveryState.HELD
        await is_found_after_a_crash(store, kept)


async def test_the_last_mail_of_a_segment_may_end_while_the_index_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SlowDisk(monkeypatch)
    has_ended = threading.Event()
    write = Index.write

    def write_once_it_has_ended(index: Index, *what: Any) -> None:
        assert has_ended.wait(PATIENCE_SECONDS)
        write(index, *what)

    async with opened_without_keeper(tmp_path / "spool") as store:
        (lease,) = await store.submit(message(), await written(store.draft()), lease=True)
        await begin_segments(store, 5)
        await queued(store, message(due_in_seconds=900.0))
        ending = await disk.hold(finish(store, lease))
        monkeypatch.setattr(Index, "write", write_once_it_has_ended)
        compacting = asyncio.ensure_future(store.compaction.compact())
        await asyncio.sleep(0)  # what goes into the index is chosen: not what is busy
        disk.go_on()
        await ending
        has_ended.set()
        await compacting
        assert [int(file.name) for file in segments(tmp_path / "spool")] == [5]
    assert not caplog.records


async def test_a_segment_stays_until_the_index_is_complete_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing lives in it any more, but one that did is changed each time that the index could be given its row: were
    the segment to go, an index that is complete up to a place in it would belong to no log."""
    disk, path = SlowDisk(monkeypatch), tmp_path / "spool"
    async with opened_without_keeper(path) as store:
        kept = await queued(store, message(due_in_seconds=900.0))
        await begin_segments(store, 3)
        changes = [await disk.hold(store.retry(kept))]
        write_all = store.indexing.write_all
        is_moved = asyncio.Event()

        async def write_all_but_this() -> None:
            entry = store.memory.hot[kept]
            if entry.place is not None and entry.place.segment > 1:
                changes.append(await disk.hold(store.retry(kept)))
                is_moved.set()
            await write_all()

        monkeypatch.setattr(store.indexing, "write_all", write_all_but_this)
        compacting = asyncio.ensure_future(store.compaction.compact())
        await eventually(lambda: kept in store.memory._free)  # that it is changed is found out, and waited for
        disk.go_on()
        await is_moved.wait()
        await compacting
        monkeypatch.setattr(store.indexing, "write_all", write_all)
        assert segments(path)[0].name == "000000000001"
        async with opened(left_by_a_crash(store), segment_octets=SEGMENT_OCTETS) as (after, recovery):
            assert not [one for one in recovery.remarks if "made again" in one]
            assert await ids_in(after) == [kept]
        disk.go_on()
        await asyncio.gather(*changes)
        await store.compaction.compact()
        assert segments(path)[0].name > "000000000001"
        await is_found_after_a_crash(store, kept)


@pytest.mark.parametrize("verb", ["read", "is_intact"])
async def test_a_content_that_is_moved_while_it_is_read_is_read_where_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Mail that waits is read for a warning, for another queue and by operators."""
    async with opened_without_keeper(tmp_path / "spool") as store:
        kept = await queued(store, message(due_in_seconds=900.0))
        await begin_segments(store, 5)
        loop, read = asyncio.get_running_loop(), SpoolDirectory.read
        first: list[Path] = []

        def read_once_it_has_moved(directory: SpoolDirectory, path: Path, at: int, octets: int) -> bytes:
            if not first:
                first.append(path)
                asyncio.run_coroutine_threadsafe(store.compaction.compact(), loop).result(PATIENCE_SECONDS)
                assert not path.exists()
            return read(directory, path, at, octets)

        content = (await store.show(kept)).content
        monkeypatch.setattr(SpoolDirectory, "read", read_once_it_has_moved)
        if verb == "read":
            assert await store.read(content, 0, 1000) == HEADER + BODY
        else:
            assert await store.is_intact(content)
        assert first


async def finish(store: EmbeddedStore, lease: Lease) -> None:
    await store.finish(lease, DELIVERED)
