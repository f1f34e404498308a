"""A provider that says that it gets too much is left alone for a while, where its rate is limited."""

import asyncio
import logging
import os

import pytest

from otel_smtp.forwarding import pace as pacing
from otel_smtp.forwarding.limits import Limit, LimitSettings, Permit, SharedLimits, limits_of
from otel_smtp.forwarding.pace import FIRST_REST_SECONDS, LONGEST_REST_SECONDS, Pace, WaitingMail
from otel_smtp.forwarding.settings import PoolLimits, Strategy
from otel_smtp.forwarding.verdicts import asks_for_less
from otel_smtp.smtp import replies
from tests.support.relaying import BOB, CAROL, both_strategies, relay, relaying, reply_of, settings
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream

WIDE = LimitSettings("provider-rate", 1000, 1.0, 1000)


@pytest.mark.parametrize(
    ("said", "is_so"),
    [
        (b"421 4.3.2 closing", True),
        (b"421 4.7.0 Try again later", True),
        (b"450 4.7.1 rate of client too high", True),
        (b"451 4.7.500 Server busy", True),
        (b"451 4.7.1 your account sends too much", True),
        (b"452 4.3.2 Too many messages for now", True),
        (b"454 Throttling failure: Maximum sending rate exceeded.", True),
        (b"450 4.2.1 rate limit exceeded", True),
        (b"451 Slow down, please", True),
        # About this mail, or for good
        (b"250 2.0.0 too many thanks", False),
        (b"550 5.7.1 too many messages", False),
        (b"450 4.7.1 Greylisted, try again later", False),
        (b"451 4.7.1 graylisting in action", False),
        (b"450 4.2.2 mailbox full", False),
        (b"451 4.3.0 local error", False),
        (b"451 try later", False),
        (b"452 4.5.3 Too many recipients", False),
        (b"452 too many recipients", False),
        (b"450 4.5.3 Too many recipients received this hour", False),
        (b"454 4.7.0 Temporary authentication failure", False),
    ],
)
def test_what_says_that_it_is_too_much(said: bytes, is_so: bool) -> None:
    assert asks_for_less(reply_of(said)) is is_so


# A limit that rests -------------------------------------------------------------------------------------------------


def test_a_limit_that_rests_gives_nothing() -> None:
    one = Limit(WIDE)
    one.rest(5.0, 100.0)
    one.rest(2.0, 100.0)  # the longest counts
    assert one.take(1, 104.0) == pytest.approx(1.0)
    assert one.available(104.9) == 0
    assert isinstance(one.take(1, 105.0), Permit)
    assert one.available(105.0) > 0


def test_it_rests_for_all_processes_that_share_it() -> None:
    shared = SharedLimits([LimitSettings("other", 3, 1.0), WIDE])
    child = os.fork()
    if child == 0:
        shared.limits["provider-rate"].rest(5.0, 100.0)
        os._exit(0)
    os.waitpid(child, 0)
    assert shared.limits["provider-rate"].take(1, 101.0) == pytest.approx(4.0)
    assert isinstance(shared.limits["other"].take(1, 101.0), Permit)


class Clocked:
    """A pace of mails that are given leave at once."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.limits = [Limit(WIDE), Limit(LimitSettings("per-day", 1000, 86400.0, 1000))]
        self.pace = Pace(self.limits, clock=lambda: self.now)

    def mail(self) -> WaitingMail:
        given = self.pace.ask(1, 0.0, lambda _: None, with_message=True)
        assert given is not None
        return given


def test_each_rest_is_longer_until_something_gets_through() -> None:
    clocked = Clocked()
    rests = []
    for _ in range(12):
        mail = clocked.mail()
        rests.append(clocked.pace.is_too_much(mail))
        assert clocked.pace.ask(1, 0.0, lambda _: None, with_message=True) is None
        clocked.now += LONGEST_REST_SECONDS
    assert rests[:3] == [FIRST_REST_SECONDS, 2 * FIRST_REST_SECONDS, 4 * FIRST_REST_SECONDS]
    assert rests[-1] == LONGEST_REST_SECONDS
    clocked.pace.got_through()
    assert clocked.pace.is_too_much(clocked.mail()) == FIRST_REST_SECONDS


def test_what_had_left_before_the_rest_prolongs_nothing() -> None:
    clocked = Clocked()
    first, second = clocked.mail(), clocked.mail()
    assert clocked.pace.is_too_much(first) == FIRST_REST_SECONDS
    clocked.now += 1.0
    assert clocked.pace.is_too_much(second) is None
    clocked.now += FIRST_REST_SECONDS - 1.0
    assert clocked.mail() is not None


def test_of_several_limits_the_first_rests() -> None:
    clocked = Clocked()
    clocked.pace.is_too_much(clocked.mail())
    assert [limit.available(clocked.now) > 0 for limit in clocked.limits] == [False, True]


# Over connections ---------------------------------------------------------------------------------------------------

TOO_MUCH = b"451 4.7.1 too fast\r\n"


@both_strategies
@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.REPLY])
async def test_the_next_mail_waits_and_says_what_for(
    phase: Phase, strategy: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pacing, "FIRST_REST_SECONDS", 0.4)
    upstream = ScriptedUpstream(faults={phase: Fault(Kind.REFUSE, TOO_MUCH)})
    limits = limits_of([WIDE])
    async with (
        upstream,
        relaying(settings(upstream, paced_by=("provider-rate",)), strategy=strategy, limits=limits) as forwarder,
    ):
        first = await relay(forwarder)
        assert str(first.told).startswith("451 4.7.1 too fast")
        assert first.seen.deliveries[0].paced is None
        upstream.faults.clear()
        second = await relay(forwarder)
        assert second.told.code == 250
        third = await relay(forwarder)
    assert second.seen.deliveries[0].paced is not None
    name, wait_ns = second.seen.deliveries[0].paced
    assert name == "provider-rate"
    assert wait_ns > 0.1e9
    assert third.seen.deliveries[0].paced is None
    (line,) = (record for record in caplog.records if record.getMessage().startswith("upstream asks for less mail"))
    assert line.levelno == logging.WARNING
    assert (line.upstream, line.seconds, line.code) == ("up", 0.4, 451)  # type: ignore[attr-defined]


async def test_one_recipient_of_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "FIRST_REST_SECONDS", 60.0)
    refusals = {"carol@example.net": b"450 4.7.1 too many messages to carol\r\n"}
    upstream = ScriptedUpstream(verdict=refusals.get)
    limits = limits_of([WIDE])
    async with upstream, relaying(settings(upstream, paced_by=("provider-rate",)), limits=limits) as forwarder:
        assert (await relay(forwarder)).told.code == 250
        assert limits["provider-rate"].available(asyncio.get_running_loop().time()) > 0
        await relay(forwarder, BOB, CAROL)
        assert limits["provider-rate"].available(asyncio.get_running_loop().time()) == 0


async def test_a_421_that_another_connection_makes_good_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = ScriptedUpstream()
    limits = limits_of([WIDE])
    async with upstream, relaying(settings(upstream, paced_by=("provider-rate",)), limits=limits) as forwarder:
        assert (await relay(forwarder)).told.code == 250
        await upstream.say_all(b"421 4.3.2 too many messages on this connection\r\n")
        second = await relay(forwarder)
        assert second.told.code == 250
        assert (await relay(forwarder)).seen.deliveries[0].paced is None


async def test_connections_that_are_refused_are_no_rate() -> None:
    limits = limits_of([WIDE])
    async with (
        ScriptedUpstream(most_connections=1) as upstream,
        relaying(
            settings(upstream, paced_by=("provider-rate",), limits=PoolLimits(connections=4)), limits=limits
        ) as forwarder,
    ):
        relayed = await asyncio.gather(*(relay(forwarder) for _ in range(6)))
        assert {one.told.code for one in relayed} == {250}
        assert upstream.refused_connections > 0
        assert limits["provider-rate"].available(asyncio.get_running_loop().time()) > 0


async def test_without_a_limit_nothing_rests(caplog: pytest.LogCaptureFixture) -> None:
    upstream = ScriptedUpstream(faults={Phase.RCPT: Fault(Kind.REFUSE, TOO_MUCH)})
    async with upstream, relaying(settings(upstream)) as forwarder:
        assert (await relay(forwarder)).told.code == 451
        upstream.faults.clear()
        assert (await relay(forwarder)).told.code == 250
    assert "asks for less" not in caplog.text


TWO_AN_HOUR = LimitSettings("provider-rate", 2, 3600.0, 2)


@both_strategies
async def test_mail_that_reached_no_upstream_uses_nothing_of_its_rate(strategy: Strategy) -> None:
    limits = limits_of([TWO_AN_HOUR])
    async with (
        ScriptedUpstream(faults={Phase.GREETING: Fault(Kind.CLOSE, times=3)}) as upstream,
        relaying(
            settings(upstream, paced_by=("provider-rate",)),
            strategy=strategy,
            limits=limits,
            pace_patience_seconds=0.0,
        ) as forwarder,
    ):
        for expected in (451, 451, 451, 250, 250):
            assert (await relay(forwarder)).told.code == expected
        assert (await relay(forwarder)).told is replies.UPSTREAM_PACED
        assert len(upstream.kept) == 2


async def test_as_much_mail_may_be_under_way_as_has_permits_and_one_that_waits() -> None:
    """However much of it there was before."""
    limits = limits_of([TWO_AN_HOUR])
    async with (
        ScriptedUpstream() as upstream,
        relaying(
            settings(upstream, paced_by=("provider-rate",)), limits=limits, pace_patience_seconds=0.0
        ) as forwarder,
    ):
        allowed = [forwarder.concurrency("up")]
        for _ in range(3):
            await relay(forwarder)
            allowed.append(forwarder.concurrency("up"))
    assert allowed == [3, 2, 1, 1]


async def test_the_next_rest_is_a_short_one_when_mail_got_through(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pacing, "FIRST_REST_SECONDS", 0.05)
    limits = limits_of([WIDE])
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, paced_by=("provider-rate",)), limits=limits) as forwarder,
    ):
        for is_too_much in (True, True, False, True):
            if is_too_much:
                upstream.faults[Phase.REPLY] = Fault(Kind.REFUSE, TOO_MUCH, times=1)
            assert (await relay(forwarder)).told.code == (451 if is_too_much else 250)
    rests = [record.__dict__["seconds"] for record in caplog.records if "asks for less" in record.getMessage()]
    assert rests == [0.05, 0.1, 0.05]
