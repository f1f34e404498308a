"""What a rebuild makes of mail whose content is lost: it is reported, and nothing that is known of it is dropped."""

import asyncio
import shutil
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from otel_smtp.commands.cli import cli
from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.messages import DeliveryState, End, Verdict
from tests.spool.embedded.test_recovery import ids_in, left_by_a_crash, opened, segments
from tests.spool.messages import BODY, HEADER, leased, message, queued
from tests.spool.stores import alter

LARGE = b"x" * 200_000
FILLING = b"\r\n" + b"y" * 60_000
DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)
SMALL = {"segment_octets": 256 * 1024}


async def rebuilt(path: Path) -> tuple[list[str], list[tuple[object, ...]]]:
    """What a rebuild says where no gateway runs."""
    async with opened(path, is_index_trusted=False, **SMALL) as (store, _):
        found = await store.rebuild()
        return list(found.told), [tuple(one) for one in found.not_found]


async def _spool_of_two_segments(path: Path) -> tuple[str, str]:
    """The first message lies in the first segment, the other one behind it."""
    async with opened(path, **SMALL) as (store, _):
        first = await queued(store, message("a@x.example", "b@x.example", sender="s@x.example"))
        while store.journal.log.told[0] < 2:
            (lease,) = [one for one in await _passing(store) if one.message_id != first]
            await store.finish(lease, DELIVERED)
        other = await queued(store)
        await store.page("", 1)
    return first, other


async def _passing(store: EmbeddedStore) -> Any:
    await queued(store, message(destination="elsewhere"), HEADER, FILLING)
    return await leased(store, destination="elsewhere")


def _lost(message_id: str) -> tuple[object, ...]:
    return (message_id, "s@x.example", ["a@x.example", "b@x.example"], "its content is lost", True)


@pytest.mark.parametrize("was_seen", [False, True], ids=["first seen by the rebuild", "set aside at a start before"])
async def test_where_a_segment_is_gone_its_mail_stays_queued_and_is_told_of(tmp_path: Path, was_seen: bool) -> None:
    path = tmp_path / "spool"
    first, other = await _spool_of_two_segments(path)
    segments(path)[0].unlink()
    if was_seen:
        async with opened(path, **SMALL) as (_, recovery):
            assert list(recovery.lost) == [first]
    for _ in range(2):  # the books are the same ones afterwards
        assert await rebuilt(path) == ([], [_lost(first)])
        async with opened(path, **SMALL) as (store, _):
            assert [(one.id, one.state) for one in await store.page("", 9)] == [
                (first, DeliveryState.CORRUPT), (other, DeliveryState.READY),
            ]  # fmt: skip
            assert await store.is_intact((await store.show(other)).content)
    async with opened(path, **SMALL) as (store, _):
        assert await store.delete(first) == 2
    assert await rebuilt(path) == ([], [])


async def test_where_the_log_is_gone_the_index_tells_of_all_its_mail(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    first, other = await _spool_of_two_segments(path)
    for segment in segments(path):
        segment.unlink()
    _, not_found = await rebuilt(path)
    assert [one[0] for one in not_found] == [first, other]


async def test_a_large_content_that_is_gone_is_told_of_and_one_that_comes_back_is_whole(store: EmbeddedStore) -> None:
    large = await queued(store, message("a@x.example", "b@x.example", sender="s@x.example"), HEADER, LARGE)
    path = store.directory.path
    await store.close()
    file = path / "large" / large
    kept = file.rename(path.parent / large)
    assert await rebuilt(path) == ([], [_lost(large)])
    shutil.copy(kept, file)  # from a backup
    told, not_found = await rebuilt(path)
    assert (told, not_found) == ([f"message {large} is set aside as corrupt, and its content is whole: release it"], [])
    async with opened(path, **SMALL) as (after, _):
        assert await after.release(large)
        (lease,) = await leased(after)
        assert await after.is_intact(lease.content)


async def test_a_content_that_is_damaged_is_told_of(store: EmbeddedStore) -> None:
    damaged = await queued(store, message("a@x.example", "b@x.example", sender="s@x.example"), HEADER, b"\r\ndamage")
    path = store.directory.path
    await store.close()
    assert alter(path, b"\r\ndamage", b"\r\ndamagE") == 1
    told, not_found = await rebuilt(path)
    assert (told, not_found) == ([], [(*_lost(damaged)[:3], "its content is damaged", True)])


async def test_mail_whose_record_alone_is_damaged_is_held_and_whole(store: EmbeddedStore) -> None:
    """The log does not have it, but the index knows its place and its checksum."""
    kept = await queued(store)
    damaged = await queued(store)
    await queued(store)
    path = store.directory.path
    await store.close()
    (segment,) = segments(path)
    segment.write_bytes(segment.read_bytes().replace(f'"{damaged}'.encode(), f'"X{damaged[1:]}'.encode()))
    await rebuilt(path)
    async with opened(path) as (after, _):
        shown = await after.show(damaged)
        assert (shown.state, (await after.show(kept)).state) == (DeliveryState.HELD, DeliveryState.READY)
        assert await after.release(damaged)
        (lease,) = [one for one in await leased(after) if one.message_id == damaged]
        assert lease.is_possible_duplicate
        assert await after.read(lease.content, 0, 1000) == HEADER + BODY
        assert await after.is_intact(lease.content)


async def test_what_has_ended_since_an_older_index_was_written_does_not_come_back(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        ended = await queued(store)
    shutil.copy(path / "index.db", tmp_path / "older.db")
    async with opened(path) as (store, _):
        (lease,) = await leased(store)
        await store.finish(lease, DELIVERED)
        assert lease.message_id == ended
    shutil.copy(tmp_path / "older.db", path / "index.db")
    assert await rebuilt(path) == ([], [])
    async with opened(path) as (store, _):
        assert await ids_in(store) == []


@pytest.mark.parametrize("harm", ["of another age", "of another spool", "damaged"])
async def test_what_only_an_index_knew_that_cannot_be_believed_is_told_of_and_the_index_kept(
    tmp_path: Path, harm: str
) -> None:
    path = tmp_path / "spool"
    first, other = await _spool_of_two_segments(tmp_path / ("other" if harm == "of another spool" else "spool"))
    if harm == "of another spool":
        async with opened(path, **SMALL) as (store, _):
            await queued(store)
        shutil.copy(tmp_path / "other" / "index.db", path / "index.db")
    elif harm == "damaged":
        segments(path)[0].unlink()
        with sqlite3.connect(path / "index.db") as database:
            database.execute("UPDATE meta SET value = 7 WHERE name = 'messages'")
        database.close()
    else:
        shutil.copy(path / "index.db", tmp_path / "older.db")
        async with opened(path, **SMALL) as (store, _):
            assert store._keeper is not None
            store._keeper.cancel()  # it would compact at the same time
            for lease in await leased(store):
                await store.finish(lease, [Verdict(one.number, End.DELIVERED, replies.OK) for one in lease.recipients])
            while segments(path)[0].name <= "000000000003":  # that has the records of their ends
                for lease in await _passing(store):
                    await store.finish(lease, DELIVERED)
                await store.compaction.compact()
        shutil.copy(tmp_path / "older.db", path / "index.db")
    before = (path / "index.db").read_bytes()
    told, not_found = await rebuilt(path)
    lost = [first] if harm == "damaged" else [first, other]
    assert [(one[0], one[-1]) for one in not_found] == [(one, False) for one in lost]
    assert not_found[0][1:3] == _lost(first)[1:3]
    assert all("may have ended since" in str(one[3]) for one in not_found)
    assert not told
    (kept,) = (path / "lost+found" / "unreadable").iterdir()
    assert kept.read_bytes() == before
    assert await rebuilt(path) == ([], []), "it was told"


async def test_a_rebuild_that_is_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index that it was making is no reason to forget what that of before knew."""
    path = tmp_path / "spool"
    first, other = await _spool_of_two_segments(path)
    segments(path)[0].unlink()
    write = Index.write
    written = []

    def write_and_die(index: Index, rows: Any, gone: Any, meta: Mapping[str, Any]) -> None:
        write(index, rows, gone, meta)
        written.append(rows)
        raise KeyError("killed")

    monkeypatch.setattr(Index, "write", write_and_die)
    with pytest.raises(KeyError):
        await rebuilt(path)
    assert written
    monkeypatch.undo()
    assert await rebuilt(path) == ([], [_lost(first)])
    async with opened(path, **SMALL) as (store, _):
        assert await ids_in(store) == [first, other]


async def test_a_queued_message_gets_its_content_back_from_lost_and_found(store: EmbeddedStore) -> None:
    """The index has kept it, as one whose content is lost; what was set aside has the content."""
    small = await queued(store)
    large = await queued(store, None, HEADER, LARGE)
    await store.close()
    path = store.directory.path
    (segment,) = segments(path)
    data = bytearray(segment.read_bytes())
    data[:48] = bytes(48)  # its head, and that of its first record
    segment.write_bytes(data)
    (path / "large" / large).rename(path / "lost+found" / large)
    async with opened(path) as (after, recovery):
        assert list(recovery.lost) == [large, small]
        found = await after.rebuild()
        assert list(found.not_found) == []
        assert {one.state for one in await after.page("", 9)} == {DeliveryState.HELD}
        for one in (small, large):
            assert await after.release(one)
        await _are_delivered(after)
        assert (after.memory.large_octets, after.memory.lost) == (0, set())


async def _are_delivered(store: EmbeddedStore) -> None:
    leases = await leased(store)
    assert len(leases) == 2
    for lease in leases:
        assert lease.is_possible_duplicate
        assert await store.is_intact(lease.content)
        await store.finish(lease, DELIVERED)


def _command(path: Path, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["queue", "rebuild", "--spool", str(path), *arguments])
    return done.exit_code, done.stdout


def test_the_command_tells_how_many_and_which_and_ends_with_1(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    first, _ = asyncio.run(_spool_of_two_segments(path))
    assert _command(path) == (0, "nothing to queue again\n")
    # As the command has segments of another size: what lies in the first one is gone by its name.
    segments(path)[0].unlink()
    status, words = _command(path)
    assert status == 1
    assert words == (
        f"{first}: not found: its content is lost; queued as corrupt; from <s@x.example> to a@x.example, b@x.example\n"
        "1 not found; 1 of them are in the queue, as corrupt\n"
    )
    status, words = _command(path, "--json")
    assert status == 1
    assert f'"queue_id":"{first}"' in words.replace(": ", ":")
    assert '"reason":"its content is lost"' in words.replace('": ', '":')


async def test_a_running_store_tells_what_it_lost(store: EmbeddedStore) -> None:
    await queued(store, message("a@x.example", "b@x.example", sender="s@x.example"), HEADER, LARGE)
    await store.page("", 1)
    path = left_by_a_crash(store)
    (lost,) = (path / "large").iterdir()
    lost.unlink()
    async with opened(path) as (after, _):
        assert [tuple(one) for one in (await after.rebuild()).not_found] == [_lost(lost.name)]
