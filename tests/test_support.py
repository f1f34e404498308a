"""The parts that tests rely on: an oracle that sees nothing proves nothing."""

import contextlib
import itertools
import os
import signal
import smtplib
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support import ports, skipped
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript, scripted_reply
from tests.support.ports import unclaimed_port
from tests.support.process import ROOT, until
from tests.support.rotel import needs_libraries
from tests.support.tools import smtp_sink, swaks, tool


def test_the_upstream_keeps_content_to_the_octet() -> None:
    content = b"Subject: x\r\n\r\n.\r\n..a\r\n\x80\xff\r\n.b"
    with CapturingUpstream() as upstream, smtplib.SMTP("127.0.0.1", upstream.port) as client:
        client.sendmail("a@client.example", ["b@there.example"], content)
        client.sendmail("", ["c@there.example"], content)
        first, second = upstream.wait_for_messages(2)
    assert first.content == content + b"\r\n"
    assert first.addresses == "a@client.example > b@there.example"
    assert second.addresses == "> c@there.example"
    assert upstream.violations == []
    assert upstream.connections[0].is_over


def test_the_upstream_says_what_it_is_told() -> None:
    script = UpstreamScript(
        mail=(scripted_reply("451 4.4.1 Later"),),
        content=(scripted_reply("554 5.7.1 No"),),
        recipients={"gone@there.example": scripted_reply("550 5.1.1 Gone")},
        lacks=frozenset({"DSN"}),
        size=1000,
    )
    with CapturingUpstream(script) as upstream, smtplib.SMTP("127.0.0.1", upstream.port) as client:
        assert client.ehlo()[0] == 250
        assert client.esmtp_features["size"] == "1000"
        assert not client.has_extn("dsn")
        assert client.mail("a@client.example")[0] == 451
        assert client.mail("a@client.example")[0] == 250
        assert client.rcpt("gone@there.example")[0] == 550
        assert client.rcpt("b@there.example")[0] == 250
        assert client.data(b"x")[0] == 554
        assert not upstream.messages[0].is_taken


@pytest.mark.parametrize(
    "said",
    [
        b"DATA\r\na\nb\r\n.\r\n",
        b"DATA\r\na\rb\r\n.\r\n",
        b"DATA\r\na\0b\r\n.\r\n",
        b"DATA\r\n.a\r\n.\r\n",
        b"BDAT 3 LAST\r\na\nb",
        b"MAIL FROM:<again@client.example>\r\n",
        b"FROBNICATE\r\n",
        b"NOOP \x7f\r\n",
    ],
)
def test_the_upstream_notes_what_the_gateway_must_not_do(said: bytes) -> None:
    with CapturingUpstream() as upstream, socket.create_connection(("127.0.0.1", upstream.port), 10) as client:
        client.sendall(b"EHLO x\r\nMAIL FROM:<a@client.example>\r\nRCPT TO:<b@there.example>\r\n" + said + b"QUIT\r\n")
        while client.recv(4096):
            pass
    assert len(upstream.violations) == 1


def test_the_upstream_waits_where_it_is_held() -> None:
    with CapturingUpstream() as upstream, smtplib.SMTP("127.0.0.1", upstream.port) as client:
        held = upstream.hold("RCPT")
        client.putcmd("EHLO x")
        client.getreply()
        client.putcmd("MAIL FROM:<a@client.example>")
        client.getreply()
        client.putcmd("RCPT TO:<b@there.example>")
        assert held.reached.wait(10)
        held.release()
        assert client.getreply()[0] == 250


def test_postfix_s_sink_shows_what_it_got(tmp_path: Path) -> None:
    with smtp_sink(tmp_path) as sink:
        sent = swaks(sink.port, "--from", "a@client.example", "--to", "b@there.example", body=b"Subject: x\n\n.dot\n")
        assert sent.returncode == 0, sent.stdout
        (content,) = until(lambda: sink.contents() or None, "a dump")
    assert content.startswith(b"Subject: x\n\n.dot\n")


def test_a_missing_program_is_a_skip_on_a_desk_and_a_failure_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.tools.shutil.which", lambda *_, **__: None)
    monkeypatch.setenv("CI", "")
    with pytest.raises(pytest.skip.Exception, match="Debian package postfix"):
        tool("smtp-sink")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="Debian package postfix"):
        tool("smtp-sink")


def test_a_program_without_its_library_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "")
    program = tmp_path / "agent"
    program.write_text(
        "#!/bin/sh\n"
        "echo 'agent: error while loading shared libraries: libpython3.11.so.1.0: cannot open shared object file' >&2\n"
        "exit 127\n"
    )
    program.chmod(0o755)
    with pytest.raises(
        pytest.skip.Exception, match=r"agent needs libpython3\.11\.so.*\(Debian package libpython3\.11\)"
    ):
        needs_libraries(program)
    program.write_text("#!/bin/sh\n")
    needs_libraries(program)


def test_what_was_skipped_is_told_with_the_packages_that_bring_it() -> None:
    swaks, curl, mount = (
        "swaks is not installed (Debian package swaks)",
        "no curl (Debian packages curl npm)",
        "no mounts",
    )
    assert skipped.lines([f"Skipped: {swaks}", curl, f"Skipped: {swaks}", mount]) == [
        f"    2 skipped: {swaks}",
        f"    1 skipped: {curl}",
        f"    1 skipped: {mount}",
        "to run them too: apt-get install curl npm swaks",
    ]
    assert skipped.lines([mount]) == ["    1 skipped: no mounts"]
    assert skipped.lines([]) == []


def test_a_run_ends_with_what_was_skipped() -> None:
    one = f"{Path(__file__).relative_to(Path.cwd())}::test_postfix_s_sink_shows_what_it_got"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", one],
        env={**os.environ, "PATH": "", "CI": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    *_, reason, remedy, _ = done.stdout.splitlines()
    assert "1 skipped:" in reason
    assert remedy.startswith("to run them too: apt-get install ")


def test_until_gives_up() -> None:
    with pytest.raises(TimeoutError, match="what never comes"):
        until(lambda: None, "what never comes", timeout_seconds=0.01)


def test_no_socket_that_asks_for_any_port_gets_one_that_a_program_was_told() -> None:
    told = [unclaimed_port() for _ in range(200)]
    first_of_the_kernel = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(told)) == 200
    assert max(told) < first_of_the_kernel


def test_a_port_where_somebody_listens_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = unclaimed_port(), unclaimed_port()
    monkeypatch.setattr(ports, "_ports", iter([first, second]))
    with socket.create_server(("127.0.0.1", first)):
        assert unclaimed_port() == second


def test_no_two_runs_of_tests_are_told_the_same_port() -> None:
    with contextlib.ExitStack() as until_both_end:

        def ports_of_a_run() -> list[int]:
            claims: list[socket.socket] = []
            told = list(itertools.islice(ports._claimed(claims), 150))  # all runs of one process begin at one place
            for claim in claims:
                until_both_end.enter_context(claim)
            return told

        assert set(ports_of_a_run()).isdisjoint(ports_of_a_run())


STARTS_A_GROUP: Final = """
import signal, subprocess, time
from tests.support.process import outliving_nobody

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its jobs in the background ignore it
process = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, start_new_session=True)
with outliving_nobody(process):
    print(process.pid, process.stdout.readline().decode(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_no_process_of_ours_outlives_us_however_we_end(number: signal.Signals) -> None:
    command = [sys.executable, "-c", STARTS_A_GROUP]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        group = [int(one) for one in process.stdout.readline().split()]
        assert len(group) == 2
        assert all(map(_lives, group))
        process.send_signal(number)
    until(lambda: None if any(map(_lives, group)) else True, "all have ended", timeout_seconds=30)


def _lives(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
