"""`otel-smtp settings`: the reference of all settings, for people and for editors."""

import json

import click

from otel_smtp.commands.options import global_flags


@click.command()
@click.option("--json-schema", "is_schema", is_flag=True, help="A JSON Schema of a settings file, for editors.")
@global_flags("Print the reference as JSON: a list of the settings.")
def settings(*, is_schema: bool, as_json: bool) -> None:
    """Print the reference of all settings, as a table in Markdown.

    `otel-smtp check` shows the settings of this machine.
    """
    from otel_smtp.config import documented_settings, json_schema, settings_table

    if is_schema:
        click.echo(json.dumps(json_schema(), indent=2))
    elif as_json:
        click.echo(json.dumps([row._asdict() for row in documented_settings()], indent=2))
    else:
        click.echo(settings_table())
