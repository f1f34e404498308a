"""The observer that makes spans: connection > transaction > delivery.

Theory of operation
-------------------
A handle notes what happens, with the monotonic clock; nothing of OpenTelemetry runs on the way. When the span is over,
the handle makes one `SpanRecord` and gives it to the sinks. Time stamps are the wall clock at the connection's accept
plus the monotonic clock since, so that their order is the order of what happened.

Three things come late, and are why spans are made late:

* whether a transaction joins the application's trace is known when its header block has been read; its identity is
  settled by the first that needs it (`_Transaction.settle`), at the latest by its end. A delivery that began before
  that takes the trace from it when it ends, or waits for it;
* whether a connection was only a probe is known when it is closed;
* PROXY header, TLS, HELO and user change what is known of a connection as it goes.

A connection is a chain of segments, each a root span of its own, linked to the one before. A segment ends when it has
`segment_events` events or is `segment_age_seconds` old, and no transaction is open: so a span stays bounded, and a long
connection is seen while it lives. No event is ever dropped: what happens within one transaction is bounded by the
limits of the server (errors, recipients), and `Tracing.rotate` catches the segments of connections that are idle.

A span that is not sampled costs its identity and a few comparisons: no event is noted, and no record is made unless a
listener (the access log) wants all of them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from opentelemetry.sdk.trace.id_generator import IdGenerator, RandomIdGenerator
from opentelemetry.sdk.trace.sampling import DEFAULT_ON, Sampler
from opentelemetry.trace import SpanKind

from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionObserver,
    DeliveryObserver,
    DeliveryPhase,
    Endpoint,
    Observer,
    Outcome,
    TlsInfo,
    TraceHeaders,
    TransactionObserver,
)
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.smtp.states import CloseReason, ConnState, Transition
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry import propagation
from otel_smtp.telemetry.attributes import AttributeValue, LinkType
from otel_smtp.telemetry.propagation import InboundPolicy, TraceContext
from otel_smtp.telemetry.records import EventRecord, LinkRecord, SpanRecord, SpanSink, StateLog
from otel_smtp.telemetry.redaction import Redaction, clean
from otel_smtp.telemetry.sampling import Sampled, Sampling
from otel_smtp.telemetry.state_events import StateEvents, add_reply_codes, phase_event, state_event

# Below the 128 events that the SDK keeps of a span; an attempt has about ten beside those of its recipients.
_MAX_PHASES: Final = 64
DEFAULT_SEGMENT_EVENTS: Final = 500
DEFAULT_SEGMENT_AGE_SECONDS: Final = 300.0

# Failures of the gateway or of what it depends on. All else is the client's doing, or a policy that was kept: an Error
# event, not an ERROR status.
_OUR_FAILURES: Final = frozenset(
    {
        ErrorType.UPSTREAM_UNAVAILABLE,
        ErrorType.UPSTREAM_TLS,
        ErrorType.UPSTREAM_PROTOCOL,
        ErrorType.OUTCOME_UNKNOWN,
        ErrorType.STORAGE,
        ErrorType.SHUTDOWN,
        ErrorType.INTERNAL,
    }
)
# Subjects of enhanced codes by which an upstream says that mail system (3) or network (4) failed (RFC 3463 3.4, 3.5).
_FAILURE_SUBJECTS: Final = frozenset({3, 4})


class Tracing(Observer):
    """Makes spans of what happens.

    Args:
        sinks: take every span that is recorded.
        listeners: take every span, recorded or not; those that are not come without events.
        policies: what to make of a message's trace context, by listener's name; AUTO for those that it does not name.
        state_events: where state events go; in the log, to `state_log`.
        probes: give spans of connections that sent nothing to sinks and listeners.
        with_message_id: put `Message-ID` on transactions.
        monotonic_ns, time_ns: the clocks.
    """

    def __init__(
        self,
        *,
        sinks: Sequence[SpanSink] = (),
        listeners: Sequence[SpanSink] = (),
        sampler: Sampler = DEFAULT_ON,
        id_generator: IdGenerator | None = None,
        redaction: Redaction | None = None,
        policies: Mapping[str, InboundPolicy] | None = None,
        state_events: StateEvents = StateEvents.SPAN,
        state_log: StateLog | None = None,
        segment_events: int = DEFAULT_SEGMENT_EVENTS,
        segment_age_seconds: float = DEFAULT_SEGMENT_AGE_SECONDS,
        probes: bool = False,
        with_message_id: bool = False,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        time_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        if state_events.in_log and state_log is None:
            raise ValueError(f"state_events = {state_events} needs a log to go to")
        self.sinks = tuple(sinks)
        self.listeners = tuple(listeners)
        self.sampling = Sampling(sampler, id_generator or RandomIdGenerator())
        self.redaction = redaction or Redaction()
        self.policies = dict(policies or {})
        self.events_on_span = state_events.on_span
        self.state_log = state_log if state_events.in_log else None
        self.segment_events = segment_events
        self.segment_age_ns = int(segment_age_seconds * 1e9)
        self.probes = probes
        self.with_message_id = with_message_id
        self.monotonic_ns = monotonic_ns
        self.time_ns = time_ns
        self.live: dict[TracedConnection, None] = {}

    def connection_opened(self, connection: ConnectionInfo) -> "TracedConnection":
        """A socket was accepted."""
        traced = TracedConnection(self, connection)
        self.live[traced] = None
        return traced

    def delivery_resumed(
        self, spool_id: str, carrier: Mapping[str, str], mail: Mail, *, is_possible_duplicate: bool = False
    ) -> "ResumedTransaction":
        """A spooled message is attempted again."""
        return ResumedTransaction(self, spool_id, carrier, is_possible_duplicate=is_possible_duplicate)

    def rotate(self) -> None:
        """Begin a new segment of each connection whose segment is too old; to be called every few seconds."""
        now = self.monotonic_ns()
        for connection in list(self.live):
            connection.rotate_if_due(now)

    def wants(self, is_recording: bool) -> bool:
        """Whether anybody would take a span's record."""
        return bool(self.listeners) or (is_recording and bool(self.sinks))

    def finished(self, record: SpanRecord) -> None:
        """Give a record away."""
        if record.is_recording:
            for sink in self.sinks:
                sink.take(record)
        for listener in self.listeners:
            listener.take(record)


class TracedConnection(ConnectionObserver):
    """One client connection: the chain of its segments."""

    __slots__ = (
        "_auth_mechanism",
        "_begun_ns",
        "_client",
        "_closed",
        "_errors",
        "_events",
        "_helo",
        "_info",
        "_is_authenticated",
        "_last_ns",
        "_links",
        "_messages",
        "_more",
        "_open_transactions",
        "_opened_ns",
        "_segment",
        "_server",
        "_tls",
        "_tracing",
        "_user",
        "_wall_offset_ns",
        "context",
        "is_recording",
    )

    def __init__(self, tracing: Tracing, info: ConnectionInfo) -> None:
        self._tracing = tracing
        self._info = info
        self._client = info.peer
        self._server = info.local
        self._helo: str | None = None
        self._tls: TlsInfo | None = None
        self._user: str | None = None
        self._auth_mechanism: str | None = None
        self._is_authenticated = False
        self._messages = 0
        self._errors = 0
        self._open_transactions = 0
        self._segment = 0
        self._closed: tuple[int, Transition, float] | None = None
        self._opened_ns = self._last_ns = tracing.monotonic_ns()
        self._wall_offset_ns = tracing.time_ns() - self._opened_ns
        self._begin_segment(self._opened_ns, None)

    @property
    def id(self) -> str:
        """The connection's id."""
        return self._info.id

    # What happens ------------------------------------------------------------------------------------------------

    def conn_state(self, transition: Transition) -> None:
        """Note the transition; the one way by which state events come to be, on the span, in the log, or both."""
        tracing = self._tracing
        now = tracing.monotonic_ns()
        state = transition.state
        if state is ConnState.ERROR:
            self._errors += 1
        if transition.messages is not None:
            self._messages = transition.messages
        if not self.is_recording and tracing.state_log is None:
            # The age of a segment that is not recorded matters to `rotate` alone.
            return
        since = (now - self._last_ns) / 1e9
        self._last_ns = now
        if state is ConnState.CLOSED:
            # What else belongs to it, the octets, is told by `closed`.
            self._closed = (now, transition, since)
            return
        if len(self._events) >= tracing.segment_events or now - self._begun_ns >= tracing.segment_age_ns:
            self._rotate(now)
        if state is ConnState.NEW:
            self._note(now, transition, None, self._addresses())
        else:
            self._note(now, transition, since, ())

    def proxied(self, client: Endpoint, server: Endpoint) -> None:
        """The real client is known."""
        self._client = client
        self._server = server

    def hello(self, verb: str, name: str) -> None:
        """The client has said what it is called."""
        self._helo = name

    def tls_established(self, tls: TlsInfo) -> None:
        """A handshake was completed."""
        self._tls = tls

    def authenticated(self, user: str, mechanism: str) -> None:
        """AUTH succeeded."""
        self._is_authenticated = True
        self._user = user
        self._auth_mechanism = mechanism

    def auth_failed(self, mechanism: str) -> None:
        """AUTH failed."""
        self._auth_mechanism = mechanism

    def transaction_begun(self, mail: Mail, number: int) -> "TracedTransaction":
        """MAIL was accepted."""
        self._open_transactions += 1
        return TracedTransaction(self._tracing, self, mail, number)

    def closed(self, reason: CloseReason, *, octets_received: int, octets_sent: int) -> None:
        """The transport is gone: the last segment ends."""
        tracing = self._tracing
        if self not in tracing.live:
            return
        del tracing.live[self]
        now, transition, since = self._closed or (tracing.monotonic_ns(), None, None)
        totals = (
            (names.OCTETS_RECEIVED, octets_received),
            (names.OCTETS_SENT, octets_sent),
            (names.CONNECTION_DURATION, (now - self._opened_ns) / 1e9),
        )
        if transition is not None:
            self._note(now, transition, since, totals)
        # A health check connects and leaves. Once a segment was exported, its end is exported too.
        is_probe = octets_received == 0 and reason is CloseReason.CLIENT_DISCONNECT
        if is_probe and self._segment == 1 and not tracing.probes:
            return
        final: dict[str, AttributeValue] = {names.CLOSE_REASON: reason.value, **dict(totals)}
        if is_probe:
            final[names.PROBE] = True
        if reason is CloseReason.INTERNAL_ERROR:
            final[names.ERROR_TYPE] = ErrorType.INTERNAL.value
        self._end_segment(now, final)

    # Segments ----------------------------------------------------------------------------------------------------

    def rotate_if_due(self, now_ns: int) -> None:
        """Begin a new segment if this one is too old and no transaction is open."""
        if now_ns - self._begun_ns >= self._tracing.segment_age_ns and self._closed is None:
            self._rotate(now_ns)

    def _rotate(self, now_ns: int) -> None:
        if self._open_transactions:
            return
        self._end_segment(now_ns, {})
        self._begin_segment(now_ns, self.context)

    def _begin_segment(self, now_ns: int, previous: TraceContext | None) -> None:
        tracing = self._tracing
        self._segment += 1
        self._begun_ns = now_ns
        self._events: list[EventRecord] = []
        self._links: tuple[LinkRecord, ...] = ()
        if previous is not None:
            self._links = (LinkRecord(previous, {names.LINK_TYPE: LinkType.PREVIOUS_SEGMENT.value}),)
        at_start: dict[str, AttributeValue] = {
            names.LISTENER: self._info.listener,
            names.CONNECTION_SEGMENT: self._segment,
        }
        sampled = tracing.sampling.decide(names.SPAN_CONNECTION, SpanKind.SERVER, None, at_start, self._links)
        self.context = sampled.context
        self.is_recording = sampled.is_recording
        self._more = sampled.attributes

    def _end_segment(self, now_ns: int, final: Mapping[str, AttributeValue]) -> None:
        if not self._tracing.wants(self.is_recording):
            return
        self._tracing.finished(
            SpanRecord(
                names.SPAN_CONNECTION,
                SpanKind.SERVER,
                self.context,
                None,
                self._begun_ns + self._wall_offset_ns,
                now_ns + self._wall_offset_ns,
                {**self._more, **self._attributes(), **final},
                self._events,
                self._links,
                names.ERROR_TYPE in final,
                self.is_recording,
            )
        )

    def _attributes(self) -> dict[str, AttributeValue]:
        info, redaction = self._info, self._tracing.redaction
        attributes: dict[str, AttributeValue] = {
            names.CONNECTION_ID: info.id,
            names.CONNECTION_SEGMENT: self._segment,
            names.LISTENER: info.listener,
            names.NETWORK_TRANSPORT: info.transport,
            names.NETWORK_PROTOCOL_NAME: info.protocol,
            names.TLS_MODE: info.tls_mode.value,
            names.SERVER_ADDRESS: clean(self._server.host),
            names.CONNECTION_MESSAGES: self._messages,
            names.CONNECTION_ERRORS: self._errors,
        }
        if self._server.port is not None:
            attributes[names.SERVER_PORT] = self._server.port
        if info.transport == "tcp":
            attributes[names.NETWORK_TYPE] = "ipv6" if ":" in self._client.host else "ipv4"
        add_endpoint(attributes, names.CLIENT_ADDRESS, names.CLIENT_PORT, self._client, redaction)
        if self._client is not info.peer:
            add_endpoint(attributes, names.NETWORK_PEER_ADDRESS, names.NETWORK_PEER_PORT, info.peer, redaction)
        if self._helo is not None and (helo := redaction.host_name(self._helo)) is not None:
            attributes[names.HELO] = helo
        if self._tls is not None:
            add_tls(attributes, self._tls)
        if self._auth_mechanism is not None:
            attributes[names.AUTH_MECHANISM] = self._auth_mechanism
        if self._user is not None:
            attributes.update(redaction.user(self._user))
        return attributes

    def _addresses(self) -> tuple[tuple[str, AttributeValue], ...]:
        """The row of New: peer, local address, listener."""
        attributes: dict[str, AttributeValue] = {}
        peer, local = self._info.peer, self._info.local
        redaction = self._tracing.redaction
        add_endpoint(attributes, names.NETWORK_PEER_ADDRESS, names.NETWORK_PEER_PORT, peer, redaction)
        attributes[names.NETWORK_LOCAL_ADDRESS] = clean(local.host)
        if local.port is not None:
            attributes[names.NETWORK_LOCAL_PORT] = local.port
        attributes[names.LISTENER] = self._info.listener
        return tuple(attributes.items())

    # State events ------------------------------------------------------------------------------------------------

    def _note(
        self,
        now_ns: int,
        transition: Transition,
        previous_duration_seconds: float | None,
        more: tuple[tuple[str, AttributeValue], ...],
    ) -> None:
        event = state_event(now_ns + self._wall_offset_ns, transition, previous_duration_seconds, more)
        if self._tracing.events_on_span and self.is_recording:
            self._events.append(event)
        if self._tracing.state_log is not None:
            attributes = {names.CONNECTION_ID: self._info.id, **event.attributes}
            self._tracing.state_log.take(event.name, event.time_ns, attributes, self.context)

    # For its transactions ----------------------------------------------------------------------------------------

    @property
    def wall_offset_ns(self) -> int:
        """Wall clock minus monotonic clock, for all that happens on this connection."""
        return self._wall_offset_ns

    def inbound_policy(self) -> InboundPolicy:
        """What to make of a trace context that comes from this client now."""
        info = self._info
        return propagation.decide(
            self._tracing.policies.get(info.listener, InboundPolicy.AUTO),
            client=self._client.host,
            is_local=info.transport == "unix",
            is_authenticated=self._is_authenticated,
        )

    def transaction_ended(self) -> None:
        """One of its transactions is over."""
        self._open_transactions -= 1


class TracedTransaction(TransactionObserver):
    """One mail transaction. Its identity is settled late: see the module's head."""

    __slots__ = (
        "_accepted",
        "_attributes",
        "_begun_ns",
        "_connection",
        "_connection_context",
        "_has_ended",
        "_links",
        "_mail",
        "_parent",
        "_refused",
        "_remote",
        "_settled",
        "_tracing",
        "_waiting",
        "wall_offset_ns",
    )

    def __init__(self, tracing: Tracing, connection: TracedConnection, mail: Mail, number: int) -> None:
        self._tracing = tracing
        self._connection = connection
        # Of the segment at MAIL: none ends while a transaction is open, but the connection may be gone before it.
        self._connection_context = connection.context
        self.wall_offset_ns = connection.wall_offset_ns
        self._begun_ns = tracing.monotonic_ns()
        self._mail = mail
        self._accepted: list[Recipient] = []
        self._refused = 0
        self._attributes: dict[str, AttributeValue] = {
            names.CONNECTION_ID: connection.id,
            names.TRANSACTION_NUMBER: number,
        }
        self._remote: tuple[InboundPolicy, TraceContext] | None = None
        self._settled: Sampled | None = None
        self._parent: TraceContext | None = None
        self._links: tuple[LinkRecord, ...] = ()
        self._waiting: list[TracedDelivery] = []
        self._has_ended = False

    # What happens ------------------------------------------------------------------------------------------------

    def recipient_answered(self, recipient: Recipient, reply: Reply) -> None:
        """Count it."""
        if reply.is_positive:
            self._accepted.append(recipient)
        else:
            self._refused += 1

    def header_received(self, trace: TraceHeaders, *, message_id: str | None) -> None:
        """Judge the trace context; the transaction can be settled now."""
        policy = self._connection.inbound_policy()
        if policy is not InboundPolicy.IGNORE and trace.traceparents:
            # Whoever is let into a trace as its parent is trusted with its state too.
            context = propagation.parse(trace, with_state=policy is InboundPolicy.PARENT)
            if context is not None and self._settled is None:
                self._remote = (policy, context)
        if message_id is not None and self._tracing.with_message_id:
            self._attributes[names.MESSAGE_ID] = clean(message_id)

    def content_received(self, octets: int) -> None:
        """The content is complete."""
        self._attributes[names.MESSAGE_SIZE] = octets

    def delivery_begun(self, upstream: str, server: Endpoint, *, attempt: int = 1) -> "TracedDelivery":
        """An attempt begins, often before the header block and so before the trace is known."""
        attributes: dict[str, AttributeValue] = {
            names.CONNECTION_ID: self._connection.id,
            names.DELIVERY_ATTEMPT: attempt,
        }
        return TracedDelivery(self._tracing, self, upstream, server, attributes)

    def spooled(self, spool_id: str) -> None:
        """The message is durable."""
        self._attributes[names.SPOOL_ID] = clean(spool_id)

    def carrier(self) -> Mapping[str, str]:
        """The transaction's own context."""
        return propagation.carrier(self.settle().context)

    def trace_id(self) -> str:
        """The trace id, sampled or not."""
        return self.settle().context.trace_id_hex

    def ended(self, outcome: Outcome, reply: Reply | None, *, error_type: ErrorType | None = None) -> None:
        """Make the span."""
        if self._has_ended:
            return
        self._has_ended = True
        self._connection.transaction_ended()
        tracing = self._tracing
        settled = self.settle()
        if not tracing.wants(settled.is_recording):
            return
        failure = our_failure(outcome, reply, error_type)
        attributes = {**settled.attributes, **self._attributes, **self._envelope(), names.OUTCOME: outcome.value}
        add_reply_codes(attributes, reply)
        if failure is not None:
            attributes[names.ERROR_TYPE] = failure
        tracing.finished(
            SpanRecord(
                names.SPAN_TRANSACTION,
                self._kind,
                settled.context,
                self._parent,
                self._begun_ns + self.wall_offset_ns,
                tracing.monotonic_ns() + self.wall_offset_ns,
                attributes,
                (),
                self._links,
                failure is not None,
                settled.is_recording,
            )
        )

    # Identity ----------------------------------------------------------------------------------------------------

    @property
    def settled(self) -> Sampled | None:
        """The identity, once it is known."""
        return self._settled

    def settle(self) -> Sampled:
        """The identity, known from now on."""
        if self._settled is None:
            self._parent = self._connection_context
            if self._remote is not None:
                policy, remote = self._remote
                if policy is InboundPolicy.PARENT:
                    self._parent = remote
                    link = LinkRecord(self._connection_context, {names.LINK_TYPE: LinkType.CONNECTION.value})
                else:
                    link = LinkRecord(remote, {names.LINK_TYPE: LinkType.APPLICATION.value})
                self._links = (link,)
            self._settled = self._tracing.sampling.decide(
                names.SPAN_TRANSACTION, self._kind, self._parent, self._attributes, self._links
            )
            for delivery in self._waiting:
                delivery.finish()
            self._waiting.clear()
        return self._settled

    def context_for_deliveries(self) -> TraceContext:
        """The parent of its deliveries."""
        return self.settle().context

    def finish_when_settled(self, delivery: "TracedDelivery") -> None:
        """Let a delivery that is over have its trace, at once or as soon as it is known."""
        if self._settled is None:
            self._waiting.append(delivery)
        else:
            delivery.finish()

    @property
    def _kind(self) -> SpanKind:
        # An edge of a service graph needs the application's CLIENT span as direct parent of a SERVER span.
        is_in_application = self._parent is not None and self._parent.is_remote
        return SpanKind.SERVER if is_in_application else SpanKind.INTERNAL

    def _envelope(self) -> dict[str, AttributeValue]:
        redaction, mail = self._tracing.redaction, self._mail
        attributes: dict[str, AttributeValue] = {
            names.RECIPIENT_COUNT: len(self._accepted),
            names.RECIPIENTS_REFUSED: self._refused,
        }
        if mail.body is not None:
            attributes[names.BODY] = mail.body.value.lower()
        if (domain := redaction.domain(mail.reverse_path)) is not None:
            attributes[names.MAIL_FROM_DOMAIN] = domain
        if (address := redaction.mailbox(mail.reverse_path)) is not None:
            attributes[names.MAIL_FROM_ADDRESS] = address
        if domains := redaction.domains(self._accepted):
            attributes[names.RCPT_DOMAINS] = domains
        if addresses := redaction.mailboxes(self._accepted):
            attributes[names.RCPT_ADDRESSES] = addresses
        return attributes


class ResumedTransaction(TransactionObserver):
    """A message from the spool. Its transaction's span is long over; the attempts stand below it, in the same trace."""

    __slots__ = ("_is_possible_duplicate", "_spool_id", "_stored", "_tracing", "wall_offset_ns")

    def __init__(
        self, tracing: Tracing, spool_id: str, carrier: Mapping[str, str], *, is_possible_duplicate: bool
    ) -> None:
        self._tracing = tracing
        self._is_possible_duplicate = is_possible_duplicate
        self._spool_id = clean(spool_id)
        self._stored = propagation.from_carrier(carrier)
        self.wall_offset_ns = tracing.time_ns() - tracing.monotonic_ns()

    def delivery_begun(self, upstream: str, server: Endpoint, *, attempt: int = 1) -> "TracedDelivery":
        """An attempt begins."""
        links: tuple[LinkRecord, ...] = ()
        if self._stored is not None:
            links = (LinkRecord(self._stored, {names.LINK_TYPE: LinkType.SPOOLED_TRANSACTION.value}),)
        attributes: dict[str, AttributeValue] = {names.SPOOL_ID: self._spool_id, names.DELIVERY_ATTEMPT: attempt}
        if self._is_possible_duplicate:
            attributes[names.POSSIBLE_DUPLICATE] = True
        return TracedDelivery(self._tracing, self, upstream, server, attributes, links)

    def carrier(self) -> Mapping[str, str]:
        """The stored context."""
        return {} if self._stored is None else propagation.carrier(self._stored)

    def trace_id(self) -> str | None:
        """The stored trace id."""
        return None if self._stored is None else self._stored.trace_id_hex

    def context_for_deliveries(self) -> TraceContext | None:
        """The parent of its deliveries."""
        return self._stored

    def finish_when_settled(self, delivery: "TracedDelivery") -> None:
        """Its trace is always known."""
        delivery.finish()


class TracedDelivery(DeliveryObserver):
    """One attempt at one upstream."""

    __slots__ = (
        "_attributes",
        "_begun_ns",
        "_end",
        "_identity",
        "_links",
        "_parent",
        "_peer",
        "_phases",
        "_pool",
        "_tls",
        "_tracing",
        "_transaction",
    )

    def __init__(
        self,
        tracing: Tracing,
        transaction: TracedTransaction | ResumedTransaction,
        upstream: str,
        server: Endpoint,
        attributes: dict[str, AttributeValue],
        links: tuple[LinkRecord, ...] = (),
    ) -> None:
        self._tracing = tracing
        self._transaction = transaction
        self._begun_ns = tracing.monotonic_ns()
        attributes[names.SERVER_ADDRESS] = server.host
        if server.port is not None:
            attributes[names.SERVER_PORT] = server.port
        attributes[names.UPSTREAM_NAME] = upstream
        attributes[names.PEER_SERVICE] = upstream
        attributes[names.SERVICE_PEER_NAME] = upstream
        self._attributes = attributes
        self._links = links
        self._phases: list[tuple[int, DeliveryPhase, Reply | None]] = []
        self._pool: tuple[tuple[str, AttributeValue], ...] = ()
        self._peer: Endpoint | None = None
        self._tls: TlsInfo | None = None
        self._parent: TraceContext | None = None
        self._identity: Sampled | None = None
        self._end: tuple[int, Outcome, Reply | None, ErrorType | None] | None = None

    # What happens ------------------------------------------------------------------------------------------------

    def phase(self, phase: DeliveryPhase, reply: Reply | None = None) -> None:
        """Note it: whether the attempt is recorded may not be known yet.

        A thousand recipients are not a thousand events: of answers alike in a row the last stands for all, and beyond
        `_MAX_PHASES` for those that differ too.
        """
        noted = self._phases
        one = (self._tracing.monotonic_ns(), phase, reply)
        if phase is DeliveryPhase.RCPT and noted and noted[-1][1] is phase:
            before = noted[-1][2]
            if len(noted) >= _MAX_PHASES or (before and before.code) == (reply and reply.code):
                noted[-1] = one
                return
        noted.append(one)

    def pooled(self, *, wait_seconds: float, reused: bool) -> None:
        """A connection is at hand."""
        self._pool = ((names.POOL_WAIT, wait_seconds), (names.POOL_REUSED, reused))

    def connected(self, peer: Endpoint, tls: TlsInfo | None) -> None:
        """The connection that serves this attempt."""
        self._peer = peer
        self._tls = tls

    def carrier(self) -> Mapping[str, str]:
        """The attempt's own context: what the relayed message is to carry."""
        return propagation.carrier(self._identify().context)

    def ended(
        self,
        outcome: Outcome,
        reply: Reply | None,
        *,
        round_trips: int,
        error_type: ErrorType | None = None,
    ) -> None:
        """Make the span, now or as soon as its trace is known."""
        if self._end is None:
            self._attributes[names.ROUND_TRIPS] = round_trips
            self._end = (self._tracing.monotonic_ns(), outcome, reply, error_type)
            self._transaction.finish_when_settled(self)

    def finish(self) -> None:
        """Make the span: the attempt is over and its trace is known."""
        identity = self._identify()
        tracing = self._tracing
        if self._end is None or not tracing.wants(identity.is_recording):
            return
        end_ns, outcome, reply, error_type = self._end
        failure = attempt_failure(outcome, reply, error_type)
        attributes = {**identity.attributes, **self._attributes, **dict(self._pool), names.OUTCOME: outcome.value}
        if self._peer is not None:
            attributes[names.NETWORK_PEER_ADDRESS] = self._peer.host
            if self._peer.port is not None:
                attributes[names.NETWORK_PEER_PORT] = self._peer.port
        if self._tls is not None:
            add_tls(attributes, self._tls)
        add_reply_codes(attributes, reply)
        if reply is not None:
            attributes[names.REPLY_TEXT] = tracing.redaction.text(reply.text)
        if failure is not None:
            attributes[names.ERROR_TYPE] = failure
        offset = self._transaction.wall_offset_ns
        tracing.finished(
            SpanRecord(
                names.SPAN_DELIVERY,
                SpanKind.CLIENT,
                identity.context,
                self._parent,
                self._begun_ns + offset,
                end_ns + offset,
                attributes,
                self._events(offset) if identity.is_recording else (),
                self._links,
                failure is not None,
                identity.is_recording,
            )
        )

    # Identity ----------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> Sampled | None:
        """The identity, once it is known."""
        return self._identity

    def _identify(self) -> Sampled:
        if self._identity is None:
            self._parent = self._transaction.context_for_deliveries()
            self._identity = self._tracing.sampling.decide(
                names.SPAN_DELIVERY, SpanKind.CLIENT, self._parent, self._attributes, self._links
            )
        return self._identity

    def _events(self, offset_ns: int) -> list[EventRecord]:
        return [
            phase_event(at + offset_ns, phase, reply, self._pool if phase is DeliveryPhase.POOL else ())
            for at, phase, reply in self._phases
        ]


def our_failure(outcome: Outcome, reply: Reply | None, error_type: ErrorType | None) -> str | None:
    """The `error.type` of a transaction that failed by the gateway's fault or by what it depends on; None else."""
    kind = error_type or (reply.error_type if reply is not None else None)
    if kind in _OUR_FAILURES:
        return kind.value
    if outcome is Outcome.UNKNOWN:
        return ErrorType.OUTCOME_UNKNOWN.value
    is_failing = reply is not None and reply.enhanced is not None and reply.enhanced.subject in _FAILURE_SUBJECTS
    return kind.value if kind is ErrorType.UPSTREAM_REFUSED and is_failing else None


def attempt_failure(outcome: Outcome, reply: Reply | None, error_type: ErrorType | None) -> str | None:
    """The `error.type` of a delivery that failed: any final 4yz or 5yz, any fault of transport; None else."""
    if error_type is not None:
        return error_type.value
    if reply is not None and reply.code >= 400:
        return str(reply.code) if reply.error_type is None else reply.error_type.value
    return ErrorType.OUTCOME_UNKNOWN.value if outcome is Outcome.UNKNOWN else None


def add_endpoint(
    attributes: dict[str, AttributeValue], address_name: str, port_name: str, client: Endpoint, redaction: Redaction
) -> None:
    """Add a client's address, as far as it may be shown, and its port with it."""
    address = redaction.ip(client.host)
    if address is not None:
        attributes[address_name] = address
        if client.port is not None:
            attributes[port_name] = client.port


def add_tls(attributes: dict[str, AttributeValue], tls: TlsInfo) -> None:
    """Add what a handshake agreed on."""
    attributes[names.TLS_PROTOCOL_VERSION] = tls.version
    attributes[names.TLS_CIPHER] = tls.cipher
    attributes[names.TLS_RESUMED] = tls.resumed
