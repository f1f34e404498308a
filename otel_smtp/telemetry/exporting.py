"""Spans and log records on their way to a collector: encoded at once, kept in a bounded queue, sent by a thread.

On the event loop a span costs its encoding and an append. Encoding it there and not in the thread is what was measured
to be cheaper (72 against 77 us a mail, and a third less at the 99th percentile): two threads that both compute take the
interpreter's lock from one another, while one that posts octets mostly waits. It also makes what is queued small, flat
and of a known size, so that the queue is bounded in octets as well as in spans, and what is too large is known at once.

The thread starts with the first span: never before a fork, and not at all where nothing is traced. It sends what there
is every `delay_seconds`, and sooner when a batch is full. A collector that is down, slow or hostile costs spans, which
are counted, and a log line when that begins and when it ends; it never costs mail, nor time at the end beyond the
budget that `shutdown` is given.

Each counter of lost spans is written by one thread alone, the loop's or ours, as is each of the sums of what was
queued and taken out again.
"""

import logging
import os
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Final, Generic, TypeVar, cast

from otel_smtp.observing import Faults
from otel_smtp.telemetry.collector import BatchOutcome, Collector, CollectorAnswer, Signal
from otel_smtp.telemetry.export_failures import file_failure
from otel_smtp.telemetry.otlp import RequestFrame
from otel_smtp.telemetry.shapes import EncodedPair, EncodedSpan

logger: Final = logging.getLogger("otel_smtp.telemetry.exporting")

T = TypeVar("T")

# grpc takes 4 MiB by default, and collectors bound what they read over HTTP too; a request has its resource beside the
# spans, and some room is left.
MAX_BATCH_OCTETS: Final = 3 * 1024 * 1024
# The SDK's defaults, a queue of 2048 spans and batches of 512, suit slower senders: at ten thousand mails per second
# that queue is full within a tenth of a second, and a request, which costs a millisecond of Python, is due every 25 ms.
# The two spans of a mail have some 1.4 KiB, so the default queue takes some 12 MiB. Connections with hundreds of errors
# make spans of 100 KiB; for them the bound is in octets: what clients can make us hold while the collector is down.
QUEUE_OCTETS_A_SPAN: Final = 2 * 1024
LEAST_QUEUE_OCTETS: Final = 32 * 1024 * 1024
# As OTLP exporters of other languages do: 1, 2, 4, 5, 5 s; each a little off, so that gateways do not retry together.
_FIRST_BACKOFF_SECONDS: Final = 1.0
_LONGEST_BACKOFF_SECONDS: Final = 5.0
_JITTER: Final = 0.2
# One that says "at once" each time would be asked a thousand times per second, by a thread that mail shares the
# interpreter with: never sooner than this, doubled likewise.
_LEAST_PAUSE_SECONDS: Final = 0.1
# A collector may ask for a delay, within this bound.
_LONGEST_RETRY_AFTER_SECONDS: Final = 60.0
# One that comes and goes is logged once in this time.
_QUIET_SECONDS: Final = 60.0


class DropReason(StrEnum):
    """Why a span was not exported: the closed set of `smtp.telemetry.drop_reason`."""

    QUEUE_FULL = "queue_full"
    TOO_LARGE = "too_large"  # one span larger than a batch may be
    EXPORT_FAILED = "export_failed"  # given up after retries
    REJECTED = "rejected"  # by the collector, for good
    KEEP_RATE = "keep_rate"  # the sampler dropped it, and more was to be kept by its outcome than may be
    SHUTDOWN = "shutdown"  # still there when the budget for the end was spent


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """Settings for batching spans.

    Attributes:
        queue_spans: the most that wait; later ones are lost.
        batch_spans: the most in one request.
        delay_seconds: how long a span waits for others.
        export_seconds: how long a batch is tried, with all its retries.
        request_seconds: how long one request may take.
        first_backoff_seconds: before the first retry, doubled with each.
    """

    queue_spans: int = 16_384
    batch_spans: int = 2048
    delay_seconds: float = 5.0
    export_seconds: float = 30.0
    request_seconds: float = 10.0
    first_backoff_seconds: float = _FIRST_BACKOFF_SECONDS

    @property
    def queue_octets(self) -> int:
        """The most octets of encoded spans that wait."""
        return max(self.queue_spans * QUEUE_OCTETS_A_SPAN, LEAST_QUEUE_OCTETS)


class Export(Generic[T]):
    """Sends what it takes to a collector.

    Args:
        items: what is taken, in the log's words: spans.
        encode: makes one of them the octets of a field of a request; called by the caller of `take`.
        request: makes a request of such fields, in parts; called by the thread.
        connect: makes the collector; called by the thread. Its OSError counts as a failure to send.
        address: the collector's, for the log.
    """

    _most_together: ClassVar[int] = 1

    def __init__(
        self,
        signal: Signal,
        items: str,
        encode: Callable[[T], bytes],
        request: Callable[[Sequence[bytes]], Sequence[bytes]],
        connect: Callable[[], Collector],
        settings: BatchSettings | None = None,
        *,
        address: str = "",
    ) -> None:
        self._signal = signal
        self._items = items
        self._encode = encode
        self._request = request
        self._connect = connect
        self._settings = settings or BatchSettings()
        self._address = address
        self._most_octets = self._settings.queue_octets
        self._most_items, self._batch_items = self._settings.queue_spans, self._settings.batch_spans
        self._lost = dict.fromkeys(DropReason, 0)
        self._faults = Faults(logger, "export interrupted: internal error")
        self._begin()
        # A fork while the thread runs: the child has no thread, and the parent sends what was queued.
        begin = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (again := begin()) and again())

    def _begin(self) -> None:
        self._queue: deque[bytes] = deque()
        self._octets_in = self._items_in = 0  # ever queued; written by the loop's thread
        self._octets_out = self._items_out = 0  # ever taken out again; written by ours
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._is_stopping = False  # the same, for the mail path
        self._stop_by = float("inf")
        self._is_abandoned = False
        self._sending = 0
        self._collector: Collector | None = None
        self._not_before = 0.0
        self._failures = 0  # attempts in a row
        self._is_told = False
        self._quiet_until = 0.0
        self._lost_when_told = 0

    @property
    def queued(self) -> int:
        """Spans that wait."""
        return self._items_in - self._items_out

    @property
    def is_full(self) -> bool:
        """Whether what comes now is lost, so that it need not be encoded."""
        return self._is_stopping or self.queued >= self._settings.queue_spans

    def dropped(self) -> Iterator[tuple[str, str, int]]:
        """The losses so far, for metrics: signal, reason, how many."""
        for reason, count in self._lost.items():
            yield self._signal.value, reason.value, count

    def take(self, record: T) -> None:
        """Encode one span, or whatever else is sent, and queue it. For one thread at a time."""
        self.put(b"" if self.is_full else self._encode(record))

    def put(self, record: bytes, items: int = 1) -> None:
        """Queue one that is encoded, or as many as `_most_together`, which then stay so. For one thread at a time.

        Args:
            items: how many they are.
        """
        octets = len(record)
        waiting_items = self._items_in - self._items_out + items
        waiting = self._octets_in - self._octets_out + octets
        if (
            waiting_items > self._most_items
            or waiting > self._most_octets
            or octets > MAX_BATCH_OCTETS
            or self._is_stopping
        ):
            self._lost[self._why_not(octets, waiting_items)] += items
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"otlp-{self._signal}", daemon=True)
            self._thread.start()
        self._add((record,), items, octets)

    def put_all(self, records: Sequence[bytes], items: int) -> None:
        """Queue several that are encoded, as `put` does each.

        Args:
            items: how many they are in all.
        """
        octets = sum(map(len, records))
        waiting_items = self._items_in - self._items_out + items
        waiting = self._octets_in - self._octets_out + octets
        if (
            waiting_items > self._most_items
            or waiting > self._most_octets
            or octets > MAX_BATCH_OCTETS
            or self._is_stopping
            or self._thread is None
        ):
            for record in records:  # what there is room for is queued
                self.put(record, self._count((record,)))
            return
        self._add(records, items, octets)

    def _add(self, records: Sequence[bytes], items: int, octets: int) -> None:
        """Queue what there is room for, and wake the thread where that makes a batch."""
        self._queue.extend(records)
        self._items_in += items
        self._octets_in += octets
        is_batch = self._items_in - self._items_out >= self._batch_items
        if (is_batch or self._octets_in - self._octets_out > MAX_BATCH_OCTETS) and not self._wake.is_set():
            self._wake.set()

    def _why_not(self, octets: int, waiting_items: int) -> DropReason:
        # The newest is lost, not the oldest: what led to the trouble is worth more than what came after.
        if self._is_stopping:
            return DropReason.SHUTDOWN
        is_full = waiting_items > self._most_items or octets <= MAX_BATCH_OCTETS
        return DropReason.QUEUE_FULL if is_full else DropReason.TOO_LARGE

    def shutdown(self, budget_seconds: float) -> bool:
        """Send what is left, within the budget. Blocks: not for the event loop. Later spans are lost.

        Returns:
            Whether everything was sent or given up in time.
        """
        # A last request that hangs ends before the budget does, and is counted by its sender.
        self._stop_by = time.monotonic() + 0.9 * budget_seconds
        self._is_stopping = True
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(budget_seconds)
            if self._thread.is_alive():
                # A request that began long ago: it is left to itself, with the thread.
                self._is_abandoned = True
                self._lost[DropReason.SHUTDOWN] += self.queued + self._sending
        lost = sum(self._lost.values()) - self._lost_when_told
        if lost:
            logger.warning("%s lost at shutdown", self._items, extra={self._items: lost, "collector": self._address})
        return self._thread is None or not self._thread.is_alive()

    # The thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_due = not self._wake.wait(self._settings.delay_seconds)
            # Cleared before the look at what is there, so that what comes between is not slept through.
            self._wake.clear()
            is_last = self._stopping.is_set()
            try:
                self._send_queued(self.queued if is_due or is_last else 0)
            except Exception:  # noqa: BLE001 - the top of the thread: logged once, and what comes next is sent
                self._faults.note(self._items)
        if self._collector is not None:
            self._collector.close()

    def _send_queued(self, wanted: int) -> None:
        """Send at least `wanted` spans of those that wait, and else only full batches."""
        while self._queue and not self._is_abandoned and (wanted > 0 or self._has_full_batch()):
            batch, items = self._next_batch()
            wanted -= items
            try:
                self._send(batch, items)
            except Exception:
                if not self._is_told:
                    logger.exception(
                        "export of %s failed: internal error", self._items, extra={"collector": self._address}
                    )
                self._settle(items, CollectorAnswer(BatchOutcome.AGAIN, "internal error"), DropReason.EXPORT_FAILED)

    def _has_full_batch(self) -> bool:
        return self.queued >= self._batch_items or self._octets_in - self._octets_out > MAX_BATCH_OCTETS

    def _next_batch(self) -> tuple[list[bytes], int]:
        """A batch, and how many spans it has."""
        queue = self._queue
        # Few steps of Python, as each is taken from the loop: the batch is cut to its size afterwards.
        batch = [queue.popleft() for _ in range(min(len(queue), self._batch_items // self._most_together))]
        items = self._count(batch)
        while queue and (not batch or items + self._count((queue[0],)) <= self._batch_items):
            batch.append(queue.popleft())
            items += self._count(batch[-1:])
        octets = sum(map(len, batch))
        while octets > MAX_BATCH_OCTETS and len(batch) > 1:
            queue.appendleft(batch.pop())
            octets -= len(queue[0])
            items -= self._count((queue[0],))
        self._octets_out += octets
        self._items_out += items
        return batch, items

    def _count(self, batch: Sequence[bytes]) -> int:
        """How many items those are that were queued."""
        return len(batch)

    def _send(self, batch: list[bytes], items: int) -> None:
        """Send a batch until it is taken, rejected, or its time is over."""
        request = self._request(batch)
        self._sending = items
        deadline = time.monotonic() + self._settings.export_seconds
        backoff, least = self._settings.first_backoff_seconds, _LEAST_PAUSE_SECONDS
        while True:
            # Ends at once when we are to stop: from then on each batch is tried once, without patience.
            self._stopping.wait(max(0.0, self._not_before - time.monotonic()))
            is_last = self._stopping.is_set()
            answer = self._attempt(request, deadline)
            if answer.verdict is not BatchOutcome.AGAIN:
                break
            pause = answer.retry_after_seconds
            if pause is None:
                pause = backoff * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - no secret
            self._not_before = time.monotonic() + min(max(pause, least), _LONGEST_RETRY_AFTER_SECONDS)
            backoff, least = (min(2 * seconds, _LONGEST_BACKOFF_SECONDS) for seconds in (backoff, least))
            if is_last or self._not_before >= deadline:
                break
            self._failed(answer.why)
        self._settle(
            items,
            answer,
            DropReason.REJECTED if answer.verdict is BatchOutcome.REJECTED else DropReason.EXPORT_FAILED,
        )

    def _attempt(self, request: Sequence[bytes], deadline: float) -> CollectorAnswer:
        if self._collector is None:
            try:
                self._collector = self._connect()
            except OSError as error:
                return CollectorAnswer(BatchOutcome.AGAIN, file_failure(error))
        # Only now: to make a collector imports its library, which takes a part of the time that is left at the end.
        seconds = min(self._settings.request_seconds, min(deadline, self._stop_by) - time.monotonic())
        if seconds <= 0:
            return CollectorAnswer(BatchOutcome.AGAIN, "no time left")
        return self._collector.send(request, seconds)

    def _settle(self, spans: int, answer: CollectorAnswer, reason: DropReason) -> None:
        """Count what became of a batch, and log it when that changes."""
        if self._is_abandoned:
            return  # it was counted as lost
        self._sending = 0
        if answer.verdict is not BatchOutcome.TAKEN:
            self._lost[reason] += spans
            self._failed(answer.why, is_final=True)
        elif answer.rejected:
            self._lost[DropReason.REJECTED] += min(answer.rejected, spans)
            self._failed(answer.why or "partial success", is_final=True)
        else:
            self._works()

    def _failed(self, why: str, *, is_final: bool = False) -> None:
        """Log that spans are not exported: from the second attempt on, since one may meet a connection just closed."""
        self._failures += 1
        now = time.monotonic()
        if self._is_told or now < self._quiet_until or not (is_final or self._failures > 1):
            return
        self._is_told = True
        self._quiet_until = now + _QUIET_SECONDS
        logger.warning("export of %s failing", self._items, extra={"collector": self._address, "why": why})

    def _works(self) -> None:
        self._failures = 0
        lost = sum(self._lost.values()) - self._lost_when_told
        now = time.monotonic()
        if self._is_told:
            self._is_told = False
            logger.info(
                "export of %s recovered",
                self._items,
                extra={"collector": self._address, f"{self._items}_lost": lost},
            )
            self._lost_when_told += lost
        elif lost and now >= self._quiet_until:
            # It takes what it is sent, but not as fast as it comes.
            self._quiet_until = now + _QUIET_SECONDS
            logger.warning("%s lost", self._items, extra={"collector": self._address, f"{self._items}_lost": lost})
            self._lost_when_told += lost


class TraceExport(Export[EncodedSpan]):
    """Sends spans that are encoded already; see `Export`. `put` takes them as they are: by `take` they would be
    copies, beside what the recent traces keep.

    Args:
        frame: what is around them in a request.
    """

    def __init__(
        self,
        frame: RequestFrame,
        connect: Callable[[], Collector],
        settings: BatchSettings | None = None,
        *,
        address: str = "",
    ) -> None:
        super().__init__(Signal.TRACES, "spans", EncodedSpan, frame.request, connect, settings, address=address)

    _most_together = EncodedPair.spans

    def _count(self, batch: Sequence[bytes]) -> int:
        return sum(one.spans for one in cast("Sequence[EncodedSpan]", batch))

    def put_alone(self, spans: Sequence[EncodedSpan], items: int) -> None:
        """Queue two spans that ended together each by itself, where they are more than a request may have."""
        for span in spans:
            for one in span.each() if isinstance(span, EncodedPair) else (span,):
                self.put(one)
