"""The common part of all stores' drafts: small content is held in memory, larger content in a file."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Final

from otel_smtp.spool.messages import SpoolError

MEMORY_LIMIT_OCTETS: Final = 64 * 1024
"""Most mail of applications is smaller; copying large content when its message moves is expensive."""

WRITE_OCTETS: Final = 256 * 1024
"""Octets written to the file at a time: a trip to a thread costs as much as writing this many."""


class SpillingDraft(ABC):
    """Content that is being received; see `store.Draft`.

    After a write error it still takes further content, and raises the error at `end`.

    Attributes:
        header_octets: length of the first chunk, the header block.
        octets: of all content added.
    """

    __slots__ = (
        "_fault", "_has_8bit_in_file", "_has_file", "_held", "_held_octets", "_memory_limit", "_resume", "_running",
        "header_octets", "octets",
    )  # fmt: skip

    def __init__(self, *, memory_limit_octets: int = MEMORY_LIMIT_OCTETS) -> None:
        self._memory_limit = memory_limit_octets
        self._held: list[bytes] = []
        self._held_octets = 0
        self._has_file = self._has_8bit_in_file = False
        self._fault: SpoolError | None = None
        self._resume: Callable[[], None] | None = None
        self._running: asyncio.Future[None] | None = None  # a thread's work on the file
        self.header_octets = 0
        self.octets = 0

    @abstractmethod
    def _write(self, data: bytes) -> None:
        """Write to the file, which the first call creates. In a thread, one call at a time; raises OSError."""

    @abstractmethod
    def _close(self) -> None:
        """Close the file, if any, and remove it unless the store has taken it over. Idempotent."""

    @abstractmethod
    def _fault_of(self, error: OSError) -> SpoolError:
        """The `SpoolError` for a file that could not be written."""

    @property
    def in_memory(self) -> Sequence[bytes] | None:
        """All chunks; None if they are, will be or were to be in a file."""
        return None if self._has_file else self._held

    @property
    def is_8bit(self) -> bool:
        """Whether any octet of it is above 127."""
        return self._has_8bit_in_file or not all(map(bytes.isascii, self._held))

    def write(self, chunk: bytes, resume: Callable[[], None]) -> bool:
        """See `store.Draft.write`."""
        octets = self.octets
        if octets == 0:
            self.header_octets = len(chunk)
        octets = self.octets = octets + len(chunk)
        if octets <= self._memory_limit:  # like most content, it then has neither file nor fault
            self._held.append(chunk)
            self._held_octets = octets
            return True
        if self._fault is not None:
            return True
        self._held.append(chunk)
        self._held_octets += len(chunk)
        if self._resume is not None:
            return False
        if self._held_octets <= (WRITE_OCTETS if self._has_file else self._memory_limit):
            return True
        self._resume = resume
        if self._running is None:
            self._spill()
        return False

    def hold(self, header: bytes, body: bytes) -> bool:
        """See `store.Draft.hold`."""
        header_octets = len(header)
        octets = header_octets + len(body)
        if octets > self._memory_limit:
            return False
        self._held = [header, body] if body else [header]
        self._held_octets = self.octets = octets
        self.header_octets = header_octets
        return True

    async def end(self) -> None:
        """It is complete.

        Raises:
            SpoolError: it could not be written.
        """
        while self._running is not None or (self._has_file and self._held and self._fault is None):
            if self._running is None:
                self._spill()
            running = self._running
            assert running is not None
            await asyncio.wait([running])
        if self._fault is not None:
            raise self._fault

    def discard(self) -> None:
        """Discard it. Idempotent; a file that the store has taken over stays."""
        self._held = []  # not cleared: an attempt may use it
        self._resume = None
        if self._running is not None and not self._running.done():
            # If the file were closed now, the thread might write into the next file with the same descriptor.
            self._running.add_done_callback(lambda _: self.discard())
            return
        self._close()

    def _spill(self) -> None:
        data, self._held, self._held_octets = b"".join(self._held), [], 0
        self._has_file = True
        self._has_8bit_in_file = self._has_8bit_in_file or not data.isascii()
        self._running = asyncio.get_running_loop().run_in_executor(None, self._write, data)
        self._running.add_done_callback(self._has_spilled)

    def _has_spilled(self, spilled: "asyncio.Future[None]") -> None:
        self._running = None
        error = None if spilled.cancelled() else spilled.exception()
        if error is not None:
            if not isinstance(error, OSError):
                raise error
            self._fault = self._fault_of(error)
            self._held.clear()
        resume, self._resume = self._resume, None
        if resume is not None:
            resume()
