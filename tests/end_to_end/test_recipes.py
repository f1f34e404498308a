"""The README's recipes for other languages, run as they stand: the mail joins the trace that the program is in."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.end_to_end.conftest import StartGateway
from tests.end_to_end.test_traces import exporting
from tests.support.capture import CapturingUpstream
from tests.support.languages import run_go, run_java, run_node
from tests.support.otlp_receiver import OtlpReceiver
from tests.test_readme import blocks

TRACE_ID: Final = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID: Final = "b7ad6b7169203331"


def recipe(language: str, mark: str, port: int) -> str:
    """The README's block with `mark` in it, for a gateway on `port`."""
    (block,) = (block for block in blocks(language) if mark in block)
    return block.replace("2525", str(port))


# Without an SDK a span is a shell around the context that it is made in, so the program's own context is what is sent.
_JS: Final = f"""
const {{ TraceFlags }} = require("@opentelemetry/api");
const {{ AsyncLocalStorageContextManager }} = require("@opentelemetry/context-async-hooks");
context.setGlobalContextManager(new AsyncLocalStorageContextManager().enable());
const here = {{ traceId: "{TRACE_ID}", spanId: "{SPAN_ID}", traceFlags: TraceFlags.SAMPLED }};
context.with(trace.setSpanContext(context.active(), here), () =>
  send({{ from: "a@client.example", to: "b@there.example", text: "Hello", headers: {{ "X-Order": "7" }} }}),
).then(() => transport.close());
"""


def by_nodemailer(port: int, directory: Path) -> None:
    run_node(directory, {"main.js": recipe("js", "nodemailer", port) + _JS})


_JAVA: Final = f"""
import io.opentelemetry.api.trace.*;
import io.opentelemetry.context.Scope;
import jakarta.mail.*;
import jakarta.mail.internet.*;
import java.util.Properties;

public class Main {{
    public static void main(String[] arguments) throws Exception {{
        Properties settings = new Properties();
        settings.put("mail.smtp.host", "127.0.0.1");
        settings.put("mail.smtp.port", "%PORT%");
        MimeMessage message = new MimeMessage(Session.getInstance(settings));
        message.setFrom("a@client.example");
        message.setRecipients(Message.RecipientType.TO, "b@there.example");
        message.setHeader("X-Order", "7");
        message.setText("Hello");
        SpanContext here = SpanContext.create(
            "{TRACE_ID}", "{SPAN_ID}", TraceFlags.getSampled(), TraceState.getDefault());
        try (Scope scope = Span.wrap(here).makeCurrent()) {{
            TracedMail.send(message);
        }}
    }}
}}
"""


def by_jakarta_mail(port: int, directory: Path) -> None:
    source = recipe("java", "Transport.send", port)
    run_java(directory, {"TracedMail.java": source, "Main.java": _JAVA.replace("%PORT%", str(port))})


_GO_CONTEXT: Final = f"""package main

import (
	"context"

	"go.opentelemetry.io/otel/trace"
)

func here() context.Context {{
	traceID, _ := trace.TraceIDFromHex("{TRACE_ID}")
	spanID, _ := trace.SpanIDFromHex("{SPAN_ID}")
	span := trace.SpanContextConfig{{TraceID: traceID, SpanID: spanID, TraceFlags: trace.FlagsSampled}}
	return trace.ContextWithSpanContext(context.Background(), trace.NewSpanContext(span))
}}
"""
_NET_SMTP: Final = """package main

func main() {
	message := "From: a@client.example\\r\\nX-Order: 7\\r\\n\\r\\nHello\\r\\n"
	if err := send(here(), "a@client.example", []string{"b@there.example"}, []byte(message)); err != nil {
		panic(err)
	}
}
"""
_GO_MAIL: Final = """package main

import "github.com/wneessen/go-mail"

func main() {
	message := mail.NewMsg()
	message.From("a@client.example")
	message.To("b@there.example")
	message.SetGenHeader("X-Order", "7")
	message.SetBodyString(mail.TypeTextPlain, "Hello")
	client, err := mail.NewClient("127.0.0.1", mail.WithPort(%PORT%), mail.WithTLSPolicy(mail.NoTLS))
	if err == nil {
		err = sendMsg(here(), client, message)
	}
	if err != nil {
		panic(err)
	}
}
"""


def by_net_smtp(port: int, directory: Path) -> None:
    source = recipe("go", "smtp.SendMail", port)
    run_go(directory, {"send.go": source, "context.go": _GO_CONTEXT, "main.go": _NET_SMTP})


def by_go_mail(port: int, directory: Path) -> None:
    source = recipe("go", "go-mail", port)
    run_go(directory, {"send.go": source, "context.go": _GO_CONTEXT, "main.go": _GO_MAIL.replace("%PORT%", str(port))})


@pytest.mark.timeout(300)  # the first run installs the language's libraries
@pytest.mark.parametrize("send", [by_nodemailer, by_jakarta_mail, by_net_smtp, by_go_mail])
def test_a_recipes_mail_joins_the_programs_trace(
    send: Callable[[int, Path], None],
    upstream: CapturingUpstream,
    receiver: OtlpReceiver,
    start: StartGateway,
    tmp_path: Path,
) -> None:
    running = start({"upstream.url": upstream.url}, exporting(receiver))
    directory = tmp_path / "program"
    directory.mkdir()
    send(running.port, directory)
    (message,) = upstream.wait_for_messages(1)
    assert message.recipients == ("b@there.example",)
    assert b"X-Order: 7\r\n" in message.content
    assert b"baggage" not in message.content.lower()
    spans = {span.name: span for span in receiver.wait_for_spans(3)}
    transaction = spans["smtp.transaction"]
    assert (transaction.trace_id, transaction.parent_span_id) == (TRACE_ID, SPAN_ID)
    assert spans["smtp.delivery"].parent_span_id == transaction.span_id


def test_the_recipe_for_php_is_php(tmp_path: Path) -> None:
    if (php := shutil.which("php")) is None:
        pytest.skip("php is not installed")
    (block,) = blocks("php")
    path = tmp_path / "TraceMail.php"
    path.write_text(block)
    subprocess.run([php, "-l", str(path)], check=True, timeout=60)
