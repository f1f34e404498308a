"""This project's gateway, run by its own command."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench.process import Child
from tests.bench.targets.base import Place, Running, Target
from tests.support.ports import unclaimed_port

TRACING_OFF = {"OTEL_SDK_DISABLED": "true"}
SAMPLED_TO_NOTHING = {"OTEL_TRACES_SAMPLER": "always_off"}
# Exported within half a second, so that a run's spans are counted with the run; a queue that drops nothing.
EXPORT = {
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
    "OTEL_BSP_SCHEDULE_DELAY": "500",
    "OTEL_BSP_MAX_QUEUE_SIZE": "131072",
}
# Loads are meant to reach the machine's bounds and not these. A client's bound does not hold on the loopback.
_UNBOUNDED = {
    "OTELSMTP_LIMITS__CONNECTIONS": "5000",
    "OTELSMTP_LIMITS__MESSAGES_PER_CONNECTION": "100000000",
    "OTELSMTP_LIMITS__MESSAGE_SIZE": "100MiB",
    "OTELSMTP_STATUS__ADDRESS": "off",
    "OTELSMTP_LOG__LEVEL": "warning",
    "OTELSMTP_HOSTNAME": "gateway.example.com",
}


def settings(port: int, upstream_port: int) -> dict[str, str]:
    """Its settings as environment variables."""
    return {
        **_UNBOUNDED,
        "OTELSMTP_LISTEN": f"127.0.0.1:{port}",
        "OTELSMTP_UPSTREAM": f"smtp://127.0.0.1:{upstream_port}",
    }


def collector(port: int) -> dict[str, str]:
    """OpenTelemetry's variables for a collector on this machine."""
    return {**EXPORT, "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}"}


def start(
    place: Place,
    environment: Mapping[str, str],
    *,
    program: Sequence[str] = ("-m", "otel_smtp.commands.cli"),
    without_uvloop: bool = False,
) -> Running:
    """Start it; `program` is the command line of a Python that runs it, as a profiler's wrapper."""
    port = unclaimed_port()
    all_settings = {**settings(port, place.upstream_port), **environment}
    if without_uvloop:
        all_settings["PYTHONPATH"] = f"{_hide_uvloop(place.directory)}:{Path.cwd()}"
    child = Child([sys.executable, *program, "serve"], environment=all_settings, log=place.directory / "log")
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
    without_uvloop: bool = False,
    is_durable: bool = False,
) -> Target:
    def begin(place: Place) -> Running:
        traces = collector(place.collector_port) if "OTEL_SDK_DISABLED" not in environment else {}
        spool = {"OTELSMTP_SPOOL__DIRECTORY": str(place.directory / "spool")} if is_durable else {}
        return start(place, {**traces, **spool, **environment}, without_uvloop=without_uvloop)

    return Target(name, begin, exports_spans=traced, answers_before_delivery=is_durable)


_BUFFERED = {"OTELSMTP_DELIVERY__STRATEGY": "buffered"}
_TWO = {"OTELSMTP_WORKERS": "2"}
_QUEUE = {"OTELSMTP_DELIVERY__MODE": "queue"}

GATEWAY_OFF = _gateway("gateway, tracing off", TRACING_OFF)
GATEWAY_SAMPLED = _gateway("gateway, sampled to nothing", SAMPLED_TO_NOTHING)
GATEWAY_TRACED = _gateway("gateway, all exported", {}, traced=True)
GATEWAY_SDK = _gateway(
    "gateway, all exported by the SDK's exporter", {"OTEL_TRACES_EXPORTER": "otlp_proto_http"}, traced=True
)
GATEWAY_ASYNCIO = _gateway("gateway, all exported, asyncio's loop", {}, traced=True, without_uvloop=True)
GATEWAY_BUFFERED = _gateway("gateway, buffered, tracing off", {**TRACING_OFF, **_BUFFERED})
GATEWAY_BUFFERED_TRACED = _gateway("gateway, buffered, all exported", _BUFFERED, traced=True)
GATEWAY_TWO = _gateway("gateway, 2 workers, tracing off", {**TRACING_OFF, **_TWO})
GATEWAY_TWO_TRACED = _gateway("gateway, 2 workers, all exported", _TWO, traced=True)
GATEWAY_QUEUE = _gateway("gateway, queue, tracing off", {**TRACING_OFF, **_QUEUE}, is_durable=True)
GATEWAY_QUEUE_TRACED = _gateway("gateway, queue, all exported", _QUEUE, traced=True, is_durable=True)
