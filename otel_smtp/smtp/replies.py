"""Replies: the value type, and every reply that the gateway ever sends, by name.

Codes are those of RFC 5321 4.2.3; enhanced status codes those of RFC 3463, RFC 5248 and the extension's own RFC. A
constant defines a reply; the engine decides when to send it. Texts are for people: no exception text, no octet that a
peer chose, and no address.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple, Self


class ErrorType(StrEnum):
    """Low-cardinality class of a reply >= 400: ``error.type`` on the Error event."""

    __hash__ = str.__hash__  # Enum's own is a Python function; this is called several times per event

    SYNTAX = "syntax"  # malformed command or argument
    SEQUENCE = "sequence"  # understood, not now
    UNSUPPORTED = "unsupported"  # understood, not here
    POLICY = "policy"  # relay, TLS or AUTH required, limits of policy
    AUTH = "auth"  # credentials refused
    ADDRESS = "address"  # a mailbox or domain is not acceptable
    CONTENT = "content"  # the message itself is not acceptable
    LIMIT = "limit"  # one of the documented limits is reached
    PROTOCOL = "protocol"  # smuggling, injection, early talker
    UPSTREAM_REFUSED = "upstream_refused"  # the upstream's own 4xx or 5xx, passed on
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"  # no upstream could be reached
    UPSTREAM_AUTH = "upstream_auth"  # the upstream refuses our credentials, or wants some
    UPSTREAM_TLS = "upstream_tls"  # TLS with the upstream failed, or its certificate is not trusted
    UPSTREAM_PROTOCOL = "upstream_protocol"  # the upstream's reply made no sense
    OUTCOME_UNKNOWN = "outcome_unknown"  # lost between our final dot and its reply
    STORAGE = "storage"  # our disk
    TIMEOUT = "timeout"
    SHUTDOWN = "shutdown"
    TLS = "tls"  # the client's handshake failed
    INTERNAL = "internal"  # our bug


_ENHANCED = re.compile(r"([245])\.(\d{1,3})\.(\d{1,3})(?:[ \t]+|$)")
_UNSAFE = re.compile(r"[^\x20-\x7e]+")


class EnhancedStatus(NamedTuple):
    """An enhanced status code: class, subject, detail (RFC 3463 2)."""

    klass: int
    subject: int
    detail: int

    def __str__(self) -> str:
        return f"{self.klass}.{self.subject}.{self.detail}"

    @classmethod
    def parse(cls, text: str) -> tuple["EnhancedStatus | None", str]:
        """Split `text` into its leading enhanced code, if it has one, and the rest."""
        match = _ENHANCED.match(text)
        if match is None:
            return None, text
        return _status(match[1], match[2], match[3]), text[match.end() :]


@lru_cache(maxsize=256)
def _status(klass: str, subject: str, detail: str) -> EnhancedStatus:
    """Cached by its numbers: an upstream repeats the same few in its replies."""
    return EnhancedStatus(int(klass), int(subject), int(detail))


class _Wire:
    """A reply's octets: made at first use, which most replies of upstreams never see, and then found in the instance.
    `__getattr__` would do the same, but slow down all other attributes.
    """

    def __get__(self, reply: "Reply", owner: type) -> bytes:
        prefix = f"{reply.enhanced} " if reply.enhanced is not None else ""
        first = "".join([f"{reply.code}-{prefix}{line}\r\n" for line in reply.lines[:-1]])
        wire = f"{first}{reply.code} {prefix}{reply.lines[-1]}\r\n".encode("ascii")
        object.__setattr__(reply, "wire", wire)
        return wire


@dataclass(frozen=True)
class Reply:
    """One SMTP reply: code, enhanced status code, one or more lines of text.

    Attributes:
        code: 200 to 599.
        enhanced: at the head of each line (RFC 2034); None for the greeting, EHLO, 3yz and relayed replies without one.
        lines: text without codes or line ends, at least one (it may be empty).
        error_type: its class in telemetry; set for every code >= 400.
        closes: the connection ends after this reply.
        wire: the octets to send, CRLF included.
    """

    code: int
    enhanced: EnhancedStatus | None
    lines: tuple[str, ...]
    error_type: ErrorType | None = None
    closes: bool = False
    wire = _Wire()

    def __str__(self) -> str:
        return self.wire.decode("ascii").rstrip("\r\n").replace("\r\n", " | ")

    @property
    def text(self) -> str:
        """All lines in one, for logs and spans."""
        return " ".join(line for line in self.lines if line)

    @property
    def is_positive(self) -> bool:
        """Whether this is a 2yz: the command succeeded."""
        return 200 <= self.code < 300

    @property
    def is_transient(self) -> bool:
        """Whether this is a 4yz: a retry may succeed."""
        return 400 <= self.code < 500

    @property
    def is_permanent(self) -> bool:
        """Whether this is a 5yz: a retry will fail too."""
        return self.code >= 500

    def with_trace(self, trace_id: str) -> Self:
        """The same reply with ``trace=`` and 32 hexadecimal digits at the end of its last line, if the line then fits
        into 512 octets (RFC 5321 4.5.3.1.5).
        """
        *first, last = self.lines
        if last.endswith(f"trace={trace_id}"):
            return self  # another gateway has added it, for the same trace
        told = f"{last} trace={trace_id}".lstrip()
        before = 4 if self.enhanced is None else 5 + len(str(self.enhanced))
        return self if before + len(told) + 2 > 512 else replace(self, lines=(*first, told))

    def with_text(self, *lines: str) -> Self:
        """The same reply with other text."""
        return replace(self, lines=lines)

    def with_general_status(self) -> Self:
        """The same reply with an enhanced code that has only its class (RFC 3463 3.1: "other or undefined
        status")."""
        return replace(self, enhanced=EnhancedStatus(self.code // 100, 0, 0))

    def as_plain_success(self) -> Self:
        """The same reply with code 250, the only 2yz that every client takes for success: smtplib counts 252 to RCPT as
        a refusal.
        """
        return replace(self, code=250)


def safe_text(text: str, *, limit: int = 512) -> str:
    """`text` fit for a reply, a log line or a span: printable ASCII, at most `limit` characters.

    A peer's text must not carry line ends, control octets or terminal escapes to where we repeat it.
    """
    return _UNSAFE.sub("?", text)[:limit]


def _enhanced(text: str) -> EnhancedStatus:
    status, rest = EnhancedStatus.parse(text)
    assert status is not None, text
    assert rest == "", text
    return status


def _reply(code: int, enhanced: str, text: str, error_type: ErrorType | None = None, *, closes: bool = False) -> Reply:
    return Reply(code, _enhanced(enhanced) if enhanced else None, (text,), error_type, closes)


# 2yz and 3yz --------------------------------------------------------------------------------------------------


def greeting(hostname: str, *, protocol: str = "ESMTP") -> Reply:
    """The 220 that opens a session; its first word is our name (RFC 5321 4.3.1)."""
    return Reply(220, None, (f"{hostname} {protocol} otel_smtp",))


def hello(hostname: str, keywords: Iterable[str] = ()) -> Reply:
    """The 250 to HELO, EHLO or LHLO; one extension keyword per line (RFC 5321 4.1.1.1)."""
    return Reply(250, None, (hostname, *keywords))


@lru_cache(maxsize=1024)  # all mails of a busy connection share one trace
def message_accepted(trace_id: str | None = None) -> Reply:
    """The final 250 of a message, with the trace id that leads people to its trace."""
    if trace_id is None:
        return OK
    reply = Reply(250, OK.enhanced, (text := f"Ok trace={trace_id}",))
    object.__setattr__(reply, "wire", f"250 2.0.0 {text}\r\n".encode())  # as `_Wire` would, for each mail
    return reply


@lru_cache(maxsize=256)  # chunks have the same few sizes, unless the client is hostile
def chunk_received(octets: int) -> Reply:
    """The 250 to a BDAT chunk that is not the last (RFC 3030 2)."""
    return _reply(250, "2.0.0", f"{octets} octets received")


def challenge(text: str) -> Reply:
    """334 with a base64 challenge (RFC 4954 4)."""
    return Reply(334, None, (text,))


HELP: Final = _reply(214, "2.0.0", "See RFC 5321; this gateway relays to its upstream")
CLOSING: Final = _reply(221, "2.0.0", "Bye", closes=True)
TLS_READY: Final = _reply(220, "2.0.0", "Ready to start TLS")
AUTH_SUCCEEDED: Final = _reply(235, "2.7.0", "Authentication succeeded")
OK: Final = _reply(250, "2.0.0", "Ok")
SENDER_OK: Final = _reply(250, "2.1.0", "Sender ok")
RECIPIENT_OK: Final = _reply(250, "2.1.5", "Recipient ok")
CANNOT_VERIFY: Final = _reply(252, "2.5.0", "Cannot VRFY user, but will take a message and attempt delivery")
SEND_CONTENT: Final = Reply(354, None, ("End data with <CR><LF>.<CR><LF>",))

# 4yz ----------------------------------------------------------------------------------------------------------

SHUTTING_DOWN: Final = _reply(421, "4.3.2", "Shutting down, try again", ErrorType.SHUTDOWN, closes=True)
TOO_MANY_CONNECTIONS: Final = _reply(421, "4.3.2", "Too many connections", ErrorType.LIMIT, closes=True)
TOO_MANY_ERRORS: Final = _reply(421, "4.7.0", "Too many errors", ErrorType.LIMIT, closes=True)
TOO_MANY_REFUSALS: Final = _reply(421, "4.7.0", "Too many refused commands", ErrorType.LIMIT, closes=True)
TOO_MANY_JUNK_COMMANDS: Final = _reply(421, "4.7.0", "Too many commands without mail", ErrorType.LIMIT, closes=True)
TOO_MANY_MESSAGES: Final = _reply(421, "4.3.2", "Too many messages on one connection", ErrorType.LIMIT, closes=True)
TOO_MANY_AUTH_FAILURES: Final = _reply(421, "4.7.0", "Too many failed authentications", ErrorType.AUTH, closes=True)
LINE_DISCARD_EXCEEDED: Final = _reply(421, "4.5.2", "Line too long by far", ErrorType.LIMIT, closes=True)
TIMED_OUT: Final = _reply(421, "4.4.2", "Timeout, closing", ErrorType.TIMEOUT, closes=True)
INTERNAL_CLOSING: Final = _reply(421, "4.3.0", "Internal error, closing", ErrorType.INTERNAL, closes=True)

INTERNAL: Final = _reply(451, "4.3.0", "Internal error, try again later", ErrorType.INTERNAL)
UPSTREAM_UNAVAILABLE: Final = _reply(
    451, "4.4.1", "No upstream can be reached, try again later", ErrorType.UPSTREAM_UNAVAILABLE
)
UPSTREAM_REFUSES: Final = _reply(451, "4.4.1", "The upstream refuses service", ErrorType.UPSTREAM_UNAVAILABLE)
UPSTREAM_LOST: Final = _reply(
    451, "4.4.1", "The upstream closed the connection, try again later", ErrorType.UPSTREAM_UNAVAILABLE
)
UPSTREAM_SILENT: Final = _reply(
    451, "4.4.1", "The upstream did not answer in time, try again later", ErrorType.UPSTREAM_UNAVAILABLE
)
UPSTREAM_BUSY: Final = _reply(
    451, "4.4.1", "All connections to the upstream are busy, try again later", ErrorType.UPSTREAM_UNAVAILABLE
)
UPSTREAM_PACED: Final = _reply(
    451, "4.7.1", "The rate limit towards the upstream is reached, try again later", ErrorType.LIMIT
)
UPSTREAM_CREDENTIALS: Final = _reply(
    451, "4.7.0", "The upstream does not accept this gateway's credentials", ErrorType.UPSTREAM_AUTH
)
UPSTREAM_LOGIN: Final = _reply(451, "4.4.1", "Login to the upstream failed", ErrorType.UPSTREAM_AUTH)
OUTCOME_UNKNOWN: Final = _reply(
    451, "4.4.2", "Connection to the upstream lost, outcome unknown", ErrorType.OUTCOME_UNKNOWN
)
GARBLED_OUTCOME: Final = _reply(
    451, "4.5.0", "The upstream's reply made no sense, outcome unknown", ErrorType.OUTCOME_UNKNOWN
)
INTERNAL_OUTCOME: Final = _reply(451, "4.3.0", "Internal error, outcome unknown", ErrorType.OUTCOME_UNKNOWN)
UPSTREAM_PROTOCOL: Final = _reply(451, "4.5.0", "The upstream's reply made no sense", ErrorType.UPSTREAM_PROTOCOL)
UPSTREAM_TLS: Final = _reply(451, "4.7.5", "The upstream's TLS could not be verified", ErrorType.UPSTREAM_TLS)
UPSTREAM_LACKS_8BITMIME: Final = _reply(
    451, "4.3.0", "The upstream does not take 8-bit content now, try again later", ErrorType.UPSTREAM_UNAVAILABLE
)
UPSTREAM_LACKS_BINARYMIME: Final = _reply(
    451, "4.3.0", "The upstream does not take binary content now, try again later", ErrorType.UPSTREAM_UNAVAILABLE
)
UPSTREAM_LACKS_SMTPUTF8: Final = _reply(
    451, "4.3.0", "The upstream does not take SMTPUTF8 now, try again later", ErrorType.UPSTREAM_UNAVAILABLE
)
UPSTREAM_LACKS_REQUIRETLS: Final = _reply(
    451, "4.3.0", "REQUIRETLS cannot be kept towards the upstream now", ErrorType.UPSTREAM_UNAVAILABLE
)
SOME_RECIPIENTS_DEFERRED: Final = _reply(
    451, "4.2.0", "Message not taken for all recipients, try again later", ErrorType.UPSTREAM_REFUSED
)
STORAGE_FULL: Final = _reply(452, "4.3.1", "Insufficient storage, try again later", ErrorType.STORAGE)
STORAGE_FAILED: Final = _reply(451, "4.3.0", "Storage failed, try again later", ErrorType.STORAGE)
STORAGE_BUSY: Final = _reply(451, "4.3.2", "Storage does not keep up, try again later", ErrorType.STORAGE)
EXPIRED: Final = _reply(451, "4.4.7", "Delivery time expired", ErrorType.TIMEOUT)
TOO_MANY_RECIPIENTS: Final = _reply(452, "4.5.3", "Too many recipients", ErrorType.LIMIT)
AUTH_UNAVAILABLE: Final = _reply(454, "4.7.0", "Temporary authentication failure", ErrorType.AUTH)

# 5yz ----------------------------------------------------------------------------------------------------------

LINE_TOO_LONG: Final = _reply(500, "5.5.2", "Line too long", ErrorType.SYNTAX)
AUTH_LINE_TOO_LONG: Final = _reply(500, "5.5.6", "Authentication exchange line is too long", ErrorType.SYNTAX)
"""RFC 4954 4 and 6."""
BARE_LINE_FEED: Final = _reply(500, "5.5.2", "Command lines end in CRLF", ErrorType.PROTOCOL, closes=True)
UNKNOWN_COMMAND: Final = _reply(500, "5.5.2", "Command not recognized", ErrorType.SYNTAX)
BAD_ARGUMENT: Final = _reply(501, "5.5.4", "Syntax error in arguments", ErrorType.SYNTAX)
CONTROL_OCTETS: Final = _reply(501, "5.5.4", "Control character in command", ErrorType.SYNTAX)
BAD_SENDER: Final = _reply(501, "5.1.7", "Bad sender address syntax", ErrorType.ADDRESS)
BAD_RECIPIENT: Final = _reply(501, "5.1.3", "Bad recipient address syntax", ErrorType.ADDRESS)
SENDER_TOO_LONG: Final = _reply(501, "5.1.7", "Sender address too long", ErrorType.ADDRESS)
RECIPIENT_TOO_LONG: Final = _reply(501, "5.1.3", "Recipient address too long", ErrorType.ADDRESS)
SENDER_WITHOUT_DOMAIN: Final = _reply(
    501, "5.1.7", "Sender address needs a domain: this listener has no default_domain", ErrorType.ADDRESS
)
RECIPIENT_WITHOUT_DOMAIN: Final = _reply(
    501, "5.1.3", "Recipient address needs a domain: this listener has no default_domain", ErrorType.ADDRESS
)
BAD_BASE64: Final = _reply(501, "5.5.2", "Cannot decode that base64", ErrorType.SYNTAX)
AUTH_CANCELLED: Final = _reply(501, "5.7.0", "Authentication cancelled", ErrorType.AUTH)
NOT_IMPLEMENTED: Final = _reply(502, "5.5.1", "Command not implemented", ErrorType.UNSUPPORTED)
BAD_SEQUENCE: Final = _reply(503, "5.5.1", "Bad sequence of commands", ErrorType.SEQUENCE)
NO_VALID_RECIPIENTS: Final = _reply(503, "5.5.1", "No valid recipients", ErrorType.SEQUENCE)
ALREADY_AUTHENTICATED: Final = _reply(503, "5.5.1", "Already authenticated", ErrorType.SEQUENCE)
TLS_ALREADY_ON: Final = _reply(503, "5.5.1", "TLS is already on", ErrorType.SEQUENCE)
UNKNOWN_MECHANISM: Final = _reply(504, "5.5.4", "Unrecognized authentication mechanism", ErrorType.UNSUPPORTED)
TLS_REQUIRED: Final = _reply(530, "5.7.0", "Must issue a STARTTLS command first", ErrorType.POLICY)
AUTH_REQUIRED: Final = _reply(530, "5.7.0", "Authentication required", ErrorType.POLICY)
AUTH_FAILED: Final = _reply(535, "5.7.8", "Authentication credentials invalid", ErrorType.AUTH)
ENCRYPTION_REQUIRED: Final = _reply(538, "5.7.11", "Encryption required for this mechanism", ErrorType.POLICY)
RELAY_DENIED: Final = _reply(550, "5.7.1", "Relaying denied", ErrorType.POLICY)
BARE_LINE_END: Final = _reply(550, "5.6.11", "Bare CR or LF in content", ErrorType.CONTENT)
MESSAGE_TOO_BIG: Final = _reply(552, "5.3.4", "Message exceeds the size limit", ErrorType.LIMIT)
NEEDS_SMTPUTF8: Final = _reply(553, "5.6.7", "Non-ASCII address not permitted here", ErrorType.ADDRESS)
ACCESS_DENIED: Final = _reply(554, "5.7.1", "Access denied", ErrorType.POLICY, closes=True)
BAD_PROXY_HEADER: Final = _reply(554, "5.5.0", "Bad PROXY header", ErrorType.PROTOCOL, closes=True)
EARLY_TALKER: Final = _reply(554, "5.5.1", "Command before the greeting", ErrorType.PROTOCOL, closes=True)
OCTETS_BEHIND_STARTTLS: Final = _reply(554, "5.5.1", "Data behind STARTTLS", ErrorType.PROTOCOL, closes=True)
LINE_IN_CONTENT_TOO_LONG: Final = _reply(554, "5.6.0", "Line in content too long", ErrorType.CONTENT)
HEADER_TOO_BIG: Final = _reply(554, "5.6.0", "Header block too long", ErrorType.CONTENT)
NUL_IN_CONTENT: Final = _reply(554, "5.6.0", "NUL in content", ErrorType.CONTENT)
TOO_MANY_HOPS: Final = _reply(554, "5.4.6", "Too many hops", ErrorType.CONTENT)
NEEDS_8BITMIME: Final = _reply(554, "5.6.3", "The upstream does not take 8-bit content", ErrorType.CONTENT)
CANNOT_REENCODE: Final = _reply(554, "5.6.5", "8-bit content cannot be re-encoded", ErrorType.CONTENT)
CONTENT_NEEDS_SMTPUTF8: Final = _reply(554, "5.6.9", "The upstream does not take SMTPUTF8", ErrorType.CONTENT)
UNKNOWN_PARAMETER: Final = _reply(555, "5.5.4", "MAIL or RCPT parameter not recognized", ErrorType.UNSUPPORTED)


def named() -> dict[str, Reply]:
    """Every reply constant of this module, by its name: for tests and for the documentation."""
    return {name: value for name, value in globals().items() if isinstance(value, Reply)}
