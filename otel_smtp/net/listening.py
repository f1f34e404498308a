"""Listening sockets."""

import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from otel_smtp.net.endpoints import endpoint
from otel_smtp.net.stream import Stream
from otel_smtp.observing.values import Endpoint

BACKLOG: Final = 1024  # capped by net.core.somaxconn; a burst of clients must not find connections refused
# asyncio accepts a whole backlog of connections (since CPython 3.14 one more) before it serves the first. Connections
# that we refuse at once would all be open together, and 300 of them exhaust a process that may open 256 files.
ACCEPTS_AT_ONCE: Final = 4
# Since CPython 3.13 a loop removes the path of any unix socket that it closes.
_KEEPING_THE_PATH: Final[Mapping[str, Any]] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}


class CannotListen(OSError):
    """An address cannot be listened at.

    Attributes:
        address: the address.
        setting: the key of the setting that names it; "" if unknown.
    """

    def __init__(self, address: Endpoint, error: OSError, setting: str = "") -> None:
        super().__init__(error.errno or 0, error.strerror)
        self.errno: int
        self.address = address
        self.setting = setting

    def __str__(self) -> str:
        where = f"{self.setting}: " if self.setting else ""
        # The event loop puts the reason into a sentence of its own; a name that does not resolve has no errno.
        why = os.strerror(self.errno) if self.errno in errno.errorcode else str(self.strerror)
        if self.errno == errno.ENOENT and self.address.port is None:
            why = f"no such directory: {os.path.dirname(self.address.host) or '.'}"
        return f"{where}cannot listen at {self.address}: {why[:1].lower()}{why[1:]}"


class Listener:
    """What `listen` opened.

    Attributes:
        addresses: where it listens, with the ports that the kernel chose.
    """

    __slots__ = ("_factory", "_is_inherited", "_server", "_unix", "addresses")

    def __init__(
        self,
        server: asyncio.Server,
        factory: Callable[[], Stream],
        unix: tuple[str, int] | None,
        *,
        is_inherited: bool,
    ) -> None:
        self._server = server
        self._factory = factory
        self._unix = unix  # path and inode
        self._is_inherited = is_inherited
        self.addresses = tuple(endpoint(listening.getsockname()) for listening in server.sockets)

    def __repr__(self) -> str:
        return f"<Listener {', '.join(map(str, self.addresses))}>"

    async def close(self) -> None:
        """Stop listening; open connections stay open. Removes a unix socket's path if it is still ours. Idempotent.

        First accepts the connections that the kernel has completed, which it would reset.
        """
        self._remove_path()
        held = [socket.socket(fileno=os.dup(listening.fileno())) for listening in self._server.sockets]
        await self.leave()
        waiting: list[socket.socket] = []
        for sock in held:
            with sock:
                waiting += _accept_waiting(sock)
                if self._is_inherited:  # the parent keeps this socket open: clients would wait there in vain
                    stop_listening(sock)
        loop = asyncio.get_running_loop()
        for client in waiting:
            with suppress(OSError):
                await loop.connect_accepted_socket(self._factory, client)

    async def leave(self) -> None:
        """Stop accepting in this process; a successor accepts on the same socket what waits there. Idempotent."""
        loop = asyncio.get_running_loop()
        for listening in self._server.sockets:
            loop.remove_reader(listening.fileno())  # asyncio's; uvloop has none
        # Asyncio makes the transport of an accepted connection one turn later, and drops it if the server is closed.
        await asyncio.sleep(0)
        self._server.close()

    def _remove_path(self) -> None:
        if self._unix is not None:
            remove_unix_path(*self._unix)
            self._unix = None


def _accept_waiting(sock: socket.socket) -> list[socket.socket]:
    """Accept the connections that the kernel has completed, while there are descriptors for them."""
    accepted: list[socket.socket] = []
    while True:
        try:
            accepted.append(sock.accept()[0])
        except ConnectionAbortedError:
            continue
        except OSError:
            return accepted


def stop_listening(sock: socket.socket) -> None:
    """Let clients reach only the other sockets at its address; it stays bound, and may listen again. Idempotent.

    A unix socket is left alone: there are no others at its path.
    """
    # One that does not listen must not be shut down: once it listens again, Linux would end each connection at once.
    if sock.family != socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RD)


def remove_unix_path(path: str, inode: int) -> None:
    """Remove the path of a unix socket, unless a successor has put its own socket there."""
    with suppress(OSError):
        if os.stat(path).st_ino == inode:
            os.unlink(path)


async def listen(
    on_connection: Callable[[Stream], None],
    *,
    host: str | None = None,
    port: int = 0,
    path: str | None = None,
    sock: socket.socket | None = None,
    backlog: int = BACKLOG,
) -> Listener:
    """Listen at `host` and `port`, at the unix socket `path`, or on the bound socket `sock`: one of the three.

    Args:
        on_connection: called synchronously with each accepted stream, before anything is read from it; it must keep the
            stream. For implicit TLS it calls `start_tls` at once; octets that the client sent meanwhile are not lost if
            `pause_reading` is called first.
        port: 0 lets the kernel choose; see `Listener.addresses`.
        sock: inherited from a parent, which keeps it, too, and removes the path of a unix socket.

    Raises:
        CannotListen: the address cannot be bound.
    """
    try:
        return await _listen(on_connection, host, port, path, sock, backlog=backlog)
    except OSError as error:
        where = (
            endpoint(sock.getsockname()) if sock is not None else Endpoint(path or host or "", None if path else port)
        )
        raise CannotListen(where, error) from error


def refuse_served(address: Endpoint) -> None:
    """Refuse a unix socket in use: a second process that binds its path takes over the clients of the first, unnoticed.

    Raises:
        CannotListen: something accepts connections there.
    """
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(address.host)
        except BlockingIOError:
            pass  # its backlog is full, so a process listens there
        except OSError:
            return  # there is no such socket, or no process listens on it
    raise CannotListen(address, OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE)))


async def _listen(
    on_connection: Callable[[Stream], None],
    host: str | None,
    port: int,
    path: str | None,
    sock: socket.socket | None,
    *,
    backlog: int,
) -> Listener:
    loop = asyncio.get_running_loop()

    def factory() -> Stream:
        return Stream(on_connection)

    unix: tuple[str, int] | None = None
    if path is not None:
        # The loop removes a socket file that a killed process left behind, but no other file. It logs an error of its
        # own where it cannot look for one: that is an error of ours.
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)
        server = await loop.create_unix_server(factory, path, backlog=ACCEPTS_AT_ONCE)
        unix = (path, os.stat(path).st_ino)
    elif sock is not None and sock.family == socket.AF_UNIX:
        server = await loop.create_unix_server(factory, sock=sock, backlog=ACCEPTS_AT_ONCE, **_KEEPING_THE_PATH)
    elif sock is not None:
        server = await loop.create_server(factory, sock=sock, backlog=ACCEPTS_AT_ONCE)
    else:
        server = await loop.create_server(factory, host, port, backlog=ACCEPTS_AT_ONCE)
    for listening in server.sockets:
        # The kernel's own backlog is set separately.
        with socket.socket(fileno=os.dup(listening.fileno())) as same:
            same.listen(backlog)
    return Listener(server, factory, unix, is_inherited=sock is not None)


_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def is_accept_exhausted(context: Mapping[str, Any]) -> bool:
    """Whether an event loop's exception handler was called because accept ran out of descriptors or memory.

    The loop retries by itself after a second and reports each failure: count them all, but log only now and then.

    Args:
        context: as `loop.set_exception_handler` hands it over.
    """
    error = context.get("exception")
    return isinstance(error, OSError) and error.errno in _EXHAUSTED
