"""kill -9 at random moments, under load, again and again; then the books are balanced.

What is claimed: no message that was answered 250 is lost; every recipient that the spool accepted has exactly one end;
a message that the upstream got twice was known, and logged, as one that it may have already.
"""

import contextlib
import json
import random
import signal
import smtplib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.durability.upstream import CountingUpstream
from tests.support.process import GatewayProcess, gateway, until


@dataclass
class Books:
    """What clients and upstream know, and what the spool says.

    Attributes:
        accepted: ids of the messages that were answered 250, with their trace ids.
        sent: all that clients tried to send.
        marked: trace ids of attempts that were logged as possible duplicates.
    """

    kills: int = 0
    sent: int = 0
    accepted: dict[str, str] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)
    marked: set[str] = field(default_factory=set)
    tally: dict[str, int] = field(default_factory=dict)
    left: int = 0
    held_at_the_end: int = 0

    @property
    def lost(self) -> set[str]:
        """Answered 250, and not delivered."""
        return {one for one in self.accepted if not self.taken.get(one)}

    @property
    def duplicates(self) -> set[str]:
        """Delivered more than once."""
        return {one for one, count in self.taken.items() if count > 1}

    @property
    def unmarked_duplicates(self) -> set[str]:
        """Delivered more than once without a word, among those whose trace is known."""
        return {one for one in self.duplicates if one in self.accepted and self.accepted[one] not in self.marked}

    @property
    def is_balanced(self) -> bool:
        """accepted = delivered + failed + expired + removed + still queued."""
        tally = self.tally
        ends = sum(tally.get(end, 0) for end in ("delivered", "failed", "expired", "removed"))
        return tally.get("accepted", 0) == ends + self.left

    def told(self) -> str:
        """One line."""
        return (
            f"{self.kills} kills, {self.sent} sent, {len(self.accepted)} answered 250, {len(self.lost)} lost, "
            f"{len(self.duplicates)} duplicates ({len(self.unmarked_duplicates)} unmarked), "
            f"{self.held_at_the_end} held and released, books {self.tally} + {self.left} left"
        )


class Clients:
    """Keep sending, and note what was answered 250.

    Args:
        name: what their messages' ids begin with.
    """

    def __init__(self, books: Books, count: int, name: str = "") -> None:
        self._name = name
        self._books = books
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self.port = 0
        self._threads = [threading.Thread(target=self._send_on, args=(number,), daemon=True) for number in range(count)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(30)

    def send(self, count: int) -> None:
        """Send so many in one session, at once."""
        chance = random.Random(count)
        with smtplib.SMTP("127.0.0.1", self.port, timeout=45) as session:
            session.ehlo()
            for number in range(count):
                self._send(session, f"{self._name}-{number}", chance)

    def _send_on(self, client: int) -> None:
        chance = random.Random(client)
        number = 0
        while not self._is_over.is_set():
            with (
                contextlib.suppress(OSError, smtplib.SMTPException),
                smtplib.SMTP("127.0.0.1", self.port, timeout=5) as session,
            ):
                session.ehlo()
                for _ in range(50):
                    if self._is_over.is_set():
                        break
                    number += 1
                    self._send(session, f"{self._name}{client}-{number}", chance)
            self._is_over.wait(0.02)

    def _send(self, session: smtplib.SMTP, one: str, chance: random.Random) -> None:
        # Mostly small ones, which share a file; now and then one that has a file of its own.
        body = b"x" * 70 + b"\r\n"
        content = f"X-Id: {one}\r\n\r\n".encode() + body * (1500 if chance.random() < 0.05 else chance.randint(1, 40))
        with self._lock:
            self._books.sent += 1
        session.mail("app@example.com")
        session.rcpt("user@example.net")
        code, reply = session.data(content)
        if code == 250:
            with self._lock:
                self._books.accepted[one] = reply.decode().rpartition("trace=")[2].strip()


@contextlib.contextmanager
def killable(settings: dict[str, Any], directory: Path, number: int) -> Iterator[GatewayProcess]:
    """A gateway with a directory of its own for its settings and its log."""
    run = directory / f"run{number}"
    run.mkdir()
    with gateway(settings, run) as process:
        yield process


def queue_command(spool: Path, *arguments: str) -> str:
    """What `otel-smtp queue` says."""
    return subprocess.run(
        [sys.executable, "-m", "otel_smtp", "queue", *arguments, "--spool", str(spool)],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout  # fmt: skip


def is_empty(spool: Path) -> bool:
    """Whether nothing is queued; asked twice a second at most."""
    time.sleep(0.5)
    counts = json.loads(queue_command(spool, "counts"))
    return not sum(counts[state] for state in ("ready", "deferred", "active", "held", "corrupt"))


def kill_again_and_again(
    kills: int, directory: Path, *, seed: int = 1, clients: int = 8, tell: Callable[[str], None] = lambda _: None
) -> Books:
    """Run gateways over one spool, kill each at a random moment, and balance the books in the end."""
    chance = random.Random(seed)
    books = Books()
    spool = directory / "spool"
    with CountingUpstream(seed) as upstream:
        settings = {
            "upstream.url": f"smtp://127.0.0.1:{upstream.port}",
            "delivery.mode": "queue",
            "spool.directory": str(spool),
            "spool.retry": ["1s"],
            "limits.messages_per_connection": 1000,
            "log.level": "warning",
        }
        load = Clients(books, clients)
        for number in range(kills):
            with killable(settings, directory, number) as running:
                load.port = running.port
                if number == 0:
                    load.start()
                time.sleep(chance.uniform(0.02, 0.6))  # the moment is what is tested
                running.signal(signal.SIGKILL)
                running.wait()
                note_marks(books, running)
            books.kills += 1
            if books.kills % 20 == 0:
                tell(f"{books.kills} kills, {len(books.accepted)} answered 250")
        load.stop()
        upstream.is_willing = True
        with killable(settings, directory, kills) as running:
            released = queue_command(spool, "release", "--all")
            books.held_at_the_end = int(released.split()[0])
            until(lambda: is_empty(spool) or None, "everything is delivered", timeout_seconds=600)
            running.stop()
            note_marks(books, running)
        counts = json.loads(queue_command(spool, "counts"))
        books.tally = counts["recipients"]
        books.left = len(queue_command(spool, "list", "--json").splitlines())
        books.taken = dict(upstream.taken)
    return books


def note_marks(books: Books, running: GatewayProcess) -> None:
    """Note what a gateway's log says of possible duplicates."""
    for line in running.stderr.splitlines():
        if "the upstream may have it already" in line:
            with contextlib.suppress(ValueError):  # the last line of one that was killed
                books.marked.add(str(json.loads(line)["traceparent"]).split("-")[1])
