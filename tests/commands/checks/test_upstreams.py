"""Upstreams that answer, refuse, lack TLS or are away."""

import ssl
from dataclasses import replace
from pathlib import Path

import trustme

from otel_smtp.commands.checks.findings import Finding
from otel_smtp.commands.checks.upstreams import check_upstream
from otel_smtp.forwarding.settings import UpstreamSettings
from otel_smtp.smtp.states import TlsMode
from tests.commands.checks.talker import Talker
from tests.support.capture import CapturingUpstream


async def test_an_upstream_is_connected_to_and_no_mail_is_begun() -> None:
    with CapturingUpstream() as upstream:
        settings = UpstreamSettings("provider", "127.0.0.1", upstream.port)
        finding = await check_upstream(settings, "gw.example")
        (connection,) = upstream.connections
        assert [line.split()[0] for line in connection.commands][:1] == [b"EHLO"]
        assert not any(line.startswith(b"MAIL") for line in connection.commands)
        assert finding.verdict == "ok"
        assert finding.detail.startswith(
            "answers; no TLS; offers PIPELINING, SIZE 50MiB, 8BITMIME, SMTPUTF8, ENHANCEDSTATUSCODES, CHUNKING, "
            "BINARYMIME, DSN"
        )
        assert finding.subject == f"upstream provider 127.0.0.1:{upstream.port}"


async def test_an_upstreams_tls_is_verified_and_reported(tmp_path: Path) -> None:
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
        assert finding.detail.endswith("after ehlo; set ca_file to its authority")
        finding = await check_upstream(replace(settings, server_name="other.example"), "gw.example")
        assert "IP address mismatch" in finding.detail or "Hostname mismatch" in finding.detail


async def test_an_upstream_without_tls_where_it_is_wanted() -> None:
    with CapturingUpstream() as upstream:
        settings = UpstreamSettings("p", "127.0.0.1", upstream.port, tls=TlsMode.STARTTLS)
        finding = await check_upstream(settings, "gw.example")
        assert (finding.verdict, finding.detail) == ("failed", "STARTTLS is not offered, after ehlo")
        finding = await check_upstream(replace(settings, tls=TlsMode.IMPLICIT), "gw.example")
        assert "perhaps smtp+starttls:// is meant" in finding.detail


async def test_an_upstream_that_refuses_is_quoted() -> None:
    with Talker(b"554 5.7.1 not you\r\n") as server:
        finding = await check_upstream(UpstreamSettings("p", "127.0.0.1", server.port), "gw.example")
    assert finding.verdict == "failed"
    assert "554 5.7.1 not you, after greeting" in finding.detail


async def test_an_upstream_that_is_away() -> None:
    finding = await check_upstream(UpstreamSettings("p", "127.0.0.1", 1), "gw.example")
    assert finding == Finding("failed", "upstream p 127.0.0.1:1", "no connection: Connection refused")
    finding = await check_upstream(
        UpstreamSettings("p", "127.0.0.1", 1, tls=TlsMode.IMPLICIT, ca_file="/nowhere"), "gw.example"
    )
    assert finding.detail == "its TLS files cannot be used: ca_file /nowhere: No such file or directory"
