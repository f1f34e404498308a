"""Files that were set aside: the envelope behind large content, and the messages found in unknown segments.

Large content is followed by its message's original envelope::

    content | envelope (JSON) | magic (8) | octets of envelope (4) | CRC-32 of envelope, content, these (4 + 4 + 4)

So it can be put back if both log and index are gone. Such a message is held: it may have been delivered since, to some
or all recipients, and an operator must decide whether to release it.
"""

import json
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from otel_smtp.spool.embedded import records
from otel_smtp.spool.embedded.entries import Entry
from otel_smtp.spool.embedded.files import open_regular, read_at
from otel_smtp.spool.embedded.records import Record, RecordKind
from otel_smtp.spool.messages import DeliveryState, Kind

_MAGIC: Final = b"OTELENV1"
_TRAILER: Final = struct.Struct("<8sIII")
_CHECK: Final = struct.Struct("<I")
_TRAILER_OCTETS: Final = _TRAILER.size + _CHECK.size
_MOST_ENVELOPE_OCTETS: Final = 4 * 1024 * 1024
_MESSAGE_HEADER: Final = re.compile(rb"[\x01-\x06][\x00\x01]\x00\x00")  # from the ninth octet of a record on
_DAMAGED: Final = re.compile(r"(?:damaged|torn)-\d+-(\d+)")
_LEAST_SECONDS: Final = 86_400  # a restored message must not expire before an operator has seen it


@dataclass(frozen=True, slots=True)
class Found:
    """A message that was found.

    Attributes:
        content: None: the file that it was found in is the content.
        crc: of the content.
    """

    entry: Entry
    content: bytes | None
    crc: int


def envelope(entry: Entry, crc: int) -> bytes:
    """The octets written behind large content.

    Args:
        crc: of the content.
    """
    text = entry.encode().encode("ascii")
    plain = _TRAILER.pack(_MAGIC, len(text), zlib.crc32(text), crc)
    return text + plain + _CHECK.pack(zlib.crc32(plain))


def found_in(path: Path) -> list[Found]:
    """The readable messages in a file that was set aside.

    Raises:
        OSError: it cannot be read.
    """
    file = open_regular(path, os.O_RDONLY)
    try:
        octets = os.fstat(file).st_size
        if (large := _large(file, octets)) is not None:
            return [large]
        # Offsets in a part cut out of a segment count from the segment's start: a record's checksum covers its place.
        cut = _DAMAGED.match(path.name)
        return _in_segment(bytes(int(cut[1]) if cut else 0) + read_at(file, 0, octets))
    finally:
        os.close(file)


def _large(file: int, octets: int) -> Found | None:
    trailer = read_at(file, max(0, octets - _TRAILER_OCTETS), _TRAILER_OCTETS)
    if len(trailer) < _TRAILER_OCTETS:
        return None
    plain = trailer[: _TRAILER.size]
    magic, text_octets, text_crc, crc = _TRAILER.unpack(plain)
    content_octets = octets - _TRAILER_OCTETS - text_octets
    if (
        magic != _MAGIC
        or _CHECK.unpack(trailer[_TRAILER.size :])[0] != zlib.crc32(plain)
        or not 0 < text_octets <= _MOST_ENVELOPE_OCTETS
        or content_octets < 0
    ):
        return None
    text = read_at(file, content_octets, text_octets)
    if zlib.crc32(text) != text_crc:
        return None
    entry = Entry.decode(text)
    return Found(entry, None, crc) if entry.octets == content_octets else None


def _in_segment(data: bytes) -> list[Found]:
    """The messages that had not ended by the end of a segment whose head may be unreadable."""
    if (marker := _marker(data)) is None:
        return []
    found: dict[str, Found] = {}
    for record in records.scan(data, marker):
        if not isinstance(record, Record):
            continue
        said = json.loads(record.text)
        match record.kind:
            case RecordKind.MESSAGE if record.is_intact:
                entry = Entry.from_values(said[2])
                if not entry.is_large:  # otherwise its content shows it
                    content = data[record.content_at : record.end]
                    found[entry.id] = Found(entry, content, record.content_crc if said[1] is None else said[1])
            case RecordKind.STATE:
                entry = Entry.from_values(said[1])
                if (known := found.get(entry.id)) is not None:
                    found[entry.id] = Found(entry, known.content, known.crc)
            case RecordKind.END:
                found.pop(said["id"], None)
            case _:
                pass
    return list(found.values())


def _marker(data: bytes) -> bytes | None:
    """The marker of the first record: forged records in a mail's content can only come after it."""
    view = memoryview(data)
    for match in _MESSAGE_HEADER.finditer(data, 8):
        at = match.start() - 8
        if records.is_record(view, at):
            return data[at : at + 8]
    return None


def hold_again(entry: Entry, now_ms: int) -> None:
    """Hold a restored message for an operator: it may have been delivered since. An outcome may be sent twice."""
    for one in entry.deliveries:
        one.state = DeliveryState.READY if entry.is_outcome else DeliveryState.HELD
        one.is_possible_duplicate = True
    entry.held_ms = now_ms if entry.kind is Kind.MAIL else None
    entry.expires_ms = max(entry.expires_ms, now_ms + _LEAST_SECONDS * 1000)
