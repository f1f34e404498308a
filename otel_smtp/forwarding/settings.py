"""The upstream relay's settings as plain values; `gateway.wiring` makes them from the settings file's."""

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

    TRANSPARENT: at RCPT, so that each recipient gets the upstream's own verdict. BUFFERED: at the end of the content,
    all in one group; we accept recipients ourselves, and if the upstream refuses one, the whole message is refused, and
    no recipient has it. Recipients of a further transaction have their own verdicts.
    """

    TRANSPARENT = "transparent"
    BUFFERED = "buffered"


class TracePolicy(StrEnum):
    """What to do with the trace headers of a relayed message.

    INJECT: replace them by those of the delivery; where nothing is traced, leave them unchanged. STRIP: remove them.
    KEEP: leave them unchanged.
    """

    INJECT = "inject"
    STRIP = "strip"
    KEEP = "keep"


class TokenSource(Protocol):
    """The source of XOAUTH2's access tokens."""

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
    """Our credentials for the upstream: a password, or a source of tokens (for XOAUTH2)."""

    username: str
    password: str = field(default="", repr=False)
    tokens: TokenSource | None = None


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The upstream's time limits in seconds; each command has its own (RFC 5321 4.5.3.2).

    Attributes:
        connect: name, connection and TLS handshake together.
        command: EHLO, AUTH, MAIL, RCPT and every command without its own limit.
        data: DATA to 354.
        block: a block of content to be taken.
        reply: the end of the content to the reply. RFC 5321 4.5.3.2.6 allows 10 minutes; ours is shorter, as the
            waiting client counts its own 10.
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
        connections: the most, busy and idle together.
        messages: a connection is closed after this many.
        age_seconds: after which a connection is not used again.
        idle_seconds: after which an unused connection is closed; shorter than any upstream's patience.
    """

    connections: int = 20
    messages: int = 100
    age_seconds: float = 300.0
    idle_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class ReplyLimits:
    """Bounds on what an upstream can make grow; beyond them its connection is closed."""

    line_octets: int = MAX_REPLY_LINE_OCTETS
    lines: int = MAX_REPLY_LINES


@dataclass(frozen=True, slots=True)
class UpstreamSettings:
    """One upstream.

    Attributes:
        name: its name in telemetry and on the status page.
        host: name, address, or the path of a unix socket (then `port` is None).
        is_lmtp: it speaks LMTP (RFC 2033).
        tls: OFF; STARTTLS: required and verified; IMPLICIT: from the first octet, verified.
        auth: "auto" takes the best mechanism offered; or a mechanism's name in lower case; or "off".
        ca_file: PEM; None: the system's authorities.
        certificate_file, key_file: PEM, our own, for an upstream that demands one.
        server_name: the name that its certificate must have, if it differs from `host`.
        tls_context: used instead of one made from the files above.
        senders, recipients: patterns like "*@example.com" of addresses that it serves; none: all.
        trace_context: see `TracePolicy`.
        recipients_per_transaction: the most; the others go in further ones.
        paced_by: names of limits that all apply to it.
        reencode_8bit: re-encode content as 7-bit if it does not offer 8BITMIME: see `reencoding`.
        disabled: extensions, in capitals, not to use even if it offers them.
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
        """Its configured address."""
        return Endpoint(self.host, self.port)

    @property
    def verified_name(self) -> str:
        """The name that its certificate must have."""
        return self.server_name or self.host

    def most_recipients(self, extensions: Extensions | None) -> int:
        """The most recipients in one transaction.

        Args:
            extensions: its offer (LIMITS RCPTMAX, RFC 9422 3.2); None: unknown.
        """
        announced = extensions.limits.get("RCPTMAX", 0) if extensions is not None else 0
        return min(self.recipients_per_transaction, announced) if announced > 0 else self.recipients_per_transaction


PACE_PATIENCE_SECONDS: Final = 270.0
"""How long a client's mail waits for a limit: RFC 5321 4.5.3.2.3 lets it wait 5 minutes for the reply to RCPT."""

MEMORY_LIMIT_OCTETS: Final = 256 * 1024
"""Content up to this size is held in memory, beyond it in a temporary file. Nine of ten mails are smaller than 256 KiB,
and 256 transactions of it are 64 MiB."""
