"""Ports for programs that must be told one and cannot take the kernel's choice."""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

# Linux's default, should /proc not tell: what lies below is never given to a socket that asks for any port.
_FIRST_EPHEMERAL = 32768
_LOWEST = 10_000
_BLOCK = 64


def _first_ephemeral() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _FIRST_EPHEMERAL


def _claimed(claims: list[socket.socket]) -> Iterator[int]:
    """Ports below the kernel's own choices, block by block, of which none is another process's of any run of tests.

    An abstract socket's name says so: it is known wherever the loopback interface is the same, and goes with us.

    Args:
        claims: gets the sockets.
    """
    highest = max(_first_ephemeral(), _LOWEST + 1000)
    blocks = range(_LOWEST, highest - _BLOCK + 1, _BLOCK)
    start = os.getpid() * 97 % len(blocks)
    ours: list[int] = []
    for first in (*blocks[start:], *blocks[:start]):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0otel-smtp tests have ports {first} to {first + _BLOCK - 1}")
        except OSError:
            claim.close()
            continue
        claims.append(claim)
        ours += (block := range(first, first + _BLOCK))
        yield from block
    yield from itertools.cycle(ours)  # there is nothing left but what we had before


_claims: list[socket.socket] = []
_ports = _claimed(_claims)


def unclaimed_port() -> int:
    """A port of the loopback interface where nobody listens, and that no other test is given, of whatever run.

    A port that the kernel chose and that is closed again goes to the next that asks, among them the connections of
    other tests; so it is chosen from those that the kernel keeps for people who name one.
    """
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("there is always a next port")
