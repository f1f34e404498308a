"""Messages in: what comes is written to the log, and answered when it is durable."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from otel_smtp.spool.embedded import first_version
from otel_smtp.spool.embedded.aside import envelope
from otel_smtp.spool.embedded.draft import EmbeddedDraft
from otel_smtp.spool.embedded.entries import Entry, dumps
from otel_smtp.spool.embedded.journal import fail
from otel_smtp.spool.embedded.memory import HOT_MOST
from otel_smtp.spool.embedded.parts import EmbeddedParts
from otel_smtp.spool.embedded.records import RecordKind
from otel_smtp.spool.messages import Lease, NewMessage, SpoolError, new_id
from otel_smtp.spool.store import Draft as AnyDraft


class EmbeddedSubmitting(EmbeddedParts):
    """Takes messages in."""

    _submitting: set[asyncio.Task[Any]]

    def draft(self) -> EmbeddedDraft:
        """See `Store.draft`."""
        return EmbeddedDraft(self._new_temporary, self.journal.log)

    def _new_temporary(self) -> Path:
        return self.directory.temporary(new_id())

    def submit(self, message: NewMessage, draft: AnyDraft, *, lease: bool) -> asyncio.Future[Sequence[Lease]]:
        """See `Store.submit`."""
        assert isinstance(draft, EmbeddedDraft)
        answer: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
        content = draft.in_memory
        draft.has_come()
        entry = Entry.of(message, self._now_ms(), draft.octets, is_leased=lease, is_large=content is None)
        if content is not None and len(self.memory.hot) < 2 * HOT_MOST:
            self.journal.add(entry, content, None, answer)
            return answer
        # Whoever gives up waiting does not undo what is on its way to the disk.
        task = self._loop.create_task(
            self._submit_large(entry, draft, answer) if content is None else self._submit_later(entry, content, answer)
        )
        self._submitting.add(task)
        task.add_done_callback(self._submitting.discard)
        return answer

    async def _submit_later(
        self, entry: Entry, content: Sequence[bytes], answer: asyncio.Future[Sequence[Lease]]
    ) -> None:
        """What comes faster than the index takes it waits for the index: memory is bounded."""
        try:
            await self.indexing.write_cooled()
        except SpoolError as error:
            fail(answer, error)
        else:
            self.journal.add(entry, content, None, answer)

    async def _submit_large(self, entry: Entry, draft: EmbeddedDraft, answer: asyncio.Future[Sequence[Lease]]) -> None:
        is_kept = False
        try:
            await draft.end()
            file, crc = draft.hand_over()
            await asyncio.to_thread(self.directory.keep, file, entry.id, entry.octets, envelope(entry, crc))
            is_kept = True
            added: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
            self.journal.add(entry, (), crc, added)
            leases = await added
        except Exception as error:  # noqa: BLE001 - whoever waits has it
            if isinstance(error, SpoolError):
                self.journal.latch(error)
            if is_kept:
                await asyncio.to_thread(self.directory.remove_large, entry.id)
            fail(answer, error)
        else:
            if not answer.done():
                answer.set_result(leases)
        finally:
            draft.discard()

    async def _add_carried(self, found: Sequence[first_version.Carried], tally: Mapping[str, int]) -> None:
        """Take messages of the first version in; `tally`: what it had counted, with the last of them."""
        ids = [one.entry.id for one in found]
        known = {entry.id for entry in await self.index.run(lambda index: index.load(ids))} | self.memory.hot.keys()
        answers: list[asyncio.Future[Sequence[Lease]]] = []
        for one in found:
            if one.entry.id not in known:
                answer: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
                self.journal.add(one.entry, one.content, one.crc, answer, is_new=False)
                answers.append(answer)
        await asyncio.gather(*answers)
        if tally:
            await self.journal.append(
                [(RecordKind.CLOCK, dumps({"moved_ms": 0, "ended": dict(tally)}), ())], ended=tally
            )
        await self.indexing.write_all()
