"""Connections that we open: by TCP to the first address that answers, or to a unix socket."""

import asyncio
import errno
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain, zip_longest
from typing import Any, Final

from otel_smtp.net.stream import Stream

HAPPY_EYEBALLS_SECONDS: Final = 0.25  # RFC 8305 5: "Connection Attempt Delay"


async def connect(
    host: str,
    port: int,
    *,
    timeout_seconds: float,
    context: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
) -> Stream:
    """Connect by TCP to the first address of `host` that answers; under TLS if a `context` is given.

    Tries addresses in the resolver's order, families interleaved, and goes on to the next one when one fails or after
    `HAPPY_EYEBALLS_SECONDS` (RFC 8305). Implemented here because uvloop has no such option.

    Args:
        timeout_seconds: for name, connection and handshake together.
        server_hostname: the name that the certificate must have; `host` if None.

    Raises:
        OSError: the name has no address, or none of them accepts; ConnectionError among them.
        ssl.SSLError: the handshake failed.
        TimeoutError: all together took too long.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_seconds
    async with asyncio.timeout(timeout_seconds):
        connected = await _race(await _resolve(host, port))
        try:
            _, stream = await loop.create_connection(Stream, sock=connected)
        except BaseException:
            connected.close()
            raise
    if context is not None:
        await stream.start_tls(
            context,
            server_side=False,
            server_hostname=server_hostname or host,
            timeout_seconds=max(0.0, end - loop.time()),
        )
    return stream


async def connect_unix(path: str, *, timeout_seconds: float) -> Stream:
    """Connect to the unix socket at `path`.

    Raises:
        OSError: no connection; TimeoutError among them.
    """
    async with asyncio.timeout(timeout_seconds):
        _, stream = await asyncio.get_running_loop().create_unix_connection(Stream, path)
    return stream


_Address = tuple[socket.AddressFamily, Any]


async def _resolve(host: str, port: int) -> Sequence[_Address]:
    """The addresses of `host`, families interleaved, the resolver's favourite first (RFC 8305 4)."""
    with suppress(ValueError):  # a literal needs no resolver and no thread
        address = ipaddress.ip_address(host)
        if address.version == 4:
            return [(socket.AF_INET, (host, port))]
        if not getattr(address, "scope_id", None):
            return [(socket.AF_INET6, (host, port, 0, 0))]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    by_family: dict[socket.AddressFamily, list[_Address]] = {}
    for family, _, _, _, address_of_family in found:
        by_family.setdefault(family, []).append((family, address_of_family))
    return [address for address in chain.from_iterable(zip_longest(*by_family.values())) if address is not None]


async def _connect_socket(address: _Address) -> socket.socket:
    family, where = address
    connecting = socket.socket(family, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        _set_no_delay(connecting)
        await asyncio.get_running_loop().sock_connect(connecting, where)
    except BaseException:
        connecting.close()
        raise
    return connecting


async def _race(addresses: Sequence[_Address]) -> socket.socket:
    """The first of `addresses` that connects; other attempts under way are closed."""
    if len(addresses) == 1:
        return await _connect_socket(addresses[0])
    left = list(addresses)
    running: set[asyncio.Task[socket.socket]] = set()
    winner: socket.socket | None = None
    failures: list[OSError] = []
    try:
        while winner is None and (left or running):
            if left:
                running.add(asyncio.ensure_future(_connect_socket(left.pop(0))))
            done, running = await asyncio.wait(
                running, timeout=HAPPY_EYEBALLS_SECONDS if left else None, return_when=asyncio.FIRST_COMPLETED
            )
            for attempt in done:
                error = attempt.exception()
                if isinstance(error, OSError):
                    failures.append(error)
                elif error is not None:
                    raise error
                elif winner is None:
                    winner = attempt.result()
                else:
                    attempt.result().close()
    finally:
        for attempt in running:
            attempt.cancel()
            attempt.add_done_callback(_close_late)
    if winner is None:
        raise failures[0] if failures else OSError(errno.EADDRNOTAVAIL, "the name has no address")
    return winner


def _close_late(attempt: "asyncio.Task[socket.socket]") -> None:
    """Close the socket of an attempt that won after the race was over; retrieve its error, if any."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


def _set_no_delay(sock: socket.socket) -> None:
    """Switch Nagle's algorithm off: with the peer's delayed ACK it costs 40 ms per group of commands."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
