"""Outcomes in the stores, beyond what is the same in all: what they are not counted in, and crashes."""

from pathlib import Path

import pytest

from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded.store import CRASHES_ALLOWED
from otel_smtp.spool.messages import OUTCOME_PREFIX, Backlog, End, Kind, NewMessage, StorageFull, Verdict
from tests.spool.messages import leased, message, queued
from tests.spool.queueing import eventually
from tests.spool.stores import SEGMENT_OCTETS

APPLICATION = f"{OUTCOME_PREFIX}app"


def outcome() -> NewMessage:
    return message(sender="", destination=APPLICATION, kind=Kind.OUTCOME, header_octets=0)


def embedded(path: Path, *, most_messages: int = 2, most_octets: int | None = None) -> EmbeddedStore:
    return EmbeddedStore(
        path, least_free_octets=0, segment_octets=SEGMENT_OCTETS, most_messages=most_messages, most_octets=most_octets
    )


@pytest.mark.parametrize("bound", [{"most_messages": 2}, {"most_messages": 99, "most_octets": 1500}])
async def test_a_backlog_of_outcomes_refuses_no_mail(tmp_path: Path, bound: dict[str, int]) -> None:
    store = embedded(tmp_path / "spool", **bound)
    await store.open()
    for _ in range(20):
        await queued(store, outcome(), b"{}" * 300)
    assert store.refusal() is None
    await store.close()
    store = embedded(tmp_path / "spool", **bound)
    assert (await store.open()).messages == 0
    assert store.refusal() is None
    assert (await store.backlog([APPLICATION]))[APPLICATION].pending == 20
    for _ in range(2):
        assert store.refusal() is None
        await queued(store, message(), b"x" * 700)
    assert isinstance(store.refusal(), StorageFull)
    for lease in await leased(store, most=20, destination=APPLICATION):
        await store.finish(lease, (Verdict(0, End.DELIVERED),))
    assert isinstance(store.refusal(), StorageFull)
    for lease in await leased(store):
        await store.finish(lease, (Verdict(0, End.DELIVERED),))
    assert store.refusal() is None
    assert (store.memory.messages, store.memory.outcome_messages, store.memory.outcome_octets) == (0, 0, 0)
    assert store.memory.octets == 0
    assert await store.backlog([APPLICATION]) == {APPLICATION: Backlog()}
    await store.close()


async def test_an_outcome_that_was_moved_is_counted_as_what_it_takes_there(tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "spool", least_free_octets=0, segment_octets=256 * 1024)
    await store.open()
    told = await queued(store, outcome(), b"{}")
    first = store.memory.hot[told].place
    assert first is not None
    for _ in range(60):
        await queued(store, message(), b"x" * 40_000)
        (lease,) = await leased(store)
        await store.finish(lease, (Verdict(0, End.DELIVERED),))
    # The store's own housekeeping moves it: the rest of its segment has ended.
    await eventually(lambda: first.segment not in store.memory.live, timeout_seconds=60)
    (lease,) = await leased(store, destination=APPLICATION)
    assert store.memory.octets == 0
    await store.finish(lease, (Verdict(0, End.DELIVERED),))
    assert store.memory.outcome_octets == 0
    await store.close()


async def test_an_outcome_is_never_held_for_crashes(tmp_path: Path) -> None:
    """It would be sent by nobody, and seen by nobody."""
    store = embedded(tmp_path / "spool")
    await store.open()
    told, mail = await queued(store, outcome(), b"{}"), await queued(store)
    await leased(store, destination=APPLICATION)
    await leased(store)
    for crash in range(CRASHES_ALLOWED + 1):
        for one in (told, mail):
            entry = store.memory.hot[one].copy()
            entry.deliveries[0].crashes = crash
            held = entry.take_back(crashes_allowed=CRASHES_ALLOWED, now_ms=0)
            assert held is (one == mail and crash + 1 >= CRASHES_ALLOWED)
    await store.close()
