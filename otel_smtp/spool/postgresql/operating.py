"""Operators' queries and commands."""

import hashlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from otel_smtp.spool.drafting import MEMORY_LIMIT_OCTETS
from otel_smtp.spool.messages import (
    Backlog,
    Company,
    Counts,
    End,
    Kind,
    MessageView,
    MovedMessage,
    NoSuchMessage,
    Peer,
    SpoolError,
    accepted_name,
    end_name,
)
from otel_smtp.spool.postgresql import rows
from otel_smtp.spool.postgresql.beats import channel
from otel_smtp.spool.postgresql.connecting import Connection
from otel_smtp.spool.postgresql.parts import PostgresqlParts

T = TypeVar("T")

COUNT_SELF_BELOW: Final = 50_000  # messages; beyond this, the housekeeper's counts are near enough
MOST_TOLD: Final = 7000  # octets; PostgreSQL takes 7999 in a notification
DEED: Final = "deed "
MOST_HALF_HEARD: Final = 16
COUNT_SHARE: Final = 20  # the housekeeper counts for at most this part of its time


class PostgresqlOperating(PostgresqlParts):
    """Counts, lists and changes messages."""

    _not_before = 0.0  # the next count for all gateways

    # Seeing ----------------------------------------------------------------------------------------------------

    async def counts(self) -> Counts:
        """See `Store.counts`; in a very large queue, the housekeeper's counts."""
        stat = self.beats.stat
        if stat.get("messages", 0) < COUNT_SELF_BELOW:
            stat = await self._count()
        return Counts(**{name: stat[name] for name in Counts.__dataclass_fields__ if name in stat})

    async def _count(self) -> Mapping[str, Any]:
        async def count(connection: Connection) -> Mapping[str, Any]:
            counted = {row["state"]: row for row in await connection.fetch(self._statements.counts)}
            messages, octets = await connection.fetchrow(self._statements.messages) or (0, 0)
            ready = counted.get("r")
            later = 0 if ready is None else ready["later"]
            return {
                "ready": 0 if ready is None else ready["deliveries"] - later,
                "deferred": later,
                "next_due_at": None if ready is None else ready["next_due"],
                **{
                    name: counted[state]["deliveries"] if state in counted else 0
                    for name, state in (("active", "l"), ("held", "h"), ("corrupt", "c"))
                },
                "oldest_arrived_at": await connection.fetchval(self._statements.oldest),
                "messages": messages,
                "octets": octets,
            }

        return await self._working.do(count)

    async def messages(self) -> int:
        """The number of messages."""
        found: int = await self._working.do(lambda connection: connection.fetchval(self._statements.messages))
        return found

    async def note_stat(self) -> None:
        """Count for all gateways, as often as it is worthwhile."""
        began = time.monotonic()
        if began < self._not_before:
            return
        stat = json.dumps(await self._count())
        self._not_before = time.monotonic() + COUNT_SHARE * (time.monotonic() - began)
        await self._working.do(lambda connection: connection.execute(self._statements.note_stat, stat))

    async def tally(self) -> Mapping[str, int]:
        """See `Store.tally`."""
        found = await self._working.do(lambda connection: connection.fetch(self._statements.tallies))
        return {row["name"]: row["recipients"] for row in found if row["recipients"]}

    async def backlog(self, destinations: Sequence[str]) -> Mapping[str, Backlog]:
        """See `Store.backlog`."""
        found = await self._working.do(
            lambda connection: connection.fetch(self._statements.backlog, list(destinations))
        )
        by_destination = {row["dest"]: Backlog(row["pending"], row["oldest"]) for row in found}
        return {destination: by_destination.get(destination, Backlog()) for destination in destinations}

    async def page(self, after: str, most: int, *, outcomes: bool = False) -> Sequence[MessageView]:
        """See `Store.page`."""
        return rows.shown(
            await self._working.do(lambda connection: connection.fetch(self._statements.page, after, most, outcomes))
        )

    async def show(self, message_id: str) -> MessageView:
        """See `Store.show`."""
        found = rows.shown(
            await self._working.do(lambda connection: connection.fetch(self._statements.show, message_id))
        )
        if not found:
            raise _no_such(message_id)
        return found[0]

    async def find(
        self, *, trace_id: str | None = None, sender: str | None = None, recipient: str | None = None, most: int
    ) -> Sequence[MessageView]:
        """See `Store.find`."""
        try:
            trace = None if trace_id is None else bytes.fromhex(trace_id)
        except ValueError:
            return []
        return rows.shown(
            await self._working.do(
                lambda connection: connection.fetch(self._statements.find, trace, sender, recipient, most)
            )
        )

    async def company(self) -> Company:
        """See `Store.company`."""
        found = await self._working.do(lambda connection: connection.fetch(self._statements.gateways))
        return Company(
            [
                Peer(
                    str(row["id"]), row["name"], row["version"], row["started_at"], row["alive_for"], row["leases"],
                    is_this=row["id"] == self.beats.incarnation,
                )
                for row in found
            ],
            list(self.beats.departures),
        )  # fmt: skip

    async def session_user(self) -> str:
        """The user that is logged in to the database."""
        name: str = await self._working.do(lambda connection: connection.fetchval("SELECT session_user::text"))
        return name

    async def limits(self) -> Sequence[Mapping[str, Any]]:
        """All limits of the queue: name, most within period_seconds, per, burst, used, in_flight, next_in and rests_for
        in seconds, gateways: what each has in flight."""
        found = await self._working.do(lambda connection: connection.fetch(self._statements.limits))
        return [{**row, "gateways": json.loads(row["gateways"])} for row in found]

    async def slots(self) -> Sequence[Mapping[str, Any]]:
        """The connection slots of each upstream with any: name, total, used, gateways: how many each has."""
        found = await self._working.do(lambda connection: connection.fetch(self._statements.slots))
        return [{**row, "gateways": json.loads(row["gateways"])} for row in found]

    # Doing -----------------------------------------------------------------------------------------------------

    async def tell(self, what: str) -> None:
        """Tell all gateways of the queue to look: "due" for deliveries, "look" for expired mail."""
        await self._working.do(
            lambda connection: connection.execute("SELECT pg_notify($1, $2)", channel(self._place), what)
        )

    async def take_deeds(self) -> Sequence[str]:
        """See `Store.take_deeds`: a notification reaches running gateways only."""
        return ()

    async def tell_deed(self, deed: str) -> None:
        """See `Store.tell_deed`: a notification is short, so it comes in pieces."""
        pieces = [deed[start : start + MOST_TOLD] for start in range(0, len(deed), MOST_TOLD)]
        name = uuid.uuid4().hex
        heads = [f"{DEED}{name} {len(pieces)} " for _ in pieces]
        await self._working.do(
            lambda connection: connection.execute(
                "SELECT pg_notify($1, head || piece) FROM unnest($2::text[], $3::text[]) WITH ORDINALITY"
                " AS told(head, piece, place) ORDER BY place",
                channel(self._place),
                heads,
                pieces,
            )
        )

    async def retry(self, message_id: str) -> bool:
        """See `Store.retry`."""

        async def retry(connection: Connection) -> bool:
            return bool(await connection.fetch(self._statements.retry, message_id))

        return await self._operate(message_id, retry)

    async def hold(self, message_id: str) -> bool:
        """See `Store.hold`."""

        async def hold(connection: Connection) -> bool:
            if not await connection.fetch(self._statements.hold, message_id):
                return False
            await connection.execute(self._statements.hold_messages, [message_id])
            return True

        return await self._operate(message_id, hold)

    async def release(self, message_id: str) -> bool:
        """See `Store.release`."""

        async def release(connection: Connection) -> bool:
            if not await connection.fetch(self._statements.release, message_id, ["h", "c"]):
                return False
            await connection.execute(self._statements.forget_crashes, message_id)
            await connection.execute(self._statements.age_again, message_id)
            return True

        return await self._operate(message_id, release)

    async def expire(self, message_id: str) -> bool:
        """See `Store.expire`."""

        async def expire(connection: Connection) -> bool:
            await connection.fetch(self._statements.release, message_id, ["h", "c"])
            await connection.execute(self._statements.expire, message_id)
            return True

        return await self._operate(message_id, expire)

    async def reset(self, message_id: str, expires_in: float) -> bool:
        """See `Store.reset`."""

        async def reset(connection: Connection) -> bool:
            if not await connection.fetch(self._statements.reset, message_id):
                return False
            await connection.execute(self._statements.reset_age, message_id, expires_in)
            return True

        return await self._operate(message_id, reset)

    async def delete(self, message_id: str) -> int:
        """See `Store.delete`."""

        async def delete(connection: Connection) -> int:
            states = await connection.fetch(self._statements.states, message_id)
            if any(row["state"] == "l" for row in states):
                raise SpoolError(f"{message_id} is being delivered; hold it, or try again")
            recipients: int = sum(row["recipients"] for row in states)
            kind = await connection.fetchval(self._statements.delete, message_id)
            name = end_name(Kind(kind), End.REMOVED)
            await connection.execute(self._statements.tally, self.beats.incarnation, "operators", [name], [recipients])
            return recipients

        return await self._operate(message_id, delete)

    async def take_in(self, message: MovedMessage, content: Sequence[bytes], *, is_intact: bool) -> bool:
        """Make a message from another store durable, with its whole state.

        Args:
            content: in pieces of `piece_octets`, but for the last one.
            is_intact: False: it is only the readable part.

        Returns:
            False: it was moved before, and may have ended here.
        """
        octets = message.content.octets
        whole = b"".join(content) if octets <= MEMORY_LIMIT_OCTETS else None
        digest = hashlib.sha256()
        for piece in content:
            digest.update(piece)

        async def take_in(connection: Connection) -> bool:
            async with connection.transaction():
                if not await connection.fetchval(self._statements.note_moved, message.id):
                    return False
                await connection.execute(
                    self._statements.move_message, *rows.moved_values(message), self.beats.incarnation, octets,
                    message.header_octets, digest.digest() if is_intact else b"", whole,
                )  # fmt: skip
                for number, piece in enumerate(content if whole is None else ()):
                    await connection.execute(self._statements.chunk, message.id, number, piece)
                await connection.executemany(self._statements.move_delivery, rows.moved_deliveries(message))
                recipients = sum(len(one.recipients) for one in message.deliveries)
                name = accepted_name(message.kind)
                await connection.execute(
                    self._statements.tally, self.beats.incarnation, "operators", [name], [recipients]
                )
            return True

        return await self._working.do(take_in)

    async def _operate(self, message_id: str, change: Callable[[Connection], Awaitable[T]]) -> T:
        async def operate(connection: Connection) -> T:
            async with connection.transaction():
                if not await connection.fetch(self._statements.exists, message_id):
                    raise _no_such(message_id)
                return await change(connection)

        return await self._working.do(operate)


class HeardDeeds:
    """Reassembles deeds that come in pieces, in order."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[str]] = {}

    def hear(self, what: str) -> str | None:
        """The deed, once its last piece has come; None before that."""
        name, _, rest = what.removeprefix(DEED).partition(" ")
        count, _, piece = rest.partition(" ")
        pieces = self._pieces.setdefault(name, [])
        pieces.append(piece)
        if str(len(pieces)) != count:
            if len(self._pieces) > MOST_HALF_HEARD:
                del self._pieces[next(iter(self._pieces))]
            return None
        del self._pieces[name]
        return "".join(pieces)


def _no_such(message_id: str) -> NoSuchMessage:
    return NoSuchMessage(f"no message {message_id}")
