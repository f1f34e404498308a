"""`otel-smtp telemetry`: the reference of spans, events, attributes, metrics and log fields."""

import click


@click.command()
def telemetry() -> None:
    """Print the reference of all telemetry, as tables in Markdown."""
    from otel_smtp.telemetry.attributes import tables

    click.echo(tables().strip())
