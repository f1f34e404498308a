"""`otel-smtp tail` as a process, following a gateway that runs."""

import json
import os
import re
import signal
import smtplib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from otel_smtp.smtp.replies import EnhancedStatus, Reply
from tests.commands.test_cli import environment, run
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript
from tests.support.ports import unclaimed_port
from tests.support.process import GatewayProcess, gateway, until

MAIL = "Subject: x\r\n\r\nHello\r\n"
NO_USER = Reply(550, EnhancedStatus(5, 1, 1), ("No such user here",))


@pytest.fixture
def upstream() -> Iterator[CapturingUpstream]:
    with CapturingUpstream() as upstream:
        upstream.say(UpstreamScript(recipients={"ann@example.org": NO_USER}))
        yield upstream


@contextmanager
def followed(upstream: CapturingUpstream, directory: Path) -> Iterator[GatewayProcess]:
    settings = {"upstream.url": upstream.url, "upstream.name": "up", "status.address": f"127.0.0.1:{unclaimed_port()}"}
    with gateway(settings, directory) as running:
        yield running


@contextmanager
def tailing(directory: Path, *arguments: str, **environ: str) -> Iterator[Path]:
    """A tail, and where it prints."""
    output = directory / "tail.out"
    command = [sys.executable, "-m", "otel_smtp", "tail", "--config", str(directory / "settings.toml"), *arguments]
    with output.open("wb") as stdout:
        process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.STDOUT, env=environment(**environ))
    try:
        yield output
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(30) == 0, output.read_text()
        finally:
            process.kill()
            process.wait()


def send(running: GatewayProcess, *to: str) -> None:
    """A mail to some."""
    with smtplib.SMTP("127.0.0.1", running.port) as client:
        client.sendmail("app@shop.example", to, MAIL)


def printed(running: GatewayProcess, output: Path, *to: str) -> str:
    """What is printed once it follows: mails are sent until one is told."""

    def sent() -> str | None:
        send(running, *to)
        return output.read_text() or None

    return until(sent, "a line", timeout_seconds=30)


def end(running: GatewayProcess, process: "subprocess.Popen[Any]") -> int:
    """The exit status of a tail that ends by what is sent."""

    def sent() -> int | None:
        send(running, "bob@example.net")
        return process.poll()

    return until(sent, "the end of the tail", timeout_seconds=30)


def test_it_prints_a_line_a_mail(upstream: CapturingUpstream, tmp_path: Path) -> None:
    with followed(upstream, tmp_path) as running, tailing(tmp_path) as output:
        printed(running, output, "bob@example.net")
        send(running, "bob@example.net", "ann@example.org")
        text = until(lambda: text if " % " in (text := output.read_text()) else None, "the other mail")
    lines = text.splitlines()
    assert all(len(line) <= 120 for line in lines)
    assert re.fullmatch(
        r"[\d:.]{12} \+ 250 shop\.example -> example\.net  up  [\d.]+s  .*Ok: queued as CAPTURE  [0-9a-f]{8}", lines[0]
    ), lines[0]
    assert any(" x 550 shop.example -> example.org  refused  up  5.1.1 No such user here" in line for line in lines)


def test_it_prints_what_is_asked_for_as_json(upstream: CapturingUpstream, tmp_path: Path) -> None:
    wanted = ("--to", "example.org", "--from", "shop.example", "--code", "550", "--text", "no such user")
    outcomes = ("--outcome", "refused", "--outcome", "partly_relayed")
    with followed(upstream, tmp_path) as running, tailing(tmp_path, *wanted, *outcomes, "--json") as output:
        send(running, "bob@example.net")
        text = printed(running, output, "bob@example.net", "ann@example.org")
    for line in map(json.loads, text.splitlines()):
        assert line["smtp.outcome" if "smtp.outcome" in line else "smtp.recipient.fate"] in (
            "refused",
            "partly_relayed",
        )
        assert line["timestamp"].endswith("Z")
        assert len(line["trace_id"]) == 32


def test_it_ends_after_as_many_lines_as_were_asked_for(upstream: CapturingUpstream, tmp_path: Path) -> None:
    with followed(upstream, tmp_path) as running:
        command = [sys.executable, "-m", "otel_smtp", "tail", "--config", str(tmp_path / "settings.toml"), "-n", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())
        assert end(running, process) == 0
        assert process.communicate()[0].count("\n") == 1


@pytest.mark.long
def test_it_waits_for_a_gateway_that_went_away(upstream: CapturingUpstream, tmp_path: Path) -> None:
    with followed(upstream, tmp_path) as running, tailing(tmp_path) as output:
        printed(running, output, "bob@example.net")
        running.stop()
        until(lambda: "; waiting for it" in output.read_text() or None, "it noticed")
        settings = (tmp_path / "settings.toml").read_text()
        status = re.search(r'^address = "(127\.0\.0\.1:\d+)"', settings, re.MULTILINE)
        assert status is not None
        again = {"upstream.url": upstream.url, "upstream.name": "up", "status.address": status[1]}
        with gateway(again, tmp_path):
            until(lambda: "it is back" in output.read_text() or None, "it noticed")


def test_colours_are_for_terminals_and_those_who_want_them(upstream: CapturingUpstream, tmp_path: Path) -> None:
    with followed(upstream, tmp_path) as running:
        for no_color in ("", "1"):
            ours, its = os.openpty()
            command = [
                sys.executable,
                "-m",
                "otel_smtp",
                "tail",
                "--config",
                str(tmp_path / "settings.toml"),
                "-n",
                "1",
            ]
            environ = environment(NO_COLOR=no_color, TERM="xterm")
            process = subprocess.Popen(command, stdout=its, stderr=subprocess.DEVNULL, env=environ)
            assert end(running, process) == 0
            printed_there = os.read(ours, 4096)
            assert b"+ 250" in printed_there
            assert (b"\x1b[32m" in printed_there) is (not no_color)
            os.close(ours)
            os.close(its)


def test_nobody_to_follow() -> None:
    port = unclaimed_port()
    told = run("tail", "--url", f"http://127.0.0.1:{port}")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == f"otel-smtp: tail: no gateway answers at http://127.0.0.1:{port}: connection refused\n"


def test_what_answers_and_is_no_gateway_controls_no_terminal() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def greet() -> None:
            with server.accept()[0] as peer:
                peer.sendall(b"220 \x1b[31mmail\r\n")
                peer.recv(4096)

        greeting = threading.Thread(target=greet)
        greeting.start()
        told = run("tail", "--url", f"http://127.0.0.1:{port}")
        greeting.join()
    assert told.returncode == 1
    assert told.stderr == f"otel-smtp: tail: no gateway answers at http://127.0.0.1:{port}: 220 [31mmail\n"


def test_a_reader_that_goes_away_ends_it(upstream: CapturingUpstream, tmp_path: Path) -> None:
    with followed(upstream, tmp_path) as running:
        reading, writing = os.pipe()
        command = [sys.executable, "-m", "otel_smtp", "tail", "--config", str(tmp_path / "settings.toml")]
        process = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, env=environment())
        os.close(writing)
        os.close(reading)
        assert end(running, process) == 0
        assert process.communicate()[1] == b""
