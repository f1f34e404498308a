"""Memory and index together: looking messages up in both, and writing them from memory to the index.

A message is written to the index after a moment in memory, and then dropped from memory. Messages that come and go
within that moment never touch the index.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from otel_smtp.spool.embedded.entries import Entry, dumps
from otel_smtp.spool.embedded.index import row_of
from otel_smtp.spool.embedded.index_thread import IndexThread
from otel_smtp.spool.embedded.journal import Journal
from otel_smtp.spool.embedded.log import Step
from otel_smtp.spool.embedded.memory import Memory, Position
from otel_smtp.spool.embedded.records import RecordKind
from otel_smtp.spool.messages import NoSuchMessage, SpoolError, StorageBroken

COOL_SECONDS: Final = 2.0  # messages go into the index after this time in memory
AGAIN_SECONDS: Final = 1.0
FLUSH_MOST: Final = 500  # messages at a time: encoding them blocks the event loop


class Indexing:
    """Looks messages up, and keeps the index close to memory.

    Args:
        seen: returns the current state of the clocks, for the next process.

    Attributes:
        known: up to where in the log the index is complete.
    """

    def __init__(
        self, memory: Memory, index: IndexThread, journal: Journal, seen: Callable[[], Mapping[str, int | str]]
    ) -> None:
        self._memory = memory
        self._index = index
        self._journal = journal
        self._seen = seen
        self.known: Position = (0, 0)
        self._writing = asyncio.Lock()

    # Looking up ------------------------------------------------------------------------------------------------

    async def get(self, message_id: str) -> Entry:
        """Take a message, when it is not busy, into memory.

        Raises:
            NoSuchMessage: there is none.
        """
        memory = self._memory
        while True:
            await memory.until_free(message_id)
            if (entry := memory.hot.get(message_id)) is not None:
                return entry
            if message_id in memory.unindexed:  # it has ended, and the index does not know yet
                break
            found = await self._index.run(lambda index: index.load([message_id]))
            if not found:
                break
            if message_id in memory.unindexed:
                continue
            memory.admit(found[0])
        raise NoSuchMessage(f"no message {message_id}")

    async def look_up(self, message_id: str) -> Entry:
        """A message's current state, for readers only: it is not taken into memory.

        Raises:
            NoSuchMessage: there is none.
        """
        memory = self._memory
        if (entry := memory.hot.get(message_id)) is not None:
            return entry
        found: Sequence[Entry] = ()
        if message_id not in memory.unindexed:
            found = await self._index.run(lambda index: index.load([message_id]))
        if not found:
            raise NoSuchMessage(f"no message {message_id}")
        return memory.hot.get(message_id, found[0])

    # Writing ---------------------------------------------------------------------------------------------------

    def position(self) -> Position:
        """From where the next start must read the log, given the current index."""
        return self._memory.first_unindexed() or self._journal.log.told

    async def write_all(self, *, is_clean: bool = False) -> None:
        """Bring the index up to date, for queries over everything."""
        await self.write(before=float("inf"), is_clean=is_clean)

    async def write_cooled(self) -> None:
        """Write messages that have been in memory for a moment, or are too many for it."""
        await self.write(before=time.monotonic() - COOL_SECONDS)

    async def write(self, *, before: float, is_clean: bool = False) -> None:
        """Write older changes into the index, and drop waiting messages from memory."""
        async with self._writing:
            while True:
                chosen = self._memory.to_be_indexed(before, FLUSH_MOST)
                if not chosen and not is_clean and self.position() == self.known:
                    return
                await self._write(chosen, is_clean=is_clean)
                if len(chosen) < FLUSH_MOST:
                    return

    async def _write(self, chosen: Sequence[tuple[str, Entry | None]], *, is_clean: bool) -> None:
        memory = self._memory
        rows = [row_of(entry) for _, entry in chosen if entry is not None]
        gone = [message_id for message_id, entry in chosen if entry is None]
        # Messages changed meanwhile are found in the log, from their first change on.
        position = memory.first_unindexed({message_id for message_id, _ in chosen}) or self._journal.log.told
        for _, entry in chosen:
            if entry is not None:
                entry.is_indexed = True  # from here on: one that ends while it is written has a row to be removed
        meta = {**self._meta(position), **self._seen(), "is_clean": int(is_clean)}
        await self._index.run(lambda index: index.write(rows, gone, meta))
        self.known = position
        for message_id, entry in chosen:
            known = memory.unindexed.get(message_id)
            if known is None or known[2] is not entry:
                continue  # it has changed again
            del memory.unindexed[message_id]
            if entry is not None and not entry.is_leased and not entry.is_busy:
                memory.forget(entry)

    def _meta(self, position: Position) -> dict[str, int | str]:
        log = self._journal.log
        marker = log.markers.get(position[0], b"").hex()
        meta = tally_meta(log.told_tally, log.told, log.markers)
        return {"segment": position[0], "at": position[1], "marker": marker, **meta}

    async def move_clock(self, jump_ms: int, *, noted: Callable[[], None] = lambda: None) -> None:
        """Restore all messages' ages after the clock was set by this much.

        After a clock was set back, waiting mail keeps its due time. After one was set ahead, mail is due sooner, which
        does no harm.

        Args:
            noted: called when this is durable.
        """
        if not jump_ms:
            return
        memory, due_ms = self._memory, min(jump_ms, 0)
        place: Position = (0, 0)
        busy: list[tuple[str, int]] = []  # their next records, with old times, come after this one

        def durable(step: Step[None]) -> None:
            nonlocal place
            place = (step.segment, step.places[0][0])
            noted()
            for entry in memory.hot.values():
                if entry.is_busy:
                    busy.append((entry.id, entry.expires_ms))
                    continue
                entry.move(due_ms, jump_ms)
                memory.waiting.offer(entry)

        await self.write_all()
        async with self._writing:  # otherwise the index could be marked complete beyond the record before it has moved
            record = dumps({"moved_ms": due_ms, "aged_ms": jump_ms, "ended": {}})
            await self._journal.append([(RecordKind.CLOCK, record, ())], durable=durable)
            position = self.position()
            meta = {**self._meta(position), **self._seen(), **clock_meta(place)}
            while True:
                try:
                    await self._index.run(lambda index: index.move(due_ms, jump_ms, meta))
                except StorageBroken:
                    raise
                except SpoolError:  # it is busy, or full; messages moved in memory must be moved in the index too
                    await asyncio.sleep(AGAIN_SECONDS)
                else:
                    break
            self.known = position
        for message_id, expires_ms in busy:
            await memory.until_free(message_id)
            if (entry := memory.hot.get(message_id)) is not None and entry.expires_ms == expires_ms:
                changed = entry.copy()
                changed.move(due_ms, jump_ms)
                await self._journal.change(entry, changed, {})


def clock_meta(place: Position) -> dict[str, int]:
    """The index's meta data about the last clock record that it covers."""
    return {"clock_segment": place[0], "clock_at": place[1]}


def tally_meta(tally: Mapping[str, int], place: Position, markers: Mapping[int, bytes]) -> dict[str, int | str]:
    """The index's record of the tally at a place in the log: damage to earlier records does not change it."""
    segment, at = place
    marker = markers.get(segment, b"").hex()
    return {"tally": dumps(tally), "tally_segment": segment, "tally_at": at, "tally_marker": marker}
