"""A client that sends mail while something else happens, and notes how long each takes."""

import contextlib
import math
import smtplib
import threading
import time


class HonestClient:
    """Sends a mail again and again; to be entered.

    Args:
        port: of a gateway on loopback.
        head: what is sent before the greeting: a PROXY header.
        mails_per_connection: then a new one.
        may_be_refused: for now, as by a queue that is full; else every mail must be accepted.

    Attributes:
        seconds: of each mail.
    """

    def __init__(
        self, port: int, *, head: bytes = b"", mails_per_connection: int = 1_000_000, may_be_refused: bool = False
    ) -> None:
        self._port = port
        self._head = head
        self._mails_per_connection = mails_per_connection
        self._may_be_refused = may_be_refused
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._send)
        self._failure: Exception | None = None
        self.seconds: list[float] = []

    def __enter__(self) -> "HonestClient":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._has_ended.set()
        self._thread.join()

    def _send(self) -> None:
        try:
            while not self._has_ended.is_set():
                self._send_some()
        except Exception as error:  # noqa: BLE001 - told by `p99`
            self._failure = error

    def _send_some(self) -> None:
        with _Client(self._head) as client:
            client.connect("127.0.0.1", self._port)
            for _ in range(self._mails_per_connection):
                if self._has_ended.wait(0.001):
                    break
                began = time.monotonic()
                with contextlib.suppress(*((smtplib.SMTPResponseException,) if self._may_be_refused else ())):
                    client.sendmail("a@client.example", ["b@there.example"], b"Subject: x\r\n\r\nx\r\n")
                self.seconds.append(time.monotonic() - began)

    def p99(self, *, least: int = 100) -> float:
        """Seconds within which 99 of 100 mails went through; every one did, and at least so many."""
        if self._failure is not None:
            raise AssertionError("the honest client's mail was not taken") from self._failure
        assert len(self.seconds) >= least
        return sorted(self.seconds)[math.ceil(0.99 * len(self.seconds)) - 1]


class _Client(smtplib.SMTP):
    def __init__(self, head: bytes) -> None:
        super().__init__(timeout=30)
        self._head_octets = head

    def getreply(self) -> tuple[int, bytes]:
        if self._head_octets and self.sock is not None:
            self.sock.sendall(self._head_octets)
            self._head_octets = b""
        return super().getreply()
