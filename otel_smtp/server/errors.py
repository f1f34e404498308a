"""Errors about a listener's files, importable without the libraries that read them."""

from pathlib import Path


class UsersFileError(Exception):
    """The users file cannot be used; names file and line, never the hash."""

    def __init__(self, path: Path, line_number: int | None, problem: str) -> None:
        super().__init__(f"{path}{'' if line_number is None else f', line {line_number}'}: {problem}")
        self.path = path
        self.line_number = line_number
