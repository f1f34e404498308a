"""The limits and connection slots of all gateways of a queue.

See `schema` for the tables, and `forwarding.base.Ledger` for the interface.
"""

import json
import logging
from collections.abc import Collection
from typing import Final
from uuid import UUID

import asyncpg

from otel_smtp.forwarding.base import Claim, Grant, HeldSlot, SlotHeard
from otel_smtp.spool.messages import SpoolError, StoreVerb, Timings
from otel_smtp.spool.postgresql.beats import Beats, channel
from otel_smtp.spool.postgresql.connecting import Connection, QueueLocation
from otel_smtp.spool.postgresql.statements import Statements
from otel_smtp.spool.postgresql.working import Working

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.limits")

SLOTS: Final = "slots "
"""The prefix of notifications between gateways about slots; then [the upstream, the gateway, it waits for some]."""


class DatabaseLedger:
    """Keeps limits in the database of a queue, over its own connection, made when needed."""

    def __init__(self, place: QueueLocation, statements: Statements, beats: Beats, timings: Timings) -> None:
        self._statements = statements
        self._beats = beats
        self._working = Working(place, "limits", timings=timings)
        self._channel = channel(place)
        self._turn = 0
        self._watching: dict[str, SlotHeard] = {}

    def term(self) -> UUID | None:
        """See `LimitLedger.term`."""
        incarnation = self._beats.incarnation
        return incarnation if self._beats.holds(incarnation) else None

    async def settle(self, claim: Claim) -> Grant | None:
        """See `LimitLedger.settle`."""
        self._turn += 1
        arguments = (
            self._beats.incarnation, self._turn, claim.name, claim.count, claim.period_seconds, claim.burst,
            "recipients" if claim.per_recipient else "messages", claim.in_flight, claim.landed, claim.unused,
            claim.least, claim.wanted, claim.rest_seconds,
        )  # fmt: skip

        async def settle(connection: Connection) -> asyncpg.Record | None:
            return await connection.fetchrow(self._statements.settle, *arguments)

        try:
            row = await self._working.do(settle, StoreVerb.LIMIT)
        except SpoolError as error:
            logger.debug("shared limits unavailable", extra={"fault": str(error)})  # beats tell people of it
            return None
        if row is None or row["granted"] is None:
            return None
        return Grant(row["granted"], row["wait"], row["available"])

    async def hold(
        self, name: str, total: int, released: Collection[HeldSlot], wanted: int
    ) -> Collection[HeldSlot] | None:
        """See `SlotLedger.hold`."""
        me, statements = self._beats.incarnation, self._statements
        numbers, since = [number for number, _ in released], [at for _, at in released]

        async def hold(connection: Connection) -> Collection[HeldSlot]:
            async with connection.transaction():
                if released:
                    await connection.execute(statements.give_slots_back, me, name, numbers, since)
                taken = 0
                if wanted:
                    await connection.execute(statements.make_slots, name, total)
                    taken = len(await connection.fetch(statements.take_slots, me, name, total, wanted))
                # Notify waiters that slots were given back, and holders that others wait.
                for is_wish, is_so in ((False, bool(released)), (True, taken < wanted)):
                    if is_so:
                        what = SLOTS + json.dumps([name, str(me), is_wish])
                        await connection.execute("SELECT pg_notify($1, $2)", self._channel, what)
                return [tuple(row) for row in await connection.fetch(statements.slots_held, me, name)]

        try:
            return await self._working.do(hold, StoreVerb.LIMIT)
        except SpoolError as error:
            logger.debug("connection slots unavailable", extra={"fault": str(error)})  # beats tell people of it
            return None

    def watch_slots(self, name: str, heard: SlotHeard) -> None:
        """See `SlotLedger.watch_slots`."""
        self._watching[name] = heard

    def hear(self, what: str) -> None:
        """Another gateway, or this one, reports about slots."""
        try:
            name, gateway, is_wish = json.loads(what.removeprefix(SLOTS))
        except (ValueError, TypeError):  # a newer program's
            return
        if gateway != str(self._beats.incarnation) and (heard := self._watching.get(name)) is not None:
            heard(is_wish=is_wish)

    def leave_former(self, started_at: str) -> None:
        """See `LastingConnection.leave_former`."""
        self._working.leave_former(started_at)

    async def close(self, seconds: float) -> None:
        """See `Working.close`."""
        await self._working.close(seconds)
