"""Moves all mail of one gateway's directory, and its outcomes for the application, into a shared queue.

A message is first made durable there, under the same id and with a note that it was moved, then ended in the directory,
then the note is removed. A crash in between leaves it in both, and the next run continues: a message noted as moved is
not stored again, whatever has happened to it there meanwhile. While a message may be in both, no gateway opens the
directory.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from otel_smtp.spool.messages import ContentLost, ContentRef, MessageView, MovedMessage

MESSAGES_AT_ONCE: Final = 100


class Source(Protocol):
    """The store to empty; it is open, and nothing is delivered from it."""

    async def begin_move(self, where: str) -> None:
        """From here on, until `end_move`, no gateway may deliver from it."""
        ...

    async def end_move(self) -> None:
        """No message is in both any more."""
        ...

    async def page(self, after: str, most: int, *, outcomes: bool = False) -> Sequence[MessageView]:
        """See `Store.page`."""
        ...

    async def whole(self, message_id: str) -> MovedMessage:
        """A message with its whole state."""
        ...

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """See `Store.read`."""
        ...

    async def is_intact(self, content: ContentRef) -> bool:
        """See `Store.is_intact`."""
        ...

    async def forget(self, message_id: str) -> None:
        """Remove a message that the other store has, as if it had never been accepted here."""
        ...


class Target(Protocol):
    """The store that receives the messages.

    Attributes:
        name: unique among all stores.
        piece_octets: length of the pieces in which it takes content.
    """

    piece_octets: int

    @property
    def name(self) -> str: ...

    async def take_in(self, message: MovedMessage, content: Sequence[bytes], *, is_intact: bool) -> bool:
        """Make a message durable; False: it was moved before, and may have ended here."""
        ...

    async def forget_moved(self, ids: Sequence[str]) -> None:
        """Drop the notes of these messages, which the source no longer has."""
        ...

    async def tell(self, what: str) -> None:
        """Tell all gateways to look for due messages."""
        ...


@dataclass(slots=True)
class Moved:
    """The result of a move.

    Attributes:
        messages: how many were moved.
        finished: how many an earlier run had stored there.
        left: ids of those that cannot be moved, and why.
    """

    messages: int = 0
    finished: int = 0
    left: dict[str, str] = field(default_factory=dict)


async def move(source: Source, target: Target, moved: Callable[[], None] = lambda: None) -> Moved:
    """Move all messages.

    Args:
        moved: called for each moved message.

    Raises:
        SpoolError: a store failed; nothing is lost, and the next run goes on from there.
    """
    done = Moved()
    await source.begin_move(target.name)
    for outcomes in (False, True):
        await _move(source, target, moved, done, outcomes=outcomes)
    await source.end_move()
    return done


async def _move(source: Source, target: Target, moved: Callable[[], None], done: Moved, *, outcomes: bool) -> None:
    after = ""
    while page := await source.page(after, MESSAGES_AT_ONCE, outcomes=outcomes):
        after = page[-1].id
        there: list[str] = []
        for shown in page:
            try:
                is_new = await _bring(source, target, shown.id)
            except ContentLost as error:
                done.left[shown.id] = str(error)
                continue
            there.append(shown.id)
            done.messages += is_new
            done.finished += not is_new
        # All of them, whatever happens to one: messages that have ended here are reported below, or at the next run.
        results = await asyncio.gather(*(source.forget(one) for one in there), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        await target.forget_moved(there)
        await target.tell("due")
        for _ in there:
            moved()


async def _bring(source: Source, target: Target, message_id: str) -> bool:
    message = await source.whole(message_id)
    content = message.content
    pieces = [
        await source.read(content, start, min(target.piece_octets, content.octets - start))
        for start in range(0, content.octets, target.piece_octets)
    ]
    return await target.take_in(message, pieces, is_intact=await source.is_intact(content))
