"""Watching whether vacuum keeps up. Rows of a queue live for seconds; an old transaction anywhere in the database keeps
vacuum from removing them, and then each claim must read past all dead ones.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

from otel_smtp.spool.postgresql.connecting import Connection
from otel_smtp.spool.postgresql.rows import Row
from otel_smtp.spool.postgresql.statements import Statements
from otel_smtp.spool.postgresql.working import Working

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.vacuum")

LOOK_SECONDS: Final = 30.0
OLD_TRANSACTION_SECONDS: Final = 600.0
DEAD_FOR_EACH_LIVING: Final = 10
LEAST_DEAD: Final = 5000  # vacuum is not due before
MANY_DEAD: Final = 100_000
"""Too many, however much mail waits: with slow claims, more and more does."""
HELD_UP_SECONDS: Final = 180.0
"""How long too many dead rows must stay without any being removed: autovacuum looks once a minute, and takes its time.
"""
LEFT_BY_VACUUM: Final = 0.8
"""Fraction of the peak of dead rows: below it, vacuum has removed some. Under load many return at once."""


class VacuumWatch:
    """Logs once when vacuum is held up, and once when it recovers."""

    def __init__(
        self, statements: Statements, working: Working, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._statements = statements
        self._working = working
        self._clock = clock
        self._next_at = float("-inf")
        self._many_since: float | None = None
        self._most_dead = 0
        self._has_fallen = False  # since the alarm
        self._is_alarmed = False

    async def look(self) -> None:
        """Look, if it is time to.

        Raises:
            SpoolError: the database did not answer.
        """
        now = self._clock()
        if now < self._next_at:
            return
        self._next_at = now + LOOK_SECONDS

        async def ask(connection: Connection) -> Row | None:
            return await connection.fetchrow(self._statements.vacuum_state)

        row = await self._working.do(ask)
        if row is None:
            return
        is_many = row["dead"] > min(MANY_DEAD, max(LEAST_DEAD, DEAD_FOR_EACH_LIVING * row["living"]))
        has_fallen = row["dead"] < LEFT_BY_VACUUM * self._most_dead
        self._most_dead = row["dead"] if has_fallen else max(self._most_dead, row["dead"])
        self._has_fallen = self._has_fallen or has_fallen
        if not is_many:
            self._many_since = None
        elif self._many_since is None or has_fallen:
            self._many_since = now
        is_late = self._many_since is not None and now - self._many_since >= HELD_UP_SECONDS
        is_held_up = is_late or row["oldest_seconds"] >= OLD_TRANSACTION_SECONDS
        if is_held_up and not self._is_alarmed:
            self._has_fallen = False
            logger.warning(
                "vacuum of the queue database held up",
                extra={
                    "dead_rows": row["dead"], "live_rows": row["living"],
                    "oldest_transaction_seconds": round(row["oldest_seconds"]), "backend": row["backend"],
                },
            )  # fmt: skip
        elif self._is_alarmed and not is_held_up and (self._has_fallen or not is_many):
            logger.warning("vacuum of the queue database caught up")
        else:
            return
        self._is_alarmed = is_held_up
