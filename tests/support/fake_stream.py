"""A `Stream` without a network: the real class over a transport in memory, and the far end in the test's hands."""

import asyncio
import ssl

from otel_smtp.net import Stream
from otel_smtp.observing import Endpoint, TlsInfo

PEER = Endpoint("192.0.2.7", 40000)
LOCAL = Endpoint("192.0.2.1", 2525)
TLS = TlsInfo("1.3", "TLS_AES_256_GCM_SHA384")


class _MemoryTransport(asyncio.Transport):
    def __init__(self, stream: "FakeStream") -> None:
        super().__init__({"peername": (PEER.host, PEER.port), "sockname": (LOCAL.host, LOCAL.port)})
        self._stream = stream
        self._held = bytearray()
        self._has_ended = False
        self._paused = False
        self._closing = False

    def deliver(self, data: bytes) -> None:
        self._held += data
        if not self._paused and not self._closing:
            self._flush()

    def _flush(self) -> None:
        while self._held and not self._paused:
            buffer = self._stream.get_buffer(-1)
            piece = bytes(self._held[: len(buffer)])
            del self._held[: len(piece)]
            buffer[: len(piece)] = piece
            self._stream.buffer_updated(len(piece))
        if self._has_ended and not self._paused and not self._closing and not self._stream.eof_received():
            self.close()

    def end(self) -> None:
        self._has_ended = True
        self._flush()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._stream.far_received(bytes(data))

    def write_eof(self) -> None:
        asyncio.get_running_loop().call_soon(self.end)  # the far end hangs up in its turn

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        asyncio.get_running_loop().call_soon(self._flush)  # as every transport: never within the call

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._stream.connection_lost, None)

    abort = close


class FakeStream(Stream):
    """A stream whose far end is the test.

    Attributes:
        sent: all that was written so far.
        writes: the same, one item a `write`: what a packet trace would show.
        tls_fault: what `start_tls` raises, instead of succeeding.
    """

    def __init__(self, *, peer: Endpoint = PEER) -> None:
        super().__init__()
        self.sent = b""
        self.writes: list[bytes] = []
        self.tls_fault: Exception | None = None
        self._arrived = asyncio.Event()
        self._memory = _MemoryTransport(self)
        self.connection_made(self._memory)
        self.peer = peer

    def far_received(self, data: bytes) -> None:
        """The far end got `data`."""
        self.writes.append(data)
        self.sent += data
        self._arrived.set()

    def feed(self, data: bytes) -> None:
        """The far end sends `data`."""
        self._memory.deliver(data)

    def feed_eof(self) -> None:
        """The far end sends its end of stream."""
        self._memory.end()

    def lose(self, error: Exception | None = None) -> None:
        """The connection breaks."""
        self._memory._closing = True
        self.connection_lost(error or ConnectionResetError("reset by peer"))

    def stop_taking(self) -> None:
        """The far end reads no more; `drain` waits from now on."""
        self.pause_writing()

    async def sends(self, expected: bytes, *, timeout_seconds: float = 60) -> bytes:
        """Wait until `expected` was written, and take everything up to it."""
        async with asyncio.timeout(timeout_seconds):
            while expected not in self.sent:
                if self.is_lost:
                    raise AssertionError(f"closed; wrote {self.sent!r}, not {expected!r}")
                self._arrived.clear()
                await self._arrived.wait()
        before, found, self.sent = self.sent.partition(expected)
        return before + found

    async def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        timeout_seconds: float,
        from_first_octet: bool = False,
    ) -> TlsInfo:
        """Succeed at once, or fail with `tls_fault`."""
        if self.tls_fault is not None:
            fault = self.tls_fault
            self.lose(fault)
            raise fault
        self.tls = TLS
        self.resume_reading()
        return TLS
