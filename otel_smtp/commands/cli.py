"""The commands. Options are read here; everything else is done elsewhere and imported late: starting up is a figure.

A command is one function, registered by `@app.command()`; it gets its settings from `_settings`, which answers wrong
ones with exit status 2. Exit status: 0 done, 1 failed, 2 wrong use or settings.
"""

import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Final, cast

import typer

from otel_smtp import __version__
from otel_smtp.commands.bench import bench
from otel_smtp.commands.queue import queue
from otel_smtp.config import Flag, Settings, SettingsError, assignment, load

if TYPE_CHECKING:
    from rich.console import Console

    from otel_smtp.config.values import Kind
    from otel_smtp.gateway.gateway import Gateway, Ready

logger: Final = logging.getLogger("otel_smtp.commands.cli")

FAILED: Final = 1
WRONG: Final = 2

app = typer.Typer(
    name="otel-smtp",
    help="An OpenTelemetry-traced SMTP gateway: every connection a span, every state transition an event.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="TOML file of settings. Also OTELSMTP_CONFIG.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="One setting, as limits.recipients=50.")
]
ListenOption = Annotated[
    list[str] | None,
    typer.Option("--listen", "-l", metavar="HOST:PORT", help="Where to listen; repeatable. Also OTELSMTP_LISTEN."),
]
UpstreamOption = Annotated[
    list[str] | None,
    typer.Option("--upstream", "-u", metavar="URL", help="Where mail goes on to; repeatable, in order of preference."),
]


@dataclass
class _Given:
    """What the options in front of the command said."""

    config: Path | None = None
    assignments: list[str] = field(default_factory=list)

    def settings(self) -> Settings:
        """The settings, for commands that have no options for them behind their name."""
        return _settings(cast(typer.Context, SimpleNamespace(obj=self)))


def _version(asked: bool) -> None:
    if asked:
        print(f"otel-smtp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    config: ConfigOption = None,
    assignments: SetOption = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj = _Given(config, assignments or [])


def _settings(
    context: typer.Context,
    *,
    config: Path | None = None,
    assignments: Sequence[str] | None = None,
    flags: Sequence[Flag] = (),
    **more: Any,
) -> Settings:
    """The settings of a command: what stood in front of it, what stands behind it, the environment, the file."""
    given: _Given = context.obj
    try:
        assigned = [assignment(text) for text in [*given.assignments, *(assignments or ())]]
        return load(
            file=config or given.config,
            environ=os.environ,
            flags=[*assigned, *flags],
            **more,
        )
    except SettingsError as error:
        _complain("the settings are refused", *(str(problem) for problem in error.problems))
        raise SystemExit(WRONG) from None


def _parsed(kind: "Kind", text: str, source: str) -> Any:
    """A value that is no setting, by the same rules as settings."""
    from otel_smtp.config.values import BadValue, Given

    try:
        return kind.parse(Given(text, source, is_text=True))
    except BadValue as why:
        _complain(f'{source} = "{text}": {str(why) or f"allowed: {kind.allowed}"}')
        raise SystemExit(WRONG) from None


def _complain(what: str, *why: str) -> None:
    print(f"otel-smtp: {what}", *(f"  {line}" for line in why), sep="\n", file=sys.stderr)


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


# serve ---------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    context: typer.Context,
    listen: ListenOption = None,
    upstream: UpstreamOption = None,
    workers: Annotated[
        str | None, typer.Option("--workers", "-w", metavar="NUMBER", help="Processes that share the ports.")
    ] = None,
    status: Annotated[
        str | None, typer.Option("--status", metavar="HOST:PORT|off", help="Where the status page listens.")
    ] = None,
    log_level: Annotated[str | None, typer.Option("--log-level", metavar="LEVEL", help="debug to error.")] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Run the gateway; SIGTERM drains it, a second one stops it at once."""
    _raise_file_limit()
    named = {
        "--workers": ("workers", workers),
        "--status": ("status.address", status),
        "--log-level": ("log.level", log_level),
    }
    flags = [Flag(flag, key, value) for flag, (key, value) in named.items() if value is not None]
    settings = _settings(
        context, config=config, assignments=assignments, flags=flags, listen=listen or (), upstream=upstream or ()
    )
    _set_up_logging(settings)
    for warning in settings.warnings:
        logger.warning("a setting to think about", extra={"setting": warning})
    from otel_smtp.gateway.running import run

    raise SystemExit(run(settings, on_ready=lambda ready: print(ready_line(ready), flush=True)))


def _set_up_logging(settings: Settings) -> None:
    from otel_smtp.telemetry.logs import set_up_logging

    set_up_logging(settings.log.format, settings.log.level, sys.stderr)


def _raise_file_limit() -> None:
    """Take all the open files that the system grants: the soft limit is low for the sake of programs that select."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):
            return  # macOS has a hard limit that it does not grant; the soft one holds


def ready_line(ready: "Ready") -> str:
    """Where everything is, in one line: for people, and for scripts that wait for it."""
    settings = ready.settings
    parts = []
    for listener in settings.listener:
        where = " ".join(str(address) for address in ready.addresses.get(listener.name, ()))
        name = f" ({listener.name})" if len(settings.listener) > 1 else ""
        parts.append(f"{listener.protocol}{name} {where}")
    upstreams = ", ".join(
        f"{upstream.name} {upstream.url}" if upstream.name != str(upstream.url.endpoint) else str(upstream.url)
        for upstream in settings.upstream
    )
    status = f"http://{ready.status}" if ready.status is not None else "off"
    return f"otel-smtp ready: {', '.join(parts)} -> {upstreams}; status {status}; traces -> {ready.traces_to}"


# check ---------------------------------------------------------------------------------------------------------


@app.command()
def check(
    context: typer.Context,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Show every setting, defaults too.")] = False,
    connect: Annotated[
        bool, typer.Option("--connect", help="Try listeners, upstreams and collector; no mail is sent.")
    ] = False,
    listen: ListenOption = None,
    upstream: UpstreamOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
) -> None:
    """Read the settings and print what would run; with --connect, try it. Exit status 1 where something fails."""
    from otel_smtp.telemetry.logs import set_up_logging

    set_up_logging("auto", "warning", sys.stderr)
    settings = _settings(context, config=config, assignments=assignments, listen=listen or (), upstream=upstream or ())
    gateway = _never_started(settings)
    settings = gateway.settings
    _print_plan(settings, traces_to=gateway.ready.traces_to, everything=everything)
    if connect and not _try_everything(settings):
        raise SystemExit(FAILED)


def _never_started(settings: Settings) -> "Gateway":
    """A gateway that is made only, so that certificates, users and OTEL_* variables are read too."""
    from otel_smtp.gateway.gateway import WRONG_FILES, Gateway

    try:
        return Gateway(settings)
    except WRONG_FILES as error:
        _complain("what the settings name is refused", str(error))
        raise SystemExit(WRONG) from None


def _try_everything(settings: Settings) -> bool:
    """Print each finding as it comes; whether nothing failed."""
    import asyncio

    from otel_smtp.commands.checking import (
        Finding,
        check_collector,
        check_listeners,
        check_spool,
        check_status,
        check_upstream,
    )
    from otel_smtp.commands.terminal.tables import verdict_line
    from otel_smtp.gateway.wiring import upstream_settings
    from otel_smtp.telemetry.logs import set_up_logging

    # What goes wrong is a finding here, and needs no log line too.
    set_up_logging("auto", "error", sys.stderr)
    console = _console()
    console.print()
    found: list[Finding] = []

    def tell(finding: Finding) -> None:
        found.append(finding)
        console.print(verdict_line(*finding), soft_wrap=True)

    async def check_all() -> None:
        async for finding in check_listeners(settings):
            tell(finding)
        if (status := check_status(settings)) is not None:
            tell(status)
        if (spool := check_spool(settings)) is not None:
            tell(spool)
        for upstream in settings.upstream:
            tell(await check_upstream(upstream_settings(upstream), settings.hostname))
        tell(await check_collector(os.environ))

    asyncio.run(check_all())
    return all(finding.verdict != "failed" for finding in found)


def _print_plan(settings: Settings, *, traces_to: str, everything: bool) -> None:
    from otel_smtp.commands.terminal.tables import table, verdict_line
    from otel_smtp.config import describe

    console = _console()
    rows = describe(settings)
    shown = {row.key: row.value for row in rows}
    console.print(
        table(
            "Listeners",
            ("name", "address", "speaks", "TLS", "AUTH", "relays without AUTH"),
            [
                (
                    listener.name,
                    shown[f"listener.{number}.address"],
                    listener.protocol,
                    f"{listener.tls}{', required' if listener.tls_required else ''}",
                    f"{listener.auth}{', in clear too' if listener.auth_in_clear else ''}",
                    shown[f"listener.{number}.allow"] or "nobody",
                )
                for number, listener in enumerate(settings.listener)
            ],
        )
    )
    console.print()
    console.print(
        table(
            f"Upstreams, {settings.delivery.mode} delivery",
            ("name", "url", "login", "serves", "trace headers"),
            [
                (
                    upstream.name,
                    str(upstream.url),
                    f"{upstream.username} ({upstream.auth})" if upstream.username else "none",
                    _serves(upstream.senders, upstream.recipients),
                    str(upstream.trace_context),
                )
                for upstream in settings.upstream
            ],
        )
    )
    console.print()
    console.print(f"[bold]Status[/] {shown['status.address']}   [bold]Traces[/] to {traces_to}", soft_wrap=True)
    console.print()
    wanted = [row for row in rows if everything or row.origin != "default"]
    title = "Settings" if everything else "Settings that are set"
    console.print(table(title, ("key", "value", "set in"), wanted))
    for warning in settings.warnings:
        console.print(verdict_line("warning", "warning", warning), soft_wrap=True)


def _serves(senders: Sequence[str], recipients: Sequence[str]) -> str:
    parts = [f"from {', '.join(senders)}"] if senders else []
    parts += [f"to {', '.join(recipients)}"] if recipients else []
    return " ".join(parts) or "all"


# send ----------------------------------------------------------------------------------------------------------


@app.command()
def send(
    to: Annotated[list[str], typer.Option("--to", "-t", metavar="ADDRESS", help="Recipient; repeatable.")],
    gateway: Annotated[
        str, typer.Argument(metavar="[GATEWAY]", help="host:port, or a URL: smtp://, smtp+starttls://, smtps://.")
    ] = "127.0.0.1:2525",
    sender: Annotated[
        str, typer.Option("--from", "-f", metavar="ADDRESS", help='Sender; "" is the null path.')
    ] = "otel-smtp@localhost",
    starttls: Annotated[bool, typer.Option("--starttls", help="Require STARTTLS, verified.")] = False,
    ca_file: Annotated[Path | None, typer.Option("--ca-file", help="Authorities to trust, PEM.")] = None,
    user: Annotated[str | None, typer.Option("--user", help="Log in as.")] = None,
    password_file: Annotated[Path | None, typer.Option("--password-file", help="Its first line.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="A message to send, as .eml.")] = None,
    size: Annotated[str | None, typer.Option("--size", help='Make the test mail at least so big, as "5MiB".')] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for each reply.")] = 30.0,
) -> None:
    """Send a test mail through a gateway; print its replies and the id of its trace."""
    from otel_smtp.commands.send import SendingFailed, sample_message
    from otel_smtp.commands.send import send as send_message
    from otel_smtp.commands.terminal.tables import exchange_line
    from otel_smtp.config.values import Secret, Size, UpstreamUrlKind

    console = _console()
    url = gateway if "://" in gateway else f"smtp{'+starttls' if starttls else ''}://{gateway}"
    where = _parsed(UpstreamUrlKind(schemes=("smtp", "smtp+starttls", "smtps")), url, "GATEWAY")
    octets = _parsed(Size(), size, "--size") if size else 0
    try:
        content = file.read_bytes() if file else sample_message(sender=sender, recipients=to, octets=octets)
        password = Secret(password_file.read_text().splitlines()[0]) if password_file else None
    except (OSError, IndexError) as why:
        _complain(f"cannot read the message or the password: {why}")
        raise SystemExit(WRONG) from None
    try:
        sent = send_message(
            where,
            sender=sender,
            recipients=to,
            content=content,
            tell=lambda said, code, text: console.print(exchange_line(said, code, text), soft_wrap=True),
            user=user,
            password=password,
            ca_file=str(ca_file) if ca_file else None,
            timeout=timeout,
        )
    except SendingFailed as why:
        _complain(str(why))
        raise SystemExit(FAILED) from None
    if sent.trace_id:
        console.print(f"trace {sent.trace_id}", style="bold")
    if sent.refused:
        _complain(f"refused for {', '.join(sent.refused)}")
        raise SystemExit(FAILED)


# passwd --------------------------------------------------------------------------------------------------------


@app.command()
def passwd(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The user's name.")],
    scram: Annotated[bool, typer.Option("--scram", help="Keys for SCRAM-SHA-256 instead of an argon2id hash.")] = False,
) -> None:
    """Print a users-file line for a password, which is asked for, or read from the standard input."""
    from otel_smtp.server.users import users_line

    if sys.stdin.isatty():
        password = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        password = sys.stdin.readline().removesuffix("\n").removesuffix("\r")
    try:
        line = users_line(name, password, scram=scram)
    except ValueError as why:
        _complain(str(why))
        raise SystemExit(WRONG) from None
    print(line)


# demo ----------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="End after the mails; do not wait for yours.")] = False,
    listen: ListenOption = None,
    slow: Annotated[
        str, typer.Option("--slow", metavar="DURATION", help="How long the upstream takes to answer each message.")
    ] = "25ms",
    assignments: SetOption = None,
) -> None:
    """Show what it does: a gateway, an upstream that keeps what arrives, four mails and their traces."""
    import asyncio

    from otel_smtp.commands.demo.show import Demonstration
    from otel_smtp.commands.demo.visits import VisitFailed
    from otel_smtp.config.values import Duration
    from otel_smtp.telemetry.logs import set_up_logging

    # The traces are the output; a log line for each mail would stand between them.
    set_up_logging("auto", "error", sys.stderr)
    console = _console()
    given: _Given = context.obj
    try:
        flags = [assignment(text) for text in [*given.assignments, *(assignments or ())]]
        demonstration = Demonstration(
            console, listen=listen or (), flags=flags, answer_after_seconds=_parsed(Duration(0.0), slow, "--slow")
        )
        asyncio.run(demonstration.run(once=once))
    except SettingsError as error:
        _complain("the settings are refused", *(str(problem) for problem in error.problems))
        raise SystemExit(WRONG) from None
    except (OSError, VisitFailed) as error:
        _complain(f"the demonstration failed: {str(error) or type(error).__name__}")
        raise SystemExit(FAILED) from None
    except KeyboardInterrupt:
        pass


app.command()(bench)
app.add_typer(queue, name="queue")


def main() -> None:
    """The entry point."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve"] and (given := plain_arguments(serve, arguments[1:])) is not None:
        # All that a command uses of typer's context is what stood in front of it: nothing.
        serve(cast(typer.Context, SimpleNamespace(obj=_Given())), **given)
    app(prog_name="otel-smtp")


def plain_arguments(command: Callable[..., None], words: Sequence[str]) -> dict[str, Any] | None:
    """Options with their values, as the command declares them; None where something else is said.

    Building its commands costs typer a fifth of the gateway's start-up, since it brings a validation library for it.
    A command whose options are all text can do without; help and wrong use are typer's in any case.
    """
    named: dict[str, tuple[str, bool]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if metadata := getattr(parameter.annotation, "__metadata__", None):
            is_repeatable = "list" in str(parameter.annotation)
            # In an annotation the first name stands where else a default would.
            options = (metadata[0].default, *metadata[0].param_decls)
            named.update(dict.fromkeys(options, (name, is_repeatable)))
    given: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        option, has_value, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if option not in named:
            return None
        if not has_value and (value := next(rest, "")) == "":
            return None
        name, is_repeatable = named[option]
        if is_repeatable:
            given.setdefault(name, []).append(value)
        else:
            given[name] = value
    return given


if __name__ == "__main__":
    main()
