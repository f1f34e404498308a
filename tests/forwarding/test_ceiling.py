"""What workers share of an upstream that caps connections; each worker is a pool of its own, the clock is made up."""

import os

import pytest

from otel_smtp.forwarding.ceiling import HANDED_ON_SECONDS, LINGERING_SECONDS, TURN_SECONDS, Ceiling, SharedCeilings
from otel_smtp.forwarding.faults import UpstreamFault
from otel_smtp.forwarding.pool import RETRY_SECONDS, Pool
from otel_smtp.forwarding.settings import PoolLimits
from otel_smtp.forwarding.tickets import Decision, Ticket
from otel_smtp.smtp.replies import Reply
from tests.forwarding.test_pool import REFUSED, Connection, Connections, decided


class Worker:
    """A worker that wants connections, and holds those that it has for a while."""

    def __init__(self, ceiling: Ceiling) -> None:
        self.pool: Connections = Pool(PoolLimits(), ceiling)
        self.waiting: list[Ticket[Connection]] = []
        self.held: list[Connection] = []
        self.served = 0

    def wants(self, mails: int, now: float) -> None:
        self.waiting += [self.pool.ask(now) for _ in range(mails)]


class Upstream:
    """Takes `cap` connections from all workers together; each mail takes one step of the clock."""

    def __init__(self, cap: int, *workers: Worker) -> None:
        self.cap = cap
        self.workers = workers
        self.refused = 0
        self.now = 0.0

    @property
    def open(self) -> int:
        return sum(len(worker.held) + worker.pool.snapshot().idle for worker in self.workers)

    def step(self) -> None:
        self.now += 0.25
        for worker in self.workers:
            held, worker.held = worker.held, []
            for connection in held:
                worker.pool.heard_at = self.now
                worker.pool.release(connection, self.now)
            worker.pool.expire(self.now)
            worker.pool.take_closing()
            self.serve(worker)

    def serve(self, worker: Worker) -> None:
        for ticket in list(worker.waiting):
            if ticket.decision is Decision.OPEN:
                if self.open < self.cap:
                    worker.held.append(Connection())
                    worker.pool.opened(ticket, worker.held[-1], self.now)
                else:
                    self.refused += 1
                    worker.pool.failed(ticket, self.now, REFUSED)
                    continue
            elif ticket.decision is Decision.REUSE:
                assert ticket.connection is not None
                worker.held.append(ticket.connection)
            else:
                assert ticket.decision is Decision.WAITING
                continue
            worker.waiting.remove(ticket)
            worker.served += 1


def workers(count: int) -> list[Worker]:
    shared = SharedCeilings(["up"], count)
    table = shared._cells[2 * count :]  # as `claim` does in each process
    return [Worker(Ceiling(table, column)) for column in range(count)]


@pytest.mark.parametrize("cap", [1, 2, 3, 4])
def test_workers_share_what_an_upstream_takes_and_nobody_is_left_out(cap: int) -> None:
    one, other = workers(2)
    upstream = Upstream(cap, one, other)
    one.wants(30, 0)
    upstream.step()  # one of them has all connections before the other comes
    other.wants(30, 0)
    for _ in range(40):
        upstream.step()
    assert min(one.served, other.served) >= 4 * cap
    for _ in range(200):
        upstream.step()
    assert (one.served, other.served) == (30, 30)
    assert upstream.refused < 25


def test_an_idle_connection_below_a_ceiling_is_given_up_at_once() -> None:
    one, other = workers(2)
    upstream = Upstream(2, one, other)
    one.wants(5, 0)
    for _ in range(10):
        upstream.step()
    assert one.pool.snapshot().idle == 0
    other.wants(1, upstream.now)
    assert other.waiting[0].decision is Decision.OPEN


def test_a_connection_that_nobody_here_waits_for_is_given_up_as_it_is_released() -> None:
    one, other = workers(2)
    upstream = Upstream(2, one, other)
    one.wants(3, 0)
    upstream.step()
    assert one.pool.ceiling.level == 2
    while one.held:
        one.pool.release(one.held.pop(), upstream.now)
        upstream.serve(one)
    assert one.pool.snapshot().idle == 0


def test_what_lies_idle_is_given_up_when_another_worker_meets_the_cap() -> None:
    one, other = workers(2)
    upstream = Upstream(2, one, other)
    one.wants(2, 0)
    upstream.step()
    for connection in one.held:
        one.pool.release(connection, upstream.now)
    one.held = []
    assert one.pool.snapshot().idle == 2
    other.wants(1, upstream.now)
    upstream.serve(other)
    assert upstream.refused == 1
    one.pool.expire(upstream.now)
    assert one.pool.snapshot().idle == 0


def test_without_a_ceiling_idle_connections_are_kept() -> None:
    one, other = workers(2)
    upstream = Upstream(20, one, other)
    one.wants(3, 0)
    for _ in range(4):
        upstream.step()
    assert one.pool.snapshot().idle == 3


def test_a_worker_that_was_refused_while_another_opens_waits_for_that() -> None:
    one, other = workers(2)
    one.wants(1, 0)
    other.wants(1, 0)
    assert other.pool.failed(other.waiting[0], 0, REFUSED)
    assert one.pool.failed(one.waiting[0], 0, REFUSED) is False  # nobody is left whose outcome could say more
    other.pool.expire(1)
    assert other.waiting[0].decision is Decision.OPEN  # now it is its own verdict
    assert other.pool.failed(other.waiting[0], 0, REFUSED) is False


def test_what_another_worker_has_just_closed_is_opened_a_little_later() -> None:
    one, other = workers(2)
    upstream = Upstream(1, one, other)
    one.wants(2, 0)
    for _ in range(3):
        upstream.step()
    now = upstream.now
    assert one.served == 2
    assert one.pool.snapshot().idle == 0
    one.pool.ceiling.closed(now)
    assert not other.pool.ceiling.allows(now + HANDED_ON_SECONDS / 2)
    assert other.pool.ceiling.allows(now + 2 * HANDED_ON_SECONDS)


def test_an_upstream_that_has_not_noticed_what_another_worker_closed_is_tried_again() -> None:
    one, other = workers(2)
    upstream = Upstream(1, one, other)
    one.wants(2, 0)
    for _ in range(3):
        upstream.step()
    closed_at = now = upstream.now
    one.pool.ceiling.closed(closed_at)
    assert other.pool.ceiling.level == 1
    assert not other.pool.ceiling.works(now)
    other.wants(1, now + HANDED_ON_SECONDS)
    (ticket,) = other.waiting
    said = UpstreamFault("refused", upstream_reply=Reply(421, None, ("too many connections",)))
    for _ in range(3):
        now += RETRY_SECONDS
        other.pool.expire(now)
        assert decided(ticket, Decision.OPEN)
        assert other.pool.failed(ticket, now, said)
        other.pool.expire(now + RETRY_SECONDS / 2)
        assert decided(ticket, Decision.WAITING)
    now = closed_at + LINGERING_SECONDS
    other.pool.expire(now)
    assert decided(ticket, Decision.OPEN)
    assert not other.pool.failed(ticket, now, said)  # it has noticed by now: nobody gets in


def test_an_upstream_that_does_not_answer_is_away_whatever_was_closed() -> None:
    one, other = workers(2)
    upstream = Upstream(1, one, other)
    one.wants(2, 0)
    for _ in range(3):
        upstream.step()
    one.pool.ceiling.closed(upstream.now)
    now = upstream.now + HANDED_ON_SECONDS
    other.wants(1, now)
    assert not other.pool.failed(other.waiting[0], now, REFUSED)


def test_turns_are_taken_where_there_is_not_one_for_each() -> None:
    one, other = (worker.pool.ceiling for worker in workers(2))
    one.note(1, 0, 1, 0.0)
    other.note(0, 0, 1, 0.0)
    one.refused(0.0)
    shares = [(one.share(turn * TURN_SECONDS), other.share(turn * TURN_SECONDS)) for turn in range(4)]
    assert shares == [(1, 0), (0, 1), (1, 0), (0, 1)]
    other.note(0, 0, 0, 0.0)
    assert [one.share(turn * TURN_SECONDS) for turn in range(2)] == [1, 1]


def test_a_worker_finds_the_column_of_one_that_is_gone_empty() -> None:
    shared = SharedCeilings(["up", "back"], 1)
    process_id = os.fork()
    if process_id == 0:  # the worker before
        try:
            shared.claim(0)["back"].note(3, 2, 1, 5.0)
        finally:
            os._exit(0)
    os.waitpid(process_id, 0)
    first, second = shared.claim(0).values()
    assert not second.is_opening
    second.note(1, 1, 1, 1.0)
    assert not first.is_opening
    # Its successor, while it is still there, has the other column.
    shared._cells[0] = os.getppid()
    successor = shared.claim(0)["back"]
    successor.note(0, 0, 0, 0.0)
    assert second.is_opening
