"""OTEL_* variables of exporting: what they mean, and how wrong ones are told."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from opentelemetry.sdk import environment_variables

from otel_smtp.telemetry.collector import CollectorSettings, Compression, Protocol
from otel_smtp.telemetry.environment import (
    Environment,
    ExemplarFilter,
    SignalExport,
    Temporality,
    own_resource,
    read,
    without,
)
from otel_smtp.telemetry.setup import TelemetryOptions, set_up

OTLP, TRACES = "OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_"
GRPC = {OTLP + "PROTOCOL": "grpc"}
DEFAULT_SAMPLER = read({}).sampler.get_description()

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
    # 0: no limit; of one request, what its batch has.
    ({OTLP + "TIMEOUT": "0"}, "request_seconds", 30.0),
    ({OTLP + "TIMEOUT": "3", TRACES + "TIMEOUT": "0.0", "OTEL_BSP_EXPORT_TIMEOUT": "50000"}, "request_seconds", 50.0),
    ({"OTEL_BSP_EXPORT_TIMEOUT": "0"}, "export_seconds", 2.0**31 / 1000),
    ({"OTEL_BSP_EXPORT_TIMEOUT": "0"}, "request_seconds", 10.0),
]


@pytest.mark.parametrize(("environ", "field", "value"), BATCH)
def test_a_variable_sets_how_spans_travel(environ: dict[str, str], field: str, value: float) -> None:
    asked = read({"OTEL_TRACES_EXPORTER": "otlp", **environ})
    assert getattr(asked.traces.batches, field) == value
    assert asked.problems == ()


# Each variable that is read: a good value, a bad one, what the good one makes of `shown`, and what it is without.
Shown = Callable[[Environment], object]


def of_traces(what: Callable[[CollectorSettings], object]) -> Shown:
    def shown(asked: Environment) -> object:
        assert asked.traces.collector is not None
        return what(asked.traces.collector)

    return shown


def of_signal(signal: str, what: Callable[[CollectorSettings], object]) -> Shown:
    def shown(asked: Environment) -> object:
        collector = getattr(asked, signal).collector
        return None if collector is None else what(collector)

    return shown


VARIABLES: list[tuple[str, str, str, Shown, object, object]] = [
    ("OTEL_SDK_DISABLED", "TRUE", "1", lambda asked: asked.is_disabled, True, False),
    ("OTEL_TRACES_EXPORTER", "console", "zipkin", lambda asked: asked.traces.to_console, True, False),
    ("OTEL_METRICS_EXPORTER", "Console", "statsd", lambda asked: asked.metrics.to_console, True, False),
    ("OTEL_LOGS_EXPORTER", "none", "syslog", lambda asked: asked.logs.collector is None, True, False),
    (OTLP + "PROTOCOL", "GRPC", "http/json", of_traces(lambda one: one.protocol), Protocol.GRPC, Protocol.HTTP),
    (OTLP + "COMPRESSION", "gzip", "zstd", of_traces(lambda one: one.compression), Compression.GZIP, Compression.NONE),
    (OTLP + "TIMEOUT", "3", "soon", lambda asked: asked.traces.batches.request_seconds, 3.0, 10.0),
    (OTLP + "HEADERS", "a=b", "secret", of_traces(lambda one: one.headers), (("a", "b"),), ()),
    *[
        row
        for name in ("traces", "metrics", "logs")
        for row in (
            (
                f"{OTLP}{name.upper()}_ENDPOINT",
                "http://c:1/x",
                "c:1",
                of_signal(name, lambda one: one.endpoint),
                "http://c:1/x",
                f"http://general:4318/v1/{name}",
            ),
            (
                f"{OTLP}{name.upper()}_PROTOCOL",
                "grpc",
                "udp",
                of_signal(name, lambda one: one.protocol),
                Protocol.GRPC,
                Protocol.HTTP,
            ),
            (
                f"{OTLP}{name.upper()}_COMPRESSION",
                "deflate",
                "br",
                of_signal(name, lambda one: one.compression),
                Compression.DEFLATE,
                Compression.NONE,
            ),
            (f"{OTLP}{name.upper()}_HEADERS", "a=b", "=b", of_signal(name, lambda one: one.headers), (("a", "b"),), ()),
            (
                f"{OTLP}{name.upper()}_TIMEOUT",
                "2.5",
                "-1",
                lambda asked, name=name: getattr(asked, name).batches.request_seconds,
                2.5,
                10.0,
            ),
        )
    ],
    ("OTEL_BSP_MAX_QUEUE_SIZE", "100", "many", lambda asked: asked.traces.batches.queue_spans, 100, 16_384),
    ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "64", "20000", lambda asked: asked.traces.batches.batch_spans, 64, 2048),
    ("OTEL_BSP_SCHEDULE_DELAY", "200", "inf", lambda asked: asked.traces.batches.delay_seconds, 0.2, 5.0),
    ("OTEL_BSP_EXPORT_TIMEOUT", "12000", "-1", lambda asked: asked.traces.batches.export_seconds, 12.0, 30.0),
    ("OTEL_BLRP_MAX_QUEUE_SIZE", "100", "0", lambda asked: asked.logs.batches.queue_spans, 100, 16_384),
    ("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "64", "0.5", lambda asked: asked.logs.batches.batch_spans, 64, 2048),
    ("OTEL_BLRP_SCHEDULE_DELAY", "200", "nan", lambda asked: asked.logs.batches.delay_seconds, 0.2, 1.0),
    ("OTEL_BLRP_EXPORT_TIMEOUT", "12000", "x", lambda asked: asked.logs.batches.export_seconds, 12.0, 30.0),
    ("OTEL_METRIC_EXPORT_INTERVAL", "5000", "often", lambda asked: asked.metrics_interval_seconds, 5.0, 60.0),
    ("OTEL_METRIC_EXPORT_TIMEOUT", "2000", "x", lambda asked: asked.metrics.batches.request_seconds, 2.0, 10.0),
    (
        OTLP + "METRICS_TEMPORALITY_PREFERENCE",
        "Delta",
        "sometimes",
        lambda asked: asked.temporality,
        Temporality.DELTA,
        Temporality.CUMULATIVE,
    ),
    (
        "OTEL_METRICS_EXEMPLAR_FILTER",
        "always_off",
        "often",
        lambda asked: asked.exemplars,
        ExemplarFilter.ALWAYS_OFF,
        ExemplarFilter.TRACE_BASED,
    ),
    (
        "OTEL_TRACES_SAMPLER",
        "always_off",
        "parentbased_jaeger_remote",
        lambda asked: asked.sampler.get_description(),
        "AlwaysOffSampler",
        DEFAULT_SAMPLER,
    ),
    ("OTEL_LOG_LEVEL", "ERROR", "loud", lambda asked: asked.sdk_log_level, logging.ERROR, None),
]
# What is looked at, and changes nothing: a good value and a bad one.
LOOKED_AT = [
    ("OTEL_PROPAGATORS", "tracecontext,baggage", "b3"),
    ("OTEL_PROPAGATORS", "none", "jaeger,xray"),
    ("OTEL_ATTRIBUTE_COUNT_LIMIT", "64", "-1"),
    ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "64", "x"),
    ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "64", "x"),
    ("OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "64", "x"),
    ("OTEL_SPAN_EVENT_COUNT_LIMIT", "64", "x"),
    ("OTEL_SPAN_LINK_COUNT_LIMIT", "64", "x"),
    ("OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "64", "x"),
    ("OTEL_LINK_ATTRIBUTE_COUNT_LIMIT", "64", "x"),
    ("OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT", "64", "x"),
    ("OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT", "64", "x"),
    (
        OTLP + "METRICS_DEFAULT_HISTOGRAM_AGGREGATION",
        "explicit_bucket_histogram",
        "base2_exponential_bucket_histogram",
    ),
    ("OTEL_RESOURCE_ATTRIBUTES", "a=b,c=d", "secret"),
    (OTLP + "INSECURE", "False", "yes"),
    (OTLP + "TRACES_INSECURE", "true", "0"),
    (OTLP + "METRICS_INSECURE", "true", "0"),
    (OTLP + "LOGS_INSECURE", "true", "0"),
    (OTLP + "ENDPOINT", "http://general:4318", "collector:4318"),
    (OTLP + "ENDPOINT", "https://general", "ftp://collector"),
    (OTLP + "TRACES_ENDPOINT", "http://c/x", "http://"),
    (OTLP + "TRACES_ENDPOINT", "http://c/x", "http://c:port"),
    (OTLP + "TRACES_ENDPOINT", "http://c/x", "http://[::1"),
    ("OTEL_SERVICE_NAME", "anything", ""),
    ("OTEL_CONFIG_FILE", "", "/etc/otel.yaml"),
    ("OTEL_TRACES_SAMPLER_ARG", "0.5", "2"),
    *[
        (OTLP + name, __file__, bad)
        for name in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE", "METRICS_CERTIFICATE", "LOGS_CLIENT_KEY")
        for bad in ("/no/such.pem", os.path.dirname(__file__))
    ],
]

GENERAL = {OTLP + "ENDPOINT": "http://general:4318"}


@pytest.mark.parametrize(("variable", "good", "bad", "shown", "with_it", "without"), VARIABLES)
def test_a_variable_counts_and_a_value_that_cannot_be_used_is_as_if_it_were_absent(
    variable: str, good: str, bad: str, shown: Shown, with_it: object, without: object
) -> None:
    used = read({**GENERAL, variable: good})
    assert (shown(used), used.problems) == (with_it, ())
    for absent in ({}, {variable: ""}, {variable: "  "}):
        unset = read({**GENERAL, **absent})
        assert (shown(unset), unset.problems) == (without, ())
    ignored = read({**GENERAL, variable: bad})
    assert shown(ignored) == without
    assert [problem.variable for problem in ignored.problems] == [variable]


@pytest.mark.parametrize(("variable", "good", "bad"), LOOKED_AT)
def test_a_variable_is_looked_at_whatever_is_exported(variable: str, good: str, bad: str) -> None:
    for more in ({}, GENERAL):
        assert read({**more, variable: good}).problems == ()
        assert [problem.variable for problem in read({**more, variable: bad}).problems] == [variable][: len(bad)]


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({OTLP + "PROTOCOL": "http/json"}, f"{OTLP}PROTOCOL='http/json': allowed is http/protobuf, grpc"),
        (
            {OTLP + "ENDPOINT": "user:hunter2@c:1?key=sesame"},
            f"{OTLP}ENDPOINT='c:1': allowed is a URL as http://collector:4318",
        ),
        ({OTLP + "HEADERS": "sesame"}, f"{OTLP}HEADERS: allowed is name=value, or a list of them"),
        (
            {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "200", "OTEL_BSP_MAX_QUEUE_SIZE": "100"},
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE='200': allowed is a number up to OTEL_BSP_MAX_QUEUE_SIZE, 100",
        ),
    ],
)
def test_a_problem_names_the_variable_and_what_is_allowed_and_never_a_credential(
    environ: dict[str, str], words: str
) -> None:
    assert [str(problem) for problem in read(environ).problems] == [words]


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
@pytest.mark.parametrize(
    "part",
    ["sesame", "=sesame", "a b=sesame", "a;b=c;sesame=x", "a:=sesame", "k%C3%A4se=sesame", "a%0d%0ab=sesame",
     "a=sesame%00", "a=sesame%0d%0aX: y", "a=sesame%E2%82%AC", "a=\x7fsesame"],
)  # fmt: skip
def test_a_header_that_cannot_be_sent_is_left_out_and_its_value_told_to_nobody(
    part: str, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = read({**GENERAL, OTLP + "PROTOCOL": protocol, OTLP + "HEADERS": f"good=one, {part}, too=two"})
    assert asked.traces.collector is not None
    assert asked.traces.collector.headers == (("good", "one"), ("too", "two"))
    assert [str(one) for one in asked.problems] == [f"{OTLP}HEADERS: allowed is name=value, or a list of them"]
    assert "sesame" not in repr(asked.problems) + caplog.text


@pytest.mark.parametrize(("protocol", "names"), [("http/protobuf", "!x grpc-a b-bin"), ("grpc", "")])
def test_what_a_header_may_be_called_depends_on_the_protocol(protocol: str, names: str) -> None:
    asked = read({**GENERAL, OTLP + "PROTOCOL": protocol, OTLP + "HEADERS": "!x=1,grpc-a=2,b-bin=3,C.d_e-9=4"})
    assert asked.traces.collector is not None
    assert [name for name, _ in asked.traces.collector.headers] == [*names.split(), "c.d_e-9"]


def test_what_is_wrong_in_the_signals_own_variable_leaves_that_for_all() -> None:
    environ = {**GENERAL, OTLP + "COMPRESSION": "gzip", TRACES + "COMPRESSION": "br", OTLP + "TIMEOUT": "4"}
    asked = read({**environ, TRACES + "ENDPOINT": "nowhere", TRACES + "TIMEOUT": "-1"})
    assert asked.traces.collector is not None
    assert asked.traces.collector.compression is Compression.GZIP
    assert asked.traces.collector.endpoint == "http://general:4318/v1/traces"
    assert asked.traces.batches.request_seconds == 4.0
    assert {problem.variable for problem in asked.problems} == {
        TRACES + "COMPRESSION",
        TRACES + "ENDPOINT",
        TRACES + "TIMEOUT",
    }


def test_a_certificate_that_is_not_there_is_reported_and_looked_for_at_each_connection() -> None:
    asked = read({**GENERAL, OTLP + "CERTIFICATE": "/no/such.pem", TRACES + "CLIENT_KEY": "/no/key"})
    assert asked.traces.collector is not None
    assert (asked.traces.collector.certificate, asked.traces.collector.client_key) == ("/no/such.pem", "/no/key")
    assert [str(problem) for problem in asked.problems] == [
        f"{OTLP}CERTIFICATE='/no/such.pem': allowed is the path of a file that this user can read",
        f"{TRACES}CLIENT_KEY='/no/key': allowed is the path of a file that this user can read",
    ]


def test_of_a_list_of_exporters_those_count_that_exist() -> None:
    asked = read({"OTEL_TRACES_EXPORTER": "console,zipkin", **GENERAL})
    assert (asked.traces.to_console, asked.traces.collector) == (True, None)
    assert [problem.variable for problem in asked.problems] == ["OTEL_TRACES_EXPORTER"]


def test_over_grpc_nothing_is_deflated_and_everything_that_grpc_knows_is_an_endpoint() -> None:
    asked = read({**GRPC, **GENERAL, OTLP + "COMPRESSION": "deflate"})
    assert [problem.variable for problem in asked.problems] == [OTLP + "COMPRESSION"]
    for endpoint in ("c:4317", "dns:///c:4317", "unix:/run/c", "https://c"):
        assert read({**GRPC, OTLP + "ENDPOINT": endpoint}).problems == ()
    assert len(read({**GRPC, OTLP + "ENDPOINT": "c d"}).problems) == 1


def test_a_timeout_that_was_meant_in_milliseconds_is_no_longer_than_a_batch_is_tried() -> None:
    asked = read({**GENERAL, OTLP + "TIMEOUT": "10000", "OTEL_METRIC_EXPORT_INTERVAL": "15000"})
    assert asked.traces.batches.request_seconds == asked.traces.batches.export_seconds == 30.0
    assert asked.metrics.batches.request_seconds == 15.0


def test_a_disabled_sdk_has_no_problems() -> None:
    assert read({"OTEL_SDK_DISABLED": "true", "OTEL_BSP_SCHEDULE_DELAY": "x"}).problems == ()


def test_the_sdks_exporters_do_not_see_what_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "x")
    monkeypatch.setenv(OTLP + "TIMEOUT", "3")
    monkeypatch.setenv(OTLP + "HEADERS", "a=b,wrong")
    monkeypatch.setenv(OTLP + "CERTIFICATE", "/no/such.pem")
    monkeypatch.setenv("OTEL_BSP_EXPORT_TIMEOUT", " 0.0")
    with without(read().problems):
        assert "OTEL_BSP_SCHEDULE_DELAY" not in os.environ
        assert "OTEL_BSP_EXPORT_TIMEOUT" not in os.environ
        assert os.environ[OTLP + "TIMEOUT"] == "3"
        assert os.environ[OTLP + "HEADERS"] == "a=b,wrong"
        assert os.environ[OTLP + "CERTIFICATE"] == "/no/such.pem"  # it may be there at the next export
    assert os.environ["OTEL_BSP_SCHEDULE_DELAY"] == "x"


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
    [("otlp", 5.0), ("console", 5.0), ("console,prometheus,otlp,none", 5.0)],
)
def test_the_interval_is_that_of_metrics_which_are_exported(exporter: str, seconds: float) -> None:
    environ = {"OTEL_METRICS_EXPORTER": exporter, "OTEL_METRIC_EXPORT_INTERVAL": "5000"}
    assert read(environ).metrics_interval_seconds == seconds


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


def test_octets_that_are_not_utf8_stay_out_of_the_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "caf\udce9")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=\udcffx,process.pid=7")
    about = own_resource().attributes
    assert (about["service.name"], about["team"]) == ("caf?", "?x")
    page, _ = set_up(TelemetryOptions()).metrics_page("text/plain")
    assert b'service_name="caf?"' in page


def test_the_resource_names_host_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a host Jaeger takes the clocks of attempts from the spool for skewed, and moves them."""
    monkeypatch.delenv("OTEL_RESOURCE_ATTRIBUTES", raising=False)
    about = own_resource().attributes
    assert (about["host.name"], about["process.pid"]) == (socket.gethostname(), os.getpid())
    assert own_resource(0).attributes["service.instance.id"]
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.name=given,process.pid=7")
    about = own_resource().attributes
    assert (about["host.name"], about["process.pid"]) == ("given", "7")


def test_the_resource_names_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_RESOURCE_ATTRIBUTES", raising=False)
    assert own_resource(version="1.2.3").attributes["service.version"] == "1.2.3"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.version=given")
    assert own_resource(version="1.2.3").attributes["service.version"] == "given"


def test_an_id_that_is_given_to_several_workers_names_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=pod-7")
    found = [own_resource(worker).attributes["service.instance.id"] for worker in (None, 0, 1)]
    assert found == ["pod-7", "pod-7-0", "pod-7-1"]


def test_no_variable_keeps_the_package_from_being_imported() -> None:
    """The SDK reads one of them while it is imported, and raises at a value that it cannot use."""
    variables = [name for name in vars(environment_variables) if name.startswith("OTEL_")]
    assert "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT" in variables
    environ = {**os.environ, **dict.fromkeys(variables, "no such thing"), "PYTHONWARNINGS": "error"}
    code = "import os, otel_smtp.gateway; print(os.environ['OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT'])"
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("no such thing\n", "")


NO_TEXT = "\udce4"  # an octet that is not UTF-8, as the environment of a process has it


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_an_endpoint_that_is_not_utf_8_is_no_endpoint(protocol: str) -> None:
    variables = {OTLP + "PROTOCOL": protocol, OTLP + "ENDPOINT": f"http://c/{NO_TEXT}"}
    asked = read({**variables, "OTEL_TRACES_SAMPLER": NO_TEXT, "OTEL_BSP_SCHEDULE_DELAY": NO_TEXT})
    assert [problem.variable for problem in asked.problems] == [
        OTLP + "ENDPOINT", "OTEL_BSP_SCHEDULE_DELAY", "OTEL_TRACES_SAMPLER"
    ]  # fmt: skip
    assert asked.collectors == ()
    for shown in (asked.describe_traces(), *map(str, asked.problems)):
        assert shown.encode()
