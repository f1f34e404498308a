"""`otel-smtp telemetry`: the reference of spans, events, attributes, metrics and log fields."""

import json

import click

from otel_smtp.commands.options import global_flags


@click.command()
@global_flags("Print the reference as JSON: a list for each table.")
def telemetry(*, as_json: bool) -> None:
    """Print the reference of all telemetry, as tables in Markdown."""
    from otel_smtp.telemetry.attributes import as_lists, tables

    click.echo(json.dumps(as_lists(), indent=2) if as_json else tables().strip())
