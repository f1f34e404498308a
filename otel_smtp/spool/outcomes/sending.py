"""Sends waiting outcomes to the receivers, independently of the mail.

An outcome that a receiver does not accept is retried by the schedule of the mail, until it is as old as mail may
become. A failing receiver gets one outcome at a time, after pauses that grow to a minute: waiting ones cost nothing
meanwhile.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from otel_smtp.observing import Observer
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.spool.attempts import Recording
from otel_smtp.spool.messages import Backlog, ContentLost, End, Lease, SpoolError, StorageAway, StorageBroken, Verdict
from otel_smtp.spool.outcomes.posting import PostAnswer, Poster
from otel_smtp.spool.outcomes.receivers import OutcomeReceiver, Receivers, ReceiverSettings
from otel_smtp.spool.schedule import Schedule
from otel_smtp.spool.store import Store

logger: Final = logging.getLogger("otel_smtp.spool.outcomes.sending")

COUNT_SECONDS: Final = 2.0  # how often outcomes are counted while any waits
LOOK_SECONDS: Final = 60.0  # how often expired ones are looked for
OVERDUE_AT_ONCE: Final = 100
AGAIN_SECONDS: Final = 1.0
STOP_SECONDS: Final = 1.0  # for exchanges under way at the end


class Sender:
    """Sends outcomes.

    Args:
        chance: a number from 0 to 1, for jitter.
    """

    def __init__(
        self, store: Store, receivers: Receivers, schedule: Schedule, *, chance: Callable[[], float] = random.random
    ) -> None:
        self._store = store
        self._receivers = receivers
        self._schedule = schedule
        self._chance = chance
        self._recording = Recording(store, Observer())  # outcomes are in no trace
        self._posters: dict[str, Poster] = {}
        self._exchanges: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._counted_at = self._looked_at = float("-inf")
        self._has_changed = True

    def start(self) -> None:
        """Begin to send. Idempotent."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End: exchanges under way are cut short after a moment, and repeated by the next process. Idempotent."""
        self._recording.is_stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._exchanges:
            _, late = await asyncio.wait(self._exchanges, timeout=STOP_SECONDS)
            for exchange in late:
                exchange.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._close(list(self._posters))

    def wake(self) -> None:
        """A new outcome waits, or a receiver may be tried again."""
        self._has_changed = True
        self._wake.set()

    def look_soon(self) -> None:
        """An operator has changed or expired an outcome."""
        self._looked_at = self._counted_at = float("-inf")
        self.wake()

    # The loop ---------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        is_away = False
        while True:
            self._wake.clear()
            try:
                wait_seconds = await self._work()
                is_away = False
            except SpoolError as error:
                if isinstance(error, StorageBroken):
                    logger.critical("outcome sender stopped: the spool failed", extra={"fault": str(error)})
                    return
                if not is_away:
                    logger.error("outcomes unavailable; retrying", extra={"fault": str(error)})
                is_away = isinstance(error, StorageAway)
                wait_seconds = AGAIN_SECONDS
            except Exception:
                logger.exception("outcome sender failed; retrying")
                wait_seconds = AGAIN_SECONDS
            try:
                async with asyncio.timeout(wait_seconds):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _work(self) -> float:
        """Begin the exchanges that may begin; returns seconds until the next look."""
        now = time.monotonic()
        receivers = self._receivers.by_destination
        if now - self._looked_at >= LOOK_SECONDS:
            await self._give_up()
            await self._close([name for name in self._posters if name not in receivers])
            self._looked_at = now
        wait_seconds = min(await self._count(now), LOOK_SECONDS)
        wanted = {destination: room for destination, one in receivers.items() if (room := one.room(now))}
        # Resting receivers are tried again after their pause; the end of an exchange wakes us.
        rests = [rest for one in receivers.values() if not one.under_way and (rest := one.rests_for(now))]
        wait_seconds = min([wait_seconds, *rests])
        if not wanted:
            return wait_seconds
        claimed, due_in = await self._store.claim(wanted)
        for lease, content in claimed:
            if (receiver := receivers.get(lease.destination)) is not None:
                self._begin(receiver, lease, content)
            else:  # a lost lease, for a receiver that has been removed since
                await self._record(lease, (), LOOK_SECONDS)
        if claimed:
            return 0.0
        if self._store.look_again_seconds is not None:
            wait_seconds = min(wait_seconds, self._store.look_again_seconds)
        if due_in is not None:
            wait_seconds = min(wait_seconds, due_in if due_in > 0 else AGAIN_SECONDS)
        return wait_seconds

    async def _count(self, now: float) -> float:
        """Count waiting outcomes, now and then; returns seconds until the next time."""
        since = now - self._counted_at
        if since < COUNT_SECONDS:
            return COUNT_SECONDS - since if self._has_changed else LOOK_SECONDS
        self._counted_at = now
        receivers = self._receivers.by_destination
        backlog = await self._store.backlog(list(receivers))
        for destination, receiver in receivers.items():
            receiver.count(backlog.get(destination, Backlog()))
        self._has_changed = any(one.pending for one in receivers.values())
        return COUNT_SECONDS if self._has_changed else LOOK_SECONDS

    async def _give_up(self) -> None:
        """End expired outcomes, even of removed receivers."""
        given_up: Counter[str] = Counter()
        while leases := await self._store.end_overdue(OVERDUE_AT_ONCE, outcomes=True):
            for lease in leases:
                given_up[lease.destination] += 1
                verdicts = [Verdict(one.number, End.EXPIRED) for one in lease.recipients]
                await self._record(lease, verdicts)
        for destination, outcomes in given_up.items():
            receiver = self._receivers.by_destination.get(destination)
            if receiver is not None:
                receiver.figures.expired += outcomes
            logger.error("outcomes expired", extra={"receiver": destination, "outcomes": outcomes})

    # One outcome ------------------------------------------------------------------------------------------------

    def _begin(self, receiver: OutcomeReceiver, lease: Lease, content: Sequence[bytes] | None) -> None:
        receiver.under_way += 1
        exchange = asyncio.get_running_loop().create_task(self._send(receiver, lease, content))
        self._exchanges.add(exchange)
        exchange.add_done_callback(lambda done: self._ended(receiver, done))

    def _ended(self, receiver: OutcomeReceiver, exchange: "asyncio.Task[None]") -> None:
        self._exchanges.discard(exchange)
        receiver.under_way -= 1
        self.wake()
        if not exchange.cancelled() and (error := exchange.exception()) is not None:
            logger.error("outcome not sent: internal error", exc_info=error)

    async def _send(self, receiver: OutcomeReceiver, lease: Lease, content: Sequence[bytes] | None) -> None:
        try:
            body = b"".join(content) if content is not None else await self._read(lease)
        except ContentLost as error:
            logger.critical("outcome lost: content damaged", extra={"spool_id": lease.message_id, "fault": str(error)})
            await self._record(lease, [Verdict(one.number, End.FAILED) for one in lease.recipients])
            return
        except SpoolError:
            await self._record(lease, (), AGAIN_SECONDS)
            return
        poster = await self._poster(receiver.settings)
        answer = await poster.post(lease.message_id, body, lease.carrier)
        if answer.why is None:
            receiver.succeeded()
            await self._record(lease, [Verdict(one.number, End.DELIVERED) for one in lease.recipients])
            return
        receiver.failed(answer.why, answer.retry_in)
        reply = _as_reply(answer)
        retry_in = max(answer.retry_in, self._schedule.next_delay(lease.attempt, self._chance()))
        await self._record(lease, [Verdict(one.number, None, reply) for one in lease.recipients], retry_in)

    async def _read(self, lease: Lease) -> bytes:
        if not await self._store.is_intact(lease.content):
            raise ContentLost("the content is not what was written")
        return await self._store.read(lease.content, 0, lease.content.octets)

    async def _record(self, lease: Lease, verdicts: Sequence[Verdict], retry_in: float = 0.0) -> None:
        await self._recording.record(
            lease, lambda: self._store.finish(lease, verdicts, retry_in=retry_in, is_urgent=False)
        )

    async def _poster(self, settings: ReceiverSettings) -> Poster:
        """The poster with these settings; one with others is closed."""
        known = self._posters.get(settings.destination)
        if known is not None and known.settings == settings:
            return known
        self._posters[settings.destination] = poster = Poster(settings)
        if known is not None:
            await known.close()
        return poster

    async def _close(self, destinations: Sequence[str]) -> None:
        for destination in destinations:
            await self._posters.pop(destination).close()


def _as_reply(answer: PostAnswer) -> Reply:
    """Why a receiver did not accept an outcome, as `queue show` prints it."""
    why = (answer.why or "").encode("ascii", "replace").decode()
    return Reply(451, None, (" ".join(why.split())[:200],), ErrorType.UPSTREAM_UNAVAILABLE)
