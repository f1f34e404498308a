"""Bounds on a whole exchange, for a blocking HTTP client whose timeouts are per read and per write.

A peer that sends one octet every nine seconds never hits a timeout of ten: a status line or a header can occupy a
thread forever. The waiting thread cannot end that. So a second thread shuts the connection down at the deadline; the
waiting one sees a lost connection.

A peer that floods us within its time costs more: endless interim answers, headers or chunks are parsed by a thread that
shares the interpreter with mail. So the octets and pieces read of an answer are bounded, whatever part of it the
library is reading.

The client reports its connection through the `trace` extension of httpx. The watch keeps a descriptor of its own for
it, as TLS detaches the first one.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

MAX_REPLY_OCTETS: Final = 64 * 1024  # head and body; a count and a line of text are a hundred octets
# An answer comes in two or three pieces; over a poor network, in one per segment of at least 536 octets.
MAX_REPLY_PIECES: Final = 256

_CONNECTED: Final = "connection.connect_tcp.complete"
_ENCRYPTED: Final = "connection.start_tls.complete"

_Read = Callable[[int, float | None], bytes]


class AnswerTooLong(OSError):
    """An answer exceeds the bounds on octets or pieces."""


class ExchangeBounds:
    """Shuts a connection down at an exchange's deadline, and ends an answer that is too long. For one exchange at a
    time.

    Its thread starts with the first exchange and sleeps until a deadline that it knows; exchanges that end in time cost
    a few assignments, and no wake-up.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._socket: socket.socket | None = None
        self._at = float("inf")  # of the exchange under way
        self._wakes_at = float("inf")
        self._has_passed = False
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._octets = self._pieces = 0  # of its answer, so far

    @property
    def has_passed(self) -> bool:
        """Whether the latest exchange was cut off."""
        return self._has_passed

    @contextlib.contextmanager
    def over_exchange(self, at: float) -> Iterator[None]:
        """Cut the exchange inside off at `at`, by the monotonic clock.

        Connections that are made meanwhile count, if their `trace` extension is `note`. Reading more of their answer
        than the bounds allow raises `AnswerTooLong`.
        """
        self._octets = self._pieces = 0
        with self._changed:
            self._has_passed = False
            self._at = at
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="otlp-deadline", daemon=True)
                self._thread.start()
            elif at < self._wakes_at:
                self._changed.notify()
        try:
            yield
        finally:
            self._at = float("inf")

    def note(self, event: str, information: Mapping[str, Any]) -> None:
        """The `trace` extension of a request: keep the connection that it makes."""
        if event not in (_CONNECTED, _ENCRYPTED):
            return
        stream = information["return_value"]
        if event == _CONNECTED:
            self._keep(stream.get_extra_info("socket"))
        read: _Read = stream.read
        stream.read = lambda most, timeout=None: self._noted(read(most, timeout))

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _keep(self, connected: socket.socket) -> None:
        own = socket.socket(fileno=os.dup(connected.fileno()))
        with self._changed:
            before, self._socket = self._socket, own
            if self._has_passed:
                _shut_down(own)
        if before is not None:
            before.close()

    def _noted(self, piece: bytes) -> bytes:
        self._octets += len(piece)
        self._pieces += 1
        if self._octets > MAX_REPLY_OCTETS or self._pieces > MAX_REPLY_PIECES:
            raise AnswerTooLong("answer without end")
        return piece

    def _watch(self) -> None:
        with self._changed:
            while not self._is_closed:
                at = self._at
                if at <= time.monotonic():
                    self._has_passed = True
                    self._at = at = float("inf")
                    if self._socket is not None:
                        _shut_down(self._socket)
                self._wakes_at = at
                self._changed.wait(None if at == float("inf") else max(0.0, at - time.monotonic()))


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it was closed by the peer
        connection.shutdown(socket.SHUT_RDWR)
