"""Re-encoding 8-bit content as 7-bit, part by part, for an upstream without 8BITMIME (RFC 6152 3, RFC 2045 6).

Each part with octets above 127 gets an encoding that 7-bit transport preserves: quoted-printable for text, base64 for
all else. Decoded, the content is the same octets. Parts that are already 7-bit stay unchanged; but a signature over the
message (DKIM) does not survive any change.

The header of a part, which must name the encoding, comes before its octets. So a message is read twice: by a `Survey`,
then by a `Reencoder`, which learns from it what to change. Both take octets in pieces of any size, hold no more than a
header or a line and one octet per part, and take time in proportion to the length.

Content that would not be the same message afterwards is refused: see `CannotReencode`.
"""

import re
from abc import ABC, abstractmethod
from binascii import b2a_base64
from collections.abc import Iterator, Sequence
from typing import Final

MOST_DEPTH: Final = 100
"""Nesting of multiparts and messages; Postfix's `mime_nesting_limit`."""
MOST_HEADER_OCTETS: Final = 1024 * 1024
"""Of the header of a message or part."""
MOST_BOUNDARY_OCTETS: Final = 256
"""RFC 2046 5.1.1 allows 70."""

_LINE_OCTETS: Final = 76  # of an encoded line (RFC 2045 6.7, 6.8)
_BASE64_OCTETS: Final = 57  # input for a line of that length
_IDENTITY: Final = frozenset({b"", b"7bit", b"8bit", b"binary"})

_FIELD: Final = re.compile(rb"[!-9;-~]+[ \t]*:")
_MEDIA_TYPE: Final = re.compile(rb"[ \t\r\n]*([!#$%&'*+.^_`{|}~0-9A-Za-z-]+/[!#$%&'*+.^_`{|}~0-9A-Za-z-]+)")
_PARAMETER: Final = re.compile(rb';([^=;"]*)=[ \t\r\n]*("(?:[^"\\]|\\.)*"|[^\s;"]*)', re.DOTALL)
_ENCODING: Final = re.compile(rb"[ \t\r\n]*([0-9A-Za-z-]*)")
_QUOTED_PAIR: Final = re.compile(rb"\\(.)", re.DOTALL)
# Octets that quoted-printable must encode. Two hyphens at the beginning of a line need not be, but readers that compare
# too little of a line would take them for the end of the part.
_UNSAFE: Final = re.compile(rb"[^\t -<>-~]|[\t ]\Z|\A-(?=-)")
_HEX: Final = tuple(b"=%02X" % octet for octet in range(256))
_ABOVE_127: Final = bytes(octet if octet < 128 else ord("?") for octet in range(256))


class CannotReencode(ValueError):
    """A message cannot be made 7-bit without becoming another message; the text says why.

    It has 8-bit octets in a header field, in a part that is signed or encrypted (RFC 1847 2.1: must not be changed in
    transit), in one whose named encoding does not allow them, or in one whose type must not be encoded; or it is not
    clear where its parts begin.
    """


class _Entity:
    """A message, or a part of one.

    Attributes:
        encoding: its named encoding, in lower case; b"" without one.
        boundary: of a multipart whose parts must be inspected; None for all others.
        is_message: its header is that of a message.
        holds_message: its body begins with the header of another message.
        opaque: why nothing in it can be encoded; None: it can be.
    """

    __slots__ = (
        "boundary", "encoding", "has_type", "has_version", "holds_message", "is_digest", "is_message", "is_text",
        "lines", "number", "opaque",
    )  # fmt: skip

    def __init__(self, number: int, *, is_message: bool) -> None:
        self.number = number
        self.is_message = is_message
        self.lines: list[bytes] = []  # of its header, with line ends
        self.encoding = b""
        self.has_type = self.has_version = self.is_text = self.is_digest = self.holds_message = False
        self.boundary: bytes | None = None
        self.opaque: str | None = None

    def read(self, usual_type: bytes) -> None:
        """Read the header's fields about the body.

        Args:
            usual_type: the type if the header names none.
        """
        fields: dict[bytes, list[bytes]] = {b"content-type": [], b"content-transfer-encoding": [], b"mime-version": []}
        for name, value in _fields(self.lines):
            fields.get(name, []).append(value)
        types, encodings = fields[b"content-type"], fields[b"content-transfer-encoding"]
        self.has_type, self.has_version = bool(types), bool(fields[b"mime-version"])
        if len(types) > 1 or len(encodings) > 1:
            self.opaque = "a part says twice what it is"
        if encodings and (found := _ENCODING.match(encodings[0])) is not None:
            self.encoding = found[1].lower()
        value = types[0] if types else usual_type
        named = _MEDIA_TYPE.match(value)
        media_type = b"text/plain" if named is None else named[1].lower()  # RFC 2045 5.2
        self.is_text = media_type.startswith(b"text/")
        if self.opaque is None:
            self._read_type(media_type, value)

    def _read_type(self, media_type: bytes, value: bytes) -> None:
        if media_type in (b"multipart/signed", b"multipart/encrypted"):
            self.opaque = "a part is signed or encrypted"
        elif self.encoding not in _IDENTITY:
            self.opaque = "a part has octets that its encoding does not allow"
        elif media_type.startswith(b"multipart/"):
            self.is_digest = media_type == b"multipart/digest"
            self.boundary = _boundary_of(value)
            if self.boundary is None:
                self.opaque = "a multipart has no boundary"
        elif media_type == b"message/rfc822":
            self.holds_message = True
        elif media_type.startswith(b"message/global"):
            self.is_text = True  # RFC 6532 3.7: any encoding
        elif media_type.startswith(b"message/"):
            self.opaque = "a part is of a type that may not be encoded"  # RFC 2045 6.4


def _fields(lines: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """The fields of a header: name in lower case, value still folded."""
    field: list[bytes] = []
    for line in (*lines, b"-:"):
        if line[:1] in b" \t" and field:
            field.append(line)
            continue
        if field:
            name, _, value = b"".join(field).partition(b":")
            yield name.rstrip(b" \t").lower(), value
        field = [line]


def _boundary_of(value: bytes) -> bytes | None:
    for found in _PARAMETER.finditer(value):
        if found[1].strip().lower() == b"boundary":
            boundary = found[2]
            if boundary.startswith(b'"'):
                boundary = _QUOTED_PAIR.sub(rb"\1", boundary[1:-1])
            boundary = boundary.rstrip(b" \t")
            return boundary if 0 < len(boundary) <= MOST_BOUNDARY_OCTETS and b"\n" not in boundary else None
    return None


class _Reading(ABC):
    """Finds the parts of a message, and assigns each line to one.

    A subclass receives headers (`_begin`), lines of content (`_take`) and the lines between the parts (`_pass`).
    """

    def __init__(self) -> None:
        self._held: list[bytes] = []  # the beginning of a line
        self._count = 0  # of entities
        self._open: list[tuple[_Entity, int]] = []  # multiparts, each with its depth
        self._boundaries: dict[bytes, list[tuple[int, bool]]] = {}  # lines and their owners, the innermost last
        self._path: list[_Entity] = []  # the entities around the current line, the whole message first
        self._header: _Entity | None = None  # whose header is being read
        self._header_octets = 0
        self._expect_header(is_message=True)

    def _read(self, data: bytes) -> None:
        """Read some octets of the message."""
        if b"\r\n" not in data and not data.startswith(b"\n"):
            self._held.append(data)
            return
        lines = b"".join((*self._held, data)).split(b"\r\n")
        self._held = [lines.pop()]
        for line in lines:
            self._line(line, b"\r\n")

    def _end(self) -> None:
        """The message is complete."""
        if rest := b"".join(self._held):
            self._line(rest, b"")
        self._held = []
        if self._header is not None:
            self._end_header()

    def _line(self, line: bytes, end: bytes) -> None:
        if line.startswith(b"--") and (found := self._boundaries.get(line.rstrip(b" \t"))):
            self._between_parts(*found[-1])
            self._pass(line + end)
        elif self._header is not None:
            self._header_line(self._header, line, end)
        elif self._is_content:
            self._take(line, end)
        else:
            self._pass(line + end)

    def _between_parts(self, index: int, is_last: bool) -> None:
        if self._header is not None:
            self._end_header()  # a part without a body
        self._leave()
        del self._path[self._open[index][1] :]
        while len(self._open) > index + (not is_last):
            self._close()
        self._is_content = False
        if not is_last:
            self._expect_header(is_message=False)

    def _close(self) -> None:
        multipart, _ = self._open.pop()
        for line in _delimiters(multipart):
            self._boundaries[line].pop()
            if not self._boundaries[line]:
                del self._boundaries[line]

    def _expect_header(self, *, is_message: bool) -> None:
        self._is_content = False
        self._header = _Entity(self._count, is_message=is_message)
        self._header_octets = 0
        self._count += 1
        self._path.append(self._header)
        if len(self._path) > MOST_DEPTH:
            raise CannotReencode("parts are nested too deeply")

    def _header_line(self, entity: _Entity, line: bytes, end: bytes) -> None:
        if not line:
            self._end_header()
            self._pass(end)
            if entity.holds_message:
                self._expect_header(is_message=True)
        elif _FIELD.match(line) or (entity.lines and line[:1] in (b" ", b"\t")):
            if not line.isascii():
                raise CannotReencode("a header field holds 8-bit octets")
            self._header_octets += len(line) + len(end)
            if self._header_octets > MOST_HEADER_OCTETS:
                raise CannotReencode("a header is too long")
            entity.lines.append(line + end)
        else:
            # Content without an empty line before it: behind another field it might be read differently.
            entity.opaque = "a header is not ended by an empty line"
            self._end_header()
            self._line(line, end)

    def _end_header(self) -> None:
        entity, self._header = self._header, None
        assert entity is not None
        is_in_digest = bool(self._open) and not entity.is_message and self._open[-1][0].is_digest
        entity.read(b"message/rfc822" if is_in_digest else b"text/plain")
        self._begin(entity)
        self._is_content = entity.boundary is None
        if entity.boundary is not None:
            for line, is_last in zip(_delimiters(entity), (False, True), strict=True):
                self._boundaries.setdefault(line, []).append((len(self._open), is_last))
            self._open.append((entity, len(self._path)))

    @abstractmethod
    def _begin(self, entity: _Entity) -> None:
        """The header of an entity is complete; its empty line, if any, is passed next."""

    @abstractmethod
    def _take(self, line: bytes, end: bytes) -> None:
        """A line of content of the innermost entity."""

    @abstractmethod
    def _pass(self, line: bytes) -> None:
        """A line, with its end, that separates parts, or is before the first or behind the last."""

    @abstractmethod
    def _leave(self) -> None:
        """The content of an entity is over; its last line end belongs to the boundary (RFC 2046 5.1.1)."""


def _delimiters(multipart: _Entity) -> tuple[bytes, bytes]:
    assert multipart.boundary is not None
    return b"--" + multipart.boundary, b"--" + multipart.boundary + b"--"


class Survey(_Reading):
    """The first reading: which parts hold 8-bit octets.

    Attributes:
        has_8bit: one octet per part, in the order of headers, the whole message first: 1 if the part or anything inside
            it has such octets.
    """

    def __init__(self) -> None:
        self.has_8bit = bytearray()
        super().__init__()

    def feed(self, data: bytes) -> None:
        """Read a piece of the message, from its first header field on.

        Raises:
            CannotReencode: see there.
        """
        self._read(data)

    def finish(self) -> None:
        """The message is complete; errors as of `feed`."""
        self._end()

    def _begin(self, entity: _Entity) -> None:
        self.has_8bit.append(0)

    def _take(self, line: bytes, end: bytes) -> None:
        if not line.isascii():
            if (why := self._path[-1].opaque) is not None:
                raise CannotReencode(why)
            self._mark()

    def _pass(self, line: bytes) -> None:
        if not line.isascii():
            self._mark()

    def _leave(self) -> None:
        pass

    def _mark(self) -> None:
        for entity in reversed(self._path):
            if self.has_8bit[entity.number]:
                return
            self.has_8bit[entity.number] = 1


class Reencoder(_Reading):
    """The second reading: writes the message in 7-bit form.

    Lines before the first part of a multipart or behind the last, which readers ignore, cannot be encoded: their 8-bit
    octets become question marks.

    Args:
        survey: of the same message, finished.

    Attributes:
        header: of the new message, without the empty line that ends it; b"" until it is complete.
    """

    def __init__(self, survey: Survey) -> None:
        self.header = b""
        self._has_8bit = survey.has_8bit
        self._out: list[bytes] = []
        self._takes: Final = {b"": self._keep, b"quoted-printable": self._quote, b"base64": self._gather}
        self._encoding = b""  # of the current content; b"": it stays unchanged
        self._gathered: list[bytes] = []  # octets to encode in base64
        self._gathered_octets = 0
        self._owed = b""  # the last line end, which may belong to the following boundary
        super().__init__()

    def feed(self, data: bytes) -> bytes:
        """Read a piece of the message, from its first header field on; returns the decided octets behind the header."""
        self._read(data)
        return self._given()

    def finish(self) -> bytes:
        """The message is complete; returns the rest."""
        self._end()
        if self._owed:
            self._gathered.append(self._owed)
        self._leave()
        return self._given()

    def _given(self) -> bytes:
        given = b"".join(self._out)
        self._out.clear()
        return given

    def _begin(self, entity: _Entity) -> None:
        lines: Sequence[bytes] = entity.lines
        if self._has_8bit[entity.number]:
            if entity.boundary is not None or entity.holds_message:
                lines = _with_encoding(lines, b"7bit", is_needed=False)
            else:
                self._encoding = b"quoted-printable" if entity.is_text else b"base64"
                lines = [*_with_encoding(lines, self._encoding, is_needed=True), *_missing_fields(entity)]
        if entity.number:
            self._out += lines
        else:
            self.header = b"".join(lines)

    def _take(self, line: bytes, end: bytes) -> None:
        self._takes[self._encoding](line, end)

    def _keep(self, line: bytes, end: bytes) -> None:
        self._out.append(line + end)

    def _quote(self, line: bytes, end: bytes) -> None:
        self._out.append(_quoted_printable(line) + end)

    def _gather(self, line: bytes, end: bytes) -> None:
        self._gathered += (self._owed, line)
        self._gathered_octets += len(self._owed) + len(line)
        self._owed = end
        if self._gathered_octets >= 64 * _BASE64_OCTETS:
            octets = b"".join(self._gathered)
            whole = len(octets) // _BASE64_OCTETS * _BASE64_OCTETS
            self._out += _base64(octets[:whole])
            self._gathered = [octets[whole:]]
            self._gathered_octets = len(octets) - whole

    def _pass(self, line: bytes) -> None:
        self._out.append(line if line.isascii() else line.translate(_ABOVE_127))

    def _leave(self) -> None:
        self._out += _base64(b"".join(self._gathered))
        self._gathered = []
        self._gathered_octets = 0
        self._owed = self._encoding = b""


def _with_encoding(lines: Sequence[bytes], encoding: bytes, *, is_needed: bool) -> Sequence[bytes]:
    """The header with `encoding` named.

    Args:
        is_needed: add the field if the header has none.
    """
    field = b"Content-Transfer-Encoding: %b\r\n" % encoding
    replaced: list[bytes] = []
    is_of_field = False
    for line in lines:
        if line[:1] not in (b" ", b"\t"):
            is_of_field = line.partition(b":")[0].rstrip(b" \t").lower() == b"content-transfer-encoding"
            replaced.append(field if is_of_field else line)
        elif not is_of_field:
            replaced.append(line)
    if is_needed and field not in replaced:
        replaced.append(field)
    return replaced


def _missing_fields(entity: _Entity) -> Sequence[bytes]:
    """Fields that a message needs besides its encoding to be read correctly (RFC 2045 4)."""
    if not entity.is_message or entity.has_version:
        return ()
    # RFC 1428 3: a message without MIME does not name its character set.
    content_type = () if entity.has_type else (b"Content-Type: text/plain; charset=unknown-8bit\r\n",)
    return (b"MIME-Version: 1.0\r\n", *content_type)


def _hex_of(found: re.Match[bytes]) -> bytes:
    return _HEX[found[0][0]]


def _quoted_printable(line: bytes) -> bytes:
    """Encode a line in quoted-printable (RFC 2045 6.7), without its end."""
    text = _UNSAFE.sub(_hex_of, line)
    if len(text) <= _LINE_OCTETS:
        return text
    pieces: list[bytes] = []
    start, head = 0, b""
    while len(head) + len(text) - start > _LINE_OCTETS:
        end = start + _LINE_OCTETS - 1 - len(head)
        if text[end - 1] == ord("="):
            end -= 1
        elif text[end - 2] == ord("="):
            end -= 2
        pieces.append(head + text[start:end] + b"=\r\n")
        start, head = end, b""
        if text.startswith(b"--", start):  # see _UNSAFE
            start, head = start + 1, b"=2D"
    pieces.append(head + text[start:])
    return b"".join(pieces)


def _base64(octets: bytes) -> Iterator[bytes]:
    for start in range(0, len(octets), _BASE64_OCTETS):
        yield b2a_base64(octets[start : start + _BASE64_OCTETS], newline=False) + b"\r\n"
