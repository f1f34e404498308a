"""Every bound that a setting sets, at one less, just there and at one more, through the whole gateway.

The settings are loaded as an operator writes them, the gateway is the real one on real sockets, its upstream is
scripted. Time is the event loop's, and the tests move it: a deadline of minutes is met in milliseconds.

`BOUNDS` is the table. A setting that is a number, a size or a duration, and stands in one of the tables that bound
somebody, must have a row there: `test_every_bound_has_its_row`.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import trustme

from otel_smtp import Gateway, Settings, load
from otel_smtp.config.settings import (
    SCHEMA,
    Key,
    LimitsTable,
    Table,
    TimeoutsTable,
    UpstreamTable,
    UpstreamTimeoutTable,
)
from otel_smtp.config.values import Duration, Integer, Size
from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.gateway.wiring import upstream_settings
from tests.support.clock import advance
from tests.support.fake_stream import FakeStream
from tests.support.upstream import EXTENSIONS, Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import SECONDS, until

pytestmark = pytest.mark.movable_clock

MIB: Final = 1024 * 1024


@pytest.fixture(autouse=True)
def _nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")


# A gateway, its upstream and its clients -----------------------------------------------------------------------


class Client:
    """A client that says exactly what a test wants, and reads replies."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def say(self, *lines: str) -> None:
        """Send command lines in one segment."""
        self.writer.write("".join(f"{line}\r\n" for line in lines).encode())

    async def reply(self) -> str:
        """The last line of the next reply; "" where the gateway has closed."""
        async with asyncio.timeout(SECONDS):
            with contextlib.suppress(ConnectionError):
                while True:
                    line = await self.reader.readline()
                    if line[3:4] != b"-":
                        return line.decode().rstrip("\r\n")
        return ""

    async def asks(self, *lines: str) -> str:
        """Send command lines, and the reply to the last of them."""
        self.say(*lines)
        return [await self.reply() for _ in lines][-1]

    async def is_served(self) -> bool:
        """Whether the gateway still answers."""
        return await self.asks("NOOP") == "250 2.0.0 Ok"

    async def sends_mail(self, content: str = "") -> str:
        """The final reply to a mail."""
        assert (await self.asks(*ENVELOPE, "DATA")).startswith("354 ")
        return await self.asks(f"{content}.")


ENVELOPE: Final = ("MAIL FROM:<a@client.example>", "RCPT TO:<b@there.example>")


@dataclass
class Site:
    """A running gateway and what stands around it."""

    settings: Settings
    gateway: Gateway
    upstream: ScriptedUpstream
    opened: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def connect(self, first: str = "") -> Client:
        """A new connection, before its greeting; `first` is said on it at once."""
        (address,) = self.gateway.addresses["local"]
        reader, writer = await asyncio.open_connection(address.host, address.port)
        self.opened.callback(writer.close)
        if first:
            writer.write(first.encode())
        return Client(reader, writer)

    async def greeted(self) -> Client:
        """A client that was greeted and has said EHLO."""
        client = await self.connect()
        assert (await client.reply()).startswith("220 ")
        assert (await client.asks("EHLO client.example")).startswith("250 ")
        return client


async def verify_token(name: str, token: str) -> str | None:
    return None


@asynccontextmanager
async def site(
    settings: Mapping[str, Any], upstream: ScriptedUpstream, *, upstream_url: str = "smtp://127.0.0.1:{port}"
) -> AsyncIterator[Site]:
    """A gateway with `settings` by their paths, over what suits the tests."""
    async with upstream:
        tree: dict[str, Any] = {
            "listener": [{"address": ["127.0.0.1:0"]}],
            "upstream": [{"url": upstream_url.format(port=upstream.port)}],
            "status": {"address": "off"},
        }
        for path, value in settings.items():
            *tables, key = path.split(".")
            node = tree
            for name in tables:
                node = node.setdefault(name, {})
                node = node[0] if isinstance(node, list) else node
            node[key] = value
        loaded = load(values=tree, verifies_tokens=True)
        async with Gateway(loaded, token_verifier=verify_token) as gateway:
            running = Site(loaded, gateway, upstream)
            try:
                yield running
            finally:
                upstream.let_go.set()
                await running.opened.aclose()


async def turns() -> None:
    """Let the gateway do what it can do at once."""
    for _ in range(30):
        await asyncio.sleep(0)


# What is counted or measured: `amount` passes or not --------------------------------------------------------------


async def message_size(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.sends_mail("Subject: x\r\n\r\n" + "y" * (amount - 16) + "\r\n")
    assert reply.startswith(("250 2.0.0", "552 5.3.4"))
    return reply.startswith("250")


async def recipients(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.asks(ENVELOPE[0], *(f"RCPT TO:<r{number}@there.example>" for number in range(amount)))
    assert reply.startswith(("250 2.1.5", "452 4.5.3"))
    return reply.startswith("250")


async def connections(site: Site, amount: int) -> bool:
    clients = [await site.connect() for _ in range(amount)]
    greetings = [await client.reply() for client in clients]
    assert all(greeting.startswith("220 ") for greeting in greetings[:-1])
    assert greetings[-1].startswith(("220 ", "421 4.3.2"))
    return greetings[-1].startswith("220")


async def connections_per_client(site: Site, amount: int) -> bool:
    other = await site.connect("PROXY TCP4 198.51.100.1 192.0.2.1 40000 25\r\n")
    assert (await other.reply()).startswith("220 ")
    clients = [await site.connect("PROXY TCP4 198.51.100.2 192.0.2.1 40000 25\r\n") for _ in range(amount)]
    greetings = [await client.reply() for client in clients]
    assert all(greeting.startswith("220 ") for greeting in greetings[:-1])
    assert greetings[-1].startswith(("220 ", "421 4.3.2"))
    return greetings[-1].startswith("220")


async def stress(site: Site, amount: int) -> bool:
    # Of 100 connections; who idles is cut off where more than so many per cent are taken.
    clients = [await site.greeted() for _ in range(amount)]
    advance(11)
    await turns()
    return await clients[0].is_served()


async def messages_per_connection(site: Site, amount: int) -> bool:
    client = await site.greeted()
    for _ in range(amount - 1):
        assert (await client.sends_mail()).startswith("250 ")
    reply = await client.asks(ENVELOPE[0])
    assert reply.startswith(("250 2.1.0", "421 4.3.2"))
    return reply.startswith("250")


async def errors(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.asks(*["FROBNICATE"] * amount)
    assert reply.startswith(("500 5.5.2", "421 4.7.0"))
    return reply.startswith("500")


async def refusals(site: Site, amount: int) -> bool:
    client = await site.greeted()
    assert (await client.asks(*ENVELOPE)).startswith("250 ")
    # One recipient is allowed, and one refusal more for it.
    reply = await client.asks(*["RCPT TO:<c@there.example>"] * (amount + 1))
    assert reply.startswith(("452 4.5.3", "421 4.7.0"))
    return reply.startswith("452")


async def junk_commands(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.asks(*["NOOP"] * amount)
    assert reply.startswith(("250 2.0.0", "421 4.7.0"))
    return reply.startswith("250")


async def command_line(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.asks("NOOP " + "x" * (amount - 7))  # CRLF counts: RFC 5321 4.5.3.1.4
    assert reply.startswith(("250 2.0.0", "500 5.5.2"))
    return reply.startswith("250")


async def auth_line(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.asks("AUTH XOAUTH2 " + "!" * (amount - 15))
    assert reply.startswith(("501 5.5.2", "500 5.5.6"))  # no base64 at all, and that is seen in a line that is taken
    return reply.startswith("501")


async def text_line(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.sends_mail("Subject: x\r\n\r\n" + "y" * (amount - 2) + "\r\n")
    assert reply.startswith(("250 2.0.0", "554 5.6.0"))
    return reply.startswith("250")


async def header_size(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.sends_mail("X: " + "y" * (amount - 5) + "\r\n\r\nbody\r\n")
    assert reply.startswith(("250 2.0.0", "554 5.6.0"))
    return reply.startswith("250")


async def header_lines(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.sends_mail("X: y\r\n" * amount + "\r\nbody\r\n")
    assert reply.startswith(("250 2.0.0", "554 5.6.0"))
    return reply.startswith("250")


async def hops(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = await client.sends_mail("Received: from x by y; now\r\n" * amount + "\r\nbody\r\n")
    assert reply.startswith(("250 2.0.0", "554 5.4.6"))
    return reply.startswith("250")


async def fails_to_log_in(client: Client) -> str:
    """The reply to a login with a wrong token."""
    reply = await client.asks("AUTH XOAUTH2 dXNlcj1hcHABYXV0aD1CZWFyZXIgd3JvbmcBAQ==")
    # RFC 7628 3.2.3: the reason is a challenge, which the client answers.
    return await client.asks("AQ==") if reply.startswith("334") else reply


async def auth_failures(site: Site, amount: int) -> bool:
    client = await site.greeted()
    reply = ""
    for _ in range(amount):
        reply = await fails_to_log_in(client)
    assert reply.startswith(("535 5.7.8", "421 4.7.0"))
    return reply.startswith("535")


async def auth_failures_per_minute(site: Site, amount: int) -> bool:
    greeting = ""
    for _ in range(amount):
        client = await site.connect("PROXY TCP4 198.51.100.2 192.0.2.1 40000 25\r\n")
        greeting = await client.reply()
        if greeting.startswith("220 "):
            await client.asks("EHLO client.example")
            assert (await fails_to_log_in(client)).startswith("535 ")
    assert greeting.startswith(("220 ", "421 4.7.0"))
    return greeting.startswith("220")


async def octets_per_second(site: Site, amount: int) -> bool:
    client = await site.greeted()
    assert (await client.asks(*ENVELOPE, "DATA")).startswith("354 ")
    line = "y" * (10 * amount - 2)
    # 30 s are given; a client that is slower by one octet in fifty has used them up after 1500 s. All of it is less
    # than what is held in memory: the time of the disk is not the client's.
    for _ in range(152):
        client.say(line)
        await turns()
        advance(10)
    await turns()
    return (await client.asks(".")).startswith("250")


async def pool_size(site: Site, amount: int) -> bool:
    clients = [await site.greeted() for _ in range(amount)]
    for client in clients:
        client.say(*ENVELOPE)
    upstream = site.settings.upstream[0]
    most = min(upstream.connections, upstream.connections_total or amount)
    await until(lambda: site.upstream.stalled == min(amount, most))
    await turns()
    opened = site.upstream.connections
    site.upstream.let_go.set()
    return opened == amount


async def pool_messages(site: Site, amount: int) -> bool:
    client = await site.greeted()
    for _ in range(amount):
        assert (await client.sends_mail()).startswith("250 ")
    return site.upstream.connections == 1


async def pool_recipients(site: Site, amount: int) -> bool:
    client = await site.greeted()
    await client.asks(
        "MAIL FROM:<a@client.example>", *(f"RCPT TO:<b{number}@there.example>" for number in range(amount))
    )
    assert (await client.asks("DATA")).startswith("354 ")
    assert (await client.asks(".")).startswith("250 ")
    return len(site.upstream.kept) == 1


async def reply_line(site: Site, amount: int) -> bool:
    site.upstream.faults[Phase.MAIL] = Fault(Kind.REFUSE, b"550 " + b"x" * (amount - 6) + b"\r\n")
    reply = await (await site.greeted()).asks(*ENVELOPE)
    assert reply.startswith(("550 ", "451 4.5.0"))
    return reply.startswith("550")


async def reply_lines(site: Site, amount: int) -> bool:
    site.upstream.faults[Phase.MAIL] = Fault(Kind.REFUSE, b"550-x\r\n" * (amount - 1) + b"550 x\r\n")
    client = await site.greeted()
    reply = await client.asks(*ENVELOPE)
    assert reply.startswith(("550 ", "451 4.5.0"))
    return reply.startswith("550")


# What is timed: after `amount` seconds it is still waited for, or not -------------------------------------------


async def command(site: Site, amount: int) -> bool:
    client = await site.greeted()
    advance(amount)
    await turns()  # in which the clock is looked at
    return await client.is_served()


async def data(site: Site, amount: int) -> bool:
    client = await site.greeted()
    assert (await client.asks(*ENVELOPE, "DATA")).startswith("354 ")
    advance(amount)
    await turns()
    reply = await client.asks(".")
    assert reply.startswith(("250 ", "421 4.4.2"))
    return reply.startswith("250")


async def session(site: Site, amount: int) -> bool:
    client = await site.greeted()
    # It ends though the client is never idle.
    for _ in range(amount):
        advance(1)
        await turns()
        if not await client.is_served():
            return False
    return True


async def tls_handshake(site: Site, amount: int) -> bool:
    client = await site.greeted()
    assert (await client.asks("STARTTLS")).startswith("220 ")
    await turns()
    advance(amount)
    await turns()
    received, sent = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = ssl.create_default_context().wrap_bio(received, sent, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        session.do_handshake()
    client.writer.write(sent.read())
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(SECONDS):
            return await client.reader.read(1) != b""
    return False


async def shutdown_grace(site: Site, amount: int) -> bool:
    client = await site.greeted()
    assert (await client.asks(*ENVELOPE, "DATA")).startswith("354 ")
    stopping = asyncio.create_task(site.gateway.stop())
    await turns()
    advance(amount)
    await turns()
    reply = await client.asks(".")
    assert reply.startswith(("250 ", "421 4.3.2"))
    await stopping
    return reply.startswith("250")


async def is_waited_for(site: Site, amount: int, phase: Phase) -> bool:
    """Whether the upstream's reply in `phase` counts where it comes after so many seconds."""
    site.upstream.faults[phase] = Fault(Kind.LATE)
    site.upstream.drop_connections()  # the one that was opened at start has been greeted already
    await until(lambda: not site.upstream.open_connections)
    client = await site.greeted()
    client.say(*ENVELOPE, "DATA", ".")
    await until(lambda: site.upstream.stalled)
    advance(amount)
    await turns()
    site.upstream.let_go.set()
    replies = [await client.reply() for _ in range(3)]
    if replies[-1].startswith("354 "):
        replies.append(await client.reply())
    assert replies[-1].startswith(("250 2.0.0", "451 4.4.1", "451 4.4.2", "503 5.5.1"))
    return replies[-1].startswith("250")


def upstream_waits(phase: Phase) -> Callable[[Site, int], Awaitable[bool]]:
    return lambda site, amount: is_waited_for(site, amount, phase)


async def connect(site: Site, amount: int) -> bool:
    # Name, connection and handshake together: here the handshake stalls, and then is none.
    site.upstream.faults[Phase.CONNECT] = Fault(Kind.LATE)
    client = await site.greeted()
    client.say(*ENVELOPE)
    await until(lambda: site.upstream.stalled)
    await turns()
    advance(amount)
    await turns()
    site.upstream.let_go.set()
    replies = [await client.reply() for _ in ENVELOPE]
    assert replies[-1].startswith(("451 4.4.1", "451 4.7.5"))
    return replies[-1].startswith("451 4.7.5")  # no TLS: it was waited for, and heard


async def block(site: Site, amount: int) -> bool:
    stream = FakeStream()
    upstream = UpstreamConnection(stream, upstream_settings(site.settings.upstream[0]).timeouts)
    stream.feed(b"220 sink\r\n")
    await upstream.settled()
    upstream.protocol.send_hello("gw.example")
    answering = asyncio.create_task(upstream.settled())
    await turns()
    stream.feed(b"250-sink\r\n250 CHUNKING\r\n")
    await answering
    faults: list[object] = []
    upstream.protocol.begin_last_chunk(10)
    stream.stop_taking()
    upstream.protocol.send_chunk_octets(b"12345")
    upstream.send_content(lambda answers, fault: faults.append(fault), lambda: faults.append(None))
    advance(amount)
    upstream.check_deadline(asyncio.get_running_loop().time())
    stream.resume_writing()
    try:
        return faults == [None]
    finally:
        stream.abort()
        await stream.wait_closed()


async def pool_keeps(site: Site, amount: int) -> bool:
    client = await site.greeted()
    assert (await client.sends_mail()).startswith("250 ")
    advance(amount)
    await turns()
    assert (await client.sends_mail()).startswith("250 ")
    return site.upstream.connections == 1


# The table --------------------------------------------------------------------------------------------------------

AT_MOST: Final = (True, True, False)  # one less passes, just there passes, one more does not
BELOW: Final = (True, False, False)  # when the time is up, it is up
AT_LEAST: Final = (False, True, True)


@dataclass(frozen=True, slots=True)
class Bound:
    """A row of the table.

    Attributes:
        setting: as in a settings file.
        default: the value that is promised where nothing is set.
        at: the value that is set here.
        holds: whether `amount` passes.
        more: other settings, without which this one would not be met.
    """

    setting: str
    default: float | None
    at: int
    holds: Callable[[Site, int], Awaitable[bool]]
    passes: tuple[bool, bool, bool] = AT_MOST
    more: Mapping[str, Any] = field(default_factory=dict)
    extensions: tuple[str, ...] = EXTENSIONS


BEHIND_A_PROXY: Final = {"listener.proxy_protocol_from": ["127.0.0.0/8"], "listener.allow": ["0.0.0.0/0"]}
WITH_AUTH: Final = {"listener.auth": "optional", "listener.auth_in_clear": True}
WITH_TLS: Final = {"listener.tls": "starttls", "listener.tls_cert": "cert.pem", "listener.tls_key": "key.pem"}
PATIENT: Final = {"timeouts.command": 5000}
# With it, content goes by BDAT, and no 354 is waited for.
NO_CHUNKING: Final = tuple(keyword for keyword in EXTENSIONS if keyword not in ("CHUNKING", "BINARYMIME"))

BOUNDS: Final = (
    # What clients make grow
    Bound("limits.message_size", 25 * MIB, 2000, message_size),
    Bound("limits.recipients", 1000, 3, recipients),
    Bound("limits.connections", 256, 4, connections),
    Bound("limits.connections_per_client", 64, 3, connections_per_client, more=BEHIND_A_PROXY),
    Bound("limits.stress", 80, 5, stress, more={"limits.connections": 100}),
    Bound("limits.messages_per_connection", None, 2, messages_per_connection),
    Bound("limits.errors", 10, 3, errors),
    Bound("limits.refusals", 1000, 3, refusals, more={"limits.recipients": 1}),
    Bound("limits.junk_commands", 100, 3, junk_commands),
    Bound("limits.command_line", 2048, 600, command_line),
    Bound("limits.auth_line", 12288, 600, auth_line, more=WITH_AUTH),
    Bound("limits.text_line", 65535, 1000, text_line),
    Bound("limits.header_size", 512 * 1024, 1000, header_size),
    Bound("limits.header_lines", 10_000, 5, header_lines),
    Bound("limits.hops", 100, 3, hops),
    Bound("limits.auth_failures", 3, 2, auth_failures, more=WITH_AUTH),
    Bound("limits.auth_failures_per_minute", 10, 3, auth_failures_per_minute, more=WITH_AUTH | BEHIND_A_PROXY),
    Bound(
        "limits.octets_per_second",
        500,
        50,
        octets_per_second,
        AT_LEAST,
        {"timeouts.command": 30, "timeouts.data": 4000, "limits.message_size": MIB},
    ),
    # How long clients are waited for
    Bound("timeouts.command", 300, 40, command, BELOW),
    Bound("timeouts.command_under_stress", 10, 20, command, BELOW, {"limits.connections": 1}),
    Bound("timeouts.data", 1200, 40, data, BELOW, PATIENT),
    Bound("timeouts.session", None, 20, session, BELOW, PATIENT),
    Bound("timeouts.tls_handshake", 30, 20, tls_handshake, BELOW, WITH_TLS),
    Bound("timeouts.shutdown_grace", 25, 20, shutdown_grace, BELOW),
    # How long upstreams are waited for
    Bound("upstream.timeout.connect", 30, 20, connect, BELOW),
    Bound("upstream.timeout.greeting", 60, 20, upstream_waits(Phase.GREETING), BELOW),
    Bound("upstream.timeout.command", 300, 20, upstream_waits(Phase.MAIL), BELOW),
    Bound("upstream.timeout.data", 120, 20, upstream_waits(Phase.DATA), BELOW, extensions=NO_CHUNKING),
    Bound("upstream.timeout.block", 180, 20, block, BELOW),
    Bound("upstream.timeout.reply", 570, 20, upstream_waits(Phase.REPLY), BELOW),
    # What upstreams make grow, and how long their connections are kept
    Bound("upstream.connections", 20, 2, pool_size),
    Bound("upstream.connections_total", None, 2, pool_size),
    Bound("upstream.recipients_per_transaction", 100, 3, pool_recipients),
    Bound("upstream.messages_per_connection", 100, 2, pool_messages),
    Bound("upstream.connection_age", 300, 40, pool_keeps, BELOW, {"upstream.connection_idle": 1000}),
    Bound("upstream.connection_idle", 30, 20, pool_keeps, BELOW),
    Bound("upstream.reply_line", 2048, 600, reply_line),
    Bound("upstream.reply_lines", 100, 20, reply_lines),
)
TABLES: Final[Mapping[str, type[Table]]] = {
    "limits": LimitsTable,
    "timeouts": TimeoutsTable,
    "upstream": UpstreamTable,
    "upstream.timeout": UpstreamTimeoutTable,
}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the files that `WITH_TLS` names."""
    directory = tmp_path_factory.mktemp("certificate")
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))
    return directory


@pytest.mark.parametrize("place", [0, 1, 2], ids=["one less", "just there", "one more"])
@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.setting)
async def test_a_bound_holds(bound: Bound, place: int, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(certificate)
    url = "smtps://127.0.0.1:{port}" if bound.holds is connect else "smtp://127.0.0.1:{port}"
    upstream = ScriptedUpstream(extensions=bound.extensions)
    if bound.holds is pool_size:
        upstream.faults[Phase.RCPT] = Fault(Kind.LATE)
    async with site({**bound.more, bound.setting: bound.at}, upstream, upstream_url=url) as running:
        assert await bound.holds(running, bound.at - 1 + place) is bound.passes[place]


def test_every_bound_has_its_row() -> None:
    settings = {
        f"{path}.{name}"
        for path, table in TABLES.items()
        for name, entry in SCHEMA[table].items()
        if isinstance(entry, Key) and isinstance(entry.kind, Integer | Size | Duration)
    }
    assert sorted(bound.setting for bound in BOUNDS) == sorted(settings)


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.setting)
def test_the_default_is_what_is_promised(bound: Bound) -> None:
    value: Any = load(values={"upstream": [{"url": "smtp://127.0.0.1:1025"}]}, file_limit=1_000_000)
    for name in bound.setting.split("."):
        value = getattr(value, name)
        value = value[0] if isinstance(value, tuple) else value
    assert value == bound.default


def test_it_listens_on_this_machine_only() -> None:
    settings = load(values={"upstream": [{"url": "smtp://127.0.0.1:1025"}]})
    assert [str(address) for address in settings.listener[0].address] == ["127.0.0.1:2525", "[::1]:2525"]


def test_mail_that_waits_is_tried_and_given_up_as_promised() -> None:
    # How the numbers are kept, tests/spool shows; time there is the wall's, since mail outlives processes.
    spool = load(values={"upstream": [{"url": "smtp://127.0.0.1:1025"}]}).spool
    assert list(spool.retry) == [30, 60, 120, 300, 600, 1200, 2400, 3600]
    assert spool.max_age == 5 * 24 * 3600
    assert spool.warn_after == 4 * 3600


def test_a_dead_gateway_is_soon_replaced() -> None:
    # When a silent one is declared dead, tests/spool/postgresql shows with real ones.
    spool = load(values={"upstream": [{"url": "smtp://127.0.0.1:1025"}]}).spool
    assert spool.takeover_after == 10
