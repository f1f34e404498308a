"""Applications whose mail joins their own trace: the README's example by hand, and Django without a line of code."""

import contextlib
import itertools
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, TraceState

from tests.end_to_end.conftest import StartGateway
from tests.end_to_end.test_traces import exporting
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript, scripted_reply
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.test_readme import blocks

TRACE_ID: Final = 0x0AF7651916CD43DD8448EB211C80319C
SPAN_ID: Final = 0xB7AD6B7169203331
SHOP: Final = Path(__file__).with_name("django_shop.py")


def example(mark: str, port: int) -> dict[str, Any]:
    """The names that the README's block with `mark` in it makes, for a gateway on `port`."""
    (block,) = (block for block in blocks("python") if mark in block)
    # The same code under the name that it has beside the gateway.
    block = block.replace("2525", str(port)).replace("otel_smtp_client", "otel_smtp.client")
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_a_mail_joins_the_trace_of_the_application_that_sends_it(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    running = start({"upstream.url": upstream.url}, exporting(receiver))
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "a@client.example", "b@there.example", "x"
    message.set_content("Hello\n")
    # Without an SDK in this process the example's own span is the current one.
    span = SpanContext(TRACE_ID, SPAN_ID, False, TraceFlags(TraceFlags.SAMPLED), TraceState([("vendor", "a1")]))
    with trace.use_span(NonRecordingSpan(span)):
        example("inject(message)", running.port)["send"](message)
    assert len(upstream.wait_for_messages(1)) == 1
    spans = {span.name: span for span in receiver.wait_for_spans(3)}
    transaction, delivery = spans["smtp.transaction"], spans["smtp.delivery"]
    assert (transaction.trace_id, transaction.parent_span_id) == (f"{TRACE_ID:032x}", f"{SPAN_ID:016x}")
    assert (delivery.trace_id, delivery.parent_span_id) == (transaction.trace_id, transaction.span_id)
    assert spans["smtp.connection"].trace_id != transaction.trace_id


@contextlib.contextmanager
def django(gateway_port: int, receiver: OtlpReceiver) -> Iterator[str]:
    """A Django application under `opentelemetry-instrument` that mails through the gateway; its URL."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL")}
    environ |= {
        **exporting(receiver),
        "OTEL_SERVICE_NAME": "shop",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "DJANGO_SETTINGS_MODULE": SHOP.stem,
        "EMAIL_PORT": str(gateway_port),
        "PYTHONPATH": str(SHOP.parent),
        "PYTHONSAFEPATH": "1",
    }
    command = [str(Path(sys.executable).with_name("opentelemetry-instrument")), sys.executable, str(SHOP)]
    with subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = process.stdout.readline().strip()
            assert port.isdecimal(), f"it ended with {process.wait(10)}"
            yield f"http://127.0.0.1:{port}"
            process.stdin.close()
            assert process.wait(15) == 0
        finally:
            process.kill()


def get(url: str) -> int:
    """The status of a GET."""
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def story(receiver: OtlpReceiver, complete: Callable[[dict[str, ReceivedSpan]], bool]) -> dict[str, ReceivedSpan]:
    """The spans of one order by name, the request's as "request", once `complete` says so."""

    def by_name(spans: list[ReceivedSpan]) -> dict[str, ReceivedSpan]:
        return {"request" if span.attributes.get("http.route") or "http.method" in span.attributes else span.name: span
                for span in spans}  # fmt: skip

    return by_name(receiver.wait_for_spans(lambda spans: complete(by_name(spans)), timeout=20))


def test_one_trace_from_a_django_request_to_the_upstreams_reply(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    running = start({"upstream.url": upstream.url}, exporting(receiver))
    with django(running.port, receiver) as url:
        assert get(f"{url}/order/bob@there.example") == 200
        spans = story(receiver, lambda spans: len(spans) == 5)
    request, mail = spans["request"], spans["smtp.send"]
    transaction, delivery, connection = (spans[f"smtp.{name}"] for name in ("transaction", "delivery", "connection"))
    chain = [request, mail, transaction, delivery]

    # One trace, each the parent of the next, each within the one before.
    assert {span.trace_id for span in chain} == {request.trace_id}
    assert [span.parent_span_id for span in chain] == ["", *(span.span_id for span in chain[:-1])]
    for outer, inner in itertools.pairwise(chain):
        assert outer.start_ns <= inner.start_ns
        assert inner.end_ns <= outer.end_ns
    # The connection existed before the message named a trace; the transaction links to it.
    assert [(link.trace_id, link.span_id) for link in transaction.links] == [(connection.trace_id, connection.span_id)]

    # The edge of a service graph: a CLIENT span of one service, whose child is a SERVER span of another.
    assert [span.kind for span in chain] == ["SERVER", "CLIENT", "SERVER", "CLIENT"]
    services = [span.resource["service.name"] for span in chain]
    assert services == ["shop", "shop", "otel-smtp", "otel-smtp"]

    # Both sides say the same about the message.
    for name in ("smtp.outcome", "smtp.message.size", "smtp.rcpt.domains", "smtp.mail.from.domain"):
        assert mail.attributes[name] == transaction.attributes[name], name
    assert mail.attributes["server.port"] == running.port
    assert mail.attributes["smtp.reply.trace_id"] == request.trace_id
    assert {span.status for span in chain} == {"UNSET"}
    (message,) = upstream.messages
    assert f"traceparent: 00-{delivery.trace_id}-{delivery.span_id}-".encode() in message.content
    assert b"Thank you.\r\n" in message.content


def test_a_refusal_is_seen_from_the_upstream_to_the_request(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    upstream.say(UpstreamScript(content=(scripted_reply("554 5.7.1 Looks like spam"),)))
    running = start({"upstream.url": upstream.url}, exporting(receiver))
    with django(running.port, receiver) as url:
        assert get(f"{url}/order/bob@there.example") == 500
        spans = story(receiver, lambda spans: len(spans) == 5)
    mail = spans["smtp.send"]
    assert mail.parent_span_id == spans["request"].span_id
    assert spans["smtp.transaction"].parent_span_id == mail.span_id
    assert (mail.status, mail.status_message) == ("ERROR", "554 5.7.1")
    assert mail.attributes["smtp.outcome"] == spans["smtp.transaction"].attributes["smtp.outcome"] == "refused"
    assert mail.attributes["error.type"] == "554"
    assert str(mail.attributes["smtp.reply.text"]).startswith("Looks like spam")
