"""What is scarce: file descriptors under a flood of connections, memory and disk under large messages."""

import contextlib
import selectors
import socket
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from otel_smtp.telemetry.logs import LINES_A_SECOND
from tests.end_to_end.conftest import Client, StartGateway
from tests.end_to_end.messages import MIB
from tests.support.capture import CapturingUpstream
from tests.support.process import GatewayProcess, until

FILE_LIMIT: Final = 64
CONNECTIONS: Final = FILE_LIMIT // 4
FLOOD: Final = 300


def flood(port: int, holding: contextlib.ExitStack) -> Counter[bytes]:
    """Connect `FLOOD` times at once, and count what the first word of each answer is; b"" is a close without one."""
    answers: Counter[bytes] = Counter()
    with selectors.DefaultSelector() as selector:
        for _ in range(FLOOD):
            connecting = holding.enter_context(socket.socket())
            connecting.setblocking(False)
            connecting.connect_ex(("127.0.0.1", port))
            selector.register(connecting, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(15)
            assert ready, f"{len(selector.get_map())} connections are neither served nor refused"
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                with contextlib.suppress(ConnectionError):
                    answers[key.fileobj.recv(1000)[:4]] += 1
                selector.unregister(key.fileobj)
    return answers


def open_files(running: GatewayProcess) -> int:
    return len(list(Path(f"/proc/{running.pid}/fd").iterdir()))


def is_served(port: int, connect: Callable[[int], Client]) -> bool | None:
    """True where a new client is greeted."""
    return connect(port).reply().startswith("220 ") or None


@pytest.mark.parametrize("uses_uvloop", [True, False], ids=["uvloop", "asyncio"])
def test_a_flood_of_connections_is_survived_with_64_files(
    uses_uvloop: bool, upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running = start({"upstream.url": upstream.url}, uses_uvloop=uses_uvloop, file_limit=FILE_LIMIT)
    client = connect(running.port)
    client.opens()
    # Once through, so that what is made at first use is made: the connection to the upstream, say.
    assert client.asks("MAIL FROM:<a@client.example>", "RCPT TO:<b@there.example>", "DATA").startswith("354 ")
    assert client.asks(".").startswith("250 ")
    files_before = open_files(running)

    for _ in range(3):
        with contextlib.ExitStack() as holding:
            answers = flood(running.port, holding)
            assert set(answers) <= {b"220 ", b"421 ", b""}
            assert 0 < answers[b"220 "] < CONNECTIONS
            # Who came before the flood is served within it.
            assert client.asks("MAIL FROM:<a@client.example>", "RCPT TO:<b@there.example>", "DATA").startswith("354 ")
            assert client.asks(".").startswith("250 ")
        until(lambda: is_served(running.port, connect), "a newcomer is served again")

    until(lambda: open_files(running) <= files_before + 3 or None, "the sockets of the flood are closed")
    log = running.log
    assert "lowered to 16" in str(log[0])
    for second in {line["timestamp"][:19] for line in log}:
        alike = Counter(line["event"] for line in log if line["timestamp"].startswith(second))
        assert max(alike.values()) <= LINES_A_SECOND, second
    assert "Traceback" not in running.stderr
    assert "no file descriptors left" not in running.stderr  # refusals alone do not use them up
    assert running.stop() == 0
    assert len(upstream.messages) == 4


LARGE: Final = 8 * MIB
LINE: Final = b"0123456789abcdef" * 4 + b"\r\n"


def send_large(client: Client) -> None:
    """Send the content, but for its end."""
    client.socket.sendall(b"Subject: large\r\n\r\n")
    piece = LINE * (MIB // len(LINE))
    for _ in range(LARGE // len(piece)):
        client.socket.sendall(piece)


def test_large_messages_side_by_side_stand_in_files_and_not_in_memory(
    upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running = start({"upstream.url": upstream.url})
    clients = [connect(running.port) for _ in range(8)]
    for client in clients:
        client.opens_content()
    before = running.memory("VmRSS")
    with ThreadPoolExecutor(len(clients)) as threads:
        list(threads.map(send_large, clients))
        for client in clients:
            client.say(".")
        assert [client.reply()[:4] for client in clients] == ["250 "] * len(clients)
    # 64 MiB went through; a stream holds a quarter of one MiB on each side.
    assert running.memory("VmHWM") - before < 24 * MIB
    assert all(len(message.content) > LARGE - MIB for message in upstream.messages)


def test_large_messages_that_are_broken_off_again_and_again_leave_nothing(
    upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running = start({"upstream.url": upstream.url, "upstream.connections": 1})

    def break_off() -> None:
        client = connect(running.port)
        client.opens_content()
        send_large(client)
        client.close()

    break_off()
    until(lambda: no_temporary_files(running), "the first file is gone")
    files, before = open_files(running), running.memory("VmRSS")
    for _ in range(12):
        break_off()
    until(lambda: no_temporary_files(running), "all files are gone")
    until(lambda: (open_files(running) <= files) or None, "all sockets are closed")
    assert running.memory("VmRSS") - before < 8 * MIB
    assert upstream.messages == []


def no_temporary_files(running: GatewayProcess) -> bool | None:
    """True where it holds no file without a name, as content lies in."""
    links = []
    for descriptor in Path(f"/proc/{running.pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(str(descriptor.readlink()))
    return not any("(deleted)" in link for link in links) or None
