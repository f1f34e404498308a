"""What forwarders, runner, notices and operators need of a store: one interface, each verb one transaction.

A store may be a directory of this machine, or a database that gateways share. So nothing in it names a file, a
connection or an instant of the caller's clock: times that go in are durations, and the store adds its own now.
"""

from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from otel_smtp.forwarding.base import Ledger
from otel_smtp.spool.messages import (
    Backlog,
    Company,
    ContentRef,
    Counts,
    Lease,
    MessageView,
    NewMessage,
    ShareOfQueue,
    SpoolError,
    Timings,
    Verdict,
)

Notice = tuple[NewMessage, bytes]
"""A message of our own that reports on others, with its content; the first octets are its header block."""


T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """An answer that is to come, as far as its callers need it; an `asyncio.Future` is one."""

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None:
        """Call `callback` with this on the event loop when there is an answer."""
        ...

    def done(self) -> bool:
        """Whether there is an answer."""
        ...

    def result(self) -> T_co:
        """The answer, where there is one; raises the error where that is it."""
        ...

    def __await__(self) -> Generator[Any, Any, T_co]: ...


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found when a store was opened.

    Attributes:
        messages: that are queued.
        interrupted: deliveries that were being attempted when the process before died.
        held: the messages that were part of too many crashes.
        lost: those whose content is not there.
        remarks: what else an operator should know, in words.
        alarms: what was set aside and may be mail, in words.
    """

    messages: int = 0
    interrupted: int = 0
    held: Sequence[str] = ()
    lost: Sequence[str] = ()
    remarks: Sequence[str] = ()
    alarms: Sequence[str] = ()


class NotFound(NamedTuple):
    """A message whose content is not to be found, as far as anything knows of it.

    Attributes:
        reason: why it cannot be delivered, in words.
        is_queued: it is still in the queue, as corrupt.
    """

    id: str
    reverse_path: str
    recipients: Sequence[str]
    reason: str
    is_queued: bool


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuild came to.

    Attributes:
        told: what became of what was set aside, in words.
        not_found: messages whose contents are lost.
    """

    told: Sequence[str] = ()
    not_found: Sequence[NotFound] = ()


class Draft(Protocol):
    """A content that is being received. One that cannot be written goes on taking what comes; `submit` then fails."""

    @property
    def header_octets(self) -> int:
        """Length of the first chunk, the header block."""
        ...

    @property
    def in_memory(self) -> Sequence[bytes] | None:
        """All chunks, where they are at hand."""
        ...

    @property
    def is_8bit(self) -> bool:
        """Whether any octet of it is above 127."""
        ...

    def write(self, chunk: bytes, resume: Callable[[], None]) -> bool:
        """Add some more; the first chunk is the header block.

        Args:
            resume: called once, on the event loop, when more may come after False.

        Returns:
            Whether more may come now.
        """
        ...

    def hold(self, header: bytes, body: bytes) -> bool:
        """Take a content that is whole: each `write` in one, where that needs no file.

        Args:
            body: may be empty.

        Returns:
            Whether it was taken; if not, it is to be written.
        """
        ...

    def discard(self) -> None:
        """Forget it. Idempotent; what was submitted is not touched."""
        ...


class Woken(Protocol):
    """The worker on the queue, as far as others need it."""

    def wake(self, destinations: Sequence[str] = ()) -> None:
        """Something is due."""
        ...

    def look_soon(self) -> None:
        """Something is too old."""
        ...

    def note(self, deed: str) -> None:
        """An operator has changed a message, see `deeds.Deed.as_text`: report it."""
        ...

    def note_crashes(self, message_ids: Sequence[str]) -> None:
        """These are held now, since they were part of too many crashes: report it."""
        ...


class Store(Protocol):
    """A place where mail is durable.

    Every verb may raise `SpoolError`: nothing was changed then. A lease belongs to this process until it is finished or
    the store is closed; results of a lease that is not its delivery's last one raise `StaleLease`.

    Attributes:
        look_again_seconds: how often to look for what others have queued; None: there are no others.
        timings: what it did lately; reading them takes them away.
    """

    look_again_seconds: float | None
    timings: Timings

    @property
    def ledger(self) -> Ledger | None:
        """Keeps the limits and connection slots of all gateways that share it; None: it is one gateway's."""
        ...

    async def open(self) -> Recovery:
        """Own it, and take back the leases of the process before."""
        ...

    async def close(self) -> None:
        """Finish what was asked for, and give it up. Idempotent."""
        ...

    def refusal(self) -> SpoolError | None:
        """Why no mail can be taken now, if so. Cheap: asked at each MAIL."""
        ...

    def alarm(self) -> str | None:
        """Why an operator has to look, though mail is taken and delivered; None: there is no reason. Cheap."""
        ...

    def watch(self, woken: Woken) -> None:
        """Notify a watcher when another process has changed what is queued."""
        ...

    # Messages in -----------------------------------------------------------------------------------------------

    def draft(self) -> Draft:
        """A new content."""
        ...

    def submit(self, message: NewMessage, draft: Draft, *, lease: bool) -> Pending[Sequence[Lease]]:
        """Make a message durable.

        Args:
            draft: one of this store's, all of which has been written; it is the store's from here on.
            lease: its deliveries are attempted at once, by the caller.

        Returns:
            Done when the message is durable, with its leases, or with a `SpoolError`: then nothing of it is left.
            A caller that gives up waiting leaves a whole message.
        """
        ...

    # Deliveries ------------------------------------------------------------------------------------------------

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        """Lease what is due, and count the attempt.

        New messages and those tried before take turns, so that a backlog never starves new mail. Among those, the ones
        due first, one of each sender after the other within a sample, so that one sender's thousands do not hold up
        all others.

        Args:
            wanted: how many at most, by destination.

        Returns:
            The leases, small contents with them (the header block first; read whole and intact), and in how many
            seconds the next delivery to one of the destinations is due that is not too old.
        """
        ...

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
        """Note what an attempt came to, together with the messages that report it: all or nothing.

        Args:
            retry_in: in how many seconds what has not ended is due again.
            is_possible_duplicate: an upstream may have taken it without our knowing.
            counts_attempt: False: no upstream was asked; it was no attempt.
            hold: what has not ended waits for an operator.
            is_urgent: False: it may wait a moment for others to share its sync.
        """
        ...

    async def mark_corrupt(self, lease: Lease) -> None:
        """Its content is damaged: it waits for an operator, does not age meanwhile, and counts as nothing else."""
        ...

    async def end_overdue(self, most: int, *, outcomes: bool = False) -> Sequence[Lease]:
        """Lease what is too old, without counting an attempt: to be ended by the caller.

        Args:
            outcomes: of those, and not of mail.
        """
        ...

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        """Deliveries older than `age` seconds whose sender is due a warning; not leased, only shown."""
        ...

    async def warn(self, message_id: str, notices: Sequence[Notice]) -> bool:
        """Note that the sender was warned, by `notices`; False where that was noted before, or the message is gone."""
        ...

    async def destinations(self, *, outcomes: bool = False, known: Collection[str] = ()) -> Sequence[str]:
        """All destinations that mail waits for; or, with `outcomes`, those that outcomes wait for.

        Args:
            known: those that are left out.
        """
        ...

    def holds(self, lease: Lease) -> bool:
        """Whether a lease is surely ours at this moment. Cheap: asked before content, and its end, are sent."""
        ...

    # Contents --------------------------------------------------------------------------------------------------

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """A part of a content.

        Raises:
            ContentLost: it is not there, or not all of it.
        """
        ...

    async def is_intact(self, content: ContentRef) -> bool:
        """Whether a content is there and is what was written."""
        ...

    # What operators see and do ---------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """How much mail there is in which state; outcomes are not counted."""
        ...

    async def backlog(self, destinations: Sequence[str]) -> Mapping[str, Backlog]:
        """The outcomes that wait, or are being sent, for each of these destinations."""
        ...

    async def tally(self) -> Mapping[str, int]:
        """Recipients that were ever accepted, and how many of them ended in which way."""
        ...

    async def page(self, after: str, most: int, *, outcomes: bool = False) -> Sequence[MessageView]:
        """At most `most` messages whose ids follow `after`, in the order of their ids, which is that of arrival.

        Args:
            outcomes: those, and no mail.
        """
        ...

    async def show(self, message_id: str) -> MessageView:
        """One message.

        Raises:
            NoSuchMessage: there is none of that id. So it is with the verbs below.
        """
        ...

    async def find(
        self, *, trace_id: str | None = None, sender: str | None = None, recipient: str | None = None, most: int
    ) -> Sequence[MessageView]:
        """The first messages that fit all that is given; no outcomes."""
        ...

    async def retry(self, message_id: str) -> bool:
        """Make a message due now; whether anything changed. So it is with the verbs below."""
        ...

    async def hold(self, message_id: str) -> bool:
        """Let a message wait for an operator; it does not age meanwhile. What is being attempted is left alone: it is
        attempted again where it has to be, however long the rest is held."""
        ...

    async def release(self, message_id: str) -> bool:
        """Let a held message, or a corrupt one, go on."""
        ...

    async def expire(self, message_id: str) -> bool:
        """Let a message be too old: it goes back to its sender. Held and corrupt ones are released for that."""
        ...

    async def reset(self, message_id: str, expires_in: float) -> bool:
        """Begin again: no attempt was made, and its age counts from now. Its sender is not warned of the same delay
        twice."""
        ...

    async def delete(self, message_id: str) -> int:
        """Remove a message; how many recipients will not get it.

        Raises:
            SpoolError: it is being attempted: its outcome is open.
        """
        ...

    def standing(self) -> ShareOfQueue | None:
        """How this process stands among all that share the store; None: it is not shared. Cheap."""
        ...

    async def company(self) -> Company | None:
        """The gateways that share the queue; None: it is one gateway's own."""
        ...

    async def rebuild(self) -> Rebuilt:
        """Put back what was set aside and can be read: held, since it may have been delivered."""
        ...

    async def housekeep(self) -> None:
        """What is to be done now and then: look at clocks, make room."""
        ...
