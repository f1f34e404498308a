"""`otel-smtp demo`: a gateway, an upstream that keeps what arrives, and a few mails whose traces are drawn."""

import asyncio
import sys

import click

from otel_smtp.commands.options import (
    FAILED,
    console,
    fail,
    fail_settings,
    global_flags,
    global_options,
    listen_option,
    parse,
)
from otel_smtp.config import SettingsError


@click.command()
@click.option("--once", is_flag=True, help="Exit after the mails instead of waiting for yours.")
@listen_option
@click.option(
    "--slow", default="25ms", metavar="DURATION", help="How long the upstream takes to answer each message.",
    show_default=True,
)  # fmt: skip
@global_flags("Print one line of JSON per trace, and nothing else.")
@click.pass_context
def demo(context: click.Context, *, once: bool, listen: tuple[str, ...], slow: str, as_json: bool) -> None:
    """Show four mails and their traces.

    It runs a gateway and an upstream that keeps what arrives, draws the traces, and then waits for your mails.
    It reads neither a settings file nor OTELSMTP_ variables; --set changes its gateway.
    """
    from otel_smtp.commands.demo.show import Demonstration
    from otel_smtp.commands.demo.visits import VisitFailed
    from otel_smtp.config.values import Duration
    from otel_smtp.telemetry.logs import set_up_logging

    # The traces are the output; a log line per mail would stand between them.
    set_up_logging("auto", "error", sys.stderr)
    try:
        demonstration = Demonstration(
            console(),
            as_json=as_json,
            listen=listen,
            flags=global_options(context).flags(),
            answer_after_seconds=parse(Duration(0.0), slow, "--slow"),
        )
        asyncio.run(demonstration.run(once=once))
    except SettingsError as error:
        fail_settings(error)
    except (OSError, VisitFailed) as error:
        fail(FAILED, f"demonstration failed: {str(error) or type(error).__name__}")
    except KeyboardInterrupt:
        pass
