"""Incarnations: a gateway process reports that it is alive, and knows until when its leases are valid.

Leases belong to an incarnation, a random name that is never reused. While its beats are answered, no peer takes them; a
gateway silent for the take-over time is declared dead by a peer, which continues its deliveries. Past `ok_until` a
gateway cannot know whether that has happened: it begins no attempt, and sends no content.
"""

import asyncio
import contextlib
import json
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from otel_smtp.spool.messages import Departure, SpoolError, StorageAway
from otel_smtp.spool.postgresql.connecting import (
    Connection,
    LastingConnection,
    QueueLocation,
    ServerFacts,
    close,
    is_of_replica,
    storage_error,
)
from otel_smtp.spool.postgresql.statements import Statements

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.beats")

BEAT_SECONDS: Final = 2.0
CLOCK_STEP_SECONDS: Final = 2.0
MARGIN: Final = 0.2  # of the take-over time
CRASHES_ALLOWED: Final = 3
PERMITS_SECONDS: Final = 60.0
"""How long a dead gateway's permit in flight still counts before it leaves the window of its limit: as long as a reply
to its mail may take.
"""
SLOTS_SECONDS: Final = 5.0
"""How long slots that a gateway still had when it left stay unavailable to others."""
DEPARTURES_KEPT: Final = 20
_GONE: Final = "gone "


def channel(place: QueueLocation) -> str:
    """The channel on which the processes of one queue notify each other of changes."""
    return f"otel_smtp_{place.schema}"[:63]


class Beats:
    """The life of one gateway, as the others see it.

    Args:
        name: of this process in telemetry, for people.
        heard: called with messages of the queue's other processes.
        taken_over: called with the number of deliveries taken over, and the ids of messages now held.
        reached: called with each connection, with when its server was started.

    Attributes:
        incarnation: a new one after this gateway was declared dead.
        ok_until: in seconds of the monotonic clock; before it, this incarnation's leases are certainly valid.
        stat: the housekeeper's counts.
        gateways: how many are alive.
        is_housekeeper: this gateway does the work that only one must do.
        departures: gateways that left since this one's start, the latest first.
    """

    def __init__(
        self,
        place: QueueLocation,
        statements: Statements,
        *,
        name: str,
        version: str,
        heard: Callable[[str], None],
        taken_over: Callable[[int, Sequence[str]], None],
        reached: Callable[[str], None],
    ) -> None:
        self._place = place
        self._statements = statements
        self._name = name
        self._version = version
        self._heard = heard
        self._channel = channel(place)
        self._taken_over = taken_over
        self._reached = reached
        self.line = LastingConnection(place, "beats", self._made)
        self._interval = min(BEAT_SECONDS, place.takeover_seconds * MARGIN)
        self._margin = place.takeover_seconds * MARGIN
        self.ok_until = float("-inf")
        self._unbroken_since: float | None = None
        self._clocks: tuple[float, float] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_away = False
        self._fault: type[SpoolError] | None = None  # the kind that was logged last
        self._is_leaving = asyncio.Event()
        self._is_heard = False
        self.incarnation = uuid.uuid4()
        self.stat: Mapping[str, Any] = {}
        self.gateways = 0
        self.is_housekeeper = False
        self.departures: deque[Departure] = deque(maxlen=DEPARTURES_KEPT)

    def holds(self, incarnation: uuid.UUID | None) -> bool:
        """Whether the leases of an incarnation are certainly valid now."""
        # Identity suffices, as our leases hold this very object; its comparison is a Python function.
        return incarnation is self.incarnation and time.monotonic() < self.ok_until

    @property
    def silent_for(self) -> float:
        """Seconds without an answered beat, beyond what leases allow."""
        return max(0.0, time.monotonic() - self.ok_until)

    async def start(self) -> None:
        """Enter the queue.

        Raises:
            SpoolError: the queue cannot be used.
        """
        connection = await self.line.get()
        await self._enter(connection)
        await self._beat(connection)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def leave(self, seconds: float) -> None:
        """Give leases back, and leave, within `seconds`. Idempotent."""
        if self._task is not None:
            self._is_leaving.set()
            ends = asyncio.get_running_loop().time() + seconds
            await asyncio.wait({self._task}, timeout=seconds)
            if not self._task.done():
                self.line.terminate()
                self._task.cancel()  # while it connects, or after its connection: this cancels no statement
                await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
            connection = None
            try:
                async with asyncio.timeout_at(ends):
                    connection = await self.line.get()
                watchdog = asyncio.get_running_loop().call_at(ends, self.line.terminate)
                try:
                    await connection.execute(self._statements.land_permits, [self.incarnation], PERMITS_SECONDS)
                    await connection.execute(self._statements.leave_slots, self.incarnation, SLOTS_SECONDS)
                    await connection.execute(self._statements.leave, self.incarnation, self._channel, _GONE)
                finally:
                    watchdog.cancel()
            except Exception as error:  # noqa: BLE001 - it is logged
                logger.warning(
                    "leaving the queue failed; peers take over later",
                    extra={"fault": str(storage_error(error))},
                )
            finally:
                await close(connection)
        self.ok_until = float("-inf")
        await self.line.close()

    def _made(self, connection: Connection, facts: ServerFacts) -> None:
        self.is_housekeeper = self._is_heard = False
        self._reached(facts.started_at)

    async def _enter(self, connection: Connection) -> None:
        sent = time.monotonic()
        try:
            await connection.execute(
                self._statements.enter, self.incarnation, self._name, self._version, self._place.takeover_seconds
            )
        except Exception as error:
            raise storage_error(error) from error
        self.ok_until = sent + self._place.takeover_seconds - self._margin

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_leaving.is_set():
            began = time.monotonic()
            watchdog = loop.call_later(self._place.takeover_seconds / 2, self.line.terminate)
            try:
                connection = await self.line.get()
                await self._beat(connection)
            except Exception as error:  # noqa: BLE001 - it is logged
                if is_of_replica(error):
                    self.line.terminate()
                self._broken(storage_error(error))
                wait = self.line.next_wait()
            else:
                if self._is_away:
                    self._is_away = False
                    self.line.forget_faults()
                    logger.warning("queue database recovered")
                wait = began + self._interval - time.monotonic()
            finally:
                watchdog.cancel()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, wait)):
                    await self._is_leaving.wait()

    def _broken(self, error: SpoolError) -> None:
        self._unbroken_since = None
        # A schema that is too new, or a password that was changed, is another fault than the broken connection before.
        if not self._is_away or type(error) is not self._fault:
            self._is_away, self._fault = True, type(error)
            logger.error("queue database unavailable", extra={"fault": str(error)})

    async def _beat(self, connection: Connection) -> None:
        sent = time.monotonic()
        row = await connection.fetchrow(self._statements.beat, self.incarnation, self._place.takeover_seconds)
        if row is None:
            logger.error(
                "this gateway was silent for too long; peers took over its mail",
                extra={"incarnation": str(self.incarnation)},
            )
            self.incarnation = uuid.uuid4()
            self._unbroken_since = None
            await self._enter(connection)
            return
        self.ok_until = sent + self._place.takeover_seconds - self._margin
        self.stat = json.loads(row["stat"]) if row["stat"] is not None else {}
        self.gateways = row["gateways"]
        self._note_clocks(sent, row["clock"])
        if not self.is_housekeeper and self.line.facts is not None:
            self.is_housekeeper = await connection.fetchval(
                "SELECT pg_try_advisory_lock(hashtextextended('otel_smtp ' || $1, 0))", self.line.facts.installation
            )
        if not self._is_heard:
            await connection.add_listener(self._channel, lambda *heard: self._hear(str(heard[-1])))
            self._is_heard = True
        if row["dead"] and self._may_take_over(sent):
            await self._take_over(connection)

    def _note_clocks(self, monotonic: float, clock: float) -> None:
        """A step of the database's clock moves the ends of all leases, which must not make any gateway look dead."""
        before, self._clocks = self._clocks, (monotonic, clock)
        if before is not None and abs((clock - before[1]) - (monotonic - before[0])) > CLOCK_STEP_SECONDS:
            logger.warning("database clock jumped")
            self._unbroken_since = None
        if self._unbroken_since is None:
            self._unbroken_since = monotonic

    def _may_take_over(self, now: float) -> bool:
        # After an outage of the database, every gateway gets time to return first.
        return self._unbroken_since is not None and now - self._unbroken_since >= self._place.takeover_seconds

    async def _take_over(self, connection: Connection) -> None:
        async with connection.transaction():
            dead = await connection.fetch(self._statements.bury, self.incarnation, self._place.takeover_seconds)
            if not dead:
                return
            ids = [row["id"] for row in dead]
            taken = await connection.fetch(
                self._statements.take_over, CRASHES_ALLOWED, ids,
                [row["name"] for row in dead], [row["silent"] for row in dead],
            )  # fmt: skip
            held = sorted({row["msg_id"] for row in taken if row["state"] == "h"})
            if held:
                await connection.execute(self._statements.hold_messages, held)
            await connection.execute(self._statements.free_slots, ids)
            await connection.execute(self._statements.land_permits, ids, PERMITS_SECONDS)
            deliveries = Counter(row["dead"] for row in taken)
            await connection.execute(
                self._statements.tell_gone, self._channel, _GONE, self._name, ids,
                [row["name"] for row in dead], [row["silent"] for row in dead], [deliveries[one] for one in ids],
            )  # fmt: skip
        for row in dead:
            logger.warning(
                "silent gateway declared dead; its mail taken over",
                extra={
                    "gateway": row["name"], "seconds": round(row["silent"], 1), "deliveries": deliveries[row["id"]],
                },
            )  # fmt: skip
        self._taken_over(len(taken), held)

    def _hear(self, what: str) -> None:
        if not what.startswith(_GONE):
            self._heard(what)
            return
        try:
            gone, name, silent, deliveries, found_by = json.loads(what.removeprefix(_GONE))
        except (ValueError, TypeError):  # a newer program's
            return
        self.departures.appendleft(Departure(gone, name, time.time(), silent, deliveries, found_by))

    def refusal(self) -> SpoolError | None:
        """Why no mail can be accepted now."""
        if time.monotonic() < self.ok_until:
            return None
        return StorageAway("queue database unavailable")
