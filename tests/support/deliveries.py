"""What an observer is told of deliveries, kept in order."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from otel_smtp.observing import DeliveryObserver, DeliveryPhase, Endpoint, Outcome, TlsInfo, TransactionObserver
from otel_smtp.smtp.replies import ErrorType, Reply


@dataclass
class RecordedDelivery(DeliveryObserver):
    """One attempt."""

    upstream: str
    server: Endpoint
    attempt: int
    headers: Mapping[str, str]
    phases: list[tuple[DeliveryPhase, int | None]] = field(default_factory=list)
    reused: list[bool] = field(default_factory=list)
    peers: list[tuple[Endpoint, TlsInfo | None]] = field(default_factory=list)
    outcome: Outcome | None = None
    reply: Reply | None = None
    round_trips: int = -1
    error_type: ErrorType | None = None
    ends: int = 0

    def phase(self, phase: DeliveryPhase, reply: Reply | None = None) -> None:
        assert not self.ends
        self.phases.append((phase, reply.code if reply is not None else None))

    def pooled(self, *, wait_seconds: float, reused: bool) -> None:
        assert wait_seconds >= 0
        self.reused.append(reused)

    def connected(self, peer: Endpoint, tls: TlsInfo | None) -> None:
        self.peers.append((peer, tls))

    def carrier(self) -> Mapping[str, str]:
        return self.headers

    def ended(
        self, outcome: Outcome, reply: Reply | None, *, round_trips: int, error_type: ErrorType | None = None
    ) -> None:
        self.ends += 1
        self.outcome, self.reply, self.round_trips, self.error_type = outcome, reply, round_trips, error_type


class RecordedTransaction(TransactionObserver):
    """The attempts of one transaction."""

    def __init__(self) -> None:
        self.deliveries: list[RecordedDelivery] = []

    def delivery_begun(self, upstream: str, server: Endpoint, *, attempt: int = 1) -> RecordedDelivery:
        headers = {"traceparent": f"00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333{attempt}-01"}
        delivery = RecordedDelivery(upstream, server, attempt, headers)
        self.deliveries.append(delivery)
        return delivery

    @property
    def outcomes(self) -> list[tuple[str, Outcome | None]]:
        return [(delivery.upstream, delivery.outcome) for delivery in self.deliveries]


async def in_chunks(chunks: Sequence[bytes]) -> AsyncIterator[bytes]:
    """Content as the server hands it over."""
    for chunk in chunks:
        yield chunk
