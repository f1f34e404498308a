"""8-bit content made 7-bit: what a reader decodes stays the same, and nothing else is touched."""

import contextlib
import email
import email.policy
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from email.message import EmailMessage, Message
from email.mime.base import MIMEBase
from email.mime.multipart import MIMEMultipart
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.forwarding.reencoding import MOST_DEPTH, MOST_HEADER_OCTETS, CannotReencode, Reencoder, Survey

TEXT = "Content-Type: text/plain; charset=utf-8"
MIME = "MIME-Version: 1.0"


def pieces(message: bytes, cuts: Sequence[int] = ()) -> list[bytes]:
    ends = sorted({0, len(message), *(cut % (len(message) + 1) for cut in cuts)})
    return [message[start:end] for start, end in pairwise(ends)]


def reencoded(message: bytes, cuts: Sequence[int] = ()) -> bytes:
    """The message as it is sent, header and body put together."""
    survey = Survey()
    for piece in pieces(message, cuts):
        survey.feed(piece)
    survey.finish()
    reencoder = Reencoder(survey)
    body = b"".join([reencoder.feed(piece) for piece in pieces(message, cuts)])
    body += reencoder.finish()
    return reencoder.header + body


def lines(*told: str) -> bytes:
    return "".join(f"{line}\r\n" for line in told).encode()


def decoded(message: Message) -> Iterator[tuple[str, object]]:
    """Every part that a reader sees, with its octets."""
    for part in message.walk():
        if not part.is_multipart():
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            yield part.get_content_type(), payload
        else:
            yield part.get_content_type(), None


def read(message: bytes) -> list[tuple[str, object]]:
    return list(decoded(email.message_from_bytes(message)))


# One row a shape: what comes, and what leaves -----------------------------------------------------------------

SHAPES = {
    "text": (
        lines(MIME, TEXT, "Content-Transfer-Encoding: 8bit", "", "Grüße = gut", ""),
        lines(MIME, TEXT, "Content-Transfer-Encoding: quoted-printable", "", "Gr=C3=BC=C3=9Fe =3D gut", ""),
    ),
    "no encoding named": (
        lines(MIME, TEXT, "", "ä"),
        lines(MIME, TEXT, "Content-Transfer-Encoding: quoted-printable", "", "=C3=A4"),
    ),
    "a wrong encoding named": (
        lines("content-transfer-encoding:  7BIT (not at all)", MIME, TEXT, "", "ä"),
        lines("Content-Transfer-Encoding: quoted-printable", MIME, TEXT, "", "=C3=A4"),
    ),
    "a folded encoding": (
        lines("Content-Transfer-Encoding:", " 8bit", MIME, TEXT, "", "ä"),
        lines("Content-Transfer-Encoding: quoted-printable", MIME, TEXT, "", "=C3=A4"),
    ),
    "no MIME": (  # RFC 1428 3
        lines("Subject: x", "", "ä"),
        lines(
            "Subject: x", "Content-Transfer-Encoding: quoted-printable", MIME,
            "Content-Type: text/plain; charset=unknown-8bit", "", "=C3=A4",
        ),
    ),
    "a type, but no MIME-Version": (
        lines(TEXT, "", "ä"),
        lines(TEXT, "Content-Transfer-Encoding: quoted-printable", MIME, "", "=C3=A4"),
    ),
    "octets": (
        lines(MIME, "Content-Type: image/png", "Content-Transfer-Encoding: binary", "", "äöü"),
        lines(MIME, "Content-Type: image/png", "Content-Transfer-Encoding: base64", "", "w6TDtsO8DQo="),
    ),
    "blanks at the end of lines": (
        lines(MIME, TEXT, "", "ä ", "b\t", " c", "-- ", "--x"),
        lines(
            MIME, TEXT, "Content-Transfer-Encoding: quoted-printable", "",
            "=C3=A4=20", "b=09", " c", "=2D-=20", "=2D-x",
        ),
    ),
    "one part of several": (
        lines(
            MIME, 'Content-Type: multipart/mixed; charset="a;b"; boundary="b \\" 1"', "Content-Transfer-Encoding: 8bit",
            "", "préambule", '--b " 1', TEXT, "", "ä", '--b " 1', "", "seven", '--b " 1 ',
            "Content-Type: application/x-y", "", "ä", "", '--b " 1--', "épilogue",
        ),
        lines(
            MIME, 'Content-Type: multipart/mixed; charset="a;b"; boundary="b \\" 1"', "Content-Transfer-Encoding: 7bit",
            "", "pr??ambule", '--b " 1', TEXT, "Content-Transfer-Encoding: quoted-printable", "", "=C3=A4", '--b " 1',
            "", "seven", '--b " 1 ', "Content-Type: application/x-y", "Content-Transfer-Encoding: base64", "",
            "w6QNCg==", '--b " 1--', "??pilogue",
        ),
    ),
    "a message in a message": (
        lines(
            MIME, "Content-Type: message/rfc822", "Content-Transfer-Encoding: 8bit", "", "Subject: inner", "", "ä",
        ),
        lines(
            MIME, "Content-Type: message/rfc822", "Content-Transfer-Encoding: 7bit", "", "Subject: inner",
            "Content-Transfer-Encoding: quoted-printable", MIME, "Content-Type: text/plain; charset=unknown-8bit", "",
            "=C3=A4",
        ),
    ),
    "a digest": (
        lines(MIME, "Content-Type: multipart/digest; boundary=b", "", "--b", "", "Subject: x", MIME, TEXT, "", "ä"),
        lines(
            MIME, "Content-Type: multipart/digest; boundary=b", "", "--b", "", "Subject: x", MIME, TEXT,
            "Content-Transfer-Encoding: quoted-printable", "", "=C3=A4",
        ),
    ),
    "parts within parts, of which one is never ended": (
        lines(
            MIME, "Content-Type: multipart/mixed; boundary=a", "", "--a", "Content-Type: multipart/alternative;",
            " boundary=b", "", "--b", "", "ä", "--a", TEXT, "", "ö", "--a--",
        ),
        lines(
            MIME, "Content-Type: multipart/mixed; boundary=a", "", "--a", "Content-Type: multipart/alternative;",
            " boundary=b", "", "--b", "Content-Transfer-Encoding: quoted-printable", "", "=C3=A4", "--a", TEXT,
            "Content-Transfer-Encoding: quoted-printable", "", "=C3=B6", "--a--",
        ),
    ),
    "the same boundary twice": (
        lines(
            MIME, "Content-Type: multipart/mixed; boundary=a", "", "--a", "Content-Type: multipart/mixed; boundary=a",
            "", "--a", "", "ä", "--a--", "", "--a", "", "ö", "--a--",
        ),
        lines(
            MIME, "Content-Type: multipart/mixed; boundary=a", "", "--a", "Content-Type: multipart/mixed; boundary=a",
            "", "--a", "Content-Transfer-Encoding: quoted-printable", "", "=C3=A4", "--a--", "", "--a",
            "Content-Transfer-Encoding: quoted-printable", "", "=C3=B6", "--a--",
        ),
    ),
    "a part without a body": (
        lines(MIME, "Content-Type: multipart/mixed; boundary=a", "", "--a", "X: y", "--a", "", "ä", "--a--"),
        lines(
            MIME, "Content-Type: multipart/mixed; boundary=a", "", "--a", "X: y", "--a",
            "Content-Transfer-Encoding: quoted-printable", "", "=C3=A4", "--a--",
        ),
    ),
    "a message of another character set in headers": (
        lines(MIME, "Content-Type: message/global", "", "Subject: ä", "", "ö"),
        lines(
            MIME, "Content-Type: message/global", "Content-Transfer-Encoding: quoted-printable", "", "Subject: =C3=A4",
            "", "=C3=B6",
        ),
    ),
    "no end of the last line": (
        lines(MIME, TEXT, "", "ä")[:-2],
        lines(MIME, TEXT, "Content-Transfer-Encoding: quoted-printable", "", "=C3=A4")[:-2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cuts", [(), range(2000), range(0, 2000, 7)], ids=["whole", "octets", "sevens"])
def test_shapes(shape: str, cuts: Sequence[int]) -> None:
    message, expected = SHAPES[shape]
    assert reencoded(message, cuts) == expected
    assert expected.isascii()
    assert reencoded(expected, cuts) == expected  # nothing is left to be done


REFUSED = {
    "a header field holds 8-bit octets": lines("Subject: ä", "", "x"),
    "a part is signed or encrypted": lines(
        MIME, 'Content-Type: multipart/signed; boundary="s"', "", "--s", TEXT, "", "ä", "--s", "", "signature", "--s--"
    ),
    "a part has octets that its encoding does not allow": lines(
        MIME, TEXT, "Content-Transfer-Encoding: base64", "", "ä"
    ),
    "a multipart has no boundary": lines(MIME, "Content-Type: multipart/mixed", "", "ä"),
    "a part is of a type that may not be encoded": lines(
        MIME, "Content-Type: message/external-body; access-type=ftp", "", "ä"
    ),
    "a part says twice what it is": lines(MIME, TEXT, TEXT, "", "ä"),
    "a header is not ended by an empty line": lines("Subject: x", "ä"),
    "parts are nested too deeply": lines(
        MIME, *("Content-Type: message/rfc822", "") * MOST_DEPTH, "Subject: x", "", "ä"
    ),
    "a header is too long": lines(*["X: " + "y" * 60_000] * (1 + MOST_HEADER_OCTETS // 60_000), "", "ä"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_would_not_be_the_same_message_is_refused(why: str) -> None:
    with pytest.raises(CannotReencode, match=f"^{why}$"):
        reencoded(REFUSED[why])


@pytest.mark.parametrize("why", [why for why in REFUSED if "8-bit" not in why and "too" not in why])
def test_what_is_7bit_is_left_alone_whatever_it_is(why: str) -> None:
    message = REFUSED[why].replace("ä".encode(), b"a")
    assert reencoded(message) == message


def test_one_level_less_is_not_too_deep() -> None:
    deep = lines(MIME, *("Content-Type: message/rfc822", "") * (MOST_DEPTH - 1), "Subject: x", "", "ä")
    assert reencoded(deep).isascii()


# Any message ---------------------------------------------------------------------------------------------------

line_octets = st.one_of(
    st.text("abc äöü=-\t .\u20ac", max_size=200).map(str.encode),
    st.binary(max_size=120).map(lambda octets: octets.translate(None, b"\r\n\0")),
    st.sampled_from(
        [b"", b"--", b"--x", b"-", b" ", b"\t", b"=", b".", b"From x", b"\xff" * 90, b"-" * 200, b"=" * 99]
    ),
)
contents = st.lists(line_octets, max_size=8).map(b"\r\n".join)


@st.composite
def entities(draw: st.DrawFn, depth: int = 0) -> Message:
    """A part as an application makes it, with 8-bit content as it is."""
    kind = draw(st.sampled_from(["text", "octets", "parts", "message"] if depth < 3 else ["text", "octets"]))
    if kind == "parts":
        parts: MIMEBase = MIMEMultipart(draw(st.sampled_from(["mixed", "alternative", "related"])))
        for part in draw(st.lists(entities(depth + 1), min_size=1, max_size=3)):
            parts.attach(part)
        return parts
    if kind == "message":
        outer = MIMEBase("message", "rfc822")
        outer.attach(draw(entities(depth + 1)))
        return outer
    one: Message = MIMEBase("text", "plain", charset="utf-8") if kind == "text" else MIMEBase("application", "x-any")
    encoding = draw(st.sampled_from([None, "8bit", "7bit", "binary", "BINARY"]))
    if encoding is not None:
        one["Content-Transfer-Encoding"] = encoding
    content = draw(contents)
    one.set_payload(content.decode("ascii", "surrogateescape"))
    return one


@given(entities(), st.lists(st.integers(0, 10_000), max_size=6))
def test_what_a_reader_decodes_stays_the_same(message: Message, cuts: Sequence[int]) -> None:
    written = message.as_bytes(policy=email.policy.compat32.clone(linesep="\r\n"))
    sent = reencoded(written, cuts)
    assert sent.isascii()
    assert read(sent) == read(written)
    assert (sent == written) == written.isascii()
    assert all(len(line) <= 998 for line in sent.split(b"\r\n")) or written.isascii()


@given(contents, contents, st.lists(st.integers(0, 10_000), max_size=6))
def test_a_part_that_is_7bit_is_not_touched_by_its_neighbour(seven: bytes, eight: bytes, cuts: Sequence[int]) -> None:
    seven = bytes(octet & 0x7F or 0x61 for octet in seven)
    seven = seven.replace(b"\r", b"").replace(b"\n", b"")
    message = b"".join(
        (
            lines(MIME, "Content-Type: multipart/mixed; boundary=XyZ", ""),
            b"--XyZ\r\n\r\n", seven, b"\r\n--XyZ\r\nContent-Type: text/plain\r\n\r\n", eight, b"\r\n--XyZ--\r\n",
        )
    )  # fmt: skip
    sent = reencoded(message, cuts)
    assert b"--XyZ\r\n\r\n" + seven + b"\r\n--XyZ\r\n" in sent


@given(st.binary(max_size=400).map(lambda octets: octets.replace(b"\n", b"\r\n")), st.lists(st.integers(0, 999)))
def test_any_octets_are_made_7bit_or_refused_however_they_are_cut(octets: bytes, cuts: Sequence[int]) -> None:
    outcomes = []
    for chosen in ((), cuts):
        try:
            outcomes.append(reencoded(octets, chosen))
        except CannotReencode as refusal:
            outcomes.append(str(refusal).encode())
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].isascii()


@given(st.lists(line_octets.filter(lambda line: not line.isascii()), min_size=1, max_size=4))
def test_lines_are_as_long_as_any_relay_takes(content: Sequence[bytes]) -> None:
    for header in (lines(MIME, TEXT, ""), lines(MIME, "Content-Type: image/png", "")):
        body = reencoded(header + b"\r\n".join(content)).partition(b"\r\n\r\n")[2]
        assert max(map(len, body.split(b"\r\n"))) <= 76


def test_no_line_of_a_part_begins_as_a_boundary_does() -> None:
    """Some readers take whatever begins with a boundary for one."""
    for blanks in range(90):
        line = "ä" + " " * blanks + "-" * 200
        body = reencoded(lines(MIME, TEXT, "", line)).partition(b"\r\n\r\n")[2]
        assert not any(one.startswith(b"--") for one in body.split(b"\r\n"))


def test_a_mail_that_an_application_makes() -> None:
    message = EmailMessage(policy=email.policy.SMTP.clone(cte_type="8bit"))
    message["Subject"] = "x"
    message.set_content("Grüße\n" * 30, cte="8bit")
    message.add_alternative("<p>Grüße</p>" * 30, subtype="html", cte="8bit")
    message.add_attachment(bytes(range(256)) * 9, maintype="application", subtype="x-any", filename="any.bin")
    written = message.as_bytes()
    assert not written.isascii()
    sent = reencoded(written)
    assert sent.isascii()
    assert read(sent) == read(written)


# What it costs -------------------------------------------------------------------------------------------------


def many_parts(count: int) -> bytes:
    part = "--b\r\n\r\nä\r\n".encode() * count
    return lines(MIME, "Content-Type: multipart/mixed; boundary=b", "") + part + b"--b--\r\n"


def deep(count: int) -> bytes:
    levels = 90
    head = b"".join(
        lines(MIME, f"Content-Type: multipart/mixed; boundary=b{level}", "", f"--b{level}") for level in range(levels)
    )
    return head + b"\r\n" + "--b89\r\n\r\nä\r\n".encode() * count


COSTLY: dict[str, Callable[[int], bytes]] = {
    "many parts": many_parts,
    "deep parts": deep,
    "long text": lambda count: lines(MIME, TEXT, "") + "äbc defghi \r\n".encode() * count,
    "long octets": lambda count: lines(MIME, "Content-Type: image/png", "") + ("ä" * 30 + "\r\n").encode() * count,
    "one line": lambda count: lines(MIME, TEXT, "") + "ä".encode() * (6 * count),
    "hyphens": lambda count: lines(MIME, TEXT, "") + "ä".encode() + b"-" * (12 * count),
    "parameters": lambda count: b"Content-Type: multipart/mixed" + b';a="' * count + lines("", "", "ä"),
    "blanks": lambda count: b"Content-Type: multipart/mixed;" + b" " * (5 * count) + lines("", "", "ä"),
}


@pytest.mark.parametrize("shape", COSTLY)
def test_time_grows_with_the_length_and_no_faster(shape: str) -> None:
    def seconds(count: int) -> float:
        message = COSTLY[shape](count)
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            with contextlib.suppress(CannotReencode):
                reencoded(message, range(0, len(message), 16_384))
            best = min(best, time.process_time() - began)
        return best

    # Eight times as long: quadratic would be sixty-four times as slow.
    assert seconds(16_000) < 35 * max(seconds(2_000), 0.005)


def test_memory_does_not_grow_with_the_message() -> None:
    head, line = lines(MIME, "Content-Type: image/png", ""), ("ä" * 35 + "\r\n").encode() * 200
    survey = Survey()
    tracemalloc.start()
    try:
        survey.feed(head)
        for _ in range(200):
            survey.feed(line)
        survey.finish()
        reencoder = Reencoder(survey)
        reencoder.feed(head)
        for _ in range(200):
            assert len(reencoder.feed(line)) < 4 * len(line)
        reencoder.finish()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 40 * len(line)
