"""Messages in: in groups, and large ones alone; and what is withdrawn that may have been stored."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from otel_smtp.spool.messages import Lease, NewMessage, SpoolError
from otel_smtp.spool.postgresql.connecting import Connection
from otel_smtp.spool.postgresql.draft import CHUNK_OCTETS, PostgresqlDraft
from otel_smtp.spool.postgresql.lanes import Lanes
from otel_smtp.spool.postgresql.recording import PostgresqlRecording
from otel_smtp.spool.postgresql.rows import NewRows, Row, new_leases
from otel_smtp.spool.store import Draft as AnyDraft

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.submitting")

SUBMIT_SECONDS: Final = 30.0  # then 451; the client waits ten minutes for its reply


@dataclass(eq=False, slots=True)
class Submission:
    """A message on its way in."""

    message: NewMessage
    draft: PostgresqlDraft
    is_leased: bool
    content: bytes | None
    octets: int
    deadline: float
    answer: "asyncio.Future[Sequence[Lease]]"
    may_be_done: bool = False


class PostgresqlSubmitting(PostgresqlRecording):
    """Takes messages in."""

    _accepting: Lanes[Submission]
    _large: Lanes[Submission]
    _ending: set[asyncio.Task[None]]

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
        submission = Submission(
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

    async def _submit_large(self, submission: Submission) -> None:
        try:
            await submission.draft.end()
        except SpoolError as error:
            self._submitting.discard(submission.message.id)
            submission.draft.discard()
            if not submission.answer.done():
                submission.answer.set_exception(error)
        else:
            self._large.add(submission)

    async def _write_submissions(self, connection: Connection, lane: int, group: Sequence[Submission]) -> None:
        incarnation = self.beats.incarnation
        rows = NewRows(incarnation, str(lane))
        for one in group:
            rows.add(
                one.message, one.octets, one.draft.digest, one.content,
                is_leased=one.is_leased, is_marked=one.may_be_done,
            )  # fmt: skip
        self._submitted(group, await connection.fetch(self._statements.submit, *rows.arguments), incarnation)

    async def _write_large(self, connection: Connection, lane: int, group: Sequence[Submission]) -> None:
        (one,) = group
        incarnation = self.beats.incarnation
        rows = NewRows(incarnation, "large")
        rows.add(one.message, one.octets, one.draft.digest, None, is_leased=one.is_leased, is_marked=one.may_be_done)
        async with connection.transaction():
            found = await connection.fetch(self._statements.submit, *rows.arguments)
            for number in range((one.octets + CHUNK_OCTETS - 1) // CHUNK_OCTETS):
                await connection.execute(self._statements.chunk, one.message.id, number, await one.draft.chunk(number))
        self._submitted(group, found, incarnation)

    def _submitted(self, group: Sequence[Submission], rows: Sequence[Row], incarnation: UUID) -> None:
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
        """These are no longer awaited: they are attempted like others."""
        for lease in leases:
            self.finish(lease, (), counts_attempt=False)

    def _gave_up_submission(self, one: Submission) -> None:
        self._submitting.discard(one.message.id)
        one.draft.discard()
        self._withdrawn[one.message.id] = one.message.attempts

    async def _withdraw(self) -> None:
        """Take back what may have been stored though its client was answered that it was not."""
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
                return  # beats report it; it is tried again
            self._withdrawn.pop(message_id, None)
