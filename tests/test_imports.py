"""The layering of the house, checked on the syntax trees of the package.

Who may import whom is one table, `ROOMS`. Every import counts: at the head of a file, inside a function, under
`TYPE_CHECKING`, by `importlib.import_module`. A refused import is a question of the design, to be answered there and
not by widening a row here.

The checks are functions from source text to findings, so that each of them is shown to fail on a small bad source
before it is trusted with the package.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
PACKAGE: Final = "otel_smtp"

# What of SMTP the other rooms may know without speaking it.
SMTP_TYPES: Final = tuple(
    f"otel_smtp.smtp.{module}"
    for module in ("characters", "envelope", "errors", "events", "replies", "states", "extensions", "parameters")
)
# Standard library without a clock, socket, file, logger, thread or event loop.
PURE_LIBRARY: Final = frozenset(
    {
        "abc",
        "base64",
        "binascii",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "hmac",
        "ipaddress",
        "itertools",
        "operator",
        "re",
        "string",
        "struct",
        "types",
        "typing",
        "unicodedata",
        "weakref",
    }
)
# What of the spool its stores may know.
SPOOL_TYPES: Final = tuple(
    f"otel_smtp.spool.{module}" for module in ("drafting", "encoding", "messages", "operators", "promises", "store")
)
INPUT_OUTPUT: Final = frozenset(
    {
        "asyncio",
        "concurrent",
        "http",
        "multiprocessing",
        "selectors",
        "socket",
        "ssl",
        "subprocess",
        "threading",
        "urllib",
    }
)
_LIBRARY: Final = frozenset(sys.stdlib_module_names)


@dataclass(frozen=True)
class Room:
    """What the modules of one room may import.

    Attributes:
        house: prefixes of our own modules, the room itself aside.
        libraries: packages that are not of the standard library; None: any.
        standard: modules of the standard library.
        reads_environment: `os.environ` may be read.
        stands_apart: knows nothing of the modules beside it, though they share a package with it.
        is_relocatable: its modules import each other by relative names, as they are installed under a second name too.
    """

    house: tuple[str, ...]
    libraries: frozenset[str] | None = frozenset()
    standard: frozenset[str] = _LIBRARY - {"argparse"}
    reads_environment: bool = False
    stands_apart: bool = False
    is_relocatable: bool = False


_EVERYTHING: Final = Room((PACKAGE,), None, _LIBRARY, reads_environment=True)
_ADAPTER: Final = ("otel_smtp.smtp", "otel_smtp.observing", "otel_smtp.net", "otel_smtp.forwarding.base")

# The longest prefix that fits a module is its room.
ROOMS: Final = {
    # Besides the gateway, the errors that programs which embed it may want to catch.
    "otel_smtp": Room(
        (
            "otel_smtp.gateway",
            "otel_smtp.config",
            "otel_smtp.observing",
            "otel_smtp.net",
            "otel_smtp.server.tls",
            "otel_smtp.server.errors",
            "otel_smtp.spool.messages",
            "otel_smtp.telemetry.environment",
            *SMTP_TYPES,
        )
    ),
    "otel_smtp.smtp": Room((), standard=PURE_LIBRARY),
    # Records note times; the fan-out reads hooks off the interface, and suggests one for a misspelt name.
    "otel_smtp.observing": Room(SMTP_TYPES, standard=PURE_LIBRARY | {"difflib", "inspect", "logging", "time"}),
    "otel_smtp.net": Room(("otel_smtp.observing", *SMTP_TYPES)),
    "otel_smtp.forwarding.base": Room(("otel_smtp.observing", *SMTP_TYPES), standard=PURE_LIBRARY, stands_apart=True),
    "otel_smtp.forwarding": Room(_ADAPTER, frozenset({"httpx", "scramp"})),
    "otel_smtp.server": Room(_ADAPTER, frozenset({"argon2", "scramp"})),
    "otel_smtp.spool": Room(_ADAPTER),
    "otel_smtp.spool.outcomes.posting": Room(_ADAPTER, frozenset({"httpx"})),
    # Two stores that know nothing of each other; no other room knows which one there is.
    "otel_smtp.spool.embedded": Room((*_ADAPTER, *SPOOL_TYPES), stands_apart=True),
    "otel_smtp.spool.postgresql": Room((*_ADAPTER, *SPOOL_TYPES), frozenset({"asyncpg"}), stands_apart=True),
    # What of a peer's words may be shown is one decision for the gateway and for what applications install.
    "otel_smtp.telemetry": Room(
        ("otel_smtp.observing", "otel_smtp.client.reply_words", *SMTP_TYPES),
        frozenset({"opentelemetry", "prometheus_client", "structlog", "google"}),
    ),
    # The way to a collector: its libraries are imported by the thread that exports.
    "otel_smtp.telemetry.collector": Room((), frozenset({"grpc", "httpx", "google", "opentelemetry"})),
    # What applications import: nothing of the gateway, and of OpenTelemetry the API and the base class of
    # instrumentors. A module that replaces methods imports the library whose they are.
    "otel_smtp.client": Room((), frozenset({"opentelemetry"}), is_relocatable=True),
    "otel_smtp.client.reply_words": Room((), standard=PURE_LIBRARY | {"contextlib"}, stands_apart=True),
    "otel_smtp.client.instrumentor": Room(
        (), frozenset({"opentelemetry", "wrapt"}), reads_environment=True, is_relocatable=True
    ),
    "otel_smtp.client.aiosmtplib_instrumentor": Room(
        (), frozenset({"opentelemetry", "aiosmtplib"}), is_relocatable=True
    ),
    # Applications' tests: the gateway as every program that embeds it sees it.
    "otel_smtp.testing": Room(("otel_smtp.Gateway", "otel_smtp.load")),
    "otel_smtp.testing.running_gateway": Room(("otel_smtp.Gateway", "otel_smtp.load"), reads_environment=True),
    "otel_smtp.testing.plugin": Room((), frozenset({"pytest"})),
    "otel_smtp.telemetry.metric_export": Room(("otel_smtp.telemetry",), frozenset({"opentelemetry"})),
    "otel_smtp.telemetry.log_export": Room(("otel_smtp.telemetry",)),
    # It hides a variable from the SDK while that is imported, and reads none.
    "otel_smtp.telemetry.sdk": Room((), frozenset({"opentelemetry"}), reads_environment=True),
    # The one reading of the OTEL_* variables.
    "otel_smtp.telemetry.environment": Room(
        ("otel_smtp.telemetry",), frozenset({"opentelemetry"}), reads_environment=True
    ),
    "otel_smtp.telemetry.setup": Room(
        ("otel_smtp.observing", "otel_smtp.telemetry", *SMTP_TYPES), frozenset({"opentelemetry"})
    ),
    # The names alone, which know nothing of the libraries: rooms that show telemetry read them there.
    "otel_smtp.telemetry.attributes": Room(("otel_smtp.observing", *SMTP_TYPES)),
    "otel_smtp.status": Room(
        ("otel_smtp.observing", "otel_smtp.telemetry.attributes", *SMTP_TYPES),
        frozenset({"starlette", "uvicorn", "httpx"}),
    ),
    "otel_smtp.config": Room(
        ("otel_smtp.observing", "otel_smtp.smtp.paths", *SMTP_TYPES),
        frozenset({"msgspec"}),
        _LIBRARY - INPUT_OUTPUT - {"argparse"},
    ),
    # What people type; each command may use the rooms that it is about.
    "otel_smtp.commands": _EVERYTHING,
    # What people see in a terminal; it draws values and asks nobody for more.
    "otel_smtp.commands.terminal": Room(
        ("otel_smtp.telemetry.attributes",),
        frozenset({"rich"}),
        _LIBRARY - INPUT_OUTPUT - {"argparse"},
        stands_apart=True,
    ),
    # A client that only measures: it shares nothing with the engine, lest a fault of ours hide from its own measure.
    "otel_smtp.commands.load_generator": Room((), standard=_LIBRARY - {"argparse"}, stands_apart=True),
    "otel_smtp.gateway": _EVERYTHING,
    # Processes, signals and a pipe; what a worker does is given in.
    "otel_smtp.gateway.workers": Room(
        ("otel_smtp.gateway.supervision", "otel_smtp.gateway.signals"), stands_apart=True
    ),
    # What a supervisor decides: no process, pipe or clock.
    "otel_smtp.gateway.supervision": Room((), standard=PURE_LIBRARY | {"logging", "signal"}, stands_apart=True),
    "otel_smtp.gateway.signals": Room((), stands_apart=True),
    # One datagram to the service manager.
    "otel_smtp.gateway.systemd": Room((), stands_apart=True),
    "otel_smtp.__main__": Room(("otel_smtp.commands.cli",)),
}
BANNED_NAMES: Final = ("util", "utils", "helper", "helpers", "manager", "managers", "common", "misc")


class Finding(NamedTuple):
    """One broken rule."""

    module: str
    line: int
    what: str


class Import(NamedTuple):
    """One name that an import statement, or a call that imports, brings in."""

    name: str
    line: int
    level: int = 0  # of a relative import: 1 is the module's own package


def is_within(name: str, prefix: str) -> bool:
    """Whether the module or attribute `name` is `prefix` or lies below it."""
    return name == prefix or name.startswith(f"{prefix}.")


def room_of(module: str) -> Room | None:
    """The room with the longest prefix; the bare package's row is for its `__init__` alone."""
    fitting = [prefix for prefix in ROOMS if is_within(module, prefix) and (prefix != PACKAGE or module == PACKAGE)]
    return ROOMS[max(fitting, key=len)] if fitting else None


def home_of(module: str) -> str:
    """The prefix that a room's modules share: what they may always import."""
    parts = module.split(".")
    return ".".join(parts[:2])


def imports_of(tree: ast.AST) -> Iterator[Import]:
    """Every import of a module, wherever it stands; `from a import b` gives a.b, as b may be a module."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, node.lineno)
            case ast.ImportFrom(module=source, names=names, level=level):
                for alias in names:
                    yield Import(f"{source}.{alias.name}" if source else alias.name, node.lineno, level)
            case ast.Call(func=ast.Name(id="__import__") | ast.Attribute(attr="import_module"), args=[first, *_]):
                # A computed name can't be judged, so it is judged as the whole package.
                name = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else PACKAGE
                yield Import(name, node.lineno)


def layering(module: str, tree: ast.AST) -> Iterator[Finding]:
    """Imports that the module's room may not make."""
    room = room_of(module)
    if room is None:
        yield Finding(module, 1, "belongs to no room of the house")
        return
    for name, line, level in imports_of(tree):
        top = name.partition(".")[0]
        if level:
            if not (room.is_relocatable and level == 1):
                yield Finding(module, line, "relative import")
        elif room.is_relocatable and top == PACKAGE:
            yield Finding(module, line, f"imports {name}")
        elif top in (PACKAGE, "tests"):
            if top == "tests" or not may_import(module, room, name):
                yield Finding(module, line, f"imports {name}")
        elif top in _LIBRARY:
            if top not in room.standard and name not in _VALUES:
                yield Finding(module, line, f"imports {name}")
        elif room.libraries is not None and top not in room.libraries:
            yield Finding(module, line, f"imports {name}")


# A date is a value, and a codec a function of octets; what is beside them in their modules is a clock, and files.
_VALUES: Final = frozenset({"datetime.date", "io.IncrementalNewlineDecoder"})


def may_import(module: str, room: Room, name: str) -> bool:
    """Whether `module` may import our own `name`."""
    own = next(prefix for prefix, other in ROOMS.items() if other is room) if room.stands_apart else home_of(module)
    if own != PACKAGE and is_within(name, own):
        return True
    return any(is_within(name, prefix) for prefix in room.house)


def environment(module: str, tree: ast.AST) -> Iterator[Finding]:
    """Readings of the environment outside the rooms that may."""
    room = room_of(module)
    if room is None or room.reads_environment:
        return
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "environb" | "getenv" | "putenv" as attribute):
                yield Finding(module, node.lineno, f"reads os.{attribute}")
            case ast.ImportFrom(module="os", names=names):
                for alias in names:
                    if alias.name in ("environ", "environb", "getenv", "putenv"):
                        yield Finding(module, node.lineno, f"reads os.{alias.name}")


def sdk_tracing(module: str, tree: ast.AST) -> Iterator[Finding]:
    """Imports of the SDK's tracing that may be the first: it raises at a variable that it cannot use."""
    if module == "otel_smtp.telemetry.sdk" or not is_within(module, PACKAGE):
        return
    for each in imports_of(tree):
        if is_within(each.name, "opentelemetry.sdk.trace") and not is_within(
            each.name, "opentelemetry.sdk.trace.export"
        ):
            yield Finding(module, each.line, f"imports {each.name}")


def awaiting(module: str, tree: ast.AST) -> Iterator[Finding]:
    """Coroutines in the value machine."""
    if not is_within(module, "otel_smtp.smtp"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncFor | ast.AsyncWith):
            yield Finding(module, node.lineno, "awaits")


def clocks(module: str, tree: ast.AST) -> Iterator[Finding]:
    """Dates read off a clock in the value machine."""
    if not is_within(module, "otel_smtp.smtp"):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "today":
            yield Finding(module, node.lineno, "reads a clock by today")


# Documented, and public in spite of their names.
PUBLIC_ALL_THE_SAME: Final = frozenset({"_asdict", "_exit", "_fields", "_replace"})


def is_private(name: str) -> bool:
    """Whether a name is somebody's own business; `__dunder__` names are the language's."""
    if name in PUBLIC_ALL_THE_SAME:
        return False
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def _own_private_names(tree: ast.AST) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                names.add(name)
    return frozenset(names)


def foreign_privates(module: str, tree: ast.AST) -> Iterator[Finding]:
    """Uses of a private name that this file does not define: asyncio's, a library's, another module's."""
    own = _own_private_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super"))):
                pass
            case ast.Attribute(attr=attribute) if is_private(attribute) and attribute not in own:
                yield Finding(module, node.lineno, f"touches {attribute}")
            case ast.ImportFrom(names=names) | ast.Import(names=names):
                for alias in names:
                    if any(is_private(part) for part in alias.name.split(".")):
                        yield Finding(module, node.lineno, f"imports {alias.name}")
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"), args=[_, ast.Constant(value=str(name)), *_]
            ):
                if is_private(name) and name not in own:
                    yield Finding(module, node.lineno, f"touches {name}")


def naming(module: str, tree: ast.AST) -> Iterator[Finding]:
    """Names that say nothing."""
    for part in module.split("."):
        if any(word in BANNED_NAMES for word in part.split("_")):
            yield Finding(module, 1, f"is named {part}")


CHECKS: Final = (layering, environment, sdk_tracing, awaiting, clocks, foreign_privates, naming)


def check(module: str, source: str) -> list[Finding]:
    """All findings in one module's source."""
    tree = ast.parse(source)
    return [finding for checking in CHECKS for finding in checking(module, tree)]


def module_name(path: Path) -> str:
    """The dotted name of a file below the repository's root."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES: Final = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_keeps_to_its_room(module: str) -> None:
    assert check(module, SOURCES[module].read_text(encoding="utf-8")) == []


def test_modules_of_the_tests_have_names_that_say_something() -> None:
    paths = (ROOT / "tests").rglob("*.py")
    assert [finding for path in paths for finding in naming(module_name(path), ast.Module([], []))] == []


def test_the_package_tells_what_each_of_its_rooms_is_for() -> None:
    told = ast.get_docstring(ast.parse((ROOT / PACKAGE / "__init__.py").read_text(encoding="utf-8"))) or ""
    rooms = [path.parent.name for path in (ROOT / PACKAGE).glob("*/__init__.py")]
    assert [room for room in rooms if f"`{room}" not in told] == []
    named = {name for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)[`.]", told) if name.split(".")[0] in rooms}
    known = {module.removeprefix(f"{PACKAGE}.") for module in SOURCES}
    assert {name for name in named if name not in known} == set()


def test_no_two_public_classes_of_the_package_share_a_name() -> None:
    homes = defaultdict(list)
    for module, path in SOURCES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not is_private(node.name):
                homes[node.name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_every_room_of_the_table_is_one_that_a_module_can_be_in() -> None:
    assert all(room_of(prefix) is room for prefix, room in ROOMS.items())


GOOD = [
    ("otel_smtp.smtp.server", "from otel_smtp.smtp import replies\nimport re\nfrom collections import deque"),
    ("otel_smtp.smtp.server", "class A:\n    def f(self, other):\n        self._x = other._x"),
    ("otel_smtp.smtp.received", "from datetime import date\nx = date.fromordinal(1)"),
    ("otel_smtp.smtp.framing", "from io import IncrementalNewlineDecoder"),
    ("otel_smtp.smtp.client", "def f(values):\n    return values._replace(x=1)"),
    ("otel_smtp.server.connection", "from otel_smtp.forwarding.base import Forwarder\nimport asyncio"),
    ("otel_smtp.server.connection", "from otel_smtp import net\nfrom otel_smtp.server import tls"),
    ("otel_smtp.forwarding.pool", "from otel_smtp.forwarding.connection import Connection\nimport time"),
    ("otel_smtp.forwarding.connection", "from otel_smtp.smtp.client import ClientProtocol"),
    ("otel_smtp.telemetry.tracing", "def f():\n    from opentelemetry import trace"),
    ("otel_smtp.telemetry.environment", "import os\nx = os.environ['OTEL_TRACES_EXPORTER']"),
    ("otel_smtp.gateway.wiring", "from otel_smtp.config import Config\nfrom otel_smtp.telemetry.setup import start"),
    ("otel_smtp", "from otel_smtp.gateway import Gateway\nfrom otel_smtp.smtp.states import ConnState"),
    ("otel_smtp.client.message_span", "from . import names\nfrom opentelemetry import trace"),
]


@pytest.mark.parametrize(("module", "source"), GOOD)
def test_what_the_design_allows_is_allowed(module: str, source: str) -> None:
    assert check(module, source) == []


BAD = [
    # the value machine: no clock, socket, logger, loop, file, and nothing of the house above it
    ("otel_smtp.smtp.server", "import asyncio", "imports asyncio"),
    ("otel_smtp.smtp.server", "import time", "imports time"),
    ("otel_smtp.smtp.server", "from logging import getLogger", "imports logging.getLogger"),
    ("otel_smtp.smtp.server", "from datetime import datetime", "imports datetime.datetime"),
    ("otel_smtp.smtp.server", "import datetime", "imports datetime"),
    ("otel_smtp.smtp.server", "from io import FileIO", "imports io.FileIO"),
    ("otel_smtp.smtp.server", "import scramp", "imports scramp"),
    ("otel_smtp.smtp.server", "from otel_smtp.observing import TlsInfo", "imports otel_smtp.observing.TlsInfo"),
    ("otel_smtp.smtp.server", "async def f() -> None: ...", "awaits"),
    ("otel_smtp.smtp.received", "from datetime import date\nx = date.today()", "reads a clock by today"),
    # an import is an import wherever it stands
    ("otel_smtp.smtp.server", "def f():\n    import socket", "imports socket"),
    (
        "otel_smtp.smtp.server",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ssl",
        "imports ssl",
    ),
    ("otel_smtp.smtp.server", "import importlib\n", "imports importlib"),
    ("otel_smtp.server.tls", "import importlib\nimportlib.import_module('opentelemetry')", "imports opentelemetry"),
    ("otel_smtp.server.tls", "__import__('argparse')", "imports argparse"),
    ("otel_smtp.server.tls", "import importlib\nimportlib.import_module(name)", "imports otel_smtp"),
    ("otel_smtp.smtp.server", "from . import replies", "relative import"),
    ("otel_smtp.server.listener", "from .connection import Connection", "relative import"),
    (
        "otel_smtp.telemetry.sampling",
        "from opentelemetry.sdk.trace.sampling import Sampler",
        "imports opentelemetry.sdk.trace.sampling.Sampler",
    ),
    # the adapters do not know one another
    (
        "otel_smtp.server.connection",
        "from otel_smtp.forwarding.pool import Pool",
        "imports otel_smtp.forwarding.pool.Pool",
    ),
    ("otel_smtp.server.connection", "from otel_smtp.forwarding import pool", "imports otel_smtp.forwarding.pool"),
    ("otel_smtp.server.connection", "import otel_smtp.spool.store", "imports otel_smtp.spool.store"),
    (
        "otel_smtp.spool.runner",
        "from otel_smtp.forwarding.upstream import X",
        "imports otel_smtp.forwarding.upstream.X",
    ),
    ("otel_smtp.forwarding.upstream", "from otel_smtp.server import tls", "imports otel_smtp.server.tls"),
    (
        "otel_smtp.forwarding.base",
        "from otel_smtp.forwarding.pool import Pool",
        "imports otel_smtp.forwarding.pool.Pool",
    ),
    # two stores, one interface
    (
        "otel_smtp.spool.postgresql.store",
        "from otel_smtp.spool.embedded import EmbeddedStore",
        "imports otel_smtp.spool.embedded.EmbeddedStore",
    ),
    ("otel_smtp.spool.embedded.store", "import asyncpg", "imports asyncpg"),
    ("otel_smtp.spool.runner", "import asyncpg", "imports asyncpg"),
    ("otel_smtp.telemetry.tracing", "from otel_smtp.smtp.server import X", "imports otel_smtp.smtp.server.X"),
    ("otel_smtp.status.pages", "from otel_smtp.telemetry import tracing", "imports otel_smtp.telemetry.tracing"),
    ("otel_smtp.observing", "from otel_smtp.smtp.server import X", "imports otel_smtp.smtp.server.X"),
    ("otel_smtp.observing", "import asyncio", "imports asyncio"),
    # one room knows OpenTelemetry; each library has its room
    ("otel_smtp.server.connection", "from opentelemetry import trace", "imports opentelemetry.trace"),
    ("otel_smtp.status.pages", "import opentelemetry.sdk", "imports opentelemetry.sdk"),
    ("otel_smtp.server.connection", "import starlette", "imports starlette"),
    # what is installed under two names knows neither
    (
        "otel_smtp.client",
        "from otel_smtp.client.trace_headers import inject",
        "imports otel_smtp.client.trace_headers.inject",
    ),
    ("otel_smtp.client.message_span", "from otel_smtp.smtp import replies", "imports otel_smtp.smtp.replies"),
    ("otel_smtp.client.message_span", "from ..smtp import replies", "relative import"),
    ("otel_smtp.client.message_span", "import aiosmtplib", "imports aiosmtplib"),
    # settings stay above
    ("otel_smtp.server.connection", "from otel_smtp.config import Config", "imports otel_smtp.config.Config"),
    ("otel_smtp.telemetry.setup", "from otel_smtp import config", "imports otel_smtp.config"),
    ("otel_smtp.spool.store", "from otel_smtp.gateway import Gateway", "imports otel_smtp.gateway.Gateway"),
    ("otel_smtp.spool.store", "import argparse", "imports argparse"),
    ("otel_smtp.spool.store", "import os\nx = os.environ.get('X')", "reads os.environ"),
    ("otel_smtp.spool.store", "import os\nx = os.getenv('X')", "reads os.getenv"),
    ("otel_smtp.spool.store", "from os import environ", "reads os.environ"),
    ("otel_smtp.telemetry.tracing", "import os\nx = os.environ['OTEL_X']", "reads os.environ"),
    ("otel_smtp.telemetry.setup", "import os\nx = os.environ['OTEL_X']", "reads os.environ"),
    ("otel_smtp.config", "import socket", "imports socket"),
    ("otel_smtp.gateway.wiring", "import tests.support", "imports tests.support"),
    (
        "otel_smtp.commands.terminal.words",
        "from otel_smtp.commands import send",
        "imports otel_smtp.commands.send",
    ),
    # other people's privates
    ("otel_smtp.net", "def f(transport):\n    return transport._sock", "touches _sock"),
    ("otel_smtp.net", "def f(transport):\n    return getattr(transport, '_loop')", "touches _loop"),
    ("otel_smtp.net", "from asyncio.sslproto import _SSLProtocolTransport", "imports _SSLProtocolTransport"),
    ("otel_smtp.net", "def f(self):\n    return self.transport._ssl_protocol", "touches _ssl_protocol"),
    # names, rooms
    ("otel_smtp.server.utils", "", "is named utils"),
    ("otel_smtp.server.connection_manager", "", "is named connection_manager"),
    ("otel_smtp.shed", "", "belongs to no room of the house"),
]


@pytest.mark.parametrize(("module", "source", "finding"), BAD)
def test_what_the_design_forbids_is_found(module: str, source: str, finding: str) -> None:
    assert [found.what for found in check(module, source)] == [finding]
