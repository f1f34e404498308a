"""A mail's request for a connection to an upstream; `pool` decides it."""

from collections.abc import Callable
from enum import Enum, auto
from typing import Generic, NamedTuple, Protocol, TypeVar

from otel_smtp.forwarding.faults import UpstreamFault


class Parked(NamedTuple):
    """Marks a connection whose mail pauses.

    Attributes:
        since: by the pool's clock.
        on_reclaimed: called when the connection is taken away for another mail.
    """

    since: float
    on_reclaimed: Callable[[], None]


class Pooled(Protocol):
    """A connection, as the pool sees it."""

    used_at: float
    """When it was last released; set by the pool."""
    parked: Parked | None
    """Set by its mail while it pauses; None otherwise."""

    @property
    def is_alive(self) -> bool:
        """Whether nothing has arrived on it since it was released."""
        ...

    @property
    def is_spent(self) -> bool:
        """Whether no other transaction may begin on it. Constant while it is idle."""
        ...

    @property
    def opened_at(self) -> float:
        """When it was opened."""
        ...

    @property
    def expires_at(self) -> float:
        """The time after which no other transaction begins on it."""
        ...


C = TypeVar("C", bound=Pooled)


class Decision(Enum):
    """The decision on a ticket."""

    WAITING = auto()
    REUSE = auto()  # use `connection`
    OPEN = auto()  # open one, then call `opened`, `failed` or `gave_up`
    FAILED = auto()  # its connection was refused, and so were all others; see `fault`
    NONE = auto()  # none is available: the upstream is in backoff, all were busy for too long, or the pool is closed


class Ticket(Generic[C]):
    """One mail's request for a connection.

    Attributes:
        asked_at: when it began to wait. `since`: when its transaction first did, which decides its place.
        on_decided: called when a waiting ticket is decided; again if it was put back.
        fault, refused_at: how and when its connection failed; None: it had none.
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
