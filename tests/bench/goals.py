"""The performance goals, each judged by the figures of one and the same run: ratios by their median over the rounds."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from tests.bench.figures import KIB, MIB, Cell, Figure, Results, Run, Sample, cpu, own_cpu, p99, rate, table
from tests.bench.targets import gateway, peers

HEADLINE: Final = Cell(10, 1 * KIB)
LARGER: Final = Cell(10, 10 * KIB)
LARGE: Final = Cell(10, 5 * MIB)
SINGLE: Final = Cell(10, 1 * KIB, keeps_connections=False)
MANY: Final = Cell(50, 1 * KIB)  # sessions enough to keep two workers busy
HALF: Final = Cell(10, 1 * KIB, share=0.5)
DURABLE: Final = (Cell(10, 1 * KIB, is_queued=True), Cell(50, 1 * KIB, is_queued=True))

TRACED: Final = gateway.TRACED.name
_OFF: Final = gateway.OFF.name
_QUEUE: Final = gateway.QUEUE.name
_AIOSMTPD: Final = peers.AIOSMTPD.name
_POSTFIX_PROXY: Final = peers.POSTFIX_PROXY.name
_POSTFIX_QUEUE: Final = peers.POSTFIX_QUEUE.name


class Goal(NamedTuple):
    """One goal and what was found; `is_met` None: not measured in this run."""

    what: str
    wanted: str
    found: str
    is_met: bool | None


def judge(what: str, figure: Figure | float | None, *, most: float = 0, least: float = 0, unit: str = "") -> Goal:
    """A goal with a bound on one side."""
    suffix = f" {unit}" if unit else ""
    wanted = f"≤ {most:g}{suffix}" if most else f"≥ {least:g}{suffix}"
    if figure is None:
        return Goal(what, wanted, "not measured", None)
    value = figure.median if isinstance(figure, Figure) else figure
    form = ".2f" if value < 10 else ",.0f" if value >= 100 else ".1f"
    found = figure.text(form) if isinstance(figure, Figure) else f"{value:{form}}"
    return Goal(what, wanted, f"{found}{suffix}", value <= most if most else value >= least)


def scaled(figure: Figure | None, divisor: float) -> Figure | None:
    """A figure in another unit."""
    return Figure(tuple(value / divisor for value in figure.rounds)) if figure else None


def in_go(results: Results) -> list[str]:
    """The relays in Go: from go-smtp's parts, and what the command line names."""
    return [name for name, language in results.languages.items() if language == "Go"]


def goals(results: Results) -> Iterator[Goal]:
    """Every goal. "Traced" is everything traced and exported, with the live page on."""

    def ratio(cell: Cell, above: str, below: str, quantity: Callable[[Run], float]) -> Figure | None:
        return results.ratio(cell, above, below, quantity)

    go = in_go(results) or [peers.GO_SMTP.name]
    compared: Sequence[tuple[str, float, float]] = (
        (_AIOSMTPD, 0.27, 4),
        (peers.NODEMAILER.name, 0.6, 1.8),
        *((name, 0.7, 1.35) for name in go),
        (_POSTFIX_PROXY, 0.55, 1.6),
    )
    for name, most, _ in compared:
        yield judge(f"CPU per mail, traced : {name}", ratio(HEADLINE, TRACED, name, cpu), most=most)
    null = peers.NULL.name
    yield judge(f"CPU per mail, traced : {null}", ratio(HEADLINE, TRACED, null, cpu), most=3)
    for name, _, least in compared:
        yield judge(f"mails/s, traced : {name}", ratio(HEADLINE, TRACED, name, rate), least=least)
    yield judge(f"CPU per mail of 10 KB, traced : {_AIOSMTPD}", ratio(LARGER, TRACED, _AIOSMTPD, cpu), most=0.2)
    only = gateway.TRACED_ONLY.name
    yield judge(
        "CPU per mail, as installed (page, access log into a pipe, traces, metrics and logs) : traced only",
        ratio(HEADLINE, gateway.AS_INSTALLED.name, only, cpu),
        most=1.3,
    )
    yield judge("CPU per mail, traced only : tracing off", ratio(HEADLINE, only, _OFF, cpu), most=1.35)
    yield judge(
        "CPU per mail that tracing adds",
        results.ratio(HEADLINE, only, _OFF, cpu, lambda traced, off: traced - off),
        most=25,
        unit="µs",
    )
    sampled = gateway.SAMPLED.name
    yield judge("mails/s, sampled to nothing : tracing off", ratio(HEADLINE, sampled, _OFF, rate), least=0.97)
    yield judge("p99 at half of its own highest rate, traced : tracing off", ratio(HALF, TRACED, _OFF, p99), most=1.25)
    yield judge(
        f"CPU per mail of 5 MiB, traced : {_POSTFIX_PROXY}", ratio(LARGE, TRACED, _POSTFIX_PROXY, cpu), most=1.0
    )
    yield judge("idle connection, traced", scaled(results.idle_octets.get(TRACED), KIB), most=3, unit="KiB")
    yield judge("cold start to the first 220, traced", results.cold_start_seconds.get(TRACED), most=0.3, unit="s")
    yield judge(
        f"resident, {results.large_mails} mails of 25 MiB at once",
        scaled(results.large_mails_peak_octets.get(TRACED), MIB),
        most=150,
        unit="MiB",
    )
    for cell, least in zip(DURABLE, (4.5, 3), strict=True):
        yield judge(
            f"durable mails/s, {cell.sessions} sessions, traced : {_POSTFIX_QUEUE}, same disk",
            ratio(cell, _QUEUE, _POSTFIX_QUEUE, rate),
            least=least,
        )
    for cell in DURABLE:
        yield judge(
            f"CPU per durable mail, {cell.sessions} sessions, traced",
            results.figure(cell, _QUEUE, cpu),
            most=250,
            unit="µs",
        )
    shared, of_many = gateway.QUEUE_POSTGRESQL.name, DURABLE[-1]
    yield judge(
        f"durable mails/s, 50 sessions, traced, in PostgreSQL : {_QUEUE}",
        ratio(of_many, shared, _QUEUE, rate),
        least=0.5,
    )
    yield judge(
        f"CPU per durable mail with the database's, 50 sessions, in PostgreSQL : {_QUEUE}",
        ratio(of_many, shared, _QUEUE, cpu),
        most=2.2,
    )
    yield judge(
        f"CPU per durable mail of the gateway alone, 50 sessions, in PostgreSQL : {_QUEUE}",
        ratio(of_many, shared, _QUEUE, own_cpu),
        most=0.7,
    )
    two = gateway.TWO.name
    if results.spread:
        yield judge("mails/s, 2 workers : 1, on cores of their own", ratio(MANY, two, TRACED, rate), least=1.8)
    else:
        what = "CPU per mail, 2 workers : 1 (the load has no cores of its own here)"
        yield judge(what, ratio(MANY, two, TRACED, cpu), most=1.05)
    yield from _of_the_long_run(results)
    yield from _of_the_lab(results)


def _of_the_long_run(results: Results) -> Iterator[Goal]:
    quantities: Sequence[tuple[str, Callable[[Sample], float]]] = (
        ("p99", lambda sample: sample.p99_ms),
        ("resident memory", lambda sample: sample.resident_octets),
        ("descriptors", lambda sample: sample.descriptors),
        ("objects", lambda sample: sample.objects),
    )
    for what, quantity in quantities:
        quarters = results.long_run.quarters(quantity) if results.long_run else None
        found = quarters[1] / quarters[0] if quarters and quarters[0] else None
        yield judge(f"long run, {what}: last quarter : first quarter", found, most=1.1)


def _of_the_lab(results: Results) -> Iterator[Goal]:
    lab = results.lab
    everything = lab.microseconds["everything"] if lab else None
    telemetry = lab.microseconds["everything"] - lab.microseconds["none"] if lab else None
    yield judge("in process, everything on, per mail", everything, most=60, unit="µs")
    yield judge("in process, telemetry's part of it", telemetry, most=22, unit="µs")
    yield judge("Python calls per mail, traced", lab.python_calls["everything"] if lab else None, most=260)
    yield judge("C calls per mail, traced", lab.c_calls["everything"] if lab else None, most=350)
    yield judge("Python calls per mail, no telemetry", lab.python_calls["none"] if lab else None, most=160)
    yield judge("OTLP per mail", lab.otlp_octets if lab else None, most=2300, unit="octets")
    yield judge("Python objects of an idle connection", lab.idle_octets if lab else None, most=2600, unit="octets")


def outrun(results: Results) -> dict[str, bool]:
    """By language, whether the traced gateway relays more per second than each untraced relay in it: in the median of
    the rounds' ratios, and of the rates themselves, which the chart shows.

    Our own relays and those that trace are left out; so is a language of which a relay failed before its last round.
    """
    found: dict[str, bool] = {}
    rounds = len(results.runs(HEADLINE, TRACED))
    incomplete = set()
    for name, language in results.languages.items():
        if name in results.gateways or name == peers.AIOSMTPD_TRACED.name or not language:
            continue
        ratio = results.ratio(HEADLINE, TRACED, name, rate)
        ours, theirs = results.figure(HEADLINE, TRACED, rate), results.figure(HEADLINE, name, rate)
        if ratio is not None and ours is not None and theirs is not None:
            is_ahead = ratio.median > 1 and ours.median > theirs.median
            found[language] = found.get(language, True) and is_ahead
            if len(ratio.rounds) < rounds:
                incomplete.add(language)
    return {language: is_ahead for language, is_ahead in found.items() if language not in incomplete}


def markdown(found: list[Goal]) -> str:
    """The goals as a table."""
    words = {True: "met", False: "**not met**", None: "–"}
    return table(
        ["goal", "wanted", "found: median [lowest–highest]", ""],
        [[goal.what, goal.wanted, goal.found, words[goal.is_met]] for goal in found],
    )
