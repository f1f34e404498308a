"""The listening side as a whole: sockets, the count of connections, and the way they all end."""

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from otel_smtp.forwarding.base import Forwarder
from otel_smtp.net import Listener, Stream, listen
from otel_smtp.observing import ConnectionInfo, Endpoint, Observer
from otel_smtp.server.connection import Connection, ListenerPolicy, is_in
from otel_smtp.server.failure_rate import FailureRate
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import IllegalTransition, TlsMode

logger: Final = logging.getLogger("otel_smtp.server.listener")


@dataclass(frozen=True, slots=True)
class Listening:
    """One listener: how it speaks, and where. An address without a port is the path of a unix socket."""

    policy: ListenerPolicy
    addresses: tuple[Endpoint, ...]


class Server:
    """Accepts connections on all listeners and serves each in a task of its own.

    Args:
        listeners: what to listen on.
        forwarder: where accepted mail goes.
        observer: told of every accepted socket, refused ones too.
        connections: how many at once, over all listeners; more are refused with 421.
        connections_per_client: how many at once from one address that is not loopback.
        stress_percent: of `connections`; while more are taken, idle ones give way sooner. Postfix shortens its timers
            when its processes run out; ours, before that.
        auth_failures_per_minute: failed logins from one address that is not loopback, then it is refused.
        reuse_port: let several processes listen on the same port.
    """

    def __init__(
        self,
        listeners: Sequence[Listening],
        forwarder: Forwarder,
        observer: Observer,
        *,
        connections: int,
        connections_per_client: int,
        stress_percent: int = 80,
        auth_failures_per_minute: int = 10,
        reuse_port: bool = False,
    ) -> None:
        self._listeners = listeners
        self._forwarder = forwarder
        self._observer = observer
        self._limit = connections
        self._limit_per_client = connections_per_client
        self._stress_percent = stress_percent
        self._reuse_port = reuse_port
        self._listening: list[Listener] = []
        self._tasks: dict[asyncio.Task[None], Connection] = {}
        self._per_client: Counter[str] = Counter()
        self._auth_failures = FailureRate(limit=auth_failures_per_minute)
        self._illegal_steps = 0
        self.is_draining = False

    @property
    def is_stressed(self) -> bool:
        """Whether so many of the allowed connections are taken that idle ones must give way."""
        return len(self._tasks) * 100 > self._limit * self._stress_percent

    @property
    def illegal_steps(self) -> int:
        """State steps that the table does not hold: bugs of ours, counted since the start."""
        return self._illegal_steps

    async def start(self) -> dict[str, list[Endpoint]]:
        """Bind and listen.

        Returns:
            The addresses of each listener by its name, with the ports that the kernel chose for port 0.

        Raises:
            OSError: an address cannot be bound; nothing is left listening.
        """
        bound: dict[str, list[Endpoint]] = {}
        try:
            for listening in self._listeners:
                addresses = bound.setdefault(listening.policy.name, [])
                for address in listening.addresses:
                    listener = await self._listen(listening.policy, address)
                    self._listening.append(listener)
                    addresses.extend(listener.addresses)
        except OSError:
            self.stop_accepting()
            raise
        return bound

    def stop_accepting(self) -> None:
        """Close the listening sockets; open connections go on."""
        for listener in self._listening:
            listener.close()
        self._listening.clear()

    async def drain(self, grace_seconds: float) -> None:
        """End all connections: idle ones at once with 421, those in a transaction after it, the rest when the grace is
        over."""
        self.is_draining = True
        self.stop_accepting()
        for connection in self._tasks.values():
            connection.drain()
        if self._tasks and grace_seconds > 0:
            await asyncio.wait(list(self._tasks), timeout=grace_seconds)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)

    def may_authenticate(self, client: Endpoint) -> bool:
        """Whether this address has not failed to authenticate too often.

        Loopback and unix sockets always may: they are many applications, and one with a wrong password must not shut
        the others out. The limit per connection holds for them too.
        """
        return _countable(client) is None or not self._auth_failures.is_exceeded(
            client.host, asyncio.get_running_loop().time()
        )

    def auth_failed(self, client: Endpoint) -> None:
        """Count a failed AUTH against its address."""
        self._auth_failures.count(client.host, asyncio.get_running_loop().time())

    async def _listen(self, policy: ListenerPolicy, address: Endpoint) -> Listener:
        acceptor = self._acceptor(policy)
        if address.port is None:
            return await listen(acceptor, path=address.host)
        return await listen(acceptor, host=address.host, port=address.port, reuse_port=self._reuse_port)

    def _acceptor(self, policy: ListenerPolicy) -> Callable[[Stream], None]:
        def accept(stream: Stream) -> None:
            self._accept(policy, stream)

        return accept

    def _accept(self, policy: ListenerPolicy, stream: Stream) -> None:
        info = ConnectionInfo(
            id=os.urandom(16).hex(),
            peer=stream.peer,
            local=stream.local,
            listener=policy.name,
            protocol="lmtp" if policy.protocol.is_lmtp else "smtp",
            transport="tcp" if stream.peer.port is not None else "unix",
            tls_mode=policy.protocol.tls_mode,
        )
        if policy.protocol.tls_mode is TlsMode.IMPLICIT or policy.proxy_protocol_from:
            # What comes first is for the TLS layer, or is a PROXY header and not one octet more.
            stream.pause_reading()
        # Behind a balancer the client is not known before its PROXY header; see `admit`.
        client = None if is_in(policy.proxy_protocol_from, stream.peer.host) else _countable(stream.peer)
        refusal = self._capacity_refusal(client)
        connection = Connection(
            stream,
            info,
            policy,
            self._forwarder,
            self._observer.connection_opened(info),
            self,
            refusal=refusal,
            on_illegal=self._note_illegal,
        )
        task = asyncio.get_running_loop().create_task(connection.run(), name=f"connection {info.id}")
        was_stressed = self.is_stressed
        self._tasks[task] = connection
        if self.is_stressed and not was_stressed:
            for other in self._tasks.values():
                other.hurry()
        if client is not None:
            self._per_client[client] += 1
        task.add_done_callback(self._forget(client))

    def admit(self, connection: Connection, client: Endpoint) -> Reply | None:
        """Count a client that its PROXY header named; the refusal, where it has too many connections."""
        host = _countable(client)
        if host is None:
            return None
        if self._per_client[host] >= self._limit_per_client:
            self._observer.connection_refused("client_limit")
            return replies.TOO_MANY_CONNECTIONS
        self._per_client[host] += 1
        task = next(task for task, served in self._tasks.items() if served is connection)
        task.add_done_callback(lambda _: self._leave(host))
        return None

    def _leave(self, client: str) -> None:
        self._per_client[client] -= 1
        if not self._per_client[client]:
            del self._per_client[client]

    def _capacity_refusal(self, client: str | None) -> Reply | None:
        if self.is_draining:
            return replies.SHUTTING_DOWN
        if len(self._tasks) >= self._limit:
            self._observer.connection_refused("capacity")
            return replies.TOO_MANY_CONNECTIONS
        if client is not None and self._per_client[client] >= self._limit_per_client:
            self._observer.connection_refused("client_limit")
            return replies.TOO_MANY_CONNECTIONS
        return None

    def _forget(self, client: str | None) -> Callable[[asyncio.Task[None]], None]:
        def forget(task: asyncio.Task[None]) -> None:
            self._tasks.pop(task, None)
            if client is not None:
                self._leave(client)
            with contextlib.suppress(asyncio.CancelledError):
                if (error := task.exception()) is not None:
                    logger.error("connection task failed", exc_info=error)

        return forget

    def _note_illegal(self, step: IllegalTransition) -> None:
        self._illegal_steps += 1
        logger.error("illegal state step", extra={"from_state": str(step.previous), "to_state": str(step.state)})


def _countable(peer: Endpoint) -> str | None:
    """The address that connections are counted by; None for loopback and unix sockets, which are never limited."""
    if peer.port is None or peer.host == "::1" or peer.host.startswith(("127.", "::ffff:127.")):
        return None
    return peer.host
