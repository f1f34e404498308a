"""The metrics of `metrics` over OTLP, sent by a thread at an interval.

There is no second set of instruments. At the end of each interval the thread reads the counts that the metrics page
shows, puts them into the SDK's data classes, encodes them with the SDK's encoder and sends them by `collector`. The
mail path does nothing for it. Sums are since the start of the process (cumulative) or, where the operator prefers it,
since the last export that did not fail (delta). So a failed export costs resolution and no count; therefore there is no
retry before the next interval.

A number may be read while the event loop adds to it. Each is right by itself, and a histogram's count is the sum of its
buckets by definition.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.resources import Resource

from otel_smtp.telemetry.attributes import SCHEMA_URL, SCOPE_NAME, TELEMETRY_DROPPED, Instrument, Metric
from otel_smtp.telemetry.collector import BatchOutcome, Collector, CollectorAnswer, Signal
from otel_smtp.telemetry.environment import Temporality
from otel_smtp.telemetry.export_failures import file_failure
from otel_smtp.telemetry.exporting import DropReason
from otel_smtp.telemetry.line_output import Console
from otel_smtp.telemetry.measurements import Buckets, Labels, Measurements
from otel_smtp.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import Gauge, Histogram, HistogramDataPoint, MetricsData, Sum
    from opentelemetry.sdk.metrics.export import Metric as SdkMetric

logger: Final = logging.getLogger("otel_smtp.telemetry.metric_export")

# An interval meant in seconds (OTEL_METRIC_EXPORT_INTERVAL=60) would take the interpreter from mail all the time.
# The thread rests nine times as long as it computed.
_REST: Final = 9
_LONGEST_REST_SECONDS: Final = 1.0


class _Delta:
    """The exported part of metrics whose sums count from the last export.

    A reading is `settle`d when its export was not a failure; until then the next one begins where it did.
    """

    def __init__(self, start_ns: int) -> None:
        self.start_ns = start_ns
        self._numbers: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], tuple[list[int], float]] = {}
        self._read_numbers: dict[tuple[str, Labels], float] = {}
        self._read_histograms: dict[tuple[str, Labels], tuple[list[int], float]] = {}
        self._read_ns = start_ns

    def begin(self, now_ns: int) -> None:
        self._read_ns = now_ns
        self._read_numbers, self._read_histograms = {}, {}

    def number(self, metric: Metric, labels: Labels, value: float) -> float:
        """A counter's increase since then."""
        self._read_numbers[metric.name, labels] = value
        return value - self._numbers.get((metric.name, labels), 0)

    def histogram(self, metric: Metric, labels: Labels, counts: list[int], total: float) -> tuple[list[int], float]:
        """The increase of a histogram's buckets and sum since then."""
        key = metric.name, labels
        self._read_histograms[key] = counts, total
        before, total_before = self._histograms.get(key, ([0] * len(counts), 0.0))
        return [now - then for now, then in zip(counts, before, strict=True)], total - total_before

    def settle(self) -> None:
        self._numbers, self._histograms = self._read_numbers, self._read_histograms
        self.start_ns = self._read_ns


class MetricsReading:
    """Reads metrics into the SDK's data classes, for one export.

    Args:
        resource, version: those of the spans.
        temporality: which sums begin from the last settled reading.
    """

    def __init__(
        self,
        metrics: Metrics,
        resource: Resource,
        version: str,
        temporality: Temporality = Temporality.CUMULATIVE,
    ) -> None:
        self._metrics = metrics
        self._resource = resource
        self._version = version
        self._temporality = temporality
        self._start_ns = time.time_ns()
        self._delta = _Delta(self._start_ns)

    def settle(self) -> None:
        """The latest reading has been exported, or is lost: delta sums begin from it."""
        self._delta.settle()

    def read(self) -> "MetricsData":
        """All metrics at this moment."""
        now_ns = time.time_ns()
        self._delta.begin(now_ns)
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        scope = InstrumentationScope(SCOPE_NAME, self._version, SCHEMA_URL)
        scoped = ScopeMetrics(scope, list(self._read(now_ns)), SCHEMA_URL)
        return MetricsData([ResourceMetrics(self._resource, [scoped], self._resource.schema_url)])

    def _read(self, now_ns: int) -> Iterator["SdkMetric"]:
        from opentelemetry.sdk.metrics.export import Metric as SdkMetric

        for metric, rows in self._metrics.numbers():
            if rows:
                data = self._gauge if metric.instrument is Instrument.GAUGE else self._sum
                yield SdkMetric(metric.name, metric.description, metric.unit, data(metric, rows, now_ns))

        def histogram(measured: Measurements) -> SdkMetric | None:
            metric, series = measured.metric, list(measured.series.items())
            if not series:
                return None
            return SdkMetric(metric.name, metric.description, metric.unit, self._histogram(metric, series, now_ns))

        yield from filter(None, self._metrics.histograms(histogram))

    @staticmethod
    def _gauge(metric: Metric, rows: Sequence[tuple[Labels, float]], now_ns: int) -> "Gauge":
        from opentelemetry.sdk.metrics.export import Gauge, NumberDataPoint

        return Gauge([NumberDataPoint(_attributes(metric, labels), 0, now_ns, value) for labels, value in rows])

    def _is_delta(self, metric: Metric) -> bool:
        """As the SDK's exporters decide it: what goes up and down is never a delta."""
        if metric.instrument not in (Instrument.COUNTER, Instrument.HISTOGRAM):
            return False
        # Of the counters this one alone is read from elsewhere when metrics are: the SDK would call it observable.
        is_observable = metric is TELEMETRY_DROPPED
        return self._temporality is Temporality.DELTA or (
            self._temporality is Temporality.LOW_MEMORY and not is_observable
        )

    def _sum(self, metric: Metric, rows: Sequence[tuple[Labels, float]], now_ns: int) -> "Sum":
        from opentelemetry.sdk.metrics.export import AggregationTemporality, NumberDataPoint, Sum

        is_counter = metric.instrument is Instrument.COUNTER
        if not self._is_delta(metric):
            points = [
                NumberDataPoint(_attributes(metric, labels), self._start_ns, now_ns, value) for labels, value in rows
            ]
            return Sum(points, AggregationTemporality.CUMULATIVE, is_counter)
        delta = self._delta
        points = [
            NumberDataPoint(_attributes(metric, labels), delta.start_ns, now_ns, delta.number(metric, labels, value))
            for labels, value in rows
        ]
        return Sum(points, AggregationTemporality.DELTA, is_counter)

    def _histogram(self, metric: Metric, series: Sequence[tuple[Labels, Buckets]], now_ns: int) -> "Histogram":
        from opentelemetry.sdk.metrics.export import AggregationTemporality, Histogram

        is_delta = self._is_delta(metric)
        points = [self._point(metric, labels, buckets, now_ns, is_delta=is_delta) for labels, buckets in series]
        return Histogram(points, AggregationTemporality.DELTA if is_delta else AggregationTemporality.CUMULATIVE)

    def _point(
        self, metric: Metric, labels: Labels, buckets: Buckets, now_ns: int, *, is_delta: bool
    ) -> "HistogramDataPoint":
        from opentelemetry.sdk.metrics import Exemplar
        from opentelemetry.sdk.metrics.export import HistogramDataPoint

        counts, total, start_ns = list(buckets.counts), buckets.total, self._start_ns
        # The least and most are those since the start, and an empty series has none. The encoder leaves out None.
        least: float | None = None
        most: float | None = None
        if is_delta:
            start_ns = self._delta.start_ns
            counts, total = self._delta.histogram(metric, labels, counts, total)
        elif any(counts):
            least, most = buckets.least, buckets.most
        exemplars = [
            Exemplar({}, value, int(seconds * 1e9), span_id=context.span_id, trace_id=context.trace_id)
            for context, value, seconds in (kept for kept in buckets.exemplars if kept is not None)
            if not is_delta or seconds * 1e9 >= start_ns
        ]
        return HistogramDataPoint(
            attributes=_attributes(metric, labels),
            start_time_unix_nano=start_ns,
            time_unix_nano=now_ns,
            count=sum(counts),
            sum=total,
            bucket_counts=counts,
            explicit_bounds=metric.bounds,
            min=least,  # type: ignore[arg-type]  # optional in the protocol
            max=most,  # type: ignore[arg-type]
            exemplars=exemplars,
        )


def _attributes(metric: Metric, labels: Labels) -> dict[str, str]:
    # Prometheus has an empty label for an absent state; here the attribute is absent.
    return {name: value for name, value in zip(metric.labels, labels, strict=True) if value}


class MetricExport:
    """Sends metrics to a collector at an interval, and once more at the end.

    Args:
        read: returns all metrics; called by the thread. `settle`: called by it when what was read has been exported,
            or is lost for good.
        connect: makes the collector; called by the thread. None: the metrics go to standard output.
        request_seconds: timeout of a request.
        address: of the collector, for the log.
    """

    def __init__(
        self,
        read: "Callable[[], MetricsData]",
        connect: Callable[[], Collector] | None,
        *,
        settle: Callable[[], None] = lambda: None,
        interval_seconds: float = 60.0,
        request_seconds: float = 10.0,
        address: str = "",
    ) -> None:
        self._read = read
        self._settle = settle
        self._connect = connect
        self._interval_seconds = interval_seconds
        self._request_seconds = request_seconds
        self._address = address
        self._collector: Collector | None = None
        self._console: Console | None = None
        self._lost = dict.fromkeys((DropReason.EXPORT_FAILED, DropReason.REJECTED, DropReason.SHUTDOWN), 0)
        self._stopping = threading.Event()
        self._stop_by = float("inf")
        self._thread: threading.Thread | None = None
        self._points = 0  # of the latest reading; a failed one would have had about as many
        self._counting = threading.Lock()  # losses: by the thread, or by the shutdown that gave up on it
        self._is_abandoned = False
        self._is_failing = False
        self._is_interrupted = False

    def dropped(self) -> Iterator[tuple[str, str, int]]:
        """Data points that were not exported: signal, reason, number."""
        for reason, count in self._lost.items():
            yield Signal.METRICS.value, reason.value, count

    def start(self) -> None:
        """Start the thread: after a fork, never before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
            self._thread.start()

    def shutdown(self, budget_seconds: float) -> bool:
        """Send everything a last time, within the budget. Blocks: not for the event loop.

        A request that hangs already cannot be cut short. When the budget is spent, the thread is abandoned with it,
        and the data points of the last export count as lost.

        Returns:
            Whether the thread ended in time.
        """
        # A last request that hangs ends before the budget does.
        self._stop_by = time.monotonic() + 0.9 * budget_seconds
        self._stopping.set()
        if self._thread is None:
            return True
        self._thread.join(budget_seconds)
        points = max(self._points, 1)  # none: it has not even read them
        with self._counting:
            self._is_abandoned = self._thread.is_alive()
            if self._is_abandoned:
                self._lost[DropReason.SHUTDOWN] += points
        if self._is_abandoned:
            logger.warning("metrics lost at shutdown", extra={"points": points, "collector": self._address})
        return not self._is_abandoned

    # The thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        pause_seconds, has_imported = self._interval_seconds, False
        while not self._is_abandoned:
            is_last = self._stopping.wait(pause_seconds)
            began = time.thread_time()
            try:
                self._export_or_lose()
            except Exception:  # the top of the thread: logged once, and the next export is tried
                if not self._is_interrupted:
                    self._is_interrupted = True
                    logger.exception("export interrupted: internal error", extra={"about": "metrics"})
            if is_last:
                break
            if has_imported:
                rest_seconds = _REST * (time.thread_time() - began)
                pause_seconds = max(self._interval_seconds, min(rest_seconds, _LONGEST_REST_SECONDS))
            has_imported = True
        if self._collector is not None:
            self._collector.close()

    def _export_or_lose(self) -> None:
        try:
            self._export()
        except Exception as error:  # noqa: BLE001 - logged once, retried at the next interval
            self._lose(DropReason.EXPORT_FAILED, max(self._points, 1))
            self._failed(f"internal error: {type(error).__name__}", with_traceback=True)

    def _export(self) -> None:
        data = self._read()
        self._points = sum(len(metric.data.data_points) for metric in data.resource_metrics[0].scope_metrics[0].metrics)
        if self._connect is None:
            self._console = self._console or Console()
            self._console.write(data.to_json() + "\n")
            self._console.finish()
            self._settle()
            return
        from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics

        answer = self._send(encode_metrics(data).SerializeToString())
        if answer.verdict is not BatchOutcome.AGAIN:
            self._settle()
        if answer.verdict is not BatchOutcome.TAKEN:
            again = DropReason.SHUTDOWN if self._stopping.is_set() else DropReason.EXPORT_FAILED
            self._lose(DropReason.REJECTED if answer.verdict is BatchOutcome.REJECTED else again, self._points)
            self._failed(answer.why)
        elif answer.rejected:
            self._lose(DropReason.REJECTED, min(answer.rejected, self._points))
            self._failed(answer.why or "partial success")
        elif self._is_failing:
            self._is_failing = False
            logger.info("export of metrics recovered", extra={"collector": self._address})

    def _lose(self, reason: DropReason, points: int) -> None:
        with self._counting:
            if not self._is_abandoned:  # else the shutdown has counted them
                self._lost[reason] += points

    def _send(self, request: bytes) -> CollectorAnswer:
        assert self._connect is not None
        if self._collector is None:
            try:
                self._collector = self._connect()
            except OSError as error:
                return CollectorAnswer(BatchOutcome.AGAIN, file_failure(error))
        # Only now: to make a collector imports its library, which takes a part of the time that is left at the end.
        seconds = min(self._request_seconds, self._stop_by - time.monotonic())
        if seconds <= 0:
            return CollectorAnswer(BatchOutcome.AGAIN, "no time left")
        return self._collector.send([request], seconds)

    def _failed(self, why: str, *, with_traceback: bool = False) -> None:
        if not self._is_failing:
            self._is_failing = True
            logger.warning(
                "export of metrics failing",
                extra={"collector": self._address, "why": why},
                exc_info=with_traceback,
            )
