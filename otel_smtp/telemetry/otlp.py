"""Finished spans and log records as OTLP: the octets of a request to export them, written by hand.

The protobuf wire format is a list of fields: a tag (number and type of the field), for most types a length, the value.
So a message that was written once is a constant, and what our spans are made of is mostly constant: names, kinds,
events that differ in their time, attributes that are the same for every mail. All of that is looked up here, not made:

* an `EventShape` is encoded once, name and constant attributes; of an event itself the time and the few attributes that
  vary are left;
* an attribute is encoded once for each of its values, in a bounded cache, as long as values come back at all. A float,
  which is a duration and never comes back, is its name's prefix and eight octets;
* the ids, the kind and the two times of a span are one `struct.pack`.

What is written equals what the SDK's exporter writes of the same span, field by field; a test compares the two.

Sources: opentelemetry-proto 1.x (trace.proto, logs.proto, common.proto, resource.proto: fields are only ever
added), protobuf encoding (protobuf.dev/programming-guides/encoding).
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind

from otel_smtp.telemetry.attributes import ATTRIBUTES, SCHEMA_URL, SCOPE_NAME, Type
from otel_smtp.telemetry.records import EventRecord, EventShape, LinkRecord, LogRecord, SpanRecord

# Values that never come back (ports, queue ids, sizes) push out those that do. The cache is emptied when it is full:
# the hundred attributes of a gateway that are constant are then made again, once in thousands of spans.
_MAX_CACHED_PAIRS: Final = 4096
# As `state_events` bounds its shapes, for the same reason: an upstream can invent enhanced codes.
_MAX_CACHED_SHAPES: Final = 2048
_MAX_CACHED_HEADS: Final = 64
_MAX_CACHED_OCTETS: Final = 1024  # tracebacks have more

# Our own names, with the class of their values, always. In a cache 1, 1.0 and True are one key; under one of these
# names only one of them occurs. Strings are never taken for anything else, floats are not cached at all.
_CLASSES: Final[Mapping[Type, type]] = {Type.INT: int, Type.BOOLEAN: bool, Type.STRINGS: tuple}
_CACHEABLE: Final = {a.name: _CLASSES[a.type] for a in ATTRIBUTES.values() if a.type in _CLASSES}

_KINDS: Final[Mapping[SpanKind, int]] = {
    SpanKind.INTERNAL: 1,
    SpanKind.SERVER: 2,
    SpanKind.CLIENT: 3,
    SpanKind.PRODUCER: 4,
    SpanKind.CONSUMER: 5,
}

# Fields: number << 3 | type; the types are 0 varint, 1 eight octets, 2 octets with their length, 5 four octets.
_VARINT, _FIXED64, _OCTETS, _FIXED32 = 0, 1, 2, 5


def _tag(number: int, kind: int) -> bytes:
    return varint(number << 3 | kind)


def varint(value: int) -> bytes:
    """`value`, not negative, seven bits an octet, the lowest first."""
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


_TAGS: Final = tuple(_tag(number, _OCTETS) for number in range(17))
_LENGTHS: Final = tuple(varint(length) for length in range(1024))


def _length(octets: int) -> bytes:
    return _LENGTHS[octets] if octets < 1024 else varint(octets)


def _field(number: int, content: bytes) -> bytes:
    return _TAGS[number] + _length(len(content)) + content


def _text(number: int, text: str) -> bytes:
    """A string field; nothing where it is empty, as proto3 has it."""
    return _field(number, _utf8(text)) if text else b""


def _utf8(text: str) -> bytes:
    # What a peer said was cleaned long before; should a lone surrogate be left, one character is lost and no batch.
    return text.encode("utf-8", "replace")


# AnyValue: string 1, bool 2, int 3, double 4, array 5, key-value list 6, bytes 7. It is one of them, so it is
# written even where it is zero or empty.
_BOOL_VALUE, _INT_VALUE, _DOUBLE_VALUE = _tag(2, _VARINT), _tag(3, _VARINT), _tag(4, _FIXED64)
_pack_double: Final = struct.Struct("<d").pack
_pack_time: Final = struct.Struct("<Q").pack


def _any_value(value: object) -> bytes:
    """The fields of an AnyValue.

    Raises:
        ValueError: an integer of more than 64 bits.
        TypeError: nothing that an attribute may hold.
    """
    match value:
        case None:
            return b""
        case bool():
            return _BOOL_VALUE + varint(value)
        case str():
            return _field(1, _utf8(value))
        case int():
            if not -(1 << 63) <= value < 1 << 63:
                raise ValueError(f"{value} is no 64-bit integer")
            # Two's complement: a negative number has ten octets.
            return _INT_VALUE + varint(value & 0xFFFF_FFFF_FFFF_FFFF)
        case float():
            return _DOUBLE_VALUE + _pack_double(value)
        case bytes():
            return _field(7, value)
        case Sequence():
            return _field(5, b"".join(_field(1, _any_value(one)) for one in value))
        case Mapping():
            return _field(6, b"".join(_field(1, _key_value(str(key), one)) for key, one in value.items()))
        case _:
            raise TypeError(f"an attribute cannot hold {type(value)}")


@lru_cache(maxsize=1024)
def _key(key: str) -> bytes:
    return _text(1, key)


def _key_value(key: str, value: object) -> bytes:
    """The fields of a KeyValue."""
    return _key(key) + _field(2, _any_value(value))


class _Pairs(dict[tuple[str, object], bytes]):
    """Attributes as fields of the message that holds them, by name and value; made when first asked for."""

    __slots__ = ("_doubles", "_number")

    def __init__(self, number: int) -> None:
        self._number = number
        self._doubles: dict[str, bytes] = {}

    @property
    def doubles(self) -> int:
        """How many names of floats it knows."""
        return len(self._doubles)

    def __missing__(self, item: tuple[str, object]) -> bytes:
        key, value = item
        kind = value.__class__
        if kind is float:
            prefix = self._doubles.get(key)
            return self._double(key, value) if prefix is None else prefix + _pack_double(value)
        try:
            field = _field(self._number, _key_value(key, value))
        except (ValueError, TypeError):
            return b""  # the SDK leaves such an attribute out too
        if len(field) <= _MAX_CACHED_OCTETS and (kind is str or _CACHEABLE.get(key) is kind):
            if len(self) >= _MAX_CACHED_PAIRS:
                self.clear()
            self[item] = field
        return field

    def _double(self, key: str, value: object) -> bytes:
        field = _field(self._number, _key_value(key, value))
        if len(self._doubles) >= _MAX_CACHED_SHAPES:
            self._doubles.clear()
        self._doubles[key] = field[:-8]
        return field


# SpanFlags: whether the flag "is remote" says anything, and the flag itself.
_FLAGS: Final = {False: 0x100, True: 0x300}
_SPAN_FLAGS: Final = {is_remote: _tag(16, _FIXED32) + struct.pack("<I", flags) for is_remote, flags in _FLAGS.items()}
_LINK_FLAGS: Final = {is_remote: _tag(6, _FIXED32) + struct.pack("<I", flags) for is_remote, flags in _FLAGS.items()}

_TRACE_ID, _SPAN_ID, _PARENT_ID = _TAGS[1] + b"\x10", _TAGS[2] + b"\x08", _TAGS[4] + b"\x08"
_START, _END = _tag(7, _FIXED64), _tag(8, _FIXED64)
# What is before an event's time, by the octets that come after it. An event is kept under 1 KiB by its maker.
_EVENT_TIME: Final = _tag(1, _FIXED64)


def _before_time(octets: int) -> bytes:
    return _TAGS[11] + _length(len(_EVENT_TIME) + 8 + octets) + _EVENT_TIME


_BEFORE_TIME: Final = tuple(_before_time(octets) for octets in range(1024))
# Status: message 2, code 3. The SDK writes it in any case; an ERROR of ours has no message, `error.type` says why.
_STATUS: Final = {False: _field(15, b""), True: _field(15, _tag(3, _VARINT) + varint(2))}

_Head = Callable[..., bytes]


class RequestFrame:
    """Requests of one resource: what is around the spans, or the log records, which have the same fields around them.

    Args:
        resource: who we are.
        version: of the gateway: the instrumentation scope's.
    """

    __slots__ = ("_resource", "_scope", "_scope_end")

    def __init__(self, resource: Resource, version: str) -> None:
        attributes = b"".join(_Pairs(1)[item] for item in resource.attributes.items())
        # ResourceSpans, ResourceLogs: resource 1, scope_spans or scope_logs 2, schema_url 3.
        self._resource = (_field(1, attributes), _text(3, resource.schema_url))
        # ScopeSpans, ScopeLogs: scope 1, spans or log_records 2, schema_url 3.
        self._scope = _field(1, _text(1, SCOPE_NAME) + _text(2, version))
        self._scope_end = _text(3, SCHEMA_URL)

    def request(self, items: Sequence[bytes]) -> bytes:
        """An `ExportTraceServiceRequest` or `ExportLogsServiceRequest` of spans or records that are encoded."""
        resource, resource_end = self._resource
        in_scope = len(self._scope) + sum(map(len, items)) + len(self._scope_end)
        scope = _TAGS[2] + _length(in_scope)
        in_resource = len(resource) + len(scope) + in_scope + len(resource_end)
        start = _TAGS[1] + _length(in_resource)
        # One join: to nest messages by concatenation would copy half a megabyte four times.
        return b"".join([start, resource, scope, self._scope, *items, self._scope_end, resource_end])


class TraceEncoder(RequestFrame):
    """Encodes the spans of one resource. `span` belongs to one thread; `request` may be called by another.

    Args:
        resource: who we are.
        version: of the gateway: the instrumentation scope's.

    Holds at most some 12,000 encoded attributes and 2,000 shapes, of at most 1 KiB each; mostly far below 1 MiB in all.
    """

    __slots__ = ("_events", "_heads", "_links", "_of_events", "_of_spans")

    def __init__(self, resource: Resource, version: str) -> None:
        super().__init__(resource, version)
        self._of_spans = _Pairs(9)
        self._of_events = _Pairs(3)
        self._links = _Pairs(4)
        self._events: dict[EventShape, bytes] = {}
        self._heads: dict[tuple[str, SpanKind], _Head] = {}

    def span(self, record: SpanRecord) -> bytes:
        """`record` as the field of a request that holds it. Raises nothing."""
        name, kind, context, parent, start_ns, end_ns, attributes, events, links, has_failed, _ = record
        head = self._heads.get((name, kind)) or self._head(name, kind)
        parts = [
            head(context.trace_id.to_bytes(16, "big"), context.span_id.to_bytes(8, "big"), start_ns, end_ns),
            *map(self._of_spans.__getitem__, attributes.items()),
        ]
        if events:
            self._add_events(parts, events)
        if links:
            parts += map(self._link, links)
        parts.append(_STATUS[has_failed])
        if parent is None:
            parts.append(_SPAN_FLAGS[False])
        else:
            parts.append(_PARENT_ID + parent.span_id.to_bytes(8, "big") + _SPAN_FLAGS[parent.is_remote])
        if context.trace_state:
            parts.append(_text(3, context.trace_state))
        body = b"".join(parts)
        return _TAGS[2] + _length(len(body)) + body

    @property
    def held(self) -> int:
        """How many encoded parts are cached."""
        pairs = (self._of_spans, self._of_events, self._links)
        return len(self._heads) + len(self._events) + sum(len(cached) + cached.doubles for cached in pairs)

    def _head(self, name: str, kind: SpanKind) -> _Head:
        """What packs ids and times together with all that spans of this name and kind have in common."""
        if len(self._heads) >= _MAX_CACHED_HEADS:
            self._heads.clear()
        constant = _text(5, name) + _tag(6, _VARINT) + varint(_KINDS[kind]) + _START
        pack = struct.Struct(f"<2s16s2s8s{len(constant)}sQcQ").pack

        def head(trace_id: bytes, span_id: bytes, start_ns: int, end_ns: int) -> bytes:
            return pack(_TRACE_ID, trace_id, _SPAN_ID, span_id, constant, start_ns, _END, end_ns)

        self._heads[name, kind] = head
        return head

    def _add_events(self, parts: list[bytes], events: Iterable[EventRecord]) -> None:
        shapes, pairs = self._events, self._of_events.__getitem__
        for time_ns, shape, varying in events:
            constant = shapes.get(shape) or self._shape(shape)
            if varying:
                constant = b"".join([constant, *map(pairs, varying)])
            octets = len(constant)
            before = _BEFORE_TIME[octets] if octets < 1024 else _before_time(octets)
            parts += (before, _pack_time(time_ns), constant)

    def _shape(self, shape: EventShape) -> bytes:
        """What all events of a shape have in common. Event: time 1, name 2, attributes 3."""
        if len(self._events) >= _MAX_CACHED_SHAPES:
            self._events.clear()
        encoded = _text(2, shape.name) + b"".join(map(self._of_events.__getitem__, shape.constant.items()))
        self._events[shape] = encoded
        return encoded

    def _link(self, link: LinkRecord) -> bytes:
        context = link.context
        return _field(
            13,
            b"".join(
                [
                    _TRACE_ID,
                    context.trace_id.to_bytes(16, "big"),
                    _SPAN_ID,
                    context.span_id.to_bytes(8, "big"),
                    *map(self._links.__getitem__, link.attributes.items()),
                    _LINK_FLAGS[context.is_remote],
                ]
            ),
        )


_LOG_TIME, _OBSERVED_TIME = _tag(1, _FIXED64), _tag(11, _FIXED64)
_SEVERITY: Final = _tag(2, _VARINT)


@lru_cache(maxsize=256)
def _kind_of_line(severity: int, severity_text: str, body: str, event_name: str) -> bytes:
    """What all lines of a kind have in common: texts are constant by our own rule, and there are some dozens."""
    return _SEVERITY + varint(severity) + _text(3, severity_text) + _field(5, _any_value(body)) + _text(12, event_name)


class LogEncoder(RequestFrame):
    """Encodes the log records of one resource. `record` is for one thread at a time; `request` for any.

    LogRecord: time 1, severity_number 2, severity_text 3, body 5, attributes 6, trace_id 9, span_id 10, observed_time
    11, event_name 12.
    """

    __slots__ = ("_pairs",)

    def __init__(self, resource: Resource, version: str) -> None:
        super().__init__(resource, version)
        self._pairs = _Pairs(6)

    def record(self, record: LogRecord) -> bytes:
        """`record` as the field of a request that holds it."""
        parts = [
            _LOG_TIME + _pack_time(record.time_ns),
            _kind_of_line(record.severity, record.severity_text, record.body, record.event_name),
            *map(self._pairs.__getitem__, record.attributes.items()),
        ]
        if record.trace_id:
            parts.append(_field(9, record.trace_id))
        if record.span_id:
            parts.append(_field(10, record.span_id))
        parts.append(_OBSERVED_TIME + _pack_time(record.observed_ns))
        return _field(2, b"".join(parts))
