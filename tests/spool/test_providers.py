"""How real providers say no, in the modes that queue: whose problem it is, and what people are told."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from otel_smtp.forwarding.settings import Strategy
from otel_smtp.smtp.envelope import Recipient
from tests.spool.queueing import AT_ONCE, NEVER_AGAIN, eventually, queueing
from tests.support.deliveries import MAIL
from tests.support.relaying import both_strategies, settings
from tests.support.upstream import EXTENSIONS, Fault, Kind, Phase, ScriptedUpstream

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


# Several transactions of one message --------------------------------------------------------------------------

MANY = [Recipient(f"r{number}@example.net") for number in range(23)]
LIMITED: dict[str, dict[str, Any]] = {
    "announced": {"extensions": [*EXTENSIONS, "LIMITS RCPTMAX=5"]},
    "of a transaction": {"most_recipients": 5},
    "of a connection": {"most_recipients_a_connection": 5},
    "of a connection, as 552": {"most_recipients_a_connection": 5, "too_many_recipients": b"552 too many\r\n"},
}
every_mode = pytest.mark.parametrize("direct", [None, *Strategy])


@pytest.mark.parametrize("limit", LIMITED)
@every_mode
async def test_recipients_beyond_what_an_upstream_takes_get_the_mail_in_the_same_attempt(
    tmp_path: Path, direct: Strategy | None, limit: str
) -> None:
    async with (
        ScriptedUpstream(**LIMITED[limit]) as upstream,
        queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN, direct=direct) as queue,
    ):
        answers, reply = await queue.take(*MANY)
        assert {answer.code for answer in answers} == {250}
        assert reply is not None
        assert reply.code == 250
        await queue.empties()
        assert sorted(len(kept.recipients) for kept in upstream.kept) == [3, 5, 5, 5, 5]
        assert sorted(address for kept in upstream.kept for address in kept.addresses) == sorted(
            recipient.address for recipient in MANY
        )


@every_mode
async def test_each_recipient_has_its_own_end_whichever_transaction_it_was_in(
    tmp_path: Path, direct: Strategy | None
) -> None:
    verdicts = {"r7@example.net": b"550 5.1.1 r7 is gone\r\n", "r9@example.net": b"450 4.2.0 greylisted\r\n"}

    def verdict(address: str) -> bytes | None:
        return verdicts.pop(address, None) if address == "r9@example.net" else verdicts.get(address)

    async with (
        ScriptedUpstream(verdict=verdict, extensions=[*EXTENSIONS, "LIMITS RCPTMAX=5"]) as upstream,
        queueing(tmp_path, settings(upstream), direct=direct) as queue,
    ):
        answers, reply = await queue.take(*MANY[:12])
        assert {answer.code for answer in answers} == {250}
        assert reply is not None
        assert reply.code == 250
        await queue.empties()
        reached = [address for kept in upstream.kept for address in kept.addresses]
        expected = [recipient.address for recipient in MANY[:12] if recipient.address != "r7@example.net"]
        assert sorted(reached) == sorted([*expected, MAIL.reverse_path])
        (bounce,) = (kept for kept in upstream.kept if kept.addresses == (MAIL.reverse_path,))
        assert b"550 5.1.1 r7 is gone" in bounce.content


@pytest.mark.parametrize("direct", list(Strategy))
async def test_direct_then_queue_delivers_to_two_routes_at_once(tmp_path: Path, direct: Strategy) -> None:
    recipients = [Recipient("a@one.example"), Recipient("b@two.example")]
    async with ScriptedUpstream() as one, ScriptedUpstream() as two:
        routes = [
            settings(one, "one", recipients=("*@one.example",)),
            settings(two, "two", recipients=("*@two.example",)),
        ]
        async with queueing(tmp_path, *routes, schedule=NEVER_AGAIN, direct=direct) as queue:
            await queue.take(*recipients)
            assert queue.spooled == []
        assert [kept.addresses for kept in (*one.kept, *two.kept)] == [("a@one.example",), ("b@two.example",)]


# Connections --------------------------------------------------------------------------------------------------


@every_mode
async def test_a_cap_on_connections_costs_no_mail_an_attempt(tmp_path: Path, direct: Strategy | None) -> None:
    async with (
        ScriptedUpstream(most_connections=3) as upstream,
        queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN, direct=direct) as queue,
    ):
        for _ in range(2):
            await asyncio.gather(*(queue.take() for _ in range(20)))
        await queue.empties()
        assert len(upstream.kept) == 40
        assert len(queue.observer.attempts) == (40 if direct is None else 0)
        assert upstream.refused_connections == 2  # of the window that an upstream is first met with
