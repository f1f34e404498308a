"""A forwarder in memory, and a server whose sessions a test watches: what stands around a session under test."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from otel_smtp.forwarding.base import MOST, Forwarder, MailTransaction, MessageAnswered, RecipientsAnswered
from otel_smtp.net import Stream
from otel_smtp.observing import ConnectionInfo, ConnectionRecord, Observer, TransactionRecord
from otel_smtp.server.conversation import Conversation
from otel_smtp.server.listener import Server
from otel_smtp.server.policy import ListenerPolicy, Segments
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import CloseReason, IllegalTransition, Transition


@dataclass
class Kept:
    """One message that a `KeepingForwarder` has taken, or has lost on the way."""

    mail: Mail
    record: TransactionRecord
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
        verdicts: of each recipient, where they are its own.
        refuses: recipients that it refuses.
        hold: while set, the answer to the content waits for it. `hold_recipients`: likewise that to recipients.
        holds_back: after how many octets of a message's content it asks for a pause; `resume` ends the pause.
        resume: what the transaction at hand gave to be called.
        at: called with the name of each step; may raise.
    """

    def __init__(self) -> None:
        self.kept: list[Kept] = []
        self.batches: list[int] = []
        self.final: Reply | Exception = replies.OK
        self.verdicts: Sequence[Reply] = ()
        self.refuses: dict[str, Reply] = {}
        self.hold: asyncio.Event | None = None
        self.hold_recipients: asyncio.Event | None = None
        self.holds_back: int | None = None
        self.resume: Callable[[], None] = lambda: None
        self.at: Callable[[str], None] = lambda step: None
        self.can = MOST

    def capabilities(self) -> Extensions:
        return self.can

    def begin(self, mail: Mail, record: TransactionRecord) -> "_Keeping":
        self.at("begin")
        self.kept.append(Kept(mail, record))
        return _Keeping(self, self.kept[-1])


class _Keeping(MailTransaction):
    spool_id: str | None = None

    def __init__(self, forwarder: KeepingForwarder, kept: Kept) -> None:
        self._forwarder = forwarder
        self._kept = kept
        self._waiting: asyncio.Task[None] | None = None

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        self._forwarder.at("recipients")
        self._forwarder.batches.append(len(batch))
        answers = [self._forwarder.refuses.get(recipient.address, replies.RECIPIENT_OK) for recipient in batch]
        self._kept.recipients += [
            recipient for recipient, reply in zip(batch, answers, strict=True) if reply.is_positive
        ]
        if (hold := self._forwarder.hold_recipients) is None:
            answered(answers)
        else:
            self._waiting = asyncio.get_running_loop().create_task(self._tell_late(answered, answers, hold))

    async def _tell_late(self, answered: RecipientsAnswered, answers: Sequence[Reply], hold: asyncio.Event) -> None:
        await hold.wait()
        answered(answers)

    def content(self, resume: Callable[[], None]) -> None:
        self._forwarder.at("content")
        self._forwarder.resume = resume

    def write(self, chunk: bytes) -> bool:
        self._forwarder.at("write")
        self._kept.content += chunk
        limit = self._forwarder.holds_back
        return limit is None or len(self._kept.content) <= limit

    def finish(self, answered: MessageAnswered) -> None:
        self._forwarder.at("finish")
        if self._forwarder.hold is None:
            self._answer(answered)
        else:
            self._waiting = asyncio.get_running_loop().create_task(self._answer_late(answered, self._forwarder.hold))

    async def _answer_late(self, answered: MessageAnswered, hold: asyncio.Event) -> None:
        await hold.wait()
        self._answer(answered)

    def _answer(self, answered: MessageAnswered) -> None:
        final = self._forwarder.final
        if isinstance(final, Exception):
            raise final
        self._kept.is_accepted = final.is_positive
        answered(final, self._forwarder.verdicts)

    def abort(self) -> None:
        self._kept.is_aborted = True


class NotingConnection:
    """What became known of a connection."""

    def __init__(self, record: ConnectionRecord) -> None:
        self.record = record
        self.past: list[Transition] = []  # those of segments that are over
        self.transactions: list[TransactionRecord] = []

    @property
    def info(self) -> ConnectionInfo:
        """Its identity."""
        return self.record.info

    @property
    def transitions(self) -> list[Transition]:
        """All that were recorded."""
        return self.past if self.record.end.at_ns else [*self.past, *self.record.transitions]

    @property
    def states(self) -> str:
        """The recorded states, in one line."""
        return " ".join(transition.state for transition in self.transitions)

    @property
    def replies(self) -> list[tuple[str | None, Reply]]:
        """Those of the present segment."""
        return self.record.replies

    @property
    def close_reason(self) -> CloseReason | None:
        """Why it ended; None while it lives."""
        return self.record.end.reason


TRACE_ID = "5" * 32


class Noting(Observer):
    """Notes every connection. It does not ask for transitions as they happen, and nearly no gateway's observer does."""

    def __init__(self) -> None:
        self.connections: list[NotingConnection] = []
        self.refused: list[str] = []
        self.segments: list[list[Transition]] = []
        self._by_record: dict[ConnectionRecord, NotingConnection] = {}

    def connection_opened(self, connection: ConnectionRecord) -> None:
        assert not connection.transitions
        self._by_record[connection] = NotingConnection(connection)
        self.connections.append(self._by_record[connection])

    def connection_refused(self, reason: str) -> None:
        self.refused.append(reason)

    def segment_ended(self, connection: ConnectionRecord) -> None:
        self.segments.append(list(connection.transitions))
        self._by_record[connection].past += connection.transitions

    def connection_closed(self, connection: ConnectionRecord) -> None:
        self.segment_ended(connection)
        del self._by_record[connection]  # a connection closes once

    def transaction_ended(self, transaction: TransactionRecord) -> None:
        assert transaction.connection is not None
        noting = next(known for known in self.connections if known.record is transaction.connection)
        assert transaction not in noting.transactions, "a transaction ends once"
        noting.transactions.append(transaction)

    def trace_id(self, transaction: TransactionRecord) -> str | None:
        assert transaction.trace_headers is not None, "asked before the header block was read"
        return TRACE_ID


class Watching(Noting):
    """Asks for them too, and wants to hear of each once, in order, before anything else is told."""

    def __init__(self) -> None:
        super().__init__()
        self._told: Counter[ConnectionRecord] = Counter()

    def conn_state(self, connection: ConnectionRecord, transition: Transition) -> None:
        self._told[connection] += 1
        assert transition is connection.transitions[self._told[connection] - 1]

    def segment_ended(self, connection: ConnectionRecord) -> None:
        assert self._told.pop(connection, 0) == len(connection.transitions)
        super().segment_ended(connection)


class WatchedServer(Server):
    """A server without listeners, which serves the streams that a test hands it.

    Attributes:
        stressed: whether most of the allowed connections are taken.
    """

    def __init__(
        self,
        forwarder: Forwarder,
        observer: Observer,
        *,
        connections: int = 100,
        segments: Segments | None = None,
    ) -> None:
        super().__init__(
            [], forwarder, observer, connections=connections, connections_per_client=100, segments=segments
        )
        self.stressed = False
        self._ends: dict[Conversation, asyncio.Future[None]] = {}

    @property
    def is_stressed(self) -> bool:
        return self.stressed

    @staticmethod
    def illegal_step(step: IllegalTransition) -> None:
        raise step

    def serve(self, policy: ListenerPolicy, stream: Stream) -> tuple[Conversation, "asyncio.Future[None]"]:
        """A session, and what is done when it is over."""
        session = self.accept(policy, stream)
        return session, self._end_of(session)

    def ended(self, session: Conversation) -> None:
        super().ended(session)
        self._end_of(session).set_result(None)

    def _end_of(self, session: Conversation) -> "asyncio.Future[None]":
        if session not in self._ends:
            self._ends[session] = asyncio.get_running_loop().create_future()
        return self._ends[session]
