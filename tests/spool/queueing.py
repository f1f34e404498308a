"""A spool before a scripted upstream, and a client's mail into it."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from otel_smtp.forwarding.settings import Strategy, UpstreamSettings
from otel_smtp.forwarding.upstream import UpstreamForwarder
from otel_smtp.net import Sweep
from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionRecord,
    DeliveryRecord,
    Endpoint,
    Observer,
    Outcome,
    TransactionRecord,
)
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.dsn.notices import BouncePolicy
from otel_smtp.spool.embedded import EmbeddedStore, control_path
from otel_smtp.spool.embedded.clocks import Uptime, uptime
from otel_smtp.spool.messages import MessageView
from otel_smtp.spool.schedule import Schedule
from otel_smtp.spool.service import Spool, SpoolSettings
from tests.spool.awaiting import AwaitedTransaction
from tests.spool.messages import CARRIER
from tests.spool.stores import SEGMENT_OCTETS
from tests.support.deliveries import MAIL
from tests.support.relaying import BOB, CHUNKS

AT_ONCE = Schedule((0.02,), jitter=0.5, warn_after_seconds=None)
NEVER_AGAIN = Schedule((3600.0,), warn_after_seconds=None)


class ResumedDeliveries(Observer):
    """Notes the attempts that the runner makes, as they end; gives transactions a trace.

    Attributes:
        attempts: those of the spool, by the record of each message's attempt, in the order of their ends.
        acted: what operators did, and what else befell messages without an attempt.
    """

    def __init__(self) -> None:
        self.acted: list[TransactionRecord] = []
        self.ended: list[DeliveryRecord] = []
        self._transactions: list[TransactionRecord] = []  # a delivery does not keep its own

    def delivery_ended(self, delivery: DeliveryRecord) -> None:
        self.ended.append(delivery)
        self._transactions.append(delivery.transaction)

    def spool_acted(self, transaction: TransactionRecord) -> None:
        self.acted.append(transaction)

    def carrier(self, transaction: TransactionRecord) -> Mapping[str, str]:
        return CARRIER

    @property
    def attempts(self) -> list[TransactionRecord]:
        return list(dict.fromkeys(one.transaction for one in self.ended if one.transaction.connection is None))

    @property
    def outcomes(self) -> list[Outcome | None]:
        return [attempt.deliveries[-1].outcome for attempt in self.attempts]


def client_record(mail: Mail) -> TransactionRecord:
    """The record of a client's transaction, as the session makes it."""
    local = Endpoint("127.0.0.1", 25)
    connection = ConnectionRecord(ConnectionInfo("0" * 32, local, local, "test"), 1, 0)
    return TransactionRecord(mail, 1, connection, 1, 0)


@dataclass
class Queueing:
    """A running spool."""

    spool: Spool
    relay: UpstreamForwarder
    observer: ResumedDeliveries
    spooled: list[str] = field(default_factory=list)

    async def take(
        self, *recipients: Recipient, mail: Mail = MAIL, chunks: Sequence[bytes] = CHUNKS
    ) -> tuple[Sequence[Reply], Reply | None]:
        """Hand a mail over, as the server would: the replies to its recipients, and to it."""
        recipients = recipients or (BOB,)
        record = client_record(mail)
        reply = None
        with AwaitedTransaction(transaction := self.spool.forwarder.begin(mail, record)) as awaited:
            answers = await awaited.recipients(recipients)
            if any(answer.is_positive for answer in answers):
                reply, _ = await awaited.content(in_chunks(chunks))
        record.end(Outcome.QUEUED, reply, 2)
        assert transaction.spool_id == record.spool_id
        if record.spool_id is not None:
            self.spooled.append(record.spool_id)
        return answers, reply

    async def shown(self) -> Sequence[MessageView]:
        """The first messages that are queued."""
        return await self.spool.store.page("", 10)

    async def tally(self) -> dict[str, int]:
        """Recipients by their end."""
        return dict(await self.spool.store.tally())

    async def is_empty(self) -> bool:
        """Whether everything has ended."""
        return not await self.shown()

    async def empties(self) -> None:
        """Wait until everything has ended."""
        await eventually(self.is_empty)


async def eventually(found: Callable[[], object], *, timeout_seconds: float = 60.0) -> None:
    """Wait until `found()`, which may be a coroutine function, is true."""
    async with asyncio.timeout(timeout_seconds):
        while True:
            result = found()
            if asyncio.iscoroutine(result):
                result = await result
            if result:
                return
            await asyncio.sleep(0.005)


@asynccontextmanager
async def queueing(
    directory: Path,
    *upstreams: UpstreamSettings,
    schedule: Schedule = AT_ONCE,
    bounce: BouncePolicy = "mail",
    direct: Strategy | None = None,
    clock: Callable[[], float] = time.time,
    up: Callable[[], Uptime] = uptime,
) -> AsyncIterator[Queueing]:
    """A spool that runs, in front of `upstreams`; `direct`: these are asked first."""
    observer = ResumedDeliveries()
    relay = UpstreamForwarder(
        upstreams, hostname="gw.example", strategy=direct or Strategy.TRANSPARENT, observer=observer, sweep=Sweep()
    )
    settings = SpoolSettings(control_path(directory / "spool"), schedule, bounce, "gw.example")
    store = EmbeddedStore(directory / "spool", least_free_octets=0, segment_octets=SEGMENT_OCTETS, clock=clock, up=up)
    spool = Spool(settings, store, relay.for_spool(), relay if direct is not None else None, observer)
    await spool.start()
    try:
        yield Queueing(spool, relay, observer)
    finally:
        await spool.stop(grace_seconds=1)
        await relay.close()


async def in_chunks(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    """Content as the session hands it over."""
    for chunk in chunks:
        yield chunk


def some_bytes(octets: int) -> bytes:
    """Reproducible content."""
    return random.Random(octets).randbytes(octets).replace(b"\n", b"n").replace(b"\r", b"r").replace(b"\0", b"0")
