"""The in-process lab: what a mail costs the gateway's own code, without sockets, processes and neighbours.

The real server, session, forwarder and telemetry run over transports in memory: a client that says one command per turn
over a kept connection, and an upstream with PIPELINING and CHUNKING that says yes. `python -m tests.bench.lab` prints
microseconds of CPU per mail, as the minimum of many batches (the machine's other tenants only ever add), by ablation:
without observers, with metrics, with traces that the sampler drops, that are not encoded, that are encoded and queued
for export, and with all that is on by default. `--calls` counts as well: Python functions and C functions per mail,
which is what the guard test bounds.
`--queue` puts a spool between: what mail costs the event loop. The thread and the system calls of a directory's are not
counted; of one in PostgreSQL, those of its connections are.
`--json` prints all that as one object, with what an idle connection holds and a profile, for `python -m tests.bench`.
"""

import argparse
import asyncio
import cProfile
import gc
import ipaddress
import pstats
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final, NamedTuple, TypeVar
from unittest import mock

import msgspec

from otel_smtp.forwarding.settings import Strategy, TracePolicy, UpstreamSettings
from otel_smtp.forwarding.upstream import UpstreamForwarder
from otel_smtp.gateway.running import leave_out_of_garbage_collection
from otel_smtp.net import Stream, Sweep
from otel_smtp.server.listener import Server
from otel_smtp.server.policy import ListenerPolicy, ServerTimeouts
from otel_smtp.smtp.policy import ServerLimits, ServerPolicy
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation, migrate_place
from otel_smtp.spool.schedule import Schedule
from otel_smtp.spool.service import Spool, SpoolSettings
from tests.bench.figures import Lab, Spent
from tests.support import postgresql
from tests.telemetry.cost import House, count_octets

KIB: Final = 1024
_HEADER: Final = (
    b"From: <load@example.com>\r\nTo: <sink@example.com>\r\nSubject: load\r\n"
    b"Date: Mon, 01 Jan 2024 00:00:00 +0000\r\nMessage-ID: <load@example.com>\r\n\r\n"
)
_LINE: Final = b"0123456789" * 7 + b"012345\r\n"
_EHLO: Final = (
    b"250-sink.example.com\r\n250-PIPELINING\r\n250-CHUNKING\r\n250-SIZE 104857600\r\n250-8BITMIME\r\n"
    b"250-SMTPUTF8\r\n250-DSN\r\n250 ENHANCEDSTATUSCODES\r\n"
)


def content_of(octets: int) -> bytes:
    """Content of about so many octets, with the dot that ends it."""
    return _HEADER + _LINE * ((octets - len(_HEADER)) // len(_LINE)) + b".\r\n"


class _Memory(asyncio.Transport):
    """A transport whose far end is this object; what it sends arrives in the next turn of the loop."""

    def __init__(self, peer: tuple[str, int]) -> None:
        super().__init__({"peername": peer, "sockname": ("127.0.0.1", 25)})
        self._loop = asyncio.get_running_loop()
        self.stream: Stream | None = None

    def attach(self, stream: Stream) -> Stream:
        """Be the transport of `stream`."""
        self.stream = stream
        stream.connection_made(self)
        return stream

    def send(self, data: bytes) -> None:
        """Send `data` to the stream."""
        self._loop.call_soon(self._arrive, data)

    def _arrive(self, data: bytes) -> None:
        stream = self.stream
        assert stream is not None
        stream.get_buffer(-1)[: len(data)] = data
        stream.buffer_updated(len(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


class Client(_Memory):
    """Sends mails, one command per turn."""

    def __init__(self, octets: int) -> None:
        super().__init__(("127.0.0.1", 40000))
        self._flights = (
            b"MAIL FROM:<load@example.com>\r\n",
            b"RCPT TO:<sink@example.com>\r\n",
            b"DATA\r\n",
            content_of(octets),
        )
        self._step = -2
        self._left = 0
        self._done: asyncio.Future[None] | None = None

    @property
    def is_introduced(self) -> bool:
        """Its EHLO was answered."""
        return self._step >= 0

    def mails(self, count: int) -> "asyncio.Future[None]":
        """Send `count` mails; done when the last one is answered."""
        self._left = count
        self._done = self._loop.create_future()
        if self._step >= 0:
            self.send(self._flights[0])
        return self._done

    def rest(self) -> None:
        """Keep nothing of the mails that were sent."""
        self._done = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._step == -2:
            self.send(b"EHLO load.example.com\r\n")
            self._step = -1
            return
        is_final = self._step == 3
        self._step = (self._step + 1) % 4
        if is_final:
            assert data[:3] == b"250", bytes(data)
            self._left -= 1
        if self._left > 0:
            self.send(self._flights[self._step])
        elif self._done is not None and not self._done.done():
            self._done.set_result(None)


class Sink(_Memory):
    """Says yes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 2525))

    def write(self, data: bytes | bytearray | memoryview) -> None:
        start = bytes(data[:5])
        if start == b"MAIL ":
            self.send(b"250 2.0.0 Ok\r\n" * (3 if b"\r\nBDAT" in bytes(data[:120]) else 2))
        elif start == b"EHLO ":
            self.send(_EHLO)
        else:
            self.send(b"250 2.0.0 Ok\r\n")


async def _connect(*arguments: Any, **settings: Any) -> Stream:
    sink = Sink()
    stream = sink.attach(Stream())
    sink.send(b"220 sink.example.com\r\n")
    return stream


Observers = Callable[[], House]


class Figures(NamedTuple):
    """What was found.

    Attributes:
        microseconds: of CPU per mail, one figure per batch.
        python_calls, c_calls: per mail; by name, the most frequent first.
    """

    microseconds: list[float]
    python_calls: Counter[str]
    c_calls: Counter[str]


@asynccontextmanager
async def serving(
    observers: Observers, strategy: str = "transparent", *, spool: Path | QueueLocation | None = None
) -> AsyncIterator[Callable[["Client"], None]]:
    """A gateway in memory; gives what connects a client to it.

    Args:
        spool: a directory or a database: it queues all mail there.
    """
    house = observers()
    sweep = Sweep()
    forwarder = UpstreamForwarder(
        [UpstreamSettings(name="sink", host="127.0.0.1", port=2525, trace_context=TracePolicy.INJECT)],
        strategy=Strategy(strategy), hostname="gateway.example.com", observer=house.observer, sweep=sweep,
    )  # fmt: skip
    limits = ServerLimits(messages_per_connection=sys.maxsize)
    policy = ListenerPolicy(
        "local", ServerPolicy("gateway.example.com", limits=limits), ServerTimeouts(),
        allow=(ipaddress.ip_network("127.0.0.0/8"),),
    )  # fmt: skip
    queue: Spool | None = None
    if spool is not None:
        settings = SpoolSettings(None, Schedule((60.0,), warn_after_seconds=None), "off", "gateway.example.com")
        store = PostgresqlStore(spool) if isinstance(spool, QueueLocation) else EmbeddedStore(spool)
        queue = Spool(settings, store, forwarder.for_spool(), None, house.observer)
    server = Server(
        [], forwarder if queue is None else queue.forwarder, house.observer,
        connections=1000, connections_per_client=1000, sweep=sweep,
    )  # fmt: skip

    def accept(client: Client) -> None:
        server.accept(policy, client.attach(Stream()))

    # The one thing that is replaced: how an upstream is connected to.
    with mock.patch("otel_smtp.forwarding.opening.connect", _connect):
        if queue is not None:
            await queue.start()
        yield accept
        await server.drain(0)
        if queue is not None:
            await queue.stop(grace_seconds=10)
        await forwarder.close(grace_seconds=0)
    house.close()


async def measure(
    observers: Observers,
    *,
    octets: int = KIB,
    strategy: str = "transparent",
    batches: int = 40,
    mails: int = 200,
    counts: bool = False,
    spool: Path | QueueLocation | None = None,
    sessions: int = 1,
) -> Figures:
    """Send batches of mails through a gateway in memory: what its event loop does for them.

    Args:
        mails: in a batch, of each session.
        spool: where it queues them.
    """
    figures = Figures([], Counter(), Counter())
    async with serving(observers, strategy, spool=spool) as accept:
        clients = [Client(octets) for _ in range(sessions)]
        for client in clients:
            accept(client)
        every = mails * sessions

        async def send(count: int) -> None:
            await asyncio.gather(*(client.mails(count) for client in clients))

        await send(300)
        gc.collect()
        threshold = gc.get_threshold()
        leave_out_of_garbage_collection()  # as a gateway's process does
        try:
            for _ in range(batches):
                began = time.thread_time_ns()
                await send(mails)
                figures.microseconds.append((time.thread_time_ns() - began) / 1000 / every)
            if counts:
                with _counting(figures.python_calls, figures.c_calls):
                    await send(mails)
                _per_mail(figures.python_calls, every)
                _per_mail(figures.c_calls, every)
        finally:
            gc.unfreeze()
            gc.set_threshold(*threshold)
    return figures


async def idle_octets(observers: Observers, *, connections: int = 500, mails: int = 0) -> float:
    """What one idle connection holds in Python objects, by tracemalloc: greeted, EHLO answered, and after `mails`.

    Of observers that keep encoded spans, those of the mails are counted too.
    """
    async with serving(observers) as accept:
        await _introduce(accept, [Client(KIB) for _ in range(200)], mails)  # what is made once
        clients = [Client(KIB) for _ in range(connections)]
        gc.collect()
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            await _introduce(accept, clients, mails)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    return (after - before) / connections


async def _introduce(accept: Callable[[Client], None], clients: Sequence[Client], mails: int = 0) -> None:
    for client in clients:
        accept(client)
    while not all(client.is_introduced for client in clients):  # noqa: ASYNC110
        await asyncio.sleep(0)  # all of it happens in turns of this loop, each of which is short
    if mails:
        for client in clients:
            await client.mails(mails)
            client.rest()


def _per_mail(calls: Counter[str], mails: int) -> None:
    for name in calls:
        calls[name] = calls[name] / mails  # type: ignore[assignment]  # a mean


@contextmanager
def _counting(python: Counter[str], c: Counter[str]) -> Iterator[None]:
    """Count calls, but those of this file, which stand for the network and the peers."""

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_filename == __file__:
            return
        if event == "call":
            python[_name(frame.f_code)] += 1
        elif event == "c_call":
            c[getattr(argument, "__qualname__", repr(argument))] += 1

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def _name(code: CodeType) -> str:
    return f"{code.co_filename.rpartition('/')[2]}:{code.co_qualname}"


def _house(**parts: bool) -> Observers:
    return lambda: House(**parts)  # type: ignore[arg-type]  # none of them is `soon`


OBSERVERS: Final[dict[str, Observers]] = {
    "none": _house(traces=False, metrics=False, page=False),
    "metrics": _house(traces=False, page=False),
    "sampled to nothing": _house(samples=False, page=False),
    "traced, not encoded": _house(exports=False, page=False),
    "encoded, queued": _house(page=False),
    "everything": _house(),
    "as installed": _house(log=True),
}


async def profile(observers: Observers, *, mails: int = 2000, most: int = 25) -> list[Spent]:
    """The functions that take most of a mail, by their own time, which the profiler makes longer."""
    async with serving(observers) as accept:
        client = Client(KIB)
        accept(client)
        await client.mails(300)
        profiler = cProfile.Profile()
        with profiler:
            await client.mails(mails)
    found = [
        Spent(f"{file.rpartition('/')[2]}:{line} {name}" if line else name, calls / mails, own / mails * 1e6)
        for (file, line, name), (_, calls, own, _, _) in pstats.Stats(profiler).stats.items()  # type: ignore[attr-defined]  # not in the stubs
        if file != __file__
    ]
    return sorted(found, key=lambda spent: -spent.own_us)[:most]


def whole(batches: int) -> Lab:
    """All that the lab finds."""
    run = _runner("uvloop")
    found = {name: run(measure(observers, batches=batches, counts=True)) for name, observers in OBSERVERS.items()}
    return Lab(
        microseconds={name: min(figures.microseconds) for name, figures in found.items()},
        python_calls={name: float(sum(figures.python_calls.values())) for name, figures in found.items()},
        c_calls={name: float(sum(figures.c_calls.values())) for name, figures in found.items()},
        idle_octets=run(idle_octets(OBSERVERS["everything"])),
        otlp_octets=count_octets(),
        profile=run(profile(OBSERVERS["everything"])),
    )


T = TypeVar("T")


def _runner(loop: str) -> Callable[[Coroutine[Any, Any, T]], T]:
    if loop == "asyncio":
        return asyncio.run
    import uvloop

    return uvloop.run


def _new_spool(where: str, stack: ExitStack) -> Path | QueueLocation:
    """An empty spool until the end of `stack`; see `--queue`."""
    if where != "postgresql":
        return Path(stack.enter_context(tempfile.TemporaryDirectory(dir=where))) / "spool"
    server = postgresql.Server()
    stack.callback(server.remove)
    place = QueueLocation(server.start().url())
    asyncio.run(migrate_place(place, dry_run=False))
    return place


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.lab", description=__doc__)
    parser.add_argument("--observers", choices=list(OBSERVERS), action="append")
    parser.add_argument("--size", type=int, default=KIB)
    parser.add_argument("--strategy", default="transparent")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument(
        "--queue",
        metavar="DIRECTORY|postgresql",
        help="queue mail: in a new directory below this one, or in a PostgreSQL server of its own",
    )
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("--json", action="store_true", help="all observers, 1 KB, uvloop")
    options = parser.parse_args()
    if options.json:
        print(msgspec.json.encode(whole(options.batches)).decode())
        return
    for name in options.observers or OBSERVERS:
        with ExitStack() as stack:
            spool = None if options.queue is None else _new_spool(options.queue, stack)
            work = measure(
                OBSERVERS[name],
                octets=options.size,
                strategy=options.strategy,
                batches=options.batches,
                counts=options.calls,
                spool=spool,
                sessions=options.sessions,
            )
            figures = _runner(options.loop)(work)
        times = sorted(figures.microseconds)
        print(f"{name:20} min {times[0]:6.1f}  median {times[len(times) // 2]:6.1f} us per mail")
        if options.calls:
            for kind, counter in (("Python", figures.python_calls), ("C", figures.c_calls)):
                print(f"  {kind}: {sum(counter.values()):.1f}")
                for called, count in counter.most_common(200):
                    if count >= 0.5:
                        print(f"    {count:5.1f} {called}")


if __name__ == "__main__":
    main()
