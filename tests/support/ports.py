"""Ports for programs that must be told one and cannot take the kernel's choice."""

import itertools
import os
import socket
from pathlib import Path

# Linux's default, should /proc not tell: what lies below is never given to a socket that asks for any port.
_FIRST_EPHEMERAL = 32768
_LOWEST = 10_000


def _first_ephemeral() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _FIRST_EPHEMERAL


def _order() -> "itertools.cycle[int]":
    """All ports below the kernel's own choices, begun at another place by each process of tests."""
    highest = max(_first_ephemeral(), _LOWEST + 1000)
    ports = list(range(_LOWEST, highest))
    start = os.getpid() * 97 % len(ports)
    return itertools.cycle(ports[start:] + ports[:start])


_ports = _order()


def unclaimed_port() -> int:
    """A port of the loopback interface where nobody listens, and that no other test is given.

    A port that the kernel chose and that is closed again goes to whoever asks next, among them the connections of other
    tests; so it is chosen from those that the kernel keeps for people who name one.
    """
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("there is always a next port")
