"""What a start imports before the first client can be greeted: counted, since times depend on the machine."""

import os
import subprocess
import sys
from typing import Final

import pytest

# At the first listening socket of mail: print what there is by then, and end.
_SERVE: Final = """
import os, sys

def hook(event, arguments):
    if event == "socket.bind" and arguments[1][0] == "127.0.0.1":
        import gc
        print(*sys.modules, "collects" if gc.isenabled() else "collects-nothing", file=sys.stderr, flush=True)
        os._exit(0)

sys.addaudithook(hook)
sys.argv = ["otel-smtp", "serve", *sys.argv[1:]]
from otel_smtp.commands.cli import main
main()
"""
_SETTINGS: Final = ("--listen", "127.0.0.1:0", "--upstream", "smtp://127.0.0.1:9", "--status", "127.0.0.1:0")
_OTLP: Final = {
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
}
# Each has its hour: a scrape, the status port, an export, a login, a terminal, a queue, OAuth.
_LATER: Final = frozenset(
    {
        "anyio",
        "argon2",
        "asn1crypto",
        "asyncpg",
        "google.protobuf",
        "grpc",
        "http.server",
        "httpx",
        "prometheus_client",
        "requests",
        "rich",
        "scramp",
        "sqlite3",
        "starlette",
        "structlog",
        "urllib.request",
        "uvicorn",
        "opentelemetry.exporter",
        "opentelemetry.proto",
        "opentelemetry.sdk.trace.export",
        "otel_smtp.spool.messages",
        "otel_smtp.status.views",
        "otel_smtp.status.server",
    }
)


def modules(program: str, *arguments: str, **environ: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OTELSMTP_"))}
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**kept, **environ}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return [name for line in ended.stderr.splitlines() if not line.startswith("{") for name in line.split()]  # no log


@pytest.mark.parametrize("environ", [{}, _OTLP], ids=["no collector", "OTLP over http"])
def test_the_first_client_waits_for_what_greets_it_and_for_nothing_else(environ: dict[str, str]) -> None:
    imported = modules(_SERVE, *_SETTINGS, **environ)
    assert _LATER.isdisjoint(imported), sorted(_LATER.intersection(imported))
    assert len([name for name in imported if name.startswith("otel_smtp")]) <= 159
    # On Python 3.11, with uvloop; what else there is are modules that Python itself brings.
    assert len(imported) <= 460
    assert imported[-1] == "collects-nothing"


def test_the_first_export_imports_nothing_to_draw_with() -> None:
    program = _SERVE.replace("import gc\n", "import gc, httpx\n        httpx.Client().close()\n")
    imported = modules(program, *_SETTINGS)
    assert "httpx" in imported
    assert {"rich", "pygments", "markdown_it"}.isdisjoint(imported)


_COMMAND: Final = """
import sys
sys.argv = ["otel-smtp", *sys.argv[1:]]
from otel_smtp.commands.cli import main
try:
    main()
except SystemExit:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "most"), [(["--version"], 175), (["--help"], 300), (["queue", "list", "--help"], 240)]
)
def test_help_starts_without_the_gateway(arguments: list[str], most: int) -> None:
    imported = modules(_COMMAND, *arguments)
    assert not {"asyncpg", "httpx", "opentelemetry", "rich", "sqlite3", "otel_smtp.server", *_LATER} - {
        "urllib.request"
    } & {*imported}
    assert len(imported) <= most
