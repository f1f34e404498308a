"""The runner before a scripted upstream, on a store in memory: what it makes of each verdict and of each fault."""

import asyncio
import gc
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from otel_smtp.observing import Fate, SpoolAction, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.spool import attempts as attempts_module
from otel_smtp.spool import runner as runner_module
from otel_smtp.spool.attempts import Attempt, Recording
from otel_smtp.spool.dsn.notices import Notices
from otel_smtp.spool.embedded.deliveries import DeliveryEntry
from otel_smtp.spool.messages import (
    ContentRef,
    DeliveryState,
    Kind,
    Lease,
    SpoolError,
    StaleLease,
    StorageAway,
    StorageBroken,
    StorageFull,
    Verdict,
)
from otel_smtp.spool.runner import Runner
from otel_smtp.spool.schedule import Schedule
from tests.spool.memory_store import MemoryStore
from tests.spool.messages import BODY, HEADER, message, queued, written
from tests.spool.queueing import ResumedDeliveries, eventually
from tests.spool.scripted_relay import BUSY, GONE, ScriptedRelay, ScriptedTransaction

AT_ONCE = Schedule((0.01,), warn_after_seconds=None)


@dataclass
class Running:
    store: MemoryStore
    relay: ScriptedRelay
    runner: Runner

    async def put(self, *recipients: str) -> str:
        one = await queued(self.store, message(*recipients))
        self.runner.wake(["up"])
        return one

    async def empties(self) -> None:
        await eventually(lambda: not self.store.memory.entries)


@asynccontextmanager
async def running(relay: ScriptedRelay | None = None, store: MemoryStore | None = None) -> AsyncIterator[Running]:
    relay, store = relay or ScriptedRelay(), store or MemoryStore()
    await store.open()
    runner = Runner(store, relay, Notices(store, relay, policy="mail", hostname="gw.example"), AT_ONCE, relay.observer)
    await runner.start()
    try:
        yield Running(store, relay, runner)
    finally:
        await runner.stop(grace_seconds=1)
        await store.close()


async def test_what_is_due_is_delivered_as_it_came() -> None:
    async with running() as up:
        await up.put("a@x.example", "b@x.example")
        await up.empties()
        ((_, recipients, content),) = up.relay.taken
        assert (recipients, content) == (("a@x.example", "b@x.example"), HEADER + BODY)
        assert await up.store.tally() == {"accepted": 2, "delivered": 2}


async def test_an_idle_runner_counts_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "COUNT_SECONDS", 0.01)
    async with running() as up:
        for _ in range(3):
            await up.put()
            await up.runner.look()  # while it is under way
            assert up.runner.counts.total == 1
            await up.empties()
            await eventually(lambda: up.runner.counts.total == 0, timeout_seconds=10)


async def test_what_is_deferred_is_attempted_again() -> None:
    relay = ScriptedRelay()
    relay.mail_refusals.extend([BUSY, BUSY])
    async with running(relay) as up:
        await up.put()
        await up.empties()
        assert [transaction._record.attempt for transaction in relay.transactions] == [3]


async def test_what_is_refused_goes_back_to_its_sender() -> None:
    relay = ScriptedRelay(verdicts={"b@x.example": GONE})
    async with running(relay) as up:
        await up.put("a@x.example", "b@x.example")
        await up.empties()
        assert [recipients for _, recipients, _ in relay.taken] == [("a@x.example",), ("app@example.com",)]
        assert b"no such user" in relay.taken[1][2]
        assert await up.store.tally() == {
            "accepted": 2, "delivered": 1, "failed": 1, "notified": 1, "notified_delivered": 1,
        }  # fmt: skip


async def test_an_attempt_is_freed_when_it_is_over() -> None:
    """Where a lease can be lost too, no cycle is left of it: the garbage collection cost a tenth of each mail."""
    store = MemoryStore()
    store.look_again_seconds = 60.0
    async with running(store=store) as up:
        gc.collect()
        gc.disable()
        try:
            await up.put()
            await up.empties()
            await eventually(lambda: not up.runner._attempts)
            up.relay.transactions.clear()
            assert not [one for one in gc.get_objects() if type(one) is Attempt]
        finally:
            gc.enable()


class _Unreadable(MemoryStore):
    """Contents do not come with their leases, and cannot be read for now."""

    is_readable = False

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        claimed, due_in = await super().claim(wanted)
        return [(lease, None) for lease, _ in claimed], due_in

    async def is_intact(self, content: ContentRef) -> bool:
        return self.is_readable


async def test_a_content_that_cannot_be_read_is_set_aside_and_not_retried(caplog: pytest.LogCaptureFixture) -> None:
    store = _Unreadable()
    observer = ResumedDeliveries()
    async with running(ScriptedRelay(observer=observer), store) as up:
        one = await up.put()
        await eventually(lambda: store.memory.entries[one].deliveries[0].state is DeliveryState.CORRUPT)
        assert (up.relay.taken, len(up.relay.transactions)) == ([], 1)
        assert "queued content damaged; message set aside" in caplog.text
        (delivery,) = observer.ended
        assert delivery.transaction.failure == "spool: the content is damaged"
        assert [recipient.fate for recipient in delivery.refused] == [Fate.HELD]
        assert up.relay.transactions[0].calls == ["recipients", "content", "abort"]
        store.is_readable = True
        assert await store.release(one)
        up.runner.wake()
        await up.empties()
        assert up.relay.taken[0][2] == HEADER + BODY


class _FailsToRead(MemoryStore):
    """Contents do not come with their leases, and cannot be read the first time."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.errors = [error]

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        claimed, due_in = await super().claim(wanted)
        return [(lease, None) for lease, _ in claimed], due_in

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        if start and self.errors:
            raise self.errors.pop()
        return await super().read(content, start, octets)


@pytest.mark.parametrize(
    ("error", "reply", "line"),
    [
        (SpoolError("an I/O error"), replies.STORAGE_FAILED, "queued message unreadable"),
        (ZeroDivisionError("a bug"), replies.INTERNAL, "delivery attempt failed: internal error"),
    ],
)
async def test_where_a_content_cannot_be_read_to_its_end_nothing_is_ended_and_all_is_tried_again(
    error: Exception, reply: Reply, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, observer = _FailsToRead(error), ResumedDeliveries()
    relay = ScriptedRelay(observer=observer)
    async with running(relay, store) as up:
        one = await up.put("a@x.example", "b@x.example")
        await up.empties()
    (logged,) = [record for record in caplog.records if record.getMessage() == line]
    assert logged.__dict__["spool_id"] == one
    first, second = relay.transactions
    assert first.calls == ["recipients", "content", "abort"]
    assert [(one.fate, one.reply) for one in observer.ended[0].refused] == [(Fate.DEFERRED, reply)] * 2
    assert [content for _, _, content in relay.taken] == [HEADER + BODY]
    assert second._record.attempt == 2
    assert await store.tally() == {"accepted": 2, "delivered": 2}


async def test_of_a_content_that_came_in_part_all_is_read_before_any_is_sent() -> None:
    class Partial(MemoryStore):
        async def claim(
            self, wanted: Mapping[str, int]
        ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
            claimed, due_in = await super().claim(wanted)
            return [(lease, None if content is None else content[:1]) for lease, content in claimed], due_in

    async with running(store=Partial()) as up:
        await up.put()
        await up.empties()
        assert [content for _, _, content in up.relay.taken] == [HEADER + BODY]


async def test_a_store_that_is_away_for_a_while_is_worked_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "AGAIN_SECONDS", 0.01)
    failures = iter(range(5))

    class Away(MemoryStore):
        async def claim(
            self, wanted: Mapping[str, int]
        ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
            if next(failures, None) is not None:
                raise SpoolError("the index is busy")
            return await super().claim(wanted)

    async with running(store=Away()) as up:
        await up.put()
        await up.empties()
        assert next(failures, None) is None


class _NotRecorded(MemoryStore):
    """The first results come to an error."""

    def __init__(self, *errors: SpoolError) -> None:
        super().__init__()
        self.errors = deque(errors)
        self.results = 0

    def finish(self, lease: Lease, verdicts: Sequence[Verdict], **more: Any) -> asyncio.Future[None]:
        self.results += 1
        if self.errors:
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            answer.set_exception(self.errors.popleft())
            return answer
        return super().finish(lease, verdicts, **more)


class _Told(ResumedDeliveries):
    def __init__(self) -> None:
        super().__init__()
        self.acts: list[TransactionRecord] = []

    def spool_acted(self, transaction: TransactionRecord) -> None:
        self.acts.append(transaction)


@pytest.mark.parametrize("recipients", [("a@x.example",), ("a@x.example", "b@x.example")])
async def test_an_attempt_whose_result_is_recorded_late_is_told_once(
    monkeypatch: pytest.MonkeyPatch, recipients: tuple[str, ...]
) -> None:
    monkeypatch.setattr(attempts_module, "RECORD_AGAIN_SECONDS", 0.01)
    observer = _Told()
    store = _NotRecorded(StorageAway("gone"), StorageFull("full"))
    async with running(ScriptedRelay(observer=observer), store) as up:
        await up.put(*recipients)
        await up.empties()
        assert (len(observer.ended), observer.acts, store.results) == (1, [], 3)
        assert await store.tally() == {"accepted": len(recipients), "delivered": len(recipients)}


@pytest.mark.parametrize("recipients", [("a@x.example",), ("a@x.example", "b@x.example")])
async def test_a_result_that_comes_too_late_stands_in_the_trace(
    monkeypatch: pytest.MonkeyPatch, recipients: tuple[str, ...]
) -> None:
    monkeypatch.setattr(attempts_module, "RECORD_AGAIN_SECONDS", 0.0)
    observer = _Told()
    store = _NotRecorded(StaleLease("not ours any more"))
    async with running(ScriptedRelay(observer=observer), store) as up:
        one = await up.put(*recipients)
        await eventually(lambda: observer.acts)
    ((told,), (delivery,)) = observer.acts, observer.ended
    assert (told.action, told.spool_id, told.attempt) == (SpoolAction.SUPERSEDED, one, 1)
    assert (told.carrier, store.results) == (delivery.transaction.carrier, 1)
    assert told.error_type is ErrorType.TIMEOUT
    assert told.ended_ns


async def test_the_result_of_an_outcome_that_comes_too_late_is_no_mails() -> None:
    observer, store = _Told(), MemoryStore()
    await store.open()
    await queued(store, message(kind=Kind.OUTCOME))
    ((lease, _),), _ = await store.claim({"up": 1})
    late = _NotRecorded(StaleLease("not ours any more"))
    await Recording(late, observer).record(lease, lambda: late.finish(lease, ()))
    assert (observer.acts, late.results) == ([], 1)


async def test_a_result_is_not_offered_again_to_a_store_that_is_broken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It takes nothing until it is opened again, and the attempt will be made again then."""
    monkeypatch.setattr(attempts_module, "RECORD_AGAIN_SECONDS", 0.0)
    observer = _Told()
    store = _NotRecorded(StorageBroken("the disk is gone"))
    async with running(ScriptedRelay(observer=observer), store) as up:
        one = await up.put()
        await eventually(lambda: observer.ended and store.results)
    assert (observer.acts, store.results) == ([], 1)
    (line,) = [line for line in caplog.records if line.levelname == "CRITICAL"]
    assert (line.getMessage(), line.__dict__["spool_id"]) == ("delivery result not recorded", one)


async def test_who_has_the_mail_does_not_get_it_again_where_a_bounce_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures = iter(range(2))
    of = Notices.of

    async def fail(self: Notices, *about: Any, **more: Any) -> Any:
        if next(failures, None) is not None:
            raise ZeroDivisionError
        return await of(self, *about, **more)

    monkeypatch.setattr(Notices, "of", fail)
    async with running(ScriptedRelay(verdicts={"b@x.example": GONE})) as up:
        await up.put("a@x.example", "b@x.example")
        await up.empties()
        assert [recipients for _, recipients, _ in up.relay.taken] == [("a@x.example",), ("app@example.com",)]
        assert (await up.store.tally())["delivered"] == 1


async def given(up: Running, *senders: str) -> None:
    """Messages that are leased with the record that makes them durable, as clients' are."""
    for sender in senders:
        assert up.runner.reserve(["up"])
        draft = await written(up.store.draft())
        leases = await up.store.submit(message(sender=sender), draft, lease=True)
        up.runner.begin(["up"], leases, draft.in_memory)


def senders(relay: ScriptedRelay) -> list[str]:
    return [transaction._mail.reverse_path for transaction in relay.transactions]


async def test_what_an_upstream_does_not_bear_yet_waits_in_line() -> None:
    relay = ScriptedRelay(window=2, is_held=True)
    async with running(relay) as up:
        await given(up, *[f"{number}@x.example" for number in range(2 * runner_module.NEW_WINDOWS)])
        assert not up.runner.reserve(["up"])
        await eventually(lambda: [one.calls[-1:] for one in relay.transactions] == [["finish"], ["finish"]])
        relay.transactions[0].let_go()
        await eventually(lambda: len(relay.transactions) == 3)
        relay.let_go()
        await up.empties()
        assert senders(relay) == [f"{number}@x.example" for number in range(2 * runner_module.NEW_WINDOWS)]
        assert {transaction._record.attempt for transaction in relay.transactions} == {1}
        assert up.runner.reserve(["up"])
        up.runner.begin(["up"], (), None)


async def test_what_was_claimed_has_its_turns_while_new_messages_wait_in_line() -> None:
    relay = ScriptedRelay(window=2, is_held=True)
    async with running(relay) as up:
        await given(up, "first", "second", "third", "fourth", "fifth")
        await queued(up.store, message(sender="waiting"))
        up.runner.wake(["up"])
        await eventually(lambda: not waiting(up.store))
        relay.let_go()
        await up.empties()
        assert senders(relay)[:4] == ["first", "second", "waiting", "third"]


class _Slow(MemoryStore):
    """Answers when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.is_asked = asyncio.Event()
        self.may_answer = asyncio.Event()

    async def _wait(self) -> None:
        self.is_asked.set()
        await self.may_answer.wait()

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        claimed = await super().claim(wanted)
        if claimed[0]:
            await self._wait()
        return claimed

    async def end_overdue(self, most: int, *, outcomes: bool = False) -> Sequence[Lease]:
        leases = await super().end_overdue(most, outcomes=outcomes)
        if leases:
            await self._wait()
        return leases


@pytest.mark.parametrize("is_too_old", [False, True], ids=["to be attempted", "to be ended"])
async def test_what_is_leased_while_the_runner_stops_goes_back_unmarked(is_too_old: bool) -> None:
    """Nothing was sent of it: the next attempt need not warn of a duplicate."""
    store = _Slow()
    async with running(store=store) as up:
        one = await queued(store, message(max_age_seconds=0.0 if is_too_old else 100.0))
        up.runner.wake(["up"])
        up.runner.look_soon()
        await store.is_asked.wait()
        stopping = asyncio.create_task(up.runner.stop(grace_seconds=60))
        await asyncio.sleep(0)
        store.may_answer.set()
        await stopping
        assert list(store.memory.entries) == [one]
        (delivery,) = store.memory.entries[one].deliveries
        assert (delivery.state, delivery.attempts) == (DeliveryState.READY, 0)
        assert not delivery.is_possible_duplicate
        assert up.relay.transactions == []


async def test_what_becomes_durable_when_the_runner_has_stopped_goes_back_unmarked() -> None:
    async with running() as up:
        assert up.runner.reserve(["up"])
        leases = await up.store.submit(message(), await written(up.store.draft()), lease=True)
        await up.runner.stop(grace_seconds=0)
        up.runner.begin(["up"], leases, (HEADER, BODY))
        await eventually(lambda: not up.runner._attempts)
        assert {(one.attempts, one.is_possible_duplicate) for one in waiting(up.store)} == {(0, False)}
        assert up.relay.transactions == []


async def test_what_becomes_durable_while_the_runner_stops_is_waited_for_and_delivered() -> None:
    async with running() as up:
        assert up.runner.reserve(["up", "elsewhere"])
        stopping = asyncio.create_task(up.runner.stop(grace_seconds=60))
        for _ in range(20):  # as far as it comes
            await asyncio.sleep(0)
        draft = await written(up.store.draft())
        leases = await up.store.submit(message(), draft, lease=True)
        up.runner.begin(["up", "elsewhere"], leases, draft.in_memory)
        await stopping
        assert len(up.relay.taken) == 1
        assert await up.store.tally() == {"accepted": 1, "delivered": 1}


async def test_what_was_reserved_and_came_to_nothing_holds_up_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "CONNECTION_GRACE_SECONDS", 3600.0)
    async with running() as up:
        assert up.runner.reserve(["up"])
        async with asyncio.timeout(30):
            stopping = asyncio.create_task(up.runner.stop(grace_seconds=3600))
            for _ in range(20):
                await asyncio.sleep(0)
            up.runner.begin(["up"], (), None)
            await stopping


class _Ending(MemoryStore):
    """The first message that is shown for a warning ends before its content is read."""

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        shown = await super().unwarned(age, most)
        if len(shown) > 1:
            await self.delete(shown[0].message_id)
        return shown

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        await self.show(str(content.key))  # the others look for the message first
        return await super().read(content, start, octets)


async def test_a_message_that_ends_before_its_warning_is_written_holds_up_no_other_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    relay, store = ScriptedRelay(), _Ending()
    relay.mail_refusals.extend([BUSY, BUSY])
    await store.open()
    schedule = Schedule((3600.0,), warn_after_seconds=0.001)
    runner = Runner(store, relay, Notices(store, relay, policy="mail", hostname="gw.example"), schedule, relay.observer)
    ids = [await queued(store) for _ in range(2)]
    await runner.start()
    await eventually(lambda: sum(one.attempts for one in waiting(store)) == 2)
    while not relay.taken:
        runner.look_soon()
        await asyncio.sleep(0)
    await runner.stop(grace_seconds=1)
    assert "spool unavailable" not in caplog.text
    assert ids[0] not in store.memory.entries
    assert store.memory.entries[ids[1]].is_warned
    await store.close()


class _AwayOnce(MemoryStore):
    """Its contents cannot be read the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.is_away = True

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        if self.is_away:
            self.is_away = False
            raise StorageAway("away")
        return await super().read(content, start, octets)


async def test_what_is_too_old_while_its_content_cannot_be_read_is_ended_later() -> None:
    """It is leased to be ended, and so are those after it: nobody else would ever let go of them."""
    relay, store, told = ScriptedRelay(), _AwayOnce(), _Told()
    await store.open()
    schedule = Schedule((3600.0,), warn_after_seconds=None)
    runner = Runner(store, relay, Notices(store, relay, policy="mail", hostname="gw.example"), schedule, told)
    for _ in range(3):
        await queued(store, message(max_age_seconds=0.0))
    await runner.start()

    async def has_ended() -> bool:
        runner.look_soon()
        return (await store.tally()).get("expired") == 3

    async with asyncio.timeout(30):
        while not await has_ended():  # noqa: ASYNC110 - the store has no event for it
            await asyncio.sleep(0)
    assert not store.is_away
    assert [one.action for one in told.acts] == [SpoolAction.EXPIRED] * 3, "each is reported once"
    await runner.stop(grace_seconds=1)
    await store.close()


class UnreadStore(MemoryStore):
    """Has every content read by who attempts it, as large ones are."""

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        found, due_in = await super().claim(wanted)
        return [(lease, None) for lease, _ in found], due_in


@pytest.mark.parametrize("is_cut_in", ["recipients", "content", "finish"])
async def test_what_a_stop_cuts_off_is_marked_if_its_content_was_on_its_way(is_cut_in: str) -> None:
    relay = ScriptedRelay(is_silent=is_cut_in == "recipients", room=0 if is_cut_in == "content" else None, is_held=True)
    async with running(relay, UnreadStore() if is_cut_in == "content" else MemoryStore()) as up:
        await up.put()
        await eventually(lambda: relay.transactions and relay.transactions[0].calls[-1:] == [is_cut_in])
        await up.runner.stop(grace_seconds=0)
        (delivery,) = waiting(up.store)
        assert delivery.is_possible_duplicate is (is_cut_in != "recipients")


@pytest.mark.parametrize("grace_seconds", [0, 60])
async def test_what_waits_for_an_upstream_at_the_end_is_not_marked(grace_seconds: float) -> None:
    """Nor is its attempt counted: nobody was asked."""
    relay = ScriptedRelay(is_away=True, is_held=True)
    async with running(relay, MemoryStore()) as up:
        await up.put()
        await eventually(lambda: relay.transactions and relay.transactions[0].calls[-1:] == ["finish"])
        await up.runner.stop(grace_seconds=grace_seconds)
        assert {(one.attempts, one.is_possible_duplicate) for one in waiting(up.store)} == {(0, False)}


@pytest.mark.parametrize("stops", [False, True])
async def test_a_line_before_an_upstream_that_takes_no_more_goes_back_into_the_store(stops: bool) -> None:
    relay, store = ScriptedRelay(window=2, is_held=True), MemoryStore()
    async with running(relay, store) as up:
        await given(up, "first", "second", "third", "fourth")
        await eventually(lambda: len(relay.transactions) == 2)
        relay.window = 0
        if stops:
            stopping = asyncio.create_task(up.runner.stop(grace_seconds=60))
            await eventually(lambda: len(waiting(store)) == 2)
        relay.let_go()
        await eventually(lambda: len(store.memory.entries) == len(waiting(store)) == 2)
        assert senders(relay) == ["first", "second"]
        assert {(one.attempts, one.is_possible_duplicate) for one in waiting(store)} == {(0, False)}
        if stops:
            await stopping
            return
        relay.window = 2
        await up.empties()
        assert sorted(senders(relay)) == ["first", "fourth", "second", "third"]


async def test_nobody_waits_in_line_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "LINE_SECONDS", 0.01)
    relay, store = ScriptedRelay(window=2, is_held=True), MemoryStore()
    async with running(relay, store) as up:
        await given(up, "first", "second", "third", "fourth")
        await eventually(lambda: len(relay.transactions) == 2)
        # One at least: the other may have been claimed for the next turn, and goes back as well.
        await eventually(lambda: len(waiting(store)) >= 1 and up.runner._slow_until)
        assert {(one.attempts, one.is_possible_duplicate) for one in waiting(store)} == {(0, False)}
        assert not up.runner.reserve(["up"])  # nor does the next one
        up.runner._slow_until["up"] = -math.inf
        assert up.runner.reserve(["up"])
        up.runner.begin(["up"], (), None)
        relay.is_held = False
        relay.let_go()
        await up.empties()
        assert sorted(senders(relay)) == ["first", "fourth", "second", "third"]


async def test_nobody_waits_in_line_where_one_at_a_time_may_go() -> None:
    relay, store = ScriptedRelay(window=1, is_held=True), MemoryStore()
    async with running(relay, store) as up:
        await given(up, "first")
        assert not up.runner.reserve(["up"])
        for sender in ("second", "third"):
            await queued(store, message(sender=sender))
            up.runner.wake(["up"])
        await eventually(lambda: len(relay.transactions) == 1)
        for _ in range(20):  # nor is any of them claimed
            await asyncio.sleep(0)
        assert {(one.attempts, one.state) for one in waiting(store)} == {(0, DeliveryState.READY)}
        assert len(waiting(store)) == 2
        relay.is_held = False
        relay.let_go()
        await up.empties()
        assert senders(relay) == ["first", "second", "third"]


async def test_what_of_a_message_was_not_leased_leaves_its_room() -> None:
    relay = ScriptedRelay(window=1)
    async with running(relay) as up:
        for _ in range(runner_module.MOST_NEW + 1):
            assert up.runner.reserve(["up", "elsewhere"])
            one = message()
            leases = await up.store.submit(one, await written(up.store.draft()), lease=True)
            up.runner.begin(["up", "elsewhere"], leases, (HEADER, BODY))
            # The store knows the result a turn of the loop before the runner does.
            await eventually(lambda: not up.store.memory.entries and not up.runner._attempts)


class _Shared(MemoryStore):
    """Another gateway may take leases over; `lose` says that it has."""

    look_again_seconds: float | None = 60.0

    def __init__(self) -> None:
        super().__init__()
        self.is_ours = True

    def holds(self, lease: Lease) -> bool:
        return self.is_ours

    def lose(self) -> None:
        self.is_ours = False


class _Unread(_Shared):
    """No content comes with its lease."""

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        claimed, due_in = await super().claim(wanted)
        return [(lease, None) for lease, _ in claimed], due_in


class _LosesIts(_Unread):
    """The lease is lost while the content is read."""

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        if start:
            self.lose()
        return await super().read(content, start, octets)


@dataclass
class _Losing(ScriptedRelay):
    """The lease is lost while the upstream is asked about the recipients."""

    lose: Callable[[], None] = lambda: None

    def begin(self, mail: Mail, record: TransactionRecord) -> ScriptedTransaction:
        transaction = super().begin(mail, record)
        self.lose()
        return transaction


@pytest.mark.parametrize("lost_at", ["begin", "recipients", "content", "room"])
async def test_nothing_more_is_sent_of_mail_that_another_gateway_may_have(lost_at: str) -> None:
    store = {"content": _LosesIts, "room": _Unread}.get(lost_at, _Shared)()
    relay = (
        _Losing(lose=store.lose) if lost_at == "recipients" else ScriptedRelay(room=1 if lost_at == "room" else None)
    )
    async with running(relay, store) as up:
        if lost_at == "begin":
            store.lose()
        await up.put()
        if lost_at == "room":
            await eventually(lambda: relay.transactions and relay.transactions[0].chunks == [HEADER, BODY])
            store.lose()
            relay.transactions[0].make_room()
        await eventually(lambda: any(one.epoch for one in waiting(store)))
        calls = {
            "begin": [],
            "recipients": [["recipients", "abort"]],
            "content": [["recipients", "content", "abort"]],
            "room": [["recipients", "content", "abort"]],
        }
        assert [transaction.calls for transaction in relay.transactions[:1]] == calls[lost_at]
        assert relay.taken == []
        store.is_ours = True


def waiting(store: MemoryStore) -> list[DeliveryEntry]:
    entries = store.memory.entries.values()
    return [one for entry in entries for one in entry.deliveries if one.state is DeliveryState.READY]
