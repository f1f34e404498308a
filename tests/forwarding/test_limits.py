"""Limits: what may leave in any window, who waits and how long, and what processes share."""

import math
import multiprocessing
import os
import random
import time
from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_smtp.forwarding.limits import (
    IN_FLIGHT_SECONDS,
    MARGIN_SECONDS,
    MOST_KEPT_CELLS,
    Limit,
    LimitSettings,
    Permit,
    SharedLimits,
)
from otel_smtp.forwarding.pace import Pace, WaitingMail
from tests.support.examples import scaled
from tests.support.waiting import until


def limit(count: int, period: float = 60.0, burst: int = 1, *, per_recipient: bool = False) -> Limit:
    return Limit(LimitSettings("l", count, period, burst, per_recipient=per_recipient))


def most_in_a_window(taken: list[tuple[float, int]], seconds: float) -> int:
    """The most permits within any window that is as long."""
    times = [at for at, _ in taken]
    sums = [0]
    for _, amount in taken:
        sums.append(sums[-1] + amount)
    return max((sums[index + 1] - sums[bisect_right(times, at - seconds)] for index, at in enumerate(times)), default=0)


def take(one: Limit, amount: int, now: float) -> Permit | float:
    """A permit for what leaves at once."""
    permit = one.take(amount, now)
    if isinstance(permit, Permit):
        one.landed(permit, now)
    return permit


def drain(one: Limit, amounts: list[int], now: float = 0.0) -> list[tuple[float, int]]:
    """When permits are given to one who asks for the next as soon as it may."""
    taken: list[tuple[float, int]] = []
    for amount in amounts:
        while isinstance(wait := take(one, amount, now), float):
            now += wait
        taken.append((now, amount))
    return taken


def test_without_a_burst_what_leaves_is_spread_evenly() -> None:
    times = [at for at, _ in drain(limit(30), [1] * 20)]
    assert times == pytest.approx([2.0 * number for number in range(20)])


def test_a_burst_leaves_at_once_and_the_window_counts_it() -> None:
    times = [at for at, _ in drain(limit(30, burst=10), [1] * 60)]
    assert times[:10] == [0.0] * 10
    assert times[10:30] == pytest.approx([2.0 * number for number in range(1, 21)])
    assert times[30] == pytest.approx(60 + MARGIN_SECONDS)  # GCRA alone would have given it at 42 s
    assert most_in_a_window([(at, 1) for at in times], 60) == 30


@settings(max_examples=scaled(60))
@given(
    count=st.integers(1, 40),
    share=st.floats(0, 1),
    period=st.sampled_from([1.0, 60.0, 3600.0]),
    asks=st.lists(st.tuples(st.integers(1, 12), st.floats(0, 2)), min_size=1, max_size=80),
)
def test_no_window_ever_has_more(count: int, share: float, period: float, asks: list[tuple[int, float]]) -> None:
    one = limit(count, period, burst=max(1, round(share * count)))
    now = 1000.0
    taken: list[tuple[float, int]] = []
    for amount, pause in asks:
        now += pause * period / count
        amount = min(amount, count)
        permit = take(one, amount, now)
        if isinstance(permit, Permit):
            taken.append((now, amount))
        else:
            assert 0 < permit <= 2 * period + MARGIN_SECONDS
            assert one.available(now) < amount or amount > one.settings.burst
    assert most_in_a_window(taken, period) <= count


def test_what_is_in_flight_counts_until_it_has_landed() -> None:
    for seed in range(200):  # rarely is a table filled by cells whose permits were given back
        chance = random.Random(seed)
        one = limit(9, 1.0, burst=9)
        now = 1000.0
        in_flight: list[Permit] = []
        landed: list[tuple[float, int]] = []
        for _ in range(400):
            now += chance.expovariate(15)
            step = chance.random()
            if step < 0.55:
                if isinstance(permit := one.take(chance.choice([1, 1, 1, 3]), now), Permit):
                    in_flight.append(permit)
                    in_window = [amount for at, amount in landed if at > now - 1.0]
                    assert sum(in_window) + sum(permit.amount for permit in in_flight) <= 9
            elif in_flight:
                permit = in_flight.pop(chance.randrange(len(in_flight)))
                if step < 0.8:
                    one.landed(permit, now)
                    landed.append((now, permit.amount))
                else:
                    one.give_back(permit)


@pytest.mark.parametrize("count", [9, 70_000])
def test_what_is_given_back_leaves_room_for_others(count: int) -> None:
    one = limit(count, 1000.0, burst=count)
    assert isinstance(one.take(1, 0.0), Permit)  # in flight all the time, so no cell leaves the window
    for number in range(3 * one.settings.most_cells):
        first, second = one.take(1, number / 1e6), one.take(one.settings.group, number / 1e6)
        assert isinstance(first, Permit)
        assert isinstance(second, Permit)
        one.give_back(first)
        one.give_back(second)
    assert one.available(1.0) == count - 1


def test_all_of_the_rate_is_used() -> None:
    taken = drain(limit(10, 1.0, burst=5), [1] * 200)
    assert taken[-1][0] <= 190 / 10 * (1 + MARGIN_SECONDS) + 1


def test_a_rate_of_millions_is_counted_in_groups_and_never_exceeded() -> None:
    one = limit(1_000_000, 86400.0, burst=1_000_000)
    assert one.settings.table_cells < 200_000
    chance = random.Random(1)
    taken = 0
    while isinstance(take(one, amount := chance.randint(1, 5000), 0.0), Permit):
        taken += amount
    assert 994_000 < taken <= 1_000_000
    assert one.available(86400.0 + MARGIN_SECONDS) == 1_000_000


def test_what_was_not_used_is_given_back() -> None:
    one = limit(2, 60.0, burst=2)
    first, second = one.take(1, 0.0), one.take(1, 1.0)
    assert isinstance(first, Permit)
    assert isinstance(second, Permit)
    assert one.available(1.0) == 0
    one.give_back(first)
    assert one.available(1.0) == 1
    one.give_back(second)
    assert one.available(1.0) == 2


def test_what_leaves_late_counts_from_then_on() -> None:
    one = limit(1, 60.0)
    permit = one.take(1, 0.0)
    assert isinstance(permit, Permit)
    assert one.take(1, 20.0) == pytest.approx(40.0)  # the schedule; and as it is in flight, the window is full
    assert one.take(1, 61.0) == pytest.approx(0.05)
    one.landed(permit, 30.0)
    assert one.take(1, 60.1) == pytest.approx(30.0 + MARGIN_SECONDS - 0.1)


def test_a_permit_that_has_left_the_window_cannot_be_given_back_twice() -> None:
    one = limit(1, 1.0)
    permit = take(one, 1, 0.0)
    assert isinstance(permit, Permit)
    assert isinstance(take(one, 1, 2.0), Permit)
    one.give_back(permit)
    assert one.available(2.0) == 0


def test_more_than_a_burst_is_given_when_the_burst_is_whole() -> None:
    one = limit(10, 10.0, burst=2)
    assert isinstance(take(one, 5, 0.0), Permit)
    assert one.take(1, 0.0) == pytest.approx(4.0)
    assert isinstance(take(one, 5, 5.0), Permit)
    assert one.take(1, 9.5) == pytest.approx(0.55)  # the window: five of the ten are of the first moment


# Processes ----------------------------------------------------------------------------------------------------


def _take_as_it_can(shared: SharedLimits, ends_at: float, found: "multiprocessing.Queue[list[float]]") -> None:
    one = shared.limits["l"]
    times = []
    while (now := time.monotonic()) < ends_at:
        if isinstance(permit := one.take(1, now), Permit):
            at = time.monotonic()  # another process may have had its turn since
            one.landed(permit, at)
            times.append(at)
    found.put(times)


def test_processes_keep_a_limit_together() -> None:
    context = multiprocessing.get_context("fork")
    shared = SharedLimits([LimitSettings("other", 3, 1.0), LimitSettings("l", 40, 0.4, 10)])
    found: multiprocessing.Queue[list[float]] = context.Queue()
    ends_at = time.monotonic() + 2.0
    workers = [context.Process(target=_take_as_it_can, args=(shared, ends_at, found)) for _ in range(3)]
    for worker in workers:
        worker.start()
    each = [found.get(timeout=20) for _ in workers]
    for worker in workers:
        worker.join()
    times = sorted(time for one in each for time in one)
    assert most_in_a_window([(at, 1) for at in times], 0.4) <= 40
    assert len(times) > 100
    assert shared.limits["other"].available(time.monotonic()) == 1


def test_a_process_that_dies_leaves_the_limit_to_others() -> None:
    shared = SharedLimits([LimitSettings("l", 10, 60.0, 10)])
    one = shared.limits["l"]
    if (child := os.fork()) == 0:
        assert one._lock is not None
        one._lock().__enter__()
        os._exit(0)  # with the lock in its hands
    os.waitpid(child, 0)
    assert isinstance(one.take(1, 0.0), Permit)


# Who waits ----------------------------------------------------------------------------------------------------


class Mail:
    """Somebody who asks a pace."""

    def __init__(self, pace: Pace, *, recipients: int = 1, patience: float = math.inf) -> None:
        self.answer: bool | None = None
        self.leave: WaitingMail | None = pace.ask(recipients, patience, self._decided, with_message=True)

    def _decided(self, is_given: bool) -> None:
        self.answer = is_given

    @property
    def is_waiting(self) -> bool:
        return self.leave is not None and self.leave.is_waiting


async def test_who_comes_first_is_served_first() -> None:
    pace = Pace([limit(50, 1.0)])
    mails = [Mail(pace) for _ in range(4)]
    assert mails[0].leave is not None
    pace.landed(mails[0].leave)
    assert [mail.is_waiting for mail in mails] == [False, True, True, True]
    assert [mail.leave.held_by for mail in mails if mail.leave] == ["", "l", "l", "l"]
    for number in range(1, 4):
        await until(lambda number=number: mails[number].answer)  # type: ignore[misc]
        assert not any(mail.answer for mail in mails[number + 1 :])
    pace.close()


def test_a_permit_in_flight_is_forgotten_in_the_end() -> None:
    one = limit(1, 1.0)
    assert isinstance(one.take(1, 0.0), Permit)
    assert isinstance(one.take(1, IN_FLIGHT_SECONDS - 0.1), float)
    assert isinstance(one.take(1, IN_FLIGHT_SECONDS), Permit)


async def test_who_leaves_makes_room() -> None:
    now = [0.0]
    made: list[int] = []
    pace = Pace([limit(1, 60.0)], lambda: made.append(1), clock=lambda: now[0])
    first, second, third = (Mail(pace) for _ in range(3))
    assert second.leave is not None
    assert first.leave is not None
    pace.withdraw(first.leave)  # nothing of it has left
    pace.withdraw(second.leave)
    assert (second.answer, third.answer) == (None, True)
    assert made
    pace.close()


async def test_nothing_is_kept_of_who_leaves() -> None:
    # Else who asks and goes, a thousand times a second, fills the memory within one patience.
    pace = Pace([limit(1, 60.0)])
    Mail(pace)
    Mail(pace)
    behind = Mail(pace, patience=50.0).leave
    assert behind is not None
    timer = behind.patience
    assert timer is not None
    pace.withdraw(behind)
    assert timer.cancelled()
    pace.close()


async def test_who_would_wait_too_long_is_refused_at_once() -> None:
    pace = Pace([limit(1, 60.0)])
    assert not Mail(pace).is_waiting
    assert Mail(pace, patience=59.0).leave is None
    patient = Mail(pace)
    assert Mail(pace, patience=0.0).leave is None
    behind = Mail(pace, patience=0.02)
    assert behind.is_waiting
    await until(lambda: behind.answer is not None)
    assert behind.answer is False
    assert patient.is_waiting
    pace.close()


async def test_all_limits_hold_and_none_is_used_in_vain() -> None:
    by_message, by_recipient = limit(100, 60.0, 100), limit(10, 60.0, 10, per_recipient=True)
    pace = Pace([by_message, by_recipient])
    assert pace.most_recipients == 10
    assert not Mail(pace, recipients=8).is_waiting
    assert Mail(pace, recipients=3).is_waiting
    now = time.monotonic()
    assert by_message.available(now) == 99
    assert by_recipient.available(now) == 2
    pace.close()


async def test_one_waits_and_the_others_stay_in_the_queue() -> None:
    pace = Pace([limit(60, 60.0, 3)])
    assert pace.concurrency(20) == 4
    for _ in range(3):
        pace.begun += 1
        assert not Mail(pace).is_waiting
    assert pace.concurrency(20) == 4
    pace.begun += 1
    assert Mail(pace).is_waiting
    assert pace.concurrency(20) == 4  # all of them are under way
    pace.close()


def test_the_state_of_a_long_window_has_each_permit_once_and_none_too_old() -> None:
    limit = Limit(LimitSettings("l", 2000, 1000.0, 2000))
    used: list[float] = []
    in_flight = 0
    # The first cells leave the window, so that those in use do not begin where their table does.
    for number in range(2600):
        permit = limit.take(1, 0.6 * number)
        assert isinstance(permit, Permit)
        if number > 1500 and not number % 7:
            in_flight += 1
        else:
            limit.landed(permit, 0.6 * number)
            used.append(0.6 * number)
    now = 0.6 * 2600
    used = [at for at in used if at + 1000.0 + MARGIN_SECONDS > now]
    state = limit.state(now)
    assert len(used) > 4 * MOST_KEPT_CELLS >= 4 * len(state.used)
    assert state.in_flight == in_flight
    assert sum(permits for _, permits in state.used) == len(used)
    for age, _ in state.used:
        older = sum(now - at >= age - 1e-9 for at in used)
        assert sum(permits for other, permits in state.used if other >= age) <= older
