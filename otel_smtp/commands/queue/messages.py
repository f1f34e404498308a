"""Commands that show queued messages and act on them."""

import base64
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from otel_smtp.commands.options import FAILED, WRONG, console, fail, global_flags
from otel_smtp.commands.queue.asking import print_row, progress, work_on
from otel_smtp.commands.queue.options import (
    all_option,
    as_option,
    chosen,
    filter_options,
    ids_argument,
    message_flags,
    spool_option,
)

_DONE: Final = {
    "retry": "due now",
    "hold": "held",
    "release": "released",
    "expire": "given up",
    "reset": "reset",
    "delete": "removed",
}


@click.command("list")
@filter_options
@spool_option
@message_flags
@click.pass_context
def list_(context: click.Context, /, *, spool: Path | None, as_json: bool, **filters: str | bool | None) -> None:
    """List messages and why they wait.

    The oldest come first.
    """
    wanted = chosen(filters)
    work_on(context, spool, {"command": "list", **wanted}, _shown(as_json=as_json, is_chosen=bool(wanted)))


@click.command()
@click.option("--trace", "trace_id", metavar="ID", help="Trace id, as the final 250 gives it.")
@click.option("--sender", metavar="ADDRESS", help="Sender of the envelope; <> for bounces.")
@click.option("--recipient", metavar="ADDRESS", help="One of its recipients.")
@spool_option
@message_flags
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
    work_on(context, spool, {"command": "find", **known}, _shown(as_json=as_json, is_chosen=True))


@click.command()
@click.option(
    "--by",
    type=click.Choice(["domain", "sender", "reason"]),
    default="domain",
    show_default=True,
    help="Count by recipient domain, sender domain, or reason to wait.",
)
@filter_options
@spool_option
@global_flags("Print one line of JSON per group.")
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

    work_on(context, spool, {"command": "list", **chosen(filters)}, work)
    if as_json:
        for row in drawn.rows():
            click.echo(json_line(row))
    else:
        console().print(drawn.table())


@click.command()
@click.argument("message", metavar="ID")
@click.option("--content", is_flag=True, help="Print its header block and body too.")
@spool_option
@message_flags
@click.pass_context
def show(context: click.Context, message: str, *, content: bool, spool: Path | None, as_json: bool) -> None:
    """Show a message, its recipients and trace."""

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            if "error" in answer:
                fail(FAILED, f"queue show: {answer['error']}")
            if "content" in answer:
                sys.stdout.flush()
                sys.stdout.buffer.write(base64.b64decode(answer["content"]))
            else:
                print_row(answer, as_json=as_json)

    work_on(context, spool, {"command": "export" if content else "show", "ids": [message]}, work)


def _changing(name: str, text: str) -> click.Command:
    """A command that changes messages."""

    @click.command(name, help=f"{text}\n\nWith --all, all messages, or those that fit what is given besides.")
    @ids_argument
    @all_option
    @filter_options
    @spool_option
    @as_option
    @message_flags
    @click.pass_context
    def change(
        context: click.Context, /, ids: tuple[str, ...], *, every: bool, spool: Path | None, operator: str,
        as_json: bool, **filters: str | bool | None,
    ) -> None:  # fmt: skip
        wanted = chosen(filters)
        _change(context, name, ids, wanted, every=every, spool=spool, operator=operator, as_json=as_json)

    return change


changing: Final = tuple(
    _changing(name, text)
    for name, text in {
        "retry": "Attempt messages now.\n\nHow many at once is limited by the upstream's concurrency.",
        "hold": "Hold messages.\n\nHeld messages are not attempted. Mail does not age then; bounces do.",
        "release": "Release held messages.",
        "expire": "Give messages up.\n\nA running gateway returns them to their senders.",
        "reset": "Reset attempts and age of messages.\n\nThey are attempted now, and age as if they had just arrived.",
    }.items()
)
"""The commands that change messages and have no options of their own."""


@click.command()
@ids_argument
@all_option
@click.option("--yes", is_flag=True, help="Confirm --all.")
@filter_options
@spool_option
@as_option
@message_flags
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
    wanted = chosen(filters)
    _change(context, "delete", ids, wanted, every=every, spool=spool, operator=operator, as_json=as_json)


@click.command()
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
@message_flags
@click.pass_context
def export(
    context: click.Context, ids: tuple[str, ...], *, to: Path, every: bool, spool: Path | None, as_json: bool
) -> None:
    """Copy messages to files.

    ID.eml has the message as it would be sent, ID.json its envelope. The messages stay queued.
    """
    from otel_smtp.commands.terminal.listing import json_line

    if every and ids:
        fail(WRONG, "queue export: give ids, or --all, not both")
    request = {"command": "export", **({"all": True} if every else {"ids": _given(ids)})}
    failed: list[str] = []
    begun: set[str] = set()
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(FAILED, f"queue: {to}: {error.strerror}")

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            name = answer["queue_id"]
            path = to / f"{name}.eml"
            if "error" in answer:
                failed.append(name)
                if name in begun:  # else it is a copy of before, or no file of ours
                    path.unlink(missing_ok=True)
                if as_json:
                    print_row(answer, as_json=True)
                else:
                    click.echo(f"otel-smtp: queue export: {answer['error']}", err=True)
            elif "content" in answer:
                with path.open("ab") as file:
                    file.write(base64.b64decode(answer["content"]))
            else:
                (to / f"{name}.json").write_text(json_line(answer) + "\n", encoding="utf-8")
                begun.add(name)
                path.write_bytes(b"")
                click.echo(json_line({"queue_id": name, "file": str(path)}) if as_json else path)

    work_on(context, spool, request, work)
    if failed:
        raise SystemExit(FAILED)


@click.command()
@spool_option
@global_flags("Print one line of JSON per finding.")
@click.pass_context
def rebuild(context: click.Context, *, spool: Path | None, as_json: bool) -> None:
    """Queue again what is in lost+found/.

    Restored messages are held, since they may have been delivered. If no gateway runs, the index is rebuilt too.
    Messages whose contents are not found are listed, and the exit status is 1.
    """
    not_found: list[bool] = []
    found = 0

    async def work(answers: AsyncIterator[Any]) -> None:
        nonlocal found
        async for answer in answers:
            found += 1
            if "told" not in answer:
                not_found.append(answer["queue_name"] is not None)
            if as_json:
                print_row(answer, as_json=True)
            else:
                click.echo(answer["told"] if "told" in answer else _not_found(answer))

    work_on(context, spool, {"command": "rebuild"}, work)
    if not found and not as_json:
        click.echo("nothing to queue again")
    if not_found:
        if not as_json:
            click.echo(f"{len(not_found)} not found; {sum(not_found)} of them are in the queue, as corrupt")
        raise SystemExit(FAILED)


@click.command()
@spool_option
@global_flags("Print JSON, as without it.", takes_json=False)
@click.pass_context
def counts(context: click.Context, *, spool: Path | None) -> None:
    """Print counts as JSON.

    They are the messages by state, and the outcomes of all recipients ever accepted.
    """

    async def work(answers: AsyncIterator[Any]) -> None:
        async for answer in answers:
            print_row(answer, as_json=True)

    work_on(context, spool, {"command": "counts"}, work)


def _not_found(answer: Mapping[str, Any]) -> str:
    place = "not queued" if answer["queue_name"] is None else "queued as corrupt"
    to = ", ".join(answer["recipients"])
    return f"{answer['queue_id']}: not found: {answer['reason']}; {place}; from <{answer['sender']}> to {to}"


def _shown(*, as_json: bool, is_chosen: bool) -> Callable[[AsyncIterator[Any]], Coroutine[Any, Any, None]]:
    return _list_as_json if as_json else partial(_list, is_chosen=is_chosen)


async def _list(answers: AsyncIterator[Any], *, is_chosen: bool) -> None:
    from otel_smtp.commands.terminal.listing import Listing

    output = console()
    listing = Listing(width=output.width if output.is_terminal else None, is_chosen=is_chosen)
    lines = listing.heading()
    async for answer in answers:
        for line in (*lines, *listing.lines(answer)):
            output.print(line, soft_wrap=not output.is_terminal)
        lines = ()
    for line in listing.summary():
        output.print(line, soft_wrap=not output.is_terminal)


async def _list_as_json(answers: AsyncIterator[Any]) -> None:
    async for answer in answers:
        print_row(answer, as_json=True)


def _change(
    context: click.Context, command: str, ids: Sequence[str], wanted: dict[str, Any], *, every: bool,
    spool: Path | None, operator: str, as_json: bool,
) -> None:  # fmt: skip
    request: dict[str, Any] = {"command": command, "operator": operator}
    if wanted and not every:
        fail(WRONG, f"queue {command}: --domain, --sender, --reason and --older-than choose among --all")
    if every and ids:
        fail(WRONG, f"queue {command}: give ids, or --all, not both")
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
                step = progress(command, answer["messages"]) if not as_json else None
                continue
            if as_json:
                print_row(answer, as_json=True)
            elif "error" in answer:
                click.echo(f"otel-smtp: queue {command}: {answer['error']}", err=True)
            (failed if "error" in answer else changed if answer["changed"] else []).append(answer["queue_id"])
            if step is not None:
                step()

    work_on(context, spool, request, work)
    if not as_json:
        click.echo(f"{len(changed)} {_DONE[command]}")
    if failed:
        raise SystemExit(FAILED)


def _given(ids: Sequence[str]) -> list[str]:
    found = [one for given in ids for one in ([*sys.stdin.read().split()] if given == "-" else [given])]
    if not found:
        fail(WRONG, "queue: no messages named; give ids, - to read them, or --all")
    return found
