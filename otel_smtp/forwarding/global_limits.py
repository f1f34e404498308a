"""Limits shared by several gateways, in the database of their queue.

A gateway takes permits there for waiting mails, one claim at a time for each limit, and reports with each claim what
has landed since the last. It reports all its permits in flight together; so a claim whose answer was lost leaves behind
only permits that stay unused until the next one. Unknown use counts as use: a limit is never exceeded to make up for a
failure.

Permits belong to the gateway while it is known to be alive. A gateway that was silent for too long was declared dead,
and its permits in flight were counted as landed: its stock is void, and its permits in flight count again.
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
"""How long a client's mail waits for the answer to a claim: as long as a database may take."""
AWAY_SECONDS: Final = 0.5
"""Between two claims while the database does not answer."""
STOCK_SECONDS: Final = 2.0
"""How long a permit without a mail is kept: a mail that waits for another limit may still need it."""


class GlobalLimit:
    """One limit shared by several gateways.

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
        """See `Limit.take`. If none are in stock, they are requested, and the waiters are notified later."""
        if now >= self._rest_until and self._is_ours() and self._stock >= amount:
            self._stock -= amount
            self._in_use += amount
            return Permit(0, amount, now)
        if now < self._not_before:
            return self._not_before - now
        self._soon()
        return ANSWER_SECONDS

    def available(self, now: float) -> int:
        """An estimate of the available permits: others take them too."""
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
        """See `AnyLimit.rest`: no gateway sends anything for this long."""
        self._rest_seconds = max(self._rest_seconds, seconds)
        self._rest_until = max(self._rest_until, now + seconds)
        self._not_before = max(self._not_before, now + seconds)
        self._soon()

    async def wait_reported(self) -> None:
        """Wait until all due reports have been made."""
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
        """Claim, if useful, as soon as no claim is under way."""
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
                    # Otherwise permits that were given back might exist twice.
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
        """The next claim; None: nothing to claim or report."""
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
        """Permits wanted beyond those in stock: by the first waiting mail, and by all."""
        if now < self._not_before:
            return 0, 0
        waiting = [pace.wanted(self) for pace in self._paces]
        least = max((first for first, _ in waiting), default=0) - self._stock
        if least <= 0:
            return 0, 0
        return least, max(least, sum(all_ for _, all_ in waiting) - self._stock)
