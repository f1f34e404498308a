"""The metrics: counted while things happen, told when somebody asks.

On the mail path a count is one addition in a dict, and a measurement one bisection; no library is called. What is
counted is turned into Prometheus text, with exemplars that name a trace, when the page is asked for.

Every label value comes from a closed set (T1): verbs and states are enumerations, reply codes lie between 200 and 599,
mechanisms, outcomes and reasons are our own words, listeners and upstreams the operator's. So the number of series has
a bound that no client can move.
"""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

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

from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionObserver,
    DeliveryObserver,
    DeliveryPhase,
    Endpoint,
    Observer,
    Outcome,
    TlsInfo,
    TraceHeaders,
    TransactionObserver,
)
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import PULSES, CloseReason, ConnState, Transition
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import Instrument, Metric

Labels = tuple[str, ...]
ConnectionCounts = Callable[[], Iterable[tuple[str, str, int]]]
"""Connections to upstreams now: upstream, state, how many."""
SpoolCounts = Callable[[], tuple[Mapping[str, int], float] | None]

# A look-up is quicker than `value`, which is a descriptor in Python.
_NAMES: Final[Mapping[ConnState, str]] = {state: state.value for state in ConnState}
_UNITS: Final[Mapping[str, str]] = {"s": "seconds", "By": "bytes"}


class Counts:
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

    __slots__ = ("counts", "exemplars", "least", "most", "total")

    def __init__(self, bounds: int) -> None:
        self.counts = [0] * (bounds + 1)
        self.exemplars: list[tuple[str, float, float] | None] = [None] * (bounds + 1)
        self.total = 0.0
        self.least = float("inf")
        self.most = float("-inf")


class Measurements:
    """A histogram: for each combination of label values, how many fell between which bounds."""

    __slots__ = ("metric", "series")

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.series: dict[Labels, Buckets] = {}

    def add(self, labels: Labels, value: float, trace_id: str | None = None) -> None:
        """Measure; `trace_id` names a trace in which it can be seen."""
        buckets = self.series.get(labels)
        if buckets is None:
            buckets = self.series[labels] = Buckets(len(self.metric.bounds))
        place = bisect_left(self.metric.bounds, value)
        buckets.counts[place] += 1
        buckets.total += value
        if value < buckets.least:
            buckets.least = value
        if value > buckets.most:
            buckets.most = value
        if trace_id is not None:
            buckets.exemplars[place] = (trace_id, value, time.time())


class _DeliveryMetrics(DeliveryObserver):
    __slots__ = ("_began", "_metrics", "_traced", "_transaction", "_upstream")

    def __init__(
        self, metrics: "Metrics", traced: DeliveryObserver, upstream: str, transaction: "_TransactionMetrics"
    ) -> None:
        self._metrics = metrics
        self._traced = traced
        self._upstream = upstream
        self._transaction = transaction
        self._began = time.perf_counter()

    def phase(self, phase: DeliveryPhase, reply: Reply | None = None) -> None:
        self._traced.phase(phase, reply)

    def pooled(self, *, wait_seconds: float, reused: bool) -> None:
        self._traced.pooled(wait_seconds=wait_seconds, reused=reused)
        self._metrics.pool_wait.add((self._upstream,), wait_seconds, self._transaction.known_trace_id())

    def connected(self, peer: Endpoint, tls: TlsInfo | None) -> None:
        self._traced.connected(peer, tls)

    def carrier(self) -> Mapping[str, str]:
        return self._traced.carrier()

    def ended(
        self, outcome: Outcome, reply: Reply | None, *, round_trips: int, error_type: ErrorType | None = None
    ) -> None:
        self._traced.ended(outcome, reply, round_trips=round_trips, error_type=error_type)
        self._metrics.delivery_duration.add(
            (self._upstream, outcome.value), time.perf_counter() - self._began, self._transaction.known_trace_id()
        )


class _TransactionMetrics(TransactionObserver):
    __slots__ = ("_has_header", "_metrics", "_traced")

    def __init__(self, metrics: "Metrics", traced: TransactionObserver) -> None:
        self._metrics = metrics
        self._traced = traced
        self._has_header = False

    def known_trace_id(self) -> str | None:
        """The trace's id, once the header is read. Asking before would settle the trace before the application's own
        traceparent was seen."""
        return self._traced.trace_id() if self._has_header else None

    def recipient_answered(self, recipient: Recipient, reply: Reply) -> None:
        self._traced.recipient_answered(recipient, reply)

    def header_received(self, trace: TraceHeaders, *, message_id: str | None) -> None:
        self._traced.header_received(trace, message_id=message_id)
        self._has_header = True

    def spooled(self, spool_id: str) -> None:
        self._traced.spooled(spool_id)

    def carrier(self) -> Mapping[str, str]:
        return self._traced.carrier()

    def trace_id(self) -> str | None:
        return self._traced.trace_id()

    def content_received(self, octets: int) -> None:
        self._traced.content_received(octets)
        self._metrics.message_size.add((), octets, self.known_trace_id())

    def delivery_begun(self, upstream: str, server: Endpoint, *, attempt: int = 1) -> DeliveryObserver:
        traced = self._traced.delivery_begun(upstream, server, attempt=attempt)
        return _DeliveryMetrics(self._metrics, traced, upstream, self)

    def ended(self, outcome: Outcome, reply: Reply | None, *, error_type: ErrorType | None = None) -> None:
        self._traced.ended(outcome, reply, error_type=error_type)
        self._metrics.transactions.add((outcome.value,))


class _ConnectionMetrics(ConnectionObserver):
    __slots__ = ("_began", "_entered", "_level", "_listener", "_metrics", "_traced")

    def __init__(self, metrics: "Metrics", traced: ConnectionObserver, listener: str) -> None:
        self._metrics = metrics
        self._traced = traced
        self._listener = listener
        self._level: ConnState | None = None
        self._began = self._entered = time.perf_counter()

    def proxied(self, client: Endpoint, server: Endpoint) -> None:
        self._traced.proxied(client, server)

    def hello(self, verb: str, name: str) -> None:
        self._traced.hello(verb, name)

    def tls_established(self, tls: TlsInfo) -> None:
        self._traced.tls_established(tls)

    def conn_state(self, transition: Transition) -> None:
        self._traced.conn_state(transition)
        metrics, state, previous = self._metrics, transition.state, transition.previous
        metrics.transitions.values[(_NAMES[previous] if previous is not None else "", _NAMES[state])] += 1
        now = time.perf_counter()
        if previous is not None:
            metrics.state_duration.add((_NAMES[previous],), now - self._entered)
        self._entered = now
        if state not in PULSES:
            self._move(None if state is ConnState.CLOSED else state)

    def _move(self, level: ConnState | None) -> None:
        active = self._metrics.active_connections
        if self._level is not None:
            active.values[(self._listener, _NAMES[self._level])] -= 1
        if level is not None:
            active.values[(self._listener, _NAMES[level])] += 1
        self._level = level

    def replied(self, verb: str | None, reply: Reply) -> None:
        self._traced.replied(verb, reply)
        self._metrics.replies.values[(verb or "none", str(reply.code))] += 1

    def authenticated(self, user: str, mechanism: str) -> None:
        self._traced.authenticated(user, mechanism)
        self._metrics.auth.add((mechanism, "accepted"))

    def auth_failed(self, mechanism: str) -> None:
        self._traced.auth_failed(mechanism)
        self._metrics.auth.add((mechanism, "refused"))

    def transaction_begun(self, mail: Mail, number: int) -> TransactionObserver:
        return _TransactionMetrics(self._metrics, self._traced.transaction_begun(mail, number))

    def closed(self, reason: CloseReason, *, octets_received: int, octets_sent: int) -> None:
        self._traced.closed(reason, octets_received=octets_received, octets_sent=octets_sent)
        metrics = self._metrics
        metrics.connection_duration.add((self._listener,), time.perf_counter() - self._began)
        if octets_received == 0:
            metrics.probes.add((self._listener,))


class Metrics(Observer):
    """Counts everything that happens, tells it on to tracing, and gives it out as Prometheus text.

    It stands before tracing, not beside it, because a measurement's exemplar names the trace.

    Args:
        traced: the observer that knows the traces.
        connections: connections to upstreams now.
        spool: messages in the spool by state, and the age of the oldest in seconds; None where there is no spool.
        dropped: what telemetry itself has lost so far: signal, reason, how many.
        resource: who we are, by attribute, for the page.

    Attributes:
        measurements: all histograms.
    """

    def __init__(
        self,
        traced: Observer,
        *,
        connections: ConnectionCounts = lambda: (),
        spool: SpoolCounts = lambda: None,
        dropped: ConnectionCounts = lambda: (),
        resource: Mapping[str, object] | None = None,
    ) -> None:
        self._traced = traced
        self._connections = connections
        self._spool = spool
        self._dropped = dropped
        self._resource = {name.replace(".", "_"): str(value) for name, value in (resource or {}).items()}
        self.active_connections = Counts(names.ACTIVE_CONNECTIONS)
        self.transitions = Counts(names.TRANSITIONS)
        self.replies = Counts(names.REPLIES)
        self.transactions = Counts(names.TRANSACTIONS)
        self.auth = Counts(names.SERVER_AUTH)
        self.refused = Counts(names.REFUSED)
        self.probes = Counts(names.PROBES)
        self.connection_duration = Measurements(names.SERVER_CONNECTION_DURATION)
        self.state_duration = Measurements(names.STATE_DURATION)
        self.message_size = Measurements(names.SERVER_MESSAGE_SIZE)
        self.delivery_duration = Measurements(names.DELIVERY_DURATION)
        self.pool_wait = Measurements(names.CLIENT_POOL_WAIT)
        self.measurements: Final = (
            self.connection_duration,
            self.state_duration,
            self.message_size,
            self.delivery_duration,
            self.pool_wait,
        )
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def connection_opened(self, connection: ConnectionInfo) -> ConnectionObserver:
        return _ConnectionMetrics(self, self._traced.connection_opened(connection), connection.listener)

    def connection_refused(self, reason: str) -> None:
        self._traced.connection_refused(reason)
        self.refused.add((reason,))

    def delivery_resumed(
        self, spool_id: str, carrier: Mapping[str, str], mail: Mail, *, is_possible_duplicate: bool = False
    ) -> TransactionObserver:
        traced = self._traced.delivery_resumed(spool_id, carrier, mail, is_possible_duplicate=is_possible_duplicate)
        return _TransactionMetrics(self, traced)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics page for a scraper that accepts `accept`, and its content type (OpenMetrics where asked for)."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def numbers(self) -> Iterator[tuple[Metric, list[tuple[Labels, float]]]]:
        """Everything now but the histograms: each counter and gauge with its rows. For any thread."""
        for counts in (self.transitions, self.replies, self.transactions, self.auth, self.refused, self.probes):
            yield counts.metric, list(counts.values.items())
        yield names.ACTIVE_CONNECTIONS, list(self.active_connections.values.items())
        yield names.CLIENT_CONNECTIONS, [((upstream, state), n) for upstream, state, n in self._connections()]
        if (spool := self._spool()) is not None:
            states, oldest_age_seconds = spool
            yield names.SPOOL_MESSAGES, [((state,), count) for state, count in states.items()]
            yield names.SPOOL_AGE, [((), oldest_age_seconds)]
        yield names.TELEMETRY_DROPPED, [((signal, reason), count) for signal, reason, count in self._dropped()]

    def collect(self) -> Iterator[MetricFamily]:
        """Everything now, as prometheus_client wants it of a collector."""
        if self._resource:
            yield InfoMetricFamily("target", "Who is measured: the resource of all telemetry", self._resource)
        for metric, rows in self.numbers():
            yield _family(_FAMILIES[metric.instrument], metric, rows)
        for measured in self.measurements:
            yield _histogram(measured)


_Number = CounterMetricFamily | GaugeMetricFamily
_FAMILIES: Final[Mapping[Instrument, type[_Number]]] = {
    Instrument.COUNTER: CounterMetricFamily,
    Instrument.UP_DOWN: GaugeMetricFamily,
}


def _prometheus_name(metric: Metric) -> str:
    unit = _UNITS.get(metric.unit)
    name = metric.name.replace(".", "_")
    return f"{name}_{unit}" if unit is not None else name


def _label_names(metric: Metric) -> Sequence[str]:
    return [label.replace(".", "_") for label in metric.labels]


def _family(make: type[_Number], metric: Metric, rows: Sequence[tuple[Labels, float]]) -> MetricFamily:
    family = make(_prometheus_name(metric), metric.description, labels=_label_names(metric))
    for labels, value in rows:
        family.add_metric(list(labels), value)
    return family


def _histogram(measured: Measurements) -> MetricFamily:
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
                rows.append((told, below, Exemplar({"trace_id": exemplar[0]}, exemplar[1], exemplar[2])))
        family.add_metric(list(labels), rows, sum_value=buckets.total)
    return family
