"""A disk that loses its power: what was not synced when it happened may be there, in part, or not at all.

The gateway's writes go to the disk's cache until a sync has come back. The test keeps what each file of the log held at
its last sync, and makes spools out of that and any part of what was written since.
"""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.messages import End, Verdict
from tests.spool.embedded.test_recovery import ids_in, opened
from tests.spool.messages import HEADER, leased, message, queued, written

SECTOR = 512


class Disk:
    """A disk whose cache is known: for each file, what was synced, and what has been written since.

    Attributes:
        answered: ids of messages that were answered by the time of each sync.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[int, bytearray] = {}
        self.pending: dict[int, list[tuple[int, bytes]]] = {}
        self._pwrite, self._fdatasync, self._fsync = os.pwrite, os.fdatasync, os.fsync
        self._pwritev = os.pwritev
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "pwritev", self.pwritev)
        monkeypatch.setattr(os, "fdatasync", self.fdatasync)
        monkeypatch.setattr(os, "fsync", self.fsync)

    def pwrite(self, file: int, data: bytes, at: int) -> int:
        done = self._pwrite(file, data, at)
        self.pending.setdefault(os.fstat(file).st_ino, []).append((at, bytes(data[:done])))
        return done

    def pwritev(self, file: int, buffers: list[bytes], at: int, flags: int) -> int:
        """Writes, and syncs as `fdatasync` does; what happens before a sync happens in between."""
        assert flags == os.RWF_DSYNC
        data = b"".join(buffers)
        done = self._pwritev(file, [data], at)
        self.pending.setdefault(os.fstat(file).st_ino, []).append((at, data[:done]))
        os.fdatasync(file)
        return done

    def fdatasync(self, file: int) -> None:
        self._fdatasync(file)
        self._is_synced(file)

    def fsync(self, file: int) -> None:
        self._fsync(file)
        self._is_synced(file)

    def _is_synced(self, file: int) -> None:
        inode = os.fstat(file).st_ino
        content = self.synced.setdefault(inode, bytearray())
        for at, data in self.pending.pop(inode, []):
            content[len(content) : at] = bytes(max(0, at - len(content)))
            content[at : at + len(data)] = data

    def lose_power(self, spool: Path, into: Path, chance: random.Random) -> None:
        """Leave a spool as it is found afterwards: of each write since the last sync, any sectors, in any order."""
        shutil.copytree(spool, into, ignore=shutil.ignore_patterns("LOCK", "spare*", "*reserve", "index.db*"))
        for file in (spool / "log").iterdir():
            if not file.name.isdigit():
                continue
            inode = file.stat().st_ino
            content = bytearray(self.synced.get(inode, b""))
            for at, data in self.pending.get(inode, []):
                for start in _sectors(at, len(data)):
                    if chance.random() < 0.5:
                        end = min(start + SECTOR - start % SECTOR, at + len(data))
                        content[start:end] = data[start - at : end - at]
            (into / "log" / file.name).write_bytes(content)


def _sectors(at: int, octets: int) -> Iterator[int]:
    start = at
    while start < at + octets:
        yield start
        start += SECTOR - start % SECTOR


@pytest.mark.parametrize("seed", range(12))
async def test_what_was_answered_is_there_whatever_the_disk_had_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    disk = Disk(monkeypatch)
    spool = tmp_path / "spool"
    answered: list[str] = []
    ended: list[str] = []
    lost_at = chance.randint(5, 60)
    syncs = 0
    sync = disk.fdatasync
    tries: list[Path] = []

    def lose_power_before_this_sync(file: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs == lost_at:
            for number in range(3):
                tries.append(tmp_path / f"lost{number}")
                disk.lose_power(spool, tries[-1], random.Random(seed * 10 + number))
            left.append((list(answered), list(ended)))
        sync(file)

    left: list[tuple[list[str], list[str]]] = []
    monkeypatch.setattr(os, "fdatasync", lose_power_before_this_sync)
    async with opened(spool) as (store, _):
        while not left:
            body = b"\r\n" + bytes([chance.randint(65, 90)]) * chance.choice([10, 700, 5000])
            if chance.random() < 0.6:
                answered.append(await queued(store, message(due_in_seconds=chance.choice([0, 900])), HEADER, body))
            else:
                await _work(store, chance, ended)
    monkeypatch.undo()
    was_answered, had_ended = left[0]
    for path in tries:
        async with opened(path) as (after, _):
            there = await ids_in(after)
            assert set(was_answered) - set(ended) <= set(there), "mail that was answered is lost"
            assert not set(had_ended) & set(there), "what had ended has come back"
            for shown in await after.page("", 1000):
                assert await after.is_intact(shown.content)
            tally = await after.tally()
            assert tally.get("accepted", 0) == tally.get("delivered", 0) + len(there)


async def _work(store: EmbeddedStore, chance: random.Random, ended: list[str]) -> None:
    if chance.random() < 0.3:
        new = message()
        leases = await store.submit(new, await written(store.draft()), lease=True)
    else:
        leases = await leased(store, most=2)
    for lease in leases:
        is_over = chance.random() < 0.7
        await store.finish(lease, [Verdict(0, End.DELIVERED if is_over else None, replies.OK)])
        if is_over:
            ended.append(lease.message_id)
