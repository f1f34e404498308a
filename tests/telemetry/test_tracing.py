"""Spans: which there are, how they hang together, what they carry."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    DEFAULT_ON,
    Decision,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.trace import SpanKind, StatusCode

from otel_smtp.observing import DeliveryPhase, Endpoint, Observer, Outcome, TransactionRecord, fan_out
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, Mail
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import CloseReason, TlsMode
from otel_smtp.telemetry.propagation import InboundPolicy
from otel_smtp.telemetry.records import SpanRecord
from otel_smtp.telemetry.sdk_spans import SdkSpans
from otel_smtp.telemetry.shapes import AFTER_LAST_EVENT_NS, EncodedSpan
from otel_smtp.telemetry.state_events import StateEvents
from otel_smtp.telemetry.tracing import StateTelling, Tracing
from tests.telemetry.driving import QUEUED, Client, FakeClock, Kept, begin_delivery, each_to, finish_delivery, resume

CONNECTION, TRANSACTION, DELIVERY = "smtp.connection", "smtp.transaction", "smtp.delivery"
APPLICATION = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
APPLICATION_TRACE = int("0af7651916cd43dd8448eb211c80319c", 16)
APPLICATION_SPAN = int("b7ad6b7169203331", 16)


def tracing(kept: Kept, **more: Any) -> Tracing:
    return Tracing(sinks=[kept], **more)


def states(record: SpanRecord) -> list[object]:
    return [event.attributes["smtp.state"] for event in record.events]


# Golden sequences ------------------------------------------------------------------------------------------------


def _nothing(client: Client) -> None:
    client.octets_received = 1
    client.close()


BAD_FINAL = replies.INTERNAL

GOLDEN: list[tuple[str, TlsMode, Callable[[Client], object], str]] = [
    ("connect, disconnect", TlsMode.OFF, _nothing, "New Active Closed"),
    ("one message", TlsMode.OFF, lambda c: c.ehlo().message().quit(), "New Active Data Active Idle Closed"),
    ("reset", TlsMode.OFF, lambda c: c.ehlo().rset().quit(), "New Active Reset Active Closed"),
    (
        "bad base64",
        TlsMode.OFF,
        lambda c: c.ehlo().auth(reply=replies.BAD_BASE64).quit(),
        "New Active Auth Error Closed",
    ),
    ("auth", TlsMode.OFF, lambda c: c.ehlo().auth().quit(), "New Active Auth Active Closed"),
    ("starttls", TlsMode.STARTTLS, lambda c: c.ehlo().starttls().ehlo().quit(), "New Active StartTLS Active Closed"),
    ("implicit tls", TlsMode.IMPLICIT, lambda c: c.ehlo().quit(), "New StartTLS Active Closed"),
    (
        "two messages",
        TlsMode.OFF,
        lambda c: c.ehlo().message().message().quit(),
        "New Active Data Active Idle Active Data Active Idle Closed",
    ),
    (
        "refused message",
        TlsMode.OFF,
        lambda c: c.ehlo().mail().rcpt().data().final(BAD_FINAL, Outcome.DEFERRED).quit(),
        "New Active Data Error Idle Closed",
    ),
    (
        "message, reset",
        TlsMode.OFF,
        lambda c: c.ehlo().message().rset().quit(),
        "New Active Data Active Idle Reset Active Closed",
    ),
    (
        "unknown verb between messages",
        TlsMode.OFF,
        lambda c: c.ehlo().message().refused("other", replies.UNKNOWN_COMMAND).message().quit(),
        "New Active Data Active Idle Error Active Data Active Idle Closed",
    ),
    (
        "bdat, reset",
        TlsMode.OFF,
        lambda c: c.ehlo().mail().rcpt().data("BDAT").rset().quit(),
        "New Active Data Reset Active Closed",
    ),
]


@pytest.mark.parametrize(("script", "expected"), [row[2:] for row in GOLDEN], ids=[row[0] for row in GOLDEN])
def test_every_transition_of_a_golden_sequence_is_an_event_in_order(
    script: Callable[[Client], object], expected: str, request: pytest.FixtureRequest
) -> None:
    mode = next(row[1] for row in GOLDEN if row[2] is script)
    kept = Kept()
    script(Client(tracing(kept), tls_mode=mode))
    connection = kept.one(CONNECTION)
    assert states(connection) == expected.split()
    assert [event.name for event in connection.events] == [f"smtp.state.{state.lower()}" for state in expected.split()]
    times = [event.time_ns for event in connection.events]
    assert times == sorted(times)
    assert connection.start_ns <= times[0]
    assert times[-1] <= connection.end_ns
    for number, event in enumerate(connection.events, 1):
        attributes = event.attributes
        assert attributes["smtp.state.sequence"] == number
        if number == 1:
            assert "smtp.state.previous" not in attributes
            assert "smtp.state.previous_duration" not in attributes
        else:
            before = connection.events[number - 2]
            assert attributes["smtp.state.previous"] == before.attributes["smtp.state"]
            elapsed = (event.time_ns - before.time_ns) / 1e9
            assert attributes["smtp.state.previous_duration"] == pytest.approx(elapsed)
        assert attributes["smtp.state.level"] not in ("Reset", "Error")


def test_a_connection_that_only_waits_has_no_identity_before_its_end() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo()
    assert client.record.trace is None
    client.quit()
    assert states(kept.one(CONNECTION)) == ["New", "Active", "Closed"]


def event_attributes(record: SpanRecord, name: str) -> dict[str, object]:
    common = ("smtp.state", "smtp.state.previous", "smtp.state.sequence", "smtp.state.previous_duration")
    [event] = [event for event in record.events if event.name == name]
    return {key: value for key, value in event.attributes.items() if key not in common}


def test_state_events_carry_the_attributes_of_their_row() -> None:
    kept, clock = Kept(), FakeClock()
    client = Client(tracing(kept), clock=clock, tls_mode=TlsMode.STARTTLS)
    client.ehlo().starttls().ehlo()
    client.auth(reply=replies.AUTH_FAILED)
    clock.advance(2)
    client.mail().rcpt().rcpt("carol@example.net").data().header().final()
    client.rset().quit()
    connection = kept.one(CONNECTION)
    assert event_attributes(connection, "smtp.state.new") == {
        "smtp.state.level": "New",
        "smtp.tls.mode": "starttls",
        "network.peer.address": "192.0.2.7",
        "network.peer.port": 50732,
        "network.local.address": "127.0.0.1",
        "network.local.port": 2525,
        "smtp.listener": "local",
    }
    assert event_attributes(connection, "smtp.state.starttls") == {
        "smtp.state.level": "StartTLS",
        "smtp.tls.mode": "starttls",
    }
    assert event_attributes(connection, "smtp.state.auth") == {
        "smtp.state.level": "Auth",
        "smtp.auth.mechanism": "PLAIN",
    }
    assert event_attributes(connection, "smtp.state.error") == {
        "smtp.state.level": "Auth",
        "smtp.verb": "AUTH",
        "smtp.reply.code": 535,
        "smtp.reply.enhanced_code": "5.7.8",
        "smtp.reply.text": "Authentication credentials invalid",
        "error.type": "auth",
    }
    assert event_attributes(connection, "smtp.state.data") == {
        "smtp.state.level": "Data",
        "smtp.transaction.number": 1,
        "smtp.transaction.recipient_count": 2,
    }
    assert event_attributes(connection, "smtp.state.idle") == {
        "smtp.state.level": "Idle",
        "smtp.connection.messages": 1,
    }
    assert event_attributes(connection, "smtp.state.reset") == {
        "smtp.state.level": "Idle",
        "smtp.reset.cause": "rset",
    }
    closed = event_attributes(connection, "smtp.state.closed")
    assert closed.pop("smtp.connection.duration") == pytest.approx(2, abs=0.1)
    assert closed == {
        "smtp.state.level": "Closed",
        "smtp.close.reason": "quit",
        "smtp.connection.messages": 1,
        "smtp.connection.octets_received": client.octets_received,
        "smtp.connection.octets_sent": client.octets_sent,
    }
    active = [event.attributes for event in connection.events if event.name == "smtp.state.active"]
    assert [(one.get("tls.protocol.version"), one.get("tls.cipher")) for one in active][1] == (
        "1.3",
        "TLS_AES_256_GCM_SHA384",
    )
    [data] = [event.attributes for event in connection.events if event.name == "smtp.state.data"]
    assert data["smtp.state.previous_duration"] == pytest.approx(2, abs=0.1)


# The connection's span -------------------------------------------------------------------------------------------


def test_a_connection_tells_who_and_how_it_ended() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo("app.example").starttls().ehlo("app.example").auth("alice")
    client.message().refused("RCPT", replies.BAD_SEQUENCE).quit()
    connection = kept.one(CONNECTION)
    attributes = dict(connection.attributes)
    assert attributes.pop("smtp.connection.duration") == pytest.approx(
        (connection.end_ns - connection.start_ns) / 1e9, abs=1e-6
    )
    assert attributes == {
        "smtp.connection.id": client.info.id,
        "smtp.connection.segment": 1,
        "client.address": "192.0.2.7",
        "client.port": 50732,
        "server.address": "127.0.0.1",
        "server.port": 2525,
        "network.transport": "tcp",
        "network.type": "ipv4",
        "network.protocol.name": "smtp",
        "smtp.listener": "local",
        "smtp.tls.mode": "off",
        "smtp.helo": "app.example",
        "smtp.auth.mechanism": "PLAIN",
        "tls.protocol.version": "1.3",
        "tls.cipher": "TLS_AES_256_GCM_SHA384",
        "tls.resumed": False,
        "smtp.connection.messages": 1,
        "smtp.connection.errors": 1,
        "smtp.connection.octets_received": client.octets_received,
        "smtp.connection.octets_sent": client.octets_sent,
        "smtp.close.reason": "quit",
    }
    assert not connection.has_failed  # what a client does wrong is an Error event
    assert (connection.kind, connection.parent) == (SpanKind.SERVER, None)


def test_behind_a_proxy_the_client_is_the_one_that_its_header_names() -> None:
    kept = Kept()
    client = Client(tracing(kept), peer="10.0.0.3")
    client.proxied(Endpoint("2001:db8::7", 4711), Endpoint("198.51.100.1", 25))
    client.ehlo().quit()
    attributes = kept.one(CONNECTION).attributes
    shown = {name: attributes[name] for name in attributes if name.startswith(("client.", "server.", "network."))}
    assert shown == {
        "client.address": "2001:db8::7",
        "client.port": 4711,
        "server.address": "198.51.100.1",
        "server.port": 25,
        "network.peer.address": "10.0.0.3",
        "network.peer.port": 50732,
        "network.transport": "tcp",
        "network.type": "ipv6",
        "network.protocol.name": "smtp",
    }


def test_an_internal_error_is_the_connections_failure() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo()
    client.close(CloseReason.INTERNAL_ERROR)
    connection = kept.one(CONNECTION)
    assert connection.has_failed
    assert connection.attributes["error.type"] == "internal"


@pytest.mark.parametrize("reason", [CloseReason.REFUSED, CloseReason.TIMEOUT, CloseReason.TLS_FAILURE])
def test_a_connection_that_was_refused_or_failed_early_has_a_span(reason: CloseReason) -> None:
    kept = Kept()
    Client(tracing(kept)).close(reason)
    assert kept.one(CONNECTION).attributes["smtp.close.reason"] == reason
    assert "smtp.probe" not in kept.one(CONNECTION).attributes


def test_a_probe_has_no_span_unless_asked_for() -> None:
    kept, asked = Kept(), Kept()
    for observer in (tracing(kept), tracing(asked, probes=True)):
        Client(observer).close()
    assert kept.records == []
    assert asked.one(CONNECTION).attributes["smtp.probe"] is True
    assert states(asked.one(CONNECTION)) == ["New", "Active", "Closed"]


# Transactions ----------------------------------------------------------------------------------------------------


def test_a_transaction_tells_its_mail_and_stands_below_its_connection() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo()
    client.mail(mail=Mail("News@Example.com", body=Body.EIGHT_BIT_MIME)).rcpt("bob@example.net")
    client.rcpt("carol@EXAMPLE.net").rcpt("dave@example.org").rcpt("nobody@example.org", replies.RELAY_DENIED)
    client.data().header().final(octets=20480).quit()
    connection, transaction = kept.one(CONNECTION), kept.one(TRANSACTION)
    assert transaction.attributes == {
        "smtp.connection.id": client.info.id,
        "smtp.transaction.number": 1,
        "smtp.transaction.recipient_count": 3,
        "smtp.transaction.recipients_refused": 1,
        "smtp.transaction.recipients_deferred": 0,
        "smtp.message.size": 20480,
        "smtp.mail.from.domain": "example.com",
        "smtp.rcpt.domains": ("example.net", "example.org"),
        "smtp.body": "8bitmime",
        "smtp.outcome": "relayed",
        "smtp.reply.code": 250,
        "smtp.reply.enhanced_code": "2.0.0",
        "smtp.reply.text": f"Ok trace={transaction.context.trace_id_hex}",
    }
    assert transaction.kind is SpanKind.INTERNAL
    assert transaction.parent == connection.context
    assert transaction.links == ()
    assert connection.start_ns <= transaction.start_ns <= transaction.end_ns <= connection.end_ns


def test_the_reply_of_a_mail_that_an_upstream_accepted_is_told_by_its_attempt() -> None:
    kept = Kept()
    Client(tracing(kept)).ehlo().message().quit()
    transaction, delivery = kept.one(TRANSACTION).attributes, kept.one(DELIVERY).attributes
    assert not [name for name in transaction if name.startswith("smtp.reply.")]
    assert delivery["smtp.reply.text"] == "Ok: queued as 4XyZ12"
    assert "smtp.connection.id" in transaction
    assert "smtp.connection.id" not in delivery


def test_the_reply_of_a_mail_that_an_upstream_accepted_and_we_did_not_is_on_the_transaction() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt().data().header()
    client.deliver(QUEUED, Outcome.RELAYED)
    client.final(replies.INTERNAL, Outcome.DEFERRED).quit()
    assert kept.one(TRANSACTION).attributes["smtp.reply.code"] == replies.INTERNAL.code


def test_an_attempt_names_its_peer_where_the_upstream_is_not_configured_by_that_address() -> None:
    told = []
    for host, port in (("192.0.2.9", 25), ("192.0.2.9", 26), ("192.0.2.8", 25)):
        kept = Kept()
        client = Client(tracing(kept)).ehlo().mail().rcpt().data().header()
        assert client.transaction is not None
        delivery = begin_delivery(client.transaction)
        delivery.server, delivery.peer = Endpoint("192.0.2.9", 25), Endpoint(host, port)
        delivery.end(Outcome.RELAYED, QUEUED, None, time.monotonic_ns())
        client.final().quit()
        attributes = kept.one(DELIVERY).attributes
        told.append((attributes.get("network.peer.address"), attributes.get("network.peer.port")))
    assert told == [(None, None), ("192.0.2.9", 26), ("192.0.2.8", 25)]


def test_a_message_id_is_shown_only_where_opted_in() -> None:
    kept = Kept()
    Client(tracing(kept, with_message_id=True)).ehlo().message().quit()
    assert kept.one(TRANSACTION).attributes["smtp.message.id"] == "<1@example.com>"


def test_the_spool_id_is_on_the_transaction() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt().data().header()
    assert client.transaction is not None
    client.transaction.spool_id = "01J9ZQ4T3M"
    client.final(outcome=Outcome.QUEUED).quit()
    assert kept.one(TRANSACTION).attributes["smtp.spool.id"] == "01J9ZQ4T3M"
    assert kept.one(TRANSACTION).attributes["smtp.outcome"] == "queued"


UPSTREAM_GREYLISTED = Reply(450, replies.RELAY_DENIED.enhanced, ("Greylisted",), ErrorType.UPSTREAM_REFUSED)
UPSTREAM_FULL = Reply(452, replies.STORAGE_FULL.enhanced, ("Full",), ErrorType.UPSTREAM_REFUSED)

STATUS = [
    # reply, outcome, error type told beside it, the span's error.type
    (replies.message_accepted(), Outcome.RELAYED, None, None),
    (replies.MESSAGE_TOO_BIG, Outcome.REFUSED, None, None),  # the client's doing
    (replies.RELAY_DENIED, Outcome.REFUSED, None, None),  # a policy that was kept
    (UPSTREAM_GREYLISTED, Outcome.DEFERRED, None, None),  # the upstream's policy
    (UPSTREAM_FULL, Outcome.DEFERRED, None, "upstream_refused"),  # x.3.x: its system failed
    (replies.UPSTREAM_UNAVAILABLE, Outcome.DEFERRED, None, "upstream_unavailable"),
    (replies.UPSTREAM_TLS, Outcome.DEFERRED, None, "upstream_tls"),
    (replies.OUTCOME_UNKNOWN, Outcome.UNKNOWN, None, "outcome_unknown"),
    (replies.INTERNAL, Outcome.DEFERRED, None, "internal"),
    (replies.STORAGE_FULL, Outcome.DEFERRED, None, "storage"),
    (replies.TIMED_OUT, Outcome.ABORTED, ErrorType.TIMEOUT, None),
    (replies.SHUTTING_DOWN, Outcome.DEFERRED, None, "shutdown"),
]


@pytest.mark.parametrize(("reply", "outcome", "told", "error_type"), STATUS)
def test_a_transaction_fails_only_by_our_fault(
    reply: Reply, outcome: Outcome, told: ErrorType | None, error_type: str | None
) -> None:
    kept = Kept()
    Client(tracing(kept)).ehlo().mail().rcpt().data().header().final(reply, outcome, error_type=told).quit()
    transaction = kept.one(TRANSACTION)
    assert transaction.has_failed is (error_type is not None)
    assert transaction.attributes.get("error.type") == error_type
    assert transaction.attributes["smtp.reply.code"] == reply.code


def test_a_transaction_whose_client_vanished_is_told_when_its_delivery_is_over() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt().data().header()
    transaction, client.transaction = client.transaction, None
    assert transaction is not None
    client.octets_received = 2000
    client.close()
    finish_delivery(client.observer, begin_delivery(transaction))
    transaction.end(Outcome.RELAYED, None, time.monotonic_ns())
    client.observer.transaction_ended(transaction)
    assert [record.name for record in kept.records] == [CONNECTION, DELIVERY, TRANSACTION]
    assert kept.one(DELIVERY).parent == kept.one(TRANSACTION).context
    assert kept.one(TRANSACTION).attributes["smtp.outcome"] == "relayed"
    assert "smtp.reply.code" not in kept.one(TRANSACTION).attributes


def test_a_delivery_that_outlives_its_transaction_is_told_once_when_it_is_over() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt().data().header()
    transaction = client.transaction  # which the forwarder keeps
    assert transaction is not None
    delivery = begin_delivery(transaction)
    client.octets_received = 2000
    client.close()
    assert [record.name for record in kept.records] == [TRANSACTION, CONNECTION]
    finish_delivery(client.observer, delivery, None, Outcome.UNKNOWN)
    assert [record.name for record in kept.records] == [TRANSACTION, CONNECTION, DELIVERY]
    assert kept.one(DELIVERY).parent == kept.one(TRANSACTION).context
    assert kept.one(DELIVERY).attributes["smtp.outcome"] == "unknown"


# Propagation -----------------------------------------------------------------------------------------------------


def joined(kept: Kept) -> bool:
    """Whether the transaction joined the application's trace; it is one or the other, wholly."""
    connection, transaction, delivery = kept.one(CONNECTION), kept.one(TRANSACTION), kept.one(DELIVERY)
    assert delivery.parent == transaction.context
    assert delivery.context.trace_id == transaction.context.trace_id
    assert transaction.parent is not None
    [link] = transaction.links
    if transaction.parent.is_remote:
        assert transaction.kind is SpanKind.SERVER
        assert (transaction.parent.trace_id, transaction.parent.span_id) == (APPLICATION_TRACE, APPLICATION_SPAN)
        assert transaction.context.trace_id == APPLICATION_TRACE
        assert link.context == connection.context
        assert link.attributes == {"smtp.link.type": "connection"}
        return True
    assert transaction.kind is SpanKind.INTERNAL
    assert transaction.parent == connection.context
    assert (link.context.trace_id, link.context.span_id) == (APPLICATION_TRACE, APPLICATION_SPAN)
    assert link.attributes == {"smtp.link.type": "application"}
    return False


WHO: list[tuple[str, str, bool, bool]] = [
    # client, transport, authenticated, joins under `auto`
    ("192.0.2.7", "tcp", False, False),
    ("192.0.2.7", "tcp", True, True),
    ("127.0.0.1", "tcp", False, True),
    ("127.8.8.8", "tcp", False, True),
    ("::1", "tcp", False, True),
    ("::ffff:127.0.0.1", "tcp", False, True),
    ("", "unix", False, True),
]


@pytest.mark.parametrize(("peer", "transport", "is_authenticated", "joins"), WHO)
@pytest.mark.parametrize("policy", ["auto", "parent", "link"])
def test_whose_trace_is_joined_is_the_listeners_policy(
    policy: str, peer: str, transport: str, is_authenticated: bool, joins: bool
) -> None:
    kept = Kept()
    policies = {"local": InboundPolicy(policy)} if policy != "auto" else {}
    client = Client(tracing(kept, policies=policies), peer=peer, transport=transport).ehlo()
    if is_authenticated:
        client.auth()
    client.message(APPLICATION).quit()
    assert joined(kept) is {"auto": joins, "parent": True, "link": False}[policy]


def test_a_client_that_failed_to_authenticate_is_a_stranger() -> None:
    kept = Kept()
    Client(tracing(kept)).ehlo().auth(reply=replies.AUTH_FAILED).message(APPLICATION).quit()
    assert joined(kept) is False


def test_a_client_behind_a_local_proxy_is_not_local() -> None:
    kept = Kept()
    client = Client(tracing(kept), peer="127.0.0.1")
    client.proxied(Endpoint("203.0.113.9", 5000), Endpoint("198.51.100.1", 25))
    client.ehlo().message(APPLICATION).quit()
    assert joined(kept) is False


@pytest.mark.parametrize(
    ("policy", "headers"),
    [
        (InboundPolicy.IGNORE, (APPLICATION,)),
        (InboundPolicy.PARENT, ()),
        (InboundPolicy.PARENT, (APPLICATION, APPLICATION)),  # two: one of them is forged
        (InboundPolicy.PARENT, ("garbage",)),
    ],
)
def test_what_is_not_believed_leaves_no_mark(policy: InboundPolicy, headers: tuple[str, ...]) -> None:
    kept = Kept()
    Client(tracing(kept, policies={"local": policy})).ehlo().message(*headers).quit()
    transaction = kept.one(TRANSACTION)
    assert transaction.parent == kept.one(CONNECTION).context
    assert transaction.links == ()


def test_a_linked_application_cannot_switch_tracing_off() -> None:
    kept = Kept()
    observer = tracing(kept, policies={"local": InboundPolicy.LINK})
    Client(observer).ehlo().message(APPLICATION[:-2] + "00").quit()
    assert joined(kept) is False


def test_a_parent_that_is_not_sampled_is_followed_and_still_has_an_id() -> None:
    kept = Kept()
    client = Client(tracing(kept, policies={"local": InboundPolicy.PARENT})).ehlo()
    client.mail().rcpt().data().header(APPLICATION[:-2] + "00")
    assert client.transaction is not None
    assert client.trace_id() == APPLICATION[3:35]
    carried = client.deliver()
    assert carried["traceparent"].startswith(f"00-{APPLICATION[3:35]}-")
    assert carried["traceparent"].endswith("-00")
    client.final().quit()
    assert [record.name for record in kept.records] == [CONNECTION]


def test_tracestate_goes_on_only_for_whom_the_trace_is_joined() -> None:
    for policy, expected in ((InboundPolicy.PARENT, "vendor=1,other=2"), (InboundPolicy.LINK, None)):
        kept = Kept()
        client = Client(tracing(kept, policies={"local": policy})).ehlo().mail().rcpt().data()
        client.header(APPLICATION, tracestate="vendor=1, other=2")
        assert client.deliver().get("tracestate") == expected
        client.final().quit()
        assert [link.context.trace_state for link in kept.one(TRANSACTION).links] == [""]


def test_the_message_carries_the_deliverys_own_span() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt().data().header()
    carried = client.deliver()
    client.final().quit()
    context = kept.one(DELIVERY).context
    assert carried == {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-03"}


def test_the_trace_id_that_people_are_shown_is_the_transactions() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt().data().header()
    assert client.transaction is not None
    shown = client.trace_id()
    client.final().quit()
    assert shown == kept.one(TRANSACTION).context.trace_id_hex == kept.one(CONNECTION).context.trace_id_hex


# Deliveries ------------------------------------------------------------------------------------------------------


def test_a_delivery_tells_its_phases_and_its_upstream() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().message()
    client.quit()
    delivery = kept.one(DELIVERY)
    assert [event.name.removeprefix("smtp.upstream.") for event in delivery.events] == [
        "pool",
        "mail",
        "rcpt",
        "data",
        "content",
        "reply",
    ]
    assert [event.attributes.get("smtp.reply.code") for event in delivery.events] == [None, 250, 250, 354, None, 250]
    assert delivery.events[0].attributes == {}
    assert delivery.attributes == {
        "server.address": "smtp.provider.example",
        "server.port": 587,
        "network.peer.address": "198.51.100.4",
        "network.peer.port": 587,
        "smtp.upstream.name": "provider",
        "peer.service": "provider",
        "service.peer.name": "provider",
        "smtp.message.kind": "mail",
        "smtp.delivery.attempt": 1,
        "smtp.delivery.recipients_accepted": 1,
        "smtp.delivery.recipients_refused": 0,
        "smtp.delivery.recipients_deferred": 0,
        "smtp.pool.wait": 0.25,
        "smtp.pool.reused": True,
        "tls.protocol.version": "1.3",
        "tls.cipher": "TLS_AES_256_GCM_SHA384",
        "tls.resumed": False,
        "smtp.round_trips": 2,
        "smtp.outcome": "relayed",
        "smtp.reply.code": 250,
        "smtp.reply.enhanced_code": "2.0.0",
        "smtp.reply.text": "Ok: queued as 4XyZ12",
    }
    assert delivery.kind is SpanKind.CLIENT
    assert delivery.links == ()
    assert not delivery.has_failed
    times = [delivery.start_ns, *(event.time_ns for event in delivery.events), delivery.end_ns]
    assert times == sorted(times)


ATTEMPTS = [
    (QUEUED, Outcome.RELAYED, None, None),
    (replies.RELAY_DENIED, Outcome.REFUSED, None, "policy"),
    (Reply(451, None, ("later",)), Outcome.DEFERRED, None, "451"),
    (None, Outcome.DEFERRED, ErrorType.UPSTREAM_UNAVAILABLE, "upstream_unavailable"),
    (None, Outcome.DEFERRED, ErrorType.UPSTREAM_TLS, "upstream_tls"),
    (None, Outcome.UNKNOWN, None, "outcome_unknown"),
    (None, Outcome.ABORTED, None, None),  # the client vanished: not the upstream's failure
]


@pytest.mark.parametrize(("reply", "outcome", "told", "error_type"), ATTEMPTS)
def test_an_attempt_fails_by_any_final_refusal_and_any_fault_of_transport(
    reply: Reply | None, outcome: Outcome, told: ErrorType | None, error_type: str | None
) -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt().data().header()
    client.deliver(reply, outcome, error_type=told)
    client.final(replies.INTERNAL, Outcome.DEFERRED).quit()
    delivery = kept.one(DELIVERY)
    assert delivery.has_failed is (error_type is not None)
    assert delivery.attributes.get("error.type") == error_type
    assert delivery.attributes["smtp.outcome"] == outcome.value


def test_answers_to_recipients_make_few_events_however_many_they_are() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt()
    assert client.transaction is not None
    for answers in ([250] * 1000, [250, 250, 550, 250], [250, 550] * 1000):
        delivery = begin_delivery(client.transaction)
        delivery.phases.append((1, DeliveryPhase.MAIL, replies.SENDER_OK))
        for code in answers:
            delivery.recipient_phase(2, Reply(code, None, ("as it is",)))
        delivery.phases.append((3, DeliveryPhase.REPLY, QUEUED))
        delivery.end(Outcome.RELAYED, QUEUED, None, 4)
    client.data().header().final().quit()
    alike, mixed, alternating = (
        [event.attributes["smtp.reply.code"] for event in record.events] for record in kept.named(DELIVERY)
    )
    assert alike == [250, 250, 250]
    assert mixed == [250, 250, 550, 250, 250]
    assert (len(alternating), alternating[-2:]) == (65, [550, 250])


def test_an_attempt_that_ended_before_the_header_joins_the_trace_that_the_header_names() -> None:
    kept = Kept()
    client = Client(tracing(kept, policies={"local": InboundPolicy.PARENT})).ehlo().mail()
    assert client.transaction is not None
    first = begin_delivery(client.transaction, "first")
    first.end(Outcome.DEFERRED, None, ErrorType.UPSTREAM_UNAVAILABLE, time.monotonic_ns())
    second = begin_delivery(client.transaction, "second")
    client.rcpt().data().header(APPLICATION)
    finish_delivery(client.observer, second)
    assert kept.records == []
    client.final().quit()
    deliveries = kept.named(DELIVERY)
    assert [record.attributes["smtp.upstream.name"] for record in deliveries] == ["first", "second"]
    assert {record.context.trace_id for record in deliveries} == {APPLICATION_TRACE}
    assert {record.parent for record in deliveries} == {kept.one(TRANSACTION).context}
    assert all(record.start_ns >= kept.one(TRANSACTION).start_ns for record in deliveries)


class AskedAboutEach(Sampler):
    def should_sample(self, parent_context: Any, trace_id: int, name: str, *more: Any, **others: Any) -> Any:
        return SamplingResult(Decision.RECORD_AND_SAMPLE)

    def get_description(self) -> str:
        return "AskedAboutEach"


@pytest.mark.parametrize("sampler", [ALWAYS_ON, ALWAYS_OFF, DEFAULT_ON, AskedAboutEach()], ids=Sampler.get_description)
def test_a_log_line_about_an_attempt_before_the_header_keeps_no_mail_out_of_its_trace(sampler: Sampler) -> None:
    kept = Kept()
    observer = tracing(Kept(), sampler=sampler, policies={"local": InboundPolicy.PARENT}, listeners=[kept])
    client = Client(observer).ehlo().mail()
    assert client.transaction is not None
    first = begin_delivery(client.transaction, "first")
    _, told, span_id, _ = observer.delivery_carrier(first)["traceparent"].split("-")  # what its line in the log has
    assert told == observer.connection_carrier(client.record)["traceparent"].split("-")[1]
    first.end(Outcome.DEFERRED, None, ErrorType.UPSTREAM_UNAVAILABLE, time.monotonic_ns())
    second = begin_delivery(client.transaction, "second")
    client.rcpt().data().header(APPLICATION)
    assert client.trace_id() == f"{APPLICATION_TRACE:032x}"
    finish_delivery(client.observer, second)
    client.final().quit()
    transaction, deliveries = kept.one(TRANSACTION), kept.named(DELIVERY)
    assert transaction.parent is not None
    assert transaction.parent.span_id == APPLICATION_SPAN
    assert {record.context.trace_id for record in deliveries} == {APPLICATION_TRACE}
    # A sampler that is asked about each span may decide only once the trace is known.
    known = [kept.one(CONNECTION), deliveries[0]]
    assert span_id in [record.context.span_id_hex for record in known]


def test_an_attempt_of_a_transaction_that_never_had_a_header_is_told_at_its_end() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail()
    client.deliver(replies.RELAY_DENIED, Outcome.REFUSED)
    client.rset().quit()
    assert kept.one(DELIVERY).parent == kept.one(TRANSACTION).context
    assert kept.one(TRANSACTION).attributes["smtp.outcome"] == "aborted"


def test_an_attempt_from_the_spool_stands_in_the_stored_trace_hours_and_processes_later() -> None:
    kept, later = Kept(), Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt().data().header()
    assert client.transaction is not None
    client.transaction.spool_id = "01J9ZQ4T3M"
    carrier = client.observer.carrier(client.transaction)
    client.final(outcome=Outcome.QUEUED).quit()
    stored = kept.one(TRANSACTION).context
    carried = resume(tracing(later), carrier)
    [delivery] = later.records
    assert delivery.context.trace_id == stored.trace_id
    assert delivery.parent is not None
    assert delivery.parent.span_id == stored.span_id
    [link] = delivery.links
    assert (link.context.trace_id, link.context.span_id) == (stored.trace_id, stored.span_id)
    assert link.attributes == {"smtp.link.type": "spooled_transaction"}
    assert delivery.attributes["smtp.delivery.attempt"] == 2
    assert delivery.attributes["smtp.spool.id"] == "01J9ZQ4T3M"
    assert carried["traceparent"][3:35] == delivery.context.trace_id_hex


def test_an_attempt_that_may_be_a_duplicate_says_so() -> None:
    for is_possible_duplicate in (False, True):
        kept = Kept()
        resume(tracing(kept), {}, is_possible_duplicate=is_possible_duplicate)
        assert kept.one(DELIVERY).attributes.get("smtp.delivery.possible_duplicate", False) is is_possible_duplicate


def test_an_attempt_from_the_spool_without_a_stored_trace_is_a_root() -> None:
    kept = Kept()
    resume(tracing(kept), {})
    assert kept.one(DELIVERY).parent is None
    assert kept.one(DELIVERY).links == ()


# Segments --------------------------------------------------------------------------------------------------------


def check_chain(segments: list[SpanRecord]) -> None:
    """Linked roots with one id, numbered, one after the other."""
    assert [segment.attributes["smtp.connection.segment"] for segment in segments] == list(range(1, len(segments) + 1))
    assert len({segment.attributes["smtp.connection.id"] for segment in segments}) == 1
    assert len({segment.context.trace_id for segment in segments}) == len(segments)
    assert segments[0].links == ()
    for before, segment in pairwise(segments):
        assert segment.parent is None
        [link] = segment.links
        assert link.context == before.context
        assert link.attributes == {"smtp.link.type": "previous_segment"}
        assert segment.start_ns >= before.end_ns - AFTER_LAST_EVENT_NS


def test_ten_thousand_messages_on_one_connection_lose_no_transition_and_keep_no_memory() -> None:
    sequences: list[Any] = []
    segments: list[SpanRecord] = []
    transactions = 0
    open_trace: set[int] = set()

    class Counting:
        def take(self, record: SpanRecord) -> None:
            nonlocal transactions
            if record.name == TRANSACTION:
                transactions += 1
                open_trace.add(record.context.trace_id)
            elif record.name == CONNECTION:
                sequences.extend(event.attributes["smtp.state.sequence"] for event in record.events)
                assert len(record.events) <= 504  # the segment's 500, and at most one transaction beyond
                segments.append(record._replace(events=()))

    observer = Tracing(sinks=[Counting()])
    client = Client(observer).ehlo()
    for _ in range(10_000):
        client.mail().rcpt().data().header().final()
    client.quit()
    assert transactions == 10_000
    assert sequences == list(range(1, 40_000 + 3))  # New and Closed, and four a message but Active of the first
    assert len(segments) >= 80
    check_chain(segments)
    assert open_trace <= {segment.context.trace_id for segment in segments}


def test_no_segment_ends_while_a_transaction_is_open() -> None:
    kept = Kept()
    client = Client(tracing(kept), segment_events=3).ehlo().mail()
    for _ in range(10):
        client.rcpt(reply=replies.RELAY_DENIED)
    client.rcpt().data().header().final()
    client.mail().rset().quit()
    first, second = kept.named(CONNECTION)
    assert states(first) == ["New", "Active", *["Error"] * 10, "Data", "Active", "Idle"]
    assert states(second) == ["Active", "Reset", "Active", "Closed"]
    check_chain([first, second])
    assert [record.parent for record in kept.named(TRANSACTION)] == [first.context, second.context]


def test_an_old_segment_ends_though_nothing_happens() -> None:
    kept, clock = Kept(), FakeClock()
    client = Client(tracing(kept, monotonic_ns=clock.monotonic_ns), clock=clock).ehlo().mail()
    clock.advance(301)
    client.rotate_if_due()
    assert kept.records == []  # a transaction is open
    client.rset()
    client.rotate_if_due()
    assert len(kept.named(CONNECTION)) == 1
    client.rotate_if_due()
    assert len(kept.named(CONNECTION)) == 1
    clock.advance(301)
    client.rotate_if_due()
    clock.advance(1)
    client.quit()
    segments = kept.named(CONNECTION)
    check_chain(segments)
    assert [states(segment) for segment in segments] == [["New", "Active", "Reset", "Active"], [], ["Closed"]]
    assert segments[-1].attributes["smtp.connection.duration"] == pytest.approx(603, abs=0.1)
    [closed] = segments[-1].events
    assert closed.attributes["smtp.state.previous_duration"] == pytest.approx(302, abs=0.1)


def test_a_segment_that_ends_within_a_transaction_loses_nothing() -> None:
    kept = Kept()
    client = Client(tracing(kept)).ehlo().mail().rcpt()
    client.rotate()
    client.data().header().final().quit()
    first, second = kept.named(CONNECTION)
    assert (states(first), states(second)) == (["New", "Active"], ["Data", "Active", "Idle", "Closed"])
    check_chain([first, second])
    assert kept.one(TRANSACTION).parent == second.context


def test_a_probe_whose_earlier_segment_was_exported_is_exported_to_its_end() -> None:
    kept = Kept()
    client = Client(tracing(kept))
    client.rotate()
    client.close()
    segments = kept.named(CONNECTION)
    check_chain(segments)
    assert segments[-1].attributes["smtp.probe"] is True
    assert segments[-1].attributes["smtp.close.reason"] == "client_disconnect"


def test_a_clock_that_is_set_back_does_not_disturb_the_order() -> None:
    kept, clock = Kept(), FakeClock()
    client = Client(tracing(kept), clock=clock).ehlo()
    clock.wall_minus_monotonic_ns -= 3600 * 10**9
    client.message().quit()
    connection = kept.one(CONNECTION)
    times = [connection.start_ns, *(event.time_ns for event in connection.events), connection.end_ns]
    assert times == sorted(times)
    assert connection.start_ns <= kept.one(TRANSACTION).start_ns <= kept.one(DELIVERY).start_ns


# Sampling --------------------------------------------------------------------------------------------------------


def test_what_is_not_sampled_is_not_recorded_and_still_has_ids() -> None:
    kept = Kept()
    client = Client(tracing(kept, sampler=ALWAYS_OFF)).ehlo().mail().rcpt().data().header()
    assert client.transaction is not None
    assert client.trace_id() is not None
    assert client.deliver()["traceparent"].endswith("-02")
    client.final().quit()
    assert kept.records == []


def test_mails_that_are_not_sampled_share_their_segments_context() -> None:
    observer = tracing(Kept(), sampler=ALWAYS_OFF)
    client = Client(observer).ehlo()
    seen, stored_spans = set(), set()
    for _ in range(2):
        client.mail().rcpt().data().header()
        told = client.trace_id()
        shown = client.deliver()["traceparent"]
        transaction = client.transaction
        assert transaction is not None
        [delivery] = transaction.deliveries
        assert observer.delivery_carrier(delivery)["traceparent"] == shown
        assert observer.connection_carrier(client.record)["traceparent"] == shown
        stored = observer.carrier(transaction)["traceparent"].split("-")
        assert stored[1] == told
        client.final()
        seen.add(shown)
        stored_spans.add(stored[2])
    assert len(seen) == 1
    assert len(stored_spans) == 2


def test_a_listener_that_comes_while_a_mail_is_not_sampled_is_told_of_it_in_the_trace_that_was_shown() -> None:
    observer = tracing(Kept(), sampler=ALWAYS_OFF)
    client = Client(observer).ehlo().mail().rcpt().data().header()
    told = client.trace_id()
    assert client.deliver()["traceparent"].split("-")[1] == told
    lines = mock.Mock()
    observer.follow(lines)
    client.final()
    of_attempt, of_transaction = [call.args[1] for call in lines.take_described.call_args_list]
    assert of_attempt.trace_id_hex == of_transaction.trace_id_hex == told


def test_a_span_that_is_recorded_but_not_sampled_is_kept_and_not_exported() -> None:
    class RecordOnly(Sampler):
        def should_sample(self, parent_context: Any, trace_id: int, name: str, *more: Any, **others: Any) -> Any:
            return SamplingResult(Decision.RECORD_ONLY)

        def get_description(self) -> str:
            return "RecordOnly"

    exported: list[EncodedSpan] = []
    kept: list[tuple[str, bool]] = []

    def keep(spans: Sequence[EncodedSpan], is_trouble: bool) -> None:
        kept.extend((one.name, is_trouble) for span in spans for one in span.to_records())

    observer = Tracing(
        exports=[each_to(exported)],
        memories=[keep],
        sampler=RecordOnly(),
    )
    Client(observer).ehlo().message().quit()
    assert exported == []
    assert kept == [(DELIVERY, False), (TRANSACTION, False), (CONNECTION, False)]


def test_those_who_remember_are_told_what_went_wrong() -> None:
    kept: list[tuple[str, bool]] = []

    def keep(spans: Sequence[EncodedSpan], is_trouble: bool) -> None:
        kept.extend((one.name, is_trouble) for span in spans for one in span.to_records())

    observer = Tracing(memories=[keep])
    client = Client(observer).ehlo().mail().rcpt(reply=replies.RELAY_DENIED).rcpt().data().header()
    client.deliver(None, Outcome.DEFERRED, error_type=ErrorType.UPSTREAM_UNAVAILABLE)
    client.deliver()
    client.final(replies.MESSAGE_TOO_BIG, Outcome.REFUSED).quit()
    assert kept == [(DELIVERY, True), (DELIVERY, False), (TRANSACTION, True), (CONNECTION, True)]


def test_what_a_sampler_adds_is_on_the_span_and_never_twice() -> None:
    class Adding(Sampler):
        def should_sample(self, parent_context: Any, trace_id: int, name: str, *more: Any, **others: Any) -> Any:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, {"rate": 0.5, "smtp.outcome": "mine"})

        def get_description(self) -> str:
            return "Adding"

    kept = Kept()
    exported: list[EncodedSpan] = []
    Client(Tracing(exports=[each_to(exported)], sinks=[kept], sampler=Adding())).ehlo().message().quit()
    for span, record in zip(exported, kept.records, strict=True):
        assert span.to_records()[0].attributes == record.attributes
        assert record.attributes["rate"] == 0.5
    assert kept.one(TRANSACTION).attributes["smtp.outcome"] == "relayed"
    assert kept.one(CONNECTION).attributes["smtp.outcome"] == "mine"


def test_listeners_get_every_span_those_not_sampled_without_events() -> None:
    kept, all_of_them = Kept(), Kept()
    Client(tracing(kept, listeners=[all_of_them], sampler=ALWAYS_OFF)).ehlo().message().quit()
    assert kept.records == []
    assert [record.name for record in all_of_them.records] == [DELIVERY, TRANSACTION, CONNECTION]
    assert all(not record.is_recording and not record.events for record in all_of_them.records)
    assert all_of_them.one(CONNECTION).attributes["smtp.close.reason"] == "quit"


@pytest.mark.parametrize("sampler", [TraceIdRatioBased(0.5), ParentBased(TraceIdRatioBased(0.5))])
def test_a_connection_is_sampled_with_all_that_it_holds_or_not_at_all(sampler: Sampler) -> None:
    kept = Kept()
    observer = tracing(kept, sampler=sampler)
    for _ in range(200):
        Client(observer).ehlo().message().quit()
    connections = len(kept.named(CONNECTION))
    assert 50 < connections < 150  # 100 expected; 7 standard deviations either side
    assert len(kept.named(TRANSACTION)) == len(kept.named(DELIVERY)) == connections
    traces = {record.context.trace_id for record in kept.named(CONNECTION)}
    assert {record.context.trace_id for record in kept.records} == traces


def test_a_sampler_that_looks_at_names_is_asked_for_every_span() -> None:
    class NoDeliveries(Sampler):
        def should_sample(self, parent_context: Any, trace_id: int, name: str, *more: Any, **others: Any) -> Any:
            sampler = ALWAYS_OFF if name == DELIVERY else ALWAYS_ON
            return sampler.should_sample(parent_context, trace_id, name)

        def get_description(self) -> str:
            return "NoDeliveries"

    kept = Kept()
    Client(tracing(kept, sampler=NoDeliveries())).ehlo().message().quit()
    assert [record.name for record in kept.records] == [TRANSACTION, CONNECTION]


@pytest.mark.parametrize("flags", ["00", "01", "02", "03"])
@pytest.mark.parametrize(
    "sampler",
    [DEFAULT_ON, ParentBased(ALWAYS_ON, remote_parent_not_sampled=ALWAYS_ON), ALWAYS_ON, ParentBased(ALWAYS_OFF)],
)
def test_below_a_span_of_others_a_sampler_need_not_be_asked_that_does_as_the_parent(
    sampler: Sampler, flags: str
) -> None:
    class Unknown(Sampler):
        def should_sample(self, *arguments: Any, **others: Any) -> Any:
            return sampler.should_sample(*arguments, **others)

        def get_description(self) -> str:
            return "Unknown"

    policies = {"local": InboundPolicy.PARENT}

    def decided(sampler: Sampler) -> tuple[bool, int, str]:
        client = Client(Tracing(sampler=sampler, policies=policies)).ehlo().mail().rcpt().data()
        client.header(APPLICATION[:-2] + flags, tracestate="vendor=1")
        assert client.trace_id() == APPLICATION[3:35]
        assert client.transaction is not None
        identity = client.transaction.trace
        return identity.is_recording, identity.context.flags, identity.context.trace_state

    assert decided(sampler) == decided(Unknown())


# Segments that take several turns of the event loop ------------------------------------------------------------------


def busy_client(observer: Tracing) -> Client:
    """One with a mail that failed, and a segment of more events than are encoded in one turn."""
    client = Client(observer).ehlo().mail().rcpt().data().header()
    client.deliver(None, Outcome.DEFERRED, error_type=ErrorType.UPSTREAM_UNAVAILABLE)
    client.final(replies.UPSTREAM_UNAVAILABLE, Outcome.DEFERRED)
    for _ in range(40):
        client.message()
    return client


@pytest.mark.asyncio
async def test_a_long_segment_is_encoded_in_several_turns_as_it_was_when_it_ended() -> None:
    exported: list[EncodedSpan] = []
    kept = Kept()
    observer = Tracing(exports=[each_to(exported)], listeners=[kept])
    client = busy_client(observer)
    before = len(exported)
    client.rotate()
    client.record.failure = "what the next segment will tell"
    assert len(exported) == before, "only some of its events are encoded"
    turns = 0
    while len(exported) == before:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 2
    span, told = exported[before].to_records()[0], kept.one(CONNECTION)
    assert len(span.events) > 160
    assert [(event.name, event.time_ns, event.attributes) for event in span.events] == [
        (event.name, event.time_ns, event.attributes) for event in told.events
    ]
    assert span.attributes == told.attributes
    assert span.context.span_id == told.context.span_id
    assert (span.start_ns, span.end_ns, span.has_failed) == (told.start_ns, told.end_ns, True)


@pytest.mark.asyncio
async def test_a_long_segment_is_there_when_all_is_to_be_finished() -> None:
    exported: list[EncodedSpan] = []
    observer = Tracing(exports=[each_to(exported)])
    client = busy_client(observer)
    before = len(exported)
    client.quit()
    assert len(exported) == before
    observer.finish()
    [span] = [one.to_records()[0] for one in exported[before:]]
    assert (span.name, len(span.events)) == (CONNECTION, len(client.record.transitions))


# State events in the log -----------------------------------------------------------------------------------------


class KeptStates:
    def __init__(self) -> None:
        self.taken: list[tuple[str, Mapping[str, object], int]] = []

    def take(self, name: str, time_ns: int, attributes: Mapping[str, object], context: Any) -> None:
        self.taken.append((name, attributes, context.span_id))


@pytest.mark.parametrize(("where", "on_span", "in_log"), [("span", 6, 0), ("log", 0, 6), ("both", 6, 6)])
def test_state_events_go_where_they_are_wanted(where: str, on_span: int, in_log: int) -> None:
    kept, log = Kept(), KeptStates()
    events = StateEvents(where)
    observer = tracing(kept, state_events=events)
    client = Client(fan_out([observer, *([StateTelling(observer, log)] if events.in_log else [])]))
    client.ehlo().message().quit()
    connection = kept.one(CONNECTION)
    assert (len(connection.events), len(log.taken)) == (on_span, in_log)
    for (name, attributes, span_id), event in zip(log.taken, connection.events, strict=False):
        assert (name, attributes) == (event.name, {"smtp.connection.id": client.info.id, **event.attributes})
        assert span_id == connection.context.span_id


# The SDK's side --------------------------------------------------------------------------------------------------


def test_the_sdks_processors_see_the_same_spans() -> None:
    exporter, kept = InMemorySpanExporter(), Kept()
    sdk = SdkSpans(SimpleSpanProcessor(exporter), Resource({"service.name": "gw"}), "1.0")
    observer = Tracing(sinks=[sdk, kept], policies={"local": InboundPolicy.PARENT})
    client = Client(observer).ehlo().mail().rcpt().data().header(APPLICATION, tracestate="vendor=1")
    client.deliver(None, Outcome.DEFERRED, error_type=ErrorType.UPSTREAM_UNAVAILABLE)
    client.final(replies.UPSTREAM_UNAVAILABLE, Outcome.DEFERRED).quit()
    spans = exporter.get_finished_spans()
    assert len(spans) == 3
    for span, record in zip(spans, kept.records, strict=True):
        assert span.context is not None
        assert (span.name, span.kind) == (record.name, record.kind)
        assert (span.start_time, span.end_time) == (record.start_ns, record.end_ns)
        assert (span.context.trace_id, span.context.span_id) == record.context[:2]
        assert (span.parent and span.parent.span_id) == (record.parent and record.parent.span_id)
        assert dict(span.attributes or {}) == record.attributes
        assert [(event.name, event.timestamp) for event in span.events] == [
            (event.name, event.time_ns) for event in record.events
        ]
        assert (span.status.status_code is StatusCode.ERROR) is record.has_failed
        assert [link.context.span_id for link in span.links] == [link.context.span_id for link in record.links]
        assert span.instrumentation_scope is not None
        assert span.instrumentation_scope.name == "otel_smtp"
    assert spans[1].context is not None
    assert spans[1].context.trace_state.to_header() == "vendor=1"


def test_an_odd_record_costs_no_other_its_spans(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    observer = tracing(kept)
    taken: list[TransactionRecord] = []

    class Taking(Observer):
        def transactions_settled(self, transactions: Sequence[TransactionRecord]) -> None:
            taken.extend(transactions)

    client = Client(Taking()).ehlo()
    client.message().message()
    observer.transactions_settled([taken[0], None, taken[1]])  # type: ignore[list-item]
    assert len(kept.named("smtp.transaction")) == 2
    spooled = TransactionRecord.resumed("01J9ZQ4T3M", {}, Mail("news@example.com"), attempt=1)
    delivery = begin_delivery(spooled)
    finish_delivery(Observer(), delivery)
    observer.deliveries_settled([None, delivery])  # type: ignore[list-item]
    assert len(kept.named("smtp.delivery")) == 3
    assert [record.__dict__["about"] for record in caplog.records] == ["transaction", "delivery"]
