"""Log lines as OTLP log records, for a collector.

The handler is attached to our own loggers only, beside the one that writes lines, so that lines of the exporting
libraries never come here. Neither do those of our own exporters: while a collector is down, each report of that would
be another record for it. A record is encoded where the line is made, under the handler's lock, and then waits in a
bounded queue.

Scope and resource are those of the spans; the logger's name is the attribute `smtp.logger`. Records with an event name,
OpenTelemetry's events, are the state transitions that `StateLogger` writes.
"""

import logging
from collections.abc import Sequence
from typing import Final

from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import MAX_VALUE_CHARACTERS, AttributeValue
from otel_smtp.telemetry.exporting import Export
from otel_smtp.telemetry.logs import ACCESS, EVENT_TIME_NS, ROOT, STATES, TRACE_FLAGS, FloodGate, exception_of, extra_of
from otel_smtp.telemetry.propagation import TraceContext
from otel_smtp.telemetry.records import LogRecord
from otel_smtp.telemetry.redaction import clean
from otel_smtp.telemetry.shapes import Pair
from otel_smtp.telemetry.span_lines import LineShape, LinesOfMail, SpanLineHandler, SpanLinesAsOtlp, severity_of

_OWN: Final = ("otel_smtp.telemetry.exporting", "otel_smtp.telemetry.metric_export")
# Their values are a span's attributes, which are bounded and cleaned already.
_OF_SPANS: Final = frozenset({ACCESS, STATES})
_MAX_BODY_CHARACTERS: Final = 1024


class LogExportHandler(SpanLineHandler):
    """Passes log records to an export.

    Args:
        export: takes them; its owner shuts it down.
    """

    def __init__(self, export: Export[LogRecord]) -> None:
        super().__init__()
        self._export = export
        self._span_lines = SpanLinesAsOtlp(ACCESS)
        self.addFilter(FloodGate())
        self.addFilter(lambda record: record.name not in _OWN)
        self.own_filters = [*self.filters]

    def attach(self) -> None:
        """Receive our loggers' records from now on."""
        logging.getLogger(ROOT).addHandler(self)

    def detach(self) -> None:
        """Receive no more records."""
        logging.getLogger(ROOT).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record; a full queue drops it and counts the loss."""
        try:
            self._export.take(log_record_of(record))
        except Exception:  # noqa: BLE001 - the contract of handlers: an error is reported and never raised
            self.handleError(record)

    def take_line(
        self,
        shape: LineShape,
        pairs: Sequence[Pair],
        duration_seconds: float,
        context: TraceContext,
        time_ns: int,
        now_ns: int,
    ) -> None:
        """Queue the line of a span."""
        assert self.lock is not None  # by createLock
        with self.lock:
            if self._export.is_full:
                self._export.put(b"")  # lost and counted; it need not be encoded
            else:
                self._export.put(self._span_lines(shape, pairs, duration_seconds, context, time_ns, now_ns))

    def take_mails(self, mails: Sequence[LinesOfMail], now_ns: int) -> None:
        """Queue both lines of each mail."""
        assert self.lock is not None  # by createLock
        of_mail, export = self._span_lines.of_mail, self._export
        with self.lock:
            if export.is_full:
                export.put_all([b""] * (2 * len(mails)), 2 * len(mails))  # lost and counted; they need not be encoded
            else:
                lines = [line for mail in mails for line in of_mail(mail, now_ns)]
                export.put_all(lines, len(lines))


def log_record_of(record: logging.LogRecord) -> LogRecord:
    """A record of the standard library in OTLP's data model."""
    attributes: dict[str, AttributeValue] = {names.LOGGER: record.name}
    if record.name in _OF_SPANS:
        attributes.update(extra_of(record))
    else:
        attributes.update({name: _value(value) for name, value in extra_of(record).items()})
    trace_id, span_id = attributes.pop(names.LOG_TRACE_ID, ""), attributes.pop(names.LOG_SPAN_ID, "")
    if record.exc_info and record.exc_info[0] is not None:
        attributes[names.EXCEPTION_TYPE] = record.exc_info[0].__qualname__
        attributes[names.EXCEPTION_STACKTRACE] = exception_of(record)
    observed_ns = int(record.created * 1e9)
    return LogRecord(
        time_ns=record.__dict__.get(EVENT_TIME_NS, observed_ns),
        observed_ns=observed_ns,
        severity=severity_of(record.levelno),
        severity_text=record.levelname,
        body=clean(record.getMessage(), _MAX_BODY_CHARACTERS),
        attributes=attributes,
        event_name=record.msg if record.name == STATES else "",
        trace_id=_id(trace_id, 16),
        span_id=_id(span_id, 8),
        flags=record.__dict__.get(TRACE_FLAGS, 0),
    )


def _value(value: object) -> AttributeValue:
    match value:
        case bool() | float():
            return value
        case int() if -(1 << 63) <= value < 1 << 63:
            return value
        case tuple() | list():
            return tuple(clean(str(one), MAX_VALUE_CHARACTERS) for one in value)
        case _:
            return clean(str(value), MAX_VALUE_CHARACTERS)


def _id(digits: object, octets: int) -> bytes:
    """The octets of a hexadecimal id; b"" if there is none."""
    try:
        decoded = bytes.fromhex(str(digits))
    except ValueError:
        return b""
    return decoded if len(decoded) == octets else b""
