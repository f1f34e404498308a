"""Failures per client address: the window, what counts as one client, and the bound."""

import pytest

from otel_smtp.server.failure_rate import FailureRate


def test_ten_failures_a_minute_are_too_many() -> None:
    rate = FailureRate(limit=10, window_seconds=60)
    for second in range(9):
        rate.count("192.0.2.1", second)
    assert not rate.is_exceeded("192.0.2.1", 9)
    rate.count("192.0.2.1", 9)
    assert rate.is_exceeded("192.0.2.1", 9)
    assert rate.is_exceeded("192.0.2.1", 59.9)
    assert not rate.is_exceeded("192.0.2.1", 60)  # the first has left the window
    rate.count("192.0.2.1", 60)
    assert rate.is_exceeded("192.0.2.1", 60.9)
    assert not rate.is_exceeded("192.0.2.2", 9)
    assert not FailureRate().is_exceeded("192.0.2.1", 0)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2001:db8::1", "2001:db8::2", True),  # one /64
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("fe80::1%eth0", "fe80::1%eth1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("/run/a.sock", "/run/a.sock", True),
    ],
)
def test_what_counts_as_one_client(one: str, other: str, is_same: bool) -> None:
    rate = FailureRate(limit=1)
    rate.count(one, 0)
    assert rate.is_exceeded(one, 0)
    assert rate.is_exceeded(other, 0) is is_same


def test_the_addresses_kept_are_bounded_and_the_oldest_goes_first() -> None:
    rate = FailureRate(limit=1, addresses=3)
    for number, host in enumerate(["a", "b", "c", "a", "d"]):
        rate.count(host, number)
    assert len(rate) == 3
    assert not rate.is_exceeded("b", 5)
    assert all(rate.is_exceeded(host, 5) for host in "acd")
    for number in range(1000):
        rate.count(f"host{number}", number)
    assert len(rate) == 3
