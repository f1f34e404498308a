"""Content on its way into the spool: in memory while it is small, otherwise in a file in tmp/."""

import contextlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

from otel_smtp.spool.drafting import MEMORY_LIMIT_OCTETS, SpillingDraft
from otel_smtp.spool.embedded.files import open_regular, storage_error, write_all
from otel_smtp.spool.embedded.log import Log
from otel_smtp.spool.messages import SpoolError


class EmbeddedDraft(SpillingDraft):
    """Content that is being received.

    Args:
        name: gives the name of the file, should one be needed.
        log: expects the message until it is complete or discarded.
    """

    __slots__ = ("_crc", "_expected_by", "_expected_since", "_file", "_name", "_path")

    def __init__(self, name: Callable[[], Path], log: Log, *, memory_limit_octets: int = MEMORY_LIMIT_OCTETS) -> None:
        super().__init__(memory_limit_octets=memory_limit_octets)
        self._expected_by: Log | None = log
        self._expected_since = log.expect()
        self._name = name
        self._path: Path | None = None
        self._file = -1
        self._crc = 0

    def has_come(self) -> None:
        """The log need not expect the message any longer. Idempotent."""
        if self._expected_by is not None:
            self._expected_by.expect_no_more(self._expected_since)
            self._expected_by = None

    def hand_over(self) -> tuple[Path, int]:
        """Hand over the file of the complete content: `discard` no longer touches it.

        Returns:
            The file, and the CRC-32 of its content.
        """
        path, self._path = self._path, None
        assert path is not None
        return path, self._crc

    async def end(self) -> None:
        """It is complete.

        Raises:
            StorageFull, StorageBroken: it could not be written.
        """
        await super().end()
        self._close_file()

    def _write(self, data: bytes) -> None:
        if self._path is None:
            path = self._name()
            self._file = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            self._path = path
        self._crc = zlib.crc32(data, self._crc)
        write_all(self._file, data)

    def _close(self) -> None:
        self.has_come()
        self._close_file()
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)  # a name that was moved into place is another one

    def _close_file(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _fault_of(self, error: OSError) -> SpoolError:
        return storage_error(error)
