"""What an upstream relay needs to know, as plain values; `gateway.wiring` fills them from the settings."""

import ssl
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from otel_smtp.observing import Endpoint
from otel_smtp.smtp.client import MAX_REPLY_LINE_OCTETS, MAX_REPLY_LINES
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.states import TlsMode

DEFAULT_RECIPIENTS: Final = 100  # which any server takes (RFC 5321 4.5.3.1.8)


class Strategy(StrEnum):
    """When the upstream is asked.

    TRANSPARENT: at RCPT, so that each recipient gets the upstream's own verdict.
    BUFFERED: at the end of the content, all in one group; recipients were accepted by us, and a refusal of any
        refuses the message, while no recipient has it. Those that go in a further transaction have verdicts of their
        own.
    """

    TRANSPARENT = "transparent"
    BUFFERED = "buffered"


class TracePolicy(StrEnum):
    """What becomes of the trace headers of a relayed message.

    INJECT: they are replaced by those of the delivery. STRIP: they are removed. KEEP: they are left as they came.
    """

    INJECT = "inject"
    STRIP = "strip"
    KEEP = "keep"


class TokenSource(Protocol):
    """Where XOAUTH2 gets its access token."""

    async def token(self) -> str:
        """A token that is good for a while.

        Raises:
            OSError: none is available now.
        """
        ...

    def invalidate(self) -> None:
        """The upstream refused the token: do not hand it out again."""
        ...


@dataclass(frozen=True, slots=True)
class Credentials:
    """Our identity for the upstream: a password, or a source of tokens (then XOAUTH2 is the mechanism)."""

    username: str
    password: str = field(default="", repr=False)
    tokens: TokenSource | None = None


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long the upstream may take, in seconds; each command has its own time (RFC 5321 4.5.3.2).

    Attributes:
        connect: name, connection and TLS handshake together.
        command: EHLO, AUTH, MAIL, RCPT and whatever has no time of its own.
        data: DATA to 354.
        block: a block of content to be taken.
        reply: the end of the content to the reply. RFC 5321 4.5.3.2.6 gives it 10 minutes; ours is shorter, as the
            client that waits for us counts its own 10.
        pool: wait for a free connection.
    """

    connect: float = 30.0
    greeting: float = 60.0
    command: float = 300.0
    data: float = 120.0
    block: float = 180.0
    reply: float = 570.0
    pool: float = 60.0


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How many connections are kept, and how long.

    Attributes:
        connections: at most, busy and idle together.
        messages: after which a connection is closed.
        age_seconds: after which a connection is not used again.
        idle_seconds: after which an unused connection is closed; shorter than any upstream's patience.
    """

    connections: int = 20
    messages: int = 100
    age_seconds: float = 300.0
    idle_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class ReplyLimits:
    """What an upstream may make grow; beyond, its connection is closed."""

    line_octets: int = MAX_REPLY_LINE_OCTETS
    lines: int = MAX_REPLY_LINES


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """One upstream.

    Attributes:
        name: what telemetry and the status page call it.
        host: name, address, or the path of a unix socket (then `port` is None).
        is_lmtp: it speaks LMTP (RFC 2033).
        tls: OFF; STARTTLS: required and verified; IMPLICIT: from the first octet, verified.
        auth: "auto" takes the best that is offered; else the mechanism's name in lower case; "off".
        ca_file: PEM; None: the system's authorities.
        certificate_file, key_file: PEM, our own, where the upstream asks for one.
        server_name: the name that its certificate must have, where it differs from `host`.
        tls_context: used instead of one made from the files above.
        senders, recipients: patterns like "*@example.com" of what it serves; none: all.
        trace_context: see `TracePolicy`.
        recipients_per_transaction: at most; the others go in further ones.
        paced_by: names of limits that all hold for it.
        reencode_8bit: content is made 7-bit where it does not offer 8BITMIME: see `reencoding`.
        disabled: extensions, in capitals, that are not used though it offers them.
    """

    name: str
    host: str
    port: int | None = 25
    is_lmtp: bool = False
    tls: TlsMode = TlsMode.OFF
    credentials: Credentials | None = None
    auth: str = "auto"
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None
    tls_context: ssl.SSLContext | None = None
    limits: PoolLimits = PoolLimits()
    reply_limits: ReplyLimits = ReplyLimits()
    timeouts: Timeouts = Timeouts()
    senders: tuple[str, ...] = ()
    recipients: tuple[str, ...] = ()
    trace_context: TracePolicy = TracePolicy.STRIP
    recipients_per_transaction: int = DEFAULT_RECIPIENTS
    reencode_8bit: bool = False
    disabled: frozenset[str] = frozenset()
    paced_by: tuple[str, ...] = ()

    @property
    def endpoint(self) -> Endpoint:
        """Where it is, as configured."""
        return Endpoint(self.host, self.port)

    @property
    def verified_name(self) -> str:
        """The name that its certificate must have."""
        return self.server_name or self.host

    def most_recipients(self, extensions: Extensions | None) -> int:
        """How many recipients it is asked about in one transaction.

        Args:
            extensions: what it offers (LIMITS RCPTMAX, RFC 9422 3.2); None: that is not known.
        """
        announced = extensions.limits.get("RCPTMAX", 0) if extensions is not None else 0
        return min(self.recipients_per_transaction, announced) if announced > 0 else self.recipients_per_transaction


PACE_PATIENCE_SECONDS: Final = 270.0
"""How long a client waits for a limit: RFC 5321 4.5.3.2.3 gives it 5 minutes for the reply to RCPT."""

MEMORY_LIMIT_OCTETS: Final = 256 * 1024
"""Content up to this size is held in memory, beyond it in a temporary file. Nine of ten mails are smaller than 256 KiB,
and 256 transactions of it are 64 MiB."""
