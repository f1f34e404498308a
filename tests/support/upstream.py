"""An upstream over real sockets that does what a test tells it: keeps what arrives, and misbehaves in a given phase.

It is written without our engine, on purpose: what both sides got wrong in the same way would pass. Also a program:
``python -m tests.support.upstream --port 2526 --without CHUNKING --fault mail=refuse:451``.
"""

import argparse
import asyncio
import base64
import contextlib
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import scramp

EXTENSIONS = (
    "PIPELINING", "SIZE 50000000", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES", "CHUNKING", "BINARYMIME", "DSN",
)  # fmt: skip

RECEIVE_BUFFER_OCTETS = 256 * 1024


class Phase(StrEnum):
    """Where a fault happens: instead of, or with, the reply to this."""

    CONNECT = "connect"
    GREETING = "greeting"
    EHLO = "ehlo"
    STARTTLS = "starttls"
    AUTH = "auth"
    RSET = "rset"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"
    CONTENT = "content"  # as soon as the first octets of the content are there
    REPLY = "reply"  # to the end of the content
    QUIT = "quit"


class Kind(StrEnum):
    """What happens."""

    REFUSE = "refuse"  # `reply` instead of the usual one
    SAID_THEN_CLOSED = "said_then_closed"  # `reply` instead of the usual one, then closed
    GOODBYE = "goodbye"  # 421, then closed
    CLOSE = "close"  # the end of the stream, no reply
    RESET = "reset"  # RST
    STALL = "stall"  # nothing ever again
    GARBAGE = "garbage"
    ENDLESS_LINE = "endless_line"
    ENDLESS_LINES = "endless_lines"
    PIECES = "pieces"  # the usual reply, octet by octet
    LATE = "late"  # the usual reply, when `ScriptedUpstream.let_go` is set
    TWICE = "twice"  # the usual reply, and again
    FAREWELL = "farewell"  # the usual reply, and a 421 behind it that is cut in the network
    KEPT_THEN_LOST = "kept_then_lost"  # REPLY: the message is kept, its reply is lost


@dataclass
class Fault:
    """A fault, and how often it happens; None: always. For FAREWELL, `reply` is what comes with the usual one."""

    kind: Kind
    reply: bytes = b"451 4.3.2 scripted\r\n"
    times: int | None = None

    def strikes(self) -> bool:
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


@dataclass(frozen=True)
class Kept:
    """A message that was answered with 2yz, or would have been."""

    mail: bytes  # the MAIL command's argument, parameters included
    recipients: tuple[bytes, ...]  # the RCPT commands' arguments that were accepted
    content: bytes
    connection: int
    is_tls: bool
    user: str | None
    by_chunks: bool
    ended_at: float  # when all of it was there, before the reply; of the monotonic clock

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(argument.split(b">")[0].partition(b"<")[2].decode() for argument in self.recipients)


class _Gone(Exception):
    """The connection is over."""


@dataclass
class ScriptedUpstream:
    """The upstream.

    Attributes:
        extensions: announced in EHLO, STARTTLS and AUTH aside: they follow from the next three.
        tls: for STARTTLS, or from the first octet where `implicit_tls`.
        users: by name, their passwords; AUTH is offered with the mechanisms if there is one.
        tokens: by name, their bearer tokens for XOAUTH2.
        auth_refusal: the reply to wrong credentials.
        faults: by phase.
        sender_verdict: the reply to MAIL, by its argument; None: the usual 250.
        verdict: the reply to a recipient, by its address; None: the usual 250.
        kept: the messages.
        connections: accepted so far.
        commands: all command lines, without their arguments' secrets.
        hangs_up_after: a recipient whose reply is the last on its connection.
        most_open: connections that there were at once.
        most_connections: at once; one more gets `too_many_connections` in place of the greeting, and is closed.
        most_recipients: of a transaction; `most_recipients_a_connection`: of all its transactions; one more gets
            `too_many_recipients`.
        round_trips: how often a client had to wait for replies to go on, the greeting's aside.
    """

    extensions: Iterable[str] = EXTENSIONS
    tls: ssl.SSLContext | None = None
    implicit_tls: bool = False
    mechanisms: Iterable[str] = ("PLAIN", "LOGIN", "SCRAM-SHA-256")
    users: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    auth_refusal: bytes = b"535 5.7.8 go away\r\n"
    is_lmtp: bool = False
    knows_ehlo: bool = True
    injected_after_starttls: bytes = b""
    faults: dict[Phase, Fault] = field(default_factory=dict)
    sender_verdict: Callable[[bytes], bytes | None] = lambda _: None
    verdict: Callable[[str], bytes | None] = lambda _: None
    lmtp_verdict: Callable[[str], bytes | None] = lambda _: None
    kept: list[Kept] = field(default_factory=list)
    connections: int = 0
    commands: list[bytes] = field(default_factory=list)
    hangs_up_after: str | None = None
    most_connections: int | None = None
    too_many_connections: bytes = b"421 4.3.2 too many connections\r\n"
    most_recipients: int | None = None
    most_recipients_a_connection: int | None = None
    too_many_recipients: bytes = b"452 4.5.3 too many recipients\r\n"
    round_trips: int = 0
    stalled: int = 0
    refused_connections: int = 0
    most_open: int = 0

    def __post_init__(self) -> None:
        self.let_go = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._sessions: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> Self:
        """Listen; `port` says where."""
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # Fixed, so that what does not read is soon seen not to read; a kernel may let it grow to many megabytes.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_OCTETS)
        self._server = await asyncio.start_server(
            self._accept, sock=listening, ssl=self.tls if self.implicit_tls else None
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def start_unix(self, path: str) -> Self:
        """Listen at a unix socket."""
        self._server = await asyncio.start_unix_server(self._accept, path)
        return self

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        self.drop_connections()
        sessions = list(self._sessions)
        for session in sessions:
            session.cancel()
        await asyncio.gather(*sessions, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self if self._server is not None else await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def drop_connections(self) -> None:
        """Close what is open, without a word."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def say_all(self, unasked: bytes) -> None:
        """Say something on every connection, unasked, and give the other side the time to hear it."""
        for writer in self._writers:
            writer.write(unasked)
            await writer.drain()
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def open_connections(self) -> int:
        return len(self._writers)

    @property
    def verbs(self) -> list[str]:
        """The verbs of all commands, in order."""
        return [command.split()[0].decode("latin-1").upper() for command in self.commands if command.strip()]

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._sessions.add(task)
        self._writers.add(writer)
        self.connections += 1
        self.most_open = max(self.most_open, self.open_connections)
        try:
            await _Session(self, reader, writer, self.connections).run()
        except (_Gone, OSError, ssl.SSLError, asyncio.CancelledError):
            pass
        finally:
            self._sessions.discard(task)
            self._writers.discard(writer)
            # Not waited for: asyncio's streams never hear of the end of a connection lost in its TLS handshake.
            writer.close()


class _Session:
    def __init__(
        self, upstream: ScriptedUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int
    ) -> None:
        self.upstream = upstream
        self.reader = reader
        self.writer = writer
        self.number = number
        self.buffer = b""
        self.replies: list[bytes] = []
        self.recipients_so_far = 0
        self.is_tls = upstream.implicit_tls
        self.user: str | None = None
        self.clear()

    def clear(self) -> None:
        self.mail: bytes | None = None
        self.recipients: list[bytes] = []
        self.content = b""
        self.by_chunks = False

    # Octets -----------------------------------------------------------------------------------------------

    async def flush(self) -> bool:
        """Send the replies that have been held back until the client had to wait for them."""
        if not self.replies:
            return False
        self.writer.write(b"".join(self.replies))
        self.replies.clear()
        await self.writer.drain()
        return True

    async def more(self) -> None:
        if await self.flush():
            self.upstream.round_trips += 1
        data = await self.reader.read(65536)
        if not data:
            raise _Gone
        self.buffer += data

    async def line(self) -> bytes:
        while b"\r\n" not in self.buffer:
            await self.more()
        line, _, self.buffer = self.buffer.partition(b"\r\n")
        return line

    async def exactly(self, octets: int) -> bytes:
        while len(self.buffer) < octets:
            await self.more()
            await self.fault(Phase.CONTENT, b"")
        data, self.buffer = self.buffer[:octets], self.buffer[octets:]
        return data

    async def until_dot(self) -> bytes:
        while True:
            if self.buffer.startswith(b".\r\n"):
                self.buffer = self.buffer[3:]
                return b""
            end = self.buffer.find(b"\r\n.\r\n")
            if end >= 0:
                stuffed, self.buffer = self.buffer[: end + 2], self.buffer[end + 5 :]
                return b"\r\n".join(line[1:] if line.startswith(b".") else line for line in stuffed.split(b"\r\n"))
            await self.more()
            await self.fault(Phase.CONTENT, b"")

    async def fault(self, phase: Phase, usual: bytes) -> bool:
        """Let the fault of `phase` happen, if there is one; whether it has taken the place of the usual reply."""
        fault = self.upstream.faults.get(phase)
        if fault is None or not fault.strikes():
            return False
        match fault.kind:
            case Kind.REFUSE:
                self.replies.append(fault.reply)
            case Kind.SAID_THEN_CLOSED:
                self.replies.append(fault.reply)
                await self.flush()
                raise _Gone
            case Kind.GOODBYE:
                self.replies.append(b"421 4.3.2 scripted goodbye\r\n")
                await self.flush()
                raise _Gone
            case Kind.CLOSE | Kind.KEPT_THEN_LOST:
                await self.flush()
                raise _Gone
            case Kind.RESET:
                await self.flush()
                self.writer.transport.abort()
                raise _Gone
            case Kind.STALL:
                await self.flush()
                self.upstream.stalled += 1
                while await self.reader.read(65536):
                    pass
                raise _Gone
            case Kind.GARBAGE:
                self.replies.append(b"\x00\xff\x1b[31m what is this\r\n")
            case Kind.ENDLESS_LINE:
                await self.endless(usual[:3] + b" " + b"x" * 8192)
            case Kind.ENDLESS_LINES:
                await self.endless((usual[:3] + b"-x\r\n") * 1000)
            case Kind.PIECES:
                await self.flush()
                for octet in usual:
                    self.writer.write(bytes([octet]))
                    await self.writer.drain()
            case Kind.LATE:
                await self.flush()
                self.upstream.stalled += 1
                await self.upstream.let_go.wait()
                self.replies.append(usual)
            case Kind.TWICE:
                self.replies += [usual, usual]
            case Kind.FAREWELL:
                farewell, cut = b"421 4.3.2 bye\r\n", len(fault.reply)
                self.replies.append(usual + farewell[:cut])
                asyncio.get_running_loop().call_later(0.02, self.writer.write, farewell[cut:])
        return True

    async def endless(self, piece: bytes) -> None:
        await self.flush()
        while not self.writer.transport.is_closing():
            self.writer.write(piece)
            await self.writer.drain()
            await asyncio.sleep(0)
        raise _Gone

    async def answer(self, phase: Phase, usual: bytes) -> bool:
        """Give the usual reply, or the fault of `phase`; whether the usual one counts."""
        fault = self.upstream.faults.get(phase)
        if not await self.fault(phase, usual):
            self.replies.append(usual)
            return True
        return fault is not None and fault.kind in (Kind.PIECES, Kind.LATE, Kind.TWICE, Kind.FAREWELL)

    # Conversation -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        await self.fault(Phase.CONNECT, b"")
        most = self.upstream.most_connections
        if most is not None and self.upstream.open_connections > most:
            self.upstream.refused_connections += 1
            self.replies.append(self.upstream.too_many_connections)
            await self.flush()
            raise _Gone
        await self.answer(Phase.GREETING, b"220 upstream.example ESMTP scripted\r\n")
        await self.flush()
        while True:
            line = await self.line()
            verb, _, argument = line.partition(b" ")
            self.upstream.commands.append(line if verb.upper() != b"AUTH" else b"AUTH " + argument.split(b" ")[0])
            handler = getattr(self, f"do_{verb.decode('latin-1').lower()}", None)
            if handler is None:
                self.replies.append(b"500 5.5.2 unknown\r\n")
            else:
                await handler(argument)

    async def do_ehlo(self, argument: bytes) -> None:
        self.clear()
        if not self.upstream.knows_ehlo:
            self.replies.append(b"502 5.5.1 no EHLO here\r\n")
            return
        keywords = list(self.upstream.extensions)
        if self.upstream.tls is not None and not self.is_tls:
            keywords.append("STARTTLS")
        if self.upstream.users or self.upstream.tokens:
            keywords.append(f"AUTH {' '.join(self.upstream.mechanisms)}")
        lines = ["upstream.example", *keywords]
        usual = b"".join(
            f"250{'-' if number < len(lines) else ' '}{line}\r\n".encode() for number, line in enumerate(lines, 1)
        )
        await self.answer(Phase.EHLO, usual)

    do_lhlo = do_ehlo

    async def do_helo(self, argument: bytes) -> None:
        self.clear()
        self.replies.append(b"250 upstream.example\r\n")

    async def do_starttls(self, argument: bytes) -> None:
        if not await self.answer(Phase.STARTTLS, b"220 2.0.0 go\r\n"):
            return
        if self.upstream.injected_after_starttls:
            self.replies.append(self.upstream.injected_after_starttls)
        await self.flush()
        assert self.upstream.tls is not None
        await self.writer.start_tls(self.upstream.tls)
        self.is_tls = True
        self.buffer = b""
        self.clear()

    async def do_auth(self, argument: bytes) -> None:
        mechanism, _, initial = argument.decode().partition(" ")
        exchange = getattr(self, f"auth_{mechanism.lower().replace('-', '_')}")
        user = await exchange(None if not initial else base64.b64decode(initial if initial != "=" else ""))
        usual = b"235 2.7.0 welcome\r\n" if user else self.upstream.auth_refusal
        if await self.answer(Phase.AUTH, usual):
            self.user = user

    async def challenge(self, text: bytes) -> bytes:
        self.replies.append(b"334 " + base64.b64encode(text) + b"\r\n")
        return base64.b64decode(await self.line())

    async def auth_plain(self, initial: bytes | None) -> str | None:
        message = initial if initial is not None else await self.challenge(b"")
        _, name, password = message.decode().split("\0")
        return name if self.upstream.users.get(name) == password else None

    async def auth_login(self, initial: bytes | None) -> str | None:
        name = (initial if initial is not None else await self.challenge(b"Username:")).decode()
        password = (await self.challenge(b"Password:")).decode()
        return name if self.upstream.users.get(name) == password else None

    async def auth_scram_sha_256(self, initial: bytes | None) -> str | None:
        mechanism = scramp.ScramMechanism("SCRAM-SHA-256")

        names: list[str] = []

        def stored(name: str) -> Any:
            names.append(name)
            return mechanism.make_auth_info(self.upstream.users[name], iteration_count=4096)

        server = mechanism.make_server(stored)
        try:
            server.set_client_first((initial or b"").decode())
            server.set_client_final((await self.challenge(server.get_server_first().encode())).decode())
            await self.challenge(server.get_server_final().encode())
        except (scramp.ScramException, KeyError):
            return None
        return names[0]

    async def auth_xoauth2(self, initial: bytes | None) -> str | None:
        user, auth, *_ = (initial or b"").decode().split("\x01")
        name, token = user.removeprefix("user="), auth.removeprefix("auth=Bearer ")
        if self.upstream.tokens.get(name) == token:
            return name
        await self.challenge(b'{"status":"401"}')
        return None

    async def do_mail(self, argument: bytes) -> None:
        if self.mail is not None:
            self.replies.append(b"503 5.5.1 nested MAIL\r\n")
        elif (verdict := self.upstream.sender_verdict(argument[5:])) is not None:
            self.replies.append(verdict)
        elif await self.answer(Phase.MAIL, b"250 2.1.0 sender ok\r\n"):
            self.mail = argument[5:]

    async def do_rcpt(self, argument: bytes) -> None:
        if self.mail is None:
            self.replies.append(b"503 5.5.1 need MAIL\r\n")
            return
        address = argument.split(b">")[0].partition(b"<")[2].decode()
        if (verdict := self.upstream.verdict(address)) is not None:
            self.replies.append(verdict)
        elif self.is_full:
            self.replies.append(self.upstream.too_many_recipients)
        elif await self.answer(Phase.RCPT, b"250 2.1.5 recipient ok\r\n"):
            self.recipients.append(argument[3:])
            self.recipients_so_far += 1
        if address == self.upstream.hangs_up_after:
            await self.flush()
            raise _Gone

    @property
    def is_full(self) -> bool:
        most, most_a_connection = self.upstream.most_recipients, self.upstream.most_recipients_a_connection
        return (most is not None and len(self.recipients) >= most) or (
            most_a_connection is not None and self.recipients_so_far >= most_a_connection
        )

    async def do_data(self, argument: bytes) -> None:
        if not self.recipients and not self.takes_data_without_recipients:
            self.replies.append(b"554 5.5.1 no valid recipients\r\n")
            return
        if await self.answer(Phase.DATA, b"354 go ahead\r\n"):
            self.content = await self.until_dot()
            await self.end()

    @property
    def takes_data_without_recipients(self) -> bool:
        return "X-EAGER-354" in self.upstream.extensions

    async def do_bdat(self, argument: bytes) -> None:
        octets, _, last = argument.partition(b" ")
        chunk = await self.exactly(int(octets))
        if not self.recipients:
            self.replies.append(b"503 5.5.1 no valid recipients\r\n")
            return
        self.by_chunks = True
        self.content += chunk
        if last.upper() == b"LAST":
            await self.end()
        else:
            self.replies.append(b"250 2.0.0 octets taken\r\n")

    async def end(self) -> None:
        assert self.mail is not None
        kept = Kept(
            self.mail,
            tuple(self.recipients),
            self.content,
            self.number,
            self.is_tls,
            self.user,
            self.by_chunks,
            time.monotonic(),
        )
        fault = self.upstream.faults.get(Phase.REPLY)
        if fault is not None and fault.kind is Kind.KEPT_THEN_LOST and (fault.times is None or fault.times > 0):
            self.upstream.kept.append(kept)
        self.clear()
        if self.upstream.is_lmtp and kept.recipients:
            verdicts = [self.upstream.lmtp_verdict(address) for address in kept.addresses]
            usual = b"".join(b"250 2.0.0 delivered\r\n" if verdict is None else verdict for verdict in verdicts)
            taken = not all(verdicts)
        else:
            usual, taken = f"250 2.0.0 kept as {len(self.upstream.kept) + 1}\r\n".encode(), bool(kept.recipients)
        if await self.answer(Phase.REPLY, usual) and taken:
            self.upstream.kept.append(kept)

    async def do_rset(self, argument: bytes) -> None:
        self.clear()
        await self.answer(Phase.RSET, b"250 2.0.0 reset\r\n")

    async def do_noop(self, argument: bytes) -> None:
        self.replies.append(b"250 2.0.0 ok\r\n")

    async def do_quit(self, argument: bytes) -> None:
        await self.answer(Phase.QUIT, b"221 2.0.0 bye\r\n")
        await self.flush()
        raise _Gone


def _fault_of(text: str) -> tuple[Phase, Fault]:
    phase, _, kind = text.partition("=")
    kind, _, code = kind.partition(":")
    return Phase(phase), Fault(Kind(kind), f"{code or 451} scripted\r\n".encode())


async def _serve(arguments: argparse.Namespace) -> None:
    extensions = [keyword for keyword in EXTENSIONS if keyword.split()[0] not in arguments.without]
    faults = dict(_fault_of(text) for text in arguments.fault)
    async with ScriptedUpstream(extensions=extensions, faults=faults, is_lmtp=arguments.lmtp) as upstream:
        await upstream.start(arguments.host, arguments.port)
        print(f"listening on {arguments.host}:{upstream.port}", flush=True)
        try:
            await asyncio.Event().wait()
        finally:
            verbs = Counter(upstream.verbs)
            print(f"{upstream.connections} connections, {len(upstream.kept)} kept, {dict(verbs)}", flush=True)


def main() -> None:
    """Serve until interrupted, then say what came."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--lmtp", action="store_true")
    parser.add_argument("--without", action="append", default=[], help="an extension not to offer")
    parser.add_argument("--fault", action="append", default=[], help="PHASE=KIND[:CODE], as mail=refuse:550")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
