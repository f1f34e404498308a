"""Readiness of the process: an upstream that is away is known without any mail, and so is its return."""

import contextlib
import json
import smtplib
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from tests.end_to_end.conftest import StartGateway
from tests.support.capture import CapturingUpstream
from tests.support.ports import unclaimed_port
from tests.support.process import STOP_SECONDS, USES_UVLOOP, environment, outliving_nobody, until


def readiness(port: int) -> tuple[int, dict[str, str]]:
    """The status of /readyz, and its reasons."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            return answer.status, json.loads(answer.read())["reasons"]
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, json.loads(refusal.read())["reasons"]


def test_an_upstream_that_is_away_makes_the_gateway_unready(start: StartGateway) -> None:
    status = unclaimed_port()
    start({"upstream.url": f"smtp://127.0.0.1:{unclaimed_port()}", "status.address": f"127.0.0.1:{status}"})
    until(lambda: readiness(status)[0] == 503 or None, "it is known")
    assert readiness(status)[1] == {"upstream": "no upstream can be reached"}


def test_an_upstream_that_is_there_is_not_bothered_with_mail(start: StartGateway, upstream: CapturingUpstream) -> None:
    status = unclaimed_port()
    start({"upstream.url": upstream.url, "status.address": f"127.0.0.1:{status}"})
    assert readiness(status) == (200, {})
    until(lambda: any(connection.commands for connection in upstream.connections) or None, "it was looked at")
    assert readiness(status) == (200, {})
    assert [command.split()[0] for command in upstream.connections[0].commands] == [b"EHLO"]


def test_standard_streams_that_are_full_or_closed_stop_no_mail(upstream: CapturingUpstream, tmp_path: Path) -> None:
    port = unclaimed_port()
    gateway = [sys.executable, "-m", "otel_smtp.commands.cli", "serve", "-l", f"127.0.0.1:{port}", "-u", upstream.url]
    process = subprocess.Popen(
        ["sh", "-c", 'exec "$0" "$@" <&- >/dev/full 2>&-', *gateway, "--status", "off"],
        env=environment({}, tmp_path, uses_uvloop=USES_UVLOOP),
        start_new_session=True,
    )

    def greeted() -> smtplib.SMTP | None:
        assert process.poll() is None
        with contextlib.suppress(OSError):
            return smtplib.SMTP("127.0.0.1", port)
        return None

    with outliving_nobody(process):
        with until(greeted, "it serves") as client:
            for _ in range(3):
                client.sendmail("a@client.example", ["b@there.example"], b"Subject: x\r\n\r\nHello\r\n")
        process.terminate()
        assert process.wait(STOP_SECONDS) == 0
    assert len(upstream.messages) == 3
