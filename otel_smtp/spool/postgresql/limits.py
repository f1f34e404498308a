"""The limits of all gateways of a queue: see `schema` for what is kept, and `forwarding.base.Ledger` for who asks."""

import logging
from typing import Final
from uuid import UUID

import asyncpg

from otel_smtp.forwarding.base import Claim, Grant
from otel_smtp.spool.messages import SpoolError
from otel_smtp.spool.postgresql.beats import Beats
from otel_smtp.spool.postgresql.connecting import Connection, QueueLocation
from otel_smtp.spool.postgresql.statements import Statements
from otel_smtp.spool.postgresql.working import Working

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.limits")


class DatabaseLedger:
    """Keeps limits in the database of a queue, over a connection of its own that is made when it is needed."""

    def __init__(self, place: QueueLocation, statements: Statements, beats: Beats) -> None:
        self._statements = statements
        self._beats = beats
        self._working = Working(place, "limits")
        self._turn = 0

    def term(self) -> UUID | None:
        """See `Ledger.term`."""
        incarnation = self._beats.incarnation
        return incarnation if self._beats.holds(incarnation) else None

    async def settle(self, claim: Claim) -> Grant | None:
        """See `Ledger.settle`."""
        self._turn += 1
        arguments = (
            self._beats.incarnation, self._turn, claim.name, claim.count, claim.period_seconds, claim.burst,
            "recipients" if claim.per_recipient else "messages", claim.in_flight, claim.landed, claim.unused,
            claim.least, claim.wanted, claim.rest_seconds,
        )  # fmt: skip

        async def settle(connection: Connection) -> asyncpg.Record | None:
            return await connection.fetchrow(self._statements.settle, *arguments)

        try:
            row = await self._working.do(settle)
        except SpoolError as error:
            logger.debug("shared limits unavailable", extra={"fault": str(error)})  # beats tell people of it
            return None
        if row is None or row["granted"] is None:
            return None
        return Grant(row["granted"], row["wait"], row["available"])

    async def close(self) -> None:
        """Idempotent."""
        await self._working.close()
