"""The log's groups: who shares a sync, and that nobody is left behind."""

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded.files import write_durably
from otel_smtp.spool.embedded.log import Step
from otel_smtp.spool.messages import End, SpoolError, StorageFull, Verdict
from tests.spool.embedded.test_recovery import ids_in, left_by_a_crash, opened
from tests.spool.messages import BODY, HEADER, TRACE_ID, message, queued, written
from tests.spool.queueing import eventually
from tests.spool.stores import SEGMENT_OCTETS

DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)


@pytest.mark.both_loops
async def test_a_result_that_may_wait_is_written_all_the_same(tmp_path: Path) -> None:
    """One after the other, so that each is the last that anybody asks for: a timer alone wakes the log."""
    async with opened(tmp_path / "spool") as (store, _):
        for _ in range(60):
            (lease,) = await store.submit(message(), await written(store.draft()), lease=True)
            async with asyncio.timeout(10):
                await store.finish(lease, DELIVERED, is_urgent=False)
        assert await ids_in(store) == []


class _EarlyTimers:
    """A loop whose timers fire before their time, as some do by a millisecond, and by chance at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def call_later(self, _: float, callback: Callable[[], None]) -> asyncio.Handle:
        return self._loop.call_soon(callback)

    def call_soon(self, callback: Callable[[], None]) -> asyncio.Handle:
        return self._loop.call_soon(callback)

    def call_soon_threadsafe(self, callback: Callable[..., None], *arguments: object) -> asyncio.Handle:
        return self._loop.call_soon_threadsafe(callback, *arguments)


async def test_a_timer_that_fires_early_leaves_no_result_behind(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool") as (store, _):
        store.journal.log._loop = _EarlyTimers(asyncio.get_running_loop())  # type: ignore[assignment]
        for number in range(60):
            leases = [
                *await store.submit(message(), await written(store.draft()), lease=True),
                *await store.submit(message(), await written(store.draft()), lease=True),
            ]
            async with asyncio.timeout(10):
                first = store.finish(leases[0], DELIVERED, is_urgent=False)
                await asyncio.sleep(0)  # the timer has fired
                if number % 2:
                    await first
                await asyncio.gather(first, store.finish(leases[1], DELIVERED, is_urgent=False))
        assert await ids_in(store) == []


async def test_what_comes_at_the_same_time_shares_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path / "spool") as (store, _):
        await queued(store)
        syncs = 0

        def count(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
            nonlocal syncs
            syncs += 1
            return write_durably(file, data, at, in_one_call=in_one_call)

        monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", count)
        await asyncio.gather(*[queued(store) for _ in range(100)])
        monkeypatch.undo()
        assert syncs < 20


async def test_what_is_more_than_a_group_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing comes behind it that would wake the log."""
    monkeypatch.setattr("otel_smtp.spool.embedded.log.GROUP_MOST", 3)
    async with opened(tmp_path / "spool") as (store, _):
        drafts = [await written(store.draft()) for _ in range(10)]
        async with asyncio.timeout(30):
            await asyncio.gather(*[store.submit(message(), draft, lease=False) for draft in drafts])
        assert len(await ids_in(store)) == 10


@pytest.mark.parametrize("body", [BODY, b"x" * 200_000], ids=["small", "large"])
async def test_what_was_written_and_not_promised_is_not_there_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    """Its client heard 451 and sends it again."""

    def write_and_fail(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
        write_durably(file, data, at, in_one_call=in_one_call)
        raise OSError(errno.ENOSPC, "no space, says the sync")

    async with opened(tmp_path / "spool") as (store, _):
        kept = await queued(store)
        monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", write_and_fail)
        with pytest.raises(StorageFull):
            await queued(store, None, HEADER, body)
        monkeypatch.undo()
        assert [file for room in ("large", "tmp") for file in (store.directory.path / room).iterdir()] == []
        crashed = left_by_a_crash(store)  # before anything is written in its place
    async with opened(crashed) as (store, _):
        assert await ids_in(store) == [kept]


async def test_a_bug_of_ours_leaves_nobody_without_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Step[object]) -> None:
        raise ZeroDivisionError

    async with opened(tmp_path / "spool") as (store, _):
        for kind in Step.__subclasses__():
            monkeypatch.setattr(kind, "is_durable", fail)
        async with asyncio.timeout(30):
            with pytest.raises(SpoolError, match="internal error"):
                await queued(store)
        monkeypatch.undo()
        await queued(store)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The octets of each group that was written."""
    found: list[int] = []

    def note(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
        found.append(len(data))
        return write_durably(file, data, at, in_one_call=in_one_call)

    monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", note)
    return found


async def test_messages_wait_until_half_of_those_on_their_way_are_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: list[int]
) -> None:
    monkeypatch.setattr("otel_smtp.spool.embedded.log.COMPANY_SECONDS", 3600.0)
    async with opened(tmp_path / "spool") as (store, _):
        drafts = [await written(store.draft()) for _ in range(4)]
        first = store.submit(message(), drafts[0], lease=False)
        await asyncio.sleep(0.02)
        assert not writes, "three are expected"
        async with asyncio.timeout(30):
            await asyncio.gather(first, store.submit(message(), drafts[1], lease=False))
            assert len(writes) == 1
            # Neither of the other two waits for another.
            await store.submit(message(), drafts[2], lease=False)
            await store.submit(message(), drafts[3], lease=False)
        assert len(writes) == 3


async def test_those_on_their_way_have_another_turn_of_the_loop_before_the_thread_is_woken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: list[int]
) -> None:
    monkeypatch.setattr("otel_smtp.spool.embedded.log.COMPANY_SECONDS", 3600.0)
    async with opened(tmp_path / "spool") as (store, _):
        log = store.journal.log
        await eventually(lambda: log.is_idle)
        woken_for: list[int] = []
        wake = log._wake

        def note() -> None:
            woken_for.append(len(log._steps))
            wake()

        monkeypatch.setattr(log, "_wake", note)
        drafts = [await written(store.draft()) for _ in range(4)]
        first = [store.submit(message(), draft, lease=False) for draft in drafts[:2]]
        await asyncio.sleep(0)
        assert woken_for == [], "half of them are complete"
        second = [store.submit(message(), draft, lease=False) for draft in drafts[2:]]
        async with asyncio.timeout(30):
            await asyncio.gather(*first, *second)
        assert (woken_for, len(writes)) == ([4], 1)


async def test_a_message_waits_no_longer_for_those_that_will_not_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otel_smtp.spool.embedded.log.COMPANY_SECONDS", 3600.0)
    async with opened(tmp_path / "spool") as (store, _):
        given_up, other = store.draft(), store.draft()
        waiting = store.submit(message(), await written(store.draft()), lease=False)
        await asyncio.sleep(0.02)
        assert not waiting.done()
        given_up.discard()
        async with asyncio.timeout(30):
            await waiting
            given_up.discard()
            other.discard()
            await queued(store)  # alone: it waits for nobody


async def test_slow_messages_are_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(tmp_path / "spool") as (store, _):
        slow = [store.draft(), store.draft()]
        async with asyncio.timeout(30):
            await queued(store)
            monkeypatch.setattr("otel_smtp.spool.embedded.log.COMPANY_SECONDS", 3600.0)
            await queued(store)
            for draft in slow:
                draft.discard()
            await queued(store)
            # Who comes after that is expected again.
            others = [store.draft(), store.draft()]
            waiting = store.submit(message(), await written(store.draft()), lease=False)
            await asyncio.sleep(0.02)
            assert not waiting.done()
            others[0].discard()
            await waiting


async def test_results_wait_for_the_next_message_also_while_the_log_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otel_smtp.spool.embedded.log.GATHER_SECONDS", 3600.0)
    async with opened(tmp_path / "spool") as (store, _):
        (lease,) = await store.submit(message(), await written(store.draft()), lease=True)
        begun, may_end, writes = threading.Event(), threading.Event(), 0

        def write_slowly(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
            nonlocal writes
            writes += 1
            begun.set()
            assert may_end.wait(30)
            return write_durably(file, data, at, in_one_call=in_one_call)

        monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", write_slowly)
        first = store.submit(message(), await written(store.draft()), lease=False)
        assert await asyncio.to_thread(begun.wait, 30)
        result = store.finish(lease, DELIVERED, is_urgent=False)
        may_end.set()
        await first
        assert not result.done()
        second = store.submit(message(), await written(store.draft()), lease=False)
        async with asyncio.timeout(30):
            await asyncio.gather(second, result)
        assert writes == 2


async def test_a_disk_that_takes_less_than_it_is_given_is_given_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, pwritev = os.pwrite, os.pwritev

    def write_less(file: int, buffers: list[bytes], at: int, flags: int) -> int:
        return pwritev(file, [buffers[0][: max(1, len(buffers[0]) // 3)]], at, flags)

    monkeypatch.setattr(os, "pwrite", lambda file, data, at: pwrite(file, data[: max(1, len(data) // 3)], at))
    monkeypatch.setattr(os, "pwritev", write_less)
    async with opened(tmp_path / "spool") as (store, _):
        one = await queued(store, None, HEADER, BODY * 100)
        monkeypatch.undo()
        content = (await store.show(one)).content
        assert await store.is_intact(content)
        assert await store.read(content, 0, 10_000) == HEADER + BODY * 100


async def test_where_no_segment_can_be_made_mail_is_refused_and_results_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b"\r\n" + b"y" * 60_000
    async with opened(tmp_path / "spool") as (store, _):
        (lease,) = await store.submit(message(), await written(store.draft()), lease=True)

        def full(octets: int, *, is_for_results: bool) -> tuple[Path, int, bool]:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(store.directory, "take_spare", full)
        taken = SEGMENT_OCTETS * 15 // 16 // 60_500
        for _ in range(taken):
            await queued(store, None, HEADER, body)
        with pytest.raises(StorageFull):
            await queued(store, None, HEADER, body)
        assert store.refusal() is None, "it may be taken again as soon as there is room"
        await store.finish(lease, DELIVERED)
        assert len(await ids_in(store)) == taken
        monkeypatch.undo()
        await queued(store, None, HEADER, body)


async def test_what_is_being_written_is_shown_and_counted_as_it_is(tmp_path: Path) -> None:
    """A message whose change is on its way to the disk cannot be written into the index, and is there all the same."""
    async with opened(tmp_path / "spool") as (store, _):
        for _ in range(30):
            (lease,) = await store.submit(message(), await written(store.draft()), lease=True)
            finishing = store.finish(lease, (), retry_in=3600)
            shown, found, others, counts = await asyncio.gather(
                store.page("", 10),
                store.find(recipient="user@example.net", sender="app@example.com", trace_id=TRACE_ID, most=10),
                asyncio.gather(
                    store.find(recipient="other@example.net", most=10),
                    store.find(sender="other@example.com", most=10),
                    store.find(trace_id="f" * 32, most=10),
                ),
                store.counts(),
            )
            await finishing
            assert [one.id for one in shown] == [one.id for one in found] == [lease.message_id]
            assert not any(others)
            assert counts.total == 1
            await store.delete(lease.message_id)
