"""Spans as octets, from templates: what spans and events of one kind have in common is encoded once.

Theory of operation
-------------------
The attributes of a span or event are a *row* of values that come from closed or small sets (its codes, its upstream,
its outcome) and some values that vary (ids, times, sizes). A `ShapeTable` has a header, the names of the row's columns,
and keeps one shape per row. A shape is made of its row and of nothing else, so two spans that differ in any constant
attribute cannot share one. It holds the octets of all that is constant, and the same attributes as a mapping: a
decoded span has what was encoded, as there is no second list of attributes.

An `EncodedSpan` is octets, and can be decoded for people who look at it.
"""

import struct
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NamedTuple, TypeVar

from opentelemetry.trace import SpanKind

from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import Attributes, AttributeValue
from otel_smtp.telemetry.otlp import (
    FIXED32,
    FIXED64,
    LENGTHS,
    TAGS,
    VARINT,
    Integers,
    Pairs,
    field,
    length,
    pack_time,
    tag,
    varint,
)
from otel_smtp.telemetry.otlp import text as text_field
from otel_smtp.telemetry.propagation import TraceContext
from otel_smtp.telemetry.records import EventRecord, LinkRecord, SpanRecord

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    from otel_smtp.telemetry.span_lines import LineShape

Row = tuple[object, ...]
"""Values of constant attributes in the order of a header; None: the attribute is absent."""
Pair = tuple[str, AttributeValue]

# Rows come from closed sets, but for enhanced codes, of which a hostile upstream can invent a million.
MAX_SHAPES: Final = 2048

_KINDS: Final[Mapping[SpanKind, int]] = {
    SpanKind.INTERNAL: 1,
    SpanKind.SERVER: 2,
    SpanKind.CLIENT: 3,
    SpanKind.PRODUCER: 4,
    SpanKind.CONSUMER: 5,
}
_ERROR: Final = 2  # Status.code
_ERROR_CODE: Final = tag(3, VARINT) + varint(_ERROR)

# Attributes as they stand in a span, an event and a link. The event loop alone encodes spans.
SPAN_PAIRS: Final = Pairs(9)
EVENT_PAIRS: Final = Pairs(3)
_LINK_PAIRS: Final = Pairs(4)

# A backend that counts in microseconds cuts start and duration of a span each for itself: an event at the very end
# would lie behind it, and not be shown.
AFTER_LAST_EVENT_NS: Final = 1000

# SpanFlags: whether the flag "is remote" says anything, and the flag itself.
_FLAGS: Final = {False: 0x100, True: 0x300}
_SPAN_FLAGS: Final = {is_remote: tag(16, FIXED32) + struct.pack("<I", flags) for is_remote, flags in _FLAGS.items()}
_LINK_FLAGS: Final = {is_remote: tag(6, FIXED32) + struct.pack("<I", flags) for is_remote, flags in _FLAGS.items()}

_TRACE_ID, _SPAN_ID, _PARENT_ID = TAGS[1] + b"\x10", TAGS[2] + b"\x08", TAGS[4] + b"\x08"
_START, _END = tag(7, FIXED64), tag(8, FIXED64)
# Status: message 2, code 3. The SDK writes it in any case.
_UNSET: Final = field(15, b"")
# The octets before an event's time, by the octets that follow the time. An event is below 1 KiB by its maker.
_EVENT_TIME: Final = tag(1, FIXED64)


def before_time(octets: int) -> bytes:
    """The octets before the time of an event, if `octets` follow the time."""
    return BEFORE_TIME[octets] if octets < len(BEFORE_TIME) else _before_time(octets)


def _before_time(octets: int) -> bytes:
    return TAGS[11] + length(len(_EVENT_TIME) + 8 + octets) + _EVENT_TIME


BEFORE_TIME: Final = tuple(_before_time(octets) for octets in range(1024))


class SpanShape:
    """Spans of one row: name, kind, status and constant attributes.

    Attributes:
        on_line: constant attributes that its line in the log has besides, and another span of its trace.
        octets: of all but these, up to the tag of the start time.
        description: of the status: why it has failed, where `error.type` does not say it all.
        pack: puts the ids and times of one span around `octets`.
        line: what the log keeps of them (`span_lines`); None before their first line.
    """

    __slots__ = ("constant", "description", "has_failed", "kind", "line", "name", "octets", "on_line", "pack")

    def __init__(
        self,
        name: str,
        kind: SpanKind,
        constant: Attributes,
        *,
        has_failed: bool,
        description: str = "",
        on_line: Attributes = MappingProxyType({}),
    ) -> None:
        self.name = name
        self.kind = kind
        self.constant = constant
        self.on_line = on_line
        self.has_failed = has_failed
        self.description = description if has_failed else ""
        self.line: LineShape | None = None
        self.octets = b"".join(
            [
                text_field(5, name),
                tag(6, VARINT) + varint(_KINDS[kind]),
                field(15, text_field(2, self.description) + _ERROR_CODE) if has_failed else _UNSET,
                *map(SPAN_PAIRS.__getitem__, constant.items()),
                _START,
            ]
        )
        self.pack: Callable[..., bytes] = struct.Struct(f"<2s16s2s8s{len(self.octets)}sQcQ").pack


class EventShape:
    """Events of one row: name and constant attributes.

    Attributes:
        varying: names of integer attributes that vary, in their order.
        integers: writes these.
    """

    __slots__ = ("before", "constant", "integers", "name", "octets", "varying")

    def __init__(self, name: str, constant: Attributes, varying: Sequence[str] = ()) -> None:
        self.name = name
        self.constant = constant
        self.varying = tuple(varying)
        self.integers = tuple(map(event_integers, varying))
        self.octets = text_field(2, name) + b"".join(map(EVENT_PAIRS.__getitem__, constant.items()))
        self.before = before_time(len(self.octets))


@lru_cache(maxsize=64)
def event_integers(name: str) -> Integers:
    """Writes the integer attribute `name` of events."""
    return Integers(3, name)


S = TypeVar("S", SpanShape, EventShape)


class Column(NamedTuple):
    """A column of a header.

    Attributes:
        shown: makes the attribute's value of the row's, where they differ.
    """

    name: str
    shown: Callable[[Any], AttributeValue] | None = None


class ShapeTable(dict[Row, S], Generic[S]):
    """Shapes by their rows, made when first asked for, at most `MAX_SHAPES` of them.

    Args:
        header: the columns of the rows; None for a column that is no attribute.
        make: makes a shape of a row and of the attributes that it stands for.
    """

    __slots__ = ("_header", "_make")

    def __init__(self, header: Iterable[Column | str | None], make: Callable[[Row, Attributes], S]) -> None:
        super().__init__()
        self._header = tuple(Column(each) if isinstance(each, str) else each for each in header)
        self._make: Callable[[Row, Attributes], S] = make

    def __missing__(self, row: Row) -> S:
        constant: dict[str, AttributeValue] = {}
        for column, value in zip(self._header, row, strict=True):
            if column is not None and value is not None:
                constant[column.name] = _plain(value) if column.shown is None else column.shown(value)
        if len(self) >= MAX_SHAPES:
            self.clear()
        shape = self[row] = self._make(row, constant)
        return shape


def _plain(value: Any) -> AttributeValue:
    # A member of an enumeration is a str, but not one that every encoder takes for one.
    plain: AttributeValue = value.value if isinstance(value, Enum) else value
    return plain


def span_table(
    name: str, kind: SpanKind, header: Iterable[Column | str | None], told_elsewhere: Collection[str] = ()
) -> ShapeTable[SpanShape]:
    """A table of spans; those with an `error.type` have failed.

    Args:
        told_elsewhere: names of columns that only the log has, of rows that end in True.
    """

    def make(row: Row, constant: Attributes) -> SpanShape:
        reason = str(constant.get(names.FAILURE_REASON, ""))
        has_failed = names.ERROR_TYPE in constant
        left_out = told_elsewhere if row[-1] is True else ()
        on_line = {key: value for key, value in constant.items() if key in left_out}
        constant = {key: value for key, value in constant.items() if key not in left_out}
        return SpanShape(name, kind, constant, has_failed=has_failed, description=reason, on_line=on_line)

    return ShapeTable(header, make)


class EncodedSpan(bytes):
    """A finished span, as the field of a request that holds it.

    Attributes:
        spans: how many they are.
    """

    __slots__ = ()
    spans: ClassVar[int] = 1

    @property
    def trace_id(self) -> bytes:
        """The 16 octets of its trace id."""
        # They stand first: tag and length of the whole, tag and length of the id.
        _, at = _length_at(self, 1)
        return self[at + 2 : at + 18]

    def to_records(self) -> list[SpanRecord]:
        """The spans as values; of flags and trace states, what OTLP holds of them."""
        from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans  # on demand: 30 ms

        return [_decoded(span) for span in ScopeSpans.FromString(self).spans]


class EncodedPair(EncodedSpan):
    """Two spans of one trace that ended together, one behind the other."""

    __slots__ = ()
    spans = 2

    def each(self) -> tuple[EncodedSpan, EncodedSpan]:
        """Each by itself."""
        octets, at = _length_at(self, 1)
        return EncodedSpan(self[: at + octets]), EncodedSpan(self[at + octets :])


def _length_at(octets: bytes, at: int) -> tuple[int, int]:
    """The length of a field that stands at `at`, and where its value begins."""
    value = shift = 0
    while True:
        octet = octets[at]
        at += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value, at
        shift += 7


def encode(
    shape: SpanShape,
    context: TraceContext,
    parent: TraceContext | None,
    start_ns: int,
    end_ns: int,
    varying: Iterable[Pair],
    events: Iterable[bytes] = (),
    links: Iterable[LinkRecord] = (),
) -> EncodedSpan:
    """A span as octets. Raises nothing.

    Args:
        varying: attributes beside those of the shape, none of them twice.
        events: the pieces of its events.
    """
    parts = [
        shape.pack(
            _TRACE_ID,
            context.trace_id.to_bytes(16, "big"),
            _SPAN_ID,
            context.span_id.to_bytes(8, "big"),
            shape.octets,
            start_ns,
            _END,
            end_ns,
        ),
        *map(SPAN_PAIRS.__getitem__, varying),
        *events,
    ]
    if links:
        parts += map(encode_link, links)
    if parent is None:
        parts.append(_SPAN_FLAGS[False])
    else:
        parts += (_PARENT_ID, parent.span_id.to_bytes(8, "big"), _SPAN_FLAGS[parent.is_remote])
    if context.trace_state:
        parts.append(text_field(3, context.trace_state))
    size = sum(map(len, parts))
    return EncodedSpan(b"".join((TAGS[2], LENGTHS[size] if size < 2048 else length(size), *parts)))


def frame_of_span(shape: SpanShape, *, is_remote: bool) -> tuple[bytes | str, ...]:
    """Pieces of a `Mould` for spans of one shape: with gaps for trace id, span id, parent's span id, start and end.

    Args:
        is_remote: the parent is a foreign span.
    """
    flags = _SPAN_FLAGS[is_remote]
    return _TRACE_ID, "16s", _SPAN_ID, "8s", _PARENT_ID, "8s", flags, shape.octets, "Q", _END, "Q"


def encode_event(time_ns: int, shape: EventShape, varying: Iterable[Pair]) -> bytes:
    """An event as octets, with attributes of any kind beside those of its shape."""
    octets = b"".join((shape.octets, *map(EVENT_PAIRS.__getitem__, varying)))
    size = len(octets)
    return b"".join((BEFORE_TIME[size] if size < 1024 else before_time(size), pack_time(time_ns), octets))


def encode_link(link: LinkRecord) -> bytes:
    """A link, as a field of its span."""
    context = link.context
    return field(
        13,
        b"".join(
            [
                _TRACE_ID,
                context.trace_id.to_bytes(16, "big"),
                _SPAN_ID,
                context.span_id.to_bytes(8, "big"),
                *map(_LINK_PAIRS.__getitem__, link.attributes.items()),
                _LINK_FLAGS[context.is_remote],
            ]
        ),
    )


def frame_of_link(link: LinkRecord) -> tuple[bytes | str, ...]:
    """Pieces of a `Mould` for links like this one: with gaps for trace id and span id."""
    context = link.context
    octets = encode_link(LinkRecord(TraceContext(0, 0, context.flags, context.is_remote), link.attributes))
    before = octets.index(_TRACE_ID + bytes(16)) + len(_TRACE_ID)
    after = before + 16 + len(_SPAN_ID) + 8
    return octets[:before], "16s", _SPAN_ID, "8s", octets[after:]


# Octets to values --------------------------------------------------------------------------------------------------


def _decoded(span: "Span") -> SpanRecord:
    trace_id = int.from_bytes(span.trace_id, "big")
    parent = None
    if span.parent_span_id:
        is_remote = bool(span.flags & 0x200)
        parent = TraceContext(trace_id, int.from_bytes(span.parent_span_id, "big"), 0, is_remote)
    return SpanRecord(
        span.name,
        next(kind for kind, number in _KINDS.items() if number == span.kind),
        TraceContext(trace_id, int.from_bytes(span.span_id, "big"), 0, False, span.trace_state),
        parent,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span.attributes),
        [EventRecord(event.time_unix_nano, event.name, _attributes(event.attributes)) for event in span.events],
        [
            LinkRecord(
                TraceContext(
                    int.from_bytes(link.trace_id, "big"),
                    int.from_bytes(link.span_id, "big"),
                    0,
                    bool(link.flags & 0x200),
                    link.trace_state,
                ),
                _attributes(link.attributes),
            )
            for link in span.links
        ],
        span.status.code == _ERROR,
        True,
        span.status.message,
    )


def _attributes(pairs: "Iterable[KeyValue]") -> dict[str, AttributeValue]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: "AnyValue") -> AttributeValue:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(each.string_value for each in value.array_value.values)
    plain: AttributeValue = getattr(value, kind) if kind is not None else ""
    return plain
