"""Mode direct-then-queue: the upstream's answer is the client's, but for what fails only for now."""

import dataclasses
from pathlib import Path

import pytest

from otel_smtp.forwarding.settings import PoolLimits, Strategy
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.spool.embedded import EmbeddedStore
from tests.spool.queueing import AT_ONCE, NEVER_AGAIN, Queueing, eventually, queueing
from tests.support.fault_proxy import FaultProxy
from tests.support.relaying import BOB, BODY, CAROL, both_strategies, settings, without
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream


@both_strategies
async def test_what_the_upstream_takes_never_touches_the_spool(tmp_path: Path, strategy: Strategy) -> None:
    async with (
        ScriptedUpstream() as upstream,
        queueing(tmp_path, settings(upstream), direct=strategy) as queue,
    ):
        _, reply = await queue.take(BOB, CAROL)
        assert reply is not None
        assert reply.is_positive
        assert queue.spooled == []
        assert len(upstream.kept) == 1
        assert await queue.tally() == {}


@both_strategies
@pytest.mark.parametrize("phase", [Phase.CONNECT, Phase.GREETING, Phase.EHLO, Phase.MAIL, Phase.RCPT, Phase.REPLY])
@pytest.mark.parametrize("kind", [Kind.REFUSE, Kind.GOODBYE, Kind.CLOSE, Kind.RESET, Kind.GARBAGE])
async def test_what_fails_for_now_is_answered_250_and_delivered_later(
    tmp_path: Path, strategy: Strategy, phase: Phase, kind: Kind
) -> None:
    # Twice: an upstream that is lost in the middle of a transaction is tried once more before it counts as failed.
    async with (
        ScriptedUpstream(faults={phase: Fault(kind, times=2)}) as upstream,
        queueing(tmp_path, settings(upstream), direct=strategy) as queue,
    ):
        answers, reply = await queue.take(BOB)
        assert [answer.code for answer in answers] == [250]
        assert reply is not None
        assert reply.code == 250
        await queue.empties()
        await eventually(lambda: upstream.kept)
        assert len(upstream.kept) == 1
        assert upstream.kept[0].content.endswith(BODY)


@both_strategies
@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.REPLY])
async def test_what_is_refused_for_good_is_the_clients_to_know(
    tmp_path: Path, strategy: Strategy, phase: Phase
) -> None:
    async with (
        ScriptedUpstream(faults={phase: Fault(Kind.REFUSE, b"550 5.7.9 never\r\n")}) as upstream,
        queueing(tmp_path, settings(upstream), direct=strategy) as queue,
    ):
        answers, reply = await queue.take(BOB)
        told = reply if reply is not None else answers[0]
        assert (told.code, str(told.enhanced)) == (550, "5.7.9")
        assert await queue.is_empty()
        assert upstream.kept == []


async def test_a_deferred_recipient_waits_while_the_others_have_their_mail(tmp_path: Path) -> None:
    dave = Recipient("dave@example.net")
    asked: list[str] = []

    def verdict(address: str) -> bytes | None:
        asked.append(address)
        if address == CAROL.address and asked.count(address) == 1:
            return b"450 4.2.1 greylisted\r\n"
        return b"550 5.1.1 unknown\r\n" if address == dave.address else None

    async with (
        ScriptedUpstream(verdict=verdict) as upstream,
        queueing(tmp_path, settings(upstream), direct=Strategy.TRANSPARENT) as queue,
    ):
        answers, reply = await queue.take(BOB, CAROL, dave)
        assert [answer.code for answer in answers] == [250, 250, 550]
        assert reply is not None
        assert reply.is_positive
        await queue.empties()
        assert [kept.addresses for kept in upstream.kept] == [(BOB.address,), (CAROL.address,)]
        assert asked.count(BOB.address) == 1
        assert await queue.tally() == {"accepted": 1, "delivered": 1}


async def test_a_recipient_that_is_refused_with_the_content_is_bounced_at_once(tmp_path: Path) -> None:
    def full(address: str) -> bytes | None:
        return b"552 5.2.2 full\r\n" if address == CAROL.address else None

    async with (
        ScriptedUpstream(is_lmtp=True, lmtp_verdict=full) as upstream,
        queueing(
            tmp_path, settings(upstream, is_lmtp=True), schedule=NEVER_AGAIN, direct=Strategy.TRANSPARENT
        ) as queue,
    ):
        _, reply = await queue.take(BOB, CAROL)
        assert reply is not None
        assert reply.is_positive
        await queue.empties()
        assert upstream.kept[0].addresses == (BOB.address, CAROL.address)
        assert b"\r\nAction: failed\r\n" in upstream.kept[-1].content
        assert (await queue.tally())["failed"] == 1


async def test_recipients_of_another_route_are_taken_too(tmp_path: Path) -> None:
    async with ScriptedUpstream() as first, ScriptedUpstream() as second:
        routes = (settings(first, "a", recipients=("bob@*",)), settings(second, "b", recipients=("carol@*",)))
        async with queueing(tmp_path, *routes, direct=Strategy.TRANSPARENT) as queue:
            answers, _ = await queue.take(BOB, CAROL)
            assert [answer.code for answer in answers] == [250, 250]
            await queue.empties()
            assert [kept.addresses for kept in first.kept] == [(BOB.address,)]
            assert [kept.addresses for kept in second.kept] == [(CAROL.address,)]


async def test_a_lost_reply_is_made_durable_as_a_possible_duplicate(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(faults={Phase.REPLY: Fault(Kind.KEPT_THEN_LOST, times=1)}) as upstream,
        queueing(tmp_path, settings(upstream), direct=Strategy.TRANSPARENT) as queue,
    ):
        _, reply = await queue.take()
        assert reply is not None
        assert reply.is_positive
        (shown,) = await queue.shown()
        await queue.empties()
        assert shown.id == queue.spooled[0]
        assert len(upstream.kept) == 2


async def test_where_the_spool_takes_nothing_the_upstreams_word_is_the_clients(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream(faults={Phase.RCPT: Fault(Kind.REFUSE, b"451 4.7.1 later\r\n")}) as upstream,
        queueing(tmp_path, settings(upstream), direct=Strategy.TRANSPARENT) as queue,
    ):
        assert isinstance(queue.spool.store, EmbeddedStore)
        queue.spool.store.most_messages = 0
        answers, reply = await queue.take()
        assert ([answer.code for answer in answers], reply) == ([451], None)


@pytest.mark.parametrize("direct", [*Strategy, None])
async def test_an_upstream_that_dies_at_any_octet_loses_nothing(tmp_path: Path, direct: Strategy | None) -> None:
    """Reset in the midst of the conversation: 250 all the same, and one copy, or two where it is unknown."""
    async with (
        ScriptedUpstream(extensions=without("CHUNKING")) as upstream,
        FaultProxy(upstream.port) as proxy,
    ):
        via = dataclasses.replace(settings(upstream), port=proxy.port, limits=PoolLimits(messages=1))
        async with queueing(tmp_path, via, direct=direct, schedule=AT_ONCE) as queue:
            for octets in range(1, 260, 3):
                proxy.reset_after_octets = octets
                attempts = len(queue.observer.attempts)
                mail = Mail(f"at{octets}@example.com")
                _, reply = await queue.take(mail=mail)
                assert reply is not None, octets
                assert reply.is_positive, octets
                if direct is None:
                    await eventually(lambda attempts=attempts: _has_ended(queue, attempts))  # type: ignore[misc]
                proxy.reset_after_octets = None
                await queue.empties()
                copies = [kept for kept in upstream.kept if mail.reverse_path.encode() in kept.mail]
                assert 1 <= len(copies) <= 2, octets
                if len(copies) == 2:
                    assert queue.spooled, octets
            tally = await queue.tally()
            assert tally.get("accepted", 0) == tally.get("delivered", 0)


def _has_ended(queue: Queueing, attempt: int) -> bool:
    """Whether an attempt of the runner is over."""
    return len(queue.observer.attempts) > attempt
