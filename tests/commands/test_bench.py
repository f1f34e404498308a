"""The command as people run it: its output, its JSON, its exit status."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from otel_smtp.commands import bench as bench_module
from otel_smtp.commands.bench import bench
from tests.support.ports import unclaimed_port
from tests.support.process import gateway
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


def test_the_gateway_says_what_the_load_cost_it(tmp_path: Path) -> None:
    status = f"127.0.0.1:{unclaimed_port()}"
    with (
        running_sink() as (sink, _),
        gateway({"upstream.url": f"smtp://127.0.0.1:{sink}", "status.address": status}, tmp_path) as running,
    ):
        ran = CliRunner().invoke(bench, ["--port", str(running.port), "--url", status, "--messages", "400", "--json"])
    assert ran.exit_code == 0, ran.output
    cost = json.loads(ran.stdout)["gateway"]
    assert cost["transactions"] == 400
    assert cost["cpu_us_per_message"] > 0


@contextmanager
def metrics_pages(*pages: str) -> Iterator[str]:
    """A status port that shows these pages, one after the other, the last again and again."""
    left = list(pages)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            page = (left.pop(0) if len(left) > 1 else left[0]).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def page(*workers: tuple[float, int]) -> str:
    count = "smtp_server_transaction_duration_seconds_count"
    lines = []
    for number, (cpu, transactions) in enumerate(workers):
        lines += [
            f'process_cpu_seconds_total{{worker="{number}"}} {cpu}',
            f'{count}{{worker="{number}",smtp_outcome="relayed"}} {transactions}',
            f'{count}{{worker="{number}",smtp_outcome="refused"}} 1',
        ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (page((1.0, 100), (2.0, 200)), page((1.5, 105), (2.5, 205)), "100000 µs per message"),
        (page((1.0, 100)), page((2.0, 120)), "50000 µs per message (of 20, 10 of other clients)"),
        (page((1.0, 100)), page((0.1, 10)), "unknown: the gateway at URL restarted meanwhile"),
        (page((1.0, 100)), page((1.1, 103)), "unknown: the load did not reach the gateway at URL"),
        ("a page of something else\n", "", "unknown: "),
        ("", "", "unknown: URL has no process_cpu_seconds_total and no smtp_server_transaction"),
    ],
)
def test_the_metrics_are_read_with_care(before: str, after: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "_SETTLE_SECONDS", 0)
    monkeypatch.setenv("COLUMNS", "200")
    with running_sink() as (port, _), metrics_pages(before, after) as url:
        ran = CliRunner().invoke(bench, ["--port", str(port), "--url", url, "--messages", "10"])
    assert ran.exit_code == 0, ran.output
    assert words.replace("URL", url) in ran.stdout


def test_without_a_gateway_to_ask_the_load_is_sent_all_the_same() -> None:
    with running_sink() as (port, _):
        ran = CliRunner().invoke(
            bench, ["--port", str(port), "--set", "status.address=off", "--messages", "3", "--json"]
        )
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["gateway"] == {"problem": "the settings name no status port; --url does"}
