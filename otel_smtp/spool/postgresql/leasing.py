"""Deliveries out: leased for an attempt or for expiry, or shown for a warning."""

import time
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Final
from uuid import UUID

from otel_smtp.spool.messages import Lease, SpoolError, StorageAway, StoreVerb, is_for_receiver
from otel_smtp.spool.postgresql.parts import PostgresqlParts
from otel_smtp.spool.postgresql.rows import ContentKey, Row, lease_of, small_content

ADOPT_SECONDS: Final = 60.0  # how long a claim with a lost answer may still commit
MOST_CLAIMED: Final = 100

Claimed = tuple[Lease, Sequence[bytes] | None]


class PostgresqlLeasing(PostgresqlParts):
    """Leases deliveries."""

    _adopt_until = float("-inf")

    async def claim(self, wanted: Mapping[str, int]) -> tuple[Sequence[Claimed], float | None]:
        """See `Store.claim`."""
        incarnation = self.beats.incarnation
        if not self.beats.holds(incarnation):
            raise StorageAway("queue database unavailable")
        found: list[Row] = []
        if time.monotonic() < self._adopt_until:
            found += await self._adopt(incarnation, {is_for_receiver(destination) for destination in wanted})
        for destination, most in wanted.items():
            try:
                claimed = await self._claim(incarnation, destination, min(most, MOST_CLAIMED))
            except SpoolError:
                # It may have committed, or may yet. And deliveries of other destinations are leased.
                self._adopt_until = time.monotonic() + ADOPT_SECONDS
                if not found:
                    raise
                break
            found += sorted(claimed, key=lambda row: (row["place"], row["tried"]))
        leases = [(lease_of(row, incarnation), small_content(row)) for row in found]
        for lease, _ in leases:
            self._held[lease.message_id, lease.delivery] = lease.epoch
        if len(leases) >= sum(wanted.values()):
            return leases, 0.0
        due_in = await self._next_due(list(wanted)) if not leases else 0.0
        return leases, due_in

    async def _claim(self, incarnation: UUID, destination: str, most: int) -> list[Row]:
        return await self._working.do(
            lambda connection: connection.fetch(self._statements.claim, incarnation, destination, most),
            StoreVerb.CLAIM,
        )

    async def _next_due(self, destinations: Sequence[str]) -> float | None:
        due_in: float | None = await self._working.do(
            lambda connection: connection.fetchval(self._statements.next_due, destinations)
        )
        return None if due_in is None else max(0.0, due_in)

    async def _adopt(self, incarnation: UUID, are_outcomes: Container[bool]) -> Sequence[Row]:
        """Adopt our leases that this process does not know.

        Args:
            are_outcomes: whether outcomes are claimed, or mail, or both: the sender of one must never get the other.
        """
        unknown = await self._unknown_leases(incarnation, are_outcomes)
        if unknown:
            # Deliveries that ended meanwhile are unknown here too; a second query no longer finds them.
            there = {_lease_key(row) for row in await self._unknown_leases(incarnation, are_outcomes)}
            unknown = [row for row in unknown if _lease_key(row) in there]
        return unknown

    async def _unknown_leases(self, incarnation: UUID, are_outcomes: Container[bool]) -> Sequence[Row]:
        known = [f"{message_id}/{delivery}" for message_id, delivery in self._held]
        rows: Sequence[Row] = await self._working.do(
            lambda connection: connection.fetch(self._statements.unknown_leases, incarnation, known)
        )
        submitted = self._being_submitted()
        return [
            row
            for row in rows
            if is_for_receiver(row["dest"]) in are_outcomes
            and row["id"] not in submitted
            and row["id"] not in self._withdrawn
            and (row["id"], row["d"]) not in self._held
        ]

    async def end_overdue(self, most: int, *, outcomes: bool = False) -> Sequence[Lease]:
        """See `Store.end_overdue`; the housekeeper does it for all."""
        incarnation = self.beats.incarnation
        if not self.beats.is_housekeeper or not self.beats.holds(incarnation):
            return []
        try:
            rows = await self._working.do(
                lambda connection: connection.fetch(self._statements.end_overdue, incarnation, most, outcomes)
            )
        except StorageAway:
            self._adopt_until = time.monotonic() + ADOPT_SECONDS
            raise
        leases = [lease_of(row, incarnation) for row in rows]
        for lease in leases:
            self._held[lease.message_id, lease.delivery] = lease.epoch
        return leases

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        """See `Store.unwarned`; the housekeeper does it for all."""
        if not self.beats.is_housekeeper:
            return []
        rows = await self._working.do(lambda connection: connection.fetch(self._statements.unwarned, age, most))
        return [lease_of(row, None) for row in rows]

    async def destinations(self, *, outcomes: bool = False, known: Collection[str] = ()) -> Sequence[str]:
        """See `Store.destinations`."""
        passed_over = [*{*known, *self._not_asked_for[outcomes]}]
        rows = await self._working.do(lambda connection: connection.fetch(self._statements.destinations, passed_over))
        found: list[str] = []
        for row in rows:
            if is_for_receiver(row["dest"]) is outcomes:
                found.append(row["dest"])
            else:
                self._not_asked_for[outcomes].add(row["dest"])
        return found

    def holds(self, lease: Lease) -> bool:
        """See `Store.holds`."""
        key: ContentKey = lease.content.key  # type: ignore[assignment]  # asked several times for each mail
        beats = self.beats
        return key.incarnation is beats.incarnation and time.monotonic() < beats.ok_until


def _lease_key(row: Row) -> tuple[str, int, int]:
    return row["id"], row["d"], row["epoch"]
