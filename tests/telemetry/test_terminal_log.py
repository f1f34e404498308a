"""The log on a terminal: one line for each mail."""

import io
import logging
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.telemetry.logs import ACCESS, set_up_logging
from otel_smtp.telemetry.terminal_log import COLUMNS, MARKS, MailLines

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
DELIVERY: dict[str, Any] = {
    "smtp.connection.id": "c1",
    "smtp.upstream.name": "provider",
    "smtp.delivery.attempt": 1,
    "smtp.outcome": "relayed",
    "smtp.reply.code": 250,
    "smtp.reply.text": "Ok: queued as 4XyZ12",
    "duration": 0.006,
    "trace_id": TRACE,
}
TRANSACTION: dict[str, Any] = {
    "smtp.connection.id": "c1",
    "smtp.mail.from.domain": "example.com",
    "smtp.rcpt.domains": ("example.net",),
    "smtp.outcome": "relayed",
    "smtp.reply.code": 250,
    "duration": 0.012,
    "trace_id": TRACE,
}
CONNECTION: dict[str, Any] = {
    "smtp.connection.id": "c1",
    "smtp.listener": "local",
    "client.address": "192.0.2.7",
    "smtp.connection.messages": 0,
    "smtp.connection.errors": 0,
    "smtp.close.reason": "quit",
    "duration": 0.5,
    "trace_id": TRACE,
}


def told(*records: tuple[str, dict[str, Any]]) -> list[str]:
    """The lines of some records, without their times."""
    lines = MailLines()
    found = [lines.line(f"smtp.{name}", 1796000000.25, fields) for name, fields in records]
    assert all(line is None or re.match(r"\d\d:\d\d:\d\d\.250 ", line) for line in found)
    return [line.split(" ", 1)[1] for line in found if line is not None]


def test_a_mail_is_one_line_of_its_delivery_and_its_transaction() -> None:
    assert told(("delivery", DELIVERY), ("transaction", TRANSACTION), ("connection", CONNECTION)) == [
        "+ 250 example.com -> example.net  provider  0.012s  Ok: queued as 4XyZ12  4bf92f35"
    ]


def test_mails_at_the_same_time_are_not_mixed_up() -> None:
    other = {"smtp.connection.id": "c2"}
    assert told(
        ("delivery", DELIVERY),
        ("delivery", DELIVERY | other | {"smtp.upstream.name": "second", "smtp.reply.text": "other"}),
        ("transaction", TRANSACTION),
        ("transaction", TRANSACTION | other),
    ) == [
        "+ 250 example.com -> example.net  provider  0.012s  Ok: queued as 4XyZ12  4bf92f35",
        "+ 250 example.com -> example.net  second  0.012s  other  4bf92f35",
    ]


def test_an_upstream_that_was_passed_over_has_a_line() -> None:
    away = {"smtp.outcome": "deferred", "error.type": "upstream_unavailable", "duration": 0.001}
    first = {name: value for name, value in (DELIVERY | away).items() if not name.startswith("smtp.reply.")}
    lines = told(
        ("delivery", first), ("delivery", DELIVERY | {"smtp.upstream.name": "b"}), ("transaction", TRANSACTION)
    )
    assert lines == [
        "~ --- ... -> ...  provider  0.001s  upstream_unavailable  4bf92f35",
        "+ 250 example.com -> example.net  b  0.012s  Ok: queued as 4XyZ12  4bf92f35",
    ]


def test_an_attempt_from_the_spool_has_a_line() -> None:
    spooled = {name: value for name, value in DELIVERY.items() if name != "smtp.connection.id"}
    more = {"smtp.spool.id": "01j9zq", "smtp.delivery.attempt": 3, "smtp.outcome": "deferred", "smtp.reply.code": 451}
    assert told(("delivery", spooled | more)) == [
        "~ 451 01j9zq attempt 3  provider  0.006s  Ok: queued as 4XyZ12  4bf92f35"
    ]
    queued = TRANSACTION | {"smtp.outcome": "queued", "smtp.spool.id": "01j9zq"}
    assert told(("transaction", queued)) == ["= 250 example.com -> example.net  0.012s  01j9zq  4bf92f35"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, None),
        ({"smtp.close.reason": "client_disconnect"}, None),
        ({"smtp.connection.errors": 1, "smtp.connection.messages": 2}, None),
        ({"smtp.connection.errors": 1}, "- --- 192.0.2.7 at local  0.500s  quit, 1 error  4bf92f35"),
        ({"smtp.close.reason": "refused"}, "- --- 192.0.2.7 at local  0.500s  refused, 0 errors  4bf92f35"),
        (
            {"smtp.close.reason": "tls_failure", "smtp.connection.messages": 1, "smtp.connection.errors": 2},
            "- --- 192.0.2.7 at local  0.500s  tls failure, 2 errors  4bf92f35",
        ),
    ],
)
def test_a_connection_has_a_line_where_its_mails_do_not_tell_its_trouble(
    more: dict[str, Any], line: str | None
) -> None:
    assert told(("connection", CONNECTION | more)) == ([line] if line else [])


@pytest.mark.parametrize(
    ("more", "route"),
    [
        ({"smtp.mail.from.domain": ""}, "<> -> example.net"),
        ({"smtp.rcpt.domains": ("a.example", "b.example", "c.example", "d.example")}, "a.example, b.example (+2)"),
        (
            {"smtp.rcpt.addresses": ("bob@example.net",), "smtp.mail.from.address": "me@a.example"},
            "me@a.example -> bob@",
        ),
    ],
)
def test_a_route_is_short(more: dict[str, Any], route: str) -> None:
    (line,) = told(("transaction", TRANSACTION | more))
    assert f" 250 {route}" in f" {line}" or route in line


def test_redacted_addresses_leave_a_line() -> None:
    hidden = {name: value for name, value in TRANSACTION.items() if "domain" not in name}
    assert told(("transaction", hidden)) == ["+ 250 ... -> ...  0.012s  4bf92f35"]


def test_every_outcome_has_a_mark_of_its_own() -> None:
    assert len(set(MARKS.values())) == len(MARKS)


@given(text=st.text(max_size=400), domains=st.lists(st.text(max_size=300), max_size=10))
def test_a_line_is_one_line_of_at_most_120_columns(text: str, domains: list[str]) -> None:
    lines = MailLines()
    lines.line("smtp.delivery", 1.0, DELIVERY | {"smtp.reply.text": text, "smtp.upstream.name": text[:64]})
    line = lines.line("smtp.transaction", 1.0, TRANSACTION | {"smtp.rcpt.domains": domains})
    assert line is not None
    assert len(line) <= COLUMNS
    assert len(line.splitlines()) == 1
    assert line.endswith(TRACE[:8])


def test_what_a_terminal_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    set_up_logging("text", "info", stream)
    logger = logging.getLogger(ACCESS)
    for name, fields in (("delivery", DELIVERY), ("transaction", TRANSACTION), ("connection", CONNECTION)):
        logger.handle(
            logging.makeLogRecord({"name": ACCESS, "levelno": 20, "levelname": "INFO", "msg": f"smtp.{name}", **fields})
        )
    (line,) = stream.getvalue().splitlines()
    assert line.endswith("Ok: queued as 4XyZ12  4bf92f35")
    assert "\x1b" not in line


def test_colors_change_nothing_but_the_color() -> None:
    plain, colored = MailLines(), MailLines(colors=True)
    for lines in (plain, colored):
        lines.line("smtp.delivery", 1.0, DELIVERY)
    line = colored.line("smtp.transaction", 1.0, TRANSACTION)
    assert line is not None
    assert "\x1b[32m+ 250\x1b[0m" in line
    assert re.sub(r"\x1b\[[0-9;]*m", "", line) == plain.line("smtp.transaction", 1.0, TRANSACTION)
