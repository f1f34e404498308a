"""The decisions of a supervisor of workers: which process to start, replace, restart and kill. No I/O.

Theory of operation
-------------------
A gateway has N *places*, numbered from 0. At a place there is at most one worker that serves or is about to
(`STARTING`, `SERVING`), beside it at most one successor that is not ready yet (`SUCCEEDING`), and any number of former
workers that drain (`LEAVING`). `LEGAL` is the table of state changes by event; nothing else changes a state.

SIGUSR2 changes no worker. It raises the *generation*, and every worker remembers the generation it was started in.
After each event the supervision looks for a place whose worker serves and is of an older generation, and starts its
successor, one at a time over all places. So any number of SIGUSR2, at any moment, ends in N workers of one generation:
there is no list of replacements that could be forgotten, or begun twice.

A successor that dies before it is ready costs nothing: the worker it was to replace goes on, and the next successor
waits as a restart waits. A successor whose predecessor dies becomes the place's worker.

`Supervision` has no clock, process or signal handler: `Workforce` starts and signals, and the caller brings the time.
"""

import logging
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

logger: Final = logging.getLogger("otel_smtp.gateway.supervision")

# A worker that dies soon after its start is restarted after this long, doubled each time up to the bound, so that a
# fault at every start does not use up a core.
FIRST_RESTART_SECONDS: Final = 1.0
LONGEST_RESTART_SECONDS: Final = 30.0
# After this long a worker counts as healthy: if it dies, it is restarted without delay.
HEALTHY_SECONDS: Final = 30.0
# A successor that is not ready by then is killed, so that one that hangs does not stop the replacement of the others.
# Only a successor: a first start may wait for a database, and nothing else serves meanwhile.
SUCCESSION_SECONDS: Final = 60.0

AT_ONCE: Final = signal.SIGUSR1
"""The signal that makes a worker end its drain."""

REPLACED: Final = signal.SIGUSR2
"""The signal that a worker's successor serves: the worker leaves the status port to it and drains as on SIGTERM."""

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class WorkerState(StrEnum):
    """The state of a worker."""

    STARTING = "starting"  # not ready, and nothing else serves at its place
    SUCCEEDING = "succeeding"  # not ready, while its predecessor serves
    SERVING = "serving"
    LEAVING = "leaving"  # drains, as its successor serves
    STOPPING = "stopping"  # drains, as the gateway stops
    ENDED = "ended"


class WorkerEvent(StrEnum):
    """The events in the life of a worker."""

    READY = "ready"  # it says that it serves
    REPLACED = "replaced"  # its successor serves
    ALONE = "alone"  # the worker that it was to replace has ended
    STOP = "stop"  # the gateway stops
    ENDED = "ended"  # its process has ended, for whatever reason


_S, _E = WorkerState, WorkerEvent

LEGAL: Final[Mapping[WorkerState, Mapping[WorkerEvent, WorkerState]]] = {
    _S.STARTING: {_E.READY: _S.SERVING, _E.STOP: _S.STOPPING, _E.ENDED: _S.ENDED},
    _S.SUCCEEDING: {_E.READY: _S.SERVING, _E.ALONE: _S.STARTING, _E.STOP: _S.STOPPING, _E.ENDED: _S.ENDED},
    _S.SERVING: {_E.REPLACED: _S.LEAVING, _E.STOP: _S.STOPPING, _E.ENDED: _S.ENDED},
    _S.LEAVING: {_E.STOP: _S.STOPPING, _E.ENDED: _S.ENDED},
    # READY: its report and the signal to stop crossed.
    _S.STOPPING: {_E.READY: _S.STOPPING, _E.STOP: _S.STOPPING, _E.ENDED: _S.ENDED},
    _S.ENDED: {},
}
"""The only table of state changes by event; the tests try all pairs."""


class IllegalStep(Exception):
    """An event that `LEGAL` lacks for a worker's state: a bug of ours."""


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process, as the supervision sees it.

    Attributes:
        place: its number among the gateway's workers.
        generation: the supervision's, when it was started.
        started: when it was, by the caller's clock, in seconds.
        deadline: when it is killed, by the same clock; infinite: never.
    """

    place: int
    generation: int
    process_id: int
    started: float
    state: WorkerState
    deadline: float = float("inf")

    def take(self, event: WorkerEvent) -> None:
        """Change the state as the table says.

        Raises:
            IllegalStep: the table does not have the event.
        """
        state = LEGAL[self.state].get(event)
        if state is None:
            raise IllegalStep(f"worker {self.place} is {self.state}: {event} cannot happen to it")
        self.state = state


class Workforce(Protocol):
    """Starts processes and signals them."""

    def start(self, place: int) -> int:
        """Start a worker; its process id.

        Raises:
            OSError: the system has no process, memory or file descriptor for it.
        """
        ...

    def send(self, process_id: int, number: signal.Signals) -> None:
        """Signal a process that has not been reported as ended."""
        ...

    def leave_unserved(self, place: int) -> None:
        """No worker will serve at a place for a while: clients must not wait for one."""
        ...

    def stop_serving(self) -> None:
        """All workers are about to be told to end."""
        ...


class Supervision:
    """Decides about `count` workers.

    Args:
        count: number of places.
        workforce: starts and signals processes.
        drain_seconds: a worker that has not ended this long after its SIGTERM is killed.

    Attributes:
        status: the exit status: 0, or that of the worker that failed.
        is_stopping: whether the gateway stops.
        has_served: whether all places' workers have ever served at the same time.
    """

    def __init__(self, count: int, workforce: Workforce, *, drain_seconds: float) -> None:
        self._count = count
        self._workforce = workforce
        self._drain_seconds = drain_seconds
        self._generation = 0
        self._workers: dict[int, Worker] = {}  # by process id
        self._not_before: dict[int, float] = {}  # by place: when a worker may be started there again
        self._delays: dict[int, float] = {}  # by place: of the next restart
        self.has_served = False
        self.is_stopping = False
        self.status = 0

    @property
    def is_over(self) -> bool:
        """Whether all workers have ended, and none will be started."""
        return self.is_stopping and not self._workers

    @property
    def is_complete(self) -> bool:
        """Whether every place's worker serves."""
        return all(self._at(place, _S.SERVING) is not None for place in range(self._count))

    @property
    def workers(self) -> Iterable[Worker]:
        """The workers whose processes have not ended."""
        return self._workers.values()

    # Events ----------------------------------------------------------------------------------------------------------

    def ready(self, process_id: int, now: float) -> None:
        """A worker says that it serves."""
        worker = self._workers.get(process_id)
        if worker is None:
            return
        predecessor = self._at(worker.place, _S.SERVING) if worker.state is _S.SUCCEEDING else None
        worker.take(_E.READY)
        if worker.state is _S.STOPPING:
            return
        worker.deadline = float("inf")
        if predecessor is not None:
            self._tell(predecessor, _E.REPLACED, REPLACED, now)
        self.has_served = self.has_served or self.is_complete

    def ended(self, process_id: int, status: int, now: float) -> None:
        """A worker's process has ended.

        Args:
            status: its exit status; below 0: the signal that ended it.
        """
        worker = self._workers.pop(process_id, None)
        if worker is None:
            return
        was = worker.state
        worker.take(_E.ENDED)
        if was is _S.STOPPING:
            # A worker without handlers yet is ended by the signal itself, which is no failure.
            if -status not in (*STOP_SIGNALS, AT_ONCE, REPLACED):
                self.status = self.status or (status if status >= 0 else 1)
        elif was is _S.LEAVING:
            logger.info("worker replaced", extra={"worker": worker.place})
        elif was is _S.STARTING and status >= 0 and not self.has_served:
            self._fail(status or 1, now)
        else:
            self._died(worker, was, status, now)

    def stop(self, number: signal.Signals, now: float) -> None:
        """SIGTERM or SIGINT was received: the first one begins the drain of all workers, the next one ends it."""
        if self.is_stopping:
            for worker in self._workers.values():
                self._workforce.send(worker.process_id, AT_ONCE)
            return
        self.is_stopping = True
        self._workforce.stop_serving()
        for worker in self._workers.values():
            self._tell(worker, _E.STOP, number, now)

    def replace(self) -> None:
        """Replace all current workers, one after the other."""
        self._generation += 1

    def forward(self, number: signal.Signals) -> None:
        """Pass a signal on to all workers."""
        for worker in self._workers.values():
            self._workforce.send(worker.process_id, number)

    # Consequences ----------------------------------------------------------------------------------------------------

    def act(self, now: float) -> None:
        """Act on the time: kill late workers, start missing ones, and the next successor."""
        for worker in self._workers.values():
            if worker.deadline <= now:
                logger.error(
                    "worker killed: deadline passed", extra={"worker": worker.place, "state": worker.state.value}
                )
                worker.deadline = float("inf")
                self._workforce.send(worker.process_id, signal.SIGKILL)
        for place in range(self._count):
            if not self.is_stopping and self._not_before.get(place, now) <= now:
                if self._is_vacant(place):
                    self._start(place, _S.STARTING, now)
                elif self._is_to_be_replaced(place):
                    self._start(place, _S.SUCCEEDING, now)

    def due(self) -> float | None:
        """When to call `act` next, by the caller's clock; None: not before another event."""
        times = [worker.deadline for worker in self._workers.values() if worker.deadline < float("inf")]
        if not self.is_stopping:
            times += [
                when
                for place, when in self._not_before.items()
                if self._is_vacant(place) or self._is_to_be_replaced(place)
            ]
        return min(times, default=None)

    def _at(self, place: int, *states: WorkerState) -> Worker | None:
        found = (worker for worker in self._workers.values() if worker.place == place and worker.state in states)
        return next(found, None)

    def _is_vacant(self, place: int) -> bool:
        return self._at(place, _S.STARTING, _S.SERVING) is None

    def _is_to_be_replaced(self, place: int) -> bool:
        worker = self._at(place, _S.SERVING)
        is_old = worker is not None and worker.generation < self._generation
        return is_old and not any(other.state is _S.SUCCEEDING for other in self._workers.values())

    def _start(self, place: int, state: WorkerState, now: float) -> None:
        try:
            process_id = self._workforce.start(place)
        except OSError as error:
            logger.error("worker not started", extra={"worker": place, "error": str(error)})
            if self.has_served:
                self._postpone(place, now)
            else:
                self._fail(1, now)
            return
        self._not_before.pop(place, None)
        deadline = now + SUCCESSION_SECONDS if state is _S.SUCCEEDING else float("inf")
        self._workers[process_id] = Worker(place, self._generation, process_id, now, state, deadline)

    def _tell(self, worker: Worker, event: WorkerEvent, number: signal.Signals, now: float) -> None:
        worker.take(event)
        worker.deadline = min(worker.deadline, now + self._drain_seconds)
        self._workforce.send(worker.process_id, number)

    def _fail(self, status: int, now: float) -> None:
        """End the gateway: a worker that gives up at the first start (a port in use, an invalid file) fails for all.

        One that a signal ended, as the kernel's when memory runs out, says nothing about the others: it is restarted.
        """
        self.status = self.status or status
        if not self.is_stopping:
            self.stop(signal.SIGTERM, now)

    def _died(self, worker: Worker, was: WorkerState, status: int, now: float) -> None:
        if now - worker.started >= HEALTHY_SECONDS and was is _S.SERVING:
            self._delays.pop(worker.place, None)
            delay = 0.0
            self._not_before[worker.place] = now
        else:
            delay = self._postpone(worker.place, now)
        what = "successor died before it was ready" if was is _S.SUCCEEDING else "worker died"
        logger.error(what, extra={"worker": worker.place, "status": status, "restart_seconds": delay})
        successor = self._at(worker.place, _S.SUCCEEDING)
        if was is not _S.SUCCEEDING and successor is not None:
            successor.take(_E.ALONE)
            successor.deadline = float("inf")

    def _postpone(self, place: int, now: float) -> float:
        delay = self._delays.get(place, FIRST_RESTART_SECONDS)
        self._delays[place] = min(delay * 2, LONGEST_RESTART_SECONDS)
        self._not_before[place] = now + delay
        if delay > FIRST_RESTART_SECONDS and self._is_vacant(place):
            self._workforce.leave_unserved(place)
        return delay
