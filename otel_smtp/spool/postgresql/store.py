"""The store in a PostgreSQL database that several gateways share.

It consists of parts, each of which knows only those before it:

    schema      the tables, and how a database gets them
    statements  all SQL of the verbs
    connecting  connections, checked and made again; what their failures mean
    lanes       group commit, and what is done about commits whose outcome is unknown
    rows        messages, deliveries and leases as rows
    beats       who lives; take-over
    working     one connection for all that does not come in groups
    limits      rates that all gateways keep together
    vacuum      whether vacuum keeps up

The class is put together from those that are below, by what they are asked for:

    recording    results of attempts
    submitting  messages in
    leasing     deliveries out
    operating   what operators see and do

A gateway has seven connections: two that accept, two that record, one for large contents, one for beats, and one for
claims and all the rest; and an eighth one where mail is held to limits.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from otel_smtp.spool.messages import (
    MOST_TIMINGS,
    ContentLost,
    ContentRef,
    ShareOfQueue,
    SpoolError,
    StorageAway,
    StorageBusy,
    StorageFull,
    StoreVerb,
    Timing,
)
from otel_smtp.spool.postgresql.beats import PERMITS_SECONDS, Beats
from otel_smtp.spool.postgresql.connecting import Connection, LastingConnection, QueueLocation
from otel_smtp.spool.postgresql.draft import CHUNK_OCTETS
from otel_smtp.spool.postgresql.lanes import Lanes
from otel_smtp.spool.postgresql.leasing import PostgresqlLeasing
from otel_smtp.spool.postgresql.limits import SLOTS, DatabaseLedger
from otel_smtp.spool.postgresql.operating import DEED, HeardDeeds, PostgresqlOperating
from otel_smtp.spool.postgresql.parts import Figures
from otel_smtp.spool.postgresql.rows import Row, key_of
from otel_smtp.spool.postgresql.statements import Statements
from otel_smtp.spool.postgresql.submitting import PostgresqlSubmitting
from otel_smtp.spool.postgresql.vacuum import VacuumWatch
from otel_smtp.spool.postgresql.working import Working
from otel_smtp.spool.store import Rebuilt, Recovery, Woken

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.store")

DEFAULT_MOST_MESSAGES: Final = 1_000_000
MOST_WAITING: Final = 1024
LOOK_AGAIN_SECONDS: Final = 1.0
KEEP_SECONDS: Final = 2.0
FOLD_SECONDS: Final = 60.0
CLOSE_SECONDS: Final = 10.0  # for each step of the end, as long as the database answers
AWAY_SECONDS: Final = 1.0  # and where it does not: a process that takes too long to end is killed with all its spans


class PostgresqlStore(PostgresqlSubmitting, PostgresqlLeasing, PostgresqlOperating):
    """A store in a database.

    Args:
        name: of this process in telemetry.
        version: of this program.
        most_messages, most_octets: beyond these, new mail is refused; None: no bound. All gateways' mail of one beat
            may come on top.
        is_gateway: False: an operator's command, which takes no mail and no lease.

    Attributes:
        look_again_seconds, timings: see `Store`.
        ledger: keeps the limits of all gateways.
        figures: this gateway's counts.
    """

    look_again_seconds: float | None = LOOK_AGAIN_SECONDS
    piece_octets = CHUNK_OCTETS

    def __init__(
        self,
        place: QueueLocation,
        *,
        name: str = "otel-smtp",
        version: str = "",
        most_messages: int = DEFAULT_MOST_MESSAGES,
        most_octets: int | None = None,
        is_gateway: bool = True,
    ) -> None:
        self._place = place
        self._most_messages = most_messages
        self._most_octets = most_octets
        self._is_gateway = is_gateway
        self._statements = statements = Statements(place.schema)
        self.beats = Beats(
            place, statements, name=name, version=version,
            heard=self._heard, taken_over=self._took_over, reached=self._leave_former,
        )  # fmt: skip
        self.timings = timings = deque[Timing](maxlen=MOST_TIMINGS)
        self._accepting = Lanes(
            [LastingConnection(place, f"accepts {number}") for number in (0, 1)],
            self._write_submissions,
            self._gave_up_submission,
            verb=StoreVerb.SUBMIT,
            timings=timings,
        )
        self._large = Lanes(
            [LastingConnection(place, "large contents")],
            self._write_large,
            self._gave_up_submission,
            verb=StoreVerb.SUBMIT,
            timings=timings,
            most_items=1,
        )
        self._recording = Lanes(
            [LastingConnection(place, f"records {number}") for number in (0, 1)],
            self._write_results,
            self._gave_up_result,
            verb=StoreVerb.FINISH,
            timings=timings,
        )
        # An operator's session that only reads needs no further rights.
        self._working = Working(place, "claims" if is_gateway else "command", timings=timings, checks_rights=is_gateway)
        self.ledger = DatabaseLedger(place, statements, self.beats, timings)
        self._vacuum = VacuumWatch(statements, self._working)
        self._is_open = False
        self._woken = None
        self._heard_deeds = HeardDeeds()
        self._keeper: asyncio.Task[None] | None = None
        self._ending = set()
        self._held = {}
        self._unknown_results = set()
        self._not_asked_for = (set(), set())
        self._withdrawn = {}
        self.figures = Figures()

    # Life ------------------------------------------------------------------------------------------------------

    async def open(self) -> Recovery:
        """Check the database, and enter as a gateway.

        Raises:
            SpoolError: it cannot be used; the text says why, and what to do.
        """
        remarks: list[str] = []
        backends = await self._working.open()
        facts = self._working.facts
        if not facts.version.startswith("PostgreSQL "):
            remarks.append(f"{facts.version}: untested; this program is tested with PostgreSQL")
        if not facts.has_standby:
            remarks.append(
                "the database has no synchronous standby: mail survives a crash of its server, "
                "and not the loss of its machine"
            )
        if self._is_gateway:
            try:
                await self.beats.start()
                assert self.beats.line.facts is not None
                if self.beats.line.facts.backend == backends:
                    raise SpoolError(
                        "connections to the database are pooled by transaction, which loses locks and prepared "
                        "statements; connect directly, or pool by session"
                    )
                messages = await self.messages()
            except BaseException:
                await self.beats.leave(CLOSE_SECONDS)
                await self._working.close(CLOSE_SECONDS)
                raise
            self._accepting.start()
            self._large.start()
            self._recording.start()
            self._keeper = asyncio.get_running_loop().create_task(self._keep())
        else:
            messages = 0
        self._is_open = True
        return Recovery(messages=messages, remarks=remarks)

    async def close(self) -> None:
        """Finish pending verbs, give leases back, and leave. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        is_away = self.beats.refusal() is not None
        seconds = AWAY_SECONDS if is_away else CLOSE_SECONDS
        if self._ending:
            await asyncio.wait(self._ending)
        await asyncio.gather(*(lanes.close(seconds) for lanes in (self._accepting, self._large, self._recording)))
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        if self._withdrawn and not is_away:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._withdraw()
        for message_id in self._withdrawn:
            self._tell_unanswered(message_id, "message may be stored")
        await asyncio.gather(self.ledger.close(seconds), self._working.close(seconds))
        await self.beats.leave(seconds)

    def watch(self, woken: Woken) -> None:
        """See `Store.watch`."""
        self._woken = woken

    def _heard(self, what: str) -> None:
        if what.startswith(SLOTS):
            self.ledger.hear(what)
            return
        if self._woken is None:
            return
        if not what.startswith(DEED):
            self._woken.look_soon() if what == "look" else self._woken.wake()
        elif self.beats.is_housekeeper and (deed := self._heard_deeds.hear(what)) is not None:
            self._woken.note(deed)  # by one of the gateways, so that there is one line and one span

    def _leave_former(self, started_at: str) -> None:
        """Beats, the first to find that a server is silent, have reached the one that was started then."""
        for one in (self._accepting, self._large, self._recording, self._working, self.ledger):
            one.leave_former(started_at)

    def _took_over(self, deliveries: int, held: Sequence[str]) -> None:
        self.figures.taken_over += deliveries
        if self._woken is None:
            for message_id in held:
                logger.critical("message held: being delivered during repeated crashes", extra={"spool_id": message_id})
        elif deliveries:
            self._woken.wake()
            self._woken.note_crashes(held)

    def refusal(self) -> SpoolError | None:
        """See `Store.refusal`."""
        if not self._is_open:
            return StorageAway("the queue is closed")
        if (away := self.beats.refusal()) is not None:
            return away
        stat = self.beats.stat
        if stat.get("messages", 0) >= self._most_messages:
            return StorageFull(f"the queue holds {stat['messages']} messages already")
        if self._most_octets is not None and stat.get("octets", 0) >= self._most_octets:
            return StorageFull(f"the queue holds {stat['octets']} octets already")
        if self._accepting.is_slow or self._accepting.waiting + self._large.waiting > MOST_WAITING:
            return StorageBusy("the queue's database does not keep up")
        return None

    def alarm(self) -> str | None:
        """See `Store.alarm`: a database sets nothing aside."""
        return None

    async def _keep(self) -> None:
        folded_at = time.monotonic()
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            try:
                await self._withdraw()
                if self.beats.is_housekeeper:
                    await self.note_stat()
                    await self._vacuum.look()
                    if time.monotonic() - folded_at >= FOLD_SECONDS:
                        folded_at = time.monotonic()
                        await self._fold()
            except SpoolError:
                pass  # beats report it
            except Exception:
                logger.exception("queue housekeeping failed; retrying")

    async def _fold(self) -> None:
        async def fold(connection: Connection) -> Sequence[Row]:
            await connection.execute(self._statements.fold_tallies, UUID(int=0))
            await connection.execute(self._statements.land_orphans, self.beats.incarnation, PERMITS_SECONDS)
            await connection.execute(self._statements.free_orphaned_slots, self.beats.incarnation)
            return await connection.fetch(self._statements.free_orphans)

        if orphans := await self._working.do(fold):
            logger.error(
                "orphaned leases freed: internal error",
                extra={"spool_ids": sorted({row["msg_id"] for row in orphans})},
            )

    # Contents --------------------------------------------------------------------------------------------------

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """See `Store.read`."""
        message_id = key_of(content).message_id
        octets = max(0, min(octets, content.octets - start))

        async def read(connection: Connection) -> bytes:
            row = await connection.fetchrow(self._statements.read, message_id, start, octets)
            if row is None:
                raise ContentLost(f"the content of {message_id} is gone")
            if not row["is_chunked"]:
                found: bytes = row["part"]
            else:
                first, last = start // CHUNK_OCTETS, (start + octets - 1) // CHUNK_OCTETS
                chunks = await connection.fetch(self._statements.read_chunks, message_id, first, last)
                found = b"".join(chunk["data"] for chunk in chunks)[start - first * CHUNK_OCTETS :][:octets]
            if len(found) != octets:
                raise ContentLost(f"not all of the content of {message_id} is there")
            return found

        part: bytes = await self._working.do(read, StoreVerb.READ)
        return part

    async def is_intact(self, content: ContentRef) -> bool:
        """See `Store.is_intact`."""
        message_id = key_of(content).message_id
        return bool(
            await self._working.do(lambda connection: connection.fetchval(self._statements.is_intact, message_id))
        )

    # From the directory of one gateway ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Identifies this queue among all, once open."""
        return f"{self._working.facts.installation} {self._place.schema}"

    async def forget_moved(self, ids: Sequence[str]) -> None:
        """Drop the notes of these messages, which the other store no longer has."""
        await self._working.do(lambda connection: connection.execute(self._statements.forget_moved, ids))

    async def rebuild(self) -> Rebuilt:
        """See `Store.rebuild`: a database sets nothing aside."""
        return Rebuilt()

    def standing(self) -> ShareOfQueue | None:
        """See `Store.standing`."""
        if not self._is_open:
            return None
        beats, figures = self.beats, self.figures
        return ShareOfQueue(
            beats.is_housekeeper, beats.gateways, beats.silent_for, figures.taken_over, figures.stale,
            figures.unanswered,
        )  # fmt: skip

    async def housekeep(self) -> None:
        """See `Store.housekeep`: the database keeps the time; all other work is done between beats."""
