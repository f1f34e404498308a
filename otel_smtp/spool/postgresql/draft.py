"""A content on its way into the database: in memory while it is small, beyond in a file without a name.

The file is a cache: nothing of it is durable, nothing is synced.
"""

import asyncio
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Final

from otel_smtp.spool.messages import SpoolError, StorageFull

MEMORY_LIMIT_OCTETS: Final = 64 * 1024
CHUNK_OCTETS: Final = 256 * 1024


class PostgresqlDraft:
    """A content that is being received.

    Attributes:
        header_octets: length of the first chunk, the header block.
        octets: of all that was added.
    """

    __slots__ = (
        "_digest", "_fault", "_file", "_held", "_held_octets", "_is_discarded", "_resume", "_running", "header_octets",
        "octets",
    )  # fmt: skip

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._held_octets = 0
        self._digest = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self._fault: SpoolError | None = None
        self._resume: Callable[[], None] | None = None
        self._running: asyncio.Future[None] | None = None
        self._is_discarded = False
        self.header_octets = 0
        self.octets = 0

    @property
    def digest(self) -> bytes:
        """SHA-256 of what was added."""
        return self._digest.digest()

    @property
    def in_memory(self) -> Sequence[bytes] | None:
        """All chunks; None where they are in a file, or were to be."""
        is_large = self._file is not None or self._running is not None or self._fault is not None
        return None if is_large else self._held

    def write(self, chunk: bytes, resume: Callable[[], None]) -> bool:
        """See `store.Draft.write`."""
        if self.octets == 0:
            self.header_octets = len(chunk)
        self.octets += len(chunk)
        if self._fault is not None:
            return True
        self._digest.update(chunk)
        self._held.append(chunk)
        self._held_octets += len(chunk)
        if self._resume is not None:
            return False
        if self._held_octets <= (MEMORY_LIMIT_OCTETS if self._file is None else CHUNK_OCTETS):
            return True
        self._resume = resume
        if self._running is None:
            self._spill()
        return False

    async def end(self) -> None:
        """It is complete.

        Raises:
            SpoolError: it could not be kept.
        """
        while self._running is not None or (self._file is not None and self._held and self._fault is None):
            if self._running is None:
                self._spill()
            assert self._running is not None
            await asyncio.wait([self._running])
        if self._fault is not None:
            raise self._fault

    async def chunk(self, number: int) -> bytes:
        """The chunk of that number, of `CHUNK_OCTETS` but for the last, once it is complete."""
        file = self._file
        assert file is not None

        def read() -> bytes:
            file.seek(number * CHUNK_OCTETS)
            return file.read(CHUNK_OCTETS)

        return await asyncio.get_running_loop().run_in_executor(None, read)

    def discard(self) -> None:
        """Forget it. Idempotent."""
        self._held = []  # not cleared: an attempt may have been given it
        self._resume = None
        self._is_discarded = True
        if self._running is None and self._file is not None:
            self._file.close()

    def _spill(self) -> None:
        data, self._held, self._held_octets = b"".join(self._held), [], 0
        self._running = asyncio.get_running_loop().run_in_executor(None, self._write, data)
        self._running.add_done_callback(self._has_spilled)

    def _has_spilled(self, spilled: "asyncio.Future[None]") -> None:
        self._running = None
        error = None if spilled.cancelled() else spilled.exception()
        if error is not None:
            self._fault = StorageFull(f"no room for a message that is being received: {error}")
            self._held.clear()
        resume, self._resume = self._resume, None
        if self._is_discarded:
            self.discard()
        elif resume is not None:
            resume()

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it outlives this call
        self._file.write(data)
        self._file.flush()
