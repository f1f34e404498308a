"""The age of queued mail: a warning to its sender, and expiry.

Only `Aging.look` expires mail, a small part of the spool at a time, so a clock that jumps cannot empty it.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from otel_smtp.observing import Fate, Observer, SpoolAction, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import EnhancedStatus, Reply
from otel_smtp.spool.attempts import MESSAGE_KINDS, Recording, lease_fields
from otel_smtp.spool.dsn.notices import Notices
from otel_smtp.spool.dsn.report import NoticeKind
from otel_smtp.spool.messages import End, Kind, Lease, NoSuchMessage, StorageAway, StorageBroken, Verdict
from otel_smtp.spool.store import Notice, Store

if TYPE_CHECKING:
    from otel_smtp.spool.outcomes.recording import Outcomes

logger: Final = logging.getLogger("otel_smtp.spool.aging")

MOST_AT_ONCE: Final = 100  # expired in one look, or a hundredth of the spool if that is more


class Aging:
    """Expires mail, and warns senders of delays.

    Args:
        warn_after_seconds: since arrival, once; None: never.
        wake: called with destinations for which new messages wait.

    Attributes:
        outcomes: makes the messages that report recipients' outcomes to the application; None: nothing is reported.
    """

    def __init__(
        self,
        store: Store,
        notices: Notices,
        recording: Recording,
        observer: Observer,
        *,
        warn_after_seconds: float | None,
        wake: Callable[[Sequence[str]], None],
    ) -> None:
        self._store = store
        self._notices = notices
        self._recording = recording
        self._observer = observer
        self._warn_after_seconds = warn_after_seconds
        self._wake = wake
        self.outcomes: Outcomes | None = None

    async def look(self, messages: int) -> None:
        """End and warn.

        Args:
            messages: how many the spool holds.

        Raises:
            SpoolError: the store failed.
        """
        await self._store.housekeep()
        for lease in await self._store.end_overdue(max(MOST_AT_ONCE, messages // 100)):
            if self._recording.is_stopping:
                await self._give_back(lease)
            else:
                await self._end(lease)
        if self._warn_after_seconds is not None:
            for lease in await self._store.unwarned(self._warn_after_seconds, MOST_AT_ONCE):
                await self._warn(lease)

    async def _give_back(self, lease: Lease) -> None:
        await self._recording.record(lease, partial(self._store.finish, lease, ()))

    async def _end(self, lease: Lease) -> None:
        """Expire a delivery. An expired notice is only logged."""
        try:
            notices = await self._notices.of(
                NoticeKind.FAILED, lease, [(one, replies.EXPIRED) for one in lease.recipients]
            )
        except Exception:
            # Nothing else lets go of what is leased here: it is ended at a later look.
            logger.exception("notice not created", extra=lease_fields(lease))
            await self._give_back(lease)
            return
        self._tell(lease, SpoolAction.EXPIRED)
        if lease.kind is not Kind.MAIL:
            last = parsed(lease.recipients[0].last_reply) if lease.recipients else None
            logger.critical(
                "notice expired undelivered",
                extra={**lease_fields(lease), "code": last.code if last is not None else None},
            )
        else:
            logger.warning("message expired", extra={**lease_fields(lease), "recipients": len(lease.recipients)})
        verdicts = [Verdict(one.number, End.EXPIRED, replies.EXPIRED) for one in lease.recipients]
        outcomes: Sequence[Notice] = ()
        if self.outcomes is not None:
            outcomes = await self.outcomes.of(lease, verdicts)
        await self._recording.record(lease, lambda: self._store.finish(lease, verdicts, notices=(*notices, *outcomes)))
        if self.outcomes is not None:
            self.outcomes.stored(outcomes)
        self._wake([destination for notice, _ in notices for destination in notice.deliveries])

    def _tell(self, lease: Lease, action: SpoolAction) -> None:
        """Report its end to the observers, with the last reply about each recipient."""
        fate = Fate(action)
        record = TransactionRecord.resumed(
            lease.message_id, lease.carrier, lease.mail, kind=MESSAGE_KINDS[lease.kind], attempt=lease.attempt
        )
        record.action = action
        record.error_type = replies.EXPIRED.error_type
        record.failure = "delivery time expired"
        fates = [(one.recipient, fate, parsed(one.last_reply) or replies.EXPIRED) for one in lease.recipients]
        record.end_in_spool(fates, record.begun_ns)
        self._observer.spool_acted(record)

    async def _warn(self, lease: Lease) -> None:
        waiting = [(one, parsed(one.last_reply)) for one in lease.recipients]
        try:
            notices = await self._notices.of(NoticeKind.DELAYED, lease, waiting, retry_until=lease.expires_at)
        except NoSuchMessage:
            return  # it was not leased, and has ended meanwhile
        except (StorageAway, StorageBroken):
            raise
        except Exception:  # the others are warned all the same
            logger.exception("notice not created", extra=lease_fields(lease))
            return
        if await self._store.warn(lease.message_id, notices):
            logger.warning("message delayed; sender warned", extra=lease_fields(lease))
            self._wake([destination for notice, _ in notices for destination in notice.deliveries])


def parsed(text: str) -> Reply | None:
    """The reply that was stored as text; its lines are joined."""
    if not text[:3].isdigit():
        return None
    enhanced, rest = EnhancedStatus.parse(text[4:])
    return Reply(int(text[:3]), enhanced, (rest,))
