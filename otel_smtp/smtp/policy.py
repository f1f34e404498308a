"""A listener's policy and limits, as values for the engine."""

from dataclasses import dataclass, field
from functools import cached_property

from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import Verb
from otel_smtp.smtp.content import ContentLimits
from otel_smtp.smtp.extensions import Extensions, keyword_lines, offer_to_clients
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import TlsMode


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Bounds on what a client can make grow. Sizes are in octets; None: unbounded."""

    message_size: int = 25 * 1024 * 1024
    recipients: int = 1000
    messages_per_connection: int | None = None
    errors: int = 10
    refusals: int = 1000  # beyond `recipients`
    junk_commands: int = 100
    command_line: int = 2048
    auth_line: int = 12288
    text_line: int = 65535
    header_size: int = 512 * 1024
    header_lines: int = 10_000
    hops: int = 100
    auth_failures: int = 3

    @property
    def announced(self) -> dict[str, int]:
        """Their announcement in EHLO (RFC 9422)."""
        most = {} if self.messages_per_connection is None else {"MAILMAX": self.messages_per_connection}
        return {**most, "RCPTMAX": self.recipients}


@dataclass(frozen=True, slots=True)
class OwnOffer:
    """A listener's current offer.

    Attributes:
        behind: the upstream's or spool's offer: the very object that this one was made from.
        offer: the same with our own extensions: limits, TLS, AUTH.
        said: the reply to EHLO, with its verb. Every session keeps its replies.
        size_limit: octets of the largest message: our limit, or the upstream's if that is lower.
    """

    behind: Extensions
    offer: Extensions
    said: tuple[str, Reply]
    size_limit: int


@dataclass(frozen=True)
class ServerPolicy:
    """A listener's policy.

    Attributes:
        hostname: our name in the greeting and in EHLO.
        is_lmtp: LHLO, and one final reply per recipient (RFC 2033).
        tls_mode: STARTTLS is offered if `starttls`, until TLS is on.
        tls_required: 530 to all but NOOP, EHLO, STARTTLS and QUIT until TLS is on (RFC 3207 4).
        auth_mechanisms: offered SASL mechanisms, in order of preference; empty: no AUTH.
        auth_required: 530 to MAIL until authenticated (RFC 4954 6).
        auth_in_clear: AUTH is offered without TLS too.
        default_domain: completes bare local parts; "": refuse them.
        commands_per_turn: commands of one client that run before other connections get their turn.
        rejects_bare_line_ends: 550 5.6.11 to content with a bare CR or LF, instead of normalising it.
        content_limits: the limits for content among all these.
    """

    hostname: str
    is_lmtp: bool = False
    tls_mode: TlsMode = TlsMode.OFF
    tls_required: bool = False
    auth_mechanisms: tuple[str, ...] = ()
    auth_required: bool = False
    auth_in_clear: bool = False
    default_domain: str = ""
    rejects_bare_line_ends: bool = False
    commands_per_turn: int = 100
    limits: ServerLimits = field(default_factory=ServerLimits)

    content_limits: ContentLimits = field(init=False, repr=False, compare=False)

    _offers: dict[bool, OwnOffer] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        limits = self.limits
        of_content = ContentLimits(
            limits.text_line, limits.header_size, limits.header_lines, limits.hops, self.rejects_bare_line_ends
        )
        object.__setattr__(self, "content_limits", of_content)

    def own_offer(self, behind: Extensions, *, is_tls: bool) -> OwnOffer:
        """The current offer. All sessions share one value until `behind` changes."""
        own = self._offers.get(is_tls)
        if own is None or own.behind is not behind:
            limits = self.limits
            size_limit = min(limits.message_size, behind.size or limits.message_size)
            ours = offer_to_clients(
                behind,
                is_tls=is_tls,
                size=size_limit,
                starttls=self.tls_mode is TlsMode.STARTTLS and not is_tls,
                auth_mechanisms=self.mechanisms(is_tls=is_tls),
                limits=limits.announced,
            )
            said = Verb.LHLO if self.is_lmtp else Verb.EHLO, replies.hello(self.hostname, keyword_lines(ours))
            own = OwnOffer(behind, ours, said, size_limit)
            self._offers[is_tls] = own
        return own

    def mechanisms(self, *, is_tls: bool) -> tuple[str, ...]:
        """The SASL mechanisms to offer."""
        return self.auth_mechanisms if is_tls or self.auth_in_clear else ()

    @cached_property
    def greeting(self) -> tuple[None, Reply]:
        """The 220, which answers no verb, in the form in which sessions keep their replies."""
        return None, replies.greeting(self.hostname, protocol="LMTP" if self.is_lmtp else "ESMTP")
