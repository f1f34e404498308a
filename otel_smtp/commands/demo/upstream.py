"""An upstream that keeps mail in memory and refuses the recipients that it is given.

It is the gateway's own server with another `Forwarder` behind it: real sockets, the whole protocol, and mail that ends
up in a list.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network
from typing import Final

from otel_smtp.forwarding.base import MOST, MailTransaction, MessageAnswered, RecipientsAnswered
from otel_smtp.observing import Endpoint, Observer, TransactionRecord
from otel_smtp.server.listener import ListenerSpec, Server
from otel_smtp.server.policy import ListenerPolicy, ServerTimeouts
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.policy import ServerPolicy
from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply

NO_SUCH_USER: Final = Reply(550, EnhancedStatus(5, 1, 1), ("No such user here",), ErrorType.ADDRESS)
REFUSED_ADDRESS: Final = "refused@example.com"

_CAPABILITIES: Final = replace(MOST, require_tls=False)
_LOOPBACK: Final = (IPv4Network("127.0.0.0/8"),)
# Bounds of a demonstration.
_MOST_KEPT: Final = 100
_MOST_KEPT_OCTETS: Final = 64 * 1024 * 1024
_MOST_CONNECTIONS: Final = 64


@dataclass(frozen=True, slots=True)
class KeptMail:
    """A mail as it arrived."""

    mail: Mail
    recipients: tuple[Recipient, ...]
    content: bytes


class KeepingForwarder:
    """Keeps the newest mails in memory, at most `_MOST_KEPT`.

    Args:
        refused: addresses that get 550 5.1.1.
        answer_after_seconds: delay of the final reply to each message.
    """

    def __init__(self, *, refused: Collection[str] = (REFUSED_ADDRESS,), answer_after_seconds: float = 0.0) -> None:
        self.refused = frozenset(address.lower() for address in refused)
        self.answer_after_seconds = answer_after_seconds
        self.kept: deque[KeptMail] = deque()
        self._kept_octets = 0

    def capabilities(self) -> Extensions:
        """All extensions that need no further server."""
        return _CAPABILITIES

    def begin(self, mail: Mail, record: TransactionRecord) -> "_KeepingTransaction":
        """Accept any sender."""
        return _KeepingTransaction(self, mail)

    def keep(self, mail: KeptMail) -> Reply:
        """Keep a mail, and drop the oldest ones if there is no room."""
        self.kept.append(mail)
        self._kept_octets += len(mail.content)
        while len(self.kept) > 1 and (len(self.kept) > _MOST_KEPT or self._kept_octets > _MOST_KEPT_OCTETS):
            self._kept_octets -= len(self.kept.popleft().content)
        return replies.OK


class _KeepingTransaction(MailTransaction):
    spool_id = None  # memory is not durable

    def __init__(self, forwarder: KeepingForwarder, mail: Mail) -> None:
        self._forwarder = forwarder
        self._mail = mail
        self._recipients: list[Recipient] = []
        self._content: list[bytes] = []

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        answered([self._recipient(recipient) for recipient in batch])

    def _recipient(self, recipient: Recipient) -> Reply:
        if recipient.address.lower() in self._forwarder.refused:
            return NO_SUCH_USER
        self._recipients.append(recipient)
        return replies.RECIPIENT_OK

    def content(self, resume: Callable[[], None]) -> None:
        self._content.clear()

    def write(self, chunk: bytes) -> bool:
        self._content.append(chunk)
        return True

    def finish(self, answered: MessageAnswered) -> None:
        asyncio.get_running_loop().call_later(self._forwarder.answer_after_seconds, self._answer, answered)

    def _answer(self, answered: MessageAnswered) -> None:
        mail = KeptMail(self._mail, tuple(self._recipients), b"".join(self._content))
        answered(self._forwarder.keep(mail), ())

    def abort(self) -> None:
        self._recipients.clear()
        self._content.clear()


class KeepingUpstream:
    """A `KeepingForwarder` on a port of the loopback interface that the kernel chooses."""

    def __init__(self, forwarder: KeepingForwarder) -> None:
        policy = ListenerPolicy(
            "keeper", ServerPolicy("keeper.example"), ServerTimeouts(), allow=_LOOPBACK, trace_in_reply=False
        )
        self._server = Server(
            [ListenerSpec(policy, (Endpoint("127.0.0.1", 0),))],
            forwarder,
            Observer(),
            connections=_MOST_CONNECTIONS,
            connections_per_client=_MOST_CONNECTIONS,
        )

    async def start(self) -> Endpoint:
        """Listen.

        Returns:
            Its address.

        Raises:
            OSError: no port is available.
        """
        return (await self._server.start())["keeper"][0]

    async def stop(self) -> None:
        """Close everything at once."""
        await self._server.drain(0.0)
