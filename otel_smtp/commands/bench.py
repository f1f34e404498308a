"""`otel-smtp bench`: load through a running gateway, with a progress bar."""

import json

import click

from otel_smtp.commands.load_generator import Load, LoadPlan, LoadResult
from otel_smtp.commands.options import FAILED, fail


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, metavar="HOST", help="Host of the gateway.")
@click.option("--port", type=click.IntRange(1, 65535), default=2525, show_default=True, help="Port of the gateway.")
@click.option("--messages", type=click.IntRange(1), default=1000, show_default=True, help="Messages to send in all.")
@click.option("--sessions", type=click.IntRange(1), default=10, show_default=True, help="Connections at once.")
@click.option("--size", type=click.IntRange(256), default=10_240, show_default=True, help="Octets of each message.")
@click.option(
    "--from", "sender", default="load@example.com", show_default=True, metavar="ADDRESS", help="Sender's address."
)
@click.option(
    "--to", "recipient", default="sink@example.com", show_default=True, metavar="ADDRESS", help="Recipient's address."
)
@click.option("--fresh", is_flag=True, help="Open a new connection for each message.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and no progress bar.")
def bench(
    *,
    host: str,
    port: int,
    messages: int,
    sessions: int,
    size: int,
    sender: str,
    recipient: str,
    fresh: bool,
    as_json: bool,
) -> None:
    """Send load; print rate, latencies and errors.

    The upstream receives every message: point the gateway at a sink first. Exit status 1 if a message failed.
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
        fail(FAILED, f"{host}:{port}: {error}")
    if as_json:
        click.echo(json.dumps(figures(plan, result)))
    else:
        _show(result)
    if result.failed:
        raise SystemExit(FAILED)


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
    # Only for terminals: rich takes a tenth of a second to import.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>8.0f} messages/s"),
        TextColumn("[red]{task.fields[failed]} failed" if plan.messages else ""),
        TimeRemainingColumn(),
    )
    # Refreshed here, ten times a second: a drawing thread would take the interpreter from the loop that it draws.
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
        table.add_row("reconnects", f"{result.reconnects} (the server's limit on messages per connection)")
    for reason, count in result.failures.most_common(10):
        # A reply is the server's text: shown as it is, never as markup.
        table.add_row("[red]failed", f"{count} × {reason}".replace("[", r"\["))
    Console().print(table)
