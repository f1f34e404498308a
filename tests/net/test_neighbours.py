"""Whose a connection on this machine is, as the kernel tells."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from otel_smtp.net import Stream, listen, owner_of_peer
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="SO_PEERCRED and sock_diag are Linux's")
NOBODY = 65534
CONNECT = """
import encodings.idna, os, socket, sys  # what the other user may not be able to read any more
os.setuid(int(sys.argv[1]))
connection = socket.create_connection((sys.argv[2], int(sys.argv[3])))
connection.recv(1)
"""


@asynccontextmanager
async def accepted(address: str) -> AsyncIterator[tuple[list[Stream], int]]:
    streams: list[Stream] = []
    listening = await listen(streams.append, host=address)
    try:
        port = listening.addresses[0].port
        assert port is not None
        yield streams, port
    finally:
        for stream in streams:
            stream.abort()
        await listening.close()


@pytest.mark.both_loops
@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.77", "::1"])
async def test_the_owner_of_a_socket_is_its_user(address: str) -> None:
    async with accepted(address) as (streams, port):
        with socket.create_connection((address, port)), socket.create_connection((address, port)):
            await until(lambda: len(streams) == 2)
            first, second = (owner_of_peer(stream) for stream in streams)
    assert first is not None
    assert first.partition(",")[0] == f"uid {os.getuid()}"
    assert second == first


async def test_over_a_socket_of_both_families_too() -> None:
    streams: list[Stream] = []
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as both:
        listening = await listen(streams.append, sock=both)
        with socket.create_connection(("127.0.0.1", listening.addresses[0].port or 0)):
            await until(lambda: streams)
            assert (owner_of_peer(streams[0]) or "").partition(",")[0] == f"uid {os.getuid()}"
        streams[0].abort()
        await listening.close()


@pytest.mark.both_loops
async def test_the_owner_of_a_unix_socket_is_who_connected_it(tmp_path: Path) -> None:
    streams: list[Stream] = []
    listening = await listen(streams.append, path=str(tmp_path / "socket"))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "socket"))
        await until(lambda: streams)
        assert owner_of_peer(streams[0]) == f"uid {os.getuid()}"
        streams[0].abort()
        await listening.close()


async def test_another_users_socket_is_another_ones() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can be another user")
    async with accepted("127.0.0.1") as (streams, port):
        arguments = [sys.executable, "-c", CONNECT, str(NOBODY), "127.0.0.1", str(port)]
        with subprocess.Popen(arguments) as client:
            await until(lambda: streams, timeout_seconds=30)
            owner = await asyncio.to_thread(owner_of_peer, streams[0])
            streams[0].abort()
            client.terminate()
    assert owner is not None
    assert owner.partition(",")[0] == f"uid {NOBODY}"


async def test_of_what_is_closed_nothing_is_known() -> None:
    async with accepted("127.0.0.1") as (streams, port):
        with socket.create_connection(("127.0.0.1", port)):
            await until(lambda: streams)
        assert owner_of_peer(streams[0]) is None
        streams[0].abort()
        assert owner_of_peer(streams[0]) is None


async def test_where_the_kernel_does_not_tell_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async with accepted("127.0.0.1") as (streams, port):
        with socket.create_connection(("127.0.0.1", port)):
            await until(lambda: streams)
            plain = socket.socket

            def forbidden(family: int = socket.AF_INET, *rest: int, **more: int) -> socket.socket:
                if family == socket.AF_NETLINK:
                    raise OSError("address family not supported")
                return plain(family, *rest, **more)

            monkeypatch.setattr(socket, "socket", forbidden)
            assert owner_of_peer(streams[0]) is None
