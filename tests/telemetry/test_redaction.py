"""What is shown of a person is bounded, whatever a peer wrote."""

import pytest

from otel_smtp.telemetry.attributes import MAX_VALUE_CHARACTERS
from otel_smtp.telemetry.redaction import Addresses, Redaction


@pytest.mark.parametrize("length", [1, MAX_VALUE_CHARACTERS - 2, MAX_VALUE_CHARACTERS - 1, MAX_VALUE_CHARACTERS, 2000])
def test_an_address_literal_keeps_its_brackets_within_the_bound(length: int) -> None:
    shown = Redaction(Addresses.FULL).domain(f"a@[{'x' * length}]")
    assert shown == f"[{'x' * min(length, MAX_VALUE_CHARACTERS - 2)}]"
