"""The headlines as pictures: one SVG each, drawn from the results of a run. Needs the extra `bench` (Matplotlib)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.bench.figures import KIB, Figure, Results, cpu, rate
from tests.bench.goals import DURABLE, HEADLINE, TRACED

_OURS: Final = "#c2410c"  # the headline's gateway
_OUR_OTHERS: Final = "#fdba74"
_OTHERS: Final = "#64748b"
_INK: Final = "#1f2937"
# Text stays text, in whatever sans-serif the reader has; and the same results give the same file.
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "otel-smtp",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

Bars = Mapping[str, Figure]


def _under_the_headline(results: Results, quantity: Callable[..., float]) -> Bars:
    found = {name: results.figure(HEADLINE, name, quantity) for load in results.loads for name in load.relays}
    return {name: figure for name, figure in found.items() if figure is not None}


def _durable(results: Results) -> Bars:
    return {
        f"{name}, {load.cell.sessions} sessions": Figure(tuple(map(rate, runs)))
        for load in results.loads
        if load.cell in DURABLE
        for name, runs in load.relays.items()
    }


def _idle(results: Results) -> Bars:
    return {
        name: Figure(tuple(octets / KIB for octets in figure.rounds)) for name, figure in results.idle_octets.items()
    }


# Name of the file -> title, what is better, and the bars.
CHARTS: Final[Mapping[str, tuple[str, str, Callable[[Results], Bars]]]] = {
    "cpu-per-mail.svg": (
        "CPU per mail, µs (1 KB, 10 sessions, kept connections)",
        "less",
        lambda results: _under_the_headline(results, cpu),
    ),
    "mails-per-second.svg": (
        "Mails per second (1 KB, 10 sessions, kept connections)",
        "more",
        lambda results: _under_the_headline(results, rate),
    ),
    "idle-memory.svg": ("Memory of an idle connection, KiB", "less", _idle),
    "durable-mails-per-second.svg": ("Durable mails per second (1 KB, same disk)", "more", _durable),
}


def draw(results: Results, directory: Path) -> list[str]:
    """Draw every chart for which there are figures; the names of the files.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib import rc_context

    drawn = []
    for name, (title, better, bars) in CHARTS.items():
        if found := bars(results):
            with rc_context(_STYLE):
                _draw(directory / name, title, better, found, results)
            drawn.append(name)
    return drawn


def _draw(path: Path, title: str, better: str, bars: Bars, results: Results) -> None:
    from matplotlib.figure import Figure as Picture

    ordered = sorted(bars.items(), key=lambda bar: bar[1].median, reverse=better == "less")  # the best on top
    medians = [figure.median for _, figure in ordered]
    ranges = [
        [figure.median - min(figure.rounds) for _, figure in ordered],
        [max(figure.rounds) - figure.median for _, figure in ordered],
    ]
    picture = Picture(figsize=(8.6, 1.1 + 0.32 * len(ordered)), layout="constrained")
    axes = picture.subplots()
    axes.barh(
        range(len(ordered)),
        medians,
        color=[_color(name, results) for name, _ in ordered],
        xerr=ranges,
        error_kw={"ecolor": _INK, "elinewidth": 0.8, "capsize": 2},
    )
    axes.set_yticks(range(len(ordered)), [_label(name, results) for name, _ in ordered])
    highest = max(max(figure.rounds) for _, figure in ordered)
    for at, (_, figure) in enumerate(ordered):
        form = ",.0f" if figure.median >= 20 else ".1f"
        axes.text(max(figure.rounds) + highest * 0.012, at, f"{figure.median:{form}}", va="center", fontsize=9)
    axes.set_xlim(0, highest * 1.12)
    picture.suptitle(f"{title}: {better} is better", x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(_small_print(results, ordered), fontsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    picture.savefig(path, metadata={"Title": title, "Date": None, "Creator": None})


def _small_print(results: Results, ordered: Sequence[tuple[str, Figure]]) -> str:
    rounds = max(len(figure.rounds) for _, figure in ordered)
    cpus, _, _ = results.machine.partition(",")
    return f"Median of {rounds} interleaved rounds; lines: lowest to highest. {results.date[:10]}, {cpus}."


def _color(name: str, results: Results) -> str:
    if name == TRACED or name.startswith("gateway-queue, traced"):
        return _OURS
    return _OUR_OTHERS if any(name.startswith(ours) for ours in results.gateways) else _OTHERS


def _label(name: str, results: Results) -> str:
    language = next((spoken for relay, spoken in results.languages.items() if name.startswith(relay)), "")
    ours = any(name.startswith(relay) for relay in results.gateways)
    return name if ours or not language or f"({language})" in name else f"{name} ({language})"
