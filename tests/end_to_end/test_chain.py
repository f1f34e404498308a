"""Three gateways one behind the other: a mail is one trace, whatever its header block claims."""

import contextlib
import hashlib
import re
import smtplib
from collections.abc import Iterator
from typing import Final

import pytest

from tests.end_to_end.test_traces import QUICKLY
from tests.support.capture import CapturedMessage, CapturingUpstream
from tests.support.otlp_receiver import OtlpReceiver, ReceivedSpan
from tests.support.process import gateway

GATEWAYS: Final = ("edge", "middle", "last")
TRACE_ID: Final = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID: Final = "b7ad6b7169203331"
APPLICATION: Final = f"00-{TRACE_ID}-{SPAN_ID}-01"
BODY: Final = "From: a@client.example\r\nSubject: x\r\n\r\nHello\r\n"


class Chain:
    """What stands on both ends of it."""

    def __init__(self, port: int, upstream: CapturingUpstream, receiver: OtlpReceiver) -> None:
        self._port = port
        self._upstream = upstream
        self._receiver = receiver

    def send(self, header: bytes) -> tuple[str, CapturedMessage]:
        """Hand in one mail; the trace id that the client is told, and what came out at the far end."""
        before = len(self._upstream.messages)
        with smtplib.SMTP("127.0.0.1", self._port, timeout=15) as client:
            client.ehlo()
            client.mail("a@client.example")
            client.rcpt("b@there.example")
            code, text = client.data(header + BODY.encode())
        assert code == 250
        told = re.fullmatch(rb"2\.0\.0 Ok trace=([0-9a-f]{32})", text)
        assert told is not None
        (message,) = self._upstream.messages[before:]
        return told[1].decode(), message

    def story(self, trace_id: str) -> dict[str, ReceivedSpan]:
        """The transactions and deliveries of a trace, as "edge transaction" and so on."""

        def of_trace(spans: list[ReceivedSpan]) -> dict[str, ReceivedSpan]:
            return {
                f"{span.resource['service.name']} {span.name.removeprefix('smtp.')}": span
                for span in spans
                if span.trace_id == trace_id and span.name != "smtp.connection"
            }

        wanted = 2 * len(GATEWAYS)
        return of_trace(self._receiver.wait_for_spans(lambda spans: len(of_trace(spans)) == wanted))

    def connection(self, span_id: str) -> ReceivedSpan:
        """The connection's span with this id."""

        def found(spans: list[ReceivedSpan]) -> list[ReceivedSpan]:
            return [span for span in spans if span.span_id == span_id]

        (span,) = found(self._receiver.wait_for_spans(lambda spans: bool(found(spans))))
        assert span.name == "smtp.connection"
        return span


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with contextlib.ExitStack() as running:
        upstream = running.enter_context(CapturingUpstream())
        receiver = running.enter_context(OtlpReceiver(with_grpc=False))
        url = upstream.url
        for name in reversed(GATEWAYS):
            # The defaults are what is shown: loopback is believed, and gets our context.
            one = running.enter_context(
                gateway(
                    {"upstream.url": url, "hostname": f"{name}.example"},
                    tmp_path_factory.mktemp(name),
                    environ={
                        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
                        "OTEL_SERVICE_NAME": name,
                        **QUICKLY,
                    },
                )
            )
            url = f"smtp://127.0.0.1:{one.port}"
        yield Chain(one.port, upstream, receiver)
    assert upstream.violations == []


def carried(message: CapturedMessage) -> list[str]:
    """The trace headers of a message that came out."""
    head = message.content.partition(b"\r\n\r\n")[0].decode("utf-8", "replace")
    return re.findall(r"(?im)^(?:traceparent|tracestate):[^\r\n]*", head)


def check_parents(chain: Chain, trace_id: str, message: CapturedMessage) -> dict[str, ReceivedSpan]:
    """Each gateway's delivery hangs below its transaction, and that below the delivery before."""
    story = chain.story(trace_id)
    above: ReceivedSpan | None = None
    for name in GATEWAYS:
        transaction, delivery = story[f"{name} transaction"], story[f"{name} delivery"]
        if above is not None:
            assert transaction.kind == "SERVER"
            assert transaction.parent_span_id == above.span_id
            (link,) = transaction.links
            # Its connection's own span comes when the connection ends, which the gateway above keeps.
            assert link.attributes == {"smtp.link.type": "connection"}
            assert link.trace_id != trace_id
        assert delivery.kind == "CLIENT"
        assert delivery.parent_span_id == transaction.span_id
        assert transaction.attributes["smtp.outcome"] == delivery.attributes["smtp.outcome"] == "relayed"
        above = delivery
    assert above is not None
    first = carried(message)[0]
    assert re.fullmatch(rf"(?i)traceparent: 00-{trace_id}-{above.span_id}-0[0-3]", first)
    # Each gateway's Received has the trace, too: a recipient of the mail can find it.
    head = message.content.partition(b"\r\n\r\n")[0].decode("utf-8", "replace")
    assert head.count(trace_id) == len(GATEWAYS) + 1
    return story


@pytest.mark.xdist_group("chain")
def test_a_mail_through_three_gateways_is_one_trace(chain: Chain) -> None:
    told, message = chain.send(f"traceparent: {APPLICATION}\r\ntracestate: vendor=1\r\n".encode())
    assert told == TRACE_ID
    story = check_parents(chain, TRACE_ID, message)
    assert story["edge transaction"].parent_span_id == SPAN_ID
    assert story["edge transaction"].kind == "SERVER"
    assert [line.lower() for line in carried(message)[1:]] == ["tracestate: vendor=1"]
    assert message.content.endswith(BODY.encode())


@pytest.mark.xdist_group("chain")
def test_a_mail_without_a_trace_is_one_trace_from_the_first_gateway_on(chain: Chain) -> None:
    told, message = chain.send(b"")
    story = check_parents(chain, told, message)
    assert chain.connection(story["edge transaction"].parent_span_id).trace_id == told
    assert len(carried(message)) == 1


OTHER: Final = f"00-{'c' * 32}-{'d' * 16}-01"
NOT_BELIEVED: Final = {
    "doubled": f"traceparent: {APPLICATION}\r\ntraceparent: {APPLICATION}\r\n",
    "two that differ": f"traceparent: {APPLICATION}\r\nSubject: y\r\nTRACEPARENT: {OTHER}\r\n",
    "capitals": f"traceparent: {APPLICATION.upper()}\r\n",
    "version ff": f"traceparent: ff{APPLICATION[2:]}\r\n",
    "version 00 with more": f"traceparent: {APPLICATION}-more\r\n",
    "no trace id": f"traceparent: 00-{'0' * 32}-{SPAN_ID}-01\r\n",
    "no span id": f"traceparent: 00-{TRACE_ID}-{'0' * 16}-01\r\n",
    "cut": f"traceparent: {APPLICATION[:-4]}\r\n",
    "empty": "traceparent:\r\n",
    "not ASCII": f"traceparent: {APPLICATION}ü\r\n",
    "a terminal's escape": f"traceparent: {APPLICATION[:-1]}\x1b[2J\r\n",
    "900 octets": f"traceparent: {'0' * 900}\r\n",
    "64 KiB, folded": f"traceparent: {APPLICATION}\r\n" + f" {'0' * 900}\r\n" * 70,
    "hundreds": f"traceparent: {APPLICATION}\r\n" * 500,
    "tracestate alone": "tracestate: vendor=1\r\n",
}


@pytest.mark.parametrize("header", NOT_BELIEVED.values(), ids=NOT_BELIEVED)
@pytest.mark.xdist_group("chain")
def test_a_trace_that_is_not_well_formed_is_replaced_by_ours(chain: Chain, header: str) -> None:
    told, message = chain.send(header.encode())
    assert told not in (TRACE_ID, "c" * 32)
    story = check_parents(chain, told, message)
    assert all(link.trace_id == told for link in story["edge transaction"].links)
    assert len(carried(message)) == 1
    assert message.content.endswith(BODY.encode())


STATES_NOT_TAKEN: Final = {
    "no member": "tracestate: nothing\r\n",
    "doubled key": "tracestate: a=1,a=2\r\n",
    "33 members": f"tracestate: {','.join(f'a{number}=1' for number in range(33))}\r\n",
    "513 octets": f"tracestate: a={'x' * 255},b={'x' * 253}\r\n",
    "8 KiB, folded": "tracestate: a=1,\r\n"
    + "".join(f" b{number}={'x' * 200},\r\n" for number in range(40))
    + " z=1\r\n",
    "not ASCII": "tracestate: a=ü\r\n",
    "a terminal's escape": "tracestate: a=\x1b[2J\r\n",
}


@pytest.mark.parametrize("header", STATES_NOT_TAKEN.values(), ids=STATES_NOT_TAKEN)
@pytest.mark.xdist_group("chain")
def test_a_tracestate_that_is_not_well_formed_goes_no_further_and_costs_no_trace(chain: Chain, header: str) -> None:
    # A trace of its own, so that its spans are told from those of the other rows.
    trace_id = hashlib.md5(header.encode()).hexdigest()
    told, message = chain.send(f"traceparent: 00-{trace_id}-{SPAN_ID}-01\r\n{header}".encode())
    assert told == trace_id
    check_parents(chain, trace_id, message)
    assert len(carried(message)) == 1
