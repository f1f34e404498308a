"""The report: goals first, then ratios, then the figures they come from; the same as JSON, and one paragraph of it."""

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from tests.bench.charts import CHARTS
from tests.bench.figures import KIB, MIB, Figure, Load, Results, Run, Sample, cpu, p99, rate, table
from tests.bench.goals import HEADLINE, TRACED, goals, markdown, outrun
from tests.bench.targets import gateway

JSON_NAME: Final = "figures.json"
MARKDOWN_NAME: Final = "figures.md"
LEAST_ROUNDS: Final = 5
# Of one minute, per CPU, before the benchmark began: above, somebody else was at work.
_QUIET_LOAD: Final = 0.25
_WANTED_LANGUAGES: Final = ("Go", "C", "JavaScript")


def encode(results: Results) -> bytes:
    """All rounds of all figures as JSON, with the goals, which are not read back."""
    judged = [goal._asdict() for goal in goals(results)]
    return msgspec.json.format(msgspec.json.encode({"goals": judged, **_fields(results)}), indent=1) + b"\n"


def _fields(results: Results) -> dict[str, Any]:
    return dict(msgspec.to_builtins(results))


def decode(text: bytes) -> Results:
    """The results of a file that `encode` made.

    Raises:
        msgspec.DecodeError: it is none.
    """
    return msgspec.json.decode(text, type=Results)


def machine() -> str:
    """What this is, without names."""
    is_distributions = Path(sys.base_prefix) == Path("/usr")
    model = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass
    return (
        f"{os.cpu_count()} CPUs{f' ({model})' if model else ''}, {platform.system()} "
        f"{platform.release().partition('-')[0]}, Python {platform.python_version()} "
        f"({'the distribution' if is_distributions else 'not the distribution'}'s build)"
    )


def reservations(results: Results) -> list[str]:
    """Why these figures are not for publication; empty: they are."""
    found = []
    rounds = len(results.runs(HEADLINE, TRACED))
    if rounds < LEAST_ROUNDS:
        found.append(f"{rounds} rounds of the headline, fewer than {LEAST_ROUNDS}")
    began = next(iter(results.load_average.values()), (0.0, 0.0))[0]
    if began > _QUIET_LOAD * results.cpus:
        found.append(f"the machine was busy before it began: load average {began:.2f}")
    return found


def headline(results: Results) -> str:
    """What the run showed, in one sentence, and nothing that it did not show; empty: it showed nothing to tell."""
    found = outrun(results)
    if all(found.get(language) for language in _WANTED_LANGUAGES):
        return "A fully traced gateway in Python that outruns the untraced relays in Go, C and JavaScript."
    ahead = [language for language, is_ahead in found.items() if is_ahead]
    behind = [language for language, is_ahead in found.items() if not is_ahead]
    if not ahead:
        return ""
    missing = [language for language in _WANTED_LANGUAGES if language not in found]
    return (
        f"Fully traced, it relays more mails per second than the untraced relays in {_listed(ahead)}"
        + (f", but not more than those in {_listed(behind)}" if behind else "")
        + (f" (no relay in {_listed(missing)} was measured to the end)" if missing else "")
        + "."
    )


def readme(results: Results) -> str:
    """What the README shows of a run; empty: it is not for publication."""
    if reservations(results):
        return ""
    judged = [goal.is_met for goal in goals(results) if goal.is_met is not None]
    said = headline(results)
    pictures = "\n".join(
        f'<img src="deploy/reference/figures/{name}" alt="{title}" width="49%">'
        for name, (title, _, bars) in CHARTS.items()
        if bars(results)
    )
    return "\n\n".join(
        [
            "## How fast it is",
            *([f"**{said}**"] if said else []),
            pictures,
            f"One run on {results.date[:10]}, {results.machine.partition(',')[0]}: medians of "
            f"{len(results.runs(HEADLINE, TRACED))} interleaved rounds. "
            f"It met {sum(judged)} of {len(judged)} goals;\n"
            f"[all figures](deploy/reference/figures/{MARKDOWN_NAME}) show which. `python -m tests.bench` measures "
            "them on your machine.",
        ]
    )


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def as_markdown(results: Results, charts: list[str]) -> str:
    """The whole report.

    Args:
        charts: names of the pictures that lie beside it.
    """
    parts = [
        "# Figures",
        f"Made by `python -m tests.bench` on {results.date[:10]}: do not edit. {results.machine}.",
        "Each figure is the median of its rounds, with the lowest and the highest; ratios are taken within a round, "
        "in which all relays are measured one after another. CPU is user and system time of all processes of a relay, "
        "until export and delivery are done. Only ratios travel to other machines.",
    ]
    if why := reservations(results):
        parts.append(f"**Not for publication: {'; '.join(why)}.**")
    if said := headline(results):
        parts.append(said)
    parts += [f"![]({name})" for name in charts]
    parts += ["## Goals", markdown(list(goals(results)))]
    for load in results.loads:
        if load.relays or load.failed:
            parts += [f"## {load.cell}", _load_table(results, load)]
        if load.ceiling:
            ceiling = Figure(tuple(load.ceiling)).text()
            parts.append(f"Load generator into the sink, no relay between: {ceiling} mails/s.")
    names = [*dict.fromkeys([*results.idle_octets, *results.cold_start_seconds, *results.peak_octets])]
    if names:
        parts += ["## Memory and start", _memory_table(results, names)]
    if results.second_opinion:
        parts.append("## Second opinion: smtp-source and smtp-sink, 1 KB, 10 sessions, kept connections")
        parts.append(table(["relay", "mails/s"], [[name, one.text()] for name, one in results.second_opinion.items()]))
    parts += _long_run(results) + _lab(results)
    if results.load_average:
        rows = [[part, f"{before:.2f}", f"{after:.2f}"] for part, (before, after) in results.load_average.items()]
        parts += ["## Load average of one minute", table(["part", "before", "after"], rows)]
    if results.skipped:
        parts += ["## Skipped", table(["what", "why"], [[what, why] for what, why in results.skipped.items()])]
    return "\n\n".join(parts) + "\n"


def _load_table(results: Results, load: Load) -> str:
    base = TRACED if TRACED in load.relays else gateway.QUEUE.name
    quantities: tuple[tuple[Callable[[Run], float], str], ...] = (
        (rate, ",.0f"),
        (cpu, ",.0f"),
        (lambda run: run.p50_ms, ".2f"),
        (p99, ".2f"),
        (lambda run: run.round_trips, ".1f"),
        (lambda run: run.spans, ".1f"),
    )
    rows = []
    for name, runs in load.relays.items():
        relative_rate = results.ratio(load.cell, base, name, rate)
        relative_cpu = results.ratio(load.cell, base, name, cpu)
        failed = sum(run.failed for run in runs)
        rows.append(
            [
                name + (f" (**{failed} mails failed**)" if failed else ""),
                relative_cpu.text(".2f") if relative_cpu else "",
                relative_rate.text(".2f") if relative_rate else "",
                *(Figure(tuple(map(quantity, runs))).text(form) for quantity, form in quantities),
            ]
        )
    rows += [[f"{name}: **failed**: {why}", *[""] * 8] for name, why in load.failed.items()]
    head = [
        "relay", f"CPU of *{base}* : this", f"rate of *{base}* : this", "mails/s", "CPU µs per mail", "p50 ms",
        "p99 ms", "upstream round trips per mail", "spans per mail",
    ]  # fmt: skip
    return table(head, rows)


def _memory_table(results: Results, names: list[str]) -> str:
    rows = []
    for name in names:
        idle = results.idle_octets.get(name)
        start = results.cold_start_seconds.get(name)
        peak = results.peak_octets.get(name)
        large = results.large_mails_peak_octets.get(name)
        rows.append(
            [
                name,
                Figure(tuple(octets / KIB for octets in idle.rounds)).text(".1f") if idle else "",
                start.text(".2f") if start else "",
                f"{peak / MIB:.0f}" if peak else "",
                Figure(tuple(octets / MIB for octets in large.rounds)).text() if large else "",
            ]
        )
    head = [
        "relay", "KiB per idle connection", "s to the first 220", "peak resident MiB under load",
        f"peak resident MiB, {results.large_mails} mails of 25 MiB at once",
    ]  # fmt: skip
    return table(head, rows)


def _long_run(results: Results) -> list[str]:
    run = results.long_run
    if run is None or not run.samples:
        return []
    columns: tuple[tuple[str, Callable[[Sample], str]], ...] = (
        ("minutes", lambda sample: f"{sample.at_seconds / 60:.1f}"),
        ("mails since the line before", lambda sample: f"{sample.accepted:,}"),
        ("failed", lambda sample: f"{sample.failed}"),
        ("p50 ms", lambda sample: f"{sample.p50_ms:.2f}"),
        ("p99 ms", lambda sample: f"{sample.p99_ms:.2f}"),
        ("resident MiB", lambda sample: f"{sample.resident_octets / MIB:.1f}"),
        ("descriptors", lambda sample: f"{sample.descriptors}"),
        ("objects", lambda sample: f"{sample.objects:,}"),
        ("blocks of memory", lambda sample: f"{sample.blocks:,}"),
    )
    rows = [[show(sample) for _, show in columns] for sample in run.samples]
    return [
        f"## Long run: {run.samples[-1].at_seconds / 60:.0f} minutes of mixed load",
        f"*{run.relay}*: {run.rate:,.0f} mails/s of 1 KB over kept connections, whose latency is shown; beside them "
        "mails of 10 KB, each over a connection of its own, and of 5 MiB. What it holds is counted at rest, after each "
        "stretch.",
        table([name for name, _ in columns], rows),
    ]


def _lab(results: Results) -> list[str]:
    lab = results.lab
    if lab is None:
        return []
    rows = [
        [name, f"{least:.1f}", f"{lab.python_calls[name]:.0f}", f"{lab.c_calls[name]:.0f}"]
        for name, least in lab.microseconds.items()
    ]
    spent = [[one.function, f"{one.calls:.1f}", f"{one.own_us:.1f}"] for one in lab.profile]
    return [
        "## In process, without sockets",
        table(["what observes", "µs of CPU per mail, the least", "Python calls", "C calls"], rows),
        "Where the time goes with everything on; the profiler's own is in it, so these are shares and not times:",
        table(["function", "calls per mail", "own µs per mail"], spent),
    ]
