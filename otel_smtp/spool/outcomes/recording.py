"""Makes the messages that report ends to receivers, to be stored with the ends themselves."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.received import inspect_header
from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.aging import parsed
from otel_smtp.spool.messages import End, Kind, Lease, NewMessage, SpooledRecipient, SpoolError, Verdict, new_id
from otel_smtp.spool.outcomes.events import RecipientOutcome, Told, event_body, source_of
from otel_smtp.spool.outcomes.receivers import Receivers
from otel_smtp.spool.store import Notice, Store

logger: Final = logging.getLogger("otel_smtp.spool.outcomes.recording")


class Outcomes:
    """Makes outcomes.

    Args:
        max_age_seconds: after which an outcome that its receiver does not accept expires.
        wake: called when outcomes are stored.
    """

    def __init__(
        self, store: Store, receivers: Receivers, *, hostname: str, max_age_seconds: float, wake: Callable[[], None]
    ) -> None:
        self._store = store
        self._receivers = receivers
        self._source = source_of(hostname)
        self._max_age_seconds = max_age_seconds
        self._wake = wake

    async def of(
        self,
        lease: Lease,
        verdicts: Sequence[Verdict],
        *,
        bounces: Callable[[SpooledRecipient], bool] = lambda _: False,
        upstream: str = "",
        header: bytes | None = None,
    ) -> Sequence[Notice]:
        """Make the outcomes to store with the ends among these verdicts.

        Never raises: a mail's end is recorded even if its report fails.

        Args:
            bounces: whether the sender of the mail gets a bounce for a refused recipient.
            upstream: the name of the one that decided; "": the route's.
            header: the mail's header block, if in memory.
        """
        receivers = self._receivers.by_destination
        ended = [verdict for verdict in verdicts if verdict.end is not None]
        if lease.kind is not Kind.MAIL or not ended or not receivers:
            return ()
        outcomes: list[Notice] = []
        try:
            message_id = await self._message_id(lease, header)
            now = time.time()
            by_number = {one.number: one for one in lease.recipients}
            for verdict in ended:
                recipient = by_number[verdict.number]
                outcome, reply = _outcome_of(verdict, recipient, bounces)
                told = Told(
                    outcome, self._source, now, upstream or lease.destination, message_id, reply,
                    is_final=outcome is not RecipientOutcome.EXPIRED,
                )  # fmt: skip
                for destination, receiver in receivers.items():
                    if outcome in receiver.settings.outcomes and receiver.has_room():
                        receiver.note_stored()
                        outcomes.append(self._stored_as(destination, lease, recipient, told))
        except Exception:
            logger.exception("outcome not created", extra={"spool_id": lease.message_id})
        return outcomes

    def stored(self, outcomes: Sequence[Notice]) -> None:
        """They are durable: send them."""
        if outcomes:
            self._wake()

    def _stored_as(self, destination: str, lease: Lease, recipient: SpooledRecipient, told: Told) -> Notice:
        event_id = new_id()
        message = NewMessage(
            id=event_id,
            mail=Mail(""),
            deliveries={destination: [Recipient(recipient.recipient.address)]},
            header_octets=0,
            expires_in=self._max_age_seconds,
            carrier=lease.carrier,
            kind=Kind.OUTCOME,
        )
        return message, event_body(event_id, lease, recipient, told)

    async def _message_id(self, lease: Lease, header: bytes | None) -> str | None:
        if header is None:
            try:
                header = await self._store.read(lease.content, 0, lease.header_octets)
            except SpoolError as error:
                logger.warning(
                    "outcome sent without the Message-ID: header unreadable",
                    extra={"spool_id": lease.message_id, "fault": str(error)},
                )
                return None
        return inspect_header(header).message_id


def _outcome_of(
    verdict: Verdict, recipient: SpooledRecipient, bounces: Callable[[SpooledRecipient], bool]
) -> tuple[RecipientOutcome, Reply | None]:
    """A recipient's outcome, with the last reply about it."""
    match verdict.end:
        case End.DELIVERED:
            return RecipientOutcome.DELIVERED, verdict.reply
        case End.FAILED:
            return RecipientOutcome.BOUNCED if bounces(recipient) else RecipientOutcome.REFUSED, verdict.reply
        case _:
            return RecipientOutcome.EXPIRED, parsed(recipient.last_reply)
