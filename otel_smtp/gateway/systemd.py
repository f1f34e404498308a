"""Notifying a service manager: systemd's protocol, one datagram per message (sd_notify(3)).

Without systemd there is no socket, and nothing is sent.
"""

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Final

logger: Final = logging.getLogger("otel_smtp.gateway.systemd")


class ServiceManager:
    """The service manager that started this process, if it wants to be notified.

    Args:
        address: the value of `NOTIFY_SOCKET`: a path, or "@" and an abstract name; None or "": no service manager.

    No method blocks or raises: mail goes on without the manager.
    """

    def __init__(self, address: str | None) -> None:
        self._address = address or ""

    def ready(self) -> None:
        """Notify that all listeners accept connections, and show it in `systemctl status`."""
        self._notify("READY=1", f"STATUS=relaying, pid {os.getpid()}")

    def through_reload(self, reload: Callable[[], object]) -> None:
        """Notify that settings are being read again, call `reload`, and notify that this is over."""
        self.reloading()
        reload()
        self.ready()

    def reloading(self) -> None:
        """Notify that settings are read again; `ready` says when that is over."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._notify("RELOADING=1", f"MONOTONIC_USEC={microseconds}", "STATUS=reading the settings")

    def stopping(self, grace_seconds: float) -> None:
        """Notify that the drain has begun; it takes up to `grace_seconds`."""
        self._notify(
            "STOPPING=1",
            "STATUS=draining: waiting for open transactions",
            f"EXTEND_TIMEOUT_USEC={round(grace_seconds * 1_000_000)}",
        )

    def _notify(self, *lines: str) -> None:
        if not self._address:
            return
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            logger.warning("service manager not notified", extra={"notification": lines[0], "error": str(error)})
