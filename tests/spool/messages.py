"""Messages for tests of the spool."""

import asyncio
from collections.abc import Sequence

from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.spool.messages import Kind, Lease, NewMessage, new_id
from otel_smtp.spool.store import Draft, Store

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
    return draft


def message(
    *recipients: str,
    sender: str = "app@example.com",
    destination: str = "up",
    header_octets: int = len(HEADER),
    max_age_seconds: float = 432000.0,
    due_in_seconds: float = 0.0,
    kind: Kind = Kind.MAIL,
) -> NewMessage:
    """A message for some recipients of one destination."""
    return NewMessage(
        id=new_id(),
        mail=Mail(sender),
        deliveries={destination: [Recipient(one) for one in recipients or ("user@example.net",)]},
        header_octets=header_octets,
        expires_in=max_age_seconds,
        carrier=CARRIER,
        kind=kind,
        retry_in=due_in_seconds,
    )


async def queued(store: Store, new: NewMessage | None = None, *chunks: bytes) -> str:
    """Put a message into a store; its id."""
    new = new or message()
    await store.submit(new, await written(store.draft(), *chunks), lease=False)
    return new.id


async def leased(store: Store, *, most: int = 10, destination: str = "up") -> Sequence[Lease]:
    """Lease what is due in a store."""
    return [lease for lease, _ in (await store.claim({destination: most}))[0]]
