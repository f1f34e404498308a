"""Every name of our telemetry is written down once: code that uses one reads it from the registry."""

import ast
from pathlib import Path

import pytest

import otel_smtp
from otel_smtp.telemetry import attributes

PACKAGE = Path(otel_smtp.__file__).parent
NAMES = frozenset({*attributes.ATTRIBUTES, *attributes.SPANS, *attributes.EVENTS, *attributes.METRICS})
REGISTRY = PACKAGE / "telemetry" / "attributes.py"
# What an application installs brings no registry of ours: it writes the conventions' names itself.
# The fixtures see the gateway as a program does that embeds it, so they spell out what such a program would.
APART = ("client", "telemetry/client.py", "testing")


def literals(source: str) -> list[tuple[int, str]]:
    """The names that `source` spells out, by line; docstrings are no code."""
    constants = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return sorted((node.lineno, node.value) for node in constants if node.value in NAMES)


def sources() -> list[str]:
    files = (path for path in PACKAGE.rglob("*.py") if path != REGISTRY)
    return sorted(str(path.relative_to(PACKAGE)) for path in files)


@pytest.mark.parametrize("file", [file for file in sources() if not file.startswith(APART)])
def test_no_name_is_spelled_out_beside_the_registry(file: str) -> None:
    assert literals((PACKAGE / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('x = {"smtp.outcome": 1}', ["smtp.outcome"]),
        ('if event.name == "smtp.state.error":\n    pass', ["smtp.state.error"]),
        ('f(attributes["error.type"], "smtp.server.replies")', ["error.type", "smtp.server.replies"]),
        ('"""Tells smtp.outcome."""\nx = "smtp.outcomes"', []),
    ],
)
def test_a_name_that_is_spelled_out_is_found(source: str, found: list[str]) -> None:
    assert [name for _, name in literals(source)] == found
