"""The collectors that OTEL_* variables name: whether each accepts an empty batch, sent as the gateway would send it.

The request is the gateway's own: same protocol, TLS and headers. If it fails without a status, a second connection
finds out what the port speaks, since the two protocols' ports are easily mixed up.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Final
from urllib.parse import urlsplit

from otel_smtp.commands.checks.connecting import connection, printable, reason
from otel_smtp.commands.checks.findings import TIMEOUT_SECONDS, Finding
from otel_smtp.observing import Endpoint
from otel_smtp.telemetry import environment
from otel_smtp.telemetry.collector import (
    BatchOutcome,
    CollectorAnswer,
    CollectorSettings,
    Protocol,
    connect,
    tls_context,
)

# RFC 9113 3.4: what an HTTP/2 client sends first, and an empty SETTINGS frame.
_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS_FRAME: Final = 4
_NO_LOGIN: Final = ("401", "403", "UNAUTHENTICATED", "PERMISSION_DENIED")


async def check_collectors(environ: Mapping[str, str] | None = None) -> AsyncIterator[Finding]:
    """Check each collector that receives traces, metrics or logs, and the variables that say where they are."""
    asked = environment.read(environ)
    for problem in asked.problems:
        yield Finding("failed", "collector", str(problem))
    is_checked = False
    for export in (asked.traces, asked.metrics, asked.logs):
        for settings in export.collectors:
            is_checked = True
            yield await check_collector(settings, is_sdk=settings in export.sdk_collectors)
    if not is_checked:
        yield Finding("ok", "collector", "none is set: nothing is exported")


async def check_collector(settings: CollectorSettings, *, is_sdk: bool = False) -> Finding:
    """Send an empty batch of the signal.

    Args:
        is_sdk: the SDK's exporter is used, whose credential provider is not called here.
    """
    subject = f"collector {settings.protocol} {settings.shown_endpoint}"
    if settings.protocol is Protocol.GRPC:
        subject += f" {settings.signal}"
    try:
        answer = await asyncio.to_thread(_send_empty_batch, settings)
    except OSError as error:
        return Finding("failed", subject, f"its TLS files cannot be used: {reason(error)}")
    if answer.verdict is BatchOutcome.TAKEN:
        return Finding("ok", subject, f"accepts {settings.signal}")
    if answer.status in _NO_LOGIN:
        if is_sdk:
            return Finding("warning", subject, f"answers {answer.status}; the credential provider was not asked")
        return Finding("failed", subject, f"answers {answer.status}: check OTEL_EXPORTER_OTLP_HEADERS")
    if answer.status == "404":
        return Finding("failed", subject, f"nothing is at {urlsplit(settings.endpoint).path} (404): check the path")
    if answer.status.isdigit():
        return Finding("failed", subject, f"answers {answer.status}")
    return Finding("failed", subject, await _diagnose(settings, answer))


def _send_empty_batch(settings: CollectorSettings) -> CollectorAnswer:
    collector = connect(settings)
    try:
        return collector.send([], TIMEOUT_SECONDS)
    finally:
        collector.close()


async def _diagnose(settings: CollectorSettings, answer: CollectorAnswer) -> str:
    """Why there was no usable answer, judged by the protocol that the port speaks."""
    is_grpc = settings.protocol is Protocol.GRPC
    parts = urlsplit(settings.endpoint if "://" in settings.endpoint else f"//{settings.endpoint}")
    is_secure = not settings.is_insecure if is_grpc else parts.scheme == "https"
    try:
        address = Endpoint(parts.hostname or "", parts.port or (443 if is_secure else 80))
        context = tls_context(settings) if is_secure else None
        if context is not None:
            context.set_alpn_protocols(["h2" if is_grpc else "http/1.1"])
        async with asyncio.timeout(TIMEOUT_SECONDS), connection(address, context) as (reader, writer):
            writer.write(_HTTP2_PREFACE if is_grpc else f"OPTIONS * HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
            await writer.drain()
            said = await reader.read(64)
    except ssl.SSLError as error:
        hint = "; for a collector in clear, write http:// in front of it" if "WRONG_VERSION" in str(error) else ""
        return f"cannot be reached: {reason(error)}{hint}"
    except (OSError, TimeoutError, ValueError) as error:
        return f"cannot be reached: {reason(error)}"
    if is_grpc and _is_http1(said):
        return (
            "this port does not speak HTTP/2, so it is probably for http/protobuf: "
            "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or use the port for gRPC (usually 4317)"
        )
    if not is_grpc and (_is_http2(said) or not said):
        return (
            "this port does not speak HTTP/1.1, so it is probably for gRPC: "
            "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use the port for http/protobuf (usually 4318)"
        )
    if _is_http1(said) or _is_http2(said):
        return f"does not accept {settings.signal}: {answer.why}"
    return f"this is not an OTLP collector: {printable(said)}"


def _is_http1(said: bytes) -> bool:
    """Whether a server speaks HTTP/1. Some answer HTTP/2's preface with a bare page, as HTTP/0.9, or with nothing."""
    return said.startswith((b"HTTP/1.", b"<")) or not said


def _is_http2(said: bytes) -> bool:
    """Whether octets begin with a SETTINGS frame, as those of every HTTP/2 server do (RFC 9113 3.4)."""
    return len(said) >= 9 and said[3] == _SETTINGS_FRAME and not said.startswith(b"HTTP")
