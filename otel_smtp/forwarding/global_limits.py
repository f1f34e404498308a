"""Limits that several gateways keep together, in the database of their queue.

A gateway takes permits there for the mails that wait for them, one claim at a time for each limit, and tells with each
claim what has landed since the last. It reports all it has in flight as a whole; so a claim whose answer was lost
leaves nothing behind but permits that stay unused until the next one. Unknown use counts as use: a limit is never
exceeded to make up for a failure.

Permits belong to the gateway as long as it is known to live. One that was silent for too long was declared dead, and
what it had in flight has landed there: what it has in stock is void, and what it still has in flight counts again.
"""

import asyncio
import time
import weakref
from collections.abc import Callable
from typing import Final

from otel_smtp.forwarding.base import Claim, Grant, LimitLedger
from otel_smtp.forwarding.limits import LimitSettings, Permit
from otel_smtp.forwarding.pace import Pace

ANSWER_SECONDS: Final = 1.0
"""How long a client's mail waits to learn whether there is a permit: as long as a database may take."""
AWAY_SECONDS: Final = 0.5
"""Between two claims while the database does not answer."""
STOCK_SECONDS: Final = 2.0
"""How long a permit is kept for which there is no mail any more: one that waits for another limit may need it yet."""


class GlobalLimit:
    """One limit of several gateways.

    Args:
        ledger: where it is kept.
    """

    answer_seconds = ANSWER_SECONDS

    def __init__(
        self, settings: LimitSettings, ledger: LimitLedger, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings
        self._ledger = ledger
        self._clock = clock
        self._interval = settings.period_seconds / settings.count
        self._paces: weakref.WeakSet[Pace] = weakref.WeakSet()
        self._term: object | None = None
        self._stock = 0  # taken there, and not used here
        self._stocked_at = 0.0
        self._in_use = 0
        self._landed = 0  # and not reported yet
        self._rest_seconds = 0.0  # to be reported
        self._rest_until = 0.0
        self._not_before = 0.0
        self._known = (0.0, settings.burst)  # when how many more were available
        self._claiming: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<GlobalLimit {self.settings.name} {self._stock} in stock, {self._in_use} in use>"

    def watch(self, pace: Pace) -> None:
        """See `AnyLimit.watch`."""
        self._paces.add(pace)

    def take(self, amount: int, now: float) -> Permit | float:
        """See `Limit.take`. Where there are none in stock, they are requested, and the waiters are notified."""
        if now >= self._rest_until and self._is_ours() and self._stock >= amount:
            self._stock -= amount
            self._in_use += amount
            return Permit(0, amount, now)
        if now < self._not_before:
            return self._not_before - now
        self._soon()
        return ANSWER_SECONDS

    def available(self, now: float) -> int:
        """How many permits there probably are: others take them too."""
        if now < self._not_before:
            return self._stock if now >= self._rest_until else 0
        at, known = self._known
        return self._stock + min(self.settings.burst, known + int((now - at) / self._interval))

    def landed(self, permit: Permit, now: float) -> None:
        """See `Limit.landed`."""
        self._in_use -= permit.amount
        self._landed += permit.amount
        self._soon()

    def give_back(self, permit: Permit) -> None:
        """See `Limit.give_back`."""
        self._in_use -= permit.amount
        if self._is_ours():
            self._stock += permit.amount
            self._stocked_at = self._clock()
        self._soon()

    def rest(self, seconds: float, now: float) -> None:
        """See `AnyLimit.rest`: no gateway is to send anything for so long."""
        self._rest_seconds = max(self._rest_seconds, seconds)
        self._rest_until = max(self._rest_until, now + seconds)
        self._not_before = max(self._not_before, now + seconds)
        self._soon()

    async def told(self) -> None:
        """Wait until everything that is due has been reported."""
        if self._claiming is not None:
            await asyncio.wait([self._claiming])

    # ------------------------------------------------------------------------------------------------------

    def _is_ours(self) -> bool:
        """Whether the permits in stock are valid for us; invalid ones are discarded."""
        term = self._ledger.term()
        if term is None:
            return False
        if term != self._term:
            self._term = term
            self._stock = 0
        return True

    def _soon(self) -> None:
        """Claim, if that is worth it, as soon as no claim is under way."""
        if self._claiming is None:
            self._claiming = asyncio.get_running_loop().create_task(self._claim_all())

    def _later(self, seconds: float) -> None:
        if self._again is not None:
            self._again.cancel()
        self._again = asyncio.get_running_loop().call_later(seconds, self._soon)

    async def _claim_all(self) -> None:
        try:
            while (claim := self._next_claim()) is not None:
                grant = await self._ledger.settle(claim)
                if grant is None:
                    # Permits that were given back may be there twice now: rather not.
                    self._not_before = self._clock() + AWAY_SECONDS
                    self._later(AWAY_SECONDS)
                    return
                self._landed -= claim.landed
                if claim.rest_seconds >= self._rest_seconds:
                    self._rest_seconds = 0.0
                self._take_in(grant)
                for pace in list(self._paces):
                    pace.look()
        finally:
            self._claiming = None

    def _take_in(self, grant: Grant) -> None:
        now = self._clock()
        self._known = now, grant.available
        if grant.granted and self._is_ours():
            self._stock += grant.granted
            self._stocked_at = now
        if grant.wait_seconds > 0:
            self._not_before = now + grant.wait_seconds

    def _next_claim(self) -> Claim | None:
        """What is to be said now; None: nothing."""
        now = self._clock()
        least, wanted = self._wanted(now)
        if not self._is_ours():
            if least or self._landed:
                self._later(AWAY_SECONDS)
            return None
        unused = 0
        if self._stock and not least:
            if now - self._stocked_at >= STOCK_SECONDS:
                unused, self._stock = self._stock, 0
            else:
                self._later(STOCK_SECONDS)
        if not (least or unused or self._landed or self._rest_seconds):
            return None
        one = self.settings
        return Claim(
            one.name, one.count, one.period_seconds, one.burst, one.per_recipient, self._stock + self._in_use,
            self._landed, unused, least, wanted, self._rest_seconds,
        )  # fmt: skip

    def _wanted(self, now: float) -> tuple[int, int]:
        """Permits that somebody waits for, beyond what is in stock: of the first mail, and of all."""
        if now < self._not_before:
            return 0, 0
        waiting = [pace.wanted(self) for pace in self._paces]
        least = max((first for first, _ in waiting), default=0) - self._stock
        if least <= 0:
            return 0, 0
        return least, max(least, sum(all_ for _, all_ in waiting) - self._stock)
