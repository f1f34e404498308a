"""The records of a relayed mail, and a transaction whose callbacks a test awaits."""

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from otel_smtp.forwarding.base import Forwarder
from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionRecord,
    DeliveryPhase,
    DeliveryRecord,
    Endpoint,
    Observer,
    Outcome,
    TransactionRecord,
)
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.replies import Reply

MAIL = Mail("a@example.com")


def connection_record(protocol: str = "smtp") -> ConnectionRecord:
    """That of some client."""
    now_ns = time.monotonic_ns()
    info = ConnectionInfo("0" * 32, Endpoint("192.0.2.7", 40000), Endpoint("192.0.2.1", 25), "local", protocol=protocol)
    return ConnectionRecord(info, now_ns, time.time_ns() - now_ns)


class RecordedTransaction(TransactionRecord):
    """The record of a transaction of some client, with what tests ask of it."""

    def __init__(self, mail: Mail = MAIL, *, protocol: str = "smtp") -> None:
        connection = connection_record(protocol)
        super().__init__(mail, 1, connection, connection.opened_ns, connection.wall_offset_ns)

    @property
    def outcomes(self) -> list[tuple[str, Outcome | None]]:
        """Of each attempt."""
        return [(delivery.upstream, delivery.outcome) for delivery in self.deliveries]

    def end_early(self) -> None:
        """The client is gone: what a session notes then."""
        self.end(Outcome.ABORTED, None, time.monotonic_ns())


def phases_of(delivery: DeliveryRecord) -> list[DeliveryPhase]:
    """Its steps, in order."""
    return [phase for _, phase, _ in delivery.phases]


class LateDeliveries(Observer):
    """Keeps the deliveries that ended after their transaction, and gives each attempt its own trace headers."""

    def __init__(self) -> None:
        self.late: list[DeliveryRecord] = []

    def delivery_ended(self, delivery: DeliveryRecord) -> None:
        self.late.append(delivery)

    def delivery_carrier(self, delivery: DeliveryRecord) -> Mapping[str, str]:
        return {"traceparent": f"00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333{delivery.attempt}-01"}


class Awaited:
    """A `MailTransaction` as coroutines. Each callback may come once, and never after `abort`."""

    def __init__(self, transaction: Any) -> None:
        self.transaction = transaction
        self.verdicts: Sequence[Reply] = ()
        self._is_over = False

    @classmethod
    def begin(cls, forwarder: Forwarder, mail: Mail, record: TransactionRecord) -> Self:
        """See `Forwarder.begin`."""
        return cls(forwarder.begin(mail, record))

    async def recipients(self, batch: Sequence[Recipient]) -> Sequence[Reply]:
        """The answers to a group."""
        future: asyncio.Future[Sequence[Reply]] = asyncio.get_running_loop().create_future()
        self.transaction.recipients(batch, lambda answers: self._answer(future, answers))
        answers = await future
        assert len(answers) == len(batch)
        return answers

    async def content(self, chunks: Iterable[bytes]) -> Reply:
        """Give the content, as slowly as it is taken, and wait for the final reply. A header block and one more chunk
        are given as a session gives a message that came whole."""
        future: asyncio.Future[tuple[Reply, Sequence[Reply]]] = asyncio.get_running_loop().create_future()
        if isinstance(chunks, Sequence) and len(chunks) == 2:
            self.transaction.message(*chunks, lambda reply, verdicts: self._answer(future, (reply, verdicts)))
        else:
            resumed = asyncio.Event()
            self.transaction.content(resumed.set)
            for chunk in chunks:
                if not self.transaction.write(chunk):
                    await resumed.wait()
                    resumed.clear()
            self.transaction.finish(lambda reply, verdicts: self._answer(future, (reply, verdicts)))
        reply, self.verdicts = await future
        return reply

    def abort(self) -> None:
        """See `MailTransaction.abort`."""
        self._is_over = True
        self.transaction.abort()

    def _answer(self, future: "asyncio.Future[Any]", value: object) -> None:
        assert not self._is_over, "a callback after abort"
        if not future.cancelled():
            future.set_result(value)  # a second call raises
