"""Operators' queries and commands."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.embedded.parts import EmbeddedParts
from otel_smtp.spool.messages import Backlog, Counts, DeliveryState, End, MessageView, SpoolError, end_name

COUNT_CACHE_SECONDS: Final = 15.0
COUNT_CACHE_FROM: Final = 50_000


class EmbeddedOperating(EmbeddedParts):
    """Counts, lists and changes messages."""

    _counted: tuple[float, dict[str, Any]] | None = None

    # Seeing ----------------------------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """See `Store.counts`; a few seconds old in a very large spool."""
        now = time.monotonic()
        memory = self.memory
        if self._counted is None or memory.messages < COUNT_CACHE_FROM or now - self._counted[0] > COUNT_CACHE_SECONDS:
            await self.indexing.write_all()
            now_ms = self._now_ms()
            counted = await self.index.run(lambda index: index.counts(now_ms))
            for _, _, entry in memory.unindexed.values():
                if entry is not None and not entry.is_indexed and not entry.is_outcome:
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
            dead_octets=self.compaction.dead_octets,
        )

    async def tally(self) -> Mapping[str, int]:
        """See `Store.tally`."""
        # A copy first: the log's thread counts on.
        return {name: count for name, count in dict(self.journal.log.tally).items() if count}

    async def backlog(self, destinations: Sequence[str]) -> Mapping[str, Backlog]:
        """See `Store.backlog`."""
        memory = self.memory
        waiting = [destination for destination in destinations if memory.outcomes[destination] > 0]
        oldest: dict[str, int] = {}
        if cold := [destination for destination in waiting if memory.cold[destination] > 0]:
            found = await self.index.run(lambda index: [index.oldest(destination) for destination in cold])
            oldest.update(
                (destination, first) for destination, first in zip(cold, found, strict=True) if first is not None
            )
        if waiting:
            for entry in memory.hot.values():
                if entry.is_outcome:
                    for one in entry.deliveries:
                        if one.is_pending:
                            first = oldest.get(one.destination, entry.arrived_ms)
                            oldest[one.destination] = min(entry.arrived_ms, first)
        return {
            destination: Backlog(
                memory.outcomes[destination], oldest[destination] / 1000 if destination in oldest else None
            )
            for destination in destinations
        }

    async def page(self, after: str, most: int, *, outcomes: bool = False) -> Sequence[MessageView]:
        """See `Store.page`."""
        await self.indexing.write_all()
        found = await self.index.run(lambda index: index.page(after, most, outcomes=outcomes))
        entries = self.memory.overlay(found, lambda entry: entry.id > after and entry.is_outcome is outcomes, most)
        if not entries and len(found) == most:
            # All of these have ended meanwhile, but not the following ones.
            return await self.page(found[-1].id, most, outcomes=outcomes)
        return [entry.shown() for entry in entries]

    async def show(self, message_id: str) -> MessageView:
        """See `Store.show`."""
        return (await self.indexing.look_up(message_id)).shown()

    async def find(
        self, *, trace_id: str | None = None, sender: str | None = None, recipient: str | None = None, most: int
    ) -> Sequence[MessageView]:
        """See `Store.find`."""
        await self.indexing.write_all()
        found = await self.index.run(lambda index: index.find(trace_id, sender, recipient, most))
        found = self.memory.overlay(
            found, lambda entry: not entry.is_outcome and entry.fits(trace_id, sender, recipient), most
        )
        return [entry.shown() for entry in found]

    # Doing -----------------------------------------------------------------------------------------------------

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
        entry = await self.indexing.get(message_id)
        changed = entry.copy()
        if not change(changed):
            return False
        await self.journal.change(entry, changed, {})
        return True

    async def delete(self, message_id: str) -> int:
        """See `Store.delete`."""
        entry = await self.indexing.get(message_id)
        if entry.is_leased:
            raise SpoolError(f"{message_id} is being delivered; hold it, or try again")
        _, recipients = entry.accepted
        ended = {end_name(entry.kind, End.REMOVED): recipients}
        await self.journal.change(entry, None, ended)
        return recipients

    async def tell_deed(self, deed: str) -> None:
        """See `Store.tell_deed`: a file keeps it."""
        await asyncio.to_thread(self.directory.keep_deed, deed)

    async def take_deeds(self) -> Sequence[str]:
        """See `Store.take_deeds`."""
        return await asyncio.to_thread(self.directory.take_deeds)


def _count(entry: Entry, counted: dict[str, Any], now_ms: int) -> None:
    """Adjust the index's counts for a message."""
    for one in entry.deliveries:
        is_later = one.state is DeliveryState.READY and one.due_ms > now_ms
        name = "deferred" if is_later else one.state.value
        counted[name] = counted.get(name, 0) + 1
        if is_later:
            counted["next_due"] = min(one.due_ms, counted["next_due"] or one.due_ms)
    counted["oldest"] = min(entry.arrived_ms, counted["oldest"] or entry.arrived_ms)
