"""Very long sessions against a real receiver: every transition arrives, once, in segments of bounded size.

`OTELSMTP_TEST_MESSAGES=10000` makes the long connection longer; the suite's own length shows the same in seconds.
"""

import os
import socket
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from tests.end_to_end.conftest import Client, StartGateway
from tests.end_to_end.test_traces import exporting, named
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan

Connect = Callable[[int], Client]

MESSAGES: Final = int(os.environ.get("OTELSMTP_TEST_MESSAGES", "600"))
SEGMENT_EVENTS: Final = 100
# Between two points where a segment may end lies one transaction: Active, Data, Active, Idle.
TRANSACTION_EVENTS: Final = 4
# What the caches of encoded names, interpreter and allocator may take once traffic has begun.
MEMORY_KIB: Final = 12 * 1024


def resident_kib(pid: int) -> int:
    """The resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])


def segments_of(receiver: OtlpReceiver) -> list[ReceivedSpan]:
    """The segments of the only connection, in order, their links and numbers checked."""
    segments = sorted(
        named(receiver.spans, "smtp.connection"), key=lambda span: span.attributes["smtp.connection.segment"]
    )
    assert [span.attributes["smtp.connection.segment"] for span in segments] == list(range(1, len(segments) + 1))
    assert len({span.attributes["smtp.connection.id"] for span in segments}) == 1
    assert segments[0].links == []
    for before, after in pairwise(segments):
        (link,) = after.links
        assert (link.trace_id, link.span_id) == (before.trace_id, before.span_id)
        assert link.attributes == {"smtp.link.type": "previous_segment"}
    return segments


def states_of(segments: list[ReceivedSpan], bound: int) -> list[str]:
    """The states of all segments, none of which holds more events than `bound`; each comes once."""
    events = [event for span in segments for event in span.events]
    assert [event.attributes["smtp.state.sequence"] for event in events] == list(range(1, len(events) + 1))
    assert max(len(span.events) for span in segments) <= bound
    assert sum(span.dropped for span in segments) == 0
    return [event.attributes["smtp.state"] for event in events]


def export_all(receiver: OtlpReceiver) -> dict[str, str]:
    """As fast as they come, and a queue in which all of them have room."""
    return {**exporting(receiver), "OTEL_BSP_MAX_QUEUE_SIZE": str(10 * MESSAGES + 4096)}


def test_a_connection_with_very_many_messages(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    settings: dict[str, Any] = {
        "upstream.url": upstream.url,
        "limits.messages_per_connection": MESSAGES + 1,
        "telemetry.segment_events": SEGMENT_EVENTS,
        "log.level": "warning",
    }
    running = start(settings, export_all(receiver))
    client = connect(running.port)
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.opens()
    warm = 0
    for number in range(MESSAGES):
        assert client.asks("MAIL FROM:<a@client.example>", "RCPT TO:<b@there.example>", "DATA")[:3] == "354"
        assert client.asks("Subject: x\r\n\r\nHello\r\n.")[:3] == "250"
        if number == MESSAGES // 4:
            warm = resident_kib(running.pid)
    grown = resident_kib(running.pid) - warm
    client.asks("QUIT")
    assert running.stop_within(60) == 0
    segments = segments_of(receiver)
    one = ["Data", "Active", "Idle"]
    assert states_of(segments, SEGMENT_EVENTS + TRANSACTION_EVENTS) == [
        "New", "Active", *one, *["Active", *one] * (MESSAGES - 1), "Closed",
    ]  # fmt: skip
    assert len(segments) >= 4 * MESSAGES // (SEGMENT_EVENTS + TRANSACTION_EVENTS)
    transactions = named(receiver.spans, "smtp.transaction")
    assert sorted(span.attributes["smtp.transaction.number"] for span in transactions) == list(range(1, MESSAGES + 1))
    assert len(named(receiver.spans, "smtp.delivery")) == MESSAGES
    # A trace holds one segment and what hangs below it.
    traces = {span.trace_id: span for span in segments}
    assert all(traces[span.trace_id].span_id == span.parent_span_id for span in transactions)
    assert len(upstream.messages) == MESSAGES
    assert grown < MEMORY_KIB, f"{grown} KiB more"


def test_a_connection_with_a_thousand_errors(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    settings = {"upstream.url": upstream.url, "limits.errors": 1001, "telemetry.segment_events": SEGMENT_EVENTS}
    running = start(settings, export_all(receiver))
    client = connect(running.port)
    client.opens()
    for _ in range(10):
        assert client.asks(*["NONSENSE"] * 100)[:3] == "500"
    client.asks("QUIT")
    assert running.stop() == 0
    segments = segments_of(receiver)
    assert states_of(segments, SEGMENT_EVENTS + TRANSACTION_EVENTS) == ["New", "Active", *["Error"] * 1000, "Closed"]
    assert segments[-1].attributes["smtp.connection.errors"] == 1000
    assert len({span.trace_id for span in segments}) == len(segments) >= 1000 // (SEGMENT_EVENTS + TRANSACTION_EVENTS)


def test_a_message_to_a_thousand_recipients(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    settings = {"upstream.url": upstream.url, "limits.recipients": 1000, "telemetry.addresses": "full"}
    running = start(settings, export_all(receiver))
    client = connect(running.port)
    client.opens()
    client.asks("MAIL FROM:<a@client.example>")
    recipients = [f"RCPT TO:<someone-{number}@there-{number}.example>" for number in range(1000)]
    for start_at in range(0, 1000, 100):
        assert client.asks(*recipients[start_at : start_at + 100])[:3] == "250"
    assert client.asks("DATA")[:3] == "354"
    assert client.asks("Subject: x\r\n\r\nHello\r\n.")[:3] == "250"
    client.asks("QUIT")
    assert running.stop() == 0
    assert states_of(segments_of(receiver), 500) == ["New", "Active", "Data", "Active", "Idle", "Closed"]
    (transaction,) = named(receiver.spans, "smtp.transaction")
    assert transaction.attributes["smtp.transaction.recipient_count"] == 1000
    assert len(transaction.attributes["smtp.rcpt.domains"]) == 10
    assert len(transaction.attributes["smtp.rcpt.addresses"]) == 10
    deliveries = named(receiver.spans, "smtp.delivery")
    assert len(deliveries) == 10  # `upstream.recipients_per_transaction`
    for delivery in deliveries:
        assert delivery.event_names.count("smtp.upstream.rcpt") == 1
        assert len(delivery.events) < 16
    assert sum(len(message.recipients) for message in upstream.messages) == 1000
