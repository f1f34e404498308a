"""The OTEL_* variables, which only this module reads.

`read` returns them as values: the set-up makes exporters from them, `check --connect` tries them, and the ready line
describes them. Names, defaults and meaning are the Python SDK's: timeouts of OTLP are seconds
(OTEL_EXPORTER_OTLP_TIMEOUT), those of batches milliseconds (OTEL_BSP_*, OTEL_BLRP_*). Without an endpoint nothing is
dialled: exporting to localhost by default would fill logs.

Operators set these variables for whole clusters, so none of them may stop mail. An unusable value is a
`VariableProblem`, and the variable counts as unset, as the specification demands ("Environment Variable Specification",
"Parsing Empty Value" to "Enum"): `serve` warns about it, `check` refuses it. A problem never shows what may be a
credential.

The resource's variables, OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES, are read by the SDK's detectors; this module
checks them. It also checks the limits of spans and attributes, but ours are fixed, and lower than the SDK's for
everything except events, of which none is left out.
"""

import contextlib
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeVar
from urllib.parse import unquote, urlsplit

from opentelemetry.environment_variables import OTEL_PROPAGATORS
from opentelemetry.sdk.environment_variables import (
    OTEL_CONFIG_FILE,
    OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION,
    OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE,
    OTEL_LOG_LEVEL,
    OTEL_METRIC_EXPORT_INTERVAL,
    OTEL_METRIC_EXPORT_TIMEOUT,
    OTEL_METRICS_EXEMPLAR_FILTER,
    OTEL_RESOURCE_ATTRIBUTES,
    OTEL_SDK_DISABLED,
    OTEL_TRACES_SAMPLER,
    OTEL_TRACES_SAMPLER_ARG,
)
from opentelemetry.sdk.resources import (
    HOST_NAME,
    PROCESS_PID,
    SERVICE_INSTANCE_ID,
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)

from otel_smtp.telemetry.attributes import DEFAULT_SERVICE_NAME
from otel_smtp.telemetry.collector import CollectorSettings, Compression, Protocol, Signal
from otel_smtp.telemetry.exporting import BatchSettings
from otel_smtp.telemetry.sdk import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased

T = TypeVar("T")

_OTLP: Final = "OTEL_EXPORTER_OTLP"
_BATCHES: Final = {Signal.TRACES: "OTEL_BSP", Signal.LOGS: "OTEL_BLRP"}
_DELAY_MILLISECONDS: Final = {Signal.TRACES: 5000, Signal.LOGS: 1000}
_METRICS_INTERVAL_MILLISECONDS: Final = 60_000
_TIMEOUT: Final = re.compile(r"OTEL_\w+_TIMEOUT")
_ZERO: Final = re.compile(r"\s*[-+]?(?:0+(?:\.0*)?|\.0+)(?:[eE][-+]?\d+)?\s*")
_NO_LIMIT: Final = 2.0**31  # milliseconds as well as seconds
_METRICS_TIMEOUT_MILLISECONDS: Final = 30_000
_DEFAULT_BATCHES: Final = BatchSettings()
# Plug-ins for the SDK's exporter to authenticate (a cloud's identity). Only that exporter can use them.
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


# Variables that stay in the environment of the SDK's exporters although something is wrong with them: of a list they
# use what they can, and a file may be there at the next export.
_KEPT: Final = ("_HEADERS", "_EXPORTER", OTEL_RESOURCE_ATTRIBUTES, "_CERTIFICATE", "_CLIENT_KEY")
# The limits of the SDK's spans and log records; a number of 0 and more, or no limit.
_LIMITS: Final = tuple(
    f"OTEL_{what}_LIMIT"
    for what in (
        "ATTRIBUTE_COUNT",
        "ATTRIBUTE_VALUE_LENGTH",
        "SPAN_ATTRIBUTE_COUNT",
        "SPAN_ATTRIBUTE_VALUE_LENGTH",
        "SPAN_EVENT_COUNT",
        "SPAN_LINK_COUNT",
        "EVENT_ATTRIBUTE_COUNT",
        "LINK_ATTRIBUTE_COUNT",
        "LOGRECORD_ATTRIBUTE_COUNT",
        "LOGRECORD_ATTRIBUTE_VALUE_LENGTH",
    )
)
_LOG_LEVELS: Final[Mapping[str, int]] = {
    "notset": logging.NOTSET,
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "critical": logging.CRITICAL,
}


class Temporality(StrEnum):
    """OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE: which sums count from the start, and which from the last
    export.
    """

    CUMULATIVE = "cumulative"
    DELTA = "delta"  # counters and histograms
    LOW_MEMORY = "lowmemory"  # the same, except for observed values


class ExemplarFilter(StrEnum):
    """OTEL_METRICS_EXEMPLAR_FILTER: which measurements may be exemplars."""

    TRACE_BASED = "trace_based"  # of sampled spans
    ALWAYS_ON = "always_on"
    ALWAYS_OFF = "always_off"


@dataclass(frozen=True, slots=True)
class VariableProblem:
    """A variable with an unusable value, which therefore counts as unset.

    Attributes:
        value: as it was set; "" if it may hold a credential.
        allowed: the usable values, in words.
    """

    variable: str
    value: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.variable}{f'={self.value!r}' if self.value else ''}: allowed is {self.allowed}"


@dataclass(frozen=True, slots=True)
class SignalExport:
    """The destinations of one signal.

    Attributes:
        to_console: written to standard output.
        collector: the target of our own exporter, if any.
        batches: the batching of spans or log records; for metrics only its `request_seconds` counts.
        sdk_collectors: the targets of the SDK's exporters, which read the variables themselves.
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
        sdk_log_level: of the SDK's own loggers (OTEL_LOG_LEVEL); None: theirs.
        problems: the unusable variables, each once.
    """

    is_disabled: bool = False
    traces: SignalExport = SignalExport()
    metrics: SignalExport = SignalExport()
    logs: SignalExport = SignalExport()
    metrics_interval_seconds: float = _METRICS_INTERVAL_MILLISECONDS / 1000
    temporality: Temporality = Temporality.CUMULATIVE
    exemplars: ExemplarFilter = ExemplarFilter.TRACE_BASED
    sampler: Sampler = field(default_factory=lambda: _SAMPLERS[_DEFAULT_SAMPLER](1.0))
    sdk_log_level: int | None = None
    problems: tuple[VariableProblem, ...] = ()

    @property
    def collectors(self) -> tuple[CollectorSettings, ...]:
        """All collectors that receive a signal."""
        return tuple(collector for one in (self.traces, self.metrics, self.logs) for collector in one.collectors)

    def describe_traces(self) -> str:
        """The destination of traces, in a few words and without credentials, for the ready line."""
        if self.is_disabled:
            return "nowhere (OTEL_SDK_DISABLED)"
        targets = ["console"] if self.traces.to_console else []
        targets += [f"{collector.protocol} {collector.shown_endpoint}" for collector in self.traces.collectors]
        return ", ".join(targets) or "nowhere (no OTLP endpoint set)"


def read(environ: Mapping[str, str] | None = None, version: str = "") -> Environment:
    """Read the variables. Never raises: unusable ones are in `problems`.

    Args:
        environ: None: that of this process.
        version: of this program, for the user agent.
    """
    return _Reading(os.environ if environ is None else environ, version).environment()


def own_instance_id(worker: int | None = None) -> str:
    """The `service.instance.id` of this process; `worker` as for `own_resource`."""
    return str(own_resource(worker).attributes.get(SERVICE_INSTANCE_ID, ""))


def own_resource(worker: int | None = None, *, version: str = "") -> Resource:
    """Our identity: the SDK's detectors' findings, the host and the process.

    The service is `otel-smtp` if nothing names it.

    Args:
        worker: the number of this worker among several: with one configured id for all, their metrics would overwrite
            each other.
        version: of this program; "": it is left out.
    """
    given = OTELResourceDetector().detect().attributes
    own: dict[str, str | int] = {HOST_NAME: socket.gethostname(), PROCESS_PID: os.getpid()}
    if version:
        own[SERVICE_VERSION] = version
    found = Resource.create()
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        own[SERVICE_NAME] = DEFAULT_SERVICE_NAME
    own = {name: value for name, value in own.items() if name not in given}
    if worker is not None and (instance := given.get(SERVICE_INSTANCE_ID)):
        own[SERVICE_INSTANCE_ID] = f"{instance}-{worker}"
    resource = found.merge(Resource(own))
    return Resource({_text(name): _text(value) for name, value in resource.attributes.items()}, resource.schema_url)


def _text(value: T) -> T:
    """A value that pages, log lines and OTLP can hold: what is not UTF-8 in the environment is lone surrogates here."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value  # type: ignore[return-value]


@contextlib.contextmanager
def without(problems: Iterable[VariableProblem]) -> Iterator[None]:
    """Hide unusable variables of the process's environment inside the context.

    For the SDK's exporters, which read it themselves and raise at some values, as at a timeout of 0. Lists and files
    stay.
    """
    names = {problem.variable for problem in problems if not problem.variable.endswith(_KEPT)}
    names |= {name for name, value in os.environ.items() if _TIMEOUT.fullmatch(name) and _ZERO.fullmatch(value)}
    taken = {name: os.environ.pop(name) for name in names & os.environ.keys()}
    try:
        yield
    finally:
        os.environ.update(taken)


class _Reading:
    """One reading of the variables, with the problems found."""

    def __init__(self, environ: Mapping[str, str], version: str) -> None:
        self._environ = environ
        self._version = version
        self._problems: dict[str, VariableProblem] = {}  # by variable: those for all signals are read once for each

    def environment(self) -> Environment:
        if self._flag(OTEL_SDK_DISABLED):
            return Environment(is_disabled=True)  # whatever the others say
        interval_seconds = self._milliseconds(OTEL_METRIC_EXPORT_INTERVAL, _METRICS_INTERVAL_MILLISECONDS)
        signals = {signal: self._signal_export(signal, interval_seconds) for signal in Signal}
        temporality = self._choice(
            OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE, {one.value: one for one in Temporality}
        )
        exemplars = self._choice(OTEL_METRICS_EXEMPLAR_FILTER, {one.value: one for one in ExemplarFilter})
        sampler, sdk_log_level = self._sampler(), self._choice(OTEL_LOG_LEVEL, _LOG_LEVELS)
        self._look_at_the_rest()
        return Environment(
            traces=signals[Signal.TRACES],
            metrics=signals[Signal.METRICS],
            logs=signals[Signal.LOGS],
            metrics_interval_seconds=interval_seconds,
            temporality=temporality or Temporality.CUMULATIVE,
            exemplars=exemplars or ExemplarFilter.TRACE_BASED,
            sampler=sampler,
            sdk_log_level=sdk_log_level,
            problems=tuple(self._problems.values()),
        )

    # Values ------------------------------------------------------------------------------------------------------

    def _value(self, variable: str) -> str:
        return self._environ.get(variable, "").strip()

    def _unusable(self, variable: str, value: str, allowed: str) -> None:
        self._problems[variable] = VariableProblem(variable, _text(value), allowed)

    def _flag(self, variable: str) -> bool:
        value = self._value(variable)
        if value.lower() not in ("", "true", "false"):
            self._unusable(variable, value, "true, false")
        return value.lower() == "true"

    def _choice(self, variable: str, choices: Mapping[str, T]) -> T | None:
        value = self._value(variable)
        if value and value.lower() not in choices:
            self._unusable(variable, value, ", ".join(choices))
        return choices.get(value.lower())

    def _milliseconds(self, variable: str, default: int, *, is_timeout: bool = False) -> float:
        """The variable in seconds."""
        number = self._number(variable, is_timeout=is_timeout)
        return (default if number is None else number) / 1000

    def _number(self, variable: str, *, is_timeout: bool = False) -> float | None:
        """The variable as it is; None if it is unset or unusable. A timeout of 0 means none
        (OpenTelemetry's "Common Configuration Specification", "Timeout")."""
        value = self._value(variable)
        if not value:
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if 0 < number < 1e9:
            return number
        if is_timeout and number == 0:
            return _NO_LIMIT
        self._unusable(variable, value, "a number of 0 and more" if is_timeout else "a number above 0")
        return None

    def _count(self, variable: str, default: int) -> int:
        value = self._value(variable)
        if not value:
            return default
        if value.isascii() and value.isdecimal() and 0 < int(value[:10]) <= 1_000_000:
            return int(value)
        self._unusable(variable, value, "a number from 1 to 1000000")
        return default

    def _look_at_the_rest(self) -> None:
        """Check variables that have no effect here, or that other code reads."""
        for variable in _LIMITS:
            value = self._value(variable)
            if value and not (value.isascii() and value.isdecimal()):
                self._unusable(variable, value, "a number of 0 and more")
        names = [name.strip().lower() for name in self._value(OTEL_PROPAGATORS).split(",") if name.strip()]
        if names and not {"tracecontext", "none"} & {*names}:
            self._unusable(
                OTEL_PROPAGATORS,
                ",".join(names),
                "tracecontext, alone or with others, or none; trace context is read and written as W3C says",
            )
        self._choice(
            OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION,
            {"explicit_bucket_histogram": "explicit_bucket_histogram"},
        )
        if any("=" not in part for part in self._value(OTEL_RESOURCE_ATTRIBUTES).split(",") if part.strip()):
            self._unusable(OTEL_RESOURCE_ATTRIBUTES, "", "name=value, or a list of them")
        if self._value(OTEL_CONFIG_FILE):
            self._unusable(OTEL_CONFIG_FILE, "", "unset: telemetry is configured by the other variables alone")

    # Exports --------------------------------------------------------------------------------------------

    def _sampler(self) -> Sampler:
        make = self._choice(OTEL_TRACES_SAMPLER, _SAMPLERS) or _SAMPLERS[_DEFAULT_SAMPLER]
        argument = self._value(OTEL_TRACES_SAMPLER_ARG)
        try:
            ratio = float(argument or "1")
        except ValueError:
            ratio = math.nan
        if not 0 <= ratio <= 1:
            self._unusable(OTEL_TRACES_SAMPLER_ARG, argument, "a number from 0 to 1")
            ratio = 1.0
        return make(ratio)

    def _signal_export(self, signal: Signal, metrics_interval_seconds: float) -> SignalExport:
        protocol = self._protocol(signal)
        exporters = self._exporters(signal, protocol)
        is_otlp = "otlp" in exporters
        # The SDK's exporter is the only one that can use a credential provider, which exist for traces alone.
        is_sdk = is_otlp and signal is Signal.TRACES and any(self._environ.get(name) for name in _CREDENTIAL_PROVIDERS)
        protocols = [protocol] if is_sdk else []
        protocols += [_SDK_NAMES[name] for name in exporters if name in _SDK_NAMES]
        is_ours = is_otlp and not is_sdk
        # Read though nothing may be exported: everything that is wrong is reported at once.
        collector, batches = self._collector(signal, protocol), self._batches(signal, metrics_interval_seconds)
        return SignalExport(
            to_console="console" in exporters and signal is not Signal.LOGS,
            collector=collector if is_ours else None,
            batches=batches if is_ours else _DEFAULT_BATCHES,
            sdk_collectors=tuple(self._collector(signal, protocol) for protocol in protocols),
        )

    def _exporters(self, signal: Signal, protocol: Protocol) -> Sequence[str]:
        """The exporters in OTEL_<signal>_EXPORTER; otlp if it names none and there is an endpoint."""
        variable = f"OTEL_{signal.upper()}_EXPORTER"
        value = self._value(variable)
        exporters = [part.strip().lower() for part in value.split(",") if part.strip()]
        allowed = _EXPORTERS[signal]
        known = [name for name in exporters if name in allowed]
        if known != exporters:
            self._unusable(variable, value, f"{', '.join(allowed)}, or a list of them")
        return known or (["otlp"] if self._endpoint(signal, protocol)[1] else ["none"])

    def _collector(self, signal: Signal, protocol: Protocol) -> CollectorSettings:
        endpoint = self._url(signal, protocol)
        scheme = urlsplit(endpoint).scheme if "://" in endpoint else ""
        is_insecure = self._first_flag(signal)
        return CollectorSettings(
            endpoint,
            protocol=protocol,
            signal=signal,
            # The scheme decides. Without one gRPC is encrypted, unless the variable says otherwise.
            is_insecure=scheme == "http" or (scheme != "https" and is_insecure),
            headers=self._headers(signal, protocol),
            compression=self._compression(signal, protocol),
            certificate=self._file(signal, "CERTIFICATE"),
            client_key=self._file(signal, "CLIENT_KEY"),
            client_certificate=self._file(signal, "CLIENT_CERTIFICATE"),
            user_agent=f"otel-smtp/{self._version}" if self._version else "otel-smtp",
        )

    def _batches(self, signal: Signal, metrics_interval_seconds: float) -> BatchSettings:
        request_seconds = self._first_timeout(signal) or _DEFAULT_BATCHES.request_seconds
        if signal is Signal.METRICS:  # which go in one request, at an interval
            # Capped for the reason below; not at less than a second, which a busy collector may take.
            longest = min(
                max(metrics_interval_seconds, 1.0),
                self._milliseconds(OTEL_METRIC_EXPORT_TIMEOUT, _METRICS_TIMEOUT_MILLISECONDS, is_timeout=True),
            )
            return BatchSettings(request_seconds=min(request_seconds, longest))
        prefix = _BATCHES[signal]
        ours = BatchSettings()
        queue = self._count(f"{prefix}_MAX_QUEUE_SIZE", ours.queue_spans)
        usual = min(ours.batch_spans, queue)
        batch = self._count(f"{prefix}_MAX_EXPORT_BATCH_SIZE", usual)
        if batch > queue:
            self._unusable(
                f"{prefix}_MAX_EXPORT_BATCH_SIZE", str(batch), f"a number up to {prefix}_MAX_QUEUE_SIZE, {queue}"
            )
            batch = usual
        export_seconds = self._milliseconds(f"{prefix}_EXPORT_TIMEOUT", 30_000, is_timeout=True)
        return BatchSettings(
            queue_spans=queue,
            batch_spans=batch,
            delay_seconds=self._milliseconds(f"{prefix}_SCHEDULE_DELAY", _DELAY_MILLISECONDS[signal]),
            export_seconds=export_seconds,
            # The variable is in seconds here and in milliseconds elsewhere: a request of hours would stop all others.
            request_seconds=min(request_seconds, export_seconds),
        )

    # OTEL_EXPORTER_OTLP_*: the signal's own variable, or the one for all signals: the first that can be used ------

    def _protocol(self, signal: Signal) -> Protocol:
        choices = {one.value: one for one in Protocol}
        chosen = [self._choice(variable, choices) for variable in _both(signal, "PROTOCOL")]
        return next((one for one in chosen if one is not None), Protocol.HTTP)

    def _file(self, signal: Signal, what: str) -> str:
        """The path in the variable, even if there is no such file: each connection looks for it."""
        paths = {variable: self._value(variable) for variable in _both(signal, what)}
        for variable, path in paths.items():
            if path and not (os.path.isfile(path) and os.access(path, os.R_OK)):
                self._unusable(variable, path, "the path of a file that this user can read")
        return next(filter(None, paths.values()), "")

    def _first_timeout(self, signal: Signal) -> float | None:
        numbers = [self._number(variable, is_timeout=True) for variable in _both(signal, "TIMEOUT")]
        return next((one for one in numbers if one is not None), None)

    def _first_flag(self, signal: Signal) -> bool:
        own, general = _both(signal, "INSECURE")
        flags = {variable: self._flag(variable) for variable in (own, general)}
        return flags[own if self._value(own) else general]

    def _headers(self, signal: Signal, protocol: Protocol) -> tuple[tuple[str, str], ...]:
        # Not by the API's parser, which logs what it does not like with its value, a credential. A library would also
        # raise with the value of a header that it cannot send.
        chosen: tuple[tuple[str, str], ...] = ()
        for variable in _both(signal, "HEADERS"):
            headers: dict[str, str] = {}
            for part in filter(None, map(str.strip, self._value(variable).split(","))):
                name, equals, value = (unquote(one).strip() for one in part.partition("="))
                if equals and _HEADER_NAMES[protocol].fullmatch(name) and value.isascii() and value.isprintable():
                    headers[name.lower()] = value
                else:
                    self._unusable(variable, "", "name=value, or a list of them")
            chosen = chosen or tuple(headers.items())
        return chosen

    def _compression(self, signal: Signal, protocol: Protocol) -> Compression:
        # No collector takes deflate over gRPC: everything would be lost.
        allowed = [one for one in Compression if protocol is Protocol.HTTP or one is not Compression.DEFLATE]
        chosen = [
            self._choice(variable, {one.value: one for one in allowed}) for variable in _both(signal, "COMPRESSION")
        ]
        return next((one for one in chosen if one is not None), Compression.NONE)

    def _endpoint(self, signal: Signal, protocol: Protocol) -> tuple[str, str]:
        """The variable that names the collector, and its value; "" if none does."""
        found: list[tuple[str, str]] = []
        for variable in _both(signal, "ENDPOINT"):
            value = self._value(variable)
            if value and _is_endpoint(value, protocol):
                found.append((variable, value))
            elif value:
                self._unusable(variable, _without_credentials(value), _ENDPOINTS[protocol])
        return found[0] if found else (f"{_OTLP}_ENDPOINT", "")

    def _url(self, signal: Signal, protocol: Protocol) -> str:
        variable, value = self._endpoint(signal, protocol)
        if protocol is Protocol.GRPC:
            return value or "http://localhost:4317"
        url = value or "http://localhost:4318"
        # The signal's own URL is used as it is; the path is added to the one for all signals (OTLP exporter
        # specification).
        return f"{url.removesuffix('/')}/v1/{signal}" if variable == f"{_OTLP}_ENDPOINT" else url


# RFC 9110 5.6.2; gRPC over HTTP2, "Custom-Metadata".
_HEADER_NAMES: Final = {
    Protocol.HTTP: re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+"),
    Protocol.GRPC: re.compile(r"(?!(?i:grpc-))[-_.0-9A-Za-z]+(?<!(?i:-bin))"),
}
_ENDPOINTS: Final = {Protocol.HTTP: "a URL as http://collector:4318", Protocol.GRPC: "a URL as http://collector:4317"}


def _both(signal: Signal, what: str) -> tuple[str, str]:
    return f"{_OTLP}_{signal.upper()}_{what}", f"{_OTLP}_{what}"


def _is_endpoint(value: str, protocol: Protocol) -> bool:
    """Whether it is a URL or, for gRPC, host and port, or a name in one of its library's forms."""
    is_grpc = protocol is Protocol.GRPC
    if _text(value) != value:
        return False
    if is_grpc and value.startswith(("dns:", "unix:", "ipv4:", "ipv6:")):
        return True
    try:
        parts = urlsplit(value if "://" in value or not is_grpc else f"http://{value}")
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and " " not in value
    except ValueError:
        return False


def _without_credentials(value: str) -> str:
    """An endpoint that is no URL, for people: the part before its host, or its query, may be a secret."""
    return value.rpartition("@")[2].partition("?")[0]
