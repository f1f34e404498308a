"""ClientProtocol: the upstream's side of the conversation is plain bytes."""

import re
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from otel_smtp.smtp import replies
from otel_smtp.smtp.client import (
    MAX_REPLY_LINE_OCTETS,
    Awaited,
    ClientProtocol,
    ExchangeAnswers,
    challenge_of,
    is_safe_path,
)
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.smtp.errors import LocalProtocolError, RemoteProtocolError
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import ErrorType, Reply
from tests.support.held import held_octets

EVERYTHING = (
    "PIPELINING", "SIZE 1000000", "8BITMIME", "SMTPUTF8", "BINARYMIME", "CHUNKING", "DSN", "ENHANCEDSTATUSCODES",
    "STARTTLS", "AUTH PLAIN LOGIN", "REQUIRETLS", "LIMITS RCPTMAX=10 MAILMAX=5",
)  # fmt: skip


def ehlo_reply(keywords: Iterable[str]) -> bytes:
    lines = ["up.example", *keywords]
    return b"".join(
        f"250{' ' if number == len(lines) else '-'}{line}\r\n".encode() for number, line in enumerate(lines, 1)
    )


def greeted(keywords: Iterable[str] = EVERYTHING, *, is_lmtp: bool = False) -> ClientProtocol:
    """A client that has had its greeting and its EHLO answered."""
    client = ClientProtocol(is_lmtp=is_lmtp)
    assert client.receive(b"220 up.example ESMTP\r\n")[0].verb is Awaited.GREETING
    client.send_hello("gw.example")
    client.data_to_send()
    assert client.receive(ehlo_reply(keywords))[0].verb is Awaited.EHLO
    return client


def fed(client: ClientProtocol, data: bytes) -> list[tuple[Awaited | None, int]]:
    return [(answer.verb, answer.reply.code) for answer in client.receive(data)]


def fails(client: ClientProtocol, data: bytes, *codes: int) -> None:
    """Feed `data`: answers with `codes` count, and then there is a fault, for good."""
    assert [answer.reply.code for answer in client.receive(data)] == list(codes)
    assert client.fault is not None
    assert client.fault.reply is replies.UPSTREAM_PROTOCOL
    assert not client.is_in_step
    assert not client.receive(b"250 ok\r\n")
    with pytest.raises(RemoteProtocolError):
        client.send_quit()
    assert client.data_to_send() == b""


def begin(client: ClientProtocol, *recipients: str) -> None:
    client.send_envelope(Mail("a@example.com"))
    for recipient in recipients or ("b@example.com",):
        client.send_envelope(None, [Recipient(recipient)])


# Groups and their answers -------------------------------------------------------------------------------------


def test_nothing_is_sent_before_the_greeting() -> None:
    client = ClientProtocol()
    client.send_hello("gw.example")
    assert client.data_to_send() == b""
    assert fed(client, b"220 hello\r\n") == [(Awaited.GREETING, 220)]
    assert client.data_to_send() == b"EHLO gw.example\r\n"


def test_a_group_travels_whole_where_pipelining_is_offered() -> None:
    client = greeted()
    begin(client, "b@example.com", "c@example.com")
    client.send_data()
    assert client.data_to_send() == (
        b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nRCPT TO:<c@example.com>\r\nDATA\r\n"
    )
    assert fed(client, b"250 ok\r\n250 ok\r\n550 no\r\n354 go\r\n") == [
        (Awaited.MAIL, 250), (Awaited.RCPT, 250), (Awaited.RCPT, 550), (Awaited.DATA, 354),
    ]  # fmt: skip
    assert client.accepted_recipients == 1
    client.send_content(b"Subject: x\r\n\r\nhello\r\n")
    client.end_content()
    assert client.data_to_send() == b"Subject: x\r\n\r\nhello\r\n.\r\n"
    assert fed(client, b"250 2.0.0 queued\r\n") == [(Awaited.CONTENT, 250)]
    assert client.is_in_step


def test_without_pipelining_one_command_waits_for_the_other() -> None:
    client = greeted(("SIZE",))
    begin(client)
    client.send_data()
    assert client.data_to_send() == b"MAIL FROM:<a@example.com>\r\n"
    assert client.data_to_send() == b""
    assert fed(client, b"250 ok\r\n") == [(Awaited.MAIL, 250)]
    assert client.data_to_send() == b"RCPT TO:<b@example.com>\r\n"
    assert fed(client, b"450 later\r\n") == [(Awaited.RCPT, 450)]
    assert client.cancel_queued() == 1
    assert client.data_to_send() == b""
    assert client.is_settled


def test_nothing_travels_behind_a_command_that_ends_its_group() -> None:
    client = greeted()
    client.send_data()
    client.send_reset()
    assert client.data_to_send() == b"DATA\r\n"
    assert fed(client, b"503 no\r\n") == [(Awaited.DATA, 503)]
    assert client.data_to_send() == b"RSET\r\n"


def test_a_reset_travels_before_the_next_mail_in_one_group() -> None:
    client = greeted()
    client.send_reset()
    begin(client)
    assert client.data_to_send() == b"RSET\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\n"
    assert fed(client, b"250 ok\r\n250 ok\r\n250 ok\r\n")[2] == (Awaited.RCPT, 250)
    assert client.accepted_recipients == 1


def test_a_message_travels_in_one_group_with_chunking() -> None:
    client = greeted()
    begin(client)
    client.send_last_chunk(b".x\r\n")
    assert client.data_to_send().endswith(b"RCPT TO:<b@example.com>\r\nBDAT 4 LAST\r\n.x\r\n")
    assert fed(client, b"250 ok\r\n250 ok\r\n250 ok\r\n")[-1] == (Awaited.CONTENT, 250)
    assert client.is_in_step


def test_a_message_in_pieces_is_one_chunk() -> None:
    client = greeted()
    client.send_last_chunk(b"abc", b"", b"de")
    assert client.data_to_send() == b"BDAT 5 LAST\r\nabcde"
    client = greeted()
    client.send_last_chunk()
    assert client.data_to_send() == b"BDAT 0 LAST\r\n"


@pytest.mark.parametrize(
    ("rcpt_replies", "content_replies", "expected"),
    [
        (b"250 a\r\n250 b\r\n", b"250 1\r\n450 2\r\n", [250, 450]),
        (b"250 a\r\n550 b\r\n", b"250 1\r\n", [250]),
        (b"550 a\r\n550 b\r\n", b"503 none\r\n", [503]),  # BDAT LAST without any recipient is answered once
        (b"250 a\r\n250 b\r\n", b"421 bye\r\n", [421]),  # and nothing more will come
    ],
)
def test_lmtp_answers_the_content_once_for_each_accepted_recipient(
    rcpt_replies: bytes, content_replies: bytes, expected: Sequence[int]
) -> None:
    client = greeted(is_lmtp=True)
    begin(client, "b@example.com", "c@example.com")
    client.send_last_chunk(b"x")
    client.data_to_send()
    found = fed(client, b"250 mail\r\n" + rcpt_replies + content_replies)
    assert [code for verb, code in found if verb is Awaited.CONTENT] == expected
    assert client.is_settled


def test_lmtp_says_lhlo() -> None:
    client = ClientProtocol(is_lmtp=True)
    fed(client, b"220 up LMTP\r\n")
    client.send_hello("gw.example")
    assert client.data_to_send() == b"LHLO gw.example\r\n"


def test_helo_offers_nothing() -> None:
    client = ClientProtocol()
    fed(client, b"220 up\r\n")
    client.send_hello("gw.example")
    client.data_to_send()
    assert fed(client, b"502 what\r\n") == [(Awaited.EHLO, 502)]
    client.send_helo("gw.example")
    assert client.data_to_send() == b"HELO gw.example\r\n"
    assert fed(client, b"250 up\r\n") == [(Awaited.EHLO, 250)]
    assert client.extensions == Extensions()


# Parameters ---------------------------------------------------------------------------------------------------

FULL_MAIL = Mail(
    "jos\u00e9@example.com",
    size=10,
    body=Body.BINARY_MIME,
    smtputf8=True,
    ret=DsnReturn.HEADERS,
    envid="QQ+2B1",
    require_tls=True,
    auth="<>",
)


def test_parameters_travel_where_they_are_offered() -> None:
    client = greeted()
    client.send_envelope(FULL_MAIL, size=4711)
    client.send_envelope(None, [Recipient("b@example.com", Notify.SUCCESS | Notify.DELAY, "rfc822;b@example.com")])
    assert client.data_to_send().decode() == (
        "MAIL FROM:<jos\u00e9@example.com> SIZE=4711 BODY=BINARYMIME SMTPUTF8 RET=HDRS ENVID=QQ+2B1 AUTH=<>"
        " REQUIRETLS\r\nRCPT TO:<b@example.com> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;b@example.com\r\n"
    )


def test_parameters_stay_at_home_where_they_are_not() -> None:
    client = greeted(("PIPELINING",))
    client.send_envelope(Mail("", 1, Body.EIGHT_BIT_MIME, ret=DsnReturn.FULL, envid="x", require_tls=True, auth="<>"))
    client.send_envelope(None, [Recipient("Postmaster", Notify.NEVER, "rfc822;x")])
    assert client.data_to_send() == b"MAIL FROM:<>\r\nRCPT TO:<Postmaster>\r\n"


def test_the_clients_size_is_told_where_nothing_better_is_known() -> None:
    client = greeted()
    client.send_envelope(Mail("a@example.com", size=10))
    assert client.data_to_send() == b"MAIL FROM:<a@example.com> SIZE=10\r\n"


def test_a_quoted_local_part_travels_as_it_is() -> None:
    client = greeted()
    client.send_envelope(Mail('"a > \\" b"@example.com'))
    assert client.data_to_send() == b'MAIL FROM:<"a > \\" b"@example.com>\r\n'


CONTROLS = [chr(number) for number in (*range(0x20), 0x7F, 0x85, 0x9B, 0x2028)]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: f"{ord(control):02x}")
@pytest.mark.parametrize(
    "ask",
    [
        lambda client, text: client.send_hello(f"gw{text}x"),
        lambda client, text: client.send_helo(f"gw{text}x"),
        lambda client, text: client.send_auth(f"PLAIN{text}x"),
        lambda client, text: client.send_envelope(Mail(f"a{text}x@example.com")),
        lambda client, text: client.send_envelope(Mail(f'"a{text}x"@example.com', smtputf8=True)),
        lambda client, text: client.send_envelope(Mail(f"a@example.com{text}", smtputf8=True)),
        lambda client, text: client.send_envelope(Mail("", envid=f"x{text}")),
        lambda client, text: client.send_envelope(Mail("", auth=f"x{text}")),
        lambda client, text: client.send_envelope(None, [Recipient(f"b{text}@example.com")]),
        lambda client, text: client.send_envelope(None, [Recipient("b@example.com", orcpt=f"rfc822;{text}x")]),
    ],
    ids=["hello", "helo", "mechanism", "local", "quoted", "domain", "envid", "auth", "rcpt", "orcpt"],
)
def test_no_control_character_leaves_in_any_argument(ask: Callable[[ClientProtocol, str], None], control: str) -> None:
    client = greeted()
    with pytest.raises(LocalProtocolError):
        ask(client, control)
    assert client.data_to_send() == b""


@pytest.mark.parametrize(
    "address",
    [
        "a@example.com> SIZE=1",  # smuggles a parameter
        "a@example.com>",
        "<a@example.com",
        "a b@example.com",
        'a"b@example.com',
        '"a@example.com',  # an open quote would swallow the bracket
        '"a"b"@example.com',
        '"a\\"@example.com',  # the quote that seems to close is escaped
        "a@exam ple.com",
        "a@b@c> X",
        '"a\x85b"@example.com',  # the end of a line to some
        '"a\u2028b"@example.com',
        "a\udcffb@example.com",  # stands for no octets
    ],
)
def test_a_path_that_could_be_read_as_more_than_a_path_is_refused(address: str) -> None:
    assert not is_safe_path(address)
    client = greeted()
    with pytest.raises(LocalProtocolError):
        client.send_envelope(Mail(address))
    with pytest.raises(LocalProtocolError):
        client.send_envelope(None, [Recipient(address)])
    assert client.data_to_send() == b""


@pytest.mark.parametrize(
    "address",
    [
        "",
        "postmaster",
        "a@example.com",
        "a..b@example.com",
        "a@[IPv6:2001:db8::1]",
        "jos\u00e9@ex\u00e4mple.com",
        '"a b"@example.com',
        '"a\\"b\\\\"@example.com',
        '"<a>@b"@example.com',
        '""@example.com',
    ],
)
def test_a_path_that_can_be_read_as_nothing_else_is_safe(address: str) -> None:
    assert is_safe_path(address)


@pytest.mark.parametrize("part", ['"' + "a" * 100 + "\\a", "\\a" * 50, "a@", '"', "@", '\\"'])
@pytest.mark.timeout(20)
def test_judging_a_path_takes_time_in_proportion_to_its_length(part: str) -> None:
    for address in (part * 20_000, '"' + part * 20_000, '"' + part * 20_000 + '"@' + "a" * 20_000 + " "):
        is_safe_path(address)


def test_non_ascii_leaves_only_under_smtputf8() -> None:
    for client, mail in (
        (greeted(), Mail("jos\u00e9@example.com")),
        (greeted(("PIPELINING",)), Mail("jos\u00e9@example.com", smtputf8=True)),
    ):
        with pytest.raises(LocalProtocolError):
            client.send_envelope(mail)
        assert client.data_to_send() == b""
    client = greeted()
    client.send_envelope(Mail("a@example.com"))
    with pytest.raises(LocalProtocolError):
        client.send_envelope(None, [Recipient("jos\u00e9@example.com")])


def test_content_is_refused_without_a_354_and_chunks_without_chunking() -> None:
    client = greeted(("PIPELINING",))
    with pytest.raises(LocalProtocolError):
        client.send_content(b"x")
    with pytest.raises(LocalProtocolError):
        client.end_content()
    with pytest.raises(LocalProtocolError):
        client.send_last_chunk(b"x")
    client.send_data()
    client.data_to_send()
    fed(client, b"354 go\r\n")
    with pytest.raises(LocalProtocolError):
        client.send_quit()


# Extensions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((), Extensions()),
        (("pipelining", "8bitMIME"), Extensions(pipelining=True, eight_bit_mime=True)),
        (("SIZE",), Extensions(size=0)),
        (("SIZE 0",), Extensions(size=0)),
        (("SIZE 10240000",), Extensions(size=10240000)),
        (("SIZE many",), Extensions(size=0)),
        (("SIZE 123456789012345678901",), Extensions(size=0)),  # 21 digits: RFC 1870 has 20
        (("AUTH PLAIN login", "AUTH=LOGIN XOAUTH2"), Extensions(auth_mechanisms=("PLAIN", "LOGIN", "XOAUTH2"))),
        (("BINARYMIME",), Extensions()),
        (("BINARYMIME", "CHUNKING"), Extensions(binary_mime=True, chunking=True)),
        (("", "   ", "X-OTHER thing", "HELP"), Extensions()),
        (
            ("LIMITS RCPTMAX=20 MAILMAX=x OTHER RCPTDOMAINMAX=1",),
            Extensions(limits={"RCPTMAX": 20, "RCPTDOMAINMAX": 1}),
        ),
    ],
)
def test_keywords_are_read(lines: Sequence[str], expected: Extensions) -> None:
    assert Extensions.parse(lines) == expected


# Replies ------------------------------------------------------------------------------------------------------


def refusal(wire: bytes) -> replies.Reply:
    client = greeted()
    client.send_envelope(Mail(""))
    client.data_to_send()
    (answer,) = client.receive(wire)
    return answer.reply


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (b"550 5.1.1 No such user\r\n", b"550 5.1.1 No such user\r\n"),
        (b"550 No such user\r\n", b"550 No such user\r\n"),
        (b"550\r\n", b"550 \r\n"),  # a line without text
        (b"550 \r\n", b"550 \r\n"),
        (b"550 x\n", b"550 x\r\n"),  # a bare LF ends a reply line: nothing is hidden by it
        (b"550-5.1.1 one\r\n550 5.1.1 two\r\n", b"550-5.1.1 one\r\n550 5.1.1 two\r\n"),
        (b"550-5.1.1 one\r\n550 two\r\n", b"550-5.1.1 one\r\n550 5.1.1 two\r\n"),
        (b"550-one\r\n550-\r\n550 two\r\n", b"550-one\r\n550-\r\n550 two\r\n"),
        (b"450 5.2.2 full\r\n", b"450 4.2.2 full\r\n"),  # RFC 2034 4: the classes must agree
        (b"550 2.0.0 odd\r\n", b"550 5.0.0 odd\r\n"),
        (b"550 5.1.1234 odd\r\n", b"550 5.1.1234 odd\r\n"),
        (b"550 a\x1b[31m\x00\xff\x7fb\r\n", b"550 a?[31m?b\r\n"),
        (b"550 a\rb\r\n", b"550 a?b\r\n"),
        (b"550 " + b"x" * 2000 + b"\r\n", b"550 " + b"x" * 480 + b"\r\n"),
        (b"550-x\r\n" * 50 + b"550 y\r\n", b"550-x\r\n" * 9 + b"550 x\r\n"),
    ],
)
def test_a_refusal_is_made_safe_to_repeat(wire: bytes, expected: bytes) -> None:
    reply = refusal(wire)
    assert reply.wire == expected
    assert reply.error_type is ErrorType.UPSTREAM_REFUSED


def test_all_octets_in_a_reply_come_out_printable() -> None:
    for number in range(256):
        if number == 0x0A:
            continue
        assert re.fullmatch(rb"550 [ -~]*\r\n", refusal(b"550 a" + bytes([number]) + b"b\r\n").wire)


@pytest.mark.parametrize(
    "wire",
    [
        b"hello\r\n",
        b"\r\n",
        b"25 ok\r\n",
        b"250ok\r\n",
        b"2500 ok\r\n",
        b"150 early\r\n",
        b"650 odd\r\n",
        b" 250 ok\r\n",
        b"250-one\r\n251 two\r\n",  # RFC 5321 4.2.1: the same code on every line
        b"250_ok\r\n",
        b"\x16\x03\x01\x02\x00\x01\n",  # TLS where clear text is due
        b"250 " + b"x" * 2043 + b"\r\n",  # 2049 octets
        b"x" * 2049,  # no need to wait for its end
        b"250-x\r\n" * 101,
        b"354 go\r\n",  # 3yz to MAIL
        b"334 go\r\n",
    ],
)
def test_what_is_no_fitting_reply_is_the_upstreams_fault(wire: bytes) -> None:
    client = greeted()
    begin(client)
    client.data_to_send()
    fails(client, wire)


def test_answers_before_a_fault_stay_true() -> None:
    client = greeted()
    begin(client)
    client.data_to_send()
    fails(client, b"250 ok\r\nnonsense\r\n", 250)


def test_the_longest_and_the_most_lines_are_taken() -> None:
    assert refusal(b"550 " + b"x" * 2042 + b"\r\n").code == 550
    assert refusal(b"550-x\r\n" * 99 + b"550 x\r\n").code == 550


def test_a_positive_reply_to_data_is_the_upstreams_fault() -> None:
    client = greeted()
    client.send_data()
    client.data_to_send()
    fails(client, b"250 ok\r\n")


def test_an_unasked_421_is_told_and_ends_the_connections_use() -> None:
    client = greeted()
    (answer,) = client.receive(b"421 4.3.2 shutting down\r\n")
    assert answer.verb is None
    assert answer.reply.code == 421
    assert client.is_closing
    assert not client.is_in_step


def test_any_other_unasked_reply_is_a_fault() -> None:
    fails(greeted(), b"250 ok\r\n")
    late = greeted()
    late.send_reset()
    late.data_to_send()
    assert fed(late, b"250 ok\r\n250 ok\r\n") == [(Awaited.RSET, 250)]
    assert not late.is_in_step
    with pytest.raises(RemoteProtocolError):
        late.send_envelope(Mail(""))  # a late reply must not answer the next command
    assert fault_of(late) is not None
    half = greeted()
    assert fed(half, b"250-late\r\n") == []
    assert not half.is_in_step
    with pytest.raises(RemoteProtocolError):
        half.send_envelope(Mail(""))  # nor may the rest of one
    fails(greeted_with_surplus(), b"")


def fault_of(client: ClientProtocol) -> RemoteProtocolError | None:
    return client.fault


def greeted_with_surplus() -> ClientProtocol:
    client = greeted()
    client.send_reset()
    client.data_to_send()
    client.receive(b"250 ok\r\n250 ok\r\n")
    return client


def ended(*, is_lmtp: bool = False) -> ClientProtocol:
    """A client that has sent all of a message to two recipients, and has had the answers to its envelope."""
    client = greeted(is_lmtp=is_lmtp)
    begin(client, "b@example.com", "c@example.com")
    client.send_last_chunk(b"x")
    client.data_to_send()
    client.receive(b"250 a\r\n250 b\r\n250 c\r\n")
    return client


@pytest.mark.parametrize("surplus", [b"250 ok\r\n", b"2", b"41", b"422 x\r\n", b"\r\n", b"x"])
@pytest.mark.parametrize("is_lmtp", [False, True])
def test_one_reply_too_many_makes_the_final_250_doubtful(surplus: bytes, is_lmtp: bool) -> None:
    taken = b"250 ok\r\n" * (1 + is_lmtp)
    fails(ended(is_lmtp=is_lmtp), taken + surplus, *[250] * is_lmtp)


@pytest.mark.parametrize("surplus", [b"4", b"42", b"421", b"421 4.3.2 b", b"421 4.3.2 bye\r\n"])
@pytest.mark.parametrize("is_lmtp", [False, True])
def test_a_421_behind_the_final_250_leaves_it_true_however_it_is_cut(surplus: bytes, is_lmtp: bool) -> None:
    client = ended(is_lmtp=is_lmtp)
    taken = b"250 ok\r\n" * (1 + is_lmtp)
    assert fed(client, taken + surplus) == [(Awaited.CONTENT, 250)] * (1 + is_lmtp)
    assert client.fault is None
    assert not client.is_in_step
    assert fed(client, b"421 4.3.2 bye\r\n"[len(surplus) :]) == [(None, 421)]
    assert client.is_closing
    assert not client.is_in_step


def test_nothing_is_read_behind_a_421() -> None:
    client = greeted()
    begin(client)
    client.data_to_send()
    assert fed(client, b"421 bye\r\n250 ok\r\nnonsense") == [(Awaited.MAIL, 421)]
    assert fed(client, b"250 ok\r\n" * 1000) == []
    assert client.fault is None
    assert not client.is_in_step


def test_a_refusal_before_the_end_of_the_content_is_an_answer_to_it() -> None:
    client = greeted(("PIPELINING",))
    client.send_data()
    client.data_to_send()
    fed(client, b"354 go\r\n")
    client.send_content(b"much\r\n")
    assert fed(client, b"552 enough\r\n") == [(Awaited.CONTENT, 552)]
    assert not client.is_in_step


def test_a_reply_to_content_that_has_not_ended_is_a_fault() -> None:
    client = greeted(("PIPELINING",))
    client.send_data()
    client.data_to_send()
    fed(client, b"354 go\r\n")
    client.receive(b"250 taken\r\n")
    assert client.fault is not None
    early = greeted(("PIPELINING",))
    early.send_data()
    early.data_to_send()
    assert fed(early, b"354 go\r\n250 taken\r\n") == [(Awaited.DATA, 354)]
    with pytest.raises(RemoteProtocolError):
        early.end_content()  # it would be taken for the answer to the message
    chunked = greeted()
    chunked.begin_last_chunk(10)
    chunked.send_chunk_octets(b"12345")
    chunked.data_to_send()
    fails(chunked, b"250 taken\r\n")


def test_a_chunk_in_pieces() -> None:
    client = greeted()
    client.send_reset()
    with pytest.raises(LocalProtocolError):
        client.begin_last_chunk(5)  # something is queued before it
    assert client.data_to_send() == b"RSET\r\n"
    assert list(client.awaited) == [Awaited.RSET]
    assert fed(client, b"250 ok\r\n") == [(Awaited.RSET, 250)]
    assert not client.awaited
    client.begin_last_chunk(5)
    client.send_chunk_octets(b"123")
    with pytest.raises(LocalProtocolError):
        client.send_reset()
    with pytest.raises(LocalProtocolError):
        client.send_chunk_octets(b"456")
    client.send_chunk_octets(b"45")
    assert client.data_to_send() == b"BDAT 5 LAST\r\n12345"
    assert fed(client, b"250 ok\r\n") == [(Awaited.CONTENT, 250)]
    assert client.is_in_step
    with pytest.raises(LocalProtocolError):
        greeted(("PIPELINING",)).begin_last_chunk(5)


# STARTTLS and AUTH --------------------------------------------------------------------------------------------


def test_what_was_said_in_clear_is_forgotten_under_tls() -> None:
    client = greeted()
    client.send_starttls()
    assert client.data_to_send() == b"STARTTLS\r\n"
    assert fed(client, b"220 go\r\n") == [(Awaited.STARTTLS, 220)]
    with pytest.raises(LocalProtocolError):
        client.send_hello("gw.example")
    client.tls_started()
    assert client.extensions == Extensions()
    client.send_hello("gw.example")
    assert client.data_to_send() == b"EHLO gw.example\r\n"
    assert fed(client, ehlo_reply(("SIZE 5",))) == [(Awaited.EHLO, 250)]
    assert client.extensions == Extensions(size=5)


@pytest.mark.parametrize("injected", [b"250-up\r\n250 AUTH PLAIN\r\n", b"2", b"\n"])
@pytest.mark.parametrize("in_one_segment", [True, False])
def test_octets_between_the_220_and_tls_are_an_injection(injected: bytes, in_one_segment: bool) -> None:
    client = greeted()
    client.send_starttls()
    client.data_to_send()
    if in_one_segment:
        fails(client, b"220 go\r\n" + injected)
        return
    assert fed(client, b"220 go\r\n") == [(Awaited.STARTTLS, 220)]
    fails(client, injected)
    with pytest.raises(RemoteProtocolError):
        client.tls_started()


def test_tls_cannot_start_unasked() -> None:
    client = greeted()
    with pytest.raises(LocalProtocolError):
        client.tls_started()
    client.send_starttls()
    client.data_to_send()
    fed(client, b"454 not now\r\n")
    with pytest.raises(LocalProtocolError):
        client.tls_started()


def test_an_auth_exchange() -> None:
    client = greeted()
    client.send_auth("SCRAM-SHA-256", b"n,,n=user,r=nonce")
    assert client.data_to_send() == b"AUTH SCRAM-SHA-256 biwsbj11c2VyLHI9bm9uY2U=\r\n"
    (answer,) = client.receive(b"334 cj1ub25jZQ==\r\n")
    assert answer.verb is Awaited.AUTH
    assert challenge_of(answer.reply) == b"r=nonce"
    client.send_auth_response(b"")
    assert client.data_to_send() == b"\r\n"
    assert fed(client, b"535 no\r\n") == [(Awaited.AUTH, 535)]
    client.send_auth("PLAIN", b"")
    assert client.data_to_send() == b"AUTH PLAIN =\r\n"


def test_a_long_challenge_is_kept_whole_and_a_bad_one_is_the_upstreams_fault() -> None:
    client = greeted()
    client.send_auth("SCRAM-SHA-256")
    client.data_to_send()
    (answer,) = client.receive(b"334 " + b"QUFB" * 500 + b"\r\n")
    assert challenge_of(answer.reply) == b"AAA" * 500
    with pytest.raises(RemoteProtocolError):
        challenge_of(replies.challenge("not base64!"))


def test_nothing_of_a_credential_is_in_its_repr() -> None:
    client = greeted()
    client.send_auth("PLAIN", b"\0user\0secret")
    assert "secret" not in repr(client)
    assert "AHVzZX" not in repr(client)


# Content ------------------------------------------------------------------------------------------------------


def data_wire(chunks: Sequence[bytes]) -> bytes:
    client = greeted()
    client.send_data()
    client.data_to_send()
    fed(client, b"354 go\r\n")
    for chunk in chunks:
        client.send_content(chunk)
    client.end_content()
    return client.data_to_send()


def unstuff(wire: bytes) -> bytes:
    """The content of DATA as an upstream reads it, line by line; at least one line, as there is always an end."""
    lines = wire.split(b"\r\n")
    assert lines[-2:] == [b".", b""]
    content = [line[1:] if line.startswith(b".") else line for line in lines[:-2]]
    assert b"." not in lines[:-2], "an end before the end"
    return b"".join(line + b"\r\n" for line in content)


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([], b".\r\n"),  # no content: the dot stands alone
        ([b""], b".\r\n"),
        ([b"a\r\n"], b"a\r\n.\r\n"),
        ([b"a"], b"a\r\n.\r\n"),  # from BDAT, without a line end
        ([b".\r\n"], b"..\r\n.\r\n"),
        ([b"a\r\n", b".\r\n"], b"a\r\n..\r\n.\r\n"),
        ([b"a\r", b"\n.\r\n"], b"a\r\n..\r\n.\r\n"),
        ([b"a", b"\r", b"\n", b".", b"\r", b"\n"], b"a\r\n..\r\n.\r\n"),
        ([b"a.\r\n.b\r\n"], b"a.\r\n..b\r\n.\r\n"),
        ([b"a", b".b\r\n"], b"a.b\r\n.\r\n"),
    ],
)
def test_dots_are_stuffed_across_chunk_borders(chunks: Sequence[bytes], expected: bytes) -> None:
    assert data_wire(chunks) == expected


@given(st.lists(st.sampled_from([b"", b".", b"..", b"a", b".a.", b"a.b"])), st.data())
def test_what_was_stuffed_is_unstuffed_to_the_same(lines: list[bytes], data: st.DataObject) -> None:
    content = b"".join(line + b"\r\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(content)), max_size=8)))
    chunks = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    assert unstuff(data_wire(chunks)) == content


# Any octets ---------------------------------------------------------------------------------------------------

REPLY_TEXT = st.lists(
    st.sampled_from(
        [
            b"250 ok\r\n",
            b"250-x\r\n",
            b"354 go\r\n",
            b"421 bye\r\n",
            b"550 5.1.1 no\r\n",
            b"\r\n",
            b"2",
            b"50",
            b"220 x\n",
        ]
    )
).map(b"".join)


def conversation(wire: bytes, cuts: Sequence[int], *, is_lmtp: bool) -> tuple[list[tuple[Awaited | None, bytes]], bool]:
    """What a client makes of `wire`, cut at `cuts`, after a pipelined group; and whether it broke."""
    client = greeted(is_lmtp=is_lmtp)
    begin(client, "b@example.com", "c@example.com")
    client.send_last_chunk(b"content\r\n")
    client.data_to_send()
    found: list[tuple[Awaited | None, bytes]] = []
    for start, end in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        found += [(verb, reply.wire) for verb, reply in client.receive(wire[start:end])]
    while more := client.receive(b""):  # what lay behind the last answer
        found += [(verb, reply.wire) for verb, reply in more]
    return found, client.fault is not None


@given(st.one_of(st.binary(max_size=200), REPLY_TEXT), st.booleans())
def test_no_octets_raise_anything_but_the_upstreams_fault(wire: bytes, is_lmtp: bool) -> None:
    conversation(wire, [], is_lmtp=is_lmtp)
    early = ClientProtocol()
    early.receive(wire)


TAKEN = b"250 ok\r\n" * 4
FAREWELL = b"421 4.3.2 bye\r\n"


@given(REPLY_TEXT, st.lists(st.integers(0, 200), max_size=12), st.booleans())
@example(TAKEN + FAREWELL, [len(TAKEN) + 1], False)  # the 250 counts, though what is behind it begins as "4"
@example(TAKEN + FAREWELL, [len(TAKEN) + 2], False)
@example(TAKEN + TAKEN[:8] + FAREWELL, [len(TAKEN) + 9], True)
@example(TAKEN + TAKEN[:8] + FAREWELL, [len(TAKEN) + 10], True)
def test_cutting_the_replies_differently_changes_nothing(wire: bytes, cuts: list[int], is_lmtp: bool) -> None:
    """But for one thing that is meant: a surplus that arrives with the final 250 makes that 250 doubtful."""
    cuts = sorted(min(cut, len(wire)) for cut in cuts)
    whole, whole_broke = conversation(wire, [], is_lmtp=is_lmtp)
    cut, cut_broke = conversation(wire, cuts, is_lmtp=is_lmtp)
    assert cut[: len(whole)] == whole
    surplus = cut[len(whole) :]
    assert all(verb is Awaited.CONTENT or verb is None for verb, _ in surplus)
    if not surplus:
        assert cut_broke == whole_broke
    if wire.endswith(FAREWELL) and not whole_broke:
        assert not surplus


def after_mail_of_before(wire: bytes, *, at_once: bool) -> tuple[list[tuple[Awaited | None, bytes]], int, bool, bool]:
    """What a client makes of `wire` after a reset and the envelope of a second mail: read at once, or by the octet.

    Returns:
        The answers, how many recipients count, whether it is in step, and whether it broke.
    """
    client = greeted()
    begin(client)
    client.data_to_send()
    client.receive(TAKEN[:16])
    client.send_reset()
    begin(client, "b@example.com", "c@example.com")
    client.data_to_send()
    found: list[tuple[Awaited | None, bytes]] = []
    for piece in [wire] if at_once else [wire[place : place + 1] for place in range(len(wire))]:
        found += [(verb, reply.wire) for verb, reply in client.receive(piece)]
    return found, client.accepted_recipients, client.is_in_step, client.fault is not None


@given(st.lists(st.sampled_from(["250 ok", "250 2.1.5 ok", "250", "451 later", "550 5.1.1 no", "421 bye", "354 go",
                                 "250-more", "nonsense", "250 " + "x" * 130, "250 a\rb"]), max_size=5),
       st.sampled_from(["\n", "\r\n"]))  # fmt: skip
@example(["250 ok", "250 ok", "550 5.1.1 no", "250 ok"], "\r\n")
def test_replies_that_were_known_whole_mean_what_they_mean_one_by_one(lines: list[str], end: str) -> None:
    wire = "".join(line + end for line in lines).encode()
    if len(lines) <= 4:  # what lies behind the last answer is judged by the next call
        assert after_mail_of_before(wire, at_once=True) == after_mail_of_before(wire, at_once=False)
    assert after_mail_of_before(wire, at_once=True) == after_mail_of_before(wire, at_once=True)


def test_the_longest_line_bounds_what_is_known_too() -> None:
    for octets in (30, 29):
        client = ClientProtocol(max_reply_line_octets=octets)
        client.receive(b"220 hello\r\n")
        for _ in range(2):
            client.send_reset()
            client.data_to_send()
            client.receive(b"250 " + b"x" * 24 + b"\r\n")
            assert (client.fault is None) == (octets == 30)
            if client.fault is not None:
                break


def test_an_unfinished_reply_needs_data() -> None:
    client = ClientProtocol()
    for octet in b"220-a\r\n220 b\r":
        assert not client.receive(bytes([octet]))
    assert fed(client, b"\n") == [(Awaited.GREETING, 220)]


def test_what_is_held_is_bounded_also_where_nobody_listens_any_more() -> None:
    for client in (greeted(), greeted_with_surplus()):
        for _ in range(100):
            client.receive(b"250 x" * 1000)
        assert client.fault is not None
        assert held_octets(client) <= MAX_REPLY_LINE_OCTETS * 2 + 5000


def codes_of(pairs: Iterable[tuple[Awaited | None, Reply]]) -> list[tuple[Awaited | None, int]]:
    return [(verb, reply.code) for verb, reply in pairs]


@pytest.mark.parametrize("at_once", [True, False])
def test_the_answers_of_an_exchange_say_what_they_come_to(at_once: bool) -> None:
    client = greeted()
    client.send_reset()
    client.send_envelope(Mail("a@example.com"), [Recipient(f"{name}@example.com") for name in "bcdef"])
    client.data_to_send()
    wire = b"250 r\r\n250 m\r\n250 b\r\n250 c\r\n550 d\r\n450 e\r\n250 f\r\n"
    if at_once:
        answers = client.receive(wire)
    else:
        answers = ExchangeAnswers([answer for octet in wire for answer in client.receive(bytes([octet]))])
    assert len(answers) == 7
    assert [reply.code for reply in answers.verdicts] == [250, 250, 550, 450, 250]
    assert (answers.accepted, answers.contents, answers.begins_with_reset) == (3, (), True)
    assert answers.refusal is answers.verdicts[2]
    # Of those alike in a row the last one stands for all.
    mail, rcpt = Awaited.MAIL, Awaited.RCPT
    assert codes_of(answers.steps) == [(mail, 250), (rcpt, 250), (rcpt, 550), (rcpt, 450), (rcpt, 250)]
    assert answers.steps[1].reply.text == "c"


def test_a_content_that_is_refused_is_no_refusal_of_the_envelope() -> None:
    client = greeted()
    client.send_envelope(Mail("a@example.com"), [Recipient("b@example.com")])
    client.send_last_chunk(b"x")
    client.data_to_send()
    answers = client.receive(b"250 m\r\n250 b\r\n552 too big\r\n")
    assert answers.refusal is None
    assert not answers.begins_with_reset
    assert [reply.code for reply in answers.contents] == [552]
