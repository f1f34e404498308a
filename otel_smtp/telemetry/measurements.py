"""Counts and measurements by label values: the storage of counters, gauges and histograms.

No library is called for them: a count is an addition in a dict, a measurement one bisection.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence

from otel_smtp.telemetry.attributes import Metric
from otel_smtp.telemetry.propagation import TraceContext

Labels = tuple[str, ...]


class LabelledCounts:
    """A counter or gauge: a number for each combination of label values."""

    __slots__ = ("metric", "values")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.values: defaultdict[Labels, int] = defaultdict(int)

    def add(self, labels: Labels, by: int = 1) -> None:
        """Count."""
        self.values[labels] += by


class Buckets:
    """The measurements of one series of a histogram."""

    __slots__ = ("_bounds", "_latest", "counts", "least", "most", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._latest: list[tuple[TraceContext, float, float] | None] = [None] * (len(bounds) + 1)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.least = float("inf")
        self.most = float("-inf")

    def add(self, value: float, context: TraceContext | None = None, unix_ns: int = 0) -> None:
        """Measure; `context` names a span in whose trace it can be seen, `unix_ns` when that was."""
        place = bisect_left(self._bounds, value)
        self.counts[place] += 1
        self.total += value
        if value < self.least:
            self.least = value
        if value > self.most:
            self.most = value
        if context is not None:
            self._latest[place] = (context, value, unix_ns / 1e9)

    def add_each(
        self, values: Sequence[float], contexts: Sequence[TraceContext | None], moments_ns: Sequence[int]
    ) -> None:
        """Measure several, at least one, in their order; each as `add` does."""
        if contexts[0] is None and contexts.count(None) == len(contexts):
            self.add_all([*values])
            return
        if None in contexts:
            for value, context, unix_ns in zip(values, contexts, moments_ns, strict=True):
                self.add(value, context, unix_ns)
            return
        places = self.add_all([*values])
        # The latest of each bucket: with this many, one is among the last few.
        bounds, latest = self._bounds, self._latest
        for at in range(len(values) - 1, -1, -1):
            value = values[at]
            place = bisect_left(bounds, value)
            if place in places:
                places.remove(place)
                context = contexts[at]
                assert context is not None
                latest[place] = (context, value, moments_ns[at] / 1e9)
                if not places:
                    return

    def add_all(self, values: list[float]) -> set[int]:
        """Measure many, at least one, of which none names a trace; sorts them.

        Returns:
            Which buckets they fell into.
        """
        places: set[int] = set()
        self.total += sum(values)
        values.sort()
        self.least = min(self.least, values[0])
        self.most = max(self.most, values[-1])
        counts, below, most = self.counts, 0, len(values)
        for place, bound in enumerate(self._bounds):
            so_far = bisect_right(values, bound)
            if so_far != below:
                counts[place] += so_far - below
                places.add(place)
                below = so_far
                if below == most:
                    return places
        counts[-1] += most - below
        places.add(len(counts) - 1)
        return places

    @property
    def exemplars(self) -> Sequence[tuple[TraceContext, float, float] | None]:
        """For each bucket the latest measurement with a span: the span, the value, seconds since the epoch."""
        return self._latest


class _Series(dict[Labels, Buckets]):
    """Buckets by label values, made when first asked for."""

    __slots__ = ("_bounds",)

    def __init__(self, bounds: Sequence[float]) -> None:
        super().__init__()
        self._bounds = bounds

    def __missing__(self, labels: Labels) -> Buckets:
        buckets = self[labels] = Buckets(self._bounds)
        return buckets


class Measurements:
    """A histogram: for each combination of label values, the counts per bucket."""

    __slots__ = ("metric", "series")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.series: dict[Labels, Buckets] = _Series(metric.bounds)
