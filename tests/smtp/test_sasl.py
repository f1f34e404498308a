"""SASL messages: what is read, what is refused, and that both sides agree."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.smtp.sasl import (
    MECHANISMS,
    BearerToken,
    Password,
    SaslError,
    build_login,
    build_plain,
    build_xoauth2,
    decode_base64,
    parse_login,
    parse_oauthbearer,
    parse_plain,
    parse_xoauth2,
    prepare_name,
)
from tests.support.bearer import oauthbearer


@pytest.mark.parametrize(
    ("text", "octets"), [(b"", b""), (b"AA==", b"\0"), (b"AGEAYg==", b"\0a\0b"), (b"+/+/", b"\xfb\xff\xbf")]
)
def test_base64_is_read(text: bytes, octets: bytes) -> None:
    assert decode_base64(text) == octets


@pytest.mark.parametrize(
    "text",
    [
        b"=",
        b"A",
        b"AA",
        b"AA=",
        b"AA===",
        b"AA==AA==",
        b"====",
        b"AB==",  # the last four bits are thrown away: a second form of AA==
        b"AAB=",
        b"AA ==",
        b"AA==\n",
        b" AA==",
        b"A\x00A==",
        b"-_-_",  # the alphabet for URLs
        b"\xff\xff\xff\xff",
        b"*",
    ],
)
def test_what_is_not_the_one_form_of_base64_is_refused(text: bytes) -> None:
    with pytest.raises(SaslError):
        decode_base64(text)


@given(st.binary(max_size=200))
def test_base64_round_trip(octets: bytes) -> None:
    assert decode_base64(base64.b64encode(octets)) == octets


@given(st.binary(max_size=60))
def test_base64_has_one_form(text: bytes) -> None:
    try:
        assert base64.b64encode(decode_base64(text)) == text
    except SaslError:
        return


@pytest.mark.parametrize(
    ("message", "name", "password"),
    [
        (b"\0tim\0tanstaaftanstaaf", "tim", "tanstaaftanstaaf"),
        (b"tim\0tim\0pass", "tim", "pass"),
        (b"\0tim\0 pass word ", "tim", " pass word "),
        (b"\0j\xc3\xbcrgen\0p\xc3\xa4ss", "jürgen", "päss"),
        (b"\0ju\xcc\x88rgen\0x", "jürgen", "x"),  # decomposed
        (b"\0tim\0p\x01\x7f\n", "tim", "p\x01\x7f\n"),  # a password is nobody's to judge, but for NUL
        (b"\0" + b"n" * 255 + b"\0x", "n" * 255, "x"),
    ],
)
def test_plain_is_read(message: bytes, name: str, password: str) -> None:
    assert parse_plain(message) == Password(name, password)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0",
        b"\0\0",
        b"\0\0\0",
        b"tim",
        b"tim\0pass",
        b"\0tim\0pass\0",  # one NUL too many: a server that stops at it would see another password
        b"\0tim\0pa\0ss",
        b"admin\0tim\0pass",  # to act for somebody else
        b"\0tim\0",
        b"\0\0pass",
        b"\0t\nim\0pass",
        b"\0t\x7fim\0pass",
        b"\0t\xc2\x85im\0pass",
        b"\0t\xe2\x80\xaeim\0pass",  # RIGHT-TO-LEFT OVERRIDE
        b"\0\xff\0pass",
        b"\0tim\0\xff",
        b"\xff\0tim\0pass",
        b"\0" + b"n" * 256 + b"\0x",
        b"\0" * 100_000,
    ],
)
def test_plain_that_can_be_read_in_two_ways_is_refused(message: bytes) -> None:
    with pytest.raises(SaslError):
        parse_plain(message)


def test_no_control_octet_is_taken_in_a_name() -> None:
    for octet in [*range(0x20), 0x7F]:
        character = bytes((octet,))
        for place in (b"%btim", b"ti%bm", b"tim%b"):
            name = place % character
            for read in (
                lambda name: parse_plain(b"\0" + name + b"\0pass"),
                lambda name: parse_login(name, b"pass"),
                lambda name: parse_xoauth2(b"user=" + name + b"\x01auth=Bearer x\x01\x01"),
                lambda name: parse_oauthbearer(b"n,a=" + name + b",\x01auth=Bearer x\x01\x01"),
            ):
                with pytest.raises(SaslError):
                    read(name)


def test_login_is_read() -> None:
    assert parse_login(b"tim", b"pass") == Password("tim", "pass")
    for name, password in ((b"", b"x"), (b"x", b""), (b"x", b"a\0b"), (b"\xff", b"x"), (b"x", b"\xff")):
        with pytest.raises(SaslError):
            parse_login(name, password)


@pytest.mark.parametrize(
    ("message", "name", "token"),
    [
        (
            b"user=u@example.com\x01auth=Bearer ya29.vF9dft4q-_~+/Cg==\x01\x01",
            "u@example.com",
            "ya29.vF9dft4q-_~+/Cg==",
        ),
        (b"auth=bearer  t\x01user=u\x01\x01", "u", "t"),
    ],
)
def test_xoauth2_is_read(message: bytes, name: str, token: str) -> None:
    assert parse_xoauth2(message) == BearerToken(name, token)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x01\x01",
        b"user=u\x01auth=Bearer t\x01",
        b"user=u\x01auth=Bearer t",
        b"user=u\x01\x01",
        b"auth=Bearer t\x01\x01",
        b"user=\x01auth=Bearer t\x01\x01",
        b"user=u\x01user=v\x01auth=Bearer t\x01\x01",
        b"user=u\x01auth=Basic t\x01\x01",
        b"user=u\x01auth=Bearer\x01\x01",
        b"user=u\x01auth=Bearer \x01\x01",
        b"user=u\x01auth=Bearer t t\x01\x01",
        b"user=u\x01auth=Bearer t\r\n\x01\x01",
        b"user=u\x01auth=Bearer \xc3\xbc\x01\x01",
        b"user=u\x01x=y\x01auth=Bearer t\x01\x01",
        b"user=u\x01auth=Bearer t\x01\x01\x01\x01",
        b"user=u\0\x01auth=Bearer t\x01\x01",
        b"\xff",
    ],
)
def test_malformed_xoauth2_is_refused(message: bytes) -> None:
    with pytest.raises(SaslError):
        parse_xoauth2(message)


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (b"n,a=user@example.com,\x01host=h\x01port=143\x01auth=Bearer t0k.en==\x01\x01", "user@example.com"),
        (b"n,,\x01auth=Bearer t0k.en==\x01\x01", ""),
        (b"y,a=a=2Cb=3Dc,\x01auth=Bearer t0k.en==\x01\x01", "a,b=c"),
    ],
)
def test_oauthbearer_is_read(message: bytes, name: str) -> None:
    assert parse_oauthbearer(message) == BearerToken(name, "t0k.en==")


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x01",
        b"n,,",
        b"n,,\x01",
        b"n,,\x01\x01",
        b"n,\x01auth=Bearer t\x01\x01",
        b"p=tls-unique,,\x01auth=Bearer t\x01\x01",
        b"n,a=u=2,\x01auth=Bearer t\x01\x01",
        b"n,a=u,x\x01auth=Bearer t\x01\x01",
        b"n,,\x01host=h\x01\x01",
        b"n,,\x01auth=Bearer t\x01auth=Bearer s\x01\x01",
        b"n,,\x01auth\x01\x01",
        b"n,,\x01=x\x01\x01",
        b"n,,\x01auth=Bearer t\x01\x01x",
        b"\xff",
    ],
)
def test_malformed_oauthbearer_is_refused(message: bytes) -> None:
    with pytest.raises(SaslError):
        parse_oauthbearer(message)


NAMES = st.text(st.characters(codec="ascii", min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=80)
PASSWORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=80)
TOKENS = st.from_regex(r"[A-Za-z0-9._~+/-]{1,40}={0,2}", fullmatch=True)


@given(NAMES, PASSWORDS)
def test_both_sides_agree_on_passwords(name: str, password: str) -> None:
    assert parse_plain(build_plain(name, password)) == Password(name, password)
    assert parse_login(*build_login(name, password)) == Password(name, password)


@given(NAMES, TOKENS)
def test_both_sides_agree_on_tokens(name: str, token: str) -> None:
    assert parse_xoauth2(build_xoauth2(name, token)) == BearerToken(name, token)
    assert parse_oauthbearer(oauthbearer(name, token)) == BearerToken(name, token)


@pytest.mark.parametrize(
    ("name", "secret"), [("", "x"), ("a\0b", "x"), ("a", ""), ("a", "x\0y"), ("a\nb", "x"), ("a\x01", "x")]
)
def test_what_cannot_be_read_is_not_built(name: str, secret: str) -> None:
    for build in (
        build_plain,
        build_login,
        build_xoauth2,
    ):
        with pytest.raises(SaslError):
            build(name, secret)
    for token in ("a b", "a\r\nb", "ü", "="):
        with pytest.raises(SaslError):
            build_xoauth2("user", token)


@given(st.binary(max_size=120))
def test_any_message_is_read_or_refused(message: bytes) -> None:
    for read in (parse_plain, parse_xoauth2, parse_oauthbearer, lambda message: parse_login(message, message)):
        try:
            read(message)
        except SaslError:
            continue


@pytest.mark.parametrize(
    ("name", "prepared"),
    [
        ("tim", "tim"),
        ("Tim", "Tim"),
        ("ｔｉｍ", "tim"),
        ("ju\u0308rgen", "jürgen"),
        ("a b", "a b"),
        ("a\u00a0b", "a b"),
    ],
)
def test_names_are_compared_in_one_form(name: str, prepared: str) -> None:
    assert prepare_name(name) == prepared


def test_a_lone_surrogate_is_no_name() -> None:
    with pytest.raises(SaslError):
        prepare_name("a\ud800")


def test_secrets_do_not_show() -> None:
    shown = repr(Password("tim", "secret")) + repr(BearerToken("tim", "secret"))
    assert "secret" not in shown
    with pytest.raises(SaslError) as caught:
        parse_plain(b"secret\0tim\0secret\0")
    assert "secret" not in str(caught.value)


def test_mechanisms_are_named_once() -> None:
    assert len(set(MECHANISMS)) == len(MECHANISMS)
    assert all(name == name.upper() and len(name) <= 20 for name in MECHANISMS)
