"""Measuring: interleaved rounds of load, and the figures that need a relay of their own.

A relay that cannot be started, or that fails while it is measured, is left out from then on; the results say why.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Final

from tests.bench.budget import Budget
from tests.bench.figures import KIB, MIB, Cell, Figure, Load, LongRun, Results, Run, Sample
from tests.bench.process import Child, python, wait_for_greeting
from tests.bench.targets import watched
from tests.bench.targets.base import Place, Running, Target, UnavailableError, last_words
from tests.support.ports import unclaimed_port

# Quiet for so many looks in a row is taken for the end of what a run left behind: delivery, export.
_LOOK_SECONDS: Final = 0.1
_QUIET_LOOKS: Final = 2
_QUIET_LOOKS_EXPORT: Final = 8  # more than the half second between two exports
_SETTLE_SECONDS: Final = 30.0
_SMTP_SOURCE_MESSAGES: Final = 2000
_WARM_CONNECTIONS: Final = 100
# One of everything that a service sees, beside the paced mails whose latency is looked at.
_LONG_BESIDE: Final = (
    {"sessions": 2, "size_octets": 10 * KIB, "keeps_connections": False, "rate": 20.0},
    {"sessions": 1, "size_octets": 5 * MIB, "rate": 0.5},
)
_LONG_SHARE: Final = 0.3  # of its highest rate
_CORES_TO_SPREAD: Final = 4  # two for the workers, two for generator and sink

# What a relay's failure looks like from here; all else is a fault of the benchmark.
_FAILURES: Final = (UnavailableError, RuntimeError, OSError, subprocess.SubprocessError, ValueError)

Tell = Callable[[str], None]
Live = tuple[Target, Running]


class Bench:
    """One benchmark: sink and collector run as long as it does.

    Args:
        directory: for all that relays write: the spools lie on its disk.
        cache: for packages that are kept between runs.
    """

    def __init__(self, directory: Path, cache: Path, budget: Budget, results: Results, tell: Tell) -> None:
        self.results = results
        self._directory = directory
        self._cache = cache
        self._budget = budget
        self._tell = tell
        self._stack = ExitStack()
        self._places = 0

    def __enter__(self) -> "Bench":
        self._sink = self._started(python("tests.bench.sink", talks=True))
        self._collector = self._started(python("tests.bench.collector", talks=True))
        self._sink_port = int(self._sink.read()["port"])
        self._collector_port = int(self._collector.read()["port"])
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def _started(self, child: Child) -> Child:
        self._stack.callback(child.stop)
        return child

    def _place(self, target: Target, upstream_port: int | None = None) -> Place:
        self._places += 1
        # Short: a database's socket lies in it.
        name = f"{self._places}-{re.sub(r'[^a-z0-9]+', '-', target.name.lower())[:24]}"
        return Place(self._directory / name, self._cache, upstream_port or self._sink_port, self._collector_port)

    def start(self, target: Target, *, upstream_port: int | None = None) -> Running:
        """A relay in a directory of its own.

        Raises:
            UnavailableError: it cannot be run here.
        """
        return target.ready(self._place(target, upstream_port))

    @contextmanager
    def _live(
        self, targets: Sequence[Target], loads: Sequence[Load] = (), *, upstream_port: int | None = None
    ) -> Iterator[list[Live]]:
        """Those of the relays that can be started; they run, at rest, while another is measured."""
        with ExitStack() as stack:
            live: list[Live] = []
            for target in targets:
                with self._forgiving(target, "start", loads=loads):
                    relay = self.start(target, upstream_port=upstream_port)
                    stack.callback(relay.stop)
                    live.append((target, relay))
            yield live

    @contextmanager
    def _forgiving(
        self, target: Target, what: str, live: list[Live] | None = None, loads: Sequence[Load] = ()
    ) -> Iterator[None]:
        """Name a failure of `target` in the results and in these loads, and leave it out of `live`."""
        try:
            yield
        except _FAILURES as failure:
            said = str(failure) or type(failure).__name__
            if live is not None:
                live[:] = [(other, relay) for other, relay in live if other is not target]
            for load in loads:
                load.failed[target.name] = f"{what}: {said}"
            self._skip(f"{target.name}, {what}", said)

    # Load

    def load_rounds(
        self,
        targets: Sequence[Target],
        cells: Sequence[Cell],
        *,
        rounds: int,
        seconds: Callable[[int], float],
        spread: bool = False,
        remembers_peak: bool = False,
    ) -> None:
        """Every relay under every load, so that the n-th runs of all relays stand side by side in time.

        Args:
            seconds: of a run, by how many runs of this call are left.
            spread: relays get the first two cores and everything else the others.
        """
        left = len(targets) * len(cells) * rounds
        loads = [self.results.load(cell) for cell in cells]
        with self._live(targets, loads) as live, self._spread(live if spread else []):
            for target, relay in list(live):
                with self._forgiving(target, "first messages", live, loads):
                    # They pay for what is made once: connections, compiled code, caches.
                    self._run(target, relay, Cell(10, 1024), 0.5)
            for at, load in enumerate(loads):
                cell = load.cell
                self._tell(f"{cell}:")
                for number in range(rounds):
                    if cell.share is None:
                        load.ceiling.append(_rate(self._send(self._sink_port, cell, 0.5)))
                    turn = number % len(live) if live else 0
                    for target, relay in live[turn:] + live[:turn]:
                        with self._forgiving(target, f"round {number + 1} of {rounds}", live, loads[at:]):
                            run = self._run(target, relay, cell, seconds(max(1, left)))
                            load.relays.setdefault(target.name, []).append(run)
                            self._tell(
                                f"  {number + 1}/{rounds} {target.name}: {run.rate:,.0f}/s, {run.cpu_us:,.0f} us CPU, "
                                f"p99 {run.p99_ms:.2f} ms" + (f", {run.failed} FAILED" if run.failed else "")
                            )
                        left -= 1
            if remembers_peak:
                for target, relay in live:
                    self.results.peak_octets[target.name] = relay.child.peak_rss_octets()

    @contextmanager
    def _spread(self, live: list[Live]) -> Iterator[None]:
        """Give relays and the rest of us cores of their own, where there are enough."""
        cores = sorted(os.sched_getaffinity(0))
        if not live or len(cores) < _CORES_TO_SPREAD:
            yield
            return
        self.results.spread = True
        ours = [0, *self._sink.tree(), *self._collector.tree()]  # 0: this process, whose children inherit it
        for _, relay in live:
            for pid in relay.child.tree():
                os.sched_setaffinity(pid, cores[:2])
        for pid in ours:
            os.sched_setaffinity(pid, cores[2:])
        try:
            yield
        finally:
            for pid in ours:
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(pid, cores)

    def _run(self, target: Target, relay: Running, cell: Cell, seconds: float) -> Run:
        began = time.monotonic()
        pace = None if cell.share is None else cell.share * self._highest_rate(target, cell)
        cpu_before, beside_before = relay.cpu_seconds(), relay.beside_cpu_seconds()
        sink_before = self._sink.ask()
        spans_before = self._collector.ask()["spans"]
        sent = self._send(relay.port, cell, seconds, rate=pace)
        self._settle(target, relay)
        if not sent["accepted"]:
            raise RuntimeError(f"no message accepted: {_reasons(sent)}")
        if not relay.child.is_alive:
            raise RuntimeError("it ended under load")
        accepted = int(sent["accepted"])
        sink_after = self._sink.ask()
        self._budget.took(time.monotonic() - began, seconds)
        return Run(
            accepted=accepted,
            failed=int(sent["failed"]),
            failures=sent["failures"],
            rate=_rate(sent),
            cpu_us=(relay.cpu_seconds() - cpu_before) / accepted * 1e6,
            p50_ms=sent["p50_ms"],
            p99_ms=sent["p99_ms"],
            round_trips=(sink_after["round_trips"] - sink_before["round_trips"]) / accepted,
            spans=(self._collector.ask()["spans"] - spans_before) / accepted,
            beside_cpu_us=(relay.beside_cpu_seconds() - beside_before) / accepted * 1e6,
        )

    def _highest_rate(self, target: Target, cell: Cell) -> float:
        runs = self.results.runs(cell.at_full_rate, target.name)
        if not runs:
            raise RuntimeError("its highest rate is not known")
        return median(run.rate for run in runs)

    def _send(
        self, port: int, cell: Cell, seconds: float, *, messages: int | None = None, rate: float | None = None
    ) -> dict[str, Any]:
        plan = {
            "sessions": cell.sessions,
            "size_octets": cell.size_octets,
            "keeps_connections": cell.keeps_connections,
            **({"messages": messages} if messages else {"seconds": seconds}),
            **({"rate": rate} if rate else {}),
        }
        (sent,) = self._send_at_once(port, [plan])
        return sent

    def _send_at_once(self, port: int, plans: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
        """Several loads at once, each from a process of its own; what came of each."""
        generators = [
            python("tests.bench.load", json.dumps({"host": "127.0.0.1", "port": port, **plan}), talks=True)
            for plan in plans
        ]
        try:
            return [generator.read() for generator in generators]
        finally:
            for generator in generators:
                generator.stop()

    def _settle(self, target: Target, relay: Running) -> None:
        """Return when nothing happens any more: the relay takes no CPU, the sink and the collector get nothing."""
        wanted = _QUIET_LOOKS_EXPORT if target.exports_spans else _QUIET_LOOKS
        deadline = time.monotonic() + _SETTLE_SECONDS
        quiet = 0
        before: tuple[object, ...] = ()
        cpu_before = 0.0
        while quiet < wanted and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)  # what is waited for is the absence of events
            cpu = relay.cpu_seconds()
            seen = (self._sink.ask()["octets"], self._collector.ask()["octets"] if target.exports_spans else 0)
            # One tick of the CPU clock is what a timer may cost.
            quiet = quiet + 1 if seen == before and cpu - cpu_before <= 0.01 else 0
            before, cpu_before = seen, cpu

    # Memory and start

    def idle_memory(self, targets: Sequence[Target], *, connections: int, rounds: int) -> None:
        """Resident octets, but for files', that each connection costs after its EHLO, beyond what the first ones
        brought in."""
        found: dict[str, list[float]] = {}
        wanted = list(targets)
        for _ in range(rounds):
            for target in list(wanted):
                try:
                    relay = self.start(target)
                    try:
                        with self._held(relay, _WARM_CONNECTIONS):
                            self._settle(target, relay)  # its start goes on after the first greeting
                            before = relay.child.private_octets()
                            with self._held(relay, connections):
                                grown = relay.child.private_octets() - before
                    finally:
                        relay.stop()
                except _FAILURES as failure:
                    wanted.remove(target)
                    self._skip(f"{target.name}, idle connections", str(failure))
                    continue
                found.setdefault(target.name, []).append(grown / connections)
        for name, octets in found.items():
            self.results.idle_octets[name] = Figure(tuple(octets))
            self._tell(f"{name}: {self.results.idle_octets[name].median / KIB:.1f} KiB per idle connection")

    @contextmanager
    def _held(self, relay: Running, connections: int) -> Iterator[None]:
        holder = python("tests.bench.load", "hold", str(relay.port), str(connections), talks=True)
        try:
            holder.read()
            yield
        finally:
            holder.stop()

    def cold_start(self, targets: Sequence[Target], *, rounds: int) -> None:
        """Seconds from start to the first 220, interleaved."""
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for target in targets:
                with self._forgiving(target, "cold start"):
                    place = self._place(target)
                    began = time.perf_counter()
                    relay = target.ready(place)
                    found.setdefault(target.name, []).append(time.perf_counter() - began)
                    relay.stop()
        for name, seconds in found.items():
            self.results.cold_start_seconds[name] = Figure(tuple(seconds))
            self._tell(f"{name}: {self.results.cold_start_seconds[name].text('.2f')} s to the first 220")

    def large_mails(self, targets: Sequence[Target], *, mails: int, rounds: int, size_octets: int = 25 * MIB) -> None:
        """The highest resident memory while so many large mails pass at once."""
        self.results.large_mails = mails
        for target in targets:
            found: list[float] = []
            with self._forgiving(target, "large mails"):
                for _ in range(rounds):
                    relay = self.start(target)
                    try:
                        sent = self._send(relay.port, Cell(mails, size_octets), 0, messages=mails)
                        if sent["accepted"] != mails:
                            raise RuntimeError(_reasons(sent))
                        found.append(float(relay.child.peak_rss_octets()))
                    finally:
                        relay.stop()
            if found:
                self.results.large_mails_peak_octets[target.name] = Figure(tuple(found))
                self._tell(f"{target.name}: {found[-1] / MIB:.0f} MiB at {mails} large mails")

    def second_opinion(self, targets: Sequence[Target], *, rounds: int) -> None:
        """The same by Postfix's own tools: smtp-source through the relay to smtp-sink, 1 KB, 10 sessions, kept."""
        if shutil.which("smtp-source") is None or shutil.which("smtp-sink") is None:
            self._skip("second opinion", "not installed: smtp-source, smtp-sink")
            return
        port = unclaimed_port()
        sink = self._started(Child(["smtp-sink", "-u", "nobody", f"127.0.0.1:{port}", "1024"]))
        wait_for_greeting(port, sink)
        found: dict[str, list[float]] = {}
        with self._live(targets, upstream_port=port) as live:
            for _ in range(rounds):
                for target, relay in list(live):
                    with self._forgiving(target, "second opinion", live):
                        began = time.perf_counter()
                        done = subprocess.run(
                            ["smtp-source", "-d", "-s", "10", "-m", str(_SMTP_SOURCE_MESSAGES), "-l", "1024",
                             "-f", "load@example.com", "-t", "sink@example.com", f"127.0.0.1:{relay.port}"],
                            capture_output=True, text=True, timeout=120, check=False,
                        )  # fmt: skip
                        if done.returncode:
                            raise RuntimeError(done.stderr.strip()[-200:])
                        seconds = time.perf_counter() - began
                        found.setdefault(target.name, []).append(_SMTP_SOURCE_MESSAGES / seconds)
        for name, rates in found.items():
            self.results.second_opinion[name] = Figure(tuple(rates))

    # The long run

    def long_run(
        self, target: Target, *, rate_of: str, cell: Cell, seconds: float, stretches: int, filling: int
    ) -> None:
        """Mixed load for a long time on a relay that is watched: what it holds, and its latency, after each stretch.

        Args:
            target: the relay under `targets.watched`.
            rate_of: the relay and cell whose highest rate is known.
            cell: the load whose latency is looked at; others run beside it.
            filling: mails before it begins, which fill what keeps the last ones.
        """
        with self._forgiving(target, "long run"):
            runs = self.results.runs(cell, rate_of)
            if not runs:
                raise RuntimeError(f"the highest rate of {rate_of} is not known")
            pace = _LONG_SHARE * median(run.rate for run in runs)
            place = self._place(target)
            relay = target.ready(place)
            self.results.long_run = LongRun(target.name, pace)
            try:
                self._send(relay.port, cell, 0, messages=filling)
                began = time.monotonic()
                plan = {"sessions": cell.sessions, "size_octets": cell.size_octets, "rate": pace}
                each = seconds / (stretches + 1)
                for number in range(stretches + 1):
                    paced, *beside = self._send_at_once(
                        relay.port, [{**one, "seconds": each} for one in (plan, *_LONG_BESIDE)]
                    )
                    self._settle(target, relay)
                    if not number:
                        continue  # the first stretch makes what is made once
                    sample = self._sample(relay, place, time.monotonic() - began, [paced, *beside])
                    self.results.long_run.samples.append(sample)
                    self._tell(
                        f"  {number}/{stretches}: p99 {sample.p99_ms:.2f} ms, {sample.resident_octets / MIB:.1f} MiB, "
                        f"{sample.descriptors} descriptors, {sample.objects:,} objects"
                    )
            except _FAILURES as failure:
                raise RuntimeError(" / ".join([str(failure), *last_words(place.directory)])) from failure
            finally:
                relay.stop()

    def _sample(self, relay: Running, place: Place, at_seconds: float, sent: Sequence[dict[str, Any]]) -> Sample:
        held = watched.counts(os.fspath(place.directory / "watch"))
        return Sample(
            at_seconds=at_seconds,
            accepted=sum(int(one["accepted"]) for one in sent),
            failed=sum(int(one["failed"]) for one in sent),
            p50_ms=sent[0]["p50_ms"],
            p99_ms=sent[0]["p99_ms"],
            resident_octets=relay.child.rss_octets(),
            descriptors=relay.child.descriptors(),
            **held,
        )

    def _skip(self, what: str, why: str) -> None:
        self.results.skipped[what] = why
        self._tell(f"SKIPPED {what}: {why}")


def _rate(sent: Mapping[str, Any]) -> float:
    """Messages per second."""
    return float(sent["accepted"] / sent["seconds"]) if sent["seconds"] else 0.0


def _reasons(sent: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} times {reason}" for reason, count in sent["failures"].items()) or "no reason"
