"""Drives a `ServerProtocol` without any I/O: octets in, cut anyhow; decisions by a script; everything recorded.

`EngineDriver` plays what stands around the engine: it answers the events that need a decision, at once or late. Its
`Record` checks what must hold for every byte stream whatever:

* a state is recorded before the reply that reveals it can be seen;
* Error is recorded exactly once for each reply >= 400, right before it, with its code and verb;
* every step is one of `LEGAL`: the engine's own check raises (it is not switched off here).
"""

import base64
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, Mail, Notify, Recipient
from otel_smtp.smtp.events import (
    AuthRequested,
    AuthResponded,
    ConnectionEnding,
    ContentEnded,
    ContentReceived,
    ContentStarted,
    Event,
    HeaderReceived,
    MailRequested,
    RecipientRequested,
    TlsRequested,
    TransactionAborted,
    Wait,
)
from otel_smtp.smtp.extensions import Offer
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.sasl import LOGIN_CHALLENGES, Password, SaslError, parse_login, parse_plain
from otel_smtp.smtp.server import ServerLimits, ServerPolicy, ServerProtocol
from otel_smtp.smtp.states import CloseReason, ConnState, TlsMode, Transition
from tests.support.dialogue import ReplyReader, UpstreamScript

HOSTNAME: Final = "gateway.example"
USER: Final = "user"
PASSWORD: Final = "secret"

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
        rejects_bare_line_ends=settings.get("delivery.content_newlines") == "reject",
        limits=ServerLimits(**limits),
    )


def offer_from(script: UpstreamScript) -> Offer:
    """What can be offered on behalf of the scripted upstream."""
    return Offer(
        size=script.size,
        eight_bit_mime="8BITMIME" not in script.lacks,
        smtputf8="SMTPUTF8" not in script.lacks,
        binary_mime="BINARYMIME" not in script.lacks,
        dsn="DSN" not in script.lacks,
        require_tls=True,
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
        self.ending: CloseReason | None = None
        self._script = script or UpstreamScript()
        self._mail_replies = deque(self._script.mail)
        self._content_replies = deque(self._script.content)
        self._answers_late = answers_late
        self._waiting: deque[Decision] = deque()
        self._reader = ReplyReader()
        self._exchange: _Exchange | None = None
        self._mail: Mail | None = None
        self._recipients: list[Recipient] = []
        self._content = bytearray()
        offer = offer_from(self._script)
        self.protocol = ServerProtocol(
            policy,
            self.record.steps.append,
            offer=lambda: offer,
            on_reply=lambda verb, reply: self.record.steps.append((verb, reply)),
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
        self.protocol.closed(self.ending or reason)
        self.record.events = normalised(self.record.events)
        self.record.check()
        return self.record

    def sent(self) -> list[str]:
        """The replies since the last call, as `dialogue.joined` writes them."""
        data = self.protocol.data_to_send()
        self.record.wire += data
        sent = self._reader.feed(data)
        assert self._reader.is_between_replies
        return sent

    def _advance(self, *, hurried: bool) -> None:
        while True:
            event = self.protocol.next_event()
            if not isinstance(event, Wait):
                self._take(event)
            elif self._waiting and (hurried or self._may_answer()):
                self._answer(self._waiting.popleft())
            else:
                return

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
                self._content.clear()
            case HeaderReceived(data) | ContentReceived(data):
                self._content += data
            case ConnectionEnding(reason):
                self.ending = reason
                self._waiting.clear()

    def _answer(self, event: Decision) -> None:
        match event:
            case MailRequested(mail):
                reply = self._mail_replies.popleft() if self._mail_replies else replies.SENDER_OK
                if reply.is_positive:
                    self._mail = mail
                    self._recipients = []
                self.protocol.reply(reply)
            case RecipientRequested(recipient):
                reply = self._script.recipients.get(recipient.address, replies.RECIPIENT_OK)
                if reply.is_positive:
                    self._recipients.append(recipient)
                self.protocol.reply(reply)
            case TlsRequested():
                self.protocol.reply(replies.TLS_READY)
            case AuthRequested(mechanism, initial):
                self._exchange = _Exchange(mechanism)
                self._authenticate(initial)
            case AuthResponded(response):
                self._authenticate(response)
            case ContentEnded():
                self._answer_content()

    def _authenticate(self, answer: bytes | None) -> None:
        assert self._exchange is not None
        verdict = self._exchange.respond(answer)
        if isinstance(verdict, Reply):
            self.protocol.reply(verdict)
        else:
            self.protocol.challenge(verdict)

    def _answer_content(self) -> None:
        reply = self._content_replies.popleft() if self._content_replies else replies.message_accepted()
        assert self._mail is not None, "content without MAIL"
        assert self._recipients, "content without RCPT"
        if reply.is_positive:
            message = Message(self._mail, tuple(self._recipients), bytes(self._content))
            assert self._mail.body is Body.BINARY_MIME or b"\0" not in message.content
            self.record.messages.append(message)
        self.protocol.reply(*[reply] * (len(self._recipients) if self.policy.is_lmtp else 1))
        self._mail = None
        self._recipients = []


def base64_of(text: bytes) -> str:
    """`text` as AUTH sends it."""
    return base64.b64encode(text).decode("ascii")
