"""Rates that a provider sets: how much may leave within a second, a minute, an hour or a day.

Theory of operation
-------------------
A limit is two things, and a permit needs both.

* GCRA (the leaky bucket as a virtual schedule, ITU-T I.371): one number, the theoretical arrival time, moves by one
  interval with each permit, and may run ahead of the clock by as much as the burst. So what leaves is spread evenly.
* A window that slides: of the permits of the last period there are never more than the rate says. GCRA alone lets a
  burst pass and then the full rate, which is too many for a provider that counts by the minute.

A permit is timed by what the provider sees: it is in flight, and counts, until the provider has answered, or the
attempt has ended otherwise (`Limit.landed`), and leaves the window one period after that. When content leaves here says
little: it may lie in a socket for a while. One that was not used is given back (`Limit.give_back`).

All numbers are in memory that processes can share, under a lock that the kernel takes from a process that dies. So the
workers of a gateway keep a limit together, exactly. Times are of the monotonic clock, which they share too. Gateways
that share a queue keep a limit in its database: see `global_limits`.

Where a provider says all the same that it is too much, a limit rests: nobody is given anything for a while, longer each
time that this happens again.

`Pace` is what holds an upstream's mails to its limits: who comes first is served first.
"""

import asyncio
import fcntl
import math
import mmap
import os
import time
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

MARGIN_SECONDS: Final = 0.05
"""By which a window is longer here than at the provider: what is on its way takes now less, now more time."""
MOST_CELLS: Final = 32_768
"""Of a window that is full. A rate of more is counted in groups, which leave the window with their last permit."""
IN_FLIGHT_SECONDS: Final = 1200.0
"""After which a permit counts as used whatever became of it: as long as a client may take for its content."""
IN_FLIGHT_POLL_SECONDS: Final = 0.05
"""Between two looks at a permit that another process has in flight."""
FIRST_REST_SECONDS: Final = 5.0
"""For how long nothing leaves when a provider says that it is too much; doubled each time that it says so again."""
LONGEST_REST_SECONDS: Final = 300.0
CONTEND_SECONDS: Final = 0.01
"""Between two looks at a limit that other processes may have used meanwhile: at least this long."""

# The head of a limit's table, then a ring of cells three times: their times (negative: in flight, until then), their
# permits, their numbers.
_TAT, _FIRST, _CELLS, _USED, _NEXT, _REST_UNTIL, _HEAD = 0, 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """One limit.

    Attributes:
        count, period_seconds: so many permits in each period.
        burst: permits that may be taken at once, at most `count`.
        per_recipient: a permit is for a recipient, else for a message.
    """

    name: str
    count: int
    period_seconds: float
    burst: int = 1
    per_recipient: bool = False

    @property
    def group(self) -> int:
        """Permits that share a cell of the window."""
        return -(-self.count // MOST_CELLS)

    @property
    def table_cells(self) -> int:
        """Numbers in memory."""
        return _HEAD + 3 * self.most_cells

    @property
    def most_cells(self) -> int:
        """Of a window: twice what permits can fill, so that cells whose permits were given back are seldom removed."""
        return 2 * (self.count // self.group + 2)


class Permit:
    """What was taken of a limit."""

    __slots__ = ("amount", "number", "taken_at")

    def __init__(self, number: int, amount: int, taken_at: float) -> None:
        self.number = number  # of its cell, of all that there ever were
        self.amount = amount
        self.taken_at = taken_at


class AnyLimit(Protocol):
    """What `Pace` asks of a limit, wherever it is kept.

    Attributes:
        answer_seconds: how long a mail has to wait for an answer at most, be it that there are no permits.
    """

    settings: LimitSettings
    answer_seconds: float

    def take(self, amount: int, now: float) -> "Permit | float":
        """See `Limit.take`."""
        ...

    def available(self, now: float) -> int:
        """See `Limit.available`."""
        ...

    def landed(self, permit: Permit, now: float) -> None:
        """See `Limit.landed`."""
        ...

    def give_back(self, permit: Permit) -> None:
        """See `Limit.give_back`."""
        ...

    def rest(self, seconds: float, now: float) -> None:
        """The provider said that it is too much: nobody is given anything for so long."""
        ...

    def watch(self, pace: "Pace") -> None:
        """Tell one that waits for permits when there may be some."""
        ...


class Limit:
    """One limit; every method is one critical section. No clock: each call is given the time.

    Args:
        cells: `settings.table_cells` numbers, all 0 at first; None: of our own.
        lock: guards them.
    """

    answer_seconds = 0.0

    def __init__(
        self,
        settings: LimitSettings,
        cells: "memoryview[float] | None" = None,
        lock: "Callable[[], Locked] | None" = None,
    ) -> None:
        self.settings = settings
        self._cells = cells if cells is not None else memoryview(bytearray(8 * settings.table_cells)).cast("d")
        self._lock = lock
        self._interval = settings.period_seconds / settings.count
        self._window_seconds = settings.period_seconds + MARGIN_SECONDS
        self._most_cells = settings.most_cells

    def __repr__(self) -> str:
        return f"<Limit {self.settings.name} {self._cells[_USED]:.0f} of {self.settings.count}>"

    def take(self, amount: int, now: float) -> "Permit | float":
        """Take permits, or none.

        Args:
            amount: at most `settings.count`; more than the burst is given when the whole burst is there.

        Returns:
            The permit; or how many seconds to wait before it is worth asking again.
        """
        with _held(self._lock):
            wait = self._wait(amount, now)
            if wait > 0:
                return wait
            cells = self._cells
            cells[_TAT] = max(cells[_TAT], now) + amount * self._interval
            cells[_USED] += amount
            return Permit(self._note(amount, now), amount, now)

    def available(self, now: float) -> int:
        """How many permits can be taken now."""
        with _held(self._lock):
            self._expire(now)
            cells, settings = self._cells, self.settings
            if cells[_REST_UNTIL] > now:
                return 0
            ahead = max(0.0, cells[_TAT] - now)
            at_once = math.floor(settings.burst - ahead / self._interval + 1e-6)
            return max(0, min(at_once, settings.count - int(cells[_USED])))

    def landed(self, permit: Permit, now: float) -> None:
        """What a permit was for has come to its end."""
        with _held(self._lock):
            if (cell := self._cell(permit)) is not None:
                self._cells[cell] = now

    def give_back(self, permit: Permit) -> None:
        """A permit was not used."""
        with _held(self._lock):
            if (cell := self._cell(permit)) is None:
                return
            cells = self._cells
            cells[cell + self._most_cells] -= permit.amount
            cells[_USED] -= permit.amount
            cells[_TAT] -= permit.amount * self._interval

    def rest(self, seconds: float, now: float) -> None:
        """See `AnyLimit.rest`."""
        with _held(self._lock):
            self._cells[_REST_UNTIL] = max(self._cells[_REST_UNTIL], now + seconds)

    def watch(self, pace: "Pace") -> None:
        """See `AnyLimit.watch`: who waits looks again when it was told to."""

    # ------------------------------------------------------------------------------------------------------

    def _wait(self, amount: int, now: float) -> float:
        self._expire(now)
        cells, settings = self._cells, self.settings
        tolerance = (settings.burst - min(amount, settings.burst)) * self._interval
        by_rate = cells[_TAT] - tolerance - now
        missing = int(cells[_USED]) + amount - settings.count
        by_window = 0.0
        for position in range(int(cells[_CELLS])):
            if missing <= 0:
                break
            cell = self._at(position)
            missing -= int(cells[cell + self._most_cells])
            at = cells[cell]
            by_window = max(by_window, IN_FLIGHT_POLL_SECONDS if at < 0 else at + self._window_seconds - now)
        # A sum of intervals is not the period to the last digit.
        return max(by_rate if by_rate > 1e-9 else 0.0, by_window, cells[_REST_UNTIL] - now)

    def _expire(self, now: float) -> None:
        """Forget what has left the window."""
        cells = self._cells
        while cells[_CELLS]:
            cell = self._at(0)
            permits = cells[cell + self._most_cells]
            at = cells[cell]
            if permits and (-at if at < 0 else at + self._window_seconds) > now:
                return
            cells[_USED] -= permits
            cells[_FIRST] = (cells[_FIRST] + 1) % self._most_cells
            cells[_CELLS] -= 1

    def _note(self, amount: int, now: float) -> int:
        """Note permits in the window; the number of their cell."""
        cells, most = self._cells, self._most_cells
        if cells[_CELLS] == most:
            self._remove_empty()
        if cells[_CELLS] and self.settings.group > 1:
            cell = self._at(int(cells[_CELLS]) - 1)
            if cells[cell + most] + amount <= self.settings.group or cells[_CELLS] == most:
                cells[cell] = max(cells[cell], now)
                cells[cell + most] += amount
                return int(cells[cell + 2 * most])
        number = int(cells[_NEXT])
        cells[_NEXT] += 1
        cells[_CELLS] += 1
        cell = self._at(int(cells[_CELLS]) - 1)
        # Of a group, some would be in flight and others not.
        cells[cell] = now if self.settings.group > 1 else -(now + IN_FLIGHT_SECONDS)
        cells[cell + most] = amount
        cells[cell + 2 * most] = number
        return number

    def _remove_empty(self) -> None:
        """Remove the cells whose permits were all given back. Of groups there may be none; else there are some, as each
        of the others holds a permit."""
        cells, most = self._cells, self._most_cells
        kept = 0
        for position in range(int(cells[_CELLS])):
            cell = self._at(position)
            if cells[cell + most]:
                to = self._at(kept)
                for table in (0, most, 2 * most):
                    cells[to + table] = cells[cell + table]
                kept += 1
        cells[_CELLS] = kept

    def _at(self, position: int) -> int:
        """Where the time of a cell is; the oldest is at position 0."""
        return _HEAD + (int(self._cells[_FIRST]) + position) % self._most_cells

    def _cell(self, permit: Permit) -> int | None:
        """Where the time of its cell is; None: it has left the window."""
        cells, numbers = self._cells, 2 * self._most_cells
        position = bisect_left(
            range(int(cells[_CELLS])), permit.number, key=lambda position: int(cells[self._at(position) + numbers])
        )
        if position == cells[_CELLS] or cells[self._at(position) + numbers] != permit.number:
            return None
        return self._at(position)


class Locked:
    """A lock between processes that ends with its holder: a record lock (POSIX fcntl) on a file without a name."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __enter__(self) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_EX)

    def __exit__(self, *exception: object) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN)


@contextmanager
def _held(lock: Callable[[], Locked] | None) -> Iterator[None]:
    if lock is None:
        yield
    else:
        with lock():
            yield


class SharedLimits:
    """Limits in memory that is shared by the processes that are forked after it was made."""

    def __init__(self, settings: Sequence[LimitSettings]) -> None:
        import tempfile  # late: only several processes share limits

        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        cells = memoryview(mmap.mmap(-1, max(1, sum(one.table_cells for one in settings)) * 8)).cast("d")
        lock = Locked(descriptor)
        self.limits: dict[str, Limit] = {}
        first = 0
        for one in settings:
            table = cells[first : first + one.table_cells]
            self.limits[one.name] = Limit(one, table, lambda: lock)
            first += one.table_cells


def limits_of(settings: Sequence[LimitSettings]) -> dict[str, Limit]:
    """The limits of one process, by name."""
    return {one.name: Limit(one) for one in settings}


class WaitingMail:
    """A mail that asked a `Pace` for leave.

    Attributes:
        since: when it asked.
        held_by: the name of the limit that it waits, or waited, for; "" where it did not.
        permits: what it was given; none while it waits.
        is_waiting: neither given nor refused. `given_at`: when it was given leave.
        patience: a look when its time is over.
    """

    __slots__ = (
        "decided", "given_at", "held_by", "is_waiting", "patience", "permits", "recipients", "since", "until",
        "with_message",
    )  # fmt: skip

    def __init__(
        self, recipients: int, since: float, until: float, decided: Callable[[bool], None], *, with_message: bool
    ) -> None:
        self.recipients = recipients
        self.with_message = with_message
        self.since = since
        self.until = until
        self.decided = decided
        self.held_by = ""
        self.given_at = 0.0
        self.is_waiting = True
        self.permits: list[tuple[AnyLimit, Permit]] = []
        self.patience: asyncio.TimerHandle | None = None

    def ends(self) -> None:
        """It waits no more."""
        self.is_waiting = False
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

    def amount(self, limit: AnyLimit) -> int:
        """How many permits of a limit it needs."""
        return self.recipients if limit.settings.per_recipient else int(self.with_message)


class Pace:
    """The limits of one upstream, and the mails that wait for them, in their order.

    Args:
        limits: all of them hold.
        room_made: called when another mail may begin to wait.
    """

    def __init__(
        self,
        limits: Sequence[AnyLimit],
        room_made: Callable[[], None] = lambda: None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._room_made = room_made
        self._clock = clock
        self._waiting: deque[WaitingMail] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._rests = 0  # of which nothing got through since
        self._rested_at = -math.inf
        self.begun = 0  # deliveries that have begun and not ended, those that wait among them
        counts = [limit.settings.count for limit in limits if limit.settings.per_recipient]
        self.most_recipients = min(counts, default=None)
        self._answer_seconds = max((limit.answer_seconds for limit in limits), default=0.0)
        for limit in limits:
            limit.watch(self)

    def __repr__(self) -> str:
        return f"<Pace {list(self._limits)} {len(self._waiting)} waiting>"

    @property
    def counts_recipients(self) -> bool:
        """Whether a limit is per recipient."""
        return self.most_recipients is not None

    def concurrency(self, most: int) -> int:
        """How many deliveries may be under way, of those that `most` allows: no more than there are permits for, and
        one that waits for the next."""
        now = self._clock()
        available = min(limit.available(now) for limit in self._limits)
        return min(most, self.begun + max(0, available + 1 - len(self._waiting)))

    def ask(
        self, recipients: int, patience_seconds: float, decided: Callable[[bool], None], *, with_message: bool
    ) -> WaitingMail | None:
        """Ask for leave.

        Args:
            recipients: how many, at most `most_recipients`.
            patience_seconds: after which leave is refused.
            decided: called when leave is given (True) or refused.
            with_message: a new message, too; else more recipients of one.

        Returns:
            What was given, or waits; None: leave is refused at once, as it would be after all of the patience.
        """
        now = self._clock()
        patience_seconds = max(patience_seconds, self._answer_seconds)
        waiting = WaitingMail(recipients, now, now + patience_seconds, decided, with_message=with_message)
        if not self._waiting:
            wait = self._take(waiting, now)
            if wait is None:
                return waiting
            if wait > patience_seconds:
                return None
            self._waiting.append(waiting)
            self._look_again(wait)
            if self._answer_seconds:
                self._look_after(waiting, patience_seconds)
        elif patience_seconds > 0:
            waiting.held_by = self._waiting[0].held_by
            self._waiting.append(waiting)
            self._look_after(waiting, patience_seconds)
        else:
            return None
        return waiting

    def withdraw(self, waiting: WaitingMail) -> None:
        """The mail is gone."""
        if waiting.is_waiting:
            waiting.ends()
            self._waiting.remove(waiting)
            self.look()
        else:
            self.give_back(waiting)

    def landed(self, waiting: WaitingMail) -> None:
        """It has come to its end."""
        now = self._clock()
        for limit, permit in waiting.permits:
            limit.landed(permit, now)
        waiting.permits = []
        if self._waiting:
            self.look()

    def wanted(self, limit: AnyLimit) -> tuple[int, int]:
        """How many permits of a limit the first mail needs that waits for it, and all that wait."""
        if not self._waiting or self._waiting[0].held_by != limit.settings.name:
            return 0, 0
        return self._waiting[0].amount(limit), sum(one.amount(limit) for one in self._waiting)

    def is_too_much(self, waiting: WaitingMail) -> float | None:
        """The provider says that it gets too much: nothing leaves for a while.

        Args:
            waiting: the mail that it said so of.

        Returns:
            For how many seconds; None: it left before we knew, and nothing new follows.
        """
        now = self._clock()
        if waiting.given_at <= self._rested_at:
            return None
        seconds = min(LONGEST_REST_SECONDS, FIRST_REST_SECONDS * 2.0**self._rests)
        self._rests = min(self._rests + 1, 10)
        self._rested_at = now
        self._limits[0].rest(seconds, now)  # all must give leave, and others may be of other upstreams too
        return seconds

    def got_through(self) -> None:
        """The provider took something."""
        self._rests = 0

    def give_back(self, waiting: WaitingMail) -> None:
        """Nothing of it has left."""
        for limit, permit in waiting.permits:
            limit.give_back(permit)
        waiting.permits = []

    def close(self) -> None:
        """Nobody is given leave any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------------------------------------------

    def _take(self, waiting: WaitingMail, now: float) -> float | None:
        """Take permits of all limits, or of none: then how long to wait."""
        for limit in self._limits:
            amount = waiting.amount(limit)
            taken = limit.take(amount, now) if amount else None
            if isinstance(taken, float):
                self.give_back(waiting)
                waiting.held_by = limit.settings.name
                return taken
            if taken is not None:
                waiting.permits.append((limit, taken))
        waiting.ends()
        waiting.given_at = now
        return None

    def look(self) -> None:
        """Serve those that wait, as far as there are permits."""
        self.close()
        now = self._clock()
        refused = [one for one in self._waiting if one.until <= now]
        given: list[WaitingMail] = []
        for one in refused:
            one.ends()
            self._waiting.remove(one)
        while self._waiting:
            wait = self._take(self._waiting[0], now)
            if wait is not None:
                self._look_again(wait)
                break
            given.append(self._waiting.popleft())
        # They may ask again within the call.
        for one in given:
            one.decided(True)
        for one in refused:
            one.decided(False)
        if given or refused:
            self._room_made()

    def _look_after(self, waiting: WaitingMail, patience_seconds: float) -> None:
        if patience_seconds < math.inf:
            waiting.patience = asyncio.get_running_loop().call_later(patience_seconds, self.look)

    def _look_again(self, wait_seconds: float) -> None:
        self.close()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(min(max(wait_seconds, CONTEND_SECONDS), 3600.0), self.look)
