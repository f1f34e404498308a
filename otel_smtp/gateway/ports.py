"""The addresses of a gateway before its rooms bind them: what this machine has, and ports that processes share.

The kernel spreads connections over several processes only where each binds the same port with SO_REUSEPORT. So the
parent picks the ports and holds them, bound and not listening, while its workers start.
"""

import contextlib
import logging
import socket
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from otel_smtp.config import Settings
from otel_smtp.net import CannotListen, refuse_served
from otel_smtp.observing import Endpoint

logger: Final = logging.getLogger("otel_smtp.gateway.ports")

LOOPBACK: Final = "127.0.0.1"


class SharedPorts:
    """Ports that all workers of a gateway bind.

    Use as a context manager around the workers' lives; on leaving, the ports are free.

    Args:
        settings: of the gateway; its ports may be 0.

    Raises:
        CannotListen: an address cannot be bound, and the operator asked for it.

    Attributes:
        settings: the same, with real ports, and without a status port where its default is taken.
        worker_status_ports: a port on the loopback for each worker's status; () where there is no status port.
    """

    def __init__(self, settings: Settings) -> None:
        self._held: list[socket.socket] = []
        try:
            with naming_settings(settings):
                self.settings = self._with_listener_ports(self._with_status_port(settings))
            self.worker_status_ports = self._worker_status_ports()
        except BaseException:
            self._close()
            raise

    def adopt(self, settings: Settings) -> None:
        """Take other settings for the workers that are started from now on; the ports stay as they are."""
        self.settings = with_addresses_of(settings, self.settings)

    def __enter__(self) -> "SharedPorts":
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        for sock in self._held:
            sock.close()

    def _with_listener_ports(self, settings: Settings) -> Settings:
        listeners = tuple(
            msgspec.structs.replace(listener, address=tuple(self._hold_alone(address) for address in listener.address))
            for listener in settings.listener
        )
        return msgspec.structs.replace(settings, listener=listeners)

    def _hold_alone(self, address: Endpoint) -> Endpoint:
        """`_hold`, if no other process serves the address: a port that any process of this user may share would be
        shared with another gateway, too, and each would get some of the clients.

        Raises:
            CannotListen: somebody does.
        """
        if address.port is None:
            refuse_served(address)
        elif address.port:
            bind(address).close()
        return self._hold(address)

    def _with_status_port(self, settings: Settings) -> Settings:
        address = settings.status.address
        if address is None:
            return settings
        try:
            # Alone first: a port that any process may share would be shared with another gateway, too.
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
        """Bind an address for as long as this object is in use; a unix socket's path is left to the workers."""
        if address.port is None:
            return address
        sock = bind(address, is_shared=True, is_dual_stack=is_dual_stack)
        self._held.append(sock)
        return Endpoint(address.host, sock.getsockname()[1])


def bind(address: Endpoint, *, is_shared: bool = False, is_dual_stack: bool = False) -> socket.socket:
    """Bind a TCP socket to `address`, without listening. The caller closes it.

    Args:
        address: with a port; 0: the kernel chooses.
        is_shared: other sockets that ask for it may bind the same port (SO_REUSEPORT).
        is_dual_stack: [::] takes IPv4 too, where the system allows it. Otherwise 0.0.0.0 and [::] are two addresses.

    Raises:
        CannotListen: the address cannot be bound, or its host has none.
    """
    try:
        return _bound(address, is_shared=is_shared, is_dual_stack=is_dual_stack)
    except OSError as error:
        raise CannotListen(address, error) from error


def _bound(address: Endpoint, *, is_shared: bool, is_dual_stack: bool) -> socket.socket:
    family, kind, protocol, _, name = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
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
    """Within, a failure to listen on an address names the setting that holds it, and where that was set."""
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
    """Leave out the default listener's IPv6 loopback on a machine without IPv6, as many containers are."""
    try:
        bind(Endpoint("::1", 0)).close()
    except OSError:
        return without_ipv6_loopback(settings)
    return settings


def without_ipv6_loopback(settings: Settings) -> Settings:
    """Leave out the default listener's IPv6 loopback.

    Addresses that the operator set stay as they are: there, a missing one is an error.
    """
    listeners = tuple(
        listener
        if f"listener.{index}.address" in settings.origins
        else msgspec.structs.replace(listener, address=tuple(each for each in listener.address if each.host != "::1"))
        for index, listener in enumerate(settings.listener)
    )
    return msgspec.structs.replace(settings, listener=listeners)
