"""A client's transaction, relayed: recipients and their routes, the content, and the end, by each strategy.

A transaction judges what can be said without asking anybody, collects the content, and leaves the rest to a `Delivery`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Protocol

from otel_smtp.forwarding.base import MessageAnswered, RecipientsAnswered
from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.delivery import Delivery
from otel_smtp.forwarding.routes import Serving
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.observing import Observer, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import is_safe_path
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply


class Relaying(Protocol):
    """What a transaction asks of the forwarder that began it."""

    @property
    def observer(self) -> Observer:
        """Asked for the trace headers of a delivery, and told of those that end late."""
        ...

    @property
    def memory_limit_octets(self) -> int:
        """Of one message's body; what exceeds it goes to a temporary file."""
        ...

    def watch(self, delivery: Delivery) -> None:
        """A delivery comes to its end though nobody waits for it any more."""
        ...

    def unwatch(self, delivery: Delivery) -> None:
        """It has."""
        ...


def bad_recipient(mail: Mail, recipient: Recipient) -> Reply | None:
    """Why a recipient reaches no upstream at all; None where it may."""
    address = recipient.address
    if not address or not is_safe_path(address):
        return replies.BAD_RECIPIENT
    if not address.isascii() and not mail.smtputf8:
        return replies.NEEDS_SMTPUTF8
    return None


class Transaction(ABC):
    """What all strategies share. See `MailTransaction`.

    Args:
        serving: the upstreams that serve the sender.

    Attributes:
        write: see `MailTransaction.write`; it is there from `content` on.
    """

    __slots__ = (
        "_answered",
        "_content",
        "_delivery",
        "_has_content",
        "_is_over",
        "_mail",
        "_relaying",
        "_route",
        "_serving",
        "write",
    )

    spool_id: Final = None  # nothing is made durable here
    write: Callable[[bytes], bool]
    _content: Content

    def __init__(self, relaying: Relaying, mail: Mail, record: TransactionRecord, serving: Serving[Smarthost]) -> None:
        self._relaying = relaying
        self._mail = mail
        self._serving = serving
        self._route: Sequence[Smarthost] = ()
        self._delivery = Delivery(mail, record, relaying.observer, relaying.unwatch)
        self._has_content = False
        self._answered: MessageAnswered | None = None
        self._is_over = False

    @abstractmethod
    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""

    def content(self, resume: Callable[[], None]) -> None:
        """See `MailTransaction.content`."""
        self._has_content = True
        self._content = Content(self._relaying.memory_limit_octets, resume)
        self.write = self._content.write

    def finish(self, answered: MessageAnswered) -> None:
        """See `MailTransaction.finish`."""
        self._answered = answered
        content = self._content
        if content.pieces is not None:
            self._send(content)  # it is in memory: there is nothing to wait for
        else:
            content.complete(self._deliver)

    def abort(self) -> None:
        """See `MailTransaction.abort`."""
        if self._is_over:
            return
        self._is_over = True
        self._answered = None
        if self._has_content:
            self._content.close()
        self._delivery.abort()
        if self._delivery.is_under_way:
            self._relaying.watch(self._delivery)

    def _deliver(self) -> None:
        content = self._content
        if content.failure is not None:
            self._delivery.abort()
            self._delivered(content.failure, ())
        else:
            self._send(content)

    @abstractmethod
    def _send(self, content: Content) -> None:
        """Put what is still to be put, and send the content."""

    def _delivered(self, reply: Reply, verdicts: Sequence[Reply]) -> None:
        self._is_over = True
        if self._content.pieces is None:
            self._content.close()
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(reply, verdicts)

    def _judge(self, recipient: Recipient) -> Reply | None:
        """What can be said of a recipient without asking anybody; None where somebody must be asked."""
        if (refusal := bad_recipient(self._mail, recipient)) is not None:
            return refusal
        route = self._serving.for_recipient(recipient)
        if not route:
            return replies.RELAY_DENIED
        if not self._route:
            self._route = self._delivery.route = route
        elif route is not self._route and route != self._route:
            return self._join(route)
        return None

    def _join(self, route: Sequence[Smarthost]) -> Reply | None:
        """Whether a recipient of another route can travel with those before it."""
        if route[0] is not self._route[0] or not self._delivery.is_served_by(route):
            return replies.OTHER_ROUTE
        # The same upstream first, other ones behind it: only those that serve both are left.
        self._route = [smarthost for smarthost in self._route if smarthost in route]
        self._delivery.route = [smarthost for smarthost in self._delivery.route if smarthost in route]
        return None


class Transparent(Transaction):
    """Recipients are put to the upstream as they come."""

    __slots__ = ()

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""
        asked: list[Recipient] = []
        own: list[Reply | None] = []
        for recipient in batch:
            refusal = self._judge(recipient)
            own.append(refusal)
            if refusal is None:
                asked.append(recipient)
        if len(asked) == len(batch):
            self._delivery.ask(asked, answered)
        elif asked:
            self._delivery.ask(asked, partial(_merge, own, answered))
        else:
            _merge(own, answered, ())

    def _send(self, content: Content) -> None:
        self._delivery.send(content, self._delivered)


def _merge(own: Sequence[Reply | None], answered: RecipientsAnswered, verdicts: Sequence[Reply]) -> None:
    """Answer a batch with our own replies, and the upstream's `verdicts` where we have none."""
    others = iter(verdicts)
    answered([next(others) if reply is None else reply for reply in own])


class Buffered(Transaction):
    """Recipients are accepted by us, and put to the upstream with the content."""

    __slots__ = ()

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""
        answered([self._accept(recipient) for recipient in batch])

    def _accept(self, recipient: Recipient) -> Reply:
        refusal = self._judge(recipient)
        if refusal is None and self._is_full():
            refusal = replies.TOO_MANY_RECIPIENTS
        if refusal is not None:
            return refusal
        self._delivery.accepted.append(recipient)
        return replies.RECIPIENT_OK

    def _is_full(self) -> bool:
        """Whether the upstream takes no more recipients in one transaction (RFC 9422 3.2)."""
        extensions = self._route[0].extensions
        most = extensions.limits.get("RCPTMAX") if extensions is not None else None
        return most is not None and len(self._delivery.accepted) >= most > 0

    def _send(self, content: Content) -> None:
        self._delivery.burst(content, self._delivered)


class Spooled(Transparent):
    """Recipients are put to the upstream together; a single one with the content, as its refusal is the message's."""

    __slots__ = ("_is_burst",)

    def __init__(self, relaying: Relaying, mail: Mail, record: TransactionRecord, serving: Serving[Smarthost]) -> None:
        super().__init__(relaying, mail, record, serving)
        self._is_burst = False

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""
        if len(batch) > 1 or self._delivery.accepted:
            super().recipients(batch, answered)
            return
        refusal = self._judge(batch[0])
        if refusal is None:
            self._delivery.accepted.append(batch[0])
            self._is_burst = True
        answered([refusal or replies.RECIPIENT_OK])

    def _send(self, content: Content) -> None:
        if self._is_burst:
            self._delivery.burst(content, self._delivered)
        else:
            super()._send(content)
