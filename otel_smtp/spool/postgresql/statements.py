"""All statements of the queue's verbs.

Each gives its tables their schema, so that nothing hangs on a search path. `now()` says when mail is due; whether a
gateway lives is asked of `clock_timestamp()`, since a statement may have waited. `$1` is the gateway's incarnation
throughout.

Whatever gives a lease holds the row of its gateway meanwhile (`me`): otherwise it could commit after that gateway was
declared dead, and no peer would take the lease over.
"""

from typing import Final

from otel_smtp.spool.messages import OUTCOME_PREFIX, Kind, accepted_name
from otel_smtp.spool.postgresql.schema import quoted

_ME: Final = "me AS (SELECT 1 FROM {s}.gateway WHERE id = $1 AND alive_until > clock_timestamp() FOR KEY SHARE)"

# Of a message and one of its deliveries, wherever both are read. A message of one delivery ends with it.
_COLUMNS: Final = """
  msg.id, msg.kind, extract(epoch FROM msg.arrived_at)::float8 AS arrived_at,
  extract(epoch FROM msg.expires_at)::float8 AS expires_at, msg.reverse_path, msg.parameters, msg.carrier, msg.octets,
  msg.header_octets, msg.digest, msg.forced,
  dlv.d, dlv.dest, dlv.state::text AS state, dlv.attempts, extract(epoch FROM dlv.next_at)::float8 AS next_at,
  dlv.epoch, dlv.dup, dlv.rcpt,
  NOT EXISTS (SELECT FROM {s}.dlv AS other WHERE other.msg_id = msg.id AND other.d <> dlv.d) AS is_alone"""

# Repeated after an unknown commit it must write: a transaction that writes nothing waits for no standby. A message
# missing then may have been delivered by another gateway: it is marked as a possible duplicate. The answer is one row:
# of what is new all is known but when it came, and whether it could be leased; `again` has the leases of the rest, as
# an array for each message: delivery, epoch, attempts, possible duplicate, instants of arrival and expiry.
_ACCEPTED: Final = (
    f"CASE m.kind WHEN '{Kind.MAIL}' THEN '{accepted_name(Kind.MAIL)}'"
    f" WHEN '{Kind.OUTCOME}' THEN '{accepted_name(Kind.OUTCOME)}' ELSE '{accepted_name(Kind.BOUNCE)}' END"
)
_IS_OUTCOME: Final = f"msg.kind = '{Kind.OUTCOME}'"
_HAS_OUTCOME: Final = f"starts_with(dest, '{OUTCOME_PREFIX}')"

_SUBMIT: Final = f"""
WITH {_ME},
m AS (
  INSERT INTO {{s}}.msg (id, kind, arrived_at, expires_at, warned, reverse_path, parameters, carrier, trace_id,
    accepted_by, octets, header_octets, digest, content)
  SELECT n.id, n.kind, now(), now() + n.expires_in * interval '1 second', n.reverse_path = '', n.reverse_path,
    n.parameters, n.carrier, n.trace_id, $1, n.octets, n.header_octets, n.digest, n.content
  FROM ROWS FROM (
    json_to_recordset($3::json) AS (id text, kind text, expires_in float8, reverse_path text, parameters jsonb,
      carrier jsonb, trace_id bytea, octets bigint, header_octets int, digest bytea),
    unnest($4::bytea[]))
    AS n(id, kind, expires_in, reverse_path, parameters, carrier, trace_id, octets, header_octets, digest, content)
  ON CONFLICT (id) DO UPDATE SET accepted_by = excluded.accepted_by
  RETURNING id, kind, arrived_at, expires_at, xmax = 0 AS is_new),
e AS (
  INSERT INTO {{s}}.dlv (msg_id, d, dest, sender, state, attempts, next_at, owner, epoch, dup, rcpt)
  SELECT n.id, n.d, n.dest, n.sender,
    CASE WHEN n.is_leased AND EXISTS (SELECT FROM me) THEN 'l' ELSE 'r' END::"char",
    n.attempts + (n.is_leased AND EXISTS (SELECT FROM me))::int,
    now() + n.retry_in * interval '1 second',
    CASE WHEN n.is_leased AND EXISTS (SELECT FROM me) THEN $1 END,
    (n.is_leased AND EXISTS (SELECT FROM me))::int, n.dup, n.rcpt
  FROM json_to_recordset($5::json) AS n(id text, d smallint, dest text, sender text, is_leased bool, attempts int,
    retry_in float8, dup bool, rcpt jsonb)
  ON CONFLICT (msg_id, d) DO UPDATE SET dup = dlv.dup
  RETURNING msg_id, d, state::text AS state, owner, epoch, attempts, dup, rcpt),
t AS (
  INSERT INTO {{s}}.tally AS tally (gateway, name, recipients)
  SELECT $1, {_ACCEPTED} || '/' || $2::text,
    sum(jsonb_array_length(e.rcpt))
  FROM e JOIN m ON m.id = e.msg_id WHERE m.is_new GROUP BY 2
  ON CONFLICT (gateway, name) DO UPDATE SET recipients = tally.recipients + excluded.recipients)
SELECT extract(epoch FROM now())::float8 AS arrived_at, EXISTS (SELECT FROM me) AS may_lease,
  (SELECT json_object_agg(m.id, (
      SELECT coalesce(json_agg(json_build_array(e.d, e.epoch, e.attempts, e.dup,
        extract(epoch FROM m.arrived_at), extract(epoch FROM m.expires_at))), '[]')
      FROM e WHERE e.msg_id = m.id AND e.state = 'l' AND e.owner = $1))
    FROM m WHERE NOT m.is_new)::text AS again"""

_TALLY: Final = """
INSERT INTO {s}.tally AS tally (gateway, name, recipients)
SELECT $1, n.name || '/' || $2::text, n.recipients FROM unnest($3::text[], $4::bigint[]) AS n(name, recipients)
ON CONFLICT (gateway, name) DO UPDATE SET recipients = tally.recipients + excluded.recipients"""

# The common end: the only delivery of a message, all of it ended in one way. The answer has those that are not ours.
_END: Final = """
WITH w AS MATERIALIZED (
  SELECT * FROM json_to_recordset($3::json) AS w(id text, d smallint, epoch int, name text, recipients int)),
e AS (
  DELETE FROM {s}.dlv USING w
  WHERE dlv.msg_id = w.id AND dlv.d = w.d AND dlv.epoch = w.epoch AND dlv.owner = $1 AND dlv.state = 'l'
  RETURNING dlv.msg_id, dlv.d, w.name, w.recipients),
g AS (DELETE FROM {s}.msg WHERE id IN (SELECT msg_id FROM e)),
t AS (
  INSERT INTO {s}.tally AS tally (gateway, name, recipients)
  SELECT $1, e.name || '/' || $2::text, sum(e.recipients) FROM e GROUP BY e.name
  ON CONFLICT (gateway, name) DO UPDATE SET recipients = tally.recipients + excluded.recipients)
SELECT id AS msg_id, d FROM w WHERE NOT EXISTS (SELECT FROM e WHERE e.msg_id = w.id AND e.d = w.d)"""

# Several deliveries of one message may end at once, here and elsewhere: one after the other, so that none misses the
# other.
_LOCK_MESSAGES: Final = "SELECT FROM {s}.msg WHERE id = ANY($1::text[]) ORDER BY id FOR NO KEY UPDATE"

_END_DELIVERIES: Final = """
DELETE FROM {s}.dlv USING unnest($2::text[], $3::smallint[], $4::int[]) AS w(id, d, epoch)
WHERE dlv.msg_id = w.id AND dlv.d = w.d AND dlv.epoch = w.epoch AND dlv.owner = $1 AND dlv.state = 'l'
RETURNING dlv.msg_id, dlv.d"""

_END_MESSAGES: Final = """
DELETE FROM {s}.msg WHERE id = ANY($1::text[]) AND NOT EXISTS (SELECT FROM {s}.dlv WHERE dlv.msg_id = msg.id)"""

_PUT_BACK: Final = """
UPDATE {s}.dlv SET state = w.state::"char", rcpt = w.rcpt, next_at = now() + w.retry_in * interval '1 second',
  crashes = CASE WHEN w.state = 'c' THEN crashes ELSE 0 END, attempts = attempts - w.uncounted,
  dup = dlv.dup OR w.dup, owner = NULL
FROM unnest($2::text[], $3::smallint[], $4::int[], $5::text[], $6::jsonb[], $7::float8[], $8::int[], $9::bool[])
  AS w(id, d, epoch, state, rcpt, retry_in, uncounted, dup)
WHERE dlv.msg_id = w.id AND dlv.d = w.d AND dlv.epoch = w.epoch AND dlv.owner = $1 AND dlv.state = 'l'
RETURNING dlv.msg_id, dlv.d"""

# A notice ages also while it is held, but not while it is damaged.
_HOLD_MESSAGES: Final = f"""
UPDATE {{s}}.msg SET held_at = coalesce(held_at, now()) WHERE id = ANY($1::text[]) AND (
  kind IN ('{Kind.MAIL}', '{Kind.OUTCOME}') OR EXISTS (SELECT FROM {{s}}.dlv WHERE msg_id = msg.id AND state = 'c'))"""

# A message ages as one, and not while an operator holds a part of it.
_MAY_BE_ATTEMPTED: Final = "expires_at > now() OR held_at IS NOT NULL"

# The expiry is asked for row by row, in the order of the index: a join that the planner chose freely may read all mail.
_DUE: Final = f"""
  SELECT msg_id, d, sender, next_at, attempts > 0 AS tried FROM {{{{s}}}}.dlv
  WHERE state = 'r' AND dest = $2 AND (attempts > 0) = {{tried}} AND next_at <= now()
    AND (SELECT {_MAY_BE_ATTEMPTED} FROM {{{{s}}}}.msg WHERE id = dlv.msg_id)
  ORDER BY next_at LIMIT 8 * $3"""

# The planner's figures may be of a moment when the queue was empty, and claims must not depend on them. `tried` comes
# of a subquery, since a constant is folded into what the index does not have; the sample is sorted once; and each of it
# is looked up by its key, one by one, which `state::text` leaves as the only way. It may have been deferred since this
# statement began.
_CLAIM: Final = f"""
WITH {_ME},
s AS (({_DUE.format(tried="(SELECT false)")}) UNION ALL ({_DUE.format(tried="(SELECT true)")})),
t AS (SELECT *, row_number() OVER (PARTITION BY tried, sender ORDER BY next_at, msg_id) AS turn FROM s),
u AS MATERIALIZED (
  SELECT *, row_number() OVER (PARTITION BY tried ORDER BY turn, hashtext(msg_id || $1::text)) AS place FROM t),
c AS (
  SELECT one.msg_id, one.d, u.place, u.tried, one.taken_from
  FROM (SELECT * FROM u ORDER BY place, tried) AS u CROSS JOIN LATERAL (
    SELECT msg_id, d, taken_from FROM {{s}}.dlv
    WHERE dlv.msg_id = u.msg_id AND dlv.d = u.d AND state::text = 'r' AND next_at <= now()
    FOR UPDATE SKIP LOCKED) AS one
  WHERE EXISTS (SELECT FROM me) LIMIT $3)
UPDATE {{s}}.dlv SET state = 'l', owner = $1, epoch = epoch + 1, attempts = attempts + 1, next_at = now(),
  taken_from = NULL
FROM c JOIN {{s}}.msg ON msg.id = c.msg_id WHERE dlv.msg_id = c.msg_id AND dlv.d = c.d
RETURNING {_COLUMNS}, msg.content, c.place, c.tried, c.taken_from"""

# The previous claim saw long-due deliveries; where vacuum is held up, all that has gone lies there as well.
_NEXT_DUE: Final = f"""
SELECT min(extract(epoch FROM next_at - now()))::float8 FROM unnest($1::text[]) AS wanted(dest)
CROSS JOIN (VALUES (false), (true)) AS tried(tried)
CROSS JOIN LATERAL (SELECT next_at FROM {{s}}.dlv
  WHERE state = 'r' AND dlv.dest = wanted.dest AND (attempts > 0) = tried.tried
    AND next_at > now() - interval '1 second' AND (SELECT {_MAY_BE_ATTEMPTED} FROM {{s}}.msg WHERE id = dlv.msg_id)
  ORDER BY next_at LIMIT 1) AS first"""

# Our leases unknown to this process: their claim was committed, and its answer was lost.
_UNKNOWN_LEASES: Final = f"""
SELECT {_COLUMNS}, msg.content, 0 AS place, false AS tried, dlv.taken_from
FROM {{s}}.dlv JOIN {{s}}.msg ON msg.id = dlv.msg_id
WHERE dlv.owner = $1 AND dlv.state = 'l' AND dlv.msg_id || '/' || dlv.d <> ALL($2::text[])"""

# The lock shows a message's current state: an operator may have given it more time since this statement began.
# As for a claim, the planner has no choice: deliveries are looked up by the key of each message that is too old.
_END_OVERDUE: Final = f"""
WITH {_ME},
o AS MATERIALIZED (SELECT id FROM {{s}}.msg WHERE held_at IS NULL AND expires_at <= now() AND ({_IS_OUTCOME}) = $3
  AND (SELECT true FROM {{s}}.dlv WHERE msg_id = msg.id AND state::text IN ('r', 'h') LIMIT 1)
  ORDER BY expires_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED),
c AS (SELECT one.msg_id, one.d, one.taken_from FROM o CROSS JOIN LATERAL (
    SELECT msg_id, d, taken_from FROM {{s}}.dlv
    WHERE dlv.msg_id = o.id AND state::text IN ('r', 'h') FOR UPDATE SKIP LOCKED) AS one
  WHERE EXISTS (SELECT FROM me))
UPDATE {{s}}.dlv SET state = 'l', owner = $1, epoch = epoch + 1
FROM c JOIN {{s}}.msg ON msg.id = c.msg_id WHERE dlv.msg_id = c.msg_id AND dlv.d = c.d
RETURNING {_COLUMNS}, NULL AS content, 0 AS place, false AS tried, c.taken_from"""

_UNWARNED: Final = f"""
SELECT {_COLUMNS}, dlv.taken_from FROM {{s}}.dlv JOIN {{s}}.msg ON msg.id = dlv.msg_id
WHERE dlv.state = 'r' AND dlv.attempts > 0 AND NOT msg.warned AND msg.kind = 'mail'
  AND msg.arrived_at <= now() - $1::float8 * interval '1 second' ORDER BY msg.id LIMIT $2"""

_WARN: Final = "UPDATE {s}.msg SET warned = true WHERE id = $1 AND NOT warned RETURNING id"

# The first destination between two others, of which the second may be NULL.
_NEXT_DESTINATION: Final = """
  (SELECT dest FROM {{s}}.dlv WHERE state = 'r' AND dest > {after} AND dest < {before} ORDER BY dest LIMIT 1)
  UNION ALL
  (SELECT dest FROM {{s}}.dlv WHERE {before} IS NULL AND state = 'r' AND dest > {after} ORDER BY dest LIMIT 1)"""

# One look into the index for each destination, instead of all of its entries. Those that are known are passed over by
# their names: where vacuum is held up, all that has gone lies before what waits.
_DESTINATIONS: Final = f"""
WITH RECURSIVE gap AS (
  SELECT name AS after, lead(name) OVER (ORDER BY name) AS before FROM unnest(array_append($1::text[], '')) AS name),
found AS (
  SELECT one.dest, gap.before
  FROM gap CROSS JOIN LATERAL ({_NEXT_DESTINATION.format(after="gap.after", before="gap.before")}) AS one
  UNION ALL
  SELECT one.dest, found.before
  FROM found CROSS JOIN LATERAL ({_NEXT_DESTINATION.format(after="found.dest", before="found.before")}) AS one)
SELECT dest FROM found ORDER BY dest"""

_READ: Final = """
SELECT octets, substring(content FROM $2::int + 1 FOR $3::int) AS part, content IS NULL AS is_chunked
FROM {s}.msg WHERE id = $1"""

_READ_CHUNKS: Final = "SELECT data FROM {s}.chunk WHERE msg_id = $1 AND n BETWEEN $2 AND $3 ORDER BY n"

_IS_INTACT: Final = """
SELECT digest = sha256(coalesce(content,
  (SELECT string_agg(data, ''::bytea ORDER BY n) FROM {s}.chunk WHERE msg_id = msg.id), ''::bytea))
FROM {s}.msg WHERE id = $1"""

_CHUNK: Final = "INSERT INTO {s}.chunk (msg_id, n, data) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING"

# Mail whose client was answered 451, though it may be there. The insertion waits for a commit that is still under way.
_WITHDRAW_WAIT: Final = """
INSERT INTO {s}.msg (id, kind, arrived_at, expires_at, reverse_path, parameters, carrier, accepted_by, octets,
  header_octets, digest, held_at)
VALUES ($2, 'mail', now(), now(), '', '{}', '{}', $1, 0, 0, '', now()) ON CONFLICT (id) DO NOTHING"""

_WITHDRAW: Final = """
DELETE FROM {s}.msg WHERE id = $2 AND NOT EXISTS (SELECT FROM {s}.dlv WHERE msg_id = $2 AND NOT
  (state = 'r' AND attempts = $3 AND epoch = 0 OR state = 'l' AND owner = $1 AND epoch = 1)) RETURNING
  (SELECT coalesce(sum(jsonb_array_length(rcpt)), 0) FROM {s}.dlv WHERE msg_id = $2)::int AS recipients"""

# From the directory of one gateway ----------------------------------------------------------------------------------

# Repeated it must write: a transaction that writes nothing waits for no standby.
_NOTE_MOVED: Final = """
INSERT INTO {s}.moved (id, at) VALUES ($1, now()) ON CONFLICT (id) DO UPDATE SET at = excluded.at
RETURNING xmax = 0 AS is_new"""

_MOVE_MESSAGE: Final = """
INSERT INTO {s}.msg (id, kind, arrived_at, expires_at, held_at, warned, forced, reverse_path, parameters, carrier,
  trace_id, accepted_by, octets, header_octets, digest, content)
VALUES ($1, $2, now() - $3::float8 * interval '1 second', now() + $4::float8 * interval '1 second',
  now() - $5::float8 * interval '1 second', $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16)"""

_MOVE_DELIVERY: Final = """
INSERT INTO {s}.dlv (msg_id, d, dest, sender, state, attempts, crashes, next_at, dup, rcpt)
VALUES ($1, $2, $3, $4, $5::text::"char", $6, $7, now() + $8::float8 * interval '1 second', $9, $10)"""

_FORGET_MOVED: Final = "DELETE FROM {s}.moved WHERE id = ANY($1::text[])"

# Gateways -----------------------------------------------------------------------------------------------------------

_ENTER: Final = """
INSERT INTO {s}.gateway (id, name, version, started_at, alive_until)
VALUES ($1, $2, $3, clock_timestamp(), clock_timestamp() + $4::float8 * interval '1 second')"""

_BEAT: Final = """
UPDATE {s}.gateway SET alive_until = clock_timestamp() + $2::float8 * interval '1 second' WHERE id = $1
RETURNING (SELECT body FROM {s}.stat LIMIT 1) AS stat, (SELECT count(*) FROM {s}.gateway)::int AS gateways,
  (SELECT count(*) FROM {s}.gateway AS peer WHERE peer.alive_until < clock_timestamp() AND peer.id <> $1)::int AS dead,
  extract(epoch FROM clock_timestamp())::float8 AS clock"""

# Two statements: the second must see what was committed while the first waited, or before its lock. One within a claim
# is checked again at the next beat, as beats never wait.
_BURY: Final = """
DELETE FROM {s}.gateway WHERE id IN (
  SELECT id FROM {s}.gateway WHERE alive_until < clock_timestamp() AND id <> $1 FOR UPDATE SKIP LOCKED)
RETURNING id, name, extract(epoch FROM clock_timestamp() - alive_until)::float8 + $2::float8 AS silent"""

# An outcome is a few lines of our own, and caused no crash.
_TAKE_OVER: Final = f"""
UPDATE {{s}}.dlv SET next_at = least(next_at, now()),
  state = CASE WHEN crashes + 1 >= $1 AND NOT {_HAS_OUTCOME} THEN 'h' ELSE 'r' END::"char",
  crashes = crashes + 1, dup = true, owner = NULL,
  taken_from = jsonb_build_array(dead.name, round(dead.silent::numeric, 3))
FROM unnest($2::uuid[], $3::text[], $4::float8[]) AS dead(id, name, silent)
WHERE dlv.owner = dead.id AND dlv.state = 'l' RETURNING dlv.msg_id, dlv.state::text AS state, dead.id AS dead"""

# Connection slots. One that is free has `since` where it is not free before that.
_FREE_SLOTS: Final = "UPDATE {s}.slot SET owner = NULL, since = NULL WHERE owner = ANY($1::uuid[])"

_FREE_ORPHANED_SLOTS: Final = """
UPDATE {s}.slot SET owner = NULL, since = NULL
WHERE owner <> $1 AND owner NOT IN (SELECT id FROM {s}.gateway)"""

# Of one that stops: what it has kept until now belongs to connections that are about to end.
_LEAVE_SLOTS: Final = """
UPDATE {s}.slot SET owner = NULL, since = clock_timestamp() + $2::float8 * interval '1 second' WHERE owner = $1"""

_GIVE_SLOTS_BACK: Final = """
UPDATE {s}.slot SET owner = NULL, since = NULL FROM unnest($3::int[], $4::timestamptz[]) AS given(n, since)
WHERE slot.owner = $1 AND slot.name = $2 AND slot.n = given.n AND slot.since = given.since"""

_MAKE_SLOTS: Final = """
WITH beyond AS (DELETE FROM {s}.slot WHERE name = $1 AND n > $2::int AND owner IS NULL)
INSERT INTO {s}.slot (name, n) SELECT $1, n FROM generate_series(1, $2::int) AS n ON CONFLICT DO NOTHING"""

_TAKE_SLOTS: Final = f"""
WITH {_ME}, free AS (
  SELECT n FROM {{s}}.slot WHERE name = $2 AND n <= $3 AND owner IS NULL
    AND (since IS NULL OR since <= clock_timestamp()) AND EXISTS (SELECT FROM me)
  ORDER BY n LIMIT $4 FOR UPDATE SKIP LOCKED)
UPDATE {{s}}.slot SET owner = $1, since = clock_timestamp() FROM free WHERE slot.name = $2 AND slot.n = free.n
RETURNING slot.n"""

_SLOTS_HELD: Final = "SELECT n, since FROM {s}.slot WHERE owner = $1 AND name = $2"

_SLOTS: Final = """
SELECT slot.name, count(*) AS total, count(slot.owner) AS used,
  coalesce((SELECT jsonb_object_agg(holder.name, holder.amount) FROM (
    SELECT coalesce(gateway.name, one.owner::text) AS name, count(*) AS amount
    FROM {s}.slot AS one LEFT JOIN {s}.gateway ON gateway.id = one.owner
    WHERE one.name = slot.name AND one.owner IS NOT NULL GROUP BY 1) AS holder), '{}') AS gateways
FROM {s}.slot GROUP BY slot.name ORDER BY slot.name"""

# Permits of gateways that are gone. A gateway that is only cut off from here may still get the replies to their mail.
_LAND_PERMITS: Final = """
WITH gone AS (DELETE FROM {s}.permit WHERE {which} RETURNING name, amount)
INSERT INTO {s}.quota (name, begins_at, used)
SELECT name, clock_timestamp() + $2::float8 * interval '1 second', sum(amount) FROM gone WHERE amount > 0 GROUP BY name
ON CONFLICT (name, begins_at) DO UPDATE SET used = quota.used + excluded.used"""

_SETTLE: Final = """
SELECT granted, wait, available FROM {s}.settle($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"""

_LIMITS: Final = """
SELECT pace.name, pace.most, extract(epoch FROM pace.period)::float8 AS period_seconds, pace.per,
  round(extract(epoch FROM pace.burst) / nullif(extract(epoch FROM pace.gap), 0))::bigint AS burst,
  coalesce((SELECT sum(used) FROM {s}.quota WHERE quota.name = pace.name
    AND begins_at > clock_timestamp() - pace.period * 1.01 - interval '50 ms'), 0)::bigint AS used,
  coalesce((SELECT sum(amount) FROM {s}.permit WHERE permit.name = pace.name), 0)::bigint AS in_flight,
  greatest(0, extract(epoch FROM pace.tat - pace.burst + pace.gap - clock_timestamp()))::float8 AS next_in,
  greatest(0, extract(epoch FROM pace.rest_until - clock_timestamp()))::float8 AS rests_for,
  coalesce((SELECT jsonb_object_agg(holder.name, holder.amount) FROM (
    SELECT coalesce(gateway.name, permit.owner::text) AS name, sum(permit.amount) AS amount
    FROM {s}.permit LEFT JOIN {s}.gateway ON gateway.id = permit.owner
    WHERE permit.name = pace.name AND permit.amount > 0 GROUP BY 1) AS holder), '{}') AS gateways
FROM {s}.pace WHERE pace.most IS NOT NULL ORDER BY pace.name"""

# A net below the net: with the rules above, there are none.
_FREE_ORPHANS: Final = """
UPDATE {s}.dlv SET state = 'r', next_at = now(), dup = true, owner = NULL
WHERE state = 'l' AND owner NOT IN (SELECT id FROM {s}.gateway) RETURNING msg_id"""

_LEAVE: Final = """
WITH d AS (UPDATE {s}.dlv SET state = 'r', attempts = greatest(attempts - 1, 0), next_at = least(next_at, now()),
  dup = true, owner = NULL WHERE owner = $1 AND state = 'l' RETURNING msg_id),
g AS (DELETE FROM {s}.gateway WHERE id = $1 RETURNING id, name)
SELECT pg_notify($2, $3::text || json_build_array(g.id, g.name, NULL, (SELECT count(*) FROM d), '')) FROM g"""

# All gateways are notified of one that has gone: it has no row any more.
_TELL_GONE: Final = """
SELECT pg_notify($1, $2::text || json_build_array(n.id, n.name, n.silent, n.deliveries, $3::text))
FROM unnest($4::uuid[], $5::text[], $6::float8[], $7::bigint[]) AS n(id, name, silent, deliveries)"""

_FOLD_TALLIES: Final = """
WITH gone AS (DELETE FROM {s}.tally WHERE gateway <> $1 AND gateway NOT IN (SELECT id FROM {s}.gateway)
  RETURNING split_part(name, '/', 1) AS name, recipients)
INSERT INTO {s}.tally AS tally (gateway, name, recipients) SELECT $1, name, sum(recipients) FROM gone GROUP BY name
ON CONFLICT (gateway, name) DO UPDATE SET recipients = tally.recipients + excluded.recipients"""

_NOTE_STAT: Final = "UPDATE {s}.stat SET at = now(), body = $1::jsonb"

# Of other users' transactions a plain role sees nothing; what they do to vacuum it sees. A prepared transaction has no
# backend.
_VACUUM_STATE: Final = """
SELECT n_dead_tup AS dead, n_live_tup AS living,
  coalesce(extract(epoch FROM clock_timestamp() - oldest.began), 0)::float8 AS oldest_seconds, oldest.pid AS backend
FROM pg_stat_user_tables LEFT JOIN (
  SELECT pid, xact_start AS began FROM pg_stat_activity
  WHERE datname = current_database() AND backend_type = 'client backend' AND xact_start IS NOT NULL
  UNION ALL SELECT NULL, prepared FROM pg_prepared_xacts WHERE database = current_database()
  ORDER BY began LIMIT 1) AS oldest ON true
WHERE relid = '{s}.dlv'::regclass"""

# Operators ----------------------------------------------------------------------------------------------------------

_COUNTS: Final = f"""
SELECT state::text AS state, count(*)::bigint AS deliveries,
  count(*) FILTER (WHERE next_at > now())::bigint AS later,
  extract(epoch FROM min(next_at) FILTER (WHERE next_at > now()))::float8 AS next_due
FROM {{s}}.dlv WHERE NOT {_HAS_OUTCOME} GROUP BY state"""

_BACKLOG: Final = """
SELECT found.dest, found.pending,
  (SELECT extract(epoch FROM arrived_at)::float8 FROM {s}.msg WHERE id = found.oldest) AS oldest
FROM (SELECT dest, count(*)::bigint AS pending, min(msg_id) AS oldest FROM (
    SELECT dest, msg_id FROM {s}.dlv WHERE state = 'r' AND dest = ANY($1::text[])
    UNION ALL SELECT dest, msg_id FROM {s}.dlv WHERE state = 'l' AND dest = ANY($1::text[])) AS waiting
  GROUP BY dest) AS found"""

_OLDEST: Final = (
    f"SELECT extract(epoch FROM arrived_at)::float8 FROM {{s}}.msg WHERE NOT ({_IS_OUTCOME}) ORDER BY id LIMIT 1"
)
_MESSAGES: Final = f"SELECT count(*), coalesce(sum(octets), 0)::bigint FROM {{s}}.msg WHERE NOT ({_IS_OUTCOME})"
_TALLIES: Final = (
    "SELECT split_part(name, '/', 1) AS name, sum(recipients)::bigint AS recipients FROM {s}.tally GROUP BY 1"
)

_SHOWN: Final = f"""
SELECT {_COLUMNS}, gateway.name AS gateway
FROM ({{chosen}}) AS chosen JOIN {{s}}.msg USING (id) LEFT JOIN {{s}}.dlv ON dlv.msg_id = msg.id
LEFT JOIN {{s}}.gateway ON gateway.id = dlv.owner ORDER BY msg.id, dlv.next_at, dlv.d"""

_PAGE: Final = _SHOWN.replace(
    "{chosen}", f"SELECT id FROM {{s}}.msg WHERE id > $1 AND ({_IS_OUTCOME}) = $3 ORDER BY id LIMIT $2"
)
_SHOW: Final = _SHOWN.replace("{chosen}", "SELECT $1::text AS id")
_FIND: Final = _SHOWN.replace(
    "{chosen}",
    f"SELECT id FROM {{s}}.msg WHERE NOT ({_IS_OUTCOME}) AND ($1::bytea IS NULL OR trace_id = $1)"
    " AND ($2::text IS NULL OR reverse_path = $2)"
    " AND ($3::text IS NULL OR EXISTS (SELECT FROM {s}.dlv, jsonb_array_elements(rcpt) AS there"
    " WHERE dlv.msg_id = msg.id AND there ->> 1 = $3)) ORDER BY id LIMIT $4",
)

_EXISTS: Final = "SELECT FROM {s}.msg WHERE id = $1 FOR NO KEY UPDATE"
_RETRY: Final = "UPDATE {s}.dlv SET next_at = now() WHERE msg_id = $1 AND state::text = 'r' RETURNING d"
_HOLD: Final = "UPDATE {s}.dlv SET state = 'h' WHERE msg_id = $1 AND state::text = 'r' RETURNING d"
_RELEASE: Final = (
    "UPDATE {s}.dlv SET state = 'r', next_at = now() WHERE msg_id = $1 AND state = ANY($2::text[]::\"char\"[])"
    " RETURNING d"
)
_FORGET_CRASHES: Final = "UPDATE {s}.dlv SET crashes = 0 WHERE msg_id = $1 AND crashes > 0"
_AGE_AGAIN: Final = """
UPDATE {s}.msg SET expires_at = expires_at + (now() - held_at), held_at = NULL WHERE id = $1 AND held_at IS NOT NULL"""
_EXPIRE: Final = "UPDATE {s}.msg SET expires_at = least(expires_at, now()), held_at = NULL, forced = true WHERE id = $1"
_RESET: Final = """
UPDATE {s}.dlv SET next_at = now(), attempts = 0, crashes = 0 WHERE msg_id = $1 AND state::text = 'r' RETURNING d"""
_RESET_AGE: Final = """
UPDATE {s}.msg SET expires_at = now() + $2::float8 * interval '1 second', forced = false WHERE id = $1"""
_STATES: Final = """
SELECT state::text AS state, jsonb_array_length(rcpt) AS recipients FROM {s}.dlv WHERE msg_id = $1 FOR UPDATE"""
_DELETE: Final = "DELETE FROM {s}.msg WHERE id = $1 RETURNING kind"
_GATEWAYS: Final = """
SELECT gateway.id, gateway.name, gateway.version, extract(epoch FROM started_at)::float8 AS started_at,
  extract(epoch FROM alive_until - clock_timestamp())::float8 AS alive_for,
  (SELECT count(*) FROM {s}.dlv WHERE owner = gateway.id AND state = 'l') AS leases
FROM {s}.gateway ORDER BY started_at, id"""


class Statements:
    """The statements on one schema."""

    def __init__(self, schema: str) -> None:
        name = quoted(schema)

        def on_schema(statement: str) -> str:
            return statement.replace("{s}", name)

        self.submit = on_schema(_SUBMIT)
        self.tally = on_schema(_TALLY)
        self.end = on_schema(_END)
        self.lock_messages = on_schema(_LOCK_MESSAGES)
        self.end_deliveries = on_schema(_END_DELIVERIES)
        self.end_messages = on_schema(_END_MESSAGES)
        self.put_back = on_schema(_PUT_BACK)
        self.hold_messages = on_schema(_HOLD_MESSAGES)
        self.claim = on_schema(_CLAIM)
        self.next_due = on_schema(_NEXT_DUE)
        self.unknown_leases = on_schema(_UNKNOWN_LEASES)
        self.end_overdue = on_schema(_END_OVERDUE)
        self.unwarned = on_schema(_UNWARNED)
        self.warn = on_schema(_WARN)
        self.destinations = on_schema(_DESTINATIONS)
        self.read = on_schema(_READ)
        self.read_chunks = on_schema(_READ_CHUNKS)
        self.is_intact = on_schema(_IS_INTACT)
        self.chunk = on_schema(_CHUNK)
        self.withdraw_wait = on_schema(_WITHDRAW_WAIT)
        self.withdraw = on_schema(_WITHDRAW)
        self.enter = on_schema(_ENTER)
        self.beat = on_schema(_BEAT)
        self.bury = on_schema(_BURY)
        self.take_over = on_schema(_TAKE_OVER)
        self.free_slots = on_schema(_FREE_SLOTS)
        self.free_orphaned_slots = on_schema(_FREE_ORPHANED_SLOTS)
        self.leave_slots = on_schema(_LEAVE_SLOTS)
        self.give_slots_back = on_schema(_GIVE_SLOTS_BACK)
        self.make_slots = on_schema(_MAKE_SLOTS)
        self.take_slots = on_schema(_TAKE_SLOTS)
        self.slots_held = on_schema(_SLOTS_HELD)
        self.slots = on_schema(_SLOTS)
        self.free_orphans = on_schema(_FREE_ORPHANS)
        self.leave = on_schema(_LEAVE)
        self.land_permits = on_schema(_LAND_PERMITS.replace("{which}", "owner = ANY($1::uuid[])"))
        self.note_moved = on_schema(_NOTE_MOVED)
        self.move_message = on_schema(_MOVE_MESSAGE)
        self.move_delivery = on_schema(_MOVE_DELIVERY)
        self.forget_moved = on_schema(_FORGET_MOVED)
        self.land_orphans = on_schema(
            _LAND_PERMITS.replace("{which}", "owner <> $1 AND owner NOT IN (SELECT id FROM {s}.gateway)")
        )
        self.settle = on_schema(_SETTLE)
        self.limits = on_schema(_LIMITS)
        self.tell_gone = on_schema(_TELL_GONE)
        self.fold_tallies = on_schema(_FOLD_TALLIES)
        self.note_stat = on_schema(_NOTE_STAT)
        self.vacuum_state = on_schema(_VACUUM_STATE)
        self.counts = on_schema(_COUNTS)
        self.backlog = on_schema(_BACKLOG)
        self.oldest = on_schema(_OLDEST)
        self.messages = on_schema(_MESSAGES)
        self.tallies = on_schema(_TALLIES)
        self.page = on_schema(_PAGE)
        self.show = on_schema(_SHOW)
        self.find = on_schema(_FIND)
        self.exists = on_schema(_EXISTS)
        self.retry = on_schema(_RETRY)
        self.hold = on_schema(_HOLD)
        self.release = on_schema(_RELEASE)
        self.forget_crashes = on_schema(_FORGET_CRASHES)
        self.age_again = on_schema(_AGE_AGAIN)
        self.expire = on_schema(_EXPIRE)
        self.reset = on_schema(_RESET)
        self.reset_age = on_schema(_RESET_AGE)
        self.states = on_schema(_STATES)
        self.delete = on_schema(_DELETE)
        self.gateways = on_schema(_GATEWAYS)
