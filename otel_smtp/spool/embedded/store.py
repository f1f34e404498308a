"""The embedded store: a log that makes mail durable, what is new of it in memory, and an index for the rest.

All state changes on the event loop, when the record of the change is durable; so what is seen is what would be found
after a crash. While a message's record is on its way, the message is busy, and whoever else wants to change it waits.

A message is in memory (`_hot`) while it is new, being attempted, or changed within the last moment; then it is written
to the index and forgotten. What comes and goes within that moment never touches the index.
"""

import asyncio
import contextlib
import heapq
import logging
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from otel_smtp.spool.embedded import first_version
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.draft import Draft
from otel_smtp.spool.embedded.entries import DeliveryEntry, Entry, Place, dumps, stale
from otel_smtp.spool.embedded.index import Index, index_error, row_of
from otel_smtp.spool.embedded.log import SEGMENT_OCTETS, Log, Part, Step
from otel_smtp.spool.embedded.records import RecordKind
from otel_smtp.spool.embedded.recovery import Recovered, recover
from otel_smtp.spool.embedded.waiting import SAMPLE, Waiting, in_turn
from otel_smtp.spool.messages import (
    ContentRef,
    Counts,
    DeliveryState,
    Kind,
    Lease,
    NewMessage,
    NoSuchMessage,
    Shown,
    SpoolError,
    StaleLease,
    StorageBroken,
    StorageFull,
    Verdict,
    new_id,
)
from otel_smtp.spool.store import Draft as AnyDraft
from otel_smtp.spool.store import Notice, Recovery

logger: Final = logging.getLogger("otel_smtp.spool.embedded.store")

DEFAULT_MOST_MESSAGES: Final = 1_000_000
DEFAULT_LEAST_FREE_OCTETS: Final = 40 * 1024 * 1024  # 1.5 times the largest message, as Postfix asks before MAIL
LEAST_FREE_INODES: Final = 0.01
CRASHES_ALLOWED: Final = 3
ROOM_CHECK_SECONDS: Final = 1.0
CLOCK_JUMP_SECONDS: Final = 60.0

KEEP_SECONDS: Final = 0.5  # how often memory and index are brought together
COOL_SECONDS: Final = 2.0  # what has been in memory for so long goes into the index
FLUSH_MOST: Final = 500  # messages at a time: to encode them holds the event loop
HOT_MOST: Final = 20_000
CONTENTS_OCTETS: Final = 4 * 1024 * 1024  # of contents that are kept in memory
COUNT_CACHE_SECONDS: Final = 15.0
COUNT_CACHE_FROM: Final = 50_000

DEAD_SEGMENTS: Final = 2  # of dead octets beyond as many as live: the log is at most twice what lives in it, and these
MOVE_MOST: Final = 64  # messages that are moved at a time

T = TypeVar("T")


class EmbeddedStore:
    """A store in one directory.

    Args:
        path: the directory; made where it is missing.
        most_messages: beyond, new mail is refused.
        least_free_octets: below, new mail is refused.
        crashes_allowed: how many crashes a message may be part of before it is held.
        clock: the wall clock, in seconds since the epoch.

    Attributes:
        most_messages: as above.
    """

    def __init__(
        self,
        path: Path,
        *,
        most_messages: int = DEFAULT_MOST_MESSAGES,
        least_free_octets: int = DEFAULT_LEAST_FREE_OCTETS,
        crashes_allowed: int = CRASHES_ALLOWED,
        segment_octets: int = SEGMENT_OCTETS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = SpoolDirectory(path)
        self.most_messages = most_messages
        self._least_free = least_free_octets
        self._crashes_allowed = crashes_allowed
        self._segment_octets = segment_octets
        self._clock = clock
        self._clocks = (clock(), time.monotonic())
        self._room_checked_at = float("-inf")
        self._has_room = True
        self._log: Log | None = None
        self._index: Index | None = None
        self._indexing: ThreadPoolExecutor | None = None  # one thread: the index is its own
        self._keeper: asyncio.Task[None] | None = None
        self._is_closing = False
        self._submitting: set[asyncio.Task[Any]] = set()
        self._hot: dict[str, Entry] = {}
        # Of messages that have just come and wait for an attempt: what is attempted at once need not be read again.
        self._contents: dict[str, Sequence[bytes]] = {}
        self._contents_octets = 0
        self._waiting = Waiting(self._hot.get)
        # Not in the index as it is: since when, by the loop's clock, and from where on in the log, in the order of the
        # log. None: it has ended.
        self._unindexed: dict[str, tuple[float, tuple[int, int], Entry | None]] = {}
        self._free: dict[str, asyncio.Event] = {}  # waited for, until the message of that id is not busy
        self._cold: Counter[str] = Counter()  # deliveries in the index alone, by destination
        self._live: dict[int, list[int]] = {}  # messages and octets of their records, by segment
        self._messages = 0
        self._segments: dict[int, int] = {}  # octets of the files, by number
        self._seen_position: tuple[int, int] = (0, 0)
        self._counted: tuple[float, dict[str, Any]] | None = None
        self._flushing = asyncio.Lock()

    # Life ------------------------------------------------------------------------------------------------------

    async def open(self) -> Recovery:
        """Own the directory, and take back what a crash left behind.

        Raises:
            SpoolError: it belongs to another process, or cannot be used.
        """
        self._loop = asyncio.get_running_loop()
        self._indexing = ThreadPoolExecutor(1, thread_name_prefix="spool-index")
        try:
            recovered = await self._in_index(self._open)
        except BaseException:
            self._indexing.shutdown(wait=True)
            self.directory.close()
            raise
        self._index = index = recovered.index
        self._log = Log(
            self.directory,
            recovered.next_number,
            recovered.previous_end,
            markers=recovered.markers,
            tally=recovered.tally,
            now_ms=self._now_ms,
            has_begun=self._segment_begun,
            segment_octets=self._segment_octets,
        )
        try:
            live, self._cold, leased = await self._in_index(
                lambda: (index.segments(), Counter(index.destinations()), index.load(index.leased()))
            )
            self._live = {number: [*found] for number, found in live.items()}
            self._segments = dict.fromkeys(recovered.markers, self._segment_octets)
            self._seen_position = self._log.told
            self._messages = index.messages
            held: list[str] = []
            interrupted = sum(one.state is DeliveryState.LEASED for entry in leased for one in entry.deliveries)
            for entry in leased:
                self._to_memory(entry)
            await self._take_back(leased, self._crashes_allowed, held)
            await self._move(recovered.clock_jump_ms)
            carried = await first_version.carry_over(self.directory, self._add_carried)
            recovered.remarks.extend(carried)
        except BaseException:
            await self.close()
            raise
        self._keeper = self._loop.create_task(self._keep())
        return Recovery(self._messages, interrupted, held, recovered.lost, recovered.remarks)

    def _open(self) -> Recovered:
        self.directory.open()
        try:
            recovered = recover(self.directory, self._now_ms())
        except (OSError, sqlite3.Error) as error:
            raise SpoolError(f"{self.directory.path}: {error}") from error
        return recovered

    async def close(self) -> None:
        """Finish what was asked for, and give the directory up. Idempotent."""
        if self._is_closing or self._log is None or self._index is None or self._indexing is None:
            return
        self._is_closing = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._submitting:
            await asyncio.wait(self._submitting)
        is_clean = True
        try:
            await self._take_back([entry for entry in self._hot.values() if entry.is_leased], None, [])
            if self._log.told != self._seen_position or self._unindexed:
                # What was answered is followed by a record that says so: damage to it is known from a torn tail.
                await self._append([(RecordKind.CLOCK, dumps({"moved_ms": 0, "ended": {}}), ())])
        except SpoolError as error:
            is_clean = False
            logger.error("the spool was not closed well", extra={"fault": str(error)})
        await self._log.close()
        try:
            await self._flush_all(is_clean=is_clean)
        except SpoolError as error:
            logger.error("the spool was not closed well", extra={"fault": str(error)})
        await self._in_index(self._index.close)
        self._indexing.shutdown(wait=True)
        await asyncio.to_thread(self.directory.close)

    async def _take_back(self, entries: Sequence[Entry], crashes_allowed: int | None, held: list[str]) -> None:
        changes: list[asyncio.Future[None]] = []
        for entry in entries:
            await self._until_free(entry.id)
            if (known := self._hot.get(entry.id)) is None or not known.is_leased:
                continue
            changed = known.copy()
            if changed.take_back(crashes_allowed=crashes_allowed, now_ms=self._now_ms()):
                held.append(entry.id)
            changes.append(self._change(known, changed, {}))
        await asyncio.gather(*changes)

    def refusal(self) -> SpoolError | None:
        """See `Store.refusal`."""
        assert self._log is not None
        if self._log.fault is not None:
            return self._log.fault
        if self._messages >= self.most_messages:
            return StorageFull(f"the spool holds {self._messages} messages already")
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
        had_room, self._has_room = self._has_room, octets >= self._least_free and inodes >= LEAST_FREE_INODES
        if had_room and not self._has_room:
            logger.error("no room for new mail", extra={"free_octets": octets, "free_inodes_share": round(inodes, 3)})

    def _now_ms(self) -> int:
        return round(self._clock() * 1000)

    # Messages in -----------------------------------------------------------------------------------------------

    def draft(self) -> Draft:
        """See `Store.draft`."""
        return Draft(lambda: self.directory.temporary(new_id()))

    def submit(self, message: NewMessage, draft: AnyDraft, *, lease: bool) -> asyncio.Future[Sequence[Lease]]:
        """See `Store.submit`."""
        assert isinstance(draft, Draft)
        answer: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
        content = draft.in_memory
        entry = Entry.of(message, self._now_ms(), draft.octets, is_leased=lease, is_large=content is None)
        if content is not None and len(self._hot) < 2 * HOT_MOST:
            self._add(entry, content, None, answer)
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
            await self._flush(before=self._loop.time() - COOL_SECONDS)
        except SpoolError as error:
            _fail(answer, error)
        else:
            self._add(entry, content, None, answer)

    async def _submit_large(self, entry: Entry, draft: Draft, answer: asyncio.Future[Sequence[Lease]]) -> None:
        is_kept = False
        try:
            await draft.end()
            file, crc = draft.hand_over()
            await asyncio.to_thread(self.directory.keep, file, entry.id, entry.octets)
            is_kept = True
            added: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
            self._add(entry, (), crc, added)
            leases = await added
        except Exception as error:  # noqa: BLE001 - whoever waits has it
            if isinstance(error, SpoolError):
                self._latch(error)
            if is_kept:
                await asyncio.to_thread(self.directory.remove_large, entry.id)
            _fail(answer, error)
        else:
            if not answer.done():
                answer.set_result(leases)
        finally:
            draft.discard()

    def _add(
        self,
        entry: Entry,
        content: Sequence[bytes],
        crc: int | None,
        answer: asyncio.Future[Sequence[Lease]],
        *,
        is_new: bool = True,
    ) -> None:
        """Have a message written. The answer is given when it is durable."""

        def done(step: Step, error: SpoolError | None) -> None:
            if error is not None:
                _fail(answer, error)
                return
            self._is_added(entry, step, 0, crc)
            if content and is_new:
                self._keep_content(entry, content)
            if not answer.done():
                answer.set_result(
                    [entry.lease_of(one) for one in entry.deliveries if one.state is DeliveryState.LEASED]
                )

        name, recipients = entry.accepted
        try:
            self._start(
                Step(
                    [_message_part(entry, content, crc, is_new=is_new)], done,
                    ended={name: recipients} if is_new else {}, is_result=False,
                )
            )  # fmt: skip
        except SpoolError as error:
            _fail(answer, error)

    def _keep_content(self, entry: Entry, content: Sequence[bytes]) -> None:
        waits = any(one.state is DeliveryState.READY and one.due_ms <= entry.arrived_ms for one in entry.deliveries)
        if waits and self._contents_octets + entry.octets <= CONTENTS_OCTETS:
            self._contents[entry.id] = content
            self._contents_octets += entry.octets

    def _drop_content(self, entry: Entry) -> None:
        if self._contents.pop(entry.id, None) is not None:
            self._contents_octets -= entry.octets

    def _is_added(self, entry: Entry, step: Step, part: int, crc: int | None) -> None:
        entry.place = self._place(entry, step, part, crc)
        self._messages += 1
        self._note(entry, (step.segment, step.places[part][0]))

    def _place(self, entry: Entry, step: Step, part: int, crc: int | None) -> Place:
        at, octets, content_at, written_crc = step.places[part]
        found = self._live.setdefault(step.segment, [0, 0])
        found[0] += 1
        found[1] += octets
        return Place(
            step.segment, at, octets, -1 if entry.is_large else content_at, written_crc if crc is None else crc
        )

    async def _add_carried(self, found: Sequence[first_version.Carried], tally: Mapping[str, int]) -> None:
        """Take messages of the first version in; `tally`: what it had counted, with the last of them."""
        assert self._index is not None
        index = self._index
        ids = [one.entry.id for one in found]
        known = {entry.id for entry in await self._in_index(lambda: index.load(ids))} | self._hot.keys()
        answers: list[asyncio.Future[Sequence[Lease]]] = []
        for one in found:
            if one.entry.id not in known:
                answer: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
                self._add(one.entry, one.content, one.crc, answer, is_new=False)
                answers.append(answer)
        await asyncio.gather(*answers)
        if tally:
            await self._append([(RecordKind.CLOCK, dumps({"moved_ms": 0, "ended": dict(tally)}), ())], ended=tally)
        await self._flush_all()

    # The log ---------------------------------------------------------------------------------------------------

    def _start(self, step: Step, *, is_urgent: bool = True) -> None:
        if self._log is None or (self._is_closing and not step.is_result):
            raise SpoolError("the spool is closed")
        self._log.append(step, is_urgent=is_urgent or self._is_closing)

    async def _append(
        self,
        parts: Sequence[Part],
        *,
        ended: Mapping[str, int] | None = None,
        durable: Callable[[Step], None] = lambda _: None,
    ) -> None:
        """Write records.

        Args:
            durable: notes what they say, called before the records behind them are told of. Whoever waits for this
                call goes on later than that, when the index may be said to be complete up to a later record.
        """
        answer: asyncio.Future[None] = self._loop.create_future()

        def done(step: Step, error: SpoolError | None) -> None:
            if error is not None:
                _fail(answer, error)
                return
            durable(step)
            if not answer.done():
                answer.set_result(None)

        self._start(Step(parts, done, ended=ended or {}, is_result=True))
        await answer

    def _change(
        self,
        entry: Entry,
        changed: Entry,
        ended: Mapping[str, int],
        notices: Sequence[Notice] = (),
        *,
        is_urgent: bool = True,
    ) -> asyncio.Future[None]:
        """Have `changed` take the place of `entry`, which is not busy, with the notices that tell of it."""
        answer: asyncio.Future[None] = self._loop.create_future()
        is_over = not changed.deliveries
        if is_over:
            parts: list[Part] = [(RecordKind.END, dumps({"id": entry.id, "ended": ended}), ())]
        else:
            parts = [(RecordKind.STATE, f"[{dumps(ended)},{changed.encode()}]", ())]
        counted = ended
        added: list[Entry] = []
        if notices:
            counted = dict(ended)
            for message, content in notices:
                notice = Entry.of(message, self._now_ms(), len(content), is_leased=False, is_large=False)
                added.append(notice)
                parts.append(_message_part(notice, (content,), None, is_new=True))
                name, recipients = notice.accepted
                counted[name] = counted.get(name, 0) + recipients

        def done(step: Step, error: SpoolError | None) -> None:
            self._set_free(entry)
            if error is not None:
                self._waiting.offer(entry)
                _fail(answer, error)
                return
            position = (step.segment, step.places[0][0])
            if is_over:
                self._is_over(entry, position)
            else:
                changed.place = entry.place  # it may have moved meanwhile
                self._note(changed, position)
            for part, notice in enumerate(added, 1):
                self._is_added(notice, step, part, None)
            if not answer.done():
                answer.set_result(None)

        entry.is_busy = True
        try:
            self._start(Step(parts, done, ended=counted, is_result=True), is_urgent=is_urgent)
        except SpoolError as error:
            self._set_free(entry)
            _fail(answer, error)
        return answer

    def _set_free(self, entry: Entry) -> None:
        entry.is_busy = False
        if (waited := self._free.pop(entry.id, None)) is not None:
            waited.set()

    async def _until_free(self, message_id: str) -> None:
        while (entry := self._hot.get(message_id)) is not None and entry.is_busy:
            await self._free.setdefault(message_id, asyncio.Event()).wait()

    # Memory ----------------------------------------------------------------------------------------------------

    def _note(self, entry: Entry, position: tuple[int, int]) -> None:
        """A message is new, or has changed: its record is durable at `position`."""
        self._hot[entry.id] = entry
        before = self._unindexed.get(entry.id)
        if before is None:
            self._unindexed[entry.id] = (self._loop.time(), position, entry)
        else:
            self._unindexed[entry.id] = (before[0], before[1], entry)
        self._waiting.offer(entry)

    def _is_over(self, entry: Entry, position: tuple[int, int]) -> None:
        self._hot.pop(entry.id, None)
        self._drop_content(entry)
        self._messages -= 1
        assert entry.place is not None
        self._leave(entry.place)
        before = self._unindexed.get(entry.id)
        if entry.is_indexed:
            since, first = (before[0], before[1]) if before is not None else (self._loop.time(), position)
            self._unindexed[entry.id] = (since, first, None)
        elif before is not None:
            del self._unindexed[entry.id]
        if entry.is_large:
            self._loop.run_in_executor(None, self.directory.remove_large, entry.id)

    def _leave(self, place: Place) -> None:
        if (found := self._live.get(place.segment)) is not None:
            found[0] -= 1
            found[1] -= place.octets
            if not found[0]:
                del self._live[place.segment]

    def _to_memory(self, entry: Entry) -> Entry:
        """A message that was read from the index; what is in memory is newer."""
        if (known := self._hot.get(entry.id)) is not None:
            return known
        self._hot[entry.id] = entry
        for one in entry.deliveries:
            self._cold[one.destination] -= 1
        self._waiting.offer(entry)
        return entry

    async def _get(self, message_id: str) -> Entry:
        """A message that is not busy; in memory from now on.

        Raises:
            NoSuchMessage: there is none.
        """
        while True:
            await self._until_free(message_id)
            if (entry := self._hot.get(message_id)) is not None:
                return entry
            if message_id in self._unindexed:  # it has ended, and the index does not know yet
                break
            found = await self._in_index(lambda: self._the_index.load([message_id]))
            if not found:
                break
            if message_id in self._unindexed:
                continue
            self._to_memory(found[0])
        raise NoSuchMessage(f"no message {message_id}")

    @property
    def _the_log(self) -> Log:
        assert self._log is not None
        return self._log

    @property
    def _the_index(self) -> Index:
        assert self._index is not None
        return self._index

    async def _in_index(self, work: Callable[[], T]) -> T:
        """Do something in the index's thread.

        Raises:
            SpoolError: it failed, or the spool is closed.
        """
        if self._indexing is None:
            raise SpoolError("the spool is closed")
        try:
            return await self._loop.run_in_executor(self._indexing, work)
        except sqlite3.Error as error:
            failure = index_error(error)
            self._latch(failure)
            raise failure from error
        except StorageBroken as error:
            self._latch(error)
            raise
        except RuntimeError as error:
            raise SpoolError("the spool is closed") from error

    def _latch(self, error: SpoolError) -> None:
        """What waits is found by the index: where that is broken, mail must not go on being taken."""
        if isinstance(error, StorageBroken) and self._log is not None:
            self._log.latch(error)

    # Memory and index ------------------------------------------------------------------------------------------

    async def _keep(self) -> None:
        await asyncio.sleep(KEEP_SECONDS)
        await asyncio.to_thread(self.directory.prepare_spare, self._segment_octets)
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            self._waiting.tidy(len(self._hot))
            try:
                await self._flush(before=self._loop.time() - COOL_SECONDS)
                await self._compact()
            except SpoolError as error:
                logger.error("the spool's housekeeping failed, and goes on", extra={"fault": str(error)})
            except Exception:
                logger.exception("the spool's housekeeping failed, and goes on")

    async def _flush_all(self, *, is_clean: bool = False) -> None:
        """Bring the index up to date, for whoever asks it about all there is."""
        await self._flush(before=float("inf"), is_clean=is_clean)

    def _with_the_rest(self, found: Sequence[Entry], fits: Callable[[Entry], bool], most: int) -> list[Entry]:
        """What the index has found, with what is not in it as it is: what is busy cannot be written into it."""
        entries = {entry.id: entry for entry in found}
        for message_id, (_, _, entry) in self._unindexed.items():
            if entry is not None and fits(entry):
                entries[message_id] = entry
            else:
                entries.pop(message_id, None)
        return [entries[message_id] for message_id in sorted(entries)][:most]

    async def _flush(self, *, before: float, is_clean: bool = False) -> None:
        """Write what has changed since before a moment into the index, and forget what waits."""
        async with self._flushing:
            while True:
                chosen = self._to_be_indexed(before)
                if not chosen and not is_clean and self._position() == self._seen_position:
                    return
                await self._write(chosen, is_clean=is_clean)
                if len(chosen) < FLUSH_MOST:
                    return

    def _to_be_indexed(self, before: float) -> list[tuple[str, Entry | None]]:
        """The next that are to be written, those that have waited longest first."""
        chosen: list[tuple[str, Entry | None]] = []
        for message_id, (since, _, entry) in self._unindexed.items():
            if len(chosen) >= FLUSH_MOST or (since > before and len(self._hot) <= HOT_MOST):
                break
            if entry is None or not entry.is_busy:
                chosen.append((message_id, entry))
        return chosen

    def _position(self, without: Container[str] = ()) -> tuple[int, int]:
        """From where on the log has to be read at the next start.

        Args:
            without: messages that are in the index by then.
        """
        # They came in the order of the log, and keep their places.
        for message_id, (_, position, _) in self._unindexed.items():
            if message_id not in without:
                return position
        return self._the_log.told

    async def _write(self, chosen: Sequence[tuple[str, Entry | None]], *, is_clean: bool) -> None:
        rows = [row_of(entry) for _, entry in chosen if entry is not None]
        gone = [message_id for message_id, entry in chosen if entry is None]
        # What changes meanwhile is found again in the log, from where it was first changed on.
        position = self._position({message_id for message_id, _ in chosen})
        for _, entry in chosen:
            if entry is not None:
                entry.is_indexed = True  # from here on: one that ends while it is written has a row to be removed
        meta = {
            "segment": position[0],
            "at": position[1],
            "marker": self._the_log.markers.get(position[0], b"").hex(),
            "is_clean": int(is_clean),
            "seen_ms": self._now_ms(),
        }
        index = self._the_index
        await self._in_index(lambda: index.write(rows, gone, meta))
        self._seen_position = position
        for message_id, entry in chosen:
            known = self._unindexed.get(message_id)
            if known is None or known[2] is not entry:
                continue  # it has changed again
            del self._unindexed[message_id]
            if entry is not None and not entry.is_leased and not entry.is_busy:
                self._forget(entry)

    def _forget(self, entry: Entry) -> None:
        del self._hot[entry.id]
        self._drop_content(entry)
        for one in entry.deliveries:
            self._cold[one.destination] += 1

    # Deliveries ------------------------------------------------------------------------------------------------

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        """See `Store.claim`."""
        now_ms = self._now_ms()
        found: list[tuple[Entry, DeliveryEntry]] = []
        for destination, most in wanted.items():
            found += await self._choose(destination, most, now_ms)
        chosen: list[tuple[Entry, DeliveryEntry]] = []
        for entry, delivery in found:
            # While the next destination was looked at, an operator may have held it, or it may have left memory.
            if (known := self._hot.get(entry.id)) is entry and self._may_be_leased(entry, delivery, now_ms):
                chosen.append((entry, delivery))
            elif known is not None:
                self._waiting.offer(known)
        leases = await self._lease(chosen) if chosen else []
        contents = await self._small_contents([entry for entry, _ in leases])
        next_due = await self._next_due(list(wanted))
        due_in = None if next_due is None else max(0.0, (next_due - self._now_ms()) / 1000)
        return [(entry.lease_of(one), content) for (entry, one), content in zip(leases, contents, strict=True)], due_in

    async def _choose(self, destination: str, most: int, now_ms: int) -> list[tuple[Entry, DeliveryEntry]]:
        """What to attempt next: new and old in turns, and each sender in turn."""
        new = self._waiting.take(destination, most, now_ms, was_tried=False)
        old = self._waiting.take(destination, most, now_ms, was_tried=True)
        if self._cold[destination] > 0:
            index = self._the_index
            cold_new, cold_old = await self._in_index(
                lambda: (
                    index.due(destination, now_ms, SAMPLE * most, was_tried=False),
                    index.due(destination, now_ms, SAMPLE * most, was_tried=True),
                )
            )
            new = list(heapq.merge(new, (one for one in cold_new if one[1] not in self._hot)))
            old = list(heapq.merge(old, (one for one in cold_old if one[1] not in self._hot)))
        candidates = in_turn(new, old)
        chosen: list[tuple[Entry, DeliveryEntry]] = []
        cold = [one[1] for one in candidates[:most] if one[1] not in self._hot]
        if cold:
            index = self._the_index
            for entry in await self._in_index(lambda: index.load(cold)):
                if entry.id not in self._unindexed:
                    self._to_memory(entry)
        # What was in memory when it was looked there, and in the index when it was looked there, has been found twice.
        for message_id, number in dict.fromkeys((one[1], one[2]) for one in candidates):
            entry_now = self._hot.get(message_id)
            delivery = entry_now.delivery(number) if entry_now is not None else None
            if entry_now is None or delivery is None:
                continue
            if len(chosen) < most and self._may_be_leased(entry_now, delivery, now_ms):
                chosen.append((entry_now, delivery))
            elif delivery.state is DeliveryState.READY:
                self._waiting.offer_one(entry_now, delivery)
        return chosen

    def _may_be_leased(self, entry: Entry, delivery: DeliveryEntry, now_ms: int) -> bool:
        return (
            delivery.state is DeliveryState.READY
            and delivery.due_ms <= now_ms
            and entry.expires_ms > now_ms
            and not entry.is_busy
        )

    async def _lease(self, chosen: Sequence[tuple[Entry, DeliveryEntry]]) -> list[tuple[Entry, DeliveryEntry]]:
        """Note durably that these are attempted from now on."""
        changes: dict[str, tuple[Entry, Entry, list[DeliveryEntry]]] = {}
        for entry, delivery in chosen:
            if entry.id not in changes:
                entry.is_busy = True
                changes[entry.id] = (entry, entry.copy(), [])
            _, changed, leased = changes[entry.id]
            one = changed.delivery(delivery.number)
            assert one is not None
            one.lease()
            one.attempts += 1
            leased.append(one)
        told = [
            (changed.id, one.number, one.attempts, one.epoch)
            for _, changed, leased in changes.values()
            for one in leased
        ]

        def durable(step: Step) -> None:
            position = (step.segment, step.places[0][0])
            for entry, changed, _ in changes.values():
                changed.place = entry.place
                self._set_free(entry)
                self._note(changed, position)

        try:
            await self._append([(RecordKind.LEASE, dumps(told), ())], durable=durable)
        except SpoolError:
            for entry, _, _ in changes.values():
                self._set_free(entry)
                self._waiting.offer(entry)
            raise
        rows = [
            (changed.id, one.number)
            for entry, changed, leased in changes.values()
            for one in leased
            if entry.is_indexed
        ]
        if rows:
            index = self._the_index
            await self._in_index(lambda: index.note_leased(rows))
        return [(changed, one) for _, changed, leased in changes.values() for one in leased]

    async def _small_contents(self, entries: Sequence[Entry]) -> list[Sequence[bytes] | None]:
        """The contents that are at hand or can be read at once, by entry."""
        found = [self._contents.get(entry.id) for entry in entries]
        for entry in entries:
            self._drop_content(entry)
        if missing := [entry for entry, content in zip(entries, found, strict=True) if content is None]:
            read = iter(await asyncio.to_thread(self._read_small, missing))
            found = [next(read) if content is None else content for content in found]
        return found

    def _read_small(self, entries: Sequence[Entry]) -> list[Sequence[bytes] | None]:
        contents: list[Sequence[bytes] | None] = []
        for entry in entries:
            content = None
            if not entry.is_large:
                # Whoever needs one that cannot be read will see for themselves, and say so.
                with contextlib.suppress(SpoolError):
                    content = self._read(entry, 0, entry.octets)
            if content is None or entry.place is None or zlib.crc32(content) != entry.place.crc:
                contents.append(None)
            else:
                contents.append((content[: entry.header_octets], content[entry.header_octets :]))
        return contents

    async def _next_due(self, destinations: Sequence[str]) -> int | None:
        times: list[int] = []
        cold: list[str] = []
        for destination in destinations:
            if (due := self._waiting.next_due(destination)) is not None:
                times.append(due)
            if self._cold[destination] > 0:
                cold.append(destination)
        if cold:
            index = self._the_index
            found = await self._in_index(lambda: [index.next_due(destination) for destination in cold])
            times += [due for due in found if due is not None]
        return min(times, default=None)

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
        entry = self._hot.get(lease.message_id)
        loop = self._loop
        if entry is not None and entry.is_busy:
            return loop.create_task(
                self._finish_later(
                    lease, verdicts,
                    retry_in=retry_in, is_possible_duplicate=is_possible_duplicate, counts_attempt=counts_attempt,
                    hold=hold, notices=notices, is_urgent=is_urgent,
                )
            )  # fmt: skip
        try:
            if entry is None:
                raise stale(lease)
            changed = entry.copy()
            now_ms = self._now_ms()
            ended = changed.settle(
                lease, verdicts,
                now_ms=now_ms, due_ms=now_ms + round(retry_in * 1000), is_possible_duplicate=is_possible_duplicate,
                counts_attempt=counts_attempt, hold=hold,
            )  # fmt: skip
        except StaleLease as error:
            answer: asyncio.Future[None] = loop.create_future()
            answer.set_exception(error)
            return answer
        return self._change(entry, changed, ended, notices, is_urgent=is_urgent)

    async def _finish_later(self, lease: Lease, verdicts: Sequence[Verdict], **how: Any) -> None:
        await self._until_free(lease.message_id)
        await self.finish(lease, verdicts, **how)

    async def mark_corrupt(self, lease: Lease) -> None:
        """See `Store.mark_corrupt`."""
        await self._until_free(lease.message_id)
        if (entry := self._hot.get(lease.message_id)) is None:
            raise stale(lease)
        changed = entry.copy()
        changed.owned(lease).state = DeliveryState.CORRUPT
        await self._change(entry, changed, {})

    async def end_overdue(self, most: int) -> Sequence[Lease]:
        """See `Store.end_overdue`."""
        await self._flush_all()
        now_ms, index = self._now_ms(), self._the_index
        leases: list[Lease] = []
        for message_id in await self._in_index(lambda: index.overdue(now_ms, most)):
            try:
                entry = await self._get(message_id)
            except NoSuchMessage:
                continue
            changed = entry.copy()
            waiting = [one for one in changed.deliveries if one.state is DeliveryState.READY]
            if not waiting or changed.held_ms is not None or changed.expires_ms > now_ms:
                continue
            for one in waiting:
                one.lease()
            await self._change(entry, changed, {})
            leases += [changed.lease_of(one) for one in waiting]
        return leases

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        """See `Store.unwarned`."""
        await self._flush_all()
        before_ms, index = self._now_ms() - round(age * 1000), self._the_index
        entries = await self._in_index(lambda: index.load(index.unwarned(before_ms, most)))
        return [
            entry.lease_of(one)
            for entry in entries
            for one in entry.deliveries
            if one.state is DeliveryState.READY and one.attempts > 0
        ]

    async def warn(self, message_id: str, notices: Sequence[Notice]) -> bool:
        """See `Store.warn`."""
        try:
            entry = await self._get(message_id)
        except NoSuchMessage:
            return False
        if entry.is_warned:
            return False
        changed = entry.copy()
        changed.is_warned = True
        await self._change(entry, changed, {}, notices)
        return True

    async def destinations(self) -> Sequence[str]:
        """See `Store.destinations`."""
        hot = {one.destination for entry in self._hot.values() for one in entry.deliveries}
        return sorted(hot | {destination for destination, count in self._cold.items() if count > 0})

    # Contents --------------------------------------------------------------------------------------------------

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """See `Store.read`."""
        while True:
            entry = await self._holder(content)
            place = entry.place
            found = await asyncio.to_thread(self._read, entry, start, octets)
            if (await self._holder(content)).place == place:  # else it was moved meanwhile, and its place is another's
                return found

    async def is_intact(self, content: ContentRef) -> bool:
        """See `Store.is_intact`."""
        entry = await self._holder(content)
        return await asyncio.to_thread(self._is_intact, entry)

    async def _holder(self, content: ContentRef) -> Entry:
        """The message of a content, wherever it lies now."""
        return await self._looked_up(str(content.key))

    async def _looked_up(self, message_id: str) -> Entry:
        """A message as it is, for who only looks at it: it is not taken into memory.

        Raises:
            NoSuchMessage: there is none.
        """
        if (entry := self._hot.get(message_id)) is not None:
            return entry
        index = self._the_index
        found = await self._in_index(lambda: index.load([message_id])) if message_id not in self._unindexed else []
        if not found:
            raise NoSuchMessage(f"no message {message_id}")
        return self._hot.get(message_id, found[0])

    def _read(self, entry: Entry, start: int, octets: int) -> bytes:
        place = entry.place
        assert place is not None
        octets = max(0, min(octets, entry.octets - start))
        if entry.is_large:
            return self.directory.read(self.directory.large(entry.id), start, octets)
        return self.directory.read(self.directory.segment(place.segment), place.content_at + start, octets)

    def _is_intact(self, entry: Entry) -> bool:
        crc = 0
        try:
            for start in range(0, entry.octets, 1 << 18):
                crc = zlib.crc32(self._read(entry, start, 1 << 18), crc)
        except SpoolError as error:
            if isinstance(error, StorageBroken):
                raise
            return False
        assert entry.place is not None
        return crc == entry.place.crc

    # What operators see and do ---------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """See `Store.counts`; where there is very much, a few seconds old."""
        now = time.monotonic()
        if self._counted is None or self._messages < COUNT_CACHE_FROM or now - self._counted[0] > COUNT_CACHE_SECONDS:
            await self._flush_all()
            index, now_ms = self._the_index, self._now_ms()
            counted = await self._in_index(lambda: index.counts(now_ms))
            for _, _, entry in self._unindexed.values():
                if entry is not None and not entry.is_indexed:
                    _count(entry, counted, now_ms)
            self._counted = (now, counted)
        found = self._counted[1]
        return Counts(
            ready=found["ready"],
            deferred=found["deferred"],
            active=found.get("leased", 0),
            held=found.get("held", 0),
            corrupt=found.get("corrupt", 0),
            oldest_arrived_at=None if found["oldest"] is None else found["oldest"] / 1000,
            next_due_at=None if found["next_due"] is None else found["next_due"] / 1000,
            dead_octets=self.dead_octets,
        )

    async def tally(self) -> Mapping[str, int]:
        """See `Store.tally`."""
        # A copy first: the log's thread counts on.
        return {name: count for name, count in dict(self._the_log.tally).items() if count}

    async def page(self, after: str, most: int) -> Sequence[Shown]:
        """See `Store.page`."""
        await self._flush_all()
        index = self._the_index
        found = await self._in_index(lambda: index.page(after, most))
        return [entry.shown() for entry in self._with_the_rest(found, lambda entry: entry.id > after, most)]

    async def show(self, message_id: str) -> Shown:
        """See `Store.show`."""
        return (await self._looked_up(message_id)).shown()

    async def find(
        self, *, trace_id: str | None = None, sender: str | None = None, recipient: str | None = None, most: int
    ) -> Sequence[Shown]:
        """See `Store.find`."""
        await self._flush_all()
        index = self._the_index
        found = await self._in_index(lambda: index.find(trace_id, sender, recipient, most))
        found = self._with_the_rest(found, lambda entry: entry.fits(trace_id, sender, recipient), most)
        return [entry.shown() for entry in found]

    async def retry(self, message_id: str) -> bool:
        """See `Store.retry`."""
        return await self._operate(message_id, lambda entry: entry.retry(self._now_ms()))

    async def hold(self, message_id: str) -> bool:
        """See `Store.hold`."""
        return await self._operate(message_id, lambda entry: entry.hold(self._now_ms()))

    async def release(self, message_id: str) -> bool:
        """See `Store.release`."""
        return await self._operate(message_id, lambda entry: entry.release(self._now_ms()))

    async def expire(self, message_id: str) -> bool:
        """See `Store.expire`."""
        return await self._operate(message_id, lambda entry: entry.expire(self._now_ms()))

    async def reset(self, message_id: str, expires_in: float) -> bool:
        """See `Store.reset`."""

        def reset(entry: Entry) -> bool:
            now_ms = self._now_ms()
            return entry.reset(now_ms, now_ms + round(expires_in * 1000))

        return await self._operate(message_id, reset)

    async def _operate(self, message_id: str, change: Callable[[Entry], bool]) -> bool:
        entry = await self._get(message_id)
        changed = entry.copy()
        if not change(changed):
            return False
        await self._change(entry, changed, {})
        return True

    async def delete(self, message_id: str) -> int:
        """See `Store.delete`."""
        entry = await self._get(message_id)
        if entry.is_leased:
            raise SpoolError(f"{message_id} is being delivered; hold it, or try again")
        changed = entry.copy()
        _, recipients = entry.accepted
        changed.deliveries = []
        await self._change(entry, changed, {"removed" if entry.kind is Kind.MAIL else "notified_removed": recipients})
        return recipients

    # Housekeeping ----------------------------------------------------------------------------------------------

    async def housekeep(self) -> None:
        """See `Store.housekeep`: look at the clocks."""
        wall, monotonic = self._clock(), time.monotonic()
        jump = (wall - self._clocks[0]) - (monotonic - self._clocks[1])
        self._clocks = (wall, monotonic)
        if abs(jump) >= CLOCK_JUMP_SECONDS:
            moved = await self._move(round(jump * 1000))
            logger.warning("the clock jumped", extra={"seconds": round(jump), "attempts_moved": moved})

    async def _move(self, milliseconds: int) -> int:
        """Let what waits be due when it would have been had the clock not been set back; how many deliveries.

        One that was set ahead makes mail due sooner than it would be, which is no harm.
        """
        if milliseconds >= 0:
            return 0
        await self._flush_all()
        async with self._flushing:  # else the index could be said to be complete behind the record before it has moved
            await self._append([(RecordKind.CLOCK, dumps({"moved_ms": milliseconds, "ended": {}}), ())])
            for entry in self._hot.values():
                for one in entry.deliveries:
                    if one.state is DeliveryState.READY:
                        one.due_ms += milliseconds
                        self._waiting.offer_one(entry, one)
            index, position = self._the_index, self._position()
            meta = {"segment": position[0], "at": position[1], "marker": self._marker(position[0])}
            moved = await self._in_index(lambda: index.move(milliseconds, meta))
            self._seen_position = position
        return moved

    def _marker(self, segment: int) -> str:
        return self._the_log.markers.get(segment, b"").hex()

    def _segment_begun(self, number: int) -> None:
        """In the log's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._note_segment, number)

    def _note_segment(self, number: int) -> None:
        self._segments[number] = self._segment_octets
        self._loop.run_in_executor(None, self.directory.prepare_spare, self._segment_octets)

    @property
    def dead_octets(self) -> int:
        """Of segments: those that no message needs."""
        return sum(self._segments.values()) - sum(octets for _, octets in self._live.values())

    async def _compact(self) -> None:
        """Keep the log at most twice as large as what lives in it, and a little: move what lives in its oldest segment.

        In their order: a record that says that a message has ended must not go before the message's own.
        """
        while len(self._segments) > 1:
            oldest = min(self._segments)
            live = sum(octets for _, octets in self._live.values())
            total = sum(self._segments.values())
            if oldest == self._the_log.told[0]:
                return
            if oldest in self._live:
                if total <= 2 * live + DEAD_SEGMENTS * self._segment_octets:
                    return
                if not await self._move_out(oldest):
                    return
            await self._flush_all()
            if oldest in self._live or self._position()[0] <= oldest:
                return  # what is busy is for the next time
            del self._segments[oldest]
            await asyncio.to_thread(self.directory.retire, oldest)

    async def _move_out(self, segment: int) -> bool:
        """Move what lives in a segment to the end of the log; whether nothing lives in it any more."""
        index = self._the_index
        while segment in self._live:
            await self._flush_all()
            ids = set(await self._in_index(lambda: index.in_segment(segment, MOVE_MOST)))
            ids.update(
                [entry.id for entry in self._hot.values() if entry.place and entry.place.segment == segment][:MOVE_MOST]
            )
            if not ids:
                logger.error("messages are counted in a segment, and none is found", extra={"segment": segment})
                return False
            moved = await asyncio.gather(*[self._relocate(message_id, segment) for message_id in ids])
            if not any(moved):
                return False
        return True

    async def _relocate(self, message_id: str, segment: int) -> bool:
        try:
            entry = await self._get(message_id)
        except NoSuchMessage:
            return True
        if entry.place is None or entry.place.segment != segment:
            return True
        if entry.is_leased:  # whoever attempts it may be reading it
            return False
        entry.is_busy = True
        try:
            content: Sequence[bytes] = ()
            if not entry.is_large:
                content = (await asyncio.to_thread(self._read, entry, 0, entry.octets),)
                if zlib.crc32(content[0]) != entry.place.crc:
                    # As it is: who needs it finds out, and it stays damaged.
                    logger.critical("a queued content is damaged", extra={"spool_id": message_id})
            crc, before = entry.place.crc, entry.place

            def durable(step: Step) -> None:
                self._leave(before)
                entry.place = self._place(entry, step, 0, crc)
                self._note(entry, (step.segment, step.places[0][0]))

            await self._append([_message_part(entry, content, crc, is_new=False)], durable=durable)
        finally:
            self._set_free(entry)
        return True


def _message_part(entry: Entry, content: Sequence[bytes], crc: int | None, *, is_new: bool) -> Part:
    """The record of a message.

    Args:
        crc: of the content, where it is not what the record's own content has to be measured by: it has a file of its
            own, or is moved, and may have been damaged before.
    """
    return RecordKind.MESSAGE, f"[{int(is_new)},{'null' if crc is None else crc},{entry.encode()}]", content


def _count(entry: Entry, counted: dict[str, Any], now_ms: int) -> None:
    """Count a message in what the index has counted."""
    for one in entry.deliveries:
        is_later = one.state is DeliveryState.READY and one.due_ms > now_ms
        name = "deferred" if is_later else one.state.value
        counted[name] = counted.get(name, 0) + 1
        if is_later:
            counted["next_due"] = min(one.due_ms, counted["next_due"] or one.due_ms)
    counted["oldest"] = min(entry.arrived_ms, counted["oldest"] or entry.arrived_ms)


def _fail(answer: "asyncio.Future[Any]", error: BaseException) -> None:
    if not answer.done():
        answer.set_exception(error)
