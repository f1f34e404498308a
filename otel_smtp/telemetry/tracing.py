"""The observer that makes spans: connection > transaction > delivery.

Theory of operation
-------------------
The session and the forwarder note what happens in records; nothing of OpenTelemetry runs on the way. When a record is
complete, this observer makes its span of it, as octets, and gives it away. Times of a record are those of the monotonic
clock; with the connection's offset they become wall clock times whose order is the order of what happened.

A span's *identity*, its ids, is needed before it ends: people are shown a trace id, relayed mail carries one.
An identity is settled by the first who needs it, and is kept in the record's `trace`:

* that of a connection's first segment with its first mail, or at its end: a connection that only waits needs none.
  That of a later one when it begins, as it is linked to the one before;
* that of a transaction when its header block has been read, or when it ends without: the application's trace context in
  the header decides which trace it joins. Observers are asked for a trace id no sooner;
* that of a delivery when the relayed message is to carry it, or at its end.

A connection is a chain of segments, each a root span of its own, linked to the one before; the session decides when one
ends. Whether a connection was only a probe is known when it is closed.

A segment with many events is encoded over several turns of the event loop, from what its record held when it ended.

A span that is not sampled costs its identity and a few comparisons, unless a listener (the access log) wants all spans.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Final, Protocol

from opentelemetry.trace import SpanKind

from otel_smtp.observing import (
    ConnectionRecord,
    DeliveryRecord,
    Faults,
    MessageKind,
    Observer,
    SpoolAction,
    TransactionRecord,
)
from otel_smtp.smtp.states import ConnState, ErrorReply, Transition
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry import propagation
from otel_smtp.telemetry.attributes import LinkType
from otel_smtp.telemetry.keeping import Keep as KeepReason
from otel_smtp.telemetry.keeping import Keeping
from otel_smtp.telemetry.ordinary import OrdinaryMail
from otel_smtp.telemetry.ordinary_spooled import OrdinarySpooled
from otel_smtp.telemetry.propagation import SAMPLED, InboundPolicy, TraceContext
from otel_smtp.telemetry.records import EventRecord, LinkRecord, SpanRecord, SpanSink, StateLog
from otel_smtp.telemetry.redaction import Redaction
from otel_smtp.telemetry.sampling import Identity, Sampling, SegmentIdentity
from otel_smtp.telemetry.sdk import DEFAULT_ON, IdGenerator, RandomIdGenerator, Sampler
from otel_smtp.telemetry.shapes import AFTER_LAST_EVENT_NS, EncodedSpan, Pair, SpanShape, encode
from otel_smtp.telemetry.span_attributes import Described, SpanAttributes, is_probe
from otel_smtp.telemetry.span_lines import LineOfSpan, LinesOfMail, WriteLines
from otel_smtp.telemetry.state_events import (
    WITH_MORE,
    StateEvents,
    encode_events,
    encode_phases,
    encode_phases_among,
    encode_states,
    encode_states_by,
    phase_events,
    state_events,
    taken_over_event,
)
from otel_smtp.telemetry.turns import StepByStep

logger: Final = logging.getLogger("otel_smtp.telemetry.tracing")

# A connection's segment has up to some five hundred events: in one go they would keep all mails waiting for half a
# millisecond, and with ten busy connections that is what one mail in twenty would meet.
_EVENTS_A_TURN: Final = 64
_TO_SPOOLED: Final = {names.LINK_TYPE: LinkType.SPOOLED_TRANSACTION.value}
_TO_REPORTED: Final = {names.LINK_TYPE: LinkType.REPORTED_MAIL.value}

Take = Callable[[Sequence[EncodedSpan], int], None]
"""Takes spans as octets, each one or two of one trace that ended together, and how many they are in all; called on the
event loop, it neither blocks nor raises, and what it is given is its caller's."""
Keep = Callable[[Sequence[EncodedSpan], bool], None]
"""Takes them likewise, and whether something in them went wrong."""


class LineSink(Protocol):
    """Takes every span as it is described, before it is a value or octets; called on the event loop."""

    def take_described(
        self, described: Described, context: TraceContext, times: tuple[int, int], told: Sequence[EventRecord]
    ) -> None:
        """Take one span.

        Args:
            times: start and end, in nanoseconds since the epoch.
            told: its events about recipients, and about the gateway that had the mail before.
        """
        ...

    def take_line(self, line: LineOfSpan) -> bool:
        """Take a span that needs no description; False: only as it is described."""
        ...

    def writer_of_mails(self) -> WriteLines | None:
        """What takes both spans of each of several ordinary mails at once; None: only as they are described."""
        ...


class Tracing(Observer):
    """Makes spans of what happens. To be told before all who read a record's `trace`.

    Args:
        exports: take every span that is sampled.
        memories: take every span that is recorded.
        sinks: take every span that is recorded, as a value.
        listeners: take every span, recorded or not, as a value; those that are not come without events.
        lines: take every span, recorded or not, as it is described: the access log.
        policies: what to make of a message's trace context, by listener's name; AUTO for those that it does not name.
        state_events: where state events go; in the log, by way of `StateTelling`.
        probes: give spans of connections that sent nothing too.
        with_message_id: put `Message-ID` on transactions.
        monotonic_ns: the clock of the records.
        keeping: decides what is kept by its outcome; None: the sampler alone decides.
    """

    def __init__(
        self,
        *,
        exports: Sequence[Take] = (),
        memories: Sequence[Keep] = (),
        sinks: Sequence[SpanSink] = (),
        listeners: Sequence[SpanSink] = (),
        lines: Sequence[LineSink] = (),
        sampler: Sampler = DEFAULT_ON,
        id_generator: IdGenerator | None = None,
        redaction: Redaction | None = None,
        policies: Mapping[str, InboundPolicy] | None = None,
        state_events: StateEvents = StateEvents.SPAN,
        probes: bool = False,
        with_message_id: bool = False,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        keeping: Keeping | None = None,
    ) -> None:
        self._keeping = keeping
        self._faults = Faults(logger, "no span: internal error")
        self._sampling = Sampling(sampler, id_generator or RandomIdGenerator())
        self._exports = tuple(exports)
        self._memories = tuple(memories)
        self._encodes = bool(exports or memories)
        self._sinks = tuple(sinks)
        self._listeners = tuple(listeners)
        self._followers: tuple[LineSink, ...] = ()
        self.tell(lines)
        self._events_on_span = state_events.on_span
        self._long_spans = StepByStep()
        self._monotonic_ns = monotonic_ns
        self.show(redaction or Redaction(), policies or {}, probes=probes, with_message_id=with_message_id)

    def tell(self, lines: Sequence[LineSink]) -> None:
        """Tell these of every span from now on, beside those that `follow`."""
        self._told = tuple(lines)
        self._heed()

    def follow(self, lines: LineSink) -> None:
        """Tell `lines` too, until it leaves."""
        self._followers = (*self._followers, lines)
        self._heed()

    def leave(self, lines: LineSink) -> None:
        """Tell `lines` nothing more. Idempotent."""
        self._followers = tuple(one for one in self._followers if one is not lines)
        self._heed()

    def _heed(self) -> None:
        self._lines = (*self._told, *self._followers)
        listeners = self._listeners
        # Whether any sink reads spans as values: recorded ones, and all others.
        self._reads = {True: bool(self._sinks or listeners), False: bool(listeners)}
        self._tells_all = bool(listeners or self._lines)  # of those that are not recorded too
        self._only_encodes = not self._sinks and not self._tells_all
        # Of a mail whose connection's segment the sampler dropped, so nothing is reported.
        self._drops_mails = self._sampling.inherits_ours and self._keeping is None and not self._tells_all

    def show(
        self,
        redaction: Redaction,
        policies: Mapping[str, InboundPolicy],
        *,
        probes: bool,
        with_message_id: bool,
    ) -> None:
        """What spans show from now on, and whose trace context they join.

        Args:
            policies, probes, with_message_id: see above.
        """
        self._policies = dict(policies)
        self._probes = probes
        self.attributes = SpanAttributes(redaction, with_message_id=with_message_id)
        self._ordinary = OrdinaryMail(self.attributes, self._settle_attempt)
        self._ordinary_spooled = OrdinarySpooled(self.attributes, self._ordinary)

    # Connections -------------------------------------------------------------------------------------------------

    def segment_ended(self, connection: ConnectionRecord) -> None:
        """Make the segment's span; the next one is linked to it."""
        self._finish_segment(connection, self._monotonic_ns(), is_closed=False)
        previous = LinkRecord(self.segment(connection).context, {names.LINK_TYPE: LinkType.PREVIOUS_SEGMENT.value})
        connection.trace = self._segment_identity(connection, connection.segment + 1, (previous,))

    def connection_closed(self, connection: ConnectionRecord) -> None:
        """Make the last segment's span."""
        # A health check connects and leaves. Once a segment was exported, its end is exported too.
        if self._probes or connection.segment > 1 or not is_probe(connection):
            self._finish_segment(connection, connection.end.at_ns, is_closed=True)

    def segment(self, connection: ConnectionRecord) -> SegmentIdentity:
        """The identity of a connection's present segment, or of its last one; known from now on."""
        identity: SegmentIdentity | None = connection.trace
        if identity is None:
            identity = connection.trace = self._segment_identity(connection, connection.segment, ())
        return identity

    def _segment_identity(
        self, connection: ConnectionRecord, segment: int, links: Sequence[LinkRecord]
    ) -> SegmentIdentity:
        def at_start() -> names.Attributes:
            return self.attributes.connection_at_start(connection, segment)

        return SegmentIdentity(self._sampling.decide(names.SPAN_CONNECTION, SpanKind.SERVER, None, at_start, links))

    def _finish_segment(self, connection: ConnectionRecord, end_ns: int, *, is_closed: bool) -> None:
        identity = self.segment(connection)
        encodes, reads = self._wanted(identity)
        if not encodes and not reads and not self._lines:
            return
        described = self.attributes.connection(connection, identity.failure, is_closed=is_closed)
        offset = connection.wall_offset_ns
        if connection.transitions:
            end_ns = max(end_ns, connection.transitions[-1].at_ns + AFTER_LAST_EVENT_NS)
        times = connection.begun_ns + offset, end_ns + offset
        transitions = connection.transitions if self._events_on_span and identity.is_recording else []
        before_ns = before_segment_ns(connection)

        def more(transition: Transition) -> Sequence[Pair]:
            return self.more_of_state(connection, transition)

        if encodes:
            is_trouble = connection.errors > 0
            if len(transitions) > _EVENTS_A_TURN:
                # As the connection is now: it goes on, and so do its totals and failures.
                shown = {each.sequence: more(each) for each in transitions if each.state in WITH_MORE}
                pieces = encode_states_by(
                    _EVENTS_A_TURN, transitions, before_ns, offset, lambda each: shown[each.sequence]
                )
                self._long_spans.do(self._give_long(identity, described, times, pieces, is_trouble=is_trouble))
            else:
                events = encode_states(transitions, before_ns, offset, more)
                self._give(identity, described, times, events, is_trouble=is_trouble)
        if reads:
            self._show(identity, described, times, state_events(transitions, before_ns, offset, more))
        if self._lines:
            self._tell_lines(identity, described, times, ())

    def more_of_state(self, connection: ConnectionRecord, transition: Transition) -> Sequence[Pair]:
        """The attributes of a state in `WITH_MORE` that its transition does not carry."""
        if isinstance(transition.detail, ErrorReply):
            return self.attributes.error(transition.detail, connection.failure)
        is_new = transition.state is ConnState.NEW
        return self.attributes.addresses(connection) if is_new else self.attributes.totals(connection)

    def finish(self) -> None:
        """Give away all spans of which only some events are encoded; to be called on the event loop."""
        self._long_spans.finish()

    # Transactions and their deliveries ---------------------------------------------------------------------------

    def transactions_settled(self, transactions: Sequence[TransactionRecord]) -> None:
        """Make the spans of each transaction and of its deliveries that are over; those of ordinary mails, and their
        lines in the log, are given away together."""
        together: list[EncodedSpan] = []
        write_lines = None if self._only_encodes or self._reads[True] else self._writer_of_lines()
        lines: list[LinesOfMail] = []
        ordinary, encodes = self._ordinary, self._encodes
        for transaction in transactions:
            try:
                identity: Identity | None = transaction.trace
                kind = identity.__class__
                if kind is not Identity:
                    if kind is SegmentIdentity and self._drops_mails:
                        continue
                    identity = self._settle_unless_dropped(transaction)
                    if identity is None and transaction.connection is not None:
                        continue
                spans = None
                if encodes and identity is not None and identity.is_recording and identity.context.flags & SAMPLED:
                    spans = ordinary.spans(transaction, identity)
                if spans is None or identity is None:
                    if lines:  # they come before the lines of this one
                        self._give_together(together, lines, write_lines)
                    self._finish_transaction(transaction, identity, together)
                    continue
                together.append(spans)
                if write_lines is not None:
                    lines.append(ordinary.lines(transaction, identity))
                elif not self._only_encodes:
                    self._finish_transaction(transaction, identity, together, is_encoded=True)
            except Exception:  # noqa: BLE001 - logged once; the others have their spans
                self._faults.note("transaction")
        self._give_together(together, lines, write_lines)

    def _writer_of_lines(self) -> WriteLines | None:
        """What writes the lines of ordinary mails for all who want lines; None if that needs descriptions."""
        return self._lines[0].writer_of_mails() if len(self._lines) == 1 else None

    def _settle_unless_dropped(self, transaction: TransactionRecord) -> Identity | None:
        """The transaction's identity; None for one that needs none: it is below a segment that the sampler dropped, and
        is exported nowhere. Only its trace id, which is the segment's, is ever shown. None as well for a
        message from the spool without a trace."""
        connection, headers = transaction.connection, transaction.trace_headers
        if self._drops_mails and connection is not None and (headers is None or not headers.traceparents):
            segment: SegmentIdentity = connection.trace or self.segment(connection)
            if not segment.is_recording:
                return None
        return self._settle(transaction)

    def _finish_transaction(
        self,
        transaction: TransactionRecord,
        identity: Identity | None,
        together: list[EncodedSpan],
        *,
        is_encoded: bool = False,
    ) -> None:
        """Make the spans of a transaction and of its deliveries that are over.

        Args:
            identity: None for a message from the spool without a trace.
            together: gets those that are encoded, exported, and no trouble, for `_give_together`.
            is_encoded: those who take octets have them.
        """
        if identity is not None and not identity.is_recording:
            if self._keeping is not None:
                self._keep_by_outcome(self._keeping, identity, transaction)
            if self._sampling.inherits_ours and not self._tells_all and not identity.is_recording:
                return
        if self._encodes and not is_encoded and identity is not None and identity.is_recording:
            span = None
            if transaction.spool_id is not None:
                span = self._ordinary_spooled.transaction(transaction, identity)
            if span is not None:
                is_encoded = True
                self._pass_on_together(span, identity, together)
                if not self._reads[True] and (
                    not self._lines
                    or self._have_taken_line(self._ordinary_spooled.line_of_transaction(transaction, identity))
                ):
                    return
        for delivery in transaction.deliveries:
            if delivery.ended_ns:
                self._finish_delivery(delivery, together, is_encoded=is_encoded)
        if identity is None:
            return
        encodes, reads = self._wanted(identity, is_encoded=is_encoded)
        if not encodes and not reads and not self._lines:
            return
        parent = identity.parent
        is_in_application = parent is not None and parent.is_remote
        described = self.attributes.transaction(transaction, is_in_application=is_in_application)
        if described[0].has_failed and transaction.connection is not None:
            # What looks at SERVER spans, as span metrics do, is to see it.
            self.segment(transaction.connection).failure = described[0]
        offset = transaction.wall_offset_ns
        times = transaction.begun_ns + offset, transaction.ended_ns + offset + AFTER_LAST_EVENT_NS
        told: Sequence[EventRecord] = ()
        if transaction.refused:
            told = self.attributes.recipients(transaction.refused, transaction.own_count, offset)
        if encodes:
            self._give(identity, described, times, encode_events(told) if told else (), is_trouble=bool(told))
        if reads:
            self._show(identity, described, times, told)
        if self._lines:
            self._tell_lines(identity, described, times, told)

    def _have_taken_line(self, line: LineOfSpan) -> bool:
        """Whether all who want lines have taken that of a span that is ordinary."""
        return len(self._lines) == 1 and self._lines[0].take_line(line)

    def _keep_by_outcome(self, keeping: Keeping, identity: Identity, transaction: TransactionRecord) -> None:
        """Keep a transaction that went wrong or took long, with its attempts and its connection's segment."""
        reason = keeping.transaction(transaction)
        if reason is None:
            return
        identity.keep(reason.value)
        for delivery in transaction.deliveries:
            self._settle_delivery(delivery, transaction).keep(reason.value)
        if transaction.connection is not None:
            self.segment(transaction.connection).keep(reason.value)

    def deliveries_settled(self, deliveries: Sequence[DeliveryRecord]) -> None:
        """Make the spans of attempts that outlived their transactions; those of ordinary ones are given away
        together."""
        together: list[EncodedSpan] = []
        for delivery in deliveries:
            try:
                if self._keeping is not None and delivery.transaction.connection is None:
                    identity = self._settle_delivery(delivery, delivery.transaction)
                    if not identity.is_recording and (reason := self._keeping.attempt(delivery)) is not None:
                        _keep_alone(identity, reason)
                self._finish_delivery(delivery, together)
            except Exception:  # noqa: BLE001 - as above
                self._faults.note("delivery")
        self._give_together(together, [], None)

    def spool_acted(self, transaction: TransactionRecord) -> None:
        """Make the span of an action on a message in the spool, in the trace of its transaction."""
        stored = self._settle(transaction)
        parent = None if stored is None else stored.context

        def at_start() -> names.Attributes:
            return dict(self.attributes.spooled(transaction)[1])

        identity = self._sampling.decide(
            names.SPAN_SPOOL, SpanKind.INTERNAL, parent, at_start, _links(transaction, parent)
        )
        is_harmless = transaction.action in (SpoolAction.RELEASED, SpoolAction.GIVEN_UP)
        if self._keeping is not None and not identity.is_recording and not is_harmless:
            reason = self._keeping.failure()
            if reason is not None:
                _keep_alone(identity, reason)
        encodes, reads = self._wanted(identity)
        if not encodes and not reads and not self._lines:
            return
        described = self.attributes.spooled(transaction)
        offset = transaction.wall_offset_ns
        times = transaction.begun_ns + offset, transaction.ended_ns + offset + AFTER_LAST_EVENT_NS
        told = (
            self.attributes.recipients(transaction.refused, transaction.own_count, offset)
            if transaction.refused
            else []
        )
        if encodes:
            self._give(identity, described, times, encode_events(told), is_trouble=bool(told))
        if reads:
            self._show(identity, described, times, told)
        if self._lines:
            self._tell_lines(identity, described, times, told)

    def connection_carrier(self, connection: ConnectionRecord) -> Mapping[str, str]:
        """The present segment's own context."""
        return propagation.carrier(self.segment(connection).context)

    def trace_id(self, transaction: TransactionRecord) -> str | None:
        """The trace id, sampled or not."""
        identity: Identity | None = transaction.trace
        if identity is None:
            headers, connection = transaction.trace_headers, transaction.connection
            if connection is not None and (headers is None or not headers.traceparents):
                # As `_settle`, which would be one call more for nearly each mail.
                segment: SegmentIdentity = connection.trace or self.segment(connection)
                if self._drops_mails and not segment.is_recording:
                    transaction.trace = segment  # see `_settle_unless_dropped`
                    return segment.trace_text or segment.tell_trace()
                identity = transaction.trace = self._sampling.inherit(segment.context)
                if identity is not None:
                    return segment.trace_text or segment.tell_trace()
            identity = self._settle(transaction)
        return None if identity is None else identity.context.trace_id_hex

    def carrier(self, transaction: TransactionRecord) -> Mapping[str, str]:
        """The transaction's own context; of a message from the spool the stored one."""
        identity = self._settle(transaction)
        return {} if identity is None else propagation.carrier(identity.context)

    def delivery_carrier(self, delivery: DeliveryRecord) -> Mapping[str, str]:
        """The attempt's own context; where nothing is made of the mail, that of its connection's segment, which makes
        nothing either."""
        transaction = delivery.transaction
        if transaction.trace.__class__ is SegmentIdentity:  # see `trace_id`
            dropped: SegmentIdentity = transaction.trace
            return dropped.carrier or dropped.tell_carrier()
        if transaction.trace_headers is None and transaction.connection is not None and not transaction.ended_ns:
            return self._carrier_before_header(delivery, transaction.connection)
        span_id = delivery.trace or self._settle_attempt(delivery, transaction)
        connection, above = transaction.connection, transaction.trace
        if span_id.__class__ is int and connection is not None:
            segment: SegmentIdentity = connection.trace
            if above is None or above.parent is segment.context:
                # A transaction below its segment has all but its span's id from that.
                before, behind = segment.traceparent or segment.tell_traceparent()
                carrier = {propagation.TRACEPARENT: f"{before}{span_id.to_bytes(8, 'big').hex()}{behind}"}
                if state := segment.context.trace_state:
                    carrier[propagation.TRACESTATE] = state
                return carrier
        return propagation.carrier(self._settle_delivery(delivery, transaction).context)

    def _carrier_before_header(self, delivery: DeliveryRecord, connection: ConnectionRecord) -> Mapping[str, str]:
        """The fields of a log line about an attempt whose trace is still unknown: the message's header may
        name one. Until then its client is shown the connection's."""
        context = self.segment(connection).context
        if delivery.trace is None and self._sampling.inherits_ours:
            delivery.trace = self._sampling.new_span_id()
        if delivery.trace.__class__ is int:
            context = context._replace(span_id=delivery.trace)
        return propagation.carrier(context)

    def _settle(self, transaction: TransactionRecord) -> Identity | None:
        """The transaction's identity, known from now on; None for a message from the spool without a trace."""
        identity: Identity | None = transaction.trace
        if identity.__class__ is not Identity:
            connection, headers = transaction.connection, transaction.trace_headers
            if connection is None:
                identity = _stored(transaction)
            else:
                if headers is None or not headers.traceparents:
                    identity = self._sampling.inherit(self.segment(connection).context)
                if identity is None:
                    identity = self._join(transaction, connection)
            transaction.trace = identity
        return identity

    def _join(self, transaction: TransactionRecord, connection: ConnectionRecord) -> Identity:
        """Place the transaction below its connection or below the application's span, with a link to the other."""
        parent = self.segment(connection).context
        links: tuple[LinkRecord, ...] = ()
        kind = SpanKind.INTERNAL
        headers = transaction.trace_headers
        if headers is not None and headers.traceparents:
            policy = self._inbound_policy(connection)
            # A client that may be a trace's parent is trusted with its state too.
            is_parent = policy is InboundPolicy.PARENT
            remote = None if policy is InboundPolicy.IGNORE else propagation.parse(headers, with_state=is_parent)
            if remote is not None and is_parent:
                links = (LinkRecord(parent, {names.LINK_TYPE: LinkType.CONNECTION.value}),)
                parent, kind = remote, SpanKind.SERVER
            elif remote is not None:
                links = (LinkRecord(remote, {names.LINK_TYPE: LinkType.APPLICATION.value}),)

        def at_start() -> names.Attributes:
            return self.attributes.transaction_at_start(transaction)

        return self._sampling.decide(names.SPAN_TRANSACTION, kind, parent, at_start, links)

    def _inbound_policy(self, connection: ConnectionRecord) -> InboundPolicy:
        """What to make of a trace context that comes from this client now."""
        return propagation.decide(
            self._policies.get(connection.listener, InboundPolicy.AUTO),
            client=connection.client.host,
            is_local=connection.transport == "unix",
            is_authenticated=connection.user is not None,
        )

    def _settle_attempt(self, delivery: DeliveryRecord, transaction: TransactionRecord) -> Identity | int:
        """The identity of an attempt, known from now on: the id of its span, where all else follows from its
        transaction's identity, as it does for nearly each mail."""
        if delivery.trace is None:
            above: Identity | None = transaction.trace
            if above is None:
                above = self._settle_unless_dropped(transaction)
            if transaction.connection is not None and self._sampling.inherits_ours:
                delivery.trace = self._sampling.new_span_id()
            else:
                delivery.trace = self._decide_delivery(delivery, transaction, None if above is None else above.context)
        settled: Identity | int = delivery.trace
        return settled

    def _settle_delivery(self, delivery: DeliveryRecord, transaction: TransactionRecord) -> Identity:
        """The same in full."""
        identity = self._settle_attempt(delivery, transaction)
        if isinstance(identity, int):
            settled = self._settle(transaction)
            assert settled is not None
            above = settled.context
            context = above._replace(span_id=identity, is_remote=False)
            identity = delivery.trace = Identity(context, above, is_recording=bool(above.flags & SAMPLED))
        return identity

    def _decide_delivery(
        self, delivery: DeliveryRecord, transaction: TransactionRecord, parent: TraceContext | None
    ) -> Identity:
        links = _links(transaction, parent) if transaction.connection is None else ()
        if parent is not None and (inherited := self._sampling.inherit(parent)) is not None:
            inherited.links = links
            return inherited

        def at_start() -> names.Attributes:
            return self.attributes.delivery_at_start(delivery)

        return self._sampling.decide(names.SPAN_DELIVERY, SpanKind.CLIENT, parent, at_start, links)

    def _finish_delivery(
        self, delivery: DeliveryRecord, together: list[EncodedSpan], *, is_encoded: bool = False
    ) -> None:
        identity = self._settle_delivery(delivery, delivery.transaction)
        encodes, reads = self._wanted(identity, is_encoded=is_encoded)
        if not encodes and not reads and not self._lines:
            return
        transaction = delivery.transaction
        if encodes and transaction.connection is None:
            span = self._ordinary_spooled.attempt(delivery, identity)
            if span is not None:
                encodes = False
                self._pass_on_together(span, identity, together)
                if not reads and (
                    not self._lines or self._have_taken_line(self._ordinary_spooled.line_of_attempt(delivery, identity))
                ):
                    return
        described = self.attributes.delivery(delivery)
        offset = transaction.wall_offset_ns
        times = delivery.begun_ns + offset, delivery.ended_ns + offset + AFTER_LAST_EVENT_NS
        told = self._recipients_of(delivery) if delivery.refused else ()
        if (taken := transaction.taken_over) is not None:
            told = [taken_over_event(times[0], *taken), *told]
        if encodes:
            events = encode_phases_among(delivery, told) if told else encode_phases(delivery)
            self._give(identity, described, times, events)
        if reads:
            phases = phase_events(delivery) if identity.is_recording else []
            in_order = sorted([*phases, *told], key=attrgetter("time_ns")) if told else phases
            self._show(identity, described, times, in_order)
        if self._lines:
            self._tell_lines(identity, described, times, told)

    def _recipients_of(self, delivery: DeliveryRecord) -> Sequence[EventRecord]:
        """The events of recipients that are on no transaction's span: of mail from the spool, or that went there."""
        transaction = delivery.transaction
        told = [id(one.recipient) for one in transaction.refused]
        left = [one for one in delivery.refused if id(one.recipient) not in told]
        if not left:
            return ()
        beyond = 0
        if transaction.connection is not None and not told:
            beyond = delivery.refused_count + delivery.deferred_count - len(delivery.refused)
        return self.attributes.recipients(left, len(left) + max(0, beyond), transaction.wall_offset_ns)

    # Giving away -------------------------------------------------------------------------------------------------

    def _wanted(self, identity: Identity, *, is_encoded: bool = False) -> tuple[bool, bool]:
        """Whether to encode a span, and whether any sink reads it as a value."""
        is_recording = identity.is_recording
        return is_recording and self._encodes and not is_encoded, self._reads[is_recording]

    def _give(
        self,
        identity: Identity,
        described: Described,
        times: tuple[int, int],
        events: Iterable[bytes],
        *,
        is_trouble: bool = False,
    ) -> None:
        """Encode a span, and give the octets to those who take them."""
        shape, pairs, _ = described
        context = identity.context
        if identity.attributes:
            pairs = [*_sampler_pairs(identity, shape, pairs), *pairs]
        span = encode(shape, context, identity.parent, *times, pairs, events, identity.links)
        self._pass_on(span, is_exported=_is_exported(identity), is_trouble=is_trouble or shape.has_failed)

    def _give_long(
        self,
        identity: Identity,
        described: Described,
        times: tuple[int, int],
        pieces: Iterable[list[bytes]],
        *,
        is_trouble: bool,
    ) -> Iterator[None]:
        """The same in steps."""
        events: list[bytes] = []
        for some in pieces:
            events += some
            yield
        self._give(identity, described, times, events, is_trouble=is_trouble)

    def _pass_on(self, span: EncodedSpan, *, is_exported: bool, is_trouble: bool) -> None:
        if is_exported:
            for take in self._exports:
                take((span,), span.spans)
        for keep in self._memories:
            keep((span,), is_trouble)

    def _pass_on_together(self, span: EncodedSpan, identity: Identity, together: list[EncodedSpan]) -> None:
        """Likewise for the span of an ordinary mail: with others, if it is exported."""
        if _is_exported(identity):
            together.append(span)
        else:
            self._pass_on(span, is_exported=False, is_trouble=False)

    def _give_together(
        self, spans: list[EncodedSpan], lines: list[LinesOfMail], write_lines: WriteLines | None
    ) -> None:
        """Give away the spans of ordinary mails, all of which are exported, and their lines; leaves none of them."""
        if spans:
            count = sum([span.spans for span in spans])
            for take in self._exports:
                take(spans, count)
            for keep in self._memories:
                keep(spans, False)
            spans.clear()
        if lines and write_lines is not None:
            write_lines(lines)
            lines.clear()

    def _show(
        self, identity: Identity, described: Described, times: tuple[int, int], events: Sequence[EventRecord]
    ) -> None:
        """Make a span a value, and give it to those who read it."""
        shape, pairs, _ = described
        record = SpanRecord(
            shape.name,
            shape.kind,
            identity.context,
            identity.parent,
            *times,
            {**shape.constant, **dict(_sampler_pairs(identity, shape, pairs)), **dict(pairs)},
            events,
            identity.links,
            shape.has_failed,
            identity.is_recording,
            shape.description,
        )
        if identity.is_recording:
            for sink in self._sinks:
                sink.take(record)
        for listener in self._listeners:
            listener.take(record)

    def _tell_lines(
        self, identity: Identity, described: Described, times: tuple[int, int], told: Sequence[EventRecord]
    ) -> None:
        """Give the log's description of a span to its writers."""
        if identity.attributes:
            shape, pairs, on_line = described
            described = shape, [*_sampler_pairs(identity, shape, [*on_line, *pairs]), *pairs], on_line
        for lines in self._lines:
            lines.take_described(described, identity.context, times, told)


class StateTelling(Observer):
    """Tells a log of every state transition, at once; to be told after `Tracing`.

    That of Closed waits for `connection_closed`, which knows the octets.
    """

    def __init__(self, tracing: Tracing, log: StateLog) -> None:
        self._tracing = tracing
        self._log = log

    def conn_state(self, connection: ConnectionRecord, transition: Transition) -> None:
        """Tell the transition."""
        if transition.state is not ConnState.CLOSED:
            self._tell(connection, transition)

    def connection_closed(self, connection: ConnectionRecord) -> None:
        """Tell the last transition."""
        for transition in connection.transitions[-1:]:
            if transition.state is ConnState.CLOSED:
                self._tell(connection, transition)

    def _tell(self, connection: ConnectionRecord, transition: Transition) -> None:
        before_ns = before_segment_ns(connection)
        for before in reversed(connection.transitions):
            if before.sequence < transition.sequence:
                before_ns = before.at_ns
                break

        def more(transition: Transition) -> Sequence[Pair]:
            return self._tracing.more_of_state(connection, transition)

        [event] = state_events([transition], before_ns, connection.wall_offset_ns, more)
        attributes = {names.CONNECTION_ID: connection.id, **event.attributes}
        self._log.take(event.name, event.time_ns, attributes, self._tracing.segment(connection).context)


def before_segment_ns(connection: ConnectionRecord) -> int | None:
    """When the last transition before the present segment was; None without one."""
    return connection.earlier[-1].at_ns if connection.earlier else None


def _is_exported(identity: Identity) -> bool:
    return bool(identity.context.flags & SAMPLED) or identity.is_kept


def _keep_alone(identity: Identity, reason: KeepReason) -> None:
    """Keep what happened in the spool to a message whose transaction may not have been kept: a root, linked to that."""
    identity.keep(reason.value)
    identity.parent = None


def _links(transaction: TransactionRecord, parent: TraceContext | None) -> tuple[LinkRecord, ...]:
    """From what happens to a message in the spool to the transaction that brought it; from what happens to a message of
    our own to the one that it reports on."""
    if parent is None:
        return ()
    return (LinkRecord(parent, _TO_SPOOLED if transaction.kind is MessageKind.MAIL else _TO_REPORTED),)


def _stored(transaction: TransactionRecord) -> Identity | None:
    """The identity with which a message was spooled. Its transaction's span is long over; attempts stand below it."""
    stored = propagation.from_carrier(transaction.carrier)
    return None if stored is None else Identity(stored, None, is_recording=False)


def _sampler_pairs(identity: Identity, shape: SpanShape, pairs: Iterable[Pair]) -> Iterable[Pair]:
    """What the sampler added, as far as the span itself says nothing of it."""
    own = {**shape.constant, **dict(pairs)} if identity.attributes else {}
    return [(name, value) for name, value in identity.attributes.items() if name not in own]
