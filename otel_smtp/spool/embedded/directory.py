"""The directory of a spool: who owns it, what is in it, and what is not ours.

::

    LOCK         locked by the process that owns it
    control      where operators' commands are heard
    log/         segments, by their numbers, and a spare one
    large/       contents that are too large for the log, by the ids of their messages
    tmp/         contents that are being received
    index.db     for what waits and for operators; made again out of the log where it is missing
    lost+found/  what was damaged, for people to look at

Whatever else lies there is told, and neither opened nor removed. Nothing is opened that is no regular file.
"""

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from otel_smtp.spool.messages import ContentLost, SpoolError, StorageBroken, StorageFull

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Their locks and shared memory do not keep an index whole.
_REMOTE_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "fuse.sshfs", "fuse.s3fs"}
)
_DIRECTORIES: Final = ("log", "large", "tmp", "lost+found")
_FILES: Final = ("LOCK", "index.db", "index.db-wal", "index.db-shm", "index.db-journal")
# Of the first version, until its mail is carried over.
_BEFORE: Final = frozenset({"spool.db", "spool.db-wal", "spool.db-shm", "body", "reserve", "clean"})
_OPEN: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO answers at once, and is found out
_ZEROS: Final = bytes(1024 * 1024)


def storage_error(error: OSError) -> SpoolError:
    """What an error of the disk means for a message."""
    if error.errno in _FULL:
        return StorageFull(f"the disk is full: {error}")
    return StorageBroken(f"the disk failed: {error}")


def open_regular(path: Path, flags: int) -> int:
    """Open a file of ours, readable by us alone.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    file = os.open(path, flags | _OPEN, 0o600)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    if flags & os.O_CREAT:
        os.fchmod(file, 0o600)  # whatever the umask
    return file


class SpoolDirectory:
    """The directory of one spool, owned by this process from `open` to `close`. Blocks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log_path = path / "log"
        self.index_path = path / "index.db"
        self._lock: int | None = None
        self._making_spare = threading.Lock()

    # Life ------------------------------------------------------------------------------------------------------

    def try_out(self) -> str | None:
        """Whether it could be opened, without touching what is in it.

        Returns:
            The process that owns it, in words; None: nobody does.

        Raises:
            SpoolError: why it could not.
        """
        there = next(path for path in (self.path, *self.path.parents) if path.exists())
        self._refuse_remote(there)
        if not there.is_dir():
            raise SpoolError(f"{there} is no directory")
        if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
            raise SpoolError(f"{there} cannot be written by this user")
        try:
            lock = open_regular(self.path / "LOCK", os.O_RDWR)
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

    def _refuse_remote(self, path: Path) -> None:
        if (kind := file_system_of(path)) in _REMOTE_FILE_SYSTEMS:
            raise SpoolError(f"{path}: a spool cannot be kept safe on {kind}; use a local file system")

    def open(self) -> None:
        """Make what is missing, and own it.

        Raises:
            SpoolError: it belongs to another process, lies on a network file system, or cannot be written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._refuse_remote(self.path)
            self.path.chmod(0o700)  # first: a umask may have taken our own rights as well
            self._own()
            for name in _DIRECTORIES:
                (self.path / name).mkdir(mode=0o700, exist_ok=True)
                (self.path / name).chmod(0o700)
            sync_directory(self.path)
            for left in (self.path / "tmp").iterdir():
                left.unlink()
            (self.log_path / "spare.new").unlink(missing_ok=True)
        except OSError as error:
            self.close()
            raise SpoolError(f"{error.filename or self.path}: {error.strerror}") from error
        except SpoolError:
            self.close()
            raise

    def _own(self) -> None:
        lock = open_regular(self.path / "LOCK", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise SpoolError(f"{self.path} belongs to another process{f', pid {owner}' if owner else ''}") from None
        self._lock = lock
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give it up, once nobody writes in it any more. Idempotent."""
        with self._making_spare:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def foreign(self) -> Iterator[Path]:
        """What lies there and is not ours."""
        for entry in os.scandir(self.path):
            if entry.name in _DIRECTORIES:
                is_ours = entry.is_dir(follow_symlinks=False)
            elif entry.name == "control":
                is_ours = stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)
            else:
                is_ours = entry.name in _BEFORE or (entry.name in _FILES and entry.is_file(follow_symlinks=False))
            if not is_ours:
                yield Path(entry.path)
        for entry in os.scandir(self.log_path):
            if not entry.is_file(follow_symlinks=False) or not (entry.name == "spare" or _number(entry.name)):
                yield Path(entry.path)
        for entry in os.scandir(self.path / "large"):
            if not entry.is_file(follow_symlinks=False):
                yield Path(entry.path)

    # Segments --------------------------------------------------------------------------------------------------

    def segment(self, number: int) -> Path:
        """Where a segment lies."""
        return self.log_path / f"{number:012d}"

    def segments(self) -> list[int]:
        """The numbers of all segments, the oldest first."""
        return sorted(
            number
            for entry in os.scandir(self.log_path)
            if (number := _number(entry.name)) and entry.is_file(follow_symlinks=False)
        )

    def read_segment(self, number: int) -> bytes:
        """All of a segment.

        Raises:
            OSError: it cannot be read.
        """
        file = open_regular(self.segment(number), os.O_RDONLY)
        try:
            return read_at(file, 0, os.fstat(file).st_size)
        finally:
            os.close(file)

    def take_spare(self, octets: int) -> tuple[Path, int]:
        """A file of `octets` that has been written before; its name and descriptor.

        Raises:
            OSError: there is none, and none can be made.
        """
        with self._making_spare:
            spare = self.log_path / "spare"
            with contextlib.suppress(FileNotFoundError):
                file = open_regular(spare, os.O_RDWR)
                if os.fstat(file).st_size == octets:
                    return spare, file
                os.close(file)
            self._make_spare(octets)
            return spare, open_regular(spare, os.O_RDWR)

    def prepare_spare(self, octets: int) -> bool:
        """Make a spare segment while nobody waits, if there is none; whether there is one."""
        with self._making_spare:
            if self._lock is None:
                return False
            if (self.log_path / "spare").exists():
                return True
            try:
                self._make_spare(octets)
            except OSError:
                return False
            return True

    def _make_spare(self, octets: int) -> None:
        making = self.log_path / "spare.new"
        file = open_regular(making, os.O_RDWR | os.O_CREAT)
        try:
            os.posix_fallocate(file, 0, octets)
            # To sync what was never written costs the file system a step of its own, each time.
            for at in range(0, octets, len(_ZEROS)):
                write_all_at(file, _ZEROS[: octets - at], at)
            os.fsync(file)
        except OSError:
            with contextlib.suppress(OSError):
                making.unlink()
            raise
        finally:
            os.close(file)
        making.rename(self.log_path / "spare")

    def retire(self, number: int) -> None:
        """Let a segment go that nothing needs: it becomes the spare one, or is removed.

        Raises:
            OSError: it cannot.
        """
        with self._making_spare:
            segment, spare = self.segment(number), self.log_path / "spare"
            if spare.exists():
                segment.unlink()
            else:
                segment.rename(spare)
            # Durable before the file is written again: a name of before must not lead to what comes then.
            sync_directory(self.log_path)

    # Large contents --------------------------------------------------------------------------------------------

    def temporary(self, name: str) -> Path:
        """Where a content lies while it is being received."""
        return self.path / "tmp" / name

    def large(self, message_id: str) -> Path:
        """Where a content lies that has a file of its own."""
        return self.path / "large" / message_id

    def keep(self, temporary: Path, message_id: str, octets: int) -> None:
        """Make a content durable that was written to a temporary file.

        Raises:
            StorageFull, StorageBroken: it is not.
        """
        try:
            file = open_regular(temporary, os.O_RDWR)
            try:
                os.fdatasync(file)
                if os.fstat(file).st_size != octets:
                    raise OSError(errno.EIO, f"{temporary} is not as long as what was written")
            finally:
                os.close(file)
            os.rename(temporary, self.large(message_id))
            sync_directory(self.path / "large")
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise storage_error(error) from error

    def larges(self) -> set[str]:
        """The names of all large contents."""
        return {entry.name for entry in os.scandir(self.path / "large") if entry.is_file(follow_symlinks=False)}

    def remove_large(self, message_id: str) -> None:
        """Remove a content that nobody needs; one that stays is removed at the next start."""
        with contextlib.suppress(OSError):
            self.large(message_id).unlink()

    def read(self, path: Path, at: int, octets: int) -> bytes:
        """A part of a file of ours.

        Raises:
            ContentLost: it is not there, or not all of it.
            StorageBroken: it cannot be read.
        """
        try:
            file = open_regular(path, os.O_RDONLY)
            try:
                found = read_at(file, at, octets)
            finally:
                os.close(file)
        except FileNotFoundError as error:
            raise ContentLost(f"a content is gone: {error}") from error
        except OSError as error:
            raise StorageBroken(f"a content cannot be read: {error}") from error
        if len(found) < octets:
            raise ContentLost(f"a content is {octets - len(found)} octets short")
        return found

    # What was damaged ------------------------------------------------------------------------------------------

    def set_aside(self, name: str, data: bytes) -> None:
        """Keep octets for people to look at, as far as there is room."""
        with contextlib.suppress(OSError):
            file = open_regular(self.path / "lost+found" / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                write_all_at(file, data, 0)
            finally:
                os.close(file)

    def move_aside(self, path: Path) -> None:
        """Keep a file for people to look at."""
        with contextlib.suppress(OSError):
            path.rename(self.path / "lost+found" / path.name)

    # Room ------------------------------------------------------------------------------------------------------

    def room(self) -> tuple[int, float]:
        """Free octets, and the share of free inodes (1.0 where the file system does not count them)."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize, found.f_favail / found.f_files if found.f_files else 1.0


def _number(name: str) -> int:
    """The number of a segment's name; 0: it is none."""
    return int(name) if len(name) == 12 and name.isascii() and name.isdigit() else 0


def write_all(file: int, data: bytes) -> None:
    """Write all of `data`: the system may take less than it is given without saying that anything is wrong."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def write_all_at(file: int, data: bytes, at: int) -> None:
    """Write all of `data` at an offset."""
    done = os.pwrite(file, data, at)
    if done < len(data):
        rest = memoryview(data)
        while done < len(data):
            done += os.pwrite(file, rest[done:], at + done)


def read_at(file: int, at: int, octets: int) -> bytes:
    """`octets` from `at` on, or what there is of them."""
    pieces: list[bytes] = []
    while octets > 0 and (piece := os.pread(file, octets, at)):
        pieces.append(piece)
        at += len(piece)
        octets -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


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
