"""Who gets a connection where not everybody can; clock and connections are made up here."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from otel_smtp.server.places import (
    LEAST_CONNECTIONS,
    LINE_PART,
    LINE_SECONDS,
    RIPE_AGE_SECONDS,
    RIPE_SECONDS,
    Admittance,
    Places,
    Standing,
)
from tests.support.examples import scaled

MOST = 32


@dataclass(eq=False)
class Connection:
    share: str = "app"
    is_local: bool = True
    standing: Standing = Standing.IDLE
    has_moved_mail: bool = False
    opened: float = 0.0
    spoke: float = 0.0

    def idle_seconds(self, now: float) -> float:
        return now - self.spoke

    def age_seconds(self, now: float) -> float:
        return now - self.opened


class Full:
    """A gateway whose places are all taken, by `held`."""

    def __init__(self, *held: Connection, most: int | None = None) -> None:
        self.held = list(held)
        self.places: Places[Connection] = Places(len(held) if most is None else most)
        for connection in held:
            self.places.add(connection.share)

    def judge(self, newcomer: Connection, now: float = 0, *, before: int = 0) -> Connection | Admittance:
        return self.places.judge(newcomer, self.held, before, now)

    def add(self, connection: Connection) -> None:
        self.held.append(connection)
        self.places.add(connection.share)

    def remove(self, connection: Connection) -> None:
        self.held.remove(connection)
        self.places.remove(connection.share)


def crowd(share: str = "app", amount: int = MOST, **more: object) -> list[Connection]:
    return [Connection(share, **more) for _ in range(amount)]  # type: ignore[arg-type]


def test_while_there_are_places_nobody_asks_whose_they_are() -> None:
    full = Full(*crowd(amount=31), most=MOST)
    assert full.judge(Connection()) is Admittance.ADMIT
    assert not full.places.are_scarce(15)
    assert full.places.are_scarce(16)


def test_a_newcomer_that_has_none_gets_a_place_of_the_largest_share_at_once() -> None:
    full = Full(*(held := crowd(amount=20)), *crowd("other", 12))
    held[7].spoke = -1
    assert full.judge(Connection("new")) is held[7]


def test_a_share_keeps_its_part() -> None:
    small, large = crowd("small", 15), crowd("large", 17)
    full = Full(*small, *large)
    assert full.judge(Connection("large")) is Admittance.REFUSE
    assert full.judge(Connection("small")) in large
    full.remove(large[0])
    full.add(Connection("small"))  # now they have the same
    assert full.judge(Connection("small")) is Admittance.REFUSE


def test_the_one_least_missed_gives_way() -> None:
    sends = Connection(standing=Standing.CONTENT)
    opened = Connection(standing=Standing.OPEN)
    has_moved = Connection(has_moved_mail=True)
    idle = Connection(spoke=-5)
    held = [Connection(standing=Standing.OURS), sends, opened, has_moved, idle]
    for gives_way in (idle, has_moved, opened, sends):
        assert Full(*held).judge(Connection("new")) is gives_way
        held.remove(gives_way)
    assert Full(*held, *crowd(standing=Standing.OURS)).judge(Connection("new")) is Admittance.REFUSE


def test_clients_elsewhere_take_no_place_of_this_machine() -> None:
    elsewhere = Connection("address 192.0.2.1", is_local=False)
    assert Full(*crowd()).judge(elsewhere, 99) is Admittance.REFUSE
    other = Full(*crowd("address 192.0.2.2", is_local=False))
    assert other.judge(elsewhere) in other.held
    assert other.judge(Connection()) in other.held


def test_from_a_balancer_that_has_not_said_for_whom_nobody_takes_a_place() -> None:
    assert Full(*crowd("x", is_local=False)).judge(Connection("", is_local=False), 99) is Admittance.REFUSE


def test_of_the_same_share_one_that_does_nothing_gives_way_and_not_at_once() -> None:
    full = Full(*(held := crowd()))
    held[3].spoke = -0.1
    assert full.judge(Connection(), 0.8) is Admittance.REFUSE
    assert full.judge(Connection(), RIPE_SECONDS) is held[3]


@pytest.mark.parametrize(
    ("connection", "gives_way"),
    [
        (Connection(), True),
        (Connection(standing=Standing.OPEN), True),
        (Connection(spoke=RIPE_AGE_SECONDS), True),  # says something all the time, and moves no mail
        (Connection(has_moved_mail=True), False),
        (Connection(standing=Standing.CONTENT), False),
        (Connection(standing=Standing.OURS), False),
        (Connection(is_local=False), False),
    ],
)
def test_what_does_nothing(connection: Connection, gives_way: bool) -> None:
    full = Full(*crowd("app", MOST - 1, has_moved_mail=True), connection)
    assert full.judge(Connection(), RIPE_AGE_SECONDS) is (connection if gives_way else Admittance.REFUSE)


@pytest.mark.parametrize("doing", [Standing.CONTENT, Standing.OURS])
def test_one_is_found_as_soon_as_it_does_nothing(doing: Standing) -> None:
    idler = Connection(standing=doing)
    full = Full(*crowd("app", MOST - 1, has_moved_mail=True), idler)
    assert full.judge(Connection(), 5) is Admittance.REFUSE
    idler.standing, idler.spoke = Standing.IDLE, 5
    assert full.judge(Connection(), 5 + RIPE_SECONDS) is idler


def test_where_few_are_allowed_each_counts() -> None:
    full = Full(*crowd(amount=LEAST_CONNECTIONS - 1))
    assert full.judge(Connection(), 99) is Admittance.REFUSE
    assert full.judge(Connection("new"), 99) in full.held
    assert full.places.most_in_line == 0


def test_newcomers_wait_in_line_once_one_had_to_give_way() -> None:
    full = Full(*crowd())
    assert full.judge(Connection(), RIPE_SECONDS) is full.held[0]
    for connection in full.held:
        connection.spoke = RIPE_SECONDS
    assert full.judge(Connection(), RIPE_SECONDS) is Admittance.WAIT
    assert full.judge(Connection(), RIPE_SECONDS, before=MOST // LINE_PART) is Admittance.REFUSE
    assert full.judge(Connection(), 2 * RIPE_SECONDS, before=1) is Admittance.WAIT
    last = full.held[-1]
    full.remove(last)
    assert full.judge(Connection(), RIPE_SECONDS, before=1) is Admittance.WAIT  # nobody overtakes
    assert full.judge(Connection(), RIPE_SECONDS) is Admittance.ADMIT
    full.add(last)
    for connection in full.held:
        connection.has_moved_mail = True
    assert full.judge(Connection(), RIPE_SECONDS + LINE_SECONDS) is Admittance.REFUSE


class AnyOrder(RuleBasedStateMachine):
    """Whichever clients come and go: none keeps more than its part of the places from others."""

    def __init__(self) -> None:
        super().__init__()
        self.gateway = Full(most=MOST)
        self.now = 0.0

    @rule(
        share=st.sampled_from(["a", "b", "c"]),
        amount=st.integers(1, MOST),
        standing=st.sampled_from(Standing),
        has_moved_mail=st.booleans(),
    )
    def come(self, share: str, amount: int, standing: Standing, has_moved_mail: bool) -> None:
        held = self.gateway.held
        for _ in range(amount):
            newcomer = Connection(share, True, standing, has_moved_mail, self.now, self.now)
            judged = self.gateway.judge(newcomer, self.now)
            sizes = {one: sum(other.share == one for other in held) for one in "abc"}
            if isinstance(judged, Connection):
                assert judged.standing is not Standing.OURS
                assert sizes[judged.share] > sizes[share] + 1 or not judged.has_moved_mail
                self.gateway.remove(judged)
            elif judged is Admittance.REFUSE:
                others = [one for one in held if sizes[one.share] > sizes[share] + 1]
                assert all(one.standing is Standing.OURS for one in others)
            if isinstance(judged, Connection) or judged is Admittance.ADMIT:
                self.gateway.add(newcomer)

    @precondition(lambda self: self.gateway.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        self.gateway.remove(data.draw(st.sampled_from(self.gateway.held)))

    @rule(seconds=st.floats(0, 20))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def no_more_are_open_than_allowed(self) -> None:
        assert len(self.gateway.held) <= MOST


AnyOrder.TestCase.settings = settings(max_examples=scaled(50), stateful_step_count=30)
TestAnyOrder = AnyOrder.TestCase
