"""The stream port over real sockets, on both event loops."""

import asyncio
import errno
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trustme

from otel_smtp.net import Listener, Stream, connect, connect_unix, is_accept_exhausted, listen
from otel_smtp.net.connecting import _race
from otel_smtp.net.listening import ACCEPTS_AT_ONCE
from otel_smtp.net.stream import HIGH_WATER_OCTETS, READ_OFF_OCTETS
from otel_smtp.observing import Endpoint
from tests.support.waiting import SECONDS, until

pytestmark = pytest.mark.both_loops


class Pair:
    """A client's stream and the server's, joined over the loopback interface."""

    def __init__(self, client: Stream, server: Stream) -> None:
        self.client = client
        self.server = server


async def accept_one(host: str = "127.0.0.1") -> tuple[Listener, "asyncio.Future[Stream]"]:
    accepted: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()
    return await listen(accepted.set_result, host=host), accepted


@asynccontextmanager
async def joined() -> AsyncIterator[Pair]:
    listener, accepted = await accept_one()
    client = await connect("127.0.0.1", listener.addresses[0].port or 0, timeout_seconds=SECONDS)
    server = await asyncio.wait_for(accepted, SECONDS)
    try:
        yield Pair(client, server)
    finally:
        await listener.close()
        for stream in (client, server):
            stream.abort()
            await asyncio.wait_for(stream.wait_closed(), SECONDS)


async def read_exactly(stream: Stream, octets: int) -> bytes:
    data = b""
    async with asyncio.timeout(SECONDS):
        while len(data) < octets:
            piece = await stream.read()
            assert piece, f"ended after {len(data)} of {octets}"
            data += piece
    return data


# Reading and writing ------------------------------------------------------------------------------------------


async def test_octets_arrive_and_are_counted_on_both_sides() -> None:
    async with joined() as pair:
        pair.client.write(b"EHLO me\r\n")
        assert await read_exactly(pair.server, 9) == b"EHLO me\r\n"
        assert pair.client.octets_sent == pair.server.octets_received == 9
        assert pair.client.peer == pair.server.local
        assert pair.server.peer == pair.client.local
        assert pair.client.peer.host == "127.0.0.1"


async def test_nagle_is_off_on_both_sides() -> None:
    async with joined() as pair:
        for stream in (pair.client, pair.server):
            assert stream._transport is not None
            number = os.dup(stream._transport.get_extra_info("socket").fileno())
            with socket.socket(fileno=number) as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


async def test_pieces_that_arrived_together_are_read_together() -> None:
    async with joined() as pair:
        for number in range(3):
            pair.client.write(b"%d" % number)
            await until(lambda expected=number: pair.server.octets_received == expected + 1)  # type: ignore[misc]
        assert await pair.server.read() == b"012"
        assert pair.server.take_pending() == b""


async def test_two_streams_do_not_mix_though_they_share_one_buffer() -> None:
    async with joined() as one, joined() as other:
        one.client.write(b"a" * 50_000)
        other.client.write(b"b" * 50_000)
        assert set(await read_exactly(one.server, 50_000)) == {ord("a")}
        assert set(await read_exactly(other.server, 50_000)) == {ord("b")}


async def test_end_of_stream_is_read_after_what_came_before_and_we_can_still_answer() -> None:
    async with joined() as pair:
        pair.client.write(b"QUIT\r\n")
        assert pair.client._transport is not None
        pair.client._transport.write_eof()
        assert await read_exactly(pair.server, 6) == b"QUIT\r\n"
        assert await asyncio.wait_for(pair.server.read(), SECONDS) == b""
        assert pair.server.is_eof
        assert not pair.server.is_lost
        pair.server.write(b"221 Bye\r\n")
        assert await read_exactly(pair.client, 9) == b"221 Bye\r\n"


async def test_close_sends_what_is_unsent_first() -> None:
    async with joined() as pair:
        pair.server.write(b"x" * 2_000_000)
        pair.server.close()
        pair.server.close()
        assert len(await read_exactly(pair.client, 2_000_000)) == 2_000_000
        assert await asyncio.wait_for(pair.client.read(), SECONDS) == b""
        await asyncio.wait_for(pair.server.wait_closed(), SECONDS)
        assert pair.server.is_lost
        assert await pair.server.read() == b""


async def test_a_peer_that_is_still_sending_gets_the_last_reply_and_no_reset() -> None:
    async with joined() as pair:
        pair.server.pause_reading()
        pair.client.write(b"x" * (READ_OFF_OCTETS // 2))
        pair.server.write(b"421 Bye\r\n")
        closing = asyncio.create_task(pair.server.close_gently())
        assert await read_exactly(pair.client, 9) == b"421 Bye\r\n"
        assert await asyncio.wait_for(pair.client.read(), SECONDS) == b""
        assert not pair.client.is_lost
        pair.client.write(b"x" * 100)
        pair.client.close()
        await asyncio.wait_for(closing, SECONDS)
        await asyncio.wait_for(pair.server.wait_closed(), SECONDS)
        assert pair.server.octets_received == READ_OFF_OCTETS // 2 + 100
        assert pair.client._ending is not None
        assert pair.client._ending.loss is None


async def test_what_is_read_off_at_the_end_is_bounded() -> None:
    async with joined() as pair:
        pair.client.write(b"x" * (8 * READ_OFF_OCTETS))
        await asyncio.wait_for(pair.server.close_gently(), SECONDS)
        await asyncio.wait_for(pair.server.wait_closed(), SECONDS)
        assert READ_OFF_OCTETS <= pair.server.octets_received <= READ_OFF_OCTETS + 2 * HIGH_WATER_OCTETS


async def test_a_silent_peer_cannot_hold_a_gentle_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otel_smtp.net.stream.READ_OFF_SECONDS", 0.01)
    async with joined() as pair:
        await asyncio.wait_for(pair.server.close_gently(), SECONDS)
        await asyncio.wait_for(pair.server.wait_closed(), SECONDS)


async def test_a_gentle_close_that_is_cancelled_closes() -> None:
    async with joined() as pair:
        closing = asyncio.create_task(pair.server.close_gently())
        assert await asyncio.wait_for(pair.client.read(), SECONDS) == b""
        closing.cancel()
        await asyncio.wait_for(pair.server.wait_closed(), SECONDS)


async def test_a_gentle_close_of_what_is_closed_does_nothing() -> None:
    async with joined() as pair:
        pair.client.close()
        await asyncio.wait_for(pair.server.read(), SECONDS)
        await asyncio.wait_for(pair.server.close_gently(), SECONDS)
        await asyncio.wait_for(pair.server.wait_closed(), SECONDS)
        await asyncio.wait_for(pair.server.close_gently(), SECONDS)


async def test_writing_to_a_lost_connection_is_silent_and_draining_it_is_not() -> None:
    async with joined() as pair:
        pair.server.abort()
        await pair.server.wait_closed()
        pair.server.write(b"250 Ok\r\n")
        assert pair.server.octets_sent == 0
        with pytest.raises(ConnectionError):
            await pair.server.drain()


async def test_a_lost_connection_is_told_at_once_without_a_read() -> None:
    async with joined() as pair:
        told: list[str] = []
        pair.client.on_lost = lambda: told.append("lost")
        pair.server.close()
        await until(lambda: bool(told))
        assert pair.client.is_eof
        pair.client.abort()
        await pair.client.wait_closed()
        assert told == ["lost"]


async def test_two_readers_are_refused() -> None:
    async with joined() as pair:
        first = asyncio.ensure_future(pair.server.read())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await pair.server.read()
        pair.client.write(b"x")
        assert await asyncio.wait_for(first, SECONDS) == b"x"


async def test_a_cancelled_read_loses_nothing() -> None:
    async with joined() as pair:
        reader = asyncio.ensure_future(pair.server.read())
        await asyncio.sleep(0)
        reader.cancel()
        with suppress(asyncio.CancelledError):
            await reader
        pair.client.write(b"x")
        assert await read_exactly(pair.server, 1) == b"x"


# Bounds -------------------------------------------------------------------------------------------------------


async def test_reading_stops_above_the_high_water_mark_and_goes_on_when_read() -> None:
    async with joined() as pair:
        total = 16 * HIGH_WATER_OCTETS
        pair.client.write(bytes(total))
        await until(lambda: pair.server.octets_received > HIGH_WATER_OCTETS)
        for _ in range(50):
            await asyncio.sleep(0)
        assert pair.server.octets_received <= 2 * HIGH_WATER_OCTETS
        assert len(await read_exactly(pair.server, total)) == total


async def test_paused_reading_leaves_octets_with_the_kernel() -> None:
    async with joined() as pair:
        pair.server.pause_reading()
        pair.client.write(b"early")
        for _ in range(20):
            await asyncio.sleep(0)
        assert pair.server.take_pending() == b""
        pair.server.resume_reading()
        assert await read_exactly(pair.server, 5) == b"early"


async def test_drain_waits_for_a_slow_peer_and_gives_up_on_a_dead_one() -> None:
    async with joined() as pair:
        pair.client.pause_reading()
        pair.server.write(bytes(20_000_000))
        with pytest.raises(TimeoutError):
            await pair.server.drain(timeout_seconds=0.02)
        draining = asyncio.ensure_future(pair.server.drain(timeout_seconds=SECONDS))
        pair.client.resume_reading()
        await read_exactly(pair.client, 20_000_000)
        await draining


async def test_drain_ends_when_the_connection_is_lost() -> None:
    async with joined() as pair:
        pair.client.pause_reading()
        pair.server.write(bytes(20_000_000))
        draining = asyncio.ensure_future(pair.server.drain(timeout_seconds=SECONDS))
        await asyncio.sleep(0)
        pair.server.abort()
        with pytest.raises(ConnectionError):
            await draining


async def test_a_read_ends_at_its_deadline_and_works_again_with_a_new_one() -> None:
    async with joined() as pair:
        now = asyncio.get_running_loop().time()
        pair.server.deadline = now + 0.02
        with pytest.raises(TimeoutError):
            await pair.server.read()
        with pytest.raises(TimeoutError):
            await pair.server.read()
        pair.client.write(b"late")
        await until(lambda: pair.server.octets_received == 4)
        pair.server.deadline = now + SECONDS
        assert await pair.server.read() == b"late"


async def test_a_deadline_ends_a_trickle_that_never_lets_a_read_wait() -> None:
    async with joined() as pair:
        pair.server.deadline = asyncio.get_running_loop().time() + 0.02
        pulled = pair.server._pulled
        assert pulled is not None

        async def trickle() -> None:
            while True:
                pair.client.write(b"x")
                await until(lambda: pulled.unread or pulled.has_expired)
                await pair.server.read()

        with pytest.raises(TimeoutError):
            await trickle()
        assert pulled.has_expired


async def test_a_deadline_can_be_moved_while_a_read_waits() -> None:
    async with joined() as pair:
        loop = asyncio.get_running_loop()
        pair.server.deadline = loop.time() + 600
        reader = asyncio.ensure_future(pair.server.read())
        await asyncio.sleep(0)
        pair.server.deadline = loop.time() + 0.01
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader, SECONDS)
        pair.server.deadline = loop.time() + 0.01
        pair.server.deadline = loop.time() + 0.05  # later: the armed timer fires early and re-arms itself
        pair.server.deadline = None
        reader = asyncio.ensure_future(pair.server.read())
        await asyncio.sleep(0.06)
        assert not reader.done()
        pair.client.write(b"x")
        assert await reader == b"x"


async def test_no_timer_outlives_the_stream() -> None:
    async with joined() as pair:
        pair.server.deadline = asyncio.get_running_loop().time() + 600
        pair.server.abort()
        await pair.server.wait_closed()
        pair.server.deadline = asyncio.get_running_loop().time() + 600
        assert pair.server._pulled is not None
        assert pair.server._pulled.timer is None


async def test_a_peer_that_does_not_read_cannot_hold_a_closed_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otel_smtp.net.stream.LINGER_SECONDS", 0.02)
    async with joined() as pair:
        pair.client.pause_reading()
        pair.server.write(bytes(20_000_000))
        pair.server.close()
        await asyncio.wait_for(pair.server.wait_closed(), SECONDS)


# Opening and listening ----------------------------------------------------------------------------------------


async def test_ipv6_and_names_connect() -> None:
    listener, accepted = await accept_one("::1")
    port = listener.addresses[0].port or 0
    client = await connect("::1", port, timeout_seconds=SECONDS)
    assert client.peer == Endpoint("::1", port)
    assert str(client.peer) == f"[::1]:{port}"
    client.abort()
    (await accepted).abort()
    await listener.close()
    listener, accepted = await accept_one("127.0.0.1")
    # "localhost" may be ::1 first: nobody listens there, and the next address is tried at once.
    client = await connect("localhost", listener.addresses[0].port or 0, timeout_seconds=SECONDS)
    assert client.peer.host == "127.0.0.1"
    client.abort()
    (await accepted).abort()
    await listener.close()


async def test_a_dead_first_address_does_not_hold_up_the_second() -> None:
    # A full backlog swallows connection attempts: a black hole on the loopback interface.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as hole:
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
            fillers.append(filler)
        listener, accepted = await accept_one()
        dead = (socket.AF_INET, hole.getsockname())
        alive = (socket.AF_INET, ("127.0.0.1", listener.addresses[0].port))
        winner = await asyncio.wait_for(_race([dead, alive]), SECONDS)
        assert winner.getpeername()[1] == listener.addresses[0].port
        winner.close()
        (await accepted).abort()
        with pytest.raises(TimeoutError):
            await connect("127.0.0.1", hole.getsockname()[1], timeout_seconds=0.05)
        await listener.close()
        for filler in fillers:
            filler.close()


async def test_a_refused_connection_is_an_os_error() -> None:
    listener, _ = await accept_one()
    await listener.close()
    port = listener.addresses[0].port or 0
    with pytest.raises(ConnectionRefusedError):
        await connect("127.0.0.1", port, timeout_seconds=SECONDS)
    with pytest.raises(OSError):
        await _race([(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET, ("127.0.0.1", port))])
    with pytest.raises(OSError):
        await connect("name.invalid", 25, timeout_seconds=SECONDS)


async def test_unix_sockets_listen_and_leave_no_file(tmp_path: Path) -> None:
    path = str(tmp_path / "smtp")
    accepted: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()
    listener = await listen(accepted.set_result, path=path)
    client = await connect_unix(path, timeout_seconds=SECONDS)
    server = await accepted
    client.write(b"LHLO me\r\n")
    assert await read_exactly(server, 9) == b"LHLO me\r\n"
    assert client.peer == server.local == listener.addresses[0] == Endpoint(path)
    assert server.peer == Endpoint("")
    client.abort()
    server.abort()
    await listener.close()
    await listener.close()
    assert not os.path.exists(path)


async def test_a_successors_unix_socket_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "smtp")
    first = await listen(Stream.abort, path=path)
    os.unlink(path)
    second = await listen(Stream.abort, path=path)
    await first.close()
    assert os.path.exists(path)
    await second.close()


@pytest.fixture(params=["tcp", "unix"])
def bound(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    """A socket that a parent has bound, and keeps."""
    unused = socket.create_server(("127.0.0.1", 0))  # only a port that was asked for is kept
    with unused, socket.socket(socket.AF_INET if request.param == "tcp" else socket.AF_UNIX) as sock:
        where: Any = str(tmp_path / "smtp") if request.param == "unix" else unused.getsockname()
        unused.close()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        yield sock


def connected(listening: socket.socket) -> socket.socket:
    """A connection that the kernel has completed, and nobody has accepted."""
    client = socket.socket(listening.family)
    client.settimeout(SECONDS)
    client.connect(listening.getsockname())
    return client


class Greeting:
    """Greets whoever is accepted, and closes."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []

    def __call__(self, stream: Stream) -> None:
        self.streams.append(stream)
        stream.write(b"220 hello")
        stream.close()

    async def answers(self, *clients: socket.socket) -> list[bytes]:
        """What they are told, when all is over."""
        told = []
        for client in clients:
            with client:
                told.append(await asyncio.to_thread(client.recv, 100))
        for stream in self.streams:
            await stream.wait_closed()
        return told


@pytest.mark.both_loops
async def test_who_waits_in_the_kernel_is_accepted_before_a_listener_closes(bound: socket.socket) -> None:
    greeting = Greeting()
    listener = await listen(greeting, sock=bound.dup())
    waiting = [connected(bound) for _ in range(10)]
    await listener.close()
    assert await greeting.answers(*waiting) == [b"220 hello"] * 10
    await listener.close()
    if bound.family == socket.AF_INET:
        with socket.socket() as late, pytest.raises(ConnectionRefusedError):
            late.connect(bound.getsockname())


@pytest.mark.both_loops
async def test_who_waits_in_the_kernel_is_accepted_by_a_successor_on_the_same_socket(bound: socket.socket) -> None:
    path = bound.getsockname() if bound.family == socket.AF_UNIX else None
    greeting = Greeting()
    first = await listen(Stream.abort, sock=bound.dup())
    await first.leave()
    waiting = [connected(bound) for _ in range(10)]
    second = await listen(greeting, sock=bound.dup())
    assert await greeting.answers(*waiting) == [b"220 hello"] * 10
    assert second.addresses == first.addresses
    await second.close()
    assert path is None or os.path.exists(path)  # it is the parent's


@pytest.mark.both_loops
async def test_a_listener_can_be_opened_again_on_a_socket_on_which_another_has_stopped(bound: socket.socket) -> None:
    for _ in range(2):
        greeting = Greeting()
        listener = await listen(greeting, sock=bound.dup())
        assert await greeting.answers(connected(bound)) == [b"220 hello"]
        await listener.close()


async def test_a_burst_waits_in_the_kernel_and_few_are_accepted_at_once() -> None:
    accepted: list[Stream] = []
    most_at_once = 0
    listener = await listen(accepted.append, host="127.0.0.1")
    with ExitStack() as burst:
        # Nobody accepts while this thread connects.
        for _ in range(200):
            address = ("127.0.0.1", listener.addresses[0].port or 0)
            burst.enter_context(socket.create_connection(address, SECONDS))
        while len(accepted) < 200:
            before = len(accepted)
            await asyncio.sleep(0)
            most_at_once = max(most_at_once, len(accepted) - before)
        if type(asyncio.get_running_loop()).__module__ != "uvloop":  # which accepts as it likes
            assert most_at_once <= ACCEPTS_AT_ONCE + (sys.version_info >= (3, 14))
        for stream in accepted:
            stream.abort()
            await asyncio.wait_for(stream.wait_closed(), SECONDS)
    await listener.close()


def test_exhaustion_at_accept_is_recognised() -> None:
    assert is_accept_exhausted({"message": "m", "exception": OSError(errno.EMFILE, "too many")})
    assert not is_accept_exhausted({"message": "m", "exception": OSError(errno.EPIPE, "broken")})
    assert not is_accept_exhausted({"message": "m"})


async def test_a_second_drainer_is_refused() -> None:
    async with joined() as pair:
        pair.client.pause_reading()
        pair.server.write(bytes(20_000_000))
        first = asyncio.ensure_future(pair.server.drain())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            await pair.server.drain()
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first


async def test_a_repr_tells_ends_and_state() -> None:
    assert repr(Stream()) == "<Stream not connected clear>"
    async with joined() as pair:
        assert repr(pair.server) == f"<Stream {pair.server.local} <-> {pair.server.peer} clear>"
        pair.client.abort()
        await until(lambda: pair.server.is_eof)
        await pair.client.wait_closed()
        assert repr(pair.client).endswith(" lost>")


async def test_a_cancelled_connect_leaves_no_connection() -> None:
    listener, accepted = await accept_one()
    connecting = asyncio.ensure_future(_race([(socket.AF_INET, ("127.0.0.1", listener.addresses[0].port))] * 3))
    await asyncio.sleep(0)
    connecting.cancel()
    with suppress(asyncio.CancelledError):
        await connecting
    for _ in range(20):
        await asyncio.sleep(0)
    if accepted.done():
        assert await asyncio.wait_for((await accepted).read(), SECONDS) == b""
        (await accepted).abort()
    await listener.close()


async def test_a_name_without_an_address_is_an_os_error() -> None:
    with pytest.raises(OSError):
        await _race([])


# TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@pytest.mark.parametrize("delay_seconds", [0.0, 0.001, 0.05, 0.2])
async def test_starttls_whenever_the_client_hello_comes(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext, delay_seconds: float
) -> None:
    async with joined() as pair:

        async def serve() -> None:
            assert await read_exactly(pair.server, 10) == b"STARTTLS\r\n"
            pair.server.pause_reading()
            pair.server.write(b"220 go\r\n")
            # Time for an early ClientHello to be there before TLS is.
            await asyncio.sleep(0.2 - delay_seconds)
            assert pair.server.take_pending() == b""
            tls = await pair.server.start_tls(server_context, server_side=True, timeout_seconds=SECONDS)
            assert tls.version == "1.3"
            assert await read_exactly(pair.server, 9) == b"EHLO me\r\n"
            pair.server.write(b"250 me\r\n")

        serving = asyncio.ensure_future(serve())
        pair.client.write(b"STARTTLS\r\n")
        assert await read_exactly(pair.client, 8) == b"220 go\r\n"
        await asyncio.sleep(delay_seconds)
        tls = await pair.client.start_tls(
            client_context, server_side=False, server_hostname="localhost", timeout_seconds=SECONDS
        )
        assert tls.server_name == "localhost"
        assert tls.cipher
        pair.client.write(b"EHLO me\r\n")
        assert await read_exactly(pair.client, 8) == b"250 me\r\n"
        await serving
        assert pair.client.tls_object is not None
        assert pair.server.octets_received == 19  # what the application saw; not the handshake


async def test_connections_share_what_their_handshakes_agreed_on(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    agreed = []
    for _ in range(2):
        async with joined() as pair:
            serving = asyncio.ensure_future(
                pair.server.start_tls(server_context, server_side=True, timeout_seconds=SECONDS)
            )
            await pair.client.start_tls(
                client_context, server_side=False, server_hostname="localhost", timeout_seconds=SECONDS
            )
            agreed.append(await serving)
    assert agreed[0] is agreed[1]


async def serving_tls(context: ssl.SSLContext) -> tuple[Listener, list[Stream], list[BaseException | None]]:
    streams: list[Stream] = []
    ends: list[BaseException | None] = []
    tasks = []

    def accepted(stream: Stream) -> None:
        async def shake_hands() -> None:
            try:
                await stream.start_tls(context, server_side=True, timeout_seconds=SECONDS)
                ends.append(None)
            except (OSError, ssl.SSLError) as error:
                ends.append(error)

        stream.pause_reading()
        streams.append(stream)
        tasks.append(asyncio.ensure_future(shake_hands()))

    return await listen(accepted, host="127.0.0.1"), streams, ends


async def test_implicit_tls_carries_large_content_both_ways_and_closes_cleanly(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    listener, streams, ends = await serving_tls(server_context)
    client = await connect(
        "127.0.0.1", listener.addresses[0].port or 0, timeout_seconds=SECONDS, context=client_context
    )
    await until(lambda: ends == [None])
    client.write(b"c" * 3_000_000)
    assert len(await read_exactly(streams[0], 3_000_000)) == 3_000_000
    streams[0].write(b"s" * 3_000_000)
    await asyncio.gather(streams[0].drain(), read_exactly(client, 3_000_000))
    streams[0].close()
    assert await asyncio.wait_for(client.read(), SECONDS) == b""
    client.close()
    for stream in (client, streams[0]):
        await asyncio.wait_for(stream.wait_closed(), SECONDS)
    await listener.close()


class QuickClient:
    """A client in clear sight of whose first octets nobody has looked yet: they are sent before accept."""

    def __init__(self, port: int, first: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS)
        self.socket.sendall(first)
        self.socket.setblocking(False)

    async def shakes_hands(self, session: ssl.SSLObject, received: ssl.MemoryBIO, sent: ssl.MemoryBIO) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(SECONDS):
            while True:
                with suppress(ssl.SSLWantReadError):
                    session.do_handshake()
                    await loop.sock_sendall(self.socket, sent.read())
                    return
                await loop.sock_sendall(self.socket, sent.read())
                received.write(await loop.sock_recv(self.socket, 65536))


def client_hello(context: ssl.SSLContext) -> tuple[bytes, ssl.SSLObject, ssl.MemoryBIO, ssl.MemoryBIO]:
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context.wrap_bio(received, sent, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return sent.read(), session, received, sent


async def test_implicit_tls_with_a_client_hello_that_comes_with_the_connection(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async def shake_hands(stream: Stream) -> None:
        # Time for the ClientHello to be read in clear, where the loop does not heed the pause.
        await asyncio.sleep(0.02)
        await stream.start_tls(server_context, server_side=True, timeout_seconds=SECONDS, from_first_octet=True)

    def accepted(stream: Stream) -> None:
        stream.pause_reading()
        streams.append((stream, asyncio.ensure_future(shake_hands(stream))))

    streams: list[tuple[Stream, asyncio.Future[None]]] = []
    listener = await listen(accepted, host="127.0.0.1")
    hello, session, received, sent = client_hello(client_context)
    client = QuickClient(listener.addresses[0].port or 0, hello)
    await client.shakes_hands(session, received, sent)
    (stream, handshake) = streams[0]
    await asyncio.wait_for(handshake, SECONDS)
    session.write(b"EHLO me\r\n")
    await asyncio.get_running_loop().sock_sendall(client.socket, sent.read())
    assert await read_exactly(stream, 9) == b"EHLO me\r\n"
    assert stream.octets_received == 9
    client.socket.close()
    stream.abort()
    await asyncio.wait_for(stream.wait_closed(), SECONDS)
    await listener.close()


async def test_octets_of_starttls_read_in_clear_are_not_handed_to_tls(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    async with joined() as pair:
        hello, *_ = client_hello(client_context)
        pair.client.write(hello)
        await until(lambda: pair.server.octets_received)
        pair.server.pause_reading()
        with pytest.raises(TimeoutError):
            await pair.server.start_tls(server_context, server_side=True, timeout_seconds=0.05)


async def test_what_comes_with_the_connection_is_read_sparingly() -> None:
    async def read(stream: Stream) -> tuple[bytes, bytes, bytes]:
        await asyncio.sleep(0.02)
        first = await stream.read_sparingly(3)
        second = await stream.read_sparingly(2)
        stream.resume_reading()
        return first, second, await stream.read()

    def accepted(stream: Stream) -> None:
        stream.pause_reading()
        streams.append((stream, asyncio.ensure_future(read(stream))))

    streams: list[tuple[Stream, asyncio.Future[tuple[bytes, bytes, bytes]]]] = []
    listener = await listen(accepted, host="127.0.0.1")
    client = QuickClient(listener.addresses[0].port or 0, b"PROXY rest")
    await until(lambda: streams)
    assert await asyncio.wait_for(streams[0][1], SECONDS) == (b"PRO", b"XY", b" rest")
    client.socket.close()
    streams[0][0].abort()
    await asyncio.wait_for(streams[0][0].wait_closed(), SECONDS)
    await listener.close()


async def test_an_untrusted_certificate_is_an_ssl_error_and_ends_the_connection(
    server_context: ssl.SSLContext, client_context: ssl.SSLContext
) -> None:
    listener, streams, ends = await serving_tls(server_context)
    port = listener.addresses[0].port or 0
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect("127.0.0.1", port, timeout_seconds=SECONDS, context=ssl.create_default_context())
    with pytest.raises(ssl.SSLCertVerificationError):
        await connect(
            "127.0.0.1", port, timeout_seconds=SECONDS, context=client_context, server_hostname="other.example"
        )
    await until(lambda: len(ends) == 2)
    for stream in streams:
        stream.abort()
        await asyncio.wait_for(stream.wait_closed(), SECONDS)
    await listener.close()


async def test_a_handshake_that_stalls_is_a_timeout(client_context: ssl.SSLContext) -> None:
    async with joined() as pair:
        with pytest.raises(TimeoutError):
            await pair.client.start_tls(
                client_context, server_side=False, server_hostname="localhost", timeout_seconds=0.05
            )
        assert pair.client.is_lost
        assert await pair.client.read() == b""


async def test_a_peer_that_leaves_in_mid_handshake_is_a_connection_error(client_context: ssl.SSLContext) -> None:
    async with joined() as pair:
        shaking = asyncio.ensure_future(
            pair.client.start_tls(
                client_context, server_side=False, server_hostname="localhost", timeout_seconds=SECONDS
            )
        )
        await read_exactly(pair.server, 1)  # the ClientHello
        pair.server.abort()
        with pytest.raises((ConnectionError, ssl.SSLError)):
            await shaking
        assert pair.client.is_lost


async def test_clear_text_where_a_client_hello_is_due_is_an_ssl_error(server_context: ssl.SSLContext) -> None:
    async with joined() as pair:
        pair.server.pause_reading()
        pair.client.write(b"EHLO me\r\n")
        with pytest.raises(ssl.SSLError):
            await pair.server.start_tls(server_context, server_side=True, timeout_seconds=SECONDS)


async def test_a_cancelled_handshake_leaves_nothing_behind(client_context: ssl.SSLContext) -> None:
    async with joined() as pair:
        shaking = asyncio.ensure_future(
            pair.client.start_tls(client_context, server_side=False, server_hostname="h", timeout_seconds=SECONDS)
        )
        await read_exactly(pair.server, 1)
        shaking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shaking
        assert pair.client.is_lost
        assert await asyncio.wait_for(pair.server.read(), SECONDS) == b""


class Pushed:
    """A receiver that notes what it is told."""

    def __init__(self) -> None:
        self.data = b""
        self.has_ended = False
        self.resumed = 0

    def data_received(self, data: bytes) -> None:
        assert data
        assert not self.has_ended
        self.data += data

    def input_ended(self) -> None:
        assert not self.has_ended, "an input ends once"
        self.has_ended = True

    def writing_resumed(self) -> None:
        self.resumed += 1


async def test_a_receiver_gets_what_had_arrived_and_what_arrives_and_the_end() -> None:
    async with joined() as pair:
        pair.client.write(b"before ")
        await until(lambda: pair.server.octets_received)
        pushed = Pushed()
        pair.server.receive_by(pushed)
        assert pushed.data == b"before "
        assert pair.server._pulled is None  # an idle connection keeps nothing for a reader
        pair.client.write(b"after")
        await until(lambda: pushed.data == b"before after")
        assert pair.server.octets_received == len(b"before after")
        pair.client.close()
        await until(lambda: pushed.has_ended)


async def test_a_stream_goes_back_from_pushing_to_reading() -> None:
    async with joined() as pair:
        pushed = Pushed()
        pair.server.receive_by(pushed)
        pair.client.write(b"pushed")
        await until(lambda: pushed.data == b"pushed")
        pair.server.receive_by(None)
        pair.client.write(b"pulled")
        pair.server.deadline = asyncio.get_running_loop().time() + SECONDS
        assert await pair.server.read() == b"pulled"
        assert pushed.data == b"pushed"


async def test_a_receiver_that_comes_late_is_told_of_the_end_too() -> None:
    async with joined() as pair:
        pair.client.write(b"last words")
        pair.client.close()
        await until(lambda: pair.server.is_eof)
        pushed = Pushed()
        pair.server.receive_by(pushed)
        assert (pushed.data, pushed.has_ended) == (b"last words", True)


async def test_a_receiver_learns_that_a_slow_peer_takes_more_again() -> None:
    async with joined() as pair:
        pushed = Pushed()
        pair.server.receive_by(pushed)
        pair.client.pause_reading()
        while not pair.server.is_write_paused:
            pair.server.write(b"x" * HIGH_WATER_OCTETS)
            await asyncio.sleep(0)
        assert pushed.resumed == 0
        pair.client.resume_reading()
        taker = Pushed()
        pair.client.receive_by(taker)
        await until(lambda: pushed.resumed)
        assert not pair.server.is_write_paused


async def test_a_receiver_whose_connection_is_lost_does_not_wait_for_the_peer_to_read() -> None:
    async with joined() as pair:
        pushed = Pushed()
        pair.server.receive_by(pushed)
        pair.client.pause_reading()
        while not pair.server.is_write_paused:
            pair.server.write(b"x" * HIGH_WATER_OCTETS)
            await asyncio.sleep(0)
        pair.server.abort()
        await until(lambda: pushed.has_ended)
        assert pushed.resumed == 1
        assert not pair.server.is_write_paused


async def test_input_that_waits_in_the_kernel_is_seen() -> None:
    async with joined() as pair:
        pair.server.pause_reading()
        assert not pair.server.has_input()
        pair.client.write(b"x")
        await until(pair.server.has_input)
        assert pair.server.octets_received == 0


async def test_an_end_of_stream_that_waits_in_the_kernel_is_seen() -> None:
    async with joined() as pair:
        pair.server.pause_reading()
        pair.client.abort()
        await until(pair.server.has_input)
