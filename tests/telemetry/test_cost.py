"""What telemetry costs per mail, counted: the same on every machine."""

import pytest

from tests.telemetry.cost import House, count_calls, count_octets, in_batches

# Of everything: metrics, three spans and nine events encoded and queued, recent traces, the page's counters, and the
# dispatch of the hooks. What one more call per event would add is more than what is left. Five are for the
# weak reference from a delivery to its transaction, which keeps mails away from the garbage collector.
MAX_PYTHON_CALLS = 25
MAX_C_CALLS = 54
MAX_OCTETS = 2300


@pytest.fixture
def house() -> House:
    return House(soon=in_batches)


def test_a_mail_stays_within_its_calls(house: House) -> None:
    calls = count_calls(house)
    house.close()
    assert calls.python <= MAX_PYTHON_CALLS
    assert calls.c <= MAX_C_CALLS


def test_a_mail_stays_within_its_octets() -> None:
    assert 1500 < count_octets() <= MAX_OCTETS
