"""A store in a directory of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from otel_smtp.spool.embedded import EmbeddedStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EmbeddedStore]:
    """An open store, closed at the end."""
    store = EmbeddedStore(tmp_path / "spool", reserve_octets=4096, least_free_octets=0)
    await store.open()
    yield store
    await store.close()
