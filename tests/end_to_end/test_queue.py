"""The queue modes as a process: one trace over all attempts, health, and the modes' replies."""

import json
import smtplib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.durability.failing import may_mount, small_disk
from tests.durability.upstream import CountingUpstream
from tests.end_to_end.conftest import StartGateway
from tests.support.otlp_receiver import OtlpReceiver, named
from tests.support.ports import unclaimed_port
from tests.support.process import gateway, until

MAIL = b"X-Id: one\r\nSubject: queued\r\n\r\nHello.\r\n"


@pytest.fixture
def upstream() -> Iterator[CountingUpstream]:
    with CountingUpstream(0) as upstream:
        upstream.is_willing = True
        yield upstream


def settings(upstream: CountingUpstream, directory: Path, mode: str) -> dict[str, Any]:
    return {
        "upstream.url": f"smtp://127.0.0.1:{upstream.port}",
        "delivery.mode": mode,
        "spool.directory": str(directory / "spool"),
        "spool.retry": ["1s"],
    }


@pytest.mark.parametrize("mode", ["queue", "direct-then-queue"])
def test_all_attempts_stand_in_the_trace_of_the_transaction(
    mode: str, tmp_path: Path, upstream: CountingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    upstream.is_closed = True
    telemetry = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    running = start(settings(upstream, tmp_path, mode), environ=telemetry)
    with smtplib.SMTP("127.0.0.1", running.port) as client:
        client.sendmail("app@example.com", ["user@example.net"], MAIL)
    receiver.wait_for_spans(lambda spans: len(named(spans, "smtp.delivery")) >= 1)
    upstream.is_closed = False
    until(lambda: upstream.taken["one"] or None, "it is delivered")
    assert running.stop() == 0
    (transaction,) = named(receiver.spans, "smtp.transaction")
    assert transaction.attributes["smtp.outcome"] == "queued"
    deliveries = sorted(named(receiver.spans, "smtp.delivery"), key=lambda span: span.start_ns)
    spooled = [span for span in deliveries if "smtp.spool.id" in span.attributes]
    assert {span.trace_id for span in deliveries} == {transaction.trace_id}
    assert {span.parent_span_id for span in spooled} == {transaction.span_id}
    assert {span.attributes["smtp.spool.id"] for span in spooled} == {transaction.attributes["smtp.spool.id"]}
    assert [span.attributes["smtp.delivery.attempt"] for span in deliveries] == list(range(1, len(deliveries) + 1))
    assert [span.attributes["smtp.outcome"] for span in deliveries][-1] == "relayed"
    assert all(link.attributes["smtp.link.type"] == "spooled_transaction" for span in spooled for link in span.links)


def health(port: int) -> tuple[int, dict[str, Any]]:
    """The status and the answer of /readyz."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code, json.loads(refusal.read())


def test_a_gateway_with_a_queue_is_ready_without_its_upstream(
    tmp_path: Path, upstream: CountingUpstream, start: StartGateway
) -> None:
    upstream.is_closed = True
    port = unclaimed_port()
    running = start({**settings(upstream, tmp_path, "queue"), "status.address": f"127.0.0.1:{port}"})
    with smtplib.SMTP("127.0.0.1", running.port) as client:
        for _ in range(20):
            client.sendmail("app@example.com", ["user@example.net"], MAIL)
    assert health(port)[0] == 200


def test_a_disk_without_room_is_told_to_clients_and_probes(tmp_path: Path, upstream: CountingUpstream) -> None:
    if not may_mount():
        pytest.skip("this process may not mount a file system of its own")
    port = unclaimed_port()
    # Room for the reserve, and not for one and a half of the largest message.
    with small_disk(tmp_path / "disk", 30 * 1024 * 1024) as under:
        queue = {**settings(upstream, tmp_path / "disk", "queue"), "status.address": f"127.0.0.1:{port}"}
        with gateway(queue, tmp_path, under=under) as running:
            with smtplib.SMTP("127.0.0.1", running.port) as client:
                client.ehlo()
                code, text = client.mail("app@example.com")
                assert (code, text[:5]) == (452, b"4.3.1")
            status, body = health(port)
            assert status == 503
            assert "spool" in body["reasons"]


def test_an_operator_acts_on_the_queue_over_the_status_port(
    tmp_path: Path, upstream: CountingUpstream, start: StartGateway
) -> None:
    upstream.is_closed = True
    token = tmp_path / "token"
    token.write_text("only-operators-know-it\n")
    address = f"127.0.0.1:{unclaimed_port()}"
    more = {"spool.retry": ["1h"], "status.address": address, "status.token_file": str(token)}
    running = start({**settings(upstream, tmp_path, "queue"), **more})
    with smtplib.SMTP("127.0.0.1", running.port) as client:
        client.sendmail("app@example.com", ["user@example.net"], MAIL)

    def queued() -> Any:
        with urllib.request.urlopen(f"http://{address}/api/queue") as answer:
            return json.load(answer)["queue"]["messages"]

    def act(command: str, message: str) -> Any:
        request = urllib.request.Request(
            f"http://{address}/api/queue/{command}",
            json.dumps({"ids": [message, "no-such-message"]}).encode(),
            {"content-type": "application/json", "x-otel-smtp-queue-token": "only-operators-know-it"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["messages"]

    [message] = until(lambda: [one for one in queued() if one["state"] == "deferred"] or None, "it was attempted")
    assert message["last_reply"], "why it waits"
    [done, unknown] = act("hold", message["spool_id"])
    assert done == {"queue_id": message["spool_id"], "changed": True}
    assert unknown["queue_id"] == "no-such-message"
    assert [one["state"] for one in queued()] == ["held"], "what was done is seen at once"
    upstream.is_closed = False
    act("release", message["spool_id"])
    act("retry", message["spool_id"])
    until(lambda: upstream.taken["one"] or None, "it is delivered")
