"""What `check --connect` tries: listeners, upstreams and the collector, without sending mail.

Each trial has a bound of seconds and ends in findings, never in an exception: what is wrong in one place must not hide
what is wrong in another.
"""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple
from urllib.parse import urlsplit

from otel_smtp.config import Listener, Settings
from otel_smtp.config.values import is_local, literal_address, size_text
from otel_smtp.forwarding.faults import UpstreamFault
from otel_smtp.forwarding.settings import UpstreamSettings
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.observing import DeliveryObserver, DeliveryPhase, Endpoint, TlsInfo
from otel_smtp.smtp.client import Extensions
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import TlsMode
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.messages import SpoolError

Verdict = Literal["ok", "warning", "failed"]

# People wait for the answer.
PATIENCE_SECONDS: Final = 5.0
# A greeting may be held back on purpose, against spam.
UPSTREAM_PATIENCE_SECONDS: Final = 15.0
# Enough to order a new certificate by hand.
_EXPIRES_SOON: Final = timedelta(days=14)
# RFC 2606 2: nobody is reached there, should a server take the recipient.
_STRANGER: Final = "relay-probe@otel-smtp.invalid"
_LONGEST_LINE_OCTETS: Final = 64 * 1024


class Finding(NamedTuple):
    """What one trial found."""

    verdict: Verdict
    subject: str
    detail: str


# Listeners -----------------------------------------------------------------------------------------------------


async def check_listeners(settings: Settings) -> AsyncIterator[Finding]:
    """Whether each address can be bound, or who answers there; certificates; whether strangers are refused."""
    for listener in settings.listener:
        if listener.tls is not TlsMode.OFF:
            yield check_certificate(listener)
        for address in listener.address:
            subject = f"listener {listener.name} {address}"
            finding = _bind(subject, address)
            if finding is not None:
                yield finding
                continue
            greeting = await _greeting(subject, listener, address)
            yield greeting
            if greeting.verdict == "ok" and not is_local(address) and listener.tls is not TlsMode.IMPLICIT:
                yield await _probe_relay(subject, listener, address)


def check_status(settings: Settings) -> Finding | None:
    """Whether the status port can be had; None where none is wanted. The default does without one that is taken."""
    address = settings.status.address
    if address is None:
        return None
    subject = f"status {address}"
    finding = _bind(subject, address) or Finding("failed", subject, "is taken")
    if finding.verdict == "failed" and "status.address" not in settings.origins:
        return Finding("warning", subject, f"{finding.detail}; it is a default, so the gateway would run")
    return finding


def check_spool(settings: Settings) -> Finding | None:
    """Whether the spool's directory could be had; None where no mode needs one."""
    directory = settings.spool.directory
    if settings.delivery.mode == "direct" or directory is None:
        return None
    subject = f"spool {directory}"
    spool = SpoolDirectory(directory)
    try:
        owner = spool.try_out()
        octets, _ = SpoolDirectory(next(path for path in (directory, *directory.parents) if path.is_dir())).room()
    except (SpoolError, OSError) as error:
        return Finding("failed", subject, str(error))
    if owner is not None:
        return Finding("ok", subject, f"a gateway owns it: {owner}")
    needed = settings.limits.message_size * 3 // 2
    if octets < needed:
        return Finding("failed", subject, f"has {octets >> 20} MiB free; below {needed >> 20} MiB no mail is taken")
    return Finding("ok", subject, f"can be had, {octets >> 20} MiB free")


def _bind(subject: str, address: Endpoint) -> Finding | None:
    """Try to take the address; None where somebody has it."""
    if address.port is None:
        return _unix_place(subject, Path(address.host))
    try:
        (family, _, _, _, name), *_ = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(name)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        hint = " (ports below 1024 need CAP_NET_BIND_SERVICE)" if error.errno == errno.EACCES else ""
        return Finding("failed", subject, f"cannot be bound: {error.strerror}{hint}")
    return Finding("ok", subject, "is free")


def _unix_place(subject: str, path: Path) -> Finding | None:
    if path.exists():
        is_socket = stat.S_ISSOCK(path.stat().st_mode)
        return None if is_socket else Finding("failed", subject, "is there, and is no socket")
    if not os.access(path.parent, os.W_OK):
        return Finding("failed", subject, f"cannot be made: {path.parent} is not there or cannot be written")
    return Finding("ok", subject, "is free")


async def _greeting(subject: str, listener: Listener, address: Endpoint) -> Finding:
    """Who answers at an address that is taken."""
    context = None
    if listener.tls is TlsMode.IMPLICIT:
        # Whether the name fits is told of the certificate itself; here only who answers is asked.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            async with _connection(_reachable(address), context) as (reader, writer):
                line = await reader.readline()
                writer.write(b"QUIT\r\n")
    except (OSError, TimeoutError, ValueError) as error:
        return Finding("failed", subject, f"is taken, and nobody answers: {_why(error)}")
    if not line.startswith(b"220"):
        return Finding("failed", subject, f"is taken by something that is no SMTP server: {_shown(line)}")
    if b"otel_smtp" not in line:
        return Finding("failed", subject, f"is taken by another server: {_shown(line)}")
    return Finding("ok", subject, f"a gateway answers: {_shown(line)}")


async def _probe_relay(subject: str, listener: Listener, address: Endpoint) -> Finding:
    """Ask a running gateway, from an address that is not loopback, to relay to a stranger; no mail is sent."""
    target = address if not _is_everywhere(address) else Endpoint(_own_address(address), address.port)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            async with _connection(target, None) as (reader, writer):
                own = str(writer.get_extra_info("sockname")[0])
                await _exchange(reader, writer, None)
                for command in ("EHLO relay-probe.invalid", "MAIL FROM:<>", f"RCPT TO:<{_STRANGER}>"):
                    code, reply = await _exchange(reader, writer, command)
                    if code >= 400:
                        break
                writer.write(b"QUIT\r\n")
    except (OSError, TimeoutError, ValueError) as error:
        return Finding("warning", subject, f"could not be asked to relay: {_why(error)}")
    if code >= 400:
        return Finding("ok", subject, f"does not relay for {own}: {reply}")
    source = literal_address(own)
    if source is not None and any(source in network for network in listener.allow):
        return Finding("ok", subject, f"relays for {own}, which is in allow")
    return Finding("failed", subject, f"RELAYS FOR ANYBODY: {own} is not in allow, and its recipient was taken")


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str | None) -> tuple[int, str]:
    if command is not None:
        writer.write(command.encode("ascii") + b"\r\n")
        await writer.drain()
    line = await reader.readline()
    while line[3:4] == b"-":
        line = await reader.readline()
    if not line[:3].isdigit():
        raise ConnectionError(f"no reply to {command}")
    return int(line[:3]), _shown(line)


def check_certificate(listener: Listener) -> Finding:
    """Load a listener's certificate and look at its dates, by a handshake with ourselves."""
    assert listener.tls_cert is not None
    assert listener.tls_key is not None
    subject = f"certificate {listener.tls_cert}"
    try:
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(listener.tls_cert, listener.tls_key)
        client = ssl.create_default_context(cafile=str(listener.tls_cert))
        client.check_hostname = False
        # Its own issuer need not be known: what is asked is what it says of itself.
        client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        told = _handshake(client, server)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or error.reason or str(error)
        return Finding("failed", subject, f"cannot be used: {reason}")
    except OSError as error:
        return Finding("failed", subject, f"cannot be read: {error.strerror}")
    names = ", ".join(name for _, name in told["subjectAltName"]) if "subjectAltName" in told else "no name"
    ends = parsedate_to_datetime(_rfc5322(str(told["notAfter"])))
    left = ends - datetime.now(UTC)
    verdict: Verdict = "ok" if left > _EXPIRES_SOON else "warning"
    return Finding(verdict, subject, f"is for {names}, until {ends:%Y-%m-%d} ({left.days} days)")


def _rfc5322(openssl_date: str) -> str:
    """OpenSSL's "Jun  1 12:00:00 2030 GMT" in the order of RFC 5322."""
    month, day, clock, year, zone = openssl_date.split()
    return f"{day} {month} {year} {clock} {zone}"


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> Mapping[str, Any]:
    """Shake hands in memory; what the server's certificate says."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server)
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(10):
        with contextlib.suppress(ssl.SSLWantReadError):
            ours.do_handshake()
            break
        with contextlib.suppress(ssl.SSLWantReadError):
            theirs.do_handshake()
    return ours.getpeercert() or {}


def _is_everywhere(address: Endpoint) -> bool:
    literal = literal_address(address.host)
    return literal is not None and literal.is_unspecified


def _reachable(address: Endpoint) -> Endpoint:
    """Where to reach a listener that listens everywhere."""
    if not _is_everywhere(address):
        return address
    return Endpoint("::1" if ":" in address.host else "127.0.0.1", address.port)


def _own_address(address: Endpoint) -> str:
    """The address by which this machine talks to others; asking sends nothing (documentation networks, RFC 5737)."""
    is_v6 = ":" in address.host
    with socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("2001:db8::1", 9) if is_v6 else ("192.0.2.1", 9))
        return str(probe.getsockname()[0])


@contextlib.asynccontextmanager
async def _connection(
    address: Endpoint, context: ssl.SSLContext | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is gone afterwards."""
    if address.port is None:
        reader, writer = await asyncio.open_unix_connection(address.host, limit=_LONGEST_LINE_OCTETS)
    else:
        reader, writer = await asyncio.open_connection(
            address.host, address.port, ssl=context, limit=_LONGEST_LINE_OCTETS
        )
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


# Upstreams -----------------------------------------------------------------------------------------------------


_NOT_CONNECTED: Final = (None, DeliveryPhase.POOL)


class _Phases(DeliveryObserver):
    """Remembers how far a connection came."""

    def __init__(self) -> None:
        self.last: DeliveryPhase | None = None
        self.peer = ""
        self.tls: TlsInfo | None = None

    def phase(self, phase: DeliveryPhase, reply: Reply | None = None) -> None:
        self.last = phase

    def connected(self, peer: Endpoint, tls: TlsInfo | None) -> None:
        self.peer, self.tls = str(peer), tls


async def check_upstream(settings: UpstreamSettings, hostname: str) -> Finding:
    """Connect as for a mail, with TLS and AUTH, and tell what the upstream offers; no mail is begun."""
    where = str(settings.endpoint)
    subject = f"upstream {where}" if settings.name == where else f"upstream {settings.name} {where}"
    seen = _Phases()
    try:
        smarthost = Smarthost(settings, hostname)
    except OSError as error:
        return Finding("failed", subject, f"its TLS files cannot be used: {_why(error)}")
    try:
        async with asyncio.timeout(UPSTREAM_PATIENCE_SECONDS):
            connection, _ = await smarthost.acquire(seen)
            smarthost.release(connection, answered=True)
            smarthost.close()
            await connection.stream.wait_closed()
    except TimeoutError:
        return Finding("failed", subject, f"no answer within {UPSTREAM_PATIENCE_SECONDS:g} s, {_after(seen)}")
    except UpstreamFault as fault:
        said = f": {fault.upstream_reply}" if fault.upstream_reply is not None else ""
        cause = fault.__cause__
        is_plain = isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError)
        what = (
            f"no connection: {_why(cause)}"
            if cause is not None and is_plain and seen.last in _NOT_CONNECTED
            else str(fault)
        )
        return Finding("failed", subject, f"{what}{said}, {_after(seen)}{_hint(fault)}")
    finally:
        smarthost.close()
    words = [f"answers at {seen.peer}" if seen.peer != str(settings.endpoint) else "answers"]
    words.append(f"TLS {seen.tls.version}, verified" if seen.tls is not None else "no TLS")
    if settings.credentials is not None:
        words.append(f"logged in as {settings.credentials.username}")
    words.append(f"offers {_offered(connection.extensions)}")
    is_naked = settings.tls is TlsMode.OFF and not is_local(settings.endpoint)
    return Finding("warning" if is_naked else "ok", subject, "; ".join(words))


def _hint(fault: UpstreamFault) -> str:
    """What an error of TLS that nobody remembers usually means."""
    if "WRONG_VERSION_NUMBER" in str(fault):
        return "; this port does not begin with TLS: is smtp+starttls:// meant?"
    if "unable to get local issuer" in str(fault) or "self-signed" in str(fault):
        return "; name its authority by ca_file"
    return ""


def _after(seen: _Phases) -> str:
    return f"after {seen.last}" if seen.last not in _NOT_CONNECTED else "before a connection"


def _offered(extensions: Extensions) -> str:
    names = {
        "PIPELINING": extensions.pipelining,
        "8BITMIME": extensions.eight_bit_mime,
        "SMTPUTF8": extensions.smtputf8,
        "CHUNKING": extensions.chunking,
        "DSN": extensions.dsn,
        "REQUIRETLS": extensions.require_tls,
    }
    words = [name for name, is_offered in names.items() if is_offered]
    if extensions.size is not None:
        words.append(f"SIZE {size_text(extensions.size)}")
    return ", ".join(words) or "nothing beyond SMTP"


# The collector -------------------------------------------------------------------------------------------------

# RFC 9113 3.4: what an HTTP/2 client says first, and an empty SETTINGS frame behind it.
_HTTP2_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_SETTINGS_FRAME: Final = 4


class _Target(NamedTuple):
    """Where traces are sent: what OTEL_EXPORTER_OTLP_* say."""

    url: str
    protocol: str  # "http/protobuf" or "grpc"


def collector(environ: Mapping[str, str]) -> _Target | None:
    """Where traces would go by OTLP; None where nowhere."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    own, general = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"), environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    exporters = environ.get("OTEL_TRACES_EXPORTER", "").strip() or ("otlp" if own or general else "none")
    if "otlp" not in exporters.split(","):
        return None
    protocol = (
        environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
        or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "http/protobuf"
    )
    if protocol == "grpc":
        return _Target(own or general or "http://localhost:4317", protocol)
    # The general endpoint is a base; the signal's own is used as it stands (OTLP exporter specification).
    return _Target(own or f"{(general or 'http://localhost:4318').rstrip('/')}/v1/traces", protocol)


async def check_collector(environ: Mapping[str, str]) -> Finding:
    """Whether the collector is there and speaks what it will be spoken to in; an empty batch is sent, no span."""
    target = collector(environ)
    if target is None:
        return Finding("ok", "collector", "none is set: traces are not exported")
    subject = f"collector {target.protocol} {target.url}"
    parts = urlsplit(target.url if "://" in target.url else f"http://{target.url}")
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        return Finding("failed", subject, str(error))
    context = None
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=environ.get("OTEL_EXPORTER_OTLP_CERTIFICATE") or None)
        context.set_alpn_protocols(["h2"] if target.protocol == "grpc" else ["http/1.1"])
    where = Endpoint(parts.hostname or "", port)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            async with _connection(where, context) as (reader, writer):
                if target.protocol == "grpc":
                    return await _ask_grpc(subject, reader, writer)
                return await _ask_http(subject, reader, writer, parts.path or "/", parts.netloc)
    except (OSError, TimeoutError, ValueError) as error:
        return Finding("failed", subject, f"cannot be reached: {_why(error)}")


async def _ask_http(
    subject: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, host: str
) -> Finding:
    writer.write(
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/x-protobuf\r\n"
        f"Content-Length: 0\r\nConnection: close\r\n\r\n".encode("ascii")
    )
    await writer.drain()
    answer = await reader.read(64)
    if not answer.startswith(b"HTTP/1."):
        if _is_http2(answer) or not answer:
            return Finding(
                "failed", subject,
                "this port does not speak HTTP/1.1, so it is probably for gRPC: "
                "set OTEL_EXPORTER_OTLP_PROTOCOL=grpc, or use the port for http/protobuf (usually 4318)",
            )  # fmt: skip
        return Finding("failed", subject, f"this is no OTLP collector: {_shown(answer)}")
    status = int(answer[9:12]) if answer[9:12].isdigit() else 0
    if status == 404:
        return Finding("failed", subject, f"there is nothing at {path} (404): is the path right?")
    if status in (401, 403):
        return Finding(
            "warning", subject, f"answers {status}: OTEL_EXPORTER_OTLP_HEADERS, which was not sent, may help"
        )
    if status >= 400:
        status_line, _, _ = answer.partition(b"\r\n")
        return Finding("failed", subject, f"answers {_shown(status_line)}")
    return Finding("ok", subject, "takes traces")


async def _ask_grpc(subject: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Finding:
    writer.write(_HTTP2_PREFACE)
    await writer.drain()
    answer = await reader.read(64)
    if _is_http2(answer):
        return Finding("ok", subject, "speaks HTTP/2, as gRPC does")
    # Some answer the preface, which is no HTTP/1 request to them, with a page alone, as to HTTP/0.9.
    if answer.startswith((b"HTTP/1.", b"<")) or not answer:
        return Finding(
            "failed", subject,
            "this port does not speak HTTP/2, so it is probably for http/protobuf: "
            "set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, or use the port for gRPC (usually 4317)",
        )  # fmt: skip
    return Finding("failed", subject, f"this is no OTLP collector: {_shown(answer)}")


def _is_http2(answer: bytes) -> bool:
    """Whether it begins with a SETTINGS frame, as every HTTP/2 server's octets do (RFC 9113 3.4)."""
    return len(answer) >= 9 and answer[3] == _SETTINGS_FRAME and not answer.startswith(b"HTTP")


# Words ---------------------------------------------------------------------------------------------------------


def _why(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {PATIENCE_SECONDS:g} s"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'verify_message', None) or error.reason or error}"
    if isinstance(error, OSError) and error.strerror:
        # asyncio puts the address in place of the reason; names that are not found have reasons of their own.
        return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
    return str(error) or type(error).__name__


def _shown(octets: bytes) -> str:
    """What somebody answered, safe for a terminal."""
    text = octets.decode("ascii", "replace").strip()[:80]
    return "".join(char if char.isprintable() else "?" for char in text) or "nothing"
