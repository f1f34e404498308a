"""The content of one message, held until an upstream has taken it: in memory while it is small, in a file beyond.

It can be read as often as another upstream has to be tried. The header block is held apart, as each delivery puts its
own trace headers there.
"""

import asyncio
import errno
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import IO, Any, Final, TypeVar, TypeVarTuple, Unpack

from otel_smtp.forwarding.base import Transient
from otel_smtp.forwarding.settings import MEMORY_LIMIT_OCTETS
from otel_smtp.smtp import replies

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

READ_OCTETS: Final = 256 * 1024
"""What is read from the file at a time: a trip to a thread costs as much as copying this much."""


class Content:
    """A collected message.

    Attributes:
        header: the whole header block, as it came.
        body_octets: of all that follows the header block, the empty line included.
    """

    __slots__ = ("_file", "_held", "_held_octets", "_memory_limit", "_running", "body_octets", "header")

    def __init__(self, memory_limit_octets: int) -> None:
        self._memory_limit = memory_limit_octets
        self._held: list[bytes] = []
        self._held_octets = 0
        self._file: IO[bytes] | None = None
        self._running: asyncio.Future[Any] | None = None  # what a thread does with the file
        self.header = b""
        self.body_octets = 0

    @property
    def is_in_memory(self) -> bool:
        """Whether `body_in_memory` has all of it."""
        return self._file is None

    def body_in_memory(self) -> bytes:
        """The body in one piece, where it is in memory."""
        assert self._file is None
        if len(self._held) > 1:
            self._held = [b"".join(self._held)]
        return self._held[0] if self._held else b""

    async def body(self) -> AsyncIterator[bytes]:
        """The body in pieces, from its beginning, where it is in a file.

        Raises:
            Transient: the file cannot be read.
        """
        assert self._file is not None
        try:
            await self._in_thread(self._file.seek, 0)
            while piece := await self._in_thread(self._file.read, READ_OCTETS):
                yield piece
        except OSError as error:
            raise Transient(replies.STORAGE_FAILED) from error

    async def add(self, chunk: bytes) -> None:
        """Hold some more of the body.

        Raises:
            Transient: it cannot be written.
        """
        self._held.append(chunk)
        self._held_octets += len(chunk)
        self.body_octets += len(chunk)
        if self._held_octets > self._memory_limit:
            await self._spill()

    async def end(self) -> None:
        """The body is complete; errors as `add`."""
        if self._file is not None and self._held:
            await self._spill()

    def close(self) -> None:
        """Free what it holds; the file has no name and is gone with this. Idempotent."""
        self._held.clear()
        if self._file is None:
            return
        if self._running is not None and not self._running.done():
            # Were it closed now, the thread might write into whatever gets the file's number next.
            self._running.add_done_callback(lambda _: self.close())
            return
        self._file.close()

    async def _spill(self) -> None:
        """Move what is held to the file, in a thread: a write may wait for the disk."""
        data, self._held, self._held_octets = b"".join(self._held), [], 0
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="otel_smtp-", buffering=0)  # noqa: SIM115 - see close
            await self._in_thread(_write_all, self._file, data)
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise Transient(replies.STORAGE_FULL if is_full else replies.STORAGE_FAILED) from error

    async def _in_thread(self, work: Callable[[Unpack[Ts]], T], *arguments: *Ts) -> T:
        running = self._running = asyncio.get_running_loop().run_in_executor(None, work, *arguments)
        return await asyncio.shield(running)


def _write_all(file: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


async def collect(chunks: AsyncIterator[bytes], *, memory_limit_octets: int = MEMORY_LIMIT_OCTETS) -> Content:
    """Take the whole content in.

    Args:
        chunks: as `MailTransaction.content` gets them: the header block first. They are taken to their end, whatever
            happens here.
        memory_limit_octets: of the body; beyond, it goes to an unnamed temporary file.

    Raises:
        Transient: the file cannot be written.
        Whatever `chunks` raises. Nothing is left behind in either case.
    """
    content = Content(memory_limit_octets)
    try:
        content.header = await anext(chunks, b"")
        async for chunk in chunks:
            await content.add(chunk)
        await content.end()
    except Transient:
        content.close()
        async for _ in chunks:
            pass
        raise
    except BaseException:
        content.close()
        raise
    return content
