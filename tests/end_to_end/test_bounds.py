"""What one client can make grow in the real gateway, while an honest client's mail goes on.

An attack runs in a process of its own, so that it takes no time from the client that is watched.
"""

import http.client
import multiprocessing
import re
import selectors
import smtplib
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

import pytest

from otel_smtp.server.places import RIPE_SECONDS
from otel_smtp.smtp.replies import ErrorType, Reply
from tests.end_to_end.conftest import Client, StartGateway
from tests.end_to_end.messages import MIB
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript
from tests.support.ports import unclaimed_port
from tests.support.process import GatewayProcess, until

# Many times what a mail takes, and far below what people notice; an attack that is not bounded made mail wait for
# seconds.
P99_SECONDS: Final = 1.5
# What deploy/ gives a container.
LEAST_MEMORY: Final = 384 * MIB
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
                while not self._has_ended.wait(0.001):
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
    # It has been closed: that it was told why may be lost, since it has not read. `recipients` below has.
    with suppress(ConnectionError):
        while connection.recv(65536):
            pass


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
    # As many as leave one of the connections that are opened to an upstream at first.
    connections = [opened(port) for _ in range(4)]
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


def says(port: int, *pieces: bytes, then: bytes = b"") -> bytes:
    """The last octets that the gateway says to a client that sends `pieces` without reading, as far as it is let."""
    connection = socket.create_connection(("127.0.0.1", port), 30)
    assert connection.recv(1000).startswith(b"220 ")
    with suppress(ConnectionError):
        for piece in pieces:
            connection.sendall(piece)
        connection.shutdown(socket.SHUT_WR)
    tail = b""
    with suppress(ConnectionError):
        while data := connection.recv(65536):
            tail = (tail + data)[-2000:]
    connection.close()
    return tail


OPEN: Final = b"EHLO client.example\r\nMAIL FROM:<>\r\nRCPT TO:<b@there.example>\r\n"
LINE: Final = b"x" * 1022 + b"\r\n"


def command_lines(port: int) -> None:
    assert b"500 5.5.2" in says(port, b"EHLO c\r\n", b"NOOP " + b"x" * 20_480 + b"\r\n")
    assert b"421 4.5.2" in says(port, b"EHLO c\r\n", b"NOOP ", *[b"x" * MIB] * 10)


def own_faults(port: int) -> None:
    assert b"421 4.7.0 Too many errors" in says(port, b"EHLO c\r\n" + b"FROBNICATE\r\n" * 100)


def junk_commands(port: int) -> None:
    assert b"421 4.7.0 Too many commands" in says(port, b"NOOP\r\n" * 1000)
    assert b"421 4.7.0 Too many commands" in says(port, OPEN + b"BDAT 0\r\n" * 1000)


def recipients(port: int) -> None:
    assert b"421 4.7.0 Too many refused" in says(port, OPEN + b"RCPT TO:<b@there.example>\r\n" * 10_000)


def text_lines(port: int) -> None:
    assert b"554 5.6.0" in says(port, OPEN + b"DATA\r\n", b"\r\n" + b"x" * 655_350 + b"\r\n.\r\n")


def header_blocks(port: int) -> None:
    assert b"554 5.6.0" in says(port, OPEN + b"DATA\r\n", *[b"X: " + LINE] * 5_120, b"\r\n.\r\n")
    assert b"554 5.6.0" in says(port, OPEN + b"DATA\r\n", b"X: y\r\n" * 100_000, b"\r\n.\r\n")


def received_fields(port: int) -> None:
    assert b"554 5.4.6" in says(port, OPEN + b"DATA\r\n", b"Received: from x by y; now\r\n" * 1_000, b"\r\n.\r\n")


def large_messages(port: int) -> None:
    # Of ten times the limit, the connection is ended at twice the limit.
    said = says(port, OPEN + b"DATA\r\n", *[LINE * 1024] * 250, b".\r\n")
    assert b"552 5.3.4" in said or b"354 " in said  # the end may overtake its own words, as TCP's reset does


def connections(port: int) -> None:
    with ExitStack() as held:
        for _ in range(10 * 64):
            connection = held.enter_context(socket.create_connection(("127.0.0.1", port), 10))
            with suppress(ConnectionError):
                connection.recv(100)


@pytest.mark.parametrize(
    "beyond",
    [
        command_lines, own_faults, junk_commands, recipients, text_lines, header_blocks, received_fields,
        large_messages, connections,
    ],
)  # fmt: skip
def test_ten_times_a_bound(
    beyond: Callable[[int], None], upstream: CapturingUpstream, start: StartGateway, tmp_path: Path
) -> None:
    running = start({"upstream.url": upstream.url, "log.level": "error", "limits.connections": 64}, file_limit=1024)
    with HonestClient(running.port) as honest:
        while len(honest.seconds) < MAILS:
            attack(beyond, running.port)
    assert honest.p99() < P99_SECONDS
    assert running.memory("VmHWM") < LEAST_MEMORY


def refill(port: int, amount: int, is_full: Event, is_over: Event) -> None:
    """Hold so many connections, and open another one for each that is closed."""

    def opened() -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), 30)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
        return connection

    with selectors.DefaultSelector() as selector:
        for _ in range(amount):
            opened()
        is_full.set()
        while not is_over.is_set():
            for key, _ in selector.select(0.1):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                with suppress(ConnectionError):
                    if connection.recv(65536):
                        continue
                selector.unregister(connection)
                connection.close()
                with suppress(ConnectionError):
                    opened()


def test_a_neighbour_that_takes_all_connections_keeps_no_mail_out(
    upstream: CapturingUpstream, start: StartGateway
) -> None:
    running = start({"upstream.url": upstream.url, "log.level": "error"})
    context = multiprocessing.get_context("fork")
    is_full, is_over = context.Event(), context.Event()
    neighbour = context.Process(target=refill, args=(running.port, 256, is_full, is_over))
    neighbour.start()
    try:
        assert is_full.wait(60)
        time.sleep(RIPE_SECONDS)  # by the gateway's clock: until then each of them may be at the beginning of a mail
        for number in range(40):
            with smtplib.SMTP("127.0.0.1", running.port, timeout=60) as client:
                client.sendmail("a@client.example", [f"{number}@there.example"], b"Subject: x\r\n\r\nx\r\n")
    finally:
        is_over.set()
        neighbour.join(60)
    assert neighbour.exitcode == 0
    assert len(upstream.messages) == 40


@pytest.mark.parametrize(
    "lines", [("x" * 20_480,), ("x",) * 1_000, ("x" * 10 * MIB,)], ids=["long", "many", "without end"]
)
def test_an_upstream_that_says_too_much(
    lines: tuple[str, ...], upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running = start({"upstream.url": upstream.url, "log.level": "error"})
    upstream.say(UpstreamScript(recipients={"x@there.example": Reply(550, None, lines, ErrorType.UPSTREAM_REFUSED)}))
    with HonestClient(running.port) as honest:
        while len(honest.seconds) < MAILS:
            client = connect(running.port)
            client.opens()
            assert client.asks("MAIL FROM:<a@client.example>", "RCPT TO:<x@there.example>")[:9] == "451 4.5.0"
            client.close()
    assert honest.p99() < P99_SECONDS
    assert running.memory("VmHWM") < LEAST_MEMORY


@pytest.mark.parametrize("octets", [1000, 200_000], ids=["small", "large"])
def test_a_spool_takes_no_more_octets_than_it_may(
    octets: int, start: StartGateway, tmp_path: Path, connect: Callable[[int], Client]
) -> None:
    settings = {
        "upstream.url": f"smtp://127.0.0.1:{unclaimed_port()}",
        "delivery.mode": "queue",
        "spool.directory": str(tmp_path / "spool"),
        "spool.most_octets": "1MiB",
        "log.level": "error",
    }
    taken = 0
    for _ in range(2):  # what is there at the start counts too
        running = start(settings)
        client = connect(running.port)
        client.opens()
        while (answer := client.asks("MAIL FROM:<a@client.example>")).startswith("250 "):
            assert client.asks("RCPT TO:<b@there.example>", "DATA").startswith("354 ")
            client.say("Subject: x", "", *["x" * 98] * (octets // 100), ".")
            assert client.reply().startswith("250 ")
            taken += 1
        assert answer.startswith("452 4.3.1")
        assert running.stop() == 0
    assert 0.4 * MIB / octets < taken <= 1 + MIB / octets


def test_a_spool_takes_no_more_than_it_may(
    start: StartGateway, tmp_path: Path, connect: Callable[[int], Client]
) -> None:
    settings = {
        "upstream.url": f"smtp://127.0.0.1:{unclaimed_port()}",
        "delivery.mode": "queue",
        "spool.directory": str(tmp_path / "spool"),
        "spool.most_messages": 10,
        "log.level": "error",
    }
    running = start(settings)
    answers = []
    client = connect(running.port)
    client.opens()
    for _ in range(100):
        answers.append(client.asks("MAIL FROM:<a@client.example>"))
        if answers[-1].startswith("250 "):
            assert client.asks("RCPT TO:<b@there.example>", "DATA").startswith("354 ")
            assert client.asks("Subject: x\r\n\r\nx\r\n.").startswith("250 ")
    assert [answer[:9] for answer in answers] == ["250 2.1.0"] * 10 + ["452 4.3.1"] * 90


def test_a_collector_that_takes_nothing(upstream: CapturingUpstream, start: StartGateway) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "OTEL_BSP_MAX_QUEUE_SIZE": "200",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        running = start({"upstream.url": upstream.url, "log.level": "error"}, environ)
        with HonestClient(running.port) as honest:
            until(lambda: len(honest.seconds) >= 700 or None, "ten times the queue's spans", timeout_seconds=60)
        assert honest.p99() < P99_SECONDS
        assert running.memory("VmHWM") < LEAST_MEMORY / 4
