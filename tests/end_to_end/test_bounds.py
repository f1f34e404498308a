"""What one client can make grow in the real gateway, while an honest client's mail goes on.

An attack runs in a process of its own, so that it takes no time from the client that is watched.
"""

import http.client
import multiprocessing
import re
import smtplib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from tests.end_to_end.conftest import StartGateway
from tests.end_to_end.messages import MIB
from tests.support.capture import CapturingUpstream
from tests.support.process import GatewayProcess

# Many times what a mail takes, and far below what people notice; an attack that is not bounded made mail wait for
# seconds.
P99_SECONDS: Final = 0.5
MAILS: Final = 100  # fewer tell nothing of a hundredth


class HonestClient:
    """Sends a mail again and again, and notes how long each takes; to be entered.

    Attributes:
        seconds: of each mail.
    """

    def __init__(self, port: int) -> None:
        self._port = port
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
            with smtplib.SMTP("127.0.0.1", self._port, timeout=30) as client:
                while not self._has_ended.wait(0.005):
                    began = time.monotonic()
                    client.sendmail("a@client.example", ["b@there.example"], b"Subject: x\r\n\r\nx\r\n")
                    self.seconds.append(time.monotonic() - began)
        except Exception as error:  # noqa: BLE001 - told by `p99`
            self._failure = error

    def p99(self) -> float:
        """Seconds within which 99 of 100 mails went through; every one did."""
        assert self._failure is None
        assert len(self.seconds) >= MAILS
        return sorted(self.seconds)[int(0.99 * (len(self.seconds) - 1))]


def attack(work: Callable[[int], None], port: int) -> None:
    """Run `work` with the port, as another process."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(port,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def opened(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), 30)
    connection.recv(1000)
    connection.sendall(b"EHLO client.example\r\nMAIL FROM:<>\r\nRCPT TO:<b@there.example>\r\n")
    return connection


def two_million_recipients(port: int) -> None:
    """In one transaction, without reading a reply; it ends with 421 long before."""
    connection = opened(port)
    with suppress(ConnectionError):
        for _ in range(200):
            connection.sendall(b"RCPT TO:<b@there.example>\r\n" * 10_000)
    tail = b""
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            tail = (tail + data)[-100:]
    assert b"421 4.7.0 Too many refused commands\r\n" in tail


def test_two_million_recipients_of_one_transaction(upstream: CapturingUpstream, start: StartGateway) -> None:
    running = start({"upstream.url": upstream.url, "log.level": "error"})
    with HonestClient(running.port) as honest:
        attack(two_million_recipients, running.port)  # once through, so that what is made at first use is made
        attack(tiny_chunks_unread, running.port)
        before = running.memory("VmRSS")
        while len(honest.seconds) < MAILS:
            attack(two_million_recipients, running.port)
    assert honest.p99() < P99_SECONDS
    assert running.memory("VmHWM") - before < 16 * MIB
    assert running.memory("VmRSS") - before < 8 * MIB


def tiny_chunks_unread(port: int) -> None:
    """Clients that send as many chunks as they can and read nothing."""
    connections = [opened(port) for _ in range(10)]
    ends = time.monotonic() + 3
    for connection in connections:
        connection.setblocking(False)
    while time.monotonic() < ends:
        for connection in connections:
            with suppress(OSError):
                connection.send(b"BDAT 1\r\nx" * 1000)
        time.sleep(0.001)


def test_clients_that_pipeline_and_never_read(upstream: CapturingUpstream, start: StartGateway) -> None:
    running = start({"upstream.url": upstream.url, "log.level": "error"})
    with HonestClient(running.port) as honest:
        attack(tiny_chunks_unread, running.port)
        before = running.memory("VmRSS")
        while len(honest.seconds) < MAILS:
            attack(tiny_chunks_unread, running.port)
    assert honest.p99() < P99_SECONDS
    # A stream holds a quarter of one MiB on each side.
    assert running.memory("VmHWM") - before < 16 * MIB


def status_address(running: GatewayProcess) -> tuple[str, int]:
    """Where the status port listens, as the ready line says."""
    found = re.search(r"http://([\d.]+):(\d+)", running.ready_line)
    assert found is not None, running.ready_line
    return found[1], int(found[2])


def probed(address: tuple[str, int], path: str, *, timeout_seconds: float = 1.0) -> int:
    """The status code of a probe, as Kubernetes makes one: on a connection of its own, within a second."""
    connection = http.client.HTTPConnection(*address, timeout=timeout_seconds)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def test_silent_connections_to_the_status_port_keep_no_probe_out(
    upstream: CapturingUpstream, start: StartGateway
) -> None:
    running = start({"upstream.url": upstream.url, "log.level": "error", "status.address": "127.0.0.1:0"})
    address = status_address(running)
    with ExitStack() as silent:
        for number in range(640):
            silent.enter_context(socket.create_connection(address, 10))
            if number % 32 == 31:
                assert [probed(address, path) for path in ("/livez", "/readyz")] == [200, 200]
        assert len(list(Path(f"/proc/{running.pid}/fd").iterdir())) < 100


def scrape(port: int) -> None:
    """Eight clients that read metrics and traces as fast as they can."""
    ends = time.monotonic() + 3

    def read() -> None:
        while time.monotonic() < ends:
            for path in ("/metrics", "/api/traces", "/api/connections"):
                with suppress(OSError):
                    probed(("127.0.0.1", port), path, timeout_seconds=30)

    with ThreadPoolExecutor(8) as threads:
        for reading in [threads.submit(read) for _ in range(8)]:
            reading.result()


def test_readers_of_the_status_port_do_not_slow_mail(upstream: CapturingUpstream, start: StartGateway) -> None:
    running = start({"upstream.url": upstream.url, "log.level": "error", "status.address": "127.0.0.1:0"})
    _, port = status_address(running)
    with HonestClient(running.port) as honest:
        while len(honest.seconds) < MAILS:
            attack(scrape, port)
            assert probed(("127.0.0.1", port), "/readyz") == 200
    assert honest.p99() < P99_SECONDS / 4
