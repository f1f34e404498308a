"""The mailbox: messages that arrived, and the faults that its server is to show."""

import email
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from email import policy
from email.message import EmailMessage
from enum import Enum, auto
from typing import Final, NamedTuple

EVERYONE: Final = "@"
WAIT_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class ReceivedMail:
    """A message as it arrived, with its envelope.

    Attributes:
        sender: the reverse-path; "" for the null path.
        recipients: those that were accepted.
        content: to the octet, CRLF line ends, dots unstuffed.
    """

    sender: str
    recipients: tuple[str, ...]
    content: bytes

    @property
    def message(self) -> EmailMessage:
        """The parsed content, with "\n" line ends, as in a message that was never sent."""
        return email.message_from_bytes(self.content.replace(b"\r\n", b"\n"), policy=policy.default)


class Stage(Enum):
    """Where in a transaction a fault strikes."""

    RECIPIENT = auto()
    CONTENT = auto()  # in place of the reply to the end of data
    DELAY = auto()  # before that reply
    DROP = auto()  # the connection is closed in place of that reply


@dataclass(slots=True)
class _Fault:
    stage: Stage
    pattern: str
    times: int | None  # left; None: always
    line: str = ""
    seconds: float = 0.0
    is_kept: bool = False


class EndOfData(NamedTuple):
    """The server's reaction to a whole message.

    Attributes:
        line: the reply; None: close the connection without one.
        seconds: waited before it.
    """

    line: str | None
    seconds: float


@dataclass
class _Shared:
    """State shared by the test's threads and the server's; guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    mails: list[ReceivedMail] = field(default_factory=list)
    faults: list[_Fault] = field(default_factory=list)


class Mailbox:
    """Messages by recipient, and faults. All methods may be called from any thread.

    A recipient is named by the whole address ("bob@there.example"), the local part ("bob@"), the domain
    ("@there.example"), or "@" for everyone, in any case of letters. The newest matching fault decides.
    """

    def __init__(self) -> None:
        self._shared = _Shared()

    # Messages

    @property
    def mails(self) -> list[ReceivedMail]:
        """All mails that arrived, in order, with envelopes."""
        with self._shared.changed:
            return list(self._shared.mails)

    @property
    def messages(self) -> list[EmailMessage]:
        """All messages that arrived, in order."""
        return [mail.message for mail in self.mails]

    def __getitem__(self, recipient: str) -> list[EmailMessage]:
        """The messages for a recipient, in order; may be empty.

        Raises:
            ValueError: `recipient` is malformed; see the class.
        """
        return [mail.message for mail in _for_recipient(self.mails, _pattern(recipient))]

    def wait_for(
        self, count: int = 1, recipient: str = EVERYONE, *, timeout_seconds: float = WAIT_SECONDS
    ) -> list[EmailMessage]:
        """Wait until a recipient has `count` messages, and return them: for mail that another program sends.

        Raises:
            TimeoutError: there were not, in time.
            ValueError: `recipient` is malformed.
        """
        pattern = _pattern(recipient)

        def arrived() -> list[ReceivedMail]:
            return _for_recipient(self._shared.mails, pattern)

        with self._shared.changed:
            if not self._shared.changed.wait_for(lambda: len(arrived()) >= count, timeout_seconds):
                raise TimeoutError(f"{len(arrived())} of {count} messages for {recipient!r} in {timeout_seconds} s")
            return [mail.message for mail in arrived()]

    def clear(self) -> None:
        """Forget all messages; faults stay."""
        with self._shared.changed:
            self._shared.mails.clear()

    # Faults

    def refuse(
        self, recipient: str = EVERYONE, code: int = 550, text: str = "5.1.1 no such user", *, times: int | None = None
    ) -> None:
        """Refuse a recipient for good.

        Args:
            code: 500 to 599.
            text: printable ASCII; it begins with an enhanced status code, or has none.
            times: how often; None: until `recover`.

        Raises:
            ValueError: an argument breaks these rules.
        """
        self._add(_Fault(Stage.RECIPIENT, _pattern(recipient), times, _line(code, 5, text)))

    def defer(
        self,
        recipient: str = EVERYONE,
        code: int = 451,
        text: str = "4.7.1 greylisted, try again later",
        *,
        times: int | None = None,
    ) -> None:
        """Refuse a recipient for now; `times=1` is greylisting. Arguments as for `refuse`, with codes of 400 to 499."""
        self._add(_Fault(Stage.RECIPIENT, _pattern(recipient), times, _line(code, 4, text)))

    def refuse_content(
        self,
        recipient: str = EVERYONE,
        code: int = 554,
        text: str = "5.7.1 message refused",
        *,
        times: int | None = None,
    ) -> None:
        """Refuse whole messages for a recipient at the end of data; codes of 400 to 599."""
        self._add(_Fault(Stage.CONTENT, _pattern(recipient), times, _line(code, 4 if code < 500 else 5, text)))

    def slow(self, seconds: float, recipient: str = EVERYONE, *, times: int | None = None) -> None:
        """Let messages for a recipient wait `seconds` for the reply to the end of data."""
        if seconds < 0:
            raise ValueError(f"seconds = {seconds!r}: not negative")
        self._add(_Fault(Stage.DELAY, _pattern(recipient), times, seconds=seconds))

    def drop_after_dot(self, recipient: str = EVERYONE, *, keep: bool = False, times: int | None = None) -> None:
        """Close the connection in place of the reply to the end of data: it is unknown whether the message was taken.

        Args:
            keep: it was taken: put the message into the mailbox all the same.
        """
        self._add(_Fault(Stage.DROP, _pattern(recipient), times, is_kept=keep))

    def recover(self) -> None:
        """End all faults."""
        with self._shared.changed:
            self._shared.faults.clear()

    def _add(self, fault: _Fault) -> None:
        if fault.times is not None and fault.times < 1:
            raise ValueError(f"times = {fault.times!r}: at least 1")
        with self._shared.changed:
            self._shared.faults.append(fault)

    # The server's side

    def judge_recipient(self, recipient: str) -> str | None:
        """The reply line that refuses a recipient; None: it is accepted."""
        with self._shared.changed:
            fault = self._strike(Stage.RECIPIENT, [recipient])
        return fault.line if fault is not None else None

    def take(self, mail: ReceivedMail) -> EndOfData:
        """Judge a whole message, and keep it if accepted, before its reply can be seen."""
        with self._shared.changed:
            delay = self._strike(Stage.DELAY, mail.recipients)
            refused = self._strike(Stage.CONTENT, mail.recipients)
            dropped = self._strike(Stage.DROP, mail.recipients) if refused is None else None
            line: str | None = "250 2.0.0 Ok: in the mailbox"
            if refused is not None:
                line = refused.line
            elif dropped is not None:
                line = None
            if refused is None and (dropped is None or dropped.is_kept):
                self._shared.mails.append(mail)
                self._shared.changed.notify_all()
        return EndOfData(line, delay.seconds if delay is not None else 0.0)

    def _strike(self, stage: Stage, recipients: Iterable[str]) -> _Fault | None:
        recipients = list(recipients)
        for fault in reversed(self._shared.faults):
            if fault.stage is stage and any(_fits(fault.pattern, recipient) for recipient in recipients):
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times == 0:
                        self._shared.faults.remove(fault)
                return fault
        return None


def _pattern(recipient: str) -> str:
    if "@" not in recipient:
        raise ValueError(f'{recipient!r}: allowed: "bob@there.example", "bob@", "@there.example", "@"')
    return recipient.lower()


def _fits(pattern: str, recipient: str) -> bool:
    recipient = recipient.lower()
    if pattern.endswith("@"):
        return recipient.startswith(pattern) or pattern == EVERYONE
    return recipient.endswith(pattern) if pattern.startswith("@") else recipient == pattern


def _for_recipient(mails: Sequence[ReceivedMail], pattern: str) -> list[ReceivedMail]:
    return [mail for mail in mails if any(_fits(pattern, recipient) for recipient in mail.recipients)]


def _line(code: int, first_digit: int, text: str) -> str:
    if code // 100 != first_digit:
        raise ValueError(f"code = {code!r}: allowed: {first_digit}00 to {first_digit}99")
    if not text.isascii() or not text.isprintable():
        raise ValueError(f"text = {text!r}: one line of printable ASCII")
    return f"{code} {text}"
