"""Mail that the store cannot place is never removed: it is set aside, people are told, and it can be put back."""

import asyncio
import errno
import os
import shutil
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.spool.embedded import EmbeddedStore, ask
from otel_smtp.spool.embedded.aside import found_in
from otel_smtp.spool.messages import DeliveryState, End, Verdict
from otel_smtp.spool.operators import ControlSocket, KeptDeeds, Operations
from tests.spool.embedded.books import books, recount
from tests.spool.embedded.test_recovery import ids_in, left_by_a_crash, opened, segments
from tests.spool.messages import BODY, CARRIER, HEADER, leased, message, queued
from tests.spool.queueing import eventually

LARGE = b"x" * 200_000
DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)


async def _rebuilt(path: Path) -> list[str]:
    """What `queue rebuild` says where no gateway runs."""
    return [
        str(answer.get("told") or f"{answer['queue_id']}: {answer['reason']}")
        async for answer in ask(path, {"command": "rebuild"}, max_age_seconds=60.0)
    ]


def _lose_log_and_index(path: Path) -> None:
    shutil.rmtree(path / "log")
    for file in path.glob("index.*"):
        file.unlink()


async def test_contents_that_nothing_names_any_more_are_put_back_with_their_envelopes(store: EmbeddedStore) -> None:
    large = await queued(store, message("a@x.example", "b@x.example", sender="s@x.example"), HEADER, LARGE)
    path = left_by_a_crash(store)
    _lose_log_and_index(path)
    async with opened(path) as (after, recovery):
        assert await ids_in(after) == []
        assert len(recovery.alarms) == 1
        assert "lost+found" in recovery.alarms[0]
        assert after.alarm() == "1 files in lost+found/ may be mail: see `otel-smtp queue rebuild`"
        assert after.refusal() is None, "other mail goes on"
    async with opened(path) as (after, recovery):
        assert after.alarm() is not None, "until somebody has looked"
        assert list(recovery.alarms) == []
    assert await _rebuilt(path) == [f"{large}: message {large} is queued again, and held"]
    async with opened(path) as (after, recovery):
        assert (after.alarm(), list(recovery.alarms)) == (None, [])
        shown = await after.show(large)
        assert (shown.state, shown.reverse_path) == (DeliveryState.HELD, "s@x.example")
        assert [address for address, _, _ in shown.recipients] == ["a@x.example", "b@x.example"]
        assert await after.release(large)
        (lease,) = await leased(after)
        assert (lease.is_possible_duplicate, lease.carrier) == (True, CARRIER)
        assert await after.is_intact(lease.content)
        assert await after.read(lease.content, 0, 10**6) == HEADER + LARGE
        await after.finish(lease, [Verdict(number, End.DELIVERED, replies.OK) for number in range(2)])
        assert await after.tally() == {"accepted": 2, "delivered": 2}
        await eventually(lambda: not (path / "large" / large).exists())


async def test_it_is_put_back_beside_a_running_gateway_and_counted_once(store: EmbeddedStore) -> None:
    path = store.directory.path
    kept = await queued(store)
    large = await queued(store, None, HEADER, LARGE)
    await store.close()
    (path / "index.db").unlink()
    (segment,) = segments(path)
    data = segment.read_bytes()
    segment.write_bytes(data.replace(f'"{large}'.encode(), f'"X{large[1:]}'.encode()))
    async with opened(path) as (after, _):
        control = ControlSocket(path / "control", Operations(after, KeptDeeds(), max_age_seconds=60.0))
        await control.start()
        try:
            told = await _rebuilt(path)
        finally:
            await control.stop()
        assert f"{large}: message {large} is queued again, and held" in told
        assert any("no message can be read in it" in line for line in told), "the damaged record itself"
        assert after.alarm() is None
        assert await ids_in(after) == [kept, large]
        assert (await after.tally())["accepted"] == 2
        assert await _rebuilt_again(after) == []


async def test_two_who_rebuild_at_once_put_each_message_back_once(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        ids = [await queued(store) for _ in range(3)]
    (segment,) = segments(path)
    segment.rename(segment.with_name("000000000007"))
    (path / "index.db").unlink()
    async with opened(path) as (store, _):
        await asyncio.gather(store.rebuild(), store.rebuild())
        assert await ids_in(store) == ids
        assert await books(store) == await recount(store)


async def _rebuilt_again(store: EmbeddedStore) -> list[str]:
    return list((await store.rebuild()).told)


async def test_a_segment_of_another_name_is_kept_and_its_mail_put_back(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        ended = await queued(store)
        kept = await queued(store)
        held = await queued(store)
        await store.hold(held)
        (lease,) = await leased(store, most=1)
        assert lease.message_id == ended
        await store.finish(lease, DELIVERED)
    (segment,) = segments(path)
    segment.rename(segment.with_name("000000000007"))
    (path / "index.db").unlink()
    async with opened(path) as (store, recovery):
        assert any("says that it is 1" in alarm for alarm in recovery.alarms)
        assert await ids_in(store) == []
        assert store.alarm() is not None
        await store.rebuild()
        assert await ids_in(store) == [kept, held]
        assert {shown.state for shown in await store.page("", 9)} == {DeliveryState.HELD}
        assert await store.read((await store.show(kept)).content, 0, 1000) == HEADER + BODY
        assert store.alarm() is None
        assert [file.name for file in (path / "lost+found" / "unreadable").iterdir()] == ["segment-7"]


async def test_a_segment_whose_head_and_first_record_are_gone_gives_its_mail_back(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        ids = [await queued(store) for _ in range(3)]
    (segment,) = segments(path)
    data = bytearray(segment.read_bytes())
    data[:48] = bytes(48)
    segment.write_bytes(data)
    (path / "index.db").unlink()
    async with opened(path) as (store, recovery):
        assert any("cannot be read" in alarm for alarm in recovery.alarms)
        await store.rebuild()
        assert await ids_in(store) == ids


async def test_a_message_cannot_pass_for_records_of_what_was_set_aside(tmp_path: Path) -> None:
    async with opened(tmp_path / "other") as (store, _):
        forged = await queued(store)
    (segment,) = segments(tmp_path / "other")
    # At the very place where it would be found intact: its checksums count from there.
    content = segment.read_bytes()[:4096]
    async with opened(tmp_path / "spool") as (store, _):
        real = await queued(store, None, HEADER, b"\r\n" + content)
    (segment,) = segments(tmp_path / "spool")
    aside = tmp_path / "segment-1"
    aside.write_bytes(bytes(32) + segment.read_bytes()[32:])
    assert [found.entry.id for found in found_in(aside)] == [real] != [forged]


async def test_where_the_log_is_gone_its_large_contents_stay(store: EmbeddedStore) -> None:
    """The index is whole, and does not know of what came last."""
    known = await queued(store, None, HEADER, LARGE)
    await store.page("", 1)
    unknown = await queued(store, None, HEADER, LARGE)
    path = left_by_a_crash(store)
    shutil.rmtree(path / "log")
    async with opened(path) as (after, recovery):
        assert list(recovery.lost) == [known]
        assert (await after.show(known)).state is DeliveryState.CORRUPT
        assert any("the log is gone" in alarm for alarm in recovery.alarms)
        assert (path / "lost+found" / unknown).exists()
        await after.rebuild()
        assert await ids_in(after) == [known, unknown]
        assert await after.release(known)
        (lease,) = await leased(after)
        assert await after.is_intact(lease.content)


async def test_what_has_ended_is_removed_also_where_the_index_is_made_again(store: EmbeddedStore) -> None:
    large = await queued(store, None, HEADER, LARGE)
    content = store.directory.large(large).read_bytes()
    (lease,) = await leased(store)
    await store.finish(lease, DELIVERED)
    path = left_by_a_crash(store)
    (path / "index.db").unlink()
    (path / "large" / large).write_bytes(content)  # the process died before it was removed
    async with opened(path) as (after, recovery):
        assert (list(recovery.alarms), after.alarm()) == ([], None)
        assert not list((path / "large").iterdir())


async def test_an_index_that_cannot_be_used_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        await queued(store)
    (path / "index.db").write_bytes(b"no database")
    async with opened(path) as (store, _):
        assert store.alarm() is None
        assert len(await ids_in(store)) == 1
    assert (path / "lost+found" / "index.db").read_bytes() == b"no database"


@pytest.mark.parametrize("harm", ["directory", "gone"])
async def test_a_content_that_cannot_be_read_is_not_intact(store: EmbeddedStore, harm: str) -> None:
    large = await queued(store, None, HEADER, LARGE)
    store.directory.large(large).unlink()
    if harm == "directory":
        store.directory.large(large).mkdir()
    assert not await store.is_intact((await store.show(large)).content)
    await asyncio.sleep(0)
    assert store.refusal() is None


async def test_a_content_that_the_disk_does_not_give_back_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "spool"
    body = b"\r\n" + b"y" * 60_000
    async with opened(path) as (store, _):
        unreadable = await queued(store, message(due_in_seconds=3600))
        kept = await queued(store, message(due_in_seconds=3600))
        place = (await store.indexing.look_up(unreadable)).place
        assert place is not None
        pread = os.pread

        def fail(file: int, octets: int, at: int) -> bytes:
            if at == place.content_at:
                raise OSError(errno.EIO, "Input/output error")
            return pread(file, octets, at)

        monkeypatch.setattr(os, "pread", fail)
        first = segments(path)[0]
        for _ in range(200):
            await queued(store, None, HEADER, body)
            (lease,) = await leased(store)
            await store.finish(lease, DELIVERED)
        await eventually(lambda: first not in segments(path))
        assert [shown.state for shown in await store.page("", 9)] == [DeliveryState.CORRUPT, DeliveryState.READY]
        assert await store.is_intact((await store.show(kept)).content)
        assert not await store.is_intact((await store.show(unreadable)).content)
        assert (path / "lost+found" / "segment-1").exists(), "another disk may give it back"
        await eventually(store.alarm)


async def test_envelopes_that_are_damaged_are_not_believed(store: EmbeddedStore, tmp_path: Path) -> None:
    large = await queued(store, None, HEADER, LARGE)
    whole = store.directory.large(large).read_bytes()
    (found,) = found_in(store.directory.large(large))
    assert (found.entry.id, found.entry.mail, found.content) == (large, Mail("app@example.com"), None)
    assert found.entry.deliveries[0].recipients[0].recipient == Recipient("user@example.net")
    file = tmp_path / large
    for at in (len(HEADER + LARGE), len(whole) - 24, len(whole) - 17, len(whole) - 12, len(whole) - 1):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert found_in(file) == []
    for octets in (0, 1, 23, len(whole) - 1):
        file.write_bytes(whole[:octets])
        assert found_in(file) == []
