"""A forwarder in memory that says what a dialogue's upstream says, and keeps what it was given."""

from collections import deque
from collections.abc import Callable, Sequence

from otel_smtp.forwarding.base import DeliveryFailed, MailTransaction, MessageAnswered, RecipientsAnswered
from otel_smtp.observing import TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import Extensions
from tests.support.dialogue import UpstreamScript
from tests.support.engine import Message


class ScriptedForwarder:
    """Takes mail as `script` says.

    Attributes:
        messages: those that were taken; content with our own Received field on top.
    """

    def __init__(self, script: UpstreamScript) -> None:
        self.script = script
        self.messages: list[Message] = []
        self.mail_replies = deque(script.mail)
        self.content_replies = deque(script.content)
        self._can = script.offered()

    def capabilities(self) -> Extensions:
        return self._can

    def begin(self, mail: Mail, record: TransactionRecord) -> "ScriptedTransaction":
        reply = self.mail_replies.popleft() if self.mail_replies else replies.SENDER_OK
        if not reply.is_positive:
            raise DeliveryFailed(reply)
        return ScriptedTransaction(self, mail)


class ScriptedTransaction(MailTransaction):
    spool_id: str | None = None

    def __init__(self, forwarder: ScriptedForwarder, mail: Mail) -> None:
        self._forwarder = forwarder
        self._mail = mail
        self._recipients: list[Recipient] = []
        self._content = b""

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        answers = [self._forwarder.script.recipients.get(one.address, replies.RECIPIENT_OK) for one in batch]
        self._recipients += [one for one, answer in zip(batch, answers, strict=True) if answer.is_positive]
        answered(answers)

    def content(self, resume: Callable[[], None]) -> None:
        pass

    def write(self, chunk: bytes) -> bool:
        self._content += chunk
        return True

    def finish(self, answered: MessageAnswered) -> None:
        answers = self._forwarder.content_replies
        reply = answers.popleft() if answers else replies.message_accepted()
        if reply.is_positive:
            self._forwarder.messages.append(Message(self._mail, tuple(self._recipients), self._content))
        answered(reply, ())

    def abort(self) -> None:
        pass
