"""The messages that are in memory: those that are new, being attempted, or changed within the last moment.

All state changes on the event loop, when the record of the change is durable, and in the order of the log. So what is
seen is what would be found after a crash, and the first record that the index does not know is the first one noted.
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
CONTENTS_OCTETS: Final = 4 * 1024 * 1024  # of contents that are kept

# Looked up in its class, a member costs as much as a call; and so does the constructor of a named tuple.
_OUTCOME: Final = Kind.OUTCOME
_READY: Final = DeliveryState.READY
_place: Final = partial(tuple.__new__, Place)

Position = tuple[int, int]
"""A place in the log: segment, offset."""


class Memory:
    """What is in memory, and what is known of what is not.

    Attributes:
        hot: messages by id; each as its last durable record says.
        waiting: their deliveries that wait.
        unindexed: what is not in the index as it is, in the order of the log: since when, by the monotonic clock; from
            where on in the log; the message, or None: it has ended.
        cold: deliveries in the index alone, by destination.
        live: messages and octets of their records, by segment.
        messages: how many there are in all.
        large_octets: of the contents that lie in files of their own.
        lost: messages whose contents are nowhere.
        outcomes: deliveries of outcomes that wait or are being attempted, by destination.
        outcome_messages: how many messages are outcomes, held ones among them; `outcome_octets`.
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
        self._free: dict[str, asyncio.Event] = {}  # waited for, until the message of that id is not busy
        # Of messages that have just come and wait for an attempt: what is attempted at once need not be read again.
        self._contents: dict[str, Sequence[bytes]] = {}
        self._contents_octets = 0

    # What the log says -----------------------------------------------------------------------------------------

    def note(self, entry: Entry, position: Position) -> None:
        """A message is new, or has changed: its record is durable at `position`. Call in the order of the log.

        Args:
            entry: not the object that was noted before, where it has changed: that one may be on its way into the
                index.
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
        """Of all mail, with what the log says of it."""
        return self.large_octets + sum(octets for _, octets in self.live.values()) - self.outcome_octets

    def note_new(self, entry: Entry, step: Step[Any], part: int, crc: int | None) -> None:
        """A message has come: the record is a step's part of that number."""
        entry.place = self.place(entry, step, part, crc)
        self.messages += 1
        if entry.is_large:
            self.large_octets += entry.octets
        if entry.kind is _OUTCOME:
            self._count_outcome(entry, 1)
        position = (step.segment, step.places[part][0])
        if entry.id in self.unindexed:  # one of that id has ended a moment ago
            self.note(entry, position)
            return
        self.hot[entry.id] = entry
        self.unindexed[entry.id] = (time.monotonic(), position, entry)
        for one in entry.deliveries:
            if one.state is _READY:  # else, as most, it is being attempted
                self.waiting.offer(entry)
                break

    def note_end(self, entry: Entry, position: Position) -> None:
        """A message has ended: the record that says so is durable at `position`. Call in the order of the log."""
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
        """A message lies elsewhere from now on: the record is all of a step. Call in the order of the log.

        Args:
            crc: of its content.
            is_lost: it has none any more.
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
        """Where a message lies from now on: in a step's part of that number.

        Args:
            crc: of its content, where the record's own does not cover it.
        """
        at, octets, content_at, written_crc = step.places[part]
        segment = step.segment
        if (found := self.live.get(segment)) is None:
            found = self.live[segment] = [0, 0]
        found[0] += 1
        found[1] += octets
        return _place((segment, at, octets, -1 if entry.is_large else content_at, written_crc if crc is None else crc))

    def leave(self, place: Place) -> None:
        """No message lies there any more."""
        if (found := self.live.get(place.segment)) is not None:
            found[0] -= 1
            found[1] -= place.octets
            if not found[0]:
                del self.live[place.segment]

    # Busy messages ---------------------------------------------------------------------------------------------

    def set_free(self, entry: Entry) -> None:
        """No change of it is on its way any more."""
        entry.is_busy = False
        if (waited := self._free.pop(entry.id, None)) is not None:
            waited.set()

    async def until_free(self, message_id: str) -> None:
        """Wait until no change of a message is on its way."""
        while (entry := self.hot.get(message_id)) is not None and entry.is_busy:
            await self._free.setdefault(message_id, asyncio.Event()).wait()

    # To and from the index -------------------------------------------------------------------------------------

    def admit(self, entry: Entry) -> Entry:
        """Take in a message that was read from the index; what is here already is newer."""
        if (known := self.hot.get(entry.id)) is not None:
            return known
        self.hot[entry.id] = entry
        for one in entry.deliveries:
            self.cold[one.destination] -= 1
        self.waiting.offer(entry)
        return entry

    def forget(self, entry: Entry) -> None:
        """Leave to the index a message that it knows as it is."""
        del self.hot[entry.id]
        self._drop_content(entry)
        for one in entry.deliveries:
            self.cold[one.destination] += 1

    def to_be_indexed(self, before: float, most: int) -> list[tuple[str, Entry | None]]:
        """The next that are to be written, those that have waited longest first.

        Args:
            before: those that have waited since before that moment, unless there is too much in memory.
        """
        chosen: list[tuple[str, Entry | None]] = []
        for message_id, (since, _, entry) in self.unindexed.items():
            if len(chosen) >= most or (since > before and len(self.hot) <= HOT_MOST):
                break
            if entry is None or not entry.is_busy:
                chosen.append((message_id, entry))
        return chosen

    def first_unindexed(self, without: Container[str] = ()) -> Position | None:
        """The first record in the log that the index does not know; None: it knows all that were noted.

        Args:
            without: messages that are in the index by then.
        """
        # They came in the order of the log, and keep their places.
        for message_id, (_, position, _) in self.unindexed.items():
            if message_id not in without:
                return position
        return None

    def overlay(self, found: Sequence[Entry], fits: Callable[[Entry], bool], most: int) -> list[Entry]:
        """What the index has found, with what is not in it as it is: what is busy cannot be written into it.

        Args:
            found: at most `most`, in the order of their ids.
        """
        entries = {entry.id: entry for entry in found}
        # Where it has found as many as were wanted, there may be more behind them, which come first.
        last = found[-1].id if len(found) == most else None
        for message_id, (_, _, entry) in self.unindexed.items():
            if entry is not None and fits(entry) and (last is None or message_id <= last):
                entries[message_id] = entry
            else:
                entries.pop(message_id, None)
        return [entries[message_id] for message_id in sorted(entries)][:most]

    # Contents --------------------------------------------------------------------------------------------------

    def keep_content(self, entry: Entry, content: Sequence[bytes]) -> None:
        """Keep the content of a message that has just come, if it is to be attempted at once and there is room."""
        if self._contents_octets + entry.octets > CONTENTS_OCTETS:
            return
        for one in entry.deliveries:
            if one.state is _READY and one.due_ms <= entry.arrived_ms:
                self._contents[entry.id] = content
                self._contents_octets += entry.octets
                return

    def take_content(self, entry: Entry) -> Sequence[bytes] | None:
        """The content, if it is here; it is not kept any longer."""
        content = self._contents.get(entry.id)
        self._drop_content(entry)
        return content

    def _drop_content(self, entry: Entry) -> None:
        if self._contents.pop(entry.id, None) is not None:
            self._contents_octets -= entry.octets
