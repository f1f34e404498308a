"""Why a request to a collector failed, in words for operators: "connection refused", not "ConnectError".

The HTTP client wraps the errors of the operating system and of TLS in its own classes; the real error is at the end of
the chain of causes. gRPC writes sentences for its own developers; an operator needs a part of each.
"""

import os
import re
import socket
from collections.abc import Iterator
from typing import Final

from otel_smtp.telemetry.redaction import clean

# gRPC's sentences, as of 1.76: each with what an operator wants of it.
_GRPC_SENTENCES: Final = (
    ("TLS: ", re.compile(r"CERTIFICATE_VERIFY_FAILED(?:: ([^:]+))?")),
    ("TLS: ", re.compile(r"OPENSSL_internal:([A-Z_]+)")),
    ("name resolution: ", re.compile(r"address lookup failed for \S+: ([^\]]+)")),
    ("", re.compile(r"Failed to connect to remote host: (?:connect: )?([A-Z][a-z ]+)")),
    ("", re.compile(r"(?:recvmsg|sendmsg): ?([A-Z][a-z ]+)")),
)
_GRPC_LATE: Final = "Deadline Exceeded"


def no_answer_within(seconds: float) -> str:
    """The reason for a timeout of a request."""
    return f"no answer within {seconds:.3g} s"


def http_failure(error: BaseException, seconds: float) -> str:
    """Why an exchange over HTTP failed.

    Args:
        error: as the HTTP client raised it.
        seconds: timeout of the request.
    """
    import ssl

    for cause in _causes(error):
        match cause:
            case ssl.SSLCertVerificationError():
                return f"TLS: {cause.verify_message}"
            case ssl.SSLError():
                return f"TLS: {(cause.reason or str(cause)).lower().replace('_', ' ')}"
            case socket.gaierror():
                return f"name resolution: {(cause.strerror or str(cause)).lower()}"
            case TimeoutError():
                return no_answer_within(seconds)
            case OSError() if cause.errno:
                return os.strerror(cause.errno).lower()
    if "Timeout" in type(error).__name__:  # of the client's own, without an error of the system behind it
        return no_answer_within(seconds)
    return clean(str(error)) or type(error).__name__


def file_failure(error: OSError) -> str:
    """Why a certificate or a key cannot be used; the message of TLS names no file, and the system's does."""
    said = f"{error.strerror.lower()}: {error.filename}" if error.strerror and error.filename else str(error)
    return f"TLS files: {clean(said) or type(error).__name__}"


def grpc_failure(code: str, details: str | None, seconds: float) -> str:
    """Why a call over gRPC failed.

    Args:
        code: the name of its status.
        details: the sentence that came with it, the collector's or the library's own.
        seconds: timeout of the call.
    """
    if not details:
        return code
    if details == _GRPC_LATE:
        return no_answer_within(seconds)
    for subject, sentence in _GRPC_SENTENCES:
        if found := sentence.search(details):
            why = found[1] or "certificate verify failed"
            return subject + clean(why.replace("_", " ").strip().lower())
    return clean(f"{code}: {details}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, step by step."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
