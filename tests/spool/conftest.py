"""A store in a directory of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from otel_smtp.spool.embedded import EmbeddedStore
from tests.spool.stores import SEGMENT_OCTETS


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    """An open store, closed at the end."""
    store = EmbeddedStore(tmp_path / "spool", least_free_octets=0, segment_octets=SEGMENT_OCTETS)
    await store.open()
    yield store
    await store.close()
