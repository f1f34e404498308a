"""A content on its way into the spool: in memory while it is small, in a file of tmp/ beyond."""

import asyncio
import contextlib
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from otel_smtp.spool.embedded.directory import open_regular, storage_error, write_all
from otel_smtp.spool.messages import SpoolError

MEMORY_LIMIT_OCTETS: Final = 64 * 1024
"""Most mail of applications is smaller, and lies in the log; to copy a large content when its message moves is dear."""
_WRITE_OCTETS: Final = 256 * 1024  # a trip to a thread costs as much as writing this


class EmbeddedDraft:
    """A content that is being received.

    A draft whose file cannot be written goes on taking what comes, and says at `end` what was wrong.

    Args:
        name: gives the name of the file, should one be needed.

    Attributes:
        header_octets: length of the first chunk, the header block.
        octets: of all that was added.
    """

    __slots__ = (
        "_crc", "_fault", "_file", "_held", "_held_octets", "_memory_limit", "_name", "_path", "_resume", "_running",
        "header_octets", "octets",
    )  # fmt: skip

    def __init__(self, name: Callable[[], Path], *, memory_limit_octets: int = MEMORY_LIMIT_OCTETS) -> None:
        self._name = name
        self._memory_limit = memory_limit_octets
        self._held: list[bytes] = []
        self._held_octets = 0
        self._path: Path | None = None
        self._file = -1
        self._crc = 0
        self._fault: SpoolError | None = None
        self._resume: Callable[[], None] | None = None
        self._running: asyncio.Future[None] | None = None  # what a thread does with the file
        self.header_octets = 0
        self.octets = 0

    @property
    def in_memory(self) -> Sequence[bytes] | None:
        """All of it; None where it is in a file, or will be, or would be but for a fault of the disk."""
        is_large = self._path is not None or self._running is not None or self._fault is not None
        return None if is_large else self._held

    def hand_over(self) -> tuple[Path, int]:
        """Give the file of the complete content away: `discard` does not touch it any more.

        Returns:
            The file, and the CRC-32 of what is in it.
        """
        path, self._path = self._path, None
        assert path is not None
        return path, self._crc

    def write(self, chunk: bytes, resume: Callable[[], None]) -> bool:
        """Add some more; the first chunk is the header block.

        Args:
            resume: called once, on the event loop, when more may come after False.

        Returns:
            Whether more may come now.
        """
        if self.octets == 0:
            self.header_octets = len(chunk)
        self.octets += len(chunk)
        if self._fault is not None:
            return True
        self._held.append(chunk)
        self._held_octets += len(chunk)
        if self._resume is not None:
            return False
        if self._held_octets <= (self._memory_limit if self._path is None else _WRITE_OCTETS):
            return True
        self._resume = resume
        if self._running is None:
            self._spill()
        return False

    async def end(self) -> None:
        """It is complete.

        Raises:
            StorageFull, StorageBroken: it could not be written.
        """
        while self._running is not None or (self._path is not None and self._held and self._fault is None):
            if self._running is None:
                self._spill()
            running = self._running
            assert running is not None
            await asyncio.wait([running])
        if self._fault is not None:
            raise self._fault
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def discard(self) -> None:
        """Forget it. Idempotent; what the store has taken over is not touched."""
        self._held = []  # not cleared: an attempt may have been given it
        self._resume = None
        if self._running is not None and not self._running.done():
            # Were the file closed now, the thread might write into whatever gets its number next.
            self._running.add_done_callback(lambda _: self.discard())
            return
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)  # a name that was moved into place is another one

    def _spill(self) -> None:
        data, self._held, self._held_octets = b"".join(self._held), [], 0
        self._running = asyncio.get_running_loop().run_in_executor(None, self._write, data)
        self._running.add_done_callback(self._has_spilled)

    def _has_spilled(self, spilled: "asyncio.Future[None]") -> None:
        self._running = None
        error = None if spilled.cancelled() else spilled.exception()
        if error is not None:
            if not isinstance(error, OSError):
                raise error
            self._fault = storage_error(error)
            self._held.clear()
        resume, self._resume = self._resume, None
        if resume is not None:
            resume()

    def _write(self, data: bytes) -> None:
        if self._path is None:
            path = self._name()
            self._file = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            self._path = path
        self._crc = zlib.crc32(data, self._crc)
        write_all(self._file, data)
