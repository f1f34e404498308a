"""How a run's time is divided."""

import pytest

from tests.bench.budget import LEAST_SECONDS, MOST_SECONDS, OVERHEAD_SECONDS, Budget, duration


class FakeClock:
    """A clock that moves when it is told."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def test_runs_share_what_is_left() -> None:
    clock = FakeClock()
    budget = Budget(1000, clock=clock)
    assert budget.seconds_each(100, reserved_seconds=650) == 3.5 - OVERHEAD_SECONDS
    clock.advance(200)
    assert budget.seconds_each(50, reserved_seconds=650) == 3 - OVERHEAD_SECONDS


def test_a_run_is_neither_too_short_nor_too_long() -> None:
    clock = FakeClock()
    budget = Budget(100, clock=clock)
    assert budget.seconds_each(1) == MOST_SECONDS
    assert budget.seconds_each(1000) == LEAST_SECONDS
    clock.advance(101)
    assert budget.seconds_each(1) == LEAST_SECONDS


def test_without_a_budget_runs_have_a_fixed_length() -> None:
    assert Budget(None, fixed_seconds=0.3).seconds_each(100, reserved_seconds=1e6) == 0.3


def test_a_slow_machine_gets_shorter_runs() -> None:
    budget = Budget(1000, clock=FakeClock())
    before = budget.seconds_each(200)
    for _ in range(50):
        budget.took(5.0, 1.0)
    assert budget.seconds_each(200) == pytest.approx(before - (4.0 - OVERHEAD_SECONDS), abs=0.05)


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "0", "-1m", "inf", "nan", "20 minutes"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError):
        duration(text)
