"""`otel-smtp settings`: the reference of all settings, for people and for editors."""

import json

import click


@click.command()
@click.option("--json-schema", "is_schema", is_flag=True, help="A JSON Schema of a settings file, for editors.")
def settings(*, is_schema: bool) -> None:
    """Print the reference of all settings, as a table in Markdown.

    What this machine's settings are, `otel-smtp check` tells.
    """
    from otel_smtp.config import json_schema, settings_table

    click.echo(json.dumps(json_schema(), indent=2) if is_schema else settings_table())
