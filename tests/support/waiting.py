"""Waiting for what must come, with a bound that only a failing test reaches."""

import asyncio
from collections.abc import Callable

SECONDS = 30.0


async def until(condition: Callable[[], object], *, timeout_seconds: float = SECONDS) -> None:
    """Let the event loop turn until `condition` holds.

    Raises:
        TimeoutError: it never did.
    """
    async with asyncio.timeout(timeout_seconds):
        while not condition():  # noqa: ASYNC110 - the condition is on the far side of a socket: no event to wait for
            await asyncio.sleep(0)
