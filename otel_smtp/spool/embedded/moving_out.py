"""Moving messages to another store."""

import asyncio

from otel_smtp.spool.embedded.files import storage_error
from otel_smtp.spool.embedded.parts import EmbeddedParts
from otel_smtp.spool.messages import MovedMessage, SpoolError


class MovingOut(EmbeddedParts):
    """Gives messages to another store."""

    async def begin_move(self, where: str) -> None:
        """From here on, until `end_move`, no gateway may deliver from this directory.

        Args:
            where: the name of the other store.

        Raises:
            SpoolError: it cannot be noted, or a move to a different store is unfinished.
        """
        try:
            before = await asyncio.to_thread(self.directory.moving)
            if before is None:
                await asyncio.to_thread(self.directory.begin_move, where)
        except OSError as error:
            raise storage_error(error) from error
        if before not in (None, where):
            raise SpoolError(
                f"{self.directory.path}: its mail is being moved into another queue; finish that first, with the "
                "settings of that queue"
            )

    async def end_move(self) -> None:
        """No message is in both stores any more."""
        try:
            await asyncio.to_thread(self.directory.end_move)
        except OSError as error:
            raise storage_error(error) from error

    async def whole(self, message_id: str) -> MovedMessage:
        """A message with all that is known of it.

        Raises:
            NoSuchMessage: there is none of that id.
        """
        return (await self.indexing.look_up(message_id)).moved(self._now_ms())

    async def forget(self, message_id: str) -> None:
        """Remove a message that another store has, as if it had never been accepted here."""
        entry = await self.indexing.get(message_id)
        name, recipients = entry.accepted
        await self.journal.change(entry, None, {name: -recipients})
