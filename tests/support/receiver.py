"""An application that receives outcomes over HTTP, well behaved or not."""

import asyncio
import contextlib
import json
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from otel_smtp.spool.outcomes.events import signed_headers

KEY = b"a key of thirty-two octets, here"


@dataclass(frozen=True, slots=True)
class Request:
    """What arrived; names of headers are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> Any:
        return json.loads(self.body)

    def is_signed(self, key: bytes = KEY) -> bool:
        """Whether it is what who has the key has signed."""
        headers = self.headers
        expected = signed_headers(key, headers["webhook-id"], int(headers["webhook-timestamp"]), self.body)
        return headers["webhook-signature"] == expected["webhook-signature"]


@dataclass
class Receiver:
    """A running receiver.

    Attributes:
        answers: what it says to the next requests, as octets; then `default`. None: nothing, until `let_go` is set.
        requests: those that were complete.
        most_at_once: how many of them waited for their answers, at most.
    """

    port: int = 0
    scheme: str = "http"
    answers: "deque[bytes | None]" = field(default_factory=deque)
    default: bytes | None = b"HTTP/1.1 204 No Content\r\n\r\n"
    requests: list[Request] = field(default_factory=list)
    let_go: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0
    at_once: int = 0
    most_at_once: int = 0
    _serving: "set[asyncio.Task[None]]" = field(default_factory=set)
    _arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/mail-events"

    async def until(self, found: "Callable[[], bool]") -> None:
        """Wait until that is so; it is asked after each request."""
        async with asyncio.timeout(30), self._arrived:
            await self._arrived.wait_for(found)

    async def has(self, number: int) -> list[Request]:
        """Wait for so many requests, in all."""
        await self.until(lambda: len(self.requests) >= number)
        return self.requests

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    await self._one(reader, writer)
        finally:
            self._serving.discard(task)
            writer.close()

    async def close(self) -> None:
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, target, _ = head.split(" ")
        async with self._arrived:
            self.requests.append(Request(method, target, headers, body))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self._arrived.notify_all()
        answer = self.answers.popleft() if self.answers else self.default
        if answer is None:
            await self.let_go.wait()
            answer = self.default or b"HTTP/1.1 204 No Content\r\n\r\n"
        self.at_once -= 1
        writer.write(answer)
        await writer.drain()


def status(code: int, *headers: str, body: bytes = b"") -> bytes:
    """An answer."""
    lines = [f"HTTP/1.1 {code} Whatever", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@asynccontextmanager
async def receiving(context: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """A receiver on the loopback interface."""
    receiver = Receiver(scheme="http" if context is None else "https")
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=context)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        await receiver.close()
