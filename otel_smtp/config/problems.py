"""Messages about invalid settings: source, key, value, what is allowed."""

from collections.abc import Sequence
from typing import NamedTuple


class Problem(NamedTuple):
    """One invalid setting.

    Attributes:
        source: where it was set: a file, an environment variable, a flag.
        key: path of the setting; "" if the source as a whole is wrong.
        value: as it was written; None if it is missing, unknown or a secret.
        message: what is wrong, and what is allowed.
    """

    source: str
    key: str
    value: object
    message: str

    def __str__(self) -> str:
        where = f"{self.source}: {self.key}" if self.key else self.source
        return (
            f"{where} = {quoted(self.value)}: {self.message}" if self.value is not None else f"{where}: {self.message}"
        )


class SettingsError(Exception):
    """The settings are invalid; `problems` has everything that was found."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def quoted(value: object) -> str:
    """A value as written in TOML, bounded in length."""
    match value:
        case bool():
            text = "true" if value else "false"
        case str():
            text = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
            text = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
        case list() | tuple():
            text = "[" + ", ".join(quoted(item) for item in value) + "]"
        case dict():
            text = "{ ... }"
        case _:
            text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def unknown_key(word: str, known: Sequence[str]) -> str:
    """A hint for an unknown key."""
    import difflib  # only an error needs it

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"unknown key; did you mean {near[0]}?" if near else f"unknown key; known are {', '.join(known)}"
