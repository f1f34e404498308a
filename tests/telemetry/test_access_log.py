"""The access log: the quick way and the general way write the same octets, and who gets a line by which."""

import asyncio
import io
import json
import logging
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.logs.v1.logs_pb2 import ScopeLogs
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

from otel_smtp.observing import DeliveryRecord, Endpoint, Observer, Outcome, TransactionRecord, fan_out
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, Mail
from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.access_log import AccessLog
from otel_smtp.telemetry.log_export import log_record_of
from otel_smtp.telemetry.logs import ACCESS, JsonLines, JsonRenderer, LineFormatter
from otel_smtp.telemetry.otlp import LogEncoder
from otel_smtp.telemetry.propagation import SAMPLED, TraceContext
from otel_smtp.telemetry.redaction import Addresses, ClientIp, Redaction
from otel_smtp.telemetry.shapes import Pair
from otel_smtp.telemetry.span_lines import LineShape, LinesOfMail, SpanLineHandler, SpanLinesAsJson, SpanLinesAsOtlp
from otel_smtp.telemetry.tracing import Tracing
from tests.telemetry.cost import House, Traffic, in_batches
from tests.telemetry.driving import Client

TEXT = st.text(st.sampled_from('aZ9 .@"\\/\x7f\u00e9\u2028\U0001f4e7'), min_size=1, max_size=40)
DOMAIN = st.from_regex(r"[a-z\u00e9]{1,8}\.example", fullmatch=True)
OUTCOMES = st.sampled_from(
    [
        (Outcome.RELAYED, None),
        (Outcome.REFUSED, ErrorType.UPSTREAM_REFUSED),
        (Outcome.DEFERRED, ErrorType.UPSTREAM_UNAVAILABLE),
        (Outcome.UNKNOWN, ErrorType.OUTCOME_UNKNOWN),
        (Outcome.QUEUED, None),
    ]
)


class QuickLines(SpanLineHandler):
    """Takes lines both ways; tells which."""

    def __init__(self) -> None:
        super().__init__()
        self.own_filters: list[Any] = []
        self.taken: list[tuple[LineShape, Sequence[Pair], float, TraceContext, int, int]] = []
        self.mails: list[tuple[LinesOfMail, int]] = []
        self.records: list[logging.LogRecord] = []

    def take_line(
        self,
        shape: LineShape,
        pairs: Sequence[Pair],
        duration_seconds: float,
        context: TraceContext,
        time_ns: int,
        now_ns: int,
    ) -> None:
        self.taken.append((shape, pairs, duration_seconds, context, time_ns, now_ns))

    def take_mails(self, mails: Sequence[LinesOfMail], now_ns: int) -> None:
        self.mails += [(mail, now_ns) for mail in mails]

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class Records(logging.Handler):
    """Can take records only."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def logger_with(*handlers: logging.Handler) -> logging.Logger:
    logger = logging.Logger(ACCESS)
    for handler in handlers:
        logger.addHandler(handler)
    return logger


@st.composite
def scenarios(draw: st.DrawFn) -> dict[str, Any]:
    # Half of the mails are ordinary.
    plain = {"code": 250, "spool_id": None, "failure": None, "outcome": Outcome.RELAYED, "error_type": None}
    outcome, error_type = draw(OUTCOMES)
    scenario = {
        "addresses": draw(st.sampled_from([*Addresses])),
        "client_ip": draw(st.sampled_from([*ClientIp])),
        "is_sampled": draw(st.booleans()),
        "sender": draw(st.one_of(st.just(""), DOMAIN.map("a{}@".format), DOMAIN.map("news@{}".format))),
        "recipients": draw(st.lists(DOMAIN.map("bob@{}".format), min_size=1, max_size=4)),
        "body": draw(st.sampled_from([*Body])),
        "words": draw(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1)),
        "code": draw(st.sampled_from([250, 251, 450, 554])),
        "enhanced": draw(
            st.sampled_from([None, EnhancedStatus(2, 0, 0), EnhancedStatus(4, 3, 1), EnhancedStatus(5, 7, 1)])
        ),
        "octets": draw(st.integers(0, 1 << 40)),
        "spool_id": draw(st.none() | TEXT),
        "failure": draw(st.none() | TEXT),
        "outcome": outcome,
        "error_type": error_type,
        # For each mail what our own reply has.
        "mails": draw(st.lists(st.sampled_from([None, EnhancedStatus(2, 0, 0), EnhancedStatus(2, 6, 0)]), max_size=3)),
    }
    return scenario | plain if draw(st.booleans()) else scenario


def drive(tracing: Observer, scenario: dict[str, Any]) -> None:
    """A connection with mails of one kind."""
    client = Client(tracing).ehlo()
    reply = Reply(scenario["code"], scenario["enhanced"], (scenario["words"],), scenario["error_type"])
    for enhanced in scenario["mails"]:
        client.mail(mail=Mail(scenario["sender"], body=scenario["body"]))
        for recipient in scenario["recipients"]:
            client.rcpt(recipient)
        client.data().header()
        client.deliver(reply, scenario["outcome"], error_type=scenario["error_type"])
        transaction: TransactionRecord | None = client.transaction
        assert transaction is not None
        transaction.spool_id, transaction.failure = scenario["spool_id"], scenario["failure"]
        told = reply if reply.code >= 400 else Reply(250, enhanced, ("Ok",))
        client.final(told, scenario["outcome"], octets=scenario["octets"], error_type=scenario["error_type"])
    client.quit()


@given(scenario=scenarios())
def test_all_ways_write_the_same_octets(scenario: dict[str, Any]) -> None:
    quick, general, by_mail = QuickLines(), Records(), QuickLines()
    options: dict[str, Any] = {
        "redaction": Redaction(scenario["addresses"], scenario["client_ip"], hash_key=b"k"),
        "sampler": ALWAYS_ON if scenario["is_sampled"] else ALWAYS_OFF,
    }
    described = Tracing(lines=[AccessLog(logger_with(quick)), AccessLog(logger_with(general))], **options)
    encoding = Tracing(exports=[lambda span, items: None], lines=[AccessLog(logger_with(by_mail))], **options)
    drive(fan_out([described, encoding]), scenario)  # ids and times are the records', so they are the same
    as_json, as_otlp = SpanLinesAsJson(ACCESS), SpanLinesAsOtlp(ACCESS)
    formatter, encoder = LineFormatter(JsonRenderer()), LogEncoder(Resource({}), "1")
    # A connection that brought no mail goes the general way, to both.
    records = general.records if scenario["mails"] else general.records[:-1]
    assert len(quick.taken) == len(records)
    for (shape, pairs, duration, context, time_ns, now_ns), record in zip(quick.taken, records, strict=True):
        now_ns = now_ns // 1000 * 1000  # a record has the microsecond, as a float
        record.created = now_ns / 1e9
        assert as_json(shape, pairs, duration, context, now_ns) == formatter.format(record)
        observed_ns = int(record.created * 1e9)
        encoded = as_otlp(shape, pairs, duration, context, time_ns, observed_ns)
        assert encoded == encoder.record(log_record_of(record))
        [log] = ScopeLogs.FromString(encoded).log_records
        assert log.flags == context.flags
        assert bool(log.flags & SAMPLED) == scenario["is_sampled"]
    of_mails = quick.taken if not by_mail.mails else quick.taken[: 2 * len(by_mail.mails)]
    assert len(by_mail.taken) + 2 * len(by_mail.mails) == len(quick.taken)
    for at, (mail, now_ns) in enumerate(by_mail.mails):
        of_mail = of_mails[2 * at : 2 * at + 2]
        assert as_json.of_mail(mail, now_ns) == tuple(as_json(*one[:4], now_ns) + "\n" for one in of_mail)
        assert as_otlp.of_mail(mail, now_ns) == tuple(as_otlp(*one[:5], now_ns) for one in of_mail)


def drive_queued(tracing: Observer, scenario: dict[str, Any]) -> None:
    """Mails of one kind that are queued, and their attempts."""
    client = Client(tracing).ehlo()
    reply = Reply(scenario["code"], scenario["enhanced"], (scenario["words"],), scenario["error_type"])
    for enhanced in scenario["mails"]:
        mail = Mail(scenario["sender"], body=scenario["body"])
        client.mail(mail=mail)
        for recipient in scenario["recipients"]:
            client.rcpt(recipient)
        client.data().header()
        transaction: TransactionRecord | None = client.transaction
        assert transaction is not None
        spool_id = transaction.spool_id = scenario["spool_id"] or "01j9zq4t3m"
        carrier = tracing.carrier(transaction)
        client.final(Reply(250, enhanced, ("Ok",)), Outcome.QUEUED, octets=scenario["octets"])
        attempted = TransactionRecord.resumed(spool_id, carrier, mail)
        attempted.accepted = transaction.accepted
        delivery = DeliveryRecord(attempted, "sink", Endpoint("192.0.2.1", 25), 1, attempted.begun_ns)
        delivery.peer, delivery.pool_wait_ns = delivery.server, 1000
        delivery.accepted_count = len(attempted.accepted)
        delivery.failure = scenario["failure"]
        delivery.end(scenario["outcome"], reply, scenario["error_type"], attempted.begun_ns + 1_234_567)
        attempted.deliveries.append(delivery)
        tracing.deliveries_settled([delivery])
    client.close()


@given(scenario=scenarios())
def test_the_lines_of_queued_mail_are_those_of_its_descriptions(scenario: dict[str, Any]) -> None:
    described, undescribed = QuickLines(), QuickLines()
    options: dict[str, Any] = {
        "redaction": Redaction(scenario["addresses"], scenario["client_ip"], hash_key=b"k"),
        "sampler": ALWAYS_ON if scenario["is_sampled"] else ALWAYS_OFF,
    }
    describing = Tracing(lines=[AccessLog(logger_with(described))], **options)
    encoding = Tracing(exports=[lambda span, items: None], lines=[AccessLog(logger_with(undescribed))], **options)
    drive_queued(fan_out([describing, encoding]), scenario)
    expected, found = (
        [(shape, [*pairs], *more) for shape, pairs, *more, _ in lines.taken] for lines in (described, undescribed)
    )
    assert len(expected) == 2 * len(scenario["mails"]) + bool(scenario["mails"])
    assert found == expected


def test_the_lines_of_ordinary_queued_mail_need_no_description(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above is for would else be gone unseen."""
    quick, other, names_described = QuickLines(), Records(), []
    take_described = AccessLog.take_described

    def take(self: AccessLog, described: Any, *more: Any) -> None:
        names_described.append(described[0].name)
        take_described(self, described, *more)

    monkeypatch.setattr(AccessLog, "take_described", take)
    tracing = Tracing(exports=[lambda span, items: None], lines=[AccessLog(logger_with(quick))])
    mails: dict[str, Any] = {
        "sender": "news@example.com", "recipients": ["bob@example.net"], "body": None, "words": "Ok", "code": 250,
        "enhanced": None, "octets": 1000, "spool_id": None, "failure": None, "outcome": Outcome.RELAYED,
        "error_type": None, "mails": [None],
    }  # fmt: skip
    drive_queued(tracing, mails)
    assert [shape.name for shape, *_ in quick.taken] == [names.SPAN_TRANSACTION, names.SPAN_DELIVERY, "smtp.connection"]
    assert names_described == ["smtp.connection"]
    follower = AccessLog(logger_with(other))
    tracing.follow(follower)
    drive_queued(tracing, mails)
    assert (len(quick.taken), len(other.records)) == (6, 3), "nobody gets a line twice"


def test_of_an_ordinary_mail_both_lines_are_written_at_once() -> None:
    """What the test above is for would else be gone unseen."""
    quick, other = QuickLines(), Records()
    tracing = Tracing(exports=[lambda span, items: None], lines=[AccessLog(logger_with(quick))])
    client = Client(tracing).ehlo().message()
    assert (len(quick.mails), len(quick.taken)) == (1, 0)
    follower = AccessLog(logger_with(other))
    tracing.follow(follower)
    client.message()
    assert (len(quick.mails), len(quick.taken), len(other.records)) == (1, 2, 2), "nobody gets a line twice"
    tracing.leave(follower)
    client.message()
    assert (len(quick.mails), len(quick.taken), len(other.records)) == (2, 2, 2)


@pytest.mark.parametrize("recipients", [1, 5, 10])
def test_both_lines_of_a_mail_are_given_to_be_written_together(recipients: int) -> None:
    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    written: list[str] = []
    lines = JsonLines(Stream())
    tracing = Tracing(exports=[lambda span, items: None], lines=[AccessLog(logger_with(lines))])
    client = Client(tracing).ehlo().mail()
    domains = [f"{'é' * 55}{number}.example" for number in range(recipients)]
    for domain in domains:
        client.rcpt(f"bob@{domain}")
    client.data().header()
    client.deliver()
    client.final()
    assert len(written) == 1
    told = [json.loads(line) for text in written for line in text.splitlines()]
    assert [line["event"] for line in told] == ["smtp.delivery", "smtp.transaction"]
    assert told[1]["smtp.rcpt.domains"] == domains


def test_a_line_is_parsed_as_it_was_meant() -> None:
    quick = QuickLines()
    Client(Tracing(lines=[AccessLog(logger_with(quick))])).ehlo().message().quit()
    lines = [json.loads(SpanLinesAsJson(ACCESS)(*one[:4], 1_700_000_000_123_456_789)) for one in quick.taken]
    assert [line["event"] for line in lines] == ["smtp.delivery", "smtp.transaction", "smtp.connection"]
    assert {line["timestamp"] for line in lines} == {"2023-11-14T22:13:20.123456Z"}
    assert lines[1]["smtp.rcpt.domains"] == ["example.net"]
    assert "smtp.pool.wait" not in lines[0], "no attribute of log lines"


def test_a_second_that_is_over_is_not_told_again() -> None:
    quick = QuickLines()
    Client(Tracing(lines=[AccessLog(logger_with(quick))])).ehlo().message()
    as_json = SpanLinesAsJson(ACCESS)
    stamps = [json.loads(as_json(*quick.taken[0][:4], second * 10**9))["timestamp"] for second in (1, 1, 2, 60)]
    assert [stamp[17:19] for stamp in stamps] == ["01", "01", "02", "00"]


def no_filter(record: logging.LogRecord) -> bool:
    return True


@pytest.mark.parametrize("what", ["another handler", "a level", "a filter of the handler", "a filter of the logger"])
def test_where_somebody_else_looks_at_lines_records_are_made(what: str) -> None:
    quick = QuickLines()
    logger = logger_with(quick)
    match what:
        case "another handler":
            logger.addHandler(other := Records())
        case "a level":
            quick.setLevel(logging.INFO)
        case "a filter of the handler":
            quick.addFilter(no_filter)
        case _:
            logger.addFilter(no_filter)
    Client(Tracing(lines=[AccessLog(logger)])).ehlo().message().quit()
    events = ["smtp.delivery", "smtp.transaction", "smtp.connection"]
    assert (quick.taken, [record.msg for record in quick.records]) == ([], events)
    if what == "another handler":
        assert [record.msg for record in other.records] == events


def test_handlers_of_parents_count_unless_lines_do_not_go_there() -> None:
    quick, other = QuickLines(), Records()
    logger, parent = logger_with(quick), logger_with(other)
    logger.parent = parent
    access_log = AccessLog(logger)
    Client(Tracing(lines=[access_log])).ehlo().message()
    assert (len(quick.taken), len(quick.records), len(other.records)) == (0, 2, 2)
    logger.propagate = False
    Client(Tracing(lines=[access_log])).ehlo().message()
    assert (len(quick.taken), len(other.records)) == (2, 2)


def test_lines_about_recipients_and_without_mail_are_filtered_as_records() -> None:
    quick = QuickLines()
    tracing = Tracing(lines=[AccessLog(logger_with(quick))])
    Client(tracing).ehlo().quit()
    assert [record.msg for record in quick.records] == [names.SPAN_CONNECTION]
    quick.records.clear()
    client = Client(tracing).ehlo().mail().rcpt().rcpt("x@example.org", replies.BAD_SEQUENCE)
    client.data().header()
    client.deliver()
    client.final()
    assert [record.msg for record in quick.records] == [names.RECIPIENT_EVENT, names.SPAN_TRANSACTION]
    assert [shape.name for shape, *_ in quick.taken] == [names.SPAN_DELIVERY]


def test_a_handler_that_fails_costs_no_observer_and_is_told_of_once(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(QuickLines):
        def take_line(self, *arguments: Any) -> None:
            raise RuntimeError("inside")

    quick = QuickLines()
    tracing = fan_out([Tracing(lines=[AccessLog(logger_with(Failing(), quick))])])
    Client(tracing).ehlo().message().message()
    assert len(quick.taken) == 4
    [told] = caplog.records
    assert told.exc_info is not None
    assert str(told.exc_info[1]) == "inside"
    assert capsys.readouterr().err == "", "which may be a pipe that nobody reads"


# Cost --------------------------------------------------------------------------------------------------------------


async def test_calls_of_a_line() -> None:
    """What an access line costs, written and exported, in calls of Python functions; each mail has two."""
    costs = []
    for log in (False, True):
        house = House(metrics=False, page=False, log=log, soon=in_batches)
        traffic = Traffic()
        for connection in traffic.connections:
            house.observer.connection_opened(connection)
        house.run(traffic.mails(100))
        steps = traffic.mails(100)
        calls = 0

        def count(frame: FrameType, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        house.run(steps)
        sys.setprofile(None)
        await asyncio.sleep(0)
        house.close()
        costs.append(calls / 200)
    assert costs[1] - costs[0] <= 6, costs
