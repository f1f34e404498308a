"""Why exports fail, in words: as real sockets, real TLS and both real client libraries fail."""

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme

from otel_smtp.telemetry.collector import BatchOutcome, CollectorSettings, Protocol, connect
from otel_smtp.telemetry.export_failures import file_failure, grpc_failure, http_failure

PROTOCOLS = [Protocol.HTTP, Protocol.GRPC]
WAIT_SECONDS = 10.0


@contextmanager
def listening(context: ssl.SSLContext | None = None, *, backlog_only: bool = False) -> Iterator[int]:
    """A server that hangs up after a TLS handshake, or at once; `backlog_only`: it never accepts. Gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                try:
                    if context is not None:
                        context.wrap_socket(connection, server_side=True).close()
                except OSError:
                    pass  # the certificate was not trusted
                finally:
                    connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        if not backlog_only:
            thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    if not backlog_only:
        thread.join(WAIT_SECONDS)


def why(protocol: Protocol, address: str, *, tls: bool = False, seconds: float = WAIT_SECONDS) -> str:
    scheme = "https" if tls else "http"
    collector = connect(CollectorSettings(f"{scheme}://{address}/", protocol=protocol, is_insecure=not tls))
    try:
        answer = collector.send([], seconds)
    finally:
        collector.close()
    assert answer.verdict is BatchOutcome.AGAIN
    return answer.why


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nobody_listens(protocol: Protocol) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.shutdown(socket.SHUT_RDWR)  # bound, so that no other process gets the port, and not listening
        assert why(protocol, f"127.0.0.1:{taken.getsockname()[1]}") == "connection refused"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nobody_answers(protocol: Protocol) -> None:
    with listening(backlog_only=True) as port:
        assert why(protocol, f"127.0.0.1:{port}", seconds=0.25) == "no answer within 0.25 s"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_certificate_is_from_an_authority_that_is_not_trusted(protocol: Protocol) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with listening(context) as port:
        assert why(protocol, f"127.0.0.1:{port}", tls=True) == "TLS: unable to get local issuer certificate"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_name_is_not_found(protocol: Protocol) -> None:
    # RFC 6761 6.4: "invalid" resolves nowhere. The words are the resolver's, which differ.
    assert why(protocol, "collector.invalid:4318").startswith("name resolution: ")


@pytest.mark.parametrize(
    ("code", "details", "words"),
    [
        ("UNAVAILABLE", "", "UNAVAILABLE"),
        ("UNAVAILABLE", None, "UNAVAILABLE"),
        ("RESOURCE_EXHAUSTED", "queue is full", "RESOURCE_EXHAUSTED: queue is full"),
        ("UNAVAILABLE", "a\r\nb", "UNAVAILABLE: a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"),
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", "no answer within 10 s"),
        ("DEADLINE_EXCEEDED", "of the backend", "DEADLINE_EXCEEDED: of the backend"),
        ("UNAVAILABLE", "last error: SSL: CERTIFICATE_VERIFY_FAILED", "TLS: certificate verify failed"),
        ("UNAVAILABLE", "SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER: OK", "TLS: wrong version number"),
        (
            "UNAVAILABLE",
            "last error: UNAVAILABLE: ipv4:127.0.0.1:1: recvmsg:Connection reset by peer (104)",
            "connection reset by peer",
        ),
    ],
)
def test_a_sentence_of_grpc_is_cut_to_what_matters(code: str, details: str | None, words: str) -> None:
    assert grpc_failure(code, details, 10.0) == words


def test_a_long_sentence_is_bounded() -> None:
    assert len(grpc_failure("INTERNAL", "x" * 10_000, 10.0)) == 256


def test_an_error_of_the_system_is_found_behind_those_of_libraries() -> None:
    error = RuntimeError("read error")
    error.__cause__ = ConnectionResetError(104, "Connection reset by peer")
    assert http_failure(error, 1.0) == "connection reset by peer"
    assert http_failure(RuntimeError("said\x00so"), 1.0) == "said\N{REPLACEMENT CHARACTER}so"
    assert http_failure(RuntimeError(), 1.0) == "RuntimeError"


def test_a_file_of_tls_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "ca.pem")
    with pytest.raises(OSError) as raised:
        os.stat(missing)
    assert file_failure(raised.value) == f"TLS files: no such file or directory: {missing}"
    assert file_failure(ssl.SSLError("no start line")).startswith("TLS files: ")
