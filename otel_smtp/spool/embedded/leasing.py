"""Deliveries out: leased for an attempt or for expiry, or shown for a warning."""

import time
from collections.abc import Collection, Mapping, Sequence

from otel_smtp.spool.embedded.parts import EmbeddedParts
from otel_smtp.spool.messages import DeliveryState, Lease, NoSuchMessage, SpoolError, StoreVerb, is_for_receiver


class EmbeddedLeasing(EmbeddedParts):
    """Leases deliveries."""

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        """See `Store.claim`."""
        began = time.monotonic()
        leases, next_due = await self._claiming.claim(wanted, self._now_ms())
        self.timings.append((StoreVerb.CLAIM, time.monotonic() - began, 0))
        return leases, None if next_due is None else max(0.0, (next_due - self._now_ms()) / 1000)

    async def end_overdue(self, most: int, *, outcomes: bool = False) -> Sequence[Lease]:
        """See `Store.end_overdue`."""
        await self.indexing.write_all()
        now_ms = self._now_ms()
        leases: list[Lease] = []
        for message_id in await self.index.run(lambda index: index.overdue(now_ms, most, outcomes=outcomes)):
            try:
                entry = await self.indexing.get(message_id)
            except NoSuchMessage:
                continue
            except SpoolError:
                if not leases:
                    raise
                break
            changed = entry.copy()
            waiting = [one for one in changed.deliveries if one.state in (DeliveryState.READY, DeliveryState.HELD)]
            if not waiting or changed.held_ms is not None or changed.expires_ms > now_ms:
                continue
            for one in waiting:
                one.lease()
            try:
                await self.journal.change(entry, changed, {})
            except SpoolError:
                if not leases:
                    raise
                break  # the earlier ones are leased, and must be ended
            leases += [changed.lease_of(one) for one in waiting]
        return leases

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        """See `Store.unwarned`."""
        await self.indexing.write_all()
        before_ms = self._now_ms() - round(age * 1000)
        entries = await self.index.run(lambda index: index.load(index.unwarned(before_ms, most)))
        return [
            entry.lease_of(one)
            for entry in entries
            for one in entry.deliveries
            if one.state is DeliveryState.READY and one.attempts > 0
        ]

    async def destinations(self, *, outcomes: bool = False, known: Collection[str] = ()) -> Sequence[str]:
        """See `Store.destinations`."""
        hot = {one.destination for entry in self.memory.hot.values() for one in entry.deliveries}
        found = hot | {destination for destination, count in self.memory.cold.items() if count > 0}
        return sorted(one for one in found.difference(known) if is_for_receiver(one) is outcomes)

    def holds(self, lease: Lease) -> bool:
        """See `Store.holds`: one process owns the directory."""
        return True
