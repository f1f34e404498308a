"""Our own OTLP encoding: the same message as the SDK's exporter makes of the same spans."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanKind
from opentelemetry.trace.span import TraceState

from otel_smtp.observing import (
    ConnectionEnd,
    ConnectionInfo,
    ConnectionRecord,
    DeliveryPhase,
    DeliveryRecord,
    Endpoint,
    MessageKind,
    Outcome,
    TlsInfo,
    TraceHeaders,
    TransactionRecord,
)
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply
from otel_smtp.smtp.states import (
    AuthBegun,
    CloseReason,
    ConnectionOver,
    ConnState,
    ContentBegun,
    Detail,
    ErrorReply,
    ResetBy,
    ResetCause,
    StateMachine,
    TlsAgreed,
    TlsMode,
    TlsOffer,
    TransactionOver,
    Transition,
)
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import ATTRIBUTES, SCHEMA_URL, SCOPE_NAME, Type
from otel_smtp.telemetry.ordinary import OrdinaryMail
from otel_smtp.telemetry.ordinary_spooled import OrdinarySpooled
from otel_smtp.telemetry.otlp import Pairs, RequestFrame, varint
from otel_smtp.telemetry.propagation import InboundPolicy, TraceContext
from otel_smtp.telemetry.records import EventRecord, LinkRecord, SpanRecord
from otel_smtp.telemetry.redaction import Addresses, ClientIp, Redaction
from otel_smtp.telemetry.sdk_spans import readable_span
from otel_smtp.telemetry.shapes import MAX_SHAPES, Column, EncodedSpan, span_table
from otel_smtp.telemetry.tracing import Tracing
from tests.support.spans import encoded
from tests.telemetry.driving import Client, Kept, each_to

VERSION = "1.2.3"
RESOURCE = Resource(
    {"service.name": "gw", "process.pid": 4711, "process.command_args": ("otel-smtp", "serve"), "is.test": True},
    "https://opentelemetry.io/schemas/1.39.0",
)


def of_the_sdk(records: Sequence[SpanRecord], resource: Resource = RESOURCE) -> Message:
    scope = InstrumentationScope(SCOPE_NAME, VERSION, SCHEMA_URL)
    return encode_spans([readable_span(record, resource, scope) for record in records])


def request(spans: Sequence[EncodedSpan], resource: Resource = RESOURCE) -> Message:
    return ExportTraceServiceRequest.FromString(b"".join(RequestFrame(resource, VERSION).request(spans)))


def ours(records: Sequence[SpanRecord], resource: Resource = RESOURCE, constant: int = 0) -> Message:
    return request([encoded(record, constant) for record in records], resource)


def canonical(message: Message) -> bytes:
    """Equal for equal messages, NaN included."""
    return message.SerializeToString(deterministic=True)


def assert_same(ours: Message, theirs: Message) -> None:
    """Fails with what differs, as text."""
    if canonical(ours) != canonical(theirs):
        assert str(ours) == str(theirs)
        raise AssertionError(f"they differ in what text does not show: {ours}")


def shown(record: object) -> str:
    """All that a record of what happened holds: of one that was drawn, what is needed to make it by hand."""
    names_of = [name for kind in type(record).__mro__ for name in getattr(kind, "__slots__", ())]
    own = {name: getattr(record, name) for name in sorted(names_of) if name not in ("__weakref__", "_transaction")}
    return f"{type(record).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in own.items())})"


def _shown(value: object) -> str:
    match value:
        case DeliveryRecord():
            return shown(value)
        case ConnectionRecord():
            return "ConnectionRecord(...)"
        case [DeliveryRecord(), *_]:
            return f"[{', '.join(map(shown, value))}]"
    return repr(value)


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
events = st.builds(EventRecord, times, texts, few_attributes)
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
    texts,
).map(lambda record: record if record.has_failed else record._replace(description=""))


def span(**more: Any) -> SpanRecord:
    plain = SpanRecord("n", SpanKind.SERVER, TraceContext(1, 2, 1), None, 1, 2, {}, (), (), False, True)
    return plain._replace(**more)


@given(st.lists(records, min_size=1, max_size=3), st.integers(0, 3))
@example([span(attributes={"a": 1}), span(attributes={"a": True}), span(attributes={"a": 1.0})], 0)
@example([span(attributes={"a": 0.0}), span(attributes={"a": -0.0}), span(attributes={"a": math.nan})], 0)
@example([span(attributes={"a": "", "b": 0, "c": False, "d": ()})], 2)
@example([span(attributes={"a": (1, True, 1.0, "1")}), span(attributes={"a": 1 << 63})], 1)
@example([span(attributes={names.REPLY_TEXT: "x" * size}) for size in (0, 1, 80, 110, 127, 128, 256, 1030, 5000)], 0)
@example([span(attributes={"a": value}) for value in (-1, 0, 127, 128, 16383, 16384, 1 << 40)], 0)
@example([span(context=TraceContext(1, 2, 1, False, "a=1"), parent=TraceContext(1, 3, 1, True, "b=2"))], 0)
def test_the_message_is_that_of_the_sdks_exporter(given_records: list[SpanRecord], constant: int) -> None:
    assert_same(ours(given_records, constant=constant), of_the_sdk(given_records))


@given(records)
def test_what_is_cached_is_what_was_made(record: SpanRecord) -> None:
    assert encoded(record) == encoded(record)


def _texts_only(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Without arrays of anything but texts: we make no others."""
    return {
        name: value
        for name, value in attributes.items()
        if not isinstance(value, tuple) or all(isinstance(each, str) for each in value)
    }


@given(records)
def test_a_span_reads_back_as_it_was_but_for_what_otlp_does_not_tell(record: SpanRecord) -> None:
    context = record.context._replace(is_remote=False)
    record = record._replace(
        context=context,
        parent=record.parent and record.parent._replace(trace_id=context.trace_id, flags=0, trace_state=""),
        attributes=_texts_only(record.attributes),
        events=[event._replace(attributes=_texts_only(event.attributes)) for event in record.events],
        links=[
            LinkRecord(link.context._replace(flags=0, trace_state=""), _texts_only(link.attributes))
            for link in record.links
        ],
    )
    span = encoded(record)
    assert span.trace_id == context.trace_id.to_bytes(16, "big")
    assert repr(span.to_records()[0]) == repr(record._replace(context=context._replace(flags=0)))


@given(few_attributes)
def test_any_resource_is_that_of_the_sdks_exporter(about: dict[str, Any]) -> None:
    resource = Resource(about)
    assert_same(ours([span()], resource), of_the_sdk([span()], resource))


# Real traces ---------------------------------------------------------------------------------------------------------


class Both:
    """What tracing makes of what happens: octets, and values made of the same description."""

    def __init__(self, **options: Any) -> None:
        self.spans: list[EncodedSpan] = []
        self._kept = Kept()
        self.tracing = Tracing(exports=[each_to(self.spans)], sinks=[self._kept], **options)

    @property
    def records(self) -> list[SpanRecord]:
        return self._kept.records

    def check(self) -> None:
        """The octets are those that the SDK's exporter writes of the values."""
        assert self.spans
        assert_same(request(self.spans), of_the_sdk(self.records))


REMOTE = f"00-{'a' * 32}-{'b' * 16}-01"


def test_real_traces_are_those_of_the_sdks_exporter_to_the_octet_count() -> None:
    both = Both(policies={"joined": InboundPolicy.PARENT, "linked": InboundPolicy.LINK})
    tracing = both.tracing
    Client(tracing, tls_mode=TlsMode.STARTTLS).ehlo().starttls().ehlo().auth().message().rset().message().quit()
    Client(tracing, listener="joined").ehlo().message(REMOTE, tracestate="vendor=1").quit()
    Client(tracing, listener="linked").ehlo().message(REMOTE).close()
    both.check()
    assert sum(map(len, RequestFrame(RESOURCE, VERSION).request(both.spans))) == of_the_sdk(both.records).ByteSize()


codes = st.builds(EnhancedStatus, st.sampled_from([2, 4, 5]), st.integers(0, 999), st.integers(0, 999))
some_replies = st.builds(
    Reply,
    st.sampled_from([250, 354, 421, 450, 451, 550, 554]),
    st.one_of(st.none(), codes),
    st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=300), min_size=1, max_size=3).map(
        tuple
    ),
    st.one_of(st.none(), st.sampled_from(ErrorType)),
)
cleanable = st.text(max_size=300)
endpoints = st.builds(
    Endpoint,
    st.sampled_from(["192.0.2.9", "2001:db8::9", "mx.example", "/run/x.sock"]),
    st.one_of(st.none(), st.just(25)),
)
tls = st.one_of(
    st.none(), st.builds(TlsInfo, st.sampled_from(["1.2", "1.3"]), st.sampled_from(["A", "B"]), st.booleans())
)
details = st.one_of(
    st.none(),
    st.builds(TlsOffer, st.sampled_from(TlsMode)),
    st.builds(TlsAgreed, st.sampled_from(["1.2", "1.3"]), st.sampled_from(["A", "B"])),
    st.builds(AuthBegun, st.sampled_from(["PLAIN", "other"])),
    st.builds(ContentBegun, st.integers(1, 1 << 40), st.integers(0, 200)),
    st.builds(TransactionOver, st.integers(0, 1 << 21)),
    st.builds(ResetBy, st.sampled_from(ResetCause)),
    st.builds(
        ErrorReply,
        st.one_of(st.none(), st.sampled_from(["RCPT", "other"])),
        st.one_of(st.none(), some_replies),
        st.one_of(st.none(), st.sampled_from(ErrorType)),
        st.one_of(st.none(), st.integers(1, 9)),
    ),
    st.builds(ConnectionOver, st.sampled_from(CloseReason), st.integers(0, 300)),
)
# What one turn of the event loop does has one time, so equal times are the rule.
moments = st.one_of(st.sampled_from([1, 2, 3, 4]), st.integers(1, 10**15))
kinds = st.one_of(st.just(MessageKind.MAIL), st.sampled_from(MessageKind))


SOMEBODY = Recipient("x@there.example")


@st.composite
def many(draw: st.DrawFn, each: st.SearchStrategy[Any]) -> list[Any]:
    """None or few of them; or as many as are reported one by one (50), or one less or more, most of them alike."""
    some = draw(st.lists(each, max_size=2))
    if some and draw(st.integers(0, 3)) == 0:
        some += [some[-1]] * (draw(st.sampled_from([49, 50, 51])) - len(some))
    return some


# The states of a mail that goes well, with their details.
OF_A_MAIL = [
    (ConnState.ACTIVE, st.none()),
    (ConnState.DATA, st.builds(ContentBegun, st.sampled_from([1, 127, 128, 1 << 40]), st.integers(0, 200))),
    (ConnState.ACTIVE, st.none()),
    (ConnState.IDLE, st.builds(TransactionOver, st.sampled_from([0, 127, 16383, 16384]))),
]


@st.composite
def transitions(draw: st.DrawFn) -> list[Transition]:
    """Any transitions, legal or not: what the engine would do with them is not the encoder's business. Many are those
    of mails, or nearly so."""
    sequence = draw(st.sampled_from([1, 2, 125, 2045, 16381, 1 << 30]))
    at_ns = draw(moments)
    found: list[Transition] = []
    for is_mail in draw(st.lists(st.booleans(), max_size=5)):
        steps = [(state, draw(detail)) for state, detail in OF_A_MAIL] if is_mail else []
        if not is_mail or draw(st.booleans()):
            steps.insert(draw(st.integers(0, len(steps))), (draw(st.sampled_from(ConnState)), draw(details)))
        for state, detail in steps:
            previous = draw(st.one_of(st.none(), st.sampled_from(ConnState)))
            at_ns += draw(st.one_of(st.sampled_from([0, 1]), st.integers(0, 10**10)))
            found.append(Transition(state, previous, draw(st.sampled_from(ConnState)), sequence, at_ns, detail))
            sequence += 1
    return found


def test_the_events_of_mails_are_encoded_as_any_others() -> None:
    """Mails after one another, whose numbers and sequences get longer, and each with one thing that is not so."""
    both = Both()
    connection = _connection()
    both.tracing.connection_opened(connection)
    for begins, spoilt in ((1, None), (100, None), (16_300, None), *((2, place) for place in range(4))):
        machine = StateMachine(connection.transitions)
        for number in range(begins, begins + 60):
            steps: list[tuple[ConnState, Detail | None]] = [
                (ConnState.ACTIVE, None),
                (ConnState.DATA, ContentBegun(number, number % 200)),
                (ConnState.ACTIVE, None),
                (ConnState.IDLE, TransactionOver(number)),
            ]
            if machine.last is None:
                steps.insert(0, (ConnState.NEW, TlsOffer(TlsMode.OFF)))
            elif spoilt is not None:
                steps[spoilt] = (steps[spoilt][0], TlsAgreed("1.3", "A"))
            for state, detail in steps:
                machine.now_ns += number
                machine.enter(state, detail)
        if spoilt is None:
            # As of a connection that has lived long.
            connection.transitions[:] = [one._replace(sequence=one.sequence + begins) for one in connection.transitions]
        both.tracing.segment_ended(connection)
        connection.begin_segment(10**16)
    both.check()
    names_of = [event.name for record in both.records for event in record.events]
    assert names_of.count("smtp.state.idle") == 7 * 60


@pytest.mark.parametrize("place", [0, 1, 2, 3, 21, 38, 44, 63])
@pytest.mark.parametrize(
    "other",
    [
        {"state": ConnState.RESET},
        {"previous": ConnState.AUTH},
        {"previous": None},
        {"level": ConnState.AUTH},
        {"detail": TransactionOver(3)},
        {"detail": ContentBegun(3, 1 << 20)},
        {"detail": ContentBegun(1 << 20, 2)},
        {"detail": TlsAgreed("1.3", "A")},
        {"detail": None},
        {"sequence": 1 << 20},
    ],
    ids=str,
)
def test_one_event_among_those_of_mails_may_be_another(other: dict[str, Any], place: int) -> None:
    both = Both()
    connection = _connection()
    both.tracing.connection_opened(connection)
    machine = StateMachine(connection.transitions)
    machine.enter(ConnState.NEW, TlsOffer(TlsMode.OFF))
    for is_spoilt in (None, False, False, False, True):  # from the third on, sequences have two octets
        if is_spoilt is not None:
            for number in range(1, 17):
                machine.now_ns += 1000 * number
                machine.enter(ConnState.ACTIVE)
                machine.enter(ConnState.DATA, ContentBegun(number, 2))
                machine.now_ns += number
                machine.enter(ConnState.ACTIVE)
                machine.enter(ConnState.IDLE, TransactionOver(number))
        if is_spoilt:
            connection.transitions[place] = connection.transitions[place]._replace(**other)
        both.tracing.segment_ended(connection)
        connection.begin_segment(1)
        machine.recorded = connection.transitions
    both.check()


@st.composite
def connections(draw: st.DrawFn) -> ConnectionRecord:
    info = ConnectionInfo(
        "c" * 32,
        draw(endpoints),
        draw(endpoints),
        draw(st.sampled_from(["local", "other"])),
        draw(st.sampled_from(["smtp", "lmtp"])),
        draw(st.sampled_from(["tcp", "unix"])),
        draw(st.sampled_from(TlsMode)),
    )
    record = ConnectionRecord(info, 1, draw(moments))
    if draw(st.booleans()):
        record.client, record.server = draw(endpoints), draw(endpoints)
    record.hello_name = draw(cleanable)
    record.tls = draw(tls)
    record.user = draw(st.one_of(st.none(), cleanable))
    record.auth_mechanism = draw(st.one_of(st.none(), st.just("PLAIN")))
    record.messages, record.errors = draw(st.integers(0, 20_000)), draw(st.integers(0, 3))
    record.end = ConnectionEnd(draw(st.integers(0, 3)), draw(st.integers(0, 1 << 40)))
    note(shown(record))
    return record


@st.composite
def transactions(draw: st.DrawFn, connection: ConnectionRecord | None) -> TransactionRecord:
    sender = st.sampled_from(["", "a@example.com", "b@[192.0.2.1]", "postmaster", "ü@\u200bbücher.example"])
    mail = Mail(draw(sender), body=draw(st.one_of(st.none(), st.sampled_from(Body))))
    if connection is None:
        carrier = draw(st.sampled_from([{}, {"traceparent": REMOTE}, {"traceparent": REMOTE, "tracestate": "v=1"}]))
        attempt = draw(st.integers(1, 3))
        record = TransactionRecord.resumed("01J9", carrier, mail, kind=draw(kinds), attempt=attempt)
        record.is_possible_duplicate = draw(st.booleans())
        record.taken_over = draw(st.one_of(st.none(), st.tuples(cleanable, st.floats(0, 1e6))))
        record.wall_offset_ns = draw(moments)
    else:
        record = TransactionRecord(mail, draw(st.integers(1, 20_000)), connection, draw(moments), draw(moments))
        record.spool_id = draw(st.one_of(st.none(), cleanable))
    record.accepted = [Recipient(address) for address in draw(st.lists(sender, max_size=14))]
    record.refused_count = draw(st.integers(0, 3))
    record.failure = draw(st.one_of(st.none(), cleanable))
    for recipient, reply in draw(many(st.tuples(st.builds(Recipient, sender), some_replies))):
        record.refuse(recipient, reply, draw(moments))
    headers = st.builds(
        TraceHeaders,
        st.sampled_from([(), (REMOTE,), (REMOTE, REMOTE), ("x",), (REMOTE[:-1] + "0",)]),
        st.sampled_from(["", "vendor=1"]),
    )
    record.trace_headers = draw(st.one_of(st.none(), headers))
    record.message_id = draw(st.one_of(st.none(), cleanable))
    record.octets = draw(st.one_of(st.none(), st.integers(0, 1 << 40)))
    record.deliveries = [draw(deliveries(record)) for _ in range(draw(st.integers(0, 2)))]
    if draw(st.booleans()):
        verdicts = draw(st.lists(some_replies, max_size=len(record.accepted)))
        record.refuse_content(draw(some_replies), verdicts, draw(moments))
    record.end(draw(st.sampled_from(Outcome)), draw(st.one_of(st.none(), some_replies)), draw(moments))
    note(shown(record))
    return record


@st.composite
def deliveries(draw: st.DrawFn, transaction: TransactionRecord) -> DeliveryRecord:
    record = DeliveryRecord(transaction, draw(st.sampled_from(["u", "ü"])), draw(endpoints), draw(moments), 1)
    record.pool_wait_ns = draw(st.one_of(st.none(), moments))
    record.is_reused = draw(st.booleans())
    record.peer, record.tls = draw(st.one_of(st.none(), endpoints)), draw(tls)
    phase = st.tuples(moments, st.sampled_from(DeliveryPhase), st.one_of(st.none(), some_replies))
    record.phases = draw(st.lists(phase, max_size=5))
    if draw(st.booleans()):
        record.note_pace(draw(cleanable), draw(moments), draw(moments))
    record.round_trips = draw(st.integers(0, 300))
    record.failure = draw(st.one_of(st.none(), cleanable))
    # Recipients of the transaction, of which some may be asked about again, and others.
    asked = st.sampled_from([SOMEBODY, *transaction.accepted])
    for recipient, reply in draw(many(st.tuples(asked | st.builds(Recipient, st.just("y@z.example")), some_replies))):
        record.refuse(recipient, reply, draw(moments))
    record.accepted_count = draw(st.integers(0, 3))
    error = draw(st.one_of(st.none(), st.sampled_from(ErrorType)))
    record.end(draw(st.sampled_from(Outcome)), draw(st.one_of(st.none(), some_replies)), error, draw(moments))
    return record


def test_of_events_at_one_instant_the_phases_come_first_in_both_forms() -> None:
    """The clock is read once a turn, so what a turn decides has one time."""
    both = Both()
    transaction = TransactionRecord.resumed("01J9", {}, Mail("a@example.com"))
    attempt = DeliveryRecord(transaction, "u", Endpoint("192.0.2.9", 25), 1, 1)
    transaction.taken_over = ("gateway-1", 7.0)
    refusal = Reply(550, None, ("no",))
    attempt.refuse(Recipient("x@there.example"), refusal, 3)
    attempt.phases = [
        (1, DeliveryPhase.CONNECT, None),
        (3, DeliveryPhase.RCPT, refusal),
        (3, DeliveryPhase.PACED, None),
    ]
    attempt.end(Outcome.REFUSED, refusal, None, 4)
    both.tracing.deliveries_settled([attempt])
    both.check()
    [record] = both.records
    assert [event.name.removeprefix("smtp.") for event in record.events] == [
        "upstream.connect", "spool.taken_over", "upstream.rcpt", "upstream.paced", "recipient",
    ]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_whatever_happens_is_encoded_as_the_sdks_exporter_encodes_it(data: st.DataObject) -> None:
    both = Both(
        policies={"local": data.draw(st.sampled_from(InboundPolicy))},
        redaction=Redaction(data.draw(st.sampled_from(Addresses)), data.draw(st.sampled_from(ClientIp)), b"key"),
        with_message_id=data.draw(st.booleans()),
        probes=True,
    )
    connection = data.draw(connections())
    both.tracing.connection_opened(connection)
    for _ in range(data.draw(st.integers(0, 2))):
        connection.transitions = data.draw(transitions())
        both.tracing.segment_ended(connection)
        connection.begin_segment(10**16)
    for where in (connection, None):
        transaction = data.draw(transactions(where))
        if where is None:
            for delivery in transaction.deliveries:
                both.tracing.deliveries_settled([delivery])
        else:
            both.tracing.transactions_settled([transaction])
    connection.transitions = data.draw(transitions())
    connection.end = connection.end._replace(reason=data.draw(st.sampled_from(CloseReason)), at_ns=data.draw(moments))
    both.tracing.connection_closed(connection)
    both.check()
    for record in both.records:
        for attributes in (record.attributes, *(event.attributes for event in record.events)):
            for name, value in attributes.items():
                assert type(value) is _PYTHON[ATTRIBUTES[name].type], name


_PYTHON = {Type.STRING: str, Type.INT: int, Type.DOUBLE: float, Type.BOOLEAN: bool, Type.STRINGS: tuple}


# Ordinary mail is encoded in a way of its own.

plain_texts = st.one_of(
    st.just("Ok"), st.text(max_size=300), st.text(st.sampled_from("aé"), min_size=250, max_size=260)
)
good_replies = st.builds(
    Reply,
    st.sampled_from([250, 251]),
    st.one_of(st.none(), codes),
    st.lists(plain_texts, min_size=1, max_size=2).map(tuple),
)
mailboxes = st.sampled_from(
    ["", "a@example.com", "b@EXAMPLE.com", "c@[192.0.2.1]", "postmaster", "ü@\u200bbücher.example"]
)


@st.composite
def ordinary_mails(draw: st.DrawFn, connection: ConnectionRecord) -> TransactionRecord:
    mail = Mail(draw(mailboxes), body=draw(st.one_of(st.none(), st.sampled_from(Body))))
    record = TransactionRecord(mail, draw(st.integers(1, 1 << 22)), connection, draw(moments), draw(moments))
    record.accepted = [Recipient(address) for address in draw(st.lists(mailboxes, min_size=1, max_size=12))]
    headers = st.sampled_from([(), (REMOTE,), ("x",)])
    record.trace_headers = TraceHeaders(draw(headers), draw(st.sampled_from(["", "vendor=1"])))
    record.message_id = "<1@example.com>"
    record.octets = draw(st.one_of(st.integers(0, 1 << 22), st.integers(0, 1 << 40)))
    delivery = DeliveryRecord(record, draw(st.sampled_from(["u", "ü"])), draw(endpoints), 1, draw(moments))
    record.deliveries.append(delivery)
    delivery.pool_wait_ns, delivery.is_reused = draw(moments), draw(st.booleans())
    delivery.peer, delivery.tls = draw(endpoints), draw(tls)
    delivery.phases.append((draw(moments), DeliveryPhase.POOL, None))
    phase = st.tuples(moments, st.sampled_from(DeliveryPhase), st.one_of(st.none(), good_replies))
    delivery.phases += draw(st.lists(phase.filter(lambda one: one[1] is not DeliveryPhase.POOL), max_size=5))
    delivery.accepted_count, delivery.round_trips = draw(st.integers(0, 300)), draw(st.integers(0, 300))
    delivery.end(Outcome.RELAYED, draw(good_replies), None, draw(moments))
    record.end(Outcome.RELAYED, draw(good_replies), draw(moments))
    note(shown(record))
    return record


class Choosing(Sampler):
    """Decides and adds what it is told."""

    def __init__(self, result: SamplingResult) -> None:
        self.result = result

    def should_sample(self, *arguments: Any, **more: Any) -> SamplingResult:
        return self.result

    def get_description(self) -> str:
        return "Choosing"


REFUSAL = Reply(550, EnhancedStatus(5, 1, 1), ("no such user",), ErrorType.UPSTREAM_REFUSED)
BUSY = Reply(451, None, ("busy",))
ODD = Reply(250, EnhancedStatus(2, 0, 0), ("odd",), ErrorType.STORAGE)


def _another_attempt(record: TransactionRecord) -> None:
    another = DeliveryRecord(record, "other", Endpoint("mx.example", 25), 2, 5)
    another.end(Outcome.RELAYED, Reply(250, None, ("Ok",)), None, 6)
    record.deliveries.append(another)


def _sets(name: str, *values: Any) -> dict[str, Callable[[TransactionRecord, DeliveryRecord], object]]:
    of, _, attribute = name.partition(".")
    return {
        f"{name} = {value}": lambda record, delivery, value=value: setattr(  # type: ignore[misc]
            record if of == "record" else delivery, attribute, value
        )
        for value in values
    }


# What makes of an ordinary mail another one, one thing at a time.
SPOILT: dict[str, Callable[[TransactionRecord, DeliveryRecord], object]] = {
    "nothing": lambda record, delivery: None,
    "refused": lambda record, delivery: record.refuse(SOMEBODY, REFUSAL, 5),
    "refused by the upstream": lambda record, delivery: delivery.refuse(SOMEBODY, BUSY, 5),
    "paced": lambda record, delivery: delivery.note_pace("limit", 5, 6),
    "no wait among the phases": lambda record, delivery: delivery.phases.pop(0),
    "two waits": lambda record, delivery: delivery.phases.append((5, DeliveryPhase.POOL, None)),
    "wait at the end": lambda record, delivery: delivery.phases.reverse(),
    "no phases": lambda record, delivery: delivery.phases.clear(),
    "two attempts": lambda record, delivery: _another_attempt(record),
    "no attempt": lambda record, delivery: record.deliveries.clear(),
    **_sets("record.refused_count", 1),
    **_sets("record.deferred_count", 1),
    **_sets("delivery.refused_count", 1),
    **_sets("delivery.deferred_count", 1),
    **_sets("delivery.accepted_count", 7),
    **_sets("record.failure", "broken"),
    **_sets("delivery.failure", "broken"),
    **_sets("record.error_type", ErrorType.STORAGE),
    **_sets("delivery.error_type", ErrorType.TIMEOUT),
    **_sets("record.reply", None, REFUSAL, BUSY, ODD),
    **_sets("delivery.reply", None, REFUSAL, BUSY, ODD),
    **_sets("record.outcome", *Outcome, None),
    **_sets("delivery.outcome", *Outcome, None),
    **_sets("record.spool_id", "01J9"),
    **_sets("record.octets", None, 0),
    **_sets("record.kind", MessageKind.BOUNCE),
    **_sets("record.is_possible_duplicate", True),
    **_sets("record.taken_over", ("other", 2.5)),
    **_sets("record.mail", Mail("a@b.example", body=Body.EIGHT_BIT_MIME)),
    **_sets("record.accepted", [], [SOMEBODY], [SOMEBODY, Recipient("y@here.example")], [Recipient("postmaster")]),
    **_sets("record.trace_headers", TraceHeaders((REMOTE,), "v=1"), TraceHeaders((REMOTE,))),
    **_sets("delivery.attempt", 2),
    **_sets("delivery.round_trips", 9),
    **_sets("delivery.is_reused", False),
    **_sets("delivery.upstream", "other"),
    **_sets("delivery.peer", None, Endpoint("198.51.100.4", 25), Endpoint("192.0.2.9", 26), Endpoint("/run/x.sock")),
    **_sets("delivery.server", Endpoint("mx.example", 25), Endpoint("192.0.2.9", 26), Endpoint("/run/x.sock")),
    **_sets("delivery.tls", TlsInfo("1.3", "A"), TlsInfo("1.3", "B"), TlsInfo("1.3", "A", True), TlsInfo("1.2", "A")),
    **_sets("delivery.pool_wait_ns", None),
    **_sets("delivery.ended_ns", 0),
}


def _ordinary_mail(connection: ConnectionRecord) -> TransactionRecord:
    record = TransactionRecord(Mail("a@example.com"), 1, connection, 10, 0)
    record.accepted = [Recipient("b@example.net")]
    record.octets, record.message_id, record.trace_headers = 1000, "<1@example.com>", TraceHeaders()
    delivery = DeliveryRecord(record, "u", Endpoint("192.0.2.9", 25), 1, 20)
    record.deliveries.append(delivery)
    delivery.pool_wait_ns, delivery.is_reused, delivery.peer = 30, True, Endpoint("192.0.2.9", 25)
    accepted = Reply(250, EnhancedStatus(2, 1, 0), ("Ok",))
    queued = Reply(250, EnhancedStatus(2, 0, 0), ("Ok: queued as 4XyZ12",))
    phases = DeliveryPhase.POOL, DeliveryPhase.MAIL, DeliveryPhase.CONTENT, DeliveryPhase.REPLY
    for at_ns, (phase, reply) in enumerate(zip(phases, (None, accepted, None, queued), strict=True), start=40):
        delivery.phases.append((at_ns, phase, reply))
    delivery.end(Outcome.RELAYED, queued, None, 50)
    record.end(Outcome.RELAYED, Reply(250, EnhancedStatus(2, 0, 0), (f"Ok trace={'a' * 32}",)), 60)
    return record


def _connection() -> ConnectionRecord:
    info = ConnectionInfo("c" * 32, Endpoint("127.0.0.1", 40000), Endpoint("127.0.0.1", 25), "local")
    return ConnectionRecord(info, 1, 1000)


CHOOSING = [
    SamplingResult(Decision.RECORD_AND_SAMPLE, {"added": 1}),
    SamplingResult(Decision.RECORD_AND_SAMPLE, {names.OUTCOME: "x"}),
    SamplingResult(Decision.RECORD_AND_SAMPLE, None, TraceState([("a", "1")])),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"sampler {number}": {"sampler": Choosing(result)} for number, result in enumerate(CHOOSING)},
    "with message ids": {"with_message_id": True},
    **{f"addresses = {shown}": {"redaction": Redaction(shown, hash_key=b"key")} for shown in Addresses},
    **{f"trace context: {policy}": {"policies": {"local": policy}} for policy in InboundPolicy},
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_mail_that_differs_in_one_thing_from_an_ordinary_one_is_told_as_it_was(spoilt: str) -> None:
    for options in OPTIONS.values():
        both = Both(**options)
        connection = _connection()
        both.tracing.connection_opened(connection)
        for spoil in (SPOILT["nothing"], SPOILT[spoilt], SPOILT["nothing"]):
            record = _ordinary_mail(connection)
            spoil(record, record.deliveries[0])
            both.tracing.transactions_settled([record])
        both.check()


def _both(data: st.DataObject) -> Both:
    """With any of the options."""
    return Both(
        policies={"local": data.draw(st.sampled_from(InboundPolicy))},
        redaction=Redaction(data.draw(st.sampled_from(Addresses)), data.draw(st.sampled_from(ClientIp)), b"key"),
        with_message_id=data.draw(st.booleans()),
    )


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_ordinary_mail_is_encoded_as_any_other(data: st.DataObject) -> None:
    both = _both(data)
    connection = data.draw(connections())
    both.tracing.connection_opened(connection)
    for _ in range(data.draw(st.integers(1, 3))):
        record = data.draw(ordinary_mails(connection))
        both.tracing.transactions_settled([record])
    both.check()


@pytest.mark.parametrize("headers", [(), (REMOTE,), ("x",)])
def test_ordinary_mail_is_encoded_in_its_own_way(headers: tuple[str, ...]) -> None:
    """Else the tests above would pass without it."""
    tracing = Tracing(exports=[lambda span, items: None])
    connection = _connection()
    tracing.connection_opened(connection)
    record = _ordinary_mail(connection)
    record.trace_headers = TraceHeaders(headers)
    tracing.trace_id(record)
    assert OrdinaryMail(tracing.attributes, tracing._settle_attempt).spans(record, record.trace) is not None


# Queued mail: the span of the transaction that brought it, and later that of an attempt.
QUEUED_ID = "01j9zq4k5m6n7p8q9r0s1t2v3w"


def queued_mail(ordinary: TransactionRecord) -> TransactionRecord:
    ordinary.deliveries.clear()
    ordinary.outcome, ordinary.spool_id = Outcome.QUEUED, QUEUED_ID
    return ordinary


def attempted(ordinary: TransactionRecord) -> TransactionRecord:
    record = TransactionRecord.resumed(QUEUED_ID, {"traceparent": REMOTE}, ordinary.mail)
    record.accepted, record.octets = ordinary.accepted, ordinary.octets
    [before] = ordinary.deliveries
    delivery = DeliveryRecord(record, before.upstream, before.server, 1, before.begun_ns)
    for name in ("pool_wait_ns", "is_reused", "peer", "tls", "phases", "accepted_count", "round_trips"):
        setattr(delivery, name, getattr(before, name))
    delivery.end(Outcome.RELAYED, before.reply, None, before.ended_ns)
    record.deliveries.append(delivery)
    return record


SPOILT_SPOOLED = {
    **SPOILT,
    **_sets("record.spool_id", None, "", "01J9-", "\u200bü", QUEUED_ID[1:]),
    **_sets("record.carrier", {}, {"traceparent": REMOTE, "tracestate": "v=1"}),
}


@pytest.mark.parametrize("spoilt", SPOILT_SPOOLED)
def test_queued_mail_that_differs_in_one_thing_from_an_ordinary_one_is_told_as_it_was(spoilt: str) -> None:
    for options in OPTIONS.values():
        both = Both(**options)
        connection = _connection()
        both.tracing.connection_opened(connection)
        for spoil in (SPOILT_SPOOLED["nothing"], SPOILT_SPOOLED[spoilt], SPOILT_SPOOLED["nothing"]):
            ordinary = _ordinary_mail(connection)
            delivery = ordinary.deliveries[0]
            record = queued_mail(ordinary)
            spoil(record, delivery)
            both.tracing.transactions_settled([record])
            record = attempted(_ordinary_mail(connection))
            delivery = record.deliveries[0]
            spoil(record, delivery)
            both.tracing.deliveries_settled([delivery])
        both.check()


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_ordinary_queued_mail_is_encoded_as_any_other(data: st.DataObject) -> None:
    both = _both(data)
    connection = data.draw(connections())
    both.tracing.connection_opened(connection)
    for _ in range(data.draw(st.integers(1, 3))):
        both.tracing.transactions_settled([queued_mail(data.draw(ordinary_mails(connection)))])
        record = attempted(data.draw(ordinary_mails(connection)))
        both.tracing.deliveries_settled([record.deliveries[0]])
    both.check()


@pytest.mark.parametrize("headers", [(), (REMOTE,), ("x",)])
def test_ordinary_queued_mail_is_encoded_in_its_own_way(headers: tuple[str, ...]) -> None:
    """Else the tests above would pass without it."""
    tracing = Tracing(exports=[lambda span, items: None])
    connection = _connection()
    tracing.connection_opened(connection)
    record = queued_mail(_ordinary_mail(connection))
    record.trace_headers = TraceHeaders(headers)
    tracing.trace_id(record)
    ours = OrdinarySpooled(tracing.attributes, OrdinaryMail(tracing.attributes, tracing._settle_attempt))
    assert ours.transaction(record, record.trace) is not None
    record = attempted(_ordinary_mail(connection))
    delivery = record.deliveries[0]
    assert ours.attempt(delivery, tracing._settle_delivery(delivery, record)) is not None


def test_of_an_ordinary_mail_a_sampler_may_export_one_span_and_not_the_other() -> None:
    class NoDeliveries(Choosing):
        def should_sample(
            self, parent_context: Context | None, trace_id: int, name: str, *arguments: Any, **more: Any
        ) -> SamplingResult:
            is_left_out = name == names.SPAN_DELIVERY
            return SamplingResult(Decision.RECORD_ONLY if is_left_out else Decision.RECORD_AND_SAMPLE)

    exported: list[EncodedSpan] = []
    kept: list[EncodedSpan] = []
    sampler = NoDeliveries(SamplingResult(Decision.DROP))
    Client(
        Tracing(exports=[each_to(exported)], memories=[lambda spans, is_trouble: kept.extend(spans)], sampler=sampler)
    ).ehlo().message().close()
    assert [span.to_records()[0].name for span in exported] == [names.SPAN_TRANSACTION, names.SPAN_CONNECTION]
    assert sum(one.spans for one in kept) == 3


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


def test_the_caches_have_a_bound_and_what_is_made_again_is_the_same() -> None:
    pairs = Pairs(9)
    before = [pairs[item] for item in (("k", "v"), ("d", 0.5), ("i", 7), ("i", 300))]
    for number in range(5000):
        for value in (f"v{number}", number, float(number)):
            assert pairs[f"k{number}", value]
        assert pairs["smtp.reply.text", f"queued as {number}"]
    assert pairs.held <= 4096 + 1024 + 128 + 3
    assert [pairs[item] for item in (("k", "v"), ("d", 0.5), ("i", 7), ("i", 300))] == before


def test_shapes_have_a_bound_and_one_that_is_made_again_is_the_same() -> None:
    table = span_table("n", SpanKind.CLIENT, ("a", "b"))
    before = table[1, "x"].octets
    for number in range(5000):
        assert table[number, None].constant == {"a": number}
    assert len(table) <= MAX_SHAPES
    assert table[1, "x"].octets == before


def test_a_shape_is_made_of_its_row_alone_and_every_column_tells_shapes_apart() -> None:
    table = span_table("n", SpanKind.CLIENT, (Column("a", str), None, "b"))
    first = table[1, 2, 3]
    assert table[1, 2, 3] is first
    assert first.constant == {"a": "1", "b": 3}
    others = [table[row] for row in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (None, 2, 3))]
    assert len({id(shape) for shape in (first, *others)}) == 5
    with pytest.raises(ValueError, match="zip"):
        table[1, 2]


@pytest.mark.parametrize(
    ("value", "octets"), [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (2**64 - 1, "ff" * 9 + "01")]
)
def test_a_varint_has_seven_bits_an_octet(value: int, octets: str) -> None:
    assert varint(value).hex() == octets
