"""TLS towards clients: one context for each listener."""

import logging
import ssl
import stat
from pathlib import Path
from typing import Final, NoReturn

from otel_smtp.net import require_modern_tls

logger: Final = logging.getLogger("otel_smtp.server.tls")


class CertificateError(Exception):
    """A certificate or its key cannot be used; names the files and says what is wrong."""


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """Make the TLS context of a listener.

    Each listener has its own: a context encrypts session tickets with its own keys, so a session from one listener
    cannot be resumed on another with a different policy.

    Args:
        certificate: PEM file with the certificate and the chain up to the authority, the certificate first.
        key: PEM file with its private key, without a passphrase.

    Raises:
        CertificateError: they cannot be read, or do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    require_modern_tls(context)
    # Renegotiation would let a client cause endless handshakes on one connection; TLS 1.3 has none, and 1.2 needs none.
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        if key.stat().st_mode & stat.S_IROTH:
            logger.warning("private key readable by every user", extra={"key": str(key)})
        context.load_cert_chain(certificate, key, password=_refuse_passphrase)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise CertificateError(f"cannot use certificate {str(certificate)!r} with key {str(key)!r}: {error}") from error
    return context


def _refuse_passphrase() -> NoReturn:
    # Without this OpenSSL would prompt on the terminal and block the whole process.
    raise ValueError("the key is protected by a passphrase")
