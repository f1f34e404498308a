"""The waterfall, drawn: recorded pictures, and what holds for any trace and width."""

from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies
from rich.console import Console
from rich.text import Text

from otel_smtp.commands.terminal.waterfall import ASCII, UNICODE, Glyphs, waterfall
from tests.commands.terminal.traces import (
    TRACE_ID,
    Event,
    Span,
    at,
    refused_mail,
    state,
    two_mails_with_failover,
    vanished_client,
)
from tests.support.examples import scaled

PICTURES = Path(__file__).parent / "pictures"
TRACES = {
    "refused": refused_mail,
    "vanished": vanished_client,
    "failover": two_mails_with_failover,
}


def drawn(spans: list[Span], width: int, glyphs: Glyphs = UNICODE, most_rows: int = 200) -> list[str]:
    return [line.plain for line in waterfall(spans, width=width, glyphs=glyphs, most_rows=most_rows)]


def printed(lines: list[Text], *, terminal: bool) -> str:
    file = StringIO()
    console = Console(file=file, force_terminal=terminal, width=200, color_system="truecolor" if terminal else None)
    for line in lines:
        console.print(line, no_wrap=True, crop=False, overflow="ignore")
    return file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_looks_as_recorded(trace: str, width: int) -> None:
    recorded = (PICTURES / f"{trace}_{width}.txt").read_text(encoding="utf-8")
    assert "\n".join(drawn(TRACES[trace](), width)) + "\n" == recorded


def test_an_ascii_terminal_gets_the_same_picture_in_ascii() -> None:
    recorded = (PICTURES / "refused_80_ascii.txt").read_text(encoding="ascii")
    assert "\n".join(drawn(refused_mail(), 80, ASCII)) + "\n" == recorded


def test_nothing_but_text_when_piped_and_colours_on_a_terminal() -> None:
    lines = waterfall(refused_mail(), width=80)
    assert "\x1b" not in printed(lines, terminal=False)
    coloured = printed(lines, terminal=True)
    assert "\x1b[31m550 5.1.1" in coloured  # 5yz is red
    assert "\x1b[32m250 2.1.0" in coloured  # 2yz is green


def test_a_style_ends_with_its_word() -> None:
    line = next(line for line in waterfall(refused_mail(), width=120) if "shop.example" in line.plain)
    for span in line.spans:
        assert (span.style == "red") == ("refused" in line.plain[span.start : span.end])
    assert line.style == ""


@pytest.mark.parametrize("width", range(40, 200, 7))
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for trace in TRACES.values():
        assert max(map(len, drawn(trace(), width))) <= width


def test_rows_stand_in_the_order_of_time_whichever_span_they_belong_to() -> None:
    lines = drawn(refused_mail(), 160)
    order = ["New", "StartTLS", "smtp.transaction", "smtp.delivery", "rcpt", "Data", "content", "Error", "Closed"]
    found = [next(number for number, line in enumerate(lines) if f" {name} " in line) for name in order]
    assert found == sorted(found)
    assert lines[0] == f"trace {TRACE_ID:032x}"


def test_a_lane_is_given_on_to_the_next_span() -> None:
    lines = drawn(two_mails_with_failover(), 100)
    assert [line.index("◆") for line in lines if "smtp.delivery" in line] == [4, 4, 4]
    assert [line.index("◆") for line in lines if "smtp.transaction" in line] == [2, 2]


def test_spans_at_the_same_time_stand_side_by_side() -> None:
    spans = [Span("smtp.delivery", number, 0, at(number), at(10)) for number in range(1, 4)]
    assert [line.index("◆") for line in drawn(spans, 100) if "smtp.delivery" in line] == [0, 2, 4]


def test_of_a_long_trace_beginning_and_end_are_drawn() -> None:
    events = tuple(Event(f"number{number}", at(number)) for number in range(1000))
    text = "\n".join(drawn([Span("smtp.connection", 1, 0, at(0), at(1000), {}, events)], 80, most_rows=20))
    assert "number8 " in text
    assert "number9 " not in text
    assert "... 981 more rows" in text
    assert "number999" in text


def test_text_of_a_peer_does_not_steer_the_terminal() -> None:
    hostile = "a\x1b[2Jb\x07\r\nc\u202ed"
    span = Span(
        "smtp.connection",
        1,
        0,
        at(0),
        at(1),
        {"smtp.helo": hostile, "smtp.reply.text": hostile, "smtp.other": hostile, "client.address": hostile},
        (state("Error", 0.5, **{"smtp.verb": hostile, "smtp.reply.text": hostile}),),
    )
    text = printed(waterfall([span], width=120), terminal=False)
    assert not set(text) & set("\x1b\x07\r\u202e")


_names = strategies.sampled_from(["smtp.connection", "smtp.transaction", "smtp.delivery", "x", "名前" * 9])
_values = strategies.one_of(
    strategies.text(max_size=30), strategies.integers(0, 10**9), strategies.booleans(), strategies.just(("a", "b"))
)
_events = strategies.builds(
    Event,
    _names,
    strategies.integers(0, 10**10),
    strategies.dictionaries(
        strategies.sampled_from(["smtp.state", "error.type", "smtp.verb", "k"]), _values, max_size=3
    ),
)


@settings(max_examples=scaled(60))
@given(
    strategies.lists(
        strategies.tuples(_names, strategies.integers(0, 8), strategies.integers(0, 10**10), strategies.lists(_events)),
        min_size=1,
        max_size=8,
    ),
    strategies.integers(40, 140),
)
def test_any_trace_can_be_drawn(
    shapes: list[tuple[str, int, int, list[Event]]],
    width: int,
) -> None:
    spans = [
        Span(name, number, parent, start, start + 10**9, {"k": name}, tuple(events))
        for number, (name, parent, start, events) in enumerate(shapes, 1)
    ]
    for line in waterfall(spans, width=width):
        assert line.cell_len <= width
        assert "\n" not in line.plain
