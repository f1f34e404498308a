"""Connection slots in memory: in one process, and shared by several."""

import asyncio
import os
import time
from collections.abc import Hashable, Sequence
from typing import Any

import pytest

from otel_smtp.forwarding import connection as connections
from otel_smtp.forwarding import slots as kept
from otel_smtp.forwarding.base import HeldSlot, SlotHeard
from otel_smtp.forwarding.global_slots import GlobalSlots
from otel_smtp.forwarding.settings import PoolLimits, Strategy
from otel_smtp.forwarding.slots import AnySlots, SharedSlots, Slots, SlotSettings, slots_of
from tests.support.relaying import Relayed, both_strategies, relay, relaying, settings
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import until

TWO = SlotSettings("up", 2)


class User:
    """Wants slots, and is told when to look."""

    def __init__(self, slots: AnySlots, wanted: int = 0) -> None:
        self.slots = slots
        self.wanted = wanted
        self.looks = 0
        slots.watch(self)

    def wanted_slots(self) -> int:
        return self.wanted

    def look(self) -> None:
        self.looks += 1
        while self.wanted and self.slots.take(time.monotonic()):
            self.wanted -= 1


async def burst(forwarder: Any, mails: int) -> Sequence[Relayed]:
    return await asyncio.gather(*(relay(forwarder) for _ in range(mails)))


# In one process -----------------------------------------------------------------------------------------------------


async def test_there_are_no_more_than_so_many() -> None:
    slots = Slots(TWO)
    assert [slots.take(0.0) for _ in range(3)] == [True, True, False]
    slots.give_back(1.0, lingers=False)
    assert slots.held == 1
    assert [slots.take(1.0) for _ in range(2)] == [True, False]


async def test_a_connection_that_was_broken_off_keeps_its_slot_for_a_moment() -> None:
    slots = Slots(SlotSettings("up", 1))
    assert slots.take(0.0)
    slots.give_back(10.0, lingers=True)
    assert not slots.take(10.0 + kept.LINGERING_SECONDS - 0.01)
    assert slots.take(10.0 + kept.LINGERING_SECONDS)


async def test_what_was_taken_for_nothing_is_there_at_once() -> None:
    slots = Slots(SlotSettings("up", 1))
    assert slots.take(0.0)
    slots.put_back(0.0)
    assert slots.take(0.0)


async def test_who_was_given_none_is_told_to_look_again() -> None:
    slots = Slots(SlotSettings("up", 1))
    assert slots.take(0.0)
    user = User(slots, 1)
    assert not slots.take(time.monotonic())
    slots.give_back(time.monotonic(), lingers=False)
    await until(lambda: user.wanted == 0)


@both_strategies
async def test_a_burst_has_no_more_connections_than_slots_and_loses_nothing(strategy: object) -> None:
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream), strategy=strategy, slots=slots_of([TWO])) as forwarder,
    ):
        relayed = await burst(forwarder, 30)
    assert {one.told.code for one in relayed} == {250}
    assert len(upstream.kept) == 30
    assert upstream.most_open <= 2


async def test_each_of_many_connections_gives_its_slot_back() -> None:
    slots = Slots(TWO)
    limits = PoolLimits(connections=2, messages=1)
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, limits=limits), slots={"up": slots}) as forwarder,
    ):
        relayed = await burst(forwarder, 10)
        assert {one.told.code for one in relayed} == {250}
        assert upstream.most_open <= 2
        assert upstream.connections == 10
        await until(lambda: slots.held == 0)


@pytest.mark.parametrize("fault", [Fault(Kind.RESET), Fault(Kind.GOODBYE), Fault(Kind.CLOSE)], ids=lambda one: one.kind)
@pytest.mark.parametrize("phase", [Phase.GREETING, Phase.MAIL, Phase.REPLY])
async def test_whatever_becomes_of_a_connection_its_slot_comes_back(phase: Phase, fault: Fault) -> None:
    slots = Slots(TWO)
    upstream = ScriptedUpstream(faults={phase: fault})
    async with upstream, relaying(settings(upstream), slots={"up": slots}) as forwarder:
        await burst(forwarder, 3)
        await forwarder.give_slots_back()
        await until(lambda: slots.held == 0)


async def test_an_upstream_that_does_not_heed_quit_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PART_SECONDS", 0.05)
    slots = Slots(TWO)
    upstream = ScriptedUpstream(faults={Phase.QUIT: Fault(Kind.LATE)})
    async with upstream, relaying(settings(upstream), slots={"up": slots}) as forwarder:
        await relay(forwarder)
        await forwarder.give_slots_back()
        assert slots.held == 0


async def test_a_connection_to_learn_what_is_offered_needs_a_slot_too() -> None:
    slots = Slots(SlotSettings("up", 1))
    assert slots.take(time.monotonic())
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), slots={"up": slots}) as forwarder:
        await forwarder.learn(wait_seconds=0.1)
        assert upstream.connections == 0
        slots.give_back(time.monotonic(), lingers=False)
        await until(lambda: forwarder.capabilities().eight_bit_mime)
        assert (await relay(forwarder)).told.code == 250
        assert upstream.connections == 1


async def test_settings_that_are_read_again_share_the_slots_of_those_before() -> None:
    slots = slots_of([TWO])
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), slots=slots) as forwarder:
        assert {one.told.code for one in await burst(forwarder, 5)} == {250}
        again = settings(upstream, recipients_per_transaction=7)
        forwarder.replacement([again], strategy=Strategy.TRANSPARENT, unchanged=())()
        assert {one.told.code for one in await burst(forwarder, 5)} == {250}
        assert upstream.most_open <= 2


# In several processes -----------------------------------------------------------------------------------------------


def in_a_child(work: Any) -> int:
    """Fork, do something, and die without a word."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


async def test_what_a_dead_process_had_is_the_others_after_a_moment() -> None:
    shared = SharedSlots([SlotSettings("other", 3), TWO])
    slots = shared.slots["up"]
    child = in_a_child(lambda: [slots.take(0.0) for _ in range(2)])
    os.waitpid(child, 0)
    now = time.monotonic()
    assert not slots.take(now)
    assert [slots.take(now + kept.LINGERING_SECONDS) for _ in range(3)] == [True, True, False]


async def test_who_waits_is_given_what_others_have_had_for_their_turn() -> None:
    shared = SharedSlots([SlotSettings("up", 1)])
    slots = shared.slots["up"]
    assert slots.take(time.monotonic())
    assert not slots.are_wanted(time.monotonic())
    child = in_a_child(lambda: _wish(slots))
    os.waitpid(child, 0)
    now = time.monotonic()
    assert slots.are_wanted(now)
    slots.give_back(now, lingers=False)
    assert not slots.take(now + kept.PAUSE_SECONDS / 2)
    assert slots.take(now + kept.PAUSE_SECONDS)


def _wish(slots: Slots) -> None:
    async def wish() -> None:
        assert not slots.take(time.monotonic())

    asyncio.new_event_loop().run_until_complete(wish())


async def test_while_others_wait_an_idle_connection_is_given_up() -> None:
    shared = SharedSlots([SlotSettings("up", 1)])
    slots = shared.slots["up"]
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), slots={"up": slots}) as forwarder:
        assert (await relay(forwarder)).told.code == 250
        assert slots.held == 1  # it may be needed again
        os.waitpid(in_a_child(lambda: _wish(slots)), 0)
        await until(lambda: slots.held == 0)
        assert (await relay(forwarder)).told.code == 250


# In a database, as seen from here -----------------------------------------------------------------------------------


class Ledger:
    """A database with slots, which answers as it is told."""

    def __init__(self, total: int) -> None:
        self.free = set(range(total))
        self.ours: set[HeldSlot] = set()
        self.incarnation: object | None = 1
        self.is_away = False
        self.does_what_it_does_not_answer = False
        self.released: list[set[HeldSlot]] = []
        self.times = 0
        self.heard: SlotHeard | None = None

    def term(self) -> object | None:
        return self.incarnation

    async def hold(self, name: str, total: int, released: Any, wanted: int) -> Any:
        await asyncio.sleep(0)
        self.times += 1
        self.released.append(set(released))
        if self.is_away and not self.does_what_it_does_not_answer:
            return None
        for one in set(released) & self.ours:
            self.ours.remove(one)
            self.free.add(one[0])
        for _ in range(min(wanted, len(self.free))):
            since: Hashable = self.times
            self.ours.add((self.free.pop(), since))
        return None if self.is_away else set(self.ours)

    def watch_slots(self, name: str, heard: SlotHeard) -> None:
        self.heard = heard


async def test_slots_of_the_database_are_taken_for_those_who_wait_and_given_back() -> None:
    ledger = Ledger(2)
    slots = GlobalSlots(TWO, ledger)
    user = User(slots, 5)
    assert not slots.take(time.monotonic())
    await until(lambda: user.wanted == 3)
    assert slots.held == 2
    user.wanted = 0
    for _ in range(2):
        slots.give_back(time.monotonic(), lingers=False)
    await slots.wait_reported()
    assert (slots.held, ledger.ours) == (0, set())


async def test_what_was_given_back_without_an_answer_is_given_back_again() -> None:
    ledger = Ledger(2)
    slots = GlobalSlots(TWO, ledger)
    user = User(slots, 1)
    slots.take(time.monotonic())
    await until(lambda: user.wanted == 0)
    (ours,) = ledger.ours
    ledger.is_away = True
    slots.give_back(time.monotonic(), lingers=False)
    await slots.wait_reported()
    user.wanted = 1
    assert not slots.take(time.monotonic())  # it may be another's by now
    ledger.is_away = False
    await until(lambda: user.wanted == 0)
    assert ours in ledger.released[-1] or ours in ledger.released[-2]
    assert ours not in ledger.ours


async def test_what_was_taken_without_an_answer_is_found_by_the_next_call() -> None:
    ledger = Ledger(1)
    ledger.is_away = ledger.does_what_it_does_not_answer = True
    slots = GlobalSlots(SlotSettings("up", 1), ledger)
    user = User(slots, 1)
    slots.take(time.monotonic())
    await until(lambda: bool(ledger.ours))
    ledger.is_away = False
    await until(lambda: user.wanted == 0)


async def test_after_a_death_nothing_is_ours_and_none_is_opened_beside_those_that_are_there() -> None:
    ledger = Ledger(3)
    slots = GlobalSlots(SlotSettings("up", 3), ledger)
    user = User(slots, 2)
    slots.take(time.monotonic())
    await until(lambda: user.wanted == 0)
    assert slots.are_ours()
    ledger.incarnation = None  # nobody knows
    assert not slots.are_ours()
    assert not slots.take(time.monotonic())
    ledger.incarnation, ledger.ours = 2, set()
    ledger.free = {0}  # the others have been taken meanwhile
    assert not slots.are_ours()
    user.wanted = 1
    assert not slots.take(time.monotonic())
    await until(lambda: slots.held == 1)
    assert user.wanted == 1  # two connections of before are there, and one slot
    slots.give_back(time.monotonic(), lingers=False)
    assert not slots.take(time.monotonic())
    assert slots.are_ours()
    slots.give_back(time.monotonic(), lingers=False)
    await until(lambda: user.wanted == 0)


async def test_who_hears_that_others_wait_pauses_after_its_turn() -> None:
    ledger = Ledger(1)
    slots = GlobalSlots(SlotSettings("up", 1), ledger)
    user = User(slots, 2)
    slots.take(time.monotonic())
    await until(lambda: user.wanted == 1)
    assert ledger.heard is not None
    ledger.heard(is_wish=True)
    assert slots.are_wanted(time.monotonic())
    slots.give_back(time.monotonic(), lingers=False)
    await until(lambda: ledger.free == {0})
    await until(lambda: user.wanted == 0)  # nobody took it
