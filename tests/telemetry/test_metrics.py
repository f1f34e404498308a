"""What is counted, and how it reads."""

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from otel_smtp.observing import ConnectionInfo, Endpoint, Observer, Outcome, TraceHeaders
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.extensions import Offer
from otel_smtp.smtp.policy import ServerPolicy
from otel_smtp.smtp.server import ServerProtocol
from otel_smtp.smtp.states import CloseReason, TlsMode, raise_illegal
from otel_smtp.telemetry import attributes
from otel_smtp.telemetry.metrics import Metrics
from otel_smtp.telemetry.propagation import InboundPolicy
from otel_smtp.telemetry.setup import TelemetryOptions, set_up
from tests.cardinality import series_before_and_after

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
INFO = ConnectionInfo("c" * 32, Endpoint("192.0.2.7", 40000), Endpoint("127.0.0.1", 2525), "local")


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The page, parsed: (name, labels) -> value; the process's own figures left out."""
    text = metrics.page("text/plain")[0].decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name.startswith("smtp_")
    }


def relay_a_mail(observer: Observer, *traceparents: str) -> None:
    """A connection with one mail, told by the engine and as the server tells it."""
    connection = observer.connection_opened(INFO)
    offer = Offer()
    engine = ServerProtocol(
        ServerPolicy("gw.example.com"),
        connection.conn_state,
        offer=lambda: offer,
        on_reply=connection.replied,
        on_illegal=raise_illegal,
    )
    engine.accepted(TlsMode.OFF)
    engine.greet()
    engine.receive_data(b"EHLO c\r\nFOO\r\nMAIL FROM:<a@example.com>\r\n")
    while not isinstance(engine.next_event(), replies.Reply):
        if engine.is_in_transaction:
            break
    engine.reply(replies.SENDER_OK)
    transaction = connection.transaction_begun(Mail("a@example.com"), 1)
    delivery = transaction.delivery_begun("provider", Endpoint("upstream.example", 587))
    delivery.pooled(wait_seconds=0.25, reused=False)
    transaction.header_received(TraceHeaders(traceparents), message_id=None)
    transaction.content_received(5000)
    delivery.ended(Outcome.RELAYED, replies.OK, round_trips=2)
    transaction.ended(Outcome.RELAYED, replies.OK)
    engine.closed(CloseReason.QUIT)
    connection.closed(CloseReason.QUIT, octets_received=100, octets_sent=100)


def test_a_relayed_mail_is_counted_everywhere() -> None:
    metrics = Metrics(Observer(), connections=lambda: [("provider", "idle", 3)])
    relay_a_mail(metrics)
    seen = samples(metrics)
    assert seen["smtp_server_replies_total", (("smtp_reply_code", "500"), ("smtp_verb", "other"))] == 1
    assert seen["smtp_server_replies_total", (("smtp_reply_code", "250"), ("smtp_verb", "MAIL"))] == 1
    assert seen["smtp_server_transactions_total", (("smtp_outcome", "relayed"),)] == 1
    assert seen["smtp_server_transitions_total", (("smtp_state", "Active"), ("smtp_state_previous", "New"))] == 1
    assert seen["smtp_server_message_size_bytes_sum", ()] == 5000
    assert seen["smtp_client_pool_wait_seconds_sum", (("smtp_upstream_name", "provider"),)] == 0.25
    assert (
        seen[
            "smtp_client_delivery_duration_seconds_count",
            (("smtp_outcome", "relayed"), ("smtp_upstream_name", "provider")),
        ]
        == 1
    )
    assert seen["smtp_server_connection_duration_seconds_count", (("smtp_listener", "local"),)] == 1
    assert 3 in [value for (name, _), value in seen.items() if name == "smtp_client_connections"]


def test_active_connections_go_up_and_down_and_end_at_nothing() -> None:
    metrics = Metrics(Observer())
    relay_a_mail(metrics)
    gauges = {labels: value for (name, labels), value in samples(metrics).items() if "active_connections" in name}
    assert gauges
    assert set(gauges.values()) == {0}


def test_a_connection_that_says_nothing_is_a_probe_and_a_refused_one_is_counted() -> None:
    metrics = Metrics(Observer())
    metrics.connection_opened(INFO).closed(CloseReason.CLIENT_DISCONNECT, octets_received=0, octets_sent=40)
    metrics.connection_refused("capacity")
    seen = samples(metrics)
    assert seen["smtp_server_probes_total", (("smtp_listener", "local"),)] == 1
    assert 1 in [value for (name, _), value in seen.items() if name == "smtp_server_refused_total"]


def test_measurements_name_a_trace_where_it_is_asked_for() -> None:
    telemetry = set_up(TelemetryOptions(access_log=False), {})
    relay_a_mail(telemetry.observer)
    page, content_type = telemetry.metrics_page(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    exemplars = [
        sample.exemplar.labels["trace_id"]
        for family in parse_openmetrics(page.decode())  # type: ignore[no-untyped-call]  # the library has no hint there
        for sample in family.samples
        if sample.exemplar is not None
    ]
    assert exemplars
    assert all(len(trace_id) == 32 for trace_id in exemplars)


def test_counting_does_not_settle_the_trace_before_the_application_named_its_own() -> None:
    telemetry = set_up(
        TelemetryOptions(access_log=False, policies={"local": InboundPolicy.PARENT}), {"OTEL_SDK_DISABLED": "false"}
    )
    relay_a_mail(telemetry.observer, f"00-{'a' * 32}-{'b' * 16}-01")
    assert f'trace_id="{"a" * 32}"' in telemetry.metrics_page(OPENMETRICS)[0].decode()


def test_no_client_can_make_the_series_grow() -> None:
    before, after = series_before_and_after(20_000)
    assert after == before
    assert ("smtp_server_transactions_total", (("smtp_outcome", "relayed"),)) in before


@pytest.mark.parametrize("metric", attributes.METRICS.values(), ids=lambda metric: metric.name)
def test_every_metric_of_the_registry_is_on_the_page(metric: attributes.Metric) -> None:
    metrics = Metrics(Observer(), spool=lambda: ({"deferred": 2}, 60.0))
    relay_a_mail(metrics)
    page = metrics.page("text/plain")[0].decode()
    assert f"# TYPE {metric.name.replace('.', '_')}" in page


def test_the_spool_is_told_where_there_is_one() -> None:
    page = Metrics(Observer(), spool=lambda: ({"deferred": 2, "held": 1}, 61.5)).page("text/plain")[0].decode()
    assert 'smtp_spool_messages{smtp_spool_state="deferred"} 2.0' in page
    assert "smtp_spool_age_seconds 61.5" in page
    assert "smtp_spool" not in Metrics(Observer()).page("text/plain")[0].decode()
