"""What the tests of the application's side share: a server to send to, and the spans that the application makes."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # type: ignore[attr-defined]  # not typed
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode

from otel_smtp.client import names
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
def spans() -> Iterator[Spans]:
    """The application's tracing; mail spans and their events have no attribute that the registry lacks."""
    made = Spans()
    yield made
    mails = [span for span in made.finished if span.name == names.SPAN]
    used = [span.attributes or {} for span in mails]
    used += [event.attributes or {} for span in mails for event in span.events]
    assert {name for attributes in used for name in attributes} <= names.ATTRIBUTES.keys()


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
    with socket.create_server(("127.0.0.1", 0)) as listening, saying_yes(listening, until=at):
        yield listening.getsockname()[1]


@contextlib.contextmanager
def saying_yes(listening: socket.socket, *, until: bytes) -> Iterator[None]:
    """Says yes to all of one client's commands, until a line begins with `until`."""

    def serve() -> None:
        connected, _ = listening.accept()
        with connected, connected.makefile("rwb") as stream:
            stream.write(b"220 ready\r\n")
            stream.flush()
            for line in stream:
                verb = line[:4].upper()
                if line.upper().startswith(until):
                    return
                if verb in (b"EHLO", b"LHLO", b"MAIL", b"RCPT", b"DATA") or line == b".\r\n":
                    stream.write(b"354 go on\r\n" if verb == b"DATA" else b"250 2.0.0 ok\r\n")
                    stream.flush()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield
    thread.join(10)


def attributes_of_a_relayed_message(server: CapturingUpstream) -> dict[str, Any]:
    """Everything that the span of `server`'s one message says, where nothing went wrong."""
    (message,) = server.messages
    return {
        "server.address": "localhost",
        "server.port": server.port,
        "network.peer.address": "127.0.0.1",
        "network.peer.port": server.port,
        "network.transport": "tcp",
        "network.protocol.name": "smtp",
        "smtp.outcome": "relayed",
        "smtp.reply.code": 250,
        "smtp.reply.enhanced_code": "2.0.0",
        "smtp.reply.text": "Ok: queued as CAPTURE",
        "smtp.transaction.recipient_count": 1,
        "smtp.transaction.recipients_refused": 0,
        "smtp.transaction.recipients_deferred": 0,
        "smtp.message.size": len(message.content),
        "smtp.mail.from.domain": "shop.example",
        "smtp.rcpt.domain": "there.example",
        "smtp.rcpt.domains": ("there.example",),
    }


def check_relayed(server: CapturingUpstream, spans: Spans, request: Span) -> None:
    """One message, one header, one span with all it should say, below `request`."""
    (message,) = server.messages
    span = spans.only
    assert traceparent(message.content) == named_by(span)
    assert message.content.count(b"traceparent") == 1
    assert (span.kind, span.status.status_code) == (SpanKind.CLIENT, StatusCode.UNSET)
    assert span.parent is not None
    assert span.parent.span_id == request.get_span_context().span_id
    assert dict(span.attributes or {}) == attributes_of_a_relayed_message(server)
    assert span.start_time is not None
    assert span.end_time is not None
    assert span.start_time < span.end_time


def traceparent(content: bytes) -> str | None:
    """The value of the first header line, where that is a traceparent."""
    name, _, value = content.split(b"\r\n", 1)[0].partition(b": ")
    return value.decode() if name == b"traceparent" else None


def named_by(span: ReadableSpan) -> str:
    """The span as a traceparent names it."""
    assert span.context is not None
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"
