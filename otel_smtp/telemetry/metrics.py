"""The metrics: folded out of records when these are complete, rendered on request.

A record is counted once: a connection's transitions and replies when a transaction or a segment of it ends, some dozens
at a time; a transaction and its deliveries when they end. The measurements of an ordinary mail are only noted then, and
counted for some dozens of mails at a time too. No library is called for that; counts are additions in a dict,
measurements one bisection. The counts become Prometheus text (`metrics_page`) when the page is requested.

Every label value comes from a closed set: verbs and states are enumerations, reply codes lie between 200 and 599,
mechanisms, outcomes and reasons are our own words, listeners and upstreams the operator's. So the number of series has
a bound that no client can move.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from otel_smtp.observing import (
    ConnectionRecord,
    DeliveryRecord,
    Fate,
    Faults,
    MessageKind,
    Observer,
    Outcome,
    TransactionRecord,
)
from otel_smtp.smtp.replies import AUTH_FAILED, Reply
from otel_smtp.smtp.states import LEGAL, LEVELS, ConnState, Transition
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import Metric
from otel_smtp.telemetry.collector import Signal
from otel_smtp.telemetry.environment import ExemplarFilter
from otel_smtp.telemetry.expected_replies import EXPECTED_REPLIES
from otel_smtp.telemetry.exporting import DropReason
from otel_smtp.telemetry.gauges import (
    ConnectionCounts,
    OpenConnections,
    ReceiverCounts,
    SharedQueueFigures,
    SpoolCounts,
    StoreTimings,
)
from otel_smtp.telemetry.measurements import LabelledCounts, Labels, Measurements
from otel_smtp.telemetry.propagation import SAMPLED, TraceContext
from otel_smtp.telemetry.sampling import Identity
from otel_smtp.telemetry.span_attributes import is_probe

if TYPE_CHECKING:
    from otel_smtp.telemetry.metrics_page import MetricsPage

logger: Final = logging.getLogger("otel_smtp.telemetry.metrics")

T = TypeVar("T")
Numbers = Iterator[tuple[Metric, list[tuple[Labels, float]]]]

# A look-up is quicker than `value`, which is a descriptor in Python.
_NAMES: Final[Mapping[ConnState, str]] = {state: state.value for state in ConnState}
_STATE_LABELS: Final[Mapping[ConnState, Labels]] = {state: (state.value,) for state in ConnState}
_AUTH: Final = ConnState.AUTH
_OUTCOMES: Final[Mapping[Outcome, str]] = {outcome: outcome.value for outcome in Outcome}
_ACCEPTED, _REFUSED = "accepted", "refused"
_REFUSED_FATE, _DEFERRED_FATE = (Fate.REFUSED.value,), (Fate.DEFERRED.value,)
_RELAYED, _PARTLY = (Outcome.RELAYED.value,), (Outcome.PARTLY_RELAYED.value,)
_QUEUED: Final = (Outcome.QUEUED.value,)
# Looked up in its class, a member costs as much as a call.
_RELAYED_OUTCOME: Final = Outcome.RELAYED
_QUEUED_OUTCOME: Final = Outcome.QUEUED
_MAIL: Final = MessageKind.MAIL
_NO_VERB: Final = "none"
_OF_A_MAIL: Final = 4
# Transitions of a busy connection counted in one go: sixty mails, some 60 us.
_COUNTED_AT_ONCE: Final = 240
# Connections visited in one go: each may have that many.
_CONNECTIONS_A_STEP: Final = 16
# Likewise for ordinary mails.
_MAILS_COUNTED_AT_ONCE: Final = 50


class _Measured(NamedTuple):
    """The measurements of one ordinary mail, which was relayed to all of its recipients, by its first attempt.

    Attributes:
        delivered_ns, ended_ns: when the attempt and the transaction ended, since the epoch.
        context: a span in whose trace it can be seen; None: there is none.
    """

    duration_ns: int
    octets: int
    pool_wait_ns: int
    delivery_ns: int
    recipients: int
    delivered_ns: int
    ended_ns: int
    context: TraceContext | None


class _MeasuredQueued(NamedTuple):
    """Likewise for the transaction of an ordinary mail that was queued."""

    duration_ns: int
    octets: int
    recipients: int
    ended_ns: int
    context: TraceContext | None


class _MeasuredAttempt(NamedTuple):
    """Likewise for the first attempt at a queued mail, by which it was relayed to all of its recipients.

    Attributes:
        waited_seconds: since its acceptance, when the attempt began.
    """

    pool_wait_ns: int
    delivery_ns: int
    waited_seconds: float
    recipients: int
    ended_ns: int
    context: TraceContext | None


_measured: Final = partial(tuple.__new__, _Measured)  # its own constructor is a function in Python
_measured_queued: Final = partial(tuple.__new__, _MeasuredQueued)
_measured_attempt: Final = partial(tuple.__new__, _MeasuredAttempt)


def _checked(metric: Metric, rows: list[tuple[Labels, float]]) -> Numbers:
    """A metric as it is, if its rows can be encoded.

    Raises:
        TypeError, ValueError: they cannot.
    """
    for labels, value in rows:
        if len(labels) != len(metric.labels) or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"labels of {metric.name}")
        float(value)
    yield metric, rows


def _taken(noted: list[T]) -> list[T]:
    """Take all notes: a fault in counting them must not recur with each mail."""
    taken = noted[:]
    noted.clear()
    return taken


# Up to this many transitions, or replies, are counted one by one: the connection's own, and those of one mail.
_FEW: Final = 12


def _by_place_in_mail(*columns: Sequence[Any]) -> Iterator[tuple[Sequence[Any], ...]]:
    """`columns` in parts, each of every fourth row: a mail that goes well is four transitions and four replies, so that
    most often all rows of a part are alike."""
    for first in range(min(_OF_A_MAIL, len(columns[0]))):
        yield tuple([column[first::_OF_A_MAIL] for column in columns])


# Of a span's flags, and this one that all have: those that make a measurement an exemplar.
_UNSAMPLED: Final = 1 << 8
_EXEMPLAR_FLAGS: Final[Mapping[ExemplarFilter, int]] = {
    ExemplarFilter.TRACE_BASED: SAMPLED,
    ExemplarFilter.ALWAYS_ON: _UNSAMPLED,
    ExemplarFilter.ALWAYS_OFF: 0,
}


class Metrics(Observer):
    """Counts everything that happens, and gives it out as Prometheus text. To be notified after tracing.

    Args:
        open_connections: asked on the event loop.
        connections: connections to upstreams now.
        spool: messages in the spool by state, the age of the oldest in seconds, and the octets of the disk that it
            holds for messages that have ended; None without a spool.
        shared_queue: None without a spool, or if it is this gateway's alone.
        store_timings: of the spool, asked on the event loop. `store_verbs`: its verbs.
        receivers: those of outcomes now.
        dropped: what telemetry itself has lost so far: signal, reason, how many.
        resource: our identity, by attribute, for the page.
        exemplars: which measurements name a span.
        listeners, upstreams, limits: their configured names, whose series exist from the start, as do those of
            `mechanisms`.

    Attributes:
        measurements: all histograms.
        unreadable: the metrics that could not be read when they were last: their names, or those of their group.
    """

    def __init__(
        self,
        *,
        open_connections: OpenConnections = tuple,
        connections: ConnectionCounts = tuple,
        spool: SpoolCounts = lambda: None,
        shared_queue: SharedQueueFigures = lambda: None,
        store_timings: StoreTimings = tuple,
        store_verbs: Sequence[str] = (),
        receivers: ReceiverCounts = tuple,
        dropped: ConnectionCounts = tuple,
        resource: Mapping[str, object] | None = None,
        exemplars: ExemplarFilter = ExemplarFilter.TRACE_BASED,
        listeners: Sequence[str] = (),
        upstreams: Sequence[str] = (),
        limits: Sequence[str] = (),
        mechanisms: Sequence[str] = (),
    ) -> None:
        self._exemplar_flags = _EXEMPLAR_FLAGS[exemplars]
        self._names_unsampled = exemplars is ExemplarFilter.ALWAYS_ON
        self._open_connections = open_connections
        self._connections = connections
        self._spool = spool
        self._shared_queue = shared_queue
        self._store_timings = store_timings
        self._receivers = receivers
        self._dropped = dropped
        self.resource = {name.replace(".", "_"): str(value) for name, value in (resource or {}).items()}
        self._noted: defaultdict[str, list[_Measured]] = defaultdict(list)  # by upstream, and not counted yet
        self._noted_queued: list[_MeasuredQueued] = []
        self._noted_attempts: defaultdict[str, list[_MeasuredAttempt]] = defaultdict(list)
        self._active: dict[Labels, int] = {}
        self._transitions: Counter[tuple[ConnState | None, ConnState]] = Counter()
        self._replies: Counter[tuple[str | None, int]] = Counter(
            {(verb, code): 0 for verb, codes in EXPECTED_REPLIES.items() for code in codes}
        )
        self._transactions = LabelledCounts(names.TRANSACTIONS)
        self._recipients = LabelledCounts(names.SERVER_RECIPIENTS)
        self._auth = LabelledCounts(names.SERVER_AUTH)
        self._refused = LabelledCounts(names.REFUSED)
        self._probes = LabelledCounts(names.PROBES)
        self._possible_duplicates = 0
        self._connection_duration = Measurements(names.SERVER_CONNECTION_DURATION)
        self._state_duration = Measurements(names.STATE_DURATION)
        self._transaction_duration = Measurements(names.TRANSACTION_DURATION)
        self._message_size = Measurements(names.SERVER_MESSAGE_SIZE)
        self._delivery_duration = Measurements(names.DELIVERY_DURATION)
        self._pool_wait = Measurements(names.CLIENT_POOL_WAIT)
        self._pace_wait = Measurements(names.CLIENT_PACE_WAIT)
        self._first_attempt_age = Measurements(names.FIRST_ATTEMPT_AGE)
        self._delivery_age = Measurements(names.DELIVERY_AGE)
        self._store = Measurements(names.SPOOL_STORE)
        self._group_size = Measurements(names.SPOOL_GROUP_SIZE)
        self.measurements: Final = (
            self._connection_duration,
            self._state_duration,
            self._transaction_duration,
            self._message_size,
            self._delivery_duration,
            self._pool_wait,
            self._pace_wait,
            self._first_attempt_age,
            self._delivery_age,
            *((self._store, self._group_size) if store_verbs else ()),
        )
        self.unreadable: set[str] = set()
        self._faults = Faults(logger, "metrics incomplete: internal error")
        self._page: MetricsPage | None = None  # made when it is first asked for
        self._begin(listeners, upstreams, mechanisms)
        for limit in limits:
            self._pace_wait.series[(limit,)]
        for verb in store_verbs:
            self._store.series[(verb,)]
            self._group_size.series[()]

    def _begin(self, listeners: Sequence[str], upstreams: Sequence[str], mechanisms: Sequence[str]) -> None:
        """Begin every series whose labels are known with 0: a series that is born at 1 has no increase.

        Replies are counted as they occur: most of the pairs of a verb and a code exist for no mail.
        """
        self._transitions[None, ConnState.NEW] = 0
        for previous, following in LEGAL.items():
            for state in ConnState:  # in their order: that of a set is another one in each process
                if state in following:
                    self._transitions[previous, state] = 0
        for state in ConnState:
            if LEGAL[state]:
                self._state_duration.series[_STATE_LABELS[state]]
        for fate in Fate:
            self._recipients.values[(fate.value,)] = 0
        for outcome in _OUTCOMES.values():
            if outcome != Outcome.PARTLY_RELAYED:  # of which each recipient is one or the other
                self._recipients.values[(outcome,)] = 0
            self._transactions.values[(outcome,)] = 0
            self._transaction_duration.series[(outcome,)]
            for upstream in upstreams:
                if outcome != Outcome.QUEUED:  # which no attempt is
                    self._delivery_duration.series[upstream, outcome]
        self._message_size.series[()]
        for upstream in upstreams:
            self._pool_wait.series[(upstream,)]
            self._first_attempt_age.series[(upstream,)]
            self._delivery_age.series[(upstream,)]
        for mechanism in (*mechanisms, "other"):
            for result in (_ACCEPTED, _REFUSED):
                self._auth.values[mechanism, result] = 0
        for reason in ("capacity", "client_limit", "gave_way"):
            self._refused.values[(reason,)] = 0
        for listener in listeners:
            self._probes.values[(listener,)] = 0
            self._connection_duration.series[(listener,)]
            self._active |= {(listener, _NAMES[level]): 0 for level in LEVELS}

    # What happened -------------------------------------------------------------------------------------------------

    def connection_refused(self, reason: str) -> None:
        """Count it."""
        self._refused.add((reason,))

    def segment_ended(self, connection: ConnectionRecord) -> None:
        """Count what the segment holds."""
        self._fold(connection)

    def connection_closed(self, connection: ConnectionRecord) -> None:
        """Count what the last segment holds, and the connection."""
        self._fold(connection)
        listener = connection.listener
        labels = (listener,)
        if (listener, _NAMES[ConnState.NEW]) not in self._active:
            self._active |= {(listener, _NAMES[level]): 0 for level in LEVELS}  # there all the same, and none
        self._connection_duration.series[labels].add((connection.end.at_ns - connection.opened_ns) / 1e9)
        if is_probe(connection):
            self._probes.add(labels)

    def transactions_settled(self, transactions: Sequence[TransactionRecord]) -> None:
        """Count them, and their deliveries that are over."""
        for transaction in transactions:
            try:
                self._count(transaction)
            except Exception:  # noqa: BLE001 - logged once; the others are counted
                self._faults.note("transaction")

    def _count(self, transaction: TransactionRecord) -> None:
        connection = transaction.connection
        if connection is not None and len(connection.transitions) - connection.counted_transitions >= _COUNTED_AT_ONCE:
            self._fold(connection)
        trace: Identity | None = transaction.trace
        if trace is None and connection is not None and self._names_unsampled:
            trace = connection.trace  # it is in the same trace
        context = None if trace is None else trace.context
        if context is not None and not (context.flags | _UNSAMPLED) & self._exemplar_flags:
            context = None
        if transaction.outcome is _RELAYED_OUTCOME:
            if self._note(transaction, context):
                return
        elif transaction.outcome is _QUEUED_OUTCOME and self._note_queued(transaction, context):
            return
        if transaction.outcome is not None:
            labels = (_OUTCOMES[transaction.outcome],)
            self._transactions.values[labels] += 1
            self._transaction_duration.series[labels].add(
                (transaction.ended_ns - transaction.begun_ns) / 1e9,
                context,
                transaction.ended_ns + transaction.wall_offset_ns,
            )
            fates = self._recipients.values
            if transaction.refused_count or transaction.deferred_count:
                fates[_REFUSED_FATE] += transaction.refused_count
                fates[_DEFERRED_FATE] += transaction.deferred_count
                if labels == _PARTLY:
                    labels = _RELAYED
            fates[labels] += len(transaction.accepted) - transaction.lost_count
        if transaction.octets is not None:
            unix_ns = transaction.ended_ns + transaction.wall_offset_ns
            self._message_size.series[()].add(transaction.octets, context, unix_ns)
        for delivery in transaction.deliveries:
            if delivery.ended_ns:
                self._measure(delivery, transaction, context)

    def _note(self, transaction: TransactionRecord, context: TraceContext | None) -> bool:
        """Note what was measured of a mail that was relayed, to be counted with others; whether it is ordinary."""
        deliveries, octets = transaction.deliveries, transaction.octets
        if len(deliveries) != 1 or octets is None:
            return False
        delivery = deliveries[0]
        wait_ns = delivery.pool_wait_ns
        if (
            wait_ns is None
            or delivery.outcome is not _RELAYED_OUTCOME
            or delivery.paced is not None
            or transaction.waited_seconds is not None
            or transaction.refused_count
            or transaction.deferred_count
        ):
            return False
        offset, delivered_ns, ended_ns = transaction.wall_offset_ns, delivery.ended_ns, transaction.ended_ns
        noted = self._noted[delivery.upstream]
        noted.append(
            _measured(
                (
                    ended_ns - transaction.begun_ns,
                    octets,
                    wait_ns,
                    delivered_ns - delivery.begun_ns,
                    len(transaction.accepted),
                    delivered_ns + offset,
                    ended_ns + offset,
                    context,
                )
            )
        )
        if len(noted) >= _MAILS_COUNTED_AT_ONCE:
            self._count_noted(delivery.upstream, noted)
        return True

    def _note_queued(self, transaction: TransactionRecord, context: TraceContext | None) -> bool:
        """Likewise for a mail that was queued."""
        octets = transaction.octets
        if octets is None or transaction.deliveries or transaction.refused_count or transaction.deferred_count:
            return False
        ended_ns, noted = transaction.ended_ns, self._noted_queued
        noted.append(
            _measured_queued(
                (
                    ended_ns - transaction.begun_ns,
                    octets,
                    len(transaction.accepted),
                    ended_ns + transaction.wall_offset_ns,
                    context,
                )
            )
        )
        if len(noted) >= _MAILS_COUNTED_AT_ONCE:
            self._count_queued(noted)
        return True

    def _note_attempt(
        self, delivery: DeliveryRecord, transaction: TransactionRecord, context: TraceContext | None
    ) -> bool:
        """Likewise for an attempt at a queued mail."""
        waited, wait_ns = transaction.waited_seconds, delivery.pool_wait_ns
        if (
            waited is None
            or wait_ns is None
            or delivery.outcome is not _RELAYED_OUTCOME
            or delivery.attempt != 1
            or delivery.paced is not None
            or delivery.refused
            or transaction.connection is not None
            or transaction.kind is not _MAIL
            or transaction.is_possible_duplicate
        ):
            return False
        ended_ns, noted = delivery.ended_ns, self._noted_attempts[delivery.upstream]
        noted.append(
            _measured_attempt(
                (
                    wait_ns,
                    ended_ns - delivery.begun_ns,
                    waited,
                    delivery.accepted_count,
                    ended_ns + transaction.wall_offset_ns,
                    context,
                )
            )
        )
        if len(noted) >= _MAILS_COUNTED_AT_ONCE:
            self._count_attempts(delivery.upstream, noted)
        return True

    def _count_queued(self, noted: list[_MeasuredQueued]) -> None:
        """Count ordinary mails that were queued, and note them no more."""
        durations, octets, recipients, ended, contexts = zip(*_taken(noted), strict=True)
        self._transactions.values[_QUEUED] += len(recipients)
        self._recipients.values[_QUEUED] += sum(recipients)
        self._transaction_duration.series[_QUEUED].add_each([ns / 1e9 for ns in durations], contexts, ended)
        self._message_size.series[()].add_each(octets, contexts, ended)

    def _count_attempts(self, upstream: str, noted: list[_MeasuredAttempt]) -> None:
        """Count ordinary attempts at queued mails, likewise."""
        waits, durations, waited, recipients, ended, contexts = zip(*_taken(noted), strict=True)
        self._recipients.values[_RELAYED] += sum(recipients)
        seconds = [ns / 1e9 for ns in durations]
        ages = [before + each for before, each in zip(waited, seconds, strict=True)]
        labels = (upstream,)
        self._pool_wait.series[labels].add_each([ns / 1e9 for ns in waits], contexts, ended)
        self._delivery_duration.series[upstream, *_RELAYED].add_each(seconds, contexts, ended)
        self._first_attempt_age.series[labels].add_each(waited, contexts, ended)
        self._delivery_age.series[labels].add_each(ages, contexts, ended)

    def _count_noted(self, upstream: str, noted: list[_Measured]) -> None:
        """Count ordinary mails, and note them no more."""
        durations, octets, waits, deliveries, recipients, delivered, ended, contexts = zip(*_taken(noted), strict=True)
        self._transactions.values[_RELAYED] += len(recipients)
        self._recipients.values[_RELAYED] += sum(recipients)
        self._transaction_duration.series[_RELAYED].add_each([ns / 1e9 for ns in durations], contexts, ended)
        self._message_size.series[()].add_each(octets, contexts, ended)
        self._pool_wait.series[(upstream,)].add_each([ns / 1e9 for ns in waits], contexts, delivered)
        series = self._delivery_duration.series[upstream, *_RELAYED]
        series.add_each([ns / 1e9 for ns in deliveries], contexts, delivered)

    def deliveries_settled(self, deliveries: Sequence[DeliveryRecord]) -> None:
        """Count attempts that outlived their transactions."""
        for delivery in deliveries:
            try:
                transaction = delivery.transaction
                trace: Identity | None = transaction.trace
                context = None if trace is None else trace.context
                if context is not None and not (context.flags | _UNSAMPLED) & self._exemplar_flags:
                    context = None
                if self._note_attempt(delivery, transaction, context):
                    continue
                self._measure(delivery, transaction, context)
                self._possible_duplicates += transaction.is_possible_duplicate
                if transaction.connection is None and transaction.kind is MessageKind.MAIL:
                    self._count_ended(delivery)
            except Exception:  # noqa: BLE001 - logged once; the others are counted
                self._faults.note("delivery")

    def spool_acted(self, transaction: TransactionRecord) -> None:
        """Count the recipients that ended, or wait for an operator."""
        if transaction.kind is MessageKind.MAIL:
            for one in transaction.refused:
                self._recipients.add((one.fate.value,))

    def _count_ended(self, delivery: DeliveryRecord) -> None:
        """Count the recipients of a queued mail that ended by an attempt; those that are deferred have not ended."""
        if delivery.outcome is Outcome.RELAYED or delivery.outcome is Outcome.PARTLY_RELAYED:
            self._recipients.add(_RELAYED, delivery.accepted_count)
        for one in delivery.refused:
            if one.fate is not Fate.DEFERRED:
                self._recipients.add((one.fate.value,))

    def _measure(self, delivery: DeliveryRecord, transaction: TransactionRecord, context: TraceContext | None) -> None:
        unix_ns = delivery.ended_ns + transaction.wall_offset_ns
        upstream = delivery.upstream
        if delivery.pool_wait_ns is not None:
            self._pool_wait.series[(upstream,)].add(delivery.pool_wait_ns / 1e9, context, unix_ns)
        if delivery.paced is not None:
            limit, wait_ns = delivery.paced
            self._pace_wait.series[(limit,)].add(wait_ns / 1e9, context, unix_ns)
        if delivery.outcome is not None:
            seconds = (delivery.ended_ns - delivery.begun_ns) / 1e9
            self._delivery_duration.series[upstream, _OUTCOMES[delivery.outcome]].add(seconds, context, unix_ns)
            waited = transaction.waited_seconds
            if waited is not None:
                labels = (upstream,)
                if delivery.attempt == 1:
                    self._first_attempt_age.series[labels].add(waited, context, unix_ns)
                if delivery.outcome is Outcome.RELAYED:
                    self._delivery_age.series[labels].add(waited + seconds, context, unix_ns)

    def _fold(self, connection: ConnectionRecord) -> None:
        """Count the transitions and replies of the present segment that have not been counted."""
        transitions, replies = connection.transitions, connection.replies
        counted, counted_replies = connection.counted_transitions, connection.counted_replies
        if len(transitions) == counted and len(replies) == counted_replies:
            return
        connection.counted_transitions, connection.counted_replies = len(transitions), len(replies)
        before, new = (transitions[counted - 1] if counted else None), transitions[counted:]
        if before is None and connection.earlier:
            before = connection.earlier[-1]
        if before is None and new:
            before, *new = new  # New, which follows nothing
            self._transitions[before.previous, before.state] += 1
        if before is not None and new:
            self._count_transitions(before, new)
        if said := replies[counted_replies:]:
            self._count_replies(said)

    def _count_transitions(self, before: Transition, new: Sequence[Transition]) -> None:
        """Count transitions, and how long the states lasted that they ended; `before` is counted already."""
        if len(new) > _FEW:
            has_auth = self._count_many(before, new)
        else:
            has_auth, from_ns = False, before.at_ns
            counts, series = self._transitions, self._state_duration.series
            for state, left, _, _, to_ns, _ in new:
                counts[left, state] += 1
                assert left is not None  # as that of New alone is
                series[_STATE_LABELS[left]].add((to_ns - from_ns) / 1e9)
                from_ns = to_ns
                has_auth = has_auth or left is _AUTH
        if has_auth:
            for auth, then in pairwise((before, *new)):
                if auth.state is _AUTH:
                    self._count_auth(auth, then)

    def _count_many(self, before: Transition, new: Sequence[Transition]) -> bool:
        """Likewise for many, mostly of similar mails; returns whether an AUTH exchange is among them."""
        states, left, _, _, moments, _ = zip(*new, strict=True)
        lasted = [(to_ns - from_ns) / 1e9 for from_ns, to_ns in pairwise((before.at_ns, *moments))]
        durations: defaultdict[ConnState, list[float]] = defaultdict(list)
        for column, left_column, seconds in _by_place_in_mail(states, left, lasted):
            if column.count(column[0]) == left_column.count(left_column[0]) == len(column):
                self._transitions[left_column[0], column[0]] += len(column)
                durations[left_column[0]] += seconds
            else:
                self._transitions.update(zip(left_column, column, strict=True))
                for state, seconds_of_one in zip(left_column, seconds, strict=True):
                    durations[state].append(seconds_of_one)
        for state, seconds in durations.items():
            self._state_duration.series[_STATE_LABELS[state]].add_all(seconds)
        return _AUTH in durations

    def _count_replies(self, said: Sequence[tuple[str | None, Reply]]) -> None:
        """Count replies by verb and code."""
        if len(said) <= _FEW:
            for verb, reply in said:
                self._replies[verb, reply.code] += 1
            return
        for verbs, codes in _by_place_in_mail([verb for verb, _ in said], [reply.code for _, reply in said]):
            if verbs.count(verbs[0]) == codes.count(codes[0]) == len(verbs):
                self._replies[verbs[0], codes[0]] += len(verbs)
            else:
                self._replies.update(zip(verbs, codes, strict=True))

    def _count_auth(self, auth: Transition, then: Transition) -> None:
        """Count an exchange that is over; one that could not be judged was neither accepted nor refused."""
        if auth.mechanism is not None:
            if then.state is ConnState.ACTIVE:
                self._auth.add((auth.mechanism, _ACCEPTED))
            elif then.reply_code == AUTH_FAILED.code:
                self._auth.add((auth.mechanism, _REFUSED))

    # Output --------------------------------------------------------------------------------------------------------

    def count_mails(self) -> None:
        """Count the ordinary mails that are only noted. On the event loop; `catch_up` does it too."""
        for upstream, noted in self._noted.items():
            if noted:
                self._count_noted(upstream, noted)
        if self._noted_queued:
            self._count_queued(self._noted_queued)
        for upstream, attempts in self._noted_attempts.items():
            if attempts:
                self._count_attempts(upstream, attempts)

    def catch_up(self) -> None:
        """Count what was noted of mails, what open connections, and the spool's store, have done so far, and how many
        connections there are in which state.

        On the event loop, which writes the records. `page` does it by itself; for readers in other threads it is
        called every few seconds.
        """
        for _ in self.catching_up():
            pass

    def catching_up(self) -> Iterator[None]:
        """`catch_up` in steps, between which mail may go on: of thousands of connections it takes milliseconds."""
        self._try("ordinary mails", self.count_mails)
        active = dict.fromkeys(self._active, 0)

        def look_at(connection: ConnectionRecord) -> None:
            self._fold(connection)
            last = (connection.transitions or connection.earlier)[-1:]
            level = last[0].level if last else ConnState.NEW
            if level is not ConnState.CLOSED:
                labels = (connection.listener, _NAMES[level])
                active[labels] = active.get(labels, 0) + 1

        for looked_at, connection in enumerate(self._readable("open connections", self._open_connections), start=1):
            self._try("open connection", partial(look_at, connection))
            if looked_at % _CONNECTIONS_A_STEP == 0:
                yield
        self._active = active
        for verb, seconds, items in self._readable("store timings", self._store_timings):
            self._store.series[(verb,)].add(seconds)
            if items:
                self._group_size.series[()].add(items)

    def _try(self, about: str, count: Callable[[], None]) -> None:
        """Count, as far as that can be done."""
        try:
            count()
        except Exception:  # noqa: BLE001 - logged once; the others are counted
            self._faults.note(about)

    def _readable(self, about: str, read: Callable[[], Iterable[T]]) -> Sequence[T]:
        """What `read` gives; nothing if it cannot be read, which is noted then."""
        try:
            found = [*read()]
        except Exception:  # noqa: BLE001 - logged once; the others are read
            self._faults.note(about)
            self.unreadable.add(about)
            return ()
        self.unreadable.discard(about)
        return found

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics page for a scraper that accepts `accept`, and its content type (OpenMetrics where asked for).

        On the event loop.
        """
        self.catch_up()
        if self._page is None:
            from otel_smtp.telemetry.metrics_page import MetricsPage  # no greeting waits for its library

            self._page = MetricsPage(self)
        return self._page.encode(accept)

    def numbers(self) -> Numbers:
        """Everything but the histograms, as of the latest `catch_up`: each counter and gauge with its rows. What cannot
        be read is left out.

        For any thread.
        """
        for about, read in (
            ("smtp.server", self._read_counts),
            (names.CLIENT_CONNECTIONS.name, self._read_upstreams),
            (names.SPOOL_MESSAGES.name, self._read_spool),
            ("smtp.notify", self._read_receivers),
            (names.TELEMETRY_DROPPED.name, self._read_dropped),
        ):
            for metric, rows in self._readable(about, read):
                yield from self._readable(metric.name, partial(_checked, metric, rows))

    def histograms(self, made: Callable[[Measurements], T]) -> Iterator[T]:
        """What `made` makes of each histogram; those of which it can make nothing are left out. For any thread."""
        for measured in self.measurements:
            yield from self._readable(measured.metric.name, partial(map, made, (measured,)))

    def _read_counts(self) -> Numbers:
        yield (
            names.TRANSITIONS,
            [
                ((_NAMES[previous] if previous is not None else "", _NAMES[state]), count)
                for (previous, state), count in list(self._transitions.items())
            ],
        )
        yield (
            names.REPLIES,
            [((verb or _NO_VERB, str(code)), count) for (verb, code), count in list(self._replies.items())],
        )
        for counts in (self._transactions, self._recipients, self._auth, self._refused, self._probes):
            yield counts.metric, list(counts.values.items())
        yield names.ACTIVE_CONNECTIONS, list(self._active.items())

    def _read_upstreams(self) -> Numbers:
        yield names.CLIENT_CONNECTIONS, [((upstream, state), n) for upstream, state, n in self._connections()]

    def _read_spool(self) -> Numbers:
        if (spool := self._spool()) is None:
            return
        states, oldest_age_seconds, dead_octets = spool
        shared = self._shared_queue()
        if shared is None or shared.tells_messages:
            yield names.SPOOL_MESSAGES, [((state,), count) for state, count in states.items()]
        yield names.SPOOL_AGE, [((), oldest_age_seconds)]
        yield names.SPOOL_POSSIBLE_DUPLICATES, [((), self._possible_duplicates)]
        if shared is None:
            yield names.SPOOL_DEAD, [((), dead_octets)]
        else:
            yield names.SPOOL_GATEWAYS, [((), shared.gateways)]
            yield names.SPOOL_AWAY, [((), shared.away_seconds)]
            yield names.SPOOL_TAKEN_OVER, [((), shared.taken_over)]
            yield names.SPOOL_STALE, [((), shared.stale)]
            yield names.SPOOL_UNANSWERED, [((), shared.unanswered)]

    def _read_receivers(self) -> Numbers:
        receivers = list(self._receivers())
        if not receivers:
            return
        yield (
            names.NOTIFY_OUTCOMES,
            [((name, result), n) for name, by_result, _, _ in receivers for result, n in by_result.items()],
        )
        yield names.NOTIFY_PENDING, [((name,), pending) for name, _, pending, _ in receivers]
        yield names.NOTIFY_AGE, [((name,), age_seconds) for name, _, _, age_seconds in receivers]

    def _read_dropped(self) -> Numbers:
        lost = {(signal.value, reason.value): 0 for signal in Signal for reason in DropReason}
        for signal, reason, count in self._dropped():
            lost[signal, reason] = lost.get((signal, reason), 0) + count
        yield names.TELEMETRY_DROPPED, list(lost.items())
