"""State transitions and phases of deliveries as events: which attributes each has, and where state events go.

`describe_transition` and `describe_phase` say what an event consists of; it is encoded, or made a value, of that alone.
The span event API of OpenTelemetry is being retired in favour of log-based events; this module and its two callers in
`tracing` are what that will change.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from operator import itemgetter
from typing import Any, Final, NamedTuple

from otel_smtp.observing import DeliveryPhase, DeliveryRecord
from otel_smtp.smtp.replies import Reply
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
from otel_smtp.telemetry.otlp import pack_time
from otel_smtp.telemetry.records import EventRecord
from otel_smtp.telemetry.shapes import (
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


def enhanced_row(reply: Reply) -> tuple[int, int, int] | None:
    """The enhanced code of `reply` as a value of a row."""
    status = reply.enhanced
    return None if status is None else (status.klass, status.subject, status.detail)


def _dotted(code: tuple[int, int, int]) -> str:
    return "{}.{}.{}".format(*code)


ENHANCED_CODE: Final = Column(names.REPLY_ENHANCED_CODE, _dotted)


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
    return _Kind(
        ShapeTable((names.STATE, names.STATE_PREVIOUS, names.STATE_LEVEL, *header), make), constant, varying
    )


def _error(detail: ErrorReply) -> Row:
    reply = detail.reply
    code, enhanced = (None, None) if reply is None else (reply.code, enhanced_row(reply))
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


def describe_transition(transition: Transition) -> tuple[EventShape, tuple[int, ...]]:
    """What the event of `transition` consists of: its shape, and values for the shape's varying attributes.

    Beside these, each has its sequence and, but for New, the seconds since the transition before.
    """
    state, previous, level, _, _, detail = transition
    shapes, constant, varying = _KINDS[detail.__class__]
    row: Row = (state, previous, level) if constant is None else (state, previous, level, *constant(detail))
    return shapes[row], () if varying is None else varying(detail)


def state_event(
    transition: Transition, before_ns: int | None, wall_offset_ns: int, more: Iterable[Pair] = ()
) -> EventRecord:
    """The event that tells `transition`, as a value.

    Args:
        before_ns: when the transition before it was; None on New.
        more: attributes of the state's row that the transition does not carry (addresses, octets).
    """
    shape, values = describe_transition(transition)
    attributes: dict[str, AttributeValue] = {**shape.constant, names.STATE_SEQUENCE: transition.sequence}
    if before_ns is not None:
        attributes[names.STATE_PREVIOUS_DURATION] = (transition.at_ns - before_ns) / 1e9
    attributes.update(zip(shape.varying, values, strict=True))
    attributes.update(more)
    return EventRecord(transition.at_ns + wall_offset_ns, shape.name, attributes)


# These have attributes that their transition does not carry: addresses, octets.
WITH_MORE: Final = frozenset({ConnState.NEW, ConnState.CLOSED})
_sequence: Final = event_integers(names.STATE_SEQUENCE)


def encode_states(
    transitions: Iterable[Transition],
    before_ns: int | None,
    wall_offset_ns: int,
    more: Callable[[Transition], Sequence[Pair]],
) -> list[bytes]:
    """The events that tell `transitions`, as pieces of their span; else as `state_event`.

    Args:
        more: what a state in `WITH_MORE` has beside what its transition carries.
    """
    pieces: list[bytes] = []
    for transition in transitions:
        shape, values = describe_transition(transition)
        at_ns = transition.at_ns
        octets = shape.octets + _sequence(transition.sequence)
        if before_ns is not None:
            octets += EVENT_PAIRS[names.STATE_PREVIOUS_DURATION, (at_ns - before_ns) / 1e9]
        for integers, value in zip(shape.integers, values, strict=True):
            octets += integers(value)
        if transition.state in WITH_MORE:
            octets += b"".join(map(EVENT_PAIRS.__getitem__, more(transition)))
        pieces += (before_time(len(octets)), pack_time(at_ns + wall_offset_ns), octets)
        before_ns = at_ns
    return pieces


# Phases ------------------------------------------------------------------------------------------------------------


def _phase_shape(row: Row, attributes: names.Attributes) -> EventShape:
    phase = row[0]
    assert isinstance(phase, DeliveryPhase)
    return EventShape(names.PHASE_EVENTS[phase], attributes)


_PHASES: Final = ShapeTable((None, names.REPLY_CODE, ENHANCED_CODE), _phase_shape)


def describe_phase(phase: DeliveryPhase, reply: Reply | None) -> EventShape:
    """What the event consists of that tells the end of a phase; the wait for a connection has `pool_pairs` beside."""
    if reply is None:
        return _PHASES[phase, None, None]
    status = reply.enhanced
    return _PHASES[
        phase, reply.code, None if status is None else (status.klass, status.subject, status.detail)
    ]


def pool_pairs(delivery: DeliveryRecord) -> tuple[Pair, ...]:
    """What the wait for a connection tells; nothing while none was at hand."""
    if delivery.pool_wait_ns is None:
        return ()
    return (names.POOL_WAIT, delivery.pool_wait_ns / 1e9), (names.POOL_REUSED, delivery.is_reused)


def phase_events(delivery: DeliveryRecord) -> Iterator[EventRecord]:
    """The phases of a delivery, as values."""
    offset = delivery.transaction.wall_offset_ns
    for at_ns, phase, reply in delivery.phases:
        shape = describe_phase(phase, reply)
        more = pool_pairs(delivery) if phase is DeliveryPhase.POOL else ()
        yield EventRecord(at_ns + offset, shape.name, {**shape.constant, **dict(more)})


def encode_phases(delivery: DeliveryRecord) -> list[bytes]:
    """The phases of a delivery, as pieces of its span."""
    offset = delivery.transaction.wall_offset_ns
    pieces: list[bytes] = []
    for at_ns, phase, reply in delivery.phases:
        shape = describe_phase(phase, reply)
        if phase is DeliveryPhase.POOL:
            pieces.append(encode_event(at_ns + offset, shape, pool_pairs(delivery)))
        else:
            pieces += (shape.before, pack_time(at_ns + offset), shape.octets)
    return pieces
