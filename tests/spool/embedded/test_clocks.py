"""A wall clock that was wrong and is put right: mail is as old as the time that has passed."""

import asyncio
import logging
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded.clocks import MOST_DOWNTIME_MS, Clocks, Uptime, uptime
from otel_smtp.spool.embedded.files import write_durably
from otel_smtp.spool.embedded.index import Index
from otel_smtp.spool.embedded.records import FIRST
from otel_smtp.spool.messages import End, StorageBroken, Verdict
from otel_smtp.spool.store import Recovery
from tests.spool.embedded.test_recovery import left_by_a_crash
from tests.spool.messages import leased, message, queued
from tests.spool.queueing import eventually
from tests.spool.stores import SEGMENT_OCTETS

HOUR = 3600.0
DAY = 24 * HOUR
AGE = 5 * DAY


class Machine:
    """A machine whose clock may be wrong.

    Attributes:
        wrong: by how many seconds its wall clock is ahead.
    """

    def __init__(self) -> None:
        self.boot = "first"
        self.wrong = 0.0
        self._passed = 0.0
        self._booted_at = 0.0

    def pass_time(self, seconds: float) -> None:
        self._passed += seconds

    def boot_again(self, boot: str) -> None:
        self.boot = boot
        self._booted_at = self._passed

    def wall(self) -> float:
        return time.time() + self._passed + self.wrong

    def up(self) -> Uptime:
        return Uptime(self.boot, round((self._passed - self._booted_at) * 1000))

    @asynccontextmanager
    async def opened(self, path: Path) -> AsyncIterator[tuple[EmbeddedStore, Recovery]]:
        store = EmbeddedStore(path, least_free_octets=0, segment_octets=SEGMENT_OCTETS, clock=self.wall, up=self.up)
        recovery = await store.open()
        try:
            yield store, recovery
        finally:
            await store.close()


def _clock_remarks(recovery: Recovery) -> list[str]:
    return [remark for remark in recovery.remarks if "clock" in remark]


@pytest.mark.parametrize(("is_killed", "loses_index"), [(False, False), (False, True), (True, False)])
async def test_a_clock_that_is_put_right_between_two_processes_expires_nothing(
    tmp_path: Path, is_killed: bool, loses_index: bool
) -> None:
    machine = Machine()
    machine.wrong = -10 * DAY
    path = tmp_path / "spool"
    async with machine.opened(path) as (store, _):
        one = await queued(store, message(max_age_seconds=AGE))
        if is_killed:
            path = left_by_a_crash(store)
    machine.wrong = 0.0
    machine.pass_time(2 * HOUR)
    async with machine.opened(path) as (store, recovery):
        (told,) = _clock_remarks(recovery)
        # The machine's own time passes between the looks at its two clocks.
        assert any(f"set by {10 * DAY + seconds:+.0f} s" in told for seconds in range(60))
        assert await store.end_overdue(10) == []
        shown = await store.show(one)
        assert machine.wall() - shown.arrived_at == pytest.approx(2 * HOUR, abs=5)
        assert shown.expires_at - machine.wall() == pytest.approx(AGE - 2 * HOUR, abs=5)
        path = left_by_a_crash(store)
    if loses_index:
        (path / "index.db").unlink()
    async with machine.opened(path) as (store, recovery):
        assert _clock_remarks(recovery) == []
        assert (await store.show(one)).expires_at == pytest.approx(shown.expires_at, abs=0.01)
        (lease,) = await leased(store)
        await store.finish(lease, [Verdict(0, End.DELIVERED, replies.OK)])


@pytest.mark.parametrize("jump", [10 * DAY, -10 * DAY])
@pytest.mark.parametrize("is_in_the_index", [False, True])
async def test_a_clock_that_is_set_while_the_process_runs_makes_no_mail_older_or_younger(
    tmp_path: Path, jump: float, is_in_the_index: bool, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine()
    async with machine.opened(tmp_path / "spool") as (store, _):
        one = await queued(store, message(max_age_seconds=AGE))
        held = await queued(store, message(max_age_seconds=AGE))
        await store.hold(held)
        if is_in_the_index:
            await store.page("", 1)
        await store.housekeep()
        machine.wrong = jump
        with caplog.at_level(logging.WARNING):
            await store.housekeep()
        assert [record.getMessage() for record in caplog.records] == ["clock jumped; ages of queued mail unchanged"]
        assert await store.end_overdue(10) == []
        before = await store.show(one)
        assert before.expires_at - machine.wall() == pytest.approx(AGE, abs=5)
        assert await store.release(held)
        assert (await store.show(held)).expires_at - machine.wall() == pytest.approx(AGE, abs=5)
        crashed = left_by_a_crash(store)
    for loses_index in (False, True):
        if loses_index:
            (crashed / "index.db").unlink()
        async with machine.opened(crashed) as (store, recovery):
            assert _clock_remarks(recovery) == []
            assert await store.end_overdue(10) == []
            assert (await store.show(one)).expires_at == pytest.approx(before.expires_at, abs=0.01)
            assert (await store.show(one)).arrived_at == pytest.approx(before.arrived_at, abs=0.01)
            assert len(await leased(store)) == 2


async def test_what_is_being_recorded_while_the_clock_is_set_is_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record lies behind that of the clock, and was made before."""
    is_at_sync, may_sync = threading.Event(), threading.Event()

    def write_when_told(file: int, data: bytes, at: int, *, in_one_call: bool) -> bool:
        is_at_sync.set()
        assert may_sync.wait(30)
        return write_durably(file, data, at, in_one_call=in_one_call)

    machine = Machine()
    async with machine.opened(tmp_path / "spool") as (store, _):
        one = await queued(store, message(max_age_seconds=AGE))
        monkeypatch.setattr("otel_smtp.spool.embedded.log.write_durably", write_when_told)
        machine.wrong = 10 * DAY
        housekeeping = asyncio.ensure_future(store.housekeep())
        log = store.journal.log
        await eventually(is_at_sync.is_set)  # the clock's record is on its way
        holding = asyncio.ensure_future(store.hold(one))
        await eventually(lambda: log._steps)
        may_sync.set()
        assert await holding
        await housekeeping
        assert (await store.show(one)).expires_at - machine.wall() == pytest.approx(AGE, abs=5)
        crashed = left_by_a_crash(store)
    async with machine.opened(crashed) as (store, _):
        assert (await store.show(one)).expires_at - machine.wall() == pytest.approx(AGE, abs=5)


async def test_a_jump_that_only_the_log_knows_of_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    async with machine.opened(tmp_path / "spool") as (store, _):
        one = await queued(store, message(max_age_seconds=AGE))
        machine.wrong = -10 * DAY

        def fail(*_: object) -> None:
            raise StorageBroken("the process ends here")

        monkeypatch.setattr(Index, "move", fail)
        with pytest.raises(StorageBroken):
            await store.housekeep()
        crashed = left_by_a_crash(store)
        monkeypatch.undo()
    async with machine.opened(crashed) as (store, recovery):
        assert _clock_remarks(recovery) == []
        assert (await store.show(one)).expires_at - machine.wall() == pytest.approx(AGE, abs=5)


async def test_a_jump_that_the_index_knows_of_moves_what_only_the_log_has(tmp_path: Path) -> None:
    """The index is complete up to a place before the clock's record, while something before it was busy."""
    machine = Machine()
    async with machine.opened(tmp_path / "spool") as (store, _):
        ids = [await queued(store, message(max_age_seconds=AGE)) for _ in range(3)]
        machine.wrong = -10 * DAY
        await store.housekeep()
        crashed = left_by_a_crash(store)
    database = sqlite3.connect(crashed / "index.db")
    database.execute("UPDATE meta SET value = ? WHERE name = 'at'", (FIRST,))
    database.commit()
    database.close()
    async with machine.opened(crashed) as (store, _):
        for one in ids:
            assert (await store.show(one)).expires_at - machine.wall() == pytest.approx(AGE, abs=5)


async def test_time_that_has_really_passed_counts(tmp_path: Path) -> None:
    machine = Machine()
    async with machine.opened(tmp_path / "spool") as (store, _):
        one = await queued(store, message(max_age_seconds=AGE))
    machine.pass_time(6 * DAY)
    async with machine.opened(tmp_path / "spool") as (store, recovery):
        assert _clock_remarks(recovery) == []
        assert [lease.message_id for lease in await store.end_overdue(10)] == [one]


@pytest.mark.parametrize(("away", "counted"), [(HOUR, HOUR), (10 * DAY, DAY), (-10 * DAY, 0.0)])
@pytest.mark.parametrize("boot", ["second", ""])
async def test_across_boots_a_day_counts_at_most(tmp_path: Path, away: float, counted: float, boot: str) -> None:
    machine = Machine()
    async with machine.opened(tmp_path / "spool") as (store, _):
        one = await queued(store, message(max_age_seconds=AGE))
    machine.boot_again(boot)
    machine.wrong = away
    async with machine.opened(tmp_path / "spool") as (store, recovery):
        assert len(_clock_remarks(recovery)) == (counted != away)
        assert await store.end_overdue(10) == []
        assert (await store.show(one)).expires_at - machine.wall() == pytest.approx(AGE - counted, abs=5)


def test_the_kernel_tells_how_long_it_has_been_up() -> None:
    first, second = uptime(), uptime()
    assert first.boot == second.boot != ""
    assert 0 < first.milliseconds <= second.milliseconds


def test_a_moment_before_there_were_moments_is_no_jump() -> None:
    assert Clocks(time.time, uptime).jump_since_ms({}) == 0
    assert Clocks(time.time, uptime).jump_since_ms({"seen_ms": round(time.time() * 1000)}) == 0, "of an older version"
    assert MOST_DOWNTIME_MS == DAY * 1000
