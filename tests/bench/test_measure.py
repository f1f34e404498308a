"""The measuring itself, on relays that are quick to start, that do not start, and that end under load."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from otel_smtp.commands.load_generator import Load, LoadPlan, message
from tests.bench.budget import Budget
from tests.bench.figures import KIB, Cell, Results
from tests.bench.measure import Bench
from tests.bench.process import Child, wait_for_greeting
from tests.bench.targets import peers
from tests.bench.targets.null_relay import Client, Upstream
from tests.support.ports import unclaimed_port
from tests.support.sink_process import running_sink

CELL = Cell(2, 1 * KIB)
# Greets and then ends, as soon as somebody sends it a mail.
_FRAIL = """
import socket, sys
listening = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    connection, _ = listening.accept()
    connection.sendall(b"220 frail\\r\\n")
    if connection.recv(100).startswith(b"EHLO"):
        sys.exit("it broke: " + sys.argv[2])
    connection.sendall(b"221 bye\\r\\n")
"""


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with Bench(tmp_path, tmp_path, Budget(None), Results(), lambda text: None) as bench:
        yield bench


@pytest.mark.long
def test_a_relay_that_fails_is_named_and_the_others_are_measured(bench: Bench) -> None:
    frail = peers.named(f"frail (C)={sys.executable} -c '{_FRAIL}' {{listen_port}} {{upstream_port}}")
    absent = peers.named("absent=/nonexistent/relay {listen} {upstream}")
    half = Cell(2, 1 * KIB, share=0.5)
    bench.load_rounds([frail, absent, peers.NULL], [CELL], rounds=2, seconds=lambda left: 0.05)
    bench.load_rounds([peers.NULL, absent], [half], rounds=1, seconds=lambda left: 0.05)
    load = bench.results.load(CELL)
    assert {name: len(runs) for name, runs in load.relays.items()} == {peers.NULL.name: 2}
    assert load.failed["absent"] == "start: not installed: /nonexistent/relay"
    assert load.failed["frail (C)"].startswith("first messages: no message accepted: ")
    for run in load.relays[peers.NULL.name]:
        assert run.accepted > 0
        assert (run.failed, run.spans) == (0, 0)
        # MAIL and RCPT in one, the content: what the gateway needs too; and EHLO of a new connection.
        assert 2 <= run.round_trips <= 2 + 3 / run.accepted
    (paced,) = bench.results.load(half).relays[peers.NULL.name]
    assert paced.accepted > 0
    assert len(load.ceiling) == 2
    assert bench.results.load(half).ceiling == []


def test_the_null_relay_relays_large_contents_too() -> None:
    port = unclaimed_port()
    with running_sink() as (sink, process):
        relay = Child([sys.executable, "-m", "tests.bench.targets.null_relay", str(port), str(sink)])
        try:
            wait_for_greeting(port, relay)
            plan = LoadPlan(host="127.0.0.1", port=port, messages=4, sessions=2, size_octets=1_000_000)
            result = Load(plan).run()
        finally:
            relay.stop()
        assert (result.accepted, result.failed) == (4, 0)
        counts = process.ask()
    assert (counts["messages"], counts["octets"]) == (4, 4 * len(message(plan)))


class _Recorded(Upstream):
    def __init__(self) -> None:
        self.octets = b""
        self.is_last = False

    def ask(self, data: bytes, replies: int, then: object) -> None:
        assert not self.is_last
        self.is_last = True
        head, _, content = data.partition(b"\r\n")
        assert head == b"BDAT %d LAST" % len(content)
        self.octets += content

    def send(self, data: bytes) -> None:
        head, _, content = data.partition(b"\r\n")
        assert head == b"BDAT %d" % len(content)
        self.octets += content


def test_the_null_relay_finds_the_end_wherever_it_is_cut() -> None:
    content = b"Subject: x\r\n\r\nhello\r\n.\r\n"
    for cut in range(1, len(content)):
        client = Client(0, [])
        client._upstream = upstream = _Recorded()
        client._is_content = True
        for piece in (content[:cut], content[cut:]):
            client._content(piece)
        assert upstream.is_last, cut
        assert upstream.octets == content[:-3], cut
        assert not client._is_content


def test_a_relay_by_its_command_line() -> None:
    assert (peers.named("smtprelay (Go)=x {listen} {upstream}").language) == "Go"
    assert (peers.named(" some relay =x {listen_port} {upstream_port}").name) == "some relay"
    for wrong in ("x {listen} {upstream}", "=x {listen} {upstream}", "name=", "name=x {listen}", "name=x {upstream}"):
        with pytest.raises(ValueError, match="listen"):
            peers.named(wrong)
