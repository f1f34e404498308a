"""The OpenTelemetry Collector with tail sampling, started with the example in deploy/: it decides, and passes on."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import yaml

from tests.support.otlp_receiver import OtlpReceiver
from tests.support.ports import unclaimed_port
from tests.support.process import listening_sockets, until

EXAMPLE: Final = Path(__file__).parent.parent.parent / "deploy/collector/collector.yaml"
START_SECONDS: Final = 60.0


@contextlib.contextmanager
def sampling_collector(directory: Path, receiver: OtlpReceiver, *, decision_wait: str) -> Iterator[str]:
    """Run the example before a receiver; only addresses, the wait and the share of dull traces, none, differ.

    Without the program the test is skipped, also where CI=true: Debian has no package of it.

    Returns:
        Where it takes all three signals over http/protobuf.
    """
    program = shutil.which("otelcol-contrib")
    if program is None:
        pytest.skip("no otelcol-contrib on the PATH: no collector with tail sampling to ask")
    example = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    http_port = unclaimed_port()
    protocols = example["receivers"]["otlp"]["protocols"]
    protocols["http"]["endpoint"] = f"127.0.0.1:{http_port}"
    protocols["grpc"]["endpoint"] = f"127.0.0.1:{unclaimed_port()}"
    sampling = example["processors"]["tail_sampling"]
    sampling["decision_wait"] = decision_wait
    (share,) = (policy for policy in sampling["policies"] if policy["type"] == "probabilistic")
    share["probabilistic"]["sampling_percentage"] = 0
    example["exporters"]["otlp_grpc"]["endpoint"] = receiver.grpc_endpoint.removeprefix("http://")
    example["exporters"]["prometheus"]["endpoint"] = f"127.0.0.1:{unclaimed_port()}"
    example["service"]["telemetry"] = {"metrics": {"level": "none"}}
    (directory / "collector.yaml").write_text(yaml.safe_dump(example))
    with (directory / "collector.log").open("wb") as log:
        process = subprocess.Popen(
            [program, "--config", str(directory / "collector.yaml")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
        )  # fmt: skip

    def listens() -> bool | None:
        if process.poll() is not None:
            raise TimeoutError((directory / "collector.log").read_text())
        return listening_sockets(http_port) > 0 or None

    try:
        until(listens, "the collector listens", timeout_seconds=START_SECONDS)
        yield f"http://127.0.0.1:{http_port}"
    finally:
        process.terminate()
        process.wait(30)
