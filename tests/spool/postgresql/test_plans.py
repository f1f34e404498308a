"""What a claim reads where the planner knows nothing: a queue is empty when it is analyzed, and full soon after."""

import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg
import pytest

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


async def test_what_is_for_a_few_messages_reads_no_others() -> None:
    place = await new_place()
    gateway = store(place)
    await gateway.open()
    schema, statements = place.schema, Statements(place.schema)
    me, one = gateway.beats.incarnation, "m7"
    asked: dict[str, tuple[object, ...]] = {
        statements.end_overdue: (me, 9, False),
        statements.retry: (one,),
        statements.hold: (one,),
        statements.release: (one, ["h", "c"]),
        statements.reset: (one,),
        statements.states: (one,),
    }
    async with connected(place.url) as connection:
        await connection.execute(
            f"ALTER TABLE {schema}.msg SET (autovacuum_enabled = off);"
            f" ALTER TABLE {schema}.dlv SET (autovacuum_enabled = off); ANALYZE {schema}.msg; ANALYZE {schema}.dlv"
        )
        await connection.execute(
            f"INSERT INTO {schema}.msg SELECT 'm' || n, 'mail', now(), now() + (n - 3) * interval '1 hour',"
            f" false, NULL, false, 'a@b.example', '{{}}', '{{}}', NULL, '{me}', 4, 2, '', ''"
            f" FROM generate_series(1, {BACKLOG}) AS n"
        )
        await connection.execute(
            f"INSERT INTO {schema}.dlv (msg_id, d, dest, sender, state, next_at, rcpt)"
            f" SELECT 'm' || n, 0, 'up', 'a@b.example', 'r', now(), '[]' FROM generate_series(1, {BACKLOG}) AS n"
        )
        most_read = {}
        for statement, arguments in asked.items():
            async with connection.transaction():
                told = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", *arguments)
            most_read[statement] = max(
                (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
                for node in nodes(json.loads(told)[0]["Plan"])
            )
    assert max(most_read.values()) < 10, most_read
    await gateway.close()


@asynccontextmanager
async def much_that_has_gone(schema: str, url: str) -> AsyncIterator[asyncpg.Connection]:
    """A queue with one delivery for `up` in an hour, behind 999 that an old transaction keeps since they have gone."""
    async with connected(url) as connection, connected(url) as other:
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
            yield connection


async def blocks_read(connection: asyncpg.Connection, statement: str, *arguments: object) -> int:
    told = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", *arguments)
    read: int = json.loads(told)[0]["Plan"]["Shared Hit Blocks"]
    return read


async def test_when_the_next_is_due_is_found_without_reading_what_has_gone() -> None:
    place = await new_place()
    statement = Statements(place.schema).next_due
    async with much_that_has_gone(place.schema, place.url) as connection:
        read = await blocks_read(connection, statement, ["up"])
        due_in = await connection.fetchval(statement, ["up"])
    assert (round(due_in / 60), read < 20) == (60, True), read


@pytest.mark.parametrize("new", ["after", "zz"])  # before the one that is known, and behind it
async def test_new_destinations_are_found_without_reading_what_has_gone_of_others(new: str) -> None:
    place = await new_place()
    statement = Statements(place.schema).destinations
    async with much_that_has_gone(place.schema, place.url) as connection:
        await connection.execute(
            f"INSERT INTO {place.schema}.dlv (msg_id, d, dest, sender, state, next_at, rcpt)"
            f" VALUES ('1', 1, '{new}', 'a@b.example', 'r', now(), '[]')"
        )
        read = await blocks_read(connection, statement, ["up", "somewhere"])
        found = await connection.fetch(statement, ["up", "somewhere"])
    assert ([row["dest"] for row in found], read < 20) == ([new], True), read
