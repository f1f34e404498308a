"""What a collector's answers mean, hostile ones too: octets on real sockets."""

import contextlib
import gzip
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import trustme
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTracePartialSuccess,
    ExportTraceServiceResponse,
)

from otel_smtp.telemetry.collector import (
    BatchOutcome,
    CollectorAnswer,
    CollectorSettings,
    Compression,
    Protocol,
    Signal,
    connect,
    retry_after_seconds,
)
from otel_smtp.telemetry.exchange_bounds import MAX_REPLY_OCTETS, MAX_REPLY_PIECES
from tests.support.otlp_receiver import OtlpReceiver

WAIT_SECONDS = 10.0
Play = Callable[[socket.socket], None]


@contextmanager
def playing(play: Play, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that reads one request on each connection, then does `play`; gives its URL."""
    scheme = "http" if tls is None else "https"
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection if tls is None else tls.wrap_socket(connection, server_side=True) as connection:
                    read = b""
                    while b"\r\n\r\n" not in read:
                        read += connection.recv(65536)
                    try:
                        play(connection)
                    except OSError:
                        continue  # it has hung up, as it should

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/v1/traces"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(WAIT_SECONDS)


def ask(url: str, timeout_seconds: float = WAIT_SECONDS) -> CollectorAnswer:
    collector = connect(CollectorSettings(url))
    try:
        return collector.send([], timeout_seconds)
    finally:
        collector.close()


def saying(octets: bytes) -> Play:
    return lambda connection: connection.sendall(octets)


def reply(body: bytes, head: str = "200 OK") -> Play:
    fields = f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\nContent-Type: application/x-protobuf\r\n\r\n"
    return saying(fields.encode() + body)


def partial(rejected: int, message: str = "") -> bytes:
    return ExportTraceServiceResponse(
        partial_success=ExportTracePartialSuccess(rejected_spans=rejected, error_message=message)
    ).SerializeToString()


TAKEN = CollectorAnswer(BatchOutcome.TAKEN)
HUNG_UP = "Server disconnected without sending a response."
MEANINGS = [
    ("nothing", reply(b""), TAKEN),
    ("202", reply(b"", "202 Accepted"), TAKEN),
    ("an empty partial success", reply(partial(0)), TAKEN),
    (
        "a warning",
        reply(partial(0, "slow\x00\ud800"[:5])),
        CollectorAnswer(BatchOutcome.TAKEN, "slow\N{REPLACEMENT CHARACTER}"),
    ),
    ("a partial success", reply(partial(3, "too old")), CollectorAnswer(BatchOutcome.TAKEN, "too old", rejected=3)),
    ("a negative count", reply(partial(-3)), TAKEN),
    ("text of 10 KiB", reply(partial(1, "x" * 10_240)), CollectorAnswer(BatchOutcome.TAKEN, "x" * 256, rejected=1)),
    ("nonsense", reply(b"\xff" * 300), TAKEN),
    ("a web page", reply(b"<html>It works!</html>"), TAKEN),
    ("more than we read", reply(partial(1, "x" * MAX_REPLY_OCTETS)), TAKEN),
    ("400", reply(b"", "400 Bad Request"), CollectorAnswer(BatchOutcome.REJECTED, "HTTP 400", status="400")),
    ("401", reply(b"", "401 Unauthorized"), CollectorAnswer(BatchOutcome.REJECTED, "HTTP 401", status="401")),
    ("404", reply(b"", "404 Not Found"), CollectorAnswer(BatchOutcome.REJECTED, "HTTP 404", status="404")),
    (
        "500 is not for a retry",
        reply(b"", "500 Oops"),
        CollectorAnswer(BatchOutcome.REJECTED, "HTTP 500", status="500"),
    ),
    ("502", reply(b"", "502 Bad Gateway"), CollectorAnswer(BatchOutcome.AGAIN, "HTTP 502", status="502")),
    ("503", reply(b"", "503 Unavailable"), CollectorAnswer(BatchOutcome.AGAIN, "HTTP 503", status="503")),
    ("504", reply(b"", "504 Timeout"), CollectorAnswer(BatchOutcome.AGAIN, "HTTP 504", status="504")),
    (
        "429, later",
        reply(b"", "429 Slow\r\nRetry-After: 7"),
        CollectorAnswer(BatchOutcome.AGAIN, "HTTP 429", 7.0, status="429"),
    ),
    ("no HTTP", saying(b"220 mail.example ESMTP\r\n"), CollectorAnswer(BatchOutcome.AGAIN, HUNG_UP)),
    ("hung up", lambda connection: None, CollectorAnswer(BatchOutcome.AGAIN, HUNG_UP)),
    ("hung up within", saying(b"HTTP/1.1 200 OK\r\nContent-Len"), CollectorAnswer(BatchOutcome.AGAIN, HUNG_UP)),
    (
        "header without end",
        saying(b"HTTP/1.1 200 OK\r\nx: " + b"x" * 300_000),
        CollectorAnswer(BatchOutcome.AGAIN, "answer without end"),
    ),
]


@pytest.mark.parametrize(("play", "meaning"), [row[1:] for row in MEANINGS], ids=[row[0] for row in MEANINGS])
def test_an_answer_means(play: Play, meaning: CollectorAnswer) -> None:
    with playing(play) as url:
        assert ask(url) == meaning


def test_a_redirect_is_not_followed() -> None:
    with OtlpReceiver(with_grpc=False) as elsewhere:
        where = f"307 Elsewhere\r\nLocation: {elsewhere.http_endpoint}/v1/traces"
        with playing(reply(b"", where)) as url:
            assert ask(url) == CollectorAnswer(BatchOutcome.REJECTED, "HTTP 307", status="307")
        assert elsewhere.requests == 0


def test_an_endless_answer_is_left() -> None:
    sent = threading.Event()

    def pour(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while True:
                connection.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        finally:
            sent.set()

    with playing(pour) as url:
        assert ask(url) == TAKEN
        assert sent.wait(WAIT_SECONDS)


ENDLESS = CollectorAnswer(BatchOutcome.AGAIN, "answer without end")
FLOODS = [
    ("interim answers", b"", b"HTTP/1.1 100 Continue\r\n\r\n", ENDLESS),
    ("headers", b"HTTP/1.1 200 OK\r\n", b"a: b\r\n", ENDLESS),
    ("body", b"HTTP/1.1 200 OK\r\n\r\n", b"\x0a\x00", TAKEN),
    ("trailers", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n", TAKEN),
    ("refusal", b"HTTP/1.1 400 No\r\n\r\n", b"x", CollectorAnswer(BatchOutcome.REJECTED, "HTTP 400", status="400")),
]


@pytest.mark.parametrize(("begin", "flood", "meaning"), [row[1:] for row in FLOODS], ids=[row[0] for row in FLOODS])
def test_an_answer_that_floods_us_is_left(begin: bytes, flood: bytes, meaning: CollectorAnswer) -> None:
    left = threading.Event()

    def pour(connection: socket.socket) -> None:
        try:
            connection.sendall(begin)
            while True:
                connection.sendall(flood * (MAX_REPLY_OCTETS // len(flood)))
        finally:
            left.set()

    with playing(pour) as url:
        # Patience that outlasts the test: it is not the deadline that ends it.
        assert ask(url, 10 * WAIT_SECONDS) == meaning
        assert left.wait(WAIT_SECONDS)


def in_chunks(body: bytes, pieces: int) -> Sequence[bytes]:
    """An answer whose body comes in so many chunks."""
    size = -(-len(body) // pieces)
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks), b"0\r\n\r\n"]


SLOW_TO_READ = partial(3, "x" * 2 * MAX_REPLY_PIECES)
IN_PIECES = CollectorAnswer(BatchOutcome.TAKEN, "x" * 256, rejected=3)


@pytest.mark.parametrize(
    ("chunks", "meaning"),
    [(MAX_REPLY_PIECES // 2, IN_PIECES), (2 * MAX_REPLY_PIECES, TAKEN)],
    ids=["some", "countless"],
)
def test_an_answer_in_countless_pieces_is_left(chunks: int, meaning: CollectorAnswer) -> None:
    with playing(saying(b"".join(in_chunks(SLOW_TO_READ, chunks)))) as url:
        assert ask(url) == meaning


@pytest.mark.parametrize(
    ("records", "meaning"),
    [(MAX_REPLY_PIECES // 2, TAKEN), (2 * MAX_REPLY_PIECES, ENDLESS)],
    ids=["some", "countless"],
)
def test_an_answer_in_countless_records_of_tls_is_left(records: int, meaning: CollectorAnswer, tmp_path: Path) -> None:
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    def drop_by_drop(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 ")
        for _ in range(records):
            connection.sendall(b"O")
        connection.sendall(b"\r\nContent-Length: 0\r\n\r\n")

    with playing(drop_by_drop, tls) as url:
        collector = connect(CollectorSettings(url, certificate=str(tmp_path / "ca.pem")))
        assert collector.send([], WAIT_SECONDS) == meaning
        collector.close()


def test_over_grpc_a_connection_on_which_no_answer_came_is_not_used_again() -> None:
    connections = 0

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            nonlocal connections
            for _ in range(2):
                connection, _ = listener.accept()
                connections += 1
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"\0\0\0\4\0\0\0\0\0")  # SETTINGS
                    while connection.recv(65536):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        collector = connect(CollectorSettings(address, protocol=Protocol.GRPC))
        for _ in range(2):
            assert collector.send([], 0.5) == CollectorAnswer(
                BatchOutcome.AGAIN, "no answer within 0.5 s", status="DEADLINE_EXCEEDED"
            )
        thread.join(WAIT_SECONDS)  # it has seen the end of both
        assert not thread.is_alive()
        assert connections == 2
        collector.close()


def test_each_answer_over_a_kept_connection_has_the_bounds_for_itself() -> None:
    long = reply(partial(1, "x" * (MAX_REPLY_OCTETS // 2)))

    def thrice(connection: socket.socket) -> None:
        for _ in range(3):
            long(connection)
            connection.recv(65536)

    with playing(thrice) as url:
        collector = connect(CollectorSettings(url))
        for _ in range(3):
            assert collector.send([], WAIT_SECONDS) == CollectorAnswer(BatchOutcome.TAKEN, "x" * 256, rejected=1)
        collector.close()


def test_an_answer_that_drips_is_left_when_its_time_is_over() -> None:
    left = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n")
        try:
            while not left.wait(0.01):
                connection.sendall(b"x")
        finally:
            left.set()

    with playing(drip) as url:
        began = time.monotonic()
        assert ask(url, 0.2) == TAKEN
        assert time.monotonic() - began < WAIT_SECONDS
        assert left.wait(WAIT_SECONDS)


DRIPS = {
    "status line": b"HTTP/1.1 200 " + b"O" * 4096,
    "header": b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 4096,
    "interim answers": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 200,
}


@pytest.mark.parametrize("signal", Signal)
@pytest.mark.parametrize("octets", DRIPS.values(), ids=DRIPS.keys())
def test_a_head_that_drips_is_cut_off_at_the_deadline(octets: bytes, signal: Signal) -> None:
    def drip(connection: socket.socket) -> None:
        for octet in octets:
            connection.sendall(bytes([octet]))
            time.sleep(0.02)

    with playing(drip) as url:
        began = time.monotonic()
        collector = connect(CollectorSettings(url, signal=signal))
        assert collector.send([], 0.3) == CollectorAnswer(BatchOutcome.AGAIN, "no answer within 0.3 s")
        assert 0.29 < time.monotonic() - began < 3
        collector.close()


def test_a_handshake_that_drips_is_cut_off_at_the_deadline() -> None:
    def drip(connection: socket.socket) -> None:
        # A record of 16 KiB is announced, and comes octet by octet.
        for octet in b"\x16\x03\x03\x40\x00" + b"\x02" * 500:
            connection.sendall(bytes([octet]))
            time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                drip(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        began = time.monotonic()
        collector = connect(CollectorSettings(f"https://127.0.0.1:{listener.getsockname()[1]}/v1/traces"))
        assert collector.send([], 0.3) == CollectorAnswer(BatchOutcome.AGAIN, "no answer within 0.3 s")
        assert 0.29 < time.monotonic() - began < 3
        collector.close()
        thread.join(WAIT_SECONDS)


def test_a_collector_that_reads_a_request_in_drips_is_cut_off_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                while connection.recv(1024):
                    time.sleep(0.05)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        began = time.monotonic()
        collector = connect(CollectorSettings(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/traces"))
        assert collector.send([b"x" * 8_000_000], 0.3) == CollectorAnswer(BatchOutcome.AGAIN, "no answer within 0.3 s")
        assert time.monotonic() - began < 3
        collector.close()


def test_after_one_that_was_cut_off_the_next_exchange_has_its_own_time() -> None:
    served = 0

    def first_drips(connection: socket.socket) -> None:
        nonlocal served
        served += 1
        if served == 1:
            for _ in range(500):
                connection.sendall(b"x")
                time.sleep(0.01)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    with playing(first_drips) as url:
        collector = connect(CollectorSettings(url))
        assert collector.send([], 0.1).verdict is BatchOutcome.AGAIN
        for _ in range(3):
            assert collector.send([], WAIT_SECONDS) == TAKEN
        collector.close()


def test_an_answer_that_never_comes_is_a_reason_to_come_again() -> None:
    over = threading.Event()

    def wait(connection: socket.socket) -> None:
        over.wait(WAIT_SECONDS)

    with playing(wait) as url:
        # Two clocks measure the same time: the deadline of the exchange, and the timeout of its one read.
        assert ask(url, 0.05) in [CollectorAnswer(BatchOutcome.AGAIN, "no answer within 0.05 s")]
        over.set()


def test_a_connection_is_used_again_and_one_that_was_closed_is_not() -> None:
    connections = 0

    def twice(connection: socket.socket) -> None:
        nonlocal connections
        connections += 1
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        if connection.recv(65536):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with playing(twice) as url:
        collector = connect(CollectorSettings(url))
        assert [collector.send([], WAIT_SECONDS) for _ in range(2)] == [TAKEN, TAKEN]
        assert connections == 1
        collector.close()


@pytest.mark.parametrize(
    ("compression", "plain"),
    [(Compression.NONE, bytes), (Compression.GZIP, gzip.decompress), (Compression.DEFLATE, zlib.decompress)],
)
def test_a_large_request_arrives_whole_in_one_body_of_a_known_length(
    compression: Compression, plain: Callable[[bytes], bytes]
) -> None:
    received: list[tuple[str | None, bytes]] = []

    class Taking(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.headers["transfer-encoding"], plain(body)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    parts = [bytes([65 + number]) * octets for number, octets in enumerate((1, 70_000, 70_000, 0, 300_000, 5))]
    with HTTPServer(("127.0.0.1", 0), Taking) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        collector = connect(CollectorSettings(f"http://127.0.0.1:{server.server_port}/", compression=compression))
        assert collector.send(parts, WAIT_SECONDS) == TAKEN
        collector.close()
        thread.join(WAIT_SECONDS)
    assert received == [(None, b"".join(parts))]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("0", 0), ("120", 120), (" 5 ", 5), ("", None), ("soon", None), ("-1", None), ("1e9", None), ("²", None)],
)
def test_retry_after_is_seconds(value: str, seconds: float | None) -> None:
    assert retry_after_seconds(value) == seconds


def test_retry_after_is_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    seconds = retry_after_seconds(soon)
    assert seconds is not None
    assert 50 < seconds <= 100
    assert retry_after_seconds("Mon, 01 Jan 2001 00:00:00 GMT") == 0


# TLS ----------------------------------------------------------------------------------------------------------------


def test_a_certificate_that_cannot_be_read_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        connect(CollectorSettings("https://127.0.0.1:1/", certificate=str(tmp_path / "none.pem")))


@pytest.mark.parametrize("trusts", [True, False])
def test_the_collectors_certificate_is_verified_and_ours_shown(tmp_path: Path, trusts: bool) -> None:

    authority, stranger = trustme.CA(), trustme.CA()
    certificate, ours = authority.issue_cert("127.0.0.1"), authority.issue_cert("gw.example.com")
    (authority if trusts else stranger).cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    ours.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "ours.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    shown: list[object] = []

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    with context.wrap_socket(connection, server_side=True) as encrypted:
                        shown.append(encrypted.getpeercert())
                        encrypted.recv(65536)
                        encrypted.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                except OSError:
                    pass  # it would not have our certificate

        thread = threading.Thread(target=serve)
        thread.start()
        settings = CollectorSettings(
            f"https://127.0.0.1:{listener.getsockname()[1]}/v1/traces",
            certificate=str(tmp_path / "ca.pem"),
            client_certificate=str(tmp_path / "ours.pem"),
        )
        collector = connect(settings)
        answer = collector.send([], WAIT_SECONDS)
        collector.close()
        thread.join(WAIT_SECONDS)
    untrusted = CollectorAnswer(BatchOutcome.AGAIN, "TLS: self-signed certificate in certificate chain")
    assert answer == (TAKEN if trusts else untrusted)
    assert bool(shown and shown[0]) is trusts


def test_grpc_without_a_trusted_certificate_takes_nothing() -> None:
    with OtlpReceiver() as receiver:
        settings = CollectorSettings(receiver.grpc_endpoint, protocol=Protocol.GRPC, is_insecure=False)
        collector = connect(settings)
        assert collector.send([], 0.5).verdict is BatchOutcome.AGAIN
        collector.close()
        assert receiver.requests == 0


# What may be shown --------------------------------------------------------------------------------------------------


def test_settings_show_no_key() -> None:
    settings = CollectorSettings("https://user:secret@collector:4318/v1/traces", headers=(("api-key", "hidden"),))
    assert settings.address == "collector:4318"
    assert CollectorSettings("user:secret@collector:4317").address == "collector:4317"
    assert "hidden" not in repr(settings)
