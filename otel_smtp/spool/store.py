"""The interface of stores, for forwarders, runner, notices and operators: each verb is one transaction.

A store may be a directory of this machine, or a database that gateways share. So no verb names a file, a connection or
an instant of the caller's clock: times passed in are durations, and the store adds its own time.
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
"""A message of our own that reports on another, with its content, which begins with the header block."""


T_co = TypeVar("T_co", covariant=True)


class Pending(Protocol[T_co]):
    """A future answer, as far as callers need it; an `asyncio.Future` is one."""

    def add_done_callback(self, callback: Callable[[Any], object], /) -> None:
        """Call `callback` with this on the event loop when there is an answer."""
        ...

    def done(self) -> bool:
        """Whether there is an answer."""
        ...

    def result(self) -> T_co:
        """The answer; raises the error if that is the answer."""
        ...

    def __await__(self) -> Generator[Any, Any, T_co]: ...


@dataclass(frozen=True, slots=True)
class Recovery:
    """The findings of opening a store.

    Attributes:
        messages: that are queued.
        interrupted: deliveries that were being attempted when the previous process died.
        held: the messages held because they were being delivered during too many crashes.
        lost: those whose content is missing.
        remarks: other things that an operator should know, in words.
        alarms: things set aside that may be mail, in words.
    """

    messages: int = 0
    interrupted: int = 0
    held: Sequence[str] = ()
    lost: Sequence[str] = ()
    remarks: Sequence[str] = ()
    alarms: Sequence[str] = ()


class NotFound(NamedTuple):
    """A message whose content is missing, with its known facts.

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
    """The result of a rebuild.

    Attributes:
        told: what was done with each thing set aside, in words.
        not_found: messages whose contents are lost.
    """

    told: Sequence[str] = ()
    not_found: Sequence[NotFound] = ()


class Draft(Protocol):
    """Content that is being received. After a write error it still takes further content; `submit` then fails."""

    @property
    def header_octets(self) -> int:
        """Length of the first chunk, the header block."""
        ...

    @property
    def in_memory(self) -> Sequence[bytes] | None:
        """All chunks, if they are in memory."""
        ...

    @property
    def is_8bit(self) -> bool:
        """Whether any octet of it is above 127."""
        ...

    def write(self, chunk: bytes, resume: Callable[[], None]) -> bool:
        """Add a chunk; the first is the header block.

        Args:
            resume: called once, on the event loop, when more may come after False.

        Returns:
            Whether more may come now.
        """
        ...

    def hold(self, header: bytes, body: bytes) -> bool:
        """Take whole content at once, unless that needs a file.

        Args:
            body: may be empty.

        Returns:
            Whether it was taken; if not, call `write`.
        """
        ...

    def discard(self) -> None:
        """Discard it. Idempotent; submitted content stays."""
        ...


class Woken(Protocol):
    """The runner, as its notifiers see it."""

    def wake(self, destinations: Sequence[str] = ()) -> None:
        """Something is due."""
        ...

    def look_soon(self) -> None:
        """Something is too old."""
        ...

    def note(self, deed: str) -> None:
        """Report an operator's change of a message, see `deeds.Deed.as_text`."""
        ...

    def note_crashes(self, message_ids: Sequence[str]) -> None:
        """Report messages now held because they were being delivered during too many crashes."""
        ...


class Store(Protocol):
    """Durable storage of mail.

    Every verb may raise `SpoolError`, in which case nothing was changed. A lease belongs to this process until it is
    finished or the store is closed; results of a lease that is not its delivery's latest raise `StaleLease`.

    Attributes:
        look_again_seconds: how often to look for mail queued by others; None: there are no others.
        timings: its recent operations; reading removes them.
    """

    look_again_seconds: float | None
    timings: Timings

    @property
    def ledger(self) -> Ledger | None:
        """The shared limits and connection slots of all its gateways; None: it is one gateway's."""
        ...

    async def open(self) -> Recovery:
        """Take ownership, and take back the leases of the previous process."""
        ...

    async def close(self) -> None:
        """Finish pending verbs, and release ownership. Idempotent."""
        ...

    def refusal(self) -> SpoolError | None:
        """Why no mail can be accepted now, or None. Cheap: called at each MAIL."""
        ...

    def alarm(self) -> str | None:
        """Why an operator must act although mail is accepted and delivered, or None. Cheap."""
        ...

    def watch(self, woken: Woken) -> None:
        """Notify a watcher when another process has changed the queue."""
        ...

    # Messages in -----------------------------------------------------------------------------------------------

    def draft(self) -> Draft:
        """Begin new content."""
        ...

    def submit(self, message: NewMessage, draft: Draft, *, lease: bool) -> Pending[Sequence[Lease]]:
        """Make a message durable.

        Args:
            draft: one of this store's, complete; the store owns it from here on.
            lease: the caller will attempt its deliveries at once.

        Returns:
            Done when the message is durable, with its leases, or with a `SpoolError`, in which case nothing of it
            remains. If the caller stops waiting, the message is stored all the same.
        """
        ...

    # Deliveries ------------------------------------------------------------------------------------------------

    async def claim(
        self, wanted: Mapping[str, int]
    ) -> tuple[Sequence[tuple[Lease, Sequence[bytes] | None]], float | None]:
        """Lease due deliveries, and count the attempts.

        New and retried messages take turns, so that a backlog never starves new mail. Of each kind, those due first
        come first, with senders taking turns within a sample, so that one sender's thousands do not hold up all others.

        Args:
            wanted: the most to lease, by destination.

        Returns:
            The leases, with small contents (whole and intact, the header block first), and the seconds until the next
            delivery to one of the destinations is due, not counting expired ones.
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
        """Record the result of an attempt, together with the messages that report it: all or nothing.

        Args:
            retry_in: seconds until recipients that have not ended are due again.
            is_possible_duplicate: an upstream may have taken it without our knowledge.
            counts_attempt: False: no upstream was asked, so it was no attempt.
            hold: recipients that have not ended wait for an operator.
            is_urgent: False: it may wait a moment to share a sync with others.
        """
        ...

    async def mark_corrupt(self, lease: Lease) -> None:
        """Its content is damaged: it waits for an operator, does not age meanwhile, and counts as corrupt only."""
        ...

    async def end_overdue(self, most: int, *, outcomes: bool = False) -> Sequence[Lease]:
        """Lease expired deliveries, without counting an attempt: the caller must end them.

        Args:
            outcomes: lease outcomes instead of mail.
        """
        ...

    async def unwarned(self, age: float, most: int) -> Sequence[Lease]:
        """Deliveries older than `age` seconds whose sender must be warned; not leased."""
        ...

    async def warn(self, message_id: str, notices: Sequence[Notice]) -> bool:
        """Record that `notices` warn the sender; False if that was recorded before, or the message is gone."""
        ...

    async def destinations(self, *, outcomes: bool = False, known: Collection[str] = ()) -> Sequence[str]:
        """All destinations of waiting mail; with `outcomes`, those of waiting outcomes.

        Args:
            known: destinations to leave out.
        """
        ...

    def holds(self, lease: Lease) -> bool:
        """Whether a lease is certainly ours now. Cheap: called before sending content, and its end."""
        ...

    # Contents --------------------------------------------------------------------------------------------------

    async def read(self, content: ContentRef, start: int, octets: int) -> bytes:
        """Read a part of some content.

        Raises:
            ContentLost: it is missing or incomplete.
        """
        ...

    async def is_intact(self, content: ContentRef) -> bool:
        """Whether content is complete and unchanged."""
        ...

    # For operators ---------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """Count mail by state, without outcomes."""
        ...

    async def backlog(self, destinations: Sequence[str]) -> Mapping[str, Backlog]:
        """Count the outcomes that wait, or are being sent, for each of these destinations."""
        ...

    async def tally(self) -> Mapping[str, int]:
        """Count all recipients ever accepted, and their ends."""
        ...

    async def page(self, after: str, most: int, *, outcomes: bool = False) -> Sequence[MessageView]:
        """At most `most` messages whose ids follow `after`, in order of ids, that is of arrival.

        Args:
            outcomes: list outcomes instead of mail.
        """
        ...

    async def show(self, message_id: str) -> MessageView:
        """One message.

        Raises:
            NoSuchMessage: there is none with this id. The same applies to the verbs below.
        """
        ...

    async def find(
        self, *, trace_id: str | None = None, sender: str | None = None, recipient: str | None = None, most: int
    ) -> Sequence[MessageView]:
        """The first messages that match all given conditions; no outcomes."""
        ...

    async def retry(self, message_id: str) -> bool:
        """Make a message due now; returns whether anything changed, as do the verbs below."""
        ...

    async def hold(self, message_id: str) -> bool:
        """Hold a message for an operator; it does not age meanwhile. Deliveries under way are not affected, and are
        retried if necessary while the rest is held.
        """
        ...

    async def release(self, message_id: str) -> bool:
        """Release a held or corrupt message."""
        ...

    async def expire(self, message_id: str) -> bool:
        """Make a message expire: it bounces to its sender. Held and corrupt ones are released for that."""
        ...

    async def reset(self, message_id: str, expires_in: float) -> bool:
        """Reset attempts to none, and count the age from now. The sender is not warned of the same delay twice."""
        ...

    async def delete(self, message_id: str) -> int:
        """Remove a message; returns how many recipients will not get it.

        Raises:
            SpoolError: it is being attempted, so its outcome is open.
        """
        ...

    def standing(self) -> ShareOfQueue | None:
        """This process's part in the shared store; None: it is not shared. Cheap."""
        ...

    async def company(self) -> Company | None:
        """The gateways that share the queue; None: it is one gateway's own."""
        ...

    async def tell_deed(self, deed: str) -> None:
        """Have a gateway of this queue report an operator's change: one that runs, or else the next one to start.

        Args:
            deed: see `deeds.Deed.as_text`, in ASCII characters.
        """
        ...

    async def take_deeds(self) -> Sequence[str]:
        """Operators' changes made while no gateway ran, for this process to report; each is returned once."""
        ...

    async def rebuild(self) -> Rebuilt:
        """Put back messages that were set aside and are readable: held, since they may have been delivered."""
        ...

    async def housekeep(self) -> None:
        """Periodic work: check clocks, make room."""
        ...
