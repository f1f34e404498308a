"""The benchmark's SMTP sink in a process of its own, for tests that want a fast upstream."""

from collections.abc import Iterator
from contextlib import contextmanager

from tests.bench.process import Child, python


@contextmanager
def running_sink() -> Iterator[tuple[int, Child]]:
    """Its port, and the process to ask for its counts."""
    sink = python("tests.bench.sink", talks=True)
    try:
        yield int(sink.read()["port"]), sink
    finally:
        sink.stop()
