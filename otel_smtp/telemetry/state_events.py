"""State transitions and phases of deliveries as events: which attributes each has, and where state events go.

`describe_transitions` and `describe_phases` say what an event consists of; its octets, and its value, are made of that
alone.
The span event API of OpenTelemetry is being retired in favour of log-based events; this module and its two callers in
`tracing` are what that will change.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from otel_smtp.telemetry.otlp import LENGTHS, Mould, length, pack_double, pack_time, varint
from otel_smtp.telemetry.records import EventRecord
from otel_smtp.telemetry.shapes import (
    BEFORE_TIME,
    EVENT_PAIRS,
    MAX_SHAPES,
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
    """The events of `transitions`, as values.

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
    transitions: Sequence[Transition],
    before_ns: int | None,
    wall_offset_ns: int,
    more: Callable[[Transition], Iterable[Pair]],
) -> list[bytes]:
    """The events of `transitions`, as pieces of their span; else as `state_events`."""
    return [
        piece
        for pieces in encode_states_by(len(transitions), transitions, before_ns, wall_offset_ns, more)
        for piece in pieces
    ]


def encode_states_by(
    at_once: int,
    transitions: Sequence[Transition],
    before_ns: int | None,
    wall_offset_ns: int,
    more: Callable[[Transition], Iterable[Pair]],
) -> Iterator[list[bytes]]:
    """The same, the pieces of about `at_once` events at a time."""
    start, most = 0, len(transitions)
    while start < most:
        pieces: list[bytes] = []
        stop = min(start + at_once, most)
        mails = transitions[start : stop - (stop - start) % _OF_A_MAIL]
        if before_ns is not None and (octets := _of_mails(mails, before_ns, wall_offset_ns)) is not None:
            pieces.append(octets)
            start += len(mails)
            before_ns = mails[-1].at_ns
        while start < stop:
            four = transitions[start : start + _OF_A_MAIL]
            if before_ns is not None and (octets := _of_a_mail(four, before_ns, wall_offset_ns)) is not None:
                pieces.append(octets)
                start += _OF_A_MAIL
            else:
                pieces += _encode_states(four[:1], before_ns, wall_offset_ns, more)
                start += 1
            before_ns = transitions[start - 1].at_ns
        yield pieces


_OF_A_MAIL: Final = 4
_VALUES: Final = 15  # of a mail, in its four events
_moulds: Final[dict[Row, Mould]] = {}


def _of_a_mail(transitions: Sequence[Transition], before_ns: int, wall_offset_ns: int) -> bytes | None:
    """The events of a mail that went well, in one go; None if `transitions` do not begin with such a mail."""
    if len(transitions) < _OF_A_MAIL:
        return None
    (
        (begun, before_begun, begun_level, begun_sequence, begun_ns, of_begun),
        (data, before_data, data_level, data_sequence, data_ns, of_data),
        (active, before_active, active_level, active_sequence, active_ns, of_active),
        (idle, before_idle, idle_level, idle_sequence, idle_ns, of_idle),
    ) = transitions
    if (
        data is not ConnState.DATA
        or idle is not ConnState.IDLE
        or begun is not ConnState.ACTIVE
        or active is not ConnState.ACTIVE
        or of_begun is not None
        or of_active is not None
        or of_data.__class__ is not ContentBegun
        or of_idle.__class__ is not TransactionOver
    ):
        return None
    number, recipients, messages = [LENGTHS[n] if n < 2048 else varint(n) for n in (*of_data, *of_idle)]
    sequences = begun_sequence, data_sequence, active_sequence, idle_sequence
    first, second, third, fourth = [LENGTHS[n] if n < 2048 else varint(n) for n in sequences]
    key = (
        before_begun, begun_level, before_data, data_level, before_active, active_level, before_idle, idle_level,
        len(first), len(second), len(third), len(fourth), len(number), len(recipients), len(messages),
    )  # fmt: skip
    mould = _moulds.get(key)
    if mould is None:
        if len(_moulds) >= MAX_SHAPES:
            _moulds.clear()
        mould = _moulds[key] = _mould(transitions)
    return mould.fill(
        (
            begun_ns + wall_offset_ns, first, (begun_ns - before_ns) / 1e9,
            data_ns + wall_offset_ns, second, (data_ns - begun_ns) / 1e9, number, recipients,
            active_ns + wall_offset_ns, third, (active_ns - data_ns) / 1e9,
            idle_ns + wall_offset_ns, fourth, (idle_ns - active_ns) / 1e9, messages,
        )
    )  # fmt: skip


def _varints(column: Sequence[int]) -> Sequence[bytes]:
    """Integers that have the same number of octets; nothing where they do not."""
    least, most = min(column), max(column)
    if len(length(least)) != len(length(most)):
        return ()
    if most < len(LENGTHS):
        return [LENGTHS[value] for value in column]
    if most < len(LENGTHS) << 7:
        return [_LOWEST[value & 0x7F] + LENGTHS[value >> 7] for value in column]
    return [varint(value) for value in column]


# Of mails that went well, one after another.
_LOWEST: Final = tuple(bytes((0x80 | bits,)) for bits in range(0x80))
_STATES: Final = (ConnState.ACTIVE, ConnState.DATA, ConnState.ACTIVE, ConnState.IDLE)
_DETAILS: Final = (type(None), ContentBegun, type(None), TransactionOver)
_MOST_RUNS: Final = 64  # each mould has some ten thousand octets
_runs: Final[dict[Row, Mould]] = {}


def _of_mails(transitions: Sequence[Transition], before_ns: int, wall_offset_ns: int) -> bytes | None:
    """Likewise for several mails, a column at a time; None unless `transitions` are of equal mails."""
    mails = len(transitions) // _OF_A_MAIL
    if mails < 2:
        return None
    states, before, levels, sequences, moments, details = zip(*transitions, strict=True)
    if (
        states != _STATES * mails
        or tuple(map(type, details)) != _DETAILS * mails
        or before != before[:_OF_A_MAIL] * mails
        or levels != levels[:_OF_A_MAIL] * mails
    ):
        return None
    numbers, recipients = zip(*details[1::_OF_A_MAIL], strict=True)
    [messages] = zip(*details[3::_OF_A_MAIL], strict=True)
    of_integers = [_varints(column) for column in (sequences, numbers, recipients, messages)]
    if not all(of_integers):
        return None
    key = (mails, before[:_OF_A_MAIL], levels[:_OF_A_MAIL], *[len(column[0]) for column in of_integers])
    mould = _runs.get(key)
    if mould is None:
        if len(_runs) >= _MOST_RUNS:
            _runs.clear()
        mould = _runs[key] = _mould(transitions)
    in_order, of_number, of_recipients, of_messages = of_integers
    times = [at_ns + wall_offset_ns for at_ns in moments]
    seconds = [(to_ns - from_ns) / 1e9 for from_ns, to_ns in zip((before_ns, *moments), moments, strict=False)]
    # Time, sequence and duration of each event; behind these of DATA two integers, and behind those of IDLE one.
    values: list[bytes | float] = [0] * (_VALUES * mails)
    for place, first in enumerate((0, 3, 8, 11)):
        values[first::_VALUES] = times[place::_OF_A_MAIL]
        values[first + 1 :: _VALUES] = in_order[place::_OF_A_MAIL]
        values[first + 2 :: _VALUES] = seconds[place::_OF_A_MAIL]
    values[6::_VALUES], values[7::_VALUES], values[14::_VALUES] = of_number, of_recipients, of_messages
    return mould.fill(values)


def _mould(transitions: Iterable[Transition]) -> Mould:
    """With gaps for time, sequence and duration of each event, and for the integers that belong to it."""
    pieces: list[bytes | str] = []
    for transition, shape, values in describe_transitions(transitions):
        rest: list[bytes | str] = [shape.octets, *_gap(names.STATE_SEQUENCE, transition.sequence), _DURATION, "d"]
        for name, value in zip(shape.varying, values, strict=True):
            rest += _gap(name, value)
        pieces += (before_time(Mould(*rest).size), "Q", *rest)
    return Mould(*pieces)


def _gap(name: str, value: int) -> tuple[bytes, str]:
    """An integer attribute with a gap for the octets of such a value."""
    octets = len(length(value))
    return EVENT_PAIRS[name, value][:-octets], f"{octets}s"


def _encode_states(
    transitions: Iterable[Transition],
    before_ns: int | None,
    wall_offset_ns: int,
    more: Callable[[Transition], Iterable[Pair]],
) -> list[bytes]:
    """Any events."""
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
    """The events about recipients, or a gateway that had the mail before, each as a piece of its span."""
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
    """What the events of a delivery's phases consist of: when they are over, and their shapes.

    That of the wait for a limit has `_pace_pairs` beside.
    """
    shapes, described = _PHASES, []
    for at_ns, phase, reply in delivery.phases:
        row: Row = (phase, None, None) if reply is None else (phase, reply.code, reply.enhanced)
        described.append((at_ns, shapes[row]))
    return described


def _pace_pairs(delivery: DeliveryRecord) -> tuple[Pair, ...]:
    """Which limit held a delivery back, and for how long."""
    if delivery.paced is None:
        return ()
    name, wait_ns = delivery.paced
    return (names.LIMIT_NAME, name), (names.LIMIT_WAIT, wait_ns / 1e9)


_PACED: Final = names.PHASE_EVENTS[DeliveryPhase.PACED]


def phase_events(delivery: DeliveryRecord) -> list[EventRecord]:
    """The phases of a delivery, as values."""
    offset = delivery.transaction.wall_offset_ns
    return [
        EventRecord(
            at_ns + offset,
            shape.name,
            {**shape.constant, **dict(_pace_pairs(delivery))} if shape.name == _PACED else shape.constant,
        )
        for at_ns, shape in describe_phases(delivery)
    ]


def encode_phases(delivery: DeliveryRecord) -> list[bytes]:
    """The phases of a delivery, as pieces of its span."""
    offset = delivery.transaction.wall_offset_ns
    pieces: list[bytes] = []
    for at_ns, shape in describe_phases(delivery):
        if shape.name == _PACED:
            pieces.append(encode_event(at_ns + offset, shape, _pace_pairs(delivery)))
        else:
            pieces += (shape.before, pack_time(at_ns + offset), shape.octets)
    return pieces


def encode_phases_among(delivery: DeliveryRecord, events: Sequence[EventRecord]) -> list[bytes]:
    """The same with other events among them, by their times; of those at one instant the phases come first, as they do
    where both are read as values."""
    offset = delivery.transaction.wall_offset_ns
    placed: list[tuple[int, bytes]] = []
    for at_ns, shape in describe_phases(delivery):
        pairs = _pace_pairs(delivery) if shape.name == _PACED else ()
        placed.append((at_ns + offset, encode_event(at_ns + offset, shape, pairs)))
    placed += [(event.time_ns, octets) for event, octets in zip(events, encode_events(events), strict=True)]
    placed.sort(key=itemgetter(0))
    return [octets for _, octets in placed]
