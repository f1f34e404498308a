"""Compaction: reuses segments whose messages have ended, and moves the last live messages out of old ones."""

import asyncio
import contextlib
import logging
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from otel_smtp.spool.embedded.contents import Contents
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.entries import Entry, Place
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.embedded.index_thread import IndexThread
from otel_smtp.spool.embedded.indexing import Indexing
from otel_smtp.spool.embedded.journal import Journal, message_part
from otel_smtp.spool.embedded.log import Step
from otel_smtp.spool.embedded.memory import Memory
from otel_smtp.spool.messages import ContentLost, NoSuchMessage

logger: Final = logging.getLogger("otel_smtp.spool.embedded.compaction")

DEAD_SEGMENTS: Final = 2  # dead octets beyond as many as live ones: the log is at most twice these, and a little
MOVE_MOST: Final = 64  # messages moved at a time
_NO_SEGMENT: Final = 0  # the pseudo-segment of messages whose records are lost, until they are written to the log again


class Compaction:
    """Keeps the log small.

    Args:
        segment_octets: of each segment.

    Attributes:
        has_set_aside: a segment was moved to lost+found/.
    """

    def __init__(
        self,
        directory: SpoolDirectory,
        memory: Memory,
        index: IndexThread,
        journal: Journal,
        indexing: Indexing,
        contents: Contents,
        segment_octets: int,
    ) -> None:
        self._directory = directory
        self._memory = memory
        self._index = index
        self._journal = journal
        self._indexing = indexing
        self._contents = contents
        self._segment_octets = segment_octets
        self._segments: set[int] = set()
        self.has_set_aside = False
        self._unreadable: set[int] = set()  # segments with content that the disk cannot read

    def begin(self, numbers: Iterable[int]) -> Callable[[int], None]:
        """Begin with these segments. Call on the event loop.

        Returns:
            A function to call, in any thread, with the number of each new segment.
        """
        self._segments = set(numbers)
        loop = asyncio.get_running_loop()

        def has_begun(number: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._note_segment, number)

        return has_begun

    def _note_segment(self, number: int) -> None:
        self._segments.add(number)
        asyncio.get_running_loop().run_in_executor(None, self._directory.prepare, self._segment_octets)

    @property
    def _octets(self) -> int:
        return len(self._segments) * self._segment_octets

    @property
    def _live_octets(self) -> int:
        return sum(octets for _, octets in self._memory.live.values())

    @property
    def dead_octets(self) -> int:
        """The octets of segments that no message needs."""
        return self._octets - self._live_octets

    async def compact(self) -> None:
        """Keep the log at most twice as large as its live octets, plus a little: move live messages out of its oldest
        segment.

        Segments go in order: a record of a message's end must not be removed before the message's own.
        """
        if _NO_SEGMENT in self._memory.live:
            await self._move_out(_NO_SEGMENT)
        while len(self._segments) > 1:
            oldest = min(self._segments)
            if oldest == self._journal.log.told[0]:
                return
            if oldest in self._memory.live:
                if not self._is_worth_it(self._memory.live[oldest][1]):
                    return
                if not await self._move_out(oldest):
                    return
            await self._indexing.write_all()
            if oldest in self._memory.live or self._indexing.known[0] <= oldest:
                return  # busy messages wait for the next time, and so do segments that the index does not cover yet
            # An earlier index, found after a loss of power, would no longer match the log, and would list mail that has
            # ended since.
            await self._index.run(Index.sync)
            self._segments.discard(oldest)
            if oldest in self._unreadable:
                self._unreadable.discard(oldest)
                self.has_set_aside = True
                segment = self._directory.segment(oldest)
                await asyncio.to_thread(self._directory.move_aside, segment, f"segment-{oldest}")
            else:
                await asyncio.to_thread(self._directory.retire, oldest)

    def _is_worth_it(self, octets: int) -> bool:
        """Whether to move the live messages of the oldest segment.

        Args:
            octets: the live ones in it.
        """
        if not self._directory.has_reserve and 2 * octets <= self._segment_octets <= self.dead_octets:
            return True  # the disk is full: moving takes half a segment, and frees a whole one
        return self._octets > 2 * self._live_octets + DEAD_SEGMENTS * self._segment_octets

    async def _move_out(self, segment: int) -> bool:
        """Move live messages of a segment to the end of the log; returns whether none is left in it."""
        memory = self._memory
        while segment in memory.live:
            await self._indexing.write_all()
            ids = set(await self._index.run(lambda index: index.in_segment(segment, MOVE_MOST)))
            ids.update(
                [entry.id for entry in memory.hot.values() if entry.place and entry.place.segment == segment][
                    :MOVE_MOST
                ]
            )
            if not ids:
                if segment not in memory.live:
                    return True  # the last one has just ended
                logger.error("segment counted messages but has none", extra={"segment": segment})
                return False
            moved = await asyncio.gather(*[self._relocate(message_id, segment) for message_id in ids])
            if not any(moved):
                return False
        return True

    async def _relocate(self, message_id: str, segment: int) -> bool:
        try:
            entry = await self._indexing.get(message_id)
        except NoSuchMessage:
            return True
        if entry.place is None or entry.place.segment != segment:
            return True
        if entry.is_leased:  # an attempt may be reading it
            return False
        before = entry.place
        moved = entry.copy()  # the index may be writing `entry`, with its old place
        entry.is_busy = True
        try:
            content = () if entry.is_large else await self._content(entry, before)
        except BaseException:
            self._memory.set_free(entry)
            raise
        is_lost = content is None or entry.id in self._memory.lost
        if content is None:
            self._unreadable.add(segment)
            moved.lose_content(self._journal.now_ms())
            content = ()

        def durable(step: Step[None]) -> None:
            self._memory.set_free(entry)
            self._memory.note_moved(entry, moved, step, before.crc, is_lost=is_lost)

        await self._journal.append(
            [message_part(moved, content, before.crc, is_new=False)],
            durable=durable,
            failed=lambda: self._memory.set_free(entry),
        )
        return True

    async def _content(self, entry: Entry, place: Place) -> Sequence[bytes] | None:
        """The content of a message in the log; None: the disk cannot read it."""
        try:
            content = await asyncio.to_thread(self._contents.part, entry, 0, entry.octets)
        except ContentLost as error:
            logger.critical(
                "queued content unreadable; message set aside", extra={"spool_id": entry.id, "fault": str(error)}
            )
            return None
        if zlib.crc32(content) != place.crc:
            # Moved unchanged: it stays damaged, and an attempt will notice.
            logger.critical("queued content damaged", extra={"spool_id": entry.id})
        return (content,)
