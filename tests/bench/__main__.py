"""The benchmark. `python -m tests.bench --help`; tests/README.md tells what it measures and how far to trust it."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.bench import report
from tests.bench.figures import KIB, MIB, Cell
from tests.bench.goals import goals
from tests.bench.measure import Bench
from tests.bench.targets import gateway, peers
from tests.bench.targets.base import Target

HEADLINE: Final = Cell(10, 10 * KIB)
MANY: Final = Cell(50, 10 * KIB)
STANDARD: Final = (
    HEADLINE,
    Cell(1, 10 * KIB),
    Cell(10, 1 * KIB),
    MANY,
    Cell(10, 10 * KIB, keeps_connections=False),
    Cell(10, 100 * KIB),
    Cell(10, 5 * MIB),
)
EVERY: Final = tuple(
    Cell(sessions, size, keeps)
    for size in (1 * KIB, 10 * KIB, 100 * KIB, 5 * MIB)
    for sessions in (1, 10, 50)
    for keeps in (True, False)
)
TARGETS: Final = (
    gateway.GATEWAY_OFF,
    gateway.GATEWAY_SAMPLED,
    gateway.GATEWAY_TRACED,
    gateway.GATEWAY_SDK,
    gateway.GATEWAY_ASYNCIO,
    gateway.GATEWAY_BUFFERED,
    gateway.GATEWAY_BUFFERED_TRACED,
    gateway.GATEWAY_TWO,
    gateway.GATEWAY_TWO_TRACED,
    gateway.GATEWAY_QUEUE,
    gateway.GATEWAY_QUEUE_TRACED,
    peers.AIOSMTPD,
    peers.AIOSMTPD_TRACED,
    peers.NODEMAILER,
    peers.HARAKA,
    peers.POSTFIX_PROXY,
    peers.POSTFIX_QUEUE,
)
QUICK: Final = (gateway.GATEWAY_OFF, gateway.GATEWAY_TRACED, peers.AIOSMTPD, peers.AIOSMTPD_TRACED)
RESTING: Final = (gateway.GATEWAY_OFF, gateway.GATEWAY_TRACED, peers.AIOSMTPD, peers.NODEMAILER)


def main() -> int:
    """Measure and report; 0 if something was measured."""
    options = _options()
    chosen: tuple[Target, ...] = QUICK if options.quick else TARGETS
    if options.only:
        chosen = tuple(target for target in chosen if any(part in target.name for part in options.only))
    cells = (HEADLINE,) if options.quick or options.headline else EVERY if options.every_cell else STANDARD
    if options.durable:
        chosen = tuple(target for target in TARGETS if "queue" in target.name)
        cells = tuple(Cell(sessions, 10 * KIB) for sessions in (1, 10, 50))
        options.loads = True
    rounds = options.rounds or (1 if options.quick else 5)
    seconds = options.seconds or (0.3 if options.quick else 1.0)
    cache = Path(tempfile.gettempdir()) / f"otel-smtp-bench-{os.getuid()}"
    cache.mkdir(mode=0o755, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="otel-smtp-bench-") as directory:
        # Postfix drops to a user of its own and must reach its queue.
        Path(directory).chmod(0o755)
        with Bench(Path(directory), cache, lambda text: print(text, file=sys.stderr, flush=True)) as bench:
            bench.load_rounds(chosen, cells, rounds=rounds, seconds=seconds)
            resting = _among(RESTING, chosen) if not options.loads else []
            bench.cold_start(resting, rounds=2 if options.quick else 5)
            bench.idle_memory(resting, connections=200 if options.quick else 4900)
            if not options.loads:
                bench.large_mails(_among((gateway.GATEWAY_TRACED,), chosen), mails=4 if options.quick else 100)
            if not options.quick and not options.loads:
                bench.second_opinion(
                    _among((gateway.GATEWAY_OFF, gateway.GATEWAY_TRACED, peers.AIOSMTPD), chosen), rounds=3
                )
            results = bench.results
    found = list(goals(results, HEADLINE, MANY))
    print(report.as_markdown(results, found))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(results, found), indent=1), encoding="utf-8")
    return 0 if results.loads else 1


def _among(wanted: tuple[Target, ...], chosen: tuple[Target, ...]) -> list[Target]:
    return [target for target in wanted if target in chosen]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Benchmark of the gateway and its peers."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run of well under a minute; its figures mean nothing"
    )
    parser.add_argument("--headline", action="store_true", help=f"one load only: {HEADLINE}")
    parser.add_argument("--every-cell", action="store_true", help=f"all {len(EVERY)} loads instead of {len(STANDARD)}")
    parser.add_argument("--durable", action="store_true", help="queues only, at 1, 10 and 50 sessions")
    parser.add_argument("--loads", action="store_true", help="loads only: no cold start, no memory, no second opinion")
    parser.add_argument("--only", metavar="TEXT", action="append", help="relays whose name holds TEXT; repeatable")
    parser.add_argument("--rounds", type=int, help="rounds of each load (default 5)")
    parser.add_argument("--seconds", type=float, help="seconds of one run (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every round of every figure")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
