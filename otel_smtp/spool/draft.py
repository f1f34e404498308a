"""A content on its way into the spool: in memory while it is small, in a file of tmp/ beyond."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Self

from otel_smtp.spool.files import storage_error, write_all

MEMORY_LIMIT_OCTETS: Final = 64 * 1024
"""Most mail of applications is smaller, and shares a file and its sync with whatever comes at the same time."""
_WRITE_OCTETS: Final = 256 * 1024  # a trip to a thread costs as much as writing this


class Draft:
    """A content that is being received.

    Args:
        name: gives the name of the file, should one be needed.

    Attributes:
        header_octets: length of the first chunk, the header block.
        octets: of all that was added.
    """

    __slots__ = (
        "_digest", "_file", "_held", "_held_octets", "_memory_limit", "_name", "_path", "_running", "header_octets",
        "octets",
    )  # fmt: skip

    def __init__(self, name: Callable[[], Path], *, memory_limit_octets: int = MEMORY_LIMIT_OCTETS) -> None:
        self._name = name
        self._memory_limit = memory_limit_octets
        self._held: list[bytes] = []
        self._held_octets = 0
        self._path: Path | None = None
        self._file = -1
        self._digest: Any = None
        self._running: asyncio.Future[None] | None = None  # what a thread does with the file
        self.header_octets = 0
        self.octets = 0

    @property
    def in_memory(self) -> Sequence[bytes] | None:
        """All of it; None where it is in a file."""
        return self._held if self._path is None else None

    def hand_over(self) -> tuple[Sequence[bytes] | None, tuple[Path, int, bytes] | None]:
        """Give the complete content away: `discard` does not touch it any more.

        Returns:
            Its chunks, or else its file, the file's octets, and their SHA-256.
        """
        if self._path is None:
            return tuple(self._held), None
        path, self._path = self._path, None
        return None, (path, self.octets, self._digest.digest())

    async def add(self, chunk: bytes) -> None:
        """Add some more; the first chunk is the header block.

        Raises:
            StorageFull, StorageBroken: it cannot be written.
        """
        if self.octets == 0:
            self.header_octets = len(chunk)
        self._held.append(chunk)
        self._held_octets += len(chunk)
        self.octets += len(chunk)
        if self._held_octets > (self._memory_limit if self._path is None else _WRITE_OCTETS):
            await self._spill()

    async def end(self) -> None:
        """It is complete; errors as `add`."""
        if self._path is not None and self._held:
            await self._spill()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def discard(self) -> None:
        """Forget it. Idempotent; what the store has taken over is not touched."""
        self._held.clear()
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

    async def _spill(self) -> None:
        data, self._held, self._held_octets = b"".join(self._held), [], 0
        running = self._running = asyncio.get_running_loop().run_in_executor(None, self._write, data)
        try:
            await asyncio.shield(running)
        except OSError as error:
            raise storage_error(error) from error

    def _write(self, data: bytes) -> None:
        if self._path is None:
            path = self._name()
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._path = path
            self._digest = hashlib.sha256()
        self._digest.update(data)
        write_all(self._file, data)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.discard()
