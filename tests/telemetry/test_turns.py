"""Work in steps, one in each turn of the event loop."""

import asyncio
from collections.abc import Iterator

import pytest

from otel_smtp.telemetry.turns import PATIENCE_SECONDS, AtEndOfTurn, StepByStep


def steps(done: list[str], name: str, count: int) -> Iterator[None]:
    for number in range(count):
        done.append(f"{name}{number}")
        yield
    done.append(f"{name} over")


def test_without_a_loop_all_is_done_at_once() -> None:
    done: list[str] = []
    StepByStep().do(steps(done, "a", 2))
    assert done == ["a0", "a1", "a over"]


@pytest.mark.asyncio
async def test_one_piece_of_work_takes_a_step_in_each_turn() -> None:
    done: list[str] = []
    work = StepByStep()
    work.do(steps(done, "a", 2))
    seen = []
    while "a over" not in done:
        seen.append(len(done))
        await asyncio.sleep(0)
    assert seen == [0, 1, 2]


@pytest.mark.asyncio
async def test_several_are_done_in_their_order_and_in_as_many_steps_a_turn() -> None:
    done: list[str] = []
    work = StepByStep()
    for name in "abc":
        work.do(steps(done, name, 1))
    await asyncio.sleep(0)
    assert done == ["a0", "a over", "b0"]
    await asyncio.sleep(0)
    assert done == ["a0", "a over", "b0", "b over", "c0"]


@pytest.mark.asyncio
async def test_what_is_given_when_all_was_done_is_done_too() -> None:
    done: list[str] = []
    work = StepByStep()
    for name in "ab":
        work.do(steps(done, name, 0))
        for _ in range(3):
            await asyncio.sleep(0)
        assert done[-1] == f"{name} over"


@pytest.mark.asyncio
async def test_all_that_waits_can_be_finished() -> None:
    done: list[str] = []
    work = StepByStep()
    for name in "ab":
        work.do(steps(done, name, 3))
    work.finish()
    finished = ["a0", "a1", "a2", "a over", "b0", "b1", "b2", "b over"]
    assert done == finished
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert done == finished


@pytest.mark.asyncio
async def test_work_that_fails_is_dropped_and_the_rest_goes_on() -> None:
    done: list[str] = []
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["exception"]))

    def failing() -> Iterator[None]:
        yield from ()
        raise LookupError

    work = StepByStep()
    work.do(failing())
    work.do(steps(done, "a", 0))
    for _ in range(3):
        await asyncio.sleep(0)
    assert [type(failure) for failure in failures] == [LookupError]
    assert done == ["a over"]


def test_what_a_loop_left_is_done_in_the_next() -> None:
    done: list[str] = []
    work = StepByStep()

    async def give(name: str) -> None:
        work.do(steps(done, name, 1))

    async def give_and_wait() -> None:
        await give("b")
        for _ in range(4):
            await asyncio.sleep(0)

    asyncio.run(give("a"))
    asyncio.run(give_and_wait())
    assert done == ["a0", "a over", "b0", "b over"]


async def test_what_can_wait_is_done_at_the_end_of_the_turn() -> None:
    done: list[str] = []
    soon = AtEndOfTurn()
    soon(lambda: done.append("a"))
    assert done == []
    await asyncio.sleep(0)
    assert done == ["a"]


async def test_under_load_what_can_wait_is_done_together(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    delays: list[float] = []
    now = 100.0
    monkeypatch.setattr(loop, "time", lambda: now)
    monkeypatch.setattr(loop, "call_later", lambda delay, *work: delays.append(delay))
    soon = AtEndOfTurn()
    soon(lambda: None)
    await asyncio.sleep(0)
    now += 0.2 * PATIENCE_SECONDS
    soon(lambda: None)
    assert delays == [pytest.approx(0.8 * PATIENCE_SECONDS)]


def test_without_a_loop_what_can_wait_is_done_at_once() -> None:
    done: list[str] = []
    AtEndOfTurn()(lambda: done.append("a"))
    assert done == ["a"]
