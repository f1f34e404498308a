"""`otel-smtp`: the commands by name.

A command is a function in the module of its name; only the module of the command that runs is imported, since start-up
time is a figure that the project keeps. Exit status: 0 done, 1 failed, 2 wrong use or settings.
"""

import codecs
import errno
import importlib
import io
import sys
from typing import Final

import click

from otel_smtp.commands.options import FAILED, fail, global_flags

COMMANDS: Final = (
    "serve", "reload", "check", "send", "passwd", "demo", "queue", "tail", "why", "bench", "settings", "telemetry",
)  # fmt: skip


class _Commands(click.Group):
    """The commands, each imported when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"otel_smtp.commands.{cmd_name}"), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@global_flags("Print JSON, whatever the command.", takes_json=False)
def cli() -> None:
    """An OpenTelemetry-traced SMTP gateway: every connection a span, every state transition an event."""


# Replacements for our marks on a terminal without Unicode.
_PLAIN: Final = {"→": "->", "✓": "+", "✗": "x", "…": "...", "“": '"', "”": '"'}


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    """An error handler of codecs: a terminal's encoding may lack our marks, and letters in addresses and replies."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(char, "?") for char in error.object[error.start : error.end]), error.end


def main() -> None:
    """The entry point."""
    codecs.register_error("otel-smtp-plain", _in_plain)
    if isinstance(sys.stdout, io.TextIOWrapper):  # None if it is closed
        sys.stdout.reconfigure(errors="otel-smtp-plain")
    try:
        cli(prog_name="otel-smtp")
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        fail(FAILED, "cannot write the output: no space left on device")


if __name__ == "__main__":
    main()
