"""Messages in: written to the log, and answered when durable."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from otel_smtp.spool.embedded import first_version
from otel_smtp.spool.embedded.aside import envelope
from otel_smtp.spool.embedded.draft import EmbeddedDraft
from otel_smtp.spool.embedded.entries import Entry, dumps
from otel_smtp.spool.embedded.memory import HOT_MOST
from otel_smtp.spool.embedded.parts import EmbeddedParts
from otel_smtp.spool.embedded.records import RecordKind
from otel_smtp.spool.messages import Lease, NewMessage, SpoolError, new_id
from otel_smtp.spool.store import Draft as AnyDraft
from otel_smtp.spool.store import Pending


class EmbeddedSubmitting(EmbeddedParts):
    """Accepts messages."""

    _submitting: set[asyncio.Task[Any]]

    def draft(self) -> EmbeddedDraft:
        """See `Store.draft`."""
        return EmbeddedDraft(self._new_temporary, self.journal.log)

    def _new_temporary(self) -> Path:
        return self.directory.temporary(new_id())

    def submit(self, message: NewMessage, draft: AnyDraft, *, lease: bool) -> Pending[Sequence[Lease]]:
        """See `Store.submit`."""
        assert isinstance(draft, EmbeddedDraft)
        content = draft.in_memory
        draft.has_come()
        entry = Entry.of(message, self._now_ms(), draft.octets, is_leased=lease, is_large=content is None)
        if content is not None and len(self.memory.hot) < 2 * HOT_MOST:
            return self.journal.add(entry, content, None)
        task = self._loop.create_task(
            self._submit_large(entry, draft) if content is None else self._submit_later(entry, content)
        )
        self._submitting.add(task)
        task.add_done_callback(self._submitting.discard)
        # A caller that stops waiting does not undo a write under way.
        return asyncio.shield(task)

    async def _submit_later(self, entry: Entry, content: Sequence[bytes]) -> Sequence[Lease]:
        """Messages that come faster than the index takes them wait for it: memory is bounded."""
        await self.indexing.write_cooled()
        return await self.journal.add(entry, content, None)

    async def _submit_large(self, entry: Entry, draft: EmbeddedDraft) -> Sequence[Lease]:
        is_kept = False
        try:
            await draft.end()
            file, crc = draft.hand_over()
            await asyncio.to_thread(self.directory.keep, file, entry.id, entry.octets, envelope(entry, crc))
            is_kept = True
            return await self.journal.add(entry, (), crc)
        except Exception as error:
            if isinstance(error, SpoolError):
                self.journal.latch(error)
            if is_kept:
                await asyncio.to_thread(self.directory.remove_large, entry.id)
            raise
        finally:
            draft.discard()

    async def _add_carried(self, found: Sequence[first_version.Carried], tally: Mapping[str, int]) -> None:
        """Take in messages of the first version; `tally`: its counts, with the last of them."""
        ids = [one.entry.id for one in found]
        known = {entry.id for entry in await self.index.run(lambda index: index.load(ids))} | self.memory.hot.keys()
        await asyncio.gather(
            *(
                self.journal.add(one.entry, one.content, one.crc, is_new=False)
                for one in found
                if one.entry.id not in known
            )
        )
        if tally:
            await self.journal.append(
                [(RecordKind.CLOCK, dumps({"moved_ms": 0, "ended": dict(tally)}), ())], ended=tally
            )
        await self.indexing.write_all()
