"""The command as people run it: its output, its JSON, its exit status."""

import json

from click.testing import CliRunner

from otel_smtp.commands.bench import bench
from tests.support.ports import unclaimed_port
from tests.support.sink_process import running_sink


def test_figures_come_as_json() -> None:
    with running_sink() as (port, _):
        ran = CliRunner().invoke(bench, ["--port", str(port), "--messages", "7", "--sessions", "2", "--json"])
    assert ran.exit_code == 0, ran.output
    figures = json.loads(ran.stdout)
    assert (figures["accepted"], figures["failed"]) == (7, 0)
    assert figures["messages_per_second"] > 0
    assert 0 < figures["latency_ms"]["p50"] <= figures["latency_ms"]["p99"] <= figures["latency_ms"]["max"]


def test_people_see_rate_and_latency() -> None:
    with running_sink() as (port, _):
        ran = CliRunner().invoke(bench, ["--port", str(port), "--messages", "7", "--fresh"])
    assert ran.exit_code == 0, ran.output
    assert "accepted" in ran.stdout
    assert "messages/s" in ran.stdout


def test_a_failed_message_is_exit_status_1_and_its_reason_is_shown() -> None:
    ran = CliRunner().invoke(bench, ["--port", str(unclaimed_port()), "--messages", "3"])
    assert ran.exit_code == 1
    assert "refused" in ran.stdout


def test_a_host_without_an_address() -> None:
    ran = CliRunner().invoke(bench, ["--host", "no such host", "--json"])
    assert ran.exit_code == 1
