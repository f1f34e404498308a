"""Listeners and the status port: free, taken by us or by another server, exposed."""

import asyncio
import http.server
import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from otel_smtp.commands.checks.findings import Finding
from otel_smtp.commands.checks.listeners import check_listeners, check_status
from otel_smtp.config import StatusTable, load
from otel_smtp.observing import Endpoint
from tests.commands.checks.talker import Talker


async def listed(findings: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in findings]


async def findings_for(address: str) -> list[Finding]:
    values = {"upstream": [{"url": "smtp://127.0.0.1:1"}], "listener": [{"address": [address]}]}
    return await listed(check_listeners(load(values=values)))


async def test_an_address_that_is_free() -> None:
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
        (
            b"SSH-2.0-OpenSSH\x1b[2J\r\n",
            "failed",
            "is taken by something other than an SMTP server: SSH-2.0-OpenSSH\ufffd[2J",
        ),
        (b"", "failed", "is taken by something other than an SMTP server: nothing"),
    ],
)
async def test_the_owner_of_a_taken_address_is_named(greeting: bytes, verdict: str, detail: str) -> None:
    with Talker(greeting) as server:
        (finding,) = await findings_for(f"127.0.0.1:{server.port}")
    assert (finding.verdict, finding.detail) == (verdict, detail)


@pytest.mark.parametrize(
    ("recipient_reply", "allows_us", "verdict", "detail"),
    [
        (b"250 2.1.5 Ok", False, "failed", "OPEN RELAY"),
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
    assert (finding.verdict, finding.detail) == ("failed", "exists and is not a socket")
    (finding,) = await findings_for(f"unix:{tmp_path}/nowhere/s")
    assert finding.verdict == "failed"
    assert "cannot be created" in finding.detail
    (finding,) = await findings_for(f"unix:{tmp_path}/s")
    assert finding.verdict == "ok"


async def test_a_path_where_this_user_may_not_even_look(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        (finding,) = await findings_for(f"unix:{tmp_path}/locked/s")
    finally:
        os.seteuid(user)
    assert (finding.verdict, finding.detail) == ("failed", "cannot be created: Permission denied")


@pytest.mark.parametrize(
    ("answer", "verdict", "words"),
    [
        (b'{"status":"alive","uptime_seconds":61.7}', "ok", "a gateway answers, up for 62 s"),
        (b"<html>It works!</html>", "failed", "is taken, and not by a gateway that answers"),
        (b"[]", "failed", "is taken, and not by a gateway that answers"),
    ],
)
def test_who_answers_at_the_status_port(answer: bytes, verdict: str, words: str) -> None:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/livez" else 404)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            status = {"address": f"127.0.0.1:{server.server_port}"}
            finding = check_status(load(values={"upstream": [{"url": "smtp://127.0.0.1:1"}], "status": status}))
        finally:
            server.shutdown()
            thread.join()
    assert finding == Finding(verdict, f"status {status['address']}", words)  # type: ignore[arg-type]  # a literal


@pytest.mark.parametrize(("is_asked_for", "verdict"), [(True, "failed"), (False, "warning")])
def test_a_status_port_that_is_taken(is_asked_for: bool, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otel_smtp.commands.checks.listeners._STATUS_SECONDS", 0.01)  # nobody accepts, so none answers
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = Endpoint("127.0.0.1", taken.getsockname()[1])
        settings = load(values={"upstream": [{"url": "smtp://127.0.0.1:1"}], "status": {"address": str(address)}})
        if not is_asked_for:
            settings = msgspec.structs.replace(settings, origins={})
        finding = check_status(settings)
    assert finding is not None
    assert finding.verdict == verdict
    assert "is taken" in finding.detail
    assert check_status(msgspec.structs.replace(settings, status=StatusTable(address=None))) is None
