"""The one interface by which accepted mail leaves: the upstream relay and the durable spool both implement it.

The server does not know which it talks to. What it may rely on:

* `MailTransaction.content` answers 2yz only if the upstream said 2yz to the end of data, or the message is durable
  (P1). Doubt is a 4yz (P2).
* After an exception out of the `chunks` iterator, or after a cancel, nothing of the message is with the upstream: no
  final dot was sent, no last chunk.
* `abort` is idempotent, never raises, and frees what the transaction holds. It is called after every transaction that
  did not end with `content`.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from otel_smtp.observer import TransactionObserver
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What can be promised to clients on behalf of what lies behind.

    The defaults promise everything: what holds while nothing is known of the upstream. MAIL is checked again against
    the EHLO of the connection that really serves it.

    Attributes:
        size: octets; None: no limit known.
    """

    size: int | None = None
    eight_bit_mime: bool = True
    smtputf8: bool = True
    binary_mime: bool = True
    dsn: bool = True
    require_tls: bool = True


class DeliveryFailed(Exception):
    """The mail cannot be taken. `reply` is what the client is to be told."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class Permanent(DeliveryFailed):
    """The same mail will fail again (5yz)."""


class Transient(DeliveryFailed):
    """The same mail may succeed later (4yz)."""


class ContentAborted(Exception):
    """Raised out of `chunks`: the content ended without its end (client gone, limit, smuggling, our bug)."""


class MailTransaction(Protocol):
    """One transaction, from MAIL on; its calls come in the order recipients*, content | abort."""

    @property
    def spool_id(self) -> str | None:
        """The id under which the message was made durable; None where it was not, or not yet."""
        ...

    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        """Answer a pipelined group of recipients, one reply each, in order.

        Raises:
            DeliveryFailed: nobody can be asked; its reply holds for each recipient of the batch.
        """
        ...

    async def content(self, chunks: AsyncIterator[bytes]) -> Reply:
        """Take the content and answer the message.

        Args:
            chunks: the first is the whole header block, our Received field on top, trace fields still in; it ends with
                CRLF or is the Received field alone. Then, if the content has a body or an empty line, further
                chunks beginning with that empty line. CRLF line ends only, no NUL (but for BINARYMIME), dots not
                stuffed. May raise `ContentAborted`.

        Returns:
            The final reply of the message, for all recipients that were accepted.
        """
        ...

    async def abort(self) -> None:
        """Give the transaction up."""
        ...


class Forwarder(Protocol):
    """Where accepted mail goes."""

    def capabilities(self) -> Capabilities:
        """What may be offered to clients now.

        Cheap: called at each EHLO and MAIL. The same object while nothing changes.
        """
        ...

    async def begin(self, mail: Mail, seen: TransactionObserver) -> MailTransaction:
        """Open a transaction for `mail`. Decides what is already known; need not ask the upstream yet.

        Raises:
            DeliveryFailed: MAIL is refused with its reply.
        """
        ...


class RelayTransaction(MailTransaction, Protocol):
    """A transaction with an upstream, which may have more than one word on a message."""

    @property
    def verdicts(self) -> Sequence[Reply]:
        """After `content`: the upstream's own reply for each accepted recipient, in their order, where it gave one for
        each (RFC 2033 4.2). It may have given the first few only; what `content` returned holds for the others."""
        ...


class Relay(Forwarder, Protocol):
    """A forwarder that the spool delivers through: it says beforehand who would be asked, and how many may ask."""

    async def begin(self, mail: Mail, seen: TransactionObserver) -> RelayTransaction:
        """See `Forwarder.begin`."""
        ...

    def refusal(self, mail: Mail) -> Reply | None:
        """Why `begin` would refuse a mail for good, as far as is known without asking anybody."""
        ...

    def destination(self, mail: Mail, recipient: Recipient) -> str | Reply:
        """The name of whatever serves a recipient, or why nobody does. Recipients of one name travel together."""
        ...

    def concurrency(self, destination: str) -> int:
        """How many deliveries to `destination` may be under way now: none while all of it is given a rest."""
        ...
