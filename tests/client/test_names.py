"""The names on the application's spans: registered ones, or what the gateway means by them."""

import importlib
import pkgutil

import opentelemetry.semconv.attributes
import pytest

from otel_smtp.client import names
from otel_smtp.telemetry.attributes import ATTRIBUTES


def registered() -> set[str]:
    """The stable attributes of the semantic conventions."""
    package = opentelemetry.semconv.attributes
    modules = [
        importlib.import_module(f"{package.__name__}.{one.name}") for one in pkgutil.iter_modules(package.__path__)
    ]
    return {value for module in modules for value in vars(module).values() if isinstance(value, str)}


@pytest.mark.parametrize("name", names.ATTRIBUTES)
def test_a_name_is_registered_or_of_our_own_space(name: str) -> None:
    assert name.startswith("smtp.") or name in registered()


@pytest.mark.parametrize("name", sorted(names.ATTRIBUTES.keys() & ATTRIBUTES.keys()))
def test_a_name_that_the_gateway_has_too_has_its_type(name: str) -> None:
    assert names.ATTRIBUTES[name].type == ATTRIBUTES[name].type
