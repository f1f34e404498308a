"""The instrumentation of `smtplib`: what each way of sending leaves in the trace, and on the wire."""

import contextlib
import logging
import logging.handlers
import smtplib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from email.message import EmailMessage
from typing import Any, Final

import pytest
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import StatusCode

from otel_smtp.client.smtplib_instrumentor import SmtplibInstrumentor
from tests.client.conftest import (
    ANN,
    BOB,
    MESSAGE,
    SENDER,
    Instrument,
    Spans,
    check_relayed,
    hanging_up,
    named_by,
    saying_yes,
    traceparent,
)
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript, scripted_reply

_NO_USER: Final = scripted_reply("550 5.1.1 No such user")
_LATER: Final = scripted_reply("451 4.2.0 Greylisted")


def email(**fields: str) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = SENDER, BOB, "x"
    for name, value in fields.items():
        message[name] = value
    message.set_content("Hello\n")
    return message


def by_send_message(client: smtplib.SMTP) -> object:
    return client.send_message(email())


def by_sendmail_bytes(client: smtplib.SMTP) -> object:
    return client.sendmail(SENDER, [BOB], MESSAGE)


def by_sendmail_str(client: smtplib.SMTP) -> object:
    return client.sendmail(SENDER, BOB, MESSAGE.decode().replace("\r\n", "\n"))


def by_keywords(client: smtplib.SMTP) -> object:
    return client.sendmail(msg=MESSAGE, to_addrs=[BOB], from_addr=SENDER)


def by_commands(client: smtplib.SMTP) -> object:
    client.ehlo()
    client.mail(SENDER)
    client.rcpt(BOB)
    return client.data(MESSAGE)


WAYS = [by_send_message, by_sendmail_bytes, by_sendmail_str, by_keywords, by_commands]


@pytest.mark.parametrize("send", WAYS)
def test_each_way_of_sending_gives_one_span_and_one_header(
    send: Callable[[smtplib.SMTP], object], server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP("localhost", server.port) as client, spans.tracer.start_as_current_span("request") as request:
        send(client)
    check_relayed(server, spans, request)


@pytest.mark.parametrize("send", WAYS)
def test_but_for_the_header_nothing_is_sent_otherwise(
    send: Callable[[smtplib.SMTP], object], server: CapturingUpstream, instrument: Instrument
) -> None:
    def sent() -> tuple[list[bytes], object]:
        with smtplib.SMTP("localhost", server.port, local_hostname="client.example") as client:
            result = send(client)
        server.wait_for(lambda: server.connections[-1].is_over or None)
        octets = b"".join(data for side, data in server.connections[-1].wire if side == "C")
        header = next((line for line in octets.splitlines(keepends=True) if line.startswith(b"traceparent")), b"")
        size = b"size=%d" % len(server.messages[-1].content)
        return [octets.replace(header, b"", 1).replace(size, b"size=N")], result

    plain = sent()
    instrument()
    assert sent() == plain
    assert traceparent(server.messages[0].content) is None
    assert traceparent(server.messages[1].content) is not None


@pytest.mark.parametrize(
    "content",
    [
        b"Traceparent: 00-%b-%b-01\r\nSubject: x\r\n\r\nHello\r\n" % (b"a" * 32, b"b" * 16),
        b"Subject: x\r\ntraceparent : of somebody\r\n\r\nHello\r\n",
        b"Subject: x\r\ntracestate: vendor=a1\r\n\r\nHello\r\n",
        b"DKIM-Signature: v=1; a=rsa-sha256\r\nSubject: x\r\n\r\nHello\r\n",
        b"Subject: x\r\nARC-Seal: i=1\r\n\r\nHello\r\n",
        b"A body without a header block\r\n",
        b"\r\nA body below an empty header block\r\n",
        b"From somebody Sat Nov 28 10:00:00 2026\r\nSubject: an mbox line is no field\r\n\r\nHello\r\n",
    ],
)
def test_a_message_that_has_no_place_for_the_header_is_left_as_it_is(
    content: bytes, server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        client.sendmail(SENDER, [BOB], content)
        client.sendmail(SENDER, [BOB], content.decode())
    assert [message.content for message in server.messages] == [content, content]
    is_signed = content.startswith(b"DKIM") or b"ARC" in content
    assert len(spans.finished) == 2
    assert [(span.attributes or {}).get("smtp.message.signed") for span in spans.finished] == [is_signed or None] * 2


@pytest.mark.parametrize(
    ("content", "expected_end"),
    [
        (b"Subject: x\r\n\r\ntraceparent: in the body\r\ndkim-signature: too\r\n", b""),
        (b"Subject: x\r\n", b""),  # no body
        (b"Subject: folded\r\n traceparent: is no field\r\n\r\nx\r\n", b""),
        (b"X-Traceparent: another field\r\n\r\nx\r\n", b""),
    ],
)
def test_what_only_looks_like_a_reason_is_none(
    content: bytes, expected_end: bytes, server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        client.sendmail(SENDER, [BOB], content)
    (message,) = server.messages
    assert message.content == f"traceparent: {named_by(spans.only)}\r\n".encode() + content


def test_a_signed_message_is_linked_by_the_trace_that_the_gateway_answers_with(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    server.say(UpstreamScript(content=(scripted_reply(f"250 2.0.0 Ok trace={'ab' * 16}"),)))
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        client.sendmail(SENDER, [BOB], b"DKIM-Signature: v=1\r\nSubject: x\r\n\r\nHello\r\n")
    attributes = spans.only.attributes or {}
    assert (attributes["smtp.message.signed"], attributes["smtp.reply.trace_id"]) == (True, "ab" * 16)


def test_a_partial_refusal_tells_who_and_why(server: CapturingUpstream, spans: Spans, instrument: Instrument) -> None:
    instrument()
    later, never = scripted_reply("451 4.2.0 <ann@there.example> greylisted"), scripted_reply("550 5.1.1 No such user")
    server.say(UpstreamScript(recipients={ANN: later, "x@other.example": never}))
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        refused = client.sendmail(SENDER, [ANN, "x@other.example", BOB], MESSAGE)
    assert {address: code for address, (code, _) in refused.items()} == {ANN: 451, "x@other.example": 550}
    span = spans.only
    attributes = span.attributes or {}
    assert attributes["smtp.outcome"] == "partly_relayed"
    assert attributes["smtp.reply.code"] == 250
    counts = [
        attributes[f"smtp.transaction.{name}"]
        for name in ("recipient_count", "recipients_refused", "recipients_deferred")
    ]
    assert counts == [1, 1, 1]
    assert attributes["smtp.rcpt.domains"] == ("there.example", "other.example")
    assert "smtp.rcpt.domain" not in attributes
    assert (span.status.status_code, attributes["error.type"]) == (StatusCode.ERROR, "451")
    assert [(event.name, dict(event.attributes or {})) for event in span.events] == [
        (
            "smtp.recipient",
            {
                "smtp.recipient.fate": "deferred",
                "smtp.rcpt.domain": "there.example",
                "smtp.reply.code": 451,
                "smtp.reply.enhanced_code": "4.2.0",
                "smtp.reply.text": "<...@there.example> greylisted",
            },
        ),
        (
            "smtp.recipient",
            {
                "smtp.recipient.fate": "refused",
                "smtp.rcpt.domain": "other.example",
                "smtp.reply.code": 550,
                "smtp.reply.enhanced_code": "5.1.1",
                "smtp.reply.text": "No such user",
            },
        ),
    ]


def test_of_many_refused_recipients_the_first_are_events_and_all_are_counted(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    refused = [f"{number}@there.example" for number in range(60)]
    server.say(UpstreamScript(recipients=dict.fromkeys(refused, _NO_USER)))
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        client.sendmail(SENDER, [*refused, BOB], MESSAGE)
    assert len(spans.only.events) == 50
    assert (spans.only.attributes or {})["smtp.transaction.recipients_refused"] == 60


def test_a_message_that_is_sent_by_commands_begins_with_the_first_of_them(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        client.ehlo()
        client.mail(SENDER)
        began = time.time_ns()
        client.rcpt(BOB)
        client.data(MESSAGE)
    assert spans.only.start_time is not None
    assert spans.only.start_time < began


def test_a_client_that_sends_within_anothers_sending_has_a_span_of_its_own(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    class Copying(smtplib.SMTP):
        """Sends a copy by another connection in the middle of its own transaction."""

        def rcpt(self, *args: Any, **kwargs: Any) -> Any:
            with smtplib.SMTP("127.0.0.1", server.port) as other:
                other.ehlo()
                other.mail(SENDER)
                other.rcpt(ANN)
                other.data(MESSAGE)
            return super().rcpt(*args, **kwargs)

    instrument()
    with Copying("127.0.0.1", server.port) as client:
        client.sendmail(SENDER, [BOB], MESSAGE)
    inner, outer = spans.finished
    assert inner.parent is not None
    assert outer.context is not None
    assert inner.parent.span_id == outer.context.span_id
    assert [traceparent(message.content) for message in server.messages] == [named_by(inner), named_by(outer)]
    assert {(span.attributes or {})["smtp.transaction.recipient_count"] for span in spans.finished} == {1}


def test_the_servers_name_is_what_the_application_called_it(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP(f"localhost:{server.port}") as client:
        client.sendmail(SENDER, [BOB], MESSAGE)
    attributes = spans.only.attributes or {}
    assert (attributes["server.address"], attributes["server.port"]) == ("localhost", server.port)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_the_servers_name_may_be_an_ipv6_address(spans: Spans, instrument: Instrument) -> None:
    instrument()
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listening:
        port = listening.getsockname()[1]
        with saying_yes(listening, until=b"QUIT"), smtplib.SMTP("0:0:0:0:0:0:0:1", port) as client:
            client.sendmail(SENDER, [BOB], MESSAGE)
    attributes = spans.only.attributes or {}
    assert (attributes["server.address"], attributes["network.peer.address"]) == ("0:0:0:0:0:0:0:1", "::1")
    assert attributes["server.port"] == port


def test_a_connection_that_was_made_before_is_named_by_its_address(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    with smtplib.SMTP("localhost", server.port) as client:
        instrument()
        client.sendmail(SENDER, [BOB], MESSAGE)
    attributes = spans.only.attributes or {}
    assert (attributes["server.address"], attributes["server.port"]) == ("127.0.0.1", server.port)


def test_a_message_on_a_dead_connection_has_its_span(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP("localhost", server.port) as client:
        assert client.sock is not None
        client.ehlo()
        connected, client.sock = client.sock, socket.socket()
        with contextlib.closing(connected), pytest.raises(smtplib.SMTPServerDisconnected):
            client.sendmail(SENDER, [BOB], MESSAGE)
    attributes = spans.only.attributes or {}
    assert (attributes["server.address"], attributes["smtp.outcome"]) == ("localhost", "aborted")
    assert not {"network.peer.address", "smtp.rcpt.domains"} & {*attributes}


@pytest.mark.parametrize(
    ("script", "error", "outcome", "description"),
    [
        ({"recipients": {BOB: _NO_USER}}, smtplib.SMTPRecipientsRefused, "refused", "550 5.1.1"),
        ({"recipients": {BOB: _LATER}}, smtplib.SMTPRecipientsRefused, "deferred", "451 4.2.0"),
        ({"recipients": {BOB: _NO_USER, ANN: _LATER}}, smtplib.SMTPRecipientsRefused, "deferred", "451 4.2.0"),
        ({"mail": (scripted_reply("553 5.1.7 no"),)}, smtplib.SMTPSenderRefused, "refused", "553 5.1.7"),
        ({"content": (scripted_reply("554 spam"),)}, smtplib.SMTPDataError, "refused", "554"),
        ({"content": (scripted_reply("452 4.3.1 full"),)}, smtplib.SMTPDataError, "deferred", "452 4.3.1"),
    ],
)
def test_a_refusal_is_the_applications_exception_and_the_spans_error(
    script: dict[str, Any],
    error: type[Exception],
    outcome: str,
    description: str,
    server: CapturingUpstream,
    spans: Spans,
    instrument: Instrument,
) -> None:
    instrument()
    server.say(UpstreamScript(**script))
    with smtplib.SMTP("127.0.0.1", server.port) as client, pytest.raises(error):
        client.sendmail(SENDER, list(script.get("recipients", [BOB])), MESSAGE)
    span = spans.only
    attributes = span.attributes or {}
    code = description.split()[0]
    assert (attributes["smtp.outcome"], attributes["error.type"]) == (outcome, code)
    assert attributes["smtp.reply.code"] == int(code)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, description)
    assert span.end_time is not None
    assert not any(event.name == "exception" for event in span.events), "an exception's text holds addresses"


@pytest.mark.parametrize(
    ("at", "outcome"), [(b"EHLO", "aborted"), (b"MAIL", "aborted"), (b"RCPT", "aborted"), (b".\r\n", "unknown")]
)
def test_a_lost_connection_is_told_by_how_far_the_message_came(
    at: bytes, outcome: str, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with hanging_up(at) as port:
        client = smtplib.SMTP("127.0.0.1", port)
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.sendmail(SENDER, [BOB], MESSAGE)
    attributes = spans.only.attributes or {}
    assert attributes["smtp.outcome"] == outcome
    assert attributes["error.type"] == "smtplib.SMTPServerDisconnected"
    assert attributes["smtp.failure.reason"] == "Connection unexpectedly closed"
    assert attributes["server.address"] == "127.0.0.1"
    assert "smtp.reply.code" not in attributes


def test_a_message_that_smtplib_itself_refuses_is_refused_as_before(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        with pytest.raises(UnicodeEncodeError):
            client.sendmail(SENDER, [BOB], "Subject: ü\r\n\r\nx\r\n")
        with pytest.raises(TypeError):
            client.sendmail(SENDER, [BOB])  # type: ignore[call-arg]
    assert [(span.attributes or {})["error.type"] for span in spans.finished] == ["UnicodeEncodeError", "TypeError"]
    assert not any("smtp.failure.reason" in (span.attributes or {}) for span in spans.finished), "it quotes the message"


@pytest.mark.parametrize(
    ("addresses", "shown", "text"),
    [
        ("none", {}, "... is full"),
        ("domain", {"smtp.rcpt.domain": "there.example"}, "...@there.example is full"),
        ("full", {"smtp.rcpt.domain": "there.example", "smtp.rcpt.address": BOB}, "bob@there.example is full"),
    ],
)
def test_mailboxes_are_shown_as_far_as_is_wanted(
    addresses: str, shown: dict[str, str], text: str, server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument(addresses=addresses)
    server.say(UpstreamScript(recipients={BOB: scripted_reply("452 4.2.2 bob@there.example is full")}))
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        client.sendmail(SENDER, [BOB, ANN], MESSAGE)
    (event,) = spans.only.events
    attributes = dict(event.attributes or {})
    assert attributes["smtp.reply.text"] == text
    assert {name: value for name, value in attributes.items() if name.startswith("smtp.rcpt")} == shown
    everything = f"{spans.only.to_json()}"
    assert ("bob@" in everything, "ann@" in everything, "news@" in everything) == ((addresses == "full",) * 3)
    assert ("shop.example" in everything) == (addresses != "none")


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("552 5.2.2 bob%40there.example is full", "... is full"),
        ('554 5.7.1 Message "Your bill of May" looks like spam', 'Message "..." looks like spam'),
        ("550 5.1.1 User bob unknown", "User ... unknown"),
        ("451 4.3.2 See https://provider.example/help?mail=bob", "See https://provider.example/help?..."),
        ("421 4.7.0 192.0.2.7 sends too much, id 4XyZ12", "192.0.2.7 sends too much, id 4XyZ12"),
    ],
)
def test_of_a_servers_words_only_what_names_nobody_is_shown(
    said: str, shown: str, server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    server.say(UpstreamScript(recipients={BOB: scripted_reply(said)}))
    with smtplib.SMTP("127.0.0.1", server.port) as client, contextlib.suppress(smtplib.SMTPException):
        client.sendmail(SENDER, [BOB], MESSAGE)
    (event,) = spans.only.events
    assert (event.attributes or {})["smtp.reply.text"] == shown


@pytest.mark.parametrize(
    ("address", "domain"),
    [
        ("bob@There.Example", "there.example"),
        ("Bob <bob@there.example>", "there.example"),
        ("bob@there.example (a comment)", "there.example"),
        ('"bob@home"@there.example', "there.example"),
        ("bob@[192.0.2.7]", "[192.0.2.7]"),
    ],
)
def test_of_an_address_only_the_domain_is_shown(
    address: str, domain: str, server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP("127.0.0.1", server.port) as client, contextlib.suppress(smtplib.SMTPException):
        client.sendmail(SENDER, [address], MESSAGE)
    assert (spans.only.attributes or {})["smtp.rcpt.domains"] == (domain,)


def test_an_environment_variable_says_the_same(
    monkeypatch: pytest.MonkeyPatch, server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    monkeypatch.setenv("OTEL_PYTHON_SMTP_ADDRESSES", "Full")
    instrument()
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        client.sendmail(SENDER, [BOB], MESSAGE)
    assert (spans.only.attributes or {})["smtp.mail.from.address"] == SENDER


def test_a_value_that_cannot_be_followed_is_warned_about(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spans: Spans,
    instrument: Instrument,
    server: CapturingUpstream,
) -> None:
    monkeypatch.setenv("OTEL_PYTHON_SMTP_ADDRESSES", "some")
    with caplog.at_level(logging.WARNING):
        instrument()
    assert "'some'" in caplog.text
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        client.sendmail(SENDER, [BOB], MESSAGE)
    assert (spans.only.attributes or {})["smtp.rcpt.domain"] == "there.example"


def test_what_is_suppressed_is_neither_traced_nor_touched(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP("127.0.0.1", server.port) as client, suppress_instrumentation():
        by_sendmail_bytes(client)
        by_commands(client)
    assert [message.content for message in server.messages] == [MESSAGE, MESSAGE]
    assert spans.finished == []


def test_uninstrumented_smtplib_is_what_it_was(server: CapturingUpstream, spans: Spans) -> None:
    before = dict(vars(smtplib.SMTP))
    SmtplibInstrumentor().instrument(tracer_provider=spans.provider)
    assert dict(vars(smtplib.SMTP)) != before
    SmtplibInstrumentor().uninstrument()
    assert dict(vars(smtplib.SMTP)) == before
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        by_sendmail_bytes(client)
    assert server.messages[0].content == MESSAGE
    assert spans.finished == []


def test_several_messages_of_one_connection_have_a_span_each(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        for send in WAYS:
            send(client)
            client.rset()
        client.mail(SENDER)
        client.rset()  # given up: no message, no span
        by_sendmail_bytes(client)
    assert [traceparent(message.content) for message in server.messages] == [named_by(span) for span in spans.finished]
    assert len({named_by(span) for span in spans.finished}) == len(WAYS) + 1
    assert {(span.attributes or {})["smtp.transaction.recipient_count"] for span in spans.finished} == {1}


def test_threads_do_not_mix_their_messages(server: CapturingUpstream, spans: Spans, instrument: Instrument) -> None:
    instrument()
    problems: list[object] = []

    def send(number: int) -> None:
        with smtplib.SMTP("127.0.0.1", server.port) as client, spans.tracer.start_as_current_span(f"task {number}"):
            for _ in range(5):
                problems.extend(client.sendmail(SENDER, [f"x@{number}.example"] * (number + 1), MESSAGE).items())

    threads = [threading.Thread(target=send, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert problems == []
    by_name = {named_by(span): span for span in spans.finished}
    assert len(server.messages) == 30
    for message in server.messages:
        span = by_name[traceparent(message.content) or ""]
        assert (span.attributes or {})["smtp.rcpt.domain"] == message.recipients[0].partition("@")[2]
        assert (span.attributes or {})["smtp.transaction.recipient_count"] == len(message.recipients)
        task = next(
            one for one in spans.finished if one.context and span.parent and one.context.span_id == span.parent.span_id
        )
        assert task.name == f"task {len(message.recipients) - 1}"


def test_without_an_sdk_the_applications_own_span_goes_with_the_message(server: CapturingUpstream) -> None:
    program = (
        "import smtplib, sys\n"
        "from opentelemetry import trace\n"
        "from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags\n"
        "from otel_smtp.client.smtplib_instrumentor import SmtplibInstrumentor\n"
        "SmtplibInstrumentor().instrument()\n"
        f"client = smtplib.SMTP('127.0.0.1', {server.port})\n"
        "client.sendmail('a@a.example', ['b@b.example'], b'Subject: x\\r\\n\\r\\nx\\r\\n')\n"
        "with trace.use_span(NonRecordingSpan(SpanContext(1, 2, False, TraceFlags(1)))):\n"
        "    client.sendmail('a@a.example', ['b@b.example'], b'Subject: x\\r\\n\\r\\nx\\r\\n')\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert [traceparent(one.content) for one in server.messages] == [None, f"00-{1:032x}-{2:016x}-01"]


class Broken(SpanProcessor):
    """A processor with a bug."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("on_start")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("on_end")


def test_a_bug_of_the_tracing_costs_no_mail(
    server: CapturingUpstream, spans: Spans, instrument: Instrument, caplog: pytest.LogCaptureFixture
) -> None:
    instrument()
    spans.provider.add_span_processor(Broken())
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        for send in WAYS:
            send(client)
            client.rset()
    assert len(server.messages) == len(WAYS)
    assert [record.levelname for record in caplog.records if "not traced in full" in record.message] == ["WARNING"]


def test_a_log_handler_that_sends_mail_does_not_report_its_own_mail(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    spans.provider.add_span_processor(Broken())
    handler = logging.handlers.SMTPHandler(("127.0.0.1", server.port), SENDER, [ANN], "a fault")
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("otel_smtp.client")
    logger.addHandler(handler)
    try:
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            by_sendmail_bytes(client)
    finally:
        logger.removeHandler(handler)
    assert sorted(message.recipients[0] for message in server.messages) == [ANN, BOB]


class BrokenAtTheEnd(Broken):
    """Another."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        pass


def test_a_bug_at_the_end_neither_costs_a_mail_nor_hides_a_refusal(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    spans.provider.add_span_processor(BrokenAtTheEnd())
    server.say(UpstreamScript(content=(scripted_reply("250 2.0.0 Ok"), scripted_reply("554 5.7.1 spam"))))
    with smtplib.SMTP("127.0.0.1", server.port) as client:
        assert client.sendmail(SENDER, [BOB], MESSAGE) == {}
        with pytest.raises(smtplib.SMTPDataError, match="spam"):
            client.sendmail(SENDER, [BOB], MESSAGE)


def test_lmtp_over_a_unix_socket_is_told_by_its_path(tmp_path: Any, spans: Spans, instrument: Instrument) -> None:
    instrument()
    path = str(tmp_path / "lmtp")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        with saying_yes(listening, until=b"QUIT"), smtplib.LMTP(path) as client:
            client.sendmail(SENDER, [BOB], MESSAGE)
    attributes = spans.only.attributes or {}
    assert attributes["server.address"] == path
    assert (attributes["network.transport"], attributes["network.protocol.name"]) == ("unix", "lmtp")
    assert "server.port" not in attributes
