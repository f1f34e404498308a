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
    """The socket on which the process that owns a spool listens for operators' commands."""
    return directory / "control"


async def ask(directory: Path, request: Answer, *, max_age_seconds: float) -> AsyncIterator[Answer]:
    """Let the gateway that owns the spool run a command, or run it here if there is none.

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
    """The spool whose mail is to be moved to another store, not opened yet.

    Raises:
        SpoolError: there is none.
    """
    _check_is_spool(directory)
    return EmbeddedStore(directory, moves_out=True)


def _check_is_spool(directory: Path) -> None:
    """Require an existing store, of this or the first version: a query must not create one."""
    try:
        is_there = all((directory / name).is_dir() for name in ("log", "large")) or (directory / "spool.db").is_file()
    except OSError as error:  # other users may not even list it
        raise SpoolError(f"{directory}: {error.strerror}") from error
    if not is_there:
        raise SpoolError(f"{directory}: there is no spool")
