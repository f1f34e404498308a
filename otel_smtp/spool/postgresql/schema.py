"""The tables, and how a database gets them: by `otel-smtp queue migrate`, never by a gateway that starts.

`meta.version` is what a writer needs, `meta.oldest_reader` the oldest program that may still run: a step adds in one
release and removes in the next, so that gateways can be replaced one by one.
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import asyncpg

from otel_smtp.spool.messages import SpoolError

VERSION: Final = 1
"""What this program knows to write."""

DEFAULT_SCHEMA: Final = "otel_smtp"
TABLES: Final = ("meta", "gateway", "msg", "chunk", "dlv", "tally", "pace", "quota", "slot", "stat")
_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}")

# Rows live for seconds: vacuum must keep up rather than be gentle.
_VACUUM: Final = "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_cost_delay = 0"

_FIRST: Final = f"""
CREATE TABLE {{schema}}.meta(version int NOT NULL, oldest_reader int NOT NULL, installation uuid NOT NULL);

-- An incarnation of a gateway: one process, from its start until it is declared dead.
CREATE TABLE {{schema}}.gateway(
  id uuid PRIMARY KEY, name text NOT NULL, version text NOT NULL, started_at timestamptz NOT NULL,
  alive_until timestamptz NOT NULL);

CREATE TABLE {{schema}}.msg(
  id text COLLATE "C" PRIMARY KEY, kind text NOT NULL, arrived_at timestamptz NOT NULL, expires_at timestamptz NOT NULL,
  warned bool NOT NULL DEFAULT false, held_at timestamptz, forced bool NOT NULL DEFAULT false,
  reverse_path text NOT NULL, parameters jsonb NOT NULL, carrier jsonb NOT NULL, trace_id bytea,
  accepted_by uuid NOT NULL, octets bigint NOT NULL, header_octets int NOT NULL, digest bytea NOT NULL,
  content bytea) WITH (autovacuum_vacuum_threshold = 5000, {_VACUUM},
  toast.autovacuum_vacuum_threshold = 20000, toast.autovacuum_vacuum_scale_factor = 0,
  toast.autovacuum_vacuum_cost_delay = 0);                        -- content NULL: it is in chunk
ALTER TABLE {{schema}}.msg ALTER content SET STORAGE EXTERNAL;      -- a slice is read without the rest

CREATE TABLE {{schema}}.chunk(
  msg_id text COLLATE "C" NOT NULL REFERENCES {{schema}}.msg ON DELETE CASCADE, n int NOT NULL, data bytea NOT NULL,
  PRIMARY KEY(msg_id, n)) WITH (
  toast.autovacuum_vacuum_threshold = 20000, toast.autovacuum_vacuum_scale_factor = 0,
  toast.autovacuum_vacuum_cost_delay = 0);
ALTER TABLE {{schema}}.chunk ALTER data SET STORAGE EXTERNAL;

CREATE TABLE {{schema}}.dlv(
  msg_id text COLLATE "C" NOT NULL REFERENCES {{schema}}.msg ON DELETE CASCADE, d smallint NOT NULL, dest text NOT NULL,
  sender text NOT NULL, state "char" NOT NULL,                    -- r ready, l leased, h held, c corrupt
  attempts int NOT NULL DEFAULT 0, crashes int NOT NULL DEFAULT 0, next_at timestamptz NOT NULL,
  owner uuid, epoch int NOT NULL DEFAULT 0, dup bool NOT NULL DEFAULT false,
  rcpt jsonb NOT NULL,                                            -- those that have not ended
  taken_from jsonb,                                               -- [gateway's name, seconds it was silent]
  PRIMARY KEY(msg_id, d)) WITH (fillfactor = 70, autovacuum_vacuum_threshold = 5000, {_VACUUM});
CREATE INDEX dlv_due   ON {{schema}}.dlv(dest, (attempts > 0), next_at) WHERE state = 'r';
CREATE INDEX dlv_owner ON {{schema}}.dlv(owner) WHERE state = 'l';
CREATE INDEX msg_expiry ON {{schema}}.msg(expires_at) WHERE held_at IS NULL;
CREATE INDEX msg_trace ON {{schema}}.msg(trace_id) WHERE trace_id IS NOT NULL;

CREATE TABLE {{schema}}.tally(
  gateway uuid, name text, recipients bigint NOT NULL, PRIMARY KEY(gateway, name)) WITH (fillfactor = 10);
CREATE TABLE {{schema}}.pace(
  name text PRIMARY KEY, gap interval NOT NULL, burst interval NOT NULL, tat timestamptz NOT NULL,
  rest_until timestamptz);
CREATE TABLE {{schema}}.quota(name text, hour timestamptz, used bigint NOT NULL, PRIMARY KEY(name, hour));
CREATE TABLE {{schema}}.slot(name text, n int, owner uuid, since timestamptz, PRIMARY KEY(name, n));
CREATE TABLE {{schema}}.stat(at timestamptz NOT NULL, body jsonb NOT NULL);
INSERT INTO {{schema}}.stat VALUES (now(), '{{{{}}}}');
"""


@dataclass(frozen=True, slots=True)
class Migration:
    """What brings a schema from the version before to this one.

    Attributes:
        oldest_reader: the oldest version whose programs may still run then.
        statements: with {schema} where its quoted name goes.
    """

    version: int
    oldest_reader: int
    statements: str


STEPS: Final = (Migration(1, 1, _FIRST),)


def quoted(schema: str) -> str:
    """A schema's name as statements have it.

    Raises:
        SpoolError: it is no plain name.
    """
    if _NAME.fullmatch(schema) is None or schema.startswith("pg_"):
        raise SpoolError(f"{schema!r} is no name for a schema: lower case letters, digits and _, at most 63")
    return f'"{schema}"'


async def version_of(connection: "asyncpg.Connection[asyncpg.Record]", schema: str) -> tuple[int, int] | None:
    """The version that a database's schema has, and its oldest reader; None: there is none."""
    if await connection.fetchval("SELECT to_regclass($1) IS NULL", f"{quoted(schema)}.meta"):
        return None
    row = await connection.fetchrow(f"SELECT version, oldest_reader FROM {quoted(schema)}.meta")
    if row is None:
        return None
    return row["version"], row["oldest_reader"]


def why_unusable(found: tuple[int, int] | None, schema: str) -> str | None:
    """Why a gateway of this version cannot use a schema of that version, and what to do; None: it can."""
    if found is None:
        return f"the database has no schema {schema} of ours; make it with: otel-smtp queue migrate"
    version, oldest_reader = found
    if version < VERSION:
        return (
            f"the schema {schema} has version {version}, and this program needs {VERSION}; "
            "bring it up to date with: otel-smtp queue migrate"
        )
    if oldest_reader > VERSION:
        return (
            f"the schema {schema} has version {version}, which no program before version {oldest_reader} may use, "
            f"and this one knows {VERSION}; install a newer otel-smtp"
        )
    return None


async def migrate(connection: "asyncpg.Connection[asyncpg.Record]", schema: str, *, dry_run: bool) -> Sequence[str]:
    """Make the schema, or bring it up to date.

    Each step is one transaction; who migrates at the same time waits.

    Args:
        dry_run: change nothing.

    Returns:
        The statements that were run, or would be.

    Raises:
        SpoolError: a newer program has been here.
        asyncpg.PostgresError: the database refuses it; what steps were done before stay.
    """
    name = quoted(schema)
    done: list[str] = []
    await connection.execute("SELECT pg_advisory_lock(hashtext('otel_smtp migrate ' || $1))", schema)
    try:
        found = await version_of(connection, schema)
        if found is not None and found[0] > VERSION:
            raise SpoolError(
                f"the schema {schema} has version {found[0]} already, and this program knows {VERSION}; "
                "migrate with the newest otel-smtp"
            )
        for step in STEPS:
            if found is not None and step.version <= found[0]:
                continue
            statements = step.statements.format(schema=name).strip()
            if found is None:
                statements = f"CREATE SCHEMA IF NOT EXISTS {name};\n{statements}"
            done.append(statements)
            if dry_run:
                continue
            async with connection.transaction():
                await connection.execute("SET LOCAL lock_timeout = '2s'")
                await connection.execute(statements)
                if found is None and step is STEPS[0]:
                    await connection.execute(
                        f"INSERT INTO {name}.meta VALUES ($1, $2, $3)",
                        step.version, step.oldest_reader, uuid.uuid4(),
                    )  # fmt: skip
                else:
                    await connection.execute(
                        f"UPDATE {name}.meta SET version = $1, oldest_reader = $2",
                        step.version, step.oldest_reader,
                    )  # fmt: skip
    finally:
        await connection.execute("SELECT pg_advisory_unlock(hashtext('otel_smtp migrate ' || $1))", schema)
    return done
