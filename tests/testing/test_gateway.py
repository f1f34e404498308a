"""The gateway for applications' tests: what it takes, what its mailbox does wrong, what it traced.

The fixtures are those of the plugin, which is installed with the package.
"""

import asyncio
import os
import smtplib
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from email.message import EmailMessage
from typing import Final

import aiosmtplib
import pytest

from otel_smtp.client import inject
from otel_smtp.config import SettingsError
from otel_smtp.testing import Mailbox, RunningGateway, run_gateway
from tests.support.otlp_receiver import OtlpReceiver

SENDER: Final = "news@shop.example"
BOB: Final = "bob@there.example"
ANN: Final = "ann@there.example"
# A start takes a few milliseconds; the bound is the promise, and the median forgives a machine that is shared.
START_SECONDS: Final = 0.1


def email(*recipients: str, **fields: str) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = SENDER, ", ".join(recipients or (BOB,)), "Receipt"
    for name, value in fields.items():
        message[name.replace("_", "-")] = value
    message.set_content(".Hello\n..\n.\n")
    return message


def send(gateway: RunningGateway, message: EmailMessage) -> Mapping[str, tuple[int, bytes]]:
    with smtplib.SMTP(gateway.host, gateway.port) as client:
        return client.send_message(message)


def test_a_message_arrives_as_it_was_sent(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    send(smtp_gateway, email(BOB, ANN))
    (message,) = mailbox["bob@"]
    assert message["Subject"] == "Receipt"
    assert message.get_content() == ".Hello\n..\n.\n"
    (mail,) = mailbox.mails
    assert (mail.sender, mail.recipients) == (SENDER, (BOB, ANN))
    assert mailbox[ANN][0].as_bytes() == message.as_bytes()


def test_its_trace_is_found_by_the_message_itself(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    for _ in range(3):
        send(smtp_gateway, email())
    for message in mailbox["bob@"]:
        trace = smtp_gateway.trace_of(message)
        assert trace.outcome == "relayed"
        assert trace.states == ["New", "Active", "Data", "Active", "Idle", "Closed"]
        assert [span.kind for span in trace.deliveries] == ["CLIENT"]
        assert trace.connection.attributes["smtp.close.reason"] == "quit"
        assert trace.trace_id in str(message["Received"])
        assert "by gateway.test" in str(message["Received"])
    assert len({trace.transaction.span_id for trace in smtp_gateway.traces}) == 3
    found = [smtp_gateway.trace_of(message).transaction.span_id for message in mailbox.messages]
    assert found == [trace.transaction.span_id for trace in smtp_gateway.traces]


def test_it_is_found_by_what_the_application_has_in_hand(smtp_gateway: RunningGateway) -> None:
    sent = email(Message_ID="<one@shop.example>")
    with smtplib.SMTP(smtp_gateway.host, smtp_gateway.port) as client:
        client.ehlo()
        client.mail(SENDER)
        client.rcpt(BOB)
        _, reply = client.data(sent.as_bytes())
    wanted = smtp_gateway.traces[-1].transaction
    send(smtp_gateway, email(Message_ID="<two@shop.example>"))
    for told in (sent, reply, reply.decode(), smtplib.SMTPDataError(250, reply), wanted.trace_id):
        assert smtp_gateway.trace_of(told).transaction == wanted


def test_it_is_found_by_the_context_that_the_application_injected(smtp_gateway: RunningGateway) -> None:
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    first, second = email(), email()
    for number, message in enumerate((first, second), start=1):
        with trace.use_span(NonRecordingSpan(SpanContext(7, number, False, TraceFlags(1)))):
            inject(message)
        send(smtp_gateway, message)
    found = [smtp_gateway.trace_of(message).transaction for message in (first, second)]
    assert [span.parent_id for span in found] == [f"{1:016x}", f"{2:016x}"]
    assert {span.trace_id for span in found} == {f"{7:032x}"}
    assert {span.kind for span in found} == {"SERVER"}
    assert smtp_gateway.trace_of(f"{7:032x}").transaction == found[-1], "of several in one trace the newest"


def test_a_message_that_never_came_is_not_waited_for_long(smtp_gateway: RunningGateway) -> None:
    send(smtp_gateway, email())
    with pytest.raises(TimeoutError, match=r"There are: smtp\.delivery .*relayed 250; smtp\.transaction .*relayed"):
        smtp_gateway.trace_of("0" * 32, timeout_seconds=0.01)


def test_what_cannot_name_a_message_is_refused_at_once(smtp_gateway: RunningGateway) -> None:
    with pytest.raises(TypeError, match="no message"):
        smtp_gateway.trace_of(7)  # type: ignore[arg-type]


def test_a_refused_recipient(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    mailbox.refuse("bob@", 550, "5.1.1 no such user")
    with pytest.raises(smtplib.SMTPRecipientsRefused) as refusal:
        send(smtp_gateway, email(BOB))
    code, text = refusal.value.recipients[BOB]
    assert (code, text.startswith(b"5.1.1 no such user")) == (550, True)
    assert mailbox.messages == []
    assert list(send(smtp_gateway, email(BOB, ANN))) == [BOB]
    assert len(mailbox["ann@"]) == 1
    assert mailbox["bob@"] == []


def test_a_recipient_that_is_deferred_once(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    mailbox.defer("bob@", times=1)
    with pytest.raises(smtplib.SMTPRecipientsRefused) as refusal:
        send(smtp_gateway, email())
    assert refusal.value.recipients[BOB][0] == 451
    send(smtp_gateway, email())
    assert len(mailbox["bob@"]) == 1


def test_refused_content(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    mailbox.refuse_content("bob@", 554, "5.7.1 spam")
    message = email(Message_ID="<spam@shop.example>")
    with pytest.raises(smtplib.SMTPDataError, match=r"5\.7\.1 spam"):
        send(smtp_gateway, message)
    trace = smtp_gateway.trace_of(message)
    assert trace.outcome == "refused"
    assert trace.transaction.attributes["smtp.reply.code"] == 554
    assert "Error" in trace.states


def test_a_connection_that_is_dropped_after_the_dot(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    mailbox.drop_after_dot()
    message = email(Message_ID="<lost@shop.example>")
    for _ in range(8):  # more often than it takes to open a circuit breaker
        with pytest.raises(smtplib.SMTPDataError) as refusal:
            send(smtp_gateway, message)
        assert (refusal.value.smtp_code, refusal.value.smtp_error[:5]) == (451, b"4.4.2")
        assert smtp_gateway.trace_of(message).outcome == "unknown"
    mailbox.recover()
    send(smtp_gateway, message)
    assert smtp_gateway.trace_of(mailbox["bob@"][0]).outcome == "relayed"


def test_a_slow_reply(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    mailbox.slow(0.2)
    started = time.monotonic()
    send(smtp_gateway, email())
    assert time.monotonic() - started >= 0.2
    (delivery,) = smtp_gateway.trace_of(mailbox.messages[0]).deliveries
    assert delivery.end_ns - delivery.start_ns >= 200_000_000


def test_a_connection_that_is_still_open_has_no_end(
    smtp_gateway: RunningGateway, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otel_smtp.testing.traces.WAIT_SECONDS", 0.01)
    with smtplib.SMTP(smtp_gateway.host, smtp_gateway.port) as client:
        client.send_message(email())
        trace = smtp_gateway.trace_of(mailbox.messages[0])
        with pytest.raises(TimeoutError, match="client quits"):
            _ = trace.connection


async def test_in_a_coroutine(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    mailbox.refuse("ann@")
    async with aiosmtplib.SMTP(hostname=smtp_gateway.host, port=smtp_gateway.port) as client:
        refused, _ = await client.send_message(email(BOB, ANN))
    assert refused[ANN].code == 550
    assert smtp_gateway.trace_of(mailbox[BOB][0]).connection.name == "smtp.connection"


async def test_many_clients_at_once(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    addresses = [f"{number}@there.example" for number in range(40)]
    await asyncio.gather(
        *(aiosmtplib.send(email(one), hostname=smtp_gateway.host, port=smtp_gateway.port) for one in addresses)
    )
    assert all(len(mailbox[one]) == 1 for one in addresses)
    assert len(mailbox.messages) == 40


def test_a_large_message(smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
    message = email()
    message.set_content("x" * 70 + "\n.\n")
    message.add_attachment(bytes(range(256)) * 20_000, maintype="application", subtype="octet-stream")
    send(smtp_gateway, message)
    (attachment,) = mailbox.messages[0].iter_attachments()
    assert attachment.get_content() == bytes(range(256)) * 20_000


class TestSettings:
    """A test's own settings."""

    @pytest.fixture
    def smtp_gateway_settings(self) -> Mapping[str, object]:
        return {"limits": {"recipients": 1}, "listener": [{"name": "mine"}], "telemetry": {"addresses": "full"}}

    def test_are_followed(self, smtp_gateway: RunningGateway, mailbox: Mailbox) -> None:
        assert list(send(smtp_gateway, email(BOB, ANN))) == [ANN]
        trace = smtp_gateway.trace_of(mailbox.messages[0])
        assert trace.transaction.attributes["smtp.rcpt.addresses"] == (BOB, ANN)  # refused ones, too
        assert trace.connection.attributes["smtp.listener"] == "mine"


class TestSegments:
    """Connections whose trace is told in several spans."""

    @pytest.fixture
    def smtp_gateway_settings(self) -> Mapping[str, object]:
        return {"telemetry": {"segment_events": 16}}

    def test_are_one_connection_all_the_same(
        self, smtp_gateway: RunningGateway, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with smtplib.SMTP(smtp_gateway.host, smtp_gateway.port) as client:
            for _ in range(12):
                client.send_message(email())
            first = smtp_gateway.trace_of(mailbox.messages[0])
            with monkeypatch.context() as patched:
                patched.setattr("otel_smtp.testing.traces.WAIT_SECONDS", 0.01)
                with pytest.raises(TimeoutError):
                    _ = first.connection
        for message in (mailbox.messages[0], mailbox.messages[-1]):
            states = smtp_gateway.trace_of(message).states
            assert (states[0], states[-1], states.count("Idle")) == ("New", "Closed", 12)
        connections = [span for span in smtp_gateway.spans if span.name == "smtp.connection"]
        assert len(connections) > 1
        assert smtp_gateway.trace_of(mailbox.messages[0]).connection == connections[-1]


def test_settings_that_are_wrong_are_refused_as_everywhere() -> None:
    with pytest.raises(SettingsError, match="recipents"), run_gateway({"limits": {"recipents": 1}}):
        pytest.fail("it started")


def test_what_fails_in_the_test_is_the_tests(smtp_gateway: RunningGateway) -> None:
    with pytest.raises(ZeroDivisionError), run_gateway():
        raise ZeroDivisionError


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver(with_grpc=False) as receiving:
        yield receiving


def test_the_applications_variables_are_not_the_gateways(
    monkeypatch: pytest.MonkeyPatch, receiver: OtlpReceiver
) -> None:
    given = {
        "OTEL_SDK_DISABLED": "true",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "1",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with run_gateway() as gateway:
        assert {name: os.environ.get(name) for name in given} == given
        send(gateway, email())
        assert gateway.trace_of(gateway.mailbox.messages[0]).states[-1] == "Closed"
    assert receiver.requests == 0


def test_two_gateways_know_nothing_of_each_other(smtp_gateway: RunningGateway) -> None:
    with run_gateway() as other:
        send(other, email())
        assert len(other.mailbox.messages) == 1
    assert smtp_gateway.mailbox.messages == []
    assert smtp_gateway.traces == []


def test_nothing_is_left_of_it() -> None:
    threads = {*threading.enumerate()}
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with run_gateway() as gateway:
        port = gateway.port
        with smtplib.SMTP(gateway.host, port) as client:
            client.send_message(email())
        forgotten = smtplib.SMTP(gateway.host, port)  # a client that does not quit
    forgotten.close()
    with pytest.raises(OSError, match="refused"):
        smtplib.SMTP("127.0.0.1", port)
    assert {*threading.enumerate()} <= threads
    if files:
        assert len(os.listdir("/proc/self/fd")) <= files


def test_it_starts_in_under_a_tenth_of_a_second() -> None:
    durations = []
    for _ in range(5):
        started = time.perf_counter()
        with run_gateway():
            durations.append(time.perf_counter() - started)
    assert statistics.median(durations) < START_SECONDS, durations
