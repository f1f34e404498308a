"""Why a connection or a handshake failed, in words for operators."""

import os
import socket
import ssl


def reason_of(error: OSError) -> str:
    """Why a connection failed or was lost, from `error`: one line of a few words.

    Resolver, kernel and TLS word the same failure differently; this gives one wording, without numbers and class names.
    """
    match error:
        case ssl.SSLCertVerificationError():
            return f"certificate verify failed: {error.verify_message}"
        case ssl.SSLError():
            # Only what OpenSSL itself raised has a reason.
            words = (getattr(error, "reason", None) or "handshake failed").lower().replace("_", " ")
            return f"TLS handshake failed: {words}"
        case socket.gaierror():
            return f"name resolution failed: {error.strerror or error}"
        case ConnectionRefusedError():
            return "connection refused"
        case ConnectionResetError() if error.errno is None and error.args:
            return str(error)  # our own words
        case ConnectionResetError():
            return "connection reset by the peer"
        case _ if error.errno is not None:
            return os.strerror(error.errno).lower()
        case _:
            return str(error) or type(error).__name__
