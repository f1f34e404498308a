"""Several processes on one port, supervised."""

import os
import signal
import smtplib
from collections.abc import Callable

from tests.end_to_end.conftest import Client, StartGateway
from tests.support.capture import CapturingUpstream
from tests.support.process import GatewayProcess, listening_sockets, until


def send(port: int) -> None:
    with smtplib.SMTP("127.0.0.1", port, timeout=15) as client:
        client.sendmail("a@client.example", ["b@there.example"], "Subject: x\r\n\r\nHello\r\n")


def two_workers(upstream: CapturingUpstream, start: StartGateway) -> GatewayProcess:
    running = start({"upstream.url": upstream.url, "workers": 2})
    assert len(running.children) == 2
    return running


def test_workers_share_the_port_and_drain_together(
    upstream: CapturingUpstream, start: StartGateway, connect: Callable[[int], Client]
) -> None:
    running = two_workers(upstream, start)
    for _ in range(20):
        send(running.port)
    assert len(upstream.messages) == 20
    clients = [connect(running.port) for _ in range(8)]
    for client in clients:
        client.opens_content()
    running.signal(signal.SIGTERM)
    for client in clients:
        assert client.asks("Subject: y\r\n\r\n.").startswith("250 ")
        assert client.reply().startswith("421 4.3.2 ")
    assert running.wait() == 0
    assert len(upstream.messages) == 28


def test_a_worker_that_dies_is_started_again(upstream: CapturingUpstream, start: StartGateway) -> None:
    running = two_workers(upstream, start)
    victim = min(running.children)
    others = running.children - {victim}
    os.kill(victim, signal.SIGKILL)
    until(lambda: (len(running.children - {victim}) == 2) or None, "a new worker")
    assert others < running.children
    # A connection in the dead worker's queue is lost, as with any kill; those made once its successor serves are not.
    until(lambda: (listening_sockets(running.port) == 2) or None, "the new worker serves")
    for _ in range(10):
        send(running.port)
    assert len(upstream.messages) == 10
    assert running.stop() == 0


def test_workers_are_replaced_one_by_one(upstream: CapturingUpstream, start: StartGateway) -> None:
    running = two_workers(upstream, start)
    before = running.children
    running.signal(signal.SIGUSR2)
    until(lambda: (len(running.children) == 2 and not running.children & before) or None, "two new workers")
    for _ in range(10):
        send(running.port)
    assert len(upstream.messages) == 10
    assert running.stop() == 0
