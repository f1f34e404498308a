"""Notifications of a service manager, over a real datagram socket."""

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from otel_smtp.gateway.systemd import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = str(tmp_path / "notify")
        sock.bind(name if request.param == "path" else "\0" + name)
        sock.settimeout(5)
        yield name if request.param == "path" else "@" + name, sock


def told(sock: socket.socket) -> list[str]:
    return sock.recv(4096).decode().split("\n")


def test_ready_and_stopping_are_notified(manager: tuple[str, socket.socket]) -> None:
    address, sock = manager
    ServiceManager(address).ready("smtp 127.0.0.1:2525\nREADY=0")
    # A line break in the status would start an assignment of its own.
    assert told(sock) == ["READY=1", "STATUS=smtp 127.0.0.1:2525 READY=0"]
    ServiceManager(address).stopping(25.0)
    assert told(sock)[::2] == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=25000000"]


@pytest.mark.parametrize("address", [None, ""])
def test_without_a_manager_nothing_happens(address: str | None, caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager(address).ready("up")
    assert caplog.records == []


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody", "x" * 300])
def test_a_manager_that_cannot_be_reached_is_logged(address: str, caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager(address).ready("up")
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_manager_that_does_not_listen_blocks_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        for _ in range(2000):
            if caplog.records:
                break
            ServiceManager(name).ready("up")
    assert caplog.records, "its queue is full and we were told so at once"
