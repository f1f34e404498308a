"""What operators did, as text and back, and as the log and the trace tell it."""

import json
import logging

import pytest

from otel_smtp.observing import Observer, TransactionRecord
from otel_smtp.spool.deeds import Deed, operator_name
from otel_smtp.spool.messages import Kind

CARRIER = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
DEED = Deed(
    "delete", "ann", "01J9", Kind.MAIL, 3, "app@example.com", CARRIER,
    [("böb@example.net", "451 4.7.1 läter"), ("c@example.net", "")],
)  # fmt: skip


class Told(Observer):
    """What it was told."""

    def __init__(self) -> None:
        self.records: list[TransactionRecord] = []

    def spool_acted(self, transaction: TransactionRecord) -> None:
        self.records.append(transaction)


def test_a_deed_is_the_same_after_a_notification() -> None:
    assert DEED.as_text().isascii()
    assert Deed.parse(DEED.as_text()) == DEED


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "7", '["delete"]', json.dumps(["delete", "a", "b", "no kind", 1, "", {}, []]),
     json.dumps(["delete", "a", "b", "mail", 1, "", [], []]), json.dumps(["delete", "a", "b", "mail", 1, "", {}, [1]])],
)  # fmt: skip
def test_what_is_no_deed_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Deed.parse(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [("ann", "ann"), ("", "unnamed"), (" \r\n", "unnamed"), ("a\x1b[2Jn\nn", "a[2Jnn"), ("x" * 999, "x" * 100)],
)
def test_a_name_is_one_bounded_line(text: str, name: str) -> None:
    assert operator_name(text) == name


@pytest.mark.parametrize(
    ("command", "action", "level", "ended"),
    [
        ("hold", "held", logging.INFO, 2),
        ("release", "released", logging.INFO, 0),
        ("expire", "given_up", logging.WARNING, 0),
        ("delete", "removed", logging.WARNING, 2),
        ("retry", None, logging.INFO, 0),
        ("reset", None, logging.INFO, 0),
    ],
)
def test_the_log_and_the_trace_tell_who_did_it(
    command: str, action: str | None, level: int, ended: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    told = Told()
    Deed(command, "ann", "01J9", Kind.MAIL, 3, "", CARRIER, DEED.recipients).note(told)
    [line] = caplog.records
    assert (line.levelno, line.message) == (level, "queued message changed by an operator")
    told_of = {"operator": "ann", "command": command, "spool_id": "01J9", "trace_id": "a" * 32}
    assert told_of.items() <= vars(line).items()
    assert [record.action for record in told.records] == ([] if action is None else [action])
    for record in told.records:
        assert (record.operator, record.spool_id, record.attempt) == ("ann", "01J9", 3)
        assert len(record.refused) == ended
