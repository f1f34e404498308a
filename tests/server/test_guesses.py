"""Turns to have a password judged: of each guesser one at a time, and slowly once it has failed too often."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from otel_smtp.server.guesses import GUESS_SECONDS, MOST_KNOWN, MOST_WAITING, Guesses, TooManyGuesses
from tests.support.clock import advance

LIMIT = 3
GUESSER = "uid 1000, cgroup 1"

pytestmark = pytest.mark.movable_clock


async def turns() -> None:
    """Let those whose turn has come begin."""
    for _ in range(10):
        await asyncio.sleep(0)


class Judged:
    """Logins in the order in which their turn came; each is judged until it is released.

    Attributes:
        begun: their names.
    """

    def __init__(self, guesses: Guesses) -> None:
        self._guesses = guesses
        self._released: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._all: list[asyncio.Task[None]] = []
        self.begun: list[str] = []

    async def _judge(self, guesser: str, name: str) -> None:
        async with self._guesses.turn(guesser, name):
            self.begun.append(name)
            await self._released[name].wait()
        self._guesses.failed(guesser, name)

    async def begin(self, *names: str, guesser: str = GUESSER) -> None:
        for name in names:
            self._released[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._judge(guesser, name))
            self._all.append(self._tasks[name])
        await turns()

    async def release(self, name: str) -> None:
        self._released[name].set()
        await turns()

    async def drop(self, name: str) -> None:
        self._tasks[name].cancel()
        with suppress(asyncio.CancelledError):
            await self._tasks[name]
        await turns()

    async def is_sent_away(self, name: str) -> bool:
        await turns()
        task = self._tasks[name]
        return task.done() and isinstance(task.exception(), TooManyGuesses)

    async def stop(self) -> None:
        for task in self._all:
            task.cancel()
        await asyncio.gather(*self._all, return_exceptions=True)


@asynccontextmanager
async def judging(*, failures: int = 0) -> AsyncIterator[tuple[Guesses, Judged]]:
    guesses = Guesses(LIMIT)
    for _ in range(failures):
        guesses.failed(GUESSER, "bob")
    judged = Judged(guesses)
    yield guesses, judged
    await judged.stop()
    advance(2 * GUESS_SECONDS)
    await turns()
    assert not guesses._lines  # nothing is kept of those that have gone


async def test_one_at_a_time_of_each_guesser() -> None:
    async with judging() as (_, judged):
        await judged.begin("a", "b")
        await judged.begin("c", guesser="uid 1001")
        assert judged.begun == ["a", "c"]
        await judged.release("a")
        assert judged.begun == ["a", "c", "b"]


async def test_who_guesses_has_one_judged_in_so_many_seconds_and_others_are_not_slowed() -> None:
    async with judging(failures=LIMIT) as (_, judged):
        await judged.begin("a", "b")
        await judged.release("a")
        assert judged.begun == ["a"]
        await judged.begin("c", guesser="198.51.100.1")
        assert judged.begun == ["a", "c"]
        advance(GUESS_SECONDS * 0.9)
        await turns()
        assert judged.begun == ["a", "c"]
        advance(GUESS_SECONDS * 0.2)
        await turns()
        assert judged.begun == ["a", "c", "b"]


async def test_a_right_password_waits_as_long_as_a_wrong_one() -> None:
    # Else a guesser would take silence for an answer, and go on with a new connection.
    async with judging(failures=LIMIT) as (guesses, judged):
        for name in ("a", "b"):
            await judged.begin(name)
        await judged.release("a")
        guesses.succeeded(GUESSER, "b")  # known now, but it stood in line before
        await turns()
        assert judged.begun == ["a"]


async def test_who_goes_before_the_answer_has_failed() -> None:
    async with judging(failures=LIMIT - 1) as (guesses, judged):
        await judged.begin("a")
        assert not guesses.are_too_many(GUESSER)
        await judged.drop("a")
        assert guesses.are_too_many(GUESSER)


async def test_who_goes_before_its_turn_has_asked_nothing_and_keeps_nobody() -> None:
    async with judging(failures=LIMIT - 1) as (guesses, judged):
        await judged.begin("a", "b", "c")
        await judged.drop("b")
        assert not guesses.are_too_many(GUESSER)
        await judged.release("a")
        assert judged.begun == ["a", "c"]


async def test_a_name_that_is_guessed_at_goes_last() -> None:
    async with judging(failures=LIMIT) as (guesses, judged):
        await judged.begin("first")
        guesses.failed(GUESSER, "bob")
        await judged.begin("bob", "carol")
        await judged.release("first")
        advance(GUESS_SECONDS)
        await turns()
        assert judged.begun == ["first", "carol"]


async def test_a_name_that_has_logged_in_waits_for_nobody_until_it_is_guessed_at() -> None:
    async with judging(failures=LIMIT) as (guesses, judged):
        guesses.succeeded(GUESSER, "carol")
        await judged.begin("bob", "carol")
        assert judged.begun == ["bob", "carol"]
        await judged.release("carol")  # wrong this time
        for _ in range(LIMIT - 1):
            guesses.failed(GUESSER, "carol")
        await judged.begin("carol")
        assert judged.begun == ["bob", "carol"]
        await judged.begin("carol", guesser="uid 1001")  # it has not logged in from there
        assert judged.begun == ["bob", "carol", "carol"]


async def test_beyond_the_end_of_the_line_they_are_sent_away_the_guesser_first() -> None:
    async with judging(failures=LIMIT) as (_, judged):
        await judged.begin("first", *[f"name {number}" for number in range(MOST_WAITING)])
        assert not await judged.is_sent_away(f"name {MOST_WAITING - 1}")
        await judged.begin("bob")
        assert await judged.is_sent_away("bob")
        assert not await judged.is_sent_away(f"name {MOST_WAITING - 1}")


async def test_many_may_log_in_at_once_where_nobody_guesses() -> None:
    async with judging() as (_, judged):
        names = [f"name {number}" for number in range(4 * MOST_WAITING)]
        await judged.begin(*names)
        assert not [name for name in names if await judged.is_sent_away(name)]


async def test_a_client_is_its_network() -> None:
    guesses = Guesses(1)
    guesses.failed("2001:db8::1", "bob")
    guesses.succeeded("2001:db8::1", "carol")
    assert guesses.are_too_many("2001:db8::2")
    async with asyncio.timeout(1), guesses.turn("2001:db8::3", "other"), guesses.turn("2001:db8::2", "carol"):
        pass


async def test_what_is_remembered_is_bounded() -> None:
    guesses = Guesses(LIMIT)
    for _ in range(LIMIT):
        guesses.failed(GUESSER, "bob")
    for number in range(10 * MOST_KNOWN):
        guesses.failed(GUESSER, "x" * 100_000 + str(number))
        guesses.succeeded(GUESSER, str(number))
    assert guesses.are_too_many(GUESSER)  # however many names it tries
    assert len(guesses._known) == MOST_KNOWN
    assert len(guesses._failures) <= MOST_KNOWN
    assert max(map(len, guesses._failures._failures)) < 300
