"""The floor: a relay that reads and writes as often as the gateway does, and parses nothing.

It knows commands by their first four octets and the end of a content by its last five, answers each command itself
but RCPT and the content, sends MAIL and RCPT upstream in one write, and the content by BDAT, over kept connections.
What a relay in Python costs above it is its own work; what it relays per second is what generator and sink can show.

    python -m tests.bench.targets.null_relay PORT UPSTREAM_PORT [--asyncio]
"""

import asyncio
import sys
from collections.abc import Callable
from typing import Final, cast

_ROOM: Final = memoryview(bytearray(262_144))  # each read is done with before the next one
_OK: Final = b"250 2.0.0 Ok\r\n"
_END: Final = b"\r\n.\r\n"


class _Protocol(asyncio.BufferedProtocol):
    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _ROOM


class Upstream(_Protocol):
    """A kept connection to the upstream."""

    def __init__(self, ready: "asyncio.Future[Upstream]") -> None:
        self._ready = ready
        self._greeted = False
        self._replies = 0
        self._then: Callable[[], None] | None = None

    def ask(self, data: bytes, replies: int, then: Callable[[], None]) -> None:
        """Send it and call `then` after so many replies, those to what was sent before among them."""
        self._replies += replies
        self._then = then
        self.transport.write(data)

    def send(self, data: bytes) -> None:
        """Send what is answered by one reply, without waiting."""
        self._replies += 1
        self.transport.write(data)

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(_ROOM[:nbytes])
        if not self._ready.done():
            if self._greeted:
                self._ready.set_result(self)
            else:
                self._greeted = True
                self.transport.write(b"EHLO null.example.com\r\n")
            return
        self._replies -= data.count(b"\n")
        if self._replies <= 0 and (then := self._then) is not None:
            self._then = None
            then()


class Client(_Protocol):
    """A client's connection."""

    def __init__(self, upstream_port: int, idle: list[Upstream]) -> None:
        self._upstream_port = upstream_port
        self._idle = idle
        self._upstream: Upstream | None = None
        self._mail = b""
        self._is_content = False
        self._held = b""  # what may be the beginning of a content's end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(b"220 null.example.com\r\n")

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(_ROOM[:nbytes])
        if self._is_content:
            self._content(data)
            return
        verb = data[:4]
        if verb == b"RCPT":
            self._recipient(data)
        elif verb == b"DATA":
            self._is_content = True
            self.transport.write(b"354 go on\r\n")
        elif verb == b"QUIT":
            self.transport.write(b"221 2.0.0 Bye\r\n")
            self.transport.close()
        else:
            self._mail = data
            self.transport.write(_OK)

    def _recipient(self, rcpt: bytes) -> None:
        if self._idle:
            self._upstream = self._idle.pop()
            self._upstream.ask(self._mail + rcpt, 2, self._answer)
            return
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[Upstream] = loop.create_future()

        def connected(ready: "asyncio.Future[Upstream]") -> None:
            self._upstream = ready.result()
            self._upstream.ask(self._mail + rcpt, 2, self._answer)

        ready.add_done_callback(connected)
        self._connecting = loop.create_task(
            loop.create_connection(lambda: Upstream(ready), "127.0.0.1", self._upstream_port)
        )

    def _content(self, data: bytes) -> None:
        assert self._upstream is not None
        if self._held:
            data, self._held = self._held + data, b""
        if data.endswith(_END):
            self._is_content = False
            self._upstream.ask(b"BDAT %d LAST\r\n%b" % (len(data) - 3, data[:-3]), 1, self._relayed)
        else:
            data, self._held = data[: -len(_END)], data[-len(_END) :]
            if data:
                self._upstream.send(b"BDAT %d\r\n%b" % (len(data), data))

    def _answer(self) -> None:
        self.transport.write(_OK)

    def _relayed(self) -> None:
        assert self._upstream is not None
        self._idle.append(self._upstream)
        self.transport.write(_OK)


async def serve(port: int, upstream_port: int) -> None:
    """Relay until the process is ended."""
    idle: list[Upstream] = []
    server = await asyncio.get_running_loop().create_server(
        lambda: Client(upstream_port, idle), "127.0.0.1", port, backlog=1024
    )
    await server.serve_forever()


if __name__ == "__main__":
    work = serve(int(sys.argv[1]), int(sys.argv[2]))
    if "--asyncio" in sys.argv:
        asyncio.run(work)
    else:
        import uvloop

        uvloop.run(work)
