"""Redaction of personal data: the same functions for spans, events, logs and metrics.

Two settings rule it: `addresses` for mailboxes, host names of clients and user names, `client_ip` for IP addresses of
clients. AUTH arguments and content never come to this package at all. Whatever a peer wrote goes through `clean`,
since one lone surrogate in a name or a status makes the OpenTelemetry SDK lose a whole batch, and a terminal escape
in a log line is an attack on its reader.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache, partial
from typing import Final

from otel_smtp.client.reply_words import HIDDEN, Shown, shown_words
from otel_smtp.smtp import replies
from otel_smtp.smtp.characters import INVISIBLE
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.telemetry.attributes import MAX_DOMAINS, MAX_VALUE_CHARACTERS, USER_HASH, USER_NAME


class Addresses(StrEnum):
    """The part of a mailbox to show."""

    DOMAIN = "domain"  # the part behind the @
    NONE = "none"
    HASH = "hash"  # the keyed hash of the whole: equal addresses stay recognisable, nothing can be read
    FULL = "full"


class ClientIp(StrEnum):
    """The part of a client's IP address to show."""

    FULL = "full"
    PREFIX = "prefix"  # /24, /48
    NONE = "none"


_FULL: Final = Addresses.FULL  # looked up in its class, a member costs as much as a call
_REPLACEMENT: Final = "\ufffd"

# Our own words, and those of nearly every accepted mail, which need no check.
_OWN: Final = frozenset(reply.text for reply in replies.named().values())
_EVERYDAY: Final = re.compile(r"(?:Ok|OK)(?::? queued as [A-Za-z0-9]{5,40}| trace=[0-9a-f]{32})?")
_TEXTS_REMEMBERED: Final = 512
_DOMAINS_REMEMBERED: Final = 1024
_HASH_DIGITS: Final = 16  # 64 bits: no two of a billion addresses are likely to meet


def clean(text: str, limit: int = MAX_VALUE_CHARACTERS) -> str:
    """`text` made fit for any attribute, name or log line: bounded, without characters that hide or mislead."""
    text = text[:limit]
    if text.isascii() and text.isprintable():
        return text
    return INVISIBLE.sub(_REPLACEMENT, text)


def _lower(domain: str) -> str:
    return clean(domain.lower())


@dataclass(frozen=True, slots=True)
class Redaction:
    """The operator's choice.

    Attributes:
        shows_domains: domains of mailboxes are shown.
        shows_mailboxes: mailboxes are shown, or their hashes.
        hash_key: secret of `Addresses.HASH`; the same in all processes whose hashes are to be compared.
    """

    addresses: Addresses = Addresses.DOMAIN
    client_ip: ClientIp = ClientIp.FULL
    hash_key: bytes = b""
    shows_domains: bool = field(init=False, repr=False, compare=False)
    shows_mailboxes: bool = field(init=False, repr=False, compare=False)
    _sender_domain: Callable[[str], str | None] = field(init=False, repr=False, compare=False)
    _recipient_domain: Callable[[str], str] = field(init=False, repr=False, compare=False)
    _words: Callable[[str], str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.addresses is Addresses.HASH and not self.hash_key:
            raise ValueError("addresses = hash needs a key: without one, addresses can be found by trying them")
        object.__setattr__(self, "shows_domains", self.addresses in (Addresses.DOMAIN, Addresses.FULL))
        object.__setattr__(self, "shows_mailboxes", self.addresses in (Addresses.FULL, Addresses.HASH))
        # A gateway sees the same few domains in mail after mail.
        object.__setattr__(self, "_sender_domain", lru_cache(_DOMAINS_REMEMBERED)(self._lower_literal_or_name))
        object.__setattr__(self, "_recipient_domain", lru_cache(_DOMAINS_REMEMBERED)(_lower))
        shown = Shown(self._in_text, self.ip, self.shows_domains)
        object.__setattr__(self, "_words", lru_cache(_TEXTS_REMEMBERED)(partial(shown_words, shown=shown)))

    def mailbox(self, address: str) -> str | None:
        """The mailbox itself in `full`, its hash in `hash`; otherwise None."""
        match self.addresses:
            case Addresses.FULL:
                return clean(address)
            case Addresses.HASH:
                return self._hash(address) if address else ""
            case _:
                return None

    def mailboxes(self, recipients: Iterable[Recipient]) -> tuple[str, ...]:
        """The first mailboxes of `recipients`, as `mailbox` shows them."""
        if not self.shows_mailboxes:
            return ()
        shown: list[str] = []
        for recipient in recipients:
            mailbox = self.mailbox(recipient.address)
            if mailbox is not None and len(shown) < MAX_DOMAINS:
                shown.append(mailbox)
        return tuple(shown)

    def domain(self, address: str) -> str | None:
        """The domain of a mailbox, "" if it has none, in `domain` and `full`; otherwise None."""
        if not self.shows_domains:
            return None
        _, at, domain = address.rpartition("@")
        return self._sender_domain(domain if at else "")

    def domains(self, recipients: Iterable[Recipient]) -> tuple[str, ...]:
        """The first distinct domains of `recipients`, in `domain` and `full`."""
        if not self.shows_domains:
            return ()
        found: dict[str, None] = {}
        for recipient in recipients:
            _, at, domain = recipient.address.rpartition("@")
            if at and domain:
                found[self._recipient_domain(domain)] = None
                if len(found) == MAX_DOMAINS:
                    break
        return tuple(found)

    def host_name(self, name: str) -> str | None:
        """A client's greeting name. Laptops are often named after their owners, so it follows `addresses`."""
        if name.startswith("["):
            return self._literal_or_name(name)
        match self.addresses:
            case Addresses.NONE:
                return None
            case Addresses.HASH:
                return self._hash(name)
            case _:
                return clean(name)

    def user(self, name: str) -> Mapping[str, str]:
        """The attribute for an authenticated user: the name in `full`, its hash in `hash`, none else."""
        match self.addresses:
            case Addresses.FULL:
                return {USER_NAME: clean(name)}
            case Addresses.HASH:
                return {USER_HASH: self._hash(name)}
            case _:
                return {}

    def ip(self, host: str) -> str | None:
        """An IP address of a client; a unix socket's path identifies no client and stays."""
        match self.client_ip:
            case ClientIp.FULL:
                return clean(host)
            case ClientIp.NONE:
                return clean(host) if host.startswith("/") else None
            case ClientIp.PREFIX:
                return prefix_of(host)

    def text(self, text: str, limit: int = MAX_VALUE_CHARACTERS) -> str:
        """Free text of a peer: all of it in `full`, otherwise only words recognised as harmless, see `reply_words`.

        The text is cut before it is read, to bound the work, and at double the limit, so that no half of an address is
        left at the cut.
        """
        if self.addresses is _FULL:
            return clean(text, limit)
        if text in _OWN or _EVERYDAY.fullmatch(text) is not None:
            return text[:limit]
        return clean(self._words(text[: 2 * limit]), limit)

    def _in_text(self, mailbox: str) -> str:
        match self.addresses:
            case Addresses.DOMAIN:
                _, _, domain = mailbox.rpartition("@")
                return f"...@{self._literal_or_name(domain) or ''}"
            case Addresses.HASH:
                return self._hash(mailbox.strip('"'))
            case _:
                return HIDDEN

    def _lower_literal_or_name(self, domain: str) -> str | None:
        return self._literal_or_name(domain.lower())

    def _literal_or_name(self, domain: str) -> str | None:
        """A domain, or an address literal (RFC 5321 4.1.3), which is an IP address and follows `client_ip`."""
        if not domain.startswith("["):
            return clean(domain)
        shown = self.ip(domain.strip("[]").removeprefix("IPv6:").removeprefix("ipv6:"))
        return None if shown is None else f"[{shown[: MAX_VALUE_CHARACTERS - 2]}]"

    def _hash(self, text: str) -> str:
        octets = text.lower().encode("utf-8", "surrogatepass")
        return hmac.new(self.hash_key, octets, hashlib.sha256).hexdigest()[:_HASH_DIGITS]


def prefix_of(host: str) -> str | None:
    """The network of an IP address, /24 or /48, as an address; None for what is no IP address, a path aside."""
    if host.startswith("/"):
        return clean(host)
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    length = 24 if address.version == 4 else 48
    return str(ipaddress.ip_network((address, length), strict=False).network_address)
