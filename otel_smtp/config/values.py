"""Kinds of values: text, numbers, durations, sizes, paths, lists; see also `addresses`.

A `ValueKind` names the allowed values (for error messages), reads a value, and shows it. A value is either typed, from
TOML, or text, from the environment or a flag; `parse` takes both, so `recipients = 50` and
`OTELSMTP_LIMITS__RECIPIENTS=50` mean the same.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import msgspec

MIB: Final = 1024 * 1024
KIB: Final = 1024
MINUTE: Final = 60.0
HOUR: Final = 3600.0
DAY: Final = 86400.0


class BadValue(ValueError):
    """A value that its kind does not allow; the message, if any, is added to the kind's `allowed`."""


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
    """One kind of value."""

    @property
    def allowed(self) -> str:
        """The allowed values, in words that follow "allowed: "."""
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
        """The JSON Schema of a value in a TOML file, for editors; `parse` may refuse more."""
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


def text_of(given: Given) -> str:
    """The text that was given.

    Raises:
        BadValue: it is something else.
    """
    if not isinstance(given.value, str):
        raise BadValue
    return given.value


def _whole(pattern: str) -> str:
    """A pattern as JSON Schema wants it: ECMA 262 has no `\\Z`, and matches a part unless it is anchored."""
    return f"^(?:{pattern.replace(chr(92) + 'Z', '$')})$"


class Text(msgspec.Struct, frozen=True):
    """Text that matches `pattern` as a whole."""

    allowed: str = "text without control characters"
    pattern: str = r"[^\x00-\x1f\x7f]+"

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": _whole(self.pattern)}

    def parse(self, given: Given) -> str:
        text = text_of(given)
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
    """A whole number; None if "off" is allowed and given."""

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
    """Seconds as a number, or text such as "30s" and "5d"; None if "off" is allowed and given."""

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
            # In a file, a text without a unit has more likely a forgotten unit than seconds.
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
    """A number per period."""

    amount: int
    period_seconds: float


_RATE: Final = re.compile(r"([0-9]{1,9})\s*/\s*(s|m|h|d)")


class RateKind(msgspec.Struct, frozen=True):
    """A rate per second, minute, hour or day."""

    allowed: str = 'a whole number, at least 1, per second, minute, hour or day, as "5/s", "30/m", "500/h", "10000/d"'

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": r"^\s*[0-9]{1,9}\s*/\s*(s|m|h|d)\s*$"}

    def parse(self, given: Given) -> Rate:
        match = _RATE.fullmatch(text_of(given).strip())
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
    """Octets as a number, or text such as "25MiB"; None if "off" is allowed and given."""

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
        text = text_of(given)
        if text not in self.words:
            raise BadValue
        return self.make(text)

    def show(self, value: str) -> str:
        return str(value)


class FilePath(msgspec.Struct, frozen=True):
    """A file or directory. In a settings file a relative path is relative to that file.

    Attributes:
        may_be_empty: "" means not set; elsewhere it is more likely a variable that was not filled in.
    """

    allowed: str = "a path"
    may_be_empty: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": int(not self.may_be_empty)}

    def parse(self, given: Given) -> Path | None:
        text = text_of(given)
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
        text = text_of(given)
        # NUL and line ends, which no SASL mechanism can carry, are signs of a wrong file (RFC 4616 2).
        if any(octet in text for octet in "\0\r\n") or re.fullmatch(self.pattern, text) is None:
            raise BadValue
        return Secret(text)

    def show(self, value: Secret) -> str:
        return "***"


class Many(msgspec.Struct, frozen=True):
    """A list. In the environment and in flags, commas separate items; in a file, a single item needs no brackets."""

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
