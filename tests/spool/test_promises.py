"""Promises: futures whose callbacks are called at once."""

import asyncio

import pytest

from otel_smtp.spool.messages import SpoolError
from otel_smtp.spool.promises import Promise


async def test_callbacks_are_called_by_the_call_that_answers() -> None:
    promise: Promise[int] = Promise()
    heard: list[object] = []
    promise.add_done_callback(lambda done: heard.append(("first", done.result())))
    promise.add_done_callback(lambda done: heard.append(("second", done.result())))
    assert not promise.done()
    promise.settle(7)
    assert heard == [("first", 7), ("second", 7)]
    assert promise.done()
    assert await promise == 7


async def test_a_callback_that_comes_late_is_called_in_the_next_turn() -> None:
    promise: Promise[int] = Promise()
    promise.settle(7)
    heard: list[int] = []
    promise.add_done_callback(lambda done: heard.append(done.result()))
    assert not heard, "whoever asks has not gone on yet"
    await asyncio.sleep(0)
    assert heard == [7]


async def test_an_error_is_raised_wherever_it_is_waited_for() -> None:
    promise: Promise[None] = Promise()
    waiting = [asyncio.ensure_future(promise) for _ in range(2)]
    await asyncio.sleep(0)
    promise.fail(SpoolError("the disk is full"))
    with pytest.raises(SpoolError, match="full"):
        await promise
    for one in waiting:
        with pytest.raises(SpoolError, match="full"):
            await one


async def test_who_gives_up_waiting_changes_nothing_for_others() -> None:
    promise: Promise[int] = Promise()
    one, other = asyncio.ensure_future(promise), asyncio.ensure_future(promise)
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.sleep(0)
    assert not promise.done()
    promise.settle(7)
    assert await other == 7
    assert one.cancelled()
