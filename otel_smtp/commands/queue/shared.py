"""Commands for a queue that several gateways share."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from otel_smtp.commands.options import FAILED, console, fail, global_flags
from otel_smtp.commands.queue.asking import ask_database, print_row, progress, shared_queue

if TYPE_CHECKING:
    from otel_smtp.spool.postgresql import PostgresqlStore


@click.command()
@global_flags("Print one line of JSON per gateway.")
@click.pass_context
def gateways(context: click.Context, *, as_json: bool) -> None:
    """List the gateways of a shared queue.

    With how many deliveries each attempts, and for how long its lease protects them from takeover.
    """
    from otel_smtp.commands.terminal.listing import gateways_table

    async def rows(store: "PostgresqlStore") -> Sequence[Mapping[str, Any]]:
        found = dataclasses.asdict(await store.company())["gateways"]
        return [{name: value for name, value in row.items() if name != "is_this"} for row in found]

    found = ask_database(shared_queue(context, "gateways"), rows)
    if as_json:
        for row in found:
            print_row(dict(row), as_json=True)
    elif found:
        console().print(gateways_table(found))
    else:
        click.echo("no gateway shares this queue now", err=True)


@click.command()
@global_flags("Print one line of JSON per limit and upstream.")
@click.pass_context
def limits(context: click.Context, *, as_json: bool) -> None:
    """List the limits of a shared queue, and its connection slots.

    With what of each is used, and which gateway has how much of it.
    """
    for row in ask_database(shared_queue(context, "limits"), lambda store: store.limits()):
        if as_json:
            print_row(dict(row), as_json=True)
            continue
        held = ", ".join(f"{name} {amount}" for name, amount in sorted(row["gateways"].items()))
        under_way = f"{row['in_flight']} under way" + (f" ({held})" if held else "")
        wait = max(row["next_in"], row["rests_for"])
        state = f"rests for {row['rests_for']:.0f} s" if row["rests_for"] else f"next in {wait:.1f} s"
        click.echo(
            f"{row['name']}  {row['used']} of {row['most']} {row['per']} in {row['period_seconds']:.0f} s  "
            f"{under_way}  {state if wait else 'free'}"
        )
    for row in ask_database(shared_queue(context, "limits"), lambda store: store.slots()):
        if as_json:
            shown = {"upstream": row["name"], "connections_total": row["total"]}
            print_row(shown | {name: row[name] for name in ("used", "gateways")}, as_json=True)
            continue
        held = ", ".join(f"{name} {amount}" for name, amount in sorted(row["gateways"].items()))
        click.echo(f"{row['name']}  {row['used']} of {row['total']} connections{f' ({held})' if held else ''}")


@click.command()
@click.option(
    "--from",
    "directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    required=True,
    help="Directory of the spool whose mail is moved.",
)
@global_flags("Print one line of JSON.")
@click.pass_context
def move(context: click.Context, *, directory: Path, as_json: bool) -> None:
    """Move mail from a directory into the shared queue.

    Ids, ages, attempts, holds and traces stay the same. The gateway of the directory must be stopped. If the command is
    interrupted, run it again: it continues. No gateway starts on the directory before it has finished.
    """
    from otel_smtp.gateway.wiring import shared_store
    from otel_smtp.spool.embedded import to_be_moved
    from otel_smtp.spool.messages import SpoolError
    from otel_smtp.spool.moving import Moved
    from otel_smtp.spool.moving import move as move_all

    settings = shared_queue(context, "move")

    async def work() -> Moved:
        target = shared_store(settings, name="queue", is_gateway=False)
        await target.open()
        try:
            source = to_be_moved(directory)
            recovery = await source.open()
            try:
                return await move_all(source, target, progress("move", recovery.messages) or (lambda: None))
            finally:
                await source.close()
        finally:
            await target.close()

    try:
        done = asyncio.run(work())
    except SpoolError as error:
        fail(FAILED, f"queue move: {error}; nothing is lost; correct that and run the command again")
    moved = done.messages + done.finished
    if as_json:
        print_row({"moved": moved, "left": dict(done.left)}, as_json=True)
    else:
        click.echo(f"{moved} moved")
    for message_id, why in done.left.items():
        click.echo(f"otel-smtp: queue move: {message_id} stays in {directory}: {why}", err=True)
    if done.left:
        raise SystemExit(FAILED)


@click.command()
@click.option("--dry-run", is_flag=True, help="Print the statements and run none.")
@global_flags("Print one line of JSON.")
@click.pass_context
def migrate(context: click.Context, *, dry_run: bool, as_json: bool) -> None:
    """Make the schema of a shared queue, or update it.

    Gateways of the version before go on meanwhile.
    """
    from otel_smtp.gateway.wiring import migrate_shared
    from otel_smtp.spool.messages import SpoolError

    settings = shared_queue(context, "migrate")
    try:
        done = asyncio.run(migrate_shared(settings, dry_run=dry_run))
    except SpoolError as error:
        fail(FAILED, f"queue migrate: {error}")
    if as_json:
        print_row({"steps": list(done), "is_done": not dry_run}, as_json=True)
        return
    if dry_run:
        for statements in done:
            click.echo(statements)
    click.echo(f"{len(done)} steps {'to do' if dry_run else 'done'}", err=dry_run)
