"""The README's examples for applications, run as they stand: the mail's spans hang below the application's."""

import os
import subprocess
import sys
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Final

import django
import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from tests.end_to_end.conftest import StartGateway
from tests.end_to_end.test_traces import exporting
from tests.support.capture import CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver
from tests.test_readme import blocks

TRACE_ID: Final = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID: Final = 0xB7AD6B7169203331


SPAN: Final = SpanContext(TRACE_ID, SPAN_ID, False, TraceFlags(TraceFlags.SAMPLED), TraceState([("vendor", "a1")]))

# An application's use of Django, with the current span that a request would have.
USE_OF_DJANGO: Final = """
import django
from django.core.mail import EmailMultiAlternatives
from opentelemetry import trace
from tests.end_to_end.test_applications import SPAN

django.setup()
mail = EmailMultiAlternatives("x", "Hello", "a@client.example", ["b@there.example"])
mail.attach_alternative("<p>Hello</p>", "text/html")
# Without an SDK in this process the example's own span is the current one.
with trace.use_span(trace.NonRecordingSpan(SPAN)):
    assert mail.send() == 1
"""


def example(mark: str, port: int) -> str:
    """The README's block with `mark` in it, for a gateway on `port`."""
    (block,) = (block for block in blocks("python") if mark in block)
    return block.replace("2525", str(port))


def send_by_smtplib(port: int, _: Path) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "a@client.example", "b@there.example", "x"
    message.set_content("Hello\n")
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example("client.send_message", port), "README.md", "exec"), names)
    with trace.use_span(NonRecordingSpan(SPAN)):
        names["send"](message)


def send_by_django(port: int, directory: Path) -> None:
    shop = directory / "shop"
    shop.mkdir()
    (shop / "__init__.py").touch()
    (shop / "mail.py").write_text(example("TracedBackend(", port), encoding="utf-8")
    mark = "MAILERS" if django.VERSION >= (6, 1) else "EMAIL_BACKEND"
    (shop / "settings.py").write_text(example(mark, port), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", USE_OF_DJANGO],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": f"{directory}:.", "DJANGO_SETTINGS_MODULE": "shop.settings"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("send", [send_by_smtplib, send_by_django])
def test_a_mail_joins_the_trace_of_the_application_that_sends_it(
    send: Any, upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, tmp_path: Path
) -> None:
    running = start({"upstream.url": upstream.url}, exporting(receiver))
    send(running.port, tmp_path)
    assert len(upstream.wait_for_messages(1)) == 1
    spans = {span.name: span for span in receiver.wait_for_spans(3)}
    transaction, delivery = spans["smtp.transaction"], spans["smtp.delivery"]
    assert (transaction.trace_id, transaction.parent_span_id) == (f"{TRACE_ID:032x}", f"{SPAN_ID:016x}")
    assert (delivery.trace_id, delivery.parent_span_id) == (transaction.trace_id, transaction.span_id)
    assert spans["smtp.connection"].trace_id != transaction.trace_id
