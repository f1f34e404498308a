"""`otel-smtp queue`: operators look at the spool and change it, with a gateway running or not."""

import asyncio
import base64
import contextlib
import dataclasses
import getpass
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from otel_smtp.commands.options import FAILED, WRONG, console, fail, global_options, parse, settings_options
from otel_smtp.config import SpoolTable

if TYPE_CHECKING:
    from otel_smtp.spool.postgresql import PostgresqlStore


def spool_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which spool: by its directory, or by the settings."""
    which = click.option(
        "--spool", type=click.Path(path_type=Path), metavar="DIR",
        help="Directory of the spool, instead of the settings'.",
    )  # fmt: skip
    return which(settings_options(command))


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which messages; one must fit all that is given."""
    for option in (
        click.option("--outcomes", is_flag=True, help="Outcomes that wait for the application, instead of mail."),
        click.option("--older-than", metavar="AGE", help='Only messages that came longer ago, for example "2h".'),
        click.option("--reason", metavar="TEXT", help="Only with this in the last reply to a recipient."),
        click.option(
            "--sender", metavar="ADDRESS", help='Only of this sender, or of "@domain"; "<>" is the null path.'
        ),
        click.option("--domain", metavar="DOMAIN", help="Only with a recipient of this domain."),
    ):
        command = option(command)
    return command


def _chosen(filters: dict[str, str | bool | None]) -> dict[str, Any]:
    """The filters that were given, as the spool understands them."""
    from otel_smtp.config.values import Duration

    wanted: dict[str, Any] = {name: value for name, value in filters.items() if value not in (None, False)}
    if (age := wanted.pop("older_than", None)) is not None:
        wanted["older_than_seconds"] = parse(Duration(), age, "--older-than")
    return wanted


json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per message.")
as_option: Final = click.option(
    "--as", "operator", default="", metavar="NAME",
    help="Who does it, for the log and the trace; default: the login, or with spool.url the database's user.",
)  # fmt: skip
all_option: Final = click.option("--all", "every", is_flag=True, help="All messages that the command applies to.")
ids_argument: Final = click.argument("ids", nargs=-1, metavar="ID...")

WorkOnAnswers = Callable[[AsyncIterator[Any]], Coroutine[Any, Any, None]]


@click.group()
@settings_options
def queue() -> None:
    """Show queued mail and act on it.

    It makes no difference whether a gateway runs.

    ID... are queue ids; - reads them from standard input, one per line.
    """


@queue.command("list")
@filter_options
@spool_option
@json_option
@click.pass_context
def list_(context: click.Context, /, *, spool: Path | None, as_json: bool, **filters: str | bool | None) -> None:
    """List messages and why they wait.

    The oldest come first.
    """
    _do(context, spool, {"command": "list", **_chosen(filters)}, _list_as_json if as_json else _list)


@queue.command()
@click.option("--trace", "trace_id", metavar="ID", help="Trace id, as the final 250 gives it.")
@click.option("--sender", metavar="ADDRESS", help="Sender of the envelope.")
@click.option("--recipient", metavar="ADDRESS", help="One of its recipients.")
@spool_option
@json_option
@click.pass_context
def find(
    context: click.Context,
    *,
    trace_id: str | None,
    sender: str | None,
    recipient: str | None,
    spool: Path | None,
    as_json: bool,
) -> None:
    """Find messages by trace, sender or recipient.

    With several, messages that fit all of them. At most 1000, the oldest first.
    """
    known = {"trace_id": trace_id, "sender": sender, "recipient": recipient}
    if not any(known.values()):
        fail(WRONG, "queue find: give --trace, --sender or --recipient")
    _do(context, spool, {"command": "find", **known}, _list_as_json if as_json else _list)


@queue.command()
@click.option(
    "--by",
    type=click.Choice(["domain", "sender", "reason"]),
    default="domain",
    show_default=True,
    help="Count by recipient domain, sender domain, or reason to wait.",
)
@filter_options
@spool_option
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON per group.")
@click.pass_context
def shape(
    context: click.Context, /, *, by: str, spool: Path | None, as_json: bool, **filters: str | bool | None
) -> None:
    """Count messages by age and domain.

    With --by, by age and sender or reason.
    """
    from otel_smtp.commands.terminal.listing import Grouping, Shape, json_line

    drawn = Shape(Grouping(by))

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            drawn.add(answer)

    _do(context, spool, {"command": "list", **_chosen(filters)}, work)
    if as_json:
        for row in drawn.rows():
            click.echo(json_line(row))
    else:
        console().print(drawn.table())


@queue.command()
@click.argument("message", metavar="ID")
@click.option("--content", is_flag=True, help="Print its header block and body too.")
@spool_option
@json_option
@click.pass_context
def show(context: click.Context, message: str, *, content: bool, spool: Path | None, as_json: bool) -> None:
    """Show a message, its recipients and trace."""

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            if "content" in answer:
                sys.stdout.flush()
                sys.stdout.buffer.write(base64.b64decode(answer["content"]))
            else:
                _print_row(answer, as_json=as_json)

    _do(context, spool, {"command": "export" if content else "show", "ids": [message]}, work)


def _changing(name: str, text: str) -> click.Command:
    """A command that changes messages."""

    @click.command(name, help=f"{text}\n\nWith --all, all messages, or those that fit what is given besides.")
    @ids_argument
    @all_option
    @filter_options
    @spool_option
    @as_option
    @json_option
    @click.pass_context
    def change(
        context: click.Context, /, ids: tuple[str, ...], *, every: bool, spool: Path | None, operator: str,
        as_json: bool, **filters: str | bool | None,
    ) -> None:  # fmt: skip
        wanted = _chosen(filters)
        _change(context, name, ids, wanted, every=every, spool=spool, operator=operator, as_json=as_json)

    return change


for _name, _text in {
    "retry": "Attempt messages now.\n\nHow many at once is limited by the upstream's concurrency.",
    "hold": "Hold messages.\n\nHeld messages are not attempted and do not age.",
    "release": "Release held messages.",
    "expire": "Give messages up.\n\nA running gateway returns them to their senders.",
    "reset": "Reset attempts and age of messages.\n\nThey are treated as if they had just arrived.",
}.items():
    queue.add_command(_changing(_name, _text))


@queue.command()
@ids_argument
@all_option
@click.option("--yes", is_flag=True, help="Confirm --all.")
@filter_options
@spool_option
@as_option
@json_option
@click.pass_context
def delete(
    context: click.Context, /, ids: tuple[str, ...], *, every: bool, yes: bool, spool: Path | None, operator: str,
    as_json: bool, **filters: str | bool | None,
) -> None:  # fmt: skip
    """Delete messages without a bounce.

    Their recipients are counted as removed.
    """
    if every and not yes:
        which = "each that fits" if any(filters.values()) else "every queued message"
        fail(WRONG, f"queue delete: --all deletes {which}; add --yes to confirm")
    wanted = _chosen(filters)
    _change(context, "delete", ids, wanted, every=every, spool=spool, operator=operator, as_json=as_json)


@queue.command()
@ids_argument
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    default=Path(),
    metavar="DIR",
    help="Directory for the files; default: the current one.",
)
@all_option
@spool_option
@click.pass_context
def export(context: click.Context, ids: tuple[str, ...], *, to: Path, every: bool, spool: Path | None) -> None:
    """Copy messages to files.

    ID.eml has the message as it would be sent, ID.json its envelope. The messages stay queued.
    """
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
                click.echo(str(to / f"{name}.eml"))

    if chosen:
        _do(context, spool, {"command": "export", "ids": chosen}, work)


@queue.command()
@spool_option
@click.pass_context
def rebuild(context: click.Context, *, spool: Path | None) -> None:
    """Queue again what is in lost+found/.

    What comes back is held, since it may have been delivered. Where no gateway runs, the index is made again, too.
    """

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            click.echo(answer["told"])

    _do(context, spool, {"command": "rebuild"}, work)


@queue.command()
@spool_option
@click.pass_context
def counts(context: click.Context, *, spool: Path | None) -> None:
    """Print counts as JSON.

    They are the messages by state, and the outcomes of all recipients ever accepted.
    """

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            _print_row(answer, as_json=True)

    _do(context, spool, {"command": "counts"}, work)


# ----------------------------------------------------------------------------------------------------------------


async def _list(answers: AsyncIterator[Any]) -> None:
    from otel_smtp.commands.terminal.listing import Listing

    output = console()
    listing = Listing(width=output.width if output.is_terminal else None)
    lines = listing.heading()
    async for answer in answers:
        for line in (*lines, *listing.lines(answer)):
            output.print(line, soft_wrap=not output.is_terminal)
        lines = ()
    for line in listing.summary():
        output.print(line, soft_wrap=not output.is_terminal)


async def _list_as_json(answers: AsyncIterator[Any]) -> None:
    async for answer in answers:
        _print_row(answer, as_json=True)


def _print_row(row: dict[str, Any], *, as_json: bool) -> None:
    from otel_smtp.commands.terminal.listing import details, json_line

    if as_json:
        click.echo(json_line(row))
        return
    console().print(details(row))


def _change(
    context: click.Context, command: str, ids: Sequence[str], wanted: dict[str, Any], *, every: bool,
    spool: Path | None, operator: str, as_json: bool,
) -> None:  # fmt: skip
    request: dict[str, Any] = {"command": command, "operator": operator}
    if wanted and not every:
        fail(WRONG, f"queue {command}: --domain, --sender, --reason and --older-than choose among --all")
    if every:
        request.update({"all": True, **wanted})
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
                click.echo(f"otel-smtp: queue {command}: {answer['error']}", err=True)
            (failed if "error" in answer else changed if answer["changed"] else []).append(answer["queue_id"])
            if step is not None:
                step()

    _do(context, spool, request, work)
    if not as_json:
        done = {"retry": "due now", "hold": "held", "release": "released", "expire": "given up", "delete": "removed"}
        click.echo(f"{len(changed)} {done.get(command, 'changed')}")
    if failed:
        raise SystemExit(FAILED)


def _progress(command: str, total: int) -> Callable[[], None] | None:
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


def _given(ids: Sequence[str]) -> list[str]:
    found = [one for given in ids for one in ([*sys.stdin.read().split()] if given == "-" else [given])]
    if not found:
        fail(WRONG, "queue: no messages named; give ids, - to read them, or --all")
    return found


def _every_id(context: click.Context, spool: Path | None) -> list[str]:
    found: list[str] = []

    async def work(answers: AsyncIterator[Any]) -> None:
        found.extend([answer["queue_id"] async for answer in answers])

    _do(context, spool, {"command": "list"}, work)
    return found


def ask_queue(directory: Path | None, settings: SpoolTable, request: dict[str, Any]) -> AsyncIterator[Any]:
    """What a directory's owner, or the database, answers to a request of `spool.operators`."""
    if directory is not None:
        from otel_smtp.spool.embedded import ask

        if request.get("operator") == "":
            request["operator"] = _login()
        return ask(directory, request, max_age_seconds=settings.max_age)
    if settings.url is None:
        fail(WRONG, "queue: no spool; give --spool, or spool.directory or spool.url in the settings")
    return _ask_database(settings, request)


def _login() -> str:
    """Who is logged in, also where that is another than whose process this is."""
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
    """What the gateways of a queue are to be told."""

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
        """One of them is to tell of it."""
        self.deeds.append(deed)

    def note_crashes(self, message_ids: Sequence[str]) -> None:
        """No command takes anything over."""


def _asked(
    settings: SpoolTable, question: "Callable[[PostgresqlStore], Awaitable[Sequence[Mapping[str, Any]]]]"
) -> Sequence[Mapping[str, Any]]:
    """What the database of a shared queue answers. A failure ends the process with status 1."""
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


def _shared(context: click.Context, command: str) -> SpoolTable:
    settings = global_options(context).settings(needs_upstream=False).spool
    if settings.url is None:
        fail(WRONG, f"queue {command}: needs spool.url in the settings: a queue that several gateways share")
    return settings


@queue.command()
@settings_options
@json_option
@click.pass_context
def gateways(context: click.Context, *, as_json: bool) -> None:
    """List the gateways of a shared queue.

    With how many deliveries each attempts, and for how long nobody may take them over.
    """
    from otel_smtp.commands.terminal.listing import gateways_table

    async def rows(store: "PostgresqlStore") -> Sequence[Mapping[str, Any]]:
        found = dataclasses.asdict(await store.company())["gateways"]
        return [{name: value for name, value in row.items() if name != "is_this"} for row in found]

    found = _asked(_shared(context, "gateways"), rows)
    if as_json:
        for row in found:
            _print_row(dict(row), as_json=True)
    elif found:
        console().print(gateways_table(found))
    else:
        click.echo("no gateway shares this queue now", err=True)


@queue.command()
@settings_options
@json_option
@click.pass_context
def limits(context: click.Context, *, as_json: bool) -> None:
    """List the limits of a shared queue, and its connection slots.

    With what of each is used, and which gateway has how much of it.
    """
    for row in _asked(_shared(context, "limits"), lambda store: store.limits()):
        if as_json:
            _print_row(dict(row), as_json=True)
            continue
        held = ", ".join(f"{name} {amount}" for name, amount in sorted(row["gateways"].items()))
        under_way = f"{row['in_flight']} under way" + (f" ({held})" if held else "")
        wait = max(row["next_in"], row["rests_for"])
        state = f"rests for {row['rests_for']:.0f} s" if row["rests_for"] else f"next in {wait:.1f} s"
        click.echo(
            f"{row['name']}  {row['used']} of {row['most']} {row['per']} in {row['period_seconds']:.0f} s  "
            f"{under_way}  {state if wait else 'free'}"
        )
    for row in _asked(_shared(context, "limits"), lambda store: store.slots()):
        if as_json:
            shown = {"upstream": row["name"], "connections_total": row["total"]}
            _print_row(shown | {name: row[name] for name in ("used", "gateways")}, as_json=True)
            continue
        held = ", ".join(f"{name} {amount}" for name, amount in sorted(row["gateways"].items()))
        click.echo(f"{row['name']}  {row['used']} of {row['total']} connections{f' ({held})' if held else ''}")


@queue.command()
@click.option(
    "--from",
    "directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Directory of the spool whose mail is moved.",
)
@settings_options
@click.pass_context
def move(context: click.Context, *, directory: Path) -> None:
    """Move mail from a directory into the shared queue.

    Ids, ages, attempts, holds and traces stay the same. The gateway of the directory must be stopped. If the command is
    interrupted, run it again: it continues. No gateway starts on the directory before it has finished.
    """
    from otel_smtp.gateway.wiring import shared_store
    from otel_smtp.spool.embedded import to_be_moved
    from otel_smtp.spool.messages import SpoolError
    from otel_smtp.spool.moving import Moved
    from otel_smtp.spool.moving import move as move_all

    settings = _shared(context, "move")

    async def work() -> Moved:
        target = shared_store(settings, name="queue", is_gateway=False)
        await target.open()
        try:
            source = to_be_moved(directory)
            recovery = await source.open()
            try:
                return await move_all(source, target, _progress("move", recovery.messages) or (lambda: None))
            finally:
                await source.close()
        finally:
            await target.close()

    try:
        done = asyncio.run(work())
    except SpoolError as error:
        fail(FAILED, f"queue move: {error}; nothing is lost; correct that and run the command again")
    click.echo(f"{done.messages + done.finished} moved")
    for message_id, why in done.left.items():
        click.echo(f"otel-smtp: queue move: {message_id} stays in {directory}: {why}", err=True)
    if done.left:
        raise SystemExit(FAILED)


@queue.command()
@click.option("--dry-run", is_flag=True, help="Print the statements and run none.")
@settings_options
@click.pass_context
def migrate(context: click.Context, *, dry_run: bool) -> None:
    """Make the schema of a shared queue, or update it.

    Gateways of the version before go on meanwhile.
    """
    from otel_smtp.gateway.wiring import migrate_shared
    from otel_smtp.spool.messages import SpoolError

    settings = _shared(context, "migrate")
    try:
        done = asyncio.run(migrate_shared(settings, dry_run=dry_run))
    except SpoolError as error:
        fail(FAILED, f"queue migrate: {error}")
    if dry_run:
        for statements in done:
            click.echo(statements)
    click.echo(f"{len(done)} steps {'to do' if dry_run else 'done'}", err=dry_run)


def _do(context: click.Context, spool: Path | None, request: dict[str, Any], work: WorkOnAnswers) -> None:
    """Run a command on the spool, by way of the gateway that owns it if one runs, and pass its answers to `work`.

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
