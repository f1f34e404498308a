"""Limits that gateways keep together in their database."""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from otel_smtp.forwarding.base import Claim, Grant
from otel_smtp.forwarding.global_limits import GlobalLimit
from otel_smtp.forwarding.limits import LimitSettings, Permit
from otel_smtp.forwarding.pace import Pace, WaitingMail
from otel_smtp.spool.postgresql import PostgresqlStore, QueueLocation
from otel_smtp.spool.postgresql.beats import PERMITS_SECONDS
from otel_smtp.spool.postgresql.statements import Statements
from tests.forwarding.test_limits import most_in_a_window
from tests.spool.postgresql.schemas import new_place, store
from tests.support.postgresql import connected, server
from tests.support.waiting import until


@dataclass
class Gateway:
    """What one gateway has, as it tells the database."""

    id: uuid.UUID
    turn: int = 0
    in_flight: list[int] = field(default_factory=list)
    landed: int = 0
    unused: int = 0


class Database:
    """A queue whose clock the test moves."""

    def __init__(self, place: QueueLocation, connection: Any, count: int, period: float, burst: int) -> None:
        self.statements = Statements(place.schema)
        self.place = place
        self.connection = connection
        self.limit = ("l", count, period, burst, "messages")
        self.now = 1_800_000_000.0

    async def gateway(self) -> Gateway:
        one = Gateway(uuid.uuid4())
        await self.connection.execute(
            f"INSERT INTO {self.place.schema}.gateway VALUES ($1, 'g', '0', now(), 'infinity')",
            one.id,
        )
        return one

    async def to(self, now: float) -> None:
        self.now = now
        await self.connection.execute(f"SET test.clock = '{now!r}'")

    async def settle(self, one: Gateway, least: int = 0, wanted: int = 0, rest: float = 0.0) -> Any:
        """Tell all that there is to tell."""
        one.turn += 1
        row = await self.connection.fetchrow(
            self.statements.settle, one.id, one.turn, *self.limit,
            sum(one.in_flight), one.landed, one.unused, least, max(least, wanted), rest,
        )  # fmt: skip
        one.landed = one.unused = 0
        if row["granted"]:
            one.in_flight.append(row["granted"])
        return row


@asynccontextmanager
async def database(count: int, period: float, burst: int = 1) -> AsyncIterator[Database]:
    place = await new_place()
    server().do(
        f"CREATE SCHEMA {place.schema}_clock",
        f"CREATE FUNCTION {place.schema}_clock.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS "
        "$$ SELECT to_timestamp(current_setting('test.clock')::float8) $$",
    )
    async with connected(server().url(search_path=f"{place.schema}_clock,pg_catalog")) as connection:
        made = Database(place, connection, count, period, burst)
        await made.to(made.now)
        yield made


async def test_without_a_burst_what_leaves_is_spread_evenly() -> None:
    async with database(30, 60.0) as kept:
        first, second = await kept.gateway(), await kept.gateway()
        assert (await kept.settle(first, 1, 5))["granted"] == 1
        row = await kept.settle(second, 1)
        assert row["granted"] == 0
        assert row["wait"] == pytest.approx(2.0, abs=1e-3)
        await kept.to(kept.now + 2.0)
        assert (await kept.settle(second, 1))["granted"] == 1


@pytest.mark.parametrize(("count", "period", "burst"), [(9, 1.0, 9), (30, 60.0, 10), (12, 86400.0, 3)])
async def test_no_window_ever_has_more(count: int, period: float, burst: int) -> None:
    chance = random.Random(count)
    async with database(count, period, burst) as kept:
        gateways = [await kept.gateway() for _ in range(2)]
        landed: list[tuple[float, int]] = []
        for _ in range(500):
            one = chance.choice(gateways)
            step = chance.random()
            if step < 0.5:
                await kept.settle(one, least := chance.choice([1, 1, 1, 3]), least + chance.randrange(4))
            elif one.in_flight:
                permits = one.in_flight.pop(chance.randrange(len(one.in_flight)))
                if step < 0.9:
                    one.landed += permits
                    landed.append((kept.now, permits))
                else:
                    one.unused += permits
            if chance.random() < 0.2:
                await kept.settle(one)
            await kept.to(kept.now + chance.expovariate(3 * count / period))
            in_window = sum(amount for at, amount in landed if at > kept.now - period)
            assert in_window + sum(sum(gateway.in_flight) for gateway in gateways) <= count
        assert most_in_a_window(landed, period) <= count
        assert sum(amount for _, amount in landed) > count  # and it was used


async def test_all_of_the_rate_is_used_but_for_a_hundredth() -> None:
    async with database(100, 10.0, 20) as kept:
        one = await kept.gateway()
        taken, began = 0, kept.now
        while kept.now < began + 30.0:
            row = await kept.settle(one, 1, 100)
            taken += row["granted"]
            one.landed, one.in_flight = sum(one.in_flight), []
            await kept.settle(one)
            await kept.to(kept.now + max(row["wait"], 0.1))
        assert taken >= 290


async def test_what_was_not_used_is_given_back() -> None:
    async with database(4, 60.0, 4) as kept:
        first, second = await kept.gateway(), await kept.gateway()
        assert (await kept.settle(first, 1, 4))["granted"] == 4
        assert (await kept.settle(second, 1))["granted"] == 0
        first.in_flight, first.unused = [], 4
        await kept.settle(first)
        assert (await kept.settle(second, 4))["granted"] == 4


async def test_a_call_that_comes_late_undoes_nothing() -> None:
    async with database(10, 60.0, 10) as kept:
        one = await kept.gateway()
        await kept.settle(one, 1)
        one.turn -= 1
        assert (await kept.settle(one, 1))["granted"] is None
        row = await kept.connection.fetchrow(f"SELECT amount FROM {kept.place.schema}.permit")
        assert row["amount"] == 1


async def test_an_answer_that_was_lost_costs_nothing_in_the_end() -> None:
    async with database(10, 60.0, 10) as kept:
        one = await kept.gateway()
        assert (await kept.settle(one, 10))["granted"] == 10
        one.in_flight = []  # it was never heard of
        one.unused = 0
        await kept.to(kept.now + 60.0)
        assert (await kept.settle(one, 10))["granted"] == 10


async def test_who_was_declared_dead_gets_nothing_and_its_permits_leave_the_window() -> None:
    async with database(4, 10.0, 4) as kept:
        first, second = await kept.gateway(), await kept.gateway()
        assert (await kept.settle(first, 3))["granted"] == 3
        await kept.connection.execute(f"DELETE FROM {kept.place.schema}.gateway WHERE id = $1", first.id)
        await kept.connection.execute(kept.statements.land_permits, [first.id], PERMITS_SECONDS)
        assert (await kept.settle(first, 1))["granted"] is None
        await kept.to(kept.now + 10.0)
        assert (await kept.settle(second, 2))["granted"] == 0
        await kept.to(kept.now + PERMITS_SECONDS)
        assert (await kept.settle(second, 2))["granted"] == 0
        await kept.to(kept.now + 10.2)
        assert (await kept.settle(second, 4))["granted"] == 4


async def test_all_rest_when_one_is_told_to() -> None:
    async with database(100, 1.0, 100) as kept:
        first, second = await kept.gateway(), await kept.gateway()
        await kept.settle(first, 1)
        assert (await kept.settle(first, rest=30.0))["granted"] == 0
        row = await kept.settle(second, 1)
        assert row["granted"] == 0
        assert row["wait"] == pytest.approx(30.0, abs=1e-3)
        await kept.to(kept.now + 30.001)
        assert (await kept.settle(second, 1))["granted"] == 1


async def test_a_clock_that_is_set_back_holds_nobody_up_for_longer_than_the_period() -> None:
    async with database(60, 60.0) as kept:
        one = await kept.gateway()
        await kept.settle(one, 1)
        one.in_flight, one.unused = [], 0
        await kept.to(kept.now - 3600.0)
        assert (await kept.settle(one, 1))["wait"] <= 60.0


# Whole gateways -------------------------------------------------------------------------------------------------


class Sender:
    """Sends mails of one gateway: each is with the provider for a moment, and is answered."""

    def __init__(self, kept: PostgresqlStore, settings: LimitSettings) -> None:
        self.limit = GlobalLimit(settings, kept.ledger)
        self.pace = Pace([self.limit])
        self.answered: list[float] = []
        self._chance = random.Random(1)

    def mail(self) -> None:
        waiting: WaitingMail | None = None

        def decided(is_given: bool) -> None:
            assert is_given
            assert waiting is not None
            asyncio.get_running_loop().call_later(self._chance.random() * 0.05, self._answer, waiting)

        waiting = self.pace.ask(1, float("inf"), decided, with_message=True)
        assert waiting is not None
        if not waiting.is_waiting:
            decided(True)

    def _answer(self, waiting: WaitingMail) -> None:
        self.answered.append(time.monotonic())
        self.pace.landed(waiting)


async def opened(place: QueueLocation, name: str) -> PostgresqlStore:
    one = store(place, name)
    await one.open()
    return one


@pytest.mark.long
async def test_two_gateways_keep_a_limit_together_also_when_their_connections_break() -> None:
    place = await new_place()
    stores = [await opened(place, name) for name in ("first", "second")]
    senders = [Sender(one, LimitSettings("l", 25, 0.5, 10)) for one in stores]
    for sender in senders:
        for _ in range(60):
            sender.mail()
    for _ in range(3):
        await until(lambda: sum(len(sender.answered) for sender in senders) >= 30)
        server().do(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'otel-smtp limits'"
        )
    await until(lambda: all(len(sender.answered) == 60 for sender in senders), timeout_seconds=60)
    times = sorted(at for sender in senders for at in sender.answered)
    assert most_in_a_window([(at, 1) for at in times], 0.5) <= 25
    (row,) = await stores[0].limits()
    assert (row["name"], row["most"], row["burst"], row["per"]) == ("l", 25, 10, "messages")
    for one in stores:
        await one.close()


async def test_what_a_provider_tells_one_gateway_holds_for_the_other() -> None:
    place = await new_place()
    first, second = [await opened(place, name) for name in ("first", "second")]
    senders = [Sender(one, LimitSettings("l", 100, 1.0, 100)) for one in (first, second)]
    for sender in senders:
        sender.mail()
    await until(lambda: all(sender.answered for sender in senders))
    limit = senders[0].limit
    limit.rest(1.5, time.monotonic())
    await limit.wait_reported()
    rested_at = time.monotonic()
    (row,) = await second.limits()
    assert 0 < row["rests_for"] <= 1.5
    for sender in senders:
        sender.mail()
    await until(lambda: all(len(sender.answered) == 2 for sender in senders))
    for sender in senders:
        assert sender.answered[-1] - rested_at > 1.0
    assert (await second.limits())[0]["rests_for"] == 0
    await first.close()
    await second.close()


async def test_during_a_rest_nothing_is_given_that_was_in_stock() -> None:
    ledger = AwayLedger()
    limit = GlobalLimit(LimitSettings("l", 10, 60.0, 10), ledger)
    pace = Pace([limit])
    given: list[bool] = []
    mail = pace.ask(1, 60.0, given.append, with_message=True)
    assert mail is not None
    await until(lambda: given == [True])
    pace.give_back(mail)
    now = time.monotonic()
    limit.rest(30.0, now)
    assert limit.take(1, now) == pytest.approx(30.0)
    assert limit.available(now) == 0
    assert isinstance(limit.take(1, now + 30.0), Permit)


async def test_operators_see_which_gateway_holds_what() -> None:
    place = await new_place()
    one = await opened(place, "first")
    limit = GlobalLimit(LimitSettings("l", 5, 60.0, 5), one.ledger)
    pace = Pace([limit])
    given: list[bool] = []
    leave = pace.ask(1, 10.0, given.append, with_message=True)
    assert leave is not None
    await until(lambda: given == [True])
    (row,) = await one.limits()
    assert row["gateways"] == {"first": 1}
    assert (row["in_flight"], row["used"]) == (1, 0)
    pace.landed(leave)
    peer = store(place, "peer")
    await peer.open()

    await limit.wait_reported()
    (row,) = await peer.limits()
    assert (row["in_flight"], row["used"], row["gateways"]) == (0, 1, {})
    await one.close()
    await peer.close()


async def test_without_its_database_nobody_is_given_leave() -> None:
    place = await new_place()
    one = await opened(place, "first")
    limit = GlobalLimit(LimitSettings("l", 5, 60.0, 5), one.ledger)
    await one.close()
    pace = Pace([limit])
    given: list[bool] = []
    assert pace.ask(1, 0.0, given.append, with_message=True) is not None
    await until(lambda: given == [False])


class AwayLedger:
    """A database that tests take away."""

    def __init__(self) -> None:
        self.incarnation: object | None = 1
        self.claims: list[Claim] = []
        self.answer: Grant | None = Grant(1, 0.0, 0)

    def term(self) -> object | None:
        return self.incarnation

    async def settle(self, claim: Claim) -> Grant | None:
        self.claims.append(claim)
        return self.answer


async def test_what_is_in_stock_is_void_after_a_death_and_what_is_in_flight_counts_again() -> None:
    ledger = AwayLedger()
    limit = GlobalLimit(LimitSettings("l", 10, 60.0, 10), ledger)
    pace = Pace([limit])
    given: list[bool] = []
    first = pace.ask(1, 60.0, given.append, with_message=True)
    await until(lambda: given == [True])
    stocked = limit.take(1, time.monotonic())
    assert isinstance(stocked, float)
    assert first is not None
    second = pace.ask(1, 60.0, given.append, with_message=True)
    assert second is not None
    await until(lambda: given == [True, True])
    limit.give_back(second.permits.pop()[1])
    ledger.incarnation = 2
    assert not isinstance(limit.take(1, time.monotonic()), Permit)
    pace.ask(1, 60.0, given.append, with_message=True)
    await until(lambda: len(given) == 3)
    assert ledger.claims[-1].in_flight == 1
