"""The performance goals, each computed from the figures of one and the same run."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.bench.figures import KIB, MIB, Cell, Figure, Results, Run, cpu, rate, table
from tests.bench.targets import gateway, peers

TRACED = gateway.GATEWAY_TRACED.name
OFF = gateway.GATEWAY_OFF.name
SAMPLED = gateway.GATEWAY_SAMPLED.name
TWO = gateway.GATEWAY_TWO.name
QUEUE = gateway.GATEWAY_QUEUE.name
AIOSMTPD = peers.AIOSMTPD.name
AIOSMTPD_TRACED = peers.AIOSMTPD_TRACED.name
NODEMAILER = peers.NODEMAILER.name
POSTFIX_QUEUE = peers.POSTFIX_QUEUE.name
POSTFIX_PROXY = peers.POSTFIX_PROXY.name


class Goal(NamedTuple):
    """One goal and what was found; `is_met` None: not measured in this run."""

    what: str
    wanted: str
    found: str
    is_met: bool | None


def goals(results: Results, cell: Cell, many: Cell) -> Iterator[Goal]:
    """Every goal.

    Args:
        cell: the load whose ratios count.
        many: the load with enough sessions to keep two workers busy.
    """

    def at_most(what: str, quantity: Callable[[Run], float], below: str, most: float, wanted: str) -> Goal:
        return judge(what, results.ratio(cell, TRACED, below, quantity), wanted, lambda value: value <= most)

    def at_least(what: str, above: str, below: str, least: float, where: Cell = cell) -> Goal:
        ratio = results.ratio(where, above, below, rate)
        return judge(what, ratio, f"≥ {least:g}", lambda value: value >= least)

    yield at_most("CPU a message, fully traced : aiosmtpd + aiosmtplib untraced", cpu, AIOSMTPD, 1 / 5, "≤ 1/5")
    yield at_most("CPU a message, fully traced : nodemailer untraced", cpu, NODEMAILER, 1 / 2, "≤ 1/2")
    yield at_most("CPU a message, fully traced : Postfix queue", cpu, POSTFIX_QUEUE, 1 / 20, "≤ 1/20")
    yield at_least("messages/s, fully traced : aiosmtpd + aiosmtplib untraced", TRACED, AIOSMTPD, 5)
    yield at_least("messages/s, fully traced : nodemailer untraced", TRACED, NODEMAILER, 2)
    yield at_least("messages/s, fully traced : Postfix smtpd_proxy_filter", TRACED, POSTFIX_PROXY, 1.5)
    yield at_least("messages/s, fully traced : tracing off", TRACED, OFF, 0.75)
    yield judge(
        "CPU that tracing adds a message, the gateway's : the SDK's on aiosmtpd",
        tracing_tax(results, cell),
        "≤ 1/10",
        lambda value: value <= 1 / 10,
    )
    yield at_least("messages/s, sampled to nothing : tracing off", SAMPLED, OFF, 0.95)
    yield at_least("messages/s, 2 workers : 1 (tracing off)", TWO, OFF, 1.7, many)
    yield at_least("durable messages/s, queue : Postfix queue", QUEUE, POSTFIX_QUEUE, 5)
    idle = results.idle_octets.get(TRACED)
    yield Goal(
        "memory of an idle connection, fully traced",
        "≤ 4 KiB",
        f"{idle.median / KIB:.1f} KiB" if idle else "not measured",
        idle.median <= 4 * KIB if idle else None,
    )
    start = results.cold_start_seconds.get(TRACED)
    yield Goal(
        "cold start to the first 220, fully traced",
        "< 0.35 s",
        f"{start.text('.2f')} s" if start else "not measured",
        start.median < 0.35 if start else None,
    )
    peak = results.large_mails_peak_octets.get(TRACED)
    yield Goal(
        f"resident memory with {results.large_mails} mails of 25 MiB at once",
        "< 200 MiB",
        f"{peak / MIB:.0f} MiB" if peak else "not measured",
        peak < 200 * MIB if peak else None,
    )


def tracing_tax(results: Results, cell: Cell) -> Figure | None:
    """What full tracing adds to the gateway's CPU, as a share of what it adds to the relay with the SDK."""
    loads = results.loads.get(cell, {})
    if not all(loads.get(name) for name in (TRACED, OFF, AIOSMTPD, AIOSMTPD_TRACED)):
        return None
    taxes = [
        (ours.cpu_us - off.cpu_us) / (theirs.cpu_us - plain.cpu_us)
        for ours, off, theirs, plain in zip(
            loads[TRACED], loads[OFF], loads[AIOSMTPD_TRACED], loads[AIOSMTPD], strict=False
        )
        if theirs.cpu_us > plain.cpu_us
    ]
    return Figure(tuple(taxes)) if taxes else None


def judge(what: str, ratio: Figure | None, wanted: str, is_met: Callable[[float], bool]) -> Goal:
    """A goal on a ratio: the median of the rounds decides."""
    if ratio is None:
        return Goal(what, wanted, "not measured", None)
    return Goal(what, wanted, ratio.text(".3f" if ratio.median < 0.3 else ".2f"), is_met(ratio.median))


def markdown(found: list[Goal]) -> str:
    """The goals as a table."""
    words = {True: "met", False: "**not met**", None: "–"}
    return table(
        ["goal", "wanted", "found (median [lowest–highest])", ""],
        [[goal.what, goal.wanted, goal.found, words[goal.is_met]] for goal in found],
    )
