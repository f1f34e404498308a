"""Content while it is received: whole, cut anywhere, by DATA and by BDAT, with one verdict and one result."""

import itertools
from collections.abc import Iterator
from typing import Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from otel_smtp.smtp import replies
from otel_smtp.smtp.content import ContentLimits, IncomingContent, needs_smtputf8, whole_message
from otel_smtp.smtp.received import HeaderFacts
from otel_smtp.smtp.replies import Reply

LIMITS: Final = ContentLimits(
    text_line=40, header_size=60, header_lines=3, hops=1, rejects_bare_line_ends=False
)  # small, so that a few octets reach each of them
SIZE_LIMIT: Final = 120


class Taken:
    """Takes what comes out."""

    def __init__(self) -> None:
        self.block: bytes | None = None
        self.facts: HeaderFacts | None = None
        self.body = b""

    def header_received(self, block: bytes, facts: HeaderFacts) -> None:
        assert self.block is None, "one header block per message"
        assert self.body == b"", "the header block comes first"
        self.block = block
        self.facts = facts

    def content_received(self, data: bytes) -> None:
        assert self.block is not None, "the header block comes first"
        assert data
        self.body += data


Result = tuple[Reply | None, bytes | None, HeaderFacts | None, bytes, int, bytes]


def by_data(pieces: Iterator[bytes], limits: ContentLimits = LIMITS, *, is_binary: bool = False) -> Result:
    """What comes of octets after DATA: verdict, header block and its facts, the octets behind it, how many octets, and
    what followed the end."""
    taken = Taken()
    content = IncomingContent(limits, SIZE_LIMIT, taken, is_binary=is_binary, by_data=True)
    first = next(pieces)
    if (found := whole_message(first, limits, SIZE_LIMIT)) is not None:
        block, facts, body = found
        return None, block, facts, body, len(block) + len(body), b"".join(pieces)
    for piece in itertools.chain([first], pieces):
        content.feed(piece)
        if content.is_ended:
            break
    verdict = content.finish()
    rest = content.rest + b"".join(pieces)
    if verdict is not None:
        # What is handed up of refused content depends on how it was cut.
        return verdict, None, None, b"", content.octets, rest
    return verdict, taken.block, taken.facts, taken.body, content.octets, rest


def whole(octets: bytes) -> Iterator[bytes]:
    yield octets


def one_by_one(octets: bytes) -> Iterator[bytes]:
    for place in range(len(octets)):
        yield octets[place : place + 1]


ATOMS: Final = (
    b"\r\n", b"\n", b"\r", b".", b"..", b" ", b"a: b\r\n", b"Received: x\r\n", b"\r\n\r\n", b"text", b"\0",
    b"x" * 38, b"x" * 39, b"traceparent: y\r\n", b"Message-ID: <m@x>\r\n", b"y" * 25,
)  # fmt: skip


@given(st.lists(st.sampled_from(ATOMS), max_size=8).map(b"".join), st.booleans())
@example(b"a: b\r\n\r\nbody\r\n", False)
@example(b"a: b\r\n\r\n.body\r\n", False)  # a stuffed dot
@example(b".a: b\r\n\r\n", False)
@example(b"\r\nbody\r\n", False)  # no header
@example(b"a: b\r\n", False)  # no body
@example(b"", False)
@example(b"a: b\r\n\r\nx\r\n.\r\nrest", False)
@example(b"Received: x\r\nReceived: y\r\n\r\n", False)
@example(b"a: b\r\n\r\nx\ny\r\n", True)
def test_a_message_in_one_piece_is_taken_as_one_that_comes_octet_by_octet(content: bytes, rejects: bool) -> None:
    limits = ContentLimits(40, 60, 3, 1, rejects_bare_line_ends=rejects)
    octets = content + (b"" if content.endswith(b"\r\n") or not content else b"\r\n") + b".\r\n"
    assert by_data(whole(octets), limits) == by_data(one_by_one(octets), limits)


@pytest.mark.parametrize(
    ("octets", "verdict"),
    [
        (b"a: b\r\n\r\nbody\r\n", None),
        (b"a: b\r\n\r\n" + b"x" * 38 + b"\r\n", None),
        (b"a: b\r\n\r\n" + b"x" * 39 + b"\r\n", replies.LINE_IN_CONTENT_TOO_LONG),
        (b"a: b\r\n\r\n" + b"line\r\n" * 18, None),  # 116 octets
        (b"a: b\r\n\r\n" + b"line\r\n" * 19, replies.MESSAGE_TOO_BIG),
        (b"a: b\r\n" * 3 + b"\r\n", None),
        (b"a: b\r\n" * 4 + b"\r\n", replies.HEADER_TOO_BIG),
        (b"a: " + b"b" * 35 + b"\r\nc: " + b"d" * 15 + b"\r\n\r\n", None),  # 60 octets
        (b"a: " + b"b" * 35 + b"\r\nc: " + b"d" * 16 + b"\r\n\r\n", replies.HEADER_TOO_BIG),
        (b"Received: x\r\n\r\n", None),
        (b"Received: x\r\nReceived: x\r\n\r\n", replies.TOO_MANY_HOPS),
        (b"a: b\r\n\r\n\0\r\n", replies.NUL_IN_CONTENT),
        (b"a: b\r\n\r\nx\ny\r\n", None),
    ],
)
@pytest.mark.parametrize("cut", [whole, one_by_one])
def test_each_limit_is_kept_to_the_octet(octets: bytes, verdict: Reply | None, cut: "type[Iterator[bytes]]") -> None:
    assert by_data(cut(octets + b".\r\n"))[0] is verdict  # type: ignore[call-arg]  # a function of this file


@pytest.mark.parametrize(
    ("octets", "verdict"),
    [(b"a: b\r\n\r\nx\ny\r\n", replies.BARE_LINE_END), (b"a: b\r\n\r\nx\r\ny\r\n", None), (b"a: b\r\n", None)],
)
@pytest.mark.parametrize("cut", [whole, one_by_one])
def test_bare_line_ends_are_refused_where_they_are_and_good_ones_pass(
    octets: bytes, verdict: Reply | None, cut: "type[Iterator[bytes]]"
) -> None:
    limits = ContentLimits(40, 60, 3, 1, rejects_bare_line_ends=True)
    assert by_data(cut(octets + b".\r\n"), limits)[0] is verdict  # type: ignore[call-arg]  # a function of this file


def test_a_quick_message_is_handed_up_as_it_came() -> None:
    verdict, block, facts, body, octets, rest = by_data(whole(b"Message-ID: <m@x>\r\n\r\nbody\r\n.\r\n"))
    assert (verdict, block, body, rest) == (None, b"Message-ID: <m@x>\r\n", b"\r\nbody\r\n", b"")
    assert facts == HeaderFacts(message_id="<m@x>")
    assert octets == len(b"Message-ID: <m@x>\r\n\r\nbody\r\n")


@given(st.lists(st.sampled_from(ATOMS), max_size=6), st.booleans())
def test_by_chunks_the_cut_changes_nothing_and_no_dot_is_special(atoms: list[bytes], is_binary: bool) -> None:
    def taken(pieces: list[bytes]) -> Result:
        sink = Taken()
        content = IncomingContent(LIMITS, SIZE_LIMIT, sink, is_binary=is_binary, by_data=False)
        for piece in pieces:
            content.feed(piece)
        verdict = content.finish()
        if verdict is not None:
            return verdict, None, None, b"", content.octets, b""
        return verdict, sink.block, sink.facts, sink.body, content.octets, b""

    octets = b"".join(atoms)
    result = taken([octets] if octets else [])
    assert taken(list(one_by_one(octets))) == result
    if result[0] is None and is_binary:
        added = b"\r\n" if octets.startswith((b" ", b"\t")) else b""
        assert (result[1] or b"") + result[3] == added + octets


def test_a_message_that_is_too_big_is_counted_and_not_handed_up() -> None:
    taken = Taken()
    content = IncomingContent(LIMITS, SIZE_LIMIT, taken, is_binary=False, by_data=True)
    content.feed(b"a: b\r\n\r\n")
    for _ in range(100):
        content.feed(b"line\r\n")
    assert content.octets > 5 * SIZE_LIMIT
    assert len(taken.body) <= SIZE_LIMIT
    assert content.refusal() is replies.MESSAGE_TOO_BIG


@pytest.mark.parametrize(
    ("header", "is_needed"),
    [
        (b"", False),
        (b"Subject: x\r\n", False),
        (b"Subject: \xc3\xa4\r\n", True),
        (b"Content-Type: text/plain\r\n", False),
        (b"Subject: x\r\nContent-Type: application/pdf\r\n", False),
        (b"Content-Type: multipart/mixed\r\n", True),
        (b"Subject: x\r\ncontent-type :\r\n\tMessage/RFC822\r\n", True),
        (b"Content-Type: text/plain\r\nContent-Type: multipart/mixed\r\n", True),
        (b"Content-Type: (a comment) multipart/mixed\r\n", True),
        (b"Content-Type:\r\n", True),  # nobody knows
        (b"X-Content-Type: multipart/mixed\r\n", False),
        (b"Subject: the\r\n content-type: multipart/mixed\r\n", False),
    ],
)
def test_8bit_content_needs_smtputf8_where_its_headers_may_be_8bit(header: bytes, is_needed: bool) -> None:
    assert needs_smtputf8(header) is is_needed
