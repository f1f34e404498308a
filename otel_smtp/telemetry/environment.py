"""What the OTEL_* variables ask for. They are read here and nowhere else.

`read` returns all of it as values: the set-up makes exporters of them, `check --connect` tries them, and the ready line
describes them. Names, defaults and meaning are the Python SDK's: timeouts of OTLP are seconds
(OTEL_EXPORTER_OTLP_TIMEOUT), those of batches milliseconds (OTEL_BSP_*, OTEL_BLRP_*). The SDK logs a value that it
cannot read and uses another; we refuse it at start. Without an endpoint nothing is dialled: exporting to localhost by
default would fill logs.

The resource's variables, OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, are read by the SDK's detectors.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE,
    OTEL_METRIC_EXPORT_INTERVAL,
    OTEL_SDK_DISABLED,
    OTEL_TRACES_SAMPLER,
    OTEL_TRACES_SAMPLER_ARG,
)
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.util.re import parse_env_headers

from otel_smtp.telemetry.attributes import DEFAULT_SERVICE_NAME
from otel_smtp.telemetry.collector import CollectorSettings, Compression, Protocol, Signal
from otel_smtp.telemetry.exporting import BatchSettings

_OTLP: Final = "OTEL_EXPORTER_OTLP"
_BATCHES: Final = {Signal.TRACES: "OTEL_BSP", Signal.LOGS: "OTEL_BLRP"}
_DELAY_MILLISECONDS: Final = {Signal.TRACES: 5000, Signal.LOGS: 1000}
_METRICS_INTERVAL_MILLISECONDS: Final = 60_000
_DEFAULT_BATCHES: Final = BatchSettings()
# Plug-ins by which the SDK's exporter authenticates (a cloud's identity). Only that exporter can use them.
_CREDENTIAL_PROVIDERS: Final = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_TRACES_CREDENTIAL_PROVIDER",
)


# Allowed exporters. Logs are written to the console in any case, and the status port serves the metrics page in any
# case, so those two names add nothing. The names after otlp are those of the SDK's own exporters.
_SDK_NAMES: Final = {"otlp_proto_http": Protocol.HTTP, "otlp_proto_grpc": Protocol.GRPC}
_EXPORTERS: Final = {
    Signal.TRACES: ("none", "console", "otlp", *_SDK_NAMES),
    Signal.METRICS: ("none", "console", "otlp", "prometheus"),
    Signal.LOGS: ("none", "console", "otlp"),
}

_DEFAULT_SAMPLER: Final = "parentbased_always_on"
_SAMPLERS: Final[Mapping[str, Callable[[float], Sampler]]] = {
    "always_on": lambda ratio: ALWAYS_ON,
    "always_off": lambda ratio: ALWAYS_OFF,
    "traceidratio": TraceIdRatioBased,
    "parentbased_always_on": lambda ratio: ParentBased(ALWAYS_ON),
    "parentbased_always_off": lambda ratio: ParentBased(ALWAYS_OFF),
    "parentbased_traceidratio": lambda ratio: ParentBased(TraceIdRatioBased(ratio)),
}


class TelemetrySettingError(ValueError):
    """An OTEL_* variable with an invalid value; the message names both, and what is allowed."""

    def __init__(self, variable: str, value: str, allowed: str) -> None:
        super().__init__(f"{variable}={value!r}: allowed is {allowed}")
        self.variable = variable


@dataclass(frozen=True, slots=True)
class SignalExport:
    """Where one signal goes.

    Attributes:
        to_console: written to standard output.
        collector: where our own exporter sends it; None: nowhere.
        batches: how spans or log records wait and travel there; for metrics its `request_seconds` alone counts.
        sdk_collectors: where the SDK's exporters send it, which read the variables for themselves.
    """

    to_console: bool = False
    collector: CollectorSettings | None = None
    batches: BatchSettings = _DEFAULT_BATCHES
    sdk_collectors: tuple[CollectorSettings, ...] = ()

    @property
    def collectors(self) -> tuple[CollectorSettings, ...]:
        """All collectors that receive the signal."""
        return (*([self.collector] if self.collector is not None else []), *self.sdk_collectors)


@dataclass(frozen=True, slots=True)
class Environment:
    """What the OTEL_* variables ask for.

    Attributes:
        is_disabled: nothing is traced or exported (OTEL_SDK_DISABLED).
        metrics_interval_seconds: between two exports of metrics.
    """

    is_disabled: bool = False
    traces: SignalExport = SignalExport()
    metrics: SignalExport = SignalExport()
    logs: SignalExport = SignalExport()
    metrics_interval_seconds: float = _METRICS_INTERVAL_MILLISECONDS / 1000
    sampler: Sampler = field(default_factory=lambda: _SAMPLERS[_DEFAULT_SAMPLER](1.0))

    @property
    def collectors(self) -> tuple[CollectorSettings, ...]:
        """All collectors that receive a signal."""
        return tuple(collector for one in (self.traces, self.metrics, self.logs) for collector in one.collectors)

    def describe_traces(self) -> str:
        """Where traces go, in a few words and without credentials: for the ready line."""
        if self.is_disabled:
            return "nowhere (OTEL_SDK_DISABLED)"
        targets = ["console"] if self.traces.to_console else []
        targets += [f"{collector.protocol} {collector.shown_endpoint}" for collector in self.traces.collectors]
        return ", ".join(targets) or "nowhere (no OTLP endpoint set)"


def read(environ: Mapping[str, str] | None = None, version: str = "") -> Environment:
    """Read the variables. Those of a signal that is not exported are ignored.

    Args:
        environ: None: that of this process.
        version: of this program, for the user agent.

    Raises:
        TelemetrySettingError: a variable has an invalid value.
    """
    environ = os.environ if environ is None else environ
    if _flag(environ, OTEL_SDK_DISABLED):
        return Environment(is_disabled=True)
    metrics = _signal_export(environ, version, Signal.METRICS)
    is_exporting_metrics = metrics.to_console or metrics.collector is not None
    return Environment(
        traces=_signal_export(environ, version, Signal.TRACES),
        metrics=metrics,
        logs=_signal_export(environ, version, Signal.LOGS),
        metrics_interval_seconds=_metrics_interval_seconds(environ if is_exporting_metrics else {}),
        sampler=_sampler(environ),
    )


def own_resource() -> Resource:
    """Who we are, as the SDK's detectors say; the service is `otel-smtp` if nothing names it."""
    resource = Resource.create()
    is_named = not str(resource.attributes[SERVICE_NAME]).startswith("unknown_service")
    return resource if is_named else resource.merge(Resource({SERVICE_NAME: DEFAULT_SERVICE_NAME}))


def _signal_export(environ: Mapping[str, str], version: str, signal: Signal) -> SignalExport:
    exporters = _exporters(environ, signal)
    is_otlp = "otlp" in exporters
    # The SDK's exporter is the only one that can use a credential provider, which exist for traces alone.
    is_sdk = is_otlp and signal is Signal.TRACES and any(environ.get(name) for name in _CREDENTIAL_PROVIDERS)
    protocols = [_protocol(environ, signal)] if is_sdk else []
    protocols += [_SDK_NAMES[name] for name in exporters if name in _SDK_NAMES]
    is_ours = is_otlp and not is_sdk
    return SignalExport(
        to_console="console" in exporters and signal is not Signal.LOGS,
        collector=_collector(environ, version, signal, _protocol(environ, signal)) if is_ours else None,
        batches=_batches(environ, signal) if is_ours else _DEFAULT_BATCHES,
        sdk_collectors=tuple(_collector(environ, version, signal, protocol) for protocol in protocols),
    )


def _exporters(environ: Mapping[str, str], signal: Signal) -> list[str]:
    """The exporters that OTEL_<signal>_EXPORTER lists. Without it: otlp if the signal has an endpoint, else none."""
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    has_endpoint = bool(_otlp(environ, "ENDPOINT", signal)[1])
    value = environ.get(variable, "").strip() or ("otlp" if has_endpoint else "none")
    exporters = [part.strip() for part in value.split(",") if part.strip()]
    allowed = _EXPORTERS[signal]
    if not {*exporters} <= {*allowed}:
        raise TelemetrySettingError(variable, value, f"{', '.join(allowed)}, or a list of them")
    return exporters


def _flag(environ: Mapping[str, str], variable: str) -> bool:
    value = environ.get(variable, "").strip().lower()
    if value not in ("", "true", "false"):
        raise TelemetrySettingError(variable, value, "true, false")
    return value == "true"


def _sampler(environ: Mapping[str, str]) -> Sampler:
    name = environ.get(OTEL_TRACES_SAMPLER, "").strip().lower() or _DEFAULT_SAMPLER
    if name not in _SAMPLERS:
        raise TelemetrySettingError(OTEL_TRACES_SAMPLER, name, ", ".join(_SAMPLERS))
    argument = environ.get(OTEL_TRACES_SAMPLER_ARG, "").strip()
    try:
        return _SAMPLERS[name](float(argument or "1"))
    except ValueError:
        raise TelemetrySettingError(OTEL_TRACES_SAMPLER_ARG, argument, "a number from 0 to 1") from None


def _metrics_interval_seconds(environ: Mapping[str, str]) -> float:
    # Our sums are since the start of the process; there are none since the last export.
    variable = OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE
    preference = environ.get(variable, "").strip()
    if preference.lower() not in ("", "cumulative"):
        raise TelemetrySettingError(variable, preference, "cumulative")
    variable = OTEL_METRIC_EXPORT_INTERVAL
    return _number(variable, environ.get(variable, "").strip(), default=_METRICS_INTERVAL_MILLISECONDS) / 1000


def _protocol(environ: Mapping[str, str], signal: Signal) -> Protocol:
    variable, value = _otlp(environ, "PROTOCOL", signal)
    if value not in ("", *Protocol):
        raise TelemetrySettingError(variable, value, ", ".join(Protocol))
    return Protocol(value or Protocol.HTTP)


def _collector(environ: Mapping[str, str], version: str, signal: Signal, protocol: Protocol) -> CollectorSettings:
    is_http = protocol is Protocol.HTTP
    endpoint = _http_endpoint(environ, signal) if is_http else _grpc_endpoint(environ, signal)
    scheme = urlsplit(endpoint).scheme
    return CollectorSettings(
        endpoint,
        protocol=protocol,
        signal=signal,
        # The scheme decides. Without one gRPC is encrypted, unless the variable says otherwise.
        is_insecure=scheme == "http" or (scheme != "https" and _flag(environ, _otlp(environ, "INSECURE", signal)[0])),
        headers=tuple(parse_env_headers(_otlp(environ, "HEADERS", signal)[1], liberal=True).items()),
        compression=_compression(environ, signal),
        certificate=_otlp(environ, "CERTIFICATE", signal)[1],
        client_key=_otlp(environ, "CLIENT_KEY", signal)[1],
        client_certificate=_otlp(environ, "CLIENT_CERTIFICATE", signal)[1],
        user_agent=f"otel-smtp/{version}" if version else "otel-smtp",
    )


def _batches(environ: Mapping[str, str], signal: Signal) -> BatchSettings:
    request_seconds = _number(*_otlp(environ, "TIMEOUT", signal), default=_DEFAULT_BATCHES.request_seconds)
    if signal is Signal.METRICS:  # which go in one request, at an interval
        return BatchSettings(request_seconds=request_seconds)
    prefix = _BATCHES[signal]

    def seconds(what: str, default: float) -> float:
        variable = f"{prefix}_{what}"
        return _number(variable, environ.get(variable, "").strip(), default=default) / 1000

    ours = BatchSettings()
    queue = _count(environ, f"{prefix}_MAX_QUEUE_SIZE", ours.queue_spans)
    batch = _count(environ, f"{prefix}_MAX_EXPORT_BATCH_SIZE", min(ours.batch_spans, queue))
    if batch > queue:
        raise TelemetrySettingError(
            f"{prefix}_MAX_EXPORT_BATCH_SIZE", str(batch), f"a number up to {prefix}_MAX_QUEUE_SIZE, {queue}"
        )
    return BatchSettings(
        queue_spans=queue,
        batch_spans=batch,
        delay_seconds=seconds("SCHEDULE_DELAY", _DELAY_MILLISECONDS[signal]),
        export_seconds=seconds("EXPORT_TIMEOUT", 30_000),
        request_seconds=request_seconds,
    )


def _otlp(environ: Mapping[str, str], what: str, signal: Signal) -> tuple[str, str]:
    """The signal's own variable, or the one for all signals, and its value: the first that is set."""
    for variable in (f"{_OTLP}_{signal.upper()}_{what}", f"{_OTLP}_{what}"):
        if value := environ.get(variable, "").strip():
            return variable, value
    return f"{_OTLP}_{what}", ""


def _http_endpoint(environ: Mapping[str, str], signal: Signal) -> str:
    variable, value = _otlp(environ, "ENDPOINT", signal)
    url = value or "http://localhost:4318"
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise TelemetrySettingError(variable, value, "a URL as http://collector:4318")
    # The signal's own URL is used as it is; the path is added to the one for all signals (OTLP exporter specification).
    return f"{url.removesuffix('/')}/v1/{signal}" if variable == f"{_OTLP}_ENDPOINT" else url


def _grpc_endpoint(environ: Mapping[str, str], signal: Signal) -> str:
    return _otlp(environ, "ENDPOINT", signal)[1] or "http://localhost:4317"


def _compression(environ: Mapping[str, str], signal: Signal) -> Compression:
    variable, value = _otlp(environ, "COMPRESSION", signal)
    value = value.lower()
    if value not in ("", *Compression):
        raise TelemetrySettingError(variable, value, ", ".join(Compression))
    return Compression(value or Compression.NONE)


def _count(environ: Mapping[str, str], variable: str, default: int) -> int:
    value = environ.get(variable, "").strip()
    if not value:
        return default
    if not (value.isascii() and value.isdecimal() and 0 < int(value[:10]) <= 1_000_000):
        raise TelemetrySettingError(variable, value, "a number from 1 to 1000000")
    return int(value)


def _number(variable: str, value: str, *, default: float) -> float:
    if not value:
        return default
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e9:
        raise TelemetrySettingError(variable, value, "a number above 0")
    return number
