"""A bad network between us and an upstream: latency, a narrow pipe, resets, half-open connections, black holes."""

import asyncio
import contextlib
from typing import Self


class FaultProxy:
    """Forwards octets to a port of this machine, as badly as it is told.

    Attributes:
        port: where it listens.
        latency_seconds: for each piece of either direction.
        octets_per_second: towards the upstream; None: as fast as it goes.
        reset_after_octets: towards the upstream; then both sides are reset. None: never.
    """

    def __init__(self, to_port: int, *, latency_seconds: float = 0.0) -> None:
        self.to_port = to_port
        self.latency_seconds = latency_seconds
        self.octets_per_second: float | None = None
        self.reset_after_octets: int | None = None
        self.port = 0
        self._swallows = False
        self._swallows_replies = False
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def swallow(self) -> None:
        """Be a black hole: accept, and pass nothing on in either direction."""
        self._swallows = True

    def swallow_replies(self) -> None:
        """Be half open: what comes from the upstream is lost."""
        self._swallows_replies = True

    def heal(self) -> None:
        """Pass everything on again."""
        self._swallows = self._swallows_replies = False

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        far: asyncio.StreamWriter | None = None
        try:
            far_reader, far = await asyncio.open_connection("127.0.0.1", self.to_port)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, far, to_upstream=True))
                group.create_task(self._pass_on(far_reader, writer, to_upstream=False))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for side in (writer, far):
                if side is not None:
                    side.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, to_upstream: bool) -> None:
        passed = 0
        while data := await reader.read(65536):
            if self._swallows or (self._swallows_replies and not to_upstream):
                continue
            if self.latency_seconds:
                await asyncio.sleep(self.latency_seconds)
            if to_upstream and self.octets_per_second is not None:
                await asyncio.sleep(len(data) / self.octets_per_second)
            if to_upstream and self.reset_after_octets is not None:
                data = data[: self.reset_after_octets - passed]
            writer.write(data)
            await writer.drain()
            passed += len(data)
            if to_upstream and passed == self.reset_after_octets:
                raise ConnectionResetError("as scripted")
        with contextlib.suppress(OSError):
            writer.write_eof()
