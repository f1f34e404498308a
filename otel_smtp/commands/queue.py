"""`otel-smtp queue`: the spool as operators see and change it, with the gateway running or not."""

import asyncio
import base64
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

FAILED: Final = 1
WRONG: Final = 2

queue = typer.Typer(help="Look at queued mail, and change what becomes of it.", no_args_is_help=True)

SpoolOption = Annotated[
    Path | None, typer.Option("--spool", metavar="DIR", help="The spool's directory; else the settings say.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One line of JSON for each message.")]
AllOption = Annotated[bool, typer.Option("--all", help="All messages that it can concern.")]
IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="ID...", help="Which messages; - reads ids, one a line.")
]

DEFAULT_MAX_AGE_SECONDS: Final = 5 * 86400.0


@queue.command("list")
def list_(context: typer.Context, spool: SpoolOption = None, as_json: JsonOption = False) -> None:
    """List what is queued, the oldest first, and why it is still there."""

    async def work(answers: AsyncIterator[Any]) -> None:
        if as_json:
            async for answer in answers:
                _print_row(answer, as_json=True)
            return
        from rich.console import Console

        from otel_smtp.commands.terminal.listing import Listing

        console = Console(highlight=False)
        listing = Listing(width=console.width if console.is_terminal else None)
        lines = listing.heading()
        async for answer in answers:
            for line in (*lines, *listing.lines(answer)):
                console.print(line, soft_wrap=not console.is_terminal)
            lines = ()
        for line in listing.summary():
            console.print(line, soft_wrap=not console.is_terminal)

    _do(context, spool, {"command": "list"}, work)


@queue.command()
def shape(
    context: typer.Context,
    by: Annotated[str, typer.Option("--by", metavar="domain|sender|reason", help="What to count by.")] = "domain",
    spool: SpoolOption = None,
) -> None:
    """Show how old the mail is: for each recipient domain, for each sender's, or for each reason to wait."""
    from rich.console import Console

    from otel_smtp.commands.terminal.listing import Grouping, Shape

    if by not in list(Grouping):
        typer.echo(f"otel-smtp queue shape: --by {by}: allowed: {', '.join(Grouping)}", err=True)
        raise typer.Exit(WRONG)
    drawn = Shape(Grouping(by))

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            drawn.add(answer)

    _do(context, spool, {"command": "list"}, work)
    Console(highlight=False).print(drawn.table())


@queue.command()
def show(
    context: typer.Context,
    message: Annotated[str, typer.Argument(metavar="ID", help="Which message.")],
    content: Annotated[bool, typer.Option("--content", help="Its header block and body too, on stdout.")] = False,
    spool: SpoolOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one message: its recipients, their last replies, its trace."""

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            if "content" in answer:
                sys.stdout.flush()
                sys.stdout.buffer.write(base64.b64decode(answer["content"]))
            else:
                _print_row(answer, as_json=as_json)

    _do(context, spool, {"command": "export" if content else "show", "ids": [message]}, work)


def _changing(command: str) -> Callable[..., None]:
    """The command that changes messages in the way of this name."""

    def change(
        context: typer.Context,
        ids: IdsArgument = None,
        every: AllOption = False,
        spool: SpoolOption = None,
        as_json: JsonOption = False,
    ) -> None:
        _change(context, command, ids, every=every, spool=spool, as_json=as_json)

    return change


for _name, _help in {
    "retry": "Attempt messages now; how many at once is still the upstream's window.",
    "hold": "Keep messages from being attempted; they do not age meanwhile.",
    "release": "Let held messages go on.",
    "expire": "Give messages up: they go back to their senders, when a gateway runs.",
    "reset": "Treat messages as if they had just arrived: attempts and age begin anew.",
}.items():
    queue.command(_name, help=_help)(_changing(_name))


@queue.command()
def delete(
    context: typer.Context, ids: IdsArgument = None, every: AllOption = False, spool: SpoolOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask; needed with --all.")] = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Remove messages. Nobody is told; their recipients are counted as removed."""
    if every and not yes:
        typer.echo("otel-smtp queue delete: --all removes everything that is queued: add --yes to mean it", err=True)
        raise typer.Exit(WRONG)
    _change(context, "delete", ids, every=every, spool=spool, as_json=as_json)


@queue.command()
def export(
    context: typer.Context,
    ids: IdsArgument = None,
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Where the files go.")] = Path(),
    every: AllOption = False,
    spool: SpoolOption = None,
) -> None:
    """Write messages to files: ID.eml, as they would be sent, and ID.json, their envelope. The queue keeps them."""
    from otel_smtp.commands.terminal.listing import json_line

    to.mkdir(parents=True, exist_ok=True)
    chosen = _every_id(context, spool) if every else _given(ids)

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            name = answer["queue_id"]
            if "content" in answer:
                with (to / f"{name}.eml").open("ab") as file:
                    file.write(base64.b64decode(answer["content"]))
            else:
                (to / f"{name}.json").write_text(json_line(answer) + "\n", encoding="utf-8")
                (to / f"{name}.eml").write_bytes(b"")
                typer.echo(str(to / f"{name}.eml"))

    if chosen:
        _do(context, spool, {"command": "export", "ids": chosen}, work)


@queue.command()
def counts(context: typer.Context, spool: SpoolOption = None) -> None:
    """Print how much there is of what, and how all recipients that were ever accepted ended, as JSON."""

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            _print_row(answer, as_json=True)

    _do(context, spool, {"command": "counts"}, work)


# ----------------------------------------------------------------------------------------------------------------


def _print_row(row: dict[str, Any], *, as_json: bool) -> None:
    from otel_smtp.commands.terminal.listing import details, json_line

    if as_json:
        typer.echo(json_line(row))
        return
    from rich.console import Console

    Console(highlight=False).print(details(row))


def _change(
    context: typer.Context, command: str, ids: Sequence[str] | None, *, every: bool, spool: Path | None, as_json: bool
) -> None:
    request: dict[str, Any] = {"command": command}
    if every:
        request["all"] = True
    else:
        request["ids"] = _given(ids)
    changed: list[str] = []
    failed: list[str] = []

    async def work(answers: AsyncIterator[Any]) -> None:
        step: Callable[[], None] | None = None
        async for answer in answers:
            if "messages" in answer:
                step = _progress(command, answer["messages"]) if not as_json else None
                continue
            if as_json:
                _print_row(answer, as_json=True)
            elif "error" in answer:
                typer.echo(f"otel-smtp queue {command}: {answer['error']}", err=True)
            (failed if "error" in answer else changed if answer["changed"] else []).append(answer["queue_id"])
            if step is not None:
                step()

    _do(context, spool, request, work)
    if not as_json:
        done = {"retry": "due now", "hold": "held", "release": "released", "expire": "given up", "delete": "removed"}
        typer.echo(f"{len(changed)} {done.get(command, 'changed')}")
    if failed:
        raise typer.Exit(FAILED)


def _progress(command: str, total: int) -> Callable[[], None] | None:
    """A step of a progress bar, where there is a terminal and the work takes a while."""
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


def _given(ids: Sequence[str] | None) -> list[str]:
    found = [one for given in ids or () for one in ([*sys.stdin.read().split()] if given == "-" else [given])]
    if not found:
        typer.echo("otel-smtp queue: which messages? give ids, - to read them, or --all", err=True)
        raise typer.Exit(WRONG)
    return found


def _every_id(context: typer.Context, spool: Path | None) -> list[str]:
    found: list[str] = []

    async def work(answers: AsyncIterator[Any]) -> None:
        found.extend([answer["queue_id"] async for answer in answers])

    _do(context, spool, {"command": "list"}, work)
    return found


def _do(
    context: typer.Context,
    spool: Path | None,
    request: dict[str, Any],
    work: Callable[[AsyncIterator[Any]], Coroutine[Any, Any, None]],
) -> None:
    """Have a command done, and see to its answers; the exit status is 1 where it fails."""
    from otel_smtp.spool.embedded import ask
    from otel_smtp.spool.messages import SpoolError

    max_age_seconds = DEFAULT_MAX_AGE_SECONDS
    if spool is None:
        settings = context.obj.settings()
        spool, max_age_seconds = settings.spool.directory, settings.spool.max_age
    if spool is None:
        typer.echo("otel-smtp queue: there is no spool: give --spool, or spool.directory in the settings", err=True)
        raise typer.Exit(WRONG)
    try:
        asyncio.run(work(ask(spool, request, max_age_seconds=max_age_seconds)))
    except SpoolError as error:
        typer.echo(f"otel-smtp queue: {error}", err=True)
        raise typer.Exit(FAILED) from None
    except BrokenPipeError:
        raise typer.Exit(FAILED) from None
