"""Messages for tests of the spool."""

import asyncio
import time
from collections.abc import Sequence

from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.spool.draft import Draft
from otel_smtp.spool.messages import Kind, Lease, NewMessage, new_id
from otel_smtp.spool.store import SpoolStore

HEADER = b"Received: from here\r\nSubject: a test\r\n"
BODY = b"\r\nHello.\r\n"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CARRIER = {"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"}


async def written(draft: Draft, *chunks: bytes) -> Draft:
    """`draft` with a header block and a body in it, complete."""
    for chunk in chunks or (HEADER, BODY):
        has_room = asyncio.Event()
        if not draft.write(chunk, has_room.set):
            await has_room.wait()
    await draft.end()
    return draft


def message(
    *recipients: str,
    sender: str = "app@example.com",
    destination: str = "up",
    header_octets: int = len(HEADER),
    age_seconds: float = 0.0,
    max_age_seconds: float = 432000.0,
    due_in_seconds: float | None = None,
    kind: Kind = Kind.MAIL,
) -> NewMessage:
    """A message for some recipients of one destination."""
    now = time.time() - age_seconds
    return NewMessage(
        id=new_id(),
        mail=Mail(sender),
        deliveries={destination: [Recipient(one) for one in recipients or ("user@example.net",)]},
        header_octets=header_octets,
        arrived_at=now,
        expires_at=now + max_age_seconds,
        carrier=CARRIER,
        kind=kind,
        due_at=None if due_in_seconds is None else time.time() + due_in_seconds,
    )


async def queued(store: SpoolStore, new: NewMessage | None = None, *chunks: bytes) -> str:
    """Put a message into a store; its id."""
    new = new or message()
    with store.draft() as draft:
        await written(draft, *chunks)
        await store.submit(new, draft, is_leased=False)
    return new.id


async def leased(store: SpoolStore, *, most: int = 10, destination: str = "up") -> Sequence[Lease]:
    """Lease what is due in a store."""
    now = time.time()
    return await store.apply(lambda index: index.due(now + 1, {destination: most}, store.owner, now + 60))
