"""Sampling by outcome: what is exported although the sampler dropped it."""

import time

import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from otel_smtp.observing import Fate, Observer, Outcome, SpoolAction, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.telemetry.keeping import Keep, Keeping
from otel_smtp.telemetry.records import SpanRecord
from otel_smtp.telemetry.shapes import EncodedSpan
from otel_smtp.telemetry.tracing import Tracing
from tests.telemetry.driving import Client, FakeClock, begin_delivery, each_to, finish_delivery

BOTH = [Keep.ERRORS, Keep.SLOW]
GREYLISTED = Reply(450, replies.UPSTREAM_CREDENTIALS.enhanced, ("Greylisted",), ErrorType.UPSTREAM_REFUSED)


class Exported:
    """What a client's connection leaves behind, with a sampler that drops everything."""

    def __init__(self, keeping: Keeping | None) -> None:
        self._octets: list[EncodedSpan] = []
        self.clock = FakeClock()
        self.observer = Tracing(exports=[each_to(self._octets)], sampler=ALWAYS_OFF, keeping=keeping)

    def client(self) -> Client:
        return Client(self.observer, clock=self.clock).ehlo()

    @property
    def spans(self) -> list[SpanRecord]:
        return [span.to_records()[0] for span in self._octets]

    @property
    def names(self) -> list[str]:
        return [span.name.removeprefix("smtp.") for span in self.spans]


def test_a_mail_that_went_well_and_quickly_is_left_to_the_sampler() -> None:
    exported = Exported(Keeping(BOTH))
    exported.client().message().refused("other", replies.UNKNOWN_COMMAND).quit()  # a scanner keeps nothing
    assert exported.names == []


def test_a_refused_recipient_keeps_the_mail_its_attempts_and_its_connection_and_no_other_mail() -> None:
    exported = Exported(Keeping(BOTH))
    client = exported.client().mail().rcpt().rcpt("gone@example.org", replies.RELAY_DENIED).data().header()
    client.deliver()
    carried = client.final(outcome=Outcome.PARTLY_RELAYED).mail().rcpt().data().header().deliver()
    client.final().quit()
    assert exported.names == ["delivery", "transaction", "connection"]
    assert {span.attributes["smtp.sampling.reason"] for span in exported.spans} == {"errors"}
    assert len(exported.spans[1].events) == 1
    assert len(exported.spans[2].events) > 3
    assert carried["traceparent"].endswith("-00") or carried["traceparent"][-2:] == "02"  # downstream: the sampler's


@pytest.mark.parametrize(
    ("outcome", "reply", "is_kept"),
    [
        (Outcome.RELAYED, None, False),
        (Outcome.DEFERRED, replies.UPSTREAM_UNAVAILABLE, True),
        (Outcome.UNKNOWN, None, True),
    ],
)
def test_a_mail_that_was_queued_since_its_upstream_failed_is_kept(
    outcome: Outcome, reply: Reply | None, is_kept: bool
) -> None:
    exported = Exported(Keeping(BOTH))
    client = exported.client().mail().rcpt().data().header()
    assert client.transaction is not None
    delivery = begin_delivery(client.transaction, "provider", 1, client.clock)
    finish_delivery(client.observer, delivery, reply, outcome, clock=client.clock)
    client.final(outcome=Outcome.QUEUED).quit()
    assert exported.names == (["delivery", "transaction", "connection"] if is_kept else [])


def test_a_recipient_that_was_queued_is_a_reason_to_keep_the_mail() -> None:
    exported = Exported(Keeping(BOTH))
    client = exported.client().mail().rcpt().rcpt("later@example.org").data().header()
    assert client.transaction is not None
    delivery = begin_delivery(client.transaction, "provider", 1, client.clock)
    delivery.refuse(client.transaction.accepted[1], GREYLISTED, client.clock.monotonic_ns())
    finish_delivery(client.observer, delivery, outcome=Outcome.PARTLY_RELAYED, clock=client.clock)
    client.final(outcome=Outcome.QUEUED).quit()
    assert exported.names == ["delivery", "transaction", "connection"]


@pytest.mark.parametrize("reason", BOTH)
def test_only_what_is_asked_for_is_kept(reason: Keep) -> None:
    exported = Exported(Keeping([reason], slow_seconds=2))
    client = exported.client().mail().rcpt()
    exported.clock.advance(3)
    client.data().header().final().mail().rcpt().data().header()
    client.final(replies.UPSTREAM_UNAVAILABLE, Outcome.DEFERRED).quit()
    kept = [span for span in exported.spans if span.name == "smtp.transaction"]
    assert [span.attributes["smtp.transaction.number"] for span in kept] == [1 if reason is Keep.SLOW else 2]
    assert [span.attributes["smtp.sampling.reason"] for span in kept] == [reason.value]


def test_beyond_the_rate_they_are_counted() -> None:
    now = [0.0]
    keeping = Keeping(BOTH, per_second=2, monotonic=lambda: now[0])
    assert [keeping.failure() for _ in range(3)] == [Keep.ERRORS, Keep.ERRORS, None]
    now[0] = 0.5
    assert [keeping.failure() for _ in range(2)] == [Keep.ERRORS, None]
    assert keeping.dropped() == [("traces", "keep_rate", 2)]


def test_what_happens_in_the_spool_is_kept_as_a_root_with_a_link() -> None:
    exported = Exported(Keeping(BOTH))
    stored = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-00"}
    for outcome in (Outcome.RELAYED, Outcome.REFUSED):
        record = TransactionRecord.resumed("01J9", stored, Mail(""))
        delivery = begin_delivery(record, "provider", 1, time)
        finish_delivery(Observer(), delivery, replies.RELAY_DENIED if outcome is Outcome.REFUSED else None, outcome)
        exported.observer.deliveries_settled([delivery])
    removed = TransactionRecord.resumed("01J9", stored, Mail(""))
    removed.action = SpoolAction.REMOVED
    removed.end_in_spool([(Recipient("a@example.net"), Fate.REMOVED, None)], removed.begun_ns)
    exported.observer.spool_acted(removed)
    assert exported.names == ["delivery", "spool"]
    for span in exported.spans:
        assert span.parent is None
        assert f"{span.context.trace_id:032x}" == "a" * 32
        assert [f"{link.context.span_id:016x}" for link in span.links] == ["b" * 16]
