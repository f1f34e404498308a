"""The upstream relay over real sockets: what goes well. What goes wrong is in test_faults.py."""

import asyncio
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import pytest

from otel_smtp.forwarding.base import LEAST, DeliveryFailed, Permanent, Transient
from otel_smtp.forwarding.settings import PoolLimits, Strategy, TracePolicy, UpstreamSettings
from otel_smtp.forwarding.upstream import UpstreamForwarder
from otel_smtp.net import Sweep
from otel_smtp.observing import DeliveryPhase, Endpoint, Observer, Outcome
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import Reply
from tests.support.clock import advance
from tests.support.deliveries import MAIL, Awaited, RecordedTransaction, phases_of
from tests.support.relaying import (
    BOB,
    BODY,
    CAROL,
    CHUNKS,
    HEADER,
    both_strategies,
    relay,
    relaying,
    settings,
    without,
)
from tests.support.upstream import EXTENSIONS, Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import SECONDS, until

# Content and its way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extensions", [EXTENSIONS, without("CHUNKING"), without("PIPELINING"), ()])
@both_strategies
@pytest.mark.both_loops
async def test_a_mail_arrives_octet_for_octet(strategy: Strategy, extensions: Sequence[str]) -> None:
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder, BOB, CAROL)
        assert relayed.codes == [250, 250]
        assert relayed.reply is not None
        assert relayed.reply.wire == b"250 2.0.0 kept as 1\r\n"
        (kept,) = upstream.kept
        assert kept.content == HEADER + BODY
        assert kept.addresses == ("bob@example.net", "carol@example.net")
        (delivery,) = relayed.seen.deliveries
        assert (delivery.outcome, delivery.reply, delivery.error_type) == (Outcome.RELAYED, relayed.reply, None)
        assert (delivery.upstream, delivery.server) == ("up", Endpoint("127.0.0.1", upstream.port))
        assert (delivery.peer, delivery.tls) == (Endpoint("127.0.0.1", upstream.port), None)
        assert delivery.pool_wait_ns is not None
        assert delivery.begun_ns <= delivery.phases[0][0] <= delivery.phases[-1][0] <= delivery.ended_ns


@pytest.mark.parametrize(
    ("strategy", "extensions", "recipients", "expected"),
    [
        (Strategy.BUFFERED, EXTENSIONS, 1, 1),
        (Strategy.BUFFERED, EXTENSIONS, 2, 2),  # nothing may be delivered if one of them is refused
        (Strategy.BUFFERED, without("CHUNKING"), 1, 2),
        (Strategy.BUFFERED, without("CHUNKING"), 2, 2),
        (Strategy.BUFFERED, without("PIPELINING"), 1, 3),
        (Strategy.BUFFERED, (), 1, 4),
        (Strategy.TRANSPARENT, EXTENSIONS, 1, 2),
        (Strategy.TRANSPARENT, EXTENSIONS, 2, 2),
        (Strategy.TRANSPARENT, without("CHUNKING"), 1, 3),
        (Strategy.TRANSPARENT, without("PIPELINING"), 1, 3),
        (Strategy.TRANSPARENT, (), 2, 5),
    ],
)
async def test_round_trips_on_a_kept_connection(
    strategy: Strategy, extensions: Sequence[str], recipients: int, expected: int
) -> None:
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        await relay(forwarder)
        before = upstream.round_trips
        relayed = await relay(forwarder, *(BOB, CAROL)[:recipients])
        assert upstream.round_trips - before == expected
        assert relayed.seen.deliveries[0].round_trips == expected
        assert relayed.seen.deliveries[0].is_reused is True
        assert upstream.connections == 1
        assert "RSET" not in upstream.verbs


async def test_a_new_connections_round_trips_are_counted_with_its_first_mail() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), strategy=Strategy.BUFFERED) as forwarder:
        relayed = await relay(forwarder)
        assert relayed.seen.deliveries[0].round_trips == 2  # EHLO, and the mail
        assert phases_of(relayed.seen.deliveries[0]) == [
            DeliveryPhase.POOL,
            DeliveryPhase.CONNECT,
            DeliveryPhase.GREETING,
            DeliveryPhase.EHLO,
            DeliveryPhase.CONTENT,
            DeliveryPhase.MAIL,
            DeliveryPhase.RCPT,
            DeliveryPhase.REPLY,
        ]


@pytest.mark.parametrize("extensions", [EXTENSIONS, without("CHUNKING")])
@both_strategies
@pytest.mark.both_loops
async def test_large_content_goes_through_a_file_and_arrives_whole(
    strategy: Strategy, extensions: Sequence[str]
) -> None:
    line = b"." + b"x" * 75 + b"\r\n"
    body = (b"\r\n", *([line * 1000] * 12))  # 936 kB; each line begins with a dot
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        relaying(settings(upstream), strategy=strategy, memory_limit_octets=100_000) as forwarder,
    ):
        relayed = await relay(forwarder, chunks=(HEADER, *body))
        assert relayed.reply is not None
        assert relayed.reply.code == 250
        assert upstream.kept[0].content == HEADER + b"".join(body)


@pytest.mark.parametrize(("octets", "files"), [(1000, 0), (1001, 1)])
@both_strategies
async def test_a_message_that_came_whole_is_held_in_memory_up_to_the_limit(
    strategy: Strategy, octets: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[IO[bytes]] = []
    make = tempfile.TemporaryFile

    def make_file(**more: Any) -> IO[bytes]:
        made.append(make(**more))
        return made[-1]

    monkeypatch.setattr("tempfile.TemporaryFile", make_file)
    body = b"\r\n" + b"x" * (octets - 4) + b"\r\n"
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream), strategy=strategy, memory_limit_octets=1000) as forwarder,
    ):
        assert (await relay(forwarder, chunks=(HEADER, body))).told.code == 250
        assert upstream.kept[0].content == HEADER + body
    assert len(made) == files
    assert all(file.closed for file in made)


@pytest.mark.parametrize("extensions", [EXTENSIONS, without("CHUNKING")])
@pytest.mark.parametrize("body", [(), (BODY,), (b"\r\n", b"x" * 100_000 + b"\r\n", b"end\r\n")])
@both_strategies
async def test_a_large_header_block_goes_ahead_of_whatever_body(
    strategy: Strategy, body: Sequence[bytes], extensions: Sequence[str]
) -> None:
    header = HEADER + b"X: " + b"y" * 70_000 + b"\r\n"
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        for _ in range(2):
            assert (await relay(forwarder, BOB, CAROL, chunks=(header, *body))).told.code == 250
        assert [kept.content for kept in upstream.kept] == [header + b"".join(body)] * 2
        assert upstream.connections == 1


@both_strategies
async def test_content_without_a_body_or_a_last_line_end(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream(extensions=without("CHUNKING")) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        await relay(forwarder, chunks=(HEADER,))
        await relay(forwarder, chunks=(HEADER, b"\r\nno end"))
        assert [kept.content for kept in upstream.kept] == [HEADER, HEADER + b"\r\nno end\r\n"]


@both_strategies
async def test_parameters_travel_and_the_real_size_where_it_is_known(strategy: Strategy) -> None:
    mail = Mail("a@example.com", 7, Body.EIGHT_BIT_MIME, smtputf8=True, ret=DsnReturn.HEADERS, envid="e1")
    recipient = Recipient("b\u00fc@example.net", Notify.NEVER)
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), strategy=strategy) as forwarder:
        await relay(forwarder, recipient, mail=mail)
        size = 7 if strategy is Strategy.TRANSPARENT else len(HEADER + BODY)
        assert upstream.kept[0].mail == f"<a@example.com> SIZE={size} BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=e1".encode()
        assert upstream.kept[0].recipients == ("<b\u00fc@example.net> NOTIFY=NEVER".encode(),)


@pytest.mark.parametrize("policy", list(TracePolicy))
@both_strategies
async def test_the_size_that_is_declared_upstream_counts_what_we_add(strategy: Strategy, policy: TracePolicy) -> None:
    """RFC 1870 6.3. What the client declared counts while nothing else is known, and for nothing any more then."""
    received, own = b"Received: from me by gw; now\r\n", b"Subject: x\r\n"
    mail = Mail("a@example.com", len(own + BODY))
    async with (
        ScriptedUpstream(extensions=without("CHUNKING")) as first,
        ScriptedUpstream(extensions=without("CHUNKING")) as second,
        relaying(
            settings(first, "first", trace_context=policy),
            settings(second, "second", trace_context=policy),
            strategy=strategy,
        ) as forwarder,
    ):
        for one in (mail, mail._replace(size=1)):
            transaction = Awaited.begin(forwarder, one, seen := RecordedTransaction(one))
            seen.added_octets = len(received)
            await transaction.recipients([BOB])
            seen.octets = len(own + BODY)
            if one is not mail:
                first.faults[Phase.DATA] = Fault(Kind.CLOSE)
            assert (await transaction.content((received + own, BODY))).code == 250
            transaction.abort()
        for kept in first.kept + second.kept:
            assert kept.mail == f"<a@example.com> SIZE={len(kept.content)}".encode()
        assert (len(first.kept), len(second.kept)) == (1, 1)


# Trace headers ------------------------------------------------------------------------------------------------

TRACED = b"Received: x\r\ntraceparent: 00-11111111111111111111111111111111-2222222222222222-01\r\nSubject: x\r\n"


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (TracePolicy.KEEP, TRACED),
        (TracePolicy.STRIP, b"Received: x\r\nSubject: x\r\n"),
        (
            TracePolicy.INJECT,
            b"Received: x\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nSubject: x\r\n",
        ),
    ],
)
@both_strategies
async def test_trace_headers_follow_the_upstreams_policy(
    strategy: Strategy, policy: TracePolicy, expected: bytes
) -> None:
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, trace_context=policy), strategy=strategy) as forwarder,
    ):
        await relay(forwarder, chunks=(TRACED, BODY))
        assert upstream.kept[0].content == expected + BODY


# Verdicts -----------------------------------------------------------------------------------------------------


def verdict(address: str) -> bytes | None:
    return {
        "gone@example.net": b"550 5.1.1 no such user\r\n",
        "full@example.net": b"452 4.2.2 mailbox full\r\n",
    }.get(address)


GONE = Recipient("gone@example.net")
FULL = Recipient("full@example.net")


@pytest.mark.parametrize("extensions", [EXTENSIONS, ()])
async def test_transparent_each_recipient_has_the_upstreams_own_verdict(extensions: Sequence[str]) -> None:
    async with (
        ScriptedUpstream(extensions=extensions, verdict=verdict) as upstream,
        relaying(settings(upstream)) as forwarder,
    ):
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        first = await transaction.recipients([BOB, GONE])
        second = await transaction.recipients([FULL, CAROL])
        assert [str(reply) for reply in (*first, *second)] == [
            "250 2.1.5 recipient ok",
            "550 5.1.1 no such user",
            "452 4.2.2 mailbox full",
            "250 2.1.5 recipient ok",
        ]
        assert (await transaction.content(CHUNKS)).code == 250
        assert upstream.kept[0].addresses == ("bob@example.net", "carol@example.net")
        assert upstream.verbs.count("MAIL") == 1


@pytest.mark.parametrize("extensions", [EXTENSIONS, without("CHUNKING"), without("PIPELINING"), ()])
@pytest.mark.parametrize("group", [(GONE,), (BOB, GONE), (FULL, BOB), (GONE, FULL)])
async def test_buffered_a_refused_recipient_refuses_the_whole(
    group: Sequence[Recipient], extensions: Sequence[str]
) -> None:
    async with (
        ScriptedUpstream(extensions=extensions, verdict=verdict) as upstream,
        relaying(settings(upstream), strategy=Strategy.BUFFERED) as forwarder,
    ):
        relayed = await relay(forwarder, *group)
        assert relayed.codes == [250] * len(group)
        refused = next(recipient for recipient in group if verdict(recipient.address))
        assert relayed.reply is not None
        # The reply is the message's, so it says whom it is about, where that is not plain.
        whom = f" (recipient {refused.address})\r\n".encode() if len(group) > 1 else b"\r\n"
        assert relayed.reply.wire == (verdict(refused.address) or b"").removesuffix(b"\r\n") + whom
        assert str(relayed.seen.deliveries[0].reply) == relayed.reply.wire.decode().partition(" (")[0].strip()
        outcome = Outcome.DEFERRED if refused is FULL else Outcome.REFUSED
        assert relayed.seen.outcomes == [("up", outcome)]
        # Nobody got anything, not even an empty message; and the next mail is well.
        assert upstream.kept == []
        assert (await relay(forwarder)).reply is not None
        assert [kept.addresses for kept in upstream.kept] == [("bob@example.net",)]
        assert upstream.kept[0].content == HEADER + BODY


async def test_buffered_a_354_without_recipients_is_ended_by_a_lone_dot() -> None:
    extensions = [*without("CHUNKING"), "X-EAGER-354"]
    async with (
        ScriptedUpstream(extensions=extensions, verdict=verdict) as upstream,
        relaying(settings(upstream), strategy=Strategy.BUFFERED) as forwarder,
    ):
        relayed = await relay(forwarder, GONE)
        assert relayed.reply is not None
        assert relayed.reply.code == 550
        assert upstream.kept == []
        await relay(forwarder)
        assert upstream.connections == 1
        assert len(upstream.kept) == 1


async def test_a_refused_sender_refuses_its_recipients() -> None:
    faults = {Phase.MAIL: Fault(Kind.REFUSE, b"550 5.7.1 not you\r\n", times=1)}
    async with ScriptedUpstream(faults=faults) as upstream, relaying(settings(upstream)) as forwarder:
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        answers = [*await transaction.recipients([BOB, CAROL]), *await transaction.recipients([BOB])]
        assert [str(answer) for answer in answers] == ["550 5.7.1 not you"] * 3
        transaction.abort()
        assert seen.outcomes == [("up", Outcome.REFUSED)]
        assert (seen.deliveries[0].accepted_count, seen.deliveries[0].refused_count) == (0, 2)
        assert upstream.verbs.count("MAIL") == 1
        assert (await relay(forwarder)).codes == [250]
        assert upstream.connections == 1


async def test_a_refused_sender_refuses_those_that_had_no_verdict_before() -> None:
    """Bob is deferred on a connection that ends then; on the next, MAIL is refused. Each recipient counts once."""
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        await relay(forwarder)
        upstream.verdict = {BOB.address: b"450 4.2.0 not yet\r\n"}.get
        upstream.hangs_up_after = BOB.address
        upstream.sender_verdict = lambda _: b"550 5.7.1 not you\r\n" if upstream.connections > 1 else None
        relayed = await relay(forwarder, BOB, CAROL)
        assert [str(answer) for answer in relayed.recipients] == ["450 4.2.0 not yet", "550 5.7.1 not you"]
        (delivery,) = relayed.seen.deliveries
        assert (delivery.accepted_count, delivery.deferred_count, delivery.refused_count) == (0, 1, 1)


@both_strategies
async def test_without_pipelining_nobody_is_named_behind_a_refused_sender(strategy: Strategy) -> None:
    faults = {Phase.MAIL: Fault(Kind.REFUSE, b"550 5.7.1 not you\r\n", times=1)}
    async with (
        ScriptedUpstream(extensions=(), faults=faults) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        assert (await relay(forwarder, BOB, CAROL)).told.code == 550
        assert upstream.verbs == ["EHLO", "MAIL"]


async def test_an_aborted_transaction_is_reset_in_the_next_group() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        await transaction.recipients([BOB])
        transaction.abort()
        transaction.abort()
        assert seen.outcomes == [("up", Outcome.ABORTED)]
        relayed = await relay(forwarder, CAROL)
        assert relayed.seen.deliveries[0].round_trips == 2
        assert upstream.verbs == ["EHLO", "MAIL", "RCPT", "RSET", "MAIL", "RCPT", "BDAT"]
        assert [kept.addresses for kept in upstream.kept] == [("carol@example.net",)]


# What is known beforehand -------------------------------------------------------------------------------------


async def test_capabilities_are_those_of_the_last_ehlo() -> None:
    async with (
        ScriptedUpstream(extensions=("SIZE 1000", "8BITMIME")) as upstream,
        relaying(settings(upstream)) as forwarder,
    ):
        assert forwarder.capabilities() is LEAST
        await relay(forwarder)
        assert forwarder.capabilities() == Extensions(size=1000, eight_bit_mime=True)
        assert forwarder.capabilities() is forwarder.capabilities()


async def test_what_is_offered_is_learnt_without_a_mail() -> None:
    async with (
        ScriptedUpstream(extensions=("SIZE 1000", "8BITMIME")) as upstream,
        relaying(settings(upstream)) as forwarder,
    ):
        await forwarder.learn(wait_seconds=SECONDS)
        assert forwarder.capabilities() == Extensions(size=1000, eight_bit_mime=True)
        assert upstream.verbs == ["EHLO"]
        # The mail that gets the connection shows how it was opened.
        first, second = [(await relay(forwarder)).seen.deliveries[0] for _ in range(2)]
        assert (first.is_reused, second.is_reused) == (False, True)
        assert phases_of(first)[:4] == [
            DeliveryPhase.POOL, DeliveryPhase.CONNECT, DeliveryPhase.GREETING, DeliveryPhase.EHLO,
        ]  # fmt: skip
        assert first.begun_ns <= first.phases[0][0] <= first.phases[-1][0] <= first.ended_ns
        assert DeliveryPhase.CONNECT not in phases_of(second)
        assert upstream.connections == 1


async def test_a_connection_that_was_opened_to_learn_dies_without_harm() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        await forwarder.learn(wait_seconds=SECONDS)
        upstream.faults[Phase.MAIL] = Fault(Kind.CLOSE, times=1)
        assert (await relay(forwarder)).told.code == 250
        assert upstream.connections == 2


async def test_a_connection_that_was_opened_to_learn_is_closed_like_others_that_nobody_uses() -> None:
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, limits=PoolLimits(idle_seconds=0.01))) as forwarder,
    ):
        await forwarder.learn(wait_seconds=SECONDS)
        await until(lambda: upstream.verbs == ["EHLO", "QUIT"])
        assert forwarder.capabilities().smtputf8


@pytest.mark.movable_clock
async def test_what_is_offered_is_learnt_when_the_upstream_comes_up_and_no_mail_waits_for_that() -> None:
    async with ScriptedUpstream(extensions=("8BITMIME",)) as upstream, relaying(settings(upstream)) as forwarder:
        upstream.faults[Phase.GREETING] = Fault(Kind.REFUSE, b"554 not yet\r\n", times=3)
        await forwarder.learn()
        for wait_seconds in (1, 2, 4):
            connections = upstream.connections
            await until(lambda connections=connections: upstream.connections > connections or connections)  # type: ignore[misc]
            await until(lambda: upstream.open_connections == 0)
            assert forwarder.capabilities() is LEAST
            for _ in range(20):
                await asyncio.sleep(0)
            advance(wait_seconds)
        await until(lambda: forwarder.capabilities() is not LEAST)
        assert upstream.connections == 4
        # The breaker was not told: mail is not kept waiting for what only we wanted to know.
        assert (await relay(forwarder)).told.code == 250


async def test_what_every_upstream_offers_is_learnt() -> None:
    async with (
        ScriptedUpstream() as first,
        ScriptedUpstream() as second,
        relaying(settings(first, "first"), settings(second, "second")) as forwarder,
    ):
        await forwarder.learn(wait_seconds=SECONDS)
        await until(lambda: second.verbs == ["EHLO"])
        # The connection is there when the first fails.
        first.faults[Phase.MAIL] = Fault(Kind.GOODBYE)
        assert (await relay(forwarder)).told.code == 250
        assert second.connections == 1


async def test_where_mail_has_several_routes_no_more_is_offered_than_each_of_them_keeps() -> None:
    async with (
        ScriptedUpstream(extensions=("SIZE 1000", "8BITMIME", "DSN")) as first,
        ScriptedUpstream(extensions=("SIZE 2000", "SMTPUTF8", "8BITMIME")) as second,
        ScriptedUpstream(extensions=()) as behind,
        relaying(
            settings(first, "first", recipients=("*@first.example",)),
            settings(second, "second"),
            settings(behind, "behind", senders=("*@behind.example",)),  # it only stands in for the others
        ) as forwarder,
    ):
        second.faults[Phase.GREETING] = Fault(Kind.LATE)
        await forwarder.learn()
        await until(lambda: first.verbs == ["EHLO"] and behind.verbs == ["EHLO"])
        for _ in range(20):
            await asyncio.sleep(0)
        assert forwarder.capabilities() is LEAST  # nothing is promised before it is known
        second.let_go.set()
        await until(lambda: forwarder.capabilities() is not LEAST)
        # Too big for the first is not too big for the second: MAIL is where that shows.
        assert forwarder.capabilities() == Extensions(size=2000, eight_bit_mime=True)


async def test_where_the_preferred_upstream_cannot_be_reached_the_next_one_speaks_for_it() -> None:
    async with (
        ScriptedUpstream() as first,
        ScriptedUpstream(extensions=("SIZE 1000", "8BITMIME")) as second,
        relaying(settings(first, "first"), settings(second, "second")) as forwarder,
    ):
        first.faults[Phase.GREETING] = Fault(Kind.REFUSE, b"554 not now\r\n")
        await forwarder.learn(wait_seconds=SECONDS / 10)
        await until(lambda: forwarder.capabilities() is not LEAST)
        assert forwarder.capabilities() == Extensions(size=1000, eight_bit_mime=True)


async def test_learning_ends_with_the_forwarder() -> None:
    async with ScriptedUpstream() as upstream:
        upstream.faults[Phase.GREETING] = Fault(Kind.STALL)
        async with relaying(settings(upstream)) as forwarder:
            await forwarder.learn()
            await until(lambda: upstream.stalled)
        await until(lambda: upstream.open_connections == 0)


SHRUNK = ("SIZE 1000",)
BIG = (HEADER, b"\r\n", b"x" * 78 + b"\r\n") + (b"x" * 78 + b"\r\n",) * 12
FIRST_IS_DOWN = (b"421 4.3.2 down\r\n", b"451 4.4.1 The upstream refuses service: 421 4.3.2 down\r\n")


@pytest.mark.parametrize("size", [None, 5000])
@both_strategies
async def test_too_big_for_the_upstream_that_stands_in_is_too_big_for_now(strategy: Strategy, size: int | None) -> None:
    async with (
        ScriptedUpstream() as first,
        ScriptedUpstream(extensions=SHRUNK) as second,
        relaying(settings(first, "first"), settings(second, "second"), strategy=strategy) as forwarder,
    ):
        said, told = FIRST_IS_DOWN
        mail = Mail("a@example.com", size=size)
        first.faults[Phase.GREETING] = Fault(Kind.REFUSE, said)
        relayed = await relay(forwarder, mail=mail, chunks=BIG)
        assert relayed.told.wire == told
        assert relayed.seen.outcomes == [("first", Outcome.DEFERRED), ("second", Outcome.REFUSED)]
        assert (await relay(forwarder)).told.code == 250  # small enough
        assert nothing_waits(forwarder)
        del first.faults[Phase.GREETING]
    async with (
        ScriptedUpstream(extensions=SHRUNK) as first,
        ScriptedUpstream() as second,
        relaying(settings(first, "first"), settings(second, "second"), strategy=strategy) as forwarder,
    ):
        assert (await relay(forwarder, mail=mail, chunks=BIG)).told.code == 250
        assert (len(first.kept), len(second.kept)) == (0, 1)


def nothing_waits(forwarder: UpstreamForwarder) -> bool:
    return all((one.pool.busy, one.pool.opening, one.pool.waiting) == (0, 0, 0) for one in forwarder.snapshot())


INTERNATIONAL = Mail("a@example.com", smtputf8=True)


@pytest.mark.parametrize("extensions", [SHRUNK, ("PIPELINING",), ("PIPELINING", "CHUNKING", "8BITMIME")])
@both_strategies
async def test_smtputf8_is_left_out_where_it_is_neither_offered_nor_needed(
    strategy: Strategy, extensions: Sequence[str]
) -> None:
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        for _ in range(2):
            relayed = await relay(forwarder, BOB, CAROL, mail=INTERNATIONAL)
            assert (relayed.codes, relayed.told.code) == ([250, 250], 250)
        assert all(b"SMTPUTF8" not in kept.mail for kept in upstream.kept)
        assert len(upstream.kept) == 2


@pytest.mark.parametrize("memory_limit", [10, 100_000])
@pytest.mark.parametrize("most", [1, 100])
@pytest.mark.parametrize(
    ("mail", "recipients", "chunks", "is_needed_by_all"),
    [
        (INTERNATIONAL, (BOB,), CHUNKS, False),
        (INTERNATIONAL, (BOB, CAROL), CHUNKS, False),
        (INTERNATIONAL, (BOB, CAROL), (HEADER, b"\r\n\xc3\xa4\r\n"), True),
        (INTERNATIONAL, (BOB, Recipient("ä@example.net")), CHUNKS, False),
        (INTERNATIONAL, (BOB, Recipient("b@example.net", orcpt="utf-8;ä@example.net")), CHUNKS, False),
        (Mail("ä@example.com", smtputf8=True), (BOB, CAROL), CHUNKS, True),
    ],
)
async def test_smtputf8_is_not_asked_for_where_it_is_known_that_nothing_needs_it(
    mail: Mail,
    recipients: Sequence[Recipient],
    chunks: Sequence[bytes],
    is_needed_by_all: bool,
    most: int,
    memory_limit: int,
) -> None:
    """RFC 6531 3.4. Buffered, all is known at MAIL."""
    async with (
        ScriptedUpstream() as upstream,
        relaying(
            settings(upstream, recipients_per_transaction=most),
            strategy=Strategy.BUFFERED,
            memory_limit_octets=memory_limit,
        ) as forwarder,
    ):
        assert (await relay(forwarder, *recipients, mail=mail, chunks=chunks)).told.code == 250
        assert sum(len(kept.addresses) for kept in upstream.kept) == len(recipients)
        for kept in upstream.kept:
            is_needed = is_needed_by_all or not b"".join(kept.recipients).isascii()
            assert (b"SMTPUTF8" in kept.mail) is is_needed


@pytest.mark.parametrize(
    ("extensions", "last"), [(EXTENSIONS, Recipient("ä@example.net")), (("PIPELINING",), Recipient("d@example.net"))]
)
async def test_recipients_one_by_one_need_no_other_upstream_than_together(
    extensions: Sequence[str], last: Recipient
) -> None:
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        ScriptedUpstream() as other,
        relaying(settings(upstream), settings(other, "other")) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, INTERNATIONAL, RecordedTransaction(INTERNATIONAL))
        for one in (BOB, CAROL, last):
            assert [answer.code for answer in await transaction.recipients([one])] == [250]
        assert (await transaction.content(CHUNKS)).code == 250
        transaction.abort()
        assert [len(kept.recipients) for kept in upstream.kept] == [3]
        assert other.connections == 0


@pytest.mark.parametrize("memory_limit", [10, 100_000])
@both_strategies
async def test_an_8bit_body_needs_no_smtputf8(strategy: Strategy, memory_limit: int) -> None:
    async with (
        ScriptedUpstream(extensions=("PIPELINING", "8BITMIME")) as upstream,
        relaying(settings(upstream), strategy=strategy, memory_limit_octets=memory_limit) as forwarder,
    ):
        body = b"\r\n\xc3\xa4\r\n"
        assert (await relay(forwarder, mail=INTERNATIONAL, chunks=(HEADER, body))).told.code == 250
        (kept,) = upstream.kept
        assert kept.content.endswith(body)
        assert b"SMTPUTF8" not in kept.mail
        assert (b"BODY=8BITMIME" in kept.mail) is (strategy is Strategy.BUFFERED)  # where it is known at MAIL
        header = HEADER + b"Content-Type: multipart/mixed; boundary=x\r\n"
        relayed = await relay(forwarder, mail=INTERNATIONAL, chunks=(header, body))
        assert relayed.told is replies.UPSTREAM_LACKS_SMTPUTF8
        assert len(upstream.kept) == 1


async def test_smtputf8_is_asked_for_on_each_route_that_needs_it() -> None:
    async with (
        ScriptedUpstream() as first,
        ScriptedUpstream() as second,
        relaying(
            settings(first, "first", recipients=("*@a.example",)),
            settings(second, "second"),
            strategy=Strategy.BUFFERED,
        ) as forwarder,
    ):
        people = (Recipient("p@a.example"), Recipient("ä@b.example"))
        assert (await relay(forwarder, *people, mail=INTERNATIONAL)).told.code == 250
        assert [b"SMTPUTF8" in one.kept[0].mail for one in (first, second)] == [False, True]


@pytest.mark.parametrize("memory_limit", [10, 100_000])
@pytest.mark.parametrize("has_other", [False, True])
@pytest.mark.parametrize(
    ("recipients", "chunks"),
    [
        ((Recipient("ä@example.net"),), CHUNKS),
        ((BOB, Recipient("ä@example.net")), CHUNKS),
        ((BOB, Recipient("b@example.net", orcpt="utf-8;ä@example.net")), CHUNKS),
        ((BOB,), (b"Subject: \xc3\xa4\r\n", b"\r\nseven\r\n")),
        ((BOB, CAROL), (b"Content-Type: multipart/mixed\r\n", b"\r\n\xc3\xa4\r\n")),
    ],
)
@both_strategies
async def test_what_needs_smtputf8_goes_to_an_upstream_that_has_it_or_nowhere_now(
    strategy: Strategy,
    recipients: Sequence[Recipient],
    chunks: Sequence[bytes],
    has_other: bool,
    memory_limit: int,
) -> None:
    lacking, having = ("PIPELINING", "8BITMIME"), EXTENSIONS if has_other else ("8BITMIME",)
    async with (
        ScriptedUpstream(extensions=lacking) as first,
        ScriptedUpstream(extensions=having) as second,
        relaying(
            settings(first, "first"), settings(second, "second"), strategy=strategy, memory_limit_octets=memory_limit
        ) as forwarder,
    ):
        seen = RecordedTransaction(INTERNATIONAL)
        transaction = Awaited.begin(forwarder, INTERNATIONAL, seen)
        answers = [(await transaction.recipients([one]))[0] for one in recipients]  # as clients without PIPELINING do
        reply = await transaction.content(chunks) if any(one.is_positive for one in answers) else answers[0]
        transaction.abort()
        if has_other:
            assert [answer.code for answer in answers] == [250] * len(recipients)
            assert reply.code == 250
            assert [kept.addresses for kept in second.kept] == [tuple(one.address for one in recipients)]
            assert b"SMTPUTF8" in second.kept[0].mail
        else:
            assert reply is replies.UPSTREAM_LACKS_SMTPUTF8
            assert second.kept == []
        assert first.kept == []
        assert nothing_waits(forwarder)
        assert (await relay(forwarder)).told.code == 250


async def test_a_sender_beyond_ascii_needs_smtputf8_whether_its_mail_says_so_or_not() -> None:
    async with (
        ScriptedUpstream(extensions=without("SMTPUTF8")) as upstream,
        relaying(settings(upstream)) as forwarder,
    ):
        assert (await relay(forwarder)).told.code == 250  # and it is known what the upstream offers
        for smtputf8 in (False, True):
            with pytest.raises(Transient) as refused:
                forwarder.begin(Mail("dörte@example.com", smtputf8=smtputf8), RecordedTransaction())
            assert refused.value.reply is replies.UPSTREAM_LACKS_SMTPUTF8


async def test_8bit_content_is_refused_for_good_where_8bitmime_was_not_offered() -> None:
    async with ScriptedUpstream(extensions=()) as upstream, relaying(settings(upstream)) as forwarder:
        seen = RecordedTransaction(EIGHT_BIT)
        seen.is_8bit_offered = False
        transaction = Awaited.begin(forwarder, EIGHT_BIT, seen)
        assert [reply.code for reply in await transaction.recipients([BOB])] == [250]
        assert await transaction.content((HEADER, b"\r\n\xc3\xa4\r\n")) is replies.NEEDS_8BITMIME
        assert upstream.kept == []


NEEDY = [
    (Mail("ä@example.com", smtputf8=True), replies.UPSTREAM_LACKS_SMTPUTF8),
    (Mail("a@example.com", body=Body.BINARY_MIME), replies.UPSTREAM_LACKS_BINARYMIME),
    (Mail("a@example.com", require_tls=True), replies.UPSTREAM_LACKS_REQUIRETLS),
    (Mail("a@example.com", size=1001), replies.MESSAGE_TOO_BIG),
]


async def test_a_bounce_is_not_lost_for_want_of_requiretls() -> None:
    """RFC 8689 5: SHOULD NOT be discarded where the next hop does not offer it."""
    async with ScriptedUpstream(extensions=("SIZE 1000",)) as upstream, relaying(settings(upstream)) as forwarder:
        assert (await relay(forwarder, mail=Mail("", require_tls=True))).told.code == 250
        assert b"REQUIRETLS" not in upstream.kept[0].mail


@pytest.mark.parametrize(("mail", "refusal"), NEEDY)
@both_strategies
async def test_what_the_upstream_lacks_is_refused_when_it_is_known_and_when_it_is_met(
    strategy: Strategy, mail: Mail, refusal: Reply
) -> None:
    async with (
        ScriptedUpstream(extensions=("SIZE 1000",)) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, mail, seen := RecordedTransaction())
        if strategy is Strategy.TRANSPARENT:
            assert await transaction.recipients([BOB]) == [refusal]
        else:
            assert [reply.code for reply in await transaction.recipients([BOB])] == [250]
            assert await transaction.content(CHUNKS) is refusal
        transaction.abort()
        is_for_now = refusal.is_transient  # whatever was offered in good faith
        assert seen.outcomes == [("up", Outcome.DEFERRED if is_for_now else Outcome.REFUSED)]
        with pytest.raises(DeliveryFailed) as caught:
            Awaited.begin(forwarder, mail, RecordedTransaction())
        assert caught.type is (Transient if is_for_now else Permanent)
        assert caught.value.reply is refusal
        assert (await relay(forwarder)).codes == [250]
        assert upstream.connections == 1


EIGHT_BIT = Mail("a@example.com", body=Body.EIGHT_BIT_MIME)


@pytest.mark.parametrize("memory_limit", [10, 100_000])
@both_strategies
async def test_7bit_content_needs_no_8bitmime_whatever_was_declared(strategy: Strategy, memory_limit: int) -> None:
    async with (
        ScriptedUpstream(extensions=("PIPELINING",)) as upstream,
        relaying(settings(upstream), strategy=strategy, memory_limit_octets=memory_limit) as forwarder,
    ):
        for _ in range(2):  # the first time its EHLO is not known yet
            assert (await relay(forwarder, mail=EIGHT_BIT)).codes == [250]
        assert [kept.mail for kept in upstream.kept] == [b"<a@example.com>"] * 2


@pytest.mark.parametrize("memory_limit", [10, 100_000])
@pytest.mark.parametrize("chunks", [(HEADER, b"\r\n\xc3\xa4\r\n"), (HEADER + b"X: \xe4\r\n", b"\r\nx\r\n")])
@both_strategies
async def test_8bit_content_that_the_upstream_cannot_take_now_is_deferred(
    strategy: Strategy, chunks: Sequence[bytes], memory_limit: int
) -> None:
    async with (
        ScriptedUpstream(extensions=("PIPELINING",)) as upstream,
        relaying(settings(upstream), strategy=strategy, memory_limit_octets=memory_limit) as forwarder,
    ):
        relayed = await relay(forwarder, mail=EIGHT_BIT, chunks=chunks)
        assert relayed.reply is replies.UPSTREAM_LACKS_8BITMIME
        assert relayed.seen.outcomes == [("up", Outcome.DEFERRED)]
        assert upstream.kept == []
        # Not declared, it passes as it always has; and the connection serves it.
        assert (await relay(forwarder, chunks=chunks)).reply is not None
        assert len(upstream.kept) == upstream.connections == 1


@both_strategies
async def test_another_upstream_takes_8bit_content(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream(extensions=()) as plain,
        ScriptedUpstream() as able,
        relaying(settings(plain, "plain"), settings(able, "able"), strategy=strategy) as forwarder,
    ):
        for _ in range(2):
            relayed = await relay(forwarder, mail=EIGHT_BIT, chunks=(HEADER, b"\r\n\xc3\xa4\r\n"))
            assert relayed.told.code == 250
        assert len(able.kept) == 2


@both_strategies
async def test_content_that_turns_out_too_big_is_refused_before_it_is_sent(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream(extensions=("PIPELINING", "SIZE 1000")) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder, chunks=(HEADER, b"\r\n" + b"x" * 1000))
        assert relayed.reply is replies.MESSAGE_TOO_BIG
        assert [(one.reply, one.error_type) for one in relayed.seen.deliveries] == [(None, relayed.reply.error_type)]
        assert upstream.kept == []
        assert (await relay(forwarder)).codes == [250]
        assert len(upstream.kept) == 1


async def test_another_upstream_has_what_the_first_one_lacks() -> None:
    async with (
        ScriptedUpstream(extensions=()) as plain,
        ScriptedUpstream() as able,
        relaying(settings(plain, "plain"), settings(able, "able")) as forwarder,
    ):
        await relay(forwarder)
        relayed = await relay(forwarder, Recipient("b\u00fc@example.net"), mail=Mail("a@example.com", smtputf8=True))
        assert relayed.codes == [250]
        assert relayed.seen.outcomes == [("plain", Outcome.DEFERRED), ("able", Outcome.RELAYED)]


@both_strategies
async def test_rcptmax_and_mailmax_are_kept(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream(extensions=("PIPELINING", "LIMITS RCPTMAX=1 MAILMAX=1")) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        await relay(forwarder)
        relayed = await relay(forwarder, BOB, CAROL)
        assert relayed.codes == [250, 250]
        assert relayed.told.code == 250
        assert [(kept.addresses, kept.connection) for kept in upstream.kept] == [
            ((BOB.address,), 1),
            ((BOB.address,), 2),
            ((CAROL.address,), 3),
        ]


@pytest.mark.parametrize("address", ["a\r\nRCPT TO:<x@example.com>", "a@b> SIZE=1", "", "a@b\x7f"])
@both_strategies
async def test_unsafe_addresses_reach_no_upstream(strategy: Strategy, address: str) -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), strategy=strategy) as forwarder:
        if address:
            with pytest.raises(Permanent) as caught:
                Awaited.begin(forwarder, Mail(address), RecordedTransaction())
            assert caught.value.reply is replies.BAD_SENDER
        relayed = await relay(forwarder, Recipient(address))
        assert list(relayed.recipients) == [replies.BAD_RECIPIENT]
        relayed = await relay(forwarder, Recipient("\u00fc@example.com"))
        assert list(relayed.recipients) == [replies.NEEDS_SMTPUTF8]
        assert upstream.commands == []


# Connections --------------------------------------------------------------------------------------------------


@both_strategies
@pytest.mark.both_loops
async def test_many_mails_at_once_share_few_connections(strategy: Strategy) -> None:
    limits = PoolLimits(connections=3)
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, limits=limits), strategy=strategy) as forwarder,
    ):
        relayed = await asyncio.gather(*(relay(forwarder) for _ in range(30)))
        assert all(one.reply is not None and one.reply.code == 250 for one in relayed)
        assert len(upstream.kept) == 30
        assert 1 < upstream.connections <= 3
        (snapshot,) = forwarder.snapshot()
        assert (snapshot.pool.busy, snapshot.pool.opening, snapshot.pool.waiting) == (0, 0, 0)
        assert snapshot.pool.idle == upstream.connections
        await forwarder.close()
        await until(lambda: not upstream.open_connections)
        assert upstream.verbs.count("QUIT") == upstream.connections


async def test_a_connection_is_retired_after_its_messages_and_its_age() -> None:
    async with ScriptedUpstream() as upstream:
        async with relaying(settings(upstream, limits=PoolLimits(messages=2))) as forwarder:
            for _ in range(5):
                await relay(forwarder)
            assert [kept.connection for kept in upstream.kept] == [1, 1, 2, 2, 3]
        async with relaying(settings(upstream, limits=PoolLimits(age_seconds=0))) as forwarder:
            for _ in range(2):
                await relay(forwarder)
            assert [kept.connection for kept in upstream.kept[5:]] == [4, 5]


@pytest.mark.both_loops
async def test_an_idle_connection_is_closed_after_a_while() -> None:
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, limits=PoolLimits(idle_seconds=0.01))) as forwarder,
    ):
        await relay(forwarder)
        await until(lambda: not upstream.open_connections)
        assert forwarder.snapshot()[0].pool.idle == 0
        assert upstream.verbs[-1] == "QUIT"


async def test_nobody_looks_at_the_clock_for_an_upstream_without_connections() -> None:
    class Watched(Sweep):
        count = 0

        def add(self, swept: Callable[[float], None]) -> None:
            self.count += 1
            super().add(swept)

        def remove(self, swept: Callable[[float], None]) -> None:
            self.count -= 1
            super().remove(swept)

    sweep = Watched()
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, limits=PoolLimits(idle_seconds=0.01)), sweep=sweep) as forwarder,
    ):
        for _ in range(2):
            assert sweep.count == 0
            await relay(forwarder)
            assert sweep.count == 1
            await until(lambda: not sweep.count)
            assert forwarder.snapshot()[0].pool.idle == 0


@pytest.mark.both_loops
async def test_the_death_of_an_idle_connection_is_noticed_at_once() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        await relay(forwarder)
        upstream.drop_connections()
        await until(lambda: forwarder.snapshot()[0].pool.idle == 0)
        relayed = await relay(forwarder)
        assert relayed.seen.deliveries[0].is_reused is False


@both_strategies
async def test_a_new_connection_a_mail_is_not_made(strategy: Strategy) -> None:
    """What relays of the field do: connect, say EHLO, and QUIT for each mail."""
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), strategy=strategy) as forwarder:
        for _ in range(20):
            await relay(forwarder)
        assert upstream.connections == 1
        assert upstream.verbs.count("EHLO") == 1


# Routes -------------------------------------------------------------------------------------------------------


@both_strategies
async def test_senders_and_recipients_choose_the_upstream(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream() as inner,
        ScriptedUpstream() as sales,
        ScriptedUpstream() as other,
        relaying(
            settings(inner, "inner", recipients=("*@example.net",)),
            settings(sales, "sales", senders=("*@SALES.example",)),
            settings(other, "other", senders=("*@example.com",)),
            strategy=strategy,
        ) as forwarder,
    ):
        await relay(forwarder, BOB)
        await relay(forwarder, Recipient("x@example.org"))
        await relay(forwarder, Recipient("y@example.org"), mail=Mail("z@sales.example"))
        assert [kept.addresses for kept in inner.kept] == [("bob@example.net",)]
        assert [kept.addresses for kept in other.kept] == [("x@example.org",)]
        assert [kept.addresses for kept in sales.kept] == [("y@example.org",)]
        mixed = await relay(forwarder, BOB, Recipient("x@example.org"), CAROL)
        assert mixed.codes == [250, 250, 250]
        assert mixed.told.code == 250
        assert inner.kept[-1].addresses == ("bob@example.net", "carol@example.net")
        assert other.kept[-1].addresses == ("x@example.org",)
        assert other.kept[-1].content == inner.kept[-1].content


async def test_recipients_with_one_preferred_upstream_share_only_the_spare_ones_of_all() -> None:
    """The second upstream is for example.net alone: it may not get a mail that has other recipients too."""
    faults = {Phase.GREETING: Fault(Kind.CLOSE)}
    other = Recipient("x@example.org")
    async with ScriptedUpstream(faults=faults) as first, ScriptedUpstream() as second, ScriptedUpstream() as third:
        async with relaying(
            settings(first, "first"),
            settings(second, "second", recipients=("*@example.net",)),
            settings(third, "third"),
            strategy=Strategy.BUFFERED,
        ) as forwarder:
            assert (await relay(forwarder, BOB, other)).told.code == 250
            assert (len(second.kept), len(third.kept)) == (0, 1)
        async with relaying(
            settings(first, "first"),
            settings(second, "second", recipients=("*@example.net",)),
            settings(third, "third"),
        ) as forwarder:
            seen = RecordedTransaction()
            transaction = Awaited.begin(forwarder, MAIL, seen)
            assert [reply.code for reply in await transaction.recipients([BOB])] == [250]
            assert [reply.code for reply in await transaction.recipients([other])] == [250]
            assert (await transaction.content(CHUNKS)).code == 250
            transaction.abort()
        assert second.kept[-1].addresses == (BOB.address,)  # it had the mail by then
        assert third.kept[-1].addresses == (other.address,)


async def test_nobody_serves_a_sender_or_a_recipient() -> None:
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, senders=("*@example.com",), recipients=("*@example.net",))) as forwarder,
    ):
        with pytest.raises(Permanent) as caught:
            Awaited.begin(forwarder, Mail("a@example.org"), RecordedTransaction())
        assert caught.value.reply is replies.RELAY_DENIED
        assert list((await relay(forwarder, Recipient("x@example.org"))).recipients) == [replies.RELAY_DENIED]
        assert upstream.connections == 0


# LMTP ---------------------------------------------------------------------------------------------------------


def lmtp_verdict(address: str) -> bytes | None:
    return {"gone@example.net": b"550 5.1.1 gone\r\n", "full@example.net": b"452 4.2.2 full\r\n"}.get(address)


@pytest.mark.parametrize("extensions", [EXTENSIONS, without("CHUNKING"), ()])
@pytest.mark.parametrize(
    ("recipients", "expected", "outcome"),
    [
        ((BOB,), b"250 2.0.0 delivered\r\n", Outcome.RELAYED),
        ((BOB, CAROL), b"250 2.0.0 delivered\r\n", Outcome.RELAYED),
        ((GONE,), b"550 5.1.1 gone\r\n", Outcome.REFUSED),
        ((GONE, FULL), b"452 4.2.2 full\r\n", Outcome.DEFERRED),
        ((BOB, GONE), b"550 5.1.1 gone (taken for 1 of 2 recipients)\r\n", Outcome.PARTLY_RELAYED),
        ((FULL, BOB), b"451 4.2.0 Message taken for 1 of 2 recipients: 452 4.2.2 full\r\n", Outcome.PARTLY_RELAYED),
        (
            (GONE, BOB, FULL, CAROL),
            b"451 4.2.0 Message taken for 2 of 4 recipients: 452 4.2.2 full\r\n",
            Outcome.PARTLY_RELAYED,
        ),
    ],
)
@both_strategies
async def test_lmtp_answers_are_folded_into_one(
    strategy: Strategy,
    recipients: Sequence[Recipient],
    expected: bytes,
    outcome: Outcome,
    extensions: Sequence[str],
) -> None:
    async with (
        ScriptedUpstream(is_lmtp=True, extensions=extensions, lmtp_verdict=lmtp_verdict) as upstream,
        relaying(settings(upstream, is_lmtp=True), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder, *recipients)
        assert relayed.reply is not None
        assert relayed.reply.wire == expected
        assert relayed.seen.outcomes == [("up", outcome)]
        attempt = relayed.seen.deliveries[0]
        codes = [int((lmtp_verdict(one.address) or b"250")[:3]) for one in recipients]
        counts = attempt.accepted_count, attempt.refused_count, attempt.deferred_count
        assert counts == (codes.count(250), codes.count(550), codes.count(452))
        # Of the attempt, what the upstream said itself.
        decisive = next((code for code in (452, 550) if code in codes), 250)
        said = {250: "250 2.0.0 delivered", 452: "452 4.2.2 full", 550: "550 5.1.1 gone"}
        assert str(attempt.reply) == said[decisive]
        assert upstream.verbs[0] == "LHLO"
        relayed = await relay(forwarder)
        assert relayed.reply is not None
        assert relayed.reply.code == 250
        assert upstream.connections == 1


async def test_lmtp_over_a_unix_socket(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("s") / "lmtp")
    upstream = ScriptedUpstream(is_lmtp=True)
    await upstream.start_unix(path)
    async with upstream, relaying(UpstreamSettings("local", path, None, is_lmtp=True)) as forwarder:
        relayed = await relay(forwarder)
        assert relayed.seen.deliveries[0].peer == Endpoint(path)
        assert len(upstream.kept) == 1


# Others -------------------------------------------------------------------------------------------------------


def test_a_relay_needs_an_upstream() -> None:
    with pytest.raises(ValueError):
        UpstreamForwarder([], hostname="gw.example", observer=Observer(), sweep=Sweep())


async def test_reprs_tell_the_state_and_no_secret() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        await relay(forwarder)
        assert re.search(r"Transparent.*up 127\.0\.0\.1:\d+ <Pool 1 idle, 0 busy.*closed", repr(forwarder))


async def test_an_old_server_that_knows_only_helo_is_served() -> None:
    async with ScriptedUpstream(knows_ehlo=False) as upstream, relaying(settings(upstream)) as forwarder:
        assert (await relay(forwarder)).codes == [250]
        assert upstream.verbs[:2] == ["EHLO", "HELO"]
        assert len(upstream.kept) == 1


# Content that is re-encoded -----------------------------------------------------------------------------------

GREETINGS = (b"Subject: x\r\n", b"\r\n", "Grüße\r\n".encode() * 300)
REENCODED = b"Gr=C3=BC=C3=9Fe\r\n" * 300


@pytest.mark.parametrize("memory_limit", [10, 100_000], ids=["file", "memory"])
@pytest.mark.parametrize("extensions", [("PIPELINING", "SIZE 50000"), ("PIPELINING", "CHUNKING"), ()])
@pytest.mark.parametrize("mail", [EIGHT_BIT, MAIL], ids=["declared", "not declared"])
@both_strategies
async def test_8bit_content_is_re_encoded_where_that_is_wanted(
    strategy: Strategy, mail: Mail, extensions: Sequence[str], memory_limit: int
) -> None:
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        ScriptedUpstream() as other,
        relaying(
            settings(upstream, reencode_8bit=True),
            settings(other, "other"),
            strategy=strategy,
            memory_limit_octets=memory_limit,
        ) as forwarder,
    ):
        await forwarder.learn(wait_seconds=SECONDS)
        assert forwarder.capabilities().eight_bit_mime
        assert not forwarder.keeps_8bit()
        for recipients in ((BOB,), (BOB, CAROL)):
            assert (await relay(forwarder, *recipients, mail=mail, chunks=GREETINGS)).told.code == 250
        assert (await relay(forwarder, mail=mail)).told.code == 250
        first, second, seven = upstream.kept
        for kept in (first, second):
            assert kept.content.isascii()
            assert kept.content.endswith(b"\r\n\r\n" + REENCODED)
            assert b"Content-Transfer-Encoding: quoted-printable\r\n" in kept.content
        assert seven.content == HEADER + BODY
        assert all(b"BODY=" not in kept.mail for kept in upstream.kept)
        assert other.kept == []
        assert nothing_waits(forwarder)


@pytest.mark.parametrize("memory_limit", [10, 100_000], ids=["file", "memory"])
@both_strategies
async def test_content_that_was_re_encoded_for_one_upstream_goes_to_the_next_as_it_came(
    strategy: Strategy, memory_limit: int
) -> None:
    async with (
        ScriptedUpstream(extensions=("PIPELINING",)) as first,
        ScriptedUpstream() as second,
        relaying(
            settings(first, "first", reencode_8bit=True),
            settings(second, "second"),
            strategy=strategy,
            memory_limit_octets=memory_limit,
        ) as forwarder,
    ):
        first.faults[Phase.CONTENT] = Fault(Kind.CLOSE)
        assert (await relay(forwarder, mail=EIGHT_BIT, chunks=GREETINGS)).told.code in (250, 451)
        first.faults[Phase.DATA] = Fault(Kind.GOODBYE)
        assert (await relay(forwarder, mail=EIGHT_BIT, chunks=GREETINGS)).told.code == 250
        assert second.kept[-1].content == b"".join(GREETINGS)
        assert b"BODY=8BITMIME" in second.kept[-1].mail
        assert first.kept == []


@pytest.mark.parametrize("has_other", [False, True])
@both_strategies
async def test_what_cannot_be_re_encoded_is_refused_for_good_or_goes_to_who_takes_it(
    strategy: Strategy, has_other: bool
) -> None:
    async with (
        ScriptedUpstream(extensions=("PIPELINING",)) as first,
        ScriptedUpstream() as second,
        relaying(
            settings(first, "first", reencode_8bit=True),
            *([settings(second, "second")] if has_other else []),
            strategy=strategy,
        ) as forwarder,
    ):
        told = (await relay(forwarder, mail=EIGHT_BIT, chunks=("Subject: ü\r\n".encode(), b"\r\nx\r\n"))).told
        if has_other:
            assert told.code == 250
            assert len(second.kept) == 1
        else:
            assert str(told) == "554 5.6.5 8-bit content cannot be re-encoded: a header field holds 8-bit octets"
        assert first.kept == []
        assert nothing_waits(forwarder)
        assert (await relay(forwarder)).told.code == 250


@both_strategies
async def test_what_grows_too_big_by_re_encoding_is_too_big(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream(extensions=("SIZE 4000",)) as upstream,
        relaying(settings(upstream, reencode_8bit=True), strategy=strategy) as forwarder,
    ):
        assert sum(map(len, GREETINGS)) < 4000 < len(REENCODED)
        assert (await relay(forwarder, mail=EIGHT_BIT, chunks=GREETINGS)).told is replies.MESSAGE_TOO_BIG
        assert upstream.kept == []


@both_strategies
async def test_a_client_that_leaves_while_its_mail_is_re_encoded_leaves_nothing(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream(extensions=("PIPELINING",)) as upstream,
        relaying(settings(upstream, reencode_8bit=True), strategy=strategy, memory_limit_octets=10) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, EIGHT_BIT, RecordedTransaction(EIGHT_BIT))
        assert [reply.code for reply in await transaction.recipients([BOB])] == [250]
        sending = asyncio.create_task(transaction.content(GREETINGS))
        await asyncio.sleep(0)
        transaction.abort()
        sending.cancel()
        await until(lambda: nothing_waits(forwarder))
        assert upstream.kept == []
        assert (await relay(forwarder, mail=EIGHT_BIT, chunks=GREETINGS)).told.code == 250
