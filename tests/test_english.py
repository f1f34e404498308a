"""What operators and engineers read is plain English, without words that send a reader back to the sentence's start."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
WORDS: Final = (
    "anew", "afresh", "hitherto", "thereof", "whoever", "whosoever", "whomever", "nobody else", "can be had", "be had",
    "in its stead", "by our fault", "of our fault", "tells? of", "told of", "telling of", "is it not", "given a rest",
    "bearable", "for ever", "what for", "a line a message", "a mail a",
)  # fmt: skip
# Of docstrings and comments: clauses as subjects, words for persons where a client, a peer or a process is meant, and
# paraphrases of the field's verbs.
CLAUSES: Final = (
    r"(?:^|(?<=[.:;] ))What (?:is|was|are|were|came|comes|has|had|can|may|does|did|no|befell|becomes|became|an?|others?"
    r"|another|both|it|this|its|their|they|we|there|stands|lies|waits|holds|happens|goes|arrives)\b",
    r"\bbefe?[al]ll?(?:s|en)?\b", r"\b(?:[Ss]ome|[Nn]o|[Aa]ny)body\b", r"\b[Ll]est\b", r"\bin clear\b", r"\bat hand\b",
    r"\bNone where\b", r"\bwhere (?:there|it) (?:is|are|has|was) (?:none|no)\b", r"\bcame to\b", r"\btimes a second\b",
    r"\b(?:came|come|comes) (?:of|to) (?:it|nothing)\b", r"\blooked at\b", r"\bbelieved\b", r"\bnowhere else\b",
    r"\b[Tt]he same of\b", r"\b[Ss]o many\b",
)  # fmt: skip
_FOUND: Final = re.compile(rf"\b(?:{'|'.join(WORDS)})\b", re.IGNORECASE)
_CLAUSE: Final = re.compile("|".join(CLAUSES))
_FOUND_OR_CLAUSE: Final = re.compile(f"(?i:{_FOUND.pattern})|{_CLAUSE.pattern}")
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


@pytest.mark.parametrize(
    "text",
    [
        "What is unknown is refused.", "Refused. What came before it counts.", "What befell a message.",
        "The reply; None where there is none.", "Lest it hangs.", "Note what an attempt came to.", "Nobody waits.",
        "Octets that were sent in clear.", "The exception at hand.", "So many wait.", "The same of a recipient.",
    ],
)  # fmt: skip
def test_a_clause_that_reads_as_if_translated_is_found(text: str) -> None:
    assert _CLAUSE.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "Unknown keys are refused.", "What to do next.", "Returns what remains.", "None if it is unknown.",
        "Octets sent in the clear.", "Not as many as asked for.", "No body.", "A best effort.", "Handles it.",
    ],
)  # fmt: skip
def test_a_plain_clause_passes(text: str) -> None:
    assert not _CLAUSE.search(text)


@pytest.mark.parametrize(
    ("where", "found"),
    [(documents, _FOUND), (spoken, _FOUND), (explained, _FOUND_OR_CLAUSE)],
    ids=["documents", "spoken", "explained"],
)
def test_texts_are_plain_english(where: Callable[[], Iterator[tuple[str, str]]], found: re.Pattern[str]) -> None:
    assert [(place, text) for place, text in where() if found.search(" ".join(text.split()).lstrip("# "))] == []


_SECTION_INSIDE: Final = re.compile(r"\S[ \t]+(?:-{5,}|(?:Args|Attributes|Raises|Returns|Yields):[ \t])")


def test_headings_and_sections_of_docstrings_have_lines_of_their_own() -> None:
    docstrings = [(where, text) for where, text in explained() if not text.startswith("#")]
    assert [(where, text[:60]) for where, text in docstrings if _SECTION_INSIDE.search(text)] == []
    assert _SECTION_INSIDE.search("Theory of operation ------ It works.")
    assert _SECTION_INSIDE.search("Do it. Raises: OSError: it cannot.")
    assert not _SECTION_INSIDE.search("Do it.\n\nRaises:\n    OSError: it cannot.")
