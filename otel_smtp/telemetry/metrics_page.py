"""The metrics as Prometheus text, or OpenMetrics, with exemplars that name a trace; made on request."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.metrics_core import Metric as MetricFamily
from prometheus_client.samples import Exemplar

from otel_smtp.telemetry.attributes import Instrument, Metric
from otel_smtp.telemetry.propagation import TraceContext

if TYPE_CHECKING:
    from otel_smtp.telemetry.measurements import Labels, Measurements
    from otel_smtp.telemetry.metrics import Metrics

_UNITS: Final[Mapping[str, str]] = {"s": "seconds", "By": "bytes"}


class MetricsPage:
    """The page for scrapers: the gateway's metrics, and those of its process."""

    def __init__(self, metrics: "Metrics") -> None:
        self._metrics = metrics
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def encode(self, accept: str) -> tuple[bytes, str]:
        """The page for a scraper that accepts `accept`, and its content type. What cannot be read is named in a comment
        at its head, where its format has comments."""
        encode, content_type = choose_encoder(accept)
        page = encode(self._registry)
        if (unreadable := self._metrics.unreadable) and content_type.startswith("text/plain"):
            missing = f"# incomplete, without {', '.join(sorted(unreadable))}: internal error, the log says why\n"
            page = missing.encode() + page
        return page, content_type

    def collect(self) -> Iterator[MetricFamily]:
        """All metrics as of the latest `catch_up`, for prometheus_client."""
        metrics = self._metrics
        if metrics.resource:
            yield InfoMetricFamily("target", "The resource that is measured, as in all telemetry", metrics.resource)
        for metric, rows in metrics.numbers():
            yield _family(_FAMILIES[metric.instrument], metric, rows)
        yield from metrics.histograms(_histogram)


_Number = CounterMetricFamily | GaugeMetricFamily
_FAMILIES: Final[Mapping[Instrument, type[_Number]]] = {
    Instrument.COUNTER: CounterMetricFamily,
    Instrument.UP_DOWN: GaugeMetricFamily,
    Instrument.GAUGE: GaugeMetricFamily,
}


def _prometheus_name(metric: Metric) -> str:
    unit = _UNITS.get(metric.unit)
    name = metric.name.replace(".", "_")
    return f"{name}_{unit}" if unit is not None else name


def _label_names(metric: Metric) -> Sequence[str]:
    return [label.replace(".", "_") for label in metric.labels]


def _family(make: type[_Number], metric: Metric, rows: "Sequence[tuple[Labels, float]]") -> MetricFamily:
    family = make(_prometheus_name(metric), metric.description, labels=_label_names(metric))
    for labels, value in rows:
        family.add_metric(list(labels), value)
    return family


def _exemplar_labels(span: TraceContext) -> dict[str, str]:
    return {"trace_id": span.trace_id_hex, "span_id": span.span_id_hex}


def _histogram(measured: "Measurements") -> MetricFamily:
    metric = measured.metric
    family = HistogramMetricFamily(_prometheus_name(metric), metric.description, labels=_label_names(metric))
    for labels, buckets in list(measured.series.items()):
        rows: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        below = 0
        for bound, count, exemplar in zip(
            (*metric.bounds, float("inf")), buckets.counts, buckets.exemplars, strict=True
        ):
            below += count
            told = "+Inf" if bound == float("inf") else str(float(bound))
            if exemplar is None:
                rows.append((told, below))
            else:
                rows.append((told, below, Exemplar(_exemplar_labels(exemplar[0]), exemplar[1], exemplar[2])))
        family.add_metric(list(labels), rows, sum_value=buckets.total)
    return family
