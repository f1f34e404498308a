"""Which items are written together, and when another group begins beside one that is under way."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import asyncpg
import pytest

from otel_smtp.spool.messages import StorageAway, StoreVerb
from otel_smtp.spool.postgresql import lanes as lanes_module
from otel_smtp.spool.postgresql.connecting import LastingConnection
from otel_smtp.spool.postgresql.lanes import ENOUGH_ITEMS, MOST_ITEMS, RELIEF_SECONDS, Item, Lanes
from tests.spool.queueing import eventually

NEVER = 3600.0
NEVER_COMES = float("inf")


class _Item(Item[None]):
    def __init__(self, deadline: float = NEVER_COMES) -> None:
        super().__init__(octets=1, deadline=deadline)


class _Line:
    """A connection that is there, and is asked for long waits.

    Attributes:
        waits: those that were asked for.
        forgotten, terminated: how often its faults were, and it was.
    """

    present: object = object()

    def __init__(self) -> None:
        self.waits = 0
        self.forgotten = self.terminated = 0

    async def get(self) -> object:
        return self.present

    def next_wait(self) -> float:
        self.waits += 1
        return NEVER

    def forget_faults(self) -> None:
        self.forgotten += 1

    async def close(self) -> None:
        pass

    def terminate(self) -> None:
        self.terminated += 1


class _Written:
    """Groups, in the order of their beginnings; each ends when it is let go."""

    def __init__(self) -> None:
        self.groups: list[int] = []
        self._under_way: list[asyncio.Event] = []

    async def write(self, connection: object, lane: int, group: Sequence[_Item]) -> None:
        self.groups.append(len(group))
        let_go = asyncio.Event()
        self._under_way.append(let_go)
        await let_go.wait()
        for item in group:
            item.answer(None)

    def let_go(self, number: int) -> None:
        self._under_way[number].set()

    def let_all_go(self) -> None:
        for one in self._under_way:
            one.set()


@pytest.fixture(autouse=True)
def without_timers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "PATIENCE_SECONDS", NEVER)
    monkeypatch.setattr(lanes_module, "GATHER_SECONDS", NEVER)


@asynccontextmanager
async def _running(lines: int = 2) -> AsyncIterator[tuple[Lanes[_Item], _Written]]:
    written = _Written()
    lanes = Lanes[_Item](
        [cast(LastingConnection, _Line()) for _ in range(lines)], written.write, lambda _: None,
        verb=StoreVerb.SUBMIT, timings=deque(),
    )  # fmt: skip
    lanes.start()
    await asyncio.sleep(0)
    try:
        yield lanes, written
    finally:
        closing = asyncio.create_task(lanes.close(NEVER))
        while not closing.done():
            written.let_all_go()
            await asyncio.sleep(0)


def _add(lanes: Lanes[_Item], count: int, *, is_urgent: bool = True) -> list[_Item]:
    items = [_Item() for _ in range(count)]
    for item in items:
        lanes.add(item, is_urgent=is_urgent)
    return items


async def test_a_lone_one_waits_for_nobody() -> None:
    async with _running() as (lanes, written):
        (item,) = _add(lanes, 1)
        await eventually(lambda: written.groups == [1])
        written.let_go(0)
        await item


async def test_what_comes_while_a_group_is_under_way_is_the_next() -> None:
    async with _running() as (lanes, written):
        _add(lanes, 3)
        await eventually(lambda: written.groups == [3])
        for _ in range(ENOUGH_ITEMS - 1):
            _add(lanes, 1)
            await asyncio.sleep(0)
        assert written.groups == [3]
        written.let_go(0)
        await eventually(lambda: written.groups == [3, ENOUGH_ITEMS - 1])


async def test_many_are_written_beside_it() -> None:
    async with _running() as (lanes, written):
        _add(lanes, 1)
        await eventually(lambda: written.groups == [1])
        _add(lanes, ENOUGH_ITEMS)
        await eventually(lambda: written.groups == [1, ENOUGH_ITEMS])


async def test_what_exceeds_a_group_is_another_at_once() -> None:
    async with _running() as (lanes, written):
        _add(lanes, MOST_ITEMS + ENOUGH_ITEMS)
        await eventually(lambda: written.groups == [MOST_ITEMS, ENOUGH_ITEMS])


async def test_it_is_slow_while_the_median_of_recent_groups_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a moment later the next group shows whether it still is: nobody would ever write one else."""
    now = 1000.0
    monkeypatch.setattr(lanes_module, "time", SimpleNamespace(monotonic=lambda: now))
    async with _running() as (lanes, written):

        async def write(seconds: float) -> bool:
            nonlocal now
            groups = len(written.groups)
            (item,) = _add(lanes, 1)
            await eventually(lambda: len(written.groups) > groups)
            now += seconds
            written.let_go(groups)
            await item
            await asyncio.sleep(0)
            return lanes.is_slow

        assert [await write(seconds) for seconds in (0.5, 1.5, 1.5, 1.5, 1.5)] == [False] * 5
        assert await write(1.5)
        now += RELIEF_SECONDS
        assert not lanes.is_slow
        assert await write(1.5)
        assert [await write(0.1) for _ in range(5)] == [True, True, True, True, False]
        assert [await write(seconds) for seconds in (1.5, 0.1)] == [False, False]


@pytest.mark.parametrize(("is_urgent", "patience"), [(True, "GATHER_SECONDS"), (False, "PATIENCE_SECONDS")])
async def test_a_group_that_takes_long_is_not_waited_for(
    is_urgent: bool, patience: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _running() as (lanes, written):
        _add(lanes, 1)
        await eventually(lambda: written.groups == [1])
        monkeypatch.setattr(lanes_module, patience, 0.001)
        _add(lanes, 2, is_urgent=is_urgent)
        await eventually(lambda: written.groups == [1, 2])


async def test_what_is_not_urgent_gathers() -> None:
    async with _running() as (lanes, written):
        for _ in range(3):
            _add(lanes, 1, is_urgent=False)
            await asyncio.sleep(0)
        assert written.groups == []
        _add(lanes, 1)
        await eventually(lambda: written.groups == [4])


async def test_it_does_not_gather_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "GATHER_SECONDS", 0.001)
    async with _running() as (lanes, written):
        _add(lanes, 2, is_urgent=False)
        await eventually(lambda: written.groups == [2])


async def test_nor_when_all_is_to_end() -> None:
    async with _running() as (lanes, written):
        (item,) = _add(lanes, 1, is_urgent=False)
    assert (written.groups, item.done()) == ([1], True)


async def test_enough_of_it_gathers_no_more() -> None:
    async with _running() as (lanes, written):
        _add(lanes, ENOUGH_ITEMS, is_urgent=False)
        await eventually(lambda: written.groups == [ENOUGH_ITEMS])


@pytest.mark.parametrize("lines", [1, 2, 3])
async def test_all_are_written_once_whatever_comes_when(lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "PATIENCE_SECONDS", 0.002)
    monkeypatch.setattr(lanes_module, "GATHER_SECONDS", 0.001)
    async with _running(lines) as (lanes, written):
        items: list[_Item] = []
        for turn in range(200):
            items += _add(lanes, turn % 7, is_urgent=turn % 3 == 0)
            if turn % 5 == 0:
                await asyncio.sleep(0.001 if turn % 10 else 0)
            if turn % 4 == 0 and turn // 4 < len(written.groups):
                written.let_go(turn // 4)
        closing = asyncio.create_task(lanes.close(NEVER))
        while not closing.done():
            written.let_all_go()
            await asyncio.sleep(0)
        assert sum(written.groups) == len(items)
        assert all(item.done() for item in items)


class _Away(_Line):
    """A database that refuses connections."""

    present = None

    async def get(self) -> object:
        raise StorageAway("away")


class _Silent(_Line):
    """A database that takes connections, and from the second one on says nothing."""

    present = None

    def __init__(self) -> None:
        super().__init__()
        self._is_first = True

    async def get(self) -> object:
        if self._is_first:
            self._is_first = False
        else:
            await asyncio.Event().wait()
        return object()


@pytest.mark.parametrize("line", [_Away(), _Silent(), _Line()], ids=["away", "silent", "locked"])
async def test_its_time_over_it_is_refused_whatever_is_waited_for(line: _Line) -> None:
    async def write(connection: object, lane: int, group: Sequence[_Item]) -> None:
        raise asyncpg.LockNotAvailableError("locked")

    lanes = Lanes[_Item]([cast(LastingConnection, line)], write, lambda _: None, verb=StoreVerb.SUBMIT, timings=deque())
    lanes.start()
    await asyncio.sleep(0)  # each lane connects before the first mail
    items = [_Item(time.monotonic() + seconds) for seconds in (0.05, 0.06)]
    for item in items:
        lanes.add(item)
    async with asyncio.timeout(10):
        for item in items:
            with pytest.raises(StorageAway):
                await item
    await lanes.close(NEVER)


async def test_what_succeeds_again_forgets_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each lock that is waited for too long, in all the life of a connection, makes the next wait longer."""
    faults: list[Exception] = [asyncpg.LockNotAvailableError("locked"), asyncpg.DeadlockDetectedError("deadlock")]

    async def write(connection: object, lane: int, group: Sequence[_Item]) -> None:
        if faults:
            raise faults.pop()
        for item in group:
            item.answer(None)

    line = _Line()
    monkeypatch.setattr(line, "next_wait", lambda: 0.0)
    lanes = Lanes[_Item]([cast(LastingConnection, line)], write, lambda _: None, verb=StoreVerb.SUBMIT, timings=deque())
    lanes.start()
    for forgotten in (1, 1):  # the second one fails at nothing
        (item,) = _add(lanes, 1)
        await item
        assert line.forgotten == forgotten
    assert line.terminated == 0
    faults.append(asyncpg.ReadOnlySQLTransactionError("a replica now"))
    (item,) = _add(lanes, 1)
    await item
    assert line.terminated == 1, "the primary is behind another connection"
    await lanes.close(NEVER)


async def test_what_is_not_written_in_time_is_given_up_at_the_end() -> None:
    """Only of what was sent already, it is unknown what became of it."""
    given_up: list[_Item] = []
    written = _Written()
    lanes = Lanes[_Item](
        [cast(LastingConnection, _Line())], written.write, given_up.append, verb=StoreVerb.SUBMIT, timings=deque()
    )
    lanes.start()
    (sent,) = _add(lanes, 1)
    await eventually(lambda: written.groups == [1])
    (behind,) = _add(lanes, 1)
    await lanes.close(0.01)
    for item in (sent, behind):
        with pytest.raises(StorageAway):
            item.result()
    assert given_up == [sent]
