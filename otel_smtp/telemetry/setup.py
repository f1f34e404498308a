"""Telemetry as the standard OTEL_* variables ask for it.

The one place below `app` that reads the environment, since these variables are OpenTelemetry's own. Some of them
(OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_PROTOCOL) are read by the Python distribution's configurator only, which we do
not run; so they are read here. Without an endpoint nothing is dialled: a default that dials localhost fills logs.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from opentelemetry.sdk.environment_variables import (
    OTEL_EXPORTER_OTLP_ENDPOINT,
    OTEL_EXPORTER_OTLP_PROTOCOL,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT,
    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL,
    OTEL_SDK_DISABLED,
    OTEL_SERVICE_NAME,
    OTEL_TRACES_SAMPLER,
    OTEL_TRACES_SAMPLER_ARG,
)
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    ParentBased,
    Sampler,
    TraceIdRatioBased,
)

from otel_smtp.observing import Observer
from otel_smtp.telemetry.attributes import DEFAULT_SERVICE_NAME
from otel_smtp.telemetry.collector import Protocol, Signal, connect
from otel_smtp.telemetry.environment import (
    TelemetrySettingError,
    batch_settings,
    collector_settings,
    flag,
    metrics_interval_seconds,
    needs_sdk_exporter,
    protocol_of,
    request_seconds,
    wanted_exporters,
)
from otel_smtp.telemetry.exporting import Export, TraceExport
from otel_smtp.telemetry.log_export import LogExportHandler
from otel_smtp.telemetry.logs import AccessLog, StateLogger
from otel_smtp.telemetry.metric_export import MetricExport, MetricsReading
from otel_smtp.telemetry.metrics import ConnectionCounts, Metrics, OpenConnections, SpoolCounts
from otel_smtp.telemetry.otlp import LogEncoder, RequestFrame
from otel_smtp.telemetry.propagation import InboundPolicy
from otel_smtp.telemetry.records import LogRecord, SpanSink
from otel_smtp.telemetry.redaction import Redaction
from otel_smtp.telemetry.sdk_spans import SdkSpans
from otel_smtp.telemetry.state_events import StateEvents
from otel_smtp.telemetry.tracing import Keep, StateTelling, Tracing

OTEL_TRACES_EXPORTER: Final = "OTEL_TRACES_EXPORTER"
DEFAULT_FLUSH_SECONDS: Final = 2.0

_SAMPLERS: Final[Mapping[str, Callable[[float], Sampler]]] = {
    "always_on": lambda ratio: ALWAYS_ON,
    "always_off": lambda ratio: ALWAYS_OFF,
    "traceidratio": TraceIdRatioBased,
    "parentbased_always_on": lambda ratio: ParentBased(ALWAYS_ON),
    "parentbased_always_off": lambda ratio: ParentBased(ALWAYS_OFF),
    "parentbased_traceidratio": lambda ratio: ParentBased(TraceIdRatioBased(ratio)),
}


@dataclass(frozen=True)
class TelemetryOptions:
    """Our own settings of telemetry (config.md, [telemetry]).

    Attributes:
        policies: what to make of a message's trace context, by listener's name.
        access_log: write a line for each connection, transaction and delivery, if the log's level lets it through.
        listeners: take every finished span, also those that are not sampled.
        memories: take every recorded span as octets, and whether something in it went wrong.
        open_connections: the client connections that are open now, for the metrics; asked on the event loop.
        upstream_connections: connections to upstreams now, for the metrics.
        spool: what is queued now, for the metrics.
        processors: of the SDK; each takes every recorded span as the SDK would give it, and is shut down at the end.
    """

    version: str = ""
    redaction: Redaction = field(default_factory=Redaction)
    policies: Mapping[str, InboundPolicy] = field(default_factory=dict)
    state_events: StateEvents = StateEvents.SPAN
    probes: bool = False
    with_message_id: bool = False
    access_log: bool = True
    listeners: Sequence[SpanSink] = ()
    memories: Sequence[Keep] = ()
    open_connections: OpenConnections = tuple
    upstream_connections: ConnectionCounts = tuple
    spool: SpoolCounts = lambda: None
    processors: Sequence[SpanProcessor] = ()


class Telemetry:
    """What was set up: the observer to be told, and the end of it.

    Attributes:
        observers: to be told everything, in this order. Where OTEL_SDK_DISABLED is true they make no trace, and count
            all the same.
    """

    def __init__(
        self,
        metrics: Metrics,
        tracing: Sequence[Observer] = (),
        processors: Sequence[SpanProcessor] = (),
        export: TraceExport | None = None,
        log_export: Export[LogRecord] | None = None,
        metric_exports: Sequence[MetricExport] = (),
    ) -> None:
        self.observers: Sequence[Observer] = (*tracing, metrics)
        self._metrics = metrics
        self._processors = processors
        self._export = export
        self._log_export = log_export
        self._log_handler = LogExportHandler(log_export) if log_export is not None else None
        self._metric_exports = metric_exports

    def start(self) -> None:
        """Start what exports by itself: log records and metrics. After a fork, never before."""
        if self._log_handler is not None:
            self._log_handler.attach()
        for export in self._metric_exports:
            export.start()

    def metrics_page(self, accept: str) -> tuple[bytes, str]:
        """The metrics for a scraper that accepts `accept`, and their content type."""
        return self._metrics.page(accept)

    def catch_up(self) -> None:
        """Count what open connections have done so far; to be called on the event loop, every few seconds."""
        self._metrics.catch_up()

    def flush_and_shutdown(self, budget_seconds: float = DEFAULT_FLUSH_SECONDS) -> bool:
        """Export what is left, and return within the budget whatever the collector does. Blocks: not for the loop.

        Returns:
            Whether everything was done in time.
        """
        ends = time.monotonic() + budget_seconds
        # The SDK's shutdown blocks for up to half a minute on a dead collector; the thread is left behind.
        worker = threading.Thread(target=self._shut_down, name="telemetry-shutdown", daemon=True)
        worker.start()
        # All at the same time, each with nearly the whole budget: one collector that hangs must not cost the others
        # theirs, and each is to have counted what it lost when this returns.
        their_seconds = 0.95 * budget_seconds
        others: list[Export[LogRecord] | MetricExport] = [*self._metric_exports]
        if self._log_handler is not None and self._log_export is not None:
            self._log_handler.detach()
            others.insert(0, self._log_export)
        done: list[bool] = []  # appended by several threads
        ending = [
            threading.Thread(target=lambda one=one: done.append(one.shutdown(their_seconds)), daemon=True)
            for one in others
        ]
        for thread in ending:
            thread.start()
        is_done = self._export is None or self._export.shutdown(their_seconds)
        for thread in (*ending, worker):
            thread.join(max(0.0, ends - time.monotonic()))
        return is_done and len(done) == len(ending) and all(done) and not worker.is_alive()

    def _shut_down(self) -> None:
        for processor in self._processors:
            processor.shutdown()


class LazyProcessor(SpanProcessor):
    """A span processor that is made with its first span: its thread must not be there before a fork."""

    def __init__(self, make: Callable[[], SpanProcessor]) -> None:
        self._make = make
        self._made: SpanProcessor | None = None

    def on_end(self, span: object) -> None:
        """Give a span on."""
        if self._made is None:
            self._made = self._make()
        self._made.on_end(span)  # type: ignore[arg-type]  # whatever its caller has

    def shutdown(self) -> None:
        """Shut down what was made."""
        if self._made is not None:
            self._made.shutdown()


def set_up(options: TelemetryOptions, environ: Mapping[str, str] = os.environ) -> Telemetry:
    """Set telemetry up.

    Raises:
        TelemetrySettingError: an OTEL_* variable has a value that can't be followed.
    """
    resource = resource_of(environ)
    if flag(environ, OTEL_SDK_DISABLED):
        counting = Metrics(
            open_connections=options.open_connections,
            connections=options.upstream_connections,
            spool=options.spool,
            resource=resource.attributes,
        )
        return Telemetry(counting)
    wanted = wanted_exporters(environ, Signal.TRACES, ("none", "console", "otlp", *_SDK_NAMES))
    log_export = _log_export(environ, resource, options.version)
    processors = [*options.processors]
    export: TraceExport | None = None
    if "console" in wanted:
        processors.append(LazyProcessor(lambda: SimpleSpanProcessor(ConsoleSpanExporter())))
    if "otlp" in wanted and not needs_sdk_exporter(environ):
        export = _trace_export(environ, resource, options.version)
    elif "otlp" in wanted:
        processors.append(_batching(_SDK_EXPORTERS[protocol_of(environ)]()))
    processors += [_batching(_SDK_EXPORTERS[_SDK_NAMES[name]]()) for name in wanted if name in _SDK_NAMES]
    access_log = AccessLog()
    listeners = [*options.listeners, *([access_log] if options.access_log and access_log.is_wanted() else [])]
    tracing = Tracing(
        exports=[export.take] if export else [],
        memories=options.memories,
        sinks=[SdkSpans(made, resource, options.version) for made in processors],
        listeners=listeners,
        sampler=sampler_of(environ),
        redaction=options.redaction,
        policies=options.policies,
        state_events=options.state_events,
        probes=options.probes,
        with_message_id=options.with_message_id,
    )
    metrics = Metrics(
        open_connections=options.open_connections,
        connections=options.upstream_connections,
        spool=options.spool,
        dropped=lambda: [lost for one in exports for lost in one.dropped()],
        resource=resource.attributes,
    )
    metric_exports = _metric_exports(environ, MetricsReading(metrics, resource, options.version), options.version)
    exports: list[TraceExport | Export[LogRecord] | MetricExport] = [*metric_exports]
    exports += [one for one in (export, log_export) if one is not None]
    telling = [StateTelling(tracing, StateLogger())] if options.state_events.in_log else []
    return Telemetry(metrics, [tracing, *telling], processors, export, log_export, metric_exports)


def _log_export(environ: Mapping[str, str], resource: Resource, version: str) -> Export[LogRecord] | None:
    # "console" is what the log is anyway.
    if "otlp" not in wanted_exporters(environ, Signal.LOGS):
        return None
    settings = collector_settings(environ, version, Signal.LOGS)
    encoder = LogEncoder(resource, version)
    return Export(
        Signal.LOGS,
        "log_records",
        encoder.record,
        encoder.request,
        lambda: connect(settings),
        batch_settings(environ, Signal.LOGS),
        address=settings.address,
    )


def _metric_exports(environ: Mapping[str, str], reading: MetricsReading, version: str) -> list[MetricExport]:
    # "prometheus" is the page of the status port, which is there anyway.
    wanted = wanted_exporters(environ, Signal.METRICS, ("none", "console", "otlp", "prometheus"))
    exports: list[MetricExport] = []
    if "otlp" in wanted:
        settings = collector_settings(environ, version, Signal.METRICS)
        exports.append(
            MetricExport(
                reading.read,
                lambda: connect(settings),
                interval_seconds=metrics_interval_seconds(environ),
                request_seconds=request_seconds(environ, Signal.METRICS),
                address=settings.address,
            )
        )
    if "console" in wanted:
        exports.append(MetricExport(reading.read, None, interval_seconds=metrics_interval_seconds(environ)))
    return exports


def _trace_export(environ: Mapping[str, str], resource: Resource, version: str) -> TraceExport:
    settings = collector_settings(environ, version)
    return TraceExport(
        RequestFrame(resource, version), lambda: connect(settings), batch_settings(environ), address=settings.address
    )


def describe_destination(environ: Mapping[str, str] = os.environ) -> str:
    """Where traces go, in a few words: for the line that says that the gateway is ready."""
    if environ.get(OTEL_SDK_DISABLED, "").strip().lower() == "true":
        return "nowhere (OTEL_SDK_DISABLED)"
    endpoint = environ.get(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) or environ.get(OTEL_EXPORTER_OTLP_ENDPOINT) or ""
    wanted = environ.get(OTEL_TRACES_EXPORTER, "").strip() or ("otlp" if endpoint else "none")
    protocol = environ.get(OTEL_EXPORTER_OTLP_TRACES_PROTOCOL) or environ.get(OTEL_EXPORTER_OTLP_PROTOCOL)
    # A URL may hold a password.
    otlp = f"{protocol or 'http/protobuf'} {re.sub('//[^/@]*@', '//', endpoint) or 'localhost'}"
    words = {"none": "nowhere (no OTLP endpoint set)", "otlp": otlp}
    return ", ".join(words.get(part.strip(), part.strip()) for part in wanted.split(",") if part.strip())


def resource_of(environ: Mapping[str, str]) -> Resource:
    """Who we are: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and the SDK's detectors, `otel-smtp` if nobody says."""
    resource = Resource.create()
    is_named = environ.get(OTEL_SERVICE_NAME) or not str(resource.attributes[SERVICE_NAME]).startswith(
        "unknown_service"
    )
    return resource if is_named else resource.merge(Resource({SERVICE_NAME: DEFAULT_SERVICE_NAME}))


def sampler_of(environ: Mapping[str, str]) -> Sampler:
    """The SDK's sampler that OTEL_TRACES_SAMPLER names."""
    name = environ.get(OTEL_TRACES_SAMPLER, "").strip().lower() or "parentbased_always_on"
    if name not in _SAMPLERS:
        raise TelemetrySettingError(OTEL_TRACES_SAMPLER, name, ", ".join(_SAMPLERS))
    argument = environ.get(OTEL_TRACES_SAMPLER_ARG, "").strip()
    try:
        return _SAMPLERS[name](float(argument or "1"))
    except ValueError:
        raise TelemetrySettingError(OTEL_TRACES_SAMPLER_ARG, argument, "a number from 0 to 1") from None


def _sdk_http_exporter() -> Callable[[], SpanExporter]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter


def _sdk_grpc_exporter() -> Callable[[], SpanExporter]:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter


# What the SDK's own configurator calls its exporters: whoever asks for one by name gets it.
_SDK_NAMES: Final = {"otlp_proto_http": Protocol.HTTP, "otlp_proto_grpc": Protocol.GRPC}
# Imported when chosen, before the first span: 70 to 150 ms that must not be spent on the mail path.
_SDK_EXPORTERS: Final = {Protocol.HTTP: _sdk_http_exporter, Protocol.GRPC: _sdk_grpc_exporter}


def _batching(make_exporter: Callable[[], SpanExporter]) -> SpanProcessor:
    return LazyProcessor(lambda: BatchSpanProcessor(make_exporter()))
