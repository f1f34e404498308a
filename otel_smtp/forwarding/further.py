"""Further transactions upstream, one after the other, for recipients left after the first.

Client libraries drop replies about single recipients, so none is refused for a grouping that the client did not choose.
A recipient that does not fit into the first transaction, or is served by another upstream, is accepted all the same and
follows here, with its own verdict.

After a transaction without an answer, the rest of its recipients is not tried now: the same upstream would be asked
again at once, while the client waits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic_ns
from typing import Final

from otel_smtp.forwarding.content import Content
from otel_smtp.forwarding.delivery import Delivery
from otel_smtp.forwarding.enveloping import MOST_TRANSACTIONS
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.replies import ErrorType, Reply

MOST_SECONDS: Final = 300.0
"""How long after the end of the content another transaction may begin while a client waits. The client waits ten
minutes (RFC 5321 4.5.3.2.6), and the last transaction needs time too.
"""


class Part:
    """The recipients of a message that share a route.

    Args:
        route: the upstreams, the preferred one first.

    Attributes:
        delivery: the open transaction for some of them, if any.
        left: recipients for a further one. `wants_fresh`: it needs an unused connection.
    """

    __slots__ = ("delivery", "left", "route", "wants_fresh")

    def __init__(self, route: Sequence[Smarthost]) -> None:
        self.route = route
        self.delivery: Delivery | None = None
        self.left: list[Recipient] = []
        self.wants_fresh = False

    def leave(self, delivery: Delivery) -> None:
        """A transaction is over; note the recipients for which it had no room."""
        self.delivery = None
        self.left = delivery.left
        self.wants_fresh = delivery.wants_fresh


class Further:
    """Delivers a message to its parts, in order.

    Args:
        begin: makes a transaction upstream.
        content: of the message, complete.
        until_ns: by the monotonic clock: no transaction begins after this; infinity: no bound.
        ended: called once when no recipient is left; never after open transactions are aborted.
    """

    __slots__ = ("_begin", "_begun", "_content", "_ended", "_parts", "_until_ns", "_verdicts")

    def __init__(
        self,
        parts: Sequence[Part],
        begin: Callable[[], Delivery],
        content: Content,
        *,
        until_ns: float,
        ended: Callable[[], None],
    ) -> None:
        self._parts = list(parts)
        self._begin = begin
        self._begun = 1 + sum(part.delivery is not None for part in parts)
        self._content = content
        self._until_ns = until_ns
        self._ended = ended
        self._verdicts: dict[Recipient, list[Reply]] = {}

    def note(self, recipients: Sequence[Recipient], reply: Reply, verdicts: Sequence[Reply] = ()) -> None:
        """Note the fate of some recipients.

        Args:
            reply: applies to recipients beyond the end of `verdicts`.
        """
        for number, recipient in enumerate(recipients):
            verdict = verdicts[number] if number < len(verdicts) else reply
            self._verdicts.setdefault(recipient, []).append(verdict)

    def in_order(self, recipients: Sequence[Recipient]) -> list[Reply]:
        """The verdicts on `recipients`, which are all of the message's."""
        left = {recipient: iter(verdicts) for recipient, verdicts in self._verdicts.items()}
        return [next(left[recipient]) for recipient in recipients]

    def go_on(self) -> None:
        """Deliver to the next recipients."""
        parts = self._parts
        while parts:
            part = parts[0]
            delivery = part.delivery
            if delivery is not None and delivery.accepted:
                delivery.send(self._content, partial(self._sent, part, delivery))
                return
            if delivery is not None:
                delivery.abort()  # none of its recipients is left
                part.leave(delivery)
            elif part.left and (refusal := self._refusal()) is not None:
                self.note(part.left, refusal)
                part.left = []
            elif part.left:
                self._ask(part)
                return
            else:
                del parts[0]
        self._ended()

    def _refusal(self) -> Reply | None:
        """Why no other transaction may begin."""
        if self._begun >= MOST_TRANSACTIONS:
            return replies.TOO_MANY_RECIPIENTS
        if monotonic_ns() >= self._until_ns:
            return replies.UPSTREAM_SILENT
        return None

    def _ask(self, part: Part) -> None:
        self._begun += 1
        delivery = part.delivery = self._begin()
        delivery.route = part.route
        delivery.begins_fresh = part.wants_fresh
        asked, part.left = part.left, []
        delivery.ask(asked, partial(self._answered, asked))

    def _answered(self, asked: Sequence[Recipient], verdicts: Sequence[Reply]) -> None:
        for recipient, verdict in zip(asked, verdicts, strict=True):
            if verdict.code >= 400:
                self.note([recipient], verdict)
        self.go_on()

    def _sent(self, part: Part, delivery: Delivery, reply: Reply, verdicts: Sequence[Reply]) -> None:
        self.note(delivery.accepted, reply, verdicts)
        part.leave(delivery)
        self.skip_unanswered(part, reply)
        self.go_on()

    def skip_unanswered(self, part: Part, reply: Reply) -> None:
        """Skip the rest of a part whose last transaction, ended with `reply`, got no answer."""
        if reply.code < 400 or reply.error_type is ErrorType.UPSTREAM_REFUSED:
            return
        # These are known not to have the message.
        is_unknown = reply.error_type is ErrorType.OUTCOME_UNKNOWN
        self.note(part.left, replies.UPSTREAM_LOST if is_unknown else reply)
        part.left = []
