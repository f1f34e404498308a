"""The receiver that other tests trust: what a real exporter sends, it shows; what a fault promises, it does."""

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.trace import Link, SpanKind, StatusCode

from tests.support.otlp_receiver import HUGE_REPLY_OCTETS, Fault, FaultKind, OtlpReceiver, named


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def export_two_spans(exporter: SpanExporter) -> None:
    provider = TracerProvider(resource=Resource({"service.name": "somebody"}), shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("tests")
    outer = tracer.start_span("outer", kind=SpanKind.SERVER, attributes={"list": ["a", "b"], "number": 7})
    with tracer.start_as_current_span("inner", links=[Link(outer.get_span_context(), {"why": "test"})]) as inner:
        inner.add_event("first", {"yes": True}, timestamp=1_000)
        inner.add_event("second", {"half": 0.5}, timestamp=2_000)
        inner.set_status(StatusCode.ERROR, "broken")
    outer.end()
    provider.shutdown()


@pytest.mark.parametrize("protocol", ["http", "http+gzip", "grpc"])
def test_spans_of_a_real_exporter_are_shown_as_sent(receiver: OtlpReceiver, protocol: str) -> None:
    exporter: SpanExporter
    if protocol == "grpc":
        exporter = GrpcExporter(endpoint=receiver.grpc_endpoint, insecure=True)
    else:
        compression = Compression.Gzip if protocol == "http+gzip" else Compression.NoCompression
        exporter = HttpExporter(endpoint=f"{receiver.http_endpoint}/v1/traces", compression=compression)
    export_two_spans(exporter)
    spans = receiver.wait_for_spans(2)
    [inner], [outer] = named(spans, "inner"), named(spans, "outer")
    assert (outer.kind, outer.attributes, outer.parent_span_id) == ("SERVER", {"list": ["a", "b"], "number": 7}, "")
    assert [(event.name, event.time_ns, event.attributes) for event in inner.events] == [
        ("first", 1_000, {"yes": True}),
        ("second", 2_000, {"half": 0.5}),
    ]
    assert (inner.status, inner.status_message) == ("ERROR", "broken")
    assert [(link.trace_id, link.span_id, link.attributes) for link in inner.links] == [
        (outer.trace_id, outer.span_id, {"why": "test"})
    ]
    assert inner.start_ns <= inner.end_ns
    assert inner.resource["service.name"] == "somebody"


def post(receiver: OtlpReceiver, *, timeout: float = 10.0) -> int:
    request = urllib.request.Request(
        f"{receiver.http_endpoint}/v1/traces", b"", {"Content-Type": "application/x-protobuf"}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            assert len(reply.read()) in (0, HUGE_REPLY_OCTETS)
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (FaultKind.NONE, 200),
        (FaultKind.UNAVAILABLE, 503),
        (FaultKind.THROTTLED, 429),
        (FaultKind.REJECTED, 400),
        (FaultKind.SLOW, 200),
        (FaultKind.HUGE_REPLY, 200),
    ],
)
def test_a_fault_answers_as_it_says(receiver: OtlpReceiver, kind: FaultKind, status: int) -> None:
    receiver.fault = Fault(kind, seconds=0.01)
    assert post(receiver) == status
    assert receiver.requests == 1


def test_a_black_hole_reads_and_does_not_answer(receiver: OtlpReceiver) -> None:
    receiver.fault = Fault(FaultKind.BLACK_HOLE)
    with pytest.raises(TimeoutError):
        post(receiver, timeout=0.05)
    receiver.wait_for_requests(1)


def test_both_ports_refuse_and_come_back(receiver: OtlpReceiver) -> None:
    ports = [int(endpoint.rpartition(":")[2]) for endpoint in (receiver.http_endpoint, receiver.grpc_endpoint)]
    receiver.refuse()
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    receiver.come_back()
    for port in ports:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    assert post(receiver) == 200


def test_waiting_in_vain_says_what_has_arrived(receiver: OtlpReceiver) -> None:
    with pytest.raises(TimeoutError, match="spans did not arrive"):
        receiver.wait_for_spans(1, timeout=0.01)
