"""Applies limits to an upstream's mails, wherever the limits are kept: first come, first served."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from otel_smtp.forwarding.limits import LimitSettings, Permit

FIRST_REST_SECONDS: Final = 5.0
"""How long nothing is sent after a provider says that it gets too much; doubled at each repetition."""
LONGEST_REST_SECONDS: Final = 300.0
CONTEND_SECONDS: Final = 0.01
"""The least time between two looks at a limit that other processes may have used meanwhile."""


class AnyLimit(Protocol):
    """The interface of a limit for `Pace`, wherever it is kept.

    Attributes:
        answer_seconds: the longest wait for an answer, even if that is that there are no permits.
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
        """The provider said that it gets too much: give no permits for this long."""
        ...

    def watch(self, pace: "Pace") -> None:
        """Notify a waiter when there may be permits."""
        ...


class WaitingMail:
    """A mail that asked a `Pace` for permission to leave.

    Attributes:
        since: when it asked.
        held_by: the name of the limit for which it waits, or waited; "" if it did not wait.
        permits: those it was given; none while it waits.
        is_waiting: neither permitted nor refused yet. `given_at`: when it was permitted.
        patience: the timer that ends its waiting.
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
        """It stops waiting."""
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
        limits: a mail needs permits of all.
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
        self.begun = 0  # deliveries begun and not ended, including waiting ones
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
        """How many deliveries may be under way: at most `most`, and no more than there are permits for, plus one that
        waits for the next.
        """
        now = self._clock()
        available = min(limit.available(now) for limit in self._limits)
        return min(most, self.begun + max(0, available + 1 - len(self._waiting)))

    def ask(
        self, recipients: int, patience_seconds: float, decided: Callable[[bool], None], *, with_message: bool
    ) -> WaitingMail | None:
        """Ask for leave.

        Args:
            recipients: how many, at most `most_recipients`.
            patience_seconds: after which permission is refused.
            decided: called when permission is given (True) or refused.
            with_message: also for a new message; otherwise for more recipients of one.

        Returns:
            The permitted or waiting mail; None: refused at once, since the patience would not suffice.
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
        """The mail's delivery has ended."""
        now = self._clock()
        for limit, permit in waiting.permits:
            limit.landed(permit, now)
        waiting.permits = []
        if self._waiting:
            self.look()

    def wanted(self, limit: AnyLimit) -> tuple[int, int]:
        """How many permits of a limit are needed by the first mail that waits for it, and by all."""
        if not self._waiting or self._waiting[0].held_by != limit.settings.name:
            return 0, 0
        return self._waiting[0].amount(limit), sum(one.amount(limit) for one in self._waiting)

    def is_too_much(self, waiting: WaitingMail) -> float | None:
        """The provider says that it gets too much: send nothing for a while.

        Args:
            waiting: the mail that got this reply.

        Returns:
            For how many seconds; None: the mail left before the current rest began, which stays unchanged.
        """
        now = self._clock()
        if waiting.given_at <= self._rested_at:
            return None
        seconds = min(LONGEST_REST_SECONDS, FIRST_REST_SECONDS * 2.0**self._rests)
        self._rests = min(self._rests + 1, 10)
        self._rested_at = now
        self._limits[0].rest(seconds, now)  # all must permit it, and other limits may belong to other upstreams too
        return seconds

    def got_through(self) -> None:
        """The provider took something."""
        self._rests = 0

    def give_back(self, waiting: WaitingMail) -> None:
        """Nothing of the mail has left: return its permits."""
        for limit, permit in waiting.permits:
            limit.give_back(permit)
        waiting.permits = []

    def close(self) -> None:
        """Give no more permits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------------------------------------------

    def _take(self, waiting: WaitingMail, now: float) -> float | None:
        """Take permits of all limits, or of none; returns how long to wait in that case."""
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
        """Serve waiting mails while there are permits."""
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
