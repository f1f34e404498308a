"""Results: what attempts came to, in groups, with the messages that report it."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from otel_smtp.spool.messages import End, Kind, Lease, SpooledRecipient, SpoolError, Verdict, end_name, stale
from otel_smtp.spool.postgresql.connecting import Connection
from otel_smtp.spool.postgresql.lanes import Lanes
from otel_smtp.spool.postgresql.parts import PostgresqlParts
from otel_smtp.spool.postgresql.rows import NewRows, Row, key_of, recipients_json
from otel_smtp.spool.store import Notice

FINISH_SECONDS: Final = 10.0  # then the attempt asks again


@dataclass(eq=False, slots=True)
class Result:
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
        return key_of(self.lease.content).is_alone

    @property
    def is_simple(self) -> bool:
        """Whether one statement is enough."""
        return self.state is None and self.is_alone and not self.notices and len(self.ended) == 1


class PostgresqlRecording(PostgresqlParts):
    """Notes results."""

    _recording: Lanes[Result]
    _unknown_results: set[tuple[str, int, int]]

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
            notices=notices, is_urgent=is_urgent,
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
        is_urgent: bool = True,
    ) -> asyncio.Future[None]:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._is_open:
            answer.set_exception(SpoolError("the queue is closed"))
            return answer
        result = Result(
            lease, ended, left, state, retry_in, is_possible_duplicate, counts_attempt, notices,
            sum(len(content) for _, content in notices), time.monotonic() + FINISH_SECONDS, answer,
            (lease.message_id, lease.delivery, lease.epoch) in self._unknown_results,
        )  # fmt: skip
        self._recording.add(result, is_urgent=is_urgent)
        return answer

    async def _write_results(self, connection: Connection, lane: int, group: Sequence[Result]) -> None:
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
        self, connection: Connection, lane: int, group: Sequence[Result], incarnation: UUID
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
                new.add_notice(message, content)
        if held := [one.lease.message_id for one in back if one.state in ("h", "c") and one.place in done]:
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

    def _recorded(self, one: Result, *, is_done: bool) -> None:
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

    def _gave_up_result(self, one: Result) -> None:
        self._unknown_results.add((one.lease.message_id, one.lease.delivery, one.lease.epoch))

    async def mark_corrupt(self, lease: Lease) -> None:
        """See `Store.mark_corrupt`."""
        await self._record(lease, {}, lease.recipients, "c")

    async def warn(self, message_id: str, notices: Sequence[Notice]) -> bool:
        """See `Store.warn`."""
        new = NewRows(self.beats.incarnation, "warnings")
        for message, content in notices:
            new.add_notice(message, content)

        async def warn(connection: Connection) -> bool:
            async with connection.transaction():
                if await connection.fetchval(self._statements.warn, message_id) is None:
                    return False
                if notices:
                    await connection.fetch(self._statements.submit, *new.arguments)
            return True

        done: bool = await self._working.do(warn)
        return done


def _in_order(group: Sequence[Result]) -> list[Result]:
    """Everybody locks rows in one order."""
    return sorted(group, key=lambda one: one.place)
