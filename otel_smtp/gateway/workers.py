"""Several processes on one port: a parent that only supervises, and workers that each run a whole gateway.

The kernel spreads connections over the workers' sockets (SO_REUSEPORT). The parent never runs an event loop, opens no
exporter and starts no thread, so it can fork at any time. It forwards SIGTERM, SIGINT and SIGHUP, restarts workers that
die, and on SIGUSR2 replaces the workers one by one, each only when its successor is ready.

Ctrl-C in a terminal signals the whole process group, so a worker gets each signal twice: from the terminal and from the
parent. Therefore only the parent counts signals. For a worker any number of SIGTERM and SIGINT means one; the second
signal that the parent gets reaches it as `AT_ONCE`.
"""

import contextlib
import logging
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NoReturn

logger: Final = logging.getLogger("otel_smtp.gateway.workers")

# A worker that dies soon after its start is restarted after this long, doubled each time up to the bound, so that a
# fault at every start does not use up a core.
FIRST_RESTART_SECONDS: Final = 1.0
LONGEST_RESTART_SECONDS: Final = 30.0
# After this long a worker counts as healthy: if it dies, it is restarted without delay.
HEALTHY_SECONDS: Final = 30.0

AT_ONCE: Final = signal.SIGUSR1
"""The signal that makes a worker end its drain."""

REPLACED: Final = signal.SIGUSR2
"""The signal that a worker's successor serves: the worker leaves the status port to it and drains as on SIGTERM."""

_FORWARDED: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_HANDLED: Final = (*_FORWARDED, signal.SIGCHLD, signal.SIGUSR2)

_READY: Final = -1
_NEVER_READY: Final = -2

Work = Callable[[int, Callable[[], None]], int]
"""A worker's work: takes its number and a function to call when it is ready, returns its exit status."""


@dataclass(slots=True)
class _Worker:
    number: int
    process_id: int
    ready: int  # the reading end of the pipe that reports it; _READY once it has, _NEVER_READY once it cannot any more
    replaces: "_Worker | None" = None
    started: float = field(default_factory=time.monotonic)
    is_leaving: bool = False


class Supervisor:
    """Keeps `count` workers running.

    Args:
        count: number of workers.
        work: run by each in its own process.
        on_ready: called once in the parent, when all workers are ready.
    """

    def __init__(self, count: int, work: Work, *, on_ready: Callable[[], None]) -> None:
        self._count = count
        self._work = work
        self._on_ready = on_ready
        self._workers: dict[int, _Worker] = {}
        self._restarts: dict[int, float] = {}  # worker number -> time of its restart
        self._delays: dict[int, float] = {}
        self._replace: list[_Worker] = []  # waiting for their replacement
        self._selector = selectors.DefaultSelector()
        self._is_announced = False
        self._is_stopping = False
        self._status = 0

    def run(self) -> int:
        """Supervise until all workers have ended after a signal, or one could not start.

        Returns:
            The exit status: 0, or that of the worker that failed.
        """
        wake_reader, wake_writer = os.pipe()
        os.set_blocking(wake_reader, False)
        os.set_blocking(wake_writer, False)
        before = {number: signal.signal(number, lambda *_: None) for number in _HANDLED}
        signal.set_wakeup_fd(wake_writer)
        self._selector.register(wake_reader, selectors.EVENT_READ)
        try:
            for number in range(self._count):
                self._start(number)
            while self._workers or self._restarts:
                readable = {key.fd for key, _ in self._selector.select(self._next_restart())}
                # Pipes first: signals may end workers, and close the pipes of those that were never ready.
                for reader in readable - {wake_reader}:
                    self._on_ready_pipe(reader)
                if wake_reader in readable:
                    self._on_signals(os.read(wake_reader, 512))
                self._start_due()
            return self._status
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            os.close(wake_reader)
            os.close(wake_writer)

    def _start(self, number: int, replaces: _Worker | None = None) -> None:
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        process_id = os.fork()
        if process_id == 0:
            self._become_worker(number, reader, writer)
        os.close(writer)
        self._selector.register(reader, selectors.EVENT_READ)
        self._workers[process_id] = _Worker(number, process_id, reader, replaces)

    def _become_worker(self, number: int, reader: int, writer: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for handled in _HANDLED:
                signal.signal(handled, signal.SIG_DFL)
            os.close(reader)

            def ready() -> None:
                os.write(writer, b"+")
                os.close(writer)

            status = self._work(number, ready)
        except BaseException:
            logger.exception("worker failed", extra={"worker": number})
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGUSR2:
                self._replace = [worker for worker in self._workers.values() if not worker.is_leaving]
                self._replace_next()
            elif number == signal.SIGHUP:
                self._forward(number)
            elif self._is_stopping:
                self._forward(AT_ONCE)
            else:
                self._stop()
                self._forward(number)

    def _stop(self) -> None:
        self._is_stopping = True
        self._restarts.clear()
        self._replace.clear()

    def _forward(self, number: int) -> None:
        for process_id in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, number)

    def _replace_next(self) -> None:
        while self._replace:
            worker = self._replace.pop(0)
            if worker.process_id in self._workers:
                self._start(worker.number, worker)
                return

    def _on_ready_pipe(self, reader: int) -> None:
        worker = next((worker for worker in self._workers.values() if worker.ready == reader), None)
        is_ready = os.read(reader, 1) == b"+"
        self._selector.unregister(reader)
        os.close(reader)
        if worker is None:
            return
        worker.ready = _READY if is_ready else _NEVER_READY
        if not is_ready:
            return  # it died before it was ready; _reap handles its status
        if worker.replaces is not None:
            worker.replaces.is_leaving = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.replaces.process_id, REPLACED)
            worker.replaces = None
            self._replace_next()
        if not self._is_announced and all(other.ready == _READY for other in self._workers.values()):
            self._is_announced = len(self._workers) == self._count
            if self._is_announced:
                self._on_ready()

    def _reap(self) -> None:
        while True:
            try:
                process_id, waited = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process_id == 0:
                return
            worker = self._workers.pop(process_id, None)
            if worker is not None:
                self._ended(worker, os.waitstatus_to_exitcode(waited))

    def _ended(self, worker: _Worker, status: int) -> None:
        if worker.ready >= 0:
            self._selector.unregister(worker.ready)
            os.close(worker.ready)
        if self._is_stopping:
            # A worker that had no handler yet ends by the signal itself; that is no failure.
            if -status not in (*_FORWARDED, AT_ONCE, REPLACED):
                self._status = self._status or (status if status >= 0 else 1)
        elif worker.is_leaving:
            logger.info("worker replaced", extra={"worker": worker.number})
        elif not self._is_announced:
            # A failure at the first start (a port in use, an invalid file) is the gateway's.
            self._status = status if status > 0 else 1
            self._stop()
            self._forward(signal.SIGTERM)
        else:
            self._restart(worker, status)

    def _restart(self, worker: _Worker, status: int) -> None:
        lived = time.monotonic() - worker.started
        delay = 0.0 if lived >= HEALTHY_SECONDS else self._delays.get(worker.number, FIRST_RESTART_SECONDS)
        self._delays[worker.number] = min(max(delay, FIRST_RESTART_SECONDS) * 2, LONGEST_RESTART_SECONDS)
        self._restarts[worker.number] = time.monotonic() + delay
        logger.error("worker died", extra={"worker": worker.number, "status": status, "restart_seconds": delay})

    def _next_restart(self) -> float | None:
        if not self._restarts:
            return None
        return max(0.0, min(self._restarts.values()) - time.monotonic())

    def _start_due(self) -> None:
        now = time.monotonic()
        for number in [number for number, due in self._restarts.items() if due <= now]:
            del self._restarts[number]
            self._start(number)
