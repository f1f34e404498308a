"""What is counted, and how it reads."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from otel_smtp.observing import ConnectionRecord, Observer, Outcome, TransactionRecord, fan_out
from otel_smtp.smtp import replies
from otel_smtp.smtp.commands import Verb
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.states import CloseReason, ConnState, Transition
from otel_smtp.telemetry import attributes
from otel_smtp.telemetry.expected_replies import EXPECTED_REPLIES
from otel_smtp.telemetry.gauges import SharedQueue
from otel_smtp.telemetry.metric_export import MetricsReading
from otel_smtp.telemetry.metrics import Metrics
from otel_smtp.telemetry.propagation import InboundPolicy
from otel_smtp.telemetry.setup import TelemetryOptions, set_up
from otel_smtp.telemetry.tracing import Tracing
from tests.cardinality import series_before_and_after
from tests.telemetry.driving import Client, FakeClock, begin_delivery, finish_delivery, resume

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The page, parsed: (name, labels) -> value; the process's own figures left out."""
    text = metrics.page("text/plain")[0].decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse_text(text)
        for sample in family.samples
        if sample.name.startswith("smtp_")
    }


def relay_a_mail(observer: Observer | Sequence[Observer], *traceparents: str) -> None:
    """A connection with one mail and one unknown command."""
    client = Client(observer).ehlo().refused("other", replies.UNKNOWN_COMMAND)
    client.mail().rcpt().data().header(*traceparents)
    client.deliver()
    client.final(octets=5000).quit()


def test_a_relayed_mail_is_counted_everywhere() -> None:
    metrics = Metrics(connections=lambda: [("provider", "idle", 3)])
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


def active(metrics: Metrics) -> dict[str, float]:
    """Open connections by level."""
    return {
        dict(labels)["smtp_state"]: value
        for (name, labels), value in samples(metrics).items()
        if name == "smtp_server_active_connections"
    }


def test_active_connections_go_up_and_down_and_end_at_nothing() -> None:
    connections: list[ConnectionRecord] = []
    metrics = Metrics(open_connections=lambda: connections)
    first, second = Client(metrics).ehlo(), Client(metrics).ehlo().message()
    connections += [first.record, second.record, ConnectionRecord(second.info, 1, 1)]
    assert active(metrics) == {"Active": 1, "Idle": 1, "New": 1}
    second.rotate()
    first.refused("RCPT", replies.BAD_SEQUENCE)
    assert active(metrics) == {"Active": 1, "Idle": 1, "New": 1}, "neither a pulse nor a new segment is a level"
    first.quit()
    assert active(metrics) == {"Active": 0, "Idle": 1, "New": 1}, "closed, and not yet forgotten by the server"
    connections.clear()
    assert active(metrics) == {"Active": 0, "Idle": 0, "New": 0}


def counted(metrics: Metrics) -> dict[str, float]:
    """How many transitions, replies and state durations were counted."""
    seen = samples(metrics)
    names = ("transitions_total", "replies_total", "state_duration_seconds_count")
    return {name: sum(value for (key, _), value in seen.items() if key == f"smtp_server_{name}") for name in names}


def test_what_an_open_connection_does_is_counted_when_it_is_asked_for_and_once() -> None:
    connections: list[ConnectionRecord] = []
    metrics = Metrics(open_connections=lambda: connections)
    client = Client(metrics)
    connections.append(client.record)
    assert counted(metrics) == {"transitions_total": 2, "replies_total": 1, "state_duration_seconds_count": 1}
    client.ehlo().message()
    so_far = {"transitions_total": 5, "replies_total": 6, "state_duration_seconds_count": 4}
    assert counted(metrics) == counted(metrics) == so_far
    client.rotate()
    assert counted(metrics) == so_far
    client.message().rotate()
    client.quit()
    connections.clear()
    assert counted(metrics) == {"transitions_total": 10, "replies_total": 11, "state_duration_seconds_count": 9}


def test_a_busy_connection_is_counted_as_it_goes_on_and_once() -> None:
    metrics = Metrics()
    client = Client(metrics).ehlo()
    for _ in range(120):
        client.message()
    # Nobody asked, and no segment has ended: all but the last dozens are there.
    assert 240 < counted(metrics)["transitions_total"] <= 481
    client.rotate()
    assert counted(metrics) == {"transitions_total": 481, "replies_total": 482, "state_duration_seconds_count": 480}


def test_many_connections_are_looked_at_in_steps_while_mail_goes_on() -> None:
    clients: dict[Client, None] = {}
    metrics = Metrics(open_connections=lambda: (client.record for client in clients))

    def all_counted() -> dict[str, float]:
        return {name: rows for name, rows in counted(metrics).items() if name != "state_duration_seconds_count"}

    for _ in range(40):
        clients[Client(metrics).ehlo()] = None
    first, *_, last = clients
    steps = 0
    for _ in metrics.catching_up():
        if not steps:  # what happens meanwhile: one leaves, one comes, one that is still to be looked at has a mail
            first.quit()
            del clients[first]
            clients[Client(metrics)] = None
            last.message()
        steps += 1
    assert steps == 2
    assert sum(active(metrics).values()) == 40
    assert all_counted() == {"transitions_total": 40 * 2 + 2 + 1 + 3, "replies_total": 40 * 2 + 1 + 1 + 4}


def test_a_state_lasts_until_the_next_one_whatever_segments_they_are_in() -> None:
    clock = FakeClock()
    metrics = Metrics()
    client = Client(metrics, clock=clock).ehlo()
    clock.advance(7)
    client.rotate()
    clock.advance(5)
    client.mail()
    client.rset().quit()
    seconds = samples(metrics)["smtp_server_state_duration_seconds_sum", (("smtp_state", "Active"),)]
    assert seconds == pytest.approx(12, abs=0.1)


_OF_A_MAIL = [ConnState.ACTIVE, ConnState.DATA, ConnState.ACTIVE, ConnState.IDLE]
_steps = st.lists(st.just(_OF_A_MAIL) | st.lists(st.sampled_from(ConnState), max_size=5), max_size=9)


@given(st.lists(_steps, max_size=3))
def test_transitions_count_as_each_of_them(looks: list[list[list[ConnState]]]) -> None:
    """Mails and anything else, looked at now and then."""
    connection = Client(Metrics()).record
    metrics = Metrics(open_connections=lambda: [connection])
    for look in looks:
        for state in (state for steps in look for state in steps):
            last = connection.transitions[-1]
            at_ns = last.at_ns + 1_000_000 * (1 + int(state is ConnState.DATA))
            connection.transitions.append(Transition(state, last.state, state, last.sequence + 1, at_ns, None))
        metrics.catch_up()
    pairs = Counter((one.previous, one.state) for one in connection.transitions)
    left = Counter(one.state for one in connection.transitions[:-1])
    seconds: Counter[ConnState] = Counter()
    for one, then in pairwise(connection.transitions):
        seconds[one.state] += then.at_ns - one.at_ns
    if not looks:
        return
    told = samples(metrics)
    for state in ConnState:
        for previous in (None, *ConnState):
            labels = (("smtp_state", state.value), ("smtp_state_previous", "" if previous is None else previous.value))
            assert told.get(("smtp_server_transitions_total", labels), 0) == pairs[previous, state]
        of_state = (("smtp_state", state.value),)
        assert told.get(("smtp_server_state_duration_seconds_count", of_state), 0) == left[state]
        assert told.get(("smtp_server_state_duration_seconds_sum", of_state), 0) == pytest.approx(seconds[state] / 1e9)


def test_numbers_that_another_thread_reads_are_those_of_the_latest_look() -> None:
    connections: list[ConnectionRecord] = []
    metrics = Metrics(open_connections=lambda: connections)
    connections.append(Client(metrics).record)

    def transitions() -> float:
        return sum(count for metric, rows in metrics.numbers() if metric is attributes.TRANSITIONS for _, count in rows)

    assert transitions() == 0
    metrics.catch_up()
    assert transitions() == 2


def test_a_delivery_that_outlives_its_transaction_is_measured_once() -> None:
    metrics = Metrics()
    client = Client(metrics).ehlo().mail().rcpt().data().header()
    transaction = client.transaction  # which the forwarder keeps
    assert transaction is not None
    delivery = begin_delivery(transaction)
    client.close()
    assert not [name for (name, _), value in samples(metrics).items() if "delivery" in name and value]
    finish_delivery(metrics, delivery)
    labels = (("smtp_outcome", "relayed"), ("smtp_upstream_name", "provider"))
    assert samples(metrics)["smtp_client_delivery_duration_seconds_count", labels] == 1
    assert samples(metrics)["smtp_server_transactions_total", (("smtp_outcome", "aborted"),)] == 1


def test_the_age_of_queued_mail_is_measured_at_its_first_attempt_and_at_its_delivery() -> None:
    metrics = Metrics(upstreams=["provider"])
    resume(metrics, {}, attempt=1, waited_seconds=0.02, reply=replies.UPSTREAM_LOST, outcome=Outcome.DEFERRED)
    resume(metrics, {}, attempt=2, waited_seconds=40.0, reply=replies.UPSTREAM_LOST, outcome=Outcome.DEFERRED)
    resume(metrics, {}, attempt=3, waited_seconds=120.0)
    resume(metrics, {}, attempt=1)  # a bounce
    counted = samples(metrics)
    for name, total in (("first_attempt", 0.02), ("delivery", 120.0)):
        assert counted[f"smtp_client_{name}_age_seconds_count", (("smtp_upstream_name", "provider"),)] == 1
        seconds = counted[f"smtp_client_{name}_age_seconds_sum", (("smtp_upstream_name", "provider"),)]
        assert seconds == pytest.approx(total, abs=0.5)


def test_an_exchange_of_auth_is_counted_by_how_it_ended() -> None:
    metrics = Metrics()
    client = Client(metrics).ehlo().auth(reply=replies.AUTH_FAILED)
    client.rotate()
    client.auth(reply=replies.AUTH_FAILED).auth(reply=replies.BAD_BASE64).auth(reply=replies.AUTH_UNAVAILABLE)
    client.auth().quit()
    seen = {
        dict(labels)["smtp_auth_result"]: n for (name, labels), n in samples(metrics).items() if "_auth_" in name and n
    }
    assert seen == {"refused": 2, "accepted": 1}


def test_a_connection_that_says_nothing_is_a_probe_and_a_refused_one_is_counted() -> None:
    metrics = Metrics()
    Client(metrics).close()
    Client(metrics).close(CloseReason.TLS_FAILURE)  # what came was no octet of SMTP
    metrics.connection_refused("capacity")
    seen = samples(metrics)
    assert seen["smtp_server_probes_total", (("smtp_listener", "local"),)] == 1
    assert 1 in [value for (name, _), value in seen.items() if name == "smtp_server_refused_total"]


def test_measurements_name_a_trace_where_it_is_asked_for() -> None:
    telemetry = set_up(TelemetryOptions(access_log=False), {})
    relay_a_mail(telemetry.observers)
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


@pytest.mark.parametrize(
    ("environ", "has_exemplars"),
    [
        ({}, True),
        ({"OTEL_METRICS_EXEMPLAR_FILTER": "always_off"}, False),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, False),
        ({"OTEL_TRACES_SAMPLER": "always_off", "OTEL_METRICS_EXEMPLAR_FILTER": "always_on"}, True),
    ],
)
def test_the_operator_says_which_measurements_name_a_span(environ: dict[str, str], has_exemplars: bool) -> None:
    telemetry = set_up(TelemetryOptions(access_log=False), environ)
    relay_a_mail(telemetry.observers)
    page = telemetry.metrics_page(OPENMETRICS)[0].decode()
    assert ("trace_id=" in page) == ("span_id=" in page) == has_exemplars


def test_counting_does_not_settle_the_trace_before_the_application_named_its_own() -> None:
    telemetry = set_up(
        TelemetryOptions(access_log=False, policies={"local": InboundPolicy.PARENT}), {"OTEL_SDK_DISABLED": "false"}
    )
    relay_a_mail(telemetry.observers, f"00-{'a' * 32}-{'b' * 16}-01")
    assert f'trace_id="{"a" * 32}"' in telemetry.metrics_page(OPENMETRICS)[0].decode()


def test_what_can_be_counted_begins_with_nothing() -> None:
    metrics = Metrics(listeners=["local"], upstreams=["provider"], mechanisms=["PLAIN"])
    before = samples(metrics)
    assert set(before.values()) == {0}
    relay_a_mail(metrics)
    Client(metrics).ehlo().auth(reply=replies.AUTH_FAILED).mail().rset().close()
    metrics.connection_refused("capacity")
    assert samples(metrics).keys() == before.keys(), "whatever can happen had a series"
    labels = (("smtp_outcome", "unknown"),)
    assert before["smtp_server_transactions_total", labels] == 0
    assert before["smtp_telemetry_dropped_total", DROPPED] == 0


DROPPED = (("smtp_telemetry_drop_reason", "queue_full"), ("smtp_telemetry_signal", "traces"))


def test_a_transaction_is_measured_by_its_outcome() -> None:
    metrics = Metrics()
    relay_a_mail(metrics)
    assert samples(metrics)["smtp_server_transaction_duration_seconds_count", (("smtp_outcome", "relayed"),)] == 1


def test_mails_are_counted_together_and_each_once() -> None:
    metrics = Metrics()
    client = Client(metrics).ehlo()
    for _ in range(120):
        client.message()
    labels = (("smtp_outcome", "relayed"),)
    [relayed] = [
        count
        for metric, rows in metrics.numbers()
        if metric is attributes.TRANSACTIONS
        for (outcome,), count in rows
        if outcome == "relayed"
    ]
    assert relayed == 100, "nobody asked: all but the last dozens are there"
    for _ in range(2):
        found = samples(metrics)
        assert found["smtp_server_transactions_total", labels] == 120
        assert found["smtp_server_transaction_duration_seconds_count", labels] == 120
        assert found["smtp_server_message_size_bytes_count", ()] == 120
        assert found["smtp_client_pool_wait_seconds_count", (("smtp_upstream_name", "provider"),)] == 120


@pytest.mark.parametrize("attempt", [1, 2])  # the first: one before was cut off where a gateway stopped
def test_attempts_that_may_make_a_duplicate_are_counted_where_there_is_a_spool(attempt: int) -> None:
    metrics = Metrics(upstreams=["provider"], spool=lambda: ({}, 0.0, 0))
    name = "smtp_spool_possible_duplicates_total", ()
    resume(metrics, {}, attempt=attempt, waited_seconds=1.0)
    assert samples(metrics)[name] == 0
    resume(metrics, {}, attempt=attempt, waited_seconds=1.0, is_possible_duplicate=True)
    assert samples(metrics)[name] == 1
    labels = (("smtp_upstream_name", "provider"),)
    assert samples(metrics)["smtp_client_delivery_age_seconds_count", labels] == 2


def test_a_mail_that_a_limit_held_back_is_measured_so_however_well_it_went() -> None:
    metrics = Metrics(upstreams=["provider"])
    client = Client(metrics).ehlo().mail().rcpt().data().header()
    client.deliver()
    assert client.transaction is not None
    client.transaction.deliveries[0].note_pace("daily", 1, 2_000_000_000)
    client.final()
    labels = (("smtp_limit_name", "daily"),)
    found = {key: value for key, value in samples(metrics).items() if "pace" in key[0] or "limit" in key[0]}
    assert [value for (name, of), value in found.items() if of == labels and name.endswith("_sum")] == [2.0], found


class _CountsAtOnce(Metrics):
    """Notes nothing of queued mail for later."""

    def _note_queued(self, *_: object) -> bool:
        return False

    def _note_attempt(self, *_: object) -> bool:
        return False


def test_queued_mails_and_their_attempts_are_counted_together_and_as_each_of_them() -> None:
    together, one_by_one = Metrics(upstreams=["provider"]), _CountsAtOnce(upstreams=["provider"])
    observer = fan_out([Tracing(exports=[lambda span, items: None]), together, one_by_one])
    client = Client(observer).ehlo()
    for number in range(120):
        client.mail().rcpt().data().header()
        client.final(replies.OK, Outcome.QUEUED, octets=1000 + number)
        resume(observer, {}, attempt=1, waited_seconds=number / 1000)
    labels = (("smtp_outcome", "queued"),)
    queued = {rows.metric: dict(rows.values) for rows in (together._transactions, together._recipients)}
    assert queued[attributes.TRANSACTIONS]["queued",] == 100, "nobody asked: all but the last dozens are there"
    # None of these is ordinary.
    resume(observer, {}, attempt=2, waited_seconds=40.0)
    resume(observer, {}, attempt=1, waited_seconds=1.0, reply=replies.UPSTREAM_LOST, outcome=Outcome.DEFERRED)
    resume(observer, {}, attempt=1)  # a bounce
    client.mail().rcpt().rcpt(reply=replies.RELAY_DENIED).data().header()
    client.final(replies.OK, Outcome.QUEUED)
    for _ in range(2):
        found, expected = (
            # What a connection did is counted once, by the first that comes.
            {key: n for key, n in samples(metrics).items() if not re.search("_(replies|transitions|state)_", key[0])}
            for metrics in (together, one_by_one)
        )
        assert found == pytest.approx(expected)
        assert found["smtp_server_transactions_total", labels] == 121
        assert found["smtp_server_recipients_total", (("smtp_recipient_fate", "queued"),)] == 121
        assert found["smtp_client_first_attempt_age_seconds_count", (("smtp_upstream_name", "provider"),)] == 121
        assert found["smtp_client_delivery_age_seconds_count", (("smtp_upstream_name", "provider"),)] == 121
    for ours, theirs in zip(together.measurements, one_by_one.measurements, strict=True):
        for name, series in ours.series.items():
            assert list(map(bool, series.exemplars)) == list(map(bool, theirs.series[name].exemplars))


@pytest.mark.parametrize("name", ["smtp.server.state.duration", "smtp.client.pool.wait"])
def test_what_is_short_is_told_apart_from_50_microseconds_on(name: str) -> None:
    assert attributes.METRICS[name].bounds[0] == 0.00005


def test_no_client_can_make_the_series_grow() -> None:
    before, after = series_before_and_after(20_000)
    assert after == before
    assert ("smtp_server_transactions_total", (("smtp_outcome", "relayed"),)) in before


@pytest.mark.parametrize("metric", attributes.METRICS.values(), ids=lambda metric: metric.name)
def test_every_metric_of_the_registry_is_on_the_page(metric: attributes.Metric) -> None:
    connections: list[ConnectionRecord] = []
    metrics = Metrics(
        open_connections=lambda: connections,
        spool=lambda: ({"deferred": 2}, 60.0, 4096),
        receivers=lambda: [("app", {"sent": 1}, 2, 3.5)],
    )
    relay_a_mail(metrics)
    connections.append(Client(metrics).record)
    sharing = Metrics(
        spool=lambda: ({"deferred": 2}, 60.0, 0), shared_queue=lambda: SharedQueue(True, 2, 0.0, 0, 0, 0),
        store_verbs=["submit"],
    )  # fmt: skip
    page = "".join(one.page("text/plain")[0].decode() for one in (metrics, sharing))
    assert f"# TYPE {metric.name.replace('.', '_')}" in page


def test_what_a_store_did_is_measured_once_with_the_groups_that_shared_it() -> None:
    timings = [("submit", 0.002, 3), ("finish", 0.002, 0), ("submit", 0.02, 1), ("claim", 0.0001, 0)]

    def taken() -> Iterator[tuple[str, float, int]]:
        while timings:
            yield timings.pop(0)

    metrics = Metrics(store_timings=taken, store_verbs=["submit", "finish", "claim", "read"])
    for _ in range(2):
        page = metrics.page("text/plain")[0].decode()
        counts = {verb: f'smtp_spool_store_seconds_count{{smtp_spool_verb="{verb}"}} {count}.0' for verb, count in
                  (("submit", 2), ("finish", 1), ("claim", 1), ("read", 0))}  # fmt: skip
        assert all(line in page for line in counts.values()), page
        assert 'smtp_spool_store_seconds_bucket{le="0.005",smtp_spool_verb="submit"} 1.0' in page
        assert "smtp_spool_group_size_count 2.0" in page
        assert "smtp_spool_group_size_sum 4.0" in page
    assert "smtp_spool_store_seconds_count" not in Metrics().page("text/plain")[0].decode()


def test_of_a_shared_queue_one_gateway_tells_the_messages_and_each_what_happened_there() -> None:
    pages = [
        Metrics(
            spool=lambda: ({"deferred": 2}, 61.5, 0),
            shared_queue=lambda tells=tells: SharedQueue(tells, 3, 4.5, 7, 1, 2),  # type: ignore[misc]  # a lambda
        )
        .page("text/plain")[0]
        .decode()
        for tells in (True, False)
    ]
    assert ["smtp_spool_messages{" in page for page in pages] == [True, False]
    for page in pages:
        assert "smtp_spool_age_seconds 61.5" in page
        assert "smtp_spool_gateways 3.0" in page
        assert "smtp_spool_away_seconds 4.5" in page
        assert "smtp_spool_taken_over_total 7.0" in page
        assert "smtp_spool_stale_total 1.0" in page
        assert "smtp_spool_unanswered_total 2.0" in page
        assert "smtp_spool_dead" not in page


def test_the_spool_is_told_where_there_is_one() -> None:
    page = Metrics(spool=lambda: ({"deferred": 2, "held": 1}, 61.5, 4096)).page("text/plain")[0].decode()
    assert 'smtp_spool_messages{smtp_spool_state="deferred"} 2.0' in page
    assert "smtp_spool_age_seconds 61.5" in page
    assert "smtp_spool_dead_bytes 4096.0" in page
    assert "smtp_spool" not in Metrics().page("text/plain")[0].decode()


def test_the_receivers_of_outcomes_are_told_where_there_are_any() -> None:
    page = Metrics(receivers=lambda: [("app", {"sent": 7, "dropped": 0}, 2, 3.5)]).page("text/plain")[0].decode()
    assert 'smtp_notify_outcomes_total{smtp_notify_receiver="app",smtp_notify_result="sent"} 7.0' in page
    assert 'smtp_notify_outcomes_total{smtp_notify_receiver="app",smtp_notify_result="dropped"} 0.0' in page
    assert 'smtp_notify_pending{smtp_notify_receiver="app"} 2.0' in page
    assert 'smtp_notify_age_seconds{smtp_notify_receiver="app"} 3.5' in page
    assert "smtp_notify" not in Metrics().page("text/plain")[0].decode()


def test_replies_are_expected_to_verbs_that_there_are() -> None:
    assert EXPECTED_REPLIES.keys() == {None, "other", *Verb}


def raising(*_: object) -> NoReturn:
    raise RuntimeError("a fault")


INCOMPLETE = "# incomplete, without {}: internal error, the log says why\n"
BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"connections": raising}, "smtp.client.connections"),
    ({"connections": lambda: [("provider", "idle", None)]}, "smtp.client.connections"),
    ({"connections": lambda: [(None, "idle", 1)]}, "smtp.client.connections"),
    ({"spool": raising}, "smtp.spool.messages"),
    ({"spool": lambda: ({"due": 1}, None, 0)}, "smtp.spool.age"),
    ({"receivers": raising}, "smtp.notify"),
    ({"dropped": raising}, "smtp.telemetry.dropped"),
    ({"open_connections": raising}, "open connections"),
    ({"store_timings": raising, "store_verbs": ["create"]}, "store timings"),
]


@pytest.mark.parametrize(("settings", "missing"), BROKEN)
def test_what_cannot_be_read_takes_no_other_metric_with_it(
    settings: dict[str, Any], missing: str, caplog: pytest.LogCaptureFixture
) -> None:
    metrics, whole = Metrics(**settings), Metrics()
    relay_a_mail([metrics, whole])
    for _ in range(2):
        page = metrics.page("text/plain")[0].decode()
        assert page.startswith(INCOMPLETE.format(missing))
    alike = {key for key in samples(whole) if not key[0].startswith(missing.replace(".", "_"))}
    assert alike <= samples(metrics).keys()
    assert metrics.page(OPENMETRICS)[0].endswith(b"# EOF\n")
    assert [record.__dict__["about"] for record in caplog.records] == [missing]


def test_what_can_be_read_again_is_missing_no_more() -> None:
    broken = [True]
    metrics = Metrics(spool=lambda: raising() if broken else ({"due": 1}, 0.0, 0))
    assert metrics.page("text/plain")[0].startswith(b"# incomplete")
    broken.clear()
    assert b"incomplete" not in metrics.page("text/plain")[0]
    assert ("smtp_spool_messages", (("smtp_spool_state", "due"),)) in samples(metrics)


def test_a_histogram_that_cannot_be_read_takes_no_other_with_it() -> None:
    metrics = Metrics(upstreams=["provider"])
    relay_a_mail(metrics)
    del metrics.measurements[0].series[("local",)].counts
    page = metrics.page("text/plain")[0].decode()
    assert page.startswith(INCOMPLETE.format("smtp.server.connection.duration"))
    assert "smtp_server_state_duration_seconds_bucket" in page
    data = MetricsReading(metrics, Resource({}), "1").read()
    names = {metric.name for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    assert "smtp.server.state.duration" in names
    assert "smtp.server.connection.duration" not in names


def test_an_odd_record_keeps_no_other_from_being_counted(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    taken: list[TransactionRecord] = []

    class Taking(Observer):
        def transactions_settled(self, transactions: Sequence[TransactionRecord]) -> None:
            taken.extend(transactions)

    Client(Taking()).ehlo().message().message()
    metrics.transactions_settled([taken[0], None, taken[1]])  # type: ignore[list-item]
    spooled = TransactionRecord.resumed("01J9ZQ4T3M", {}, Mail("news@example.com"), attempt=1)
    delivery = begin_delivery(spooled)
    finish_delivery(Observer(), delivery)
    metrics.deliveries_settled([None, delivery])  # type: ignore[list-item]
    seen = samples(metrics)
    assert seen["smtp_server_transactions_total", (("smtp_outcome", "relayed"),)] == 2
    assert seen["smtp_server_recipients_total", (("smtp_recipient_fate", "relayed"),)] == 3
    assert sorted(record.__dict__["about"] for record in caplog.records) == ["delivery", "transaction"]


def test_a_connection_that_cannot_be_counted_keeps_no_other_from_it() -> None:
    connections: list[ConnectionRecord] = []
    metrics = Metrics(open_connections=lambda: connections)
    connections += [Client(metrics).ehlo().record for _ in range(3)]
    del connections[1].replies
    assert active(metrics)["Active"] == 2
