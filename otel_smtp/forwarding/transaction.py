"""Relaying a client's transaction: recipients and their routes, content, and end, by each strategy.

A transaction gives the verdicts that need no upstream, and collects the content. It is itself the first `Delivery` of
the mail, which for nearly every mail is the only one. Recipients with other routes, or beyond an upstream's limit, go
in further deliveries (see `further`).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic_ns
from typing import Final

from otel_smtp.forwarding.base import MailTransaction, MessageAnswered, RecipientsAnswered, nobody_waits
from otel_smtp.forwarding.connecting import Relaying
from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.delivery import Delivery
from otel_smtp.forwarding.enveloping import MOST_TRANSACTIONS
from otel_smtp.forwarding.further import MOST_SECONDS, Further, Part
from otel_smtp.forwarding.routes import Serving
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.forwarding.verdicts import fold, with_remark
from otel_smtp.observing import DeliveryPhase, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.client import is_safe_path
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import of_ascii_content
from otel_smtp.smtp.replies import Reply

MOST_NAMED_CHARACTERS: Final = 128  # of a recipient whose refusal refuses the whole message


def bad_recipient(mail: Mail, recipient: Recipient) -> Reply | None:
    """The refusal of a recipient that no upstream may get; None for all others."""
    address = recipient.address
    if not address or not is_safe_path(address):
        return replies.BAD_RECIPIENT
    if not address.isascii() and not mail.smtputf8:
        return replies.NEEDS_SMTPUTF8
    return None


class Transaction(Delivery, MailTransaction):
    """The common part of all strategies. See `MailTransaction`.

    Args:
        serving: the upstreams that serve the sender.
        is_plain: see `Delivery`.
    """

    __slots__ = (
        "_answered",
        "_collected",
        "_parts",
        "_pledged",
        "_route",
        "_serving",
    )

    spool_id: Final = None  # nothing is made durable here

    # Set when they are needed.
    _answered: MessageAnswered | None
    _pledged: list[Recipient]  # all accepted ones, in order, if there are parts

    def __init__(
        self,
        relaying: Relaying,
        mail: Mail,
        record: TransactionRecord,
        serving: Serving[Smarthost],
        is_plain: bool,
    ) -> None:
        route = serving.for_all
        Delivery.__init__(self, mail, record, relaying, route, is_plain)
        self._serving = serving
        self._route = route  # of the first recipients
        self._parts: list[Part] | None = None  # of other routes, then of all; None: only one transaction upstream
        self._collected: Content | None = None

    @property
    def _refuses_all_for_one(self) -> bool:
        """Whether the refusal of one recipient refuses the message, while no recipient has it."""
        return False

    @abstractmethod
    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""

    def message(self, header: bytes, body: bytes, answered: MessageAnswered) -> None:
        """See `MailTransaction.message`."""
        limit = self._relaying.memory_limit_octets
        if len(body) > limit:
            super().message(header, body, answered)
            return
        self._answered = answered
        content = self._collected = Content(limit, nobody_waits, header, body)
        self._relay(content)

    def content(self, resume: Callable[[], None]) -> None:
        """See `MailTransaction.content`."""
        self._collected = Content(self._relaying.memory_limit_octets, resume)

    def write(self, chunk: bytes) -> bool:
        """See `MailTransaction.write`."""
        assert self._collected is not None
        return self._collected.write(chunk)

    def finish(self, answered: MessageAnswered) -> None:
        """See `MailTransaction.finish`."""
        self._answered = answered
        content = self._collected
        assert content is not None
        content.complete(partial(self._collected_whole, content))

    def abort(self) -> None:
        """See `MailTransaction.abort`."""
        self._answered = None
        if self._collected is not None:
            self._collected.close()
        self._abandon_all()

    def _begin_another(self) -> Delivery:
        """Begin another transaction upstream."""
        return Delivery(self._mail, self._record, self._relaying, (), self._is_plain)

    def _abandon_first(self) -> None:
        """Abandon our own, first transaction upstream."""
        super().abort()
        if self.is_under_way:
            self._relaying.watch(self)

    def _abandon_all(self) -> None:
        self._abandon_first()
        for part in self._parts or ():
            if part.delivery is not None:
                part.delivery.abort()
                if part.delivery.is_under_way:
                    self._relaying.watch(part.delivery)

    def _collected_whole(self, content: Content) -> None:
        if content.failure is not None:
            self._abandon_all()
            self._answer(content.failure, ())
        else:
            self._relay(content)

    @abstractmethod
    def _relay(self, content: Content) -> None:
        """Send the remaining recipients and the content."""

    def _first_ended(self, reply: Reply, verdicts: Sequence[Reply]) -> None:
        """The first transaction upstream is over."""
        if self._parts is None and not self.left:
            if reply.code >= 400 and self._refuses_all_for_one and not verdicts:
                reply = self._naming(reply)
            self._answer(reply, verdicts)
        elif reply.code >= 400 and self._refuses_all_for_one and not any(one.is_positive for one in verdicts):
            # No recipient has it yet, and none gets it.
            self._answer(reply if verdicts else self._naming(reply), ())
        else:
            self._go_further(reply, verdicts)

    def _naming(self, reply: Reply) -> Reply:
        """Add the recipient's address to the refusal of a message for its sake: nothing else names it to the client."""
        deliveries = self._record.deliveries
        if len(self.accepted) + len(self.left) < 2 or not deliveries:
            return reply
        whom = next((one.recipient.address for one in deliveries[-1].refused if one.reply is reply), "")
        if not whom or not whom.isascii() or len(whom) > MOST_NAMED_CHARACTERS:
            return reply
        return with_remark(reply, f"recipient {whom}")

    def _answer(self, reply: Reply, verdicts: Sequence[Reply]) -> None:
        """Answer the message."""
        content, answered = self._collected, self._answered
        if content is not None and content.pieces is None:
            content.close()
        if answered is not None:
            answered(reply, verdicts)

    def _go_further(self, reply: Reply | None = None, verdicts: Sequence[Reply] = ()) -> None:
        """Deliver to the recipients that the first transaction upstream had no room for.

        Args:
            reply: its final reply; None: it had no recipient.
        """
        content = self._collected
        assert content is not None
        promised = self.promised if self._parts is None else self._pledged
        if not self._is_plain and self._mail.smtputf8 and not content.is_8bit:
            self._mail = of_ascii_content(self._mail, promised)
        part = Part(self._route)
        part.leave(self)
        self._parts = [part, *(self._parts or ())]

        def ended() -> None:
            each = further.in_order(promised)
            self._answer(fold(each), each)

        further = Further(
            self._parts,
            self._begin_another,
            content,
            until_ns=self._last_begin_ns(),
            ended=ended,
        )
        if reply is not None:
            further.note(self.accepted, reply, verdicts)
            further.skip_unanswered(part, reply)
        further.go_on()

    def _last_begin_ns(self) -> float:
        """The latest time to begin a transaction for a waiting client; unbounded for the queue."""
        if self._record.connection is None:
            return math.inf
        ended = (
            at_ns
            for delivery in self._record.deliveries
            for at_ns, phase, _ in delivery.phases
            if phase is DeliveryPhase.CONTENT
        )
        return next(ended, monotonic_ns()) + MOST_SECONDS * 1e9

    def _judge(self, recipient: Recipient) -> "Reply | Part | None":
        """The verdict on a recipient that needs no upstream.

        Returns:
            Its refusal; or its part, if that differs from the first recipients'; otherwise None.
        """
        if (refusal := bad_recipient(self._mail, recipient)) is not None:
            return refusal
        route = self._serving.for_recipient(recipient)
        if not route:
            return replies.RELAY_DENIED
        if not self._route:
            self._route = self.route = route
        elif route is not self._route and route != self._route and not self._join(route):
            return self._part(route)
        return None

    def _have_one_route(self, batch: Sequence[Recipient]) -> bool:
        """Whether `_judge` would return None for every recipient, as for most batches: one check for all."""
        if not self._serving.for_all:
            return False
        for recipient in batch:
            address = recipient.address
            if not address.isascii() or not address or not is_safe_path(address):
                return False
        return True

    def _join(self, route: Sequence[Smarthost]) -> bool:
        """Whether a recipient of another route can travel with those before it."""
        if route[0] is not self._route[0] or not self.is_served_by(route):
            return False
        if not self.is_under_way and self._tried.faults:
            return False  # every upstream of those before was tried in vain; this route may have others
        # The same upstream first, followed by others: keep those that serve both.
        self._route = [smarthost for smarthost in self._route if smarthost in route]
        self.route = [smarthost for smarthost in self.route if smarthost in route]
        return True

    def _part(self, route: Sequence[Smarthost]) -> Part | Reply:
        """The part of a route other than the first recipients'; or the reason for allowing no other."""
        if self._parts is None:
            self._parts = []
            self._pledged = list(self.promised)
        for part in self._parts:
            if part.route == route:
                return part
        if len(self._parts) + 1 >= MOST_TRANSACTIONS:
            return replies.TOO_MANY_RECIPIENTS
        part = Part(route)
        self._parts.append(part)
        return part


class Transparent(Transaction):
    """Recipients go to the upstream as they come."""

    __slots__ = ()

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""
        if self._have_one_route(batch):
            self.ask(batch, answered)
            return
        found = [self._judge(recipient) for recipient in batch]
        if self._parts is None and not any(found):
            self.ask(batch, answered)
        else:
            self._ask_each(batch, found, answered)

    def _ask_each(
        self, batch: Sequence[Recipient], found: Sequence["Reply | Part | None"], answered: RecipientsAnswered
    ) -> None:
        """Answer a batch with our own replies, and with the verdicts of each part's upstream."""
        verdicts = [one if isinstance(one, Reply) else replies.RECIPIENT_OK for one in found]
        groups: dict[Delivery, list[int]] = {}
        for number, one in enumerate(found):
            if not isinstance(one, Reply):
                groups.setdefault(self if one is None else self._delivery_of(one), []).append(number)
        left = len(groups)

        def judged(numbers: Sequence[int], replied: Sequence[Reply]) -> None:
            nonlocal left
            for number, verdict in zip(numbers, replied, strict=True):
                verdicts[number] = verdict
            left -= 1
            if not left:
                finished()

        def finished() -> None:
            if self._parts is not None:
                self._pledged += [one for one, verdict in zip(batch, verdicts, strict=True) if verdict.code < 400]
            answered(verdicts)

        for delivery, numbers in groups.items():
            delivery.ask([batch[number] for number in numbers], partial(judged, numbers))
        if not groups:
            finished()

    def _delivery_of(self, part: Part) -> Delivery:
        if part.delivery is None:
            part.delivery = self._begin_another()
            part.delivery.route = part.route
        return part.delivery

    def _relay(self, content: Content) -> None:
        if self.accepted:
            self.send(content, self._first_ended)
        else:
            self._abandon_first()
            self._go_further()


class Buffered(Transaction):
    """We accept recipients, and send them to the upstream with the content.

    An SMTP client gets one reply, so a refused recipient refuses the message. An LMTP client gets a reply
    for each of them (RFC 2033 4.2).
    """

    __slots__ = ()

    @property
    def _refuses_all_for_one(self) -> bool:
        connection = self._record.connection
        return connection is None or connection.info.protocol != "lmtp"

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""
        accepted = self.accepted
        # All upstreams take more than this in all transactions together.
        if len(accepted) + len(batch) <= MOST_TRANSACTIONS and self._have_one_route(batch):
            accepted += batch
            answered([replies.RECIPIENT_OK] * len(batch))
        else:
            answered([self._accept(recipient) for recipient in batch])

    def _accept(self, recipient: Recipient) -> Reply:
        found = self._judge(recipient)
        if isinstance(found, Reply):
            return found
        accepted = self.accepted if found is None else found.left
        upstream = self._route[0] if found is None else found.route[0]
        if len(accepted) >= MOST_TRANSACTIONS * upstream.most_recipients:
            return replies.TOO_MANY_RECIPIENTS
        accepted.append(recipient)
        if self._parts is not None:
            self._pledged.append(recipient)
        return replies.RECIPIENT_OK

    def _relay(self, content: Content) -> None:
        if len(self.accepted) > 1 and not self._refuses_all_for_one:
            self.left = self.accepted  # recipients go before the content, as in any further transaction
            self._go_further()
        else:
            self.burst(content, self._first_ended)


class Spooled(Transparent):
    """All recipients go to the upstream together; a single one with the content, as its refusal refuses the message."""

    __slots__ = ("_is_burst",)

    def __init__(
        self,
        relaying: Relaying,
        mail: Mail,
        record: TransactionRecord,
        serving: Serving[Smarthost],
        is_plain: bool,
    ) -> None:
        super().__init__(relaying, mail, record, serving, is_plain)
        self.waits_for_limits = True
        self._is_burst = False

    def _begin_another(self) -> Delivery:
        delivery = super()._begin_another()
        delivery.waits_for_limits = True
        return delivery

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""
        if len(batch) > 1 or self.accepted:
            super().recipients(batch, answered)
            return
        if not self._have_one_route(batch) and isinstance(refusal := self._judge(batch[0]), Reply):
            answered([refusal])
            return
        self.accepted.append(batch[0])
        self._is_burst = True
        answered([replies.RECIPIENT_OK])

    def _relay(self, content: Content) -> None:
        if self._is_burst:
            self.burst(content, self._first_ended)
        else:
            super()._relay(content)
