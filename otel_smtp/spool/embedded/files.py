"""File operations of a spool: regular files only, complete writes, and errors of the disk as spool errors."""

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Final

from otel_smtp.spool.messages import SpoolError, StorageBroken, StorageFull

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OPEN: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # opening a FIFO returns at once, so it is detected
_ZEROS: Final = bytes(1024 * 1024)
# File systems whose kernel code makes a durable write durable. Others, such as FUSE, leave that to a server, which need
# not do it.
_DURABLE_WRITES: Final = frozenset({"ext3", "ext4", "xfs", "btrfs"})
_UNKNOWN_CALL: Final = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})  # to the kernel, or a sandbox


def storage_error(error: OSError) -> SpoolError:
    """The spool error for an error of the disk."""
    if error.errno in _FULL:
        return StorageFull(f"the disk is full: {error}")
    return StorageBroken(f"the disk failed: {error}")


def open_regular(path: Path, flags: int) -> int:
    """Open a file of ours, readable by us alone.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    file = os.open(path, flags | _OPEN, 0o600)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    if flags & os.O_CREAT:
        os.fchmod(file, 0o600)  # whatever the umask
    return file


def write_all(file: int, data: bytes) -> None:
    """Write all of `data`: the system may silently take less."""
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


def has_durable_writes(path: Path) -> bool:
    """Whether writes below `path` can be made durable by the writing call itself; see `write_durably`."""
    return hasattr(os, "RWF_DSYNC") and file_system_of(path) in _DURABLE_WRITES


def write_durably(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
    """Write all of `data` at an offset; returns when the disk has it.

    A thread that returns from a system call waits for the interpreter's lock, and then the event loop waits for the
    thread until its next call: fewer calls mean less of both.

    Args:
        in_one_call: the file's directory `has_durable_writes`.

    Returns:
        Whether one call will do next time too.
    """
    if in_one_call:
        try:
            done = os.pwritev(file, [data], at, os.RWF_DSYNC)
        except OSError as error:
            if error.errno not in _UNKNOWN_CALL:
                raise
            in_one_call, done = False, 0
        if done == len(data):
            return True
        data, at = data[done:], at + done
    write_all_at(file, data, at)
    os.fdatasync(file)
    return in_one_call


def write_zeros(file: int, octets: int) -> None:
    """Fill the first octets of a file."""
    for at in range(0, octets, len(_ZEROS)):
        write_all_at(file, _ZEROS[: octets - at], at)


def read_at(file: int, at: int, octets: int) -> bytes:
    """`octets` from `at` on, or what there is of them."""
    pieces: list[bytes] = []
    while octets > 0 and (piece := os.pread(file, octets, at)):
        pieces.append(piece)
        at += len(piece)
        octets -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def open_whole(path: Path, octets: int) -> int | None:
    """Open a file if it has exactly this many octets."""
    with contextlib.suppress(FileNotFoundError):
        file = open_regular(path, os.O_RDWR)
        if os.fstat(file).st_size == octets:
            return file
        os.close(file)
    return None


def read_or_zeros(file: int, at: int, octets: int) -> bytes:
    """`octets` from `at` on; zeros in place of unreadable ones."""
    with contextlib.suppress(OSError):
        return read_at(file, at, octets)
    return bytes(octets)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def file_system_of(path: Path) -> str:
    """The kernel's name for the type of the file system of `path`; "" if unknown."""
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
