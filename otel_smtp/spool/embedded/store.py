"""The store: one thread that owns directory and index, and makes durable in one go whatever waits for it.

While the thread syncs, more work gathers; that becomes the next group. So a lone message waits for nobody, and under
load one sync serves all that came during the last one. The order within a group is the promise (P1)::

    contents written > file synced > renamed into body/ > directory synced > rows committed (log synced) > 250

Any error before the end fails the messages of the group, and nothing of them is left behind that a start would not
clear away. An error that says that the disk or the index cannot be trusted *latches*: nothing is accepted or leased
any more until the gateway was started anew, since a delivery whose result cannot be recorded would be repeated for
ever. A full disk is less: new mail is refused, and the reserve makes room for the results of what is being delivered.
"""

import asyncio
import hashlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from otel_smtp.spool.embedded.draft import MEMORY_LIMIT_OCTETS, Draft
from otel_smtp.spool.embedded.files import RESERVE_OCTETS, Placement, SpoolDirectory
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.messages import (
    ContentRef,
    Counts,
    Lease,
    NewMessage,
    Shown,
    SpoolError,
    StaleLease,
    StorageBroken,
    StorageFull,
    Verdict,
)
from otel_smtp.spool.store import Draft as AnyDraft
from otel_smtp.spool.store import Notice, Recovery

logger: Final = logging.getLogger("otel_smtp.spool.store")

GROUP_MOST: Final = 256  # jobs that share a commit: beyond, the first would wait for the last
GATHER_SECONDS: Final = 0.005  # a delivery's result waits so long for a message that comes in, to share its sync
GROUP_OCTETS: Final = 4 * 1024 * 1024  # of contents that share a file
DEFAULT_MOST_MESSAGES: Final = 100_000  # Postfix's operators saw directories of more become slow
DEFAULT_LEAST_FREE_OCTETS: Final = 40 * 1024 * 1024  # 1.5 times the largest message, as Postfix asks before MAIL
LEAST_FREE_INODES: Final = 0.01
CRASHES_ALLOWED: Final = 3
ROOM_CHECK_SECONDS: Final = 1.0
CLOCK_JUMP_SECONDS: Final = 60.0

T = TypeVar("T")


class _Job(Generic[T]):
    """Something to be done in the store's thread, and who waits for it."""

    __slots__ = ("apply", "contents", "file", "is_result", "loop", "outcome", "placement", "waiter")

    def __init__(
        self,
        apply: Callable[[Index, Placement | None], T],
        waiter: asyncio.Future[T],
        *,
        contents: Sequence[bytes] | None = None,
        file: tuple[Path, int, bytes] | None = None,
        is_result: bool = False,
    ) -> None:
        self.apply = apply
        self.waiter = waiter
        self.contents = contents
        self.file = file
        self.is_result = is_result
        self.placement: Placement | None = None
        self.outcome: T | BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it is over, badly."""
        return isinstance(self.outcome, BaseException)


class EmbeddedStore:
    """A spool in one directory.

    Args:
        path: the directory; made where it is missing.
        most_messages: beyond, new mail is refused.
        least_free_octets: below, new mail is refused.
        crashes_allowed: how many crashes a message may be part of before it is held.
        clock: the wall clock, in seconds since the epoch.

    Attributes:
        most_messages: as above.
    """

    def __init__(
        self,
        path: Path,
        *,
        reserve_octets: int = RESERVE_OCTETS,
        most_messages: int = DEFAULT_MOST_MESSAGES,
        least_free_octets: int = DEFAULT_LEAST_FREE_OCTETS,
        crashes_allowed: int = CRASHES_ALLOWED,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = SpoolDirectory(path, reserve_octets=reserve_octets)
        self.most_messages = most_messages
        self._least_free = least_free_octets
        self._crashes_allowed = crashes_allowed
        self._clock = clock
        self._clocks = (clock(), time.monotonic())
        self._jobs: deque[_Job[Any]] = deque()
        self._there_is_work = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._fault: StorageBroken | None = None
        self._unneeded: set[str] = set()  # files that lost their last message
        self._is_full = False
        self._room_checked_at = 0.0
        self._has_room = True
        self._messages = 0
        self._nudge: asyncio.TimerHandle | None = None  # wakes the thread for what is not urgent

    # Life -------------------------------------------------------------------------------------------------

    async def open(self) -> Recovery:
        """Own the directory, clear away what was never answered, and take back what a crash left behind.

        Raises:
            SpoolError: it belongs to another process, or cannot be used.
        """
        loop = self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[Recovery] = loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="spool", daemon=True)
        self._thread.start()
        return await opened

    async def close(self) -> None:
        """Finish what was asked for, and give the directory up. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._is_stopping = True
            self._there_is_work.set()
            await asyncio.to_thread(thread.join)

    # What the loop asks for -------------------------------------------------------------------------------

    @property
    def fault(self) -> str | None:
        """Why the spool needs an operator; None: it does not."""
        return str(self._fault) if self._fault is not None else None

    def refusal(self) -> SpoolError | None:
        """Why no mail can be taken now, if so. Cheap: asked at each MAIL."""
        if self._fault is not None:
            return self._fault
        if self._messages >= self.most_messages:
            return StorageFull(f"the spool holds {self._messages} messages already")
        now = time.monotonic()
        if now - self._room_checked_at >= ROOM_CHECK_SECONDS:
            self._room_checked_at = now
            self._check_room()
        return None if self._has_room else StorageFull("the disk of the spool is nearly full")

    def _check_room(self) -> None:
        try:
            octets, inodes = self.directory.room()
        except OSError:
            self._has_room = False
            return
        had_room, self._has_room = self._has_room, octets >= self._least_free and inodes >= LEAST_FREE_INODES
        if had_room and not self._has_room:
            logger.error("no room for new mail", extra={"free_octets": octets, "free_inodes_share": round(inodes, 3)})

    def draft(self) -> Draft:
        """A new content."""
        return Draft(self.directory.temporary)

    def submit(self, message: NewMessage, draft: AnyDraft, *, lease: bool) -> asyncio.Future[Sequence[Lease]]:
        """See `Store.submit`."""
        assert isinstance(draft, Draft)
        return asyncio.get_running_loop().create_task(self._submit(message, draft, is_leased=lease))

    async def _submit(self, message: NewMessage, draft: Draft, *, is_leased: bool) -> Sequence[Lease]:
        owner = "local" if is_leased else None
        now = self._clock()

        def insert(index: Index, placement: Placement | None) -> Sequence[Lease]:
            assert placement is not None
            return index.insert(message, placement, now=now, owner=owner)

        with draft:
            await draft.end()
            # A caller that is cancelled discards its draft, while the thread is at work with what was handed over.
            contents, file = draft.hand_over()
            return await self._do(insert, contents=contents, file=file)

    async def _apply(self, work: Callable[[Index], T]) -> T:
        return await self._do(lambda index, _: work(index))

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        """See `Store.claim`."""
        now = self._clock()

        def due(index: Index) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
            leases = index.due(now, wanted, "local", now + 3600)
            return [(lease, self._small_content(lease)) for lease in leases], index.next_due(wanted)

        leases, next_due_at = await self._apply(due)
        return leases, None if next_due_at is None else max(0.0, next_due_at - now)

    def _small_content(self, lease: Lease) -> Sequence[bytes] | None:
        placement = _placement(lease.content)
        if placement.octets > MEMORY_LIMIT_OCTETS:
            return None
        try:
            content = self.directory.read(placement, 0, placement.octets)
        except SpoolError:  # whoever needs it will see for themselves, and say so
            return None
        if hashlib.sha256(content).digest() != placement.digest:
            return None
        return content[: lease.header_octets], content[lease.header_octets :]

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
    ) -> asyncio.Future[None]:
        """See `Store.finish`."""
        next_at = self._clock() + retry_in
        return asyncio.get_running_loop().create_task(
            self._record(
                lambda index: index.finish(
                    lease, verdicts,
                    next_at=next_at, is_possible_duplicate=is_possible_duplicate, counts_attempt=counts_attempt, hold=hold,
                ),
                notices, is_urgent=is_urgent,
            )
        )  # fmt: skip

    async def mark_corrupt(self, lease: Lease) -> None:
        """See `Store.mark_corrupt`."""
        await self._record(lambda index: index.mark_corrupt(lease))

    async def end_overdue(self, most: int) -> Sequence[Lease]:
        """See `Store.end_overdue`."""
        now = self._clock()
        return await self._apply(lambda index: index.overdue(now, most, "local"))

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        """See `Store.unwarned`."""
        before = self._clock() - age
        return await self._apply(lambda index: index.unwarned(before, most))

    async def warn(self, message_id: str, notices: Sequence[Notice]) -> bool:
        """See `Store.warn`."""

        def note(index: Index) -> None:
            if not index.warned(message_id):
                raise StaleLease("the sender has been warned")

        try:
            await self._record(note, notices)
        except StaleLease:
            return False
        return True

    async def destinations(self) -> Sequence[str]:
        """See `Store.destinations`."""
        return await self._apply(lambda index: index.destinations())

    async def counts(self) -> Counts:
        """See `Store.counts`."""
        now = self._clock()
        return await self._apply(lambda index: index.counts(now))

    async def tally(self) -> Mapping[str, int]:
        """See `Store.tally`."""
        return await self._apply(lambda index: index.tally())

    async def page(self, after: str, most: int) -> Sequence[Shown]:
        """See `Store.page`."""
        return await self._apply(lambda index: index.page(after, most))

    async def show(self, message_id: str) -> Shown:
        """See `Store.show`."""
        return await self._apply(lambda index: index.show(message_id))

    async def find(
        self, *, trace_id: str | None = None, sender: str | None = None, recipient: str | None = None, most: int
    ) -> Sequence[Shown]:
        """See `Store.find`."""
        return await self._apply(lambda index: index.find(trace_id, sender, recipient, most))

    async def retry(self, message_id: str) -> bool:
        """See `Store.retry`."""
        now = self._clock()
        return await self._record(lambda index: index.retry(message_id, now))

    async def hold(self, message_id: str) -> bool:
        """See `Store.hold`."""
        now = self._clock()
        return await self._record(lambda index: index.hold(message_id, now))

    async def release(self, message_id: str) -> bool:
        """See `Store.release`."""
        now = self._clock()
        return await self._record(lambda index: index.release(message_id, now))

    async def expire(self, message_id: str) -> bool:
        """See `Store.expire`."""
        now = self._clock()
        return await self._record(lambda index: index.expire(message_id, now))

    async def reset(self, message_id: str, expires_in: float) -> bool:
        """See `Store.reset`."""
        now = self._clock()
        return await self._record(lambda index: index.reset(message_id, now, now + expires_in))

    async def delete(self, message_id: str) -> int:
        """See `Store.delete`."""
        return await self._record(lambda index: index.delete(message_id))

    async def _record(
        self,
        work: Callable[[Index], T],
        notices: Sequence[Notice] = (),
        *,
        is_urgent: bool = True,
    ) -> T:
        """Record a result, together with the messages that tell of it. The reserve is for this."""
        if not notices:
            return await self._do(lambda index, _: work(index), is_result=True, is_urgent=is_urgent)
        now = self._clock()

        def both(index: Index, placement: Placement | None) -> T:
            assert placement is not None
            result = work(index)
            offset = placement.offset
            for message, content in notices:
                index.insert(message, _part(placement, offset, content), now=now, owner=None)
                offset += len(content)
            return result

        return await self._do(both, contents=[content for _, content in notices], is_result=True)

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """See `Store.read`."""
        return await asyncio.to_thread(self.directory.read, _placement(content), start, octets)

    async def is_intact(self, content: ContentRef) -> bool:
        """See `Store.is_intact`."""
        return await asyncio.to_thread(self.directory.is_intact, _placement(content))

    async def housekeep(self) -> None:
        """See `Store.housekeep`: look at the clocks, and take the reserve again if there is room for it."""
        if self._is_full and self._fault is None and await asyncio.to_thread(self.directory.fill_reserve):
            self._is_full = False
            logger.warning("the reserve is filled again")
        wall, monotonic = self._clock(), time.monotonic()
        jump = (wall - self._clocks[0]) - (monotonic - self._clocks[1])
        self._clocks = (wall, monotonic)
        if abs(jump) >= CLOCK_JUMP_SECONDS:
            moved = await self._apply(lambda index: index.move(jump)) if jump < 0 else 0
            logger.warning("the clock jumped", extra={"seconds": round(jump), "attempts_moved": moved})

    async def _do(
        self,
        apply: Callable[[Index, Placement | None], T],
        *,
        contents: Sequence[bytes] | None = None,
        file: tuple[Path, int, bytes] | None = None,
        is_result: bool = False,
        is_urgent: bool = True,
    ) -> T:
        if self._fault is not None:
            raise self._fault
        if self._thread is None:
            raise SpoolError("the spool is closed")
        assert self._loop is not None
        job = _Job(apply, self._loop.create_future(), contents=contents, file=file, is_result=is_result)
        self._jobs.append(job)
        if is_urgent or self._is_stopping:
            self._there_is_work.set()
        elif self._nudge is None or self._nudge.when() < self._loop.time():
            self._nudge = self._loop.call_later(GATHER_SECONDS, self._there_is_work.set)
        # A job that was begun ends, whoever waits: its outcome is on disk.
        return await asyncio.shield(job.waiter)

    # The thread -------------------------------------------------------------------------------------------

    def _run(self, opened: "asyncio.Future[Recovery]") -> None:
        assert self._loop is not None
        call = self._loop.call_soon_threadsafe
        try:
            index, recovery = self._open()
        except (SpoolError, OSError, sqlite3.Error) as error:
            self.directory.close(is_clean=False)
            failure = error if isinstance(error, SpoolError) else SpoolError(f"{self.directory.path}: {error}")
            call(_fail, opened, failure)
            return
        self._messages = index.messages
        call(_succeed, opened, recovery)
        try:
            while not (self._is_stopping and not self._jobs):
                self._there_is_work.wait()
                self._there_is_work.clear()
                while self._jobs:
                    self._serve(index)
                self.directory.prepare()
        finally:
            self._close(index)

    def _open(self) -> tuple[Index, Recovery]:
        directory = self.directory
        directory.open()
        index = Index(directory.index_path)
        try:
            if not directory.was_clean:
                index.check()
            present, needed = set(directory.files()), index.files()
            stray = present - needed
            directory.remove(stray)
            index.begin()
            lost = index.without_file(needed - present)
            interrupted, held = index.take_back_leases(crashes_allowed=self._crashes_allowed, now=self._clock())
            index.commit()
        except BaseException:
            index.close()
            raise
        if not directory.fill_reserve():
            self._is_full = True
            logger.warning("no room for the reserve of the spool")
        return index, Recovery(index.messages, interrupted, held, lost)

    def _close(self, index: Index) -> None:
        try:
            if self._fault is None:
                index.begin()
                index.take_back_leases(crashes_allowed=None, now=self._clock())
                index.commit()
            index.close()
        except sqlite3.Error:
            logger.exception("the spool was not closed well")
            self.directory.close(is_clean=False)
        else:
            self.directory.close(is_clean=self._fault is None)

    def _serve(self, index: Index) -> None:
        """Do the next group of jobs, and tell those who wait."""
        group: list[_Job[Any]] = []
        octets = 0
        while self._jobs and len(group) < GROUP_MOST and octets < GROUP_OCTETS:
            job = self._jobs.popleft()
            octets += sum(map(len, job.contents or ()))
            group.append(job)
        if self._fault is not None:
            for job in group:
                job.outcome = self._fault
        else:
            try:
                self._keep_contents(group)
                self._commit(index, [job for job in group if not job.has_failed])
            except Exception:
                # Our bug fails the group it met, and nothing else: the thread serves on.
                logger.exception("the spool failed by our fault")
                self._roll_back(index)
                for job in group:
                    job.outcome = SpoolError("internal error")
        self._messages = index.messages
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_tell, group)
        except RuntimeError:  # the loop is closed: nobody waits any more
            logger.warning("the spool's last results had nobody to be told")
        # Afterwards: nobody needs to wait for it.
        self.directory.remove(self._unneeded)
        self._unneeded.clear()

    def _keep_contents(self, group: Sequence[_Job[Any]]) -> None:
        together = [job for job in group if job.contents is not None]
        alone = [job for job in group if job.file is not None]
        try:
            if together:
                placements = self.directory.keep_together([job.contents or () for job in together])
                for job, placement in zip(together, placements, strict=True):
                    job.placement = placement
        except SpoolError as error:
            if isinstance(error, StorageFull) and any(job.is_result for job in together) and self._use_reserve():
                for job in together:
                    if not job.is_result:
                        job.outcome = error
                self._keep_contents([job for job in together if job.is_result])
            else:
                self._note(error)
                for job in together:
                    job.outcome = error
        for job in alone:
            assert job.file is not None
            try:
                job.placement = self.directory.keep(*job.file)
            except SpoolError as error:
                self._note(error)
                job.outcome = error

    def _commit(self, index: Index, jobs: Sequence[_Job[Any]]) -> None:
        if not jobs:
            return
        try:
            index.begin()
            # New messages last: nothing of this group can speak of them yet, and their rows are written together.
            for job in sorted(jobs, key=_is_new_message):
                try:
                    job.outcome = job.apply(index, job.placement)
                except SpoolError as error:  # it looked before it wrote, and wrote nothing
                    job.outcome = error
            self._unneeded.update(index.commit())
        except sqlite3.Error as error:
            fault = _index_error(error)
            self._roll_back(index)
            rest = [job for job in jobs if job.is_result]
            if isinstance(fault, StorageFull) and rest and self._use_reserve():
                for job in jobs:
                    job.outcome = fault
                self._commit(index, rest)
                return
            self._note(fault)
            for job in jobs:
                job.outcome = fault
        if self._fault is None:
            # With a fault nobody knows: what could not be synced may stand in the index after the next start.
            needed = {job.placement.file for job in jobs if job.placement is not None and not job.has_failed}
            left = {job.placement.file for job in jobs if job.placement is not None and job.has_failed}
            self._unneeded.update(left - needed)

    def _roll_back(self, index: Index) -> None:
        try:
            index.roll_back()
        except sqlite3.Error as error:
            self._note(_index_error(error))

    def _use_reserve(self) -> bool:
        self._is_full = True
        self._room_checked_at = 0.0
        return self.directory.release_reserve()

    def _note(self, error: SpoolError) -> None:
        """Latch what cannot be trusted any more."""
        if isinstance(error, StorageBroken):
            if self._fault is None:
                self._fault = error
                logger.critical(
                    "the spool cannot be trusted: no mail is taken or delivered until the gateway is started anew",
                    extra={"fault": str(error)},
                )
        else:
            logger.error("a message was not made durable", extra={"fault": str(error)})


def _is_new_message(job: _Job[Any]) -> bool:
    return job.placement is not None and not job.is_result


def _placement(content: ContentRef) -> Placement:
    assert isinstance(content.key, Placement)
    return content.key


def _part(placement: Placement, offset: int, content: bytes) -> Placement:
    return Placement(placement.file, offset, len(content), hashlib.sha256(content).digest())


def _index_error(error: sqlite3.Error) -> SpoolError:
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
        return StorageFull(f"the disk is full: {error}")
    return StorageBroken(f"the index failed: {error}")


def _tell(group: Sequence[_Job[Any]]) -> None:
    for job in group:
        if job.waiter.done():
            continue
        if isinstance(job.outcome, BaseException):
            job.waiter.set_exception(job.outcome)
        else:
            job.waiter.set_result(job.outcome)


def _fail(waiter: "asyncio.Future[Any]", error: BaseException) -> None:
    if not waiter.done():
        waiter.set_exception(error)


def _succeed(waiter: "asyncio.Future[T]", value: T) -> None:
    if not waiter.done():
        waiter.set_result(value)
