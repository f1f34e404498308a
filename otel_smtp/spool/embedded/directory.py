"""The directory of a spool: its owner, what is in it, and what is not ours.

::

    LOCK           locked, like the directory itself, by the process that owns it
    control        where operators' commands are heard
    log/           segments, by their numbers, a spare one, and one in reserve
    large/         contents that are too large for the log, by the ids of their messages, with their envelopes
    tmp/           contents that are being received
    index.db       for what waits and for operators; made again out of the log where it is missing
    moving         into which other store its messages are being moved, while they are
    deeds          operators' changes made while no gateway ran, until the next one reports them
    limits         how far the rates of upstreams are used up: see `gateway.kept_limits`
    index.reserve  room for the index's write-ahead log, while it has none
    lost+found/    what was damaged or is unknown, for `otel-smtp queue rebuild` and for people to look at

Anything else there is reported, and neither opened nor removed. Nothing is opened that is not a regular file, and
nothing is removed that may be mail.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from otel_smtp.spool.embedded.files import (
    file_system_of,
    has_durable_writes,
    open_regular,
    open_whole,
    read_at,
    read_or_zeros,
    storage_error,
    sync_directory,
    write_all,
    write_all_at,
    write_zeros,
)
from otel_smtp.spool.messages import ContentLost, SpoolError, new_id

# Their locks and shared memory do not protect an index.
_REMOTE_FILE_SYSTEMS: Final = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "ceph", "glusterfs", "fuse.sshfs", "fuse.s3fs"}
)
_DIRECTORIES: Final = ("log", "large", "tmp", "lost+found")
INDEX_FILES: Final = ("index.db", "index.db-wal", "index.db-shm", "index.db-journal")
_FILES: Final = ("LOCK", *INDEX_FILES, "index.reserve", "moving", "deeds", "limits", "limits.new")
# Of the first version, until its mail is carried over.
_BEFORE: Final = frozenset({"spool.db", "spool.db-wal", "spool.db-shm", "body", "reserve", "clean"})
_SPARES: Final = ("spare", "reserve")  # in the log's directory; `-` and a number follow where a name is not ours to use
_MAKING: Final = ".new"
_NO_MAIL: Final = ("torn-", "index.db")  # no client was answered for it; it is rebuilt from the log
_SECTOR: Final = 4096
_PID_OCTETS: Final = 32
_DEEDS_OCTETS: Final = 4 * 1024 * 1024  # further changes are only in the command's own log
# Errors of this process or this moment, not of the file that was to be read.
_PASSING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})


class SpoolDirectory:
    """The directory of one spool, owned by this process from `open` to `close`. Blocks.

    Attributes:
        has_reserve: the reserve for a full disk exists, or has not been missed yet.
        has_durable_writes: see `files.has_durable_writes`; known once it is open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log_path = path / "log"
        self.index_path = path / "index.db"
        self._lock: int | None = None
        self._locked: int | None = None  # the directory
        self._making_spare = threading.Lock()
        self.has_reserve = True
        self.has_durable_writes = False

    # Life ------------------------------------------------------------------------------------------------------

    def try_out(self) -> str | None:
        """Whether it could be opened, without touching what is in it.

        Returns:
            The process that owns it, in words; None: none does.

        Raises:
            SpoolError: why it could not.
        """
        try:
            there = next(path for path in (self.path, *self.path.parents) if path.exists())
        except OSError as error:
            raise SpoolError(f"{self.path}: {error.strerror}") from error
        self._refuse_remote(there)
        if not there.is_dir():
            raise SpoolError(f"{there} is no directory")
        if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
            raise SpoolError(f"{there} cannot be written by this user")
        try:
            lock = open_regular(self.path / "LOCK", os.O_RDWR)
        except FileNotFoundError:
            return "another process" if self._is_locked() else None
        except OSError as error:
            raise SpoolError(f"{self.path}/LOCK: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return f"pid {os.pread(lock, _PID_OCTETS, 0).decode('ascii', 'replace').strip()}"
        finally:
            os.close(lock)
        return "another process" if self._is_locked() else None

    def _is_locked(self) -> bool:
        try:
            os.close(self._lock_directory())
        except BlockingIOError:
            return True
        except OSError:  # it does not exist yet
            pass
        return False

    def _lock_directory(self) -> int:
        """Lock the directory itself: an operator may remove the lock file as stale.

        Raises:
            BlockingIOError: another process has locked it.
        """
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(directory)
            raise
        except OSError:  # the file system locks files only
            pass
        return directory

    def _refuse_remote(self, path: Path) -> None:
        if (kind := file_system_of(path)) in _REMOTE_FILE_SYSTEMS:
            raise SpoolError(f"{path}: a spool cannot be kept safe on {kind}; use a local file system")

    def open(self) -> None:
        """Create what is missing, and take ownership.

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
            self.has_durable_writes = has_durable_writes(self.log_path)
            for left in self._half_made():
                left.unlink()
        except OSError as error:
            self.close()
            # Something else has the name of a directory.
            words = " is no directory" if isinstance(error, FileExistsError) else f": {error.strerror}"
            raise SpoolError(f"{error.filename or self.path}{words}") from error
        except SpoolError:
            self.close()
            raise

    def _own(self) -> None:
        lock = open_regular(self.path / "LOCK", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._locked = self._lock_directory()
        except BlockingIOError:
            owner = os.pread(lock, _PID_OCTETS, 0).decode("ascii", "replace").strip()
            os.close(lock)
            raise SpoolError(f"{self.path} belongs to another process{f', pid {owner}' if owner else ''}") from None
        self._lock = lock
        with contextlib.suppress(OSError):  # a full disk: the lock alone decides on the owner
            os.pwrite(lock, f"{os.getpid()}\n".encode().ljust(_PID_OCTETS), 0)

    def close(self) -> None:
        """Release it, once nothing is written in it any more. Idempotent."""
        with self._making_spare:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            if self._locked is not None:
                os.close(self._locked)
                self._locked = None

    def _half_made(self) -> Iterator[Path]:
        """Unfinished files of a previous process."""
        for entry in os.scandir(self.path / "tmp"):
            if entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
        for entry in os.scandir(self.log_path):
            if (
                entry.name.startswith("spare-")
                and entry.name.endswith(_MAKING)
                and entry.is_file(follow_symlinks=False)
            ):
                yield Path(entry.path)

    def foreign(self) -> Iterator[Path]:
        """Files there that are not ours."""
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
            is_ours = entry.name.partition("-")[0] in _SPARES or bool(_number(entry.name))
            if not is_ours or not entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
        for name in ("large", "tmp"):
            for entry in os.scandir(self.path / name):
                if not entry.is_file(follow_symlinks=False):
                    yield Path(entry.path)

    # Segments --------------------------------------------------------------------------------------------------

    def segment(self, number: int) -> Path:
        """The path of a segment."""
        return self.log_path / f"{number:012d}"

    def segments(self) -> list[int]:
        """The numbers of all segments, the oldest first."""
        return sorted(
            number
            for entry in os.scandir(self.log_path)
            if (number := _number(entry.name)) and entry.is_file(follow_symlinks=False)
        )

    def read_segment(self, number: int) -> bytes:
        """All of a segment, with zeros in place of unreadable octets.

        Raises:
            OSError: it cannot be read.
        """
        file = open_regular(self.segment(number), os.O_RDONLY)
        try:
            octets = os.fstat(file).st_size
            try:
                return read_at(file, 0, octets)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
            return b"".join(read_or_zeros(file, at, min(_SECTOR, octets - at)) for at in range(0, octets, _SECTOR))
        finally:
            os.close(file)

    def foreign_segments(self) -> set[int]:
        """Numbers taken by files that are no segments."""
        return {
            number
            for entry in os.scandir(self.log_path)
            if (number := _number(entry.name)) and not entry.is_file(follow_symlinks=False)
        }

    def take_spare(self, octets: int, *, is_for_results: bool) -> tuple[Path, int, bool]:
        """A file of `octets` that has been written before.

        Args:
            is_for_results: the one in reserve may be taken if there is no other.

        Returns:
            Its name, its descriptor, and whether it is the one in reserve.

        Raises:
            OSError: there is none, and none can be made.
        """
        with self._making_spare:
            spare = self._ready("spare")
            if (file := open_whole(spare, octets)) is None:
                try:
                    self._make_spare(spare, octets)
                except OSError:
                    if not is_for_results:
                        raise
                    spare = self._ready("reserve")
                    if (file := open_whole(spare, octets)) is None:
                        raise
                    self.has_reserve = False
                    return spare, file, True
                file = open_regular(spare, os.O_RDWR)
            return spare, file, False

    def prepare(self, octets: int) -> None:
        """While no message waits, make a spare segment and the reserve, unless they exist."""
        with self._making_spare:
            if self._lock is None:
                return
            try:
                for name in reversed(_SPARES):  # the reserve first
                    if not (path := self._ready(name)).exists():
                        self._make_spare(path, octets)
            except OSError:
                self.has_reserve = False
            else:
                self.has_reserve = True

    def _ready(self, name: str) -> Path:
        """The path of a segment that waits for use: a free name, or an existing file's."""
        path = self.log_path / name
        for number in itertools.count(2):
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(path.lstat().st_mode):
                    path = self.log_path / f"{name}-{number}"
                    continue
            return path
        raise AssertionError

    def _make_spare(self, path: Path, octets: int) -> None:
        making = self.log_path / f"spare-{new_id()}{_MAKING}"
        file = open_regular(making, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.posix_fallocate(file, 0, octets)
            # Each sync of octets never written before costs the file system an extra step.
            write_zeros(file, octets)
            os.fsync(file)
        except OSError:
            with contextlib.suppress(OSError):
                making.unlink()
            raise
        finally:
            os.close(file)
        making.rename(path)

    def retire(self, number: int) -> None:
        """Retire an unused segment: it goes into reserve, becomes the spare one, or is removed.

        Raises:
            OSError: it cannot.
        """
        with self._making_spare:
            segment = self.segment(number)
            wanted = [path for name in reversed(_SPARES) if not (path := self._ready(name)).exists()]
            if wanted:
                segment.rename(wanted[0])
            else:
                segment.unlink()
            # Durable before the file is written again: its old name must not lead to new content.
            sync_directory(self.log_path)

    # Large contents --------------------------------------------------------------------------------------------

    def temporary(self, name: str) -> Path:
        """The path of content while it is being received."""
        return self.path / "tmp" / name

    def large(self, message_id: str) -> Path:
        """The path of content that has its own file."""
        return self.path / "large" / message_id

    def keep(self, temporary: Path, message_id: str, octets: int, envelope: bytes) -> None:
        """Make content durable that was written to a temporary file.

        Args:
            envelope: written behind it, so that the file identifies itself if all else is lost.

        Raises:
            StorageFull, StorageBroken: it is not.
        """
        try:
            file = open_regular(temporary, os.O_RDWR)
            try:
                if os.fstat(file).st_size != octets:
                    raise OSError(errno.EIO, f"{temporary} differs in length from the written content")
                write_all_at(file, envelope, octets)
                os.fdatasync(file)
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
        """Remove content that is no longer needed; after a failure the next start removes it."""
        with contextlib.suppress(OSError):
            self.large(message_id).unlink()

    def read(self, path: Path, at: int, octets: int) -> bytes:
        """Read a part of one of our files.

        Raises:
            ContentLost: it is missing, incomplete or unreadable: the message must be set aside.
            SpoolError: it cannot be read now.
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
            if error.errno in _PASSING:
                raise SpoolError(f"a content cannot be read now: {error}") from error
            raise ContentLost(f"a content cannot be read: {error}") from error
        if len(found) < octets:
            raise ContentLost(f"a content is {octets - len(found)} octets short")
        return found

    # Damaged files ------------------------------------------------------------------------------------------

    def set_aside(self, name: str, data: bytes) -> None:
        """Keep octets for inspection, as far as there is room."""
        with contextlib.suppress(OSError):
            file = open_regular(self.path / "lost+found" / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                write_all_at(file, data, 0)
            finally:
                os.close(file)

    def move_aside(self, path: Path, name: str = "") -> None:
        """Keep a file for inspection, under its own name or another, beside any file that already has that name."""
        aside = self.path / "lost+found"
        to = aside / (name or path.name)
        if os.path.lexists(to):
            to = aside / f"{to.name}-{new_id()}"
        with contextlib.suppress(OSError):
            path.rename(to)

    @property
    def former_index(self) -> Path:
        """An unusable index, until it has been searched for messages that the log has lost."""
        return self.path / "lost+found" / "index.db.unread"

    def set_index_aside(self) -> None:
        """Keep the index as the former one, unless there is one: then it is that one's unfinished replacement."""
        former = self.former_index
        is_replacement = former.exists()
        for name in reversed(INDEX_FILES):  # the file without which the others are useless comes last
            file, kept = self.path / name, former.with_name(name.replace("index.db", former.name))
            if not is_replacement:
                kept.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    file.rename(kept)
            file.unlink(missing_ok=True)

    def keep_former_index(self, *, is_needed: bool) -> None:
        """Keep the former index, if there is one, for inspection by people.

        Args:
            is_needed: keep it even when the next one comes; otherwise until then.
        """
        aside = self.path / "lost+found"
        with contextlib.suppress(OSError):
            if is_needed:
                (aside / "unreadable").mkdir(mode=0o700, exist_ok=True)
                self.former_index.rename(aside / "unreadable" / f"index.db-{new_id()}")
            else:
                self.former_index.replace(aside / "index.db")

    def aside(self) -> list[Path]:
        """Files kept there that may be mail, and have not been inspected."""
        with contextlib.suppress(OSError):
            return sorted(
                Path(entry.path)
                for entry in os.scandir(self.path / "lost+found")
                if entry.is_file(follow_symlinks=False) and not entry.name.startswith(_NO_MAIL)
            )
        return []

    def put_back(self, path: Path, message_id: str) -> None:
        """Put content that was set aside back as that of a message.

        Raises:
            OSError: it cannot be.
        """
        path.rename(self.large(message_id))
        sync_directory(self.path / "large")

    def moving(self) -> str | None:
        """The store to which the messages are being moved, see `begin_move`, if any.

        Raises:
            OSError: that cannot be read.
        """
        try:
            file = open_regular(self.path / "moving", os.O_RDONLY)
        except FileNotFoundError:
            return None
        with open(file, encoding="utf-8") as text:
            return text.read()

    def begin_move(self, where: str) -> None:
        """Note durably that the messages are being moved.

        Raises:
            OSError: it cannot be noted.
        """
        new = self.path / "tmp" / "moving"
        file = open_regular(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            os.write(file, where.encode())
            os.fsync(file)
        finally:
            os.close(file)
        new.rename(self.path / "moving")
        sync_directory(self.path)

    def end_move(self) -> None:
        """No message is being moved any more.

        Raises:
            OSError: it cannot be noted.
        """
        (self.path / "moving").unlink(missing_ok=True)
        sync_directory(self.path)

    # What operators did -----------------------------------------------------------------------------------------

    def keep_deed(self, deed: str) -> None:
        """Keep a line for the next gateway, if there is room."""
        with contextlib.suppress(OSError):
            file = open_regular(self.path / "deeds", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            try:
                if os.fstat(file).st_size < _DEEDS_OCTETS:
                    write_all(file, f"{deed}\n".encode("ascii"))
            finally:
                os.close(file)

    def take_deeds(self) -> list[str]:
        """Return the lines that were kept, and forget them."""
        path = self.path / "deeds"
        try:
            file = open_regular(path, os.O_RDONLY)
        except OSError:
            return []
        with open(file, encoding="ascii", errors="replace") as lines:
            kept = lines.read().splitlines()
        with contextlib.suppress(OSError):
            path.unlink()
        return kept

    # ------------------------------------------------------------------------------------------------------------

    def give_up(self, path: Path) -> None:
        """Archive kept files that cannot be put back, once people know about them."""
        known = self.path / "lost+found" / "unreadable"
        known.mkdir(mode=0o700, exist_ok=True)
        path.rename(known / path.name)

    # Room ------------------------------------------------------------------------------------------------------

    def room(self) -> tuple[int, float]:
        """Free octets, and the share of free inodes (1.0 if the file system does not count them).

        Raises:
            OSError: it is not known, or the directory that was opened has been removed or replaced.
        """
        if self._locked is not None and not os.path.samestat(os.stat(self.path), os.fstat(self._locked)):
            raise OSError(errno.ESTALE, "is another directory than before", str(self.path))
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize, found.f_favail / found.f_files if found.f_files else 1.0


def _number(name: str) -> int:
    """The number of a segment's name; 0: it is none."""
    return int(name) if len(name) == 12 and name.isascii() and name.isdigit() else 0
