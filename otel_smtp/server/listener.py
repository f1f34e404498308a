"""The server side as a whole: sockets, the number of connections, and shutdown."""

import asyncio
import logging
import os
import socket
import time
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from otel_smtp.forwarding.base import Forwarder
from otel_smtp.net import Listener, Stream, Sweep, listen, refuse_served
from otel_smtp.observing import ConnectionInfo, ConnectionRecord, Endpoint, FanOut, Observer, fan_out
from otel_smtp.server.conversation import Conversation
from otel_smtp.server.guesses import Guesses
from otel_smtp.server.places import IN_LINE_SECONDS, Admittance, Places
from otel_smtp.server.policy import ListenerPolicy, Segments, is_in, is_loopback
from otel_smtp.server.session import Session
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import IllegalTransition

# How many older connections are looked up with each newcomer, so that all owners are known before the places run out,
# without holding up the event loop.
NAMED_WITH_EACH: Final = 2
# Sessions that look at the clock per turn of the event loop: a tenth of a millisecond.
LOOKS_A_TURN: Final = 64
# How often all of them do; in between, a sweep asks only those for which something may be due before.
ALL_LOOK_SECONDS: Final = 5.0
# Consecutive readings of two clocks differ by less. Connections share the offset until the clock is set.
SAME_OFFSET_NS: Final = 10_000

logger: Final = logging.getLogger("otel_smtp.server.listener")


@dataclass(frozen=True, slots=True)
class ListenerSpec:
    """One listener: its policy and address. An address without a port is the path of a unix socket."""

    policy: ListenerPolicy
    addresses: tuple[Endpoint, ...]


class Server:
    """Accepts connections on all listeners and serves each by a `Session`.

    Args:
        listeners: what to listen on.
        forwarder: where accepted mail goes.
        observer: is given every accepted socket, refused ones too.
        connections: the most at once, over all listeners; see `Places` for how they are shared out.
        connections_per_client: the most at once from one address, loopback excepted.
        stress_percent: of `connections`; while more are taken, idle ones give way sooner. Postfix shortens its timers
            when its processes run out; we do before that.
        auth_failures_per_minute: failed logins from one address, loopback excepted, after which it is refused.
        inherited: bound sockets to listen on, by address; a parent process keeps them, too.
        segments: where to cut the records of connections.
        sweep: the process's deadline sweep.

    Attributes:
        forwarder, observer, segments: see above.
        guesses: failed logins and turns.
        is_draining: the gateway shuts down.
    """

    def __init__(
        self,
        listeners: Sequence[ListenerSpec],
        forwarder: Forwarder,
        observer: Observer,
        *,
        connections: int,
        connections_per_client: int,
        stress_percent: int = 80,
        auth_failures_per_minute: int = 10,
        inherited: Mapping[Endpoint, Sequence[socket.socket]] | None = None,
        segments: Segments | None = None,
        sweep: Sweep | None = None,
    ) -> None:
        self.forwarder = forwarder
        self.observer = observer if isinstance(observer, FanOut) else fan_out([observer])
        self.is_draining = False
        self._listeners = listeners
        self._inherited = inherited or {}
        self._sweep = sweep or Sweep()
        self._listening: list[Listener] = []
        self._sessions: dict[Conversation, None] = {}  # in the order in which they were accepted
        self._soon: dict[Conversation, None] = {}  # sessions to check at the next sweep
        self._all_look_at = 0.0  # when all do
        self._places: Places[Conversation] = Places(connections)
        self._nameless: deque[Conversation] = deque()  # whose owner is still unknown
        self._names_all = False  # `_nameless` has all of those
        self._line: OrderedDict[Session, float] = OrderedDict()  # newcomers that wait for a place; until when
        self._serves_line = False  # a call that does is under way
        self._waiting: OrderedDict[Conversation, None] = OrderedDict()  # for their turn
        self._gives_turns = False  # a call that gives the next one is under way
        self._all_ended: asyncio.Future[None] | None = None
        self._per_client: Counter[str] = Counter()
        self._wall_offset_ns = 0
        self.guesses = Guesses(auth_failures_per_minute)
        self.hold_to(
            [listener.policy for listener in listeners],
            connections=connections,
            connections_per_client=connections_per_client,
            stress_percent=stress_percent,
            auth_failures_per_minute=auth_failures_per_minute,
            segments=segments or Segments(),
        )
        self.offer = forwarder.capabilities  # bound once, as each session keeps it

    def hold_to(
        self,
        policies: Iterable[ListenerPolicy],
        *,
        connections: int,
        connections_per_client: int,
        stress_percent: int,
        auth_failures_per_minute: int,
        segments: Segments,
    ) -> None:
        """Apply new policies, by the listeners' names. Connections keep the policy under which they were accepted.

        Args:
            connections, connections_per_client, stress_percent, auth_failures_per_minute, segments: see above.
        """
        self._policies = {policy.name: policy for policy in policies}
        self._limit = self._places.most = connections
        self._limit_per_client = connections_per_client
        self._stress_percent = stress_percent
        self.guesses.hold_to(auth_failures_per_minute)
        self.segments = segments
        self._all_look_at = 0.0  # what was not due may be now

    @property
    def is_stressed(self) -> bool:
        """Whether enough connections are open for idle ones to give way sooner."""
        return len(self._sessions) * 100 > self._limit * self._stress_percent

    def open_connections(self) -> Iterator[ConnectionRecord]:
        """The records of the open connections, the oldest first."""
        return (session.record for session in self._sessions)

    async def start(self) -> dict[str, list[Endpoint]]:
        """Bind and listen.

        Returns:
            The addresses of each listener by its name, with the ports that the kernel chose for port 0.

        Raises:
            OSError: an address cannot be bound; nothing is left listening.
        """
        bound: dict[str, list[Endpoint]] = {}
        try:
            for listener in self._listeners:
                addresses = bound.setdefault(listener.policy.name, [])
                for address in listener.addresses:
                    async for listening in self._listen(listener.policy.name, address):
                        self._listening.append(listening)
                        addresses.extend(listening.addresses)
        except OSError:
            await self._stop_listening()
            raise
        return bound

    async def leave_ports(self) -> None:
        """Stop accepting: a successor does, on the sockets that both have inherited. Open connections continue."""
        while self._listening:
            await self._listening.pop().leave()

    async def _stop_listening(self) -> None:
        while self._listening:
            await self._listening.pop().close()

    async def drain(self, grace_seconds: float) -> None:
        """End all connections: idle ones at once with 421, those in a transaction after it, the rest when the grace
        period is over.
        """
        self.is_draining = True
        await self._stop_listening()
        while self._line:
            self._end_wait(self._line.popitem(last=False)[0], replies.SHUTTING_DOWN)
        for session in list(self._sessions):
            session.drain()
        if self._sessions and grace_seconds > 0:
            await self._wait_for_the_last(grace_seconds)
        for session in list(self._sessions):
            session.cancel()
        if self._sessions:
            await self._wait_for_the_last(None)

    async def _wait_for_the_last(self, timeout_seconds: float | None) -> None:
        self._all_ended = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._all_ended], timeout=timeout_seconds)

    # Questions of sessions -------------------------------------------------------------------------------------------

    def may_authenticate(self, client: Endpoint) -> bool:
        """Whether this address may authenticate: false after too many failures.

        Loopback and unix sockets always may: they stand for many applications, and one with a wrong password must not
        shut the others out. The limit per connection applies to them too, and they wait for turns: see `guesses`.
        """
        return _countable(client) is None or not self.guesses.are_too_many(client.host)

    def admit(self, session: Conversation, client: Endpoint) -> Reply | None:
        """Count a client named by its PROXY header; returns the refusal if it has too many connections."""
        host = _countable(client)
        if self._places.are_scarce(len(self._sessions)):
            if session.share:
                self._places.remove(session.share)  # that of the balancer
            session.learn_share(is_local=host is None)
            self._places.add(session.share)
        if host is None:
            return None
        if self._per_client[host] >= self._limit_per_client:
            self.observer.connection_refused("client_limit")
            return replies.TOO_MANY_CONNECTIONS
        self._count(session, host)
        return None

    @staticmethod
    def illegal_step(step: IllegalTransition) -> None:
        """A state step that is not in the table: a bug of ours, which costs no client its connection."""
        logger.error("illegal state step", extra={"from_state": str(step.previous), "to_state": str(step.state)})

    def wait_turn(self, session: Conversation) -> None:
        """Let a session continue later. All pipelining sessions share one turn per turn of the event loop, so they wait
        for each other, and no others for them.
        """
        self._waiting[session] = None
        if not self._gives_turns:
            self._gives_turns = True
            asyncio.get_running_loop().call_soon(self._give_turn)

    def _give_turn(self) -> None:
        try:
            while self._waiting:
                session, _ = self._waiting.popitem(last=False)
                if session.take_turn():
                    break
        finally:
            self._gives_turns = bool(self._waiting)
            if self._gives_turns:
                asyncio.get_running_loop().call_soon(self._give_turn)

    def ended(self, session: Conversation) -> None:
        """A session is over and frees its place. Idempotent."""
        if session not in self._sessions:
            return
        del self._sessions[session]
        self._soon.pop(session, None)
        if session.share:
            self._places.remove(session.share)
        host = session.client_counted
        if host is not None:
            self._per_client[host] -= 1
            if not self._per_client[host]:
                del self._per_client[host]
        if self._line:
            self._serve_line_soon()
        elif not self._sessions:
            self._sweep.remove(self._look_at_clock)
            if self._all_ended is not None and not self._all_ended.done():
                self._all_ended.set_result(None)

    # Accepting ---------------------------------------------------------------------------------------------------

    async def _listen(self, name: str, address: Endpoint) -> AsyncIterator[Listener]:
        acceptor = self._acceptor(name)
        if (inherited := self._inherited.get(address)) is not None:
            for sock in inherited:
                yield await listen(acceptor, sock=sock)
        elif address.port is None:
            refuse_served(address)
            yield await listen(acceptor, path=address.host)
        else:
            yield await listen(acceptor, host=address.host, port=address.port)

    def _acceptor(self, name: str) -> Callable[[Stream], None]:
        def accept(stream: Stream) -> None:
            self.accept(self._policies[name], stream)

        return accept

    def accept(self, policy: ListenerPolicy, stream: Stream) -> Session:
        """Serve an accepted connection."""
        info = ConnectionInfo(
            id=os.urandom(16).hex(),
            peer=stream.peer,
            local=stream.local,
            listener=policy.name,
            protocol="lmtp" if policy.protocol.is_lmtp else "smtp",
            transport="tcp" if stream.peer.port is not None else "unix",
            tls_mode=policy.protocol.tls_mode,
        )
        now_ns = time.monotonic_ns()
        wall_offset_ns = time.time_ns() - now_ns
        if abs(wall_offset_ns - self._wall_offset_ns) > SAME_OFFSET_NS:
            self._wall_offset_ns = wall_offset_ns
        session = Session(stream, ConnectionRecord(info, now_ns, self._wall_offset_ns), policy, self)
        # Behind a balancer the client is unknown before its PROXY header; see `admit`.
        is_proxied = is_in(policy.proxy_protocol_from, stream.peer.host)
        client = None if is_proxied else _countable(stream.peer)
        if not self._places.are_scarce(len(self._sessions)):
            self._names_all = False
        elif not is_proxied:
            self._learn_shares(session, is_local=client is None)
        refusal = self._refusal(client)
        if refusal is None and (self._line or len(self._sessions) >= self._limit):
            verdict = self._make_room(session, len(self._line))
            if verdict is Admittance.WAIT:
                session.wait_in_line()
                self._line[session] = asyncio.get_running_loop().time() + IN_LINE_SECONDS
                return session
            if verdict is Admittance.REFUSE:
                self.observer.connection_refused("capacity")
                refusal = replies.TOO_MANY_CONNECTIONS
        self._take_in(session, client, refusal)
        return session

    def _take_in(self, session: Session, client: str | None, refusal: Reply | None) -> None:
        was_stressed = self.is_stressed
        self._sessions[session] = None
        if session.share:
            self._places.add(session.share)
        self._sweep.add(self._look_at_clock)
        if client is not None:
            self._count(session, client)
        if self.is_stressed and not was_stressed:
            # Idle ones whose shorter time is already over give way at once.
            self._all_look_at = 0.0
            self._look_at_clock(asyncio.get_running_loop().time())
        session.begin(refusal)
        if session.look_at_clock(asyncio.get_running_loop().time(), self._all_look_at):
            self._soon[session] = None

    def _count(self, session: Conversation, client: str) -> None:
        self._per_client[client] += 1
        session.client_counted = client

    def _refusal(self, client: str | None) -> Reply | None:
        """The refusal of a newcomer for a reason other than lack of places."""
        if self.is_draining:
            return replies.SHUTTING_DOWN
        if client is not None and self._per_client[client] >= self._limit_per_client:
            self.observer.connection_refused("client_limit")
            return replies.TOO_MANY_CONNECTIONS
        return None

    # Places ------------------------------------------------------------------------------------------------------

    def _learn_shares(self, newcomer: Conversation, *, is_local: bool) -> None:
        """Look up a newcomer's share, and a few older ones', before the places run out."""
        newcomer.learn_share(is_local=is_local)
        if not self._names_all:
            self._names_all = True
            self._nameless = deque(session for session in self._sessions if not session.share)
        for _ in range(min(NAMED_WITH_EACH, len(self._nameless))):
            session = self._nameless.popleft()
            if session in self._sessions and not session.share:
                session.learn_share(is_local=_countable(session.record.client) is None)
                self._places.add(session.share)

    def _make_room(self, newcomer: Session, before: int) -> Admittance:
        """Give a newcomer a free place, or that of a connection that gives way."""
        now = asyncio.get_running_loop().time()
        judged = self._places.judge(newcomer, self._sessions, before, now)
        if isinstance(judged, Admittance):
            return judged
        self.observer.connection_refused("gave_way")
        judged.give_way()
        return Admittance.ADMIT

    def _serve_line_soon(self) -> None:
        if not self._serves_line:
            self._serves_line = True
            asyncio.get_running_loop().call_soon(self._serve_line)

    def _serve_line(self) -> None:
        """Admit waiting newcomers, in order, while there are places."""
        self._serves_line = False
        now = asyncio.get_running_loop().time()
        while self._line:
            session, until = next(iter(self._line.items()))
            verdict = self._make_room(session, 0)
            if verdict is not Admittance.ADMIT and now < until:
                break
            del self._line[session]
            if verdict is not Admittance.ADMIT:
                self.observer.connection_refused("capacity")
            self._end_wait(session, None if verdict is Admittance.ADMIT else replies.TOO_MANY_CONNECTIONS)

    def _end_wait(self, session: Session, refusal: Reply | None) -> None:
        session.leave_line()
        self._take_in(session, None, refusal)  # only those on this machine wait

    def _look_at_clock(self, now: float) -> None:
        looking = self._soon
        if now >= self._all_look_at:
            self._all_look_at = now + ALL_LOOK_SECONDS
            looking = self._sessions
        self._soon = {}
        self._look_at(deque(looking), now, self._all_look_at)

    def _look_at(self, left: deque[Conversation], now: float, until: float) -> None:
        """Let some sessions look at the clock, and the others in the next turns, so that mail continues meanwhile."""
        for _ in range(min(len(left), LOOKS_A_TURN)):
            session = left.popleft()
            if session.look_at_clock(now, until):
                self._soon[session] = None
        if left:
            asyncio.get_running_loop().call_soon(self._look_at, left, now, until)
        elif self._line:
            self._serve_line_soon()


def _countable(peer: Endpoint) -> str | None:
    """The address under which connections are counted; None for loopback and unix sockets, which are never limited."""
    if peer.port is None or is_loopback(peer.host):
        return None
    return peer.host
