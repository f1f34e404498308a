"""`check --connect`: listeners, certificates and collectors that are right, wrong, away or somebody else."""

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import trustme

from otel_smtp.commands.checking import (
    Finding,
    check_certificate,
    check_collector,
    check_listeners,
    check_spool,
    check_status,
    check_upstream,
    collector,
)
from otel_smtp.config import Listener, Settings, Status, load
from otel_smtp.forwarding.settings import UpstreamSettings
from otel_smtp.observing import Endpoint
from otel_smtp.smtp.states import TlsMode
from otel_smtp.spool.embedded import EmbeddedStore
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver


async def listed(findings: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in findings]


async def findings_for(address: str) -> list[Finding]:
    values = {"upstream": [{"url": "smtp://127.0.0.1:1"}], "listener": [{"address": [address]}]}
    return await listed(check_listeners(load(values=values)))


# Listeners ----------------------------------------------------------------------------------------------------


async def test_an_address_that_nobody_has_is_free() -> None:
    (finding,) = await findings_for("127.0.0.1:0")
    assert finding == Finding("ok", "listener local 127.0.0.1:0", "is free")


async def test_an_address_of_another_machine_cannot_be_bound() -> None:
    values = {
        "upstream": [{"url": "smtp://127.0.0.1:1"}],
        "listener": [{"address": ["192.0.2.1:2525"], "allow": ["192.0.2.0/24"]}],
    }
    (finding,) = await listed(check_listeners(load(values=values)))
    assert finding.verdict == "failed"
    assert "cannot be bound: Cannot assign requested address" in finding.detail


@pytest.mark.parametrize(
    ("greeting", "verdict", "detail"),
    [
        (b"220 gw.example ESMTP otel_smtp\r\n", "ok", "a gateway answers: 220 gw.example ESMTP otel_smtp"),
        (b"220 mail.example ESMTP Postfix\r\n", "failed", "is taken by another server: 220 mail.example ESMTP Postfix"),
        (b"SSH-2.0-OpenSSH\x1b[2J\r\n", "failed", "is taken by something that is no SMTP server: SSH-2.0-OpenSSH?[2J"),
        (b"", "failed", "is taken by something that is no SMTP server: nothing"),
    ],
)
async def test_an_address_that_is_taken_is_asked_who_has_it(greeting: bytes, verdict: str, detail: str) -> None:
    with _Says(greeting) as server:
        (finding,) = await findings_for(f"127.0.0.1:{server.port}")
    assert (finding.verdict, finding.detail) == (verdict, detail)


@pytest.mark.parametrize(
    ("recipient_reply", "allows_us", "verdict", "detail"),
    [
        (b"250 2.1.5 Ok", False, "failed", "RELAYS FOR ANYBODY"),
        (b"250 2.1.5 Ok", True, "ok", "which is in allow"),
        (b"550 5.7.1 Relaying denied", False, "ok", "550 5.7.1 Relaying denied"),
    ],
)
async def test_a_gateway_that_others_reach_is_asked_to_relay_for_a_stranger(
    recipient_reply: bytes, allows_us: bool, verdict: str, detail: str
) -> None:
    own = own_address()
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 gw.example ESMTP otel_smtp\r\n")
        while line := await reader.readline():
            heard.append(line.split()[0])
            is_recipient = line.startswith(b"RCPT")
            writer.write((recipient_reply if is_recipient else b"250-gw\r\n250 Ok") + b"\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "0.0.0.0", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        allow = [f"{own}/32"] if allows_us else []
        values = {
            "upstream": [{"url": "smtp://127.0.0.1:1"}],
            "listener": [{"address": [f"0.0.0.0:{port}"], "allow": allow}],
        }
        who, relays = await listed(check_listeners(load(values=values)))
    assert who.verdict == "ok"
    assert relays.verdict == verdict
    assert own in relays.detail
    assert detail in relays.detail
    assert [verb for verb in heard if verb != b"QUIT"] == [b"EHLO", b"MAIL", b"RCPT"]


def own_address() -> str:
    """This machine's address that is not loopback; what is sent to it never leaves the machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has the loopback interface only")
        return str(probe.getsockname()[0])


async def test_a_path_that_is_no_socket_or_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (finding,) = await findings_for(f"unix:{tmp_path}/file")
    assert (finding.verdict, finding.detail) == ("failed", "is there, and is no socket")
    (finding,) = await findings_for(f"unix:{tmp_path}/nowhere/s")
    assert finding.verdict == "failed"
    assert "cannot be made" in finding.detail
    (finding,) = await findings_for(f"unix:{tmp_path}/s")
    assert finding.verdict == "ok"


@pytest.mark.parametrize(("is_asked_for", "verdict"), [(True, "failed"), (False, "warning")])
def test_a_status_port_that_is_taken(is_asked_for: bool, verdict: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Endpoint("127.0.0.1", taken.getsockname()[1])
        settings = load(values={"upstream": [{"url": "smtp://127.0.0.1:1"}], "status": {"address": str(address)}})
        if not is_asked_for:
            settings = msgspec.structs.replace(settings, origins={})
        finding = check_status(settings)
    assert finding is not None
    assert finding.verdict == verdict
    assert "is taken" in finding.detail
    assert check_status(msgspec.structs.replace(settings, status=Status(address=None))) is None


# The spool ----------------------------------------------------------------------------------------------------


def queue(directory: Path, **limits: object) -> Settings:
    return load(
        values={
            "upstream": [{"url": "smtp://127.0.0.1:9"}],
            "delivery": {"mode": "queue"},
            "spool": {"directory": str(directory)},
            "limits": limits,
        }
    )


async def test_a_spool_is_tried_without_being_touched(tmp_path: Path) -> None:
    assert check_spool(load(values={"upstream": [{"url": "smtp://127.0.0.1:9"}]})) is None
    finding = check_spool(queue(tmp_path / "deep" / "spool"))
    assert finding is not None
    assert (finding.verdict, finding.detail.startswith("can be had, ")) == ("ok", True)
    assert list(tmp_path.iterdir()) == []
    store = EmbeddedStore(tmp_path / "spool")
    await store.open()
    owned = check_spool(queue(tmp_path / "spool"))
    await store.close()
    assert owned == ("ok", f"spool {tmp_path}/spool", f"a gateway owns it: pid {os.getpid()}")
    again = check_spool(queue(tmp_path / "spool"))
    assert again is not None
    assert again.detail.startswith("can be had")


def test_a_spool_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    finding = check_spool(queue(tmp_path / "file" / "spool"))
    assert finding == ("failed", f"spool {tmp_path}/file/spool", f"{tmp_path}/file is no directory")


# Upstreams ----------------------------------------------------------------------------------------------------


async def test_an_upstream_is_connected_to_and_no_mail_is_begun() -> None:
    with CapturingUpstream() as upstream:
        settings = UpstreamSettings("provider", "127.0.0.1", upstream.port)
        finding = await check_upstream(settings, "gw.example")
        (connection,) = upstream.connections
        assert [line.split()[0] for line in connection.commands][:1] == [b"EHLO"]
        assert not any(line.startswith(b"MAIL") for line in connection.commands)
        assert finding.verdict == "ok"
        assert finding.detail.startswith(
            "answers; no TLS; offers PIPELINING, 8BITMIME, SMTPUTF8, CHUNKING, DSN, SIZE 50MiB"
        )
        assert finding.subject == f"upstream provider 127.0.0.1:{upstream.port}"


async def test_an_upstreams_tls_is_verified_and_told(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    with CapturingUpstream(tls=context) as upstream:
        settings = UpstreamSettings(
            "p", "127.0.0.1", upstream.port, tls=TlsMode.STARTTLS, ca_file=str(tmp_path / "ca.pem")
        )
        assert "TLS 1.3, verified" in (await check_upstream(settings, "gw.example")).detail
        unknown = replace(settings, ca_file=None)
        finding = await check_upstream(unknown, "gw.example")
        assert finding.verdict == "failed"
        assert finding.detail.endswith("after ehlo; name its authority by ca_file")
        finding = await check_upstream(replace(settings, server_name="other.example"), "gw.example")
        assert "IP address mismatch" in finding.detail or "Hostname mismatch" in finding.detail


async def test_an_upstream_without_tls_where_it_is_wanted() -> None:
    with CapturingUpstream() as upstream:
        settings = UpstreamSettings("p", "127.0.0.1", upstream.port, tls=TlsMode.STARTTLS)
        finding = await check_upstream(settings, "gw.example")
        assert (finding.verdict, finding.detail) == ("failed", "STARTTLS is not offered, after ehlo")
        finding = await check_upstream(replace(settings, tls=TlsMode.IMPLICIT), "gw.example")
        assert "is smtp+starttls:// meant?" in finding.detail


async def test_an_upstream_that_refuses_is_quoted() -> None:
    with _Says(b"554 5.7.1 not you\r\n") as server:
        finding = await check_upstream(UpstreamSettings("p", "127.0.0.1", server.port), "gw.example")
    assert finding.verdict == "failed"
    assert "554 5.7.1 not you, after greeting" in finding.detail


async def test_an_upstream_that_is_away() -> None:
    finding = await check_upstream(UpstreamSettings("p", "127.0.0.1", 1), "gw.example")
    assert finding == Finding(
        "failed", "upstream p 127.0.0.1:1", "no connection: Connection refused, before a connection"
    )
    finding = await check_upstream(
        UpstreamSettings("p", "127.0.0.1", 1, tls=TlsMode.IMPLICIT, ca_file="/nowhere"), "gw.example"
    )
    assert finding.detail == "its TLS files cannot be used: No such file or directory"


# Certificates -------------------------------------------------------------------------------------------------


def listener_with(tmp_path: Path, certificate: trustme.LeafCert) -> Listener:
    (tmp_path / "key.pem").write_bytes(certificate.private_key_pem.bytes())
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    return Listener(tls=TlsMode.STARTTLS, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem")


def test_a_good_certificate_tells_its_names_and_its_end(tmp_path: Path) -> None:
    finding = check_certificate(listener_with(tmp_path, trustme.CA().issue_cert("gw.example", "127.0.0.1")))
    assert finding.verdict == "ok"
    assert finding.detail.startswith("is for gw.example, 127.0.0.1, until ")


@pytest.mark.parametrize(
    ("days", "verdict", "detail"),
    [(3, "warning", "(2 days)"), (-1, "failed", "cannot be used: certificate has expired")],
)
def test_a_certificate_that_ends_is_told_in_time(tmp_path: Path, days: int, verdict: str, detail: str) -> None:
    ends = datetime.now(UTC) + timedelta(days=days)
    leaf = trustme.CA().issue_cert("gw.example", not_before=ends - timedelta(days=30), not_after=ends)
    finding = check_certificate(listener_with(tmp_path, leaf))
    assert finding.verdict == verdict
    assert detail in finding.detail


def test_a_certificate_that_does_not_fit_its_key(tmp_path: Path) -> None:
    ca = trustme.CA()
    listener = listener_with(tmp_path, ca.issue_cert("gw.example"))
    (tmp_path / "key.pem").write_bytes(ca.issue_cert("gw.example").private_key_pem.bytes())
    finding = check_certificate(listener)
    assert (finding.verdict, finding.detail) == ("failed", "cannot be used: KEY_VALUES_MISMATCH")
    (tmp_path / "key.pem").unlink()
    assert check_certificate(listener).detail == "cannot be read: No such file or directory"


# The collector ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/"}, ("http://c:4318/v1/traces", "http/protobuf")),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/x"}, ("http://c:4318/x", "http/protobuf")),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ("http://localhost:4318/v1/traces", "http/protobuf")),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, None),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, None),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317"},
            ("http://c:4317", "grpc"),
        ),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc", "OTEL_TRACES_EXPORTER": "otlp"},
            ("http://localhost:4317", "grpc"),
        ),
    ],
)
def test_where_traces_go(environ: dict[str, str], expected: tuple[str, str] | None) -> None:
    assert collector(environ) == expected


@pytest.mark.parametrize(
    ("protocol", "port_of", "verdict", "detail"),
    [
        ("http/protobuf", "http", "ok", "takes traces"),
        ("grpc", "grpc", "ok", "speaks HTTP/2, as gRPC does"),
        ("http/protobuf", "grpc", "failed", "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use the port for http/protobuf"),
        ("grpc", "http", "failed", "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or use the port for gRPC"),
    ],
)
async def test_a_collector_that_speaks_the_other_protocol_is_told(
    protocol: str, port_of: str, verdict: str, detail: str
) -> None:
    with OtlpReceiver() as receiver:
        endpoint = receiver.http_endpoint if port_of == "http" else receiver.grpc_endpoint
        endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
        finding = await check_collector(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
        )
        assert finding.verdict == verdict
        assert detail in finding.detail
        assert receiver.spans == []


async def test_a_collector_that_is_away_and_a_wrong_path() -> None:
    with OtlpReceiver(with_grpc=False) as receiver:
        finding = await check_collector({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{receiver.http_endpoint}/nowhere"})
        assert (finding.verdict, finding.detail) == ("failed", "there is nothing at /nowhere (404): is the path right?")
        receiver.refuse()
        finding = await check_collector({"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint})
        assert (finding.verdict, finding.detail) == ("failed", "cannot be reached: Connection refused")


async def test_without_a_collector_nothing_is_dialled() -> None:
    assert (await check_collector({})).detail == "none is set: traces are not exported"


class _Says:
    """A server that says one thing to whoever connects, and hangs up."""

    def __init__(self, line: bytes) -> None:
        self._line = line
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]

    def __enter__(self) -> "_Says":
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def _serve(self) -> None:
        connected, _ = self._socket.accept()
        with connected:
            connected.sendall(self._line)

    def __exit__(self, *exception: object) -> None:
        self._thread.join()
        self._socket.close()
