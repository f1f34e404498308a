"""Sampling by outcome: keeps mails although the sampler dropped them.

A sampler decides before anything has happened. Our spans are made when they end, so failed or slow mails can be kept
all the same, with their attempts and their connection's segment: everything important, for few mails. Clients' faults
(scanners) keep nothing.
"""

import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Final

from otel_smtp.observing import DeliveryRecord, Outcome, TransactionRecord
from otel_smtp.telemetry.collector import Signal
from otel_smtp.telemetry.exporting import DropReason
from otel_smtp.telemetry.span_attributes import attempt_failure, our_failure

DEFAULT_SLOW_SECONDS: Final = 5.0
DEFAULT_PER_SECOND: Final = 20.0


class Keep(StrEnum):
    """Why a span was kept: the value of `smtp.sampling.reason`."""

    ERRORS = "errors"
    SLOW = "slow"


class Keeping:
    """Decides what to keep, within a rate; counts the rest.

    Args:
        reasons: the reasons for keeping.
        slow_seconds: longer mails are slow.
        per_second: the most transactions and attempts from the spool, with a burst of as many.
        monotonic: a clock, in seconds.
    """

    def __init__(
        self,
        reasons: Sequence[Keep],
        *,
        slow_seconds: float = DEFAULT_SLOW_SECONDS,
        per_second: float = DEFAULT_PER_SECOND,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reasons = frozenset(reasons)
        self._slow_ns = slow_seconds * 1e9
        self._per_second = per_second
        self._monotonic = monotonic
        self._most = max(1.0, per_second)
        self._left = self._most
        self._looked_at = monotonic()
        self._beyond = 0

    def transaction(self, record: TransactionRecord) -> Keep | None:
        """Why to keep a transaction; None: drop it."""
        reply, duration_ns = record.reply, record.ended_ns - record.begun_ns
        is_error = (
            record.refused_count > 0
            or record.deferred_count > 0
            or record.outcome is Outcome.UNKNOWN
            or (
                (record.error_type is not None or (reply is not None and reply.error_type is not None))
                and our_failure(record.outcome, reply, record.error_type) is not None
            )
            # Its client was told that all is well, since the spool has what an upstream has not.
            or (record.outcome is Outcome.QUEUED and any(map(_has_failed, record.deliveries)))
        )
        return self._decide(duration_ns, is_error=is_error) if is_error or duration_ns > self._slow_ns else None

    def attempt(self, record: DeliveryRecord) -> Keep | None:
        """Why to keep an attempt from the spool; None: drop it."""
        return self._decide(record.ended_ns - record.begun_ns, is_error=_has_failed(record) or bool(record.refused))

    def failure(self) -> Keep | None:
        """Why something is kept that failed."""
        return self._decide(0, is_error=True)

    def dropped(self) -> list[tuple[str, str, int]]:
        """The number beyond the rate, for metrics: signal, reason, how many."""
        return [(Signal.TRACES.value, DropReason.KEEP_RATE.value, self._beyond)]

    def _decide(self, duration_ns: int, *, is_error: bool) -> Keep | None:
        if is_error and Keep.ERRORS in self._reasons:
            reason = Keep.ERRORS
        elif duration_ns > self._slow_ns and Keep.SLOW in self._reasons:
            reason = Keep.SLOW
        else:
            return None
        now = self._monotonic()
        self._left = min(self._most, self._left + (now - self._looked_at) * self._per_second)
        self._looked_at = now
        if self._left < 1:
            self._beyond += 1
            return None
        self._left -= 1
        return reason


def _has_failed(record: DeliveryRecord) -> bool:
    """Whether an attempt lost a recipient, or failed."""
    if record.refused_count or record.deferred_count:
        return True
    return attempt_failure(record.outcome, record.reply, record.error_type) is not None
