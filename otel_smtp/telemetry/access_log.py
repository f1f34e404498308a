"""The access log: one line for each finished connection, transaction and delivery, and each recipient left out.

Nearly all lines are about successful mail, and go to our own handlers. They are made from templates (`span_lines`),
without a record of `logging`: a fifth of the cost. All other lines go the general way, through `logging`: lines that a
filter may drop, lines about recipients, and all lines if there are foreign handlers. Both ways give the same octets.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from otel_smtp.observing import Fate
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.logs import ACCESS, write_line
from otel_smtp.telemetry.propagation import TraceContext
from otel_smtp.telemetry.records import EventRecord
from otel_smtp.telemetry.span_attributes import Described
from otel_smtp.telemetry.span_lines import (
    ON_LINES,
    LineOfSpan,
    LinesOfMail,
    SpanLineHandler,
    WriteLines,
    line_shape,
)


class AccessLog:
    """Writes a line for each finished connection, transaction and delivery; a line sink of tracing.

    Likewise for each recipient that was refused or deferred, or that ended in the spool without the mail.

    Args:
        logger: takes the lines instead of the log.
    """

    __slots__ = ("_logger",)

    def __init__(self, logger: logging.Logger | None = None) -> None:
        self._logger = logger or logging.getLogger(ACCESS)

    def is_wanted(self) -> bool:
        """Whether its lines would be written: making them and their values costs time."""
        return self._logger.isEnabledFor(logging.INFO)

    def take_described(
        self, described: Described, context: TraceContext, times: tuple[int, int], told: Sequence[EventRecord]
    ) -> None:
        """Write the line of a span; at "warning" if the gateway, or something it depends on, failed.

        Args:
            times: start and end, in nanoseconds since the epoch.
            told: events about recipients, among them.
        """
        shape, pairs, on_line = described
        line = shape.line or line_shape(shape)
        start_ns, end_ns = times
        duration = (end_ns - start_ns) / 1e9
        is_of_mail = True
        if shape.name == names.SPAN_CONNECTION:
            if names.CLOSE_REASON not in shape.constant:
                return  # only a segment has ended
            facts = dict(pairs)
            duration = facts.get(names.CONNECTION_DURATION, duration)  # type: ignore[assignment]  # a float by its name
            is_of_mail = bool(facts[names.CONNECTION_MESSAGES])
        shown = [*on_line, *[pair for pair in pairs if pair[0] in ON_LINES]]
        if is_of_mail and not told and self.take_line(LineOfSpan(line, shown, duration, context, end_ns)):
            return
        told = [event for event in told if event.name == names.RECIPIENT_EVENT]
        fields: dict[str, Any] = {**line.constant, **dict(shown), names.LOG_DURATION: duration}
        if told:
            whose = {name: fields[name] for name in _WHOSE if name in fields}
            for event in told:
                of_recipient = {**whose, **event.attributes}
                write_line(self._logger, line.level, event.name, event.time_ns, of_recipient, context)
            if shape.name == names.SPAN_TRANSACTION:
                fields |= _recipients(told)
        write_line(self._logger, line.level, line.name, end_ns, fields, context)

    def take_line(self, line: LineOfSpan) -> bool:
        """Write the line of a span; False: a handler needs records, which only descriptions make."""
        handlers = self._handlers()
        if handlers is None:
            return False
        self._write(handlers, line.shape.name, lambda handler, now_ns: handler.take_line(*line, now_ns))
        return True

    def writer_of_mails(self) -> WriteLines | None:
        """The writer of both lines of ordinary mails; None: a handler needs records, which only descriptions make."""
        handlers = self._handlers()
        return None if handlers is None else partial(self._write_mails, handlers)

    def _write_mails(self, handlers: Sequence[SpanLineHandler], mails: Sequence[LinesOfMail]) -> None:
        name = mails[0].shapes[1].name
        self._write(handlers, name, lambda handler, now_ns: handler.take_mails(mails, now_ns))

    def _write(
        self, handlers: Sequence[SpanLineHandler], name: str, write: Callable[[SpanLineHandler, int], None]
    ) -> None:
        now_ns = time.time_ns()
        for handler in handlers:
            try:
                write(handler, now_ns)
            except Exception:  # noqa: BLE001 - the contract of handlers: an error is reported and never raised
                handler.handleError(logging.makeLogRecord({"name": self._logger.name, "msg": name}))

    def _handlers(self) -> list[SpanLineHandler] | None:
        """The handlers of our lines, if none needs a record; otherwise None."""
        found = []
        logger: logging.Logger | None = self._logger
        if self._logger.filters or self._logger.disabled:
            return None
        while logger is not None:
            for handler in logger.handlers:
                if not isinstance(handler, SpanLineHandler) or handler.level or handler.filters != handler.own_filters:
                    return None
                found.append(handler)
            logger = logger.parent if logger.propagate else None
        return found or None


_WHOSE: Final = (names.CONNECTION_ID, names.TRANSACTION_NUMBER, names.SPOOL_ID, names.MAIL_FROM_DOMAIN,
                 names.MAIL_FROM_ADDRESS, names.DELIVERY_ATTEMPT, names.MESSAGE_KIND)  # fmt: skip
"""The attributes of the mail in a recipient's line."""


def _recipients(told: Iterable[EventRecord]) -> Mapping[str, tuple[str, ...]]:
    """The refused and the deferred recipients of a transaction, each as one text."""
    texts: dict[str, list[str]] = {names.RCPT_REFUSED: [], names.RCPT_DEFERRED: []}
    for event in told:
        attributes = event.attributes
        if names.RECIPIENT_FATE not in attributes:
            continue
        is_deferred = attributes[names.RECIPIENT_FATE] == Fate.DEFERRED.value
        found = texts[names.RCPT_DEFERRED if is_deferred else names.RCPT_REFUSED]
        if len(found) < names.MAX_DOMAINS:
            who = attributes.get(names.RCPT_ADDRESS, attributes.get(names.RCPT_DOMAIN, "..."))
            said = [attributes.get(name) for name in (names.REPLY_CODE, names.REPLY_ENHANCED_CODE, names.REPLY_TEXT)]
            found.append(f"{who}: {' '.join(str(one) for one in said if one not in (None, ''))}")
    return {name: tuple(found) for name, found in texts.items() if found}
