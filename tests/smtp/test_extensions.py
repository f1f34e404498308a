"""EHLO keywords, MAIL and RCPT parameters, xtext."""

import contextlib
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.smtp.extensions import (
    EXTENSIONS,
    Extension,
    Extensions,
    ParameterRefused,
    keyword_lines,
    mail_with,
    missing_extension,
    offer_to_clients,
    recipient_with,
    unsupported,
    unsupported_recipient,
)
from otel_smtp.smtp.parameters import decode_xtext, encode_xtext
from otel_smtp.smtp.replies import Reply

BARE = Extensions(pipelining=True, enhanced_status_codes=True)
USUAL = replace(BARE, eight_bit_mime=True, smtputf8=True, chunking=True, dsn=True)
FULL = replace(
    USUAL,
    size=26214400,
    binary_mime=True,
    auth_mechanisms=("PLAIN", "LOGIN"),
    require_tls=True,
    limits={"RCPTMAX": 1000, "MAILMAX": 20},
)


ALL = replace(FULL, starttls=True)


def test_what_we_offer_ourselves_is_always_offered() -> None:
    assert keyword_lines(offer_to_clients(Extensions(), is_tls=False)) == (
        "PIPELINING",
        "ENHANCEDSTATUSCODES",
        "CHUNKING",
    )


def test_what_depends_on_the_upstream_is_offered_if_it_offers_it() -> None:
    assert keyword_lines(offer_to_clients(FULL, is_tls=True, size=5)) == (
        "PIPELINING",
        "SIZE 5",
        "8BITMIME",
        "SMTPUTF8",
        "ENHANCEDSTATUSCODES",
        "CHUNKING",
        "BINARYMIME",
        "DSN",
        "REQUIRETLS",
    )


def test_requiretls_is_offered_under_tls_only() -> None:  # RFC 8689 2
    assert "REQUIRETLS" not in offer_to_clients(FULL, is_tls=False).keywords


def test_the_table_has_a_row_for_each_field_and_no_keyword_or_parameter_twice() -> None:
    assert [row.field for row in EXTENSIONS] == [one.name for one in fields(Extensions) if one.init]
    for names in (
        [row.keyword for row in EXTENSIONS],
        [parameter.field for row in EXTENSIONS for parameter in row.mail],
        [parameter.field for row in EXTENSIONS for parameter in row.recipient],
    ):
        assert len(names) == len(set(names))
    assert {parameter.field for row in EXTENSIONS for parameter in row.mail} == {*Mail._fields} - {"reverse_path"}
    assert {one.field for row in EXTENSIONS for one in row.recipient} == {*Recipient._fields} - {"address"}


@pytest.mark.parametrize("row", EXTENSIONS, ids=lambda row: row.keyword)
def test_what_we_announce_is_read_as_it_was_meant(row: Extension) -> None:
    assert Extensions.parse(keyword_lines(ALL)) == ALL
    without = Extensions.parse(keyword_lines(ALL), disabled=[row.keyword])
    assert row.keyword in ALL.keywords
    assert row.keyword not in without.keywords
    dependent = {other.keyword for other in EXTENSIONS if other.needs == row.keyword}
    assert ALL.keywords - without.keywords == {row.keyword, *dependent}


def test_all_that_can_be_offered() -> None:
    assert keyword_lines(FULL) == (
        "PIPELINING",
        "SIZE 26214400",
        "8BITMIME",
        "SMTPUTF8",
        "ENHANCEDSTATUSCODES",
        "CHUNKING",
        "BINARYMIME",
        "DSN",
        "AUTH PLAIN LOGIN",
        "REQUIRETLS",
        "LIMITS RCPTMAX=1000 MAILMAX=20",
    )


@pytest.mark.parametrize(
    ("offered", "present", "absent"),
    [
        (replace(USUAL, size=0), "SIZE 0", ""),  # RFC 1870 3: no fixed limit
        (USUAL, "8BITMIME", "SIZE"),
        (replace(BARE, starttls=True), "STARTTLS", "8BITMIME"),
        (replace(FULL, chunking=False), "8BITMIME", "BINARYMIME"),  # RFC 3030 3: BINARYMIME needs CHUNKING
        (replace(FULL, eight_bit_mime=False), "DSN", "SMTPUTF8"),  # RFC 6531 3.1: SMTPUTF8 needs 8BITMIME
        (replace(FULL, limits={"RCPTMAX": 0}), "DSN", "LIMITS"),  # RFC 9422: 0 is no value
        (replace(FULL, limits={"RCPTMAX": 1_000_000, "MAILMAX": 999_999}), "LIMITS MAILMAX=999999", "RCPTMAX"),
        (replace(FULL, auth_mechanisms=()), "DSN", "AUTH"),
    ],
)
def test_keywords_follow_the_rules_of_their_extension(offered: Extensions, present: str, absent: str) -> None:
    lines = keyword_lines(offered)
    assert present in lines
    assert not absent or not any(absent in line for line in lines)


@pytest.mark.parametrize(
    ("parameters", "mail"),
    [
        ("", Mail("a@b")),
        ("   ", Mail("a@b")),
        (" SIZE=0", Mail("a@b", size=0)),
        (" SIZE=99999999999999999999", Mail("a@b", size=99999999999999999999)),  # twenty digits, the most
        (" size=1  body=8bitmime", Mail("a@b", size=1, body=Body.EIGHT_BIT_MIME)),
        (" BODY=7BIT", Mail("a@b", body=Body.SEVEN_BIT)),
        (" BODY=BinaryMime SMTPUTF8", Mail("a@b", body=Body.BINARY_MIME, smtputf8=True)),
        (" RET=hdrs ENVID=QQ314159", Mail("a@b", ret=DsnReturn.HEADERS, envid="QQ314159")),
        (" RET=FULL", Mail("a@b", ret=DsnReturn.FULL)),
        (" ENVID=a+20b+2Bc", Mail("a@b", envid="a+20b+2Bc")),
        (" ENVID=a+2bc+41", Mail("a@b", envid="a+2BcA")),  # kept in canonical form
        (" ENVID=" + "e" * 100, Mail("a@b", envid="e" * 100)),
        (" AUTH=<>", Mail("a@b", auth="<>")),
        (" AUTH=e+3Dmc2@example.com", Mail("a@b", auth="e+3Dmc2@example.com")),  # the RFC's own example
        (" REQUIRETLS", Mail("a@b", require_tls=True)),
    ],
)
def test_mail_parameters(parameters: str, mail: Mail) -> None:
    assert mail_with("a@b", parameters) == mail


@pytest.mark.parametrize(
    ("parameters", "reply"),
    [
        (" X", replies.UNKNOWN_PARAMETER),
        (" XVERP=+=", replies.BAD_ARGUMENT),  # "=" is no character of a value
        (" NOTIFY=NEVER", replies.UNKNOWN_PARAMETER),  # belongs to RCPT
        (" TRANSID=<x@y>", replies.UNKNOWN_PARAMETER),
        (" SIZE", replies.BAD_ARGUMENT),
        (" SIZE=", replies.BAD_ARGUMENT),
        (" SIZE=-1", replies.BAD_ARGUMENT),
        (" SIZE=1e3", replies.BAD_ARGUMENT),
        (" SIZE=١", replies.BAD_ARGUMENT),  # a digit to str.isdigit, none on the wire
        (" SIZE=1 size=1", replies.BAD_ARGUMENT),
        (" SIZE=1_0", replies.BAD_ARGUMENT),  # int() would take it
        (" SIZE=100000000000000000000", replies.BAD_ARGUMENT),
        (" BODY=9BIT", replies.BAD_ARGUMENT),
        (" BODY", replies.BAD_ARGUMENT),
        (" SMTPUTF8=1", replies.BAD_ARGUMENT),
        (" REQUIRETLS=yes", replies.BAD_ARGUMENT),
        (" RET=NONE", replies.BAD_ARGUMENT),
        (" ENVID", replies.BAD_ARGUMENT),
        (" ENVID=a+0D+0Ab", replies.BAD_ARGUMENT),
        (" ENVID=a+00b", replies.BAD_ARGUMENT),
        (" ENVID=a+7Fb", replies.BAD_ARGUMENT),
        (" ENVID=a+C3+BC", replies.BAD_ARGUMENT),  # US-ASCII only (RFC 3461 4.4)
        (" ENVID=a+2", replies.BAD_ARGUMENT),
        (" ENVID=a+GG", replies.BAD_ARGUMENT),
        (" ENVID=" + "e" * 101, replies.BAD_ARGUMENT),
        (" ENVID=" + "+20" * 34, replies.BAD_ARGUMENT),  # 102 characters of xtext
        (" AUTH", replies.BAD_ARGUMENT),
        (" AUTH=a+0Ab", replies.BAD_ARGUMENT),
        (" AUTH=a+FF", replies.BAD_ARGUMENT),  # not UTF-8
        (" =1", replies.BAD_ARGUMENT),
        (" -X=1", replies.BAD_ARGUMENT),
        (" SIZE=1,BODY=7BIT", replies.BAD_ARGUMENT),
        (" SıZE=1", replies.BAD_ARGUMENT),  # dotless i upper-cases to I
        (" ſIZE=1", replies.BAD_ARGUMENT),  # long s upper-cases to S
    ],
)
def test_bad_mail_parameters(parameters: str, reply: Reply) -> None:
    with pytest.raises(ParameterRefused) as caught:
        mail_with("a@b", parameters)
    assert caught.value.reply is reply


@pytest.mark.parametrize(
    ("parameters", "recipient"),
    [
        ("", Recipient("a@b")),
        (" NOTIFY=NEVER", Recipient("a@b", notify=Notify.NEVER)),
        (" notify=success,Failure", Recipient("a@b", notify=Notify.SUCCESS | Notify.FAILURE)),
        (" NOTIFY=DELAY ORCPT=rfc822;x@y", Recipient("a@b", notify=Notify.DELAY, orcpt="rfc822;x@y")),
        (" ORCPT=rfc822;a+2Bb@c", Recipient("a@b", orcpt="rfc822;a+2Bb@c")),
        (" ORCPT=x400;/g=x".replace("g=", "g+3D"), Recipient("a@b", orcpt="x400;/g+3Dx")),
        (r" ORCPT=utf-8;j\x{FC}rgen@example.com", Recipient("a@b", orcpt=r"utf-8;j\x{FC}rgen@example.com")),
        (" ORCPT=utf-8;jürgen@example.com", Recipient("a@b", orcpt="utf-8;jürgen@example.com")),
        (" ORCPT=rfc822;" + "x" * 493, Recipient("a@b", orcpt="rfc822;" + "x" * 493)),  # 500
    ],
)
def test_rcpt_parameters(parameters: str, recipient: Recipient) -> None:
    assert recipient_with("a@b", parameters) == recipient


@pytest.mark.parametrize(
    ("parameters", "reply"),
    [
        (" SIZE=1", replies.UNKNOWN_PARAMETER),  # belongs to MAIL
        (" NOTIFY", replies.BAD_ARGUMENT),
        (" NOTIFY=NEVER,DELAY", replies.BAD_ARGUMENT),
        (" NOTIFY=DELAY,DELAY", replies.BAD_ARGUMENT),
        (" NOTIFY=ALWAYS", replies.BAD_ARGUMENT),
        (" NOTIFY=DELAY,", replies.BAD_ARGUMENT),
        (" NOTIFY=DELAY NOTIFY=DELAY", replies.BAD_ARGUMENT),
        (" ORCPT=x@y", replies.BAD_ARGUMENT),
        (" ORCPT=rfc822;", replies.BAD_ARGUMENT),
        (" ORCPT=;x@y", replies.BAD_ARGUMENT),
        (" ORCPT=rf+63;x@y", replies.BAD_ARGUMENT),
        (" ORCPT=rfc822;x+0D+0ARCPT", replies.BAD_ARGUMENT),
        (" ORCPT=rfc822;jürgen@example.com", replies.BAD_ARGUMENT),
        (" ORCPT=utf-8;jü+0Argen@example.com", replies.BAD_ARGUMENT),
        (r" ORCPT=utf-8;j\x{0A}rgen@example.com", replies.BAD_ARGUMENT),
        (r" ORCPT=utf-8;j\x{7F}rgen@example.com", replies.BAD_ARGUMENT),
        (r" ORCPT=utf-8;j\x{202E}rgen@example.com", replies.BAD_ARGUMENT),
        (r" ORCPT=utf-8;j\x{D800}rgen@example.com", replies.BAD_ARGUMENT),
        (r" ORCPT=utf-8;j\x{110000}rgen@example.com", replies.BAD_ARGUMENT),
        (r" ORCPT=utf-8;j\xFCrgen@example.com", replies.BAD_ARGUMENT),
        (" ORCPT=utf-8;", replies.BAD_ARGUMENT),
        (" ORCPT=rfc822;" + "x" * 494, replies.BAD_ARGUMENT),
    ],
)
def test_bad_rcpt_parameters(parameters: str, reply: Reply) -> None:
    with pytest.raises(ParameterRefused) as caught:
        recipient_with("a@b", parameters)
    assert caught.value.reply is reply


@pytest.mark.parametrize("prefix", ["SIZE=", "BODY=", "ENVID=", "AUTH=", "RET=", "SMTPUTF8", "", "X", "ENVID=+"])
def test_no_control_character_is_taken_in_a_mail_parameter(prefix: str) -> None:
    for code in [*range(0x20), *range(0x7F, 0xA1)]:
        with pytest.raises(ParameterRefused):
            mail_with("a@b", f" {prefix}{chr(code)}")


@pytest.mark.parametrize("keyword", ["ENVID={}", "AUTH={}"])
def test_no_control_octet_hides_in_xtext(keyword: str) -> None:
    for code in [*range(0x20), 0x7F]:
        for written in (f"x+{code:02X}y", f"x+{code:02x}y"):
            with pytest.raises(ParameterRefused):
                mail_with("a@b", " " + keyword.format(written))
            with pytest.raises(ParameterRefused):
                recipient_with("a@b", f" ORCPT=rfc822;{written}")


@pytest.mark.parametrize(
    ("mail", "offered", "reply"),
    [
        (Mail("a@b"), BARE, None),
        (Mail(""), BARE, None),
        (Mail("a@b", size=1), BARE, replies.UNKNOWN_PARAMETER),
        (Mail("a@b", size=1), replace(USUAL, size=0), None),
        (Mail("a@b", body=Body.EIGHT_BIT_MIME), BARE, None),  # the content tells whether it must be refused
        (Mail("a@b", body=Body.SEVEN_BIT), BARE, None),
        (Mail("a@b", body=Body.EIGHT_BIT_MIME), USUAL, None),
        (Mail("a@b", body=Body.BINARY_MIME), USUAL, replies.UNKNOWN_PARAMETER),
        (Mail("a@b", body=Body.BINARY_MIME), FULL, None),
        (Mail("a@b", body=Body.BINARY_MIME), replace(FULL, chunking=False), replies.UNKNOWN_PARAMETER),
        (Mail("a@b", smtputf8=True), BARE, None),  # likewise
        (Mail("ü@b", smtputf8=True), BARE, replies.NEEDS_SMTPUTF8),
        (Mail("ü@b", smtputf8=True), USUAL, None),
        (Mail("ü@b"), USUAL, replies.NEEDS_SMTPUTF8),
        (Mail("a@b", ret=DsnReturn.FULL), BARE, replies.UNKNOWN_PARAMETER),
        (Mail("a@b", envid="x"), BARE, replies.UNKNOWN_PARAMETER),
        (Mail("a@b", ret=DsnReturn.FULL, envid="x"), USUAL, None),
        (Mail("a@b", auth="<>"), USUAL, replies.UNKNOWN_PARAMETER),
        (Mail("a@b", auth="<>"), FULL, None),
        (Mail("a@b", require_tls=True), USUAL, replies.UNKNOWN_PARAMETER),
        (Mail("a@b", require_tls=True), FULL, None),
        (Mail("a@b", require_tls=True), replace(FULL, require_tls=False), replies.UNKNOWN_PARAMETER),
    ],
)
def test_a_mail_parameter_needs_its_extension(mail: Mail, offered: Extensions, reply: Reply | None) -> None:
    assert unsupported(mail, offered) is reply


@pytest.mark.parametrize(
    ("mail", "upstream", "is_tls", "reply"),
    [
        (Mail("a@b"), Extensions(), False, None),
        (Mail("a@b", size=1, ret=DsnReturn.FULL, envid="x", auth="<>"), Extensions(), False, None),  # left out
        (Mail("a@b", body=Body.SEVEN_BIT), Extensions(), False, None),
        (Mail("ü@b", smtputf8=True), FULL, True, None),
        (Mail("ü@b", smtputf8=True), BARE, True, replies.UPSTREAM_LACKS_SMTPUTF8),
        (Mail("ü@b"), BARE, True, replies.UPSTREAM_LACKS_SMTPUTF8),
        (Mail("a@b", smtputf8=True), BARE, True, None),  # the content tells
        (Mail("a@b", body=Body.BINARY_MIME), FULL, True, None),
        (Mail("a@b", body=Body.BINARY_MIME), USUAL, True, replies.UPSTREAM_LACKS_BINARYMIME),
        (Mail("a@b", body=Body.EIGHT_BIT_MIME), USUAL, True, None),
        (Mail("a@b", body=Body.EIGHT_BIT_MIME), BARE, True, replies.NEEDS_8BITMIME),
        (Mail("a@b", require_tls=True), FULL, True, None),
        (Mail("a@b", require_tls=True), FULL, False, replies.UPSTREAM_LACKS_REQUIRETLS),
        (Mail("a@b", require_tls=True), USUAL, True, replies.UPSTREAM_LACKS_REQUIRETLS),
        (Mail("", require_tls=True), USUAL, False, None),  # RFC 8689 5: a bounce goes all the same
        (Mail("a@b", size=26214400), FULL, False, None),
        (Mail("a@b", size=26214401), FULL, False, replies.MESSAGE_TOO_BIG),
        (Mail("a@b", size=26214401), replace(FULL, size=0), False, None),
        # NEEDS_8BITMIME only has the content looked at, so whatever is firm goes first.
        (
            Mail("a@b", body=Body.EIGHT_BIT_MIME, require_tls=True),
            BARE,
            True,
            replies.UPSTREAM_LACKS_REQUIRETLS,
        ),
        (Mail("a@b", body=Body.EIGHT_BIT_MIME, smtputf8=True), BARE, True, replies.NEEDS_8BITMIME),
        (Mail("a@b", body=Body.EIGHT_BIT_MIME, size=2), replace(BARE, size=1), True, replies.MESSAGE_TOO_BIG),
    ],
)
def test_a_mail_needs_what_it_uses_of_the_upstream(
    mail: Mail, upstream: Extensions, is_tls: bool, reply: Reply | None
) -> None:
    assert missing_extension(mail, upstream, is_tls=is_tls) is reply


@pytest.mark.parametrize(
    ("recipient", "mail", "offered", "reply"),
    [
        (Recipient("a@b"), Mail("a@b"), BARE, None),
        (Recipient("ü@b"), Mail("a@b"), USUAL, replies.NEEDS_SMTPUTF8),
        (Recipient("ü@b"), Mail("a@b", smtputf8=True), USUAL, None),
        (Recipient("a@b", orcpt="utf-8;ü@b"), Mail("a@b"), USUAL, replies.NEEDS_SMTPUTF8),
        (Recipient("a@b", orcpt="rfc822;a@b"), Mail("a@b"), USUAL, None),
        (Recipient("ü@b"), Mail("a@b", smtputf8=True), BARE, replies.NEEDS_SMTPUTF8),
        (Recipient("a@b"), Mail("a@b", smtputf8=True), BARE, None),
        (Recipient("a@b", orcpt="rfc822;a@b"), Mail("a@b"), BARE, replies.UNKNOWN_PARAMETER),
        (Recipient("a@b", notify=Notify.NEVER), Mail("a@b"), BARE, replies.UNKNOWN_PARAMETER),
    ],
)
def test_a_rcpt_parameter_needs_its_extension(
    recipient: Recipient, mail: Mail, offered: Extensions, reply: Reply | None
) -> None:
    assert unsupported_recipient(recipient, mail, offered) is reply


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" ")))
def test_xtext_round_trip(text: str) -> None:
    encoded = encode_xtext(text)
    assert decode_xtext(encoded) == text
    assert all("!" <= character <= "~" and character != "=" for character in encoded)


@given(st.text())
def test_any_parameters_are_read_or_refused(text: str) -> None:
    for read in (mail_with, recipient_with):
        with contextlib.suppress(ParameterRefused):  # nothing else may come out
            read("a@b", text)


@pytest.mark.parametrize(
    "parameters", [" A" * 500_000, " ENVID=" + "+20" * 300_000, " " * 1_000_000, " " + "A-" * 500_000 + "="]
)
def test_a_hostile_megabyte_of_parameters_is_read_in_one_pass(parameters: str) -> None:
    if parameters.strip():
        with pytest.raises(ParameterRefused):
            mail_with("a@b", parameters)
    else:
        assert mail_with("a@b", parameters) == Mail("a@b")
