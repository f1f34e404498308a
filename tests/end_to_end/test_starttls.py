"""STARTTLS where clients and attackers differ: when the ClientHello comes, what comes with it, how TLS ends.

The dialogues say what is answered. Here it is a matter of segments, of time and of the event loop.
"""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.end_to_end.conftest import Client, Files, StartGateway
from tests.end_to_end.test_traces import connection_of, exporting
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.support.process import gateway

SECONDS: Final = 15.0


class Site:
    """A gateway with STARTTLS, and what stands around it."""

    def __init__(self, port: int, upstream: CapturingUpstream, receiver: OtlpReceiver, tls: ssl.SSLContext) -> None:
        self.port = port
        self.upstream = upstream
        self.receiver = receiver
        self.tls = tls


@pytest.fixture(
    scope="module",
    params=[pytest.param(loop, marks=pytest.mark.xdist_group(f"starttls on {loop}")) for loop in ("uvloop", "asyncio")],
)
def site(request: pytest.FixtureRequest, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with CapturingUpstream() as upstream, OtlpReceiver(with_grpc=False) as receiver:
        settings = {
            **files.listener("starttls", "optional"),
            "listener.trace_context": "ignore",
            "upstream.url": upstream.url,
            "telemetry.probes": True,
        }
        directory = tmp_path_factory.mktemp("gateway")
        environ = exporting(receiver)
        with gateway(settings, directory, environ=environ, uses_uvloop=request.param == "uvloop") as running:
            yield Site(running.port, upstream, receiver, files.client_context())
            assert running.stop() == 0
            assert "Traceback" not in running.stderr
    assert upstream.violations == []


def read_line(connected: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (octet := connected.recv(1)):
        line += octet
    return line


def read_to_end(connected: socket.socket) -> bytes:
    said = b""
    with contextlib.suppress(ConnectionResetError, ssl.SSLError):
        while data := connected.recv(65536):
            said += data
    return said


def states(span: ReceivedSpan) -> list[str]:
    return [event.attributes["smtp.state"] for event in span.events]


@contextlib.contextmanager
def greeted(site: Site) -> Iterator[socket.socket]:
    """A socket on which the gateway has greeted and answered EHLO."""
    with socket.create_connection(("127.0.0.1", site.port), SECONDS) as connected:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert read_line(connected).startswith(b"220 ")
        connected.sendall(b"EHLO client.example\r\n")
        while (line := read_line(connected))[3:4] == b"-":
            pass
        assert line.startswith(b"250 ")
        yield connected


# An early ClientHello that the plain reader swallows makes the handshake hang. The delays are the test's subject.
@pytest.mark.parametrize("delay_seconds", [0.0, 0.001, 0.02, 0.2])
def test_the_handshake_works_whenever_the_client_hello_comes(site: Site, delay_seconds: float) -> None:
    with greeted(site) as clear:
        clear.sendall(b"STARTTLS\r\n")
        assert read_line(clear).startswith(b"220 ")
        threading.Event().wait(delay_seconds)
        with site.tls.wrap_socket(clear, server_hostname="localhost") as connected:
            connected.sendall(b"EHLO client.example\r\nQUIT\r\n")
            assert b"\r\n221 " in read_to_end(connected)


def test_a_client_hello_in_pieces_works_too(site: Site) -> None:
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = site.tls.wrap_bio(received, sent, server_hostname="localhost")
    with greeted(site) as connected:
        connected.sendall(b"STARTTLS\r\n")
        assert read_line(connected).startswith(b"220 ")
        with contextlib.suppress(ssl.SSLWantReadError):
            session.do_handshake()
        hello = sent.read()
        for at in range(len(hello)):
            connected.sendall(hello[at : at + 1])
        while True:
            received.write(connected.recv(65536))
            try:
                session.do_handshake()
                break
            except ssl.SSLWantReadError:
                pass
        assert session.version() == "TLSv1.3"


INJECTED: Final = b"RSET\r\nMAIL FROM:<evil@client.example>\r\nRCPT TO:<b@there.example>\r\nDATA\r\nx: y\r\n\r\n.\r\n"
STARTTLS: Final = b"STARTTLS\r\n"


# CVE-2011-0411: what was said in clear is never run as if it had been said under TLS.
@pytest.mark.parametrize(
    "pieces",
    [
        (STARTTLS + INJECTED,),
        (STARTTLS[:-1], STARTTLS[-1:] + INJECTED),  # the line end comes with what is injected
        (STARTTLS + INJECTED[:2], INJECTED[2:]),
        (STARTTLS + b"\r\n",),
        (STARTTLS + b"\0",),
    ],
    ids=["one segment", "cut in STARTTLS", "cut in the command", "an empty line", "an octet"],
)
def test_octets_behind_starttls_end_the_connection(site: Site, pieces: tuple[bytes, ...]) -> None:
    with greeted(site) as connected:
        port = connected.getsockname()[1]
        for piece in pieces:
            connected.sendall(piece)
        assert read_to_end(connected) == b"554 5.5.1 Data behind STARTTLS\r\n"
    assert states(connection_of(site.receiver, port)) == ["New", "Active", "Error", "Closed"]


def test_octets_in_clear_where_the_handshake_is_due_are_no_commands(site: Site) -> None:
    # Split: the injection is a segment of its own, and comes before or after reading in clear has stopped.
    with greeted(site) as connected:
        port = connected.getsockname()[1]
        connected.sendall(STARTTLS)
        assert read_line(connected).startswith(b"220 ")
        connected.sendall(INJECTED)
        assert b"250" not in read_to_end(connected)  # an alert at most
    assert states(connection_of(site.receiver, port)) == ["New", "Active", "StartTLS", "Error", "Closed"]
    assert all("evil" not in message.reverse_path for message in site.upstream.messages)


def test_octets_that_race_with_the_220_are_no_commands(site: Site) -> None:
    for _ in range(20):
        with greeted(site) as connected:
            connected.sendall(STARTTLS)
            connected.sendall(INJECTED)  # without waiting: seen with STARTTLS, or by the TLS layer
            said = read_to_end(connected)
            assert said.startswith((b"554 5.5.1 Data behind STARTTLS", b"220 "))
            assert b"250" not in said
    assert all("evil" not in message.reverse_path for message in site.upstream.messages)


def in_data(site: Site, clear: socket.socket) -> ssl.SSLSocket:
    """Go on under TLS, to the middle of content."""
    clear.sendall(STARTTLS)
    assert read_line(clear).startswith(b"220 ")
    connected = site.tls.wrap_socket(clear, server_hostname="localhost", suppress_ragged_eofs=False)
    connected.sendall(b"EHLO client.example\r\n")
    while read_line(connected)[3:4] == b"-":
        pass
    connected.sendall(b"MAIL FROM:<half@client.example>\r\nRCPT TO:<b@there.example>\r\nDATA\r\n")
    assert [read_line(connected)[:3] for _ in range(3)] == [b"250", b"250", b"354"]
    connected.sendall(b"Subject: x\r\n\r\nhalf of a mess")
    return connected


def close_by_notify(connected: ssl.SSLSocket) -> None:
    with contextlib.suppress(ssl.SSLError, OSError):
        connected.unwrap()


def close_without_notify(connected: ssl.SSLSocket) -> None:
    connected.shutdown(socket.SHUT_WR)


def speak_in_clear(connected: ssl.SSLSocket) -> None:
    number = connected.detach()
    with socket.socket(fileno=number) as clear:
        clear.settimeout(SECONDS)
        clear.sendall(b"\r\n.\r\nNOOP\r\n")
        assert b"250" not in read_to_end(clear)


# The end of TLS, or what comes behind it, is no end of content.
@pytest.mark.parametrize("leave", [close_by_notify, close_without_notify, speak_in_clear])
def test_a_message_whose_tls_ends_is_not_sent(site: Site, leave: Callable[[ssl.SSLSocket], None]) -> None:
    with greeted(site) as clear:
        port = clear.getsockname()[1]
        with in_data(site, clear) as connected:
            leave(connected)
    span = connection_of(site.receiver, port)
    assert states(span) == ["New", "Active", "StartTLS", "Active", "Data", "Closed"]
    assert span.attributes["smtp.close.reason"] == "client_disconnect"
    assert all("half" not in message.reverse_path for message in site.upstream.messages)


# HTTP and TLS on a port that speaks neither; here on both loops and in one flight with the connection.
@pytest.mark.parametrize("waits", [True, False], ids=["after the greeting", "before the greeting"])
@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 90\r\n\r\nEHLO x.example\r\nMAIL FROM:<evil@client.example>\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + bytes(160),
    ],
    ids=["GET", "POST", "ClientHello"],
)
def test_other_protocols_are_hung_up_on(site: Site, said: bytes, waits: bool) -> None:
    with socket.create_connection(("127.0.0.1", site.port), SECONDS) as connected:
        port = connected.getsockname()[1]
        greeting = read_line(connected) if waits else b""
        connected.sendall(said)
        answer = greeting + read_to_end(connected)
        assert answer.count(b"\r\n") == answer.count(b"220 ") <= 1  # the greeting at most
    span = connection_of(site.receiver, port)
    assert span.attributes["smtp.close.reason"] == "protocol_mismatch"
    assert states(span) in (["New", "Active", "Closed"], ["New", "Closed"])


def test_a_client_that_never_shakes_hands_is_let_go(
    files: Files, upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client], tmp_path: Path
) -> None:
    settings = {**files.listener("starttls"), "upstream.url": upstream.url, "timeouts.tls_handshake": 0.2}
    client = connect(start(settings).port)
    client.opens()
    assert client.asks("STARTTLS").startswith("220 ")
    assert client.reply() == ""
