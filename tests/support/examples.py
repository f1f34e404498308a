"""How many examples a property is tried with."""

from hypothesis import settings


def scaled(by_default: int) -> int:
    """As many examples in the profile at hand as `by_default` are where a property has 100."""
    return max(1, settings().max_examples * by_default // 100)
