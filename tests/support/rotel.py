"""rotel, an OpenTelemetry collector that others wrote: it takes OTLP, decodes it, and passes it on to our receiver."""

import contextlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support.otlp_receiver import OtlpReceiver
from tests.support.ports import unclaimed_port
from tests.support.process import listening_sockets, until
from tests.support.tools import missing

START_SECONDS = 20.0


class Chain(NamedTuple):
    """The collector, and the receiver behind it.

    Attributes:
        log: what the collector prints of all that goes through it.
    """

    http_endpoint: str
    grpc_endpoint: str
    receiver: OtlpReceiver
    log: Path


def needs_libraries(program: Path) -> None:
    """Skip the test, or fail it where CI=true, if `program` cannot be loaded for want of a shared library."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=START_SECONDS, check=False)
    lacking = re.search(r"error while loading shared libraries: (([\w.+-]+?)\.so[\w.]*)", done.stderr)
    if lacking is not None:
        # So it is with libpython, which rotel is linked to and a bare Debian lacks.
        missing(f"{program.name} needs {lacking[1]}, which is not installed (Debian package {lacking[2]})")


@contextlib.contextmanager
def collector(directory: Path) -> Iterator[Chain]:
    """Run rotel between a sender and an `OtlpReceiver`."""
    found = importlib.util.find_spec("rotel")
    if found is None or found.origin is None:
        missing("rotel is not installed (from PyPI, with the test extra)")
    agent = Path(found.origin).with_name("rotel-agent")
    needs_libraries(agent)
    log = directory / "rotel.log"
    http_port, grpc_port = unclaimed_port(), unclaimed_port()
    with OtlpReceiver() as receiver, log.open("wb") as output:
        process = subprocess.Popen(
            [
                agent, "start", "--disable-batching",
                "--pid-file", directory / "rotel.pid",
                "--debug-log", "traces", "--debug-log", "metrics", "--debug-log", "logs",
                "--debug-log-verbosity", "detailed",
                "--otlp-http-endpoint", f"127.0.0.1:{http_port}",
                "--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}",
                "--exporter", "otlp", "--otlp-exporter-endpoint", receiver.grpc_endpoint,
            ],
            cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if not name.startswith(("OTEL", "ROTEL"))},
        )  # fmt: skip
        try:
            for port in (http_port, grpc_port):
                until(
                    lambda port=port: listening_sockets(port) or None,  # type: ignore[misc]  # a lambda's default
                    f"rotel listens: {log.read_text()}",
                    timeout_seconds=START_SECONDS,
                )
            yield Chain(f"http://127.0.0.1:{http_port}", f"http://127.0.0.1:{grpc_port}", receiver, log)
        finally:
            process.terminate()
            process.wait(START_SECONDS)
