"""The results of store verbs that every message needs."""

import asyncio
from collections.abc import Callable, Generator
from typing import Generic, TypeVar

T = TypeVar("T")


class Promise(Generic[T]):
    """A future whose callbacks run within the call that answers it: a turn of the event loop sooner, and cheaper.

    A task that awaits it continues later, as with any other; cancelling the wait does not affect it.
    """

    __slots__ = ("_callbacks", "_error", "_is_done", "_result")

    def __init__(self) -> None:
        self._callbacks: tuple[Callable[[Promise[T]], object], ...] = ()
        self._error: BaseException | None = None
        self._is_done = False
        self._result: T | None = None

    def add_done_callback(self, callback: Callable[["Promise[T]"], object]) -> None:
        """Call `callback` with this when there is an answer; if there is one already, in the next turn of the loop."""
        if self._is_done:
            asyncio.get_running_loop().call_soon(callback, self)
        else:
            self._callbacks = (*self._callbacks, callback)

    def settle(self, result: T) -> None:
        """Give the answer, once."""
        self._result = result
        self._is_done = True
        for callback in self._callbacks:
            callback(self)

    def fail(self, error: BaseException) -> None:
        """Give an error as the answer, once."""
        self._error = error
        self._is_done = True
        for callback in self._callbacks:
            callback(self)

    def done(self) -> bool:
        """Whether there is an answer."""
        return self._is_done

    def result(self) -> T:
        """The answer; raises the error if that is the answer."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # T may be None

    def __await__(self) -> Generator[object, None, T]:
        if not self._is_done:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.add_done_callback(lambda _: None if waiting.done() else waiting.set_result(None))
            yield from waiting
        return self.result()
