"""Asking a queue: the gateway that owns its directory, the directory itself, or the database that several share."""

import asyncio
import contextlib
import getpass
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from otel_smtp.commands.options import FAILED, WRONG, console, fail, global_options
from otel_smtp.config import SpoolTable

if TYPE_CHECKING:
    from otel_smtp.spool.postgresql import PostgresqlStore

WorkOnAnswers = Callable[[AsyncIterator[Any]], Coroutine[Any, Any, None]]


def work_on(context: click.Context, spool: Path | None, request: dict[str, Any], work: WorkOnAnswers) -> None:
    """Run a command on the spool, through the gateway that owns it if one runs, and pass its answers to `work`.

    A failure ends the process with status 1.
    """
    from otel_smtp.spool.messages import SpoolError

    settings = SpoolTable() if spool is not None else global_options(context).settings(needs_upstream=False).spool
    try:
        asyncio.run(work(ask_queue(spool or settings.directory, settings, request)))
    except SpoolError as error:
        fail(FAILED, f"queue: {error}")
    except BrokenPipeError:
        raise SystemExit(FAILED) from None
    except OSError as error:  # of a file that `work` writes
        fail(FAILED, f"queue: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")


def ask_queue(directory: Path | None, settings: SpoolTable, request: dict[str, Any]) -> AsyncIterator[Any]:
    """The answers of a directory's owner, or the database, to a request of `spool.operators`."""
    if directory is not None:
        from otel_smtp.spool.embedded import ask

        if request.get("operator") == "":
            request["operator"] = _login()
        return ask(directory, request, max_age_seconds=settings.max_age)
    if settings.url is None:
        fail(WRONG, "queue: no spool; give --spool, or spool.directory or spool.url in the settings")
    return _ask_database(settings, request)


def _login() -> str:
    """The user that is logged in, even if the process runs as another user, as with sudo."""
    with contextlib.suppress(OSError, KeyError):  # of KeyError, before Python 3.13: a uid without a name
        return os.environ.get("SUDO_USER") or getpass.getuser()
    return f"uid {os.getuid()}"


async def _ask_database(settings: SpoolTable, request: dict[str, Any]) -> AsyncIterator[Any]:
    from otel_smtp.gateway.wiring import shared_store
    from otel_smtp.spool.operators import Operations

    store = shared_store(settings, name="queue", is_gateway=False)
    await store.open()
    try:
        if "operator" in request and not request["operator"]:
            request["operator"] = await store.session_user()
        told = _Told()
        async for answer in Operations(store, told, max_age_seconds=settings.max_age).run(request):
            for deed in told.deeds:
                await store.tell_deed(deed)
            told.deeds.clear()
            yield answer
        for what in told.what:
            await store.tell(what)
    finally:
        await store.close()


class _Told:
    """Notifications for the gateways of a queue."""

    def __init__(self) -> None:
        self.what: list[str] = []
        self.deeds: list[str] = []

    def wake(self, destinations: Sequence[str] = ()) -> None:
        """Something is due."""
        self.what.append("due")

    def look_soon(self) -> None:
        """Something is too old."""
        self.what.append("look")

    def note(self, deed: str) -> None:
        """One of them is to log it."""
        self.deeds.append(deed)

    def note_crashes(self, message_ids: Sequence[str]) -> None:
        """No command takes anything over."""


def ask_database(
    settings: SpoolTable, question: "Callable[[PostgresqlStore], Awaitable[Sequence[Mapping[str, Any]]]]"
) -> Sequence[Mapping[str, Any]]:
    """The answers of a shared queue's database. A failure ends the process with status 1."""
    from otel_smtp.gateway.wiring import shared_store
    from otel_smtp.spool.messages import SpoolError

    async def answer() -> Sequence[Mapping[str, Any]]:
        store = shared_store(settings, name="queue", is_gateway=False)
        await store.open()
        try:
            return await question(store)
        finally:
            await store.close()

    try:
        return asyncio.run(answer())
    except SpoolError as error:
        fail(FAILED, f"queue: {error}")


def shared_queue(context: click.Context, command: str) -> SpoolTable:
    """The settings of a queue that several gateways share. Without one the process ends with status 2."""
    settings = global_options(context).settings(needs_upstream=False).spool
    if settings.url is None:
        fail(WRONG, f"queue {command}: needs spool.url in the settings: a queue that several gateways share")
    return settings


def print_row(row: dict[str, Any], *, as_json: bool) -> None:
    """Print an answer: one line of JSON, or a table."""
    from otel_smtp.commands.terminal.listing import details, json_line

    if as_json:
        click.echo(json_line(row))
        return
    console().print(details(row))


def progress(command: str, total: int) -> Callable[[], None] | None:
    """A function that advances a progress bar; None without a terminal, and for work that is soon done."""
    if total < 500 or not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(command, total=total)
    bar.start()

    def step() -> None:
        bar.advance(task)
        if bar.finished:
            bar.stop()

    return step
