"""State transitions as events: which attributes each has (states.md, telemetry.md).

`StateEvents` says where they go. The span event API of OpenTelemetry is being retired in favour of log-based events;
this module and the one call of it in `tracing` are what that will change.
"""

from enum import StrEnum
from typing import Final

from otel_smtp.observing import DeliveryPhase
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import Transition
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.attributes import AttributeValue
from otel_smtp.telemetry.records import EventRecord, EventShape


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


# Shapes come from closed sets, but for enhanced codes, of which a hostile upstream can invent a million.
_MAX_SHAPES: Final = 2048

_TRANSITION_SHAPES: Final[dict[tuple[object, ...], EventShape]] = {}
_PHASE_SHAPES: Final[dict[tuple[object, ...], EventShape]] = {}


def state_event(
    time_ns: int,
    transition: Transition,
    previous_duration_seconds: float | None,
    more: tuple[tuple[str, AttributeValue], ...] = (),
) -> EventRecord:
    """The event that tells `transition`.

    Args:
        previous_duration_seconds: since the transition before it; None on New.
        more: attributes of the state's row that the transition does not carry (addresses, octets).
    """
    # All fields but the sequence, the transaction's number, the recipients and the messages, which vary.
    key = (transition[:3], transition[4:8], transition[10:16])
    shape = _TRANSITION_SHAPES.get(key)
    if shape is None:
        if len(_TRANSITION_SHAPES) >= _MAX_SHAPES:
            _TRANSITION_SHAPES.clear()
        shape = _TRANSITION_SHAPES[key] = _transition_shape(transition)
    varying: list[tuple[str, AttributeValue]] = [(names.STATE_SEQUENCE, transition.sequence)]
    if previous_duration_seconds is not None:
        varying.append((names.STATE_PREVIOUS_DURATION, previous_duration_seconds))
    if transition.transaction is not None:
        varying.append((names.TRANSACTION_NUMBER, transition.transaction))
    if transition.recipients is not None:
        varying.append((names.RECIPIENT_COUNT, transition.recipients))
    if transition.messages is not None:
        varying.append((names.CONNECTION_MESSAGES, transition.messages))
    return EventRecord(time_ns, shape, (*varying, *more))


def phase_event(
    time_ns: int, phase: DeliveryPhase, reply: Reply | None, more: tuple[tuple[str, AttributeValue], ...] = ()
) -> EventRecord:
    """The event that tells that a phase of a delivery is done."""
    key = (phase, reply and reply.code, reply and reply.enhanced)
    shape = _PHASE_SHAPES.get(key)
    if shape is None:
        if len(_PHASE_SHAPES) >= _MAX_SHAPES:
            _PHASE_SHAPES.clear()
        constant: dict[str, AttributeValue] = {}
        add_reply_codes(constant, reply)
        shape = _PHASE_SHAPES[key] = EventShape(names.PHASE_EVENTS[phase], constant)
    return EventRecord(time_ns, shape, more)


def add_reply_codes(attributes: dict[str, AttributeValue], reply: Reply | None) -> None:
    """Add code and enhanced code of `reply`, where there is one."""
    if reply is not None:
        attributes[names.REPLY_CODE] = reply.code
        if reply.enhanced is not None:
            attributes[names.REPLY_ENHANCED_CODE] = str(reply.enhanced)


def _transition_shape(transition: Transition) -> EventShape:
    fields: tuple[tuple[str, AttributeValue | None], ...] = (
        (names.STATE, transition.state.value),
        (names.STATE_PREVIOUS, transition.previous and transition.previous.value),
        (names.STATE_LEVEL, transition.level.value),
        (names.VERB, transition.verb),
        (names.REPLY_CODE, transition.reply_code),
        (names.REPLY_ENHANCED_CODE, transition.enhanced_code),
        # An enumeration's member is a str, but not one that every encoder takes for one.
        (names.ERROR_TYPE, None if transition.error_type is None else str(transition.error_type)),
        (names.AUTH_MECHANISM, transition.mechanism),
        (names.TLS_MODE, transition.tls_mode and transition.tls_mode.value),
        (names.TLS_PROTOCOL_VERSION, transition.tls_version),
        (names.TLS_CIPHER, transition.tls_cipher),
        (names.RESET_CAUSE, transition.cause and transition.cause.value),
        (names.CLOSE_REASON, transition.reason and transition.reason.value),
    )
    constant = {name: value for name, value in fields if value is not None}
    return EventShape(names.STATE_EVENTS[transition.state], constant)
