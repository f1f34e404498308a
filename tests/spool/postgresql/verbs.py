"""Each verb of a store in a database, made ready and called: what tests disturb, one verb after the other.

`VERBS` has one row at least for each; `test_verbs.py` fails where one is missing.
"""

import asyncio
import inspect
import typing
from asyncio import Future
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from otel_smtp.forwarding.base import Claim
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.spool.messages import (
    ContentRef,
    DeliveryState,
    End,
    Kind,
    Lease,
    MovedDelivery,
    MovedMessage,
    NewMessage,
    SpooledRecipient,
    Verdict,
    new_id,
)
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
from otel_smtp.spool.postgresql.limits import DatabaseLedger
from otel_smtp.spool.promises import Promise
from tests.spool.messages import BODY, CARRIER, HEADER, TRACE_ID, leased, message, queued, written

LARGE: Final = b"x" * 600_000  # three chunks
LIVES: Final = frozenset({"open", "close"})
"""Verbs that begin and end a store."""
ASKS_NOTHING: Final = frozenset({"rebuild", "housekeep", "take_deeds"})
"""Verbs of the interface that a database has no work with."""

Ready = Any
"""What a verb is called with."""


async def nothing(store: PostgresqlStore) -> Ready:
    """It needs nothing."""
    return None


@dataclass(frozen=True, slots=True)
class Verb:
    """One way to call a verb.

    Attributes:
        line: the connection that it goes over, as the server shows it; those that gather in groups are sent again by
            the store itself, all others by the caller.
        prepare: makes the queue ready for it.
        changes: something is written.
        is_promise: what it answers must not be lost with the primary.
        tables: a lock on these makes it wait.
    """

    line: str
    call: Callable[[PostgresqlStore, Ready], Awaitable[object]]
    prepare: Callable[[PostgresqlStore], Awaitable[Ready]] = nothing
    changes: bool = False
    is_promise: bool = False
    tables: Sequence[str] = ("dlv", "msg")

    @property
    def repeats_itself(self) -> bool:
        """The store sends it again until it is done."""
        return self.line not in ("claims", "limits")

    @property
    def is_of_a_limit(self) -> bool:
        """It raises nothing: it answers None where the database does not answer."""
        return self.line == "limits"


def verbs_of_the_interface() -> set[str]:
    """The names of all verbs that wait for the database."""
    found = set()
    for kind, before in ((PostgresqlStore, ""), (DatabaseLedger, "ledger.")):
        for name, member in inspect.getmembers(kind, inspect.isfunction):
            if name.startswith("_"):
                continue
            answer = typing.get_type_hints(member).get("return")
            is_promise = inspect.isclass(answer) and issubclass(answer, Promise)
            if inspect.iscoroutinefunction(member) or is_promise or typing.get_origin(answer) is Future:
                found.add(before + name)
    return found - LIVES - ASKS_NOTHING - {"ledger.close", "note_stat"}  # the last is housekeeping, now and then


async def a_message(store: PostgresqlStore) -> NewMessage:
    return message()


async def queued_one(store: PostgresqlStore) -> str:
    return await queued(store)


async def lease(store: PostgresqlStore) -> Lease:
    await queued(store)
    (one,) = await leased(store)
    return one


async def large(store: PostgresqlStore) -> ContentRef:
    await queued(store, None, HEADER, LARGE)
    (one,) = await leased(store)
    return one.content


async def held(store: PostgresqlStore) -> str:
    one = await queued(store)
    await store.hold(one)
    return one


async def overdue(store: PostgresqlStore) -> str:
    return await queued(store, message(max_age_seconds=0.0))


async def deferred(store: PostgresqlStore) -> str:
    one = await lease(store)
    await store.finish(one, (Verdict(0, None, replies.OK),), retry_in=60.0)
    return one.message_id


async def outcome(store: PostgresqlStore) -> str:
    return await queued(store, message(sender="", destination="application", kind=Kind.OUTCOME))


async def moved(store: PostgresqlStore) -> tuple[MovedMessage, Sequence[bytes]]:
    there = [SpooledRecipient(0, Recipient("user@example.net"))]
    delivery = MovedDelivery(0, "up", DeliveryState.READY, 1, 0, 60.0, False, there)
    one = MovedMessage(
        new_id(), Kind.MAIL, Mail("app@example.com"), CARRIER, 60.0, 3600.0, None, False, False, len(HEADER),
        ContentRef(len(HEADER + BODY), None), [delivery],
    )  # fmt: skip
    return one, [HEADER + BODY]


async def moved_before(store: PostgresqlStore) -> str:
    one, content = await moved(store)
    await store.take_in(one, content, is_intact=True)
    return one.id


async def settled(store: PostgresqlStore) -> Claim:
    return Claim("limit", 10, 3600.0, 10, False, 0, 0, 0, 1, 1)


async def slot(store: PostgresqlStore) -> Ready:
    return await store.ledger.hold("up", 1, (), 1)


def a_bounce() -> tuple[NewMessage, bytes]:
    return message("app@example.com", sender="", destination="back", kind=Kind.BOUNCE), HEADER + BODY


async def _submit(store: PostgresqlStore, new: NewMessage, *chunks: bytes, lease: bool = False) -> object:
    return await store.submit(new, await written(store.draft(), *chunks), lease=lease)


async def _settle(store: PostgresqlStore, claim: Claim) -> object:
    """Refused where the database did not answer: a waiter for a permit asks again."""
    grant = await store.ledger.settle(claim)
    return None if grant is None else grant.granted


def _ends(end: End | None) -> Callable[[PostgresqlStore, Lease], Awaitable[object]]:
    async def finish(store: PostgresqlStore, one: Lease) -> None:
        notices = [a_bounce()] if end is End.FAILED else ()
        await store.finish(one, (Verdict(0, end, replies.RELAY_DENIED),), retry_in=60.0, notices=notices)

    return finish


async def _company(store: PostgresqlStore, _: Ready) -> object:
    return [(peer.name, peer.leases) for peer in (await store.company()).gateways]


VERBS: Final = {
    "submit": Verb("accepts", _submit, a_message, changes=True, is_promise=True),
    "submit, leased": Verb(
        "accepts", lambda store, new: _submit(store, new, lease=True), a_message, changes=True, is_promise=True
    ),
    "submit, large": Verb(
        "large contents", lambda store, new: _submit(store, new, HEADER, LARGE), a_message,
        changes=True, is_promise=True,
    ),
    "claim": Verb("claims", lambda store, _: store.claim({"up": 5}), queued_one, changes=True, is_promise=True),
    "finish, delivered": Verb("records", _ends(End.DELIVERED), lease, changes=True, is_promise=True),
    "finish, failed": Verb("records", _ends(End.FAILED), lease, changes=True, is_promise=True),
    "finish, deferred": Verb("records", _ends(None), lease, changes=True, is_promise=True),
    "mark_corrupt": Verb("records", lambda store, one: store.mark_corrupt(one), lease, changes=True, is_promise=True),
    "end_overdue": Verb("claims", lambda store, _: store.end_overdue(5), overdue, changes=True),
    "unwarned": Verb("claims", lambda store, _: store.unwarned(0.0, 5), deferred),
    "warn": Verb("claims", lambda store, one: store.warn(one, [a_bounce()]), deferred, changes=True),
    "destinations": Verb("claims", lambda store, _: store.destinations(), queued_one),
    "read": Verb("claims", lambda store, one: store.read(one.content, 1, 10), lease),
    "read, large": Verb("claims", lambda store, content: store.read(content, 262_000, 400), large),
    "is_intact": Verb("claims", lambda store, content: store.is_intact(content), large),
    "take_in": Verb(
        "claims", lambda store, one: store.take_in(*one, is_intact=True), moved, changes=True, is_promise=True
    ),
    "forget_moved": Verb(
        "claims", lambda store, one: store.forget_moved([one]), moved_before, changes=True, tables=["moved"]
    ),
    "counts": Verb("claims", lambda store, _: store.counts(), queued_one),
    "messages": Verb("claims", lambda store, _: store.messages(), queued_one),
    "tally": Verb("claims", lambda store, _: store.tally(), queued_one, tables=["tally"]),
    "backlog": Verb("claims", lambda store, _: store.backlog(["application"]), outcome),
    "page": Verb("claims", lambda store, _: store.page("", 5), queued_one),
    "show": Verb("claims", lambda store, one: store.show(one), queued_one),
    "find": Verb("claims", lambda store, _: store.find(trace_id=TRACE_ID, most=5), queued_one),
    "retry": Verb("claims", lambda store, one: store.retry(one), deferred, changes=True),
    "hold": Verb("claims", lambda store, one: store.hold(one), queued_one, changes=True),
    "release": Verb("claims", lambda store, one: store.release(one), held, changes=True),
    "expire": Verb("claims", lambda store, one: store.expire(one), queued_one, changes=True),
    "reset": Verb("claims", lambda store, one: store.reset(one, 60.0), deferred, changes=True),
    "delete": Verb("claims", lambda store, one: store.delete(one), queued_one, changes=True),
    "tell": Verb("claims", lambda store, _: store.tell("due"), changes=True, tables=()),
    "tell_deed": Verb("claims", lambda store, _: store.tell_deed("deed"), changes=True, tables=()),
    "session_user": Verb("claims", lambda store, _: store.session_user(), tables=()),
    "company": Verb("claims", _company, lease),
    "limits": Verb("claims", lambda store, _: store.limits(), tables=["pace"]),
    "slots": Verb("claims", lambda store, _: store.slots(), slot, tables=["slot"]),
    "ledger.hold": Verb(
        "limits", lambda store, _: store.ledger.hold("up", 1, (), 1), changes=True, tables=["slot"]
    ),
    "ledger.hold, released": Verb(
        "limits", lambda store, given: store.ledger.hold("up", 1, given, 0), slot, changes=True, tables=["slot"]
    ),
    "ledger.settle": Verb("limits", _settle, settled, changes=True, tables=["pace"]),
}  # fmt: skip
"""By verb, and what is special of the call."""


def verb_of(label: str) -> str:
    """The verb of a row."""
    return label.partition(",")[0]


State = dict[str, list[tuple[object, ...]]]

# But for instants, names by chance, and marks of possible duplicates, which may be too many.
_STATE: Final = {
    "msg": "SELECT kind, warned, held_at IS NOT NULL, forced, reverse_path, octets, digest, content IS NULL,"
    " expires_at > now() FROM {s}.msg ORDER BY id",
    "chunk": "SELECT n, length(data) FROM {s}.chunk ORDER BY msg_id, n",
    "dlv": "SELECT d, dest, state::text, attempts, crashes, epoch, owner IS NULL, rcpt, next_at > now()"
    " FROM {s}.dlv ORDER BY msg_id, d",
    "tally": "SELECT split_part(name, '/', 1), sum(recipients) FROM {s}.tally GROUP BY 1 HAVING sum(recipients) <> 0"
    " ORDER BY 1",
    "moved": "SELECT count(*) FROM {s}.moved",
    "permit": "SELECT name, amount FROM {s}.permit ORDER BY 1",
    "slot": "SELECT name, n, owner IS NULL FROM {s}.slot ORDER BY 1, 2",
    "gateway": "SELECT name FROM {s}.gateway",
}


async def state_of(place: QueueLocation, connection: Any) -> State:
    """All that a queue has."""
    return {
        table: [tuple(row) for row in await connection.fetch(statement.replace("{s}", place.schema))]
        for table, statement in _STATE.items()
    }


async def empty(place: QueueLocation, connection: Any) -> None:
    """Remove all that a queue has, but for its gateways."""
    async with connection.transaction():
        for table in ("msg", "tally", "moved", "permit", "quota", "pace", "slot"):
            await connection.execute(f"DELETE FROM {place.schema}.{table}")


def call(verb: Verb, store: PostgresqlStore, ready: Ready) -> "asyncio.Task[object]":
    """Begin to call a verb."""

    async def calling() -> object:
        return await verb.call(store, ready)

    return asyncio.create_task(calling())


async def waiting(connection: Any, line: str, what: str, *, but: int = 0) -> int:
    """The backend of a connection that waits for something, once there is one."""
    async with asyncio.timeout(30):
        while True:
            await connection.execute("SELECT pg_stat_clear_snapshot()")
            pid = await connection.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE starts_with(application_name, 'otel-smtp ' || $1)"
                " AND $2 IN (wait_event_type, wait_event) AND pid <> $3", line, what, but,
            )  # fmt: skip
            if pid is not None:
                found: int = pid
                return found
            await asyncio.sleep(0.005)
