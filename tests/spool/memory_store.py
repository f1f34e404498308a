"""A store in memory: the interface in few lines, for the runner's tests, and the model that other stores are held to.

Each verb is done at once; nothing waits, nothing is durable. What it keeps is kept for the next store of the same
place, so that it can be closed and opened like any other.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from otel_smtp.spool.embedded.deliveries import DeliveryEntry
from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.messages import (
    Backlog,
    ContentLost,
    ContentRef,
    Counts,
    DeliveryState,
    End,
    Kind,
    Lease,
    MessageView,
    NewMessage,
    NoSuchMessage,
    SpoolError,
    Timings,
    Verdict,
    end_name,
    is_for_receiver,
    stale,
)
from otel_smtp.spool.store import Draft, Notice, Rebuilt, Recovery, Woken

T = TypeVar("T")


class MemoryDraft:
    """A content in memory."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    @property
    def header_octets(self) -> int:
        return len(self.chunks[0]) if self.chunks else 0

    @property
    def in_memory(self) -> Sequence[bytes] | None:
        return self.chunks

    @property
    def is_8bit(self) -> bool:
        return not b"".join(self.chunks).isascii()

    def write(self, chunk: bytes, resume: Callable[[], None]) -> bool:
        self.chunks.append(chunk)
        return True

    def hold(self, header: bytes, body: bytes) -> bool:
        self.chunks = [header, body] if body else [header]
        return True

    def discard(self) -> None:
        self.chunks = []


@dataclass
class Memory:
    """What a store keeps."""

    entries: dict[str, Entry] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    tally: Counter[str] = field(default_factory=Counter)


class MemoryStore:
    """See `Store`; `memory` is what the store before has left."""

    look_again_seconds: float | None = None
    ledger = None

    def __init__(self, memory: Memory | None = None, clock: Callable[[], float] = time.time) -> None:
        self.memory = memory or Memory()
        self._clock = clock
        self._clocks = (clock(), time.monotonic())
        self._is_open = False
        self.timings: Timings = deque(maxlen=1)  # nothing here takes time

    def _now(self) -> int:
        return round(self._clock() * 1000)

    @property
    def _sorted(self) -> list[Entry]:
        return [self.memory.entries[one] for one in sorted(self.memory.entries)]

    async def open(self) -> Recovery:
        self._is_open = True
        return Recovery(messages=sum(not entry.is_outcome for entry in self._sorted))

    async def close(self) -> None:
        if self._is_open:
            self._is_open = False
            for entry in self._sorted:
                entry.take_back(crashes_allowed=None, now_ms=self._now())

    def standing(self) -> None:
        """See `Store.standing`: one process owns it."""

    async def company(self) -> None:
        pass

    async def tell_deed(self, deed: str) -> None:
        """See `Store.tell_deed`: nobody shares it."""

    async def take_deeds(self) -> Sequence[str]:
        return ()

    def watch(self, woken: Woken) -> None:
        pass

    def holds(self, lease: Lease) -> bool:
        return True

    def refusal(self) -> SpoolError | None:
        return None

    def alarm(self) -> str | None:
        return None

    async def rebuild(self) -> Rebuilt:
        return Rebuilt()

    def draft(self) -> Draft:
        return MemoryDraft()

    def submit(self, message: NewMessage, draft: Draft, *, lease: bool) -> asyncio.Future[Sequence[Lease]]:
        content = b"".join(draft.in_memory or ())
        return self._answer(lambda: self._add(message, content, is_leased=lease))

    def _add(self, message: NewMessage, content: bytes, *, is_leased: bool) -> Sequence[Lease]:
        entry = Entry.of(message, self._now(), len(content), is_leased=is_leased, is_large=False)
        self.memory.entries[entry.id] = entry
        self.memory.contents[entry.id] = content
        name, recipients = entry.accepted
        self.memory.tally[name] += recipients
        return [entry.lease_of(one) for one in entry.deliveries if one.state is DeliveryState.LEASED]

    def _answer(self, work: Callable[[], T]) -> asyncio.Future[T]:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        try:
            if not self._is_open:
                raise SpoolError("the store is closed")
            answer.set_result(work())
        except SpoolError as error:
            answer.set_exception(error)
        return answer

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        now = self._now()
        claimed: list[tuple[Lease, Sequence[bytes] | None]] = []
        times: list[int] = []
        for destination, most in wanted.items():
            new, old = (self._due(destination, now, was_tried=tried) for tried in (False, True))
            turns = [
                pair for number in range(max(len(new), len(old))) for pair in (*new[number:][:1], *old[number:][:1])
            ]
            for entry, one in turns[:most]:
                one.lease()
                one.attempts += 1
                content, header_octets = self.memory.contents.get(entry.id), entry.header_octets
                chunks = None if content is None else (content[:header_octets], content[header_octets:])
                claimed.append((entry.lease_of(one), chunks))
            times += [one.due_ms for entry, one in self._waiting(destination) if not _is_overdue(entry, now)]
        return claimed, max(0, min(times) - now) / 1000 if times else None

    def _waiting(self, destination: str) -> list[tuple[Entry, DeliveryEntry]]:
        return [
            (entry, one)
            for entry in self._sorted
            for one in entry.deliveries
            if one.destination == destination and one.state is DeliveryState.READY
        ]

    def _due(self, destination: str, now: int, *, was_tried: bool) -> list[tuple[Entry, DeliveryEntry]]:
        due = [
            (entry, one)
            for entry, one in self._waiting(destination)
            if one.due_ms <= now and not _is_overdue(entry, now) and (one.attempts > 0) is was_tried
        ]
        due.sort(key=lambda pair: (pair[1].due_ms, pair[0].id))
        turns: Counter[str] = Counter()
        ordered: list[tuple[int, tuple[Entry, DeliveryEntry]]] = []
        for pair in due:
            turns[pair[0].mail.reverse_path] += 1
            ordered.append((turns[pair[0].mail.reverse_path], pair))
        ordered.sort(key=lambda one: one[0])
        return [pair for _, pair in ordered]

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
        def finish() -> None:
            entry = self._leased(lease)
            now = self._now()
            ended = entry.settle(
                lease, verdicts,
                now_ms=now, due_ms=now + round(retry_in * 1000), is_possible_duplicate=is_possible_duplicate,
                counts_attempt=counts_attempt, hold=hold,
            )  # fmt: skip
            self.memory.tally.update(ended)
            self._drop_if_over(entry)
            for message, content in notices:
                self._add(message, content, is_leased=False)

        return self._answer(finish)

    def _leased(self, lease: Lease) -> Entry:
        entry = self.memory.entries.get(lease.message_id)
        if entry is None:
            raise stale(lease)
        entry.owned(lease)
        return entry

    def _drop_if_over(self, entry: Entry) -> None:
        if not entry.deliveries:
            del self.memory.entries[entry.id]
            self.memory.contents.pop(entry.id, None)

    async def mark_corrupt(self, lease: Lease) -> None:
        self._leased(lease).mark_corrupt(lease, self._now())

    async def end_overdue(self, most: int, *, outcomes: bool = False) -> Sequence[Lease]:
        leases: list[Lease] = []
        for entry in self._sorted:
            if entry.is_outcome is not outcomes or not _is_overdue(entry, self._now()) or len(leases) >= most:
                continue
            for one in entry.deliveries:
                if one.state in (DeliveryState.READY, DeliveryState.HELD):
                    one.lease()
                    leases.append(entry.lease_of(one))
        return leases

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        before = self._now() - round(age * 1000)
        return [
            entry.lease_of(one)
            for entry in self._sorted
            if not entry.is_warned and entry.arrived_ms <= before and entry.kind is Kind.MAIL
            for one in entry.deliveries
            if one.state is DeliveryState.READY and one.attempts > 0
        ][:most]

    async def warn(self, message_id: str, notices: Sequence[Notice]) -> bool:
        entry = self.memory.entries.get(message_id)
        if entry is None or entry.is_warned:
            return False
        entry.is_warned = True
        for message, content in notices:
            self._add(message, content, is_leased=False)
        return True

    async def destinations(self, *, outcomes: bool = False, known: Collection[str] = ()) -> Sequence[str]:
        found = {one.destination for entry in self._sorted for one in entry.deliveries}
        return sorted(one for one in found.difference(known) if is_for_receiver(one) is outcomes)

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        found = self.memory.contents.get(str(content.key))
        if found is None:
            raise ContentLost("a content is gone")
        return found[start : start + octets]

    async def is_intact(self, content: ContentRef) -> bool:
        return str(content.key) in self.memory.contents

    async def backlog(self, destinations: Sequence[str]) -> Mapping[str, Backlog]:
        found: dict[str, Backlog] = {}
        for destination in destinations:
            arrived = [
                entry.arrived_ms / 1000
                for entry in self._sorted
                for one in entry.deliveries
                if one.destination == destination and one.is_pending
            ]
            found[destination] = Backlog(len(arrived), min(arrived, default=None))
        return found

    async def counts(self) -> Counts:
        now = self._now()
        mail = [entry for entry in self._sorted if not entry.is_outcome]
        states = Counter(one.state for entry in mail for one in entry.deliveries)
        due = [one.due_ms for entry in mail for one in entry.deliveries if one.state is DeliveryState.READY]
        later = [at for at in due if at > now]
        return Counts(
            ready=len(due) - len(later),
            deferred=len(later),
            active=states[DeliveryState.LEASED],
            held=states[DeliveryState.HELD],
            corrupt=states[DeliveryState.CORRUPT],
            oldest_arrived_at=mail[0].arrived_ms / 1000 if mail else None,
            next_due_at=min(later) / 1000 if later else None,
        )

    async def tally(self) -> Mapping[str, int]:
        return {name: count for name, count in self.memory.tally.items() if count}

    async def page(self, after: str, most: int, *, outcomes: bool = False) -> Sequence[MessageView]:
        return [entry.shown() for entry in self._sorted if entry.id > after and entry.is_outcome is outcomes][:most]

    async def find(
        self, *, trace_id: str | None = None, sender: str | None = None, recipient: str | None = None, most: int
    ) -> Sequence[MessageView]:
        return [
            shown
            for shown in await self.page("", len(self.memory.entries))
            if (trace_id is None or shown.carrier.get("traceparent", "").split("-")[1:2] == [trace_id])
            and (sender is None or shown.reverse_path == sender)
            and (recipient is None or recipient in [address for address, _, _ in shown.recipients])
        ][:most]

    def _entry(self, message_id: str) -> Entry:
        if message_id not in self.memory.entries:
            raise NoSuchMessage(f"no message {message_id}")
        return self.memory.entries[message_id]

    async def show(self, message_id: str) -> MessageView:
        return self._entry(message_id).shown()

    async def retry(self, message_id: str) -> bool:
        return self._entry(message_id).retry(self._now())

    async def hold(self, message_id: str) -> bool:
        return self._entry(message_id).hold(self._now())

    async def release(self, message_id: str) -> bool:
        return self._entry(message_id).release(self._now())

    async def expire(self, message_id: str) -> bool:
        return self._entry(message_id).expire(self._now())

    async def reset(self, message_id: str, expires_in: float) -> bool:
        now = self._now()
        return self._entry(message_id).reset(now, now + round(expires_in * 1000))

    async def delete(self, message_id: str) -> int:
        entry = self._entry(message_id)
        if entry.is_leased:
            raise SpoolError(f"{message_id} is being delivered; hold it, or try again")
        _, recipients = entry.accepted
        self.memory.tally[end_name(entry.kind, End.REMOVED)] += recipients
        entry.deliveries = []
        self._drop_if_over(entry)
        return recipients

    async def housekeep(self) -> None:
        wall, monotonic = self._clock(), time.monotonic()
        jump = (wall - self._clocks[0]) - (monotonic - self._clocks[1])
        self._clocks = (wall, monotonic)
        if abs(jump) >= 60:
            for entry in self._sorted:
                entry.move(min(0, round(jump * 1000)), round(jump * 1000))


def _is_overdue(entry: Entry, now: int) -> bool:
    return entry.held_ms is None and entry.expires_ms <= now
