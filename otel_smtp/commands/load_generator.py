"""Load on an SMTP server: many sessions in one thread over non-blocking sockets, every message timed.

It measures, so it must cost little itself: one epoll loop (or poll), one read and one write per round trip, all
commands made beforehand, no parsing beyond the reply's code. `otel-smtp bench` runs it for people, the project's
benchmark in a process of its own.

A session talks like most applications: one command, one reply, no PIPELINING. The latency of a message is the time from
its MAIL, or from its connect if each message has its own connection, to the final reply after the content.

Without a rate, each session begins its next message when the last one has ended. With one, messages fall due at even
intervals whatever the server does, and one that finds all sessions busy counts from the time at which it was due: else
a server that stalls would delay the very messages that would have shown it.
"""

import errno
import re
import select
import socket
from array import array
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter, perf_counter_ns
from typing import Final

_READ_OCTETS: Final = 65536
_LINE: Final = b"0123456789" * 7 + b"abcdef\r\n"
_TRACE: Final = re.compile(r" trace=[0-9a-f]{32}\Z")
_PROGRESS_SECONDS: Final = 0.1
_READABLE: Final = select.POLLIN | select.POLLERR | select.POLLHUP
_WRITABLE: Final = select.POLLOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """What to send. The run ends at `messages` or after `seconds`, whichever comes first; one is always sent.

    Attributes:
        messages: None: as many as there is time for.
        seconds: since the first message; no message begins later. None: no limit.
        sessions: connections at once.
        size_octets: size of a message as sent, without its final dot; at least its header block.
        keeps_connections: many messages per connection; False: one each.
        rate: messages per second; None: as many as the sessions can send.
        timeout_seconds: after this long without any reply, open messages have failed and the run ends.
    """

    host: str
    port: int
    sender: str = "load@example.com"
    recipient: str = "sink@example.com"
    messages: int | None = None
    seconds: float | None = None
    sessions: int = 10
    size_octets: int = 10_240
    keeps_connections: bool = True
    rate: float | None = None
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.messages is None and self.seconds is None:
            raise ValueError("a load without an end: neither messages nor seconds")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"rate: {self.rate:g} messages per second")


@dataclass(slots=True)
class LoadResult:
    """The result of a run.

    Attributes:
        accepted: messages whose final reply was 2yz.
        failed: messages refused or lost; `failures` counts them by reason.
        reconnects: kept connections that the server closed with 421 between two messages, which is no failure.
        seconds: from the start of the first message to the end of the last one.
        latencies_ns: of the accepted messages, in the order of their ends.
    """

    accepted: int = 0
    failed: int = 0
    reconnects: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    latencies_ns: "array[int]" = field(default_factory=lambda: array("Q"))

    @property
    def messages_per_second(self) -> float:
        """Accepted messages per second."""
        return self.accepted / self.seconds if self.seconds else 0.0

    def percentiles_ms(self, *percents: float) -> list[float]:
        """Percentiles of the latency in milliseconds (nearest rank)."""
        ordered = sorted(self.latencies_ns)
        if not ordered:
            return [0.0 for _ in percents]
        return [ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] / 1e6 for percent in percents]


def message(plan: LoadPlan) -> bytes:
    """The content of every message: a small header block and lines of 78 octets, `plan.size_octets` in all."""
    header = (
        f"From: <{plan.sender}>\r\nTo: <{plan.recipient}>\r\nSubject: load\r\n"
        "Date: Mon, 01 Jan 2024 00:00:00 +0000\r\nMessage-ID: <load@example.com>\r\n\r\n"
    ).encode()
    room = plan.size_octets - len(header)
    if room < 2:
        return header
    body = (_LINE * (room // len(_LINE) + 1))[: room - 2]
    # A cut between CR and LF would leave a bare CR, which no message may have.
    return header + body.rstrip(b"\r\n").ljust(room - 2, b".") + b"\r\n"


class _Failed(Exception):
    """The session's message failed; the argument is the reason."""


class _Session:
    """One client: a connection and the current step of its dialogue."""

    __slots__ = ("_unsent", "began_ns", "fd", "has_served", "is_open", "load", "on_reply", "received", "socket")

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.on_reply: Callable[[bytes], None] = self.greeted
        self.received = b""
        self.is_open = False  # whether a message is under way
        self.has_served = False  # whether this connection has transferred one already
        self.began_ns = 0
        self._unsent: memoryview | None = None
        self.connect()

    def connect(self) -> None:
        self.received = b""
        self.has_served = False
        self._unsent = None
        self.on_reply = self.greeted
        self.socket = socket.socket(self.load.family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        # Each write is a whole turn of the dialogue: Nagle's algorithm would only wait for the peer's delayed ACK.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.fd = self.socket.fileno()
        self.load.sessions[self.fd] = self
        self.load.poller.register(self.fd, _READABLE)
        if (code := self.socket.connect_ex(self.load.address)) not in (0, errno.EINPROGRESS):
            raise _Failed(f"connect: {errno.errorcode.get(code, code)}")

    def close(self) -> None:
        if self.load.sessions.pop(self.fd, None) is not None:
            self.load.poller.unregister(self.fd)
            self.socket.close()

    def send(self, data: bytes) -> None:
        try:
            sent = self.socket.send(data)
        except BlockingIOError:
            sent = 0
        if sent != len(data):
            self._unsent = memoryview(data)[sent:]
            self.load.poller.modify(self.fd, _READABLE | _WRITABLE)

    def writable(self) -> None:
        if self._unsent is not None:
            self._unsent = self._unsent[self.socket.send(self._unsent) :]
        if not self._unsent:
            self._unsent = None
            self.load.poller.modify(self.fd, _READABLE)

    def readable(self) -> None:
        data = self.socket.recv(_READ_OCTETS)
        if not data:
            raise _Failed("connection closed")
        if self.received:
            data = self.received + data
        # The last line of a reply has a space after its code, not a hyphen (RFC 5321 4.2.1).
        if data[-2:] == b"\r\n" and (data[3:4] == b" " or data[data.rfind(b"\n", 0, -1) + 4 :][:1] == b" "):
            self.received = b""
            self.on_reply(data)
        else:
            self.received = data

    def refuse(self, verb: str, reply: bytes) -> None:
        # The gateway ends a refusal with the trace of its mail: without that, equal reasons are counted together.
        said = _TRACE.sub("", reply.splitlines()[-1].decode("ascii", "replace"))
        raise _Failed(f"{verb}: {''.join(char for char in said if char.isprintable())[:80]}")

    def greeted(self, reply: bytes) -> None:
        if reply[:3] != b"220":
            self.refuse("connect", reply)
        self.on_reply = self.helloed
        self.send(b"EHLO load.example.com\r\n")

    def helloed(self, reply: bytes) -> None:
        if reply[:3] != b"250":
            self.refuse("EHLO", reply)
        self.load.ready(self)

    def begin(self, due_ns: int = 0) -> None:
        """Send MAIL, on a connection that is ready for it.

        Args:
            due_ns: when the message was due, if it has waited for a session since.
        """
        if self.load.plan.keeps_connections:
            self.began_ns = due_ns or perf_counter_ns()
        self.on_reply = self.mail_answered
        self.send(self.load.mail)

    def mail_answered(self, reply: bytes) -> None:
        if reply[:3] != b"250":
            self.refuse("MAIL", reply)
        self.on_reply = self.recipient_answered
        self.send(self.load.rcpt)

    def recipient_answered(self, reply: bytes) -> None:
        if reply[:2] != b"25":
            self.refuse("RCPT", reply)
        self.on_reply = self.data_answered
        self.send(b"DATA\r\n")

    def data_answered(self, reply: bytes) -> None:
        if reply[:3] != b"354":
            self.refuse("DATA", reply)
        self.on_reply = self.content_answered
        self.send(self.load.content)

    def content_answered(self, reply: bytes) -> None:
        if reply[:1] != b"2":
            self.refuse("content", reply)
        self.load.result.latencies_ns.append(perf_counter_ns() - self.began_ns)
        self.is_open = False
        self.has_served = True
        self.load.accepted(self)

    def rest(self) -> None:
        """Wait for a message to fall due."""
        self.on_reply = self.dismissed

    def dismissed(self, reply: bytes) -> None:
        self.refuse("idle", reply)

    def quit(self) -> None:
        self.on_reply = self.parted
        self.send(b"QUIT\r\n")

    def parted(self, reply: bytes) -> None:
        self.close()
        self.load.parted()

    @property
    def is_retired(self) -> bool:
        """Whether the server closed this connection between two messages, as servers with a limit do."""
        return self.has_served and self.on_reply in (self.mail_answered, self.dismissed)


class Load:
    """One run of a plan; use it once.

    Args:
        progress: called about ten times per second with the result so far, in the thread of `run`; it may raise to
            end the run.
    """

    def __init__(self, plan: LoadPlan, progress: Callable[[LoadResult], None] | None = None) -> None:
        self.plan = plan
        self.result = LoadResult()
        self.family = socket.AF_INET
        self.address: tuple[object, ...] = ()
        self.sessions: dict[int, _Session] = {}
        self.poller = select.epoll() if hasattr(select, "epoll") else select.poll()
        self.mail = f"MAIL FROM:<{plan.sender}>\r\n".encode()
        self.rcpt = f"RCPT TO:<{plan.recipient}>\r\n".encode()
        self.content = message(plan) + b".\r\n"
        self._progress = progress
        self._progress_due = 0.0
        self._waiting: list[_Session] = []
        # With a rate: the sessions that wait for a message to fall due, and since when; None: one that connects for it.
        self._idle: deque[tuple[_Session | None, float]] = deque()
        self._due = 0
        self._has_begun = False
        self._began = 0.0
        self._ended = 0.0
        self._all = plan.messages if plan.messages is not None else -1  # negative: no limit
        self._unstarted = self._all

    def run(self) -> LoadResult:
        """Send everything.

        Raises:
            OSError: the host has no address.
        """
        found = socket.getaddrinfo(self.plan.host, self.plan.port, type=socket.SOCK_STREAM)[0]
        self.family, self.address = found[0], found[4]
        wanted = self.plan.sessions if self.plan.messages is None else min(self.plan.sessions, self.plan.messages)
        if not self.plan.keeps_connections:
            self._start_clock()
        try:
            for _ in range(wanted):
                if self._has_begun and self.plan.rate is not None:
                    self._rest(None)
                else:
                    self._open()
            self._loop()
        finally:
            for session in list(self.sessions.values()):
                session.close()
            if isinstance(self.poller, select.epoll):
                self.poller.close()
        self.result.accepted = len(self.result.latencies_ns)
        self.result.seconds = (self._ended or perf_counter()) - self._began if self._has_begun else 0.0
        return self.result

    def ready(self, session: _Session) -> None:
        """A session has the reply to its EHLO. With kept connections the clock starts when all have theirs."""
        if session.is_open:
            session.begin()
        elif self._has_begun:
            self._next_message(session)
        else:
            self._waiting.append(session)
            self._begin_when_all_wait()

    def accepted(self, session: _Session) -> None:
        """A session's message was accepted."""
        self._ended = perf_counter()
        if self.plan.keeps_connections:
            self._next_message(session)
        else:
            session.quit()

    def parted(self) -> None:
        """A session has ended normally. If each message has its own connection, the next one follows."""
        if not self.plan.keeps_connections:
            if self.plan.rate is not None:
                self._rest(None)
            else:
                self._open()

    def _begin_when_all_wait(self) -> None:
        if not self._has_begun and len(self._waiting) >= len(self.sessions):
            self._start_clock()
            for waiting in self._waiting:
                self._next_message(waiting)
            self._waiting.clear()

    def _start_clock(self) -> None:
        self._has_begun = True
        self._began = perf_counter()

    def _may_begin(self) -> bool:
        if self._unstarted == 0:
            return False
        if self.plan.seconds is None or self._unstarted == self._all:
            return True  # the first message is sent even if this process had to wait for a processor
        return perf_counter() - self._began < self.plan.seconds

    def _next_message(self, session: _Session) -> None:
        if not self._may_begin():
            session.quit()
        elif self.plan.rate is not None:
            session.rest()
            self._rest(session)
        else:
            self._start(session)

    def _start(self, session: _Session, due_ns: int = 0) -> None:
        self._unstarted -= 1
        session.is_open = True
        session.begin(due_ns)

    def _rest(self, session: _Session | None) -> None:
        self._idle.append((session, perf_counter()))

    def _start_due(self, rate: float) -> float:
        """Start due messages while there are sessions; returns seconds until the next one."""
        while self._idle:
            if not self._may_begin():
                for session, _ in self._idle:
                    if session is not None:
                        session.quit()
                self._idle.clear()
                break
            now = perf_counter()
            due = self._began + self._due / rate
            if due > now:
                ends = self._began + self.plan.seconds if self.plan.seconds is not None else due
                return max(0.0, min(due, ends) - now)
            self._due += 1
            session, since = self._idle.popleft()
            # If a session was available in time, this loop was late, and not the server.
            due_ns = int(due * 1e9) if since > due else 0
            if session is None:
                self._open(due_ns)
            else:
                self._start(session, due_ns)
        return self.plan.timeout_seconds

    def _open(self, due_ns: int = 0) -> None:
        """Open a session. If each message has its own connection, the message begins here."""
        if self._has_begun and not self._may_begin():
            return
        began_ns = due_ns or perf_counter_ns()
        is_open = not self.plan.keeps_connections
        if is_open:
            self._unstarted -= 1
        try:
            session = _Session(self)
        except (OSError, _Failed) as refusal:
            # Nothing listens there, so a retry would fail at once, too.
            self._fail(str(refusal))
            self._unstarted = 0
            return
        session.began_ns = began_ns
        session.is_open = is_open

    def _fail(self, reason: str) -> None:
        if self._has_begun:
            self._ended = perf_counter()
        self.result.failed += 1
        self.result.failures[reason] += 1

    def _poll(self, seconds: float) -> list[tuple[int, int]]:
        if not isinstance(self.poller, select.epoll):
            return self.poller.poll(seconds * 1e3)
        if self.plan.rate is not None:
            # epoll's own timeout counts in milliseconds, in which several messages may fall due.
            select.select([self.poller], [], [], seconds)
            return self.poller.poll(0)
        return self.poller.poll(seconds)

    def _loop(self) -> None:
        seconds, rate = self.plan.timeout_seconds, self.plan.rate
        while self.sessions or self._idle:
            if rate is not None and self._has_begun:
                seconds = self._start_due(rate)
                if not self.sessions and not self._idle:
                    return
            happened = self._poll(seconds)
            if not happened:
                if self._idle:
                    continue  # for the message that is due now
                for silent in list(self.sessions.values()):
                    self._fail(f"no reply within {self.plan.timeout_seconds:g} s")
                    silent.close()
                return
            for fd, mask in happened:
                session = self.sessions.get(fd)
                if session is None:
                    continue  # closed by an earlier event of this list
                try:
                    if mask & _WRITABLE:
                        session.writable()
                    if mask & _READABLE:
                        session.readable()
                except BlockingIOError:
                    continue
                except OSError as error:
                    self._replace(session, f"connection: {error.strerror}")
                except _Failed as failure:
                    self._replace(session, str(failure))
            if self._progress is not None and (now := perf_counter()) >= self._progress_due:
                self._progress_due = now + _PROGRESS_SECONDS
                self.result.accepted = len(self.result.latencies_ns)
                self.result.seconds = now - self._began if self._has_begun else 0.0
                self._progress(self.result)

    def _replace(self, session: _Session, reason: str) -> None:
        """A connection failed: count its message, and open another."""
        session.close()
        if session.on_reply == session.parted:
            self.parted()  # closed without 221, after its message was accepted
        elif session.is_retired:
            self.result.reconnects += 1
            self._idle = deque(idle for idle in self._idle if idle[0] is not session)
            session.connect()
        else:
            self._fail(reason)
            if self._has_begun and session.on_reply != session.greeted:
                if self.plan.rate is not None and not self.plan.keeps_connections:
                    self._rest(None)
                else:
                    self._open()
            else:
                # A server that does not greet one session will not greet the next; the run continues with the others.
                self._begin_when_all_wait()
