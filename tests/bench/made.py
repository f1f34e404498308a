"""Results as a run of the benchmark leaves them, made up, for tests of what is made of them."""

from collections.abc import Mapping
from types import MappingProxyType

from tests.bench.figures import Cell, Figure, Lab, LongRun, Results, Run, Sample, Spent
from tests.bench.goals import DURABLE, HALF, HEADLINE, LARGE, LARGER, MANY
from tests.bench.targets import gateway, peers

GO = "smtprelay (Go)"
# CPU per mail in microseconds and mails per second, under which all goals are met.
GOOD: Mapping[str, tuple[float, float]] = {
    peers.NULL.name: (40, 20_000),
    gateway.OFF.name: (75, 12_000),
    gateway.SAMPLED.name: (76, 11_900),
    gateway.TRACED_ONLY.name: (95, 10_000),
    gateway.TRACED.name: (96, 9_900),
    gateway.AS_INSTALLED.name: (110, 9_000),
    peers.AIOSMTPD.name: (480, 2_000),
    peers.AIOSMTPD_TRACED.name: (700, 1_400),
    peers.NODEMAILER.name: (220, 4_200),
    peers.POSTFIX_PROXY.name: (240, 4_700),
    GO: (180, 5_900),
}
LANGUAGES: Mapping[str, str] = {
    GO: "Go",
    **{target.name: target.language for target in (peers.AIOSMTPD, peers.NODEMAILER, peers.POSTFIX_PROXY)},
    **{target.name: target.language for target in (gateway.OFF, gateway.TRACED, gateway.QUEUE, peers.AIOSMTPD_TRACED)},
}


def run(cpu_us: float, rate: float, *, p99_ms: float = 2.0, beside_cpu_us: float = 0.0) -> Run:
    """One round."""
    return Run(1000, 0, {}, rate, cpu_us, 1.0, p99_ms, 2.0, 3.0, beside_cpu_us)


def results(replaced: Mapping[str, tuple[float, float]] = MappingProxyType({}), *, rounds: int = 5) -> Results:
    """A whole run that meets all goals, but for the relays whose CPU and rate are given by name."""
    made = Results("2026-01-02T03:04:05+00:00", "2 CPUs (some), Linux 6", 2, {"headline": (0.1, 2.0)})
    made.languages = dict(LANGUAGES)
    made.gateways = [gateway.OFF.name, gateway.TRACED.name, gateway.QUEUE.name]

    def put(cell: Cell, relays: Mapping[str, tuple[float, float]]) -> None:
        load = made.load(cell)
        load.ceiling = [30_000.0] * rounds
        for name, figures in relays.items():
            load.relays[name] = [run(*figures)] * rounds

    put(HEADLINE, {**GOOD, **replaced})
    put(HALF, GOOD)
    put(LARGER, {gateway.TRACED.name: (110, 8_000), peers.AIOSMTPD.name: (740, 1_300)})
    put(LARGE, {gateway.TRACED.name: (17_000, 60), peers.POSTFIX_PROXY.name: (17_500, 70)})
    put(MANY, {gateway.TRACED.name: (96, 9_900), gateway.TWO.name: (98, 9_900)})
    for cell in DURABLE:
        put(cell, {gateway.QUEUE.name: (240, 4_000), peers.POSTFIX_QUEUE.name: (2_400, 700)})
        made.load(cell).relays[gateway.QUEUE_POSTGRESQL.name] = [run(500, 2_400, beside_cpu_us=340)] * rounds
    made.idle_octets = {gateway.TRACED.name: Figure((2_500.0,) * rounds)}
    made.cold_start_seconds = {gateway.TRACED.name: Figure((0.25,) * rounds)}
    made.large_mails_peak_octets = {gateway.TRACED.name: Figure((1e8,))}
    sample = Sample(60.0, 1000, 0, 1.0, 2.0, 60_000_000, 30, 90_000, 200_000)
    made.long_run = LongRun("gateway", 3000.0, [sample] * 8)
    made.lab = Lab(
        {"none": 30.0, "everything": 50.0}, {"none": 150.0, "everything": 250.0}, {"none": 200.0, "everything": 300.0},
        2500.0, 2200.0, [Spent("a.py:1 f", 1.0, 2.0)],
    )  # fmt: skip
    return made
