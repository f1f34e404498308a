"""How one listener speaks: its policy and its limits, as the engine is given them."""

from dataclasses import dataclass, field
from functools import cached_property

from otel_smtp.smtp.content import ContentLimits
from otel_smtp.smtp.states import TlsMode


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a client can make grow. All sizes in octets.

    Attributes:
        commands_per_turn: commands of one client that are run before the other connections get their turn.
    """

    message_size: int = 25 * 1024 * 1024
    recipients: int = 1000
    messages_per_connection: int = 1000
    errors: int = 10
    junk_commands: int = 100
    command_line: int = 2048
    auth_line: int = 12288
    text_line: int = 65535
    header_size: int = 256 * 1024
    header_lines: int = 1000
    hops: int = 100
    auth_failures: int = 3
    commands_per_turn: int = 100


@dataclass(frozen=True)
class ServerPolicy:
    """How one listener speaks.

    Attributes:
        hostname: our name in the greeting and in EHLO.
        is_lmtp: LHLO, and one final reply per recipient (RFC 2033).
        tls_mode: STARTTLS is offered if `starttls`, until TLS is on.
        tls_required: 530 to all but NOOP, EHLO, STARTTLS and QUIT until TLS is on (RFC 3207 4).
        auth_mechanisms: offered SASL mechanisms, in order of preference; empty: no AUTH.
        auth_required: 530 to MAIL until authenticated (RFC 4954 6).
        auth_in_clear: AUTH is offered without TLS too.
        rejects_bare_line_ends: 550 5.6.11 to content with a bare CR or LF, instead of normalising it.
    """

    hostname: str
    is_lmtp: bool = False
    tls_mode: TlsMode = TlsMode.OFF
    tls_required: bool = False
    auth_mechanisms: tuple[str, ...] = ()
    auth_required: bool = False
    auth_in_clear: bool = False
    rejects_bare_line_ends: bool = False
    limits: ServerLimits = field(default_factory=ServerLimits)

    @cached_property
    def content_limits(self) -> ContentLimits:
        """What of it concerns content."""
        limits = self.limits
        return ContentLimits(
            limits.text_line, limits.header_size, limits.header_lines, limits.hops, self.rejects_bare_line_ends
        )
