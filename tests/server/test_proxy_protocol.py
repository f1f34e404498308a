"""PROXY headers: both versions, cut anywhere, every octet changed."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.observing import Endpoint
from otel_smtp.server.proxy_protocol import (
    MAX_V1_OCTETS,
    MAX_V2_OCTETS,
    SHORTEST_HEADER_OCTETS,
    ProxyHeader,
    ProxyHeaderParser,
    ProxyProtocolError,
)

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
V4 = struct.pack("!4s4sHH", bytes((192, 0, 2, 1)), bytes((198, 51, 100, 2)), 56324, 25)
V6 = struct.pack("!16s16sHH", bytes.fromhex("20010db8" + "0" * 23 + "1"), b"\0" * 15 + b"\1", 56324, 25)
MAPPED = struct.pack("!16s16sHH", b"\0" * 10 + b"\xff\xff" + bytes((192, 0, 2, 1)), b"\0" * 15 + b"\1", 1, 2)
UNIX = b"/run/a.sock".ljust(108, b"\0") + b"\0abstract\n".ljust(108, b"\0")


def v2(family: int, body: bytes, *, version_command: int = 0x21, length: int | None = None) -> bytes:
    return SIGNATURE + struct.pack("!BBH", version_command, family, len(body) if length is None else length) + body


HEADERS = [
    (b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 25\r\n", ("192.0.2.1", 56324), ("198.51.100.2", 25)),
    (b"PROXY TCP6 2001:db8::1 ::1 56324 25\r\n", ("2001:db8::1", 56324), ("::1", 25)),
    (b"PROXY TCP6 2001:0db8:0000:0000:0000:0000:0000:0001 ::1 0 65535\r\n", ("2001:db8::1", 0), ("::1", 65535)),
    (b"PROXY TCP6 ::ffff:192.0.2.1 ::1 1 2\r\n", ("192.0.2.1", 1), ("::1", 2)),
    (b"PROXY UNKNOWN\r\n", None, None),
    (b"PROXY UNKNOWN ffff:f...f:ffff ffff:f...f:ffff 65535 65535\r\n", None, None),
    (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", None, None),  # 107 octets
    (v2(0x11, V4), ("192.0.2.1", 56324), ("198.51.100.2", 25)),
    (v2(0x21, V6), ("2001:db8::1", 56324), ("::1", 25)),
    (v2(0x21, MAPPED), ("192.0.2.1", 1), ("::1", 2)),
    (v2(0x11, V4 + b"\x20\x00\x03abc"), ("192.0.2.1", 56324), ("198.51.100.2", 25)),  # a TLV behind
    (v2(0x31, UNIX), ("/run/a.sock", None), ("?abstract?", None)),
    (v2(0x00, b""), None, None),  # unspecified
    (v2(0x00, b"whatever"), None, None),
    (v2(0x11, V4, version_command=0x20), None, None),  # LOCAL: addresses are to be ignored
    (v2(0x00, b"", version_command=0x20), None, None),
    (v2(0x11, V4 + b"\x00" * (MAX_V2_OCTETS - 28)), ("192.0.2.1", 56324), ("198.51.100.2", 25)),
]


def endpoint(place: tuple[str, int | None] | None) -> Endpoint | None:
    return None if place is None else Endpoint(*place)


@pytest.mark.parametrize(("octets", "source", "destination"), HEADERS, ids=lambda value: repr(value)[:40])
@pytest.mark.parametrize("rest", [b"", b"EHLO x\r\n", b"PROXY UNKNOWN\r\n"])
def test_a_header_is_read(
    octets: bytes, source: tuple[str, int | None] | None, destination: tuple[str, int | None] | None, rest: bytes
) -> None:
    # A second header is no header: it belongs to the session and is refused there.
    assert ProxyHeaderParser().feed(octets + rest) == ProxyHeader(endpoint(source), endpoint(destination), rest)


@pytest.mark.parametrize(("octets", "source", "destination"), HEADERS, ids=lambda value: repr(value)[:40])
def test_reading_what_is_wanted_takes_the_header_and_no_more(
    octets: bytes, source: tuple[str, int | None] | None, destination: tuple[str, int | None] | None
) -> None:
    parser = ProxyHeaderParser()
    assert parser.octets_wanted == SHORTEST_HEADER_OCTETS
    position = 0
    header = None
    while header is None:
        assert parser.octets_wanted > 0
        piece = octets[position : position + parser.octets_wanted]
        position += len(piece)
        header = parser.feed(piece)
    assert position == len(octets)
    assert header == ProxyHeader(endpoint(source), endpoint(destination))


@pytest.mark.parametrize(("octets", "source", "destination"), HEADERS[:-1], ids=lambda value: repr(value)[:40])
def test_a_header_may_come_octet_by_octet(
    octets: bytes, source: tuple[str, int | None] | None, destination: tuple[str, int | None] | None
) -> None:
    parser = ProxyHeaderParser()
    for octet in octets[:-1]:
        assert parser.feed(bytes((octet,))) is None
    assert parser.feed(octets[-1:]) == ProxyHeader(endpoint(source), endpoint(destination))


@pytest.mark.parametrize(
    "octets",
    [
        b"EHLO x\r\n",
        b"E",
        b"proxy TCP4 192.0.2.1 198.51.100.2 1 2\r\n",
        b"PROXY\r\n",
        b"PROXY \r\n",
        b"PROXY TCP4\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 1\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2 3\r\n",
        b"PROXY TCP4  192.0.2.1 198.51.100.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2 \r\n",
        b"PROXY TCP4 ::1 ::1 1 2\r\n",
        b"PROXY TCP6 192.0.2.1 198.51.100.2 1 2\r\n",
        b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 65536 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 01 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 -1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 1 +2\r\n",
        b"PROXY TCP4 192.0.2.01 198.51.100.2 1 2\r\n",
        b"PROXY TCP4 192.0.2 198.51.100.2 1 2\r\n",
        b"PROXY UDP4 192.0.2.1 198.51.100.2 1 2\r\n",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 1 2\n" + b"x" * 100,
        b"PROXY TCP4 192.0.2.\xff 198.51.100.2 1 2\r\n",
        "PROXY TCP4 192.0.2.١ 198.51.100.2 1 2\r\n".encode(),
        b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n",  # 108 octets
        b"PROXY " + b"x" * (MAX_V1_OCTETS - 6),
        SIGNATURE[:-1] + b"\0",
        v2(0x11, V4, version_command=0x11),
        v2(0x11, V4, version_command=0x22),
        v2(0x11, V4[:-1]),
        v2(0x21, V6[:-1]),
        v2(0x31, UNIX[:-1]),
        v2(0x11, b""),
        v2(0x12, V4),  # datagram
        v2(0x41, V4),
        v2(0x10, V4),
        v2(0x11, V4, length=0xFFFF),  # refused before it is waited for
        v2(0x11, V4, length=MAX_V2_OCTETS - 15),
    ],
    ids=repr,
)
def test_what_is_no_header_is_refused(octets: bytes) -> None:
    with pytest.raises(ProxyProtocolError):
        ProxyHeaderParser().feed(octets)


@pytest.mark.parametrize("octets", [header for header, _, _ in HEADERS[:-1]], ids=lambda value: repr(value)[:40])
def test_every_octet_changed_gives_a_header_or_an_error(octets: bytes) -> None:
    for place in range(len(octets)):
        for octet in range(0, 256, 3):
            parser = ProxyHeaderParser()
            try:
                parser.feed(octets[:place] + bytes((octet,)) + octets[place + 1 :])
            except ProxyProtocolError:
                continue


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.sampled_from([b"", b"PROXY ", SIGNATURE]))
def test_any_octets_are_judged_within_the_bounds(pieces: list[bytes], start: bytes) -> None:
    parser = ProxyHeaderParser()
    whole = start + b"".join(pieces)
    taken = 0
    try:
        for piece in (start, *pieces):
            taken += len(piece)
            header = parser.feed(piece)
            if header is not None:
                assert ProxyHeaderParser().feed(whole[:taken]) == header
                return
            assert taken <= MAX_V2_OCTETS
    except ProxyProtocolError:
        with pytest.raises(ProxyProtocolError):
            ProxyHeaderParser().feed(whole[:taken])


def test_errors_do_not_repeat_what_came() -> None:
    with pytest.raises(ProxyProtocolError) as caught:
        ProxyHeaderParser().feed(b"PROXY TCP4 secret secret 1 2\r\n")
    assert "secret" not in str(caught.value)
