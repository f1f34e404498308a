"""Measurements: several at once come to the same as one by one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.telemetry.attributes import TRANSACTION_DURATION
from otel_smtp.telemetry.measurements import Buckets
from otel_smtp.telemetry.propagation import TraceContext

_contexts = st.builds(TraceContext, st.integers(1, 9), st.integers(1, 9), st.just(1))
_values = st.floats(0, 400) | st.just(10_000.0)


def _lots(contexts: st.SearchStrategy[TraceContext | None]) -> st.SearchStrategy[list[tuple[float, Any, int]]]:
    return st.lists(st.tuples(_values, contexts, st.integers(0, 10**18)), min_size=1)


@given(st.lists(st.floats(0, 1000) | st.sampled_from([0.1, 0.2, 0.5, 700.0]), min_size=1))
def test_many_measurements_at_once_are_those_one_by_one(values: list[float]) -> None:
    once, single = Buckets((0.1, 0.2, 0.5, 600.0)), Buckets((0.1, 0.2, 0.5, 600.0))
    for value in values:
        single.add(value)
    once.add_all(list(values))
    assert once.counts == single.counts
    assert (once.least, once.most) == (single.least, single.most)
    assert once.total == pytest.approx(single.total)


@given(st.lists(_lots(_contexts) | _lots(st.none()) | _lots(st.none() | _contexts), max_size=4))
def test_several_measurements_count_as_each_of_them(lots: list[list[tuple[float, TraceContext | None, int]]]) -> None:
    one_by_one, together = (Buckets(TRANSACTION_DURATION.bounds) for _ in range(2))
    for lot in lots:
        for value, context, unix_ns in lot:
            one_by_one.add(value, context, unix_ns)
        values, contexts, moments_ns = zip(*lot, strict=True)
        together.add_each(values, contexts, moments_ns)
    assert together.counts == one_by_one.counts
    assert together.exemplars == one_by_one.exemplars
    assert (together.least, together.most) == (one_by_one.least, one_by_one.most)
    assert together.total == pytest.approx(one_by_one.total)
