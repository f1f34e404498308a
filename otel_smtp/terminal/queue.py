"""The queue as a terminal shows it. Rows are what `spool.control` answers, one mapping a message."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from otel_smtp.terminal.tables import table
from otel_smtp.terminal.words import counted, octets

Row = Mapping[str, Any]

# As in Postfix's mailq.
MARKS: Final = {"active": "*", "hold": "!", "corrupt": "?"}
AGES_SECONDS: Final = (300, 1200, 4800, 19200, 76800, 307200)
_AGE_NAMES: Final = ("5 min", "20 min", "80 min", "5 h", "21 h", "3.5 d", "older")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def safe(text: str) -> str:
    """`text` without anything that moves a terminal's cursor or turns its writing around."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def json_line(row: Row) -> str:
    """A message as one line of JSON."""
    return json.dumps(row, ensure_ascii=True)


def listing(rows: Sequence[Row], *, now: float | None = None) -> Group:
    """The messages, one line each, and their number."""
    now = time.time() if now is None else now
    cells = [
        [
            f"{row['queue_id']}{_mark(row)}",
            age(now - row["arrival_time"]),
            octets(row["message_size"]),
            safe(row["sender"]) or "<>",
            _recipients(row),
            _waits(row, now),
        ]
        for row in rows
    ]
    total = sum(row["message_size"] for row in rows)
    drawn = _table(("id", "age", "size", "sender", "recipients", "next"), cells)
    drawn.columns[0].no_wrap = True  # an id is there to be copied
    drawn.columns[0].min_width = max((len(row[0]) for row in cells), default=0)
    last = f"{counted(len(rows), 'message')}, {octets(total)}"
    legend = "* being delivered  ! held  ? damaged  # given up by an operator"
    return Group(drawn, Text(last, "bold"), Text(legend, "dim")) if rows else Group(Text("the queue is empty"))


def details(row: Row, *, now: float | None = None) -> Group:
    """Everything about one message."""
    now = time.time() if now is None else now
    facts = [
        ("id", row["queue_id"]),
        ("state", f"{row['queue_name']}{' (given up)' if row['forced_expire'] else ''}"),
        ("sender", safe(row["sender"]) or "<> (a bounce, or what asks for none)"),
        ("size", octets(row["message_size"])),
        ("arrived", f"{_moment(row['arrival_time'])}, {age(now - row['arrival_time'])} ago"),
        ("expires", _moment(row["expires"])),
        ("attempts", str(row["attempts"])),
        ("next attempt", _waits(row, now)),
        ("trace", row["trace_id"] or "none"),
    ]
    recipients = [(safe(one["address"]), one["state"], safe(one.get("delay_reason", ""))) for one in row["recipients"]]
    return Group(_table(("", ""), facts), Text(""), _table(("recipient", "state", "last reply"), recipients))


def shape(rows: Iterable[Row], *, now: float | None = None) -> Table:
    """How old mail for which domains is: a column for each age, a row for each domain, the largest first."""
    now = time.time() if now is None else now
    counts: dict[str, Counter[int]] = {}
    for row in rows:
        column = sum(now - row["arrival_time"] > bound for bound in AGES_SECONDS)
        counts.setdefault("", Counter())[column] += 1
        for domain in {one["address"].rpartition("@")[2].lower() for one in row["recipients"]}:
            counts.setdefault(domain, Counter())[column] += 1
    ordered = sorted(counts.items(), key=lambda item: (item[0] != "", -item[1].total(), item[0]))
    cells = [
        [safe(domain) or "all", str(count.total()), *(str(count[column] or "") for column in range(len(_AGE_NAMES)))]
        for domain, count in ordered
    ]
    return _table(("domain", "messages", *_AGE_NAMES), cells)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    drawn = table("", heads, rows)
    drawn.title = None
    return drawn


def age(seconds: float) -> str:
    """A time span in the largest unit that leaves two figures or so."""
    for bound, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < bound:
            return f"{max(0, seconds) / unit:.0f} {name}"
    return f"{seconds / 86400:.1f} d"


def _mark(row: Row) -> str:
    return MARKS.get(row["queue_name"], "#" if row["forced_expire"] else "")


def _recipients(row: Row) -> str:
    first = safe(row["recipients"][0]["address"]) if row["recipients"] else "none"
    return first if len(row["recipients"]) < 2 else f"{first} (+{len(row['recipients']) - 1})"


def _waits(row: Row, now: float) -> str:
    if row["queue_name"] in ("hold", "corrupt"):
        return "when released"
    if row["queue_name"] == "active":
        return "now"
    return "now" if row["next_attempt"] <= now else f"in {age(row['next_attempt'] - now)}"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
