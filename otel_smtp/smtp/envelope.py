"""The envelope of one mail, as values that travel through the package."""

from collections.abc import Iterable
from enum import Flag, StrEnum, auto
from typing import NamedTuple


class Body(StrEnum):
    """BODY= of MAIL: how the content is encoded (RFC 6152 2, RFC 3030 3)."""

    SEVEN_BIT = "7BIT"
    EIGHT_BIT_MIME = "8BITMIME"
    BINARY_MIME = "BINARYMIME"


class DsnReturn(StrEnum):
    """RET= of MAIL: how much of the message a bounce returns (RFC 3461 4.3)."""

    FULL = "FULL"
    HEADERS = "HDRS"


class Notify(Flag):
    """NOTIFY= of RCPT (RFC 3461 4.1); NEVER stands alone."""

    NEVER = auto()
    SUCCESS = auto()
    FAILURE = auto()
    DELAY = auto()


def domain_of(address: str) -> str:
    """The domain of `address` in lower case, or "" for the null path and for the bare postmaster."""
    return address.rpartition("@")[2].lower() if "@" in address else ""


class Mail(NamedTuple):
    """MAIL FROM with its parameters (RFC 5321 4.1.1.2).

    Attributes:
        reverse_path: the mailbox as the client wrote it, without angle brackets and source route; "" is the null
            path of bounces.
        size: SIZE= in octets, None without one (RFC 1870).
        body: BODY=, None without one; such content may hold 8-bit octets all the same.
        smtputf8: SMTPUTF8 was given (RFC 6531 3.4).
        ret, envid: DSN parameters (RFC 3461 4.3, 4.4); envid is kept in its xtext form.
        require_tls: REQUIRETLS was given (RFC 8689).
        auth: AUTH= in its xtext form (RFC 4954 5), "<>" included.
    """

    reverse_path: str
    size: int | None = None
    body: Body | None = None
    smtputf8: bool = False
    ret: DsnReturn | None = None
    envid: str | None = None
    require_tls: bool = False
    auth: str | None = None

    @property
    def domain(self) -> str:
        """Domain of the reverse-path in lower case, "" for the null path."""
        return domain_of(self.reverse_path)


class Recipient(NamedTuple):
    """RCPT TO with its parameters (RFC 5321 4.1.1.3).

    Attributes:
        address: the mailbox as the client wrote it, without angle brackets and source route; "Postmaster" alone
            is allowed (RFC 5321 4.1.1.3).
        notify: NOTIFY=, None without one.
        orcpt: ORCPT= as given, "rfc822;" and xtext included (RFC 3461 4.2).
    """

    address: str
    notify: Notify | None = None
    orcpt: str | None = None

    @property
    def domain(self) -> str:
        """Domain of the address in lower case, "" for the bare postmaster."""
        return domain_of(self.address)


def domains(recipients: Iterable[Recipient], *, limit: int) -> tuple[str, ...]:
    """The first `limit` distinct recipient domains, in order of appearance."""
    seen: dict[str, None] = {}
    for recipient in recipients:
        if recipient.domain and recipient.domain not in seen:
            if len(seen) == limit:
                break
            seen[recipient.domain] = None
    return tuple(seen)
