"""A reply after the end of the content that makes no sense, or never comes: nobody knows, and everything says so."""

import smtplib
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.durability.lying import LyingUpstream
from tests.end_to_end.conftest import StartGateway
from tests.support.otlp_receiver import OtlpReceiver, named
from tests.support.ports import unclaimed_port
from tests.support.process import until

MODES = ("direct", "buffered", "queue", "direct-then-queue")
MAIL = b"X-Id: one\r\nX-Octets: 4\r\n\r\nhi\r\n"


@pytest.mark.parametrize("ending", ["take and garble", "take and vanish"])
@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_outcome_is_told_by_reply_spans_log_metrics_and_mark(
    mode: str, ending: str, tmp_path: Path, receiver: OtlpReceiver, start: StartGateway
) -> None:
    is_queueing = mode in ("queue", "direct-then-queue")
    with LyingUpstream(0, [ending]) as upstream:
        settings: dict[str, Any] = {
            "upstream.url": f"smtp://127.0.0.1:{upstream.port}",
            "delivery.mode": mode if is_queueing else "direct",
            "delivery.strategy": "buffered" if mode == "buffered" else "transparent",
            "status.address": f"127.0.0.1:{(status := unclaimed_port())}",
        }
        if is_queueing:
            settings |= {"spool.directory": str(tmp_path / "spool"), "spool.retry": ["1s"]}
        running = start(settings, environ={"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint})
        with smtplib.SMTP("127.0.0.1", running.port) as client:
            client.ehlo()
            client.mail("app@example.com")
            client.rcpt("user@example.net")
            code, text = client.data(MAIL)
        if is_queueing:
            assert code == 250
            until(lambda: upstream.taken["one", "user@example.net"] == 2 or None, "it is attempted again")
        else:
            assert (code, b"outcome unknown" in text) == (451, True)
        with urllib.request.urlopen(f"http://127.0.0.1:{status}/metrics", timeout=10) as answer:
            metrics = answer.read().decode()
        assert running.stop() == 0
    deliveries = sorted(named(receiver.spans, "smtp.delivery"), key=lambda span: span.start_ns)
    assert deliveries[0].attributes["smtp.outcome"] == "unknown"
    assert deliveries[0].attributes["error.type"] == "outcome_unknown"
    (transaction,) = named(receiver.spans, "smtp.transaction")
    assert transaction.attributes["smtp.outcome"] == ("queued" if is_queueing else "unknown")
    assert any("delivery outcome unknown" in str(line) and line["level"] == "error" for line in running.log)
    assert _value(metrics, "smtp_client_delivery_duration_seconds_count", 'smtp_outcome="unknown"') == 1
    told = [line for line in running.log if line.get("smtp.outcome") == "unknown" or line.get("outcome") == "unknown"]
    assert told, "a line of the transaction or of the delivery, with its outcome"
    if is_queueing:
        assert deliveries[-1].attributes["smtp.delivery.possible_duplicate"] is True
        assert any("the upstream may have it already" in str(line) for line in running.log)
    else:
        assert transaction.attributes["error.type"] == "outcome_unknown"
        assert _value(metrics, "smtp_server_transactions_total", 'smtp_outcome="unknown"') == 1
        assert upstream.taken["one", "user@example.net"] == 1, "never tried again behind the client's back"


def _value(page: str, name: str, label: str) -> float:
    """A series' value."""
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name) and label in line)
