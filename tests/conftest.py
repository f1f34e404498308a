"""What all tests share: the event loops that they run on, and which of them wait for a long run."""

import asyncio
import logging
import os
from collections.abc import Callable, Generator, Mapping

import pytest
import uvloop
from hypothesis import HealthCheck, is_hypothesis_test, settings

from tests.support import skipped
from tests.support.clock import MovableClockLoop

# A deadline measures the machine's other tenants. A run decides about a change, so that each tries the same examples;
# the long profile, for a night or a change of the engine, tries others each time. Whatever fails says by which line it
# is made again.
settings.register_profile(
    "default",
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("long", parent=settings.get_profile("default"), max_examples=5000, derandomize=False)
settings.load_profile("default")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long tests too, as CI=true does")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "movable_clock: run on a loop whose clock the test moves")
    config.addinivalue_line(
        "markers", "long: takes seconds, as it kills, crowds or outlasts processes, or tries each case by a program"
    )
    config.addinivalue_line("markers", "both_loops: run once on asyncio's own event loop and once on uvloop")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)) and item.get_closest_marker("timeout") is None:
            # What fails is made small before it is shown, for up to five minutes; cut short, it is not shown at all.
            item.add_marker(pytest.mark.timeout(9 * settings().max_examples))
    is_named = any("::" in argument for argument in config.args)
    if os.environ.get("CI") or config.option.long or is_named:
        return
    waits = pytest.mark.skip(reason="a long test; CI=true and --long run them")
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker(waits)


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, LoopFactory]:
    if item.get_closest_marker("both_loops") is not None:
        return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
    if item.get_closest_marker("movable_clock") is not None:
        return {"movable": MovableClockLoop}
    return {"asyncio": asyncio.new_event_loop}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Leave logging as it was: a command that a test runs in this process sets it up for itself."""
    root, ours = logging.getLogger(), logging.getLogger("otel_smtp")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    try:
        return (yield)
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Say last what was not tested here."""
    yield
    reports = terminalreporter.stats.get("skipped", ())
    if said := skipped.lines(report.longrepr[2] for report in reports):
        terminalreporter.section("not tested here")
        for line in said:
            terminalreporter.write_line(line)
