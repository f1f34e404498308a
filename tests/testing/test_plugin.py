"""The pytest plugin as an application's test run has it: installed, and otherwise out of the way.

Each test runs pytest in a process of its own, in an empty directory, with warnings as errors.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.test_readme import blocks

# What a run that uses no fixture must not pay for.
HEAVY: Final = (
    "otel_smtp.testing.running_gateway",
    "otel_smtp.testing.mailbox",
    "opentelemetry",
    "msgspec",
    "structlog",
)


WITHOUT_ASYNCIO: Final = ("-p", "no:asyncio")
WITH_ASYNCIO: Final = ("-o", "asyncio_default_fixture_loop_scope=function")


def run_pytest(
    directory: Path, *arguments: str, plugins: Sequence[str] = WITHOUT_ASYNCIO, **files: str
) -> subprocess.CompletedProcess[str]:
    """Run pytest on modules of the given names and texts."""
    for name, text in files.items():
        (directory / f"{name}.py").write_text(text, encoding="utf-8")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "OTEL"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={directory}", "-p", "no:cacheprovider",
         "-W", "error", *plugins, *arguments, *(f"{name}.py" for name in files if name != "conftest")],
        cwd=directory, env=environ, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def outcomes(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of pytest's report without its duration."""
    return done.stdout.strip().splitlines()[-1].strip("= ").partition(" in ")[0]


def test_the_readmes_example_passes_as_it_stands(tmp_path: Path) -> None:
    (example,) = (block for block in blocks("python") if "smtp_gateway" in block)
    done = run_pytest(tmp_path, test_shop=example)
    assert (outcomes(done), done.returncode) == ("3 passed", 0), done.stdout


@pytest.mark.long
def test_in_processes_side_by_side(tmp_path: Path) -> None:
    (example,) = (block for block in blocks("python") if "smtp_gateway" in block)
    done = run_pytest(tmp_path, "-p", "xdist", "-n", "2", test_a=example, test_b=example)
    assert (outcomes(done), done.returncode) == ("6 passed", 0), done.stdout


def test_in_coroutines_and_out_of_them_in_one_run(tmp_path: Path) -> None:
    test = """
import asyncio, smtplib, aiosmtplib, pytest

MESSAGE = "Subject: x\\n\\nHello\\n"

@pytest.fixture
def smtp_gateway_settings():
    return {"limits": {"recipients": 1}}

@pytest.mark.asyncio
async def test_async(smtp_gateway, mailbox):
    async with aiosmtplib.SMTP(hostname=smtp_gateway.host, port=smtp_gateway.port) as client:
        refused, _ = await client.sendmail("a@a.example", ["b@b.example", "c@b.example"], MESSAGE)
    assert list(refused) == ["c@b.example"]
    assert smtp_gateway.trace_of(mailbox["b@"][0]).outcome == "partly_relayed"

def test_sync(smtp_gateway, mailbox):
    with smtplib.SMTP(smtp_gateway.host, smtp_gateway.port) as client:
        assert list(client.sendmail("a@a.example", ["b@b.example", "c@b.example"], MESSAGE)) == ["c@b.example"]
    assert len(mailbox.messages) == 1
"""
    done = run_pytest(tmp_path, plugins=WITH_ASYNCIO, test_both=test)
    assert (outcomes(done), done.returncode) == ("2 passed", 0), done.stdout


def test_the_fixtures_are_listed_with_what_they_are(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "--fixtures", test_nothing="def test_it(): pass\n")
    assert "smtp_gateway -- " in done.stdout
    assert "A gateway for this test, at `smtp_gateway.host` and `smtp_gateway.port`." in done.stdout
    assert "mailbox -- " in done.stdout


def test_a_run_without_them_imports_nothing_of_the_gateway(tmp_path: Path) -> None:
    conftest = f"""
import json, sys
def pytest_sessionfinish():
    print("LOADED", json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""
    done = run_pytest(tmp_path, "-s", conftest=conftest, test_x="def test_it(): pass\n")
    assert done.returncode == 0, done.stdout
    (loaded,) = (line for line in done.stdout.splitlines() if "LOADED" in line)
    assert json.loads(loaded.partition("LOADED ")[2]) == []


def test_loading_it_brings_no_library_and_no_event_loop() -> None:
    program = (
        "import sys, pytest; before = set(sys.modules); import otel_smtp.testing.plugin\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - sys.stdlib_module_names | new & {'asyncio', 'ssl'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "['otel_smtp']"


def test_it_can_be_kept_out(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "-p", "no:otel_smtp", test_x="def test_it(smtp_gateway): pass\n")
    assert "fixture 'smtp_gateway' not found" in done.stdout


@pytest.mark.parametrize("where", ["conftest", "test_x"])
def test_a_fixture_of_the_same_name_is_the_applications(where: str, tmp_path: Path) -> None:
    fixture = "import pytest\n@pytest.fixture\ndef mailbox(): return 'mine'\n"
    test = "def test_it(mailbox): assert mailbox == 'mine'\n"
    files = {"conftest": fixture, "test_x": test} if where == "conftest" else {"test_x": fixture + test}
    done = run_pytest(tmp_path, **files)
    assert outcomes(done) == "1 passed", done.stdout


def test_a_failed_start_is_an_error_that_says_why(tmp_path: Path) -> None:
    test = """
import pytest
@pytest.fixture
def smtp_gateway_settings(): return {"limits": {"recipents": 1}}
def test_it(mailbox): pass
"""
    done = run_pytest(tmp_path, test_x=test)
    assert outcomes(done) == "1 error"
    assert "limits.recipents" in done.stdout
