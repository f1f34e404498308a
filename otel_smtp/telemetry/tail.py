"""The log's lines of mails, for followers of a running gateway.

Without a follower, nothing is made. With one, the mail path does the same as for the access log, and the record is set
aside; lines are made from the records on request. The gateway never waits: a reader that is too slow misses lines, and
learns how many.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from otel_smtp.observing import Faults
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.access_log import AccessLog
from otel_smtp.telemetry.logs import ACCESS
from otel_smtp.telemetry.terminal_log import MailLines
from otel_smtp.telemetry.tracing import Tracing

log: Final = logging.getLogger("otel_smtp.telemetry.tail")

# A second of the busiest gateway; a follower asks several times per second.
HELD: Final = 5000
_RECORDS_A_TURN: Final = 50  # a millisecond


class TailLine(NamedTuple):
    """One line of the log.

    Attributes:
        number: grows by one with every line.
        time: seconds since the epoch.
        text: as a terminal shows it, without colours.
        outcome: of the mail, or the fate of a recipient.
        fields: what the log knows of it, by attribute.
    """

    number: int
    time: float
    text: str
    outcome: str
    fields: Mapping[str, Any]


class MailTail:
    """The last lines, from when it was started.

    Args:
        tracing: the source of their spans.
        held: the most records without lines, and the most lines.
    """

    def __init__(self, tracing: Tracing, *, held: int = HELD) -> None:
        self._tracing = tracing
        self._held = held
        self._records: deque[logging.LogRecord] = deque(maxlen=held)
        self._lines: deque[TailLine] = deque(maxlen=held)
        self._made = 0
        self._mail_lines = MailLines()
        self._faults = Faults(log, "line for followers cannot be made: internal error")
        logger = logging.Logger(ACCESS)  # its own, independent of the log and its level
        logger.addHandler(_Putting(self))
        self._listener = AccessLog(logger)
        self._is_started = False

    @property
    def is_started(self) -> bool:
        """Whether lines are kept."""
        return self._is_started

    def start(self) -> None:
        """Keep lines from now on. Idempotent."""
        if not self._is_started:
            self._is_started = True
            self._tracing.follow(self._listener)

    def stop(self) -> None:
        """Forget all lines, and keep none. Idempotent."""
        self._is_started = False
        self._tracing.leave(self._listener)
        self._records.clear()
        self._lines.clear()

    def put(self, record: logging.LogRecord) -> None:
        """Set a record of the access log aside. Called on the mail path."""
        if len(self._records) == self._held:
            self._made += 1  # a follower finds a number missing
        self._records.append(record)

    async def last(self) -> int:
        """The number of the last line; 0 before the first."""
        await self._make_lines()
        return self._made

    async def after(self, number: int, most: int) -> tuple[Sequence[TailLine], int, int]:
        """The lines after the last one read.

        Returns:
            The first `most` lines, the number to ask with next, and how many between were missed.
        """
        await self._make_lines()
        if number > self._made:  # of a process that was here before
            number = 0
        found = [line for line in self._lines if line.number > number][:most]
        last = found[-1].number if found else self._made
        return found, last, last - number - len(found)

    async def _make_lines(self) -> None:
        for looked_at in range(len(self._records)):
            if looked_at % _RECORDS_A_TURN == _RECORDS_A_TURN - 1:
                await asyncio.sleep(0)
            if not self._records:  # another follower was here meanwhile
                break
            record = self._records.popleft()
            try:
                line = self._mail_lines.told(str(record.msg), record.created, record.__dict__)
            except Exception:  # noqa: BLE001 - logged once; a follower misses one line, and learns it
                self._faults.note("line")
                self._made += 1
                continue
            if line is not None:
                self._made += 1
                known = {name: value for name, value in line.fields.items() if name in _KNOWN}
                self._lines.append(TailLine(self._made, record.created, line.text, line.outcome, known))


# Of the fields of a record, what is not logging's own.
_KNOWN: Final = frozenset({*names.ATTRIBUTES, names.LOG_TRACE_ID, names.LOG_SPAN_ID, names.LOG_DURATION})


class _Putting(logging.Handler):
    """Takes the records of the access log."""

    def __init__(self, tail: MailTail) -> None:
        super().__init__()
        self._tail = tail

    def emit(self, record: logging.LogRecord) -> None:
        self._tail.put(record)
