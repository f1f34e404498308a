"""The store in PostgreSQL against the one in memory: the same verbs, the same answers, as time passes and it restarts.

Both have real clocks, of two processes, that a test only puts forward: by so much more than any run takes that what is
due, and what is too old, never hangs on an instant.
"""

import asyncio
import itertools
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, Final, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from otel_smtp.smtp import replies
from otel_smtp.spool.messages import (
    OUTCOME_PREFIX,
    End,
    Kind,
    Lease,
    MessageView,
    NewMessage,
    SpoolError,
    Verdict,
)
from otel_smtp.spool.store import Store
from tests.spool.memory_store import MemoryStore
from tests.spool.messages import BODY, HEADER, message, written
from tests.spool.stores import Clock, in_database
from tests.support.examples import scaled

T = TypeVar("T")

APPLICATION: Final = f"{OUTCOME_PREFIX}app"
WANTED: Final = {"up": 1000, "back": 1000, APPLICATION: 1000}  # all that is due: which is first, each store says
MAX_AGE_SECONDS: Final = 100_000.0
# No sum of these is near to a wait or an age.
PASSING: Final = st.sampled_from([1_700.0, 7_300.0, 45_000.0])
WAITS: Final = st.sampled_from([0.0, 3_600.0])
VERBS: Final = st.sampled_from(["retry", "hold", "release", "expire", "delete"])
ENDS: Final = st.sampled_from([End.DELIVERED, End.FAILED, None])
_numbers = itertools.count()


class Agreement(RuleBasedStateMachine):
    """Both stores, clocks that go alike, the same ids."""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._ids: list[str] = []
        self._leases: dict[tuple[str, str], tuple[Lease, Lease]] = {}

    def _do(self, work: Awaitable[T]) -> T:
        async def do() -> T:
            return await work

        return self._runner.run(do())

    @initialize()
    def begin(self) -> None:
        self._clock = Clock()
        self._path = Path(tempfile.gettempdir()) / f"no directory, a name {next(_numbers)}"
        self._store = in_database(self._path, self._clock)
        self._model = MemoryStore(clock=self._clock)
        for store in self._both:
            self._do(store.open())

    @property
    def _both(self) -> tuple[Store, Store]:
        return self._store, self._model

    def _note(self, ours: list[Lease], theirs: list[Lease]) -> None:
        """Both have given the same leases."""
        by_name = {(one.message_id, one.destination): one for one in theirs}
        assert sorted(map(plain, ours)) == sorted(map(plain, theirs))
        for lease in ours:
            name = lease.message_id, lease.destination
            self._leases[name] = lease, by_name[name]

    @rule(
        recipients=st.integers(1, 3),
        is_leased=st.booleans(),
        wait=WAITS,
        octets=st.sampled_from([10, 70_000]),
        is_divided=st.booleans(),
        was_tried=st.booleans(),
    )
    def submit(
        self, recipients: int, is_leased: bool, wait: float, octets: int, is_divided: bool, was_tried: bool
    ) -> None:
        addresses = [f"user{number}@example.net" for number in range(recipients)]
        due_in = 0.0 if is_leased else wait  # what is attempted at once does not wait first
        new = message(*addresses, due_in_seconds=due_in, max_age_seconds=MAX_AGE_SECONDS)
        if is_divided:
            new = new._replace(deliveries={**new.deliveries, "back": new.deliveries["up"]})
        if was_tried:
            new = new._replace(attempts=1, is_possible_duplicate=True, last_replies={addresses[0]: "451 later"})
        body = b"\r\n" + b"x" * octets

        async def submit(store: Store) -> list[Lease]:
            return list(await store.submit(new, await written(store.draft(), HEADER, body), lease=is_leased))

        ours, theirs = (self._do(submit(store)) for store in self._both)
        self._note(ours, theirs)
        self._ids.append(new.id)

    @rule()
    def claim(self) -> None:
        (ours, ours_due), (theirs, theirs_due) = (self._do(store.claim(WANTED)) for store in self._both)
        if not ours:  # else the runner asks again at once
            assert is_near(ours_due, theirs_due)
        self._note([lease for lease, _ in ours], [lease for lease, _ in theirs])

    @precondition(lambda self: self._leases)
    @rule(
        data=st.data(),
        end=ENDS,
        wait=WAITS,
        unknown=st.booleans(),
        counts=st.booleans(),
        hold=st.booleans(),
        reports=st.booleans(),
    )
    def finish(
        self, data: st.DataObject, end: End | None, wait: float, unknown: bool, counts: bool, hold: bool, reports: bool
    ) -> None:
        name = data.draw(st.sampled_from(sorted(self._leases)))
        ours, theirs = self._leases[name]
        verdicts = [Verdict(one.number, end if one.number else End.DELIVERED, replies.OK) for one in ours.recipients]
        if len(verdicts) == 1:
            verdicts = [Verdict(verdicts[0].number, end, replies.UPSTREAM_UNAVAILABLE)]
        notices: list[tuple[NewMessage, bytes]] = []
        if reports:
            bounce = message("a@x.example", sender="", destination="back", kind=Kind.NOTIFICATION)
            told = message(sender="", destination=APPLICATION, kind=Kind.OUTCOME, max_age_seconds=MAX_AGE_SECONDS)
            notices = [(bounce, HEADER + BODY), (told, HEADER + BODY)]
        how: dict[str, Any] = {
            "retry_in": wait,
            "is_possible_duplicate": unknown,
            "counts_attempt": counts,
            "hold": hold,
            "notices": notices,
        }

        async def finish(store: Store, lease: Lease) -> None:
            await store.finish(lease, verdicts, **how)

        outcome = self._same(finish(self._store, ours), finish(self._model, theirs))
        if outcome == "answer":
            self._ids += [notice.id for notice, _ in notices]

    @precondition(lambda self: self._leases)
    @rule(data=st.data())
    def mark_corrupt(self, data: st.DataObject) -> None:
        ours, theirs = self._leases[data.draw(st.sampled_from(sorted(self._leases)))]
        self._same(self._store.mark_corrupt(ours), self._model.mark_corrupt(theirs))

    @precondition(lambda self: self._ids)
    @rule(data=st.data(), verb=VERBS)
    def operate(self, data: st.DataObject, verb: str) -> None:
        one = data.draw(st.sampled_from(self._ids))
        self._same(*(getattr(store, verb)(one) for store in self._both))

    @precondition(lambda self: self._ids)
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self._ids))
        self._same(*(store.reset(one, MAX_AGE_SECONDS) for store in self._both))

    @rule(outcomes=st.booleans())
    def end_overdue(self, outcomes: bool) -> None:
        ours, theirs = (list(self._do(store.end_overdue(1000, outcomes=outcomes))) for store in self._both)
        self._note(ours, theirs)

    @rule()
    def warn(self) -> None:
        ours, theirs = (self._do(store.unwarned(20_000.0, 1000)) for store in self._both)
        assert sorted(map(plain, ours)) == sorted(map(plain, theirs))
        for lease in ours[:1]:
            self._same(*(store.warn(lease.message_id, ()) for store in self._both))

    @rule(seconds=PASSING)
    def time_passes(self, seconds: float) -> None:
        self._clock.ahead += seconds

    @rule()
    def restart(self) -> None:
        for store in self._both:
            self._do(store.close())
        self._store = in_database(self._path, self._clock)
        self._model = MemoryStore(self._model.memory, self._clock)
        for store in self._both:
            self._do(store.open())

    def _same(self, ours: Awaitable[object], theirs: Awaitable[object]) -> str:
        """Both give the same answer, or the same kind of error; which."""
        outcome, expected = self._outcome(ours), self._outcome(theirs)
        assert outcome == expected
        return outcome[0]

    def _outcome(self, work: Awaitable[object]) -> tuple[str, object]:
        try:
            return "answer", self._do(work)
        except SpoolError as error:
            return type(error).__name__, None

    @invariant()
    def both_show_the_same(self) -> None:
        if hasattr(self, "_store"):
            (ours, ours_due), (theirs, theirs_due) = (self._do(shown(store)) for store in self._both)
            assert ours == theirs
            assert all(map(is_near, ours_due, theirs_due))

    def teardown(self) -> None:
        if hasattr(self, "_store"):
            self._do(self._store.close())
        self._runner.close()


def plain(lease: Lease) -> tuple[object, ...]:
    """A lease without what is its store's own, and without times."""
    return (
        lease.message_id, lease.destination, lease.kind.value, repr(lease.mail), lease.attempt,
        repr([*lease.recipients]), repr(dict(lease.carrier)), lease.content.octets, lease.header_octets,
        lease.is_possible_duplicate,
    )  # fmt: skip


def is_near(ours: float | None, theirs: float | None) -> bool:
    """Whether two times are of one moment."""
    return ours is theirs if ours is None or theirs is None else abs(ours - theirs) < 600


async def shown(store: Store) -> tuple[object, list[float | None]]:
    """What a store shows of all that it holds; and times."""
    views = [*await store.page("", 1000), *await store.page("", 1000, outcomes=True)]
    counts = await store.counts()
    backlog = (await store.backlog([APPLICATION])).values()
    return (
        [view_of(one) for one in views],
        counts.by_state(),
        dict(await store.tally()),
        [one.pending for one in backlog],
    ), [
        counts.oldest_arrived_at,
        *(one.oldest_arrived_at for one in backlog),
        *(time for one in views for time in (one.arrived_at, one.expires_at)),
    ]


def view_of(one: MessageView) -> tuple[object, ...]:
    return (
        one.id, one.kind, one.state, one.octets, one.reverse_path, sorted(map(repr, one.recipients)), one.attempts,
        one.is_forced_to_expire, one.header_octets, dict(one.carrier),
    )  # fmt: skip


TestAgreement = Agreement.TestCase
TestAgreement.settings = settings(
    max_examples=scaled(5), stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
