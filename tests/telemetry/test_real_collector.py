"""Our spans through somebody else's collector: rotel takes them, decodes them, and passes them on to our receiver."""

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from otel_smtp.telemetry.setup import TelemetryOptions, set_up
from tests.support.otlp_receiver import OtlpReceiver, named
from tests.telemetry.driving import Client

rotel = pytest.importorskip("rotel")
START_SECONDS = 20.0


class Chain(NamedTuple):
    """A collector, and the receiver behind it."""

    http_endpoint: str
    grpc_endpoint: str
    receiver: OtlpReceiver


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    directory = tmp_path_factory.mktemp("rotel")
    http_port, grpc_port = free_ports(2)
    with OtlpReceiver() as receiver:
        agent = Path(str(rotel.__file__)).with_name("rotel-agent")
        log = directory / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [
                    agent, "start", "--disable-batching",
                    "--pid-file", directory / "pid",
                    "--otlp-http-endpoint", f"127.0.0.1:{http_port}",
                    "--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}",
                    "--exporter", "otlp", "--otlp-exporter-endpoint", receiver.grpc_endpoint,
                ],
                cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            for port in (http_port, grpc_port):
                wait_for_port(port, process, log)
            yield Chain(f"http://127.0.0.1:{http_port}", f"http://127.0.0.1:{grpc_port}", receiver)
        finally:
            process.terminate()
            process.wait(START_SECONDS)


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    ends = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < ends, log.read_text()
            threading.Event().wait(0.02)
        else:
            return


@pytest.mark.parametrize("compression", ["none", "gzip"])
@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_collector_passes_on_what_we_sent(chain: Chain, protocol: str, compression: str) -> None:
    chain.receiver.clear()
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": chain.http_endpoint if protocol == "http/protobuf" else chain.grpc_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_COMPRESSION": compression,
    }
    telemetry = set_up(TelemetryOptions(version="1.2.3"), environ)
    Client(telemetry.observer).ehlo().message(f"00-{'a' * 32}-{'b' * 16}-01").quit()
    assert telemetry.flush_and_shutdown(10)
    spans = chain.receiver.wait_for_spans(3)
    [connection], [transaction], [delivery] = (
        named(spans, f"smtp.{name}") for name in ("connection", "transaction", "delivery")
    )
    assert (transaction.parent_span_id, delivery.parent_span_id) == (connection.span_id, transaction.span_id)
    assert [(link.trace_id, link.is_remote) for link in transaction.links] == [("a" * 32, True)]
    assert [event.attributes["smtp.state.sequence"] for event in connection.events] == [1, 2, 3, 4, 5, 6]
    assert transaction.attributes["smtp.rcpt.domains"] == ["example.net"]
    assert delivery.attributes["smtp.pool.reused"] is True
    assert connection.resource["service.name"] == "otel-smtp"
    dropped = [
        line for line in telemetry.metrics_page("text/plain")[0].decode().splitlines() if "dropped_total{" in line
    ]
    assert dropped
    assert all(line.endswith(" 0.0") for line in dropped)
