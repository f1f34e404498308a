"""The nine connection states, and the table of legal transitions between them.

Theory of operation
-------------------
At each moment a connection stands at one *level*: New, Active, Auth, Data, StartTLS, Idle, Closed. Two further
states, Reset and Error, are *pulses*: they are recorded and do not, by themselves, change the level.

The states are a report, not a decision. The phases in ``sequence.py`` decide which verb is legal; the two tables share
no fact. Only the connection's own protocol engine calls `StateMachine.enter`, inside the call that decides a reply,
before that reply's octets can be fetched. So once a client can read a reply, its transition has been recorded ("record
before reveal").

Three rules live here alone:

* a level that repeats is not recorded again; a pulse always is;
* a step that is not in `LEGAL` is a bug of ours: `IllegalTransition` in tests, counted and recorded in production;
* Closed is recorded once, and nothing after it.

The names follow the ConnState proposal for go-smtp, which this project's users asked for.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.replies import ErrorType, Reply


class ConnState(StrEnum):
    """A state of a client connection; the value is the name that telemetry shows."""

    __hash__ = str.__hash__  # Enum's own is a Python function; this is called several times per event

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
"""States that are recorded at each occurrence and leave the level unchanged."""

LEVELS: Final = tuple(state for state in ConnState if state not in PULSES and state is not ConnState.CLOSED)
"""Levels of an open connection."""


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
    """The command that discarded, or was to discard, an open transaction."""

    RSET = "rset"
    EHLO = "ehlo"
    HELO = "helo"
    LHLO = "lhlo"


class TlsMode(StrEnum):
    """How TLS comes to a connection."""

    __hash__ = str.__hash__  # Enum's own is a Python function; this is called several times per event

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
"""Which recorded state may directly follow which. The only such table: the README's and the tests are made from it."""


# Legal transitions, and whether they lead to a level: one look-up for both.
_FOLLOWING: Final[Mapping[ConnState | None, Mapping[ConnState, bool]]] = {
    None: {_S.NEW: True},
    **{state: {following: following not in PULSES for following in LEGAL[state]} for state in ConnState},
}
_ACTIVE: Final = _S.ACTIVE
_DATA: Final = _S.DATA
_IDLE: Final = _S.IDLE
_RESET: Final = _S.RESET


class TlsOffer(NamedTuple):
    """The detail of New and StartTLS: how TLS comes to the connection."""

    tls_mode: TlsMode


TLS_OFFERS: Final = {mode: TlsOffer(mode) for mode in TlsMode}  # shared, as every connection keeps one


class TlsAgreed(NamedTuple):
    """The detail of Active after a handshake."""

    tls_version: str  # as "1.3"
    tls_cipher: str


class AuthBegun(NamedTuple):
    """The detail of Auth, and of Active after 235: a known SASL mechanism, or "other"; never the client's text."""

    mechanism: str


class ContentBegun(NamedTuple):
    """The detail of Data."""

    transaction: int  # number of the transaction on this connection, from 1
    recipients: int  # accepted


class TransactionOver(NamedTuple):
    """The detail of Idle."""

    messages: int  # whose final reply was sent on this connection so far


class ResetBy(NamedTuple):
    """The detail of Reset."""

    cause: ResetCause


class ErrorReply(NamedTuple):
    """The detail of Error."""

    verb: str | None  # the known verb or "other"; None if no command was being answered
    reply: Reply | None  # None for a handshake that failed, where no reply is possible
    error_type: ErrorType | None  # low-cardinality class
    transaction: int | None  # number of the open transaction, where one is open


class ConnectionOver(NamedTuple):
    """The detail of Closed."""

    reason: CloseReason
    messages: int


Detail = TlsOffer | TlsAgreed | AuthBegun | ContentBegun | TransactionOver | ResetBy | ErrorReply | ConnectionOver


class Transition(NamedTuple):
    """One entry into a state, as observers and `conn_state` callbacks get it.

    Text in it comes from closed sets (a verb that is not known is ``"other"``), so it is safe as an attribute or a
    label; but for the text of the reply behind an Error, which telemetry redacts.

    The attributes of the states' own rows can be read from the transition itself, whatever its state: `reply_code`,
    `messages` and the like are None if the state does not have them.
    """

    state: ConnState
    previous: ConnState | None  # the state recorded before this one, pulse or level; None on New
    level: ConnState  # for a level, the state itself; for a pulse, the level at which it occurred
    sequence: int  # from 1, counted per connection
    at_ns: int = 0  # by the driver's monotonic clock
    detail: Detail | None = None  # of the state's own row

    @property
    def verb(self) -> str | None:
        """Error: the known verb or "other"; None if no command was being answered."""
        return getattr(self.detail, "verb", None)

    @property
    def reply(self) -> Reply | None:
        """Error: the reply; None for a handshake that failed."""
        return getattr(self.detail, "reply", None)

    @property
    def reply_code(self) -> int | None:
        """Error: the code of the reply."""
        return None if self.reply is None else self.reply.code

    @property
    def enhanced_code(self) -> str | None:
        """Error: the enhanced code of the reply, as "5.5.1"."""
        return None if self.reply is None or self.reply.enhanced is None else str(self.reply.enhanced)

    @property
    def error_type(self) -> ErrorType | None:
        """Error: low-cardinality class."""
        return getattr(self.detail, "error_type", None)

    @property
    def transaction(self) -> int | None:
        """Data, and Error within a transaction: its number on this connection, from 1."""
        return getattr(self.detail, "transaction", None)

    @property
    def recipients(self) -> int | None:
        """Data: accepted recipients."""
        return getattr(self.detail, "recipients", None)

    @property
    def mechanism(self) -> str | None:
        """Auth, and Active after 235: SASL mechanism, or "other"."""
        return getattr(self.detail, "mechanism", None)

    @property
    def tls_mode(self) -> TlsMode | None:
        """New, StartTLS."""
        return getattr(self.detail, "tls_mode", None)

    @property
    def tls_version(self) -> str | None:
        """Active after a handshake, as "1.3"."""
        return getattr(self.detail, "tls_version", None)

    @property
    def tls_cipher(self) -> str | None:
        """Active after a handshake."""
        return getattr(self.detail, "tls_cipher", None)

    @property
    def cause(self) -> ResetCause | None:
        """Reset."""
        return getattr(self.detail, "cause", None)

    @property
    def reason(self) -> CloseReason | None:
        """Closed."""
        return getattr(self.detail, "reason", None)

    @property
    def messages(self) -> int | None:
        """Idle, Closed: messages whose final reply was sent on this connection so far."""
        return getattr(self.detail, "messages", None)


# A NamedTuple's own constructor is a function in Python; a mail records four transitions.
_new: Final = tuple.__new__


class IllegalTransition(LocalProtocolError):
    """A step that is not in `LEGAL`: our bug, never the peer's."""

    def __init__(self, previous: ConnState | None, state: ConnState) -> None:
        super().__init__(f"illegal connection state step: {previous} -> {state}")
        self.previous = previous
        self.state = state


def raise_illegal(step: IllegalTransition) -> None:
    """Raise `step`: the default, for tests."""
    raise step


class TransitionSink(Protocol):
    """Receives transitions as they are recorded; a list will do."""

    def append(self, transition: Transition, /) -> None:
        """Take one."""
        ...


class StateMachine:
    """Records the states of one connection, in order.

    Args:
        recorded: where transitions go: anything with `append`, called once per transition, synchronously. A plain list
            is fastest. May be replaced at any time by setting the attribute.
        on_illegal: called with a step that the table forbids, before that step is recorded. If it raises (the default),
            the step is not recorded; if it returns, it is, so that production never loses a connection to a bug in
            reporting.

    Attributes:
        level: of the connection.
        last: the state recorded last, pulse or level; None before New.
        now_ns: the time of the next transition; the driver sets it, as the engine has no clock.
    """

    __slots__ = ("_on_illegal", "_sequence", "last", "level", "now_ns", "recorded")

    def __init__(
        self, recorded: TransitionSink, on_illegal: Callable[[IllegalTransition], None] = raise_illegal
    ) -> None:
        self.recorded = recorded
        self._on_illegal = on_illegal
        self._sequence = 0
        self.last: ConnState | None = None
        self.level = ConnState.NEW
        self.now_ns = 0

    def enter(self, state: ConnState, detail: Detail | None = None) -> None:
        """Record that the connection enters `state`; its current level is not recorded again.

        Raises:
            IllegalTransition: the step is not in `LEGAL` and `on_illegal` raises.
        """
        last, level = self.last, self.level
        # The only repeated level to be recorded: Active after the pulse Reset.
        if state is level and last is not _RESET and last is not None:
            return
        is_level = _FOLLOWING[last].get(state)
        if is_level is None:
            self._on_illegal(IllegalTransition(last, state))
            is_level = state not in PULSES
        if is_level:
            self.level = level = state
        self._sequence = sequence = self._sequence + 1
        self.last = state
        self.recorded.append(_new(Transition, (state, last, level, sequence, self.now_ns, detail)))

    def settle(self, detail: TransactionOver) -> None:
        """Record Active and then Idle, the end of every accepted message.

        Raises:
            IllegalTransition: see `enter`.
        """
        if self.last is not _DATA:
            self.enter(_ACTIVE)
            self.enter(_IDLE, detail)
            return
        # As `enter` would for these two, which `LEGAL` holds.
        sequence, now_ns, record = self._sequence, self.now_ns, self.recorded.append
        record(_new(Transition, (_ACTIVE, _DATA, _ACTIVE, sequence + 1, now_ns, None)))
        record(_new(Transition, (_IDLE, _ACTIVE, _IDLE, sequence + 2, now_ns, detail)))
        self._sequence = sequence + 2
        self.last = self.level = _IDLE

    def fall_back(self, level: ConnState) -> None:
        """Change the level without recording it: after a failed AUTH exchange the connection is Active again."""
        self.level = level
