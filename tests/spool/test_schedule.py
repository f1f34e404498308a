"""The retry schedule: what follows which attempt, and which numbers make no sense."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.spool.schedule import Schedule

MIDDLE = 0.5  # of the jitter's range: the wait itself


@pytest.mark.parametrize(
    ("attempts", "seconds"),
    [(1, 30), (2, 60), (3, 120), (4, 300), (5, 600), (6, 1200), (7, 2400), (8, 3600), (9, 3600), (1000, 3600)],
)
def test_waits_grow_and_the_last_one_repeats(attempts: int, seconds: float) -> None:
    assert Schedule().next_delay(attempts, MIDDLE) == seconds


def test_before_any_attempt_the_first_wait_holds() -> None:
    assert Schedule().next_delay(0, MIDDLE) == 30


@pytest.mark.parametrize(("chance", "seconds"), [(0.0, 80.0), (0.25, 90.0), (0.5, 100.0), (1.0, 120.0)])
def test_jitter_makes_a_wait_longer_or_shorter(chance: float, seconds: float) -> None:
    assert Schedule((100.0,), jitter=0.2).next_delay(1, chance) == pytest.approx(seconds)


def test_five_days_hold_some_125_attempts_at_an_upstream() -> None:
    age, attempts = 0.0, 1
    while age < Schedule().max_age_seconds:
        age += Schedule().next_delay(attempts, MIDDLE)
        attempts += 1
    assert 120 < attempts < 130


@given(
    st.lists(st.floats(0.001, 1e6), min_size=1, max_size=12), st.floats(0, 0.99), st.integers(1, 100), st.floats(0, 1)
)
def test_no_wait_leaves_the_range_of_the_jitter(
    waits: list[float], jitter: float, attempts: int, chance: float
) -> None:
    schedule = Schedule(tuple(waits), jitter=jitter)
    wait = waits[min(attempts, len(waits)) - 1]
    delay = schedule.next_delay(attempts, chance)
    assert delay > 0
    assert wait * (1 - jitter) * 0.999999 <= delay <= wait * (1 + jitter) * 1.000001


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"waits_seconds": ()}, "waits are one or more positive numbers"),
        ({"waits_seconds": (30.0, 0.0)}, "waits are one or more positive numbers"),
        ({"waits_seconds": (30.0, -1.0)}, "waits are one or more positive numbers"),
        ({"waits_seconds": (30.0, math.nan)}, "waits are one or more positive numbers"),
        ({"waits_seconds": (math.inf,)}, "waits are one or more positive numbers"),
        ({"jitter": -0.1}, "jitter is from 0 to below 1"),
        ({"jitter": 1.0}, "jitter is from 0 to below 1"),  # a wait could be nothing at all
        ({"jitter": math.nan}, "jitter is from 0 to below 1"),
        ({"max_age_seconds": 0.0}, "a message may become some seconds old"),
        ({"max_age_seconds": math.nan}, "a message may become some seconds old"),
        ({"warn_after_seconds": 0.0}, "a warning comes after some seconds"),
        ({"warn_after_seconds": math.nan}, "a warning comes after some seconds"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Schedule(**numbers)


def test_no_warning_is_a_schedule_too() -> None:
    assert Schedule(warn_after_seconds=None).warn_after_seconds is None
