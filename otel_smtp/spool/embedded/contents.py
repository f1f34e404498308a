"""Contents: reading them, and checking that they are whole."""

import asyncio
import contextlib
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.embedded.indexing import Indexing
from otel_smtp.spool.embedded.memory import Memory
from otel_smtp.spool.messages import ContentLost, ContentRef, SpoolError

T = TypeVar("T")


class Contents:
    """Reads contents."""

    def __init__(self, directory: SpoolDirectory, memory: Memory, indexing: Indexing) -> None:
        self._directory = directory
        self._memory = memory
        self._indexing = indexing

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """See `Store.read`."""
        return await self._look(content, lambda entry: self.part(entry, start, octets))

    async def is_intact(self, content: ContentRef) -> bool:
        """See `Store.is_intact`."""
        return await self._look(content, self._is_intact)

    async def _look(self, content: ContentRef, look: Callable[[Entry], T]) -> T:
        """Call `look` in a thread with the content's place; again if the content was moved meanwhile."""
        while True:
            entry = await self._holder(content)
            found: T | ContentLost
            try:
                found = await asyncio.to_thread(look, entry)
            except ContentLost as error:
                found = error
            if (await self._holder(content)).place != entry.place:
                continue  # its old place may have been reused by now
            if isinstance(found, ContentLost):
                raise found
            return found

    async def _holder(self, content: ContentRef) -> Entry:
        """The message of a content, with its current place."""
        return await self._indexing.look_up(str(content.key))

    def part(self, entry: Entry, start: int, octets: int) -> bytes:
        """Read a part of some content; call it in a thread.

        Raises:
            ContentLost: it is missing, incomplete or unreadable.
            SpoolError: it cannot be read now.
        """
        place = entry.place
        assert place is not None
        octets = max(0, min(octets, entry.octets - start))
        if entry.is_large:
            return self._directory.read(self._directory.large(entry.id), start, octets)
        return self._directory.read(self._directory.segment(place.segment), place.content_at + start, octets)

    def _is_intact(self, entry: Entry) -> bool:
        crc = 0
        try:
            for start in range(0, entry.octets, 1 << 18):
                crc = zlib.crc32(self.part(entry, start, 1 << 18), crc)
        except ContentLost:
            return False
        assert entry.place is not None
        return crc == entry.place.crc

    async def small(self, entries: Sequence[Entry]) -> list[Sequence[bytes] | None]:
        """The contents that are in memory or can be read at once, by entry."""
        found = [self._memory.take_content(entry) for entry in entries]
        if missing := [entry for entry, content in zip(entries, found, strict=True) if content is None]:
            read = iter(await asyncio.to_thread(self._read_small, missing))
            found = [next(read) if content is None else content for content in found]
        return found

    def _read_small(self, entries: Sequence[Entry]) -> list[Sequence[bytes] | None]:
        contents: list[Sequence[bytes] | None] = []
        for entry in entries:
            content = None
            if not entry.is_large:
                # An attempt that needs an unreadable one will report it.
                with contextlib.suppress(SpoolError):
                    content = self.part(entry, 0, entry.octets)
            if content is None or entry.place is None or zlib.crc32(content) != entry.place.crc:
                contents.append(None)
            else:
                contents.append((content[: entry.header_octets], content[entry.header_octets :]))
        return contents
