"""The relay as the spool uses it: no client waits, so a single recipient may travel with its content."""

from otel_smtp.forwarding.limits import Limit, LimitSettings
from otel_smtp.forwarding.settings import Strategy
from otel_smtp.observing import Outcome, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from tests.support.deliveries import MAIL, Awaited, LateDeliveries
from tests.support.relaying import BOB, CAROL, CHUNKS, both_strategies, relay, relaying, settings
from tests.support.upstream import Fault, Kind, Phase, ScriptedUpstream

GONE = Recipient("gone@example.net")


def resumed() -> TransactionRecord:
    return TransactionRecord.resumed("1", {}, MAIL)


def verdict(address: str) -> bytes | None:
    return b"550 5.1.1 gone\r\n" if address == GONE.address else None


@both_strategies
async def test_a_single_recipient_travels_with_its_content(strategy: Strategy) -> None:
    async with (
        ScriptedUpstream(verdict=verdict) as upstream,
        relaying(settings(upstream), strategy=strategy) as forwarder,
    ):
        await relay(forwarder)
        for recipient, code in ((BOB, 250), (GONE, 550)):
            before = upstream.round_trips
            transaction = Awaited.begin(forwarder.for_spool(), MAIL, record := resumed())
            assert await transaction.recipients([recipient]) == [replies.RECIPIENT_OK]
            assert (await transaction.content(CHUNKS)).code == code
            assert upstream.round_trips - before == 1
            assert record.deliveries[0].round_trips == 1
        assert (upstream.connections, len(upstream.kept)) == (1, 2)


async def test_several_recipients_are_asked_together_and_lmtp_judges_each() -> None:
    async with (
        ScriptedUpstream(is_lmtp=True, lmtp_verdict=verdict) as upstream,
        relaying(settings(upstream, is_lmtp=True)) as forwarder,
    ):
        transaction = Awaited.begin(forwarder.for_spool(), MAIL, resumed())
        assert [reply.code for reply in await transaction.recipients([BOB, GONE, CAROL])] == [250] * 3
        assert str(await transaction.content(CHUNKS)) == "550 5.1.1 gone (taken for 2 of 3 recipients)"
        assert [reply.code for reply in transaction.verdicts] == [250, 550, 250]


async def test_each_of_its_transactions_waits_for_limits_for_which_no_client_would() -> None:
    limits = {"rate": Limit(LimitSettings("rate", count=1, period_seconds=0.05))}
    async with (
        ScriptedUpstream() as upstream,
        relaying(
            settings(upstream, paced_by=("rate",), recipients_per_transaction=1),
            limits=limits,
            pace_patience_seconds=0.0,
        ) as forwarder,
    ):
        for recipients in ([BOB], [BOB, CAROL, GONE]):
            transaction = Awaited.begin(forwarder.for_spool(), MAIL, record := resumed())
            assert all(reply.is_positive for reply in await transaction.recipients(recipients))
            assert (await transaction.content(CHUNKS)).code == 250
            assert [one.outcome for one in record.deliveries] == [Outcome.RELAYED] * len(recipients)


async def test_who_attempts_tells_of_its_deliveries_as_it_alone_knows_each_recipients_end() -> None:
    faults = {Phase.GREETING: Fault(Kind.CLOSE)}
    async with (
        ScriptedUpstream(faults=faults) as bad,
        ScriptedUpstream() as good,
        relaying(settings(bad, "bad"), settings(good, "good")) as forwarder,
    ):
        transaction = Awaited.begin(forwarder.for_spool(), MAIL, record := resumed())
        await transaction.recipients([BOB])
        assert (await transaction.content(CHUNKS)).code == 250
        assert isinstance(forwarder.observer, LateDeliveries)
        assert forwarder.observer.late == []
        assert [one.outcome for one in record.deliveries] == [Outcome.DEFERRED, Outcome.RELAYED]
        # A client's mail reaches observers with its transaction.
        await relay(forwarder)
        assert forwarder.observer.late == []


async def test_it_says_beforehand_what_the_forwarder_says() -> None:
    async with (
        ScriptedUpstream(extensions=("SIZE 1000",)) as upstream,
        relaying(settings(upstream, recipients=("*@example.net",))) as forwarder,
    ):
        spooled = forwarder.for_spool()
        await relay(forwarder)
        assert spooled.capabilities() is forwarder.capabilities()
        assert spooled.capabilities().size == 1000
        assert spooled.refusal(Mail("a@example.com", size=1001)) is replies.MESSAGE_TOO_BIG
        assert spooled.refusal(MAIL) is None
        assert spooled.destination(MAIL, BOB) == "up"
        assert spooled.destination(MAIL, Recipient("x@example.org")) is replies.RELAY_DENIED
        assert spooled.concurrency("up") == forwarder.concurrency("up") > 1
        assert spooled.concurrency("a name of old") == forwarder.concurrency("up")
