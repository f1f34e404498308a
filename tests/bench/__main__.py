"""The benchmark. `python -m tests.bench --help`; tests/README.md tells what it measures and how far to trust it."""

import argparse
import datetime
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from otel_smtp.status.traces import RECENT_SPANS
from tests import readme
from tests.bench import report
from tests.bench.budget import Budget, duration
from tests.bench.charts import CHARTS, draw
from tests.bench.figures import Lab, Results
from tests.bench.goals import DURABLE, HALF, HEADLINE, LARGE, LARGER, MANY, SINGLE, goals, markdown
from tests.bench.measure import Bench
from tests.bench.process import ROOT
from tests.bench.targets import gateway, peers
from tests.bench.targets.base import Target
from tests.readme import PUBLISHED

HEADLINE_RELAYS: Final = (
    peers.NULL,
    peers.NULL_ASYNCIO,
    gateway.OFF,
    gateway.SAMPLED,
    gateway.TRACED_ONLY,
    gateway.TRACED,
    gateway.AS_INSTALLED,
    gateway.ASYNCIO,
    peers.AIOSMTPD,
    peers.AIOSMTPD_TRACED,
    peers.NODEMAILER,
    peers.HARAKA,
    peers.GO_SMTP,
    peers.POSTFIX_PROXY,
)
# Beside each other in everything else.
COMPARED: Final = (
    peers.NULL,
    gateway.OFF,
    gateway.TRACED,
    peers.AIOSMTPD,
    peers.NODEMAILER,
    peers.HARAKA,
    peers.GO_SMTP,
    peers.POSTFIX_PROXY,
)
DURABLE_RELAYS: Final = (gateway.QUEUE, gateway.QUEUE_POSTGRESQL, peers.POSTFIX_QUEUE)
WORKERS: Final = (gateway.TRACED, gateway.TWO)
WATCHED: Final = Target("gateway, traced, long run", gateway.watched, exports_spans=True, is_gateway=True)
# The long run's part of the whole, where it is not given: of twenty minutes, five.
_LONG_RUN_PART: Final = 4
# Mails before it, enough to fill what the page keeps of recent traces: each has two spans at least.
_FILLING: Final = RECENT_SPANS


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the benchmark.

    Attributes:
        runs: of load, whose length the budget decides.
        fixed_seconds: about how long the rest of it takes.
        measure: given how long a run may take, by how many are left in this part.
    """

    name: str
    runs: int
    fixed_seconds: float
    measure: Callable[[Callable[[int], float]], None]


def main() -> int:
    """Measure and report; 0 if something was measured."""
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was measured is written
    if options.draw:
        options.write.mkdir(parents=True, exist_ok=True)
        return _write(report.decode(options.draw.read_bytes()), options)
    results = Results(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=report.machine(),
        cpus=os.cpu_count() or 1,
    )
    for target in (*HEADLINE_RELAYS, *DURABLE_RELAYS, *WORKERS, *options.peer):
        results.languages[target.name] = target.language
        if target.is_gateway and target.name not in results.gateways:
            results.gateways.append(target.name)
    cache = Path(tempfile.gettempdir()) / f"otel-smtp-bench-{os.getuid()}"
    cache.mkdir(mode=0o755, exist_ok=True)
    budget = Budget(options.budget, fixed_seconds=0.3 if options.quick else 1.0)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.directory) as directory:
        # Postfix drops to a user of its own and must reach its queue.
        Path(directory).chmod(0o755)
        with Bench(Path(directory), cache, budget, results, _tell) as bench:
            try:
                _measure(list(_parts(bench, options)), budget, results, options.write)
            except KeyboardInterrupt:
                results.skipped["the rest"] = "interrupted"
    return _write(results, options)


def _measure(parts: Sequence[Part], budget: Budget, results: Results, directory: Path) -> None:
    """One part after the other; what goes wrong in one is named, and the next one follows."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        later = parts[number + 1 :]
        runs_later = sum(one.runs for one in later)
        reserved = sum(one.fixed_seconds for one in (part, *later))
        before = os.getloadavg()[0]
        _tell(f"-- {part.name}, load average {before:.2f}")

        def seconds(left: int, runs_later: int = runs_later, reserved: float = reserved) -> float:
            return budget.seconds_each(left + runs_later, reserved_seconds=reserved)

        try:
            part.measure(seconds)
        except Exception as failure:  # noqa: BLE001 - a fault in one part must not cost hours of the others
            results.skipped[part.name] = f"{type(failure).__name__}: {failure}"
            _tell(f"SKIPPED {part.name}: {failure!r}")
        results.load_average[part.name] = (before, os.getloadavg()[0])
        (directory / report.JSON_NAME).write_bytes(report.encode(results))


def _parts(bench: Bench, options: argparse.Namespace) -> Iterator[Part]:
    rounds: int = options.rounds
    quick: bool = options.quick

    def chosen(targets: Sequence[Target]) -> list[Target]:
        wanted = [*targets, *(options.peer if targets in (HEADLINE_RELAYS, COMPARED) else ())]
        return [target for target in wanted if not options.only or any(part in target.name for part in options.only)]

    def loads(name: str, targets: Sequence[Target], cells: Sequence[object], **how: bool) -> Part:
        relays = chosen(targets)
        return Part(
            name,
            runs=len(relays) * len(cells) * rounds,
            fixed_seconds=3.0 * len(relays),
            measure=lambda seconds: bench.load_rounds(relays, cells, rounds=rounds, seconds=seconds, **how),  # type: ignore[arg-type]  # of cells
        )

    resting = [target for target in chosen(COMPARED) if not target.has_process_per_connection]
    connections = 200 if quick else 2000
    parts = [
        loads("headline", HEADLINE_RELAYS, (HEADLINE,), remembers_peak=True),
        loads("latency", COMPARED, (HALF,)),
        loads("sizes", COMPARED, (LARGER, LARGE)),
        loads("single", COMPARED, (SINGLE,)),
        loads("workers", WORKERS, (MANY,), spread=True),
        loads("durable", DURABLE_RELAYS, DURABLE),
        Part(
            "idle",
            0,
            len(resting) * rounds * connections / 600,
            lambda _: bench.idle_memory(resting, connections=connections, rounds=rounds),
        ),
        Part("start", 0, 1.5 * len(resting) * rounds, lambda _: bench.cold_start(resting, rounds=rounds)),
        Part(
            "large",
            0,
            5 if quick else 60,
            lambda _: bench.large_mails(
                chosen((gateway.TRACED,)), mails=4 if quick else 100, rounds=1 if quick else min(rounds, 3)
            ),
        ),
        Part("opinion", 0, 4.0 * rounds, lambda _: bench.second_opinion(
            chosen((gateway.OFF, gateway.TRACED, peers.AIOSMTPD)), rounds=rounds
        )),
        Part("lab", 0, 10 if quick else 30, lambda _: _lab(bench, batches=3 if quick else 40)),
        Part("long", 0, options.long_run + 5, lambda _: bench.long_run(
            WATCHED, rate_of=gateway.TRACED.name, cell=HEADLINE, seconds=options.long_run, stretches=4 if quick else 12,
            filling=500 if quick else _FILLING,
        )),
    ]  # fmt: skip
    for part in parts:
        if not options.part or part.name in options.part:
            yield part


def _lab(bench: Bench, *, batches: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.lab", "--json", "--batches", str(batches)],
        cwd=ROOT, capture_output=True, timeout=600, check=True,
    )  # fmt: skip
    bench.results.lab = msgspec.json.decode(done.stdout, type=Lab)


def _write(results: Results, options: argparse.Namespace) -> int:
    """Table, JSON and charts."""
    directory: Path = options.write
    (directory / report.JSON_NAME).write_bytes(report.encode(results))
    try:
        charts = draw(results, directory)
    except ImportError as missing:
        charts = [name for name in CHARTS if (directory / name).exists()]
        _tell(f"no charts: {missing}; pip install -e '.[bench]', then --draw {directory / report.JSON_NAME}")
    (directory / report.MARKDOWN_NAME).write_text(report.as_markdown(results, charts), encoding="utf-8")
    if directory == PUBLISHED:
        readme.write()
    print(markdown(list(goals(results))))
    _tell(f"written to {directory}: {', '.join([report.MARKDOWN_NAME, report.JSON_NAME, *charts])}")
    if why := report.reservations(results):
        _tell(f"not for publication: {'; '.join(why)}")
    return 0 if any(load.relays for load in results.loads) else 1


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Benchmark of the gateway beside other relays."
    )
    parser.add_argument(
        "--budget",
        type=duration,
        metavar="TIME",
        help="of the whole run: 20m, 1h; the length of each run follows from it",
    )
    parser.add_argument("--rounds", type=int, help="rounds of each load (default 5)")
    parser.add_argument("--quick", action="store_true", help="a smoke run of two minutes; its figures mean nothing")
    parser.add_argument("--only", metavar="TEXT", action="append", help="relays whose name holds TEXT; repeatable")
    parser.add_argument(
        "--part",
        action="append",
        choices=(
            "headline", "latency", "sizes", "single", "workers", "durable", "idle", "start", "large", "opinion", "lab",
            "long",
        ),
        help="only this part; repeatable. latency and long need headline",
    )  # fmt: skip
    parser.add_argument(
        "--peer", type=peers.named, action="append", default=[], metavar="NAME=COMMAND",
        help="a relay besides: 'smtprelay (Go)=smtprelay -listen {listen} -remote_host {upstream}'; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--long-run", type=duration, metavar="TIME", help="of the long run (default: a quarter of the budget)"
    )
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="where spools and databases lie: on the disk to measure"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--write",
        type=Path,
        metavar="DIR",
        default=Path("bench-results"),
        help="for the results (default bench-results)",
    )
    where.add_argument(
        "--publish", dest="write", action="store_const", const=PUBLISHED, help=f"write to {PUBLISHED.relative_to(ROOT)}"
    )
    parser.add_argument("--draw", type=Path, metavar="JSON", help="measure nothing; table and charts of these results")
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    if options.long_run is None:
        options.long_run = options.budget / _LONG_RUN_PART if options.budget else 8.0 if options.quick else 120.0
    return options


if __name__ == "__main__":
    raise SystemExit(main())
