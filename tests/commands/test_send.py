"""`send`: one message with the standard library's client, and what is reported of it."""

import email
import email.policy
import json
import socketserver
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from click.testing import CliRunner

from otel_smtp.commands.send import SendingFailed, own_listener, sample_message, send, send_message
from otel_smtp.config import Secret, UpstreamUrl, load
from otel_smtp.config.addresses import UpstreamUrlKind
from otel_smtp.config.values import Given
from otel_smtp.smtp.replies import Reply
from tests.commands.test_cli import run
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript

TRACE = "0af7651916cd43dd8448eb211c80319c"
Told = list[tuple[str, int, str]]


def url(text: str) -> UpstreamUrl:
    parsed = UpstreamUrlKind().parse(Given(text, "test"))
    assert isinstance(parsed, UpstreamUrl)
    return parsed


def sent_to(where: str, told: Told, **more: object) -> tuple[str, ...]:
    arguments: dict[str, object] = {
        "sender": "me@example.org",
        "recipients": ["you@example.net"],
        "content": b"Subject: x\n\nHello\n",
        "on_exchange": lambda *exchange: told.append(exchange),
        "timeout": 10.0,
    }
    return send_message(url(where), **{**arguments, **more})  # type: ignore[arg-type]  # as each test wants them


@pytest.fixture
def upstream() -> Iterator[CapturingUpstream]:
    with CapturingUpstream() as upstream:
        yield upstream


def test_every_exchange_is_reported_and_the_message_arrives(upstream: CapturingUpstream) -> None:
    told: Told = []
    assert sent_to(upstream.url, told) == ()
    # As it was sent: smtplib says FROM: and TO:, or from: and to:, by its version.
    said = [line.split(" size=")[0].replace(" from:", " FROM:").replace(" to:", " TO:") for line, _, _ in told]
    assert list(zip(said, [code for _, code, _ in told], strict=True)) == [
        ("connect", 220),
        ("EHLO " + told[1][0].split(" ", 1)[1], 250),
        ("MAIL FROM:<me@example.org>", 250),
        ("RCPT TO:<you@example.net>", 250),
        ("DATA", 354),
        ("(content)", 250),
        ("QUIT", 221),
    ]
    (message,) = upstream.wait_for_messages(1)
    assert message.content == b"Subject: x\r\n\r\nHello\r\n"
    assert upstream.violations == []


def test_a_refused_recipient_is_named_and_the_others_have_it() -> None:
    refusal = Reply(550, None, ("5.1.1 unknown",))
    with CapturingUpstream(UpstreamScript(recipients={"a@example.net": refusal})) as upstream:
        refused = sent_to(upstream.url, [], recipients=["a@example.net", "b@example.net"])
        assert refused == ("a@example.net",)
        with pytest.raises(SendingFailed, match=r"every recipient was refused: 550 5\.1\.1 unknown"):
            sent_to(upstream.url, [], recipients=["a@example.net"])


def test_a_final_refusal_reports_the_reply() -> None:
    with (
        CapturingUpstream(UpstreamScript(content=(Reply(451, None, ("4.3.0 later",)),))) as upstream,
        pytest.raises(SendingFailed, match=r"the message was refused: 451 4\.3\.0 later"),
    ):
        sent_to(upstream.url, [])


def test_a_server_that_is_away() -> None:
    with pytest.raises(SendingFailed, match=r"^connecting to smtp://127\.0\.0\.1:1 failed: connection refused$"):
        sent_to("smtp://127.0.0.1:1", [])


def test_starttls_is_required_and_verified(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    with CapturingUpstream(tls=context) as upstream:
        where = f"smtp+starttls://127.0.0.1:{upstream.port}"
        told: Told = []
        sent_to(where, told, ca_file=str(tmp_path / "ca.pem"))
        assert [said.split(" ")[0] for said, _, _ in told] == [
            "connect", "EHLO", "STARTTLS", "EHLO", "MAIL", "RCPT", "DATA", "(content)", "QUIT",
        ]  # fmt: skip
        with pytest.raises(SendingFailed, match=r"STARTTLS failed: the certificate is not trusted: .*certificate"):
            sent_to(where, [])
    with CapturingUpstream() as upstream, pytest.raises(SendingFailed, match=r"STARTTLS failed: .*not supported"):
        sent_to(f"smtp+starttls://127.0.0.1:{upstream.port}", [])


def test_implicit_tls(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    with CapturingUpstream(tls=context, is_implicit_tls=True) as upstream:
        assert sent_to(f"smtps://127.0.0.1:{upstream.port}", [], ca_file=str(tmp_path / "ca.pem")) == ()


def test_tls_that_the_server_does_not_speak() -> None:
    with CapturingUpstream() as upstream, pytest.raises(SendingFailed, match=r"failed: TLS: wrong version number"):
        sent_to(f"smtps://127.0.0.1:{upstream.port}", [])


class RefusesPasswords(socketserver.StreamRequestHandler):
    """A server that offers two mechanisms and knows no password."""

    def handle(self) -> None:
        self.wfile.write(b"220 refusing.example\r\n")
        while line := self.rfile.readline():
            verb = line[:4].upper()
            known = {
                b"EHLO": b"250-refusing.example\r\n250 AUTH LOGIN PLAIN",
                b"AUTH": b"535 5.7.8 no",
                b"QUIT": b"221 bye",
            }
            self.wfile.write(known.get(verb, b"250 ok") + b"\r\n")
            if verb == b"QUIT":
                return


def test_a_refused_password_is_tried_once() -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), RefusesPasswords) as server:
        serving = threading.Thread(target=server.handle_request)
        serving.start()
        told: Told = []
        with pytest.raises(SendingFailed, match=r"AUTH was refused: 535 5\.7\.8 no"):
            sent_to(f"smtp://127.0.0.1:{server.server_address[1]}", told, user="me", password=Secret("wrong"))
        serving.join()
    assert [said for said, _, _ in told if said.startswith("AUTH")] == ["AUTH PLAIN"]


def test_a_mechanism_that_we_lack_is_named() -> None:
    told = "AUTH failed: the gateway offers GSSAPI, NTLM, not PLAIN or LOGIN"
    with CapturingUpstream(keywords=("AUTH GSSAPI NTLM",)) as upstream, pytest.raises(SendingFailed, match=told):
        sent_to(upstream.url, [], user="me", password=Secret("x"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--to", "you"), '--to = "you": allowed: an address'),
        (("--to", "a@b@c"), '--to = "a@b@c"'),
        (("--to", ""), '--to = "": '),
        (("--to", "you@example.net", "--from", "me at example.org"), '--from = "me at example.org"'),
    ],
)
def test_an_address_that_is_none_is_refused_before_anything_is_sent(arguments: tuple[str, ...], told: str) -> None:
    result = run("send", "127.0.0.1:1", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert told in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--starttls smtp://127.0.0.1:1", "--starttls: contradicts smtp://127.0.0.1:1"),
        ("--starttls smtps://127.0.0.1:1", "--starttls: contradicts smtps://127.0.0.1:1"),
        ("--ca-file missing", "--ca-file: has no effect with smtp://127.0.0.1:2525"),
        ("--ca-file missing --starttls", "--ca-file: cannot read missing: no such file or directory"),
        ("--ca-file text smtps://127.0.0.1:1", "--ca-file: text holds no certificate in PEM"),
        ("--user me", "--user: needs --password-file"),
        ("--password-file text", "--password-file: needs --user"),
        ("--user me --password-file missing", "--password-file: cannot read missing: no such file or directory"),
        ("--user me --password-file empty", "--password-file: the first line of empty is no password"),
        ("--user me --password-file latin1", "--password-file: the first line of latin1 is no password"),
        ("--file missing", "--file: cannot read missing: no such file or directory"),
        ("--file text --size 1KiB", "--size: contradicts --file"),
        ("smtp://me:hunter2@127.0.0.1:1", 'GATEWAY = "***": logs and process lists show URLs'),
        ("--timeout 0", '--timeout = "0": allowed: seconds'),
        ("--timeout -1", '--timeout = "-1": allowed: seconds'),
        ("--timeout nan", '--timeout = "nan": allowed: seconds'),
    ],
)
def test_wrong_use_is_explained(arguments: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, octets in (("empty", b""), ("latin1", b"p\xe4ss\n"), ("text", b"hello\n")):
        (tmp_path / name).write_bytes(octets)
    result = CliRunner().invoke(send, ["--to", "you@example.net", *arguments.split()])
    assert (result.exit_code, told in result.output) == (2, True), result.output


def test_starttls_is_that_of_the_url_or_of_the_option(upstream: CapturingUpstream) -> None:
    for where in (f"127.0.0.1:{upstream.port}", f"smtp+starttls://127.0.0.1:{upstream.port}"):
        result = CliRunner().invoke(send, ["--to", "you@example.net", "--starttls", where])
        assert (result.exit_code, "STARTTLS failed" in result.output) == (1, True)
    assert upstream.messages == []


def test_for_machines_it_is_one_line() -> None:
    reply = Reply(250, None, (f"2.0.0 Ok trace={TRACE}",))
    with CapturingUpstream(UpstreamScript(content=(reply,))) as upstream:
        result = run("send", upstream.url, "--from", "", "--to", "you@example.net", "--json")
    assert result.returncode == 0
    told = json.loads(result.stdout)
    assert (told["is_accepted"], told["refused"], told["trace_id"], told["failure"]) == (True, [], TRACE, None)
    assert [(one["sent"].split(" ")[0], one["code"]) for one in told["exchanges"]][-2:] == [
        ("(content)", 250),
        ("QUIT", 221),
    ]
    refusal = Reply(550, None, (f"5.1.1 unknown trace={TRACE}",))
    with CapturingUpstream(UpstreamScript(recipients={"you@example.net": refusal})) as upstream:
        result = run("send", upstream.url, "--to", "you@example.net", "--json")
    assert result.returncode == 1
    told = json.loads(result.stdout)
    assert (told["is_accepted"], told["trace_id"]) == (False, TRACE)
    result = run("send", "127.0.0.1:1", "--to", "you@example.net", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["refused"] == ["you@example.net"]
    assert "connecting to smtp://127.0.0.1:1 failed" in json.loads(result.stdout)["failure"]


def test_credentials_are_never_reported() -> None:
    with CapturingUpstream(keywords=("AUTH PLAIN LOGIN",)) as upstream:
        told: Told = []
        sent_to(upstream.url, told, user="me", password=Secret("hunter2"))
        assert told[2][0] == "AUTH PLAIN"
        assert "hunter2" not in repr(told)
        assert "AG1lAGh1bnRlcjI=" not in repr(told)  # PLAIN of the two


@pytest.mark.parametrize("octets", [0, 1, 10_000, 1_000_001])
def test_a_sample_is_a_message_of_at_least_the_wanted_size(octets: int) -> None:
    content = sample_message(sender="", recipients=["a@example.net", "b@example.net"], octets=octets)
    on_the_wire = len(content) + content.count(b"\n")
    assert octets <= on_the_wire <= octets + 700
    message = email.message_from_bytes(content, policy=email.policy.default)
    assert message["To"] == "a@example.net, b@example.net"
    assert message["From"]
    assert message.defects == []


# Where it goes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listeners", "expected"),
    [
        ([{"address": ["127.0.0.1:12525", "[::1]:12525"]}], "127.0.0.1:12525"),
        ([{"address": ["0.0.0.0:12525"], "allow": ["10.0.0.0/8"]}], "127.0.0.1:12525"),
        ([{"address": ["[::]:12525"], "allow": ["10.0.0.0/8"]}], "[::1]:12525"),
        ([{"address": ["unix:gw", "127.0.0.1:0", "127.0.0.1:3"]}], "127.0.0.1:3"),
        ([{"name": "a", "tls": "implicit"}, {"name": "b", "address": ["127.0.0.1:4"]}], "127.0.0.1:4"),
        ([{"name": "a", "tls": "starttls", "address": ["127.0.0.1:5"]}], "127.0.0.1:5"),
        ([{"name": "a", "tls": "starttls", "tls_required": True}], None),
        ([{"protocol": "lmtp"}], None),
        (None, "127.0.0.1:2525"),
    ],
)
def test_without_a_gateway_it_is_that_of_the_settings(
    listeners: list[dict[str, object]] | None, expected: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"tls_cert": __file__, "tls_key": __file__}
    tables = [one | (keys if "tls" in one else {}) for one in listeners or ()]
    settings = load(values={"listener": tables} if tables else {}, needs_upstream=False)
    if expected is not None:
        assert own_listener(settings) == expected
        return
    with pytest.raises(SystemExit, match="2"):
        own_listener(settings)
    assert "GATEWAY is missing: no listener" in capsys.readouterr().err


def test_the_gateway_of_the_settings_gets_the_mail(upstream: CapturingUpstream) -> None:
    address = upstream.url.removeprefix("smtp://")
    result = run("send", "--to", "you@example.net", "--set", f"listener.0.address={address}")
    assert result.returncode == 0, result.stderr
    (message,) = upstream.wait_for_messages(1)
    assert message.recipients == ("you@example.net",)


# Addresses beyond ASCII ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["bücher@example.net", "you@bücher.example"])
def test_an_address_beyond_ascii_asks_for_smtputf8(address: str, upstream: CapturingUpstream) -> None:
    result = run("send", upstream.url, "--from", "ä@example.org", "--to", address)
    assert result.returncode == 0, result.stderr
    assert f"rcpt to:<{address}>" in result.stdout.lower()  # in what case, depends on the version of smtplib
    (message,) = upstream.wait_for_messages(1)
    assert message.recipients == (address,)
    assert "SMTPUTF8" in message.mail_parameters
    assert f"To: {address}\r\n".encode() in message.content


def test_without_smtputf8_such_an_address_is_told_to_be_impossible() -> None:
    with CapturingUpstream(keywords=("8BITMIME",)) as plain:
        result = run("send", plain.url, "--to", "bücher@example.net")
        assert result.returncode == 1
        assert result.stderr == "otel-smtp: the message failed: SMTPUTF8 not supported by server\n"
