"""Set-up by the standard variables, and the way of spans to a real receiver."""

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

from otel_smtp.telemetry.setup import (
    Telemetry,
    TelemetryOptions,
    set_up,
)
from tests.support.otlp_receiver import Fault, FaultKind, OtlpReceiver, named
from tests.telemetry.driving import Client


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def one_mail(telemetry: Telemetry) -> None:
    Client(telemetry.observers).ehlo().message().quit()


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


@pytest.mark.asyncio
async def test_a_span_of_many_events_is_sent_at_the_end_too(receiver: OtlpReceiver) -> None:
    telemetry = set_up(TelemetryOptions(version="1.2.3"), {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint})
    client = Client(telemetry.observers).ehlo()
    for _ in range(40):
        client.message()
    client.quit()
    telemetry.finish()  # on the loop, as a gateway that stops does
    assert await asyncio.to_thread(telemetry.flush_and_shutdown, 10)
    [connection] = named(receiver.wait_for_spans(81), "smtp.connection")
    assert len(connection.event_names) == 162


@pytest.mark.parametrize("exporter", ["otlp", "otlp_proto_http"])
def test_a_processor_of_the_sdk_sees_what_the_collector_sees(
    receiver: OtlpReceiver, exporter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint, "OTEL_TRACES_EXPORTER": exporter}
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http_endpoint)  # the SDK's exporter reads it itself
    memory = InMemorySpanExporter()
    options = TelemetryOptions(version="1.2.3", processors=[SimpleSpanProcessor(memory)])
    telemetry = set_up(options, environ)
    Client(telemetry.observers).ehlo().message().rset().message(f"00-{'a' * 32}-{'b' * 16}-01").quit()
    assert telemetry.flush_and_shutdown(10)
    received = {span.span_id: span for span in receiver.wait_for_spans(5)}
    seen = memory.get_finished_spans()
    assert len(seen) == len(received) == 5
    for span in seen:
        context, parent = span.get_span_context(), span.parent
        assert context is not None
        other = received[format_span_id(context.span_id)]
        assert other.trace_id == format_trace_id(context.trace_id)
        assert other.parent_span_id == ("" if parent is None else format_span_id(parent.span_id))
        assert (other.name, other.kind, other.status) == (span.name, span.kind.name, span.status.status_code.name)
        assert (other.start_ns, other.end_ns) == (span.start_time, span.end_time)
        assert other.attributes == plain(span.attributes)
        assert other.resource == plain(span.resource.attributes)
        assert [(event.name, event.time_ns, event.attributes) for event in other.events] == [
            (event.name, event.timestamp, plain(event.attributes)) for event in span.events
        ]
        assert [(link.span_id, link.attributes, link.is_remote) for link in other.links] == [
            (format_span_id(link.context.span_id), plain(link.attributes), link.context.is_remote)
            for link in span.links
        ]


def plain(attributes: Mapping[str, object] | None) -> dict[str, object]:
    """Attributes as a receiver has them: sequences are lists."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in (attributes or {}).items()}


def test_a_dead_collector_costs_spans_which_are_counted_and_no_time(receiver: OtlpReceiver) -> None:
    receiver.refuse()
    telemetry = set_up(TelemetryOptions(), {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint})
    assert 'smtp_telemetry_drop_reason="export_failed",smtp_telemetry_signal="traces"} 0.0' in page(telemetry)
    one_mail(telemetry)
    assert telemetry.flush_and_shutdown(10)
    assert 'smtp_telemetry_drop_reason="export_failed",smtp_telemetry_signal="traces"} 3.0' in page(telemetry)


def test_a_black_hole_holds_the_end_no_longer_than_its_budget(receiver: OtlpReceiver) -> None:
    receiver.fault = Fault(FaultKind.BLACK_HOLE)
    telemetry = set_up(TelemetryOptions(), {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint})
    one_mail(telemetry)
    began = time.monotonic()
    telemetry.flush_and_shutdown(0.2)
    assert time.monotonic() - began < 5
    assert sum(float(line.rpartition(" ")[2]) for line in page(telemetry).splitlines()) == 3
    receiver.fault = Fault()


def page(telemetry: Telemetry) -> str:
    return "\n".join(
        ",".join(sorted(line.partition("{")[2].partition("}")[0].split(","))) + "}" + line.rpartition("}")[2]
        for line in telemetry.metrics_page("text/plain")[0].decode().splitlines()
        if line.startswith("smtp_telemetry_dropped_total")
    )


FIRST_SPAN = """
import sys
from otel_smtp.telemetry.setup import TelemetryOptions, set_up
telemetry = set_up(TelemetryOptions(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
found = {"google.protobuf", "grpc", "httpx", "requests"} & sys.modules.keys()
assert not found, found
"""


def test_setting_up_imports_nothing_that_only_exporting_needs() -> None:
    subprocess.run([sys.executable, "-c", FIRST_SPAN], check=True, timeout=60)


def test_without_an_endpoint_nothing_is_dialled_and_traces_have_ids() -> None:
    telemetry = set_up(TelemetryOptions(), {})
    assert telemetry.traces_to.startswith("nowhere")
    client = Client(telemetry.observers).ehlo().mail()
    assert client.transaction is not None
    trace_id = client.trace_id()
    assert trace_id is not None
    assert len(trace_id) == 32


def test_a_disabled_sdk_observes_nothing() -> None:
    client = Client(set_up(TelemetryOptions(), {"OTEL_SDK_DISABLED": "True"}).observers).ehlo().mail()
    assert client.transaction is not None
    assert client.trace_id() is None


def test_what_cannot_be_used_stops_nothing() -> None:
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4318",
        "OTEL_TRACES_EXPORTER": "jaeger",
        "OTEL_SDK_DISABLED": "1",
        "OTEL_TRACES_SAMPLER": "traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "2",
    }
    telemetry = set_up(TelemetryOptions(), environ)
    assert telemetry.traces_to.startswith("nowhere")
    assert Client(telemetry.observers).ehlo().mail().trace_id() is not None


def test_the_sdk_says_as_much_as_the_operator_wants() -> None:
    logger = logging.getLogger("opentelemetry")
    before = logger.level
    try:
        set_up(TelemetryOptions(), {"OTEL_LOG_LEVEL": "critical"})
        assert logger.level == logging.CRITICAL
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, ""),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, ""),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_on"}, ""),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, "sampler leaves out"),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, "TraceIdRatioBased{0.25}"),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, "sampler leaves out"),
        ({"OTEL_SDK_DISABLED": "true"}, "OTEL_SDK_DISABLED is set"),
    ],
)
def test_who_looks_for_a_mail_is_told_which_have_no_trace(environ: Mapping[str, str], words: str) -> None:
    told = set_up(TelemetryOptions(), environ).leaves_out
    assert words in told
    assert bool(told) is bool(words)


def full_pipe() -> tuple[int, int]:
    """A pipe that nothing more can be written to without waiting."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b" " * 65536)
    os.set_blocking(writer, True)
    return reader, writer


def test_on_the_console_spans_and_metrics_wait_for_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = full_pipe()
    before = threading.enumerate()
    with open(writer, "w") as blocked:
        monkeypatch.setattr(sys, "stdout", blocked)
        telemetry = set_up(TelemetryOptions(), {"OTEL_TRACES_EXPORTER": "console", "OTEL_METRICS_EXPORTER": "console"})
        telemetry.start()
        mails = threading.Thread(target=lambda: one_mail(telemetry), daemon=True)
        mails.start()
        mails.join(30)
        assert not mails.is_alive()
        ending = threading.Thread(target=telemetry.flush_and_shutdown, daemon=True)
        ending.start()
        ending.join(30)
        assert not ending.is_alive()
        os.close(reader)
        for thread in threading.enumerate():
            # It must not write to whatever has this descriptor next.
            if thread.name == "log-lines" and thread not in before:
                thread.join(30)


def test_on_the_console_spans_are_json(capfd: pytest.CaptureFixture[str]) -> None:
    telemetry = set_up(TelemetryOptions(), {"OTEL_TRACES_EXPORTER": "console"})
    one_mail(telemetry)
    assert telemetry.flush_and_shutdown(10)
    told = capfd.readouterr().out
    assert [told.count(f'"name": "smtp.{name}"') for name in ("connection", "transaction", "delivery")] == [1, 1, 1]
