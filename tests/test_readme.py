"""The README, the guides and the reference against the program: tables, commands, names."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import trustme

from otel_smtp.config import load
from otel_smtp.server.users import users_line
from otel_smtp.telemetry import attributes
from tests.bench import report
from tests.bench.charts import CHARTS
from tests.readme import GUIDES, PUBLISHED, README, REFERENCE, reference, with_tables

DOCUMENTS = [README, README.parent / "deploy" / "CHANGELOG.md", *sorted(GUIDES.glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language: those of the README first, then those of the guides."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_its_tables_are_those_of_the_code() -> None:
    for path, text in with_tables().items():
        assert path.read_text(encoding="utf-8") == text, "run: python -m tests.readme"


def test_the_reference_is_that_of_the_code() -> None:
    found = {path.name: path.read_text(encoding="utf-8") for path in REFERENCE.iterdir() if path != PUBLISHED}
    assert found == reference(), "run: python -m tests.readme"


def test_the_published_figures_are_those_of_their_run() -> None:
    if PUBLISHED.exists():
        results = report.decode((PUBLISHED / report.JSON_NAME).read_bytes())
        charts = [name for name, (_, _, bars) in CHARTS.items() if bars(results)]
        assert {path.name for path in PUBLISHED.iterdir()} == {report.JSON_NAME, report.MARKDOWN_NAME, *charts}
        told = (PUBLISHED / report.MARKDOWN_NAME).read_text(encoding="utf-8")
        again = f"python -m tests.bench --draw {PUBLISHED / report.JSON_NAME} --publish"
        assert told == report.as_markdown(results, charts), f"run: {again}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_its_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    for named in re.findall(r"`((?:deploy|tests|otel_smtp|\.ci)/[\w./-]+)`", path.read_text(encoding="utf-8")):
        assert (README.parent / named).exists(), named


TABLES = [*DOCUMENTS, README.parent / "deploy" / "README.md", *sorted(REFERENCE.glob("*.md"))]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_rows_of_its_tables_have_the_cells_of_their_heads(path: Path) -> None:
    """A row with more loses the last on GitHub."""
    text = re.sub(r"^( *)```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for rows in re.findall(r"(?:^ *\|.*\n)+", text, re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()]
        assert set(cells) == {cells[0]}, rows.splitlines()[next(n for n, c in enumerate(cells) if c != cells[0])]


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_its_test_command_is_the_one_that_ci_runs() -> None:
    command = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[test]' && .venv/bin/python -m pytest"
    _, second, *_ = (block.strip() for block in blocks("sh"))
    assert second.endswith(f" && {command}")
    install, _, test = command.rpartition(" && ")
    assert f"\n{install}\n{test} || " in (README.parent / ".ci" / "run").read_text(encoding="utf-8")


def test_its_settings_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the files lie that they name
    certificate = trustme.CA().issue_cert("gw.example.com")
    certificate.cert_chain_pems[0].write_to_path("cert.pem")
    certificate.private_key_pem.write_to_path("key.pem")
    Path("users").write_text(users_line("app", "secret") + "\n")
    Path("password").write_text("secret")
    Path("hmac-key").write_text("a key of thirty-two octets, here")
    for path in ("key.pem", "users", "password", "hmac-key"):
        Path(path).chmod(0o600)
    for block in blocks("toml"):
        load(values=tomllib.loads(block))


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
