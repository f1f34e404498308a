"""Our own OTLP encoding: the same message as the SDK's exporter makes of the same spans."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanKind

from otel_smtp.smtp.states import TlsMode
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import ATTRIBUTES, SCHEMA_URL, SCOPE_NAME, Type
from otel_smtp.telemetry.otlp import TraceEncoder, varint
from otel_smtp.telemetry.propagation import InboundPolicy, TraceContext
from otel_smtp.telemetry.records import EventRecord, EventShape, LinkRecord, SpanRecord
from otel_smtp.telemetry.sdk_spans import readable_span
from otel_smtp.telemetry.tracing import Tracing
from tests.telemetry.driving import Client, Kept

VERSION = "1.2.3"
RESOURCE = Resource(
    {"service.name": "gw", "process.pid": 4711, "process.command_args": ("otel-smtp", "serve"), "is.test": True},
    "https://opentelemetry.io/schemas/1.39.0",
)


def of_the_sdk(records: Sequence[SpanRecord], resource: Resource = RESOURCE) -> Message:
    scope = InstrumentationScope(SCOPE_NAME, VERSION, SCHEMA_URL)
    return encode_spans([readable_span(record, resource, scope) for record in records])


def ours(records: Sequence[SpanRecord], resource: Resource = RESOURCE) -> Message:
    encoder = TraceEncoder(resource, VERSION)
    return ExportTraceServiceRequest.FromString(encoder.request([encoder.span(record) for record in records]))


def canonical(message: Message) -> bytes:
    """Equal for equal messages, NaN included."""
    return message.SerializeToString(deterministic=True)


# Any value of any type -----------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
integers = st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(-2, 300))
scalars = st.one_of(texts, st.booleans(), integers, st.floats())
values: st.SearchStrategy[Any] = st.one_of(
    scalars, st.lists(st.one_of(texts, st.booleans(), integers, st.floats()), max_size=4).map(tuple)
)
_OF_TYPE: dict[Type, st.SearchStrategy[Any]] = {
    Type.STRING: texts,
    Type.INT: integers,
    Type.DOUBLE: st.floats(),
    Type.BOOLEAN: st.booleans(),
    Type.STRINGS: st.lists(texts, max_size=4).map(tuple),
}
# Names that are none of ours hold anything; one of ours holds what the schema says.
attributes: st.SearchStrategy[dict[str, Any]] = st.builds(
    lambda own, other: {**own, **other},
    st.fixed_dictionaries({}, optional={name: _OF_TYPE[told.type] for name, told in ATTRIBUTES.items()}),
    st.dictionaries(st.sampled_from(["a", "b", "c.d", "é"]), values),
)
few_attributes = st.dictionaries(st.sampled_from(["a", "b", "smtp.x"]), values)
states = st.one_of(st.just(""), st.sampled_from(["a=1", "vendor=some value,b@c=x/y", "k=" + "v" * 250]))
contexts = st.builds(
    TraceContext,
    st.integers(1, (1 << 128) - 1),
    st.integers(1, (1 << 64) - 1),
    st.integers(0, 3),
    st.booleans(),
    states,
)
times = st.integers(0, (1 << 63) - 1)
shapes = st.builds(EventShape, texts, st.dictionaries(st.sampled_from(["s", "t", "smtp.state"]), values))
events = st.builds(EventRecord, times, shapes, few_attributes.map(lambda pairs: tuple(pairs.items())))
records = st.builds(
    SpanRecord,
    st.one_of(texts, st.sampled_from([names.SPAN_CONNECTION, names.SPAN_DELIVERY])),
    st.sampled_from(SpanKind),
    contexts,
    st.one_of(st.none(), contexts),
    times,
    times,
    attributes,
    st.lists(events, max_size=4),
    st.lists(st.builds(LinkRecord, contexts, few_attributes), max_size=3),
    st.booleans(),
    st.just(True),
)


def span(**more: Any) -> SpanRecord:
    plain = SpanRecord("n", SpanKind.SERVER, TraceContext(1, 2, 1), None, 1, 2, {}, (), (), False, True)
    return plain._replace(**more)


@given(st.lists(records, max_size=3))
@example([])
@example([span(attributes={"a": 1}), span(attributes={"a": True}), span(attributes={"a": 1.0})])
@example([span(attributes={"a": 0.0}), span(attributes={"a": -0.0}), span(attributes={"a": math.nan})])
@example([span(attributes={"a": "", "b": 0, "c": False, "d": ()})])
@example([span(attributes={"a": (1, True, 1.0, "1")}), span(attributes={"a": 1 << 63})])
@example([span(context=TraceContext(1, 2, 1, False, "a=1"), parent=TraceContext(1, 3, 1, True, "b=2"))])
def test_the_message_is_that_of_the_sdks_exporter(given_records: list[SpanRecord]) -> None:
    # The SDK writes no resource where there is no span; nobody sends such a request.
    if given_records:
        assert canonical(ours(given_records)) == canonical(of_the_sdk(given_records))


@given(records)
def test_what_is_cached_is_what_was_made(record: SpanRecord) -> None:
    encoder = TraceEncoder(RESOURCE, VERSION)
    assert encoder.span(record) == encoder.span(record)


@given(few_attributes)
def test_any_resource_is_that_of_the_sdks_exporter(about: dict[str, Any]) -> None:
    resource = Resource(about)
    assert canonical(ours([span()], resource)) == canonical(of_the_sdk([span()], resource))


# Real traces ---------------------------------------------------------------------------------------------------------


def real_records() -> list[SpanRecord]:
    kept = Kept()
    tracing = Tracing(sinks=[kept], policies={"joined": InboundPolicy.PARENT, "linked": InboundPolicy.LINK})
    remote = f"00-{'a' * 32}-{'b' * 16}-01"
    Client(tracing, tls_mode=TlsMode.STARTTLS).ehlo().starttls().ehlo().auth().message().rset().message().quit()
    Client(tracing, listener="joined").ehlo().message(remote, tracestate="vendor=1").quit()
    Client(tracing, listener="linked").ehlo().message(remote).close()
    return kept.records


def test_real_traces_are_those_of_the_sdks_exporter_to_the_octet_count() -> None:
    kept = real_records()
    encoder = TraceEncoder(RESOURCE, VERSION)
    assert canonical(ours(kept)) == canonical(of_the_sdk(kept))
    assert len(encoder.request([encoder.span(record) for record in kept])) == of_the_sdk(kept).ByteSize()


def test_an_event_shape_is_encoded_once_and_told_apart_from_its_equal() -> None:
    first, second = EventShape("first", {"a": "x"}), EventShape("second", {"a": "x"})
    kept = [span(events=[EventRecord(at, shape, ()) for at in (1, 2) for shape in (first, second)])]
    assert canonical(ours(kept)) == canonical(of_the_sdk(kept))


# What must not go wrong ----------------------------------------------------------------------------------------------


def test_a_lone_surrogate_costs_one_character_and_no_batch() -> None:
    sent = ours([span(name="a\ud800b", attributes={"x": "\udcff"}), span()])
    assert isinstance(sent, ExportTraceServiceRequest)
    [first, second] = sent.resource_spans[0].scope_spans[0].spans
    assert (first.name, first.attributes[0].value.string_value) == ("a?b", "?")
    assert second.name == "n"


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1, object(), ("a", object())])
def test_what_no_attribute_can_hold_is_left_out_alone(value: Any) -> None:
    sent = ours([span(attributes={"bad": value, "good": 1})])
    assert isinstance(sent, ExportTraceServiceRequest)
    assert [pair.key for pair in sent.resource_spans[0].scope_spans[0].spans[0].attributes] == ["good"]


def test_the_caches_have_a_bound_and_what_is_made_anew_is_the_same() -> None:
    encoder = TraceEncoder(RESOURCE, VERSION)
    odd = span(name="again", attributes={"k": "v", "d": 0.5}, events=[EventRecord(1, EventShape("e", {"k": 1}), ())])
    before = encoder.span(odd)
    for number in range(5000):
        shape = EventShape(f"e{number}", {"k": f"v{number}"})
        encoder.span(
            span(
                name=f"n{number}", attributes={"k": f"v{number}", f"d{number}": 0.5}, events=[EventRecord(1, shape, ())]
            )
        )
    assert encoder.held <= 3 * 4096 + 4 * 2048
    assert encoder.span(odd) == before


@pytest.mark.parametrize(
    ("value", "octets"), [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (2**64 - 1, "ff" * 9 + "01")]
)
def test_a_varint_has_seven_bits_an_octet(value: int, octets: str) -> None:
    assert varint(value).hex() == octets
