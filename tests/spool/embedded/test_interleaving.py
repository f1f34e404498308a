"""All verbs at once, by many, while the threads of log and index take their time: nothing is lost or given twice.

What each verb does alone, the conformance suite says. Here each meets the others halfway: what is being recorded, what
goes into the index, what is read back from it, what is moved to another segment.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded.files import write_durably
from otel_smtp.spool.embedded.index_thread import IndexThread
from otel_smtp.spool.messages import End, Kind, Lease, NoSuchMessage, SpoolError, Verdict
from tests.spool.embedded.test_recovery import ids_in, left_by_a_crash
from tests.spool.messages import HEADER, message, written

WORKERS = 12
STEPS = 60
SEGMENT_OCTETS = 512 * 1024  # small: so that segments are moved out of and used again meanwhile


class Ledger:
    """What is known from outside.

    Attributes:
        bodies: of the messages that have not ended, by id.
        leased: deliveries that somebody attempts, by message.
        durable: of these, those that have come, and are not about to end.
        counted: recipients by what became of them.
    """

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.durable: set[str] = set()
        self.leased: set[str] = set()
        self.counted: dict[str, int] = {}

    def count(self, name: str) -> None:
        self.counted[name] = self.counted.get(name, 0) + 1

    def lease(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            assert lease.message_id not in self.leased, "given to two at a time"
            self.leased.add(lease.message_id)

    def end(self, message_id: str, name: str) -> None:
        assert self.bodies.pop(message_id, None) is not None, "ended twice"
        self.durable.discard(message_id)
        self.count(name)


class Worker:
    """Does one thing after the other."""

    def __init__(self, store: EmbeddedStore, ledger: Ledger, seed: int) -> None:
        self._store = store
        self._ledger = ledger
        self._chance = random.Random(seed)
        self._verbs: list[Callable[[], Any]] = [
            self.submit, self.submit, self.submit, self.claim, self.claim, self.claim, self.operate, self.operate,
            self.delete, self.look, self.look, self.read, self.age, self.warn, self.make_room,
        ]  # fmt: skip

    async def run(self) -> None:
        for _ in range(STEPS):
            await self._chance.choice(self._verbs)()

    def _any_id(self) -> str:
        return self._chance.choice(sorted(self._ledger.bodies) or ["nobody"])

    async def submit(self) -> None:
        new = message(sender=f"{self._chance.randrange(3)}@x.example", max_age_seconds=self._chance.choice((3600, 0.5)))
        body = b"\r\n" + bytes([self._chance.randrange(65, 90)]) * self._chance.choice((10, 3_000, 40_000, 100_000))
        is_leased = self._chance.random() < 0.5
        draft = await written(self._store.draft(), HEADER, body)
        self._ledger.bodies[new.id] = HEADER + body
        if is_leased:
            self._ledger.leased.add(new.id)
        leases = await self._store.submit(new, draft, lease=is_leased)
        self._ledger.count("accepted")
        if new.id in self._ledger.bodies:  # else it has ended already
            self._ledger.durable.add(new.id)
        for lease in leases:
            await self._finish(lease)

    async def claim(self) -> None:
        claimed, _ = await self._store.claim({"up": self._chance.randint(1, 4), "back": 1})
        self._ledger.lease([lease for lease, _ in claimed])
        for lease, content in claimed:
            if content is not None:
                assert b"".join(content) == self._ledger.bodies[lease.message_id]
            await self._finish(lease)

    async def _finish(self, lease: Lease) -> None:
        one = lease.message_id
        choice = self._chance.random()
        self._ledger.leased.discard(one)  # before: it may be given to another as soon as that is recorded
        if choice < 0.1:
            await self._store.mark_corrupt(lease)
        elif choice < 0.5:
            notices = []
            if lease.kind is Kind.MAIL and choice < 0.2:
                notice = message("0@x.example", sender="", destination="back", kind=Kind.NOTIFICATION)
                notices.append((notice, HEADER + b"\r\nreturned\r\n"))
                self._ledger.bodies[notice.id] = notices[0][1]
                self._ledger.count("notified")
            end = End.FAILED if notices else End.DELIVERED
            self._ledger.end(one, end.value if lease.kind is Kind.MAIL else f"notified_{end.value}")
            await self._store.finish(lease, [Verdict(0, end, replies.OK)], notices=notices, is_urgent=choice < 0.3)
        else:
            waiting = [Verdict(0, None, replies.UPSTREAM_UNAVAILABLE)]
            await self._store.finish(lease, waiting, retry_in=self._chance.choice((0.0, 0.05)), hold=choice > 0.9)

    async def operate(self) -> None:
        verb = self._chance.choice(("retry", "hold", "release", "expire"))
        try:
            if self._chance.random() < 0.2:
                await self._store.reset(self._any_id(), 3600)
            else:
                await getattr(self._store, verb)(self._any_id())
        except NoSuchMessage:
            pass  # it has just ended

    async def delete(self) -> None:
        one = self._any_id()
        body = self._ledger.bodies.get(one)
        kind = Kind.NOTIFICATION if body is not None and body.endswith(b"returned\r\n") else Kind.MAIL
        was_durable = one in self._ledger.durable
        self._ledger.durable.discard(one)
        try:
            recipients = await self._store.delete(one)
        except SpoolError:
            if was_durable and one in self._ledger.bodies:
                self._ledger.durable.add(one)
            return  # it is being attempted, or has just ended
        assert recipients == 1
        self._ledger.end(one, "removed" if kind is Kind.MAIL else "notified_removed")

    async def look(self) -> None:
        before = set(self._ledger.durable)
        page = await self._store.page("", 10_000)
        there = before & self._ledger.durable
        assert there <= {shown.id for shown in page}, "something that was there all the time is not shown"
        found = await self._store.find(sender="1@x.example", most=10_000)
        assert {shown.reverse_path for shown in found} <= {"1@x.example"}
        await self._store.counts()
        await self._store.destinations()

    async def read(self) -> None:
        one = self._any_id()
        try:
            shown = await self._store.show(one)
            content = await self._store.read(shown.content, 0, shown.content.octets)
        except SpoolError:
            return  # it has just ended
        if (body := self._ledger.bodies.get(one)) is not None:
            assert content == body

    async def age(self) -> None:
        overdue = await self._store.end_overdue(3)
        self._ledger.lease(overdue)
        for lease in overdue:
            self._ledger.leased.discard(lease.message_id)
            end = End.EXPIRED.value if lease.kind is Kind.MAIL else "notified_expired"
            self._ledger.end(lease.message_id, end)
            await self._store.finish(lease, [Verdict(0, End.EXPIRED, replies.EXPIRED)])

    async def warn(self) -> None:
        for lease in await self._store.unwarned(0.0, 2):
            await self._store.warn(lease.message_id, ())

    async def make_room(self) -> None:
        await self._store.indexing.write(before=self._chance.choice((float("inf"), time.monotonic() - 0.02)))
        await self._compact()

    async def _compact(self) -> None:
        async with self._compacting:  # the keeper's, done here
            await self._store.compaction.compact()

    _compacting = asyncio.Lock()


@pytest.mark.parametrize("seed", range(3))
async def test_many_do_everything_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    call = IndexThread.call

    def write_slowly(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
        time.sleep(chance.choice((0.0, 0.0, 0.002, 0.01)))  # in the log's thread
        return write_durably(file, data, at, in_one_call=in_one_call)

    def call_slowly(thread: IndexThread, work: Callable[[], Any]) -> Any:
        def slowly() -> Any:
            time.sleep(chance.choice((0.0, 0.0, 0.002, 0.01)))  # in the index's thread
            return work()

        return call(thread, slowly)

    monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", write_slowly)
    monkeypatch.setattr(IndexThread, "call", call_slowly)
    monkeypatch.setattr(Worker, "_compacting", asyncio.Lock())
    ledger = Ledger()
    store = EmbeddedStore(tmp_path / "spool", least_free_octets=0, segment_octets=SEGMENT_OCTETS)
    await store.open()
    try:
        if store._keeper is not None:
            store._keeper.cancel()  # what it does, workers do, at all moments
        async with asyncio.timeout(120):
            await asyncio.gather(*[Worker(store, ledger, seed * 100 + number).run() for number in range(WORKERS)])
        assert await ids_in(store) == sorted(ledger.bodies)
        assert dict(await store.tally()) == ledger.counted
        crashed = left_by_a_crash(store)
    finally:
        await store.close()
    monkeypatch.undo()
    for loses_index in (False, True):
        if loses_index:
            for file in crashed.glob("index.db*"):
                file.unlink()
        store = EmbeddedStore(crashed, least_free_octets=0, segment_octets=SEGMENT_OCTETS)
        recovery = await store.open()
        try:
            assert (list(recovery.lost), list(recovery.alarms)) == ([], [])
            assert await ids_in(store) == sorted(ledger.bodies)
            assert dict(await store.tally()) == ledger.counted
            for shown in await store.page("", 10_000):
                assert await store.read(shown.content, 0, shown.content.octets) == ledger.bodies[shown.id]
                assert await store.is_intact(shown.content)
        finally:
            await store.close()
