"""What every store does: each verb of the interface, on each kind of store."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, DsnReturn, Mail, Notify, Recipient
from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.messages import (
    OUTCOME_PREFIX,
    Backlog,
    DeliveryState,
    End,
    Kind,
    Lease,
    NewMessage,
    NoSuchMessage,
    SpoolError,
    StaleLease,
    StoreVerb,
    Verdict,
    new_id,
)
from otel_smtp.spool.store import Store
from tests.spool.memory_store import MemoryStore
from tests.spool.messages import BODY, CARRIER, HEADER, TRACE_ID, leased, message, queued, written
from tests.spool.stores import STORES, Clock

DELIVERED = (Verdict(0, End.DELIVERED, replies.OK),)


@dataclass
class Case:
    """A store under test."""

    store: Store
    clock: Clock
    again: Callable[[], Store]


@pytest.fixture(params=STORES)
async def case(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Case]:
    clock = Clock()

    def make() -> Store:
        return STORES[request.param](tmp_path / "spool", clock)

    case = Case(make(), clock, make)
    await case.store.open()
    yield case
    await case.store.close()


async def put(case: Case, new: NewMessage | None = None, *, lease: bool = False) -> tuple[NewMessage, Sequence[Lease]]:
    new = new or message()
    return new, await case.store.submit(new, await written(case.store.draft()), lease=lease)


# In and out ------------------------------------------------------------------------------------------------------


async def test_a_message_comes_back_as_it_went_in(case: Case) -> None:
    mail = Mail("a@b.example", 9, Body.BINARY_MIME, True, DsnReturn.FULL, "id+2B", True, "<>")
    recipients = [Recipient("x@y.example", Notify.SUCCESS | Notify.DELAY, "rfc822;x+2B@y"), Recipient("Postmaster")]
    new = NewMessage(new_id(), mail, {"up": recipients}, len(HEADER), 60.0, CARRIER)
    before = case.clock()
    await put(case, new)
    (lease,) = await leased(case.store)
    assert lease.mail == mail
    assert [one.recipient for one in lease.recipients] == recipients
    assert (lease.message_id, lease.attempt, lease.carrier, lease.kind) == (new.id, 1, CARRIER, Kind.MAIL)
    assert (lease.header_octets, lease.content.octets) == (len(HEADER), len(HEADER + BODY))
    assert before - 0.001 <= lease.arrived_at <= case.clock() + 0.001
    assert lease.expires_at == pytest.approx(lease.arrived_at + 60, abs=0.002)
    assert await case.store.read(lease.content, 0, 1000) == HEADER + BODY
    assert await case.store.read(lease.content, len(HEADER), 3) == BODY[:3]
    assert await case.store.is_intact(lease.content)


@pytest.mark.parametrize("body", [BODY, b""])
async def test_a_content_that_came_whole_is_claimed_as_it_came(case: Case, body: bytes) -> None:
    draft = case.store.draft()
    assert draft.hold(HEADER, body)
    await case.store.submit(message(), draft, lease=False)
    (((lease, content),), _) = await case.store.claim({"up": 1})
    assert content is not None
    assert b"".join(content) == HEADER + body
    assert await case.store.is_intact(lease.content)
    assert await case.store.read(lease.content, 0, 1000) == HEADER + body


async def test_it_tells_what_it_did_and_how_many_shared_it(case: Case) -> None:
    if isinstance(case.store, MemoryStore):
        return  # which takes no time
    for _ in range(3):
        await queued(case.store)
    large = await queued(case.store, None, HEADER, b"x" * 300_000)
    leases = await leased(case.store)
    assert len(leases) == 4
    (whole,) = (lease.content for lease in leases if lease.message_id == large)
    await case.store.read(whole, 0, 10)
    await asyncio.gather(*(case.store.finish(lease, DELIVERED) for lease in leases))
    told = list(case.store.timings)
    assert {verb for verb, _, _ in told} >= {StoreVerb.SUBMIT, StoreVerb.CLAIM, StoreVerb.READ, StoreVerb.FINISH}
    assert all(seconds >= 0 for _, seconds, _ in told)
    assert sum(items for _, _, items in told) >= 8  # a directory notes who leases what, too
    assert {items for verb, _, items in told if verb in (StoreVerb.CLAIM, StoreVerb.READ)} == {0}


async def test_what_is_attempted_at_once_is_leased_with_its_submission(case: Case) -> None:
    new = message()
    two = NewMessage(new.id, new.mail, {**new.deliveries, "other": [Recipient("z@z.example")]}, len(HEADER), 60.0)
    _, leases = await put(case, two, lease=True)
    assert [(lease.destination, lease.attempt) for lease in leases] == [("up", 1), ("other", 1)]
    assert await leased(case.store) == []
    for lease in leases:
        await case.store.finish(lease, DELIVERED)
    assert await case.store.page("", 10) == []
    assert await case.store.tally() == {"accepted": 2, "delivered": 2}


@pytest.mark.parametrize("octets", [0, 1, 64 * 1024 - len(HEADER), 64 * 1024, 1_000_000])
async def test_contents_of_any_size_are_kept_whole(case: Case, octets: int) -> None:
    body = os.urandom(octets)
    pieces = [body[start : start + 60_000] for start in range(0, octets, 60_000)]
    await queued(case.store, None, HEADER, *pieces)
    ((lease, content),), _ = await case.store.claim({"up": 1})
    assert await case.store.read(lease.content, len(HEADER), octets + 1) == body
    assert await case.store.is_intact(lease.content)
    if content is not None:
        assert (content[0], b"".join(content)) == (HEADER, HEADER + body)  # the header block first
    else:
        assert octets > 10_000, "small contents come with their leases"


async def test_what_was_tried_before_it_came_says_so(case: Case) -> None:
    new = message("a@x.example", "b@x.example", due_in_seconds=60)
    tried = NewMessage(
        new.id, new.mail, new.deliveries, len(HEADER), 600.0, CARRIER,
        retry_in=60.0, attempts=1, last_replies={"b@x.example": "450 busy"}, is_possible_duplicate=True,
    )  # fmt: skip
    await put(case, tried)
    shown = await case.store.show(new.id)
    assert shown.attempts == 1
    assert [(address, last) for address, _, last in shown.recipients] == [
        ("a@x.example", ""),
        ("b@x.example", "450 busy"),
    ]
    case.clock.ahead += 61
    (lease,) = await leased(case.store)
    assert (lease.attempt, lease.is_possible_duplicate) == (2, True)


@pytest.mark.parametrize("octets", [100, 300_000], ids=["in memory", "in a file"])
async def test_who_gives_up_waiting_leaves_a_whole_message_or_none(case: Case, octets: int) -> None:
    body = os.urandom(octets)
    for _ in range(20):
        draft = await written(case.store.draft(), HEADER, body)
        submitting = asyncio.ensure_future(case.store.submit(message(), draft, lease=False))
        await asyncio.sleep(0)
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
    for lease in await leased(case.store, most=100):
        assert await case.store.is_intact(lease.content)
        assert await case.store.read(lease.content, len(HEADER), octets + 1) == body
    assert case.store.refusal() is None


# Leases ----------------------------------------------------------------------------------------------------------


async def test_a_lease_is_given_once_and_its_result_taken_once(case: Case) -> None:
    await queued(case.store)
    (lease,) = await leased(case.store)
    assert await leased(case.store) == []
    await case.store.finish(lease, ())
    (again,) = await leased(case.store)
    assert (again.attempt, again.epoch) == (2, lease.epoch + 1)
    with pytest.raises(StaleLease):
        await case.store.finish(lease, DELIVERED)
    await case.store.finish(again, DELIVERED)
    with pytest.raises(StaleLease):
        await case.store.finish(again, DELIVERED)
    with pytest.raises(StaleLease):
        await case.store.mark_corrupt(again)
    assert await case.store.tally() == {"accepted": 1, "delivered": 1}


async def test_an_attempt_of_nobody_does_not_count(case: Case) -> None:
    await queued(case.store)
    (lease,) = await leased(case.store)
    await case.store.finish(lease, (), counts_attempt=False)
    (again,) = await leased(case.store)
    assert again.attempt == 1


async def test_recipients_end_one_by_one(case: Case) -> None:
    new = message("a@x.example", "b@x.example", "c@x.example")
    await put(case, new)
    (lease,) = await leased(case.store)
    verdicts = [
        Verdict(0, End.DELIVERED, replies.OK),
        Verdict(1, None, replies.UPSTREAM_UNAVAILABLE),
        Verdict(2, End.FAILED, replies.RELAY_DENIED),
    ]
    await case.store.finish(lease, verdicts)
    (again,) = await leased(case.store)
    assert [(one.number, one.recipient.address) for one in again.recipients] == [(1, "b@x.example")]
    assert again.recipients[0].last_reply == str(replies.UPSTREAM_UNAVAILABLE)
    shown = await case.store.show(new.id)
    assert list(shown.recipients) == [("b@x.example", DeliveryState.LEASED, str(replies.UPSTREAM_UNAVAILABLE))]
    await case.store.finish(again, [Verdict(1, End.EXPIRED)])
    assert await case.store.tally() == {"accepted": 3, "delivered": 1, "failed": 1, "expired": 1}


async def test_results_of_one_message_that_come_at_once_are_all_noted(case: Case) -> None:
    new = message("a@x.example")
    destinations = ["up", "other", "third"]
    await put(case, new._replace(deliveries=dict.fromkeys(destinations, new.deliveries["up"])))
    leases = [lease for destination in destinations for lease in await leased(case.store, destination=destination)]
    unreachable = (Verdict(0, None, replies.UPSTREAM_UNAVAILABLE),)
    await asyncio.gather(
        case.store.finish(leases[0], DELIVERED),
        case.store.finish(leases[1], unreachable, retry_in=3600.0),
        case.store.finish(leases[2], DELIVERED),
    )
    shown = await case.store.show(new.id)
    assert list(shown.recipients) == [("a@x.example", DeliveryState.READY, str(replies.UPSTREAM_UNAVAILABLE))]
    assert await case.store.tally() == {"accepted": 3, "delivered": 2}


async def test_an_unknown_outcome_marks_all_later_attempts(case: Case) -> None:
    await queued(case.store)
    (lease,) = await leased(case.store)
    await case.store.finish(lease, (), is_possible_duplicate=True)
    for _ in range(2):
        (lease,) = await leased(case.store)
        assert lease.is_possible_duplicate
        await case.store.finish(lease, ())


async def test_a_result_and_its_notice_are_one_step(case: Case) -> None:
    await queued(case.store)
    (lease,) = await leased(case.store)
    bounce = message("app@example.com", sender="", destination="back", kind=Kind.NOTIFICATION)
    await case.store.finish(lease, [Verdict(0, End.FAILED, replies.RELAY_DENIED)], notices=[(bounce, HEADER + BODY)])
    with pytest.raises(StaleLease):  # then its notice is not stored either
        await case.store.finish(lease, DELIVERED, notices=[(message(destination="back"), HEADER + BODY)])
    assert [shown.id for shown in await case.store.page("", 10)] == [bounce.id]
    ((notice, content),), _ = await case.store.claim({"back": 5})
    assert notice.kind is Kind.NOTIFICATION
    assert content is not None
    assert tuple(content) == (HEADER, BODY)
    await case.store.finish(notice, DELIVERED)
    assert await case.store.tally() == {"accepted": 1, "failed": 1, "notified": 1, "notified_delivered": 1}


async def test_new_mail_and_old_take_turns_and_so_do_senders(case: Case) -> None:
    for _ in range(6):
        await queued(case.store, message(sender="many@x.example"))
    for lease in await leased(case.store, most=6):
        await case.store.finish(lease, ())
    for _ in range(5):
        await queued(case.store, message(sender="busy@x.example"))
    await queued(case.store, message(sender="rare@x.example"))
    chosen = [lease.mail.reverse_path for lease in await leased(case.store, most=4)]
    assert sorted(chosen) == ["busy@x.example", "many@x.example", "many@x.example", "rare@x.example"]


async def test_who_waited_longest_is_first(case: Case) -> None:
    ids = [await queued(case.store) for _ in range(5)]
    chosen = [lease.message_id for lease in await leased(case.store, most=3)]
    assert chosen == ids[:3]


async def test_nothing_is_leased_before_its_time_or_beyond_its_age(case: Case) -> None:
    await queued(case.store, message(due_in_seconds=50))
    late = await queued(case.store, message(max_age_seconds=-1))
    leases, due_in = await case.store.claim({"up": 10})
    assert leases == []
    assert due_in is not None
    (overdue,) = await case.store.end_overdue(10)
    assert (overdue.message_id, overdue.attempt) == (late, 0)
    assert await case.store.end_overdue(10) == []
    await case.store.finish(overdue, [Verdict(0, End.EXPIRED)])
    leases, due_in = await case.store.claim({"up": 10, "elsewhere": 1})
    assert leases == []
    assert due_in == pytest.approx(50, abs=5)
    leases, due_in = await case.store.claim({"elsewhere": 1})
    assert (leases, due_in) == ([], None)
    case.clock.ahead += 51
    assert len(await leased(case.store)) == 1


@pytest.mark.parametrize("is_in_memory", [True, False])
async def test_what_is_too_old_holds_up_nobody(case: Case, is_in_memory: bool) -> None:
    for _ in range(20):
        await queued(case.store, message(max_age_seconds=10))
    one = await queued(case.store)
    case.clock.ahead += 20
    if not is_in_memory:
        await case.store.page("", 1)
    assert [lease.message_id for lease in await leased(case.store, most=1)] == [one]


@pytest.mark.parametrize("is_in_memory", [True, False])
async def test_what_is_too_old_is_not_waited_for(case: Case, is_in_memory: bool) -> None:
    one = await queued(case.store)
    assert await case.store.expire(one)
    if not is_in_memory:
        await case.store.page("", 1)
    assert await case.store.claim({"up": 1}) == ([], None)
    await queued(case.store, message(due_in_seconds=100))
    _, due_in = await case.store.claim({"up": 1})
    assert due_in == pytest.approx(100, abs=5)


async def test_only_what_was_attempted_is_worth_a_warning_and_only_once(case: Case) -> None:
    tried = await queued(case.store)
    (lease,) = await leased(case.store)
    await case.store.finish(lease, (), retry_in=1000)
    await queued(case.store, message(due_in_seconds=1000))  # never attempted
    await queued(case.store, message(sender=""))  # nobody to warn
    await queued(case.store, message(kind=Kind.NOTIFICATION))
    for lease in await leased(case.store):
        await case.store.finish(lease, (), retry_in=1000)
    assert await case.store.unwarned(10, 10) == []
    case.clock.ahead += 11
    assert [lease.message_id for lease in await case.store.unwarned(10, 10)] == [tried]
    warning = message("app@example.com", sender="", destination="back", kind=Kind.NOTIFICATION)
    assert await case.store.warn(tried, [(warning, HEADER + BODY)])
    assert not await case.store.warn(tried, [(message(destination="back"), HEADER + BODY)])
    assert not await case.store.warn(new_id(), ())
    assert await case.store.unwarned(10, 10) == []
    assert [lease.message_id for lease in await leased(case.store, destination="back")] == [warning.id]


async def test_a_damaged_message_is_set_aside(case: Case) -> None:
    one = await queued(case.store)
    (lease,) = await leased(case.store)
    await case.store.mark_corrupt(lease)
    assert await leased(case.store) == []
    assert (await case.store.show(one)).state is DeliveryState.CORRUPT
    assert (await case.store.counts()).corrupt == 1
    assert not await case.store.hold(one)
    assert await case.store.release(one)
    assert len(await leased(case.store)) == 1


async def test_a_damaged_message_does_not_age_until_it_is_released(case: Case) -> None:
    """As one that is held: whoever has put its content right wants it delivered, however long that took."""
    one = await queued(case.store, message(max_age_seconds=100))
    expires_at = (await case.store.show(one)).expires_at
    (lease,) = await leased(case.store)
    await case.store.mark_corrupt(lease)
    case.clock.ahead += 1000
    assert await case.store.end_overdue(10) == []
    assert await case.store.release(one)
    assert (await case.store.show(one)).expires_at == pytest.approx(expires_at + 1000, abs=1)
    assert await case.store.end_overdue(10) == []
    (lease,) = await leased(case.store)
    await case.store.mark_corrupt(lease)
    case.clock.ahead += 1000
    assert await case.store.release(one)
    case.clock.ahead += 110
    assert await leased(case.store) == []
    assert [lease.message_id for lease in await case.store.end_overdue(10)] == [one]


async def test_a_damaged_message_that_an_operator_gives_up_is_ended(case: Case) -> None:
    one = await queued(case.store)
    (lease,) = await leased(case.store)
    await case.store.mark_corrupt(lease)
    assert await case.store.expire(one)
    assert await leased(case.store) == []
    assert [lease.message_id for lease in await case.store.end_overdue(10)] == [one]


async def test_destinations_are_those_that_something_waits_for(case: Case) -> None:
    assert list(await case.store.destinations()) == []
    await queued(case.store, message(destination="a"))
    await queued(case.store, message(destination="b"))
    await queued(case.store, message(destination="c"))
    assert sorted(await case.store.destinations()) == ["a", "b", "c"]
    for known in (["a"], ["b"], ["c"], ["c", "a"], ["b", "nobody's"], ["a", "b", "c"]):
        assert set(await case.store.destinations(known=known)) == {"a", "b", "c"}.difference(known)
    assert list(await case.store.destinations(outcomes=True)) == []
    assert sorted(await case.store.destinations()) == ["a", "b", "c"]


# Ends and beginnings ---------------------------------------------------------------------------------------------


async def test_an_orderly_end_gives_leases_back_uncounted(case: Case) -> None:
    await queued(case.store)
    await leased(case.store)
    await case.store.close()
    case.store = case.again()
    recovery = await case.store.open()
    assert (recovery.messages, recovery.interrupted) == (1, 0)
    (lease,) = await leased(case.store)
    assert (lease.attempt, lease.is_possible_duplicate) == (1, True)


async def test_all_is_there_after_an_orderly_end(case: Case) -> None:
    new = message("a@x.example", "b@x.example")
    await put(case, new)
    (lease,) = await leased(case.store)
    await case.store.finish(
        lease, [Verdict(0, End.DELIVERED), Verdict(1, None, replies.OUTCOME_UNKNOWN)],
        retry_in=30, is_possible_duplicate=True,
    )  # fmt: skip
    held = await queued(case.store)
    assert await case.store.hold(held)
    before = [await case.store.show(one) for one in (new.id, held)]
    tally = await case.store.tally()
    await case.store.close()
    await case.store.close()
    case.store = case.again()
    await case.store.open()
    after = [await case.store.show(one) for one in (new.id, held)]
    assert [_without_content(shown) for shown in after] == [_without_content(shown) for shown in before]
    assert await case.store.read(after[0].content, 0, 1000) == HEADER + BODY
    assert await case.store.tally() == tally
    case.clock.ahead += 31
    (lease,) = await leased(case.store)
    assert (lease.message_id, lease.is_possible_duplicate, lease.attempt) == (new.id, True, 2)


def _without_content(shown: object) -> str:
    return repr(shown)  # a content is where its store says: no part of what it looks like


async def test_a_closed_store_takes_nothing(case: Case) -> None:
    await case.store.close()
    with pytest.raises(SpoolError):
        await queued(case.store)


# Operators -------------------------------------------------------------------------------------------------------


async def test_held_mail_waits_and_does_not_age(case: Case) -> None:
    one = await queued(case.store, message(max_age_seconds=100))
    expires_at = (await case.store.show(one)).expires_at
    assert await case.store.hold(one)
    assert not await case.store.hold(one)
    assert await leased(case.store) == []
    case.clock.ahead += 1000
    assert await case.store.end_overdue(10) == []
    assert await case.store.release(one)
    assert (await case.store.show(one)).expires_at == pytest.approx(expires_at + 1000, abs=1)
    assert not await case.store.release(one)
    assert len(await leased(case.store)) == 1


@pytest.mark.parametrize("is_in_memory", [True, False])
async def test_what_is_attempted_beside_what_is_held_goes_on_and_does_not_age_either(
    case: Case, is_in_memory: bool
) -> None:
    """A message ages as one: a delivery that was attempted while the others were held is neither ended nor let lie."""
    deliveries = {"up": [Recipient("a@x.example")], "back": [Recipient("b@x.example")]}
    new = NewMessage(new_id(), Mail("app@example.com"), deliveries, len(HEADER), 100.0, CARRIER)
    await put(case, new)
    (lease,) = await leased(case.store)
    assert await case.store.hold(new.id)
    await case.store.finish(lease, (), retry_in=500)
    case.clock.ahead += 200
    if not is_in_memory:
        await case.store.page("", 1)
    leases, due_in = await case.store.claim({"up": 1})
    assert not leases
    assert due_in == pytest.approx(300, abs=5)
    case.clock.ahead += 400
    assert await case.store.end_overdue(10) == []
    (lease,) = await leased(case.store)
    assert lease.recipients[0].recipient.address == "a@x.example"
    await case.store.finish(lease, ())
    assert await case.store.release(new.id)
    assert await case.store.end_overdue(10) == []
    case.clock.ahead += 90
    assert len(await leased(case.store, destination="back")) == 1
    case.clock.ahead += 20
    (overdue,) = await case.store.end_overdue(10)
    assert overdue.destination == "up"


async def test_what_is_being_attempted_is_left_alone(case: Case) -> None:
    one = await queued(case.store)
    (lease,) = await leased(case.store)
    assert not await case.store.hold(one)
    assert not await case.store.retry(one)
    assert not await case.store.release(one)
    with pytest.raises(SpoolError, match="is being delivered"):
        await case.store.delete(one)
    await case.store.finish(lease, DELIVERED)


async def test_retry_makes_it_due_now(case: Case) -> None:
    one = await queued(case.store, message(due_in_seconds=1000))
    assert await leased(case.store) == []
    assert await case.store.retry(one)
    assert len(await leased(case.store)) == 1


async def test_what_is_removed_is_counted_with_its_recipients(case: Case) -> None:
    one = await queued(case.store, message("a@x.example", "b@x.example"))
    assert await case.store.delete(one) == 2
    assert await case.store.tally() == {"accepted": 2, "removed": 2}
    assert await case.store.page("", 10) == []


async def test_expired_by_an_operator(case: Case) -> None:
    one, held = await queued(case.store), await queued(case.store)
    assert await case.store.hold(held)
    assert await case.store.expire(one)
    assert await case.store.expire(held)
    assert (await case.store.show(one)).is_forced_to_expire
    assert await leased(case.store) == []
    assert {lease.message_id for lease in await case.store.end_overdue(10)} == {one, held}


@pytest.mark.parametrize("by", ["the attempt", "an operator"])
async def test_a_notice_ages_also_while_it_is_held(case: Case, by: str) -> None:
    """What it tells of does not wait for ever; whoever looks ends it, not only who held it."""
    mail = await queued(case.store, message(max_age_seconds=100))
    notice = await queued(case.store, message(sender="", kind=Kind.BOUNCE, max_age_seconds=100))
    if by == "an operator":
        assert await case.store.hold(mail)
        assert await case.store.hold(notice)
    else:
        for lease in await leased(case.store):
            waits = [Verdict(one.number, None, Reply(550, None, ("no",))) for one in lease.recipients]
            await case.store.finish(lease, waits, hold=True)
    case.clock.ahead += 90
    assert await case.store.end_overdue(10) == []
    assert (await case.store.show(notice)).state is DeliveryState.HELD
    case.clock.ahead += 20
    (lease,) = await case.store.end_overdue(10)
    assert lease.message_id == notice
    await case.store.finish(lease, [Verdict(one.number, End.EXPIRED, None) for one in lease.recipients])
    assert [one.id for one in await case.store.page("", 10)] == [mail]
    assert await case.store.end_overdue(10) == []


async def test_a_notice_that_is_released_is_as_old_as_before(case: Case) -> None:
    notice = await queued(case.store, message(sender="", kind=Kind.BOUNCE, max_age_seconds=100))
    expires_at = (await case.store.show(notice)).expires_at
    assert await case.store.hold(notice)
    case.clock.ahead += 90
    assert await case.store.release(notice)
    assert (await case.store.show(notice)).expires_at == pytest.approx(expires_at, abs=1)
    assert [lease.message_id for lease in await leased(case.store)] == [notice]


async def test_reset_begins_again(case: Case) -> None:
    one = await queued(case.store)
    for _ in range(3):
        (lease,) = await leased(case.store)
        await case.store.finish(lease, ())
    case.clock.ahead += 100
    assert await case.store.warn(one, ())
    assert await case.store.unwarned(10, 10) == []
    assert await case.store.expire(one)
    assert await case.store.reset(one, 500.0)
    shown = await case.store.show(one)
    assert (shown.is_forced_to_expire, shown.attempts) == (False, 0)
    assert shown.expires_at == pytest.approx(case.clock() + 500, abs=5)
    assert await case.store.end_overdue(10) == []
    (lease,) = await leased(case.store)
    assert lease.attempt == 1
    await case.store.finish(lease, (), retry_in=1000)
    assert await case.store.unwarned(10, 10) == [], "its sender was warned of this delay before"


async def test_a_sender_who_was_not_warned_before_a_reset_is_warned_after_it(case: Case) -> None:
    one = await queued(case.store)
    case.clock.ahead += 100
    assert await case.store.reset(one, 500.0)
    (lease,) = await leased(case.store)
    await case.store.finish(lease, (), retry_in=1000)
    assert [lease.message_id for lease in await case.store.unwarned(10, 10)] == [one]


async def test_reset_leaves_a_sender_unwarned_who_is_nobody(case: Case) -> None:
    one = await queued(case.store, message(sender=""))
    await case.store.reset(one, 500.0)
    (lease,) = await leased(case.store)
    await case.store.finish(lease, (), retry_in=1000)
    case.clock.ahead += 11
    assert await case.store.unwarned(10, 10) == []


@pytest.mark.parametrize("verb", ["show", "retry", "hold", "release", "expire", "delete"])
async def test_there_is_no_such_message(case: Case, verb: str) -> None:
    with pytest.raises(NoSuchMessage):
        await getattr(case.store, verb)(new_id())
    with pytest.raises(NoSuchMessage):
        await case.store.reset(new_id(), 1.0)


async def test_pages_follow_the_order_of_arrival(case: Case) -> None:
    ids = [await queued(case.store) for _ in range(5)]
    first = await case.store.page("", 2)
    rest = await case.store.page(first[-1].id, 10)
    assert [shown.id for shown in [*first, *rest]] == ids
    assert await case.store.page(ids[-1], 10) == []


async def test_a_message_is_found_by_what_people_know_of_it(case: Case) -> None:
    one = await queued(case.store, message("ann@x.example", "bob@x.example", sender="app@y.example"))
    other = await queued(case.store, message("bob@x.example", sender="cron@y.example"))
    find = case.store.find
    assert [shown.id for shown in await find(recipient="bob@x.example", most=9)] == [one, other]
    assert [shown.id for shown in await find(recipient="bob@x.example", most=1)] == [one]
    assert [shown.id for shown in await find(recipient="bob@x.example", sender="cron@y.example", most=9)] == [other]
    assert [shown.id for shown in await find(trace_id=TRACE_ID, most=9)] == [one, other]
    assert await find(trace_id="0" * 32, most=9) == []
    assert await find(recipient="ob@x.example", most=9) == []


async def test_counts(case: Case) -> None:
    assert (await case.store.counts()).total == 0
    await queued(case.store)
    await leased(case.store)
    await queued(case.store)
    await queued(case.store, message(due_in_seconds=100))
    held = await queued(case.store)
    await case.store.hold(held)
    counts = await case.store.counts()
    assert counts.by_state() == {"ready": 1, "deferred": 1, "active": 1, "held": 1, "corrupt": 0}
    assert counts.oldest_arrived_at == pytest.approx(case.clock(), abs=5)
    assert counts.next_due_at == pytest.approx(case.clock() + 100, abs=5)


# Outcomes for the application --------------------------------------------------------------------------------------

APPLICATION = f"{OUTCOME_PREFIX}app"


def outcome(*, max_age_seconds: float = 1000.0) -> NewMessage:
    return message(
        sender="", destination=APPLICATION, kind=Kind.OUTCOME, header_octets=0, max_age_seconds=max_age_seconds
    )


async def test_an_outcome_is_stored_with_the_end_that_it_tells_of(case: Case) -> None:
    _, (lease,) = await put(case, lease=True)
    told = outcome()
    await case.store.finish(lease, DELIVERED, notices=[(told, b"{}")])
    with pytest.raises(StaleLease):
        await case.store.finish(lease, DELIVERED, notices=[(outcome(), b"{}")])
    ((claimed, content),), _ = await case.store.claim({APPLICATION: 5})
    assert (claimed.message_id, claimed.kind, claimed.destination) == (told.id, Kind.OUTCOME, APPLICATION)
    assert content is not None
    assert b"".join(content) == b"{}"
    await case.store.finish(claimed, (Verdict(0, None, replies.UPSTREAM_UNAVAILABLE),), retry_in=100)
    assert await leased(case.store, destination=APPLICATION) == []
    case.clock.ahead += 101
    (claimed,) = await leased(case.store, destination=APPLICATION)
    assert claimed.attempt == 2
    await case.store.finish(claimed, DELIVERED)
    assert await case.store.tally() == {"accepted": 1, "delivered": 1, "outcomes": 1, "outcomes_delivered": 1}
    assert await case.store.backlog([APPLICATION]) == {APPLICATION: Backlog()}


async def test_an_outcome_that_an_operator_holds_waits_for_nobody(case: Case) -> None:
    told = await queued(case.store, outcome())
    other = await queued(case.store, outcome())
    assert await case.store.hold(told)
    for _ in range(2):
        assert (await case.store.backlog([APPLICATION]))[APPLICATION].pending == 1
        await case.store.close()
        case.store = case.again()
        await case.store.open()
    (lease,) = await leased(case.store, destination=APPLICATION)
    await case.store.finish(lease, DELIVERED)
    assert lease.message_id == other
    for _ in range(2):
        assert await case.store.backlog([APPLICATION]) == {APPLICATION: Backlog()}
        await case.store.page("", 9, outcomes=True)  # writes the index, where there is one
    assert await case.store.release(told)
    for _ in range(2):
        backlog = (await case.store.backlog([APPLICATION]))[APPLICATION]
        assert backlog.pending == 1
        assert backlog.oldest_arrived_at == pytest.approx(case.clock(), abs=30)
        await case.store.page("", 9, outcomes=True)


async def test_outcomes_are_no_mail(case: Case) -> None:
    one = await queued(case.store)
    told = await queued(case.store, outcome())
    for _ in range(2):
        assert [shown.id for shown in await case.store.page("", 9)] == [one]
        assert [shown.id for shown in await case.store.page("", 9, outcomes=True)] == [told]
        for _ in range(2):  # those of the other kind may be passed over from then on
            assert list(await case.store.destinations()) == ["up"]
            assert list(await case.store.destinations(outcomes=True)) == [APPLICATION]
        assert [shown.id for shown in await case.store.find(recipient="user@example.net", most=9)] == [one]
        assert (await case.store.counts()).by_state() == {
            "ready": 1, "deferred": 0, "active": 0, "held": 0, "corrupt": 0,
        }  # fmt: skip
        backlog = (await case.store.backlog([APPLICATION, "notify other"]))[APPLICATION]
        assert backlog.pending == 1
        assert backlog.oldest_arrived_at == pytest.approx(case.clock(), abs=5)
        await case.store.close()
        case.store = case.again()
        assert (await case.store.open()).messages in (0, 1)
    assert (await case.store.show(told)).kind is Kind.OUTCOME
    assert await case.store.delete(told) == 1
    assert (await case.store.tally())["outcomes_removed"] == 1
    assert await case.store.backlog([APPLICATION]) == {APPLICATION: Backlog()}


async def test_old_outcomes_and_old_mail_are_ended_apart(case: Case) -> None:
    told = await queued(case.store, outcome(max_age_seconds=-1))
    late = await queued(case.store, message(max_age_seconds=-1))
    assert [lease.message_id for lease in await case.store.end_overdue(10)] == [late]
    (lease,) = await case.store.end_overdue(10, outcomes=True)
    assert lease.message_id == told
    await case.store.finish(lease, [Verdict(0, End.EXPIRED)])
    assert (await case.store.tally())["outcomes_expired"] == 1


# Time ------------------------------------------------------------------------------------------------------------


# A server's clock is corrected by its own means; one that falls back by as much after a failover delays by as much.
@pytest.mark.parametrize("case", ["embedded", "memory"], indirect=True)
async def test_a_clock_that_is_set_back_makes_nothing_wait_longer(case: Case) -> None:
    await queued(case.store, message(due_in_seconds=60))
    far = await queued(case.store, message(due_in_seconds=172_800))
    case.clock.ahead -= 86400
    await case.store.housekeep()
    _, due_in = await case.store.claim({"up": 10})
    assert due_in == pytest.approx(60, abs=5)
    assert (await case.store.show(far)).next_attempt_at == pytest.approx(case.clock() + 172_800, abs=5)


async def test_what_waits_for_days_waits_for_days_after_a_restart(case: Case) -> None:
    far = await queued(case.store, message(due_in_seconds=172_800))
    due_at = (await case.store.show(far)).next_attempt_at
    await case.store.close()
    case.store = case.again()
    await case.store.open()
    await case.store.housekeep()
    assert (await case.store.show(far)).next_attempt_at == pytest.approx(due_at, abs=0.01)
