"""What is done before a spool is used: the index is brought up to what the log says, or made again out of it.

The log is the truth. Of its last segment, what was torn before anybody was answered is cut off. Damage before that is
kept in lost+found/, and the rest goes on. No message is dropped because the index does not know it.
"""

import contextlib
import itertools
import json
import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from otel_smtp.spool.embedded import records
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.entries import Entry, Place
from otel_smtp.spool.embedded.index import Index, NoIndex, row_of
from otel_smtp.spool.embedded.records import FIRST, Damage, NewerFormat, Record, RecordKind
from otel_smtp.spool.messages import DeliveryState, SpoolError

logger: Final = logging.getLogger("otel_smtp.spool.embedded.recovery")

_HELD_MOST: Final = 5000  # messages in memory while the log is read
_CLOCK_JUMP_MS: Final = 60_000


@dataclass
class Recovered:
    """A spool, ready to be used.

    Attributes:
        markers: of the segments that are there, by number.
        clock_jump_ms: by how much the clock was set back since the spool was used last; else 0.
        tally: recipients by what became of them.
        lost: messages whose content is gone or damaged.
        remarks: what operators should know, in words.
    """

    index: Index
    markers: dict[int, bytes]
    next_number: int
    previous_end: int
    tally: dict[str, int]
    clock_jump_ms: int = 0
    lost: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def recover(directory: SpoolDirectory, now_ms: int) -> Recovered:
    """Make index and log agree.

    Raises:
        SpoolError: it cannot be used; nothing was changed.
    """
    return _Recovery(directory, now_ms).run()


class _Recovery:
    def __init__(self, directory: SpoolDirectory, now_ms: int) -> None:
        self._directory = directory
        self._now_ms = now_ms
        self._remarks: list[str] = [f"{path} is not ours, and is left alone" for path in directory.foreign()]
        self._markers: dict[int, bytes] = {}
        self._ends: dict[int, int] = {}
        self._tally: dict[str, int] = {}
        self._touched: dict[str, Entry | None] = {}
        self._corrupt: list[str] = []
        self._is_damaged = False

    def run(self) -> Recovered:
        numbers = self._readable_segments()
        index, start = self._index(numbers)
        try:
            self._index_in_use = index
            seen_ms = int(index.meta().get("seen_ms", 0))
            with index.filling() if index.is_new and numbers else contextlib.nullcontext():
                for number in numbers:
                    if number >= start[0] or number == numbers[-1]:
                        self._replay(number, numbers, start)
                self._write()
            for number in numbers:
                self._ends.setdefault(number, 0)
            last = numbers[-1] if numbers else max(0, int(index.meta().get("segment", 0)))
            self._write_meta(last)
            lost = self._without_content(set(numbers))
        except BaseException:
            index.close()
            raise
        jump_ms = self._now_ms - seen_ms
        return Recovered(
            index,
            self._markers,
            last + 1,
            self._ends.get(last, 0),
            self._tally,
            jump_ms if jump_ms < -_CLOCK_JUMP_MS else 0,
            [*lost, *self._corrupt],
            self._remarks,
        )

    # Segments --------------------------------------------------------------------------------------------------

    def _readable_segments(self) -> list[int]:
        found: list[int] = []
        for number in self._directory.segments():
            path = self._directory.segment(number)
            head = self._directory.read(path, 0, FIRST + 8) if path.stat().st_size >= FIRST + 8 else b""
            try:
                told = records.read_head(head)
            except NewerFormat as error:
                raise SpoolError(f"{self._directory.path} was made by a newer version: {error}") from None
            if told is not None and told[0] == number:
                self._markers[number] = told[1]
                found.append(number)
            elif told is None and head and any(records.scan(self._directory.read_segment(number), head[FIRST:])):
                # Each record begins with the marker that the head is to tell.
                self._remark(f"the head of segment {number} is damaged; its records are read all the same")
                self._markers[number] = head[FIRST:]
                found.append(number)
            elif told is None:
                self._remark(f"segment {number} cannot be read, and is moved to lost+found/")
                self._is_damaged = True
                self._directory.move_aside(path)
            else:
                path.unlink()  # its file was about to become another one, in which nothing was answered yet
        for before, after in itertools.pairwise(found):
            if after != before + 1:
                self._remark(f"segments between {before} and {after} are missing")
                self._is_damaged = True
        return found

    def _remark(self, words: str) -> None:
        self._remarks.append(words)

    # The index -------------------------------------------------------------------------------------------------

    def _index(self, numbers: Sequence[int]) -> tuple[Index, tuple[int, int]]:
        """The index, and from where on the log is to be read."""
        path = self._directory.index_path
        beginning = (numbers[0] if numbers else 0, FIRST)
        try:
            index = Index(path)
            try:
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
                return index, start
            except BaseException:
                index.close()
                raise
        except (NoIndex, sqlite3.DatabaseError) as error:
            self._remark(f"the index cannot be used and is made again out of the log: {error}")
        for name in ("index.db", "index.db-wal", "index.db-shm", "index.db-journal"):
            (self._directory.path / name).unlink(missing_ok=True)
        return Index(path), beginning

    # The log ---------------------------------------------------------------------------------------------------

    def _replay(self, number: int, numbers: Sequence[int], start: tuple[int, int]) -> None:
        data = self._directory.read_segment(number)
        found = list(records.scan(data, self._markers[number]))
        is_last = number == numbers[-1]
        end = self._known_end(numbers[numbers.index(number) + 1]) if not is_last else None
        found = self._cut(number, data, found, end)
        step: list[Record] = []  # records that count together: a step that is torn has not happened
        for one in found:
            if isinstance(one, Damage):
                self._set_aside(number, data, one)
                step.clear()
                continue
            step.append(one)
            if one.has_more:
                continue
            for record in step:
                if is_last:
                    self._count(record)
                if (number, record.at) >= start:
                    self._apply(number, record)
            step.clear()
            if len(self._touched) >= _HELD_MOST:
                self._write()

    def _known_end(self, following: int) -> int | None:
        """Where the last record of a segment ends, as the one behind it says."""
        path = self._directory.segment(following)
        data = self._directory.read(path, 0, min(path.stat().st_size, 1 << 20))
        first = next(records.scan(data, self._markers[following]), None)
        if isinstance(first, Record) and first.kind == RecordKind.BEGIN:
            return int(json.loads(first.text)["previous_end"])
        return None

    def _cut(
        self, number: int, data: bytes, found: list[Record | Damage], known_end: int | None
    ) -> list[Record | Damage]:
        """What counts of a segment: without what was torn before anybody was answered."""
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
        self._is_damaged = True
        self._remark(
            f"{damage.end - damage.at} octets of segment {number} are damaged at {damage.at}, and kept in lost+found/"
        )
        self._directory.set_aside(f"damaged-{number}-{damage.at}", data[damage.at : damage.end])

    def _count(self, record: Record) -> None:
        """Note what a record of the last segment says of the tally."""
        said = json.loads(record.text)
        if record.kind == RecordKind.BEGIN:
            self._tally = dict(said["tally"])
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

    def _apply(self, number: int, record: Record) -> None:
        match record.kind:
            case RecordKind.MESSAGE:
                _, crc, values = json.loads(record.text)  # of a content that is elsewhere, or was when it was whole
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
                self._touched[entry.id] = entry
            case RecordKind.STATE:
                entry = Entry.from_values(json.loads(record.text)[1])
                before = self._known(entry.id)
                if before is not None:
                    entry.place = before.place
                    self._touched[entry.id] = entry
            case RecordKind.LEASE:
                for message_id, delivery_number, attempts, epoch in json.loads(record.text):
                    leased = self._known(message_id)
                    delivery = leased.delivery(delivery_number) if leased is not None else None
                    if delivery is not None:
                        delivery.state, delivery.attempts, delivery.epoch = DeliveryState.LEASED, attempts, epoch
            case RecordKind.END:
                self._touched[json.loads(record.text)["id"]] = None
            case RecordKind.CLOCK:
                # Twice moved where the index was written in between: then it is due sooner, and nothing is lost.
                if moved := json.loads(record.text)["moved_ms"]:
                    self._write()
                    self._index_in_use.move(moved, {})

    def _mark_corrupt(self, entry: Entry) -> None:
        self._corrupt.append(entry.id)
        self._remark(f"the content of {entry.id} is damaged")
        for one in entry.deliveries:
            one.state = DeliveryState.CORRUPT

    def _known(self, message_id: str) -> Entry | None:
        if message_id not in self._touched:
            found = self._index_in_use.load([message_id])
            self._touched[message_id] = found[0] if found else None
        return self._touched[message_id]

    def _write(self) -> None:
        rows = [row_of(entry) for entry in self._touched.values() if entry is not None]
        gone = [message_id for message_id, entry in self._touched.items() if entry is None]
        if rows or gone:
            self._index_in_use.write(rows, gone, {})
        self._touched.clear()

    def _write_meta(self, last: int) -> None:
        meta = {
            "segment": last,
            "at": self._ends.get(last, 0),
            "marker": self._markers[last].hex() if last in self._markers else "",
            "is_clean": 0,
            "seen_ms": self._now_ms,
        }
        self._index_in_use.write((), (), meta)

    # Contents --------------------------------------------------------------------------------------------------

    def _without_content(self, numbers: set[int]) -> list[str]:
        """Set messages aside whose content is not there, and clear away contents without a message."""
        index, directory = self._index_in_use, self._directory
        needed, there = set(index.larges()), directory.larges()
        lost = self._lose(index.load(sorted(needed - there)))
        for segment in index.segments():
            if segment and segment not in numbers:
                while ids := index.in_segment(segment, _HELD_MOST):
                    lost += self._lose(index.load(ids))
        for stray in there - needed:
            # Its message was never answered 250, unless what said so is damaged.
            if self._is_damaged:
                directory.move_aside(directory.large(stray))
            else:
                directory.remove_large(stray)
        return lost

    def _lose(self, entries: Sequence[Entry]) -> list[str]:
        for entry in entries:
            assert entry.place is not None
            entry.place = Place(0, 0, 0, -1, 0)
            entry.is_large = True
            for one in entry.deliveries:
                one.state = DeliveryState.CORRUPT
        if entries:
            self._index_in_use.write([row_of(entry) for entry in entries], (), {})
        return [entry.id for entry in entries]
