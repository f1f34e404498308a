"""A gateway's addresses before they are bound: those that this machine has, and ports shared by processes.

The kernel spreads connections over several processes only if each listens on its own socket bound to the same port with
SO_REUSEPORT. So the parent binds one per worker's place, and each worker listens on those of its place. The parent
keeps them too: connections waiting in the kernel outlive a worker, and its successor accepts them. All workers share
one unix socket: whichever is free accepts.
"""

import contextlib
import logging
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from otel_smtp.config import Settings
from otel_smtp.net import CannotListen, refuse_served, remove_unix_path, stop_listening
from otel_smtp.observing import Endpoint

logger: Final = logging.getLogger("otel_smtp.gateway.ports")

LOOPBACK: Final = "127.0.0.1"


class SharedPorts:
    """Ports that all workers of a gateway bind.

    Use as a context manager around the workers' lives; on leaving, the ports are free.

    Args:
        settings: of the gateway; its ports may be 0.

    Raises:
        CannotListen: an address that the operator set cannot be bound.

    Attributes:
        settings: the same, with real ports, and without a status port if its default port is taken.
        worker_status_ports: a loopback port for each worker's status; () without a status port.
    """

    def __init__(self, settings: Settings) -> None:
        self._held: list[socket.socket] = []
        self._listeners: dict[Endpoint, list[Sequence[socket.socket]]] = {}  # by address and place
        self._paths: list[tuple[str, int]] = []  # of unix sockets, and their inodes
        try:
            with naming_settings(settings):
                self.settings = self._with_listener_ports(self._with_status_port(settings))
            self.worker_status_ports = self._worker_status_ports()
        except BaseException:
            self._close()
            raise

    def adopt(self, settings: Settings) -> None:
        """Use new settings for workers started from now on; the ports stay."""
        self.settings = with_addresses_of(settings, self.settings)

    def __enter__(self) -> "SharedPorts":
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        self.close_listeners()
        for sock in self._held:
            sock.close()

    def claim(self, place: int) -> Mapping[Endpoint, Sequence[socket.socket]]:
        """Take the sockets of a worker's place, by the listeners' addresses, and close all others in its process."""
        for places in self._listeners.values():
            for other, sockets in enumerate(places):
                if other != place:
                    _close_all(set(sockets) - set(places[place]))
        return {address: places[place] for address, places in self._listeners.items()}

    def stop_listening(self, place: int) -> None:
        """No worker will accept at this place for a while: let clients reach only the other places until one does."""
        for places in self._listeners.values():
            for sock in places[place]:
                stop_listening(sock)

    def close_listeners(self) -> None:
        """The gateway stops: only its workers' open sockets still accept. Idempotent."""
        for places in self._listeners.values():
            for sockets in places:
                _close_all(sockets)
        self._listeners.clear()
        while self._paths:
            remove_unix_path(*self._paths.pop())

    def _with_listener_ports(self, settings: Settings) -> Settings:
        listeners = tuple(
            msgspec.structs.replace(
                listener, address=tuple(self._listen_at(address, settings.workers) for address in listener.address)
            )
            for listener in settings.listener
        )
        return msgspec.structs.replace(settings, listener=listeners)

    def _listen_at(self, address: Endpoint, places: int) -> Endpoint:
        """Bind an address for each place, if no other process serves it: a port that any process of this user may share
        could be shared with another gateway, and each would get some of the clients.

        Raises:
            CannotListen: another process does.
        """
        if address.port is None:
            refuse_served(address)
            shared = [self._bound_path(address)]
            self._listeners[address] = [shared] * places
            return address
        # Alone, to check that it is free. A port chosen by the kernel is kept while ours are bound to it by number: a
        # socket that got it by the kernel's choice loses it when it stops listening.
        with bind(address, is_shared=not address.port) as first:
            if address.port:
                first.close()
            address = Endpoint(address.host, address.port or first.getsockname()[1])
            bound: list[Sequence[socket.socket]] = []
            self._listeners[address] = bound
            bound.extend(bind_all(address) for _ in range(places))
        return address

    def _bound_path(self, address: Endpoint) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        try:
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISSOCK(os.stat(address.host).st_mode):
                    os.unlink(address.host)  # a killed process left it behind
            sock.bind(address.host)
        except OSError as error:
            sock.close()
            raise CannotListen(address, error) from error
        self._paths.append((address.host, os.stat(address.host).st_ino))
        return sock

    def _with_status_port(self, settings: Settings) -> Settings:
        address = settings.status.address
        if address is None:
            return settings
        try:
            # Alone first: a port that any process may share could be shared with another gateway.
            with bind(address, is_dual_stack=True) as alone:
                address = Endpoint(address.host, alone.getsockname()[1])
            address = self._hold(address, is_dual_stack=True)
        except OSError as error:
            if "status.address" in settings.origins:
                raise
            logger.warning("no status port: address in use", extra={"address": str(address), "error": str(error)})
            address = None
        return msgspec.structs.replace(settings, status=msgspec.structs.replace(settings.status, address=address))

    def _worker_status_ports(self) -> Sequence[int]:
        if self.settings.status.address is None:
            return ()
        held = [self._hold(Endpoint(LOOPBACK, 0)) for _ in range(self.settings.workers)]
        return [address.port for address in held if address.port is not None]

    def _hold(self, address: Endpoint, *, is_dual_stack: bool = False) -> Endpoint:
        """Bind an address, without listening, while this object is in use."""
        sock = bind(address, is_shared=True, is_dual_stack=is_dual_stack)
        self._held.append(sock)
        return Endpoint(address.host, sock.getsockname()[1])


def _close_all(sockets: Iterable[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def bind_all(address: Endpoint) -> Sequence[socket.socket]:
    """Bind a socket that is shared (SO_REUSEPORT) to each address of a host: a name may have several.

    Raises:
        CannotListen: one of them cannot be bound.
    """
    bound: list[socket.socket] = []
    try:
        bound.extend(_bound(resolved, is_shared=True, is_dual_stack=False) for resolved in _resolved(address))
    except OSError as error:
        _close_all(bound)
        raise CannotListen(address, error) from error
    return bound


def bind(address: Endpoint, *, is_shared: bool = False, is_dual_stack: bool = False) -> socket.socket:
    """Bind a TCP socket to `address`, without listening. The caller closes it.

    Args:
        address: with a port; 0: the kernel chooses.
        is_shared: other sockets that ask for it may bind the same port (SO_REUSEPORT).
        is_dual_stack: [::] takes IPv4 too, if the system allows it. Otherwise 0.0.0.0 and [::] are two addresses.

    Raises:
        CannotListen: the address cannot be bound, or its host has none.
    """
    try:
        return _bound(_resolved(address)[0], is_shared=is_shared, is_dual_stack=is_dual_stack)
    except OSError as error:
        raise CannotListen(address, error) from error


_Resolved = tuple[socket.AddressFamily, socket.SocketKind, int, Any]


def _resolved(address: Endpoint) -> Sequence[_Resolved]:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [(family, kind, protocol, name) for family, kind, protocol, _, name in found]


def _bound(resolved: _Resolved, *, is_shared: bool, is_dual_stack: bool) -> socket.socket:
    family, kind, protocol, name = resolved
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6 and not is_dual_stack:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)
    except OSError:
        sock.close()
        raise
    return sock


@contextlib.contextmanager
def naming_settings(settings: Settings) -> Iterator[None]:
    """A failure inside to listen on an address names its setting, and where that was set."""
    try:
        yield
    except CannotListen as error:
        if error.setting:
            raise
        keys = [
            *(
                f"listener.{index}.address"
                for index, one in enumerate(settings.listener)
                if error.address in one.address
            ),
            *(["status.address"] if error.address == settings.status.address else ()),
        ]
        if not keys:
            raise
        origin = settings.origins.get(keys[0], "default")
        raise CannotListen(error.address, error, f"{keys[0]} ({origin})") from error


def with_addresses_of(settings: Settings, here: Settings) -> Settings:
    """`settings`, but at the addresses of `here`, which may have been adapted to the machine.

    Raises:
        ValueError: they have other listeners.
    """
    listeners = tuple(
        msgspec.structs.replace(listener, address=now.address)
        for listener, now in zip(settings.listener, here.listener, strict=True)
    )
    return msgspec.structs.replace(settings, listener=listeners, status=here.status)


def with_present_addresses(settings: Settings) -> Settings:
    """Leave out the default listener's IPv6 loopback on a machine without IPv6, like many containers."""
    try:
        bind(Endpoint("::1", 0)).close()
    except OSError:
        return without_ipv6_loopback(settings)
    return settings


def without_ipv6_loopback(settings: Settings) -> Settings:
    """Leave out the default listener's IPv6 loopback.

    Addresses that the operator set stay: a missing one of them is an error.
    """
    listeners = tuple(
        listener
        if f"listener.{index}.address" in settings.origins
        else msgspec.structs.replace(listener, address=tuple(each for each in listener.address if each.host != "::1"))
        for index, listener in enumerate(settings.listener)
    )
    return msgspec.structs.replace(settings, listener=listeners)
