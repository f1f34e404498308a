"""What a claim reads where the planner knows nothing: a queue is empty when it is analyzed, and full soon after."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

from otel_smtp.spool.postgresql.statements import Statements
from tests.spool.postgresql.schemas import new_place, store
from tests.support.postgresql import connected

BACKLOG = 1000
CLAIMED = 20


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All parts of a plan."""
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


async def test_a_claim_reads_a_sample_of_a_backlog_and_sorts_it_once() -> None:
    place = await new_place()
    gateway = store(place)
    await gateway.open()
    schema = place.schema
    async with connected(place.url) as connection:
        await connection.execute(f"ANALYZE {schema}.msg; ANALYZE {schema}.dlv")
        await connection.execute(
            f"INSERT INTO {schema}.msg SELECT 'm' || n, 'mail', now(), now() + interval '1 day', false, NULL, false,"
            f" 'a@b.example', '{{}}', '{{}}', NULL, '{gateway.beats.incarnation}', 4, 2, '', ''"
            f" FROM generate_series(1, {BACKLOG}) AS n"
        )
        await connection.execute(
            f"INSERT INTO {schema}.dlv (msg_id, d, dest, sender, state, next_at, rcpt, attempts)"
            " SELECT 'm' || n, 0, 'up', 'a@b.example', 'r', now(), '[]', n % 2"
            f" FROM generate_series(1, {BACKLOG}) AS n"
        )
        claim = Statements(schema).claim
        told = await connection.fetchval(
            f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {claim}", gateway.beats.incarnation, "up", CLAIMED
        )
    plan = json.loads(told)[0]["Plan"]
    due = [node for node in nodes(plan) if node.get("Index Name") == "dlv_due"]
    assert [(node["Actual Rows"], node["Actual Loops"]) for node in due] == [(8 * CLAIMED, 1)] * 2
    assert all(not node.get("Rows Removed by Filter") for node in due)
    assert {node["Actual Loops"] for node in nodes(plan) if node["Node Type"] in ("WindowAgg", "Sort")} == {1}
    (locked,) = (node for node in nodes(plan) if node["Node Type"] == "LockRows" and node["Actual Loops"] > 1)
    assert (locked["Actual Loops"], locked["Actual Rows"]) == (CLAIMED, 1)
    assert not locked["Plans"][0].get("Rows Removed by Filter")
    await gateway.close()


async def test_when_the_next_is_due_is_found_without_reading_what_has_gone() -> None:
    """An old transaction keeps all that has gone since where it was: before what waits."""
    place = await new_place()
    schema = place.schema
    statement = Statements(schema).next_due
    async with connected(place.url) as connection, connected(place.url) as other:
        await connection.execute(
            f"INSERT INTO {schema}.msg SELECT n, 'mail', now(), now() + interval '1 day', false, NULL, false,"
            f" 'a@b.example', '{{}}', '{{}}', NULL, '{UUID(int=0)}', 4, 2, '', '' FROM generate_series(1, 1000) AS n"
        )
        async with other.transaction(isolation="repeatable_read"):
            await other.execute("SELECT")
            await connection.execute(
                f"INSERT INTO {schema}.dlv (msg_id, d, dest, sender, state, next_at, rcpt)"
                " SELECT n, 0, 'up', 'a@b.example', 'r', now() - interval '1 minute', '[]'"
                " FROM generate_series(1, 1000) AS n"
            )
            await connection.execute(
                f"UPDATE {schema}.dlv SET next_at = now() + interval '1 hour' WHERE msg_id = '1000';"
                f" DELETE FROM {schema}.dlv WHERE msg_id <> '1000'"
            )
            told = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", ["up"])
            due_in = await connection.fetchval(statement, ["up"])
    read = json.loads(told)[0]["Plan"]["Shared Hit Blocks"]
    assert (round(due_in / 60), read < 20) == (60, True), read
