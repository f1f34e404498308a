"""A mail through an `UpstreamForwarder`, as the server would hand it over."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from otel_smtp.forwarding.settings import Strategy, Timeouts, UpstreamSettings
from otel_smtp.forwarding.upstream import UpstreamForwarder
from otel_smtp.net import Sweep
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply
from tests.support.deliveries import MAIL, Awaited, LateDeliveries, RecordedTransaction
from tests.support.upstream import EXTENSIONS, Fault, Kind, ScriptedUpstream

HEADER = b"Received: from me by gw; now\r\nSubject: x\r\n"
BODY = b"\r\nhello\r\n.dot\r\n..\r\n"
CHUNKS = (HEADER, BODY)
BOB = Recipient("bob@example.net")
CAROL = Recipient("carol@example.net")
PATIENT = Timeouts(connect=30, greeting=30, command=30, data=30, block=30, reply=30, pool=30)  # however busy we are

both_strategies = pytest.mark.parametrize("strategy", list(Strategy))


def settings(upstream: ScriptedUpstream, name: str = "up", **more: object) -> UpstreamSettings:
    return UpstreamSettings(name, "127.0.0.1", upstream.port, **{"timeouts": PATIENT, **more})  # type: ignore[arg-type]


@asynccontextmanager
async def relaying(*upstreams: UpstreamSettings, **more: object) -> AsyncIterator[UpstreamForwarder]:
    more = {"observer": LateDeliveries(), "sweep": Sweep(), **more}
    forwarder = UpstreamForwarder(upstreams, hostname="gw.example", **more)  # type: ignore[arg-type]
    try:
        yield forwarder
    finally:
        await forwarder.close()


@dataclass
class Relayed:
    """How one mail went."""

    recipients: Sequence[Reply]
    reply: Reply | None  # None: no recipient was accepted, so no content was given
    seen: RecordedTransaction

    @property
    def told(self) -> Reply:
        """What the client was told in the end: of the message, else of its first recipient."""
        return self.reply if self.reply is not None else self.recipients[0]

    @property
    def codes(self) -> list[int]:
        return [reply.code for reply in self.recipients]


async def relay(
    forwarder: UpstreamForwarder,
    *recipients: Recipient,
    mail: Mail = MAIL,
    chunks: Sequence[bytes] = CHUNKS,
) -> Relayed:
    seen = RecordedTransaction(mail)
    recipients = recipients or (BOB,)
    transaction = Awaited.begin(forwarder, mail, seen)
    try:
        answers = await transaction.recipients(recipients)
        reply = None
        if any(answer.is_positive for answer in answers):
            reply = await transaction.content(chunks)
    finally:
        transaction.abort()
    assert transaction.transaction.spool_id is None
    assert all(delivery.ended_ns for delivery in seen.deliveries)
    return Relayed(answers, reply, seen)


def said_by(fault: Fault | None) -> Reply | None:
    """What an upstream with such a fault says; None: nothing that would be a reply."""
    match fault and fault.kind:
        case Kind.GOODBYE:
            return reply_of(b"421 4.3.2 scripted goodbye")
        case Kind.REFUSE:
            assert fault is not None
            return reply_of(fault.reply)
        case _:
            return None


def reply_of(line: bytes) -> Reply:
    """An upstream's reply of one line."""
    enhanced, text = EnhancedStatus.parse(line[4:].decode().rstrip())
    return Reply(int(line[:3]), enhanced, (text,), ErrorType.UPSTREAM_REFUSED if line[:1] > b"3" else None)


def without(*names: str) -> list[str]:
    return [keyword for keyword in EXTENSIONS if keyword.split()[0] not in names]
