"""Trace contexts as header fields, and what is read back from them."""

import pytest

from otel_smtp.telemetry.propagation import RANDOM, SAMPLED, TraceContext, carrier, from_carrier

TRACE_ID, SPAN_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331


@pytest.mark.parametrize("flags", [0, SAMPLED, SAMPLED | RANDOM, 0xFF])
@pytest.mark.parametrize("trace_state", ["", "vendor=value", "no list at all"])
@pytest.mark.parametrize("is_remote", [False, True])
def test_a_context_is_read_the_same_from_its_carrier_and_from_what_was_stored_of_it(
    flags: int, trace_state: str, is_remote: bool
) -> None:
    fields = carrier(TraceContext(TRACE_ID, SPAN_ID, flags, is_remote, trace_state))
    stored = dict(fields)  # as a store gives it back
    assert from_carrier(fields) == from_carrier(stored)
    assert from_carrier(stored) == TraceContext(
        TRACE_ID, SPAN_ID, flags & (SAMPLED | RANDOM), True, trace_state if "=" in trace_state else ""
    )
