"""Lines, ends of data, dots, chunks, header blocks: tables, and the property that cuts change nothing."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.smtp.framing import (
    LINE_TAIL_OCTETS,
    ChunkReader,
    ContentInspector,
    DotReader,
    HeaderSplitter,
    ReceiveBuffer,
    has_bare_line_end,
)
from tests.support.held import held_octets


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """`data` in pieces, cut at `places`."""
    bounds = [0, *sorted(min(place, len(data)) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds) if end > start]


def read_dots(pieces: list[bytes]) -> tuple[bytes, bool, bytes, bool]:
    reader, content, rest = DotReader(), b"", b""
    for piece in pieces:
        if reader.is_ended:
            rest += piece
        else:
            content += reader.feed(piece)
    return content, reader.is_ended, reader.rest + rest, reader.bare_line_ends


def held(data: bytes, taken: int = 0) -> ReceiveBuffer:
    """A buffer with `data` in it, the first octets of which were taken."""
    buffer = ReceiveBuffer()
    buffer.feed(data)
    buffer.take(taken)
    return buffer


# what is held, how much of it was taken before -> the length of the first line, at most ten octets long
LINE_TABLE = [
    (b"", 0, 0),
    (b"NOOP\r\n", 0, 6),
    (b"NOOP\r\nQUIT\r\n", 6, 6),
    (b"NOOP\r", 0, 0),
    (b"NOOP\n", 0, -1),
    (b"\r\n", 0, 2),
    (b"\nNOOP\r", 0, -1),  # a CR at the end of what is held is none before the LF
    (b"x\r\nNOOP\r\n", 2, -1),  # nor is one that ended a chunk
    (b"12345678\r\n", 0, 10),
    (b"123456789", 0, 0),
    (b"1234567890", 0, -1),  # its line end can only come too late
    (b"123456789\r\n", 0, -1),
]


@pytest.mark.parametrize(("data", "taken", "length"), LINE_TABLE)
def test_the_first_line_is_found(data: bytes, taken: int, length: int) -> None:
    assert held(data, taken).find_line(10) == length


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_what_is_given_back_stands_before_what_is_held(taken: int) -> None:
    buffer = held(b"abc", taken)
    buffer.give_back(b"xy")
    assert (len(buffer), buffer.take(9), len(buffer)) == (5 - taken, b"xy" + b"abc"[taken:], 0)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_an_empty_buffer_holds_nothing(taken: int) -> None:
    assert len(ReceiveBuffer()) == 0
    buffer = held(b"abc", taken)
    buffer.clear()
    assert (len(buffer), buffer.peek(9), buffer.starts_with(b"a"), buffer.find_line(10)) == (0, b"", False, 0)


# wire octets -> content, what follows the end (None: no end was seen)
DATA_TABLE = [
    (b".\r\n", b"", b""),  # empty content: the first CRLF is DATA's own
    (b".\r\nMAIL", b"", b"MAIL"),  # and what is pipelined behind it is not content
    (b"a\r\n.\r\n", b"a\r\n", b""),
    (b"a\r\n.\r\n.\r\n", b"a\r\n", b".\r\n"),
    (b"..\r\n.\r\n", b".\r\n", b""),
    (b"..a\r\n...\r\n.\r\n", b".a\r\n..\r\n", b""),
    (b".a\r\n.\r\n", b"a\r\n", b""),  # not stuffed by its sender: RFC 5321 4.5.2 still deletes the dot
    (b"\r\n.\r\n", b"\r\n", b""),
    (b"a\r\n..", b"a", None),  # undecided until more comes
    # Smuggling: none of these ends the content, none leaves bare.
    (b"a\n.\nb\r\n.\r\n", b"a\r\n.\r\nb\r\n", b""),
    (b"a\n.\r\nb\r\n.\r\n", b"a\r\n.\r\nb\r\n", b""),
    (b"a\r.\rb\r\n.\r\n", b"a\r\n.\r\nb\r\n", b""),
    (b"a\r.\r\nb\r\n.\r\n", b"a\r\n.\r\nb\r\n", b""),
    (b"a\n.\rb\r\n.\r\n", b"a\r\n.\r\nb\r\n", b""),
    (b"a\r.\nb\r\n.\r\n", b"a\r\n.\r\nb\r\n", b""),
    (b"a\r\n.\nb\r\n.\r\n", b"a\r\n.\r\nb\r\n", b""),
    (b"a\r\n.\rb\r\n.\r\n", b"a\r\n.\r\nb\r\n", b""),
    (b"a\r\n\0.\r\nb\r\n.\r\n", b"a\r\n\0.\r\nb\r\n", b""),
    (b"a\r\r\n.\r\n", b"a\r\n\r\n", b""),  # ends in CRLF.CRLF, whatever stood before it
    (b"a\n..b\r\n.\r\n", b"a\r\n.b\r\n", b""),  # stuffed by a client whose lines end bare
    (b"\n.\r\n.\r\n", b"\r\n.\r\n", b""),
]


@pytest.mark.parametrize(("wire", "content", "rest"), DATA_TABLE)
def test_data_is_read_to_its_end_and_no_further(wire: bytes, content: bytes, rest: bytes | None) -> None:
    for pieces in ([wire], [wire[i : i + 1] for i in range(len(wire))]):
        got, is_ended, behind, _ = read_dots(pieces)
        assert is_ended is (rest is not None)
        if rest is not None:
            assert (got, behind) == (content, rest)


@pytest.mark.parametrize(("wire", "content", "rest"), DATA_TABLE)
def test_data_is_the_same_at_every_split_point(wire: bytes, content: bytes, rest: bytes | None) -> None:
    whole = read_dots([wire])
    for place in range(1, len(wire)):
        got = read_dots([wire[:place], wire[place:]])
        if rest is not None:
            assert got == whole


tricky = st.lists(
    st.sampled_from([b"\r", b"\n", b".", b"a", b"\r\n", b"\r\n.\r\n", b"\0", b"..", b"bc"]), max_size=14
).map(b"".join)


@given(tricky, st.lists(st.integers(0, 60), max_size=6))
def test_cutting_data_changes_nothing(wire: bytes, places: list[int]) -> None:
    wire += b"\r\n.\r\n"
    assert read_dots(cut(wire, places)) == read_dots([wire])


@given(tricky)
def test_content_never_holds_a_bare_line_end(wire: bytes) -> None:
    content, *_ = read_dots([wire + b"\r\n.\r\n"])
    assert not has_bare_line_end(content)


@given(st.lists(st.sampled_from([b"", b".", b"..", b"a", b".a", b"a.b"]), max_size=8))
def test_stuffed_lines_come_back_as_they_were(lines: list[bytes]) -> None:
    wire = b"".join((b"." + line if line.startswith(b".") else line) + b"\r\n" for line in lines) + b".\r\n"
    assert read_dots([wire])[0] == b"".join(line + b"\r\n" for line in lines)


def test_a_cr_and_an_lf_with_something_between_are_bare() -> None:
    assert has_bare_line_end(b"a\rx\nb")


@given(
    tricky
    | st.binary(max_size=40)
    | st.text("\r\n\x0b\x0c\x1c\x85\xff", max_size=12).map(lambda text: text.encode("latin-1"))
)
def test_whatever_is_no_crlf_is_a_bare_line_end_and_nothing_else_is(octets: bytes) -> None:
    assert has_bare_line_end(octets) is (re.search(rb"\r(?!\n)|(?<!\r)\n", octets) is not None)


@given(tricky, st.lists(st.integers(0, 60), max_size=6), st.booleans())
def test_cutting_chunks_changes_nothing(octets: bytes, places: list[int], is_binary: bool) -> None:
    def read(pieces: list[bytes]) -> tuple[bytes, bool]:
        reader = ChunkReader(is_binary=is_binary)
        return b"".join(map(reader.feed, pieces)) + reader.finish(), reader.bare_line_ends

    content, has_bare = read(cut(octets, places))
    assert (content, has_bare) == read([octets])
    if is_binary:
        assert content == octets
    else:
        assert not has_bare_line_end(content)


# content -> header block, what follows it; limits are 60 octets and 3 lines
HEADER_TABLE = [
    (b"A: 1\r\n\r\nbody\r\n", b"A: 1\r\n", b"\r\nbody\r\n"),
    (b"\r\nbody\r\n", b"", b"\r\nbody\r\n"),  # no header at all
    (b"A: 1\r\nB: 2\r\n", b"A: 1\r\nB: 2\r\n", b""),  # no body and no empty line
    (b"just text\r\n", b"", b"just text\r\n"),
    (b"just text\r\n\r\nmore\r\n", b"just text\r\n", b"\r\nmore\r\n"),  # ends at the empty line all the same
    (b"A: 1\r\n 2\r\n\r\n", b"A: 1\r\n 2\r\n", b"\r\n"),  # folded
    (b"A: 1", b"", b"A: 1"),  # by BDAT content may end without CRLF
    (b"x" * 99 + b"\r\n", None, b""),  # may be the name of a field, too long
    (b"A: 1\r\n" + b"\x80" * 99, b"A: 1\r\n", b"\x80" * 99),
    (b"A: 1\r\n" + b"x y" * 33, b"A: 1\r\n", b"x y" * 33),
    (b"A: " + b"x" * 53 + b"\r\n" + b"\r\n", b"A: " + b"x" * 53 + b"\r\n", b"\r\n"),  # 58 octets
    (b"A: " + b"x" * 55 + b"\r\n" + b"\r\n", b"A: " + b"x" * 55 + b"\r\n", b"\r\n"),  # 60 octets, the limit
    (b"A: " + b"x" * 56 + b"\r\n" + b"\r\n", None, b""),  # 61
    (b"A: 1\r\n" * 3 + b"\r\n", b"A: 1\r\n" * 3, b"\r\n"),
    (b"A: 1\r\n" * 4 + b"\r\n", None, b""),
]


def split(pieces: list[bytes]) -> tuple[bytes | None, bytes, bool]:
    splitter = HeaderSplitter(60, 3)
    rest = b"".join(map(splitter.feed, pieces)) + splitter.finish()
    return splitter.block, rest, splitter.is_too_big


@pytest.mark.parametrize(("content", "block", "rest"), HEADER_TABLE)
def test_the_header_block_is_found(content: bytes, block: bytes | None, rest: bytes) -> None:
    assert split([content]) == (block, rest, block is None)


@pytest.mark.parametrize(("content", "block", "rest"), HEADER_TABLE)
def test_the_header_block_is_the_same_at_every_split_point(content: bytes, block: bytes | None, rest: bytes) -> None:
    assert split([content[i : i + 1] for i in range(len(content))]) == (block, rest, block is None)
    for place in range(1, len(content)):
        assert split([content[:place], content[place:]]) == (block, rest, block is None)


header_like = st.lists(
    st.sampled_from([b"A: 1\r\n", b" folded\r\n", b"\r\n", b"text\r\n", b"B:" + b"x" * 30, b"\r\nC: 3\r\n", b"y" * 40]),
    max_size=7,
).map(b"".join)


@given(header_like, st.lists(st.integers(0, 150), max_size=5))
def test_cutting_a_header_changes_nothing(content: bytes, places: list[int]) -> None:
    assert split(cut(content, places)) == split([content])


def inspect(pieces: list[bytes], limit: int) -> tuple[int, bool, bool]:
    inspector = ContentInspector(limit)
    for piece in pieces:
        inspector.inspect(piece)
    return inspector.octets, inspector.has_nul, inspector.has_long_line


@pytest.mark.parametrize(("octets", "is_long"), [(9, False), (10, False), (11, True)])
def test_a_text_line_is_measured_with_its_crlf(octets: int, is_long: bool) -> None:
    line = b"x" * (octets - 2) + b"\r\n"
    for content in (line, b"a\r\n" + line, line + b"a\r\n"):
        for pieces in ([content], [content[:4], content[4:]]):
            assert inspect(pieces, 10)[2] is is_long


@given(st.lists(st.sampled_from([b"abc", b"\r\n", b"\0", b"x" * 9]), max_size=9), st.integers(1, 30))
def test_cutting_content_between_line_ends_changes_no_verdict(pieces: list[bytes], limit: int) -> None:
    assert inspect(pieces, limit) == inspect([b"".join(pieces)], limit)


def test_a_line_is_given_only_when_its_crlf_is_there() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(b"NOOP\r")
    assert buffer.find_line(10) == 0
    buffer.feed(b"\nQUIT")
    assert buffer.find_line(10) == 6
    assert buffer.take(6) == b"NOOP\r\n"
    assert buffer.find_line(10) == 0
    assert buffer.peek(9) == b"QUIT"


@pytest.mark.parametrize(("octets", "found"), [(9, 9), (10, 10), (11, -1)])
def test_a_line_may_be_as_long_as_the_limit_and_no_longer(octets: int, found: int) -> None:
    buffer = ReceiveBuffer()
    buffer.feed(b"x" * (octets - 2) + b"\r\n")
    assert buffer.find_line(10) == found


def test_discarding_stops_behind_the_crlf_even_when_it_is_cut() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(b"x" * 20 + b"\r")
    assert buffer.discard_line() == b"x" * 10
    buffer.feed(b"\nNOOP\r\n")
    assert buffer.discard_line() == b"x" * 10 + b"\r\n"
    assert buffer.peek(4) == b"NOOP"


def test_what_is_used_up_is_not_held() -> None:
    """Or each connection that falls silent behind a large message keeps what its last read brought."""
    buffer = ReceiveBuffer()
    buffer.feed(b"NOOP\r\n" + b"x" * 1000)
    assert buffer.take(6) == b"NOOP\r\n"
    assert buffer.take(1000) == b"x" * 1000
    assert held_octets(buffer) == 0
    buffer.feed(b"QUIT\r\n")
    assert buffer.take(6) == b"QUIT\r\n"


def test_what_was_thrown_away_is_not_held() -> None:
    buffer = ReceiveBuffer()
    buffer.feed(b"x" * 1000)
    assert buffer.discard_line() == b"x" * (1000 - LINE_TAIL_OCTETS)
    assert held_octets(buffer) == LINE_TAIL_OCTETS
    buffer.feed(b"x" * 10 + b"\r\n")
    assert buffer.discard_line() == b"x" * (LINE_TAIL_OCTETS + 10) + b"\r\n"
    assert held_octets(buffer) == 0
