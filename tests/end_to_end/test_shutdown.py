"""The drain: idle clients are told, open transactions end as they would have, nothing is lost, and it ends."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.end_to_end.conftest import Client, StartGateway
from tests.support.capture import CapturingUpstream
from tests.support.ports import unclaimed_port
from tests.support.process import (
    DEFAULTS,
    GatewayProcess,
    environment,
    listening_sockets,
    outliving_nobody,
    settings_file,
    until,
)

Connect = Callable[[int], Client]
LOOPS: Final = pytest.mark.parametrize("uses_uvloop", [True, False], ids=["uvloop", "asyncio"])
DRAINING: Final = "421 4.3.2 "


def refuses_connections(running: GatewayProcess) -> bool | None:
    """True once nobody listens any more."""
    try:
        socket.create_connection(("127.0.0.1", running.port), 1).close()
    except OSError:
        return True
    return None


@LOOPS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_idle_clients_are_told_and_the_gateway_ends(
    uses_uvloop: bool, number: signal.Signals, upstream: CapturingUpstream, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url}, uses_uvloop=uses_uvloop)
    greeted, helloed = connect(running.port), connect(running.port)
    assert greeted.reply().startswith("220 ")
    helloed.opens()
    running.signal(number)
    for client in (greeted, helloed):
        assert client.reply().startswith(DRAINING)
        assert client.reply() == ""
    assert running.wait() == 0


@LOOPS
def test_a_message_on_its_way_is_completed(
    uses_uvloop: bool, upstream: CapturingUpstream, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url}, uses_uvloop=uses_uvloop)
    client = connect(running.port)
    client.opens_content()
    client.say("Subject: x", "", "first half")
    running.signal(signal.SIGTERM)
    until(lambda: refuses_connections(running), "the listener closes")
    assert client.asks("second half\r\n.").startswith("250 ")
    assert client.reply().startswith(DRAINING)
    assert client.reply() == ""
    assert running.wait() == 0
    (message,) = upstream.messages
    assert message.content.endswith(b"\r\n\r\nfirst half\r\nsecond half\r\n")


@pytest.mark.parametrize("strategy", ["transparent", "buffered"])
def test_a_transaction_between_its_commands_is_completed(
    strategy: str, upstream: CapturingUpstream, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url, "delivery.strategy": strategy})
    client = connect(running.port)
    client.opens()
    assert client.asks("MAIL FROM:<a@client.example>", "RCPT TO:<b@there.example>").startswith("250 ")
    running.signal(signal.SIGTERM)
    until(lambda: refuses_connections(running), "the listener closes")
    assert client.asks("DATA").startswith("354 ")
    assert client.asks("Subject: x\r\n\r\n.").startswith("250 ")
    assert client.reply().startswith(DRAINING)
    assert running.wait() == 0
    assert len(upstream.messages) == 1


def test_an_upstream_that_takes_its_time_is_waited_for(
    upstream: CapturingUpstream, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url})
    held = upstream.hold("content")
    client = connect(running.port)
    client.opens_content()
    client.say("Subject: x", "", ".")
    assert held.reached.wait(15)
    running.signal(signal.SIGTERM)
    until(lambda: refuses_connections(running), "the listener closes")
    held.release()
    assert client.reply().startswith("250 ")
    assert client.reply().startswith(DRAINING)
    assert running.wait() == 0


def test_the_grace_has_an_end(upstream: CapturingUpstream, start: StartGateway, connect: Connect) -> None:
    running = start({"upstream.url": upstream.url, "timeouts.shutdown_grace": "1s"})
    client = connect(running.port)
    client.opens_content()
    client.say("Subject: x", "", "half of a mess")
    began = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - began >= 1
    assert client.reply().startswith(DRAINING)
    assert client.reply() == ""
    assert upstream.messages == []


@LOOPS
def test_a_second_signal_ends_it_at_once(
    uses_uvloop: bool, upstream: CapturingUpstream, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url, "timeouts.shutdown_grace": "10m"}, uses_uvloop=uses_uvloop)
    held = upstream.hold("content")
    client = connect(running.port)
    client.opens_content()
    client.say("Subject: x", "", ".")
    assert held.reached.wait(15)
    running.signal(signal.SIGTERM)
    until(lambda: refuses_connections(running), "the listener closes")
    began = time.monotonic()
    running.signal(signal.SIGTERM)
    assert running.wait() == 0
    assert time.monotonic() - began < 4  # less than the graces that it would have had else
    # What was on its way has no true answer any more: anything but 250.
    assert not client.reply().startswith("250")
    held.release()


# The rest of the start, behind the first greeting, takes as long as there is such a file.
_SLOW_START: Final = """
import pathlib, time
from otel_smtp.commands import cli
from otel_smtp.gateway import status_port

def slow():
    while pathlib.Path("wait").exists():
        time.sleep(0.01)

status_port._import_server = slow
cli.main()
"""


@LOOPS
def test_mail_that_comes_before_all_has_started_gets_its_drain(
    uses_uvloop: bool, upstream: CapturingUpstream, connect: Connect, tmp_path: Path
) -> None:
    port = unclaimed_port()
    addresses = {"listener.address": [f"127.0.0.1:{port}"], "status.address": "127.0.0.1:0"}
    path = settings_file({**DEFAULTS, **addresses, "upstream.url": upstream.url}, tmp_path)
    (tmp_path / "wait").touch()
    environ = environment({}, tmp_path, uses_uvloop=uses_uvloop)
    process = subprocess.Popen(
        [sys.executable, "-c", _SLOW_START, "serve", "--config", path],
        cwd=tmp_path,
        env=environ,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with outliving_nobody(process):
        until(lambda: listening_sockets(port) or None, "the gateway listens")
        client = connect(port)
        client.opens_content()
        process.send_signal(signal.SIGTERM)
        client.say("Subject: x", "")
        (tmp_path / "wait").unlink()
        assert client.asks(".").startswith("250 ")
        assert client.reply().startswith(DRAINING)
        assert process.wait(30) == 0
    assert len(upstream.messages) == 1


def test_a_gateway_that_cannot_start_says_why(upstream: CapturingUpstream, start: StartGateway) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AssertionError, match="ended with 1"):
            start({"upstream.url": upstream.url, "listener.address": [address]})
    with pytest.raises(AssertionError, match="ended with 2"):
        start({"upstream.url": upstream.url, "limits.recipients": -1})
