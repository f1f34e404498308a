"""What the demonstration says to its user: command lines that run on that very machine."""

import subprocess
import sys
from pathlib import Path

import pytest

from otel_smtp.commands.demo.show import called_as, invitations
from otel_smtp.observing import Endpoint
from tests.support.capture import CapturingUpstream
from tests.support.tools import tool

ADDRESS = Endpoint("127.0.0.1", 2525)


def program(directory: Path, name: str) -> Path:
    """An executable file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_swaks_and_curl_are_named_only_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert invitations("x/otel-smtp", ADDRESS) == [
        "x/otel-smtp send --to you@example.net 127.0.0.1:2525",
        "x/otel-smtp send --to refused@example.com 127.0.0.1:2525",
    ]
    program(tmp_path, "swaks")
    program(tmp_path, "curl")
    own, swaks, curl = invitations("x/otel-smtp", ADDRESS)
    assert own.startswith("x/otel-smtp send ")
    assert swaks.startswith("swaks --server 127.0.0.1:2525 ")
    assert "| curl smtp://127.0.0.1:2525 " in curl


def test_the_program_is_named_as_it_was_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    installed = program(tmp_path / "bin", "otel-smtp")
    program(tmp_path / ".venv" / "bin", "otel-smtp")
    program(tmp_path / "my tools", "otel-smtp")
    monkeypatch.setenv("PATH", str(installed.parent))
    for called, told in [
        (".venv/bin/otel-smtp", ".venv/bin/otel-smtp"),
        (str(installed), "otel-smtp"),  # what the shell makes of a name that it finds
        ("my tools/otel-smtp", "'my tools/otel-smtp'"),
        ("gone/otel-smtp", "gone/otel-smtp"),
    ]:
        monkeypatch.setattr(sys, "argv", [called, "demo"])
        assert called_as() == told
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [str(installed), "demo"])
    assert called_as() == str(installed)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "otel_smtp" / "__main__.py"), "demo"])
    assert called_as() == f"{sys.executable} -m otel_smtp"


@pytest.mark.parametrize("name", ["otel-smtp", "swaks", "curl"])
def test_each_command_line_sends_a_mail(name: str) -> None:
    if name != "otel-smtp":
        tool(name)
    with CapturingUpstream() as upstream:
        lines = invitations(f"{sys.executable} -m otel_smtp", Endpoint("127.0.0.1", upstream.port))
        (line, *_) = [line for line in lines if (name if name != "otel-smtp" else "otel_smtp") in line]
        done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (message,) = upstream.wait_for_messages(1)
    assert b"Subject: " in message.content
    assert upstream.violations == []
