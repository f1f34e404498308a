"""A trace as a waterfall: one row per span and per event, in order of time.

Lanes on the left show what belongs together, as in a graph of revisions: a span opens a lane to the right of its
parent's, its events are in that lane, and the line ends where the span ends. So the events of all spans can be read in
one order of time and still be distinguished:

    ◆      smtp.connection    0.0  ━━━━━━━━━━━━  53.1 ms  127.0.0.1:48122 → 127.0.0.1:2525
    ●      New                0.0  ╿
    ●      Active             0.3  ╿
    │ ◆    smtp.transaction   6.2   ━━━━━━━━━    42.0 ms  relayed  250 2.0.0
    ● │    Data              11.0    ╿           message 1  1 recipient

Words that do not fit into a row continue in the next; nothing is cut as long as a single word fits. The module takes
spans as values; of OpenTelemetry and the gateway it knows the names of attributes alone.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from otel_smtp.commands.terminal.spans import DrawnEvent, DrawnSpan
from otel_smtp.commands.terminal.words import (
    STATE_STYLES,
    Word,
    counted,
    duration,
    event_words,
    outcome_style,
    plain,
    span_words,
)
from otel_smtp.telemetry import attributes as names


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters of a waterfall."""

    span: str
    event: str
    error: str
    guide: str
    bar: str
    short: str  # a span too short for a bar
    tick: str
    good: str


UNICODE: Final = Glyphs("◆", "●", "✗", "│", "━", "╺", "╿", "✓")
ASCII: Final = Glyphs("#", "*", "!", "|", "=", "-", "'", "+")

# Lanes: connection, transaction, delivery; on wider terminals three more for spans in parallel.
_FEW_LANES: Final = 3
_MOST_LANES: Final = 6
_WIDE: Final = 60
_LANE_STYLES: Final = ("blue", "magenta", "cyan")
_GAP: Final = 2


@dataclass(slots=True)
class _Row:
    """A span or an event, with the lanes that are open beside it."""

    time_ns: int
    lane: int
    depth: int
    name: str
    name_style: str
    mark: str
    mark_style: str
    words: list[Word]
    span: DrawnSpan | None = None  # None: an event


@dataclass(frozen=True, slots=True)
class _Columns:
    """Widths in cells."""

    graph: int
    name: int
    time: int
    bar: int
    words: int


def waterfall(spans: Iterable[DrawnSpan], *, width: int, glyphs: Glyphs = UNICODE, most_rows: int = 200) -> list[Text]:
    """Draw one trace.

    Args:
        spans: finished spans that belong together, in any order; at least one.
        width: cells of a line, at least 40.
        glyphs: UNICODE, or ASCII for terminals without it.
        most_rows: of a longer trace, only the beginning and the end are drawn.

    Returns:
        Lines of text, none wider than `width`.
    """
    ordered = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
    # An event outside of its span means that the clock was set meanwhile; it is drawn all the same.
    times = [event.time_ns for span in ordered for event in span.events]
    start_ns = min(ordered[0].start_ns, *times) if times else ordered[0].start_ns
    end_ns = max([*times, *(span.end_ns for span in ordered)])
    lanes = _lanes(ordered, _MOST_LANES if width >= _WIDE else _FEW_LANES)
    rows = _rows(ordered, lanes, glyphs)
    columns = _columns(rows, lanes, width, end_ns - start_ns)
    first_rows, last_rows = _extents(ordered, rows, lanes)

    lines = [*_heading(ordered, end_ns - start_ns, width, glyphs), _ruler(columns, end_ns - start_ns)]
    for index, row in enumerate(rows):
        if most_rows // 2 <= index < len(rows) - most_rows // 2:
            if index == most_rows // 2:
                lines.append(Text(f"... {counted(len(rows) - 2 * (most_rows // 2), 'more row')}", "dim"))
            continue
        beside = [span_id for span_id, first in first_rows.items() if first <= index <= last_rows[span_id]]
        open_lanes = {lanes[span_id] for span_id in beside}
        ending = {lanes[span_id] for span_id in beside if last_rows[span_id] == index}
        lines += _lines(row, open_lanes, ending, columns, start_ns, end_ns, glyphs)
    return lines


# Arranging -----------------------------------------------------------------------------------------------------


def _lanes(ordered: Sequence[DrawnSpan], most: int) -> dict[int, int]:
    """A lane for each span: right of its parent's, and free as long as the span lasts."""
    lanes: dict[int, int] = {}
    busy_until: dict[int, int] = {}
    for span in ordered:
        above = [of.span_id for of in (span.parent, *(link.context for link in span.links)) if of is not None]
        lane = next((min(lanes[span_id] + 1, most - 1) for span_id in above if span_id in lanes), 0)
        while busy_until.get(lane, -1) > span.start_ns and lane < most - 1:
            lane += 1
        lanes[span.context.span_id] = lane
        busy_until[lane] = max(span.end_ns, busy_until.get(lane, 0))
    return lanes


def _rows(ordered: Sequence[DrawnSpan], lanes: Mapping[int, int], glyphs: Glyphs) -> list[_Row]:
    rows = []
    for depth, span in enumerate(ordered):
        lane = lanes[span.context.span_id]
        lane_style = _LANE_STYLES[lane % len(_LANE_STYLES)]
        words = [Word(duration(span.end_ns - span.start_ns), "bold"), *span_words(span.name, span.attributes)]
        rows.append(_Row(span.start_ns, lane, depth, span.name, "bold", glyphs.span, lane_style, words, span))
        for event in span.events:
            name, style = _event_name(event)
            code = event.attributes.get(names.REPLY_CODE)
            is_refusal = isinstance(code, int) and code >= 400
            mark, mark_style = (glyphs.error, "bold red") if is_refusal else (glyphs.event, lane_style)
            words = event_words(event.name, event.attributes)
            rows.append(_Row(event.time_ns, lane, depth, name, style, mark, mark_style, words))
    # At the same nanosecond a span comes before its events, and a parent before its children.
    rows.sort(key=lambda row: (row.time_ns, row.depth, row.span is None))
    return rows


def _event_name(event: DrawnEvent) -> tuple[str, str]:
    """The short name of an event: its state, its phase, or its name."""
    state = event.attributes.get(names.STATE)
    if isinstance(state, str):
        return plain(state), STATE_STYLES.get(state, "")
    return event.name.removeprefix("smtp.upstream.").removeprefix("smtp."), ""


def _extents(
    ordered: Sequence[DrawnSpan], rows: Sequence[_Row], lanes: Mapping[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """The rows at which the line of each span begins and ends."""
    times = [row.time_ns for row in rows]
    first = {row.span.context.span_id: index for index, row in enumerate(rows) if row.span is not None}
    last: dict[int, int] = {}
    lane_taken_at: dict[int, int] = {}
    for span in reversed(ordered):
        lane = lanes[span.context.span_id]
        # A span that begins in the same lane where this one ends needs the place.
        end = min(bisect_right(times, span.end_ns), lane_taken_at.get(lane, len(rows))) - 1
        last[span.context.span_id] = max(end, first[span.context.span_id])
        lane_taken_at[lane] = first[span.context.span_id]
    return first, last


def _columns(rows: Sequence[_Row], lanes: Mapping[int, int], width: int, total_ns: int) -> _Columns:
    graph = 2 * (max(lanes.values()) + 1)
    name = max(cell_len(row.name) for row in rows)
    time = max(5, len(_at(total_ns, total_ns)))
    left = width - graph - name - time - 3 * _GAP
    if left < 20:  # too narrow for the names
        name = max(6, name - (20 - left))
        left = width - graph - name - time - 3 * _GAP
    # Bars get two fifths. Words need some twenty cells, and bars show no more beyond forty-four.
    bar = min(max(8, left * 2 // 5), max(8, left - 24), 44) if left >= 20 else left // 3
    return _Columns(graph, name, time, bar, left - bar)


# Drawing -------------------------------------------------------------------------------------------------------


def _at(offset_ns: int, total_ns: int) -> str:
    """A point in time since the start, in a unit that suits the whole trace."""
    if total_ns >= 1_000_000_000:
        return f"{offset_ns / 1e9:.3f}" if total_ns < 100_000_000_000 else f"{offset_ns / 1e9:.1f}"
    return f"{offset_ns / 1e6:.2f}" if total_ns < 10_000_000 else f"{offset_ns / 1e6:.1f}"


def _heading(ordered: Sequence[DrawnSpan], total_ns: int, width: int, glyphs: Glyphs) -> list[Text]:
    """The trace id, and the outcome in one line."""
    traces = dict.fromkeys(span.context.trace_id for span in ordered)
    line = Text().append("trace ", "dim").append(f"{next(iter(traces)):032x}", "bold")
    # Where an upstream accepted a mail, its reply is on the attempt alone.
    accepted = {
        span.parent.span_id: span.attributes[names.REPLY_CODE]
        for span in ordered
        if span.parent is not None and int(span.attributes.get(names.REPLY_CODE, 999)) < 400
    }
    outcomes = Counter(
        (
            plain(span.attributes[names.OUTCOME]),
            span.attributes.get(names.REPLY_CODE, accepted.get(span.context.span_id)),
        )
        for span in ordered
        if span.name == names.SPAN_TRANSACTION and names.OUTCOME in span.attributes
    )
    words = []
    for (outcome, code), count in outcomes.items():
        mark = glyphs.good if outcome in ("relayed", "queued") else glyphs.error
        text = f"{mark} {outcome}" + (f" {code}" if code is not None else "") + (f" x{count}" if count > 1 else "")
        words.append(Word(text, outcome_style(outcome)))
    events = sum(len(span.events) for span in ordered)
    words = words or [Word("no message", "dim")]
    words += [Word(duration(total_ns)), Word(counted(len(ordered), "span")), Word(counted(events, "event"))]
    return [line, *_filled(words, width)]


def _ruler(columns: _Columns, total_ns: int) -> Text:
    """The head of the columns: unit and end of the scale."""
    unit = "s" if total_ns >= 1_000_000_000 else "ms"
    end = _at(total_ns, total_ns)
    line = Text(" " * (columns.graph + columns.name + _GAP))
    line.append(unit.rjust(columns.time), "dim").append(" " * _GAP)
    return line.append("0" + end.rjust(columns.bar - 1), "dim")


def _lines(
    row: _Row,
    open_lanes: set[int],
    ending: set[int],
    columns: _Columns,
    start_ns: int,
    end_ns: int,
    glyphs: Glyphs,
) -> list[Text]:
    line = _graph(open_lanes, columns, glyphs, row)
    line.append(set_cell_size(row.name, columns.name) + " " * _GAP, row.name_style)
    line.append(_at(row.time_ns - start_ns, end_ns - start_ns).rjust(columns.time) + " " * _GAP, "dim")
    line.append_text(_bar(row, columns.bar, start_ns, end_ns, glyphs)).append(" " * _GAP)
    words = row.words if glyphs is UNICODE else [Word(_in_ascii(word.text), word.style) for word in row.words]
    first, *more = _filled(words, columns.words) or [Text()]
    lines = [line.append_text(first)]
    for text in more:
        # A lane that ends in this row does not continue beside its further lines.
        next_line = _graph(open_lanes - ending, columns, glyphs, None)
        next_line.append(" " * (columns.name + columns.time + columns.bar + 3 * _GAP))
        lines.append(next_line.append_text(text))
    for text in lines:
        text.rstrip()
    return lines


def _graph(open_lanes: set[int], columns: _Columns, glyphs: Glyphs, row: _Row | None) -> Text:
    text = Text()
    for lane in range(columns.graph // 2):
        if row is not None and lane == row.lane:
            text.append(row.mark + " ", row.mark_style)
        elif lane in open_lanes:
            text.append(glyphs.guide + " ", _LANE_STYLES[lane % len(_LANE_STYLES)])
        else:
            text.append("  ")
    return text


def _bar(row: _Row, cells: int, start_ns: int, end_ns: int, glyphs: Glyphs) -> Text:
    """The span's share of the whole time, or the event's point in it."""
    per_cell = max(1, end_ns - start_ns) / cells
    first = min(cells - 1, int((row.time_ns - start_ns) / per_cell))
    if row.span is None:
        style = row.mark_style if row.mark == glyphs.error else "dim"
        return Text(" " * first).append(glyphs.tick, style).append(" " * (cells - first - 1))
    last = min(cells, round((row.span.end_ns - start_ns) / per_cell))
    drawn = glyphs.bar * (last - first) if last > first else glyphs.short
    return Text(" " * first).append(drawn, row.mark_style).append(" " * (cells - first - len(drawn)))


def _filled(words: Sequence[Word], width: int) -> list[Text]:
    """Words in lines of `width` cells; a word that is longer than a line is broken."""
    lines: list[Text] = []
    room = 0
    for word in words:
        text = word.text
        if lines and cell_len(text) + _GAP <= room:
            lines[-1].append(" " * _GAP).append(text, word.style)
            room -= cell_len(text) + _GAP
            continue
        while text:
            piece = _head(text, width)
            text = text[len(piece) :].lstrip()
            lines.append(Text().append(piece.rstrip(), word.style))
            room = width - cell_len(piece)
    return lines


def _head(text: str, width: int) -> str:
    """The beginning of `text` that fits, broken at a space if there is one in its second half."""
    if cell_len(text) <= width:
        return text
    end = width
    while cell_len(text[:end]) > width:
        end -= 1
    space = text.rfind(" ", end // 2, end + 1)
    return text[: space + 1] if space > 0 else text[: max(1, end)]


def _in_ascii(text: str) -> str:
    return text.replace("→", "->").replace("“", '"').replace("”", '"').encode("ascii", "replace").decode("ascii")
