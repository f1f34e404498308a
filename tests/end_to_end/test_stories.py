"""Why did she not get it? What an operator reads of each mail that went wrong: in its trace, and in the log alone.

Each story is a real gateway before real peers. What is read is written down as an operator would retell it: a line for
each span, below its parent, with what became of it and why, and a line for each recipient who did not get the mail.

The same trace is read wherever it is kept: the collector that got it, the status page's API, and a real Jaeger, where
the program is on the PATH, which is given what the collector got, octet for octet. `otel-smtp why` tells the rest.
"""

import contextlib
import json
import re
import smtplib
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner

from otel_smtp.commands.cli import cli
from tests.end_to_end.conftest import Client, Files, StartGateway
from tests.support.capture import KEYWORDS, CapturingUpstream
from tests.support.dialogue import UpstreamScript, scripted_reply
from tests.support.jaeger import Jaeger, jaeger, tags_of
from tests.support.otlp_receiver import OtlpReceiver, ReceivedEvent, ReceivedSpan
from tests.support.ports import unclaimed_port
from tests.support.process import GatewayProcess, until

MAIL: Final = "Subject: x\r\n\r\nHello\r\n"
Connect = Callable[[int], Client]


def exporting(receiver: OtlpReceiver) -> dict[str, str]:
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint, "OTEL_BSP_SCHEDULE_DELAY": "20"}


# Reading a trace ---------------------------------------------------------------------------------------------------


def trace_as_read(spans: Iterable[ReceivedSpan]) -> list[str]:
    """One trace, as an operator retells it."""
    spans = sorted(spans, key=lambda span: span.start_ns)
    assert len({span.trace_id for span in spans}) == 1, "one mail is one trace"
    known = {span.span_id for span in spans}
    told: list[str] = []

    def tell(span: ReceivedSpan, depth: int) -> None:
        indent = "  " * depth
        assert (span.status == "ERROR") == ("error.type" in span.attributes and span.status != "UNSET")
        assert all(event.time_ns <= span.end_ns for event in span.events)
        told.append(indent + _span(span))
        told.extend(f"{indent}  * {_recipient(one.attributes)}" for one in span.events if one.name == "smtp.recipient")
        for child in spans:
            if child.parent_span_id == span.span_id:
                tell(child, depth + 1)

    for span in spans:
        if span.parent_span_id not in known:
            tell(span, 0)
    return told


def _span(span: ReceivedSpan) -> str:
    facts = span.attributes
    match span.name:
        case "smtp.connection":
            told = f"connection, ended by {facts['smtp.close.reason']}"
        case "smtp.transaction":
            told = f"transaction {facts['smtp.outcome']}"
            if "smtp.reply.code" in facts or "relayed" not in facts["smtp.outcome"]:  # else its delivery tells it
                told += f": {_reply(facts)}"
        case "smtp.delivery":
            kind = facts["smtp.message.kind"]
            what = f"delivery {facts['smtp.delivery.attempt']}" if "smtp.spool.id" in facts else "delivery"
            what += "" if kind == "mail" else f" of a {kind} about this mail"
            told = f"{what} to {facts['smtp.upstream.name']} {facts['smtp.outcome']}: {_reply(facts)}"
        case "smtp.spool":
            told = f"{facts['smtp.spool.action']} in the queue"
    counts = [
        f"{count} {word}"
        for prefix in ("smtp.transaction.", "smtp.delivery.")
        for word in ("refused", "deferred")
        if (count := facts.get(f"{prefix}recipients_{word}"))
    ]
    told += f" ({', '.join(counts)})" if counts else ""
    if span.status != "ERROR":
        return told
    assert span.status_message == facts.get("smtp.failure.reason", "")
    return f"{told} ERROR {facts['error.type']}{_why(facts)}"


def _why(facts: Mapping[str, Any]) -> str:
    return f", {facts['smtp.failure.reason']}" if "smtp.failure.reason" in facts else ""


def _recipient(facts: Mapping[str, Any]) -> str:
    who = facts.get("smtp.rcpt.address", facts.get("smtp.rcpt.domain"))
    said_by = f", said by {facts['smtp.upstream.name']}" if "smtp.upstream.name" in facts else ""
    return f"{who} {facts['smtp.recipient.fate']}: {_reply(facts)}{said_by}"


def _reply(facts: Mapping[str, Any]) -> str:
    told = [facts.get(f"smtp.reply.{part}") for part in ("code", "enhanced_code", "text")]
    words = " ".join(str(one) for one in told if one is not None)
    return re.sub("trace=[0-9a-f]{32}", "trace=ID", words) or "no reply"


# Reading the log ---------------------------------------------------------------------------------------------------


def log_as_read(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the log says of mail, in order; each line names the connection or the queued message, and the trace."""
    told = []
    for line in lines:
        event = line["event"]
        if line["logger"] == "otel_smtp.access":
            assert "smtp.connection.id" in line or "smtp.spool.id" in line
            assert len(line["trace_id"]) == 32
            match event:
                case "smtp.recipient":
                    told.append(f"recipient {_recipient(line)}")
                case "smtp.transaction":
                    who = [*line.get("smtp.rcpt.refused", ()), *line.get("smtp.rcpt.deferred", ())]
                    without = f" [not for {'; '.join(who)}]" if who else ""
                    told.append(f"transaction {line['smtp.outcome']}: {_reply(line)}{without}{_why(line)}")
                case "smtp.delivery":
                    upstream, outcome = line["smtp.upstream.name"], line["smtp.outcome"]
                    what = "delivery" if line["smtp.message.kind"] == "mail" else f"{line['smtp.message.kind']}"
                    told.append(f"{what} to {upstream} {outcome}: {_reply(line)}{_why(line)}")
                case "smtp.spool":
                    told.append(f"{line['smtp.spool.action']} in the queue{_why(line)}")
        elif "fault" in line and ("connection_id" in line or "spool_id" in line):  # else it is of no mail
            assert len(line["trace_id"]) == 32
            assert len(line["span_id"]) == 16
            told.append(f"{event}: {line['fault']}")
    return told


def log_of(running: GatewayProcess, event: str) -> list[str]:
    """The log as it is read, once it has a line of `event`."""
    until(lambda: any(line["event"] == event for line in running.log) or None, event)
    return log_as_read(running.log)


def trace_of(receiver: OtlpReceiver, enough: Callable[[list[ReceivedSpan]], bool]) -> list[str]:
    """The trace as it is read, once it has enough spans."""
    spans = receiver.wait_for_spans(enough)
    for span in spans:
        # Jaeger cuts start and duration to microseconds, each by itself.
        assert all(event.time_ns + 1000 <= span.end_ns for event in span.events)
        is_notice = span.attributes.get("smtp.message.kind", "mail") != "mail"
        assert is_notice == ("reported_mail" in [link.attributes["smtp.link.type"] for link in span.links])
    return trace_as_read(spans)


# Asking others -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger | None]:
    """A Jaeger for all stories, which look for a trace each; None where there is none: other tests are skipped then."""
    with contextlib.ExitStack() as running:
        try:
            found = running.enter_context(jaeger(tmp_path_factory.mktemp("jaeger")))
        except pytest.skip.Exception:
            yield None
            return
        yield found


@dataclass
class Story:
    """A gateway whose telemetry goes to a collector, and who can be asked of it."""

    start_gateway: StartGateway
    receiver: OtlpReceiver
    jaeger: Jaeger | None
    port: int = 0

    def start(self, settings: Mapping[str, Any]) -> GatewayProcess:
        """Start it, with a status page."""
        self.port = unclaimed_port()
        return self.start_gateway({**settings, "status.address": f"127.0.0.1:{self.port}"}, exporting(self.receiver))

    def tells(self, enough: Callable[[list[ReceivedSpan]], bool], trace: Sequence[str], why: Sequence[str]) -> None:
        """Compare what everybody says with what is right: the trace, and the account that `otel-smtp why` gives."""
        assert trace_of(self.receiver, enough) == trace
        spans = self.receiver.spans
        trace_id = spans[0].trace_id
        assert trace_as_read(self._on_the_page(trace_id, len(spans))) == trace
        assert self.account(trace_id) == why
        if self.jaeger is not None:
            for body in self.receiver.traces:
                self.jaeger.take(body)
            assert trace_as_read(map(_of_jaeger, self.jaeger.spans(trace_id, len(spans)))) == trace

    def _on_the_page(self, trace_id: str, count: int) -> list[ReceivedSpan]:
        def whole() -> list[ReceivedSpan] | None:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/traces/{trace_id}", timeout=10) as answer:
                found = [
                    _of_otlp_json(span)
                    for resource in json.load(answer)["resourceSpans"]
                    for scope in resource["scopeSpans"]
                    for span in scope["spans"]
                ]
            return found if len(found) >= count else None

        return until(whole, "the page has it")

    def account(self, what: str) -> list[str]:
        """What `otel-smtp why` prints, but for what differs from run to run."""
        url = f"http://127.0.0.1:{self.port}"
        done = CliRunner().invoke(cli, ["why", what, "--url", url, "--no-waterfall"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        told = re.sub(r"\d+(\.\d+)? (µs|ms|s|min)\b", "TIME", done.output)
        told = re.sub(r"^\d\d \w{3} \d\d:\d\d:\d\d", "WHEN", told, flags=re.MULTILINE)
        told = re.sub(r"trace [0-9a-f]{32}", "trace ID", told)
        told = re.sub(r"trace=[0-9a-f]{32}", "trace=ID", told)
        told = re.sub(r"queue id \S+|in the queue as \S+:", lambda found: f"{found[0].rpartition(' ')[0]} ID", told)
        told = re.sub(r"127\.0\.0\.1:\d+|localhost:\d+", "HOST", told)
        return [line for line in told.splitlines() if not line.startswith("  Longest: ")]


@pytest.fixture
def story(start: StartGateway, receiver: OtlpReceiver, store: Jaeger | None) -> Story:
    """See there."""
    return Story(start, receiver, store)


def _received(
    name: str,
    trace_id: str,
    span_id: str,
    parent_span_id: str,
    times: tuple[int, int],
    attributes: dict[str, Any],
    events: list[ReceivedEvent],
    status: tuple[str, str],
) -> ReceivedSpan:
    """A span of which others keep less than a collector gets; times are nanoseconds."""
    return ReceivedSpan(
        name, "", trace_id, span_id, parent_span_id, *times, attributes, events, [], *status, "", 0, 0, {}, ""
    )


def _of_otlp_json(span: Mapping[str, Any]) -> ReceivedSpan:
    return _received(
        span["name"],
        span["traceId"],
        span["spanId"],
        span.get("parentSpanId", ""),
        (int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])),
        _key_values(span["attributes"]),
        [
            ReceivedEvent(one["name"], int(one["timeUnixNano"]), _key_values(one["attributes"]))
            for one in span["events"]
        ],
        ("ERROR" if span["status"].get("code") == 2 else "UNSET", span["status"].get("message", "")),
    )


def _key_values(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    kinds: dict[str, Callable[[Any], Any]] = {"intValue": int, "arrayValue": str}
    return {
        pair["key"]: kinds.get(kind, lambda value: value)(value)
        for pair in pairs
        for kind, value in pair["value"].items()
    }


def _of_jaeger(span: Mapping[str, Any]) -> ReceivedSpan:
    # An attempt from the queue begins when the transaction is over, which it takes for clocks that differ.
    assert [one for one in span.get("warnings") or () if not one.startswith("clock skew adjustment disabled")] == []
    tags = tags_of(span)
    # Where an attempt is linked to its transaction, too, the one reference to it is "FOLLOWS_FROM".
    parents = [one["spanID"] for one in sorted(span["references"], key=lambda one: str(one["refType"]))]
    end = span["startTime"] + span["duration"]
    return _received(
        span["operationName"],
        span["traceID"],
        span["spanID"],
        parents[0] if parents else "",
        (1000 * span["startTime"], 1000 * end),
        tags,
        [
            ReceivedEvent(fields.pop("event"), 1000 * log["timestamp"], fields)
            for log in span["logs"]
            for fields in [tags_of(log)]
        ],
        (tags.pop("otel.status_code", "UNSET"), tags.pop("otel.status_description", "")),
    )


def has(*names: str) -> Callable[[list[ReceivedSpan]], bool]:
    """Whether spans of all these names have come."""
    return lambda spans: set(names) <= {span.name for span in spans}


WHOLE: Final = has("smtp.connection", "smtp.transaction", "smtp.delivery")


# a: two recipients, one refused by the upstream ----------------------------------------------------------------------


def test_one_of_two_recipients_is_refused_by_the_upstream(upstream: CapturingUpstream, story: Story) -> None:
    upstream.say(UpstreamScript(recipients={"gone@there.example": scripted_reply("550 5.1.1 No such user")}))
    running = story.start({"upstream.url": upstream.url, "upstream.name": "provider"})
    with smtplib.SMTP("127.0.0.1", running.port) as client:
        refused = client.sendmail("a@client.example", ["b@here.example", "gone@there.example"], MAIL)
    assert refused["gone@there.example"][0] == 550
    trace = [
        "connection, ended by quit",
        "  transaction partly_relayed (1 refused)",
        "    * there.example refused: 550 5.1.1 No such user, said by provider",
        "    delivery to provider partly_relayed: 250 2.0.0 Ok: queued as CAPTURE (1 refused) ERROR upstream_refused",
    ]
    story.tells(
        WHOLE,
        trace,
        why=[
            "WHEN  client.example -> here.example, there.example  partly relayed  TIME",
            "  there.example: refused by provider: 550 5.1.1 No such user",
            "  1 recipient: accepted by provider (HOST): 250 2.0.0 Ok: queued as CAPTURE",
            "  trace ID",
        ],
    )
    assert log_of(running, "smtp.connection") == [
        "delivery to provider partly_relayed: 250 2.0.0 Ok: queued as CAPTURE",
        "recipient there.example refused: 550 5.1.1 No such user, said by provider",
        "transaction partly_relayed: 250 2.0.0 Ok: queued as CAPTURE [not for there.example: 550 5.1.1 No such user]",
    ]


def test_buffered_the_one_who_is_refused_is_named_where_all_are_refused(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    upstream.say(UpstreamScript(recipients={"gone@there.example": scripted_reply("550 5.1.1 No such user")}))
    settings = {"upstream.url": upstream.url, "upstream.name": "provider", "delivery.strategy": "buffered"}
    running = start(settings, exporting(receiver))
    with smtplib.SMTP("127.0.0.1", running.port) as client:
        client.ehlo()
        client.mail("a@client.example")
        assert [client.rcpt(one)[0] for one in ("b@here.example", "gone@there.example")] == [250, 250]
        assert client.data(MAIL)[0] == 550
    assert trace_of(receiver, WHOLE) == [
        "connection, ended by quit",
        "  transaction refused: 550 5.1.1 No such user (recipient ...@there.example) (2 refused)",
        "    * there.example refused: 550 5.1.1 No such user, said by provider",
        "    delivery to provider refused: 550 5.1.1 No such user (2 refused) ERROR upstream_refused",
    ]


def test_a_sampler_that_drops_everything_leaves_the_mail_that_lost_a_recipient(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway
) -> None:
    upstream.say(UpstreamScript(recipients={"gone@there.example": scripted_reply("550 5.1.1 No such user")}))
    settings = {"upstream.url": upstream.url, "upstream.name": "provider", "telemetry.keep": ["errors"]}
    running = start(settings, {**exporting(receiver), "OTEL_TRACES_SAMPLER": "always_off"})
    for recipients in (["b@here.example"], ["b@here.example", "gone@there.example"]):
        with smtplib.SMTP("127.0.0.1", running.port) as client:
            client.sendmail("a@client.example", recipients, MAIL)
    assert trace_of(receiver, WHOLE) == [
        "connection, ended by quit",
        "  transaction partly_relayed (1 refused)",
        "    * there.example refused: 550 5.1.1 No such user, said by provider",
        "    delivery to provider partly_relayed: 250 2.0.0 Ok: queued as CAPTURE (1 refused) ERROR upstream_refused",
    ]


# b to e: the upstream cannot be used ---------------------------------------------------------------------------------


def failing_mail(running: GatewayProcess) -> tuple[int, bytes]:
    """The reply to the client about its one recipient, or about its mail."""
    with smtplib.SMTP("127.0.0.1", running.port, timeout=30) as client:
        client.ehlo()
        client.mail("a@client.example")
        code, text = client.rcpt("b@there.example")
        return client.data(MAIL) if code == 250 else (code, text)


UNREACHABLE: Final = "451 4.4.1 No upstream can be reached, try again later"


def failed(span: str, words: str, error: str, reply: str = UNREACHABLE) -> list[str]:
    """The whole trace of a mail whose upstream could not be used."""
    return [
        f"connection, ended by quit ERROR {error}, {words}",
        f"  transaction deferred: {reply} (1 deferred) ERROR {error}, {words}",
        f"    * there.example deferred: {reply}",
        f"    delivery to provider deferred: {span} ERROR {error}, {words}",
    ]


def test_the_certificate_of_the_upstream_is_self_signed(files: Files, story: Story) -> None:
    with CapturingUpstream(tls=files.server_context("localhost")) as upstream:
        settings = {"upstream.url": f"smtp+starttls://localhost:{upstream.port}", "upstream.name": "provider"}
        running = story.start(settings)
        assert failing_mail(running)[0] == 451
        words = "certificate verify failed: unable to get local issuer certificate"
        reply = "451 4.7.5 The upstream's TLS could not be verified"
        story.tells(
            WHOLE,
            failed("no reply", words, "upstream_tls", reply),
            why=[
                "WHEN  client.example -> there.example  deferred  TIME",
                f"  there.example: deferred by this gateway: {reply}",
                f"  deferred by provider (HOST): {words}",
                "  trace ID",
            ],
        )
        assert log_of(running, "smtp.connection") == [
            f"no connection to the upstream: {words}",
            f"delivery to provider deferred: no reply, {words}",
            f"recipient there.example deferred: {reply}",
            f"transaction deferred: {reply} [not for there.example: {reply}], {words}",
        ]


def test_the_name_of_the_upstream_does_not_resolve(story: Story) -> None:
    running = story.start({"upstream.url": "smtp://nowhere.invalid:25", "upstream.name": "provider"})
    assert failing_mail(running)[0] == 451
    [_, _, _, delivery] = trace_of(story.receiver, WHOLE)
    _, _, reason = delivery.partition(": no reply ERROR upstream_unavailable, name resolution failed: ")
    assert reason, delivery  # in the resolver's words, which differ from machine to machine
    words = f"name resolution failed: {reason}"
    story.tells(
        WHOLE,
        failed("no reply", words, "upstream_unavailable"),
        why=[
            "WHEN  client.example -> there.example  deferred  TIME",
            f"  there.example: deferred by this gateway: {UNREACHABLE}",
            f"  deferred by provider (nowhere.invalid:25): {words}",
            "  trace ID",
        ],
    )
    assert f"no connection to the upstream: {words}" in log_of(running, "smtp.connection")


def test_nobody_listens_at_the_upstream(story: Story) -> None:
    settings = {"upstream.url": f"smtp://127.0.0.1:{unclaimed_port()}", "upstream.name": "provider"}
    running = story.start(settings)
    assert failing_mail(running)[0] == 451
    story.tells(
        WHOLE,
        failed("no reply", "connection refused", "upstream_unavailable"),
        why=[
            "WHEN  client.example -> there.example  deferred  TIME",
            f"  there.example: deferred by this gateway: {UNREACHABLE}",
            "  deferred by provider (HOST): connection refused",
            "  trace ID",
        ],
    )
    assert "no connection to the upstream: connection refused" in log_of(running, "smtp.connection")


@pytest.mark.long
def test_the_upstream_does_not_answer_data_in_time(story: Story) -> None:
    without_chunking = tuple(one for one in KEYWORDS if one not in ("CHUNKING", "BINARYMIME"))
    with CapturingUpstream(keywords=without_chunking) as upstream:
        upstream.hold("DATA")
        settings = {"upstream.url": upstream.url, "upstream.name": "provider", "upstream.timeout.data": "200ms"}
        running = story.start(settings)
        assert failing_mail(running)[0] == 451
        words = "no reply to DATA within 0.2 s"
        trace = [
            f"connection, ended by quit ERROR upstream_unavailable, {words}",
            "  transaction deferred: 451 4.4.1 The upstream did not answer in time, try again later (1 deferred) "
            f"ERROR upstream_unavailable, {words}",
            f"    delivery to provider deferred: no reply ERROR upstream_unavailable, {words}",
        ]
        story.tells(
            WHOLE,
            trace,
            why=[
                "WHEN  client.example -> there.example  deferred  TIME",
                "  deferred by provider (HOST): no reply to DATA within TIME",
                "  trace ID",
            ],
        )
        assert f"delivery to provider deferred: no reply, {words}" in log_of(running, "smtp.connection")


# k: relayed after failover -------------------------------------------------------------------------------------------


def test_a_mail_is_relayed_by_the_second_upstream(upstream: CapturingUpstream, story: Story) -> None:
    settings = {
        "upstream.url": f"smtp://127.0.0.1:{unclaimed_port()}",
        "upstream.name": "first",
        "upstream": [{"url": upstream.url, "name": "second"}],
    }
    running = story.start(settings)
    assert failing_mail(running)[0] == 250
    trace = [
        "connection, ended by quit",
        "  transaction relayed",
        "    delivery to first deferred: no reply ERROR upstream_unavailable, connection refused",
        "    delivery to second relayed: 250 2.0.0 Ok: queued as CAPTURE",
    ]
    story.tells(
        lambda spans: len(spans) == 4,
        trace,
        why=[
            "WHEN  client.example -> there.example  relayed  TIME",
            "  deferred by first (HOST): connection refused",
            "  1 recipient: accepted at attempt 2 by second (HOST): 250 2.0.0 Ok: queued as CAPTURE",
            "  trace ID",
        ],
    )
    assert log_of(running, "smtp.connection") == [
        "no connection to the upstream: connection refused",
        "delivery to first deferred: no reply, connection refused",
        "delivery to second relayed: 250 2.0.0 Ok: queued as CAPTURE",
        "transaction relayed: 250 2.0.0 Ok: queued as CAPTURE",
    ]


# j: a client whose TLS handshake fails -------------------------------------------------------------------------------


def test_the_tls_handshake_of_a_client_fails(
    upstream: CapturingUpstream, files: Files, story: Story, connect: Connect
) -> None:
    running = story.start({"upstream.url": upstream.url, **files.listener("starttls", "off")})
    client = connect(running.port)
    client.opens()
    assert client.asks("STARTTLS").startswith("220 ")
    client.say("this is no ClientHello")
    words = "TLS handshake failed: wrong version number"
    story.tells(
        has("smtp.connection"),
        [f"connection, ended by tls_failure ERROR tls, {words}"],
        why=[
            "WHEN  a connection without mail  TIME",
            f"  failed by this gateway: {words}",
            "  trace ID",
        ],
    )
    assert log_of(running, "smtp.connection") == [f"TLS handshake failed: {words}"]
    [line] = [line for line in running.log if line["event"] == "smtp.connection"]
    assert (line["error.type"], line["smtp.failure.reason"]) == ("tls", words)


# f to h: queued mail -------------------------------------------------------------------------------------------------


def queueing(url: str, directory: Path) -> dict[str, Any]:
    return {
        "upstream.url": url,
        "upstream.name": "provider",
        "delivery.mode": "queue",
        "spool.directory": str(directory / "spool"),
        "spool.retry": ["1s"],
    }


def operate(directory: Path, command: str, *ids: str) -> list[dict[str, Any]]:
    """Have an operator's command done."""
    how = [sys.executable, "-m", "otel_smtp.commands.cli", "queue", command, "--spool", str(directory / "spool")]
    if ids:
        how += ["--as", "olga"]
    done = subprocess.run([*how, "--json", *ids], capture_output=True, text=True, timeout=60, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_a_queued_mail_is_deferred_twice_then_bounced(
    upstream: CapturingUpstream, story: Story, tmp_path: Path
) -> None:
    later = scripted_reply("450 4.7.1 Greylisted")
    upstream.say(UpstreamScript(content=(later, later, scripted_reply("550 5.1.1 No such user"))))
    running = story.start(queueing(upstream.url, tmp_path))
    assert failing_mail(running)[0] == 250

    def is_bounced(spans: list[ReceivedSpan]) -> bool:
        return WHOLE(spans) and "bounce" in [span.attributes.get("smtp.message.kind") for span in spans]

    trace = [
        "connection, ended by quit",
        "  transaction queued: 250 2.0.0 Ok trace=ID",
        "    delivery 1 to provider deferred: 450 4.7.1 Greylisted (1 deferred) ERROR upstream_refused",
        "      * there.example deferred: 450 4.7.1 Greylisted, said by provider",
        "    delivery 2 to provider deferred: 450 4.7.1 Greylisted (1 deferred) ERROR upstream_refused",
        "      * there.example deferred: 450 4.7.1 Greylisted, said by provider",
        "    delivery 3 to provider refused: 550 5.1.1 No such user (1 refused) ERROR upstream_refused",
        "      * there.example bounced: 550 5.1.1 No such user, said by provider",
        "    delivery 1 of a bounce about this mail to provider relayed: 250 2.0.0 Ok: queued as CAPTURE",
    ]
    story.tells(
        is_bounced,
        trace,
        why=[
            "WHEN  client.example -> there.example  queued  TIME",
            "  there.example: deferred by provider: 450 4.7.1 Greylisted",
            "  there.example: bounced by provider: 550 5.1.1 No such user",
            "  deferred by provider (HOST): 450 4.7.1 Greylisted",
            "  deferred at attempt 2 by provider (HOST): 450 4.7.1 Greylisted",
            "  refused at attempt 3 by provider (HOST): 550 5.1.1 No such user",
            "  the bounce: accepted by provider (HOST): 250 2.0.0 Ok: queued as CAPTURE",
            "  trace ID  queue id ID",
        ],
    )
    until(lambda: "bounce" in [line.get("smtp.message.kind") for line in running.log] or None, "the bounce's line")
    assert [line for line in log_as_read(running.log) if "transaction" not in line] == [
        "recipient there.example deferred: 450 4.7.1 Greylisted, said by provider",
        "delivery to provider deferred: 450 4.7.1 Greylisted",
        "recipient there.example deferred: 450 4.7.1 Greylisted, said by provider",
        "delivery to provider deferred: 450 4.7.1 Greylisted",
        "recipient there.example bounced: 550 5.1.1 No such user, said by provider",
        "delivery to provider refused: 550 5.1.1 No such user",
        "bounce to provider relayed: 250 2.0.0 Ok: queued as CAPTURE",
    ]


def test_a_queued_mail_expires(story: Story, tmp_path: Path) -> None:
    settings = queueing(f"smtp://127.0.0.1:{unclaimed_port()}", tmp_path)
    running = story.start({**settings, "spool.retry": ["30s"]})
    assert failing_mail(running)[0] == 250
    story.receiver.wait_for_spans(has("smtp.delivery"))
    [queued] = operate(tmp_path, "list")
    operate(tmp_path, "hold", queued["queue_id"])
    operate(tmp_path, "expire", queued["queue_id"])

    def has_expired(spans: list[ReceivedSpan]) -> bool:
        return WHOLE(spans) and "bounce" in [span.attributes.get("smtp.message.kind") for span in spans]

    said = "451 4.4.1 No upstream can be reached, try again later"
    trace = [
        "connection, ended by quit",
        "  transaction queued: 250 2.0.0 Ok trace=ID",
        "    delivery 1 to provider deferred: no reply ERROR upstream_unavailable, connection refused",
        f"      * there.example deferred: {said}",
        "    held in the queue",
        f"      * there.example held: {said}",
        "    given_up in the queue",
        "    expired in the queue ERROR timeout, delivery time expired",
        f"      * there.example expired: {said}",
        "    delivery 1 of a bounce about this mail to provider deferred: no reply ERROR upstream_unavailable, "
        "connection refused",
        f"      * client.example deferred: {said}",
    ]
    story.tells(
        has_expired,
        trace,
        why=[
            "WHEN  client.example -> there.example  queued  TIME",
            f"  there.example: deferred by this gateway: {said}",
            f"  there.example: held by olga: {said}",
            f"  there.example: expired by this gateway: {said}",
            "  deferred by provider (HOST): connection refused",
            "  the bounce: deferred by provider (HOST): connection refused",
            "  trace ID  queue id ID",
        ],
    )
    until(lambda: "smtp.spool" in [line["event"] for line in running.log] or None, "the line")
    told = log_as_read(running.log)
    assert f"recipient there.example expired: {said}" in told
    assert "expired in the queue, delivery time expired" in told


def test_a_queued_mail_is_held_and_released_by_an_operator(
    upstream: CapturingUpstream, story: Story, tmp_path: Path
) -> None:
    upstream.say(UpstreamScript(content=(scripted_reply("450 4.7.1 Greylisted"),)))
    settings = {**queueing(upstream.url, tmp_path), "spool.retry": ["30s"]}
    running = story.start(settings)
    assert failing_mail(running)[0] == 250
    story.receiver.wait_for_spans(has("smtp.delivery"))
    [queued] = operate(tmp_path, "list")
    operate(tmp_path, "hold", queued["queue_id"])
    operate(tmp_path, "release", queued["queue_id"])

    def is_relayed(spans: list[ReceivedSpan]) -> bool:
        return WHOLE(spans) and "relayed" in [span.attributes.get("smtp.outcome") for span in spans]

    trace = [
        "connection, ended by quit",
        "  transaction queued: 250 2.0.0 Ok trace=ID",
        "    delivery 1 to provider deferred: 450 4.7.1 Greylisted (1 deferred) ERROR upstream_refused",
        "      * there.example deferred: 450 4.7.1 Greylisted, said by provider",
        "    held in the queue",
        "      * there.example held: 450 4.7.1 Greylisted",
        "    released in the queue",
        "    delivery 2 to provider relayed: 250 2.0.0 Ok: queued as CAPTURE",
    ]
    story.tells(
        is_relayed,
        trace,
        why=[
            "WHEN  client.example -> there.example  queued  TIME",
            "  there.example: deferred by provider: 450 4.7.1 Greylisted",
            "  there.example: held by olga: 450 4.7.1 Greylisted",
            "  deferred by provider (HOST): 450 4.7.1 Greylisted",
            "  1 recipient: accepted at attempt 2 by provider (HOST): 250 2.0.0 Ok: queued as CAPTURE",
            "  trace ID  queue id ID",
        ],
    )
    until(lambda: "relayed" in [line.get("smtp.outcome") for line in running.log] or None, "it is relayed")
    assert log_as_read(running.log)[-4:] == [
        "recipient there.example held: 450 4.7.1 Greylisted",
        "held in the queue",
        "released in the queue",
        "delivery to provider relayed: 250 2.0.0 Ok: queued as CAPTURE",
    ]


# i: refused by our own policy ----------------------------------------------------------------------------------------


def test_a_recipient_is_refused_by_our_own_policy(upstream: CapturingUpstream, story: Story, connect: Connect) -> None:
    settings = {"upstream.url": upstream.url, "upstream.name": "provider", "limits.recipients": 1}
    running = story.start(settings)
    client = connect(running.port)
    client.opens()
    client.asks("MAIL FROM:<a@client.example>", "RCPT TO:<b@here.example>")
    assert client.asks("RCPT TO:<c@there.example>").startswith("452 4.5.3 Too many recipients")
    assert client.asks("DATA").startswith("354 ")
    assert client.asks(f"{MAIL}.").startswith("250 ")
    client.asks("QUIT")
    trace = [
        "connection, ended by quit",
        "  transaction partly_relayed (1 deferred)",
        "    * there.example deferred: 452 4.5.3 Too many recipients",
        "    delivery to provider relayed: 250 2.0.0 Ok: queued as CAPTURE",
    ]
    story.tells(
        WHOLE,
        trace,
        why=[
            "WHEN  client.example -> here.example, there.example  partly relayed  TIME",
            "  there.example: deferred by this gateway: 452 4.5.3 Too many recipients",
            "  1 recipient: accepted by provider (HOST): 250 2.0.0 Ok: queued as CAPTURE",
            "  trace ID",
        ],
    )
    assert "recipient there.example deferred: 452 4.5.3 Too many recipients" in log_of(running, "smtp.connection")


# The id that people are given ----------------------------------------------------------------------------------------


def test_every_refusal_of_mail_names_the_trace_that_tells_of_it(
    upstream: CapturingUpstream, receiver: OtlpReceiver, start: StartGateway, connect: Connect
) -> None:
    gone = scripted_reply("550 5.1.1 No such user")
    upstream.say(UpstreamScript(recipients={"gone@there.example": gone}, content=(scripted_reply("554 5.7.1 Spam"),)))
    running = start({"upstream.url": upstream.url, "limits.recipients": 1}, exporting(receiver))
    client = connect(running.port)
    client.opens()
    of_mail = client.asks("MAIL FROM:<a@client.example> SIZE=99999999999")
    client.asks("MAIL FROM:<a@client.example>")
    passed_on = client.asks("RCPT TO:<gone@there.example>")
    out_of_turn = client.asks("DATA")
    client.asks("RCPT TO:<b@there.example>")
    own = client.asks("RCPT TO:<c@there.example>")
    client.asks("DATA")
    given = f"00-{'a' * 32}-{'b' * 16}-01"
    of_content = client.asks(f"traceparent: {given}\r\n{MAIL}.")
    out_of_turn_again = client.asks("DATA")
    other = client.asks("NONSENSE")
    client.asks("QUIT")
    spans = receiver.wait_for_spans(WHOLE)
    [connection] = [span for span in spans if span.name == "smtp.connection"]
    trace = f" trace={connection.trace_id}"
    assert [of_mail, passed_on, out_of_turn, own, out_of_turn_again] == [
        "552 5.3.4 Message exceeds the size limit" + trace,
        "550 5.1.1 No such user" + trace,
        "503 5.5.1 No valid recipients" + trace,
        "452 4.5.3 Too many recipients" + trace,
        "503 5.5.1 Bad sequence of commands" + trace,
    ]
    assert of_content == f"554 5.7.1 Spam trace={'a' * 32}"
    assert other == "500 5.5.2 Command not recognized"  # no mail is refused by it
    # The trace does not repeat its own id.
    assert "trace=" not in str([event.attributes for event in connection.events])


def test_refusals_are_plain_where_that_is_set(
    upstream: CapturingUpstream, start: StartGateway, connect: Connect
) -> None:
    running = start({"upstream.url": upstream.url, "telemetry.trace_in_reply": False})
    client = connect(running.port)
    client.opens()
    assert client.asks("DATA") == "503 5.5.1 Bad sequence of commands"
