"""This project's gateway, run by its own command."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.bench.process import Child
from tests.bench.targets.base import Place, Running, Target, UnavailableError
from tests.support import postgresql
from tests.support.ports import unclaimed_port

TRACING_OFF: Final = {"OTEL_SDK_DISABLED": "true"}
SAMPLED_TO_NOTHING: Final = {"OTEL_TRACES_SAMPLER": "always_off"}
# Exported within half a second, so that a run's spans are counted with the run; a queue that drops nothing.
_EXPORT: Final = {
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_BSP_SCHEDULE_DELAY": "500",
    "OTEL_BSP_MAX_QUEUE_SIZE": "131072",
}
_TRACES_ONLY: Final = {"OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
# Loads are meant to reach the machine's bounds and not these. A client's bound does not hold on the loopback.
_UNBOUNDED: Final = {
    "OTELSMTP_LIMITS__CONNECTIONS": "5000",
    "OTELSMTP_LIMITS__MESSAGES_PER_CONNECTION": "100000000",
    "OTELSMTP_LIMITS__MESSAGE_SIZE": "100MiB",
    "OTELSMTP_HOSTNAME": "gateway.example.com",
}
_PAGE: Final = {"OTELSMTP_STATUS__ADDRESS": "127.0.0.1:0"}  # on, at a port of the kernel's choice
_NO_PAGE: Final = {"OTELSMTP_STATUS__ADDRESS": "off"}
_NO_ACCESS_LOG: Final = {"OTELSMTP_LOG__LEVEL": "warning"}


def settings(port: int, upstream_port: int) -> dict[str, str]:
    """Its settings as environment variables."""
    return {
        **_UNBOUNDED,
        "OTELSMTP_LISTEN": f"127.0.0.1:{port}",
        "OTELSMTP_UPSTREAM": f"smtp://127.0.0.1:{upstream_port}",
    }


def collector(port: int) -> dict[str, str]:
    """OpenTelemetry's variables for a collector on this machine that gets traces only."""
    return {**_EXPORT, **_TRACES_ONLY, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}


def start(
    place: Place,
    environment: Mapping[str, str],
    *,
    program: Sequence[str] = ("-m", "otel_smtp.commands.cli"),
    without_uvloop: bool = False,
    pipes_log: bool = False,
) -> Running:
    """Start it; `program` is the command line of a Python that runs it, as a profiler's wrapper."""
    port = unclaimed_port()
    all_settings = {**settings(port, place.upstream_port), **environment}
    if without_uvloop:
        all_settings["PYTHONPATH"] = f"{_hide_uvloop(place.directory)}:{Path.cwd()}"
    child = Child(
        [sys.executable, *program, "serve"],
        environment=all_settings,
        log=place.directory / "log",
        pipes_log=pipes_log,
    )
    return Running(child, port)


def _hide_uvloop(directory: Path) -> Path:
    """A directory for the module path in which uvloop cannot be imported, as where it is not installed."""
    hiding = directory / "without_uvloop"
    hiding.mkdir(exist_ok=True)
    (hiding / "uvloop.py").write_text("raise ImportError('hidden by the benchmark')\n", encoding="ascii")
    return hiding


def _gateway(
    name: str,
    environment: Mapping[str, str],
    *,
    traced: bool = False,
    page: bool = False,
    without_uvloop: bool = False,
    is_durable: bool = False,
) -> Target:
    def begin(place: Place) -> Running:
        traces = collector(place.collector_port) if "OTEL_SDK_DISABLED" not in environment else {}
        spool = {"OTELSMTP_SPOOL__DIRECTORY": str(place.directory / "spool")} if is_durable else {}
        shown = {**_NO_ACCESS_LOG, **(_PAGE if page else _NO_PAGE)}
        return start(place, {**traces, **spool, **shown, **environment}, without_uvloop=without_uvloop)

    return _target(name, begin, traced=traced, is_durable=is_durable)


def _target(name: str, begin: Callable[[Place], Running], *, traced: bool, is_durable: bool = False) -> Target:
    return Target(
        name, begin, language="Python", is_gateway=True, exports_spans=traced, answers_before_delivery=is_durable
    )


def _as_installed(place: Place) -> Running:
    exported = {**_EXPORT, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{place.collector_port}"}
    return start(place, {**exported, **_PAGE}, pipes_log=True)


def _on_postgresql(place: Place) -> Running:
    """A gateway whose queue is in a database server of its own, on the same disk."""
    try:
        server = postgresql.Server("shared_buffers = 128MB", "max_wal_size = 2GB", parent=place.directory)
    except (pytest.skip.Exception, pytest.fail.Exception) as missing:
        raise UnavailableError(str(missing)) from missing
    try:
        server.start()
        assert server.process is not None
        queue = {**_QUEUE, "OTELSMTP_SPOOL__URL": server.url()}
        migrated = Child(
            [sys.executable, "-m", "otel_smtp.commands.cli", "queue", "migrate"],
            environment={**queue, "OTELSMTP_UPSTREAM": "smtp://127.0.0.1"},
            log=place.directory / "log",
        )
        if (status := migrated.wait()) != 0:
            raise UnavailableError(f"otel-smtp queue migrate ended with status {status}")
        shown = {**_NO_ACCESS_LOG, **_PAGE}
        running = start(place, {**collector(place.collector_port), **shown, **queue})
    except BaseException:
        server.remove()
        raise
    running.beside = [server.process.pid]
    running.release = server.remove
    return running


def watched(place: Place) -> Running:
    """The headline's gateway under `targets.watched`, whose socket is `watch` in its directory."""
    return start(
        place,
        {**collector(place.collector_port), **_NO_ACCESS_LOG, **_PAGE},
        program=("-m", "tests.bench.targets.watched", os.fspath(place.directory / "watch")),
    )


_TWO: Final = {"OTELSMTP_WORKERS": "2"}
_QUEUE: Final = {"OTELSMTP_DELIVERY__MODE": "queue"}

OFF: Final = _gateway("gateway, tracing off", TRACING_OFF)
SAMPLED: Final = _gateway("gateway, sampled to nothing", SAMPLED_TO_NOTHING)
TRACED_ONLY: Final = _gateway("gateway, traced only", {}, traced=True)
TRACED: Final = _gateway("gateway, traced", {}, traced=True, page=True)
AS_INSTALLED: Final = _target("gateway, as installed", _as_installed, traced=True)
ASYNCIO: Final = _gateway("gateway, traced, asyncio's loop", {}, traced=True, page=True, without_uvloop=True)
TWO: Final = _gateway("gateway, traced, 2 workers", _TWO, traced=True, page=True)
QUEUE: Final = _gateway("gateway-queue, traced", _QUEUE, traced=True, page=True, is_durable=True)
QUEUE_POSTGRESQL: Final = _target("gateway-queue-postgresql, traced", _on_postgresql, traced=True, is_durable=True)
