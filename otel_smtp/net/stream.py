"""The stream port: octets to and from a peer, over asyncio's or uvloop's transports.

A stream is read in one of two ways. While it has a `receiver`, octets are *pushed*: the transport's call passes them
straight to the receiver. That is the mail path: no task, no future, no timer. Without a receiver, octets are *pulled*
by the coroutine `read`; code that waits long or runs rarely uses it (PROXY headers, TLS handshakes, greeting and AUTH
towards an upstream). `receive_by` switches, and hands over what has already arrived.

`Stream` is all that server and upstream know of the network. It is a `BufferedProtocol` on purpose: asyncio's plain
protocols allocate 256 KiB for each read and free it at once, which costs an mmap, mremap and munmap per read and a
third of the throughput. Here the whole process reads into one buffer and copies out what arrived.

Three rules:

* Memory is bounded: reading pauses while more than `HIGH_WATER_OCTETS` are unread, `drain` waits while more than that
  are unsent.
* Time is bounded: `deadline` holds for pulled reads (a receiver keeps its own, see `sweep`), `drain` and `start_tls`
  take theirs, `close` gives unsent octets
  `LINGER_SECONDS`, `close_gently` gives the peer `READ_OFF_SECONDS`. Moving the deadline costs next to nothing: one
  timer re-arms itself when it fires early.
* A Stream has one owner: one task reads, one drains. Nothing here retries.

The protocol engines, which know the state, decide which octets may be read before TLS.
"""

import asyncio
import select
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import lru_cache, partial
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from otel_smtp.net.endpoints import endpoint
from otel_smtp.observing.values import Endpoint, TlsInfo

RECEIVE_BUFFER_OCTETS: Final = 256 * 1024  # what asyncio itself requests per recv
HIGH_WATER_OCTETS: Final = 256 * 1024  # unread, or unsent: beyond, the faster side waits
LOW_WATER_OCTETS: Final = 64 * 1024
DRAIN_SECONDS: Final = 180.0  # RFC 5321 4.5.3.2.5: three minutes for a block of content
LINGER_SECONDS: Final = 10.0  # for the last reply to leave, when the peer does not read
READ_OFF_SECONDS: Final = 2.0  # for a peer that is still sending to read our last reply and to end
READ_OFF_OCTETS: Final = 1024 * 1024  # more than sockets' buffers hold on their way to us by default
TLS_SHUTDOWN_SECONDS: Final = 2.0  # for the peer's close_notify; few peers send one
CLOCK_SLACK_SECONDS: Final = 0.002  # uvloop's timers count whole milliseconds

_own_endpoint: Final = lru_cache(maxsize=64)(endpoint)  # a listener's own address: the same for all of its connections
_one_of_tls: Final = lru_cache(maxsize=64)(TlsInfo)  # handshakes nearly always agree on the same
# Slicing a mapping gives bytes at half the cost of slicing a memoryview and copying. The mapping is private, so a
# forked process does not read into its child's memory.
_RECEIVED: Final = mmap(-1, RECEIVE_BUFFER_OCTETS, flags=MAP_PRIVATE | MAP_ANONYMOUS)
_RECEIVE_BUFFER: Final = memoryview(_RECEIVED)  # what TLS layers slice to write into


class Receiver(Protocol):
    """Receives a stream's octets, on the event loop. It must not raise."""

    def data_received(self, data: bytes) -> None:
        """Some octets, at least one."""
        ...

    def input_ended(self) -> None:
        """Nothing more will arrive: the peer has sent its end of stream, or the connection is lost. Called once."""
        ...

    def writing_resumed(self) -> None:
        """Less than `LOW_WATER_OCTETS` are unsent, after `is_write_paused` was true; or the connection is lost."""
        ...


class _Pulled:
    """The state of a stream without a receiver, kept only then: most connections are idle, and have one.

    Attributes:
        chunks: what arrived and was not read. `unread`: its size in octets; beyond `HIGH_WATER_OCTETS` it `is_full`,
            and reading is paused.
        reader: the task that waits for more.
        deadline: when reads give up. `timer`: fires then or sooner, and checks it. `has_expired`: it has passed.
        reads_once: the next octets to arrive pause reading.
    """

    __slots__ = ("chunks", "deadline", "has_expired", "is_full", "reader", "reads_once", "timer", "unread")

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.unread = 0
        self.is_full = False
        self.reader: asyncio.Future[None] | None = None
        self.deadline: float | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.has_expired = False
        self.reads_once = False


class _Ending:
    """State that only a stream's end needs.

    Attributes:
        linger: the timer that gives up sending the rest.
        closed: done when the transport is gone.
        loss: the error that ended it, if any.
    """

    __slots__ = ("closed", "linger", "loss")

    def __init__(self) -> None:
        self.linger: asyncio.TimerHandle | None = None
        self.closed: asyncio.Future[None] | None = None
        self.loss: Exception | None = None


class Stream(asyncio.BufferedProtocol):
    """One connection, in the clear or under TLS.

    Args:
        on_connected: called with the stream once it has its transport; None for connections that we open.

    Attributes:
        peer: the other end; `Endpoint("")` for a unix socket's client, which has no name, and for a peer that left
            before its name was read.
        local: this end.
        tls: what the handshake agreed on; None in the clear.
        octets_received, octets_sent: application octets, without TLS's own.
        is_eof: nothing more will arrive: the peer has sent its end of stream, or the connection is lost.
        is_lost: the transport is gone.
        receiver: see the head of the module; set it by `receive_by`.
        is_write_paused: more than `HIGH_WATER_OCTETS` are unsent: write no more.
        on_lost: called once, when `is_eof` becomes true; for owners that keep a connection without reading from it.
    """

    __slots__ = (
        "_drained",
        "_ending",
        "_is_tls",
        "_on_connected",
        "_owner_pauses",
        "_pulled",
        "_transport",
        "is_eof",
        "is_lost",
        "is_write_paused",
        "local",
        "octets_received",
        "octets_sent",
        "on_lost",
        "peer",
        "receiver",
        "tls",
    )

    peer: Endpoint
    local: Endpoint

    def __init__(self, on_connected: "Callable[[Stream], None] | None" = None) -> None:
        self._on_connected = on_connected
        self._transport: asyncio.Transport | None = None
        self._pulled: _Pulled | None = None  # nothing is kept on the mail path
        self._ending: _Ending | None = None
        self._drained: asyncio.Future[None] | None = None
        self._owner_pauses = False
        self.is_write_paused = False
        self._is_tls = False
        self.tls: TlsInfo | None = None
        self.octets_received = 0
        self.octets_sent = 0
        self.is_eof = False
        self.is_lost = False
        self.on_lost: Callable[[], None] | None = None
        self.receiver: Receiver | None = None

    def __repr__(self) -> str:
        ends = f"{self.local} <-> {self.peer}" if self._transport is not None or self.is_lost else "not connected"
        state = "lost" if self.is_lost else "eof" if self.is_eof else "tls" if self.tls else "clear"
        return f"<Stream {ends} {state}>"

    # Reading ----------------------------------------------------------------------------------------------

    def receive_by(self, receiver: Receiver | None) -> None:
        """Push octets to `receiver` from now on, beginning with those that wait here; None: back to `read`.

        Calls `input_ended` at once if the input has already ended.
        """
        self.receiver = receiver
        if receiver is None:
            return
        self._stop_timer()
        if data := self.take_pending():
            receiver.data_received(data)
        if self.receiver is receiver and self._pulled is not None and self._pulled.reader is None:
            self._pulled = None
        if self.is_eof and self.receiver is receiver:
            receiver.input_ended()

    @property
    def deadline(self) -> float | None:
        """When reads give up, by the loop's clock; None: never. It may move at any time, even while a read waits."""
        return None if self._pulled is None else self._pulled.deadline

    @deadline.setter
    def deadline(self, deadline: float | None) -> None:
        if deadline is None and self._pulled is None:
            return
        pulled = self._pull()
        pulled.deadline = deadline
        pulled.has_expired = False
        if deadline is None or self.is_lost:
            return
        if pulled.timer is None:
            self._arm(pulled, deadline)
        elif deadline < pulled.timer.when():
            pulled.timer.cancel()
            self._arm(pulled, deadline)

    async def read(self) -> bytes:
        """Wait for at least one octet, and return all that has arrived in one piece.

        Returns:
            b"" at the end of the stream, or when the connection is lost.

        Raises:
            TimeoutError: the deadline has passed, even if octets keep trickling in. Every read raises it until the
                deadline is moved; nothing that arrived is lost.
        """
        pulled = self._pull()
        if not pulled.chunks and not self.is_eof and not pulled.has_expired:
            if pulled.reader is not None:
                raise RuntimeError("two tasks read from one stream")
            pulled.reader = asyncio.get_running_loop().create_future()
            try:
                await pulled.reader
            finally:
                pulled.reader = None
        if pulled.has_expired:
            raise TimeoutError("read deadline has passed")
        return self.take_pending()

    def take_pending(self) -> bytes:
        """Return unread octets without waiting; b"" if there are none."""
        pulled = self._pulled
        if pulled is None or not pulled.chunks:
            return b""
        data = b"".join(pulled.chunks)
        pulled.chunks.clear()
        pulled.unread = 0
        if pulled.is_full:
            pulled.is_full = False
            self._apply_pause()
        return data

    async def read_sparingly(self, octets: int) -> bytes:
        """Read at most `octets`. The rest is left for the next reader (TLS behind a PROXY header), and later octets
        stay in the kernel.

        Call it only while reading has been paused since accept; reading is paused again when it returns.

        Raises:
            TimeoutError: as `read`.
        """
        pulled = self._pull()
        if not pulled.chunks:
            pulled.reads_once = True
            self.resume_reading()
        try:
            data = await self.read()
        finally:
            pulled.reads_once = False
            self.pause_reading()
        if len(data) > octets:
            pulled.chunks.insert(0, data[octets:])
            pulled.unread += len(data) - octets
        return data[:octets]

    async def wait_for_input(self) -> bool:
        """Wait for an octet, and leave it to the next reader or to TLS; False if the stream ends without one.

        Reading must have been paused, as for `read_sparingly`.

        Raises:
            TimeoutError: as `read`.
        """
        await self.read_sparingly(0)
        return self._pulled is not None and bool(self._pulled.chunks)

    def has_input(self) -> bool:
        """Whether octets, or the end of the stream, have arrived: here or, in the clear, in the kernel."""
        if self.is_eof or (self._pulled is not None and self._pulled.chunks):
            return True
        descriptor = self.fileno()
        if self._is_tls or descriptor < 0:
            return False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def fileno(self) -> int:
        """The socket's file descriptor, only for inspecting it; -1 once it is closed."""
        sock = None if self._transport is None else self._transport.get_extra_info("socket")
        return -1 if sock is None else int(sock.fileno())

    def pause_reading(self) -> None:
        """Leave new octets in the kernel until `resume_reading` or `start_tls`."""
        self._owner_pauses = True
        self._apply_pause()

    def resume_reading(self) -> None:
        """Undo `pause_reading`."""
        self._owner_pauses = False
        self._apply_pause()

    # Writing ----------------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` without waiting: one call is one send if the kernel takes it all. A lost connection drops it
        silently.
        """
        transport = self._transport
        if transport is not None:
            self.octets_sent += len(data)
            transport.write(data)

    async def drain(self, *, timeout_seconds: float = DRAIN_SECONDS) -> None:
        """Wait until less than `LOW_WATER_OCTETS` are unsent, if more than `HIGH_WATER_OCTETS` are.

        Raises:
            ConnectionError: the connection is lost.
            TimeoutError: the peer does not read. The stream can only be aborted then.
        """
        if self.is_lost:
            raise self._connection_error()
        if not self.is_write_paused:
            return
        if self._drained is not None:
            raise RuntimeError("two tasks drain one stream")
        self._drained = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._drained
        finally:
            self._drained = None

    # Ending -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Send what is unsent, then close; abort after `LINGER_SECONDS`. Idempotent."""
        if self._transport is None:
            return
        ending = self._end()
        if ending.linger is not None:
            return
        self._stop_timer()
        ending.linger = asyncio.get_running_loop().call_later(LINGER_SECONDS, self.abort)
        self._transport.close()

    async def close_gently(self) -> None:
        """End our side, discard what the peer still sends until it ends its own, then `close`.

        For a peer that may be in the middle of sending. The kernel answers octets that were not read, or that come
        after the close, with a reset: the peer then gets an error at its next send instead of our last reply.

        Discards at most `READ_OFF_OCTETS`, for at most `READ_OFF_SECONDS`. Under TLS it is `close`: there the
        connection lasts until the peer's close_notify anyway.
        """
        transport = self._transport
        try:
            if transport is None or self._is_tls or self.is_eof or transport.is_closing():
                return
            transport.write_eof()  # behind what is unsent
            self.deadline = asyncio.get_running_loop().time() + READ_OFF_SECONDS
            self.resume_reading()
            left = READ_OFF_OCTETS
            with suppress(TimeoutError):
                while left > 0 and (data := await self.read()):
                    left -= len(data)
        finally:
            self.close()

    def abort(self) -> None:
        """Close at once; unsent octets are dropped. Idempotent."""
        if self._transport is not None:
            self._stop_timer()
            self._transport.abort()

    async def wait_closed(self) -> None:
        """Wait until the transport is gone."""
        if not self.is_lost:
            ending = self._end()
            if ending.closed is None:
                ending.closed = asyncio.get_running_loop().create_future()
            await asyncio.shield(ending.closed)

    # TLS --------------------------------------------------------------------------------------------------

    async def start_tls(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        timeout_seconds: float,
        from_first_octet: bool = False,
    ) -> TlsInfo:
        """Put the connection under TLS.

        A server calls `pause_reading` before it writes the 220 that invites the ClientHello; otherwise a quick client's
        ClientHello is read as clear text and the handshake hangs. Octets read in the clear before this call are the
        caller's to judge (`take_pending`); none of them is ever handed to TLS.

        Args:
            from_first_octet: TLS begins with the connection (or behind its PROXY header), so octets that were read and
                not taken belong to TLS. Never for STARTTLS, where they were sent in the clear.

        Raises:
            ssl.SSLError: the handshake failed; ssl.SSLCertVerificationError: the peer's certificate is not acceptable.
            TimeoutError: it took longer than `timeout_seconds`.
            ConnectionError: the peer went away.

        After an error the connection is gone.
        """
        if self._transport is None:
            raise self._connection_error()
        await self.drain()
        clear = self._transport
        self._is_tls = True
        try:
            async with asyncio.timeout(timeout_seconds):
                handshake = asyncio.get_running_loop().start_tls(
                    clear,
                    self,
                    context,
                    server_side=server_side,
                    server_hostname=server_hostname,
                    ssl_handshake_timeout=timeout_seconds + 60,  # ours comes first, and has its own error
                    ssl_shutdown_timeout=TLS_SHUTDOWN_SECONDS,
                )
                transport = await (self._handed_over(handshake, clear) if from_first_octet else handshake)
                # asyncio returns no transport, and raises nothing, if the peer left in mid-handshake.
                if transport is None:
                    raise ConnectionResetError("connection lost in the TLS handshake")
        except BaseException as error:
            # A transport that is lost in mid-handshake notifies the TLS layer, which does not notify us.
            clear.abort()
            self.connection_lost(error if isinstance(error, Exception) else None)
            raise
        if not self.is_lost:
            self._transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER_OCTETS, low=LOW_WATER_OCTETS)
        self._owner_pauses = False
        self._apply_pause()
        self.tls = _tls_info(transport.get_extra_info("ssl_object"), server_hostname)
        return self.tls

    async def _handed_over(
        self, handshake: Coroutine[Any, Any, asyncio.Transport | None], clear: asyncio.Transport
    ) -> asyncio.Transport | None:
        """Run a handshake, with what was read before it as its first octets.

        uvloop reads at accept, even if `connection_made` paused reading, and by then a quick client's ClientHello is
        there.
        """
        loop = asyncio.get_running_loop()
        task = loop.create_task(handshake)
        await asyncio.sleep(0)  # the loop replaces us by its TLS layer and reads no more until that is connected
        if data := self.take_pending():
            loop.call_soon(_deliver, clear, data)  # behind its `connection_made`, before it reads
            self.octets_received -= len(data)  # octets of the application are counted, not those of the handshake
        return await task

    @property
    def tls_object(self) -> ssl.SSLObject | None:
        """The standard library's TLS object, for certificates and session tickets; None in the clear."""
        if self._transport is None:
            return None
        return cast("ssl.SSLObject | None", self._transport.get_extra_info("ssl_object"))

    # asyncio.BufferedProtocol -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport, and wake the task that waits for the connection."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=HIGH_WATER_OCTETS, low=LOW_WATER_OCTETS)
        self.peer = endpoint(transport.get_extra_info("peername"))
        self.local = _own_endpoint(transport.get_extra_info("sockname"))
        if self._on_connected is not None:
            self._on_connected(self)

    if TYPE_CHECKING:

        def get_buffer(self, sizehint: int) -> memoryview:
            """The buffer of the process: it is filled and emptied within one call of the loop."""
            ...

    else:
        # A dictionary's `get`, which takes the size hint for its default: six reads per mail then call no Python
        # function.
        get_buffer = staticmethod(partial({None: _RECEIVE_BUFFER}.get, None))

    def buffer_updated(self, nbytes: int) -> None:
        """Copy out what arrived; pass it to the receiver, or keep it and wake the reader."""
        receiver = self.receiver
        if receiver is not None:
            self.octets_received += nbytes
            receiver.data_received(_RECEIVED[:nbytes])
            return
        pulled = self._pull()
        pulled.chunks.append(_RECEIVED[:nbytes])
        self.octets_received += nbytes
        pulled.unread += nbytes
        if pulled.reads_once:
            self.pause_reading()
        if pulled.unread > HIGH_WATER_OCTETS and not pulled.is_full:
            pulled.is_full = True
            self._apply_pause()
        self._wake_reader()

    def eof_received(self) -> bool:
        """The peer's end of stream. In clear we may still answer; TLS connections close themselves."""
        self._end_of_input()
        return not self._is_tls

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        if self.is_lost:
            return
        self.is_lost = True
        self._transport = None
        ending = self._end()
        ending.loss = exc
        self._stop_timer()
        if ending.linger is not None:
            ending.linger.cancel()
        if self._drained is not None and not self._drained.done():
            self._drained.set_exception(self._connection_error())
        if ending.closed is not None and not ending.closed.done():
            ending.closed.set_result(None)
        was_paused, self.is_write_paused = self.is_write_paused, False
        self._end_of_input()
        if was_paused and self.receiver is not None:
            self.receiver.writing_resumed()

    def pause_writing(self) -> None:
        """More than the high-water mark is unsent."""
        self.is_write_paused = True

    def resume_writing(self) -> None:
        """Less than the low-water mark is unsent."""
        self.is_write_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self.receiver is not None:
            self.receiver.writing_resumed()

    # ------------------------------------------------------------------------------------------------------

    def _end_of_input(self) -> None:
        if not self.is_eof:
            self.is_eof = True
            self._wake_reader()
            if self.on_lost is not None:
                self.on_lost()
            if self.receiver is not None:
                self.receiver.input_ended()

    def _pull(self) -> _Pulled:
        """The state of pulled reading, made at first use."""
        if self._pulled is None:
            self._pulled = _Pulled()
        return self._pulled

    def _end(self) -> _Ending:
        """The state of its end, made at first use."""
        if self._ending is None:
            self._ending = _Ending()
        return self._ending

    def _wake_reader(self) -> None:
        pulled = self._pulled
        if pulled is not None and pulled.reader is not None and not pulled.reader.done():
            pulled.reader.set_result(None)

    def _arm(self, pulled: _Pulled, deadline: float) -> None:
        pulled.timer = asyncio.get_running_loop().call_at(deadline, self._look_at_clock, pulled)

    def _look_at_clock(self, pulled: _Pulled) -> None:
        pulled.timer = None
        deadline = pulled.deadline
        if deadline is None:
            return
        if asyncio.get_running_loop().time() < deadline - CLOCK_SLACK_SECONDS:
            self._arm(pulled, deadline)
            return
        pulled.has_expired = True
        self._wake_reader()

    def _stop_timer(self) -> None:
        pulled = self._pulled
        if pulled is not None:
            pulled.deadline = None
            if pulled.timer is not None:
                pulled.timer.cancel()
                pulled.timer = None

    def _apply_pause(self) -> None:
        if self._transport is None or self.is_eof or self._transport.is_closing():
            return
        if self._owner_pauses or (self._pulled is not None and self._pulled.is_full):
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _connection_error(self) -> ConnectionError:
        error = ConnectionResetError("connection lost")
        error.__cause__ = None if self._ending is None else self._ending.loss
        return error


def _deliver(transport: asyncio.Transport, data: bytes) -> None:
    """Give `data` to the transport's protocol as if it had just arrived."""
    layer = cast("asyncio.BufferedProtocol", transport.get_protocol())
    while data:
        buffer = memoryview(layer.get_buffer(len(data)))
        piece = data[: len(buffer)]
        buffer[: len(piece)] = piece
        layer.buffer_updated(len(piece))
        data = data[len(piece) :]


def _tls_info(tls: ssl.SSLObject, server_name: str | None) -> TlsInfo:
    version = tls.version() or ""
    cipher = tls.cipher()
    return _one_of_tls(
        version.removeprefix("TLSv"), cipher[0] if cipher is not None else "", bool(tls.session_reused), server_name
    )
