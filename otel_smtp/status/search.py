"""Searching traces: the query language, and matching it with traces.

    to:example.org code:5.1.1 text:"mailbox full" id:3577b34 deferred

Words are joined by "and". `to:` and `from:` mean recipients and senders, refused ones too; `code:` a reply code, a
class of them (`5xx`) or an enhanced code (`5.1.1`, or its beginning); `text:` what an upstream said, or why something
failed; `id:` any part of a trace id, Message-ID, queue id or connection id. A word without a field means any of these,
or any other text that a span or event carries: an outcome, upstream, listener, client, state. Case does not matter.

Spans hold mailboxes in the form that the operator's redaction allows. A searched address is therefore first converted
to this form: its domain, its hash, or nothing, and the answer says so.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, NamedTuple

from otel_smtp.telemetry import attributes as names


class Field(StrEnum):
    """The field of a word."""

    TO = "to"
    FROM = "from"
    CODE = "code"
    TEXT = "text"
    ID = "id"


class RecordedForm(NamedTuple):
    """What spans hold of a mailbox.

    Attributes:
        text: None: nothing.
        note: a remark for a search for a mailbox; "" for none.
    """

    text: str | None
    note: str = ""


RecordedMailbox = Callable[[str], RecordedForm]


class QueryWord(NamedTuple):
    """One word of a query, in lower case.

    Attributes:
        field: None: any.
        mailbox: the form of `text` for attributes with mailboxes; None: none.
    """

    field: Field | None
    text: str
    mailbox: str | None


class Query(NamedTuple):
    """A query: all of `words` must match.

    Attributes:
        notes: remarks on the search.
    """

    words: Sequence[QueryWord]
    notes: Sequence[str] = ()


QUERY_CHARACTERS: Final = 400  # two addresses of RFC 5321's longest kind are no query

_WORD: Final = re.compile(r'(?:(to|from|code|text|id):)?(?:"([^"]*)"?|(\S*))', re.IGNORECASE)
_CODE: Final = re.compile(r"[2-5]\d\d")
_CODE_CLASS: Final = re.compile(r"([2-5])(?:xx|yz)?")
_ENHANCED: Final = re.compile(r"[245]\.\d{1,3}(?:\.\d{1,3})?")
_HEXADECIMAL: Final = re.compile(r"[0-9a-f]{1,32}")

# For a word without `id:`; shorter ones, such as "fed", are words.
_LEAST_OF_AN_ID: Final = 6

# By prefixes of attributes' names, so that a new attribute of a family is found without a change here.
_FAMILIES: Final = (("smtp.rcpt.", Field.TO), ("smtp.mail.from.", Field.FROM))
_FIELDS: Final[Mapping[str, Field]] = {
    names.REPLY_CODE: Field.CODE,
    names.REPLY_ENHANCED_CODE: Field.CODE,
    names.REPLY_TEXT: Field.TEXT,
    names.FAILURE_REASON: Field.TEXT,
    names.ERROR_TYPE: Field.TEXT,
    names.MESSAGE_ID: Field.ID,
    names.SPOOL_ID: Field.ID,
    names.CONNECTION_ID: Field.ID,
}


def parse(query: str, recorded: RecordedMailbox = RecordedForm) -> Query:
    """Parse a query.

    Args:
        recorded: what spans hold of a mailbox.
    """
    words: list[QueryWord] = []
    notes: dict[str, None] = {}
    for field, quoted, bare in _WORD.findall(query[:QUERY_CHARACTERS]):
        text = (quoted or bare).lower()
        if not text:
            continue
        about = Field(field.lower()) if field else None
        mailbox: str | None = text
        if about in (None, Field.TO, Field.FROM):
            mailbox, note = recorded(text.strip("<>"))
            if note and (about is not None or "@" in text):
                notes[note] = None
        words.append(QueryWord(about, text, None if mailbox is None else mailbox.lower()))
    return Query(words, tuple(notes))


class TraceIndex:
    """The searchable text of one trace.

    Args:
        trace_id: in hexadecimal.
        carried: the attributes of its spans and events.
        more: other texts by which it may be found.
    """

    __slots__ = ("_codes", "_ids", "_texts", "_trace_id")

    def __init__(self, trace_id: str, carried: Iterable[Mapping[str, Any]], more: Iterable[str] = ()) -> None:
        codes: set[str] = set()
        texts: dict[Field | None, dict[str, None]] = {field: {} for field in (*Field, None)}
        texts[None].update((text.lower(), None) for text in more)
        for name, value in _values(carried):
            field = _field(name)
            if field is Field.CODE:
                codes.add(str(value))
            elif isinstance(value, str):
                texts[field][value.lower()] = None
        self._trace_id = trace_id
        self._codes = frozenset(codes)
        # One text for each field: looking through it is one call.
        self._texts = {field: "\n".join(found) for field, found in texts.items() if found}

    def has(self, query: Query) -> bool:
        """Whether the trace matches the query."""
        return all(map(self._has, query.words))

    def _has(self, word: QueryWord) -> bool:
        match word.field:
            case Field.CODE:
                return self._has_code(word.text)
            case Field.ID:
                return self._has_id(word.text)
            case Field.TO | Field.FROM as field:
                return self._has_mailbox(word, field)
            case Field.TEXT:
                return word.text in self._texts.get(Field.TEXT, "")
            case None if _CODE.fullmatch(word.text):
                return word.text in self._codes
            case None:
                return (
                    any(word.text in text for text in self._texts.values())
                    or any(self._has_mailbox(word, field) for field in (Field.TO, Field.FROM))
                    or (len(word.text) >= _LEAST_OF_AN_ID and self._has_id(word.text))
                    or (_ENHANCED.fullmatch(word.text) is not None and self._has_code(word.text))
                )

    def _has_mailbox(self, word: QueryWord, field: Field) -> bool:
        return word.mailbox is not None and word.mailbox in self._texts.get(field, "")

    def _has_code(self, text: str) -> bool:
        if (of_class := _CODE_CLASS.fullmatch(text)) is not None:
            return any(code[0] == of_class[1] for code in self._codes)
        # 5.1 is the beginning of 5.1.1, and not of 5.10.0.
        return text in self._codes or (
            _ENHANCED.fullmatch(text) is not None and any(code.startswith(f"{text}.") for code in self._codes)
        )

    def _has_id(self, text: str) -> bool:
        if text in self._texts.get(Field.ID, ""):
            return True
        # Backends print a trace id without its leading zeros, or with dashes, as a UUID.
        digits = text.replace("-", "")
        return _HEXADECIMAL.fullmatch(digits) is not None and digits in self._trace_id


def _field(name: str) -> Field | None:
    """The field of an attribute."""
    known = _FIELDS.get(name)
    if known is not None:
        return known
    return next((field for family, field in _FAMILIES if name.startswith(family)), None)


def _values(carried: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for attributes in carried:
        for name, value in attributes.items():
            if isinstance(value, (list, tuple)):
                for each in value:
                    yield name, each
            else:
                yield name, value
