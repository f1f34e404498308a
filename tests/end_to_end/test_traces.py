"""The traces of real connections, as a real OTLP receiver gets them."""

import re
import smtplib
from collections.abc import Callable
from typing import Any, Final

import pytest

from tests.end_to_end.conftest import Client, StartGateway
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript, scripted_reply
from tests.support.otlp_receiver import Fault, FaultKind, OtlpReceiver, ReceivedSpan

QUICKLY: Final = {"OTEL_BSP_SCHEDULE_DELAY": "20"}
Connect = Callable[[int], Client]


def exporting(receiver: OtlpReceiver, protocol: str = "http/protobuf") -> dict[str, str]:
    """Variables that send traces to `receiver`."""
    endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol, **QUICKLY}


def connection_of(receiver: OtlpReceiver, client_port: int) -> ReceivedSpan:
    """The span of the connection from `client_port`."""

    def found(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
        return [
            span
            for span in spans
            if span.name == "smtp.connection" and span.attributes.get("client.port") == client_port
        ]

    (span,) = found(receiver.wait_for_spans(lambda spans: bool(found(spans))))
    return span


def story(span: ReceivedSpan) -> list[str]:
    """The states of a connection, an Error with its verb and code."""
    told = []
    for event in span.events:
        attributes = event.attributes
        name = attributes["smtp.state"]
        assert event.name == f"smtp.state.{name.lower()}"
        told.append(f"{name} {attributes['smtp.verb']} {attributes['smtp.reply.code']}" if name == "Error" else name)
    return told


def named(spans: list[ReceivedSpan], name: str) -> list[ReceivedSpan]:
    return [span for span in spans if span.name == name]


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
@pytest.mark.parametrize("strategy", ["transparent", "buffered"])
def test_a_mail_is_one_story(
    protocol: str, strategy: str, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    upstream.say(UpstreamScript(recipients={"gone@there.example": scripted_reply("550 5.1.1 Nobody")}))
    settings = {"upstream.url": upstream.url, "upstream.name": "provider", "delivery.strategy": strategy}
    running = start(settings, exporting(receiver, protocol))
    recipients = ["b@there.example"] if strategy == "buffered" else ["gone@there.example", "b@there.example"]
    with smtplib.SMTP("127.0.0.1", running.port) as client:
        assert client.sock is not None
        client_port = client.sock.getsockname()[1]
        client.sendmail("a@client.example", recipients, "Subject: x\r\n\r\nHello\r\n")
    connection = connection_of(receiver, client_port)
    spans = receiver.wait_for_spans(3)
    refused = [] if strategy == "buffered" else ["Error RCPT 550"]
    assert story(connection) == ["New", "Active", *refused, "Data", "Active", "Idle", "Closed"]
    (transaction,) = named(spans, "smtp.transaction")
    (delivery,) = named(spans, "smtp.delivery")
    assert connection.kind == "SERVER"
    assert delivery.kind == "CLIENT"
    assert transaction.parent_span_id == connection.span_id
    assert delivery.parent_span_id == transaction.span_id
    assert {span.trace_id for span in spans} == {connection.trace_id}
    assert connection.attributes["smtp.close.reason"] == "quit"
    assert connection.attributes["smtp.connection.messages"] == 1
    assert transaction.attributes["smtp.outcome"] == ("partly_relayed" if refused else "relayed")
    assert transaction.attributes["smtp.transaction.recipient_count"] == 1
    assert transaction.attributes["smtp.message.size"] == len("Subject: x\r\n\r\nHello\r\n")
    assert delivery.attributes["smtp.upstream.name"] == "provider"
    assert delivery.attributes["smtp.reply.code"] == 250
    assert delivery.attributes["server.port"] == upstream.port
    assert (connection.status, transaction.status) == ("UNSET", "UNSET")
    assert delivery.status == ("ERROR" if refused else "UNSET")
    assert connection.start_ns <= transaction.start_ns <= delivery.start_ns <= delivery.end_ns <= transaction.end_ns


def test_the_final_reply_and_the_relayed_header_name_the_trace(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url, "upstream.trace_context": "inject"}, exporting(receiver))
    client = connect(running.port)
    client.opens_content()
    given = f"00-{'a' * 32}-{'b' * 16}-01"
    reply = client.asks(f"traceparent: {given}\r\nSubject: x\r\n\r\nHello\r\n.")
    assert reply == f"250 2.0.0 Ok trace={'a' * 32}"
    (message,) = upstream.wait_for_messages(1)
    spans = receiver.wait_for_spans(lambda spans: bool(named(spans, "smtp.delivery")))
    (delivery,) = named(spans, "smtp.delivery")
    assert delivery.trace_id == "a" * 32
    # Our Received field is the first line (RFC 5321 4.4), and the trace headers come next.
    assert message.below_received.startswith(f"traceparent: 00-{'a' * 32}-{delivery.span_id}-01\r\n".encode())
    assert given.encode() not in message.content
    assert message.content.lower().count(b"traceparent:") == 1
    transaction = connect_transaction(receiver)
    assert transaction.trace_id == "a" * 32
    assert transaction.parent_span_id == "b" * 16
    assert transaction.kind == "SERVER"


def connect_transaction(receiver: OtlpReceiver) -> ReceivedSpan:
    spans = receiver.wait_for_spans(lambda spans: bool(named(spans, "smtp.transaction")))
    (transaction,) = named(spans, "smtp.transaction")
    return transaction


def test_a_connection_that_never_says_a_word_has_its_span(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url, "telemetry.probes": True}, exporting(receiver))
    client = connect(running.port)
    client_port = client.port
    assert client.reply().startswith("220 ")
    client.close()
    span = connection_of(receiver, client_port)
    assert story(span) == ["New", "Active", "Closed"]
    assert span.attributes["smtp.probe"] is True
    assert span.attributes["smtp.connection.octets_received"] == 0
    assert span.attributes["smtp.close.reason"] == "client_disconnect"


def test_the_message_id_is_shown_to_those_who_ask_for_it(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    mail = b"Message-ID: <one@client.example>\r\nSubject: x\r\n\r\nx\r\n"
    for is_wanted in (False, True):
        receiver.clear()
        running = start({"upstream.url": upstream.url, "telemetry.message_id": is_wanted}, exporting(receiver))
        with smtplib.SMTP("127.0.0.1", running.port) as client:
            client.sendmail("a@client.example", ["b@there.example"], mail)
        assert running.stop() == 0
        (transaction,) = named(receiver.spans, "smtp.transaction")
        shown = transaction.attributes.get("smtp.message.id")
        assert shown == ("<one@client.example>" if is_wanted else None)


def test_probes_are_not_exported_unless_asked_for(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url}, exporting(receiver))
    probe = connect(running.port)
    assert probe.reply().startswith("220 ")
    probe.close()
    client = connect(running.port)
    client.opens()
    client.asks("QUIT")
    connection_of(receiver, client.port)
    assert running.stop() == 0
    assert len(named(receiver.spans, "smtp.connection")) == 1


def test_a_connection_refused_at_capacity_has_its_span(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url, "limits.connections": 1}, exporting(receiver))
    first = connect(running.port)
    first.opens()
    second = connect(running.port)
    assert second.reply() == "421 4.3.2 Too many connections"
    assert second.reply() == ""
    span = connection_of(receiver, second.port)
    assert [event.attributes["smtp.state"] for event in span.events] == ["New", "Error", "Closed"]
    assert span.events[1].attributes["smtp.reply.code"] == 421
    assert span.attributes["smtp.close.reason"] == "refused"
    assert first.asks("NOOP").startswith("250 ")


@pytest.mark.parametrize("strategy", ["transparent", "buffered"])
def test_a_client_that_dies_in_data_leaves_a_span_and_no_mail(
    strategy: str, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url, "delivery.strategy": strategy}, exporting(receiver))
    client = connect(running.port)
    client_port = client.port
    client.opens_content()
    client.say("Subject: x", "", "half of a mess")
    client.close()
    span = connection_of(receiver, client_port)
    assert story(span) == ["New", "Active", "Data", "Closed"]
    assert span.attributes["smtp.close.reason"] == "client_disconnect"
    assert connect_transaction(receiver).attributes["smtp.outcome"] == "aborted"
    assert running.stop() == 0
    assert upstream.messages == []


def test_a_refused_message_is_an_error_event_and_no_error_of_ours(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    upstream.say(UpstreamScript(content=(scripted_reply("554 5.7.1 Spam"),)))
    running = start({"upstream.url": upstream.url}, exporting(receiver))
    client = connect(running.port)
    client.opens_content()
    assert re.fullmatch(r"554 5\.7\.1 Spam trace=[0-9a-f]{32}", client.asks("Subject: x\r\n\r\n."))
    client.asks("QUIT")
    span = connection_of(receiver, client.port)
    assert story(span) == ["New", "Active", "Data", "Error DATA 554", "Idle", "Closed"]
    assert span.status == "UNSET"
    transaction = connect_transaction(receiver)
    assert (transaction.attributes["smtp.outcome"], transaction.status) == ("refused", "UNSET")
    (delivery,) = named(receiver.wait_for_spans(3), "smtp.delivery")
    assert (delivery.attributes["smtp.reply.code"], delivery.status) == (554, "ERROR")
    assert delivery.attributes["smtp.reply.enhanced_code"] == "5.7.1"


def test_what_must_not_leave_does_not_leave(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url, "telemetry.state_events": "both"}, exporting(receiver))
    client = connect(running.port)
    client.opens()
    client.asks("AUTH PLAIN AHVzZXIAc2VjcmV0")
    client.asks("MAIL FROM:<localpart@client.example>", "RCPT TO:<otherlocal@there.example>", "DATA")
    client.asks("Subject: subjectline\r\n\r\nbodytext\r\n.")
    client.asks("FROBNICATE unknownverb")
    client.asks("QUIT")
    connection_of(receiver, client.port)
    assert running.stop() == 0
    sent = b"".join(receiver.bodies)
    secrets = (b"localpart", b"otherlocal", b"subjectline", b"bodytext", b"AHVz", b"FROBNICATE", b"unknownverb")
    assert [secret for secret in secrets if secret in sent] == []
    assert [secret for secret in secrets if secret.decode() in running.stderr] == []
    assert b"client.example" in sent


@pytest.mark.parametrize("kind", [FaultKind.BLACK_HOLE, FaultKind.UNAVAILABLE, FaultKind.HUGE_REPLY, None])
def test_mail_flows_and_shutdown_is_timely_without_a_collector(
    kind: FaultKind | None, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    environ = exporting(receiver)
    if kind is None:
        receiver.refuse()
    else:
        receiver.fault = Fault(kind)
    running = start({"upstream.url": upstream.url}, environ)
    with smtplib.SMTP("127.0.0.1", running.port, timeout=20) as client:
        for _ in range(20):
            client.sendmail("a@client.example", ["b@there.example"], "Subject: x\r\n\r\nHello\r\n")
    assert len(upstream.messages) == 20
    # The flush has two seconds; the rest is for a machine that is shared.
    assert running.stop_within(12) == 0
    receiver.fault = Fault(FaultKind.NONE)


def test_every_transition_of_a_long_connection_is_exported(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    settings: dict[str, Any] = {
        "upstream.url": upstream.url,
        "telemetry.segment_events": 100,
        "limits.junk_commands": 1000,
    }
    running = start(settings, exporting(receiver))
    client = connect(running.port)
    client.opens()
    for _ in range(200):
        client.asks("RSET")
    client.asks("QUIT")
    assert running.stop() == 0
    segments = sorted(
        named(receiver.spans, "smtp.connection"), key=lambda span: span.events[0].attributes["smtp.state.sequence"]
    )
    events = [event for segment in segments for event in segment.events]
    assert [event.attributes["smtp.state.sequence"] for event in events] == list(range(1, 404))
    assert [event.attributes["smtp.state"] for event in events] == [
        "New",
        "Active",
        *["Reset", "Active"] * 200,
        "Closed",
    ]
    assert len({segment.attributes["smtp.connection.id"] for segment in segments}) == 1
    assert len(segments) >= 4
    assert all(segment.dropped == 0 for segment in segments)
