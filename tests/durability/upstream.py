"""An upstream that lives in this process while gateways are killed in front of it, and that is not always willing."""

import random
import socketserver
import threading
import time
from collections import Counter

from tests.durability.threaded import ThreadedUpstream, read_content

UNWILLING: float = 0.1  # share of messages that are deferred


class CountingUpstream(ThreadedUpstream):
    """Counts the messages that it answered 250, by the value of their `X-Id` field.

    Attributes:
        taken: how often each was taken. `times`: when, by the monotonic clock.
        most_open: connections that there were at once.
        is_willing: False: it defers a share of what it is offered.
        is_closed: it lets nobody in.
    """

    def __init__(self, seed: int, *, unwilling: float = UNWILLING) -> None:
        super().__init__()
        self._unwilling = unwilling
        self.taken: Counter[str] = Counter()
        self.is_willing = False
        self.is_closed = False
        self.times: list[float] = []
        self.open = self.most_open = 0
        self._chance = random.Random(seed)
        self._lock = threading.Lock()

    def refuses(self) -> bool:
        """Whether the next one is deferred."""
        with self._lock:
            return not self.is_willing and self._chance.random() < self._unwilling

    def converse(self, session: socketserver.StreamRequestHandler) -> None:
        """See `ThreadedUpstream`."""
        with self._lock:
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            self._converse(session)
        finally:
            with self._lock:
                self.open -= 1

    def _converse(self, session: socketserver.StreamRequestHandler) -> None:
        def say(text: str) -> None:
            session.wfile.write(text.encode() + b"\r\n")

        if self.is_closed:
            return
        say("220 counting.example")
        while line := session.rfile.readline():
            verb = line[:4].upper()
            if verb == b"EHLO":
                say("250-counting.example\r\n250-PIPELINING\r\n250 8BITMIME")
            elif verb == b"DATA":
                say("354 go on")
                content = read_content(session)
                time.sleep(self._chance.random() / 200)  # so that some kills come just here
                if self.refuses():
                    say("451 4.3.0 not now")
                    continue
                with self._lock:
                    self.times.append(time.monotonic())
                    self.taken[content.partition(b"X-Id: ")[2].partition(b"\r\n")[0].decode()] += 1
                say("250 2.0.0 taken")
            elif verb == b"QUIT":
                say("221 bye")
                return
            else:
                say("250 2.0.0 ok")
