"""The embedded store: a log that makes mail durable, recent messages in memory, and an index of the rest.

It consists of parts, each of which knows only those before it:

    memory      messages that are new, being attempted or have just changed, as the log says
    journal     what happens to a message: written to the log, and noted in memory when it is durable
    indexing    what is looked up in memory and index, and what is written from the one into the other
    contents    where contents lie, and whether they are whole
    claiming    what is attempted next
    compaction  segments that are used again

The class is put together from those that are below, by what they are asked for:

    submitting  messages in
    leasing     deliveries out
    recording    results of attempts
    operating   what operators see and do
    rebuilding  what was set aside, queued again
    moving_out  messages on their way into another store

While a message's record is on its way, the message is busy, and any other change to it waits.
"""

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from otel_smtp.spool.embedded import first_version
from otel_smtp.spool.embedded.claiming import Claiming
from otel_smtp.spool.embedded.clocks import Clocks, Uptime, uptime
from otel_smtp.spool.embedded.compaction import Compaction
from otel_smtp.spool.embedded.contents import Contents
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.entries import Entry, dumps
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.embedded.index_thread import IndexThread
from otel_smtp.spool.embedded.indexing import Indexing
from otel_smtp.spool.embedded.journal import Journal
from otel_smtp.spool.embedded.leasing import EmbeddedLeasing
from otel_smtp.spool.embedded.log import SEGMENT_OCTETS, Log
from otel_smtp.spool.embedded.memory import Memory
from otel_smtp.spool.embedded.moving_out import MovingOut
from otel_smtp.spool.embedded.rebuilding import Rebuilding
from otel_smtp.spool.embedded.recording import EmbeddedRecording
from otel_smtp.spool.embedded.records import RecordKind
from otel_smtp.spool.embedded.recovery import Recovered, recover
from otel_smtp.spool.embedded.submitting import EmbeddedSubmitting
from otel_smtp.spool.messages import (
    MOST_TIMINGS,
    ContentRef,
    DeliveryState,
    SpoolError,
    StorageFull,
    StoreVerb,
)
from otel_smtp.spool.store import Recovery, Woken

logger: Final = logging.getLogger("otel_smtp.spool.embedded.store")

DEFAULT_MOST_MESSAGES: Final = 1_000_000
DEFAULT_LEAST_FREE_OCTETS: Final = 40 * 1024 * 1024  # 1.5 times the largest message, as Postfix asks before MAIL
LEAST_FREE_INODES: Final = 0.01
CRASHES_ALLOWED: Final = 3
ROOM_CHECK_SECONDS: Final = 1.0
KEEP_SECONDS: Final = 0.5  # how often memory and index are brought together


class EmbeddedStore(EmbeddedSubmitting, EmbeddedLeasing, EmbeddedRecording, Rebuilding, MovingOut):
    """A store in one directory.

    Args:
        path: the directory; made where it is missing.
        most_messages, most_octets: beyond these, new mail is refused; None: no bound.
        least_free_octets: on the disk; below this, new mail is refused.
        crashes_allowed: the crashes during delivery after which a message is held.
        is_index_trusted: False: rebuild the index from the log.
        moves_out: its messages go to another store: see `begin_move`.
        clock: the wall clock, in seconds since the epoch.
        up: how long the machine has been up.

    Attributes:
        most_messages: as above.
        look_again_seconds, timings: see `Store`.
    """

    look_again_seconds: float | None = None
    ledger = None

    def __init__(
        self,
        path: Path,
        *,
        most_messages: int = DEFAULT_MOST_MESSAGES,
        most_octets: int | None = None,
        least_free_octets: int = DEFAULT_LEAST_FREE_OCTETS,
        crashes_allowed: int = CRASHES_ALLOWED,
        segment_octets: int = SEGMENT_OCTETS,
        is_index_trusted: bool = True,
        moves_out: bool = False,
        clock: Callable[[], float] = time.time,
        up: Callable[[], Uptime] = uptime,
    ) -> None:
        self.directory = SpoolDirectory(path)
        self.most_messages = most_messages
        self._most_octets = most_octets
        self._least_free = least_free_octets
        self._crashes_allowed = crashes_allowed
        self._segment_octets = segment_octets
        self._is_index_trusted = is_index_trusted
        self._moves_out = moves_out
        self._clocks = clocks = Clocks(clock, up)
        self._now_ms = clocks.now_ms
        self._room_checked_at = float("-inf")
        self._no_room: SpoolError | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.timings = deque(maxlen=MOST_TIMINGS)
        self._submitting = set()
        self._rebuilding = asyncio.Lock()
        self.memory = memory = Memory()
        self.journal = journal = Journal(memory, self._now_ms, self.directory.remove_large)
        self.index = index = IndexThread(journal.latch)
        self.indexing = indexing = Indexing(memory, index, journal, clocks.seen)
        self._contents = contents = Contents(self.directory, memory, indexing)
        self._claiming = Claiming(memory, index, journal, contents)
        self.compaction = Compaction(self.directory, memory, index, journal, indexing, contents, segment_octets)

    # Life ------------------------------------------------------------------------------------------------------

    async def open(self) -> Recovery:
        """Take ownership of the directory, and take back leases of a crashed process.

        Raises:
            SpoolError: it belongs to another process, or cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        self.index.start()
        try:
            recovered = await self.index.call(self._open)
        except BaseException:
            await self.index.close()
            self.directory.close()
            raise
        self.index.index = recovered.index
        log = Log(
            self.directory,
            recovered.next_number,
            recovered.previous_end,
            markers=recovered.markers,
            tally=recovered.tally,
            now_ms=self._now_ms,
            has_begun=self.compaction.begin(recovered.markers),
            segment_octets=self._segment_octets,
            timings=self.timings,
        )
        self.journal.begin(log)
        try:
            self._not_found = recovered.not_found
            held, interrupted = await self._take_over(recovered)
            await self._note_lost(recovered.newly_lost)
            await self.indexing.move_clock(recovered.clock_jump_ms)
            carried = await first_version.carry_over(self.directory, self._add_carried)
            recovered.remarks.extend(carried.remarks)
            recovered.alarms.extend(carried.alarms)
            await self._look_aside()
        except BaseException:
            await self.close()
            raise
        self._keeper = self._loop.create_task(self._keep())
        return Recovery(
            self.memory.messages - self.memory.outcome_messages,
            interrupted,
            held,
            recovered.lost,
            recovered.remarks,
            alarms=recovered.alarms,
        )

    def _open(self) -> Recovered:
        self.directory.open()
        try:
            if not self._moves_out and self.directory.moving() is not None:
                raise SpoolError(
                    f"{self.directory.path}: its mail is being moved into a shared queue, and some of it may be there; "
                    f"finish that: otel-smtp queue move --from {self.directory.path}"
                )
            recovered = recover(self.directory, self._clocks, is_index_trusted=self._is_index_trusted)
        except (OSError, sqlite3.Error) as error:
            raise SpoolError(f"{self.directory.path}: {error}") from error
        return recovered

    async def _take_over(self, recovered: Recovered) -> tuple[list[str], int]:
        """Start from the index; returns messages that are now held, and the number of interrupted attempts."""
        memory = self.memory
        live, destinations, leased, (outcomes, outcome_messages, outcome_octets) = await self.index.run(
            lambda index: (index.segments(), index.destinations(), index.load(index.leased()), index.outcomes())
        )
        large_octets = await self.index.run(Index.large_octets)
        there = await asyncio.to_thread(self.directory.larges)
        memory.live.update((number, [*found]) for number, found in live.items())
        memory.cold.update(destinations)
        memory.messages = recovered.index.messages
        memory.outcomes.update(outcomes)
        memory.outcome_messages, memory.outcome_octets = outcome_messages, outcome_octets
        memory.lost.update(large_octets.keys() - there)
        memory.large_octets = sum(octets for message_id, octets in large_octets.items() if message_id in there)
        self.indexing.known = self.journal.log.told
        held: list[str] = []
        interrupted = sum(one.state is DeliveryState.LEASED for entry in leased for one in entry.deliveries)
        for entry in leased:
            memory.admit(entry)
        await self._take_back(leased, self._crashes_allowed, held)
        return held, interrupted

    async def _note_lost(self, ids: Sequence[str]) -> None:
        """Record in the log which contents are lost, and that these messages no longer age."""
        noted: list[Awaitable[None]] = []
        with contextlib.suppress(SpoolError):  # a full disk: the next start finds them again
            for message_id in ids:
                entry = await self.indexing.get(message_id)
                noted.append(self.journal.change(entry, entry.copy(), {}))
        await asyncio.gather(*noted, return_exceptions=True)

    async def close(self) -> None:
        """Finish pending verbs, and release the directory. Idempotent."""
        if self.journal.is_closing or self.index.index is None:
            return
        self.journal.is_closing = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._submitting:
            await asyncio.wait(self._submitting)
        is_clean = True
        log = self.journal.log
        try:
            if not log.is_idle:  # leases under way are known after it, and taken back
                await self._write_marker()
            await self._take_back([entry for entry in self.memory.hot.values() if entry.is_leased], None, [])
            if log.told != self.indexing.known or self.memory.unindexed:
                # A record follows all acknowledged ones, so that damage to them can be told from a torn tail.
                await self._write_marker()
        except SpoolError as error:
            is_clean = False
            logger.error("spool not closed cleanly", extra={"fault": str(error)})
        await log.close()
        try:
            await self.indexing.write_all(is_clean=is_clean)
        except SpoolError as error:
            logger.error("spool not closed cleanly", extra={"fault": str(error)})
        await self.index.close()
        await asyncio.to_thread(self.directory.close)

    async def _write_marker(self) -> None:
        """Write a record that changes nothing: when it is reported, so are all before it."""
        await self.journal.append([(RecordKind.CLOCK, dumps({"moved_ms": 0, "ended": {}}), ())])

    async def _take_back(self, entries: Sequence[Entry], crashes_allowed: int | None, held: list[str]) -> None:
        changes: list[Awaitable[None]] = []
        for entry in entries:
            await self.memory.until_free(entry.id)
            if (known := self.memory.hot.get(entry.id)) is None or not known.is_leased:
                continue
            changed = known.copy()
            if changed.take_back(crashes_allowed=crashes_allowed, now_ms=self._now_ms()):
                held.append(entry.id)
            changes.append(self.journal.change(known, changed, {}))
        await asyncio.gather(*changes)

    async def _keep(self) -> None:
        await asyncio.sleep(KEEP_SECONDS)
        await asyncio.to_thread(self.directory.prepare, self._segment_octets)
        told = ""
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            if not self.directory.has_reserve:
                await asyncio.to_thread(self.directory.prepare, self._segment_octets)
            self.memory.waiting.tidy(len(self.memory.hot))
            try:
                await self.indexing.write_cooled()
                await self.compaction.compact()
                if self._alarm is not None or self.compaction.has_set_aside:
                    await self._look_aside()
                told = ""
            except SpoolError as error:
                if str(error) != told:  # two log lines per second would fill a full disk further
                    told = str(error)
                    logger.error("spool housekeeping failed; retrying", extra={"fault": told})
            except Exception:
                logger.exception("spool housekeeping failed; retrying")

    def standing(self) -> None:
        """See `Store.standing`: one process owns it."""

    async def company(self) -> None:
        """See `Store.company`: one process owns the directory."""

    def watch(self, woken: Woken) -> None:
        """See `Store.watch`: one process owns the directory."""

    def refusal(self) -> SpoolError | None:
        """See `Store.refusal`."""
        if (fault := self.journal.log.fault) is not None:
            return fault
        if (messages := self.memory.messages - self.memory.outcome_messages) >= self.most_messages:
            return StorageFull(f"the spool holds {messages} messages already")
        if self._most_octets is not None and (octets := self.memory.octets) >= self._most_octets:
            return StorageFull(f"the spool holds {octets} octets already")
        now = time.monotonic()
        if now - self._room_checked_at >= ROOM_CHECK_SECONDS:
            self._room_checked_at = now
            self._check_room()
        return self._no_room

    def _check_room(self) -> None:
        before, self._no_room = self._no_room, None
        try:
            octets, inodes = self.directory.room()
        except OSError as error:
            self._no_room = SpoolError(f"the spool's directory is gone: {error}")
            if str(before) != str(self._no_room):
                logger.critical("spool directory gone: new mail refused", extra={"fault": str(error)})
            return
        has_enough = octets >= self._least_free and inodes >= LEAST_FREE_INODES
        if has_enough and self.directory.has_reserve:
            return
        self._no_room = StorageFull("the disk of the spool is nearly full")  # queued mail goes first
        if before is None:
            logger.error("no room for new mail", extra={"free_octets": octets, "free_inodes_share": round(inodes, 3)})

    # Contents --------------------------------------------------------------------------------------------------

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """See `Store.read`."""
        began = time.monotonic()
        part = await self._contents.read(content, start, octets)
        self.timings.append((StoreVerb.READ, time.monotonic() - began, 0))
        return part

    async def is_intact(self, content: ContentRef) -> bool:
        """See `Store.is_intact`."""
        return await self._contents.is_intact(content)

    async def housekeep(self) -> None:
        """See `Store.housekeep`: checks the clocks."""
        if jump_ms := self._clocks.jump_ms():
            logger.warning("clock jumped; ages of queued mail unchanged", extra={"seconds": round(jump_ms / 1000)})
            await self.indexing.move_clock(jump_ms, noted=lambda: self._clocks.have_moved(jump_ms))
