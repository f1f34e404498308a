"""What the server hands mail to in the queue modes: the spool, or the upstream first and the spool where it fails.

Both say 250 only when the upstream did or the message is durable (P1).
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Final, Protocol, Self

from otel_smtp.forwarding.base import (
    Capabilities,
    DeliveryFailed,
    Forwarder,
    MailTransaction,
    Permanent,
    Relay,
    Transient,
)
from otel_smtp.observing import TransactionObserver
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.spool.draft import Draft
from otel_smtp.spool.messages import Lease, NewMessage, SpoolError, StorageFull, new_id
from otel_smtp.spool.store import Store

logger: Final = logging.getLogger("otel_smtp.spool.forwarder")


class Attempts(Protocol):
    """Who attempts deliveries."""

    def reserve(self, destinations: Sequence[str]) -> bool:
        """Whether a new message can be attempted at once; if so, room for it is kept."""
        ...

    def begin(self, destinations: Sequence[str], leases: Sequence[Lease], content: Sequence[bytes] | None) -> None:
        """Attempt `leases`, in the room that was kept; none, where it came to nothing.

        Args:
            content: where it is at hand already; the first chunk is the header block.
        """
        ...

    def wake(self, destinations: Sequence[str]) -> None:
        """A message waits for an attempt."""
        ...


class Intake:
    """The way into the spool: shared by both forwarders.

    Args:
        max_age_seconds: after which a message is given up.
        first_wait_seconds: gives the wait after an attempt that was made before the message came here.
    """

    def __init__(
        self,
        store: Store,
        relay: Relay,
        attempts: Attempts,
        *,
        max_age_seconds: float,
        first_wait_seconds: Callable[[], float],
    ) -> None:
        self._first_wait_seconds = first_wait_seconds
        self._store = store
        self._attempts = attempts
        self._max_age_seconds = max_age_seconds
        self.relay = relay

    def refusal(self) -> Reply | None:
        """Why nothing can be taken in now."""
        error = self._store.refusal()
        return None if error is None else reply_to(error)

    def draft(self) -> Draft:
        """A new content."""
        return self._store.draft()

    async def submit(
        self,
        mail: Mail,
        deliveries: Mapping[str, Sequence[Recipient]],
        draft: Draft,
        seen: TransactionObserver,
        *,
        was_tried: bool = False,
        is_possible_duplicate: bool = False,
    ) -> str:
        """Make a message durable, and have it attempted at once if there is room; its id.

        Args:
            was_tried: it was attempted a moment ago: it waits first.
            is_possible_duplicate: that attempt may have succeeded.

        Raises:
            SpoolError: it is not durable.
        """
        now = time.time()
        message = NewMessage(
            id=new_id(),
            mail=mail,
            deliveries=deliveries,
            header_octets=draft.header_octets,
            arrived_at=now,
            expires_at=now + self._max_age_seconds,
            carrier=dict(seen.carrier()),
            is_possible_duplicate=is_possible_duplicate,
            due_at=now + self._first_wait_seconds() if was_tried else None,
        )
        destinations = list(deliveries)
        is_leased = not was_tried and self._attempts.reserve(destinations)
        leases: Sequence[Lease] = ()
        content = None if draft.in_memory is None else tuple(draft.in_memory)
        try:
            leases = await self._store.submit(message, draft, is_leased=is_leased)
        finally:
            if is_leased:
                self._attempts.begin(destinations, leases, content)
        if not is_leased:
            self._attempts.wake(destinations)
        seen.spooled(message.id)
        return message.id


def reply_to(error: SpoolError) -> Reply:
    """What a client is told where the spool fails it (RFC 3463 3.4: 4.3.1 is a full mail system)."""
    return replies.STORAGE_FULL if isinstance(error, StorageFull) else replies.STORAGE_FAILED


class SpoolForwarder:
    """Mode `queue`: everything that can be delivered by anybody is made durable, then answered."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    def capabilities(self) -> Capabilities:
        """What the upstream is known to take: what it would refuse later is better refused now."""
        return self._intake.relay.capabilities()

    async def begin(self, mail: Mail, seen: TransactionObserver) -> MailTransaction:
        """Open a transaction.

        Raises:
            Permanent: no upstream would take it.
            Transient: the spool takes nothing now.
        """
        if (refusal := self._intake.relay.refusal(mail)) is not None:
            raise Permanent(refusal)
        if (refusal := self._intake.refusal()) is not None:
            raise Transient(refusal)
        return _Queued(self._intake, mail, seen)


class _Queued:
    """A transaction that ends in the spool."""

    def __init__(self, intake: Intake, mail: Mail, seen: TransactionObserver) -> None:
        self._intake = intake
        self._mail = mail
        self._seen = seen
        self._deliveries: dict[str, list[Recipient]] = {}
        self.spool_id: str | None = None

    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        """See `MailTransaction.recipients`."""
        return [self._accept(recipient) for recipient in batch]

    def _accept(self, recipient: Recipient) -> Reply:
        destination = self._intake.relay.destination(self._mail, recipient)
        if isinstance(destination, Reply):
            return destination
        self._deliveries.setdefault(destination, []).append(recipient)
        return replies.RECIPIENT_OK

    async def content(self, chunks: AsyncIterator[bytes]) -> Reply:
        """See `MailTransaction.content`."""
        async with self._intake.draft() as draft:
            copied = _Copied(chunks, draft)
            async for _ in copied:
                pass
            try:
                await copied.end()
                self.spool_id = await self._intake.submit(self._mail, self._deliveries, draft, self._seen)
            except SpoolError as error:
                return reply_to(error)
        return replies.OK

    async def abort(self) -> None:
        """See `MailTransaction.abort`."""


class DirectThenQueueForwarder:
    """Mode `direct-then-queue`: the upstream's answer is the client's, but for what fails only for now."""

    def __init__(self, direct: Forwarder, intake: Intake) -> None:
        self._direct = direct
        self._intake = intake

    def capabilities(self) -> Capabilities:
        """The upstream's."""
        return self._direct.capabilities()

    async def begin(self, mail: Mail, seen: TransactionObserver) -> MailTransaction:
        """Open a transaction; errors as those of the upstream relay."""
        transaction: MailTransaction | None = None
        try:
            transaction = await self._direct.begin(mail, seen)
        except Transient:
            if self._intake.refusal() is not None:
                raise
        return _DirectThenQueued(self._intake, transaction, mail, seen)


class _DirectThenQueued:
    """A transaction with the upstream that may turn to the spool at each step."""

    def __init__(self, intake: Intake, direct: MailTransaction | None, mail: Mail, seen: TransactionObserver) -> None:
        self._intake = intake
        self._direct = direct
        self._mail = mail
        self._seen = seen
        self._accepted: list[Recipient] = []  # by the upstream
        self._deferred: list[Recipient] = []
        self._refusals: list[Reply] = []  # of the deferred
        self.spool_id: str | None = None

    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        """See `MailTransaction.recipients`."""
        verdicts: Sequence[Reply] = [replies.UPSTREAM_UNAVAILABLE] * len(batch)
        if self._direct is not None:
            try:
                verdicts = await self._direct.recipients(batch)
            except DeliveryFailed as failure:
                verdicts = [failure.reply] * len(batch)
        return [self._answer(recipient, verdict) for recipient, verdict in zip(batch, verdicts, strict=True)]

    def _answer(self, recipient: Recipient, verdict: Reply) -> Reply:
        if verdict.is_positive:
            self._accepted.append(recipient)
            return verdict
        if not verdict.is_transient or self._intake.refusal() is not None:
            return verdict
        destination = self._intake.relay.destination(self._mail, recipient)
        if isinstance(destination, Reply):
            return destination
        self._deferred.append(recipient)
        self._refusals.append(verdict)
        return replies.RECIPIENT_OK

    async def content(self, chunks: AsyncIterator[bytes]) -> Reply:
        """See `MailTransaction.content`."""
        async with self._intake.draft() as draft:
            copied = _Copied(chunks, draft)
            verdict: Reply | None = None
            if self._direct is not None and self._accepted:
                try:
                    verdict = await self._direct.content(copied)
                except DeliveryFailed as failure:
                    verdict = failure.reply
            elif self._direct is not None:
                await self._direct.abort()
            async for _ in copied:  # what a relay did not want to see
                pass
            return await self._settle(verdict, draft, copied)

    async def _settle(self, verdict: Reply | None, draft: Draft, copied: "_Copied") -> Reply:
        """Turn the upstream's verdict into the client's, with what is left made durable."""
        waiting = list(self._deferred)
        if verdict is not None and verdict.is_permanent:
            return verdict  # no recipient has it, and the client knows
        not_taken = verdict is not None and not verdict.is_positive
        if verdict is None or not_taken:
            waiting = [*self._accepted, *waiting]
        if not waiting:
            assert verdict is not None
            return verdict
        try:
            await copied.end()
            self.spool_id = await self._intake.submit(
                self._mail,
                self._by_destination(waiting),
                draft,
                self._seen,
                was_tried=any(reply is not replies.OTHER_ROUTE for reply in self._refusals) or not_taken,
                is_possible_duplicate=verdict is not None and verdict.error_type is ErrorType.OUTCOME_UNKNOWN,
            )
        except SpoolError as error:
            # Those that the upstream has taken may get it twice: the client keeps the mail, and nobody loses it (P3).
            return verdict if verdict is not None and not verdict.is_positive else reply_to(error)
        return replies.OK

    def _by_destination(self, recipients: Sequence[Recipient]) -> Mapping[str, Sequence[Recipient]]:
        found: dict[str, list[Recipient]] = {}
        for recipient in recipients:
            destination = self._intake.relay.destination(self._mail, recipient)
            # What was accepted a moment ago has a destination; should the routes be gone, an attempt will say so.
            found.setdefault(destination if isinstance(destination, str) else "", []).append(recipient)
        return found

    async def abort(self) -> None:
        """See `MailTransaction.abort`."""
        if self._direct is not None:
            await self._direct.abort()


class _Copied:
    """The content of a message on its way to somebody else, copied into a draft."""

    __slots__ = ("_chunks", "_draft", "_fault")

    def __init__(self, chunks: AsyncIterator[bytes], draft: Draft) -> None:
        self._chunks = chunks
        self._draft = draft
        self._fault: SpoolError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        chunk = await anext(self._chunks)
        if self._fault is None:
            try:
                await self._draft.add(chunk)
            except SpoolError as fault:  # the other way may still succeed, and the client is read to its end
                self._fault = fault
        return chunk

    async def end(self) -> None:
        """The content is complete.

        Raises:
            SpoolError: the copy is not.
        """
        if self._fault is not None:
            raise self._fault
        await self._draft.end()
