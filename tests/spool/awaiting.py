"""A mail transaction for those who wait: the spool's runner is coroutines around disk and database."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Self

from otel_smtp.forwarding.base import MailTransaction
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.replies import Reply


class AwaitedTransaction:
    """Turns the callbacks of a transaction into answers that are awaited; left as a context, it is aborted.

    A caller that is cancelled aborts it: an answer that comes later is nobody's.
    """

    __slots__ = ("_has_ended", "_room", "_transaction")

    def __init__(self, transaction: MailTransaction) -> None:
        self._transaction = transaction
        self._room: asyncio.Future[None] | None = None  # waited for, since a chunk was the last that could be taken
        self._has_ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._has_ended:
            self._transaction.abort()

    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        """See `MailTransaction.recipients`: one reply each, in order."""
        answer: asyncio.Future[Sequence[Reply]] = asyncio.get_running_loop().create_future()

        def answered(verdicts: Sequence[Reply]) -> None:
            if not answer.done():
                answer.set_result(verdicts)

        self._transaction.recipients(batch, answered)
        return await answer

    async def content(self, chunks: AsyncIterator[bytes]) -> tuple[Reply, Sequence[Reply]]:
        """Hand the content over, as fast as it is taken, and finish.

        Args:
            chunks: as `MailTransaction.write` wants them. What it raises is raised, and the message not ended.

        Returns:
            The final reply, and those of the first recipients, where they have replies of their own.
        """
        loop = asyncio.get_running_loop()
        self._transaction.content(self._has_room)
        async for chunk in chunks:
            room = self._room = loop.create_future()  # before the call: what makes room may do so within it
            if not self._transaction.write(chunk):
                await room
        answer: asyncio.Future[tuple[Reply, Sequence[Reply]]] = loop.create_future()

        def answered(final: Reply, each: Sequence[Reply]) -> None:
            self._has_ended = True
            if not answer.done():
                answer.set_result((final, each))

        self._transaction.finish(answered)
        return await answer

    def _has_room(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
