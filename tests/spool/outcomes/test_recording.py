"""Which ends are told to whom, before a scripted upstream: what lies in the store when a mail has ended."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from otel_smtp.smtp.envelope import Mail, Notify, Recipient
from otel_smtp.smtp.replies import EnhancedStatus, Reply
from otel_smtp.spool.dsn.notices import BouncePolicy, Notices
from otel_smtp.spool.messages import ContentLost, ContentRef, Kind, NewMessage, new_id
from otel_smtp.spool.outcomes.events import RecipientOutcome
from otel_smtp.spool.outcomes.receivers import Receivers, ReceiverSettings
from otel_smtp.spool.outcomes.recording import Outcomes
from otel_smtp.spool.runner import Runner
from otel_smtp.spool.schedule import Schedule
from tests.spool.memory_store import MemoryStore
from tests.spool.messages import CARRIER, TRACE_ID, message, queued
from tests.spool.queueing import eventually
from tests.spool.scripted_relay import BUSY, ScriptedRelay

AT_ONCE = Schedule((0.01,), warn_after_seconds=None)
HEADER = b"Subject: a test\r\nMessage-ID: <order-7@shop.example>\r\n"
BODY = b"\r\nHello.\r\n"
NO_USER = Reply(550, EnhancedStatus(5, 1, 1), ("No such user here",))


@dataclass
class Running:
    store: MemoryStore
    relay: ScriptedRelay
    runner: Runner
    receivers: Receivers
    woken: list[bool]

    async def put(self, *recipients: str, **how: Any) -> str:
        new = message(*recipients, header_octets=len(HEADER), **how)
        one = await queued(self.store, new, HEADER, BODY)
        self.runner.wake(["up"])
        return one

    async def ends(self) -> None:
        """Wait until no mail is left."""
        await eventually(lambda: all(entry.is_outcome for entry in self.store.memory.entries.values()))

    def events(self, receiver: str = "app") -> list[Any]:
        """What is told to a receiver, in the order of the recipients."""
        memory = self.store.memory
        found = [
            json.loads(memory.contents[entry.id])
            for entry in memory.entries.values()
            if [one.destination for one in entry.deliveries] == [f"notify {receiver}"]
        ]
        return sorted(found, key=lambda event: str(event["subject"]))

    def told(self, receiver: str = "app") -> list[tuple[str, str]]:
        return [(event["subject"], event["data"]["outcome"]) for event in self.events(receiver)]


def receiver(
    name: str = "app", outcomes: Sequence[RecipientOutcome] = tuple(RecipientOutcome), most: int = 100
) -> ReceiverSettings:
    return ReceiverSettings(name, "https://app.example/", b"", frozenset(outcomes), most_pending=most)


@asynccontextmanager
async def running(
    *receivers: ReceiverSettings,
    relay: ScriptedRelay | None = None,
    store: MemoryStore | None = None,
    bounce: BouncePolicy = "mail",
) -> AsyncIterator[Running]:
    relay, store = relay or ScriptedRelay(), store or MemoryStore()
    await store.open()
    known = Receivers()
    known.replace(receivers or (receiver(),))
    woken: list[bool] = []
    notices = Notices(store, relay, policy=bounce, hostname="gw.example")
    runner = Runner(store, relay, notices, AT_ONCE, relay.observer)
    runner.report_outcomes(
        Outcomes(store, known, hostname="gw.example", max_age_seconds=1000.0, wake=lambda: woken.append(True))
    )
    await runner.start()
    try:
        yield Running(store, relay, runner, known, woken)
    finally:
        await runner.stop(grace_seconds=1)
        await store.close()


async def test_a_delivered_mail_is_told_with_what_people_know_of_it() -> None:
    async with running() as up:
        one = await up.put("user@example.net")
        await up.ends()
        (event,) = up.events()
        assert event["type"] == "smtp.recipient.delivered"
        assert event["traceparent"] == CARRIER["traceparent"]
        assert event["source"] == "otel-smtp://gw.example"
        data = event["data"]
        assert (data["message_id"], data["queue_id"], data["trace_id"]) == ("<order-7@shop.example>", one, TRACE_ID)
        assert (data["sender"], data["attempts"], data["reply"]["code"]) == ("app@example.com", 1, 250)
        (entry,) = up.store.memory.entries.values()
        assert entry.id == event["id"]
        assert "." not in entry.id
        assert up.woken == [True]


async def test_each_recipient_is_told_as_it_ended() -> None:
    relay = ScriptedRelay(verdicts={"b@x.example": NO_USER})
    async with running(relay=relay) as up:
        await up.put("a@x.example", "b@x.example")
        await up.ends()
        assert up.told() == [("a@x.example", "delivered"), ("b@x.example", "bounced")]
        refused = up.events()[1]["data"]
        assert refused["reply"] == {"code": 550, "enhanced_code": "5.1.1", "text": "No such user here"}
        assert refused["reply_is_final"] is True
        # The bounce itself was delivered, and is told to nobody.
        assert await up.store.tally() == {
            "accepted": 2, "delivered": 1, "failed": 1, "notified": 1, "notified_delivered": 1, "outcomes": 2,
        }  # fmt: skip


@pytest.mark.parametrize("bounce", ["log", "off"])
async def test_without_a_bounce_it_is_refused(bounce: BouncePolicy) -> None:
    async with running(relay=ScriptedRelay(verdicts={"b@x.example": NO_USER}), bounce=bounce) as up:
        await up.put("b@x.example")
        await up.ends()
        assert up.told() == [("b@x.example", "refused")]


async def test_who_asked_for_no_bounce_and_who_has_no_sender_are_refused() -> None:
    relay = ScriptedRelay(verdicts={"b@x.example": NO_USER, "never@x.example": NO_USER})
    async with running(relay=relay) as up:
        recipients = [Recipient("b@x.example"), Recipient("never@x.example", Notify.NEVER)]
        mail = NewMessage(new_id(), Mail("app@example.com"), {"up": recipients}, len(HEADER), 1000.0, CARRIER)
        await queued(up.store, mail, HEADER, BODY)
        await up.put("b@x.example", sender="")
        await up.ends()
        assert sorted(up.told()) == [
            ("b@x.example", "bounced"),
            ("b@x.example", "refused"),
            ("never@x.example", "refused"),
        ]


async def test_what_waits_is_told_when_it_ends() -> None:
    relay = ScriptedRelay()
    relay.mail_refusals.extend([BUSY, BUSY])
    async with running(relay=relay) as up:
        await up.put("user@example.net")
        await up.ends()
        ((_, outcome),) = up.told()
        assert (outcome, up.events()[0]["data"]["attempts"]) == ("delivered", 3)


async def test_what_expires_is_told_with_what_the_upstream_said_last() -> None:
    relay = ScriptedRelay()
    relay.mail_refusals.append(BUSY)
    store = MemoryStore()
    async with running(relay=relay, store=store) as up:
        held = await up.put("user@example.net")
        entry = store.memory.entries[held]
        await eventually(lambda: entry.deliveries and entry.deliveries[0].recipients[0].last_reply)
        relay.mail_refusals.extend([BUSY] * 1000)
        assert await store.expire(held)
        up.runner.look_soon()
        await eventually(lambda: up.events())
        (event,) = up.events()
        assert event["type"] == "smtp.recipient.expired"
        assert (event["data"]["reply"]["text"], event["data"]["reply_is_final"]) == ("busy", False)


async def test_a_receiver_is_told_what_it_wants_only() -> None:
    bad_news = receiver("support", [RecipientOutcome.BOUNCED, RecipientOutcome.EXPIRED])
    async with running(receiver(), bad_news, relay=ScriptedRelay(verdicts={"b@x.example": NO_USER})) as up:
        await up.put("a@x.example", "b@x.example")
        await up.ends()
        assert up.told() == [("a@x.example", "delivered"), ("b@x.example", "bounced")]
        assert up.told("support") == [("b@x.example", "bounced")]


async def test_beyond_the_bound_mail_ends_as_ever_and_outcomes_are_dropped() -> None:
    async with running(receiver(most=2)) as up:
        for _ in range(5):
            await up.put("a@x.example")
        await up.ends()
        assert len(up.events()) == 2
        (one,) = up.receivers.by_destination.values()
        assert one.figures.dropped == 3
        assert (await up.store.tally())["delivered"] == 5


class _WithoutContents(MemoryStore):
    """Contents do not come with their leases."""

    can_read = True

    async def claim(self, wanted):  # type: ignore[no-untyped-def]
        claimed, due_in = await super().claim(wanted)
        return [(lease, None) for lease, _ in claimed], due_in

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        if not self.can_read and octets == len(HEADER) and self.reads:
            raise ContentLost("a content is gone")
        self.reads += 1
        return await super().read(content, start, octets)

    reads = 0


@pytest.mark.parametrize("can_read", [True, False])
async def test_a_header_that_is_not_at_hand_is_read_and_one_that_is_lost_is_done_without(can_read: bool) -> None:
    store = _WithoutContents()
    store.can_read = can_read
    async with running(store=store) as up:
        await up.put("user@example.net")
        await up.ends()
        (event,) = up.events()
        assert event["data"]["message_id"] == ("<order-7@shop.example>" if can_read else None)
        assert event["data"]["outcome"] == "delivered"


async def test_a_mail_ends_though_its_outcome_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> bytes:
        raise ValueError("a fault of ours")

    monkeypatch.setattr("otel_smtp.spool.outcomes.recording.event_body", fail)
    async with running() as up:
        await up.put("user@example.net")
        await up.ends()
        assert await up.store.tally() == {"accepted": 1, "delivered": 1}
    assert "outcome not created" in [record.message for record in caplog.records]


async def test_outcomes_are_no_business_of_the_runner() -> None:
    """It would relay them to an upstream, as mail without a sender."""
    async with running() as up:
        await up.put("user@example.net")
        await up.ends()
        await up.runner.look()
        await up.put("other@example.net")
        await up.ends()
        assert [recipients for _, recipients, _ in up.relay.taken] == [("user@example.net",), ("other@example.net",)]
        assert {entry.kind for entry in up.store.memory.entries.values()} == {Kind.OUTCOME}
