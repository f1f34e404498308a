"""Connection slots that gateways keep together in their database."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from otel_smtp.forwarding.global_slots import GlobalSlots
from otel_smtp.forwarding.settings import PoolLimits, Timeouts
from otel_smtp.forwarding.slots import IDLE_SECONDS, SlotSettings
from otel_smtp.forwarding.upstream import UpstreamForwarder
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
from otel_smtp.spool.postgresql.beats import SLOTS_SECONDS
from tests.spool.postgresql.schemas import new_place, store
from tests.support.postgresql import server
from tests.support.relaying import Relayed, relay, relaying, settings
from tests.support.upstream import ScriptedUpstream
from tests.support.waiting import until

LIMITS = PoolLimits(connections=5, messages=4, idle_seconds=IDLE_SECONDS)


@asynccontextmanager
async def gateway(
    place: QueueLocation, upstream: ScriptedUpstream, name: str, total: int
) -> AsyncIterator[tuple[PostgresqlStore, UpstreamForwarder]]:
    one = store(place, name)
    await one.open()
    slots = {"up": GlobalSlots(SlotSettings("up", total), one.ledger)}
    try:
        patient = Timeouts(connect=60, greeting=60, command=60, reply=60, pool=60)
        async with relaying(settings(upstream, limits=LIMITS, timeouts=patient), slots=slots) as forwarder:
            yield one, forwarder
            await forwarder.give_slots_back()
    finally:
        await one.close()


async def mails(forwarder: UpstreamForwarder, count: int) -> Sequence[Relayed]:
    return await asyncio.gather(*(relay(forwarder) for _ in range(count)))


def owners(place: QueueLocation) -> int:
    [[count]] = server().do(f"SELECT count(owner) FROM {place.schema}.slot")
    return int(count)


@pytest.mark.long
async def test_three_gateways_have_no_more_connections_than_slots_also_when_their_connections_break() -> None:
    place = await new_place()
    upstream = ScriptedUpstream()
    async with (
        upstream,
        gateway(place, upstream, "one", 3) as (_, one),
        gateway(place, upstream, "two", 3) as (_, two),
        gateway(place, upstream, "three", 3) as (_, three),
    ):
        relaying_all = [asyncio.create_task(mails(forwarder, 30)) for forwarder in (one, two, three)]
        for kept in (10, 30, 50):
            await until(lambda kept=kept: len(upstream.kept) >= kept, timeout_seconds=60)  # type: ignore[misc]
            server().do(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'otel-smtp limits'"
            )
        for each in relaying_all:
            assert {mail.told.code for mail in await each} == {250}
    assert len(upstream.kept) == 90
    assert upstream.most_open <= 3
    assert owners(place) == 0


async def test_each_gateway_has_its_turn() -> None:
    place = await new_place()
    upstream = ScriptedUpstream()
    async with (
        upstream,
        gateway(place, upstream, "one", 1) as (_, one),
        gateway(place, upstream, "two", 1) as (_, two),
    ):
        is_over = False

        async def one_after_the_other() -> int:
            sent = 0
            while not is_over:
                assert {mail.told.code for mail in await mails(one, 2)} == {250}
                sent += 2
            return sent

        busy = asyncio.create_task(one_after_the_other())
        await until(lambda: len(upstream.kept) >= 10, timeout_seconds=30)
        assert (await relay(two)).told.code == 250
        is_over = True
        sent = await busy
    assert len(upstream.kept) == sent + 1
    assert upstream.most_open == 1


async def test_what_a_gateway_has_is_free_when_it_is_declared_dead_and_not_before() -> None:
    place = await new_place(takeover_seconds=3.0)
    upstream = ScriptedUpstream()
    dying = store(place, "dying")
    await dying.open()
    mine = await dying.ledger.hold("up", 2, (), 2)
    assert mine is not None
    assert len(mine) == 2
    async with upstream, gateway(place, upstream, "other", 2) as (other, forwarder):
        mail = asyncio.create_task(relay(forwarder))
        await until(lambda: forwarder.snapshot()[0].pool.waiting == 1)
        assert await other.ledger.hold("up", 2, (), 2) == []
        await dying.beats.line.close()  # it is not heard of any more
        assert (await mail).told.code == 250
        assert dying.beats.silent_for > 0
        assert await dying.ledger.hold("up", 2, (), 2) == []  # nothing is given to who was declared dead
    await dying.close()


async def test_what_a_gateway_still_has_when_it_leaves_is_free_a_little_later() -> None:
    place = await new_place()
    leaving, other = store(place, "leaving"), store(place, "other")
    await leaving.open()
    await other.open()
    assert len(await leaving.ledger.hold("up", 1, (), 1) or ()) == 1
    await leaving.close()
    assert owners(place) == 0
    assert await other.ledger.hold("up", 1, (), 1) == []
    server().do(f"UPDATE {place.schema}.slot SET since = since - interval '{SLOTS_SECONDS} s'")
    assert len(await other.ledger.hold("up", 1, (), 1) or ()) == 1
    await other.close()


async def test_fewer_slots_than_before_are_kept_from_then_on() -> None:
    place = await new_place()
    one = store(place, "one")
    await one.open()
    had = await one.ledger.hold("up", 3, (), 3)
    assert had is not None
    assert len(had) == 3
    assert await one.ledger.hold("up", 1, had, 3) != had
    assert len(await one.ledger.hold("up", 1, (), 0) or ()) == 1
    (row,) = await one.slots()
    assert (row["name"], row["total"], row["used"], row["gateways"]) == ("up", 1, 1, {"one": 1})
    await one.close()


async def test_without_the_database_no_connection_is_opened_and_idle_ones_are_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = await new_place(takeover_seconds=3.0)
    upstream = ScriptedUpstream()
    async with upstream, gateway(place, upstream, "one", 2) as (one, forwarder):
        assert (await relay(forwarder)).told.code == 250
        assert upstream.open_connections == 1
        monkeypatch.setattr(one.beats, "ok_until", time.monotonic() - 1.0)
        mail = asyncio.create_task(relay(forwarder))
        assert (await mail).told.code == 250  # a connection is at hand, and no other has its slot yet
        await until(lambda: upstream.open_connections == 0)
        mail = asyncio.create_task(relay(forwarder))
        await until(lambda: forwarder.snapshot()[0].pool.waiting == 1)
        assert upstream.connections == 1
        await until(mail.done, timeout_seconds=30)  # its beats are answered again
