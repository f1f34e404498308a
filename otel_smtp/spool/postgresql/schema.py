"""The tables and their migrations, run by `otel-smtp queue migrate`, never by a starting gateway.

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

VERSION: Final = 2
"""The version that this program writes."""

DEFAULT_SCHEMA: Final = "otel_smtp"
TABLES: Final = ("meta", "gateway", "msg", "chunk", "dlv", "tally", "pace", "quota", "slot", "stat", "permit", "moved")
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
    """A step from the previous version of the schema to this one.

    Attributes:
        oldest_reader: the oldest version whose programs may still run afterwards.
        statements: with {schema} where its quoted name goes.
    """

    version: int
    oldest_reader: int
    statements: str


# Limits shared by all gateways. `pace` has the time of the next permit (GCRA), `quota` the permits landed in each
# hundredth of a limit's period, `permit` each gateway's permits in flight.
_LIMITS: Final = """
ALTER TABLE {schema}.quota RENAME hour TO begins_at;
ALTER TABLE {schema}.pace ADD most bigint, ADD period interval, ADD per text;
ALTER TABLE {schema}.pace SET (fillfactor = 10);
CREATE TABLE {schema}.permit(
  name text, owner uuid, amount bigint NOT NULL, turn bigint NOT NULL, PRIMARY KEY(name, owner)) WITH (fillfactor = 10);

-- Messages that have come from the directory of one gateway, and may be there still.
CREATE TABLE {schema}.moved(id text COLLATE "C" PRIMARY KEY, at timestamptz NOT NULL);

-- Take permits of a limit, and report what became of earlier ones. A gateway reports what it has in flight as a
-- whole, so that a call whose answer was lost leaves nothing behind; `turn` grows with each call, so that such a
-- call does not undo a later one. In one function, since each statement of it sees what was committed before, also
-- while it waited for the row of the limit.
--   in_flight: what the gateway has taken and not landed; landed, unused: since the last call
--   least: take so many or none; wanted: rather so many
--   rest: for how many seconds nobody is to send anything
-- granted is null where the gateway was declared dead, or a later call came first. wait is in seconds.
CREATE FUNCTION {schema}.settle(
  me uuid, this_turn bigint, limit_name text, most_permits bigint, period_seconds float8, most_at_once bigint,
  counts text, in_flight bigint, landed bigint, unused bigint, least_permits bigint, wanted bigint, rest float8,
  OUT granted bigint, OUT wait float8, OUT available bigint) LANGUAGE plpgsql AS $settle$
DECLARE
  margin CONSTANT float8 := 0.05;       -- by which a window is longer here than at the provider
  look_again CONSTANT float8 := 0.1;    -- where what is in flight elsewhere has to land first
  part CONSTANT float8 := period_seconds / 100;
  gap_seconds CONSTANT float8 := period_seconds / most_permits;
  at_once CONSTANT bigint := least(least_permits, most_at_once);
  pace_now {schema}.pace;
  now_seconds float8;
  ahead float8;
  elsewhere bigint;
  in_window bigint;
  room float8;
  missing bigint;
  leaves float8;
BEGIN
  INSERT INTO {schema}.pace AS pace (name, gap, burst, tat, most, period, per)
  VALUES (limit_name, make_interval(secs => gap_seconds), make_interval(secs => most_at_once * gap_seconds),
    clock_timestamp(), most_permits, make_interval(secs => period_seconds), counts)
  ON CONFLICT (name) DO UPDATE SET gap = excluded.gap, burst = excluded.burst, most = excluded.most,
    period = excluded.period, per = excluded.per,
    rest_until = CASE WHEN rest > 0
      THEN greatest(pace.rest_until, clock_timestamp() + make_interval(secs => rest)) ELSE pace.rest_until END
  RETURNING * INTO pace_now;
  PERFORM FROM {schema}.gateway WHERE id = me AND alive_until > clock_timestamp() FOR KEY SHARE;
  IF NOT FOUND OR EXISTS (SELECT FROM {schema}.permit WHERE name = limit_name AND owner = me AND turn >= this_turn) THEN
    RETURN;
  END IF;
  now_seconds := extract(epoch FROM clock_timestamp());
  IF landed > 0 THEN
    INSERT INTO {schema}.quota AS quota (name, begins_at, used)
    VALUES (limit_name, to_timestamp(floor(now_seconds / part) * part), landed)
    ON CONFLICT (name, begins_at) DO UPDATE SET used = quota.used + excluded.used;
  END IF;
  DELETE FROM {schema}.quota
  WHERE name = limit_name AND begins_at <= to_timestamp(now_seconds - period_seconds - part - margin);
  -- In this order: what is landed for a dead gateway meanwhile is seen twice rather than not at all.
  SELECT coalesce(sum(amount), 0) INTO elsewhere FROM {schema}.permit WHERE name = limit_name AND owner <> me;
  SELECT coalesce(sum(used), 0) INTO in_window FROM {schema}.quota WHERE name = limit_name;
  in_window := in_window + elsewhere + in_flight;
  -- A clock that was set back holds nobody up for longer than the period.
  ahead := extract(epoch FROM pace_now.tat) - now_seconds - unused * gap_seconds;
  ahead := greatest(0, least(ahead, period_seconds));
  room := floor(most_at_once - ahead / gap_seconds + 1e-6);
  available := greatest(0, least(room, most_permits - in_window));
  granted := 0;
  wait := 0;
  IF pace_now.rest_until > to_timestamp(now_seconds) THEN
    wait := extract(epoch FROM pace_now.rest_until) - now_seconds;
    available := 0;
  ELSIF wanted > 0 AND room >= at_once AND in_window + least_permits <= most_permits THEN
    granted := greatest(least_permits, least(wanted, available));
    available := greatest(0, available - granted);
    ahead := ahead + granted * gap_seconds;
  ELSIF wanted > 0 THEN
    wait := greatest(0, ahead - (most_at_once - at_once) * gap_seconds);
    missing := in_window + least_permits - most_permits;
    IF missing > 0 THEN
      SELECT min(extract(epoch FROM freed.begins_at)) INTO leaves
      FROM (SELECT begins_at, sum(used) OVER (ORDER BY begins_at) AS permits
        FROM {schema}.quota WHERE name = limit_name) AS freed
      WHERE freed.permits >= missing;
      wait := greatest(wait, coalesce(leaves + part + period_seconds + margin - now_seconds, look_again));
    END IF;
  END IF;
  UPDATE {schema}.pace SET tat = to_timestamp(now_seconds + ahead) WHERE name = limit_name;
  INSERT INTO {schema}.permit (name, owner, amount, turn) VALUES (limit_name, me, in_flight + granted, this_turn)
  ON CONFLICT (name, owner) DO UPDATE SET amount = excluded.amount, turn = excluded.turn;
END $settle$;
"""

STEPS: Final = (Migration(1, 1, _FIRST), Migration(2, 1, _LIMITS))

# Default privileges, by which gateways get the rights to the tables of later versions, name no table.
_WHO_WRITES_META: Final = """
SELECT DISTINCT CASE WHEN one.grantee = 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(one.grantee)) END AS name
FROM pg_class, aclexplode(relacl) AS one
WHERE pg_class.oid = to_regclass($1) AND one.grantee <> relowner
  AND one.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE') ORDER BY name"""


def quoted(schema: str) -> str:
    """A schema's name, quoted for statements.

    Raises:
        SpoolError: it is not a plain name.
    """
    if _NAME.fullmatch(schema) is None or schema.startswith("pg_"):
        raise SpoolError(f"{schema!r} is not a valid schema name: lower case letters, digits and _, at most 63")
    return f'"{schema}"'


async def version_of(connection: "asyncpg.Connection[asyncpg.Record]", schema: str) -> tuple[int, int] | None:
    """The version of a database's schema, and its oldest reader; None without a schema."""
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
    """Create the schema, or bring it up to date.

    Each step is one transaction; a concurrent migration waits. Only the owner may write the schema's version: other
    roles lose that right.

    Args:
        dry_run: change nothing.

    Returns:
        The statements that were, or would be, run.

    Raises:
        SpoolError: a newer program has been here.
        asyncpg.PostgresError: the database refuses it; completed steps stay.
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
            is_first = found is None and step is STEPS[0]
            if is_first:
                statements = f"CREATE SCHEMA IF NOT EXISTS {name};\n{statements}"
            done.append(statements)
            if dry_run:
                continue
            async with connection.transaction():
                await connection.execute("SET LOCAL lock_timeout = '2s'")
                await connection.execute(statements)
                if is_first:
                    await connection.execute(
                        f"INSERT INTO {name}.meta VALUES ($1, $2, $3)",
                        step.version, step.oldest_reader, uuid.uuid4(),
                    )  # fmt: skip
                else:
                    await connection.execute(
                        f"UPDATE {name}.meta SET version = $1, oldest_reader = $2",
                        step.version, step.oldest_reader,
                    )  # fmt: skip
        done += await _keep_meta(connection, name, dry_run=dry_run)
    finally:
        await connection.execute("SELECT pg_advisory_unlock(hashtext('otel_smtp migrate ' || $1))", schema)
    return done


async def _keep_meta(connection: "asyncpg.Connection[asyncpg.Record]", name: str, *, dry_run: bool) -> Sequence[str]:
    """Let only the owner write the schema's version; the statements."""
    others = [row["name"] for row in await connection.fetch(_WHO_WRITES_META, f"{name}.meta")]
    statements = [f"REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON {name}.meta FROM {other}" for other in others]
    for statement in statements if not dry_run else ():
        await connection.execute(statement)
    return statements
