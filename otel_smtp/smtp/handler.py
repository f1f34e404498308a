"""The interface between an engine and its driver: decisions, notifications, and the sink of replies."""

from collections.abc import Sequence
from enum import Enum, auto
from typing import Protocol

from otel_smtp.smtp.content import ContentSink
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.received import HeaderFacts
from otel_smtp.smtp.replies import Reply


class Said(Protocol):
    """Receives each reply with the verb that it answers, as soon as it is decided; a list will do."""

    def append(self, said: tuple[str | None, Reply], /) -> None:
        """Take one."""
        ...


class Handler(ContentSink, Protocol):
    """Decides for a session. Its methods are called from within the engine's; it may answer there, or later.

    After a method marked *decide* the engine waits for `ServerProtocol.reply`. The others only notify.
    """

    def hello_received(self, verb: str, name: str) -> None:
        """HELO, EHLO or LHLO was accepted; `name` is the peer's claim: bounded by the command line, printable."""
        ...

    def mail_requested(self, mail: Mail) -> Reply | None:
        """*decide*: MAIL. A 2yz opens the transaction.

        Returns:
            The reply if it is known at once; otherwise None, and `ServerProtocol.reply` brings it like any other.
        """
        ...

    def recipients_requested(self, recipients: Sequence[Recipient]) -> None:
        """*decide*: a pipelined group of RCPT, one reply each."""
        ...

    def recipient_refused(self, recipient: Recipient, reply: Reply) -> None:
        """The engine refused a RCPT of the open transaction with `reply`."""
        ...

    def as_sent(self, reply: Reply, *, is_of_content: bool) -> Reply:
        """The refusal of MAIL, RCPT or content as it is sent: with a trace id that helps people to find it, if there is
        one.

        Args:
            is_of_content: it answers DATA or BDAT, or the content behind them.
        """
        ...

    def tls_requested(self) -> None:
        """*decide*: STARTTLS. Stop reading from the transport, then `reply(TLS_READY)`, write it, shake hands, and call
        `tls_started`. Any other reply leaves the session in the clear."""
        ...

    def auth_requested(self, mechanism: str, initial_response: bytes | None) -> None:
        """*decide*, by `challenge` or a final reply: AUTH.

        Args:
            mechanism: one of those offered.
            initial_response: decoded; None without one, b"" for "=".
        """
        ...

    def auth_responded(self, response: bytes) -> None:
        """*decide*, as `auth_requested`: the client's answer to a challenge, decoded."""
        ...

    def content_begun(self) -> None:
        """DATA is about to be answered with 354, or the first BDAT chunk was taken."""
        ...

    def message_received(self, block: bytes, facts: HeaderFacts, body: bytes) -> None:
        """*decide*: a message that came by DATA as a whole: `header_received`, `content_received` and `content_ended`
        in one. Its size, as RFC 1870 counts it, is that of block and body.
        """
        ...

    def content_ended(self, octets: int) -> None:
        """*decide*: the content is complete and acceptable to the engine. The reply is the message's final one.

        Args:
            octets: of the content, as RFC 1870 counts them.
        """
        ...

    def transaction_aborted(self, reply: Reply | None) -> None:
        """The open transaction ended without a final reply from above: RSET, a new EHLO, STARTTLS, content that the
        engine refused, or the connection's end.

        Args:
            reply: the reply to the client if the content itself was refused; otherwise None.
        """
        ...


class Asked(Enum):
    """The question that the handler has not answered yet."""

    NOTHING = auto()
    MAIL = auto()
    RECIPIENTS = auto()
    TLS = auto()
    AUTH = auto()
    CONTENT = auto()
