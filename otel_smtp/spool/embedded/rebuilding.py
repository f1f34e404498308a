"""What lies in lost+found/, put back."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from otel_smtp.spool.embedded.aside import Found, found_in, hold_again
from otel_smtp.spool.embedded.operating import EmbeddedOperating
from otel_smtp.spool.messages import End, Kind, Lease, NoSuchMessage, SpoolError


class Rebuilding(EmbeddedOperating):
    """Queues again what was set aside."""

    _alarm: str | None = None

    async def _look_aside(self) -> None:
        aside = len(await asyncio.to_thread(self.directory.aside))
        self._alarm = f"{aside} files in lost+found/ may be mail: see `otel-smtp queue rebuild`" if aside else None

    def alarm(self) -> str | None:
        """See `Store.alarm`."""
        return self._alarm

    async def rebuild(self) -> Sequence[str]:
        """See `Store.rebuild`: what lies in lost+found/ and has its envelope."""
        told: list[str] = []
        tally = await self.tally()
        # Recipients that were counted as accepted, and are nowhere; the count itself may be lost with the log.
        missing = tally.get("accepted", 0) - sum(tally.get(end.value, 0) for end in End) - await self._recipients()
        for path in await asyncio.to_thread(self.directory.aside):
            try:
                found = await asyncio.to_thread(found_in, path)
                back = [one for one in found if not await self._is_known(one.entry.id)]
                for one in back:
                    _, recipients = one.entry.accepted
                    if is_counted := missing >= recipients:
                        missing -= recipients
                    await self._put_back(path, one, is_counted=is_counted)
            except OSError as error:
                told.append(f"{path.name}: {error.strerror}")
                continue
            told += [f"{path.name}: message {one.entry.id} is queued again, and held" for one in back]
            if await asyncio.to_thread(path.exists):
                await asyncio.to_thread(self.directory.give_up, path)
                if not found:
                    told.append(f"{path.name}: no message can be read in it; it is kept in lost+found/unreadable/")
                elif len(back) < len(found):
                    told.append(f"{path.name}: {len(found) - len(back)} messages in it are queued")
        await self._look_aside()
        return told

    async def _recipients(self) -> int:
        count, after = 0, ""
        while page := await self.page(after, 500):
            count += sum(len(shown.recipients) for shown in page if shown.kind is Kind.MAIL)
            after = page[-1].id
        return count

    async def _is_known(self, message_id: str) -> bool:
        try:
            await self.indexing.look_up(message_id)
        except NoSuchMessage:
            return False
        return True

    async def _put_back(self, path: Path, found: Found, *, is_counted: bool) -> None:
        entry, crc = found.entry, found.crc
        hold_again(entry, self._now_ms())
        if found.content is None:
            await asyncio.to_thread(self.directory.put_back, path, entry.id)
        answer: asyncio.Future[Sequence[Lease]] = self._loop.create_future()
        content = () if found.content is None else (found.content,)
        self.journal.add(entry, content, crc, answer, is_new=not is_counted)
        try:
            await answer
        except SpoolError:
            if found.content is None:
                await asyncio.to_thread(self.directory.move_aside, self.directory.large(entry.id))
            raise
