"""Results: recording an attempt's outcome, with the messages that report it."""

from collections.abc import Sequence
from typing import Any

from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.embedded.parts import EmbeddedParts
from otel_smtp.spool.messages import Lease, NoSuchMessage, StaleLease, Verdict, stale
from otel_smtp.spool.promises import Promise
from otel_smtp.spool.store import Notice, Pending


class EmbeddedRecording(EmbeddedParts):
    """Records results."""

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
    ) -> Pending[None]:
        """See `Store.finish`."""
        entry = self.memory.hot.get(lease.message_id)
        if entry is not None and entry.is_busy:
            return self._loop.create_task(
                self._finish_later(
                    lease, verdicts,
                    retry_in=retry_in, is_possible_duplicate=is_possible_duplicate, counts_attempt=counts_attempt,
                    hold=hold, notices=notices, is_urgent=is_urgent,
                )
            )  # fmt: skip
        try:
            if entry is None:
                raise stale(lease)
            changed: Entry | None = None
            if (ended := entry.ended_by(lease, verdicts)) is None:
                changed = entry.copy()
                now_ms = self._now_ms()
                ended = changed.settle(
                    lease, verdicts,
                    now_ms=now_ms, due_ms=now_ms + round(retry_in * 1000),
                    is_possible_duplicate=is_possible_duplicate, counts_attempt=counts_attempt, hold=hold,
                )  # fmt: skip
                if not changed.deliveries:
                    changed = None
        except StaleLease as error:
            answer: Promise[None] = Promise()
            answer.fail(error)
            return answer
        return self.journal.change(entry, changed, ended, notices, is_urgent=is_urgent)

    async def _finish_later(self, lease: Lease, verdicts: Sequence[Verdict], **how: Any) -> None:
        await self.memory.until_free(lease.message_id)
        await self.finish(lease, verdicts, **how)

    async def mark_corrupt(self, lease: Lease) -> None:
        """See `Store.mark_corrupt`."""
        await self.memory.until_free(lease.message_id)
        if (entry := self.memory.hot.get(lease.message_id)) is None:
            raise stale(lease)
        changed = entry.copy()
        changed.mark_corrupt(lease, self._now_ms())
        await self.journal.change(entry, changed, {})

    async def warn(self, message_id: str, notices: Sequence[Notice]) -> bool:
        """See `Store.warn`."""
        try:
            entry = await self.indexing.get(message_id)
        except NoSuchMessage:
            return False
        if entry.is_warned:
            return False
        changed = entry.copy()
        changed.is_warned = True
        await self.journal.change(entry, changed, {}, notices)
        return True
