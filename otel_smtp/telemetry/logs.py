"""Log lines: one event, one line, as JSON for machines or as text for people, with trace and span id.

People get one line per mail (`terminal_log`), machines one per span.

Code that logs uses the standard library's `logging`, a constant text and values in `extra`. This module makes lines
from them. Lines of telemetry's own are those of the access log (`access_log`), a line for each connection, transaction
and delivery that is over, and of `StateLogger`, a line for each state transition where those are wanted.

Any client can cause lines, one for each refused connection: `FloodGate` bounds these. Lines of mail are never left out.

No peer can forge a line: JSON escapes all but printable ASCII, text is cleaned. Lines of telemetry carry the attributes
of the span, so `redaction` applies to them too.
"""

import contextlib
import json
import logging
import traceback
from collections.abc import Mapping, MutableMapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, TextIO

from otel_smtp.smtp.states import ConnState
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import Attributes
from otel_smtp.telemetry.line_output import line_output
from otel_smtp.telemetry.propagation import TraceContext
from otel_smtp.telemetry.redaction import clean
from otel_smtp.telemetry.safe_handler import SafeHandler
from otel_smtp.telemetry.shapes import Pair
from otel_smtp.telemetry.span_lines import LineShape, LinesOfMail, SpanLineHandler, SpanLinesAsJson
from otel_smtp.telemetry.terminal_log import LINE, MailFilter

logger: Final = logging.getLogger("otel_smtp.telemetry.logs")

ROOT: Final = "otel_smtp"
ACCESS: Final = "otel_smtp.access"
STATES: Final = "otel_smtp.state"
SPOOL: Final = "otel_smtp.spool."  # each line is about one message

# On records of ours: when it happened, in nanoseconds since the epoch. Never in a line, which has `timestamp`.
EVENT_TIME_NS: Final = "event_time_ns"
# Likewise: those of the span's context (W3C trace-flags).
TRACE_FLAGS: Final = "trace_flags"

# The attributes of every record: all others came by `extra`.
_STANDARD: Final = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {
    "message",
    "asctime",
    "taskName",  # from Python 3.12 on
    EVENT_TIME_NS,
    TRACE_FLAGS,
    LINE,
}
LINES_A_SECOND: Final = 50  # for people to see what is going on; the metrics count it
_MAX_TEXTS: Final = 1000
# A traceback may be long, and its end is what counts; everything else has its own bound before it comes here.
_MAX_TRACEBACK_CHARACTERS: Final = 8192
_MAX_TEXT_CHARACTERS: Final = 1024


class LogFormat(StrEnum):
    """The format of lines."""

    AUTO = "auto"  # text on a terminal, JSON else
    JSON = "json"
    TEXT = "text"


def set_up_logging(format_: str, level: str, stream: TextIO, *, colors: bool | None = None) -> None:
    """Send all log lines of the process to `stream`, in one format.

    Libraries' lines are logged from "warning" on. Calling it again replaces the earlier set-up.

    Args:
        format_: auto, json or text.
        level: debug, info, warning, error or critical, for our own lines.
        colors: in text; None: if `stream` is a terminal.

    Raises:
        ValueError: one of them is none of these.
    """
    shape = LogFormat(format_)
    if level.upper() not in logging.getLevelNamesMapping():
        raise ValueError(f"{level!r} is not a log level")
    is_text = shape is LogFormat.TEXT or (shape is LogFormat.AUTO and stream.isatty())
    colors = stream.isatty() if colors is None else colors
    handler = TextLines(stream, colors=colors) if is_text else JsonLines(stream)
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, LineHandler)]:
        root.removeHandler(old)
        old.flush()
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    set_log_level(level)


def set_log_level(level: str) -> None:
    """Log our own lines from `level` on: debug, info, warning, error or critical."""
    logging.getLogger(ROOT).setLevel(level.upper())


class LineHandler(SafeHandler):
    """Writes a line for each record.

    Args:
        stream: its owner keeps it open.
    """

    def __init__(self, stream: TextIO, render: "JsonRenderer | TextRenderer") -> None:
        super().__init__()
        self.setFormatter(LineFormatter(render))
        self.addFilter(FloodGate())
        self._output = line_output(stream, _tell_lost)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line at once."""
        try:
            self._output.write(self.format(record) + "\n")
        except Exception:  # noqa: BLE001 - the contract of handlers: an error is reported and never raised
            self.handleError(record)

    def say_plainly(self, line: str) -> None:
        """Write a line unchanged."""
        with contextlib.suppress(Exception):  # then there is no way to report it
            self._output.write(line + "\n")

    def flush(self) -> None:
        """Write waiting lines, without waiting long for the reader."""
        self._output.flush()

    def close(self) -> None:
        """Release the output's own resources; flush before."""
        self._output.close()
        super().close()


class JsonLines(LineHandler, SpanLineHandler):
    """Writes lines for machines; those of spans from templates, in batches."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream, JsonRenderer())
        self._span_lines = SpanLinesAsJson(ACCESS)
        self.own_filters = [*self.filters]

    def take_line(
        self,
        shape: LineShape,
        pairs: Sequence[Pair],
        duration_seconds: float,
        context: TraceContext,
        time_ns: int,
        now_ns: int,
    ) -> None:
        """Write the line of a span with others of this turn of the event loop."""
        self._output.add(self._span_lines(shape, pairs, duration_seconds, context, now_ns) + "\n")

    def take_mails(self, mails: Sequence[LinesOfMail], now_ns: int) -> None:
        """Write both lines of each mail, likewise."""
        of_mail = self._span_lines.of_mail
        self._output.write_all([line for mail in mails for line in of_mail(mail, now_ns)])


class TextLines(LineHandler):
    """Writes lines for people, of which each mail has one."""

    def __init__(self, stream: TextIO, *, colors: bool) -> None:
        super().__init__(stream, TextRenderer(colors=colors))
        self.addFilter(MailFilter(ACCESS, colors=colors))


def _tell_lost(lines: int) -> None:
    logger.warning("log lines lost: reader too slow", extra={"lines": lines})


class FloodGate:
    """A filter of log records: at most `LINES_A_SECOND` alike, that is of one logger and one text; then a count.

    State events, transactions, deliveries, what the spool says and connections that carried mail pass always. Without
    mail, every accepted socket is a line, so that a flood of connections would be a flood of lines, and fill the disk
    behind it.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], tuple[int, int]] = {}  # alike -> the second, and the lines in it so far

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written; the first one of a second says how many were not."""
        if record.name == STATES or record.name.startswith(SPOOL) or (record.name == ACCESS and _is_of_mail(record)):
            return True
        alike = (record.name, str(record.msg))
        now = int(record.created)
        second, lines = self._seconds.get(alike, (now, 0))
        if second != now:
            if lines > LINES_A_SECOND:
                setattr(record, names.LOG_SUPPRESSED, lines - LINES_A_SECOND)
            lines = 0
        if alike not in self._seconds and len(self._seconds) >= _MAX_TEXTS:
            self._seconds.clear()  # a library that writes values into its texts
        self._seconds[alike] = (now, lines + 1)
        return lines < LINES_A_SECOND


def _is_of_mail(record: logging.LogRecord) -> bool:
    return record.msg != names.SPAN_CONNECTION or bool(record.__dict__.get(names.CONNECTION_MESSAGES))


class JsonRenderer:
    """One JSON object; every character that is not printable ASCII is escaped, so a line is a line."""

    def __init__(self) -> None:
        # One encoder for all lines: json.dumps makes a new one at each call that has arguments.
        self._encode = json.JSONEncoder(ensure_ascii=True, default=str).encode

    def __call__(self, fields: MutableMapping[str, Any]) -> str:
        """The line."""
        return self._encode(fields)


class TextRenderer:
    """A line for people: time, level, event, then the values."""

    def __init__(self, *, colors: bool) -> None:
        import structlog  # late: it brings rich, a fifth of the start-up of a gateway that writes JSON

        self._render = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)

    def __call__(self, fields: MutableMapping[str, Any]) -> str:
        """The line."""
        for name, value in fields.items():
            if not isinstance(value, int | float):
                limit = _MAX_TRACEBACK_CHARACTERS if name == names.LOG_TRACEBACK else _MAX_TEXT_CHARACTERS
                text = ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
                fields[name] = clean(text.replace("\n", " | "), limit)
        return str(self._render(None, "", fields))


class LineFormatter(logging.Formatter):
    """Makes a line's fields from a record, and the line from these.

    structlog's own formatter for records of the standard library copies each record and runs a chain of processors,
    which matters with three lines per mail (34 us per line against 22).
    """

    def __init__(self, render: JsonRenderer | TextRenderer) -> None:
        super().__init__()
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        if (line := getattr(record, LINE, None)) is not None and isinstance(self._render, TextRenderer):
            return str(line)
        fields: dict[str, Any] = {
            names.LOG_TIMESTAMP: _iso_8601(record),
            names.LOG_LEVEL: record.levelname.lower(),
            names.LOG_LOGGER: record.name,
            names.LOG_EVENT: record.getMessage(),
        }
        fields.update(extra_of(record))
        if record.exc_info:
            fields[names.LOG_TRACEBACK] = exception_of(record)
        return self._render(fields)


def extra_of(record: logging.LogRecord) -> dict[str, Any]:
    """The values from `extra`."""
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


def exception_of(record: logging.LogRecord) -> str:
    """The traceback of a record, only the end of a long one; "" without one."""
    if not record.exc_info:
        return ""
    return "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")[-_MAX_TRACEBACK_CHARACTERS:]


def _iso_8601(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class StateLogger:
    """A line for each state transition, as it happens."""

    __slots__ = ("_logger",)

    def __init__(self) -> None:
        self._logger = logging.getLogger(STATES)

    def take(self, name: str, time_ns: int, attributes: Attributes, context: TraceContext) -> None:
        """Write the line."""
        is_error = attributes[names.STATE] == ConnState.ERROR.value
        level = logging.WARNING if is_error else logging.INFO
        if self._logger.isEnabledFor(level):
            write_line(self._logger, level, name, time_ns, attributes, context)


def write_line(
    logger: logging.Logger,
    level: int,
    event: str,
    time_ns: int,
    fields: Mapping[str, Any],
    context: TraceContext,
) -> None:
    """Write a line of telemetry the general way.

    Args:
        event: its text. `time_ns`: when that happened, since the epoch.
        context: of the span that it describes, or within which it happened.
    """
    # Not by logger.log: looking for the calling line costs as much as writing the line, and adds nothing here.
    logger.handle(
        logging.makeLogRecord(
            {
                "name": logger.name,
                "levelno": level,
                "levelname": logging.getLevelName(level),
                "msg": event,
                **fields,
                names.LOG_TRACE_ID: context.trace_id_hex,
                names.LOG_SPAN_ID: context.span_id_hex,
                TRACE_FLAGS: context.flags,
                EVENT_TIME_NS: time_ns,
            }
        )
    )
