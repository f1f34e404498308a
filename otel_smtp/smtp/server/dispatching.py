"""Commands of a server session: whether a command may run now, running it, and the envelope."""

import re
from collections.abc import Sequence
from typing import Final

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import (
    COMMON_LINES,
    Auth,
    Bdat,
    Command,
    CommandRefused,
    Data,
    DomainMissing,
    Hello,
    MailFrom,
    RcptTo,
    Rset,
    StartTls,
    Verb,
    common_mail,
    common_recipient,
    parse_by_grammar,
)
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.extensions import WITHOUT_PARAMETERS, unsupported, unsupported_recipient
from otel_smtp.smtp.handler import Asked
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.sequence import IN_TRANSACTION, SEQUENCE, Phase
from otel_smtp.smtp.server.receiving import Receiving
from otel_smtp.smtp.server.replying import OpenTransaction
from otel_smtp.smtp.states import (
    CloseReason,
    ConnState,
    ResetCause,
)

# The end of an HTTP request line of any method (RFC 9112 3).
_HTTP_REQUEST_LINE: Final = re.compile(rb" HTTP/[0-9](?:\.[0-9])?\r\n\Z", re.IGNORECASE)

# RFC 3207 4: the commands that are allowed while TLS is required and not on.
_BEFORE_TLS: Final = frozenset({Verb.NOOP, Verb.EHLO, Verb.LHLO, Verb.STARTTLS, Verb.QUIT})
# Commands that move no mail; a session with nothing else wastes a slot.
_HELLOS: Final = frozenset({Verb.EHLO, Verb.HELO, Verb.LHLO})
_JUNK: Final = frozenset({Verb.NOOP, Verb.RSET, Verb.VRFY, Verb.EXPN, Verb.HELP}) | _HELLOS
# Commands that only get an answer.
_ANSWERS: Final = {
    Verb.NOOP: replies.OK,
    Verb.VRFY: replies.CANNOT_VERIFY,
    Verb.EXPN: replies.NOT_IMPLEMENTED,
    Verb.HELP: replies.HELP,
    Verb.QUIT: replies.CLOSING,
}

_ACTIVE: Final = ConnState.ACTIVE
_MAIL: Final = Phase.MAIL
_MAIL_ASKED: Final = Asked.MAIL
_MAIL_VERB: Final = Verb.MAIL
_NOTHING: Final = Asked.NOTHING
_RCPT: Final = Verb.RCPT
_SENDER_OK: Final = replies.SENDER_OK
_MAIL_OK: Final = (_MAIL_VERB, _SENDER_OK)
_READY: Final = Phase.READY
_RECIPIENTS: Final = Phase.RECIPIENTS


class Dispatching(Receiving):
    """A session that runs commands."""

    __slots__ = ()

    def _run_line(self, line: bytes) -> None:
        """Run one command line, its CRLF included."""
        phase = self.phase
        command: Command | CommandRefused
        if (common := COMMON_LINES.get(line)) is not None:
            self._run(common)
            return
        if phase is _RECIPIENTS or phase is _MAIL:
            recipient = common_recipient(line)
            if recipient is not None:
                self._add_recipient(recipient)  # which uses no extension
                return
        elif phase is _READY and (self.is_tls or not self._policy.tls_required):
            mail = common_mail(line)
            if mail is not None:
                self._run_mail(mail)
                return
        try:
            command = parse_by_grammar(line[:-2])
        except CommandRefused as refusal:
            if phase is Phase.CONNECTED and is_http_request_line(line):
                self._end(CloseReason.PROTOCOL_MISMATCH)  # of an unknown method: its body may hold commands
                return
            command = self._completed(refusal) if self._policy.default_domain else refusal
        self._run(command)

    def _completed(self, refused: CommandRefused) -> Command | CommandRefused:
        """The command completed with our default domain, if that is all it lacks."""
        if not isinstance(refused, DomainMissing):
            return refused
        try:
            return refused.with_domain(self._policy.default_domain)
        except CommandRefused as refusal:
            return refusal

    def _run(self, command: Command | CommandRefused) -> None:
        if self._batch and not (isinstance(command, Command) and command.verb is Verb.RCPT):
            self._held = command  # in its turn: earlier commands must be answered first
            return
        if isinstance(command, CommandRefused):
            self._run_refused(command)
            return
        verb = command.verb
        if self._policy.tls_required and not self.is_tls and verb not in _BEFORE_TLS:
            self._refuse(replies.TLS_REQUIRED, verb, command)
            return
        if verb in _JUNK and (self.phase is not Phase.CONNECTED or verb not in _HELLOS) and not self._count_junk(verb):
            return
        if verb not in SEQUENCE[self.phase]:
            self._refuse(replies.BAD_SEQUENCE, verb, command)
            return
        match command:
            case Data():
                self._run_data()
            case MailFrom():
                self._run_mail(command.mail)
            case RcptTo():
                self._run_rcpt(command)
            case Hello():
                self._run_hello(command)
            case Bdat():
                self._run_bdat(command)
            case Auth():
                self._run_auth(command)
            case StartTls():
                self._run_starttls(command)
            case Rset():
                self._run_rset(command)
            case _:
                self._send(_ANSWERS[verb], verb)

    def _run_refused(self, refused: CommandRefused) -> None:
        if refused.verb is Verb.AUTH:
            self._announce_auth(None)
            self._fail_auth(refused.reply)
        elif refused.verb is Verb.BDAT and self.phase is Phase.CHUNKING:
            # The length of the chunk is unknown, so the message cannot continue.
            self._refuse_message(refused.reply, Verb.BDAT)
        else:
            self._send(refused.reply, refused.verb or "other")

    def _refuse(self, reply: Reply, verb: Verb, command: Command) -> None:
        """Refuse a command before it runs. Its state is still recorded, and octets that follow it are read off."""
        match command:
            case Auth():
                self._announce_auth(command.mechanism)
                self._fail_auth(reply)
            case Bdat():
                self._read_off(command, replies.NO_VALID_RECIPIENTS if self.phase is Phase.MAIL else reply)
            case Data() if self.phase is Phase.MAIL:
                self._send(replies.NO_VALID_RECIPIENTS, verb)
            case Data() if self.phase is Phase.CHUNKING:
                # RFC 3030 2: DATA after BDAT gets 503 and ends the transaction.
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
            self._say(self._told.said)

    def _run_mail(self, mail: Mail) -> None:
        policy, told, behind = self._policy, self._told, self._offer()
        # A mail is judged by what this session was offered; the handler checks whether the upstream still offers it.
        # Its size is checked against the upstream's current limit.
        now = told if told is not None and told.behind is behind else policy.own_offer(behind, is_tls=self.is_tls)
        offer = now.offer if told is None else told.offer
        size_limit = now.size_limit
        if policy.auth_required and not self.is_authenticated:
            self._send(replies.AUTH_REQUIRED, Verb.MAIL)
        elif (most := policy.limits.messages_per_connection) is not None and self.messages >= most:
            self._send(replies.TOO_MANY_MESSAGES, Verb.MAIL)
        elif mail.size is not None and mail.size > size_limit:
            # RFC 1870 6.1: refused before a single octet of it is sent.
            self._send(replies.MESSAGE_TOO_BIG, Verb.MAIL)
        elif mail[1:] != WITHOUT_PARAMETERS and (refusal := unsupported(mail, offer)) is not None:
            self._send(refusal, Verb.MAIL)
        else:
            self._mail = OpenTransaction(mail, self.transactions + 1, offer, size_limit)
            self.asked = _MAIL_ASKED
            decided = self._handler.mail_requested(mail)
            if decided is not None and self.asked is _MAIL_ASKED:
                self.asked = _NOTHING
                self._answer_mail(decided)

    def _run_rcpt(self, command: RcptTo) -> None:
        transaction = self._transaction
        assert transaction is not None
        refusal = unsupported_recipient(command.recipient, transaction.mail, transaction.offer)
        if refusal is None:
            self._add_recipient(command.recipient)
        elif self._batch:
            self._held = command  # in its turn
        else:
            self._refuse_recipient(command.recipient, refusal)

    def _add_recipient(self, recipient: Recipient) -> None:
        transaction = self._transaction
        assert transaction is not None
        if transaction.recipients + len(self._batch) < self._policy.limits.recipients:
            if self._batch:
                self._batch.append(recipient)
            else:
                self._batch = [recipient]
        elif self._batch:
            # In its turn, and judged again then: earlier recipients may be refused.
            self._held = RcptTo(recipient)
        else:
            self._refuse_recipient(recipient, replies.TOO_MANY_RECIPIENTS)

    def _refuse_recipient(self, recipient: Recipient, reply: Reply) -> None:
        self._handler.recipient_refused(recipient, reply)
        self._send(reply, Verb.RCPT)

    def _ask_recipients(self) -> None:
        self.asked = Asked.RECIPIENTS
        self._handler.recipients_requested(self._batch)

    def _run_rset(self, command: Rset) -> None:
        self._reset(ResetCause.RSET)
        self._send(replies.OK, Verb.RSET)

    def _answer_mail(self, reply: Reply) -> None:
        transaction, self._mail = self._mail, None
        if reply.code >= 300:
            self._send(reply, Verb.MAIL)
            return
        assert transaction is not None
        self.transactions += 1
        self._transaction = transaction
        self.phase = _MAIL
        self.enter(_ACTIVE)  # recorded only if the level was Idle
        self.said.append(_MAIL_OK if reply is _SENDER_OK else (_MAIL_VERB, reply))
        self.out += reply.wire

    def _answer_recipients(self, decided: Sequence[Reply]) -> None:
        if len(decided) != len(self._batch):
            raise LocalProtocolError("not as many replies as recipients")
        self._batch = ()
        transaction = self._transaction
        if transaction is not None and len(decided) == 1:
            reply = decided[0]
            if reply.code == 250 and reply.enhanced is not None:
                # The same as below, for most recipients.
                transaction.recipients += 1
                self.phase = _RECIPIENTS
                self.said.append((_RCPT, reply))
                self.out += reply.wire
                return
        wires = []  # a thousand recipients' replies are joined once
        for reply in decided:
            if reply.code < 300 and (transaction := self._transaction) is not None:
                transaction.recipients += 1
                self.phase = _RECIPIENTS
                if reply.code == 250 and reply.enhanced is not None:
                    self.said.append((_RCPT, reply))
                    wires.append(reply.wire)
                    continue
                if reply.code > 251:
                    reply = reply.as_plain_success()
            self.out += b"".join(wires)
            wires.clear()
            self._send(reply, _RCPT)
        self.out += b"".join(wires)


def is_http_request_line(end: bytes) -> bool:
    """Whether a line with this end is an HTTP request line.

    Args:
        end: at least the last `LINE_TAIL_OCTETS`, CRLF included.
    """
    return _HTTP_REQUEST_LINE.search(end) is not None
