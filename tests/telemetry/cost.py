"""What telemetry costs per mail: Python and C calls, time, octets of OTLP.

    python -m tests.telemetry.cost [--batches 40]

Records are made beforehand, as the session and the forwarder make them of 1 KB mails over kept connections, one command
per turn, relayed over an upstream with PIPELINING and CHUNKING. Then the observers are asked and told what the session
asks and tells: the trace id twice, the trace headers of the relayed message, the end of the transaction, the ends of
segments. `test_cost.py` holds the counts against their budget.
"""

import argparse
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, DEFAULT_ON

from otel_smtp.observing import (
    ConnectionInfo,
    ConnectionRecord,
    DeliveryPhase,
    DeliveryRecord,
    Endpoint,
    Observer,
    Outcome,
    TraceHeaders,
    TransactionRecord,
    fan_out,
)
from otel_smtp.observing.fan_out import Soon
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.states import ConnState, ContentBegun, StateMachine, TlsMode, TlsOffer, TransactionOver
from otel_smtp.status.live import LiveView
from otel_smtp.status.traces import RecentTraces
from otel_smtp.telemetry.access_log import AccessLog
from otel_smtp.telemetry.collector import BatchOutcome, CollectorAnswer, Signal
from otel_smtp.telemetry.exporting import BatchSettings, Export, TraceExport
from otel_smtp.telemetry.log_export import LogExportHandler
from otel_smtp.telemetry.logs import ACCESS, JsonLines
from otel_smtp.telemetry.metrics import Metrics
from otel_smtp.telemetry.otlp import LogEncoder, RequestFrame
from otel_smtp.telemetry.propagation import InboundPolicy
from otel_smtp.telemetry.shapes import EncodedSpan
from otel_smtp.telemetry.tracing import Tracing
from otel_smtp.telemetry.turns import AtEndOfTurn

CONNECTIONS = 10
TRANSITIONS = 4  # per mail
SEGMENT_EVENTS = 500
MAILS = 1250  # a batch in which each connection ends one segment
_NO_HEADERS = TraceHeaders()


class Step(NamedTuple):
    """One mail that is over, or a segment (`transaction` is None)."""

    connection: ConnectionRecord
    transaction: TransactionRecord | None


class Traffic:
    """Records of mails, in the order in which they end."""

    def __init__(self) -> None:
        self.connections: list[ConnectionRecord] = []
        self._machines: list[StateMachine] = []
        for number in range(CONNECTIONS):
            info = ConnectionInfo(f"{number:032x}", Endpoint("127.0.0.1", 40000 + number), Endpoint("::1", 25), "local")
            now_ns = time.monotonic_ns()
            record = ConnectionRecord(info, now_ns, time.time_ns() - now_ns)
            machine = StateMachine(record.transitions)
            machine.now_ns = now_ns
            machine.enter(ConnState.NEW, TlsOffer(TlsMode.OFF))
            machine.enter(ConnState.ACTIVE)
            self.connections.append(record)
            self._machines.append(machine)
        self._mails = 0

    def mails(self, count: int) -> list[Step]:
        """`count` mails, spread over the connections."""
        steps: list[Step] = []
        for _ in range(count):
            connection = self.connections[self._mails % CONNECTIONS]
            machine = self._machines[self._mails % CONNECTIONS]
            if len(connection.transitions) >= SEGMENT_EVENTS:
                steps.append(Step(connection, None))
                # The lists are the finished segment's: what comes next goes into new ones.
                connection = _continued(connection)
                machine.recorded = connection.transitions
                self.connections[self._mails % CONNECTIONS] = connection
            steps.append(Step(connection, self._mail(connection, machine)))
            self._mails += 1
        return steps

    def _mail(self, connection: ConnectionRecord, machine: StateMachine) -> TransactionRecord:
        machine.now_ns = now = time.monotonic_ns()
        machine.enter(ConnState.ACTIVE)
        number = connection.messages + 1
        record = TransactionRecord(Mail("news@example.com"), number, connection, now, connection.wall_offset_ns)
        connection.replies.append(("MAIL", replies.SENDER_OK))
        delivery = DeliveryRecord(record, "provider", Endpoint("127.0.0.1", 2526), 1, now + 1000)
        record.deliveries.append(delivery)
        delivery.pool_wait_ns, delivery.is_reused = 2000 + self._mails, True
        delivery.peer = Endpoint("127.0.0.1", 2526)
        delivery.phases.append((now + 3000, DeliveryPhase.POOL, None))
        delivery.phases.append((now + 4000, DeliveryPhase.MAIL, replies.SENDER_OK))
        delivery.recipient_phase(now + 5000, replies.RECIPIENT_OK)
        delivery.accepted_count = 1
        record.accepted.append(Recipient("bob@example.net"))
        connection.replies.append(("RCPT", replies.RECIPIENT_OK))
        machine.now_ns = now + 6000
        machine.enter(ConnState.DATA, ContentBegun(number, 1))
        connection.replies.append(("DATA", replies.SEND_CONTENT))
        record.trace_headers = _NO_HEADERS
        record.octets = 1000 + self._mails % 100
        delivery.phases.append((now + 7000, DeliveryPhase.CONTENT, None))
        reply = replies.Reply(250, replies.OK.enhanced, (f"Ok: queued as {self._mails:010X}",))
        delivery.phases.append((now + 8000, DeliveryPhase.REPLY, reply))
        delivery.round_trips = 2
        delivery.end(Outcome.RELAYED, reply, None, now + 9000)
        machine.now_ns = now + 10_000
        machine.enter(ConnState.ACTIVE)
        connection.replies.append(("DATA", replies.OK))
        connection.messages += 1
        machine.enter(ConnState.IDLE, TransactionOver(number))
        record.end(Outcome.RELAYED, replies.OK, now + 10_000)
        return record


def _continued(connection: ConnectionRecord) -> ConnectionRecord:
    """The connection in its next segment, as another record: the present one is told later."""
    record = ConnectionRecord(connection.info, connection.opened_ns, connection.wall_offset_ns)
    record.messages, record.segment = connection.messages, connection.segment
    record.earlier, record.transitions = connection.earlier, connection.transitions
    record.begin_segment(time.monotonic_ns())
    return record


class Taking:
    """A collector that takes everything at once."""

    def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
        return CollectorAnswer(BatchOutcome.TAKEN)

    def close(self) -> None:
        pass


class House:
    """Everything that observes mail in a gateway with everything on.

    Args:
        log: write the access log, to a stream that keeps nothing, and export it.
        samples: make spans; False: the sampler drops every trace.
        soon: see `fan_out`; None: as a gateway has it.

    Attributes:
        octets, spans: of what was encoded.
    """

    def __init__(
        self,
        *,
        traces: bool = True,
        exports: bool = True,
        metrics: bool = True,
        page: bool = True,
        log: bool = False,
        samples: bool = True,
        soon: Soon | None = None,
    ) -> None:
        self.octets = 0
        self.spans = 0
        # Larger than what a batch of mails needs: the thread stays out of the measurement.
        settings = BatchSettings(queue_spans=1_000_000, batch_spans=1_000_000, delay_seconds=3600)
        self._export = TraceExport(RequestFrame(Resource({}), "1"), Taking, settings)
        takes = [self._export.put_all] if exports else []
        self._recent = RecentTraces()
        memories = [self._recent.add] if page else []  # as `gateway.status_port` does
        observers: list[Observer] = []
        self._log = _Log(settings) if log else None
        if traces:
            policies = {"local": InboundPolicy.AUTO}
            lines = [] if self._log is None else [self._log.access_log]
            sampler = DEFAULT_ON if samples else ALWAYS_OFF
            observers.append(Tracing(exports=takes, memories=memories, policies=policies, lines=lines, sampler=sampler))
        if metrics:
            observers.append(Metrics())
        if page:
            observers.append(LiveView(shown_host=str, shown_name=str))
        self.observer = fan_out(observers, soon or AtEndOfTurn())
        self.counting = Tracing(exports=[self._count])

    def _count(self, spans: Sequence[EncodedSpan], items: int) -> None:
        self.octets += sum(map(len, spans))
        self.spans += items

    def run(self, steps: Sequence[Step]) -> None:
        """Ask and tell what a session and a forwarder ask and tell."""
        observer = self.observer
        for connection, transaction in steps:
            if transaction is None:
                observer.segment_ended(connection)
            else:
                observer.trace_id(transaction)
                observer.delivery_carrier(transaction.deliveries[0])
                observer.trace_id(transaction)
                observer.transaction_ended(transaction)
        observer.catch_up()

    def send(self) -> None:
        """Take the queued spans off, as the thread would between two batches."""
        self._export._queue.clear()
        self._export._octets_out = self._export._octets_in
        self._export._items_out = self._export._items_in

    def close(self) -> None:
        """End the threads."""
        self._export.shutdown(1)
        if self._log is not None:
            self._log.close()


class _Log:
    """The access log as it is installed: JSON lines by a descriptor, and OTLP."""

    def __init__(self, settings: BatchSettings) -> None:
        encoder = LogEncoder(Resource({}), "1")
        self._export = Export(Signal.LOGS, "log_records", encoder.record, encoder.request, Taking, settings)
        self._stream = Path(os.devnull).open("w")  # noqa: SIM115 - closed by `close`
        self._lines = JsonLines(self._stream)
        logger = logging.Logger(ACCESS)
        logger.addHandler(self._lines)
        logger.addHandler(LogExportHandler(self._export))
        self.access_log = AccessLog(logger)

    def close(self) -> None:
        self._lines.close()
        self._stream.close()
        self._export.shutdown(1)


class Calls(NamedTuple):
    """Calls per mail."""

    python: float
    c: float


def count_calls(house: House, mails: int = MAILS) -> Calls:
    """What a mail calls; the callers are left out, as they belong to the session."""
    traffic = Traffic()
    for connection in traffic.connections:
        house.observer.connection_opened(connection)
    house.run(_identified(house, traffic, traffic.mails(2 * mails)))  # so that all templates exist
    steps = _identified(house, traffic, traffic.mails(mails))
    python = c = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal python, c
        if event == "call":
            python += 1
        elif event == "c_call":
            c += 1

    sys.setprofile(profile)
    house.run(steps)
    sys.setprofile(None)
    return Calls((python - 1) / mails, c / mails)


def _identified(house: House, traffic: Traffic, steps: list[Step]) -> list[Step]:
    """Give records that continue another's connection the identity of their segment, which no session needs to do."""
    for connection, _ in steps:
        house.observer.connection_carrier(connection)
    return steps


def time_mail(house: House, batches: int) -> float:
    """Seconds of CPU per mail, its share of its connection's segment included: the quickest of `batches`.

    A batch is small, so that its records are as fresh as they are to a session.
    """
    traffic = Traffic()
    for connection in traffic.connections:
        house.observer.connection_opened(connection)
    mail = segment = float("inf")
    gc.collect()
    gc.disable()
    for _ in range(batches):
        steps = _identified(house, traffic, traffic.mails(20 * CONNECTIONS))
        ended = [step for step in steps if step.transaction is None]
        mails = [step for step in steps if step.transaction is not None]
        mail = min(mail, _time(house, mails) / len(mails))
        for step in ended:
            segment = min(segment, _time(house, [step]) / len(step.connection.transitions))
    gc.enable()
    return mail + segment * TRANSITIONS


def _time(house: House, steps: Sequence[Step]) -> float:
    began = time.thread_time()
    house.run(steps)
    took = time.thread_time() - began
    house.send()
    return took


def count_octets(mails: int = MAILS) -> float:
    """Octets of OTLP per mail, all three spans, without the resource."""
    octets = 0

    def take(spans: Sequence[EncodedSpan], items: int) -> None:
        nonlocal octets
        octets += sum(map(len, spans))

    house = House(traces=False, metrics=False, page=False)
    house.observer = fan_out([Tracing(exports=[take])])
    traffic = Traffic()
    steps = _identified(house, traffic, traffic.mails(mails))
    house.run(steps)
    for connection in traffic.connections:
        house.observer.segment_ended(connection)
    house.close()
    return octets / mails


def in_batches(work: Callable[[], None]) -> None:
    """Lets transactions wait until they are many: as under load, where no event loop runs."""


HOUSES: dict[str, Callable[[], House]] = {
    "nobody observes": lambda: House(soon=in_batches, traces=False, metrics=False, page=False),
    "metrics": lambda: House(soon=in_batches, traces=False, page=False),
    "sampled to nothing": lambda: House(soon=in_batches, samples=False, page=False),
    "metrics, traces not encoded": lambda: House(soon=in_batches, exports=False, page=False),
    "metrics, traces encoded and queued": lambda: House(soon=in_batches, page=False),
    "everything, page too": lambda: House(soon=in_batches),
    "the access log too": lambda: House(soon=in_batches, log=True),
}


def main() -> None:
    """Measure, and tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.telemetry.cost")
    parser.add_argument("--batches", type=int, default=40)
    arguments = parser.parse_args()
    for name, make in HOUSES.items():
        house = make()
        calls = count_calls(house)
        micros = time_mail(house, arguments.batches) * 1e6
        house.close()
        print(f"{name:<36} {micros:6.1f} us {calls.python:6.1f} Python calls {calls.c:6.1f} C calls")
    print(f"OTLP: {count_octets():.0f} octets per mail")


if __name__ == "__main__":
    main()
