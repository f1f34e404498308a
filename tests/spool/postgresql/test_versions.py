"""Gateways of two versions on one schema, as while they are replaced one by one.

`versions/N.json` has the statements of the last program whose schema had version N. Who makes a version N+1 that
programs of version N may go on with keeps them, from the commit before:

    json.dump(vars(Statements("the_schema")), ...)
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import asyncpg
import pytest

from otel_smtp.spool.messages import SpoolError, StorageAway
from otel_smtp.spool.postgresql import QueueLocation, schema
from tests.spool.messages import leased, queued
from tests.spool.postgresql.schemas import new_place, store
from tests.support.postgresql import connected, server
from tests.support.process import DEFAULTS, settings_file
from tests.support.waiting import until

VERSIONS: Final = Path(__file__).parent / "versions"
MAY_STILL_RUN: Final = range(schema.STEPS[-1].oldest_reader, schema.VERSION)


@pytest.mark.parametrize("version", MAY_STILL_RUN)
async def test_a_program_of_a_version_before_can_ask_all_that_it_asks(version: int) -> None:
    """Each statement is one for the schema of today: no table, column or function is missing, or of another type."""
    place = await new_place()
    statements: dict[str, str] = json.loads((VERSIONS / f"{version}.json").read_text())
    assert len(statements) > 40
    faults = {}
    async with connected(place.url) as connection:
        for name, statement in statements.items():
            try:
                await connection.prepare(statement.replace('"the_schema"', f'"{place.schema}"'))
            except asyncpg.PostgresError as error:
                faults[name] = str(error)
    assert faults == {}


async def test_a_gateway_for_which_the_schema_becomes_too_new_takes_no_more_mail(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its connections last until they break; with the next ones it finds out, and peers take its mail over."""
    place = await new_place(takeover_seconds=3.0)
    gateway = store(place)
    await gateway.open()
    one = await queued(gateway)
    assert await leased(gateway)
    server().do(
        f"UPDATE {place.schema}.meta SET version = 9, oldest_reader = 9",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'otel-smtp %'"
        f" AND query LIKE '%\"{place.schema}\".%'",
    )
    # The connections that are cut refuse mail too, for a moment and for another reason.
    await until(
        lambda: any("install a newer otel-smtp" in str(vars(record).get("fault")) for record in caplog.records),
        timeout_seconds=30,
    )
    await until(lambda: gateway.refusal() is not None, timeout_seconds=30)
    server().do(f"UPDATE {place.schema}.meta SET version = {schema.VERSION}, oldest_reader = 1")
    await until(lambda: gateway.refusal() is None, timeout_seconds=30)
    assert (await gateway.show(one)).id == one
    await gateway.close()


def test_each_kind_of_fault_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    beats = store(QueueLocation(server().url())).beats
    for fault in (StorageAway("cut off"), StorageAway("no answer"), SpoolError("too new"), SpoolError("too new")):
        beats._broken(fault)
    assert [vars(record)["fault"] for record in caplog.records] == ["cut off", "too new"]


async def test_a_schema_is_brought_up_to_date_while_a_gateway_of_the_version_before_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is open goes on, and what opens then, of either version, too."""
    place = await new_place()
    server().do(f"UPDATE {place.schema}.meta SET version = {schema.VERSION + 1}")
    before, after = store(place, "before"), store(place, "after")
    await before.open()
    with monkeypatch.context() as patched:
        patched.setattr(schema, "VERSION", schema.VERSION + 1)
        await after.open()
    one = await queued(before)
    (lease,) = await leased(after)
    assert lease.message_id == one
    for gateway in (before, after):
        await gateway.close()


def test_a_program_is_refused_by_a_schema_that_is_too_new_for_it(tmp_path: Path) -> None:
    place = asyncio.run(new_place())
    server().do(f"UPDATE {place.schema}.meta SET version = 9, oldest_reader = 9")
    settings = {"upstream.url": "smtp://127.0.0.1:1", "delivery.mode": "queue", "spool.url": place.url}
    path = settings_file({**DEFAULTS, **settings, "spool.schema": place.schema}, tmp_path)
    refused = subprocess.run(
        [sys.executable, "-m", "otel_smtp", "serve", "--config", str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "install a newer otel-smtp" in refused.stderr
    assert "Traceback" not in refused.stderr
