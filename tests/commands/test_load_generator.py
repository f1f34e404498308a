"""The load engine against a sink that counts, and against servers that refuse, drop, stall or are not there."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from otel_smtp.commands.load_generator import Load, LoadPlan, LoadResult, message
from tests.bench.process import Child
from tests.support.ports import unclaimed_port
from tests.support.sink_process import running_sink


@pytest.fixture(scope="module")
def sink() -> Iterator[tuple[int, Child]]:
    with running_sink() as running:
        yield running


def plan(port: int, **what: object) -> LoadPlan:
    return LoadPlan(host="127.0.0.1", port=port, **{"messages": 20, "sessions": 3, **what})  # type: ignore[arg-type]  # a table of settings


@pytest.mark.parametrize(
    "what",
    [
        {},
        {"sessions": 1},
        {"sessions": 50},  # more sessions than messages
        {"keeps_connections": False},
        {"size_octets": 1},  # the header block alone
        {"size_octets": 3_000_000, "messages": 4},  # far above the socket's buffers
        {"rate": 2000.0},
        {"rate": 2000.0, "keeps_connections": False},
    ],
)
def test_every_message_arrives_once_and_is_timed(sink: tuple[int, Child], what: dict[str, object]) -> None:
    port, process = sink
    before = process.ask()
    sent = plan(port, **what)
    result = Load(sent).run()
    after = process.ask()
    assert (result.accepted, result.failed) == (sent.messages, 0)
    assert after["messages"] - before["messages"] == sent.messages
    assert after["octets"] - before["octets"] == result.accepted * (len(message(sent)) + len(b".\r\n"))
    assert len(result.latencies_ns) == result.accepted
    assert result.messages_per_second > 0
    connections = after["connections"] - before["connections"]
    assert connections == (min(sent.sessions, result.accepted) if sent.keeps_connections else result.accepted)


def test_a_load_by_time_ends_in_time(sink: tuple[int, Child]) -> None:
    result = Load(plan(sink[0], messages=None, seconds=0.05)).run()
    assert result.accepted > 0
    assert not result.failed


@pytest.mark.parametrize("more", [{}, {"rate": 100.0}, {"keeps_connections": False}])
def test_a_load_sends_a_message_however_short_it_is(sink: tuple[int, Child], more: dict[str, object]) -> None:
    result = Load(plan(sink[0], messages=None, seconds=1e-9, **more)).run()
    assert (result.accepted, result.failed) == (1, 0)


def test_a_load_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="without an end"):
        LoadPlan(host="127.0.0.1", port=1)
    with pytest.raises(ValueError, match="rate: 0 messages per second"):
        LoadPlan(host="127.0.0.1", port=1, messages=1, rate=0)


@pytest.mark.parametrize("keeps_connections", [True, False])
def test_a_rate_spreads_the_messages(sink: tuple[int, Child], keeps_connections: bool) -> None:
    result = Load(plan(sink[0], messages=21, rate=200.0, keeps_connections=keeps_connections)).run()
    assert (result.accepted, result.failed) == (21, 0)
    assert result.seconds >= 20 / 200


@pytest.mark.parametrize("keeps_connections", [True, False])
def test_a_load_with_a_rate_ends_in_time(sink: tuple[int, Child], keeps_connections: bool) -> None:
    # The next message would be due after a thousand seconds.
    sent = plan(sink[0], messages=None, seconds=0.05, rate=0.001, keeps_connections=keeps_connections)
    assert Load(sent).run().accepted == 1


@pytest.mark.parametrize("octets", [*range(150, 400), 10_240, 100_000])
def test_a_message_has_the_octets_asked_for_and_whole_lines(octets: int) -> None:
    content = message(plan(1, size_octets=octets))
    assert content.endswith(b"\r\n")
    assert content.count(b"\r\n") == content.count(b"\r") == content.count(b"\n")
    assert not content.startswith(b".")
    assert b"\r\n." not in content  # nothing that would have to be dot-stuffed
    if octets > 200:
        assert len(content) == octets


def test_progress_is_reported_and_may_end_the_run(sink: tuple[int, Child]) -> None:
    class Enough(Exception):
        pass

    def stop(result: LoadResult) -> None:
        assert result.failed == 0
        raise Enough

    with pytest.raises(Enough):
        Load(plan(sink[0], messages=1_000_000), stop).run()


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A listener that lets `answer` speak on each connection in turn, until the test closes it."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                try:
                    answer(connection)
                except OSError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def scripted(*replies: bytes) -> Callable[[socket.socket], None]:
    """Send the first reply at once and each next one after something was read; then end, and read what still comes: to
    close with something unread resets the connection."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(replies[0])
        for reply in replies[1:]:
            if not connection.recv(65536):
                return
            connection.sendall(reply)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass

    return answer


FAILURES = [
    ((b"554 no\r\n",), 1, "connect: 554 no"),
    ((b"220-many\r\n220 x\r\n", b"500 what\r\n"), 2, "EHLO: 500 what"),
    ((b"220 x\r\n", b"250 x\r\n", b"451 later\r\n"), 2, "MAIL: 451 later"),
    ((b"220 x\r\n", b"250 x\r\n", b"421 at once\r\n"), 2, "MAIL: 421 at once"),  # nothing was taken before: a failure
    ((b"220 x\r\n", b"250-x\r\n250 Y\r\n", b"250 k\r\n", b"550 nobody\r\n"), 2, "RCPT: 550 nobody"),
    ((b"220 x\r\n", b"250 x\r\n", b"250 k\r\n", b"250 k\r\n", b"554 no\r\n"), 2, "DATA: 554 no"),
    ((b"220 x\r\n", b"250 x\r\n", b"250 k\r\n", b"250 k\r\n", b"354 go\r\n", b"552 big\r\n"), 2, "content: 552 big"),
    ((b"220 x\r\n", b"250 x\r\n", b"250 k\r\n"), 2, "connection closed"),
    ((b"",), 1, "connection closed"),
    ((b"554 \x1b[31mno trace=0af7651916cd43dd8448eb211c80319c\r\n",), 1, "connect: 554 [31mno"),
]


def test_refusals_that_differ_in_their_trace_alone_are_counted_together() -> None:
    traces = iter(range(3))

    def refuse(peer: socket.socket) -> None:
        peer.sendall(b"554 5.7.1 no trace=%032x\r\n" % next(traces))

    with server(refuse) as port:
        result = Load(plan(port, messages=3, sessions=3)).run()
    assert result.failures == {"connect: 554 5.7.1 no": 3}


@pytest.mark.parametrize(("replies", "messages", "reason"), FAILURES)
def test_a_failure_is_counted_by_its_reason_and_the_run_ends(
    replies: tuple[bytes, ...], messages: int, reason: str
) -> None:
    with server(scripted(*replies)) as port:
        result = Load(plan(port, messages=messages, sessions=1)).run()
    assert result.accepted == 0
    assert result.failed >= 1
    assert set(result.failures) == {reason}


def test_a_server_that_counts_messages_costs_a_reconnect_and_no_message() -> None:
    one = (b"220 x\r\n", b"250 x\r\n", b"250 k\r\n", b"250 k\r\n", b"354 go\r\n", b"250 taken\r\n", b"421 enough\r\n")
    with server(scripted(*one)) as port:
        result = Load(plan(port, messages=3, sessions=1)).run()
    assert (result.accepted, result.failed) == (3, 0)
    assert result.reconnects == 2


def test_a_server_that_closes_an_idle_connection_costs_a_reconnect_and_no_message() -> None:
    one = (b"220 x\r\n", b"250 x\r\n", b"250 k\r\n", b"250 k\r\n", b"354 go\r\n", b"250 taken\r\n")
    with server(scripted(*one)) as port:
        result = Load(plan(port, messages=3, sessions=1, rate=20.0)).run()
    assert (result.accepted, result.failed) == (3, 0)
    assert result.reconnects >= 2


@pytest.mark.parametrize("keeps_connections", [True, False])
def test_a_message_that_waits_for_a_session_counts_from_when_it_was_due(keeps_connections: bool) -> None:
    stalled_seconds = 0.3
    stalls = [stalled_seconds]

    def stall_once(connection: socket.socket) -> None:
        connection.sendall(b"220 x\r\n")
        while data := connection.recv(65536):
            if data.endswith(b"\r\n.\r\n") and stalls:
                time.sleep(stalls.pop())
            connection.sendall(b"354 go\r\n" if data == b"DATA\r\n" else b"250 ok\r\n")
            if data == b"QUIT\r\n":
                return

    with server(stall_once) as port:
        sent = plan(port, messages=3, sessions=1, rate=100.0, keeps_connections=keeps_connections)
        result = Load(sent).run()
    assert (result.accepted, result.failed) == (3, 0)
    first, second, third = (latency / 1e9 for latency in result.latencies_ns)
    assert first >= stalled_seconds
    assert second >= stalled_seconds - 1 / 100
    assert third >= stalled_seconds - 2 / 100


def test_silence_ends_the_run() -> None:
    released = threading.Event()

    def silent(connection: socket.socket) -> None:
        released.wait()

    with server(silent) as port:
        result = Load(plan(port, messages=1, sessions=1, timeout_seconds=0.05)).run()
        released.set()
    assert result.failures == {"no reply within 0.05 s": 1}


def test_nobody_listening_is_a_failure_and_not_an_exception() -> None:
    result = Load(plan(unclaimed_port(), messages=5, sessions=1)).run()
    assert result.accepted == 0
    assert result.failed == 1
    assert result.seconds >= 0
