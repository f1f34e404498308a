"""A real OTLP receiver for tests: http/protobuf and grpc, on ports that the kernel chose, in plain threads.

Whatever arrives is decoded with the protocol's own protobuf messages, so a test sees what a collector would see. The
body of every request is kept too (decompressed), for tests that look for what must never leave the process.

    with OtlpReceiver() as receiver:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint}
        ...
        spans = receiver.wait_for_spans(3)

Faults are set by `receiver.fault = Fault(...)` and hold for the requests that begin from then on; `refuse()` and
`come_back()` close and open the ports themselves. Requests answered with an error are kept as bodies but not decoded:
the sender still owns what it sent.
"""

import gzip
import socket
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status as GrpcStatus  # type: ignore[import-untyped]
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_DELTA, Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

T = TypeVar("T")

REQUESTS: Final[dict[str, type[Message]]] = {
    "traces": ExportTraceServiceRequest,
    "metrics": ExportMetricsServiceRequest,
    "logs": ExportLogsServiceRequest,
}
_GRPC_SERVICES: Final = {
    "opentelemetry.proto.collector.trace.v1.TraceService": "traces",
    "opentelemetry.proto.collector.metrics.v1.MetricsService": "metrics",
    "opentelemetry.proto.collector.logs.v1.LogsService": "logs",
}
# More than any client should be willing to read as an answer to an export.
HUGE_REPLY_OCTETS: Final = 16 * 1024 * 1024


class FaultKind(Enum):
    """How a request is mistreated. Over grpc, a status code stands for the HTTP one."""

    NONE = auto()
    BLACK_HOLE = auto()  # read, never answered while the fault lasts
    UNAVAILABLE = auto()  # 503; UNAVAILABLE
    THROTTLED = auto()  # 429 with Retry-After; RESOURCE_EXHAUSTED with a retry delay
    REJECTED = auto()  # 400: not worth a retry; INVALID_ARGUMENT
    SLOW = auto()  # answered after `seconds`
    HUGE_REPLY = auto()  # HUGE_REPLY_OCTETS of nonsense


@dataclass(frozen=True)
class Fault:
    """What happens to the next requests.

    Attributes:
        seconds: the delay of SLOW, the Retry-After of THROTTLED.
    """

    kind: FaultKind = FaultKind.NONE
    seconds: float = 1.0


NO_FAULT: Final = Fault()


@dataclass(frozen=True)
class ReceivedEvent:
    """A span event."""

    name: str
    time_ns: int
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ReceivedLink:
    """A span link; ids in hexadecimal digits."""

    trace_id: str
    span_id: str
    attributes: dict[str, Any]
    is_remote: bool


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as a collector sees it; ids in hexadecimal digits, `parent_span_id` "" for a root."""

    name: str
    kind: str  # SERVER, CLIENT, INTERNAL, ...
    trace_id: str
    span_id: str
    parent_span_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: list[ReceivedEvent]
    links: list[ReceivedLink]
    status: str  # UNSET, OK, ERROR
    status_message: str
    trace_state: str
    flags: int
    dropped: int  # attributes, events and links together
    resource: dict[str, Any]
    scope: str

    @property
    def event_names(self) -> list[str]:
        """Names of the events, in order."""
        return [event.name for event in self.events]


@dataclass(frozen=True)
class ReceivedLog:
    """A log record."""

    event_name: str
    body: Any
    severity: str
    trace_id: str
    span_id: str
    time_ns: int
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass(frozen=True)
class ReceivedPoint:
    """One data point: `value` for sums and gauges, `count`, `sum`, `buckets` and `bounds` for histograms."""

    attributes: dict[str, Any]
    value: float | None
    count: int | None
    sum: float | None
    buckets: list[int]
    bounds: list[float]
    exemplar_trace_ids: list[str]
    exemplar_span_ids: list[str] = field(default_factory=list)
    start_ns: int = 0
    time_ns: int = 0


@dataclass(frozen=True)
class ReceivedMetric:
    """A metric with its points."""

    name: str
    unit: str
    kind: str  # sum, gauge, histogram
    points: list[ReceivedPoint]
    resource: dict[str, Any]
    is_monotonic: bool = False
    is_delta: bool = False


@dataclass
class _Store:
    """What has arrived; guarded by `changed`."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    spans: list[ReceivedSpan] = field(default_factory=list)
    logs: list[ReceivedLog] = field(default_factory=list)
    metrics: list[ReceivedMetric] = field(default_factory=list)
    traces: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    requests: int = 0
    fault: Fault = NO_FAULT

    def note_request(self, body: bytes, headers: dict[str, str]) -> Fault:
        with self.changed:
            self.requests += 1
            self.bodies.append(body)
            self.headers.append(headers)
            self.changed.notify_all()
            return self.fault

    def wait_while(self, fault: Fault) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.fault is not fault)

    def take(self, signal: str, body: bytes) -> None:
        message = REQUESTS[signal].FromString(body)
        with self.changed:
            if isinstance(message, ExportTraceServiceRequest):
                self.spans += _spans(message)
                self.traces.append(body)
            elif isinstance(message, ExportLogsServiceRequest):
                self.logs += _logs(message)
            elif isinstance(message, ExportMetricsServiceRequest):
                self.metrics += _metrics(message)
            self.changed.notify_all()


class OtlpReceiver:
    """Receives OTLP over http/protobuf and, unless `with_grpc` is false, over grpc."""

    def __init__(self, *, with_grpc: bool = True) -> None:
        self._store = _Store()
        self._http: ThreadingHTTPServer | None = None
        self._grpc: grpc.Server | None = None
        self._with_grpc = with_grpc
        # Bound, never listening: the kernel gives the ports to no other process while they refuse.
        self._http_port, self._http_guard = _reserved_port()
        self._grpc_port, self._grpc_guard = _reserved_port()
        self.come_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def http_endpoint(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT with http/protobuf."""
        return f"http://127.0.0.1:{self._http_port}"

    @property
    def grpc_endpoint(self) -> str:
        """For OTEL_EXPORTER_OTLP_ENDPOINT with grpc."""
        return f"http://127.0.0.1:{self._grpc_port}"

    @property
    def fault(self) -> Fault:
        """How requests are mistreated."""
        return self._store.fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        with self._store.changed:
            self._store.fault = fault
            self._store.changed.notify_all()

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All spans so far, in order of arrival."""
        with self._store.changed:
            return list(self._store.spans)

    @property
    def logs(self) -> list[ReceivedLog]:
        """All log records so far."""
        with self._store.changed:
            return list(self._store.logs)

    @property
    def metrics(self) -> list[ReceivedMetric]:
        """All metrics so far; a metric comes again with each export."""
        with self._store.changed:
            return list(self._store.metrics)

    @property
    def bodies(self) -> list[bytes]:
        """The bodies of all requests, decompressed, refused ones included."""
        with self._store.changed:
            return list(self._store.bodies)

    @property
    def traces(self) -> list[bytes]:
        """The bodies of the requests that brought spans."""
        with self._store.changed:
            return list(self._store.traces)

    @property
    def headers(self) -> list[dict[str, str]]:
        """The header fields (metadata) of all requests, names in lower case."""
        with self._store.changed:
            return list(self._store.headers)

    @property
    def requests(self) -> int:
        """Requests that arrived, refused ones included."""
        with self._store.changed:
            return self._store.requests

    def clear(self) -> None:
        """Forget what has arrived."""
        with self._store.changed:
            for kept in (
                self._store.spans,
                self._store.logs,
                self._store.metrics,
                self._store.traces,
                self._store.bodies,
                self._store.headers,
            ):
                kept.clear()

    def wait_for_spans(
        self, wanted: int | Callable[[list[ReceivedSpan]], bool], timeout: float = 10.0
    ) -> list[ReceivedSpan]:
        """All spans, once there are `wanted` of them or `wanted` says so.

        Raises:
            TimeoutError: not within `timeout` seconds; the message says what has arrived.
        """
        return self._wait(lambda: self._store.spans, wanted, timeout, "spans", lambda span: span.name)

    def wait_for_logs(
        self, wanted: int | Callable[[list[ReceivedLog]], bool], timeout: float = 10.0
    ) -> list[ReceivedLog]:
        """All log records, once there are `wanted` of them or `wanted` says so."""
        return self._wait(lambda: self._store.logs, wanted, timeout, "logs", lambda log: log.event_name or log.body)

    def wait_for_metrics(
        self, wanted: int | Callable[[list[ReceivedMetric]], bool], timeout: float = 10.0
    ) -> list[ReceivedMetric]:
        """All metrics, once there are `wanted` of them or `wanted` says so."""
        return self._wait(lambda: self._store.metrics, wanted, timeout, "metrics", lambda metric: metric.name)

    def wait_for_requests(self, count: int, timeout: float = 10.0) -> None:
        """Return once `count` requests have arrived, whatever became of them."""
        with self._store.changed:
            if not self._store.changed.wait_for(lambda: self._store.requests >= count, timeout):
                raise TimeoutError(f"{self._store.requests} of {count} requests after {timeout} s")

    def _wait(
        self,
        arrived: Callable[[], list[T]],
        wanted: int | Callable[[list[T]], bool],
        timeout: float,
        what: str,
        name: Callable[[T], Any],
    ) -> list[T]:
        fulfilled = (lambda: len(arrived()) >= wanted) if isinstance(wanted, int) else (lambda: wanted(list(arrived())))
        with self._store.changed:
            if not self._store.changed.wait_for(fulfilled, timeout):
                names = [name(one) for one in arrived()]
                raise TimeoutError(f"the wanted {what} did not arrive in {timeout} s; there are {len(names)}: {names}")
            return list(arrived())

    def refuse(self) -> None:
        """Close both ports: connecting is refused until `come_back`."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None
        if self._grpc is not None:
            self._grpc.stop(grace=None).wait()
            self._grpc = None

    def come_back(self) -> None:
        """Listen (again) on the same ports."""
        if self._http is None:
            self._http = _HttpServer(("127.0.0.1", self._http_port), self._store)
            # The poll interval is how long `refuse` may take.
            threading.Thread(target=self._http.serve_forever, args=(0.02,), name="otlp-http", daemon=True).start()
        if self._with_grpc and self._grpc is None:
            self._grpc = _grpc_server(self._grpc_port, self._store)

    def close(self) -> None:
        """Stop for good; requests held in a black hole are let go."""
        self.fault = Fault()
        self.refuse()
        self._http_guard.close()
        self._grpc_guard.close()


def _reserved_port() -> tuple[int, socket.socket]:
    guard = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    guard.bind(("127.0.0.1", 0))
    return guard.getsockname()[1], guard


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], store: _Store) -> None:
        super().__init__(address, _HttpRequest)
        self.store = store

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sender that gave up is not this server's trouble."""


class _HttpRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _HttpServer

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0")))
        encoding = headers.get("content-encoding", "identity")
        if encoding == "gzip":
            body = gzip.decompress(body)
        elif encoding == "deflate":
            body = zlib.decompress(body)
        signal = self.path.removeprefix("/v1/")
        fault = self.server.store.note_request(body, headers)
        match fault.kind:
            case FaultKind.BLACK_HOLE:
                self.server.store.wait_while(fault)
                self.close_connection = True
                return
            case FaultKind.UNAVAILABLE:
                self._answer(503)
                return
            case FaultKind.THROTTLED:
                self._answer(429, retry_after=fault.seconds)
                return
            case FaultKind.REJECTED:
                self._answer(400)
                return
            case FaultKind.HUGE_REPLY:
                self._answer(200, b"\xff" * HUGE_REPLY_OCTETS)
                return
            case FaultKind.SLOW:
                threading.Event().wait(fault.seconds)
        if signal not in REQUESTS or headers.get("content-type") != "application/x-protobuf":
            self._answer(404)
            return
        self.server.store.take(signal, body)
        self._answer(200)

    def _answer(self, status: int, body: bytes = b"", *, retry_after: float | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", f"{retry_after:g}")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Requests are counted, not logged."""


def _grpc_server(port: int, store: _Store) -> grpc.Server:
    # Black-holed requests keep their thread, so there are more threads than a sender has retries at once.
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=16, thread_name_prefix="otlp-grpc"))
    for service, signal in _GRPC_SERVICES.items():
        export: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(_grpc_export(signal, store))
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Export": export})])
    if server.add_insecure_port(f"127.0.0.1:{port}") != port:
        raise OSError(f"port {port} is taken")
    server.start()
    return server


def _grpc_export(signal: str, store: _Store) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    def export(body: bytes, context: grpc.ServicerContext) -> bytes:
        headers = {str(name): str(value) for name, value in context.invocation_metadata()}
        fault = store.note_request(body, headers)
        match fault.kind:
            case FaultKind.BLACK_HOLE:
                store.wait_while(fault)
                context.abort(grpc.StatusCode.CANCELLED, "let go")
            case FaultKind.UNAVAILABLE:
                context.abort(grpc.StatusCode.UNAVAILABLE, "down")
            case FaultKind.THROTTLED:
                context.set_trailing_metadata((("grpc-status-details-bin", _retry_details(fault.seconds)),))
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "throttled")
            case FaultKind.REJECTED:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "rejected")
            case FaultKind.HUGE_REPLY:
                return b"\xff" * HUGE_REPLY_OCTETS
            case FaultKind.SLOW:
                threading.Event().wait(fault.seconds)
        store.take(signal, body)
        return b""

    return export


def _retry_details(seconds: float) -> bytes:
    """The RetryInfo by which OTLP/gRPC says when to come again (OTLP specification, throttling)."""
    status = GrpcStatus(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="throttled")
    retry = RetryInfo()
    retry.retry_delay.FromNanoseconds(int(seconds * 1e9))
    status.details.add().Pack(retry)
    details: bytes = status.SerializeToString()
    return details


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for pair in pairs:
        assert pair.key not in attributes, f"attribute {pair.key} comes twice"
        attributes[pair.key] = _value(pair.value)
    return attributes


def _spans(message: ExportTraceServiceRequest) -> list[ReceivedSpan]:
    return [
        _span(span, _attributes(resource.resource.attributes), scope.scope.name)
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _span(span: Span, resource: dict[str, Any], scope: str) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=[
            ReceivedEvent(event.name, event.time_unix_nano, _attributes(event.attributes)) for event in span.events
        ],
        links=[
            ReceivedLink(
                link.trace_id.hex(), link.span_id.hex(), _attributes(link.attributes), bool(link.flags & 0x200)
            )
            for link in span.links
        ],
        status=Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_message=span.status.message,
        trace_state=span.trace_state,
        flags=span.flags,
        dropped=span.dropped_attributes_count + span.dropped_events_count + span.dropped_links_count,
        resource=resource,
        scope=scope,
    )


def _logs(message: ExportLogsServiceRequest) -> list[ReceivedLog]:
    return [
        _log(record, _attributes(resource.resource.attributes))
        for resource in message.resource_logs
        for scope in resource.scope_logs
        for record in scope.log_records
    ]


def _log(record: LogRecord, resource: dict[str, Any]) -> ReceivedLog:
    return ReceivedLog(
        event_name=record.event_name,
        body=_value(record.body),
        severity=record.severity_text,
        trace_id=record.trace_id.hex(),
        span_id=record.span_id.hex(),
        time_ns=record.time_unix_nano,
        attributes=_attributes(record.attributes),
        resource=resource,
    )


def _metrics(message: ExportMetricsServiceRequest) -> list[ReceivedMetric]:
    return [
        _metric(metric, _attributes(resource.resource.attributes))
        for resource in message.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    ]


def _metric(metric: Metric, resource: dict[str, Any]) -> ReceivedMetric:
    kind = metric.WhichOneof("data")
    assert kind is not None, f"metric {metric.name} has no data"
    data = getattr(metric, kind)
    return ReceivedMetric(
        name=metric.name,
        unit=metric.unit,
        kind=kind,
        points=[_point(kind, point) for point in data.data_points],
        resource=resource,
        is_monotonic=kind == "sum" and data.is_monotonic,
        is_delta=kind != "gauge" and data.aggregation_temporality == AGGREGATION_TEMPORALITY_DELTA,
    )


def _point(kind: str, point: Any) -> ReceivedPoint:
    is_histogram = kind == "histogram"
    return ReceivedPoint(
        attributes=_attributes(point.attributes),
        value=None if is_histogram else float(getattr(point, point.WhichOneof("value"))),
        count=point.count if is_histogram else None,
        sum=point.sum if is_histogram else None,
        buckets=list(point.bucket_counts) if is_histogram else [],
        bounds=list(point.explicit_bounds) if is_histogram else [],
        exemplar_trace_ids=[exemplar.trace_id.hex() for exemplar in point.exemplars],
        exemplar_span_ids=[exemplar.span_id.hex() for exemplar in point.exemplars],
        start_ns=point.start_time_unix_nano,
        time_ns=point.time_unix_nano,
    )


def named(spans: Sequence[ReceivedSpan], name: str) -> list[ReceivedSpan]:
    """The spans of that name, in order of arrival."""
    return [span for span in spans if span.name == name]


def decoded(signal: str, body: bytes) -> Message:
    """The protobuf message of a request body; `signal` is traces, metrics or logs."""
    return REQUESTS[signal].FromString(body)
