"""Kept inputs are few, short, and reach what the others reach."""

from tests.fuzz.choosing import choose
from tests.fuzz.seeds import seeds


def test_what_reaches_nothing_new_is_not_kept() -> None:
    inputs = list(seeds("proxy"))
    chosen = choose("proxy", [*inputs, inputs[0] + b"NOOP\r\n"], most=100, most_octets=1000)
    assert inputs[0] + b"NOOP\r\n" not in chosen
    assert set(chosen) <= set(inputs)
    assert len(chosen) > 3


def test_the_bounds_are_kept() -> None:
    assert len(choose("proxy", seeds("proxy"), most=2, most_octets=1000)) == 2
    assert all(len(octets) <= 30 for octets in choose("proxy", seeds("proxy"), most=100, most_octets=30))
