"""What the tests of the status port share."""

import pytest

from otel_smtp.status import answers


@pytest.fixture(autouse=True)
def _answers_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a test would wait a second to see what it has just done."""
    monkeypatch.setattr(answers, "KEPT_SECONDS", 0.0)
    monkeypatch.setattr(answers, "REQUESTS_AT_ONCE", 10_000)
