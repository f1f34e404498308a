"""The commands as processes: what they print where, and their exit status."""

import json
import os
import re
import signal
import smtplib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from otel_smtp import __version__
from otel_smtp.commands.cli import cli
from otel_smtp.server.users import load_users
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver
from tests.support.process import ROOT, gateway, until

Result = subprocess.CompletedProcess[str]


def environment(**more: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL", "PYTHONPATH", "COLUMNS"))}
    return {**own, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", **more}


def run(*arguments: str, stdin: str = "", **environ: str) -> Result:
    return subprocess.run(
        [sys.executable, "-m", "otel_smtp", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
        env=environment(**{"PYTHONIOENCODING": "utf-8", **environ}),
    )


# Wrong use ----------------------------------------------------------------------------------------------------


def test_the_version_and_the_commands() -> None:
    assert run("--version").stdout == f"otel-smtp {__version__}\n"
    told = run("--help", COLUMNS="100")
    assert told.returncode == 0
    for command in ("serve", "demo", "check", "send", "passwd", "bench"):
        assert re.search(rf"^  {command} +[A-Z]", told.stdout, re.MULTILINE), command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serv"], "No such command 'serv'"),
        (["serve", "--nonsense"], "No such option"),
        (["send"], "Missing option '--to'"),
        (["serve"], "settings: upstream: none is set"),
        (["serve", "--config", "/nonexistent.toml"], "/nonexistent.toml: cannot be read: No such file or directory"),
        (["check", "--set", "limits.recipients"], '--set = "limits.recipients": allowed: key=value'),
        (["check", "-u", "smtp://h", "-s", "limits.recipient=1"], "unknown key; did you mean recipients?"),
        (["serve", "-u", "smtp://h", "--status", "here"], '--status: status.address = "here": allowed'),
        (["serve", "-u", "smtp://h", "--workers", "0"], "--workers: workers = \"0\": allowed: a whole number"),
        (["serve", "-u", "smtp://h", "--log-level", "loud"], '--log-level: log.level = "loud": allowed: debug'),
        (["serve", "-u", "smtp://h", "-l", "0.0.0.0:2525"], "say who may relay"),
        (["send", "-t", "a@b.example", "lmtp://h"], 'GATEWAY = "lmtp://h": allowed: smtp://host:port'),
        (["send", "-t", "a@b.example", "--size", "big"], '--size = "big": allowed: octets'),
        (["send", "-t", "a@b.example", "--file", "/nonexistent"], "--file: cannot read /nonexistent: no such file"),
        (["tail", "--code", "99x"], '--code = "99x": allowed: a reply code as 550'),
        (["tail", "--url", "http://[::1"], '--url = "http://[::1": allowed: http://host:port'),
        (["tail", "--url", "http://127.0.0.1:http"], '--url = "http://127.0.0.1:http": allowed'),
        (["passwd", "a:b"], "a user name holds no colon"),
        (["bench", "--to", "you\r\nRSET"], '--to = "you'),
        (["bench", "--from", "you"], '--from = "you": allowed: an address'),
        (["bench", "--rate", "nan"], "--rate: nan is no number of messages per second"),
        (["demo", "--slow", "soon"], '--slow = "soon": allowed: seconds'),
        (["demo", "--once", "-l", "nowhere"], '--listen: listener.0.address = ["nowhere"]: allowed: a list'),
        (["demo", "--once", "-s", "limits.hops=x"], '--set limits.hops: limits.hops = "x"'),
    ],
)  # fmt: skip
def test_wrong_use_is_exit_status_2_with_a_reason_on_stderr(arguments: list[str], expected: str) -> None:
    result = run(*arguments, stdin="password\n", COLUMNS="200")
    assert result.returncode == 2
    assert expected in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_an_output_that_cannot_be_written_is_said() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "otel_smtp", "settings"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    assert (result.returncode, result.stderr) == (1, "otel-smtp: cannot write the output: no space left on device\n")


@pytest.mark.parametrize("more", [[], ["--connect"]])
def test_a_check_refuses_otel_variables_that_cannot_be_used(more: list[str]) -> None:
    result = run(
        *("check", "-u", "smtp://127.0.0.1:1", "-l", "127.0.0.1:0", *more),
        OTEL_TRACES_EXPORTER="zipkin",
        OTEL_BSP_SCHEDULE_DELAY="soon",
    )
    assert result.returncode == 2
    assert "OTEL_TRACES_EXPORTER='zipkin': allowed is none, console, otlp" in result.stderr
    assert "OTEL_BSP_SCHEDULE_DELAY='soon': allowed is a number above 0" in result.stderr


def test_a_command_imports_no_other_command() -> None:
    code = (
        "import sys, click; from otel_smtp.commands.cli import cli; "
        "cli.get_command(click.Context(cli), 'serve'); "
        "print(*sorted(name for name in sys.modules if name.startswith('otel_smtp.commands.')))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert result.stdout.split() == [f"otel_smtp.commands.{module}" for module in ("cli", "options", "serve")]


def test_settings_in_front_of_a_command_hold_for_it() -> None:
    result = run("--set", "limits.hops=4", "queue", "list")
    assert result.returncode == 2
    assert "no spool; give --spool" in result.stderr
    result = run("--set", "limits.hop=4", "queue", "list")
    assert "unknown key; did you mean hops?" in result.stderr


# What all commands take -----------------------------------------------------------------------------------------


def commands(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


def test_the_global_options_stand_in_front_of_a_command_and_behind_it() -> None:
    wanted = {"--config", "-c", "--set", "-s", "--json", "--version"}
    for path, command in [((), cli), *commands(cli)]:
        assert not wanted - {option for parameter in command.params for option in parameter.opts}, path
        for option, told in (("--version", f"otel-smtp {__version__}"), ("--help", "Usage: ")):
            ran = CliRunner().invoke(cli, [*path, option])
            assert (ran.exit_code, ran.stdout.startswith(told)) == (0, True), path


def test_json_is_printed_wherever_it_was_asked_for() -> None:
    def told(*arguments: str) -> Any:
        ran = CliRunner().invoke(cli, arguments, input="secret\n")
        assert ran.exit_code == 0, ran.output
        return json.loads(ran.stdout)

    for arguments in (["check", "-u", "smtp://127.0.0.1:1"], ["settings"], ["telemetry"]):
        assert told("--json", *arguments) == told(*arguments, "--json")
    [hops] = [setting for setting in told("settings", "--json") if setting["key"] == "limits.hops"]
    assert (hops["default"], hops["holds_after"]) == ("`100`", "reload")
    names = [metric["name"] for metric in told("telemetry", "--json")["metrics"]]
    assert "smtp.server.transactions" in names
    user = told("--json", "passwd", "ann")
    assert (user["name"], user["line"].partition(":")[0]) == ("ann", "ann")


def test_settings_behind_a_command_come_after_those_in_front(tmp_path: Path) -> None:
    for name, hops in (("front", 5), ("behind", 6)):
        (tmp_path / name).write_text(f'[limits]\nhops = {hops}\nrecipients = 7\n[[upstream]]\nurl = "smtp://h"\n')
    arguments = ["-c", str(tmp_path / "front"), "-s", "limits.recipients=8", "--json", "check"]
    arguments += ["-c", str(tmp_path / "behind"), "-s", "limits.recipients=9"]
    rows = json.loads(CliRunner().invoke(cli, arguments).stdout)["settings"]
    values = {row["key"]: row["value"] for row in rows}
    assert (values["limits.hops"], values["limits.recipients"]) == ("6", "9")


# serve --------------------------------------------------------------------------------------------------------


def test_serve_is_ready_in_json_too() -> None:
    command = [sys.executable, "-m", "otel_smtp", "serve", "-u", "smtp://127.0.0.1:1", "-l", "127.0.0.1:0", "--json"]
    with subprocess.Popen(
        [*command, "--status", "off"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert ready["listeners"]["local"][0].startswith("127.0.0.1:")
    assert (ready["event"], ready["upstreams"], ready["status"]) == (
        "ready", {"127.0.0.1:1": "smtp://127.0.0.1:1"}, None,
    )  # fmt: skip
    assert [json.loads(line)["event"] for line in log.splitlines()][-1] == "draining"


def test_serve_says_one_line_relays_and_drains(tmp_path: Path) -> None:
    with CapturingUpstream() as upstream:
        settings = {"upstream.url": upstream.url, "upstream.name": "provider", "status.address": "127.0.0.1:0"}
        with gateway(settings, tmp_path) as running:
            pattern = (
                r"otel-smtp ready: smtp 127\.0\.0\.1:[1-9]\d* -> provider smtp://127\.0\.0\.1:\d+; "
                r"status http://127\.0\.0\.1:[1-9]\d*; traces -> nowhere \(no OTLP endpoint set\)"
            )
            assert re.fullmatch(pattern, running.ready_line)
            with smtplib.SMTP("127.0.0.1", running.port, timeout=20) as client:
                client.sendmail("a@example.org", ["b@example.net"], b"Subject: x\r\n\r\nHello\r\n")
            assert upstream.wait_for_messages(1)
            assert running.stop() == 0


def test_serve_that_cannot_bind_is_exit_status_1() -> None:
    with CapturingUpstream() as taken:
        result = run("serve", "-u", "smtp://127.0.0.1:1", "-l", f"127.0.0.1:{taken.port}")
    assert result.returncode == 1
    *_, line = result.stderr.splitlines()  # it has looked for its upstream before
    told = f"cannot start: listener.0.address (-l): cannot listen at 127.0.0.1:{taken.port}: address already in use"
    assert json.loads(line)["event"] == told.replace("(-l)", "(--listen)")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_on_a_taken_status_port_names_the_setting(workers: str) -> None:
    with CapturingUpstream() as taken:
        settings = ["--set", f"status.address=127.0.0.1:{taken.port}", "--workers", workers]
        result = run("serve", "-u", "smtp://127.0.0.1:1", "-l", "127.0.0.1:0", *settings)
    assert result.returncode == 1
    assert f"status.address (--set status.address): cannot listen at 127.0.0.1:{taken.port}: " in result.stderr


def test_serve_on_a_socket_in_a_directory_that_is_not_there_names_both() -> None:
    result = run(
        "serve", "-u", "smtp://127.0.0.1:1", "-l", "unix:/nowhere/s", "--status", "off", OTELSMTP_LOG__FORMAT="text"
    )
    assert result.returncode == 1
    assert "listener.0.address (--listen): cannot listen at /nowhere/s: no such directory: /nowhere" in result.stderr
    assert not result.stderr.startswith("{"), "start failures come in the format that was asked for"


def test_flags_stand_over_the_environment_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "gw.toml").write_text('workers = 2\n[limits]\nerrors = 2\nhops = 2\n[[upstream]]\nurl = "smtp://a"\n')
    result = run(
        "--set", "limits.hops=4", "check", "--config", str(tmp_path / "gw.toml"), "--set", "workers=1",
        OTELSMTP_LIMITS__ERRORS="3", OTELSMTP_LIMITS__HOPS="3", OTELSMTP_UPSTREAM="smtp://b", COLUMNS="160",
    )  # fmt: skip
    assert result.returncode == 0
    rows = {tuple(re.split(r" {2,}", line.strip())) for line in result.stdout.splitlines()}
    assert ("workers", "1", "--set workers") in rows
    assert ("limits.errors", "3", "environment OTELSMTP_LIMITS__ERRORS") in rows
    assert ("limits.hops", "4", "--set limits.hops") in rows
    assert ("upstream.0.url", "smtp://b:25", "environment OTELSMTP_UPSTREAM") in rows


@pytest.mark.parametrize(("encoding", "address", "shown"), [("ascii", "bü@x.example", "b?@"), ("latin-1", "b@x", "b@")])
def test_a_terminal_without_unicode_gets_plain_marks(encoding: str, address: str, shown: str) -> None:
    with CapturingUpstream() as upstream:
        sent = run("send", upstream.url, "--to", address, PYTHONIOENCODING=encoding)
    assert sent.returncode == 0, sent.stderr
    assert f"-> rcpt to:<{shown}" in sent.stdout.lower()  # in what case, depends on the version of smtplib
    checked = run("check", "--connect", "-u", "smtp://127.0.0.1:1", "-l", "127.0.0.1:0", PYTHONIOENCODING=encoding)
    assert checked.returncode == 1
    assert "+ listener local 127.0.0.1:0  is free" in checked.stdout
    assert "x upstream 127.0.0.1:1  no connection" in checked.stdout


def test_an_interrupt_while_the_commands_are_imported_is_no_traceback() -> None:
    code = """
import sys

class Interrupted:
    def find_spec(self, name, *more):
        if name == "otel_smtp.commands.cli":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
from otel_smtp.__main__ import main
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (1, "", "")


# check --------------------------------------------------------------------------------------------------------


def test_check_shows_the_plan_and_no_secret() -> None:
    result = run(
        "check", "--all", "-u", "smtps://mail.example.com", "-s", "upstream.0.username=relay",
        OTELSMTP_UPSTREAM__0__PASSWORD="hunter2", COLUMNS="160",
    )  # fmt: skip
    assert result.returncode == 0
    assert result.stderr == ""
    assert "relay (auto)" in result.stdout
    assert "timeouts.session" in result.stdout
    assert "hunter2" not in result.stdout
    assert "\x1b" not in result.stdout


def test_check_connect_prints_each_finding_and_fails_with_them() -> None:
    with CapturingUpstream() as upstream, OtlpReceiver(with_grpc=False) as receiver:
        arguments = ["check", "--connect", "-l", "127.0.0.1:0", "-s", "status.address=off", "-u", upstream.url]
        result = run(*arguments, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint)
        assert result.returncode == 0
        findings = [line for line in result.stdout.splitlines() if line.startswith(("✓", "✗", "!"))]
        assert [line.split()[:2] for line in findings] == [
            ["✓", subject] for subject in ("listener", "upstream", "collector", "collector", "collector")
        ]
        receiver.refuse()
        result = run(*arguments, OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint)
        assert result.returncode == 1
        assert f"✗ collector http/protobuf {receiver.http_endpoint}/v1/traces  cannot be reached" in result.stdout
        assert upstream.messages == []


# send, passwd -------------------------------------------------------------------------------------------------


def test_send_prints_replies_and_the_trace_id(tmp_path: Path) -> None:
    with CapturingUpstream() as upstream, gateway({"upstream.url": upstream.url}, tmp_path) as running:
        result = run("send", "--to", "you@example.net", f"127.0.0.1:{running.port}", "--size", "100KiB")
        assert result.returncode == 0, result.stderr
        trace = re.search(r"^trace ([0-9a-f]{32})$", result.stdout, re.MULTILINE)
        assert trace is not None
        assert f"(content)  250 2.0.0 Ok trace={trace[1]}" in result.stdout
        (message,) = upstream.wait_for_messages(1)
        assert len(message.content) > 100 * 1024
        access = until(
            lambda: [line for line in running.log if line["event"] == "smtp.transaction"] or None, "its line"
        )
        assert access[0]["trace_id"] == trace[1]


def test_send_sends_a_file_and_fails_where_the_gateway_refuses(tmp_path: Path) -> None:
    (tmp_path / "mail.eml").write_bytes(b"Subject: mine\n\nmine\n")
    with CapturingUpstream() as upstream:
        where = f"127.0.0.1:{upstream.port}"
        assert run("send", "-t", "you@example.net", where, "--file", str(tmp_path / "mail.eml")).returncode == 0
        assert upstream.wait_for_messages(1)[0].content == b"Subject: mine\r\n\r\nmine\r\n"
    result = run("send", "-t", "you@example.net", where)
    assert result.returncode == 1
    assert result.stderr.startswith(f"otel-smtp: connecting to smtp://{where} failed")


@pytest.mark.parametrize("arguments", [[], ["--scram"]])
def test_passwd_prints_a_line_that_the_gateway_reads(tmp_path: Path, arguments: list[str]) -> None:
    result = run("passwd", "app", *arguments, stdin="pass word\n")
    assert result.returncode == 0
    assert "pass word" not in result.stdout + result.stderr
    (tmp_path / "users").write_text(result.stdout)
    assert load_users(tmp_path / "users").knows("app")


# demo ---------------------------------------------------------------------------------------------------------


def test_the_demonstration_shows_four_traces_and_exports_the_same() -> None:
    with OtlpReceiver(with_grpc=False) as receiver:
        result = run(
            "demo", "--once", "--listen", "127.0.0.1:0", "--slow", "0",
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        exported = {span.trace_id for span in receiver.wait_for_spans(12)}
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    shown = re.findall(r"^trace ([0-9a-f]{32})$", result.stdout, re.MULTILINE)
    assert len(shown) == 4
    assert set(shown) == exported
    outcomes = re.findall(r"^[✓✗] (\w+)(?: (\d+))?", result.stdout, re.MULTILINE)
    assert outcomes == [("relayed", "250"), ("partly_relayed", "250"), ("refused", "550"), ("aborted", "")]
    assert "550 5.1.1" in result.stdout
    assert "client_disconnect" in result.stdout


def test_the_demonstration_draws_your_mail_too_until_a_signal(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("wb") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-m", "otel_smtp", "demo", "--listen", "127.0.0.1:0", "--slow", "0"],
            stdout=stdout,
            env=environment(PYTHONIOENCODING="utf-8", PYTHONUNBUFFERED="1", COLUMNS="60"),
        )
    try:

        def text() -> str:
            return output.read_text(encoding="utf-8")

        def printed(pattern: str) -> re.Match[str]:
            return until(
                lambda: re.search(pattern, output.read_text(encoding="utf-8"), re.MULTILINE),
                pattern,
                timeout_seconds=30,
            )

        port = int(printed(r"^gateway   127\.0\.0\.1:(\d+)")[1])
        printed(r"^Now you")
        printed(rf"^  {re.escape(sys.executable)} -m otel_smtp send --to you@example\.net 127\.0\.0\.1:{port}$")
        with smtplib.SMTP("127.0.0.1", port, timeout=20) as client:
            client.sendmail("me@example.org", ["you@example.net"], b"Subject: x\r\n\r\nHello\r\n")
        printed(r"(?s)^5  Yours.*● +Closed")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    # What is to be copied stands in one line whatever the width.
    drawn = [line for line in output.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]
    assert max(map(len, drawn)) <= 80


def test_bench_is_one_of_the_commands() -> None:
    with CapturingUpstream() as upstream:
        result = run("bench", "--port", str(upstream.port), "--messages", "5", "--sessions", "1", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["accepted"] == 5


# The reference --------------------------------------------------------------------------------------------------------


def test_the_reference_is_printed() -> None:
    assert run("settings").stdout.strip() in (ROOT / "deploy" / "reference" / "settings.md").read_text(encoding="utf-8")
    told = run("telemetry").stdout.strip()
    assert told in (ROOT / "deploy" / "reference" / "telemetry.md").read_text(encoding="utf-8")
    assert "`smtp.connection`" in told
    schema = json.loads(run("settings", "--json-schema").stdout)
    assert schema["properties"]["workers"]["type"] == "integer"


def test_check_for_machines_is_one_object_with_what_would_run_and_what_was_found() -> None:
    with CapturingUpstream() as upstream:
        settings = ["-u", upstream.url, "-l", "127.0.0.1:0", "--set", "status.address=off"]
        told = run("check", "--json", *settings)
        assert told.returncode == 0
        plan = json.loads(told.stdout)
        assert {"key": "upstream.0.url", "value": upstream.url, "origin": "--upstream"} in plan["settings"]
        assert "findings" not in plan
        tried = run("check", "--json", "--connect", *settings)
    assert tried.returncode == 0, tried.stdout
    assert {finding["verdict"] for finding in json.loads(tried.stdout)["findings"]} <= {"ok", "skipped"}
    tried = run("check", "--json", "--connect", *settings)  # nobody is there any more
    assert tried.returncode == 1
    assert "failed" in {finding["verdict"] for finding in json.loads(tried.stdout)["findings"]}
