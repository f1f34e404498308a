"""The common part of the commands: global options, the settings that they make, and reporting invalid ones."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from otel_smtp import __version__
from otel_smtp.config import Flag, Settings, SettingsError, assignment, load

if TYPE_CHECKING:
    from rich.console import Console

    from otel_smtp.config.values import ValueKind

FAILED: Final = 1
WRONG: Final = 2

listen_option: Final = click.option(
    "--listen", "-l", multiple=True, metavar="HOST:PORT", help="Where to listen; repeatable; also OTELSMTP_LISTEN."
)
upstream_option: Final = click.option(
    "--upstream", "-u", multiple=True, metavar="URL",
    help="Where to relay mail; repeatable, in order of preference; also OTELSMTP_UPSTREAM.",
)  # fmt: skip


def _add_config(context: click.Context, _: click.Parameter, config: Path | None) -> None:
    if config is not None:
        context.obj = dataclasses.replace(global_options(context), config=config)


def _add_assignments(context: click.Context, _: click.Parameter, assignments: tuple[str, ...]) -> None:
    known = global_options(context)
    context.obj = dataclasses.replace(known, assignments=known.assignments + assignments)


def _add_json(context: click.Context, _: click.Parameter, as_json: bool) -> bool:
    known = global_options(context)
    if as_json:
        context.obj = dataclasses.replace(known, as_json=True)
    return as_json or known.as_json


def global_flags(
    json_help: str = "Print JSON.", *, takes_json: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the global options, which may precede or follow its name.

    The command finds them by `global_options`, and whether to print JSON is its argument `as_json` too.

    Args:
        json_help: its output with --json.
        takes_json: it has that argument.
    """
    options = (
        click.option(
            "--config", "-c", type=click.Path(path_type=Path), metavar="FILE", expose_value=False,
            callback=_add_config, help="TOML file with settings; also OTELSMTP_CONFIG.",
        ),
        click.option(
            "--set", "-s", "assignments", multiple=True, metavar="KEY=VALUE", expose_value=False,
            callback=_add_assignments, help="One setting, for example limits.recipients=50; repeatable.",
        ),
        click.option(
            "--json", "as_json", is_flag=True, expose_value=takes_json, callback=_add_json, help=json_help
        ),
        click.version_option(__version__, message="otel-smtp %(version)s"),
    )  # fmt: skip

    def give(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return give


@dataclass(frozen=True, slots=True)
class GlobalOptions:
    """The options of every command, before or after its name.

    Attributes:
        assignments: all of `--set`, those after the command's name last.
    """

    config: Path | None = None
    assignments: tuple[str, ...] = ()
    as_json: bool = False

    def settings(
        self,
        *,
        flags: Sequence[Flag] = (),
        listen: Sequence[str] = (),
        upstream: Sequence[str] = (),
        needs_upstream: bool = True,
    ) -> Settings:
        """The settings of a command: its own options over these, over the environment, over the file.

        Args:
            needs_upstream: without one they are invalid.

        Invalid settings end the process with status 2, and a line on stderr for each problem.
        """
        try:
            return self.read(flags=flags, listen=listen, upstream=upstream, needs_upstream=needs_upstream)
        except SettingsError as error:
            fail_settings(error)

    def read(
        self,
        *,
        flags: Sequence[Flag] = (),
        listen: Sequence[str] = (),
        upstream: Sequence[str] = (),
        needs_upstream: bool = True,
    ) -> Settings:
        """As `settings`, for callers that continue if they are invalid.

        Raises:
            SettingsError: they are invalid.
        """
        return load(
            file=self.config,
            environ=os.environ,
            flags=[*self.flags(), *flags],
            listen=listen,
            upstream=upstream,
            needs_upstream=needs_upstream,
            is_command=True,
        )

    def flags(self) -> list[Flag]:
        """All `--set` options.

        Raises:
            SettingsError: one of them is no assignment.
        """
        return [assignment(text) for text in self.assignments]


def global_options(context: click.Context) -> GlobalOptions:
    """The options of every command, as given so far."""
    options = context.find_object(GlobalOptions)
    return GlobalOptions() if options is None else options


def parse(kind: "ValueKind", text: str, source: str) -> Any:
    """Parse an option by the rules of settings; an invalid one ends the process with status 2."""
    from otel_smtp.config.addresses import UpstreamUrlKind
    from otel_smtp.config.values import BadValue, Given

    try:
        return kind.parse(Given(text, source, is_text=True))
    except BadValue as why:
        shown = "***" if isinstance(kind, UpstreamUrlKind) and "@" in text else text
        fail(WRONG, f'{source} = "{shown}": {str(why) or f"allowed: {kind.allowed}"}')


def check_address(address: str, option: str, *, may_be_null: bool = False) -> None:
    """End the process with status 2 unless the option's value is a mail address, or "" where that is allowed."""
    from otel_smtp.smtp.paths import is_mailbox

    if not (is_mailbox(address) or (may_be_null and not address)):
        fail(WRONG, f'{option} = "{address}": allowed: an address such as alice@example.com')


def fail(status: int, message: str, *details: str) -> NoReturn:
    """End the process with a message, and its details on lines of their own, on stderr."""
    click.echo("\n".join([f"otel-smtp: {message}", *(f"  {line}" for line in details)]), err=True)
    raise SystemExit(status)


def fail_settings(error: SettingsError) -> NoReturn:
    """End the process because of invalid settings."""
    fail(WRONG, "invalid settings", *(str(problem) for problem in error.problems))


def console() -> "Console":
    """Where a command draws."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)
