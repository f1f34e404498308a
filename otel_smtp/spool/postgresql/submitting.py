"""Messages in: in groups, large ones alone; and withdrawing messages that may have been stored."""

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from otel_smtp.spool.messages import Lease, NewMessage, SpoolError
from otel_smtp.spool.postgresql.connecting import Connection
from otel_smtp.spool.postgresql.draft import CHUNK_OCTETS, PostgresqlDraft
from otel_smtp.spool.postgresql.lanes import Item, Lanes
from otel_smtp.spool.postgresql.recording import PostgresqlRecording
from otel_smtp.spool.postgresql.rows import NewRows, Row, leases_again, new_leases
from otel_smtp.spool.store import Draft as AnyDraft

logger: Final = logging.getLogger("otel_smtp.spool.postgresql.submitting")

SUBMIT_SECONDS: Final = 30.0  # then 451; the client waits ten minutes for its reply


class Submission(Item[Sequence[Lease]]):
    """A message on its way in.

    Attributes:
        content: None: the draft has a file of it.
    """

    __slots__ = ("content", "draft", "is_leased", "message")

    def __init__(
        self, message: NewMessage, draft: PostgresqlDraft, content: bytes | None, deadline: float, *, is_leased: bool
    ) -> None:
        super().__init__(draft.octets, deadline)
        self.message = message
        self.draft = draft
        self.content = content
        self.is_leased = is_leased


class PostgresqlSubmitting(PostgresqlRecording):
    """Accepts messages."""

    _accepting: Lanes[Submission]
    _large: Lanes[Submission]
    _ending: set[asyncio.Task[None]]

    def draft(self) -> PostgresqlDraft:
        """See `Store.draft`."""
        return PostgresqlDraft()

    def submit(self, message: NewMessage, draft: AnyDraft, *, lease: bool) -> Submission:
        """See `Store.submit`."""
        assert isinstance(draft, PostgresqlDraft)
        chunks = draft.in_memory
        content = None if chunks is None else b"".join(chunks)
        submission = Submission(message, draft, content, time.monotonic() + SUBMIT_SECONDS, is_leased=lease)
        if not self._is_open or not self._is_gateway:
            submission.fail(SpoolError("the queue is closed"))
        elif content is not None:
            self._accepting.add(submission)
        else:
            task = asyncio.get_running_loop().create_task(self._submit_large(submission))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        return submission

    async def _submit_large(self, submission: Submission) -> None:
        try:
            await submission.draft.end()
        except SpoolError as error:
            submission.draft.discard()
            submission.refuse(error)
        else:
            self._large.add(submission)

    async def _write_submissions(self, connection: Connection, lane: int, group: Sequence[Submission]) -> None:
        incarnation = self.beats.incarnation
        rows = NewRows(incarnation, str(lane))
        for one in group:
            assert one.content is not None
            rows.add(
                one.message, one.octets, hashlib.sha256(one.content).digest(), one.content,
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

    def _being_submitted(self) -> set[str]:
        return {one.message.id for lanes in (self._accepting, self._large) for one in lanes.items()}

    def _submitted(self, group: Sequence[Submission], rows: Sequence[Row], incarnation: UUID) -> None:
        ((arrived_at, may_lease, text),) = rows
        again = json.loads(text) if text is not None else {}
        for one in group:
            message, octets = one.message, one.octets
            leases: Sequence[Lease] = ()
            if message.id in again:
                leases = leases_again(message, octets, incarnation, again[message.id])
            elif one.is_leased and may_lease:
                leases = new_leases(message, octets, incarnation, arrived_at, is_marked=one.may_be_done)
            one.draft.discard()
            for lease in leases:
                self._held[lease.message_id, lease.delivery] = lease.epoch
            one.answer(leases)
            if one.is_leased and not leases and self._woken is not None:
                self._woken.wake(list(message.deliveries))

    def _gave_up_submission(self, one: Submission) -> None:
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
                    # A peer that is claiming it comes first: this waits for it, and the next statement sees its lease.
                    await connection.fetch(self._statements.states, message_id)
                    row = await connection.fetchrow(
                        self._statements.withdraw, self.beats.incarnation, message_id, attempts
                    )
                    if row is not None and row["recipients"]:
                        await connection.execute(
                            self._statements.tally, self.beats.incarnation, "withdrawn", ["accepted"],
                            [-row["recipients"]],
                        )  # fmt: skip
                if row is None and placed.endswith(" 0"):
                    self._tell_unanswered(message_id)

            try:
                await self._working.do(withdraw)
            except SpoolError:
                return  # beats report it; it is tried again
            self._withdrawn.pop(message_id, None)

    def _tell_unanswered(self, message_id: str, is_there: str = "message stored") -> None:
        self.figures.unanswered += 1
        logger.error(
            f"{is_there} although its client was told otherwise: it may arrive twice",
            extra={"spool_id": message_id},
        )
