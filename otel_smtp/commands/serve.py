"""`otel-smtp serve`: run the gateway.

Nothing is imported here that the first greeting does not need.
"""

import contextlib
import gc
import json
import logging
import os
import resource
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from otel_smtp.commands.options import (
    fail_settings,
    global_flags,
    global_options,
    listen_option,
    upstream_option,
)
from otel_smtp.config import Flag, SettingsError
from otel_smtp.gateway.signals import hold_back

if TYPE_CHECKING:
    from otel_smtp.gateway.gateway import Ready

logger: Final = logging.getLogger("otel_smtp.commands.serve")


@click.command()
@listen_option
@upstream_option
@click.option("--workers", "-w", metavar="NUMBER", help="Number of processes that share the ports.")
@click.option("--status", metavar="HOST:PORT|off", help="Where the status page listens.")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
@global_flags("Print the line that says it is ready, and those of the log, as JSON.")
@click.pass_context
def serve(
    context: click.Context,
    *,
    listen: tuple[str, ...],
    upstream: tuple[str, ...],
    workers: str | None,
    status: str | None,
    log_level: str | None,
    as_json: bool,
) -> None:
    """Run the gateway.

    SIGTERM drains it; a second SIGTERM stops it at once. SIGHUP reads settings, certificates and users again, as
    `otel-smtp reload` does.
    """
    hold_back()  # first: from here on an early SIGHUP is a late reload
    _fill_standard_descriptors()
    # Until it serves (`leave_out_of_garbage_collection`): objects made at the start stay, and collecting them takes a
    # sixth of the time to the first greeting.
    gc.disable()
    # gRPC writes its own lines between those of the log, one for each failed handshake; the log already says why it
    # failed.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    _leave_out_what_httpx_would_draw_with()
    _raise_file_limit()
    options = {
        "--workers": ("workers", workers),
        "--status": ("status.address", status),
        "--log-level": ("log.level", log_level),
        "--json": ("log.format", "json" if as_json else None),
    }
    flags = [Flag(option, key, value) for option, (key, value) in options.items() if value is not None]
    read_settings = partial(global_options(context).read, flags=flags, listen=listen, upstream=upstream)
    try:
        settings = read_settings()
    except SettingsError as error:
        fail_settings(error)
    from otel_smtp.telemetry.line_output import Console
    from otel_smtp.telemetry.logs import set_up_logging

    # https://no-color.org: whatever its value, unless it is empty.
    colors = False if os.environ.get("NO_COLOR") else None
    set_up_logging(settings.log.format, settings.log.level, sys.stderr, colors=colors)
    for warning in settings.warnings:
        logger.warning("questionable setting", extra={"setting": warning})
    from otel_smtp.gateway.running import run

    def say_ready(ready: "Ready") -> None:
        # Only programs that wait for this line need it: a full or closed pipe stops no mail.
        with contextlib.suppress(OSError, ValueError):
            Console().write((json.dumps(ready_fields(ready)) if as_json else ready_line(ready)) + "\n")

    raise SystemExit(run(settings, on_ready=say_ready, read_settings=read_settings))


def _fill_standard_descriptors() -> None:
    """Open the null device in place of each closed standard stream.

    Otherwise a connection would get its descriptor, and a library's output there would go to that peer.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest descriptor that is free (open(2)): this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))


def _leave_out_what_httpx_would_draw_with() -> None:
    """Let httpx do without its command, as if rich were not installed.

    Importing the library imports its command, and for that rich and pygments: here at the first export, while mail is
    relayed. That takes 40 ms, in which the interpreter does nothing else, and 4 MiB. Only for a process that is nothing
    but a gateway.
    """
    sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]  # None: there is no such module


def _raise_file_limit() -> None:
    """Raise the limit on open files as far as the system allows: the soft limit is low for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):
            return  # macOS has a hard limit that it does not grant; the soft one stays


def ready_fields(ready: "Ready") -> dict[str, Any]:
    """The same for `--json`."""
    return {
        "event": "ready",
        "listeners": {
            listener.name: [str(address) for address in ready.addresses.get(listener.name, ())]
            for listener in ready.settings.listener
        },
        "upstreams": {upstream.name: str(upstream.url) for upstream in ready.settings.upstream},
        "status": f"http://{ready.status}" if ready.status is not None else None,
        "traces_to": ready.traces_to,
    }


def ready_line(ready: "Ready") -> str:
    """One line with all addresses, for people and for scripts that wait for it."""
    settings = ready.settings
    listeners = []
    for listener in settings.listener:
        addresses = " ".join(str(address) for address in ready.addresses.get(listener.name, ()))
        name = f" ({listener.name})" if len(settings.listener) > 1 else ""
        listeners.append(f"{listener.protocol}{name} {addresses}")
    upstreams = ", ".join(
        f"{upstream.name} {upstream.url}" if upstream.name != str(upstream.url.endpoint) else str(upstream.url)
        for upstream in settings.upstream
    )
    status = f"http://{ready.status}" if ready.status is not None else "off"
    return f"otel-smtp ready: {', '.join(listeners)} -> {upstreams}; status {status}; traces -> {ready.traces_to}"
