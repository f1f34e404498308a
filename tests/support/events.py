"""What a session's engine asks and tells its handler, as values: so that tests can keep them and compare.

Events marked *decide* wait for `ServerProtocol.reply`.
"""

from dataclasses import dataclass, field

from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.received import HeaderFacts
from otel_smtp.smtp.replies import Reply


@dataclass(frozen=True, slots=True)
class HelloReceived:
    """HELO, EHLO or LHLO was accepted and answered."""

    verb: str
    name: str  # as the client gave it: bounded by the command line, printable; still the peer's word


@dataclass(frozen=True, slots=True)
class MailRequested:
    """*decide*: MAIL. A 2yz opens the transaction."""

    mail: Mail


@dataclass(frozen=True, slots=True)
class RecipientRequested:
    """*decide*: RCPT. Several may be unanswered at once: a pipelined group is one batch upstream."""

    recipient: Recipient


@dataclass(frozen=True, slots=True)
class TlsRequested:
    """*decide*: STARTTLS. Stop reading from the transport, then `reply(TLS_READY)`, write it, shake hands, and call
    `tls_started`. Any other reply leaves the session in clear."""


@dataclass(frozen=True, slots=True)
class AuthRequested:
    """*decide*: AUTH. Answer with `challenge` or with a final reply."""

    mechanism: str  # one that we offered
    initial_response: bytes | None = field(repr=False)  # decoded; None where none was given, b"" for "="


@dataclass(frozen=True, slots=True)
class AuthResponded:
    """*decide*: the client's answer to a challenge, decoded. Answer as `AuthRequested`."""

    response: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class ContentStarted:
    """DATA was answered with 354, or the first BDAT chunk was taken."""


@dataclass(frozen=True, slots=True)
class HeaderReceived:
    """The whole header block of the content, before any `ContentReceived`; one a message.

    Attributes:
        block: the header lines, each with its CRLF, without the empty line that ends them; b"" where the content
            has no header.
        facts: what the block says of hops and traces.
    """

    block: bytes
    facts: HeaderFacts


@dataclass(frozen=True, slots=True)
class ContentReceived:
    """Some octets of the content after its header block: dot transparency undone, line ends normalised."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ContentEnded:
    """*decide*: the content is complete and acceptable to the engine. The reply is the message's final reply."""

    octets: int  # of the content, as RFC 1870 counts them


@dataclass(frozen=True, slots=True)
class TransactionAborted:
    """The open transaction ended without a final reply from above: RSET, a new EHLO, STARTTLS, content that the engine
    refused, or the connection's end.

    Attributes:
        reply: what the client was told, where the content itself was refused; else None.
    """

    reply: Reply | None


Event = (
    HelloReceived
    | MailRequested
    | RecipientRequested
    | TlsRequested
    | AuthRequested
    | AuthResponded
    | ContentStarted
    | HeaderReceived
    | ContentReceived
    | ContentEnded
    | TransactionAborted
)
