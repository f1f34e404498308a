"""The manual page, made out of the commands: `python -m tests.readme` writes it to deploy/reference/otel-smtp.1."""

import re
from collections.abc import Iterator
from typing import Final

import click

from otel_smtp.commands.cli import cli

_EXIT: Final = (("0", "done"), ("1", "failed"), ("2", "wrong use or settings"))
_FILES: Final = (
    ("OTELSMTP_CONFIG", "the settings file, where --config names none"),
    ("OTELSMTP_LISTEN, OTELSMTP_UPSTREAM", "one listener, one upstream"),
    ("OTELSMTP_LIMITS__RECIPIENTS", "any other setting: its path in capitals, __ between the levels"),
    ("OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_*", "where telemetry goes, as OpenTelemetry defines it"),
)


def manual() -> str:
    """The page, in the man macros of roff."""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield '.\\" Made out of the code: do not edit.'
    yield '.TH OTEL-SMTP 1 "" "otel_smtp" "User commands"'
    yield ".SH NAME"
    yield "otel-smtp \\- " + _roff("an OpenTelemetry-traced SMTP gateway")
    yield ".SH SYNOPSIS"
    yield "\\fBotel-smtp\\fR [\\fIoptions\\fR] \\fIcommand\\fR [\\fIoptions\\fR] [\\fIarguments\\fR]"
    yield ".SH DESCRIPTION"
    yield _roff(_help(cli))
    yield ".SH OPTIONS"
    with click.Context(cli, info_name="otel-smtp") as context:
        yield from _options(cli, context)
        yield ".SH COMMANDS"
        yield from _commands(cli, context)
    yield ".SH ENVIRONMENT"
    for name, meaning in _FILES:
        yield from (".TP", f"\\fB{_roff(name)}\\fR", _roff(meaning))
    yield ".SH EXIT STATUS"
    for status, meaning in _EXIT:
        yield from (".TP", f"\\fB{status}\\fR", meaning)
    yield ".SH SHELL COMPLETION"
    yield _roff("In ~/.bashrc; zsh and fish likewise, by zsh_source and fish_source:")
    yield from (".PP", ".EX", _roff('eval "$(_OTEL_SMTP_COMPLETE=bash_source otel-smtp)"'), ".EE")


def _commands(group: click.Group, context: click.Context, path: str = "") -> Iterator[str]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if command.hidden:
            continue
        with click.Context(command, info_name=name, parent=context) as inner:
            full = f"{path}{name}"
            arguments = " ".join(
                parameter.make_metavar(inner) for parameter in command.params if isinstance(parameter, click.Argument)
            )
            yield f".SS {_roff(full)}" + (f" \\fI{_roff(arguments)}\\fR" if arguments else "")
            yield _roff(_help(command))
            yield from _options(command, inner)
            if isinstance(command, click.Group):
                yield from _commands(command, inner, f"{full} ")


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)) is not None:
            yield from (".TP", f"\\fB{_roff(record[0])}\\fR", _roff(record[1]))


def _help(command: click.Command) -> str:
    text = (command.help or "").replace("\b", "").partition("\f")[0]
    return "\n.PP\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def _roff(text: str) -> str:
    """Text as roff takes it: backslashes, hyphens that are meant, and no line that looks like a request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^(?!\.PP$)([.'])", r"\\&\1", escaped, flags=re.MULTILINE)
