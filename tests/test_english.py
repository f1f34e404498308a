"""What operators and engineers read is plain English, without words that send a reader back to the sentence's start."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
WORDS: Final = (
    "anew", "afresh", "hitherto", "thereof", "whoever", "whosoever", "whomever", "nobody else", "can be had", "be had",
    "in its stead", "by our fault", "of our fault", "tells? of", "told of", "telling of", "is it not", "given a rest",
    "bearable", "for ever", "what for", "a line a message", "a mail a",
)  # fmt: skip
_FOUND: Final = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
_LOGGING: Final = frozenset({"debug", "info", "warning", "error", "critical", "exception", "log"})


def documents() -> Iterator[tuple[str, str]]:
    """Every document for operators; the reference among them holds the help of commands and the settings' meanings."""
    paths = [ROOT / "README.md", *sorted((ROOT / "deploy").rglob("*.md")), *sorted((ROOT / "deploy").rglob("*.1"))]
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f"{path.relative_to(ROOT)}:{number}", line


def _texts(node: ast.expr) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def spoken() -> Iterator[tuple[str, str]]:
    """The texts of log events, of replies, and of what commands print."""
    for path in sorted((ROOT / "otel_smtp").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in _LOGGING or name in ("_reply", "Reply", "echo", "fail") or name.endswith("Error"):
                for argument in node.args:
                    for text in _texts(argument):
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def explained() -> Iterator[tuple[str, str]]:
    """Docstrings and comments, which engineers read."""
    for path in sorted((ROOT / "otel_smtp").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        place = str(path.relative_to(ROOT))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield f"{place}:{token.start[0]}", token.string
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield f"{place}:{node.lineno}", node.value.value


def test_the_list_finds_what_it_is_for() -> None:
    assert _FOUND.search("The spool starts anew.")
    assert not _FOUND.search("The spool is empty; renewed certificates are used.")
    assert sum(1 for _ in spoken()) > 300


@pytest.mark.parametrize("where", [documents, spoken, explained])
def test_texts_are_plain_english(where: object) -> None:
    assert callable(where)
    found = [(place, text) for place, text in where() if _FOUND.search(text)]
    assert found == []


_SECTION_INSIDE: Final = re.compile(r"\S[ \t]+(?:-{5,}|(?:Args|Attributes|Raises|Returns|Yields):[ \t])")


def test_headings_and_sections_of_docstrings_have_lines_of_their_own() -> None:
    docstrings = [(where, text) for where, text in explained() if not text.startswith("#")]
    assert [(where, text[:60]) for where, text in docstrings if _SECTION_INSIDE.search(text)] == []
    assert _SECTION_INSIDE.search("Theory of operation ------ It works.")
    assert _SECTION_INSIDE.search("Do it. Raises: OSError: it cannot.")
    assert not _SECTION_INSIDE.search("Do it.\n\nRaises:\n    OSError: it cannot.")
