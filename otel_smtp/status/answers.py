"""The rate of answers: readers of the status port share the event loop with mail, and must not slow it.

Metrics and JSON, which are read repeatedly, are made once per second for all equal requests, one after the other. All
requests together have a rate, beyond which they wait; probes have their own, so that they wait for no other request.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEPT_SECONDS: Final = 1.0
KEPT_ANSWERS: Final = 16
# A request costs about a millisecond, whatever is asked. A page is a dozen requests, then one every few seconds.
REQUESTS_PER_SECOND: Final = 50.0
REQUESTS_AT_ONCE: Final = 30
PROBES: Final = frozenset({"/livez", "/readyz"})
STREAM_PATH: Final = "/api/stream"
# Not the answers to actions, and not those that wait for an event.
_KEPT: Final = frozenset({"/metrics", "/api/status", "/api/connections", "/api/upstreams", "/api/queue", "/api/traces"})

_Key = tuple[str, str, bytes, bytes]


class RequestRate:
    """A rate per second, after an initial burst.

    Args:
        per_second, at_once: see above.
    """

    def __init__(self, per_second: float, at_once: int) -> None:
        self._interval_seconds = 1 / per_second
        self._burst_seconds = (at_once - 1) / per_second
        self._next_at = float("-inf")

    async def wait(self) -> None:
        """Return when it is the caller's turn: in the order of the calls."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        at = max(self._next_at, now - self._burst_seconds)
        self._next_at = at + self._interval_seconds
        if at > now:
            await asyncio.sleep(at - now)


class Answers:
    """Paces requests, and keeps answers for `KEPT_SECONDS`. The client's permission has been checked before.

    Args:
        inner: the application.
        keeps: False: each answer is made for its request, and none waits: for processes that ask each other.
    """

    def __init__(self, inner: ASGIApp, *, keeps: bool = True) -> None:
        self._inner = inner
        self._keeps = keeps
        self._making = asyncio.Lock()
        self._kept: dict[_Key, Sequence[Message]] = {}
        self._probes = RequestRate(REQUESTS_PER_SECOND, REQUESTS_AT_ONCE)
        self._others = RequestRate(REQUESTS_PER_SECOND, REQUESTS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if not self._keeps:
            await self._inner(scope, receive, send)
            return
        await (self._probes if path in PROBES else self._others).wait()
        if method not in ("GET", "HEAD"):
            self._kept.clear()  # the result must be visible
            await self._inner(scope, receive, send)
        elif path in _KEPT or path.startswith("/api/traces/"):
            accept = b",".join(value for name, value in scope["headers"] if name == b"accept")
            for message in await self._answer((method, path, scope["query_string"], accept), scope, receive):
                await send(dict(message))  # which others may add to
        else:
            await self._inner(scope, receive, send)

    async def _answer(self, key: _Key, scope: Scope, receive: Receive) -> Sequence[Message]:
        async with self._making:
            kept = self._kept.get(key)
            if kept is None:
                kept = await self._made(scope, receive)
                if len(self._kept) >= KEPT_ANSWERS:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = kept
                asyncio.get_running_loop().call_later(KEPT_SECONDS, self._forget, key, kept)
        return kept

    def _forget(self, key: _Key, kept: Sequence[Message]) -> None:
        if self._kept.get(key) is kept:
            del self._kept[key]

    async def _made(self, scope: Scope, receive: Receive) -> Sequence[Message]:
        messages: list[Message] = []

        async def keep(message: Message) -> None:
            messages.append(message)

        await self._inner(scope, receive, keep)
        return messages
