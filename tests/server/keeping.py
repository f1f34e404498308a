"""A forwarder in memory, and observers that note what they are told: the two sides of a connection under test."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from otel_smtp.forwarding.base import Capabilities, ContentAborted
from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionObserver,
    Observer,
    Outcome,
    TransactionObserver,
)
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import CloseReason, Transition


@dataclass
class Kept:
    """One message that a `KeepingForwarder` has taken, or has lost on the way."""

    mail: Mail
    recipients: list[Recipient] = field(default_factory=list)
    content: bytes = b""
    is_accepted: bool = False
    is_aborted: bool = False


class KeepingForwarder:
    """Keeps what it is given.

    Attributes:
        kept: every transaction, in order of MAIL.
        batches: sizes of the recipient groups.
        final: what it answers to the content; raised if it is an exception.
        refuses: recipients that it refuses.
        hold: while set, `content` waits for it after the content is complete.
        reads_content: whether it reads the content before it answers.
        at: called with the name of each step; may raise.
    """

    def __init__(self) -> None:
        self.kept: list[Kept] = []
        self.batches: list[int] = []
        self.final: Reply | Exception = replies.OK
        self.refuses: dict[str, Reply] = {}
        self.hold: asyncio.Event | None = None
        self.reads_content = True
        self.at: Callable[[str], None] = lambda step: None
        self.can = Capabilities()

    def capabilities(self) -> Capabilities:
        return self.can

    async def begin(self, mail: Mail, seen: TransactionObserver) -> "_Keeping":
        self.at("begin")
        self.kept.append(Kept(mail))
        return _Keeping(self, self.kept[-1])


class _Keeping:
    spool_id: str | None = None

    def __init__(self, forwarder: KeepingForwarder, kept: Kept) -> None:
        self._forwarder = forwarder
        self._kept = kept

    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        self._forwarder.at("recipients")
        self._forwarder.batches.append(len(batch))
        answers = [self._forwarder.refuses.get(recipient.address, replies.RECIPIENT_OK) for recipient in batch]
        self._kept.recipients += [
            recipient for recipient, reply in zip(batch, answers, strict=True) if reply.is_positive
        ]
        return answers

    async def content(self, chunks: AsyncIterator[bytes]) -> Reply:
        self._forwarder.at("content")
        if self._forwarder.reads_content:
            try:
                async for chunk in chunks:
                    self._kept.content += chunk
            except ContentAborted:
                self._kept.is_aborted = True
                raise
        if self._forwarder.hold is not None:
            await self._forwarder.hold.wait()
        if isinstance(self._forwarder.final, Exception):
            raise self._forwarder.final
        self._kept.is_accepted = self._forwarder.final.is_positive
        return self._forwarder.final

    async def abort(self) -> None:
        self._kept.is_aborted = True


class NotingTransaction(TransactionObserver):
    """Notes how a transaction went."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self.reply: Reply | None = None
        self.answers: list[int] = []
        self.octets: int | None = None

    def recipient_answered(self, recipient: Recipient, reply: Reply) -> None:
        self.answers.append(reply.code)

    def content_received(self, octets: int) -> None:
        self.octets = octets

    def trace_id(self) -> str | None:
        return "5" * 32

    def ended(self, outcome: Outcome, reply: Reply | None, **more: object) -> None:
        assert self.outcome is None, "a transaction ends once"
        self.outcome = outcome
        self.reply = reply


class NotingConnection(ConnectionObserver):
    """Notes the states, replies and transactions of a connection."""

    def __init__(self, info: ConnectionInfo) -> None:
        self.info = info
        self.transitions: list[Transition] = []
        self.replies: list[Reply] = []
        self.transactions: list[NotingTransaction] = []
        self.close_reason: CloseReason | None = None
        self.octets: tuple[int, int] = (0, 0)

    @property
    def states(self) -> str:
        """The recorded states, in one line."""
        return " ".join(transition.state for transition in self.transitions)

    def conn_state(self, transition: Transition) -> None:
        self.transitions.append(transition)

    def replied(self, verb: str | None, reply: Reply) -> None:
        self.replies.append(reply)

    def transaction_begun(self, mail: Mail, number: int) -> TransactionObserver:
        self.transactions.append(NotingTransaction())
        return self.transactions[-1]

    def closed(self, reason: CloseReason, *, octets_received: int, octets_sent: int) -> None:
        assert self.close_reason is None, "a connection closes once"
        self.close_reason = reason
        self.octets = (octets_received, octets_sent)


class Noting(Observer):
    """Notes every connection."""

    def __init__(self) -> None:
        self.connections: list[NotingConnection] = []
        self.refused: list[str] = []

    def connection_opened(self, connection: ConnectionInfo) -> ConnectionObserver:
        self.connections.append(NotingConnection(connection))
        return self.connections[-1]

    def connection_refused(self, reason: str) -> None:
        self.refused.append(reason)
