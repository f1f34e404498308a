"""The collector: sending batches over http/protobuf or grpc, and interpreting the answers.

A collector is a foreign program behind a network. Its answer may never come, never end, be nonsense, or redirect us. So
an answer is bounded in octets, pieces and time, redirects are not followed (they would send the operator's headers,
perhaps with a key, to another host), and of an unreadable answer only the status counts.

A collector's constructor imports its library. The exporting thread calls it: relaying mail needs neither library.
"""

import email.utils
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum, auto
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from typing import Protocol as Interface
from urllib.parse import urlsplit

from otel_smtp.telemetry.exchange_bounds import MAX_REPLY_OCTETS, MAX_REPLY_PIECES, AnswerTooLong, ExchangeBounds
from otel_smtp.telemetry.export_failures import grpc_failure, http_failure, no_answer_within
from otel_smtp.telemetry.redaction import clean

if TYPE_CHECKING:
    import ssl

    import grpc
    import httpx

# OTLP/HTTP, "Retryable Response Codes".
_RETRYABLE_STATUSES: Final = frozenset({429, 502, 503, 504})
# OTLP/gRPC, "Failures"; RESOURCE_EXHAUSTED only with a RetryInfo.
_RETRYABLE_CODES: Final = frozenset(
    {"CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS"}
)
_NO_ANSWER: Final = "DEADLINE_EXCEEDED"
# The usual answers of success: nothing, or a partial success with all fields zero.
_ALL_TAKEN: Final = (b"", b"\x0a\x00")
_PIECE_OCTETS: Final = 128 * 1024
_GZIP: Final = zlib.MAX_WBITS | 16  # zlib's word for gzip around what it compresses
# Some batches long: a TLS handshake per batch would cost more than the batch.
_KEEP_ALIVE_SECONDS: Final = 60.0


class Signal(StrEnum):
    """A kind of telemetry. Its value is the end of its path over HTTP, and in capitals part of its variables' names."""

    TRACES = "traces"
    METRICS = "metrics"
    LOGS = "logs"


_EXPORTS: Final = {
    Signal.TRACES: "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    Signal.METRICS: "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
    Signal.LOGS: "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
}


class Protocol(StrEnum):
    """OTEL_EXPORTER_OTLP_PROTOCOL."""

    HTTP = "http/protobuf"
    GRPC = "grpc"


class Compression(StrEnum):
    """OTEL_EXPORTER_OTLP_COMPRESSION."""

    NONE = "none"
    GZIP = "gzip"
    DEFLATE = "deflate"


@dataclass(frozen=True, slots=True)
class CollectorSettings:
    """How to reach a collector.

    Attributes:
        endpoint: over http/protobuf the whole URL; over grpc a URL, or host and port.
        is_insecure: grpc without TLS; over http the URL's scheme decides.
        headers: sent with each batch; they may hold a key.
        certificate, client_key, client_certificate: paths of PEM files; empty: the system's authorities, no client
            certificate.
    """

    endpoint: str
    protocol: Protocol = Protocol.HTTP
    signal: Signal = Signal.TRACES
    is_insecure: bool = True
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    compression: Compression = Compression.NONE
    certificate: str = ""
    client_key: str = ""
    client_certificate: str = ""
    user_agent: str = "otel-smtp"

    @property
    def address(self) -> str:
        """Host and port without credentials, for log lines."""
        return (urlsplit(self.endpoint).netloc or self.endpoint).rpartition("@")[2]

    @property
    def shown_endpoint(self) -> str:
        """The endpoint without credentials: a URL can hold a password before its host, or a key in its query."""
        parts = urlsplit(self.endpoint)
        return f"{parts.scheme}://{self.address}{parts.path}" if parts.netloc else self.address


class BatchOutcome(Enum):
    """The outcome of a batch."""

    TAKEN = auto()
    AGAIN = auto()  # not taken; a retry may succeed
    REJECTED = auto()  # not taken; a retry would not help


class CollectorAnswer(NamedTuple):
    """A collector's answer, or the failure in its place.

    Attributes:
        why: in words, for the log; "" if everything was accepted.
        status: what the collector answered with: an HTTP status, or the name of a gRPC code; "" if it did not.
        retry_after_seconds: the delay that the collector asked for; None if it asked for none.
        rejected: how many spans, data points or log records of an accepted batch were rejected.
    """

    verdict: BatchOutcome
    why: str = ""
    retry_after_seconds: float | None = None
    rejected: int = 0
    status: str = ""


class Collector(Interface):
    """Takes batches; belongs to one thread."""

    def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
        """Send an encoded request, in parts, and wait for the answer. A network failure is an answer, never raised."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


def connect(settings: CollectorSettings) -> Collector:
    """A collector for `settings`. It connects when it first sends.

    Raises:
        OSError: a certificate or key cannot be read or used.
    """
    return GrpcCollector(settings) if settings.protocol is Protocol.GRPC else HttpCollector(settings)


class HttpCollector:
    """OTLP over http/protobuf."""

    def __init__(self, settings: CollectorSettings) -> None:
        import httpx

        self._url = settings.endpoint
        self._compression = settings.compression
        self._headers = {
            "user-agent": settings.user_agent,
            "content-type": "application/x-protobuf",
            # A small reply needs no compression, and a large one could be a decompression bomb.
            "accept-encoding": "identity",
            **({} if settings.compression is Compression.NONE else {"content-encoding": settings.compression.value}),
            **dict(settings.headers),
        }
        self._errors = (httpx.HTTPError, httpx.InvalidURL, OSError)
        self._bounds = ExchangeBounds()
        self._client = httpx.Client(
            verify=tls_context(settings) if self._url.startswith("https:") else False,
            limits=httpx.Limits(max_connections=1, keepalive_expiry=_KEEP_ALIVE_SECONDS),
            follow_redirects=False,
        )

    def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
        """Post it."""
        deadline = time.monotonic() + timeout_seconds
        body = _compressed(request, self._compression)
        reply = b""
        response: httpx.Response | None = None
        try:
            with (
                self._bounds.over_exchange(deadline),
                self._client.stream(
                    "POST",
                    self._url,
                    content=_pieces(body),
                    headers={**self._headers, "content-length": str(sum(map(len, body)))},
                    timeout=timeout_seconds,
                    extensions={"trace": self._bounds.note},
                ) as response,
            ):
                reply = _bounded(response) if response.is_success else b""
        except self._errors as error:
            has_ended_it = self._bounds.has_passed or isinstance(error, AnswerTooLong)
            if response is None or not has_ended_it:
                is_late = self._bounds.has_passed
                why = no_answer_within(timeout_seconds) if is_late else http_failure(error, timeout_seconds)
                return CollectorAnswer(BatchOutcome.AGAIN, why)
        if response.is_success:
            return _taken(reply)
        status = str(response.status_code)
        why = f"HTTP {status}"
        if response.status_code in _RETRYABLE_STATUSES:
            delay = retry_after_seconds(response.headers.get("retry-after", ""))
            return CollectorAnswer(BatchOutcome.AGAIN, why, delay, status=status)
        return CollectorAnswer(BatchOutcome.REJECTED, why, status=status)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
        self._bounds.close()


class GrpcCollector:
    """OTLP over grpc. The messages are octets here already, so nothing is serialized."""

    def __init__(self, settings: CollectorSettings) -> None:
        # On demand: 70 ms and 16 MiB that http/protobuf does not need.
        import grpc

        self._rpc_error = grpc.RpcError
        self._target = urlsplit(settings.endpoint).netloc or settings.endpoint
        self._compression = grpc.Compression[
            {Compression.NONE: "NoCompression", Compression.GZIP: "Gzip", Compression.DEFLATE: "Deflate"}[
                settings.compression
            ]
        ]
        self._options = (
            ("grpc.primary_user_agent", settings.user_agent),
            ("grpc.max_receive_message_length", MAX_REPLY_OCTETS),
            # The default waits up to two minutes before it reconnects to a collector that is long back.
            ("grpc.max_reconnect_backoff_ms", 5000),
        )
        self._credentials = None if settings.is_insecure else _grpc_credentials(settings)
        self._metadata = tuple((name.lower(), value) for name, value in settings.headers)
        self._method = _EXPORTS[settings.signal]
        self._channel: grpc.Channel | None = None
        self._export: grpc.UnaryUnaryMultiCallable[bytes, bytes]

    def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
        """Call Export."""
        if self._channel is None:
            self._channel = self._new_channel()
            self._export = self._channel.unary_unary(self._method)
        try:
            reply = self._export(b"".join(request), timeout=timeout_seconds, metadata=self._metadata)
        except self._rpc_error as error:
            answer = self._failed(error, timeout_seconds)
            if answer.status == _NO_ANSWER:
                # Otherwise a connection dropped silently by a firewall would be noticed only after a quarter of an
                # hour.
                self.close()
            return answer
        return _taken(reply)

    def _new_channel(self) -> "grpc.Channel":
        import grpc

        if self._credentials is None:
            return grpc.insecure_channel(self._target, options=self._options, compression=self._compression)
        return grpc.secure_channel(
            self._target, self._credentials, options=self._options, compression=self._compression
        )

    @staticmethod
    def _failed(error: "grpc.RpcError", timeout_seconds: float) -> CollectorAnswer:
        # The raised error is also the call, which has its status.
        code: str = error.code().name
        details = [one.value for one in error.trailing_metadata() or () if one.key == "grpc-status-details-bin"]
        delay = _retry_delay(details[0]) if details else None
        is_retryable = code in _RETRYABLE_CODES or (code == "RESOURCE_EXHAUSTED" and delay is not None)
        why = grpc_failure(code, error.details(), timeout_seconds)
        return CollectorAnswer(BatchOutcome.AGAIN if is_retryable else BatchOutcome.REJECTED, why, delay, status=code)

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def tls_context(settings: CollectorSettings) -> "ssl.SSLContext":
    """TLS to the collector, with the authorities and the client certificate of the settings.

    Raises:
        OSError: a file cannot be read or used.
    """
    import ssl

    context = ssl.create_default_context(cafile=settings.certificate or None)
    if settings.client_certificate:
        # Without an answer here OpenSSL would prompt for a passphrase on the terminal; a wrong one is an error.
        context.load_cert_chain(settings.client_certificate, settings.client_key or None, password="")
    return context


def _grpc_credentials(settings: CollectorSettings) -> "grpc.ChannelCredentials":
    import grpc

    def read(path: str) -> bytes | None:
        return Path(path).read_bytes() if path else None

    return grpc.ssl_channel_credentials(
        read(settings.certificate), read(settings.client_key), read(settings.client_certificate)
    )


def _compressed(request: Sequence[bytes], compression: Compression) -> Sequence[bytes]:
    if compression is Compression.NONE:
        return request
    # The lowest level finds most of the repetition in attributes, at a fifth of the default's cost.
    compressor = zlib.compressobj(1, wbits=_GZIP if compression is Compression.GZIP else zlib.MAX_WBITS)
    return [*map(compressor.compress, _pieces(request)), compressor.flush()]


def _pieces(request: Sequence[bytes]) -> Iterator[bytes]:
    """A request as octets, some `_PIECE_OCTETS` at a time. As a whole it would be copied once more for each time that
    the kernel takes a part of it, and each time into memory that is new."""
    piece: list[bytes] = []
    octets = 0
    for part in request:
        piece.append(part)
        octets += len(part)
        if octets >= _PIECE_OCTETS:
            yield b"".join(piece)
            piece.clear()
            octets = 0
    if piece:
        yield b"".join(piece)


def _bounded(response: "httpx.Response") -> bytes:
    """The reply's body, up to a bound: each of its chunks costs as much as a read."""
    return b"".join(islice(response.iter_raw(), MAX_REPLY_PIECES))


def _taken(reply: bytes) -> CollectorAnswer:
    """The answer in a successful reply: all or part accepted (OTLP, "Partial Success").

    The replies of all signals have the same fields under different names.
    """
    if reply in _ALL_TAKEN:
        return CollectorAnswer(BatchOutcome.TAKEN)
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    try:
        partial = ExportTraceServiceResponse.FromString(reply).partial_success
    except DecodeError:
        return CollectorAnswer(BatchOutcome.TAKEN)  # as its status says
    return CollectorAnswer(BatchOutcome.TAKEN, clean(partial.error_message), rejected=max(0, partial.rejected_spans))


def retry_after_seconds(value: str) -> float | None:
    """The delay that a Retry-After field asks for (RFC 9110 10.2.3); None if it is neither seconds nor a date."""
    value = value.strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _retry_delay(details: bytes | str) -> float | None:
    """The delay in the RetryInfo of a google.rpc.Status (OTLP/gRPC, "Throttling"); None without one."""
    if not isinstance(details, bytes):
        return None
    from google.protobuf.message import DecodeError
    from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

    try:
        for detail in Status.FromString(details).details:
            info = RetryInfo()
            if detail.Unpack(info):
                return float(max(0, info.retry_delay.ToNanoseconds()) / 1e9)
    except DecodeError:
        pass
    return None
