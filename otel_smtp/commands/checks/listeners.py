"""Listeners and the status port: free addresses, or who answers there; whether strangers may relay."""

import asyncio
import errno
import os
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from otel_smtp.commands.asking import NoAnswer, running_gateway
from otel_smtp.commands.checks.certificates import check_certificate
from otel_smtp.commands.checks.connecting import connection, printable, reason
from otel_smtp.commands.checks.findings import TIMEOUT_SECONDS, Finding
from otel_smtp.config import ListenerTable, Settings
from otel_smtp.config.addresses import is_local, literal_address
from otel_smtp.gateway.ports import bind
from otel_smtp.observing import Endpoint
from otel_smtp.smtp.states import TlsMode

# RFC 2606 2: no such domain exists, should a server accept the recipient.
_STRANGER: Final = "relay-probe@otel-smtp.invalid"
_STATUS_SECONDS: Final = 2.0  # for a gateway on this machine to identify itself


async def check_listeners(settings: Settings) -> AsyncIterator[Finding]:
    """Check certificates, whether each address is free or who answers there, and whether strangers may relay."""
    for listener in settings.listener:
        if listener.tls is not TlsMode.OFF:
            yield check_certificate(listener)
        for address in listener.address:
            subject = f"listener {listener.name} {address}"
            finding = _try_to_bind(subject, address)
            if finding is not None:
                yield finding
                continue
            greeting = await _greeting(subject, listener, address)
            yield greeting
            if greeting.verdict == "ok" and not is_local(address) and listener.tls is not TlsMode.IMPLICIT:
                yield await _probe_relay(subject, listener, address)


def check_status(settings: Settings) -> Finding | None:
    """Check whether the status port is free, or a gateway answers there; None without one. A gateway runs without it if
    its default is taken."""
    address = settings.status.address
    if address is None:
        return None
    subject = f"status {address}"
    finding = _try_to_bind(subject, address, is_dual_stack=True) or _answering_status(subject, settings)
    if finding.verdict == "failed" and "status.address" not in settings.origins:
        return Finding("warning", subject, f"{finding.detail}; it is the default, so the gateway would run without it")
    return finding


def _answering_status(subject: str, settings: Settings) -> Finding:
    """Find out whether a gateway answers at a taken status port."""
    try:
        answer = running_gateway(settings, None).ask("livez", seconds=_STATUS_SECONDS)
        return Finding("ok", subject, f"a gateway answers, up for {float(answer['uptime_seconds']):.0f} s")
    except (NoAnswer, TypeError, KeyError, ValueError):  # or another server answers, in its own words
        return Finding("failed", subject, "is taken, and not by a gateway that answers")


def _try_to_bind(subject: str, address: Endpoint, *, is_dual_stack: bool = False) -> Finding | None:
    """Bind the address for a moment; None if it is taken."""
    if address.port is None:
        return _check_unix_path(subject, Path(address.host))
    try:
        bind(address, is_dual_stack=is_dual_stack).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        hint = " (ports below 1024 need CAP_NET_BIND_SERVICE)" if error.errno == errno.EACCES else ""
        return Finding("failed", subject, f"cannot be bound: {error.strerror}{hint}")
    return Finding("ok", subject, "is free")


def _check_unix_path(subject: str, path: Path) -> Finding | None:
    try:
        if path.exists():
            is_socket = stat.S_ISSOCK(path.stat().st_mode)
            return None if is_socket else Finding("failed", subject, "exists and is not a socket")
    except OSError as error:  # other users may not even list its directory
        return Finding("failed", subject, f"cannot be created: {error.strerror}")
    if not os.access(path.parent, os.W_OK):
        return Finding("failed", subject, f"cannot be created: {path.parent} does not exist or is not writable")
    return Finding("ok", subject, "is free")


async def _greeting(subject: str, listener: ListenerTable, address: Endpoint) -> Finding:
    """Find out which server answers at a taken address."""
    context = None
    if listener.tls is TlsMode.IMPLICIT:
        # The certificate has a check of its own; here only the greeting counts.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async with connection(_reachable(address), context) as (reader, writer):
                line = await reader.readline()
                writer.write(b"QUIT\r\n")
    except (OSError, TimeoutError, ValueError) as error:
        return Finding("failed", subject, f"is taken, and nobody answers: {reason(error)}")
    if not line.startswith(b"220"):
        return Finding("failed", subject, f"is taken by something other than an SMTP server: {printable(line)}")
    if b"otel_smtp" not in line:
        return Finding("failed", subject, f"is taken by another server: {printable(line)}")
    return Finding("ok", subject, f"a gateway answers: {printable(line)}")


async def _probe_relay(subject: str, listener: ListenerTable, address: Endpoint) -> Finding:
    """Ask a running gateway, from an address other than loopback, to relay to a stranger; no mail is sent."""
    target = address if not _is_unspecified(address) else Endpoint(_own_address(address), address.port)
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async with connection(target, None) as (reader, writer):
                own = str(writer.get_extra_info("sockname")[0])
                await _exchange(reader, writer, None)
                for command in ("EHLO relay-probe.invalid", "MAIL FROM:<>", f"RCPT TO:<{_STRANGER}>"):
                    code, reply = await _exchange(reader, writer, command)
                    if code >= 400:
                        break
                writer.write(b"QUIT\r\n")
    except (OSError, TimeoutError, ValueError) as error:
        return Finding("warning", subject, f"relaying could not be tried: {reason(error)}")
    if code >= 400:
        return Finding("ok", subject, f"does not relay for {own}: {reply}")
    source = literal_address(own)
    if source is not None and any(source in network for network in listener.allow):
        return Finding("ok", subject, f"relays for {own}, which is in allow")
    return Finding("failed", subject, f"OPEN RELAY: {own} is not in allow, and its recipient was accepted")


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, command: str | None) -> tuple[int, str]:
    if command is not None:
        writer.write(command.encode("ascii") + b"\r\n")
        await writer.drain()
    line = await reader.readline()
    while line[3:4] == b"-":
        line = await reader.readline()
    if not line[:3].isdigit():
        raise ConnectionError(f"no reply to {command}")
    return int(line[:3]), printable(line)


def _is_unspecified(address: Endpoint) -> bool:
    literal = literal_address(address.host)
    return literal is not None and literal.is_unspecified


def _reachable(address: Endpoint) -> Endpoint:
    """An address that reaches a listener on all addresses."""
    if not _is_unspecified(address):
        return address
    return Endpoint("::1" if ":" in address.host else "127.0.0.1", address.port)


def _own_address(address: Endpoint) -> str:
    """The address from which this machine talks to others. Nothing is sent (documentation networks, RFC 5737)."""
    is_v6 = ":" in address.host
    with socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("2001:db8::1", 9) if is_v6 else ("192.0.2.1", 9))
        return str(probe.getsockname()[0])
