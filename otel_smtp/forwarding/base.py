"""The one interface by which accepted mail leaves: the upstream relay and the durable spool both implement it.

The session does not know which it talks to. Nothing here waits: a call that needs an answer takes a callback, which is
called once, on the event loop, possibly before the call returns. What the session may rely on:

* The final reply of a `MailTransaction` is 2yz only if the upstream said 2yz to the end of data, or the message is
  durable. Doubt is a 4yz.
* Until `finish` is called nothing ends the message upstream: no final dot was sent, no last chunk. After `abort`
  instead of `finish`, nothing of the message is with the upstream. What is said of `finish` holds for `message`.
* `abort` is idempotent, never raises, and frees what the transaction holds. It is called once for every transaction
  whose `finish` was not called, and after `finish` where its answer is no longer awaited (shutdown): then a
  message that is out of our hands comes to its end all the same, for the record, and no callback is called.
* A call that raises has done nothing; the session answers 451 and aborts.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from otel_smtp.observing import TransactionRecord
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import NONE, Extensions, every_relayed
from otel_smtp.smtp.replies import Reply

LEAST: Final = NONE
"""The promises that can be kept while nothing is known of the upstream."""

MOST: Final = every_relayed()
"""What can be promised on behalf of something that takes all there is."""


class DeliveryFailed(Exception):
    """The mail cannot be taken. `reply` is the client's."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class Permanent(DeliveryFailed):
    """The same mail will fail again (5yz)."""


class Transient(DeliveryFailed):
    """The same mail may succeed later (4yz)."""


RecipientsAnswered = Callable[[Sequence[Reply]], None]
"""Takes one reply per recipient of the batch, in order."""

MessageAnswered = Callable[[Reply, Sequence[Reply]], None]
"""Takes the final reply of the message, for all recipients that were accepted; and, where each of them has a verdict of
its own (an LMTP upstream, several transactions upstream), those, in the order in which the recipients were accepted.
The verdicts may be fewer than the recipients; the final reply holds for the others."""


class MailTransaction(Protocol):
    """One transaction, from MAIL on. Its calls come in this order: recipients*, then message, or content, write*,
    finish; abort may come at any time."""

    __slots__ = ()

    @property
    def spool_id(self) -> str | None:
        """The id under which the message was made durable; None where it was not, or not yet."""
        ...

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """Answer a pipelined group of recipients. The next group comes after the answer to this one."""
        ...

    def message(self, header: bytes, body: bytes, answered: MessageAnswered) -> None:
        """Take a message that is whole, deliver it, and answer it: `content`, `write` and `finish` in one.

        Args:
            header, body: see `write`; the body may be empty.
        """
        self.content(nobody_waits)
        self.write(header)
        if body:
            self.write(body)  # and whatever it says: there is no more to be held back
        self.finish(answered)

    def content(self, resume: Callable[[], None]) -> None:
        """The content begins, and comes in pieces.

        Args:
            resume: to be called, once, after a `write` that returned False, when more can be taken.
        """
        ...

    def write(self, chunk: bytes) -> bool:
        """Take some of the content.

        Args:
            chunk: the first is the whole header block, our Received field on top, trace fields still in; it ends with
                CRLF or is the Received field alone. Then, if the content has a body or an empty line, further
                chunks beginning with that empty line. CRLF line ends only, no NUL (but for BINARYMIME), dots not
                stuffed.

        Returns:
            Whether more may come now. False holds the client back until `resume`; it is no failure, and `finish` may
            come before `resume` was called. A transaction that has failed takes what comes, drops it, and answers at
            `finish`.
        """
        ...

    def finish(self, answered: MessageAnswered) -> None:
        """The content is complete: deliver it, and answer the message."""
        ...

    def abort(self) -> None:
        """Give the transaction up."""
        ...


def nobody_waits() -> None:
    """What resumes content of which there is no more."""


class Forwarder(Protocol):
    """Where accepted mail goes."""

    def capabilities(self) -> Extensions:
        """What may be offered to clients now.

        Cheap: called at each EHLO and MAIL. The same object while nothing changes.
        """
        ...

    def begin(self, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """Open a transaction for `mail`. Decides what is already known; asks no upstream.

        Args:
            record: the forwarder adds its deliveries, and the spool its id. `record.trace_headers` is set before the
                first `write`.

        Raises:
            DeliveryFailed: MAIL is refused with its reply.
        """
        ...


class Relay(Forwarder, Protocol):
    """A forwarder that the spool delivers through: it names the upstreams, and how many deliveries they allow."""

    def begin_along(self, destination: str, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """`begin`, by the upstreams of a destination, whatever senders and recipients they serve."""
        ...

    def refusal(self, mail: Mail) -> Reply | None:
        """Why `begin` would refuse a mail for good, as far as is known without asking anybody."""
        ...

    def destination(self, mail: Mail, recipient: Recipient) -> str | Reply:
        """The name of the upstreams of a recipient, or why there are none. Recipients of one name travel together."""
        ...

    def keeps_8bit(self) -> bool:
        """Whether 8-bit content leaves as it is: not as something else, and not refused."""
        ...

    def concurrency(self, destination: str) -> int:
        """How many deliveries to `destination` may be under way now: none while all of it is in backoff."""
        ...

    def watch_room(self, made: Callable[[], None]) -> None:
        """Have `made` called when more may be under way though none has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """What one gateway asks of a limit that several keep together, and what became of its permits.

    Attributes:
        name, count, period_seconds, burst, per_recipient: see `LimitSettings`.
        in_flight: permits that were taken here and have not landed, in all.
        landed: since the last claim.
        unused: given back since then.
        least: permits that are wanted, or none; 0: none are.
        wanted: rather so many.
        rest_seconds: nothing is to be sent for this long: the provider said that it is too much.
    """

    name: str
    count: int
    period_seconds: float
    burst: int
    per_recipient: bool
    in_flight: int
    landed: int
    unused: int
    least: int
    wanted: int
    rest_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Grant:
    """The answer to a claim.

    Attributes:
        granted: permits, at least the least that was wanted, or 0.
        wait_seconds: where there are none: until it is worth asking again.
        available: how many more there would have been.
    """

    granted: int
    wait_seconds: float
    available: int


HeldSlot = tuple[int, Hashable]
"""A slot for a connection: its number, and since when it is held."""


class SlotHeard(Protocol):
    """Called with what another gateway says about slots."""

    def __call__(self, *, is_wish: bool) -> None:
        """It waits for some; or it has given some back."""
        ...


class SlotLedger(Protocol):
    """Where the connection slots of several gateways are kept."""

    def term(self) -> object | None:
        """A value that changes when slots that were taken here are no longer ours; None: that is unknown."""
        ...

    async def hold(
        self, name: str, total: int, released: Collection[HeldSlot], wanted: int
    ) -> Collection[HeldSlot] | None:
        """Give slots back, and take others.

        Args:
            name: of the upstream. `total`: how many slots it has.
            wanted: at most so many more.

        Returns:
            All that are ours now; None: that is not known.
        """
        ...

    def watch_slots(self, name: str, heard: SlotHeard) -> None:
        """Call `heard` with what other gateways say about the slots of an upstream."""
        ...


class LimitLedger(Protocol):
    """Where limits are kept for several gateways."""

    def term(self) -> object | None:
        """What changes when permits that were taken here count no more; None: it is not known whether they do. Cheap:
        asked for each mail."""
        ...

    async def settle(self, claim: Claim) -> Grant | None:
        """Take permits of a limit; None: none is available now, and the question may have to be repeated."""
        ...


class Ledger(LimitLedger, SlotLedger, Protocol):
    """Where all is kept that gateways keep together."""
