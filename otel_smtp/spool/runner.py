"""The runner empties the spool: it attempts due deliveries, as fast as the upstreams take them.

An attempt is counted durably before its connection is made; so a message that crashes the process is detected, and an
attempt cut short by a crash is known to have possibly succeeded. The upstream's own window limits concurrent attempts
(it grows with successes and shrinks with failures to connect); while all upstreams of a destination are in backoff, its
mail is not touched.

The record that makes a new message durable also leases it for an attempt: a claim would cost one more record, a search
and a read. While that record, or that of its result, is written, it needs no upstream; so more messages are leased than
the window is wide, and durable ones wait in line, taking turns with claimed ones.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from otel_smtp.forwarding.base import Relay
from otel_smtp.observing import Observer
from otel_smtp.spool.aging import Aging
from otel_smtp.spool.attempts import Attempt, Means, Recording
from otel_smtp.spool.deeds import Deed, note_crashes
from otel_smtp.spool.dsn.notices import Notices
from otel_smtp.spool.messages import Company, Counts, Lease, MessageView, SpoolError, StorageAway, StorageBroken
from otel_smtp.spool.schedule import Schedule
from otel_smtp.spool.store import Store

if TYPE_CHECKING:
    from otel_smtp.spool.outcomes.recording import Outcomes

logger: Final = logging.getLogger("otel_smtp.spool.runner")

MOST_AT_ONCE: Final = 100  # claimed deliveries under way, however many the upstreams take
MOST_NEW: Final = 200  # and new ones: with fifty clients, as many become durable, are attempted, and are recorded
NEW_WINDOWS: Final = 8  # of one destination, this multiple of what its upstream takes
LINE_SECONDS: Final = 1.0  # the longest wait in line; then operators may hold it, and another gateway deliver it
SLOW_SECONDS: Final = 30.0  # after that, how long nothing waits in line for this destination
LOOK_SECONDS: Final = 60.0  # how often the age of mail is checked
BLOCKED_POLL_SECONDS: Final = 0.5  # how often an upstream in backoff is checked while mail waits for it
COUNT_SECONDS: Final = 2.0
CONNECTION_GRACE_SECONDS: Final = 1.0  # at the end, for attempts that have no connection yet
SHOWN_MOST: Final = 50
AGAIN_SECONDS: Final = 1.0
AWAY_SECONDS: Final = 1.0  # at the end; what is not recorded then is attempted again, marked


class _Line:
    """Attempts for one destination that wait for an upstream."""

    __slots__ = ("claimed", "new", "was_new")

    def __init__(self) -> None:
        self.new: deque[Attempt] = deque()
        self.claimed: deque[Attempt] = deque()
        self.was_new = True

    def __bool__(self) -> bool:
        return bool(self.new or self.claimed)

    def next(self) -> Attempt:
        """Take out the next one: new and claimed ones take turns."""
        self.was_new = bool(self.new) and not (self.was_new and self.claimed)
        return (self.new if self.was_new else self.claimed).popleft()

    def take_late(self, before: float) -> Sequence[Attempt]:
        """Take out those that came before a moment of the monotonic clock."""
        late = []
        for some in (self.new, self.claimed):
            while some and some[0].in_line_since < before:
                late.append(some.popleft())
        return late


class Runner:
    """Attempts deliveries.

    Args:
        relay: gives each recipient its own verdict, and notifies its observer of each attempt.
        chance: a number from 0 to 1, for jitter.

    Attributes:
        counts, oldest, company: the spool a few seconds ago, its oldest messages, and the gateways that share it, for
            people.
    """

    def __init__(
        self,
        store: Store,
        relay: Relay,
        notices: Notices,
        schedule: Schedule,
        observer: Observer,
        *,
        most_at_once: int = MOST_AT_ONCE,
        look_seconds: float = LOOK_SECONDS,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._relay = relay
        self._observer = observer
        self._most_at_once = most_at_once
        self._look_seconds = look_seconds
        self._recording = Recording(store, observer)
        self._means = Means(
            store, relay, notices, self._recording, observer,
            retry_in=lambda attempt: schedule.next_delay(attempt, chance()),
            wake=self.wake, judged=self._judged, ended=self._ended,
            holds=None if store.look_again_seconds is None else store.holds,
        )  # fmt: skip
        self._aging = Aging(
            store, notices, self._recording, observer, warn_after_seconds=schedule.warn_after_seconds, wake=self.wake
        )
        self._destinations: set[str] = set()
        # By destination, including those in line and those not recorded yet: new ones, durable or not; and claimed
        # ones.
        self._new: Counter[str] = Counter()
        self._claimed: Counter[str] = Counter()
        self._all_new = self._all_claimed = 0
        self._attempting: Counter[str] = Counter()  # those at work with an upstream
        self._windows: dict[str, int] = {}  # the upstreams' windows at the last look for room
        self._lines: dict[str, _Line] = {}  # those that wait for that
        self._line_timer: asyncio.TimerHandle | None = None
        self._slow_until: dict[str, float] = {}
        self._has_backlog: set[str] = set()
        self._attempts: set[Attempt] = set()
        self._wake = asyncio.Event()
        self._has_become_idle: asyncio.Event | None = None  # waited for at the end
        self._look_is_due = True
        self._loop_task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._has_stopped = False
        self._noting: set[asyncio.Task[None]] = set()
        self._counted_at = float("-inf")
        self._has_changed = True
        self._is_away = False
        self.counts = Counts()
        self.oldest: Sequence[MessageView] = ()
        self.company: Company | None = None

    def report_outcomes(self, outcomes: "Outcomes") -> None:
        """From now on, store with each end its outcome for the application."""
        self._means.outcomes = self._aging.outcomes = outcomes

    # Life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to work on the spool.

        Raises:
            SpoolError: it cannot be read.
        """
        self._relay.watch_room(self._wake.set)
        self._store.watch(self)
        self._destinations.update(await self._store.destinations())
        self._loop_task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self, *, grace_seconds: float) -> None:
        """Begin nothing more, and let attempts under way end within the grace period. Idempotent."""
        self._is_stopping = self._recording.is_stopping = True
        if self._loop_task is not None:
            # A claim, or an expiry, under way must end: otherwise its leases would be unknown.
            self._wake.set()
            await asyncio.wait({self._loop_task}, timeout=min(grace_seconds, CONNECTION_GRACE_SECONDS))
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
            self._loop_task = None
        if self._line_timer is not None:
            self._line_timer.cancel()
        for destination in list(self._lines):
            self._give_line_back(destination)
        ends = asyncio.get_running_loop().time() + grace_seconds
        await self._idle_until(min(ends, ends - grace_seconds + CONNECTION_GRACE_SECONDS))
        # Attempts that wait for a connection, or for a provider's rate, might take all of the grace period. Nothing has
        # been sent yet.
        await self._cut_short([attempt for attempt in self._attempts if attempt.has_said_nothing])
        await self._idle_until(ends)
        self._has_stopped = True
        await self._cut_short(list(self._attempts))

    async def _cut_short(self, attempts: Sequence[Attempt]) -> None:
        """End these attempts, and wait for their records; for a store that is away only for a moment."""
        if attempts:
            await asyncio.wait(
                [asyncio.ensure_future(attempt.cut_short()) for attempt in attempts],
                timeout=AWAY_SECONDS if isinstance(self._store.refusal(), StorageAway) else None,
            )

    async def _idle_until(self, ends: float) -> None:
        """Wait, at most until then, for the end of all attempts, including those whose message is becoming durable."""
        if not self._is_idle:
            self._has_become_idle = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(ends):
                    await self._has_become_idle.wait()

    @property
    def _is_idle(self) -> bool:
        return not self._attempts and not self._all_new

    def _tell_if_idle(self) -> None:
        if self._has_become_idle is not None and self._is_idle:
            self._has_become_idle.set()

    # For the forwarders --------------------------------------------------------------------------

    def reserve(self, destinations: Sequence[str]) -> bool:
        """See `DeliveryAgent.reserve`."""
        if self._is_stopping:
            return False
        for destination in destinations:
            if not self._has_room_for_new(destination):
                return False
        for destination in destinations:
            self._destinations.add(destination)
            self._new[destination] += 1
        self._all_new += len(destinations)
        return True

    def _has_room_for_new(self, destination: str) -> bool:
        window = self._windows[destination] = self._relay.concurrency(destination)
        if window <= 1:
            return self._is_free(destination, window) and destination not in self._has_backlog
        windows = NEW_WINDOWS if destination not in self._slow_until else self._windows_of_slow(destination)
        return self._all_new < MOST_NEW and self._new[destination] < windows * window

    def _is_free(self, destination: str, window: int) -> bool:
        """Whether one may begin with a window of at most one: with a rate limit that may last an hour, or after a
        backoff. None waits in line then: it might take long.
        """
        return self._new[destination] + self._claimed[destination] < window

    def _windows_of_slow(self, destination: str) -> int:
        if time.monotonic() < self._slow_until[destination]:
            return 1
        del self._slow_until[destination]
        return NEW_WINDOWS

    def begin(self, destinations: Sequence[str], leases: Sequence[Lease], content: Sequence[bytes] | None) -> None:
        """See `DeliveryAgent.begin`."""
        if len(leases) < len(destinations):
            leased = {lease.destination for lease in leases}
            for destination in destinations:
                if destination not in leased:
                    self._new[destination] -= 1
                    self._all_new -= 1
            self._tell_if_idle()
        for lease in leases:  # each has the room of its destination
            if self._has_stopped:
                self._give_back(lease, is_new=True)
            else:
                self._begin(lease, content, is_new=True)
        if not self._has_changed:
            self._count_soon()

    def wake(self, destinations: Sequence[str] = ()) -> None:
        """See `DeliveryAgent.wake`."""
        self._destinations.update(destinations)
        self._has_changed = True
        self._wake.set()

    def note(self, deed: str) -> None:
        """Record in the log and in the message's trace that an operator has changed it."""
        try:
            Deed.parse(deed).note(self._observer)
        except ValueError:
            logger.warning("operator action not understood", exc_info=True)

    def note_crashes(self, message_ids: Sequence[str]) -> None:
        """The same for messages held because they were being delivered during too many crashes."""
        noting = asyncio.get_running_loop().create_task(self._note_crashes(message_ids))
        self._noting.add(noting)
        noting.add_done_callback(self._noting.discard)

    async def _note_crashes(self, message_ids: Sequence[str]) -> None:
        for message_id in message_ids:
            try:
                note_crashes(await self._store.show(message_id), self._observer)
            except SpoolError as error:
                extra = {"spool_id": message_id, "fault": str(error)}
                logger.critical("message held: being delivered during repeated crashes", extra=extra)

    def look_soon(self) -> None:
        """An operator expired messages: end them now."""
        self._look_is_due = True
        self._wake.set()

    # The loop ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        looked_at = float("-inf")
        while not self._is_stopping:
            self._wake.clear()
            now = time.monotonic()
            try:
                if self._look_is_due or now - looked_at >= self._look_seconds:
                    self._look_is_due, looked_at = False, now
                    await self._aging.look(self.counts.total)
                wait_seconds = await self._begin_what_is_due()
                wait_seconds = min(wait_seconds, await self._count())
                self._is_away = False
            except SpoolError as error:
                if isinstance(error, StorageBroken):
                    logger.critical("queue runner stopped: the spool failed", extra={"fault": str(error)})
                    return
                if not (isinstance(error, StorageAway) and self._is_away):
                    logger.error("spool unavailable; retrying", extra={"fault": str(error)})
                self._is_away = isinstance(error, StorageAway)
                wait_seconds = AGAIN_SECONDS
            except Exception:
                logger.exception("queue runner failed; retrying")
                wait_seconds = AGAIN_SECONDS
            await self._sleep(min(wait_seconds, max(0.0, looked_at + self._look_seconds - time.monotonic())))

    async def _sleep(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _begin_what_is_due(self) -> float:
        """Begin as many attempts as there is room for; returns seconds until there may be more."""
        rooms = {destination: self._room(destination) for destination in self._destinations}
        wanted = {destination: room for destination, room in rooms.items() if room > 0}
        if not wanted:
            # The end of an attempt, which wakes us, makes room, or the end of an upstream's backoff.
            return BLOCKED_POLL_SECONDS
        claimed, due_in = await self._store.claim(wanted)
        found = Counter(lease.destination for lease, _ in claimed)
        for destination, most in wanted.items():
            (self._has_backlog.add if found[destination] == most else self._has_backlog.discard)(destination)
        for lease, content in claimed:
            self._destinations.add(lease.destination)
            self._claimed[lease.destination] += 1
            self._all_claimed += 1
            if self._is_stopping:
                self._give_back(lease, is_new=False)
            else:
                self._begin(lease, content, is_new=False)
        if claimed:
            return 0.0
        waits = [self._look_seconds]
        if len(wanted) < len(rooms):
            waits.append(BLOCKED_POLL_SECONDS)
        if self._store.look_again_seconds is not None:
            waits.append(self._store.look_again_seconds)
        if due_in is not None:
            # Due deliveries that were not leased are too old; the next look expires them.
            waits.append(due_in if due_in > 0 else BLOCKED_POLL_SECONDS)
        return min(waits)

    def _room(self, destination: str) -> int:
        """How many may be claimed, by destination. New ones never take more than half of the room."""
        window = self._windows[destination] = self._relay.concurrency(destination)
        if window <= 1:
            return int(self._is_free(destination, window) and self._all_claimed < self._most_at_once)
        room = window - self._claimed[destination] - min(self._new[destination], window // 2)
        return max(0, min(room, self._most_at_once - self._all_claimed))

    def _begin(self, lease: Lease, content: Sequence[bytes] | None, *, is_new: bool) -> None:
        attempt = Attempt(lease, content, self._means, is_new=is_new)
        self._attempts.add(attempt)
        destination = lease.destination
        attempting = self._attempting[destination]
        if attempting and attempting >= self._windows.get(destination, 0):
            line = self._lines.setdefault(destination, _Line())
            attempt.in_line_since = time.monotonic()
            (line.new if is_new else line.claimed).append(attempt)
            if self._is_stopping:
                self._give_line_back(destination)
            elif self._line_timer is None:
                self._line_timer = asyncio.get_running_loop().call_later(LINE_SECONDS, self._look_at_lines)
        else:
            self._attempting[destination] = attempting + 1
            attempt.start()

    def _give_back(self, lease: Lease, *, is_new: bool) -> None:
        """The runner stops, and nothing of this has been sent."""
        attempt = Attempt(lease, None, self._means, is_new=is_new)
        self._attempts.add(attempt)
        attempt.give_back()

    def _judged(self, attempt: Attempt) -> None:
        """An attempt is done with its upstream: the first in line may have it."""
        destination = attempt.lease.destination
        self._attempting[destination] -= 1
        if destination in self._lines:
            # Not at once: its connection is only about to be released.
            asyncio.get_running_loop().call_soon(self._serve_line, destination)

    def _serve_line(self, destination: str) -> None:
        line = self._lines.get(destination)
        if line is None:
            return
        room = self._relay.concurrency(destination)
        while line and self._attempting[destination] < room:
            self._attempting[destination] += 1
            line.next().start()
        if not line:
            del self._lines[destination]
        elif not self._attempting[destination]:  # mail that waits for an upstream's backoff waits in the store
            self._give_line_back(destination)

    def _give_line_back(self, destination: str) -> None:
        line = self._lines.pop(destination)
        while line:
            line.next().give_back()

    def _look_at_lines(self) -> None:
        """Let no attempt wait in line for long."""
        self._line_timer = None
        now = time.monotonic()
        for destination, line in list(self._lines.items()):
            late = line.take_late(now - LINE_SECONDS)
            if late:  # others would only be given back as well
                self._slow_until[destination] = now + SLOW_SECONDS
            if not line:
                del self._lines[destination]
            for attempt in late:
                attempt.give_back()
        if self._lines:
            self._line_timer = asyncio.get_running_loop().call_later(LINE_SECONDS / 2, self._look_at_lines)

    def _ended(self, attempt: Attempt) -> None:
        destination = attempt.lease.destination
        self._attempts.discard(attempt)
        if attempt.is_new:
            self._new[destination] -= 1
            self._all_new -= 1
        else:
            self._claimed[destination] -= 1
            self._all_claimed -= 1
        if not self._has_changed:
            self._count_soon()
        if self._has_become_idle is not None:
            self._tell_if_idle()
        if destination in self._has_backlog and self._room(destination) > self._relay.concurrency(destination) // 4:
            self._wake.set()  # a few at a time: each query of the store costs as much as some deliveries

    def _count_soon(self) -> None:
        """Have the spool counted in a while, as it has changed: an idle loop would sleep for a minute."""
        self._has_changed = True
        asyncio.get_running_loop().call_later(COUNT_SECONDS, self._wake.set)

    async def _count(self) -> float:
        """Look at the spool as a whole, now and then; returns seconds until the next time."""
        since = time.monotonic() - self._counted_at
        if since < COUNT_SECONDS:
            return COUNT_SECONDS - since if self._has_changed else self._look_seconds
        await self.look()
        return self._look_seconds

    async def look(self) -> None:
        """Look at the spool as a whole: update `counts`, `oldest` and `company`.

        Raises:
            SpoolError: it cannot be read.
        """
        # Others change a shared queue, and bring mail for destinations unknown to this process.
        is_shared = self._store.look_again_seconds is not None
        self._counted_at, self._has_changed = time.monotonic(), is_shared
        if is_shared:
            self._destinations.update(await self._store.destinations(known=self._destinations))
        self.counts = await self._store.counts()
        self.oldest = await self._store.page("", SHOWN_MOST)
        self.company = await self._store.company()
