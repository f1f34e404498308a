"""Mail in a spool of the first version is carried over, whole and once, however often the start is cut short.

`first_version.tar.xz` holds two spools that the first version's code made (at 61dcbb0): `clean` was closed, `killed`
was not. Each has eight messages: plain; one with all parameters for two destinations; large; tried once, with unknown
outcome; held; delivered; one whose content was damaged on the disk since; and one that was being attempted at the end.
"""

import sqlite3
import tarfile
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.spool.embedded import first_version
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.messages import DeliveryState, End, SpoolError, Verdict
from tests.spool.embedded.test_recovery import at, ids_in, opened
from tests.spool.messages import CARRIER, HEADER

ARCHIVE = Path(__file__).with_name("first_version.tar.xz")
IDS = [f"01m8h000000000000000000{number:03d}" for number in (1, 2, 3, 4, 5, 7, 8)]
MADE_AT = 1795900000.0
BODY_OF_THE_LARGE_ONE = b"\r\n" + b"0123456789abcdef\r\n" * 8000


def spool_of(kind: str, directory: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        # Debian 12's Python has no filters yet, and takes no argument for one.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(directory)
    return directory / kind


def is_gone(path: Path) -> bool:
    return not any((path / name).exists() for name in ("spool.db", "spool.db-wal", "body", "reserve", "clean"))


@pytest.mark.parametrize("kind", ["clean", "killed"])
async def test_all_mail_is_carried_over_as_it_was(tmp_path: Path, kind: str) -> None:
    path = spool_of(kind, tmp_path)
    async with opened(path, clock=lambda: MADE_AT + 5000) as (store, recovery):
        assert recovery.messages == 7
        assert "7 messages were carried over from the first version's spool" in recovery.remarks
        assert is_gone(path)
        assert await ids_in(store) == IDS
        assert await store.tally() == {"accepted": 10, "delivered": 1}
        shown = {one.id: one for one in await store.page("", 10)}
        plain, rich, large, tried, held, damaged, cut = (shown[one] for one in IDS)
        assert (plain.arrived_at, plain.expires_at) == (MADE_AT, MADE_AT + 10**9)
        assert (plain.carrier, plain.attempts, plain.state) == (CARRIER, 0, DeliveryState.READY)
        assert (held.state, tried.attempts) == (DeliveryState.HELD, 1)
        assert tried.recipients[0][2] == str(replies.UPSTREAM_UNAVAILABLE)
        assert await store.read(large.content, 0, 10**6) == HEADER + BODY_OF_THE_LARGE_ONE
        assert [await store.is_intact(one.content) for one in (plain, rich, large, tried, held, damaged, cut)] == [
            True, True, True, True, True, False, True,
        ]  # fmt: skip
        claimed = {lease.message_id: (lease, content) for lease, content in (await store.claim({"up": 10}))[0]}
        lease, content = claimed[rich.id]
        assert lease.mail == Mail("a@b.example", 9, Body.BINARY_MIME, True, DsnReturn.FULL, "id+2B", True, "<>")
        assert lease.recipients[0].recipient == Recipient("x@y.example", Notify.SUCCESS | Notify.DELAY, "rfc822;x+2B@y")
        assert content is not None
        assert content[0] == HEADER
        assert claimed[damaged.id][1] is None
        assert claimed[tried.id][0].is_possible_duplicate
        assert claimed[cut.id][0].is_possible_duplicate, "it was being attempted when the process ended"
    (path / "index.db").unlink()
    async with opened(path) as (store, _):
        assert await ids_in(store) == IDS
        assert await store.tally() == {"accepted": 10, "delivered": 1}


async def test_a_start_that_is_cut_short_is_followed_by_one_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = spool_of("killed", tmp_path)
    monkeypatch.setattr(first_version, "_AT_ONCE", 2)
    read = first_version._Source.next

    for step in range(4):
        calls = iter(range(10))

        def fail_at(source: first_version._Source, step: int = step, calls: object = calls) -> object:
            if next(calls) == step:  # type: ignore[call-overload]
                raise SpoolError("the process ends here")
            return read(source)

        monkeypatch.setattr(first_version._Source, "next", fail_at)
        with pytest.raises(SpoolError, match="the process ends here"):
            await at(path).open()
        assert (path / "spool.db").exists()
    monkeypatch.setattr(first_version._Source, "next", read)

    def fail(directory: SpoolDirectory) -> None:
        raise SpoolError("the process ends before anything was removed")

    monkeypatch.setattr(first_version, "_remove", fail)
    with pytest.raises(SpoolError, match="before anything was removed"):
        await at(path).open()
    monkeypatch.undo()
    for file in (path / "body").glob("*/*"):  # it ended while contents were being removed
        file.unlink()
    async with opened(path) as (store, _):
        assert await ids_in(store) == IDS
        large = (await store.show(IDS[2])).content
        assert await store.read(large, 0, 10**6) == HEADER + BODY_OF_THE_LARGE_ONE
        assert is_gone(path)


async def test_what_has_ended_since_is_not_taken_again(tmp_path: Path) -> None:
    """A first version that ran once more on a directory of ours, after mail was carried over, loses nothing either."""
    path = spool_of("clean", tmp_path)
    async with opened(path, clock=lambda: MADE_AT + 5000) as (store, _):
        for lease, _ in (await store.claim({"up": 1}))[0]:
            await store.finish(lease, [Verdict(0, End.DELIVERED, replies.OK)])
        left = await ids_in(store)
    assert len(left) == 6
    (tmp_path / "again").mkdir()
    again = spool_of("clean", tmp_path / "again")
    database = sqlite3.connect(again / "spool.db")
    for table, name in (("msg", "id"), ("dlv", "msg_id"), ("rcpt", "msg_id")):
        database.execute(f"DELETE FROM {table} WHERE {name} != ?", (IDS[0],))
        database.execute(f"UPDATE {table} SET {name} = 'z' || substr({name}, 2)")
    database.commit()
    database.close()
    for name in ("spool.db", "body"):
        (again / name).rename(path / name)
    async with opened(path) as (store, _):
        assert await ids_in(store) == [*left, f"z{IDS[0][1:]}"]


@pytest.mark.parametrize("is_empty", [False, True], ids=["gone", "empty"])
async def test_contents_that_the_database_does_not_name_are_kept(tmp_path: Path, is_empty: bool) -> None:
    path = spool_of("clean", tmp_path)
    (path / "spool.db").unlink()
    if is_empty:
        (path / "spool.db").touch()
    before = sorted(file.read_bytes() for file in (path / "body").glob("*/*"))
    assert before
    async with opened(path) as (store, recovery):
        (alarm,) = recovery.alarms
        assert alarm.startswith(f"{len(before)} contents of the first version's spool")
        assert store.alarm() is not None
    kept = sorted(file.read_bytes() for file in (path / "lost+found").iterdir())
    assert kept == before


async def test_a_damaged_database_is_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    path = spool_of("clean", tmp_path)
    data = bytearray((path / "spool.db").read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    (path / "spool.db").write_bytes(data)
    with pytest.raises(SpoolError, match=r"spool\.db"):
        await at(path).open()
    assert (path / "spool.db").read_bytes() == data
    assert list((path / "body").glob("*/*"))
