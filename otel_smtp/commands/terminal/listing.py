"""The queue as a terminal shows it. A row is an answer of `spool.operators`: one mapping per message.

A list is printed message by message, as they come, since a queue may be long: the message in one line, and the reasons
why it waits below. In a pipe or a file it is exactly one line per message, however long, so that it can be searched and
cut.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from otel_smtp.commands.terminal.tables import table
from otel_smtp.commands.terminal.words import code_style, counted, octets, plain

Row = Mapping[str, Any]

# As in Postfix's mailq.
MARKS: Final = {"active": "*", "hold": "!", "corrupt": "?"}
FORCED_MARK: Final = "#"
_MARK_STYLES: Final = {"*": "green", "!": "yellow", "?": "bold red", "#": "red"}
LEGEND: Final = "* being delivered  ! held  ? damaged  # given up by an operator"

# Each four times the one before. Postfix's qshape has finer steps.
AGES_SECONDS: Final = (300, 1200, 4800, 19200, 76800, 307200)
_AGE_NAMES: Final = ("5m", "20m", "80m", "5h", "21h", "3.5d", "older")

_ID_CHARACTERS: Final = 26
_HEADING: Final = f"{'id':<{_ID_CHARACTERS + 1}} {'age':>7} {'size':>10}  {'next attempt':<13}"
_INDENT: Final = 4
_MOST_REASONS: Final = 3  # of one message; `details` shows all


def json_line(row: Row) -> str:
    """A message as one line of JSON."""
    return json.dumps(row, ensure_ascii=True)


class Listing:
    """Messages as they come, and their total.

    Args:
        width: cells of a line; None: no terminal, so each message is one line.
        is_chosen: only some messages were requested, so none may match although there are others.
        now: seconds since the epoch.
    """

    def __init__(self, *, width: int | None, is_chosen: bool = False, now: float | None = None) -> None:
        self._width = width
        self._is_chosen = is_chosen
        self._now = time.time() if now is None else now
        self._messages = 0
        self._octets = 0

    def heading(self) -> Sequence[RenderableType]:
        """The heads of the columns."""
        if self._width is not None and self._width < len(_HEADING):
            return []
        return [Text(f"{_HEADING}  sender -> recipients" if self._has_one_line else _HEADING, "dim")]

    def lines(self, row: Row) -> Sequence[RenderableType]:
        """One message."""
        self._messages += 1
        self._octets += row["message_size"]
        mark = _mark(row)
        name = Text.assemble((plain(row["queue_id"]), "cyan"), (mark, _MARK_STYLES.get(mark, "")))
        facts = (age(self._now - row["arrival_time"]), octets(row["message_size"]), _waits(row, self._now))
        route = Text(f"{plain(row['sender']) or '<>'} -> {_recipients(row)}")
        reasons = _reasons(row)
        if row.get("gateway"):
            reasons = [Text(_whose(row, self._now), "green"), *reasons]
        if self._width is not None and self._width < len(_HEADING):
            return [name, *map(_indented, (Text("  ".join(facts)), route, *reasons))]
        name.pad_right(_ID_CHARACTERS + 1 - name.cell_len)
        head = name.append(f" {facts[0]:>7} {facts[1]:>10}  {facts[2]:<13}")
        if self._width is None:
            return [Text("  ").join([head, route, *reasons])]
        if self._has_one_line and head.cell_len + 2 + route.cell_len <= self._width:
            return [head.append("  ").append(route), *map(_indented, reasons)]
        return [head, *map(_indented, (route, *reasons))]

    def summary(self) -> Sequence[RenderableType]:
        """The total, and the legend of the marks."""
        if not self._messages:
            return [Text("no message in the queue fits" if self._is_chosen else "the queue is empty")]
        return [Text(f"{counted(self._messages, 'message')}, {octets(self._octets)}", "bold"), Text(LEGEND, "dim")]

    @property
    def _has_one_line(self) -> bool:
        """Whether there is room for addresses beside the columns."""
        return self._width is None or self._width >= len(_HEADING) + 36


class Grouping(StrEnum):
    """The kinds of rows of a `Shape`."""

    DOMAIN = "domain"  # of the recipients
    SENDER = "sender"  # its domain
    REASON = "reason"  # last reply to a recipient


class Shape:
    """Messages by group and age: one row per group, the largest first, and one column per age.

    A column counts ages up to its head, above the one before; empty columns are left out.

    Args:
        most: rows; the rest is summed up in one more.
        now: seconds since the epoch.
    """

    def __init__(self, by: Grouping = Grouping.DOMAIN, *, most: int = 50, now: float | None = None) -> None:
        self._by = by
        self._most = most
        self._now = time.time() if now is None else now
        self._all: Counter[int] = Counter()
        self._groups: dict[str, Counter[int]] = {}

    def add(self, row: Row) -> None:
        """Count a message once in each of its groups."""
        column = sum(self._now - row["arrival_time"] > bound for bound in AGES_SECONDS)
        self._all[column] += 1
        for group in _groups(row, self._by):
            self._groups.setdefault(group, Counter())[column] += 1

    def rows(self) -> Iterator[Row]:
        """The counts so far, for machines: `group`, `messages` in all, and `ages`, how many there are of each."""
        for name, counts in sorted(self._groups.items(), key=lambda item: (-item[1].total(), item[0])):
            ages = {age: counts[column] for column, age in enumerate(_AGE_NAMES)}
            yield {self._by.value: name, "messages": counts.total(), "ages": ages}

    def table(self) -> Table:
        """The counts so far."""
        ordered = sorted(self._groups.items(), key=lambda item: (-item[1].total(), item[0]))
        shown = [("all", self._all), *ordered[: self._most]]
        if others := ordered[self._most :]:
            shown.append((f"({counted(len(others), 'other')})", sum((count for _, count in others), Counter())))
        columns = [column for column in range(len(_AGE_NAMES)) if self._all[column]]
        heads = (self._by.value, "messages", *(_AGE_NAMES[column] for column in columns))
        drawn = _table(
            heads,
            [[name, str(count.total()), *(str(count[column] or "") for column in columns)] for name, count in shown],
        )
        for numbers in drawn.columns[1:]:
            numbers.justify, numbers.no_wrap = "right", True
        return drawn


def details(row: Row, *, now: float | None = None) -> Group:
    """Everything about one message."""
    now = time.time() if now is None else now
    facts = [
        ("id", plain(row["queue_id"])),
        ("state", f"{row['queue_name']}{' (given up)' if row['forced_expire'] else ''}"),
        ("sender", plain(row["sender"]) or "<> (a bounce, or mail that wants none)"),
        ("size", octets(row["message_size"])),
        ("arrived", f"{_moment(row['arrival_time'])}, {age(now - row['arrival_time'])} ago"),
        ("expires", _moment(row["expires"]) if is_aging(row) else "not before an operator releases it"),
        ("attempts", str(row["attempts"])),
        ("next attempt", _waits(row, now)),
        *([("gateway", _whose(row, now))] if row.get("gateway") else []),
        ("trace", plain(row["trace_id"] or "none")),
    ]
    recipients = [
        (plain(one["address"]), one["state"], plain(one.get("delay_reason", ""))) for one in row["recipients"]
    ]
    return Group(_table(("", ""), facts), Text(""), _table(("recipient", "state", "last reply"), recipients))


def is_aging(row: Row) -> bool:
    """Whether a message gets older: held or damaged mail does not, a report on mail always does."""
    return row["queue_name"] not in ("hold", "corrupt") or row.get("kind", "mail") not in ("mail", "outcome")


def gateways_table(rows: Sequence[Row], *, now: float | None = None) -> Table:
    """The gateways of a shared queue.

    Args:
        rows: `name`, `version`, `started_at`, `alive_for`, `leases` of each.
    """
    now = time.time() if now is None else now
    drawn = _table(
        ("gateway", "version", "up for", "delivering", "state"),
        [
            (
                plain(row["name"]), plain(row["version"]), age(now - row["started_at"]), str(row["leases"]),
                f"alive ({row['alive_for']:.1f} s left)" if row["alive_for"] > 0
                else f"silent, its lease ended {age(-row['alive_for'])} ago",
            )
            for row in rows
        ],
    )  # fmt: skip
    for number in (2, 3):
        drawn.columns[number].justify = "right"
    return drawn


def age(seconds: float) -> str:
    """A duration in the largest unit that leaves about two figures."""
    for bound, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < bound:
            return f"{max(0, seconds) / unit:.0f} {name}"
    return f"{seconds / 86400:.1f} d"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    drawn = table("", heads, rows)
    drawn.title = None
    drawn.show_header = any(heads)
    return drawn


def _indented(text: Text) -> RenderableType:
    return Padding(text, (0, 0, 0, _INDENT), expand=False)


def _mark(row: Row) -> str:
    return MARKS.get(row["queue_name"], FORCED_MARK if row["forced_expire"] else "")


def _recipients(row: Row) -> str:
    first = plain(row["recipients"][0]["address"]) if row["recipients"] else "none"
    return first if len(row["recipients"]) < 2 else f"{first} (+{len(row['recipients']) - 1})"


def _reasons(row: Row) -> Sequence[Text]:
    """The last replies to its recipients, the most frequent first."""
    found = Counter(one["delay_reason"] for one in row["recipients"] if one.get("delay_reason")).most_common()
    lines = []
    for reason, times in found[:_MOST_REASONS]:
        code = int(reason[:3]) if reason[:3].isdecimal() else 0
        lines.append(
            Text.assemble((plain(reason), code_style(code)), (f" ({times} times)" if times > 1 else "", "dim"))
        )
    if len(found) > _MOST_REASONS:
        lines.append(Text(f"({len(found) - _MOST_REASONS} more)", "dim"))
    return lines


def _groups(row: Row, by: Grouping) -> set[str]:
    match by:
        case Grouping.DOMAIN:
            return {_domain(one["address"]) for one in row["recipients"]}
        case Grouping.SENDER:
            return {_domain(row["sender"]) if row["sender"] else "<>"}
        case Grouping.REASON:
            return {plain(one.get("delay_reason") or "(not tried yet)") for one in row["recipients"]}


def _domain(address: str) -> str:
    return plain(address.rpartition("@")[2].lower()) if "@" in address else "(none)"


def _waits(row: Row, now: float) -> str:
    if row["queue_name"] in ("hold", "corrupt"):
        return "when released"
    if row["queue_name"] == "active":
        return "now"
    return "now" if row["next_attempt"] <= now else f"in {age(row['next_attempt'] - now)}"


def _whose(row: Row, now: float) -> str:
    since = "" if row["since"] is None else f", for {age(now - row['since'])}"
    return f"{plain(row['gateway'])} delivers it{since}"


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(seconds))
