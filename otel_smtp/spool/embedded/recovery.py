"""Recovery before a spool is used: the index is brought up to date with the log, or rebuilt from it.

The log is the truth. In its last segment, a tail torn before any answer is cut off. Damaged parts before that are kept
in lost+found/, and the rest is used. No message is dropped because the index lacks it.
"""

import contextlib
import itertools
import json
import logging
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from otel_smtp.spool.embedded import records
from otel_smtp.spool.embedded.aside import hold_again
from otel_smtp.spool.embedded.clocks import Clocks
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.entries import Entry, Place
from otel_smtp.spool.embedded.former_index import FormerIndex
from otel_smtp.spool.embedded.index import Index, NoIndex, index_error, row_of
from otel_smtp.spool.embedded.indexing import clock_meta, tally_meta
from otel_smtp.spool.embedded.records import FIRST, Damage, NewerFormat, Record, RecordKind
from otel_smtp.spool.messages import (
    ContentLost,
    DeliveryState,
    End,
    Kind,
    SpoolError,
    StorageFull,
    accepted_name,
    end_name,
)
from otel_smtp.spool.store import NotFound

logger: Final = logging.getLogger("otel_smtp.spool.embedded.recovery")

_parse: Final = json.JSONDecoder().decode
_HELD_MOST: Final = 5000  # messages in memory while the log is read


@dataclass
class Recovered:
    """A spool, ready for use.

    Attributes:
        markers: of the segments that are there, by number.
        clock_jump_ms: how far the clock was set since the spool was last used; 0: it was not.
        tally: recipients by what became of them.
        lost: messages whose content is gone or damaged; newly_lost: those not yet recorded as such in the log.
        remarks: what operators should know, in words.
        alarms: what was set aside and may be mail, in words.
        not_found: messages in an old or damaged index that are not in the log.
    """

    index: Index
    markers: dict[int, bytes]
    next_number: int
    previous_end: int
    tally: dict[str, int]
    clock_jump_ms: int = 0
    lost: list[str] = field(default_factory=list)
    newly_lost: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)
    not_found: list[NotFound] = field(default_factory=list)


def recover(directory: SpoolDirectory, clocks: Clocks, *, is_index_trusted: bool) -> Recovered:
    """Make index and log agree. If the disk has no room for the index, it is made in memory, and the one in the file
    stays unchanged: deliveries make room, so they must continue.

    Args:
        is_index_trusted: False: it is made again.

    Raises:
        SpoolError: it cannot be used; nothing was changed.
    """
    first = _Recovery(directory, clocks, is_index_trusted=is_index_trusted)
    try:
        return first.run()
    except (StorageFull, sqlite3.OperationalError) as error:
        if not isinstance(error, StorageFull) and not isinstance(index_error(error), StorageFull):
            raise
        logger.warning("no room for the index of the spool: made in memory", extra={"fault": str(error)})
    recovered = _Recovery(directory, clocks, is_index_trusted=False, is_in_memory=True).run()
    # Files that were moved or set aside are found only once.
    recovered.remarks[:0] = [one for one in first.remarks if one not in recovered.remarks]
    recovered.alarms[:0] = [one for one in first.alarms if one not in recovered.alarms]
    return recovered


class _Recovery:
    def __init__(
        self, directory: SpoolDirectory, clocks: Clocks, *, is_index_trusted: bool, is_in_memory: bool = False
    ) -> None:
        self._is_index_trusted = is_index_trusted
        self._is_in_memory = is_in_memory
        self._directory = directory
        self._clocks = clocks
        self._clock_place = (0, 0)  # of the last clock record that the index covers
        self._recorded: set[str] = set()  # messages last recorded before that one
        self.remarks: list[str] = [f"{path} is not ours, and is left alone" for path in directory.foreign()]
        self._markers: dict[int, bytes] = {}
        self._ends: dict[int, int] = {}
        self._tally: dict[str, int] = {}
        self._tally_place = (0, FIRST)  # the tally is counted from here on
        self._has_lost_records = False  # behind that place
        self._touched: dict[str, Entry | None] = {}
        self._corrupt: list[str] = []
        self._newly_lost: list[str] = []
        self.alarms: list[str] = []
        self._larges = directory.larges()
        self._ended: set[str] = set()  # of those that have a file of their own
        self._texts: dict[str, str | None] = {}  # of those still in the state of their own record
        self._is_complete = True  # all acknowledged records are known
        self._former: FormerIndex | None = None
        self._unfound: set[str] = set()  # messages that it has, and that have not ended in the log as read so far
        self._not_found: list[NotFound] = []
        self._why_not = "it was being replaced"  # the index that was set aside

    def run(self) -> Recovered:
        numbers = self._readable_segments()
        index, start = self._index(numbers)
        try:
            if index.is_new:
                self._open_former()
            self._index_in_use = index
            self._seen = meta = index.meta()
            self._clock_place = (meta.get("clock_segment", 0), meta.get("clock_at", 0))
            self._begin_tally(numbers, {} if index.is_new else meta)
            with index.filling() if index.is_new and numbers else contextlib.nullcontext():
                for number in numbers:
                    if number >= min(start[0], self._tally_place[0], numbers[-1]):
                        self._replay(number, numbers, start)
                self._write()
                if self._has_lost_records:
                    self._raise_tally()
                if self._unfound:
                    self._ask_former(set(numbers))
            for number in numbers:
                self._ends.setdefault(number, 0)
            last = numbers[-1] if numbers else max(0, int(index.meta().get("segment", 0)))
            self._write_meta(last)
            lost = self._without_content(set(numbers))
        except BaseException:
            index.close()
            raise
        finally:
            if self._former is not None:
                self._former.close()
        if not self._is_in_memory:  # otherwise it is asked again once there is room
            self._directory.keep_former_index(is_needed=bool(self._not_found))
        jump_ms = self._clocks.jump_since_ms(self._seen)
        if jump_ms:
            seconds = f"{jump_ms / 1000:+.0f} s"
            self._remark(
                f"the clock was set by {seconds}, as far as is known, since the spool was used; no mail is older"
            )
        return Recovered(
            index,
            self._markers,
            last + 1,
            self._ends.get(last, 0),
            self._tally,
            jump_ms,
            [*lost, *self._corrupt],
            self._newly_lost,
            self.remarks,
            self.alarms,
            self._not_found,
        )

    # Segments --------------------------------------------------------------------------------------------------

    def _readable_segments(self) -> list[int]:
        found: list[int] = []
        for number in self._directory.segments():
            path = self._directory.segment(number)
            head = b""
            with contextlib.suppress(ContentLost):  # shorter, or unreadable
                head = self._directory.read(path, 0, FIRST + 8)
            try:
                told = records.read_head(head)
            except NewerFormat as error:
                raise SpoolError(f"{self._directory.path} was made by a newer version: {error}") from None
            if told is not None and told[0] == number:
                self._markers[number] = told[1]
                found.append(number)
            elif told is None and head and any(records.scan(self._directory.read_segment(number), head[FIRST:])):
                # Each record begins with the marker that the head should have.
                self._remark(f"the head of segment {number} is damaged; its records are read all the same")
                self._markers[number] = head[FIRST:]
                found.append(number)
            else:
                what = "cannot be read" if told is None else f"says that it is {told[0]}"
                self._alarm(f"segment {number} {what}, and is moved to lost+found/")
                self._directory.move_aside(path, f"segment-{number}")
        foreign = self._directory.foreign_segments()
        for before, after in itertools.pairwise(found):
            if after != before + 1 + sum(before < number < after for number in foreign):
                self._alarm(f"segments between {before} and {after} are missing")
        return found

    def _alarm(self, words: str) -> None:
        self.alarms.append(words)
        self._is_complete = False

    def _remark(self, words: str) -> None:
        self.remarks.append(words)

    # The index -------------------------------------------------------------------------------------------------

    def _index(self, numbers: Sequence[int]) -> tuple[Index, tuple[int, int]]:
        """Open or make the index; returns it, and from where to read the log."""
        path = self._directory.index_path
        beginning = (numbers[0] if numbers else 0, FIRST)
        self._is_complete &= path.exists()  # only the index knows what the log has lost
        if self._is_in_memory:
            self._is_complete = False
            return Index(None), beginning
        try:
            index = Index(path)
            try:
                if not self._is_index_trusted and not index.is_new:
                    raise NoIndex("as was asked for")
                if index.is_new:
                    if numbers:
                        self._remark("there is no index; it is made again out of the log")
                    return index, beginning
                meta = index.meta()
                index.check(thoroughly=not meta.get("is_clean"))
                start = int(meta["segment"]), int(meta["at"])
                if start[0] == 0 and numbers and numbers[0] == 1:  # of the time before the first record
                    return index, beginning
                if numbers and (start[0] not in numbers or meta["marker"] != self._markers[start[0]].hex()):
                    raise NoIndex("it does not belong to this log")
                if start[0] and not numbers:
                    self._alarm("the log is gone; what the index does not know is gone with it")
                return index, start
            except BaseException:
                index.close()
                raise
        except (NoIndex, sqlite3.DatabaseError) as error:
            if isinstance(error, sqlite3.DatabaseError) and isinstance(index_error(error), StorageFull):
                raise
            self._remark(f"the index cannot be used and is made again out of the log: {error}")
            self._why_not = str(error)
        self._is_complete = False
        self._directory.set_index_aside()
        return Index(path), beginning

    # Messages of an unusable index ---------------------------------------------------------------------

    def _open_former(self) -> None:
        """Open an index that was set aside, until the log is read: it may know mail that the log lacks."""
        path = self._directory.former_index
        if not path.exists():
            return
        try:
            self._former = FormerIndex(path, self._markers)
        except sqlite3.Error as error:
            self._cannot_read_former(error)
        else:
            self._unfound = set(self._former.ids)

    def _cannot_read_former(self, error: Exception) -> None:
        self._remark(f"the index that was set aside cannot be read: which messages it knew is unknown: {error}")

    def _ask_former(self, numbers: set[int]) -> None:
        """Find messages that only the unusable index has."""
        former, index = self._former, self._index_in_use
        assert former is not None
        unfound = sorted(self._unfound - index.known(self._unfound))
        if not unfound:
            return
        try:
            if former.is_current:
                self._keep_unfound(former.load(unfound), numbers)
            else:
                reason = f"the index that knew of it cannot be used ({self._why_not}): it may have ended since"
                self._not_found += former.tell(unfound, reason)
                self._alarm(
                    f"{len(unfound)} messages that the index knew are not in the log, and may have ended since: "
                    "it is kept in lost+found/unreadable/"
                )
        except (sqlite3.Error, ValueError) as error:
            self._cannot_read_former(error)

    def _keep_unfound(self, entries: Sequence[Entry], numbers: set[int]) -> None:
        """Queue messages whose records are lost: they have not ended, or the log would have their ends."""
        for entry in entries:
            assert entry.place is not None
            if entry.is_large and entry.place.segment not in numbers:
                entry.place = entry.place._replace(segment=0, at=0, octets=0)
            if self._has_content(entry, numbers):
                hold_again(entry, self._clocks.now_ms())
                self._remark(f"the record of {entry.id} is lost, and its content is not: it is held")
            elif entry.place.segment in numbers:
                self._mark_corrupt(entry)
        self._index_in_use.write([row_of(entry) for entry in entries], (), {})

    def _has_content(self, entry: Entry, numbers: set[int]) -> bool:
        place = entry.place
        assert place is not None
        if entry.is_large:
            return entry.id in self._larges
        if place.segment not in numbers:
            return False
        with contextlib.suppress(SpoolError):
            content = self._directory.read(self._directory.segment(place.segment), place.content_at, entry.octets)
            return zlib.crc32(content) == place.crc
        return False

    # The tally -------------------------------------------------------------------------------------------------

    def _begin_tally(self, numbers: Sequence[int], meta: Mapping[str, Any]) -> None:
        """Start from the tally in the index, which damage to earlier records cannot change; or else with the last
        segment, whose first record has the tally up to there.

        Args:
            meta: the index's; empty if the index is new.
        """
        segment = int(meta.get("tally_segment", 0))
        is_of_this_log = segment not in self._markers or self._markers[segment].hex() == meta.get("tally_marker")
        if "tally" in meta and is_of_this_log:
            self._tally = dict(json.loads(meta["tally"]))
            self._tally_place = (segment, int(meta["tally_at"]))
        elif numbers:
            first = next((one for one in reversed(numbers) if self._beginning(one) is not None), numbers[0])
            self._tally_place = (first, FIRST)

    def _beginning(self, number: int) -> dict[str, Any] | None:
        """What the first record of a segment says about earlier segments; None: it is damaged."""
        path = self._directory.segment(number)
        data = self._directory.read(path, 0, min(path.stat().st_size, 1 << 20))
        first = next(records.scan(data, self._markers[number]), None)
        if isinstance(first, Record) and first.kind == RecordKind.BEGIN:
            return dict(json.loads(first.text))
        return None

    def _count(self, record: Record) -> None:
        """Apply a record to the tally."""
        said = json.loads(record.text)
        if record.kind == RecordKind.BEGIN:
            self._tally = dict(said["tally"])
            self._has_lost_records = False
            return
        ended: dict[str, int] = {}
        if record.kind == RecordKind.MESSAGE:
            if said[0]:
                name, recipients = Entry.from_values(said[2]).accepted
                ended = {name: recipients}
        elif record.kind == RecordKind.STATE:
            ended = said[0]
        elif record.kind in (RecordKind.END, RecordKind.CLOCK):
            ended = said["ended"]
        for name, recipients in ended.items():
            self._tally[name] = self._tally.get(name, 0) + recipients

    def _raise_tally(self) -> None:
        """Count messages as accepted that are queued or ended, even if their own records are lost."""
        come: dict[str, int] = {}
        for kind, recipients in self._index_in_use.recipients().items():
            come[accepted_name(kind)] = come.get(accepted_name(kind), 0) + recipients
        for kind in (Kind.MAIL, Kind.BOUNCE, Kind.OUTCOME):  # all notices are counted as one kind
            name = accepted_name(kind)
            ended = sum(self._tally.get(end_name(kind, end), 0) for end in End)
            if (least := ended + come.get(name, 0)) > self._tally.get(name, 0):
                self._tally[name] = least

    # The log ---------------------------------------------------------------------------------------------------

    def _replay(self, number: int, numbers: Sequence[int], start: tuple[int, int]) -> None:
        data = self._directory.read_segment(number)
        found = list(records.scan(data, self._markers[number]))
        end = self._known_end(numbers[numbers.index(number) + 1]) if number != numbers[-1] else None
        found = self._cut(number, data, found, end)
        step: list[Record] = []  # records of one step: a torn step has not happened
        for one in found:
            if isinstance(one, Damage):
                self._set_aside(number, data, one)
                self._has_lost_records |= (number, one.at) >= self._tally_place
                step.clear()
                continue
            step.append(one)
            if one.has_more:
                continue
            for record in step:
                if (number, record.at) >= self._tally_place:
                    self._count(record)
                if (number, record.at) >= start:
                    self._apply(number, record)
            step.clear()
            if len(self._touched) >= _HELD_MOST:
                self._write()

    def _known_end(self, following: int) -> int | None:
        """The end of a segment's last record, according to the next segment."""
        said = self._beginning(following)
        return None if said is None else int(said["previous_end"])

    def _cut(
        self, number: int, data: bytes, found: list[Record | Damage], known_end: int | None
    ) -> list[Record | Damage]:
        """The valid part of a segment, without a tail torn before any answer."""
        all_records = [one for one in found if isinstance(one, Record)]
        synced = max((one.synced for one in all_records), default=FIRST)
        kept: list[Record | Damage] = []
        at, is_torn = FIRST, False
        for one in found:
            if known_end is not None and one.at >= known_end:
                break
            if known_end is None and one.at >= synced and (isinstance(one, Damage) or not one.is_intact):
                is_torn = True
                break
            kept.append(one)
            at = one.end
        if known_end is None and (is_torn or data[at : at + 8] == self._markers[number]):
            rest = data[at:].rstrip(b"\0")
            self._remark(
                f"segment {number} ends with a torn record; {len(rest)} octets that nobody was answered for are cut off"
            )
            self._directory.set_aside(f"torn-{number}-{at}", rest[: 4 * 1024 * 1024])
        if known_end is not None and at < known_end:
            kept.append(Damage(at, known_end))
            at = known_end
        self._ends[number] = at
        return kept

    def _set_aside(self, number: int, data: bytes, damage: Damage) -> None:
        self._alarm(
            f"{damage.end - damage.at} octets of segment {number} are damaged at {damage.at}, and kept in lost+found/"
        )
        self._directory.set_aside(f"damaged-{number}-{damage.at}", data[damage.at : damage.end])

    def _apply(self, number: int, record: Record) -> None:
        match record.kind:
            case RecordKind.MESSAGE:
                text = record.text.decode("ascii")
                _, crc, values = _parse(text)  # of content that is elsewhere, or was when it was whole
                entry = Entry.from_values(values)
                entry.place = Place(
                    number,
                    record.at,
                    record.end - record.at,
                    -1 if entry.is_large else record.content_at,
                    record.content_crc if crc is None else crc,
                )
                if not record.is_intact:
                    self._mark_corrupt(entry)
                self._texts[entry.id] = text[text.index("[", 1) : -1] if record.is_intact else None
                self._note(number, record, entry)
            case RecordKind.STATE:
                entry = Entry.from_values(_parse(record.text.decode("ascii"))[1])
                before = self._known(entry.id)
                if before is not None:
                    entry.place = before.place
                    self._note(number, record, entry)
            case RecordKind.LEASE:
                for message_id, delivery_number, attempts, epoch in json.loads(record.text):
                    leased = self._known(message_id)
                    delivery = leased.delivery(delivery_number) if leased is not None else None
                    if delivery is not None:
                        delivery.state, delivery.attempts, delivery.epoch = DeliveryState.LEASED, attempts, epoch
            case RecordKind.END:
                ended = json.loads(record.text)["id"]
                self._touched[ended] = None
                self._unfound.discard(ended)
                if ended in self._larges:
                    self._ended.add(ended)
            case RecordKind.CLOCK:
                said = json.loads(record.text)
                due_ms, instants_ms = said["moved_ms"], said.get("aged_ms", 0)
                if not (due_ms or instants_ms):
                    return
                if (number, record.at) > self._clock_place:
                    self._write()
                    self._clock_place = (number, record.at)
                    meta = clock_meta(self._clock_place)
                    if "seen_ms" in self._seen:  # the moment that it records was before
                        meta["seen_ms"] = self._seen["seen_ms"] = int(self._seen["seen_ms"]) + instants_ms
                    self._index_in_use.move(due_ms, instants_ms, meta)
                    return
                # The index has moved its messages; earlier records have not.
                for message_id in self._recorded:
                    if (recorded := self._known(message_id)) is not None:
                        recorded.move(due_ms, instants_ms)

    def _note(self, number: int, record: Record, entry: Entry) -> None:
        self._touched[entry.id] = entry
        if (number, record.at) < self._clock_place:
            self._recorded.add(entry.id)

    def _mark_corrupt(self, entry: Entry) -> None:
        self._corrupt.append(entry.id)
        self._remark(f"the content of {entry.id} is damaged")
        for one in entry.deliveries:
            one.state = DeliveryState.CORRUPT
        if entry.held_ms is None:
            entry.held_ms = self._clocks.now_ms()

    def _known(self, message_id: str) -> Entry | None:
        """A message as read so far, to be changed by the following records."""
        self._texts.pop(message_id, None)
        if message_id not in self._touched:
            found = self._index_in_use.load([message_id])
            self._touched[message_id] = found[0] if found else None
        return self._touched[message_id]

    def _write(self) -> None:
        texts = self._texts
        rows = [row_of(entry, texts.get(entry.id)) for entry in self._touched.values() if entry is not None]
        gone = [message_id for message_id, entry in self._touched.items() if entry is None]
        if rows or gone:
            self._index_in_use.write(rows, gone, {})
        self._touched.clear()
        texts.clear()

    def _write_meta(self, last: int) -> None:
        place = (last, self._ends.get(last, 0))
        meta = {
            "segment": last,
            "at": place[1],
            "marker": self._markers[last].hex() if last in self._markers else "",
            "is_clean": 0,
            **tally_meta(self._tally, place, self._markers),
        }
        if "seen_ms" not in self._seen:  # otherwise later jumps are still to be noted
            meta |= self._clocks.seen()
        self._index_in_use.write((), (), meta)

    # Contents --------------------------------------------------------------------------------------------------

    def _without_content(self, numbers: set[int]) -> list[str]:
        """Mark messages without content as corrupt, and remove contents without a message."""
        index, directory = self._index_in_use, self._directory
        needed, there = set(index.larges()), self._larges
        lost = self._lose(index.load(sorted(needed - there)), numbers)
        for segment in index.segments():
            if segment and segment not in numbers:
                while ids := index.in_segment(segment, _HELD_MOST):
                    lost += self._lose(index.load(ids), numbers)
        strays = there - needed
        # No client was answered 250 for it, or its message has ended, as far as log and index are intact.
        over = strays if self._is_complete else strays & self._ended
        for stray in over:
            directory.remove_large(stray)
        for stray in strays - over:
            directory.move_aside(directory.large(stray))
        if strays - over:
            self._alarm(f"{len(strays - over)} contents whose messages nobody knows are moved to lost+found/")
        return lost

    def _lose(self, entries: Sequence[Entry], numbers: set[int]) -> list[str]:
        for entry in entries:
            assert entry.place is not None
            if entry.place.segment not in numbers:
                # A message whose file is there, or is restored, is as whole as that file: it may be released.
                entry.place = Place(0, 0, 0, -1, entry.place.crc)
            if entry.held_ms is None or not all(one.state is DeliveryState.CORRUPT for one in entry.deliveries):
                self._newly_lost.append(entry.id)
            entry.lose_content(self._clocks.now_ms())
        if entries:
            self._index_in_use.write([row_of(entry) for entry in entries], (), {})
        return [entry.id for entry in entries]
