"""Turns of clients to have a password verified, which slow down guessers.

Each client, as far as it can be told from others, has one password verified at a time: however many connections it has,
it takes one hashing thread and leaves the rest to others. After too many failures within a minute, it has one verified
every `GUESS_SECONDS`, right or wrong: if only wrong passwords were delayed, a guesser need not wait, since silence
would mean wrong. Waiting logins are in line, the fewest failures of their name first; beyond `MOST_WAITING` they are
refused.

A name that has logged in from there before, and is not being guessed, never waits: it may be an application beside one
with a wrong password.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Final

from otel_smtp.server.failure_rate import FailureRate, network_of

GUESS_SECONDS: Final = 0.2
"""Five guesses per second are useless to a guesser, and cost some hundredths of a processor."""
MOST_WAITING: Final = 64
"""Waiting costs a guesser more than a refusal, and us less."""
MOST_KNOWN: Final = 4096
MOST_NAME_CHARACTERS: Final = 255


class TooManyGuesses(Exception):
    """Too many logins wait for their password to be verified."""


class Guesses:
    """Failed logins, and the turns of the clients that make them.

    A guesser is an address, or the owner of a socket on this machine, in words.

    Args:
        limit: this many failures within a minute are too many.
    """

    def __init__(self, limit: int) -> None:
        # The waiting logins of each guesser whose password is being verified, or was a moment ago.
        self._lines: dict[str, list[tuple[str, asyncio.Future[None]]]] = {}
        self._known: OrderedDict[str, None] = OrderedDict()  # guessers and names that logged in
        self.hold_to(limit)

    def __repr__(self) -> str:
        return f"<Guesses of {len(self._failures)}, {len(self._lines)} lines>"

    def hold_to(self, limit: int) -> None:
        """Apply this limit from now on."""
        self._failures = FailureRate(limit=limit)

    def are_too_many(self, guesser: str) -> bool:
        """Whether the guesser has failed too often."""
        return self._failures.is_exceeded(guesser, asyncio.get_running_loop().time())

    def failed(self, guesser: str, name: str) -> None:
        """A login failed."""
        now = asyncio.get_running_loop().time()
        self._failures.count(_login(network_of(guesser), name), now)
        self._failures.count(guesser, now)  # the later one, so that trying many names does not make it forgotten

    def succeeded(self, guesser: str, name: str) -> None:
        """A login succeeded."""
        login = _login(network_of(guesser), name)
        self._known[login] = None
        self._known.move_to_end(login)
        if len(self._known) > MOST_KNOWN:
            self._known.popitem(last=False)

    @contextlib.asynccontextmanager
    async def turn(self, guesser: str, name: str) -> AsyncIterator[None]:
        """Wait for a turn; verify the password of `name` inside.

        Raises:
            TooManyGuesses: too many logins of this guesser wait already.
        """
        guesser = network_of(guesser)
        login = _login(guesser, name)
        if login in self._known and not self.are_too_many(login):
            yield
            return
        await self._wait(guesser, login)
        try:
            yield
        except asyncio.CancelledError:
            self.failed(guesser, name)  # gone before the answer, having learned from the silence
            raise
        finally:
            if self.are_too_many(guesser):
                asyncio.get_running_loop().call_later(GUESS_SECONDS, self._next, guesser)
            else:
                self._next(guesser)

    async def _wait(self, guesser: str, login: str) -> None:
        waiting = self._lines.get(guesser)
        if waiting is None:
            self._lines[guesser] = []
            return
        turn = asyncio.get_running_loop().create_future()
        place = (login, turn)
        waiting.append(place)
        self._order(guesser, waiting)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled() and turn.exception() is None:
                self._next(guesser)  # its turn had come
            elif place in waiting:
                waiting.remove(place)
            raise

    def _order(self, guesser: str, waiting: list[tuple[str, asyncio.Future[None]]]) -> None:
        """With a guesser, sort the line by the fewest failures and refuse logins beyond its end. Without one, all stay
        in order: many applications may log in for the first time at once.
        """
        if not self.are_too_many(guesser):
            return
        now = asyncio.get_running_loop().time()
        waiting.sort(key=lambda place: self._failures.count_of(place[0], now))
        for _, turn in waiting[MOST_WAITING:]:
            if not turn.done():
                turn.set_exception(TooManyGuesses)
        del waiting[MOST_WAITING:]

    def _next(self, guesser: str) -> None:
        """The turn is over: give it to the next."""
        waiting = self._lines[guesser]
        self._order(guesser, waiting)
        while waiting:
            _, turn = waiting.pop(0)
            if not turn.done():
                turn.set_result(None)
                return
        del self._lines[guesser]


def _login(guesser: str, name: str) -> str:
    return f"{guesser}\0{name[:MOST_NAME_CHARACTERS]}"
