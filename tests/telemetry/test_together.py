"""Mails that are told together are told as each of them by itself: as spans, as lines of the log, as numbers."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

from otel_smtp.observing import Outcome, TransactionRecord
from otel_smtp.telemetry.access_log import AccessLog
from otel_smtp.telemetry.logs import ACCESS, JsonRenderer, LineFormatter
from otel_smtp.telemetry.metrics import Metrics
from otel_smtp.telemetry.propagation import InboundPolicy, TraceContext
from otel_smtp.telemetry.redaction import Addresses, ClientIp, Redaction
from otel_smtp.telemetry.shapes import EncodedSpan, Pair
from otel_smtp.telemetry.span_lines import LineShape, LinesOfMail, SpanLineHandler, SpanLinesAsJson
from otel_smtp.telemetry.tracing import Tracing
from tests.support.examples import scaled
from tests.telemetry.driving import each_to
from tests.telemetry.test_metrics import samples
from tests.telemetry.test_otlp import (
    assert_same,
    attempted,
    canonical,
    connections,
    ordinary_mails,
    queued_mail,
    request,
    transactions,
)

NOW_NS = 1_700_000_000 * 10**9


class Lines(SpanLineHandler):
    """Keeps lines as text, of one moment, in the order in which they came; `general`: by records alone."""

    def __init__(self) -> None:
        super().__init__()
        self.own_filters: list[Any] = []
        self.told: list[str] = []
        self._as_json = SpanLinesAsJson(ACCESS)
        self._formatter = LineFormatter(JsonRenderer())

    def take_line(
        self,
        shape: LineShape,
        pairs: Sequence[Pair],
        duration_seconds: float,
        context: TraceContext,
        time_ns: int,
        now_ns: int,
    ) -> None:
        self.told.append(self._as_json(shape, pairs, duration_seconds, context, NOW_NS))

    def take_mails(self, mails: Sequence[LinesOfMail], now_ns: int) -> None:
        for mail in mails:
            self.told += [line.removesuffix("\n") for line in self._as_json.of_mail(mail, NOW_NS)]

    def emit(self, record: logging.LogRecord) -> None:
        record.created = NOW_NS / 1e9
        self.told.append(self._formatter.format(record))


class Told:
    """What tracing makes of what happens: spans as octets, and lines.

    Args:
        lines: False: none; None: by records of `logging`, as where somebody wants those.
    """

    def __init__(self, *, lines: bool | None, **options: Any) -> None:
        self.spans: list[EncodedSpan] = []
        self._lines = Lines()
        logger = logging.Logger(ACCESS)
        logger.addHandler(self._lines)
        if lines is None:
            logger.addFilter(lambda record: True)
        self.tracing = Tracing(
            exports=[each_to(self.spans)], lines=[] if lines is False else [AccessLog(logger)], **options
        )

    @property
    def lines(self) -> list[str]:
        return self._lines.told


class OneByOne(Metrics):
    """Notes nothing for later."""

    def _note(self, *_: object) -> bool:
        return False

    def _note_queued(self, *_: object) -> bool:
        return False

    def _note_attempt(self, *_: object) -> bool:
        return False


def in_any_order(spans: Sequence[EncodedSpan]) -> Message:
    """Ordinary ones may be given away before those they were told with, or behind them."""
    return request(sorted(spans, key=lambda span: canonical(request([span]))))


def with_exemplars(metrics: Metrics) -> list[object]:
    """Which buckets have one; whichever mail it is of."""
    return [
        {labels: [*map(bool, series.exemplars)] for labels, series in one.series.items() if any(series.exemplars)}
        for one in metrics.measurements
    ]


@settings(max_examples=scaled(30), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_mails_that_are_told_together_are_told_as_each_of_them(data: st.DataObject) -> None:
    options: dict[str, Any] = {
        "policies": {"local": data.draw(st.sampled_from(InboundPolicy))},
        "redaction": Redaction(data.draw(st.sampled_from(Addresses)), data.draw(st.sampled_from(ClientIp)), b"key"),
        "with_message_id": data.draw(st.booleans()),
        "sampler": data.draw(st.sampled_from([ALWAYS_ON, ALWAYS_ON, ALWAYS_OFF])),
    }
    has_lines = data.draw(st.booleans())
    together, each, by_records = (Told(lines=lines if has_lines else False, **options) for lines in (True, True, None))
    counted, counted_each = Metrics(upstreams=["u"]), OneByOne(upstreams=["u"])
    everybody = (together, each, by_records)
    connection = data.draw(connections())
    some = [
        data.draw(mails)
        for mails in data.draw(
            st.lists(
                st.sampled_from(
                    [
                        ordinary_mails(connection),
                        ordinary_mails(connection),
                        ordinary_mails(connection).map(queued_mail),
                        transactions(connection),
                    ]
                ),
                min_size=1,
                max_size=4,
            )
        )
    ]
    # Many, most of them alike: as many as are counted together, and more.
    mails: list[TransactionRecord] = data.draw(st.lists(st.sampled_from(some), min_size=1, max_size=64))
    mails += mails[:1] * data.draw(st.sampled_from([0, 0, 60, 130]))
    event(f"relayed: {any(mail.outcome is Outcome.RELAYED for mail in mails)}")
    for one in everybody:
        one.tracing.connection_opened(connection)
    together.tracing.transactions_settled(mails)
    counted.transactions_settled(mails)
    for mail in mails:
        for one in (each, by_records):
            one.tracing.transactions_settled([mail])
        counted_each.transactions_settled([mail])
    resumed = data.draw(
        st.lists(
            st.one_of(ordinary_mails(connection).map(attempted), transactions(None)).filter(lambda one: one.deliveries),
            max_size=3,
        )
    )
    for whole in resumed:
        whole.waited_seconds = data.draw(st.one_of(st.none(), st.just(0.5)))
    if resumed:
        many = data.draw(st.lists(st.sampled_from(resumed), max_size=20))
        attempts = [whole.deliveries[0] for whole in many] * data.draw(st.sampled_from([1, 1, 7]))
        together.tracing.deliveries_settled(attempts)
        counted.deliveries_settled(attempts)
        for attempt in attempts:
            for told in (each, by_records):
                told.tracing.deliveries_settled([attempt])
            counted_each.deliveries_settled([attempt])
    for one in (each, by_records):
        assert_same(in_any_order(together.spans), in_any_order(one.spans))
    assert together.lines == each.lines == by_records.lines
    assert samples(counted) == pytest.approx(samples(counted_each))
    assert with_exemplars(counted) == with_exemplars(counted_each)
