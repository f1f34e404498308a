"""What is found after a crash, with a damaged disk, or without an index: nothing that was answered is lost."""

import asyncio
import contextlib
import errno
import gc
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore, records
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.files import write_durably
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.embedded.records import RecordKind
from otel_smtp.spool.embedded.store import CRASHES_ALLOWED
from otel_smtp.spool.messages import (
    ContentLost,
    DeliveryState,
    End,
    Kind,
    SpoolError,
    StorageBroken,
    StorageFull,
    Verdict,
    new_id,
)
from otel_smtp.spool.store import Recovery
from tests.spool.messages import BODY, HEADER, leased, message, queued, written
from tests.spool.queueing import eventually
from tests.spool.stores import SEGMENT_OCTETS, alter

DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)
LARGE = b"x" * 200_000
COPIES_TRIED = 100


def at(path: Path, **more: object) -> EmbeddedStore:
    given: dict[str, object] = {"least_free_octets": 0, "segment_octets": SEGMENT_OCTETS, **more}
    return EmbeddedStore(path, **given)  # type: ignore[arg-type]


@asynccontextmanager
async def opened(path: Path, **more: object) -> AsyncIterator[tuple[EmbeddedStore, Recovery]]:
    store = at(path, **more)
    recovery = await store.open()
    try:
        yield store, recovery
    finally:
        await store.close()


def left_by_a_crash(store: EmbeddedStore) -> Path:
    """The files as a process leaves them that is killed now; the lock goes with the process."""
    copy = store.directory.path.with_name(f"crashed-{new_id()}")
    for _ in range(COPIES_TRIED):
        before = _files(store.directory.path)
        with contextlib.suppress(shutil.Error):  # a segment was given up meanwhile
            shutil.copytree(
                store.directory.path, copy, ignore=shutil.ignore_patterns("LOCK", "control", "spare*", "*reserve")
            )
            if _files(store.directory.path) == before:
                return copy
        shutil.rmtree(copy, ignore_errors=True)  # what was copied is no moment's state
    raise AssertionError("the store never rested")


def _files(directory: Path) -> dict[Path, tuple[int, int, int]]:
    """What changes when something is written, made, moved or removed."""
    found = {}
    for file in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            status = file.stat()
            found[file] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


async def ids_in(store: EmbeddedStore) -> list[str]:
    return [shown.id for shown in await store.page("", 1000)]


def segments(path: Path) -> list[Path]:
    return sorted(file for file in (path / "log").iterdir() if file.name.isdigit())


# Crashes ---------------------------------------------------------------------------------------------------------


async def test_what_was_submitted_survives_a_crash_and_what_was_not_is_cleared_away(store: EmbeddedStore) -> None:
    kept = await queued(store)
    large = await queued(store, None, HEADER, LARGE)
    big = store.draft()
    is_in_a_file = asyncio.Event()
    assert big.write(HEADER, is_in_a_file.set)
    assert not big.write(LARGE, is_in_a_file.set)
    await is_in_a_file.wait()
    store.directory.large("stray").write_bytes(b"synced, but never answered")
    crashed = left_by_a_crash(store)
    big.discard()
    async with opened(crashed) as (after, recovery):
        assert (recovery.messages, list(recovery.lost), list(recovery.remarks)) == (2, [], [])
        assert not list((crashed / "tmp").iterdir())
        assert after.directory.larges() == {large}
        assert await ids_in(after) == [kept, large]
        for lease in await leased(after):
            assert not lease.is_possible_duplicate
            assert await after.is_intact(lease.content)


async def test_an_attempt_that_a_crash_cut_short_counts_and_may_have_succeeded(store: EmbeddedStore) -> None:
    await queued(store)
    await leased(store)
    async with opened(left_by_a_crash(store)) as (after, recovery):
        assert recovery.interrupted == 1
        (lease,) = await leased(after)
        assert (lease.attempt, lease.is_possible_duplicate) == (2, True)


async def test_a_delivery_that_only_the_index_calls_leased_may_have_succeeded(store: EmbeddedStore) -> None:
    await queued(store)
    await store.page("", 1)  # it is in the index
    crashed = left_by_a_crash(store)
    database = sqlite3.connect(crashed / "index.db")
    database.execute("UPDATE delivery SET state = 'leased'")
    database.commit()
    database.close()
    async with opened(crashed) as (after, recovery):
        assert recovery.interrupted == 1
        (lease,) = await leased(after)
        assert lease.is_possible_duplicate


async def test_an_attempt_that_began_beside_new_mail_is_known_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of the lease comes before that of the new message: the index must not be said to be complete up to
    the latter while it does not know the former."""
    async with opened(tmp_path / "first") as (store, _):
        old = await queued(store)
    may_sync = threading.Event()
    may_sync.set()

    def write_when_told(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
        assert may_sync.wait(30)
        return write_durably(file, data, at, in_one_call=in_one_call)

    monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", write_when_told)
    async with opened(tmp_path / "first") as (store, _):  # the old one is in the index alone
        may_sync.clear()
        first = store.submit(message(destination="elsewhere"), await written(store.draft()), lease=False)
        await eventually(lambda: not store.journal.log._steps)  # its sync has begun; what follows shares the next one
        claiming = asyncio.ensure_future(store.claim({"up": 1}))
        await eventually(lambda: len(store.journal.log._steps) == 1)
        second = store.submit(message(destination="elsewhere"), await written(store.draft()), lease=False)
        may_sync.set()
        claimed, _ = await claiming
        await asyncio.gather(first, second)
        assert [lease.message_id for lease, _ in claimed] == [old]
        store.memory.unindexed.pop(next(iter(store.memory.unindexed)))  # as if it had come and gone
        await store.indexing.write(before=float("-inf"))  # writes no message, only up to where the index is complete
        crashed = left_by_a_crash(store)
    database = sqlite3.connect(crashed / "index.db")
    database.execute("UPDATE delivery SET state = 'ready' WHERE destination = 'up'")  # the log alone has to tell
    database.commit()
    database.close()
    async with opened(crashed) as (after, recovery):
        assert recovery.interrupted == 1
        (lease,) = await leased(after)
        assert (lease.message_id, lease.is_possible_duplicate) == (old, True)


@pytest.mark.parametrize("is_new", [False, True], ids=["claimed", "leased as it came"])
async def test_what_is_leased_while_the_store_closes_was_part_of_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    """Its caller has been cancelled, and its record is on its way to the disk."""
    is_asked, may_write = threading.Event(), threading.Event()

    def write_when_told(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
        is_asked.set()
        assert may_write.wait(30)
        return write_durably(file, data, at, in_one_call=in_one_call)

    async with opened(tmp_path / "spool") as (store, _):
        if not is_new:
            await queued(store)
        monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", write_when_told)
        if is_new:
            store.submit(message(), await written(store.draft()), lease=True)
        else:
            claiming = asyncio.ensure_future(store.claim({"up": 1}))
            await eventually(is_asked.is_set)
            claiming.cancel()
        await eventually(is_asked.is_set)
        closing = asyncio.ensure_future(store.close())
        for _ in range(100):  # as far as it comes
            await asyncio.sleep(0)
        may_write.set()
        await closing
    async with opened(tmp_path / "spool") as (after, recovery):
        assert recovery.interrupted == 0
        (lease,) = await leased(after)
        assert lease.attempt == 1


async def test_what_is_part_of_three_crashes_is_held(store: EmbeddedStore) -> None:
    poison = await queued(store)
    path = store.directory.path
    for number in range(CRASHES_ALLOWED + 1):
        crashed = path.with_name(f"run{number}")
        async with opened(path) if number else _itself(store) as (current, recovery):
            assert list(recovery.held) == ([poison] if number == CRASHES_ALLOWED else [])
            if number == CRASHES_ALLOWED:
                assert await leased(current) == []
                assert await current.release(poison)
            assert len(await leased(current)) == 1
            shutil.copytree(path, crashed, ignore=shutil.ignore_patterns("LOCK", "spare*", "*reserve"))
        path = crashed


@pytest.mark.parametrize("between", ["deferred", "released"])
async def test_crashes_do_not_add_up_over_an_attempt_that_came_to_its_end_or_an_operator(
    store: EmbeddedStore, between: str
) -> None:
    one = await queued(store)
    path = store.directory.path
    for number in range(CRASHES_ALLOWED + 2):
        async with opened(path) if number else _itself(store) as (current, recovery):
            assert list(recovery.held) == []
            if between == "deferred":
                (lease,) = await leased(current)
                await current.finish(lease, (), retry_in=0)
            else:
                assert await current.hold(one)
                assert await current.release(one)
            assert len(await leased(current)) == 1
            path = left_by_a_crash(current)


@asynccontextmanager
async def _itself(store: EmbeddedStore) -> AsyncIterator[tuple[EmbeddedStore, Recovery]]:
    yield store, Recovery()


async def test_what_ended_stays_ended_and_the_books_are_balanced(store: EmbeddedStore) -> None:
    for number in range(30):
        await queued(store)
        (lease,) = await leased(store)
        await store.finish(lease, DELIVERED if number % 3 else (), retry_in=3600)
        if number == 15:
            await store.page("", 1)
    ids, tally = await ids_in(store), await store.tally()
    async with opened(left_by_a_crash(store)) as (after, _):
        assert await ids_in(after) == ids
        assert await after.tally() == tally
        assert tally["accepted"] == tally["delivered"] + len(ids)


async def test_a_message_that_ends_while_it_is_written_to_the_index_does_not_come_back(store: EmbeddedStore) -> None:
    for _ in range(50):
        await queued(store)
        (lease,) = await leased(store)
        listing = asyncio.create_task(store.page("", 10))
        await asyncio.sleep(0)
        await store.finish(lease, DELIVERED)
        await listing
    assert await ids_in(store) == []
    async with opened(left_by_a_crash(store)) as (after, _):
        assert await ids_in(after) == []


# Without an index that can be used -------------------------------------------------------------------------------


def _remove(index: Path) -> None:
    index.unlink()


def _truncate(index: Path) -> None:
    index.write_bytes(b"")


def _empty(index: Path) -> None:
    database = sqlite3.connect(index)
    database.execute("DELETE FROM message")
    database.execute("DELETE FROM delivery")
    database.commit()
    database.close()


def _empty_one_table(index: Path) -> None:
    database = sqlite3.connect(index)
    database.execute("DELETE FROM delivery WHERE number = 0 AND id = (SELECT max(id) FROM delivery)")
    database.commit()
    database.close()


def _forget(index: Path) -> None:
    database = sqlite3.connect(index)
    database.execute("DELETE FROM meta")
    database.commit()
    database.close()


def _scribble(index: Path) -> None:
    data = bytearray(index.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    index.write_bytes(data)


def _replace(index: Path) -> None:
    index.unlink()
    database = sqlite3.connect(index)
    database.execute("CREATE TABLE other(x)")
    database.commit()
    database.close()


def _newer(index: Path) -> None:
    database = sqlite3.connect(index)
    database.execute("PRAGMA user_version = 99")
    database.commit()
    database.close()


@pytest.mark.parametrize("is_orderly", [True, False], ids=["stopped", "killed"])
@pytest.mark.parametrize("harm", [_remove, _truncate, _empty, _empty_one_table, _forget, _scribble, _replace, _newer])
async def test_an_index_that_cannot_be_used_is_made_again_out_of_the_log(
    tmp_path: Path, harm: Callable[[Path], None], is_orderly: bool
) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        held = await queued(store)
        await store.hold(held)
        for _ in range(30):
            await queued(store)
        large = await queued(store, None, HEADER, LARGE)
        for number, lease in enumerate(await leased(store, most=10)):
            await store.finish(lease, DELIVERED if number % 2 else [Verdict(0, None, replies.UPSTREAM_UNAVAILABLE)])
        before = [repr(shown) for shown in await store.page("", 100)]
        tally = await store.tally()
        if not is_orderly:
            path = left_by_a_crash(store)
    for name in ("index.db-wal", "index.db-shm"):
        if (path / name).exists() and harm is not _remove:  # so that the harm is not undone by what it was made of
            database = sqlite3.connect(path / "index.db")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            database.close()
    harm(path / "index.db")
    async with opened(path) as (after, recovery):
        assert any("made again out of the log" in remark for remark in recovery.remarks)
        assert [repr(shown) for shown in await after.page("", 100)] == before
        assert await after.tally() == tally
        assert (await after.show(held)).state is DeliveryState.HELD
        content = (await after.show(large)).content
        assert await after.is_intact(content)
        assert await after.read(content, 0, 10**6) == HEADER + LARGE


async def test_an_older_index_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        first = await queued(store)
        gone = await queued(store)
    shutil.copy(path / "index.db", tmp_path / "older.db")
    async with opened(path) as (store, _):
        second = await queued(store)
        (lease,) = [lease for lease in await leased(store) if lease.message_id == gone]
        await store.finish(lease, DELIVERED)
    shutil.copy(tmp_path / "older.db", path / "index.db")
    async with opened(path) as (store, _):
        assert await ids_in(store) == [first, second]


async def test_an_index_of_another_spool_is_not_believed(tmp_path: Path) -> None:
    async with opened(tmp_path / "other") as (store, _):
        await queued(store)
    async with opened(tmp_path / "spool") as (store, _):
        one = await queued(store)
    shutil.copy(tmp_path / "other" / "index.db", tmp_path / "spool" / "index.db")
    async with opened(tmp_path / "spool") as (store, recovery):
        assert await ids_in(store) == [one]
        assert recovery.remarks


# Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_index", [True, False])
async def test_a_damaged_content_is_set_aside_and_the_rest_goes_on(store: EmbeddedStore, has_index: bool) -> None:
    ids = [await queued(store, None, HEADER, f"\r\nnumber {number}\r\n".encode()) for number in range(5)]
    if has_index:
        await store.page("", 1)
    crashed = left_by_a_crash(store)
    assert alter(crashed, b"number 2", b"NUMBER 2") == 1
    if not has_index:
        (crashed / "index.db").unlink()
    async with opened(crashed) as (after, recovery):
        assert await ids_in(after) == ids
        claimed = {lease.message_id: (lease, content) for lease, content in (await after.claim({"up": 10}))[0]}
        if has_index:  # found when it is read
            damaged, content = claimed[ids[2]]
            assert content is None
            assert not await after.is_intact(damaged.content)
        else:
            assert (await after.show(ids[2])).state is DeliveryState.CORRUPT
            assert list(recovery.lost) == [ids[2]]


@pytest.mark.parametrize("part", ["header", "text", "length"])
async def test_a_damaged_record_is_set_aside_and_the_rest_goes_on(store: EmbeddedStore, part: str) -> None:
    ids = [await queued(store) for _ in range(5)]
    crashed = left_by_a_crash(store)
    (crashed / "index.db").unlink()
    (segment,) = segments(crashed)
    data = bytearray(segment.read_bytes())
    text_at = data.find(ids[2].encode())
    marker = bytes(data[records.FIRST : records.FIRST + 8])
    header_at = data.rfind(marker, 0, text_at)
    harmed = {"header": header_at + 9, "length": header_at + 13, "text": text_at}[part]
    data[harmed] ^= 0xFF
    segment.write_bytes(data)
    async with opened(crashed) as (after, recovery):
        assert await ids_in(after) == [one for one in ids if one != ids[2]]
        assert any("damaged" in alarm for alarm in recovery.alarms)
        kept = b"".join(file.read_bytes() for file in (crashed / "lost+found").iterdir())
        assert BODY in kept, "the mail is there for people to look at"
    async with opened(crashed) as (after, recovery):
        assert await ids_in(after) == [one for one in ids if one != ids[2]]


def _damage(segment: Path, kind: RecordKind, number: int = 0) -> None:
    """Make the text of a segment's record unreadable, the first of its kind or a later one."""
    data = bytearray(segment.read_bytes())
    found = records.scan(bytes(data), bytes(data[records.FIRST : records.FIRST + 8]))
    record = [one for one in found if isinstance(one, records.Record) and one.kind == kind][number]
    data[record.content_at - 1] ^= 0xFF
    segment.write_bytes(data)


@pytest.mark.parametrize("kind", [RecordKind.MESSAGE, RecordKind.END])
async def test_damage_to_what_the_index_knows_does_not_change_the_tally(tmp_path: Path, kind: RecordKind) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        for _ in range(3):
            await queued(store)
        (lease, *_) = await leased(store)
        await store.finish(lease, DELIVERED)
    _damage(segments(path)[-1], kind)
    for _ in range(2):  # the index that the first start leaves behind is as good
        async with opened(path) as (store, recovery):
            assert any("damaged" in alarm for alarm in recovery.alarms)
            assert await store.tally() == {"accepted": 3, "delivered": 1}


async def test_what_ended_has_come_though_its_record_is_damaged(store: EmbeddedStore) -> None:
    await queued(store, message("1@x.example", "2@x.example"))
    for sender in ("", "app@example.com"):
        await queued(store, message(sender=sender, kind=Kind.MAIL if sender else Kind.BOUNCE))
    (first, *_) = await leased(store)
    await store.finish(first, [Verdict(number, End.DELIVERED, replies.OK) for number in range(2)])
    crashed = left_by_a_crash(store)
    (crashed / "index.db").unlink()
    (segment,) = segments(crashed)
    _damage(segment, RecordKind.MESSAGE)
    async with opened(crashed) as (after, _):
        assert await after.tally() == {"accepted": 3, "delivered": 2, "notified": 1}


async def test_a_segment_whose_first_record_is_damaged_is_counted_after_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    for _ in range(2):  # each start begins a segment
        async with opened(path) as (store, _):
            await queued(store)
            await queued(store)
            (lease, *_) = await leased(store)
            await store.finish(lease, DELIVERED)
    (path / "index.db").unlink()
    _damage(segments(path)[-1], RecordKind.BEGIN)
    async with opened(path) as (store, _):
        assert await store.tally() == {"accepted": 4, "delivered": 2}


async def test_the_tally_outlives_the_log(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        await queued(store)
        (lease, *_) = await leased(store)
        await store.finish(lease, DELIVERED)
    for segment in segments(path):
        segment.unlink()
    for _ in range(2):
        async with opened(path) as (store, _):
            assert await store.tally() == {"accepted": 1, "delivered": 1}


async def test_a_large_content_whose_record_is_damaged_is_kept(store: EmbeddedStore) -> None:
    large = await queued(store, None, HEADER, LARGE)
    last = await queued(store)
    crashed = left_by_a_crash(store)
    (crashed / "index.db").unlink()
    assert alter(crashed, f'"{large}'.encode(), f'"X{large[1:]}'.encode()) == 1
    async with opened(crashed) as (after, _):
        assert await ids_in(after) == [last]
        assert (crashed / "lost+found" / large).read_bytes().startswith(HEADER + LARGE)
        assert after.alarm() is not None


async def test_an_index_that_breaks_stops_the_taking_of_mail(store: EmbeddedStore) -> None:
    await queued(store)
    index = store.index.index
    assert index is not None
    index._database.execute("DROP TABLE delivery")
    with pytest.raises(StorageBroken):
        await store.page("", 1)
    assert isinstance(store.refusal(), StorageBroken)
    with pytest.raises(StorageBroken):
        await queued(store)
    crashed = left_by_a_crash(store)
    async with opened(crashed) as (_, recovery):
        assert recovery.messages == 1
        assert any("made again" in remark for remark in recovery.remarks)


async def test_a_damaged_head_of_a_segment_costs_nothing(store: EmbeddedStore) -> None:
    one = await queued(store)
    crashed = left_by_a_crash(store)
    (segment,) = segments(crashed)
    data = bytearray(segment.read_bytes())
    data[10] ^= 0xFF
    segment.write_bytes(data)
    async with opened(crashed) as (after, recovery):
        assert await ids_in(after) == [one]
        assert any("head" in remark for remark in recovery.remarks)


@pytest.mark.parametrize("cut", ["within the text", "within the content", "within a step"])
async def test_a_torn_tail_is_cut_off_and_told(store: EmbeddedStore, cut: str) -> None:
    """A record that was not whole on the disk: nobody was answered for it."""
    kept = await queued(store)
    (lease,) = await leased(store)
    last = message("notice@x.example", sender="", destination="back")
    await store.finish(lease, [Verdict(0, End.FAILED)], notices=[(last, HEADER + BODY)])
    crashed = left_by_a_crash(store)
    (segment,) = segments(crashed)
    data = bytearray(segment.read_bytes())
    text_at = data.rfind(last.id.encode())
    marker = bytes(data[records.FIRST : records.FIRST + 8])
    start = {
        "within the text": text_at + 10,
        "within the content": data.rfind(BODY),
        "within a step": data.rfind(marker, 0, text_at),
    }[cut]
    data[start : start + 5000] = bytes(5000)
    segment.write_bytes(data)
    async with opened(crashed) as (after, recovery):
        # The end of the first message was one step with its notice: neither has happened.
        assert await ids_in(after) == [kept]
        assert await after.tally() == {"accepted": 1}
        if cut != "within a step":
            assert any("torn" in remark for remark in recovery.remarks)
        assert recovery.interrupted == 1
    async with opened(crashed) as (after, _):
        assert await ids_in(after) == [kept]


async def test_a_message_cannot_pass_for_records(tmp_path: Path) -> None:
    """A content that holds octets of the log itself is a content, also where what is around it is damaged."""
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        first = await queued(store)
    (segment,) = segments(path)
    forged = segment.read_bytes()[: 4 * 1024]
    async with opened(path) as (store, _):
        second = await queued(store, None, HEADER, b"\r\n" + forged)
        third = await queued(store)
    for file in segments(path):
        data = bytearray(file.read_bytes())
        if (text_at := data.find(second.encode())) > 0:
            data[data.rfind(bytes(data[records.FIRST : records.FIRST + 8]), 0, text_at) + 9] ^= 0xFF
            file.write_bytes(data)
    (path / "index.db").unlink()
    async with opened(path) as (store, recovery):
        assert await ids_in(store) == [first, third]
        assert any("damaged" in alarm for alarm in recovery.alarms)


async def test_a_segment_that_is_gone_is_an_alarm_and_never_a_delivery(store: EmbeddedStore) -> None:
    lost = await queued(store)
    await store.page("", 1)
    crashed = left_by_a_crash(store)
    for segment in segments(crashed):
        segment.unlink()
    async with opened(crashed) as (after, recovery):
        assert list(recovery.lost) == [lost]
        assert await leased(after) == []
        assert (await after.counts()).corrupt == 1
        with pytest.raises(ContentLost):
            await after.read((await after.show(lost)).content, 0, 10)
    async with opened(crashed) as (after, recovery):
        assert await ids_in(after) == [lost]


async def test_a_large_content_that_is_gone_is_an_alarm(store: EmbeddedStore) -> None:
    lost = await queued(store, None, HEADER, LARGE)
    crashed = left_by_a_crash(store)
    (crashed / "large" / lost).unlink()
    async with opened(crashed) as (after, recovery):
        assert list(recovery.lost) == [lost]
        assert await leased(after) == []


# The directory ---------------------------------------------------------------------------------------------------


async def test_a_second_owner_is_refused_and_told_of_the_first(store: EmbeddedStore) -> None:
    with pytest.raises(SpoolError, match=f"belongs to another process, pid {os.getpid()}"):
        await at(store.directory.path).open()
    assert store.directory.try_out() == f"pid {os.getpid()}"


async def test_a_second_owner_is_refused_also_where_the_lock_file_was_removed(store: EmbeddedStore) -> None:
    """As by a script that removes stale locks: two owners would overwrite each other's log."""
    (store.directory.path / "LOCK").unlink()
    assert store.directory.try_out() == "another process"
    with pytest.raises(SpoolError, match="belongs to another process"):
        await at(store.directory.path).open()
    assert store.directory.try_out() == "another process"  # the lock file is there again, and locked by nobody
    await store.close()
    assert store.directory.try_out() is None
    async with opened(store.directory.path):
        pass


@pytest.mark.parametrize("is_replaced", [False, True])
async def test_no_mail_is_taken_where_the_directory_is_gone(
    store: EmbeddedStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    """What is written to a file that has no name any more would be gone with the process."""
    monkeypatch.setattr("otel_smtp.spool.embedded.store.ROOM_CHECK_SECONDS", 0.0)
    path = store.directory.path
    assert store.refusal() is None
    path.rename(path.with_name("away"))
    if is_replaced:
        path.mkdir()
    for _ in range(2):
        refusal = store.refusal()
        assert refusal is not None
        assert not isinstance(refusal, StorageFull)
        assert "directory is gone" in str(refusal)
    if is_replaced:
        path.rmdir()
    path.with_name("away").rename(path)
    assert store.refusal() is None
    (line,) = caplog.records
    assert line.getMessage() == "spool directory gone: new mail refused"


async def test_the_lock_goes_with_the_process_not_with_the_file(store: EmbeddedStore) -> None:
    await store.close()
    assert (store.directory.path / "LOCK").exists()
    async with opened(store.directory.path):
        pass


async def test_a_directory_that_cannot_be_made_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match=r"file/spool: Not a directory"):
        await at(tmp_path / "file" / "spool").open()


async def test_nobody_writes_in_it_once_it_is_given_up(tmp_path: Path) -> None:
    """The next process to open it makes a spare segment under the same name."""
    for _ in range(20):
        async with opened(tmp_path / "spool") as (store, _):
            await queued(store)  # begins a segment; the next one is made ready meanwhile
        assert not (tmp_path / "spool" / "log" / "spare.new").exists()


async def test_no_spare_segment_is_made_once_it_is_given_up(tmp_path: Path) -> None:
    """The thread that makes it may come to it only then."""
    async with opened(tmp_path / "spool") as (store, _):
        await queued(store)
    before = set((tmp_path / "spool" / "log").iterdir())
    for file in before:
        if not file.name.isdigit():
            file.unlink()
    store.directory.prepare(SEGMENT_OCTETS)
    assert set((tmp_path / "spool" / "log").iterdir()) == {file for file in before if file.name.isdigit()}


@pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
async def test_nobody_else_can_read_it_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "spool"
    before = os.umask(umask)
    try:
        async with opened(path) as (store, _):
            await queued(store)
            await queued(store, None, HEADER, LARGE)
            await store.page("", 1)
            store.directory.prepare(SEGMENT_OCTETS)  # what is being made ready meanwhile has its name and mode after it
            modes = {
                file: stat.S_IMODE(file.lstat().st_mode) for file in (path, *path.rglob("*")) if not file.is_symlink()
            }
    finally:
        os.umask(before)
    assert {mode for file, mode in modes.items() if file.is_dir()} == {0o700}
    assert {mode for file, mode in modes.items() if not file.is_dir()} == {0o600}


async def test_what_is_not_ours_is_told_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        kept = await queued(store)
    foreign = [path / "log" / "000000000099", path / "log" / "notes.txt", path / "large" / "pipe", path / "README"]
    os.mkfifo(foreign[0])
    foreign[1].write_text("hands off")
    os.mkfifo(foreign[2])
    foreign[3].symlink_to("/etc/hostname")
    async with asyncio.timeout(10):
        async with opened(path) as (store, recovery):
            assert {remark for remark in recovery.remarks if "not ours" in remark} == {
                f"{one} is not ours, and is left alone" for one in foreign
            }
            assert await ids_in(store) == [kept]
            await queued(store)
    assert all(one.is_symlink() or one.exists() for one in foreign)


@pytest.mark.parametrize("name", ["LOCK", "index.db"])
async def test_a_pipe_in_the_place_of_a_file_of_ours_hangs_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / "spool"
    async with opened(path):
        pass
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    async with asyncio.timeout(10):
        with pytest.raises(SpoolError):
            await at(path).open()


FOREIGN = (
    "README", "tmp/x", "large/x", "log/spare", "log/reserve", "log/notes.new", "log/000000000002", "index.reserve",
    "lost+found/x",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["pipe", "directory", "device"])
async def test_whatever_else_lies_there_is_named_left_alone_and_stops_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        kept = await queued(store)
    for name in FOREIGN:
        (path / name).unlink(missing_ok=True)
        match kind:
            case "pipe":
                os.mkfifo(path / name)
            case "directory":
                (path / name).mkdir()
                (path / name / "inside").write_text("hands off")
            case _:
                try:
                    os.mknod(path / name, stat.S_IFCHR | 0o600, os.makedev(1, 3))
                except PermissionError:
                    pytest.skip("only root makes devices")
    before = {name: (path / name).lstat() for name in FOREIGN}
    async with asyncio.timeout(20):
        async with opened(path) as (store, recovery):
            named = {remark.removesuffix(" is not ours, and is left alone") for remark in recovery.remarks}
            assert named == {str(path / name) for name in FOREIGN if not name.startswith("lost+found")}
            assert await ids_in(store) == [kept]
            for _ in range(60):  # more than a segment
                await queued(store, message(due_in_seconds=900), HEADER, b"\r\n" + b"y" * 60_000)
            await queued(store, None, HEADER, LARGE)
            await store.page("", 1)
        async with opened(path) as (store, recovery):
            assert (recovery.messages, list(recovery.alarms), store.alarm()) == (62, [], None)
    for name, was in before.items():
        now = (path / name).lstat()
        assert (now.st_ino, now.st_mode) == (was.st_ino, was.st_mode), name


async def test_a_newer_format_is_refused_and_nothing_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spool"
    monkeypatch.setattr(records, "FORMAT", records.FORMAT + 1)
    async with opened(path) as (store, _):
        await queued(store)
    monkeypatch.undo()
    before = {file: file.read_bytes() for file in segments(path)}
    with pytest.raises(SpoolError, match="made by a newer version"):
        await at(path).open()
    assert {file: file.read_bytes() for file in segments(path)} == before


async def test_no_more_messages_are_taken_than_allowed(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool", most_messages=2) as (store, _):
        for _ in range(2):
            assert store.refusal() is None
            await queued(store)
        assert isinstance(store.refusal(), StorageFull)
        (lease, _) = await leased(store)
        await store.finish(lease, DELIVERED)
        assert store.refusal() is None


async def test_no_mail_is_taken_where_the_disk_is_nearly_full(tmp_path: Path) -> None:
    async with opened(tmp_path / "spool", least_free_octets=1 << 60) as (store, _):
        assert isinstance(store.refusal(), StorageFull)


# Room ------------------------------------------------------------------------------------------------------------


def fill_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no segment can be made, and none lies ready."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SpoolDirectory, "_make_spare", full)
    for name in ("spare", "reserve"):
        (path / "log" / name).unlink(missing_ok=True)


async def test_deliveries_go_on_after_every_start_on_a_disk_that_stays_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        waiting = {await queued(store) for _ in range(12)}
    fill_disk(path, monkeypatch)
    for number in range(4):
        async with opened(path) as (store, recovery):
            assert recovery.messages == len(waiting)
            with pytest.raises(StorageFull):
                await queued(store)
            leases = await leased(store)
            for lease in leases[:3]:
                assert await store.is_intact(lease.content)
                await store.finish(lease, DELIVERED)
                waiting.remove(lease.message_id)
            assert set(await ids_in(store)) == waiting
            if number % 2:
                path = left_by_a_crash(store)
    assert not waiting
    assert len(segments(path)) == 1


@pytest.mark.parametrize("step", ["_prepare", "write"])
async def test_a_disk_without_room_for_the_index_costs_no_mail(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(index: Index, *arguments: object) -> object:
        if index._path is None:
            return whole(index, *arguments)
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    async with opened(tmp_path / "spool") as (store, _):
        kept = [await queued(store), await queued(store, None, LARGE), await queued(store)]
        path = left_by_a_crash(store)
    whole = getattr(Index, step)
    with monkeypatch.context() as patch:
        patch.setattr(Index, step, full)
        async with opened(path) as (store, recovery):
            assert recovery.messages == 3
            assert recovery.lost == []
            assert await ids_in(store) == kept
            lease, *_ = await leased(store)
            await store.finish(lease, DELIVERED)
            path = left_by_a_crash(store)
    assert "no room for the index of the spool: made in memory" in caplog.text
    async with opened(path) as (store, _):
        assert await ids_in(store) == [one for one in kept if one != lease.message_id]


async def test_what_was_torn_is_gone_before_the_log_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        for _ in range(3):
            await queued(store)
        crashed = left_by_a_crash(store)
        marker = store.journal.log.markers[1]
    (segment,) = segments(crashed)
    end = len(segment.read_bytes().rstrip(b"\0"))
    # A group that was not synced: its first record is damaged, its second one is whole.
    first, octets, _ = records.pack(marker, 1, b"x" * 500, [b"y" * 20_000], at=end, synced=end, has_more=False)
    second, _, _ = records.pack(marker, 1, b"x" * 500, [b"y"], at=end + octets, synced=end, has_more=False)
    with segment.open("r+b") as file:
        file.seek(end)
        file.write(b"".join(first)[:-5_000] + b"z" * 5_000 + b"".join(second))
    fill_disk(crashed, monkeypatch)
    for left in (2, 1, 0):
        async with opened(crashed) as (store, recovery):
            assert recovery.alarms == []
            assert bool(recovery.remarks) is (left == 2), recovery.remarks  # that it was torn is told once
            (lease, *_) = await leased(store)
            await store.finish(lease, DELIVERED)
            assert len(await ids_in(store)) == left


async def test_a_log_that_cannot_be_gone_on_with_is_said_to_be_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        await queued(store)
    fill_disk(path, monkeypatch)
    (segment,) = segments(path)
    with segment.open("r+b") as file:
        file.truncate(len(segment.read_bytes().rstrip(b"\0")))  # as a copy may be: what is behind has no room
    async with opened(path) as (store, recovery):
        assert recovery.messages == 1
        with pytest.raises(StorageFull):
            await leased(store)


async def test_segments_whose_mail_has_ended_are_used_again(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    body = b"\r\n" + b"y" * 60_000
    async with opened(path) as (store, _):
        for _ in range(200):  # six segments of mail, one after the other
            await queued(store, None, HEADER, body)
            (lease,) = await leased(store)
            await store.finish(lease, DELIVERED)
        await eventually(lambda: len(segments(path)) <= 2)
        assert store.compaction.dead_octets <= 2 * SEGMENT_OCTETS


async def test_one_deferred_mail_does_not_hold_all_that_came_since(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    body = b"\r\n" + b"y" * 60_000
    async with opened(path) as (store, _):
        deferred = await queued(store, message(due_in_seconds=3600), HEADER, b"\r\nstill here\r\n")
        held = await queued(store, None, HEADER, b"\r\nheld\r\n")
        await store.hold(held)
        for _ in range(300):
            await queued(store, None, HEADER, body)
            (lease,) = await leased(store)
            await store.finish(lease, DELIVERED)
        await eventually(lambda: len(segments(path)) <= 4)
        counts = await store.counts()
        assert counts.dead_octets <= 4 * SEGMENT_OCTETS
        content = (await store.show(deferred)).content
        assert await store.read(content, 0, 100) == HEADER + b"\r\nstill here\r\n"
        assert await store.is_intact(content)
        crashed = left_by_a_crash(store)
    (crashed / "index.db").unlink()
    async with opened(crashed) as (after, _):
        assert await ids_in(after) == [deferred, held]
        assert (await after.show(held)).state is DeliveryState.HELD
        assert await after.is_intact((await after.show(deferred)).content)


async def test_a_damaged_content_that_moves_stays_damaged(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    body = b"\r\n" + b"y" * 60_000
    async with opened(path) as (store, _):
        damaged = await queued(store, message(due_in_seconds=3600), HEADER, b"\r\nas it was\r\n")
    assert alter(path, b"as it was", b"AS IT WAS") == 1
    async with opened(path) as (store, _):
        first = segments(path)[0]
        for _ in range(200):
            await queued(store, None, HEADER, body)
            (lease,) = await leased(store)
            await store.finish(lease, DELIVERED)
        await eventually(lambda: first not in segments(path))
        assert not await store.is_intact((await store.show(damaged)).content)
        assert await store.retry(damaged)
        ((_, content),), _ = await store.claim({"up": 1})
        assert content is None
    (path / "index.db").unlink()
    async with opened(path) as (store, _):
        assert not await store.is_intact((await store.show(damaged)).content)


async def test_the_garbage_collector_runs_again_after_the_index_was_made_again(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        await queued(store)
    (path / "index.db").unlink()
    assert gc.isenabled()
    async with opened(path) as (store, recovery):
        assert any("made again" in remark for remark in recovery.remarks)
        assert gc.isenabled()
