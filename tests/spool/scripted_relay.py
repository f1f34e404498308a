"""A relay in memory: what an upstream would say is scripted, and its callbacks come when the test lets them."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from otel_smtp.forwarding.base import MOST, MailTransaction, MessageAnswered, Permanent, RecipientsAnswered, Transient
from otel_smtp.observing import DeliveryRecord, Endpoint, Observer, Outcome, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import Reply

BUSY = Reply(450, None, ("busy",))
GONE = Reply(550, None, ("no such user",))
SERVER = Endpoint("192.0.2.1", 25)


@dataclass
class ScriptedRelay:
    """Takes mail as it is scripted to.

    Attributes:
        mail_refusals: for the next transactions, in turn, out of `begin`.
        verdicts: by address; else the recipient is taken.
        finals: what the next messages are answered, in turn, each with the recipients' own; else taken.
        routes: destination by address; else `destination_name`.
        room: how many chunks a transaction takes before it holds the writer back; None: any number.
        is_silent: recipients are never answered.
        is_away: there is never a connection; recipients may be answered all the same, as in a burst.
        is_held: final answers wait until `let_go`.
        taken: mails that were answered 2yz: their recipients and content.
        transactions: all there were. `along`: the destinations of those whose route was given.
    """

    mail_refusals: deque[Reply] = field(default_factory=deque)
    verdicts: dict[str, Reply] = field(default_factory=dict)
    finals: deque[tuple[Reply, Sequence[Reply]]] = field(default_factory=deque)
    routes: Mapping[str, str] = field(default_factory=dict)
    destination_name: str = "up"
    window: int = 20
    room: int | None = None
    is_silent: bool = False
    is_away: bool = False
    is_held: bool = False
    observer: Observer = field(default_factory=Observer)
    can: Extensions = MOST
    taken: list[tuple[Mail, tuple[str, ...], bytes]] = field(default_factory=list)
    transactions: list["ScriptedTransaction"] = field(default_factory=list)
    along: list[str] = field(default_factory=list)

    def capabilities(self) -> Extensions:
        return self.can

    def begin(self, mail: Mail, record: TransactionRecord) -> "ScriptedTransaction":
        if self.mail_refusals:
            reply = self.mail_refusals.popleft()
            raise Permanent(reply) if reply.is_permanent else Transient(reply)
        transaction = ScriptedTransaction(self, mail, record)
        self.transactions.append(transaction)
        return transaction

    def begin_along(self, destination: str, mail: Mail, record: TransactionRecord) -> "ScriptedTransaction":
        self.along.append(destination)
        return self.begin(mail, record)

    def refusal(self, mail: Mail) -> Reply | None:
        return None

    def destination(self, mail: Mail, recipient: Recipient) -> str | Reply:
        return self.routes.get(recipient.address, self.destination_name)

    def keeps_8bit(self) -> bool:
        return self.can.eight_bit_mime

    def concurrency(self, destination: str) -> int:
        return self.window

    def watch_room(self, made: Callable[[], None]) -> None:
        pass  # the window does not change by itself

    def let_go(self) -> None:
        """Give the answers that were held."""
        self.is_held = False
        for transaction in self.transactions:
            transaction.let_go()


class ScriptedTransaction(MailTransaction):
    """One mail. `calls` notes what was asked of it, in order."""

    spool_id: str | None = None

    def __init__(self, relay: ScriptedRelay, mail: Mail, record: TransactionRecord) -> None:
        self._relay = relay
        self._mail = mail
        self._record = record
        self._delivery = DeliveryRecord(record, "up", SERVER, len(record.deliveries) + 1, time.monotonic_ns())
        self._accepted: list[Recipient] = []
        self._answered: MessageAnswered | None = None
        self._resume: Callable[[], None] | None = None
        self._unread = 0
        self.chunks: list[bytes] = []
        self.calls: list[str] = []
        record.deliveries.append(self._delivery)

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        self.calls.append("recipients")
        if not self._relay.is_away:
            self._delivery.peer = SERVER
        verdicts = [self._relay.verdicts.get(one.address, replies.RECIPIENT_OK) for one in batch]
        self._accepted += [one for one, verdict in zip(batch, verdicts, strict=True) if verdict.is_positive]
        if not self._relay.is_silent:
            asyncio.get_running_loop().call_soon(answered, verdicts)

    def content(self, resume: Callable[[], None]) -> None:
        self.calls.append("content")
        self._resume = resume

    def write(self, chunk: bytes) -> bool:
        self.chunks.append(chunk)
        self._unread += 1
        return self._relay.room is None or self._unread <= self._relay.room

    def make_room(self) -> None:
        """Take what came, and let more come."""
        self._unread = 0
        assert self._resume is not None
        self._resume()

    def finish(self, answered: MessageAnswered) -> None:
        self.calls.append("finish")
        self._answered = answered
        if not self._relay.is_held:
            asyncio.get_running_loop().call_soon(self.let_go)

    def let_go(self) -> None:
        answered, self._answered = self._answered, None
        if answered is None:
            return
        final, own = self._relay.finals.popleft() if self._relay.finals else (replies.OK, ())
        verdicts = [*own, *[final] * (len(self._accepted) - len(own))]
        if has_it := tuple(
            one.address for one, reply in zip(self._accepted, verdicts, strict=True) if reply.is_positive
        ):
            self._relay.taken.append((self._mail, has_it, b"".join(self.chunks)))
        self._end(Outcome.RELAYED if final.is_positive else Outcome.DEFERRED, final)
        answered(final, own)

    def abort(self) -> None:
        self.calls.append("abort")
        self._answered = None
        self._end(Outcome.ABORTED, None)

    def _end(self, outcome: Outcome, reply: Reply | None) -> None:
        if self._delivery.ended_ns:
            return
        self._delivery.end(outcome, reply, reply.error_type if reply is not None else None, time.monotonic_ns())
        if self._record.connection is not None and self._record.ended_ns:  # else others report it
            self._relay.observer.delivery_ended(self._delivery)
