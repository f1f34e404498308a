"""Our spans through somebody else's collector: rotel takes them, decodes them, and passes them on to our receiver."""

from collections.abc import Iterator

import pytest

from otel_smtp.telemetry.setup import TelemetryOptions, set_up
from tests.support.otlp_receiver import named
from tests.support.rotel import Chain, collector
from tests.telemetry.driving import Client


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with collector(tmp_path_factory.mktemp("rotel")) as running:
        yield running


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
    Client(telemetry.observers).ehlo().message(f"00-{'a' * 32}-{'b' * 16}-01").quit()
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
