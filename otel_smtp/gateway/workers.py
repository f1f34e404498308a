"""Several processes on one port: a parent that only supervises, and workers that each run a whole gateway.

The kernel spreads connections over the workers' sockets (SO_REUSEPORT). The parent never runs an event loop, opens no
exporter and starts no thread, so it can fork at any time. It forwards SIGTERM, SIGINT and SIGHUP, restarts workers that
die, and on SIGUSR2 replaces the workers one by one, each only when its successor is ready. `supervision` makes its
decisions; this module handles processes, pipes and signals.

Ctrl-C in a terminal signals the whole process group, so a worker gets each signal twice: from the terminal and from the
parent. Therefore only the parent counts signals. For a worker any number of SIGTERM and SIGINT means one; the second
signal that the parent gets reaches it as `AT_ONCE`.

A signal to the group can hit a child between its fork and its own handlers, while it still has its parent's: it would
then write into the parent's pipe, and count twice. So all these signals are blocked during a fork, and the child
unblocks them once it has its own handlers.

A killed parent leaves nothing behind: the kernel sends its workers SIGTERM (Linux; elsewhere they stay).
"""

import contextlib
import logging
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable
from typing import Final, NoReturn

from otel_smtp.gateway.signals import HELD_BACK, let_through
from otel_smtp.gateway.supervision import AT_ONCE, REPLACED, Supervision

__all__ = ["AT_ONCE", "REPLACED", "Supervisor", "Work"]

logger: Final = logging.getLogger("otel_smtp.gateway.workers")

# The drain's grace is the operator's; the rest of a worker's end (pool, flush, interpreter) takes less than this.
END_SECONDS: Final = 10.0

_HANDLED: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCHLD,
)
# prctl(2), from linux/prctl.h.
_PR_SET_PDEATHSIG: Final = 1

Work = Callable[[int, Callable[[], None]], int]
"""A worker's work: takes its number and a function to call when it is ready, returns its exit status.

SIGHUP, SIGUSR1 and SIGUSR2 are blocked until it reports readiness: it needs handlers for them by then.
"""


class Supervisor:
    """Keeps `count` workers running.

    Args:
        count: number of workers.
        work: run by each in its own process.
        on_ready: called once in the parent, when all workers are ready.
        on_reload: called in the parent on SIGHUP, before the workers get it.
        on_unserved: called in the parent with the number of a worker that has died and will not be replaced soon.
        on_stop: called in the parent when the workers must end, before they are told.
        grace_seconds: how long a worker may drain.
    """

    def __init__(
        self,
        count: int,
        work: Work,
        *,
        on_ready: Callable[[], None],
        on_reload: Callable[[], object] = lambda: None,
        on_unserved: Callable[[int], object] = lambda _: None,
        on_stop: Callable[[], object] = lambda: None,
        grace_seconds: float = float("inf"),
    ) -> None:
        self._work = work
        self._on_ready = on_ready
        self._on_reload = on_reload
        self._on_unserved = on_unserved
        self._on_stop = on_stop
        self._supervision = Supervision(count, self, drain_seconds=grace_seconds + END_SECONDS)
        self._starting: dict[int, int] = {}  # pipe that reports readiness -> process id
        self._selector = selectors.DefaultSelector()
        self._parent = os.getpid()
        self._bind_to_parent = _death_signal()

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
        let_through()
        self._selector.register(wake_reader, selectors.EVENT_READ)
        supervision = self._supervision
        is_announced = False
        try:
            supervision.act(time.monotonic())
            while not supervision.is_over:
                due = supervision.due()
                wait = None if due is None else max(0.0, due - time.monotonic())
                readable = {key.fd for key, _ in self._selector.select(wait)}
                # Pipes first: signals may end workers, and close the pipes of those that were never ready.
                for reader in readable - {wake_reader}:
                    self._on_ready_pipe(reader)
                if supervision.has_served and not is_announced:
                    is_announced = True
                    self._on_ready()
                if wake_reader in readable:
                    self._on_signals(os.read(wake_reader, 512))
                supervision.act(time.monotonic())
            return supervision.status
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            self._selector.close()
            os.close(wake_reader)
            os.close(wake_writer)

    def start(self, place: int) -> int:
        """Fork a worker; its process id.

        Raises:
            OSError: the system has no process, memory or file descriptor for it.
        """
        reader, writer = os.pipe()
        with contextlib.suppress(OSError, ValueError):  # their readers may have gone
            sys.stdout.flush()
            sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            process_id = os.fork()
            if process_id == 0:
                os.close(reader)
                self._become_worker(place, writer)
        except OSError:
            os.close(reader)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
            os.close(writer)
        self._selector.register(reader, selectors.EVENT_READ)
        self._starting[reader] = process_id
        return process_id

    def send(self, process_id: int, number: signal.Signals) -> None:
        """Signal a worker."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, number)

    def leave_unserved(self, place: int) -> None:
        """No worker will serve at a place for a while."""
        self._on_unserved(place)

    def stop_serving(self) -> None:
        """All workers are about to be told to end."""
        self._on_stop()

    def _become_worker(self, place: int, writer: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for handled in _HANDLED:
                signal.signal(handled, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, frozenset(_HANDLED) - HELD_BACK)
            self._bind_to_parent()
            if os.getppid() != self._parent:  # it was killed before that
                os._exit(0)

            def ready() -> None:
                let_through()
                os.write(writer, b"+")
                os.close(writer)

            status = self._work(place, ready)
        except BaseException:
            logger.exception("worker failed", extra={"worker": place})
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            logging.shutdown()  # waiting lines; at the end nothing else calls it
            os._exit(status)

    def _on_signals(self, numbers: bytes) -> None:
        for number in numbers:
            match number:
                case signal.SIGCHLD:
                    self._reap()
                case signal.SIGUSR2:
                    self._supervision.replace()
                case signal.SIGHUP:
                    self._on_reload()
                    self._supervision.forward(signal.SIGHUP)
                case signal.SIGTERM | signal.SIGINT:
                    self._supervision.stop(signal.Signals(number), time.monotonic())
                case _:
                    logger.warning("signal ignored", extra={"signal": signal.Signals(number).name})

    def _on_ready_pipe(self, reader: int) -> None:
        process_id = self._starting.pop(reader)
        is_ready = os.read(reader, 1) == b"+"
        self._selector.unregister(reader)
        os.close(reader)
        if is_ready:  # otherwise it died before it was ready, as its status will show
            self._supervision.ready(process_id, time.monotonic())

    def _reap(self) -> None:
        while True:
            try:
                process_id, waited = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process_id == 0:
                return
            self._supervision.ended(process_id, os.waitstatus_to_exitcode(waited), time.monotonic())


def _death_signal() -> Callable[[], None]:
    """Called by a worker to get SIGTERM when its parent ends for whatever reason."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    import ctypes

    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def bind() -> None:
        if prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
            logger.warning("worker not bound to its parent", extra={"error": os.strerror(ctypes.get_errno())})

    return bind
