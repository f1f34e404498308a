"""An index that somebody else has locked, or that cannot be written for a while, is not broken: all comes back."""

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded import index as index_module
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.embedded.waiting import SAMPLE
from otel_smtp.spool.messages import End, SpoolError, Verdict
from tests.spool.embedded.test_recovery import ids_in, opened
from tests.spool.messages import leased, message, queued

DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)
LOCKED_BY_ANOTHER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0.1)
database.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def _try_to_lock(path: Path) -> str:
    """What another process is told that wants to write to the index."""
    done = subprocess.run(
        [sys.executable, "-c", LOCKED_BY_ANOTHER, str(path)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False,
    )  # fmt: skip
    return done.stdout or done.stderr.splitlines()[-1]


async def test_a_lock_that_is_held_at_the_start_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "BUSY_SECONDS", 0.1)
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        kept = await queued(store)
    with subprocess.Popen(
        [sys.executable, "-c", LOCKED_BY_ANOTHER, str(path / "index.db")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as backup:  # fmt: skip
        assert backup.stdout is not None
        assert backup.stdout.readline() == b"locked\n"
        async with opened(path) as (store, recovery):
            assert any("locked" in remark for remark in recovery.remarks)
            assert (store.refusal(), store.alarm()) == (None, None)
            assert await ids_in(store) == [kept]
            (lease,) = await leased(store)
            await store.finish(lease, DELIVERED)
            backup.communicate()
    async with opened(path) as (store, _):
        assert await ids_in(store) == []


@pytest.mark.parametrize("is_made_again", [False, True])
async def test_nobody_else_writes_to_the_index_while_it_is_ours(tmp_path: Path, is_made_again: bool) -> None:
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        await queued(store)
    if is_made_again:
        (path / "index.db").unlink()
    async with opened(path) as (store, _):
        assert "database is locked" in _try_to_lock(path / "index.db")


def _busy() -> sqlite3.Error:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return error


def _full() -> sqlite3.Error:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


VERBS = ("write", "load", "due", "next_due", "note_leased", "overdue", "unwarned", "counts", "page")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("error", [_busy, _full])
async def test_whatever_fails_for_a_while_is_done_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], sqlite3.Error], verb: str
) -> None:
    """Nothing that was to be attempted is forgotten, whichever question to the index is not answered."""
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        ids = [await queued(store, message(sender=f"{number}@x.example")) for number in range(9)]
    async with opened(path) as (store, _):  # those are in the index alone; these are in memory
        ids += [await queued(store, message(sender=f"{number}@y.example")) for number in range(4)]
        has_failed = False

        def fail(*_: object, **__: object) -> None:
            nonlocal has_failed
            has_failed = True
            raise error()

        with monkeypatch.context() as patched:
            patched.setattr(Index, verb, fail)
            for _ in range(2):
                with contextlib.suppress(SpoolError):
                    claimed, _ = await store.claim({"up": 6, "elsewhere": 1})
                    for lease, _ in claimed:
                        await store.finish(lease, (), counts_attempt=False)
        assert await _claimable(store) == sorted(ids)
        with monkeypatch.context() as patched:
            patched.setattr(Index, verb, fail)
            for look in (store.end_overdue(9), store.unwarned(0.0, 9), store.counts(), store.page("", 9)):
                with contextlib.suppress(SpoolError):
                    await look
        assert store.refusal() is None
        assert has_failed
        assert await _claimable(store) == sorted(ids)


async def _claimable(store: EmbeddedStore) -> list[str]:
    leases = await leased(store, most=20)
    for lease in leases:
        await store.finish(lease, (), counts_attempt=False)
    return sorted(lease.message_id for lease in leases)


async def test_an_index_that_cannot_be_written_holds_up_no_delivery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It offers what has ended, and what waits for later, again and again: more of it than is looked at at a time."""
    path = tmp_path / "spool"
    async with opened(path) as (store, _):
        ids = [await queued(store) for _ in range(5 * SAMPLE)]

    def fail(*_: object, **__: object) -> None:
        raise _full()

    attempted: list[str] = []
    async with opened(path) as (store, _):
        with monkeypatch.context() as patched:
            patched.setattr(Index, "write", fail)
            patched.setattr(Index, "note_leased", fail)
            for number in range(len(ids)):
                claimed, _ = await store.claim({"up": 1})
                for lease, _ in claimed:
                    attempted.append(lease.message_id)
                    await store.finish(lease, DELIVERED if number % 2 else (), retry_in=3600.0)
    assert sorted(attempted) == sorted(ids)


async def test_the_write_ahead_log_has_its_room_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "spool"

    def octets(name: str) -> int:
        return os.stat(path / name).st_blocks * 512

    for _ in range(2):
        async with opened(path) as (store, _):
            assert octets("index.db-wal") >= index_module.WAL_OCTETS
            for _ in range(50):
                await queued(store)
            await store.page("", 1)
        assert not (path / "index.db-wal").exists()
        assert octets("index.reserve") >= index_module.WAL_OCTETS, "it waits for the next start"
