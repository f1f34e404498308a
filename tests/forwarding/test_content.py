"""Content in memory and in files: whole, replayable, bounded, and gone afterwards."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from otel_smtp.forwarding.base import Transient
from otel_smtp.forwarding.content import Content, collect
from otel_smtp.smtp import replies
from tests.support.deliveries import in_chunks
from tests.support.waiting import until

HEADER = b"Subject: x\r\n"


async def whole(content: Content) -> bytes:
    if content.is_in_memory:
        return content.body_in_memory()
    return b"".join([piece async for piece in content.body()])


@pytest.mark.parametrize(
    ("chunks", "limit", "in_memory"),
    [
        ((HEADER,), 10, True),
        ((HEADER, b"\r\n", b"12345678"), 10, True),
        ((HEADER, b"\r\n", b"123456789"), 10, False),
        ((HEADER, b"\r\n", *([b"x" * 1000] * 2000)), 100_000, False),
        ((HEADER, b"\r\n" + b"x" * 3_000_000, b"y"), 10, False),
        ((), 10, True),
    ],
)
async def test_content_comes_out_as_it_went_in_as_often_as_it_is_wanted(
    chunks: Sequence[bytes], limit: int, in_memory: bool
) -> None:
    content = await collect(in_chunks(chunks), memory_limit_octets=limit)
    body = b"".join(chunks[1:])
    assert content.header == b"".join(chunks[:1])
    assert content.body_octets == len(body)
    assert content.is_in_memory is in_memory
    for _ in range(3):
        assert await whole(content) == body
    content.close()
    content.close()


async def test_memory_stays_within_the_limit_and_the_file_has_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = 0

    async def watched() -> AsyncIterator[bytes]:
        nonlocal held
        yield HEADER
        for _ in range(100):
            yield b"x" * 10_000
            held = max(held, sum(map(len, content._held)) if content else 0)

    content: Content | None = None
    content = await collect(watched(), memory_limit_octets=50_000)
    assert not content.is_in_memory
    assert held <= 60_000
    assert os.listdir(tmp_path) == []
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
    error: int, told: replies.Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = FullDisk(error)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: file)
    taken: list[bytes] = []

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in (HEADER, b"\r\n", b"x" * 100, b"y", b"z"):
            taken.append(chunk)
            yield chunk

    with pytest.raises(Transient) as caught:
        await collect(chunks(), memory_limit_octets=10)
    assert caught.value.reply is told
    assert taken[-1] == b"z"  # the client could say all it had to say
    assert file.is_closed


async def test_a_file_that_cannot_be_read_again_defers_the_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreadable(FullDisk):
        def write(self, data: bytes) -> int:
            return len(data)

        def seek(self, to: int) -> int:
            raise OSError(self.error, "cannot")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Unreadable(errno.EIO))
    content = await collect(in_chunks((HEADER, b"\r\n", b"x" * 100)), memory_limit_octets=10)
    with pytest.raises(Transient) as caught:
        await whole(content)
    assert caught.value.reply is replies.STORAGE_FAILED


async def test_a_cancel_while_a_thread_writes_closes_the_file_only_after_it() -> None:
    content = Content(10)
    adding = asyncio.ensure_future(content.add(b"x" * 20_000_000))
    await until(lambda: content._running is not None)
    adding.cancel()
    with suppress(asyncio.CancelledError):
        await adding
    file, running = content._file, content._running
    assert file is not None
    assert running is not None
    content.close()
    await asyncio.wait([running])
    assert running.exception() is None
    await asyncio.sleep(0)
    assert file.closed


async def test_what_breaks_off_is_raised_as_it_is() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield HEADER
        raise ConnectionResetError("the client is gone")

    with pytest.raises(ConnectionResetError):
        await collect(chunks())
