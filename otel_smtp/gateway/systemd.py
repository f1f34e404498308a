"""Telling a service manager how it goes: systemd's notification protocol, one datagram a message (sd_notify(3)).

Whoever runs without systemd has no socket to tell, and nothing happens.
"""

import logging
import socket
import time
from typing import Final

logger: Final = logging.getLogger("otel_smtp.gateway.systemd")


class ServiceManager:
    """The manager that started this process, if it is one that listens.

    Args:
        address: what `NOTIFY_SOCKET` held: a path, or "@" and an abstract name; None or "" where nobody listens.

    No method blocks or raises: a manager that cannot be told is not a reason to stop mail.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address or ""

    def ready(self, status: str) -> None:
        """All listeners accept connections; `status` is a line for `systemctl status`."""
        self._tell("READY=1", f"STATUS={_one_line(status)}", f"MONOTONIC_USEC={_monotonic_microseconds()}")

    def reloading(self) -> None:
        """Certificates are being read again; tell `ready` when they are."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={_monotonic_microseconds()}")

    def stopping(self, grace_seconds: float) -> None:
        """The drain has begun; it takes up to `grace_seconds`."""
        self._tell(
            "STOPPING=1",
            "STATUS=draining: open transactions are brought to their end",
            f"EXTEND_TIMEOUT_USEC={round(grace_seconds * 1_000_000)}",
        )

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            logger.warning("service manager not told", extra={"what": lines[0], "error": str(error)})


def _monotonic_microseconds() -> int:
    # systemd pairs RELOADING with the READY that follows by this clock.
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def _one_line(text: str) -> str:
    return " ".join(text.split())
