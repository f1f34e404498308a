"""The queue as a terminal shows it."""

from io import StringIO
from typing import Any

import pytest
from rich.console import Console, RenderableType

from otel_smtp.commands.terminal.listing import LEGEND, Grouping, Listing, Shape, age, details, json_line

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


def recipient(address: str, reason: str = "") -> dict[str, str]:
    return {"address": address, "state": "ready", **({"delay_reason": reason} if reason else {})}


def drawn(*what: RenderableType, width: int = 120, soft_wrap: bool = False) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    for one in what:
        console.print(one, soft_wrap=soft_wrap)
    assert isinstance(console.file, StringIO)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def listed(*rows: dict[str, Any], width: int | None = 120) -> str:
    listing = Listing(width=width, now=NOW)
    lines = [*listing.heading(), *(line for row in rows for line in listing.lines(row)), *listing.summary()]
    return drawn(*lines, width=width or 80, soft_wrap=width is None)


def shaped(*rows: dict[str, Any], by: Grouping = Grouping.DOMAIN, most: int = 50, width: int = 120) -> list[list[str]]:
    shape = Shape(by, most=most, now=NOW)
    for row in rows:
        shape.add(row)
    return [line.split() for line in drawn(shape.table(), width=width).splitlines()]


def test_a_message_is_one_line_with_its_reasons_below() -> None:
    assert listed(row(), row(1, queue_name="hold"), row(2, queue_name="active")) == (
        "id                              age       size  next attempt   sender -> recipients\n"
        "01m8494cee4nr6g69ejbjx24e0   10 min    2.0 KiB  in 90 s        app@example.com -> user@example.net\n"
        "    451 4.4.1 no\n"
        "01m8494cee4nr6g69ejbjx24e1!  10 min    2.0 KiB  when released  app@example.com -> user@example.net\n"
        "    451 4.4.1 no\n"
        "01m8494cee4nr6g69ejbjx24e2*  10 min    2.0 KiB  now            app@example.com -> user@example.net\n"
        "    451 4.4.1 no\n"
        "3 messages, 6.0 KiB\n"
        f"{LEGEND}\n"
    )


def test_an_empty_queue() -> None:
    listing = Listing(width=80, now=NOW)
    assert drawn(*listing.summary()) == "the queue is empty\n"
    assert drawn(*Listing(width=80, is_chosen=True, now=NOW).summary()) == "no message in the queue fits\n"


@pytest.mark.parametrize(
    ("more", "mark"),
    [
        ({}, ""),
        ({"queue_name": "incoming"}, ""),
        ({"queue_name": "active"}, "*"),
        ({"queue_name": "hold"}, "!"),
        ({"queue_name": "corrupt"}, "?"),
        ({"forced_expire": True}, "#"),
        ({"queue_name": "active", "forced_expire": True}, "*"),
    ],
)
def test_marks_are_those_of_mailq(more: dict[str, Any], mark: str) -> None:
    assert f"{row()['queue_id']}{mark} " in listed(row(**more))


@pytest.mark.parametrize("width", [40, 60, 80, 99, 100, 120, 200])
def test_nothing_is_lost_on_a_narrow_terminal(width: int) -> None:
    long = row(
        recipients=[recipient("somebody.with.a.long.name@a.long.domain.example.net", "451 4.4.1 " + "nay " * 40)]
    )
    text = listed(long, width=width)
    assert max(map(len, text.splitlines())) <= width
    assert any(line.startswith(row()["queue_id"]) for line in text.splitlines())  # an id is there to be copied
    words = "".join(text.split())
    assert "somebody.with.a.long.name@a.long.domain.example.net" in words
    assert words.count("nay") == 40


def test_without_a_terminal_a_message_is_one_line() -> None:
    reasons = [recipient(f"user{number}@example.net", f"450 4.2.{number} " + "busy " * 30) for number in range(3)]
    heading, only, *_ = listed(row(recipients=reasons), width=None).splitlines()
    assert heading.startswith("id ")
    assert only.startswith(row()["queue_id"])
    assert all(f"450 4.2.{number} busy" in only for number in range(3))


def test_each_reason_is_listed_once_and_the_most_frequent_first() -> None:
    told = ["450 4.2.1 busy", "452 4.2.2 full", "452 4.2.2 full", "", "421 a", "421 b"]
    text = listed(row(recipients=[recipient(f"user{n}@example.net", reason) for n, reason in enumerate(told)]))
    assert "user0@example.net (+5)\n    452 4.2.2 full (2 times)\n    450 4.2.1 busy\n" in text
    assert "    (1 more)\n" in text


def test_all_about_one_message() -> None:
    assert "not before an operator releases it" in drawn(details(row(queue_name="hold"), now=NOW))
    text = drawn(details(row(), now=NOW))
    assert text.splitlines()[0].startswith("id "), "no empty head above the facts"
    assert "not before" not in text
    for word in ("user@example.net", "451 4.4.1 no", "0af7651916cd43dd8448eb211c80319c", "10 min ago"):
        assert word in text


def test_the_shape_counts_each_message_once_for_each_domain() -> None:
    two = [recipient("a@x.example"), recipient("b@X.example"), recipient("c@example.net")]
    assert shaped(row(), row(1, recipients=two, arrival_time=NOW - 100)) == [
        ["domain", "messages", "5m", "20m"],
        ["all", "2", "1", "1"],  # not 3: a message of two domains is one message
        ["example.net", "2", "1", "1"],
        ["x.example", "1", "1"],
    ]


@pytest.mark.parametrize(
    ("age_seconds", "column"),
    [
        (-5, "5m"), (0, "5m"), (300, "5m"), (301, "20m"), (4800, "80m"), (4801, "5h"), (76800, "21h"),
        (307200, "3.5d"), (307201, "older"),
    ],
)  # fmt: skip
def test_ages_of_the_shape(age_seconds: float, column: str) -> None:
    heads, everything, _ = shaped(row(arrival_time=NOW - age_seconds))
    assert heads == ["domain", "messages", column]
    assert everything == ["all", "1", "1"]


def test_the_shape_by_sender_and_by_reason() -> None:
    mails = [
        row(),
        row(1, sender="", recipients=[recipient("Postmaster")]),
        row(2, sender="x@EXAMPLE.com", recipients=[recipient("y@z", "451 4.4.1 no"), recipient("z@z", "450 busy")]),
    ]
    assert shaped(*mails, by=Grouping.SENDER)[1:] == [
        ["all", "3", "3"],
        ["example.com", "2", "2"],
        ["<>", "1", "1"],
    ]
    assert shaped(*mails, by=Grouping.REASON)[1:] == [
        ["all", "3", "3"],
        ["451", "4.4.1", "no", "2", "2"],
        ["(not", "tried", "yet)", "1", "1"],
        ["450", "busy", "1", "1"],
    ]
    assert ["(none)", "1", "1"] in shaped(*mails)


def test_a_shape_of_many_groups_ends_with_the_others() -> None:
    mails = [row(number, recipients=[recipient(f"a@{name}.example")]) for number, name in enumerate("aabcc")]
    assert shaped(*mails, most=2)[1:] == [
        ["all", "5", "5"],
        ["a.example", "2", "2"],
        ["c.example", "2", "2"],
        ["(1", "other)", "1", "1"],
    ]


def test_text_of_a_peer_cannot_control_the_terminal() -> None:
    hostile = "\x1b[2Jx\r\n\u202ey[red]@z"
    bad = row(sender=hostile, recipients=[recipient(hostile, hostile)])
    for text in (drawn(details(bad, now=NOW)), listed(bad), listed(bad, width=30), listed(bad, width=None)):
        assert "[red]" in "".join(text.split())  # nor is it markup
        assert all(line.isprintable() for line in text.splitlines())
    for by in Grouping:
        shape = Shape(by, now=NOW)
        shape.add(bad)
        assert all(line.isprintable() for line in drawn(shape.table()).splitlines())
    assert "\\u001b" in json_line(bad)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-1, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (172800, "2.0 d")],
)
def test_ages(seconds: float, told: str) -> None:
    assert age(seconds) == told
