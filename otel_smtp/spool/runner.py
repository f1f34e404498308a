"""Empties the spool: attempts what is due, as fast as the upstreams bear, and ends what is too old.

An attempt is counted, durably, before its connection is made; so a message that crashes the process is found out, and
an attempt that a crash cut short is known as one that may have succeeded. How many attempts run at once is the
upstream's own window (it grows with successes and shrinks with failures to connect); while all upstreams of a
destination are given a rest, nothing that is meant for it is touched.

Timers run by the monotonic clock. The wall clock only says how old mail is, and only `_sweep` ends mail for its age, a
small part of the spool at a time: a clock that jumped cannot empty it.
"""

import asyncio
import hashlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from otel_smtp.forwarding.base import DeliveryFailed, Relay
from otel_smtp.observing import TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply
from otel_smtp.spool.awaiting import AwaitedTransaction
from otel_smtp.spool.bounce import Kind as NoticeKind
from otel_smtp.spool.index import Index
from otel_smtp.spool.messages import (
    ContentLost,
    Counts,
    End,
    Kind,
    Lease,
    NewMessage,
    Shown,
    SpoolError,
    StaleLease,
    StorageBroken,
    Verdict,
)
from otel_smtp.spool.notices import Notices
from otel_smtp.spool.schedule import Schedule
from otel_smtp.spool.store import Store

logger: Final = logging.getLogger("otel_smtp.spool.runner")

MOST_AT_ONCE: Final = 100  # attempts under way, whatever the upstreams bear
READ_OCTETS: Final = 256 * 1024
SWEEP_SECONDS: Final = 60.0
SWEEP_MOST: Final = 100  # ended for their age in one sweep, or a hundredth of the spool if that is more
BLOCKED_POLL_SECONDS: Final = 0.5  # how often a resting upstream is looked at while mail waits for it
COUNT_SECONDS: Final = 2.0
SHOWN_MOST: Final = 50
CLOCK_JUMP_SECONDS: Final = 60.0
RECORD_AGAIN_SECONDS: Final = 1.0
LEASE_SECONDS: Final = 3600.0  # longer than any attempt may take; matters where gateways share a store


class _Damaged(Exception):
    """A content is not what was written."""


class Runner:
    """Attempts deliveries.

    Args:
        relay: gives each recipient its own verdict, and tells its observer of each attempt.
        chance: a number from 0 to 1, for jitter.
        clock: the wall clock, in seconds since the epoch.

    Attributes:
        counts, oldest: the spool a few seconds ago, and its oldest messages, for people.
    """

    def __init__(
        self,
        store: Store,
        relay: Relay,
        notices: Notices,
        schedule: Schedule,
        *,
        most_at_once: int = MOST_AT_ONCE,
        sweep_seconds: float = SWEEP_SECONDS,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._store = store
        self._relay = relay
        self._notices = notices
        self._schedule = schedule
        self._most_at_once = most_at_once
        self._sweep_seconds = sweep_seconds
        self._chance = chance
        self._destinations: set[str] = set()
        self._under_way: Counter[str] = Counter()
        self._has_backlog: set[str] = set()
        self._attempts: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._sweep_is_due = True
        self._loop_task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._counted_at = float("-inf")
        self._clocks = (self._clock(), time.monotonic())
        self._has_changed = True
        self.counts = Counts()
        self.oldest: Sequence[Shown] = ()

    # Life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin with what is in the spool.

        Raises:
            SpoolError: it cannot be read.
        """
        longest = self._schedule.longest_seconds
        self._destinations |= set(await self._store.apply(lambda index: index.destinations()))
        await self._store.apply(lambda index: index.pull_in(self._clock(), longest))
        self._loop_task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self, *, grace_seconds: float) -> None:
        """Begin nothing any more, and let what is under way come to its end within the grace. Idempotent."""
        self._is_stopping = True
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
            self._loop_task = None
        if self._attempts:
            await asyncio.wait(self._attempts, timeout=grace_seconds)
        for attempt in self._attempts:
            attempt.cancel()
        await asyncio.gather(*self._attempts, return_exceptions=True)

    # What the forwarders ask for --------------------------------------------------------------------------

    def reserve(self, destinations: Sequence[str]) -> bool:
        """See `Attempts.reserve`. Where others have been waiting, half of the room is left for them."""
        if self._is_stopping or not all(self._has_room_for_new(destination) for destination in destinations):
            return False
        self._under_way.update(destinations)
        self._destinations.update(destinations)
        return True

    def _has_room_for_new(self, destination: str) -> bool:
        room = self._room(destination)
        if destination in self._has_backlog:
            room -= self._relay.concurrency(destination) // 2
        return room > 0

    def begin(self, destinations: Sequence[str], leases: Sequence[Lease], content: Sequence[bytes] | None) -> None:
        """See `Attempts.begin`."""
        self._under_way.subtract(destinations)
        for lease in leases:
            self._begin(lease, content)

    def wake(self, destinations: Sequence[str] = ()) -> None:
        """See `Attempts.wake`."""
        self._destinations.update(destinations)
        self._has_changed = True
        self._wake.set()

    def sweep_soon(self) -> None:
        """An operator gave messages up: end them now."""
        self._sweep_is_due = True
        self._wake.set()

    # The loop ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        swept_at = float("-inf")
        while True:
            self._wake.clear()
            now = time.monotonic()
            try:
                if self._sweep_is_due or now - swept_at >= self._sweep_seconds:
                    self._sweep_is_due, swept_at = False, now
                    await self._sweep()
                wait_seconds = await self._begin_what_is_due()
                wait_seconds = min(wait_seconds, await self._count())
            except SpoolError as error:
                if isinstance(error, StorageBroken):
                    logger.critical("the runner stops: the spool failed", extra={"fault": str(error)})
                    return
                logger.error("the spool cannot be worked on for now", extra={"fault": str(error)})
                wait_seconds = RECORD_AGAIN_SECONDS
            except Exception:
                logger.exception("the runner failed, and goes on")
                wait_seconds = RECORD_AGAIN_SECONDS
            await self._sleep(min(wait_seconds, max(0.0, swept_at + self._sweep_seconds - time.monotonic())))

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _begin_what_is_due(self) -> float:
        """Begin as many attempts as there is room for; how long until there may be more, in seconds."""
        rooms = {destination: self._room(destination) for destination in self._destinations}
        wanted = {destination: room for destination, room in rooms.items() if room > 0}
        if not wanted:
            # Room comes with the end of an attempt, which wakes us, or with that of an upstream's rest.
            return BLOCKED_POLL_SECONDS
        now = self._clock()
        leases, next_due_at = await self._store.lease(now, wanted, now + LEASE_SECONDS)
        found = Counter(lease.destination for lease, _ in leases)
        for destination, most in wanted.items():
            (self._has_backlog.add if found[destination] == most else self._has_backlog.discard)(destination)
        for lease, content in leases:
            self._begin(lease, content)
        waits = [self._sweep_seconds]
        if len(wanted) < len(rooms):
            waits.append(BLOCKED_POLL_SECONDS)
        if next_due_at is not None and not leases:
            # What is due and was not leased is too old, and the sweep's business.
            waits.append(next_due_at - now if next_due_at > now else BLOCKED_POLL_SECONDS)
        return min(waits) if not leases else 0.0

    def _room(self, destination: str) -> int:
        most = min(self._relay.concurrency(destination) - self._under_way[destination], self._free)
        return max(0, most)

    @property
    def _free(self) -> int:
        return self._most_at_once - self._under_way.total()

    def _begin(self, lease: Lease, content: bytes | Sequence[bytes] | None) -> None:
        self._under_way[lease.destination] += 1
        task = asyncio.get_running_loop().create_task(self._attempt(lease, content))
        self._attempts.add(task)
        task.add_done_callback(lambda done: self._ended(done, lease.destination))

    def _ended(self, task: asyncio.Task[None], destination: str) -> None:
        self._attempts.discard(task)
        self._under_way[destination] -= 1
        self._has_changed = True
        if destination in self._has_backlog and self._room(destination) > self._relay.concurrency(destination) // 4:
            self._wake.set()  # a few at a time: each look into the index costs as much as some deliveries

    # One attempt ------------------------------------------------------------------------------------------

    async def _attempt(self, lease: Lease, content: bytes | Sequence[bytes] | None) -> None:
        record = TransactionRecord.resumed(
            lease.message_id,
            lease.carrier,
            lease.mail,
            attempt=lease.attempt,
            is_possible_duplicate=lease.is_possible_duplicate,
        )
        record.accepted = [one.recipient for one in lease.recipients]
        record.octets = lease.placement.octets
        attempt = _Attempt(record)
        if lease.is_possible_duplicate:
            logger.warning("attempted again: the upstream may have it already", extra=_told(lease))
        try:
            verdicts = await self._deliver(lease, content, attempt)
        except (_Damaged, ContentLost):
            logger.critical("a queued content is damaged; the message is set aside", extra=_told(lease))
            await self._record(lease, lambda index: index.mark_corrupt(lease))
            return
        except SpoolError as error:
            # It cannot be read. Nothing was said of the message to anybody.
            logger.error("a queued message cannot be read", extra={**_told(lease), "fault": str(error)})
            verdicts = [Verdict(one.number, None, replies.STORAGE_FAILED) for one in lease.recipients]
        except asyncio.CancelledError:
            await self._record(
                lease,
                lambda index: index.finish(
                    lease, [], next_at=self._clock(), is_possible_duplicate=attempt.has_content_left
                ),
            )
            raise
        except Exception:
            logger.exception("an attempt failed by our fault", extra=_told(lease))
            verdicts = [Verdict(one.number, None, replies.INTERNAL) for one in lease.recipients]
        await self._settle(lease, verdicts, attempt)

    async def _notices_of(
        self, lease: Lease, verdicts: Sequence[Verdict], remote: str | None
    ) -> Sequence[tuple[NewMessage, bytes]]:
        """The notices that are due for what ended."""
        by_number = {one.number: one for one in lease.recipients}
        notices: list[tuple[NewMessage, bytes]] = []
        for end, kind in ((End.FAILED, NoticeKind.FAILED), (End.DELIVERED, NoticeKind.RELAYED)):
            ended = [(by_number[verdict.number], verdict.reply) for verdict in verdicts if verdict.end is end]
            if not ended:
                continue
            if end is End.FAILED:
                logger.warning(
                    "refused for good", extra={**_told(lease), "recipients": len(ended), **_codes(ended[0][1])}
                )
            elif self._relay.capabilities().dsn:
                continue  # the upstream has taken over to tell of success (RFC 3461 5.2.1)
            notices += await self._notices.of(kind, lease, ended, remote=remote)
        return notices

    async def _deliver(
        self, lease: Lease, content: bytes | Sequence[bytes] | None, attempt: "_Attempt"
    ) -> Sequence[Verdict]:
        try:
            transaction = AwaitedTransaction(self._relay.begin(lease.mail, attempt.record))
        except DeliveryFailed as failure:
            return [_verdict(one.number, failure.reply) for one in lease.recipients]
        with transaction:
            answers = await transaction.recipients([one.recipient for one in lease.recipients])
            if any(answer.is_positive for answer in answers):
                attempt.has_content_left = True
                final, each = await transaction.content(self._chunks(lease, content))
                # Who has it already must not get it again because another recipient was refused.
                own = iter(each)
                answers = [next(own, final) if answer.is_positive else answer for answer in answers]
        return [_verdict(one.number, answer) for one, answer in zip(lease.recipients, answers, strict=True)]

    async def _chunks(self, lease: Lease, content: bytes | Sequence[bytes] | None) -> AsyncIterator[bytes]:
        placement, octets = lease.placement, lease.placement.octets
        if content is None and octets <= READ_OCTETS:
            content = await self._store.content(placement, 0, octets)
        if isinstance(content, bytes):  # it comes from the disk
            if hashlib.sha256(content).digest() != placement.digest:
                raise _Damaged
            content = [content[: lease.header_octets], content[lease.header_octets :]]
        if content is not None:
            for chunk in content:
                if chunk:
                    yield chunk
            return
        if not await self._store.is_intact(placement):
            raise _Damaged
        yield await self._store.content(placement, 0, lease.header_octets)
        for start in range(lease.header_octets, octets, READ_OCTETS):
            yield await self._store.content(placement, start, READ_OCTETS)

    async def _settle(self, lease: Lease, verdicts: Sequence[Verdict], attempt: "_Attempt") -> None:
        """Record what an attempt came to, with the notices that are due for it."""
        now = self._clock()
        next_at = now + self._schedule.next_delay(lease.attempt, self._chance())
        waiting = [verdict for verdict in verdicts if verdict.end is None]
        if len(waiting) < len(verdicts) and all(_wants_another_transaction(verdict.reply) for verdict in waiting):
            next_at = now  # "should be ... sent in another transaction" (RFC 5321 4.5.3.1.10): at once
        unknown = any(verdict.reply is not None and _is_unknown(verdict.reply) for verdict in verdicts)
        notices: Sequence[tuple[NewMessage, bytes]] = ()
        try:
            notices = await self._notices_of(lease, verdicts, attempt.remote)
        except Exception:
            # Who has the mail must not get it again for that; who was refused is asked once more, and told of then.
            logger.exception("a notice could not be made", extra=_told(lease))
            verdicts = [one if one.end is End.DELIVERED else Verdict(one.number, None, one.reply) for one in verdicts]
        await self._record(
            lease,
            lambda index: index.finish(lease, verdicts, next_at=next_at, is_possible_duplicate=unknown),
            notices,
            is_urgent=False,
        )
        if notices or waiting:
            self.wake([destination for notice, _ in notices for destination in notice.deliveries])

    async def _record(
        self,
        lease: Lease,
        work: Callable[[Index], None],
        notices: Sequence[tuple[NewMessage, bytes]] = (),
        *,
        is_urgent: bool = True,
    ) -> None:
        """Record a result, as often as it takes: an attempt whose result is not recorded will be made again."""
        while True:
            try:
                await self._store.record(work, notices, is_urgent=is_urgent)
            except StaleLease as error:
                logger.error("a result came too late", extra={**_told(lease), "fault": str(error)})
            except StorageBroken as error:
                logger.critical("a result cannot be recorded", extra={**_told(lease), "fault": str(error)})
            except SpoolError as error:
                logger.error("a result cannot be recorded yet", extra={**_told(lease), "fault": str(error)})
                if not self._is_stopping:
                    await asyncio.sleep(RECORD_AGAIN_SECONDS)
                    continue
            return

    # What time does ---------------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        await self._store.refresh()
        await self._look_at_clocks()
        now = self._clock()
        most = max(SWEEP_MOST, self.counts.total // 100)
        for lease in await self._store.apply(lambda index: index.overdue(now, most, self._store.owner)):
            await self._end(lease)
        if self._schedule.warn_after_seconds is not None:
            before = now - self._schedule.warn_after_seconds
            for lease in await self._store.apply(lambda index: index.unwarned(before, SWEEP_MOST)):
                await self._warn(lease)

    async def _end(self, lease: Lease) -> None:
        """Give up what is too old; a notice of ours goes to an operator instead."""
        if lease.kind is Kind.NOTIFICATION:
            logger.error("a notice cannot be delivered, and is held", extra=_told(lease))
            await self._record(lease, lambda index: index.finish(lease, [], next_at=self._clock(), hold=True))
            return
        logger.warning("given up for its age", extra={**_told(lease), "recipients": len(lease.recipients)})
        told = [(one, replies.EXPIRED) for one in lease.recipients]
        notices = await self._notices.of(NoticeKind.FAILED, lease, told)
        verdicts = [Verdict(one.number, End.EXPIRED, replies.EXPIRED) for one in lease.recipients]
        await self._record(lease, lambda index: index.finish(lease, verdicts, next_at=0.0), notices)
        self.wake([destination for notice, _ in notices for destination in notice.deliveries])

    async def _warn(self, lease: Lease) -> None:
        waiting = [(one, _parsed(one.last_reply)) for one in lease.recipients]
        notices = await self._notices.of(NoticeKind.DELAYED, lease, waiting, retry_until=lease.expires_at)

        def note(index: Index) -> None:
            if not index.warned(lease.message_id):
                raise StaleLease("the sender has been warned")

        try:
            await self._store.record(note, notices)
        except StaleLease:
            return
        logger.warning("delayed; its sender is told", extra=_told(lease))
        self.wake([destination for notice, _ in notices for destination in notice.deliveries])

    async def _look_at_clocks(self) -> None:
        wall, monotonic = self._clock(), time.monotonic()
        jump = (wall - self._clocks[0]) - (monotonic - self._clocks[1])
        self._clocks = (wall, monotonic)
        if abs(jump) >= CLOCK_JUMP_SECONDS:
            longest = self._schedule.longest_seconds
            pulled = await self._store.apply(lambda index: index.pull_in(wall, longest))
            logger.warning("the clock jumped", extra={"seconds": round(jump), "attempts_moved": pulled})

    async def _count(self) -> float:
        """Look at the spool as a whole, now and then; when to do so next, in seconds."""
        since = time.monotonic() - self._counted_at
        if since < COUNT_SECONDS:
            return COUNT_SECONDS - since if self._has_changed else self._sweep_seconds
        self._counted_at, self._has_changed = time.monotonic(), False
        self.counts, self.oldest = await self._store.apply(
            lambda index: (index.counts(self._clock()), index.page("", SHOWN_MOST))
        )
        return self._sweep_seconds


class _Attempt:
    """What one attempt has come to so far.

    Attributes:
        has_content_left: from here on, the upstream may have taken it.
    """

    __slots__ = ("has_content_left", "record")

    def __init__(self, record: TransactionRecord) -> None:
        self.record = record
        self.has_content_left = False

    @property
    def remote(self) -> str | None:
        """The upstream that was asked last."""
        return self.record.deliveries[-1].server.host if self.record.deliveries else None


def _verdict(number: int, reply: Reply) -> Verdict:
    if reply.is_positive:
        return Verdict(number, End.DELIVERED, reply)
    # That we have no route for it is our settings' fault, and no reason to send mail back.
    if reply.is_permanent and reply is not replies.RELAY_DENIED:
        return Verdict(number, End.FAILED, reply)
    return Verdict(number, None, reply)


def _wants_another_transaction(reply: Reply | None) -> bool:
    return reply is not None and (reply.enhanced == replies.OTHER_ROUTE.enhanced or reply.code == 452)


def _parsed(text: str) -> Reply | None:
    """The reply that was kept as text; its lines in one."""
    if not text[:3].isdigit():
        return None
    enhanced, rest = EnhancedStatus.parse(text[4:])
    return Reply(int(text[:3]), enhanced, (rest,))


def _is_unknown(reply: Reply) -> bool:
    return reply.error_type is ErrorType.OUTCOME_UNKNOWN


def _told(lease: Lease) -> dict[str, object]:
    return {"spool_id": lease.message_id, "attempt": lease.attempt, "traceparent": lease.carrier.get("traceparent")}


def _codes(reply: Reply | None) -> dict[str, object]:
    if reply is None:
        return {}
    return {"code": reply.code, "enhanced_code": str(reply.enhanced) if reply.enhanced is not None else None}
