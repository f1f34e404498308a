"""The metrics of `metrics` over OTLP, sent by a thread at an interval.

There is no second set of instruments. At the end of each interval the thread reads the counts that the metrics page
shows, puts them into the SDK's data classes, encodes them with the SDK's encoder and sends them by `collector`. The
mail path does nothing for it. Sums are since the start of the process (cumulative), so a failed export costs
resolution and no count; therefore there is no retry before the next interval.

A number may be read while the event loop adds to it. Each is right by itself, and a histogram's count is the sum of its
buckets by definition.
"""

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.resources import Resource

from otel_smtp.telemetry.attributes import SCHEMA_URL, SCOPE_NAME, Instrument, Metric
from otel_smtp.telemetry.collector import Answer, Collector, Signal, Verdict
from otel_smtp.telemetry.exporting import DropReason
from otel_smtp.telemetry.metrics import Buckets, Labels, Metrics

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import Histogram, HistogramDataPoint, MetricsData, Sum
    from opentelemetry.sdk.metrics.export import Metric as SdkMetric

logger: Final = logging.getLogger("otel_smtp.telemetry.metric_export")


class MetricsReading:
    """Reads metrics into the SDK's data classes.

    Args:
        resource, version: those of the spans.
    """

    def __init__(self, metrics: Metrics, resource: Resource, version: str) -> None:
        self._metrics = metrics
        self._resource = resource
        self._version = version
        self._start_ns = time.time_ns()

    def read(self) -> "MetricsData":
        """All metrics at this moment."""
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        scope = InstrumentationScope(SCOPE_NAME, self._version, SCHEMA_URL)
        scoped = ScopeMetrics(scope, list(self._read(time.time_ns())), SCHEMA_URL)
        return MetricsData([ResourceMetrics(self._resource, [scoped], self._resource.schema_url)])

    def _read(self, now_ns: int) -> Iterator["SdkMetric"]:
        from opentelemetry.sdk.metrics.export import Metric as SdkMetric

        for metric, rows in self._metrics.numbers():
            if rows:
                yield SdkMetric(metric.name, metric.description, metric.unit, self._sum(metric, rows, now_ns))
        for measured in self._metrics.measurements:
            metric, series = measured.metric, list(measured.series.items())
            if series:
                yield SdkMetric(metric.name, metric.description, metric.unit, self._histogram(metric, series, now_ns))

    def _sum(self, metric: Metric, rows: Sequence[tuple[Labels, float]], now_ns: int) -> "Sum":
        from opentelemetry.sdk.metrics.export import AggregationTemporality, NumberDataPoint, Sum

        points = [NumberDataPoint(_attributes(metric, labels), self._start_ns, now_ns, value) for labels, value in rows]
        return Sum(points, AggregationTemporality.CUMULATIVE, metric.instrument is Instrument.COUNTER)

    def _histogram(self, metric: Metric, series: Sequence[tuple[Labels, Buckets]], now_ns: int) -> "Histogram":
        from opentelemetry.sdk.metrics.export import AggregationTemporality, Histogram

        points = [self._point(metric, labels, buckets, now_ns) for labels, buckets in series]
        return Histogram(points, AggregationTemporality.CUMULATIVE)

    def _point(self, metric: Metric, labels: Labels, buckets: Buckets, now_ns: int) -> "HistogramDataPoint":
        from opentelemetry.sdk.metrics import Exemplar
        from opentelemetry.sdk.metrics.export import HistogramDataPoint

        counts = list(buckets.counts)
        # A measurement has a trace id and no span id. The encoder omits the trace without a span; a zero one is none.
        exemplars = [
            Exemplar({}, value, int(seconds * 1e9), span_id=0, trace_id=int(trace_id, 16))
            for trace_id, value, seconds in (kept for kept in buckets.exemplars if kept is not None)
        ]
        return HistogramDataPoint(
            attributes=_attributes(metric, labels),
            start_time_unix_nano=self._start_ns,
            time_unix_nano=now_ns,
            count=sum(counts),
            sum=buckets.total,
            bucket_counts=counts,
            explicit_bounds=metric.bounds,
            min=buckets.least,
            max=buckets.most,
            exemplars=exemplars,
        )


def _attributes(metric: Metric, labels: Labels) -> dict[str, str]:
    # Prometheus has an empty label for an absent state; here the attribute is absent.
    return {name: value for name, value in zip(metric.labels, labels, strict=True) if value}


class MetricExport:
    """Sends metrics to a collector at an interval, and once more at the end.

    Args:
        read: returns all metrics; called by the thread.
        connect: makes the collector; called by the thread. None: the metrics go to standard output.
        request_seconds: timeout of a request.
        address: of the collector, for the log.
    """

    def __init__(
        self,
        read: "Callable[[], MetricsData]",
        connect: Callable[[], Collector] | None,
        *,
        interval_seconds: float = 60.0,
        request_seconds: float = 10.0,
        address: str = "",
    ) -> None:
        self._read = read
        self._connect = connect
        self._interval_seconds = interval_seconds
        self._request_seconds = request_seconds
        self._address = address
        self._collector: Collector | None = None
        self._lost = dict.fromkeys((DropReason.EXPORT_FAILED, DropReason.REJECTED, DropReason.SHUTDOWN), 0)
        self._stopping = threading.Event()
        self._stop_by = float("inf")
        self._thread: threading.Thread | None = None
        self._points = 0  # of the latest reading; a failed one would have had about as many
        self._counting = threading.Lock()  # losses: by the thread, or by the shutdown that gave up on it
        self._is_abandoned = False
        self._is_failing = False

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
        with self._counting:
            self._is_abandoned = self._thread.is_alive()
            if self._is_abandoned:
                self._lost[DropReason.SHUTDOWN] += self._points
        if self._is_abandoned:
            logger.warning("metrics lost at shutdown", extra={"points": self._points, "collector": self._address})
        return not self._is_abandoned

    # The thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_abandoned:
            is_last = self._stopping.wait(self._interval_seconds)
            try:
                self._export()
            except Exception as error:  # noqa: BLE001 - the top of the thread; logged once, retried at the next interval
                self._lose(DropReason.EXPORT_FAILED, max(self._points, 1))
                self._failed(type(error).__name__, with_traceback=True)
            if is_last:
                break
        if self._collector is not None:
            self._collector.close()

    def _export(self) -> None:
        data = self._read()
        self._points = sum(len(metric.data.data_points) for metric in data.resource_metrics[0].scope_metrics[0].metrics)
        if self._connect is None:
            sys.stdout.write(data.to_json() + "\n")
            sys.stdout.flush()
            return
        from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics

        answer = self._send(encode_metrics(data).SerializeToString())
        if answer.verdict is not Verdict.TAKEN:
            again = DropReason.SHUTDOWN if self._stopping.is_set() else DropReason.EXPORT_FAILED
            self._lose(DropReason.REJECTED if answer.verdict is Verdict.REJECTED else again, self._points)
            self._failed(answer.why)
        elif answer.rejected:
            self._lose(DropReason.REJECTED, min(answer.rejected, self._points))
            self._failed(answer.why or "partial success")
        elif self._is_failing:
            self._is_failing = False
            logger.info("metrics export recovered", extra={"collector": self._address})

    def _lose(self, reason: DropReason, points: int) -> None:
        with self._counting:
            if not self._is_abandoned:  # else the shutdown has counted them
                self._lost[reason] += points

    def _send(self, request: bytes) -> Answer:
        assert self._connect is not None
        seconds = min(self._request_seconds, self._stop_by - time.monotonic())
        if seconds <= 0:
            return Answer(Verdict.AGAIN, "no time left")
        if self._collector is None:
            try:
                self._collector = self._connect()
            except OSError as error:
                return Answer(Verdict.AGAIN, type(error).__name__)
        return self._collector.send(request, seconds)

    def _failed(self, why: str, *, with_traceback: bool = False) -> None:
        if not self._is_failing:
            self._is_failing = True
            logger.warning(
                "metrics export failed",
                extra={"collector": self._address, "why": why},
                exc_info=with_traceback,
            )
