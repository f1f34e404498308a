"""Set-up by the standard variables, and the way of spans to a real receiver."""

from collections.abc import Iterator

import pytest

from otel_smtp.telemetry.environment import TelemetrySettingError
from otel_smtp.telemetry.setup import (
    Telemetry,
    TelemetryOptions,
    describe_destination,
    set_up,
)
from tests.support.otlp_receiver import OtlpReceiver, named
from tests.telemetry.driving import Client


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def one_mail(telemetry: Telemetry) -> None:
    Client(telemetry.observer).ehlo().message().quit()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_mail_arrives_at_a_receiver_as_three_spans(
    receiver: OtlpReceiver, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    telemetry = set_up(TelemetryOptions(version="1.2.3"), environ)
    one_mail(telemetry)
    assert telemetry.flush_and_shutdown(10)
    spans = receiver.wait_for_spans(3)
    [connection], [transaction], [delivery] = (
        named(spans, f"smtp.{name}") for name in ("connection", "transaction", "delivery")
    )
    assert (connection.kind, transaction.kind, delivery.kind) == ("SERVER", "INTERNAL", "CLIENT")
    assert {span.trace_id for span in spans} == {connection.trace_id}
    assert (transaction.parent_span_id, delivery.parent_span_id) == (connection.span_id, transaction.span_id)
    assert connection.event_names == [
        f"smtp.state.{state}" for state in ("new", "active", "data", "active", "idle", "closed")
    ]
    assert all(span.dropped == 0 for span in spans)
    assert connection.resource["service.name"] == "otel-smtp"
    assert connection.scope == "otel_smtp"


def test_without_an_endpoint_nothing_is_dialled_and_traces_have_ids() -> None:
    telemetry = set_up(TelemetryOptions(), {})
    assert describe_destination({}).startswith("nowhere")
    client = Client(telemetry.observer).ehlo().mail()
    assert client.transaction is not None
    trace_id = client.transaction.trace_id()
    assert trace_id is not None
    assert len(trace_id) == 32


def test_a_disabled_sdk_observes_nothing() -> None:
    client = Client(set_up(TelemetryOptions(), {"OTEL_SDK_DISABLED": "True"}).observer).ehlo().mail()
    assert client.transaction is not None
    assert client.transaction.trace_id() is None


BAD = [
    ("OTEL_TRACES_EXPORTER", "jaeger", "none, console, otlp"),
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "http/protobuf, grpc"),
    ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "udp", "http/protobuf, grpc"),
    ("OTEL_SDK_DISABLED", "yes", "true, false"),
    ("OTEL_TRACES_SAMPLER", "sometimes", "parentbased_always_on"),
]


@pytest.mark.parametrize(("variable", "value", "allowed"), BAD)
def test_a_value_that_cannot_be_followed_names_its_variable(variable: str, value: str, allowed: str) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", variable: value}
    with pytest.raises(TelemetrySettingError) as caught:
        set_up(TelemetryOptions(), environ)
    assert variable in str(caught.value)
    assert allowed in str(caught.value)
    assert caught.value.variable == variable


def test_a_sampler_needs_a_number_between_0_and_1() -> None:
    environ = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"}
    with pytest.raises(TelemetrySettingError, match="OTEL_TRACES_SAMPLER_ARG='2'"):
        set_up(TelemetryOptions(), environ)
