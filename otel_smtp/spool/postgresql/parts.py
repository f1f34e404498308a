"""What the parts of the store's class have in common."""

from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass

from otel_smtp.spool.postgresql.beats import Beats
from otel_smtp.spool.postgresql.connecting import QueueLocation
from otel_smtp.spool.postgresql.statements import Statements
from otel_smtp.spool.postgresql.working import Working
from otel_smtp.spool.store import Woken


@dataclass(slots=True)
class Figures:
    """What happened at this gateway, for metrics.

    Attributes:
        stale: results that came too late.
        taken_over: deliveries of others that went on.
        unanswered: messages that may have been stored though their client was answered 451.
    """

    stale: int = 0
    taken_over: int = 0
    unanswered: int = 0


class PostgresqlParts(ABC):
    """What `PostgresqlStore` is made of, for the classes that it is put together from; it makes them."""

    beats: Beats
    figures: Figures
    _place: QueueLocation
    _statements: Statements
    _working: Working
    _woken: Woken | None
    _is_open: bool
    _is_gateway: bool
    # What this process knows to be its own, by message and delivery: whatever else the database says is ours comes of a
    # claim whose answer was lost.
    _held: dict[tuple[str, int], int]
    _not_asked_for: tuple[set[str], set[str]]  # destinations of the other kind, where mail is asked for or outcomes are
    _withdrawn: dict[str, int]  # may have been stored, though the client was told otherwise: attempts, by message

    @abstractmethod
    def _being_submitted(self) -> Container[str]:
        """Ids of the messages that may be in the database, and whose clients have no answer yet."""
