"""The queue as a terminal shows it."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType

from otel_smtp.terminal.queue import age, details, json_line, listing, safe, shape

NOW = 1_800_000_000.0


def row(number: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "queue_name": "deferred",
        "queue_id": f"01m8494cee4nr6g69ejbjx24e{number}",
        "arrival_time": NOW - 600,
        "expires": NOW + 86400,
        "forced_expire": False,
        "message_size": 2048,
        "sender": "app@example.com",
        "recipients": [{"address": "user@example.net", "state": "ready", "delay_reason": "451 4.4.1 no"}],
        "attempts": 2,
        "next_attempt": NOW + 90,
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        **more,
    }


def drawn(what: RenderableType, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(what)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_a_line_for_each_message_and_their_sum() -> None:
    text = drawn(listing([row(), row(1, queue_name="hold"), row(2, queue_name="active")], now=NOW))
    first, *_ = [line for line in text.splitlines() if "e0" in line]
    told = "01m8494cee4nr6g69ejbjx24e0 10 min 2.0 KiB app@example.com user@example.net in 90 s"
    assert first.split() == told.split()
    assert "e1!" in text
    assert "e2*" in text
    assert "3 messages, 6.0 KiB" in text
    assert drawn(listing([], now=NOW)) == "the queue is empty\n"


@pytest.mark.parametrize("width", [40, 60, 80])
def test_an_id_stays_whole_on_a_narrow_terminal(width: int) -> None:
    text = drawn(listing([row()], now=NOW), width)
    assert "01m8494cee4nr6g69ejbjx24e0" in text
    assert max(map(len, text.splitlines())) <= width


def test_all_about_one_message() -> None:
    text = drawn(details(row(), now=NOW))
    for word in ("user@example.net", "451 4.4.1 no", "0af7651916cd43dd8448eb211c80319c", "10 min ago"):
        assert word in text


def test_the_shape_counts_each_message_once_for_each_domain() -> None:
    two = [{"address": "a@x.example", "state": "ready"}, {"address": "b@X.example", "state": "ready"}]
    text = drawn(shape([row(), row(1, recipients=two, arrival_time=NOW - 100)], now=NOW))
    lines = [line.split() for line in text.splitlines()[1:]]
    assert lines == [["all", "2", "1", "1"], ["example.net", "1", "1"], ["x.example", "1", "1"]]


def test_what_a_peer_wrote_moves_no_cursor() -> None:
    hostile = "\x1b[2Jx\r\n\u202ey@z"
    assert safe(hostile).isprintable()
    text = drawn(details(row(sender=hostile), now=NOW))
    assert "\x1b" not in text
    assert "\\u001b" in json_line(row(sender=hostile))


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-1, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172800, "2.0 d")],
)
def test_ages(seconds: float, told: str) -> None:
    assert age(seconds) == told
