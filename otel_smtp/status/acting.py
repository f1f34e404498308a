"""Operators' actions on the queue from the page, with a token.

A browser that shows another page must not be able to act: a request needs our own header, which no foreign page can
send without a preflight request, and if it names its origin, that must be this port.
"""

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

logger: Final = logging.getLogger("otel_smtp.status.acting")

QUEUE_TOKEN_HEADER: Final = "x-otel-smtp-queue-token"  # noqa: S105 - the name of a header
COMMANDS: Final = ("retry", "hold", "release", "expire")
MOST_IDS: Final = 200
_MOST_OCTETS: Final = 16 * 1024
_WRONG_TOKEN_SECONDS: Final = 1.0  # each guess costs this, and a place among the few connections

Act = Callable[[str, Sequence[str], str], Awaitable[Sequence[Mapping[str, Any]]]]
"""Runs a command on messages by id, for a client's address; yields for each `queue_id`, and `changed` or `error`."""


class QueueActions:
    """Commands to the queue.

    Args:
        act: does one.
        token: anyone with it may act.
    """

    def __init__(self, act: Act, token: str) -> None:
        self._act = act
        self._token = token.encode()

    async def answer(self, command: str, request: Request) -> Response:
        """Run a command on the messages that the request names: `{"ids": [...]}`."""
        client = request.client.host if request.client is not None else ""
        if not _is_of_this_page(request):
            return _refusal(403, "this comes from another page")
        if not hmac.compare_digest(request.headers.get(QUEUE_TOKEN_HEADER, "").encode(), self._token):
            logger.warning("queue action refused: wrong token", extra={"client": client})
            await asyncio.sleep(_WRONG_TOKEN_SECONDS)
            return _refusal(403, "the token is wrong")
        if command not in COMMANDS:
            return _refusal(404, f"no such command; there are {', '.join(COMMANDS)}")
        ids = await _ids(request)
        if ids is None:
            return _refusal(400, f'send {{"ids": [...]}} as application/json, 1 to {MOST_IDS} queue ids')
        return JSONResponse({"messages": await self._act(command, ids, client)})


def _is_of_this_page(request: Request) -> bool:
    """Whether a browser says that the request comes from this port's own page; others than browsers say nothing."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.headers.get("host", "").lower():
        return False
    return request.headers.get("sec-fetch-site", "same-origin") == "same-origin"


async def _ids(request: Request) -> Sequence[str] | None:
    """The named ids; None: the request is malformed."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return None
    body = bytearray()
    async for piece in request.stream():
        body.extend(piece)
        if len(body) > _MOST_OCTETS:
            return None
    try:
        asked = json.loads(body)
    except ValueError:
        return None
    ids = asked.get("ids") if isinstance(asked, dict) else None
    if not isinstance(ids, list) or not 0 < len(ids) <= MOST_IDS or not all(isinstance(one, str) for one in ids):
        return None
    return ids


def _refusal(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status)
