"""Notifications of a service manager, over a real datagram socket."""

import logging
import os
import socket
import time
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
    ServiceManager(address).ready()
    assert told(sock) == ["READY=1", f"STATUS=relaying, pid {os.getpid()}"]
    ServiceManager(address).stopping(25.0)
    assert told(sock)[::2] == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=25000000"]


@pytest.mark.parametrize("address", [None, ""])
def test_without_a_manager_nothing_happens(address: str | None, caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager(address).ready()
    assert caplog.records == []


@pytest.mark.parametrize("address", ["/nowhere/notify", "@nobody", "x" * 300])
def test_a_manager_that_cannot_be_reached_is_logged(address: str, caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager(address).ready()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_manager_that_does_not_listen_blocks_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        for _ in range(2000):
            if caplog.records:
                break
            ServiceManager(name).ready()
    assert caplog.records, "its queue is full and we were told so at once"


def test_a_reload_is_notified_with_its_time_and_its_end(manager: tuple[str, socket.socket]) -> None:
    address, sock = manager
    seen: list[str] = []
    before = time.monotonic_ns() // 1000
    ServiceManager(address).through_reload(lambda: seen.append(told(sock)[0]))
    assert seen == ["RELOADING=1"]
    assert told(sock)[0] == "READY=1"
    ServiceManager(address).reloading()
    assert before <= int(told(sock)[1].removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
