"""What the embedded store counts as it goes along, and the same counted again from what is there."""

from collections import Counter
from dataclasses import dataclass, field

from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded.entries import Entry


@dataclass
class Books:
    """See `Memory`."""

    messages: int = 0
    large_octets: int = 0
    lost: set[str] = field(default_factory=set)
    live: dict[int, list[int]] = field(default_factory=dict)
    cold: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    outcome_messages: int = 0
    outcome_octets: int = 0
    contents_octets: int = 0
    busy: set[str] = field(default_factory=set)


async def books(store: EmbeddedStore) -> Books:
    """As the store has counted, at rest."""
    memory = store.memory
    return Books(
        memory.messages, memory.large_octets, set(memory.lost), memory.live, +memory.cold, +memory.outcomes,
        memory.outcome_messages, memory.outcome_octets, memory._contents_octets,
    )  # fmt: skip


async def recount(store: EmbeddedStore) -> Books:
    """From the messages and files that are there."""
    memory, counted = store.memory, Books()
    there = store.directory.larges()
    for entry in await _entries(store):
        assert entry.place is not None
        counted.messages += 1
        found = counted.live.setdefault(entry.place.segment, [0, 0])
        found[0] += 1
        found[1] += entry.place.octets
        if entry.is_large and entry.id in there:
            counted.large_octets += entry.octets
        elif entry.is_large:
            counted.lost.add(entry.id)
        is_cold = entry.id not in memory.hot
        for one in entry.deliveries:
            counted.cold[one.destination] += is_cold
            counted.outcomes[one.destination] += entry.is_outcome and one.is_pending
        if entry.is_outcome:
            counted.outcome_messages += 1
            counted.outcome_octets += entry.place.octets
        if entry.is_busy:
            counted.busy.add(entry.id)
    counted.contents_octets = sum(sum(map(len, content)) for content in memory._contents.values())
    counted.cold, counted.outcomes = +counted.cold, +counted.outcomes
    return counted


async def _entries(store: EmbeddedStore) -> list[Entry]:
    memory = store.memory
    indexed = await store.index.run(lambda index: index.load(index._ids("SELECT id FROM message", ())))
    entries = {entry.id: entry for entry in indexed}
    for message_id, (_, _, changed) in memory.unindexed.items():
        if changed is None:
            entries.pop(message_id, None)
    return [*({**entries, **memory.hot}).values()]
