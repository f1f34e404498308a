"""The receive buffer, and the machines that cut lines, DATA and BDAT content, and the header block from it.

Content goes through three small machines, each fed with octets in pieces of any size:

`DotReader` (DATA) or `ChunkReader` (BDAT) find the end and undo dot transparency; `ContentInspector` counts and checks;
`HeaderSplitter` holds the header block back until it is whole.

Rules that hold throughout:

* Cutting the input differently never changes the result. Undecided octets are held back, never guessed.
* Only CRLF.CRLF ends DATA. Any other line end in content is bare: it is normalised to CRLF or refused, and a dot behind
  it is handled only then, so that no receiver sees an end of data where we saw none.
* No loop over single octets: only searches and replacements over whole pieces.
"""

import re
from io import IncrementalNewlineDecoder
from typing import Final

END_OF_DATA: Final = b"\r\n.\r\n"

LINE_TAIL_OCTETS: Final = 11
"""Octets at the end of a discarded line that are returned in one piece: enough for " HTTP/1.1" and CRLF."""

# The undecided end of a piece: a CR that may become CRLF, a line end that a dot may follow, a dot at the start of a
# line that may be stuffed, alone on its line, or the beginning of the end of data.
_UNDECIDED = re.compile(rb"(?:\r\n?|\n)(?:\.\r?)?\Z")
_LINE_END = re.compile(rb"\r\n|\r|\n")
# RFC 5321 4.5.2: a leading dot is deleted if there are other characters on the line. At the end of a piece there are
# none: `_UNDECIDED` leaves no dot there unless a line end follows it.
_STUFFED_DOT = re.compile(rb"(\r\n)\.(?!\r\n|\Z)")
# The first line of a well-formed header field (RFC 5322 2.2), and the end of a line that is followed neither by another
# such line nor by a folded one. A single pattern for all fields would store a backtracking position per line.
_BLANKS: Final = (b" ", b"\t")
_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:[^\n]*\n")
_LAST_OF_FIELDS = re.compile(rb"\n(?!(?:[!-9;-~]+[ \t]*:|[ \t])[^\n]*\n)")


class ReceiveBuffer:
    """Octets received and not yet used. The engine owns it, as it knows the state they were received in.

    Attributes:
        held: the octets, including used ones at the front; b"" once all are used.
    """

    __slots__ = ("_start", "held")

    def __init__(self) -> None:
        self.held = b""
        self._start = 0

    def __len__(self) -> int:
        return len(self.held) - self._start

    def feed(self, data: bytes) -> None:
        """Add octets from the peer."""
        self.held = self.held[self._start :] + data if self.held else data
        self._start = 0

    def find_line(self, limit_octets: int) -> int:
        """Length of the first line, CRLF included; 0 if it is not complete yet, -1 if it is longer than `limit_octets`
        or ends in a bare LF.
        """
        end = self.held.find(b"\n", self._start, self._start + limit_octets)
        if end > self._start and self.held[end - 1] == 0x0D:
            return end + 1 - self._start
        return -1 if end >= 0 or len(self) >= limit_octets else 0

    def discard_line(self) -> bytes:
        """Discard octets up to and including the next LF; returns them, ending in LF if the line has ended.

        Keeps the last few octets of an unfinished line: the end of the line may tell what it was, and shows a bare LF.
        """
        end = self.held.find(b"\n", self._start)
        if end >= 0:
            return self.take(end + 1 - self._start)
        discarded = self.take(max(0, len(self) - LINE_TAIL_OCTETS))
        self.feed(b"")  # discarded octets are not held
        return discarded

    def starts_with(self, prefix: bytes) -> bool:
        """Whether the held octets begin with `prefix`."""
        return self.held.startswith(prefix, self._start)

    def peek(self, octets: int) -> bytes:
        """The first `octets` octets, or fewer, without taking them."""
        return self.held[self._start : self._start + octets]

    def take(self, octets: int) -> bytes:
        """Take the first `octets` octets, or all if there are fewer."""
        if self._start == 0 and octets >= len(self.held):
            data, self.held = self.held, b""
            return data
        data = self.held[self._start : self._start + octets]
        self._start += len(data)
        if self._start == len(self.held):
            self.clear()  # a silent client must not hold the memory of its last read
        return data

    def give_back(self, data: bytes) -> None:
        """Put octets back at the front: the rest behind the end of data."""
        if data:
            self.held = data + self.held[self._start :]
            self._start = 0

    def clear(self) -> None:
        """Forget everything held."""
        self.held = b""
        self._start = 0


def has_bare_line_end(data: bytes) -> bool:
    """Whether `data` holds a CR or LF that is not part of a CRLF; `data` must not begin or end within a CRLF.

    The codec of universal newlines notes the kinds of line ends in one pass, far faster than any search for or count of
    two octets.
    """
    line_ends = IncrementalNewlineDecoder(None, False)
    line_ends.decode(data.decode("latin-1"), True)
    found = line_ends.newlines
    return found != "\r\n" and found is not None


class DotReader:
    """Content by DATA, up to CRLF.CRLF (RFC 5321 4.1.1.4, 4.5.2).

    Attributes:
        rest: octets behind the end of data; set when `is_ended`.
        bare_line_ends: whether a bare CR or LF was seen.
    """

    __slots__ = ("_at_start", "_held", "bare_line_ends", "is_ended", "rest")

    def __init__(self) -> None:
        self._held = b""
        self._at_start = True
        self.bare_line_ends = False
        self.is_ended = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        """Take octets; returns the decided content, dots unstuffed, line ends normalised to CRLF.

        Holds back at most four octets.
        """
        if self._held:
            data = self._held + data
            self._held = b""
        if self._at_start:
            # The CRLF of the DATA command is the first half of an end of data at the very beginning. This must be
            # checked before searching, or what follows would be swallowed as content.
            if data.startswith(b".\r\n"):
                self.is_ended = True
                self.rest = data[3:]
                return b""
            if data in (b".", b".\r"):
                self._held = data
                return b""
        end = data.find(END_OF_DATA)
        if end >= 0:
            self.is_ended = True
            self.rest = data[end + 5 :]
            data = data[: end + 2]
        else:
            undecided = _UNDECIDED.search(data, max(0, len(data) - 4))
            if undecided is not None:
                self._held = data[undecided.start() :]
                data = data[: undecided.start()]
        return self._decode(data) if data else b""

    def _decode(self, data: bytes) -> bytes:
        is_first, self._at_start = self._at_start, False
        if has_bare_line_end(data) or data.endswith(b"\r\n."):
            # The second: a dot alone on a line whose bare line end is still held back.
            self.bare_line_ends = True
            data = _STUFFED_DOT.sub(rb"\1", _LINE_END.sub(b"\r\n", data))
            return data[1:] if is_first and data.startswith(b".") and data[1:3] not in (b"", b"\r\n") else data
        # Every dot behind a CRLF is stuffed: a line of one dot would have been the end. Searching backwards costs a
        # fifth of a replacement that finds nothing.
        if data.rfind(b"\r\n.") >= 0:
            data = data.replace(b"\r\n.", b"\r\n")
        return data[1:] if is_first and data.startswith(b".") and data != b"." else data


class ChunkReader:
    """Content by BDAT: chunks of announced length, no dots (RFC 3030 2).

    Args:
        is_binary: BODY=BINARYMIME was declared, so nothing is normalised.
    """

    __slots__ = ("_held", "_is_binary", "bare_line_ends")

    def __init__(self, *, is_binary: bool) -> None:
        self._is_binary = is_binary
        self._held = b""
        self.bare_line_ends = False

    def feed(self, data: bytes) -> bytes:
        """Take octets of a chunk; returns the decided content. Holds back at most one octet."""
        if self._is_binary:
            return data
        if self._held:
            data = self._held + data
            self._held = b""
        if data.endswith(b"\r"):
            self._held = b"\r"
            data = data[:-1]
        return self._decode(data)

    def finish(self) -> bytes:
        """The last octets, after the last chunk."""
        held, self._held = self._held, b""
        return self._decode(held)

    def _decode(self, data: bytes) -> bytes:
        if has_bare_line_end(data):
            self.bare_line_ends = True
            return _LINE_END.sub(b"\r\n", data)
        return data


class ContentInspector:
    """Counts content and notes its faults; it never stops early, so the verdict does not depend on how the content was
    cut.

    Attributes:
        octets: content so far, as RFC 1870 counts it (CRLF included, stuffed dots not).
        has_nul: a NUL octet was seen. `has_8bit`: one above 127 was.
        has_long_line: a line longer than the limit was seen, its CRLF included (RFC 5321 4.5.3.1.6 counts so).
    """

    __slots__ = ("_line_octets", "_text_line_limit", "has_8bit", "has_long_line", "has_nul", "octets")

    def __init__(self, text_line_limit_octets: int) -> None:
        self._text_line_limit = text_line_limit_octets
        self._line_octets = 0  # of the unfinished line
        self.octets = 0
        self.has_nul = False
        self.has_8bit = False
        self.has_long_line = False

    def inspect(self, content: bytes) -> None:
        """Inspect the next piece of content, which never begins or ends within a CRLF."""
        size = len(content)
        self.octets += size
        if b"\0" in content:
            self.has_nul = True
        if not self.has_8bit and not content.isascii():
            self.has_8bit = True
        if self._line_octets + size > self._text_line_limit and not self.has_long_line:
            self.has_long_line = self._has_long_line(content)
        last = content.rfind(b"\n")
        self._line_octets = size - last - 1 if last >= 0 else self._line_octets + size

    def _has_long_line(self, content: bytes) -> bool:
        """Whether a line of `content`, including the unfinished one it continues, is too long.

        Jumps from one line end to the last one within the limit behind it, so it looks at few places.
        """
        limit = self._text_line_limit
        start = -self._line_octets  # where the line began
        size = len(content)
        while size - start > limit:
            end = content.rfind(b"\n", max(0, start), start + limit)
            if end < 0:
                return True
            start = end + 1
        return False


class HeaderSplitter:
    """Holds the header block back until it is whole (RFC 5322 2.1).

    The block ends before the first empty line. If none comes within the limits, it ends before the first line that is
    not a header field, so that a long text without a header is content and not an endless header.

    Content whose first line begins with a blank has no header: that line would continue whatever field is put before
    it, and could forge the date of our own. An empty line is put in front of it.

    Attributes:
        block: the header block, None until it is known.
        is_too_big: it is larger than the limits; then `block` stays None.
    """

    __slots__ = ("_held", "_line_limit", "_octet_limit", "block", "is_too_big")

    def __init__(self, octet_limit: int, line_limit: int) -> None:
        self._octet_limit = octet_limit
        self._line_limit = line_limit
        self._held = b""
        self.block: bytes | None = None
        self.is_too_big = False

    def feed(self, content: bytes) -> bytes:
        """Take content; once `block` is known, returns what follows it (first the empty line), before that b""."""
        if self.block is not None:
            return content
        if self.is_too_big:
            return b""
        searched = max(0, len(self._held) - 3)
        held = self._held = self._held + content if self._held else content
        if held.startswith(b"\r\n"):
            return self._split(0)
        if held.startswith(_BLANKS):
            return b"\r\n" + self._split(0)
        end = held.find(b"\r\n\r\n", searched)
        if end >= 0 and self._fits(held, end + 2):
            return self._split(end + 2)
        # Two octets more than the limit: by then the empty line behind a block of exactly that size has been seen.
        if end >= 0 or len(held) > self._octet_limit + 2:
            return self._split_at_last_field()
        return b""

    def finish(self) -> bytes:
        """The content is complete; returns what follows the block."""
        if self.block is not None or self.is_too_big:
            return b""
        end = self._fields_end()
        if not self._fits(self._held, end):
            self.is_too_big = True
            return b""
        return self._split(end)

    def _fits(self, held: bytes, end: int) -> bool:
        return end <= self._octet_limit and held.count(b"\n", 0, end) <= self._line_limit

    def _fields_end(self) -> int:
        if _FIELD.match(self._held) is None:
            return 0
        last = _LAST_OF_FIELDS.search(self._held)
        assert last is not None  # the field's own line end, without an empty line behind it
        return last.end()

    def _split_at_last_field(self) -> bytes:
        # Only octets within the limit count, and only if a line follows that is no field: then the decision does not
        # depend on how much has been received.
        self._held, rest = self._held[: self._octet_limit], self._held[self._octet_limit :]
        end = self._fields_end()
        line = self._held[end:]
        is_cut = b"\n" not in line and (not line or re.fullmatch(rb"[!-9;-~]+[ \t]*(?::.*)?|[ \t].*", line, re.S))
        self._held += rest
        if is_cut or not self._fits(self._held, end):
            self.is_too_big = True
            self._held = b""
            return b""
        return self._split(end)

    def _split(self, end: int) -> bytes:
        self.block = self._held[:end]
        rest = self._held[end:]
        self._held = b""
        return rest
