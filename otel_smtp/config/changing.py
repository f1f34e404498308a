"""Settings read again while a gateway runs: which have changed, and which changes need a restart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from otel_smtp.config.consistency import contradictions
from otel_smtp.config.settings import (
    SCHEMA,
    DeliveryMode,
    DeliveryTable,
    Key,
    LimitsTable,
    ListenerTable,
    LogTable,
    NotifyTable,
    Settings,
    Table,
    Tables,
    TelemetryTable,
    TimeoutsTable,
    UpstreamTable,
    UpstreamTimeoutTable,
)
from otel_smtp.config.values import MINUTE

AT_ONCE: Final[Mapping[type[Table], frozenset[str]]] = {
    ListenerTable: frozenset(SCHEMA[ListenerTable]) - {"name", "address"},
    LimitsTable: frozenset(SCHEMA[LimitsTable]),
    TimeoutsTable: frozenset(SCHEMA[TimeoutsTable]),
    DeliveryTable: frozenset({"strategy", "content_newlines"}),
    UpstreamTable: frozenset(SCHEMA[UpstreamTable]),
    UpstreamTimeoutTable: frozenset(SCHEMA[UpstreamTimeoutTable]),
    NotifyTable: frozenset(SCHEMA[NotifyTable]),
    TelemetryTable: frozenset(
        {
            "addresses",
            "addresses_hash_key",
            "addresses_hash_key_file",
            "client_ip",
            "segment_events",
            "segment_age",
            "trace_in_reply",
            "probes",
            "message_id",
        }
    ),
    LogTable: frozenset({"level"}),
}
"""The keys whose new values hold without a restart, by table. Those of no table here, and all others, need one."""


class Change(NamedTuple):
    """The result of reading settings again.

    Attributes:
        settings: those in force from now on: the new ones, except those that need a restart.
        changed: key paths whose new values are among them, in the order of the tables.
        needs_restart: key paths whose old values stay until then.
    """

    settings: Settings
    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]


def change(before: Settings, after: Settings) -> Change:
    """Compare settings read again with those in force.

    A listener whose address changes keeps all of its old settings, and so do all of them where one comes, goes or is
    renamed: settings checked together must take effect together. A new `allow` that suits a new loopback address would
    make an open relay at the old one. Upstreams stay as they are where one of them names a limit that is new, or shares
    another number of connections. So does a table that would contradict what stays, as an upstream at the address that
    a listener keeps until the restart.
    """
    if before.delivery.mode != after.delivery.mode:
        # A default that depends on the mode stays with the old mode.
        upstreams = patient(after.upstream, before.delivery.mode, after.origins)
        after = msgspec.structs.replace(after, upstream=upstreams)
    changed: list[str] = []
    needs_restart: list[str] = []
    values: dict[str, Any] = {}
    for name, entry in SCHEMA[Settings].items():
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(entry, Key):
            values[name] = old
            needs_restart += [name] if old != new else []
        elif name == "listener":
            values[name] = _listeners(old, new, changed, needs_restart)
        elif name == "upstream" and not _names_known_limits(new, before):
            needs_restart.append(name)
            values[name] = old
        elif isinstance(entry, Tables):
            values[name] = _lists(entry, name, old, new, changed, needs_restart)
        else:
            values[name] = _table(old, new, f"{name}.", changed, needs_restart)
    for name in _contradicted(msgspec.structs.replace(after, **values), after):
        values[name] = getattr(before, name)
        kept = [key for key in changed if key.partition(".")[0] == name]
        changed = [key for key in changed if key not in kept]
        needs_restart += kept
    return Change(
        msgspec.structs.replace(after, **values),
        tuple(changed),
        tuple(needs_restart),
    )


def _contradicted(merged: Settings, after: Settings) -> Sequence[str]:
    """The tables with contradictions that the new settings alone do not have."""
    of_after = {(problem.key, problem.message) for problem in contradictions(after)}
    found = [problem for problem in contradictions(merged) if (problem.key, problem.message) not in of_after]
    return tuple(dict.fromkeys(problem.key.partition(".")[0] for problem in found))


def _names_known_limits(upstreams: tuple[UpstreamTable, ...], before: Settings) -> bool:
    """Whether the limits and connection slots of upstreams are there: those are made at the start, for all workers."""
    known = {limit.name for limit in before.limit}
    slots = {(upstream.name, upstream.connections_total) for upstream in before.upstream}
    return all(
        known.issuperset(upstream.limits)
        and (upstream.connections_total is None or (upstream.name, upstream.connections_total) in slots)
        for upstream in upstreams
    )


def _table(old: Table, new: Table, prefix: str, changed: list[str], needs_restart: list[str]) -> Table:
    """One table with the new values that may take effect."""
    kept: dict[str, object] = {}
    at_once = AT_ONCE.get(type(old), frozenset())
    for name in _different(old, new):
        if name in at_once:
            changed.append(f"{prefix}{name}")
        else:
            needs_restart.append(f"{prefix}{name}")
            kept[name] = getattr(old, name)
    return msgspec.structs.replace(new, **kept)


def _different(old: Table, new: Table) -> Iterator[str]:
    return (name for name in SCHEMA[type(old)] if getattr(old, name) != getattr(new, name))


def _listeners(
    old: tuple[ListenerTable, ...], new: tuple[ListenerTable, ...], changed: list[str], needs_restart: list[str]
) -> tuple[ListenerTable, ...]:
    if [one.name for one in old] != [one.name for one in new]:
        needs_restart.append("listener")
        return old
    kept: list[ListenerTable] = []
    for index, (before, after) in enumerate(zip(old, new, strict=True)):
        keys = [f"listener.{index}.{name}" for name in _different(before, after)]
        has_moved = before.address != after.address
        (needs_restart if has_moved else changed).extend(keys)
        kept.append(before if has_moved else after)
    return tuple(kept)


def _lists(
    entry: Tables,
    name: str,
    old: tuple[Table, ...],
    new: tuple[Table, ...],
    changed: list[str],
    needs_restart: list[str],
) -> tuple[Table, ...]:
    """A list of tables, which takes effect as a whole or not at all."""
    if old == new:
        return old
    if AT_ONCE.get(entry.item) != frozenset(SCHEMA[entry.item]):
        needs_restart.append(name)
        return old
    if len(old) != len(new):
        changed.append(name)
        return new
    for index, (before, after) in enumerate(zip(old, new, strict=True)):
        changed += [f"{name}.{index}.{key}" for key in _different(before, after)]
    return new


def holds_at_once(table: type[Table], name: str) -> bool:
    """Whether a setting's new value takes effect without a restart."""
    return name in AT_ONCE.get(table, ())


def patient(
    upstreams: tuple[UpstreamTable, ...], mode: DeliveryMode, origins: Mapping[str, str]
) -> tuple[UpstreamTable, ...]:
    """Upstreams whose default wait for the final reply suits the mode.

    In mode queue no client waits for it, so that it is the full time of RFC 5321 4.5.3.2.6.
    """
    reply = 10 * MINUTE if mode == "queue" else UpstreamTimeoutTable().reply
    return tuple(
        one
        if f"upstream.{index}.timeout.reply" in origins
        else msgspec.structs.replace(one, timeout=msgspec.structs.replace(one.timeout, reply=reply))
        for index, one in enumerate(upstreams)
    )
