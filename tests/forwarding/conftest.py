"""What the tests of forwarding share: a quick look at the clock, so that short deadlines are short."""

import pytest

from otel_smtp.net import sweep


@pytest.fixture(autouse=True)
def _quick_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "SWEEP_SECONDS", 0.02)
