"""Measuring: interleaved rounds of load, and the figures that need a relay of their own."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from tests.bench.figures import MIB, Cell, Figure, Results, Run
from tests.bench.process import ROOT, Child, python, wait_for_greeting
from tests.bench.targets.base import Place, Running, Target, UnavailableError
from tests.support.ports import unclaimed_port

# Quiet for so many looks in a row is taken for the end of what a run left behind: delivery, export.
_LOOK_SECONDS: Final = 0.1
_QUIET_LOOKS: Final = 2
_QUIET_LOOKS_EXPORT: Final = 8  # more than the half second between two exports
_SETTLE_SECONDS: Final = 30.0
_SMTP_SOURCE_MESSAGES: Final = 2000

Tell = Callable[[str], None]


class Bench:
    """One benchmark: sink and collector run as long as it does."""

    def __init__(self, directory: Path, cache: Path, tell: Tell) -> None:
        self.results = Results()
        self._directory = directory
        self._cache = cache
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

    def start(self, target: Target, *, upstream_port: int | None = None) -> Running:
        """A relay in a directory of its own."""
        self._places += 1
        directory = self._directory / f"{self._places}-{re.sub(r'[^a-z0-9]+', '-', target.name.lower())}"
        return target.ready(Place(directory, self._cache, upstream_port or self._sink_port, self._collector_port))

    def load_rounds(self, targets: Sequence[Target], cells: Sequence[Cell], *, rounds: int, seconds: float) -> None:
        """Every relay under every load, so that the n-th runs of all relays stand side by side in time.

        The relays run all the time, at rest while another is measured; the order turns from round to round.
        """
        with ExitStack() as stack:
            running: list[tuple[Target, Running]] = []
            for target in targets:
                try:
                    relay = self.start(target)
                except UnavailableError as why:
                    self._skip(target.name, str(why))
                    continue
                stack.callback(relay.child.stop)
                running.append((target, relay))
                # The first messages pay for what is made once: connections, compiled code, caches.
                self._run(target, relay, Cell(10, 1024), seconds / 2)
            for cell in cells:
                self._tell(f"{cell}:")
                self.results.ceiling[cell] = self._send(self._sink_port, cell, seconds)["rate"]
                for number in range(rounds):
                    turn = number % len(running) if running else 0
                    for target, relay in running[turn:] + running[:turn]:
                        run = self._run(target, relay, cell, seconds)
                        self.results.loads.setdefault(cell, {}).setdefault(target.name, []).append(run)
                        self._tell(f"  {number + 1}/{rounds} {target.name}: {run.rate:.0f}/s, {run.cpu_us:.0f} us CPU")
            for target, relay in running:
                self.results.peak_octets[target.name] = relay.child.peak_rss_octets()

    def _run(self, target: Target, relay: Running, cell: Cell, seconds: float) -> Run:
        cpu_before = relay.child.cpu_seconds()
        sink_before = self._sink.ask()
        spans_before = self._collector.ask()["spans"]
        sent = self._send(relay.port, cell, seconds)
        self._settle(target, relay)
        accepted = max(1, int(sent["accepted"]))
        sink_after = self._sink.ask()
        return Run(
            accepted=int(sent["accepted"]),
            failed=int(sent["failed"]),
            failures=sent["failures"],
            rate=sent["rate"],
            cpu_us=(relay.child.cpu_seconds() - cpu_before) / accepted * 1e6,
            p50_ms=sent["p50_ms"],
            p99_ms=sent["p99_ms"],
            round_trips=(sink_after["round_trips"] - sink_before["round_trips"]) / accepted,
            spans=(self._collector.ask()["spans"] - spans_before) / accepted,
        )

    def _send(self, port: int, cell: Cell, seconds: float, messages: int | None = None) -> dict[str, Any]:
        plan = {
            "host": "127.0.0.1",
            "port": port,
            "sessions": cell.sessions,
            "size_octets": cell.size_octets,
            "keeps_connections": cell.keeps_connections,
            **({"messages": messages} if messages else {"seconds": seconds}),
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.load", json.dumps(plan)],
            cwd=ROOT, capture_output=True, text=True, timeout=600, check=True,
        )  # fmt: skip
        sent: dict[str, Any] = json.loads(done.stdout)
        return {**sent, "rate": sent["accepted"] / sent["seconds"] if sent["seconds"] else 0.0}

    def _settle(self, target: Target, relay: Running) -> None:
        """Return when nothing happens any more: the relay takes no CPU, the sink and the collector get nothing."""
        wanted = _QUIET_LOOKS_EXPORT if target.exports_spans else _QUIET_LOOKS
        deadline = time.monotonic() + _SETTLE_SECONDS
        quiet = 0
        before: tuple[object, ...] = ()
        cpu_before = 0.0
        while quiet < wanted and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)  # what is waited for is the absence of events
            cpu = relay.child.cpu_seconds()
            seen = (self._sink.ask()["octets"], self._collector.ask()["octets"] if target.exports_spans else 0)
            # One tick of the CPU clock is what a timer may cost.
            quiet = quiet + 1 if seen == before and cpu - cpu_before <= 0.01 else 0
            before, cpu_before = seen, cpu

    def idle_memory(self, targets: Sequence[Target], *, connections: int, rounds: int = 1) -> None:
        """Resident octets that one connection costs after its EHLO."""
        for target in targets:
            found: list[float] = []
            for _ in range(rounds):
                try:
                    relay = self.start(target)
                except UnavailableError as why:
                    self._skip(f"{target.name}, idle connections", str(why))
                    break
                try:
                    before = relay.child.rss_octets()
                    holder = python("tests.bench.load", "hold", str(relay.port), str(connections), talks=True)
                    try:
                        held = int(holder.read()["held"])
                        found.append((relay.child.rss_octets() - before) / held)
                    finally:
                        holder.stop()
                except RuntimeError as refusal:
                    self._skip(f"{target.name}, idle connections", str(refusal))
                finally:
                    relay.child.stop()
            if found:
                self.results.idle_octets[target.name] = Figure(tuple(found))
                self._tell(f"{target.name}: {found[-1] / 1024:.1f} KiB an idle connection")

    def cold_start(self, targets: Sequence[Target], *, rounds: int) -> None:
        """Seconds from start to the first 220, interleaved."""
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for target in targets:
                began = time.perf_counter()
                try:
                    relay = self.start(target)
                except UnavailableError as why:
                    self._skip(f"{target.name}, cold start", str(why))
                    continue
                found.setdefault(target.name, []).append(time.perf_counter() - began)
                relay.child.stop()
        for name, seconds in found.items():
            self.results.cold_start_seconds[name] = Figure(tuple(seconds))
            self._tell(f"{name}: {self.results.cold_start_seconds[name].text('.2f')} s to the first 220")

    def large_mails(self, targets: Sequence[Target], *, mails: int, size_octets: int = 25 * MIB) -> None:
        """The highest resident memory while so many large mails pass at once."""
        self.results.large_mails = mails
        for target in targets:
            try:
                relay = self.start(target)
            except UnavailableError as why:
                self._skip(f"{target.name}, large mails", str(why))
                continue
            try:
                sent = self._send(relay.port, Cell(mails, size_octets), 0, messages=mails)
                if sent["accepted"] != mails:
                    self._skip(f"{target.name}, large mails", f"failed: {sent['failures']}")
                    continue
                self.results.large_mails_peak_octets[target.name] = relay.child.peak_rss_octets()
                self._tell(f"{target.name}: {relay.child.peak_rss_octets() / MIB:.0f} MiB at {mails} large mails")
            finally:
                relay.child.stop()

    def second_opinion(self, targets: Sequence[Target], *, rounds: int) -> None:
        """The same by Postfix's own tools: smtp-source through the relay to smtp-sink, 1 KB, 10 sessions, kept."""
        if shutil.which("smtp-source") is None or shutil.which("smtp-sink") is None:
            self._skip("second opinion", "not installed: smtp-source, smtp-sink")
            return
        port = unclaimed_port()
        sink = self._started(Child(["smtp-sink", "-u", "nobody", f"127.0.0.1:{port}", "1024"]))
        wait_for_greeting(port, sink)
        relays = [(target, self.start(target, upstream_port=port)) for target in targets]
        try:
            found: dict[str, list[float]] = {}
            for _ in range(rounds):
                for target, relay in relays:
                    began = time.perf_counter()
                    done = subprocess.run(
                        ["smtp-source", "-d", "-s", "10", "-m", str(_SMTP_SOURCE_MESSAGES), "-l", "1024",
                         "-f", "load@example.com", "-t", "sink@example.com", f"127.0.0.1:{relay.port}"],
                        capture_output=True, text=True, timeout=120, check=False,
                    )  # fmt: skip
                    if done.returncode:
                        self._skip(f"{target.name}, second opinion", done.stderr.strip()[-200:])
                        continue
                    seconds = time.perf_counter() - began
                    found.setdefault(target.name, []).append(_SMTP_SOURCE_MESSAGES / seconds)
            for name, rates in found.items():
                self.results.second_opinion[name] = Figure(tuple(rates))
        finally:
            for _, relay in relays:
                relay.child.stop()

    def _skip(self, what: str, why: str) -> None:
        self.results.skipped[what] = why
        self._tell(f"SKIPPED {what}: {why}")
