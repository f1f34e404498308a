"""Connections that break when a change was committed and before anybody was told; servers that kill them.

`test_verbs.py` has each verb; here is what follows of it.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest

from otel_smtp.smtp import replies
from otel_smtp.spool.messages import OUTCOME_PREFIX, End, Kind, Lease, SpoolError, StorageAway, Verdict
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
from otel_smtp.spool.postgresql import store as store_module
from tests.spool.messages import BODY, HEADER, leased, message, queued, written
from tests.spool.postgresql.cutting import CuttingProxy
from tests.spool.postgresql.schemas import new_place, store
from tests.support.postgresql import Server, connected, server
from tests.support.waiting import until

DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)
OUR_BACKENDS = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'otel-smtp %'"
SUBMIT_SECONDS = 2.0  # a submission reaches the database within it, on a busy machine too


T = TypeVar("T")


async def found_by(look: Callable[[], Awaitable[T]]) -> T:
    """What `look` gives, once it gives something; errors of a database that was just cut off aside."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(StorageAway):
                if found := await look():
                    return found
            await asyncio.sleep(0.01)


async def as_coroutine(value: T) -> T:
    return value


async def is_empty(gateway: PostgresqlStore) -> bool:
    return not await gateway.page("", 9)


@pytest.fixture
async def proxy() -> AsyncIterator[CuttingProxy]:
    async with CuttingProxy(server().port) as proxy:
        yield proxy


@pytest.fixture
async def place() -> QueueLocation:
    return await new_place()


@pytest.fixture
async def gateway(place: QueueLocation, proxy: CuttingProxy) -> AsyncIterator[PostgresqlStore]:
    """A gateway whose connections go through the proxy."""
    behind = dataclasses.replace(place, url=place.url.replace(str(server().port), str(proxy.port)))
    opened = store(behind)
    await opened.open()
    yield opened
    proxy.let_through()
    await opened.close()


async def test_what_was_delivered_before_its_submission_is_repeated_is_marked(
    gateway: PostgresqlStore, proxy: CuttingProxy, place: QueueLocation
) -> None:
    """Committed, its answer lost, delivered by a peer, and then sent again: its second delivery must say so."""
    peer = store(place)
    await peer.open()
    try:
        proxy.cut("accepts", is_lasting=True)
        submitting = gateway.submit(message(), await written(gateway.draft()), lease=False)
        found = await found_by(lambda: leased(peer))
        await peer.finish(found[0], DELIVERED)
        proxy.let_through()
        await submitting
        again = await found_by(lambda: leased(peer))
        assert again[0].is_possible_duplicate
        await peer.finish(again[0], DELIVERED)
    finally:
        await peer.close()


@pytest.mark.long
async def test_a_submission_whose_time_is_over_is_withdrawn(
    gateway: PostgresqlStore, proxy: CuttingProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otel_smtp.spool.postgresql.submitting.SUBMIT_SECONDS", SUBMIT_SECONDS)
    proxy.cut("accepts", is_lasting=True)
    new = message()
    with pytest.raises(StorageAway):
        await gateway.submit(new, await written(gateway.draft()), lease=False)
    assert proxy.cuts > 0
    proxy.let_through()
    await found_by(lambda: is_empty(gateway))
    assert await leased(gateway) == []
    assert await gateway.tally() == {}
    assert gateway.figures.unanswered == 0


@pytest.mark.long
async def test_a_submission_that_a_peer_has_begun_is_not_withdrawn_but_told(
    gateway: PostgresqlStore, proxy: CuttingProxy, place: QueueLocation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otel_smtp.spool.postgresql.submitting.SUBMIT_SECONDS", SUBMIT_SECONDS)
    peer = store(place)
    await peer.open()
    try:
        proxy.cut("accepts", is_lasting=True)
        submitting = gateway.submit(message(), await written(gateway.draft()), lease=False)
        found = await found_by(lambda: leased(peer))
        with pytest.raises(StorageAway):
            await submitting
        proxy.let_through()
        await found_by(lambda: as_coroutine(gateway.figures.unanswered))
        await peer.finish(found[0], DELIVERED)
    finally:
        await peer.close()


async def test_what_waits_for_a_former_primary_is_sent_to_the_one_that_beats_find(
    gateway: PostgresqlStore, proxy: CuttingProxy
) -> None:
    """A server that is stopped, or cut off, answers nothing: its connections do not break by themselves."""
    proxy.cut("accepts", waits=True)
    new = message()
    submitting = gateway.submit(new, await written(gateway.draft()), lease=False)
    await proxy.reached.wait()
    facts = {line: line.facts for line in gateway._accepting._lines if line.facts is not None}  # others connect
    assert facts
    for line, known in facts.items():
        line.facts = dataclasses.replace(known, started_at="long ago")
    gateway.beats.line.terminate()
    async with asyncio.timeout(20):
        await submitting
    assert [shown.id for shown in await gateway.page("", 9)] == [new.id]


@pytest.mark.long
async def test_a_gateway_ends_soon_while_its_database_says_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And reports what it may have stored: its client was told otherwise, and nobody will withdraw it."""
    monkeypatch.setattr(store_module, "AWAY_SECONDS", 0.2)
    own, stopped = Server().start(), list[int]()
    try:
        gateway = store(await new_place(own, takeover_seconds=3.0))
        await gateway.open()
        leases = [await gateway.submit(message(), await written(gateway.draft()), lease=True) for _ in range(2)]
        assert own.process is not None
        stopped += [own.process.pid, *(int(pid) for (pid,) in own.do(OUR_BACKENDS))]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        new = message()
        waiting: list[Awaitable[object]] = [
            gateway.submit(new, await written(gateway.draft()), lease=False),
            *(gateway.finish(lease, DELIVERED) for (lease,) in leases),
        ]
        asking = asyncio.create_task(gateway.counts())
        await until(lambda: gateway.refusal() is not None, timeout_seconds=30)
        async with asyncio.timeout(8):  # each of its connections has 2 s to say goodbye
            await gateway.close()
        for one in waiting:
            with pytest.raises(StorageAway):
                await one
        with pytest.raises((StorageAway, asyncio.CancelledError)):
            await asking
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        own.remove()
    assert gateway.figures.unanswered == 1
    (told,) = (one for one in caplog.records if "may be stored although" in one.getMessage())
    assert vars(told)["spool_id"] == new.id


@pytest.mark.parametrize("end", [End.DELIVERED, End.FAILED, None])
async def test_a_result_whose_answer_is_lost_is_recorded_once(
    gateway: PostgresqlStore, proxy: CuttingProxy, end: End | None
) -> None:
    await queued(gateway)
    (lease,) = await leased(gateway)
    bounce = message("app@example.com", sender="", destination="back", kind=Kind.NOTIFICATION)
    proxy.cut("records")
    await gateway.finish(
        lease, [Verdict(0, end, replies.RELAY_DENIED)], notices=[(bounce, HEADER + BODY)] if end is End.FAILED else ()
    )
    assert proxy.cuts == 1
    tally = await gateway.tally()
    match end:
        case End.DELIVERED:
            assert tally == {"accepted": 1, "delivered": 1}
        case End.FAILED:
            assert tally == {"accepted": 1, "failed": 1, "notified": 1}
            assert [shown.id for shown in await gateway.page("", 9)] == [bounce.id]
        case None:
            (again,) = await leased(gateway)
            assert (again.attempt, again.epoch) == (2, 2)
    assert gateway.figures.stale == 0


async def test_a_claim_whose_answer_is_lost_is_found_again(gateway: PostgresqlStore, proxy: CuttingProxy) -> None:
    one = await queued(gateway)
    proxy.cut("claims")
    with pytest.raises(StorageAway):
        await leased(gateway)
    assert proxy.cuts == 1
    found: list[Lease] = []
    async with asyncio.timeout(20):
        while not found:
            with contextlib.suppress(StorageAway):
                found += await leased(gateway)
            await asyncio.sleep(0.01)
    assert [(lease.message_id, lease.attempt) for lease in found] == [(one, 1)]
    assert await leased(gateway) == []
    await gateway.finish(found[0], DELIVERED)
    assert await gateway.tally() == {"accepted": 1, "delivered": 1}


async def test_outcomes_and_mail_whose_claims_are_lost_are_found_by_who_sends_them(
    gateway: PostgresqlStore, proxy: CuttingProxy
) -> None:
    """An outcome that the runner found would leave as mail."""
    application = f"{OUTCOME_PREFIX}app"
    mail = await queued(gateway)
    outcome = await queued(gateway, message(sender="", destination=application, kind=Kind.OUTCOME))
    for destination in ("up", application):
        proxy.cut("claims")
        with pytest.raises(StorageAway):
            await leased(gateway, destination=destination)
    for destination, one in ((application, outcome), ("up", mail)):

        async def found(destination: str = destination) -> list[Lease]:
            return list(await leased(gateway, destination=destination))

        assert [lease.message_id for lease in await found_by(found)] == [one]
        assert await leased(gateway, destination=destination) == []


async def test_backends_that_are_killed_again_and_again_lose_nothing(place: QueueLocation) -> None:
    gateways = [store(place, name) for name in ("one", "two")]
    for one in gateways:
        await one.open()
    ended: list[str] = []
    accepted: list[str] = []
    killed = 0
    is_over = asyncio.Event()

    async def kill() -> None:
        nonlocal killed
        chance = random.Random(1)
        async with connected(place.url) as connection:
            while not is_over.is_set():
                pids = await connection.fetch(
                    "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'otel-smtp %' AND state <> 'idle'"
                )
                if pids:
                    await connection.execute("SELECT pg_terminate_backend($1)", chance.choice(pids)["pid"])
                    killed += 1
                await asyncio.sleep(chance.uniform(0.03, 0.15))

    async def submit(gateway: PostgresqlStore, count: int) -> None:
        for number in range(count):
            await asyncio.sleep(0.05)
            new = message()
            content = b"x" * (100_000 if number % 10 == 0 else 1000)
            leases = await gateway.submit(new, await written(gateway.draft(), HEADER, content), lease=number % 2 == 0)
            accepted.append(new.id)
            for lease in leases:
                await finish(gateway, lease)

    async def finish(gateway: PostgresqlStore, lease: Lease) -> None:
        await gateway.finish(lease, DELIVERED)
        ended.append(lease.message_id)

    async def deliver(gateway: PostgresqlStore) -> None:
        while not is_over.is_set():
            try:
                for lease in await leased(gateway):
                    await finish(gateway, lease)
            except SpoolError:
                pass
            await asyncio.sleep(0.01)

    killing = asyncio.create_task(kill())
    delivering = [asyncio.create_task(deliver(one)) for one in gateways]
    await asyncio.gather(*(submit(one, 40) for one in gateways for _ in range(3)))
    await found_by(lambda: as_coroutine(set(ended) == set(accepted)))
    is_over.set()
    await asyncio.gather(killing, *delivering)
    assert killed  # how many, says the machine's speed
    assert len(accepted) == 240
    # What was repeated and had been delivered meanwhile is the only one that may come twice.
    assert len(ended) - len(set(ended)) <= max(1, killed // 10)
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(SpoolError):
                assert await gateways[0].page("", 9) == []
                tally = await gateways[0].tally()
                break
            await asyncio.sleep(0.05)
    assert tally["accepted"] == tally["delivered"] == len(ended)
    for one in gateways:
        await one.close()
    assert server().do(f"SELECT count(*) FROM {place.schema}.gateway") == [["0"]]
