"""Upstreams that misbehave: every phase, every fault, both strategies.

For each: what the client is told, what the upstreams hold (nothing lost that was acknowledged, nothing twice), what the
observer is told, and that nothing out of step is kept.
"""

import asyncio
import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from otel_smtp.forwarding import breaker, pool, transmitting
from otel_smtp.forwarding.breaker import BreakerState
from otel_smtp.forwarding.faults import quoting
from otel_smtp.forwarding.settings import MEMORY_LIMIT_OCTETS, PoolLimits, Strategy, Timeouts, UpstreamSettings
from otel_smtp.observing import DeliveryPhase, Outcome
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.replies import ErrorType, Reply
from tests.support.deliveries import MAIL, Awaited, LateDeliveries, RecordedTransaction, phases_of
from tests.support.fault_proxy import FaultProxy
from tests.support.ports import unclaimed_port
from tests.support.relaying import (
    BOB,
    BODY,
    CAROL,
    CHUNKS,
    HEADER,
    PATIENT,
    both_strategies,
    relay,
    relaying,
    said_by,
    settings,
    without,
)
from tests.support.upstream import EXTENSIONS, Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import SECONDS, until

SHORT = 0.25
DAVE = Recipient("dave@example.net")
NO_CHUNKING = tuple(without("CHUNKING"))
NO_PIPELINING = tuple(without("CHUNKING", "PIPELINING"))


def impatient_at(phase: Phase, kind: Kind) -> Timeouts:
    """Timeouts that are short only where the fault is a silence."""
    if kind is not Kind.STALL:
        return PATIENT
    match phase:
        case Phase.CONNECT | Phase.GREETING:
            return replace(PATIENT, greeting=SHORT)
        case Phase.DATA:
            return replace(PATIENT, data=SHORT, reply=SHORT)
        case Phase.REPLY:
            return replace(PATIENT, reply=SHORT)
        case _:
            return replace(PATIENT, command=SHORT, data=SHORT, reply=SHORT)


def nothing_is_kept_out_of_step(forwarder_snapshot: Sequence[object]) -> bool:
    return all(
        (upstream.pool.busy, upstream.pool.opening, upstream.pool.waiting) == (0, 0, 0)  # type: ignore[attr-defined]
        for upstream in forwarder_snapshot
    )


BROKEN_REPLIES = (Kind.GARBAGE, Kind.ENDLESS_LINE, Kind.ENDLESS_LINES)
LOST = (Kind.CLOSE, Kind.RESET, Kind.STALL)
# Phase and kind, for a new connection, with what is told when there is no other upstream.
BEFORE_MAIL = [
    *((phase, kind, replies.UPSTREAM_LOST) for phase in (Phase.GREETING, Phase.EHLO) for kind in LOST[:2]),
    *((phase, Kind.STALL, replies.UPSTREAM_SILENT) for phase in (Phase.GREETING, Phase.EHLO)),
    *((phase, Kind.GOODBYE, replies.UPSTREAM_REFUSES) for phase in (Phase.GREETING, Phase.EHLO)),
    *((phase, Kind.REFUSE, replies.UPSTREAM_REFUSES) for phase in (Phase.GREETING, Phase.EHLO)),
    *((phase, kind, replies.UPSTREAM_PROTOCOL) for phase in (Phase.GREETING, Phase.EHLO) for kind in BROKEN_REPLIES),
    (Phase.GREETING, Kind.TWICE, replies.UPSTREAM_PROTOCOL),
    (Phase.CONNECT, Kind.CLOSE, replies.UPSTREAM_LOST),
    (Phase.CONNECT, Kind.RESET, replies.UPSTREAM_LOST),
]


@pytest.mark.parametrize(("phase", "kind", "told"), BEFORE_MAIL)
@both_strategies
async def test_a_fault_before_the_mail(strategy: Strategy, phase: Phase, kind: Kind, told: Reply) -> None:
    """No upstream: 4yz, never 554. Another upstream: it has the mail, and the client notices nothing."""
    faults = {phase: Fault(kind)}
    timeouts = impatient_at(phase, kind)
    async with ScriptedUpstream(faults=faults) as bad, ScriptedUpstream() as good:
        async with relaying(settings(bad, "bad", timeouts=timeouts), strategy=strategy) as forwarder:
            relayed = await relay(forwarder)
            assert relayed.told == quoting(told, said_by(Fault(kind)))
            assert relayed.seen.outcomes == [("bad", Outcome.DEFERRED)]
            assert relayed.seen.deliveries[0].error_type is told.error_type
            assert relayed.seen.deliveries[0].reply == said_by(Fault(kind))
            assert nothing_is_kept_out_of_step(forwarder.snapshot())
            assert forwarder.snapshot()[0].pool.idle == 0
        async with relaying(
            settings(bad, "bad", timeouts=timeouts), settings(good, "good"), strategy=strategy
        ) as forwarder:
            relayed = await relay(forwarder)
            assert relayed.told.code == 250
            assert relayed.seen.outcomes == [("bad", Outcome.DEFERRED), ("good", Outcome.RELAYED)]
            assert [delivery.attempt for delivery in relayed.seen.deliveries] == [1, 2]
        assert (len(bad.kept), len(good.kept)) == (0, 1)


def ended_before(strategy: Strategy, extensions: Sequence[str], phase: Phase) -> bool:
    """Whether the content had left with its end before the reply of `phase` could be read."""
    in_one = strategy is Strategy.BUFFERED and "CHUNKING" in extensions
    return phase is Phase.REPLY or (in_one and phase in (Phase.MAIL, Phase.RCPT))


WAYS = {"chunking": EXTENSIONS, "data": NO_CHUNKING, "plain": NO_PIPELINING}
MAIL_PHASES = (Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.REPLY)


def ways(*names: str) -> pytest.MarkDecorator:
    """How the content travels, and each phase that there is on that way."""
    return pytest.mark.parametrize(
        ("extensions", "phase"),
        [
            pytest.param(WAYS[name], phase, id=f"{name}-{phase}")
            for name in names
            for phase in MAIL_PHASES
            if phase is not Phase.DATA or name != "chunking"
        ],
    )


@pytest.mark.parametrize("kind", [*LOST, Kind.GOODBYE, *BROKEN_REPLIES])
@ways("chunking", "data")
@both_strategies
async def test_a_fault_within_the_mail(strategy: Strategy, extensions: Sequence[str], phase: Phase, kind: Kind) -> None:
    """Before the content has left: the next upstream. After: never again, and the client is told that nobody knows."""
    faults = {phase: Fault(kind)}
    ended = ended_before(strategy, extensions, phase)
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as bad,
        ScriptedUpstream() as good,
        relaying(
            settings(bad, "bad", timeouts=impatient_at(phase, kind)), settings(good, "good"), strategy=strategy
        ) as forwarder,
    ):
        relayed = await relay(forwarder)
        assert nothing_is_kept_out_of_step(forwarder.snapshot())
        assert forwarder.snapshot()[0].pool.idle == 0
        assert bad.kept == []
        if kind in BROKEN_REPLIES:
            assert relayed.told is (replies.GARBLED_OUTCOME if ended else replies.UPSTREAM_PROTOCOL)
            assert good.kept == []
            assert relayed.seen.outcomes == [("bad", Outcome.UNKNOWN if ended else Outcome.DEFERRED)]
        elif ended and kind is not Kind.GOODBYE:
            assert relayed.told is replies.OUTCOME_UNKNOWN
            assert good.kept == []
            assert relayed.seen.outcomes == [("bad", Outcome.UNKNOWN)]
            assert relayed.seen.deliveries[0].error_type is ErrorType.OUTCOME_UNKNOWN
        else:
            assert relayed.told.code == 250
            assert [kept.content for kept in good.kept] == [HEADER + BODY]
            assert relayed.seen.outcomes[-1] == ("good", Outcome.RELAYED)
            assert relayed.seen.outcomes[0] == ("bad", Outcome.DEFERRED)
            codes = [delivery.reply.code if delivery.reply else None for delivery in relayed.seen.deliveries]
            assert codes[0] == (421 if kind is Kind.GOODBYE else None)


@pytest.mark.parametrize("code", [b"451 4.7.1 grey\r\n", b"550 5.7.1 spam\r\n", b"552-5.2.2 one\r\n552 5.2.2 two\r\n"])
@ways("chunking", "data", "plain")
@both_strategies
async def test_a_refusal_is_passed_on_as_it_is(
    strategy: Strategy, phase: Phase, code: bytes, extensions: Sequence[str]
) -> None:
    faults = {phase: Fault(Kind.REFUSE, code, times=1)}
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as upstream,
        ScriptedUpstream() as other,
        relaying(settings(upstream), settings(other, "other"), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder)
        assert relayed.told.wire == code
        assert relayed.told.error_type is ErrorType.UPSTREAM_REFUSED
        assert relayed.seen.outcomes == [("up", Outcome.DEFERRED if code[:1] == b"4" else Outcome.REFUSED)]
        assert relayed.seen.deliveries[0].reply == relayed.told
        assert (len(upstream.kept), len(other.kept)) == (0, 0)
        # The connection is as good as before, and nothing of the refused mail is left on it.
        assert (await relay(forwarder)).told.code == 250
        assert [kept.content for kept in upstream.kept] == [HEADER + BODY]
        assert upstream.connections == 1


@pytest.mark.parametrize("phase", [Phase.GREETING, Phase.EHLO, Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.REPLY])
@both_strategies
async def test_replies_in_pieces_are_replies(strategy: Strategy, phase: Phase) -> None:
    faults = {phase: Fault(Kind.PIECES)}
    async with (
        ScriptedUpstream(extensions=NO_CHUNKING, faults=faults) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        assert (await relay(forwarder)).told.code == 250
        assert len(upstream.kept) == 1


@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.REPLY])
@pytest.mark.parametrize("wrong", [b"354 go\r\n", b"334 go\r\n", b"199 wait\r\n", b"600 what\r\n"])
@both_strategies
async def test_a_reply_of_the_wrong_class_is_never_passed_on(strategy: Strategy, phase: Phase, wrong: bytes) -> None:
    faults = {phase: Fault(Kind.REFUSE, wrong)}
    async with (
        ScriptedUpstream(faults=faults) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder)
        # Buffered, the end of the content goes out with the envelope: what was made of it is known to nobody.
        has_ended = phase is Phase.REPLY or strategy is Strategy.BUFFERED
        is_reply = wrong.startswith(b"3")
        if has_ended:
            assert relayed.told is replies.GARBLED_OUTCOME
        elif is_reply:
            assert relayed.told == quoting(replies.UPSTREAM_PROTOCOL, Reply(int(wrong[:3]), None, ("go",)))
        else:
            assert relayed.told is replies.UPSTREAM_PROTOCOL
        assert (relayed.seen.outcomes[0][1] is Outcome.UNKNOWN) == has_ended
        told_at = [(at, reply.code) for _, at, reply in relayed.seen.deliveries[0].phases if reply is not None]
        assert ((DeliveryPhase(phase), int(wrong[:3])) in told_at) is is_reply
        assert forwarder.snapshot()[0].pool.idle == 0


@both_strategies
async def test_a_2yz_to_data_is_never_passed_on(strategy: Strategy) -> None:
    faults = {Phase.DATA: Fault(Kind.REFUSE, b"250 2.0.0 delivered, trust me\r\n")}
    async with (
        ScriptedUpstream(extensions=NO_CHUNKING, faults=faults) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        told = (await relay(forwarder)).told
        assert (told.code, str(told.enhanced)) == (451, "4.5.0")
        assert told.text.endswith(": 250 2.0.0 delivered, trust me")


@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.REPLY])
@pytest.mark.parametrize("extensions", WAYS.values(), ids=WAYS)
@both_strategies
async def test_one_reply_too_many_spoils_the_connection_and_no_later_mail(
    strategy: Strategy, extensions: Sequence[str], phase: Phase
) -> None:
    faults = {phase: Fault(Kind.TWICE, times=1)}
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        first = await relay(forwarder)
        is_unknown = first.seen.outcomes[0][1] is Outcome.UNKNOWN
        own = replies.GARBLED_OUTCOME if is_unknown else replies.UPSTREAM_PROTOCOL
        assert (first.told.code, first.told.enhanced) == (451, own.enhanced)
        assert first.told.text.startswith(own.text)
        held = len(upstream.kept)
        second = await relay(forwarder)
        assert second.told.code == 250
        assert len(upstream.kept) == held + 1
        assert upstream.connections == 2


@pytest.mark.parametrize("surplus", [b"4", b"42", b"421 4.3.2 b", b"421 4.3.2 bye\r\n"])
@pytest.mark.parametrize("is_lmtp", [False, True])
@both_strategies
async def test_a_farewell_behind_the_final_250_leaves_it_true_however_it_is_cut(
    strategy: Strategy, is_lmtp: bool, surplus: bytes
) -> None:
    faults = {Phase.REPLY: Fault(Kind.FAREWELL, surplus, times=1)}
    async with (
        ScriptedUpstream(is_lmtp=is_lmtp, faults=faults) as upstream,
        relaying(settings(upstream, is_lmtp=is_lmtp), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder, BOB, CAROL)
        assert relayed.told.code == 250
        assert relayed.seen.outcomes == [("up", Outcome.RELAYED)]
        assert forwarder.snapshot()[0].pool.idle == 0
        assert (await relay(forwarder)).told.code == 250
        assert (len(upstream.kept), upstream.connections) == (2, 2)


async def test_one_reply_too_many_between_two_groups_of_recipients() -> None:
    faults = {Phase.RCPT: Fault(Kind.TWICE, times=1)}
    async with ScriptedUpstream(faults=faults) as upstream, relaying(settings(upstream)) as forwarder:
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        assert [reply.code for reply in await transaction.recipients([BOB])] == [250]
        assert await transaction.recipients([CAROL]) == [replies.UPSTREAM_PROTOCOL]
        transaction.abort()
        assert forwarder.snapshot()[0].pool.idle == 0


@pytest.mark.parametrize(
    ("extensions", "is_asked_more"),
    [(EXTENSIONS, True), (NO_CHUNKING, True), (NO_CHUNKING, False), (NO_PIPELINING, True), (NO_PIPELINING, False)],
)
@pytest.mark.parametrize("refusal", [b"550 5.1.1 nobody here\r\n", b"450 4.2.0 not yet\r\n"])
async def test_who_was_accepted_is_not_left_out_where_another_upstream_refuses_them(
    refusal: bytes, extensions: Sequence[str], is_asked_more: bool
) -> None:
    """Bob's client has a 250 for him. So the mail goes to an upstream that takes all of them, or to none."""
    async with (
        ScriptedUpstream(extensions=extensions) as first,
        ScriptedUpstream(extensions=extensions, verdict={BOB.address: refusal}.get) as second,
        ScriptedUpstream(extensions=extensions) as third,
    ):
        for others in ([settings(second, "second"), settings(third, "third")], [settings(second, "second")]):
            async with relaying(settings(first, "first"), *others) as forwarder:
                transaction = Awaited.begin(forwarder, MAIL, seen := RecordedTransaction())
                assert [reply.code for reply in await transaction.recipients([CAROL, BOB])] == [250, 250]
                await first.say_all(b"421 4.3.2 shutting down\r\n")
                first.faults[Phase.GREETING] = Fault(Kind.CLOSE)
                asked = await transaction.recipients([DAVE]) if is_asked_more else ()
                told = await transaction.content(CHUNKS)
                transaction.abort()
                if len(others) == 2:
                    assert {reply.code for reply in (*asked, told)} == {250}
                    (kept,) = third.kept
                    assert kept.addresses[:2] == (CAROL.address, BOB.address)
                    assert seen.outcomes[-2:] == [("second", Outcome.DEFERRED), ("third", Outcome.RELAYED)]
                else:
                    assert {reply.code for reply in (*asked, told)} == {451}
                    assert refusal[4:-2].decode() in told.text
                del first.faults[Phase.GREETING]
        assert (first.kept, second.kept) == ([], [])


async def test_a_421_between_two_groups_of_recipients_is_a_lost_connection() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        transaction = Awaited.begin(forwarder, MAIL, RecordedTransaction())
        await transaction.recipients([BOB])
        await upstream.say_all(b"421 4.3.2 shutting down\r\n")
        assert [reply.code for reply in await transaction.recipients([CAROL])] == [250]
        assert (await transaction.content(CHUNKS)).code == 250
        assert upstream.connections == 2
        assert upstream.kept[0].addresses == ("bob@example.net", "carol@example.net")


@both_strategies
async def test_a_refused_reset_ends_the_connection_and_is_no_verdict(strategy: Strategy) -> None:
    faults = {
        Phase.REPLY: Fault(Kind.REFUSE, b"550 5.7.1 spam\r\n", times=1),
        Phase.RSET: Fault(Kind.REFUSE, b"500 5.5.2 what\r\n", times=1),
    }
    async with (
        ScriptedUpstream(faults=faults) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        assert (await relay(forwarder)).told.code == 550
        second = await relay(forwarder)
        is_unknown = strategy is Strategy.BUFFERED  # the content was on its way already
        assert second.told is (replies.GARBLED_OUTCOME if is_unknown else replies.UPSTREAM_PROTOCOL)
        assert (await relay(forwarder)).told.code == 250
        assert upstream.connections == 2


async def test_lmtp_that_breaks_off_between_its_verdicts() -> None:
    """One recipient has the mail: the client must keep it for the other, whatever that costs the first."""
    for verdict, told, outcome in (
        (
            b"421 4.3.2 bye\r\n",
            "451 4.2.0 Message taken for 1 of 2 recipients: 451 4.4.1 The upstream refuses service: 421 4.3.2 bye",
            Outcome.PARTLY_RELAYED,
        ),
        (
            b"",
            "451 4.4.2 Connection to the upstream lost, outcome unknown (taken for 1 of 2 recipients)",
            Outcome.UNKNOWN,
        ),
    ):
        answers = {"bob@example.net": b"250 2.0.0 delivered\r\n", "carol@example.net": verdict}
        async with ScriptedUpstream(is_lmtp=True, lmtp_verdict=answers.get) as upstream:
            timeouts = Timeouts(5, 5, 5, 5, 5, SHORT, 5)
            async with relaying(settings(upstream, is_lmtp=True, timeouts=timeouts)) as forwarder:
                relayed = await relay(forwarder, BOB, CAROL)
                assert str(relayed.told) == told
                assert relayed.seen.outcomes == [("up", outcome)]
                assert forwarder.snapshot()[0].pool.idle == 0


# Kept connections ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.CLOSE, Kind.RESET, Kind.GOODBYE])
@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT])
@pytest.mark.parametrize(
    ("strategy", "extensions"),
    [(Strategy.TRANSPARENT, EXTENSIONS), (Strategy.TRANSPARENT, NO_CHUNKING), (Strategy.BUFFERED, NO_CHUNKING)],
)
@pytest.mark.both_loops
async def test_a_stale_connection_is_replaced_by_a_fresh_one_within_the_same_attempt(
    strategy: Strategy, extensions: Sequence[str], phase: Phase, kind: Kind
) -> None:
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        ScriptedUpstream() as other,
        relaying(settings(upstream), settings(other, "other"), strategy=strategy) as forwarder,
    ):
        await relay(forwarder)
        upstream.faults[phase] = Fault(kind, times=1)
        relayed = await relay(forwarder)
        assert relayed.told.code == 250
        assert relayed.seen.outcomes == [("up", Outcome.RELAYED)]
        (delivery,) = relayed.seen.deliveries
        assert phases_of(delivery).count(DeliveryPhase.POOL) == 2
        assert not delivery.is_reused
        assert (len(upstream.kept), len(other.kept), upstream.connections) == (2, 0, 2)
        assert forwarder.snapshot()[0].pool.breaker is BreakerState.CLOSED


@pytest.mark.parametrize("kind", [Kind.CLOSE, Kind.RESET, Kind.GOODBYE])
async def test_a_fresh_connection_that_dies_at_its_first_mail_is_no_reason_for_another(kind: Kind) -> None:
    async with (
        ScriptedUpstream(faults={Phase.MAIL: Fault(kind)}) as bad,
        ScriptedUpstream() as good,
        relaying(settings(bad, "bad"), settings(good, "good")) as forwarder,
    ):
        assert (await relay(forwarder)).told.code == 250
        assert (bad.connections, len(good.kept)) == (1, 1)


async def test_silence_on_a_kept_connection_is_not_waited_for_twice() -> None:
    timeouts = Timeouts(5, 5, SHORT, 5, 5, 5, 5)
    async with (
        ScriptedUpstream() as bad,
        ScriptedUpstream() as good,
        relaying(settings(bad, "bad", timeouts=timeouts), settings(good, "good")) as forwarder,
    ):
        assert (await relay(forwarder)).told.code == 250
        bad.faults[Phase.RCPT] = Fault(Kind.STALL)
        relayed = await relay(forwarder)
        assert relayed.told.code == 250
        assert relayed.seen.outcomes == [("bad", Outcome.DEFERRED), ("good", Outcome.RELAYED)]
        assert bad.connections == 1


async def test_the_second_chance_is_no_other_kept_connection_which_may_be_as_stale() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        await asyncio.gather(relay(forwarder), relay(forwarder))
        assert (upstream.connections, forwarder.snapshot()[0].pool.idle) == (2, 2)
        upstream.faults[Phase.MAIL] = Fault(Kind.CLOSE, times=1)
        relayed = await relay(forwarder)
        assert relayed.told.code == 250
        assert not relayed.seen.deliveries[0].is_reused
        assert upstream.connections == 3


async def test_an_upstream_has_one_second_chance_for_a_mail() -> None:
    async with (
        ScriptedUpstream() as bad,
        ScriptedUpstream() as good,
        relaying(settings(bad, "bad"), settings(good, "good")) as forwarder,
    ):
        await relay(forwarder)
        bad.faults[Phase.REPLY] = Fault(Kind.GOODBYE)  # in the middle of a transaction, each time
        relayed = await relay(forwarder)
        assert relayed.told.code == 250
        assert relayed.seen.outcomes == [("bad", Outcome.DEFERRED), ("good", Outcome.RELAYED)]
        # On its second connection the recipient was accepted once more, and is one all the same.
        assert [(one.accepted_count, one.deferred_count) for one in relayed.seen.deliveries] == [(0, 1), (1, 0)]
        assert (bad.connections, len(bad.kept)) == (2, 1)


async def test_a_421_to_a_whole_burst_is_no_doubt() -> None:
    """The first reply says that nothing of it was taken, so it is safe to go elsewhere."""
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), strategy=Strategy.BUFFERED) as forwarder:
        await relay(forwarder)
        upstream.faults[Phase.MAIL] = Fault(Kind.GOODBYE, times=1)
        relayed = await relay(forwarder)
        assert relayed.told.code == 250
        assert len(upstream.kept) == 2


@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT])
async def test_a_refusal_within_a_burst_is_known_though_the_rest_is_lost(phase: Phase) -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), strategy=Strategy.BUFFERED) as forwarder:
        upstream.faults[phase] = Fault(Kind.REFUSE, b"550 5.7.1 no\r\n")
        upstream.faults[Phase.CONTENT] = Fault(Kind.CLOSE)
        relayed = await relay(forwarder, chunks=(HEADER, b"\r\n" + b"x" * 200_000))
        assert relayed.told.code == 550


async def test_a_connection_that_idled_for_long_is_asked_before_it_is_given_content(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("otel_smtp.forwarding.delivery.STALE_AFTER_SECONDS", -1.0)
    async with ScriptedUpstream() as upstream, relaying(settings(upstream), strategy=Strategy.BUFFERED) as forwarder:
        await relay(forwarder)
        upstream.faults[Phase.MAIL] = Fault(Kind.CLOSE, times=1)
        relayed = await relay(forwarder)
        assert relayed.told.code == 250
        assert len(upstream.kept) == 2


async def drop(upstream: ScriptedUpstream) -> None:
    """Reset the upstream's connections, and give our side the turns of the loop that it needs to see it."""
    upstream.drop_connections()
    await until(lambda: not upstream.open_connections)
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_transaction_survives_the_loss_of_its_connection_while_the_client_is_slow() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        assert [reply.code for reply in await transaction.recipients([BOB])] == [250]
        await drop(upstream)
        assert [reply.code for reply in await transaction.recipients([CAROL])] == [250]
        await drop(upstream)
        # Lost a second time: this upstream had its second chance, and there is no other.
        assert await transaction.content(CHUNKS) is replies.UPSTREAM_LOST
        assert upstream.kept == []

        transaction = Awaited.begin(forwarder, MAIL, seen)
        await transaction.recipients([BOB, CAROL])
        await drop(upstream)
        assert (await transaction.content(CHUNKS)).code == 250
        assert upstream.kept[0].addresses == ("bob@example.net", "carol@example.net")


async def test_what_was_accepted_elsewhere_and_is_refused_here_defers_the_mail() -> None:
    def no_bob(address: str) -> bytes | None:
        return b"550 5.1.1 no bob\r\n" if address.startswith("bob") else None

    async with (
        ScriptedUpstream() as first,
        ScriptedUpstream(verdict=no_bob) as second,
        relaying(settings(first, "first"), settings(second, "second")) as forwarder,
    ):
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        assert [reply.code for reply in await transaction.recipients([BOB])] == [250]
        await first.stop()
        assert str(await transaction.content(CHUNKS)) == "451 4.4.1 The upstream refuses service: 550 5.1.1 no bob"
        assert second.kept == []


async def test_a_sender_who_was_accepted_elsewhere_and_is_refused_here_defers_the_recipients() -> None:
    async with (
        ScriptedUpstream() as first,
        ScriptedUpstream(faults={Phase.MAIL: Fault(Kind.REFUSE, b"550 5.7.1 not you\r\n")}) as second,
        relaying(settings(first, "first"), settings(second, "second")) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, MAIL, seen := RecordedTransaction())
        assert [reply.code for reply in await transaction.recipients([BOB])] == [250]
        await first.stop()
        (answer,) = await transaction.recipients([CAROL])
        assert str(answer) == "451 4.4.1 The upstream refuses service: 550 5.7.1 not you"
        assert seen.outcomes == [("first", Outcome.DEFERRED), ("second", Outcome.DEFERRED)]


# The window after the final dot -------------------------------------------------------------------------------


@pytest.mark.parametrize("extensions", [EXTENSIONS, NO_CHUNKING], ids=["chunking", "data"])
@both_strategies
async def test_a_message_whose_reply_is_lost_is_never_sent_twice_by_us(
    strategy: Strategy, extensions: Sequence[str]
) -> None:
    faults = {Phase.REPLY: Fault(Kind.KEPT_THEN_LOST)}
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as upstream,
        ScriptedUpstream() as other,
        relaying(settings(upstream), settings(other, "other"), strategy=strategy) as forwarder,
    ):
        for number in range(5):
            assert (await relay(forwarder)).told is replies.OUTCOME_UNKNOWN
            assert (len(upstream.kept), len(other.kept)) == (number + 1, 0)


@pytest.mark.parametrize("extensions", [EXTENSIONS, NO_CHUNKING], ids=["chunking", "data"])
@both_strategies
@pytest.mark.both_loops
async def test_a_client_that_leaves_after_the_final_dot_has_its_outcome_recorded(
    strategy: Strategy, extensions: Sequence[str]
) -> None:
    faults = {Phase.REPLY: Fault(Kind.LATE, times=1)}
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        await transaction.recipients([BOB])
        content = asyncio.ensure_future(transaction.content(CHUNKS))
        await until(lambda: upstream.stalled)
        content.cancel()
        with pytest.raises(asyncio.CancelledError):
            await content
        transaction.abort()
        assert seen.outcomes == [("up", None)]
        seen.end_early()
        upstream.let_go.set()
        assert isinstance(forwarder.observer, LateDeliveries)
        await until(lambda: forwarder.observer.late)  # type: ignore[attr-defined]
        assert forwarder.observer.late == seen.deliveries
        assert seen.outcomes == [("up", Outcome.RELAYED)]
        assert len(upstream.kept) == 1
        # The connection came back in step, and serves the next.
        assert (await relay(forwarder)).told.code == 250
        assert upstream.connections == 1


@pytest.mark.parametrize("extensions", [EXTENSIONS, NO_CHUNKING], ids=["chunking", "data"])
@both_strategies
async def test_a_mail_whose_client_left_is_not_sent_once_more(strategy: Strategy, extensions: Sequence[str]) -> None:
    """The upstream says that it does not have the mail. The client may send it again itself: it has no 250."""
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        ScriptedUpstream() as other,
        relaying(settings(upstream), settings(other, "other"), strategy=strategy) as forwarder,
    ):
        assert (await relay(forwarder)).told.code == 250
        upstream.faults[Phase.REPLY] = Fault(Kind.STALL, times=1)
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        await transaction.recipients([BOB])
        content = asyncio.ensure_future(transaction.content(CHUNKS))
        await until(lambda: upstream.stalled)
        content.cancel()
        with suppress(asyncio.CancelledError):
            await content
        transaction.abort()
        seen.end_early()
        await upstream.say_all(b"421 4.3.2 shutting down\r\n")
        await until(lambda: forwarder.observer.late)  # type: ignore[attr-defined]
        assert forwarder.observer.late == seen.deliveries  # type: ignore[attr-defined]
        assert seen.outcomes == [("up", Outcome.DEFERRED)]
        await forwarder.close()  # after which nothing is under way
        assert (upstream.connections, other.connections) == (1, 0)
        assert (len(upstream.kept), len(other.kept)) == (1, 0)


async def test_closing_does_not_wait_for_ever_for_a_message_without_a_client() -> None:
    faults = {Phase.REPLY: Fault(Kind.STALL)}
    async with ScriptedUpstream(faults=faults) as upstream, relaying(settings(upstream)) as forwarder:
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        await transaction.recipients([BOB])
        content = asyncio.ensure_future(transaction.content(CHUNKS))
        await until(lambda: upstream.stalled)
        content.cancel()
        with suppress(asyncio.CancelledError):
            await content
        transaction.abort()
        seen.end_early()
        await forwarder.close(grace_seconds=0.01)
        assert isinstance(forwarder.observer, LateDeliveries)
        assert forwarder.observer.late == seen.deliveries
        assert seen.outcomes == [("up", Outcome.UNKNOWN)]
        assert seen.deliveries[0].error_type is ErrorType.OUTCOME_UNKNOWN
        assert seen.deliveries[0].failure == "the gateway ended before the reply came"


# The client goes before the final dot -------------------------------------------------------------------------


@both_strategies
async def test_content_that_breaks_off_is_never_ended(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream(extensions=NO_CHUNKING) as upstream,
        relaying(settings(upstream), strategy=strategy, memory_limit_octets=10) as forwarder,
    ):
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        await transaction.recipients([BOB])
        transaction.transaction.content(lambda: None)
        for chunk in CHUNKS:
            transaction.transaction.write(chunk)
        transaction.abort()
        assert upstream.kept == []
        assert seen.outcomes == ([("up", Outcome.ABORTED)] if strategy is Strategy.TRANSPARENT else [])
        assert (await relay(forwarder)).told.code == 250
        assert len(upstream.kept) == 1


@pytest.mark.parametrize("phase", [Phase.GREETING, Phase.MAIL, Phase.RCPT])
async def test_a_cancel_while_the_upstream_is_asked_closes_its_connection(phase: Phase) -> None:
    faults = {phase: Fault(Kind.LATE, times=1)}
    async with ScriptedUpstream(faults=faults) as upstream, relaying(settings(upstream)) as forwarder:
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        asking = asyncio.ensure_future(transaction.recipients([BOB]))
        await until(lambda: upstream.stalled)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking
        transaction.abort()
        assert seen.outcomes == [("up", Outcome.ABORTED)]
        upstream.let_go.set()
        # Its late reply answers no other command.
        assert (await relay(forwarder)).told.code == 250
        assert upstream.connections == 2
        assert nothing_is_kept_out_of_step(forwarder.snapshot())


async def test_a_mail_that_is_given_up_before_its_connection_began_to_open_leaves_no_trace_in_the_pool() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        for _ in range(20):  # more than connections: each would keep one of them
            transaction = Awaited.begin(forwarder, MAIL, seen := RecordedTransaction())
            transaction.transaction.recipients([BOB], lambda _: pytest.fail("nobody asks any more"))
            transaction.abort()
            assert seen.outcomes == [("up", Outcome.ABORTED)]
        await until(lambda: nothing_is_kept_out_of_step(forwarder.snapshot()))
        assert (await relay(forwarder)).told.code == 250


@pytest.mark.parametrize("extensions", [EXTENSIONS, NO_CHUNKING], ids=["chunking", "data"])
@pytest.mark.both_loops
async def test_a_cancel_in_the_middle_of_large_content_never_ends_it(extensions: Sequence[str]) -> None:
    faults = {Phase.CONTENT: Fault(Kind.LATE, times=1)}
    body = [b"\r\n", *[(b"x" * 78 + b"\r\n") * 1000] * 100]
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as upstream,
        relaying(settings(upstream, timeouts=PATIENT)) as forwarder,
    ):
        seen = RecordedTransaction()
        transaction = Awaited.begin(forwarder, MAIL, seen)
        await transaction.recipients([BOB])
        content = asyncio.ensure_future(transaction.content([HEADER, *body]))
        await until(lambda: upstream.stalled)
        content.cancel()
        with suppress(asyncio.CancelledError):
            await content
        transaction.abort()
        upstream.let_go.set()
        await until(lambda: not upstream.open_connections)
        assert upstream.kept == []
        assert seen.outcomes == [("up", Outcome.ABORTED)]


# Content that the upstream does not want to the end --------------------------------------------------------------

LARGE = (HEADER, b"\r\n", *[(b"x" * 78 + b"\r\n") * 1000] * 100)  # 8 MB: more than all buffers between us


IN_MEMORY = 100_000_000  # more than any content here: it is sent from memory, piece by piece
held_anywhere = pytest.mark.parametrize("memory_limit", [MEMORY_LIMIT_OCTETS, IN_MEMORY], ids=["file", "memory"])


@pytest.mark.parametrize("extensions", [EXTENSIONS, NO_CHUNKING], ids=["chunking", "data"])
@pytest.mark.parametrize("kind", [Kind.CLOSE, Kind.RESET, Kind.GOODBYE])
@both_strategies
@held_anywhere
@pytest.mark.both_loops
async def test_content_that_is_cut_off_goes_to_the_next_upstream(
    strategy: Strategy, kind: Kind, extensions: Sequence[str], memory_limit: int
) -> None:
    faults = {Phase.CONTENT: Fault(kind)}
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as bad,
        ScriptedUpstream() as good,
        relaying(
            settings(bad, "bad", timeouts=PATIENT),
            settings(good, "good", timeouts=PATIENT),
            strategy=strategy,
            memory_limit_octets=memory_limit,
        ) as forwarder,
    ):
        relayed = await relay(forwarder, chunks=LARGE)
        assert relayed.told.code == 250
        assert [kept.content for kept in good.kept] == [b"".join(LARGE)]
        assert bad.kept == []
        assert relayed.seen.outcomes == [("bad", Outcome.DEFERRED), ("good", Outcome.RELAYED)]


@pytest.mark.parametrize("extensions", [EXTENSIONS, NO_CHUNKING], ids=["chunking", "data"])
@both_strategies
@held_anywhere
async def test_a_refusal_in_the_middle_of_the_content_is_passed_on(
    strategy: Strategy, extensions: Sequence[str], memory_limit: int
) -> None:
    faults = {Phase.CONTENT: Fault(Kind.REFUSE, b"552 5.3.4 enough\r\n", times=1)}
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as upstream,
        relaying(
            settings(upstream, timeouts=PATIENT), strategy=strategy, memory_limit_octets=memory_limit
        ) as forwarder,
    ):
        # The scripted upstream holds its reply back until it has to wait; an endless content never lets it.
        relayed = await relay(forwarder, chunks=LARGE)
        assert relayed.told.code == 552
        assert upstream.kept == []
        assert forwarder.snapshot()[0].pool.idle == 0


@pytest.mark.parametrize("extensions", [EXTENSIONS, NO_CHUNKING], ids=["chunking", "data"])
@held_anywhere
@pytest.mark.both_loops
async def test_an_upstream_that_does_not_read_is_given_up(extensions: Sequence[str], memory_limit: int) -> None:
    faults = {Phase.CONTENT: Fault(Kind.LATE)}
    timeouts = Timeouts(5, 5, 5, 5, SHORT, 5, 5)
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as upstream,
        relaying(settings(upstream, timeouts=timeouts), memory_limit_octets=memory_limit) as forwarder,
    ):
        relayed = await relay(forwarder, chunks=LARGE)
        assert relayed.told is replies.UPSTREAM_SILENT
        assert upstream.kept == []


# What goes wrong here ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_ended", [False, True])
@both_strategies
async def test_our_own_bug_defers_the_mail_and_costs_one_connection(
    strategy: Strategy, is_ended: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError("a bug")

    async with ScriptedUpstream() as upstream, relaying(settings(upstream), strategy=strategy) as forwarder:
        with monkeypatch.context() as broken:
            broken.setattr(transmitting.Transmitting, "_conclude" if is_ended else "_unfit", bug)
            relayed = await relay(forwarder)
        assert relayed.told is (replies.INTERNAL_OUTCOME if is_ended else replies.INTERNAL)
        assert relayed.seen.outcomes == [("up", Outcome.UNKNOWN if is_ended else Outcome.ABORTED)]
        assert "internal error" in caplog.text
        assert nothing_is_kept_out_of_step(forwarder.snapshot())
        assert (await relay(forwarder)).told.code == 250
        assert len(upstream.kept) == 1 + is_ended


async def test_a_bug_of_the_session_harms_no_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        called: list[object] = []

        def buggy(answers: object) -> None:
            called.append(answers)
            raise RuntimeError("a bug of the session")

        transaction = forwarder.begin(MAIL, RecordedTransaction())
        transaction.recipients([BOB], buggy)
        await until(lambda: called)
        transaction.abort()
        assert len(called) == 1
        assert "a bug of the session" in caplog.text
        assert nothing_is_kept_out_of_step(forwarder.snapshot())
        assert (await relay(forwarder)).told.code == 250


@both_strategies
async def test_a_full_disk_defers_the_mail(strategy: Strategy, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream), strategy=strategy, memory_limit_octets=10) as forwarder,
    ):
        relayed = await relay(forwarder, chunks=(HEADER, b"\r\n", b"x" * 100, b"y"))
        assert relayed.told is replies.STORAGE_FULL
        assert relayed.seen.outcomes == ([("up", Outcome.ABORTED)] if strategy is Strategy.TRANSPARENT else [])
        assert (await relay(forwarder, chunks=(HEADER, b"\r\n"))).told.code == 250
        assert len(upstream.kept) == 1


@pytest.mark.parametrize("extensions", [EXTENSIONS, NO_CHUNKING], ids=["chunking", "data"])
@both_strategies
async def test_a_file_that_cannot_be_read_again_never_ends_the_content(
    strategy: Strategy, extensions: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: (tmp_path / "written").open("wb", buffering=0))
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        ScriptedUpstream() as other,
        relaying(settings(upstream), settings(other, "other"), strategy=strategy, memory_limit_octets=10) as forwarder,
    ):
        relayed = await relay(forwarder, chunks=(HEADER, b"\r\n", b"x" * 100))
        assert relayed.told is replies.STORAGE_FAILED
        await until(lambda: not upstream.open_connections)
        for _ in range(5):
            await asyncio.sleep(0)
        assert relayed.seen.outcomes == [("up", Outcome.ABORTED)]  # the loss that we made is nobody's fault
        assert (upstream.kept, other.connections) == ([], 0)
        assert nothing_is_kept_out_of_step(forwarder.snapshot())


# Failover and the breaker -------------------------------------------------------------------------------------


def nobody() -> UpstreamSettings:
    """An upstream at a port where nobody listens."""
    return UpstreamSettings("nobody", "127.0.0.1", unclaimed_port(), timeouts=PATIENT)


@both_strategies
async def test_an_upstream_that_is_down_is_a_4yz_and_never_a_554(strategy: Strategy) -> None:
    """What relays of the field do: 554 for their own broken configuration, and the mail bounces."""
    async with relaying(nobody(), strategy=strategy) as forwarder:
        for _ in range(6):  # also with the breaker open
            assert (await relay(forwarder)).told is replies.UPSTREAM_UNAVAILABLE


@both_strategies
async def test_upstreams_are_for_failover_and_not_for_copies(strategy: Strategy) -> None:
    """What relays of the field do: send the mail to every configured upstream."""
    async with (
        ScriptedUpstream() as first,
        ScriptedUpstream() as second,
        relaying(settings(first, "first"), settings(second, "second"), strategy=strategy) as forwarder,
    ):
        for _ in range(3):
            assert (await relay(forwarder)).told.code == 250
        assert (len(first.kept), len(second.kept), second.connections) == (3, 0, 0)


@both_strategies
async def test_a_dead_upstream_is_left_alone_and_found_again(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "FIRST_BACKOFF_SECONDS", 0.05)
    faults = {Phase.GREETING: Fault(Kind.REFUSE, b"554 5.3.2 closed\r\n")}
    async with (
        ScriptedUpstream(faults=faults) as bad,
        ScriptedUpstream() as good,
        relaying(settings(bad, "bad"), settings(good, "good"), strategy=strategy) as forwarder,
    ):
        while forwarder.snapshot()[0].pool.breaker is BreakerState.CLOSED:
            assert (await relay(forwarder)).told.code == 250
        assert 3 <= bad.connections <= 10
        retry_seconds = forwarder.snapshot()[0].retry_seconds
        assert retry_seconds is not None
        assert 0 <= retry_seconds <= 0.05
        assert forwarder.snapshot()[1].retry_seconds is None
        del bad.faults[Phase.GREETING]
        async with asyncio.timeout(SECONDS):
            while not bad.kept:
                assert (await relay(forwarder)).told.code == 250
        assert forwarder.snapshot()[0].pool.breaker is BreakerState.CLOSED
        relayed = await relay(forwarder)
        assert relayed.seen.outcomes == [("bad", Outcome.RELAYED)]


async def test_refused_mails_say_nothing_about_the_upstreams_health() -> None:
    faults = {Phase.REPLY: Fault(Kind.REFUSE, b"451 4.3.0 later\r\n")}
    async with ScriptedUpstream(faults=faults) as upstream, relaying(settings(upstream)) as forwarder:
        for _ in range(10):
            assert (await relay(forwarder)).told.code == 451
        assert forwarder.snapshot()[0].pool.breaker is BreakerState.CLOSED
        assert upstream.connections == 1


async def test_a_mail_waits_for_a_connection_and_not_for_ever() -> None:
    faults = {Phase.RCPT: Fault(Kind.LATE, times=1)}
    limits = PoolLimits(connections=1)
    timeouts = Timeouts(5, 5, 5, 5, 5, 5, SHORT)
    async with (
        ScriptedUpstream(faults=faults) as upstream,
        relaying(settings(upstream, limits=limits, timeouts=timeouts)) as forwarder,
    ):
        first = asyncio.ensure_future(relay(forwarder))
        await until(lambda: upstream.stalled)
        assert (await relay(forwarder)).told is replies.UPSTREAM_BUSY
        waiting = asyncio.ensure_future(relay(forwarder))
        gone = asyncio.ensure_future(relay(forwarder))
        await until(lambda: forwarder.snapshot()[0].pool.waiting == 2)
        gone.cancel()
        upstream.let_go.set()
        assert (await first).told.code == 250
        assert (await waiting).told.code == 250
        assert upstream.connections == 1
        assert nothing_is_kept_out_of_step(forwarder.snapshot())


@pytest.mark.parametrize("phase", [Phase.RCPT, Phase.REPLY])
async def test_a_mail_that_goes_on_keeps_its_connection_whoever_waits(
    phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client had nothing to say for a while, and has now."""
    monkeypatch.setattr(pool, "RECLAIM_AFTER_SECONDS", 0.02)
    monkeypatch.setattr(pool, "RECLAIM_SOONEST_SECONDS", 0.01)
    timeouts = replace(PATIENT, pool=SHORT)
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, limits=PoolLimits(connections=1), timeouts=timeouts)) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, MAIL, RecordedTransaction())
        await transaction.recipients([BOB])
        upstream.faults[phase] = Fault(Kind.LATE, times=1)
        going_on: asyncio.Future[object] = asyncio.ensure_future(
            transaction.recipients([CAROL]) if phase is Phase.RCPT else transaction.content(CHUNKS)
        )
        await until(lambda: upstream.stalled)
        assert (await relay(forwarder)).told is replies.UPSTREAM_BUSY
        upstream.let_go.set()
        await going_on
        if phase is Phase.RCPT:
            assert (await transaction.content(CHUNKS)).code == 250
        transaction.abort()
        assert (len(upstream.kept), upstream.connections) == (1, 1)


async def test_slow_clients_do_not_keep_the_upstreams_connections_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "RECLAIM_AFTER_SECONDS", 0.02)
    limits = PoolLimits(connections=2)
    async with ScriptedUpstream() as upstream, relaying(settings(upstream, limits=limits)) as forwarder:
        slow = []
        for _ in range(5):
            transaction = Awaited.begin(forwarder, MAIL, seen := RecordedTransaction())
            assert [reply.code for reply in await transaction.recipients([BOB])] == [250]
            slow.append((transaction, seen))
        assert (await relay(forwarder)).told.code == 250
        aborted, seen = slow.pop(0)
        aborted.abort()
        assert seen.outcomes == [("up", Outcome.ABORTED)]
        for transaction, _ in slow:
            assert [reply.code for reply in await transaction.recipients([CAROL])] == [250]
        for transaction, seen in slow:
            assert (await transaction.content(CHUNKS)).code == 250
            assert seen.outcomes == [("up", Outcome.RELAYED)]
        assert upstream.connections == 2
        assert sorted(kept.addresses for kept in upstream.kept) == [
            *[("bob@example.net",)],
            *[("bob@example.net", "carol@example.net")] * 4,
        ]
        assert nothing_is_kept_out_of_step(forwarder.snapshot())
        assert forwarder.snapshot()[0].pool.idle == 2


async def test_idle_transactions_that_go_on_are_neither_lost_nor_delivered_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "RECLAIM_AFTER_SECONDS", 0.02)
    monkeypatch.setattr(pool, "RECLAIM_SOONEST_SECONDS", 0.01)
    recipients = [Recipient(f"{number}@example.net") for number in range(25)]
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        idle = []
        for recipient in recipients:
            transaction = Awaited.begin(forwarder, MAIL, RecordedTransaction())
            answers = await transaction.recipients([recipient])
            assert [reply.code for reply in answers] == [250]
            idle.append(transaction)
        assert (await relay(forwarder)).told.code == 250
        contents = await asyncio.gather(*(transaction.content(CHUNKS) for transaction in idle))
        assert {reply.code for reply in contents} == {250}
        expected = [(recipient.address,) for recipient in (BOB, *recipients)]
        assert sorted(kept.addresses for kept in upstream.kept) == sorted(expected)
        assert nothing_is_kept_out_of_step(forwarder.snapshot())


# The network between us ---------------------------------------------------------------------------------------


@both_strategies
async def test_a_black_hole_is_given_up_and_the_next_upstream_has_the_mail(strategy: Strategy) -> None:
    async with ScriptedUpstream() as upstream, FaultProxy(upstream.port) as proxy:
        proxy.swallow()
        hole = UpstreamSettings("hole", "127.0.0.1", proxy.port, timeouts=Timeouts(5, SHORT, 5, 5, 5, 5, 5))
        async with relaying(hole, settings(upstream), strategy=strategy) as forwarder:
            relayed = await relay(forwarder)
            assert relayed.told.code == 250
            assert relayed.seen.outcomes == [("hole", Outcome.DEFERRED), ("up", Outcome.RELAYED)]


@both_strategies
async def test_a_half_open_connection_is_given_up_without_a_second_delivery(strategy: Strategy) -> None:
    async with ScriptedUpstream() as upstream, FaultProxy(upstream.port) as proxy:
        through = UpstreamSettings("up", "127.0.0.1", proxy.port, timeouts=Timeouts(5, 5, SHORT, 5, 5, SHORT, 5))
        async with relaying(through, strategy=strategy) as forwarder:
            assert (await relay(forwarder)).told.code == 250
            proxy.swallow_replies()
            relayed = await relay(forwarder)
            assert not relayed.told.is_positive
            assert relayed.told.is_transient
            assert forwarder.snapshot()[0].pool.idle == 0
            held = len(upstream.kept)
            proxy.heal()
            assert (await relay(forwarder)).told.code == 250
            assert len(upstream.kept) == held + 1


@both_strategies
async def test_latency_and_a_narrow_pipe_only_take_longer(strategy: Strategy) -> None:
    async with ScriptedUpstream() as upstream, FaultProxy(upstream.port, latency_seconds=0.01) as proxy:
        proxy.octets_per_second = 4_000_000
        through = UpstreamSettings("up", "127.0.0.1", proxy.port, timeouts=PATIENT)
        async with relaying(through, strategy=strategy, memory_limit_octets=100_000) as forwarder:
            relayed = await relay(forwarder, chunks=LARGE[:10])
            assert relayed.told.code == 250
            assert upstream.kept[0].content == b"".join(LARGE[:10])


@pytest.mark.parametrize("after_octets", [1, 60, 100, 5_000, 100_000, 1_000_000])
@both_strategies
async def test_a_connection_that_is_reset_at_any_octet_loses_and_doubles_nothing(
    strategy: Strategy, after_octets: int
) -> None:
    async with ScriptedUpstream() as upstream, ScriptedUpstream() as other, FaultProxy(upstream.port) as proxy:
        proxy.reset_after_octets = after_octets
        through = UpstreamSettings("up", "127.0.0.1", proxy.port, timeouts=PATIENT)
        async with relaying(through, settings(other, "other"), strategy=strategy) as forwarder:
            relayed = await relay(forwarder, chunks=LARGE[:20])
            held = len(upstream.kept) + len(other.kept)
            if relayed.told.code == 250:
                assert held == 1
            else:
                assert relayed.told.is_transient
                assert held <= 1


# What was read counts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [b"550 5.7.1 blocked at MAIL\r\n", b"451 4.7.1 later\r\n"])
@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.REPLY])
@pytest.mark.parametrize("extensions", WAYS.values(), ids=WAYS)
@both_strategies
async def test_a_refusal_counts_though_the_connection_ends_behind_it(
    strategy: Strategy, extensions: Sequence[str], phase: Phase, refusal: bytes
) -> None:
    if phase is Phase.DATA and "CHUNKING" in extensions:
        return
    faults = {phase: Fault(Kind.SAID_THEN_CLOSED, refusal)}
    async with (
        ScriptedUpstream(extensions=extensions, faults=faults) as upstream,
        ScriptedUpstream() as other,
        relaying(settings(upstream), settings(other, "other"), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder)
        assert relayed.told.wire == refusal
        assert relayed.seen.outcomes == [("up", Outcome.DEFERRED if refusal[:1] == b"4" else Outcome.REFUSED)]
        (attempt,) = relayed.seen.deliveries
        assert attempt.reply == relayed.told
        counts = (attempt.accepted_count, attempt.refused_count, attempt.deferred_count)
        assert counts == ((0, 0, 1) if refusal[:1] == b"4" else (0, 1, 0))
        assert (upstream.connections, other.connections) == (1, 0)
        assert nothing_is_kept_out_of_step(forwarder.snapshot())
        await until(lambda: forwarder.snapshot()[0].pool.idle == 0)


@pytest.mark.parametrize("refusal", [b"550 5.1.1 no bob\r\n", b"451 4.2.1 bob waits\r\n"])
async def test_who_was_refused_stays_refused_and_the_others_are_asked_about_alone(refusal: bytes) -> None:
    """The upstream hangs up on everyone who names Bob: about Carol it is asked again, without him."""
    verdicts = {"bob@example.net": refusal}
    async with ScriptedUpstream(verdict=verdicts.get) as upstream, relaying(settings(upstream)) as forwarder:
        upstream.hangs_up_after = "bob@example.net"
        relayed = await relay(forwarder, BOB, CAROL)
        assert [reply.wire for reply in relayed.recipients] == [refusal, b"250 2.1.5 recipient ok\r\n"]
        assert relayed.told.code == 250
        assert [kept.addresses for kept in upstream.kept] == [("carol@example.net",)]
        (attempt,) = relayed.seen.deliveries
        counts = (attempt.accepted_count, attempt.refused_count, attempt.deferred_count)
        assert counts == ((1, 0, 1) if refusal[:1] == b"4" else (1, 1, 0))


async def test_the_others_get_the_mail_though_the_upstream_hangs_up_behind_a_refusal() -> None:
    """That is seen only when the content is sent; it was not taken, as DATA had no reply."""
    verdicts = {"bob@example.net": b"550 5.1.1 no bob\r\n"}
    faults = {Phase.DATA: Fault(Kind.CLOSE, times=1)}
    async with (
        ScriptedUpstream(verdict=verdicts.get, faults=faults) as upstream,
        relaying(settings(upstream)) as forwarder,
    ):
        relayed = await relay(forwarder, CAROL, BOB)
        assert relayed.codes == [250, 550]
        assert relayed.told.code == 250
        assert relayed.seen.outcomes == [("up", Outcome.PARTLY_RELAYED)]
        assert [kept.addresses for kept in upstream.kept] == [("carol@example.net",)]
        assert upstream.connections == 2
        assert (await relay(forwarder, CAROL)).told.code == 250
        assert upstream.kept[-1].by_chunks


async def test_who_was_refused_stays_refused_though_mail_is_refused_then() -> None:
    verdicts = {"bob@example.net": b"550 5.1.1 no bob\r\n"}
    mails = iter([None, b"450 4.7.1 enough\r\n"])
    async with (
        ScriptedUpstream(verdict=verdicts.get, sender_verdict=lambda _: next(mails)) as upstream,
        relaying(settings(upstream)) as forwarder,
    ):
        await forwarder.learn(wait_seconds=SECONDS)
        upstream.hangs_up_after = "bob@example.net"
        relayed = await relay(forwarder, BOB, CAROL)
        assert [str(reply) for reply in relayed.recipients] == ["550 5.1.1 no bob", "450 4.7.1 enough"]
        (attempt,) = relayed.seen.deliveries
        assert (attempt.accepted_count, attempt.refused_count, attempt.deferred_count) == (0, 1, 1)


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (Phase.GREETING, b"554 5.7.1 your address is on a list\r\n"),
        (Phase.GREETING, b"421 4.7.0 try from elsewhere\r\n"),
        (Phase.EHLO, b"501 5.5.4 who is gw.example\r\n"),
        (Phase.EHLO, b"421 4.7.0 slow down\r\n"),
    ],
)
@both_strategies
async def test_what_is_said_before_the_mail_is_told_in_our_words_and_its_own(
    strategy: Strategy, phase: Phase, said: bytes
) -> None:
    async with (
        ScriptedUpstream(faults={phase: Fault(Kind.SAID_THEN_CLOSED, said)}) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        for _ in range(8):  # in backoff too: that is why it is in backoff
            relayed = await relay(forwarder)
            assert relayed.told.wire == b"451 4.4.1 The upstream refuses service: " + said
        assert forwarder.snapshot()[0].retry_seconds is not None
        first = await relay(forwarder)
        assert first.told.wire == b"451 4.4.1 The upstream refuses service: " + said
    async with (
        ScriptedUpstream(faults={phase: Fault(Kind.SAID_THEN_CLOSED, said)}) as upstream,
        relaying(settings(upstream), nobody(), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder)
        assert relayed.told.wire == b"451 4.4.1 The upstream refuses service: " + said  # not: none can be reached
        delivery = relayed.seen.deliveries[0]
        assert str(delivery.reply) == said.decode().strip()
        noted = DeliveryPhase.GREETING if phase is Phase.GREETING else DeliveryPhase.EHLO
        assert (noted, delivery.reply) in [(one, reply) for _, one, reply in delivery.phases]


@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.REPLY])
@both_strategies
async def test_the_reason_of_a_421_reaches_the_client(strategy: Strategy, phase: Phase) -> None:
    said = b"421 4.7.0 IP throttled\r\n"
    async with (
        ScriptedUpstream(faults={phase: Fault(Kind.SAID_THEN_CLOSED, said)}) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder)
        assert relayed.told.wire == b"451 4.4.1 The upstream refuses service: " + said
        assert str(relayed.seen.deliveries[0].reply) == "421 4.7.0 IP throttled"


@pytest.mark.parametrize("code", [b"530 5.7.57", b"534 5.7.9", b"535 5.7.8", b"538 5.7.11"])
@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.REPLY])
@pytest.mark.parametrize("extensions", [EXTENSIONS, NO_CHUNKING], ids=["chunking", "data"])
@both_strategies
async def test_a_refusal_of_our_credentials_is_no_verdict_on_the_mail(
    strategy: Strategy,
    extensions: Sequence[str],
    phase: Phase,
    code: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if phase is Phase.DATA and extensions is EXTENSIONS:
        return
    said = code + b" client not authenticated\r\n"
    async with (
        ScriptedUpstream(extensions=extensions, faults={phase: Fault(Kind.REFUSE, said)}) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder)
        assert relayed.told.wire == b"451 4.7.0 " + replies.UPSTREAM_CREDENTIALS.text.encode() + b": " + said
        assert relayed.told.error_type is ErrorType.UPSTREAM_AUTH
        assert relayed.seen.outcomes == [("up", Outcome.DEFERRED)]
        assert forwarder.snapshot()[0].last_failure == "upstream_auth"
        assert "upstream refused our credentials" in caplog.text
        # A refusal by another code is the mail's, and the connection serves the next.
        upstream.faults[phase] = Fault(Kind.REFUSE, b"550 5.7.1 no\r\n", times=1)
        assert (await relay(forwarder)).told.code == 550
        del upstream.faults[phase]
        assert (await relay(forwarder)).told.code == 250


@both_strategies
async def test_another_upstream_may_know_us(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream(faults={Phase.MAIL: Fault(Kind.REFUSE, b"530 5.7.0 log in first\r\n")}) as first,
        ScriptedUpstream() as second,
        relaying(settings(first, "first"), settings(second, "second"), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder)
        assert relayed.told.code == 250
        assert relayed.seen.outcomes == [("first", Outcome.DEFERRED), ("second", Outcome.RELAYED)]
        assert str(relayed.seen.deliveries[0].reply) == "530 5.7.0 log in first"


# A connection's own limit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("extensions", WAYS.values(), ids=WAYS)
@both_strategies
async def test_mail_refused_for_now_on_a_kept_connection_is_tried_on_a_fresh_one(
    strategy: Strategy, extensions: Sequence[str]
) -> None:
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        await relay(forwarder)
        upstream.faults[Phase.MAIL] = Fault(Kind.REFUSE, b"451 4.7.0 enough on this connection\r\n", times=1)
        relayed = await relay(forwarder)
        assert relayed.told.code == 250
        assert relayed.seen.outcomes == [("up", Outcome.RELAYED)]
        assert (upstream.connections, len(upstream.kept)) == (2, 2)
        assert forwarder.snapshot()[0].pool.idle == 1  # the used up one is closed


@pytest.mark.parametrize("extensions", WAYS.values(), ids=WAYS)
@both_strategies
async def test_mail_refused_for_now_on_a_fresh_connection_too_is_refused_for_now(
    strategy: Strategy, extensions: Sequence[str]
) -> None:
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        ScriptedUpstream() as other,
        relaying(settings(upstream), settings(other, "other"), strategy=strategy) as forwarder,
    ):
        await relay(forwarder)
        upstream.faults[Phase.MAIL] = Fault(Kind.REFUSE, b"451 4.7.1 greylisted\r\n")
        relayed = await relay(forwarder)
        assert relayed.told.wire == b"451 4.7.1 greylisted\r\n"
        assert relayed.seen.outcomes == [("up", Outcome.DEFERRED)]
        assert upstream.verbs.count("MAIL") == 3
        # For good is for good, on any connection.
        upstream.faults[Phase.MAIL] = Fault(Kind.REFUSE, b"550 5.7.1 never\r\n")
        assert (await relay(forwarder)).told.code == 550
        assert upstream.verbs.count("MAIL") == 4


@both_strategies
async def test_where_there_is_no_fresh_connection_the_refusal_on_the_kept_one_stands(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream() as upstream,
        ScriptedUpstream() as other,
        relaying(settings(upstream), settings(other, "other"), strategy=strategy) as forwarder,
    ):
        await relay(forwarder)
        upstream.faults[Phase.MAIL] = Fault(Kind.REFUSE, b"451 4.7.0 enough\r\n")
        upstream.faults[Phase.EHLO] = Fault(Kind.CLOSE)
        relayed = await relay(forwarder, BOB, CAROL)
        assert relayed.told.wire == b"451 4.7.0 enough\r\n"
        assert relayed.seen.outcomes == [("up", Outcome.DEFERRED)]
        assert other.connections == 0
