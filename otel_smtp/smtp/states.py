"""The nine connection states: what is recorded of a connection, and what may follow what.

Theory of operation
-------------------
At each moment a connection stands at one *level*: New, Active, Auth, Data, StartTLS, Idle, Closed. Two further
states, Reset and Error, are *pulses*: they are recorded and do not, by themselves, change the level.

The states are a report, not a decision. Which verb is legal is decided by phase in ``sequence.py``; the two tables
share no fact. Only the connection's own protocol engine calls `StateMachine.enter`, and it does so inside the
call that decides a reply, before that reply's octets can be fetched. So whoever has read a reply can rely on its
transition having been recorded ("record before reveal").

Three rules live here and nowhere else:

* a level that repeats is not recorded again; a pulse always is;
* a step that is not in `LEGAL` is a bug of ours: `IllegalTransition` in tests, counted and recorded in production;
* Closed is recorded once, and nothing after it.

The names follow the ConnState proposal for go-smtp, which this project's users asked for.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple

from otel_smtp.smtp.errors import LocalProtocolError


class ConnState(StrEnum):
    """A state of a client connection; the value is the name that telemetry shows."""

    __hash__ = str.__hash__  # of Enum it is a function of Python, called several times an event

    NEW = "New"
    ACTIVE = "Active"
    AUTH = "Auth"
    DATA = "Data"
    STARTTLS = "StartTLS"
    RESET = "Reset"
    IDLE = "Idle"
    ERROR = "Error"
    CLOSED = "Closed"


PULSES: Final = frozenset({ConnState.RESET, ConnState.ERROR})
"""States that are recorded at each occurrence and leave the level where it was."""


class CloseReason(StrEnum):
    """Why a connection ended."""

    QUIT = "quit"
    CLIENT_DISCONNECT = "client_disconnect"
    TIMEOUT = "timeout"
    TOO_MANY_ERRORS = "too_many_errors"
    REFUSED = "refused"
    TLS_FAILURE = "tls_failure"
    PROTOCOL_MISMATCH = "protocol_mismatch"
    SHUTDOWN = "shutdown"
    INTERNAL_ERROR = "internal_error"


class ResetCause(StrEnum):
    """What threw an open transaction away, or asked for it."""

    RSET = "rset"
    EHLO = "ehlo"
    HELO = "helo"
    LHLO = "lhlo"


class TlsMode(StrEnum):
    """How TLS comes to a connection."""

    __hash__ = str.__hash__  # of Enum it is a function of Python, called several times an event

    OFF = "off"
    STARTTLS = "starttls"
    IMPLICIT = "implicit"


_S = ConnState

LEGAL: Final[Mapping[ConnState, frozenset[ConnState]]] = {
    #                  refusal at accept, bad PROXY header: Error
    _S.NEW: frozenset({_S.ACTIVE, _S.STARTTLS, _S.ERROR, _S.CLOSED}),
    #                  Idle: a transaction has ended with its final 2xx
    _S.ACTIVE: frozenset({_S.AUTH, _S.DATA, _S.STARTTLS, _S.RESET, _S.IDLE, _S.ERROR, _S.CLOSED}),
    _S.AUTH: frozenset({_S.ACTIVE, _S.ERROR, _S.CLOSED}),
    #                  Reset: RSET or EHLO between two BDAT chunks
    _S.DATA: frozenset({_S.ACTIVE, _S.RESET, _S.ERROR, _S.CLOSED}),
    _S.STARTTLS: frozenset({_S.ACTIVE, _S.ERROR, _S.CLOSED}),
    _S.RESET: frozenset({_S.ACTIVE, _S.CLOSED}),
    #                  never Data: MAIL comes first (RFC 5321 4.1.4)
    _S.IDLE: frozenset({_S.ACTIVE, _S.AUTH, _S.STARTTLS, _S.RESET, _S.ERROR, _S.CLOSED}),
    #                  Idle: a message was refused, which ended its transaction
    _S.ERROR: frozenset({_S.ACTIVE, _S.AUTH, _S.DATA, _S.STARTTLS, _S.RESET, _S.IDLE, _S.ERROR, _S.CLOSED}),
    _S.CLOSED: frozenset(),
}
"""Which recorded state may directly follow which: the one truth; the README's table and the tests read it here."""


class Transition(NamedTuple):
    """One entry into a state, as observers and `conn_state` callbacks get it.

    Only the fields of the state's own row are set; the others are None. Text in it comes from closed sets (a verb
    that is not known is ``"other"``), so it is safe as an attribute or a label. It carries no time: observers
    stamp it when they are called, which is before the peer can see the reply.
    """

    state: ConnState
    previous: ConnState | None  # the state recorded before this one, pulse or level; None on New
    level: ConnState  # for a level, the state itself; for a pulse, the level at which it occurred
    sequence: int  # from 1, counted per connection
    verb: str | None = None  # Error: the known verb or "other"; None where no command was being answered
    reply_code: int | None = None  # Error
    enhanced_code: str | None = None  # Error, as "5.5.1"
    error_type: str | None = None  # Error: low-cardinality class, see replies.ErrorType
    transaction: int | None = None  # Data: number of the transaction on this connection, from 1
    recipients: int | None = None  # Data: accepted recipients
    mechanism: str | None = None  # Auth, and Active after 235: SASL mechanism, or "other"
    tls_mode: TlsMode | None = None  # New, StartTLS
    tls_version: str | None = None  # Active after a handshake, as "1.3"
    tls_cipher: str | None = None  # Active after a handshake
    cause: ResetCause | None = None  # Reset
    reason: CloseReason | None = None  # Closed
    messages: int | None = None  # Idle, Closed: messages whose final reply was sent on this connection so far


class IllegalTransition(LocalProtocolError):
    """A step that `LEGAL` does not hold: our bug, never the peer's."""

    def __init__(self, previous: ConnState | None, state: ConnState) -> None:
        super().__init__(f"illegal connection state step: {previous} -> {state}")
        self.previous = previous
        self.state = state


def raise_illegal(step: IllegalTransition) -> None:
    """Raise `step`: what tests want, and the default."""
    raise step


class StateMachine:
    """Records the states of one connection, in order, and hands each to `on_transition`.

    Args:
        on_transition: called once for each recorded state, synchronously. It must not raise.
        on_illegal: called with a step that the table forbids, before that step is recorded. Raising (the
            default) keeps the step unrecorded; returning lets it be recorded, so that production never loses a
            connection to a bug in the report.
    """

    __slots__ = ("_on_illegal", "_on_transition", "_recorded", "_sequence", "level")

    def __init__(
        self,
        on_transition: Callable[[Transition], None],
        on_illegal: Callable[[IllegalTransition], None] = raise_illegal,
    ) -> None:
        self._on_transition = on_transition
        self._on_illegal = on_illegal
        self._recorded: ConnState | None = None
        self._sequence = 0
        self.level = ConnState.NEW

    @property
    def recorded(self) -> ConnState | None:
        """The state recorded last, pulse or level; None before New."""
        return self._recorded

    def enter(
        self,
        state: ConnState,
        *,
        verb: str | None = None,
        reply_code: int | None = None,
        enhanced_code: str | None = None,
        error_type: str | None = None,
        transaction: int | None = None,
        recipients: int | None = None,
        mechanism: str | None = None,
        tls_mode: TlsMode | None = None,
        tls_version: str | None = None,
        tls_cipher: str | None = None,
        cause: ResetCause | None = None,
        reason: CloseReason | None = None,
        messages: int | None = None,
    ) -> None:
        """Record that the connection enters `state`; a level at which it already stands is not recorded again.

        Raises:
            IllegalTransition: the step is not in `LEGAL` and `on_illegal` raises.
        """
        recorded = self._recorded
        if recorded is None:
            if state is not ConnState.NEW:
                self._on_illegal(IllegalTransition(None, state))
        else:
            # The one repetition that counts: the pulse Reset is always followed by Active, also at level Active.
            if state is self.level and state not in PULSES and recorded is not ConnState.RESET:
                return
            if state not in LEGAL[recorded]:
                self._on_illegal(IllegalTransition(recorded, state))
        if state not in PULSES:
            self.level = state
        self._sequence += 1
        self._recorded = state
        self._on_transition(
            Transition(
                state,
                recorded,
                self.level,
                self._sequence,
                verb,
                reply_code,
                enhanced_code,
                error_type,
                transaction,
                recipients,
                mechanism,
                tls_mode,
                tls_version,
                tls_cipher,
                cause,
                reason,
                messages,
            )
        )

    def fall_back(self, level: ConnState) -> None:
        """Change the level without recording it: after a failed AUTH exchange the connection is Active again."""
        self.level = level
