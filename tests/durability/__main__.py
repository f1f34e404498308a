"""`python -m tests.durability kill|crashes|faults|full|workers|model|gateways|away|churn`: the long proofs.

`tests/spool/test_durability.py`, `tests/spool/embedded/test_crashes.py`, `tests/end_to_end/test_workers.py` and
`tests/spool/postgresql/test_gateways.py` run short ones.
"""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from tests.durability.away import go_away
from tests.durability.churning import churn
from tests.durability.failing import CALLS, fill, inject, starve
from tests.durability.killing import kill_again_and_again
from tests.durability.model import MODES, Model, run_model
from tests.durability.sharing import TAKEOVER_SECONDS, keep_limits, kill_in_turn, stop_at_known_moments
from tests.durability.supervising import storm
from tests.spool.embedded.crashing import crash_at_any_call
from tests.spool.postgresql.schemas import new_place


def main() -> int:
    """Run one of them; the exit status is 1 where a claim does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.durability", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    kill = commands.add_parser("kill", help="kill -9 at random moments, under load")
    kill.add_argument("--kills", type=int, default=200)
    kill.add_argument("--seed", type=int, default=1)
    crashes = commands.add_parser("crashes", help="after any system call of the embedded store: killed, or power lost")
    crashes.add_argument("--seeds", type=int, default=20, help="so many times, some 2000 system calls are made")
    crashes.add_argument("--moments", type=int, default=100, help="of these, after which crashes are looked at")
    crashes.add_argument("--crashes", type=int, default=4, help="at each of them; the first two are kills")
    crashes.add_argument("--seed", type=int, default=1, help="the first one")
    faults = commands.add_parser("faults", help="errors injected into one system call after the other")
    faults.add_argument("--most", type=int, default=8, help="the last call of each kind that fails")
    commands.add_parser("full", help="a disk that fills up")
    workers = commands.add_parser("workers", help="random signals and kills to a supervisor and its workers")
    workers.add_argument("--seconds", type=float, default=60.0)
    workers.add_argument("--seed", type=int, default=1)
    model = commands.add_parser(
        "model", help="clients that vanish, an upstream that lies, kills, a full disk: balanced"
    )
    model.add_argument("--transactions", type=int, default=20_000, help="in each mode")
    model.add_argument("--mode", choices=MODES, action="append", help="default: all")
    model.add_argument("--workers", type=int, default=2, help="in the modes without a queue")
    model.add_argument("--seed", type=int, default=1)
    gateways = commands.add_parser("gateways", help="several on one queue: kill -9, and stops longer than their leases")
    gateways.add_argument("--kills", type=int, default=10)
    gateways.add_argument("--stops", type=int, default=3)
    gateways.add_argument("--mails", type=int, default=1000, help="before the first kill, and again at the end")
    gateways.add_argument("--limited-mails", type=int, default=1500, help="of which 600 a minute may leave")
    gateways.add_argument("--seed", type=int, default=1)
    away = commands.add_parser("away", help="a shared queue whose database goes away and comes back")
    away.add_argument("--seconds", type=float, default=60.0)
    churned = commands.add_parser("churn", help="a shared queue while an old transaction holds vacuum up")
    churned.add_argument("--seconds", type=float, default=3600.0)
    churned.add_argument("--rate", type=float, default=500.0)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk that is to be tried")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="otel-smtp-durability-", dir=arguments.directory))
    print(f"in {directory}", flush=True)
    match arguments.command:
        case "kill":
            books = kill_again_and_again(
                arguments.kills, directory, seed=arguments.seed, tell=lambda line: print(line, flush=True)
            )
            print(books.told())
            return int(bool(books.lost or books.unmarked_duplicates or not books.is_balanced))
        case "crashes":
            is_wrong = False
            for seed in range(arguments.seed, arguments.seed + arguments.seeds):
                (seeded := directory / f"seed{seed}").mkdir()
                found = asyncio.run(
                    crash_at_any_call(
                        seeded, seed, workers=24, steps=40, moments=arguments.moments, crashes=arguments.crashes
                    )
                )
                print(f"seed {seed}: {found.told()}", *found.faults, sep="\n", flush=True)
                is_wrong |= bool(found.faults)
            return int(is_wrong)
        case "faults":
            is_wrong = False
            for call, error in CALLS:
                for when in range(1, arguments.most + 1):
                    outcome = inject(call, error, when, directory / f"{call}-{error}-{when}")
                    is_wrong |= bool(outcome.lost) or outcome.is_damaged or not outcome.survived
                    print(f"{call} {error} at call {when}: {outcome.told()}", flush=True)
            return int(is_wrong)
        case "workers":
            stormed = storm(
                arguments.seconds, directory, seed=arguments.seed, tell=lambda line: print(line, flush=True)
            )
            print(stormed.told())
            return int(not stormed.is_right)
        case "gateways":
            place = asyncio.run(new_place(takeover_seconds=TAKEOVER_SECONDS))
            shared = kill_in_turn(
                place, directory, arguments.kills, stops=arguments.stops, mails=arguments.mails, seed=arguments.seed,
                tell=lambda line: print(line, flush=True),
            )  # fmt: skip
            print(shared.told(), flush=True)
            (moments := directory / "moments").mkdir()
            stopped = stop_at_known_moments(place, moments)
            print(f"stopped at known moments: {stopped}")
            (limited := directory / "limits").mkdir()
            place = asyncio.run(new_place(takeover_seconds=TAKEOVER_SECONDS))
            kept = keep_limits(
                place, limited, arguments.kills, mails=arguments.limited_mails, count=600, period_seconds=60.0,
                seed=arguments.seed, tell=lambda line: print(line, flush=True),
            )  # fmt: skip
            print(f"600/m and 3 connections in all: {kept.told()}", flush=True)
            is_wrong = kept.most_open > 3 or kept.most_in_a_window > 600 or bool(kept.books.lost)
            is_wrong |= max(shared.takeovers, default=0) > TAKEOVER_SECONDS + 2 or stopped.taken["content"] != 2
            is_wrong |= bool(shared.lost or shared.unmarked_duplicates or shared.left or not shared.is_balanced)
            return int(is_wrong or stopped.taken != {"RCPT": 1, "DATA": 1, "content": 2} or stopped.marked != 3)
        case "away":
            absence = go_away(directory, arguments.seconds, tell=lambda line: print(line, flush=True))
            print(absence.told())
            return int(not absence.is_right)
        case "churn":
            churned_books = asyncio.run(
                churn(arguments.seconds, arguments.rate, tell=lambda line: print(line, flush=True))
            )
            print(churned_books.told())
            return int(not churned_books.is_right)
        case "model":
            print(Model.HEADING, flush=True)
            is_right = True
            for mode in arguments.mode or MODES:
                run = run_model(
                    mode, arguments.transactions, directory / mode,
                    seed=arguments.seed, workers=arguments.workers,
                    tell=lambda line: print(line, file=sys.stderr, flush=True),
                )  # fmt: skip
                print(run.told(), *run.found(), sep="\n", flush=True)
                is_right &= run.is_right
            return int(not is_right)
        case _:
            full = fill(directory / "full")
            print(full.told(), flush=True)
            starved = [
                starve(directory / f"starved{trial}", mails=600 * (trial + 1), starts=trial + 1) for trial in range(4)
            ]
            for one in starved:
                print(one.told())
            return int(bool(full.lost) or not full.refused or not all(one.is_right for one in starved))


sys.exit(main())
