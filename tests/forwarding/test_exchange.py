"""Exchanges on one connection: everything is answered, or the connection is out of step."""

import asyncio
import math

import pytest

from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.faults import ConnectionLost, OutOfStep, TimedOut, UpstreamFault
from otel_smtp.forwarding.settings import Timeouts
from otel_smtp.smtp.client import NO_ANSWERS, Awaited, ExchangeAnswers
from otel_smtp.smtp.envelope import Mail, Recipient
from tests.support.fake_stream import FakeStream

TIMEOUTS = Timeouts(connect=1, greeting=2, command=3, data=4, block=5, reply=6, pool=7)
EHLO = b"250-up\r\n250-PIPELINING\r\n250 CHUNKING\r\n"


class Ends:
    """How exchanges ended, in order."""

    def __init__(self) -> None:
        self.answers: list[list[int]] = []
        self.faults: list[UpstreamFault | None] = []

    def __call__(self, answers: ExchangeAnswers, fault: UpstreamFault | None) -> None:
        self.answers.append([answer.reply.code for answer in answers])
        self.faults.append(fault)


async def greeted(ehlo: bytes = EHLO) -> tuple[UpstreamConnection, FakeStream]:
    """A connection that has been greeted, and its far end."""
    stream = FakeStream()
    connection = UpstreamConnection(stream, TIMEOUTS)
    stream.feed(b"220 up\r\n")
    assert [answer.verb for answer in await connection.settled()] == [Awaited.GREETING]
    connection.protocol.send_hello("gw.example")
    asyncio.get_running_loop().call_soon(stream.feed, ehlo)
    await connection.settled()
    assert connection.is_alive
    stream.writes.clear()
    return connection, stream


def queue_envelope(connection: UpstreamConnection) -> None:
    connection.protocol.send_envelope(Mail("a@example.com"))
    for name in ("b", "c"):
        connection.protocol.send_envelope(None, [Recipient(f"{name}@example.com")])


@pytest.mark.both_loops
async def test_a_group_is_one_write_and_one_call_back() -> None:
    connection, stream = await greeted()
    ends = Ends()
    before = connection.round_trips
    queue_envelope(connection)
    connection.exchange(ends)
    assert len(stream.writes) == 1
    stream.feed(b"250 ok\r\n550 n")
    stream.feed(b"o\r\n")
    assert ends.answers == []
    stream.feed(b"250 ok\r\n")
    assert (ends.answers, ends.faults) == ([[250, 550, 250]], [None])
    assert connection.is_alive
    assert connection.round_trips - before == 1
    connection.check_deadline(math.inf)  # nothing is late
    assert connection.is_alive


async def test_without_pipelining_a_refusal_takes_back_what_was_not_sent() -> None:
    connection, stream = await greeted(b"250 up\r\n")
    ends = Ends()
    queue_envelope(connection)
    connection.exchange(ends, stop_at=frozenset({Awaited.MAIL}))
    stream.feed(b"550 no\r\n")
    assert ends.answers == [[550]]
    assert connection.is_alive
    queue_envelope(connection)
    connection.exchange(ends, stop_at=frozenset({Awaited.MAIL}))
    for _ in range(3):
        stream.feed(b"250 ok\r\n")
    assert ends.answers[1] == [250, 250, 250]
    assert len(stream.writes) == 4


@pytest.mark.parametrize(
    ("arrives", "answers", "fault"),
    [
        (b"250 ok\r\nwhat\r\n", [250], OutOfStep),
        (b"250 ok\r\n354 go\r\n", [250], OutOfStep),
        (b"250 ok\r\n421 bye\r\n", [250, 421], ConnectionLost),
        (b"421 bye\r\nwhat\r\n", [421], ConnectionLost),
    ],
)
async def test_answers_before_a_fault_count(arrives: bytes, answers: list[int], fault: type[UpstreamFault]) -> None:
    connection, stream = await greeted()
    ends = Ends()
    queue_envelope(connection)
    connection.exchange(ends)
    stream.feed(arrives)
    stream.feed(b"250 ok\r\n")
    stream.feed_eof()
    assert ends.answers == [answers]
    assert type(ends.faults[0]) is fault
    assert not connection.is_alive
    connection.close()
    assert stream.writes[1:] == []  # no QUIT: it would be said in the middle of something


async def test_an_answer_that_was_read_counts_though_the_connection_ends_behind_it() -> None:
    connection, stream = await greeted()
    ends = Ends()
    connection.protocol.send_reset()
    connection.exchange(ends)
    stream.feed(b"250 ok\r\n")
    stream.feed_eof()
    assert (ends.answers, ends.faults) == ([[250]], [None])
    assert not connection.is_alive


async def test_the_end_of_the_connection_ends_the_exchange_once() -> None:
    connection, stream = await greeted()
    ends = Ends()
    queue_envelope(connection)
    connection.exchange(ends)
    stream.feed(b"250 ok\r\n")
    stream.feed_eof()
    stream.lose()
    assert ends.answers == [[250]]
    assert isinstance(ends.faults[0], ConnectionLost)


# Between two exchanges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrives", "fault"),
    [
        (b"421 4.3.2 bye\r\n", ConnectionLost),
        (b"4", ConnectionLost),  # what becomes of it is not known yet; the connection is of no use either way
        (b"250 late\r\n", OutOfStep),
        (b"what\r\n", OutOfStep),
        (b"250-a reply that is not whole\r\n", ConnectionLost),
        (None, ConnectionLost),
    ],
)
async def test_a_connection_of_which_something_is_heard_unasked_is_not_used(
    arrives: bytes | None, fault: type[UpstreamFault]
) -> None:
    connection, stream = await greeted()
    lost: list[UpstreamConnection] = []
    connection.on_lost = lost.append
    if arrives is None:
        stream.feed_eof()
    else:
        stream.feed(arrives)
    assert lost[0] is connection
    assert not connection.is_alive
    with pytest.raises(UpstreamFault) as caught:
        connection.ensure_alive()
    assert type(caught.value) is fault
    assert (caught.value.upstream_reply is not None) == (arrives is not None and arrives.startswith(b"421"))


async def test_a_surplus_behind_the_last_answer_is_seen_before_the_next_exchange() -> None:
    connection, stream = await greeted()
    ends = Ends()
    connection.protocol.send_reset()
    connection.exchange(ends)
    stream.feed(b"250 ok\r\n250 late\r\n")
    assert (ends.answers, ends.faults) == ([[250]], [None])
    assert not connection.is_alive
    with pytest.raises(OutOfStep):
        connection.ensure_alive()


async def test_a_421_between_two_steps_of_opening_is_a_lost_connection() -> None:
    connection, stream = await greeted()
    stream.feed(b"421 bye\r\n")
    with pytest.raises(ConnectionLost):
        await connection.settled()


# Time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ask", "seconds"), [("RSET", 3), ("DATA", 4), ("BDAT", 6)])
async def test_each_answer_has_its_own_time(ask: str, seconds: float) -> None:
    connection, stream = await greeted()
    ends = Ends()
    protocol = connection.protocol
    {"RSET": protocol.send_reset, "DATA": protocol.send_data, "BDAT": protocol.send_last_chunk}[ask]()
    before = asyncio.get_running_loop().time()
    connection.exchange(ends)
    assert before + seconds <= connection.deadline <= asyncio.get_running_loop().time() + seconds
    deadline = connection.deadline
    stream.feed(b"250-trickling\r\n2")
    assert connection.deadline == deadline  # octets buy no time
    connection.check_deadline(deadline - 0.001)
    assert ends.faults == []
    connection.check_deadline(deadline)
    connection.check_deadline(deadline + 1)
    assert [type(fault) for fault in ends.faults] == [TimedOut]
    assert not connection.is_alive


async def test_an_answer_buys_time_for_the_next_one() -> None:
    connection, stream = await greeted()
    ends = Ends()
    queue_envelope(connection)
    connection.protocol.send_data()
    connection.exchange(ends)
    stream.feed(b"250 ok\r\n250 ok\r\n250 ok\r\n")
    assert connection.deadline > asyncio.get_running_loop().time() + 3.5  # DATA's time, from now on
    stream.feed(b"354 go\r\n")
    assert ends.answers == [[250, 250, 250, 354]]
    connection.check_deadline(math.inf)
    assert ends.faults == [None]


async def test_an_idle_connection_has_no_deadline() -> None:
    connection, _ = await greeted()
    connection.check_deadline(1e12)
    assert connection.is_alive


async def test_nobody_is_called_for_an_exchange_that_was_abandoned() -> None:
    connection, stream = await greeted()
    ends = Ends()
    connection.protocol.send_reset()
    connection.exchange(ends)
    connection.abandon()
    stream.feed(b"250 ok\r\n")
    connection.check_deadline(1e12)
    assert ends.answers == []
    assert not connection.is_alive  # its late answer belongs to no other exchange


# Content ------------------------------------------------------------------------------------------------------


async def in_content() -> tuple[UpstreamConnection, FakeStream]:
    connection, stream = await greeted(b"250 up\r\n")
    connection.protocol.send_data()
    connection.exchange(Ends())
    stream.feed(b"354 go\r\n")
    return connection, stream


async def test_content_waits_while_the_upstream_does_not_take_it() -> None:
    connection, stream = await in_content()
    ends, writable = Ends(), Ends()
    connection.protocol.send_content(b"one\r\n")
    assert connection.send_content(ends, lambda: writable(NO_ANSWERS, None))
    assert connection.deadline == math.inf
    stream.stop_taking()
    connection.protocol.send_content(b"two\r\n")
    assert not connection.send_content(ends, lambda: writable(NO_ANSWERS, None))
    assert asyncio.get_running_loop().time() + 4.9 < connection.deadline
    assert writable.faults == []
    stream.resume_writing()
    stream.resume_writing()
    assert len(writable.faults) == 1
    connection.protocol.end_content()
    connection.exchange(ends)
    stream.feed(b"250 ok\r\n")
    assert ends.answers == [[250]]
    assert stream.sent.endswith(b"one\r\ntwo\r\n.\r\n")


@pytest.mark.parametrize("how", ["time", "loss", "end", "refusal", "421", "2yz"])
async def test_content_that_is_cut_off_is_written_no_further(how: str) -> None:
    connection, stream = await in_content()
    ends = Ends()
    stream.stop_taking()
    connection.protocol.send_content(b"one\r\n")
    assert not connection.send_content(ends, lambda: pytest.fail("written further"))
    match how:
        case "time":
            connection.check_deadline(connection.deadline)
        case "loss":
            stream.lose()
        case "end":
            stream.feed_eof()
        case "refusal":
            stream.feed(b"552 enough\r\n")
        case "421":
            stream.feed(b"421 bye\r\n")
        case _:
            stream.feed(b"250 trust me\r\n")
    expected = {"time": TimedOut, "refusal": type(None), "2yz": OutOfStep}.get(how, ConnectionLost)
    assert [type(fault) for fault in ends.faults] == [expected]
    assert ends.answers == [{"refusal": [552], "421": [421]}.get(how, [])]
    stream.resume_writing()
    assert not connection.is_alive


async def test_content_is_not_given_to_a_connection_that_has_ended() -> None:
    connection, stream = await in_content()
    stream.feed_eof()
    ends = Ends()
    connection.protocol.send_content(b"one\r\n")
    assert not connection.send_content(ends, lambda: pytest.fail("written further"))
    assert isinstance(ends.faults[0], ConnectionLost)
