"""A proxy before the database that withholds the answer to a change that is committed, and cuts the connection then."""

import asyncio
import contextlib
import re
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

_CHANGES: Final = re.compile(rb'\bINSERT INTO|\bUPDATE "|\bDELETE FROM|\bpg_notify\(|\.settle\(')
_SSL_REQUEST: Final = (80877103).to_bytes(4, "big")


class CuttingProxy:
    """Listens on a loopback port of the kernel's choice.

    Attributes:
        cuts: how often it has cut.
        reached: set while an answer is withheld, before it cuts.
    """

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._purpose: bytes | None = None
        self._is_lasting = False
        self._go_on = asyncio.Event()
        self._go_on.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.cuts = 0
        self.reached = asyncio.Event()
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

    def cut(self, purpose: str, *, is_lasting: bool = False, waits: bool = False) -> None:
        """Cut the next connection of that purpose whose change is answered.

        Args:
            is_lasting: and all of them from now on.
            waits: withhold the answer until `go_on`.
        """
        self._purpose = purpose.encode()
        self._is_lasting = is_lasting
        if waits:
            self._go_on.clear()

    def go_on(self) -> None:
        """Cut, after an answer was withheld."""
        self._go_on.set()

    def let_through(self) -> None:
        """Cut nothing any more."""
        self._purpose = None
        self._go_on.set()

    async def withhold(self, name: bytes) -> bool:
        """Whether the answer to a change is never given; asked once it has come."""
        if self._purpose is None or self._purpose not in name:
            return False
        if not self._is_lasting:
            self._purpose = None
        self.cuts += 1
        self.reached.set()
        await self._go_on.wait()
        self.reached.clear()
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with contextlib.suppress(OSError):
                up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
                conversation = _Conversation(self)
                done = [
                    asyncio.ensure_future(conversation.questions(reader, up_writer)),
                    asyncio.ensure_future(conversation.answers(up_reader, writer)),
                ]
                try:
                    await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for one in done:
                        one.cancel()
                    await asyncio.gather(*done, return_exceptions=True)
                    up_writer.close()
        except asyncio.CancelledError:
            pass  # asyncio's streams have an opinion on a server's tasks that are cancelled
        finally:
            writer.close()
            self._tasks.discard(task)


class _Conversation:
    """One connection: what was asked on it."""

    def __init__(self, proxy: CuttingProxy) -> None:
        self._proxy = proxy
        self._statements: dict[bytes, bytes] = {}
        self._name = b""
        self._is_change = False

    async def questions(self, reader: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
        messages = _Messages(has_kinds=False)
        while data := await reader.read(65536):
            for kind, body in messages.feed(data):
                self._note(kind, body)
            up.write(data)
            await up.drain()

    def _note(self, kind: bytes, body: bytes) -> None:
        match kind:
            case b"":  # a startup message
                self._name = body.partition(b"application_name\0")[2].partition(b"\0")[0]
            case b"P":
                name, _, rest = body.partition(b"\0")
                self._statements[name] = rest.partition(b"\0")[0]
            case b"B":
                self._ask(self._statements.get(body.split(b"\0", 2)[1], b""))
            case b"Q":
                self._ask(body)

    def _ask(self, statement: bytes) -> None:
        self._is_change = self._is_change or _CHANGES.search(statement) is not None

    async def answers(self, up: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        messages = _Messages(has_kinds=True)
        kept = bytearray()  # from CommandComplete or PortalSuspended to ReadyForQuery
        is_rolled_back = False
        while data := await up.read(65536):
            for kind, body in messages.feed(data):
                if kind == b"":  # the answer to an SSLRequest
                    writer.write(body)
                    continue
                whole = kind + (len(body) + 4).to_bytes(4, "big") + body
                if kind in b"Cs":
                    is_rolled_back = body == b"ROLLBACK\0"
                elif not kept or kind == b"A":
                    writer.write(whole)
                    continue
                kept += whole
                if kind == b"Z":
                    if body == b"I":  # no transaction is open: what was changed is committed
                        was_change, self._is_change = self._is_change and not is_rolled_back, False
                        if was_change and await self._proxy.withhold(self._name):
                            return
                    writer.write(bytes(kept))
                    kept.clear()
            await writer.drain()


class _Messages:
    """A stream of the protocol's messages, as kind and body; kind is empty for what comes before all others.

    Args:
        has_kinds: it is the server's.
    """

    def __init__(self, *, has_kinds: bool) -> None:
        self._data = bytearray()
        self._is_server = has_kinds
        self._has_begun = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The messages that are complete."""
        self._data += data
        while self._data:
            if self._is_server and not self._has_begun and self._data[0] in b"NS":
                yield b"", self._take(1)
                continue
            at = 0 if not self._is_server and not self._has_begun else 1
            if len(self._data) < at + 4:
                return
            octets = at + int.from_bytes(self._data[at : at + 4], "big")
            if len(self._data) < octets:
                return
            message = self._take(octets)
            self._has_begun = self._has_begun or at == 1 or message[4:8] != _SSL_REQUEST
            yield message[:at], message[at + 4 :]

    def _take(self, octets: int) -> bytes:
        taken = bytes(self._data[:octets])
        del self._data[:octets]
        return taken
