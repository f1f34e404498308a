"""Mailboxes, domains and paths: the grammar of RFC 5321 4.1.2, opened to UTF-8 by RFC 6531 3.3.

Theory of operation
-------------------
In every pattern here the next character decides how to continue: nothing that follows a repetition begins like the
repetition, and no repetition is nested directly in another. So there is never a second way to match, and a hostile
megabyte costs one pass. Possessive quantifiers and atomic groups would say the same, but CPython 3.11.2 misjudges them:
the input of a possessive group's last, failed iteration stays consumed. The parser is positional, because only the
grammar knows where a path ends: a quoted local part may hold spaces and angle brackets.

Addresses are kept exactly as the client wrote them (RFC 6531 3.2: no transcoding between U-labels and A-labels).
Whether a non-ASCII address may be used is not grammar; see `extensions`.

Deviations: each one accepts mail that upstreams take, and none admits an octet that could end a command or a header:

* an underscore in a domain label (container and service names have them);
* a local part of more than 64 octets, or with dots at its ends, in a row, or alone: such mailboxes exist, and the
  upstream judges them;
* a dot at the end of a domain, which is dropped: the domain is the same, and routes are written without it;
* a path of up to 512 octets, as a local part may be long;
* a path without its angle brackets, as Postfix and Exim take it; what we send on always has them;
* a source route is taken and dropped (RFC 5321 4.1.1.3 and appendix C: "MUST be accepted ... SHOULD be ignored").
"""

import ipaddress
import re
from typing import Final

from otel_smtp.smtp.characters import INVISIBLE

MAX_DOMAIN_OCTETS: Final = 255
"""RFC 5321 4.5.3.1.2."""

MAX_PATH_OCTETS: Final = 512
"""Angle brackets and source route included. RFC 5321 4.5.3.1.3 asks for 256, and 4.5.3.1.4 for command lines of 512;
bounce addresses of mailing lists and of signed senders exceed the former."""

MAX_LABEL_OCTETS: Final = 63
"""RFC 1035 2.3.4."""

# Everything above ASCII is UTF8-non-ascii in RFC 6531 3.3; `characters.INVISIBLE` excludes the dangerous ones again.
# The classes are negated, since compiling one that lists a million characters takes ten milliseconds.
_ATEXT_OR_DOT = r'[^\x00-\x20"(),:;<>@\[\\\]\x7f]'
_LET_DIG = r"[^\x00-/:-@\[-^`{-\x7f]"  # and the underscore, which existing names have
_LABEL = rf"{_LET_DIG}+(?:-+{_LET_DIG}+)*"
_DOMAIN_PATTERN = rf"{_LABEL}(?:\.{_LABEL})*"

_DOT_STRING = re.compile(rf"{_ATEXT_OR_DOT}+")
# QcontentSMTP = qtextSMTP / quoted-pairSMTP
_QUOTED_STRING = re.compile(r'"[^\x00-\x1f"\\\x7f]*(?:\\[ -~][^\x00-\x1f"\\\x7f]*)*"')
_DOMAIN = re.compile(_DOMAIN_PATTERN)
_SOURCE_ROUTE = re.compile(rf"@{_DOMAIN_PATTERN}(?:,@{_DOMAIN_PATTERN})*:")
# General-address-literal = Standardized-tag ":" 1*dcontent, where dcontent is %d33-90 / %d94-126
_LITERAL = re.compile(r"\[([!-Z^-~]+)\]")
_GENERAL_LITERAL = re.compile(r"[A-Za-z0-9]+(?:-+[A-Za-z0-9]+)*:[!-Z^-~]+")
_LONG_LABEL = re.compile(rf"[A-Za-z0-9_-]{{{MAX_LABEL_OCTETS + 1}}}")


class PathSyntaxError(ValueError):
    """Not a path, a mailbox or a domain; the message says why and never repeats the address."""


class PathTooLong(PathSyntaxError):
    """A path of more than `MAX_PATH_OCTETS`."""


class BareLocalPart(PathSyntaxError):
    """A path without a domain, otherwise valid.

    Attributes:
        local_part_end: the index just behind the local part, where "@" and a domain would go.
    """

    def __init__(self, what: str, local_part_end: int) -> None:
        super().__init__(what)
        self.local_part_end = local_part_end


def octets(text: str) -> int:
    """The length of `text` on the wire, in octets."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def is_visible(text: str) -> bool:
    """Whether `text` is free of control characters, of non-ASCII white space and of characters that hide or mislead."""
    return text.isprintable() if text.isascii() else INVISIBLE.search(text) is None


def reverse_path(text: str, start: int = 0) -> tuple[str, int]:
    """Parse the reverse-path that begins at `text[start]` (RFC 5321 4.1.1.2).

    Returns:
        The mailbox as written, "" for the null path, and the index just behind the path.

    Raises:
        PathTooLong: it is longer than the limit.
        BareLocalPart: only its domain is missing.
        PathSyntaxError: there is no path at this index, or its domain is too long.
    """
    if text.startswith("<>", start):
        return "", start + 2
    mailbox, local_part_end, end = _take_path(text, start)
    if local_part_end is not None:
        raise BareLocalPart("a reverse-path needs a domain", local_part_end)
    return mailbox, end


def forward_path(text: str, start: int = 0) -> tuple[str, int]:
    """Parse the forward-path that begins at `text[start]` (RFC 5321 4.1.1.3).

    "Postmaster", in upper or lower case, needs no domain; the null path is not allowed.

    Returns:
        The mailbox as written, and the index just behind the path.

    Raises:
        PathTooLong, BareLocalPart, PathSyntaxError: as for `reverse_path`.
    """
    mailbox, local_part_end, end = _take_path(text, start)
    if local_part_end is not None and mailbox.lower() != "postmaster":
        raise BareLocalPart("a forward-path needs a domain", local_part_end)
    return mailbox, end


def is_mailbox(text: str) -> bool:
    """Whether all of `text` is a mailbox within the limits: local part, "@", domain or address literal."""
    try:
        local_part_end, end = _take_mailbox(text, 0)
    except PathSyntaxError:
        return False
    return local_part_end < end == len(text) and octets(text) <= MAX_PATH_OCTETS - 2


def is_domain(text: str) -> bool:
    """Whether all of `text` is a domain within the limits: labels of letters, digits, hyphens and underscores."""
    try:
        return _take_domain(text, 0) == len(text)
    except PathSyntaxError:
        return False


def is_address_literal(text: str) -> bool:
    """Whether all of `text` is a bracketed address literal: IPv4, "IPv6:" or a tagged general one."""
    match = _LITERAL.fullmatch(text)
    return match is not None and _is_literal_content(match[1])


def address_literal(host: str) -> str:
    """The literal of an IP address for EHLO and Received: "[192.0.2.1]", "[IPv6:2001:db8::1]".

    A zone index ("fe80::1%eth0") is dropped: it means nothing on another machine and has no place in the grammar.

    Raises:
        ValueError: `host` is not an IP address.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    return f"[IPv6:{address}]" if address.version == 6 else f"[{address}]"


def _take_path(text: str, start: int) -> tuple[str, int | None, int]:
    """Parse the path at `start`; returns its mailbox, the index where its domain is missing (None if it has one), and
    the index behind.
    """
    is_bracketed = text.startswith("<", start)
    mailbox_start = start
    if is_bracketed:
        mailbox_start += 1
        route = _SOURCE_ROUTE.match(text, mailbox_start)
        if route is not None:
            mailbox_start = route.end()
    local_part_end, mailbox_end = _take_mailbox(text, mailbox_start)
    has_domain = mailbox_end > local_part_end
    end = mailbox_end
    if has_domain and text.startswith(".", mailbox_end) and text[mailbox_end - 1] != "]":
        end += 1  # the root's dot
    if is_bracketed:
        if not text.startswith(">", end):
            raise PathSyntaxError("no closing angle bracket behind the mailbox")
        end += 1
    if octets(text[start:end]) + (0 if is_bracketed else 2) > MAX_PATH_OCTETS:
        raise PathTooLong("path too long")
    return text[mailbox_start:mailbox_end], None if has_domain else local_part_end, end


def _take_mailbox(text: str, start: int) -> tuple[int, int]:
    """Parse the mailbox at `start`; returns the index behind the local part and the one behind the domain, the same if
    there is none.
    """
    local_part = _DOT_STRING.match(text, start) or _QUOTED_STRING.match(text, start)
    if local_part is None:
        raise PathSyntaxError("no local part")
    _check_visible(local_part[0])
    end = local_part.end()
    if not text.startswith("@", end):
        return end, end
    if text.startswith("[", end + 1):
        literal = _LITERAL.match(text, end + 1)
        if literal is None or not _is_literal_content(literal[1]):
            raise PathSyntaxError("not an address literal")
        return end, literal.end()
    return end, _take_domain(text, end + 1)


def _take_domain(text: str, start: int) -> int:
    domain = _DOMAIN.match(text, start)
    if domain is None:
        raise PathSyntaxError("no domain")
    _check_visible(domain[0])
    # The limit of a U-label holds for its A-label form (RFC 5890 2.3.2.1), which we do not compute; the domain's own
    # limit bounds it.
    if octets(domain[0]) > MAX_DOMAIN_OCTETS or _LONG_LABEL.search(domain[0]) is not None:
        raise PathSyntaxError("domain or label too long")
    return domain.end()


def _check_visible(text: str) -> None:
    if not is_visible(text):
        raise PathSyntaxError("invisible or misleading character")


def _is_literal_content(content: str) -> bool:
    if len(content) > MAX_DOMAIN_OCTETS - 2:
        return False
    if content[:5].lower() == "ipv6:":
        return _is_ip(ipaddress.IPv6Address, content[5:])
    if ":" in content:
        # An IPv6 address without its tag has the form of a general literal, and servers disagree on which it is.
        return _GENERAL_LITERAL.fullmatch(content) is not None and not _is_ip(ipaddress.IPv6Address, content)
    # A leading zero is refused though Snum allows it: some parsers read it as octal, and so as another host.
    return _is_ip(ipaddress.IPv4Address, content)


def _is_ip(kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return "%" not in text  # a zone index is meaningful on this machine alone
