"""A store in a directory of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from otel_smtp.spool.files import SpoolDirectory
from otel_smtp.spool.store import SpoolStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SpoolStore]:
    """An open store, closed at the end."""
    store = SpoolStore(SpoolDirectory(tmp_path / "spool", reserve_octets=4096), least_free_octets=0)
    await store.open()
    yield store
    await store.close()
