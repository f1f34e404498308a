"""The sender before real sockets, on a store in memory and its own clock."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from otel_smtp.spool.messages import OUTCOME_PREFIX, ContentRef, Kind, NewMessage, SpoolError, StorageAway
from otel_smtp.spool.outcomes import receivers as receivers_module
from otel_smtp.spool.outcomes import sending
from otel_smtp.spool.outcomes.receivers import OutcomeReceiver, Receivers, ReceiverSettings
from otel_smtp.spool.outcomes.sending import Sender
from otel_smtp.spool.schedule import Schedule
from tests.spool.memory_store import MemoryStore
from tests.spool.messages import CARRIER, message, queued
from tests.spool.queueing import eventually
from tests.spool.stores import Clock
from tests.support.receiver import KEY, receiving, status
from tests.support.receiver import Receiver as Application

AT_ONCE = Schedule((0.01,), warn_after_seconds=None)


@pytest.fixture(autouse=True)
def _pauses_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivers_module, "FIRST_REST_SECONDS", 0.001)
    monkeypatch.setattr(receivers_module, "LONGEST_REST_SECONDS", 0.01)
    monkeypatch.setattr(sending, "AGAIN_SECONDS", 0.01)


def outcome(receiver: str = "app", *, max_age_seconds: float = 1000.0) -> NewMessage:
    return message(
        sender="", destination=f"{OUTCOME_PREFIX}{receiver}", kind=Kind.OUTCOME, header_octets=0,
        max_age_seconds=max_age_seconds,
    )  # fmt: skip


@dataclass
class Running:
    store: MemoryStore
    receivers: Receivers
    sender: Sender

    async def put(self, body: bytes = b"{}", receiver: str = "app") -> str:
        one = await queued(self.store, outcome(receiver), body)
        self.sender.wake()
        return one

    @property
    def receiver(self) -> OutcomeReceiver:
        (receiver,) = self.receivers.by_destination.values()
        return receiver

    async def empties(self) -> None:
        await eventually(lambda: not self.store.memory.entries)


@asynccontextmanager
async def running(
    *settings: ReceiverSettings, store: MemoryStore | None = None, schedule: Schedule = AT_ONCE
) -> AsyncIterator[Running]:
    store = store or MemoryStore()
    await store.open()
    receivers = Receivers()
    receivers.replace(settings)
    sender = Sender(store, receivers, schedule)
    sender.start()
    try:
        yield Running(store, receivers, sender)
    finally:
        await sender.stop()
        await store.close()


def app(application: Application, **changes: object) -> ReceiverSettings:
    return replace(ReceiverSettings("app", application.url, KEY), **changes)  # type: ignore[arg-type]


async def test_what_waits_is_sent_once_and_ends() -> None:
    async with receiving() as application, running(app(application)) as up:
        ids = [await up.put(b'{"n":%d}' % number) for number in range(9)]
        await up.empties()
        assert sorted(request.headers["webhook-id"] for request in application.requests) == sorted(ids)
        assert {request.body for request in application.requests} == {b'{"n":%d}' % number for number in range(9)}
        assert all(request.is_signed() for request in application.requests)
        assert application.requests[0].headers["traceparent"] == CARRIER["traceparent"]
        assert up.receiver.figures.by_result() == {"sent": 9, "failed": 0, "expired": 0, "dropped": 0}
        assert await up.store.tally() == {"outcomes": 9, "outcomes_delivered": 9}


async def test_what_is_not_taken_is_sent_again_as_it_was_with_a_new_signature(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with receiving() as application, running(app(application)) as up:
        application.answers.extend([status(500), status(503), b"no HTTP\r\n\r\n"])
        one = await up.put(b'{"the":"same"}')
        await up.empties()
        assert [request.body for request in application.requests] == [b'{"the":"same"}'] * 4
        assert {request.headers["webhook-id"] for request in application.requests} == {one}
        assert all(request.is_signed() for request in application.requests)
        assert (up.receiver.figures.sent, up.receiver.figures.failed) == (1, 3)
    words = [record.message for record in caplog.records]
    assert words.count("receiver of outcomes failing") == words.count("receiver of outcomes recovered") == 1
    failing = next(record for record in caplog.records if record.message == "receiver of outcomes failing")
    assert failing.fault == "HTTP status 500"  # type: ignore[attr-defined]


async def test_what_the_receiver_said_is_shown_to_operators() -> None:
    async with receiving() as application, running(app(application), schedule=Schedule((3600.0,))) as up:
        application.default = status(503)
        one = await up.put()
        await eventually(lambda: up.receiver.figures.failed)
        await eventually(lambda: not up.receiver.under_way)
        ((_, _, last),) = (await up.store.show(one)).recipients
        assert last == "451 HTTP status 503"


async def test_a_receiver_that_fails_is_asked_with_one_at_a_time() -> None:
    async with receiving() as application, running(app(application, connections=4)) as up:
        application.default = None
        for _ in range(8):
            await up.put()
        await application.has(4)
        assert application.most_at_once == 4
        application.default, application.most_at_once = status(500), 0
        application.let_go.set()
        await application.has(12)
        assert application.most_at_once == 1
        application.default = status(204)
        await up.empties()


async def test_pauses_grow_to_a_minute_and_a_receiver_may_ask_for_longer_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    receiver = OutcomeReceiver(ReceiverSettings("app", "https://app.example/", KEY, connections=3))
    assert receiver.room(now) == 3
    rests = []
    for _ in range(9):
        receiver.failed("why", 0.0)
        rests.append(receiver.rests_for(now))
        assert receiver.room(now) == 0
        now += rests[-1]
        assert receiver.room(now) == 1
    assert rests == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    receiver.failed("why", 300.0)
    assert receiver.rests_for(now) == 300
    receiver.succeeded()
    assert receiver.room(now) == 3


async def test_a_hanging_receiver_does_not_hold_up_another() -> None:
    async with receiving() as hanging, receiving() as well:
        hanging.default = None
        other = ReceiverSettings("other", well.url, KEY)
        async with running(app(hanging, connections=1), other) as up:
            for _ in range(5):
                await up.put()
                await up.put(receiver="other")
            await well.has(5)
            assert len(await hanging.has(1)) == 1


async def test_what_is_under_way_at_the_end_waits_for_the_next_process() -> None:
    async with receiving() as application:
        application.default = None
        async with running(app(application)) as up:
            one = await up.put()
            await application.has(1)
        assert list(up.store.memory.entries) == [one]
        application.default = status(204)
        async with running(app(application), store=MemoryStore(up.store.memory)) as again:
            await again.empties()
        assert [request.headers["webhook-id"] for request in application.requests] == [one, one]


async def test_what_is_too_old_is_given_up_though_its_receiver_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    await store.open()
    for _ in range(150):
        await queued(store, outcome("gone", max_age_seconds=10.0), b"{}")
    mail = await queued(store, message(max_age_seconds=10.0))
    clock.ahead = 11
    async with receiving() as application, running(app(application), store=store) as up:
        await eventually(lambda: list(up.store.memory.entries) == [mail])  # which is not the sender's business
        assert (await up.store.tally())["outcomes_expired"] == 150
    assert [record.outcomes for record in caplog.records if record.message == "outcomes expired"] == [150]  # type: ignore[attr-defined]


async def test_beyond_the_bound_outcomes_are_dropped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    receiver = OutcomeReceiver(ReceiverSettings("app", "https://app.example/", KEY, most_pending=3))
    taken = 0
    for _ in range(5):
        if receiver.has_room():
            receiver.note_stored()
            taken += 1
    assert (taken, receiver.figures.dropped) == (3, 2)
    assert [record.message for record in caplog.records] == ["outcomes dropped: too many wait for their receiver"]


class _Damaged(MemoryStore):
    """Contents do not come with their leases."""

    is_whole = False
    is_away = False

    async def claim(self, wanted):  # type: ignore[no-untyped-def]
        claimed, due_in = await super().claim(wanted)
        return [(lease, None) for lease, _ in claimed], due_in

    async def is_intact(self, content: ContentRef) -> bool:
        if self.is_away:
            self.is_away = False
            raise StorageAway("for now")
        return self.is_whole


async def test_an_outcome_that_is_damaged_is_not_sent(caplog: pytest.LogCaptureFixture) -> None:
    async with receiving() as application, running(app(application), store=_Damaged()) as up:
        await up.put()
        await up.empties()
        assert application.requests == []
        assert (await up.store.tally())["outcomes_failed"] == 1
    assert "outcome lost: content damaged" in [record.message for record in caplog.records]


async def test_an_outcome_that_cannot_be_read_for_now_is_sent_later() -> None:
    store = _Damaged()
    store.is_whole = store.is_away = True
    async with receiving() as application, running(app(application), store=store) as up:
        await up.put(b'{"a":1}')
        await up.empties()
        assert [request.body for request in application.requests] == [b'{"a":1}']


async def test_a_store_that_is_away_for_a_while_is_worked_on_again() -> None:
    failures = iter(range(5))

    class Away(MemoryStore):
        async def claim(self, wanted):  # type: ignore[no-untyped-def]
            if next(failures, None) is not None:
                raise SpoolError("the index is busy")
            return await super().claim(wanted)

    async with receiving() as application, running(app(application), store=Away()) as up:
        await up.put()
        await up.empties()


async def test_receivers_may_change_while_it_runs() -> None:
    key = b"another key of thirty-two octets"
    async with receiving() as application, receiving() as other, running(app(application)) as up:
        await up.put()
        await up.empties()
        up.receivers.replace([replace(app(other), key=key)])
        await up.put()
        await up.empties()
        assert (len(application.requests), len(other.requests)) == (1, 1)
        assert other.requests[0].is_signed(key)
        assert up.receiver.figures.sent == 2
