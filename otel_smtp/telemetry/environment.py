"""What the OTEL_* variables say about exporting: what, to whom, how, in what batches.

Names, defaults and meaning are the Python SDK's, so that whoever knows those knows these: timeouts of OTLP are seconds
(OTEL_EXPORTER_OTLP_TIMEOUT), those of batches milliseconds (OTEL_BSP_*, OTEL_BLRP_*). Unlike the SDK, which logs
a value that it can't read and goes on with another, we say so at the start.
"""

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE,
    OTEL_METRIC_EXPORT_INTERVAL,
)
from opentelemetry.util.re import parse_env_headers

from otel_smtp.telemetry.collector import CollectorSettings, Compression, Protocol, Signal
from otel_smtp.telemetry.exporting import BatchSettings

_OTLP: Final = "OTEL_EXPORTER_OTLP"
_BATCHES: Final = {Signal.TRACES: "OTEL_BSP", Signal.LOGS: "OTEL_BLRP"}
_DELAY_MILLISECONDS: Final = {Signal.TRACES: 5000, Signal.LOGS: 1000}
_METRICS_INTERVAL_MILLISECONDS: Final = 60_000
# Plug-ins by which the SDK's exporter signs in somewhere (a cloud's identity); only that exporter can use them.
_CREDENTIAL_PROVIDERS: Final = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_TRACES_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_TRACES_CREDENTIAL_PROVIDER",
)


class TelemetrySettingError(ValueError):
    """An OTEL_* variable that we can't follow; the message names it, its value and what is allowed."""

    def __init__(self, variable: str, value: str, allowed: str) -> None:
        super().__init__(f"{variable}={value!r}: allowed is {allowed}")
        self.variable = variable


def flag(environ: Mapping[str, str], variable: str) -> bool:
    """Whether `variable` is true; it may be absent.

    Raises:
        TelemetrySettingError: it is neither true nor false.
    """
    value = environ.get(variable, "").strip().lower()
    if value not in ("", "true", "false"):
        raise TelemetrySettingError(variable, value, "true, false")
    return value == "true"


def has_endpoint(environ: Mapping[str, str], signal: Signal = Signal.TRACES) -> bool:
    """Whether an OTLP endpoint for the signal is named."""
    return bool(_otlp(environ, "ENDPOINT", signal)[1])


def wanted_exporters(
    environ: Mapping[str, str], signal: Signal, allowed: tuple[str, ...] = ("none", "console", "otlp")
) -> list[str]:
    """The exporters that OTEL_<signal>_EXPORTER lists; where it is not set, otlp if there is an endpoint, else none.

    Raises:
        TelemetrySettingError: one of them is not `allowed`.
    """
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    wanted = environ.get(variable, "").strip() or ("otlp" if has_endpoint(environ, signal) else "none")
    exporters = [part.strip() for part in wanted.split(",") if part.strip()]
    if not {*exporters} <= {*allowed}:
        raise TelemetrySettingError(variable, wanted, f"{', '.join(allowed)}, or a list of them")
    return exporters


def metrics_interval_seconds(environ: Mapping[str, str]) -> float:
    """How often metrics are exported.

    Raises:
        TelemetrySettingError: it is no number, or sums since the last export are asked for: ours are since the start.
    """
    variable = OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE
    preference = environ.get(variable, "").strip()
    if preference.lower() not in ("", "cumulative"):
        raise TelemetrySettingError(variable, preference, "cumulative")
    variable = OTEL_METRIC_EXPORT_INTERVAL
    return _number(variable, environ.get(variable, "").strip(), default=_METRICS_INTERVAL_MILLISECONDS) / 1000


def needs_sdk_exporter(environ: Mapping[str, str]) -> bool:
    """Whether a plug-in is asked for that only the SDK's own exporter knows how to use."""
    return any(environ.get(name) for name in _CREDENTIAL_PROVIDERS)


def protocol_of(environ: Mapping[str, str], signal: Signal = Signal.TRACES) -> Protocol:
    """What OTLP for the signal is spoken over.

    Raises:
        TelemetrySettingError: it is not known to us.
    """
    variable, value = _otlp(environ, "PROTOCOL", signal)
    if value not in ("", *Protocol):
        raise TelemetrySettingError(variable, value, ", ".join(Protocol))
    return Protocol(value or Protocol.HTTP)


def collector_settings(environ: Mapping[str, str], version: str, signal: Signal = Signal.TRACES) -> CollectorSettings:
    """How to reach the collector of the signal.

    Raises:
        TelemetrySettingError: a variable has a value that can't be followed.
    """
    protocol = protocol_of(environ, signal)
    is_http = protocol is Protocol.HTTP
    endpoint = _http_endpoint(environ, signal) if is_http else _grpc_endpoint(environ, signal)
    scheme = urlsplit(endpoint).scheme
    return CollectorSettings(
        endpoint,
        protocol=protocol,
        signal=signal,
        # Without a scheme gRPC is encrypted, unless the variable says otherwise; with one the scheme rules.
        is_insecure=scheme == "http" or (scheme != "https" and flag(environ, _otlp(environ, "INSECURE", signal)[0])),
        headers=tuple(parse_env_headers(_otlp(environ, "HEADERS", signal)[1], liberal=True).items()),
        compression=_compression(environ, signal),
        certificate=_otlp(environ, "CERTIFICATE", signal)[1],
        client_key=_otlp(environ, "CLIENT_KEY", signal)[1],
        client_certificate=_otlp(environ, "CLIENT_CERTIFICATE", signal)[1],
        user_agent=f"otel-smtp/{version}" if version else "otel-smtp",
    )


def request_seconds(environ: Mapping[str, str], signal: Signal) -> float:
    """How long one request of the signal may take.

    Raises:
        TelemetrySettingError: it is no number.
    """
    return _number(*_otlp(environ, "TIMEOUT", signal), default=10.0)


def batch_settings(environ: Mapping[str, str], signal: Signal = Signal.TRACES) -> BatchSettings:
    """How spans, or log records, wait and travel together.

    Raises:
        TelemetrySettingError: a variable has a value that can't be followed.
    """

    prefix = _BATCHES[signal]

    def seconds(what: str, default: float) -> float:
        variable = f"{prefix}_{what}"
        return _number(variable, environ.get(variable, "").strip(), default=default) / 1000

    spans = _count(environ, f"{prefix}_MAX_QUEUE_SIZE", 2048)
    batch = _count(environ, f"{prefix}_MAX_EXPORT_BATCH_SIZE", min(512, spans))
    if batch > spans:
        raise TelemetrySettingError(
            f"{prefix}_MAX_EXPORT_BATCH_SIZE", str(batch), f"a number up to {prefix}_MAX_QUEUE_SIZE, {spans}"
        )
    return BatchSettings(
        queue_spans=spans,
        batch_spans=batch,
        delay_seconds=seconds("SCHEDULE_DELAY", _DELAY_MILLISECONDS[signal]),
        export_seconds=seconds("EXPORT_TIMEOUT", 30_000),
        request_seconds=request_seconds(environ, signal),
    )


def _otlp(environ: Mapping[str, str], what: str, signal: Signal) -> tuple[str, str]:
    """The variable for the signal, or the one for all signals, and its value: the first that is set."""
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
    # "The per-signal URL is used as-is"; the path is added to the one for all signals (OTLP exporter specification).
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
