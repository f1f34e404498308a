"""The form of a segment: what is a record, what is damage, and what only looks like either."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.spool.embedded import records
from otel_smtp.spool.embedded.records import FIRST, Damage, NewerFormat, Record, RecordKind

MARKER = b"\x01marker\x02"
OCTETS = 64 * 1024


def segment(*contents: bytes, marker: bytes = MARKER, over: bytes = b"") -> bytearray:
    """A segment with a record for each content, written over what was in its file before."""
    data = bytearray(over.ljust(OCTETS, b"\0"))
    data[:FIRST] = records.head(7, marker)
    at = FIRST
    for content in contents:
        pieces, octets, _ = records.pack(
            marker, RecordKind.MESSAGE, b"text", (content,), at=at, synced=at, has_more=False
        )
        data[at : at + octets] = b"".join(pieces)
        at += octets
    return data


def contents_of(data: bytes, found: Sequence[Record | Damage]) -> list[bytes]:
    return [data[one.content_at : one.end] for one in found if isinstance(one, Record)]


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_what_was_written_is_found(contents: list[bytes]) -> None:
    data = bytes(segment(*contents))
    found = list(records.scan(data, MARKER))
    assert contents_of(data, found) == contents
    assert all(isinstance(one, Record) and one.is_intact and one.text == b"text" for one in found)
    assert records.read_head(data) == (7, MARKER)


@given(st.lists(st.binary(min_size=1, max_size=60), min_size=3, max_size=6), st.data())
def test_one_damaged_octet_costs_one_record_at_most(contents: list[bytes], data: st.DataObject) -> None:
    whole = segment(*contents)
    ends = [one.end for one in records.scan(bytes(whole), MARKER)]
    harmed = data.draw(st.integers(FIRST, ends[-2] - 1))  # behind it at least one is whole
    whole[harmed] ^= data.draw(st.integers(1, 255))
    found = list(records.scan(bytes(whole), MARKER))
    hit = sum(end <= harmed for end in ends)
    intact = [one for one in found if isinstance(one, Record) and one.is_intact]
    assert contents_of(bytes(whole), intact) == [*contents[:hit], *contents[hit + 1 :]]


def test_what_a_file_held_before_is_no_record() -> None:
    """The records of before lie where those of now end, with the right checksums for their place."""
    before = segment(b"a" * 100, b"old", b"older", marker=b"another!")
    data = bytes(segment(b"b" * 100, over=bytes(before)))
    found = list(records.scan(data, MARKER))
    assert contents_of(data, found) == [b"b" * 100]


def test_a_record_that_was_copied_elsewhere_is_none() -> None:
    data = segment(b"first", b"second")
    first, second = (one for one in records.scan(bytes(data), MARKER) if isinstance(one, Record))
    data[second.end : second.end + first.end - first.at] = data[first.at : first.end]
    assert len(list(records.scan(bytes(data), MARKER))) == 2


@pytest.mark.parametrize("at", [0, 7, 8, 20, 24])
def test_a_damaged_head_is_none(at: int) -> None:
    data = segment()
    data[at] ^= 1
    assert records.read_head(bytes(data)) is None


def test_a_newer_format_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(segment())
    monkeypatch.setattr(records, "FORMAT", records.FORMAT - 1)
    with pytest.raises(NewerFormat, match="format 2; this version knows 1"):
        records.read_head(data)
