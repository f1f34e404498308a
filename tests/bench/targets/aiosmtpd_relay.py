"""A relay as one writes it from the well-known parts: aiosmtpd in front, a pool of aiosmtplib connections behind.

With `--otel` it tells what the gateway tells, by the OpenTelemetry SDK used as its documentation shows: a span for
each connection with an event for each state, spans for transaction and delivery, batches over OTLP/HTTP.

    python -m tests.bench.targets.aiosmtpd_relay PORT UPSTREAM_PORT [--otel]
"""

import asyncio
import signal
import sys
import time
from typing import Any, Final

import aiosmtplib
from aiosmtpd.smtp import SMTP, Envelope, Session
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

_CONNECTIONS: Final = 20
_SIZE_OCTETS: Final = 100 * 1024 * 1024
_SEGMENT_EVENTS: Final = 500  # as the gateway's `segment_events`


class Pool:
    """Connections to the upstream, kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[aiosmtplib.SMTP] = []
        self._may_open = asyncio.Semaphore(_CONNECTIONS)

    async def send(self, envelope: Envelope, span: trace.Span) -> str:
        """Relay one message; the upstream's final reply."""
        async with self._may_open:
            reused = bool(self._idle)
            if reused:
                client = self._idle.pop()
            else:
                client = aiosmtplib.SMTP(hostname="127.0.0.1", port=self._port, use_tls=False, start_tls=False)
                await client.connect()
            if span.is_recording():
                span.add_event("smtp.upstream.pool", {"smtp.pool.reused": reused})
            assert isinstance(envelope.content, bytes)
            try:
                _, said = await client.sendmail(envelope.mail_from or "", envelope.rcpt_tos, envelope.content)
            except BaseException:
                client.close()
                raise
            self._idle.append(client)
            return said


class Relay:
    """aiosmtpd's handler, without tracing."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        try:
            said = await self._pool.send(envelope, trace.INVALID_SPAN)
        except aiosmtplib.SMTPException:
            return "451 4.4.1 Upstream failed"
        return f"250 {said}"


class ConnectionStates:
    """One connection's span and the states on it."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer
        self._previous = ""
        self._entered = time.monotonic()
        self._sequence = 0
        self.messages = 0
        self.span = self._start()

    def _start(self) -> trace.Span:
        self._events = 0
        return self._tracer.start_span(
            "smtp.connection",
            kind=trace.SpanKind.SERVER,
            attributes={
                "client.address": "127.0.0.1",
                "server.address": "127.0.0.1",
                "network.transport": "tcp",
                "network.type": "ipv4",
                "network.protocol.name": "smtp",
                "smtp.listener": "local",
            },
        )

    def enter(self, state: str, **attributes: str | int) -> None:
        """One state: one event."""
        now = time.monotonic()
        self._sequence += 1
        event: dict[str, str | int | float] = {
            "smtp.state": state,
            "smtp.state.level": state,
            "smtp.state.sequence": self._sequence,
            "smtp.state.previous_duration": now - self._entered,
            **attributes,
        }
        if self._previous:
            event["smtp.state.previous"] = self._previous
        self.span.add_event(f"smtp.state.{state.lower()}", event)
        self._previous = state
        self._entered = now
        self._events += 1
        if self._events >= _SEGMENT_EVENTS and state == "Idle":
            self.span.end()
            self.span = self._start()


class TracedServer(SMTP):
    """aiosmtpd's server with a span for the connection."""

    def __init__(self, *args: Any, tracer: trace.Tracer, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._bench_tracer = tracer
        self.states: ConnectionStates | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.states = ConnectionStates(self._bench_tracer)
        self.states.enter("New")
        self.states.enter("Active")
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        assert self.states is not None
        self.states.enter("Closed", **{"smtp.close.reason": "quit"})
        self.states.span.set_attribute("smtp.connection.messages", self.states.messages)
        self.states.span.end()
        super().connection_lost(error)


class TracedRelay:
    """aiosmtpd's handler with spans for transaction and delivery."""

    def __init__(self, pool: Pool, tracer: trace.Tracer) -> None:
        self._pool = pool
        self._tracer = tracer

    async def handle_MAIL(
        self, server: TracedServer, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        assert server.states is not None
        if server.states.messages:
            server.states.enter("Active", **{"smtp.transaction.number": server.states.messages + 1})
        envelope.began_ns = time.time_ns()  # type: ignore[attr-defined]  # an attribute of our own on its envelope
        return "250 OK"

    async def handle_DATA(self, server: TracedServer, session: Session, envelope: Envelope) -> str:
        states = server.states
        assert states is not None
        states.messages += 1
        number = states.messages
        states.enter("Data", **{"smtp.transaction.number": number, "smtp.transaction.recipient_count": 1})
        assert isinstance(envelope.content, bytes)
        transaction = self._tracer.start_span(
            "smtp.transaction",
            context=trace.set_span_in_context(states.span),
            start_time=envelope.began_ns,  # type: ignore[attr-defined]  # set at MAIL
            attributes={
                "smtp.transaction.number": number,
                "smtp.transaction.recipient_count": len(envelope.rcpt_tos),
                "smtp.message.size": len(envelope.content),
                "smtp.mail.from.domain": (envelope.mail_from or "").rpartition("@")[2],
                "smtp.rcpt.domains": [address.rpartition("@")[2] for address in envelope.rcpt_tos],
                "smtp.body": "7bit",
            },
        )
        with trace.use_span(transaction, end_on_exit=True):
            with self._tracer.start_as_current_span(
                "smtp.delivery",
                kind=trace.SpanKind.CLIENT,
                attributes={"server.address": "127.0.0.1", "smtp.upstream.name": "sink", "smtp.delivery.attempt": 1},
            ) as delivery:
                try:
                    said = await self._pool.send(envelope, delivery)
                except aiosmtplib.SMTPException as failure:
                    delivery.record_exception(failure)
                    delivery.set_status(trace.StatusCode.ERROR)
                    states.enter("Error", **{"smtp.reply.code": 451})
                    return "451 4.4.1 Upstream failed"
                for step, code in (("mail", 250), ("rcpt", 250), ("data", 354), ("content", 250), ("reply", 250)):
                    delivery.add_event(f"smtp.upstream.{step}", {"smtp.reply.code": code})
                delivery.set_attributes({"smtp.reply.code": 250, "smtp.reply.text": said})
            transaction.set_attribute("smtp.outcome", "relayed")
        states.enter("Active", **{"smtp.reply.code": 250, "smtp.transaction.number": number})
        states.enter("Idle", **{"smtp.transaction.number": number})
        return f"250 {said}"


async def serve(port: int, upstream_port: int, provider: TracerProvider | None) -> None:
    """Relay until SIGTERM."""
    loop = asyncio.get_running_loop()
    pool = Pool(upstream_port)
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    settings: dict[str, Any] = {"data_size_limit": _SIZE_OCTETS, "hostname": "relay.example.com", "ident": "relay"}

    def connection() -> SMTP:
        if provider is None:
            return SMTP(Relay(pool), **settings)
        tracer = provider.get_tracer("relay")
        return TracedServer(TracedRelay(pool, tracer), tracer=tracer, **settings)

    server = await loop.create_server(connection, "127.0.0.1", port, backlog=1024)
    async with server:
        await ended.wait()
    if provider is not None:
        provider.shutdown()


def sdk() -> TracerProvider:
    """The SDK as its documentation sets it up, by the standard environment variables."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]), sdk() if "--otel" in sys.argv else None))
