"""`otel-smtp bench`: load through a running gateway, seen as it runs."""

import json
from typing import Annotated

import typer

from otel_smtp.commands.load_generator import Load, LoadPlan, LoadResult


def bench(
    host: Annotated[str, typer.Option(help="The gateway's host.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port.", min=1, max=65535)] = 2525,
    messages: Annotated[int, typer.Option(help="Messages to send in all.", min=1)] = 1000,
    sessions: Annotated[int, typer.Option(help="Connections at once.", min=1)] = 10,
    size: Annotated[int, typer.Option(help="Octets of a message.", min=256)] = 10_240,
    sender: Annotated[str, typer.Option("--from", help="The sender's address.")] = "load@example.com",
    recipient: Annotated[str, typer.Option("--to", help="The recipient's address.")] = "sink@example.com",
    fresh: Annotated[bool, typer.Option("--fresh", help="A connection for each message.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, no progress bar.")] = False,
) -> None:
    """Send load through a gateway and print its rate, latencies and errors.

    Whoever stands behind the gateway receives every message: point the gateway at a sink first.
    Exit status 1 when a message failed.
    """
    plan = LoadPlan(
        host=host,
        port=port,
        sender=sender,
        recipient=recipient,
        messages=messages,
        sessions=sessions,
        size_octets=size,
        keeps_connections=not fresh,
    )
    try:
        result = Load(plan).run() if as_json else _run_with_progress(plan)
    except OSError as error:
        typer.echo(f"otel-smtp bench: {host}:{port}: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(figures(plan, result)))
    else:
        _show(result)
    if result.failed:
        raise typer.Exit(1)


def figures(plan: LoadPlan, result: LoadResult) -> dict[str, object]:
    """What `--json` prints; latencies in milliseconds."""
    p50, p90, p99, highest = result.percentiles_ms(50, 90, 99, 100)
    return {
        "messages": plan.messages,
        "sessions": plan.sessions,
        "size_octets": plan.size_octets,
        "accepted": result.accepted,
        "failed": result.failed,
        "failures": dict(result.failures.most_common()),
        "reconnects": result.reconnects,
        "seconds": round(result.seconds, 6),
        "messages_per_second": round(result.messages_per_second, 1),
        "latency_ms": {"p50": p50, "p90": p90, "p99": p99, "max": highest},
    }


def _run_with_progress(plan: LoadPlan) -> LoadResult:
    # Drawing is for terminals alone; rich costs a tenth of a second to import.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>8.0f} messages/s"),
        TextColumn("[red]{task.fields[failed]} failed" if plan.messages else ""),
        TimeRemainingColumn(),
    )
    # Refreshed by us, ten times a second: a drawing thread would take the interpreter from the loop it draws.
    with Progress(*columns, auto_refresh=False) as bar:
        task = bar.add_task(f"{plan.sessions} sessions", total=plan.messages, rate=0.0, failed=0)

        def progress(result: LoadResult) -> None:
            done = result.accepted + result.failed
            bar.update(task, completed=done, rate=result.messages_per_second, failed=result.failed)
            bar.refresh()

        result = Load(plan, progress).run()
        progress(result)
        return result


def _show(result: LoadResult) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    p50, p90, p99, highest = result.percentiles_ms(50, 90, 99, 100)
    table.add_row("accepted", f"{result.accepted} in {result.seconds:.2f} s")
    table.add_row("rate", f"{result.messages_per_second:.0f} messages/s")
    table.add_row("latency", f"p50 {p50:.2f} ms   p90 {p90:.2f} ms   p99 {p99:.2f} ms   max {highest:.2f} ms")
    if result.reconnects:
        table.add_row("reconnects", f"{result.reconnects} (the server's bound on messages a connection)")
    for reason, count in result.failures.most_common(10):
        # A reply is the server's text: shown as it is, never as markup.
        table.add_row("[red]failed", f"{count} × {reason}".replace("[", r"\["))
    Console().print(table)
