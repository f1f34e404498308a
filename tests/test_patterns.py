"""Every regular expression of the package: judged alike by every supported Python, in time that grows with its input.

CPython 3.11.2, which is Debian 12's, misjudges possessive groups: what the last, failed iteration consumed stays
consumed. The package therefore does without possessive quantifiers and atomic groups, and what they were for, a single
pass over hostile input, is seen to hold without them.
"""

import ast
import importlib
import itertools
import pkgutil
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

import otel_smtp
from otel_smtp.forwarding.routes import Routes
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.framing import HeaderSplitter

PACKAGE: Final = Path(otel_smtp.__file__).parent
OCTETS: Final = 64 * 1024
# Of this thread's own time: one pass takes milliseconds, a second one for each octet takes at least five seconds.
MOST_SECONDS: Final = 1.0

_ESCAPE_OR_CLASS: Final = re.compile(r"\\.|\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
_POSSESSIVE_OR_ATOMIC: Final = re.compile(r"[*+?}]\+|\(\?>")
_SEARCHING: Final = frozenset({"search", "findall", "finditer", "split", "sub", "subn"})


def holds_back_backtracking(pattern: str | bytes) -> bool:
    """Whether `pattern`, or a piece of one, has a possessive quantifier or an atomic group."""
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    return _POSSESSIVE_OR_ATOMIC.search(_ESCAPE_OR_CLASS.sub("x", text)) is not None


def findings(source: str) -> list[str]:
    """What a module's text does that only some Pythons judge rightly."""
    tree = ast.parse(source)
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    found = [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and id(node) not in prose
        if isinstance(node.value, str | bytes) and holds_back_backtracking(node.value)
    ]
    # What `fnmatch` and `glob` compile has atomic groups.
    imported = [
        (node.lineno, name)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    ]
    return found + [f"line {line}: imports {name}" for line, name in imported if name in {"fnmatch", "glob"}]


@dataclass(frozen=True)
class Compiled:
    """A pattern of a module, and whether the module searches with it, from any place and not only from the first."""

    where: str
    pattern: "re.Pattern[Any]"
    is_searched: bool


def compiled() -> Iterator[Compiled]:
    """The patterns that the package's modules keep."""
    for module_info in pkgutil.walk_packages(otel_smtp.__path__, "otel_smtp."):
        if module_info.name.endswith(".__main__"):
            continue
        module = importlib.import_module(module_info.name)
        patterns = {name: value for name, value in vars(module).items() if isinstance(value, re.Pattern)}
        if not patterns:
            continue
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        searched = {
            node.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr in _SEARCHING and isinstance(node.value, ast.Name)
        }
        for name, pattern in patterns.items():
            yield Compiled(f"{module_info.name}.{name}", pattern, name in searched)


COMPILED: Final = list(compiled())


@pytest.mark.parametrize(
    ("pattern", "is_bad"),
    [
        ("a*+", True),
        ("a++", True),
        ("a?+", True),
        ("a{2}+", True),
        ("(?:ab)*+", True),
        ("(?>ab)", True),
        (rb"[^\]x]++", True),
        ("++(?:-++", True),  # a piece of an f-string
        ("a+b", False),
        (r"\++", False),
        (r"\\+\+", False),
        ("[*+]", False),
        ("[]*+]", False),
        (r"[\]*+]", False),
        ("(?:ab)*", False),
        ("a*?", False),
    ],
)
def test_what_the_scan_finds(pattern: str | bytes, is_bad: bool) -> None:
    assert holds_back_backtracking(pattern) is is_bad


@pytest.mark.parametrize(
    ("source", "is_bad"),
    [
        ('P = re.compile("a*+")', True),
        ('def f(x):\n    return re.match(rf"{x}++b", "")', True),
        ("from fnmatch import translate", True),
        ("import fnmatch", True),
        ('"""Speaks of ``a++``."""', False),
        ('P = re.compile("a*b")', False),
    ],
)
def test_what_the_scan_of_a_module_finds(source: str, is_bad: bool) -> None:
    assert bool(findings(source)) is is_bad


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_has_a_possessive_or_atomic_pattern(path: Path) -> None:
    assert findings(path.read_text(encoding="utf-8")) == []


def test_no_compiled_pattern_is_possessive_or_atomic() -> None:
    assert len(COMPILED) > 40  # they are found at all
    assert [each.where for each in COMPILED if holds_back_backtracking(each.pattern.pattern)] == []


# Beginnings that lead into a pattern, what is then repeated, and an end that fits nothing.
BEGINNINGS: Final = (
    "", "a", "a.", "@a", '"', "[", "[a:", "a@", "a=", "PLAIN ", "MAIL FROM:<", "MAIL FROM:<a@", "RCPT TO:<a@", "A: b\n",
    "\ntraceparent", "\ntracestate:", "\nmessage-id:", "trace=", "i=",
)  # fmt: skip
REPEATED: Final = (
    "a", "a.", "a-", "-", ".", "..", "@", "@a,", "a@", "\\a", '"', '"\\a', "+2B", "+", " ", "a ", "\t", "\n", "\n ",
    "\n a", "A: b\n", ":", "a:", "::a.", "[", "=", "a=", "%", "0", "0.", ",", ",i=1", "ü", "\r", "\r\n", "\r\n.", "<",
    "\ntrace", "\ntraceparent:", "\nreceived\t",
)  # fmt: skip
ENDS: Final = ("", "\x00")


def seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


@pytest.mark.parametrize("each", COMPILED, ids=lambda each: each.where.removeprefix("otel_smtp."))
def test_a_hostile_input_costs_one_pass(each: Compiled) -> None:
    pattern = each.pattern
    for begin, repeated, end in itertools.product(BEGINNINGS, REPEATED, ENDS):
        text = begin + repeated * (OCTETS // len(repeated)) + end
        hostile: Any = text.encode() if isinstance(pattern.pattern, bytes) else text
        # Only what is repeated can be begun at often.
        searches = [pattern.search] if each.is_searched and not begin else []
        for way in (pattern.match, pattern.fullmatch, *searches):
            assert seconds(partial(way, hostile)) < MOST_SECONDS, (begin, repeated, end)


@pytest.mark.parametrize(
    "content",
    [
        b"a" * OCTETS,
        b"a:" * (OCTETS // 2),
        b"a: b\r\n" * (OCTETS // 6),
        b"a: b\r\n" + b" c\r\n" * (OCTETS // 4),
        b"a: b\r\n" + b" " * OCTETS,
        b"a" + b" " * OCTETS,
        b"\r\n" * (OCTETS // 2),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_hostile_header_block_costs_one_pass(content: bytes) -> None:
    def split() -> None:
        splitter = HeaderSplitter(2 * OCTETS, OCTETS)
        splitter.feed(content)
        splitter.finish()

    assert seconds(split) < MOST_SECONDS


@dataclass
class Row:
    senders: tuple[str, ...]
    recipients: tuple[str, ...] = ()


@pytest.mark.parametrize("pattern", ["*a*a*a*a*a*b", "*?*?*?*?*?*b", "*aaaaaaab", "*" * 50 + "b"])
def test_a_route_of_many_wildcards_costs_one_pass(pattern: str) -> None:
    routes = Routes([(Row((pattern,)), "up")])
    assert seconds(lambda: routes.for_mail(Mail("a" * OCTETS))) < MOST_SECONDS
    assert list(routes.for_mail(Mail("a" * OCTETS)).upstreams) == []
    assert len(routes.for_mail(Mail("a" * OCTETS + "b")).upstreams) == 1
