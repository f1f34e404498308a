"""ServerProtocol: the server side of a session, from octets to events and from replies to octets.

How it is driven::

    protocol.accepted(TlsMode.OFF)          # New
    protocol.greet()                        # Active, 220
    write(protocol.data_to_send())
    protocol.receive_data(octets)
    while True:
        event = protocol.next_event()
        NEED_DATA  -> write(data_to_send()), read more
        PAUSED     -> answer what was handed up: protocol.reply(...)
        an event   -> see events.py
    protocol.closed(reason)                 # Closed, once, whatever happened

What the engine promises:

* It answers by itself all that needs no decision: syntax, order, limits, EHLO, NOOP, and so on.
* Replies leave in the order of their commands. Recipients of a pipelined group are handed up together; every other
  command waits until they are answered.
* `_send` is the one place where a reply is written, so it is the one place where Error is raised; every state is
  recorded inside the call that decides the reply, before `data_to_send` can give its octets.
* A transaction is one object, made at MAIL and dropped at its end: nothing of it can reach the next.
* Cutting the input differently changes neither events nor replies nor states. (Where content is refused, the
  `ContentReceived` events handed up before its end may be fewer or more.)
"""

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, assert_never

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import (
    Auth,
    Bdat,
    Command,
    CommandRefused,
    Data,
    Expn,
    Hello,
    Help,
    MailFrom,
    Noop,
    Quit,
    RcptTo,
    Rset,
    StartTls,
    Verb,
    Vrfy,
    parse_command,
)
from otel_smtp.smtp.envelope import Body, Mail
from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.events import (
    NEED_DATA,
    PAUSED,
    AuthRequested,
    AuthResponded,
    ConnectionEnding,
    ContentEnded,
    ContentReceived,
    ContentStarted,
    Event,
    HeaderReceived,
    HelloReceived,
    MailRequested,
    RecipientRequested,
    TlsRequested,
    TransactionAborted,
    Wait,
)
from otel_smtp.smtp.extensions import Offer, keywords, unsupported, unsupported_recipient
from otel_smtp.smtp.framing import ChunkReader, ContentInspector, DotReader, HeaderSplitter, ReceiveBuffer
from otel_smtp.smtp.received import HeaderFacts, inspect_header
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.sasl import MECHANISMS, SaslError, decode_base64
from otel_smtp.smtp.sequence import IN_TRANSACTION, Phase, is_legal
from otel_smtp.smtp.states import (
    CloseReason,
    ConnState,
    IllegalTransition,
    ResetCause,
    StateMachine,
    TlsMode,
    Transition,
    raise_illegal,
)

# A line this many times over its limit is not worth reading off any more: 421. Unlimited discarding held sessions open
# in other servers until 2026.
_DISCARD_FACTOR: Final = 32
# RFC 3207 4: what may be said while TLS is required and not on.
_BEFORE_TLS: Final = frozenset({Verb.NOOP, Verb.EHLO, Verb.LHLO, Verb.STARTTLS, Verb.QUIT})
# Commands that do not move mail; a session of nothing else holds a slot for nothing.
_JUNK: Final = frozenset({Verb.NOOP, Verb.RSET, Verb.VRFY, Verb.EXPN, Verb.HELP, Verb.EHLO, Verb.HELO, Verb.LHLO})
# Replies that count towards the error limit: the client's own doing. An upstream that refuses many recipients, or is
# away, must not cost an honest client its connection.
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
_HTTP_REQUEST = re.compile(rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|PRI) ", re.IGNORECASE)
# The record header of a TLS handshake: type 22, version 3.x (RFC 8446 5.1).
_TLS_HANDSHAKE: Final = b"\x16\x03"
_CLOSE_REASONS: Final = {
    replies.CLOSING: CloseReason.QUIT,
    replies.SHUTTING_DOWN: CloseReason.SHUTDOWN,
    replies.TOO_MANY_ERRORS: CloseReason.TOO_MANY_ERRORS,
    replies.TOO_MANY_JUNK_COMMANDS: CloseReason.TOO_MANY_ERRORS,
    replies.TOO_MANY_AUTH_FAILURES: CloseReason.TOO_MANY_ERRORS,
    replies.LINE_DISCARD_EXCEEDED: CloseReason.TOO_MANY_ERRORS,
    replies.TIMED_OUT: CloseReason.TIMEOUT,
    replies.INTERNAL_CLOSING: CloseReason.INTERNAL_ERROR,
}


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a client can make grow; the defaults are those of wire.md. All sizes in octets."""

    message_size: int = 25 * 1024 * 1024
    recipients: int = 1000
    messages_per_connection: int = 1000
    errors: int = 10
    junk_commands: int = 100
    command_line: int = 2048
    auth_line: int = 12288
    text_line: int = 65535
    header_size: int = 256 * 1024
    header_lines: int = 1000
    hops: int = 100
    auth_failures: int = 3


@dataclass(frozen=True, slots=True)
class ServerPolicy:
    """How one listener speaks.

    Attributes:
        hostname: our name in the greeting and in EHLO.
        is_lmtp: LHLO, and one final reply per recipient (RFC 2033).
        tls_mode: STARTTLS is offered if `starttls`, until TLS is on.
        tls_required: 530 to all but NOOP, EHLO, STARTTLS and QUIT until TLS is on (RFC 3207 4).
        auth_mechanisms: offered SASL mechanisms, in order of preference; empty: no AUTH.
        auth_required: 530 to MAIL until authenticated (RFC 4954 6).
        auth_in_clear: AUTH is offered without TLS too.
        rejects_bare_line_ends: 550 5.6.11 to content with a bare CR or LF, instead of normalising it.
    """

    hostname: str
    is_lmtp: bool = False
    tls_mode: TlsMode = TlsMode.OFF
    tls_required: bool = False
    auth_mechanisms: tuple[str, ...] = ()
    auth_required: bool = False
    auth_in_clear: bool = False
    rejects_bare_line_ends: bool = False
    limits: ServerLimits = field(default_factory=ServerLimits)


class _Transaction:
    """One mail transaction, from the accepted MAIL to its end."""

    __slots__ = (
        "chunks",
        "dots",
        "facts",
        "header",
        "inspector",
        "mail",
        "number",
        "offer",
        "recipients",
        "size_limit",
    )

    def __init__(self, mail: Mail, number: int, offer: Offer, size_limit: int) -> None:
        self.mail = mail
        self.offer = offer
        self.number = number
        self.size_limit = size_limit
        self.recipients = 0  # accepted
        self.dots: DotReader | None = None
        self.chunks: ChunkReader | None = None
        self.inspector: ContentInspector | None = None
        self.header: HeaderSplitter | None = None
        self.facts: HeaderFacts | None = None


class _Chunk:
    """A BDAT chunk that is being read, or read off."""

    __slots__ = ("is_last", "refusal", "remaining", "size")

    def __init__(self, size: int, *, is_last: bool) -> None:
        self.size = size
        self.remaining = size
        self.is_last = is_last
        self.refusal: _Refusal | None = None  # the octets are only read off, then this is said


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What is said to a BDAT that is refused, once its octets are read off."""

    reply: Reply
    copies: int  # the reply is sent so many times: once for each recipient over LMTP
    phase: Phase  # where the session then stands


class ServerProtocol:
    """One server session over one connection, TLS included.

    Args:
        policy: how the listener speaks.
        on_transition: called with each recorded state.
        offer: what content and envelope extensions can be promised now; asked at each EHLO and MAIL, and cheapest if
            the same object comes back while nothing has changed. Its `starttls` and `auth_mechanisms` are ignored:
            those are the engine's own.
        on_reply: called with the verb and each reply, right before it becomes visible in `data_to_send`.
        on_illegal: see `StateMachine`.

    Holds at most one line (12 KiB), what one `receive_data` call brought, and one header block (256 KiB).
    """

    __slots__ = (
        "_auth_failures",
        "_auth_mechanism",
        "_chunk",
        "_discard_limit",
        "_discarded",
        "_eof",
        "_errors",
        "_events",
        "_held",
        "_in",
        "_is_authenticated",
        "_is_tls",
        "_junk",
        "_messages",
        "_offer",
        "_on_reply",
        "_out",
        "_own",
        "_phase",
        "_policy",
        "_reason",
        "_said_ending",
        "_states",
        "_told",
        "_transaction",
        "_transactions",
        "_unanswered",
    )

    def __init__(
        self,
        policy: ServerPolicy,
        on_transition: Callable[[Transition], None],
        *,
        offer: Callable[[], Offer],
        on_reply: Callable[[str | None, Reply], None] | None = None,
        on_illegal: Callable[[IllegalTransition], None] = raise_illegal,
    ) -> None:
        self._policy = policy
        self._offer = offer
        self._on_reply = on_reply
        self._states = StateMachine(on_transition, on_illegal)
        self._in = ReceiveBuffer()
        self._out: list[bytes] = []
        # Lists, as they hold one event or a pipelined group: an empty deque takes 600 octets of each connection.
        self._events: list[Event] = []
        self._unanswered: list[Event] = []
        self._held: Command | CommandRefused | None = None  # parsed, waits for the unanswered recipients
        self._phase = Phase.UNGREETED
        self._transaction: _Transaction | None = None
        self._chunk: _Chunk | None = None
        self._discarded = 0  # octets of a line that is too long, so far; 0: not discarding
        self._discard_limit = 0
        self._is_tls = False
        self._is_authenticated = False
        self._auth_mechanism: str | None = None
        self._auth_failures = 0
        self._transactions = 0
        self._messages = 0
        self._errors = 0
        self._junk = 0
        self._eof = False
        self._reason: CloseReason | None = None
        self._said_ending = False
        self._told: Offer | None = None  # what the last EHLO of this session offered
        self._own: tuple[Offer, Offer, Reply] | None = None  # offered behind us; by us; how EHLO says it

    # What the driver tells -------------------------------------------------------------------------------------

    def accepted(self, tls_mode: TlsMode) -> None:
        """Record New: the socket has been accepted."""
        self._states.enter(ConnState.NEW, tls_mode=tls_mode)

    def refuse(self, reply: Reply) -> None:
        """Answer the connection itself with `reply` (capacity, access) instead of greeting it."""
        self._send(reply, None)
        self._end(_CLOSE_REASONS.get(reply, CloseReason.REFUSED))

    def greet(self) -> None:
        """Open the session with 220; a client that spoke first is refused (wire.md, A4)."""
        if len(self._in) and not self._is_mismatch():
            self._send(replies.EARLY_TALKER, None)
        if self._phase is not Phase.ENDING:
            self._phase = Phase.CONNECTED
            self._states.enter(ConnState.ACTIVE)
            self._send(
                replies.greeting(self._policy.hostname, protocol="LMTP" if self._policy.is_lmtp else "ESMTP"), None
            )

    def receive_data(self, data: bytes) -> None:
        """Take octets from the peer; call `next_event` until NEED_DATA or PAUSED.

        Raises:
            LocalProtocolError: called after `receive_eof`.
        """
        if self._eof:
            raise LocalProtocolError("receive_data after receive_eof")
        self._in.feed(data)

    def receive_eof(self) -> None:
        """The peer will send no more. What it sent before is still answered."""
        self._eof = True

    def handshake_begins(self) -> None:
        """Record StartTLS for implicit TLS, before the handshake."""
        self._phase = Phase.HANDSHAKE
        self._states.enter(ConnState.STARTTLS, tls_mode=TlsMode.IMPLICIT)

    def tls_started(self, version: str, cipher: str) -> None:
        """The handshake is done: the session begins anew, nothing said in clear counts any more (RFC 3207 4.2)."""
        if self._phase is not Phase.HANDSHAKE:
            raise LocalProtocolError("tls_started without a handshake")
        self._in.clear()
        self._is_tls = True
        self._is_authenticated = False  # whoever was in the middle may have said it
        self._auth_mechanism = None
        self._told = None
        self._own = None
        self._phase = Phase.CONNECTED if self._policy.tls_mode is TlsMode.STARTTLS else Phase.UNGREETED
        self._states.enter(ConnState.ACTIVE, tls_version=version, tls_cipher=cipher)

    def tls_failed(self) -> None:
        """The handshake failed; no reply is possible. The connection ends."""
        self._states.enter(ConnState.ERROR, error_type=ErrorType.TLS)
        self._end(CloseReason.TLS_FAILURE)

    def fail(self, reply: Reply | None, reason: CloseReason) -> None:
        """End the session from outside: a deadline, the shutdown, a bug of ours. `reply` is said first, if given."""
        if self._phase is Phase.ENDING:
            return
        self._unanswered.clear()
        self._held = None
        if reply is not None and self._phase is not Phase.HANDSHAKE:
            self._send(reply, None)
        self._end(reason)

    def closed(self, reason: CloseReason) -> None:
        """Record Closed: the transport is gone. `reason` holds unless the session had already found its own end."""
        if self._states.level is not ConnState.CLOSED:
            self._phase = Phase.ENDING
            self._states.enter(ConnState.CLOSED, reason=self._reason or reason, messages=self._messages)
            self._reason = self._reason or reason

    # What the driver reads -------------------------------------------------------------------------------------

    @property
    def state(self) -> ConnState:
        """The level at which the connection stands."""
        return self._states.level

    @property
    def phase(self) -> Phase:
        """The phase of the session."""
        return self._phase

    @property
    def is_tls(self) -> bool:
        """Whether TLS is on."""
        return self._is_tls

    @property
    def is_authenticated(self) -> bool:
        """Whether AUTH has succeeded."""
        return self._is_authenticated

    @property
    def close_reason(self) -> CloseReason | None:
        """Why the session ends; None while it goes on."""
        return self._reason

    @property
    def awaits_content(self) -> bool:
        """Whether octets of content are read next: the deadline of DATA holds, not that of commands."""
        return self._phase is Phase.CONTENT

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction is open, or an event waits for its answer: not a moment to end the session."""
        return self._transaction is not None or bool(self._unanswered)

    @property
    def transactions(self) -> int:
        """Transactions begun on this connection."""
        return self._transactions

    @property
    def messages(self) -> int:
        """Messages that got their final reply on this connection."""
        return self._messages

    def data_to_send(self) -> bytes:
        """The octets to write now, possibly none; several replies come as one piece."""
        if not self._out:
            return b""
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        return data

    def next_event(self) -> Event | Wait:
        """What happens next; see events.py."""
        while True:
            if self._events:
                return self._events.pop(0)
            if self._phase is Phase.ENDING:
                if self._said_ending:
                    return PAUSED
                self._said_ending = True
                assert self._reason is not None
                return ConnectionEnding(self._reason)
            if not self._advance():
                return PAUSED if self._unanswered or self._phase in (Phase.HANDSHAKE, Phase.UNGREETED) else NEED_DATA

    # Decisions from above ----------------------------------------------------------------------------------------

    def reply(self, reply: Reply, *others: Reply) -> None:
        """Answer the oldest unanswered event.

        Args:
            reply: the decision.
            others: for `ContentEnded` over LMTP, the replies for the second and further recipients (RFC 2033 4.2).

        Raises:
            LocalProtocolError: nothing waits for an answer, or `reply` does not fit.
        """
        if self._phase is Phase.ENDING:
            return  # the session was ended from outside while the decision was being made
        if not self._unanswered:
            raise LocalProtocolError("reply without an unanswered event")
        match self._unanswered.pop(0):
            case MailRequested(mail):
                self._answer_mail(mail, reply)
            case RecipientRequested():
                self._answer_recipient(reply)
            case TlsRequested():
                self._answer_starttls(reply)
            case AuthRequested() | AuthResponded():
                self._answer_auth(reply)
            case ContentEnded():
                self._answer_content((reply, *others))
            case event:
                raise LocalProtocolError(f"{event!r} takes no reply")

    def challenge(self, data: bytes) -> None:
        """Go on with the AUTH exchange: 334 with `data`."""
        if not self._unanswered or not isinstance(self._unanswered[0], AuthRequested | AuthResponded):
            raise LocalProtocolError("challenge outside an AUTH exchange")
        self._unanswered.pop(0)
        self._phase = Phase.AUTHENTICATING
        self._send(replies.challenge(base64.b64encode(data).decode("ascii")), Verb.AUTH)

    def _answer_mail(self, mail: Mail, reply: Reply) -> None:
        if not reply.is_positive:
            self._send(reply, Verb.MAIL)
            return
        self._transactions += 1
        self._transaction = _Transaction(
            mail, self._transactions, self._told or self._own_offer(), self._message_size_limit()
        )
        self._phase = Phase.MAIL
        self._states.enter(ConnState.ACTIVE)  # recorded only where the level was Idle
        self._send(reply, Verb.MAIL)

    def _answer_recipient(self, reply: Reply) -> None:
        if reply.is_positive and self._transaction is not None:
            self._transaction.recipients += 1
            self._phase = Phase.RECIPIENTS
        self._send(reply, Verb.RCPT)

    def _answer_starttls(self, reply: Reply) -> None:
        if len(self._in):
            # Octets behind STARTTLS would be run inside TLS as if the client had sent them there (CVE-2011-0411).
            self._in.clear()
            self._send(replies.OCTETS_BEHIND_STARTTLS, Verb.STARTTLS)
        elif reply.code != 220:
            self._send(reply, Verb.STARTTLS)
        else:
            self._phase = Phase.HANDSHAKE
            self._states.enter(ConnState.STARTTLS, tls_mode=TlsMode.STARTTLS)
            self._send(reply, Verb.STARTTLS)

    def _answer_auth(self, reply: Reply) -> None:
        self._phase = Phase.READY
        if reply.code == 235:
            self._is_authenticated = True
            self._states.enter(ConnState.ACTIVE, mechanism=self._auth_mechanism)
            self._send(reply, Verb.AUTH)
        else:
            if reply.error_type is ErrorType.AUTH and reply.is_permanent:
                self._auth_failures += 1
            self._fail_auth(reply)

    def _answer_content(self, final: tuple[Reply, ...]) -> None:
        verb = self._content_verb()
        self._end_transaction()
        self._messages += 1
        if any(reply.is_positive for reply in final):
            self._states.enter(ConnState.ACTIVE)
        for reply in final:
            self._send(reply, verb)
        self._settle()

    # Reading -----------------------------------------------------------------------------------------------------

    def _advance(self) -> bool:
        """Use up some input; whether anything changed."""
        if self._held is not None:
            if self._unanswered:
                return False
            held, self._held = self._held, None
            self._run(held)
            return True
        match self._phase:
            case Phase.CONTENT:
                return self._read_content() or (not self._unanswered and self._at_eof())
            case Phase.AUTHENTICATING:
                return self._read_auth_line() or (not self._unanswered and self._at_eof())
            case Phase.HANDSHAKE | Phase.UNGREETED | Phase.ENDING:
                return False
            case _:
                if self._unanswered and not isinstance(self._unanswered[-1], RecipientRequested):
                    return False
                return self._read_command() or (not self._unanswered and self._at_eof())

    def _at_eof(self) -> bool:
        if self._eof:
            self._end(CloseReason.CLIENT_DISCONNECT)
        return self._eof

    def _read_line(self, limit: int) -> bytes | None:
        """The next line without its CRLF, or None; a line that is too long is read off and answered here."""
        if not self._discarded:
            length = self._in.find_line(limit)
            if length > 0:
                return self._in.take(length)[:-2]
            if length == 0 or self._unanswered:
                return None  # a line that is too long is answered in its turn
            self._discard_limit = limit * _DISCARD_FACTOR
        discarded, is_whole = self._in.discard_line()
        self._discarded += discarded
        if self._discarded > self._discard_limit:
            self._send(replies.LINE_DISCARD_EXCEEDED, None)
        elif is_whole:
            self._discarded = 0
            self._refuse_long_line()
        return None

    def _refuse_long_line(self) -> None:
        # RFC 4954 6 has 5.5.6 for lines of an AUTH exchange, as a SHOULD; one code for every line is easier to find.
        if self._phase is Phase.AUTHENTICATING:
            self._phase = Phase.READY
            self._fail_auth(replies.LINE_TOO_LONG)
        else:
            self._send(replies.LINE_TOO_LONG, "other")

    def _read_command(self) -> bool:
        had = len(self._in)
        if had == 0:
            return False
        if self._phase is Phase.CONNECTED and not self._discarded and self._is_mismatch():
            return True
        limits = self._policy.limits
        is_auth = self._in.peek(5).upper() == b"AUTH "
        line = self._read_line(limits.auth_line if is_auth else limits.command_line)
        if line is None:
            return self._phase is Phase.ENDING or len(self._in) != had
        command: Command | CommandRefused
        try:
            command = parse_command(line)
        except CommandRefused as refusal:
            command = refusal
        if self._unanswered and not self._joins_batch(command):
            self._held = command
            return False
        self._run(command)
        return True

    def _is_mismatch(self) -> bool:
        """End the session if TLS or HTTP is spoken where SMTP in clear is expected.

        A browser or a forged server-side request would speak so; its headers and body may hold SMTP commands.
        """
        if self._in.starts_with(_TLS_HANDSHAKE) or _HTTP_REQUEST.match(self._in.peek(8)):
            self._end(CloseReason.PROTOCOL_MISMATCH)
            return True
        return False

    def _joins_batch(self, command: Command | CommandRefused) -> bool:
        """Whether a command may be handed up beside unanswered recipients: only another acceptable recipient."""
        transaction = self._transaction
        return (
            isinstance(command, RcptTo)
            and transaction is not None
            and transaction.recipients + len(self._unanswered) < self._policy.limits.recipients
            and unsupported_recipient(command.recipient, transaction.mail, transaction.offer) is None
        )

    # Commands ----------------------------------------------------------------------------------------------------

    def _run(self, command: Command | CommandRefused) -> None:
        if isinstance(command, CommandRefused):
            self._run_refused(command)
            return
        verb = command.verb
        if self._policy.tls_required and not self._is_tls and verb not in _BEFORE_TLS:
            self._refuse(replies.TLS_REQUIRED, verb, command)
            return
        if verb in _JUNK and self._phase is not Phase.CONNECTED:
            self._junk += 1
            if self._junk > self._policy.limits.junk_commands:
                self._send(replies.TOO_MANY_JUNK_COMMANDS, verb)
                return
        if not is_legal(self._phase, verb):
            self._refuse(replies.BAD_SEQUENCE, verb, command)
            return
        match command:
            case Hello():
                self._run_hello(command)
            case MailFrom():
                self._run_mail(command)
            case RcptTo():
                self._run_rcpt(command)
            case Data():
                self._run_data()
            case Bdat():
                self._run_bdat(command)
            case Auth():
                self._run_auth(command)
            case StartTls():
                self._run_starttls()
            case Rset():
                self._reset(ResetCause.RSET)
                self._send(replies.OK, verb)
            case Noop():
                self._send(replies.OK, verb)
            case Vrfy():
                self._send(replies.CANNOT_VERIFY, verb)
            case Expn():
                self._send(replies.NOT_IMPLEMENTED, verb)
            case Help():
                self._send(replies.HELP, verb)
            case Quit():
                self._send(replies.CLOSING, verb)
            case _:
                assert_never(command)

    def _run_refused(self, refused: CommandRefused) -> None:
        if refused.verb is Verb.AUTH:
            self._announce_auth(None)
            self._fail_auth(refused.reply)
        elif refused.verb is Verb.BDAT and self._phase is Phase.CHUNKING:
            # How many octets follow is not known, so the message cannot go on.
            self._refuse_message(refused.reply, Verb.BDAT)
        else:
            self._send(refused.reply, refused.verb or "other")

    def _refuse(self, reply: Reply, verb: Verb, command: Command) -> None:
        """Refuse a command before it is looked at; what announces itself is announced, what follows it is read off."""
        match command:
            case Auth():
                self._announce_auth(command.mechanism)
                self._fail_auth(reply)
            case Bdat():
                self._read_off(command, replies.NO_VALID_RECIPIENTS if self._phase is Phase.MAIL else reply)
            case Data() if self._phase is Phase.MAIL:
                self._send(replies.NO_VALID_RECIPIENTS, verb)
            case Data() if self._phase is Phase.CHUNKING:
                # RFC 3030 2: DATA after BDAT is a 503 and leaves nothing that could go on.
                self._refuse_message(reply, verb)
            case _:
                self._send(reply, verb)

    def _run_hello(self, command: Hello) -> None:
        is_lmtp = self._policy.is_lmtp
        if (command.verb is Verb.LHLO) is not is_lmtp:
            # RFC 2033 4.1: LMTP has LHLO in place of HELO and EHLO.
            self._send(replies.UNKNOWN_COMMAND, command.verb)
            return
        if self._phase in IN_TRANSACTION:
            self._reset(ResetCause(command.verb.lower()))
        self._phase = Phase.READY
        self._events.append(HelloReceived(command.verb, command.name))
        if command.verb is Verb.HELO:
            self._send(replies.hello(self._policy.hostname), command.verb)
        else:
            self._send(self._ehlo(), command.verb)

    def _ehlo(self) -> Reply:
        self._told = self._own_offer()
        assert self._own is not None
        return self._own[2]

    def _own_offer(self) -> Offer:
        """What this session can be offered now: what lies behind, our limits, TLS and AUTH."""
        offer = self._offer()
        if self._own is None or self._own[0] is not offer:
            limits = self._policy.limits
            own = replace(
                offer,
                size=self._message_size_limit(),
                starttls=self._policy.tls_mode is TlsMode.STARTTLS and not self._is_tls,
                auth_mechanisms=self._offered_mechanisms(),
                require_tls=offer.require_tls and self._is_tls,
                limits={"MAILMAX": limits.messages_per_connection, "RCPTMAX": limits.recipients},
            )
            self._own = (offer, own, replies.hello(self._policy.hostname, keywords(own)))
        return self._own[1]

    def _offered_mechanisms(self) -> tuple[str, ...]:
        if self._is_tls or self._policy.auth_in_clear:
            return self._policy.auth_mechanisms
        return ()

    def _message_size_limit(self) -> int:
        own = self._policy.limits.message_size
        upstream = self._offer().size
        return own if upstream is None else min(own, upstream)

    def _run_mail(self, command: MailFrom) -> None:
        mail = command.mail
        if self._policy.auth_required and not self._is_authenticated:
            self._send(replies.AUTH_REQUIRED, Verb.MAIL)
        elif self._messages >= self._policy.limits.messages_per_connection:
            self._send(replies.TOO_MANY_MESSAGES, Verb.MAIL)
        elif mail.size is not None and mail.size > self._message_size_limit():
            # RFC 1870 6.1: refused before a single octet of it is sent.
            self._send(replies.MESSAGE_TOO_BIG, Verb.MAIL)
        elif (refusal := unsupported(mail, self._told or self._own_offer())) is not None:
            # Held against what this session was told; whether the upstream still keeps it is asked above.
            self._send(refusal, Verb.MAIL)
        else:
            self._ask(MailRequested(mail))

    def _run_rcpt(self, command: RcptTo) -> None:
        assert self._transaction is not None
        if self._transaction.recipients >= self._policy.limits.recipients:
            self._send(replies.TOO_MANY_RECIPIENTS, Verb.RCPT)
        elif (
            refusal := unsupported_recipient(command.recipient, self._transaction.mail, self._transaction.offer)
        ) is not None:
            self._send(refusal, Verb.RCPT)
        else:
            self._ask(RecipientRequested(command.recipient))

    def _run_data(self) -> None:
        transaction = self._transaction
        assert transaction is not None
        if transaction.mail.body is Body.BINARY_MIME:
            # RFC 3030 3: binary content cannot be sent by DATA.
            self._send(replies.BAD_SEQUENCE, Verb.DATA)
            return
        transaction.dots = DotReader()
        self._begin_content(transaction)
        self._phase = Phase.CONTENT
        self._send(replies.SEND_CONTENT, Verb.DATA)

    def _run_bdat(self, command: Bdat) -> None:
        transaction = self._transaction
        assert transaction is not None
        octets = transaction.inspector.octets if transaction.inspector is not None else 0
        if octets + command.size > transaction.size_limit:
            if self._phase is Phase.CHUNKING:
                self._messages += 1
            self._drop_transaction(replies.MESSAGE_TOO_BIG)
            copies = self._final_replies(transaction) if command.last else 1
            self._read_off(command, replies.MESSAGE_TOO_BIG, copies=copies)
            return
        if transaction.chunks is None:
            transaction.chunks = ChunkReader(is_binary=transaction.mail.body is Body.BINARY_MIME)
            self._begin_content(transaction)
        self._chunk = _Chunk(command.size, is_last=command.last)
        self._phase = Phase.CONTENT

    def _begin_content(self, transaction: _Transaction) -> None:
        limits = self._policy.limits
        transaction.inspector = ContentInspector(limits.text_line)
        transaction.header = HeaderSplitter(limits.header_size, limits.header_lines)
        self._states.enter(ConnState.DATA, transaction=transaction.number, recipients=transaction.recipients)
        self._events.append(ContentStarted())

    def _read_off(self, command: Bdat, reply: Reply, *, copies: int = 1) -> None:
        """Refuse a BDAT, reading its octets off so that they are not run as commands (RFC 3030 2)."""
        if command.size > 2 * self._policy.limits.message_size:
            # Too much to read off: the session ends, or a client could hold it for as long as it liked.
            self._send(replace(replies.BAD_ARGUMENT, closes=True), Verb.BDAT)
            return
        self._chunk = _Chunk(command.size, is_last=command.last)
        self._chunk.refusal = _Refusal(reply, copies, self._phase)
        self._phase = Phase.CONTENT

    def _run_auth(self, command: Auth) -> None:
        self._announce_auth(command.mechanism)
        policy = self._policy
        if self._auth_failures >= policy.limits.auth_failures:
            self._send(replies.TOO_MANY_AUTH_FAILURES, Verb.AUTH)
        elif not policy.auth_mechanisms:
            self._fail_auth(replies.NOT_IMPLEMENTED)
        elif self._is_authenticated:
            self._fail_auth(replies.ALREADY_AUTHENTICATED)
        elif command.mechanism not in policy.auth_mechanisms:
            self._fail_auth(replies.UNKNOWN_MECHANISM)
        elif command.mechanism not in self._offered_mechanisms():
            self._fail_auth(replies.ENCRYPTION_REQUIRED)
        else:
            initial = command.initial_response
            # RFC 4954 4: "=" is an initial response of no octets.
            decoded = None if initial is None else b"" if initial == "=" else _decoded(initial.encode())
            if initial is not None and decoded is None:
                self._fail_auth(replies.BAD_BASE64)
            else:
                self._phase = Phase.AUTHENTICATING
                self._ask(AuthRequested(command.mechanism, decoded))

    def _announce_auth(self, mechanism: str | None) -> None:
        """Record Auth, before any check of the command; but not inside a transaction, where it is out of place."""
        if self._phase in (Phase.CONNECTED, Phase.READY):
            self._auth_mechanism = mechanism if mechanism in MECHANISMS else "other"
            self._states.enter(ConnState.AUTH, mechanism=self._auth_mechanism)

    def _fail_auth(self, reply: Reply) -> None:
        self._send(reply, Verb.AUTH)
        if self._states.level is ConnState.AUTH:
            self._states.fall_back(ConnState.ACTIVE)

    def _read_auth_line(self) -> bool:
        if self._unanswered:
            return False
        had = len(self._in)
        line = self._read_line(self._policy.limits.auth_line) if had else None
        if line is None:
            return self._phase is not Phase.AUTHENTICATING or len(self._in) != had
        if line == b"*":
            # RFC 4954 4: the client cancels.
            self._phase = Phase.READY
            self._fail_auth(replies.AUTH_CANCELLED)
        elif (response := _decoded(line)) is None:
            self._phase = Phase.READY
            self._fail_auth(replies.BAD_BASE64)
        else:
            self._ask(AuthResponded(response))
        return True

    def _run_starttls(self) -> None:
        if self._is_tls:
            self._send(replies.TLS_ALREADY_ON, Verb.STARTTLS)
        elif self._policy.tls_mode is not TlsMode.STARTTLS:
            self._send(replies.NOT_IMPLEMENTED, Verb.STARTTLS)
        else:
            # Octets behind it are looked for when it is answered: that is the last moment at which they may come.
            self._ask(TlsRequested())

    # Content -----------------------------------------------------------------------------------------------------

    def _read_content(self) -> bool:
        if self._unanswered:
            return False
        if self._chunk is not None:
            return self._read_chunk(self._chunk)
        if not len(self._in):
            return False
        transaction = self._transaction
        assert transaction is not None
        assert transaction.dots is not None
        dots = transaction.dots
        self._take_content(transaction, dots.feed(self._in.take(len(self._in))))
        assert transaction.inspector is not None
        if transaction.inspector.octets > 2 * transaction.size_limit:
            # The rest is read off within a bound; then the connection ends, or one client could send for ever.
            self._refuse_message(replace(replies.MESSAGE_TOO_BIG, closes=True), Verb.DATA)
        elif dots.is_ended:
            self._in.give_back(dots.rest)
            self._finish_content(transaction)
        return True

    def _read_chunk(self, chunk: _Chunk) -> bool:
        data = self._in.take(chunk.remaining)
        chunk.remaining -= len(data)
        if chunk.refusal is None:
            transaction = self._transaction
            assert transaction is not None
            assert transaction.chunks is not None
            if data:
                self._take_content(transaction, transaction.chunks.feed(data))
            if chunk.remaining == 0:
                self._end_chunk(chunk, transaction, transaction.chunks)
                return True
        elif chunk.remaining == 0:
            self._end_refused_chunk(chunk.refusal)
            return True
        return bool(data)

    def _end_chunk(self, chunk: _Chunk, transaction: _Transaction, chunks: ChunkReader) -> None:
        self._chunk = None
        if chunk.is_last:
            self._take_content(transaction, chunks.finish())
            self._finish_content(transaction)
        elif (refusal := self._content_refusal(transaction)) is not None:
            self._refuse_message(refusal, Verb.BDAT)
        else:
            self._phase = Phase.CHUNKING
            self._send(replies.chunk_received(chunk.size), Verb.BDAT)

    def _end_refused_chunk(self, refusal: _Refusal) -> None:
        self._chunk = None
        self._phase = refusal.phase
        for _ in range(refusal.copies):
            self._send(refusal.reply, Verb.BDAT)
        if self._states.level is ConnState.DATA and self._transaction is None:
            self._settle()

    def _take_content(self, transaction: _Transaction, content: bytes) -> None:
        if not content:
            return
        inspector, header = transaction.inspector, transaction.header
        assert inspector is not None
        assert header is not None
        inspector.inspect(content)
        if inspector.octets > transaction.size_limit:
            return  # refused at its end; handing up more would only fill a disk
        body = header.feed(content)
        self._hand_up(transaction, header.block, body)

    def _hand_up(self, transaction: _Transaction, block: bytes | None, body: bytes) -> None:
        if transaction.facts is None and block is not None:
            transaction.facts = inspect_header(block)
            self._events.append(HeaderReceived(block, transaction.facts))
        if body:
            self._events.append(ContentReceived(body))

    def _content_refusal(self, transaction: _Transaction) -> Reply | None:
        """What is wrong with the content so far, in a fixed order: the verdict must not depend on cuts."""
        inspector, header = transaction.inspector, transaction.header
        assert inspector is not None
        assert header is not None
        is_binary = transaction.mail.body is Body.BINARY_MIME
        has_bare_line_ends = (transaction.dots or transaction.chunks or DotReader()).bare_line_ends
        if inspector.octets > transaction.size_limit:
            return replies.MESSAGE_TOO_BIG
        if inspector.has_nul and not is_binary:
            return replies.NUL_IN_CONTENT
        if has_bare_line_ends and self._policy.rejects_bare_line_ends:
            return replies.BARE_LINE_END
        if inspector.has_long_line and not is_binary:
            return replies.LINE_IN_CONTENT_TOO_LONG
        if header.is_too_big:
            return replies.HEADER_TOO_BIG
        if transaction.facts is not None and transaction.facts.hops > self._policy.limits.hops:
            return replies.TOO_MANY_HOPS
        return None

    def _finish_content(self, transaction: _Transaction) -> None:
        inspector, header = transaction.inspector, transaction.header
        assert inspector is not None
        assert header is not None
        if header.block is None and inspector.octets <= transaction.size_limit:
            body = header.finish()
            self._hand_up(transaction, header.block, body)
        refusal = self._content_refusal(transaction)
        if refusal is not None:
            self._refuse_message(refusal, self._content_verb(), copies=self._final_replies(transaction))
        else:
            self._ask(ContentEnded(inspector.octets))

    def _refuse_message(self, reply: Reply, verb: Verb, *, copies: int = 1) -> None:
        """Refuse the message that is being received: Error, then Idle."""
        self._messages += 1
        self._drop_transaction(reply)
        for _ in range(copies):
            self._send(reply, verb)
        self._settle()

    def _final_replies(self, transaction: _Transaction) -> int:
        """How many replies answer the end of the content: one for each recipient over LMTP (RFC 2033 4.2, 4.3)."""
        return transaction.recipients if self._policy.is_lmtp else 1

    def _content_verb(self) -> Verb:
        return Verb.BDAT if self._transaction is not None and self._transaction.chunks is not None else Verb.DATA

    # Ends --------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """A transaction has ended with the final reply to its message: the connection is Idle."""
        if self._phase is not Phase.ENDING:
            self._junk = 0
            self._states.enter(ConnState.IDLE, messages=self._messages)

    def _reset(self, cause: ResetCause) -> None:
        self._drop_transaction(None)
        self._states.enter(ConnState.RESET, cause=cause)
        self._states.enter(ConnState.ACTIVE)

    def _end_transaction(self) -> None:
        """Replace, never edit: nothing of a transaction survives its end (21 years of that bug elsewhere)."""
        self._transaction = None
        self._chunk = None
        if self._phase in IN_TRANSACTION:
            self._phase = Phase.READY

    def _drop_transaction(self, reply: Reply | None) -> None:
        if self._transaction is not None:
            self._end_transaction()
            self._events.append(TransactionAborted(reply))

    def _end(self, reason: CloseReason) -> None:
        if self._phase is not Phase.ENDING:
            self._drop_transaction(None)
            self._unanswered.clear()
            self._held = None
            self._in.clear()
            self._phase = Phase.ENDING
            self._reason = reason

    def _ask(self, event: Event) -> None:
        self._unanswered.append(event)
        self._events.append(event)

    def _send(self, reply: Reply, verb: str | None) -> None:
        """Write a reply: the one place where Error is raised (states.md)."""
        if self._phase is Phase.ENDING:
            return
        if reply.code >= 400:
            reply = self._count_error(reply)
            self._states.enter(
                ConnState.ERROR,
                verb=verb,
                reply_code=reply.code,
                enhanced_code=str(reply.enhanced) if reply.enhanced is not None else None,
                error_type=reply.error_type,
            )
        if self._on_reply is not None:
            self._on_reply(verb, reply)
        self._out.append(reply.wire)
        if reply.closes or reply.code == 421:
            # RFC 5321 3.8: a server closes after 421.
            self._end(_CLOSE_REASONS.get(reply, CloseReason.REFUSED))

    def _count_error(self, reply: Reply) -> Reply:
        if reply.error_type in _CLIENT_FAULTS and not reply.closes:
            self._errors += 1
            if self._errors > self._policy.limits.errors:
                return replies.TOO_MANY_ERRORS
        return reply


def _decoded(text: bytes) -> bytes | None:
    try:
        return decode_base64(text)
    except SaslError:
        return None
