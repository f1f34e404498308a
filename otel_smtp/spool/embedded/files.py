"""The spool's directory: contents as files, what makes them durable, and the reserve for a full disk.

::

    LOCK      locked by the owner for its whole life; the lock, not the file, says that somebody is there
    reserve   room that is given back to the disk when it is full, so that results can still be recorded
    clean     there while nobody runs and the last one ended well
    tmp/      contents being received; whatever lies here at start was never answered 250
    body/x/   complete contents, 32 directories by the last character of the name

A file is synced before it gets its name in body/, and the directory is synced after: only then may the index speak of
it. An error of a sync is never tried again: Linux drops the pages that it could not write, and a second sync would
succeed over lost data.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from otel_smtp.spool.messages import ContentLost, SpoolError, StorageBroken, StorageFull, new_id

_TEMPORARY: Final = "tmp"
RESERVE_OCTETS: Final = 16 * 1024 * 1024
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Their locks and shared memory do not keep SQLite's index whole.
_REMOTE_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "fuse.sshfs", "fuse.s3fs"}
)
_BUCKETS: Final = "0123456789abcdefghjkmnpqrstvwxyz"


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a content lies: a part of a file, which it may share with others that came at the same time."""

    file: str
    offset: int
    octets: int
    digest: bytes  # SHA-256


def storage_error(error: OSError) -> SpoolError:
    """What an error of the disk means for a message."""
    if error.errno in _FULL:
        return StorageFull(f"the disk is full: {error}")
    return StorageBroken(f"the disk failed: {error}")


class SpoolDirectory:
    """The directory of one spool, owned by this process from `open` to `close`.

    Blocks: for use in the store's thread, or before the event loop runs.
    """

    def __init__(self, path: Path, *, reserve_octets: int = RESERVE_OCTETS) -> None:
        self.path = path
        self._root = str(path)  # what is done for each mail does without pathlib, which costs more than the call
        self._reserve_octets = reserve_octets
        self._lock: int | None = None
        self._prepared: tuple[str, str, int] | None = None  # name, path and descriptor of an empty file
        self._buckets: dict[str, int] = {}
        self.was_clean = False

    @property
    def index_path(self) -> Path:
        """Where the index lies."""
        return self.path / "spool.db"

    @property
    def control_path(self) -> Path:
        """Where operators' commands are heard."""
        return self.path / "control"

    def try_out(self) -> str | None:
        """Whether it could be opened, without touching what is in it.

        Returns:
            The process that owns it, in words; None: nobody does.

        Raises:
            SpoolError: why it could not.
        """
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        if (kind := file_system_of(there)) in _REMOTE_FILE_SYSTEMS:
            raise SpoolError(f"a spool cannot be kept safe on {kind}; use a local file system")
        if not there.is_dir():
            raise SpoolError(f"{there} is no directory")
        if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
            raise SpoolError(f"{there} cannot be written by this user")
        try:
            lock = os.open(self.path / "LOCK", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SpoolError(f"{self.path}/LOCK: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"pid {os.pread(lock, 32, 0).decode('ascii', 'replace').strip()}"
        finally:
            os.close(lock)
        return None

    def open(self) -> None:
        """Make what is missing, and own it.

        Raises:
            SpoolError: it belongs to another process, lies on a network file system, or cannot be written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (kind := file_system_of(self.path)) in _REMOTE_FILE_SYSTEMS:
                raise SpoolError(f"{self.path}: a spool cannot be kept safe on {kind}; use a local file system")
            self._own()
            for name in ("tmp", "body", *(f"body/{bucket}" for bucket in _BUCKETS)):
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
            for name in ("body", "."):
                sync_directory(self.path / name)
            self._buckets = {
                bucket: os.open(self.path / "body" / bucket, os.O_RDONLY | os.O_DIRECTORY) for bucket in _BUCKETS
            }
            for left in (self.path / "tmp").iterdir():
                left.unlink()
            self.was_clean = (self.path / "clean").exists() or not self.index_path.exists()
            (self.path / "clean").unlink(missing_ok=True)
        except OSError as error:
            self.close(is_clean=False)
            raise SpoolError(f"{self.path}: {error.strerror}") from error
        except SpoolError:
            self.close(is_clean=False)
            raise

    def _own(self) -> None:
        lock = os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise SpoolError(f"{self.path} belongs to another process{f', pid {owner}' if owner else ''}") from None
        self._lock = lock
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)

    def close(self, *, is_clean: bool) -> None:
        """Give it up. Idempotent."""
        if self._lock is None:
            return
        if self._prepared is not None:
            os.close(self._prepared[2])
            with contextlib.suppress(OSError):
                os.unlink(self._prepared[1])
            self._prepared = None
        if is_clean:
            with contextlib.suppress(OSError):
                (self.path / "clean").touch(mode=0o600)
                sync_directory(self.path)
        for bucket in self._buckets.values():
            os.close(bucket)
        self._buckets.clear()
        os.close(self._lock)
        self._lock = None

    # Contents ---------------------------------------------------------------------------------------------

    def temporary(self) -> Path:
        """A name for a content that is being received."""
        return self.path / _TEMPORARY / new_id()

    def keep_together(self, contents: Sequence[Sequence[bytes]]) -> list[Placement]:
        """Make small contents durable, all in one file: one sync for whatever came at the same time.

        Raises:
            StorageFull, StorageBroken: none of them is kept.
        """
        placements: list[Placement] = []
        offset = 0
        try:
            name, temporary, file = self._prepared or self._new_file()
        except OSError as error:
            raise storage_error(error) from error
        self._prepared = None
        try:
            try:
                for content in contents:
                    digest = hashlib.sha256()
                    octets = 0
                    for chunk in content:
                        digest.update(chunk)
                        octets += len(chunk)
                    placements.append(Placement(name, offset, octets, digest.digest()))
                    offset += octets
                write_all(file, b"".join(chunk for content in contents for chunk in content))
                self._seal(file, temporary, name, offset)
            finally:
                os.close(file)
        except OSError as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise storage_error(error) from error
        return placements

    def prepare(self) -> None:
        """Make the file for the next contents while nobody waits: to create one takes as long as to sync it."""
        if self._prepared is None:
            with contextlib.suppress(OSError):  # whoever needs it tries again, and says why it failed
                self._prepared = self._new_file()

    def _new_file(self) -> tuple[str, str, int]:
        name = new_id()
        temporary = f"{self._root}/{_TEMPORARY}/{name}"
        return name, temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def keep(self, temporary: Path, octets: int, digest: bytes) -> Placement:
        """Make a content durable that was written to a file of `temporary`; errors as `keep_together`."""
        try:
            file = os.open(temporary, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._seal(file, str(temporary), temporary.name, octets)
            finally:
                os.close(file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise storage_error(error) from error
        return Placement(temporary.name, 0, octets, digest)

    def _seal(self, file: int, temporary: str, name: str, octets: int) -> None:
        os.fdatasync(file)
        if os.fstat(file).st_size != octets:
            raise OSError(errno.EIO, f"{temporary} is not as long as what was written")
        os.rename(temporary, self._body(name))
        os.fsync(self._buckets[name[-1]])

    def read(self, placement: Placement, start: int, octets: int) -> bytes:
        """A part of a content, from `start`.

        Raises:
            ContentLost: it is not there.
            StorageBroken: it cannot be read.
        """
        wanted = min(octets, placement.octets - start)
        try:
            file = os.open(self._body(placement.file), os.O_RDONLY | os.O_CLOEXEC)
            try:
                found = _read_all(file, placement.offset + start, wanted)
            finally:
                os.close(file)
        except FileNotFoundError as error:
            raise ContentLost(f"a content is gone: {error}") from error
        except OSError as error:
            raise StorageBroken(f"a content cannot be read: {error}") from error
        if len(found) < wanted:
            raise ContentLost(f"a content is {wanted - len(found)} octets short")
        return found

    def is_intact(self, placement: Placement) -> bool:
        """Whether a content is there and is what was written."""
        digest = hashlib.sha256()
        try:
            file = os.open(self._body(placement.file), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageBroken(f"a content cannot be read: {error}") from error
        try:
            done = 0
            while done < placement.octets:
                piece = _read_all(file, placement.offset + done, min(1 << 18, placement.octets - done))
                if not piece:
                    return False
                digest.update(piece)
                done += len(piece)
        except OSError as error:
            raise StorageBroken(f"a content cannot be read: {error}") from error
        finally:
            os.close(file)
        return digest.digest() == placement.digest

    def remove(self, files: Iterable[str]) -> None:
        """Remove contents that nobody needs; one that stays is removed at the next start."""
        for name in files:
            with contextlib.suppress(OSError):
                os.unlink(self._body(name))

    def files(self) -> Iterator[str]:
        """The names of all complete contents."""
        for bucket in _BUCKETS:
            with os.scandir(self.path / "body" / bucket) as entries:
                yield from (entry.name for entry in entries)

    def _body(self, name: str) -> str:
        return f"{self._root}/body/{name[-1]}/{name}"

    # Room -------------------------------------------------------------------------------------------------

    def fill_reserve(self) -> bool:
        """Take the reserve from the disk, if it has that much; whether it is there."""
        reserve = self.path / "reserve"
        try:
            file = os.open(reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(file, 0, self._reserve_octets)
            finally:
                os.close(file)
        except OSError:
            self.release_reserve()
            return False
        return True

    def release_reserve(self) -> bool:
        """Give the reserve to the disk; whether there was one."""
        try:
            (self.path / "reserve").unlink()
        except OSError:
            return False
        return True

    def room(self) -> tuple[int, float]:
        """Free octets, and the share of free inodes (1.0 where the file system does not count them)."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize, found.f_favail / found.f_files if found.f_files else 1.0


def write_all(file: int, data: bytes) -> None:
    """Write all of `data`: the system may take less than it is given without saying that anything is wrong."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _read_all(file: int, offset: int, octets: int) -> bytes:
    pieces: list[bytes] = []
    while octets > 0 and (piece := os.pread(file, octets, offset)):
        pieces.append(piece)
        offset += len(piece)
        octets -= len(piece)
    return b"".join(pieces)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def file_system_of(path: Path) -> str:
    """The kind of file system that `path` lies on, as the kernel calls it; "" where it does not say."""
    best, kind = "", ""
    with contextlib.suppress(OSError):
        real = os.path.realpath(path)
        with open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                _, mounted_on, found, *_ = line.split(" ")
                mounted_on = mounted_on.encode().decode("unicode_escape")
                is_below = mounted_on == "/" or real == mounted_on or real.startswith(f"{mounted_on}/")
                if is_below and len(mounted_on) >= len(best):
                    best, kind = mounted_on, found
    return kind
