"""The content of one message while it is received, by DATA or BDAT: one object from the 354 to the end.

It joins the machines of `framing`: octets from the wire go in, in pieces of any size; the header block and the octets
behind it come out, dots unstuffed and line ends normalised, with a verdict on the whole. Cutting the input differently
changes neither the joined output nor the verdict.

Most messages are small, come in one piece, and need no change. For these a few searches over the whole answer every
question: `whole_message` gives the same result as the general way, and None for all other messages.
"""

import re
from dataclasses import dataclass
from typing import Final, Protocol

from otel_smtp.smtp import replies
from otel_smtp.smtp.framing import (
    END_OF_DATA,
    ChunkReader,
    ContentInspector,
    DotReader,
    HeaderSplitter,
    has_bare_line_end,
)
from otel_smtp.smtp.received import HeaderFacts, inspect_header
from otel_smtp.smtp.replies import Reply

_NUL: Final = 0  # as a number: for bytes, `in` first tries to read them as one and recovers from the error
_NO_FIELD: Final = frozenset(b".\r \t")
"""The first octets of content that begins with a dot, or whose header block is missing or must not follow our own
fields; see `HeaderSplitter`.
"""
_CONTENT_TYPE: Final = re.compile(rb"^content-type[ \t]*:[ \t\r\n]*([a-z]*)", re.IGNORECASE | re.MULTILINE)
_OF_PARTS: Final = frozenset({b"multipart", b"message", b""})


def needs_smtputf8(header: bytes) -> bool:
    """Whether content with octets above 127 may be an internationalized message, judged by its header block.

    It is one if such octets are in a header, even that of a part (RFC 6532 3, RFC 6531 1.2): in this block, or behind
    it if there can be parts. 8-bit octets in a body alone need only 8BITMIME.
    """
    return not header.isascii() or not _OF_PARTS.isdisjoint(map(bytes.lower, _CONTENT_TYPE.findall(header)))


@dataclass(frozen=True, slots=True)
class ContentLimits:
    """Limits for content.

    Attributes:
        text_line: octets of a line, CRLF included.
        header_size, header_lines: octets and lines of the header block.
        hops: Received fields.
        rejects_bare_line_ends: refuse a bare CR or LF instead of normalising it.
    """

    text_line: int
    header_size: int
    header_lines: int
    hops: int
    rejects_bare_line_ends: bool


class ContentSink(Protocol):
    """Takes the decided part of the content."""

    def header_received(self, block: bytes, facts: HeaderFacts) -> None:
        """The whole header block, before any `content_received`; once per message.

        Args:
            block: the header lines, each with its CRLF, without the empty line that ends them; b"" if the content has
                no header.
            facts: hops, trace headers and Message-ID of the block.
        """
        ...

    def content_received(self, data: bytes) -> None:
        """Some octets behind the header block, beginning with the empty line, if there is one.

        Content that begins with a blank gets an empty line too, although the client sent none.
        """
        ...


def whole_message(data: bytes, limits: ContentLimits, size_limit: int) -> tuple[bytes, HeaderFacts, bytes] | None:
    """Whether the octets behind DATA are one whole message with a header, within every limit, that needs no change.

    Args:
        limits, size_limit: as for `IncomingContent`.

    Returns:
        The header block, its facts, and what follows it, as they go to a `ContentSink`. None otherwise, which says
        nothing about the message.
    """
    size = len(data) - 3  # of the content: all but the lone dot and its CRLF
    if (
        size > size_limit
        or size > limits.text_line
        or data[-5:] != END_OF_DATA
        or data.rfind(b"\r\n.", 0, size) >= 0  # a line begins with a dot; searching backwards is faster
        or data[0] in _NO_FIELD
        or _NUL in data
        or has_bare_line_end(data)
    ):
        return None
    end = data.find(b"\r\n\r\n", 0, size) + 2
    if end < 2 or end > limits.header_size:
        return None
    if end > limits.header_lines and data.count(b"\n", 0, end) > limits.header_lines:  # a line has an octet at least
        return None
    block = data[:end]
    facts = inspect_header(block)
    return None if facts.hops > limits.hops else (block, facts, data[end:size])


class IncomingContent:
    """The content of one message.

    Args:
        limits: what is acceptable.
        size_limit: octets of the whole; octets beyond it are counted and dropped.
        is_binary: BODY=BINARYMIME was declared: nothing is normalised, NUL and long lines are accepted.
        refusal_of_8bit: the reply if any octet is above 127: the client used an extension that was not offered,
            which 7-bit content does not need; None: such content is accepted.
        takes_8bit_bodies: that reply is only for content that `needs_smtputf8`.
        by_data: it comes by DATA and ends with a lone dot; otherwise by BDAT, and `finish` ends it.
        sink: see there.

    Attributes:
        octets: the content so far, as RFC 1870 counts it: CRLF included, stuffed dots not.
        facts: of the header block; None until it has been received.
        by_data: see above.
        is_ended: the end of DATA was seen. `rest`: the octets behind it.
    """

    __slots__ = (
        "_chunks",
        "_dots",
        "_header",
        "_inspector",
        "_is_binary",
        "_limits",
        "_refusal_of_8bit",
        "_sink",
        "_size_limit",
        "_takes_8bit_bodies",
        "by_data",
        "facts",
        "is_ended",
        "octets",
        "rest",
    )

    def __init__(
        self,
        limits: ContentLimits,
        size_limit: int,
        sink: ContentSink,
        *,
        is_binary: bool,
        by_data: bool,
        refusal_of_8bit: Reply | None = None,
        takes_8bit_bodies: bool = False,
    ) -> None:
        self._limits = limits
        self._size_limit = size_limit
        self._sink = sink
        self._is_binary = is_binary
        self._refusal_of_8bit = refusal_of_8bit
        self._takes_8bit_bodies = takes_8bit_bodies
        self.by_data = by_data
        if by_data:
            self._dots = DotReader()
        else:
            self._chunks = ChunkReader(is_binary=is_binary)
        self._header = HeaderSplitter(limits.header_size, limits.header_lines)
        self._inspector = ContentInspector(limits.text_line)
        self.octets = 0
        self.facts: HeaderFacts | None = None
        self.is_ended = False
        self.rest = b""

    def feed(self, data: bytes) -> None:
        """Take octets from the wire: of DATA, up to its end at most; or of a chunk, and not one more."""
        if self.by_data:
            dots = self._dots
            self._take(dots.feed(data))
            if dots.is_ended:
                self.is_ended = True
                self.rest = dots.rest
        else:
            self._take(self._chunks.feed(data))

    def finish(self) -> Reply | None:
        """The content is complete: returns what is wrong with it, or None.

        The rest of the content goes to the sink, unless it is larger than the limit.
        """
        if not self.by_data:
            self._take(self._chunks.finish())
        if self._header.block is None and self._inspector.octets <= self._size_limit:
            body = self._header.finish()
            self._hand_up(body)
        return self.refusal()

    def refusal(self) -> Reply | None:
        """The fault of the content so far, checked in a fixed order: the verdict must not depend on cuts."""
        inspector, limits = self._inspector, self._limits
        if inspector.octets > self._size_limit:
            return replies.MESSAGE_TOO_BIG
        if inspector.has_nul and not self._is_binary:
            return replies.NUL_IN_CONTENT
        has_bare_line_ends = self._dots.bare_line_ends if self.by_data else self._chunks.bare_line_ends
        if has_bare_line_ends and limits.rejects_bare_line_ends:
            return replies.BARE_LINE_END
        # Until the header block is complete, it is unknown whether the content needs SMTPUTF8.
        is_known = self.facts is not None or not self._takes_8bit_bodies
        if inspector.has_8bit and self._refusal_of_8bit is not None and is_known:
            return self._refusal_of_8bit
        if inspector.has_long_line and not self._is_binary:
            return replies.LINE_IN_CONTENT_TOO_LONG
        if self._header.is_too_big:
            return replies.HEADER_TOO_BIG
        if self.facts is not None and self.facts.hops > limits.hops:
            return replies.TOO_MANY_HOPS
        return None

    def _take(self, content: bytes) -> None:
        if not content:
            return
        inspector = self._inspector
        inspector.inspect(content)
        self.octets = inspector.octets
        if inspector.octets <= self._size_limit:  # refused at its end; passing on more would only fill a disk
            self._hand_up(self._header.feed(content))

    def _hand_up(self, body: bytes) -> None:
        block = self._header.block
        if self.facts is None and block is not None:
            self.facts = inspect_header(block)
            if self._takes_8bit_bodies and not needs_smtputf8(block):
                self._refusal_of_8bit = None
            self._sink.header_received(block, self.facts)
        if body:
            self._sink.content_received(body)
