"""The command itself, for a few thousand executions; it needs atheris."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent.parent
RUNS: Final = 3000


@pytest.fixture(autouse=True)
def atheris() -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed (extra fuzz)")


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_a_target_is_run_and_told_of() -> None:
    done = fuzz("proxy", "--runs", str(RUNS), "--seconds", "60")
    assert done.returncode == 0, done.stdout + done.stderr
    row = re.search(r"^\| proxy \| (\d+) \| (\d+) \| (\d+) \|", done.stdout, re.MULTILINE)
    assert row is not None, done.stdout
    runs, first, last = map(int, row.groups())
    assert runs >= RUNS
    assert last >= first > 0


def test_an_unknown_target_is_refused() -> None:
    done = fuzz("postman")
    assert done.returncode == 2
    assert "no such target: postman" in done.stderr
