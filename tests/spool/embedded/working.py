"""Many who do everything with a store at once, and know what must be there."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.messages import End, Kind, Lease, NoSuchMessage, SpoolError, Verdict
from tests.spool.messages import HEADER, message, written

STEPS: Final = 60


class Ledger:
    """What is known from outside.

    Attributes:
        bodies: of the messages that have not ended, by id.
        leased: deliveries that somebody attempts, by message.
        durable: of these, those that have come, and are not about to end.
        held: of these, those that an operator holds, and nobody is about to change.
        operated, leaving: how many operators are about to change a message, or to delete it.
        ended: those whose end was recorded.
        contents: of all messages there ever were.
        counted: recipients by what became of them.
    """

    def __init__(self) -> None:
        self.bodies: dict[str, bytes] = {}
        self.contents: dict[str, bytes] = {}
        self.held: set[str] = set()
        self.operated: Counter[str] = Counter()
        self.leaving: Counter[str] = Counter()
        self.ended: set[str] = set()
        self.durable: set[str] = set()
        self.leased: set[str] = set()
        self.counted: dict[str, int] = {}

    def count(self, name: str) -> None:
        self.counted[name] = self.counted.get(name, 0) + 1

    def lease(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            assert lease.message_id not in self.leased, "given to two at a time"
            self.leased.add(lease.message_id)

    def add(self, message_id: str, content: bytes) -> None:
        self.bodies[message_id] = self.contents[message_id] = content

    def is_durable(self, message_id: str) -> None:
        if message_id in self.bodies and not self.leaving[message_id]:  # else it has ended already, or is about to
            self.durable.add(message_id)

    def end(self, message_id: str, name: str) -> None:
        assert self.bodies.pop(message_id, None) is not None, "ended twice"
        self.durable.discard(message_id)
        self.held.discard(message_id)
        self.count(name)


class Worker:
    """Does one thing after the other."""

    def __init__(
        self, store: EmbeddedStore, ledger: Ledger, seed: int, compacting: asyncio.Lock, *, steps: int = STEPS
    ) -> None:
        self._store = store
        self._compacting = compacting
        self._steps = steps
        self._ledger = ledger
        self._chance = random.Random(seed)
        self._verbs: list[Callable[[], Any]] = [
            self.submit, self.submit, self.submit, self.claim, self.claim, self.claim, self.operate, self.operate,
            self.delete, self.look, self.look, self.read, self.age, self.warn, self.make_room,
        ]  # fmt: skip

    async def run(self) -> None:
        for _ in range(self._steps):
            await self._chance.choice(self._verbs)()

    def _any_id(self) -> str:
        return self._chance.choice(sorted(self._ledger.bodies) or ["nobody"])

    async def submit(self) -> None:
        new = message(sender=f"{self._chance.randrange(3)}@x.example", max_age_seconds=self._chance.choice((3600, 0.5)))
        body = b"\r\n" + bytes([self._chance.randrange(65, 90)]) * self._chance.choice((10, 3_000, 40_000, 100_000))
        is_leased = self._chance.random() < 0.5
        draft = await written(self._store.draft(), HEADER, body)
        self._ledger.add(new.id, HEADER + body)
        if is_leased:
            self._ledger.leased.add(new.id)
        leases = await self._store.submit(new, draft, lease=is_leased)
        self._ledger.count("accepted")
        self._ledger.is_durable(new.id)
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
                self._ledger.add(notice.id, notices[0][1])
                self._ledger.count("notified")
            end = End.FAILED if notices else End.DELIVERED
            self._ledger.end(one, end.value if lease.kind is Kind.MAIL else f"notified_{end.value}")
            await self._store.finish(lease, [Verdict(0, end, replies.OK)], notices=notices, is_urgent=choice < 0.3)
            self._ledger.ended.add(one)
            for notice, _ in notices:
                self._ledger.is_durable(notice.id)
        else:
            waiting = [Verdict(0, None, replies.UPSTREAM_UNAVAILABLE)]
            await self._store.finish(lease, waiting, retry_in=self._chance.choice((0.0, 0.05)), hold=choice > 0.9)

    async def operate(self) -> None:
        verb = self._chance.choice(("retry", "hold", "release", "expire"))
        one = self._any_id()
        self._ledger.held.discard(one)
        self._ledger.operated[one] += 1
        is_held = False
        try:
            if self._chance.random() < 0.2:
                await self._store.reset(one, 3600)
            else:
                is_held = await getattr(self._store, verb)(one) and verb == "hold"
        except NoSuchMessage:
            pass  # it has just ended
        self._ledger.operated[one] -= 1
        if is_held and not self._ledger.operated[one] and one in self._ledger.durable:
            self._ledger.held.add(one)

    async def delete(self) -> None:
        one = self._any_id()
        body = self._ledger.bodies.get(one)
        kind = Kind.NOTIFICATION if body is not None and body.endswith(b"returned\r\n") else Kind.MAIL
        was_durable = one in self._ledger.durable
        self._ledger.durable.discard(one)
        self._ledger.held.discard(one)
        self._ledger.leaving[one] += 1
        try:
            recipients = await self._store.delete(one)
        except SpoolError:
            self._ledger.leaving[one] -= 1
            if was_durable:
                self._ledger.is_durable(one)
            return  # it is being attempted, or has just ended
        assert recipients == 1
        self._ledger.end(one, "removed" if kind is Kind.MAIL else "notified_removed")
        self._ledger.ended.add(one)

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
            self._ledger.ended.add(lease.message_id)

    async def warn(self) -> None:
        for lease in await self._store.unwarned(0.0, 2):
            await self._store.warn(lease.message_id, ())

    async def make_room(self) -> None:
        await self._store.indexing.write(before=self._chance.choice((float("inf"), time.monotonic() - 0.02)))
        async with self._compacting:  # the keeper's, done here
            await self._store.compaction.compact()
