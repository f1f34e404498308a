"""The one interface by which accepted mail leaves: the upstream relay and the durable spool both implement it.

The session does not know which one it uses. Nothing here waits: a call that needs an answer takes a callback, which is
called once, on the event loop, possibly before the call returns. The session may rely on these rules:

* The final reply of a `MailTransaction` is 2yz only if the upstream said 2yz to the end of data, or the message is
  durable. Doubt is a 4yz.
* Until `finish` is called nothing ends the message upstream: neither a final dot nor a last chunk is sent. After
  `abort` instead of `finish`, the upstream has nothing of the message. All that is said of `finish` applies to
  `message`.
* `abort` is idempotent, never raises, and frees what the transaction holds. It is called once for every transaction
  whose `finish` was not called, and after `finish` if the answer is no longer awaited (shutdown): then a message
  already sent is still followed to its end, for the record, and no callback is called.
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
"""The promises that can be kept while the upstream is unknown."""

MOST: Final = every_relayed()
"""The promise for an upstream that supports every extension."""


class DeliveryFailed(Exception):
    """The mail cannot be accepted. `reply` is for the client."""

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
"""Takes the final reply of the message, for all accepted recipients; and, if each has its own verdict (an LMTP
upstream, several transactions upstream), those verdicts, in the order in which the recipients were accepted. There may
be fewer verdicts than recipients; the final reply then applies to the others.
"""


class MailTransaction(Protocol):
    """One transaction, from MAIL on. Its calls come in this order: recipients*, then message, or content, write*,
    finish; abort may come at any time."""

    __slots__ = ()

    @property
    def spool_id(self) -> str | None:
        """The id under which the message was made durable; None if it was not, or not yet."""
        ...

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """Answer a pipelined group of recipients. The next group comes after the answer to this one."""
        ...

    def message(self, header: bytes, body: bytes, answered: MessageAnswered) -> None:
        """Take a whole message, deliver it, and answer it: `content`, `write` and `finish` in one.

        Args:
            header, body: see `write`; the body may be empty.
        """
        self.content(nobody_waits)
        self.write(header)
        if body:
            self.write(body)  # and ignore its result: there is no more to hold back
        self.finish(answered)

    def content(self, resume: Callable[[], None]) -> None:
        """The content begins, and comes in pieces.

        Args:
            resume: called once after a `write` that returned False, when more can be taken.
        """
        ...

    def write(self, chunk: bytes) -> bool:
        """Take a piece of the content.

        Args:
            chunk: the first is the whole header block, our Received field on top, trace fields still in; it ends with
                CRLF or is the Received field alone. Then, if the content has a body or an empty line, further
                chunks beginning with that empty line. CRLF line ends only, no NUL (but for BINARYMIME), dots not
                stuffed.

        Returns:
            Whether more may come now. False holds the client back until `resume`; it is no failure, and `finish` may
            come before `resume`. A failed transaction takes and drops the rest, and answers at `finish`.
        """
        ...

    def finish(self, answered: MessageAnswered) -> None:
        """The content is complete: deliver it, and answer the message."""
        ...

    def abort(self) -> None:
        """Give the transaction up."""
        ...


def nobody_waits() -> None:
    """The `resume` of content that is already complete."""


class Forwarder(Protocol):
    """Where accepted mail goes."""

    def capabilities(self) -> Extensions:
        """The extensions that may be offered to clients now.

        Cheap: called at each EHLO and MAIL. Returns the same object while nothing changes.
        """
        ...

    def begin(self, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """Open a transaction for `mail`. Refuses it if that is already known; asks no upstream.

        Args:
            record: the forwarder adds its deliveries, and the spool its id. `record.trace_headers` is set before the
                first `write`.

        Raises:
            DeliveryFailed: MAIL is refused with its reply.
        """
        ...


class Relay(Forwarder, Protocol):
    """The spool's forwarder: names the upstreams of a recipient, and how many deliveries they allow."""

    def begin_along(self, destination: str, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """`begin`, with the upstreams of a destination, whichever senders and recipients they serve."""
        ...

    def refusal(self, mail: Mail) -> Reply | None:
        """The permanent refusal that `begin` would raise for a mail, as far as known without asking an upstream."""
        ...

    def destination(self, mail: Mail, recipient: Recipient) -> str | Reply:
        """The name of a recipient's upstreams, or why there are none. Recipients with the same name travel together."""
        ...

    def keeps_8bit(self) -> bool:
        """Whether 8-bit content leaves unchanged: neither re-encoded nor refused."""
        ...

    def concurrency(self, destination: str) -> int:
        """How many deliveries to `destination` may be under way now: none while all of it is in backoff."""
        ...

    def watch_room(self, made: Callable[[], None]) -> None:
        """Call `made` when more may be under way though none has ended."""
        ...


@dataclass(frozen=True, slots=True)
class Claim:
    """One gateway's request to a shared limit, with the fate of its earlier permits.

    Attributes:
        name, count, period_seconds, burst, per_recipient: see `LimitSettings`.
        in_flight: all permits taken here that have not landed.
        landed: since the last claim.
        unused: given back since then.
        least: the fewest permits that are useful; 0: none are wanted.
        wanted: the number preferred.
        rest_seconds: send nothing for this long: the provider said that it gets too much.
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
        granted: permits, at least `least`, or 0.
        wait_seconds: if there are none: until it is worth asking again.
        available: how many more there would have been.
    """

    granted: int
    wait_seconds: float
    available: int


HeldSlot = tuple[int, Hashable]
"""A connection slot: its number, and when it was taken."""


class SlotHeard(Protocol):
    """Called with another gateway's message about slots."""

    def __call__(self, *, is_wish: bool) -> None:
        """The other gateway waits for slots; or it has given some back."""
        ...


class SlotLedger(Protocol):
    """The store of several gateways' connection slots."""

    def term(self) -> object | None:
        """A value that changes when slots taken here are no longer ours; None: unknown."""
        ...

    async def hold(
        self, name: str, total: int, released: Collection[HeldSlot], wanted: int
    ) -> Collection[HeldSlot] | None:
        """Give slots back, and take new ones.

        Args:
            name: of the upstream. `total`: how many slots it has.
            wanted: at most this many more.

        Returns:
            All slots that are ours now; None: unknown.
        """
        ...

    def watch_slots(self, name: str, heard: SlotHeard) -> None:
        """Call `heard` with other gateways' messages about the slots of an upstream."""
        ...


class LimitLedger(Protocol):
    """The store of several gateways' limits."""

    def term(self) -> object | None:
        """A value that changes when permits taken here no longer count; None: unknown. Cheap: read for each mail."""
        ...

    async def settle(self, claim: Claim) -> Grant | None:
        """Take permits of a limit; None: no answer now, and the claim may have to be repeated."""
        ...


class Ledger(LimitLedger, SlotLedger, Protocol):
    """The store of everything that several gateways share."""
