"""Drives a `ServerProtocol` without any I/O: octets in, cut anyhow; decisions by a script; everything recorded.

`EngineDriver` plays what stands around the engine: it answers the events that need a decision, at once or late. Its
`Record` checks what must hold for every byte stream whatever:

* a state is recorded before the reply that reveals it can be seen;
* Error is recorded exactly once for each reply >= 400, right before it, with its code and verb;
* every step is one of `LEGAL`: the engine's own check raises (it is not switched off here);
* every reply line is printable ASCII and fits into 512 octets (RFC 5321 4.5.3.1.5);
* content comes only within a transaction that has an accepted MAIL and RCPT of its own, and without NUL and bare line
  ends unless it was declared binary;
* no text of a state is the client's, and no `repr` of an event shows an argument of AUTH.
"""

import base64
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import Verb
from otel_smtp.smtp.envelope import Body, Mail, Notify, Recipient
from otel_smtp.smtp.framing import has_bare_line_end
from otel_smtp.smtp.policy import ServerLimits, ServerPolicy
from otel_smtp.smtp.received import HeaderFacts
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.sasl import LOGIN_CHALLENGES, MECHANISMS, Password, SaslError, parse_login, parse_plain
from otel_smtp.smtp.sequence import Phase
from otel_smtp.smtp.server import ServerProtocol
from otel_smtp.smtp.states import CloseReason, ConnState, TlsMode, Transition
from tests.support.dialogue import ReplyReader, UpstreamScript
from tests.support.events import (
    AuthRequested,
    AuthResponded,
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
)

HOSTNAME: Final = "gateway.example"
MAX_REPLY_LINE_OCTETS: Final = 512  # RFC 5321 4.5.3.1.5
USER: Final = "user"
PASSWORD: Final = "secret"
# An input of some hundred octets reaches each of them.
SMALL_LIMITS: Final = ServerLimits(
    message_size=200,
    recipients=3,
    messages_per_connection=4,
    errors=6,
    junk_commands=8,
    command_line=80,
    auth_line=100,
    text_line=60,
    header_size=100,
    header_lines=4,
    hops=2,
    auth_failures=2,
)

_VERBS: Final = frozenset({None, "other", *Verb})
_MECHANISMS: Final = frozenset({None, "other", *MECHANISMS})
_ERROR_TYPES: Final = frozenset({None, *ErrorType})

Decision = MailRequested | RecipientRequested | TlsRequested | AuthRequested | AuthResponded | ContentEnded


def policy_from(settings: dict[str, Any]) -> ServerPolicy:
    """The listener's policy that a dialogue's settings ask for."""
    limits = {name.removeprefix("limits."): value for name, value in settings.items() if name.startswith("limits.")}
    auth = settings.get("listener.auth", "off")
    return ServerPolicy(
        hostname=HOSTNAME,
        is_lmtp=settings.get("listener.protocol") == "lmtp",
        tls_mode=TlsMode(settings.get("listener.tls", "off")),
        tls_required=settings.get("listener.tls_required", False),
        auth_mechanisms=() if auth == "off" else ("PLAIN", "LOGIN"),
        auth_required=auth == "required",
        auth_in_clear=settings.get("listener.auth_in_clear", False),
        default_domain=settings.get("listener.default_domain", ""),
        rejects_bare_line_ends=settings.get("delivery.content_newlines") == "reject",
        limits=ServerLimits(**limits),
    )


@dataclass(frozen=True, slots=True)
class Message:
    """A message that was taken."""

    mail: Mail
    recipients: tuple[Recipient, ...]
    content: bytes

    @property
    def envelope(self) -> str:
        """As a dialogue writes it: reverse-path > recipients, each with its parameters."""
        return f"{_mail_text(self.mail)} > {' '.join(map(_recipient_text, self.recipients))}".strip()

    @property
    def addresses(self) -> str:
        """The envelope without parameters."""
        return f"{self.mail.reverse_path} > {' '.join(recipient.address for recipient in self.recipients)}".strip()


def _mail_text(mail: Mail) -> str:
    words = [mail.reverse_path]
    words += [f"SIZE={mail.size}"] if mail.size is not None else []
    words += [f"BODY={mail.body}"] if mail.body is not None else []
    words += ["SMTPUTF8"] if mail.smtputf8 else []
    words += [f"RET={mail.ret}"] if mail.ret is not None else []
    words += [f"ENVID={mail.envid}"] if mail.envid is not None else []
    words += ["REQUIRETLS"] if mail.require_tls else []
    words += [f"AUTH={mail.auth}"] if mail.auth is not None else []
    return " ".join(words)


def _recipient_text(recipient: Recipient) -> str:
    words = [recipient.address]
    if recipient.notify is not None:
        words.append(f"NOTIFY={','.join(flag.name or '' for flag in Notify if flag in recipient.notify)}")
    words += [f"ORCPT={recipient.orcpt}"] if recipient.orcpt is not None else []
    return " ".join(words)


class _Exchange:
    """One AUTH exchange with the only user there is."""

    def __init__(self, mechanism: str) -> None:
        self._mechanism = mechanism
        self._answers: list[bytes] = []

    def respond(self, answer: bytes | None) -> Reply | bytes:
        """The verdict, or the next challenge."""
        if answer is not None:
            self._answers.append(answer)
        challenges = (b"",) if self._mechanism == "PLAIN" else LOGIN_CHALLENGES
        if len(self._answers) < len(challenges):
            return challenges[len(self._answers)]
        try:
            claimed = parse_plain(*self._answers) if self._mechanism == "PLAIN" else parse_login(*self._answers)
        except SaslError:
            return replies.AUTH_FAILED
        return replies.AUTH_SUCCEEDED if claimed == Password(USER, PASSWORD) else replies.AUTH_FAILED


@dataclass
class Record:
    """What one session did.

    Attributes:
        steps: transitions and replies in the order in which they were decided.
        events: as `normalised` tells them apart from how the input was cut.
        messages: those that were taken.
    """

    steps: list[Transition | tuple[str | None, Reply]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    wire: bytearray = field(default_factory=bytearray)

    @property
    def transitions(self) -> list[Transition]:
        """The recorded states."""
        return [step for step in self.steps if isinstance(step, Transition)]

    @property
    def states(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(str(transition.state) for transition in self.transitions)

    @property
    def replies(self) -> list[tuple[str | None, Reply]]:
        """Each reply with the verb that it answers."""
        return [step for step in self.steps if not isinstance(step, Transition)]

    def check(self) -> None:
        """Assert what must hold for every session that is over."""
        names = self.states
        assert names[0] == "New"
        assert names.count("New") == 1
        assert names[-1] == "Closed"
        assert names.count("Closed") == 1
        assert [transition.sequence for transition in self.transitions] == list(range(1, len(names) + 1))
        errors = [transition for transition in self.transitions if transition.state is ConnState.ERROR]
        refusals = [(verb, reply) for verb, reply in self.replies if reply.code >= 400]
        failed_handshakes = [error for error in errors if error.reply_code is None]
        assert len(errors) - len(failed_handshakes) == len(refusals)
        assert len(failed_handshakes) <= 1
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            if not isinstance(after, Transition):
                self._check_reveal(before, *after)
        assert bytes(self.wire) == b"".join(reply.wire for _, reply in self.replies)
        for line in bytes(self.wire).splitlines(keepends=True):
            assert len(line) <= MAX_REPLY_LINE_OCTETS, f"reply line of {len(line)} octets"
        for transition in self.transitions:
            assert transition.verb in _VERBS
            assert transition.mechanism in _MECHANISMS
            assert transition.error_type in _ERROR_TYPES
        for event in self.events:
            match event:
                case AuthRequested(mechanism, _):
                    assert repr(event) == f"AuthRequested(mechanism={mechanism!r})"
                case AuthResponded():
                    assert repr(event) == "AuthResponded()"

    @staticmethod
    def _check_reveal(before: Transition | tuple[str | None, Reply], verb: str | None, reply: Reply) -> None:
        state = before.state if isinstance(before, Transition) else None
        if reply.code >= 400:
            assert isinstance(before, Transition), f"no state before {reply}"
            assert state is ConnState.ERROR
            enhanced = None if reply.enhanced is None else str(reply.enhanced)
            assert (before.verb, before.reply_code, before.enhanced_code) == (verb, reply.code, enhanced)
            assert before.error_type is not None
        elif reply.code == 354:
            assert state is ConnState.DATA
        elif reply.code == 235:
            assert state is ConnState.ACTIVE


def normalised(events: Iterable[Event]) -> list[Event]:
    """`events` as they are however the input was cut: content in one piece, and that of refused messages left out."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, ContentReceived) and isinstance(last, ContentReceived):
            result[-1] = ContentReceived(last.data + event.data)
            continue
        if isinstance(event, TransactionAborted):
            while result and isinstance(result[-1], HeaderReceived | ContentReceived):
                result.pop()
        result.append(event)
    return result


class EngineDriver:
    """One session of the engine.

    Args:
        policy: how the listener speaks.
        script: what the upstream says other than yes.
        answers_late: asked before each decision that may wait; True: it is not made before more octets are fed. Whoever
            passes it calls `settle` at last.
    """

    def __init__(
        self,
        policy: ServerPolicy,
        script: UpstreamScript | None = None,
        *,
        answers_late: Callable[[], bool] = lambda: False,
    ) -> None:
        self.policy = policy
        self.record = Record()
        self._script = script or UpstreamScript()
        self._mail_replies = deque(self._script.mail)
        self._content_replies = deque(self._script.content)
        self._answers_late = answers_late
        self._waiting: deque[Decision] = deque()
        self._verdicts: list[Reply] = []  # on the recipients of a group, until all are judged
        self._reader = ReplyReader()
        self._exchange: _Exchange | None = None
        self._mail: Mail | None = None
        self._recipients: list[Recipient] = []
        self._content = bytearray()
        offer = self._script.offered()
        self.protocol = ServerProtocol(
            policy, self, offer=lambda: offer, recorded=self.record.steps, said=self.record.steps
        )
        self.protocol.accepted(policy.tls_mode)
        if policy.tls_mode is TlsMode.IMPLICIT:
            self.protocol.handshake_begins()

    def refuse_next_content(self, reply: Reply) -> None:
        """The upstream will answer the next message with `reply`."""
        self._content_replies.append(reply)

    def feed(self, pieces: Iterable[bytes]) -> None:
        """Hand octets to the engine, piece by piece, and let it go as far as it can after each."""
        for piece in pieces:
            if self.ending is None:
                self.protocol.receive_data(piece)
                self._advance(hurried=False)

    def settle(self) -> None:
        """Make every decision that waits, until nothing waits any more."""
        self._advance(hurried=True)

    def end_of_stream(self) -> None:
        """The client sends no more."""
        if self.ending is None:
            self.protocol.receive_eof()
            self.settle()

    def closed(self, reason: CloseReason = CloseReason.CLIENT_DISCONNECT) -> Record:
        """The transport is gone: the session's record, checked."""
        self.protocol.closed(reason)
        self.record.events = normalised(self.record.events)
        self.record.check()
        return self.record

    @property
    def ending(self) -> CloseReason | None:
        """Why the session ends; None while it goes on."""
        return self.protocol.close_reason

    @property
    def waits_for_data(self) -> bool:
        """Whether all that was fed is used up."""
        return self.ending is None and not self._waiting and self.protocol.phase is not Phase.HANDSHAKE

    @property
    def waits_for_handshake(self) -> bool:
        """Whether the next octets are TLS's, or will be once STARTTLS is answered."""
        return self.protocol.phase is Phase.HANDSHAKE

    def waits_for(self, kind: type[Decision]) -> bool:
        """Whether a decision of this kind has not been made yet."""
        return any(isinstance(event, kind) for event in self._waiting)

    @property
    def recipient_count(self) -> int:
        """Accepted recipients of the open transaction."""
        return len(self._recipients)

    def sent(self) -> list[str]:
        """The replies since the last call, as `dialogue.joined` writes them."""
        data = self.protocol.data_to_send()
        self.record.wire += data
        sent = self._reader.feed(data)
        assert self._reader.is_between_replies
        return sent

    def _advance(self, *, hurried: bool) -> None:
        while self.ending is None:
            if self.protocol.wants_turn:
                self.protocol.run()
            elif self._waiting and (hurried or self._may_answer()):
                self._answer(self._waiting.popleft())
            else:
                return
        self._waiting.clear()

    # What the engine asks and tells; see `Handler`.

    def hello_received(self, verb: str, name: str) -> None:
        """See `Handler`."""
        self._take(HelloReceived(verb, name))

    def mail_requested(self, mail: Mail) -> Reply | None:
        """See `Handler`. What is known at once is returned, as the gateway does."""
        self._take(MailRequested(mail))
        if self._answers_late():
            return None
        self._waiting.pop()
        return self._mail_decided(mail)

    def _mail_decided(self, mail: Mail) -> Reply:
        reply = self.mail_reply()
        if reply.is_positive:
            assert self._mail is None, "MAIL within a transaction"
            self._mail = mail
            self._recipients = []
        return reply

    def recipients_requested(self, recipients: Sequence[Recipient]) -> None:
        """See `Handler`."""
        assert recipients, "a group of nobody"
        self._verdicts.clear()
        for recipient in recipients:
            self._take(RecipientRequested(recipient))

    def tls_requested(self) -> None:
        """See `Handler`."""
        self._take(TlsRequested())

    def auth_requested(self, mechanism: str, initial_response: bytes | None) -> None:
        """See `Handler`."""
        self._take(AuthRequested(mechanism, initial_response))

    def auth_responded(self, response: bytes) -> None:
        """See `Handler`."""
        self._take(AuthResponded(response))

    def content_begun(self) -> None:
        """See `Handler`."""
        self._take(ContentStarted())

    def header_received(self, block: bytes, facts: HeaderFacts) -> None:
        """See `Handler`."""
        self._take(HeaderReceived(block, facts))

    def content_received(self, data: bytes) -> None:
        """See `Handler`."""
        self._take(ContentReceived(data))

    def as_sent(self, reply: Reply, *, is_of_content: bool) -> Reply:
        """See `Handler`."""
        return reply

    def recipient_refused(self, recipient: Recipient, reply: Reply) -> None:
        """See `Handler`."""

    def message_received(self, block: bytes, facts: HeaderFacts, body: bytes) -> None:
        """See `Handler`."""
        self.header_received(block, facts)
        self.content_received(body)
        self.content_ended(len(block) + len(body))

    def content_ended(self, octets: int) -> None:
        """See `Handler`."""
        self._take(ContentEnded(octets))

    def transaction_aborted(self, reply: Reply | None) -> None:
        """See `Handler`."""
        self._take(TransactionAborted(reply))

    def _may_answer(self) -> bool:
        # STARTTLS is answered once no octet of the client is on its way: what comes later is TLS's.
        return not isinstance(self._waiting[0], TlsRequested) and not self._answers_late()

    def _take(self, event: Event) -> None:
        self.record.events.append(event)
        match event:
            case (
                MailRequested()
                | RecipientRequested()
                | TlsRequested()
                | AuthRequested()
                | AuthResponded()
                | ContentEnded()
            ):
                self._waiting.append(event)
            case ContentStarted():
                assert self._mail is not None, "content without MAIL"
                assert self._recipients, "content without RCPT"
                self._content.clear()
            case HeaderReceived(data) | ContentReceived(data):
                self._content += data
            case TransactionAborted():
                # Nothing of it may reach the next one.
                self._mail = None
                self._recipients = []

    def _answer(self, event: Decision) -> None:
        match event:
            case MailRequested(mail):
                self.protocol.reply(self._mail_decided(mail))
            case RecipientRequested(recipient):
                assert self._mail is not None, "RCPT without MAIL"
                reply = self.recipient_reply(recipient)
                if reply.is_positive:
                    self._recipients.append(recipient)
                self._verdicts.append(reply)
                if not self.waits_for(RecipientRequested):
                    self.protocol.reply(*self._verdicts)
            case TlsRequested():
                self.protocol.reply(self.tls_reply())
            case AuthRequested(mechanism, initial):
                self._exchange = _Exchange(mechanism)
                self._authenticate(initial)
            case AuthResponded(response):
                self._authenticate(response)
            case ContentEnded():
                self._answer_content()

    # What the upstream and the listener say; a subclass may decide otherwise.

    def mail_reply(self) -> Reply:
        """The verdict on MAIL."""
        return self._mail_replies.popleft() if self._mail_replies else replies.SENDER_OK

    def recipient_reply(self, recipient: Recipient) -> Reply:
        """The verdict on one recipient."""
        return self._script.recipients.get(recipient.address, replies.RECIPIENT_OK)

    def tls_reply(self) -> Reply:
        """The answer to STARTTLS."""
        return replies.TLS_READY

    def content_replies(self, count: int) -> list[Reply]:
        """The verdicts on the message: `count`, more than one only over LMTP."""
        return [self._content_replies.popleft() if self._content_replies else replies.message_accepted()] * count

    def _authenticate(self, answer: bytes | None) -> None:
        assert self._exchange is not None
        verdict = self._exchange.respond(answer)
        if isinstance(verdict, Reply):
            self.protocol.reply(verdict)
        else:
            self.protocol.challenge(verdict)

    def _answer_content(self) -> None:
        assert self._mail is not None, "content without MAIL"
        assert self._recipients, "content without RCPT"
        content = bytes(self._content)
        assert self._mail.body is Body.BINARY_MIME or not (b"\0" in content or has_bare_line_end(content))
        verdicts = self.content_replies(len(self._recipients) if self.policy.is_lmtp else 1)
        if any(reply.is_positive for reply in verdicts):
            self.record.messages.append(Message(self._mail, tuple(self._recipients), content))
        self._mail = None  # the engine may go on to the next one within the call
        self._recipients = []
        self.protocol.reply(*verdicts)


def base64_of(text: bytes) -> str:
    """`text` as AUTH sends it."""
    return base64.b64encode(text).decode("ascii")
