"""The benchmark's upstream: an SMTP sink that offers what a good provider offers, keeps nothing and counts.

Postfix's smtp-sink offers no CHUNKING, and a relay's round trips are to be counted from the far side. It is one epoll
loop without buffers of its own: content is skipped as it comes, so that it costs little beside what it measures.

    python -m tests.bench.sink            prints {"port": N}; each line on standard input is answered by the counts;
                                          ends at its end.
"""

import json
import select
import socket
import sys
from dataclasses import asdict, dataclass
from typing import Final

EHLO: Final = (
    b"250-sink.example.com\r\n250-PIPELINING\r\n250-SIZE 104857600\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n"
    b"250-ENHANCEDSTATUSCODES\r\n250-DSN\r\n250 CHUNKING\r\n"
)
OK: Final = b"250 2.0.0 Ok\r\n"
END: Final = b"\r\n.\r\n"
_RECEIVE_OCTETS: Final = 262_144


@dataclass(slots=True)
class Counts:
    """What arrived so far.

    Attributes:
        round_trips: turns of the dialogue: writes of ours, each answering all that one read brought. The greeting and
            QUIT's 221 are not among them.
    """

    connections: int = 0
    messages: int = 0
    octets: int = 0
    round_trips: int = 0


class Session:
    """One relay's connection."""

    __slots__ = ("chunk_left", "counts", "is_last", "line", "tail", "wants_content")

    def __init__(self, counts: Counts) -> None:
        self.counts = counts
        self.line = b""  # an unfinished command line
        self.wants_content = False  # between 354 and the final dot
        self.tail = b""  # the last four octets of the content so far
        self.chunk_left = 0  # octets of a BDAT chunk still to come
        self.is_last = False

    def receive(self, data: memoryview) -> bytes | None:
        """The replies to what was read; None: goodbye was said."""
        replies: list[bytes] = []
        at = 0
        while at < len(data):
            if self.wants_content:
                at = self._skip_content(data, at, replies)
            elif self.chunk_left:
                at = self._skip_chunk(data, at, replies)
            else:
                text = self.line + data[at:].tobytes()
                end = text.find(b"\n") + 1
                if not end:
                    self.line = text
                    break
                at += end - len(self.line)
                self.line = b""
                if (reply := self._command(text[:end])) is None:
                    return None
                if reply:
                    replies.append(reply)
        return b"".join(replies)

    def _command(self, line: bytes) -> bytes | None:
        verb = line[:4].upper()
        if verb == b"DATA":
            self.wants_content = True
            self.tail = b"\r\n"  # a dot in the very first line ends an empty content (RFC 5321 4.1.1.4)
            return b"354 go on\r\n"
        if verb == b"BDAT":
            words = line.split()
            self.chunk_left = int(words[1])
            self.is_last = len(words) > 2
            return b"" if self.chunk_left else self._chunk_done()
        if verb == b"EHLO":
            return EHLO
        return None if verb == b"QUIT" else OK

    def _skip_content(self, data: memoryview, at: int, replies: list[bytes]) -> int:
        rest = data[at:].tobytes()
        # The end may have begun in what came before; these nine octets can hold only such a one.
        if (found := (self.tail + rest[:4]).find(END)) >= 0:
            end = at + found + len(END) - len(self.tail)
        elif (found := rest.find(END)) >= 0:
            end = at + found + len(END)
        else:
            self.tail = (self.tail + rest[-4:])[-4:]
            self.counts.octets += len(rest)
            return len(data)
        self.counts.octets += end - at
        self.counts.messages += 1
        self.wants_content = False
        replies.append(OK)
        return end

    def _skip_chunk(self, data: memoryview, at: int, replies: list[bytes]) -> int:
        taken = min(self.chunk_left, len(data) - at)
        self.chunk_left -= taken
        self.counts.octets += taken
        if not self.chunk_left:
            replies.append(self._chunk_done())
        return at + taken

    def _chunk_done(self) -> bytes:
        if self.is_last:
            self.counts.messages += 1
        return OK


def serve() -> None:
    """Serve on a free port of the loopback until standard input ends."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=1024)
    listening.setblocking(False)
    print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
    counts = Counts()
    poller = select.epoll()
    poller.register(listening.fileno(), select.EPOLLIN)
    poller.register(sys.stdin.fileno(), select.EPOLLIN)
    sessions: dict[int, tuple[socket.socket, Session]] = {}
    room = memoryview(bytearray(_RECEIVE_OCTETS))
    while True:
        for fd, _ in poller.poll():
            if (found := sessions.get(fd)) is not None:
                connection, session = found
                if not _turn(connection, session, room):
                    poller.unregister(fd)
                    del sessions[fd]
                    connection.close()
            elif fd == listening.fileno():
                connection, _ = listening.accept()
                # Blocking writes: a relay that does not read a reply of fourteen octets is not what is measured here.
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.send(b"220 sink.example.com ESMTP\r\n")
                counts.connections += 1
                sessions[connection.fileno()] = (connection, Session(counts))
                poller.register(connection.fileno(), select.EPOLLIN)
            elif not sys.stdin.readline():
                return
            else:
                print(json.dumps(asdict(counts)), flush=True)


def _turn(connection: socket.socket, session: Session, room: memoryview) -> bool:
    """Read once and answer once; whether the connection goes on."""
    try:
        size = connection.recv_into(room)
        replies = session.receive(room[:size]) if size else None
        if replies is None:
            if size:
                connection.send(b"221 2.0.0 Bye\r\n")
            return False
        if replies:
            session.counts.round_trips += 1
            connection.send(replies)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    serve()
