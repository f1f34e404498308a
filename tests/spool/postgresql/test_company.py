"""What gateways of one queue know of each other, and of what operators do to it from outside."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from otel_smtp.commands.queue import ask_queue
from otel_smtp.config import SpoolTable
from otel_smtp.config.values import Secret
from otel_smtp.spool.deeds import Deed
from otel_smtp.spool.messages import SpoolError
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
from tests.spool.messages import leased, message, queued
from tests.spool.postgresql.schemas import new_place, store
from tests.support.postgresql import connected


class Working:
    """Who works at a gateway: what it was told."""

    def __init__(self) -> None:
        self.deeds: list[Deed] = []
        self.crashed: list[str] = []
        self.woken = 0

    def wake(self, destinations: Sequence[str] = ()) -> None:
        self.woken += 1

    def look_soon(self) -> None:
        self.woken += 1

    def note(self, deed: str) -> None:
        with contextlib.suppress(ValueError):
            self.deeds.append(Deed.parse(deed))

    def note_crashes(self, message_ids: Sequence[str]) -> None:
        self.crashed += message_ids


async def true(look: Callable[[], Any]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(30):
        while not look():  # noqa: ASYNC110 - notifications come in their own time
            await asyncio.sleep(0.01)


@pytest.fixture
async def place() -> QueueLocation:
    return await new_place(takeover_seconds=3.0)


@pytest.fixture
async def both(place: QueueLocation) -> AsyncIterator[list[tuple[PostgresqlStore, Working]]]:
    """Two gateways."""
    opened = []
    for name in ("first", "second"):
        gateway, working = store(place, name), Working()
        gateway.watch(working)
        await gateway.open()
        opened.append((gateway, working))
    yield opened
    for gateway, _ in opened:
        await gateway.close()


async def ask(place: QueueLocation, command: str, *ids: str, operator: str = "") -> list[Any]:
    settings = SpoolTable(url=Secret(place.url), schema=place.schema)
    request = {"command": command, "ids": list(ids), "operator": operator}
    return [answer async for answer in ask_queue(None, settings, request)]


async def test_one_gateway_tells_what_an_operator_did(
    place: QueueLocation, both: list[tuple[PostgresqlStore, Working]]
) -> None:
    (gateway, first), (_, second) = both
    one, other = await queued(gateway), await queued(gateway)
    assert (await ask(place, "hold", one, other, operator="ann"))[1:] == [
        {"queue_id": one, "changed": True}, {"queue_id": other, "changed": True},
    ]  # fmt: skip
    await ask(place, "delete", one)
    await ask(place, "delete", one)  # gone
    await true(lambda: len(first.deeds + second.deeds) == 3 and second.woken)
    told = first.deeds or second.deeds
    assert [(deed.command, deed.operator, deed.message_id) for deed in told] == [
        ("hold", "ann", one), ("hold", "ann", other), ("delete", "owner", one),
    ]  # fmt: skip
    assert told[0].carrier == message().carrier


async def test_a_deed_with_many_recipients_comes_whole(
    place: QueueLocation, both: list[tuple[PostgresqlStore, Working]]
) -> None:
    (gateway, first), (_, second) = both
    addresses = [f"{number}.{'x' * 100}@example.net" for number in range(300)]
    one = await queued(gateway, message(*addresses))
    await ask(place, "delete", one)
    await true(lambda: first.deeds or second.deeds)
    [deed] = first.deeds + second.deeds
    assert [address for address, _ in deed.recipients] == addresses


async def test_what_is_no_deed_harms_nobody(place: QueueLocation, both: list[tuple[PostgresqlStore, Working]]) -> None:
    (gateway, first), (_, second) = both
    one = await queued(gateway)
    async with connected(place.url) as connection:
        for text in ("deed", "deed x 1 []", "deed y 2 [", "gone", "gone 7", "gone []", 'gone [1, 2, "x", {}, 5]', "?"):
            await connection.execute("SELECT pg_notify($1, $2)", f"otel_smtp_{place.schema}", text)
    await ask(place, "hold", one)
    await true(lambda: first.deeds or second.deeds)
    assert [deed.message_id for deed in first.deeds + second.deeds] == [one]


async def test_a_message_shows_who_has_it_and_since_when(both: list[tuple[PostgresqlStore, Working]]) -> None:
    (gateway, _), (peer, _) = both
    one = await queued(gateway)
    shown = await gateway.show(one)
    assert (shown.gateways, shown.leased_at) == ([], None)
    assert await leased(peer)
    shown = await gateway.show(one)
    assert shown.gateways == ["second"]
    assert shown.leased_at is not None
    assert shown.leased_at >= shown.arrived_at
    company = await gateway.company()
    assert [(peer.name, peer.is_this, peer.leases) for peer in company.gateways] == [
        ("first", True, 0), ("second", False, 1),
    ]  # fmt: skip
    assert all(0 < peer.alive_for <= 3 for peer in company.gateways)
    assert company.departures == []


async def test_who_leaves_is_told_as_such(place: QueueLocation, both: list[tuple[PostgresqlStore, Working]]) -> None:
    (gateway, _), _ = both
    third = store(place, "third")
    await third.open()
    await queued(third)
    assert await leased(third)
    await third.close()
    await true(lambda: gateway.beats.departures)
    [gone] = (await gateway.company()).departures
    assert (gone.name, gone.silent_seconds, gone.found_by) == ("third", None, "")


async def test_who_falls_silent_is_told_with_what_it_had(
    place: QueueLocation, both: list[tuple[PostgresqlStore, Working]]
) -> None:
    (gateway, working), (other, others) = both
    await queued(gateway)
    held = await queued(gateway)
    async with connected(place.url) as connection:
        await connection.execute(f"UPDATE {place.schema}.dlv SET crashes = 2 WHERE msg_id = $1", held)
        for name, count in (("dead", 2), ("idle", 0)):
            await connection.execute(
                f"WITH g AS (INSERT INTO {place.schema}.gateway (id, name, version, started_at, alive_until)"
                " VALUES (gen_random_uuid(), $1, '0', now(), now() + interval '1 second') RETURNING id)"
                f" UPDATE {place.schema}.dlv SET state = 'l', owner = g.id FROM g WHERE $2",
                name,
                count > 0,
            )
    await true(lambda: len(gateway.beats.departures) == len(other.beats.departures) == 2)
    gone = {one.name: one for one in (await gateway.company()).departures}
    assert (gone["dead"].deliveries, gone["idle"].deliveries) == (2, 0)
    assert {one.found_by for one in gone.values()} <= {"first", "second"}
    assert all(one.silent_seconds is not None and one.silent_seconds >= 3 for one in gone.values())
    assert working.crashed + others.crashed == [held]


async def test_an_operators_name_is_the_databases_user(place: QueueLocation) -> None:
    operator = PostgresqlStore(place, is_gateway=False)
    await operator.open()
    assert await operator.session_user() == "owner"
    await operator.close()
    with pytest.raises(SpoolError):
        await operator.session_user()
