"""A short dialogue with a server, and words for its replies or for a failure."""

import asyncio
import contextlib
import os
import ssl
from collections.abc import AsyncIterator
from typing import Final

from otel_smtp.commands.checks.findings import TIMEOUT_SECONDS
from otel_smtp.observing import Endpoint
from otel_smtp.telemetry.redaction import clean

_LINE_OCTETS: Final = 64 * 1024
_SHOWN_CHARACTERS: Final = 80


@contextlib.asynccontextmanager
async def connection(
    address: Endpoint, context: ssl.SSLContext | None
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that is closed at the end.

    Args:
        context: for TLS from the start; None: in the clear.

    Raises:
        OSError: there is no connection; ssl.SSLError is one.
    """
    if address.port is None:
        reader, writer = await asyncio.open_unix_connection(address.host, limit=_LINE_OCTETS)
    else:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context, limit=_LINE_OCTETS)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def reason(error: BaseException) -> str:
    """Why a connection or a file failed, in words."""
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT_SECONDS:g} s"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {getattr(error, 'verify_message', None) or error.reason or error}"
    if isinstance(error, OSError) and error.strerror:
        # asyncio replaces the reason by the address; an unknown name has its own reason.
        return os.strerror(error.errno) if error.errno is not None and error.errno > 0 else error.strerror
    return str(error) or type(error).__name__


def printable(octets: bytes) -> str:
    """A server's text, safe for a terminal and bounded."""
    return clean(octets.decode("ascii", "replace").strip(), _SHOWN_CHARACTERS) or "nothing"
