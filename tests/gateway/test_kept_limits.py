"""Limits over a restart: no window has more than the rate, however the process before ended."""

import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otel_smtp.forwarding.limits import LimitSettings, Permit
from otel_smtp.gateway.kept_limits import KeptLimits
from tests.forwarding.test_limits import most_in_a_window, take

SETTINGS = LimitSettings("l", 6, 60.0, 4)


class Machine:
    """Its two clocks, and the directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 1000.0
        self.booted_at = 0.0

    def monotonic(self) -> float:
        return self.now - self.booted_at

    def start(self, *limits: LimitSettings) -> KeptLimits:
        kept = KeptLimits(limits or (SETTINGS,), self.path, monotonic=self.monotonic, wall=lambda: self.now)
        kept.open()
        return kept

    def reboot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.booted_at = self.now - 10
        monkeypatch.setattr("otel_smtp.gateway.kept_limits._boot_id", lambda: f"booted at {self.booted_at}")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "limits")


def take_all(kept: KeptLimits, machine: Machine) -> int:
    """How many permits there are at this moment, each used at once."""
    number = 0
    while isinstance(take(kept.limits["l"], 1, machine.monotonic()), Permit):
        number += 1
    return number


@pytest.mark.parametrize("boots", [False, True])
@pytest.mark.parametrize(("passes", "available"), [(0, 0), (9, 0), (10, 1), (30, 2), (60, 2), (61, 4)])
async def test_a_limit_goes_on_where_it_was(
    machine: Machine, passes: float, available: int, boots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = machine.start()
    assert take_all(kept, machine) == 4
    kept.close()
    if boots:
        machine.reboot(monkeypatch)
    machine.now += passes
    assert take_all(machine.start(), machine) == available


async def test_it_rests_as_long_as_it_should(machine: Machine) -> None:
    kept = machine.start()
    kept.limits["l"].rest(100.0, machine.monotonic())
    kept.close()
    machine.now += 99
    kept = machine.start()
    assert take_all(kept, machine) == 0
    machine.now += 1
    assert take_all(kept, machine) == 4


async def test_what_was_in_flight_counts_from_the_restart(machine: Machine) -> None:
    kept = machine.start()
    for _ in range(4):
        assert isinstance(kept.limits["l"].take(1, machine.monotonic()), Permit)
    kept.close()
    machine.now += 59
    kept = machine.start()
    assert take_all(kept, machine) == 2
    machine.now += 59
    assert take_all(kept, machine) == 0
    machine.now += 2
    assert take_all(kept, machine) == 4


async def test_a_kill_costs_nothing_of_a_small_limit(machine: Machine) -> None:
    killed = machine.start()
    assert take_all(killed, machine) == 4
    machine.now += 10
    assert take_all(machine.start(), machine) == 1


async def test_what_one_that_was_killed_may_have_taken_counts_as_used(machine: Machine) -> None:
    of_day = LimitSettings("l", 1000, 86400.0, 1000)
    killed = machine.start(of_day)
    now = machine.monotonic()
    for _ in range(105):
        assert isinstance(take(killed.limits["l"], 1, now), Permit)
    kept = machine.start(of_day)
    assert kept.limits["l"].available(now) == 1000 - 100 - 9  # 1 % may be taken without that it is written, less one
    killed = machine.start(of_day)  # each kill costs as much, and no more
    assert killed.limits["l"].available(now) == 1000 - 100 - 2 * 9


async def test_another_rate_begins_anew(machine: Machine) -> None:
    kept = machine.start()
    take_all(kept, machine)
    kept.close()
    assert take_all(machine.start(LimitSettings("l", 7, 60.0, 4)), machine) == 4


async def test_a_damaged_file_is_told_and_costs_no_mail(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.path.write_bytes(b'{"boot": 3')
    with caplog.at_level(logging.WARNING):
        kept = machine.start()
    assert "they count from now" in caplog.text
    assert take_all(kept, machine) == 4
    kept.close()
    assert take_all(machine.start(), machine) == 0


async def test_a_file_that_cannot_be_written_is_told_once_and_costs_no_mail(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.path.with_name("limits.new").mkdir()
    with caplog.at_level(logging.WARNING):
        kept = machine.start()
        assert take_all(kept, machine) == 4
        kept.close()
    assert caplog.text.count("cannot be kept") == 1


STEPS = st.lists(
    st.tuples(st.sampled_from(["stop", "kill", "boot", "go on"]), st.floats(0, 40), st.integers(0, 40)), max_size=12
)


@settings(deadline=None)
@given(steps=STEPS, rate=st.sampled_from([(6, 4), (6, 1), (5, 5), (500, 500), (33_000, 40)]))
async def test_no_window_has_more_than_the_rate(
    steps: list[tuple[str, float, int]], rate: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    count, burst = rate
    machine = Machine(tmp_path_factory.mktemp("spool") / "limits")
    of_rate = LimitSettings("l", count, 60.0, burst)
    taken: list[tuple[float, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        kept = machine.start(of_rate)
        for end, passes, wanted in steps:
            if end == "stop" or end == "boot":
                kept.close()
                if end == "boot":
                    machine.reboot(patch)
            if end != "go on":
                kept = machine.start(of_rate)
            machine.now += passes
            permits = [take(kept.limits["l"], 1, machine.monotonic()) for _ in range(wanted)]
            taken += [(machine.now, 1) for one in permits if isinstance(one, Permit)]
    assert most_in_a_window(taken, 60) <= count
