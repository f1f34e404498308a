"""Recent traces: what is kept, what is dropped, what is found."""

import json
import sys
import time
from collections.abc import Sequence

import pytest

from otel_smtp.status import traces as traces_module
from otel_smtp.status.search import parse
from otel_smtp.status.traces import TRACE_ITEMS, KeptTrace, RecentTraces, Severity, SpanOctets
from otel_smtp.telemetry.shapes import EncodedSpan
from tests.support.spans import MILLISECOND, START, Event, Identity, Kind, Span, Value, encoded, mail_trace

RESOURCE = {"service.name": "otel-smtp"}


def kept(*spans: Sequence[EncodedSpan], recent_spans: int = 1000, failed_spans: int = 1000) -> RecentTraces:
    traces = RecentTraces(recent_spans=recent_spans, failed_spans=failed_spans)
    for each in spans:
        for span in each:
            add(traces, span)
    return traces


def add(traces: RecentTraces, span: EncodedSpan) -> None:
    """Add it as tracing does."""
    record = span.to_records()[0]
    traces.add([span], is_trouble=record.has_failed or bool(record.attributes.get("smtp.connection.errors")))


def newest_first(traces: RecentTraces) -> list[KeptTrace]:
    """All traces, by the end of their last span."""
    found: dict[bytes, list[SpanOctets]] = {}
    traces.group(traces.spans(), found)
    return [traces.trace(trace_id, spans) for trace_id, spans in found.items()]


def only(traces: RecentTraces) -> KeptTrace:
    [trace] = newest_first(traces)
    return trace


def test_the_summary_tells_the_mail_in_short() -> None:
    summary = only(kept(mail_trace(0xABC))).summary()
    assert summary["trace_id"] == f"{0xABC:032x}"
    assert summary["duration_milliseconds"] == 11
    assert (summary["spans"], summary["events"]) == (3, 8)
    assert summary["outcomes"] == ["relayed"]
    assert summary["domains"] == ["example.net"]
    assert summary["upstreams"] == ["provider"]
    assert summary["states"] == ["New", "Active", "Data", "Active", "Idle", "Closed"]
    assert summary["replies"] == [], "replies below 400 are no news"


def test_the_summary_is_worked_out_again_after_a_late_span() -> None:
    delivery, *rest = mail_trace(1)
    traces = kept(rest)
    before = only(traces).summary()["spans"]
    traces.add([delivery])
    assert (before, only(traces).summary()["spans"]) == (2, 3)


@pytest.mark.parametrize(
    ("states", "has_failed", "severity"),
    [
        ("New Active Data Active Idle Closed", False, Severity.OK),
        ("New Active Error Closed", False, Severity.REFUSED),
        ("New Active Data Error Idle Closed", True, Severity.FAILED),
    ],
)
def test_severity_tells_our_failures_from_refusals(states: str, has_failed: bool, severity: Severity) -> None:
    assert only(kept(mail_trace(1, states=states, has_failed=has_failed))).summary()["severity"] == severity


@pytest.mark.parametrize(
    ("outcome", "severity"),
    [("refused", "refused"), ("partly_relayed", "refused"), ("deferred", "failed"), ("unknown", "failed")],
)
def test_an_upstreams_verdict_on_a_mail_is_no_failure_of_ours(outcome: str, severity: str) -> None:
    trace = only(kept(mail_trace(1, outcome=outcome, code=550, has_failed=True)))
    assert trace.summary()["severity"] == severity


def test_a_mail_that_its_client_gave_up_did_not_go_well() -> None:
    assert only(kept(mail_trace(1, outcome="aborted"))).summary()["severity"] == Severity.ABORTED
    both = [*mail_trace(1), *mail_trace(1, outcome="aborted")]
    assert only(kept(both)).summary()["severity"] == Severity.ABORTED
    refused = mail_trace(1, outcome="aborted", states="New Active Error Closed")
    assert only(kept(refused)).summary()["severity"] == Severity.REFUSED


MAIL = mail_trace(
    0x00_4BF92F3577B34DA6A3CE929D0E0E47,
    states="New Active Data Error Idle Closed", outcome="deferred", code=451, domain="Gmail.example", has_failed=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("query", "is_found"),
    [
        ("", True),
        ("004bf92f3577b34da6a3ce929d0e0e47", True),
        ("4bf92f3577b34da6a3ce929d0e0e47", True),  # as Tempo prints it
        ("004bf92f", True),
        ("4bf92f", True),
        ("4bf93f", False),
        ("f3577b34", True),  # the middle of an id
        ("451", True),
        ("550", False),
        ("250", False),
        ("deferred", True),
        ("relayed", False),
        ("gmail", True),
        ("gmail.example", True),
        ("shop.example", True),
        ("provider", True),
        ("upstream_unavailable", True),
        ("failed", True),
        ("refused", False),
        ("local", True),
        ("127.0.0.1", True),
        ("data", True),
        ("starttls", False),
        ("gmail 451", True),
        ("gmail 550", False),
    ],
)
def test_search(query: str, is_found: bool) -> None:
    assert only(kept(MAIL)).matches(parse(query)) is is_found


def test_the_summary_has_the_words_of_who_refused_and_else_of_who_accepted() -> None:
    connection = Identity(1, 1)
    accepted = delivery(1, {"smtp.reply.code": 250, "smtp.reply.text": "Ok: queued as 4XyZ12"})
    assert only(kept([accepted])).summary()["words"] == ["250 Ok: queued as 4XyZ12"]
    refused: dict[str, Value] = {
        "smtp.reply.code": 550,
        "smtp.reply.enhanced_code": "5.1.1",
        "smtp.reply.text": "no such user",
    }
    error = Span(
        "smtp.connection", Kind.SERVER, connection, None, START, START + 1, {},
        [Event(START, "smtp.state.error", refused)], [], False,
    )  # fmt: skip
    assert only(kept([accepted, encoded(error)])).summary()["words"] == ["550 5.1.1 no such user"]
    failed = delivery(2, {"error.type": "tls", "smtp.failure.reason": "certificate verify failed"})
    assert only(kept([accepted, failed])).summary()["words"] == ["certificate verify failed"]


def delivery(span_id: int, attributes: dict[str, Value]) -> EncodedSpan:
    return encoded(
        Span("smtp.delivery", Kind.CLIENT, Identity(1, span_id), None, START, START + 1, attributes, [], [], False)
    )


def test_it_tells_since_when_nothing_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: START)
    traces = kept(mail_trace(1, start_ns=START), recent_spans=6)
    assert traces.complete_since_ns() == START, "since the start of the gateway"
    for number in range(2, 9):
        for span in mail_trace(number, start_ns=START + number * 1000 * MILLISECOND):
            add(traces, span)
    oldest = traces.spans()[-1].to_records()[0].end_ns
    assert traces.complete_since_ns() == oldest > START


def test_the_oldest_traces_go_first() -> None:
    traces = kept(*(mail_trace(number) for number in range(1, 101)), recent_spans=30)
    held = [int(trace.trace_id, 16) for trace in newest_first(traces)]
    assert held == list(range(100, 90, -1))


def test_the_bound_on_octets_counts_what_is_beside_them_too() -> None:
    traces = RecentTraces(recent_octets=20_000)
    for number in range(1, 101):
        for span in mail_trace(number):
            add(traces, span)
    held = sum(map(sys.getsizeof, traces.spans()))
    assert 16_000 < held <= 20_000
    assert traces.get(f"{100:x}") is not None
    assert traces.get("1") is None


def test_a_failed_trace_outlives_the_others() -> None:
    traces = kept(
        mail_trace(1, states="New Active Error Closed"),
        mail_trace(2),
        *(mail_trace(number) for number in range(3, 101)),
        recent_spans=30,
    )
    assert traces.get("1") is not None
    assert traces.get("2") is None


def test_a_retry_joins_its_trace_on_the_shelf_of_failures() -> None:
    traces = kept(
        mail_trace(1, has_failed=True), *(mail_trace(number) for number in range(2, 100)), mail_trace(1),
        recent_spans=30,
    )  # fmt: skip
    trace = traces.get("1")
    assert trace is not None
    assert len(trace.spans()) == 6


def test_failures_are_bounded_too() -> None:
    traces = kept(*(mail_trace(n, has_failed=True) for n in range(1, 101)), recent_spans=15, failed_spans=15)
    assert len(traces.spans()) <= 2 * 5 * 3
    assert traces.get("1") is None


def test_the_failures_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces_module, "FAILED_TRACES", 3)
    traces = kept(*(mail_trace(n, has_failed=True) for n in range(1, 11)), recent_spans=3)
    assert sorted(int(trace.trace_id, 16) for trace in newest_first(traces))[-4:] == [7, 8, 9, 10]


def test_one_endless_trace_shows_its_newest_spans() -> None:
    traces = RecentTraces(recent_spans=10 * TRACE_ITEMS)
    spans = mail_trace(7)
    for _ in range(TRACE_ITEMS):
        for span in spans:
            traces.add([span])
    trace = only(traces)
    shown = trace.spans()
    assert TRACE_ITEMS - 10 < sum(1 + len(span.events) for span in shown) <= TRACE_ITEMS
    assert shown[-1] == spans[-1].to_records()[0]
    assert trace.summary()["dropped_spans"] == 3 * TRACE_ITEMS - len(shown) > 0


def test_whoever_reads_finds_the_spans_that_were_still_to_be_made() -> None:
    late = list(mail_trace(1))

    def catch_up() -> None:
        made, late[:] = late[:], []
        traces.add(made)

    traces = RecentTraces(catch_up=catch_up)
    trace = traces.get("1")
    assert trace is not None
    assert trace.held == 3
    late += mail_trace(2)
    assert len(newest_first(traces)) == 2


def test_a_span_larger_than_the_bound_is_held_all_the_same() -> None:
    traces = RecentTraces(recent_octets=30)
    for span in mail_trace(1):
        traces.add([span])
    assert [span.to_records()[0].name for span in traces.spans()] == ["smtp.connection"]


def test_what_was_worked_out_is_kept_while_nothing_was_added_and_forgotten_with_its_trace() -> None:
    traces = kept(mail_trace(1))
    first = only(traces)
    assert only(traces) is first
    traces.forget_all_but(())
    assert only(traces) is not first


def test_the_full_trace_is_otlp_json() -> None:
    answer = json.loads(json.dumps(only(kept(MAIL)).otlp_json(RESOURCE)))
    [resource_spans] = answer["resourceSpans"]
    assert resource_spans["resource"]["attributes"] == [{"key": "service.name", "value": {"stringValue": "otel-smtp"}}]
    connection, transaction, delivery = resource_spans["scopeSpans"][0]["spans"]
    assert connection["kind"] == 2
    assert "parentSpanId" not in connection
    assert transaction["parentSpanId"] == connection["spanId"] == "0000000000000001"
    assert connection["startTimeUnixNano"] == "1800000000000000000", "64-bit numbers are text"
    assert delivery["status"] == {"code": 2}
    assert {"key": "smtp.reply.code", "value": {"intValue": "451"}} in delivery["attributes"]
    assert {"key": "smtp.pool.reused", "value": {"boolValue": True}} in delivery["events"][0]["attributes"]
    domains = {"key": "smtp.rcpt.domains", "value": {"arrayValue": {"values": [{"stringValue": "Gmail.example"}]}}}
    assert domains in transaction["attributes"]


@pytest.mark.parametrize("trace_id", ["", "x", "0x1", "1" * 33, "-1", " 1"])
def test_what_is_no_trace_id_is_not_looked_up(trace_id: str) -> None:
    assert kept(mail_trace(1)).get(trace_id) is None
