"""The pool of connections to one upstream: users, waiters, and connections to close. Decides; does no I/O.

A mail takes an idle connection (`take`), or asks with a `Ticket` (`ask`), which is decided at once or after a release:
use that connection, open one, or none is available. The pool collects connections to close for its driver. Idle
connections are used last in, first out, so that a low load keeps few connections warm and lets the others age away.
Tickets are served in order.

A connection in the middle of a transaction whose client pauses is *parked*. If a ticket waits and a connection has been
parked for a while, it is reclaimed: its transaction can be restarted on another connection. Otherwise as many slow
clients as there are connections would stop all mail. The more tickets wait, the shorter that while is, and many idle
transactions delay a mail little longer than a few. A transaction that continues after losing its connection keeps its
place among the waiters: it asked before them.

A connection refused while others to the same upstream work says nothing about a mail, and little about the upstream:
its cap is reached (see `ceiling`). So the ticket returns to its place, and waits for one of the others. While none is
known to work, and more are being opened, their outcome decides the meaning of the refusal. If the last working ones
were closed a moment ago, for another worker, the upstream may not have noticed yet: it is tried again.

If all processes that share an upstream have a common limit of connections, each connection needs a slot from its
opening until the upstream has noticed its end (see `slots`). Processes that wait get the slots of connections that are
idle here, or have had their turn.

`Ticket.on_decided` is called in the middle of the pool's work, when its state is consistent, and may call the pool.
"""

import math
from collections import deque
from typing import Final, Generic

from otel_smtp.forwarding.breaker import Breaker
from otel_smtp.forwarding.ceiling import LINGERING_SECONDS, Ceiling
from otel_smtp.forwarding.faults import UpstreamFault
from otel_smtp.forwarding.settings import PoolLimits
from otel_smtp.forwarding.slots import TURN_SECONDS, AnySlots
from otel_smtp.forwarding.snapshots import PoolSnapshot
from otel_smtp.forwarding.tickets import C, Decision, Ticket

RECLAIM_AFTER_SECONDS: Final = 0.25
"""A client on the same continent sends its content within a few round trips; one that takes longer is slow, or gone.
This applies while one ticket waits; with more, it is divided among them.
"""
RECLAIM_SOONEST_SECONDS: Final = 0.05
"""However many wait: a nearby client, which continues at once, must not restart."""
PENDING_SECONDS: Final = 10.0
"""How long a refused mail waits for the connections being opened, which show whether the upstream works."""
RETRY_SECONDS: Final = 0.25
"""After a refusal, until another connection is opened beside the working ones."""


class Pool(Generic[C]):
    """The connections to one upstream.

    All times are by one monotonic clock. Methods may be called in any order; each keeps the pool within its limits.

    Args:
        ceiling: the upstream's connection cap, perhaps shared with other workers.
        slots: of its connections; None: none are needed.

    Attributes:
        closing: connections to close now; see `take_closing`.
        heard_at: when the upstream last accepted a connection or answered; None: never.
        waiting: the waiting tickets, in serving order.
    """

    __slots__ = (
        "_closed", "_has_all_rights", "_idle", "_in_use", "_is_closed", "_is_retired", "_is_unexplained", "_limits",
        "_opening", "_parting", "_retry_at", "_slots", "breaker", "ceiling", "closing", "heard_at", "waiting",
    )  # fmt: skip

    def __init__(
        self,
        limits: PoolLimits,
        ceiling: Ceiling | None = None,
        slots: AnySlots | None = None,
    ) -> None:
        self._limits = limits
        self._slots = slots
        self._parting = 0  # given up, and their slots are not free yet
        self.breaker = Breaker(limits.connections)
        self.ceiling = ceiling if ceiling is not None else Ceiling()
        # A delivery leaves its reusable connection here if no other has a prior claim to it.
        self._has_all_rights = slots is None and not self.ceiling.is_shared
        self.heard_at: float | None = None
        self._is_unexplained = False  # some were refused, and it is still unknown whether the upstream works
        self._retry_at = 0.0  # the earliest time of another connection beside the working ones
        self._closed: deque[float] = deque(maxlen=64)  # when connections were closed, the latest on the right
        self._idle: deque[C] = deque()  # the one released last on the right
        self._in_use: dict[C, None] = {}  # in the order of taking, including parked ones
        self._opening = 0
        self.waiting: deque[Ticket[C]] = deque()
        self._is_closed = False
        self._is_retired = False
        self.closing: list[C] = []

    def __repr__(self) -> str:
        return (
            f"<Pool {len(self._idle)} idle, {len(self._in_use)} busy, {self._opening} opening,"
            f" {len(self.waiting)} waiting, {self.breaker!r}>"
        )

    def snapshot(self) -> PoolSnapshot:
        """The pool at this moment."""
        return PoolSnapshot(
            idle=len(self._idle),
            busy=len(self._in_use),
            opening=self._opening,
            waiting=len(self.waiting),
            most=self._limits.connections,
            window=int(min(self.breaker.window, self.ceiling.level)),
            breaker=self.breaker.state,
        )

    # Calls of mails ----------------------------------------------------------------------------------------

    def take(self, now: float) -> C | None:
        """Take an idle connection; None: there is none, see `ask`. `release` gives it back.

        It proves the upstream's health, whatever the breaker says. No waiter loses it: if connections are idle, the
        waiters need fresh ones. Dead and expired connections are dropped on the way.
        """
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.is_alive and now < connection.expires_at:
                self._in_use[connection] = None
                return connection
            self._give_up(connection, now)
        return None

    def ask(self, now: float, *, fresh: bool = False, since: float | None = None) -> Ticket[C]:
        """Ask for a connection.

        Args:
            fresh: it must be unused.
            since: its place is as if it had asked then; None: now.
        """
        ticket: Ticket[C] = Ticket(now, now if since is None else since, wants_fresh=fresh)
        if since is None:
            self.waiting.append(ticket)
        else:
            self.waiting.insert(sum(1 for one in self.waiting if one.since <= since), ticket)
        self._assign(now)
        return ticket

    def withdraw(self, ticket: Ticket[C], now: float) -> None:
        """The mail that asked has gone. Its connection, if any, is given back."""
        match ticket.decision:
            case Decision.WAITING:
                self.waiting.remove(ticket)
            case Decision.REUSE:
                assert ticket.connection is not None
                used_at = ticket.connection.used_at
                self.release(ticket.connection, now)
                ticket.connection.used_at = used_at  # it was not
            case Decision.OPEN:
                self.gave_up(now)
            case Decision.NONE:
                pass
        ticket.decision = Decision.NONE

    def concurrency(self, now: float) -> int:
        """How many mails may be under way; see `Breaker.concurrency`."""
        most = self.breaker.concurrency(now)
        if self._slots is not None:
            most = min(most, self._slots.held + 1)  # and one that waits for another slot
        return most if most <= 1 or self.ceiling.level > most else int(max(1, min(most, self.ceiling.share(now))))

    def release(self, connection: C, now: float, *, answered: bool = False) -> None:
        """A mail is done with its connection.

        Args:
            answered: the upstream answered what it was asked.
        """
        connection.used_at = now
        connection.parked = None
        if answered:
            self.heard_at = now
            if not self.breaker.is_at_best:
                self.breaker.succeeded()
        del self._in_use[connection]
        if (
            connection.is_alive
            and not connection.is_spent
            and now < connection.expires_at
            and (self._has_all_rights or self._may_keep(connection, now))
        ):
            self._idle.append(connection)
        else:
            self._give_up(connection, now)
        if self.waiting:
            self._assign(now)

    def add(self, connection: C, now: float) -> None:
        """Add an idle connection that no ticket asked for; a surplus one is closed."""
        if self._is_closed or len(self._in_use) + self._opening + len(self._idle) >= self._limits.connections:
            self._give_up(connection, now)
            return
        self.heard_at = connection.used_at = now
        self._idle.append(connection)
        self._note()
        self._assign(now)

    def opened(self, ticket: Ticket[C], connection: C, now: float) -> None:
        """The connection for a ticket is open, and in use by its mail."""
        ticket.on_decided = None
        self._opening -= 1
        self._in_use[connection] = None
        self.heard_at = now
        self.breaker.succeeded()
        self._note()
        self.ceiling.opened(now)
        self._explain_refusals(now)

    def failed(self, ticket: Ticket[C], now: float, fault: UpstreamFault) -> bool:
        """The connection for a ticket could not be opened.

        Returns:
            Whether the ticket waits again: for another connection, or to learn whether the upstream works.
        """
        self._opening -= 1
        if self._slots is not None:
            self._slots.give_back(now, lingers=True)
        self._note()
        ceiling = self.ceiling
        is_late = fault.upstream_reply is not None and ceiling.may_count_closed(now)
        if is_late:
            self._retry_at = now + RETRY_SECONDS
        waits = not self._is_closed and (is_late or ceiling.is_opening or ceiling.works(now))
        self._is_unexplained = True
        self._explain_refusals(now)
        if waits:
            self.breaker.give_up()
            self._put_back(ticket, now, fault)
        else:
            ticket.on_decided = None
            self.breaker.failed(now)
            self._fail_refused(now)
        self._assign(now)
        return waits

    def _explain_refusals(self, now: float) -> None:
        """Treat refusals while the upstream works as its connection cap."""
        if not self._is_unexplained or not self.ceiling.works(now):
            return
        self._is_unexplained = False
        while self._closed and now - self._closed[0] >= LINGERING_SECONDS:
            self._closed.popleft()
        self.ceiling.refused(now, len(self._closed))
        self._retry_at = now + RETRY_SECONDS

    def _put_back(self, ticket: Ticket[C], now: float, fault: UpstreamFault) -> None:
        ticket.decision = Decision.WAITING
        ticket.fault, ticket.refused_at = fault, now
        before = (
            one
            for one in self.waiting
            if one.since < ticket.since or (one.since == ticket.since and one.fault is not None)
        )
        self.waiting.insert(sum(1 for _ in before), ticket)

    def _fail_refused(self, now: float, *, refused_before: float = math.inf) -> None:
        """The upstream does not work after all: fail the tickets whose connections were refused."""
        failed = [one for one in self.waiting if one.fault is not None and one.refused_at <= refused_before]
        self._is_unexplained = any(one.fault is not None for one in self.waiting if one not in failed)
        for ticket in failed:
            self.waiting.remove(ticket)
            self.breaker.failed(now)
            ticket.decide(Decision.FAILED)

    def gave_up(self, now: float) -> None:
        """The attempt to open was cancelled: no verdict."""
        self._opening -= 1
        if self._slots is not None:
            self._slots.give_back(now, lingers=True)
        self.breaker.give_up()
        self._assign(now)

    # Calls of time and peers -------------------------------------------------------------------------------

    def lost(self, connection: C, now: float) -> None:
        """An idle connection died."""
        if connection in self._idle:
            self._idle.remove(connection)
            self._give_up(connection, now)
            self._assign(now)

    def expire(self, now: float, *, most_wait_seconds: float = math.inf) -> None:
        """Act on the clock; call it a few times per second while the pool is not empty.

        Closes connections that were idle for too long, serves waiting tickets with connections parked for long enough,
        and fails tickets that have waited for `most_wait_seconds`.
        """
        while self._idle and now - self._idle[0].used_at >= self._limits.idle_seconds:
            self._give_up(self._idle.popleft(), now)
        self._note()
        if self.ceiling.is_shared:
            self._make_room_for_others(now)
        if self._slots is not None and (self._slots.are_wanted(now) or not self._slots.are_ours()):
            self._give_idle_up(now)
        if self.waiting:
            self._explain_refusals(now)
            if self._is_unexplained:
                self._fail_refused(now, refused_before=now - PENDING_SECONDS)
            self._assign(now)
        late = [one for one in self.waiting if now - one.asked_at >= most_wait_seconds]
        for ticket in late:
            if ticket in self.waiting:  # the connection opened for one may have served another
                self.waiting.remove(ticket)
                ticket.decide(Decision.NONE)

    # Slots ------------------------------------------------------------------------------------------------

    def wanted_slots(self, now: float) -> int:
        """How many connections would be opened now if there were slots."""
        if self._is_closed:
            return 0
        in_use = len(self._in_use) + self._opening
        return max(0, min(len(self.waiting), self._limits.connections - in_use, self.breaker.concurrency(now) - in_use))

    def look_at_slots(self, now: float) -> None:
        """There may be slots, or others may wait for them."""
        assert self._slots is not None
        if self._slots.are_wanted(now):
            self._give_idle_up(now)
        self._assign(now)

    def gone(self, now: float, *, lingers: bool) -> None:
        """A dropped connection is closed; see `AnySlots.give_back`."""
        assert self._slots is not None
        self._parting -= 1
        self._slots.give_back(now, lingers=lingers)
        self._assign(now)

    def _give_idle_up(self, now: float) -> None:
        while self._idle:
            self._give_up(self._idle.popleft(), now)

    def _keeps_slot(self, connection: C, now: float) -> bool:
        """Whether a released connection may be used again here."""
        slots = self._slots
        assert slots is not None
        if not slots.are_ours():
            return False
        return not slots.are_wanted(now) or (bool(self.waiting) and now - connection.opened_at < TURN_SECONDS)

    def serve(self, now: float) -> bool:
        """Reclaim connections parked for long enough, for the waiters.

        Returns:
            Whether a ticket waits, so that the caller should ask again within `RECLAIM_SOONEST_SECONDS`.
        """
        if self.waiting and any(connection.parked is not None for connection in self._in_use):
            self._assign(now)
        return bool(self.waiting)

    @property
    def is_empty(self) -> bool:
        """Whether nothing can be late: no connection is open or opening, and no ticket waits."""
        return not (self._idle or len(self._in_use) or self._opening or self.waiting or self.closing or self._parting)

    @property
    def is_parting(self) -> bool:
        """Whether dropped connections are not closed yet."""
        return self._parting > 0

    def retire(self) -> None:
        """Keep idle connections no longer; tickets that still come are served as before."""
        self._is_retired = True
        self._has_all_rights = False
        self.closing += self._idle
        if self._slots is not None:
            self._parting += len(self._idle)
        self._idle.clear()
        self._note()

    def close(self) -> None:
        """Serve no more tickets; connections in use are closed when released."""
        self._is_closed = True
        self.retire()
        while self.waiting:
            self.waiting.popleft().decide(Decision.NONE)
        self._note()

    def take_closing(self) -> list[C]:
        """Take the connections to close now; each is returned once."""
        closing, self.closing = self.closing, []
        return closing

    # ------------------------------------------------------------------------------------------------------

    def _assign(self, now: float) -> None:
        """Serve the tickets that can be served, in order."""
        while self.waiting:
            decision, connection = self._decide(self.waiting[0], now)
            if decision is Decision.WAITING:
                break
            self.waiting.popleft().decide(decision, connection)
        # Tickets for a fresh connection do not keep others from idle ones.
        while self._idle:
            ticket = next((ticket for ticket in self.waiting if not ticket.wants_fresh), None)
            if ticket is None or (idle := self.take(now)) is None:
                return
            self.waiting.remove(ticket)
            ticket.decide(Decision.REUSE, idle)

    def _note(self) -> None:
        """Tell the other workers our state."""
        self.ceiling.note(len(self._idle) + len(self._in_use), self._opening, len(self.waiting), self.heard_at or 0.0)

    def _give_up(self, connection: C, now: float) -> None:
        self.closing.append(connection)
        if self._slots is not None:
            self._parting += 1
        self._closed.append(now)
        self.ceiling.closed(now)

    def _may_keep(self, connection: C, now: float) -> bool:
        """Whether no other has a prior claim to a connection."""
        if self._is_retired:
            return False
        if self.ceiling.is_shared and self._is_for_others(now):
            return False
        return self._slots is None or self._keeps_slot(connection, now)

    def _is_for_others(self, now: float) -> bool:
        """Whether another worker has a prior claim to a connection: none of our mails waits, or we have too many."""
        if self.ceiling.level == math.inf:
            return False
        self._note()
        return not self.waiting or len(self._idle) + len(self._in_use) + self._opening >= self.ceiling.share(now)

    def _make_room_for_others(self, now: float) -> None:
        """Drop idle connections below a ceiling, and connections parked beyond our share of it."""
        if self.ceiling.level == math.inf:
            return
        while self._idle:
            self._give_up(self._idle.popleft(), now)
        while (
            len(self._in_use) + self._opening > self.ceiling.share(now)
            and (reclaimed := self._reclaimed(now)) is not None
        ):
            del self._in_use[reclaimed]
            self._give_up(reclaimed, now)
        self._note()

    def _decide(self, ticket: Ticket[C], now: float) -> tuple[Decision, C | None]:
        if self._is_closed:
            return Decision.NONE, None
        if not ticket.wants_fresh and (idle := self.take(now)) is not None:
            return Decision.REUSE, idle
        if self._may_open(ticket, now):
            self.breaker.begin()
            self._opening += 1
            self._note()
            return Decision.OPEN, None
        if (reclaimed := self._reclaimed(now)) is not None:
            if reclaimed.is_alive and now < reclaimed.expires_at and not reclaimed.is_spent and not ticket.wants_fresh:
                return Decision.REUSE, reclaimed
            self._give_up(reclaimed, now)
            del self._in_use[reclaimed]
            return self._decide(ticket, now)
        if self.breaker.is_dead(now):
            return Decision.NONE, None
        return Decision.WAITING, None

    def _reclaimed(self, now: float) -> C | None:
        """The connection parked for the longest, if that is long enough; notifies its mail."""
        oldest, longest = None, None
        for connection in self._in_use:
            parked = connection.parked
            if parked is not None and (longest is None or parked.since < longest.since):
                oldest, longest = connection, parked
        least = max(RECLAIM_SOONEST_SECONDS, RECLAIM_AFTER_SECONDS / max(1, len(self.waiting)))
        if oldest is None or longest is None or now - longest.since < least:
            return None
        oldest.parked = None
        longest.on_reclaimed()
        return oldest

    def _may_open(self, ticket: Ticket[C], now: float) -> bool:
        in_use = len(self._in_use) + self._opening
        if in_use >= self._limits.connections:
            return False
        if not self.breaker.allows(now, in_use):
            return False
        # A fresh one is needed while others are idle: the oldest makes room.
        if in_use + len(self._idle) >= self._limits.connections:
            self._give_up(self._idle.popleft(), now)
        self._note()
        if ticket.fault is not None and not self.ceiling.works(now) and self.ceiling.is_opening:
            return False  # a connection being opened reports first
        if now < self._retry_at and (self.ceiling.works(now) or self.ceiling.may_count_closed(now)):
            return False
        if self._slots is not None and not self._slots.take(now):
            if self._idle and not self._parting:  # likewise, for its slot
                self._give_up(self._idle.popleft(), now)
            return False
        if self._ceiling_allows(now):
            return True
        if self._slots is not None:
            self._slots.put_back(now)
        return False

    def _ceiling_allows(self, now: float) -> bool:
        if self.ceiling.allows(now):
            return True
        if not self._idle:
            return False
        self._give_up(self._idle.popleft(), now)
        self._note()
        return self.ceiling.allows(now)
