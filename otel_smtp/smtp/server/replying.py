"""The state of one server session, the one writer of its replies, and the ends of transactions and of the session."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import (
    Command,
    CommandRefused,
    Verb,
)
from otel_smtp.smtp.content import IncomingContent
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.framing import ReceiveBuffer
from otel_smtp.smtp.handler import Asked, Handler, Said
from otel_smtp.smtp.policy import OwnOffer, ServerPolicy
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.sequence import IN_TRANSACTION, Phase
from otel_smtp.smtp.states import (
    CloseReason,
    ConnState,
    ErrorReply,
    IllegalTransition,
    ResetBy,
    ResetCause,
    StateMachine,
    TransactionOver,
    TransitionSink,
    raise_illegal,
)

# Replies that count towards the error limit: faults of the client. An upstream that refuses many recipients, or is
# unavailable, must not cost an honest client its connection; other refusals have their own, far higher limit.
_CLIENT_FAULTS: Final = frozenset(
    {
        ErrorType.SYNTAX,
        ErrorType.SEQUENCE,
        ErrorType.UNSUPPORTED,
        ErrorType.POLICY,
        ErrorType.AUTH,
        ErrorType.ADDRESS,
        ErrorType.PROTOCOL,
    }
)
NOTHING_RECEIVED: Final = ReceiveBuffer()  # shared by all sessions that hold nothing, so it is never fed
_ENDING: Final = Phase.ENDING
_IDLE: Final = ConnState.IDLE
_PASSED_ON: Final = (Verb.RCPT, Verb.DATA, Verb.BDAT)  # whose 2yz may be the upstream's own
_OF_CONTENT: Final = frozenset({Verb.DATA, Verb.BDAT})
_OF_MAIL: Final = _OF_CONTENT | {Verb.MAIL, Verb.RCPT}
_CLOSE_REASONS: Final = {
    replies.CLOSING: CloseReason.QUIT,
    replies.SHUTTING_DOWN: CloseReason.SHUTDOWN,
    replies.TOO_MANY_ERRORS: CloseReason.TOO_MANY_ERRORS,
    replies.TOO_MANY_REFUSALS: CloseReason.TOO_MANY_ERRORS,
    replies.TOO_MANY_JUNK_COMMANDS: CloseReason.TOO_MANY_ERRORS,
    replies.TOO_MANY_AUTH_FAILURES: CloseReason.TOO_MANY_ERRORS,
    replies.LINE_DISCARD_EXCEEDED: CloseReason.TOO_MANY_ERRORS,
    replies.TIMED_OUT: CloseReason.TIMEOUT,
    replies.INTERNAL_CLOSING: CloseReason.INTERNAL_ERROR,
    replies.BARE_LINE_FEED: CloseReason.PROTOCOL_MISMATCH,
}


class OpenTransaction:
    """One mail transaction, from the accepted MAIL to its end."""

    __slots__ = ("by_data", "content", "mail", "number", "offer", "recipients", "size_limit")

    def __init__(self, mail: Mail, number: int, offer: Extensions, size_limit: int) -> None:
        self.mail = mail
        self.offer = offer
        self.number = number
        self.size_limit = size_limit
        self.recipients = 0  # accepted
        self.by_data: bool | None = None  # that the content comes by DATA, not by BDAT; None: it has not begun
        self.content: IncomingContent | None = None  # from its first octets on, unless it arrives as a whole


class IncomingChunk:
    """A BDAT chunk that is being read, or discarded."""

    __slots__ = ("is_last", "refusal", "remaining", "size")

    def __init__(self, size: int, *, is_last: bool) -> None:
        self.size = size
        self.remaining = size
        self.is_last = is_last
        self.refusal: ChunkRefusal | None = None  # the octets are discarded, then this is sent


class Misconduct:
    """Counts of a client's refused and useless commands, kept only for the few clients that have any.

    Attributes:
        faults: refusals through the client's own fault.
        refusals: no fault of the client's, since a message was accepted.
        junk: commands that moved no mail, since a message was answered.
        auth_failures: of this session.
    """

    __slots__ = ("auth_failures", "faults", "junk", "refusals")

    def __init__(self) -> None:
        self.faults = 0
        self.refusals = 0
        self.junk = 0
        self.auth_failures = 0


@dataclass(frozen=True, slots=True)
class ChunkRefusal:
    """The reply to a refused BDAT, once its octets are discarded."""

    reply: Reply
    copies: int  # copies of the reply: one per recipient over LMTP
    phase: Phase  # the session's next phase


class Replying(StateMachine):
    """A session's state, replies and end; see `ServerProtocol` for its arguments and attributes."""

    __slots__ = (
        "_auth_mechanism",
        "_batch",
        "_chunk",
        "_discard_limit",
        "_discarded",
        "_eof",
        "_handler",
        "_held",
        "_is_behind",
        "_is_running",
        "_mail",
        "_misconduct",
        "_offer",
        "_policy",
        "_told",
        "_too_long",
        "_transaction",
        "asked",
        "close_reason",
        "errors",
        "has_news",
        "is_authenticated",
        "is_tls",
        "messages",
        "out",
        "phase",
        "received",
        "said",
        "transactions",
        "wants_turn",
    )

    def __init__(
        self,
        policy: ServerPolicy,
        handler: Handler,
        *,
        offer: Callable[[], Extensions],
        recorded: TransitionSink,
        said: Said,
        on_illegal: Callable[[IllegalTransition], None] = raise_illegal,
    ) -> None:
        self._policy = policy
        self._handler = handler
        self._offer = offer
        super().__init__(recorded, on_illegal)
        self.said = said
        self.phase = Phase.UNGREETED
        self.is_tls = False
        self.is_authenticated = False
        self.messages = 0
        self.transactions = 0
        self.errors = 0
        self.close_reason: CloseReason | None = None
        self.wants_turn = False
        self.has_news = False
        self.received = NOTHING_RECEIVED
        self.out = b""
        self.asked = Asked.NOTHING
        self._mail: OpenTransaction | None = None  # that was asked about
        self._batch: list[Recipient] | tuple[()] = ()  # to be asked about, or asked about
        self._held: Command | CommandRefused | None = None  # parsed; waits until the batch is answered
        self._transaction: OpenTransaction | None = None
        self._chunk: IncomingChunk | None = None
        self._discarded = 0  # octets so far of a line that is too long; 0: not discarding
        self._discard_limit = 0
        self._too_long = replies.LINE_TOO_LONG  # the reply to the line that is being discarded
        self._auth_mechanism = "other"
        self._misconduct: Misconduct | None = None
        self._eof = False
        self._is_behind = False  # earlier input waits to run or to be discarded, or the input has ended
        self._is_running = False
        self._told: OwnOffer | None = None  # the offer of this session's last EHLO

    # Questions of the driver -------------------------------------------------------------------------------------

    @property
    def awaits_content(self) -> bool:
        """Whether octets of content come next: the deadline of DATA applies, not that of commands."""
        return self.phase is Phase.CONTENT

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction is open, or a decision is awaited: the session should not end now."""
        return self._transaction is not None or self.asked is not Asked.NOTHING

    @property
    def has_open_content(self) -> bool:
        """Whether the content of a message has begun and not ended, including between two BDAT chunks."""
        return self._transaction is not None and self._transaction.by_data is not None

    @property
    def offers_8bit(self) -> bool:
        """Whether 8BITMIME was offered for the MAIL that is asked about."""
        return self._mail is not None and self._mail.offer.eight_bit_mime

    def _hold(self, data: bytes) -> None:
        """Hold octets behind those already held."""
        if self.received is NOTHING_RECEIVED:
            self.received = ReceiveBuffer()
        self.received.feed(data)

    def _hold_again(self, data: bytes) -> None:
        """Hold taken octets again, before those already held."""
        if self.received is NOTHING_RECEIVED:
            self.received = ReceiveBuffer()
        self.received.give_back(data)

    def _content_verb(self) -> Verb:
        return Verb.BDAT if self._transaction is not None and self._transaction.by_data is False else Verb.DATA

    # Ends --------------------------------------------------------------------------------------------------------

    def refuse(self, reply: Reply) -> None:
        """Send `reply` (capacity, access) instead of the greeting."""
        self._send(reply, None)
        self._end(_CLOSE_REASONS.get(reply, CloseReason.REFUSED))

    def fail(self, reply: Reply | None, reason: CloseReason) -> None:
        """End the session from outside: a deadline, the shutdown, a bug of ours. `reply` is sent first, if given."""
        if self.phase is Phase.ENDING:
            return
        self._forget_questions()
        if reply is not None and self.phase is not Phase.HANDSHAKE:
            self._send(reply, None)
        self._end(reason)

    def _settle(self) -> None:
        """A transaction has ended with the final reply to its message: record Idle."""
        if self.phase is not _ENDING:
            if self._misconduct is not None:
                self._misconduct.junk = 0
            self.enter(_IDLE, TransactionOver(self.messages))

    def _reset(self, cause: ResetCause) -> None:
        self._drop_transaction(None)
        self.enter(ConnState.RESET, ResetBy(cause))
        self.enter(ConnState.ACTIVE)

    def _end_transaction(self) -> None:
        """Replace, never edit: nothing of a transaction survives its end (elsewhere that bug lived 21 years)."""
        self._transaction = None
        self._chunk = None
        if self.phase in IN_TRANSACTION:
            self.phase = Phase.READY

    def _drop_transaction(self, reply: Reply | None) -> None:
        if self._transaction is not None:
            self._end_transaction()
            self._handler.transaction_aborted(reply)

    def _forget_questions(self) -> None:
        self.asked = Asked.NOTHING
        self._mail = None
        self._batch = ()
        self._held = None

    def _end(self, reason: CloseReason) -> None:
        if self.phase is not Phase.ENDING:
            self._forget_questions()
            self._drop_transaction(None)
            self.received.clear()
            self.phase = Phase.ENDING
            self.close_reason = reason
            self.has_news = True

    def _send(self, reply: Reply, verb: str | None) -> None:
        """Write a reply: the one place where Error is raised.

        The constant positive replies to common mail are written where they are decided: `said`, then `out`.
        """
        if self.phase is _ENDING:
            return
        self.has_news = True
        if reply.enhanced is None and (reply.code >= 400 or (reply.code < 300 and verb in _PASSED_ON)):
            reply = reply.with_general_status()  # RFC 2034 4 demands one in every reply; the upstream's may lack it
        if reply.code >= 400:
            reply = self._count_error(reply)
            transaction = self._transaction
            number = transaction.number if transaction is not None else None
            self.enter(ConnState.ERROR, ErrorReply(verb, reply, reply.error_type, number))
        self.said.append((verb, reply))
        is_refusal = reply.code >= 400 and verb in _OF_MAIL
        self.out += self._handler.as_sent(reply, is_of_content=verb in _OF_CONTENT).wire if is_refusal else reply.wire
        if reply.closes or reply.code == 421:
            # RFC 5321 3.8: a server closes after 421.
            self._end(_CLOSE_REASONS.get(reply, CloseReason.REFUSED))

    def _say(self, said: tuple[str | None, Reply]) -> None:
        """Write a positive reply that is the same in every session."""
        self.has_news = True
        self.said.append(said)
        self.out += said[1].wire

    def _count_junk(self, verb: Verb) -> bool:
        """Count a command that moves no mail; False if it was one too many, which has been answered."""
        misconduct = self._noted_misconduct()
        misconduct.junk += 1
        if misconduct.junk > self._policy.limits.junk_commands:
            self._send(replies.TOO_MANY_JUNK_COMMANDS, verb)
            return False
        return True

    def _count_error(self, reply: Reply) -> Reply:
        self.errors += 1
        if reply.closes:
            return reply
        limits, misconduct = self._policy.limits, self._noted_misconduct()
        if reply.error_type in _CLIENT_FAULTS:
            misconduct.faults += 1
            return reply if misconduct.faults <= limits.errors else replies.TOO_MANY_ERRORS
        misconduct.refusals += 1
        return reply if misconduct.refusals <= limits.refusals + limits.recipients else replies.TOO_MANY_REFUSALS

    def _noted_misconduct(self) -> Misconduct:
        if self._misconduct is None:
            self._misconduct = Misconduct()
        return self._misconduct
