"""Telemetry, assembled from our own options and the OTEL_* variables."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.resources import Resource

from otel_smtp.observing import Observer
from otel_smtp.telemetry import environment
from otel_smtp.telemetry.access_log import AccessLog
from otel_smtp.telemetry.collector import Protocol, Signal, connect
from otel_smtp.telemetry.environment import Environment, SignalExport, VariableProblem
from otel_smtp.telemetry.exporting import BatchSettings, Export, TraceExport
from otel_smtp.telemetry.gauges import (
    ConnectionCounts,
    OpenConnections,
    ReceiverCounts,
    SharedQueueFigures,
    SpoolCounts,
    StoreTimings,
)
from otel_smtp.telemetry.keeping import Keeping
from otel_smtp.telemetry.line_output import Console
from otel_smtp.telemetry.log_export import LogExportHandler
from otel_smtp.telemetry.logs import StateLogger
from otel_smtp.telemetry.metric_export import MetricExport, MetricsReading
from otel_smtp.telemetry.metrics import Metrics
from otel_smtp.telemetry.otlp import LogEncoder, RequestFrame
from otel_smtp.telemetry.propagation import InboundPolicy
from otel_smtp.telemetry.records import LogRecord, SpanSink
from otel_smtp.telemetry.redaction import Redaction
from otel_smtp.telemetry.sdk import Sampler, SpanProcessor
from otel_smtp.telemetry.sdk_spans import SdkSpans
from otel_smtp.telemetry.shapes import EncodedPair
from otel_smtp.telemetry.state_events import StateEvents
from otel_smtp.telemetry.tail import MailTail
from otel_smtp.telemetry.tracing import Keep, LineSink, StateTelling, Take, Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

DEFAULT_FLUSH_SECONDS: Final = 2.0


@dataclass(frozen=True)
class TelemetryOptions:
    """Our own settings of telemetry.

    Attributes:
        worker: the number of this process among several; None: there is one.
        policies: what to make of a message's trace context, by listener's name: of every listener.
        upstreams, limits: the names of all. `mechanisms`: those of AUTH that are known.
        access_log: write a line per connection, transaction and delivery, if the log's level allows it.
        keeping: decides what is kept that the sampler drops; None: nothing is.
        listeners: receive every finished span, sampled or not.
        memories: take every recorded span as octets, and whether something in it went wrong.
        open_connections: yields the open client connections when the metrics are read, on the event loop.
        upstream_connections: yields the connections to upstreams when the metrics are read.
        store_timings: returns what its store did since. `store_verbs`: what that may be.
        spool: returns what is queued when the metrics are read. `receivers`: how those of outcomes fare.
        shared_queue: returns how this gateway fares with a queue that several share.
        processors: of the SDK; each receives every recorded span as from the SDK, and is shut down at the end.
    """

    version: str = ""
    worker: int | None = None
    redaction: Redaction = field(default_factory=Redaction)
    policies: Mapping[str, InboundPolicy] = field(default_factory=dict)
    upstreams: Sequence[str] = ()
    limits: Sequence[str] = ()
    mechanisms: Sequence[str] = ()
    state_events: StateEvents = StateEvents.SPAN
    probes: bool = False
    with_message_id: bool = False
    access_log: bool = True
    keeping: Keeping | None = None
    listeners: Sequence[SpanSink] = ()
    memories: Sequence[Keep] = ()
    open_connections: OpenConnections = tuple
    upstream_connections: ConnectionCounts = tuple
    spool: SpoolCounts = lambda: None
    shared_queue: SharedQueueFigures = lambda: None
    store_timings: StoreTimings = tuple
    store_verbs: Sequence[str] = ()
    receivers: ReceiverCounts = tuple
    processors: Sequence[SpanProcessor] = ()


class Telemetry:
    """Telemetry of one gateway: its observer, and the exports behind it.

    Attributes:
        observers: to observe everything, in this order. With OTEL_SDK_DISABLED they make no traces, and count all the
            same.
        traces_to: where traces go, in words.
        tail: for followers of the mails; None with OTEL_SDK_DISABLED.
        leaves_out: which mails have no trace, in words for people who look for one; "" where all have.
    """

    def __init__(
        self,
        metrics: Metrics,
        tracing: Tracing | None = None,
        telling: Sequence[Observer] = (),
        lines: Callable[[], Sequence[LineSink]] = tuple,
        processors: Sequence[SpanProcessor] = (),
        export: TraceExport | None = None,
        log_export: Export[LogRecord] | None = None,
        metric_exports: Sequence[MetricExport] = (),
        *,
        traces_to: str,
        leaves_out: str = "",
    ) -> None:
        self.traces_to = traces_to
        self.leaves_out = leaves_out
        self.tail = None if tracing is None else MailTail(tracing)
        self.observers: Sequence[Observer] = (*([] if tracing is None else [tracing]), *telling, metrics)
        self._tracing = tracing
        self._lines = lines
        self._metrics = metrics
        self._processors = processors
        self._export = export
        self._log_export = log_export
        self._log_handler = LogExportHandler(log_export) if log_export is not None else None
        self._metric_exports = metric_exports

    def start(self) -> None:
        """Start the export of log records and metrics. After a fork, never before."""
        if self._log_handler is not None:
            self._log_handler.attach()
        for export in self._metric_exports:
            export.start()

    def show(
        self, redaction: Redaction, policies: Mapping[str, InboundPolicy], *, probes: bool, with_message_id: bool
    ) -> None:
        """Change what telemetry shows; see `TelemetryOptions`."""
        if self._tracing is not None:
            self._tracing.show(redaction, policies, probes=probes, with_message_id=with_message_id)

    def heed_log_level(self) -> None:
        """Switch the access log on or off according to the log's current level."""
        if self._tracing is not None:
            self._tracing.tell(self._lines())

    def metrics_page(self, accept: str) -> tuple[bytes, str]:
        """The metrics for a scraper that accepts `accept`, and their content type."""
        return self._metrics.page(accept)

    def catching_up(self) -> Iterator[None]:
        """Count the work of open connections so far, in steps between which mail continues; on the event loop, every
        few seconds.
        """
        return self._metrics.catching_up()

    def count_mails(self) -> None:
        """Count the mails that ended since the last call; call it on the event loop, every second or so."""
        self._metrics.count_mails()

    def finish(self) -> None:
        """Finish spans under way, and count noted mails; call it on the event loop, after the last observation."""
        if self._tracing is not None:
            self._tracing.finish()
        self._metrics.catch_up()

    def flush_and_shutdown(self, budget_seconds: float = DEFAULT_FLUSH_SECONDS) -> bool:
        """Export the rest, and return within the budget whatever the collector does. Blocks: not for the event loop.

        Returns:
            Whether everything was done in time.
        """
        ends = time.monotonic() + budget_seconds
        # The SDK's shutdown blocks for up to half a minute on a dead collector; then its thread is abandoned.
        worker = threading.Thread(target=self._shut_down, name="telemetry-shutdown", daemon=True)
        worker.start()
        # All at the same time, each with nearly the whole budget: a collector that hangs must not take the others'
        # time, and each must have counted its losses when this returns.
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
    """A span processor that is made at its first span: its thread must not exist before a fork."""

    def __init__(self, make: Callable[[], SpanProcessor]) -> None:
        self._make = make
        self._made: SpanProcessor | None = None

    def on_end(self, span: object) -> None:
        """Pass a span on."""
        if self._made is None:
            self._made = self._make()
        self._made.on_end(span)  # type: ignore[arg-type]  # whatever its caller has

    def shutdown(self) -> None:
        """Shut the processor down, if it was made."""
        if self._made is not None:
            self._made.shutdown()


def set_up(options: TelemetryOptions, environ: Mapping[str, str] | None = None) -> Telemetry:
    """Set telemetry up.

    Args:
        environ: with the OTEL_* variables; None: that of this process. Those that cannot be used count as unset.
    """
    asked = environment.read(environ, options.version)
    resource = environment.own_resource(options.worker, version=options.version)
    if asked.sdk_log_level is not None:
        logging.getLogger("opentelemetry").setLevel(asked.sdk_log_level)
    if asked.is_disabled:
        counting = Metrics(
            open_connections=options.open_connections,
            connections=options.upstream_connections,
            spool=options.spool,
            shared_queue=options.shared_queue,
            store_timings=options.store_timings,
            store_verbs=options.store_verbs,
            receivers=options.receivers,
            resource=resource.attributes,
            listeners=[*options.policies],
            upstreams=options.upstreams,
            limits=options.limits,
            mechanisms=options.mechanisms,
        )
        return Telemetry(
            counting, traces_to=asked.describe_traces(), leaves_out="no mail has a trace: OTEL_SDK_DISABLED is set"
        )
    log_export = _log_export(asked.logs, resource, options.version)
    export = _trace_export(asked.traces, resource, options.version)
    processors = [*options.processors, *_sdk_processors(asked.traces, asked.problems)]
    access_log = AccessLog()

    def lines() -> Sequence[LineSink]:
        return [access_log] if options.access_log and access_log.is_wanted() else []

    keeping = [options.keeping] if options.keeping is not None else []
    tracing = Tracing(
        exports=[_takes(export, asked.traces.batches)] if export else [],
        memories=options.memories,
        sinks=[SdkSpans(made, resource, options.version) for made in processors],
        listeners=options.listeners,
        lines=lines(),
        sampler=asked.sampler,
        redaction=options.redaction,
        policies=options.policies,
        state_events=options.state_events,
        probes=options.probes,
        with_message_id=options.with_message_id,
        keeping=options.keeping,
    )
    metrics = Metrics(
        open_connections=options.open_connections,
        connections=options.upstream_connections,
        spool=options.spool,
        shared_queue=options.shared_queue,
        store_timings=options.store_timings,
        store_verbs=options.store_verbs,
        receivers=options.receivers,
        dropped=lambda: [lost for one in (*exports, *keeping) for lost in one.dropped()],
        exemplars=asked.exemplars,
        resource=resource.attributes,
        listeners=[*options.policies],
        upstreams=options.upstreams,
        limits=options.limits,
        mechanisms=options.mechanisms,
    )
    metric_exports = _metric_exports(
        asked, lambda: MetricsReading(metrics, resource, options.version, asked.temporality)
    )
    exports: list[TraceExport | Export[LogRecord] | MetricExport] = [*metric_exports]
    exports += [one for one in (export, log_export) if one is not None]
    telling = [StateTelling(tracing, StateLogger())] if options.state_events.in_log else []
    return Telemetry(
        metrics,
        tracing,
        telling,
        lines,
        processors,
        export,
        log_export,
        metric_exports,
        traces_to=asked.describe_traces(),
        leaves_out=_left_out(asked.sampler),
    )


def _left_out(sampler: Sampler) -> str:
    """The mails that a sampler leaves out, in words."""
    description = sampler.get_description()
    if description.removeprefix("ParentBased{root:").startswith("AlwaysOnSampler"):
        return ""
    return f"mails that the sampler leaves out have no trace ({description})"


def _log_export(logs: SignalExport, resource: Resource, version: str) -> Export[LogRecord] | None:
    settings = logs.collector
    if settings is None:
        return None
    encoder = LogEncoder(resource, version)
    return Export(
        Signal.LOGS,
        "log_records",
        encoder.record,
        encoder.request,
        lambda: connect(settings),
        logs.batches,
        address=settings.address,
    )


def _metric_exports(asked: Environment, new_reading: Callable[[], MetricsReading]) -> list[MetricExport]:
    exports: list[MetricExport] = []
    settings, interval_seconds = asked.metrics.collector, asked.metrics_interval_seconds
    if settings is not None:
        reading = new_reading()
        exports.append(
            MetricExport(
                reading.read,
                lambda: connect(settings),
                settle=reading.settle,
                interval_seconds=interval_seconds,
                request_seconds=asked.metrics.batches.request_seconds,
                address=settings.address,
            )
        )
    if asked.metrics.to_console:
        reading = new_reading()
        exports.append(MetricExport(reading.read, None, settle=reading.settle, interval_seconds=interval_seconds))
    return exports


def _trace_export(traces: SignalExport, resource: Resource, version: str) -> TraceExport | None:
    settings = traces.collector
    if settings is None:
        return None
    return TraceExport(
        RequestFrame(resource, version), lambda: connect(settings), traces.batches, address=settings.address
    )


def _takes(export: TraceExport, batches: BatchSettings) -> Take:
    return export.put_alone if batches.batch_spans < EncodedPair.spans else export.put_all


def _sdk_processors(traces: SignalExport, problems: Sequence[VariableProblem]) -> list[SpanProcessor]:
    processors: list[SpanProcessor] = []
    if traces.to_console:
        processors.append(LazyProcessor(_to_console))
    return processors + [
        _batching(_SDK_EXPORTERS[collector.protocol](), problems) for collector in traces.sdk_collectors
    ]


def _to_console() -> SpanProcessor:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    console = Console()  # on the event loop: the library's own would wait for whatever reads it
    exporter = ConsoleSpanExporter(out=console)  # type: ignore[arg-type]  # all that it uses
    exporter.shutdown = console.finish  # type: ignore[method-assign]
    return SimpleSpanProcessor(exporter)


def _sdk_http_exporter() -> Callable[[], "SpanExporter"]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter


def _sdk_grpc_exporter() -> Callable[[], "SpanExporter"]:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter


# Imported when chosen, before the first span: 70 to 150 ms that must not be spent on the mail path.
_SDK_EXPORTERS: Final = {Protocol.HTTP: _sdk_http_exporter, Protocol.GRPC: _sdk_grpc_exporter}


def _batching(make_exporter: Callable[[], "SpanExporter"], problems: Sequence[VariableProblem]) -> SpanProcessor:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    def make() -> SpanProcessor:
        # It logs a header that it does not like with its value, a credential; the variable has been named before.
        logging.getLogger("opentelemetry.util.re").disabled = True
        with environment.without(problems):
            return BatchSpanProcessor(make_exporter())

    return LazyProcessor(make)
