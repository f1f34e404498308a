"""Sharing out the connections that may be open at once among clients. Decides; does no I/O.

Each connection belongs to a *share*: the connections of one client, as far as it can be told from others. A client on
this machine is identified by the owner of its socket, any other by its address. While places are free, shares do not
matter. When all are taken,

* a newcomer whose share has fewer than another replaces a connection of that other, of the largest share first. The
  least useful one gives way: idle rather than in the middle of a mail, and idle for the longest. So every share keeps
  its part, and a client without a connection gets one at once. Clients elsewhere take no places from clients on this
  machine.
* a newcomer on this machine whose share already has its part replaces a connection that does nothing: one that has
  moved no mail, and is silent. It may be the only application, with a component that opens connections and forgets
  them. After that, newcomers wait a moment for such a place, one after the other, instead of being refused: a client
  that opens connections as fast as they are closed waits in line with all others.
* any other is refused.

A connection whose mail is complete, or that waits for our answer, never gives way.
"""

from collections import Counter
from collections.abc import Collection
from enum import Enum, IntEnum, auto
from typing import Final, Generic, Protocol, TypeVar

RIPE_SECONDS: Final = 1.0
"""A connection that has moved no mail, and has been silent for this long, does nothing."""
RIPE_AGE_SECONDS: Final = 10.0
"""So does one that has moved no mail for this long, even if it talks."""
LEAST_CONNECTIONS: Final = 16
"""With fewer places each one counts, and none is taken from its own share."""
IN_LINE_SECONDS: Final = 2.0
"""The longest wait of a newcomer. A client waits five minutes for a greeting (RFC 5321 4.5.3.2.1), a simple application
perhaps only some seconds.
"""
LINE_SECONDS: Final = 10.0
"""How long newcomers wait in line after a place was taken from its own share."""
LINE_PART: Final = 8
"""The part of the connections that may wait."""


class Standing(IntEnum):
    """The loss if a connection gives way, smallest first."""

    IDLE = 0  # it is the client's turn, and no mail is open
    OPEN = 1  # a mail is open, and it is the client's turn
    CONTENT = 2  # it is sending content
    OURS = 3  # it waits for us: it stays


class PlaceHolder(Protocol):
    """A connection, as far as its place depends on it.

    Attributes:
        share: the one that it belongs to; "" until looked up.
    """

    share: str

    @property
    def is_local(self) -> bool:
        """Whether its client is on this machine; asked only once its share is known."""
        ...

    @property
    def standing(self) -> Standing:
        """See `Standing`."""
        ...

    @property
    def has_moved_mail(self) -> bool:
        """Whether a message was accepted on it."""
        ...

    def idle_seconds(self, now: float) -> float:
        """Since its last reply, or since it was opened."""
        ...

    def age_seconds(self, now: float) -> float:
        """Since it was opened."""
        ...


P = TypeVar("P", bound=PlaceHolder)


class Admittance(Enum):
    """The fate of a newcomer if no connection gives way."""

    ADMIT = auto()
    WAIT = auto()  # in line: ask again after a change
    REFUSE = auto()


class Places(Generic[P]):
    """The places of all connections.

    Attributes:
        most: the most connections open at once.
    """

    __slots__ = ("_counts", "_line_until", "_no_idler_until", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self._counts: Counter[str] = Counter()  # of the connections that have a share
        self._line_until = 0.0
        self._no_idler_until = 0.0

    def __repr__(self) -> str:
        return f"<Places {self.most} for {len(self._counts)} shares>"

    @property
    def most_in_line(self) -> int:
        """How many newcomers may wait."""
        return self.most // LINE_PART if self.most >= LEAST_CONNECTIONS else 0

    def are_scarce(self, taken: int) -> bool:
        """Whether enough are taken to need a look-up of their owners."""
        return 2 * taken >= self.most

    def add(self, share: str) -> None:
        """A connection of this share has taken a place."""
        self._counts[share] += 1

    def remove(self, share: str) -> None:
        """A connection of this share has ended."""
        self._counts[share] -= 1
        if not self._counts[share]:
            del self._counts[share]

    def judge(self, newcomer: P, held: Collection[P], before: int, now: float) -> Admittance | P:
        """Whether a newcomer gets a place.

        Args:
            held: the connections that have one, oldest first.
            before: how many wait in line before it.

        Returns:
            The connection that gives way to it, if one does.
        """
        is_line_open = before < self.most_in_line
        if len(held) < self.most:
            return Admittance.WAIT if before and newcomer.is_local and is_line_open else Admittance.ADMIT
        if not newcomer.share:
            return Admittance.REFUSE  # it comes from a balancer that has not yet named the client
        if (larger := self._in_a_larger_share(newcomer, held, now)) is not None:
            return larger
        if not newcomer.is_local or self.most < LEAST_CONNECTIONS:
            return Admittance.REFUSE
        if not before and (idler := self._idler(held, now)) is not None:
            self._line_until = now + LINE_SECONDS
            return idler
        return Admittance.WAIT if now < self._line_until and is_line_open else Admittance.REFUSE

    def _in_a_larger_share(self, newcomer: P, held: Collection[P], now: float) -> P | None:
        counts = self._counts
        least = counts[newcomer.share] + 2
        for share in sorted((one for one in counts if counts[one] >= least), key=lambda one: -counts[one]):
            movable = [
                place
                for place in held
                if place.share == share
                and (newcomer.is_local or not place.is_local)
                and place.standing is not Standing.OURS
            ]
            if movable:
                return min(movable, key=lambda place: (place.standing, place.has_moved_mail, -place.idle_seconds(now)))
        return None

    def _idler(self, held: Collection[P], now: float) -> P | None:
        """The connection on this machine that has done nothing for the longest, if that is long enough."""
        if now < self._no_idler_until:
            return None
        found: P | None = None
        soonest = RIPE_SECONDS  # connections that are busy now
        for place in held:
            if place.is_local and not place.has_moved_mail and place.standing in (Standing.IDLE, Standing.OPEN):
                idle_seconds = place.idle_seconds(now)
                left = min(RIPE_SECONDS - idle_seconds, RIPE_AGE_SECONDS - place.age_seconds(now))
                soonest = min(soonest, left)
                if left <= 0 and (found is None or idle_seconds > found.idle_seconds(now)):
                    found = place
        if found is None:
            self._no_idler_until = now + soonest
        return found
