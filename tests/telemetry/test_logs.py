"""Log lines: one event, one line, readable by machines and by people, forged by nobody."""

import io
import json
import logging
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from otel_smtp.observing import Outcome, fan_out
from otel_smtp.smtp import replies
from otel_smtp.smtp.replies import ErrorType
from otel_smtp.telemetry import attributes as names
from otel_smtp.telemetry.access_log import AccessLog
from otel_smtp.telemetry.logs import (
    ACCESS,
    LINES_A_SECOND,
    STATES,
    FloodGate,
    JsonRenderer,
    LineFormatter,
    StateLogger,
    TextRenderer,
    set_up_logging,
)
from otel_smtp.telemetry.state_events import StateEvents
from otel_smtp.telemetry.tracing import StateTelling, Tracing
from tests.telemetry.driving import Client, Kept


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_time_level_logger_event_and_values() -> None:
    stream = io.StringIO()
    set_up_logging("json", "info", stream)
    logging.getLogger("otel_smtp.server.tls").warning("certificate reloaded", extra={"certificate": "/x.pem", "n": 3})
    [line] = lines(stream)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "otel_smtp.server.tls",
        "event": "certificate reloaded",
        "certificate": "/x.pem",
        "n": 3,
    }


@pytest.mark.parametrize(
    ("format_", "stream", "is_json"),
    [
        ("auto", io.StringIO(), True),
        ("auto", Terminal(), False),
        ("json", Terminal(), True),
        ("text", io.StringIO(), False),
    ],
)
def test_auto_means_text_on_a_terminal_and_json_elsewhere(format_: str, stream: io.StringIO, is_json: bool) -> None:
    set_up_logging(format_, "info", stream)
    logging.getLogger("otel_smtp.x").info("hello")
    assert stream.getvalue().startswith("{") is is_json


def test_the_level_is_for_what_is_ours_libraries_are_heard_from_warning_on() -> None:
    stream = io.StringIO()
    set_up_logging("json", "debug", stream)
    logging.getLogger("otel_smtp.x").debug("ours")
    logging.getLogger("asyncio").info("chatter")
    logging.getLogger("asyncio").warning("theirs")
    assert [line["event"] for line in lines(stream)] == ["ours", "theirs"]


def test_setting_up_again_replaces_what_was_set_up() -> None:
    first, second = io.StringIO(), io.StringIO()
    set_up_logging("json", "info", first)
    set_up_logging("json", "info", second)
    logging.getLogger("otel_smtp.x").info("hello")
    assert (first.getvalue(), len(lines(second))) == ("", 1)


@pytest.mark.parametrize(("format_", "level"), [("yaml", "info"), ("json", "loud")])
def test_an_unknown_format_or_level_is_refused(format_: str, level: str) -> None:
    with pytest.raises(ValueError, match=r"yaml|loud"):
        set_up_logging(format_, level, io.StringIO())


@pytest.mark.parametrize("format_", ["json", "text"])
def test_a_traceback_is_one_line(format_: str) -> None:
    stream = io.StringIO()
    set_up_logging(format_, "info", stream)
    try:
        raise OSError("disk\nfull")
    except OSError:
        logging.getLogger("otel_smtp.x").exception("failed")
    [line] = stream.getvalue().splitlines()
    assert "OSError" in line
    assert "test_logs.py" in line


@pytest.mark.parametrize("render", [JsonRenderer(), TextRenderer(colors=False)])
@given(text=st.text(st.sampled_from('a\0\n\r\t\x1b\x7f\x85\x9b\u2028\u2029\u202e\ud800\udfffé|="')))
def test_whatever_is_logged_stays_in_its_line(render: JsonRenderer | TextRenderer, text: str) -> None:
    record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "%s", "args": (text,), "value": text})
    line = LineFormatter(render).format(record)
    assert len(line.splitlines()) == 1
    assert not any(character < " " or "\x7f" <= character < "\xa0" for character in line)
    line.encode("utf-8")


def access_lines(
    observer_more: dict[str, Any], client_peer: str = "192.0.2.7", **scenario: Any
) -> list[dict[str, Any]]:
    stream = io.StringIO()
    set_up_logging("json", "info", stream)
    client = Client(Tracing(lines=[AccessLog()], **observer_more), peer=client_peer).ehlo().mail().rcpt()
    client.data().header()
    client.deliver(scenario.get("upstream_reply"), scenario["outcome"], error_type=scenario.get("error_type"))
    client.final(scenario.get("reply"), scenario["outcome"]).quit()
    return lines(stream)


def test_a_mail_leaves_a_line_for_its_delivery_its_transaction_and_its_connection() -> None:
    delivery, transaction, connection = access_lines({}, outcome=Outcome.RELAYED, upstream_reply=replies.OK)
    assert [line["event"] for line in (delivery, transaction, connection)] == [
        "smtp.delivery",
        "smtp.transaction",
        "smtp.connection",
    ]
    assert {line["trace_id"] for line in (delivery, transaction, connection)} == {connection["trace_id"]}
    assert len({line["span_id"] for line in (delivery, transaction, connection)}) == 3
    assert {line["smtp.connection.id"] for line in (delivery, transaction, connection)} == {
        connection["smtp.connection.id"]
    }
    assert transaction["smtp.mail.from.domain"] == "example.com"
    assert transaction["smtp.rcpt.domains"] == ["example.net"]
    assert transaction["smtp.outcome"] == "relayed"
    assert transaction["smtp.reply.text"] == delivery["smtp.reply.text"] == "Ok"
    assert (transaction["smtp.reply.code"], transaction["smtp.reply.enhanced_code"]) == (250, "2.0.0")
    assert delivery["smtp.upstream.name"] == "provider"
    assert connection["client.address"] == "192.0.2.7"
    assert connection["smtp.close.reason"] == "quit"
    assert connection["duration"] > transaction["duration"] > delivery["duration"] > 0
    assert {line["level"] for line in (delivery, transaction, connection)} == {"info"}


def test_lines_do_not_depend_on_sampling() -> None:
    assert len(access_lines({"sampler": ALWAYS_OFF}, outcome=Outcome.RELAYED, upstream_reply=replies.OK)) == 3


def test_a_failure_of_ours_is_a_warning() -> None:
    delivery, transaction, connection = access_lines(
        {}, outcome=Outcome.DEFERRED, error_type=ErrorType.UPSTREAM_UNAVAILABLE, reply=replies.UPSTREAM_UNAVAILABLE
    )
    assert (delivery["level"], transaction["level"], connection["level"]) == ("warning", "warning", "warning")
    assert (delivery["error.type"], transaction["error.type"]) == ("upstream_unavailable", "upstream_unavailable")


def through(gate: FloodGate, *, second: int, times: int, name: str = "otel_smtp.x", **fields: Any) -> list[int]:
    """The numbers of suppressed lines that the lines that pass tell, 0 where they tell none."""
    records = [
        logging.makeLogRecord({"name": name, "msg": "no descriptors left", "created": second + 0.5, **fields})
        for _ in range(times)
    ]
    return [getattr(record, names.LOG_SUPPRESSED, 0) for record in records if gate.filter(record)]


def test_lines_alike_are_bounded_in_a_second_and_those_left_out_are_counted() -> None:
    gate = FloodGate()
    assert through(gate, second=1, times=LINES_A_SECOND) == [0] * LINES_A_SECOND
    assert through(gate, second=1, times=1) == []
    assert through(gate, second=1, times=1, msg="another text") == [0]
    assert through(gate, second=1, times=1, name="otel_smtp.y") == [0]
    assert through(gate, second=1, times=9) == []
    assert through(gate, second=2, times=2) == [10, 0]
    assert through(gate, second=3, times=1) == [0]


def test_what_tells_of_mail_is_never_left_out() -> None:
    gate = FloodGate()
    many = 3 * LINES_A_SECOND
    assert len(through(gate, second=1, times=many, name=STATES, msg="smtp.state")) == many
    assert len(through(gate, second=1, times=many, name=ACCESS, msg=names.SPAN_TRANSACTION)) == many
    assert len(through(gate, second=1, times=many, name=ACCESS, msg=names.SPAN_DELIVERY)) == many
    assert len(through(gate, second=1, times=many, name="otel_smtp.spool.runner", msg="message expired")) == many
    carried = {names.CONNECTION_MESSAGES: 1}
    assert len(through(gate, second=1, times=many, name=ACCESS, msg=names.SPAN_CONNECTION, **carried)) == many
    for_nothing = {names.CONNECTION_MESSAGES: 0}
    passed = through(gate, second=1, times=many, name=ACCESS, msg=names.SPAN_CONNECTION, **for_nothing)
    assert len(passed) == LINES_A_SECOND


def test_texts_without_number_take_bounded_memory() -> None:
    gate = FloodGate()
    for number in range(2500):
        assert through(gate, second=1, times=1, msg=f"value {number}") == [0]
    assert len(gate._seconds) <= 1000


def test_a_flood_is_bounded_on_the_stream() -> None:
    stream = io.StringIO()
    set_up_logging("json", "info", stream)
    for _ in range(5000):
        logging.getLogger("otel_smtp.x").warning("refused")
    # However many seconds that takes, in none of them may be more.
    seconds = Counter(line["timestamp"][:19] for line in lines(stream))
    assert max(seconds.values()) == LINES_A_SECOND


def test_a_segment_that_is_over_is_not_a_connection_that_is_closed() -> None:
    stream = io.StringIO()
    set_up_logging("json", "info", stream)
    client = Client(Tracing(lines=[AccessLog()], sinks=[Kept()])).ehlo().rset()
    client.rotate()
    client.rset().quit()
    assert [line["event"] for line in lines(stream)] == ["smtp.connection"]


def test_lines_that_nobody_would_see_are_not_wanted() -> None:
    set_up_logging("json", "warning", io.StringIO())
    assert not AccessLog().is_wanted()
    set_up_logging("json", "info", io.StringIO())
    assert AccessLog().is_wanted()


def test_state_events_in_the_log_are_lines_that_name_their_span() -> None:
    stream, kept = io.StringIO(), Kept()
    set_up_logging("json", "info", stream)
    observer = Tracing(sinks=[kept], state_events=StateEvents.LOG)
    client = (
        Client(fan_out([observer, StateTelling(observer, StateLogger())])).ehlo().refused("RCPT", replies.BAD_SEQUENCE)
    )
    client.quit()
    written = lines(stream)
    assert [(line["event"], line["level"]) for line in written] == [
        ("smtp.state.new", "info"),
        ("smtp.state.active", "info"),
        ("smtp.state.error", "warning"),
        ("smtp.state.closed", "info"),
    ]
    [connection] = kept.records
    assert connection.events == []
    for number, line in enumerate(written, 1):
        assert (line["trace_id"], line["span_id"]) == (connection.context.trace_id_hex, connection.context.span_id_hex)
        assert line["smtp.connection.id"] == client.info.id
        assert line["smtp.state.sequence"] == number


def broken(*_: object) -> Any:
    raise RuntimeError("broken")


class NoText:
    __str__ = broken


def test_what_cannot_be_written_is_told_once_and_on_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    set_up_logging("json", "info", stream)
    logger = logging.getLogger("otel_smtp.server")
    for _ in range(3):
        logger.warning("one", extra={"value": NoText()})
    logger.warning("another")
    told, another = lines(stream)
    assert told["event"] == "log handler raised: lines may be missing, mail is unaffected"
    assert (told["level"], told["handler"], told["about"]) == ("error", "JsonLines", "otel_smtp.server")
    assert told["traceback"].endswith("RuntimeError: broken")
    assert another["event"] == "another"
    assert capfd.readouterr() == ("", "")


def test_a_log_that_can_write_no_line_at_all_says_so_in_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(JsonRenderer, "__call__", broken)
    stream = io.StringIO()
    set_up_logging("json", "info", stream)
    for _ in range(3):
        logging.getLogger("otel_smtp.server").warning("lost")
    [told] = lines(stream)
    assert told["event"].startswith("log handler raised")
    assert told["traceback"].endswith("RuntimeError: broken\n")
    assert capfd.readouterr() == ("", "")


def test_a_stream_that_is_closed_is_no_ones_trouble(capfd: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    set_up_logging("json", "info", stream)
    stream.close()
    logging.getLogger("otel_smtp.server").warning("lost")
    assert capfd.readouterr() == ("", "")
    set_up_logging("json", "info", io.StringIO())


def test_a_filter_that_raises_is_no_trouble_of_who_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FloodGate, "filter", broken)
    stream = io.StringIO()
    set_up_logging("json", "info", stream)
    for _ in range(2):
        logging.getLogger("otel_smtp.server").warning("written")
    assert [line["event"].split(":")[0] for line in lines(stream)] == ["log handler raised", "written", "written"]
