"""`otel-smtp check`: what a gateway would run with, and with --connect, whether it would work."""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from otel_smtp.commands.options import (
    FAILED,
    WRONG,
    console,
    fail,
    global_flags,
    global_options,
    listen_option,
    upstream_option,
)
from otel_smtp.config import Settings, describe

if TYPE_CHECKING:
    from otel_smtp.commands.checks.findings import Finding
    from otel_smtp.gateway.gateway import Gateway


@click.command()
@click.option("--all", "-a", "everything", is_flag=True, help="Show all settings, defaults too.")
@click.option("--connect", is_flag=True, help="Try listeners, upstreams, receivers and collectors; no mail is sent.")
@listen_option
@upstream_option
@global_flags("Print one JSON object: settings, warnings, findings.")
@click.pass_context
def check(
    context: click.Context,
    *,
    everything: bool,
    connect: bool,
    as_json: bool,
    listen: tuple[str, ...],
    upstream: tuple[str, ...],
) -> None:
    """Print what would run; --connect tries it.

    Nothing is started, and no mail is sent. Exit status 1 if something fails.
    """
    from otel_smtp.telemetry.logs import set_up_logging

    set_up_logging("auto", "warning", sys.stderr)
    settings = global_options(context).settings(listen=listen, upstream=upstream)
    gateway = _unstarted_gateway(settings)
    settings = gateway.settings
    traces_to = gateway.ready.traces_to
    findings: list[Finding] = []
    if as_json:
        if connect:
            _try_everything(settings, findings.append)
        plan = {
            "settings": [row._asdict() for row in describe(settings) if everything or row.origin != "default"],
            "warnings": settings.warnings,
            "traces_to": traces_to,
        }
        click.echo(json.dumps(plan | ({"findings": [one._asdict() for one in findings]} if connect else {})))
    else:
        _print_plan(settings, traces_to=traces_to, everything=everything)
        if connect:
            _print_findings(settings, findings)
    if any(finding.verdict == "failed" for finding in findings):
        raise SystemExit(FAILED)


def _unstarted_gateway(settings: Settings) -> "Gateway":
    """A gateway that is built and never started, so that certificates, users and OTEL_* variables are read too.

    `serve` ignores variables that cannot be used, since others set them for all programs; `check` reports them.
    """
    from otel_smtp.gateway.gateway import WRONG_FILES, Gateway
    from otel_smtp.telemetry import environment

    if problems := environment.read().problems:
        fail(WRONG, "variables that cannot be used", *map(str, problems))
    try:
        return Gateway(settings)
    except WRONG_FILES as error:
        fail(WRONG, "invalid file", str(error))


def _print_findings(settings: Settings, findings: "list[Finding]") -> None:
    """Print each finding as it comes, and add it to `findings`."""
    from otel_smtp.commands.terminal.tables import verdict_line

    output = console()
    output.print()

    def report(finding: "Finding") -> None:
        findings.append(finding)
        output.print(verdict_line(*finding), soft_wrap=True)

    _try_everything(settings, report)


def _try_everything(settings: Settings, found: "Callable[[Finding], None]") -> None:
    """Try listeners, status port, spool, upstreams, receivers and collectors, and report each finding as it comes."""
    from otel_smtp.commands.checks.collector import check_collectors
    from otel_smtp.commands.checks.listeners import check_listeners, check_status
    from otel_smtp.commands.checks.spool import check_shared_queue, check_spool
    from otel_smtp.commands.checks.upstreams import check_upstream
    from otel_smtp.gateway.wiring import receivers, upstream_settings
    from otel_smtp.telemetry.logs import set_up_logging

    # A failure is a finding here; a log line about it would say it twice.
    set_up_logging("auto", "error", sys.stderr)

    def report(finding: "Finding | None") -> None:
        if finding is not None:
            found(finding)

    async def check_all() -> None:
        async for finding in check_listeners(settings):
            report(finding)
        report(check_status(settings))
        report(check_spool(settings))
        report(await check_shared_queue(settings))
        for upstream in settings.upstream:
            report(await check_upstream(upstream_settings(upstream), settings.hostname))
        for receiver in receivers(settings):
            from otel_smtp.commands.checks.receivers import check_receiver  # it imports HTTP

            report(await check_receiver(receiver, settings.hostname))
        async for finding in check_collectors():
            report(finding)

    asyncio.run(check_all())


def _print_plan(settings: Settings, *, traces_to: str, everything: bool) -> None:
    from otel_smtp.commands.terminal.tables import settings_table, table, verdict_line

    output = console()
    rows = describe(settings)
    values = {row.key: row.value for row in rows}
    listeners = [
        (
            listener.name,
            values[f"listener.{number}.address"],
            listener.protocol,
            f"{listener.tls}{', required' if listener.tls_required else ''}",
            f"{listener.auth}{', in clear too' if listener.auth_in_clear else ''}",
            values[f"listener.{number}.allow"] or "nobody",
        )
        for number, listener in enumerate(settings.listener)
    ]
    heads = ("name", "address", "protocol", "TLS", "AUTH", "relays without AUTH for")
    output.print(table("Listeners", heads, listeners))
    output.print()
    upstreams = [
        (
            upstream.name,
            str(upstream.url),
            f"{upstream.username} ({upstream.auth})" if upstream.username else "none",
            _serves(upstream.senders, upstream.recipients),
            str(upstream.trace_context),
        )
        for upstream in settings.upstream
    ]
    title = f"Upstreams, {settings.delivery.mode} delivery"
    output.print(table(title, ("name", "url", "login", "serves", "trace headers"), upstreams))
    output.print()
    output.print(f"[bold]Status[/] {values['status.address']}   [bold]Traces[/] to {traces_to}", soft_wrap=True)
    output.print()
    shown = [row for row in rows if everything or row.origin != "default"]
    output.print(settings_table("All settings" if everything else "Settings that are set", shown, output.width))
    for warning in settings.warnings:
        output.print(verdict_line("warning", "warning", warning), soft_wrap=True)


def _serves(senders: Sequence[str], recipients: Sequence[str]) -> str:
    parts = [f"from {', '.join(senders)}"] if senders else []
    parts += [f"to {', '.join(recipients)}"] if recipients else []
    return " ".join(parts) or "all"
