"""What probes learn about upstreams: known already, or found out meanwhile, and never by a mail."""

from otel_smtp.forwarding.upstream import UpstreamForwarder
from tests.support.relaying import relay, relaying, settings
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream
from tests.support.waiting import until


async def probed(forwarder: UpstreamForwarder) -> bool:
    """Whether an upstream can be reached, once something is known of each."""
    forwarder.probe_if_stale()
    await until(
        lambda: all(
            (one.last_success_seconds, one.last_failure_seconds) != (None, None) for one in forwarder.snapshot()
        )
    )
    return forwarder.is_reachable


async def test_nothing_known_is_nothing_bad_and_is_found_out_without_mail() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        assert forwarder.is_reachable
        assert await probed(forwarder)
        assert upstream.verbs == ["EHLO"]
        (snapshot,) = forwarder.snapshot()
        assert snapshot.last_success_seconds is not None
        assert snapshot.last_failure is None
        # The connection that was made for it serves the next mail.
        await relay(forwarder)
        assert upstream.connections == 1


async def test_what_is_known_is_not_asked_again() -> None:
    async with ScriptedUpstream() as upstream, relaying(settings(upstream)) as forwarder:
        await relay(forwarder)
        for _ in range(5):
            assert await probed(forwarder)
        assert upstream.connections == 1


async def test_an_upstream_that_is_away_is_known_before_any_mail() -> None:
    upstream = await ScriptedUpstream().start()
    await upstream.stop()
    async with relaying(settings(upstream)) as forwarder:
        assert not await probed(forwarder)
        (snapshot,) = forwarder.snapshot()
        assert snapshot.last_failure == "upstream_unavailable"
        assert snapshot.last_failure_seconds is not None


async def test_one_of_two_is_enough() -> None:
    gone = await ScriptedUpstream().start()
    await gone.stop()
    async with (
        ScriptedUpstream() as upstream,
        relaying(settings(gone, "gone"), settings(upstream, "there")) as forwarder,
    ):
        assert await probed(forwarder)
        assert [snapshot.is_reachable for snapshot in forwarder.snapshot()] == [False, True]


async def test_a_mail_that_is_answered_says_that_it_can_be_reached() -> None:
    async with (
        ScriptedUpstream(faults={Phase.GREETING: Fault(Kind.GARBAGE, times=1)}) as upstream,
        relaying(settings(upstream)) as forwarder,
    ):
        assert not await probed(forwarder)
        await relay(forwarder)
        assert forwarder.is_reachable
