"""OTEL_* variables of exporting: what they mean, and how wrong ones are told."""

from typing import Any

import pytest

from otel_smtp.telemetry.collector import Compression, Protocol
from otel_smtp.telemetry.environment import SignalExport, TelemetrySettingError, own_resource, read

OTLP, TRACES = "OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_"
GRPC = {OTLP + "PROTOCOL": "grpc"}

COLLECTOR: list[tuple[dict[str, str], str, Any]] = [
    # the path is added to the endpoint for all signals, and to no other
    ({}, "endpoint", "http://localhost:4318/v1/traces"),
    ({OTLP + "ENDPOINT": "http://c:4318"}, "endpoint", "http://c:4318/v1/traces"),
    ({OTLP + "ENDPOINT": "https://c/otlp/"}, "endpoint", "https://c/otlp/v1/traces"),
    ({OTLP + "ENDPOINT": "http://a:1", TRACES + "ENDPOINT": "http://b:2/x"}, "endpoint", "http://b:2/x"),
    ({OTLP + "ENDPOINT": "http://a:1", TRACES + "ENDPOINT": ""}, "endpoint", "http://a:1/v1/traces"),
    (GRPC, "endpoint", "http://localhost:4317"),
    (GRPC | {OTLP + "ENDPOINT": "https://c:4317"}, "endpoint", "https://c:4317"),
    # grpc is encrypted unless the scheme or, where there is none, the variable says otherwise
    (GRPC | {OTLP + "ENDPOINT": "https://c:4317"}, "is_insecure", False),
    (GRPC | {OTLP + "ENDPOINT": "https://c:4317", OTLP + "INSECURE": "true"}, "is_insecure", False),
    (GRPC | {OTLP + "ENDPOINT": "http://c:4317"}, "is_insecure", True),
    (GRPC | {OTLP + "ENDPOINT": "c:4317"}, "is_insecure", False),
    (GRPC | {OTLP + "ENDPOINT": "c:4317", OTLP + "INSECURE": "true"}, "is_insecure", True),
    ({}, "protocol", Protocol.HTTP),
    (GRPC | {TRACES + "PROTOCOL": "http/protobuf"}, "protocol", Protocol.HTTP),
    ({OTLP + "HEADERS": "Api-Key=a%20b, x=y=z"}, "headers", (("api-key", "a b"), ("x", "y=z"))),
    ({OTLP + "HEADERS": "a=1", TRACES + "HEADERS": "b=2"}, "headers", (("b", "2"),)),
    ({OTLP + "COMPRESSION": "gzip"}, "compression", Compression.GZIP),
    ({OTLP + "COMPRESSION": "gzip", TRACES + "COMPRESSION": "none"}, "compression", Compression.NONE),
    ({OTLP + "CERTIFICATE": "/ca.pem"}, "certificate", "/ca.pem"),
    ({TRACES + "CLIENT_KEY": "/k.pem"}, "client_key", "/k.pem"),
    ({TRACES + "CLIENT_CERTIFICATE": "/c.pem"}, "client_certificate", "/c.pem"),
    ({}, "user_agent", "otel-smtp/1.2"),
]


@pytest.mark.parametrize(("environ", "field", "value"), COLLECTOR)
def test_a_variable_sets_how_to_reach_the_collector(environ: dict[str, str], field: str, value: object) -> None:
    assert getattr(read({"OTEL_TRACES_EXPORTER": "otlp", **environ}, "1.2").traces.collector, field) == value


BATCH: list[tuple[dict[str, str], str, float]] = [
    ({}, "queue_spans", 16_384),
    ({}, "batch_spans", 2048),
    ({}, "delay_seconds", 5.0),
    ({}, "export_seconds", 30.0),
    ({}, "request_seconds", 10.0),
    ({"OTEL_BSP_MAX_QUEUE_SIZE": "100"}, "queue_spans", 100),
    ({"OTEL_BSP_MAX_QUEUE_SIZE": "100"}, "batch_spans", 100),
    ({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "64"}, "batch_spans", 64),
    ({"OTEL_BSP_SCHEDULE_DELAY": "200"}, "delay_seconds", 0.2),  # milliseconds
    ({"OTEL_BSP_EXPORT_TIMEOUT": "1500"}, "export_seconds", 1.5),
    ({OTLP + "TIMEOUT": "3"}, "request_seconds", 3.0),  # seconds
    ({OTLP + "TIMEOUT": "3", TRACES + "TIMEOUT": "4.5"}, "request_seconds", 4.5),
]


@pytest.mark.parametrize(("environ", "field", "value"), BATCH)
def test_a_variable_sets_how_spans_travel(environ: dict[str, str], field: str, value: float) -> None:
    assert getattr(read({"OTEL_TRACES_EXPORTER": "otlp", **environ}).traces.batches, field) == value


BAD = [
    (OTLP + "ENDPOINT", "collector:4318", "http://collector:4318"),
    (OTLP + "ENDPOINT", "ftp://collector", "http://collector:4318"),
    (TRACES + "ENDPOINT", "http://", "http://collector:4318"),
    (TRACES + "ENDPOINT", "http://c:port", "http://collector:4318"),
    (TRACES + "ENDPOINT", "http://[::1", "http://collector:4318"),
    (OTLP + "COMPRESSION", "zstd", "none, gzip, deflate"),
    (OTLP + "PROTOCOL", "http/json", "http/protobuf, grpc"),
    (OTLP + "INSECURE", "yes", "true, false"),
    (TRACES + "TIMEOUT", "soon", "a number above 0"),
    (OTLP + "TIMEOUT", "0", "a number above 0"),
    (OTLP + "TIMEOUT", "nan", "a number above 0"),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "a number from 1"),
    ("OTEL_BSP_MAX_QUEUE_SIZE", "0.5", "a number from 1"),
    ("OTEL_BSP_SCHEDULE_DELAY", "inf", "a number above 0"),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "20000", "up to OTEL_BSP_MAX_QUEUE_SIZE"),
]


@pytest.mark.parametrize(("variable", "value", "allowed"), BAD)
def test_an_invalid_value_is_reported_with_its_variable(variable: str, value: str, allowed: str) -> None:
    environ = {variable: value} | ({OTLP + "PROTOCOL": "grpc"} if variable.endswith("INSECURE") else {})
    if variable.endswith("INSECURE"):
        environ[OTLP + "ENDPOINT"] = "collector:4317"
    with pytest.raises(TelemetrySettingError) as caught:
        read({"OTEL_TRACES_EXPORTER": "otlp", **environ})
    assert caught.value.variable == variable
    assert allowed in str(caught.value)


def exported(environ: dict[str, str]) -> list[str]:
    """The signals that go to a collector."""
    return [str(collector.signal) for collector in read(environ).collectors]


@pytest.mark.parametrize(
    ("environ", "signals"),
    [
        ({}, []),
        ({OTLP + "ENDPOINT": " "}, []),
        ({OTLP + "ENDPOINT": "http://c"}, ["traces", "metrics", "logs"]),
        ({TRACES + "ENDPOINT": "http://c"}, ["traces"]),
        ({OTLP + "METRICS_ENDPOINT": "http://c"}, ["metrics"]),
        ({OTLP + "LOGS_ENDPOINT": "http://c"}, ["logs"]),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, ["traces"]),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ["traces"]),
        ({"OTEL_TRACES_EXPORTER": "console", OTLP + "ENDPOINT": "http://c"}, ["metrics", "logs"]),
        ({"OTEL_TRACES_EXPORTER": "otlp,otlp_proto_http"}, ["traces", "traces"]),
        ({"OTEL_METRICS_EXPORTER": "prometheus", OTLP + "ENDPOINT": "http://c"}, ["traces", "logs"]),
        ({"OTEL_SDK_DISABLED": "true", OTLP + "ENDPOINT": "http://c"}, []),
    ],
)
def test_which_signals_go_to_a_collector(environ: dict[str, str], signals: list[str]) -> None:
    assert exported(environ) == signals


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "nowhere (no OTLP endpoint set)"),
        ({"OTEL_SDK_DISABLED": "true"}, "nowhere (OTEL_SDK_DISABLED)"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        (
            {"OTEL_TRACES_EXPORTER": "console, otlp", OTLP + "ENDPOINT": "http://c:1"},
            "console, http/protobuf http://c:1/v1/traces",
        ),
        ({OTLP + "ENDPOINT": "https://user:secret@c:1/otlp"}, "http/protobuf https://c:1/otlp/v1/traces"),
        ({TRACES + "ENDPOINT": "https://c:1/x?key=secret"}, "http/protobuf https://c:1/x"),
        ({OTLP + "ENDPOINT": "user:secret@c:4317", OTLP + "PROTOCOL": "grpc"}, "grpc c:4317"),
        ({"OTEL_TRACES_EXPORTER": "otlp_proto_grpc", OTLP + "ENDPOINT": "http://c:1"}, "grpc http://c:1"),
    ],
)
def test_where_traces_go_in_words_without_credentials(environ: dict[str, str], words: str) -> None:
    assert read(environ).describe_traces() == words


def test_a_credential_provider_is_for_the_sdk_and_for_traces() -> None:
    environ = {OTLP + "ENDPOINT": "http://c:1", "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER": "gcp"}
    ours = read({OTLP + "ENDPOINT": "http://c:1"}).traces
    assert ours.collector is not None
    assert read(environ).traces == SignalExport(sdk_collectors=(ours.collector,))
    assert read(environ).metrics.collector is not None


@pytest.mark.parametrize(
    ("exporter", "seconds"),
    [("otlp", 5.0), ("console", 5.0), ("console,prometheus,otlp,none", 5.0), ("prometheus", 60.0)],
)
def test_the_interval_is_that_of_metrics_which_are_exported(exporter: str, seconds: float) -> None:
    environ = {"OTEL_METRICS_EXPORTER": exporter, "OTEL_METRIC_EXPORT_INTERVAL": "5000"}
    assert read(environ).metrics_interval_seconds == seconds


@pytest.mark.parametrize(("preference", "is_allowed"), [("cumulative", True), ("Cumulative", True), ("delta", False)])
def test_sums_of_metrics_are_cumulative(preference: str, is_allowed: bool) -> None:
    environ = {"OTEL_METRICS_EXPORTER": "otlp", OTLP + "METRICS_TEMPORALITY_PREFERENCE": preference}
    if is_allowed:
        assert read(environ).metrics.collector is not None
    else:
        with pytest.raises(TelemetrySettingError, match="allowed is cumulative"):
            read(environ)


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({}, "otel-smtp"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours"}, "ours"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test"}, "otel-smtp"),
    ],
)
def test_the_service_has_a_name(environ: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    assert own_resource().attributes["service.name"] == name


def test_variables_of_a_signal_that_is_not_exported_are_ignored() -> None:
    for wrong in (OTLP + "COMPRESSION", "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_METRIC_EXPORT_INTERVAL"):
        assert read({wrong: "wrong"}).collectors == ()
