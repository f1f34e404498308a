"""How real providers say no, in the modes that queue: whose problem it is, and what people are told."""

from pathlib import Path

import pytest

from otel_smtp.forwarding.settings import Strategy
from tests.spool.queueing import AT_ONCE, NEVER_AGAIN, eventually, queueing
from tests.support.deliveries import MAIL
from tests.support.relaying import both_strategies, settings
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream

ON_ITS_WAY = [Phase.MAIL, Phase.RCPT, Phase.REPLY]


@pytest.mark.parametrize("phase", ON_ITS_WAY)
async def test_a_refusal_before_the_connection_ends_bounces_the_mail_at_once(tmp_path: Path, phase: Phase) -> None:
    fault = Fault(Kind.SAID_THEN_CLOSED, b"550 5.7.1 blocked by policy\r\n", times=1)
    async with (
        ScriptedUpstream(faults={phase: fault}) as upstream,
        queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN) as queue,
    ):
        await queue.take()
        await eventually(lambda: upstream.kept)
        (bounce,) = upstream.kept
        assert bounce.addresses == (MAIL.reverse_path,)
        assert b"550 5.7.1 blocked by policy" in bounce.content
        await queue.empties()


@pytest.mark.parametrize("phase", ON_ITS_WAY)
async def test_a_refusal_of_our_credentials_bounces_nothing(tmp_path: Path, phase: Phase) -> None:
    fault = Fault(Kind.REFUSE, b"530 5.7.57 client not authenticated\r\n", times=1)
    async with (
        ScriptedUpstream(faults={phase: fault}) as upstream,
        queueing(tmp_path, settings(upstream), schedule=AT_ONCE) as queue,
    ):
        await queue.take()
        await queue.empties()
        assert [kept.addresses for kept in upstream.kept] == [("bob@example.net",)]
        assert await queue.tally() == {"accepted": 1, "delivered": 1}


@pytest.mark.parametrize(
    ("phase", "said", "told"),
    [
        (Phase.GREETING, b"554 5.7.1 listed\r\n", "451 4.4.1 The upstream refuses service: 554 5.7.1 listed"),
        (Phase.EHLO, b"421 4.7.0 slow down\r\n", "451 4.4.1 The upstream refuses service: 421 4.7.0 slow down"),
        (Phase.MAIL, b"421 4.7.0 throttled\r\n", "451 4.4.1 The upstream refuses service: 421 4.7.0 throttled"),
        (Phase.REPLY, b"421 4.7.0 not now\r\n", "451 4.4.1 The upstream refuses service: 421 4.7.0 not now"),
    ],
)
@pytest.mark.parametrize("direct", [None, *Strategy])
async def test_the_queue_shows_what_the_upstream_said_from_the_first_attempt_on(
    tmp_path: Path, direct: Strategy | None, phase: Phase, said: bytes, told: str
) -> None:
    async with (
        ScriptedUpstream(faults={phase: Fault(Kind.SAID_THEN_CLOSED, said)}) as upstream,
        queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN, direct=direct) as queue,
    ):
        _, reply = await queue.take()
        assert reply is not None
        assert reply.code == 250

        async def is_tried() -> bool:
            (shown,) = await queue.shown()
            return shown.attempts == 1 and [reply for *_, reply in shown.recipients] == [told]

        await eventually(is_tried)


@both_strategies
async def test_credentials_that_are_refused_at_first_leave_the_mail_to_the_queue(
    tmp_path: Path, strategy: Strategy
) -> None:
    fault = Fault(Kind.REFUSE, b"535 5.7.8 who are you\r\n", times=1)
    async with (
        ScriptedUpstream(faults={Phase.MAIL: fault}) as upstream,
        queueing(tmp_path, settings(upstream), direct=strategy) as queue,
    ):
        answers, reply = await queue.take()
        assert [answer.code for answer in answers] == [250]
        assert reply is not None
        assert reply.code == 250
        await queue.empties()
        assert len(upstream.kept) == 1
