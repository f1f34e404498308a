"""The store in a PostgreSQL database that several gateways share.

The parts, each of which knows only those before it:

    schema      the tables, and how a database gets them
    statements  all SQL of the verbs
    connecting  connections, checked and made again; what their failures mean
    lanes       group commit, and what is done about commits whose outcome is unknown
    rows        messages, deliveries and leases as rows
    beats       who lives; take-over
    working     one connection for all that does not come in groups
    limits      rates that all gateways keep together
    vacuum      whether vacuum keeps up
    operators   what operators see and do

A gateway has seven connections: two that accept, two that record, one for large contents, one for beats, and one for
claims and all the rest; and an eighth one where mail is held to limits.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from otel_smtp.spool.messages import (
    Backlog,
    Company,
    ContentLost,
    ContentRef,
    Counts,
    End,
    Kind,
    Lease,
    MessageView,
    MovedMessage,
    NewMessage,
    ShareOfQueue,
    SpooledRecipient,
    SpoolError,
    StorageAway,
    StorageFull,
    Verdict,
    end_name,
    is_for_receiver,
    stale,
)
from otel_smtp.spool.postgresql.beats import PERMITS_SECONDS, Beats
from otel_smtp.spool.postgresql.connecting import Connection, LastingConnection, QueueLocation
from otel_smtp.spool.postgresql.draft import CHUNK_OCTETS, PostgresqlDraft
from otel_smtp.spool.postgresql.lanes import Lanes
from otel_smtp.spool.postgresql.limits import SLOTS, DatabaseLedger
from otel_smtp.spool.postgresql.operator_verbs import DEED, HeardDeeds, PostgresqlOperatorVerbs
from otel_smtp.spool.postgresql.rows import ContentKey, NewRows, Row, lease_of, new_leases, recipients_json
from otel_smtp.spool.postgresql.statements import Statements
from otel_smtp.spool.postgresql.vacuum import VacuumWatch
from otel_smtp.spool.postgresql.working import Working
from otel_smtp.spool.store import Draft as AnyDraft
from otel_smtp.spool.store import Notice, Recovery, Woken

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.store")

DEFAULT_MOST_MESSAGES: Final = 1_000_000
SUBMIT_SECONDS: Final = 30.0  # then 451; the client waits ten minutes for its reply
FINISH_SECONDS: Final = 10.0  # then the attempt asks again
CLOSE_SECONDS: Final = 10.0
MOST_WAITING: Final = 1024
LOOK_AGAIN_SECONDS: Final = 1.0
KEEP_SECONDS: Final = 2.0
FOLD_SECONDS: Final = 60.0
ADOPT_SECONDS: Final = 60.0  # how long a claim whose answer was lost may still be committed
MOST_CLAIMED: Final = 100

Claimed = tuple[Lease, Sequence[bytes] | None]


@dataclass(eq=False, slots=True)
class _Submission:
    """A message on its way in."""

    message: NewMessage
    draft: PostgresqlDraft
    is_leased: bool
    content: bytes | None
    octets: int
    deadline: float
    answer: "asyncio.Future[Sequence[Lease]]"
    may_be_done: bool = False


@dataclass(eq=False, slots=True)
class _Result:
    """What an attempt came to.

    Attributes:
        ended: recipients by the name of their end.
        left: those that have not ended.
        state: of the delivery from now on; None: all of it has ended.
    """

    lease: Lease
    ended: Mapping[str, int]
    left: Sequence[SpooledRecipient]
    state: str | None
    retry_in: float
    is_possible_duplicate: bool
    counts_attempt: bool
    notices: Sequence[Notice]
    octets: int
    deadline: float
    answer: "asyncio.Future[None]"
    may_be_done: bool = False

    @property
    def place(self) -> tuple[str, int]:
        """Message and delivery."""
        return self.lease.message_id, self.lease.delivery

    @property
    def is_alone(self) -> bool:
        """Whether its message ends with it."""
        return _key(self.lease.content).is_alone

    @property
    def is_simple(self) -> bool:
        """Whether one statement is enough."""
        return self.state is None and self.is_alone and not self.notices and len(self.ended) == 1


@dataclass(slots=True)
class Figures:
    """What happened at this gateway, for metrics.

    Attributes:
        stale: results that came too late.
        taken_over: deliveries of others that went on.
        unanswered: messages that may have been stored though their client was told 451.
    """

    stale: int = 0
    taken_over: int = 0
    unanswered: int = 0


def _key(content: ContentRef) -> ContentKey:
    assert isinstance(content.key, ContentKey)
    return content.key


class PostgresqlStore:
    """A store in a database.

    Args:
        name: of this process in telemetry.
        version: of this program.
        most_messages, most_octets: beyond, new mail is refused; None: never for that. What all gateways accept within
            a beat comes on top.
        is_gateway: False: an operator's command, which is no gateway: it takes no mail and no lease.

    Attributes:
        look_again_seconds: see `Store`.
        ledger: keeps the limits of all gateways.
        figures: what happened here.
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
        self.beats = Beats(place, statements, name=name, version=version, heard=self._heard, taken_over=self._took_over)
        self._accepting: Lanes[_Submission] = Lanes(
            [LastingConnection(place, f"accepts {number}") for number in (0, 1)],
            self._write_submissions,
            self._gave_up_submission,
        )
        self._large: Lanes[_Submission] = Lanes(
            [LastingConnection(place, "large contents")], self._write_large, self._gave_up_submission, most_items=1
        )
        self._recording: Lanes[_Result] = Lanes(
            [LastingConnection(place, f"records {number}") for number in (0, 1)],
            self._write_results,
            self._gave_up_result,
        )
        # An operator who only looks needs no more rights than that.
        self._working = Working(place, "claims" if is_gateway else "command", checks_rights=is_gateway)
        self.ledger = DatabaseLedger(place, statements, self.beats)
        self._operators = PostgresqlOperatorVerbs(place, statements, self._working, self.beats)
        self._vacuum = VacuumWatch(statements, self._working)
        self._is_open = False
        self._woken: Woken | None = None
        self._heard_deeds = HeardDeeds()
        self._keeper: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        # What this process knows to be its own, by message and delivery: whatever else the database says is ours comes
        # of a claim whose answer was lost.
        self._held: dict[tuple[str, int], int] = {}
        self._submitting: set[str] = set()
        self._unknown_results: set[tuple[str, int, int]] = set()
        self._withdrawn: dict[str, int] = {}
        self._adopt_until = float("-inf")
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
                messages = await self._operators.messages()
            except BaseException:
                await self.beats.leave()
                await self._working.close()
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
        """Finish what was asked for, give leases back, and leave. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        if self._ending:
            await asyncio.wait(self._ending)
        await asyncio.gather(self._accepting.close(), self._large.close(), self._recording.close())
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._withdraw()
        await self.ledger.close()
        await self.beats.leave()
        await self._working.close()

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
            self._woken.note(deed)  # by one of the gateways: there is one line and one span of it

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
        if self._accepting.waiting + self._large.waiting > MOST_WAITING:
            return StorageAway("the queue's database does not keep up")
        return None

    def alarm(self) -> str | None:
        """See `Store.alarm`: a database sets nothing aside."""
        return None

    def holds(self, lease: Lease) -> bool:
        """See `Store.holds`."""
        return self.beats.holds(_key(lease.content).incarnation)

    async def _keep(self) -> None:
        folded_at = time.monotonic()
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            try:
                await self._withdraw()
                if self.beats.is_housekeeper:
                    await self._operators.note_stat()
                    await self._vacuum.look()
                    if time.monotonic() - folded_at >= FOLD_SECONDS:
                        folded_at = time.monotonic()
                        await self._fold()
            except SpoolError:
                pass  # beats tell of it
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

    # Messages in -----------------------------------------------------------------------------------------------

    def draft(self) -> PostgresqlDraft:
        """See `Store.draft`."""
        return PostgresqlDraft()

    def submit(self, message: NewMessage, draft: AnyDraft, *, lease: bool) -> asyncio.Future[Sequence[Lease]]:
        """See `Store.submit`."""
        assert isinstance(draft, PostgresqlDraft)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Sequence[Lease]] = loop.create_future()
        if not self._is_open or not self._is_gateway:
            answer.set_exception(SpoolError("the queue is closed"))
            return answer
        chunks = draft.in_memory
        submission = _Submission(
            message, draft, lease, None if chunks is None else b"".join(chunks), draft.octets,
            time.monotonic() + SUBMIT_SECONDS, answer,
        )  # fmt: skip
        self._submitting.add(message.id)
        if submission.content is not None:
            self._accepting.add(submission)
        else:
            task = loop.create_task(self._submit_large(submission))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        return answer

    async def _submit_large(self, submission: _Submission) -> None:
        try:
            await submission.draft.end()
        except SpoolError as error:
            self._submitting.discard(submission.message.id)
            submission.draft.discard()
            if not submission.answer.done():
                submission.answer.set_exception(error)
        else:
            self._large.add(submission)

    async def _write_submissions(self, connection: Connection, lane: int, group: Sequence[_Submission]) -> None:
        incarnation = self.beats.incarnation
        rows = NewRows(incarnation, str(lane))
        for one in group:
            rows.add(
                one.message, one.octets, one.draft.digest, one.content,
                is_leased=one.is_leased, is_marked=one.may_be_done,
            )  # fmt: skip
        self._submitted(group, await connection.fetch(self._statements.submit, *rows.arguments), incarnation)

    async def _write_large(self, connection: Connection, lane: int, group: Sequence[_Submission]) -> None:
        (one,) = group
        incarnation = self.beats.incarnation
        rows = NewRows(incarnation, "large")
        rows.add(one.message, one.octets, one.draft.digest, None, is_leased=one.is_leased, is_marked=one.may_be_done)
        async with connection.transaction():
            found = await connection.fetch(self._statements.submit, *rows.arguments)
            for number in range((one.octets + CHUNK_OCTETS - 1) // CHUNK_OCTETS):
                await connection.execute(self._statements.chunk, one.message.id, number, await one.draft.chunk(number))
        self._submitted(group, found, incarnation)

    def _submitted(self, group: Sequence[_Submission], rows: Sequence[Row], incarnation: UUID) -> None:
        by_message: dict[str, list[Row]] = {}
        for row in rows:
            by_message.setdefault(row["msg_id"], []).append(row)
        for one in group:
            leases = new_leases(one.message, one.octets, by_message[one.message.id], incarnation)
            self._submitting.discard(one.message.id)
            one.draft.discard()
            for lease in leases:
                self._held[lease.message_id, lease.delivery] = lease.epoch
            if not one.answer.done():
                one.answer.set_result(leases)
            else:
                self._give_back(leases)
                leases = []
            if one.is_leased and not leases and self._woken is not None:
                self._woken.wake(list(one.message.deliveries))

    def _give_back(self, leases: Sequence[Lease]) -> None:
        """Nobody waits for these any more: they are attempted like others."""
        for lease in leases:
            self.finish(lease, (), counts_attempt=False)

    def _gave_up_submission(self, one: _Submission) -> None:
        self._submitting.discard(one.message.id)
        one.draft.discard()
        self._withdrawn[one.message.id] = one.message.attempts

    async def _withdraw(self) -> None:
        """Take back what may have been stored though its client was told that it was not."""
        for message_id, attempts in list(self._withdrawn.items()):

            async def withdraw(connection: Connection, message_id: str = message_id, attempts: int = attempts) -> None:
                async with connection.transaction():
                    placed = await connection.execute(
                        self._statements.withdraw_wait, self.beats.incarnation, message_id
                    )
                    row = await connection.fetchrow(
                        self._statements.withdraw, self.beats.incarnation, message_id, attempts
                    )
                    if row is not None and row["recipients"]:
                        await connection.execute(
                            self._statements.tally, self.beats.incarnation, "withdrawn", ["accepted"],
                            [-row["recipients"]],
                        )  # fmt: skip
                if row is None and placed.endswith(" 0"):
                    self.figures.unanswered += 1
                    logger.error(
                        "message stored although its client was told otherwise: it may arrive twice",
                        extra={"spool_id": message_id},
                    )

            try:
                await self._working.do(withdraw)
            except SpoolError:
                return  # beats tell of it; it is tried again
            self._withdrawn.pop(message_id, None)

    # Deliveries ------------------------------------------------------------------------------------------------

    async def claim(self, wanted: Mapping[str, int]) -> tuple[Sequence[Claimed], float | None]:
        """See `Store.claim`."""
        incarnation = self.beats.incarnation
        if not self.beats.holds(incarnation):
            raise StorageAway("queue database unavailable")
        found: list[Row] = []
        if time.monotonic() < self._adopt_until:
            found += await self._adopt(incarnation, {is_for_receiver(destination) for destination in wanted})
        for destination, most in wanted.items():
            try:
                claimed = await self._claim(incarnation, destination, min(most, MOST_CLAIMED))
            except StorageAway:
                # It may have been committed, or be in a moment.
                self._adopt_until = time.monotonic() + ADOPT_SECONDS
                if not found:
                    raise
                break
            found += sorted(claimed, key=lambda row: (row["place"], row["tried"]))
        leases = [(lease_of(row, incarnation), _small_content(row)) for row in found]
        for lease, _ in leases:
            self._held[lease.message_id, lease.delivery] = lease.epoch
        if len(leases) >= sum(wanted.values()):
            return leases, 0.0
        due_in = await self._next_due(list(wanted)) if not leases else 0.0
        return leases, due_in

    async def _claim(self, incarnation: UUID, destination: str, most: int) -> list[Row]:
        return await self._working.do(
            lambda connection: connection.fetch(self._statements.claim, incarnation, destination, most)
        )

    async def _next_due(self, destinations: Sequence[str]) -> float | None:
        due_in: float | None = await self._working.do(
            lambda connection: connection.fetchval(self._statements.next_due, destinations)
        )
        return None if due_in is None else max(0.0, due_in)

    async def _adopt(self, incarnation: UUID, are_outcomes: Container[bool]) -> Sequence[Row]:
        """Leases of ours that nobody here knows of.

        Args:
            are_outcomes: outcomes are claimed, mail is, or both: who sends the one must never be given the other.
        """
        known = [f"{message_id}/{delivery}" for message_id, delivery in self._held]
        rows: Sequence[Row] = await self._working.do(
            lambda connection: connection.fetch(self._statements.unknown_leases, incarnation, known)
        )
        return [
            row
            for row in rows
            if is_for_receiver(row["dest"]) in are_outcomes
            and row["id"] not in self._submitting
            and row["id"] not in self._withdrawn
            and (row["id"], row["d"]) not in self._held
        ]

    def finish(
        self,
        lease: Lease,
        verdicts: Sequence[Verdict],
        *,
        retry_in: float = 0.0,
        is_possible_duplicate: bool = False,
        counts_attempt: bool = True,
        hold: bool = False,
        notices: Sequence[Notice] = (),
        is_urgent: bool = True,
    ) -> asyncio.Future[None]:
        """See `Store.finish`."""
        by_number = {verdict.number: verdict for verdict in verdicts}
        ended: dict[str, int] = {}
        left: list[SpooledRecipient] = []
        for there in lease.recipients:
            verdict = by_number.get(there.number)
            if verdict is not None and verdict.end is not None:
                name = end_name(lease.kind, verdict.end)
                ended[name] = ended.get(name, 0) + 1
            elif verdict is not None and verdict.reply is not None:
                left.append(SpooledRecipient(there.number, there.recipient, str(verdict.reply)))
            else:
                left.append(there)
        state = None if not left else "h" if hold else "r"
        return self._record(
            lease, ended, left, state,
            retry_in=retry_in, is_possible_duplicate=is_possible_duplicate, counts_attempt=counts_attempt,
            notices=notices,
        )  # fmt: skip

    def _record(
        self,
        lease: Lease,
        ended: Mapping[str, int],
        left: Sequence[SpooledRecipient],
        state: str | None,
        *,
        retry_in: float = 0.0,
        is_possible_duplicate: bool = False,
        counts_attempt: bool = True,
        notices: Sequence[Notice] = (),
    ) -> asyncio.Future[None]:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._is_open:
            answer.set_exception(SpoolError("the queue is closed"))
            return answer
        result = _Result(
            lease, ended, left, state, retry_in, is_possible_duplicate, counts_attempt, notices,
            sum(len(content) for _, content in notices), time.monotonic() + FINISH_SECONDS, answer,
            (lease.message_id, lease.delivery, lease.epoch) in self._unknown_results,
        )  # fmt: skip
        self._recording.add(result)
        return answer

    async def _write_results(self, connection: Connection, lane: int, group: Sequence[_Result]) -> None:
        by_place = {one.place: one for one in group}
        if len(by_place) < len(group):
            # Two results of one lease: the second is too late.
            for one in group:
                await self._write_results(connection, lane, [one])
            return
        incarnation = self.beats.incarnation
        is_repeated = any(one.may_be_done for one in group)
        if not is_repeated and all(one.is_simple for one in group):
            sorted_group = _in_order(group)
            rows: Sequence[Row] = await connection.fetch(
                self._statements.end, incarnation,
                [one.lease.message_id for one in sorted_group], [one.lease.delivery for one in sorted_group],
                [one.lease.epoch for one in sorted_group],
                [next(iter(one.ended)) for one in sorted_group], [sum(one.ended.values()) for one in sorted_group],
                str(lane),
            )  # fmt: skip
        else:
            async with connection.transaction():
                rows = await self._write_mixed(connection, lane, _in_order(group), incarnation)
                if is_repeated:
                    # What is there already may be on the primary alone: a transaction that writes nothing waits for no
                    # standby.
                    name = end_name(Kind.MAIL, End.DELIVERED)
                    await connection.execute(self._statements.tally, incarnation, str(lane), [name], [0])
        done = {(row["msg_id"], row["d"]) for row in rows}
        for one in group:
            self._recorded(one, is_done=one.place in done)

    async def _write_mixed(
        self, connection: Connection, lane: int, group: Sequence[_Result], incarnation: UUID
    ) -> Sequence[Row]:
        statements = self._statements
        shared = sorted({one.lease.message_id for one in group if not one.is_alone})
        if shared:
            await connection.execute(statements.lock_messages, shared)
        over = [one for one in group if one.state is None]
        back = [one for one in group if one.state is not None]
        rows: list[Row] = []
        if over:
            rows += await connection.fetch(
                statements.end_deliveries, incarnation, [one.lease.message_id for one in over],
                [one.lease.delivery for one in over], [one.lease.epoch for one in over],
            )  # fmt: skip
        if back:
            rows += await connection.fetch(
                statements.put_back, incarnation, [one.lease.message_id for one in back],
                [one.lease.delivery for one in back], [one.lease.epoch for one in back],
                [one.state for one in back], [recipients_json(one.left) for one in back],
                [one.retry_in for one in back], [int(not one.counts_attempt) for one in back],
                [one.is_possible_duplicate for one in back],
            )  # fmt: skip
        done = {(row["msg_id"], row["d"]) for row in rows}
        counted: dict[str, int] = {}
        new = NewRows(incarnation, str(lane))
        has_notices = False
        for one in group:
            if one.place not in done:
                continue
            for name, recipients in one.ended.items():
                counted[name] = counted.get(name, 0) + recipients
            for message, content in one.notices:
                has_notices = True
                _add_notice(new, message, content)
        if held := [one.lease.message_id for one in back if one.state == "h" and one.place in done]:
            await connection.execute(statements.hold_messages, held)
        if ended := sorted({one.lease.message_id for one in over if one.place in done}):
            await connection.execute(statements.end_messages, ended)
        if has_notices:
            await connection.fetch(statements.submit, *new.arguments)
        if counted:
            await connection.execute(
                statements.tally, incarnation, str(lane), sorted(counted), [counted[name] for name in sorted(counted)]
            )
        return rows

    def _recorded(self, one: _Result, *, is_done: bool) -> None:
        lease = one.lease
        if self._held.get(one.place) == lease.epoch:
            del self._held[one.place]
        was_unknown = one.may_be_done
        self._unknown_results.discard((lease.message_id, lease.delivery, lease.epoch))
        if not is_done and not was_unknown:
            self.figures.stale += 1
        if one.answer.done():
            return
        if is_done or was_unknown:
            one.answer.set_result(None)
        else:
            one.answer.set_exception(stale(lease))

    def _gave_up_result(self, one: _Result) -> None:
        self._unknown_results.add((one.lease.message_id, one.lease.delivery, one.lease.epoch))

    async def mark_corrupt(self, lease: Lease) -> None:
        """See `Store.mark_corrupt`."""
        await self._record(lease, {}, lease.recipients, "c")

    async def end_overdue(self, most: int, *, outcomes: bool = False) -> Sequence[Lease]:
        """See `Store.end_overdue`; the housekeeper does it for all."""
        incarnation = self.beats.incarnation
        if not self.beats.is_housekeeper or not self.beats.holds(incarnation):
            return []
        try:
            rows = await self._working.do(
                lambda connection: connection.fetch(self._statements.end_overdue, incarnation, most, outcomes)
            )
        except StorageAway:
            self._adopt_until = time.monotonic() + ADOPT_SECONDS
            raise
        leases = [lease_of(row, incarnation) for row in rows]
        for lease in leases:
            self._held[lease.message_id, lease.delivery] = lease.epoch
        return leases

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        """See `Store.unwarned`; the housekeeper does it for all."""
        if not self.beats.is_housekeeper:
            return []
        rows = await self._working.do(lambda connection: connection.fetch(self._statements.unwarned, age, most))
        return [lease_of(row, None) for row in rows]

    async def warn(self, message_id: str, notices: Sequence[Notice]) -> bool:
        """See `Store.warn`."""
        new = NewRows(self.beats.incarnation, "warnings")
        for message, content in notices:
            _add_notice(new, message, content)

        async def warn(connection: Connection) -> bool:
            async with connection.transaction():
                if await connection.fetchval(self._statements.warn, message_id) is None:
                    return False
                if notices:
                    await connection.fetch(self._statements.submit, *new.arguments)
            return True

        done: bool = await self._working.do(warn)
        return done

    async def destinations(self, *, outcomes: bool = False) -> Sequence[str]:
        """See `Store.destinations`."""
        rows = await self._working.do(lambda connection: connection.fetch(self._statements.destinations))
        return [row["dest"] for row in rows if is_for_receiver(row["dest"]) is outcomes]

    # Contents --------------------------------------------------------------------------------------------------

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """See `Store.read`."""
        message_id = _key(content).message_id
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

        part: bytes = await self._working.do(read)
        return part

    async def is_intact(self, content: ContentRef) -> bool:
        """See `Store.is_intact`."""
        message_id = _key(content).message_id
        return bool(
            await self._working.do(lambda connection: connection.fetchval(self._statements.is_intact, message_id))
        )

    # From the directory of one gateway ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Of this queue among all that there are, for who has it open."""
        return f"{self._working.facts.installation} {self._place.schema}"

    async def take_in(self, message: MovedMessage, content: Sequence[bytes], *, is_intact: bool) -> bool:
        """Make a message that comes from another store durable, with all that is known of it.

        Args:
            content: in pieces of `piece_octets`, but for the last one.
            is_intact: False: it is what could be read of it.

        Returns:
            False: it came before, and may have ended here.
        """
        return await self._operators.take_in(message, content, is_intact=is_intact)

    async def forget_moved(self, ids: Sequence[str]) -> None:
        """The other store does not have these any more."""
        await self._working.do(lambda connection: connection.execute(self._statements.forget_moved, ids))

    # What operators see and do ---------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """See `Store.counts`."""
        return await self._operators.counts()

    async def tally(self) -> Mapping[str, int]:
        """See `Store.tally`."""
        return await self._operators.tally()

    async def backlog(self, destinations: Sequence[str]) -> Mapping[str, Backlog]:
        """See `Store.backlog`."""
        return await self._operators.backlog(destinations)

    async def page(self, after: str, most: int, *, outcomes: bool = False) -> Sequence[MessageView]:
        """See `Store.page`."""
        return await self._operators.page(after, most, outcomes=outcomes)

    async def show(self, message_id: str) -> MessageView:
        """See `Store.show`."""
        return await self._operators.show(message_id)

    async def find(
        self, *, trace_id: str | None = None, sender: str | None = None, recipient: str | None = None, most: int
    ) -> Sequence[MessageView]:
        """See `Store.find`."""
        return await self._operators.find(trace_id, sender, recipient, most)

    async def retry(self, message_id: str) -> bool:
        """See `Store.retry`."""
        return await self._operators.retry(message_id)

    async def hold(self, message_id: str) -> bool:
        """See `Store.hold`."""
        return await self._operators.hold(message_id)

    async def release(self, message_id: str) -> bool:
        """See `Store.release`."""
        return await self._operators.release(message_id)

    async def expire(self, message_id: str) -> bool:
        """See `Store.expire`."""
        return await self._operators.expire(message_id)

    async def reset(self, message_id: str, expires_in: float) -> bool:
        """See `Store.reset`."""
        return await self._operators.reset(message_id, expires_in)

    async def delete(self, message_id: str) -> int:
        """See `Store.delete`."""
        return await self._operators.delete(message_id)

    async def rebuild(self) -> Sequence[str]:
        """See `Store.rebuild`: a database sets nothing aside."""
        return []

    async def tell(self, what: str) -> None:
        """Have all gateways of the queue look: "due" for deliveries, "look" for what is too old."""
        await self._operators.tell(what)

    async def tell_deed(self, deed: str) -> None:
        """Have one gateway of the queue tell of what an operator did, see `deeds.Deed.as_text`."""
        await self._operators.tell_deed(deed)

    async def session_user(self) -> str:
        """Who is logged in to the database."""
        return await self._operators.session_user()

    def standing(self) -> ShareOfQueue | None:
        """See `Store.standing`."""
        if not self._is_open:
            return None
        beats, figures = self.beats, self.figures
        return ShareOfQueue(
            beats.is_housekeeper, beats.gateways, beats.silent_for, figures.taken_over, figures.stale,
            figures.unanswered,
        )  # fmt: skip

    async def company(self) -> Company:
        """See `Store.company`."""
        return await self._operators.company()

    async def limits(self) -> Sequence[Mapping[str, Any]]:
        """All limits of the queue: name, most within period_seconds, per, burst, used, in_flight, next_in and rests_for
        in seconds, gateways: what each has in flight."""
        return await self._operators.limits()

    async def slots(self) -> Sequence[Mapping[str, Any]]:
        """The connection slots of each upstream that has some: name, total, used, gateways: how many each has."""
        return await self._operators.slots()

    async def housekeep(self) -> None:
        """See `Store.housekeep`: time is the database's; all else is done between beats."""


def _in_order(group: Sequence[_Result]) -> list[_Result]:
    """Everybody locks rows in one order."""
    return sorted(group, key=lambda one: one.place)


def _add_notice(rows: NewRows, message: NewMessage, content: bytes) -> None:
    rows.add(message, len(content), hashlib.sha256(content).digest(), content, is_leased=False, is_marked=False)


def _small_content(row: Row) -> Sequence[bytes] | None:
    """Header block and body, if they are at hand and whole."""
    content: bytes | None = row["content"]
    if content is None or hashlib.sha256(content).digest() != row["digest"]:
        return None
    header_octets = row["header_octets"]
    return content[:header_octets], content[header_octets:]
