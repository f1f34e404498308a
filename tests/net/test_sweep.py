"""The one look at the clock."""

import asyncio

import pytest

from otel_smtp.net import Sweep
from otel_smtp.net.sweep import SWEEP_SECONDS
from tests.support.clock import advance


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.movable_clock
async def test_all_that_are_registered_are_called_with_the_time_again_and_again() -> None:
    sweep = Sweep()
    first: list[float] = []
    second: list[float] = []
    sweep.add(first.append)
    sweep.add(second.append)
    assert not first
    for times in (1, 2, 3):
        advance(SWEEP_SECONDS)
        await turns()
        assert len(first) == len(second) == times
    assert first[-1] == pytest.approx(asyncio.get_running_loop().time(), abs=0.1)
    sweep.remove(first.append)
    advance(SWEEP_SECONDS)
    await turns()
    assert (len(first), len(second)) == (3, 4)
    sweep.remove(second.append)


@pytest.mark.movable_clock
async def test_without_anybody_to_call_there_is_no_timer() -> None:
    sweep = Sweep()
    called: list[float] = []
    sweep.add(called.append)
    sweep.remove(called.append)
    sweep.remove(called.append)
    advance(10)
    await turns()
    assert not called
    sweep.add(called.append)
    advance(SWEEP_SECONDS)
    await turns()
    assert len(called) == 1
    sweep.remove(called.append)


@pytest.mark.movable_clock
async def test_one_that_is_removed_within_a_sweep_is_not_called_any_more() -> None:
    sweep = Sweep()
    called: list[str] = []

    def first(now: float) -> None:
        called.append("first")
        sweep.remove(second)

    def second(now: float) -> None:
        called.append("second")

    sweep.add(first)
    sweep.add(second)
    for _ in range(2):
        advance(SWEEP_SECONDS)
        await turns()
    assert called == ["first", "first"]
    sweep.remove(first)


@pytest.mark.movable_clock
async def test_one_that_raises_costs_the_others_nothing(caplog: pytest.LogCaptureFixture) -> None:
    sweep = Sweep()
    called: list[float] = []

    def bug(now: float) -> None:
        raise ValueError("bug")

    sweep.add(bug)
    sweep.add(called.append)
    for _ in range(2):
        advance(SWEEP_SECONDS)
        await turns()
    assert len(called) == 2
    assert "ValueError: bug" in caplog.text
    sweep.remove(bug)
    sweep.remove(called.append)
