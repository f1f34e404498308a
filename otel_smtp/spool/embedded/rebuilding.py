"""Putting back messages from lost+found/."""

import asyncio
import zlib
from collections.abc import Sequence
from pathlib import Path

from otel_smtp.spool.embedded.aside import Found, found_in, hold_again
from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.embedded.journal import message_part
from otel_smtp.spool.embedded.log import Step
from otel_smtp.spool.embedded.operating import EmbeddedOperating
from otel_smtp.spool.messages import ContentLost, End, Kind, NoSuchMessage, SpoolError
from otel_smtp.spool.store import NotFound, Rebuilt


class Rebuilding(EmbeddedOperating):
    """Queues messages again that were set aside."""

    _alarm: str | None = None
    _not_found: Sequence[NotFound] = ()  # when the store was opened
    _rebuilding: asyncio.Lock  # two rebuilds must not put back the same message

    async def _look_aside(self) -> None:
        aside = len(await asyncio.to_thread(self.directory.aside))
        self._alarm = f"{aside} files in lost+found/ may be mail: see `otel-smtp queue rebuild`" if aside else None

    def alarm(self) -> str | None:
        """See `Store.alarm`."""
        return self._alarm

    async def rebuild(self) -> Rebuilt:
        """See `Store.rebuild`: restores files in lost+found/ that have their envelope."""
        async with self._rebuilding:
            return await self._rebuild()

    async def _rebuild(self) -> Rebuilt:
        told: list[str] = []
        tally = await self.tally()
        # Recipients counted as accepted that are missing; the count itself may be lost with the log.
        missing = tally.get("accepted", 0) - sum(tally.get(end.value, 0) for end in End) - await self._recipients()
        for path in await asyncio.to_thread(self.directory.aside):
            try:
                found = await asyncio.to_thread(found_in, path)
                back = [one for one in found if await self._is_wanted(one)]
                for one in back:
                    if (known := await self._known(one.entry.id)) is not None:
                        await self._give_back(path, known, one)
                        continue
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
        not_found = await self._look_for_contents(told)
        return Rebuilt(told, not_found)

    async def _look_for_contents(self, told: list[str]) -> list[NotFound]:
        """The messages whose contents remain lost; reports those that are whole again."""
        await self.indexing.write_all()
        not_found: list[NotFound] = []
        for message_id in await self.index.run(Index.corrupt):
            entry = await self._known(message_id)
            if entry is None or not entry.is_corrupt:
                continue
            if await self._contents.is_intact(entry.content_ref()):
                told.append(f"message {message_id} is set aside as corrupt, and its content is whole: release it")
                continue
            recipients = [there.recipient.address for one in entry.deliveries for there in one.recipients]
            reason = "its content is damaged" if await self._is_there(entry) else "its content is lost"
            not_found.append(NotFound(message_id, entry.mail.reverse_path, recipients, reason, is_queued=True))
        return not_found + [one for one in self._not_found if await self._known(one.id) is None]

    async def _recipients(self) -> int:
        count, after = 0, ""
        while page := await self.page(after, 500):
            count += sum(len(shown.recipients) for shown in page if shown.kind is Kind.MAIL)
            after = page[-1].id
        return count

    async def _known(self, message_id: str) -> Entry | None:
        try:
            return await self.indexing.look_up(message_id)
        except NoSuchMessage:
            return None

    async def _is_wanted(self, found: Found) -> bool:
        """Whether a found message is not queued, or only without whole content."""
        known = await self._known(found.entry.id)
        if known is None or not known.is_corrupt:
            return known is None
        if found.content is None:
            return not await self._is_there(known)
        is_better = zlib.crc32(found.content) == found.crc
        return is_better and not await self._contents.is_intact(known.content_ref())

    async def _is_there(self, entry: Entry) -> bool:
        try:
            await self._contents.read(entry.content_ref(), max(0, entry.octets - 1), 1)
        except ContentLost:
            return False
        return True

    async def _give_back(self, path: Path, known: Entry, found: Found) -> None:
        """Give a queued message its content back, and hold it, as it may have been delivered before the loss."""
        entry = await self.indexing.get(known.id)
        if entry.is_leased:
            return
        moved = entry.copy()
        hold_again(moved, self._now_ms())
        moved.is_large = found.content is None
        entry.is_busy = True
        try:
            if found.content is None:
                await asyncio.to_thread(self.directory.put_back, path, entry.id)
        except BaseException:
            self.memory.set_free(entry)
            raise

        def durable(step: Step[None]) -> None:
            self.memory.set_free(entry)
            self.memory.note_moved(entry, moved, step, found.crc, is_lost=False)

        await self.journal.append(
            [message_part(moved, () if found.content is None else (found.content,), found.crc, is_new=False)],
            durable=durable,
            failed=lambda: self.memory.set_free(entry),
        )

    async def _put_back(self, path: Path, found: Found, *, is_counted: bool) -> None:
        entry, crc = found.entry, found.crc
        hold_again(entry, self._now_ms())
        if found.content is None:
            await asyncio.to_thread(self.directory.put_back, path, entry.id)
        content = () if found.content is None else (found.content,)
        try:
            await self.journal.add(entry, content, crc, is_new=not is_counted)
        except SpoolError:
            if found.content is None:
                await asyncio.to_thread(self.directory.move_aside, self.directory.large(entry.id))
            raise
