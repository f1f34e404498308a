"""Messages of our own: bounces, warnings of a delay, and requested reports of success.

`report` makes their text; this module decides whether and where they go. They are stored in the same commit as the end
that they report, so that neither can be lost without the other.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final, Literal

from otel_smtp.forwarding.base import Relay
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.dsn.report import (
    HEADER_OCTETS,
    NoticeKind,
    Status,
    envelope,
    notification,
    returns_content,
    wanted,
)
from otel_smtp.spool.messages import (
    ContentLost,
    Kind,
    Lease,
    NewMessage,
    SpooledRecipient,
    new_id,
    reply_room,
    trace_id_of,
)
from otel_smtp.spool.store import Notice, Store

logger: Final = logging.getLogger("otel_smtp.spool.dsn.notices")

RETURNED_CONTENT_OCTETS: Final = 50_000  # Postfix's limit

_KINDS: Final = {
    NoticeKind.FAILED: Kind.BOUNCE,
    NoticeKind.DELAYED: Kind.DELAY_WARNING,
    NoticeKind.RELAYED: Kind.SUCCESS_REPORT,
}

BouncePolicy = Literal["mail", "log", "off"]


class Notices:
    """Makes the notices that senders want.

    Args:
        policy: `mail`: send them; `log`: only log them; `off`: neither.
        hostname: our own, as the reporting MTA.
        max_age_seconds: after which an undelivered notice expires.
        sender: the reverse-path for upstreams that refuse the null one, or "".
    """

    def __init__(
        self,
        store: Store,
        relay: Relay,
        *,
        policy: BouncePolicy,
        hostname: str,
        max_age_seconds: float = 5 * 86400.0,
        sender: str = "",
    ) -> None:
        self._store = store
        self._relay = relay
        self._policy = policy
        self._hostname = hostname
        self._max_age_seconds = max_age_seconds
        self.sender = sender

    async def of(
        self,
        kind: NoticeKind,
        lease: Lease,
        recipients: Sequence[tuple[SpooledRecipient, Reply | None]],
        *,
        remote: str | None = None,
        retry_until: float | None = None,
    ) -> Sequence[Notice]:
        """Make the notice of `kind` about some recipients: one, or none.

        Raises:
            StorageBroken: the original cannot be read.
        """
        asking = [(one, reply) for one, reply in recipients if self._is_wanted(kind, lease, one)]
        if not asking:
            return ()
        if self._policy != "mail":
            if self._policy == "log":
                logger.warning(
                    "notice due but not sent",
                    extra={"spool_id": lease.message_id, "notice": kind.value, "recipients": len(asking)},
                )
            return ()
        now = time.time()
        message_id = new_id()
        returns_all = returns_content(kind, lease.mail) and lease.content.octets <= RETURNED_CONTENT_OCTETS
        octets = lease.content.octets if returns_all else min(lease.header_octets, HEADER_OCTETS)
        try:
            original = await self._store.read(lease.content, 0, octets)
        except ContentLost:
            logger.critical("notice sent without the original, which is lost", extra={"spool_id": lease.message_id})
            original = b""
        room = reply_room(len(asking))
        content = notification(
            kind,
            mail=lease.mail,
            statuses=[
                Status(
                    one.recipient,
                    _shortened(reply, room),
                    remote=remote,
                    last_attempt=_date(now) if remote is not None else None,
                    will_retry_until=_date(retry_until) if retry_until is not None else None,
                    before=one.last_reply[:room] if reply is replies.EXPIRED else "",
                )
                for one, reply in asking
            ],
            header=original[: lease.header_octets],
            content=original if returns_all else None,
            reporting_mta=self._hostname,
            spool_id=lease.message_id,
            arrived=_date(lease.arrived_at),
            now=_date(now),
            message_id=f"<{message_id}@{self._hostname}>",
            trace_id=trace_id_of(lease.carrier),
            eight_bit=self._relay.keeps_8bit(),
        )
        mail, recipient = envelope(lease.mail, is_ascii=content.isascii())
        header_octets = content.find(b"\r\n\r\n") + 2
        notice = NewMessage(
            id=message_id,
            mail=mail,
            # By the route of the mail that it reports on, whatever that route's patterns: see `attempts`.
            deliveries={lease.destination: [recipient]},
            header_octets=header_octets,
            expires_in=self._max_age_seconds,
            carrier=lease.carrier,
            kind=_KINDS[kind],
        )
        return [(notice, content)]

    def bounces(self, lease: Lease, one: SpooledRecipient) -> bool:
        """Whether the sender gets a bounce if the recipient fails."""
        return self._policy == "mail" and self._is_wanted(NoticeKind.FAILED, lease, one)

    def _is_wanted(self, kind: NoticeKind, lease: Lease, one: SpooledRecipient) -> bool:
        # "MUST NOT" answer a notice with a notice: mail would loop (RFC 5321 6.1).
        return lease.kind is Kind.MAIL and wanted(kind, one.recipient, lease.mail)


def _shortened(reply: Reply | None, characters: int) -> Reply | None:
    if reply is None or len(text := " ".join(reply.lines)) <= characters:
        return reply
    return replace(reply, lines=(text[:characters],))


def _date(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
