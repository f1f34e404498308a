"""What time does to queued mail: a warning to its sender, and its end.

Only `Aging.look` ends mail for its age, a small part of the spool at a time: a clock that jumped cannot empty it.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Final

from otel_smtp.observing import Fate, Observer, SpoolAction, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import EnhancedStatus, Reply
from otel_smtp.spool.attempts import MESSAGE_KINDS, Recording, told
from otel_smtp.spool.dsn.notices import Notices
from otel_smtp.spool.dsn.report import NoticeKind
from otel_smtp.spool.messages import End, Kind, Lease, Verdict
from otel_smtp.spool.store import Notice, Store

logger: Final = logging.getLogger("otel_smtp.spool.aging")

MOST_AT_ONCE: Final = 100  # ended for their age in one look, or a hundredth of the spool if that is more


class Aging:
    """Ends what is too old, and warns of what waits.

    Args:
        warn_after_seconds: since arrival, once; None: never.
        wake: called with destinations for which something waits now.
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

    async def look(self, messages: int) -> None:
        """End and warn.

        Args:
            messages: how many there are in the spool.

        Raises:
            SpoolError: the spool cannot be worked on.
        """
        await self._store.housekeep()
        for lease in await self._store.end_overdue(max(MOST_AT_ONCE, messages // 100)):
            await self._end(lease)
        if self._warn_after_seconds is not None:
            for lease in await self._store.unwarned(self._warn_after_seconds, MOST_AT_ONCE):
                await self._warn(lease)

    async def _end(self, lease: Lease) -> None:
        """Give up what is too old; a notice of ours goes to an operator instead."""
        verdicts: Sequence[Verdict] = ()
        notices: Sequence[Notice] = ()
        is_notice = lease.kind is not Kind.MAIL
        self._tell(lease, SpoolAction.HELD if is_notice else SpoolAction.EXPIRED)
        if is_notice:
            logger.error("a notice cannot be delivered, and is held", extra=told(lease))
        else:
            logger.warning("given up for its age", extra={**told(lease), "recipients": len(lease.recipients)})
            verdicts = [Verdict(one.number, End.EXPIRED, replies.EXPIRED) for one in lease.recipients]
            notices = await self._notices.of(
                NoticeKind.FAILED, lease, [(one, replies.EXPIRED) for one in lease.recipients]
            )
        await self._recording.record(
            lease, lambda: self._store.finish(lease, verdicts, hold=not verdicts, notices=notices)
        )
        self._wake([destination for notice, _ in notices for destination in notice.deliveries])

    def _tell(self, lease: Lease, action: SpoolAction) -> None:
        """Tell the observers how it ended, with what was said of each recipient last."""
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
        notices = await self._notices.of(NoticeKind.DELAYED, lease, waiting, retry_until=lease.expires_at)
        if await self._store.warn(lease.message_id, notices):
            logger.warning("delayed; its sender is told", extra=told(lease))
            self._wake([destination for notice, _ in notices for destination in notice.deliveries])


def parsed(text: str) -> Reply | None:
    """The reply that was kept as text; its lines in one."""
    if not text[:3].isdigit():
        return None
    enhanced, rest = EnhancedStatus.parse(text[4:])
    return Reply(int(text[:3]), enhanced, (rest,))
