"""Servers that misbehave: upstreams, collectors and receivers of outcomes."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from tests.support.sink_process import running_sink

FLOOD: Final = b"x" * 65_536
DRIP_SECONDS: Final = 0.2


@contextlib.contextmanager
def served(answer: Callable[[socket.socket], None], scheme: str) -> Iterator[str]:
    """A server that does `answer` with each connection, in a thread of its own."""
    listening = socket.create_server(("127.0.0.1", 0))

    def converse(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError):
            answer(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=converse, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


@contextlib.contextmanager
def sink() -> Iterator[str]:
    """A fast upstream in a process of its own, so that its work takes no time from the client that is watched."""
    with running_sink() as (port, _):
        yield f"smtp://127.0.0.1:{port}"


def silent(connection: socket.socket) -> None:
    """Read, and say nothing."""
    while connection.recv(65_536):
        pass


def flooding(connection: socket.socket) -> None:
    """An answer that does not end."""
    connection.recv(65_536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
    while True:
        connection.sendall(FLOOD)


def crumbling(connection: socket.socket) -> None:
    """An answer in chunks of one octet that does not end."""
    connection.recv(65_536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"1\r\nx\r\n" * 512)


def dripping(connection: socket.socket) -> None:
    """A head that comes octet by octet, and does not end."""
    connection.recv(65_536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"x")
        time.sleep(DRIP_SECONDS)  # the drip


def stalling(connection: socket.socket) -> None:
    """An upstream that says nothing to RCPT TO:<stall@...>, nor to the end of content that is for late@..."""
    said = connection.makefile("rb")
    connection.sendall(b"220 stalling.example\r\n")
    is_late = False
    while line := said.readline():
        verb = line[:4].upper()
        if b"<stall@" in line:
            time.sleep(600)  # silent until the process that holds it ends
        elif verb == b"DATA":
            connection.sendall(b"354 Go on\r\n")
            while said.readline() != b".\r\n":
                pass
            if is_late:
                time.sleep(600)  # likewise
            connection.sendall(b"250 Ok\r\n")
        else:
            is_late = (is_late or b"<late@" in line) and verb != b"MAIL"
            connection.sendall(b"250 Ok\r\n")
