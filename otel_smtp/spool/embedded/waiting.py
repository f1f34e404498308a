"""Deliveries in memory that wait for an attempt, in the order in which they are due."""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from otel_smtp.spool.embedded.deliveries import DeliveryEntry
from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.messages import DeliveryState

Candidate = tuple[int, str, int, str]
"""A delivery that may be attempted: due time, message, its number, sender."""

SAMPLE = 8  # the sample, as a multiple of the wanted number, so that many senders are in it
_TIDY_FROM = 1000
_READY: Final = DeliveryState.READY  # looking a member up in its class costs as much as a call


class Waiting:
    """Deliveries by destination, new ones separate from retried ones.

    A delivery that changes is offered again, and its earlier offer is skipped.

    Args:
        find: returns the message in memory with an id.
    """

    def __init__(self, find: Callable[[str], Entry | None]) -> None:
        self._find = find
        self._heaps: dict[tuple[str, bool], list[Candidate]] = {}

    def offer(self, entry: Entry) -> None:
        """Note all waiting deliveries of a message."""
        for delivery in entry.deliveries:
            if delivery.state is _READY:
                self.offer_one(entry, delivery)

    def offer_one(self, entry: Entry, delivery: DeliveryEntry) -> None:
        """Note one of them."""
        heap = self._heaps.setdefault((delivery.destination, delivery.attempts > 0), [])
        heapq.heappush(heap, (delivery.due_ms, entry.id, delivery.number, entry.mail.reverse_path))

    def take(self, destination: str, most: int, now_ms: int, *, was_tried: bool) -> list[Candidate]:
        """Take a sample of the first due, unexpired ones; those not attempted are offered again."""
        heap = self._heaps.get((destination, was_tried))
        found: dict[tuple[str, int], Candidate] = {}
        while heap and heap[0][0] <= now_ms and len(found) < SAMPLE * most:
            candidate = heapq.heappop(heap)
            if self._may_come(candidate, now_ms, was_tried=was_tried):
                found[candidate[1], candidate[2]] = candidate
        return list(found.values())

    def next_due(self, destination: str, now_ms: int) -> int | None:
        """When the first unexpired one is due, in milliseconds since the epoch."""
        times: list[int] = []
        for was_tried in (False, True):
            heap = self._heaps.get((destination, was_tried))
            while heap and not self._may_come(heap[0], now_ms, was_tried=was_tried):
                heapq.heappop(heap)
            if heap:
                times.append(heap[0][0])
        return min(times, default=None)

    def tidy(self, messages: int) -> None:
        """Drop outdated offers, if there are many.

        Args:
            messages: their number in memory.
        """
        for (_, was_tried), heap in self._heaps.items():
            if len(heap) > _TIDY_FROM + 2 * messages:
                heap[:] = [one for one in heap if self._is_current(one, was_tried=was_tried)]
                heapq.heapify(heap)

    def _may_come(self, candidate: Candidate, now_ms: int, *, was_tried: bool) -> bool:
        """Whether it is unchanged since it was offered, and not expired: every change offers it again."""
        entry = self._find(candidate[1])
        return (
            entry is not None
            and (entry.expires_ms > now_ms or entry.held_ms is not None)
            and self._is_current(candidate, was_tried=was_tried)
        )

    def _is_current(self, candidate: Candidate, *, was_tried: bool) -> bool:
        due_ms, message_id, number, _ = candidate
        entry = self._find(message_id)
        delivery = entry.delivery(number) if entry is not None else None
        return (
            delivery is not None
            and delivery.state is DeliveryState.READY
            and delivery.due_ms == due_ms
            and (delivery.attempts > 0) is was_tried
        )


def in_turn(new: Sequence[Candidate], old: Sequence[Candidate], *, is_old_first: bool) -> list[Candidate]:
    """New and retried ones take turns, so that neither starves the other."""
    return alternate(old, new) if is_old_first else alternate(new, old)


def alternate(some: Sequence[Candidate], others: Sequence[Candidate]) -> list[Candidate]:
    """Those of both in turns, without duplicates."""
    both: list[Candidate] = []
    for number in range(max(len(some), len(others))):
        both += [*some[number : number + 1], *others[number : number + 1]]
    return list(dict.fromkeys(both))


def is_dominated(sample: Sequence[Candidate]) -> bool:
    """Whether a few senders fill most of a sample: other senders may be behind their backlogs."""
    return 2 * len({candidate[3] for candidate in sample}) <= len(sample)


def by_sender(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Senders take turns; each sender's deliveries stay in order."""
    turns: Counter[str] = Counter()
    ordered: list[tuple[int, Candidate]] = []
    for candidate in candidates:
        turns[candidate[3]] += 1
        ordered.append((turns[candidate[3]], candidate))
    ordered.sort(key=lambda one: one[0])
    return [candidate for _, candidate in ordered]
