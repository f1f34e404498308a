"""`otel-smtp reload`: let a running gateway read its settings again, and report the result."""

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

from otel_smtp.commands.options import FAILED, WRONG, fail, global_flags, global_options
from otel_smtp.observing import Endpoint

ANSWER_SECONDS: Final = 5.0
"""For one answer of the status port."""
RELOAD_SECONDS: Final = 30.0
"""For the reload itself: a gateway that is busy takes its signals late."""
_ASK_AGAIN_SECONDS: Final = 0.05
"""Between two polls: the status port answers at once, and a signal has no reply to wait for."""


@click.command()
@global_flags("Print one line of JSON per process.")
@click.pass_context
def reload(context: click.Context, *, as_json: bool) -> None:
    """Let the running gateway read its settings again.

    Certificates and users are read again, too. No connection is dropped. Wrong settings change nothing.

    The settings say where the gateway's status port is; the gateway itself reads those that it was started with. Run it
    where the gateway runs, as the gateway's user or as root.
    """
    settings = global_options(context).settings(needs_upstream=False)
    address = settings.status.address
    if address is None:
        fail(FAILED, "reload: the settings have no status port; send SIGHUP to the gateway, and look at its log")
    before = _ask(address)
    _signal(before[0])
    after = _wait(address, before)
    for number, process in enumerate(after):
        last = process["last_reload"]
        if as_json:
            click.echo(json.dumps({"process": number, "pid": process["pid"], **last}))
        elif number == 0:
            _tell(last)
    if any(process["last_reload"]["problems"] for process in after):
        raise SystemExit(WRONG)


def _tell(last: Mapping[str, Any]) -> None:
    if last["problems"]:
        click.echo("otel-smtp: not reloaded, nothing was changed", err=True)
        for problem in last["problems"]:
            click.echo(f"  {problem}", err=True)
        return
    changed: Sequence[str] = last["changed"]
    click.echo("reloaded; " + (f"changed: {', '.join(changed)}" if changed else "no setting has changed"))
    if last["needs_restart"]:
        click.echo(f"as before until a restart: {', '.join(last['needs_restart'])}")


def _ask(address: Endpoint) -> Sequence[Mapping[str, Any]]:
    """Each process's report about its reloads."""
    import httpx

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)  # noqa: S104 - where to ask
    url = f"http://{Endpoint(host, address.port)}/api/reloads"
    try:
        answer = httpx.get(url, timeout=ANSWER_SECONDS, trust_env=False)
    except httpx.HTTPError as error:
        why = _why(error)
        fail(
            FAILED,
            f"reload: no gateway answers at {address}, the status.address of these settings: {why}",
            "if the running gateway was started with another one, give it: --set status.address=HOST:PORT",
        )
    try:
        processes: Sequence[Mapping[str, Any]] = answer.raise_for_status().json()["processes"]
        processes[0]["pid"]
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
        fail(FAILED, f"reload: the server at {address} (status.address) is not a gateway that this command can reload")
    return processes


def _why(error: Exception) -> str:
    """The system's error text, if there is one: the library's has only the number."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror.lower()
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


def _signal(process: Mapping[str, Any]) -> None:
    from otel_smtp.gateway.reloading import pid_namespace

    if process["pid_namespace"] != pid_namespace():
        # The same number is another process here.
        fail(FAILED, "reload: the gateway runs in another container; run this command in that one")
    try:
        os.kill(process["pid"], signal.SIGHUP)
    except OSError as error:
        fail(FAILED, f"reload: cannot signal the gateway, process {process['pid']}: {error.strerror}")


def _wait(address: Endpoint, before: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    ends = time.monotonic() + RELOAD_SECONDS
    while time.monotonic() < ends:
        now = _ask(address)
        if len(now) >= len(before) and all(
            process["reloads"] > known["reloads"] for process, known in zip(now, before, strict=False)
        ):
            break
        time.sleep(_ASK_AGAIN_SECONDS)
    else:
        fail(FAILED, f"reload: the gateway has not reloaded within {RELOAD_SECONDS:g} s; see its log")
    return now
