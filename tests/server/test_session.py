"""One session: what it makes of its forwarder, of time, and of a client that vanishes."""

import asyncio
import gc
import ipaddress
import random
import ssl
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar, Final

import argon2
import pytest

from otel_smtp.forwarding.base import DeliveryFailed
from otel_smtp.net.stream import RECEIVE_BUFFER_OCTETS
from otel_smtp.observing import Endpoint, Fate, Outcome
from otel_smtp.server.exchanges import Authenticator
from otel_smtp.server.guesses import GUESS_SECONDS
from otel_smtp.server.places import Standing
from otel_smtp.server.policy import ListenerPolicy, Segments, ServerTimeouts, is_in
from otel_smtp.server.users import Argon2Hash, Users
from otel_smtp.smtp import replies
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.policy import ServerLimits, ServerPolicy
from otel_smtp.smtp.replies import EnhancedStatus, ErrorType, Reply
from otel_smtp.smtp.states import CloseReason, TlsMode
from tests.server.keeping import KeepingForwarder, Noting, WatchedServer, Watching
from tests.support.clock import advance
from tests.support.fake_stream import PEER, FakeStream
from tests.support.known_password import KnownPassword
from tests.support.waiting import until

EVERYONE = (ipaddress.ip_network("0.0.0.0/0"),)
POLICY = ListenerPolicy("local", ServerPolicy("gw.example.com"), ServerTimeouts(), allow=EVERYONE)
ENVELOPE = b"EHLO client.example\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\n"
CONTENT = b"Subject: hello\r\n\r\nbody\r\n"
MESSAGE = ENVELOPE + b"DATA\r\n" + CONTENT + b".\r\n"


class Served:
    """A connection being served, and both of its sides."""

    observed_by: ClassVar[type[Noting]] = Noting

    def __init__(
        self,
        policy: ListenerPolicy = POLICY,
        *,
        early: bytes = b"",
        segments: Segments | None = None,
        stream: FakeStream | None = None,
    ) -> None:
        self.stream = stream or FakeStream()
        if early:
            self.stream.feed(early)
        self.forwarder = KeepingForwarder()
        self.observer = self.observed_by()
        self.server = WatchedServer(self.forwarder, self.observer, segments=segments)
        self.session, self.end = self.server.serve(policy, self.stream)
        (self.seen,) = self.observer.connections

    async def greeted(self) -> None:
        await self.stream.sends(b"otel_smtp\r\n")

    async def ended(self) -> None:
        async with asyncio.timeout(5):
            await self.end


@asynccontextmanager
async def serving(policy: ListenerPolicy = POLICY, *, segments: Segments | None = None) -> AsyncIterator[Served]:
    served = Served(policy, segments=segments)
    try:
        await served.greeted()
        yield served
    finally:
        served.session.cancel()
        await served.ended()


async def turns() -> None:
    """Let the session do what it can do at once."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture(params=[Noting, Watching], ids=["unwatched", "watched"], autouse=True)
def each_kind_of_observer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session has more to do where somebody asks for transitions; it must leave nothing else to that."""
    monkeypatch.setattr(Served, "observed_by", request.param)


async def test_a_mail_goes_through_and_its_reply_names_the_trace() -> None:
    async with serving() as served:
        served.stream.feed(MESSAGE + b"QUIT\r\n")
        await served.ended()
        assert b"250 2.0.0 Ok trace=" + b"5" * 32 + b"\r\n221" in served.stream.sent
        (kept,) = served.forwarder.kept
        assert kept.is_accepted
        received, subject, content = kept.content.partition(b"Subject")
        assert received.startswith(b"Received: from client.example")
        assert b"5" * 32 in received
        assert subject + content == CONTENT
        assert served.seen.states == "New Active Data Active Idle Closed"
        assert served.seen.close_reason is CloseReason.QUIT
        assert served.seen.transactions[0].outcome is Outcome.RELAYED
        assert served.seen.transactions[0].octets == len(CONTENT)
        assert served.seen.transactions[0].added_octets == len(received)


def pipelined(chance: random.Random) -> tuple[bytes, list[bytes]]:
    """What a client says without waiting, and the codes of its replies."""
    said, codes = [b"EHLO client.example\r\n"], [b"250"]
    for _ in range(chance.randint(1, 4)):
        recipients = chance.randint(1, 3)
        said += [b"MAIL FROM:<a@example.com>\r\n", b"RCPT TO:<b@example.org>\r\n" * recipients]
        codes += [b"250"] * (1 + recipients)
        match chance.randrange(5):
            case 0:
                said += [b"RSET\r\n", b"NOOP\r\n", b"VERB\r\n"]
                codes += [b"250", b"250", b"500"]
            case 1:
                first = chance.randint(1, len(CONTENT) - 1)
                said += [b"BDAT %d\r\n" % first, CONTENT[:first]]
                said += [b"BDAT %d LAST\r\n" % (len(CONTENT) - first), CONTENT[first:]]
                codes += [b"250", b"250"]
            case _:
                said += [b"DATA\r\n", CONTENT, b".\r\n"]
                codes += [b"354", b"250"]
    return b"".join(said), codes


@pytest.mark.parametrize("ends", [b"QUIT\r\n", None], ids=["QUIT", "sends no more"])
async def test_whatever_comes_while_a_decision_is_awaited_is_served_after_it(ends: bytes | None) -> None:
    """However octets are cut, and whichever answers come late: a client that was paused is heard again."""
    for seed in range(200):
        chance = random.Random(seed)
        said, codes = pipelined(chance)
        cuts = sorted(chance.sample(range(1, len(said)), chance.randrange(6)))
        async with serving() as served:
            stream = served.stream
            for begin, end in pairwise([0, *cuts, len(said)]):
                late = asyncio.Event()
                served.forwarder.hold = late if chance.random() < 0.5 else None
                served.forwarder.hold_recipients = late if chance.random() < 0.5 else None
                stream.feed(said[begin:end])
                if chance.random() < 0.5:
                    await turns()
                late.set()
                if chance.random() < 0.5:
                    await turns()
            if ends is None:
                stream.feed_eof()
            else:
                stream.feed(ends)
                codes.append(b"221")
            await served.ended()
            told = [line[:3] for line in stream.sent.splitlines()[1:] if line[3:4] == b" "]
            assert told == codes, f"seed {seed}"


async def test_the_received_field_says_how_each_mail_came() -> None:
    said = b"MAIL FROM:<a@example.com>%b\r\nRCPT TO:<b@example.org>\r\nDATA\r\n" + CONTENT + b".\r\n"
    async with serving() as served:
        served.stream.feed(b"EHLO client.example\r\n")
        for parameters in (b"", b" SMTPUTF8", b""):
            served.stream.feed(said % parameters)
            await served.stream.sends(b"250 2.0.0 Ok trace=")
        words = [kept.content.partition(b" with ")[2].split()[0] for kept in served.forwarder.kept]
        assert words == [b"ESMTP", b"UTF8SMTP", b"ESMTP"]


async def test_an_lmtp_client_gets_the_verdict_of_each_recipient() -> None:
    policy = replace(POLICY, protocol=replace(POLICY.protocol, is_lmtp=True))
    full = Reply(552, EnhancedStatus(5, 2, 2), ("full",), ErrorType.UPSTREAM_REFUSED)
    async with serving(policy) as served:
        served.forwarder.final = full
        served.forwarder.verdicts = (replies.OK, full)
        served.stream.feed(
            b"LHLO c.example\r\nMAIL FROM:<a@c.example>\r\nRCPT TO:<b@d.example>\r\nRCPT TO:<c@d.example>\r\n"
            b"RCPT TO:<d@d.example>\r\nDATA\r\n"
        )
        await served.stream.sends(b"354 ")
        served.stream.feed(b"Subject: x\r\n\r\nx\r\n.\r\nQUIT\r\n")
        await served.ended()
        assert [line[:9] for line in served.stream.sent.splitlines()[-4:]] == [
            b"250 2.0.0",
            b"552 5.2.2",
            b"552 5.2.2",
            b"221 2.0.0",
        ]


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_message_that_some_lmtp_recipient_got_was_taken_whichever_that_is(is_first: bool) -> None:
    policy = replace(POLICY, protocol=replace(POLICY.protocol, is_lmtp=True))
    full = Reply(552, EnhancedStatus(5, 2, 2), ("full",), ErrorType.UPSTREAM_REFUSED)
    async with serving(policy) as served:
        served.forwarder.final = full
        served.forwarder.verdicts = (replies.OK, full) if is_first else (full, replies.OK)
        served.stream.feed(
            b"LHLO c.example\r\nMAIL FROM:<a@c.example>\r\nRCPT TO:<b@d.example>\r\nRCPT TO:<c@d.example>\r\n"
            b"DATA\r\nSubject: x\r\n\r\nx\r\n.\r\nQUIT\r\n"
        )
        await served.ended()
        assert served.seen.states == "New Active Data Active Error Idle Closed"
        assert served.seen.transactions[0].outcome is Outcome.PARTLY_RELAYED


async def test_a_pipelined_group_of_recipients_is_one_batch_and_its_replies_one_write() -> None:
    async with serving() as served:
        served.forwarder.refuses["bad@example.org"] = replies.RELAY_DENIED
        before = len(served.stream.writes)
        recipients = [b"b@example.org", b"bad@example.org", b"d@example.org"]
        served.stream.feed(
            b"EHLO c\r\nMAIL FROM:<>\r\n" + b"".join(b"RCPT TO:<%s>\r\n" % r for r in recipients) + b"DATA\r\n"
        )
        await served.stream.sends(b"354 ")
        assert served.forwarder.batches == [3]
        assert len(served.stream.writes) == before + 1
        assert [reply.code for verb, reply in served.seen.replies if verb == "RCPT"] == [250, 550, 250]
        record = served.forwarder.kept[0].record
        assert [recipient.address for recipient in record.accepted] == ["b@example.org", "d@example.org"]
        assert [(one.recipient.address, one.fate, one.reply) for one in record.refused] == [
            ("bad@example.org", Fate.REFUSED, replies.RELAY_DENIED)
        ]


async def test_without_a_trace_in_the_reply_it_is_plain() -> None:
    async with serving(replace(POLICY, trace_in_reply=False)) as served:
        served.stream.feed(MESSAGE)
        await served.stream.sends(b"250 2.0.0 Ok\r\n")


@pytest.mark.parametrize("step", ["begin", "recipients", "content", "write", "finish"])
async def test_a_bug_in_the_forwarder_is_451_and_the_session_lives(step: str) -> None:
    async with serving() as served:

        def fail(at: str) -> None:
            if at == step:
                raise ValueError("bug")

        served.forwarder.at = fail
        served.stream.feed(ENVELOPE if step in ("begin", "recipients") else MESSAGE)
        sent = await served.stream.sends(b"451 4.3.0 Internal error, try again later")
        assert b"bug" not in sent
        served.forwarder.at = lambda at: None
        served.stream.feed(b"RSET\r\n" + MESSAGE)
        await served.stream.sends(b"250 2.0.0 Ok trace=")
        assert served.forwarder.kept[-1].is_accepted


async def test_a_bug_of_ours_ends_its_connection_and_the_text_of_it_stays_with_us(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: KeepingForwarder) -> Extensions:
        raise ValueError("bug")  # nothing that is asked may raise, and this does

    monkeypatch.setattr(KeepingForwarder, "capabilities", fail)
    async with serving() as served:
        served.stream.feed(b"EHLO c\r\nNOOP\r\n")
        await served.ended()
        assert served.stream.sent.endswith(replies.INTERNAL_CLOSING.wire)
        assert b"bug" not in served.stream.sent
        assert served.seen.close_reason is CloseReason.INTERNAL_ERROR
        assert "ValueError: bug" in caplog.text


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (replies.UPSTREAM_UNAVAILABLE, Outcome.DEFERRED),
        (replies.NEEDS_8BITMIME, Outcome.REFUSED),
        (replies.OUTCOME_UNKNOWN, Outcome.UNKNOWN),
    ],
)
async def test_a_failed_delivery_is_told_to_the_client_as_it_is(reply: Reply, outcome: Outcome) -> None:
    async with serving() as served:
        served.forwarder.final = reply
        served.stream.feed(MESSAGE)
        await served.stream.sends(reply.with_trace("5" * 32).wire)
        assert served.seen.transactions[0].outcome is outcome
        assert served.seen.transactions[0].reply is reply
        assert served.seen.states == "New Active Data Error Idle"


@pytest.mark.parametrize(
    ("reply", "outcome"), [(replies.UPSTREAM_UNAVAILABLE, Outcome.DEFERRED), (replies.NEEDS_8BITMIME, Outcome.REFUSED)]
)
async def test_a_mail_that_the_forwarder_refuses_at_once_is_a_transaction_all_the_same(
    reply: Reply, outcome: Outcome
) -> None:
    async with serving() as served:

        def refuse(at: str) -> None:
            raise DeliveryFailed(reply)

        served.forwarder.at = refuse
        served.stream.feed(b"EHLO c\r\nMAIL FROM:<a@example.com>\r\n")
        await served.stream.sends(reply.wire)
        (transaction,) = served.seen.transactions
        assert (transaction.number, transaction.outcome, transaction.reply) == (1, outcome, reply)


async def test_a_forwarder_that_fails_early_is_heard_when_the_content_is_over() -> None:
    async with serving() as served:

        def fail(at: str) -> None:
            if at == "write":
                raise ValueError("bug")

        served.forwarder.at = fail
        served.stream.feed(ENVELOPE + b"DATA\r\n" + CONTENT)
        await served.stream.sends(b"354 ")
        served.stream.feed(b"more\r\n")
        assert served.seen.states == "New Active Data"
        served.stream.feed(b".\r\nNOOP\r\n")
        await served.stream.sends(b"451 4.3.0")
        await served.stream.sends(b"250 2.0.0")
        assert served.forwarder.kept[0].is_aborted
        assert served.seen.transactions[0].outcome is Outcome.DEFERRED


async def test_content_that_is_held_back_stays_with_the_kernel_until_it_may_come() -> None:
    async with serving() as served:
        served.forwarder.holds_back = 200
        served.stream.feed(ENVELOPE + b"DATA\r\n" + CONTENT)
        await served.stream.sends(b"354 ")
        served.stream.feed(b"x" * 300 + b"\r\n")
        received = served.stream.octets_received
        served.stream.feed(b"y" * 300 + b"\r\n")
        assert served.stream.octets_received == received
        served.forwarder.holds_back = None
        served.forwarder.resume()
        await turns()
        assert served.stream.octets_received == received + 302
        served.stream.feed(b".\r\n")
        await served.stream.sends(b"250 2.0.0 Ok trace=")
        assert served.forwarder.kept[0].content.endswith(b"x\r\n" + b"y" * 300 + b"\r\n")


@pytest.mark.parametrize("rest", [b".\r\n", b"\0\r\n.\r\n"])
async def test_what_was_held_back_at_the_end_of_the_content_does_not_hold_the_next_command(rest: bytes) -> None:
    async with serving() as served:
        served.forwarder.holds_back = 200
        served.stream.feed(ENVELOPE + b"DATA\r\n")
        await served.stream.sends(b"354 ")
        served.stream.feed(CONTENT + b"x" * 300 + b"\r\n" + rest)  # nobody calls `resume` any more
        await until(lambda: served.seen.transactions)
        served.stream.feed(b"QUIT\r\n")
        await served.ended()
        assert served.stream.sent.endswith(replies.CLOSING.wire)


@pytest.mark.movable_clock
async def test_the_time_of_a_slow_forwarder_is_not_the_clients() -> None:
    timeouts = ServerTimeouts(command=60, data=120)
    async with serving(replace(POLICY, timeouts=timeouts)) as served:
        served.forwarder.holds_back = 0
        served.stream.feed(ENVELOPE + b"DATA\r\n" + CONTENT)
        await served.stream.sends(b"354 ")
        served.stream.feed(b"more\r\n")
        advance(1000)
        await turns()
        served.forwarder.holds_back = None
        served.forwarder.resume()
        await turns()
        served.stream.feed(b".\r\n")
        await served.stream.sends(b"250 2.0.0 Ok trace=")


IN_CHUNKS = ENVELOPE + b"BDAT 24\r\n" + CONTENT


@pytest.mark.movable_clock
@pytest.mark.parametrize("chunk", [b"BDAT 0\r\n", b"BDAT 1\r\nx", b"BDAT 100\r\n" + b"x" * 100])
async def test_content_in_chunks_has_its_time_as_a_whole(chunk: bytes) -> None:
    timeouts = ServerTimeouts(command=60, data=120, octets_per_second=1)
    async with serving(replace(POLICY, timeouts=timeouts)) as served:
        served.stream.feed(IN_CHUNKS)
        await served.stream.sends(b"250 2.0.0 24 octets")
        for _ in range(13):
            assert served.seen.close_reason is None
            advance(9)
            await turns()
            served.stream.feed(chunk)
        advance(4)
        await served.ended()
        assert served.seen.close_reason is CloseReason.TIMEOUT
        assert served.stream.sent.endswith(replies.TIMED_OUT.wire)


@pytest.mark.movable_clock
async def test_content_in_chunks_has_a_least_rate_as_a_whole() -> None:
    timeouts = ServerTimeouts(command=60, data=1000, octets_per_second=10)
    async with serving(replace(POLICY, timeouts=timeouts)) as served:
        served.stream.feed(IN_CHUNKS)
        await served.stream.sends(b"250 2.0.0 24 octets")
        for _ in range(30):  # twice the least rate
            advance(10)
            await turns()
            served.stream.feed(b"BDAT 192\r\n" + b"x" * 192)
        assert served.seen.close_reason is None
        for _ in range(50):  # a tenth of it
            advance(10)
            await turns()
            served.stream.feed(b"BDAT 1\r\nx")
        await served.ended()
        assert served.seen.close_reason is CloseReason.TIMEOUT


def feed_eof(served: Served) -> None:
    served.stream.feed_eof()


def lose(served: Served) -> None:
    served.stream.lose(ConnectionResetError())


def answer(served: Served) -> None:
    assert served.forwarder.hold is not None
    served.forwarder.hold.set()


@pytest.mark.parametrize("happens", [feed_eof, lose, answer])
async def test_what_no_octets_bring_about_has_the_time_at_which_it_happens(happens: Callable[[Served], None]) -> None:
    """Not that of the last octets: how long a state lasted, and who took so long, is seen in it."""
    async with serving() as served:
        if happens is answer:
            served.forwarder.hold = asyncio.Event()
            served.stream.feed(MESSAGE)
        await turns()
        before, told = time.monotonic_ns(), len(served.seen.transitions)
        happens(served)
        if happens is answer:
            await served.stream.sends(b"250 2.0.0 Ok")
        else:
            await served.ended()
        later = served.seen.transitions[told:]
        assert later
        assert all(transition.at_ns >= before for transition in later)


@pytest.mark.movable_clock
async def test_between_two_chunks_a_client_idles_as_between_commands() -> None:
    timeouts = ServerTimeouts(command=60, data=1000, octets_per_second=1)
    async with serving(replace(POLICY, timeouts=timeouts)) as served:
        served.stream.feed(IN_CHUNKS + b"BDAT 500\r\n" + b"x" * 500)
        await served.stream.sends(b"250 2.0.0 500 octets")
        advance(59)
        await turns()
        assert served.seen.close_reason is None
        advance(2)
        await served.ended()
        assert served.seen.close_reason is CloseReason.TIMEOUT


@pytest.mark.movable_clock
async def test_octets_of_a_message_before_buy_no_time_for_a_refused_chunk() -> None:
    timeouts = ServerTimeouts(command=60, data=1000, octets_per_second=1)
    async with serving(replace(POLICY, timeouts=timeouts)) as served:
        served.stream.feed(ENVELOPE + b"BDAT 500 LAST\r\n")
        served.stream.feed(b"x" * 500)
        await served.stream.sends(b"250 2.0.0 Ok trace=")
        served.stream.feed(b"BDAT 500\r\nx")
        advance(80)
        await served.ended()
        assert served.seen.close_reason is CloseReason.TIMEOUT


async def pass_time(seconds: float) -> None:
    """Put the clock forward, so slowly that no sweep is missed."""
    for _ in range(round(seconds / 0.3)):
        advance(0.3)
        await turns()


# All sessions look at the clock every five seconds. What is due between two such looks is met at the next sweep.


@pytest.mark.movable_clock
async def test_a_client_that_idles_is_late_at_once() -> None:
    async with serving(replace(POLICY, timeouts=ServerTimeouts(command=7))) as served:
        await pass_time(7.5)
        assert served.seen.close_reason is CloseReason.TIMEOUT


@pytest.mark.movable_clock
async def test_a_newcomer_that_has_little_time_is_late_at_once() -> None:
    async with serving() as served:
        await pass_time(0.6)
        served.server.serve(replace(POLICY, timeouts=ServerTimeouts(command=1)), FakeStream())
        await pass_time(1.5)
        assert [seen.close_reason for seen in served.observer.connections] == [None, CloseReason.TIMEOUT]


@pytest.mark.movable_clock
async def test_content_that_has_less_time_than_a_command_is_late_at_once() -> None:
    async with serving(replace(POLICY, timeouts=ServerTimeouts(data=2))) as served:
        await pass_time(6)
        served.stream.feed(ENVELOPE + b"DATA\r\n")
        await served.stream.sends(b"354 ")
        await pass_time(2.4)
        assert served.seen.close_reason is CloseReason.TIMEOUT


@pytest.mark.movable_clock
async def test_content_that_was_held_back_is_late_when_the_rest_of_its_time_is_over() -> None:
    async with serving(replace(POLICY, timeouts=ServerTimeouts(command=7))) as served:
        served.forwarder.holds_back = 10
        served.stream.feed(ENVELOPE + b"DATA\r\n")
        await served.stream.sends(b"354 ")
        await pass_time(6.3)
        served.stream.feed(CONTENT)
        await pass_time(6)
        served.forwarder.resume()
        await pass_time(1.5)
        assert served.seen.close_reason is CloseReason.TIMEOUT


@pytest.mark.movable_clock
async def test_a_setting_that_gives_less_time_holds_at_once() -> None:
    async with serving() as served:
        await pass_time(12)
        served.server.stressed = True
        served.server.hold_to(
            [POLICY], connections=1, connections_per_client=1, stress_percent=1, auth_failures_per_minute=1,
            segments=Segments(),
        )  # fmt: skip
        await pass_time(0.3)
        assert served.seen.close_reason is CloseReason.TIMEOUT


@pytest.mark.movable_clock
async def test_an_old_segment_ends_at_once() -> None:
    async with serving(segments=Segments(age_seconds=0)) as served:
        await pass_time(3)
        assert served.seen.record.segment > 5


async def test_all_that_pipeline_share_one_turn() -> None:
    limits = ServerLimits(junk_commands=10_000)
    policy = replace(POLICY, protocol=replace(POLICY.protocol, commands_per_turn=10, limits=limits))
    async with serving(policy) as served:
        streams = [served.stream, *(FakeStream() for _ in range(9))]
        others = [served.server.serve(policy, stream)[0] for stream in streams[1:]]
        await turns()
        for stream in streams:
            stream.feed(b"EHLO c\r\n" + b"NOOP\r\n" * 49)
        answered = [sum(stream.sent.count(b"250 2.0.0") for stream in streams)]
        while answered[-1] < 490:
            await asyncio.sleep(0)
            answered.append(sum(stream.sent.count(b"250 2.0.0") for stream in streams))
        assert answered[0] == 90
        assert max(after - before for before, after in pairwise(answered)) == 10
        # None of them went before the others.
        assert [stream.sent.count(b"250 2.0.0") for stream in streams] == [49] * 10
        for session in others:
            session.cancel()


async def test_a_client_that_pipelines_does_not_keep_the_loop_to_itself() -> None:
    protocol = replace(POLICY.protocol, commands_per_turn=10, limits=ServerLimits(junk_commands=10_000))
    async with serving(replace(POLICY, protocol=protocol)) as served:
        served.stream.feed(b"EHLO c\r\n" + b"NOOP\r\n" * 95)
        assert served.stream.sent.count(b"250 2.0.0") == 9
        served.stream.feed(b"QUIT\r\n")  # stays with the kernel until its turn
        await served.ended()
        assert served.stream.sent.count(b"250 2.0.0") == 95
        assert served.stream.sent.endswith(replies.CLOSING.wire)


async def test_a_client_that_does_not_read_its_replies_is_not_served_on() -> None:
    protocol = replace(POLICY.protocol, commands_per_turn=10, limits=ServerLimits(junk_commands=10_000))
    async with serving(replace(POLICY, protocol=protocol)) as served:
        served.stream.stop_taking()
        served.stream.feed(b"EHLO c\r\n" + b"NOOP\r\n" * 95)
        await turns()
        assert served.stream.sent.count(b"250 2.0.0") == 9
        served.stream.resume_writing()
        await until(lambda: served.stream.sent.count(b"250 2.0.0") == 95)


@pytest.mark.movable_clock
async def test_a_client_that_never_reads_its_replies_is_cut_off() -> None:
    async with serving() as served:
        served.stream.stop_taking()
        served.stream.feed(b"NOOP\r\n")
        advance(179)
        await turns()
        assert served.seen.close_reason is None
        advance(2)
        await served.ended()
        assert served.seen.close_reason is CloseReason.TIMEOUT


async def test_a_record_is_cut_into_segments_between_transactions() -> None:
    async with serving(segments=Segments(transitions=6)) as served:
        served.stream.feed(b"EHLO c\r\n")
        for _ in range(4):
            served.stream.feed(MESSAGE.removeprefix(b"EHLO client.example\r\n"))
        await served.stream.sends(b"250 2.0.0 Ok trace=")
        assert [len(segment) for segment in served.observer.segments] == [9, 8]
        assert served.seen.record.segment == 3
        assert [transition.state for transition in served.seen.record.earlier][-1] == "Idle"
    sequence = [transition.sequence for segment in served.observer.segments for transition in segment]
    assert sequence == list(range(1, len(sequence) + 1))


async def test_a_record_of_mails_without_news_is_cut_where_it_is_full() -> None:
    async with serving(segments=Segments(transitions=12)) as served:
        served.stream.feed(b"EHLO client.example\r\n")
        for number in range(1, 7):  # as most clients send them: one command a turn
            for line in (b"MAIL FROM:<a@example.com>\r\n", b"RCPT TO:<b@example.org>\r\n", b"DATA\r\n"):
                served.stream.feed(line)
            served.stream.feed(CONTENT + b".\r\n")
            assert served.seen.record.messages == number
        assert [len(segment) for segment in served.observer.segments] == [13, 12]
        assert served.seen.record.transitions == []
        assert len([one for one in served.forwarder.kept if one.is_accepted]) == 6


async def test_a_record_of_recipients_without_news_is_bounded() -> None:
    async with serving(segments=Segments(transitions=10)) as served:
        for line in ENVELOPE.splitlines(keepends=True):
            served.stream.feed(line)
        most = 0
        for _ in range(100):
            served.stream.feed(b"RCPT TO:<c@example.org>\r\n")
            most = max(most, len(served.seen.replies))
        assert most == 39
        assert len(served.observer.segments) == 2


async def test_within_a_transaction_a_record_is_bounded_too() -> None:
    protocol = replace(POLICY.protocol, limits=ServerLimits(recipients=1))
    async with serving(replace(POLICY, protocol=protocol), segments=Segments(transitions=10)) as served:
        served.stream.feed(ENVELOPE)
        for _ in range(100):
            served.stream.feed(b"RCPT TO:<c@example.org>\r\n")
        assert max(map(len, served.observer.segments)) == 40
        assert len(served.seen.record.transitions) < 40
    sequence = [transition.sequence for segment in served.observer.segments for transition in segment]
    assert sequence == list(range(1, len(sequence) + 1))


async def test_a_record_of_replies_without_transitions_is_bounded() -> None:
    async with serving(segments=Segments(transitions=10)) as served:
        served.stream.feed(ENVELOPE)
        most = 0
        for _ in range(100):
            served.stream.feed(b"BDAT 1\r\nx")
            most = max(most, len(served.seen.replies))
        assert most == 39
        assert len(served.observer.segments) == 2


@pytest.mark.movable_clock
async def test_a_segment_that_is_old_ends_while_its_connection_goes_on() -> None:
    async with serving(segments=Segments(age_seconds=0)) as served:
        advance(1)
        await turns()
        assert served.seen.record.segment > 1
        served.stream.feed(ENVELOPE)
        segment = served.seen.record.segment
        advance(1)
        await turns()
        assert served.seen.record.segment == segment  # not within a transaction


async def test_a_client_that_vanishes_in_data_leaves_nothing_upstream() -> None:
    async with serving() as served:
        served.stream.feed(ENVELOPE + b"DATA\r\n" + CONTENT)
        await served.stream.sends(b"354 ")
        served.stream.lose()
        await served.ended()
        (kept,) = served.forwarder.kept
        assert kept.is_aborted
        assert not kept.is_accepted
        assert served.seen.transactions[0].outcome is Outcome.ABORTED
        assert served.seen.states == "New Active Data Closed"
        assert served.seen.close_reason is CloseReason.CLIENT_DISCONNECT


async def test_a_client_that_vanishes_after_its_final_dot_changes_no_outcome() -> None:
    async with serving() as served:
        served.forwarder.hold = asyncio.Event()
        served.stream.feed(MESSAGE)
        await until(lambda: served.forwarder.kept and served.forwarder.kept[0].content.endswith(CONTENT[-4:]))
        served.stream.lose()
        served.forwarder.hold.set()
        await served.ended()
        assert served.forwarder.kept[0].is_accepted
        assert served.seen.transactions[0].outcome is Outcome.RELAYED


async def test_a_client_that_only_closes_its_sending_side_still_gets_its_reply() -> None:
    async with serving() as served:
        served.stream.feed(MESSAGE)
        served.stream.feed_eof()
        await served.stream.sends(b"250 2.0.0 Ok trace=")
        await served.ended()
        assert served.seen.states == "New Active Data Active Idle Closed"


async def test_a_transaction_without_recipients_ends_as_its_last_refusal() -> None:
    async with serving() as served:
        served.forwarder.refuses["b@example.org"] = replies.RELAY_DENIED
        served.stream.feed(ENVELOPE + b"QUIT\r\n")
        await served.ended()
        assert served.seen.transactions[0].outcome is Outcome.REFUSED
        assert served.seen.transactions[0].reply is replies.RELAY_DENIED
        assert served.forwarder.kept[0].is_aborted


@pytest.mark.parametrize("before", [b"", b"EHLO c\r\nMAIL FROM:<>\r\n", ENVELOPE + b"DATA\r\nhalf a li", b"NOO"])
async def test_a_client_that_says_nothing_more_is_told_421_and_closed(before: bytes) -> None:
    timeouts = ServerTimeouts(command=0.01, data=0.01)
    async with serving(replace(POLICY, timeouts=timeouts)) as served:
        served.stream.feed(before)
        await served.ended()
        assert served.stream.sent.endswith(replies.TIMED_OUT.wire)
        assert served.seen.close_reason is CloseReason.TIMEOUT
        assert served.seen.states.endswith("Error Closed")


async def test_octets_that_trickle_do_not_extend_the_deadline_of_a_command() -> None:
    async with serving(replace(POLICY, timeouts=ServerTimeouts(command=0.05))) as served:
        while not served.end.done():
            served.stream.feed(b"x")
            await asyncio.sleep(0)
        assert served.seen.close_reason in (CloseReason.TIMEOUT, CloseReason.TOO_MANY_ERRORS)
        assert served.seen.states == "New Active Error Closed"


BALANCED = replace(POLICY, proxy_protocol_from=EVERYONE)


@pytest.mark.movable_clock
@pytest.mark.parametrize("said", [b"", b"PROXY", b"PROXY TCP4 198.51.100.1 192.0.2.1 40000 2"])
async def test_a_proxy_header_that_does_not_end_is_waited_for_five_seconds(said: bytes) -> None:
    served = Served(BALANCED)
    served.stream.feed(said)
    await turns()
    advance(4.9)
    await turns()
    assert not served.end.done()
    advance(0.2)
    await served.ended()
    assert served.stream.sent == replies.BAD_PROXY_HEADER.wire
    assert served.seen.states == "New Error Closed"


@pytest.mark.parametrize("said", [b"PROXY TCP4 " + b"1" * 2_000_000, b"PROXY UNKNOWN " + b" " * 2_000_000])
async def test_a_proxy_header_without_end_is_not_read_on(said: bytes) -> None:
    served = Served(BALANCED)
    served.stream.feed(said)
    await served.ended()
    assert served.stream.sent == replies.BAD_PROXY_HEADER.wire
    assert served.stream.octets_received <= RECEIVE_BUFFER_OCTETS


async def test_a_session_that_is_over_before_its_preparation_began_leaves_nothing_unawaited() -> None:
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        served = Served(BALANCED)
        served.session.cancel()
        await served.ended()
        del served
        gc.collect()
    assert [str(complaint.message) for complaint in complaints] == []


LOCAL_CLIENTS_RELAY = replace(
    POLICY, proxy_protocol_from=EVERYONE, allow=(ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
)


@pytest.mark.parametrize(
    ("peer", "named", "answer"),
    [
        ("192.0.2.9", b"TCP4 127.0.0.1 192.0.2.1", replies.ACCESS_DENIED.wire),
        ("192.0.2.9", b"TCP4 127.9.9.9 192.0.2.1", replies.ACCESS_DENIED.wire),
        ("192.0.2.9", b"TCP6 ::1 2001:db8::1", replies.ACCESS_DENIED.wire),
        ("192.0.2.9", b"TCP6 0:0:0:0:0:0:0:1 2001:db8::1", replies.ACCESS_DENIED.wire),
        ("192.0.2.9", b"TCP6 ::ffff:127.0.0.1 2001:db8::1", replies.ACCESS_DENIED.wire),
        ("127.0.0.1", b"TCP4 127.0.0.1 192.0.2.1", b"220 "),  # a balancer on this machine
        ("127.0.0.1", b"TCP4 198.51.100.1 192.0.2.1", replies.ACCESS_DENIED.wire),
    ],
)
async def test_only_a_proxy_on_loopback_can_name_a_loopback_address(peer: str, named: bytes, answer: bytes) -> None:
    served = Served(LOCAL_CLIENTS_RELAY, stream=FakeStream(peer=Endpoint(peer, 40000)))
    served.stream.feed(b"PROXY " + named + b" 40000 25\r\n")
    assert (await served.stream.sends(answer)).startswith(answer)
    served.session.cancel()
    await served.ended()


async def test_a_second_proxy_header_is_no_header() -> None:
    header = b"PROXY TCP4 198.51.100.1 192.0.2.1 40000 25\r\n"
    served = Served(BALANCED)
    served.stream.feed(header)
    await served.greeted()
    served.stream.feed(header.replace(b"198.51.100.1", b"127.0.0.1") + b"QUIT\r\n")
    await served.ended()
    assert served.stream.sent == replies.UNKNOWN_COMMAND.wire + replies.CLOSING.wire


async def test_under_stress_idle_clients_give_way_sooner() -> None:
    timeouts = ServerTimeouts(command=300, command_under_stress=0.01)
    async with serving(replace(POLICY, timeouts=timeouts)) as served:
        served.server.stressed = True
        served.stream.feed(b"NOOP\r\n")
        await served.ended()
        assert served.seen.close_reason is CloseReason.TIMEOUT


@pytest.mark.movable_clock
async def test_a_client_that_is_idle_when_stress_begins_gives_way_too() -> None:
    async with serving() as served:
        served.stream.feed(b"NOOP\r\n")
        await served.stream.sends(b"250 2.0.0")
        advance(100)
        served.server.stressed = True
        await served.ended()
        assert served.seen.close_reason is CloseReason.TIMEOUT


@pytest.mark.movable_clock
async def test_stress_that_is_over_again_costs_nobody_its_connection() -> None:
    async with serving() as served:
        served.server.stressed = True
        advance(5)
        await turns()
        served.server.stressed = False
        advance(294)
        await turns()  # in which the shorter deadline would have been met
        served.stream.feed(b"NOOP\r\n")
        await served.stream.sends(b"250 2.0.0")
        advance(301)
        await served.ended()
        assert served.seen.close_reason is CloseReason.TIMEOUT


async def test_a_session_has_a_life_where_one_is_set() -> None:
    async with serving(replace(POLICY, timeouts=ServerTimeouts(session=0.05))) as served:
        await served.ended()
        assert served.seen.close_reason is CloseReason.TIMEOUT


async def test_at_the_drain_an_idle_client_is_told_421() -> None:
    async with serving() as served:
        served.server.is_draining = True
        served.session.drain()
        await served.ended()
        assert served.stream.sent.endswith(replies.SHUTTING_DOWN.wire)
        assert served.seen.close_reason is CloseReason.SHUTDOWN


async def test_at_the_drain_an_open_transaction_is_finished_first() -> None:
    async with serving() as served:
        served.stream.feed(ENVELOPE + b"DATA\r\n")
        await served.stream.sends(b"354 ")
        served.server.is_draining = True
        served.session.drain()
        served.stream.feed(CONTENT + b".\r\n")
        await served.stream.sends(b"250 2.0.0 Ok trace=")
        await served.ended()
        assert served.stream.sent.endswith(replies.SHUTTING_DOWN.wire)
        assert served.forwarder.kept[0].is_accepted


async def test_a_transaction_that_is_finished_step_by_step_after_the_drain_is_the_last_one() -> None:
    async with serving() as served:
        served.stream.feed(b"EHLO client.example\r\n")
        await served.stream.sends(b"250 ")
        served.stream.feed(b"MAIL FROM:<a@example.com>\r\n")
        await served.stream.sends(b"250 2.1.0")
        served.server.is_draining = True
        served.session.drain()
        for said, expected in (
            (b"RCPT TO:<b@example.org>\r\n", b"250 2.1.5"),
            (b"DATA\r\n", b"354 "),
            (CONTENT + b".\r\n", b"250 2.0.0 Ok trace="),
        ):
            served.stream.feed(said)
            await served.stream.sends(expected)
        await served.ended()
        assert served.stream.sent.endswith(replies.SHUTTING_DOWN.wire)
        assert served.forwarder.kept[0].is_accepted


async def test_cancelled_in_data_nothing_is_accepted_and_the_client_is_told() -> None:
    async with serving() as served:
        served.stream.feed(ENVELOPE + b"DATA\r\n" + CONTENT)
        await served.stream.sends(b"354 ")
        served.session.cancel()
        await served.ended()
        assert served.stream.sent.endswith(replies.SHUTTING_DOWN.wire)
        assert not served.forwarder.kept[0].is_accepted
        assert served.seen.close_reason is CloseReason.SHUTDOWN
        assert served.seen.transactions[0].outcome is Outcome.ABORTED


async def test_a_client_of_no_allowed_network_is_refused_at_once() -> None:
    served = Served(replace(POLICY, allow=(ipaddress.ip_network("127.0.0.0/8"),)))
    await served.ended()
    assert served.stream.sent == replies.ACCESS_DENIED.wire
    assert served.seen.states == "New Error Closed"
    assert served.seen.close_reason is CloseReason.REFUSED


@pytest.mark.parametrize(
    ("early", "sent", "reason", "states"),
    [
        (b"EHLO c\r\n", replies.EARLY_TALKER.wire, CloseReason.REFUSED, "New Error Closed"),
        (b"GET / HTTP/1.1\r\n", b"", CloseReason.PROTOCOL_MISMATCH, "New Closed"),
        (b"\x16\x03\x01\x02\x00\x01", b"", CloseReason.PROTOCOL_MISMATCH, "New Closed"),
    ],
)
async def test_a_client_that_speaks_before_the_greeting_is_not_served(
    early: bytes, sent: bytes, reason: CloseReason, states: str
) -> None:
    served = Served(early=early)
    await served.ended()
    assert served.stream.sent == sent
    assert served.seen.close_reason is reason
    assert served.seen.states == states


@pytest.mark.parametrize(
    ("host", "is_listed"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),  # IPv4 seen through an IPv6 socket
        ("11.1.2.3", False),
        ("fe80::1%eth0", True),
        ("2001:db8::1", False),
        ("", False),  # a unix socket's client has no address
    ],
)
def test_networks_hold_addresses_of_both_families(host: str, is_listed: bool) -> None:
    networks = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fe80::/10"))
    assert is_in(networks, host) is is_listed


STRANGERS = replace(
    POLICY,
    allow=(),
    protocol=ServerPolicy("gw.example.com", tls_mode=TlsMode.STARTTLS, auth_mechanisms=("PLAIN",), auth_in_clear=True),
    tls_context=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
    authenticator=Authenticator(Users({"user": KnownPassword("secret")})),
)
LOGIN = b"AUTH PLAIN AHVzZXIAc2VjcmV0\r\n"


async def test_who_may_not_relay_by_address_must_authenticate() -> None:
    async with serving(STRANGERS) as served:
        served.stream.feed(b"EHLO c\r\nMAIL FROM:<a@example.com>\r\n")
        await served.stream.sends(b"530 5.7.0 ")
        served.stream.feed(LOGIN)
        await served.stream.sends(b"235 ")
        served.stream.feed(b"MAIL FROM:<a@example.com>\r\n")
        await served.stream.sends(b"250 2.1.0 ")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (LOGIN, b"235 "),
        (b"AUTH PLAIN AHVzZXIAd3Jvbmc=\r\n", b"535 "),
        (b"AUTH LOGIN\r\ndXNlcg==\r\nc2VjcmV0\r\n", b"235 "),
        (b"AUTH LOGIN\r\ndXNlcg==\r\nd3Jvbmc=\r\n" + LOGIN, b"235 "),
    ],
)
async def test_nothing_of_a_login_is_kept_once_it_is_judged(said: bytes, answer: bytes) -> None:
    protocol = replace(STRANGERS.protocol, auth_mechanisms=("PLAIN", "LOGIN"))
    async with serving(replace(STRANGERS, protocol=protocol)) as served:
        served.stream.feed(b"EHLO c\r\n" + said)
        await served.stream.sends(answer)
        assert served.session._auth is None


async def test_who_authenticated_in_clear_is_a_stranger_again_under_tls() -> None:
    async with serving(STRANGERS) as served:
        served.stream.feed(b"EHLO c\r\n" + LOGIN)
        await served.stream.sends(b"235 ")
        served.stream.feed(b"STARTTLS\r\n")
        await served.stream.sends(b"220 2.0.0 ")
        served.stream.feed(b"EHLO c\r\nMAIL FROM:<a@example.com>\r\n")
        await served.stream.sends(b"530 5.7.0 ")


async def test_an_anonymous_received_field_says_nothing_of_the_client() -> None:
    async with serving(replace(POLICY, names_client=False)) as served:
        served.stream.feed(MESSAGE)
        await served.stream.sends(b"250 2.0.0 Ok")
        content = served.forwarder.kept[0].content
        received = content.partition(b"Subject")[0]
        hostname = POLICY.protocol.hostname.encode()
        assert received.startswith(b"Received: from %b (local)\r\n by %b with ESMTP" % (hostname, hostname))
        assert b"client.example" not in received
        assert PEER.host.encode() not in received
        assert b"5" * 32 in received


@pytest.mark.parametrize("name", [b"two names", b"[::1", b"a:b", b'"x"', b"a/b", b"(x)\\", b"\xc3\xa9", b"\xff"])
async def test_a_greeting_that_is_no_host_name_stands_in_no_received_field(name: bytes) -> None:
    async with serving() as served:
        served.stream.feed(MESSAGE.replace(b"client.example", name, 1))
        await served.stream.sends(b"250 2.0.0 Ok")
        received = served.forwarder.kept[0].content.partition(b"Subject")[0]
        assert received.startswith(b"Received: from [%b] ([%b])\r\n by " % (PEER.host.encode(), PEER.host.encode()))
        assert name not in received


@asynccontextmanager
async def guessed_at() -> AsyncIterator[Served]:
    """A session of a client that has failed to log in as often as it may."""
    users = Users({"user": Argon2Hash(argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("right"))})
    protocol = replace(POLICY.protocol, auth_mechanisms=("PLAIN",), auth_in_clear=True)
    async with serving(replace(POLICY, protocol=protocol, authenticator=Authenticator(users))) as served:
        for _ in range(10):
            served.server.guesses.failed(PEER.host, "user")
        served.stream.feed(b"EHLO c\r\n" + LOGIN)
        await served.stream.sends(b"535 5.7.8")
        yield served


RIGHT: Final = b"AUTH PLAIN AHVzZXIAcmlnaHQ=\r\n"


@pytest.mark.movable_clock
async def test_guesses_beyond_the_limit_wait_for_their_turn_right_or_wrong() -> None:
    async with guessed_at() as served:
        for line, answer in ((LOGIN, b"535 5.7.8"), (RIGHT, b"235 2.7.0")):
            served.stream.feed(line)
            await turns()
            assert answer not in served.stream.sent
            advance(GUESS_SECONDS + 0.1)
            await served.stream.sends(answer)


@pytest.mark.movable_clock
async def test_who_waits_for_a_turn_to_guess_holds_no_place() -> None:
    async with guessed_at() as served:
        served.stream.feed(RIGHT)
        await turns()
        assert served.session.standing is Standing.IDLE
        served.stream.feed_eof()
        await served.ended()
        assert b"235" not in served.stream.sent
        assert served.seen.record.end.reason is CloseReason.CLIENT_DISCONNECT


async def test_who_is_beyond_the_end_of_the_line_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("otel_smtp.server.guesses.MOST_WAITING", 0)
    async with guessed_at() as served:
        served.stream.feed(LOGIN)
        await served.stream.sends(b"421 4.7.0")
