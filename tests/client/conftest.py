"""What the tests of the application's side share: a server to send to, and the spans that the application makes."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final

import pytest
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]  # not typed
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from otel_smtp.client.aiosmtplib_instrumentor import AiosmtplibInstrumentor
from otel_smtp.client.smtplib_instrumentor import SmtplibInstrumentor
from tests.support.capture import CapturingUpstream

SENDER: Final = "news@shop.example"
BOB: Final = "bob@there.example"
ANN: Final = "ann@there.example"
MESSAGE: Final = b"From: news@shop.example\r\nSubject: x\r\n\r\n.Hello\r\n"


class Spans:
    """A tracer provider of the test's own, and what its tracers have finished."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")

    @property
    def finished(self) -> list[ReadableSpan]:
        """The finished spans, in the order of their ends."""
        return list(self._exporter.get_finished_spans())

    @property
    def only(self) -> ReadableSpan:
        """The one finished mail span."""
        (span,) = (span for span in self.finished if span.name == "smtp.send")
        return span


@pytest.fixture
def server() -> Iterator[CapturingUpstream]:
    """An SMTP server; what it got must keep the protocol."""
    with CapturingUpstream() as capturing:
        yield capturing
    assert capturing.violations == []


@pytest.fixture
def spans() -> Spans:
    """The application's tracing."""
    return Spans()


Instrument = Callable[..., BaseInstrumentor]


@pytest.fixture
def instrument(spans: Spans) -> Iterator[Instrument]:
    """Instruments both libraries for the test, with the arguments of `instrument`."""
    instrumentors = (SmtplibInstrumentor(), AiosmtplibInstrumentor())

    def instrument_both(**options: object) -> None:
        for instrumentor in instrumentors:
            instrumentor.instrument(tracer_provider=spans.provider, **options)

    yield instrument_both
    for instrumentor in instrumentors:
        if instrumentor.is_instrumented_by_opentelemetry:
            instrumentor.uninstrument()


@contextlib.contextmanager
def hanging_up(at: bytes) -> Iterator[int]:
    """A server, on the port that is given, that says yes and closes the connection when a line begins with `at`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connected, _ = listening.accept()
            with connected, connected.makefile("rwb") as stream:
                stream.write(b"220 ready\r\n")
                stream.flush()
                for line in stream:
                    if line.upper().startswith(at):
                        return
                    is_data = line.upper().startswith(b"DATA")
                    is_command = line[:4].upper() in (b"EHLO", b"MAIL", b"RCPT")
                    if is_data or is_command:
                        stream.write(b"354 go on\r\n" if is_data else b"250 2.0.0 ok\r\n")
                        stream.flush()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(10)


def traceparent(content: bytes) -> str | None:
    """The value of the first header line, where that is a traceparent."""
    name, _, value = content.split(b"\r\n", 1)[0].partition(b": ")
    return value.decode() if name == b"traceparent" else None


def names(span: ReadableSpan) -> str:
    """The span as a traceparent names it."""
    assert span.context is not None
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"
