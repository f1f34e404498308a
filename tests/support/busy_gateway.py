"""A status port with everything on it that the page can show."""

import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from otel_smtp.gateway.ports import bind
from otel_smtp.observing import ConnectionInfo, ConnectionRecord, Endpoint, Outcome, TlsInfo
from otel_smtp.smtp import replies
from otel_smtp.smtp.states import ConnState, ErrorReply, StateMachine
from otel_smtp.status.acting import QueueActions
from otel_smtp.status.live import LiveView
from otel_smtp.status.server import StatusServer
from otel_smtp.status.siblings import Siblings
from otel_smtp.status.traces import RecentTraces
from otel_smtp.status.views import DepartureView, GatewayView, QueuedMessage, QueueView, UpstreamView
from otel_smtp.telemetry.shapes import EncodedSpan
from tests.support.spans import (
    MILLISECOND,
    Event,
    Identity,
    Kind,
    Link,
    Span,
    Value,
    encoded,
    mail_trace,
    state_events,
)

QUEUE_TOKEN = "only-operators-know-it"
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>&amp;'


def refused_trace(trace_id: int, start_ns: int, client: str) -> list[EncodedSpan]:
    """A connection whose recipients were refused, on which a mail was sent at last."""
    connection = Identity(trace_id, 1)
    states = "New StartTLS Active Auth Active Error Error Reset Active Data Active Idle Closed"
    events = state_events(states, start_ns, step_ns=7 * MILLISECOND)
    events[2].attributes["tls.protocol.version"] = "1.3"  # type: ignore[index]  # a dict behind its Mapping
    events[3].attributes["smtp.auth.mechanism"] = "SCRAM-SHA-256"  # type: ignore[index]  # as above
    events[5].attributes["smtp.reply.text"] = "No such user here"  # type: ignore[index]  # as above
    events[12].attributes["smtp.close.reason"] = "quit"  # type: ignore[index]  # as above
    spans = []
    for number, (outcome, begin, end) in enumerate([("aborted", 30, 50), ("relayed", 58, 72)], start=1):
        transaction = Identity(trace_id, 10 * number)
        attributes: dict[str, Value] = {
            "smtp.outcome": outcome,
            "smtp.rcpt.domains": ("example.org",),
            "smtp.transaction.number": number,
        }
        refused: dict[str, Value] = {
            "smtp.rcpt.domain": "example.org", "smtp.recipient.fate": "refused", "smtp.reply.code": 550,
            "smtp.reply.text": "No such user here", "smtp.upstream.name": "provider",
        }  # fmt: skip
        spans.append(
            Span(
                "smtp.transaction", Kind.INTERNAL, transaction, connection,
                start_ns + begin * MILLISECOND, start_ns + end * MILLISECOND, attributes,
                [Event(start_ns + 35 * MILLISECOND, "smtp.recipient", refused)] if number == 1 else [],
                [Link(Identity(0xAB, 5), {"smtp.link.type": "application"})], False,
            )
        )  # fmt: skip
    begin = start_ns + 59 * MILLISECOND
    names = ["pool", "connect", "greeting", "ehlo", "starttls", "ehlo", "mail", "rcpt", "data", "content", "reply"]
    spans.append(
        Span(
            "smtp.delivery", Kind.CLIENT, Identity(trace_id, 30), Identity(trace_id, 20),
            begin, begin + 12 * MILLISECOND,
            {"smtp.upstream.name": "provider", "smtp.outcome": "relayed", "smtp.reply.code": 250,
             "smtp.reply.text": "Ok: queued as 4XyZ12", "smtp.round_trips": 6, "smtp.pool.reused": False},
            [Event(begin + n * MILLISECOND, f"smtp.upstream.{name}", {} if n < 2 else {"smtp.reply.code": 250})
             for n, name in enumerate(names)],
            [], False,
        )
    )  # fmt: skip
    spans.append(
        Span(
            "smtp.connection", Kind.SERVER, connection, None, start_ns, start_ns + 86 * MILLISECOND,
            {"smtp.listener": "submission", "client.address": client, "smtp.close.reason": "quit",
             "smtp.tls.mode": "starttls", "smtp.connection.errors": 2, "tls.protocol.version": "1.3"},
            events, [], False,
        )
    )  # fmt: skip
    return list(map(encoded, spans))


def fill_traces(traces: RecentTraces) -> None:
    """Some good mails, one refused, one failed, one hostile."""
    now = time.time_ns()
    kinds = [
        {"domain": "example.net"},
        {"domain": "gmail.example", "upstream": "provider"},
        {"states": "New Active Error Closed", "outcome": "refused", "code": 550, "domain": "example.org"},
        {"domain": "example.com"},
        {"states": "New Active Data Error Idle Closed", "outcome": "deferred", "code": 451, "has_failed": True},
        {"domain": HOSTILE, "outcome": "queued"},
    ]
    for number in range(24):
        start = now - (60 - 2 * number) * 1_000_000_000
        identity = 0x4BF92F3577B34DA6A3CE929D0E0E4736 + number * 0x1F3D5B790000000000000000
        for span in mail_trace(identity, start_ns=start, **kinds[number % len(kinds)]):  # type: ignore[arg-type]  # as above
            traces.add([span])
    for span in refused_trace(0xC0FFEE0000000000000000000000BEEF, now - 3_000_000_000, "203.0.113.9"):
        traces.add([span])


class BusyGateway:
    """What the page shows."""

    def __init__(self) -> None:
        self.live = LiveView(shown_host=str, shown_name=str)
        self.traces = RecentTraces()
        self.not_ready: str | None = None
        self.machines: list[StateMachine] = []
        self.done: list[tuple[str, list[str]]] = []
        self.queued_state = "due"
        self.is_shared = False
        fill_traces(self.traces)
        self._open("192.0.2.17", "worker-3.shop.example", "New Active Data Active Idle Active Data")
        self._open("2001:db8::25", "reports", "New StartTLS Active Auth Error Auth Active Idle", tls=True)
        self._open("127.0.0.1", HOSTILE, "New Active Error Error Reset Active")
        for outcome, count in {Outcome.RELAYED: 18342, Outcome.REFUSED: 17, Outcome.DEFERRED: 4}.items():
            self.live.outcomes[outcome] = count

    def _open(self, host: str, name: str, states: str, *, tls: bool = False) -> None:
        number = len(self.machines) + 1
        info = ConnectionInfo(
            os.urandom(16).hex(), Endpoint(host, 40000 + number), Endpoint("127.0.0.1", 2525), "local"
        )
        now_ns = time.monotonic_ns()
        record = ConnectionRecord(info, now_ns, time.time_ns() - now_ns)
        self.live.connection_opened(record)
        machine = StateMachine(record.transitions, lambda step: None)
        machine.now_ns = now_ns
        for state in map(ConnState, states.split()):
            if state is ConnState.ERROR:
                record.errors += 1
                machine.enter(state, ErrorReply("RCPT", replies.RELAY_DENIED, replies.RELAY_DENIED.error_type, None))
            else:
                machine.enter(state)
        record.messages = states.split().count("Idle")
        record.hello_verb, record.hello_name = "EHLO", name
        if tls:
            record.tls = TlsInfo("1.3", "TLS_AES_256_GCM_SHA384")
            record.user, record.auth_mechanism = "reports", "SCRAM-SHA-256"
        self.machines.append(machine)

    async def queue(self) -> QueueView:
        """A queue with a message that waits and one that is held; with `is_shared`, of several gateways."""
        messages = [
            QueuedMessage("01J9ZQ4T3M", self.queued_state, 4210, 6, 1, ("gmail.example",), 310.0,
                          "451 4.7.1 Greylisted, come back in five minutes", "c0ffee0000000000000000000000beef"),
            QueuedMessage("01J9ZR0HHE", "held", 95, 1, 3, (HOSTILE,), None, f"550 5.7.1 {HOSTILE}", None),
        ]  # fmt: skip
        if not self.is_shared:
            return QueueView({"due": 2, "held": 1}, 4210.0, messages)
        messages.append(
            QueuedMessage("01J9ZS1KKF", "leased", 3.2, 1, 1, ("corp.example",), None, None, None, ("gw-1",), 1.4)
        )
        return QueueView(
            {"due": 2, "active": 1, "held": 1},
            4210.0,
            messages,
            [
                GatewayView("a", "gw-0", "0.1.0", 86400.0, 8.1, 0, is_this=True),
                GatewayView("b", "gw-1", "0.1.0", 120.0, 9.6, 1, is_this=False),
                GatewayView("c", HOSTILE, "0.1.0", 3000.0, -1.3, 2, is_this=False),
            ],
            [
                DepartureView("d", "gw-2", 41.0, 10.4, 3, "gw-0"),
                DepartureView("e", HOSTILE, 700.0, None, 0, ""),
            ],
        )

    async def act(self, command: str, ids: Sequence[str], client: str) -> list[dict[str, Any]]:
        """Do what is asked to the first message; there is no other."""
        self.done.append((command, list(ids)))
        self.queued_state = {"hold": "held"}.get(command, "due")
        known = {"01J9ZQ4T3M": {"changed": True}}
        return [{"queue_id": one, **known.get(one, {"error": "no such message"})} for one in ids]

    def upstreams(self) -> list[UpstreamView]:
        """One in use, one that is not tried."""
        return [
            UpstreamView("provider", "smtp.example.com:587", "starttls", idle=3, busy=6, limit=20,
                         last_success_seconds=0.4),
            UpstreamView("fallback", "192.0.2.80:465", "implicit", idle=0, busy=0, limit=10, waiting=2, breaker="open",
                         retry_seconds=22.0, last_success_seconds=5400.0, last_failure_seconds=8.0,
                         last_failure="upstream_unavailable"),
        ]  # fmt: skip


@contextlib.asynccontextmanager
async def busy_gateway(*, siblings: Siblings | None = None, token: str = "") -> AsyncIterator[tuple[BusyGateway, str]]:
    """A busy gateway and the address of its page; `siblings` and `token` as `StatusServer` takes them."""
    gateway = BusyGateway()
    server = StatusServer(
        live=gateway.live,
        traces=gateway.traces,
        checks={"mail": lambda: gateway.not_ready},
        metrics=lambda accept: (b"", "text/plain"),
        upstreams=gateway.upstreams,
        queue=gateway.queue,
        actions=QueueActions(gateway.act, QUEUE_TOKEN),
        trace_url="http://127.0.0.1:16686/trace/{trace_id}",
        about={"hostname": "gw.example.com", "version": "0.1.0", "traces to": "http://collector:4318"},
        siblings=siblings,
        token=token,
    )
    address = server.start(bind(Endpoint("127.0.0.1", 0)))
    try:
        yield gateway, f"http://{address}/"
    finally:
        await server.stop()
