"""The report: ratios first, then the figures they come from; the same as JSON."""

import os
import platform
from dataclasses import asdict
from typing import Any

from tests.bench.figures import KIB, MIB, Cell, Results, Run, cpu, rate, table
from tests.bench.goals import Goal, markdown

_BASE = "gateway, all exported"


def as_markdown(results: Results, goals: list[Goal]) -> str:
    """The whole report."""
    parts = [f"Machine: {machine()}.", "## Goals", markdown(goals)]
    for cell, loads in results.loads.items():
        parts += [f"## {cell}", _load_table(results, cell, loads)]
        parts.append(f"Load generator into the sink, no relay between: {results.ceiling[cell]:,.0f} messages/s.")
    names = [*dict.fromkeys([*results.idle_octets, *results.cold_start_seconds, *results.peak_octets])]
    if names:
        parts += ["## Memory and start", _memory_table(results, names)]
    if results.second_opinion:
        parts.append("## Second opinion: smtp-source and smtp-sink, 1 KB, 10 sessions, kept connections")
        rows = [[name, figure.text()] for name, figure in results.second_opinion.items()]
        parts.append(table(["relay", "messages/s"], rows))
    if results.skipped:
        parts += ["## Skipped", table(["what", "why"], [[what, why] for what, why in results.skipped.items()])]
    return "\n\n".join(parts) + "\n"


def as_json(results: Results, goals: list[Goal]) -> dict[str, Any]:
    """All rounds of all figures."""
    return {
        "machine": machine(),
        "goals": [goal._asdict() for goal in goals],
        "loads": [
            {
                "load": asdict(cell),
                "ceiling": results.ceiling[cell],
                "relay": name,
                "rounds": [asdict(run) for run in runs],
            }
            for cell, loads in results.loads.items()
            for name, runs in loads.items()
        ],
        "idle_octets": {name: figure.rounds for name, figure in results.idle_octets.items()},
        "cold_start_seconds": {name: figure.rounds for name, figure in results.cold_start_seconds.items()},
        "peak_octets": results.peak_octets,
        "large_mails": results.large_mails,
        "large_mails_peak_octets": results.large_mails_peak_octets,
        "second_opinion": {name: figure.rounds for name, figure in results.second_opinion.items()},
        "skipped": results.skipped,
    }


def machine() -> str:
    """What it ran on, without names."""
    build = "PGO" if "profile" in str(__import__("sysconfig").get_config_var("PY_CFLAGS_NODIST")) else "no PGO"
    return (
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.release().partition('-')[0]}, "
        f"Python {platform.python_version()} ({build}), load average {os.getloadavg()[0]:.1f} at the end"
    )


def _load_table(results: Results, cell: Cell, loads: dict[str, list[Run]]) -> str:
    rows = []
    for name, runs in loads.items():
        relative_rate = results.ratio(cell, _BASE, name, rate)
        relative_cpu = results.ratio(cell, name, _BASE, cpu)
        failed = sum(run.failed for run in runs)
        rows.append(
            [
                name + (f" ({failed} failed)" if failed else ""),
                relative_rate.text(".2f") if relative_rate else "",
                relative_cpu.text(".2f") if relative_cpu else "",
                *(
                    figure.text(form)
                    for quantity, form in (
                        (rate, ",.0f"),
                        (cpu, ",.0f"),
                        (lambda run: run.p50_ms, ".2f"),
                        (lambda run: run.p99_ms, ".1f"),
                        (lambda run: run.round_trips, ".1f"),
                        (lambda run: run.spans, ".1f"),
                    )
                    if (figure := results.figure(cell, name, quantity))
                ),
            ]
        )
    head = [
        "relay", f"rate of *{_BASE}* : this", f"CPU of this : *{_BASE}*", "messages/s", "CPU us a message", "p50 ms",
        "p99 ms", "upstream round trips a message", "spans a message",
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
                f"{idle.median / KIB:.1f}" if idle else "",
                start.text(".2f") if start else "",
                f"{peak / MIB:.0f}" if peak else "",
                f"{large / MIB:.0f}" if large else "",
            ]
        )
    head = [
        "relay", "KiB an idle connection", "s to the first 220", "peak RSS MiB over the loads",
        f"peak RSS MiB, {results.large_mails} mails of 25 MiB at once",
    ]  # fmt: skip
    return table(head, rows)
