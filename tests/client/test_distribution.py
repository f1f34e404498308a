"""The small distribution: what an application gets by installing it, and how it lives beside the gateway's."""

import configparser
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

import otel_smtp
import otel_smtp.client
from tests.client.conftest import BOB, SENDER, traceparent
from tests.support.capture import CapturingUpstream
from tests.support.tools import missing

ROOT: Final = Path(__file__).parent.parent.parent
CLIENT: Final = ROOT / "otel_smtp" / "client"
# What comes along, on every Python: the API, and what the base class of instrumentors needs.
ALONG: Final = {
    "opentelemetry-api",
    "opentelemetry-instrumentation",
    "opentelemetry-semantic-conventions",
    "packaging",
    "typing-extensions",
    "wrapt",
}
MOST_OCTETS: Final = 8 * 1024 * 1024

SEND: Final = """
import smtplib, sys
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags
with trace.use_span(NonRecordingSpan(SpanContext(1, 2, False, TraceFlags(1)))):
    with smtplib.SMTP("127.0.0.1", int(sys.argv[1])) as client:
        client.sendmail(sys.argv[2], [sys.argv[3]], "Subject: x\\n\\nHello\\n")
"""


def build(directory: Path, out: Path) -> Path:
    """The wheel of the project in `directory`."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)],
        cwd=directory, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small wheel."""
    return build(CLIENT, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def large_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gateway's wheel."""
    return build(ROOT, tmp_path_factory.mktemp("large"))


def python_files(wheel: Path, package: str) -> dict[str, bytes]:
    """The modules of `package` in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name.removeprefix(f"{package}/"): archive.read(name)
            for name in archive.namelist()
            if name.startswith(f"{package}/")
        }


def test_both_wheels_hold_the_same_code_and_no_file_belongs_to_both(wheel: Path, large_wheel: Path) -> None:
    small = python_files(wheel, "otel_smtp_client")
    assert "trace_headers.py" in small
    assert small == python_files(large_wheel, "otel_smtp/client")
    assert {*zipfile.ZipFile(wheel).namelist()} & {*zipfile.ZipFile(large_wheel).namelist()} == set()


def entry_points(wheel: Path) -> dict[str, str]:
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt"))
    parser = configparser.ConfigParser()
    parser.read_string(zipfile.ZipFile(wheel).read(name).decode())
    return dict(parser["opentelemetry_instrumentor"])


def test_both_wheels_name_the_same_instrumentors(wheel: Path, large_wheel: Path) -> None:
    small, large = entry_points(wheel), entry_points(large_wheel)
    assert {*small} == {"smtplib", "aiosmtplib"}
    assert {name: value.replace("otel_smtp_client", "otel_smtp.client") for name, value in small.items()} == large


def test_the_version_is_the_gateways(wheel: Path) -> None:
    assert otel_smtp.client.__version__ == otel_smtp.__version__
    assert wheel.name == f"otel_smtp_client-{otel_smtp.__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment into which pip has installed the small wheel, from the index that it is set to."""
    home = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(home, symlinks=True)
    try:
        done = pip(home, "install", "--no-compile", str(wheel))
    except subprocess.TimeoutExpired:
        missing("pip did not install the small wheel in time")
    if done.returncode != 0:
        # A wheel that cannot be installed is a failure; no pip, or no index that it can reach, is not.
        reasons = ("No module named pip", "No matching distribution", "onnection")
        assert any(reason in done.stderr for reason in reasons), done.stderr
        missing(f"pip cannot install the small wheel: {done.stderr.strip()[-300:]}")
    return home


def pip(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's pip on another environment, which needs none of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(home / "bin/python"), *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def packages(home: Path) -> dict[str, str]:
    listed = pip(home, "list", "--format=json")
    return {one["name"].lower().replace("_", "-"): one["version"] for one in json.loads(listed.stdout)}


def test_what_comes_along_is_the_api_and_the_base_class_of_instrumentors(environment: Path) -> None:
    installed = packages(environment)
    assert {*installed} - {"otel-smtp-client"} <= ALONG
    assert {"otel-smtp-client", "opentelemetry-api", "opentelemetry-instrumentation"} <= {*installed}
    (site,) = (environment / "lib").glob("python*/site-packages")
    octets = sum(path.stat().st_size for path in site.rglob("*") if path.is_file())
    assert octets < MOST_OCTETS, f"{octets} octets"
    assert pip(environment, "check").returncode == 0


def run(home: Path, command: Sequence[str], *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(home / "bin" / command[0]), *command[1:], "-c", SEND, *map(str, arguments)],
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def server() -> Iterator[CapturingUpstream]:
    with CapturingUpstream() as capturing:
        yield capturing


def test_it_traces_a_program_that_knows_nothing_of_it(environment: Path, server: CapturingUpstream) -> None:
    for command in (["python"], ["opentelemetry-instrument", str(environment / "bin/python")]):
        done = run(environment, command, server.port, SENDER, BOB)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    untraced, traced = server.messages
    assert traceparent(untraced.content) is None
    assert traceparent(traced.content) == f"00-{1:032x}-{2:016x}-01"


def test_it_is_turned_off_as_every_instrumentation_is(environment: Path, server: CapturingUpstream) -> None:
    command = ["opentelemetry-instrument", str(environment / "bin/python")]
    done = run(environment, command, server.port, SENDER, BOB, OTEL_PYTHON_DISABLED_INSTRUMENTATIONS="smtplib")
    assert done.returncode == 0, done.stderr
    assert traceparent(server.messages[0].content) is None


@pytest.mark.parametrize("first", ["otel_smtp", "otel_smtp_client"])
def test_beside_the_gateway_each_message_still_has_one_span(
    wheel: Path, first: str, tmp_path: Path, server: CapturingUpstream
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = f"""
import importlib, smtplib, sys
sys.path.insert(0, {str(tmp_path)!r})
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from otel_smtp.client.smtplib_instrumentor import SmtplibInstrumentor as Large
from otel_smtp_client.smtplib_instrumentor import SmtplibInstrumentor as Small
assert Large is not Small
exporter, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
order = [Large(), Small()] if {first!r} == "otel_smtp" else [Small(), Large()]
def send():
    with smtplib.SMTP("127.0.0.1", {server.port}) as client:
        client.sendmail("a@a.example", ["b@b.example"], b"Subject: x\\r\\n\\r\\nx\\r\\n")
for instrumentor in order:
    instrumentor.instrument(tracer_provider=provider)
send()
order[1].uninstrument()
send()
order[0].uninstrument()
send()
print([span.instrumentation_scope.name for span in exporter.get_finished_spans()])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    scope = {"otel_smtp": "otel_smtp.client", "otel_smtp_client": "otel_smtp_client"}[first]
    assert (done.stdout.strip(), done.stderr) == (str([scope, scope]), "")


def test_the_command_of_the_gateways_package_finds_it_too(server: CapturingUpstream) -> None:
    command = [str(Path(sys.executable).parent / "opentelemetry-instrument"), sys.executable]
    done = subprocess.run(
        [*command, "-c", SEND, str(server.port), SENDER, BOB],
        env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none",
             "OTEL_LOGS_EXPORTER": "none"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert traceparent(server.messages[0].content) is not None
