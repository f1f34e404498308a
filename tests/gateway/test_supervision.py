"""What the supervision of workers decides: every event in every state, and whatever order they come in."""

import itertools
import signal
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from otel_smtp.gateway import supervision as supervision_module
from otel_smtp.gateway.supervision import (
    AT_ONCE,
    LEGAL,
    REPLACED,
    SUCCESSION_SECONDS,
    IllegalStep,
    Supervision,
    Worker,
    WorkerEvent,
    WorkerState,
)
from tests.support.examples import scaled

DRAIN_SECONDS = 20.0
UNREADY = (WorkerState.STARTING, WorkerState.SUCCEEDING)


class Processes:
    """Processes that exist on paper: each has a number, and notes what it was sent."""

    def __init__(self) -> None:
        self.started: list[tuple[int, int]] = []  # process id, place
        self.sent: dict[int, list[signal.Signals]] = {}
        self.is_exhausted = False
        self.unserved: list[int] = []  # places
        self.stops = 0

    def start(self, place: int) -> int:
        if self.is_exhausted:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        process_id = 100 + len(self.started)
        self.started.append((process_id, place))
        self.sent[process_id] = []
        return process_id

    def send(self, process_id: int, number: signal.Signals) -> None:
        self.sent[process_id].append(number)

    def leave_unserved(self, place: int) -> None:
        self.unserved.append(place)

    def stop_serving(self) -> None:
        assert signal.SIGTERM not in [number for sent in self.sent.values() for number in sent]
        self.stops += 1


def serving(count: int) -> tuple[Supervision, Processes]:
    """A supervision whose first workers serve, at second 0."""
    processes = Processes()
    supervision = Supervision(count, processes, drain_seconds=DRAIN_SECONDS)
    supervision.act(0.0)
    for process_id, _ in processes.started:
        supervision.ready(process_id, 0.0)
    return supervision, processes


def states(supervision: Supervision) -> list[tuple[int, str]]:
    return sorted((worker.place, worker.state.value) for worker in supervision.workers)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(WorkerState, WorkerEvent)), ids=str)
def test_a_worker_takes_what_the_table_has_and_refuses_the_rest(state: WorkerState, event: WorkerEvent) -> None:
    worker = Worker(0, 0, 1, 0.0, state)
    if event in LEGAL[state]:
        worker.take(event)
        assert worker.state is LEGAL[state][event]
    else:
        with pytest.raises(IllegalStep):
            worker.take(event)
        assert worker.state is state


def test_every_state_can_be_reached_and_every_one_can_end() -> None:
    reached = {WorkerState.STARTING, WorkerState.SUCCEEDING}
    for _ in WorkerState:
        reached |= {after for state in reached for after in LEGAL[state].values()}
    assert reached == set(WorkerState)
    assert all(
        LEGAL[state].get(WorkerEvent.ENDED) is WorkerState.ENDED for state in WorkerState if state is not state.ENDED
    )


def test_replacements_are_one_at_a_time_and_end_in_one_generation() -> None:
    supervision, processes = serving(2)
    supervision.replace()
    supervision.act(1.0)
    supervision.act(1.0)
    assert states(supervision) == [(0, "serving"), (0, "succeeding"), (1, "serving")]
    supervision.ready(102, 2.0)
    supervision.act(2.0)
    assert processes.sent[100] == [REPLACED]
    assert states(supervision) == [(0, "leaving"), (0, "serving"), (1, "serving"), (1, "succeeding")]
    supervision.ready(103, 3.0)
    supervision.ended(100, 0, 3.0)
    supervision.ended(101, 0, 3.0)
    supervision.act(3.0)
    assert states(supervision) == [(0, "serving"), (1, "serving")]
    assert {worker.generation for worker in supervision.workers} == {1}


def test_asked_twice_in_a_row_it_replaces_twice_and_leaks_none() -> None:
    supervision, processes = serving(1)
    supervision.replace()
    supervision.act(1.0)
    supervision.replace()  # while the successor starts
    supervision.act(1.0)
    assert len(processes.started) == 2
    supervision.ready(101, 2.0)
    supervision.act(2.0)
    assert len(processes.started) == 3  # the successor's: it was started before the second question
    supervision.ready(102, 3.0)
    assert (processes.sent[100], processes.sent[101], processes.sent[102]) == ([REPLACED], [REPLACED], [])


def test_a_successor_that_dies_costs_nothing_and_is_tried_again_later() -> None:
    supervision, processes = serving(1)
    supervision.replace()
    supervision.act(1.0)
    supervision.ended(101, 1, 1.0)
    supervision.act(1.0)
    assert states(supervision) == [(0, "serving")]
    assert processes.sent[100] == []
    assert supervision.due() == 2.0
    supervision.act(2.0)
    assert states(supervision) == [(0, "serving"), (0, "succeeding")]
    supervision.ended(102, 1, 2.0)
    assert supervision.due() == 4.0  # twice as long


def test_a_successor_whose_predecessor_dies_becomes_the_worker() -> None:
    supervision, processes = serving(1)
    supervision.replace()
    supervision.act(1.0)
    supervision.ended(100, -9, 1.0)
    supervision.act(50.0)
    assert states(supervision) == [(0, "starting")]
    assert len(processes.started) == 2
    supervision.act(1.0 + SUCCESSION_SECONDS)
    assert processes.sent[101] == []  # its deadline was a successor's
    supervision.ready(101, 70.0)
    supervision.act(70.0)
    assert states(supervision) == [(0, "serving")]


@pytest.mark.parametrize(
    ("lead_there", "seconds"),
    [
        (lambda supervision: supervision.replace(), SUCCESSION_SECONDS),
        (lambda supervision: supervision.stop(signal.SIGTERM, 0.0), DRAIN_SECONDS),
    ],
    ids=["successor", "drain"],
)
def test_a_worker_that_hangs_is_killed(lead_there: Callable[[Supervision], None], seconds: float) -> None:
    supervision, processes = serving(1)
    lead_there(supervision)
    supervision.act(0.0)
    late = processes.started[-1][0]
    assert supervision.due() == seconds
    supervision.act(seconds - 0.1)
    assert signal.SIGKILL not in processes.sent[late]
    supervision.act(seconds)
    supervision.act(seconds)
    assert processes.sent[late].count(signal.SIGKILL) == 1


def test_without_processes_a_restart_waits_and_the_first_start_fails() -> None:
    supervision, processes = serving(1)
    processes.is_exhausted = True
    supervision.ended(100, 1, 100.0)
    supervision.act(100.0)
    assert states(supervision) == []
    assert not supervision.is_over
    processes.is_exhausted = False
    supervision.act(supervision.due() or 0.0)
    assert states(supervision) == [(0, "starting")]

    exhausted = Processes()
    exhausted.is_exhausted = True
    first = Supervision(2, exhausted, drain_seconds=DRAIN_SECONDS)
    first.act(0.0)
    assert first.is_over
    assert first.status == 1


def test_at_the_first_start_a_worker_that_gives_up_ends_all_and_one_that_a_signal_ends_is_restarted() -> None:
    for served in (0, 1):  # whether the other one serves by then
        processes = Processes()
        supervision = Supervision(2, processes, drain_seconds=DRAIN_SECONDS)
        supervision.act(0.0)
        for process_id in (101,)[:served]:
            supervision.ready(process_id, 1.0)
        supervision.ended(100, -signal.SIGKILL, 2.0)  # by the kernel, when memory runs out
        assert processes.sent[101] == []
        supervision.act(supervision.due() or 0.0)
        assert [place for _, place in processes.started] == [0, 1, 0]
        supervision.ended(102, 2, 4.0)
        assert supervision.status == 2
        assert processes.sent[101] == [signal.SIGTERM]


def test_one_that_was_healthy_is_restarted_without_delay_and_the_next_with_the_first() -> None:
    supervision, _ = serving(1)
    for died, delay in [(1.0, 1.0), (2.0, 2.0), (100.0, 0.0), (101.0, 1.0)]:
        worker = next(iter(supervision.workers))
        supervision.ended(worker.process_id, -9, died)
        supervision.act(died)
        assert (supervision.due() or died) - died == delay
        supervision.act(died + delay)
        supervision.ready(next(iter(supervision.workers)).process_id, died)


def test_clients_wait_for_a_worker_that_is_back_soon_and_for_no_other() -> None:
    supervision, processes = serving(2)
    now = 1.0
    for unserved in ([], [0], [0, 0]):  # it dies again and again, later and later
        worker = next(one for one in supervision.workers if one.place == 0)
        supervision.ended(worker.process_id, -9, now)
        assert processes.unserved == unserved
        now = supervision.due() or now
        supervision.act(now)
        supervision.ready(processes.started[-1][0], now)
    supervision.replace()
    supervision.act(now)
    supervision.ended(processes.started[-1][0], 1, now)  # the successor: its predecessor serves
    assert processes.unserved == [0, 0]
    processes.is_exhausted = True
    worker = next(one for one in supervision.workers if one.place == 1)
    supervision.ended(worker.process_id, -9, now)
    supervision.act(now + 100.0)
    assert processes.unserved == [0, 0, 1]
    assert processes.stops == 0


def test_listening_ends_before_the_workers_are_told() -> None:
    supervision, processes = serving(2)
    supervision.stop(signal.SIGTERM, 1.0)
    supervision.stop(signal.SIGTERM, 2.0)
    assert processes.stops == 1


def test_a_second_signal_ends_the_drain() -> None:
    supervision, processes = serving(2)
    supervision.stop(signal.SIGINT, 1.0)
    supervision.stop(signal.SIGTERM, 2.0)
    assert processes.sent == {100: [signal.SIGINT, AT_ONCE], 101: [signal.SIGINT, AT_ONCE]}
    supervision.ended(100, 0, 3.0)
    supervision.act(3.0)
    assert states(supervision) == [(1, "stopping")]
    supervision.ended(101, -AT_ONCE, 3.0)
    assert supervision.is_over
    assert supervision.status == 0


class AnyOrder(RuleBasedStateMachine):
    """Workers get ready, die, and are replaced in any order; in quiet everything comes to N workers, one generation."""

    @initialize(count=st.integers(1, 4))
    def begin(self, count: int) -> None:
        self.count = count
        self.now = 0.0
        self.supervision, self.processes = serving(count)

    def pick(self, data: st.DataObject, *states: WorkerState) -> int:
        return data.draw(st.sampled_from([one.process_id for one in self.supervision.workers if one.state in states]))

    def any_in(self, *states: WorkerState) -> bool:
        return any(worker.state in states for worker in self.supervision.workers)

    @rule(seconds=st.floats(0.0, 40.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.supervision.act(self.now)

    @precondition(lambda self: not self.supervision.is_stopping)
    @rule()
    def is_to_replace(self) -> None:
        self.supervision.replace()
        self.supervision.act(self.now)

    @precondition(lambda self: self.any_in(*UNREADY))
    @rule(data=st.data())
    def one_gets_ready(self, data: st.DataObject) -> None:
        self.supervision.ready(self.pick(data, *UNREADY), self.now)
        self.supervision.act(self.now)

    @precondition(lambda self: self.any_in(*WorkerState))
    @rule(data=st.data(), status=st.sampled_from([0, 1, -9, -11, -15]))
    def one_dies(self, data: st.DataObject, status: int) -> None:
        self.supervision.ended(self.pick(data, *WorkerState), status, self.now)
        self.supervision.act(self.now)

    @rule(is_exhausted=st.booleans())
    def processes_run_out(self, is_exhausted: bool) -> None:
        self.processes.is_exhausted = is_exhausted

    @invariant()
    def a_place_has_one_worker_and_one_successor_at_most(self) -> None:
        for place in range(self.count):
            found = [worker.state for worker in self.supervision.workers if worker.place == place]
            assert found.count(WorkerState.SERVING) + found.count(WorkerState.STARTING) <= 1
            assert found.count(WorkerState.SUCCEEDING) <= found.count(WorkerState.SERVING)
        assert sum(worker.state is WorkerState.SUCCEEDING for worker in self.supervision.workers) <= 1

    def teardown(self) -> None:
        self.processes.is_exhausted = False
        for _ in range(20 * self.count):
            self.now = max(self.now, self.supervision.due() or self.now)
            self.supervision.act(self.now)
            for worker in list(self.supervision.workers):
                if worker.state in UNREADY:
                    self.supervision.ready(worker.process_id, self.now)
                elif worker.state is WorkerState.LEAVING:
                    self.supervision.ended(worker.process_id, 0, self.now)
        assert states(self.supervision) == [(place, "serving") for place in range(self.count)]
        assert len({worker.generation for worker in self.supervision.workers}) == 1
        assert self.supervision.due() is None
        self.supervision.stop(signal.SIGTERM, self.now)
        for worker in list(self.supervision.workers):
            self.supervision.ended(worker.process_id, 0, self.now)
        assert self.supervision.is_over
        assert self.supervision.status == 0


AnyOrder.TestCase.settings = settings(max_examples=scaled(150), stateful_step_count=40)
TestAnyOrder = AnyOrder.TestCase


def test_the_longest_delay_is_bounded() -> None:
    supervision, _ = serving(1)
    now = 0.0
    for _ in range(12):
        worker = next(iter(supervision.workers))
        supervision.ended(worker.process_id, 1, now)
        now = supervision.due() or now
        supervision.act(now)
    worker = next(iter(supervision.workers))
    supervision.ended(worker.process_id, 1, now)
    assert (supervision.due() or 0.0) - now == supervision_module.LONGEST_RESTART_SECONDS
