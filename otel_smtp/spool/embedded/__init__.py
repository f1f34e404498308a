"""The store in one directory of this machine, owned by one process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from otel_smtp.spool import operators
from otel_smtp.spool.embedded.store import EmbeddedStore
from otel_smtp.spool.messages import SpoolError
from otel_smtp.spool.operators import Answer

__all__ = ["EmbeddedStore", "ask", "control_path"]


def control_path(directory: Path) -> Path:
    """Where the process that owns a spool hears operators' commands."""
    return directory / "control"


async def ask(directory: Path, request: Answer, *, max_age_seconds: float) -> AsyncIterator[Answer]:
    """Have a command done by the gateway that owns the spool, or, where none runs, here.

    Raises:
        SpoolError: what went wrong.
    """
    if not await asyncio.to_thread(_is_spool, directory):
        raise SpoolError(f"{directory}: there is no spool")
    answers = operators.ask(
        control_path(directory),
        request,
        max_age_seconds=max_age_seconds,
        here=lambda: EmbeddedStore(directory, is_index_trusted=request.get("command") != "rebuild"),
    )
    async for answer in answers:
        yield answer


def _is_spool(directory: Path) -> bool:
    """Whether a store has been here, of this version or the first: a question must not make one."""
    return all((directory / name).is_dir() for name in ("log", "large")) or (directory / "spool.db").is_file()
