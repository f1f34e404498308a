"""Lines of spans from templates: what the lines of one shape have in common is made once.

A span's shape (`shapes`) says what is constant about it; so its line in the access log has a template too, in each of
the forms that a line has. This module decides what all forms share, a line's attributes and its level, for lines made
from templates and for those made by `logging`.
"""

import json
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from json.encoder import encode_basestring_ascii as _quoted
from typing import Final, NamedTuple

from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import ATTRIBUTES, Attributes, On
from otel_smtp.telemetry.otlp import (
    LENGTHS,
    LOG_TIME,
    OBSERVED_TIME,
    TAGS,
    Integers,
    Pairs,
    field,
    flags_of_line,
    key_value,
    kind_of_line,
    length,
    pack_double,
    pack_time,
    text_head,
)
from otel_smtp.telemetry.propagation import TraceContext
from otel_smtp.telemetry.safe_handler import SafeHandler
from otel_smtp.telemetry.shapes import SPAN_PAIRS, Pair, SpanShape

ON_LINES: Final = frozenset(attribute.name for attribute in ATTRIBUTES.values() if On.LOG in attribute.on)
_MAX_REMEMBERED: Final = 1024
# OpenTelemetry's log data model, "Severity": the lowest number of each range.
_SEVERITIES: Final = ((logging.CRITICAL, 21), (logging.ERROR, 17), (logging.WARNING, 13), (logging.INFO, 9))
_SEVERITY_DEBUG: Final = 5

# The text before these values of a line: in JSON, and in OTLP.
_JSON_DURATION: Final = f', "{names.LOG_DURATION}": '
_JSON_TRACE_ID: Final = f', "{names.LOG_TRACE_ID}": "'
_JSON_SPAN_ID: Final = f'", "{names.LOG_SPAN_ID}": "'
_JSON_WORDS: Final = f', "{names.REPLY_TEXT}": '
_JSON_NUMBER: Final = f', "{names.TRANSACTION_NUMBER}": '
_JSON_SIZE: Final = f', "{names.MESSAGE_SIZE}": '
_ATTRIBUTE: Final = 6  # LogRecord.attributes
_OTLP_DURATION: Final = field(_ATTRIBUTE, key_value(names.LOG_DURATION, 0.0))[:-8]
_OTLP_NUMBER, _OTLP_SIZE = Integers(_ATTRIBUTE, names.TRANSACTION_NUMBER), Integers(_ATTRIBUTE, names.MESSAGE_SIZE)
# By the flags of the trace's context, which are one octet: these, and the beginning of the id.
_OTLP_TRACE_ID: Final = tuple(flags_of_line(flags) + TAGS[9] + b"\x10" for flags in range(256))
_OTLP_SPAN_ID: Final = TAGS[10] + b"\x08"


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


class ShownDomains:
    """The attributes with the domains of a sender, or of recipients: made once in each form.

    Attributes:
        pairs: the attributes.
        octets: of a span.
        json, otlp: of a line; None before the first one.
    """

    __slots__ = ("json", "octets", "otlp", "pairs")

    def __init__(self, *pairs: Pair) -> None:
        self.pairs = pairs
        self.octets = b"".join(map(SPAN_PAIRS.__getitem__, pairs))
        self.json: str | None = None
        self.otlp: bytes | None = None


class LinesOfMail(NamedTuple):
    """The variable parts of an ordinary mail's two lines: of its only attempt, and of its transaction.

    Attributes:
        words: the upstream's.
        sender, recipients: whose domains they have.
        trace_id: 16 octets. `attempt_id`, `transaction_id`: of the spans, 8 octets. `flags`: of the transaction's.
        times: when each span ended, since the epoch.
    """

    shapes: tuple[LineShape, LineShape]
    connection_id: str
    words: str
    number: int
    octets: int
    sender: ShownDomains
    recipients: ShownDomains
    durations: tuple[float, float]
    trace_id: bytes
    attempt_id: bytes
    transaction_id: bytes
    flags: int
    times: tuple[int, int]


lines_of_mail: Final = partial(tuple.__new__, LinesOfMail)  # its own constructor is a function in Python


WriteLines = Callable[[Sequence[LinesOfMail]], None]
"""Writes the two lines of each of several ordinary mails, in their order."""


class LineOfSpan(NamedTuple):
    """The variable part of one span's line.

    Attributes:
        pairs: what varies, of `ON_LINES`.
        time_ns: when the span ended, since the epoch.
    """

    shape: LineShape
    pairs: Sequence[Pair]
    duration_seconds: float
    context: TraceContext
    time_ns: int


class SpanLineHandler(SafeHandler):
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

    def take_mails(self, mails: Sequence[LinesOfMail], now_ns: int) -> None:
        """Write the two lines of each of several ordinary mails, the attempt's first. On the event loop."""
        raise NotImplementedError


class _JsonFields(dict[Pair, str]):
    """Pairs as they stand in a JSON object. Texts are remembered, as they come back: in a mail, in a connection,
    always.

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
                self.clear()  # the dozen that keep coming back are soon made again
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
        varying = "".join(map(self._fields.__getitem__, pairs))
        return (
            f"{self._stamp(now_ns)}{shape.json or self._head(shape)}{varying}{_JSON_DURATION}{duration_seconds!r}"
            f'{_JSON_TRACE_ID}{context.trace_id:032x}{_JSON_SPAN_ID}{context.span_id:016x}"}}'
        )

    def of_mail(self, mail: LinesOfMail, now_ns: int) -> tuple[str, str]:
        """Both lines of an ordinary mail, with their ends; what they have in common is written once."""
        (
            (attempt, transaction), connection_id, words, number, octets, sender, recipients, durations,
            trace_id, attempt_id, transaction_id, _, _,
        ) = mail  # fmt: skip
        stamp = self._stamp(now_ns)
        origin = self._fields[names.CONNECTION_ID, connection_id]
        said = f"{_JSON_WORDS}{_quoted(words)}"
        of_sender = sender.json if sender.json is not None else self._shown(sender)
        of_recipients = recipients.json if recipients.json is not None else self._shown(recipients)
        trace = f"{_JSON_TRACE_ID}{trace_id.hex()}{_JSON_SPAN_ID}"
        return (
            f"{stamp}{attempt.json or self._head(attempt)}{origin}{said}{_JSON_DURATION}{durations[0]!r}"
            f'{trace}{attempt_id.hex()}"}}\n',
            f"{stamp}{transaction.json or self._head(transaction)}{said}{origin}{_JSON_NUMBER}{number}"
            f"{_JSON_SIZE}{octets}{of_sender}{of_recipients}{_JSON_DURATION}{durations[1]!r}"
            f'{trace}{transaction_id.hex()}"}}\n',
        )

    def _shown(self, domains: ShownDomains) -> str:
        domains.json = "".join(map(self._fields.__getitem__, domains.pairs))
        return domains.json

    def _head(self, shape: LineShape) -> str:
        """What all lines of a shape have, behind their time."""
        head: Attributes = {
            names.LOG_LEVEL: logging.getLevelName(shape.level).lower(),
            names.LOG_LOGGER: self._logger_name,
            names.LOG_EVENT: shape.name,
        }
        shape.json = '"' + "".join(map(self._fields.__getitem__, (*head.items(), *shape.constant.items())))
        return shape.json

    def _stamp(self, now_ns: int) -> str:
        """The beginning of a line, up to the end of its time."""
        now_us = now_ns // 1000
        second = now_us // 1_000_000
        if second != self._second:
            self._second = second
            self._begin = f'{{"{names.LOG_TIMESTAMP}": "{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}'
        return f"{self._begin}.{now_us % 1_000_000:06}Z"


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
        return _as_field(
            (
                LOG_TIME,
                pack_time(time_ns),
                shape.otlp or self._head(shape),
                *map(self._fields.__getitem__, pairs),
                _OTLP_DURATION,
                pack_double(duration_seconds),
                _OTLP_TRACE_ID[context.flags],
                context.trace_id.to_bytes(16, "big"),
                _OTLP_SPAN_ID,
                context.span_id.to_bytes(8, "big"),
                OBSERVED_TIME,
                pack_time(now_ns),
            )
        )

    def of_mail(self, mail: LinesOfMail, now_ns: int) -> tuple[bytes, bytes]:
        """Both lines of an ordinary mail, likewise."""
        (
            (attempt, transaction), connection_id, text, number, octets, sender, recipients, durations,
            trace_id, attempt_id, transaction_id, flags, times,
        ) = mail  # fmt: skip
        words = text.encode("utf-8", "replace")
        said = text_head(_ATTRIBUTE, names.REPLY_TEXT, len(words)) + words
        origin = self._fields[names.CONNECTION_ID, connection_id]
        trace = _OTLP_TRACE_ID[flags] + trace_id + _OTLP_SPAN_ID
        observed = OBSERVED_TIME + pack_time(now_ns)
        return (
            _as_field(
                (
                    LOG_TIME,
                    pack_time(times[0]),
                    attempt.otlp or self._head(attempt),
                    origin,
                    said,
                    _OTLP_DURATION,
                    pack_double(durations[0]),
                    trace,
                    attempt_id,
                    observed,
                )
            ),
            _as_field(
                (
                    LOG_TIME,
                    pack_time(times[1]),
                    transaction.otlp or self._head(transaction),
                    said,
                    origin,
                    _OTLP_NUMBER(number),
                    _OTLP_SIZE(octets),
                    sender.otlp if sender.otlp is not None else self._shown(sender),
                    recipients.otlp if recipients.otlp is not None else self._shown(recipients),
                    _OTLP_DURATION,
                    pack_double(durations[1]),
                    trace,
                    transaction_id,
                    observed,
                )
            ),
        )

    def _shown(self, domains: ShownDomains) -> bytes:
        domains.otlp = b"".join(map(self._fields.__getitem__, domains.pairs))
        return domains.otlp

    def _head(self, shape: LineShape) -> bytes:
        """What all lines of a shape have, behind their time."""
        head = kind_of_line(severity_of(shape.level), logging.getLevelName(shape.level), shape.name, "")
        of_all: Sequence[Pair] = ((names.LOGGER, self._logger_name), *shape.constant.items())
        shape.otlp = head + b"".join(map(self._fields.__getitem__, of_all))
        return shape.otlp


def _as_field(parts: Sequence[bytes]) -> bytes:
    octets = b"".join(parts)
    size = len(octets)
    return TAGS[2] + (LENGTHS[size] if size < len(LENGTHS) else length(size)) + octets


def severity_of(level: int) -> int:
    """OTLP's number of a level of `logging`."""
    for least, number in _SEVERITIES:
        if level >= least:
            return number
    return _SEVERITY_DEBUG
