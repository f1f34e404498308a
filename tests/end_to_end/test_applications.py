"""The README's examples for applications, run as they stand: the mail's spans hang below the application's."""

from email.message import EmailMessage
from typing import Any, Final

import pytest
from django.conf import settings as django_settings
from django.core.mail import EmailMultiAlternatives
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from tests.end_to_end.conftest import StartGateway
from tests.end_to_end.test_traces import exporting
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver
from tests.test_readme import blocks

TRACE_ID: Final = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID: Final = 0xB7AD6B7169203331


def example(mark: str, port: int) -> dict[str, Any]:
    """The names that the README's block with `mark` in it makes, for a gateway on `port`."""
    (block,) = (block for block in blocks("python") if mark in block)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block.replace("2525", str(port)), "README.md", "exec"), names)
    return names


def send_by_smtplib(port: int) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "a@client.example", "b@there.example", "x"
    message.set_content("Hello\n")
    example("client.send_message", port)["send"](message)


def send_by_django(port: int) -> None:
    if not django_settings.configured:
        django_settings.configure()
    backend = example("EmailBackend", port)["TracedBackend"](host="127.0.0.1", port=port)
    mail = EmailMultiAlternatives("x", "Hello", "a@client.example", ["b@there.example"], connection=backend)
    mail.attach_alternative("<p>Hello</p>", "text/html")
    assert mail.send() == 1


@pytest.mark.parametrize("send", [send_by_smtplib, send_by_django])
def test_a_mail_joins_the_trace_of_the_application_that_sends_it(
    send: Any, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    running = start({"upstream.url": upstream.url}, exporting(receiver))
    # Without an SDK in this process the example's own span is the current one.
    span = SpanContext(TRACE_ID, SPAN_ID, False, TraceFlags(TraceFlags.SAMPLED), TraceState([("vendor", "a1")]))
    with trace.use_span(NonRecordingSpan(span)):
        send(running.port)
    assert len(upstream.wait_for_messages(1)) == 1
    spans = {span.name: span for span in receiver.wait_for_spans(3)}
    transaction, delivery = spans["smtp.transaction"], spans["smtp.delivery"]
    assert (transaction.trace_id, transaction.parent_span_id) == (f"{TRACE_ID:032x}", f"{SPAN_ID:016x}")
    assert (delivery.trace_id, delivery.parent_span_id) == (transaction.trace_id, transaction.span_id)
    assert spans["smtp.connection"].trace_id != transaction.trace_id
