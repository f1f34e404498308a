"""ServerProtocol: the server side of a session, from octets to decisions and from replies to octets.

How it is driven::

    protocol = ServerProtocol(policy, handler, ...)
    protocol.accepted(TlsMode.OFF)          # New
    protocol.greet()                        # Active, 220
    protocol.receive_data(octets)           # runs what they hold, as far as it goes; calls the handler on the way
    protocol.reply(...)                     # the handler's decision, within its call or later; runs on from there
    write(protocol.data_to_send())          # after each of these calls; then close, once `close_reason` is set
    protocol.closed(reason)                 # Closed, once, whatever happened

What the engine promises:

* It answers by itself all that needs no decision: syntax, order, limits, EHLO, NOOP, and so on. What needs one is asked
  of the `Handler`; until it is made nothing further is run.
* Replies leave in the order of their commands. Recipients of a pipelined group are asked about together.
* `_send` is the one place where a reply is written, so it is the one place where Error is raised; every state is
  recorded inside the call that decides the reply, before `data_to_send` can give its octets.
* A transaction is one object, made at MAIL and dropped at its end: nothing of it can reach the next.
* Cutting the input differently changes neither what the handler is asked nor replies nor states. (Recipients may be
  asked about one by one. Where content is refused, what is handed up of it before its end may be less or more.)

Most commands come alone, as one line in one piece, with nothing else to be read. They and content that comes in one
piece do not pass through the receive buffer; what `receive_data` does with them is what `run` would do.
"""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import (
    Auth,
    Bdat,
    Command,
    CommandRefused,
    Data,
    Hello,
    MailFrom,
    RcptTo,
    Rset,
    StartTls,
    Verb,
    common_mail,
    common_recipient,
    parse_command,
    parse_other,
)
from otel_smtp.smtp.content import IncomingContent
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.extensions import Offer, unsupported, unsupported_recipient
from otel_smtp.smtp.framing import ReceiveBuffer
from otel_smtp.smtp.handler import Asked, Handler, Said
from otel_smtp.smtp.policy import OwnOffer, ServerPolicy
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.sasl import MECHANISMS, SaslError, decode_base64
from otel_smtp.smtp.sequence import IN_TRANSACTION, SEQUENCE, Phase
from otel_smtp.smtp.states import (
    AuthBegun,
    CloseReason,
    ConnectionOver,
    ConnState,
    ContentBegun,
    ErrorReply,
    IllegalTransition,
    Recorded,
    ResetBy,
    ResetCause,
    StateMachine,
    TlsAgreed,
    TlsMode,
    TlsOffer,
    TransactionOver,
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
_HTTP_REQUEST: Final = re.compile(rb"(?:GET|HEAD|POST|PUT|DELETE|CONNECT|OPTIONS|TRACE|PATCH|PRI) ", re.IGNORECASE)
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
_NO_INPUT: Final = frozenset({Phase.HANDSHAKE, Phase.UNGREETED, Phase.ENDING})
# A lone command line is run at once in these. Not before the first EHLO: there TLS and HTTP are looked for.
_QUICK: Final = frozenset({Phase.READY, Phase.MAIL, Phase.RECIPIENTS})


class _Transaction:
    """One mail transaction, from the accepted MAIL to its end."""

    __slots__ = ("content", "mail", "number", "offer", "recipients", "size_limit")

    def __init__(self, mail: Mail, number: int, offer: Offer, size_limit: int) -> None:
        self.mail = mail
        self.offer = offer
        self.number = number
        self.size_limit = size_limit
        self.recipients = 0  # accepted
        self.content: IncomingContent | None = None


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
        handler: who decides.
        offer: what content and envelope extensions can be promised now; asked at each EHLO and MAIL, and cheapest if
            the same object comes back while nothing has changed. Its `starttls` and `auth_mechanisms` are ignored:
            those are the engine's own.
        recorded: takes each transition; see `StateMachine`.
        said: takes each reply, before it becomes visible in `data_to_send`.
        on_illegal: see `StateMachine`.

    Attributes:
        phase: of the session.
        states: the states of the connection. The driver sets `states.now_ns` before it calls.
        said: see above; may be exchanged at any time.
        is_tls, is_authenticated: whether TLS is on; whether AUTH has succeeded.
        messages: that got their final reply on this connection. `transactions`: begun on it.
        errors: replies of 400 and above, and a failed handshake.
        close_reason: why the session ends; None while it goes on.
        asked: what the handler was asked and has not answered: nothing is run until it does.
        received: octets that have not been run yet.
        out: the replies that have not been taken by `data_to_send`.
        wants_turn: commands are left to be run, and other connections come first: call `run` soon.

    Holds at most one line (12 KiB), what one `receive_data` call brought, and one header block (256 KiB).
    """

    __slots__ = (
        "_auth_failures",
        "_auth_mechanism",
        "_batch",
        "_chunk",
        "_discard_limit",
        "_discarded",
        "_eof",
        "_faults",
        "_handler",
        "_held",
        "_is_running",
        "_junk",
        "_mail",
        "_offer",
        "_policy",
        "_told",
        "_transaction",
        "asked",
        "close_reason",
        "errors",
        "is_authenticated",
        "is_tls",
        "messages",
        "out",
        "phase",
        "received",
        "said",
        "states",
        "transactions",
        "wants_turn",
    )

    def __init__(
        self,
        policy: ServerPolicy,
        handler: Handler,
        *,
        offer: Callable[[], Offer],
        recorded: Recorded,
        said: Said,
        on_illegal: Callable[[IllegalTransition], None] = raise_illegal,
    ) -> None:
        self._policy = policy
        self._handler = handler
        self._offer = offer
        self.states = StateMachine(recorded, on_illegal)
        self.said = said
        self.phase = Phase.UNGREETED
        self.is_tls = False
        self.is_authenticated = False
        self.messages = 0
        self.transactions = 0
        self.errors = 0
        self.close_reason: CloseReason | None = None
        self.wants_turn = False
        self.received = ReceiveBuffer()
        self.out: list[bytes] = []
        self.asked = Asked.NOTHING
        self._mail: _Transaction | None = None  # that was asked about
        self._batch: list[Recipient] = []  # to be asked about, or asked about
        self._held: Command | CommandRefused | None = None  # parsed; waits for the answer to the batch
        self._transaction: _Transaction | None = None
        self._chunk: _Chunk | None = None
        self._discarded = 0  # octets of a line that is too long, so far; 0: not discarding
        self._discard_limit = 0
        self._auth_mechanism = "other"
        self._auth_failures = 0
        self._faults = 0  # of the client's own doing
        self._junk = 0
        self._eof = False
        self._is_running = False
        self._told: OwnOffer | None = None  # what the last EHLO of this session offered

    # What the driver tells -------------------------------------------------------------------------------------

    def accepted(self, tls_mode: TlsMode) -> None:
        """Record New: the socket has been accepted."""
        self.states.enter(ConnState.NEW, TlsOffer(tls_mode))

    def refuse(self, reply: Reply) -> None:
        """Answer the connection itself with `reply` (capacity, access) instead of greeting it."""
        self._send(reply, None)
        self._end(_CLOSE_REASONS.get(reply, CloseReason.REFUSED))

    def greet(self) -> None:
        """Open the session with 220; a client that spoke first is refused (RFC 5321 4.3.1: the sender waits)."""
        if self.received.held and not self._is_mismatch():
            self._send(replies.EARLY_TALKER, None)
        if self.phase is not Phase.ENDING:
            self.phase = Phase.CONNECTED
            self.states.enter(ConnState.ACTIVE)
            self._send(
                replies.greeting(self._policy.hostname, protocol="LMTP" if self._policy.is_lmtp else "ESMTP"), None
            )
            self.run()

    def receive_data(self, data: bytes) -> None:
        """Take octets from the peer, and run what they hold.

        Raises:
            LocalProtocolError: called after `receive_eof`.
        """
        if self._eof:
            raise LocalProtocolError("receive_data after receive_eof")
        held = self.received.held
        if not held and self.asked is Asked.NOTHING and not self._discarded:
            phase = self.phase
            if phase in _QUICK:
                length = len(data)
                if 2 <= length <= self._policy.quick_octets and data.find(b"\r\n") == length - 2:
                    self._is_running = True
                    try:
                        self._run_line(data[:-2])
                        if self._batch and self.asked is Asked.NOTHING:
                            self._ask_recipients()
                    finally:
                        self._is_running = False
                    if self._chunk is not None:
                        self.run()  # it may have no octets
                    return
            elif phase is Phase.CONTENT and self._chunk is None:
                self._is_running = True
                try:
                    self._take_content(data)
                finally:
                    self._is_running = False
                if self.received.held:
                    self.run()
                return
        self.received.feed(data)
        self.run()

    def receive_eof(self) -> None:
        """The peer will send no more. What it sent before is still answered."""
        self._eof = True
        self.run()

    def handshake_begins(self) -> None:
        """Record StartTLS for implicit TLS, before the handshake."""
        self.phase = Phase.HANDSHAKE
        self.states.enter(ConnState.STARTTLS, TlsOffer(TlsMode.IMPLICIT))

    def tls_started(self, version: str, cipher: str) -> None:
        """The handshake is done: the session starts over, and nothing said in clear counts any more (RFC 3207 4.2)."""
        if self.phase is not Phase.HANDSHAKE:
            raise LocalProtocolError("tls_started without a handshake")
        self.received.clear()
        self.is_tls = True
        self.is_authenticated = False  # somebody in the middle may have said it
        self._told = None
        self.phase = Phase.CONNECTED if self._policy.tls_mode is TlsMode.STARTTLS else Phase.UNGREETED
        self.states.enter(ConnState.ACTIVE, TlsAgreed(version, cipher))

    def tls_failed(self) -> None:
        """The handshake failed; no reply is possible. The connection ends."""
        self.errors += 1
        self.states.enter(ConnState.ERROR, ErrorReply(None, None, ErrorType.TLS, None))
        self._end(CloseReason.TLS_FAILURE)

    def fail(self, reply: Reply | None, reason: CloseReason) -> None:
        """End the session from outside: a deadline, the shutdown, a bug of ours. `reply` is said first, if given."""
        if self.phase is Phase.ENDING:
            return
        self._forget_questions()
        if reply is not None and self.phase is not Phase.HANDSHAKE:
            self._send(reply, None)
        self._end(reason)

    def closed(self, reason: CloseReason) -> None:
        """Record Closed: the transport is gone. `reason` holds unless the session had already found its own end."""
        if self.states.level is not ConnState.CLOSED:
            self._end(reason)
            assert self.close_reason is not None
            self.states.enter(ConnState.CLOSED, ConnectionOver(self.close_reason, self.messages))

    # What the driver reads -------------------------------------------------------------------------------------

    @property
    def awaits_content(self) -> bool:
        """Whether octets of content are read next: the deadline of DATA holds, not that of commands."""
        return self.phase is Phase.CONTENT

    @property
    def is_in_transaction(self) -> bool:
        """Whether a transaction is open, or a decision is awaited: not a moment to end the session."""
        return self._transaction is not None or self.asked is not Asked.NOTHING

    def data_to_send(self) -> bytes:
        """Take what is in `out`, in one piece."""
        data = b"".join(self.out)
        self.out.clear()
        return data

    # Decisions from above ----------------------------------------------------------------------------------------

    def reply(self, *decided: Reply) -> None:
        """Answer what was asked, and run on.

        Args:
            decided: one reply; for recipients one each, in order; for content over LMTP one for each accepted
                recipient (RFC 2033 4.2).

        Raises:
            LocalProtocolError: nothing waits for an answer, or the replies are not as many as were asked for.
        """
        if self.phase is Phase.ENDING:
            return  # the session was ended from outside while the decision was being made
        asked, self.asked = self.asked, Asked.NOTHING
        match asked:
            case Asked.RECIPIENTS:
                self._answer_recipients(decided)
            case Asked.MAIL:
                self._answer_mail(*decided)
            case Asked.CONTENT:
                self._answer_content(decided)
            case Asked.TLS:
                self._answer_starttls(*decided)
            case Asked.AUTH:
                self._answer_auth(*decided)
            case Asked.NOTHING:
                raise LocalProtocolError("a reply to nothing that was asked")
        if not self._is_running and (self.received.held or self._held is not None or self._eof):
            self.run()

    def challenge(self, data: bytes) -> None:
        """Go on with the AUTH exchange: 334 with `data`."""
        if self.phase is Phase.ENDING:
            return
        if self.asked is not Asked.AUTH:
            raise LocalProtocolError("challenge outside an AUTH exchange")
        self.asked = Asked.NOTHING
        self.phase = Phase.AUTHENTICATING
        self._send(replies.challenge(base64.b64encode(data).decode("ascii")), Verb.AUTH)
        self.run()

    def _answer_mail(self, reply: Reply) -> None:
        transaction, self._mail = self._mail, None
        if reply.code >= 300:
            self._send(reply, Verb.MAIL)
            return
        assert transaction is not None
        self.transactions += 1
        self._transaction = transaction
        self.phase = Phase.MAIL
        self.states.enter(ConnState.ACTIVE)  # recorded only where the level was Idle
        self._send(reply, Verb.MAIL)

    def _answer_recipients(self, decided: Sequence[Reply]) -> None:
        if len(decided) != len(self._batch):
            raise LocalProtocolError("not as many replies as recipients")
        self._batch = []
        for reply in decided:
            if reply.code < 300 and self._transaction is not None:
                self._transaction.recipients += 1
                self.phase = Phase.RECIPIENTS
            self._send(reply, Verb.RCPT)

    def _answer_starttls(self, reply: Reply) -> None:
        if self.received.held:
            # Octets behind STARTTLS would be run inside TLS as if the client had sent them there (CVE-2011-0411).
            self.received.clear()
            self._send(replies.OCTETS_BEHIND_STARTTLS, Verb.STARTTLS)
        elif reply.code != 220:
            self._send(reply, Verb.STARTTLS)
        else:
            self.phase = Phase.HANDSHAKE
            self.states.enter(ConnState.STARTTLS, TlsOffer(TlsMode.STARTTLS))
            self._send(reply, Verb.STARTTLS)

    def _answer_auth(self, reply: Reply) -> None:
        self.phase = Phase.READY
        if reply.code == 235:
            self.is_authenticated = True
            self.states.enter(ConnState.ACTIVE, AuthBegun(self._auth_mechanism))
            self._send(reply, Verb.AUTH)
        else:
            if reply.error_type is ErrorType.AUTH and reply.is_permanent:
                self._auth_failures += 1
            self._fail_auth(reply)

    def _answer_content(self, decided: Sequence[Reply]) -> None:
        transaction = self._transaction
        assert transaction is not None
        assert transaction.content is not None
        if len(decided) != (transaction.recipients if self._policy.is_lmtp else 1):
            raise LocalProtocolError("not as many replies as the content asks for")
        verb = Verb.DATA if transaction.content.by_data else Verb.BDAT
        self._end_transaction()
        self.messages += 1
        if decided[0].code < 400 or any(reply.is_positive for reply in decided):
            self.states.enter(ConnState.ACTIVE)
        for reply in decided:
            self._send(reply, verb)
        self._settle()

    # Reading -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run what has been received, as far as decisions and the budget of one turn allow. Called by the driver only
        where `wants_turn` says so."""
        if self._is_running:
            return  # a decision that was made within the call that asked for it: the loop below goes on
        self._is_running = True
        self.wants_turn = False
        left = self._policy.commands_per_turn
        try:
            while self.asked is Asked.NOTHING:
                if self._advance():
                    left -= 1
                    if left <= 0 and (self.received.held or self._held is not None):
                        self.wants_turn = True
                        return
                elif self._batch:
                    self._ask_recipients()
                elif self._eof and self.phase not in _NO_INPUT:
                    self._end(CloseReason.CLIENT_DISCONNECT)
                else:
                    return
        finally:
            self._is_running = False

    def _advance(self) -> bool:
        """Use up some input; whether anything changed."""
        if self._held is not None:
            if self._batch:
                return False
            held, self._held = self._held, None
            self._run(held)
            return True
        match self.phase:
            case Phase.CONTENT:
                return self._read_content()
            case Phase.AUTHENTICATING:
                return self._read_auth_line()
            case Phase.HANDSHAKE | Phase.UNGREETED | Phase.ENDING:
                return False
            case _:
                return self._read_command()

    def _read_line(self, limit: int) -> bytes | None:
        """The next line without its CRLF, or None; a line that is too long is read off and answered here."""
        if not self._discarded:
            length = self.received.find_line(limit)
            if length > 0:
                return self.received.take(length)[:-2]
            if length == 0 or self._batch:
                return None  # a line that is too long is answered in its turn
            self._discard_limit = limit * _DISCARD_FACTOR
        discarded, is_whole = self.received.discard_line()
        self._discarded += discarded
        if self._discarded > self._discard_limit:
            self._send(replies.LINE_DISCARD_EXCEEDED, None)
        elif is_whole:
            self._discarded = 0
            self._refuse_long_line()
        return None

    def _refuse_long_line(self) -> None:
        # RFC 4954 6 has 5.5.6 for lines of an AUTH exchange, as a SHOULD; one code for every line is easier to find.
        if self.phase is Phase.AUTHENTICATING:
            self.phase = Phase.READY
            self._fail_auth(replies.LINE_TOO_LONG)
        else:
            self._send(replies.LINE_TOO_LONG, "other")

    def _read_command(self) -> bool:
        had = len(self.received)
        if had == 0:
            return False
        if self.phase is Phase.CONNECTED and not self._discarded and self._is_mismatch():
            return True
        limits = self._policy.limits
        is_auth = self.received.peek(5).upper() == b"AUTH "
        line = self._read_line(limits.auth_line if is_auth else limits.command_line)
        if line is None:
            return self.phase is Phase.ENDING or len(self.received) != had
        self._run_line(line)
        return True

    def _is_mismatch(self) -> bool:
        """End the session if TLS or HTTP is spoken where SMTP in clear is expected.

        A browser or a forged server-side request would speak so; its headers and body may hold SMTP commands.
        """
        if self.received.starts_with(_TLS_HANDSHAKE) or _HTTP_REQUEST.match(self.received.peek(8)):
            self._end(CloseReason.PROTOCOL_MISMATCH)
            return True
        return False

    # Commands ----------------------------------------------------------------------------------------------------

    def _run_line(self, line: bytes) -> None:
        """Run one command line."""
        phase = self.phase
        parse: Callable[[bytes], Command] = parse_command
        if phase is Phase.RECIPIENTS or phase is Phase.MAIL:
            recipient = common_recipient(line)
            if recipient is not None:
                self._add_recipient(recipient)  # which uses no extension
                return
            if len(line) == 4:
                parse = parse_other  # DATA, mostly: there is no need to look for a MAIL first
        elif phase is Phase.READY and (self.is_tls or not self._policy.tls_required):
            mail = common_mail(line)
            if mail is not None:
                self._run_mail(mail)
                return
        command: Command | CommandRefused
        try:
            command = parse(line)
        except CommandRefused as refusal:
            command = refusal
        self._run(command)

    def _run(self, command: Command | CommandRefused) -> None:
        if self._batch and not (isinstance(command, Command) and command.verb is Verb.RCPT):
            self._held = command  # in its turn: what came before it must be answered first
            return
        if isinstance(command, CommandRefused):
            self._run_refused(command)
            return
        verb = command.verb
        if self._policy.tls_required and not self.is_tls and verb not in _BEFORE_TLS:
            self._refuse(replies.TLS_REQUIRED, verb, command)
            return
        if verb in _JUNK and self.phase is not Phase.CONNECTED:
            self._junk += 1
            if self._junk > self._policy.limits.junk_commands:
                self._send(replies.TOO_MANY_JUNK_COMMANDS, verb)
                return
        if verb not in SEQUENCE[self.phase]:
            self._refuse(replies.BAD_SEQUENCE, verb, command)
            return
        _RUN[verb](self, command)

    def _run_refused(self, refused: CommandRefused) -> None:
        if refused.verb is Verb.AUTH:
            self._announce_auth(None)
            self._fail_auth(refused.reply)
        elif refused.verb is Verb.BDAT and self.phase is Phase.CHUNKING:
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
                self._read_off(command, replies.NO_VALID_RECIPIENTS if self.phase is Phase.MAIL else reply)
            case Data() if self.phase is Phase.MAIL:
                self._send(replies.NO_VALID_RECIPIENTS, verb)
            case Data() if self.phase is Phase.CHUNKING:
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
        if self.phase in IN_TRANSACTION:
            self._reset(ResetCause(command.verb.lower()))
        self.phase = Phase.READY
        self._handler.hello_received(command.verb, command.name)
        if command.verb is Verb.HELO:
            self._send(replies.hello(self._policy.hostname), command.verb)
        else:
            self._told = self._policy.own_offer(self._offer(), is_tls=self.is_tls)
            self._send(self._told.reply, command.verb)

    def _run_mail_command(self, command: MailFrom) -> None:
        self._run_mail(command.mail)

    def _run_mail(self, mail: Mail) -> None:
        told, behind = self._told, self._offer()
        # A mail is held against what this session was told; whether the upstream still keeps it is asked above. Its
        # size is held against what the upstream takes now.
        now = told if told is not None and told.behind is behind else self._policy.own_offer(behind, is_tls=self.is_tls)
        offer = now.offer if told is None else told.offer
        size_limit = now.size_limit
        if self._policy.auth_required and not self.is_authenticated:
            self._send(replies.AUTH_REQUIRED, Verb.MAIL)
        elif self.messages >= self._policy.limits.messages_per_connection:
            self._send(replies.TOO_MANY_MESSAGES, Verb.MAIL)
        elif mail.size is not None and mail.size > size_limit:
            # RFC 1870 6.1: refused before a single octet of it is sent.
            self._send(replies.MESSAGE_TOO_BIG, Verb.MAIL)
        elif (refusal := unsupported(mail, offer)) is not None:
            self._send(refusal, Verb.MAIL)
        else:
            self._mail = _Transaction(mail, self.transactions + 1, offer, size_limit)
            self.asked = Asked.MAIL
            self._handler.mail_requested(mail)

    def _run_rcpt(self, command: RcptTo) -> None:
        transaction = self._transaction
        assert transaction is not None
        refusal = unsupported_recipient(command.recipient, transaction.mail, transaction.offer)
        if refusal is None:
            self._add_recipient(command.recipient)
        elif self._batch:
            self._held = command  # in its turn
        else:
            self._send(refusal, Verb.RCPT)

    def _add_recipient(self, recipient: Recipient) -> None:
        transaction = self._transaction
        assert transaction is not None
        if transaction.recipients + len(self._batch) < self._policy.limits.recipients:
            self._batch.append(recipient)
        elif self._batch:
            # In its turn, and judged again then: some of the recipients before it may be refused.
            self._held = RcptTo(recipient)
        else:
            self._send(replies.TOO_MANY_RECIPIENTS, Verb.RCPT)

    def _ask_recipients(self) -> None:
        self.asked = Asked.RECIPIENTS
        self._handler.recipients_requested(self._batch)

    def _run_data(self, command: Data) -> None:
        transaction = self._transaction
        assert transaction is not None
        if transaction.mail.body is Body.BINARY_MIME:
            # RFC 3030 3: binary content cannot be sent by DATA.
            self._send(replies.BAD_SEQUENCE, Verb.DATA)
            return
        self._begin_content(transaction, by_data=True)
        self.phase = Phase.CONTENT
        self._send(replies.SEND_CONTENT, Verb.DATA)

    def _run_bdat(self, command: Bdat) -> None:
        transaction = self._transaction
        assert transaction is not None
        octets = transaction.content.octets if transaction.content is not None else 0
        if octets + command.size > transaction.size_limit:
            if self.phase is Phase.CHUNKING:
                self.messages += 1
            self._drop_transaction(replies.MESSAGE_TOO_BIG)
            copies = self._final_replies(transaction) if command.last else 1
            self._read_off(command, replies.MESSAGE_TOO_BIG, copies=copies)
            return
        if transaction.content is None:
            self._begin_content(transaction, by_data=False)
        self._chunk = _Chunk(command.size, is_last=command.last)
        self.phase = Phase.CONTENT

    def _begin_content(self, transaction: _Transaction, *, by_data: bool) -> None:
        policy = self._policy
        transaction.content = IncomingContent(
            policy.content_limits,
            transaction.size_limit,
            self._handler,
            is_binary=transaction.mail.body is Body.BINARY_MIME,
            by_data=by_data,
        )
        self.states.enter(ConnState.DATA, ContentBegun(transaction.number, transaction.recipients))
        self._handler.content_begun()

    def _read_off(self, command: Bdat, reply: Reply, *, copies: int = 1) -> None:
        """Refuse a BDAT, reading its octets off so that they are not run as commands (RFC 3030 2)."""
        if command.size > 2 * self._policy.limits.message_size:
            # Too much to read off: the session ends, or a client could hold it for as long as it liked.
            self._send(replace(replies.BAD_ARGUMENT, closes=True), Verb.BDAT)
            return
        self._chunk = _Chunk(command.size, is_last=command.last)
        self._chunk.refusal = _Refusal(reply, copies, self.phase)
        self.phase = Phase.CONTENT

    def _run_auth(self, command: Auth) -> None:
        self._announce_auth(command.mechanism)
        policy = self._policy
        if self._auth_failures >= policy.limits.auth_failures:
            self._send(replies.TOO_MANY_AUTH_FAILURES, Verb.AUTH)
        elif not policy.auth_mechanisms:
            self._fail_auth(replies.NOT_IMPLEMENTED)
        elif self.is_authenticated:
            self._fail_auth(replies.ALREADY_AUTHENTICATED)
        elif command.mechanism not in policy.auth_mechanisms:
            self._fail_auth(replies.UNKNOWN_MECHANISM)
        elif command.mechanism not in policy.mechanisms(is_tls=self.is_tls):
            self._fail_auth(replies.ENCRYPTION_REQUIRED)
        else:
            initial = command.initial_response
            # RFC 4954 4: "=" is an initial response of no octets.
            decoded = None if initial is None else b"" if initial == "=" else _decoded(initial.encode())
            if initial is not None and decoded is None:
                self._fail_auth(replies.BAD_BASE64)
            else:
                self.phase = Phase.AUTHENTICATING
                self.asked = Asked.AUTH
                self._handler.auth_requested(command.mechanism, decoded)

    def _announce_auth(self, mechanism: str | None) -> None:
        """Record Auth, before any check of the command; but not inside a transaction, where it is out of place."""
        if self.phase in (Phase.CONNECTED, Phase.READY):
            self._auth_mechanism = mechanism if mechanism is not None and mechanism in MECHANISMS else "other"
            self.states.enter(ConnState.AUTH, AuthBegun(self._auth_mechanism))

    def _fail_auth(self, reply: Reply) -> None:
        self._send(reply, Verb.AUTH)
        if self.states.level is ConnState.AUTH:
            self.states.fall_back(ConnState.ACTIVE)

    def _read_auth_line(self) -> bool:
        had = len(self.received)
        line = self._read_line(self._policy.limits.auth_line) if had else None
        if line is None:
            return self.phase is not Phase.AUTHENTICATING or len(self.received) != had
        if line == b"*":
            # RFC 4954 4: the client cancels.
            self.phase = Phase.READY
            self._fail_auth(replies.AUTH_CANCELLED)
        elif (response := _decoded(line)) is None:
            self.phase = Phase.READY
            self._fail_auth(replies.BAD_BASE64)
        else:
            self.asked = Asked.AUTH
            self._handler.auth_responded(response)
        return True

    def _run_starttls(self, command: StartTls) -> None:
        if self.is_tls:
            self._send(replies.TLS_ALREADY_ON, Verb.STARTTLS)
        elif self._policy.tls_mode is not TlsMode.STARTTLS:
            self._send(replies.NOT_IMPLEMENTED, Verb.STARTTLS)
        else:
            # Octets behind it are looked for when it is answered: that is the last moment at which they may come.
            self.asked = Asked.TLS
            self._handler.tls_requested()

    def _run_rset(self, command: Rset) -> None:
        self._reset(ResetCause.RSET)
        self._send(replies.OK, Verb.RSET)

    # Content -----------------------------------------------------------------------------------------------------

    def _read_content(self) -> bool:
        if self._chunk is not None:
            return self._read_chunk(self._chunk)
        if not self.received.held:
            return False
        self._take_content(self.received.take(len(self.received)))
        return True

    def _take_content(self, data: bytes) -> None:
        """Take octets of DATA; those behind its end go (back) to the buffer."""
        transaction = self._transaction
        assert transaction is not None
        content = transaction.content
        assert content is not None
        content.feed(data)
        if content.octets > 2 * transaction.size_limit:
            # The rest is read off within a bound; then the connection ends, or one client could send for ever.
            self._refuse_message(replace(replies.MESSAGE_TOO_BIG, closes=True), Verb.DATA)
        elif content.is_ended:
            if content.rest:
                self.received.give_back(content.rest)
            self._finish_content(transaction, content)

    def _read_chunk(self, chunk: _Chunk) -> bool:
        data = self.received.take(chunk.remaining)
        chunk.remaining -= len(data)
        if chunk.refusal is None:
            transaction = self._transaction
            assert transaction is not None
            content = transaction.content
            assert content is not None
            if data:
                content.feed(data)
            if chunk.remaining == 0:
                self._end_chunk(chunk, transaction, content)
                return True
        elif chunk.remaining == 0:
            self._end_refused_chunk(chunk.refusal)
            return True
        return bool(data)

    def _end_chunk(self, chunk: _Chunk, transaction: _Transaction, content: IncomingContent) -> None:
        self._chunk = None
        if chunk.is_last:
            self._finish_content(transaction, content)
        elif (refusal := content.refusal()) is not None:
            self._refuse_message(refusal, Verb.BDAT)
        else:
            self.phase = Phase.CHUNKING
            self._send(replies.chunk_received(chunk.size), Verb.BDAT)

    def _end_refused_chunk(self, refusal: _Refusal) -> None:
        self._chunk = None
        self.phase = refusal.phase
        for _ in range(refusal.copies):
            self._send(refusal.reply, Verb.BDAT)
        if self.states.level is ConnState.DATA and self._transaction is None:
            self._settle()

    def _finish_content(self, transaction: _Transaction, content: IncomingContent) -> None:
        refusal = content.finish()
        if refusal is not None:
            self._refuse_message(refusal, self._content_verb(), copies=self._final_replies(transaction))
        else:
            self.asked = Asked.CONTENT
            self._handler.content_ended(content.octets)

    def _refuse_message(self, reply: Reply, verb: Verb, *, copies: int = 1) -> None:
        """Refuse the message that is being received: Error, then Idle."""
        self.messages += 1
        self._drop_transaction(reply)
        for _ in range(copies):
            self._send(reply, verb)
        self._settle()

    def _final_replies(self, transaction: _Transaction) -> int:
        """How many replies answer the end of the content: one for each recipient over LMTP (RFC 2033 4.2, 4.3)."""
        return transaction.recipients if self._policy.is_lmtp else 1

    def _content_verb(self) -> Verb:
        transaction = self._transaction
        is_chunked = transaction is not None and transaction.content is not None and not transaction.content.by_data
        return Verb.BDAT if is_chunked else Verb.DATA

    # Ends --------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """A transaction has ended with the final reply to its message: the connection is Idle."""
        if self.phase is not Phase.ENDING:
            self._junk = 0
            self.states.enter(ConnState.IDLE, TransactionOver(self.messages))

    def _reset(self, cause: ResetCause) -> None:
        self._drop_transaction(None)
        self.states.enter(ConnState.RESET, ResetBy(cause))
        self.states.enter(ConnState.ACTIVE)

    def _end_transaction(self) -> None:
        """Replace, never edit: nothing of a transaction survives its end (21 years of that bug elsewhere)."""
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
        self._batch = []
        self._held = None

    def _end(self, reason: CloseReason) -> None:
        if self.phase is not Phase.ENDING:
            self._forget_questions()
            self._drop_transaction(None)
            self.received.clear()
            self.phase = Phase.ENDING
            self.close_reason = reason

    def _send(self, reply: Reply, verb: str | None) -> None:
        """Write a reply: the one place where Error is raised."""
        if self.phase is Phase.ENDING:
            return
        if reply.code >= 400:
            reply = self._count_error(reply)
            transaction = self._transaction
            number = transaction.number if transaction is not None else None
            self.states.enter(ConnState.ERROR, ErrorReply(verb, reply, reply.error_type, number))
        self.said.append((verb, reply))
        self.out.append(reply.wire)
        if reply.closes or reply.code == 421:
            # RFC 5321 3.8: a server closes after 421.
            self._end(_CLOSE_REASONS.get(reply, CloseReason.REFUSED))

    def _count_error(self, reply: Reply) -> Reply:
        self.errors += 1
        if reply.error_type in _CLIENT_FAULTS and not reply.closes:
            self._faults += 1
            if self._faults > self._policy.limits.errors:
                return replies.TOO_MANY_ERRORS
        return reply


# What runs a command that is legal in its phase. The type of a command follows from its verb.
_RUN: Final[Mapping[Verb, Callable[[ServerProtocol, Any], None]]] = {
    Verb.HELO: ServerProtocol._run_hello,
    Verb.EHLO: ServerProtocol._run_hello,
    Verb.LHLO: ServerProtocol._run_hello,
    Verb.MAIL: ServerProtocol._run_mail_command,
    Verb.RCPT: ServerProtocol._run_rcpt,
    Verb.DATA: ServerProtocol._run_data,
    Verb.BDAT: ServerProtocol._run_bdat,
    Verb.AUTH: ServerProtocol._run_auth,
    Verb.STARTTLS: ServerProtocol._run_starttls,
    Verb.RSET: ServerProtocol._run_rset,
    Verb.NOOP: lambda session, _: session._send(replies.OK, Verb.NOOP),
    Verb.VRFY: lambda session, _: session._send(replies.CANNOT_VERIFY, Verb.VRFY),
    Verb.EXPN: lambda session, _: session._send(replies.NOT_IMPLEMENTED, Verb.EXPN),
    Verb.HELP: lambda session, _: session._send(replies.HELP, Verb.HELP),
    Verb.QUIT: lambda session, _: session._send(replies.CLOSING, Verb.QUIT),
}


def _decoded(text: bytes) -> bytes | None:
    try:
        return decode_base64(text)
    except SaslError:
        return None
