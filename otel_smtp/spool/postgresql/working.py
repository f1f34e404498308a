"""A connection for work outside of groups, one piece at a time."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from otel_smtp.spool.messages import SpoolError, StorageAway, StoreVerb, Timings
from otel_smtp.spool.postgresql.connecting import (
    Connection,
    LastingConnection,
    QueueLocation,
    ServerFacts,
    is_lost,
    is_of_replica,
    may_succeed_again,
    storage_error,
)

T = TypeVar("T")

WORK_SECONDS: Final = 30.0  # then the connection is dropped
TIMES: Final = 3  # how often work rolled back because of others is repeated


class Working:
    """Runs one piece of work after the other.

    Args:
        purpose: shown by the server beside the connection.
        timings: gets the duration of each piece.
        checks_rights: see `connecting.connect`.
    """

    def __init__(
        self,
        place: QueueLocation,
        purpose: str = "claims",
        *,
        timings: Timings | None = None,
        checks_rights: bool = True,
    ) -> None:
        self._line = LastingConnection(place, purpose, checks_rights=checks_rights)
        self._timings: Timings = timings if timings is not None else deque(maxlen=0)
        self._turn = asyncio.Lock()
        self._not_before = 0.0
        self._running: set[asyncio.Task[object]] = set()

    async def open(self) -> int:
        """Connect; returns the id of the connection's server process.

        Raises:
            SpoolError: see `connecting.connect`.
        """
        await self._line.get()
        return self.facts.backend

    @property
    def facts(self) -> ServerFacts:
        """Facts of the server, once there was a connection."""
        assert self._line.facts is not None
        return self._line.facts

    async def do(self, work: Callable[[Connection], Awaitable[T]], verb: StoreVerb = StoreVerb.OTHER) -> T:
        """Do some work. It continues if its caller is cancelled: a commit must not be disturbed.

        Raises:
            StorageAway: its outcome is unknown, or it was not begun.
            SpoolError: it was not done.
        """
        task = asyncio.get_running_loop().create_task(self._do(work, verb))
        self._running.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: "asyncio.Task[object]") -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # a caller that was cancelled does not ask

    async def _do(self, work: Callable[[Connection], Awaitable[T]], verb: StoreVerb) -> T:
        loop = asyncio.get_running_loop()
        async with self._turn:
            if self._line.present is None and loop.time() < self._not_before:
                raise self._line.fault or StorageAway("the database cannot be reached")
            try:
                connection = await self._line.get()
            except SpoolError:
                self._not_before = loop.time() + self._line.next_wait()
                raise
            for time in range(TIMES):
                watchdog = loop.call_later(WORK_SECONDS, self._line.terminate)
                began = loop.time()
                try:
                    done = await work(connection)
                    self._timings.append((verb, loop.time() - began, 0))
                    return done
                except SpoolError:
                    raise
                except Exception as error:
                    if is_lost(error) or is_of_replica(error):
                        self._line.terminate()
                    elif may_succeed_again(error) and time < TIMES - 1:
                        continue
                    raise storage_error(error) from error
                finally:
                    watchdog.cancel()
            raise AssertionError("unreachable")

    def leave_former(self, started_at: str) -> None:
        """See `LastingConnection.leave_former`."""
        self._line.leave_former(started_at)

    async def close(self, seconds: float) -> None:
        """Wait up to `seconds` for work under way, and give up the rest. Idempotent."""
        if self._running:
            await asyncio.wait(list(self._running), timeout=seconds)
        if left := list(self._running):
            self._line.terminate()
            for task in left:
                task.cancel()  # while it connects, or after its connection: this cancels no statement
            await asyncio.gather(*left, return_exceptions=True)
        await self._line.close()
