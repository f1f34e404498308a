"""Mode queue: durable, then delivered; and what becomes of it where that fails."""

import asyncio
import email
import email.policy
import time
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path

import pytest

from otel_smtp.observing import Outcome
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import DsnReturn, Mail, Notify, Recipient
from otel_smtp.spool.embedded.clocks import Uptime
from otel_smtp.spool.messages import ContentRef, DeliveryState, SpoolError
from otel_smtp.spool.schedule import Schedule
from tests.spool.messages import CARRIER
from tests.spool.queueing import AT_ONCE, NEVER_AGAIN, eventually, queueing, some_bytes
from tests.spool.stores import alter
from tests.support.deliveries import MAIL
from tests.support.relaying import BOB, CAROL, CHUNKS, HEADER, settings, without
from tests.support.upstream import Fault, Kept, Kind, Phase, ScriptedUpstream


def parsed(kept: Kept) -> EmailMessage:
    message = email.message_from_bytes(kept.content, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


def report_of(kept: Kept) -> list[dict[str, str]]:
    """The fields of a bounce's delivery-status part: of the message, then of each recipient."""
    parts = list(parsed(kept).iter_parts())
    assert [part.get_content_type() for part in parts][1] == "message/delivery-status"
    return [dict(block.items()) for block in parts[1].get_payload()]  # type: ignore[union-attr]


def refuse(address: str, reply: bytes) -> Callable[[str], bytes | None]:
    return lambda recipient: reply if recipient == address else None


async def test_a_mail_is_durable_when_it_is_answered_and_delivered_at_once(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)) as queue:
        answers, reply = await queue.take(BOB, CAROL)
        assert [answer.code for answer in answers] == [250, 250]
        assert reply is not None
        assert reply.is_positive
        await queue.empties()
        (kept,) = upstream.kept
        assert kept.addresses == (BOB.address, CAROL.address)
        assert kept.content.endswith(b"Subject: x\r\n\r\nhello\r\n.dot\r\n..\r\n")
        assert await queue.tally() == {"accepted": 2, "delivered": 2}


async def test_an_attempt_stands_in_the_trace_of_its_message(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)) as queue:
        await queue.take()
        await queue.empties()
        (attempt,) = queue.observer.attempts
        assert [attempt.spool_id] == queue.spooled
        assert attempt.carrier == CARRIER
        assert attempt.accepted == [BOB]
        assert attempt.octets == sum(len(chunk) for chunk in CHUNKS)
        assert [(one.upstream, one.outcome) for one in attempt.deliveries] == [("up", Outcome.RELAYED)]


@pytest.mark.parametrize("octets", [0, 1000, 300_000, 1_500_000])
async def test_contents_of_any_size_arrive_as_they_came(tmp_path: Path, octets: int) -> None:
    body = some_bytes(octets)
    pieces = [body[start : start + 60_000] for start in range(0, octets, 60_000)]
    async with (
        ScriptedUpstream(extensions=without("CHUNKING")) as upstream,
        queueing(tmp_path, settings(upstream)) as queue,
    ):
        await queue.take(chunks=(HEADER, b"\r\n", *pieces, b"\r\n"))
        await queue.empties()
        assert upstream.kept[0].content.partition(b"\r\n\r\n")[2] == body + b"\r\n"


async def test_mail_waits_for_an_upstream_that_is_away(tmp_path: Path) -> None:
    upstream = await ScriptedUpstream().start()
    port = upstream.port
    await upstream.stop()
    async with queueing(tmp_path, settings(upstream)) as queue:
        for _ in range(20):
            _, reply = await queue.take()
            assert reply is not None
            assert reply.is_positive
        await eventually(lambda: queue.relay.concurrency("up") == 0)
        attempts = len(queue.observer.attempts)
        again = ScriptedUpstream()
        await again.start(port=port)
        await queue.empties()
        assert len(again.kept) == 20
        # While the upstream is in backoff, nothing is attempted but by its probe.
        assert attempts < 20
        await again.stop()


async def test_attempts_are_numbered_over_the_whole_life_of_a_message(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)) as queue:
        upstream.faults[Phase.REPLY] = Fault(Kind.REFUSE, times=2)
        await queue.take()
        await queue.empties()
        deliveries = [attempt.deliveries[0] for attempt in queue.observer.attempts]
        assert [delivery.attempt for delivery in deliveries] == [1, 2, 3]
        assert [delivery.outcome for delivery in deliveries] == [Outcome.DEFERRED, Outcome.DEFERRED, Outcome.RELAYED]
        waited = [attempt.waited_seconds for attempt in queue.observer.attempts]
        assert waited == sorted(waited, key=lambda seconds: seconds or 0.0)
        assert 0 <= (waited[0] or 0) < (waited[2] or 0) < 60


async def test_each_recipient_has_its_own_end(tmp_path: Path) -> None:
    dave = Recipient("dave@example.net")
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream), bounce="off") as queue:
        asked: list[str] = []

        def verdict(address: str) -> bytes | None:
            asked.append(address)
            if address == CAROL.address and asked.count(address) == 1:
                return b"450 4.2.1 later\r\n"
            return b"550 5.1.1 unknown\r\n" if address == dave.address else None

        upstream.verdict = verdict
        await queue.take(BOB, CAROL, dave)
        await queue.empties()
        assert [kept.addresses for kept in upstream.kept] == [(BOB.address,), (CAROL.address,)]
        assert asked.count(BOB.address) == 1
        assert await queue.tally() == {"accepted": 3, "delivered": 2, "failed": 1}


async def test_each_lmtp_recipient_has_the_mail_once(tmp_path: Path) -> None:
    delivered: list[str] = []

    def verdict(address: str) -> bytes | None:
        delivered.append(address)
        if address == CAROL.address and delivered.count(address) == 1:
            return b"452 4.2.2 mailbox full\r\n"
        return b"550 5.2.1 closed\r\n" if address.startswith("dave") else None

    dave = Recipient("dave@example.net")
    async with (
        ScriptedUpstream(is_lmtp=True, lmtp_verdict=verdict) as upstream,
        queueing(tmp_path, settings(upstream, is_lmtp=True), bounce="off") as queue,
    ):
        await queue.take(BOB, CAROL, dave)
        await queue.empties()
        assert delivered == [BOB.address, CAROL.address, dave.address, CAROL.address]
        assert await queue.tally() == {"accepted": 3, "delivered": 2, "failed": 1}


async def test_what_is_more_than_one_transaction_takes_follows_at_once(tmp_path: Path) -> None:
    many = [Recipient(f"user{number}@example.net") for number in range(7)]
    async with (
        ScriptedUpstream() as upstream,
        queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN) as queue,
    ):
        taken: list[str] = []

        def verdict(address: str) -> bytes | None:
            if len(taken) == 3 * (len(upstream.kept) + 1):
                return b"452 4.5.3 too many\r\n"
            taken.append(address)
            return None

        upstream.verdict = verdict
        await queue.take(*many)
        await queue.empties()
        assert [len(kept.addresses) for kept in upstream.kept] == [3, 3, 1]


async def test_two_routes_are_two_deliveries_of_one_message(tmp_path: Path) -> None:
    async with ScriptedUpstream() as first, ScriptedUpstream() as second:
        routes = (
            settings(first, "first", recipients=("bob@*",)),
            settings(second, "second", recipients=("carol@*",)),
        )
        async with queueing(tmp_path, *routes) as queue:
            answers, _ = await queue.take(BOB, CAROL)
            assert [answer.code for answer in answers] == [250, 250]
            await queue.empties()
            assert [kept.addresses for kept in first.kept] == [(BOB.address,)]
            assert [kept.addresses for kept in second.kept] == [(CAROL.address,)]


async def test_one_dead_route_holds_up_no_other(tmp_path: Path) -> None:
    async with ScriptedUpstream() as alive:
        dead = await ScriptedUpstream().start()
        await dead.stop()
        routes = (settings(dead, "dead", recipients=("bob@*",)), settings(alive, "alive", recipients=("carol@*",)))
        async with queueing(tmp_path, *routes) as queue:
            for _ in range(10):
                await queue.take(BOB)
            for _ in range(10):
                await queue.take(CAROL)

            async def are_delivered() -> bool:
                return (await queue.tally()).get("delivered") == 10

            await eventually(are_delivered)
            assert len(alive.kept) == 10


async def test_a_route_that_is_gone_sends_nothing_back(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        async with queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN) as queue:
            upstream.faults[Phase.REPLY] = Fault(Kind.REFUSE)
            await queue.take()
            await eventually(lambda: len(queue.observer.attempts) == 1)
        upstream.faults.clear()
        async with queueing(tmp_path, settings(upstream, recipients=("nobody@*",)), schedule=AT_ONCE) as queue:
            await queue.spool.store.retry((await queue.shown())[0].id)
            queue.spool.runner.wake()

            async def is_attempted_again() -> bool:
                return (await queue.shown())[0].attempts >= 2

            await eventually(is_attempted_again)
            assert await queue.tally() == {"accepted": 1}
        async with queueing(tmp_path, settings(upstream)) as queue:
            await queue.spool.store.retry((await queue.shown())[0].id)
            queue.spool.runner.wake()
            await queue.empties()
        assert len(upstream.kept) == 1


# Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.MAIL, Phase.RCPT, Phase.DATA, Phase.REPLY])
async def test_what_is_refused_for_good_goes_back_to_its_sender(tmp_path: Path, phase: Phase) -> None:
    async with (
        ScriptedUpstream(extensions=without("CHUNKING")) as upstream,
        queueing(tmp_path, settings(upstream)) as queue,
    ):
        upstream.faults[phase] = Fault(Kind.REFUSE, b"550 5.7.9 not\x01 here\r\n", times=1)
        mail = Mail(MAIL.reverse_path, envid="QQ+2B1", ret=DsnReturn.HEADERS)
        await queue.take(Recipient(BOB.address, orcpt="rfc822;robert@example.net"), mail=mail)
        await queue.empties()
        (bounce,) = upstream.kept
        assert bounce.addresses == (MAIL.reverse_path,)
        assert bounce.mail.startswith(b"<>")
        message = parsed(bounce)
        assert message["To"] == MAIL.reverse_path
        assert message["Auto-Submitted"] == "auto-replied"
        assert message.get_content_type() == "multipart/report"
        about, recipient = report_of(bounce)
        assert about["Original-Envelope-Id"] == "QQ+1"
        assert recipient["Final-Recipient"] == f"rfc822; {BOB.address}"
        assert recipient["Original-Recipient"] == "rfc822; robert@example.net"
        assert (recipient["Action"], recipient["Status"]) == ("failed", "5.7.9")
        assert recipient["Diagnostic-Code"].startswith("smtp; 550 5.7.9 not")
        assert b"Subject: x" in bounce.content
        assert b"hello" not in bounce.content
        assert await queue.tally() == {"accepted": 1, "failed": 1, "notified": 1, "notified_delivered": 1}


async def test_the_whole_message_goes_back_where_that_was_asked_for(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)) as queue:
        upstream.verdict = refuse(BOB.address, b"550 5.1.1 unknown\r\n")
        await queue.take(mail=Mail(MAIL.reverse_path, ret=DsnReturn.FULL))
        await queue.empties()
        original = list(parsed(upstream.kept[0]).iter_parts())[2]
        assert original.get_content_type() == "message/rfc822"
        assert b"\r\n\r\nhello\r\n.dot\r\n..\r\n" in upstream.kept[0].content


@pytest.mark.parametrize("takes_eight_bit", [True, False])
async def test_a_bounce_fits_what_the_upstream_takes(tmp_path: Path, takes_eight_bit: bool) -> None:
    extensions = without() if takes_eight_bit else without("8BITMIME", "SMTPUTF8", "BINARYMIME")
    async with (
        ScriptedUpstream(extensions=extensions) as upstream,
        queueing(tmp_path, settings(upstream)) as queue,
    ):
        upstream.verdict = refuse(BOB.address, b"550 5.1.1 unknown\r\n")
        await queue.take(mail=Mail(MAIL.reverse_path, ret=DsnReturn.FULL), chunks=(HEADER, b"\r\n\xff\r\n"))
        await queue.empties()
        (bounce,) = upstream.kept
        assert (b"BODY=8BITMIME" in bounce.mail) is takes_eight_bit
        assert (b"\r\n\r\n\xff\r\n" in bounce.content) is takes_eight_bit
        assert bounce.content.isascii() is not takes_eight_bit


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("line", [b"hello", b"h\xc3\xa4llo", b"hello" * 20_000, b"h\xc3\xa4llo" + b"hello" * 20_000])
async def test_smtputf8_is_not_asked_for_where_nothing_needs_it(tmp_path: Path, line: bytes, count: int) -> None:
    recipients = [Recipient(f"r{number}@example.net") for number in range(count)]
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)) as queue:
        await queue.take(*recipients, mail=MAIL._replace(smtputf8=True), chunks=(HEADER, b"\r\n" + line + b"\r\n"))
        await queue.empties()
        (kept,) = upstream.kept
        assert (b"SMTPUTF8" in kept.mail) is not line.isascii()


async def test_a_bounce_goes_without_an_original_that_is_lost(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)) as queue:

        def verdict(address: str) -> bytes | None:
            if address != BOB.address:
                return None
            for file in (tmp_path / "spool" / "large").iterdir():
                file.unlink()
            return b"550 5.1.1 unknown\r\n"

        upstream.verdict = verdict
        await queue.take(chunks=(HEADER, b"\r\n", some_bytes(200_000), b"\r\n"))
        await queue.empties()
        (bounce,) = upstream.kept
        assert report_of(bounce)[1]["Status"] == "5.1.1"


@pytest.mark.parametrize(
    ("mail", "recipient", "bounce"),
    [
        (Mail(""), BOB, "mail"),  # a bounce is never answered with one
        (MAIL, Recipient(BOB.address, Notify.NEVER), "mail"),
        (MAIL, Recipient(BOB.address, Notify.SUCCESS | Notify.DELAY), "mail"),
        (MAIL, BOB, "log"),
        (MAIL, BOB, "off"),
    ],
)
async def test_nobody_is_told_who_does_not_want_to_be(
    tmp_path: Path, mail: Mail, recipient: Recipient, bounce: str
) -> None:
    async with (
        ScriptedUpstream() as upstream,
        queueing(tmp_path, settings(upstream), bounce=bounce) as queue,  # type: ignore[arg-type]
    ):
        upstream.verdict = refuse(BOB.address, b"550 5.1.1 unknown\r\n")
        await queue.take(recipient, mail=mail)
        await queue.empties()
        assert upstream.kept == []
        assert await queue.tally() == {"accepted": 1, "failed": 1}


async def test_success_is_told_where_the_upstream_does_not(tmp_path: Path) -> None:
    asking = Recipient(BOB.address, Notify.SUCCESS)
    async with (
        ScriptedUpstream(extensions=without("DSN")) as upstream,
        queueing(tmp_path, settings(upstream)) as queue,
    ):
        await queue.take(asking)
        await queue.empties()
        _, notice = upstream.kept
        assert report_of(notice)[1]["Action"] == "relayed"
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)) as queue:
        await queue.take(asking)
        await queue.empties()
        (kept,) = upstream.kept
        assert b"NOTIFY=SUCCESS" in kept.recipients[0]


async def test_a_notice_that_is_refused_is_not_answered(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)) as queue:
        upstream.verdict = lambda _: b"550 5.1.1 unknown\r\n"
        await queue.take()
        await queue.empties()
        assert upstream.kept == []
        tally = await queue.tally()
        assert tally == {"accepted": 1, "failed": 1, "notified": 1, "notified_failed": 1}


async def test_mail_that_no_upstream_serves_is_refused_at_once(tmp_path: Path) -> None:
    async with (
        ScriptedUpstream() as upstream,
        queueing(tmp_path, settings(upstream, recipients=("*@example.net",))) as queue,
    ):
        answers, reply = await queue.take(Recipient("x@elsewhere.example"))
        assert (answers, reply) == ([replies.RELAY_DENIED], None)
        assert await queue.is_empty()


# Time ---------------------------------------------------------------------------------------------------------


async def test_what_is_too_old_goes_back_and_a_warning_goes_before(tmp_path: Path) -> None:
    schedule = Schedule((0.02,), max_age_seconds=0.6, warn_after_seconds=0.1)
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream), schedule=schedule) as queue:
        upstream.verdict = refuse(BOB.address, b"450 4.2.1 mailbox busy\r\n")
        await queue.take(mail=Mail(MAIL.reverse_path, ret=DsnReturn.FULL))
        for count in (1, 2):
            while len(upstream.kept) < count:
                queue.spool.runner.look_soon()
                await asyncio.sleep(0.01)
        await queue.empties()
        warning, bounce = upstream.kept
        assert (report_of(warning)[1]["Action"], report_of(warning)[1]["Status"]) == ("delayed", "4.2.1")
        assert "Will-Retry-Until" in report_of(warning)[1]
        assert (report_of(bounce)[1]["Action"], report_of(bounce)[1]["Status"]) == ("failed", "4.4.7")
        assert report_of(bounce)[1]["Diagnostic-Code"] == "smtp; 450 4.2.1 mailbox busy"  # what it was, at last
        # RET=FULL speaks of failures alone.
        assert b"hello" not in warning.content
        assert b"hello" in bounce.content
        tally = await queue.tally()
        assert tally == {"accepted": 1, "expired": 1, "notified": 2, "notified_delivered": 2}


async def test_a_notice_that_is_too_old_is_given_up_and_the_log_cries(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN) as queue:
        upstream.verdict = lambda address: b"450 4.2.1 no\r\n" if address == MAIL.reverse_path else b"550 5.1.1 no\r\n"
        await queue.take()

        async def notice_waits() -> bool:
            page = await queue.shown()
            return len(page) == 1 and page[0].attempts == 1 and page[0].state is DeliveryState.READY

        await eventually(notice_waits)
        (notice,) = await queue.shown()
        await queue.spool.store.expire(notice.id)
        queue.spool.runner.look_soon()

        await queue.empties()
    (line,) = [one for one in caplog.records if one.levelname == "CRITICAL"]
    assert line.getMessage() == "notice expired undelivered"
    assert line.__dict__["code"] == 450


async def test_mail_whose_bounce_cannot_be_made_now_expires_later_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where no file can be opened for a moment."""
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN) as queue:
        upstream.verdict = refuse(BOB.address, b"450 4.2.1 mailbox busy\r\n")
        for _ in range(3):
            await queue.take()
        store, taken = queue.spool.store, list(queue.spooled)

        async def all_wait() -> bool:
            return (await store.counts()).deferred == 3

        await eventually(all_wait)
        read, refused = store.read, [taken[0]]

        async def read_later(content: ContentRef, start: int, octets: int) -> bytes:
            if content.key in refused:
                refused.remove(str(content.key))
                raise SpoolError("too many open files")
            return await read(content, start, octets)

        monkeypatch.setattr(store, "read", read_later)
        for one in taken:
            await store.expire(one)
        queue.spool.runner.look_soon()

        async def two_are_ended() -> bool:
            return (await queue.tally()).get("expired") == 2

        await eventually(two_are_ended)
        assert (await store.show(taken[0])).state is DeliveryState.READY
        queue.spool.runner.look_soon()
        await queue.empties()
        assert (await queue.tally())["expired"] == 3


async def test_a_warning_that_cannot_be_made_now_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = Schedule((3600.0,), warn_after_seconds=0.001)
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream), schedule=schedule) as queue:
        upstream.verdict = refuse(BOB.address, b"450 4.2.1 mailbox busy\r\n")
        store, read = queue.spool.store, queue.spool.store.read
        readable: list[str] = []

        async def read_some(content: ContentRef, start: int, octets: int) -> bytes:
            if content.key not in readable:
                raise SpoolError("too many open files")
            return await read(content, start, octets)

        monkeypatch.setattr(store, "read", read_some)
        for _ in range(2):
            await queue.take()
        first, second = queue.spooled

        async def unwarned() -> list[str]:
            return [one.message_id for one in await store.unwarned(0.0, 10)]

        async def both_wait() -> bool:
            return await unwarned() == [first, second]

        await eventually(both_wait)
        readable.append(second)

        async def is_warned() -> bool:
            queue.spool.runner.look_soon()
            return await unwarned() == [first]

        await eventually(is_warned)


@pytest.mark.parametrize("has_passed", [True, False], ids=["time has passed", "the clock jumped"])
async def test_what_is_too_old_ends_a_part_at_a_time_and_what_only_seems_so_does_not(
    tmp_path: Path, has_passed: bool
) -> None:
    later = 0.0
    schedule = Schedule((3600.0,), max_age_seconds=86400.0, warn_after_seconds=None)
    async with (
        ScriptedUpstream() as upstream,
        queueing(
            tmp_path, settings(upstream), schedule=schedule, bounce="off", clock=lambda: time.time() + later,
            up=lambda: Uptime("boot", round((time.time() + has_passed * later) * 1000)),
        ) as queue,
    ):  # fmt: skip
        upstream.verdict = lambda _: b"450 4.2.1 busy\r\n"
        for _ in range(130):
            await queue.take()

        async def all_wait() -> bool:
            return (await queue.spool.store.counts()).deferred == 130

        await eventually(lambda: len(queue.observer.attempts) == 130)
        await eventually(all_wait)
        later = 30 * 86400.0
        queue.spool.runner.look_soon()
        if not has_passed:
            # What waits is due now, and attempted.
            await eventually(lambda: len(queue.observer.attempts) == 260)
            assert "expired" not in await queue.tally()
            return

        async def a_hundred_are_ended() -> bool:
            return (await queue.tally()).get("expired", 0) >= 100

        await eventually(a_hundred_are_ended)
        assert (await queue.tally())["expired"] == 100, "the others are for the next look"


async def test_a_clock_that_is_set_back_keeps_nothing_waiting(tmp_path: Path) -> None:
    jump = 0.0
    async with (
        ScriptedUpstream() as upstream,
        queueing(tmp_path, settings(upstream), clock=lambda: time.time() + jump) as queue,
    ):
        upstream.verdict = lambda _: b"450 4.2.1 busy\r\n"
        await queue.take()
        await eventually(lambda: len(queue.observer.attempts) >= 2)
        upstream.verdict = lambda _: None
        jump = -86400.0
        queue.spool.runner.look_soon()
        await queue.empties()
        assert len(upstream.kept) == 1


# Ends and crashes ---------------------------------------------------------------------------------------------


async def test_a_lost_reply_is_tried_again_and_known_as_a_possible_duplicate(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream, queueing(tmp_path, settings(upstream)) as queue:
        upstream.faults[Phase.REPLY] = Fault(Kind.KEPT_THEN_LOST, times=1)
        await queue.take()
        await queue.empties()
        assert len(upstream.kept) == 2
        assert queue.observer.outcomes == [Outcome.UNKNOWN, Outcome.RELAYED]
        assert [attempt.is_possible_duplicate for attempt in queue.observer.attempts] == [False, True]
        assert await queue.tally() == {"accepted": 1, "delivered": 1}


async def test_what_is_under_way_at_the_end_is_completed(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        upstream.faults[Phase.REPLY] = Fault(Kind.LATE, times=1)
        async with queueing(tmp_path, settings(upstream)) as queue:
            await queue.take()
            await eventually(lambda: upstream.stalled)
            stopping = asyncio.create_task(queue.spool.stop(grace_seconds=5))
            await asyncio.sleep(0)
            upstream.let_go.set()
            await stopping
        async with queueing(tmp_path, settings(upstream)) as queue:
            assert await queue.is_empty()
        assert len(upstream.kept) == 1


@pytest.mark.long
async def test_what_is_cut_short_at_the_end_is_attempted_again(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        upstream.faults[Phase.REPLY] = Fault(Kind.STALL, times=1)
        async with queueing(tmp_path, settings(upstream)) as queue:
            await queue.take()
            await eventually(lambda: upstream.stalled)
            await queue.spool.stop(grace_seconds=0)
        async with queueing(tmp_path, settings(upstream)) as queue:
            await queue.empties()
            assert await queue.tally() == {"accepted": 1, "delivered": 1}


async def test_a_damaged_content_is_set_aside_and_never_sent(tmp_path: Path) -> None:
    async with ScriptedUpstream() as upstream:
        async with queueing(tmp_path, settings(upstream), schedule=NEVER_AGAIN) as queue:
            upstream.faults[Phase.MAIL] = Fault(Kind.REFUSE, times=1)
            await queue.take()
            await eventually(lambda: len(queue.observer.attempts) == 1)
        assert alter(tmp_path / "spool", b"hello", b"HELLO") == 1
        async with queueing(tmp_path, settings(upstream)) as queue:
            (shown,) = await queue.shown()
            await queue.spool.store.retry(shown.id)
            queue.spool.runner.wake()

            async def is_corrupt() -> bool:
                return (await queue.spool.store.show(shown.id)).state is DeliveryState.CORRUPT

            await eventually(is_corrupt)
    assert upstream.kept == []
