"""A proxy before the database that cuts a connection when a question was sent and before its answer has come."""

import asyncio
import contextlib
from types import TracebackType
from typing import Self


class CuttingProxy:
    """Listens on a loopback port of the kernel's choice.

    Attributes:
        cuts: how often it has cut.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._purpose: bytes | None = None
        self._is_lasting = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = 0
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, purpose: str, *, is_lasting: bool = False) -> None:
        """Cut the next connection of that purpose that is answered; all of them from now on with `is_lasting`."""
        self._purpose = purpose.encode()
        self._is_lasting = is_lasting

    def let_through(self) -> None:
        """Cut nothing any more."""
        self._purpose = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError):
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
                try:
                    await self._converse(reader, writer, up_reader, up_writer)
                finally:
                    up_writer.close()
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _converse(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
    ) -> None:
        name = b""
        is_checking = is_settled = False  # what is asked of each new connection is no change

        async def questions() -> None:
            nonlocal name, is_checking
            while data := await reader.read(65536):
                if b"application_name\0" in data:
                    name = data.partition(b"application_name\0")[2].partition(b"\0")[0]
                is_checking = is_checking or b"SELECT installation" in data
                up_writer.write(data)
                await up_writer.drain()

        async def answers() -> None:
            nonlocal is_settled
            while data := await up_reader.read(65536):
                # C: CommandComplete, which a COMMIT, or a statement that is its own transaction, is answered with.
                if is_settled and self._purpose is not None and self._purpose in name and _is_of_a_change(data):
                    if not self._is_lasting:
                        self._purpose = None
                    self.cuts += 1
                    return
                # The last question of the check is for one row (s: PortalSuspended); lanes ask for types besides.
                end = b"s\0\0\0\4" if b"claims" in name else b"SELECT 1\0"
                is_settled = is_settled or (is_checking and end in data)
                writer.write(data)
                await writer.drain()

        done = [asyncio.ensure_future(questions()), asyncio.ensure_future(answers())]
        try:
            await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in done:
                one.cancel()
            await asyncio.gather(*done, return_exceptions=True)


def _is_of_a_change(data: bytes) -> bool:
    """Whether a change that was asked for is durable now."""
    return b"COMMIT\0" in data or any(
        tag in data and b"Z\0\0\0\5I" in data for tag in (b"UPDATE ", b"DELETE ", b"INSERT ", b"SELECT 1\0")
    )
