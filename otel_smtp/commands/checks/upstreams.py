"""An upstream: connect, negotiate TLS, log in, as for a mail, but without sending one."""

import asyncio
import ssl
from collections.abc import Sequence
from typing import Final

from otel_smtp.commands.checks.connecting import reason
from otel_smtp.commands.checks.findings import Finding
from otel_smtp.config.addresses import is_local
from otel_smtp.config.values import size_text
from otel_smtp.forwarding.faults import UpstreamFault
from otel_smtp.forwarding.settings import UpstreamSettings
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.net import Sweep
from otel_smtp.observing import DeliveryPhase
from otel_smtp.smtp.extensions import Extensions, keyword_lines
from otel_smtp.smtp.states import TlsMode

# A server may delay its greeting on purpose, against spam.
_TIMEOUT_SECONDS: Final = 15.0


async def check_upstream(settings: UpstreamSettings, hostname: str) -> Finding:
    """Connect as for a mail, with TLS and AUTH, and report what the upstream offers."""
    where = str(settings.endpoint)
    subject = f"upstream {where}" if settings.name == where else f"upstream {settings.name} {where}"
    phases: list[DeliveryPhase] = []
    try:
        smarthost = Smarthost(settings, hostname, Sweep())
    except OSError as error:
        return Finding("failed", subject, f"its TLS files cannot be used: {reason(error)}")
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            connection = await smarthost.connect(lambda phase, reply: phases.append(phase))
            stream = connection.stream
            peer, tls = str(stream.peer), stream.tls
            smarthost.release(connection, answered=True)
            smarthost.close()
            await stream.wait_closed()
    except TimeoutError:
        return Finding("failed", subject, f"no answer within {_TIMEOUT_SECONDS:g} s{_after(phases)}")
    except UpstreamFault as fault:
        said = f": {fault.upstream_reply}" if fault.upstream_reply is not None else ""
        cause = fault.__cause__
        is_plain = isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError)
        failure = (
            f"no connection: {reason(cause)}" if cause is not None and is_plain and not _got_far(phases) else str(fault)
        )
        return Finding("failed", subject, f"{failure}{said}{_after(phases)}{_hint(fault)}")
    finally:
        smarthost.close()
    words = [f"answers at {peer}" if peer != str(settings.endpoint) else "answers"]
    words.append(f"TLS {tls.version}, verified" if tls is not None else "no TLS")
    if settings.credentials is not None:
        words.append(f"logged in as {settings.credentials.username}")
    words.append(f"offers {_offered(connection.extensions)}")
    is_naked = settings.tls is TlsMode.OFF and not is_local(settings.endpoint)
    return Finding("warning" if is_naked else "ok", subject, "; ".join(words))


def _hint(fault: UpstreamFault) -> str:
    """The usual meaning of an obscure TLS error."""
    if "wrong version number" in str(fault):
        return "; this port does not start with TLS; perhaps smtp+starttls:// is meant"
    if "unable to get local issuer" in str(fault) or "self-signed" in str(fault):
        return "; set ca_file to its authority"
    return ""


def _after(phases: Sequence[DeliveryPhase]) -> str:
    return f", after {phases[-1]}" if _got_far(phases) else ""


def _got_far(phases: Sequence[DeliveryPhase]) -> bool:
    """Whether there was a connection."""
    return any(phase is not DeliveryPhase.POOL for phase in phases)


def _offered(extensions: Extensions) -> str:
    size = f"SIZE {size_text(extensions.size)}" if extensions.size else "SIZE"
    lines = keyword_lines(extensions)
    return ", ".join(size if line.startswith("SIZE ") else line for line in lines) or "nothing beyond SMTP"
