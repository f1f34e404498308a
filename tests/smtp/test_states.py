"""The state table against its specification, and what the machine records."""

import itertools
from collections.abc import Sequence

import pytest

from otel_smtp.smtp import replies
from otel_smtp.smtp.states import (
    LEGAL,
    PULSES,
    AuthBegun,
    CloseReason,
    ConnectionOver,
    ConnState,
    ContentBegun,
    Detail,
    ErrorReply,
    IllegalTransition,
    ResetBy,
    ResetCause,
    StateMachine,
    TlsAgreed,
    TlsMode,
    TlsOffer,
    TransactionOver,
    Transition,
)

S = ConnState

# The matrix of the specification, row by row: from -> the columns that are not empty.
SPECIFIED = {
    "New": "Active StartTLS Error Closed",
    "Active": "Auth Data StartTLS Reset Idle Error Closed",
    "Auth": "Active Error Closed",
    "Data": "Active Reset Error Closed",
    "StartTLS": "Active Error Closed",
    "Reset": "Active Closed",
    "Idle": "Active Auth StartTLS Reset Error Closed",
    "Error": "Active Auth Data StartTLS Reset Idle Error Closed",
    "Closed": "",
}


def machine() -> tuple[StateMachine, list[Transition]]:
    seen: list[Transition] = []
    return StateMachine(seen), seen


def drive(steps: Sequence[ConnState]) -> list[Transition]:
    states, seen = machine()
    for step in steps:
        states.enter(step)
    return seen


def test_the_table_is_the_specified_matrix() -> None:
    assert {str(state): {str(to) for to in allowed} for state, allowed in LEGAL.items()} == {
        state: set(row.split()) for state, row in SPECIFIED.items()
    }


def path_to(state: ConnState) -> list[ConnState]:
    """A shortest legal way from New to `state`."""
    ways = [[S.NEW]]
    for way in ways:
        if way[-1] is state:
            return way
        ways.extend([*way, to] for to in ConnState if to in LEGAL[way[-1]] and to not in way)
    raise AssertionError(f"{state} cannot be reached")


@pytest.mark.parametrize(("from_state", "to_state"), list(itertools.product(ConnState, repeat=2)))
def test_every_pair_of_states_is_taken_or_refused_as_the_table_says(from_state: ConnState, to_state: ConnState) -> None:
    states, seen = machine()
    for step in path_to(from_state):
        states.enter(step)
    is_repetition = to_state is states.level and to_state not in PULSES and from_state is not S.RESET
    before = len(seen)
    if is_repetition:
        states.enter(to_state)
        assert len(seen) == before
    elif to_state in LEGAL[from_state]:
        states.enter(to_state)
        assert seen[-1].state is to_state
        assert seen[-1].previous is from_state
    else:
        with pytest.raises(IllegalTransition):
            states.enter(to_state)
        assert len(seen) == before


@pytest.mark.parametrize(
    "before",
    [
        [S.NEW, S.ACTIVE, S.DATA],
        [S.NEW, S.ACTIVE, S.DATA, S.ERROR],
        [S.NEW, S.ACTIVE],
        [S.NEW, S.ACTIVE, S.RESET],
        [S.NEW, S.ACTIVE, S.DATA, S.ACTIVE, S.IDLE],
        [S.NEW],
        [S.NEW, S.STARTTLS],
    ],
    ids=lambda before: before[-1],
)
def test_to_settle_is_to_be_active_and_then_idle(before: Sequence[ConnState]) -> None:
    (one, seen), (other, expected) = machine(), machine()
    for states in (one, other):
        for step in before:
            states.enter(step)
        states.now_ns = 7
    one.settle(TransactionOver(3))
    other.enter(S.ACTIVE)
    other.enter(S.IDLE, TransactionOver(3))
    assert seen == expected
    assert type(seen[-1]) is Transition
    for states in (one, other):
        states.enter(S.CLOSED)  # from the same place, with the next number
    assert (one.level, one.last, seen) == (other.level, other.last, expected)


def test_a_pulse_leaves_the_level_and_tells_it() -> None:
    seen = drive([S.NEW, S.ACTIVE, S.DATA, S.ERROR])
    assert seen[-1].level is S.DATA


def test_reset_is_followed_by_active_even_at_level_active() -> None:
    assert [t.state for t in drive([S.NEW, S.ACTIVE, S.RESET, S.ACTIVE, S.ACTIVE])] == [
        S.NEW,
        S.ACTIVE,
        S.RESET,
        S.ACTIVE,
    ]


def test_transitions_are_numbered_and_chained() -> None:
    seen = drive([S.NEW, S.ACTIVE, S.ERROR, S.ERROR, S.CLOSED])
    assert [t.sequence for t in seen] == [1, 2, 3, 4, 5]
    assert [t.previous for t in seen] == [None, S.NEW, S.ACTIVE, S.ERROR, S.ERROR]


def test_a_failed_auth_falls_back_without_being_recorded() -> None:
    states, seen = machine()
    for step in (S.NEW, S.ACTIVE, S.AUTH, S.ERROR):
        states.enter(step)
    states.fall_back(S.ACTIVE)
    assert states.level is S.ACTIVE
    assert len(seen) == 4


def test_the_first_state_must_be_new() -> None:
    states, _ = machine()
    with pytest.raises(IllegalTransition):
        states.enter(S.ACTIVE)


def test_in_production_an_illegal_step_is_told_and_recorded() -> None:
    seen: list[Transition] = []
    told: list[IllegalTransition] = []
    states = StateMachine(seen, told.append)
    states.enter(S.NEW, TlsOffer(TlsMode.OFF))
    states.enter(S.IDLE)
    assert [(t.previous, t.state) for t in told] == [(S.NEW, S.IDLE)]
    assert [t.state for t in seen] == [S.NEW, S.IDLE]


def test_a_transition_has_the_time_that_the_driver_gave() -> None:
    states, seen = machine()
    states.now_ns = 17
    states.enter(S.NEW)
    states.now_ns = 23
    states.enter(S.ACTIVE)
    assert [transition.at_ns for transition in seen] == [17, 23]


ROW_ATTRIBUTES = (
    "verb", "reply", "reply_code", "enhanced_code", "error_type", "transaction", "recipients", "mechanism",
    "tls_mode", "tls_version", "tls_cipher", "cause", "reason", "messages",
)  # fmt: skip


@pytest.mark.parametrize(
    ("state", "detail", "told"),
    [
        (S.NEW, TlsOffer(TlsMode.IMPLICIT), {"tls_mode": TlsMode.IMPLICIT}),
        (S.ACTIVE, None, {}),
        (S.ACTIVE, TlsAgreed("1.3", "x"), {"tls_version": "1.3", "tls_cipher": "x"}),
        (S.AUTH, AuthBegun("PLAIN"), {"mechanism": "PLAIN"}),
        (S.DATA, ContentBegun(3, 2), {"transaction": 3, "recipients": 2}),
        (S.IDLE, TransactionOver(4), {"messages": 4}),
        (S.RESET, ResetBy(ResetCause.RSET), {"cause": ResetCause.RSET}),
        (
            S.ERROR,
            ErrorReply("MAIL", replies.BAD_SENDER, replies.BAD_SENDER.error_type, 5),
            {
                "verb": "MAIL",
                "reply": replies.BAD_SENDER,
                "reply_code": replies.BAD_SENDER.code,
                "enhanced_code": str(replies.BAD_SENDER.enhanced),
                "error_type": replies.BAD_SENDER.error_type,
                "transaction": 5,
            },
        ),
        (S.ERROR, ErrorReply(None, None, replies.ErrorType.TLS, None), {"error_type": replies.ErrorType.TLS}),
        (S.CLOSED, ConnectionOver(CloseReason.QUIT, 6), {"reason": CloseReason.QUIT, "messages": 6}),
    ],
)
def test_a_transition_tells_its_row_and_nothing_else(state: ConnState, detail: Detail | None, told: object) -> None:
    transition = Transition(state, None, S.ACTIVE, 1, 0, detail)
    values = {name: getattr(transition, name) for name in ROW_ATTRIBUTES}
    assert {name: value for name, value in values.items() if value is not None} == told
