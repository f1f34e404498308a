"""Replies as values."""

import pytest

from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply


@pytest.mark.parametrize("octets", [467, 468, 469])
def test_a_trace_is_named_where_the_line_keeps_to_its_limit(octets: int) -> None:
    text = "x" * (octets - len("550 5.1.1 "))
    reply = Reply(550, EnhancedStatus(5, 1, 1), ("first", text), ErrorType.UPSTREAM_REFUSED)
    told = reply.with_trace("a" * 32)
    line = told.wire.splitlines(keepends=True)[-1]
    fits = octets + len(" trace=") + 32 + 2 <= 512
    assert line.endswith(b" trace=" + b"a" * 32 + b"\r\n") is fits
    assert len(line) <= 512
    assert (told is reply) is not fits
    assert told.with_trace("a" * 32).wire == told.wire
