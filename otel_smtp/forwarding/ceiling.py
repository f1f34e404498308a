"""The connection cap of one upstream, learnt from refused connections.

An upstream that caps connections does not announce the number; it refuses the next one. The number open at that moment
is its ceiling. It is remembered, and probed with one more connection from time to time: rarely, if that is refused.

The workers of one gateway share the ceiling and the connections below it: each gets an equal part, and if there are
fewer connections than workers that want one, they take turns. They share a few numbers in memory that their parent
allocated before forking. Each worker writes its own column; all write the head of the table. There is no lock: a lost
update costs one more refused connection, and no mail.

All times are by the monotonic clock, which all processes of a machine share.
"""

import math
import mmap
import os
from collections.abc import Sequence
from typing import Final

FIRST_PROBE_SECONDS: Final = 10.0
"""From learning a ceiling until one more connection is tried; doubled each time that it is refused, and halved each
time that it is accepted: a ceiling learnt from a passing fault is soon forgotten.
"""
SHORTEST_PROBE_SECONDS: Final = 1.0
LONGEST_PROBE_SECONDS: Final = 600.0
WORKS_SECONDS: Final = 60.0
"""An upstream works if a connection to it is open, and it sent something within this time: a reply to a message may
take a while, and connections to a vanished host stay open.
"""
TURN_SECONDS: Final = 2.0
"""How long a worker's turn lasts if there is not one connection for each."""
LINGERING_SECONDS: Final = 1.0
"""After a connection was closed, how long the upstream may still count it."""
HANDED_ON_SECONDS: Final = 0.1
"""Between one worker's closing a connection and another's opening one: the upstream must notice first."""

# The head of the table, then the columns.
_LEVEL, _PROBE_AT, _PROBE_SECONDS, _HEAD = 0, 1, 2, 3
_OPEN, _OPENING, _WAITING, _HEARD_AT, _CLOSED_AT, _COLUMN = 0, 1, 2, 3, 4, 5


class SharedCeilings:
    """The memory for the ceilings of several upstreams, shared with processes forked later.

    Args:
        upstreams: their names.
        workers: their number.
    """

    def __init__(self, upstreams: Sequence[str], workers: int) -> None:
        self._upstreams = upstreams
        self._workers = workers
        # A worker and its successor coexist, so each place has two columns.
        self._columns = 2 * workers
        self._table_cells = _HEAD + self._columns * _COLUMN
        cells = self._columns + len(upstreams) * self._table_cells
        self._cells = memoryview(mmap.mmap(-1, cells * 8)).cast("d")  # the first cells are process ids

    def claim(self, place: int) -> "dict[str, Ceiling]":
        """Claim a column for the calling worker; returns its ceilings by upstream name. The column is free again once
        the process has gone.

        Args:
            place: of the worker, from 0.
        """
        free = (column for column in (place, self._workers + place) if not is_alive(int(self._cells[column])))
        column = next(free, place)
        self._cells[column] = os.getpid()
        ceilings = {}
        tables = range(self._columns, len(self._cells), self._table_cells)
        for name, first in zip(self._upstreams, tables, strict=True):
            ceiling = Ceiling(self._cells[first : first + self._table_cells], column)
            ceiling.forget_column()
            ceilings[name] = ceiling
        return ceilings


def is_alive(process_id: int) -> bool:
    """Whether another process with this id exists."""
    if process_id in (0, os.getpid()):
        return False
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Ceiling:
    """The ceiling of one upstream, and our share of it. Callers pass the time.

    Args:
        cells: a table of 64-bit floating-point numbers, shared with other processes; None: a private one.
        column: ours.

    Attributes:
        is_shared: there may be other workers.
    """

    __slots__ = ("_cells", "_first", "_is_probing", "is_shared")

    def __init__(self, cells: "memoryview[float] | None" = None, column: int = 0) -> None:
        self._cells = cells if cells is not None else memoryview(bytearray(8 * (_HEAD + _COLUMN))).cast("d")
        self._first = _HEAD + column * _COLUMN
        self.is_shared = len(self._cells) > _HEAD + _COLUMN
        self._is_probing = False

    def __repr__(self) -> str:
        return f"<Ceiling {self.level}, {self._sum(_OPEN):.0f} open, {self._sum(_OPENING):.0f} opening>"

    @property
    def level(self) -> float:
        """The most connections that it accepts from all workers together; infinity while it has refused none."""
        return self._cells[_LEVEL] or math.inf

    def forget_column(self) -> None:
        """Clear our column: nothing is open here yet."""
        self.note(0, 0, 0, 0.0)
        self._cells[self._first + _CLOSED_AT] = 0.0

    def note(self, open_: int, opening: int, waiting: int, heard_at: float) -> None:
        """Note the state of this process.

        Args:
            open_, opening: connections.
            waiting: mails that wait for one.
            heard_at: when the upstream last sent something on one.
        """
        cells, first = self._cells, self._first
        cells[first + _OPEN] = open_
        cells[first + _OPENING] = opening
        cells[first + _WAITING] = waiting
        cells[first + _HEARD_AT] = heard_at

    def closed(self, now: float) -> None:
        """A connection was closed here."""
        self._cells[self._first + _CLOSED_AT] = now

    # Known ----------------------------------------------------------------------------------------

    def works(self, now: float) -> bool:
        """Whether the upstream serves connections, here or in another worker."""
        cells = self._cells
        return any(
            cells[first + _OPEN] > 0 and now - cells[first + _HEARD_AT] < WORKS_SECONDS for first in self._columns()
        )

    def may_count_closed(self, now: float) -> bool:
        """Whether it caps connections, and may not have noticed a recent close, here or in another worker."""
        if self.level == math.inf:
            return False
        return any(0 < self._cells[first + _CLOSED_AT] > now - LINGERING_SECONDS for first in self._columns())

    @property
    def is_opening(self) -> bool:
        """Whether a connection is being opened, here or in another worker."""
        return self._sum(_OPENING) > 0

    def share(self, now: float) -> float:
        """Our share of the connections: an equal part among the workers that have or want any."""
        level = self.level
        if not self.is_shared or level == math.inf:
            return level
        cells, mine = self._cells, self._first
        active = [
            first
            for first in self._columns()
            if first == mine or cells[first + _OPEN] or cells[first + _OPENING] or cells[first + _WAITING]
        ]
        each, rest = divmod(int(level), len(active))
        # If each worker has one, moving the remainder around at each turn gains nothing.
        turn = int(now / TURN_SECONDS) if each == 0 else 0
        return each + int((active.index(mine) + turn) % len(active) < rest)

    def allows(self, now: float) -> bool:
        """Whether one more connection may be opened here, given the state last passed to `note`.

        If only an attempt can tell, one is allowed now and then.
        """
        level = self.level
        if level == math.inf:
            return True
        cells, mine = self._cells, self._first
        if self._sum(_OPEN) + self._sum(_OPENING) < level:
            others = (first for first in self._columns() if first != mine)
            return cells[mine + _OPEN] + cells[mine + _OPENING] < self.share(now) and all(
                now - cells[first + _CLOSED_AT] >= HANDED_ON_SECONDS for first in others
            )
        if now < cells[_PROBE_AT]:
            return False
        cells[_PROBE_AT] = now + cells[_PROBE_SECONDS]
        self._is_probing = True
        return True

    # Learnt ---------------------------------------------------------------------------------------

    def opened(self, now: float) -> None:
        """One more connection was opened, and `note` has been called."""
        if self._sum(_OPEN) > self.level:
            seconds = min(FIRST_PROBE_SECONDS, self._cells[_PROBE_SECONDS]) / 2
            self._learn(self._sum(_OPEN), now, max(SHORTEST_PROBE_SECONDS, seconds))
        self._is_probing = False

    def refused(self, now: float, lingering: int = 0) -> None:
        """A connection was refused while others work; `note` no longer counts it.

        Args:
            lingering: connections closed so recently that the upstream may have counted them.
        """
        cells = self._cells
        level = max(1.0, self._sum(_OPEN) + self._sum(_OPENING) + lingering)
        if level < self.level:
            self._learn(level, now, FIRST_PROBE_SECONDS)
        elif self._is_probing:
            seconds = max(FIRST_PROBE_SECONDS, cells[_PROBE_SECONDS] * 2)
            self._learn(self.level, now, min(LONGEST_PROBE_SECONDS, seconds))
        self._is_probing = False

    def _learn(self, level: float, now: float, probe_seconds: float) -> None:
        cells = self._cells
        cells[_LEVEL] = level
        cells[_PROBE_SECONDS] = probe_seconds
        cells[_PROBE_AT] = now + probe_seconds

    def _columns(self) -> range:
        return range(_HEAD, len(self._cells), _COLUMN)

    def _sum(self, row: int) -> float:
        return sum(self._cells[first + row] for first in self._columns())
