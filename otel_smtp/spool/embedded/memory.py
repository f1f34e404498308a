"""The messages in memory: new ones, those being attempted, and recently changed ones.

All state changes on the event loop, once the record of the change is durable, and in the order of the log. So memory
shows exactly what a restart after a crash would find, and the first record that the index lacks is the first one noted.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import Any, Final

from otel_smtp.spool.embedded.entries import Entry, Place
from otel_smtp.spool.embedded.log import Step
from otel_smtp.spool.embedded.waiting import Waiting
from otel_smtp.spool.messages import DeliveryState, Kind

HOT_MOST: Final = 20_000
CONTENTS_OCTETS: Final = 4 * 1024 * 1024  # octets of kept contents

# Looking a member up in its class costs as much as a call; so does a NamedTuple's constructor.
_OUTCOME: Final = Kind.OUTCOME
_READY: Final = DeliveryState.READY
_place: Final = partial(tuple.__new__, Place)

Position = tuple[int, int]
"""A place in the log: segment, offset."""


class Memory:
    """The messages in memory, and the numbers of all others.

    Attributes:
        hot: messages by id, each as in its last durable record.
        waiting: their waiting deliveries.
        unindexed: messages newer than in the index, in the order of the log: since when, by the monotonic clock; from
            where in the log; the message, or None if it has ended.
        cold: deliveries only in the index, by destination.
        live: messages and octets of their records, by segment.
        messages: the number of all messages.
        large_octets: of the contents with their own files.
        lost: messages whose contents are missing.
        outcomes: deliveries of outcomes that wait or are being attempted, by destination.
        outcome_messages: how many messages are outcomes, including held ones; `outcome_octets`.
    """

    def __init__(self) -> None:
        self.hot: dict[str, Entry] = {}
        self.waiting = Waiting(self.hot.get)
        self.unindexed: dict[str, tuple[float, Position, Entry | None]] = {}
        self.cold: Counter[str] = Counter()
        self.live: dict[int, list[int]] = {}
        self.messages = 0
        self.large_octets = 0
        self.lost: set[str] = set()
        self.outcomes: Counter[str] = Counter()
        self.outcome_messages = 0
        self.outcome_octets = 0
        self._free: dict[str, asyncio.Event] = {}  # awaited until the message with this id is not busy
        # Contents of new messages that wait for an attempt, which then need not be read.
        self._contents: dict[str, Sequence[bytes]] = {}
        self._contents_octets = 0

    # Notes from the log -----------------------------------------------------------------------------------------

    def note(self, entry: Entry, position: Position) -> None:
        """A message is new or has changed: its record is durable at `position`. Call in the order of the log.

        Args:
            entry: for a change, a new object: the one noted before may be on its way into the index.
        """
        if entry.kind is _OUTCOME and (changed := self.hot.get(entry.id)) is not None:
            self._count_waiting(changed, -1)
            self._count_waiting(entry, 1)
        self.hot[entry.id] = entry
        before = self.unindexed.get(entry.id)
        if before is None:
            self.unindexed[entry.id] = (time.monotonic(), position, entry)
        else:
            self.unindexed[entry.id] = (before[0], before[1], entry)
        self.waiting.offer(entry)

    @property
    def octets(self) -> int:
        """The octets of all mail, with its records in the log."""
        return self.large_octets + sum(octets for _, octets in self.live.values()) - self.outcome_octets

    def note_new(self, entry: Entry, step: Step[Any], part: int, crc: int | None) -> None:
        """A message is new: its record is this part of a step."""
        entry.place = self.place(entry, step, part, crc)
        self.messages += 1
        if entry.is_large:
            self.large_octets += entry.octets
        if entry.kind is _OUTCOME:
            self._count_outcome(entry, 1)
        position = (step.segment, step.places[part][0])
        if entry.id in self.unindexed:  # one with this id ended a moment ago
            self.note(entry, position)
            return
        self.hot[entry.id] = entry
        self.unindexed[entry.id] = (time.monotonic(), position, entry)
        for one in entry.deliveries:
            if one.state is _READY:  # otherwise, like most, it is being attempted
                self.waiting.offer(entry)
                break

    def note_end(self, entry: Entry, position: Position) -> None:
        """A message has ended: the record of its end is durable at `position`. Call in the order of the log."""
        self.hot.pop(entry.id, None)
        if self._contents:
            self._drop_content(entry)
        self.messages -= 1
        if entry.is_large or self.lost:
            self._leave_large(entry)
        assert entry.place is not None
        if entry.kind is _OUTCOME:
            self._count_outcome(entry, -1)
        self.leave(entry.place)
        if entry.is_indexed:
            before = self.unindexed.get(entry.id)
            since, first = (before[0], before[1]) if before is not None else (time.monotonic(), position)
            self.unindexed[entry.id] = (since, first, None)
        else:
            self.unindexed.pop(entry.id, None)

    def note_moved(self, entry: Entry, moved: Entry, step: Step[Any], crc: int, *, is_lost: bool) -> None:
        """A message has moved to the only record of a step. Call in the order of the log.

        Args:
            crc: of its content.
            is_lost: its content is lost.
        """
        assert entry.place is not None
        self._leave_large(entry)
        self.leave(entry.place)
        moved.place = self.place(moved, step, 0, crc)
        if moved.is_outcome:
            self.outcome_octets += moved.place.octets - entry.place.octets
        if is_lost:
            self.lost.add(moved.id)
        elif moved.is_large:
            self.large_octets += moved.octets
        self.note(moved, (step.segment, step.places[0][0]))

    def _leave_large(self, entry: Entry) -> None:
        if entry.id in self.lost:
            self.lost.discard(entry.id)
        elif entry.is_large:
            self.large_octets -= entry.octets

    def _count_outcome(self, entry: Entry, by: int) -> None:
        assert entry.place is not None
        self.outcome_messages += by
        self.outcome_octets += by * entry.place.octets
        self._count_waiting(entry, by)

    def _count_waiting(self, outcome: Entry, by: int) -> None:
        for one in outcome.deliveries:
            if one.is_pending:
                self.outcomes[one.destination] += by

    def place(self, entry: Entry, step: Step[Any], part: int, crc: int | None) -> Place:
        """Set a message's place: this part of a step.

        Args:
            crc: of its content, if the record's own does not cover it.
        """
        at, octets, content_at, written_crc = step.places[part]
        segment = step.segment
        if (found := self.live.get(segment)) is None:
            found = self.live[segment] = [0, 0]
        found[0] += 1
        found[1] += octets
        return _place((segment, at, octets, -1 if entry.is_large else content_at, written_crc if crc is None else crc))

    def leave(self, place: Place) -> None:
        """A place is no longer in use."""
        if (found := self.live.get(place.segment)) is not None:
            found[0] -= 1
            found[1] -= place.octets
            if not found[0]:
                del self.live[place.segment]

    # Busy messages ---------------------------------------------------------------------------------------------

    def set_free(self, entry: Entry) -> None:
        """No change of the message is under way any more."""
        entry.is_busy = False
        if (waited := self._free.pop(entry.id, None)) is not None:
            waited.set()

    async def until_free(self, message_id: str) -> None:
        """Wait until no change of a message is under way."""
        while (entry := self.hot.get(message_id)) is not None and entry.is_busy:
            await self._free.setdefault(message_id, asyncio.Event()).wait()

    # To and from the index -------------------------------------------------------------------------------------

    def admit(self, entry: Entry) -> Entry:
        """Take in a message read from the index; one that is already here is newer."""
        if (known := self.hot.get(entry.id)) is not None:
            return known
        self.hot[entry.id] = entry
        for one in entry.deliveries:
            self.cold[one.destination] -= 1
        self.waiting.offer(entry)
        return entry

    def forget(self, entry: Entry) -> None:
        """Drop a message that the index has in its current state."""
        del self.hot[entry.id]
        self._drop_content(entry)
        for one in entry.deliveries:
            self.cold[one.destination] += 1

    def to_be_indexed(self, before: float, most: int) -> list[tuple[str, Entry | None]]:
        """The next messages to write to the index, those that have waited longest first.

        Args:
            before: only those waiting since before this moment, unless memory holds too many.
        """
        chosen: list[tuple[str, Entry | None]] = []
        for message_id, (since, _, entry) in self.unindexed.items():
            if len(chosen) >= most or (since > before and len(self.hot) <= HOT_MOST):
                break
            if entry is None or not entry.is_busy:
                chosen.append((message_id, entry))
        return chosen

    def first_unindexed(self, without: Container[str] = ()) -> Position | None:
        """The first record in the log that the index lacks; None: it has all that were noted.

        Args:
            without: messages that will be in the index by then.
        """
        # They came in the order of the log, and keep their places.
        for message_id, (_, position, _) in self.unindexed.items():
            if message_id not in without:
                return position
        return None

    def overlay(self, found: Sequence[Entry], fits: Callable[[Entry], bool], most: int) -> list[Entry]:
        """Merge results from the index with newer messages in memory: busy ones cannot be written to the index.

        Args:
            found: at most `most`, in order of ids.
        """
        entries = {entry.id: entry for entry in found}
        # If it found as many as wanted, there may be more behind them, which precede these.
        last = found[-1].id if len(found) == most else None
        for message_id, (_, _, entry) in self.unindexed.items():
            if entry is not None and fits(entry) and (last is None or message_id <= last):
                entries[message_id] = entry
            else:
                entries.pop(message_id, None)
        return [entries[message_id] for message_id in sorted(entries)][:most]

    # Contents --------------------------------------------------------------------------------------------------

    def keep_content(self, entry: Entry, content: Sequence[bytes]) -> None:
        """Keep the content of a new message, if it will be attempted at once and there is room."""
        if self._contents_octets + entry.octets > CONTENTS_OCTETS:
            return
        for one in entry.deliveries:
            if one.state is _READY and one.due_ms <= entry.arrived_ms:
                self._contents[entry.id] = content
                self._contents_octets += entry.octets
                return

    def take_content(self, entry: Entry) -> Sequence[bytes] | None:
        """Take the content, if it is here; it is kept no longer."""
        content = self._contents.get(entry.id)
        self._drop_content(entry)
        return content

    def _drop_content(self, entry: Entry) -> None:
        if self._contents.pop(entry.id, None) is not None:
            self._contents_octets -= entry.octets
