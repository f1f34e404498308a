"""The way of spans to a collector that is down, slow, hostile, or comes back: real sockets, on loopback."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanKind

from otel_smtp.telemetry.collector import (
    BatchOutcome,
    Collector,
    CollectorAnswer,
    CollectorSettings,
    Compression,
    Protocol,
    connect,
)
from otel_smtp.telemetry.exporting import MAX_BATCH_OCTETS, BatchSettings, TraceExport
from otel_smtp.telemetry.otlp import RequestFrame
from otel_smtp.telemetry.propagation import TraceContext
from otel_smtp.telemetry.records import SpanRecord
from otel_smtp.telemetry.shapes import EncodedPair, EncodedSpan
from tests.support.otlp_receiver import Fault, FaultKind, OtlpReceiver
from tests.support.ports import unclaimed_port
from tests.support.spans import encoded

LOGGER = "otel_smtp.telemetry.exporting"
# Short where a test waits for it; no test asserts how short.
QUICK = BatchSettings(delay_seconds=0.01, first_backoff_seconds=0.01, request_seconds=5.0, export_seconds=10.0)
WAIT_SECONDS = 10.0


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, LOGGER)
    return caplog


MADE: list[TraceExport] = []


@pytest.fixture(autouse=True)
def _ended(log: pytest.LogCaptureFixture) -> Iterator[None]:
    """No thread outlives its test. Set up first, so the receiver has let go of all requests by then."""
    yield
    for export in MADE:
        export.shutdown(0)
    MADE.clear()
    for thread in threading.enumerate():
        if thread.name == "otlp-traces":
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive()


def span(number: int = 1, **attributes: Any) -> EncodedSpan:
    context = TraceContext(0xABC, number, 1)
    return encoded(SpanRecord("smtp.test", SpanKind.SERVER, context, None, 1, 2, attributes, (), (), False, True))


def pair(*numbers: int) -> EncodedPair:
    return EncodedPair(b"".join(map(span, numbers)))


def export_to(collector: CollectorSettings | Callable[[], Collector], settings: BatchSettings = QUICK) -> TraceExport:
    make = (lambda: connect(collector)) if isinstance(collector, CollectorSettings) else collector
    frame = RequestFrame(Resource({"service.name": "gw"}), "1")
    MADE.append(TraceExport(frame, make, settings, address="collector:4318"))
    return MADE[-1]


def http(receiver: OtlpReceiver, path: str = "/v1/traces", **more: Any) -> CollectorSettings:
    return CollectorSettings(receiver.http_endpoint + path, **more)


def grpc(receiver: OtlpReceiver, **more: Any) -> CollectorSettings:
    return CollectorSettings(receiver.grpc_endpoint, protocol=Protocol.GRPC, **more)


def lost(export: TraceExport) -> dict[str, int]:
    return {reason: count for _, reason, count in export.dropped() if count}


def until(condition: Callable[[], object]) -> None:
    """Wait for what a thread does and nobody signals."""
    ends = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < ends
        threading.Event().wait(0.001)


class Held:
    """A collector that answers when the test says what; `arrived` is released once for each request."""

    def __init__(self) -> None:
        self.requests: list[Sequence[bytes]] = []
        self.arrived = threading.Semaphore(0)
        self.answers: list[CollectorAnswer] = []
        self.answered = threading.Semaphore(0)
        self.is_closed = False

    def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
        self.requests.append(request)
        self.arrived.release()
        if not self.answered.acquire(timeout=timeout_seconds):
            return CollectorAnswer(BatchOutcome.AGAIN, "timeout")
        return self.answers.pop(0)

    def close(self) -> None:
        self.is_closed = True

    def wait(self) -> None:
        assert self.arrived.acquire(timeout=WAIT_SECONDS)

    def answer(self, *answers: CollectorAnswer) -> None:
        for one in answers:
            self.answers.append(one)
            self.answered.release()


TAKEN = CollectorAnswer(BatchOutcome.TAKEN)


# Batches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [http, grpc])
@pytest.mark.parametrize("compression", Compression)
def test_what_is_queued_arrives_compressed_or_not(
    receiver: OtlpReceiver, make: Callable[..., CollectorSettings], compression: Compression
) -> None:
    settings = make(receiver, compression=compression, headers=(("x-tenant", "7"),))
    export = export_to(settings)
    for number in range(1, 6):
        export.take(span(number, value="x" * 200))
    received = receiver.wait_for_spans(5)
    assert [int(one.span_id, 16) for one in received] == [1, 2, 3, 4, 5]
    assert receiver.headers[0]["x-tenant"] == "7"
    assert receiver.headers[0]["user-agent"].startswith("otel-smtp")
    assert export.shutdown(WAIT_SECONDS)
    assert lost(export) == {}


def test_a_full_batch_goes_before_its_time_and_what_is_over_waits() -> None:
    collector = Held()
    export = export_to(lambda: collector, replace(QUICK, delay_seconds=3600, batch_spans=3))
    for number in range(1, 6):
        export.take(span(number))
    collector.wait()
    assert export.queued == 2
    collector.answer(TAKEN, TAKEN)
    assert export.shutdown(WAIT_SECONDS)
    assert len(collector.requests) == 2
    assert collector.is_closed


def test_a_batch_is_bounded_in_octets_and_nothing_is_lost(receiver: OtlpReceiver) -> None:
    export = export_to(http(receiver), replace(QUICK, delay_seconds=3600))
    for number in range(1, 8):
        export.take(span(number, value="x" * 1_000_000))
    assert len(receiver.wait_for_spans(6)) >= 6
    assert export.shutdown(WAIT_SECONDS)
    assert [int(one.span_id, 16) for one in receiver.wait_for_spans(7)] == [1, 2, 3, 4, 5, 6, 7]
    assert max(map(len, receiver.bodies)) < MAX_BATCH_OCTETS + 1000
    assert lost(export) == {}


def test_a_span_larger_than_any_batch_is_lost_alone(receiver: OtlpReceiver) -> None:
    export = export_to(http(receiver))
    export.take(span(1, value="x" * MAX_BATCH_OCTETS))
    export.take(span(2))
    assert [one.span_id for one in receiver.wait_for_spans(1)] == [f"{2:016x}"]
    assert export.shutdown(WAIT_SECONDS)
    assert lost(export) == {"too_large": 1}


# Faults of the collector --------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_in_spans_and_the_newest_are_lost(log: pytest.LogCaptureFixture) -> None:
    collector = Held()
    export = export_to(lambda: collector, replace(QUICK, queue_spans=4, batch_spans=2, delay_seconds=3600))
    export.take(span(1))
    export.take(span(2))
    collector.wait()
    for number in range(3, 9):
        export.take(span(number))
    assert export.queued == 4
    assert lost(export) == {"queue_full": 2}
    collector.answer(TAKEN, TAKEN, TAKEN)
    assert export.shutdown(WAIT_SECONDS)
    assert lost(export) == {"queue_full": 2}
    assert [record.message for record in log.records] == ["spans lost"]


def test_of_spans_that_come_together_those_without_room_are_lost() -> None:
    export = export_to(Held, replace(QUICK, queue_spans=3, batch_spans=100, delay_seconds=3600))
    export.put(pair(1, 2), 2)
    export.put(span(3, value="x" * MAX_BATCH_OCTETS))
    assert export.queued == 2
    export.put(pair(3, 4), 2)  # there is room for one
    assert export.queued == 2
    export.put(span(5))
    export.put(span(6))
    assert export.queued == 3
    assert lost(export) == {"queue_full": 3, "too_large": 1}


def test_several_are_queued_as_each_of_them_is() -> None:
    together, one_by_one = (
        export_to(Held, replace(QUICK, queue_spans=9, batch_spans=100, delay_seconds=3600)) for _ in range(2)
    )
    large = span(9, value="x" * MAX_BATCH_OCTETS)
    lots = [
        [span(1)],
        [pair(2, 3), span(4)],
        [span(5), large, span(6)],
        [pair(7, 8), pair(10, 11), span(12)],
        [span(13)],
    ]
    for lot in lots:
        together.put_all(lot, sum(one.spans for one in lot))
        for one in lot:
            one_by_one.put(one, one.spans)
        assert together.queued == one_by_one.queued
        assert lost(together) == lost(one_by_one)
    assert together.queued == 9
    assert lost(together) == {"queue_full": 3, "too_large": 1}
    assert list(together._queue) == list(one_by_one._queue)


def test_a_batch_that_is_full_when_several_come_is_sent_at_once(receiver: OtlpReceiver) -> None:
    export = export_to(http(receiver), replace(QUICK, batch_spans=4, delay_seconds=3600))
    export.put_all([span(1)], 1)  # starts the thread
    export.put_all([pair(2, 3), span(4)], 3)
    receiver.wait_for_spans(4)
    assert export.shutdown(WAIT_SECONDS)


def test_two_spans_that_ended_together_count_as_two(receiver: OtlpReceiver) -> None:
    export = export_to(http(receiver), replace(QUICK, batch_spans=4, delay_seconds=3600))
    export.put(pair(1, 2), 2)
    export.put(span(3))
    export.put(pair(4, 5), 2)
    receiver.wait_for_spans(3)
    assert receiver.requests == 1
    assert export.shutdown(WAIT_SECONDS)
    receiver.wait_for_spans(5)
    assert lost(export) == {}


def test_two_spans_that_ended_together_are_lost_as_two(receiver: OtlpReceiver) -> None:
    receiver.fault = Fault(FaultKind.REJECTED)
    export = export_to(http(receiver))
    export.put(pair(1, 2), 2)
    until(lambda: lost(export) == {"rejected": 2})
    assert export.shutdown(WAIT_SECONDS)


def test_where_a_request_may_have_one_span_two_go_in_two(receiver: OtlpReceiver) -> None:
    export = export_to(http(receiver), replace(QUICK, batch_spans=1, delay_seconds=3600))
    export.put_alone([pair(1, 2), span(3)], 3)
    receiver.wait_for_spans(3)
    assert receiver.requests == 3
    assert export.shutdown(WAIT_SECONDS)


def test_the_queue_is_bounded_in_octets() -> None:
    collector = Held()
    export = export_to(lambda: collector, replace(QUICK, delay_seconds=3600))
    for number in range(1, 40):
        export.take(span(number, value="x" * 1_000_000))
    collector.wait()
    held = export.queued + lost(export)["queue_full"]
    assert held in range(36, 40)  # two or three are on their way
    assert export.queued <= 33
    assert not export.shutdown(0)
    collector.answer(TAKEN)


def test_a_collector_that_is_down_and_comes_back_is_told_of_twice(
    receiver: OtlpReceiver, log: pytest.LogCaptureFixture
) -> None:
    receiver.refuse()
    export = export_to(http(receiver))
    export.take(span(1))
    until(lambda: log.records)
    receiver.come_back()
    receiver.wait_for_spans(1)
    until(lambda: len(log.records) == 2)
    assert export.shutdown(WAIT_SECONDS)
    assert [record.message for record in log.records] == ["export of spans failing", "export of spans recovered"]
    assert log.records[0].__dict__["why"] == "connection refused"
    assert lost(export) == {}


@pytest.mark.parametrize("make", [http, grpc])
def test_an_unavailable_collector_is_asked_again_and_told_of_once(
    receiver: OtlpReceiver, make: Callable[..., CollectorSettings], log: pytest.LogCaptureFixture
) -> None:
    receiver.fault = Fault(FaultKind.UNAVAILABLE)
    export = export_to(make(receiver))
    export.take(span(1))
    receiver.wait_for_requests(4)
    receiver.fault = Fault()
    receiver.wait_for_spans(1)
    assert export.shutdown(WAIT_SECONDS)
    assert [record.message for record in log.records] == ["export of spans failing", "export of spans recovered"]
    assert lost(export) == {}


@pytest.mark.parametrize("make", [http, grpc])
def test_a_collector_says_itself_when_to_come_again(
    receiver: OtlpReceiver, make: Callable[..., CollectorSettings]
) -> None:
    # Our own patience would be an hour.
    receiver.fault = Fault(FaultKind.THROTTLED, seconds=0)
    export = export_to(make(receiver), replace(QUICK, first_backoff_seconds=3600))
    export.take(span(1))
    receiver.wait_for_requests(2)
    receiver.fault = Fault()
    receiver.wait_for_spans(1)
    assert export.shutdown(WAIT_SECONDS)


def test_a_collector_that_says_at_once_each_time_is_asked_less_and_less_often() -> None:
    class Hurrying:
        asked = 0

        def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
            self.asked += 1
            return CollectorAnswer(BatchOutcome.AGAIN, "HTTP 429", 0.0)

        def close(self) -> None: ...

    collector = Hurrying()
    export = export_to(lambda: collector, replace(QUICK, export_seconds=0.6))
    export.take(span(1))
    until(lambda: lost(export) == {"export_failed": 1})
    # At 0, 0.1 and 0.3 s, and on a busy machine less often; without a pause it would be thousands of times.
    assert 1 <= collector.asked <= 4


def test_a_batch_that_fails_for_its_whole_time_is_given_up(
    receiver: OtlpReceiver, log: pytest.LogCaptureFixture
) -> None:
    receiver.fault = Fault(FaultKind.UNAVAILABLE)
    export = export_to(http(receiver), replace(QUICK, export_seconds=0.05))
    export.take(span(1))
    until(lambda: lost(export) == {"export_failed": 1})
    assert export.shutdown(WAIT_SECONDS)
    assert lost(export) == {"export_failed": 1}
    assert [record.message for record in log.records] == ["export of spans failing", "spans lost at shutdown"]


@pytest.mark.parametrize("make", [http, grpc])
def test_what_is_rejected_is_not_sent_again(receiver: OtlpReceiver, make: Callable[..., CollectorSettings]) -> None:
    receiver.fault = Fault(FaultKind.REJECTED)
    export = export_to(make(receiver))
    export.take(span(1))
    until(lambda: lost(export) == {"rejected": 1})
    assert export.shutdown(WAIT_SECONDS)
    assert receiver.requests == 1


def test_a_rejection_every_time_is_told_once(receiver: OtlpReceiver, log: pytest.LogCaptureFixture) -> None:
    receiver.fault = Fault(FaultKind.REJECTED)
    export = export_to(http(receiver), replace(QUICK, batch_spans=1, queue_spans=100))
    for number in range(1, 11):
        export.take(span(number))
    until(lambda: lost(export) == {"rejected": 10})
    assert [record.message for record in log.records] == ["export of spans failing"]


def test_spans_of_a_batch_that_were_not_taken_are_counted(log: pytest.LogCaptureFixture) -> None:
    collector = Held()
    export = export_to(lambda: collector)
    export.take(span(1))
    collector.answer(CollectorAnswer(BatchOutcome.TAKEN, "too old", rejected=1))
    until(lambda: lost(export) == {"rejected": 1})
    until(lambda: log.records)
    assert log.records[0].__dict__["why"] == "too old"
    collector.answer(TAKEN)
    export.take(span(2))
    assert export.shutdown(WAIT_SECONDS)


@pytest.mark.parametrize("make", [http, grpc])
def test_a_slow_collector_costs_nothing_but_time(
    receiver: OtlpReceiver, make: Callable[..., CollectorSettings]
) -> None:
    receiver.fault = Fault(FaultKind.SLOW, seconds=0.1)
    export = export_to(make(receiver))
    export.take(span(1))
    export.take(span(2))
    assert export.shutdown(WAIT_SECONDS)
    assert len(receiver.spans) == 2
    assert lost(export) == {}


# The end ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [http, grpc])
def test_a_black_hole_holds_the_end_no_longer_than_its_budget(
    receiver: OtlpReceiver, make: Callable[..., CollectorSettings], log: pytest.LogCaptureFixture
) -> None:
    receiver.fault = Fault(FaultKind.BLACK_HOLE)
    export = export_to(make(receiver), replace(QUICK, batch_spans=1, request_seconds=60, export_seconds=60))
    for number in range(1, 4):
        export.take(span(number))
    receiver.wait_for_requests(1)
    began = time.monotonic()
    assert not export.shutdown(0.1)
    assert time.monotonic() - began < 5
    assert lost(export) == {"shutdown": 3}
    assert [record.message for record in log.records] == ["spans lost at shutdown"]


def test_a_collector_that_is_down_does_not_use_the_budget_up(receiver: OtlpReceiver) -> None:
    receiver.refuse()
    settings = replace(QUICK, delay_seconds=3600, first_backoff_seconds=3600, export_seconds=7200, batch_spans=1)
    export = export_to(http(receiver), settings)
    for number in range(1, 4):
        export.take(span(number))
    assert export.shutdown(3600)
    assert sum(lost(export).values()) == 3


def test_the_end_does_not_wait_for_a_collector_that_asked_for_patience(receiver: OtlpReceiver) -> None:
    receiver.fault = Fault(FaultKind.THROTTLED, seconds=50)
    export = export_to(http(receiver), replace(QUICK, export_seconds=3600))
    export.take(span(1))
    receiver.wait_for_requests(1)
    receiver.fault = Fault()
    assert export.shutdown(3600)
    assert len(receiver.spans) == 1


def test_what_comes_after_the_end_is_counted() -> None:
    export = export_to(lambda: pytest.fail("dialled"))
    assert export.shutdown(1)
    export.take(span())
    assert lost(export) == {"shutdown": 1}


def test_an_unexpected_error_loses_a_batch_and_no_more(log: pytest.LogCaptureFixture) -> None:
    class Broken(Held):
        def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
            if not self.requests:
                self.requests.append(request)
                raise RuntimeError("a bug")
            return TAKEN

    export = export_to(Broken)
    export.take(span(1))
    until(lambda: lost(export) == {"export_failed": 1})
    export.take(span(2))
    assert export.shutdown(WAIT_SECONDS)
    assert lost(export) == {"export_failed": 1}
    assert log.records[0].message == "export of spans failed: internal error"


FORKING = """
import httpx, os, sys
httpx.Client().close()  # all of it before the fork: a module that the thread has half imported stays so in the child
sys.path.insert(0, {path!r})
from tests.telemetry.test_exporting import export_to, http, lost, span, QUICK, WAIT_SECONDS
from tests.support.spans import encoded
from tests.support.otlp_receiver import OtlpReceiver
from otel_smtp.telemetry.collector import CollectorSettings
export = export_to(CollectorSettings(sys.argv[1]))
before = export_to(CollectorSettings(sys.argv[1]))
export.take(span(1))
child = os.fork()
export.take(span(2 if child else 3))
before.take(span(4 if child else 5))
done = export.shutdown(WAIT_SECONDS) and before.shutdown(WAIT_SECONDS) and not lost(export)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
os._exit(0 if done else 1)
"""


def test_after_a_fork_both_processes_export_and_nothing_twice(receiver: OtlpReceiver) -> None:
    script = FORKING.format(path=os.getcwd())
    subprocess.run(
        [sys.executable, "-c", script, f"{receiver.http_endpoint}/v1/traces"], check=True, timeout=60, cwd=os.getcwd()
    )
    assert sorted(int(one.span_id, 16) for one in receiver.wait_for_spans(5)) == [1, 2, 3, 4, 5]


def test_no_thread_runs_before_the_first_span() -> None:
    before = threading.active_count()
    export = export_to(lambda: pytest.fail("dialled"))
    assert threading.active_count() == before
    assert export.shutdown(0)


def test_a_port_where_nobody_listens_is_a_failure_like_others() -> None:
    export = export_to(CollectorSettings(f"http://127.0.0.1:{unclaimed_port()}/v1/traces"))
    export.take(span())
    assert export.shutdown(WAIT_SECONDS)
    assert lost(export) == {"export_failed": 1}


def test_the_time_that_a_collector_takes_to_be_made_is_taken_from_its_last_request() -> None:
    import_seconds, budget_seconds = 0.3, 5.0
    given: list[float] = []

    class Asked:
        def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
            given.append(timeout_seconds)
            return TAKEN

        def close(self) -> None: ...

    def connect() -> Asked:
        threading.Event().wait(import_seconds)  # as long as a library's import may take
        return Asked()

    export = export_to(connect, replace(QUICK, delay_seconds=60.0, request_seconds=60.0, export_seconds=60.0))
    export.take(span(1))
    assert export.shutdown(budget_seconds)
    [seconds] = given
    assert seconds <= 0.9 * budget_seconds - import_seconds


def test_a_fault_in_counting_what_was_lost_does_not_end_the_export(caplog: pytest.LogCaptureFixture) -> None:
    sent = threading.Event()
    faults = iter([True])

    class Taking:
        def send(self, request: Sequence[bytes], timeout_seconds: float) -> CollectorAnswer:
            if not failed.is_set():
                failed.set()
                raise RuntimeError("a fault")
            sent.set()
            return TAKEN

        def close(self) -> None: ...

    failed = threading.Event()
    export = export_to(Taking)
    settle = export._settle

    def settle_at_last(*about: Any) -> None:
        if next(faults, False):
            raise RuntimeError("another fault")
        settle(*about)

    export._settle = settle_at_last  # type: ignore[method-assign, assignment]
    export.take(span(1))
    assert failed.wait(WAIT_SECONDS)
    until(lambda: "export interrupted: internal error" in [record.message for record in caplog.records])
    export.take(span(2))
    assert sent.wait(WAIT_SECONDS)
    assert export.shutdown(WAIT_SECONDS)
