"""The log: append-only segments, written by one thread, which makes all waiting steps durable at once.

Steps that arrive while the thread syncs form the next group. A message that is complete while others are still arriving
waits, a moment at most, until half of all are complete: each group costs as much as some messages, and while one half
is synced, the event loop receives the other half. So a lone message does not wait, and under load one sync serves many.
The order within a group keeps the promise of 250::

    records written and segment synced (in one system call where that can be relied on) > 250

A segment is a file of fixed size that has been written before, so that a sync writes only the data. A new one is
prepared while nothing waits, mostly from one whose messages have all ended; before the first record in it counts, its
head is synced, its name moved into place and the directory synced.

An error that makes the disk untrustworthy *latches*: nothing more is written until the gateway is restarted, since a
delivery whose result cannot be recorded would be repeated without end. A full disk is less severe: new mail is refused;
deliveries continue, since they make room, in a segment kept in reserve; and the last part of each segment is kept for
the results of deliveries under way. After a start on a full disk they continue where the log ended: otherwise each
start would use up a segment, and a full disk has none.
"""

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, Final, TypeVar

from otel_smtp.spool.embedded import records
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.entries import dumps
from otel_smtp.spool.embedded.files import open_regular, storage_error, sync_directory, write_all_at, write_durably
from otel_smtp.spool.embedded.records import FIRST, HEADER_OCTETS, RecordKind
from otel_smtp.spool.messages import SpoolError, StorageBroken, StoreVerb, Timings
from otel_smtp.spool.promises import Promise

logger: Final = logging.getLogger("otel_smtp.spool.embedded.log")

SEGMENT_OCTETS: Final = 8 * 1024 * 1024
RESULTS_SHARE: Final = 16  # without another segment, mail leaves one part in this many of the last one free
BEGIN_OCTETS: Final = 4096  # the most that its first record may have
GROUP_MOST: Final = 512  # most steps that share a sync: with more, the first would wait long for the last
GROUP_OCTETS: Final = 2 * 1024 * 1024
GATHER_SECONDS: Final = 0.005  # how long a delivery's result waits for an incoming message, to share its sync
COMPANY_SECONDS: Final = 0.001  # how long a message waits for others that are arriving

T = TypeVar("T")

Part = tuple[RecordKind, str, Sequence[bytes]]
"""A record to be written: kind, text, content."""


class Room(IntEnum):
    """The space that a step may use on a full disk: each member more than the one before."""

    MAIL = 0  # nothing that is reserved
    WORK = 1  # the segment in reserve: delivering makes room, and so does moving
    RESULT = 2  # the end of each segment too: begun work must be recorded


_MAIL: Final = Room.MAIL  # looked up in its class, a member costs as much as a call

_VERBS: Final = (
    (StoreVerb.SUBMIT, 1 << Room.MAIL), (StoreVerb.FINISH, 1 << Room.RESULT), (StoreVerb.OTHER, 1 << Room.WORK),
)  # fmt: skip


class Step(Promise[T]):
    """Records that become durable together or not at all, and the answer for the waiting task.

    Attributes:
        ended: by how many recipients the tally grows, by name.
        room: the space it may use.
        segment, places: of the records, once durable: offset, octets, offset and checksum of content.
    """

    __slots__ = ("ended", "octets", "parts", "places", "room", "segment")

    def __init__(self, parts: Sequence[Part], *, ended: Mapping[str, int], room: Room) -> None:
        # As `Promise` has it: one call less for every message and every result.
        self._callbacks = ()
        self._error = self._result = None
        self._is_done = False
        self.parts = parts
        self.ended = ended
        self.room = room
        octets = 0
        for _, text, content in parts:
            octets += HEADER_OCTETS + len(text) + sum(map(len, content))
        self.octets = octets
        self.segment = 0
        self.places: list[tuple[int, int, int, int]] = []

    @abstractmethod
    def is_durable(self) -> T:
        """Note the records, which are now durable; called on the event loop, in the order of the log.

        Returns:
            The answer.
        """

    def is_not_durable(self) -> None:
        """Note that nothing has changed; called on the event loop."""


Outcome = tuple[Sequence[Step[Any]], SpoolError | None]
"""Steps, in the order of the log, and why they are not durable; None: they are."""


class Log:
    """Appends records, in its own thread.

    Args:
        tally: recipients by their ends, up to here.
        next_number: of the segment that the first record will begin.
        previous_end: the end of the last record in the previous segment.
        markers: of the existing segments, by number.
        has_begun: called in the thread with the number of each new segment.
        timings: gets each group's timing.

    Attributes:
        markers, tally: as above, up to the last sync.
        told: up to where durability has been reported: segment and offset. Changes on the event loop.
        told_tally: the tally up to there.
        fault: why nothing more is written, or None.
    """

    def __init__(
        self,
        directory: SpoolDirectory,
        next_number: int,
        previous_end: int,
        *,
        markers: dict[int, bytes],
        tally: dict[str, int],
        now_ms: Callable[[], int],
        has_begun: Callable[[int], None],
        segment_octets: int = SEGMENT_OCTETS,
        timings: Timings | None = None,
    ) -> None:
        self._directory = directory
        self._number = next_number - 1
        self._at = previous_end
        self._file = -1
        self._is_reserve = False  # the segment takes no mail
        self._marker = b""
        self._segment_octets = segment_octets
        self._mail_octets = segment_octets - segment_octets // RESULTS_SHARE  # the rest is for results
        self._now_ms = now_ms
        self._has_begun = has_begun
        self._timings: Timings = timings if timings is not None else deque(maxlen=0)
        self.markers = markers
        self.tally = tally
        self.told = (self._number, self._at)
        self.told_tally: Mapping[str, int] = dict(tally)
        self._steps: deque[Step[Any]] = deque()
        # A token wakes the thread: an `Event` costs several times as much.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_asleep = False
        self._is_urgent = False  # an urgent step waits, which must be written without waiting for more
        self._will_wake = False  # at the end of this turn of the loop, or of the next
        self._is_stopping = False
        self._writes_in_one_call = directory.has_durable_writes
        self._nudge: asyncio.TimerHandle | None = None  # wakes the thread for steps that are not urgent
        self._complete = 0  # messages since the thread was last told to hurry
        self._expected = 0  # arriving messages, except those that were awaited in vain
        self._round = 0  # how often that was
        self._company: asyncio.TimerHandle | None = None  # until a message waits for them
        self._loop = asyncio.get_running_loop()
        self.fault: StorageBroken | None = None
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def append(self, step: Step[Any], *, is_urgent: bool = True) -> None:
        """Make a step durable. Call on the event loop.

        Raises:
            SpoolError: nothing more can be written, or the step is too large.
        """
        if self.fault is not None:
            raise self.fault
        if self._is_stopping:
            raise SpoolError("the spool is closed")
        if step.octets > self._mail_octets - FIRST - BEGIN_OCTETS:
            raise SpoolError(f"{step.octets} octets are more than the spool takes at once")
        self._steps.append(step)
        if is_urgent:
            self._complete += 1
            if self._complete >= self._expected or step.room is not _MAIL:
                self._hurry()
            elif self._company is None:
                self._company = self._loop.call_later(COMPANY_SECONDS, self._have_waited)
        elif self._nudge is None:
            self._nudge = self._loop.call_later(GATHER_SECONDS, self._have_gathered)

    def expect(self) -> int:
        """A message is arriving: complete ones wait for it, for a moment.

        Returns:
            The argument for `expect_no_more`.
        """
        self._expected += 1
        return self._round

    def expect_no_more(self, since: int) -> None:
        """A message has come, or will not. Call before its own step is appended."""
        if since != self._round:
            return  # it was awaited in vain, and is no longer expected
        self._expected -= 1
        if self._company is not None and self._complete >= self._expected:
            self._hurry()

    def _have_waited(self) -> None:
        """Some messages arrive too slowly for others to wait: do not wait for these again."""
        self._company = None
        if self._steps:
            self._round += 1
            self._expected = 0
            self._hurry()

    def _hurry(self) -> None:
        """Let the thread write all appended steps as soon as it can."""
        self._complete = 0
        if self._company is not None:
            self._company.cancel()
            self._company = None
        self._is_urgent = True  # after the step: taking the token includes taking the step
        if self._is_asleep and not self._will_wake:
            # Steps from this turn of the loop share the sync; if more messages are arriving, those from the next turn
            # too: waking the thread twice for messages that arrive together costs more than it gains.
            self._will_wake = True
            self._loop.call_soon(self._wake_in_next_turn if self._expected else self._wake_if_asleep)

    def _wake_in_next_turn(self) -> None:
        self._loop.call_soon(self._wake_if_asleep)

    def _wake_if_asleep(self) -> None:
        self._will_wake = False
        if self._is_asleep:
            self._wake()

    def _have_gathered(self) -> None:
        """Steps that are not urgent have waited long enough, unless they were written with others."""
        self._nudge = None
        if self._steps:
            self._wake()

    def _wake(self) -> None:
        if self._nudge is not None:
            self._nudge.cancel()
            self._nudge = None
        self._is_urgent = True
        self._is_asleep = False
        self._wakes.put(None)

    @property
    def is_idle(self) -> bool:
        """Whether all steps are written. Call on the event loop."""
        return self._is_asleep and not self._is_urgent and not self._steps

    async def close(self) -> None:
        """Write all steps, and stop. Idempotent."""
        self._is_stopping = True
        self._wake()
        await asyncio.to_thread(self._thread.join)

    # The thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not (self._is_stopping and not self._steps):
            self._is_asleep = True
            if not self._is_urgent:  # steps that come after this find it asleep
                self._wakes.get()
            self._is_asleep = False
            while self._is_urgent:
                self._is_urgent = False
                if self._steps:
                    self._serve()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _serve(self) -> None:
        began = time.monotonic()
        group: list[Step[Any]] = []
        octets = rooms = 0
        while self._steps and len(group) < GROUP_MOST and octets < GROUP_OCTETS:
            step = self._steps.popleft()
            octets += step.octets
            rooms |= 1 << step.room
            group.append(step)
        if self._steps:  # more than a group, or it has just come
            self._is_urgent = True
        outcomes: list[Outcome] = []
        try:
            self._write(group, outcomes)
        except Exception:
            # A bug of ours fails only its group: the thread goes on.
            logger.exception("spool failed: internal error")
            told = {id(step) for steps, _ in outcomes for step in steps}
            outcomes.append(([step for step in group if id(step) not in told], SpoolError("internal error")))
        seconds, items = time.monotonic() - began, len(group)
        for verb, bit in _VERBS:
            if rooms & bit:
                self._timings.append((verb, seconds, items))
                items = 0
        with contextlib.suppress(RuntimeError):  # the loop is closed: nothing waits any more
            # A copy, since this thread goes on counting.
            self._loop.call_soon_threadsafe(self._tell, outcomes, (self._number, self._at), dict(self.tally))

    def _tell(self, outcomes: Sequence[Outcome], told: tuple[int, int], tally: Mapping[str, int]) -> None:
        """On the event loop."""
        for steps, error in outcomes:
            for step in steps:
                try:
                    if error is None:
                        step.settle(step.is_durable())
                    else:
                        step.is_not_durable()
                        step.fail(error)
                except Exception:
                    logger.exception("spool failed: internal error")
                    if not step.done():  # a waiter without an answer would hang: delivering twice is better
                        step.fail(SpoolError("internal error"))
        self.told, self.told_tally = told, tally

    def _write(self, group: Sequence[Step[Any]], outcomes: list[Outcome]) -> None:
        """Make a group durable, and note the results in `outcomes`."""
        while group:
            if self.fault is not None:
                outcomes.append((group, self.fault))
                return
            if fitting := self._that_fit(group):
                group = group[len(fitting) :]
                self._put(fitting, outcomes)
                continue
            try:
                self._begin_segment(is_for_results=False)
            except OSError as error:
                fault = storage_error(error)
                # Mail waits for room; other steps go into the reserved space, as far as that lasts.
                refused = [step for step in group if step.room is Room.MAIL]
                group = [step for step in group if step.room is not Room.MAIL]
                if group and not self._that_fit(group) and not self._has_gone_on() and not self._has_begun_reserve():
                    refused += [step for step in group if step.room is Room.WORK]
                    group = [step for step in group if step.room is Room.RESULT]
                    if not self._that_fit(group):
                        refused, group = [*refused, *group], []
                if refused:
                    self.latch(fault)
                outcomes.append((refused, fault))

    def _has_gone_on(self) -> bool:
        """Continue in the segment that was the last one before this start, if it is writable.

        First cuts off a torn end behind its last record: shorter records would leave some of it behind them.
        """
        if self._file >= 0 or self.fault is not None or self._number not in self.markers:
            return False
        try:
            file = open_regular(self._directory.segment(self._number), os.O_RDWR)
        except OSError:
            return False
        try:
            rest = os.pread(file, self._segment_octets, self._at)
            is_whole = len(rest) == self._segment_octets - self._at  # the disk may have no room beyond its end
            if is_whole and (torn := rest.rstrip(b"\0")):
                write_all_at(file, bytes(len(torn)), self._at)
                os.fdatasync(file)
        except OSError:
            is_whole = False
        if not is_whole:
            os.close(file)
            return False
        self._file, self._marker, self._is_reserve = file, self.markers[self._number], True
        return True

    def _has_begun_reserve(self) -> bool:
        """Continue in the segment reserved for results, if there is one."""
        if self.fault is not None:
            return False
        try:
            self._begin_segment(is_for_results=True)
        except OSError as error:
            self.latch(storage_error(error))
            return False
        return True

    def _that_fit(self, group: Sequence[Step[Any]]) -> Sequence[Step[Any]]:
        """The first steps of a group that fit into the segment."""
        if self._file < 0:
            return ()
        at = self._at
        # In the order of `Room`.
        limits = (0 if self._is_reserve else self._mail_octets, self._mail_octets, self._segment_octets)
        for number, step in enumerate(group):
            at += step.octets
            if at > limits[step.room]:
                return group[:number]
        return group

    def _put(self, group: Sequence[Step[Any]], outcomes: list[Outcome]) -> None:
        start, marker = self._at, self._marker
        at = start
        pieces: list[bytes] = []
        for step in group:
            step.segment = self._number
            last = len(step.parts) - 1
            for place, (kind, text, content) in enumerate(step.parts):
                encoded = text.encode("ascii")
                packed, octets, crc = records.pack(
                    marker, kind, encoded, content, at=at, synced=start, has_more=place < last
                )
                pieces += packed
                step.places.append((at, octets, at + HEADER_OCTETS + len(encoded), crc))
                at += octets
        try:
            self._writes_in_one_call = write_durably(
                self._file, b"".join(pieces), start, in_one_call=self._writes_in_one_call
            )
        except OSError as error:
            fault = storage_error(error)
            self.latch(fault)
            self._take_back(start, at - start)
            outcomes.append((group, fault))
            return
        outcomes.append((group, None))
        self._at = at
        tally = self.tally
        for step in group:
            for name, recipients in step.ended.items():
                tally[name] = tally.get(name, 0) + recipients

    def _take_back(self, start: int, octets: int) -> None:
        """Remove a group that did not become durable, as far as the disk allows."""
        with contextlib.suppress(OSError):
            os.pwrite(self._file, bytes(octets), start)
            os.fdatasync(self._file)

    def _begin_segment(self, *, is_for_results: bool) -> None:
        """Continue in a new segment.

        Raises:
            OSError: there is none.
        """
        number, marker = self._number + 1, records.new_marker()
        while os.path.lexists(self._directory.segment(number)):  # not a segment of ours: see `SpoolDirectory.foreign`
            number += 1
        begin = dumps({"previous_end": self._at, "tally": self.tally, "now_ms": self._now_ms()})
        packed, octets, _ = records.pack(
            marker, RecordKind.BEGIN, begin.encode("ascii"), (), at=FIRST, synced=FIRST, has_more=False
        )
        spare, file, is_reserve = self._directory.take_spare(self._segment_octets, is_for_results=is_for_results)
        try:
            write_all_at(file, b"".join((records.head(number, marker), *packed)), 0)
            os.fdatasync(file)
            os.rename(spare, self._directory.segment(number))
            sync_directory(self._directory.log_path)
        except OSError:
            os.close(file)
            raise
        if self._file >= 0:
            os.close(self._file)
        self._file, self._number, self._marker, self._is_reserve = file, number, marker, is_reserve
        self._at = FIRST + octets
        self.markers[number] = marker
        self._has_begun(number)

    def latch(self, error: SpoolError) -> None:
        """Note an error; after one that says that the disk cannot be trusted, nothing is written any more."""
        if not isinstance(error, StorageBroken):
            logger.error("message not made durable", extra={"fault": str(error)})
        elif self.fault is None:
            self.fault = error
            logger.critical(
                "spool failed: intake and delivery stopped until a restart",
                extra={"fault": str(error)},
            )
