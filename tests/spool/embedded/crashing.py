"""A crash after any system call of the embedded store, made again in full: what is found then, and whether it is right.

Each call that changes a file or a name is done under one lock, and noted in a model of the disk: what every file holds,
what of it was synced, and which names are durable. So at each call there are two kinds of crash:

* the process dies: all that was written is there;
* the power fails: of what was written since a file's last sync any sectors are there, and of what was done to the names
  in a directory since its last sync the first few things, none or all.

The index is seldom synced, and can be made again: after a crash it is there as it was at that moment, as it was at any
moment since it was synced last, or not at all. What is done in its thread is done under the lock too, so that it is
never copied in the midst of a transaction, which SQLite itself takes back.
"""

import asyncio
import contextlib
import os
import random
import shutil
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded import directory as directory_module
from otel_smtp.spool.embedded import index as index_module
from otel_smtp.spool.embedded.index_thread import IndexThread
from otel_smtp.spool.messages import ContentLost, DeliveryState
from tests.spool.embedded.books import books, recount
from tests.spool.embedded.working import Ledger, Worker
from tests.spool.queueing import eventually

SECTOR: Final = 512
SEGMENT_OCTETS: Final = 128 * 1024
WAL_OCTETS: Final = 64 * 1024
INDEX_FILES: Final = ("index.db", "index.db-wal", "index.db-journal")
OLD_INDEXES: Final = 8
NAMES_KEPT: Final = 16
PAUSES_SECONDS: Final = (0.0, 0.0, 0.001, 0.004, 0.02)


class Content(NamedTuple):
    """What a file holds at a moment: as it was written; as it was synced; what was written since."""

    written: bytes
    synced: bytes
    pending: tuple[tuple[int, bytes], ...]

    def after_power_loss(self, chance: random.Random) -> bytes:
        content = bytearray(self.synced)
        share = chance.choice((0.0, 0.5, 1.0))
        for at, data in self.pending:
            for start in sectors(at, len(data)):
                if chance.random() < share:
                    end = min(start + SECTOR - start % SECTOR, at + len(data))
                    content[len(content) : start] = bytes(max(0, start - len(content)))
                    content[start:end] = data[start - at : end - at]
        return bytes(content)


def sectors(at: int, octets: int) -> Iterator[int]:
    """Where the sectors begin that a write touches, or the write itself."""
    start = at
    while start < at + octets:
        yield start
        start += SECTOR - start % SECTOR


@dataclass(slots=True, eq=False)
class File:
    """A file of the model."""

    written: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    _content: Content | None = None

    def write(self, at: int, data: bytes) -> None:
        self.written[len(self.written) : at] = bytes(max(0, at - len(self.written)))
        self.written[at : at + len(data)] = data
        self.pending.append((at, data))
        self._content = None

    def allocate(self, octets: int) -> None:
        self.written.extend(bytes(max(0, octets - len(self.written))))
        self._content = None

    def cut(self, octets: int) -> None:
        """Durable at once: it is only done to what holds no mail."""
        del self.written[octets:]
        self.sync()

    def sync(self) -> None:
        self.synced, self.pending, self._content = bytes(self.written), [], None

    @property
    def content(self) -> Content:
        """Made once for all moments at which it is the same."""
        if self._content is None:
            self._content = Content(bytes(self.written), self.synced, tuple(self.pending))
        return self._content


Names = Mapping[str, File]


class Books(NamedTuple):
    """What is known from outside at a moment: see `Ledger`."""

    durable: frozenset[str]
    held: frozenset[str]
    leased: frozenset[str]
    ended: frozenset[str]

    @classmethod
    def of(cls, ledger: Ledger) -> "Books":
        # Held first: what is held then and durable still was held all the time.
        held, leased = frozenset(ledger.held), frozenset(ledger.leased)
        return cls(frozenset(ledger.durable), held, leased, frozenset(ledger.ended))


class Moment(NamedTuple):
    """When a crash may happen.

    Attributes:
        number, call: after which system call.
        directories: for each, what may be found in it: names of before it was last synced first, those of now last.
        indexes: the index's files as they are now, and before, the newest first.
    """

    number: int
    call: str
    directories: Mapping[str, Sequence[Mapping[str, Content]]]
    indexes: Sequence[Mapping[str, bytes]]
    books: Books


class Disk:
    """Watches what is done to the files below a directory.

    Args:
        most: how many moments are kept, chosen by `chance`.
        pause: called before anything is done in the index's thread.

    Attributes:
        moments: what was kept.
        calls: how many system calls there were.
    """

    def __init__(
        self,
        root: Path,
        monkeypatch: pytest.MonkeyPatch,
        ledger: Ledger,
        chance: random.Random,
        most: int,
        pause: Callable[[], None],
    ) -> None:
        self._root = str(root)
        self._pause = pause
        self._ledger = ledger
        self._chance = chance
        self._most = most
        self.moments: list[Moment] = []
        self.calls = 0
        self.lock = threading.RLock()
        self._files: dict[tuple[int, int], File] = {}
        self._names: dict[str, list[Names]] = {}
        self._indexes: list[Mapping[str, bytes]] = []
        self._is_index_changed = True
        self._fstat = os.fstat
        for name, note in (
            ("open", self._opened), ("write", self._wrote), ("pwrite", self._pwrote), ("fdatasync", self._synced),
            ("fsync", self._synced), ("posix_fallocate", self._allocated), ("ftruncate", self._cut),
            ("rename", self._renamed), ("replace", self._renamed), ("link", self._linked), ("unlink", self._unlinked),
        ):  # fmt: skip
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name), note))
        monkeypatch.setattr(os, "pwritev", self._pwritev)
        monkeypatch.setattr(IndexThread, "call", self._index_call(IndexThread.call))

    # What is done ----------------------------------------------------------------------------------------------

    def _watched(self, name: str, call: Callable[..., Any], note: Callable[..., bool]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            with self.lock:
                is_appended = name == "write" and self._file(arguments[0]) is not None
                before = os.lseek(arguments[0], 0, os.SEEK_CUR) if is_appended else 0
                result = call(*arguments, **named)
                if note(result, before, *arguments):
                    self._have_called(name)
                return result

        return watched

    def _pwritev(self, file: int, buffers: list[bytes], at: int, flags: int = 0) -> int:
        """Writes, and syncs; a crash may come in between."""
        assert flags == os.RWF_DSYNC
        data = b"".join(buffers)
        with self.lock:
            done = os.pwrite(file, data, at)
            os.fdatasync(file)
        return done

    def _index_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(thread: IndexThread, work: Callable[[], Any]) -> Any:
            def locked() -> Any:
                self._pause()
                with self.lock:
                    self._is_index_changed = True
                    return work()

            return call(thread, locked)

        return watched

    def _file(self, file: int) -> File | None:
        status = self._fstat(file)
        return self._files.get((status.st_dev, status.st_ino))

    def _path(self, path: Any) -> tuple[str, str] | None:
        """Directory and name; None: it is not ours, or the index's."""
        directory, name = os.path.split(os.fspath(path))
        if directory != self._root and not directory.startswith(f"{self._root}/"):
            return None
        return None if name in INDEX_FILES else (directory, name)

    def _now(self, directory: str) -> Names:
        return self._names.setdefault(directory, [{}])[-1]

    def _rename(self, directory: str, names: Names) -> None:
        kept = self._names.setdefault(directory, [{}])
        kept.append(names)
        if len(kept) > NAMES_KEPT:
            del kept[1]

    def _opened(self, file: int, _: int, path: Any, flags: int, *__: Any, **___: Any) -> bool:
        found = self._path(path)
        if found is None or not flags & os.O_CREAT or not stat.S_ISREG(self._fstat(file).st_mode):
            return False
        directory, name = found
        if name in self._now(directory):
            if flags & os.O_TRUNC:
                self._now(directory)[name].cut(0)
            return False
        status = self._fstat(file)
        made = self._files[status.st_dev, status.st_ino] = File()
        self._rename(directory, {**self._now(directory), name: made})
        return True

    def _wrote(self, done: int, before: int, file: int, data: bytes) -> bool:
        if (found := self._file(file)) is None:
            return False
        found.write(before, bytes(data[:done]))
        return True

    def _pwrote(self, done: int, _: int, file: int, data: bytes, at: int) -> bool:
        if (found := self._file(file)) is None:
            return False
        found.write(at, bytes(data[:done]))
        return True

    def _allocated(self, _: None, __: int, file: int, at: int, octets: int) -> bool:
        if (found := self._file(file)) is None:
            return False
        found.allocate(at + octets)
        return True

    def _cut(self, _: None, __: int, file: int, octets: int) -> bool:
        if (found := self._file(file)) is None:
            return False
        found.cut(octets)
        return True

    def _synced(self, _: None, __: int, file: int) -> bool:
        if stat.S_ISDIR(self._fstat(file).st_mode):
            directory = os.readlink(f"/proc/self/fd/{file}")
            if directory != self._root and not directory.startswith(f"{self._root}/"):
                return False
            self._names[directory] = [self._now(directory)]
            return True
        if os.readlink(f"/proc/self/fd/{file}") == f"{self._root}/index.db-wal":
            self._indexes.clear()  # those of before are gone for good
            self._is_index_changed = True
            return False
        if (found := self._file(file)) is None:
            return False
        found.sync()
        return True

    def _renamed(self, _: None, __: int, source: Any, to: Any) -> bool:
        before, after = self._path(source), self._path(to)
        if before is None or before[1] not in self._now(before[0]):
            return False
        rest = {**self._now(before[0])}
        moved = rest.pop(before[1])
        if after is None:  # it is the index's from now on
            self._rename(before[0], rest)
        elif before[0] == after[0]:
            self._rename(before[0], {**rest, after[1]: moved})
        else:
            self._rename(after[0], {**self._now(after[0]), after[1]: moved})
            self._rename(before[0], rest)
        return True

    def _linked(self, _: None, __: int, source: Any, to: Any) -> bool:
        after = self._path(to)
        if after is None:
            return False
        # The index's write-ahead log, kept as room for the next one.
        self._rename(after[0], {**self._now(after[0]), after[1]: File()})
        return True

    def _unlinked(self, _: None, __: int, path: Any, **___: Any) -> bool:
        found = self._path(path)
        if found is None or found[1] not in self._now(found[0]):
            return False
        rest = {**self._now(found[0])}
        gone = rest.pop(found[1])
        self._rename(found[0], rest)
        for key in [key for key, file in self._files.items() if file is gone]:
            del self._files[key]  # its number may be another's soon
        return True

    # What may be found -----------------------------------------------------------------------------------------

    def _have_called(self, name: str) -> None:
        self.calls += 1
        # Each call has the same chance to be among those that are left at the end.
        place = len(self.moments) if self.calls <= self._most else self._chance.randrange(self.calls)
        if place >= self._most:
            return
        if self._is_index_changed:
            self._is_index_changed = False
            found: dict[str, bytes] = {}
            for one in INDEX_FILES:
                path = os.path.join(self._root, one)
                if os.path.exists(path):
                    with open(path, "rb") as file:
                        found[one] = file.read()
            self._indexes.insert(0, found)
            del self._indexes[OLD_INDEXES:]
        directories = {
            directory: [{name: file.content for name, file in names.items()} for names in kept]
            for directory, kept in self._names.items()
        }
        self.moments[place : place + 1] = [
            Moment(self.calls, name, directories, tuple(self._indexes), Books.of(self._ledger))
        ]

    def differences(self) -> list[str]:
        """Where the model is not as the disk is: then nothing that it says counts."""
        found: list[str] = []
        with self.lock:
            for directory, kept in self._names.items():
                there = {one.name for one in os.scandir(directory) if one.is_file() and one.name not in INDEX_FILES}
                if there != set(kept[-1]):
                    found.append(f"{directory} has {sorted(there)}, not {sorted(kept[-1])}")
                found += [
                    f"{directory}/{name} holds something else"
                    for name, file in kept[-1].items()
                    if name in there - {"index.reserve"} and Path(directory, name).read_bytes() != file.written
                ]
        return found


@dataclass(frozen=True, slots=True)
class Crash:
    """What is lost at a moment.

    Attributes:
        index: how old the index is that is found; None: there is none.
    """

    loses_power: bool
    index: int | None

    def __str__(self) -> str:
        index = "without index" if self.index is None else f"index {self.index} writes old" if self.index else "index"
        return f"{'power lost' if self.loses_power else 'killed'}, {index}"

    def leave(self, moment: Moment, root: Path, into: Path, chance: random.Random) -> None:
        """Make what is found afterwards."""
        into.mkdir()
        for directory, kept in moment.directories.items():
            place = into / Path(directory).relative_to(root)
            place.mkdir(exist_ok=True)
            names = chance.choice((kept[0], chance.choice(kept), kept[-1])) if self.loses_power else kept[-1]
            for name, content in names.items():
                if name not in ("LOCK", "index.reserve"):
                    data = content.after_power_loss(chance) if self.loses_power else content.written
                    (place / name).write_bytes(data)
        if self.index is not None:
            for name, data in moment.indexes[min(self.index, len(moment.indexes) - 1)].items():
                (into / name).write_bytes(data)


async def faults_of(path: Path, books: Books, contents: Mapping[str, bytes]) -> list[str]:
    """Recover a spool, and say what is wrong with it."""
    has_index = (path / "index.db").exists()
    store = EmbeddedStore(path, least_free_octets=0, segment_octets=SEGMENT_OCTETS)
    recovery = await store.open()
    try:
        if store._keeper is not None:
            store._keeper.cancel()
        shown = {one.id: one for one in await store.page("", 1_000_000)}
        faults = [f"{one} is lost" for one in sorted(books.durable - shown.keys())]
        faults += [f"{one} has ended and is back" for one in sorted(books.ended & shown.keys())]
        faults += [f"{one} is said to be lost" for one in recovery.lost]
        # Without an index nothing may be left that says what a content is: then it is set aside.
        has_index &= not any("made again" in remark for remark in recovery.remarks)
        faults += [alarm for alarm in recovery.alarms if has_index or "whose messages nobody knows" not in alarm]
        for one, view in shown.items():
            entry = await store.indexing.look_up(one)
            try:
                if store._contents.part(entry, 0, entry.octets) != contents[one]:
                    faults.append(f"{one} has another content")
            except ContentLost as error:
                faults.append(f"{one}: {error}")
            if entry.place is None or entry.place.crc != zlib.crc32(contents[one]):
                faults.append(f"{one} is taken for damaged")
            if one in books.held and one in books.durable and view.state is not DeliveryState.HELD:
                faults.append(f"{one} was held and is {view.state}")
            if one in books.leased and not all(delivery.is_possible_duplicate for delivery in entry.deliveries):
                faults.append(f"{one} was being attempted and may be a duplicate, unmarked")
        tally = dict(await store.tally())
        come = tally.pop("accepted", 0) + tally.pop("notified", 0)
        if come != sum(tally.values()) + len(shown):
            faults.append(f"{come} have come, {len(shown)} are there, and the rest is {tally}")
        return faults
    finally:
        await store.close()


@dataclass
class Outcome:
    """What crashes came to.

    Attributes:
        calls, moments, crashes: how many system calls, moments that were kept, and crashes there.
        faults: what was wrong, with when.
    """

    calls: int = 0
    moments: int = 0
    crashes: int = 0
    faults: list[str] = field(default_factory=list)

    def told(self) -> str:
        """One line."""
        return f"{self.calls} system calls, {self.crashes} crashes at {self.moments} of them, {len(self.faults)} faults"


async def crash_at_any_call(
    directory: Path, seed: int, *, workers: int, steps: int, moments: int, crashes: int
) -> Outcome:
    """Let workers do everything at once, then crash at each moment that was kept.

    Args:
        moments: how many system calls, at most, after which crashes are looked at.
        crashes: how many at each of them: the process dies, with its index and without; then power is lost, at random.
    """
    chance, pauses = random.Random(seed), random.Random(seed)
    ledger, compacting, root = Ledger(), asyncio.Lock(), directory / "spool"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index_module, "WAL_OCTETS", WAL_OCTETS)
        # Records are synced by the call that writes them, or by one of its own.
        patched.setattr(directory_module, "has_durable_writes", lambda _: bool(seed % 2))
        disk = Disk(
            root, patched, ledger,
            chance=chance, most=moments, pause=lambda: time.sleep(pauses.choice(PAUSES_SECONDS)),
        )  # fmt: skip
        store = EmbeddedStore(root, least_free_octets=0, segment_octets=SEGMENT_OCTETS)
        await store.open()
        try:
            if store._keeper is not None:
                store._keeper.cancel()  # what it does, workers do
            await asyncio.gather(
                *[
                    Worker(store, ledger, seed * 100 + number, compacting, steps=steps).run()
                    for number in range(workers)
                ]
            )
            assert await books(store) == await recount(store)
        finally:
            await store.close()
        # Contents of mail that has ended are removed in the background.
        with contextlib.suppress(TimeoutError):
            await eventually(lambda: not disk.differences(), timeout_seconds=30)
        assert not (different := disk.differences()), different
    outcome = Outcome(disk.calls, len(disk.moments))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index_module, "WAL_OCTETS", WAL_OCTETS)  # made at each start
        for moment in disk.moments:
            kinds = [Crash(False, 0), Crash(False, None)]
            kinds += [Crash(True, chance.choice((0, chance.randrange(OLD_INDEXES), None))) for _ in range(crashes)]
            for number, crash in enumerate(kinds[:crashes]):
                left = directory / f"{moment.number}-{number}"
                crash.leave(moment, root, left, chance)
                outcome.crashes += 1
                faults = await faults_of(left, moment.books, ledger.contents)
                outcome.faults += [
                    f"seed {seed}, {moment.call} {moment.number}, {crash}: {fault}, in {left}" for fault in faults
                ]
                if not faults:
                    shutil.rmtree(left)
    return outcome
