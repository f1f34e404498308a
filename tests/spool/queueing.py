"""A spool before a scripted upstream, and a client's mail into it."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from otel_smtp.forwarding.base import DeliveryFailed
from otel_smtp.forwarding.settings import Strategy, UpstreamSettings
from otel_smtp.forwarding.upstream import UpstreamForwarder
from otel_smtp.observing import Observer, TransactionObserver
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.index import Index
from otel_smtp.spool.notices import BouncePolicy
from otel_smtp.spool.schedule import Schedule
from otel_smtp.spool.service import Spool, SpoolSettings
from tests.support.deliveries import RecordedTransaction, in_chunks
from tests.support.relaying import BOB, CHUNKS, MAIL

T = TypeVar("T")

AT_ONCE = Schedule((0.02,), jitter=0.5, warn_after_seconds=None)
NEVER_AGAIN = Schedule((3600.0,), warn_after_seconds=None)


class ResumedDeliveries(Observer):
    """Notes the attempts that the runner makes."""

    def __init__(self) -> None:
        self.possible_duplicates = 0
        self.resumed: list[tuple[str, dict[str, str], RecordedTransaction]] = []

    def delivery_resumed(
        self, spool_id: str, carrier: object, mail: Mail, *, is_possible_duplicate: bool = False
    ) -> TransactionObserver:
        self.possible_duplicates += is_possible_duplicate
        seen = RecordedTransaction()
        self.resumed.append((spool_id, dict(carrier), seen))  # type: ignore[call-overload]
        return seen


class CarriedTransaction(RecordedTransaction):
    """A transaction that is part of a trace."""

    def carrier(self) -> dict[str, str]:
        return {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


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
        transaction = await self.spool.forwarder.begin(mail, CarriedTransaction())
        answers: Sequence[Reply]
        try:
            answers = await transaction.recipients(recipients)
        except DeliveryFailed as failed:
            answers = [failed.reply] * len(recipients)
        reply = None
        if any(answer.is_positive for answer in answers):
            reply = await transaction.content(in_chunks(chunks))
        await transaction.abort()
        if transaction.spool_id is not None:
            self.spooled.append(transaction.spool_id)
        return answers, reply

    async def index(self, work: Callable[[Index], T]) -> T:
        """Ask the index."""
        return await self.spool.store.apply(work)

    async def tally(self) -> dict[str, int]:
        """Recipients by their end."""
        return dict(await self.index(lambda index: index.tally()))

    async def is_empty(self) -> bool:
        """Whether everything has ended."""
        return not await self.index(lambda index: index.page("", 1))

    async def empties(self) -> None:
        """Wait until everything has ended."""
        await eventually(self.is_empty)


async def eventually(found: Callable[[], object], *, timeout_seconds: float = 10.0) -> None:
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
) -> AsyncIterator[Queueing]:
    """A spool that runs, in front of `upstreams`; `direct`: these are asked first."""
    relay = UpstreamForwarder(upstreams, hostname="gw.example", strategy=direct or Strategy.TRANSPARENT)
    observer = ResumedDeliveries()
    settings = SpoolSettings(directory / "spool", schedule, bounce, "gw.example", least_free_octets=0)
    spool = Spool(settings, relay.for_spool(), relay if direct is not None else None, observer, clock=clock)
    await spool.start()
    try:
        yield Queueing(spool, relay, observer)
    finally:
        await spool.stop(grace_seconds=1)
        await relay.close()


def some_bytes(octets: int) -> bytes:
    """Reproducible content."""
    return random.Random(octets).randbytes(octets).replace(b"\n", b"n").replace(b"\r", b"r").replace(b"\0", b"0")
