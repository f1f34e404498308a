"""Figures: a run's, their medians over rounds, and ratios that are taken within a round."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Cell:
    """One kind of load.

    Attributes:
        share: of each relay's own highest rate under the same load, at which messages fall due; None: all it takes.
        is_queued: for relays that answer when a message is durable, and deliver it afterwards.
    """

    sessions: int
    size_octets: int
    keeps_connections: bool = True
    share: float | None = None
    is_queued: bool = False

    def __str__(self) -> str:
        size = f"{self.size_octets // MIB} MiB" if self.size_octets >= MIB else f"{self.size_octets // KIB} KB"
        sessions = "1 session" if self.sessions == 1 else f"{self.sessions} sessions"
        kept = "kept connections" if self.keeps_connections else "one connection per message"
        rate = f", at {self.share:g} of the relay's own highest rate" if self.share else ""
        return f"{size}, {sessions}, {kept}{rate}{', answered when durable' if self.is_queued else ''}"

    @property
    def at_full_rate(self) -> "Cell":
        """The same load without a rate."""
        return replace(self, share=None)


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity over the rounds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the rounds."""
        return median(self.rounds)

    def text(self, form: str = ",.0f") -> str:
        """Median, then lowest and highest in brackets."""
        return f"{self.median:{form}} [{min(self.rounds):{form}}–{max(self.rounds):{form}}]"


@dataclass(frozen=True, slots=True)
class Run:
    """One round of one relay under one load.

    Attributes:
        rate: accepted messages per second.
        cpu_us: of the relay and all its processes, export and delivery after the last reply included, per message.
        round_trips: of the upstream connection, per message; counted by the sink.
        spans: that reached the collector, per message.
        beside_cpu_us: the part of `cpu_us` of processes that work for it, as a database's; None: it was not asked.
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
    beside_cpu_us: float | None = None


@dataclass(slots=True)
class Load:
    """All relays under one load.

    Attributes:
        ceiling: messages per second of load generator and sink without a relay between them, one figure per round.
        relays: by name, the runs, one per round; the n-th runs of all relays were made one after another.
        failed: relay -> when and why it was left out; runs that it made before are kept.
    """

    cell: Cell
    ceiling: list[float] = field(default_factory=list)
    relays: dict[str, list[Run]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """The gateway at rest between two stretches of the long run.

    Attributes:
        at_seconds: since the load began.
        accepted, failed: messages of all loads during the stretch before.
        p99_ms: of the 1 KB mails during the stretch before.
        objects: that the garbage collector tracks, after a collection.
        blocks: of memory that the interpreter holds.
    """

    at_seconds: float
    accepted: int
    failed: int
    p50_ms: float
    p99_ms: float
    resident_octets: int
    descriptors: int
    objects: int
    blocks: int


@dataclass(slots=True)
class LongRun:
    """Mixed load on one gateway for a long time."""

    relay: str
    rate: float  # of the 1 KB mails, per second
    samples: list[Sample] = field(default_factory=list)

    def quarters(self, quantity: Callable[[Sample], float]) -> tuple[float, float] | None:
        """The medians of the first quarter of the samples and of the last; None: there are too few for that."""
        if len(self.samples) < 4:
            return None
        quarter = len(self.samples) // 4
        return median(map(quantity, self.samples[:quarter])), median(map(quantity, self.samples[-quarter:]))


@dataclass(frozen=True, slots=True)
class Spent:
    """One function's share of a mail, from the profile of the in-process lab; times include the profiler's own."""

    function: str
    calls: float
    own_us: float


@dataclass(slots=True)
class Lab:
    """What the in-process lab found, per mail.

    Attributes:
        microseconds: by what observes, the least of the batches.
        python_calls, c_calls: by what observes.
        idle_octets: of Python objects, per idle connection.
        otlp_octets: of a mail's spans, encoded.
        profile: the most costly functions with everything observing, the first the worst.
    """

    microseconds: dict[str, float]
    python_calls: dict[str, float]
    c_calls: dict[str, float]
    idle_octets: float
    otlp_octets: float
    profile: list[Spent]


@dataclass(slots=True)
class Results:
    """All that was measured.

    Attributes:
        date: of the beginning, UTC, ISO 8601.
        machine: what it ran on, in words.
        cpus: that it has.
        load_average: part of the run -> the load average of one minute before and after it.
        languages: relay -> the language that it is written in.
        gateways: those of the relays that are ours.
        idle_octets: relay -> resident octets for each idle connection.
        cold_start_seconds: relay -> from start to the first 220.
        peak_octets: relay -> highest resident memory over the headline's loads.
        large_mails_peak_octets: relay -> highest resident memory while `large_mails` of 25 MiB passed at once.
        second_opinion: relay -> messages per second by Postfix's smtp-source through it to Postfix's smtp-sink.
        spread: two workers had cores that neither load generator nor sink used.
        skipped: relay or figure -> why.
    """

    date: str = ""
    machine: str = ""
    cpus: int = 1
    load_average: dict[str, tuple[float, float]] = field(default_factory=dict)
    languages: dict[str, str] = field(default_factory=dict)
    gateways: list[str] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    idle_octets: dict[str, Figure] = field(default_factory=dict)
    cold_start_seconds: dict[str, Figure] = field(default_factory=dict)
    peak_octets: dict[str, int] = field(default_factory=dict)
    large_mails: int = 100
    large_mails_peak_octets: dict[str, Figure] = field(default_factory=dict)
    second_opinion: dict[str, Figure] = field(default_factory=dict)
    long_run: LongRun | None = None
    lab: Lab | None = None
    spread: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    def load(self, cell: Cell) -> Load:
        """The runs under one load; empty if there are none yet."""
        for load in self.loads:
            if load.cell == cell:
                return load
        self.loads.append(Load(cell))
        return self.loads[-1]

    def runs(self, cell: Cell, relay: str) -> list[Run]:
        """The runs of one relay under one load."""
        return next((load.relays.get(relay, []) for load in self.loads if load.cell == cell), [])

    def figure(self, cell: Cell, relay: str, quantity: Callable[[Run], float]) -> Figure | None:
        """One quantity of one relay; None: not measured."""
        runs = self.runs(cell, relay)
        return Figure(tuple(quantity(run) for run in runs)) if runs else None

    def ratio(
        self,
        cell: Cell,
        above: str,
        below: str,
        quantity: Callable[[Run], float],
        combined: Callable[[float, float], float] = lambda a, b: a / b,
    ) -> Figure | None:
        """`above` over `below`, round by round: what the machine did meanwhile met both alike.

        Args:
            combined: another function of the two than their quotient.
        """
        pairs = zip(self.runs(cell, above), self.runs(cell, below), strict=False)
        found = tuple(combined(quantity(a), quantity(b)) for a, b in pairs if quantity(b))
        return Figure(found) if found else None


def rate(run: Run) -> float:
    """Messages per second."""
    return run.rate


def cpu(run: Run) -> float:
    """Microseconds of CPU per message."""
    return run.cpu_us


def own_cpu(run: Run) -> float:
    """Microseconds of CPU per message, without what works for it beside; 0: not measured."""
    return 0.0 if run.beside_cpu_us is None else run.cpu_us - run.beside_cpu_us


def p99(run: Run) -> float:
    """The 99th percentile of the latency, in milliseconds."""
    return run.p99_ms


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
