"""Types, lint and format are part of the suite: a run of the tests includes them."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent

CHECKS: Final = {
    "mypy": ("mypy",),
    "ruff check": ("ruff", "check", "--no-cache", "."),
    "ruff format": ("ruff", "format", "--no-cache", "--check", "."),
}


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.timeout(300)  # mypy without a cache reads the OpenTelemetry SDK and protobuf: half a minute on a slow core
def test_the_source_is_clean(name: str) -> None:
    module, *arguments = CHECKS[name]
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
