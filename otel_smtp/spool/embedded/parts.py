"""The common base of the embedded store's classes."""

import asyncio
from collections.abc import Callable

from otel_smtp.spool.embedded.claiming import Claiming
from otel_smtp.spool.embedded.compaction import Compaction
from otel_smtp.spool.embedded.contents import Contents
from otel_smtp.spool.embedded.directory import SpoolDirectory
from otel_smtp.spool.embedded.index_thread import IndexThread
from otel_smtp.spool.embedded.indexing import Indexing
from otel_smtp.spool.embedded.journal import Journal
from otel_smtp.spool.embedded.memory import Memory
from otel_smtp.spool.messages import Timings


class EmbeddedParts:
    """The parts of `EmbeddedStore`, which makes them, for its base classes."""

    directory: SpoolDirectory
    timings: Timings
    memory: Memory
    journal: Journal
    index: IndexThread
    indexing: Indexing
    compaction: Compaction
    _contents: Contents
    _claiming: Claiming
    _now_ms: Callable[[], int]  # milliseconds since the epoch
    _loop: asyncio.AbstractEventLoop
