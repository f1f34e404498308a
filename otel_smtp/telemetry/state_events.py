"""State transitions and phases of deliveries as events: which attributes each has, and where state events go.

`describe_transitions` and `describe_phases` say what an event consists of; its octets, and its value, are made of that
alone.
The span event API of OpenTelemetry is being retired in favour of log-based events; this module and its two callers in
`tracing` are what that will change.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from operator import itemgetter
from typing import Any, Final, NamedTuple

from otel_smtp.observing import DeliveryPhase, DeliveryRecord
from otel_smtp.smtp.states import (
    AuthBegun,
    ConnectionOver,
    ConnState,
    ContentBegun,
    ErrorReply,
    ResetBy,
    TlsAgreed,
    TlsOffer,
    TransactionOver,
    Transition,
)
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import AttributeValue
from otel_smtp.telemetry.otlp import pack_double, pack_time
from otel_smtp.telemetry.records import EventRecord
from otel_smtp.telemetry.shapes import (
    BEFORE_TIME,
    EVENT_PAIRS,
    Column,
    EventShape,
    Pair,
    Row,
    ShapeTable,
    before_time,
    encode_event,
    event_integers,
)


class StateEvents(StrEnum):
    """Where state events go."""

    SPAN = "span"  # events of the connection's span
    LOG = "log"  # log records that name the span
    BOTH = "both"

    @property
    def on_span(self) -> bool:
        """Whether the span has them."""
        return self is not StateEvents.LOG

    @property
    def in_log(self) -> bool:
        """Whether the log has them."""
        return self is not StateEvents.SPAN


ENHANCED_CODE: Final = Column(names.REPLY_ENHANCED_CODE, str)


# Transitions -------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """Transitions with one kind of detail.

    Attributes:
        constant, varying: the parts of a detail that belong to the shape and that vary; None: there is none.
    """

    shapes: ShapeTable[EventShape]
    constant: Callable[[Any], Row] | None
    varying: Callable[[Any], tuple[int, ...]] | None


def _kind(
    header: Sequence[Column | str] = (),
    constant: Callable[[Any], Row] | None = None,
    varying_names: Sequence[str] = (),
    varying: Callable[[Any], tuple[int, ...]] | None = None,
) -> _Kind:
    def make(row: Row, attributes: names.Attributes) -> EventShape:
        return EventShape(names.STATE_EVENTS[row[0]], attributes, varying_names)  # type: ignore[index]  # see below

    # The first three columns are those of every transition.
    return _Kind(ShapeTable((names.STATE, names.STATE_PREVIOUS, names.STATE_LEVEL, *header), make), constant, varying)


def _error(detail: ErrorReply) -> Row:
    reply = detail.reply
    code, enhanced = (None, None) if reply is None else (reply.code, reply.enhanced)
    return detail.verb, code, enhanced, detail.error_type


_KINDS: Final[dict[type, _Kind]] = {
    type(None): _kind(),
    TlsOffer: _kind((names.TLS_MODE,), tuple),
    TlsAgreed: _kind((names.TLS_PROTOCOL_VERSION, names.TLS_CIPHER), tuple),
    AuthBegun: _kind((names.AUTH_MECHANISM,), tuple),
    ContentBegun: _kind(varying_names=(names.TRANSACTION_NUMBER, names.RECIPIENT_COUNT), varying=tuple),
    TransactionOver: _kind(varying_names=(names.CONNECTION_MESSAGES,), varying=tuple),
    ResetBy: _kind((names.RESET_CAUSE,), tuple),
    ErrorReply: _kind((names.VERB, names.REPLY_CODE, ENHANCED_CODE, names.ERROR_TYPE), _error),
    ConnectionOver: _kind(
        (names.CLOSE_REASON,), itemgetter(slice(0, 1)), (names.CONNECTION_MESSAGES,), itemgetter(slice(1, 2))
    ),
}


def describe_transitions(
    transitions: Iterable[Transition],
) -> list[tuple[Transition, EventShape, tuple[int, ...]]]:
    """What the events of `transitions` consist of: each with its shape, and values for what varies in that.

    Beside these, each has its sequence and, but for New, the seconds since the transition before.
    """
    described = []
    for transition in transitions:
        state, previous, level, _, _, detail = transition
        shapes, constant, varying = _KINDS[detail.__class__]
        row: Row = (state, previous, level) if constant is None else (state, previous, level, *constant(detail))
        described.append((transition, shapes[row], () if varying is None else varying(detail)))
    return described


def state_events(
    transitions: Iterable[Transition],
    before_ns: int | None,
    wall_offset_ns: int,
    more: Callable[[Transition], Iterable[Pair]],
) -> list[EventRecord]:
    """The events that tell `transitions`, as values.

    Args:
        before_ns: when the transition before the first of them was; None if that is New.
        more: attributes that a state in `WITH_MORE` has beside what its transition carries.
    """
    events = []
    for transition, shape, values in describe_transitions(transitions):
        attributes: dict[str, AttributeValue] = {**shape.constant, names.STATE_SEQUENCE: transition.sequence}
        if before_ns is not None:
            attributes[names.STATE_PREVIOUS_DURATION] = (transition.at_ns - before_ns) / 1e9
        attributes.update(zip(shape.varying, values, strict=True))
        if transition.state in WITH_MORE:
            attributes.update(more(transition))
        events.append(EventRecord(transition.at_ns + wall_offset_ns, shape.name, attributes))
        before_ns = transition.at_ns
    return events


# These have attributes that their transition does not carry, or not as they may be shown: addresses, octets, words.
WITH_MORE: Final = frozenset({ConnState.NEW, ConnState.CLOSED, ConnState.ERROR})
_sequences: Final = event_integers(names.STATE_SEQUENCE)
_DURATION: Final = EVENT_PAIRS[names.STATE_PREVIOUS_DURATION, 0.0][:-8]


def encode_states(
    transitions: Iterable[Transition],
    before_ns: int | None,
    wall_offset_ns: int,
    more: Callable[[Transition], Iterable[Pair]],
) -> list[bytes]:
    """The events that tell `transitions`, as pieces of their span; else as `state_events`."""
    pieces: list[bytes] = []
    small = _sequences.small
    for transition, shape, values in describe_transitions(transitions):
        state, _, _, sequence, at_ns, _ = transition
        octets = shape.octets
        octets += small[sequence] if sequence < 0x80 else _sequences(sequence)
        if before_ns is not None:
            octets += _DURATION + pack_double((at_ns - before_ns) / 1e9)
        if values:
            for integers, value in zip(shape.integers, values, strict=True):
                octets += integers(value)
        if state in WITH_MORE:
            octets += b"".join(map(EVENT_PAIRS.__getitem__, more(transition)))
        size = len(octets)
        pieces += (
            BEFORE_TIME[size] if size < 1024 else before_time(size),
            pack_time(at_ns + wall_offset_ns),
            octets,
        )
        before_ns = at_ns
    return pieces


# Recipients, and what went before --------------------------------------------------------------------------------

_SHAPES: Final = {name: EventShape(name, {}) for name in (names.RECIPIENT_EVENT, names.TAKEN_OVER_EVENT)}


def encode_events(events: Iterable[EventRecord]) -> list[bytes]:
    """The events that tell of recipients, or of a gateway that had the mail before, as pieces of their span."""
    return [encode_event(event.time_ns, _SHAPES[event.name], event.attributes.items()) for event in events]


def taken_over_event(time_ns: int, gateway: str, silent_seconds: float) -> EventRecord:
    """The event that says that another gateway had a mail before."""
    return EventRecord(
        time_ns,
        names.TAKEN_OVER_EVENT,
        {names.TAKEN_OVER_FROM: gateway, names.TAKEN_OVER_SILENT: float(silent_seconds)},
    )


# Phases ------------------------------------------------------------------------------------------------------------


def _phase_shape(row: Row, attributes: names.Attributes) -> EventShape:
    phase = row[0]
    assert isinstance(phase, DeliveryPhase)
    return EventShape(names.PHASE_EVENTS[phase], attributes)


_PHASES: Final = ShapeTable((None, names.REPLY_CODE, ENHANCED_CODE), _phase_shape)


def describe_phases(delivery: DeliveryRecord) -> list[tuple[int, EventShape]]:
    """What the events consist of that tell the phases of a delivery: when they are over, and their shapes.

    That of the wait for a connection has `pool_pairs` beside.
    """
    shapes, described = _PHASES, []
    for at_ns, phase, reply in delivery.phases:
        row: Row = (phase, None, None) if reply is None else (phase, reply.code, reply.enhanced)
        described.append((at_ns, shapes[row]))
    return described


def pool_pairs(delivery: DeliveryRecord) -> tuple[Pair, ...]:
    """What the wait for a connection tells; nothing while none was at hand."""
    if delivery.pool_wait_ns is None:
        return ()
    return (names.POOL_WAIT, delivery.pool_wait_ns / 1e9), (names.POOL_REUSED, delivery.is_reused)


def _pace_pairs(delivery: DeliveryRecord) -> tuple[Pair, ...]:
    """Which limit held a delivery back, and for how long."""
    if delivery.paced is None:
        return ()
    name, wait_ns = delivery.paced
    return (names.LIMIT_NAME, name), (names.LIMIT_WAIT, wait_ns / 1e9)


_POOL: Final = names.PHASE_EVENTS[DeliveryPhase.POOL]
_PACED: Final = names.PHASE_EVENTS[DeliveryPhase.PACED]


def phase_events(delivery: DeliveryRecord, pool: Iterable[Pair]) -> list[EventRecord]:
    """The phases of a delivery, as values.

    Args:
        pool: its `pool_pairs`.
    """
    offset = delivery.transaction.wall_offset_ns
    return [
        EventRecord(
            at_ns + offset,
            shape.name,
            {**shape.constant, **dict(pool)}
            if shape.name == _POOL
            else {**shape.constant, **dict(_pace_pairs(delivery))}
            if shape.name == _PACED
            else shape.constant,
        )
        for at_ns, shape in describe_phases(delivery)
    ]


def encode_phases(delivery: DeliveryRecord, pool: Iterable[Pair]) -> list[bytes]:
    """The phases of a delivery, as pieces of its span.

    Args:
        pool: its `pool_pairs`.
    """
    offset = delivery.transaction.wall_offset_ns
    pieces: list[bytes] = []
    for at_ns, shape in describe_phases(delivery):
        if shape.name == _POOL:
            pieces.append(encode_event(at_ns + offset, shape, pool))
        elif shape.name == _PACED:
            pieces.append(encode_event(at_ns + offset, shape, _pace_pairs(delivery)))
        else:
            pieces += (shape.before, pack_time(at_ns + offset), shape.octets)
    return pieces
