"""Mailboxes, domains and paths: tables, every octet at every place, and input of a size that shows any second look."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otel_smtp.smtp.paths import (
    BareLocalPart,
    PathSyntaxError,
    PathTooLong,
    address_literal,
    forward_path,
    is_address_literal,
    is_domain,
    is_mailbox,
    is_visible,
    reverse_path,
)

LABEL_63 = "l" * 63
DOMAIN_189 = ".".join([LABEL_63, LABEL_63, "d" * 61])

MAILBOXES = [
    "a@b",
    "user@example.com",
    "first.last+tag@mail.example.com",
    "!#$%&'*+-/=?^_`{|}~@example.com",
    "1@2.3",  # digits are letters enough since RFC 1123
    "user@xn--bcher-kva.example",  # A-label
    "user@a--b.example",
    "noreply@my_service",  # not in the grammar; what containers are called
    '"john doe"@example.com',
    '""@example.com',  # *QcontentSMTP: an empty quoted string is a local part
    r'"a\"b\\c"@example.com',
    '"<>@,;:"@example.com',  # the closing bracket of the path is not the first one seen
    "user@[192.0.2.1]",
    "user@[IPv6:2001:db8::1]",
    "user@[ipv6:::1]",  # tags have no case
    "user@[IPv6:::ffff:192.0.2.1]",
    "user@[x-tag:anything!]",  # General-address-literal
    "jürgen@example.com",
    "用户@例え.jp",
    "نام\u200cه@example.ir",  # ZERO WIDTH NON-JOINER is spelling in Persian
    '"jü rgen"@example.com',
    "l" * 64 + "@example.com",
    "l" * 200 + "@example.com",  # beyond RFC 5321 4.5.3.1.1
    "ü" * 100 + "@example.com",
    "l" * 320 + "@" + DOMAIN_189,  # 510 octets
    ".user@example.com",
    "user.@example.com",
    "us..er@example.com",
    "...u...@example.com",
    ".@example.com",
    "....@example.com",
    "percent%hack@example.com",  # an ordinary local part to us: we never route by it
    "bang!path@example.com",
]

NOT_MAILBOXES = [
    "",
    "user",
    "postmaster",  # a mailbox only as forward-path
    "@example.com",
    "user@",
    "user@@example.com",
    "user@example.com@example.org",
    "us er@example.com",
    "us(comment)er@example.com",
    "user@example..com",
    "user@.example.com",
    "user@example.com..",
    "user@[192.0.2.1].",
    "user@-example.com",
    "user@example-.com",
    "user@exa mple.com",
    "user@exa,mple.com",
    "user@[192.0.2.256]",
    "user@[192.0.2]",
    "user@[192.0.2.010]",  # 8 or 10, depending on who reads it
    "user@[]",
    "user@[192.0.2.1",
    "user@[[192.0.2.1]]",
    "user@[IPv6:]",
    "user@[IPv6:2001:db8::1::2]",
    "user@[IPv6:fe80::1%eth0]",
    "user@[2001:db8::1]",  # the tag is missing; by its form a general literal with the tag "2001"
    "user@[x-:y]",
    "user@[192.0.2.1]x",
    '"user@example.com',
    '"us"er@example.com',
    '"user\\"@example.com',  # the quote is escaped
    '"us\rer"@example.com',
    '"us\\\ner"@example.com',
    "us\x00er@example.com",
    "user@example\x7f.com",
    "us\x85er@example.com",  # C1 NEXT LINE
    "us\u2028er@example.com",  # LINE SEPARATOR
    "us\u202eer@example.com",  # RIGHT-TO-LEFT OVERRIDE
    "user@exam\u00adple.com",  # SOFT HYPHEN
    "user@exam\u200bple.com",  # ZERO WIDTH SPACE
    "us\ud800er@example.com",  # a lone surrogate never came by the wire
    "user@example.com\r\nRCPT TO:<x@y>",
    "l" * 320 + "@" + DOMAIN_189 + "d",  # 511 octets: 513 as path
    "ü" * 250 + "@example.com",  # 512 octets
    "l@" + ".".join(["d" * 63] * 4) + ".d",  # 257 octets of domain
    "user@" + "l" * 64 + ".com",
    "user@[x-tag:" + "c" * 300 + "]",
]


@pytest.mark.parametrize("text", MAILBOXES)
def test_a_mailbox_is_taken_as_written(text: str) -> None:
    assert is_mailbox(text)
    assert reverse_path(f"<{text}>") == (text, len(text) + 2)
    assert forward_path(f"<{text}> NOTIFY=NEVER") == (text, len(text) + 2)
    assert reverse_path(text) == (text, len(text))


@pytest.mark.parametrize("text", NOT_MAILBOXES)
def test_what_is_no_mailbox_is_no_path(text: str) -> None:
    assert not is_mailbox(text)
    if text:
        with pytest.raises(PathSyntaxError):
            reverse_path(f"<{text}>")


def test_the_dot_of_the_root_is_dropped() -> None:
    for text in ("<user@example.com.>", "user@example.com."):
        assert reverse_path(text) == ("user@example.com", len(text))
        assert forward_path(text) == ("user@example.com", len(text))
    with pytest.raises(PathSyntaxError):
        reverse_path("user@.")


@pytest.mark.parametrize("text", ["<root>", "root", '<"a b">', "<@relay.example:root>"])
def test_a_bare_local_part_says_where_its_domain_would_stand(text: str) -> None:
    for take in (reverse_path, forward_path):
        with pytest.raises(BareLocalPart) as caught:
            take(text)
        assert text[: caught.value.local_part_end].endswith(("root", '"a b"'))


def test_a_path_that_is_too_long_is_told_from_one_that_is_none() -> None:
    with pytest.raises(PathTooLong):
        forward_path("<" + "l" * 500 + "@example.com>")
    with pytest.raises(PathTooLong):
        reverse_path("l" * 511)


@pytest.mark.parametrize(
    ("text", "mailbox"),
    [
        ("<@relay.example:user@example.com>", "user@example.com"),
        ("<@a.example,@b.example,@c:user@example.com>", "user@example.com"),
        ('<@a:"@b:c"@example.com>', '"@b:c"@example.com'),
    ],
)
def test_a_source_route_is_dropped(text: str, mailbox: str) -> None:
    assert reverse_path(text) == (mailbox, len(text))
    assert forward_path(text) == (mailbox, len(text))


@pytest.mark.parametrize(
    "text",
    [
        "<@a>",
        "<@a:>",
        "<@a,:user@example.com>",
        "<@a,b:user@example.com>",  # each hop has its own "@"
        "<@a:@b:user@example.com>",
        "<@[192.0.2.1]:user@example.com>",  # At-domain is no literal
        "@a:user@example.com",  # a route needs the brackets
        "<<user@example.com>>",
        "< user@example.com>",
        "<user@example.com >",
        "<user@example.com",
        "",
        "<",
        ">",
        "<" + "@a," * 200 + "@b:" + "user@" + DOMAIN_189[:80] + ">",  # the route counts
    ],
)
def test_what_is_no_path_is_refused(text: str) -> None:
    for take in (reverse_path, forward_path):
        with pytest.raises(PathSyntaxError):
            take(text)


def test_the_null_path_is_a_sender_and_no_recipient() -> None:
    assert reverse_path("<>") == ("", 2)
    assert reverse_path("FROM:<> SIZE=1", 5) == ("", 7)
    with pytest.raises(PathSyntaxError):
        forward_path("<>")


@pytest.mark.parametrize("name", ["Postmaster", "postmaster", "POSTMASTER"])
def test_only_the_postmaster_is_a_recipient_without_domain(name: str) -> None:
    assert forward_path(f"<{name}>") == (name, len(name) + 2)
    for text in (f"<{name}s>", "<root>", '<"postmaster">'):
        with pytest.raises(PathSyntaxError):
            forward_path(text)
    with pytest.raises(PathSyntaxError):
        reverse_path(f"<{name}>")


def test_errors_do_not_repeat_the_address() -> None:
    with pytest.raises(PathSyntaxError) as caught:
        reverse_path("<secret@secret@secret>")
    assert "secret" not in str(caught.value)


PLACES = ["{}", "{}user@example.com", "us{}er@example.com", "user{}@example.com", "user@{}example.com"]
PLACES += ["user@exam{}ple.com", "user@example.com{}", '"us{}er"@example.com', '"us\\{}er"@example.com']
PLACES += ["user@[192.0.{}2.1]", "user@[IPv6:2001:{}db8::1]", "user@[tag:{}x]", "@a{}b:user@example.com"]


@pytest.mark.parametrize("place", PLACES)
def test_no_control_character_is_taken_anywhere(place: str) -> None:
    for code in range(0x100):
        text = place.format(chr(code))
        for take in (reverse_path, forward_path):
            try:
                mailbox, end = take(f"<{text}>")
            except PathSyntaxError:
                continue
            assert is_visible(mailbox)
            assert end <= len(text) + 2


@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        ("example.com", True),
        ("localhost", True),
        ("a_b.c", True),
        ("例え.jp", True),
        ("", False),
        ("example.com.", False),
        ("exa mple", False),
        ("[192.0.2.1]", False),
        ("exam\nple", False),
        (".".join([LABEL_63] * 4), True),  # 255 octets
        (".".join([LABEL_63] * 4) + "x", False),
        (".".join(["x" * 50] * 5) + ".y", False),  # 256 octets
    ],
)
def test_domains(text: str, is_it: bool) -> None:
    assert is_domain(text) is is_it


@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        ("[192.0.2.1]", True),
        ("[IPv6:::1]", True),
        ("[tag:x]", True),
        ("192.0.2.1", False),
        ("[192.0.2.1]\n", False),
        ("[example.com]", False),
        ("[IPv6:192.0.2.1]", False),
    ],
)
def test_address_literals(text: str, is_it: bool) -> None:
    assert is_address_literal(text) is is_it


@pytest.mark.parametrize(
    ("host", "literal"),
    [
        ("192.0.2.1", "[192.0.2.1]"),
        ("::1", "[IPv6:::1]"),
        ("2001:DB8:0:0::1", "[IPv6:2001:db8::1]"),
        ("fe80::1%eth0", "[IPv6:fe80::1]"),
        ("::ffff:192.0.2.1", "[IPv6:::ffff:192.0.2.1]"),
    ],
)
def test_an_ip_address_becomes_a_literal(host: str, literal: str) -> None:
    made = address_literal(host)
    assert is_address_literal(made)
    assert made.lower() == literal.lower() or host.startswith("::ffff:")


@pytest.mark.parametrize("host", ["", "example.com", "/run/socket", "192.0.2.1\n", "[::1]"])
def test_what_is_no_ip_address_becomes_no_literal(host: str) -> None:
    with pytest.raises(ValueError):
        address_literal(host)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "a." * 500_000,
        "a" * 1_000_000 + "@",
        "user@" + "a" * 1_000_000,
        "user@" + "a-" * 500_000,
        "user@" + "a." * 500_000,
        '"' + "\\a" * 500_000,
        '"' * 1_000_000,
        "@a," * 300_000,
        "@" * 1_000_000,
        "user@[" + "a" * 1_000_000,
        "user@[" + "a-" * 500_000 + "]",
        "user@[IPv6:" + ":" * 1_000_000 + "]",
        "ü" * 500_000,
        "<" * 1_000_000,
    ],
    ids=lambda text: text[:12],
)
def test_a_hostile_megabyte_is_refused_in_one_pass(text: str) -> None:
    # One pass is milliseconds; a second look per character would be the timeout of the test run.
    assert not is_mailbox(text)
    for take in (reverse_path, forward_path):
        with pytest.raises(PathSyntaxError):
            take(f"<{text}>")


DOT_STRING = st.from_regex(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,8}(\.[A-Za-z0-9]{1,8}){0,3}", fullmatch=True)
QUOTED_STRING = st.from_regex(r'"([ !#-\[\]-~]|\\[ -~]){0,20}"', fullmatch=True)
DOMAIN = st.from_regex(r"[a-z0-9]{1,10}([.-][a-z0-9]{1,10}){0,4}", fullmatch=True)
LITERAL = st.ip_addresses().map(lambda address: address_literal(str(address)))


@given(st.one_of(DOT_STRING, QUOTED_STRING), st.one_of(DOMAIN, LITERAL), st.lists(DOMAIN, max_size=3), st.text())
def test_a_path_is_found_in_front_of_any_text(local: str, domain: str, route: list[str], behind: str) -> None:
    mailbox = f"{local}@{domain}"
    written = "<" + ",".join(f"@{hop}" for hop in route) + (":" if route else "") + mailbox + ">"
    assert reverse_path(written + behind) == (mailbox, len(written))


@given(st.text())
def test_any_text_is_a_path_or_refused(text: str) -> None:
    try:
        mailbox, end = reverse_path(text)
    except PathSyntaxError:
        return
    assert mailbox == "" or is_mailbox(mailbox)
    assert 0 < end <= len(text)
