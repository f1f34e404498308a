"""The certificate of a listener: whether it can be used, its names, and when it expires."""

import contextlib
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, Final

from otel_smtp.commands.checks.findings import Finding, Verdict
from otel_smtp.config import ListenerTable

# Enough to order a new certificate by hand.
_EXPIRES_SOON: Final = timedelta(days=14)


def check_certificate(listener: ListenerTable) -> Finding:
    """Load a listener's certificate and read its dates, by a handshake in memory."""
    assert listener.tls_cert is not None
    assert listener.tls_key is not None
    subject = f"certificate {listener.tls_cert}"
    try:
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(listener.tls_cert, listener.tls_key)
        client = ssl.create_default_context(cafile=str(listener.tls_cert))
        client.check_hostname = False
        # Its issuer may be unknown here: only its own contents count.
        client.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN
        contents = _handshake(client, server)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or error.reason or str(error)
        return Finding("failed", subject, f"cannot be used: {reason}")
    except OSError as error:
        return Finding("failed", subject, f"cannot be read: {error.strerror}")
    names = ", ".join(name for _, name in contents["subjectAltName"]) if "subjectAltName" in contents else "no name"
    ends = parsedate_to_datetime(_rfc5322(str(contents["notAfter"])))
    left = ends - datetime.now(UTC)
    verdict: Verdict = "ok" if left > _EXPIRES_SOON else "warning"
    return Finding(verdict, subject, f"is for {names}, until {ends:%Y-%m-%d} ({left.days} days)")


def _rfc5322(openssl_date: str) -> str:
    """OpenSSL's "Jun  1 12:00:00 2030 GMT" in the order of RFC 5322."""
    month, day, clock, year, zone = openssl_date.split()
    return f"{day} {month} {year} {clock} {zone}"


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext) -> Mapping[str, Any]:
    """Shake hands in memory.

    Returns:
        The contents of the server's certificate, as `SSLSocket.getpeercert` has them.
    """
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
