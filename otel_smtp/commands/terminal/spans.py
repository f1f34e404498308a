"""Finished spans for drawing: their interface, and collecting the spans of one connection."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from otel_smtp.telemetry import attributes as names

# Spans whose connection is still open, or long closed (later attempts of a queued mail).
MOST_WAITING: Final = 10_000

ROOT: Final = names.SPAN_CONNECTION


class SpanIds(Protocol):
    """The ids of a span."""

    @property
    def trace_id(self) -> int: ...
    @property
    def span_id(self) -> int: ...


class DrawnLink(Protocol):
    """A link to another span."""

    @property
    def context(self) -> SpanIds: ...


class DrawnEvent(Protocol):
    """An event of a span."""

    @property
    def name(self) -> str: ...
    @property
    def time_ns(self) -> int: ...
    @property
    def attributes(self) -> Mapping[str, Any]: ...


class DrawnSpan(Protocol):
    """A finished span; times are nanoseconds since the epoch."""

    @property
    def name(self) -> str: ...
    @property
    def context(self) -> SpanIds: ...
    @property
    def parent(self) -> SpanIds | None: ...
    @property
    def links(self) -> Sequence[DrawnLink]: ...
    @property
    def start_ns(self) -> int: ...
    @property
    def end_ns(self) -> int: ...
    @property
    def attributes(self) -> Mapping[str, Any]: ...
    @property
    def events(self) -> Sequence[DrawnEvent]: ...


class Stories:
    """Collects the spans of each connection.

    A connection's span ends last, so all spans that belong to it have come before: its children, their children, and a
    transaction in the application's trace that links to its connection.
    """

    def __init__(self, *, most_waiting: int = MOST_WAITING) -> None:
        self._most_waiting = most_waiting
        self._waiting: dict[int, DrawnSpan] = {}
        self._below: dict[int, set[int]] = {}

    def __len__(self) -> int:
        """Number of spans that wait for their connection to end."""
        return len(self._waiting)

    def take(self, span: DrawnSpan) -> list[DrawnSpan] | None:
        """Take a finished span.

        Returns:
            When the connection's own span arrives: all its spans, that one first. None before.
        """
        if span.name == ROOT:
            return [span, *self._collect(span.context.span_id)]
        self._waiting[span.context.span_id] = span
        for above in _above(span):
            self._below.setdefault(above, set()).add(span.context.span_id)
        if len(self._waiting) > self._most_waiting:
            self._release(next(iter(self._waiting)))
        return None

    def _collect(self, span_id: int) -> list[DrawnSpan]:
        found: list[DrawnSpan] = []
        for below in tuple(self._below.get(span_id, ())):
            if below in self._waiting:
                found += [self._release(below), *self._collect(below)]
        return found

    def _release(self, span_id: int) -> DrawnSpan:
        span = self._waiting.pop(span_id)
        for above in _above(span):
            self._below[above].discard(span_id)
            if not self._below[above]:
                del self._below[above]
        return span


def _above(span: DrawnSpan) -> set[int]:
    """The spans to which a span belongs: its parent, and its links."""
    return {of.span_id for of in (span.parent, *(link.context for link in span.links)) if of is not None}
