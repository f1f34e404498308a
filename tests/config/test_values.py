"""How values are written: every kind, typed as in TOML and as text as in the environment."""

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies

from otel_smtp.config.addresses import (
    AddressPattern,
    ListenAddress,
    MailboxKind,
    NetworkKind,
    UpstreamUrlKind,
    is_local,
    is_loopback_host,
)
from otel_smtp.config.values import (
    BadValue,
    Boolean,
    Choice,
    Duration,
    FilePath,
    Given,
    Integer,
    Many,
    RateKind,
    Secret,
    SecretText,
    Size,
    Text,
    ValueKind,
    duration_text,
    size_text,
)
from otel_smtp.observing import Endpoint
from otel_smtp.smtp.states import TlsMode

OFF_TOO = Duration(may_be_off=True)
COLOURS = Choice(("red", "green"))


def typed(value: object) -> Given:
    return Given(value, "file")


def text(value: str) -> Given:
    return Given(value, "environment", is_text=True)


@pytest.mark.parametrize(
    ("kind", "given_value", "expected"),
    [
        (Integer(), typed(1), 1),
        (Integer(), text(" 50 "), 50),
        (Boolean(), typed(True), True),
        (Boolean(), text("yes"), True),
        (Boolean(), text("OFF"), False),
        (Duration(), typed(30), 30.0),
        (Duration(), typed(0.5), 0.5),
        (Duration(), typed("30s"), 30.0),
        (Duration(), typed("5m"), 300.0),
        (Duration(), typed("4h"), 14400.0),
        (Duration(), typed("5d"), 432000.0),
        (Duration(), typed("250 ms"), 0.25),
        (Duration(), typed("1.5h"), 5400.0),
        (Duration(), text("30"), 30.0),  # in the environment everything is text
        (OFF_TOO, typed("off"), None),
        (Size(), typed(1000), 1000),
        (Size(), typed("25MiB"), 25 * 1024 * 1024),
        (Size(), typed("64 KiB"), 65536),
        (Size(), typed("1.5 kib"), 1536),
        (Size(), typed("10MB"), 10_000_000),
        (Size(), text("1000"), 1000),
        (COLOURS, typed("red"), "red"),
        (Choice(tuple(TlsMode), TlsMode), typed("starttls"), TlsMode.STARTTLS),
        (Text(), typed("grüße"), "grüße"),
        (Many(Integer()), typed([1, 2]), (1, 2)),
        (Many(Integer()), text("1, 2,"), (1, 2)),
        (Many(Integer()), typed([]), ()),
        (Many(COLOURS), typed("red"), ("red",)),
        (ListenAddress(), typed("127.0.0.1:2525"), Endpoint("127.0.0.1", 2525)),
        (ListenAddress(), typed("[::1]:0"), Endpoint("::1", 0)),
        (ListenAddress(), typed("[fe80::1%eth0]:25"), Endpoint("fe80::1%eth0", 25)),
        (ListenAddress(), typed("mail.example.com:25"), Endpoint("mail.example.com", 25)),
        (ListenAddress(), typed("unix:/run/smtp.sock"), Endpoint("/run/smtp.sock")),
        (ListenAddress(may_be_off=True), typed("off"), None),
        (MailboxKind(), typed(" relay@example.com "), "relay@example.com"),
        (MailboxKind(), typed("relay@[192.0.2.1]"), "relay@[192.0.2.1]"),
        (MailboxKind(), typed(""), ""),
        (RateKind(), typed("30/m"), (30, 60.0)),
        (RateKind(), text(" 10000 / d "), (10000, 86400.0)),
        (NetworkKind(), typed("10.0.0.0/8"), ip_network("10.0.0.0/8")),
        (NetworkKind(), typed("10.1.2.3"), ip_network("10.1.2.3/32")),
        (NetworkKind(), typed("::1"), ip_network("::1/128")),
        (AddressPattern(), typed("*@example.com"), "*@example.com"),
        (AddressPattern(), typed("*"), "*"),
        (AddressPattern(), typed("<>"), ""),  # the null path, as an envelope has it
    ],
)
def test_allowed_values_are_read(kind: ValueKind, given_value: Given, expected: object) -> None:
    assert kind.parse(given_value) == expected


@pytest.mark.parametrize(
    ("kind", "given_value"),
    [
        (Integer(), typed(0)),
        (Integer(), typed(True)),  # bool is an int to Python
        (Integer(), typed(1.5)),
        (Integer(), typed("1")),  # a file has types
        (Integer(), text("many")),
        (Integer(), text("9" * 30)),
        (Boolean(), typed("true")),
        (Boolean(), typed(1)),
        (Boolean(), text("perhaps")),
        (Duration(), typed("30")),  # a forgotten unit
        (Duration(), typed("5 weeks")),
        (Duration(), typed(0)),
        (Duration(), typed(-1)),
        (Duration(), typed(True)),
        (Duration(), typed(float("inf"))),
        (Duration(), typed(float("nan"))),
        (Duration(), typed("off")),
        (Duration(), typed("400d")),
        (Size(), typed("25")),
        (Size(), typed("25 parsecs")),
        (Size(), typed(0)),
        (Size(), typed(1.5)),
        (COLOURS, typed("Red")),
        (COLOURS, typed(1)),
        (Text(), typed("")),
        (Text(), typed("a\nb")),
        (FilePath(), typed("")),
        (FilePath(), typed("a\0b")),
        (SecretText(), typed("two\nlines")),
        (SecretText(), typed("")),
        (Many(Integer()), typed("1,2")),
        (Many(COLOURS), typed("red,green")),
        (Many(Integer()), typed([1, "x"])),
        (Many(Integer(), may_be_empty=False), typed([])),
        (ListenAddress(), typed("2525")),
        (ListenAddress(), typed(":2525")),
        (ListenAddress(), typed("127.0.0.1")),
        (ListenAddress(), typed("127.0.0.1:65536")),
        (ListenAddress(), typed("127.0.0.1:-1")),
        (ListenAddress(), typed("::1:2525")),  # which colon parts the port?
        (ListenAddress(), typed("[127.0.0.1]:2525")),
        (ListenAddress(), typed("127.0.0.300:25")),
        (ListenAddress(), typed("127.1:25")),  # inet_aton would read 127.0.0.1
        (ListenAddress(), typed("a..b:25")),
        (ListenAddress(), typed("unix:")),
        (ListenAddress(), typed("unix:/" + "x" * 103)),
        (ListenAddress(), typed("off")),
        (ListenAddress(may_be_unix=False), typed("unix:/run/x")),
        (MailboxKind(), typed("relay")),
        (MailboxKind(), typed("<relay@example.com>")),
        (MailboxKind(), typed("relay@ex\u00e4mple.com")),
        (MailboxKind(), typed("Relay <relay@example.com>")),
        (RateKind(), typed("0/s")),
        (RateKind(), typed("30")),
        (RateKind(), typed(30)),
        (RateKind(), typed("1.5/s")),
        (RateKind(), typed("-1/s")),
        (RateKind(), typed("30/w")),
        (NetworkKind(), typed("10.1.2.3/8")),
        (NetworkKind(), typed("10.0.0.0/33")),
        (NetworkKind(), typed("example.com")),
        (UpstreamUrlKind(), typed("mail.example.com:25")),
        (UpstreamUrlKind(), typed("http://mail.example.com")),
        (UpstreamUrlKind(), typed("smtp://")),
        (UpstreamUrlKind(), typed("smtp://host:0")),
        (UpstreamUrlKind(), typed("smtp://host:99999")),
        (UpstreamUrlKind(), typed("smtp://host/path")),
        (UpstreamUrlKind(), typed("smtp:///run/socket")),  # only lmtp has sockets
        (UpstreamUrlKind(), typed("smtp://user:secret@host")),
        (AddressPattern(), typed("example.com")),
        (AddressPattern(), typed("@example.com")),
        (AddressPattern(), typed("a@b@c")),
        (AddressPattern(), typed("a b@c")),
        (AddressPattern(), typed("a@[192.0.2.1]")),
        (AddressPattern(), typed("")),
    ],
)
def test_other_values_are_refused(kind: ValueKind, given_value: Given) -> None:
    with pytest.raises(BadValue):
        kind.parse(given_value)
    assert kind.allowed


@pytest.mark.parametrize(
    ("url", "endpoint", "tls", "protocol", "shown"),
    [
        ("smtp://mail.example.com", Endpoint("mail.example.com", 25), TlsMode.OFF, "smtp", "smtp://mail.example.com:25"),
        ("smtp+starttls://m.example", Endpoint("m.example", 587), TlsMode.STARTTLS, "smtp", "smtp+starttls://m.example:587"),
        ("smtps://m.example/", Endpoint("m.example", 465), TlsMode.IMPLICIT, "smtp", "smtps://m.example:465"),
        ("lmtp://m.example", Endpoint("m.example", 24), TlsMode.OFF, "lmtp", "lmtp://m.example:24"),
        ("lmtp:///run/dovecot/lmtp", Endpoint("/run/dovecot/lmtp"), TlsMode.OFF, "lmtp", "lmtp:///run/dovecot/lmtp"),
        ("SMTP://[::1]:1025", Endpoint("::1", 1025), TlsMode.OFF, "smtp", "smtp://[::1]:1025"),
    ],
)  # fmt: skip
def test_upstream_urls(url: str, endpoint: Endpoint, tls: TlsMode, protocol: str, shown: str) -> None:
    parsed = UpstreamUrlKind().parse(typed(url))
    assert (parsed.endpoint, parsed.tls, parsed.protocol, str(parsed)) == (endpoint, tls, protocol, shown)


def test_a_password_in_a_url_is_refused_with_the_way_to_give_it() -> None:
    with pytest.raises(BadValue, match="password_file") as refusal:
        UpstreamUrlKind().parse(typed("smtps://user:hunter2@host"))
    assert "hunter2" not in str(refusal.value)


def test_host_bits_are_refused_with_both_readings() -> None:
    with pytest.raises(BadValue, match=r"network is 10\.0\.0\.0/8, the single address 10\.1\.2\.3"):
        NetworkKind().parse(typed("10.1.2.3/8"))


def test_a_relative_path_is_relative_to_its_file() -> None:
    assert FilePath().parse(Given("cert.pem", "f", directory=Path("/etc/gw"))) == Path("/etc/gw/cert.pem")
    assert FilePath().parse(Given("/cert.pem", "f", directory=Path("/etc/gw"))) == Path("/cert.pem")
    assert ListenAddress().parse(Given("unix:s.sock", "f", directory=Path("/run"))) == Endpoint("/run/s.sock")
    assert FilePath().parse(text("cert.pem")) == Path("cert.pem")


def test_a_secret_is_shown_only_on_purpose() -> None:
    secret: Any = SecretText().parse(typed("hunter2"))
    assert secret == Secret("hunter2")
    assert secret.reveal() == "hunter2"
    assert "hunter2" not in f"{secret} {secret!r} {[secret]} {SecretText().show(secret)}"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback_host(host) is expected
    assert is_local(Endpoint(host, 25)) is expected


def test_a_unix_socket_is_local() -> None:
    assert is_local(Endpoint("/run/x"))


@given(strategies.integers(1, 365 * 86400 * 1000).map(lambda milliseconds: milliseconds / 1000))
def test_a_duration_is_shown_as_it_can_be_written(seconds: float) -> None:
    assert Duration().parse(typed(duration_text(seconds))) == pytest.approx(seconds, rel=1e-5)


@given(strategies.integers(1, 4096 * 1024 * 1024))
def test_a_size_is_shown_as_it_can_be_written(octets: int) -> None:
    assert Size().parse(text(size_text(octets))) == octets


@given(strategies.text(max_size=40))
def test_no_text_makes_a_kind_raise_anything_else(value: str) -> None:
    kinds: list[ValueKind] = [
        Integer(), Boolean(), OFF_TOO, Size(), COLOURS, Text(), FilePath(), SecretText(), Many(Integer()),
        ListenAddress(), NetworkKind(), UpstreamUrlKind(), MailboxKind(), RateKind(), AddressPattern(),
    ]  # fmt: skip
    for kind in kinds:
        try:
            shown = kind.show(kind.parse(text(value)))
        except BadValue:
            continue
        assert isinstance(shown, str)
