"""The store in one directory of this machine, owned by one process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from otel_smtp.spool import operators
from otel_smtp.spool.embedded.store import EmbeddedStore
from otel_smtp.spool.messages import SpoolError
from otel_smtp.spool.operators import Answer

__all__ = ["EmbeddedStore", "ask", "control_path", "to_be_moved"]


def control_path(directory: Path) -> Path:
    """Where the process that owns a spool hears operators' commands."""
    return directory / "control"


async def ask(directory: Path, request: Answer, *, max_age_seconds: float) -> AsyncIterator[Answer]:
    """Have a command done by the gateway that owns the spool, or, where none runs, here.

    Raises:
        SpoolError: what went wrong.
    """
    await asyncio.to_thread(_check_is_spool, directory)
    answers = operators.ask(
        control_path(directory),
        request,
        max_age_seconds=max_age_seconds,
        here=lambda: EmbeddedStore(directory, is_index_trusted=request.get("command") != "rebuild"),
    )
    async for answer in answers:
        yield answer


def to_be_moved(directory: Path) -> EmbeddedStore:
    """A spool whose mail is moved into another store; not opened yet.

    Raises:
        SpoolError: there is none.
    """
    _check_is_spool(directory)
    return EmbeddedStore(directory, moves_out=True)


def _check_is_spool(directory: Path) -> None:
    """A store must have been here, of this version or the first: a question does not make one."""
    try:
        is_there = all((directory / name).is_dir() for name in ("log", "large")) or (directory / "spool.db").is_file()
    except OSError as error:  # others may not even look into it
        raise SpoolError(f"{directory}: {error.strerror}") from error
    if not is_there:
        raise SpoolError(f"{directory}: there is no spool")
