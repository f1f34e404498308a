"""A random fault model: clients that vanish anywhere, an upstream that lies, and a gateway that is killed, stopped,
ended and started again, on a disk that is full now and then; at the end the books are balanced.

What is claimed, for each copy (a message for one recipient):

* lost: 250 was answered, and it was neither delivered nor returned to its sender. Nothing may be left in the queue.
* false: the upstream's word was given for its own (the modes that ask it first), and it never said so; or the client
  was told that a message is refused that was delivered, without a word of doubt ("outcome unknown", "taken for"); or
  one was delivered that its client never finished; or a part was delivered for the whole.
* unmarked: it was delivered more than once, and no attempt was logged as one that the upstream may have already.

And of the gateway: a drain ends it with status 0, whatever other signals it gets, and nothing is on its stderr but log
lines, none of which reports a fault of ours.
"""

import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.durability.failing import Ballast, held_disk, may_mount
from tests.durability.killing import is_empty, queue_command
from tests.durability.lying import Copy, LyingUpstream
from tests.support.process import GatewayProcess, gateway, until

MODES: Final = ("direct", "buffered", "queue", "direct-then-queue")
DISK_OCTETS: Final = 160 * 1024 * 1024
CLIENTS: Final = 8
TIMEOUT_SECONDS: Final = 10.0

# Where a client vanishes, and how often in a hundred messages.
VANISHING: Final = {
    "": 88,
    "before MAIL": 1,
    "before RCPT": 1,
    "before DATA": 2,
    "within the content": 4,
    "at the end": 4,
}


@dataclass
class Model:
    """What clients, upstream and gateway know.

    Attributes:
        transactions: that clients began.
        accepted: copies that were answered 250.
        refused: copies that were refused at the end, with the reply.
        unfinished: copies whose client vanished before the end, or whose recipient was refused.
        marked: trace ids of attempts that were logged as possible duplicates.
        tally, left: the gateway's books, and what it has at the end.
        misbehaviour: what a gateway did that it must not, in words.
    """

    mode: str
    seed: int
    transactions: int = 0
    accepted: set[Copy] = field(default_factory=set)
    refused: dict[Copy, str] = field(default_factory=dict)
    unfinished: set[Copy] = field(default_factory=set)
    marked: set[str] = field(default_factory=set)
    events: Counter[str] = field(default_factory=Counter)
    misbehaviour: list[str] = field(default_factory=list)
    tally: dict[str, int] = field(default_factory=dict)
    left: int = 0
    seconds: float = 0.0
    taken: Counter[Copy] = field(default_factory=Counter)
    promised: Counter[Copy] = field(default_factory=Counter)
    bounced: Counter[Copy] = field(default_factory=Counter)
    refused_upstream: set[Copy] = field(default_factory=set)
    torn: set[str] = field(default_factory=set)
    traces: dict[str, str] = field(default_factory=dict)
    said: dict[str, list[str]] = field(default_factory=dict)

    @property
    def lost(self) -> set[Copy]:
        """See the head of the module."""
        return {copy for copy in self.accepted if not self.taken[copy] and not self.bounced[copy]}

    @property
    def false(self) -> set[Copy]:
        """See the head of the module."""
        found = {copy for copy in self.unfinished if self.taken[copy]}
        found |= {(one, "") for one in self.torn}
        found |= {copy for copy in self.bounced if copy not in self.refused_upstream}
        found |= {
            copy
            for copy, reply in self.refused.items()
            if self.taken[copy] and "outcome unknown" not in reply and "taken for" not in reply
        }
        if self.mode in ("direct", "buffered"):
            found |= {copy for copy in self.accepted if not self.promised[copy]}
        return found

    @property
    def duplicates(self) -> set[Copy]:
        """Delivered more than once."""
        return {copy for copy, count in self.taken.items() if count > 1}

    @property
    def unmarked(self) -> set[Copy]:
        """See the head of the module."""
        return {copy for copy in self.duplicates if self.traces.get(copy[0], "") not in self.marked}

    @property
    def is_balanced(self) -> bool:
        """accepted = delivered + failed + expired + removed + still queued; and nothing is."""
        ends = sum(self.tally.get(end, 0) for end in ("delivered", "failed", "expired", "removed"))
        return self.left == 0 and self.tally.get("accepted", 0) == ends

    @property
    def is_right(self) -> bool:
        """Whether every claim holds."""
        return not (self.lost or self.false or self.unmarked or self.misbehaviour) and self.is_balanced

    HEADING = (
        "| mode | seed | transactions | copies answered 250 | delivered | bounced | duplicates | kills | stops | ends "
        "| signals | full disks | lost | false | unmarked | misbehaviour | books | seconds |\n" + "|---" * 18 + "|"
    )

    def told(self) -> str:
        """A line of a table."""
        events = self.events
        books = "balanced" if self.is_balanced else f"NOT BALANCED {self.tally} + {self.left}"
        return (
            f"| {self.mode} | {self.seed} | {self.transactions} | {len(self.accepted)} | {len(self.taken)} "
            f"| {len(self.bounced)} | {len(self.duplicates)} | {events['kill']} | {events['stop']} | {events['end']} "
            f"| {events['signal']} | {events['full']} | {len(self.lost)} | {len(self.false)} | {len(self.unmarked)} "
            f"| {len(self.misbehaviour)} | {books} | {self.seconds:.0f} |"
        )

    def found(self) -> Iterator[str]:
        """What does not hold, some of each."""
        yield from self.misbehaviour[:5]
        for name in ("lost", "false", "unmarked"):
            for copy in sorted(getattr(self, name))[:5]:
                yield (
                    f"{name}: {copy}, taken {self.taken[copy]}, promised {self.promised[copy]}, bounced "
                    f"{self.bounced[copy]}, answered {250 if copy in self.accepted else self.refused.get(copy)}, "
                    f"unfinished {copy in self.unfinished}, trace {self.traces.get(copy[0])}; the upstream: "
                    f"{self.said.get(copy[0])}"
                )


class _Clients:
    """Send mail in threads, and note what they were told.

    Attributes:
        port: of the gateway that runs now; 0: none does.
    """

    def __init__(self, model: Model, most: int) -> None:
        self._model = model
        self._most = most
        self._lock = threading.Lock()
        self.is_over = threading.Event()
        self.port = 0
        self._threads = [
            threading.Thread(target=self._send_on, args=(number,), daemon=True) for number in range(CLIENTS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(60)

    def _send_on(self, client: int) -> None:
        chance = random.Random(self._model.seed * 1000 + client)
        number = 0
        while not self.is_over.is_set():
            if not self.port:
                self.is_over.wait(0.02)
                continue
            with (
                contextlib.suppress(OSError, ValueError),
                socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT_SECONDS) as connection,
                connection.makefile("rb") as replies,
            ):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _Conversation(connection, replies).hello()
                for _ in range(chance.choice((1, 5, 50))):
                    number += 1
                    with self._lock:
                        self._model.transactions += 1
                        if self._model.transactions >= self._most:
                            self.is_over.set()
                    if not self._send(_Conversation(connection, replies), f"{client}-{number}", chance):
                        break
                    if self.is_over.is_set():
                        break

    def _send(self, say: "_Conversation", one: str, chance: random.Random) -> bool:
        """Send a message; whether the connection can be used on."""
        model = self._model
        vanishes = chance.choices(list(VANISHING), weights=list(VANISHING.values()), k=1)[0]
        addresses = [f"{one}-{number}@example.net" for number in range(chance.choice((1, 1, 1, 2, 3)))]
        copies = {(one, address) for address in addresses}
        octets = 150_000 if chance.random() < 0.01 else chance.randint(1, 3_000)
        body = (b"x" * 76 + b"\r\n") * (octets // 78) + b"the end\r\n"
        content = f"X-Id: {one}\r\nX-Octets: {len(body)}\r\nSubject: model\r\n\r\n".encode() + body
        with self._lock:
            model.unfinished |= copies  # until it is known better
        if vanishes == "before MAIL":
            return False
        if not (reply := say.ask("MAIL FROM:<app@example.com>")).startswith("250"):
            return not reply.startswith("421")
        if vanishes == "before RCPT":
            return False
        asked = {(one, address): say.ask(f"RCPT TO:<{address}>") for address in addresses}
        accepted = {copy for copy, reply in asked.items() if reply.startswith("250")}
        if vanishes == "before DATA":
            return False
        if not accepted or not say.ask("DATA").startswith("354"):
            return say.ask("RSET").startswith("250")
        if vanishes == "within the content":
            say.write(content[: chance.randrange(len(content))])
            return False
        with self._lock:
            model.unfinished -= accepted  # from here on, nobody knows
        say.write(content + b".\r\n")
        if vanishes:
            return False
        reply = say.read()
        with self._lock:
            if reply.startswith("250"):
                model.accepted |= accepted
            else:
                model.refused.update(dict.fromkeys(accepted, reply))
        return not reply.startswith("421")


class _Conversation:
    """Commands and replies on a socket."""

    def __init__(self, connection: socket.socket, replies: Any) -> None:
        self._connection = connection
        self._replies = replies

    def hello(self) -> None:
        if not self.read().startswith("220") or not self.ask("EHLO client.example").startswith("250"):
            raise ConnectionError

    def write(self, data: bytes) -> None:
        self._connection.sendall(data)

    def ask(self, command: str) -> str:
        self.write(command.encode() + b"\r\n")
        return self.read()

    def read(self) -> str:
        """A whole reply, its lines in one."""
        text = ""
        while True:
            line: bytes = self._replies.readline()
            if not line.endswith(b"\n"):
                raise ConnectionError
            text += line.decode(errors="replace").strip() + " "
            if line[3:4] != b"-":
                return text


def _settings(mode: str, spool: Path, upstream_port: int, workers: int) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "workers": workers,
        "upstream.url": f"smtp://127.0.0.1:{upstream_port}",
        "upstream.timeout.reply": "2s",
        "delivery.mode": "direct" if mode in ("direct", "buffered") else mode,
        "delivery.strategy": "buffered" if mode == "buffered" else "transparent",
        "limits.message_size": "1MiB",
        "timeouts.shutdown_grace": "3s",
        "log.level": "warning",
    }
    if mode in ("queue", "direct-then-queue"):
        settings |= {"spool.directory": str(spool), "spool.retry": ["1s"]}
    return settings


def run_model(
    mode: str,
    transactions: int,
    directory: Path,
    *,
    seed: int = 1,
    workers: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> Model:
    """Run gateways under the fault model until so many transactions were begun, and balance the books.

    Args:
        workers: in the modes without a queue; a queue in a directory has one owner.
    """
    model = Model(mode, seed)
    began = time.monotonic()
    directory.mkdir()
    chance = random.Random(seed)
    spool = directory / "disk" / "spool"
    is_queueing = mode in ("queue", "direct-then-queue")
    with LyingUpstream(seed) as upstream, contextlib.ExitStack() as stack:
        under: list[str] = []
        disk: Path | None = None
        if is_queueing and may_mount():
            under, disk = stack.enter_context(held_disk(directory / "disk", DISK_OCTETS))
        elif is_queueing:
            (directory / "disk").mkdir()
        settings = _settings(mode, spool, upstream.port, 1 if is_queueing else workers)
        clients = _Clients(model, transactions)
        clients.start()
        number = 0
        while not clients.is_over.is_set():
            with _running(settings, directory, number, under, model) as running:
                clients.port = running.port
                _trouble(running, chance, model, clients.is_over, disk)
                clients.port = 0
            number += 1
            if number % 20 == 0:
                tell(f"{mode}: {model.transactions} transactions, {dict(model.events)}")
        clients.join()
        upstream.is_honest = True
        if is_queueing:
            seen = disk / "spool" if disk is not None else spool
            with _running(settings, directory, number, under, model) as running:
                queue_command(seen, "release", "--all")
                with contextlib.suppress(TimeoutError):
                    until(lambda: is_empty(seen) or None, "everything is delivered", timeout_seconds=120)
                counts = json.loads(queue_command(seen, "counts"))
                model.tally = counts["recipients"]
                model.left = sum(counts[state] for state in ("ready", "deferred", "active", "held", "corrupt"))
                running.stop()
        model.taken, model.promised, model.bounced = upstream.taken, upstream.promised, upstream.bounced
        model.refused_upstream, model.torn, model.traces = upstream.refused, upstream.torn, upstream.traces
        model.said = upstream.said
    model.seconds = time.monotonic() - began
    return model


def _trouble(
    running: GatewayProcess, chance: random.Random, model: Model, is_over: threading.Event, disk: Path | None
) -> None:
    """Let a gateway serve for a while, with what happens to it; then kill it or end it."""
    drained = {0}
    with contextlib.ExitStack() as stack:
        if disk is not None and chance.random() < 0.2:
            is_over.wait(0.5)
            model.events["full"] += 1
            stack.enter_context(Ballast(disk))
        for _ in range(chance.randint(0, 3)):
            is_over.wait(chance.uniform(0.1, 1.0))
            if chance.random() < 0.3:
                model.events["stop"] += 1
                running.signal(signal.SIGSTOP)
                time.sleep(chance.uniform(0.0, 0.5))
                running.signal(signal.SIGCONT)
            elif chance.random() < 0.5:
                model.events["signal"] += 1
                running.signal(chance.choice((signal.SIGHUP, signal.SIGUSR2)))
            elif (workers := sorted(running.children)) and chance.random() < 0.5:
                model.events["kill"] += 1
                drained.add(1)  # where that is noticed during the drain
                with contextlib.suppress(ProcessLookupError):  # it was replaced just now
                    os.kill(chance.choice(workers), signal.SIGKILL)
        is_over.wait(chance.uniform(0.1, 1.5))
        if chance.random() < 0.6:
            model.events["kill"] += 1
            running.signal(signal.SIGKILL)
        else:
            model.events["end"] += 1
            running.signal(signal.SIGTERM)
            if (status := running.wait()) not in drained:
                model.misbehaviour.append(f"a drain ended with status {status}: {running.stderr[-500:]}")
        running.wait()


@contextlib.contextmanager
def _running(
    settings: dict[str, Any], directory: Path, number: int, under: list[str], model: Model
) -> Iterator[GatewayProcess]:
    run = directory / f"run{number}"
    run.mkdir()
    with gateway(settings, run, under=under) as process:
        yield process
        *lines, last = process.stderr.split("\n")
        for line in (*lines, last) if last.endswith("}") else lines:  # one that is killed may leave half a line
            try:
                event = json.loads(line)
            except ValueError:
                event = {"level": "none", "event": ""}
            if "the upstream may have it already" in event["event"]:
                model.marked.add(event["traceparent"].split("-")[1])
            if event["level"] in ("none", "critical") or "internal error" in event["event"] or "traceback" in event:
                model.misbehaviour.append(line)
