"""Metrics over OTLP: the counts of the metrics page, as a real receiver gets them."""

import itertools
import logging
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.resources import Resource

from otel_smtp.telemetry import attributes
from otel_smtp.telemetry.attributes import Instrument
from otel_smtp.telemetry.collector import BatchOutcome, CollectorAnswer
from otel_smtp.telemetry.metric_export import MetricExport, MetricsReading
from otel_smtp.telemetry.metrics import Metrics
from otel_smtp.telemetry.setup import Telemetry, TelemetryOptions, set_up
from tests.support.otlp_receiver import Fault, FaultKind, OtlpReceiver, ReceivedMetric
from tests.support.process import until
from tests.telemetry.driving import Client

SOON = {"OTEL_METRIC_EXPORT_INTERVAL": "20", "OTEL_TRACES_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
OPTIONS = TelemetryOptions(
    version="1.2.3",
    access_log=False,
    upstream_connections=lambda: [("provider", "idle", 3)],
    spool=lambda: ({"deferred": 2}, 61.5, 4096),
)


WAIT_SECONDS = 10.0
KINDS = {Instrument.HISTOGRAM: "histogram", Instrument.GAUGE: "gauge"}


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "otel_smtp.telemetry.metric_export")
    return caplog


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def exporting(receiver: OtlpReceiver, protocol: str = "http/protobuf", **more: str) -> Telemetry:
    endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, **SOON, **more}
    telemetry = set_up(OPTIONS, environ)
    telemetry.start()
    return telemetry


def relay_mail(telemetry: Telemetry) -> None:
    """One mail, of which the metrics tell at once."""
    Client(telemetry.observers).ehlo().message().quit()
    telemetry.count_mails()


def latest(metrics: list[ReceivedMetric]) -> dict[str, ReceivedMetric]:
    """Each metric as it came last."""
    return {metric.name: metric for metric in metrics}


def value(metric: ReceivedMetric, **labels: str) -> float | None:
    wanted = {name.replace("_", "."): label for name, label in labels.items()}
    [point] = [point for point in metric.points if wanted.items() <= point.attributes.items()]
    return point.value


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_mail_is_counted_at_the_collector(receiver: OtlpReceiver, protocol: str) -> None:
    telemetry = exporting(receiver, protocol)
    relay_mail(telemetry)
    assert telemetry.flush_and_shutdown(10)
    metrics = latest(receiver.metrics)
    assert value(metrics["smtp.server.transactions"], smtp_outcome="relayed") == 1
    assert value(metrics["smtp.server.transitions"], smtp_state_previous="New", smtp_state="Active") == 1
    assert value(metrics["smtp.client.connections"], smtp_upstream_name="provider") == 3
    assert value(metrics["smtp.spool.age"]) == 61.5
    assert metrics["smtp.server.transitions"].is_monotonic
    assert not metrics["smtp.client.connections"].is_monotonic
    [size] = metrics["smtp.server.message.size"].points
    assert (size.count, len(size.buckets)) == (1, len(size.bounds) + 1)
    assert sum(size.buckets) == size.count
    assert metrics["smtp.server.message.size"].resource["service.name"] == "otel-smtp"
    assert metrics["smtp.server.message.size"].resource["service.instance.id"]


def test_exported_metrics_are_those_of_the_registry(receiver: OtlpReceiver) -> None:
    telemetry = exporting(receiver)
    relay_mail(telemetry)
    assert telemetry.flush_and_shutdown(10)
    for name, metric in latest(receiver.metrics).items():
        registered = attributes.METRICS[name]
        assert metric.unit == registered.unit
        assert metric.kind == KINDS.get(registered.instrument, "sum")
        assert metric.is_monotonic == (registered.instrument is Instrument.COUNTER)
        for point in metric.points:
            assert point.attributes.keys() <= {*registered.labels}


def test_the_first_transition_has_no_state_before_it(receiver: OtlpReceiver) -> None:
    telemetry = exporting(receiver)
    Client(telemetry.observers).ehlo().quit()
    assert telemetry.flush_and_shutdown(10)
    points = latest(receiver.metrics)["smtp.server.transitions"].points
    assert [point.value for point in points if point.attributes == {"smtp.state": "New"}] == [1]


def test_a_measurement_names_its_trace(receiver: OtlpReceiver) -> None:
    telemetry = exporting(receiver)
    client = Client(telemetry.observers).ehlo().message()
    telemetry.count_mails()
    assert telemetry.flush_and_shutdown(10)
    assert client.transaction is None or client.trace_id()
    [size] = latest(receiver.metrics)["smtp.server.message.size"].points
    [trace_id] = size.exemplar_trace_ids
    assert len(trace_id.strip("0")) > 8
    assert len(trace_id) == 32
    [span_id] = size.exemplar_span_ids
    assert len(span_id.strip("0")) > 4
    assert len(span_id) == 16


def test_counts_go_on_from_the_start_and_are_sent_at_an_interval(receiver: OtlpReceiver) -> None:
    telemetry = exporting(receiver)
    for mails in (1, 2):
        relay_mail(telemetry)
        receiver.wait_for_metrics(lambda metrics, mails=mails: _relayed(metrics) == mails)  # type: ignore[misc]  # a lambda
    assert telemetry.flush_and_shutdown(10)


PREFERENCE = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"


@pytest.mark.parametrize(
    ("preference", "deltas", "others"),
    [
        ("cumulative", set(), {"smtp.server.transactions", "smtp.server.message.size", "smtp.telemetry.dropped"}),
        ("lowmemory", {"smtp.server.transactions", "smtp.server.message.size"}, {"smtp.telemetry.dropped"}),
        ("delta", {"smtp.server.transactions", "smtp.server.message.size", "smtp.telemetry.dropped"}, set[str]()),
    ],
)
def test_sums_have_the_temporality_that_the_operator_prefers(
    receiver: OtlpReceiver, preference: str, deltas: set[str], others: set[str]
) -> None:
    telemetry = exporting(receiver, OTEL_METRIC_EXPORT_INTERVAL="60000", **{PREFERENCE: preference})
    relay_mail(telemetry)
    assert telemetry.flush_and_shutdown(10)
    told = {name: metric.is_delta for name, metric in latest(receiver.metrics).items()}
    assert {name for name in deltas | others if told[name]} == deltas
    assert not told["smtp.client.connections"]
    assert not told["smtp.spool.messages"]


def test_deltas_add_up_to_what_happened_though_exports_failed(receiver: OtlpReceiver) -> None:
    telemetry = exporting(receiver, **{PREFERENCE: "delta"})
    relay_mail(telemetry)
    receiver.wait_for_metrics(lambda metrics: _total(metrics) == 1)
    receiver.fault = Fault(FaultKind.UNAVAILABLE)
    lost = _dropped(telemetry, "export_failed")
    relay_mail(telemetry)
    until(lambda: _dropped(telemetry, "export_failed") > lost or None, "a loss is counted")
    receiver.fault = Fault()
    receiver.wait_for_metrics(lambda metrics: _total(metrics) == 2)
    relay_mail(telemetry)
    assert telemetry.flush_and_shutdown(10)
    assert _total(receiver.metrics) == 3
    sizes = [
        point for metric in receiver.metrics if metric.name == "smtp.server.message.size" for point in metric.points
    ]
    assert sum(point.count or 0 for point in sizes) == sum(sum(point.buckets) for point in sizes) == 3
    for before, after in itertools.pairwise(sizes):
        assert before.start_ns < before.time_ns == after.start_ns, "one begins where the last one that arrived ended"
    assert sum(len(point.exemplar_trace_ids) for point in sizes) <= 3, "an exemplar is told once"


def _total(metrics: list[ReceivedMetric]) -> float:
    """Relayed transactions, all deltas together."""
    told = [metric for metric in metrics if metric.name == "smtp.server.transactions"]
    return sum(
        point.value or 0 for metric in told for point in metric.points if point.attributes["smtp.outcome"] == "relayed"
    )


def _relayed(metrics: list[ReceivedMetric]) -> float | None:
    transactions = latest(metrics).get("smtp.server.transactions")
    return value(transactions, smtp_outcome="relayed") if transactions is not None else None


@pytest.mark.parametrize(
    ("kind", "reason"), [(FaultKind.UNAVAILABLE, "export_failed"), (FaultKind.REJECTED, "rejected")]
)
def test_a_failed_export_is_counted_and_the_next_one_makes_up_for_it(
    receiver: OtlpReceiver, kind: FaultKind, reason: str
) -> None:
    receiver.fault = Fault(kind)
    telemetry = exporting(receiver)
    relay_mail(telemetry)
    until(lambda: _dropped(telemetry, reason) or None, "a loss is counted")
    receiver.fault = Fault()
    receiver.wait_for_metrics(lambda metrics: _relayed(metrics) == 1)
    assert telemetry.flush_and_shutdown(10)
    told = {
        point.attributes["smtp.telemetry.drop_reason"]: point.value
        for point in latest(receiver.metrics)["smtp.telemetry.dropped"].points
        if point.attributes["smtp.telemetry.signal"] == "metrics"
    }
    assert told[reason] == _dropped(telemetry, reason) > 0


def _dropped(telemetry: Telemetry, reason: str) -> float:
    return sum(
        float(line.rpartition(" ")[2])
        for line in telemetry.metrics_page("text/plain")[0].decode().splitlines()
        if line.startswith("smtp_telemetry_dropped_total") and f'"{reason}"' in line and '"metrics"' in line
    )


BUDGET_SECONDS = 0.5


def test_a_black_hole_holds_the_end_no_longer_than_its_budget(
    receiver: OtlpReceiver, log: pytest.LogCaptureFixture
) -> None:
    receiver.fault = Fault(FaultKind.BLACK_HOLE)
    telemetry = exporting(receiver, OTEL_METRIC_EXPORT_INTERVAL="3600000")
    relay_mail(telemetry)
    began = time.monotonic()
    assert telemetry.flush_and_shutdown(BUDGET_SECONDS), "the last request ends before its budget does"
    assert time.monotonic() - began < 5
    assert receiver.requests == 1, "the last export was tried"
    assert _dropped(telemetry, "shutdown") > 0
    assert "export of metrics failing" in [record.message for record in log.records]


@pytest.mark.long
def test_a_request_that_hangs_from_before_is_given_up_with_the_budget_and_counted(
    receiver: OtlpReceiver, log: pytest.LogCaptureFixture
) -> None:
    receiver.fault = Fault(FaultKind.BLACK_HOLE)
    telemetry = exporting(receiver, OTEL_METRIC_EXPORT_INTERVAL="3000")
    relay_mail(telemetry)
    receiver.wait_for_requests(1)
    began = time.monotonic()
    assert not telemetry.flush_and_shutdown(BUDGET_SECONDS)
    assert BUDGET_SECONDS * 0.8 <= time.monotonic() - began < 5
    lost = _dropped(telemetry, "shutdown")
    assert lost > 0
    assert [record.message for record in log.records] == ["metrics lost at shutdown"]
    # The request ends at last, and says nothing that was not counted.
    receiver.fault = Fault()
    [thread] = [each for each in threading.enumerate() if each.name == "otlp-metrics"]
    thread.join(WAIT_SECONDS)
    assert not thread.is_alive()
    assert _dropped(telemetry, "shutdown") == lost
    assert _dropped(telemetry, "export_failed") == 0


def test_numbers_that_are_not_read_in_time_are_counted_as_lost(log: pytest.LogCaptureFixture) -> None:
    reading, over = threading.Event(), threading.Event()

    def read() -> MetricsData:
        reading.set()
        over.wait(WAIT_SECONDS)
        raise RuntimeError("too late to be counted again")

    export = MetricExport(read, None, interval_seconds=0.01)
    export.start()
    assert reading.wait(WAIT_SECONDS)
    assert not export.shutdown(0.05)
    [thread] = [each for each in threading.enumerate() if each.name == "otlp-metrics"]
    over.set()
    thread.join(WAIT_SECONDS)
    assert {reason: count for _, reason, count in export.dropped() if count} == {"shutdown": 1}
    assert "metrics lost at shutdown" in [record.message for record in log.records]


def test_numbers_that_cannot_be_read_are_counted_as_lost(log: pytest.LogCaptureFixture) -> None:
    def read() -> MetricsData:
        raise RuntimeError("a fault of ours")

    export = MetricExport(read, None, interval_seconds=3600)
    export.start()
    assert export.shutdown(WAIT_SECONDS)
    assert {reason: count for _, reason, count in export.dropped() if count} == {"export_failed": 1}
    [record] = log.records
    assert record.message == "export of metrics failing"
    assert record.exc_info is not None


def test_nothing_is_sent_unless_an_endpoint_or_the_variable_says_so(receiver: OtlpReceiver) -> None:
    for exporter in ("none", "prometheus"):
        telemetry = exporting(receiver, OTEL_METRICS_EXPORTER=exporter)
        assert telemetry.flush_and_shutdown(10)
    telemetry = set_up(OPTIONS, {})
    telemetry.start()
    assert telemetry.flush_and_shutdown(10)
    assert receiver.requests == 0


def test_an_endpoint_for_metrics_alone_sends_metrics_alone(receiver: OtlpReceiver) -> None:
    environ = {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": f"{receiver.http_endpoint}/v1/metrics"}
    telemetry = set_up(OPTIONS, environ)
    telemetry.start()
    relay_mail(telemetry)
    assert telemetry.flush_and_shutdown(10)
    assert receiver.requests == 1
    assert _relayed(receiver.metrics) == 1


def test_on_the_console_metrics_are_json(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry = set_up(OPTIONS, {"OTEL_METRICS_EXPORTER": "console"})
    telemetry.start()
    relay_mail(telemetry)
    assert telemetry.flush_and_shutdown(10)
    assert '"smtp.server.transactions"' in capsys.readouterr().out


def test_the_page_has_the_resource() -> None:
    page = set_up(OPTIONS, {}).metrics_page("text/plain")[0].decode()
    [target] = [line for line in page.splitlines() if line.startswith("target_info{")]
    assert 'service_name="otel-smtp"' in target
    assert target.endswith(" 1.0")


def test_an_interval_that_is_too_short_leaves_nine_tenths_of_the_time_to_mail() -> None:
    busy_seconds, begun = 0.02, list[float]()
    enough = threading.Event()

    def read() -> MetricsData:
        begun.append(time.monotonic())
        if len(begun) == 6:
            enough.set()
        ends = time.thread_time() + busy_seconds
        while time.thread_time() < ends:
            pass
        raise RuntimeError("nothing to send")

    export = MetricExport(read, None, interval_seconds=0.001)
    export.start()
    assert enough.wait(60)
    export.shutdown(10)
    # The first one has its imports to do, and is not counted.
    for before, after in itertools.pairwise(begun[1:6]):
        assert after - before >= 10 * busy_seconds


def test_the_time_that_a_collector_takes_to_be_made_is_taken_from_its_last_request() -> None:
    import_seconds, budget_seconds = 1.0, 5.0
    given: list[float] = []

    class Asked:
        def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
            given.append(timeout_seconds)
            return CollectorAnswer(BatchOutcome.TAKEN)

        def close(self) -> None: ...

    def connect() -> Asked:
        threading.Event().wait(import_seconds)  # as long as a library's import may take
        return Asked()

    reading = MetricsReading(Metrics(), Resource({}), "1")
    export = MetricExport(reading.read, connect, interval_seconds=3600, request_seconds=60)
    export.start()
    assert export.shutdown(budget_seconds)
    [seconds] = given
    assert seconds <= 0.9 * budget_seconds - import_seconds


def test_a_fault_in_counting_what_was_lost_does_not_end_the_export() -> None:
    again = threading.Event()
    reads = itertools.count(1)

    def read() -> MetricsData:
        if next(reads) == 3:
            again.set()
        raise RuntimeError("a fault")

    def lose(*about: object) -> None:
        raise RuntimeError("another fault")

    export = MetricExport(read, None, interval_seconds=0.001)
    export._lose = lose  # type: ignore[method-assign, assignment]
    export.start()
    assert again.wait(60)
    assert export.shutdown(60)
