"""A crash after each of the system calls by which the store does all it does: see `crashing`.

`python -m tests.durability crashes` tries many more of them.
"""

import os
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded import index as index_module
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.messages import End, Verdict
from tests.spool.embedded.crashing import (
    INDEX_FILES,
    SEGMENT_OCTETS,
    WAL_OCTETS,
    Crash,
    Disk,
    crash_at_any_call,
    faults_of,
)
from tests.spool.embedded.working import Ledger
from tests.spool.messages import HEADER, message, written


@pytest.mark.parametrize("seed", range(2))
async def test_what_was_answered_is_found_after_a_crash_at_whichever_call(tmp_path: Path, seed: int) -> None:
    outcome = await crash_at_any_call(tmp_path, seed, workers=10, steps=20, moments=10, crashes=3)
    assert outcome.faults == []
    assert outcome.crashes >= 30, outcome.told()


async def test_a_name_of_before_does_not_lead_to_what_a_segment_that_is_used_again_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made ready while nobody waits: each segment is one that was retired. The power fails at each call that
    may find a segment by a name that it has no more."""
    ledger, root, body = Ledger(), tmp_path / "spool", b"\r\n" + b"x" * 40_000
    monkeypatch.setattr(SpoolDirectory, "prepare", lambda *_: None)
    disk = Disk(root, monkeypatch, ledger, random.Random(0), most=10_000, pause=lambda: None)
    store = EmbeddedStore(root, least_free_octets=0, segment_octets=SEGMENT_OCTETS)
    await store.open()
    assert store._keeper is not None
    store._keeper.cancel()
    used: dict[int, set[str]] = {}  # names by file
    try:
        while store.journal.log.told[0] < 5:
            new = message()
            ledger.add(new.id, HEADER + body)
            (lease,) = await store.submit(new, await written(store.draft(), HEADER, body), lease=True)
            await store.finish(lease, [Verdict(0, End.DELIVERED, replies.OK)])
            await store.compaction.compact()
            for file in (root / "log").iterdir():
                used.setdefault(file.stat().st_ino, set()).add(file.name)
    finally:
        await store.close()
    monkeypatch.undo()
    monkeypatch.setattr(index_module, "WAL_OCTETS", WAL_OCTETS)  # made at each start
    assert any(sum(map(str.isdigit, names)) >= 2 for names in used.values()), "a segment was used again"
    log = str(root / "log")
    moments = [one for one in disk.moments if log in one.directories and _may_be_found_again(one.directories[log])]
    assert moments
    for moment in moments:
        for seed in range(2):
            left = tmp_path / f"{moment.number}-{seed}"
            Crash(True, seed % 2 or None).leave(moment, root, left, random.Random(seed))
            assert await faults_of(left, moment.books, ledger.contents) == [], (moment.number, moment.call, seed)
            shutil.rmtree(left)


async def test_the_index_that_a_loss_of_power_leaves_is_one_of_the_log_that_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be made again out of the log, and tell of mail that has ended as of mail that is missing."""
    root, durable, body = tmp_path / "spool", tmp_path / "durable", b"\r\n" + b"x" * 40_000
    fdatasync = os.fdatasync

    def sync(file: int) -> None:
        fdatasync(file)
        if os.readlink(f"/proc/self/fd/{file}") == str(root / "index.db-wal"):
            keep_index()

    def keep_index() -> None:
        for name in INDEX_FILES:
            if (root / name).exists():
                shutil.copy(root / name, durable / name)

    durable.mkdir()
    store = EmbeddedStore(root, least_free_octets=0, segment_octets=SEGMENT_OCTETS)
    await store.open()
    assert store._keeper is not None
    store._keeper.cancel()
    try:
        deferred = [await store.submit(message(), await written(store.draft()), lease=True) for _ in range(3)]
        await store.indexing.write_all()
        keep_index()
        monkeypatch.setattr(os, "fdatasync", sync)
        for (lease,) in deferred:
            await store.finish(lease, [Verdict(0, End.DELIVERED, replies.OK)])
        first = store.journal.log.told[0]
        while store.journal.log.told[0] < first + 5:
            (lease,) = await store.submit(message(), await written(store.draft(), HEADER, body), lease=True)
            await store.finish(lease, [Verdict(0, End.DELIVERED, replies.OK)])
            await store.compaction.compact()
        assert not (root / "log" / f"{first:012}").exists()
        left = tmp_path / "left"
        shutil.copytree(root, left, ignore=shutil.ignore_patterns("LOCK", "index*"))
        shutil.copytree(durable, left, dirs_exist_ok=True)
    finally:
        await store.close()
    monkeypatch.undo()
    found = EmbeddedStore(left, least_free_octets=0, segment_octets=SEGMENT_OCTETS)
    recovery = await found.open()
    try:
        assert (recovery.alarms, recovery.remarks) == ([], [])
        assert await found.page("", 10) == []
    finally:
        await found.close()


def _may_be_found_again(names: Sequence[Mapping[str, object]]) -> bool:
    """Whether a segment was retired that is there by its name if the power fails."""
    return any(name.isdigit() for name in names[0].keys() - names[-1].keys())
