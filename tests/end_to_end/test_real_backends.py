"""What real Jaeger shows of mail that went wrong, and what a real collector keeps of it.

Both programs are looked for on the PATH; where one is missing, its tests are skipped and say so.
"""

import smtplib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import StartGateway
from tests.support.capture import CapturingUpstream
from tests.support.contrib_collector import sampling_collector
from tests.support.dialogue import UpstreamScript, scripted_reply
from tests.support.jaeger import Jaeger, events_of, jaeger, tags_of
from tests.support.otlp_receiver import OtlpReceiver, named
from tests.support.ports import unclaimed_port
from tests.support.process import GatewayProcess

MAIL = "Subject: x\r\n\r\nHello\r\n"
WHOLE = ("smtp.connection", "smtp.transaction", "smtp.delivery")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    """A Jaeger for all tests here: each looks for a domain of its own."""
    with jaeger(tmp_path_factory.mktemp("jaeger")) as running:
        yield running


def send(running: GatewayProcess, *recipients: str) -> str:
    """Send a mail to those of the recipients that are accepted; the last reply."""
    with smtplib.SMTP("127.0.0.1", running.port) as client:
        client.ehlo("client.example")
        client.mail("a@client.example")
        replies = [client.rcpt(recipient) for recipient in recipients]
        if any(code == 250 for code, _ in replies):
            replies.append(client.data(MAIL))
    return replies[-1][1].decode()


def trace_id_of(reply: str) -> str:
    return reply.partition("trace=")[2][:32]


def test_jaeger_shows_a_mail_with_all_events_of_its_connection(
    store: Jaeger, upstream: CapturingUpstream, start: StartGateway
) -> None:
    running = start({"upstream.url": upstream.url}, store.environ)
    trace_id = trace_id_of(send(running, "b@relayed.example"))
    assert running.stop() == 0
    spans = store.trace(trace_id, *WHOLE)
    assert spans.keys() == {*WHOLE}
    connection = spans["smtp.connection"]
    events = events_of(connection)
    assert (events[0]["event"], events[-1]["event"]) == ("smtp.state.new", "smtp.state.closed")
    # Jaeger's page hides events that are not within their span, by its own clock of microseconds.
    end = connection["startTime"] + connection["duration"]
    assert all(connection["startTime"] <= log["timestamp"] <= end for log in connection["logs"])
    assert [span for span in spans.values() if span.get("warnings")] == []


def test_jaeger_finds_a_mail_by_the_domain_of_a_refused_recipient_and_says_why(
    store: Jaeger, upstream: CapturingUpstream, start: StartGateway
) -> None:
    upstream.say(UpstreamScript(recipients={"gone@gone.example": scripted_reply("550 5.1.1 No such user")}))
    running = start({"upstream.url": upstream.url, "upstream.name": "provider"}, store.environ)
    trace_id = trace_id_of(send(running, "b@here.example", "gone@gone.example"))
    assert running.stop() == 0
    spans = store.trace(trace_id, *WHOLE)
    (recipient,) = (each for each in events_of(spans["smtp.transaction"]) if each["event"] == "smtp.recipient")
    assert recipient["smtp.rcpt.domain"] == "gone.example"
    assert recipient["smtp.recipient.fate"] == "refused"
    assert (recipient["smtp.reply.code"], recipient["smtp.reply.enhanced_code"]) == (550, "5.1.1")
    assert recipient["smtp.upstream.name"] == "provider"
    assert tags_of(spans["smtp.transaction"])["smtp.outcome"] == "partly_relayed"
    for tags in (
        {"smtp.rcpt.domain": "gone.example"},
        {"smtp.rcpt.domain": "gone.example", "smtp.recipient.fate": "refused"},
        {"smtp.outcome": "partly_relayed"},
    ):
        assert trace_id in store.search(tags), tags


def test_jaeger_shows_an_upstream_that_is_away_as_an_error(store: Jaeger, start: StartGateway) -> None:
    running = start({"upstream.url": f"smtp://127.0.0.1:{unclaimed_port()}"}, store.environ)
    trace_id = trace_id_of(send(running, "b@away.example"))
    assert running.stop() == 0
    if not trace_id:
        (trace_id,) = store.search({"smtp.rcpt.domain": "away.example"})
    spans = store.trace(trace_id, *WHOLE)
    # Its monitoring counts SERVER spans.
    for name in WHOLE:
        assert tags_of(spans[name])["error"] is True, name
        assert tags_of(spans[name])["error.type"], name
    for name in ("smtp.transaction", "smtp.delivery"):
        assert tags_of(spans[name])["smtp.failure.reason"] == "connection refused", name
    assert trace_id in store.search({"smtp.failure.reason": "connection refused"})


@pytest.mark.parametrize("is_refused", [True, False])
def test_the_collectors_example_keeps_a_refused_recipient_over_a_connection_that_outlives_its_decision(
    is_refused: bool, tmp_path: Path, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    upstream.say(UpstreamScript(recipients={"gone@there.example": scripted_reply("550 5.1.1 No such user")}))
    with sampling_collector(tmp_path, receiver, decision_wait="1s") as endpoint:
        running = start(
            {"upstream.url": upstream.url},
            {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "20", "OTEL_METRICS_EXPORTER": "none"},
        )
        client = smtplib.SMTP("127.0.0.1", running.port)
        try:
            recipients = ["b@here.example", "gone@there.example"]
            client.sendmail("a@client.example", recipients if is_refused else recipients[:1], MAIL)
            if is_refused:
                # Decided, and passed on, while the client keeps its connection.
                spans = receiver.wait_for_spans(lambda spans: bool(named(spans, "smtp.delivery")))
                assert named(spans, "smtp.connection") == []
            else:
                # Whatever is to be kept would have come in several times the decision's wait; that nothing comes can
                # only be seen by waiting.
                time.sleep(4)
        finally:
            client.quit()
        assert running.stop() == 0
        if is_refused:
            spans = receiver.wait_for_spans(lambda spans: bool(named(spans, "smtp.connection")))
            assert {span.name for span in spans} == {*WHOLE}
            assert len({span.trace_id for span in spans}) == 1
        else:
            assert receiver.spans == []
