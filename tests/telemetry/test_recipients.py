"""Recipients who did not get a mail: as events, as lines of the log, and as numbers."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from otel_smtp.observing import (
    DeliveryPhase,
    Fate,
    MessageKind,
    Observer,
    Outcome,
    SpoolAction,
    TransactionRecord,
    fan_out,
)
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.telemetry.access_log import AccessLog
from otel_smtp.telemetry.logs import ACCESS, JsonRenderer, LineFormatter
from otel_smtp.telemetry.metrics import Metrics
from otel_smtp.telemetry.records import SpanRecord
from otel_smtp.telemetry.redaction import Addresses, Redaction
from otel_smtp.telemetry.shapes import EncodedSpan, EventShape, encode_event
from otel_smtp.telemetry.terminal_log import MailLines
from otel_smtp.telemetry.tracing import Tracing
from tests.telemetry.driving import QUEUED, Client, Kept, begin_delivery, each_to, finish_delivery

NO_USER = Reply(550, replies.BAD_RECIPIENT.enhanced, ("<gone@example.org>: No such user",), ErrorType.UPSTREAM_REFUSED)
GREYLISTED = Reply(450, replies.UPSTREAM_CREDENTIALS.enhanced, ("Greylisted",), ErrorType.UPSTREAM_REFUSED)
FULL = Redaction(Addresses.FULL)


def spans_of(client_does: Any, redaction: Redaction = FULL) -> Mapping[str, SpanRecord]:
    """What a client's connection becomes, the octets and the values alike."""
    kept, exported = Kept(), list[EncodedSpan]()
    client_does(Client(Tracing(exports=[each_to(exported)], sinks=[kept], redaction=redaction)).ehlo())
    for span, record in zip(exported, kept.records, strict=True):
        assert list(span.to_records()[0].events) == list(record.events)
    return {record.name: record for record in kept.records}


def relayed_in_part(client: Client) -> None:
    client.mail().rcpt("bob@example.net").rcpt("gone@example.org", NO_USER).rcpt("later@example.com", GREYLISTED)
    assert client.transaction is not None
    client.data().header()
    client.deliver()
    client.final(outcome=Outcome.PARTLY_RELAYED).quit()


def test_each_recipient_that_did_not_get_it_is_an_event_of_the_transaction() -> None:
    transaction = spans_of(relayed_in_part)["smtp.transaction"]
    assert [(event.name, event.attributes) for event in transaction.events] == [
        (
            "smtp.recipient",
            {
                "smtp.recipient.fate": "refused",
                "smtp.rcpt.domain": "example.org",
                "smtp.rcpt.address": "gone@example.org",
                "smtp.reply.code": 550,
                "smtp.reply.enhanced_code": "5.1.3",
                "smtp.reply.text": "<gone@example.org>: No such user",
            },
        ),
        (
            "smtp.recipient",
            {
                "smtp.recipient.fate": "deferred",
                "smtp.rcpt.domain": "example.com",
                "smtp.rcpt.address": "later@example.com",
                "smtp.reply.code": 450,
                "smtp.reply.enhanced_code": "4.7.0",
                "smtp.reply.text": "Greylisted",
            },
        ),
    ]
    attributes = transaction.attributes
    assert attributes["smtp.outcome"] == "partly_relayed"
    assert attributes["smtp.transaction.recipient_count"] == 1
    assert attributes["smtp.transaction.recipients_refused"] == 1
    assert attributes["smtp.transaction.recipients_deferred"] == 1
    assert attributes["smtp.rcpt.domains"] == ("example.net", "example.org", "example.com")
    assert "smtp.rcpt.domain" not in attributes
    assert transaction.end_ns >= transaction.events[-1].time_ns + 1000
    assert not transaction.has_failed


def test_a_domain_that_all_recipients_share_is_a_text_too() -> None:
    def does(client: Client) -> None:
        client.mail().rcpt("a@Example.net").rcpt("b@example.NET", NO_USER).data().header().final().quit()

    assert spans_of(does)["smtp.transaction"].attributes["smtp.rcpt.domain"] == "example.net"


@pytest.mark.parametrize(
    ("redaction", "shown"),
    [
        (Redaction(Addresses.DOMAIN), {"smtp.rcpt.domain": "example.org"}),
        (Redaction(Addresses.NONE), {}),
        (Redaction(Addresses.HASH, hash_key=b"k"), {"smtp.rcpt.address": "fcd6d5a2b22a6a3a"}),
    ],
)
def test_a_recipient_is_shown_as_far_as_addresses_are(redaction: Redaction, shown: dict[str, str]) -> None:
    transaction = spans_of(relayed_in_part, redaction)["smtp.transaction"]
    attributes = dict(transaction.events[0].attributes)
    assert "gone@" not in str(attributes)
    found = {name: value for name, value in attributes.items() if name.startswith("smtp.rcpt.")}
    assert found.keys() == shown.keys()
    if "smtp.rcpt.domain" in shown:
        assert found == shown


@pytest.mark.parametrize(
    "local", ["x" * 64, "x" * 254, "\u00fc" * 127, "\u6f22" * 84], ids=["usual", "long", "two", "three"]
)
@pytest.mark.parametrize("text", ["no", "word " * 60])
def test_an_event_about_a_recipient_has_less_than_a_kibibyte(local: str, text: str) -> None:
    domain = ".".join(["d" * 60] * 4)
    refused = Reply(550, replies.BAD_RECIPIENT.enhanced, (text,), ErrorType.UPSTREAM_REFUSED)
    exported: list[EncodedSpan] = []

    def does(client: Client) -> None:
        client.mail()
        assert client.transaction is not None
        begin_delivery(client.transaction, "u" * 60, 1, client.clock).end(Outcome.REFUSED, refused, None, 1)
        client.rcpt(f"{local}@{domain}", refused).data().header().final(refused, Outcome.REFUSED).quit()

    does(Client(Tracing(exports=[each_to(exported)], redaction=FULL)).ehlo())
    records = [span.to_records()[0] for span in exported]
    [event] = next(record for record in records if record.name == "smtp.transaction").events
    octets = encode_event(event.time_ns, EventShape(event.name, {}), list(event.attributes.items()))
    assert len(octets) < 1024
    attributes = event.attributes
    assert attributes["smtp.rcpt.domain"] == domain
    assert attributes["smtp.upstream.name"] == "u" * 60
    assert str(attributes["smtp.rcpt.address"]).startswith(local[:30])
    assert str(attributes["smtp.reply.text"]).startswith(text[:200])
    if len(local) == 64 and text == "no":
        assert attributes["smtp.rcpt.address"] == f"{local}@{domain}"[:256]


def test_at_most_fifty_are_events_and_then_one_counts_the_rest() -> None:
    for number in (49, 50, 51, 1000):

        def does(client: Client, number: int = number) -> None:
            client.mail().rcpt()
            for each in range(number):
                client.rcpt(f"r{each}@example.org", NO_USER)
            client.data().header().final(outcome=Outcome.PARTLY_RELAYED).quit()

        events = spans_of(does)["smtp.transaction"].events
        assert len(events) == min(number, 51)
        rest = [
            event.attributes["smtp.recipient.more"] for event in events if "smtp.recipient.more" in event.attributes
        ]
        assert rest == ([number - 50] if number > 50 else [])
        assert number <= 50 or "smtp.recipient.more" in events[-1].attributes


def test_a_reply_to_the_whole_content_is_no_event_of_recipients_and_counts_them() -> None:
    def does(client: Client) -> None:
        client.mail().rcpt("a@example.net").rcpt("b@example.net").data().header()
        assert client.transaction is not None
        client.transaction.refuse_content(replies.MESSAGE_TOO_BIG, (), 1)
        client.final(replies.MESSAGE_TOO_BIG, Outcome.REFUSED).quit()

    transaction = spans_of(does)["smtp.transaction"]
    assert list(transaction.events) == []
    assert transaction.attributes["smtp.transaction.recipients_refused"] == 2
    assert transaction.attributes["smtp.reply.text"] == "Message exceeds the size limit"


def test_an_upstream_that_refuses_a_message_for_one_recipient_is_told_of_with_him() -> None:
    """As the buffered way does it: the client is told one thing for all."""

    def does(client: Client) -> None:
        client.mail().rcpt("a@example.net").rcpt("gone@example.org").data().header()
        transaction = client.transaction
        assert transaction is not None
        client.deliver(NO_USER, Outcome.REFUSED)
        transaction.deliveries[-1].refuse(transaction.accepted[1], NO_USER, client.clock.monotonic_ns())
        transaction.refuse_content(NO_USER, (), client.clock.monotonic_ns())
        client.final(NO_USER, Outcome.REFUSED).quit()

    transaction = spans_of(does)["smtp.transaction"]
    [event] = transaction.events
    assert event.attributes["smtp.rcpt.address"] == "gone@example.org"
    assert event.attributes["smtp.upstream.name"] == "provider"
    assert transaction.attributes["smtp.transaction.recipients_refused"] == 2


def test_recipients_of_a_transaction_are_in_the_order_in_which_they_were_refused() -> None:
    """One that we refused after the upstream had refused another, for whom it then refuses the whole message."""

    def does(client: Client) -> None:
        client.mail().rcpt("a@example.net").rcpt("gone@example.org")
        transaction = client.transaction
        assert transaction is not None
        delivery = begin_delivery(transaction, "provider", 1, client.clock)
        delivery.refuse(transaction.accepted[1], NO_USER, client.clock.monotonic_ns())
        client.rcpt("bad@example.com", replies.BAD_RECIPIENT).data().header()
        finish_delivery(client.observer, delivery, NO_USER, Outcome.REFUSED, clock=client.clock)
        transaction.refuse_content(NO_USER, (), client.clock.monotonic_ns())
        client.final(NO_USER, Outcome.REFUSED).quit()

    events = spans_of(does)["smtp.transaction"].events
    assert [event.attributes["smtp.rcpt.domain"] for event in events] == ["example.org", "example.com"]
    assert [event.time_ns for event in events] == sorted(event.time_ns for event in events)


def test_the_upstream_that_refused_is_named_and_not_the_one_that_was_asked_last() -> None:
    def does(client: Client) -> None:
        client.mail().rcpt("a@example.net").rcpt("b@example.org").data().header()
        transaction = client.transaction
        assert transaction is not None
        for name, reply, outcome in (("first", NO_USER, Outcome.REFUSED), ("second", QUEUED, Outcome.RELAYED)):
            finish_delivery(client.observer, begin_delivery(transaction, name, 1, client.clock), reply, outcome)
        transaction.refuse_content(NO_USER, (NO_USER, QUEUED), client.clock.monotonic_ns())
        client.final(NO_USER, Outcome.PARTLY_RELAYED).quit()

    [event] = spans_of(does)["smtp.transaction"].events
    assert event.attributes["smtp.rcpt.domain"] == "example.net"
    assert event.attributes["smtp.upstream.name"] == "first"


def test_the_upstream_that_a_refusal_of_ours_quotes_is_named() -> None:
    """Its greeting refused service; the next upstream could not be reached, and said nothing."""
    greeting = Reply(554, None, ("blocked",), ErrorType.UPSTREAM_REFUSED)
    ours = replies.UPSTREAM_UNAVAILABLE

    def does(client: Client) -> None:
        client.mail()
        transaction = client.transaction
        assert transaction is not None
        for name, said in (("first", greeting), ("second", None)):
            delivery = begin_delivery(transaction, name, 1, client.clock)
            delivery.end(Outcome.DEFERRED, said, ErrorType.UPSTREAM_UNAVAILABLE, client.clock.monotonic_ns())
        client.rcpt("a@example.net", ours.with_text(f"Service refused: {greeting}"))
        client.rcpt("b@example.net", ours).data().header().final(ours, Outcome.DEFERRED).quit()

    quoting, alone = spans_of(does)["smtp.transaction"].events
    assert quoting.attributes["smtp.upstream.name"] == "first"
    assert "smtp.upstream.name" not in alone.attributes


def test_an_attempt_that_lost_a_recipient_has_failed_and_says_how_many() -> None:
    kept = Kept()
    client = Client(Tracing(sinks=[kept])).ehlo().mail().rcpt("a@example.net").data().header()
    assert client.transaction is not None
    delivery = begin_delivery(client.transaction, "provider", 1, client.clock)
    gone = client.transaction.accepted[0]
    for _ in range(2):  # asked again on another connection
        delivery.refuse(gone, NO_USER, client.clock.monotonic_ns())
    finish_delivery(client.observer, delivery, outcome=Outcome.PARTLY_RELAYED, clock=client.clock)
    client.transaction.refuse(gone, NO_USER, client.clock.monotonic_ns())
    client.final(outcome=Outcome.PARTLY_RELAYED).quit()
    span, transaction = kept.one("smtp.delivery"), kept.one("smtp.transaction")
    assert span.has_failed
    assert span.attributes["error.type"] == "upstream_refused"
    assert span.attributes["smtp.delivery.recipients_accepted"] == 1
    assert span.attributes["smtp.delivery.recipients_refused"] == 1
    assert span.attributes["smtp.outcome"] == "partly_relayed"
    assert [event.attributes["smtp.upstream.name"] for event in transaction.events] == ["provider"]
    assert all(event.name != "smtp.recipient" for event in span.events)  # the transaction's has told it


def test_events_of_a_delivery_are_in_the_order_of_their_times() -> None:
    """Mail that was queued only for those that the upstream deferred: its first attempt reports them."""
    kept = Kept()
    encoded: list[EncodedSpan] = []
    tracing = Tracing(sinks=[kept], exports=[lambda spans, items: encoded.extend(spans)])
    client = Client(tracing).ehlo().mail().rcpt().rcpt("later@example.com").data().header()
    transaction = client.transaction
    assert transaction is not None
    transaction.taken_over = ("other", 2.5)
    delivery = begin_delivery(transaction, "provider", 1, client.clock)
    delivery.phases.append((client.clock.monotonic_ns(), DeliveryPhase.PACED, None))
    delivery.paced = ("a limit", 1)
    delivery.refuse(transaction.accepted[1], GREYLISTED, client.clock.monotonic_ns())
    finish_delivery(client.observer, delivery, outcome=Outcome.PARTLY_RELAYED, clock=client.clock)
    client.final(outcome=Outcome.QUEUED).quit()
    events = kept.one("smtp.delivery").events
    names = [event.name for event in events]
    assert names[:3] == ["smtp.spool.taken_over", "smtp.upstream.paced", "smtp.recipient"]
    assert names[-1] == "smtp.upstream.reply"
    assert [event.time_ns for event in events] == sorted(event.time_ns for event in events)
    [span] = [span for octets in encoded for span in octets.to_records() if span.name == "smtp.delivery"]
    assert span.events == events


# The log -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    caplog.set_level(logging.INFO, logger=ACCESS)
    kept = Kept()
    relayed_in_part(Client(Tracing(sinks=[kept], lines=[AccessLog()], redaction=FULL)).ehlo())
    formatter = LineFormatter(JsonRenderer())
    return [json.loads(formatter.format(record)) for record in caplog.records]


def test_each_such_recipient_is_a_line_that_names_its_mail(lines: list[dict[str, Any]]) -> None:
    told = [line for line in lines if line["event"] == "smtp.recipient"]
    [transaction] = [line for line in lines if line["event"] == "smtp.transaction"]
    assert [(line["smtp.recipient.fate"], line["smtp.rcpt.address"], line["smtp.reply.code"]) for line in told] == [
        ("refused", "gone@example.org", 550),
        ("deferred", "later@example.com", 450),
    ]
    for line in told:
        for name in ("trace_id", "span_id", "smtp.connection.id", "smtp.transaction.number", "smtp.mail.from.domain"):
            assert line[name] == transaction[name]


def test_the_line_of_a_mail_names_those_who_did_not_get_it(lines: list[dict[str, Any]]) -> None:
    [transaction] = [line for line in lines if line["event"] == "smtp.transaction"]
    assert transaction["smtp.rcpt.refused"] == ["gone@example.org: 550 5.1.3 <gone@example.org>: No such user"]
    assert transaction["smtp.rcpt.deferred"] == ["later@example.com: 450 4.7.0 Greylisted"]
    assert transaction["smtp.transaction.recipients_deferred"] == 1


def test_on_a_terminal_such_a_recipient_has_a_line_of_its_own(lines: list[dict[str, Any]]) -> None:
    terminal = MailLines()
    shown = [terminal.line(line["event"], 0.0, line) for line in lines if line["event"] != "smtp.connection"]
    told = [line[13:] for line in shown if line is not None]
    trace = lines[0]["trace_id"][:8]
    assert told[0] == (
        f"x 550 news@example.com -> gone@example.org  refused  5.1.3 <gone@example.org>: No such user  {trace}"
    )
    assert told[1] == f"~ 450 news@example.com -> later@example.com  deferred  4.7.0 Greylisted  {trace}"
    assert told[2].startswith("% 250 news@example.com -> bob@example.net, gone@example.org (+1)  provider")


def test_without_a_sampled_trace_the_log_tells_them_all_the_same() -> None:
    shown = Kept()
    relayed_in_part(Client(Tracing(listeners=[shown], sampler=ALWAYS_OFF)).ehlo())
    assert len(shown.one("smtp.transaction").events) == 2
    assert list(shown.one("smtp.delivery").events) == []


# Numbers -----------------------------------------------------------------------------------------------------------


def recipients(metrics: Metrics) -> dict[str, float]:
    rows = next(rows for metric, rows in metrics.numbers() if metric.name == "smtp.server.recipients")
    return {labels[0]: count for labels, count in rows}


def test_every_fate_begins_with_0() -> None:
    assert recipients(Metrics()) == dict.fromkeys(
        ["refused", "deferred", "bounced", "expired", "removed", "held", "relayed", "queued", "aborted", "unknown"], 0
    )


def test_recipients_are_counted_by_what_became_of_them() -> None:
    metrics = Metrics()
    client = Client(metrics).ehlo()
    relayed_in_part(client)
    client = Client(metrics).ehlo().mail().rcpt("a@example.net").rcpt("b@example.net").data().header()
    assert client.transaction is not None
    client.transaction.refuse_content(NO_USER, (), 1)
    client.final(NO_USER, Outcome.REFUSED).mail().rcpt().rcpt().rset().quit()
    counted = recipients(metrics)
    assert {fate: count for fate, count in counted.items() if count} == {
        "relayed": 1, "refused": 3, "deferred": 1, "aborted": 2,
    }  # fmt: skip


# Queued mail -------------------------------------------------------------------------------------------------------

STORED = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}


def attempted(metrics: Metrics, kept: Kept, kind: MessageKind, fate: Fate | None) -> None:
    """An attempt at a queued mail to two recipients, of whom the second comes to `fate`."""
    observer = fan_out([Tracing(sinks=[kept]), metrics])
    record = TransactionRecord.resumed("01J9", STORED, Mail(""), kind=kind, attempt=2)
    record.accepted = [Recipient("a@example.net"), Recipient("b@example.org")]
    delivery = begin_delivery(record, "provider", 1, time)
    outcome = Outcome.RELAYED if fate is None else Outcome.PARTLY_RELAYED
    finish_delivery(Observer(), delivery, outcome=outcome, clock=time)
    record.end_in_spool([] if fate is None else [(record.accepted[1], fate, NO_USER)], time.monotonic_ns())
    observer.delivery_ended(delivery)


def test_an_attempt_from_the_spool_tells_the_fate_that_it_decided() -> None:
    metrics, kept = Metrics(), Kept()
    attempted(metrics, kept, MessageKind.MAIL, Fate.BOUNCED)
    span = kept.one("smtp.delivery")
    told = [event for event in span.events if event.name == "smtp.recipient"]
    assert [event.attributes["smtp.recipient.fate"] for event in told] == ["bounced"]
    assert told[0].time_ns + 1000 <= span.end_ns
    assert told[0].attributes["smtp.upstream.name"] == "provider"
    assert {fate: count for fate, count in recipients(metrics).items() if count} == {"relayed": 1, "bounced": 1}


def test_of_several_transactions_with_upstreams_each_tells_of_the_recipients_that_it_lost() -> None:
    """As where an upstream takes few recipients at once: one attempt at a queued mail, made of several."""
    full = Reply(552, replies.BAD_RECIPIENT.enhanced, ("full",), ErrorType.UPSTREAM_REFUSED)
    metrics, kept = Metrics(), Kept()
    observer = fan_out([Tracing(sinks=[kept]), metrics])
    record = TransactionRecord.resumed("01J9", STORED, Mail(""), attempt=1)
    names = ["gone", "good", "full", "lost", "later", "fine"]
    gone, _, of_content, lost, later, _ = record.accepted = [Recipient(f"{name}@{name}.example") for name in names]
    at_rcpt, at_end, cut_off, last = [begin_delivery(record, name) for name in ("first", "second", "third", "fourth")]
    at_rcpt.refuse(gone, NO_USER, time.monotonic_ns())
    finish_delivery(Observer(), at_rcpt, outcome=Outcome.PARTLY_RELAYED)
    finish_delivery(Observer(), at_end, full, Outcome.REFUSED)
    finish_delivery(Observer(), cut_off, None, Outcome.UNKNOWN, error_type=ErrorType.OUTCOME_UNKNOWN)
    last.refuse(later, replies.UPSTREAM_CREDENTIALS, time.monotonic_ns())
    finish_delivery(Observer(), last, outcome=Outcome.PARTLY_RELAYED)
    fates = [
        (gone, Fate.BOUNCED, NO_USER),
        (of_content, Fate.BOUNCED, full),
        (lost, Fate.DEFERRED, replies.OUTCOME_UNKNOWN),
        (later, Fate.DEFERRED, replies.UPSTREAM_CREDENTIALS),
    ]
    record.end_in_spool(fates, time.monotonic_ns())
    for delivery in record.deliveries:
        observer.delivery_ended(delivery)
    told = {
        span.attributes["smtp.upstream.name"]: [
            (event.attributes["smtp.rcpt.domain"], event.attributes.get("smtp.upstream.name"))
            for event in span.events
            if event.name == "smtp.recipient"
        ]
        for span in kept.named("smtp.delivery")
    }
    assert told == {
        "first": [("gone.example", "first")],
        "second": [("full.example", "second")],
        "third": [("lost.example", None)],  # that is ours to say
        "fourth": [("later.example", "fourth")],
    }
    assert recipients(metrics)["bounced"] == 2
    assert recipients(metrics)["refused"] == 0


def test_what_is_deferred_has_not_ended_and_is_not_counted() -> None:
    metrics, kept = Metrics(), Kept()
    attempted(metrics, kept, MessageKind.MAIL, Fate.DEFERRED)
    assert {fate: count for fate, count in recipients(metrics).items() if count} == {"relayed": 1}


def test_a_bounce_says_that_it_is_one_and_which_mail_it_tells_of() -> None:
    metrics, kept = Metrics(), Kept()
    attempted(metrics, kept, MessageKind.BOUNCE, None)
    span = kept.one("smtp.delivery")
    assert span.attributes["smtp.message.kind"] == "bounce"
    [link] = span.links
    assert (link.context.span_id, link.attributes) == (int("b" * 16, 16), {"smtp.link.type": "reported_mail"})
    assert not any(recipients(metrics).values())  # the mail's own recipients are what counts


@pytest.mark.parametrize("action", SpoolAction)
def test_what_befalls_a_queued_mail_without_an_attempt_is_a_span_of_its_trace(action: SpoolAction) -> None:
    metrics, kept, exported = Metrics(), Kept(), list[EncodedSpan]()
    record = TransactionRecord.resumed("01J9", STORED, Mail("a@example.com"), attempt=3)
    record.action = action
    record.operator = "ann"
    is_settled = action not in (SpoolAction.RELEASED, SpoolAction.GIVEN_UP, SpoolAction.SUPERSEDED)
    fates = [] if not is_settled else [(Recipient("b@example.org"), Fate(action), GREYLISTED)]
    record.end_in_spool(fates, record.begun_ns)
    fan_out([Tracing(exports=[each_to(exported)], sinks=[kept]), metrics]).spool_acted(record)
    span = kept.one("smtp.spool")
    assert span.attributes == {
        "smtp.spool.action": action.value,
        "smtp.spool.operator": "ann",
        "smtp.message.kind": "mail",
        "smtp.delivery.attempt": 3,
        "smtp.spool.id": "01J9",
    }
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == ("a" * 32, "b" * 16)
    assert [event.attributes["smtp.recipient.fate"] for event in span.events] == [one[1].value for one in fates]
    assert exported[0].to_records()[0].events == list(span.events)
    assert sum(recipients(metrics).values()) == len(fates)
