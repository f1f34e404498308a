"""What one client can make grow in the real gateway, while an honest client's mail goes on.

An attack runs in a process of its own, so that it takes no time from the client that is watched; see `tests.bounds`.
"""

import http.client
import multiprocessing
import re
import selectors
import smtplib
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

import pytest

from otel_smtp.config.bounds import LEDGER
from otel_smtp.server.places import RIPE_SECONDS
from tests.bounds.drives import DRIVES
from tests.bounds.driving import MEMORY, P99_SECONDS, run
from tests.end_to_end.conftest import Client, StartGateway
from tests.end_to_end.messages import MIB
from tests.support.capture import CapturingUpstream
from tests.support.honest import HonestClient
from tests.support.ports import unclaimed_port
from tests.support.process import GatewayProcess, until

# The quick ones; `python -m tests.bounds` runs all.
IN_THE_SUITE: Final = (
    "connections", "own_faults", "junk_commands", "recipients", "two_million_recipients", "tiny_chunks_unread",
    "command_lines", "text_lines", "header_blocks", "received_fields", "large_message", "guesses",
    "words_of_an_upstream", "scrapes", "readers_that_come_and_go", "queue_commands",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", IN_THE_SUITE)
def test_far_beyond_a_bound(name: str, tmp_path: Path) -> None:
    (drive,) = (drive for drive in DRIVES if drive.name == name)
    run(drive, tmp_path).check()


def test_every_row_of_the_ledger_is_driven() -> None:
    rows = [row.what for row in LEDGER]
    assert len(set(rows)) == len(rows)
    assert {row for drive in DRIVES for row in drive.rows} == set(rows)


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
        assert running.memory("VmHWM") < MEMORY / 4
