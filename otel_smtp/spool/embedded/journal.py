"""The journal writes records to the log, and notes them in memory when they are durable.

A record is noted by its step, never by the task that waits for it: the task may resume only after later records are
reported, when the index may already be marked complete up to one of them.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.embedded.log import Log, Part, Room, Step
from otel_smtp.spool.embedded.memory import Memory
from otel_smtp.spool.embedded.records import RecordKind
from otel_smtp.spool.messages import Lease, SpoolError, StorageBroken
from otel_smtp.spool.promises import Promise
from otel_smtp.spool.store import Notice

# Looking a member up in its class costs as much as a call.
_MAIL: Final = Room.MAIL
_RESULT: Final = Room.RESULT
_MESSAGE: Final = RecordKind.MESSAGE
_END: Final = RecordKind.END


class Journal:
    """Writes the changes of messages.

    Args:
        now_ms: gives milliseconds since the epoch.
        remove_large: removes the file of a content; called in a thread.

    Attributes:
        memory, now_ms: as above.
        log: where the records go; set by `begin`.
        is_closing: no new mail is accepted, and no step waits to share a sync.
    """

    log: Log

    def __init__(self, memory: Memory, now_ms: Callable[[], int], remove_large: Callable[[str], None]) -> None:
        self.memory = memory
        self.now_ms = now_ms
        self._remove_large = remove_large
        self._log: Log | None = None  # until `begin`
        self.is_closing = False

    def begin(self, log: Log) -> None:
        """Write to this log from now on. Call on the event loop."""
        self._log = self.log = log
        self._loop = asyncio.get_running_loop()

    def latch(self, error: SpoolError) -> None:
        """Note an error; after one that makes the disk untrustworthy, nothing more is written."""
        if isinstance(error, StorageBroken) and self._log is not None:
            self._log.latch(error)

    def _start(self, step: Step[Any], *, is_urgent: bool = True) -> None:
        if self._log is None or (self.is_closing and step.room is _MAIL):
            raise SpoolError("the spool is closed")
        self._log.append(step, is_urgent=is_urgent or self.is_closing)

    async def append(
        self,
        parts: Sequence[Part],
        *,
        ended: Mapping[str, int] | None = None,
        durable: Callable[[Step[None]], None] = lambda _: None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Write records.

        Args:
            durable: called to note them, before later records are reported.
            failed: called instead if they are not durable; one of the two is always called, even if nothing awaits the
                answer.
        """
        step = _Work(parts, ended or {}, durable, failed)
        try:
            self._start(step)
        except SpoolError:
            failed()
            raise
        await step

    def add(
        self, entry: Entry, content: Sequence[bytes], crc: int | None, *, is_new: bool = True
    ) -> Promise[Sequence[Lease]]:
        """Write a new message. The answer is given when it is durable.

        Args:
            crc: of the content, if it has its own file.
        """
        step = _Addition(self.memory, entry, content, crc, is_new=is_new)
        try:
            self._start(step)
        except SpoolError as error:
            step.fail(error)
        return step

    def change(
        self,
        entry: Entry,
        changed: Entry | None,
        ended: Mapping[str, int],
        notices: Sequence[Notice] = (),
        *,
        is_urgent: bool = True,
    ) -> Promise[None]:
        """Replace `entry`, which must not be busy, by `changed`, together with the notices that report it.

        Args:
            changed: None: the message ends.
            ended: the increments of the tally, by name.
        """
        if changed is None:
            parts: list[Part] = [(_END, f'{{"id":"{entry.id}","ended":{_tally(ended)}}}', ())]
        else:
            parts = [(RecordKind.STATE, f"[{_tally(ended)},{changed.encode()}]", ())]
        counted = ended
        added: list[Entry] = []
        if notices:
            counted = dict(ended)
            for message, content in notices:
                notice = Entry.of(message, self.now_ms(), len(content), is_leased=False, is_large=False)
                added.append(notice)
                parts.append(message_part(notice, (content,), None, is_new=True))
                name, recipients = notice.accepted
                counted[name] = counted.get(name, 0) + recipients
        step = _Change(parts, counted, self, entry, changed, added)
        entry.is_busy = True
        try:
            self._start(step, is_urgent=is_urgent)
        except SpoolError as error:
            self.memory.set_free(entry)
            step.fail(error)
        return step

    def remove_large(self, message_id: str) -> None:
        """Remove the file of the content of a message that has ended."""
        self._loop.run_in_executor(None, self._remove_large, message_id)


class _Work(Step[None]):
    """A step with records about several messages, or none; see `Journal.append`."""

    __slots__ = ("_durable", "_failed")

    def __init__(
        self,
        parts: Sequence[Part],
        ended: Mapping[str, int],
        durable: Callable[[Step[None]], None],
        failed: Callable[[], None],
    ) -> None:
        super().__init__(parts, ended=ended, room=Room.WORK)
        self._durable = durable
        self._failed = failed

    def is_durable(self) -> None:
        self._durable(self)

    def is_not_durable(self) -> None:
        self._failed()


class _Addition(Step[Sequence[Lease]]):
    """The step of a new message."""

    __slots__ = ("_content", "_crc", "_entry", "_memory")

    def __init__(
        self, memory: Memory, entry: Entry, content: Sequence[bytes], crc: int | None, *, is_new: bool
    ) -> None:
        name, recipients = entry.accepted
        super().__init__(
            (message_part(entry, content, crc, is_new=is_new),), ended={name: recipients} if is_new else {}, room=_MAIL
        )
        self._memory = memory
        self._entry = entry
        self._content = content if is_new else ()
        self._crc = crc

    def is_durable(self) -> Sequence[Lease]:
        entry = self._entry
        self._memory.note_new(entry, self, 0, self._crc)
        leases = entry.leases()
        if self._content and len(leases) < len(entry.deliveries):
            self._memory.keep_content(entry, self._content)
        return leases


class _Change(Step[None]):
    """The step of a message that changes, or ends, with the notices that report it."""

    __slots__ = ("_added", "_changed", "_entry", "_journal")

    def __init__(
        self,
        parts: Sequence[Part],
        ended: Mapping[str, int],
        journal: Journal,
        entry: Entry,
        changed: Entry | None,
        added: Sequence[Entry],
    ) -> None:
        super().__init__(parts, ended=ended, room=_RESULT)
        self._journal = journal
        self._entry = entry
        self._changed = changed
        self._added = added

    def is_durable(self) -> None:
        entry, changed, memory = self._entry, self._changed, self._journal.memory
        position = (self.segment, self.places[0][0])
        memory.set_free(entry)
        if changed is None:
            memory.note_end(entry, position)
            if entry.is_large:
                self._journal.remove_large(entry.id)
        else:
            changed.place = entry.place  # it may have moved meanwhile
            memory.note(changed, position)
        for part, notice in enumerate(self._added, 1):
            memory.note_new(notice, self, part, None)

    def is_not_durable(self) -> None:
        memory = self._journal.memory
        memory.set_free(self._entry)
        memory.waiting.offer(self._entry)


def message_part(entry: Entry, content: Sequence[bytes], crc: int | None, *, is_new: bool) -> Part:
    """The record of a message.

    Args:
        crc: of the content, unless computed from the record's own: the content has its own file, or is moved and may
            already have been damaged.
    """
    return _MESSAGE, f"[{int(is_new)},{'null' if crc is None else crc},{entry.encode()}]", content


def _tally(ended: Mapping[str, int]) -> str:
    """As JSON; the names are ours."""
    counts = ""
    for name, recipients in ended.items():
        counts += f',"{name}":{recipients}'
    return f"{{{counts[1:]}}}"
