"""A capturing SMTP upstream: it keeps what arrives to the octet, says what it is told to say, and forgives nothing.

It runs in threads, so that a test may drive the gateway by a blocking client or a subprocess. It is strict where the
gateway promises to be: a bare CR or LF or NUL that is not BINARYMIME, a dot that is not stuffed, a field above our
Received field, a command out of turn or with control octets is noted in `violations`, which a test asserts to be empty.

    with CapturingUpstream() as upstream:
        ... "--upstream", upstream.url ...
        (message,) = upstream.wait_for_messages(1)
        assert message.content.endswith(b"Hello\\r\\n")
"""

import contextlib
import re
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self, TypeVar

from tests.support.dialogue import UpstreamScript

KEYWORDS: Final = (
    "PIPELINING",
    "SIZE 52428800",
    "8BITMIME",
    "SMTPUTF8",
    "ENHANCEDSTATUSCODES",
    "CHUNKING",
    "BINARYMIME",
    "DSN",
)
LINE_OCTETS: Final = 4096  # of a command: RFC 5321's 512 and what extensions add to it
_PATH = re.compile(rb"<(.*?)>(?: (.*))?", re.DOTALL)


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CapturedMessage:
    """A message whose end was answered.

    Attributes:
        reverse_path, recipients: addresses as they came; recipients: those that were accepted.
        mail_parameters, recipient_parameters: what stood behind them.
        content: to the octet, dots unstuffed.
        is_taken: it was answered 2yz.
        connection: the number of the connection, from 1.
    """

    reverse_path: str
    mail_parameters: str
    recipients: tuple[str, ...]
    recipient_parameters: tuple[str, ...]
    content: bytes
    is_taken: bool
    connection: int

    @property
    def received_field(self) -> bytes:
        """The Received field on top, with its folded lines."""
        match = re.match(rb"Received:[^\n]*\n(?:[ \t][^\n]*\n)*", self.content)
        assert match is not None, self.content[:200]
        return match[0]

    @property
    def below_received(self) -> bytes:
        """The content below the Received field that was added on top."""
        return self.content[len(self.received_field) :]

    @property
    def addresses(self) -> str:
        """The envelope as dialogues write it, without parameters."""
        return f"{self.reverse_path} > {' '.join(self.recipients)}".strip()


@dataclass(slots=True)
class CapturedConnection:
    """One connection of the gateway's.

    Attributes:
        wire: what came and went, in order: ("C", octets) and ("S", octets).
        commands: the command lines, without CRLF.
        is_over: the gateway has closed it.
    """

    number: int
    wire: list[tuple[str, bytes]] = field(default_factory=list)
    commands: list[bytes] = field(default_factory=list)
    is_tls: bool = False
    is_over: bool = False


class Held:
    """A point at which the upstream waits: `reached` is set when it does, `release` lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._go_on = threading.Event()

    def release(self) -> None:
        """Let the upstream answer."""
        self._go_on.set()

    def wait(self) -> None:
        """The upstream's side: say that it is here and wait."""
        self.reached.set()
        self._go_on.wait(30)


class CapturingUpstream:
    """Listens on 127.0.0.1, on a port of the kernel's choice.

    Args:
        script: what it says other than yes, and what it does not offer.
        keywords: what EHLO offers, before `script` takes its part away.
        tls: context for STARTTLS, or for TLS from the first octet with `is_implicit_tls`.
    """

    def __init__(
        self,
        script: UpstreamScript | None = None,
        *,
        keywords: tuple[str, ...] = KEYWORDS,
        tls: ssl.SSLContext | None = None,
        is_implicit_tls: bool = False,
    ) -> None:
        self.script = script or UpstreamScript()
        self.keywords = keywords
        self.tls = tls
        self.is_implicit_tls = is_implicit_tls
        self.messages: list[CapturedMessage] = []
        self.connections: list[CapturedConnection] = []
        self.violations: list[str] = []
        self.changed = threading.Condition()
        self._held: dict[str, Held] = {}
        self._mail_replies: deque[bytes] = deque()
        self._content_replies: deque[bytes] = deque()
        self.say(self.script)
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._listening.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        """For the upstream setting, in clear."""
        return f"smtp://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close everything and wait for the threads."""
        for held in self._held.values():
            held.release()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self.changed:
            sockets = list(self._sockets)
        for connected in sockets:
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def say(self, script: UpstreamScript) -> None:
        """Follow another script from now on."""
        with self.changed:
            self.script = script
            self._mail_replies = deque(reply.wire for reply in script.mail)
            self._content_replies = deque(reply.wire for reply in script.content)

    def wait_for_messages(self, count: int, timeout_seconds: float = 60) -> list[CapturedMessage]:
        """All messages so far, once there are `count` of them.

        Raises:
            TimeoutError: there never were.
        """
        return self.wait_for(lambda: self.messages if len(self.messages) >= count else None, timeout_seconds)

    def wait_for(self, wanted: Callable[[], T | None], timeout_seconds: float = 60) -> T:
        """What `wanted` gives, once it is not None; asked again at whatever happens."""
        with self.changed:
            self.changed.wait_for(lambda: wanted() is not None, timeout_seconds)
            found = wanted()
        if found is None:
            raise TimeoutError(f"{len(self.messages)} messages, {len(self.connections)} connections")
        return found

    def hold(self, point: str) -> Held:
        """Wait at `point` (a verb, or "content" for the reply to the end of data) until released; once."""
        held = self._held[point] = Held()
        return held

    # Threads ----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listening.accept()
            except OSError:
                return
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.changed:
                self._sockets.add(connected)
                connection = CapturedConnection(len(self.connections) + 1)
                self.connections.append(connection)
                self.changed.notify_all()
            thread = threading.Thread(target=self._serve, args=(connected, connection), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connected: socket.socket, connection: CapturedConnection) -> None:
        session = _Session(self, connected, connection)
        try:
            session.run()
        except (OSError, EOFError):
            pass
        finally:
            session.close()
            with self.changed:
                self._sockets.discard(connected)
                connection.is_over = True
                self.changed.notify_all()

    # For the sessions -------------------------------------------------------------------------------------------

    def holds(self, point: str) -> bool:
        """Whether a test wants the next `pause_at` of this point to wait."""
        return point in self._held

    def pause_at(self, point: str) -> None:
        """Wait, if a test wants it here."""
        held = self._held.pop(point, None)
        if held is not None:
            held.wait()

    def note(self, message: CapturedMessage) -> None:
        """Keep a message."""
        with self.changed:
            self.messages.append(message)
            self.changed.notify_all()

    def violated(self, what: str) -> None:
        """Keep a breach of what the gateway promises."""
        with self.changed:
            self.violations.append(what)

    def next_mail_reply(self) -> bytes:
        """The reply to the next MAIL."""
        with self.changed:
            return self._mail_replies.popleft() if self._mail_replies else b"250 2.1.0 Sender ok\r\n"

    def next_content_reply(self) -> bytes:
        """The reply to the next message."""
        with self.changed:
            return self._content_replies.popleft() if self._content_replies else b"250 2.0.0 Ok: queued as CAPTURE\r\n"

    def offered(self, *, is_tls: bool) -> list[str]:
        """The EHLO keywords."""
        kept = [word for word in self.keywords if word.split()[0] not in self.script.lacks]
        if self.script.size is not None:
            kept = [f"SIZE {self.script.size}" if word.startswith("SIZE") else word for word in kept]
        return [*kept, "STARTTLS"] if self.tls is not None and not is_tls else kept


class _Session:
    """One SMTP session, as a straight story."""

    def __init__(self, upstream: CapturingUpstream, connected: socket.socket, connection: CapturedConnection) -> None:
        self._upstream = upstream
        self._socket = connected
        self._connection = connection
        self._held = b""
        self._unsent: list[bytes] = []
        self._content = b""
        self._mail: tuple[str, str] | None = None
        self._recipients: list[tuple[str, str]] = []
        self._is_binary = False
        self._is_chunking = False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._flush()
        self._socket.close()

    def run(self) -> None:
        if self._upstream.is_implicit_tls:
            self._start_tls()
        self._pause_at("greeting")
        self._send(b"220 upstream.example ESMTP\r\n")
        for line in self._lines():
            self._connection.commands.append(line)
            verb = line.partition(b" ")[0].upper().decode("ascii", "replace")
            self._pause_at(verb)
            if verb == "QUIT":
                self._send(b"221 2.0.0 Bye\r\n")
                return
            self._answer(verb, line)

    def _answer(self, verb: str, line: bytes) -> None:
        match verb:
            case "EHLO":
                self._reset()
                offered = ["upstream.example", *self._upstream.offered(is_tls=self._connection.is_tls)]
                lines = [f"250-{word}" for word in offered[:-1]] + [f"250 {offered[-1]}"]
                self._send("".join(f"{text}\r\n" for text in lines).encode())
            case "MAIL":
                self._answer_mail(line)
            case "RCPT":
                self._answer_recipient(line)
            case "DATA" if self._recipients and not self._is_chunking:
                self._send(b"354 Go on\r\n")
                self._content = self._read_data()
                self._finish()
            case "BDAT":
                self._answer_chunk(line)
            case "RSET":
                self._reset()
                self._send(b"250 2.0.0 Ok\r\n")
            case "NOOP":
                self._send(b"250 2.0.0 Ok\r\n")
            case "AUTH" if any(word.startswith("AUTH ") for word in self._upstream.keywords):
                self._send(b"235 2.7.0 Whoever you are\r\n")
            case "STARTTLS" if self._upstream.tls is not None:
                if self._held:
                    self._upstream.violated("octets behind STARTTLS")
                self._send(b"220 2.0.0 Go on\r\n")
                self._start_tls()
            case _:
                self._upstream.violated(f"out of order or unknown: {line!r}")
                self._send(b"503 5.5.1 Bad sequence of commands\r\n")

    def _answer_mail(self, line: bytes) -> None:
        match = _PATH.search(line)
        if self._mail is not None or match is None:
            self._upstream.violated(f"MAIL: {line!r}")
            self._send(b"503 5.5.1 Bad MAIL\r\n")
            return
        reply = self._upstream.next_mail_reply()
        if reply.startswith(b"2"):
            self._mail = (match[1].decode(), (match[2] or b"").decode())
            self._is_binary = b"BODY=BINARYMIME" in line.upper()
        self._send(reply)

    def _answer_recipient(self, line: bytes) -> None:
        match = _PATH.search(line)
        if self._mail is None or match is None:
            # A pipelined RCPT behind a MAIL that was refused is no fault.
            self._send(b"503 5.5.1 No MAIL\r\n")
            return
        address = match[1].decode()
        refusal = self._upstream.script.recipients.get(address)
        if refusal is not None:
            self._send(refusal.wire)
            return
        self._recipients.append((address, (match[2] or b"").decode()))
        self._send(b"250 2.1.5 Recipient ok\r\n")

    def _answer_chunk(self, line: bytes) -> None:
        words = line.split()
        octets = self._take(int(words[1]))
        if not self._recipients:
            self._send(b"503 5.5.1 No recipient\r\n")
            return
        self._is_chunking = True
        self._content += octets
        if len(words) == 3:
            self._finish()
        else:
            self._send(b"250 2.0.0 Chunk ok\r\n")

    def _finish(self) -> None:
        assert self._mail is not None
        if not self._is_binary:
            if b"\0" in self._content:
                self._upstream.violated("NUL in content")
            if re.search(rb"\r(?!\n)|(?<!\r)\n", self._content):
                self._upstream.violated("bare CR or LF in content")
        head, _, _ = self._content.partition(b"\r\n\r\n")
        if b"\nReceived:" in head and not head.startswith(b"Received:"):
            self._upstream.violated("something stands above the Received field")
        self._pause_at("content")
        reply = self._upstream.next_content_reply()
        # Kept before it is answered: who has seen the gateway's reply finds the message here.
        self._upstream.note(
            CapturedMessage(
                self._mail[0],
                self._mail[1],
                tuple(address for address, _ in self._recipients),
                tuple(parameters for _, parameters in self._recipients),
                self._content,
                reply.startswith(b"2"),
                self._connection.number,
            )
        )
        self._reset()
        self._send(reply)

    def _reset(self) -> None:
        self._mail = None
        self._recipients = []
        self._content = b""
        self._is_binary = self._is_chunking = False

    # Octets ------------------------------------------------------------------------------------------------------

    def _start_tls(self) -> None:
        assert self._upstream.tls is not None
        self._flush()
        self._socket = self._upstream.tls.wrap_socket(self._socket, server_side=True)
        self._connection.is_tls = True
        self._held = b""
        self._reset()

    def _receive(self) -> None:
        self._flush()
        data = self._socket.recv(262144)
        if not data:
            raise EOFError
        self._connection.wire.append(("C", data))
        self._held += data

    def _send(self, data: bytes) -> None:
        """Say `data`: with the other replies of a pipelined group, before more is read (RFC 2920 3.2)."""
        self._connection.wire.append(("S", data))
        self._unsent.append(data)

    def _flush(self) -> None:
        if self._unsent:
            self._socket.sendall(b"".join(self._unsent))
            self._unsent.clear()

    def _pause_at(self, point: str) -> None:
        """Wait here if a test wants it, with all that was said before on its way."""
        if self._upstream.holds(point):
            self._flush()
            self._upstream.pause_at(point)

    def _lines(self) -> Iterator[bytes]:
        while True:
            while (end := self._held.find(b"\r\n")) < 0:
                self._receive()
            line, self._held = self._held[:end], self._held[end + 2 :]
            if len(line) > LINE_OCTETS or re.search(rb"[\x00-\x1f\x7f]", line):
                self._upstream.violated(f"command line: {line[:100]!r}")
            yield line

    def _take(self, octets: int) -> bytes:
        pieces = [self._held]
        missing = octets - len(self._held)
        while missing > 0:
            self._held = b""
            self._receive()
            pieces.append(self._held)
            missing -= len(self._held)
        data = b"".join(pieces)
        self._held = data[octets:]
        return data[:octets]

    def _read_data(self) -> bytes:
        """Content up to CRLF.CRLF, dots unstuffed; a dot at the start of a line that is not stuffed is a violation."""
        # The CRLF of the DATA command may be the first half of the end of data.
        data = bytearray(b"\r\n" + self._held)
        searched = 0
        while (end := data.find(b"\r\n.\r\n", searched)) < 0:
            searched = max(0, len(data) - 4)
            self._held = b""
            self._receive()
            data += self._held
        self._held = bytes(data[end + 5 :])
        content = bytes(data[: end + 2])
        if re.search(rb"\r\n\.(?!\.)", content):
            self._upstream.violated("a dot that is not stuffed")
        return content.replace(b"\r\n.", b"\r\n")[2:]
