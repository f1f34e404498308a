"""The embedded store: a log that makes mail durable, what is new of it in memory, and an index for the rest.

The parts, each of which knows only those before it:

    memory      messages that are new, being attempted or have just changed, as the log says
    journal     what happens to a message: written to the log, and noted in memory when it is durable
    indexing    what is looked up in memory and index, and what is written from the one into the other
    contents    where contents lie, and whether they are whole
    claiming    what is attempted next
    compaction  segments that are used again
    operators   what operators see and do

While a message's record is on its way, the message is busy, and whoever else wants to change it waits.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from otel_smtp.spool.embedded import first_version
from otel_smtp.spool.embedded.aside import Found, envelope, found_in, hold_again
from otel_smtp.spool.embedded.claiming import Claiming
from otel_smtp.spool.embedded.clocks import Clocks, Uptime, uptime
from otel_smtp.spool.embedded.compaction import Compaction
from otel_smtp.spool.embedded.contents import Contents
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.draft import EmbeddedDraft
from otel_smtp.spool.embedded.entries import Entry, dumps
from otel_smtp.spool.embedded.files import storage_error
from otel_smtp.spool.embedded.index_thread import IndexThread
from otel_smtp.spool.embedded.indexing import Indexing
from otel_smtp.spool.embedded.journal import Journal, fail
from otel_smtp.spool.embedded.log import SEGMENT_OCTETS, Log
from otel_smtp.spool.embedded.memory import HOT_MOST, Memory
from otel_smtp.spool.embedded.operator_verbs import EmbeddedOperatorVerbs
from otel_smtp.spool.embedded.records import RecordKind
from otel_smtp.spool.embedded.recovery import Recovered, recover
from otel_smtp.spool.messages import (
    Backlog,
    ContentRef,
    Counts,
    DeliveryState,
    End,
    Kind,
    Lease,
    MessageView,
    MovedMessage,
    NewMessage,
    NoSuchMessage,
    SpoolError,
    StaleLease,
    StorageFull,
    Verdict,
    is_for_receiver,
    new_id,
    stale,
)
from otel_smtp.spool.store import Draft as AnyDraft
from otel_smtp.spool.store import Notice, Recovery, Woken

logger: Final = logging.getLogger("otel_smtp.spool.embedded.store")

DEFAULT_MOST_MESSAGES: Final = 1_000_000
DEFAULT_LEAST_FREE_OCTETS: Final = 40 * 1024 * 1024  # 1.5 times the largest message, as Postfix asks before MAIL
LEAST_FREE_INODES: Final = 0.01
CRASHES_ALLOWED: Final = 3
ROOM_CHECK_SECONDS: Final = 1.0
KEEP_SECONDS: Final = 0.5  # how often memory and index are brought together


class EmbeddedStore:
    """A store in one directory.

    Args:
        path: the directory; made where it is missing.
        most_messages, most_octets: beyond, new mail is refused; None: never for that.
        least_free_octets: below, new mail is refused.
        crashes_allowed: how many crashes a message may be part of before it is held.
        is_index_trusted: False: the index is made again out of the log.
        moves_out: its messages go into another store: see `begin_move`.
        clock: the wall clock, in seconds since the epoch.
        up: how long the machine has been up.

    Attributes:
        most_messages: as above.
        look_again_seconds: see `Store`.
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
        self._has_room = True
        self._alarm: str | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._submitting: set[asyncio.Task[Any]] = set()
        self.memory = memory = Memory()
        self.journal = journal = Journal(memory, self._now_ms, self.directory.remove_large)
        self.index = index = IndexThread(journal.latch)
        self.indexing = indexing = Indexing(memory, index, journal, clocks.seen)
        self._contents = contents = Contents(self.directory, memory, indexing)
        self._claiming = Claiming(memory, index, journal, contents)
        self.compaction = Compaction(self.directory, memory, index, journal, indexing, contents, segment_octets)
        self._operators = EmbeddedOperatorVerbs(memory, index, journal, indexing, self._now_ms)

    # Life ------------------------------------------------------------------------------------------------------

    async def open(self) -> Recovery:
        """Own the directory, and take back what a crash left behind.

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
        )
        self.journal.begin(log)
        try:
            held, interrupted = await self._take_over(recovered)
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
        """Begin with what the index has; the messages that are held from now on, and how many attempts were cut off."""
        memory = self.memory
        live, destinations, leased, (outcomes, outcome_octets) = await self.index.run(
            lambda index: (index.segments(), index.destinations(), index.load(index.leased()), index.outcomes())
        )
        memory.live.update((number, [*found]) for number, found in live.items())
        memory.cold.update(destinations)
        memory.messages = recovered.index.messages
        memory.outcomes.update(outcomes)
        memory.outcome_messages, memory.outcome_octets = sum(outcomes.values()), outcome_octets
        memory.large_octets = await asyncio.to_thread(self.directory.large_octets)
        self.indexing.known = self.journal.log.told
        held: list[str] = []
        interrupted = sum(one.state is DeliveryState.LEASED for entry in leased for one in entry.deliveries)
        for entry in leased:
            memory.admit(entry)
        await self._take_back(leased, self._crashes_allowed, held)
        return held, interrupted

    async def close(self) -> None:
        """Finish what was asked for, and give the directory up. Idempotent."""
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
            await self._take_back([entry for entry in self.memory.hot.values() if entry.is_leased], None, [])
            if log.told != self.indexing.known or self.memory.unindexed:
                # What was answered is followed by a record that says so: damage to it is known from a torn tail.
                await self.journal.append([(RecordKind.CLOCK, dumps({"moved_ms": 0, "ended": {}}), ())])
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

    async def _take_back(self, entries: Sequence[Entry], crashes_allowed: int | None, held: list[str]) -> None:
        changes: list[asyncio.Future[None]] = []
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
                if str(error) != told:  # twice a second would fill a disk that is full
                    told = str(error)
                    logger.error("spool housekeeping failed; retrying", extra={"fault": told})
            except Exception:
                logger.exception("spool housekeeping failed; retrying")

    async def _look_aside(self) -> None:
        aside = len(await asyncio.to_thread(self.directory.aside))
        self._alarm = f"{aside} files in lost+found/ may be mail: see `otel-smtp queue rebuild`" if aside else None

    def alarm(self) -> str | None:
        """See `Store.alarm`."""
        return self._alarm

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
        return None if self._has_room else StorageFull("the disk of the spool is nearly full")

    def _check_room(self) -> None:
        try:
            octets, inodes = self.directory.room()
        except OSError:
            self._has_room = False
            return
        had_room = self._has_room
        has_enough = octets >= self._least_free and inodes >= LEAST_FREE_INODES
        self._has_room = has_enough and self.directory.has_reserve  # what is queued goes first
        if had_room and not self._has_room:
            logger.error("no room for new mail", extra={"free_octets": octets, "free_inodes_share": round(inodes, 3)})

    # Messages in -----------------------------------------------------------------------------------------------

    def draft(self) -> EmbeddedDraft:
        """See `Store.draft`."""
        return EmbeddedDraft(self._new_temporary)

    def _new_temporary(self) -> Path:
        return self.directory.temporary(new_id())

    def submit(self, message: NewMessage, draft: AnyDraft, *, lease: bool) -> asyncio.Future[Sequence[Lease]]:
        """See `Store.submit`."""
        assert isinstance(draft, EmbeddedDraft)
        answer: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
        content = draft.in_memory
        entry = Entry.of(message, self._now_ms(), draft.octets, is_leased=lease, is_large=content is None)
        if content is not None and len(self.memory.hot) < 2 * HOT_MOST:
            self.journal.add(entry, content, None, answer)
            return answer
        # Whoever gives up waiting does not undo what is on its way to the disk.
        task = self._loop.create_task(
            self._submit_large(entry, draft, answer) if content is None else self._submit_later(entry, content, answer)
        )
        self._submitting.add(task)
        task.add_done_callback(self._submitting.discard)
        return answer

    async def _submit_later(
        self, entry: Entry, content: Sequence[bytes], answer: asyncio.Future[Sequence[Lease]]
    ) -> None:
        """What comes faster than the index takes it waits for the index: memory is bounded."""
        try:
            await self.indexing.write_cooled()
        except SpoolError as error:
            fail(answer, error)
        else:
            self.journal.add(entry, content, None, answer)

    async def _submit_large(self, entry: Entry, draft: EmbeddedDraft, answer: asyncio.Future[Sequence[Lease]]) -> None:
        is_kept = False
        try:
            await draft.end()
            file, crc = draft.hand_over()
            await asyncio.to_thread(self.directory.keep, file, entry.id, entry.octets, envelope(entry, crc))
            is_kept = True
            added: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
            self.journal.add(entry, (), crc, added)
            leases = await added
        except Exception as error:  # noqa: BLE001 - whoever waits has it
            if isinstance(error, SpoolError):
                self.journal.latch(error)
            if is_kept:
                await asyncio.to_thread(self.directory.remove_large, entry.id)
            fail(answer, error)
        else:
            if not answer.done():
                answer.set_result(leases)
        finally:
            draft.discard()

    async def _add_carried(self, found: Sequence[first_version.Carried], tally: Mapping[str, int]) -> None:
        """Take messages of the first version in; `tally`: what it had counted, with the last of them."""
        ids = [one.entry.id for one in found]
        known = {entry.id for entry in await self.index.run(lambda index: index.load(ids))} | self.memory.hot.keys()
        answers: list[asyncio.Future[Sequence[Lease]]] = []
        for one in found:
            if one.entry.id not in known:
                answer: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
                self.journal.add(one.entry, one.content, one.crc, answer, is_new=False)
                answers.append(answer)
        await asyncio.gather(*answers)
        if tally:
            await self.journal.append(
                [(RecordKind.CLOCK, dumps({"moved_ms": 0, "ended": dict(tally)}), ())], ended=tally
            )
        await self.indexing.write_all()

    # Deliveries ------------------------------------------------------------------------------------------------

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        """See `Store.claim`."""
        leases, next_due = await self._claiming.claim(wanted, self._now_ms())
        return leases, None if next_due is None else max(0.0, (next_due - self._now_ms()) / 1000)

    def finish(
        self,
        lease: Lease,
        verdicts: Sequence[Verdict],
        *,
        retry_in: float = 0.0,
        is_possible_duplicate: bool = False,
        counts_attempt: bool = True,
        hold: bool = False,
        notices: Sequence[Notice] = (),
        is_urgent: bool = True,
    ) -> asyncio.Future[None]:
        """See `Store.finish`."""
        entry = self.memory.hot.get(lease.message_id)
        if entry is not None and entry.is_busy:
            return self._loop.create_task(
                self._finish_later(
                    lease, verdicts,
                    retry_in=retry_in, is_possible_duplicate=is_possible_duplicate, counts_attempt=counts_attempt,
                    hold=hold, notices=notices, is_urgent=is_urgent,
                )
            )  # fmt: skip
        return self._finish(lease, verdicts, retry_in, is_possible_duplicate, counts_attempt, hold, notices, is_urgent)

    def _finish(
        self,
        lease: Lease,
        verdicts: Sequence[Verdict],
        retry_in: float,
        is_possible_duplicate: bool,
        counts_attempt: bool,
        hold: bool,
        notices: Sequence[Notice],
        is_urgent: bool,
    ) -> asyncio.Future[None]:
        """As `finish`; the message is not busy."""
        try:
            if (entry := self.memory.hot.get(lease.message_id)) is None:
                raise stale(lease)
            changed: Entry | None = None
            if (ended := entry.ended_by(lease, verdicts)) is None:
                changed = entry.copy()
                now_ms = self._now_ms()
                ended = changed.settle(
                    lease, verdicts,
                    now_ms=now_ms, due_ms=now_ms + round(retry_in * 1000),
                    is_possible_duplicate=is_possible_duplicate, counts_attempt=counts_attempt, hold=hold,
                )  # fmt: skip
                if not changed.deliveries:
                    changed = None
        except StaleLease as error:
            answer: asyncio.Future[None] = self._loop.create_future()
            answer.set_exception(error)
            return answer
        return self.journal.change(entry, changed, ended, notices, is_urgent=is_urgent)

    async def _finish_later(self, lease: Lease, verdicts: Sequence[Verdict], **how: Any) -> None:
        await self.memory.until_free(lease.message_id)
        await self._finish(lease, verdicts, **how)

    async def mark_corrupt(self, lease: Lease) -> None:
        """See `Store.mark_corrupt`."""
        await self.memory.until_free(lease.message_id)
        if (entry := self.memory.hot.get(lease.message_id)) is None:
            raise stale(lease)
        changed = entry.copy()
        changed.owned(lease).state = DeliveryState.CORRUPT
        await self.journal.change(entry, changed, {})

    async def end_overdue(self, most: int, *, outcomes: bool = False) -> Sequence[Lease]:
        """See `Store.end_overdue`."""
        await self.indexing.write_all()
        now_ms = self._now_ms()
        leases: list[Lease] = []
        for message_id in await self.index.run(lambda index: index.overdue(now_ms, most, outcomes=outcomes)):
            try:
                entry = await self.indexing.get(message_id)
            except NoSuchMessage:
                continue
            except SpoolError:
                if not leases:
                    raise
                break
            changed = entry.copy()
            waiting = [one for one in changed.deliveries if one.state is DeliveryState.READY]
            if not waiting or changed.held_ms is not None or changed.expires_ms > now_ms:
                continue
            for one in waiting:
                one.lease()
            try:
                await self.journal.change(entry, changed, {})
            except SpoolError:
                if not leases:
                    raise
                break  # those before are leased, and have to be ended
            leases += [changed.lease_of(one) for one in waiting]
        return leases

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        """See `Store.unwarned`."""
        await self.indexing.write_all()
        before_ms = self._now_ms() - round(age * 1000)
        entries = await self.index.run(lambda index: index.load(index.unwarned(before_ms, most)))
        return [
            entry.lease_of(one)
            for entry in entries
            for one in entry.deliveries
            if one.state is DeliveryState.READY and one.attempts > 0
        ]

    async def warn(self, message_id: str, notices: Sequence[Notice]) -> bool:
        """See `Store.warn`."""
        try:
            entry = await self.indexing.get(message_id)
        except NoSuchMessage:
            return False
        if entry.is_warned:
            return False
        changed = entry.copy()
        changed.is_warned = True
        await self.journal.change(entry, changed, {}, notices)
        return True

    async def destinations(self, *, outcomes: bool = False) -> Sequence[str]:
        """See `Store.destinations`."""
        hot = {one.destination for entry in self.memory.hot.values() for one in entry.deliveries}
        found = hot | {destination for destination, count in self.memory.cold.items() if count > 0}
        return sorted(destination for destination in found if is_for_receiver(destination) is outcomes)

    async def rebuild(self) -> Sequence[str]:
        """See `Store.rebuild`: what lies in lost+found/ and has its envelope."""
        told: list[str] = []
        tally = await self.tally()
        # Recipients that were counted as accepted, and are nowhere; the count itself may be lost with the log.
        missing = tally.get("accepted", 0) - sum(tally.get(end.value, 0) for end in End) - await self._recipients()
        for path in await asyncio.to_thread(self.directory.aside):
            try:
                found = await asyncio.to_thread(found_in, path)
                back = [one for one in found if not await self._is_known(one.entry.id)]
                for one in back:
                    _, recipients = one.entry.accepted
                    if is_counted := missing >= recipients:
                        missing -= recipients
                    await self._put_back(path, one, is_counted=is_counted)
            except OSError as error:
                told.append(f"{path.name}: {error.strerror}")
                continue
            told += [f"{path.name}: message {one.entry.id} is queued again, and held" for one in back]
            if await asyncio.to_thread(path.exists):
                await asyncio.to_thread(self.directory.give_up, path)
                if not found:
                    told.append(f"{path.name}: no message can be read in it; it is kept in lost+found/unreadable/")
                elif len(back) < len(found):
                    told.append(f"{path.name}: {len(found) - len(back)} messages in it are queued")
        await self._look_aside()
        return told

    async def _recipients(self) -> int:
        count, after = 0, ""
        while page := await self.page(after, 500):
            count += sum(len(shown.recipients) for shown in page if shown.kind is Kind.MAIL)
            after = page[-1].id
        return count

    async def _is_known(self, message_id: str) -> bool:
        try:
            await self.indexing.look_up(message_id)
        except NoSuchMessage:
            return False
        return True

    async def _put_back(self, path: Path, found: Found, *, is_counted: bool) -> None:
        entry, crc = found.entry, found.crc
        hold_again(entry, self._now_ms())
        if found.content is None:
            await asyncio.to_thread(self.directory.put_back, path, entry.id)
        answer: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
        content = () if found.content is None else (found.content,)
        self.journal.add(entry, content, crc, answer, is_new=not is_counted)
        try:
            await answer
        except SpoolError:
            if found.content is None:
                await asyncio.to_thread(self.directory.move_aside, self.directory.large(entry.id))
            raise

    def holds(self, lease: Lease) -> bool:
        """See `Store.holds`: one process owns the directory."""
        return True

    # Into another store ------------------------------------------------------------------------------------------

    async def begin_move(self, where: str) -> None:
        """From here on, until `end_move`, no gateway may deliver from this directory.

        Args:
            where: names the other store.

        Raises:
            SpoolError: it cannot be noted, or a move into another store has begun and not ended.
        """
        try:
            before = await asyncio.to_thread(self.directory.moving)
            if before is None:
                await asyncio.to_thread(self.directory.begin_move, where)
        except OSError as error:
            raise storage_error(error) from error
        if before not in (None, where):
            raise SpoolError(
                f"{self.directory.path}: its mail is being moved into another queue; finish that first, with the "
                "settings of that queue"
            )

    async def end_move(self) -> None:
        """No message is in both stores any more."""
        try:
            await asyncio.to_thread(self.directory.end_move)
        except OSError as error:
            raise storage_error(error) from error

    async def whole(self, message_id: str) -> MovedMessage:
        """A message with all that is known of it.

        Raises:
            NoSuchMessage: there is none of that id.
        """
        return (await self.indexing.look_up(message_id)).moved(self._now_ms())

    async def forget(self, message_id: str) -> None:
        """End a message that another store has: as if it had never been accepted here."""
        entry = await self.indexing.get(message_id)
        name, recipients = entry.accepted
        await self.journal.change(entry, None, {name: -recipients})

    # Contents, and what operators see and do -----------------------------------------------------------------------

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """See `Store.read`."""
        return await self._contents.read(content, start, octets)

    async def is_intact(self, content: ContentRef) -> bool:
        """See `Store.is_intact`."""
        return await self._contents.is_intact(content)

    async def counts(self) -> Counts:
        """See `Store.counts`; where there is very much, a few seconds old."""
        return await self._operators.counts(self.compaction.dead_octets)

    async def tally(self) -> Mapping[str, int]:
        """See `Store.tally`."""
        # A copy first: the log's thread counts on.
        return {name: count for name, count in dict(self.journal.log.tally).items() if count}

    async def backlog(self, destinations: Sequence[str]) -> Mapping[str, Backlog]:
        """See `Store.backlog`."""
        return await self._operators.backlog(destinations)

    async def page(self, after: str, most: int, *, outcomes: bool = False) -> Sequence[MessageView]:
        """See `Store.page`."""
        return await self._operators.page(after, most, outcomes=outcomes)

    async def show(self, message_id: str) -> MessageView:
        """See `Store.show`."""
        return (await self.indexing.look_up(message_id)).shown()

    async def find(
        self, *, trace_id: str | None = None, sender: str | None = None, recipient: str | None = None, most: int
    ) -> Sequence[MessageView]:
        """See `Store.find`."""
        return await self._operators.find(trace_id, sender, recipient, most)

    async def retry(self, message_id: str) -> bool:
        """See `Store.retry`."""
        return await self._operators.retry(message_id)

    async def hold(self, message_id: str) -> bool:
        """See `Store.hold`."""
        return await self._operators.hold(message_id)

    async def release(self, message_id: str) -> bool:
        """See `Store.release`."""
        return await self._operators.release(message_id)

    async def expire(self, message_id: str) -> bool:
        """See `Store.expire`."""
        return await self._operators.expire(message_id)

    async def reset(self, message_id: str, expires_in: float) -> bool:
        """See `Store.reset`."""
        return await self._operators.reset(message_id, expires_in)

    async def delete(self, message_id: str) -> int:
        """See `Store.delete`."""
        return await self._operators.delete(message_id)

    async def housekeep(self) -> None:
        """See `Store.housekeep`: look at the clocks."""
        if jump_ms := self._clocks.jump_ms():
            logger.warning("clock jumped; ages of queued mail unchanged", extra={"seconds": round(jump_ms / 1000)})
            await self.indexing.move_clock(jump_ms, noted=lambda: self._clocks.have_moved(jump_ms))
