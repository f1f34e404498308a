"""The pool and the breaker decide; a clock and connections are made up here."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from otel_smtp.forwarding.breaker import (
    FIRST_BACKOFF_SECONDS,
    INITIAL_WINDOW,
    LONGEST_BACKOFF_SECONDS,
    Breaker,
    BreakerState,
)
from otel_smtp.forwarding.ceiling import FIRST_PROBE_SECONDS, WORKS_SECONDS
from otel_smtp.forwarding.faults import UpstreamFault
from otel_smtp.forwarding.pool import (
    PENDING_SECONDS,
    RECLAIM_AFTER_SECONDS,
    RECLAIM_SOONEST_SECONDS,
    RETRY_SECONDS,
    Pool,
)
from otel_smtp.forwarding.settings import PoolLimits
from otel_smtp.forwarding.slots import Slots, SlotSettings
from otel_smtp.forwarding.tickets import Decision, Parked, Ticket


@dataclass(eq=False)
class Connection:
    is_alive: bool = True
    uses: int = 0
    most_uses: int = 100
    opened_at: float = 0.0
    used_at: float = 0.0
    parked: Parked | None = None
    expires_at: float = math.inf

    @property
    def is_spent(self) -> bool:
        return self.uses >= self.most_uses

    def is_reusable(self, now: float) -> bool:
        return self.is_alive and not self.is_spent and now < self.expires_at


Connections = Pool[Connection]
REFUSED = UpstreamFault("refused")


def opened(pool: Connections, ticket: Ticket[Connection]) -> Connection:
    assert decided(ticket, Decision.OPEN)
    connection = Connection()
    pool.opened(ticket, connection, 0)
    return connection


def decided(ticket: Ticket[Connection], decision: Decision) -> bool:
    return ticket.decision is decision


def is_closed(breaker: Breaker) -> bool:
    return breaker.state is BreakerState.CLOSED


def grown(connections: int = 20, **more: object) -> Connections:
    """A pool whose upstream has proved itself."""
    pool: Connections = Pool(PoolLimits(connections=connections, **more))  # type: ignore[arg-type]
    for _ in range(1000):
        pool.breaker.succeeded()
    return pool


def test_the_connection_used_last_is_used_next() -> None:
    pool = grown()
    first, second = (opened(pool, pool.ask(0)) for _ in range(2))
    pool.release(first, 1)
    pool.release(second, 2)
    ticket = pool.ask(3)
    assert (ticket.decision, ticket.connection) == (Decision.REUSE, second)


def test_a_dead_connection_is_not_handed_out_but_closed() -> None:
    pool = grown()
    connection = opened(pool, pool.ask(0))
    pool.release(connection, 1)
    connection.is_alive = False
    assert pool.ask(2).decision is Decision.OPEN
    assert pool.take_closing() == [connection]
    assert pool.take_closing() == []


def test_a_connection_that_has_expired_is_neither_handed_out_nor_kept() -> None:
    pool = grown()
    connection, other = (opened(pool, pool.ask(0)) for _ in range(2))
    connection.expires_at = other.expires_at = 10
    pool.release(connection, 9)
    assert pool.take(9.99) is connection
    pool.release(connection, 9.99)
    assert pool.take(10) is None
    pool.release(other, 10)
    assert pool.take_closing() == [connection, other]
    assert pool.is_empty


def test_what_is_answered_opens_the_window_and_what_is_not_does_not() -> None:
    pool: Connections = Pool(PoolLimits(connections=20))
    connection = opened(pool, pool.ask(0))
    windows = []
    for answered in (False, True):
        for _ in range(400):
            pool.release(connection, 5, answered=answered)
            assert pool.take(5) is connection
        windows.append((pool.snapshot().window, pool.heard_at))
    assert windows == [(INITIAL_WINDOW, 0), (20, 5)]


def test_who_began_to_wait_at_the_same_time_is_served_in_order() -> None:
    pool = grown(connections=1)
    connection = opened(pool, pool.ask(0))
    first, second = (pool.ask(2, since=1) for _ in range(2))
    pool.release(connection, 3)
    assert (first.decision, second.decision) == (Decision.REUSE, Decision.WAITING)


def test_no_more_mails_are_under_way_than_have_slots_and_one_that_waits_for_its() -> None:
    pool: Connections = Pool(PoolLimits(connections=20), slots=Slots(SlotSettings("up", 2)))
    for _ in range(1000):
        pool.breaker.succeeded()
    assert pool.concurrency(0) == 1
    for held in (1, 2):
        opened(pool, pool.ask(0))
        assert pool.concurrency(0) == held + 1


def test_a_connection_that_nobody_asked_for_is_kept_where_there_is_room() -> None:
    pool = grown(connections=2)
    opening = pool.ask(0)
    assert decided(opening, Decision.OPEN)
    first, second, third, last = (Connection() for _ in range(4))
    pool.add(first, 1)
    assert (pool.heard_at, first.used_at, pool.snapshot().idle) == (1, 1, 1)
    pool.add(second, 2)  # one is idle, one is being opened
    assert pool.take_closing() == [second]
    assert pool.take(2) is first
    pool.add(third, 3)  # one is in use now
    assert pool.take_closing() == [third]
    pool.gave_up(4)
    pool.close()
    pool.add(last, 5)
    assert pool.take_closing() == [last]


def test_an_opening_that_is_given_up_or_fails_gives_its_slot_back() -> None:
    slots = Slots(SlotSettings("up", 2))
    pool: Connections = Pool(PoolLimits(connections=20), slots=slots)
    given_up, failed = pool.ask(0), pool.ask(0)
    assert slots.held == 2
    pool.gave_up(1)
    assert (given_up.decision, slots.held) == (Decision.OPEN, 1)
    pool.failed(failed, 2, REFUSED)
    assert slots.held == 0


def test_who_waits_is_served_in_order_by_what_is_released() -> None:
    pool = grown(connections=1)
    connection = opened(pool, pool.ask(0))
    waiting = [pool.ask(1) for _ in range(3)]
    told: list[int] = []
    for number, ticket in enumerate(waiting):
        ticket.on_decided = lambda number=number: told.append(number)
    assert {ticket.decision for ticket in waiting} == {Decision.WAITING}
    pool.withdraw(waiting[1], 2)
    pool.release(connection, 3)
    assert (waiting[0].decision, waiting[0].connection) == (Decision.REUSE, connection)
    connection.is_alive = False
    pool.release(connection, 4)
    assert waiting[2].decision is Decision.OPEN
    assert told == [0, 2]


def test_what_was_given_to_somebody_who_is_gone_is_given_on() -> None:
    pool = grown(connections=1)
    connection = opened(pool, pool.ask(0))
    gone, next_one = pool.ask(1), pool.ask(1)
    pool.release(connection, 2)
    pool.withdraw(gone, 3)
    assert next_one.connection is connection
    pool.withdraw(next_one, 4)
    pool.withdraw(next_one, 4)
    assert pool.snapshot().idle == 1
    opening = grown(connections=1)
    gone, next_one = opening.ask(0), opening.ask(0)
    opening.withdraw(gone, 1)
    assert decided(next_one, Decision.OPEN)


def test_a_fresh_connection_takes_the_place_of_the_oldest_idle_one() -> None:
    pool = grown(connections=2)
    first, second = (opened(pool, pool.ask(0)) for _ in range(2))
    pool.release(first, 1)
    pool.release(second, 2)
    ticket = pool.ask(3, fresh=True)
    assert decided(ticket, Decision.OPEN)
    assert pool.take_closing() == [first]


def test_a_parked_connection_is_reclaimed_for_who_waits_and_not_at_once() -> None:
    pool = grown(connections=2)
    told: list[str] = []
    first, second = (opened(pool, pool.ask(0)) for _ in range(2))
    first.parked = Parked(0, lambda: told.append("first"))
    second.parked = Parked(0.1, lambda: told.append("second"))
    waiting = pool.ask(0.1)
    assert decided(waiting, Decision.WAITING)
    pool.expire(0.9 * RECLAIM_AFTER_SECONDS)
    assert decided(waiting, Decision.WAITING)
    pool.expire(RECLAIM_AFTER_SECONDS)
    assert (waiting.connection, told) == (first, ["first"])
    second.parked = None
    assert decided(pool.ask(9), Decision.WAITING)
    second.parked = Parked(9, lambda: told.append("second"))
    fresh = pool.ask(9, fresh=True)
    pool.expire(10)
    assert decided(fresh, Decision.WAITING)  # one was served, one still waits
    assert told == ["first", "second"]
    assert pool.snapshot().busy == 2
    pool.release(first, 10)
    assert decided(fresh, Decision.OPEN)


def test_the_connection_that_was_parked_first_is_reclaimed_first_whenever_it_was_taken() -> None:
    pool = grown(connections=3)
    connections = [opened(pool, pool.ask(0)) for _ in range(3)]
    told: list[float] = []
    for connection, since in zip(connections, (2, 1, 3), strict=True):
        connection.parked = Parked(since, partial(told.append, since))
    waiting = [pool.ask(3) for _ in range(3)]
    pool.expire(9)
    assert told == [1, 2, 3]
    assert [ticket.connection for ticket in waiting] == [connections[1], connections[0], connections[2]]


def test_a_connection_that_is_given_back_while_it_is_parked_is_not_taken_from_the_next_mail() -> None:
    pool = grown(connections=1)
    connection = opened(pool, pool.ask(0))
    connection.parked = Parked(0, lambda: pytest.fail("its mail was given up"))
    pool.release(connection, 1)
    assert pool.take(2) is connection
    waiting = pool.ask(2)
    pool.expire(9)
    assert decided(waiting, Decision.WAITING)


def test_a_connection_that_is_given_back_unused_is_as_old_as_before() -> None:
    pool = grown(connections=1)
    connection = opened(pool, pool.ask(0))
    connection.parked = Parked(0, lambda: None)
    ticket = pool.ask(9)
    assert ticket.connection is connection
    pool.withdraw(ticket, 9)
    assert connection.used_at == 0  # nothing has been heard of it since
    assert pool.take(9) is connection


def test_a_parked_connection_that_cannot_be_used_again_makes_room() -> None:
    pool = grown(connections=1)
    connection = opened(pool, pool.ask(0))
    connection.parked = Parked(0, lambda: None)
    connection.is_alive = False
    assert decided(pool.ask(5), Decision.OPEN)
    assert pool.take_closing() == [connection]


@pytest.mark.parametrize("idle_transactions", [25, 250])
def test_many_idle_transactions_delay_a_mail_little_more_than_a_few(idle_transactions: int) -> None:
    pool: Connections = Pool(PoolLimits())
    now = 0.0
    asking = [pool.ask(now) for _ in range(idle_transactions)]
    mail = pool.ask(now)
    while mail.decision is Decision.WAITING:
        for ticket in [ticket for ticket in asking if ticket.decision is not Decision.WAITING]:
            asking.remove(ticket)
            connection = ticket.connection or opened(pool, ticket)
            connection.parked = Parked(now, lambda: None)
        now += RECLAIM_SOONEST_SECONDS
        pool.serve(now)
    # An upstream that has proved nothing gets five connections.
    assert now <= 2 * (RECLAIM_AFTER_SECONDS + RECLAIM_SOONEST_SECONDS * idle_transactions / INITIAL_WINDOW)


def test_a_transaction_that_was_reclaimed_keeps_its_place() -> None:
    pool = grown(connections=1)
    opened(pool, pool.ask(0))
    before, behind = pool.ask(1), pool.ask(3)
    reclaimed = pool.ask(9, since=2)
    assert list(pool.waiting) == [before, reclaimed, behind]
    pool.expire(11, most_wait_seconds=10)  # its time to wait restarts all the same
    assert list(pool.waiting) == [reclaimed, behind]
    pool.expire(13, most_wait_seconds=10)
    assert list(pool.waiting) == [reclaimed]


def test_nobody_asks_again_for_what_nobody_waits_for() -> None:
    pool = grown(connections=1)
    connection = opened(pool, pool.ask(0))
    waiting = pool.ask(1)
    assert pool.serve(9)
    assert waiting.decision is Decision.WAITING  # nothing is parked
    connection.parked = Parked(9, lambda: None)
    assert pool.serve(9)
    assert not pool.serve(10)
    assert waiting.connection is connection


def test_idle_connections_expire_the_oldest_first() -> None:
    pool = grown(idle_seconds=30)
    first, second = (opened(pool, pool.ask(0)) for _ in range(2))
    pool.release(first, 0)
    pool.release(second, 10)
    pool.expire(29.9)
    assert pool.take_closing() == []
    pool.expire(30)
    assert pool.take_closing() == [first]
    pool.expire(40)
    assert pool.take_closing() == [second]
    assert pool.is_empty


def test_a_ticket_does_not_wait_for_ever() -> None:
    pool = grown(connections=1)
    opened(pool, pool.ask(0))
    first, second = pool.ask(1), pool.ask(2)
    pool.expire(60.9, most_wait_seconds=60)
    assert decided(first, Decision.WAITING)
    pool.expire(61, most_wait_seconds=60)
    assert (first.decision, second.decision) == (Decision.NONE, Decision.WAITING)
    assert pool.snapshot().waiting == 1
    assert not pool.is_empty


def test_an_idle_connection_is_taken_without_a_ticket() -> None:
    pool = grown(connections=2)
    assert pool.take(0) is None
    first, second = (opened(pool, pool.ask(0)) for _ in range(2))
    pool.release(first, 1)
    assert pool.take(2) is first
    assert pool.take(2) is None
    pool.release(first, 3)
    first.is_alive = False
    assert pool.take(4) is None
    assert pool.take_closing() == [first]
    pool.release(second, 5)
    assert pool.take(5) is second


def test_who_waits_for_a_fresh_connection_keeps_nobody_from_an_idle_one() -> None:
    pool: Connections = Pool(PoolLimits())
    used = opened(pool, pool.ask(0))
    pool.heard_at = -WORKS_SECONDS  # what is open leads nowhere
    while (ticket := pool.ask(0)).decision is Decision.OPEN:
        pool.failed(ticket, 0, REFUSED)
    probe, fresh, other = pool.ask(5), pool.ask(5, fresh=True), pool.ask(5)
    assert decided(probe, Decision.OPEN)
    pool.release(used, 6)
    assert decided(fresh, Decision.WAITING)  # for the probe's verdict
    assert (other.decision, other.connection) == (Decision.REUSE, used)


def test_a_lost_idle_connection_is_forgotten_and_a_busy_one_is_not_touched() -> None:
    pool = grown()
    idle, busy = (opened(pool, pool.ask(0)) for _ in range(2))
    pool.release(idle, 1)
    pool.lost(busy, 2)
    assert pool.take_closing() == []
    pool.lost(idle, 2)
    assert pool.take_closing() == [idle]
    assert pool.snapshot().busy == 1


def test_a_closed_pool_gives_nothing_and_closes_what_comes_back() -> None:
    pool = grown(connections=2)
    idle, busy = (opened(pool, pool.ask(0)) for _ in range(2))
    pool.release(idle, 2)
    pool.close()
    assert pool.ask(3).decision is Decision.NONE
    pool.release(busy, 4)
    assert set(map(id, pool.take_closing())) == {id(idle), id(busy)}
    other: Connections = grown(connections=1)
    other.ask(0)
    waiting = other.ask(0)
    other.close()
    assert decided(waiting, Decision.NONE)


def test_an_upstream_is_met_with_few_connections_at_first_and_more_with_each_success() -> None:
    pool: Connections = Pool(PoolLimits())
    tickets = [pool.ask(0) for _ in range(40)]
    assert sum(ticket.decision is Decision.OPEN for ticket in tickets) == INITIAL_WINDOW
    for _ in range(1000):
        pool.breaker.succeeded()
        pool.expire(0)
    assert sum(ticket.decision is Decision.OPEN for ticket in tickets) == 20


def test_repeated_failures_send_everybody_away_at_once() -> None:
    pool: Connections = Pool(PoolLimits())
    tickets = [pool.ask(0) for _ in range(10)]
    opening = [ticket for ticket in tickets if ticket.decision is Decision.OPEN]
    while opening and pool.breaker.state is BreakerState.CLOSED:
        pool.failed(opening.pop(), 1, REFUSED)
    assert pool.breaker.state is BreakerState.OPEN
    assert not opening
    assert not [ticket for ticket in tickets if ticket.decision is Decision.WAITING]
    assert pool.ask(1).decision is Decision.NONE
    probe = pool.ask(1 + FIRST_BACKOFF_SECONDS)
    assert decided(probe, Decision.OPEN)
    waiting = pool.ask(2)
    assert decided(waiting, Decision.WAITING)  # for the probe's verdict
    opened(pool, probe)
    pool.breaker.succeeded()
    pool.expire(2)
    assert decided(waiting, Decision.OPEN)


def test_a_failed_probe_sends_away_who_waited_for_it() -> None:
    pool: Connections = Pool(PoolLimits())
    for _ in range(10):
        if (ticket := pool.ask(0)).decision is Decision.OPEN:
            pool.failed(ticket, 0, REFUSED)
    assert pool.breaker.state is BreakerState.OPEN
    probe, waiting = pool.ask(5), pool.ask(5)
    assert decided(probe, Decision.OPEN)
    pool.failed(probe, 6, REFUSED)
    assert decided(waiting, Decision.NONE)


def test_a_probe_without_a_verdict_leaves_the_next_one_to_probe() -> None:
    pool: Connections = Pool(PoolLimits())
    for _ in range(10):
        if (ticket := pool.ask(0)).decision is Decision.OPEN:
            pool.failed(ticket, 0, REFUSED)
    probe, waiting = pool.ask(5), pool.ask(5)
    pool.withdraw(probe, 6)
    assert decided(waiting, Decision.OPEN)


# An upstream that caps connections ----------------------------------------------------------------------------


def burst(pool: Connections, mails: int, cap: int, now: float = 0) -> tuple[list[Connection], list[Ticket[Connection]]]:
    """As many mails at once, to an upstream that takes `cap` connections: those, and the mails that wait."""
    tickets = [pool.ask(now) for _ in range(mails)]
    opening = [ticket for ticket in tickets if ticket.decision is Decision.OPEN]
    connections = [opened(pool, ticket) for ticket in opening[:cap]]
    for ticket in opening[cap:]:
        assert pool.failed(ticket, now, REFUSED)
    return connections, [ticket for ticket in tickets if ticket not in opening[:cap]]


def test_a_mail_whose_connection_is_one_too_many_waits_at_its_place_for_one_that_works() -> None:
    pool: Connections = Pool(PoolLimits())
    (first, *_), waiting = burst(pool, 10, cap=3)
    assert {ticket.decision for ticket in waiting} == {Decision.WAITING}
    told: list[int] = []
    for number, ticket in enumerate(waiting):
        ticket.on_decided = lambda number=number: told.append(number)
    for _ in range(2):
        pool.release(first, 1)
    assert told == [0, 1]  # those that were refused, before those that came after them
    assert (waiting[0].decision, waiting[0].connection) == (Decision.REUSE, first)
    assert pool.breaker.state is BreakerState.CLOSED


def test_the_window_shrinks_to_what_the_upstream_takes_and_stays_there() -> None:
    pool: Connections = Pool(PoolLimits())
    _, waiting = burst(pool, 10, cap=3)
    assert pool.snapshot().window == 3
    for _ in range(1000):
        pool.breaker.succeeded()
    pool.expire(FIRST_PROBE_SECONDS - 1)
    assert {ticket.decision for ticket in waiting} == {Decision.WAITING}
    assert pool.snapshot().window == 3
    assert pool.concurrency(1) == 3


def test_one_connection_more_is_tried_again_ever_more_seldom() -> None:
    pool: Connections = Pool(PoolLimits(connections=6))
    _, waiting = burst(pool, 10, cap=3)
    tried: list[float] = []
    for second in range(200):
        pool.expire(float(second))
        for ticket in waiting:
            if ticket.decision is Decision.OPEN:
                tried.append(second)
                pool.heard_at = float(second)
                assert pool.failed(ticket, second, REFUSED)
    assert tried == [10, 30, 70, 150]
    pool.heard_at = 320
    pool.expire(320)
    (probe,) = (ticket for ticket in waiting if ticket.decision is Decision.OPEN)
    pool.opened(probe, Connection(), 320)
    assert pool.snapshot().window == 4
    pool.expire(321)
    assert [ticket.decision for ticket in waiting].count(Decision.OPEN) == 1  # the same
    pool.expire(320 + FIRST_PROBE_SECONDS / 2)
    assert [ticket.decision for ticket in waiting].count(Decision.OPEN) == 2


def test_what_was_learnt_from_a_passing_fault_is_soon_forgotten() -> None:
    pool: Connections = Pool(PoolLimits(connections=20))
    for _ in range(1000):
        pool.breaker.succeeded()
    _, waiting = burst(pool, 40, cap=1)
    assert pool.snapshot().window == 1
    for second in range(40):
        pool.heard_at = float(second)
        pool.expire(float(second))
        for ticket in [one for one in waiting if one.decision is Decision.OPEN]:
            waiting.remove(ticket)
            pool.opened(ticket, Connection(), float(second))
    assert pool.snapshot().window == 20


def test_a_refusal_before_the_first_success_waits_for_what_the_others_meet() -> None:
    pool: Connections = Pool(PoolLimits())
    tickets = [pool.ask(0) for _ in range(5)]
    for ticket in tickets[:2]:
        assert pool.failed(ticket, 1, REFUSED)
        assert decided(ticket, Decision.WAITING)
    for ticket in tickets[2:]:
        opened(pool, ticket)
    assert pool.snapshot().window == 3
    pool.expire(1 + RETRY_SECONDS)
    assert {ticket.decision for ticket in tickets[:2]} == {Decision.WAITING}


def test_where_all_are_refused_each_fails_with_its_own_refusal() -> None:
    pool: Connections = Pool(PoolLimits())
    tickets = [pool.ask(0) for _ in range(5)]
    faults = [UpstreamFault(str(number)) for number in range(5)]
    for ticket, fault in zip(tickets[:4], faults, strict=False):
        assert pool.failed(ticket, 1, fault)
    assert not pool.failed(tickets[4], 1, faults[4])
    assert [ticket.decision for ticket in tickets[:4]] == [Decision.FAILED] * 4
    assert [ticket.fault for ticket in tickets[:4]] == faults[:4]
    assert pool.breaker.state is BreakerState.OPEN
    assert pool.snapshot().window > 0
    assert pool.ceiling.level > 20  # nothing was learnt but that it is away


def test_a_refused_mail_does_not_wait_for_ever_for_a_connection_that_stalls() -> None:
    pool: Connections = Pool(PoolLimits())
    refused, _stalled = (pool.ask(0) for _ in range(2))
    assert pool.failed(refused, 1, REFUSED)
    pool.expire(PENDING_SECONDS)
    assert decided(refused, Decision.WAITING)
    pool.expire(1 + PENDING_SECONDS)
    assert decided(refused, Decision.FAILED)


def test_a_refusal_in_place_of_what_was_just_closed_lowers_nothing() -> None:
    pool: Connections = Pool(PoolLimits())
    (first, *_), waiting = burst(pool, 4, cap=3)
    first.most_uses = first.uses
    pool.release(first, 1)
    assert decided(waiting[0], Decision.OPEN)
    assert pool.failed(waiting[0], 1, REFUSED)  # it has not noticed yet
    assert pool.snapshot().window == 3
    pool.expire(1 + RETRY_SECONDS / 2)
    assert decided(waiting[0], Decision.WAITING)
    pool.expire(1 + RETRY_SECONDS)
    assert decided(waiting[0], Decision.OPEN)


def test_a_fresh_connection_takes_the_place_of_an_idle_one_below_the_ceiling_too() -> None:
    pool: Connections = Pool(PoolLimits())
    connections, waiting = burst(pool, 5, cap=3)
    for ticket in waiting:
        pool.withdraw(ticket, 0)
    for connection in connections:
        pool.release(connection, 1)
    fresh = pool.ask(2, fresh=True)
    assert decided(fresh, Decision.OPEN)
    assert pool.take_closing() == [connections[0]]


# The breaker --------------------------------------------------------------------------------------------------


def dead(most: int = 20) -> Breaker:
    breaker = Breaker(most)
    while is_closed(breaker):
        breaker.failed(0)
    return breaker


@pytest.mark.parametrize("most", [1, 2, 5, 20])
def test_one_failure_kills_nobody(most: int) -> None:
    breaker = Breaker(most)
    breaker.failed(0)
    breaker.failed(0)
    assert is_closed(breaker)
    breaker.succeeded()
    breaker.failed(0)
    breaker.failed(0)
    assert is_closed(breaker)


@pytest.mark.parametrize(
    ("successes", "most", "failures"),
    [
        (0, 1, 3),  # a window of one: three in a row are three windows
        (0, 2, 3),
        (0, 20, 4),  # a window of five, then four, three and two: 1/5 + 1/4 + 1/3 is less than one, and 1/2 more is not
        (1000, 20, 13),
    ],
)
def test_an_upstream_is_given_up_after_a_whole_window_of_failures(successes: int, most: int, failures: int) -> None:
    breaker = Breaker(most)
    for _ in range(successes):
        breaker.succeeded()
    for _ in range(failures - 1):
        breaker.failed(0)
    assert is_closed(breaker)
    breaker.failed(0)
    assert not is_closed(breaker)


def test_failures_that_are_not_in_a_row_do_not_add_up() -> None:
    breaker = Breaker(20)
    for _ in range(20):
        for _ in range(1000):
            breaker.succeeded()
        breaker.failed(0)
    for _ in range(3):
        breaker.failed(0)
    assert is_closed(breaker)


def test_the_rest_grows_with_each_failed_probe_up_to_a_bound() -> None:
    breaker = dead()
    now, rests = 0.0, []
    for _ in range(10):
        assert breaker.retry_at is not None
        rests.append(breaker.retry_at - now)
        now = breaker.retry_at
        assert breaker.is_dead(now - 0.01)
        assert not breaker.is_dead(now)
        assert breaker.allows(now, 0)
        breaker.begin()
        assert not breaker.allows(now, 0)
        breaker.failed(now)
    assert rests[:4] == [1, 2, 4, 8]
    assert rests[-1] == LONGEST_BACKOFF_SECONDS


def test_who_comes_back_is_met_slowly_and_with_a_short_rest() -> None:
    breaker = dead()
    breaker.begin()
    breaker.failed(1)
    breaker.begin()
    breaker.succeeded()
    assert breaker.window == 2
    assert not breaker.is_dead(9)
    while is_closed(breaker):
        breaker.failed(10)
    assert breaker.retry_at == 10 + FIRST_BACKOFF_SECONDS
    breaker.failed(11)  # begun before the verdict: adds nothing
    assert breaker.retry_at == 10 + FIRST_BACKOFF_SECONDS


# Any order of events ------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, the pool stays within its limits and forgets nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = PoolLimits(connections=4, idle_seconds=10)
        self.pool: Connections = Pool(self.limits)
        self.now = 0.0
        self.open_tickets: list[Ticket[Connection]] = []
        self.busy: list[Connection] = []
        self.waiting: list[Ticket[Connection]] = []
        self.idle_or_closed: list[Connection] = []
        self.closed: list[Connection] = []
        self.parked: list[Connection] = []

    def sort(self) -> None:
        for ticket in [ticket for ticket in self.waiting if ticket.decision is not Decision.WAITING]:
            self.waiting.remove(ticket)
            if ticket.decision is Decision.OPEN:
                self.open_tickets.append(ticket)
            elif ticket.decision is Decision.REUSE:
                assert ticket.connection is not None
                assert ticket.connection.is_reusable(self.now)
                ticket.connection.uses += 1
                self.busy.append(ticket.connection)
        for connection in self.pool.take_closing():
            assert connection not in self.closed
            self.closed.append(connection)

    @rule(fresh=st.booleans(), earlier=st.none() | st.floats(0, 20))
    def ask(self, fresh: bool, earlier: float | None) -> None:
        since = None if earlier is None else self.now - earlier
        self.waiting.append(self.pool.ask(self.now, fresh=fresh, since=since))
        self.sort()

    @rule()
    def serve(self) -> None:
        self.pool.serve(self.now)
        self.sort()

    @rule()
    def take(self) -> None:
        connection = self.pool.take(self.now)
        if connection is not None:
            assert all(ticket.wants_fresh for ticket in self.waiting)
            assert connection.is_reusable(self.now)
            connection.uses += 1
            self.busy.append(connection)
        self.sort()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(ticket)
        self.pool.withdraw(ticket, self.now)
        self.sort()

    @precondition(lambda self: self.open_tickets)
    @rule(verdict=st.sampled_from(["opened", "failed", "gave up"]))
    def end_opening(self, verdict: str) -> None:
        ticket = self.open_tickets.pop()
        if verdict == "opened":
            connection = Connection(uses=1, most_uses=5, expires_at=self.now + 15)
            self.pool.opened(ticket, connection, self.now)
            self.busy.append(connection)
        elif verdict == "failed":
            # The pool may have given it something else within the call.
            self.waiting.append(ticket)
            if not self.pool.failed(ticket, self.now, REFUSED):
                self.waiting.remove(ticket)
        else:
            self.pool.gave_up(self.now)
        self.sort()

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), alive=st.booleans(), answered=st.booleans())
    def release(self, data: st.DataObject, alive: bool, answered: bool) -> None:
        connection = data.draw(st.sampled_from(self.busy))
        if connection in self.parked:
            self.parked.remove(connection)
        self.busy.remove(connection)
        connection.is_alive = alive
        self.pool.release(connection, self.now, answered=answered)
        self.idle_or_closed.append(connection)
        self.sort()

    @precondition(lambda self: self.busy)
    @rule(data=st.data(), unpark=st.booleans())
    def park(self, data: st.DataObject, unpark: bool) -> None:
        connection = data.draw(st.sampled_from(self.busy))
        if connection in self.parked:
            return

        def reclaimed() -> None:
            self.busy.remove(connection)
            self.parked.remove(connection)
            self.idle_or_closed.append(connection)

        self.parked.append(connection)
        connection.parked = Parked(self.now, reclaimed)
        if unpark:
            self.unpark(connection)

    def unpark(self, connection: Connection) -> None:
        connection.parked = None
        if connection in self.parked:
            self.parked.remove(connection)

    @precondition(lambda self: self.idle_or_closed)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        connection = data.draw(st.sampled_from(self.idle_or_closed))
        if connection not in self.busy:
            connection.is_alive = False
            self.pool.lost(connection, self.now)
            self.sort()

    @rule(seconds=st.floats(0, 20))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.pool.expire(self.now, most_wait_seconds=60)
        self.sort()

    @invariant()
    def it_is_within_its_limits(self) -> None:
        snapshot = self.pool.snapshot()
        assert snapshot.busy == len(self.busy)
        assert snapshot.opening == len(self.open_tickets)
        assert snapshot.waiting == len(self.waiting)
        assert snapshot.idle + snapshot.busy + snapshot.opening <= self.limits.connections

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        """A waiter will be served by an event that must still come; below a ceiling, by time."""
        if self.waiting:
            assert self.busy or self.open_tickets or self.pool.ceiling.level <= self.limits.connections

    @invariant()
    def it_is_empty_when_nothing_can_be_late(self) -> None:
        assert self.pool.is_empty == (not (self.busy or self.open_tickets or self.waiting or self.pool.snapshot().idle))


AnyOrder.TestCase.settings = settings(stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase
