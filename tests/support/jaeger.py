"""Jaeger, for tests that ask it what an operator would ask: the program, started with the configuration in deploy/.

Where there is a Go toolchain, this makes the program in an empty module, in five minutes on two cores:

    go mod init tools && go get -tool github.com/jaegertracing/jaeger/cmd/jaeger@v1.76.0
    go build -o ~/bin/jaeger github.com/jaegertracing/jaeger/cmd/jaeger
"""

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.support.ports import unclaimed_port
from tests.support.process import until

DEPLOY: Final = Path(__file__).parent.parent.parent / "deploy"
START_SECONDS: Final = 60.0
FOUND_SECONDS: Final = 30.0


class Jaeger:
    """A running Jaeger.

    Args:
        url: of its query API.
        otlp: where it takes traces over http/protobuf.
    """

    def __init__(self, url: str, otlp: str) -> None:
        self._url = url
        self._otlp = otlp

    @property
    def environ(self) -> dict[str, str]:
        """What makes a gateway send its traces here, soon."""
        return {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{self._otlp}/v1/traces", "OTEL_BSP_SCHEDULE_DELAY": "20"}

    def take(self, body: bytes) -> None:
        """Have it take what a gateway exported: an OTLP request for traces, in protobuf."""
        request = urllib.request.Request(
            f"{self._otlp}/v1/traces", body, {"Content-Type": "application/x-protobuf"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200

    def spans(self, trace_id: str, count: int) -> list[dict[str, Any]]:
        """A trace's spans, once it has so many.

        Raises:
            TimeoutError: it did not get them.
        """

        def whole() -> list[dict[str, Any]] | None:
            found = [span for trace in self._ask(f"/api/traces/{trace_id}") for span in trace["spans"]]
            return found if len(found) >= count else None

        return until(whole, f"Jaeger has {count} spans", timeout_seconds=FOUND_SECONDS)

    def trace(self, trace_id: str, *spans: str) -> dict[str, dict[str, Any]]:
        """A trace's spans by their names, once it has all of these.

        Raises:
            TimeoutError: it did not get them.
        """

        def whole() -> dict[str, dict[str, Any]] | None:
            traces = self._ask(f"/api/traces/{trace_id}")
            found = {span["operationName"]: span for trace in traces for span in trace["spans"]}
            return found if {*spans} <= found.keys() else None

        return until(whole, f"Jaeger has {spans}", timeout_seconds=FOUND_SECONDS)

    def search(self, tags: Mapping[str, str]) -> list[str]:
        """The ids of the traces that its search finds by these tags, of spans or events; once it finds one."""
        query = urllib.parse.urlencode(
            {"service": "otel-smtp", "tags": json.dumps(tags), "lookback": "1h", "limit": 20}
        )
        end = int((time.time() + 60) * 1e6)
        path = f"/api/traces?{query}&start={end - 3_600_000_000}&end={end}"
        found = until(lambda: self._ask(path) or None, f"Jaeger finds {tags}", timeout_seconds=FOUND_SECONDS)
        return [trace["traceID"] for trace in found]

    def _ask(self, path: str) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self._url}{path}", timeout=10) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"] or []
            return found
        return []


def tags_of(span: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a span, or of an event of one, as Jaeger shows them."""
    return {tag["key"]: tag["value"] for tag in span.get("tags", span.get("fields", ()))}


def events_of(span: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The events of a span; `event` is the name of each."""
    return [tags_of(log) for log in span["logs"]]


@contextlib.contextmanager
def jaeger(directory: Path) -> Iterator[Jaeger]:
    """The Jaeger at JAEGER_URL and JAEGER_OTLP_ENDPOINT; else one that is started, where the program is on the PATH.

    Without either the test is skipped, also where CI=true: Debian has no package of it.
    """
    if url := os.environ.get("JAEGER_URL"):
        yield Jaeger(url.rstrip("/"), os.environ.get("JAEGER_OTLP_ENDPOINT", "http://127.0.0.1:4318"))
        return
    program = shutil.which("jaeger")
    if program is None:
        pytest.skip("no jaeger on the PATH, and JAEGER_URL is not set: no Jaeger to ask")
    ports = {
        address: unclaimed_port() for address in ("0.0.0.0:4317", "0.0.0.0:4318", "0.0.0.0:16686", "0.0.0.0:13133")
    }
    text = (DEPLOY / "jaeger/config.yaml").read_text(encoding="utf-8")
    for address, port in ports.items():
        text = text.replace(address, f"127.0.0.1:{port}")
    configuration = yaml.safe_load(text)
    configuration["extensions"]["jaeger_query"]["ui"]["config_file"] = str(DEPLOY / "jaeger/ui.json")
    configuration["extensions"]["jaeger_query"]["grpc"] = {"endpoint": f"127.0.0.1:{unclaimed_port()}"}
    configuration["service"]["telemetry"] = {"metrics": {"level": "none"}}
    (directory / "jaeger.yaml").write_text(yaml.safe_dump(configuration))
    query = f"http://127.0.0.1:{ports['0.0.0.0:16686']}"
    with (directory / "jaeger.log").open("wb") as log:
        process = subprocess.Popen(
            [program, "--config", str(directory / "jaeger.yaml")],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if not name.startswith("OTEL_")},
        )  # fmt: skip

    def answers() -> bool | None:
        if process.poll() is not None:
            raise TimeoutError((directory / "jaeger.log").read_text())
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{query}/api/services", timeout=5):
            return True
        return None

    try:
        until(answers, "Jaeger answers", timeout_seconds=START_SECONDS)
        yield Jaeger(query, f"http://127.0.0.1:{ports['0.0.0.0:4318']}")
    finally:
        process.kill()  # it keeps nothing, and takes its time to end
        process.wait(30)
