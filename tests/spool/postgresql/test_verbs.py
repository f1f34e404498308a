"""Each verb of the store while its connection is lost: before its change is committed, and after it.

Whoever is told that it is done finds it done, once; whoever is told that nobody knows does it again, and finds it
done once.
"""

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from otel_smtp.spool.messages import NoSuchMessage, StorageAway, StorageBusy
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
from otel_smtp.spool.postgresql import store as store_module
from otel_smtp.spool.postgresql.lanes import Lanes
from tests.spool.postgresql.cutting import CuttingProxy
from tests.spool.postgresql.schemas import new_place, store
from tests.spool.postgresql.verbs import VERBS, Verb, call, empty, state_of, verb_of, verbs_of_the_interface, waiting
from tests.support.postgresql import connected, server

# One gateway for all rows: to open one takes longer than a verb.
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("verbs")]


@dataclasses.dataclass(frozen=True)
class Gateway:
    """A gateway behind a proxy that cuts its connections.

    Attributes:
        other: a connection of the test's own.
    """

    store: PostgresqlStore
    place: QueueLocation
    proxy: CuttingProxy
    other: Any


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    place = await new_place()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store_module, "KEEP_SECONDS", 3600.0)  # housekeeping has the connection of verbs
        async with CuttingProxy(server().port) as proxy, connected(place.url) as other:
            one = store(dataclasses.replace(place, url=place.url.replace(str(server().port), str(proxy.port))))
            await one.open()
            yield Gateway(one, place, proxy, other)
            proxy.let_through()
            await one.close()


async def test_each_verb_of_the_interface_has_a_row() -> None:
    assert {verb_of(label) for label in VERBS} == verbs_of_the_interface()


async def test_it_takes_no_mail_while_the_database_does_not_keep_up(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gateway.store.refusal() is None
    monkeypatch.setattr(Lanes, "is_slow", True)
    assert isinstance(gateway.store.refusal(), StorageBusy)


@pytest.mark.parametrize("label", VERBS)
async def test_a_verb_whose_connection_is_lost_is_done_once(gateway: Gateway, label: str) -> None:
    verb = VERBS[label]
    states = []
    for disturbed in (undisturbed, killed_before_its_commit, cut_before_its_answer):
        await empty(gateway.place, gateway.other)
        ready = await verb.prepare(gateway.store)
        await disturbed(gateway, verb, ready)
        states.append(await state_of(gateway.place, gateway.other))
    assert states[1:] == states[:1] * 2


async def undisturbed(gateway: Gateway, verb: Verb, ready: Any) -> None:
    await verb.call(gateway.store, ready)


async def killed_before_its_commit(gateway: Gateway, verb: Verb, ready: Any) -> None:
    """Its backend is killed while it waits for a lock."""
    if not verb.tables:
        await verb.call(gateway.store, ready)
        return
    async with gateway.other.transaction():
        await gateway.other.execute(f"LOCK TABLE {', '.join(f'{gateway.place.schema}.{one}' for one in verb.tables)}")
        doing = call(verb, gateway.store, ready)
        pid = await waiting(gateway.other, verb.line, "Lock")
        await gateway.other.execute("SELECT pg_terminate_backend($1)", pid)
        if not verb.repeats_itself:
            await is_unknown(verb, doing)
    if verb.repeats_itself:
        await doing
    else:
        await again(verb, gateway.store, ready)


async def cut_before_its_answer(gateway: Gateway, verb: Verb, ready: Any) -> None:
    """It is committed, and nobody is told: neither before the server says so, nor by a server that is cut off then."""
    if not verb.changes:
        await verb.call(gateway.store, ready)
        return
    cuts = gateway.proxy.cuts
    gateway.proxy.cut(verb.line, waits=True)
    doing = call(verb, gateway.store, ready)
    async with asyncio.timeout(30):
        await gateway.proxy.reached.wait()
    await gateway.other.fetch("SELECT")  # the event loop has turned, and the server answers others
    assert not doing.done()
    gateway.proxy.go_on()
    if verb.repeats_itself:
        await doing
    else:
        await is_unknown(verb, doing)
        await again(verb, gateway.store, ready)
    assert gateway.proxy.cuts == cuts + 1


async def is_unknown(verb: Verb, doing: "asyncio.Task[object]") -> None:
    """Nobody knows what became of it, and so it is said."""
    if verb.is_of_a_limit:
        assert await doing is None
    else:
        with pytest.raises(StorageAway):
            await doing


async def again(verb: Verb, store: PostgresqlStore, ready: Any) -> None:
    """What an unanswered caller does: ask until there is an answer."""
    async with asyncio.timeout(60):
        while True:
            try:
                if await verb.call(store, ready) is not None or not verb.is_of_a_limit:
                    return
            except StorageAway:
                pass
            except NoSuchMessage:
                return  # it was deleted the first time
            await asyncio.sleep(0.01)
