"""Claiming: choosing the next deliveries to attempt, and recording the choice.

New and retried deliveries take turns, each in the order in which they are due, and senders take turns within a sample.
If a few senders fill most of the sample, half of the room goes to all senders in turns, which the index finds by name.
So a sender with little mail waits for one delivery of each other sender, and not for a whole backlog.
"""

import contextlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from otel_smtp.spool.embedded.contents import Contents
from otel_smtp.spool.embedded.deliveries import DeliveryEntry
from otel_smtp.spool.embedded.entries import Entry, dumps
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.embedded.index_thread import IndexThread
from otel_smtp.spool.embedded.journal import Journal
from otel_smtp.spool.embedded.log import Step
from otel_smtp.spool.embedded.memory import Memory
from otel_smtp.spool.embedded.records import RecordKind
from otel_smtp.spool.embedded.waiting import SAMPLE, Candidate, alternate, by_sender, in_turn, is_dominated
from otel_smtp.spool.messages import DeliveryState, Lease, SpoolError

Claimed = tuple[Entry, DeliveryEntry]


@dataclass(slots=True)
class _Turns:
    """Whose turn it is at one destination.

    Attributes:
        is_old_first: retried deliveries come before new ones.
        is_anyone_first: the next senders by name come before the deliveries that are due first.
        after: the last sender that had its turn, by whether its delivery was tried before; None: start with the first.
    """

    is_old_first: bool = False
    is_anyone_first: bool = False
    after: dict[bool, str | None] = field(default_factory=dict)


class Claiming:
    """Leases due deliveries."""

    def __init__(self, memory: Memory, index: IndexThread, journal: Journal, contents: Contents) -> None:
        self._memory = memory
        self._index = index
        self._journal = journal
        self._contents = contents
        self._turns: dict[str, _Turns] = {}

    async def claim(
        self, wanted: Mapping[str, int], now_ms: int
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], int | None]:
        """Lease what is due, and count the attempt.

        Returns:
            The leases, with small contents; and when the next unexpired delivery is due, in milliseconds since the
            epoch.
        """
        found: list[Claimed] = []
        try:
            for destination, most in wanted.items():
                found += await self._choose(destination, most, now_ms)
        except SpoolError:
            for entry, _ in found:
                self._memory.waiting.offer(entry)
            raise
        chosen: list[Claimed] = []
        for entry, delivery in found:
            # While the next destination was searched, an operator may have held it, or it may have left memory.
            if (known := self._memory.hot.get(entry.id)) is entry and _may_be_leased(entry, delivery, now_ms):
                chosen.append((entry, delivery))
            elif known is not None:
                self._memory.waiting.offer(known)
        leases = await self._lease(chosen) if chosen else []
        contents = await self._contents.small([entry for entry, _ in leases])
        try:
            next_due = await self._next_due(list(wanted), now_ms)
        except SpoolError:  # leased deliveries must be attempted, even if the index failed meanwhile
            if not leases:
                raise
            next_due = now_ms
        return [
            (entry.lease_of(one), content) for (entry, one), content in zip(leases, contents, strict=True)
        ], next_due

    async def _choose(self, destination: str, most: int, now_ms: int) -> list[Claimed]:
        """Choose the next deliveries: new and retried ones take turns, and so do senders."""
        memory = self._memory
        new = memory.waiting.take(destination, most, now_ms, was_tried=False)
        old = memory.waiting.take(destination, most, now_ms, was_tried=True)
        try:
            return await self._choose_among(new, old, destination, most, now_ms)
        except SpoolError:
            for _, message_id, _, _ in (*new, *old):
                if (entry := memory.hot.get(message_id)) is not None:
                    memory.waiting.offer(entry)
            raise

    async def _choose_among(
        self, new: list[Candidate], old: list[Candidate], destination: str, most: int, now_ms: int
    ) -> list[Claimed]:
        memory = self._memory
        turns = self._turns.setdefault(destination, _Turns())
        of_senders: dict[bool, tuple[Sequence[Candidate], str | None]] = {}
        if memory.cold[destination] > 0:

            def is_known(message_id: str) -> bool:
                """Called in the index's thread; changes since then are checked below."""
                return message_id in memory.hot or message_id in memory.unindexed

            def look(index: Index, was_tried: bool) -> list[Candidate]:
                sample = index.due(destination, now_ms, SAMPLE * most, was_tried=was_tried, is_known=is_known)
                if len(sample) == SAMPLE * most and is_dominated(sample):
                    of_senders[was_tried] = index.due_of_senders(
                        destination,
                        now_ms,
                        max(1, most // 2),
                        was_tried=was_tried,
                        after=turns.after.get(was_tried),
                        is_known=is_known,
                    )
                return sample

            cold_new, cold_old = await self._index.run(lambda index: [look(index, False), look(index, True)])
            new = list(heapq.merge(new, (one for one in cold_new if one[1] not in memory.hot)))
            old = list(heapq.merge(old, (one for one in cold_old if one[1] not in memory.hot)))
        ordered: list[list[Candidate]] = []
        anyone: dict[bool, list[Candidate]] = {}
        for was_tried, sample in ((False, by_sender(new)), (True, by_sender(old))):
            found, _ = of_senders.get(was_tried, ((), None))
            those = anyone[was_tried] = [one for one in found if one[1] not in memory.hot]
            ordered.append(alternate(those, sample) if turns.is_anyone_first else alternate(sample, those))
        candidates = in_turn(*ordered, is_old_first=turns.is_old_first)
        first = candidates[:most]
        for was_tried, (_, after) in of_senders.items():
            those = anyone[was_tried]
            taken = [one for one in those if one in first]
            if len(taken) == len(those):
                turns.after[was_tried] = after
            elif taken:
                turns.after[was_tried] = taken[-1][3]
        # If there is room for only one at a time, the next claim begins with the others.
        turns.is_anyone_first ^= turns.is_old_first
        turns.is_old_first = not turns.is_old_first
        chosen: list[Claimed] = []
        cold = [one[1] for one in first if one[1] not in memory.hot]
        if cold:
            for entry in await self._index.run(lambda index: index.load(cold)):
                if entry.id not in memory.unindexed:
                    memory.admit(entry)
        # A message found first in memory and then in the index would count twice.
        for message_id, number in dict.fromkeys((one[1], one[2]) for one in candidates):
            entry_now = memory.hot.get(message_id)
            delivery = entry_now.delivery(number) if entry_now is not None else None
            if entry_now is None or delivery is None:
                continue
            if len(chosen) < most and _may_be_leased(entry_now, delivery, now_ms):
                chosen.append((entry_now, delivery))
            elif delivery.state is DeliveryState.READY:
                memory.waiting.offer_one(entry_now, delivery)
        return chosen

    async def _lease(self, chosen: Sequence[Claimed]) -> list[Claimed]:
        """Record durably that these are attempted from now on."""
        memory = self._memory
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

        def durable(step: Step[None]) -> None:
            position = (step.segment, step.places[0][0])
            for entry, changed, _ in changes.values():
                changed.place = entry.place
                memory.set_free(entry)
                memory.note(changed, position)

        def failed() -> None:
            for entry, _, _ in changes.values():
                memory.set_free(entry)
                memory.waiting.offer(entry)

        await self._journal.append([(RecordKind.LEASE, dumps(told), ())], durable=durable, failed=failed)
        rows = [
            (changed.id, one.number)
            for entry, changed, leased in changes.values()
            for one in leased
            if entry.is_indexed
        ]
        if rows:
            # If unknown now, it shows when the index offers them: they are in memory.
            with contextlib.suppress(SpoolError):
                await self._index.run(lambda index: index.note_leased(rows))
        return [(changed, one) for _, changed, leased in changes.values() for one in leased]

    async def _next_due(self, destinations: Sequence[str], now_ms: int) -> int | None:
        memory = self._memory
        times: list[int] = []
        cold: list[str] = []
        for destination in destinations:
            if (due := memory.waiting.next_due(destination, now_ms)) is not None:
                times.append(due)
            if memory.cold[destination] > 0:
                cold.append(destination)
        if cold:
            found = await self._index.run(lambda index: [index.next_due(destination, now_ms) for destination in cold])
            times += [due for due in found if due is not None]
        return min(times, default=None)


def _may_be_leased(entry: Entry, delivery: DeliveryEntry, now_ms: int) -> bool:
    return (
        delivery.state is DeliveryState.READY
        and delivery.due_ms <= now_ms
        and (entry.expires_ms > now_ms or entry.held_ms is not None)
        and not entry.is_busy
    )
