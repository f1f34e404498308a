"""The fuzzer. `python -m tests.fuzz --help`; tests/README.md tells how to use it.

Each target runs in a process of its own, under libFuzzer (atheris), with a working corpus in a temporary directory that
begins as the kept corpus and the seeds. An input that fails is kept as `corpus/TARGET/crash-...`, so that the tests
fail until its fault is mended.
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.fuzz.choosing import choose
from tests.fuzz.seeds import seeds
from tests.fuzz.targets import CORPUS, MAX_INPUT_OCTETS, TARGETS

ROOT: Final = Path(__file__).resolve().parent.parent.parent
HANG_SECONDS: Final = 10  # an input takes milliseconds; whatever takes so long would hold an event loop
KEPT_FILES: Final = 45  # of each target
KEPT_OCTETS: Final = 1024

_STATUS: Final = re.compile(r"^#(\d+)\s.*\bcov: (\d+) ft: (\d+) corp: (\d+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Result:
    """What one target's run came to."""

    target: str
    runs: int
    first_features: int  # of the kept corpus and the seeds
    features: int
    corpus: int
    seconds: float
    crashes: tuple[str, ...]
    output: str


def main() -> int:
    """Run what was asked for; 1 if an input fails, 2 without atheris."""
    options = _options()
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install -e '.[fuzz]'", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="otel-smtp-fuzz-") as directory, ThreadPoolExecutor(options.jobs) as pool:
        running = [pool.submit(_run, target, Path(directory), options) for target in options.target or TARGETS]
        results = [one.result() for one in running]
    print("| target | executions | features at first | at last | inputs | seconds | crashes |")
    print("|---|---:|---:|---:|---:|---:|---|")
    for result in results:
        print(
            f"| {result.target} | {result.runs} | {result.first_features} | {result.features} | {result.corpus} "
            f"| {result.seconds:.0f} | {' '.join(result.crashes)} |"
        )
    for result in results:
        if result.crashes or not result.runs:
            print(f"\n{result.target}:\n{result.output[-6000:]}", file=sys.stderr)
    return int(any(result.crashes or not result.runs for result in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--runs", type=int, default=-1, help="executions of each target at most")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time")
    parser.add_argument("--keep", action="store_true", help="keep a small choice of the inputs in tests/fuzz/corpus")
    options = parser.parse_args()
    if unknown := set(options.target) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    return options


def _run(target: str, directory: Path, options: argparse.Namespace) -> Result:
    work = directory / target
    work.mkdir()
    kept = CORPUS / target
    kept.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(target)):
        (work / f"seed-{number}").write_bytes(seed)
    before = set(kept.glob("crash-*"))
    started = time.monotonic()
    done = _fuzzer(
        target,
        f"-max_total_time={options.seconds}",
        f"-runs={options.runs}",
        f"-max_len={MAX_INPUT_OCTETS}",
        f"-timeout={HANG_SECONDS}",
        f"-artifact_prefix={directory}/{target}-",
        str(work),
        str(kept),
    )
    seconds = time.monotonic() - started
    for artifact in directory.glob(f"{target}-*"):
        kind, _, digest = artifact.name.removeprefix(f"{target}-").partition("-")
        if kind in ("crash", "timeout", "oom"):
            (kept / f"crash-{digest[:12]}").write_bytes(artifact.read_bytes())
    if options.keep:
        _keep(target, work)
    found = _STATUS.findall(done)
    runs = [int(status[0]) for status in found]
    return Result(
        target,
        max(runs, default=0),
        int(found[0][2]) if found else 0,
        max((int(status[2]) for status in found), default=0),
        int(found[-1][3]) if found else 0,
        seconds,
        tuple(sorted(path.name for path in set(kept.glob("crash-*")) - before)),
        done,
    )


def _keep(target: str, work: Path) -> None:
    """Choose again which inputs are kept; those that once failed stay."""
    kept = CORPUS / target
    inputs = [path.read_bytes() for path in (*work.iterdir(), *kept.glob("seed-*"))]
    chosen = choose(target, inputs, most=KEPT_FILES, most_octets=KEPT_OCTETS)
    for path in kept.glob("seed-*"):
        path.unlink()
    for number, octets in enumerate(chosen):
        (kept / f"seed-{number:02}").write_bytes(octets)


def _fuzzer(target: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.process", target, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.stdout.decode("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main())
