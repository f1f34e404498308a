"""`otel-smtp bench`: load through a running gateway, with a progress bar, and what it cost the gateway."""

import json
import math
import time
from dataclasses import dataclass
from typing import Final

import click

from otel_smtp.commands.asking import AskedGateway, NoAnswer, running_gateway, url_option
from otel_smtp.commands.load_generator import Load, LoadPlan, LoadResult
from otel_smtp.commands.options import FAILED, WRONG, check_address, fail, global_flags, global_options

# The status port renders its metrics page at most once per second, and nothing reports a newer one; by then, most
# telemetry of the last messages is exported.
_SETTLE_SECONDS: Final = 1.1


@dataclass(frozen=True, slots=True)
class GatewayCost:
    """A load's cost to the gateway, from its metrics page: all its processes, until a second after the last reply.

    Attributes:
        transactions: how many ended meanwhile, including other clients'.
        problem: why nothing else is known, if so.
    """

    cpu_seconds: float = 0.0
    transactions: int = 0
    problem: str = ""

    @property
    def cpu_us_per_message(self) -> float | None:
        """Microseconds of CPU per transaction; None: unknown."""
        return self.cpu_seconds / self.transactions * 1e6 if self.transactions else None


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
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    metavar="N",
    help="Messages per second, evenly spaced; default: as many as the sessions can send.",
)
@url_option
@global_flags("Print one JSON object and no progress bar.")
@click.pass_context
def bench(
    context: click.Context,
    *,
    host: str,
    port: int,
    messages: int,
    sessions: int,
    size: int,
    sender: str,
    recipient: str,
    fresh: bool,
    rate: float | None,
    as_json: bool,
    url: str | None,
) -> None:
    """Send load; print rate, latencies, errors, CPU per mail.

    The upstream receives every message: point the gateway at a sink first. The CPU comes from the gateway's metrics;
    --url or the settings say where they are. Latency says most at a rate that the gateway can sustain: --rate with
    half of the highest. Exit status 1 if a message failed.
    """
    if rate is not None and not math.isfinite(rate):
        fail(WRONG, f"--rate: {rate} is no number of messages per second")
    check_address(sender, "--from", may_be_null=True)
    check_address(recipient, "--to")
    gateway = _status_port(context, url)
    plan = LoadPlan(
        host=host,
        port=port,
        sender=sender,
        recipient=recipient,
        messages=messages,
        sessions=sessions,
        size_octets=size,
        keeps_connections=not fresh,
        rate=rate,
    )
    before = _consumed(gateway)
    try:
        result = Load(plan).run() if as_json else _run_with_progress(plan)
    except OSError as error:
        fail(FAILED, f"{host}:{port}: {(error.strerror or str(error)).lower()}")
    cost = _cost(gateway, before, result)
    if as_json:
        click.echo(json.dumps(figures(plan, result, cost)))
    else:
        _show(result, cost)
    if result.failed:
        raise SystemExit(FAILED)


def _status_port(context: click.Context, url: str | None) -> AskedGateway | None:
    settings = global_options(context).settings(needs_upstream=False)
    address = settings.status.address
    if url is None and (address is None or address.port == 0):
        return None
    return running_gateway(settings, url)


def _consumed(gateway: AskedGateway | None) -> GatewayCost:
    """The CPU time it has used, and the transactions it has finished, since its start."""
    if gateway is None:
        return GatewayCost(problem="the settings name no status port; --url does")
    from prometheus_client.parser import text_string_to_metric_families

    sums = {"process_cpu_seconds_total": 0.0, "smtp_server_transaction_duration_seconds_count": 0.0}
    found = set()
    try:
        for family in text_string_to_metric_families(gateway.metrics()):
            for sample in family.samples:  # one of each worker and outcome
                if sample.name in sums:
                    sums[sample.name] += sample.value
                    found.add(sample.name)
    except NoAnswer as error:
        return GatewayCost(problem=str(error))
    except ValueError as error:
        return GatewayCost(problem=f"no metrics page at {gateway.url}: {error}")
    if missing := sums.keys() - found:
        return GatewayCost(problem=f"{gateway.url} has no {' and no '.join(sorted(missing))}")
    cpu_seconds, transactions = sums.values()
    return GatewayCost(cpu_seconds, int(transactions))


def _cost(gateway: AskedGateway | None, before: GatewayCost, result: LoadResult) -> GatewayCost:
    if gateway is None or before.problem:
        return before
    time.sleep(_SETTLE_SECONDS)
    after = _consumed(gateway)
    if after.problem:
        return after
    cost = GatewayCost(after.cpu_seconds - before.cpu_seconds, after.transactions - before.transactions)
    if cost.cpu_seconds < 0 or cost.transactions < 0:
        return GatewayCost(problem=f"the gateway at {gateway.url} restarted meanwhile")
    if cost.transactions < result.accepted:
        return GatewayCost(problem=f"the load did not reach the gateway at {gateway.url}")
    return cost


def figures(plan: LoadPlan, result: LoadResult, cost: GatewayCost) -> dict[str, object]:
    """The output of `--json`; latencies in milliseconds."""
    p50, p90, p99, highest = result.percentiles_ms(50, 90, 99, 100)
    return {
        "messages": plan.messages,
        "sessions": plan.sessions,
        "size_octets": plan.size_octets,
        "rate": plan.rate,
        "accepted": result.accepted,
        "failed": result.failed,
        "failures": dict(result.failures.most_common()),
        "reconnects": result.reconnects,
        "seconds": round(result.seconds, 6),
        "messages_per_second": round(result.messages_per_second, 1),
        "latency_ms": {"p50": p50, "p90": p90, "p99": p99, "max": highest},
        "gateway": {"problem": cost.problem}
        if cost.problem
        else {
            "cpu_seconds": round(cost.cpu_seconds, 2),  # in ticks of the kernel's clock
            "transactions": cost.transactions,
            "cpu_us_per_message": cost.cpu_us_per_message,
        },
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
    # Refreshed here, ten times per second: a drawing thread would take the interpreter from the loop that it draws.
    with Progress(*columns, auto_refresh=False) as bar:
        task = bar.add_task(f"{plan.sessions} sessions", total=plan.messages, rate=0.0, failed=0)

        def progress(result: LoadResult) -> None:
            done = result.accepted + result.failed
            bar.update(task, completed=done, rate=result.messages_per_second, failed=result.failed)
            bar.refresh()

        result = Load(plan, progress).run()
        progress(result)
        return result


def _show(result: LoadResult, cost: GatewayCost) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    p50, p90, p99, highest = result.percentiles_ms(50, 90, 99, 100)
    table.add_row("accepted", f"{result.accepted} in {result.seconds:.2f} s")
    if result.accepted:
        table.add_row("rate", f"{result.messages_per_second:.0f} messages/s")
        table.add_row("latency", f"p50 {p50:.2f} ms   p90 {p90:.2f} ms   p99 {p99:.2f} ms   max {highest:.2f} ms")
    if cost.problem:
        table.add_row("gateway's CPU", f"unknown: {cost.problem}".replace("[", r"\["))
    elif cost.cpu_us_per_message is not None:
        others = cost.transactions - result.accepted - result.failed
        table.add_row(
            "gateway's CPU",
            f"{cost.cpu_us_per_message:.0f} µs per message"
            + (f" (of {cost.transactions}, {others} of other clients)" if others > 0 else ""),
        )
    if result.reconnects:
        table.add_row("reconnects", f"{result.reconnects} (the server's limit on messages per connection)")
    for reason, count in result.failures.most_common(10):
        # A reply is the server's text: shown as it is, never as markup.
        table.add_row("[red]failed", f"{count} × {reason}".replace("[", r"\["))
    Console().print(table)
