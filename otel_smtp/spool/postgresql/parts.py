"""The common base of the store's classes."""

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
    """This gateway's counts, for metrics.

    Attributes:
        stale: results that came too late.
        taken_over: deliveries of others that went on.
        unanswered: messages that may have been stored though their client was answered 451.
    """

    stale: int = 0
    taken_over: int = 0
    unanswered: int = 0


class PostgresqlParts(ABC):
    """The parts of `PostgresqlStore`, which makes them, for its base classes."""

    beats: Beats
    figures: Figures
    _place: QueueLocation
    _statements: Statements
    _working: Working
    _woken: Woken | None
    _is_open: bool
    _is_gateway: bool
    # Our known leases, by message and delivery: any others that the database has for us come from a claim whose answer
    # was lost.
    _held: dict[tuple[str, int], int]
    _not_asked_for: tuple[set[str], set[str]]  # destinations of the other kind, where mail is asked for or outcomes are
    _withdrawn: dict[str, int]  # may have been stored, though the client was told otherwise: attempts, by message

    @abstractmethod
    def _being_submitted(self) -> Container[str]:
        """Ids of the messages that may be in the database, and whose clients have no answer yet."""
