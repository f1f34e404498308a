"""`otel_smtp.client.inject`: what an application's message carries."""

import subprocess
import sys
from email import message_from_bytes, message_from_string, policy
from email.message import EmailMessage, Message
from email.mime.text import MIMEText
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from otel_smtp.client import inject
from otel_smtp.client.trace_headers import header_block, trace_headers
from otel_smtp.observing import TraceHeaders
from otel_smtp.telemetry import propagation

TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID = 0xB7AD6B7169203331


def context(*members: tuple[str, str], flags: int = 1) -> Context:
    state = TraceState(members)
    span = SpanContext(TRACE_ID, SPAN_ID, is_remote=False, trace_flags=TraceFlags(flags), trace_state=state)
    return trace.set_span_in_context(NonRecordingSpan(span))


def read_back(message: "Message[Any, Any]") -> propagation.TraceContext | None:
    """What the gateway makes of the message as it is on the wire."""
    sent = message_from_bytes(message.as_bytes(policy=message.policy.clone(linesep="\r\n")), policy=policy.compat32)
    unfolded = {name.lower(): str(value).replace("\r\n", "") for name, value in sent.items()}
    headers = TraceHeaders(
        tuple(str(value) for value in sent.get_all("traceparent", [])), unfolded.get("tracestate", "")
    )
    return propagation.parse(headers, with_state=True)


@pytest.mark.parametrize("make", [EmailMessage, Message, lambda: MIMEText("Hello\n")])
def test_the_gateway_reads_what_was_injected(make: Any) -> None:
    message = make()
    inject(message, context(("vendor", "a1"), ("other@vendor", "b:2")))
    read = read_back(message)
    assert read is not None
    assert (read.trace_id, read.span_id, read.flags) == (TRACE_ID, SPAN_ID, 1)
    assert read.trace_state == "vendor=a1,other@vendor=b:2"


def test_what_the_message_had_is_replaced() -> None:
    message = EmailMessage()
    inject(message, context(("vendor", "a1")))
    message["Traceparent"] = f"00-{'a' * 32}-{'b' * 16}-01"
    inject(message, context(flags=0))
    assert message.get_all("traceparent") == [f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-00"]
    assert message.get_all("tracestate") is None


def test_the_current_span_is_taken_where_no_context_is_given() -> None:
    message = EmailMessage()
    with trace.use_span(trace.get_current_span(context())):
        inject(message)
    assert message["traceparent"] == f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"


def test_without_a_span_the_message_is_left_as_it_is() -> None:
    message = EmailMessage()
    message["traceparent"] = "of somebody else"
    inject(message)
    assert message.items() == [("traceparent", "of somebody else")]


def test_a_tracestate_of_any_length_is_never_an_encoded_word() -> None:
    members = [(f"vendor{number}", "x" * length) for number, length in enumerate((10, 60, 57, 256, 1, 40, 30))]
    message = EmailMessage()
    inject(message, context(*members))
    assert b"=?" not in message.as_bytes()
    read = read_back(message)
    assert read is not None
    kept = [(key, value) for key, value in members if len(value) < 58]
    assert read.trace_state == ",".join(f"{key}={value}" for key, value in kept)


@pytest.mark.parametrize("line_end", ["\r\n", "\n"])
def test_the_same_fields_stand_on_top_of_a_flattened_message(line_end: str) -> None:
    members = [(f"vendor{number}", "x" * 50) for number in range(8)]  # the gateway reads 512 octets
    span = trace.get_current_span(context(*members)).get_span_context()
    lines = trace_headers(span, line_end)
    assert lines.endswith(line_end)
    assert max(map(len, lines.split(line_end))) <= 78
    read = read_back(message_from_string(f"{lines}Subject: x{line_end}{line_end}Hello{line_end}"))
    assert read is not None
    assert (read.trace_id, read.span_id, read.flags) == (TRACE_ID, SPAN_ID, 1)
    assert read.trace_state.startswith("vendor0=x")


@pytest.mark.parametrize(
    ("message", "line_end"),
    [
        (b"A: b\r\n\r\nx\n", "\r\n"),
        (b"A: b\n\nx\r\n", "\n"),
        (b"A: b\nC: d\n\r\nx", "\n"),
        ("A: b\r\rx", "\r"),  # smtplib makes CRLF of it
        (b"A: b\r\n", "\r\n"),  # no body
        (b"A:\r\n b\r\n\r\n", "\r\n"),
        (b"A : b\r\n\r\n", "\r\n"),  # obsolete, and understood (RFC 5322 4.5)
        (b"A: b", ""),
        (b"", ""),
        ("", ""),
        (b"\r\nx", ""),
        (b" folded: into nothing\r\n\r\n", ""),
        ("Gr\u00fc\u00dfe: x\r\n\r\n", ""),
        (b"no field\r\n\r\n", ""),
    ],
)
def test_the_line_end_of_a_header_block_is_that_of_its_first_line(message: str | bytes, line_end: str) -> None:
    assert header_block(message) == (line_end, False, False)


def test_no_span_gives_no_field() -> None:
    assert trace_headers(trace.INVALID_SPAN_CONTEXT, "\r\n") == ""


def test_it_needs_the_api_alone() -> None:
    program = (
        "import sys, otel_smtp.client\n"
        "others = ('opentelemetry.sdk', 'opentelemetry.instrumentation', 'wrapt',"
        " 'opentelemetry.exporter', 'asyncio', 'ssl', 'msgspec', 'structlog', 'click')\n"
        "print([name for name in others if name in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == "[]"
