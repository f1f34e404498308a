"""A mail's wish for a connection to an upstream, and what becomes of it: see `pool`, which decides."""

from collections.abc import Callable
from enum import Enum, auto
from typing import Generic, NamedTuple, Protocol, TypeVar

from otel_smtp.forwarding.faults import UpstreamFault


class Parked(NamedTuple):
    """Says that a mail leaves its connection alone for now.

    Attributes:
        since: by the pool's clock.
        on_reclaimed: called when the connection is taken away; from then on it is another mail's.
    """

    since: float
    on_reclaimed: Callable[[], None]


class Pooled(Protocol):
    """What the pool asks of a connection."""

    used_at: float
    """When it was released last; the pool notes that."""
    parked: Parked | None
    """Whether it is left alone by the mail that has it. That says so, and that it goes on with it (None)."""

    @property
    def is_alive(self) -> bool:
        """Nothing has been heard of it since it was released."""
        ...

    @property
    def is_spent(self) -> bool:
        """No other transaction is begun on it. Does not change while it is not in use."""
        ...

    @property
    def opened_at(self) -> float:
        """When it was opened."""
        ...

    @property
    def expires_at(self) -> float:
        """When no other transaction is begun on it any more."""
        ...


C = TypeVar("C", bound=Pooled)


class Decision(Enum):
    """What became of a ticket."""

    WAITING = auto()
    REUSE = auto()  # `connection` is it
    OPEN = auto()  # open one, then call `opened`, `failed` or `gave_up`
    FAILED = auto()  # the one that it had opened was refused, and so were all others; `fault` says how
    NONE = auto()  # none is available: the upstream is in backoff, all were busy for too long, or the pool is closed


class Ticket(Generic[C]):
    """One mail's wish for a connection.

    Attributes:
        asked_at: when it began to wait. `since`: when its transaction first did, which is its place among the others.
        on_decided: called when a waiting ticket is decided; again where it was put back.
        fault, refused_at: how and when the connection failed that it had opened; None: it had none.
    """

    __slots__ = ("asked_at", "connection", "decision", "fault", "on_decided", "refused_at", "since", "wants_fresh")

    def __init__(self, asked_at: float, since: float, *, wants_fresh: bool) -> None:
        self.asked_at = asked_at
        self.since = since
        self.wants_fresh = wants_fresh
        self.decision = Decision.WAITING
        self.connection: C | None = None
        self.on_decided: Callable[[], None] | None = None
        self.fault: UpstreamFault | None = None
        self.refused_at = 0.0

    def decide(self, decision: Decision, connection: C | None = None) -> None:
        self.decision = decision
        self.connection = connection
        on_decided = self.on_decided
        if decision is not Decision.OPEN:
            self.on_decided = None
        if on_decided is not None:
            on_decided()
