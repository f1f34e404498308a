"""The real gateway process and other people's receivers of telemetry: a collector, Prometheus, trace stores."""

import json
import os
import smtplib
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.end_to_end.conftest import StartGateway
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import named
from tests.support.ports import unclaimed_port
from tests.support.process import GatewayProcess, until
from tests.support.rotel import Chain, collector
from tests.support.tools import tool

QUICKLY: Final = {
    "OTEL_BSP_SCHEDULE_DELAY": "20",
    "OTEL_BLRP_SCHEDULE_DELAY": "20",
    "OTEL_METRIC_EXPORT_INTERVAL": "100",
}


@pytest.fixture
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    """A collector of its own for each test: one that is shared passes the last test's end on into the next."""
    with collector(tmp_path_factory.mktemp("rotel")) as running:
        yield running


def send_a_mail(running: GatewayProcess) -> str:
    """Send one; the id of its trace, as the final reply names it."""
    with smtplib.SMTP("127.0.0.1", running.port) as client:
        client.ehlo("client.example")
        client.mail("a@client.example")
        client.rcpt("b@there.example")
        code, text = client.data("Subject: x\r\n\r\nHello\r\n")
    assert code == 250
    return text.decode().partition("trace=")[2]


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_collector_gets_the_spans_metrics_and_logs_of_a_mail(
    protocol: str, chain: Chain, upstream: CapturingUpstream, start: StartGateway
) -> None:
    endpoint = chain.grpc_endpoint if protocol == "grpc" else chain.http_endpoint
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, **QUICKLY}
    running = start({"upstream.url": upstream.url, "telemetry.state_events": "both"}, environ)
    trace_id = send_a_mail(running)
    spans = chain.receiver.wait_for_spans(lambda spans: len([s for s in spans if s.trace_id == trace_id]) >= 3)
    [connection] = named(spans, "smtp.connection")
    assert {span.name for span in spans if span.trace_id == trace_id} == {
        "smtp.connection",
        "smtp.transaction",
        "smtp.delivery",
    }
    metrics = chain.receiver.wait_for_metrics(
        lambda metrics: any(
            metric.name == "smtp.server.transactions" and metric.points[0].value == 1 for metric in metrics
        )
    )
    assert {"smtp.server.transitions", "smtp.server.message.size"} <= {metric.name for metric in metrics}
    exemplars = {trace for metric in metrics for point in metric.points for trace in point.exemplar_trace_ids if trace}
    assert trace_id in exemplars
    logs = chain.receiver.wait_for_logs(
        lambda logs: any(log.event_name == "smtp.state.closed" and log.trace_id == trace_id for log in logs)
    )
    told = [log for log in logs if log.event_name and log.trace_id == trace_id]
    assert [log.event_name for log in told] == [event.name for event in connection.events]
    assert {log.span_id for log in told} == {connection.span_id}
    assert {log.body for log in logs if log.attributes["smtp.logger"] == "otel_smtp.access"} == {
        "smtp.connection",
        "smtp.transaction",
        "smtp.delivery",
    }
    resources = [
        *(span.resource for span in spans),
        *(metric.resource for metric in metrics),
        *(log.resource for log in logs),
    ]
    instances = {each["service.instance.id"] for each in resources}
    assert len(instances) == 1
    assert running.stop() == 0
    printed = chain.log.read_text(errors="replace")
    for name in ("smtp.state.closed", "smtp.server.transitions", "smtp.transaction"):
        assert name in printed


def test_every_worker_tells_who_it_is(chain: Chain, upstream: CapturingUpstream, start: StartGateway) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": chain.http_endpoint, **QUICKLY}
    running = start({"upstream.url": upstream.url, "workers": 2}, environ)
    chain.receiver.wait_for_metrics(
        lambda metrics: len({metric.resource["service.instance.id"] for metric in metrics}) == 2
    )
    assert running.stop() == 0


def test_the_end_exports_what_was_counted_last(chain: Chain, upstream: CapturingUpstream, start: StartGateway) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": chain.http_endpoint}  # nothing is due before the end
    running = start({"upstream.url": upstream.url}, environ)
    trace_id = send_a_mail(running)
    assert running.stop() == 0
    [transactions] = [metric for metric in chain.receiver.metrics if metric.name == "smtp.server.transactions"]
    counted = {point.attributes["smtp.outcome"]: point.value for point in transactions.points}
    assert {outcome: count for outcome, count in counted.items() if count} == {"relayed": 1}
    assert "smtp.transaction" in {log.body for log in chain.receiver.logs if log.trace_id == trace_id}


# Prometheus ------------------------------------------------------------------------------------------------------


def ask(url: str) -> Any:
    """A JSON answer; None where there is none yet."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator["Prometheus"]:
    running = Prometheus(tmp_path)
    yield running
    running.stop()


class Prometheus:
    """A Prometheus that scrapes one page each second."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._port = unclaimed_port()

    def scrape(self, address: str) -> None:
        """Start, and scrape what is at `address`."""
        configuration = self._directory / "prometheus.yaml"
        configuration.write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
            f"scrape_configs: [{{job_name: gateway, static_configs: [{{targets: ['{address}']}}]}}]\n"
        )
        with (self._directory / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    tool("prometheus"), f"--config.file={configuration}", f"--storage.tsdb.path={self._directory}/tsdb",
                    f"--web.listen-address=127.0.0.1:{self._port}", "--enable-feature=exemplar-storage",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The vector that an expression gives now."""
        answer = ask(f"http://127.0.0.1:{self._port}/api/v1/query?query={urllib.parse.quote(expression)}")
        return answer["data"]["result"] if answer else []

    def exemplars(self, expression: str) -> list[dict[str, Any]]:
        """Exemplars of the last minute."""
        span = urllib.parse.urlencode({"query": expression, "start": time.time() - 60, "end": time.time() + 60})
        answer = ask(f"http://127.0.0.1:{self._port}/api/v1/query_exemplars?{span}")
        return [exemplar for series in (answer or {}).get("data", []) for exemplar in series["exemplars"]]

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(30)


@pytest.mark.long
def test_prometheus_scrapes_the_page_and_answers_for_it(
    prometheus: Prometheus, upstream: CapturingUpstream, start: StartGateway
) -> None:
    port = unclaimed_port()
    running = start({"upstream.url": upstream.url, "status.address": f"127.0.0.1:{port}"})
    trace_id = send_a_mail(running)
    prometheus.scrape(f"127.0.0.1:{port}")
    wanted = 'smtp_server_transitions_total{smtp_state_previous="New",smtp_state="Active"}'
    [transition] = until(lambda: prometheus.query(wanted) or None, "Prometheus has scraped", timeout_seconds=30)
    assert transition["value"][1] == "1"
    [relayed] = prometheus.query('smtp_server_transactions_total{smtp_outcome="relayed"}')
    assert relayed["value"][1] == "1"
    [median] = prometheus.query("histogram_quantile(0.5, smtp_server_message_size_bytes_bucket)")
    assert 0 < float(median["value"][1]) <= 1024
    [target] = prometheus.query("target_info")
    assert target["metric"]["service_name"] == "otel-smtp"
    [is_up] = prometheus.query("up")
    assert is_up["value"][1] == "1"
    exemplars = until(lambda: prometheus.exemplars("smtp_server_message_size_bytes_bucket") or None, "an exemplar")
    assert {exemplar["labels"]["trace_id"] for exemplar in exemplars} == {trace_id}


# Trace stores that somebody runs: not in Debian, so a missing one is skipped, also where CI=true ----------------


def named_store(name: str) -> tuple[str, str]:
    """The query API and the OTLP endpoint of a trace store that the environment names."""
    query, otlp = os.environ.get(f"{name}_URL", ""), os.environ.get(f"{name}_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    if not query:
        pytest.skip(f"{name}_URL is not set: no {name.capitalize()} to ask")
    return query.rstrip("/"), otlp


def test_tempo_shows_the_trace_with_its_events(upstream: CapturingUpstream, start: StartGateway) -> None:
    query, otlp = named_store("TEMPO")
    running = start({"upstream.url": upstream.url}, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{otlp}/v1/traces"})
    trace_id = send_a_mail(running)
    assert running.stop() == 0

    def whole() -> list[dict[str, Any]] | None:
        answer = ask(f"{query}/api/traces/{trace_id}") or {}
        spans = [span for batch in answer.get("batches", []) for scope in _scopes(batch) for span in scope["spans"]]
        return spans if len(spans) >= 3 else None

    spans = {span["name"]: span for span in until(whole, "the trace is in Tempo", timeout_seconds=60)}
    assert spans.keys() == {"smtp.connection", "smtp.transaction", "smtp.delivery"}
    events = [event["name"] for event in spans["smtp.connection"]["events"]]
    assert (events[0], events[-1]) == ("smtp.state.new", "smtp.state.closed")


def _scopes(batch: dict[str, Any]) -> list[dict[str, Any]]:
    scopes: list[dict[str, Any]] = batch.get("scopeSpans") or batch.get("instrumentationLibrarySpans") or []
    return scopes
