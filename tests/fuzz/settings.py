"""Target: settings. The input is the text of a settings file.

Claimed: `load` gives settings or raises `SettingsError`, nothing else; what it says of each problem is one line of
printable text and shows no password; what it takes can be shown.

A text that names a file by its full path is passed over: what other files hold is not the input's business.
"""

import re
import tomllib
from typing import Final

from otel_smtp.config.loading import load
from otel_smtp.config.problems import SettingsError

# A path that is absolute would be opened.
_ELSEWHERE: Final = re.compile(r"[/~]")


def run(data: bytes) -> None:
    """Load one document."""
    try:
        document = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
        return
    if _names_files(document):
        return
    try:
        load(values=document, environ={}, file_limit=1024)
    except SettingsError as error:
        refused = error
    else:
        return
    assert refused.problems
    for problem in refused.problems:
        assert str(problem).isprintable(), f"unprintable: {str(problem)!r}"
        assert "hunter2" not in str(problem) or not _holds_secret(problem.key), "a secret is shown"


def _names_files(value: object) -> bool:
    match value:
        case dict():
            return any(_is_file(key, item) or _names_files(item) for key, item in value.items())
        case list():
            return any(_names_files(item) for item in value)
        case _:
            return False


def _is_file(key: str, value: object) -> bool:
    return (
        key.endswith(("file", "path", "directory", "certificate", "key", "ca", "users", "address"))
        and isinstance(value, str)
        and _ELSEWHERE.match(value) is not None
    )


def _holds_secret(key: str) -> bool:
    return key.rpartition(".")[2] in ("password", "client_secret", "hash_key")
