"""Results: recording attempts' outcomes, in groups, with the messages that report them."""

import time
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Final
from uuid import UUID

from otel_smtp.spool.messages import End, Kind, Lease, SpooledRecipient, SpoolError, Verdict, end_name, stale
from otel_smtp.spool.postgresql.connecting import Connection
from otel_smtp.spool.postgresql.lanes import Item, Lanes
from otel_smtp.spool.postgresql.parts import PostgresqlParts
from otel_smtp.spool.postgresql.rows import NewRows, Row, key_of, recipients_json
from otel_smtp.spool.store import Notice

FINISH_SECONDS: Final = 10.0  # then the attempt asks again


class Result(Item[None]):
    """The result of an attempt.

    Attributes:
        place: message and delivery.
        ended: recipients by the name of their end.
        left: those that have not ended.
        state: of the delivery from now on; None: all of it has ended.
        is_alone: its message ends with it.
        is_simple: one statement is enough.
    """

    __slots__ = (
        "counts_attempt", "ended", "is_alone", "is_possible_duplicate", "is_simple", "lease", "left", "notices",
        "place", "retry_in", "state",
    )  # fmt: skip

    def __init__(
        self,
        lease: Lease,
        ended: Mapping[str, int],
        left: Sequence[SpooledRecipient],
        state: str | None,
        deadline: float,
        *,
        retry_in: float,
        is_possible_duplicate: bool,
        counts_attempt: bool,
        notices: Sequence[Notice],
    ) -> None:
        super().__init__(sum(len(content) for _, content in notices) if notices else 0, deadline)
        self.lease = lease
        self.place = (lease.message_id, lease.delivery)
        self.ended = ended
        self.left = left
        self.state = state
        self.retry_in = retry_in
        self.is_possible_duplicate = is_possible_duplicate
        self.counts_attempt = counts_attempt
        self.notices = notices
        self.is_alone = key_of(lease.content).is_alone
        self.is_simple = state is None and self.is_alone and not notices and len(ended) == 1


_PLACE: Final = attrgetter("place")


class PostgresqlRecording(PostgresqlParts):
    """Records results."""

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
    ) -> Result:
        """See `Store.finish`."""
        recipients = lease.recipients
        if len(recipients) == len(verdicts) == 1:
            number, end, _ = verdicts[0]
            if end is not None and number == recipients[0].number:  # as most end
                return self._record(
                    lease, {end_name(lease.kind, end): 1}, (), None,
                    is_possible_duplicate=is_possible_duplicate, notices=notices, is_urgent=is_urgent,
                )  # fmt: skip
        ended: dict[str, int] = {}
        left: list[SpooledRecipient] = []
        by_number = {verdict.number: verdict for verdict in verdicts}
        for there in recipients:
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
    ) -> Result:
        result = Result(
            lease, ended, left, state, time.monotonic() + FINISH_SECONDS,
            retry_in=retry_in, is_possible_duplicate=is_possible_duplicate, counts_attempt=counts_attempt,
            notices=notices,
        )  # fmt: skip
        if self._unknown_results and (*result.place, lease.epoch) in self._unknown_results:
            result.may_be_done = True
        if self._is_open:
            self._recording.add(result, is_urgent=is_urgent)
        else:
            result.fail(SpoolError("the queue is closed"))
        return result

    async def _write_results(self, connection: Connection, lane: int, group: Sequence[Result]) -> None:
        places = {one.place for one in group}
        if len(places) < len(group):
            # Two results of one lease: the second is too late.
            for one in group:
                await self._write_results(connection, lane, [one])
            return
        group = sorted(group, key=_PLACE)  # everybody locks rows in one order
        incarnation = self.beats.incarnation
        is_simple, is_repeated = True, False
        for one in group:
            is_simple = is_simple and one.is_simple
            is_repeated = is_repeated or one.may_be_done
        if is_simple and not is_repeated:
            rows: Sequence[Row] = await connection.fetch(self._statements.end, incarnation, str(lane), _ended(group))
            gone = {(row["msg_id"], row["d"]) for row in rows}
        else:
            async with connection.transaction():
                rows = await self._write_mixed(connection, lane, group, incarnation)
                if is_repeated:
                    # Existing rows may be on the primary alone: a transaction that writes nothing waits for no standby.
                    name = end_name(Kind.MAIL, End.DELIVERED)
                    await connection.execute(self._statements.tally, incarnation, str(lane), [name], [0])
            gone = places - {(row["msg_id"], row["d"]) for row in rows}
        for one in group:
            self._recorded(one, is_done=one.place not in gone)

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
        if self._unknown_results:
            self._unknown_results.discard((*one.place, lease.epoch))
        if is_done or one.may_be_done:
            one.answer(None)
        else:
            self.figures.stale += 1
            one.refuse(stale(lease))

    def _gave_up_result(self, one: Result) -> None:
        self._unknown_results.add((*one.place, one.lease.epoch))

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


def _ended(group: Iterable[Result]) -> str:
    """What `end` is given, as JSON; the names are ours."""
    rows: list[str] = []
    for one in group:
        (message_id, delivery), ((name, recipients),) = one.place, one.ended.items()
        rows.append(
            f'{{"id":"{message_id}","d":{delivery},"epoch":{one.lease.epoch},"name":"{name}","recipients":{recipients}}}'
        )
    return f"[{','.join(rows)}]"
