"""Addresses in settings: listen addresses, networks, URLs, and mail addresses."""

import re
from collections.abc import Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    collapse_addresses,
    ip_address,
    ip_network,
)
from typing import Any, Final

import msgspec

from otel_smtp.config.values import BadValue, Given, text_of
from otel_smtp.observing import Endpoint
from otel_smtp.smtp.paths import is_mailbox
from otel_smtp.smtp.states import TlsMode

Network = IPv4Network | IPv6Network

LOOPBACK_NETWORKS: Final[tuple[Network, ...]] = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))

_HOST_NAME: Final = re.compile(r"(?=.{1,253}\Z)(?!.*\.\.)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
HOST_NAME_PATTERN: Final = r"(?=.{1,253}\Z)(?!.*\.\.)[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?"
"""A domain that is valid in EHLO and Received (RFC 5321 4.1.2 Domain, length 4.5.3.1.2)."""


def literal_address(host: str) -> IPv4Address | IPv6Address | None:
    """`host` as an IP address; None if it is a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def is_loopback_host(host: str) -> bool:
    """Whether `host` can only be this machine: a loopback address, or localhost (RFC 6761 6.3)."""
    address = literal_address(host)
    if address is not None:
        return address.is_loopback
    return host.lower().rstrip(".") == "localhost"


def reached_host(host: str) -> str:
    """The host that a connection to `host` reaches: an address in canonical form; this machine for 0.0.0.0 or [::]."""
    address = literal_address(host)
    if address is None:
        return host
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return str(address)


def is_local(endpoint: Endpoint) -> bool:
    """Whether only this machine can reach `endpoint`: loopback, or a unix socket."""
    return endpoint.port is None or is_loopback_host(endpoint.host)


def _host(text: str) -> str:
    if literal_address(text) is None and not _HOST_NAME.fullmatch(text):
        raise BadValue
    # Digits and dots that are no address: inet_aton would read "127.0.1" as 127.0.0.1, and "127.0.0.300" as a name.
    if literal_address(text) is None and re.fullmatch(r"[0-9.]+", text):
        raise BadValue
    return text


def _host_and_port(text: str, *, lowest_port: int) -> tuple[str, int | None]:
    """Split `host`, `host:port`, `[v6]` or `[v6]:port`."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%A-Za-z0-9]+)\]|([^:\[\]/\s]+))(?::([0-9]{1,5}))?", text)
    if match is None:
        raise BadValue
    if match[1] is not None and not isinstance(literal_address(match[1]), IPv6Address):
        raise BadValue
    port = int(match[3]) if match[3] is not None else None
    if port is not None and not lowest_port <= port <= 65535:
        raise BadValue
    return match[1] or _host(match[2]), port


class ListenAddress(msgspec.Struct, frozen=True):
    """Where to listen: host and port (0: the kernel chooses), or a unix socket."""

    may_be_unix: bool = True
    may_be_off: bool = False

    @property
    def allowed(self) -> str:
        unix = ', "unix:/path"' if self.may_be_unix else ""
        off = ', "off"' if self.may_be_off else ""
        return f'"host:port", "[::1]:port"{unix}{off} (port 0 to 65535; 0: the kernel chooses)'

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1}

    def parse(self, given: Given) -> Endpoint | None:
        text = text_of(given).strip()
        if self.may_be_off and text == "off":
            return None
        if self.may_be_unix and text.startswith("unix:"):
            path = text.removeprefix("unix:")
            # sun_path has 108 octets on Linux including the final NUL, 104 on the BSDs and macOS.
            if not path or "\0" in path or len(path.encode()) > 103:
                raise BadValue
            return Endpoint(str(given.directory / path) if given.directory is not None else path)
        host, port = _host_and_port(text, lowest_port=0)
        if port is None:
            raise BadValue
        return Endpoint(host, port)

    def show(self, value: Endpoint | None) -> str:
        if value is None:
            return "off"
        return str(value) if value.port is not None else f"unix:{value.host}"


class NetworkKind(msgspec.Struct, frozen=True):
    """A network, or one address."""

    allowed: str = 'a network such as "10.0.0.0/8", "fd00::/8", or an address'

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^\s*[0-9A-Fa-f:.]+(/[0-9]{1,3})?\s*$"}

    def parse(self, given: Given) -> Network:
        text = text_of(given).strip()
        try:
            return ip_network(text)
        except ValueError:
            pass
        try:
            meant = ip_network(text, strict=False)
        except ValueError:
            raise BadValue from None
        # "10.1.2.3/8" may mean the host or the network. A wrong guess would open a relay to sixteen million hosts.
        raise BadValue(f"host bits are set; the network is {meant}, the single address {text.partition('/')[0]}")

    def show(self, value: Network) -> str:
        return str(value)


def covers_everybody(networks: Iterable[Network]) -> bool:
    """Whether strangers belong to some networks: they hold a quarter of all IPv4 addresses, or a quarter of those that
    IPv6 gives out (2000::/3, RFC 4291 2.4), in whatever parts they are written. No site is as large."""
    four = [network for network in networks if isinstance(network, IPv4Network)]
    six = [network for network in networks if isinstance(network, IPv6Network)]
    given_out = IPv6Network("2000::/3")
    return (
        sum(network.num_addresses for network in collapse_addresses(four)) >= 2**30
        or sum(
            min(network.num_addresses, given_out.num_addresses)
            for network in collapse_addresses(six)
            if network.overlaps(given_out)
        )
        >= given_out.num_addresses // 4
    )


class UpstreamUrl(msgspec.Struct, frozen=True):
    """An upstream's address and protocol.

    Attributes:
        tls: OFF for smtp:// and lmtp://, STARTTLS (required) for smtp+starttls://, IMPLICIT for smtps://.
        endpoint: host and port, or the path of a unix socket (lmtp only).
    """

    scheme: str
    tls: TlsMode
    protocol: str  # "smtp" or "lmtp"
    endpoint: Endpoint

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, so that clear text does not cross a network."""
        return is_local(self.endpoint)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.endpoint}"


_SCHEMES: Final[dict[str, tuple[TlsMode, str, int]]] = {
    "smtp": (TlsMode.OFF, "smtp", 25),  # RFC 5321 4.5.4.2
    "smtp+starttls": (TlsMode.STARTTLS, "smtp", 587),  # submission, RFC 6409 3.1
    "smtps": (TlsMode.IMPLICIT, "smtp", 465),  # submissions, RFC 8314 7.3
    "lmtp": (TlsMode.OFF, "lmtp", 24),  # RFC 2033 forbids 25 and registers no other; LMTP servers use 24
}


_SCHEME_FORMS: Final = {
    "smtp": "smtp://host:port (clear)",
    "smtp+starttls": "smtp+starttls://host:port (TLS required and verified)",
    "smtps": "smtps://host:port (implicit TLS)",
    "lmtp": "lmtp://host:port, lmtp:///path/of/socket",
}


class UpstreamUrlKind(msgspec.Struct, frozen=True):
    """The URL of an SMTP or LMTP server."""

    schemes: tuple[str, ...] = tuple(_SCHEMES)

    @property
    def allowed(self) -> str:
        return ", ".join(_SCHEME_FORMS[scheme] for scheme in self.schemes)

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^\\s*({'|'.join(map(re.escape, self.schemes))})://"}

    def parse(self, given: Given) -> UpstreamUrl:
        text = text_of(given).strip()
        scheme, separator, rest = text.partition("://")
        scheme = scheme.lower()
        if not separator or scheme not in self.schemes:
            raise BadValue
        tls, protocol, default_port = _SCHEMES[scheme]
        if "@" in rest:
            raise BadValue(
                "logs and process lists show URLs, so user and password do not belong there; "
                "set username and password_file"
            )
        if rest.startswith("/"):
            if protocol != "lmtp" or len(rest) < 2 or "\0" in rest or len(rest.encode()) > 103:
                raise BadValue
            return UpstreamUrl(scheme, tls, protocol, Endpoint(rest))
        host, port = _host_and_port(rest.removesuffix("/"), lowest_port=1)
        return UpstreamUrl(scheme, tls, protocol, Endpoint(host, port if port is not None else default_port))

    def show(self, value: UpstreamUrl) -> str:
        return str(value)


class ReceiverUrlKind(msgspec.Struct, frozen=True):
    """A URL for requests: https, or http on this machine."""

    allowed: str = "an https URL, or http on this machine, without user, password and fragment"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^\s*https?://[^\s/?#@]+(?:[/?][^\s#]*)?\s*$"}

    def parse(self, given: Given) -> str:
        text = text_of(given).strip()
        if re.fullmatch(r"https?://[^\s/?#@]+(?:[/?][!-~]*)?", text) is None or "#" in text:
            raise BadValue
        host = url_endpoint(text).host
        if text.startswith("http://") and not is_loopback_host(host):
            raise BadValue("other machines could read and change what is sent in clear")
        return text

    def show(self, value: str) -> str:
        return value


def url_endpoint(url: str) -> Endpoint:
    """Host and port of an http or https URL.

    Raises:
        BadValue: they are none.
    """
    scheme, _, rest = url.partition("://")
    host, port = _host_and_port(re.split("[/?]", rest, maxsplit=1)[0], lowest_port=1)
    return Endpoint(host, port if port is not None else 443 if scheme == "https" else 80)


class MailboxKind(msgspec.Struct, frozen=True):
    """One mail address, ASCII, since every upstream must accept it; "" is none."""

    allowed: str = 'a mail address such as "relay@example.com"'

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": "^(?:[^@]+@[^@]+)?$"}

    def parse(self, given: Given) -> str:
        text = text_of(given).strip()
        if text and (not text.isascii() or not is_mailbox(text)):
            raise BadValue
        return text

    def show(self, value: str) -> str:
        return value


class AddressPattern(msgspec.Struct, frozen=True):
    """A pattern of senders or recipients for a route: `*` stands for any text, `?` for one character.

    The null path is written "<>" and becomes "", as in an envelope. Brackets are not allowed, since matching would read
    them as sets of characters; so a pattern cannot match an address literal alone.
    """

    allowed: str = (
        'a pattern such as "*@example.com", "*@*.example.com", "alice@example.com", "*"; "<>" is the null path'
    )

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1}

    def parse(self, given: Given) -> str:
        text = text_of(given).strip()
        if text == "<>":
            return ""
        if not text or re.search(r"[\x00-\x20\x7f\[\]]", text) or text.count("@") > 1:
            raise BadValue
        if text != "*" and ("@" not in text or text.startswith("@") or text.endswith("@")):
            raise BadValue
        return text

    def show(self, value: str) -> str:
        return value or "<>"
