"""The README and the reference against the program: tables, commands, names."""

import re
import subprocess
import sys
import tomllib

import pytest

from otel_smtp.config import load
from otel_smtp.telemetry import attributes
from tests.readme import README, REFERENCE, reference, with_tables

TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_its_tables_are_those_of_the_code() -> None:
    assert with_tables(TEXT) == TEXT, "run: python -m tests.readme"


def test_the_reference_is_that_of_the_code() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in REFERENCE.iterdir()}
    assert found == reference(), "run: python -m tests.readme"


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (README.parent / target).exists(), target


def test_its_test_command_is_the_one_that_ci_runs() -> None:
    command = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest"
    _, second, *_ = (block.strip() for block in blocks("sh"))
    assert second.endswith(f" && {command}")
    assert command in (README.parent / ".ci" / "run").read_text(encoding="utf-8")


def test_its_settings_are_settings(tmp_path: object) -> None:
    for block in blocks("toml"):
        document = tomllib.loads(block)
        for upstream in document.get("upstream", ()):
            if upstream.pop("password_file", None) is not None:  # is not there to be read
                upstream["password"] = "secret"
        load(values=document)


def test_its_python_is_python() -> None:
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def test_its_library_example_runs_as_printed() -> None:
    (example,) = (block for block in blocks("python") if "asyncio.run(main())" in block)
    told = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, timeout=60, check=True, cwd=README.parent
    ).stdout
    assert re.search(r"\{'local': \[.*127\.0\.0\.1.*\]\}", told)


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if "otel-smtp " in line]
)
def test_each_command_and_flag_in_it_exists(line: str) -> None:
    words = line.split("#")[0].split("otel-smtp ")[1].split()
    command = words[:2] if words[0] == "queue" else words[:1]
    told = subprocess.run(
        [sys.executable, "-m", "otel_smtp.commands.cli", *command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"COLUMNS": "200", "PATH": "/usr/bin:/bin", "TERM": "dumb"},
    ).stdout
    for flag in (word for word in words[len(command) :] if word.startswith("--")):
        assert flag in told


def test_the_attributes_of_its_queries_are_emitted() -> None:
    known = attributes.tables()
    for query in (block for block in blocks("") if "{" in block):
        for name in re.findall(r"(?:event|span)\.(smtp\.[a-z_.]+)", query):
            assert f"`{name}`" in known, name
        for name in re.findall(r'name="(smtp\.[a-z_.]+)"', query):
            assert f"`{name}`" in known, name
