"""The store: durable or refused, and what a crash leaves."""

import asyncio
import os
import sqlite3
import time
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.spool.files import SpoolDirectory
from otel_smtp.spool.index import Index
from otel_smtp.spool.messages import (
    ContentLost,
    DeliveryState,
    End,
    Kind,
    NewMessage,
    NoSuchMessage,
    SpoolError,
    StaleLease,
    StorageFull,
    Verdict,
    new_id,
)
from otel_smtp.spool.store import CRASHES_ALLOWED, SpoolStore
from tests.spool.messages import BODY, CARRIER, HEADER, leased, message, queued, written


def delivered(count: int = 1) -> list[Verdict]:
    return [Verdict(number, End.DELIVERED, replies.OK) for number in range(count)]


def reopened(store: SpoolStore) -> SpoolStore:
    return SpoolStore(SpoolDirectory(store.directory.path, reserve_octets=4096), least_free_octets=0)


async def crash(store: SpoolStore) -> SpoolStore:
    """A store over the files as a killed process would leave them; the lock goes with the process."""
    import shutil

    copy = store.directory.path.with_name(f"crashed-{new_id()}")
    shutil.copytree(store.directory.path, copy, ignore=shutil.ignore_patterns("LOCK", "control"))
    return SpoolStore(SpoolDirectory(copy, reserve_octets=4096), least_free_octets=0)


async def test_a_message_comes_back_as_it_went_in(store: SpoolStore) -> None:
    mail = Mail("a@b.example", 9, Body.BINARY_MIME, True, DsnReturn.FULL, "id+2B", True, "<>")
    recipients = [Recipient("x@y.example", Notify.SUCCESS | Notify.DELAY, "rfc822;x+2B@y"), Recipient("Postmaster")]
    now = time.time()
    new = NewMessage(new_id(), mail, {"up": recipients}, len(HEADER), now, now + 60, CARRIER)
    with store.draft() as draft:
        await store.submit(new, await written(draft), is_leased=False)
    (lease,) = await leased(store)
    assert lease.mail == mail
    assert [one.recipient for one in lease.recipients] == recipients
    assert (lease.message_id, lease.attempt, lease.carrier, lease.kind) == (new.id, 1, CARRIER, Kind.MAIL)
    assert lease.arrived_at == pytest.approx(now, abs=0.001)
    assert await store.content(lease.placement, 0, 1000) == HEADER + BODY
    assert await store.is_intact(lease.placement)


def test_a_file_made_ready_takes_the_next_contents_and_is_gone_at_the_end(tmp_path: Path) -> None:
    directory = SpoolDirectory(tmp_path / "spool", reserve_octets=0)
    directory.open()
    try:
        directory.prepare()
        directory.prepare()
        (ready,) = (directory.path / "tmp").iterdir()
        (first,) = directory.keep_together([[HEADER, BODY]])
        (second,) = directory.keep_together([[BODY]])
        assert first.file == ready.name != second.file
        assert directory.read(first, 0, first.octets) == HEADER + BODY
        assert directory.read(second, 0, second.octets) == BODY
        directory.prepare()
    finally:
        directory.close(is_clean=True)
    assert not list((directory.path / "tmp").iterdir())


@pytest.mark.parametrize("octets", [0, 1, 64 * 1024 - len(HEADER), 64 * 1024, 1_000_000])
async def test_contents_of_any_size_are_kept_whole(store: SpoolStore, octets: int) -> None:
    body = os.urandom(octets)
    pieces = [body[start : start + 60_000] for start in range(0, octets, 60_000)]
    await queued(store, None, HEADER, *pieces)
    (lease,) = await leased(store)
    assert await store.content(lease.placement, len(HEADER), octets + 1) == body
    assert await store.is_intact(lease.placement)
    await store.close()
    assert not list((store.directory.path / "tmp").iterdir()), "not even the file that was made ready for the next"


@pytest.mark.parametrize("octets", [1000, 200_000])
async def test_a_disk_that_takes_less_than_it_is_given_is_given_the_rest(
    store: SpoolStore, octets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: max(1, len(data) // 3)]))
    body = os.urandom(octets)
    await queued(store, None, HEADER, body)
    monkeypatch.undo()
    (lease,) = await leased(store)
    assert await store.content(lease.placement, len(HEADER), octets) == body
    assert await store.is_intact(lease.placement)


async def test_what_comes_at_the_same_time_shares_a_file_which_goes_with_the_last_of_it(store: SpoolStore) -> None:
    await asyncio.gather(*[queued(store, None, HEADER, f"\r\n{number}\r\n".encode()) for number in range(20)])
    leases = await leased(store, most=20)
    files = {lease.placement.file for lease in leases}
    assert len(files) < 20
    contents = {await store.content(lease.placement, len(HEADER), 100) for lease in leases}
    assert contents == {f"\r\n{number}\r\n".encode() for number in range(20)}
    for lease in leases[:-1]:
        await store.record(lambda index, lease=lease: index.finish(lease, delivered(), next_at=0))  # type: ignore[misc]
    assert await store.is_intact(leases[-1].placement)
    await store.record(lambda index: index.finish(leases[-1], delivered(), next_at=0))
    # The file goes after the result was told, and before anything else is done.
    assert await store.apply(lambda index: index.tally()) == {"accepted": 20, "delivered": 20}
    assert list(store.directory.files()) == []


async def test_a_lease_is_given_once_and_its_result_taken_once(store: SpoolStore) -> None:
    await queued(store)
    (lease,) = await leased(store)
    assert await leased(store) == []
    await store.record(lambda index: index.finish(lease, [], next_at=0))
    (again,) = await leased(store)
    assert (again.attempt, again.epoch) == (2, lease.epoch + 1)
    with pytest.raises(StaleLease):
        await store.record(lambda index: index.finish(lease, delivered(), next_at=0))
    await store.record(lambda index: index.finish(again, delivered(), next_at=0))
    with pytest.raises(StaleLease):
        await store.record(lambda index: index.finish(again, delivered(), next_at=0))


async def test_recipients_end_one_by_one(store: SpoolStore) -> None:
    new = message("a@x.example", "b@x.example", "c@x.example")
    await queued(store, new)
    (lease,) = await leased(store)
    verdicts = [
        Verdict(0, End.DELIVERED, replies.OK),
        Verdict(1, None, replies.UPSTREAM_UNAVAILABLE),
        Verdict(2, End.FAILED, replies.RELAY_DENIED),
    ]
    await store.record(lambda index: index.finish(lease, verdicts, next_at=0))
    (again,) = await leased(store)
    assert [(one.number, one.recipient.address) for one in again.recipients] == [(1, "b@x.example")]
    assert again.recipients[0].last_reply == str(replies.UPSTREAM_UNAVAILABLE)
    shown = await store.apply(lambda index: index.show(new.id))
    assert shown.recipients == [("b@x.example", DeliveryState.LEASED, str(replies.UPSTREAM_UNAVAILABLE))]
    await store.record(lambda index: index.finish(again, [Verdict(1, End.EXPIRED)], next_at=0))
    tally = await store.apply(lambda index: index.tally())
    assert tally == {"accepted": 3, "delivered": 1, "failed": 1, "expired": 1}


async def test_new_mail_and_old_take_turns_and_so_do_senders(store: SpoolStore) -> None:
    for _ in range(6):
        await queued(store, message(sender="many@x.example"))
    for lease in await leased(store, most=6):
        await store.record(lambda index, lease=lease: index.finish(lease, [], next_at=0))  # type: ignore[misc]
    for _ in range(5):
        await queued(store, message(sender="busy@x.example"))
    await queued(store, message(sender="rare@x.example"))
    chosen = [lease.mail.reverse_path for lease in await leased(store, most=4)]
    assert sorted(chosen) == ["busy@x.example", "many@x.example", "many@x.example", "rare@x.example"]


async def test_nothing_is_leased_before_its_time_or_beyond_its_age(store: SpoolStore) -> None:
    await queued(store, message(due_in_seconds=3600))
    await queued(store, message(max_age_seconds=-1))
    assert await leased(store) == []
    next_due = await store.apply(lambda index: index.next_due(["up"]))
    assert next_due is not None
    overdue = await store.apply(lambda index: index.overdue(time.time(), 10, store.owner))
    assert len(overdue) == 1


@pytest.mark.parametrize("octets", [100, 300_000], ids=["in memory", "in a file"])
async def test_who_gives_up_waiting_leaves_a_whole_message_or_none(store: SpoolStore, octets: int) -> None:
    body = os.urandom(octets)

    for _ in range(20):
        with store.draft() as draft:
            await written(draft, HEADER, body)
            submitting = asyncio.create_task(store.submit(message(), draft, is_leased=False))
            await asyncio.sleep(0)  # the thread has got it, and is at work
            submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
    assert store.fault is None
    for lease in await leased(store, most=100):
        assert await store.is_intact(lease.placement)
        assert await store.content(lease.placement, len(HEADER), octets + 1) == body
    assert store.refusal() is None


# Crashes ------------------------------------------------------------------------------------------------------


async def test_what_was_submitted_survives_a_crash_and_what_was_not_is_cleared_away(store: SpoolStore) -> None:
    kept = await queued(store)
    big = store.draft()
    is_in_a_file = asyncio.Event()
    assert big.write(HEADER, is_in_a_file.set)
    assert not big.write(b"x" * 200_000, is_in_a_file.set)
    await is_in_a_file.wait()
    (store.directory.path / "body" / "x" / "orphanx").write_bytes(b"synced, but never committed")
    after = await crash(store)
    big.discard()
    recovery = await after.open()
    assert (recovery.messages, recovery.stray_files, recovery.lost) == (1, 1, [])
    assert not list((after.directory.path / "tmp").iterdir())
    (lease,) = await leased(after)
    assert lease.message_id == kept
    assert not lease.is_possible_duplicate
    await after.close()


async def test_an_attempt_that_a_crash_cut_short_counts_and_may_have_succeeded(store: SpoolStore) -> None:
    await queued(store)
    await leased(store)
    after = await crash(store)
    assert (await after.open()).interrupted == 1
    (lease,) = await leased(after)
    assert (lease.attempt, lease.is_possible_duplicate) == (2, True)
    await after.close()


async def test_what_is_part_of_three_crashes_is_held(store: SpoolStore) -> None:
    poison = await queued(store)
    current = store
    for number in range(1, CRASHES_ALLOWED + 1):
        assert len(await leased(current)) == 1
        after = await crash(current)
        if current is not store:
            await current.close()
        current = after
        recovery = await current.open()
        assert recovery.held == ([poison] if number == CRASHES_ALLOWED else [])
    assert await leased(current) == []
    assert await current.apply(lambda index: index.release(poison, time.time()))
    assert len(await leased(current)) == 1
    await current.close()


async def test_an_orderly_end_gives_leases_back_uncounted(store: SpoolStore) -> None:
    await queued(store)
    await leased(store)
    await store.close()
    again = reopened(store)
    assert (await again.open()).interrupted == 0
    (lease,) = await leased(again)
    assert (lease.attempt, lease.is_possible_duplicate) == (1, True)
    await again.close()


async def test_a_missing_content_is_an_alarm_and_never_a_delivery(store: SpoolStore) -> None:
    lost = await queued(store)
    after = await crash(store)
    for file in (after.directory.path / "body").glob("*/*"):
        file.unlink()
    assert (await after.open()).lost == [lost]
    assert await leased(after) == []
    assert (await after.apply(lambda index: index.counts(time.time()))).corrupt == 1
    (shown,) = await after.apply(lambda index: index.page("", 2))
    placement, _ = await after.apply(lambda index: index.placement(shown.id))
    with pytest.raises(ContentLost):
        await after.content(placement, 0, 10)
    await after.close()


async def test_a_changed_content_is_noticed(store: SpoolStore) -> None:
    await queued(store)
    (lease,) = await leased(store)
    (file,) = (store.directory.path / "body").glob("*/*")
    file.write_bytes(file.read_bytes().replace(b"Hello", b"HellO"))
    assert not await store.is_intact(lease.placement)


# Refusals -----------------------------------------------------------------------------------------------------


async def test_a_second_owner_is_refused_and_told_of_the_first(store: SpoolStore) -> None:
    with pytest.raises(SpoolError, match=f"belongs to another process, pid {os.getpid()}"):
        await reopened(store).open()


async def test_the_lock_goes_with_the_process_not_with_the_file(store: SpoolStore) -> None:
    await store.close()
    assert (store.directory.path / "LOCK").exists()
    again = reopened(store)
    await again.open()
    await again.close()


async def test_a_directory_that_cannot_be_made_is_told_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = SpoolStore(SpoolDirectory(tmp_path / "file" / "spool"))
    with pytest.raises(SpoolError, match=r"file/spool: Not a directory"):
        await store.open()


async def test_a_newer_schema_is_refused(store: SpoolStore) -> None:
    await store.close()
    database = sqlite3.connect(store.directory.index_path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(SpoolError, match="made by a newer version"):
        await reopened(store).open()


async def test_a_damaged_index_is_refused(store: SpoolStore) -> None:
    for _ in range(20):
        await queued(store)
    await store.close()
    (store.directory.path / "clean").unlink()
    index = store.directory.index_path
    data = bytearray(index.read_bytes())
    data[4096 : len(data)] = b"\xff" * (len(data) - 4096)
    index.write_bytes(data)
    with pytest.raises(SpoolError):
        await reopened(store).open()


def test_an_index_that_cannot_be_opened_is_left_closed(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    with pytest.raises(sqlite3.DatabaseError) as raised:
        Index(path)
    assert raised.traceback  # which keeps what was made until then
    assert str(path) not in {str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()}


async def test_no_more_messages_are_taken_than_allowed(tmp_path: Path) -> None:
    store = SpoolStore(SpoolDirectory(tmp_path / "spool", reserve_octets=4096), most_messages=2, least_free_octets=0)
    await store.open()
    for _ in range(2):
        assert store.refusal() is None
        await queued(store)
    assert isinstance(store.refusal(), StorageFull)
    (lease, _) = await leased(store)
    await store.record(lambda index: index.finish(lease, delivered(), next_at=0))
    assert store.refusal() is None
    await store.close()


async def test_no_mail_is_taken_where_the_disk_is_nearly_full(tmp_path: Path) -> None:
    directory = SpoolDirectory(tmp_path / "spool", reserve_octets=4096)
    store = SpoolStore(directory, least_free_octets=1 << 60)
    await store.open()
    assert isinstance(store.refusal(), StorageFull)
    await store.close()


async def test_a_bug_of_ours_fails_what_it_met_and_nothing_else(store: SpoolStore) -> None:
    def fail(index: Index) -> None:
        index.delete(kept)
        raise RuntimeError("a bug")

    kept = await queued(store)
    with pytest.raises(SpoolError, match="internal error"):
        await store.record(fail)
    assert store.refusal() is None
    assert [shown.id for shown in await store.apply(lambda index: index.page("", 2))] == [kept]


# Operators ----------------------------------------------------------------------------------------------------


async def test_held_mail_waits_and_does_not_age(store: SpoolStore) -> None:
    new = message(max_age_seconds=100)
    await queued(store, new)
    now = time.time()
    assert await store.apply(lambda index: index.hold(new.id, now))
    assert await leased(store) == []
    assert await store.apply(lambda index: index.overdue(now + 1000, 10, store.owner)) == []
    assert await store.apply(lambda index: index.release(new.id, now + 1000))
    shown = await store.apply(lambda index: index.show(new.id))
    assert shown.expires_at == pytest.approx(new.expires_at + 1000, abs=0.01)
    assert not await store.apply(lambda index: index.release(new.id, now))


async def test_what_is_removed_is_counted_with_its_recipients(store: SpoolStore) -> None:
    new = message("a@x.example", "b@x.example")
    await queued(store, new)
    assert await store.record(lambda index: index.delete(new.id)) == 2
    assert await store.apply(lambda index: index.tally()) == {"accepted": 2, "removed": 2}
    assert list(store.directory.files()) == []
    with pytest.raises(NoSuchMessage):
        await store.record(lambda index: index.delete(new.id))


async def test_what_is_being_delivered_is_not_removed(store: SpoolStore) -> None:
    kept = await queued(store)
    await leased(store)
    with pytest.raises(SpoolError, match="is being delivered"):
        await store.record(lambda index: index.delete(kept))


async def test_expired_by_an_operator_and_begun_anew(store: SpoolStore) -> None:
    one = await queued(store)
    now = time.time()
    assert await store.record(lambda index: index.expire(one, now))
    assert (await store.apply(lambda index: index.show(one))).is_forced_to_expire
    assert await store.record(lambda index: index.reset(one, now, now + 500))
    shown = await store.apply(lambda index: index.show(one))
    assert (shown.is_forced_to_expire, shown.attempts) == (False, 0)
    assert len(await leased(store)) == 1


async def test_pages_follow_the_order_of_arrival(store: SpoolStore) -> None:
    ids = [await queued(store) for _ in range(5)]
    first = await store.apply(lambda index: index.page("", 2))
    rest = await store.apply(lambda index: index.page(first[-1].id, 10))
    assert [shown.id for shown in [*first, *rest]] == sorted(ids)


async def test_a_clock_that_was_set_back_makes_nothing_wait_for_long(store: SpoolStore) -> None:
    await queued(store, message(due_in_seconds=86400))
    now = time.time()
    assert await store.apply(lambda index: index.pull_in(now, 3600)) == 1
    next_due = await store.apply(lambda index: index.next_due(["up"]))
    assert next_due == pytest.approx(now + 3600, abs=0.01)


def test_ids_are_unique_sorted_by_time_and_safe_in_a_file_name() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert len(set(ids)) == 10_000
    assert ids == sorted(ids)
    assert all((len(one) == 26 and one.isalnum() and one.islower()) or one.isdigit() for one in ids)
