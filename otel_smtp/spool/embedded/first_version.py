"""The first version's spool: a database, and files that contents shared. Its mail is carried over at the start.

Each message keeps its id, so that after an interrupted start the next one resumes: messages already in the log are
skipped. Only when the log durably has all of them are the old files removed, the database last.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import time
import zlib
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from otel_smtp.spool.drafting import MEMORY_LIMIT_OCTETS
from otel_smtp.spool.embedded.aside import envelope
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.embedded.files import open_regular, sync_directory, write_all_at
from otel_smtp.spool.messages import DeliveryState, Kind, SpoolError

_SCHEMA_VERSION: Final = 1
_AT_ONCE: Final = 200
_CRASHES_ALLOWED: Final = 3


@dataclass(frozen=True, slots=True)
class Carried:
    """A message of the first version.

    Attributes:
        content: empty if it has its own file.
        crc: of the content.
    """

    entry: Entry
    content: Sequence[bytes]
    crc: int


@dataclass(frozen=True, slots=True)
class CarriedOver:
    """What operators should know, in words.

    Attributes:
        alarms: what was set aside and may be mail.
    """

    remarks: Sequence[str]
    alarms: Sequence[str]


async def carry_over(
    directory: SpoolDirectory, add: Callable[[Sequence[Carried], Mapping[str, int]], Awaitable[None]]
) -> CarriedOver:
    """Carry the mail of a spool of the first version over, if there is one.

    Args:
        add: makes some new messages durable; with the last ones it gets the old tally.

    Raises:
        SpoolError: it cannot be read; nothing was removed.
    """
    path = directory.path / "spool.db"
    if not path.exists():
        return await asyncio.to_thread(_without_database, directory)
    if not path.is_file() or path.is_symlink():
        raise SpoolError(f"{path} is not a regular file")
    number = 0
    try:
        source = await asyncio.to_thread(_Source, directory)
        try:
            while found := await asyncio.to_thread(source.next):
                number += len(found)
                await add(found, {})
            await add((), await asyncio.to_thread(source.tally))
        finally:
            source.close()
    except sqlite3.Error as error:
        raise SpoolError(f"{path}: {error}") from error
    alarms = await asyncio.to_thread(_set_aside, directory, source.files)
    await asyncio.to_thread(_remove, directory)
    return CarriedOver([f"{number} messages were carried over from the first version's spool"], alarms)


def _without_database(directory: SpoolDirectory) -> CarriedOver:
    alarms = _set_aside(directory, frozenset())
    _remove(directory)
    return CarriedOver((), alarms)


def _set_aside(directory: SpoolDirectory, named: Collection[str]) -> Sequence[str]:
    """Keep contents that the database does not name: they may be lost mail."""
    body = directory.path / "body"
    found = sorted(body.glob("*/*")) if body.is_dir() else []
    left = [path for path in found if path.name not in named]
    for path in left:
        directory.move_aside(path, f"body-{path.name}")
    if not left:
        return []
    return [
        f"{len(left)} contents of the first version's spool, which its spool.db does not name, are moved to lost+found/"
    ]


def _remove(directory: SpoolDirectory) -> None:
    root = directory.path
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(root / "body")
    for name in ("reserve", "clean", "spool.db-wal", "spool.db-shm", "spool.db"):
        (root / name).unlink(missing_ok=True)
    sync_directory(root)


class _Source:
    """The first version's database.

    Attributes:
        files: names of the contents of all returned messages.
    """

    def __init__(self, directory: SpoolDirectory) -> None:
        self._directory = directory
        self._after = ""
        self.files: set[str] = set()
        self._database = sqlite3.connect(directory.path / "spool.db", isolation_level=None, check_same_thread=False)
        try:
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version > _SCHEMA_VERSION:
                raise SpoolError(f"{directory.path}/spool.db was made by a newer version")
            (found,) = self._database.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                raise SpoolError(f"{directory.path}/spool.db is damaged: {found}")
            (self._is_empty,) = self._database.execute("SELECT count(*) = 0 FROM sqlite_schema").fetchone()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        self._database.close()

    def tally(self) -> Mapping[str, int]:
        if self._is_empty:
            return {}
        return dict(self._database.execute("SELECT name, recipients FROM tally").fetchall())

    def next(self) -> Sequence[Carried]:
        """The next messages, in order of ids; none at the end."""
        if self._is_empty:
            return ()
        rows = self._database.execute(
            "SELECT id, kind, arrived_at, expires_at, held_at, warned, forced, header_octets, octets, reverse_path,"
            " parameters, carrier, file, offset, digest FROM msg WHERE id > ? ORDER BY id LIMIT ?",
            (self._after, _AT_ONCE),
        ).fetchall()
        if rows:
            self._after = rows[-1][0]
        return [self._carried(*row) for row in rows]

    def _carried(self, message_id: str, *values: Any) -> Carried:
        (
            kind, arrived, expires, held, warned, forced, header_octets, octets, reverse_path, parameters, carrier,
            file, offset, digest,
        ) = values  # fmt: skip
        self.files.add(file)
        is_large = octets > MEMORY_LIMIT_OCTETS
        entry = Entry.from_values(
            (
                message_id, kind, arrived, expires, held if Kind(kind) is Kind.MAIL else None, warned, forced,
                header_octets, octets, is_large,
                reverse_path, json.loads(parameters), json.loads(carrier), list(self._deliveries(message_id)),
            )
        )  # fmt: skip
        # The spool has had no owner since its process died, whose attempts may have succeeded.
        entry.take_back(crashes_allowed=_CRASHES_ALLOWED, now_ms=round(time.time() * 1000))
        path = self._directory.path / "body" / file[-1] / file
        content, crc = self._copied(entry, path, offset, octets, digest)
        if content is None:
            for one in entry.deliveries:
                one.state = DeliveryState.CORRUPT
        return Carried(entry, () if is_large or content is None else (content,), crc)

    def _deliveries(self, message_id: str) -> Iterator[Sequence[Any]]:
        for row in self._database.execute(
            "SELECT d, dest, state, attempts, crashes, next_at, lease_epoch, possible_duplicate FROM dlv"
            " WHERE msg_id = ? ORDER BY d",
            (message_id,),
        ).fetchall():
            recipients = self._database.execute(
                "SELECT n, addr, notify, orcpt, last FROM rcpt WHERE msg_id = ? AND d = ? ORDER BY n",
                (message_id, row[0]),
            ).fetchall()
            yield *row, recipients

    def _copied(self, entry: Entry, path: Path, offset: int, octets: int, digest: bytes) -> tuple[bytes | None, int]:
        """A content and its checksum; None if it is gone or damaged. Large content is copied to its new place."""
        try:
            content = self._directory.read(path, offset, octets)
        except SpoolError:
            return None, 0
        crc = zlib.crc32(content)
        if hashlib.sha256(content).digest() != digest:
            crc ^= 0xFFFFFFFF  # it is kept for inspection, and never taken for whole
        if entry.is_large:
            temporary = self._directory.temporary(entry.id)
            file = open_regular(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                write_all_at(file, content, 0)
            finally:
                os.close(file)
            self._directory.keep(temporary, entry.id, octets, envelope(entry, crc))
        return content, crc
