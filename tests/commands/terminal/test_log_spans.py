"""Lines of the JSON log made spans: whose they are, and what is missing."""

from typing import Any

import pytest

from otel_smtp.commands.terminal.account import accounts
from otel_smtp.commands.terminal.log_spans import spans_of_lines

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def line(event: str, second: float, span: int, **fields: Any) -> dict[str, Any]:
    return {
        "timestamp": f"2026-11-29T03:00:{second:09.6f}Z", "level": "info", "logger": "otel_smtp.access", "event": event,
        "trace_id": TRACE, "span_id": f"{span:016x}", "duration": 0.5,
        **{name.replace("__", "."): value for name, value in fields.items()},
    }  # fmt: skip


def test_a_delivery_belongs_to_the_transaction_whose_line_comes_next() -> None:
    on = {"smtp__connection__id": "c1"}
    lines = [
        line("smtp.delivery", 1.0001, 11, smtp__outcome="relayed", **on),
        line("smtp.transaction", 1.0002, 1, smtp__outcome="relayed", smtp__rcpt__domains=["example.net"], **on),
        line("smtp.delivery", 1.5, 12, smtp__outcome="refused", smtp__reply__code=550, **on),
        line("smtp.transaction", 1.5001, 2, smtp__outcome="refused", smtp__rcpt__domains=["example.org"], **on),
        line("smtp.delivery", 1.2, 13, smtp__outcome="relayed", smtp__connection__id="another"),
        line("smtp.connection", 2, 3, **on),
    ]
    first, other, second = accounts(spans_of_lines(lines))
    assert [(mail.outcome, [one.fate for one in mail.sayings]) for mail in (first, second)] == [
        ("relayed", ["accepted"]),
        ("refused", ["refused"]),
    ]
    assert first.recipients == ["example.net"]
    assert other.outcome == "", "its transaction is in another log"


def test_attempts_from_the_queue_and_recipients_belong_to_their_mail() -> None:
    lines = [
        line("smtp.transaction", 1, 1, smtp__outcome="queued", smtp__spool__id="01J", smtp__connection__id="c1"),
        line("smtp.delivery", 5, 2, smtp__outcome="deferred", smtp__spool__id="01J", smtp__reply__code=451),
        line(
            "smtp.recipient", 9, 3, smtp__rcpt__domain="example.org", smtp__recipient__fate="bounced",
            smtp__reply__code=550, smtp__spool__id="01J",
        ),
        line("smtp.delivery", 9, 3, smtp__outcome="refused", smtp__spool__id="01J", smtp__delivery__attempt=2),
    ]  # fmt: skip
    [mail] = accounts(spans_of_lines(lines))
    assert [(one.whom, one.fate) for one in mail.sayings] == [
        ("example.org", "bounced"), ("", "deferred"), ("", "refused at attempt 2"),
    ]  # fmt: skip
    assert mail.began_ns == 1795921200_500_000_000
    assert "timestamp" not in mail.spans[0].attributes


@pytest.mark.parametrize(("fate", "operator"), [("expired", None), ("removed", "olga"), ("held", "olga")])
def test_what_befell_a_mail_in_the_queue_is_told_with_who_did_it(fate: str, operator: str | None) -> None:
    done_by = {} if operator is None else {"smtp__spool__operator": operator}
    of_mail = {"smtp__spool__id": "01J", "smtp__rcpt__domain": "example.org", "smtp__recipient__fate": fate}
    lines = [
        line("smtp.transaction", 1, 1, smtp__outcome="queued", smtp__spool__id="01J", smtp__connection__id="c1"),
        line("smtp.delivery", 5, 2, smtp__outcome="deferred", smtp__spool__id="01J", smtp__reply__code=451),
        line("smtp.recipient", 9, 3, smtp__reply__code=451, **of_mail),
        line("smtp.spool", 9, 3, smtp__spool__id="01J", smtp__spool__action=fate, **done_by),
    ]
    [mail] = accounts(spans_of_lines(lines))
    assert mail.sayings[0][:3] == (
        "example.org", fate, operator or "this gateway",
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{"span_id": "x"}, {"timestamp": "now"}, {"timestamp": None}, {"duration": "long"}])
def test_a_line_of_another_program_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        spans_of_lines([line("smtp.transaction", 1, 1) | changes])


def test_other_events_are_left_out() -> None:
    assert spans_of_lines([line("worker replaced", 1, 1)]) == []
