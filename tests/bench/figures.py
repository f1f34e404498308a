"""Figures: a run's, their medians over rounds, and ratios that are taken within a round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load."""

    sessions: int
    size_octets: int
    keeps_connections: bool = True

    def __str__(self) -> str:
        size = f"{self.size_octets // MIB} MB" if self.size_octets >= MIB else f"{self.size_octets // KIB} KB"
        sessions = "1 session" if self.sessions == 1 else f"{self.sessions} sessions"
        return f"{size}, {sessions}, {'kept connections' if self.keeps_connections else 'a connection a message'}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity over the rounds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rounds)

    def text(self, form: str = ",.0f") -> str:
        """Median, then lowest and highest in brackets."""
        return f"{self.median:{form}} [{min(self.rounds):{form}}–{max(self.rounds):{form}}]"


@dataclass(frozen=True, slots=True)
class Run:
    """One round of one relay under one load.

    Attributes:
        cpu_us: of the relay and all its processes, export and delivery after the last reply included, a message.
        round_trips: of the upstream connection, a message; counted by the sink.
        spans: that reached the collector, a message.
    """

    accepted: int
    failed: int
    failures: dict[str, int]
    rate: float
    cpu_us: float
    p50_ms: float
    p99_ms: float
    round_trips: float
    spans: float


@dataclass(slots=True)
class Results:
    """All that was measured.

    Attributes:
        loads: cell -> relay -> its runs, one a round; the n-th runs of all relays were made one after another.
        idle_octets: relay -> resident octets for each idle connection.
        cold_start_seconds: relay -> from start to the first 220.
        peak_octets: relay -> highest resident memory over all loads.
        large_mails_peak_octets: relay -> highest resident memory while `large_mails` of 25 MiB passed at once.
        ceiling: cell -> messages a second of load generator and sink without a relay between them.
        second_opinion: relay -> messages a second by Postfix's smtp-source through it to Postfix's smtp-sink.
        skipped: relay or figure -> why.
    """

    loads: dict[Cell, dict[str, list[Run]]] = field(default_factory=dict)
    idle_octets: dict[str, Figure] = field(default_factory=dict)
    cold_start_seconds: dict[str, Figure] = field(default_factory=dict)
    peak_octets: dict[str, int] = field(default_factory=dict)
    large_mails: int = 100
    large_mails_peak_octets: dict[str, int] = field(default_factory=dict)
    ceiling: dict[Cell, float] = field(default_factory=dict)
    second_opinion: dict[str, Figure] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def figure(self, cell: Cell, target: str, quantity: Callable[[Run], float]) -> Figure | None:
        """One quantity of one relay; None: not measured."""
        runs = self.loads.get(cell, {}).get(target)
        return Figure(tuple(quantity(run) for run in runs)) if runs else None

    def ratio(self, cell: Cell, above: str, below: str, quantity: Callable[[Run], float]) -> Figure | None:
        """`above` over `below`, round by round: what the machine did meanwhile met both alike."""
        upper = self.loads.get(cell, {}).get(above)
        lower = self.loads.get(cell, {}).get(below)
        if not upper or not lower:
            return None
        ratios = tuple(quantity(a) / quantity(b) for a, b in zip(upper, lower, strict=False) if quantity(b))
        return Figure(ratios) if ratios else None


def rate(run: Run) -> float:
    return run.rate


def cpu(run: Run) -> float:
    return run.cpu_us


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
