"""The log on a terminal: one line of at most 120 columns per mail.

    22:14:03.118 x 550 example.com -> example.org  refused  provider  5.1.1 No such user  4bf92f35
    22:14:03.120 % 250 example.com -> example.net  provider  0.012s  2.0.0 Ok: queued as 4XyZ12  4bf92f35

Time, mark, reply, sender's domain and recipients', upstream, duration, the upstream's words, the head of the trace id.
A recipient that did not get the mail, or not yet, has a line of its own before it. A mail's line is made from two
records, the delivery's and then its transaction's. Connections that brought mail have no line of their own, unless they
were refused or failed.
"""

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.redaction import clean

COLUMNS: Final = 120
LINE: Final = "mail_line"
"""On a record: how it is shown on a terminal. Never a field of a line."""
_TRACE_CHARACTERS: Final = 8
_MOST_DELIVERIES: Final = 1000  # whose transaction has not ended yet: one or a few for each connection
_QUIET_ENDS: Final = frozenset({"quit", "client_disconnect", "timeout", "shutdown"})

MARKS: Final[Mapping[str, str]] = {
    "relayed": "+",
    "queued": "=",
    "partly_relayed": "%",
    "refused": "x",
    "deferred": "~",
    "aborted": "-",
    "unknown": "?",
}
"""A mail's outcome in one character; `otel-smtp tail --help` and deploy/guides/operating.md explain them."""

_COLORS: Final[Mapping[str, str]] = {
    "relayed": "32",
    "queued": "32",
    "partly_relayed": "33",
    "refused": "31",
    "bounced": "31",
    "expired": "31",
    "removed": "31",
    "held": "33",
    "deferred": "33",
    "aborted": "33",
    "unknown": "31;1",
}

Fields = Mapping[str, Any]


class MailLine(NamedTuple):
    """One line.

    Attributes:
        outcome: of the mail, or the fate of the recipient, that it shows.
        fields: all known facts; the line shows the most important.
    """

    text: str
    outcome: str
    fields: Fields


def colored(text: str, outcome: str) -> str:
    """A line's text with its mark and code in the colour of the outcome."""
    color = _COLORS.get(outcome, "0")
    return f"\x1b[2m{text[:_CLOCK]}\x1b[0m\x1b[{color}m{text[_CLOCK:_VERDICT]}\x1b[0m{text[_VERDICT:]}"


_CLOCK: Final = len("22:14:03.120 ")
_VERDICT: Final = _CLOCK + len("+ 250")


class MailLines:
    """Makes lines from records of the access log.

    Args:
        colors: use them.
    """

    def __init__(self, *, colors: bool = False) -> None:
        self._colors = colors
        # By connection: its delivery's record, until the transaction's comes.
        self._delivered: OrderedDict[str, Fields] = OrderedDict()

    def line(self, name: str, when: float, fields: Fields) -> str | None:
        """As `told`, in colours where they are wanted."""
        told = self.told(name, when, fields)
        return colored(told.text, told.outcome) if told is not None and self._colors else told and told.text

    def told(self, name: str, when: float, fields: Fields) -> MailLine | None:
        """The line of a span that is over; None: it has none of its own.

        Args:
            name: the span's.
            when: seconds since the epoch.
            fields: those of the access log.
        """
        match name:
            case names.SPAN_TRANSACTION:
                delivery = self._delivered.pop(str(fields.get(names.CONNECTION_ID)), {})
                return self._mail(when, {**_of_delivery(delivery), **fields}) if _is_mail(fields) else None
            case names.SPAN_DELIVERY:
                connection = fields.get(names.CONNECTION_ID)
                if connection is None:  # from the spool: the transaction is over long since
                    return self._mail(when, fields)
                before = self._delivered.pop(str(connection), None)
                self._delivered[str(connection)] = fields
                if len(self._delivered) > _MOST_DELIVERIES:
                    self._delivered.popitem(last=False)
                # An upstream that was passed over for the next one.
                return self._mail(when, before) if before is not None else None
            case names.SPAN_SPOOL:
                action = str(fields.get(names.SPOOL_ACTION, ""))
                facts = [str(fields.get(names.SPOOL_ID, "")), action]
                why = str(fields.get(names.FAILURE_REASON, ""))
                return self._put(when, MARKS.get(action, "x"), "---", action, facts, why, fields)
            case names.RECIPIENT_EVENT:
                return self._recipient(when, fields)
            case _:
                return self._connection(when, fields)

    def _mail(self, when: float, fields: Fields) -> MailLine:
        outcome = str(fields.get(names.OUTCOME, ""))
        mark = MARKS.get(outcome, "?")
        spool_id, attempt = fields.get(names.SPOOL_ID), fields.get(names.DELIVERY_ATTEMPT)
        facts = [fields.get(names.UPSTREAM_NAME), _seconds(fields.get(names.LOG_DURATION))]
        if attempt is not None and spool_id:  # from the spool, where sender and recipients were shown before
            kind = str(fields.get(names.MESSAGE_KIND, "mail"))
            whose = "" if kind == "mail" else f"{kind.replace('_', ' ')} "
            facts.insert(0, f"{whose}{spool_id} attempt {attempt}")
        else:
            facts.insert(0, f"{_sender(fields)} -> {_recipients(fields)}")
            if spool_id:
                facts.append(str(spool_id))
        words = fields.get(names.FAILURE_REASON) or fields.get(names.REPLY_TEXT) or fields.get(names.ERROR_TYPE) or ""
        code = str(fields.get(names.REPLY_CODE, "---"))
        return self._put(when, mark, code, outcome, [str(fact) for fact in facts if fact], str(words), fields)

    def _recipient(self, when: float, fields: Fields) -> MailLine:
        """The line of a recipient that did not get the mail, or not yet."""
        fate = str(fields.get(names.RECIPIENT_FATE, ""))
        who = fields.get(names.RCPT_ADDRESS) or fields.get(names.RCPT_DOMAIN) or "..."
        if more := fields.get(names.RECIPIENTS_NOT_SHOWN):
            who = f"{more} more recipients"
        facts = [f"{_sender(fields)} -> {who}", fate, str(fields.get(names.UPSTREAM_NAME) or "")]
        words = " ".join(str(fields.get(n) or "") for n in (names.REPLY_ENHANCED_CODE, names.REPLY_TEXT)).strip()
        code = str(fields.get(names.REPLY_CODE, "---"))
        return self._put(when, MARKS.get(fate, "x"), code, fate, [one for one in facts if one], words, fields)

    def _connection(self, when: float, fields: Fields) -> MailLine | None:
        reason = str(fields.get(names.CLOSE_REASON, ""))
        self._delivered.pop(str(fields.get(names.CONNECTION_ID)), None)
        errors = fields.get(names.CONNECTION_ERRORS, 0)
        if reason in _QUIET_ENDS and not errors:
            return None
        if fields.get(names.CONNECTION_MESSAGES) and reason in _QUIET_ENDS:
            return None  # its mails' lines have shown it
        client = str(fields.get(names.CLIENT_ADDRESS, "a client"))
        facts = [f"{client} at {fields.get(names.LISTENER, '')}", _seconds(fields.get(names.LOG_DURATION)) or ""]
        words = f"{reason.replace('_', ' ')}, {errors} error{'' if errors == 1 else 's'}"
        return self._put(when, "-", "---", "aborted", facts, words, fields)

    def _put(
        self, when: float, mark: str, code: str, outcome: str, facts: list[str], words: str, fields: Fields
    ) -> MailLine:
        """Assemble a line; the words get the remaining space."""
        clock = f"{time.strftime('%H:%M:%S', time.localtime(when))}.{int(when * 1000) % 1000:03}"
        head = "  ".join([f"{clock} {mark} {code} {facts[0]}", *facts[1:]])
        trace = str(fields.get(names.LOG_TRACE_ID, ""))[:_TRACE_CHARACTERS]
        head = _cut(clean(head, 4 * COLUMNS), COLUMNS - len(trace) - 2)
        room = COLUMNS - len(head) - len(trace) - 4
        told = _cut(clean(words, 4 * COLUMNS), room) if room >= _TRACE_CHARACTERS else ""
        line = "  ".join(part for part in (head, told, trace) if part)
        return MailLine(line, outcome, fields)


class MailFilter(logging.Filter):
    """Leaves out the access log's records that have no line of their own, and gives the others theirs.

    Args:
        logger: the name of the access log.
        colors: use them.
    """

    def __init__(self, logger: str, *, colors: bool) -> None:
        super().__init__()
        self._logger = logger
        self._lines = MailLines(colors=colors)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written; `LINE` has the line."""
        if record.name != self._logger:
            return True
        line = self._lines.line(str(record.msg), record.created, record.__dict__)
        setattr(record, LINE, line)
        return line is not None


def _of_delivery(delivery: Fields) -> Fields:
    """The delivery's fields in a mail's line; the rest comes from the transaction."""
    return {name: delivery[name] for name in (names.UPSTREAM_NAME, names.REPLY_TEXT) if name in delivery}


def _is_mail(fields: Fields) -> bool:
    """Whether a transaction reached a recipient or a reply; one abandoned earlier by its client is no mail."""
    return names.REPLY_CODE in fields or bool(fields.get(names.RCPT_DOMAINS)) or fields.get(names.OUTCOME) != "aborted"


def _sender(fields: Fields) -> str:
    known = fields.get(names.MAIL_FROM_ADDRESS, fields.get(names.MAIL_FROM_DOMAIN))
    return "<>" if known == "" else "..." if known is None else str(known)


def _recipients(fields: Fields) -> str:
    known = fields.get(names.RCPT_ADDRESSES) or fields.get(names.RCPT_DOMAINS) or ()
    first = [str(one) for one in known[:2]]
    more = len(known) - len(first)
    return ", ".join(first) + (f" (+{more})" if more > 0 else "") if first else "..."


def _seconds(duration: Any) -> str | None:
    return None if duration is None else f"{float(duration):.3f}s"


def _cut(text: str, columns: int) -> str:
    return text if len(text) <= columns else f"{text[: columns - 1]}\N{HORIZONTAL ELLIPSIS}"
