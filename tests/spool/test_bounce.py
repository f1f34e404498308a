"""What notices say, to people and to programs, by the sections of their RFCs; nobody can make them say more."""

import asyncio
import email
import email.policy
import itertools
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from email.message import EmailMessage, Message
from typing import Any, Final

import pytest
from aiosmtpd.handlers import Message as MessageHandler
from aiosmtpd.smtp import SMTP
from flufl.bounce import all_failures
from hypothesis import example, given
from hypothesis import strategies as st

from otel_smtp.forwarding.settings import UpstreamSettings
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.smtp.replies import EnhancedStatus, Reply
from otel_smtp.spool.dsn.report import (
    HEADER_OCTETS,
    LINE_OCTETS,
    NoticeKind,
    Status,
    envelope,
    notification,
    returns_content,
    wanted,
)
from tests.support.relaying import PATIENT, relay, relaying

MAIL: Final = Mail("app@example.com")
BOB: Final = Recipient("bob@example.net")
REFUSED: Final = Reply(550, EnhancedStatus(5, 1, 1), ("No such user here",))
BUSY: Final = Reply(450, EnhancedStatus(4, 2, 1), ("Mailbox busy",))
TAKEN: Final = Reply(250, EnhancedStatus(2, 0, 0), ("Ok",))
HEADER: Final = b"Received: from here\r\nMessage-ID: <original@example.com>\r\nSubject: test\r\n"
CONTENT: Final = HEADER + b"\r\nHello.\r\n.dot\r\n"
ARRIVED: Final = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
NOW: Final = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)
TRACE_ID: Final = "0af7651916cd43dd8448eb211c80319c"


def notice(kind: NoticeKind = NoticeKind.FAILED, *statuses: Status, **more: Any) -> bytes:
    given: dict[str, Any] = {
        "mail": MAIL,
        "statuses": statuses or (Status(BOB, REFUSED, "mx.example.net", NOW),),
        "header": HEADER,
        "content": None,
        "reporting_mta": "gw.example",
        "spool_id": "01hq9",
        "arrived": ARRIVED,
        "now": NOW,
        "message_id": "<notice@gw.example>",
        **more,
    }
    return notification(kind, **given)


def parsed(octets: bytes) -> EmailMessage:
    message = email.message_from_bytes(octets, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


def split(octets: bytes) -> list[tuple[Message, bytes]]:
    """The parts as they stand between the boundaries: their own header, and the octets behind it."""
    boundary = re.search(rb'boundary="([^"]+)"', octets)
    assert boundary is not None
    before, *parts, behind = octets.split(b"\r\n--" + boundary[1])
    assert before.endswith(b"MIME format.\r\n")
    assert behind == b"--\r\n"
    found: list[tuple[Message, bytes]] = []
    for part in parts:
        head, _, body = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        found.append((email.message_from_bytes(head, policy=email.policy.default), body))
    return found


def blocks(octets: bytes) -> list[list[tuple[str, str]]]:
    """The fields for programs: of the message, then of each recipient."""
    head, body = split(octets)[1]
    assert head["Content-Transfer-Encoding"] in ("7bit", "8bit")
    return [
        [
            (name, value)
            for name, _, value in (
                line.partition(": ") for line in re.sub("\r\n ", " ", block).strip("\r\n").split("\r\n")
            )
        ]
        for block in body.decode().strip("\r\n").split("\r\n\r\n")
    ]


def fields(octets: bytes, number: int = 1) -> dict[str, str]:
    return dict(blocks(octets)[number])


def inner(message: Message) -> list[Message]:
    """The messages within a message."""
    payload = message.get_payload()
    assert isinstance(payload, list)
    found = [part for part in payload if isinstance(part, Message)]
    assert len(found) == len(payload)
    return found


def words(octets: bytes) -> str:
    text = parsed(octets).get_body(("plain",))
    assert text is not None
    return str(text.get_content()).replace("\r\n", "\n")


# The whole ----------------------------------------------------------------------------------------------------


def test_a_whole_notice() -> None:
    assert notice(trace_id=TRACE_ID).decode().split("\r\n") == [
        "From: Mail Delivery System <MAILER-DAEMON@gw.example>",
        "To: app@example.com",
        "Subject: Undelivered mail returned to sender",
        "Date: Sun, 01 Mar 2026 12:00:30 +0000",
        "Message-ID: <notice@gw.example>",
        "In-Reply-To: <original@example.com>",
        "References: <original@example.com>",
        "Auto-Submitted: auto-replied",
        "MIME-Version: 1.0",
        "Content-Type: multipart/report; report-type=delivery-status;",
        ' boundary="=_01hq9.0"',
        "",
        "This is a report in MIME format.",
        "",
        "--=_01hq9.0",
        "Content-Type: text/plain; charset=us-ascii",
        "Content-Description: Notification",
        "Content-Transfer-Encoding: 7bit",
        "",
        "This is the mail gateway at gw.example.",
        "",
        "Your message could not be delivered to the recipients below, and will",
        "not be tried again. Where the reason is an address or the message",
        "itself, correct it and send the message again; else ask your postmaster,",
        "who finds it by its id.",
        "",
        "  bob@example.net",
        "    mx.example.net said: 550 5.1.1 No such user here",
        "",
        "The message came here on Sun, 01 Mar 2026 12:00:00 +0000 and has the id",
        "01hq9.",
        f"Its trace: {TRACE_ID}",
        "--=_01hq9.0",
        "Content-Type: message/delivery-status",
        "Content-Description: Delivery report",
        "Content-Transfer-Encoding: 7bit",
        "",
        "Reporting-MTA: dns; gw.example",
        "Arrival-Date: Sun, 01 Mar 2026 12:00:00 +0000",
        "X-Spool-Id: 01hq9",
        f"X-Trace-Id: {TRACE_ID}",
        "",
        "Final-Recipient: rfc822; bob@example.net",
        "Action: failed",
        "Status: 5.1.1",
        "Remote-MTA: dns; mx.example.net",
        "Diagnostic-Code: smtp; 550 5.1.1 No such user here",
        "Last-Attempt-Date: Sun, 01 Mar 2026 12:00:30 +0000",
        "",
        "--=_01hq9.0",
        "Content-Type: text/rfc822-headers",
        "Content-Description: Header of the message",
        "Content-Transfer-Encoding: 7bit",
        "",
        "Received: from here",
        "Message-ID: <original@example.com>",
        "Subject: test",
        "",
        "--=_01hq9.0--",
        "",
    ]


# Who is told, and how: RFC 3461 4.1, 4.3, 6.1; RFC 5321 6.1; RFC 8689 5 --------------------------------------


@pytest.mark.parametrize(
    ("notify", "kinds"),
    [
        (None, {NoticeKind.FAILED, NoticeKind.DELAYED}),
        (Notify.NEVER, set()),
        (Notify.SUCCESS, {NoticeKind.RELAYED}),
        (Notify.FAILURE, {NoticeKind.FAILED}),
        (Notify.DELAY, {NoticeKind.DELAYED}),
        (Notify.SUCCESS | Notify.FAILURE, {NoticeKind.RELAYED, NoticeKind.FAILED}),
        (Notify.SUCCESS | Notify.FAILURE | Notify.DELAY, set(NoticeKind)),
    ],
)
def test_who_asked_is_told(notify: Notify | None, kinds: set[NoticeKind]) -> None:
    recipient = Recipient(BOB.address, notify)
    assert {kind for kind in NoticeKind if wanted(kind, recipient, MAIL)} == kinds
    assert not any(wanted(kind, recipient, Mail("")) for kind in NoticeKind)


@pytest.mark.parametrize(
    ("kind", "mail", "is_returned"),
    [
        (NoticeKind.FAILED, Mail("a@example.com", ret=DsnReturn.FULL), True),
        (NoticeKind.FAILED, Mail("a@example.com", ret=DsnReturn.HEADERS), False),
        (NoticeKind.FAILED, Mail("a@example.com"), False),
        (NoticeKind.DELAYED, Mail("a@example.com", ret=DsnReturn.FULL), False),
        (NoticeKind.RELAYED, Mail("a@example.com", ret=DsnReturn.FULL), False),
        (NoticeKind.FAILED, Mail("a@example.com", ret=DsnReturn.FULL, require_tls=True), False),
    ],
)
def test_the_whole_original_goes_back_for_failures_alone(kind: NoticeKind, mail: Mail, is_returned: bool) -> None:
    assert returns_content(kind, mail) is is_returned


@pytest.mark.parametrize(
    ("mail", "is_ascii", "sent"),
    [
        (MAIL, True, Mail("")),
        (MAIL, False, Mail("", body=Body.EIGHT_BIT_MIME)),
        (Mail("a@example.com", smtputf8=True), True, Mail("")),  # its sender is reached without
        (Mail("ü@example.com", smtputf8=True), False, Mail("", body=Body.EIGHT_BIT_MIME, smtputf8=True)),
        (Mail("a@example.com", require_tls=True), True, Mail("", require_tls=True)),
        # Nothing else of the original's envelope travels back.
        (Mail("a@example.com", size=9, ret=DsnReturn.FULL, envid="x", auth="y"), True, Mail("")),
    ],
)
def test_a_notice_comes_from_nobody_and_is_never_answered(mail: Mail, is_ascii: bool, sent: Mail) -> None:
    assert envelope(mail, is_ascii=is_ascii) == (sent, Recipient(mail.reverse_path, Notify.NEVER))


# The head: RFC 3834, RFC 6522 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "in_reply_to"),
    [
        (b"Message-ID: <a@b>\r\n", "<a@b>"),
        (b"message-id:\r\n <folded@b>\r\n", "<folded@b>"),
        (b"Subject: none\r\n", None),
        (b"Message-ID: none\r\n", None),
        (b"Message-ID: <a@b> <c@d>\r\n", None),
        (b"Message-ID: <\xff@b>\r\n", None),
        (b"Message-ID: <" + b"x" * 997 + b">\r\n", None),
        (b"", None),
    ],
)
def test_it_is_shown_beside_the_mail_that_it_is_about(header: bytes, in_reply_to: str | None) -> None:
    message = parsed(notice(header=header))
    assert (message["In-Reply-To"], message["References"]) == (in_reply_to, in_reply_to)


@pytest.mark.parametrize("kind", list(NoticeKind))
def test_programs_know_what_it_is_and_do_not_answer(kind: NoticeKind) -> None:
    message = parsed(notice(kind))
    assert message.get_content_type() == "multipart/report"
    assert message.get_param("report-type") == "delivery-status"
    assert message["Auto-Submitted"] == "auto-replied"
    assert [part.get_content_type() for part in message.iter_parts()] == [
        "text/plain",
        "message/delivery-status",
        "text/rfc822-headers",
    ]
    assert fields(notice(kind))["Action"] == kind.value


# The words ----------------------------------------------------------------------------------------------------


def test_words_name_each_recipient_and_what_was_said_of_it() -> None:
    carol = Recipient("carol@example.org")
    text = words(
        notice(
            NoticeKind.FAILED,
            Status(BOB, REFUSED, "mx.example.net"),
            Status(carol, replies.EXPIRED, before="450 4.2.1 Mailbox busy"),
        )
    )
    assert "  bob@example.net\n    mx.example.net said: 550 5.1.1 No such user here\n" in text
    assert "  carol@example.org\n    reason: 451 4.4.7 Delivery time expired\n" in text
    assert "    at the last attempt: 450 4.2.1 Mailbox busy\n" in text


def test_a_warning_says_until_when_it_is_tried() -> None:
    warning = notice(NoticeKind.DELAYED, Status(BOB, BUSY, will_retry_until=datetime(2026, 3, 6, 12, 0, tzinfo=UTC)))
    assert "is tried until Fri, 06 Mar 2026 12:00:00 +0000" in words(warning)
    assert "You need not do anything" in " ".join(words(warning).split())
    assert fields(warning)["Will-Retry-Until"] == "Fri, 06 Mar 2026 12:00:00 +0000"


# The fields: RFC 3464 2.2, 2.3; RFC 3463 ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reply", "status"),
    [
        (NoticeKind.FAILED, REFUSED, "5.1.1"),
        (NoticeKind.FAILED, Reply(554, None, ("no",)), "5.0.0"),
        (NoticeKind.FAILED, None, "5.0.0"),
        (NoticeKind.FAILED, replies.EXPIRED, "4.4.7"),
        (NoticeKind.FAILED, TAKEN, "5.0.0"),  # an action and a status never contradict each other
        (NoticeKind.FAILED, Reply(550, EnhancedStatus(2, 0, 0), ("Ok, not",)), "5.0.0"),
        (NoticeKind.DELAYED, BUSY, "4.2.1"),
        (NoticeKind.DELAYED, Reply(421, None, ("later",)), "4.0.0"),
        (NoticeKind.DELAYED, REFUSED, "4.0.0"),
        (NoticeKind.DELAYED, None, "4.0.0"),
        (NoticeKind.RELAYED, TAKEN, "2.0.0"),
        (NoticeKind.RELAYED, Reply(250, None, ("Ok",)), "2.0.0"),
        (NoticeKind.RELAYED, Reply(250, EnhancedStatus(2, 1, 5), ("Ok",)), "2.1.5"),
        (NoticeKind.RELAYED, None, "2.0.0"),
    ],
)
def test_status_is_the_upstreams_where_it_fits_the_action(kind: NoticeKind, reply: Reply | None, status: str) -> None:
    assert fields(notice(kind, Status(BOB, reply)))["Status"] == status


@pytest.mark.parametrize(
    ("status", "diagnostic"),
    [
        (Status(BOB, REFUSED), "smtp; 550 5.1.1 No such user here"),
        (Status(BOB, Reply(550, None, ("one", "two"))), "smtp; 550-one | 550 two"),
        (Status(BOB, replies.EXPIRED, before="450 4.2.1 Mailbox busy"), "smtp; 450 4.2.1 Mailbox busy"),
        (Status(BOB, replies.EXPIRED), "smtp; 451 4.4.7 Delivery time expired"),
        (Status(BOB, None), None),
    ],
)
def test_the_diagnostic_is_what_the_upstream_said(status: Status, diagnostic: str | None) -> None:
    assert fields(notice(NoticeKind.FAILED, status)).get("Diagnostic-Code") == diagnostic


def test_a_long_diagnostic_is_folded_and_loses_no_word() -> None:
    told = " ".join(f"word{number}" for number in range(60))
    octets = notice(NoticeKind.FAILED, Status(BOB, Reply(550, None, (told,))))
    assert fields(octets)["Diagnostic-Code"] == f"smtp; 550 {told}"
    assert max(map(len, octets.split(b"\r\n"))) <= 78


def test_success_has_no_diagnostic() -> None:
    assert "Diagnostic-Code" not in fields(notice(NoticeKind.RELAYED, Status(BOB, TAKEN)))


@pytest.mark.parametrize(
    ("remote", "field"),
    [
        ("mx.example.net", "dns; mx.example.net"),
        ("192.0.2.1", "dns; [192.0.2.1]"),
        ("2001:db8::1", "dns; [IPv6:2001:db8::1]"),
        ("/run/lmtp", "dns; /run/lmtp"),
    ],
)
def test_the_upstream_is_named(remote: str, field: str) -> None:
    assert fields(notice(NoticeKind.FAILED, Status(BOB, REFUSED, remote)))["Remote-MTA"] == field


@pytest.mark.parametrize(
    ("envid", "field"),
    [
        ("QQ314159", "QQ314159"),
        ("a+20b+2B", "a b+"),  # xtext (RFC 3461 4)
        (None, None),
        ("a+0D+0AAction:+20delivered", "a+0D+0AAction:+20delivered"),  # stays as it came: it hides a line end
        ("a+zz", "a+zz"),
    ],
)
def test_the_envelope_id_goes_back_decoded(envid: str | None, field: str | None) -> None:
    assert fields(notice(mail=Mail("a@example.com", envid=envid)), 0).get("Original-Envelope-Id") == field


SMTPUTF8: Final = Mail("app@example.com", smtputf8=True)


@pytest.mark.parametrize(
    ("address", "field", "seven_bit"),
    [
        ("bob@example.net", "rfc822; bob@example.net", "rfc822; bob@example.net"),
        ('"a b"@example.net', 'rfc822; "a b"@example.net', 'rfc822; "a b"@example.net'),
        ("Postmaster", "rfc822; Postmaster", "rfc822; Postmaster"),
        ("pelé@example.net", "utf-8; pelé@example.net", r"utf-8; pel\x{E9}@example.net"),
        ("a+ü@δ.example", "utf-8; a+ü@δ.example", r"utf-8; a\x{2B}\x{FC}@\x{3B4}.example"),
        ("😀@example.net", "utf-8; 😀@example.net", r"utf-8; \x{1F600}@example.net"),
    ],
)
def test_addresses_beyond_ascii_have_a_type_of_their_own(address: str, field: str, seven_bit: str) -> None:
    """RFC 6533 3: utf-8-address, and utf-8-addr-xtext where a part is ASCII."""
    octets = notice(NoticeKind.FAILED, Status(Recipient(address), REFUSED), mail=SMTPUTF8)
    assert fields(octets)["Final-Recipient"] == field
    is_global = not address.isascii()
    assert split(octets)[1][0].get_content_type() == (
        "message/global-delivery-status" if is_global else "message/delivery-status"
    )
    for more in ({"mail": SMTPUTF8, "eight_bit": False}, {"mail": MAIL}):
        octets = notice(NoticeKind.FAILED, Status(Recipient(address), REFUSED), **more)
        assert octets.isascii()
        assert fields(octets)["Final-Recipient"] == seven_bit
        assert split(octets)[1][0].get_content_type() == "message/delivery-status"
        assert address in words(octets)


@pytest.mark.parametrize(
    ("orcpt", "field", "seven_bit"),
    [
        ("rfc822;bob+2Bnews@example.net", "rfc822; bob+news@example.net", "rfc822; bob+news@example.net"),
        ("utf-8;pelé@example.net", "utf-8; pelé@example.net", r"utf-8; pel\x{E9}@example.net"),
        (r"utf-8;pel\x{E9}@example.net", r"utf-8; pel\x{E9}@example.net", r"utf-8; pel\x{E9}@example.net"),
        ("utf-8;pel+C3+A9@example.net", "utf-8; pelé@example.net", r"utf-8; pel\x{E9}@example.net"),
        (None, None, None),
        ("rfc822;", None, None),
        ("bob@example.net", None, None),
        ("no type;bob@example.net", None, None),
        ("x" * 65 + ";bob", None, None),
    ],
)
def test_the_original_recipient_is_told(orcpt: str | None, field: str | None, seven_bit: str | None) -> None:
    status = Status(Recipient("bob@example.net", orcpt=orcpt), REFUSED)
    assert fields(notice(NoticeKind.FAILED, status, mail=SMTPUTF8)).get("Original-Recipient") == field
    assert fields(notice(NoticeKind.FAILED, status)).get("Original-Recipient") == seven_bit


# What is returned: RFC 3461 4.3, RFC 2046 5.2.1, RFC 6522 4, RFC 6533 6 ---------------------------------------

LATIN: Final = b"Subject: na\xefve\r\n"
UTF8: Final = "Subject: naïve\r\n".encode()
LONG: Final = b"Subject: " + b"x" * LINE_OCTETS + b"\r\n"
HEADERS: Final = "text/rfc822-headers"


@pytest.mark.parametrize(
    ("header", "body", "more", "content_type", "encoding"),
    [
        (HEADER, None, {}, HEADERS, "7bit"),
        (b"", None, {}, HEADERS, "7bit"),
        (UTF8, None, {}, HEADERS, "quoted-printable"),
        (LATIN, None, {}, HEADERS, "quoted-printable"),
        (LONG, None, {}, HEADERS, "quoted-printable"),
        (b"Subject: \0\r\n", None, {}, HEADERS, "quoted-printable"),
        (b"Subject: a\rb\nc\r\n", None, {}, HEADERS, "quoted-printable"),
        (UTF8, None, {"mail": SMTPUTF8}, "message/global-headers", "8bit"),
        (UTF8, None, {"mail": SMTPUTF8, "eight_bit": False}, HEADERS, "quoted-printable"),
        (LATIN, None, {"mail": SMTPUTF8}, HEADERS, "quoted-printable"),  # no UTF-8, whatever MAIL said
        (HEADER, None, {"mail": SMTPUTF8}, HEADERS, "7bit"),
        (HEADER, b"\r\nHello.\r\n", {}, "message/rfc822", "7bit"),
        (HEADER, b"\r\nno line end", {}, "message/rfc822", "7bit"),
        (HEADER, b"", {}, "message/rfc822", "7bit"),
        (HEADER, b"\r\n\xff\r\n", {}, "message/rfc822", "8bit"),
        (UTF8, b"\r\nHello.\r\n", {"mail": SMTPUTF8}, "message/global", "8bit"),
        (HEADER, "\r\nnaïve\r\n".encode(), {"mail": SMTPUTF8}, "message/rfc822", "8bit"),  # its header is ASCII
        # No mail can hold these as they are, and message/rfc822 must not be encoded.
        (HEADER, b"\r\n\0\r\n", {}, HEADERS, "7bit"),
        (HEADER, b"\r\na\nb\r\n", {}, HEADERS, "7bit"),
        (HEADER, b"\r\na\r", {}, HEADERS, "7bit"),
        (HEADER, b"\r\n" + b"x" * (LINE_OCTETS + 1), {}, HEADERS, "7bit"),
        (HEADER, b"\r\n" + b"x" * LINE_OCTETS, {}, "message/rfc822", "7bit"),
        (HEADER, b"\r\n\xff\r\n", {"eight_bit": False}, HEADERS, "7bit"),
        (HEADER, b"\r\nHello.\r\n", {"eight_bit": False}, "message/rfc822", "7bit"),
    ],
)
def test_the_original_goes_back_as_it_came(
    header: bytes, body: bytes | None, more: dict[str, Any], content_type: str, encoding: str
) -> None:
    content = None if body is None else header + body
    octets = notice(header=header, content=content, **more)
    head, returned = split(octets)[2]
    assert (head.get_content_type(), head["Content-Transfer-Encoding"]) == (content_type, encoding)
    expected = header if content is None or content_type == HEADERS else content
    if encoding == "quoted-printable":
        part = list(parsed(octets).iter_parts())[2]
        assert part.get_payload(decode=True) == expected
    else:
        assert returned == expected
    assert parsed(octets).get("Content-Transfer-Encoding") == ("8bit" if encoding == "8bit" else None)
    assert octets.isascii() is (encoding != "8bit")


@pytest.mark.parametrize(
    ("header", "returned"),
    [
        (b"Subject: x\r\nSubj", b"Subject: x\r\n"),  # what was cut in two is left out
        (b"a: b\r\n" * 10_000, b"a: b\r\n" * (HEADER_OCTETS // 6)),
        (b"a: " + b"b" * (HEADER_OCTETS - 5) + b"\r\n", b"a: " + b"b" * (HEADER_OCTETS - 5) + b"\r\n"),
        (b"a: " + b"b" * 60_000, b"a: " + b"b" * (HEADER_OCTETS - 3)),
    ],
)
def test_a_large_header_block_goes_back_in_part(header: bytes, returned: bytes) -> None:
    part = list(parsed(notice(header=header)).iter_parts())[2]
    assert part.get_payload(decode=True) == returned


def test_a_boundary_in_the_original_is_no_boundary() -> None:
    content = HEADER + b"\r\n--=_01hq9.0--\r\n--=_01hq9.1\r\nContent-Type: text/plain\r\n\r\nforged\r\n"
    octets = notice(content=content)
    assert parsed(octets).get_boundary() == "=_01hq9.2"
    assert split(octets)[2][1] == content


# Hostile peers ------------------------------------------------------------------------------------------------

FORGED: Final = "Final-Recipient: rfc822; forged@example.org"
FRAGMENTS: Final = (
    "\r\n", "\n", "\r", "\0", "\x1b[2J", "\x85", "\u2028", "\ud800", "\u202e", " ", "é", "=\r\n", "+0D+0A",
    "--=_01hq9.0", "\r\n--=_01hq9.0--\r\n", f"\r\n{FORGED}\r\n", f"\r\n\r\n{FORGED}\r\nAction: delivered\r\n",
    "\r\nBcc: forged@example.org\r\n", "Content-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n", "x" * 1200,
)  # fmt: skip
hostile = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=6).map("".join)
hostile_octets = hostile.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=60)
hostile_replies = st.builds(
    Reply,
    st.sampled_from([250, 354, 450, 550, 599]),
    st.none() | st.builds(EnhancedStatus, st.sampled_from([2, 4, 5]), st.integers(0, 999), st.integers(0, 999)),
    # A reply is ASCII by its making.
    st.lists(hostile.map(lambda text: "".join(filter(str.isascii, text))), min_size=1, max_size=3).map(tuple),
)
hostile_statuses = st.lists(
    st.builds(
        Status,
        st.builds(Recipient, hostile, st.none(), st.none() | hostile | hostile.map("rfc822;".__add__)),
        st.none() | hostile_replies,
        st.none() | hostile,
        st.none() | st.just(NOW),
        st.none() | st.just(NOW),
        hostile,
    ),
    min_size=1,
    max_size=3,
)
TOP_FIELDS: Final = [
    "From", "To", "Subject", "Date", "Message-ID", "In-Reply-To", "References", "Auto-Submitted", "MIME-Version",
    "Content-Type", "Content-Transfer-Encoding",
]  # fmt: skip
RECIPIENT_FIELDS: Final = [
    "Original-Recipient", "Final-Recipient", "Action", "Status", "Remote-MTA", "Diagnostic-Code", "Last-Attempt-Date",
    "Will-Retry-Until",
]  # fmt: skip


def is_in_order(names: Sequence[str], order: Sequence[str]) -> bool:
    """Whether `names` are some of `order`, each once and in its order."""
    places = [order.index(name) for name in names]
    return all(one < other for one, other in itertools.pairwise(places))


@given(
    kind=st.sampled_from(NoticeKind),
    mail=st.builds(Mail, hostile, smtputf8=st.booleans(), envid=st.none() | hostile),
    statuses=hostile_statuses,
    header=hostile_octets,
    body=st.none() | hostile_octets,
    eight_bit=st.booleans(),
    trace_id=st.none() | hostile,
    reporting_mta=st.just("gw.example") | hostile,
)
@example(
    kind=NoticeKind.FAILED,
    mail=Mail("a\r\nBcc: forged@example.org", envid=f"x\r\n\r\n{FORGED}"),
    statuses=[Status(Recipient(f"b\r\n\r\n{FORGED}", orcpt=f"rfc822;c\r\n\r\n{FORGED}"), None, f"d\r\n{FORGED}")],
    header=b"\r\n--=_01hq9.0--\r\n",
    body=b"\r\n--=_01hq9.0\r\n",
    eight_bit=True,
    trace_id=None,
    reporting_mta="gw.example",
)
def test_whatever_peers_write_there_are_three_parts_and_the_given_recipients(
    kind: NoticeKind,
    mail: Mail,
    statuses: list[Status],
    header: bytes,
    body: bytes | None,
    eight_bit: bool,
    trace_id: str | None,
    reporting_mta: str,
) -> None:
    octets = notice(
        kind,
        *statuses,
        mail=mail,
        header=header,
        content=None if body is None else header + body,
        eight_bit=eight_bit,
        trace_id=trace_id,
        reporting_mta=reporting_mta,
    )
    # It is a mail: CRLF alone, no NUL, lines within bounds, no octet that its envelope does not declare.
    assert octets.endswith(b"\r\n")
    assert b"\0" not in octets
    lines = octets.split(b"\r\n")
    assert not any(b"\r" in line or b"\n" in line for line in lines)
    assert max(map(len, lines)) <= LINE_OCTETS
    assert eight_bit or octets.partition(b"\r\n\r\n")[2].isascii()
    # Its fields are ours. (Compared by hand: a parser that decodes addresses would judge them too.)
    message = email.message_from_bytes(octets, policy=email.policy.compat32)
    assert is_in_order(message.keys(), TOP_FIELDS)
    assert not message.defects
    # It has three parts, and the second one is about exactly these recipients.
    parts = inner(message)
    assert len(parts) == len(split(octets)) == 3
    about, *recipients = blocks(octets)
    assert len(recipients) == len(statuses)
    assert is_in_order(
        [name for name, _ in about],
        ["Reporting-MTA", "Original-Envelope-Id", "Arrival-Date", "X-Spool-Id", "X-Trace-Id"],
    )
    for status, found in zip(statuses, recipients, strict=True):
        assert is_in_order([name for name, _ in found], RECIPIENT_FIELDS)
        final = dict(found)["Final-Recipient"]
        assert final.startswith(("rfc822; ", "utf-8; "))
        if status.recipient.address.isascii() and status.recipient.address.isprintable():
            assert final == f"rfc822; {status.recipient.address[:900]}"
    if parts[1].get_content_type() == "message/delivery-status":
        assert [block["Action"] for block in inner(parts[1])[1:]] == [kind.value] * len(statuses)


@given(header=hostile_octets, is_international=st.booleans(), eight_bit=st.booleans())
def test_any_header_block_comes_back_octet_by_octet(header: bytes, is_international: bool, eight_bit: bool) -> None:
    header += b"\r\n"
    octets = notice(header=header, mail=SMTPUTF8 if is_international else MAIL, eight_bit=eight_bit)
    head, returned = split(octets)[2]
    if head["Content-Transfer-Encoding"] == "quoted-printable":
        assert list(parsed(octets).iter_parts())[2].get_payload(decode=True) == header
    else:
        assert returned == header


# For real -----------------------------------------------------------------------------------------------------


class Keeping(MessageHandler):
    """Keeps what aiosmtpd took."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[Message] = []

    def prepare_message(self, session: Any, envelope: Any) -> Message:
        self.messages.append(email.message_from_bytes(envelope.content, policy=email.policy.default))
        return super().prepare_message(session, envelope)

    def handle_message(self, message: Message) -> None:
        """Nothing more: it is kept as it came."""


@pytest.mark.parametrize(
    ("kind", "statuses", "waiting", "failed"),
    [
        (NoticeKind.FAILED, [Status(BOB, REFUSED), Status(Recipient("carol@x.example"), replies.EXPIRED)], 0, 2),
        (NoticeKind.FAILED, [Status(Recipient("pelé@example.net", orcpt="rfc822;alias@example.com"), REFUSED)], 0, 1),
        (NoticeKind.DELAYED, [Status(BOB, BUSY, will_retry_until=NOW)], 1, 0),
        (NoticeKind.RELAYED, [Status(BOB, TAKEN)], 0, 0),
    ],
)
def test_a_mailing_list_server_knows_what_it_is_told(
    kind: NoticeKind, statuses: list[Status], waiting: int, failed: int
) -> None:
    """By the code of GNU Mailman, which unsubscribes whom it finds."""
    temporary, permanent = all_failures(email.message_from_bytes(notice(kind, *statuses)))
    assert (len(temporary), len(permanent)) == (waiting, failed)
    told = {status.recipient.orcpt or status.recipient.address for status in statuses}
    assert {address.decode() for address in temporary | permanent} <= {one.rpartition(";")[2] for one in told}


@pytest.mark.parametrize("body", [b"\r\nHello.\r\n.\r\n..\r\n", b"\r\n\xff\xfe\r\n"], ids=["7bit", "8bit"])
async def test_a_server_that_others_wrote_takes_it_and_reads_it(body: bytes) -> None:
    handler = Keeping()
    server = await asyncio.get_running_loop().create_server(lambda: SMTP(handler, enable_SMTPUTF8=True), "127.0.0.1", 0)
    settings = UpstreamSettings("aiosmtpd", "127.0.0.1", server.sockets[0].getsockname()[1], timeouts=PATIENT)
    octets = notice(content=HEADER + body)
    mail, recipient = envelope(MAIL, is_ascii=octets.isascii())
    head, _, rest = octets.partition(b"\r\n\r\n")
    async with relaying(settings) as forwarder:
        relayed = await relay(forwarder, recipient, mail=mail, chunks=(head + b"\r\n", b"\r\n" + rest))
        assert relayed.told.code == 250
    server.close()
    (message,) = handler.messages
    assert message["Subject"] == "Undelivered mail returned to sender"
    _, status, returned = inner(message)
    assert inner(status)[1]["Final-Recipient"] == "rfc822; bob@example.net"
    (original,) = inner(returned)
    assert original["Subject"] == "test"
    came_back = original.get_payload(decode=True)
    assert isinstance(came_back, bytes)
    assert came_back.replace(b"\r\n", b"\n") == body[2:].replace(b"\r\n", b"\n")
