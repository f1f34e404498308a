"""The protobuf wire format, and OTLP requests around spans and log records: the octets, written by hand.

The wire format is a list of fields: a tag (number and type of the field), for most types a length, the value. So a
message that was written once is a constant, and what our telemetry is made of is mostly constant: names, kinds,
attributes that are the same for every mail. All of that is looked up here, not made: an attribute is encoded once for
each of its values, in a bounded cache, as long as its values come back at all. `shapes` builds spans of these parts.

The octets equal those of the SDK's exporter for the same spans, field by field; a test compares the two.

Sources: opentelemetry-proto 1.x (trace.proto, logs.proto, common.proto, resource.proto: fields are only ever
added), protobuf encoding (protobuf.dev/programming-guides/encoding).
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Final

from opentelemetry.sdk.resources import Resource

from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import ATTRIBUTES, SCHEMA_URL, SCOPE_NAME, Type
from otel_smtp.telemetry.records import LogRecord

# Values that do not come back push out those that do. The cache is emptied when it is full: the hundred attributes of
# a gateway that are constant are then made again, once in thousands of spans.
_MAX_CACHED_PAIRS: Final = 4096
_MAX_CACHED_NAMES: Final = 1024
_MAX_CACHED_INTEGERS: Final = 128  # each with its first values
_MAX_CACHED_OCTETS: Final = 1024  # tracebacks have more

# Values that hardly ever come back: not worth a place in the cache.
_UNIQUE: Final = frozenset({names.REPLY_TEXT, names.FAILURE_REASON, names.MESSAGE_ID, names.SPOOL_ID})
# Our own names, with the class of their values, always. In a cache 1, 1.0 and True are one key; under one of these
# names only one of them occurs. Strings are never taken for anything else, numbers are not cached by their value.
_CLASSES: Final[Mapping[Type, type]] = {Type.BOOLEAN: bool, Type.STRINGS: tuple}
_CACHEABLE: Final = {a.name: _CLASSES[a.type] for a in ATTRIBUTES.values() if a.type in _CLASSES}

# Fields: number << 3 | type; the types are 0 varint, 1 eight octets, 2 octets with their length, 5 four octets.
VARINT, FIXED64, OCTETS, FIXED32 = 0, 1, 2, 5


def tag(number: int, kind: int) -> bytes:
    """The octets before the value of a field."""
    return varint(number << 3 | kind)


def varint(value: int) -> bytes:
    """`value`, not negative, seven bits an octet, the lowest first."""
    if 0x7F < value < 0x4000:
        return bytes((value & 0x7F | 0x80, value >> 7))
    if 0x3FFF < value < 0x20_0000:
        return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
    octets = bytearray()
    while value > 0x7F:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


TAGS: Final = tuple(tag(number, OCTETS) for number in range(17))
LENGTHS: Final = tuple(varint(length) for length in range(2048))


def length(octets: int) -> bytes:
    """The length prefix of a field with this many octets."""
    return LENGTHS[octets] if octets < 2048 else varint(octets)


def field(number: int, content: bytes) -> bytes:
    """A field of octets, or of a message."""
    return TAGS[number] + length(len(content)) + content


def text(number: int, value: str) -> bytes:
    """A string field; nothing where it is empty, as proto3 has it."""
    return field(number, _utf8(value)) if value else b""


def _utf8(value: str) -> bytes:
    # Text of peers was cleaned long before; if a lone surrogate is left, one character is lost and no batch.
    return value.encode("utf-8", "replace")


# AnyValue: string 1, bool 2, int 3, double 4, array 5, key-value list 6, bytes 7. It is one of them, so it is
# written even where it is zero or empty.
_BOOL_VALUE, _INT_VALUE, _DOUBLE_VALUE = tag(2, VARINT), tag(3, VARINT), tag(4, FIXED64)
pack_double: Final = struct.Struct("<d").pack
pack_time: Final = struct.Struct("<Q").pack


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
            return field(1, _utf8(value))
        case int():
            if not -(1 << 63) <= value < 1 << 63:
                raise ValueError(f"{value} is not a 64-bit integer")
            # Two's complement: a negative number has ten octets.
            return _INT_VALUE + varint(value & 0xFFFF_FFFF_FFFF_FFFF)
        case float():
            return _DOUBLE_VALUE + pack_double(value)
        case bytes():
            return field(7, value)
        case Sequence():
            return field(5, b"".join(field(1, _any_value(one)) for one in value))
        case Mapping():
            return field(6, b"".join(field(1, key_value(str(key), one)) for key, one in value.items()))
        case _:
            raise TypeError(f"an attribute cannot hold {type(value)}")


@lru_cache(maxsize=1024)
def key_octets(key: str) -> bytes:
    return text(1, key)


def key_value(key: str, value: object) -> bytes:
    """The fields of a KeyValue."""
    return key_octets(key) + field(2, _any_value(value))


class Integers:
    """One integer attribute: what surrounds its value is encoded once.

    Args:
        number: of the field that holds an attribute.
        name: of the attribute.

    Attributes:
        small: the whole attribute, for each value of one octet.
        two_octets, three_octets: the octets before a value of that length.
    """

    __slots__ = ("_name", "_number", "small", "three_octets", "two_octets")

    def __init__(self, number: int, name: str) -> None:
        self._number = number
        self._name = name
        self.small = tuple(field(number, key_value(name, value)) for value in range(0x80))
        self.two_octets = field(number, key_value(name, 0x80))[:-2]
        self.three_octets = field(number, key_value(name, 0x4000))[:-3]

    def __call__(self, value: int) -> bytes:
        """The attribute with `value`, as a field.

        Raises:
            ValueError: an integer of more than 64 bits.
        """
        if 0 <= value < 0x80:
            return self.small[value]
        if 0x80 <= value < 0x4000:
            return self.two_octets + (LENGTHS[value] if value < 2048 else varint(value))
        if 0x4000 <= value < 0x20_0000:
            return self.three_octets + varint(value)
        return field(self._number, key_value(self._name, value))


def text_head(number: int, key: str, octets: int) -> bytes:
    """The octets before a text of this length, the value of the attribute `key`."""
    heads = _TEXT_HEADS[number, key]
    return heads[octets] if octets < len(heads) else _text_head(number, key, octets)


def _text_head(number: int, key: str, octets: int) -> bytes:
    return field(number, key_value(key, " " * octets))[: -octets or None]


class _TextHeads(dict[tuple[int, str], tuple[bytes, ...]]):
    def __missing__(self, item: tuple[int, str]) -> tuple[bytes, ...]:
        heads = self[item] = tuple(_text_head(*item, octets) for octets in range(256))
        return heads


_TEXT_HEADS: Final = _TextHeads()  # of the few attributes that are encoded so


class Mould:
    """Octets with gaps for numbers and ids, so that what is constant is copied in one go.

    Args:
        pieces: octets, and formats of gaps as `struct` has them, in their order.

    Attributes:
        size: of what comes out, in octets.
    """

    __slots__ = ("_pack", "_parts", "size")

    def __init__(self, *pieces: bytes | str) -> None:
        parts: list[bytes | float] = [b""]
        formats: list[str] = [""]
        for piece in pieces:
            if isinstance(piece, str):
                parts += (0, b"")
                formats += (piece, "")
            else:
                parts[-1] += piece  # type: ignore[operator]  # every other part is octets
        formats[::2] = [f"{len(part)}s" for part in parts[::2]]  # type: ignore[arg-type]  # as above
        packing = struct.Struct("<" + "".join(formats))
        self._pack: Callable[..., bytes] = packing.pack
        self._parts = parts
        self.size = packing.size

    def fill(self, values: Sequence[bytes | float]) -> bytes:
        """The octets with `values` in the gaps.

        Raises:
            ValueError, struct.error: they do not fit.
        """
        parts = self._parts.copy()
        parts[1::2] = values
        return self._pack(*parts)


class Pairs(dict[tuple[str, object], bytes]):
    """Attributes as fields of the message that holds them, by name and value; made when first asked for.

    Values that come back, texts above all, are kept; of numbers what surrounds them is.

    Args:
        number: of the field that holds an attribute: 9 in a span, 3 in an event, 6 in a log record.
    """

    __slots__ = ("_doubles", "_integers", "_keys", "_number")

    def __init__(self, number: int) -> None:
        self._number = number
        self._doubles: dict[str, bytes] = {}
        self._integers: dict[str, Integers] = {}
        self._keys: dict[str, bytes] = {}

    @property
    def held(self) -> int:
        """How many encoded parts are cached."""
        return len(self) + len(self._doubles) + len(self._integers) + len(self._keys)

    def __missing__(self, item: tuple[str, object]) -> bytes:
        key, value = item
        kind = value.__class__
        if kind is float:
            prefix = self._doubles.get(key)
            return self._double(key, value) if prefix is None else prefix + pack_double(value)
        if kind is str and key in _UNIQUE:
            return self._unique(key, value)  # type: ignore[arg-type]  # by its class
        try:
            if kind is int:
                return (self._integers.get(key) or self._integer(key))(value)  # type: ignore[arg-type]  # as above
            encoded = field(self._number, key_value(key, value))
        except (ValueError, TypeError):
            return b""  # the SDK leaves such an attribute out too
        if (kind is str or _CACHEABLE.get(key) is kind) and len(encoded) <= _MAX_CACHED_OCTETS:
            if len(self) >= _MAX_CACHED_PAIRS:
                self.clear()
            self[item] = encoded
        return encoded

    def _double(self, key: str, value: object) -> bytes:
        encoded = field(self._number, key_value(key, value))
        if len(self._doubles) >= _MAX_CACHED_NAMES:
            self._doubles.clear()
        self._doubles[key] = encoded[:-8]
        return encoded

    def _integer(self, key: str) -> Integers:
        if len(self._integers) >= _MAX_CACHED_INTEGERS:
            self._integers.clear()
        integers = self._integers[key] = Integers(self._number, key)
        return integers

    def _unique(self, key: str, value: str) -> bytes:
        """A text that does not come back: KeyValue { key, AnyValue { string } }, in one go."""
        octets = _utf8(value)
        size = len(octets)
        if size > _MAX_CACHED_OCTETS:
            return field(self._number, key_value(key, value))
        head = self._keys.get(key)
        if head is None:
            head = self._keys[key] = key_octets(key) + TAGS[2]
        before = LENGTHS[size]
        size += 1 + len(before)
        between = LENGTHS[size]
        size += len(head) + len(between)
        return b"".join((TAGS[self._number], LENGTHS[size], head, between, TAGS[1], before, octets))


class RequestFrame:
    """Requests of one resource: what is around the spans, or the log records, which have the same fields around them.

    Args:
        resource: our identity.
        version: of the gateway: the instrumentation scope's.
    """

    __slots__ = ("_resource", "_scope", "_scope_end")

    def __init__(self, resource: Resource, version: str) -> None:
        attributes = b"".join(Pairs(1)[item] for item in resource.attributes.items())
        # ResourceSpans, ResourceLogs: resource 1, scope_spans or scope_logs 2, schema_url 3.
        self._resource = (field(1, attributes), text(3, resource.schema_url))
        # ScopeSpans, ScopeLogs: scope 1, spans or log_records 2, schema_url 3.
        self._scope = field(1, text(1, SCOPE_NAME) + text(2, version))
        self._scope_end = text(3, SCHEMA_URL)

    def request(self, items: Sequence[bytes]) -> list[bytes]:
        """An `ExportTraceServiceRequest` or `ExportLogsServiceRequest` of spans or records that are encoded, in parts:
        these are most of it, and are not copied."""
        resource, resource_end = self._resource
        in_scope = len(self._scope) + sum(map(len, items)) + len(self._scope_end)
        scope = TAGS[2] + length(in_scope)
        in_resource = len(resource) + len(scope) + in_scope + len(resource_end)
        start = TAGS[1] + length(in_resource)
        return [start, resource, scope, self._scope, *items, self._scope_end, resource_end]


LOG_TIME, OBSERVED_TIME = tag(1, FIXED64), tag(11, FIXED64)
_SEVERITY: Final = tag(2, VARINT)


@lru_cache(maxsize=256)
def kind_of_line(severity: int, severity_text: str, body: str, event_name: str) -> bytes:
    """What all lines of a kind have in common: texts are constant by our own rule, and there are some dozens."""
    return _SEVERITY + varint(severity) + text(3, severity_text) + field(5, _any_value(body)) + text(12, event_name)


def flags_of_line(flags: int) -> bytes:
    """The trace flags of a line's context; nothing where none is set, as proto3 has it."""
    return tag(8, FIXED32) + flags.to_bytes(4, "little") if flags else b""


class LogEncoder(RequestFrame):
    """Encodes the log records of one resource. `record` is for one thread at a time; `request` for any.

    LogRecord: time 1, severity_number 2, severity_text 3, body 5, attributes 6, flags 8, trace_id 9, span_id 10,
    observed_time 11, event_name 12.
    """

    __slots__ = ("_pairs",)

    def __init__(self, resource: Resource, version: str) -> None:
        super().__init__(resource, version)
        self._pairs = Pairs(6)

    def record(self, record: LogRecord) -> bytes:
        """`record` as the field of a request that holds it."""
        parts = [
            LOG_TIME + pack_time(record.time_ns),
            kind_of_line(record.severity, record.severity_text, record.body, record.event_name),
            *map(self._pairs.__getitem__, record.attributes.items()),
        ]
        parts.append(flags_of_line(record.flags))
        if record.trace_id:
            parts.append(field(9, record.trace_id))
        if record.span_id:
            parts.append(field(10, record.span_id))
        parts.append(OBSERVED_TIME + pack_time(record.observed_ns))
        return field(2, b"".join(parts))
