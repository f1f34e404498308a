"""A crash after each of the system calls by which the store does all it does: see `crashing`.

`python -m tests.durability crashes` tries many more of them.
"""

from pathlib import Path

import pytest

from tests.spool.embedded.crashing import crash_at_any_call


@pytest.mark.parametrize("seed", range(2))
async def test_what_was_answered_is_found_after_a_crash_at_whichever_call(tmp_path: Path, seed: int) -> None:
    outcome = await crash_at_any_call(tmp_path, seed, workers=10, steps=20, moments=10, crashes=3)
    assert outcome.faults == []
    assert outcome.crashes >= 30, outcome.told()
