"""The format of a segment: a head, then records one after the other, each with its own checksums.

A record is a header, a text (JSON, the facts) and a content (a mail's, or nothing)::

    marker (8) | kind, flags (1 + 1) | 0 (2) | octets of text, of content (4 + 4) | synced (4)
               | CRC-32 of text, of content, of this header (4 + 4 + 4)

The marker is random and unique to the segment: neither a mail's content nor a reused file's old octets can pass for a
record. The header's checksum covers its place. `synced` is how far the segment was durable when the record was written,
so that a scan can tell damage to acknowledged records from a tail torn before any answer.
"""

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Final, NamedTuple

FORMAT: Final = 2
"""The spool's format; the first version was a database with a file for each group of messages."""

_MAGIC: Final = b"OTELSPL"
_HEAD: Final = struct.Struct("<7sB8sQI")
_HEADER: Final = struct.Struct("<8sBBHIIIII")
_CHECK: Final = struct.Struct("<I")
HEADER_OCTETS: Final = _HEADER.size + _CHECK.size
FIRST: Final = 32  # where records begin


class RecordKind(IntEnum):
    """The kinds of records."""

    BEGIN = 1  # the first of a segment
    MESSAGE = 2  # a new message, or one moved here, with its content
    STATE = 3  # a message's new state, without its content
    LEASE = 4  # deliveries now being attempted
    END = 5  # the end of a message
    CLOCK = 6  # the clock was set back, and all waiting mail with it


class NewerFormat(Exception):
    """A segment was written by a newer version."""


class Record(NamedTuple):
    """A record found by a scan.

    Attributes:
        at, end: offsets within its segment. `content_at`: of its content.
        has_more: it forms one step with the next record.
        is_intact: the content is undamaged.
    """

    kind: int
    at: int
    text: bytes
    content_at: int
    content_octets: int
    content_crc: int
    synced: int
    has_more: bool
    is_intact: bool

    @property
    def end(self) -> int:
        """The offset of the next one."""
        return self.content_at + self.content_octets


class Damage(NamedTuple):
    """Octets between records that form no record."""

    at: int
    end: int


def head(number: int, marker: bytes) -> bytes:
    """The head of segment `number`: `FIRST` octets."""
    plain = _HEAD.pack(_MAGIC, FORMAT, marker, number, 0)[:-4]
    return (plain + _CHECK.pack(zlib.crc32(plain))).ljust(FIRST, b"\0")


def read_head(data: bytes) -> tuple[int, bytes] | None:
    """The number and the marker of a segment; None if this is no head.

    Raises:
        NewerFormat: it is one of an unknown version.
    """
    if len(data) < _HEAD.size:
        return None
    magic, version, marker, number, check = _HEAD.unpack_from(data)
    if magic != _MAGIC or check != zlib.crc32(data[: _HEAD.size - 4]):
        return None
    if version > FORMAT:
        raise NewerFormat(f"format {version}; this version knows {FORMAT}")
    return number, marker


def new_marker() -> bytes:
    """Make an unguessable marker."""
    return os.urandom(8)


def pack(
    marker: bytes, kind: int, text: bytes, content: Sequence[bytes], *, at: int, synced: int, has_more: bool
) -> tuple[list[bytes], int, int]:
    """Encode a record for offset `at`: its pieces, their octets, and the checksum of its content."""
    octets = crc = 0
    for piece in content:
        octets += len(piece)
        crc = zlib.crc32(piece, crc)
    plain = _HEADER.pack(marker, kind, int(has_more), 0, len(text), octets, synced, zlib.crc32(text), crc)
    return (
        [plain, _CHECK.pack(zlib.crc32(plain, at)), text, *content],
        HEADER_OCTETS + len(text) + octets,
        crc,
    )


def _record(data: memoryview, marker: bytes, at: int) -> tuple[Record | None, int]:
    """The record at `at`, or None if its text is damaged; and its end, which is `at` if there is no header."""
    if at + HEADER_OCTETS > len(data):
        return None, at
    header = data[at : at + _HEADER.size]
    found, kind, flags, _, text_octets, content_octets, synced, text_crc, content_crc = _HEADER.unpack(header)
    (check,) = _CHECK.unpack_from(data, at + _HEADER.size)
    text_at = at + HEADER_OCTETS
    content_at = text_at + text_octets
    end = content_at + content_octets
    if found != marker or check != zlib.crc32(header, at) or end > len(data):
        return None, at
    text = bytes(data[text_at:content_at])
    if zlib.crc32(text) != text_crc:
        return None, end
    is_intact = zlib.crc32(data[content_at:end]) == content_crc
    return Record(kind, at, text, content_at, content_octets, content_crc, synced, bool(flags & 1), is_intact), end


def is_record(data: memoryview, at: int) -> bool:
    """Whether there is an intact record header at `at`, of any segment."""
    return at + HEADER_OCTETS <= len(data) and _record(data, bytes(data[at : at + 8]), at)[1] > at


def scan(data: bytes, marker: bytes) -> Iterator[Record | Damage]:
    """All records of a segment, in order, with the damage between them; octets behind the last one are not reported.

    Args:
        data: the segment, with its head.
    """
    view = memoryview(data)
    at = FIRST
    while True:
        record, end = _record(view, marker, at)
        if record is not None:
            yield record
            at = end
            continue
        # An intact header's length can be trusted; otherwise search for the next header.
        following = end if end > at and _record(view, marker, end)[1] > end else _next(data, view, marker, at + 1)
        if following is None:
            return
        yield Damage(at, following)
        at = following


def _next(data: bytes, view: memoryview, marker: bytes, start: int) -> int | None:
    while (start := data.find(marker, start)) >= 0:
        if _record(view, marker, start)[1] > start:
            return start
        start += 1
    return None
