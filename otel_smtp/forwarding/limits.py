"""Rate limits set by a provider: per second, minute, hour or day.

Theory of operation
-------------------
A limit combines two rules, and a permit needs both.

* GCRA (the leaky bucket as a virtual schedule, ITU-T I.371): one number, the theoretical arrival time, moves by one
  interval with each permit, and may run ahead of the clock by as much as the burst. So mail is spread evenly.
* A sliding window: the last period never has more permits than the rate allows. GCRA alone lets a burst pass and then
  the full rate, which is too much for a provider that counts per minute.

A permit follows the provider's view: it is in flight, and counts, until the provider has answered, or the attempt has
ended otherwise (`Limit.landed`), and leaves the window one period later. The time of sending says little: content may
stay in a socket for a while. An unused permit is given back (`Limit.give_back`).

All numbers are in memory that processes can share, under a lock that the kernel releases when its holder dies. So the
workers of a gateway share a limit exactly. Times are by the monotonic clock, which they share too. Gateways that share
a queue keep a limit in its database: see `global_limits`. A gateway with its queue in a directory saves the use of its
limits there, and resumes from it after a restart: see `gateway.kept_limits`.

If a provider still says that it gets too much, a limit rests: it gives no permits for a while, longer after each
repetition.

`pace` applies the limits to an upstream's mails.
"""

import fcntl
import math
import mmap
import os
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

MARGIN_SECONDS: Final = 0.05
"""How much longer a window is here than at the provider, since transit times vary."""
MOST_CELLS: Final = 32_768
"""Cells of a full window. A higher rate is counted in groups, which leave the window with their last permit."""
MOST_KEPT_CELLS: Final = 256
"""Of a `LimitState`."""
IN_FLIGHT_SECONDS: Final = 1200.0
"""After this a permit counts as used whatever happens: as long as a client may take for its content."""
IN_FLIGHT_POLL_SECONDS: Final = 0.05
"""How often to check a permit that another process has in flight."""

# The head of a limit's table, then a ring of cells three times: their times, their permits, their numbers.
_TAT, _FIRST, _CELLS, _USED, _NEXT, _REST_UNTIL, _HEAD = 0, 1, 2, 3, 4, 5, 6
_IN_FLIGHT: Final = 2.0**40  # is added to the time until which a permit is in flight


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """One limit.

    Attributes:
        count, period_seconds: this many permits per period.
        burst: permits that may be taken at once, at most `count`.
        per_recipient: a permit is for a recipient, otherwise for a message.
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
        """Cells of a window: twice what permits can fill, so that cells of returned permits are seldom removed."""
        return 2 * (self.count // self.group + 2)


class LimitState(NamedTuple):
    """The use of a limit at some moment.

    Attributes:
        ahead_seconds: how far the theoretical arrival time is in the future.
        rest_seconds: for how long it still rests.
        in_flight: permits whose mail has not ended.
        used: the permits of the last period, in groups: age of the youngest, in seconds, and how many.
    """

    ahead_seconds: float
    rest_seconds: float
    in_flight: int
    used: tuple[tuple[float, int], ...]


class Permit:
    """Permits taken from a limit."""

    __slots__ = ("amount", "number", "taken_at")

    def __init__(self, number: int, amount: int, taken_at: float) -> None:
        self.number = number  # of its cell, among all there ever were
        self.amount = amount
        self.taken_at = taken_at


class Limit:
    """One limit; every method is one critical section. Callers pass the time.

    Args:
        cells: `settings.table_cells` numbers, initially 0; None: private ones.
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
            amount: at most `settings.count`; more than the burst is given once the whole burst is available.

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
        """The permit's mail has ended."""
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

    def watch(self, pace: object) -> None:
        """See `AnyLimit.watch`: a waiter looks again when it is notified."""

    def state(self, now: float) -> LimitState:
        """How far it is used up."""
        with _held(self._lock):
            self._expire(now)
            cells, in_flight = self._cells, 0
            used: list[tuple[float, int]] = []
            times, amounts = self._in_order(0), self._in_order(self._most_cells)
            size = max(1, -(-len(times) // MOST_KEPT_CELLS))
            for first in range(0, len(times), size):
                noted_at, noted = times[first : first + size], amounts[first : first + size]
                if max(noted_at) >= _IN_FLIGHT:
                    both = [*zip(noted_at, noted, strict=True)]
                    in_flight += int(sum(amount for at, amount in both if at >= _IN_FLIGHT))
                    noted_at = [at for at in noted_at if at < _IN_FLIGHT]
                    noted = [amount for at, amount in both if at < _IN_FLIGHT]
                if noted:
                    used.append((now - max(noted_at), int(sum(noted))))
            return LimitState(max(0.0, cells[_TAT] - now), max(0.0, cells[_REST_UNTIL] - now), in_flight, tuple(used))

    def resume(self, state: LimitState, elapsed: float, unknown: int, now: float) -> None:
        """Resume from the state of another process. Unknown use counts as use now.

        Args:
            state: that of the other process `elapsed` seconds ago.
            unknown: permits that it may have taken since then.
        """
        with _held(self._lock):
            cells, settings = self._cells, self.settings
            for age, permits in sorted(state.used, reverse=True):
                if age + elapsed < self._window_seconds:
                    self._note_used(permits, now - elapsed - age)
            self._note_used(state.in_flight + unknown, now)
            ahead = max(0.0, state.ahead_seconds - elapsed) + unknown * self._interval
            cells[_TAT] = now + min(ahead, settings.burst * self._interval)
            cells[_REST_UNTIL] = now + max(0.0, state.rest_seconds - elapsed)

    def _note_used(self, permits: int, at: float) -> None:
        permits = min(permits, self.settings.count - int(self._cells[_USED]))
        if permits > 0:
            self._cells[_USED] += permits
            self._note(permits, at)
            self._cells[self._at(int(self._cells[_CELLS]) - 1)] = at

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
            by_window = max(by_window, IN_FLIGHT_POLL_SECONDS if at >= _IN_FLIGHT else at + self._window_seconds - now)
        # A sum of intervals differs from the period in the last digit.
        return max(by_rate if by_rate > 1e-9 else 0.0, by_window, cells[_REST_UNTIL] - now)

    def _expire(self, now: float) -> None:
        """Forget permits that have left the window."""
        cells = self._cells
        while cells[_CELLS]:
            cell = self._at(0)
            permits = cells[cell + self._most_cells]
            at = cells[cell]
            if permits and (at - _IN_FLIGHT if at >= _IN_FLIGHT else at + self._window_seconds) > now:
                return
            cells[_USED] -= permits
            cells[_FIRST] = (cells[_FIRST] + 1) % self._most_cells
            cells[_CELLS] -= 1

    def _note(self, amount: int, now: float) -> int:
        """Note permits in the window; returns the number of their cell."""
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
        # Some permits of a group would be in flight and others not.
        cells[cell] = now if self.settings.group > 1 else now + IN_FLIGHT_SECONDS + _IN_FLIGHT
        cells[cell + most] = amount
        cells[cell + 2 * most] = number
        return number

    def _remove_empty(self) -> None:
        """Remove the cells whose permits were all given back. With groups there may be none; otherwise there are some,
        as every other cell holds a permit.
        """
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
        """The index of a cell's time; the oldest cell is at position 0."""
        return _HEAD + (int(self._cells[_FIRST]) + position) % self._most_cells

    def _in_order(self, table: int) -> list[float]:
        """The numbers of one table, oldest cell first, read in few steps: there may be thousands of them."""
        begin, count = int(self._cells[_FIRST]), int(self._cells[_CELLS])
        table += _HEAD
        until_end = min(count, self._most_cells - begin)
        return [
            *self._cells[table + begin : table + begin + until_end].tolist(),
            *self._cells[table : table + count - until_end].tolist(),
        ]

    def _cell(self, permit: Permit) -> int | None:
        """The index of its cell's time; None: it has left the window."""
        cells, numbers = self._cells, 2 * self._most_cells
        position = bisect_left(
            range(int(cells[_CELLS])), permit.number, key=lambda position: int(cells[self._at(position) + numbers])
        )
        if position == cells[_CELLS] or cells[self._at(position) + numbers] != permit.number:
            return None
        return self._at(position)


class Locked:
    """A lock between processes that is released if its holder dies: a record lock (POSIX fcntl) on an unnamed file."""

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
    """Limits in memory shared with processes forked later."""

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
