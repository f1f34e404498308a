"""Content in memory and in files: whole, replayable, bounded, and gone afterwards."""

import asyncio
import errno
import os
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import pytest

from otel_smtp.forwarding.content import Content
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import Reply
from tests.support.waiting import until

HEADER = b"Subject: x\r\n"


async def collected(chunks: Iterable[bytes], *, memory_limit_octets: int) -> Content:
    """A content that has all of `chunks`, given as slowly as it takes them."""
    resumed = asyncio.Event()
    content = Content(memory_limit_octets, resumed.set)
    for chunk in chunks:
        if not content.write(chunk):
            await asyncio.wait_for(resumed.wait(), 5)
            resumed.clear()
    await completed(content)
    return content


async def completed(content: Content) -> None:
    done = asyncio.Event()
    content.complete(done.set)
    await asyncio.wait_for(done.wait(), 5)


async def piece_at(content: Content, offset: int) -> bytes | None:
    read: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
    content.read(offset, read.set_result)
    return await asyncio.wait_for(read, 5)


async def whole(content: Content) -> bytes:
    if content.pieces is not None:
        return b"".join(content.pieces)
    body = b""
    while len(body) < content.body_octets:
        piece = await piece_at(content, len(body))
        assert piece
        body += piece
    return body


@pytest.mark.parametrize(
    ("chunks", "limit", "in_memory"),
    [
        ((HEADER,), 10, True),
        ((HEADER, b"\r\n", b"12345678"), 10, True),
        ((HEADER, b"\r\n", b"123456789"), 10, False),
        ((HEADER, b"\r\n", *([b"x" * 1000] * 2000)), 100_000, False),
        ((HEADER, b"\r\n" + b"x" * 3_000_000, b"y"), 10, False),
        ((HEADER, b"x" * 100, b"y", b"z"), 10, False),
        ((), 10, True),
    ],
)
@pytest.mark.both_loops
async def test_content_comes_out_as_it_went_in_as_often_as_it_is_wanted(
    chunks: Sequence[bytes], limit: int, in_memory: bool
) -> None:
    content = await collected(chunks, memory_limit_octets=limit)
    body = b"".join(chunks[1:])
    assert content.failure is None
    assert content.header == b"".join(chunks[:1])
    assert content.body_octets == len(body)
    assert (content.pieces is not None) is in_memory
    for _ in range(3):
        assert await whole(content) == body
    content.close()
    content.close()


async def test_several_read_one_file_at_once() -> None:
    body = os.urandom(1_000_000)
    content = await collected((HEADER, body), memory_limit_octets=10)
    assert await asyncio.gather(*(whole(content) for _ in range(4))) == [body] * 4
    content.close()


async def test_small_content_knows_neither_threads_nor_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    content = Content(10, lambda: pytest.fail("nobody was held back"))
    assert [content.write(chunk) for chunk in (HEADER, b"\r\n", b"12345678")] == [True] * 3
    done: list[bool] = []
    content.complete(partial(done.append, True))
    assert done == [True]


async def test_memory_stays_within_the_limit_and_the_file_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given: list[int] = []
    resumed = asyncio.Event()
    content = Content(50_000, resumed.set)
    content.write(HEADER)
    held = 0
    for _ in range(100):
        held += 10_000
        if not content.write(b"x" * 10_000):
            given.append(held)
            await resumed.wait()
            resumed.clear()
            held = 0
    await completed(content)
    assert content.pieces is None
    assert given
    assert max(given) <= 60_000
    assert os.listdir(tmp_path) == []
    content.close()


async def test_chunks_that_were_on_their_way_when_it_was_full_are_kept_too() -> None:
    """A client's flight may hold more than one chunk: what comes after False is taken all the same."""
    content = Content(10, lambda: None)
    chunks = [b"x" * 8, b"y" * 8, b"z" * 100, b"end"]
    content.write(HEADER)
    assert [content.write(chunk) for chunk in chunks] == [True, False, False, False]
    await completed(content)
    assert await whole(content) == b"".join(chunks)
    content.close()


class FullDisk:
    """A file on a disk that fills up."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.is_closed = False

    def write(self, data: bytes) -> int:
        raise OSError(self.error, os.strerror(self.error))

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (errno.ENOSPC, replies.STORAGE_FULL),
        (errno.EDQUOT, replies.STORAGE_FULL),
        (errno.EIO, replies.STORAGE_FAILED),
    ],
)
async def test_a_disk_that_fails_defers_the_mail_after_its_end(
    error: int, told: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = FullDisk(error)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: file)
    # The client can say all it has to say.
    content = await collected((HEADER, b"\r\n", b"x" * 100, b"y", b"z" * 100), memory_limit_octets=10)
    assert content.failure is told
    octets = content.body_octets
    assert all(content.write(b"x" * 1000) for _ in range(1000))
    assert content.body_octets == octets  # what comes now is dropped
    content.close()
    assert file.is_closed


async def test_a_file_that_cannot_be_made_defers_the_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_file(**_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("tempfile.TemporaryFile", no_file)
    content = await collected((HEADER, b"x" * 100, b"y" * 100), memory_limit_octets=10)
    assert content.failure is replies.STORAGE_FAILED
    content.close()


async def test_a_file_that_cannot_be_read_again_gives_no_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (tmp_path / "written").open("wb", buffering=0))
    content = await collected((HEADER, b"\r\n", b"x" * 100), memory_limit_octets=10)
    assert content.failure is None
    assert await piece_at(content, 0) is None
    content.close()


async def test_a_file_that_has_become_shorter_gives_no_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cut"
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: path.open("w+b", buffering=0))
    content = await collected((HEADER, b"\r\n", b"x" * 100), memory_limit_octets=10)
    os.truncate(path, 50)
    assert await piece_at(content, 0) == b"\r\n" + b"x" * 48
    assert await piece_at(content, 50) is None
    content.close()


async def test_the_file_is_closed_only_after_the_thread_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()

    class Slow(FullDisk):
        def write(self, data: bytes) -> int:
            assert written.wait(5)
            assert not self.is_closed
            return len(data)

    file = Slow(0)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: file)
    content = Content(10, lambda: pytest.fail("nobody is there to be resumed"))
    content.write(HEADER)
    assert not content.write(b"x" * 100)
    content.complete(lambda: pytest.fail("nobody waits any more"))
    content.close()
    assert not file.is_closed
    written.set()
    await until(lambda: file.is_closed)
