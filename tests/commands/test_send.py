"""`send`: one message with the standard library's client, and what is told of it."""

import email
import email.policy
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from otel_smtp.commands.send import SendingFailed, Sent, sample_message, send_message
from otel_smtp.config import Secret, UpstreamUrl
from otel_smtp.config.values import Given, UpstreamUrlKind
from otel_smtp.smtp.replies import Reply
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript

TRACE = "0af7651916cd43dd8448eb211c80319c"
Told = list[tuple[str, int, str]]


def url(text: str) -> UpstreamUrl:
    parsed = UpstreamUrlKind().parse(Given(text, "test"))
    assert isinstance(parsed, UpstreamUrl)
    return parsed


def sent_to(where: str, told: Told, **more: object) -> Sent:
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
    assert sent_to(upstream.url, told) == Sent((), None)
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


def test_the_trace_id_is_read_out_of_the_final_reply() -> None:
    reply = Reply(250, None, (f"2.0.0 Ok trace={TRACE}",))
    with CapturingUpstream(UpstreamScript(content=(reply,))) as upstream:
        assert sent_to(upstream.url, []) == Sent((), TRACE)


def test_a_refused_recipient_is_named_and_the_others_have_it() -> None:
    refusal = Reply(550, None, ("5.1.1 unknown",))
    with CapturingUpstream(UpstreamScript(recipients={"a@example.net": refusal})) as upstream:
        sent = sent_to(upstream.url, [], recipients=["a@example.net", "b@example.net"])
        assert sent.refused == ("a@example.net",)
        with pytest.raises(SendingFailed, match=r"every recipient was refused: 550 5\.1\.1 unknown"):
            sent_to(upstream.url, [], recipients=["a@example.net"])


def test_a_final_refusal_reports_the_reply() -> None:
    with (
        CapturingUpstream(UpstreamScript(content=(Reply(451, None, ("4.3.0 later",)),))) as upstream,
        pytest.raises(SendingFailed, match=r"the message was refused: 451 4\.3\.0 later"),
    ):
        sent_to(upstream.url, [])


def test_a_server_that_is_away() -> None:
    with pytest.raises(SendingFailed, match=r"connecting to smtp://127\.0\.0\.1:1 failed: .*refused"):
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
        with pytest.raises(SendingFailed, match=r"STARTTLS failed: .*CERTIFICATE_VERIFY_FAILED"):
            sent_to(where, [])
    with CapturingUpstream() as upstream, pytest.raises(SendingFailed, match=r"STARTTLS failed: .*not supported"):
        sent_to(f"smtp+starttls://127.0.0.1:{upstream.port}", [])


def test_implicit_tls(tmp_path: Path) -> None:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    with CapturingUpstream(tls=context, is_implicit_tls=True) as upstream:
        assert sent_to(f"smtps://127.0.0.1:{upstream.port}", [], ca_file=str(tmp_path / "ca.pem")) == Sent((), None)


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
