"""The instrumentation of `aiosmtplib`: as that of `smtplib`, and what is different about coroutines."""

import asyncio
from collections.abc import Awaitable, Callable
from email.message import EmailMessage
from typing import Any, Final

import aiosmtplib
import pytest
from opentelemetry.instrumentation.utils import suppress_instrumentation
from opentelemetry.trace import StatusCode

from otel_smtp.client.aiosmtplib_instrumentor import AiosmtplibInstrumentor
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
    traceparent,
)
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript, scripted_reply

_NO_USER: Final = scripted_reply("550 5.1.1 No such user")
_LATER: Final = scripted_reply("451 4.2.0 Greylisted")


def client_of(server: CapturingUpstream) -> aiosmtplib.SMTP:
    return aiosmtplib.SMTP(hostname="localhost", port=server.port, start_tls=False, local_hostname="client.example")


async def by_send_message(client: aiosmtplib.SMTP) -> object:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = SENDER, BOB, "x"
    message.set_content("Hello\n")
    return await client.send_message(message)


async def by_sendmail_bytes(client: aiosmtplib.SMTP) -> object:
    return await client.sendmail(SENDER, [BOB], MESSAGE)


async def by_sendmail_str(client: aiosmtplib.SMTP) -> object:
    return await client.sendmail(SENDER, BOB, MESSAGE.decode().replace("\r\n", "\n"))


async def by_commands(client: aiosmtplib.SMTP) -> object:
    await client.mail(SENDER)
    await client.rcpt(BOB)
    return await client.data(MESSAGE)


WAYS: Final = [by_send_message, by_sendmail_bytes, by_sendmail_str, by_commands]
Send = Callable[[aiosmtplib.SMTP], Awaitable[object]]


@pytest.mark.parametrize("send", WAYS)
async def test_each_way_of_sending_gives_one_span_and_one_header(
    send: Send, server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    async with client_of(server) as client:
        with spans.tracer.start_as_current_span("request") as request:
            await send(client)
    check_relayed(server, spans, request)


@pytest.mark.parametrize("send", WAYS)
async def test_but_for_the_header_nothing_is_sent_otherwise(
    send: Send, server: CapturingUpstream, instrument: Instrument
) -> None:
    async def sent() -> tuple[bytes, object]:
        async with client_of(server) as client:
            result = await send(client)
        octets = b"".join(data for side, data in server.connections[-1].wire if side == "C")
        header = next((line for line in octets.splitlines(keepends=True) if line.startswith(b"traceparent")), b"")
        size = b"size=%d" % len(server.messages[-1].content)
        return octets.replace(header, b"", 1).replace(size, b"size=N"), result

    plain = await sent()
    instrument()
    assert await sent() == plain
    assert [traceparent(message.content) is None for message in server.messages] == [True, False]


async def test_the_function_that_does_it_all_is_traced_too(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    await aiosmtplib.send(
        MESSAGE, sender=SENDER, recipients=[BOB], hostname="127.0.0.1", port=server.port, start_tls=False
    )
    assert traceparent(server.messages[0].content) == named_by(spans.only)


async def test_tasks_that_share_a_connection_do_not_mix_their_messages(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    server.say(UpstreamScript(recipients={"refused@3.example": _NO_USER}))

    async def send(client: aiosmtplib.SMTP, number: int) -> None:
        with spans.tracer.start_as_current_span(f"task {number}"):
            extra = ["refused@3.example"] if number == 3 else []
            await client.sendmail(SENDER, [*extra, *[f"x@{number}.example"] * (number + 1)], MESSAGE)

    async with client_of(server) as client:
        await asyncio.gather(*(send(client, number) for number in range(8)))
    by_header = {named_by(span): span for span in spans.finished}
    by_id = {span.context.span_id: span for span in spans.finished if span.context is not None}
    assert len(server.messages) == 8
    for message in server.messages:
        span = by_header[traceparent(message.content) or ""]
        attributes = span.attributes or {}
        number = len(message.recipients) - 1
        assert attributes["smtp.rcpt.domain"] == f"{number}.example"
        assert attributes["smtp.transaction.recipient_count"] == number + 1
        assert attributes["smtp.transaction.recipients_refused"] == (number == 3)
        assert span.parent is not None
        assert by_id[span.parent.span_id].name == f"task {number}"


async def test_a_partial_refusal_tells_who_and_why(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    server.say(UpstreamScript(recipients={ANN: _LATER}))
    async with client_of(server) as client:
        refused, _ = await client.sendmail(SENDER, [ANN, BOB], MESSAGE)
    assert refused[ANN].code == 451
    span = spans.only
    attributes = span.attributes or {}
    assert (attributes["smtp.outcome"], attributes["error.type"]) == ("partly_relayed", "451")
    (event,) = span.events
    assert dict(event.attributes or {}) == {
        "smtp.recipient.fate": "deferred",
        "smtp.rcpt.domain": "there.example",
        "smtp.reply.code": 451,
        "smtp.reply.enhanced_code": "4.2.0",
        "smtp.reply.text": "Greylisted",
    }


@pytest.mark.parametrize(
    ("script", "error", "outcome", "description"),
    [
        ({"recipients": {BOB: _NO_USER}}, aiosmtplib.SMTPRecipientsRefused, "refused", "550 5.1.1"),
        ({"recipients": {BOB: _NO_USER, ANN: _LATER}}, aiosmtplib.SMTPRecipientsRefused, "deferred", "451 4.2.0"),
        ({"mail": (scripted_reply("553 5.1.7 no"),)}, aiosmtplib.SMTPSenderRefused, "refused", "553 5.1.7"),
        ({"content": (scripted_reply("452 4.3.1 full"),)}, aiosmtplib.SMTPDataError, "deferred", "452 4.3.1"),
    ],
)
async def test_a_refusal_is_the_applications_exception_and_the_spans_error(
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
    recipients = list(script.get("recipients", [BOB]))
    async with client_of(server) as client:
        with pytest.raises(error):
            await client.sendmail(SENDER, recipients, MESSAGE)
    span = spans.only
    assert (span.attributes or {})["smtp.outcome"] == outcome
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, description)


@pytest.mark.parametrize(("at", "outcome"), [(b"MAIL", "aborted"), (b".\r\n", "unknown")])
async def test_a_lost_connection_is_told_by_how_far_the_message_came(
    at: bytes, outcome: str, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    with hanging_up(at) as port:
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False)
        await client.connect()
        with pytest.raises(aiosmtplib.SMTPServerDisconnected):
            await client.sendmail(SENDER, [BOB], MESSAGE)
        client.close()
    attributes = spans.only.attributes or {}
    assert attributes["smtp.outcome"] == outcome
    assert attributes["error.type"] == "aiosmtplib.errors.SMTPServerDisconnected"


async def test_a_cancelled_task_ends_its_span(server: CapturingUpstream, spans: Spans, instrument: Instrument) -> None:
    instrument()
    held = server.hold("content")
    async with client_of(server) as client:
        task = asyncio.ensure_future(client.sendmail(SENDER, [BOB], MESSAGE))
        await asyncio.to_thread(held.reached.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.release()
        client.close()
    attributes = spans.only.attributes or {}
    assert (attributes["smtp.outcome"], attributes["error.type"]) == ("unknown", "asyncio.exceptions.CancelledError")


async def test_what_is_suppressed_is_neither_traced_nor_touched(
    server: CapturingUpstream, spans: Spans, instrument: Instrument
) -> None:
    instrument()
    async with client_of(server) as client:
        with suppress_instrumentation():
            await by_sendmail_bytes(client)
            await by_commands(client)
    assert [message.content for message in server.messages] == [MESSAGE, MESSAGE]
    assert spans.finished == []


def test_from_a_program_without_a_loop(server: CapturingUpstream, spans: Spans, instrument: Instrument) -> None:
    instrument()
    client_of(server).sendmail_sync(SENDER, [BOB], MESSAGE)
    assert traceparent(server.messages[0].content) == named_by(spans.only)


class OfAnotherVersion(AiosmtplibInstrumentor):
    """As if a version were installed whose methods are not known."""

    _instance = None  # of its own: there is one for each class

    def instrumentation_dependencies(self) -> tuple[str, ...]:
        return ("aiosmtplib < 1",)


def test_a_version_that_is_not_known_is_left_alone(spans: Spans, caplog: pytest.LogCaptureFixture) -> None:
    before = dict(vars(aiosmtplib.SMTP))
    instrumentor = OfAnotherVersion()
    instrumentor.instrument(tracer_provider=spans.provider, skip_dep_check=True)  # as the command calls it
    assert dict(vars(aiosmtplib.SMTP)) == before
    assert "aiosmtplib" in caplog.text
    instrumentor.uninstrument()
    assert dict(vars(aiosmtplib.SMTP)) == before


def test_uninstrumented_aiosmtplib_is_what_it_was(spans: Spans) -> None:
    before = dict(vars(aiosmtplib.SMTP))
    AiosmtplibInstrumentor().instrument(tracer_provider=spans.provider)
    assert dict(vars(aiosmtplib.SMTP)) != before
    AiosmtplibInstrumentor().uninstrument()
    assert dict(vars(aiosmtplib.SMTP)) == before
