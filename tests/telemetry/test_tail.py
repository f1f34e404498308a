"""Lines of mails for who follows a gateway: nothing while nobody does, and no waiting for anybody."""

import pytest
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler

from otel_smtp.telemetry.span_lines import LineOfSpan
from otel_smtp.telemetry.tail import MailTail
from otel_smtp.telemetry.terminal_log import colored
from otel_smtp.telemetry.tracing import Tracing
from tests.telemetry.driving import Client


class KeptLines:
    def __init__(self) -> None:
        self.records: list[object] = []

    def take_described(self, *described: object) -> None:
        self.records.append(described)

    def take_line(self, line: LineOfSpan) -> bool:
        return False

    def writer_of_mails(self) -> None:
        return None


def mails(tracing: Tracing, number: int = 1) -> None:
    client = Client(tracing).ehlo()
    for _ in range(number):
        client.message()
    client.quit()


@pytest.mark.parametrize("sampler", [ALWAYS_ON, ALWAYS_OFF])
async def test_whoever_follows_gets_a_line_a_mail_sampled_or_not(sampler: Sampler) -> None:
    tracing = Tracing(sampler=sampler)
    tail = MailTail(tracing)
    tail.start()
    mails(tracing, 2)
    lines, last, missed = await tail.after(0, 10)
    assert (len(lines), last, missed) == (2, 2, 0)
    assert [line.number for line in lines] == [1, 2]
    assert " + 250 " in lines[0].text
    assert lines[0].outcome == "relayed"
    assert len(str(lines[0].fields["trace_id"])) == 32
    assert "smtp.upstream.name" in lines[0].fields, "the delivery's part of it"
    assert "levelno" not in lines[0].fields
    assert await tail.after(2, 10) == ([], 2, 0)


async def test_nothing_is_made_while_nobody_follows() -> None:
    taken: list[object] = []

    class Sampled(Tracing):
        def _tell_lines(self, *arguments: object) -> None:
            taken.append(arguments)

    tracing = Sampled()
    tail = MailTail(tracing)
    mails(tracing)
    assert taken == [], "no line is made of a span"
    tail.start()
    tail.start()
    mails(tracing)
    number = len(taken)
    assert number > 0
    tail.stop()
    tail.stop()
    mails(tracing)
    assert len(taken) == number
    assert await tail.after(0, 10) == ([], 0, 0)


async def test_other_listeners_stay() -> None:
    kept = KeptLines()
    tracing = Tracing(lines=[kept], sampler=ALWAYS_OFF)
    tail = MailTail(tracing)
    tail.start()
    tracing.tell([kept])
    mails(tracing)
    assert len((await tail.after(0, 10))[0]) == 1, "a reload of the settings takes no follower away"
    tail.stop()
    number = len(kept.records)
    mails(tracing)
    assert len(kept.records) == 2 * number > 0


async def test_a_slow_reader_is_told_what_it_missed() -> None:
    tracing = Tracing()
    tail = MailTail(tracing, held=5)
    tail.start()
    for _ in range(3):
        mails(tracing)
        await tail.last()
    first, last, missed = await tail.after(0, 2)
    assert ([line.number for line in first], last, missed) == ([1, 2], 2, 0)
    for _ in range(9):
        mails(tracing)
        await tail.last()
    lines, last, missed = await tail.after(last, 10)
    assert ([line.number for line in lines], last, missed) == ([8, 9, 10, 11, 12], 12, 5)


async def test_records_beyond_the_bound_are_missed_too() -> None:
    tracing = Tracing()
    tail = MailTail(tracing, held=6)
    tail.start()
    mails(tracing, 50)  # three records each or so, and nobody looks
    lines, last, missed = await tail.after(0, 100)
    assert 0 < len(lines) <= 6
    assert missed > 40
    assert last == missed + len(lines)


async def test_a_number_of_another_process_begins_at_the_first_line() -> None:
    tracing = Tracing()
    tail = MailTail(tracing)
    tail.start()
    mails(tracing)
    lines, last, missed = await tail.after(1000, 10)
    assert (len(lines), last, missed) == (1, 1, 0)


def test_colours_are_those_of_mark_and_code() -> None:
    text = "22:14:03.120 x 550 example.com -> example.org"
    assert colored(text, "refused") == "\x1b[2m22:14:03.120 \x1b[0m\x1b[31mx 550\x1b[0m example.com -> example.org"


async def test_a_line_that_cannot_be_made_is_missed_and_takes_no_other_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracing = Tracing()
    tail = MailTail(tracing)
    tail.start()
    mails(tracing, 3)
    first = tail._records[0]  # as the log has it: of a delivery, whose transaction's line comes next
    first.msg = Broken()
    lines, last, missed = await tail.after(0, 10)
    assert (len(lines), last, missed) == (3, 4, 1)
    assert [record.levelname for record in caplog.records if record.name == "otel_smtp.telemetry.tail"] == ["ERROR"]


class Broken:
    def __str__(self) -> str:
        raise ValueError("a fault")
