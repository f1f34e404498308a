"""Lines of spans from templates: what the lines of one shape have in common is made once.

A span's shape (`shapes`) says what is constant about it; so its line in the access log has a template too, in each of
the forms that a line has. What is the same in all of them, which attributes a line has and at which level it stands, is
decided here, for the lines that are made of templates and for those that `logging` makes.
"""

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from json.encoder import encode_basestring_ascii as _quoted
from typing import Final

from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import ATTRIBUTES, Attributes, On
from otel_smtp.telemetry.otlp import (
    LENGTHS,
    LOG_TIME,
    OBSERVED_TIME,
    TAGS,
    Pairs,
    field,
    key_value,
    kind_of_line,
    length,
    pack_double,
    pack_time,
)
from otel_smtp.telemetry.propagation import TraceContext
from otel_smtp.telemetry.shapes import Pair, SpanShape

ON_LINES: Final = frozenset(attribute.name for attribute in ATTRIBUTES.values() if On.LOG in attribute.on)
_MAX_REMEMBERED: Final = 1024
# OpenTelemetry's log data model, "Severity": the lowest number of each range.
_SEVERITIES: Final = ((logging.CRITICAL, 21), (logging.ERROR, 17), (logging.WARNING, 13), (logging.INFO, 9))
_SEVERITY_DEBUG: Final = 5

# What stands before these values of a line: in JSON, and in OTLP.
_JSON_DURATION: Final = f', "{names.LOG_DURATION}": '
_JSON_TRACE_ID: Final = f', "{names.LOG_TRACE_ID}": "'
_JSON_SPAN_ID: Final = f'", "{names.LOG_SPAN_ID}": "'
_ATTRIBUTE: Final = 6  # LogRecord.attributes
_OTLP_DURATION: Final = field(_ATTRIBUTE, key_value(names.LOG_DURATION, 0.0))[:-8]
_OTLP_TRACE_ID, _OTLP_SPAN_ID = TAGS[9] + b"\x10", TAGS[10] + b"\x08"


class LineShape:
    """Lines of one shape.

    Attributes:
        level: "warning" where the gateway, or what it depends on, failed.
        constant: what stands on each of them.
        json, otlp: the same, with level and name, in these forms; empty before the first line.
    """

    __slots__ = ("constant", "json", "level", "name", "otlp")

    def __init__(self, name: str, constant: Attributes, *, has_failed: bool) -> None:
        self.name = name
        self.level = logging.WARNING if has_failed else logging.INFO
        self.constant = {key: value for key, value in constant.items() if key in ON_LINES}
        self.json = ""
        self.otlp = b""


def line_shape(shape: SpanShape) -> LineShape:
    """The line's shape, kept with the span's."""
    found = shape.line
    if found is None:
        found = shape.line = LineShape(shape.name, {**shape.constant, **shape.on_line}, has_failed=shape.has_failed)
    return found


class SpanLineHandler(logging.Handler):
    """A handler that can write a span's line without a record of `logging`.

    Attributes:
        own_filters: those that let all lines of mail pass; with any other, a record has to be made.
    """

    own_filters: Sequence[object]

    def take_line(
        self,
        shape: LineShape,
        pairs: Sequence[Pair],
        duration_seconds: float,
        context: TraceContext,
        time_ns: int,
        now_ns: int,
    ) -> None:
        """Write the line of a span. On the event loop.

        Args:
            pairs: what varies, of `ON_LINES`.
            time_ns, now_ns: when the span ended and what the time is, since the epoch.
        """
        raise NotImplementedError


class _JsonFields(dict[Pair, str]):
    """Pairs as they stand in a JSON object. Texts are remembered, as they come back: in a mail, a connection, for ever.

    Under one name there is one type of value, so that 1, 1.0 and True never stand for one another.
    """

    __slots__ = ()

    def __missing__(self, pair: Pair) -> str:
        name, value = pair
        if value.__class__ is int:
            return f', "{name}": {value}'
        made = f', "{name}": {_quoted(value) if value.__class__ is str else json.dumps(value)}'
        if value.__class__ is not float:
            if len(self) >= _MAX_REMEMBERED:
                self.clear()  # the dozen that come back for ever are soon made again
            self[pair] = made
        return made


class _OtlpFields(Pairs):
    """Pairs as attributes of log records; of texts that do not come back, those of the last mails too.

    A delivery's words are its transaction's.
    """

    __slots__ = ()

    def _unique(self, key: str, value: str) -> bytes:
        encoded = super()._unique(key, value)
        if len(self) >= _MAX_REMEMBERED:
            self.clear()
        self[key, value] = encoded
        return encoded


class SpanLinesAsJson:
    """Makes a span's line the JSON object that `logs.JsonRenderer` makes of its record.

    Args:
        logger_name: whose lines they are.
    """

    def __init__(self, logger_name: str) -> None:
        self._logger_name = logger_name
        self._fields = _JsonFields()
        self._second = 0
        self._begin = ""  # of lines in this second

    def __call__(
        self, shape: LineShape, pairs: Sequence[Pair], duration_seconds: float, context: TraceContext, now_ns: int
    ) -> str:
        """The line, without its end."""
        if not shape.json:
            head: Attributes = {
                names.LOG_LEVEL: logging.getLevelName(shape.level).lower(),
                names.LOG_LOGGER: self._logger_name,
                names.LOG_EVENT: shape.name,
            }
            shape.json = "".join(map(self._fields.__getitem__, (*head.items(), *shape.constant.items())))
        now_us = now_ns // 1000
        if now_us // 1_000_000 != self._second:
            self._second = now_us // 1_000_000
            self._begin = f'{{"{names.LOG_TIMESTAMP}": "{datetime.fromtimestamp(self._second, UTC):%Y-%m-%dT%H:%M:%S}'
        varying = "".join(map(self._fields.__getitem__, pairs))
        return (
            f'{self._begin}.{now_us % 1_000_000:06}Z"{shape.json}{varying}{_JSON_DURATION}{duration_seconds!r}'
            f'{_JSON_TRACE_ID}{context.trace_id:032x}{_JSON_SPAN_ID}{context.span_id:016x}"}}'
        )


class SpanLinesAsOtlp:
    """Encodes a span's line as `otlp.LogEncoder` does its record. For one thread at a time.

    Args:
        logger_name: whose lines they are.
    """

    def __init__(self, logger_name: str) -> None:
        self._logger_name = logger_name
        self._fields = _OtlpFields(_ATTRIBUTE)

    def __call__(
        self,
        shape: LineShape,
        pairs: Sequence[Pair],
        duration_seconds: float,
        context: TraceContext,
        time_ns: int,
        now_ns: int,
    ) -> bytes:
        """The line as the field of a request that holds it."""
        encoded = self._fields.__getitem__
        if not shape.otlp:
            head = kind_of_line(severity_of(shape.level), logging.getLevelName(shape.level), shape.name, "")
            of_all: Sequence[Pair] = ((names.LOGGER, self._logger_name), *shape.constant.items())
            shape.otlp = head + b"".join(map(encoded, of_all))
        octets = b"".join(
            (
                LOG_TIME,
                pack_time(time_ns),
                shape.otlp,
                *map(encoded, pairs),
                _OTLP_DURATION,
                pack_double(duration_seconds),
                _OTLP_TRACE_ID,
                context.trace_id.to_bytes(16, "big"),
                _OTLP_SPAN_ID,
                context.span_id.to_bytes(8, "big"),
                OBSERVED_TIME,
                pack_time(now_ns),
            )
        )
        size = len(octets)
        return TAGS[2] + (LENGTHS[size] if size < len(LENGTHS) else length(size)) + octets


def severity_of(level: int) -> int:
    """OTLP's number of a level of `logging`."""
    for least, number in _SEVERITIES:
        if level >= least:
            return number
    return _SEVERITY_DEBUG
