"""An alarm where vacuum is held up, by an old transaction or by dead rows that do not go."""

import logging
from typing import cast

import pytest

from otel_smtp.spool.postgresql.statements import Statements
from otel_smtp.spool.postgresql.vacuum import HELD_UP_SECONDS, LOOK_SECONDS, OLD_TRANSACTION_SECONDS, VacuumWatch
from otel_smtp.spool.postgresql.working import Working
from tests.spool.postgresql.schemas import new_place
from tests.support.postgresql import connected


class Clock:
    """Moved by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_dead_rows_that_do_not_go_raise_an_alarm_once(caplog: pytest.LogCaptureFixture) -> None:
    place, clock = await new_place(), Clock()
    working = Working(place)
    watch = VacuumWatch(Statements(place.schema), working, clock=clock)

    async def said(seconds: float) -> list[str]:
        caplog.clear()
        clock.now += seconds
        await watch.look()
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    async with connected(place.url) as other:
        await other.execute(
            f"ALTER TABLE {place.schema}.dlv SET (autovacuum_enabled = false); "
            f"ALTER TABLE {place.schema}.dlv DROP CONSTRAINT dlv_msg_id_fkey; "
            f"INSERT INTO {place.schema}.dlv (msg_id, d, dest, sender, state, next_at, rcpt)"
            " SELECT n, 0, '', '', 'r', now(), '[]' FROM generate_series(1, 6000) AS n"
        )
        assert await said(LOOK_SECONDS) == []
        await other.execute(f"DELETE FROM {place.schema}.dlv; SELECT pg_stat_force_next_flush()")
        await other.execute("SELECT")
        assert await said(LOOK_SECONDS) == []  # autovacuum may be about to come
        assert await said(HELD_UP_SECONDS) == ["vacuum of the queue database held up"]
        assert await said(LOOK_SECONDS) == []
        await other.execute(f"VACUUM {place.schema}.dlv")
        assert await said(LOOK_SECONDS / 2) == []  # it was not looked
        assert await said(LOOK_SECONDS / 2) == ["vacuum of the queue database caught up"]
        assert await said(HELD_UP_SECONDS) == []
    await working.close(9.0)


async def test_dead_rows_raise_one_however_much_mail_waits(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otel_smtp.spool.postgresql.vacuum.LEAST_DEAD", 10)
    monkeypatch.setattr("otel_smtp.spool.postgresql.vacuum.MANY_DEAD", 100)
    place, clock = await new_place(), Clock()
    working = Working(place)
    watch = VacuumWatch(Statements(place.schema), working, clock=clock)
    async with connected(place.url) as other:
        await other.execute(
            f"ALTER TABLE {place.schema}.dlv SET (autovacuum_enabled = false); "
            f"ALTER TABLE {place.schema}.dlv DROP CONSTRAINT dlv_msg_id_fkey; "
            f"INSERT INTO {place.schema}.dlv (msg_id, d, dest, sender, state, next_at, rcpt)"
            " SELECT n, 0, '', '', 'r', now(), '[]' FROM generate_series(1, 1000) AS n"
        )
        for dead, is_alarmed in ((90, False), (20, True)):
            await other.execute(
                f"DELETE FROM {place.schema}.dlv WHERE ctid IN (SELECT ctid FROM {place.schema}.dlv LIMIT {dead});"
                " SELECT pg_stat_force_next_flush()"
            )
            await other.execute("SELECT")
            for _ in range(2):
                clock.now += HELD_UP_SECONDS
                await watch.look()
            assert bool(caplog.records) is is_alarmed
    await working.close(9.0)


async def test_dead_rows_that_go_and_come_raise_none_and_end_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At some hundred mails a second there are too many again a few seconds after each vacuum."""
    dead_rows, oldest, clock = 0, 0.0, Clock()

    class Asked:
        async def do(self, ask: object) -> dict[str, object]:
            return {"dead": dead_rows, "living": 50, "oldest_seconds": oldest, "backend": 1}

    watch = VacuumWatch(Statements("queue"), cast(Working, Asked()), clock=clock)

    async def said(dead: int) -> list[str]:
        nonlocal dead_rows
        caplog.clear()
        clock.now += LOOK_SECONDS
        dead_rows = dead
        await watch.look()
        return [record.getMessage() for record in caplog.records]

    for dead in (30_000, 60_000) * 10:
        assert await said(dead) == []
    held_up = [await said(60_000 + 30_000 * look) for look in range(8)]
    assert [len(one) for one in held_up].count(1) == 1
    assert await said(400_000) == []
    assert await said(300_000) == ["vacuum of the queue database caught up"]
    for dead in (30_000, 60_000) * 10:
        assert await said(dead) == []
    oldest = OLD_TRANSACTION_SECONDS
    assert await said(60_000) == ["vacuum of the queue database held up"]
    oldest = 0.0
    assert await said(70_000) == []
    assert await said(30_000) == ["vacuum of the queue database caught up"]


async def test_an_old_transaction_raises_one(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    place, clock = await new_place(), Clock()
    working = Working(place)
    watch = VacuumWatch(Statements(place.schema), working, clock=clock)
    async with connected(place.url) as other, other.transaction():
        pid = await other.fetchval("SELECT pg_backend_pid()")
        await watch.look()
        assert caplog.records == []
        monkeypatch.setattr("otel_smtp.spool.postgresql.vacuum.OLD_TRANSACTION_SECONDS", 0.0)
        clock.now += LOOK_SECONDS
        await watch.look()
        (record,) = caplog.records
        assert record.getMessage() == "vacuum of the queue database held up"
        assert vars(record)["backend"] == pid
        monkeypatch.setattr("otel_smtp.spool.postgresql.vacuum.OLD_TRANSACTION_SECONDS", OLD_TRANSACTION_SECONDS)
    clock.now += LOOK_SECONDS
    await watch.look()
    assert caplog.records[-1].getMessage() == "vacuum of the queue database caught up"
    await working.close(9.0)
