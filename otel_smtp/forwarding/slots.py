"""Connection slots: a limit on connections to an upstream, shared by all processes that use it.

A connection needs a slot from before it is opened until the upstream has noticed its end. Here slots are kept in memory
that the workers of a gateway may share, under a lock; gateways that share a queue keep them in its database, see
`global_slots`. A process that wants slots and gets none says so; others then pass idle ones on, and none is kept for
longer than a turn. The slots of a dead worker go to the others.

Times are by the monotonic clock, which processes share.
"""

import asyncio
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

from otel_smtp.forwarding.ceiling import is_alive
from otel_smtp.forwarding.limits import Locked

TURN_MESSAGES: Final = 100
"""After this many messages on a connection its slot is given back, so that others have a turn."""
TURN_SECONDS: Final = 10.0
"""Likewise, while others wait: a slow upstream may need minutes for that many messages."""
IDLE_SECONDS: Final = 5.0
"""How long a slot is kept for an idle connection while no other process wants it."""
LINGERING_SECONDS: Final = 1.0
"""How long the upstream may still count a connection after it was broken off."""
PAUSE_SECONDS: Final = 0.5
"""After giving a slot back for others, how long to wait before taking one again: they must notice first."""
LOOK_AGAIN_SECONDS: Final = 0.1
"""Between two looks for slots that other processes have given back."""
WISH_SECONDS: Final = 2.0
"""How long a request counts without being repeated."""


@dataclass(frozen=True, slots=True)
class SlotSettings:
    """The slots of one upstream.

    Attributes:
        name: of the upstream.
    """

    name: str
    total: int


class SlotUser(Protocol):
    """An opener of connections."""

    def wanted_slots(self) -> int:
        """How many more slots could be used now."""
        ...

    def look(self) -> None:
        """There may be slots."""
        ...


class AnySlots(Protocol):
    """The interface of an upstream's slots for its pool, wherever they are kept."""

    @property
    def held(self) -> int:
        """How many slots are ours, with or without a connection."""
        ...

    def take(self, now: float) -> bool:
        """Take a slot for a connection about to be opened; if there is none, `look` is called later."""
        ...

    def put_back(self, now: float) -> None:
        """The connection was not opened after all."""
        ...

    def give_back(self, now: float, *, lingers: bool) -> None:
        """The connection is gone.

        Args:
            lingers: the upstream may not have noticed yet.
        """
        ...

    def are_wanted(self, now: float) -> bool:
        """Whether others wait for slots."""
        ...

    def are_ours(self) -> bool:
        """Whether the slots of our connections are certainly ours."""
        ...

    def watch(self, user: SlotUser) -> None:
        """Notify this opener when there may be slots."""
        ...

    async def wait_reported(self) -> None:
        """Wait until others can take all slots given back."""
        ...


# The head of a table, then two numbers for each slot: the process that has it, or 0; and when it becomes free.
_WANTED_BY, _WANTED_UNTIL, _HEAD = 0, 1, 2
_OWNER, _FREE_FROM, _SLOT = 0, 1, 2


def table_cells(settings: SlotSettings) -> int:
    """Numbers in memory."""
    return _HEAD + _SLOT * settings.total


class Slots:
    """The slots of one upstream, in memory.

    Args:
        cells: `table_cells` numbers, initially 0; None: private ones.
        lock: guards them, if processes share them.
    """

    def __init__(
        self,
        settings: SlotSettings,
        cells: "memoryview[float] | None" = None,
        lock: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.settings = settings
        self._cells = cells if cells is not None else memoryview(bytearray(8 * table_cells(settings))).cast("d")
        self._lock = lock
        self._users: weakref.WeakSet[SlotUser] = weakref.WeakSet()
        self._not_before = 0.0
        self._again: asyncio.TimerHandle | None = None
        self.held = 0

    def __repr__(self) -> str:
        return f"<Slots {self.settings.name} {self.held} of {self.settings.total}>"

    def take(self, now: float) -> bool:
        """See `AnySlots.take`."""
        with self._lock():
            if now >= self._not_before and (slot := self._free(now)) is not None:
                self._cells[slot + _OWNER] = os.getpid()
                self.held += 1
                return True
            # An opener with slots does not count for those without.
            if not (self.held and self.are_wanted(now)):
                self._cells[_WANTED_BY], self._cells[_WANTED_UNTIL] = os.getpid(), now + WISH_SECONDS
        self._look_again()
        return False

    def put_back(self, now: float) -> None:
        """See `AnySlots.put_back`."""
        self._give_back(now, now)

    def give_back(self, now: float, *, lingers: bool) -> None:
        """See `AnySlots.give_back`."""
        if self.are_wanted(now):
            self._not_before = now + PAUSE_SECONDS
        self._give_back(now, now + LINGERING_SECONDS if lingers else now)
        if any(user.wanted_slots() for user in self._users):
            self._look_again()

    def _give_back(self, now: float, free_from: float) -> None:
        mine = os.getpid()
        with self._lock():
            slot = next(slot for slot in self._slots() if self._cells[slot + _OWNER] == mine)
            self._cells[slot + _OWNER], self._cells[slot + _FREE_FROM] = 0, free_from
        self.held -= 1

    def are_wanted(self, now: float) -> bool:
        """See `AnySlots.are_wanted`."""
        return self._cells[_WANTED_UNTIL] > now and self._cells[_WANTED_BY] != os.getpid()

    def are_ours(self) -> bool:
        """See `AnySlots.are_ours`."""
        return True

    def watch(self, user: SlotUser) -> None:
        """See `AnySlots.watch`."""
        self._users.add(user)

    async def wait_reported(self) -> None:
        """See `AnySlots.wait_reported`."""

    # ------------------------------------------------------------------------------------------------------

    def _slots(self) -> range:
        return range(_HEAD, len(self._cells), _SLOT)

    def _free(self, now: float) -> int | None:
        """A slot that can be taken."""
        cells = self._cells
        for slot in self._slots():
            owner = int(cells[slot + _OWNER])
            if owner not in (0, os.getpid()) and not is_alive(owner):
                owner = 0
                cells[slot + _OWNER], cells[slot + _FREE_FROM] = 0, now + LINGERING_SECONDS
            if not owner and cells[slot + _FREE_FROM] <= now:
                return slot
        return None

    def _look_again(self) -> None:
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(LOOK_AGAIN_SECONDS, self._look)

    def _look(self) -> None:
        self._again = None
        for user in list(self._users):
            user.look()


class SharedSlots:
    """Slots in memory shared with processes forked later."""

    def __init__(self, settings: Sequence[SlotSettings]) -> None:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        cells = memoryview(mmap.mmap(-1, max(1, sum(map(table_cells, settings))) * 8)).cast("d")
        lock = Locked(descriptor)
        self.slots: dict[str, Slots] = {}
        first = 0
        for one in settings:
            self.slots[one.name] = Slots(one, cells[first : first + table_cells(one)], lambda: lock)
            first += table_cells(one)


def slots_of(settings: Sequence[SlotSettings]) -> Mapping[str, AnySlots]:
    """The slots of one process, by the upstreams' names."""
    return {one.name: Slots(one) for one in settings}
