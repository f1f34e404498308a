"""What the OTEL_* variables say about exporting spans: to whom, how, in what batches.

Names, defaults and meaning are the Python SDK's, so that whoever knows those knows these: timeouts of OTLP are seconds
(OTEL_EXPORTER_OTLP_TIMEOUT), those of batches milliseconds (OTEL_BSP_*). Unlike the SDK, which logs a value that it
can't read and goes on with another, we say so at the start.
"""

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from opentelemetry.sdk.environment_variables import (
    OTEL_BSP_EXPORT_TIMEOUT,
    OTEL_BSP_MAX_EXPORT_BATCH_SIZE,
    OTEL_BSP_MAX_QUEUE_SIZE,
    OTEL_BSP_SCHEDULE_DELAY,
)
from opentelemetry.util.re import parse_env_headers

from otel_smtp.telemetry.collector import CollectorSettings, Compression, Protocol
from otel_smtp.telemetry.exporting import BatchSettings

_OTLP: Final = "OTEL_EXPORTER_OTLP"
_TRACES: Final = "OTEL_EXPORTER_OTLP_TRACES"
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


def has_endpoint(environ: Mapping[str, str]) -> bool:
    """Whether an OTLP endpoint for traces is named."""
    return bool(_otlp(environ, "ENDPOINT")[1])


def needs_sdk_exporter(environ: Mapping[str, str]) -> bool:
    """Whether a plug-in is asked for that only the SDK's own exporter knows how to use."""
    return any(environ.get(name) for name in _CREDENTIAL_PROVIDERS)


def protocol_of(environ: Mapping[str, str]) -> Protocol:
    """What OTLP for traces is spoken over.

    Raises:
        TelemetrySettingError: it is not known to us.
    """
    variable, value = _otlp(environ, "PROTOCOL")
    if value not in ("", *Protocol):
        raise TelemetrySettingError(variable, value, ", ".join(Protocol))
    return Protocol(value or Protocol.HTTP)


def collector_settings(environ: Mapping[str, str], version: str) -> CollectorSettings:
    """How to reach the collector of traces.

    Raises:
        TelemetrySettingError: a variable has a value that can't be followed.
    """
    protocol = protocol_of(environ)
    is_http = protocol is Protocol.HTTP
    endpoint = _http_endpoint(environ) if is_http else _grpc_endpoint(environ)
    scheme = urlsplit(endpoint).scheme
    return CollectorSettings(
        endpoint,
        protocol=protocol,
        # Without a scheme gRPC is encrypted, unless the variable says otherwise; with one the scheme rules.
        is_insecure=scheme == "http" or (scheme != "https" and flag(environ, _otlp(environ, "INSECURE")[0])),
        headers=tuple(parse_env_headers(_otlp(environ, "HEADERS")[1], liberal=True).items()),
        compression=_compression(environ),
        certificate=_otlp(environ, "CERTIFICATE")[1],
        client_key=_otlp(environ, "CLIENT_KEY")[1],
        client_certificate=_otlp(environ, "CLIENT_CERTIFICATE")[1],
        user_agent=f"otel-smtp/{version}" if version else "otel-smtp",
    )


def batch_settings(environ: Mapping[str, str]) -> BatchSettings:
    """How spans wait and travel together.

    Raises:
        TelemetrySettingError: a variable has a value that can't be followed.
    """

    def seconds(variable: str, default: float) -> float:
        return _number(variable, environ.get(variable, "").strip(), default=default) / 1000

    spans = _count(environ, OTEL_BSP_MAX_QUEUE_SIZE, 2048)
    batch = _count(environ, OTEL_BSP_MAX_EXPORT_BATCH_SIZE, min(512, spans))
    if batch > spans:
        raise TelemetrySettingError(
            OTEL_BSP_MAX_EXPORT_BATCH_SIZE, str(batch), f"a number up to OTEL_BSP_MAX_QUEUE_SIZE, {spans}"
        )
    return BatchSettings(
        queue_spans=spans,
        batch_spans=batch,
        delay_seconds=seconds(OTEL_BSP_SCHEDULE_DELAY, 5000),
        export_seconds=seconds(OTEL_BSP_EXPORT_TIMEOUT, 30_000),
        request_seconds=_number(*_otlp(environ, "TIMEOUT"), default=10.0),
    )


def _otlp(environ: Mapping[str, str], what: str) -> tuple[str, str]:
    """The variable for traces, or the one for all signals, and its value: the first that is set."""
    for variable in (f"{_TRACES}_{what}", f"{_OTLP}_{what}"):
        if value := environ.get(variable, "").strip():
            return variable, value
    return f"{_OTLP}_{what}", ""


def _http_endpoint(environ: Mapping[str, str]) -> str:
    variable, value = _otlp(environ, "ENDPOINT")
    url = value or "http://localhost:4318"
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise TelemetrySettingError(variable, value, "a URL as http://collector:4318")
    # "The per-signal URL is used as-is"; the path is added to the one for all signals (OTLP exporter specification).
    return url if variable.startswith(_TRACES) else f"{url.removesuffix('/')}/v1/traces"


def _grpc_endpoint(environ: Mapping[str, str]) -> str:
    return _otlp(environ, "ENDPOINT")[1] or "http://localhost:4317"


def _compression(environ: Mapping[str, str]) -> Compression:
    variable, value = _otlp(environ, "COMPRESSION")
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
