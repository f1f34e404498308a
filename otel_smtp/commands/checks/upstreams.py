"""An upstream: connect, negotiate TLS, log in, as for a mail that is never begun."""

import asyncio
import ssl
from typing import Final

from otel_smtp.commands.checks.connecting import reason
from otel_smtp.commands.checks.findings import Finding
from otel_smtp.config.values import is_local, size_text
from otel_smtp.forwarding.faults import UpstreamFault
from otel_smtp.forwarding.settings import UpstreamSettings
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.observing import DeliveryObserver, DeliveryPhase, Endpoint, TlsInfo
from otel_smtp.smtp.client import Extensions
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import TlsMode

# A server may delay its greeting on purpose, against spam.
_TIMEOUT_SECONDS: Final = 15.0
_NOT_CONNECTED: Final = (None, DeliveryPhase.POOL)


class _Phases(DeliveryObserver):
    """Records how far a connection got."""

    def __init__(self) -> None:
        self.last: DeliveryPhase | None = None
        self.peer = ""
        self.tls: TlsInfo | None = None

    def phase(self, phase: DeliveryPhase, reply: Reply | None = None) -> None:
        self.last = phase

    def connected(self, peer: Endpoint, tls: TlsInfo | None) -> None:
        self.peer, self.tls = str(peer), tls


async def check_upstream(settings: UpstreamSettings, hostname: str) -> Finding:
    """Connect as for a mail, with TLS and AUTH, and report what the upstream offers."""
    where = str(settings.endpoint)
    subject = f"upstream {where}" if settings.name == where else f"upstream {settings.name} {where}"
    phases = _Phases()
    try:
        smarthost = Smarthost(settings, hostname)
    except OSError as error:
        return Finding("failed", subject, f"its TLS files cannot be used: {reason(error)}")
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            connection, _ = await smarthost.acquire(phases)
            smarthost.release(connection, answered=True)
            smarthost.close()
            await connection.stream.wait_closed()
    except TimeoutError:
        return Finding("failed", subject, f"no answer within {_TIMEOUT_SECONDS:g} s, {_after(phases)}")
    except UpstreamFault as fault:
        said = f": {fault.upstream_reply}" if fault.upstream_reply is not None else ""
        cause = fault.__cause__
        is_plain = isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError)
        failure = (
            f"no connection: {reason(cause)}"
            if cause is not None and is_plain and phases.last in _NOT_CONNECTED
            else str(fault)
        )
        return Finding("failed", subject, f"{failure}{said}, {_after(phases)}{_hint(fault)}")
    finally:
        smarthost.close()
    words = [f"answers at {phases.peer}" if phases.peer != str(settings.endpoint) else "answers"]
    words.append(f"TLS {phases.tls.version}, verified" if phases.tls is not None else "no TLS")
    if settings.credentials is not None:
        words.append(f"logged in as {settings.credentials.username}")
    words.append(f"offers {_offered(connection.extensions)}")
    is_naked = settings.tls is TlsMode.OFF and not is_local(settings.endpoint)
    return Finding("warning" if is_naked else "ok", subject, "; ".join(words))


def _hint(fault: UpstreamFault) -> str:
    """What an obscure TLS error usually means."""
    if "WRONG_VERSION_NUMBER" in str(fault):
        return "; this port does not start with TLS; perhaps smtp+starttls:// is meant"
    if "unable to get local issuer" in str(fault) or "self-signed" in str(fault):
        return "; set ca_file to its authority"
    return ""


def _after(phases: _Phases) -> str:
    return f"after {phases.last}" if phases.last not in _NOT_CONNECTED else "before a connection"


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
