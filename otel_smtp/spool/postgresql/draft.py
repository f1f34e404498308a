"""Content on its way into the database: in memory while it is small, otherwise in an unnamed file.

The file is a cache: nothing of it is durable, nothing is synced.
"""

import asyncio
import hashlib
import tempfile
from typing import IO, Final

from otel_smtp.spool.drafting import SpillingDraft
from otel_smtp.spool.messages import SpoolError, StorageFull

CHUNK_OCTETS: Final = 256 * 1024


class PostgresqlDraft(SpillingDraft):
    """A content that is being received."""

    __slots__ = ("_digest", "_file")

    def __init__(self) -> None:
        super().__init__()
        self._file: IO[bytes] | None = None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the file's content."""
        return self._digest.digest()

    async def chunk(self, number: int) -> bytes:
        """The chunk with this number, of `CHUNK_OCTETS` except for the last, once the content is complete."""
        file = self._file
        assert file is not None

        def read() -> bytes:
            file.seek(number * CHUNK_OCTETS)
            return file.read(CHUNK_OCTETS)

        return await asyncio.get_running_loop().run_in_executor(None, read)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it outlives this call
            self._digest = hashlib.sha256()
        self._digest.update(data)
        self._file.write(data)
        self._file.flush()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _fault_of(self, error: OSError) -> SpoolError:
        return StorageFull(f"no room for a message that is being received: {error}")
