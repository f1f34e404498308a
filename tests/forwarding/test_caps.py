"""An upstream that takes few connections at once costs nobody a mail; over real sockets."""

import asyncio
import logging
from collections.abc import Sequence

import pytest

from otel_smtp.forwarding.settings import Timeouts
from otel_smtp.forwarding.upstream import UpstreamForwarder
from otel_smtp.net import sweep
from otel_smtp.observing import DeliveryPhase, DeliveryRecord
from tests.support.deliveries import MAIL, Awaited, RecordedTransaction
from tests.support.relaying import BOB, CHUNKS, PATIENT, Relayed, both_strategies, relay, relaying, settings
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import until

CAP = pytest.mark.parametrize("said", [b"421 4.3.2 too many connections\r\n", b"", b"450 4.3.2 busy\r\n"])


async def burst(forwarder: UpstreamForwarder, mails: int) -> Sequence[Relayed]:
    return await asyncio.gather(*(relay(forwarder) for _ in range(mails)))


def deliveries(relayed: Sequence[Relayed]) -> list[DeliveryRecord]:
    return [delivery for one in relayed for delivery in one.seen.deliveries]


@both_strategies
@CAP
async def test_no_mail_is_lost_to_a_cap_from_the_first_burst_on(
    said: bytes, strategy: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        ScriptedUpstream(most_connections=3, too_many_connections=said) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        caplog.set_level(logging.INFO)
        first = await burst(forwarder, 60)
        refused = upstream.refused_connections
        second = await burst(forwarder, 60)
    assert {one.told.code for one in [*first, *second]} == {250}
    assert len(upstream.kept) == 120
    assert refused == 2  # of the window that an upstream is first met with
    assert upstream.refused_connections == refused
    assert {len(one.seen.deliveries) for one in first} == {1}
    lines = [record for record in caplog.records if record.name == "otel_smtp.forwarding.reaching"]
    assert [(line.levelname, line.connections) for line in lines] == [("WARNING", 3)]  # type: ignore[attr-defined]


async def test_the_wait_below_a_cap_is_traced() -> None:
    async with ScriptedUpstream(most_connections=3) as upstream, relaying(settings(upstream)) as forwarder:
        relayed = await burst(forwarder, 5)
    waited = [one for one in deliveries(relayed) if any(phase is DeliveryPhase.GREETING and reply is not None
              and reply.code == 421 for _, phase, reply in one.phases)]  # fmt: skip
    assert len(waited) == 2
    for delivery in waited:
        phases = [phase for _, phase, _ in delivery.phases]
        assert phases[:4] == [
            DeliveryPhase.POOL, DeliveryPhase.CONNECT, DeliveryPhase.GREETING, DeliveryPhase.POOL,
        ]  # fmt: skip
        assert delivery.is_reused
        assert delivery.pool_wait_ns is not None
        assert delivery.pool_wait_ns > 0


async def test_an_upstream_that_refuses_all_connections_is_away_and_the_next_one_serves() -> None:
    async with (
        ScriptedUpstream(most_connections=0) as away,
        ScriptedUpstream() as upstream,
        relaying(settings(away, "away"), settings(upstream)) as forwarder,
    ):
        relayed = await burst(forwarder, 20)
    assert {one.told.code for one in relayed} == {250}
    assert len(upstream.kept) == 20
    assert {one.seen.deliveries[0].upstream for one in relayed} == {"away"}
    assert away.connections <= 5


async def test_who_waits_in_vain_below_a_cap_is_told_what_the_upstream_said() -> None:
    upstream = ScriptedUpstream(most_connections=1, faults={Phase.REPLY: Fault(Kind.LATE)})
    timeouts = Timeouts(connect=2, greeting=2, command=2, data=2, block=2, reply=2, pool=0.3)
    async with upstream, relaying(settings(upstream, timeouts=timeouts)) as forwarder:
        relayed = asyncio.gather(*(relay(forwarder) for _ in range(2)))
        await asyncio.sleep(0.6)
        upstream.let_go.set()
        told = sorted(str(one.told) for one in await relayed)
    assert told[0].startswith("250 ")
    assert told[1].startswith("451 4.4.1 All connections to the upstream are busy")
    assert told[1].endswith("421 4.3.2 too many connections")


async def test_who_waits_below_a_cap_gets_a_connection_whose_client_says_nothing_before_the_next_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "SWEEP_SECONDS", 3600)
    async with ScriptedUpstream(most_connections=1) as upstream, relaying(settings(upstream)) as forwarder:
        silent = Awaited.begin(forwarder, MAIL, RecordedTransaction())
        assert (await silent.recipients([BOB]))[0].code == 250
        async with asyncio.timeout(30):
            assert (await relay(forwarder)).told.code == 250
        assert upstream.refused_connections == 1
        assert (await silent.content(CHUNKS)).code == 250


async def test_a_mail_that_is_given_up_while_it_waits_below_a_cap_leaves_nothing_behind() -> None:
    upstream = ScriptedUpstream(most_connections=1, faults={Phase.REPLY: Fault(Kind.LATE)})
    async with upstream, relaying(settings(upstream, timeouts=PATIENT)) as forwarder:
        mails = [asyncio.create_task(relay(forwarder)) for _ in range(3)]
        await until(lambda: upstream.refused_connections == 2 and upstream.stalled > 0)
        await until(lambda: forwarder.snapshot()[0].pool.waiting == 2)
        given_up = [mail for mail in mails if not mail.done()][1:]
        for mail in given_up:
            mail.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)
        upstream.let_go.set()
        await asyncio.gather(*mails, return_exceptions=True)
        (snapshot,) = forwarder.snapshot()
        assert (snapshot.pool.waiting, snapshot.pool.busy, snapshot.pool.opening) == (0, 0, 0)
        assert (await relay(forwarder)).told.code == 250


async def test_a_probe_that_is_one_connection_too_many_does_not_make_the_upstream_unreachable() -> None:
    upstream = ScriptedUpstream(most_connections=1, faults={Phase.REPLY: Fault(Kind.LATE)})
    async with upstream, relaying(settings(upstream)) as forwarder:
        mail = asyncio.create_task(relay(forwarder))
        await until(lambda: upstream.stalled > 0)
        await forwarder._smarthosts[0].probe()
        assert upstream.refused_connections == 1
        assert forwarder.is_reachable
        upstream.let_go.set()
        assert (await mail).told.code == 250
