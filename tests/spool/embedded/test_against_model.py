"""The embedded store against the one in memory: the same verbs, the same answers, through crashes and lost indexes."""

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from otel_smtp.smtp import replies
from otel_smtp.spool.embedded import EmbeddedStore
from otel_smtp.spool.embedded.clocks import Uptime
from otel_smtp.spool.embedded.store import CRASHES_ALLOWED
from otel_smtp.spool.messages import OUTCOME_PREFIX, ContentLost, End, Kind, Lease, NewMessage, SpoolError, Verdict
from otel_smtp.spool.store import Store
from tests.spool.embedded.books import books, recount
from tests.spool.memory_store import MemoryStore
from tests.spool.messages import BODY, HEADER, message
from tests.support.examples import scaled

T = TypeVar("T")

SEGMENT_OCTETS = 256 * 1024  # small: so that segments fill, are moved out of, and are used again
ENDS = st.sampled_from([End.DELIVERED, End.FAILED, None])
APPLICATION = f"{OUTCOME_PREFIX}app"
VERBS = st.sampled_from(["retry", "hold", "release", "expire", "delete"])


class Agreement(RuleBasedStateMachine):
    """Both stores, one clock, the same ids."""

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner()
        self._place = Path(tempfile.mkdtemp(prefix="otel-smtp-spool-"))
        self._runs = 0
        self._now = 1_800_000_000.0
        self._jumped = 0.0
        self._ids: list[str] = []
        self._leases: list[tuple[Lease, Lease]] = []

    def _do(self, work: Awaitable[T]) -> T:
        async def do() -> T:
            return await work

        return self._runner.run(do())

    def _clock(self) -> float:
        return self._now

    def _make(self) -> EmbeddedStore:
        return EmbeddedStore(
            self._path, least_free_octets=0, segment_octets=SEGMENT_OCTETS, clock=self._clock, up=self._up
        )

    def _up(self) -> Uptime:
        return Uptime("boot", round((self._now - self._jumped) * 1000))

    @property
    def _path(self) -> Path:
        return self._place / f"run{self._runs}"

    @initialize()
    def begin(self) -> None:
        self._model = MemoryStore(clock=self._clock)
        self._store = self._make()
        self._do(self._model.open())
        self._do(self._store.open())

    async def _submit(self, store: Store, new: NewMessage, body: bytes, *, lease: bool) -> list[Lease]:
        draft = store.draft()
        for chunk in (HEADER, body):
            room = asyncio.Event()
            if not draft.write(chunk, room.set):
                await room.wait()
        return list(await store.submit(new, draft, lease=lease))

    @rule(
        octets=st.sampled_from([10, 3000, 50_000, 100_000]),
        recipients=st.integers(1, 3),
        is_leased=st.booleans(),
        wait=st.sampled_from([0.0, 60.0]),
        sender=st.sampled_from(["a@x.example", "b@x.example", ""]),
    )
    def submit(self, octets: int, recipients: int, is_leased: bool, wait: float, sender: str) -> None:
        addresses = [f"user{number}@example.net" for number in range(recipients)]
        new = message(*addresses, sender=sender, due_in_seconds=wait, max_age_seconds=1000)
        body = b"\r\n" + b"x" * octets
        both = [self._do(self._submit(store, new, body, lease=is_leased)) for store in (self._store, self._model)]
        self._leases += zip(*both, strict=True)
        self._ids.append(new.id)

    @rule(most=st.integers(1, 4))
    def claim(self, most: int) -> None:
        (ours, ours_due), (theirs, theirs_due) = (
            self._do(store.claim({"up": most, "back": 1, APPLICATION: 1})) for store in (self._store, self._model)
        )
        assert ours_due == theirs_due
        assert [_plain(lease) for lease, _ in ours] == [_plain(lease) for lease, _ in theirs]
        for (lease, content), (_, expected) in zip(ours, theirs, strict=True):
            assert content is None or (expected is not None and tuple(content) == tuple(expected))
            assert (content is None) is (lease.content.octets > 65_536)
        self._leases += [(lease, expected) for (lease, _), (expected, _) in zip(ours, theirs, strict=True)]

    @precondition(lambda self: self._leases)
    @rule(data=st.data(), end=ENDS, wait=st.sampled_from([0.0, 30.0]), unknown=st.booleans(), bounces=st.booleans())
    def finish(self, data: st.DataObject, end: End | None, wait: float, unknown: bool, bounces: bool) -> None:
        lease, expected = data.draw(st.sampled_from(self._leases))
        verdicts = [Verdict(one.number, end if one.number else End.DELIVERED, replies.OK) for one in lease.recipients]
        if len(verdicts) == 1:
            verdicts = [Verdict(verdicts[0].number, end, replies.UPSTREAM_UNAVAILABLE)]
        notices = [(message("a@x.example", sender="", destination="back", kind=Kind.NOTIFICATION), HEADER + BODY)]
        told = message(sender="", destination=APPLICATION, kind=Kind.OUTCOME, max_age_seconds=1000)
        notices.append((told, HEADER + BODY))
        given: dict[str, Any] = {
            "retry_in": wait,
            "is_possible_duplicate": unknown,
            "notices": notices if bounces else (),
        }

        async def finish(store: Store, one: Lease) -> None:
            await store.finish(one, verdicts, **given)

        self._same(finish(self._store, lease), finish(self._model, expected))
        if bounces:
            self._ids += [notice.id for notice, _ in notices]

    @precondition(lambda self: self._ids)
    @rule(data=st.data(), verb=VERBS)
    def operate(self, data: st.DataObject, verb: str) -> None:
        one = data.draw(st.sampled_from(self._ids))
        self._same(*(getattr(store, verb)(one) for store in (self._store, self._model)))

    @precondition(lambda self: self._ids)
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self._ids))
        self._same(*(store.reset(one, 500.0) for store in (self._store, self._model)))

    @rule(outcomes=st.booleans())
    def end_overdue(self, outcomes: bool) -> None:
        ours, theirs = (self._do(store.end_overdue(100, outcomes=outcomes)) for store in (self._store, self._model))
        assert sorted(map(_plain, ours)) == sorted(map(_plain, theirs))
        by_name = {(lease.message_id, lease.delivery): lease for lease in theirs}
        self._leases += [(lease, by_name[lease.message_id, lease.delivery]) for lease in ours]

    @rule(seconds=st.sampled_from([1.0, 30.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self._now += seconds

    @rule(seconds=st.sampled_from([-86_400.0, -400.0, 100.0, 864_000.0]), is_seen=st.booleans())
    def clock_jumps(self, seconds: float, is_seen: bool) -> None:
        if not is_seen:  # it jumps between two processes, when no lease is left
            self._do(self._store.close())
            self._do(self._model.close())
        self._now += seconds
        self._jumped += seconds
        milliseconds = round(seconds * 1000)
        for entry in self._model.memory.entries.values():
            entry.move(min(0, milliseconds), milliseconds)
        if is_seen:
            self._do(self._store.housekeep())
        else:
            self._open_again()

    @rule()
    def make_room(self) -> None:
        self._do(self._store.compaction.compact())

    @rule(loses_index=st.booleans())
    def restart(self, loses_index: bool) -> None:
        for store in (self._store, self._model):
            self._do(store.close())
        if loses_index:
            (self._path / "index.db").unlink()
        self._open_again()

    def _open_again(self) -> None:
        self._model = MemoryStore(self._model.memory, self._clock)
        self._store = self._make()
        self._lose_contents()
        self._do(self._model.open())
        self._do(self._store.open())
        self._leases.clear()

    def _lose_contents(self) -> None:
        """A store finds out which contents are gone when it is opened."""
        for message_id, entry in self._model.memory.entries.items():
            if message_id not in self._model.memory.contents:
                entry.lose_content(round(self._now * 1000))

    @precondition(lambda self: hasattr(self, "_store") and self._store.directory.larges())
    @rule(data=st.data(), loses_index=st.booleans(), is_crash=st.booleans())
    def lose_content(self, data: st.DataObject, loses_index: bool, is_crash: bool) -> None:
        lost = data.draw(st.sampled_from(sorted(self._store.directory.larges())))
        self._store.directory.large(lost).unlink()
        self._model.memory.contents.pop(lost, None)  # else it has ended, and is about to be removed
        (self.crash if is_crash else self.restart)(loses_index)

    @rule(loses_index=st.booleans())
    def crash(self, loses_index: bool) -> None:
        before = self._path
        self._runs += 1
        shutil.copytree(before, self._path, ignore=shutil.ignore_patterns("LOCK", "spare*", "*reserve"))
        self._do(self._store.close())
        shutil.rmtree(before)
        if loses_index:
            for file in self._path.glob("index.db*"):
                file.unlink()
        self._lose_contents()
        for entry in self._model.memory.entries.values():
            entry.take_back(crashes_allowed=CRASHES_ALLOWED, now_ms=round(self._now * 1000))
        self._store = self._make()
        self._do(self._store.open())
        self._leases.clear()

    def _same(self, ours: Awaitable[object], theirs: Awaitable[object]) -> None:
        """Both give the same answer, or the same error."""
        assert self._outcome(ours) == self._outcome(theirs)

    def _outcome(self, work: Awaitable[object]) -> tuple[str, object]:
        try:
            return "answer", self._do(work)
        except SpoolError as error:
            return type(error).__name__, str(error)

    @invariant()
    def both_show_the_same(self) -> None:
        if not hasattr(self, "_store"):
            return
        ours, theirs = (self._do(_all_of(store)) for store in (self._store, self._model))
        assert ours == theirs

    @invariant()
    def the_books_are_balanced(self) -> None:
        if hasattr(self, "_store"):
            assert self._do(books(self._store)) == self._do(recount(self._store))

    def teardown(self) -> None:
        if hasattr(self, "_store"):
            self._do(self._store.close())
        self._runner.close()
        shutil.rmtree(self._place)


async def _all_of(store: Store) -> tuple[object, ...]:
    shown = [*await store.page("", 1000), *await store.page("", 1000, outcomes=True)]
    counts = await store.counts()
    contents: list[bytes | None] = []
    for one in shown:
        try:
            contents.append(await store.read(one.content, 0, 200))
        except ContentLost:
            contents.append(None)
    return (
        [repr(one) for one in shown],
        contents,
        counts.by_state(),
        (counts.oldest_arrived_at, counts.next_due_at),
        dict(await store.tally()),
        [list(await store.destinations(outcomes=outcomes)) for outcomes in (False, True)],
        dict(await store.backlog([APPLICATION])),
    )


def _plain(lease: Lease) -> str:
    """A lease without what is its store's own."""
    return repr(lease)


TestAgreement = Agreement.TestCase
TestAgreement.settings = settings(
    max_examples=scaled(15), stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
