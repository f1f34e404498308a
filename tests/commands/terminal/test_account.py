"""What became of a mail, in plain words, from spans as the status port gives them."""

from collections.abc import Sequence
from typing import Any

import pytest

from otel_smtp.commands.terminal.account import Account, account_lines, accounts, queued_lines
from otel_smtp.commands.terminal.otlp_spans import spans_of
from otel_smtp.status.traces import RecentTraces
from tests.support.spans import (
    MILLISECOND,
    START,
    Event,
    Identity,
    Kind,
    Link,
    Span,
    Value,
    encoded,
    mail_trace,
    state_events,
)

TRACE = 0xABC
SECOND = 1000 * MILLISECOND
PROVIDER: dict[str, Value] = {
    "smtp.upstream.name": "provider", "server.address": "smtp.example.com", "server.port": 587,
}  # fmt: skip


def told(*spans: Any) -> list[Account]:
    """The accounts of a trace that has gone through the status port's JSON."""
    traces = RecentTraces()
    for span in spans:
        traces.add([span])
    trace = traces.get(f"{TRACE:x}")
    assert trace is not None
    return accounts(spans_of(trace.otlp_json({})))


def text(account: Account) -> list[str]:
    return [line.plain for line in account_lines(account)]


def delivery(
    attributes: dict[str, Value], *, span_id: int = 3, begin: int = 0, lasts: int = 10, events: Sequence[Event] = ()
) -> Any:
    return encoded(
        Span(
            "smtp.delivery", Kind.CLIENT, Identity(TRACE, span_id), Identity(TRACE, 2),
            START + begin * MILLISECOND, START + (begin + lasts) * MILLISECOND,
            {**PROVIDER, **attributes}, events, [], False,
        )
    )  # fmt: skip


def transaction(
    attributes: dict[str, Value], *, events: Sequence[Event] = (), lasts: int = 12, links: Sequence[Link] = ()
) -> Any:
    named: dict[str, Value] = {
        "smtp.mail.from.domain": "shop.example", "smtp.rcpt.domains": ("example.net", "example.org"),
    }  # fmt: skip
    return encoded(
        Span(
            "smtp.transaction", Kind.INTERNAL, Identity(TRACE, 2), Identity(TRACE, 1),
            START, START + lasts * MILLISECOND, {**named, **attributes}, events, links, False,
        )
    )  # fmt: skip


def connection(events: Sequence[Event], attributes: dict[str, Value] | None = None) -> Any:
    return encoded(
        Span(
            "smtp.connection", Kind.SERVER, Identity(TRACE, 1), None, START, START + 20 * MILLISECOND,
            attributes or {}, events, [], False,
        )
    )  # fmt: skip


def error(verb: str, code: int, error_type: str, text: str | None = None, **more: Value) -> Event:
    said: dict[str, Value] = {} if text is None else {"smtp.reply.text": text}
    return Event(
        START + MILLISECOND,
        "smtp.state.error",
        {"smtp.state": "Error", "smtp.verb": verb, "smtp.reply.code": code, "error.type": error_type, **said, **more},
    )


def test_a_relayed_mail() -> None:
    accepted: dict[str, Value] = {
        "smtp.outcome": "relayed", "smtp.reply.code": 250, "smtp.reply.enhanced_code": "2.0.0",
        "smtp.reply.text": "Ok: queued as 4XyZ12",
    }  # fmt: skip
    steps = [
        Event(START + MILLISECOND, "smtp.upstream.pool", {}),
        Event(START + 9 * MILLISECOND, "smtp.upstream.reply", {}),
    ]
    [mail] = told(
        delivery(accepted, events=steps),
        transaction({"smtp.outcome": "relayed", "smtp.transaction.recipient_count": 2}),
    )
    head, *rest = text(mail)
    assert head.endswith("shop.example -> example.net, example.org  relayed  12.0 ms")
    assert rest == [
        "  2 recipients: accepted by provider (smtp.example.com:587): 250 2.0.0 Ok: queued as 4XyZ12",
        "  Longest: provider's reply to the content (8.00 ms)",
        f"  trace {TRACE:032x}",
    ]


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        # The attempt stays open until the client resets or ends its transaction.
        ({"smtp.outcome": "refused", "smtp.reply.code": 550}, "the client, after provider's last answer"),
        ({"smtp.outcome": "deferred", "smtp.failure.reason": "no reply"}, "provider's answer, which did not come"),
        ({"smtp.outcome": "aborted"}, "the client, which gave up"),
    ],
)
def test_the_longest_wait_at_the_end_of_an_attempt_is_whose_it_was(ended: dict[str, Value], words: str) -> None:
    steps = [Event(START + MILLISECOND, "smtp.upstream.rcpt", {})]
    [mail] = told(delivery(ended, events=steps), transaction(ended))
    assert f"  Longest: {words} (9.00 ms)" in text(mail)


def test_a_recipient_that_the_upstream_refuses_is_told_with_its_words() -> None:
    refused = Event(
        START + MILLISECOND,
        "smtp.recipient",
        {
            "smtp.rcpt.domain": "example.org", "smtp.reply.code": 550, "smtp.reply.enhanced_code": "5.1.1",
            "smtp.reply.text": "User unknown", "smtp.recipient.fate": "refused", "smtp.upstream.name": "provider",
        },
    )  # fmt: skip
    [mail] = told(
        delivery({"smtp.outcome": "relayed", "smtp.reply.code": 250, "smtp.delivery.recipients_accepted": 1}),
        transaction({"smtp.outcome": "partly_relayed"}, events=[refused]),
        connection([error("RCPT", 550, "upstream_refused", "User unknown")]),
    )
    assert text(mail)[1:3] == [
        "  example.org: refused by provider: 550 5.1.1 User unknown",
        "  1 recipient: accepted by provider (smtp.example.com:587): 250",
    ]
    assert mail.as_json()["fates"][0] == {
        "recipient": "example.org", "fate": "refused", "who": "provider", "words": "550 5.1.1 User unknown",
    }  # fmt: skip


def test_recipients_beyond_those_that_are_told_are_counted() -> None:
    rest = Event(START, "smtp.recipient", {"smtp.recipient.more": 17})
    [mail] = told(transaction({"smtp.outcome": "refused"}, events=[rest]))
    assert text(mail)[1] == "  17 more recipients: refused or deferred"


def test_what_became_of_a_queued_recipient_is_told_by_whatever_span_has_it() -> None:
    expired = Event(START, "smtp.recipient", {"smtp.rcpt.domain": "example.org", "smtp.recipient.fate": "expired"})
    spool = encoded(
        Span(
            "smtp.spool", Kind.INTERNAL, Identity(TRACE, 7), Identity(TRACE, 2), START + 9 * SECOND, START + 9 * SECOND,
            {"smtp.spool.id": "01J"}, [expired], [], False,
        )
    )  # fmt: skip
    [mail] = told(transaction({"smtp.outcome": "queued"}), spool)
    assert text(mail)[1] == "  example.org: expired by this gateway"


def test_a_bounce_is_told_as_one_and_not_as_an_attempt_that_went_well() -> None:
    gone: dict[str, Value] = {"smtp.rcpt.domain": "example.org", "smtp.reply.code": 550}
    bounced = Event(START, "smtp.recipient", {**gone, "smtp.recipient.fate": "bounced"})
    to_sender = Event(START, "smtp.recipient", {"smtp.rcpt.domain": "shop.example", "smtp.recipient.fate": "held"})
    of_bounce: dict[str, Value] = {"smtp.message.kind": "bounce", "smtp.delivery.recipients_accepted": 1}
    held = encoded(
        Span(
            "smtp.spool", Kind.INTERNAL, Identity(TRACE, 7), Identity(TRACE, 2), START + 9 * SECOND, START + 9 * SECOND,
            {"smtp.message.kind": "bounce", "smtp.spool.operator": "olga"}, [to_sender], [], False,
        )
    )  # fmt: skip
    [mail] = told(
        transaction({"smtp.outcome": "queued"}),
        delivery({"smtp.outcome": "refused", "smtp.reply.code": 550, "smtp.message.kind": "mail"}, events=[bounced]),
        delivery({"smtp.outcome": "deferred", "smtp.reply.code": 451, **of_bounce}, span_id=4, begin=2000),
        held,
        delivery({"smtp.outcome": "relayed", "smtp.reply.code": 250, **of_bounce}, span_id=5, begin=90000),
    )
    assert mail.kind == "mail"
    assert text(mail)[1:-1] == [
        "  example.org: bounced by this gateway: 550",
        "  refused by provider (smtp.example.com:587): 550",
        "  the bounce: deferred by provider (smtp.example.com:587): 451",
        "  the bounce: held by olga",
        "  the bounce: accepted by provider (smtp.example.com:587): 250",
        "  Longest: the client, after provider's last answer (10.0 ms)",
    ]


def test_our_own_refusal_is_ours() -> None:
    [mail] = told(
        transaction({"smtp.outcome": "refused"}),
        connection([error("RCPT", 550, "policy", "relaying denied")]),
    )
    assert text(mail)[1] == "  a recipient: refused by this gateway: 550 relaying denied"


def test_what_an_upstream_said_to_the_client_is_told_once_and_in_full() -> None:
    refused: dict[str, Value] = {
        "smtp.outcome": "refused", "smtp.reply.code": 550, "smtp.reply.enhanced_code": "5.1.1",
        "smtp.reply.text": "No such user here",
    }  # fmt: skip
    [mail] = told(
        delivery(refused),
        transaction({"smtp.outcome": "refused"}),
        connection([error("RCPT", 550, "upstream_refused", **{"smtp.reply.enhanced_code": "5.1.1"})]),
    )
    assert text(mail)[1:2] == ["  a recipient: refused by provider (smtp.example.com:587): 550 5.1.1 No such user here"]
    assert sum("550" in line for line in text(mail)) == 1


def test_a_failure_says_why() -> None:
    failed: dict[str, Value] = {
        "smtp.outcome": "deferred", "error.type": "tls",
        "smtp.failure.reason": "certificate verify failed: self-signed certificate",
    }  # fmt: skip
    [mail] = told(delivery(failed), transaction({"smtp.outcome": "deferred"}))
    assert text(mail)[1] == (
        "  deferred by provider (smtp.example.com:587): certificate verify failed: self-signed certificate"
    )
    # The error reply is our own words for it; one that is about something else stands.
    for of_error, lines in (("tls", 0), ("policy", 1)):
        [mail] = told(
            delivery(failed),
            transaction({"smtp.outcome": "deferred"}),
            connection([error("DATA", 451, of_error, "not now")]),
        )
        assert sum("not now" in line for line in text(mail)) == lines
        assert sum("self-signed" in line for line in text(mail)) == 1
    [mail] = told(delivery({"smtp.outcome": "deferred", "error.type": "timeout"}), transaction({"smtp.outcome": "x"}))
    assert text(mail)[1] == "  deferred by provider (smtp.example.com:587): timeout"


def test_a_mail_that_came_after_several_attempts() -> None:
    deferred: dict[str, Value] = {"smtp.outcome": "deferred", "smtp.reply.code": 451, "smtp.delivery.attempt": 1}
    relayed: dict[str, Value] = {"smtp.outcome": "relayed", "smtp.reply.code": 250, "smtp.delivery.attempt": 2}
    [mail] = told(
        delivery(deferred),
        delivery(relayed, span_id=4, begin=30_000),
        transaction({"smtp.outcome": "queued", "smtp.spool.id": "01J9ZQ4T3M"}),
    )
    lines = text(mail)
    assert "  deferred by provider (smtp.example.com:587): 451" in lines
    assert "  accepted at attempt 2 by provider (smtp.example.com:587): 250" in lines
    assert "  Longest: the wait until attempt 2 (29.99 s)" in lines
    assert lines[-1] == f"  trace {TRACE:032x}  queue id 01J9ZQ4T3M"


def test_of_many_attempts_the_first_and_the_last_are_told() -> None:
    attempts = [
        delivery(
            {"smtp.outcome": "deferred", "smtp.reply.code": 451, "smtp.delivery.attempt": number},
            span_id=10 + number, begin=number * 1000,
        )
        for number in range(1, 31)
    ]  # fmt: skip
    [mail] = told(*attempts)
    fates = [one.fate for one in mail.sayings]
    assert fates == ["deferred", "deferred at attempt 2", "deferred at attempt 3"] + [
        f"deferred at attempt {number}" for number in (28, 29, 30)
    ]
    assert "a mail from the queue" in text(mail)[0], "its transaction has left memory"


def test_a_recipient_that_is_deferred_at_each_attempt_is_told_once() -> None:
    def fate(fate: str, code: int, text: str) -> Event:
        about: dict[str, Value] = {
            "smtp.rcpt.domain": "example.org", "smtp.recipient.fate": fate, "smtp.upstream.name": "provider",
            "smtp.reply.code": code, "smtp.reply.text": text,
        }  # fmt: skip
        return Event(START, "smtp.recipient", about)

    attempts = [
        delivery(
            {"smtp.outcome": "deferred", "smtp.delivery.attempt": number}, span_id=10 + number, begin=number * 1000,
            events=[*more, fate("deferred", 451, f"try again in {900 - number} s"), fate("deferred", 451, "busy")],
        )
        for number, more in enumerate([[fate("bounced", 550, "unknown")], [], []], 1)
    ]  # fmt: skip
    [mail] = told(*attempts, transaction({"smtp.outcome": "queued"}))
    assert [one for one in text(mail) if one.startswith("  example.org:")] == [
        "  example.org: bounced by provider: 550 unknown",
        "  example.org: deferred by provider: 451 try again in 897 s",
        "  example.org: deferred by provider: 451 busy",
    ]


def test_a_bounce_is_called_one() -> None:
    [mail] = told(delivery({"smtp.outcome": "relayed", "smtp.message.kind": "bounce"}))
    assert "a bounce from the queue" in text(mail)[0]


def test_a_client_that_gives_up_and_a_connection_without_mail() -> None:
    vanished: dict[str, Value] = {"smtp.close.reason": "client_disconnect"}
    [mail] = told(transaction({"smtp.outcome": "aborted"}), connection([], vanished))
    assert text(mail)[1] == "  aborted: client disconnect"
    [mail] = told(connection([error("EHLO", 421, "policy", "too many connections")], vanished))
    head, said, *_ = text(mail)
    assert "a connection without mail" in head
    assert said == "  EHLO: deferred by this gateway: 421 too many connections"


def test_errors_of_other_transactions_of_the_connection_are_not_this_mails() -> None:
    errors = [
        error("RCPT", 550, "policy", "the first", **{"smtp.transaction.number": 1}),
        error("RCPT", 550, "policy", "the second", **{"smtp.transaction.number": 2}),
    ]
    [mail] = told(transaction({"smtp.outcome": "refused", "smtp.transaction.number": 2}), connection(errors))
    assert [one.words for one in mail.sayings] == ["550 the second"]


def test_a_mail_is_recognised_by_what_its_spans_hold() -> None:
    [mail] = told(*mail_trace(TRACE, domain="Example.ORG"))
    assert mail.holds("example.org")
    assert not mail.holds("example.com")


def test_a_mail_in_the_applications_trace_finds_its_connection_by_the_link() -> None:
    mail_span = encoded(
        Span(
            "smtp.transaction", Kind.SERVER, Identity(TRACE, 2), Identity(TRACE, 99), START, START + 5 * MILLISECOND,
            {"smtp.outcome": "refused"}, [], [Link(Identity(TRACE, 1), {"smtp.link.type": "connection"})], False,
        )
    )  # fmt: skip
    [mail] = told(mail_span, connection(state_events("New Active Error", START), {}))
    assert [one.fate for one in mail.sayings] == ["refused"]


def test_a_peers_text_cannot_control_the_terminal() -> None:
    [mail] = told(
        delivery({"smtp.outcome": "refused", "smtp.reply.code": 550, "smtp.reply.text": "\x1b[2J\n gone"}),
        transaction({"smtp.outcome": "refused"}),
    )
    assert not any("\x1b" in line or "\n" in line for line in text(mail))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "1 attempt in 60 s, next attempt in 30 s, given up in 4 h"),
        ({"queue_name": "hold", "attempts": 0}, "0 attempts in 60 s, held: an operator has to release it"),
        ({"queue_name": "hold", "kind": "bounce"}, "held: an operator has to release it, given up in 4 h"),
        ({"queue_name": "active"}, "being delivered now, given up in 4 h"),
        ({"queue_name": "corrupt"}, "1 attempt in 60 s, its content is damaged: an operator has to act"),
        ({"expires": None}, "next attempt in 30 s"),
    ],
)
def test_a_queued_message_says_why_it_waits(changes: dict[str, Any], words: str) -> None:
    row = {
        "queue_name": "deferred", "queue_id": "01J9ZQ4T3M", "attempts": 1, "arrival_time": 940.0,
        "next_attempt": 1030.0, "expires": 1000.0 + 4 * 3600,
        "recipients": [
            {"address": "ann@example.org", "state": "ready", "delay_reason": "451 4.7.1 greylisted"},
            {"address": "bob@example.org", "state": "delivered"},
        ],
    }  # fmt: skip
    head, ann, bob = (line.plain for line in queued_lines({**row, **changes}, 1000.0))
    assert f"{words}\n" in f"{head}\n"
    assert ann == "    ann@example.org: waits: 451 4.7.1 greylisted"
    assert bob == "    bob@example.org: delivered"
