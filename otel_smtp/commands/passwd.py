"""`otel-smtp passwd`: a line for the users file of a listener with AUTH."""

import json
import sys

import click

from otel_smtp.commands.options import WRONG, fail, global_flags


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--scram", is_flag=True, help="Keys for SCRAM-SHA-256 instead of an argon2id hash.")
@global_flags("Print one line of JSON: the name, and the line.")
def passwd(name: str, *, scram: bool, as_json: bool) -> None:
    """Print a users-file line for a user.

    The password of NAME is prompted for, or read from standard input.
    """
    from otel_smtp.server.users import users_line

    if sys.stdin.isatty():
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().removesuffix("\n").removesuffix("\r")
    try:
        line = users_line(name, password, scram=scram)
    except ValueError as why:
        fail(WRONG, str(why))
    click.echo(json.dumps({"name": name, "line": line}) if as_json else line)
