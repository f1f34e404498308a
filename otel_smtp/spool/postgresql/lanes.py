"""Group commit: items that arrive while one group commits form the next group. A lone mail does not wait.

A group costs as much as ten mails, here and in the database. So a second group runs beside the first only if many items
wait, or the first takes long; and items that no one awaits gather for a moment.

The outcome of a group is unknown if its connection broke before the server answered. It is then sent again unchanged,
while its waiters have time; each item is marked as possibly done before.
"""

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, Generic, TypeVar

from otel_smtp.spool.messages import SpoolError, StorageAway, StoreVerb, Timings
from otel_smtp.spool.postgresql.connecting import (
    Connection,
    LastingConnection,
    is_lost,
    is_of_replica,
    may_succeed_again,
    storage_error,
)
from otel_smtp.spool.promises import Promise

T = TypeVar("T")

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.lanes")

MOST_ITEMS: Final = 256
MOST_OCTETS: Final = 4 * 1024 * 1024
ENOUGH_ITEMS: Final = 64  # for another group beside the one under way
GATHER_SECONDS: Final = 0.005  # items that are not urgent wait for company; urgent ones for a group under way
PATIENCE_SECONDS: Final = 0.02  # what is not urgent waits for that
SLOW_SECONDS: Final = 1.0  # of a group
RECENT_GROUPS: Final = 9
MOST_SLOW: Final = RECENT_GROUPS // 2  # of the recent groups; with one more the median is slow
RELIEF_SECONDS: Final = 5.0  # then the next group shows whether it is still slow


class Item(Promise[T]):
    """An item to write, and the answer for its caller.

    Attributes:
        deadline: in seconds of the monotonic clock; the items of a lane all have the same time.
        may_be_done: it was sent before, with an unknown outcome.
    """

    __slots__ = ("deadline", "may_be_done", "octets")

    def __init__(self, octets: int, deadline: float) -> None:
        # As `Promise` has it: one call less for every message and every result.
        self._callbacks = ()
        self._error = self._result = None
        self._is_done = False
        self.octets = octets
        self.deadline = deadline
        self.may_be_done = False

    def answer(self, result: T) -> None:
        """It is durable: give the answer, unless there is one. A caller's fault harms no other item."""
        if not self._is_done:
            try:
                self.settle(result)
            except Exception:
                logger.exception("queue answer not processed: internal error")

    def refuse(self, fault: SpoolError) -> None:
        """Like `answer`: it is not durable, and will not be."""
        if not self._is_done:
            try:
                self.fail(fault)
            except Exception:
                logger.exception("queue answer not processed: internal error")


I = TypeVar("I", bound=Item[Any])  # noqa: E741 - an item


class Lanes(Generic[I]):
    """Writes items in groups, over several connections.

    Args:
        write: writes a group in one transaction and answers its items; never cancelled.
        given_up: called with an item whose deadline passes while its outcome is unknown.
        verb, timings: `timings` gets the duration of each group, under this name.
    """

    def __init__(
        self,
        lines: Sequence[LastingConnection],
        write: Callable[[Connection, int, Sequence[I]], Awaitable[None]],
        given_up: Callable[[I], None],
        *,
        verb: StoreVerb,
        timings: Timings,
        most_items: int = MOST_ITEMS,
    ) -> None:
        self._lines = lines
        self._write = write
        self._given_up = given_up
        self._verb = verb
        self._timings = timings
        self._most_items = most_items
        self._waiting: deque[I] = deque()
        self._is_urgent = False  # one of these
        self._is_over_time = False  # they have waited for long enough
        self._patience: asyncio.TimerHandle | None = None
        self._octets = 0  # of what waits
        self._groups: list[Sequence[I]] = []  # under way
        self._idle_lanes: list[asyncio.Future[None]] = []
        self._is_called = False  # a lane, to take them
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._sweep: asyncio.TimerHandle | None = None
        self._were_slow: deque[bool] = deque(maxlen=RECENT_GROUPS)
        self._slow_until = 0.0

    def start(self) -> None:
        """Begin."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run(number, line)) for number, line in enumerate(self._lines)]

    @property
    def waiting(self) -> int:
        """How many items no lane has taken yet."""
        return len(self._waiting)

    @property
    def is_slow(self) -> bool:
        """Whether the median of the recent groups was slow, a moment ago."""
        return time.monotonic() < self._slow_until

    def items(self) -> Iterator[I]:
        """All items without an answer."""
        return itertools.chain(self._waiting, *self._groups)

    def add(self, item: I, *, is_urgent: bool = True) -> None:
        """Write an item."""
        if not self._waiting:
            self._is_idle.clear()
        self._waiting.append(item)
        self._octets += item.octets
        if is_urgent:
            self._is_urgent = True
        if self._patience is None or self._is_due:
            self._call()
        if self._sweep is None:
            self._sweep_at(item.deadline)

    @property
    def _is_due(self) -> bool:
        """Whether an idle lane should take the waiting items."""
        return bool(self._waiting) and (
            (self._is_urgent and not self._groups) or len(self._waiting) >= ENOUGH_ITEMS or self._is_over_time
        )

    def _call(self) -> None:
        """Let an idle lane take the waiting items, now or later; or the next one that becomes idle."""
        if self._is_called or not self._waiting:
            return
        if not self._is_due:
            if self._patience is None:
                seconds = PATIENCE_SECONDS if self._groups and not self._is_urgent else GATHER_SECONDS
                self._patience = asyncio.get_running_loop().call_later(seconds, self._lose_patience)
        elif self._idle_lanes:
            self._is_called = True
            self._idle_lanes.pop().set_result(None)

    def _lose_patience(self) -> None:
        self._patience = None
        self._is_over_time = True
        self._call()

    def leave_former(self, started_at: str) -> None:
        """See `LastingConnection.leave_former`: what is under way there is sent again."""
        for line in self._lines:
            line.leave_former(started_at)

    async def close(self, seconds: float) -> None:
        """Wait up to `seconds` until all items are written, and give up the rest; then end. Idempotent."""
        if self._tasks:
            if self._waiting:
                self._lose_patience()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._is_idle.wait()
        left = list(self.items())
        if left:
            for line in self._lines:
                line.terminate()
        for task in self._tasks:
            task.cancel()  # idle, or after its connection: this cancels no statement
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        self._waiting.clear()
        for item in left:
            self._fail(item, StorageAway("the database did not answer in time"))
        for timer in (self._sweep, self._patience):
            if timer is not None:
                timer.cancel()
        await asyncio.gather(*(line.close() for line in self._lines))

    def _sweep_at(self, deadline: float) -> None:
        self._sweep = asyncio.get_running_loop().call_later(
            max(0.0, deadline - time.monotonic()) + 0.01, self._drop_late_waiting
        )

    def _drop_late_waiting(self) -> None:
        self._sweep = None
        now = time.monotonic()
        while self._waiting and self._waiting[0].deadline <= now:
            late = self._waiting.popleft()
            self._octets -= late.octets
            self._fail(late, StorageAway("the database did not answer in time"))
        if self._waiting:
            self._sweep_at(self._waiting[0].deadline)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._waiting and not self._groups:
            self._is_idle.set()

    async def _run(self, number: int, line: LastingConnection) -> None:
        with contextlib.suppress(SpoolError):
            await line.get()  # before the first mail waits for it
        loop = asyncio.get_running_loop()
        while True:
            while not self._is_due:
                self._call()
                called = loop.create_future()
                self._idle_lanes.append(called)
                try:
                    await called
                finally:
                    self._is_called = False
            group = self._take()
            self._groups.append(group)
            self._call()
            try:
                await self._write_until_done(number, line, group)
            except Exception as error:
                logger.exception("group of messages not written: internal error")
                for item in group:
                    self._fail(item, storage_error(error))
            finally:
                self._groups.remove(group)
                self._note_idle()

    def _take(self) -> list[I]:
        waiting = self._waiting
        if len(waiting) <= self._most_items and self._octets <= MOST_OCTETS:
            group = [*waiting]
            waiting.clear()
            self._octets = 0
        else:
            group = [waiting.popleft()]
            octets = group[0].octets
            while waiting and len(group) < self._most_items and octets + waiting[0].octets <= MOST_OCTETS:
                group.append(waiting.popleft())
                octets += group[-1].octets
            self._octets -= octets
        if not waiting:
            self._is_urgent = self._is_over_time = False
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None
        return group

    async def _write_until_done(self, number: int, line: LastingConnection, group: Sequence[I]) -> None:
        fault: SpoolError = StorageAway("the database did not answer in time")
        has_failed = False
        while True:
            began = time.monotonic()
            while group[0].deadline <= began:  # they came in this order
                self._fail(group[0], fault)
                group = group[1:]
                if not group:
                    return
            deadline = group[0].deadline
            if (connection := line.present) is None:
                try:
                    async with asyncio.timeout(deadline - began):
                        connection = await line.get()
                except (SpoolError, TimeoutError) as error:
                    fault = error if isinstance(error, SpoolError) else fault
                    has_failed = True
                    await _pause(line, deadline)
                    continue
                began = time.monotonic()
            try:
                watchdog = asyncio.get_running_loop().call_later(deadline - began, line.terminate)
                try:
                    await self._write(connection, number, group)
                    self._note_time(time.monotonic() - began, len(group))
                except asyncio.CancelledError:
                    for item in group:
                        item.may_be_done = True
                    raise
                finally:
                    watchdog.cancel()
            except Exception as error:  # noqa: BLE001 - it is judged
                if is_lost(error):
                    fault = storage_error(error)
                    for item in group:
                        item.may_be_done = True
                    line.terminate()
                elif may_succeed_again(error):
                    fault = storage_error(error)
                    if is_of_replica(error):
                        line.terminate()
                elif len(group) > 1:
                    # One bad row must not fail its neighbours.
                    for item in group:
                        await self._write_until_done(number, line, [item])
                    return
                else:
                    logger.error("row refused by the database", extra={"fault": str(error)})
                    self._fail(group[0], storage_error(error))
                    return
                has_failed = True
                await _pause(line, deadline)
            else:
                if has_failed:
                    line.forget_faults()
                return

    def _note_time(self, seconds: float, items: int) -> None:
        self._timings.append((self._verb, seconds, items))
        is_slow = seconds > SLOW_SECONDS
        self._were_slow.append(is_slow)
        if is_slow or self._slow_until:
            if sum(self._were_slow) <= MOST_SLOW:
                self._slow_until = 0.0
            elif is_slow:
                self._slow_until = time.monotonic() + RELIEF_SECONDS

    def _fail(self, item: I, fault: SpoolError) -> None:
        if item.may_be_done and not item.done():
            self._given_up(item)
        item.refuse(fault)


async def _pause(line: LastingConnection, deadline: float) -> None:
    """Wait before the next attempt, but not past the first item's deadline."""
    await asyncio.sleep(min(line.next_wait(), deadline - time.monotonic()))
