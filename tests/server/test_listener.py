"""The listening side over real sockets: limits, refusals, the drain."""

import asyncio
import ipaddress
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import argon2
import pytest

from otel_smtp.net import Stream
from otel_smtp.observing import Endpoint
from otel_smtp.server import conversation, listener
from otel_smtp.server.exchanges import Authenticator
from otel_smtp.server.listener import ListenerSpec, Server
from otel_smtp.server.policy import ListenerPolicy, ServerTimeouts
from otel_smtp.server.session import Session
from otel_smtp.server.users import Argon2Hash, Users
from otel_smtp.smtp import replies
from otel_smtp.smtp.policy import ServerPolicy
from otel_smtp.smtp.states import CloseReason
from tests.server.keeping import KeepingForwarder, Noting
from tests.support.clock import advance
from tests.support.waiting import until

POLICY = ListenerPolicy(
    "local", ServerPolicy("gw.example.com"), ServerTimeouts(), allow=(ipaddress.ip_network("127.0.0.0/8"),)
)
LOOPBACK = Endpoint("127.0.0.1", 0)
MESSAGE = b"EHLO c\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\nSubject: x\r\n\r\ny\r\n.\r\n"


@dataclass
class Running:
    server: Server
    forwarder: KeepingForwarder
    seen: Noting
    address: Endpoint
    clients: list[asyncio.StreamWriter] = field(default_factory=list)
    readers: list[asyncio.StreamReader] = field(default_factory=list)

    async def connect(self, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self.address.host, self.address.port
        if port is None:
            reader, writer = await asyncio.open_unix_connection(host)
        else:
            reader, writer = await asyncio.open_connection(host, port, local_addr=(source, 0))
        self.clients.append(writer)
        self.readers.append(reader)
        return reader, writer

    async def disconnect(self) -> None:
        for writer in self.clients:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


@asynccontextmanager
async def running(
    address: Endpoint = LOOPBACK,
    *,
    connections: int = 8,
    connections_per_client: int = 4,
    policy: ListenerPolicy = POLICY,
) -> AsyncIterator[Running]:
    forwarder, seen = KeepingForwarder(), Noting()
    server = Server(
        [ListenerSpec(policy, (address,))],
        forwarder,
        seen,
        connections=connections,
        connections_per_client=connections_per_client,
    )
    ((address,),) = (await server.start()).values()
    gateway = Running(server, forwarder, seen, address)
    try:
        yield gateway
    finally:
        await server.drain(0)
        await gateway.disconnect()


async def test_connections_share_the_offset_of_the_clocks_until_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"wall": 1_700_000_000_000_000_000, "monotonic": 5_000_000_000}
    async with running() as gateway:
        monkeypatch.setattr("time.time_ns", lambda: clocks["wall"])
        monkeypatch.setattr("time.monotonic_ns", lambda: clocks["monotonic"])

        async def offset(wall_ns: int, monotonic_ns: int) -> int:
            clocks["wall"] += wall_ns
            clocks["monotonic"] += monotonic_ns
            reader, _ = await gateway.connect()
            assert (await reader.readline()).startswith(b"220 ")
            return gateway.seen.connections[-1].record.wall_offset_ns

        first = await offset(0, 0)
        assert first == 1_700_000_000_000_000_000 - 5_000_000_000
        assert await offset(1_000_900, 1_000_000) is first
        assert await offset(3_000_000_000, 0) == first + 3_000_000_900
        assert await offset(-60_000_000_000, 0) == first - 56_999_999_100


@pytest.mark.both_loops
async def test_a_connection_beyond_the_limit_is_refused_with_a_trace_of_its_own() -> None:
    async with running(connections=2) as gateway:
        first = await gateway.connect()
        second = await gateway.connect()
        assert (await first[0].readline()).startswith(b"220 ")
        assert (await second[0].readline()).startswith(b"220 ")
        third = await gateway.connect()
        assert await third[0].read() == b"421 4.3.2 Too many connections\r\n"
        await until(lambda: gateway.seen.connections[2].close_reason)
        assert gateway.seen.connections[2].states == "New Error Closed"
        assert gateway.seen.connections[2].close_reason is CloseReason.REFUSED
        assert gateway.seen.refused == ["capacity"]
        first[1].close()
        await until(lambda: gateway.seen.connections[0].close_reason)
        fourth = await gateway.connect()
        assert (await fourth[0].readline()).startswith(b"220 ")


@pytest.mark.both_loops
async def test_who_is_still_sending_learns_why_it_is_closed_on() -> None:
    async with running() as gateway:
        reader, writer = await gateway.connect()
        assert (await reader.readline()).startswith(b"220 ")
        writer.write(b"FROBNICATE\r\n" * 60_000)
        # An error of the connection would be raised here.
        said = await reader.read()
        assert said.endswith(replies.TOO_MANY_ERRORS.wire)
        assert len(gateway.seen.connections) == 1
        assert gateway.seen.connections[0].close_reason is CloseReason.TOO_MANY_ERRORS


@pytest.mark.both_loops
async def test_a_client_with_bare_line_feeds_learns_why_it_is_closed_on() -> None:
    async with running() as gateway:
        reader, writer = await gateway.connect()
        assert (await reader.readline()).startswith(b"220 ")
        writer.write(b"EHLO x\n" + b"MAIL FROM:<a@example.com>\n" * 60_000)
        assert await reader.read() == replies.BARE_LINE_FEED.wire
        assert gateway.seen.connections[0].close_reason is CloseReason.PROTOCOL_MISMATCH


@pytest.mark.movable_clock
async def test_when_most_connections_are_taken_those_that_idled_for_long_give_way() -> None:
    async with running(connections=5) as gateway:
        clients = [await gateway.connect() for _ in range(4)]
        for reader, _ in clients:
            assert (await reader.readline()).startswith(b"220 ")
        advance(20)
        clients[0][1].write(b"NOOP\r\n")
        assert await clients[0][0].readline() == replies.OK.wire
        assert not gateway.server.is_stressed
        newcomer, _ = await gateway.connect()
        assert (await newcomer.readline()).startswith(b"220 ")
        assert [seen.close_reason for seen in gateway.seen.connections] == [None, *[CloseReason.TIMEOUT] * 3, None]
        for reader, _ in clients[1:]:
            assert await reader.read() == replies.TIMED_OUT.wire
        clients[0][1].write(b"NOOP\r\n")
        assert await clients[0][0].readline() == replies.OK.wire


@pytest.mark.movable_clock
async def test_all_sessions_look_at_the_clock_and_few_of_them_in_one_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "LOOKS_A_TURN", 2)
    turn = 0
    looked: list[int] = []
    look_at_clock = Session.look_at_clock

    def look(session: Session, now: float, until: float) -> bool:
        looked.append(turn)
        return look_at_clock(session, now, until)

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        asyncio.get_running_loop().call_soon(next_turn)

    async with running(connections=100) as gateway:
        clients = [await gateway.connect() for _ in range(5)]
        for reader, _ in clients:
            assert (await reader.readline()).startswith(b"220 ")
        next_turn()
        monkeypatch.setattr(Session, "look_at_clock", look)
        advance(301)
        for reader, _ in clients:
            assert await reader.read() == replies.TIMED_OUT.wire
        assert max(Counter(looked).values()) == 2


async def test_loopback_clients_are_not_limited_one_by_one() -> None:
    async with running(connections=8, connections_per_client=1) as gateway:
        for _ in range(3):
            reader, _writer = await gateway.connect()
            assert (await reader.readline()).startswith(b"220 ")


async def test_a_unix_socket_serves_and_its_clients_may_relay(tmp_path: Path) -> None:
    async with running(Endpoint(str(tmp_path / "smtp"))) as gateway:
        reader, writer = await gateway.connect()
        assert (await reader.readline()).startswith(b"220 ")
        writer.write(MESSAGE + b"QUIT\r\n")
        assert b"250 2.0.0 Ok" in await reader.read()
        assert gateway.forwarder.kept[0].is_accepted
        assert gateway.seen.connections[0].info.transport == "unix"


async def test_the_drain_lets_an_open_transaction_end_and_refuses_newcomers() -> None:
    async with running() as gateway:
        idle, busy = await gateway.connect(), await gateway.connect()
        for reader, _ in (idle, busy):
            assert (await reader.readline()).startswith(b"220 ")
        head, _, body = MESSAGE.partition(b"Subject")
        busy[1].write(head)
        await busy[0].readuntil(b"354 ")
        drain = asyncio.create_task(gateway.server.drain(5))
        assert await idle[0].read() == b"421 4.3.2 Shutting down, try again\r\n"
        with pytest.raises(ConnectionError):
            await gateway.connect()
        busy[1].write(b"Subject" + body)
        rest = await busy[0].read()
        assert b"250 2.0.0 Ok" in rest
        assert rest.endswith(b"421 4.3.2 Shutting down, try again\r\n")
        await drain
        assert gateway.forwarder.kept[0].is_accepted


async def test_what_does_not_end_within_the_grace_is_ended_and_nothing_is_accepted() -> None:
    async with running() as gateway:
        reader, writer = await gateway.connect()
        await reader.readline()
        writer.write(MESSAGE.removesuffix(b".\r\n"))
        await reader.readuntil(b"354 ")
        await gateway.server.drain(0.01)
        assert (await reader.read()).endswith(b"421 4.3.2 Shutting down, try again\r\n")
        assert not gateway.forwarder.kept[0].is_accepted
        assert gateway.seen.connections[0].close_reason is CloseReason.SHUTDOWN


async def test_an_address_in_use_leaves_nothing_listening() -> None:
    async with running() as gateway:
        other = Server(
            [ListenerSpec(POLICY, (LOOPBACK, gateway.address))],
            gateway.forwarder,
            gateway.seen,
            connections=1,
            connections_per_client=1,
        )
        with pytest.raises(OSError, match="address already in use"):
            await other.start()


@pytest.mark.both_loops
async def test_hundreds_of_clients_at_once_are_served_each_its_own_mail() -> None:
    async with running(connections=200) as gateway:

        async def one(number: int) -> bytes:
            reader, writer = await gateway.connect()
            await reader.readline()
            writer.write(MESSAGE.replace(b"Subject: x", b"Subject: %d" % number) + b"QUIT\r\n")
            return await reader.read()

        answers = await asyncio.gather(*(one(number) for number in range(150)))
        assert all(b"\r\n250 2.0.0 Ok" in answer for answer in answers)
        subjects = {kept.content.partition(b"Subject: ")[2].split(b"\r\n")[0] for kept in gateway.forwarder.kept}
        assert subjects == {b"%d" % number for number in range(150)}


async def test_bugs_in_some_sessions_cost_the_others_nothing() -> None:
    async with running(connections=100) as gateway:
        step = 0

        def fail(at: str) -> None:
            nonlocal step
            step += at in ("begin", "recipients", "content")
            if step % 7 < 2 and at != "write" and at != "finish":  # now at MAIL, now at RCPT, now at the content
                raise ValueError("bug")

        gateway.forwarder.at = fail

        async def one() -> bytes:
            reader, writer = await gateway.connect()
            await reader.readline()
            writer.write(MESSAGE + b"QUIT\r\n")
            return await reader.read()

        answers = await asyncio.gather(*(one() for _ in range(60)))
        failed = [answer for answer in answers if b"451 4.3.0 Internal error" in answer]
        well = [answer for answer in answers if b"250 2.0.0 Ok trace=" in answer]
        assert len(failed) + len(well) == 60
        assert len(failed) > 10
        assert len(well) > 10
        assert sum(kept.is_accepted for kept in gateway.forwarder.kept) == len(well)
        assert all(answer.endswith(replies.CLOSING.wire) for answer in answers)  # those with a bug too


@pytest.mark.movable_clock
async def test_trickling_clients_are_cut_off_and_delay_nobody() -> None:
    slow = replace(POLICY, timeouts=ServerTimeouts(command=60, data=300))
    async with running(connections=200, policy=slow) as gateway:
        in_command = [await gateway.connect() for _ in range(50)]
        in_data = [await gateway.connect() for _ in range(50)]
        for reader, _ in in_command + in_data:
            assert (await reader.readline()).startswith(b"220 ")
        for reader, writer in in_data:
            writer.write(MESSAGE[: MESSAGE.index(b"Subject")])
            await reader.readuntil(b"354 ")
        for second in range(62):
            if second < 40:  # who writes to a connection that is over may lose what was said on it
                for _, writer in in_command + in_data:
                    writer.write(b"x")
            advance(1)
            reader, writer = await gateway.connect()
            await reader.readline()
            writer.write(MESSAGE + b"QUIT\r\n")
            assert b"250 2.0.0 Ok trace=" in await reader.read()
        for reader, _ in in_command + in_data:
            assert (await reader.read()).endswith(replies.TIMED_OUT.wire)
        assert sum(kept.is_accepted for kept in gateway.forwarder.kept) == 62


BALANCED = replace(POLICY, proxy_protocol_from=POLICY.allow, allow=(ipaddress.ip_network("0.0.0.0/0"),))


async def test_behind_a_balancer_each_client_is_counted_by_its_own_address() -> None:
    async with running(connections_per_client=1, policy=BALANCED) as gateway:

        async def greeting_of(client: str) -> bytes:
            reader, writer = await gateway.connect()
            writer.write(f"PROXY TCP4 {client} 192.0.2.1 40000 25\r\n".encode())
            return await reader.readline()

        assert (await greeting_of("198.51.100.1")).startswith(b"220 ")
        assert (await greeting_of("198.51.100.2")).startswith(b"220 ")
        assert await greeting_of("198.51.100.1") == replies.TOO_MANY_CONNECTIONS.wire
        gateway.clients[0].close()
        await until(lambda: gateway.seen.connections[0].close_reason)
        assert (await greeting_of("198.51.100.1")).startswith(b"220 ")


def by_address(stream: Stream) -> str:
    """As if each address of loopback were a user of its own."""
    return stream.peer.host


async def held(
    gateway: Running, amount: int, said: bytes = b"", answers: int = 0, *, source: str = "127.0.0.1"
) -> None:
    """Open so many connections, which are greeted, and answered as often as that where something is said on them."""
    for _ in range(amount):
        reader, writer = await gateway.connect(source)
        assert (await reader.readline()).startswith(b"220 ")
        writer.write(said)
        for _ in range(answers):
            while (await reader.readline())[3:4] == b"-":
                pass


@pytest.mark.both_loops
async def test_who_has_no_connection_yet_gets_one_of_who_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "owner_of_peer", by_address)
    async with running(connections=8) as gateway:
        await held(gateway, 8)
        await held(gateway, 4, source="127.0.0.2")
        gone = [record for record in gateway.seen.connections if record.close_reason is CloseReason.REFUSED]
        assert len(gone) == 4
        assert {record.info.peer.host for record in gone} == {"127.0.0.1"}
        assert all(record.replies[-1][1] is replies.TOO_MANY_CONNECTIONS for record in gone)
        assert gateway.seen.refused == ["gave_way"] * 4
        for source in ("127.0.0.1", "127.0.0.2"):  # each has its part
            reader, _ = await gateway.connect(source)
            assert await reader.read() == replies.TOO_MANY_CONNECTIONS.wire
        assert gateway.seen.refused[4:] == ["capacity"] * 2


async def test_connections_that_come_and_go_at_half_of_all_are_not_remembered() -> None:
    async with running(connections=64) as gateway:
        await held(gateway, 31)
        for _ in range(20):
            for taken in (32, 33, 32, 31):
                if taken > len(gateway.server._sessions):
                    await held(gateway, 1)
                else:
                    gateway.clients.pop().close()
                    await until(lambda: len(gateway.server._sessions) == taken)  # noqa: B023 - awaited here
        assert len(gateway.server._nameless) <= 33


async def test_a_mail_whose_content_is_complete_does_not_give_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "owner_of_peer", by_address)
    async with running(connections=2) as gateway:
        gateway.forwarder.hold = asyncio.Event()
        for _ in range(2):
            _, writer = await gateway.connect()
            writer.write(MESSAGE)
        await until(lambda: [kept.content for kept in gateway.forwarder.kept if kept.content.endswith(b"y\r\n")][1:])
        reader, _ = await gateway.connect("127.0.0.2")
        assert await reader.read() == replies.TOO_MANY_CONNECTIONS.wire
        gateway.forwarder.hold.set()
        await until(lambda: sum(kept.is_accepted for kept in gateway.forwarder.kept) == 2)


@pytest.mark.movable_clock
async def test_of_one_owner_those_that_do_nothing_give_way_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(connections=32) as gateway:
        await held(gateway, 32, b"EHLO c\r\nMAIL FROM:<a@example.com>\r\n", 2)
        reader, _ = await gateway.connect()
        assert await reader.read() == replies.TOO_MANY_CONNECTIONS.wire  # all are new
        advance(1.1)
        await held(gateway, 32)
        assert [await reader.readline() for reader in gateway.readers[:32]] == [replies.TOO_MANY_CONNECTIONS.wire] * 32
        waiting = [await gateway.connect() for _ in range(4)]
        reader, _ = await gateway.connect()
        assert await reader.read() == replies.TOO_MANY_CONNECTIONS.wire  # no more wait
        assert not any(reader._buffer for reader, _ in waiting)  # type: ignore[attr-defined]
        advance(1.1)
        assert [(await reader.readline())[:4] for reader, _ in waiting] == [b"220 "] * 4


@pytest.mark.movable_clock
async def test_who_waits_in_line_is_refused_in_the_end() -> None:
    async with running(connections=32) as gateway:
        await held(gateway, 31, MESSAGE, 5)
        await held(gateway, 1)
        advance(1.1)
        await held(gateway, 1, MESSAGE, 5)  # in the place of the one that did nothing
        reader, _ = await gateway.connect()
        gone, leaving = await gateway.connect()
        leaving.close()
        advance(2.1)
        assert await reader.read() == replies.TOO_MANY_CONNECTIONS.wire
        assert not await gone.read()
        last, _ = await gateway.connect()
        drained = asyncio.create_task(gateway.server.drain(0))
        assert await last.read() == replies.SHUTTING_DOWN.wire
        await drained


async def test_behind_a_balancer_too_each_client_keeps_its_part() -> None:
    async with running(connections=8, connections_per_client=8, policy=BALANCED) as gateway:

        async def greeted(client: str) -> bytes:
            reader, writer = await gateway.connect()
            writer.write(f"PROXY TCP4 {client} 192.0.2.1 40000 25\r\n".encode())
            return (await reader.readline())[:4]

        assert [await greeted("198.51.100.1") for _ in range(8)] == [b"220 "] * 8
        assert await greeted("198.51.100.2") == b"421 "  # it is not known yet who it is
        assert gateway.seen.refused == ["capacity"]
        await gateway.server.drain(0)
        assert not gateway.server._places._counts


async def test_guesses_count_against_whoever_makes_them_from_whatever_address_of_loopback() -> None:
    users = Users({"user": Argon2Hash(argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("right"))})
    protocol = replace(POLICY.protocol, auth_mechanisms=("PLAIN",), auth_in_clear=True)
    async with running(
        connections=16, policy=replace(POLICY, protocol=protocol, authenticator=Authenticator(users))
    ) as gateway:
        counted = gateway.server.guesses._failures._failures
        for number in range(10):
            assert not [guesser for guesser in counted if gateway.server.guesses.are_too_many(guesser)]
            reader, writer = await gateway.connect(f"127.0.0.{1 + number}")
            writer.write(b"EHLO c\r\nAUTH PLAIN AHVzZXIAd3Jvbmc=\r\n")
            while not (await reader.readline()).startswith(b"535 "):
                pass
        assert all(gateway.server.guesses.are_too_many(guesser) for guesser in counted)  # the owner, and its name
        assert len(counted) == 2


async def test_one_local_application_with_a_wrong_password_does_not_lock_the_others_out() -> None:
    async with running() as gateway:
        for client in (Endpoint("127.0.0.1", 40000), Endpoint("198.51.100.1", 40000)):
            for _ in range(20):
                gateway.server.guesses.failed(client.host, "app")
        assert gateway.server.may_authenticate(Endpoint("127.0.0.1", 40001))
        assert not gateway.server.may_authenticate(Endpoint("198.51.100.1", 40001))
