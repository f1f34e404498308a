"""Options that the commands of `otel-smtp queue` share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from otel_smtp.commands.options import global_flags, parse

spool_option: Final = click.option(
    "--spool", type=click.Path(path_type=Path), metavar="DIR", help="Directory of the spool, instead of the settings'."
)


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which messages; one must fit all that is given."""
    for option in (
        click.option("--outcomes", is_flag=True, help="Outcomes that wait for the application, instead of mail."),
        click.option("--older-than", metavar="AGE", help='Only messages that came longer ago, for example "2h".'),
        click.option("--reason", metavar="TEXT", help="Only with this in the last reply to a recipient."),
        click.option(
            "--sender", metavar="ADDRESS", help='Only of this sender, or of "@domain"; "<>" is the null path.'
        ),
        click.option("--domain", metavar="DOMAIN", help="Only with a recipient of this domain."),
    ):
        command = option(command)
    return command


def chosen(filters: dict[str, str | bool | None]) -> dict[str, Any]:
    """The filters that were given, as the spool understands them."""
    from otel_smtp.config.values import Duration

    wanted: dict[str, Any] = {name: value for name, value in filters.items() if value not in (None, False)}
    if (age := wanted.pop("older_than", None)) is not None:
        wanted["older_than_seconds"] = parse(Duration(), age, "--older-than")
    return wanted


message_flags: Final = global_flags("Print one line of JSON per message.")
as_option: Final = click.option(
    "--as", "operator", default="", metavar="NAME",
    help="Who does it, for the log and the trace; default: the login, or with spool.url the database's user.",
)  # fmt: skip
all_option: Final = click.option("--all", "every", is_flag=True, help="All messages that the command applies to.")
ids_argument: Final = click.argument("ids", nargs=-1, metavar="ID...")
