"""One message of a client in several transactions upstream: no recipient is lost to a limit or a route."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from otel_smtp.forwarding.enveloping import MOST_TRANSACTIONS
from otel_smtp.forwarding.settings import Strategy, UpstreamSettings
from otel_smtp.forwarding.upstream import UpstreamForwarder
from otel_smtp.observing import Outcome
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Recipient
from otel_smtp.smtp.replies import Reply
from tests.support.deliveries import MAIL, Awaited, RecordedTransaction
from tests.support.relaying import (
    CHUNKS,
    HEADER,
    Relayed,
    both_strategies,
    relay,
    relaying,
    settings,
    without,
)
from tests.support.upstream import EXTENSIONS, Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import SECONDS, until


def people(count: int) -> list[Recipient]:
    return [Recipient(f"r{number}@example.net") for number in range(count)]


def sizes(upstream: ScriptedUpstream) -> list[int]:
    return [len(kept.recipients) for kept in upstream.kept]


def delivered(*upstreams: ScriptedUpstream) -> list[str]:
    return [address for upstream in upstreams for kept in upstream.kept for address in kept.addresses]


def assert_all_have_it_once(relayed: Relayed, recipients: Sequence[Recipient], *upstreams: ScriptedUpstream) -> None:
    assert set(relayed.codes) == {250}
    assert relayed.told.code == 250
    assert sorted(delivered(*upstreams)) == sorted(recipient.address for recipient in recipients)
    contents = {kept.content for upstream in upstreams for kept in upstream.kept}
    assert contents == {b"".join(CHUNKS)}


either_grouping = pytest.mark.parametrize("group", [1, 3, 100])


async def relay_in_groups(
    forwarder: UpstreamForwarder, recipients: Sequence[Recipient], group: int, chunks: Sequence[bytes] = CHUNKS
) -> Relayed:
    """As clients send RCPT: one by one, or pipelined in groups."""
    seen = RecordedTransaction(MAIL)
    transaction = Awaited.begin(forwarder, MAIL, seen)
    answers: list[Reply] = []
    for first in range(0, len(recipients), group):
        answers += await transaction.recipients(recipients[first : first + group])
    try:
        reply = await transaction.content(chunks)
    finally:
        transaction.abort()
    return Relayed(answers, reply, seen)


# What an upstream takes at once -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("announced", "own"), [(["LIMITS RCPTMAX=5"], 100), ([], 5), (["LIMITS RCPTMAX=7"], 5), (["LIMITS RCPTMAX=5"], 7)]
)
@either_grouping
@both_strategies
async def test_recipients_beyond_a_known_limit_go_in_further_transactions(
    announced: list[str], own: int, group: int, strategy: Strategy
) -> None:
    recipients = people(12)
    async with (
        ScriptedUpstream(extensions=[*EXTENSIONS, *announced]) as upstream,
        relaying(settings(upstream, recipients_per_transaction=own), strategy=strategy) as forwarder,
    ):
        for _ in range(2):  # before anything is known of the upstream, and then
            relayed = await relay_in_groups(forwarder, recipients, group)
            assert_all_have_it_once(relayed, recipients, upstream)
            assert sizes(upstream) == [5, 5, 2]
            assert [delivery.outcome for delivery in relayed.seen.deliveries] == [Outcome.RELAYED] * 3
            upstream.kept.clear()
        assert upstream.connections == 1


LIMITED: dict[str, dict[str, Any]] = {
    "of a transaction": {"most_recipients": 5},
    "of a connection": {"most_recipients_a_connection": 5},
    "of both": {"most_recipients": 5, "most_recipients_a_connection": 7},
}


@pytest.mark.parametrize("limit", LIMITED)
@pytest.mark.parametrize(
    "reply", [b"452 4.5.3 too many\r\n", b"452 too many\r\n", b"552 5.5.3 too many\r\n", b"552 x\r\n"]
)
@pytest.mark.parametrize("extensions", [EXTENSIONS, without("CHUNKING"), without("PIPELINING"), ()])
@both_strategies
async def test_recipients_beyond_a_limit_that_only_shows_go_in_further_transactions(
    limit: str, reply: bytes, extensions: Sequence[str], strategy: Strategy
) -> None:
    recipients = people(23)
    async with (
        ScriptedUpstream(extensions=extensions, too_many_recipients=reply, **LIMITED[limit]) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        for _ in range(2):
            assert_all_have_it_once(await relay(forwarder, *recipients), recipients, upstream)
            assert max(sizes(upstream)) == 5
            upstream.kept.clear()


@either_grouping
@both_strategies
async def test_a_limit_that_only_shows_costs_the_same_however_clients_group(group: int, strategy: Strategy) -> None:
    recipients = people(11)
    async with (
        ScriptedUpstream(most_recipients_a_connection=5) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        assert_all_have_it_once(await relay_in_groups(forwarder, recipients, group), recipients, upstream)
        assert sizes(upstream) == [5, 5, 1]
        assert [kept.connection for kept in upstream.kept] == [1, 2, 3]


async def test_once_there_is_one_too_many_nobody_else_is_asked_about_in_that_transaction() -> None:
    recipients = people(11)
    async with ScriptedUpstream(most_recipients=5) as upstream, relaying(settings(upstream)) as forwarder:
        await relay_in_groups(forwarder, recipients, 1)
        asked = [command for command in upstream.commands if command.startswith(b"RCPT")]
        # One too many, and in the next transaction again.
        assert [command[10:12] for command in asked[4:7]] == [b"4@", b"5@", b"5@"]


async def test_what_is_left_goes_on_connections_of_which_nothing_is_used_up() -> None:
    upstream = ScriptedUpstream(most_recipients_a_connection=5, faults={Phase.REPLY: Fault(Kind.LATE, times=2)})
    async with upstream, relaying(settings(upstream)) as forwarder:
        before = [asyncio.create_task(relay(forwarder, *people(4))) for _ in range(2)]
        await until(lambda: upstream.stalled == 2)
        upstream.let_go.set()
        await asyncio.gather(*before)
        assert forwarder.snapshot()[0].pool.idle == 2  # each takes one more
        upstream.kept.clear()
        assert_all_have_it_once(await relay(forwarder, *people(7)), people(7), upstream)
        assert sizes(upstream) == [1, 5, 1]


@pytest.mark.parametrize("extensions", [EXTENSIONS, without("CHUNKING"), without("PIPELINING")])
@pytest.mark.parametrize("count", [1, 2])
@both_strategies
async def test_a_connection_whose_quota_earlier_mails_used_up_makes_way_for_a_fresh_one(
    extensions: Sequence[str], count: int, strategy: Strategy
) -> None:
    async with (
        ScriptedUpstream(extensions=extensions, most_recipients_a_connection=2) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        for _ in range(3):
            upstream.kept.clear()
            assert_all_have_it_once(await relay(forwarder, *people(count)), people(count), upstream)
        assert upstream.connections == (2 if count == 1 else 3)


@pytest.mark.parametrize(
    "refusal",
    [b"552 5.2.2 mailbox full\r\n", b"452 4.2.2 mailbox full\r\n", b"452 4.3.1 disk full\r\n", b"450 4.5.3 later\r\n"],
)
async def test_a_refusal_that_is_about_the_recipient_stays_its_own(refusal: bytes) -> None:
    full = Recipient("full@example.net")
    async with (
        ScriptedUpstream(verdict=lambda address: refusal if address == full.address else None) as upstream,
        relaying(settings(upstream)) as forwarder,
    ):
        relayed = await relay(forwarder, *people(1), full)
        assert relayed.codes == [250, int(refusal[:3])]
        assert sizes(upstream) == [1]


async def test_one_too_many_beside_nobody_is_a_refusal() -> None:
    async with ScriptedUpstream(most_recipients=0) as upstream, relaying(settings(upstream)) as forwarder:
        assert (await relay(forwarder, *people(2))).codes == [452, 452]
        assert upstream.connections == 1


async def test_refused_recipients_beside_those_that_are_too_many_stay_refused_at_rcpt() -> None:
    recipients = people(8)
    gone = {recipients[1].address, recipients[6].address}
    async with (
        ScriptedUpstream(
            most_recipients=3, verdict=lambda address: b"550 5.1.1 gone\r\n" if address in gone else None
        ) as upstream,
        relaying(settings(upstream)) as forwarder,
    ):
        relayed = await relay(forwarder, *recipients)
        assert relayed.codes == [250, 550, 250, 250, 250, 250, 550, 250]
        assert sorted(delivered(upstream)) == sorted({one.address for one in recipients} - gone)
        assert relayed.told.code == 250


@both_strategies
async def test_large_content_is_kept_until_all_transactions_have_ended(strategy: Strategy) -> None:
    body = (b"\r\n", *([(b"." + b"x" * 75 + b"\r\n") * 1000] * 6))
    async with (
        ScriptedUpstream(most_recipients=2) as upstream,
        relaying(settings(upstream), strategy=strategy, memory_limit_octets=50_000) as forwarder,
    ):
        relayed = await relay(forwarder, *people(5), chunks=(HEADER, *body))
        assert relayed.told.code == 250
        assert sizes(upstream) == [2, 2, 1]
        assert {kept.content for kept in upstream.kept} == {HEADER + b"".join(body)}


@both_strategies
async def test_an_upstream_that_takes_over_may_take_fewer(strategy: Strategy) -> None:
    """The first one is lost when the content comes; what it had accepted is divided for the second."""
    recipients = people(7)
    faults = {Phase.DATA: Fault(Kind.CLOSE)}
    async with (
        ScriptedUpstream(extensions=without("CHUNKING"), faults=faults) as first,
        ScriptedUpstream(extensions=[*EXTENSIONS, "LIMITS RCPTMAX=3"]) as second,
        ScriptedUpstream(most_recipients=4) as third,
    ):
        for other, expected in ((second, [3, 3, 1]), (third, [4, 3])):
            async with relaying(settings(first, "first"), settings(other), strategy=strategy) as forwarder:
                assert_all_have_it_once(await relay(forwarder, *recipients), recipients, other)
                assert sizes(other) == expected


@both_strategies
async def test_a_message_is_divided_into_so_many_transactions_and_no_more(strategy: Strategy) -> None:
    recipients = people(2 * MOST_TRANSACTIONS + 3)
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(upstream, recipients_per_transaction=2), strategy=strategy) as forwarder,
    ):
        relayed = await relay(forwarder, *recipients)
        assert relayed.codes == [250] * (2 * MOST_TRANSACTIONS) + [452] * 3
        assert relayed.recipients[-1] is replies.TOO_MANY_RECIPIENTS
        assert sizes(upstream) == [2] * MOST_TRANSACTIONS
        assert relayed.told.code == 250


async def test_an_upstream_that_takes_ever_fewer_does_not_take_for_ever() -> None:
    upstream = ScriptedUpstream()

    def verdict(address: str) -> bytes | None:
        upstream.most_recipients = 1 if upstream.kept else 20
        return None

    upstream.verdict = verdict
    async with upstream, relaying(settings(upstream)) as forwarder:
        relayed = await relay(forwarder, *people(100))
        assert relayed.told.code == 451
        assert f"taken for {20 + MOST_TRANSACTIONS - 1} of 100 recipients" in relayed.told.text
        assert len(upstream.kept) == MOST_TRANSACTIONS


# What became of all of them -----------------------------------------------------------------------------------


def later(replied: bytes, *addresses: str) -> Callable[[str], bytes | None]:
    return lambda address: replied if address in addresses else None


async def divided(upstream: ScriptedUpstream, strategy: Strategy = Strategy.TRANSPARENT, count: int = 5) -> Relayed:
    async with upstream, relaying(settings(upstream, recipients_per_transaction=2), strategy=strategy) as forwarder:
        relayed = await relay(forwarder, *people(count))
        (snapshot,) = forwarder.snapshot()
        assert (snapshot.pool.busy, snapshot.pool.waiting, snapshot.pool.opening) == (0, 0, 0)
    assert set(relayed.codes) == {250}
    return relayed


@both_strategies
async def test_who_is_refused_for_good_in_a_further_transaction_is_told_with_the_first_refusals_words(
    strategy: Strategy,
) -> None:
    gone = {"r3@example.net": b"550 5.1.1 no r3 here\r\n", "r4@example.net": b"551 5.1.6 r4 has moved\r\n"}
    relayed = await divided(ScriptedUpstream(verdict=gone.get), strategy)
    assert str(relayed.told) == "550 5.1.1 no r3 here (taken for 3 of 5 recipients)"
    assert [one.recipient.address for one in relayed.seen.refused] == []
    said = [one for delivery in relayed.seen.deliveries for one in delivery.refused]
    assert [(one.recipient.address, str(one.reply)) for one in said] == [
        ("r3@example.net", "550 5.1.1 no r3 here"),
        ("r4@example.net", "551 5.1.6 r4 has moved"),
    ]


@both_strategies
async def test_who_is_deferred_in_a_further_transaction_makes_the_client_try_again(strategy: Strategy) -> None:
    verdict = {"r2@example.net": b"550 5.1.1 gone\r\n", "r4@example.net": b"450 4.2.0 greylisted\r\n"}
    relayed = await divided(ScriptedUpstream(verdict=verdict.get), strategy)
    assert relayed.told.code == 451
    assert "taken for 3 of 5 recipients" in relayed.told.text
    assert "450 4.2.0 greylisted" in relayed.told.text


@both_strategies
async def test_a_content_that_is_refused_in_a_further_transaction_is_told_of(strategy: Strategy) -> None:
    upstream = ScriptedUpstream()

    def verdict(address: str) -> None:
        if upstream.kept:
            upstream.faults[Phase.REPLY] = Fault(Kind.REFUSE, b"554 5.7.1 enough\r\n", 1)

    upstream.verdict = verdict
    relayed = await divided(upstream, strategy)
    assert str(relayed.told) == "554 5.7.1 enough (taken for 2 of 5 recipients)"


@both_strategies
async def test_an_upstream_that_is_lost_in_a_further_transaction_leaves_the_rest_for_later(strategy: Strategy) -> None:
    upstream = ScriptedUpstream()

    def verdict(address: str) -> None:
        if upstream.kept:
            upstream.faults[Phase.REPLY] = Fault(Kind.KEPT_THEN_LOST, times=1)

    upstream.verdict = verdict
    relayed = await divided(upstream, strategy)
    assert str(relayed.told).startswith("451 4.4.2 ")
    assert "outcome unknown (taken for 2 of 5 recipients)" in relayed.told.text
    assert [delivery.outcome for delivery in relayed.seen.deliveries] == [Outcome.RELAYED, Outcome.UNKNOWN]


async def test_what_all_of_it_is_refused_for_is_told_as_it_was_said() -> None:
    upstream = ScriptedUpstream(faults={Phase.REPLY: Fault(Kind.REFUSE, b"554 5.7.1 spam\r\n")})
    assert str((await divided(upstream)).told) == "554 5.7.1 spam"


async def test_buffered_nobody_gets_it_where_the_first_transaction_is_refused() -> None:
    gone = {"r1@example.net": b"550 5.1.1 gone\r\n"}
    upstream = ScriptedUpstream(verdict=gone.get)
    relayed = await divided(upstream, Strategy.BUFFERED)
    assert str(relayed.told) == "550 5.1.1 gone (recipient r1@example.net)"
    assert upstream.kept == []
    assert upstream.verbs.count("MAIL") == 1


@both_strategies
async def test_recipients_of_an_lmtp_upstream_have_their_verdicts_in_order_over_several_transactions(
    strategy: Strategy,
) -> None:
    verdicts = {"r1@example.net": b"552 5.2.2 full\r\n", "r4@example.net": b"452 4.2.2 later\r\n"}
    upstream = ScriptedUpstream(is_lmtp=True, lmtp_verdict=verdicts.get)
    async with (
        upstream,
        relaying(settings(upstream, is_lmtp=True, recipients_per_transaction=2), strategy=strategy) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, MAIL, RecordedTransaction(MAIL))
        await transaction.recipients(people(5))
        final = await transaction.content(CHUNKS)
    assert final.code == 451
    assert "taken for 3 of 5 recipients" in final.text
    assert [reply.code for reply in transaction.verdicts] == [250, 552, 250, 250, 452]


@pytest.mark.parametrize("most", [100, 2, 1])
@pytest.mark.parametrize("extensions", [EXTENSIONS, without("PIPELINING"), without("CHUNKING")])
@both_strategies
async def test_who_is_refused_for_an_lmtp_client_refuses_nobody_else(
    strategy: Strategy, extensions: Sequence[str], most: int
) -> None:
    refused = {"r0@example.net": b"550 5.1.1 gone\r\n", "r3@example.net": b"450 4.2.0 later\r\n"}
    upstream = ScriptedUpstream(extensions=extensions, verdict=refused.get)
    async with (
        upstream,
        relaying(settings(upstream, recipients_per_transaction=most), strategy=strategy) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, MAIL, RecordedTransaction(MAIL, protocol="lmtp"))
        asked = await transaction.recipients(people(5))
        reply = await transaction.content(CHUNKS)
        own = iter(transaction.verdicts or [reply] * 5)
        codes = [next(own).code if verdict.code == 250 else verdict.code for verdict in asked]
    assert codes == [550, 250, 250, 450, 250]
    assert delivered(upstream) == ["r1@example.net", "r2@example.net", "r4@example.net"]


async def test_a_single_recipient_of_an_lmtp_client_beside_other_routes_refuses_nobody_else() -> None:
    refused = {"p0@a.example": b"550 5.1.1 gone\r\n"}
    async with (
        ScriptedUpstream(verdict=refused.get) as first,
        ScriptedUpstream() as second,
        relaying(
            settings(first, name="first", recipients=("*@a.example",)),
            settings(second, name="second"),
            strategy=Strategy.BUFFERED,
        ) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, MAIL, RecordedTransaction(MAIL, protocol="lmtp"))
        await transaction.recipients([Recipient("p0@a.example"), Recipient("p1@b.example")])
        await transaction.content(CHUNKS)
    assert [reply.code for reply in transaction.verdicts] == [550, 250]
    assert delivered(first, second) == ["p1@b.example"]


async def test_duplicates_among_the_recipients_each_have_their_verdict() -> None:
    twice = [*people(2), *people(2), *people(1)]
    async with ScriptedUpstream(most_recipients=2) as upstream, relaying(settings(upstream)) as forwarder:
        relayed = await relay(forwarder, *twice)
        assert relayed.codes == [250] * 5
        assert sizes(upstream) == [2, 2, 1]


# Routes -------------------------------------------------------------------------------------------------------


def three_routes(*upstreams: ScriptedUpstream) -> list[UpstreamSettings]:
    return [
        settings(upstream, name, recipients=(f"*@{name}.example",))
        for name, upstream in zip(("one", "two", "three"), upstreams, strict=True)
    ]


@either_grouping
@both_strategies
async def test_recipients_of_other_routes_go_in_transactions_of_their_own(group: int, strategy: Strategy) -> None:
    recipients = [Recipient(f"r{number}@{name}.example") for number in range(3) for name in ("one", "two", "three")]
    async with ScriptedUpstream() as one, ScriptedUpstream(most_recipients=2) as two, ScriptedUpstream() as three:
        async with relaying(*three_routes(one, two, three), strategy=strategy) as forwarder:
            relayed = await relay_in_groups(forwarder, recipients, group)
        assert_all_have_it_once(relayed, recipients, one, two, three)
        assert [sizes(upstream) for upstream in (one, two, three)] == [[3], [2, 1], [3]]


async def test_each_route_gives_its_own_verdict_at_rcpt() -> None:
    recipients = [Recipient(address) for address in ("a@one.example", "b@two.example", "c@two.example", "d@x.example")]
    two = ScriptedUpstream(verdict=later(b"550 5.1.1 gone\r\n", "b@two.example"))
    async with ScriptedUpstream() as one, two, ScriptedUpstream() as three:
        async with relaying(*three_routes(one, two, three)) as forwarder:
            relayed = await relay(forwarder, *recipients)
        assert relayed.codes == [250, 550, 250, 550]
        assert relayed.told.code == 250
        assert delivered(one, two, three) == ["a@one.example", "c@two.example"]


async def test_a_route_that_is_away_defers_its_recipients_alone() -> None:
    recipients = [Recipient(address) for address in ("a@one.example", "b@two.example")]
    two = ScriptedUpstream(faults={Phase.GREETING: Fault(Kind.CLOSE)})
    async with ScriptedUpstream() as one, two, ScriptedUpstream() as three:
        async with relaying(*three_routes(one, two, three)) as forwarder:
            assert (await relay(forwarder, *recipients)).codes == [250, 451]
        async with relaying(*three_routes(one, two, three), strategy=Strategy.BUFFERED) as forwarder:
            relayed = await relay(forwarder, *recipients)
            assert relayed.codes == [250, 250]
            assert relayed.told.code == 451
            assert "taken for 1 of 2 recipients" in relayed.told.text


async def test_the_first_routes_recipients_may_all_be_refused() -> None:
    recipients = [Recipient(address) for address in ("a@one.example", "b@two.example")]
    one = ScriptedUpstream(verdict=later(b"550 5.1.1 gone\r\n", "a@one.example"))
    async with one, ScriptedUpstream() as two, ScriptedUpstream() as three:
        async with relaying(*three_routes(one, two, three)) as forwarder:
            relayed = await relay(forwarder, *recipients)
            assert relayed.codes == [550, 250]
            assert relayed.told.code == 250
            assert all(snapshot.pool.busy == 0 for snapshot in forwarder.snapshot())
        assert delivered(one, two) == ["b@two.example"]


def overlapping(first: ScriptedUpstream, second: ScriptedUpstream) -> list[UpstreamSettings]:
    """Everybody is served by the first; those of a.example by the second as well."""
    return [settings(first, "first"), settings(second, "second", recipients=("*@a.example",))]


A, B = Recipient("p@a.example"), Recipient("p@b.example")


@pytest.mark.parametrize("recipients", [[A, B], [B, A]])
@either_grouping
@both_strategies
async def test_recipients_of_overlapping_routes_share_a_transaction(
    strategy: Strategy, group: int, recipients: list[Recipient]
) -> None:
    async with ScriptedUpstream() as first, ScriptedUpstream() as second:
        async with relaying(*overlapping(first, second), strategy=strategy) as forwarder:
            assert_all_have_it_once(await relay_in_groups(forwarder, recipients, group), recipients, first)
        assert sizes(first) == [2]


@pytest.mark.parametrize("recipients", [[A, B], [B, A]])
@either_grouping
@both_strategies
async def test_no_upstream_gets_a_recipient_that_it_does_not_serve_when_it_takes_over(
    strategy: Strategy, group: int, recipients: list[Recipient]
) -> None:
    first = ScriptedUpstream(extensions=without("CHUNKING"), faults={Phase.DATA: Fault(Kind.GOODBYE)})
    async with first, ScriptedUpstream() as second:
        async with relaying(*overlapping(first, second), strategy=strategy) as forwarder:
            assert (await relay_in_groups(forwarder, recipients, group)).told.code == 451
        assert b"RCPT TO:<p@b.example>" not in second.commands


@pytest.mark.parametrize("recipients", [[A, B], [B, A]])
async def test_a_recipient_goes_to_the_next_upstream_that_serves_it_whoever_else_has_none(
    recipients: list[Recipient],
) -> None:
    async with ScriptedUpstream(faults={Phase.GREETING: Fault(Kind.CLOSE)}) as first, ScriptedUpstream() as second:
        async with relaying(*overlapping(first, second)) as forwarder:
            relayed = await relay_in_groups(forwarder, recipients, 1)
        assert relayed.codes == [250 if one is A else 451 for one in recipients]
        assert relayed.told.code == 250
        assert delivered(second) == ["p@a.example"]


# Given up on the way ------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_before_its_content_leaves_nothing_open_on_any_route() -> None:
    async with (
        ScriptedUpstream() as one,
        ScriptedUpstream() as two,
        ScriptedUpstream() as three,
        relaying(*three_routes(one, two, three)) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, MAIL, seen := RecordedTransaction(MAIL))
        await transaction.recipients([Recipient("a@one.example"), Recipient("b@two.example")])
        transaction.abort()
        assert [snapshot.pool.busy for snapshot in forwarder.snapshot()] == [0, 0, 0]
        assert all(delivery.ended_ns for delivery in seen.deliveries)


@pytest.mark.parametrize("is_answered", [True, False])
async def test_a_further_transaction_whose_client_left_is_followed_to_its_end(is_answered: bool) -> None:
    """Also where the gateway ends meanwhile, for as long as that waits."""
    two = ScriptedUpstream(faults={Phase.REPLY: Fault(Kind.LATE)})
    async with (
        ScriptedUpstream() as one,
        two,
        ScriptedUpstream() as three,
        relaying(*three_routes(one, two, three)) as forwarder,
    ):
        transaction = Awaited.begin(forwarder, MAIL, seen := RecordedTransaction(MAIL))
        await transaction.recipients([Recipient("a@one.example"), Recipient("b@two.example")])
        waiting = asyncio.create_task(transaction.content(CHUNKS))
        await until(lambda: two.stalled)
        waiting.cancel()
        transaction.abort()
        seen.end_early()
        assert forwarder.observer.late == []  # type: ignore[attr-defined]
        closing = asyncio.create_task(forwarder.close(grace_seconds=SECONDS if is_answered else 0.01))
        if is_answered:
            await asyncio.sleep(0)
            two.let_go.set()
        await closing
        assert forwarder.observer.late == seen.deliveries[1:]  # type: ignore[attr-defined]
        assert seen.outcomes == [("one", Outcome.RELAYED), ("two", Outcome.RELAYED if is_answered else Outcome.UNKNOWN)]


async def test_no_further_transaction_is_begun_once_nobody_waits() -> None:
    upstream = ScriptedUpstream(faults={Phase.REPLY: Fault(Kind.LATE)})
    async with upstream:
        async with relaying(settings(upstream, recipients_per_transaction=2)) as forwarder:
            transaction = Awaited.begin(forwarder, MAIL, RecordedTransaction(MAIL))
            await transaction.recipients(people(4))
            waiting = asyncio.create_task(transaction.content(CHUNKS))
            await until(lambda: upstream.stalled == 1)
            waiting.cancel()
            transaction.abort()
            upstream.let_go.set()
            await until(lambda: forwarder.snapshot()[0].pool.busy == 0)
        assert sizes(upstream) == [2]


async def test_a_client_that_has_waited_for_long_gets_its_reply_before_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("otel_smtp.forwarding.transaction.MOST_SECONDS", 0.2)
    upstream = ScriptedUpstream(faults={Phase.REPLY: Fault(Kind.LATE, times=1)})
    async with upstream, relaying(settings(upstream, recipients_per_transaction=2)) as forwarder:
        for expected in ("taken for 2 of 4 recipients", "kept as 2"):
            relayed = asyncio.create_task(relay(forwarder, *people(4)))
            if not upstream.kept:
                await until(lambda: upstream.stalled == 1)
                await asyncio.sleep(0.25)
                upstream.let_go.set()
            assert expected in (await relayed).told.text
    assert sizes(upstream) == [2, 2, 2]
