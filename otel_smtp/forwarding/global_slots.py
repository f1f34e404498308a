"""Connection slots shared by several gateways, in the database of their queue.

A gateway takes slots there for mails that wait for a connection, and gives back slots that it no longer needs. If the
database connection breaks, it gives them back again until that is known to have worked, and the next call finds slots
taken meanwhile among its own. Gateways notify each other when they wait or have given slots back, so none has to poll
often.

Slots belong to the gateway while it is known to be alive. A gateway that was silent for too long was declared dead, and
its slots went to the others: it opens no connection until it has fewer open than new slots.
"""

import asyncio
import time
import weakref
from collections.abc import Callable
from typing import Final

from otel_smtp.forwarding.base import HeldSlot, SlotLedger
from otel_smtp.forwarding.slots import LINGERING_SECONDS, PAUSE_SECONDS, WISH_SECONDS, SlotSettings, SlotUser

AWAY_SECONDS: Final = 0.5
"""Between two calls while the database does not answer."""
POLL_SECONDS: Final = 1.0
"""Between two calls while slots are wanted and none has been given back."""


class GlobalSlots:
    """The slots of one upstream.

    Args:
        ledger: where they are kept.
    """

    def __init__(
        self, settings: SlotSettings, ledger: SlotLedger, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self._ledger = ledger
        self._clock = clock
        self._users: weakref.WeakSet[SlotUser] = weakref.WeakSet()
        self._term: object | None = None
        self._ours: set[HeldSlot] = set()
        self._releasing: set[HeldSlot] = set()  # of this term; reported, but perhaps not received
        self._in_use = 0
        self._lingering: list[float] = []  # until when the upstream may count closed connections
        self._not_before = 0.0
        self._wanted_until = 0.0
        self._calling: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None
        self._is_due = False
        ledger.watch_slots(settings.name, self._heard)

    def __repr__(self) -> str:
        return f"<GlobalSlots {self.settings.name} {len(self._ours)} of {self.settings.total}, {self._in_use} in use>"

    @property
    def held(self) -> int:
        """See `AnySlots`."""
        return len(self._ours)

    def take(self, now: float) -> bool:
        """See `AnySlots.take`."""
        if now >= self._not_before and self._is_current() and self._unused(now) > 0:
            self._in_use += 1
            return True
        self._soon()
        return False

    def put_back(self, now: float) -> None:
        """See `AnySlots.put_back`."""
        self._in_use -= 1
        self._soon()

    def give_back(self, now: float, *, lingers: bool) -> None:
        """See `AnySlots.give_back`."""
        self._in_use -= 1
        if lingers:
            self._lingering.append(now + LINGERING_SECONDS)
        if self.are_wanted(now):
            self._not_before = now + PAUSE_SECONDS
        self._soon()

    def are_wanted(self, now: float) -> bool:
        """See `AnySlots.are_wanted`."""
        return now < self._wanted_until

    def are_ours(self) -> bool:
        """See `AnySlots.are_ours`."""
        return self._is_current() and self._in_use <= len(self._ours)

    def watch(self, user: SlotUser) -> None:
        """See `AnySlots.watch`."""
        self._users.add(user)

    async def wait_reported(self) -> None:
        """See `AnySlots.wait_reported`."""
        self._not_before = self._clock() + PAUSE_SECONDS
        self._soon()
        while self._calling is not None:
            await asyncio.wait([self._calling])

    # ------------------------------------------------------------------------------------------------------

    def _heard(self, *, is_wish: bool) -> None:
        """Another gateway waits for slots, or has given some back."""
        if is_wish:
            self._wanted_until = self._clock() + WISH_SECONDS
            for user in list(self._users):
                user.look()  # it may have idle connections
            self._soon()
        elif self._wanted():
            self._soon()

    def _is_current(self) -> bool:
        """Whether our knowledge of our slots is current."""
        term = self._ledger.term()
        if term is None:
            return False
        if term != self._term:
            self._term = term
            self._ours, self._releasing = set(), set()
        return True

    def _unused(self, now: float) -> int:
        self._lingering = [until for until in self._lingering if until > now]
        return len(self._ours) - self._in_use - len(self._lingering)

    def _wanted(self) -> int:
        return sum(user.wanted_slots() for user in self._users)

    def _soon(self) -> None:
        """Call, if useful, as soon as no call is under way."""
        self._is_due = True
        if self._calling is None:
            self._calling = asyncio.get_running_loop().create_task(self._call_all())

    def _later(self, seconds: float) -> None:
        if self._again is not None:
            self._again.cancel()
        self._again = asyncio.get_running_loop().call_later(seconds, self._soon)

    async def _call_all(self) -> None:
        try:
            while self._is_due:
                self._is_due = False
                await self._call()
        finally:
            self._calling = None

    async def _call(self) -> None:
        now = self._clock()
        wanted = self._wanted()
        if not self._is_current():
            if wanted or self._in_use:
                self._later(AWAY_SECONDS)
            return
        unused = self._unused(now)
        if self._lingering:
            self._later(max(0.01, min(self._lingering) - now))
        # A gateway that has had its turn keeps none in stock.
        surplus = unused if now < self._not_before else unused - wanted
        for _ in range(max(0, surplus)):
            self._releasing.add(self._ours.pop())
        lacking = 0 if surplus >= 0 else -surplus
        if lacking and self.are_wanted(now):
            lacking = 1
        if now < self._not_before:
            lacking = 0
            if wanted:
                self._later(self._not_before - now)
        if not (self._releasing or lacking):
            return
        term, releasing = self._term, frozenset(self._releasing)
        ours = await self._ledger.hold(self.settings.name, self.settings.total, releasing, lacking)
        if ours is None:
            self._later(AWAY_SECONDS)
            return
        if not self._is_current() or self._term != term:
            self._soon()
            return
        self._releasing -= releasing
        had = len(self._ours)
        self._ours = set(ours) - self._releasing
        if len(self._ours) - had < lacking:
            self._later(POLL_SECONDS)
        if lacking or len(self._ours) > had:
            for user in list(self._users):
                user.look()
            if self._unused(self._clock()) > 0:
                self._is_due = True
