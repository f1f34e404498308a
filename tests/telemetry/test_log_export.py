"""Log lines over OTLP, as a real receiver gets them, and beside what the SDK makes of the same record."""

import json
import logging
import time
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.sdk.resources import Resource

from otel_smtp.observing import trace_fields
from otel_smtp.telemetry.attributes import SCHEMA_URL, SCOPE_NAME
from otel_smtp.telemetry.log_export import log_record_of
from otel_smtp.telemetry.logs import JsonRenderer, LineFormatter
from otel_smtp.telemetry.otlp import LogEncoder
from otel_smtp.telemetry.setup import Telemetry, TelemetryOptions, set_up
from otel_smtp.telemetry.state_events import StateEvents
from tests.support.otlp_receiver import Fault, FaultKind, OtlpReceiver
from tests.telemetry.driving import Client

ONLY_LOGS = {"OTEL_BLRP_SCHEDULE_DELAY": "20", "OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"}
operator = logging.getLogger("otel_smtp.gateway.running")


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "otel_smtp")


def exporting(receiver: OtlpReceiver, protocol: str = "http/protobuf", **more: str) -> Telemetry:
    endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, **ONLY_LOGS, **more}
    telemetry = set_up(TelemetryOptions(version="1.2.3", state_events=StateEvents.BOTH), environ)
    telemetry.start()
    return telemetry


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_mail_has_event_and_line_records_with_its_trace(receiver: OtlpReceiver, protocol: str) -> None:
    telemetry = exporting(receiver, protocol)
    Client(telemetry.observers).ehlo().message().quit()
    assert telemetry.flush_and_shutdown(10)
    logs = receiver.logs
    events = [log for log in logs if log.event_name]
    assert [log.event_name for log in events] == [
        f"smtp.state.{state}" for state in ("new", "active", "data", "active", "idle", "closed")
    ]
    assert [log.attributes["smtp.state.sequence"] for log in events] == [1, 2, 3, 4, 5, 6]
    access = {log.body: log for log in logs if log.attributes["smtp.logger"] == "otel_smtp.access"}
    assert access.keys() == {"smtp.connection", "smtp.transaction", "smtp.delivery"}
    assert access["smtp.transaction"].attributes["smtp.outcome"] == "relayed"
    assert len({log.trace_id for log in logs}) == 1
    assert all(len(log.trace_id) == 32 and len(log.span_id) == 16 for log in logs)
    assert {log.severity for log in logs} == {"INFO"}
    assert events[0].resource["service.name"] == "otel-smtp"
    assert abs(time.time_ns() - events[0].time_ns) < 3600e9


def test_a_line_of_an_operator_has_its_values_and_its_traceback(receiver: OtlpReceiver) -> None:
    telemetry = exporting(receiver)
    try:
        raise RuntimeError("inside")
    except RuntimeError:
        operator.exception("it failed", extra={"listener": "local", "tries": 3, "names": ["a", "b"], "ratio": 0.5})
    assert telemetry.flush_and_shutdown(10)
    [log] = [log for log in receiver.logs if log.body == "it failed"]
    assert log.severity == "ERROR"
    assert log.trace_id == ""
    assert log.event_name == ""
    stacktrace = log.attributes.pop("exception.stacktrace")
    assert stacktrace.endswith("RuntimeError: inside")
    assert log.attributes == {
        "smtp.logger": "otel_smtp.gateway.running",
        "listener": "local",
        "tries": 3,
        "names": ["a", "b"],
        "ratio": 0.5,
        "exception.type": "RuntimeError",
    }


def test_others_and_the_exporters_own_lines_never_go_into_it(receiver: OtlpReceiver) -> None:
    telemetry = exporting(receiver)
    for name in ("httpx", "opentelemetry.sdk", "otel_smtp.telemetry.exporting", "otel_smtp.telemetry.metric_export"):
        logging.getLogger(name).warning("about exporting")
    operator.warning("last")
    assert telemetry.flush_and_shutdown(10)
    assert [log.body for log in receiver.logs] == ["last"]


def test_after_the_end_nothing_is_heard(receiver: OtlpReceiver) -> None:
    telemetry = exporting(receiver)
    assert telemetry.flush_and_shutdown(10)
    before = list(logging.getLogger("otel_smtp").handlers)
    operator.warning("too late")
    assert receiver.requests == 0
    assert not [handler for handler in before if type(handler).__name__ == "LogExportHandler"]


def test_a_full_queue_loses_lines_which_are_counted_and_never_waits(receiver: OtlpReceiver) -> None:
    receiver.fault = Fault(FaultKind.BLACK_HOLE)
    telemetry = exporting(receiver, OTEL_BLRP_MAX_QUEUE_SIZE="5", OTEL_BLRP_MAX_EXPORT_BATCH_SIZE="5")
    began = time.monotonic()
    for number in range(40):
        operator.warning("line", extra={"number": number})
    assert time.monotonic() - began < 5
    page = telemetry.metrics_page("text/plain")[0].decode()
    lost = [
        float(line.rpartition(" ")[2])
        for line in page.splitlines()
        if line.startswith("smtp_telemetry_dropped_total") and '"queue_full"' in line and '"logs"' in line
    ]
    assert 30 <= sum(lost) <= 35
    receiver.fault = Fault()
    telemetry.flush_and_shutdown(10)


def test_a_flood_is_a_flood_nowhere(receiver: OtlpReceiver) -> None:
    telemetry = exporting(receiver)
    for _ in range(500):
        operator.warning("refused")
    assert telemetry.flush_and_shutdown(10)
    assert 50 <= len(receiver.logs) <= 150


ROWS = [
    (logging.DEBUG, 5),
    (logging.INFO, 9),
    (logging.WARNING, 13),
    (logging.ERROR, 17),
    (logging.CRITICAL, 21),
]


@pytest.mark.parametrize(("level", "severity"), ROWS)
def test_a_level_is_a_severity(level: int, severity: int) -> None:
    record = logging.makeLogRecord({"name": "otel_smtp.gateway.running", "levelno": level, "msg": "x"})
    assert log_record_of(record).severity == severity


def test_a_record_is_encoded_as_the_protocol_has_it() -> None:
    record = logging.makeLogRecord(
        {
            "name": "otel_smtp.state",
            "levelno": logging.INFO,
            "levelname": "INFO",
            "msg": "smtp.state.new",
            "event_time_ns": 123,
            "trace_id": "a" * 32,
            "span_id": "b" * 16,
            "trace_flags": 3,
            "smtp.state": "New",
        }
    )
    encoder = LogEncoder(Resource({"service.name": "gw"}, "https://resource/1"), "1.2")
    request = ExportLogsServiceRequest.FromString(b"".join(encoder.request([encoder.record(log_record_of(record))])))
    [resource] = request.resource_logs
    assert resource.schema_url == "https://resource/1"
    [scoped] = resource.scope_logs
    assert (scoped.scope.name, scoped.scope.version, scoped.schema_url) == (SCOPE_NAME, "1.2", SCHEMA_URL)
    [log] = scoped.log_records
    assert (log.time_unix_nano, log.severity_number, log.severity_text) == (123, 9, "INFO")
    assert (log.body.string_value, log.event_name) == ("smtp.state.new", "smtp.state.new")
    assert (log.trace_id, log.span_id, log.flags) == (bytes.fromhex("a" * 32), bytes.fromhex("b" * 16), 3)
    assert log.observed_time_unix_nano > 0
    attributes = {pair.key: pair.value.string_value for pair in log.attributes}
    assert attributes == {"smtp.logger": "otel_smtp.state", "smtp.state": "New"}


@pytest.mark.parametrize(("flags", "expected"), [("01", 1), ("03", 3), ("00", 0), ("no", 0)])
def test_a_line_about_a_message_has_the_ids_and_flags_of_its_trace(flags: str, expected: int) -> None:
    extra = trace_fields({"traceparent": f"00-{'a' * 32}-{'b' * 16}-{flags}"})
    record = logging.makeLogRecord({"name": "otel_smtp.spool.attempts", "levelno": 20, "msg": "x", **extra})
    made = log_record_of(record)
    assert (made.trace_id.hex(), made.span_id.hex(), made.flags) == ("a" * 32, "b" * 16, expected)
    line = json.loads(LineFormatter(JsonRenderer()).format(record))
    assert (line["trace_id"], line["span_id"]) == ("a" * 32, "b" * 16)
    assert "trace_flags" not in line


def test_values_of_an_operators_line_are_made_fit() -> None:
    record = logging.makeLogRecord(
        {
            "name": "otel_smtp.gateway.running",
            "levelno": 20,
            "msg": "x",
            "huge": 1 << 70,
            "text": "line\nbreak \ud800",
            "long": "x" * 5000,
        }
    )
    attributes = log_record_of(record).attributes
    assert attributes["huge"] == str(1 << 70)
    assert len(str(attributes["long"])) == 256
    assert not {"\n", "\ud800"} & {*str(attributes["text"])}
