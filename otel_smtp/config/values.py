"""How the value of a setting is written: durations, sizes, addresses, networks, upstream URLs.

A `ValueKind` knows three things about a value: what is allowed (for error messages), how to read it, and how to show
it. A value comes either typed, from TOML, or as text, from the environment or a flag; `parse` takes both, so that
`recipients = 50` and `OTELSMTP_LIMITS__RECIPIENTS=50` mean the same.
"""

import math
import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from otel_smtp.observing import Endpoint
from otel_smtp.smtp.paths import is_mailbox
from otel_smtp.smtp.states import TlsMode

Network = IPv4Network | IPv6Network

LOOPBACK_NETWORKS: Final[tuple[Network, ...]] = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))

MIB: Final = 1024 * 1024
KIB: Final = 1024
MINUTE: Final = 60.0
HOUR: Final = 3600.0
DAY: Final = 86400.0


class BadValue(ValueError):
    """A value that its kind does not allow; the message, if any, adds to the kind's own `allowed`."""


class Given(msgspec.Struct, frozen=True):
    """A value as an operator gave it.

    Attributes:
        value: as TOML typed it, or text.
        source: where it was set, for messages: a file's path, "environment OTELSMTP_X", "--set x".
        is_text: from the environment or a flag, so that numbers and lists are text.
        directory: base of a relative path.
        layer: of two sources, the higher one wins.
    """

    value: object
    source: str
    is_text: bool = False
    directory: Path | None = None
    layer: int = 0


class ValueKind(Protocol):
    """How one kind of value is written."""

    @property
    def allowed(self) -> str:
        """What is allowed, in words that follow "allowed: "."""
        ...

    def parse(self, given: Given) -> Any:
        """Read a value.

        Raises:
            BadValue: it is not allowed.
        """
        ...

    def show(self, value: Any) -> str:
        """The value as it would be written."""
        ...

    @property
    def schema(self) -> dict[str, Any]:
        """What editors can know of a value in a TOML file, as JSON Schema; `parse` has the last word."""
        ...


class Secret:
    """A password or key that no log, traceback or table shows by accident."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The secret itself, for the code that sends it."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


def _as_text(given: Given) -> str:
    if not isinstance(given.value, str):
        raise BadValue
    return given.value


def _whole(pattern: str) -> str:
    """A pattern as JSON Schema wants it: ECMA 262 has no `\\Z`, and looks for a part unless told otherwise."""
    return f"^(?:{pattern.replace(chr(92) + 'Z', '$')})$"


# Plain values -------------------------------------------------------------------------------------------------


class Text(msgspec.Struct, frozen=True):
    """Text that matches `pattern` as a whole."""

    allowed: str = "text without control characters"
    pattern: str = r"[^\x00-\x1f\x7f]+"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": _whole(self.pattern)}

    def parse(self, given: Given) -> str:
        text = _as_text(given)
        if re.fullmatch(self.pattern, text) is None:
            raise BadValue
        return text

    def show(self, value: str) -> str:
        return value


class Boolean(msgspec.Struct, frozen=True):
    """true or false; in the environment also 1, 0, yes, no, on, off, as is usual there."""

    allowed: str = "true or false"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}

    def parse(self, given: Given) -> bool:
        if isinstance(given.value, bool):
            return given.value
        if given.is_text:
            match str(given.value).strip().lower():
                case "true" | "1" | "yes" | "on":
                    return True
                case "false" | "0" | "no" | "off":
                    return False
        raise BadValue

    def show(self, value: bool) -> str:
        return "true" if value else "false"


class Integer(msgspec.Struct, frozen=True):
    """A whole number; None where "off" is allowed and given."""

    minimum: int = 1
    maximum: int = 2**31 - 1
    may_be_off: bool = False

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.minimum} to {self.maximum}" + (', or "off"' if self.may_be_off else "")

    @property
    def schema(self) -> dict[str, Any]:
        number = {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}
        return {"anyOf": [number, {"const": "off"}]} if self.may_be_off else number

    def parse(self, given: Given) -> int | None:
        value = given.value
        if self.may_be_off and value == "off":
            return None
        if given.is_text and isinstance(value, str) and re.fullmatch(r"[ \t]*-?[0-9]{1,18}[ \t]*", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not self.minimum <= value <= self.maximum:
            raise BadValue
        return value

    def show(self, value: int | None) -> str:
        return "off" if value is None else str(value)


_DURATION_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": MINUTE, "h": HOUR, "d": DAY}
_DURATION: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)\s*(ms|s|m|h|d)?")


def duration_text(seconds: float) -> str:
    """Seconds as people write a duration: "90s", "5m", "4h", "250ms"."""
    for unit, factor in (("d", DAY), ("h", HOUR), ("m", MINUTE)):
        if seconds >= factor and seconds % factor == 0:
            return f"{seconds / factor:.0f}{unit}"
    number, unit = (seconds * 1000, "ms") if 0 < seconds < 1 else (seconds, "s")
    return f"{number:.3f}".rstrip("0").rstrip(".") + unit


class Duration(msgspec.Struct, frozen=True):
    """Seconds as a number, or text such as "30s" and "5d"; None where "off" is allowed and given."""

    minimum: float = 0.001
    maximum: float = 365 * DAY
    may_be_off: bool = False

    @property
    def allowed(self) -> str:
        off = ', or "off"' if self.may_be_off else ""
        return (
            f'seconds as a number or text such as "30s", "5m", "4h", "5d", '
            f"from {duration_text(self.minimum)} to {duration_text(self.maximum)}{off}"
        )

    @property
    def schema(self) -> dict[str, Any]:
        number = {"type": "number", "minimum": self.minimum, "maximum": self.maximum}
        text = {"type": "string", "pattern": r"^\s*[0-9]{1,12}(\.[0-9]{1,9})?\s*(ms|s|m|h|d)\s*$"}
        return {"anyOf": [number, text, *([{"const": "off"}] if self.may_be_off else [])]}

    def parse(self, given: Given) -> float | None:
        value = given.value
        if self.may_be_off and value == "off":
            return None
        if isinstance(value, str):
            match = _DURATION.fullmatch(value.strip())
            # In a file, text without a unit is more likely a forgotten unit than seconds.
            if match is None or (match[2] is None and not given.is_text):
                raise BadValue
            value = float(match[1]) * _DURATION_UNITS[match[2] or "s"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise BadValue
        if not self.minimum <= value <= self.maximum:
            raise BadValue
        return float(value)

    def show(self, value: float | None) -> str:
        return "off" if value is None else duration_text(value)


class Rate(NamedTuple):
    """So many in each period."""

    amount: int
    period_seconds: float


_RATE: Final = re.compile(r"([0-9]{1,9})\s*/\s*(s|m|h|d)")


class RateKind(msgspec.Struct, frozen=True):
    """So many per second, minute, hour or day."""

    allowed: str = 'a whole number, at least 1, per second, minute, hour or day, as "5/s", "30/m", "500/h", "10000/d"'

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^\s*[0-9]{1,9}\s*/\s*(s|m|h|d)\s*$"}

    def parse(self, given: Given) -> Rate:
        match = _RATE.fullmatch(_as_text(given).strip())
        if match is None or not int(match[1]):
            raise BadValue
        return Rate(int(match[1]), _DURATION_UNITS[match[2]])

    def show(self, value: Rate) -> str:
        unit = next(unit for unit, seconds in _DURATION_UNITS.items() if seconds == value.period_seconds)
        return f"{value.amount}/{unit}"


_SIZE_UNITS: Final = {"": 1, "B": 1, "KIB": KIB, "MIB": MIB, "GIB": 1024 * MIB, "KB": 1000, "MB": 10**6, "GB": 10**9}
_SIZE: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([A-Za-z]*)")


def size_text(octets: int) -> str:
    """Octets as people write a size: "25MiB", "64KiB", "1500"."""
    for unit, factor in (("GiB", 1024 * MIB), ("MiB", MIB), ("KiB", KIB)):
        if octets >= factor and octets % factor == 0:
            return f"{octets // factor}{unit}"
    return str(octets)


class Size(msgspec.Struct, frozen=True):
    """Octets as a number, or text such as "25MiB"; None where "off" is allowed and given."""

    minimum: int = 1
    maximum: int = 4096 * MIB
    may_be_off: bool = False

    @property
    def allowed(self) -> str:
        off = ', or "off"' if self.may_be_off else ""
        return (
            f'octets as a number or text such as "25MiB", "64KiB", '
            f"from {size_text(self.minimum)} to {size_text(self.maximum)}{off}"
        )

    @property
    def schema(self) -> dict[str, Any]:
        number = {"type": "integer", "minimum": self.minimum, "maximum": self.maximum}
        text = {"type": "string", "pattern": r"^\s*[0-9]{1,12}(\.[0-9]{1,6})?\s*([KkMmGg][Ii]?)?[Bb]\s*$"}
        return {"anyOf": [number, text, *([{"const": "off"}] if self.may_be_off else [])]}

    def parse(self, given: Given) -> int | None:
        value = given.value
        if self.may_be_off and value == "off":
            return None
        if isinstance(value, str):
            match = _SIZE.fullmatch(value.strip())
            factor = _SIZE_UNITS.get(match[2].upper()) if match else None
            if match is None or factor is None or (not match[2] and not given.is_text):
                raise BadValue
            value = int(float(match[1]) * factor)
        if isinstance(value, bool) or not isinstance(value, int) or not self.minimum <= value <= self.maximum:
            raise BadValue
        return value

    def show(self, value: int | None) -> str:
        return "off" if value is None else size_text(value)


class Choice(msgspec.Struct, frozen=True):
    """One word of a closed set; `make` turns it into the enumeration it belongs to."""

    words: tuple[str, ...]
    make: Callable[[str], Any] = str

    @property
    def allowed(self) -> str:
        return ", ".join(self.words)

    @property
    def schema(self) -> dict[str, Any]:
        return {"enum": [str(word) for word in self.words]}

    def parse(self, given: Given) -> Any:
        text = _as_text(given)
        if text not in self.words:
            raise BadValue
        return self.make(text)

    def show(self, value: str) -> str:
        return str(value)


class FilePath(msgspec.Struct, frozen=True):
    """A file or directory. In a settings file a relative path is relative to that file.

    Attributes:
        may_be_empty: "" is none, as if it were not set; elsewhere it is more likely a variable that was not filled in.
    """

    allowed: str = "a path"
    may_be_empty: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": int(not self.may_be_empty)}

    def parse(self, given: Given) -> Path | None:
        text = _as_text(given)
        if not text and self.may_be_empty:
            return None
        if not text or "\0" in text:
            raise BadValue
        path = Path(text)
        if text.startswith("~"):
            try:
                path = path.expanduser()
            except RuntimeError:
                raise BadValue("no such home directory") from None
        return path if given.directory is None else given.directory / path

    def show(self, value: Path) -> str:
        return str(value)


class SecretText(msgspec.Struct, frozen=True):
    """A secret, one line that matches `pattern` as a whole; see `Secret`."""

    allowed: str = "text of one line"
    pattern: str = ".+"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": _whole(self.pattern)}

    def parse(self, given: Given) -> Secret:
        text = _as_text(given)
        # NUL and line ends, which no SASL mechanism can carry, are signs of a wrong file (RFC 4616 2).
        if any(octet in text for octet in "\0\r\n") or re.fullmatch(self.pattern, text) is None:
            raise BadValue
        return Secret(text)

    def show(self, value: Secret) -> str:
        return "***"


class Many(msgspec.Struct, frozen=True):
    """A list. In the environment and in flags its items stand between commas; in a file, one may stand alone."""

    item: ValueKind
    may_be_empty: bool = True

    @property
    def allowed(self) -> str:
        return f"a list{'' if self.may_be_empty else ' of at least one'}, each {self.item.allowed}"

    @property
    def schema(self) -> dict[str, Any]:
        items = self.item.schema
        many = {"type": "array", "items": items, "minItems": 0 if self.may_be_empty else 1}
        return {"anyOf": [many, items]} if items.get("type") == "string" else many

    def parse(self, given: Given) -> tuple[Any, ...]:
        items: list[object]
        if isinstance(given.value, list):
            items = given.value
        elif given.is_text and isinstance(given.value, str):
            items = [part.strip() for part in given.value.split(",") if part.strip()]
        elif isinstance(given.value, str):
            items = [given.value]
        else:
            raise BadValue
        if not items and not self.may_be_empty:
            raise BadValue
        return tuple(
            self.item.parse(Given(item, given.source, is_text=given.is_text, directory=given.directory))
            for item in items
        )

    def show(self, value: tuple[Any, ...]) -> str:
        return ", ".join(self.item.show(item) for item in value)


# Addresses ----------------------------------------------------------------------------------------------------

_HOST_NAME: Final = re.compile(r"(?=.{1,253}\Z)(?!.*\.\.)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?")
HOST_NAME_PATTERN: Final = r"(?=.{1,253}\Z)(?!.*\.\.)[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?"
"""A domain as EHLO and Received may name it (RFC 5321 4.1.2 Domain, length 4.5.3.1.2)."""


def literal_address(host: str) -> IPv4Address | IPv6Address | None:
    """`host` as an IP address, None where it is a name."""
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
        text = _as_text(given).strip()
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
        text = _as_text(given).strip()
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


class UpstreamUrl(msgspec.Struct, frozen=True):
    """Where an upstream is, and its protocol.

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
        """Whether it is on this machine, where nobody else can read clear text."""
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
        text = _as_text(given).strip()
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
    """The URL that events are sent to: https, or http on this machine."""

    allowed: str = "an https URL, or http on this machine, without user, password and fragment"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^\s*https?://[^\s/?#@]+(?:[/?][^\s#]*)?\s*$"}

    def parse(self, given: Given) -> str:
        text = _as_text(given).strip()
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
    """One mail address, ASCII: it must be fit for every upstream; or "", which is none."""

    allowed: str = 'a mail address such as "relay@example.com"'

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": "^(?:[^@]+@[^@]+)?$"}

    def parse(self, given: Given) -> str:
        text = _as_text(given).strip()
        if text and (not text.isascii() or not is_mailbox(text)):
            raise BadValue
        return text

    def show(self, value: str) -> str:
        return value


class AddressPattern(msgspec.Struct, frozen=True):
    """Which senders or recipients a route serves: `*` stands for any text, `?` for one character.

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
        text = _as_text(given).strip()
        if text == "<>":
            return ""
        if not text or re.search(r"[\x00-\x20\x7f\[\]]", text) or text.count("@") > 1:
            raise BadValue
        if text != "*" and ("@" not in text or text.startswith("@") or text.endswith("@")):
            raise BadValue
        return text

    def show(self, value: str) -> str:
        return value or "<>"
