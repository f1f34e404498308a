"""Several gateways on one queue: killed, or stopped for longer than their leases; then the books are balanced.

What is claimed is what `killing` claims of one gateway, and besides: what a silent gateway had goes on elsewhere within
the take-over time and two seconds, and without a kill or a stop nothing is delivered twice.
"""

import contextlib
import json
import random
import signal
import smtplib
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from otel_smtp.spool.postgresql import QueueLocation
from tests.durability.killing import Books, Clients, killable, note_marks
from tests.durability.upstream import CountingUpstream
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript
from tests.support.process import GatewayProcess, until

TAKEOVER_SECONDS: Final = 3.0


@dataclass
class SharedBooks(Books):
    """The books of several gateways.

    Attributes:
        takeovers: how many seconds after a kill or stop a peer declared that gateway dead.
        stale: results that were refused since they came too late.
    """

    takeovers: list[float] = field(default_factory=list)
    stale: int = 0

    def told(self) -> str:
        """One line."""
        times = ", ".join(f"{one:.1f}" for one in sorted(self.takeovers))
        return f"{super().told()}; taken over after {times} s; {self.stale} results refused as stale"


@dataclass
class _Slot:
    """One of the gateways, started again whenever it was killed."""

    running: GatewayProcess
    leave: contextlib.ExitStack
    load: Clients


class Sharing:
    """Gateways on one queue, each with clients of its own."""

    def __init__(
        self,
        place: QueueLocation,
        upstream: CountingUpstream,
        directory: Path,
        books: SharedBooks,
        more: Mapping[str, Any],
    ) -> None:
        self._directory = directory
        self._books = books
        self._started = 0
        self.slots: list[_Slot] = []
        self.all: list[GatewayProcess] = []
        self.settings: dict[str, Any] = {
            "upstream.url": f"smtp://127.0.0.1:{upstream.port}",
            "delivery.mode": "queue",
            "spool.url": place.url,
            "spool.schema": place.schema,
            "spool.takeover_after": f"{TAKEOVER_SECONDS}s",
            "spool.retry": ["1s"],
            "limits.messages_per_connection": 1000,
            "log.level": "warning",
            **more,
        }

    def start(self, clients: int) -> None:
        """One more gateway."""
        leave = contextlib.ExitStack()
        running = self._run(leave)
        load = Clients(self._books, clients, f"{len(self.slots)}-")
        load.port = running.port
        load.start()
        self.slots.append(_Slot(running, leave, load))

    def _run(self, leave: contextlib.ExitStack) -> GatewayProcess:
        running = leave.enter_context(killable(self.settings, self._directory, self._started))
        self._started += 1
        self.all.append(running)
        return running

    def kill(self, number: int) -> None:
        """kill -9, and start another in its place once it was declared dead."""
        slot = self.slots[number]
        at = time.time()
        slot.running.signal(signal.SIGKILL)
        slot.running.wait()
        self._books.kills += 1
        self._wait_for_takeover(at, slot.running)
        slot.running = self._run(slot.leave)
        slot.load.port = slot.running.port

    def stop_for(self, number: int, seconds: float) -> None:
        """SIGSTOP, and let it go on after it was declared dead."""
        slot = self.slots[number]
        at = time.time()
        slot.running.signal(signal.SIGSTOP)
        self._books.kills += 1
        try:
            self._wait_for_takeover(at, slot.running)
            time.sleep(max(0.0, at + seconds - time.time()))  # how long it is stopped is what is tested
        finally:
            slot.running.signal(signal.SIGCONT)
        until(lambda: "was silent for too long" in slot.running.stderr or None, "it finds out", timeout_seconds=30)

    def _wait_for_takeover(self, at: float, dead: GatewayProcess) -> None:
        def found() -> float | None:
            for peer in self.all:
                if peer is dead:
                    continue
                for line in peer.log:
                    if line["event"].startswith("silent gateway declared dead"):
                        when = datetime.fromisoformat(line["timestamp"]).timestamp()
                        if when > at:
                            return when - at
            return None

        self._books.takeovers.append(until(found, "a peer takes over", timeout_seconds=60))

    def queue(self, *arguments: str) -> str:
        """What `otel-smtp queue` says."""
        return queue_command(self._directory / "run0" / "settings.toml", *arguments)

    def balance(self, upstream: CountingUpstream, *, timeout_seconds: float = 120) -> None:
        """Let all be delivered, end, and look at the books."""
        for slot in self.slots:
            slot.load.stop()
        upstream.is_willing = True
        self._books.held_at_the_end = int(self.queue("release", "--all").split()[0])
        until(self._is_empty, "everything is delivered", timeout_seconds=timeout_seconds)
        for slot in self.slots:
            assert slot.running.stop() == 0
        for running in self.all:
            note_marks(self._books, running)
            self._books.stale += running.stderr.count("delivery result discarded: lease ended")
            assert "internal error" not in running.stderr, running.stderr
        self._books.tally = json.loads(self.queue("counts"))["recipients"]
        self._books.left = len(self.queue("list", "--json").splitlines())
        self._books.taken = dict(upstream.taken)

    def _is_empty(self) -> bool | None:
        counts = json.loads(self.queue("counts"))
        return not sum(counts[state] for state in ("ready", "deferred", "active", "held", "corrupt")) or None


@contextlib.contextmanager
def sharing(
    place: QueueLocation,
    directory: Path,
    *,
    gateways: int,
    clients: int = 3,
    seed: int = 1,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[tuple[Sharing, SharedBooks, CountingUpstream]]:
    """Gateways on one queue that have been up for long enough to take over."""
    books = SharedBooks()
    with CountingUpstream(seed) as upstream, contextlib.ExitStack() as stack:
        shared = Sharing(place, upstream, directory, books, more)
        for _ in range(gateways):
            shared.start(clients)
            stack.push(shared.slots[-1].leave)
            stack.callback(shared.slots[-1].load.stop)
        yield shared, books, upstream


def kill_in_turn(
    place: QueueLocation,
    directory: Path,
    kills: int,
    *,
    stops: int = 0,
    mails: int = 0,
    gateways: int = 3,
    seed: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> SharedBooks:
    """Kill one after the other at random moments, then stop one after the other for longer than its lease.

    Args:
        mails: how many are to be answered 250 before the first, and again before the end.
    """
    chance = random.Random(seed)
    with sharing(place, directory, gateways=gateways, seed=seed) as (shared, books, upstream):
        _wait_for_mails(books, mails)
        assert books.duplicates == set(), "nothing was killed"
        # The last that has started first: who takes over has been up for long enough then.
        for number in range(kills):
            time.sleep(chance.uniform(0.1, 1.0))  # the moment is what is tested
            shared.kill(-1 - number % gateways)
            tell(f"{books.kills} kills, {len(books.accepted)} answered 250")
        for number in range(stops):
            time.sleep(chance.uniform(0.1, 1.0))
            shared.stop_for(number % gateways, TAKEOVER_SECONDS + 3)
            tell(f"{number + 1} stops, {len(books.accepted)} answered 250")
        _wait_for_mails(books, len(books.accepted) + mails)
        shared.balance(upstream)
    return books


def _wait_for_mails(books: SharedBooks, count: int) -> None:
    until(lambda: len(books.accepted) >= count or None, f"{count} mails", timeout_seconds=600)


@dataclass(frozen=True)
class KeptLimits:
    """What a provider saw of gateways that were killed at random.

    Attributes:
        most_open: connections at once. `most_in_a_window`: messages within any period of the rate.
        seconds: from the first message to the last.
    """

    books: SharedBooks
    most_open: int
    most_in_a_window: int
    seconds: float

    def told(self) -> str:
        """One line."""
        return (
            f"at most {self.most_open} connections at once, and {self.most_in_a_window} messages in a window; "
            f"{sum(self.books.taken.values())} in {self.seconds:.0f} s; {self.books.told()}"
        )


def keep_limits(
    place: QueueLocation,
    directory: Path,
    kills: int,
    *,
    mails: int,
    count: int,
    period_seconds: float,
    connections: int = 3,
    gateways: int = 3,
    seed: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> KeptLimits:
    """Kill gateways at random that deliver what they have queued, within the rate and the connections of a provider.

    Args:
        count, period_seconds: the rate; the period is a second, or a minute.
    """
    chance = random.Random(seed)
    more = {
        "upstream.connections_total": connections,
        "upstream.limits": ["provider-rate"],
        "limit.name": "provider-rate",
        "limit.rate": f"{count}/{ {1.0: 's', 60.0: 'm'}[period_seconds] }",
        "limit.burst": count,  # so that the window is what holds them
    }
    with sharing(place, directory, gateways=gateways, clients=0, seed=seed, more=more) as (shared, books, upstream):
        upstream.is_willing = True
        for slot in shared.slots:
            slot.load.send(mails // gateways)
        for _ in range(kills):
            time.sleep(chance.uniform(0.1, 1.0))  # the moment is what is tested
            shared.kill(chance.randrange(gateways))
            tell(f"{books.kills} kills, {len(upstream.taken)} delivered, at most {upstream.most_open} connections")
        shared.balance(upstream, timeout_seconds=300 + 60 * mails / count * period_seconds)
        times = sorted(upstream.times)
        in_windows = [bisect_left(times, at + period_seconds) - number for number, at in enumerate(times)]
    return KeptLimits(books, upstream.most_open, max(in_windows), times[-1] - times[0])


@dataclass(frozen=True)
class StoppedBooks:
    """What became of mails whose gateway was stopped at a known moment, for longer than its lease.

    Attributes:
        taken: how often the upstream has taken each, by the moment.
        marked: how many attempts of the other gateway were logged as possible duplicates.
        stale: results of the stopped one that were refused.
    """

    taken: dict[str, int]
    marked: int
    stale: int


MOMENTS: Final = ("RCPT", "DATA", "content")


def stop_at_known_moments(place: QueueLocation, directory: Path) -> StoppedBooks:
    """Stop a gateway that waits for the replies to RCPT, to DATA and to a content, and let it go on when another had
    its mail delivered."""
    lacks = frozenset({"PIPELINING", "CHUNKING"})  # one step at a time
    with CapturingUpstream(UpstreamScript(lacks=lacks)) as upstream, contextlib.ExitStack() as stack:
        settings = {
            "upstream.url": upstream.url,
            "delivery.mode": "queue",
            "spool.url": place.url,
            "spool.schema": place.schema,
            "spool.takeover_after": f"{TAKEOVER_SECONDS}s",
            "log.level": "warning",
        }
        stopped, other = (stack.enter_context(killable(settings, directory, number)) for number in (0, 1))
        points = {}
        for moment in MOMENTS:
            points[moment] = upstream.hold(moment)
            with smtplib.SMTP("127.0.0.1", stopped.port, timeout=45) as client:
                client.sendmail("a@client.example", ["b@there.example"], f"Subject: {moment}\r\n\r\nHello\r\n")
            assert points[moment].reached.wait(30), moment
        stopped.signal(signal.SIGSTOP)
        try:
            for point in points.values():
                point.release()  # the replies wait in the kernel for the one that is stopped
            upstream.wait_for_messages(len(MOMENTS) + 1, 60)
        finally:
            stopped.signal(signal.SIGCONT)
        until(lambda: "was silent for too long" in stopped.stderr or None, "it finds out", timeout_seconds=30)
        queue = directory / "run0" / "settings.toml"
        until(lambda: queue_command(queue, "list", "--json") == "" or None, "all have ended", timeout_seconds=60)
        for running in (stopped, other):
            assert running.stop() == 0
            assert "internal error" not in running.stderr, running.stderr
        subjects = Counter(
            message.content.partition(b"Subject: ")[2].partition(b"\r\n")[0].decode() for message in upstream.messages
        )
        return StoppedBooks(
            dict(subjects),
            other.stderr.count("the upstream may have it already"),
            stopped.stderr.count("delivery result discarded"),
        )


def queue_command(settings: Path, *arguments: str) -> str:
    """What `otel-smtp queue` says."""
    done = subprocess.run(
        [sys.executable, "-m", "otel_smtp", "queue", *arguments, "--config", str(settings)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
