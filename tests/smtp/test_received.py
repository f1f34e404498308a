"""The Received field, the facts of a header block, and trace headers taken out and put in."""

import datetime
import email.utils
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from otel_smtp.smtp.errors import LocalProtocolError
from otel_smtp.smtp.received import (
    HeaderFacts,
    inspect_header,
    received_field,
    received_head,
    replace_trace_headers,
    rfc5322_date,
    with_protocol,
)

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTHER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
DATE = "Tue, 14 Nov 2023 22:13:20 +0000"


def received(**changed: object) -> bytes:
    words: dict[str, object] = {
        "helo": "client.example.com",
        "peer_host": "192.0.2.1",
        "by": "gw.example.com",
        "with_protocol": "ESMTPS",
        "identifier": "0af7651916cd43dd8448eb211c80319c",
        "unix_seconds": 1_700_000_000.5,
    }
    words |= changed
    identifier, now = words.pop("identifier"), words.pop("unix_seconds")
    return received_field(received_head(**words), identifier, now)  # type: ignore[arg-type]  # words by name


def test_a_received_field_says_from_whom_by_whom_and_when() -> None:
    assert received(tls="TLSv1.3 TLS_AES_256_GCM_SHA384") == (
        b"Received: from client.example.com ([192.0.2.1])\r\n"
        b" by gw.example.com with ESMTPS (TLSv1.3 TLS_AES_256_GCM_SHA384)\r\n"
        b" id 0af7651916cd43dd8448eb211c80319c;\r\n"
        b" Tue, 14 Nov 2023 22:13:20 +0000\r\n"
    )
    assert received(helo="[IPv6:::1]", peer_host="::1", by="[127.0.0.1]", with_protocol="SMTP", identifier="a.b") == (
        b"Received: from [IPv6:::1] ([IPv6:::1])\r\n"
        b" by [127.0.0.1] with SMTP\r\n"
        b" id a.b;\r\n"
        b" Tue, 14 Nov 2023 22:13:20 +0000\r\n"
    )


@pytest.mark.parametrize(
    "helo",
    [
        "",
        "host.example.com.",
        "::1",
        "jürgen-pc",
        "a b",
        "x)\r\nEvil: 1",
        "x\nBcc: a@b",
        "a(b",
        'a"b',
        "-pod-",
        "a;b",
        "x" * 300,
        "[1.2.3.4",
    ],
)
def test_a_greeting_name_that_is_no_host_name_gives_way_to_the_address(helo: str) -> None:
    assert received(helo=helo).startswith(b"Received: from [192.0.2.1] ([192.0.2.1])\r\n by ")


def test_a_client_on_a_unix_socket_is_local() -> None:
    assert received(peer_host="/run/otel-smtp.sock").startswith(b"Received: from client.example.com (local)\r\n")
    assert received(peer_host="", helo=" ").startswith(b"Received: from unknown (local)\r\n")


@pytest.mark.parametrize("name", ["by", "with_protocol", "identifier", "tls"])
@pytest.mark.parametrize("word", ["a\r\nEvil: 1", "a\x00", "a;b(", "ü"])
def test_a_malformed_word_of_our_own_is_our_bug(name: str, word: str) -> None:
    with pytest.raises(LocalProtocolError):
        received(**{name: word})


@given(st.text(), st.text())
def test_no_client_can_end_the_field_or_forge_another(helo: str, peer_host: str) -> None:
    field = received(helo=helo, peer_host=peer_host)
    assert inspect_header(field) == HeaderFacts(hops=1)
    assert field.endswith(b"\r\n")
    lines = field[:-2].split(b"\r\n")
    assert lines[0].startswith(b"Received: from ")
    assert all(line.startswith(b" ") for line in lines[1:])
    assert not any(octet in line for line in lines for octet in b"\r\n\x00")
    assert len(max(lines, key=len)) <= 998


@pytest.mark.parametrize(
    ("greeting", "tls", "authenticated", "utf8", "word"),
    [
        ("HELO", False, False, False, "SMTP"),
        ("HELO", True, False, False, "SMTP"),
        ("EHLO", False, False, False, "ESMTP"),
        ("EHLO", False, True, False, "ESMTPA"),
        ("EHLO", True, False, False, "ESMTPS"),
        ("EHLO", True, True, False, "ESMTPSA"),
        ("EHLO", False, False, True, "UTF8SMTP"),
        ("EHLO", True, True, True, "UTF8SMTPSA"),
        ("LHLO", False, False, False, "LMTP"),
        ("LHLO", True, False, False, "LMTPS"),
        ("LHLO", False, True, True, "UTF8LMTPA"),
    ],
)
def test_the_with_word_is_the_registered_one(
    greeting: str, tls: bool, authenticated: bool, utf8: bool, word: str
) -> None:
    made = with_protocol(
        is_extended=greeting == "EHLO",
        is_lmtp=greeting == "LHLO",
        is_tls=tls,
        is_authenticated=authenticated,
        is_utf8=utf8,
    )
    assert made == word


@pytest.mark.parametrize(
    ("unix_seconds", "date"),
    [
        (0, "Thu, 1 Jan 1970 00:00:00 +0000"),
        (-1, "Wed, 31 Dec 1969 23:59:59 +0000"),
        (951782400, "Tue, 29 Feb 2000 00:00:00 +0000"),  # a leap day of a century
        (951868800, "Wed, 1 Mar 2000 00:00:00 +0000"),
        (4107542400, "Mon, 1 Mar 2100 00:00:00 +0000"),  # a century without one
        (1_700_000_000, DATE),
    ],
)
def test_dates(unix_seconds: int, date: str) -> None:
    assert rfc5322_date(unix_seconds) == date


@given(st.integers(-2_208_988_800, 253_402_300_799))  # 1900 to 9999
def test_every_date_is_that_of_the_calendar(unix_seconds: int) -> None:
    moment = datetime.datetime.fromtimestamp(unix_seconds, datetime.UTC)
    written = rfc5322_date(unix_seconds)
    assert email.utils.parsedate_to_datetime(written) == moment
    assert written.startswith(moment.strftime("%a, "))


@pytest.mark.parametrize(
    ("block", "facts"),
    [
        (b"", HeaderFacts(0)),
        (b"Received: x\r\n", HeaderFacts(1)),
        (b"Subject: x\r\nReceived: a\r\n\tReceived: b\r\nreceived:c\r\nRECEIVED \t: d\r\n", HeaderFacts(3)),
        (b"X-Received: a\r\nReceived-SPF: b\r\nReceivedx: c\r\nReceived\r\n", HeaderFacts(0)),
        (b"Subject: Received: a\r\n", HeaderFacts(0)),
        (f"traceparent: {PARENT}\r\n".encode(), HeaderFacts(0, (PARENT,))),
        (f"A: b\r\nTraceParent:\t{PARENT} \r\n".encode(), HeaderFacts(0, (PARENT,))),
        (f"traceparent:\r\n {PARENT}\r\nA: b\r\n".encode(), HeaderFacts(0, (PARENT,))),  # folded
        (f"traceparent : {PARENT}\r\n".encode(), HeaderFacts(0, (PARENT,))),  # obsolete form
        (f"traceparent: {PARENT}".encode(), HeaderFacts(0, (PARENT,))),  # no line end
        (f"traceparent: {PARENT}\r\ntraceparent: {OTHER}\r\n".encode() * 2, HeaderFacts(0, (PARENT, OTHER))),
        (f"traceparent: {PARENT}\r\nTRACEPARENT: {PARENT}\r\n".encode(), HeaderFacts(0, (PARENT, PARENT))),
        (b"traceparent:\r\n", HeaderFacts(0, ("",))),
        (b"traceparent: \xff\r\n", HeaderFacts(0, ("",))),
        (b"traceparent: " + b"0" * 513 + b"\r\n", HeaderFacts(0, ("",))),
        (b"x-traceparent: a\r\ntraceparents: b\r\ntraceparent\r\nSubject: traceparent: c\r\n", HeaderFacts(0)),
        (b"tracestate: a=b,\r\n\tc=d\r\ntracestate: e=f\r\n", HeaderFacts(0, (), "a=b,\tc=d")),
        (b"tracestate: " + b"a" * 512 + b"\r\n", HeaderFacts(0, (), "a" * 512)),
        (b"tracestate: " + b"a" * 513 + b"\r\n", HeaderFacts(0)),
        (b"Message-ID: <a@b>\r\nmessage-id: <c@d>\r\n", HeaderFacts(0, message_id="<a@b>")),
        (b"Message-Id:\r\n <a@b>\r\n", HeaderFacts(0, message_id="<a@b>")),
        (b"Message-ID: <\xc3\xbc\xff@b>\r\n", HeaderFacts(0, message_id="<ü\ufffd@b>")),
        (b"Message-ID: " + b"x" * 2000 + b"\r\n", HeaderFacts(0, message_id="x" * 998)),
        (b"Message-ID:\r\n", HeaderFacts(0, message_id="")),
        (b"Resent-Message-ID: <a@b>\r\n", HeaderFacts(0)),
    ],
)
def test_the_facts_of_a_header_block(block: bytes, facts: HeaderFacts) -> None:
    assert inspect_header(block) == facts


FIELDS = b"From: a@b\r\nSubject: traceparent: x\r\n traceparent: y\r\nTo: c@d\r\n"


@pytest.mark.parametrize(
    ("block", "without"),
    [
        (b"", b""),
        (FIELDS, FIELDS),
        (b"traceparent: x\r\n", b""),
        (b"traceparent: x", b""),
        (b"traceparent: x\r\n" + FIELDS, FIELDS),
        (FIELDS + b"TRACESTATE: x\r\n", FIELDS),
        (FIELDS + b"tracestate: x", FIELDS),
        (FIELDS + b"TraceParent:\r\n x\r\n\ty\r\nTraceState : z\r\n" + FIELDS, FIELDS + FIELDS),
        (b"traceparent: x\r\n" * 3 + FIELDS + b"tracestate: y\r\n" * 3, FIELDS),
        (b"A: b\ntraceparent: x\nC: d\n", b"A: b\nC: d\n"),  # bare LF
        (
            b"traceparents: x\r\ntraceparent\r\nx-tracestate: y\r\n",
            b"traceparents: x\r\ntraceparent\r\nx-tracestate: y\r\n",
        ),
        (b"trace: x\r\ntracestate:\r\n", b"trace: x\r\n"),
        (b"A: \xff\r\ntraceparent: \xff\r\nB: \xff\r\n", b"A: \xff\r\nB: \xff\r\n"),
    ],
)
def test_trace_headers_are_replaced(block: bytes, without: bytes) -> None:
    assert replace_trace_headers(block, None) is block
    assert replace_trace_headers(block, {}) == without
    put = replace_trace_headers(block, {"traceparent": PARENT, "tracestate": "a=b"})
    assert put == f"traceparent: {PARENT}\r\ntracestate: a=b\r\n".encode() + without


@pytest.mark.parametrize("below", [b"", FIELDS, b"Received: by x;\r\n date\r\n", b"\r\n folded: no field\r\n"])
@pytest.mark.parametrize("own", [received(), b"Received: x\r\n", b"Received:\r\n\tx\r\n y\r\n"])
def test_trace_headers_stand_below_the_received_field_that_comes_first(own: bytes, below: bytes) -> None:
    block = own + b"TraceParent: old\r\n" + below
    put = replace_trace_headers(block, {"traceparent": PARENT})
    assert replace_trace_headers(block, {"traceparent": PARENT}, len(own)) == put
    assert put == own + f"traceparent: {PARENT}\r\n".encode() + below
    assert replace_trace_headers(FIELDS + own, {"traceparent": PARENT}).startswith(b"traceparent: ")


@pytest.mark.parametrize(
    "carrier",
    [
        {"traceparent": "x\r\nBcc: a@b"},
        {"traceparent": "x\x00"},
        {"traceparent": "ü"},
        {"traceparent": "x" * 999},
        {"trace parent": "x"},
        {"a:b": "x"},
        {"": "x"},
        {"a\r\nb": "x"},
    ],
)
def test_what_is_not_fit_for_a_header_is_left_out(carrier: dict[str, str]) -> None:
    assert replace_trace_headers(FIELDS, carrier) == FIELDS


PIECES = [
    b"traceparent",
    b"TraceState",
    b": ",
    b":",
    b"x",
    b"\r\n",
    b"\r\n",
    b" ",
    b"\t",
    b"\n",
    b"\r",
    b"Received",
    b"\xff",
]


@given(st.lists(st.sampled_from([*PIECES, b"\nreceived", b" :"]), max_size=40).map(b"".join))
@example(b"Received : x\r\n")
@example(b"Subject: x\r\nRECEIVED\t:\r\n x\r\nreceived:y\r\n")
@example(b"X-Received: x\r\n received: y\r\nreceived x: y\r\n")
def test_hops_are_the_received_fields_however_they_are_written(block: bytes) -> None:
    """A blank before the colon is the obsolete form (RFC 5322 4.5); without it a loop would not be seen."""
    fields = [line for line in block.split(b"\n") if re.match(rb"received[ \t]*:", line, re.IGNORECASE)]
    assert inspect_header(block).hops == len(fields)


@given(st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join))
def test_after_removal_there_are_none_and_nothing_else_is_touched(block: bytes) -> None:
    left = replace_trace_headers(block, {})
    facts = inspect_header(left)
    assert facts.traceparents == ()
    assert replace_trace_headers(left, {}) == left
    assert facts.hops == inspect_header(block).hops
    if inspect_header(block).traceparents == () and b"tracestate" not in block.lower():
        assert left == block


@pytest.mark.parametrize(
    "block",
    [
        b"traceparent: x\r\n" * 60_000,
        b"traceparent" + b" " * 1_000_000,
        b"traceparent:" + b"\r\n " * 300_000,
        b"traceparent: " + b"\t" * 1_000_000 + b"\r\n",
        b"\ntrace" * 170_000,
        b"message-id: " + b"x" * 1_000_000,
        b"received" + b"\t" * 1_000_000,
        b"received \t" * 100_000,
        b"\n" * 1_000_000,
    ],
    ids=lambda block: repr(block[:20]),
)
def test_a_hostile_megabyte_is_searched_in_one_pass(block: bytes) -> None:
    # One pass is milliseconds; a second look per octet would be the timeout of the test run.
    assert len(inspect_header(block).traceparents) <= 2
    assert inspect_header(replace_trace_headers(block, {})).traceparents == ()
