"""Writes that are durable when they come back, whatever the system can do in one call."""

import errno
import os
from pathlib import Path

import pytest

from otel_smtp.spool.embedded import files
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.files import has_durable_writes, open_regular, write_durably
from otel_smtp.spool.messages import SpoolError

DATA = b"octets" * 1000


@pytest.mark.parametrize("in_one_call", [True, False])
def test_what_is_written_durably_is_there(tmp_path: Path, *, in_one_call: bool) -> None:
    file = open_regular(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert write_durably(file, DATA, 100, in_one_call=in_one_call) is in_one_call
    finally:
        os.close(file)
    assert (tmp_path / "file").read_bytes() == bytes(100) + DATA


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_where_one_call_cannot_be_made_two_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """A sandbox that knows not every call is no broken disk."""

    def refuse(*arguments: object) -> int:
        raise OSError(error, os.strerror(error))

    synced: list[int] = []
    monkeypatch.setattr(os, "pwritev", refuse)
    monkeypatch.setattr(os, "fdatasync", synced.append)
    file = open_regular(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert write_durably(file, DATA, 0, in_one_call=True) is False
    finally:
        os.close(file)
    assert (tmp_path / "file").read_bytes() == DATA
    assert synced == [file]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_disk_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "pwritev", fail)
    file = open_regular(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(OSError, match=os.strerror(error)):
            write_durably(file, DATA, 0, in_one_call=True)
    finally:
        os.close(file)
    assert (tmp_path / "file").read_bytes() == b""


def test_what_was_written_in_part_is_written_to_its_end_and_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev, fdatasync = os.pwritev, os.fdatasync
    synced: list[int] = []

    def write_less(file: int, buffers: list[bytes], at: int, flags: int) -> int:
        return pwritev(file, [buffers[0][:1000]], at, flags)

    def sync(file: int) -> None:
        synced.append(file)
        fdatasync(file)

    monkeypatch.setattr(os, "pwritev", write_less)
    monkeypatch.setattr(os, "fdatasync", sync)
    file = open_regular(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert write_durably(file, DATA, 0, in_one_call=True) is True
    finally:
        os.close(file)
    assert (tmp_path / "file").read_bytes() == DATA
    assert synced == [file]


@pytest.mark.parametrize(
    ("kind", "has_them"),
    [("ext4", True), ("xfs", True), ("btrfs", True), ("fuse.sshfs", False), ("overlay", False), ("tmpfs", False)],
)
def test_only_file_systems_that_are_known_to_write_durably_are_relied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *, has_them: bool
) -> None:
    monkeypatch.setattr(files, "file_system_of", lambda path: kind)
    assert has_durable_writes(tmp_path) is has_them


@pytest.mark.parametrize("name", ["spool", "spool/log"])
def test_something_else_in_the_place_of_a_directory_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(SpoolError, match=f"^{tmp_path}/{name} is no directory$"):
        SpoolDirectory(tmp_path / "spool").open()
