"""The supervisor as a process of its own: what its workers' ends mean, and who hears which signal."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.process import until

ROOT: Final = Path(__file__).resolve().parent.parent.parent
PROGRAM: Final = """
import os, pathlib, selectors, signal, sys, time
from otel_smtp.gateway.workers import AT_ONCE, REPLACED, Supervisor

def deaf(number, ready):  # has no handlers yet, as while it starts
    ready()
    time.sleep(60)

def hears(number, ready):  # tells what it hears, and ends with the last signal
    heard = []
    told = signal.Signals
    def hear(number, frame):
        heard.append(told(number).name)
        if number in (AT_ONCE, REPLACED):  # the last: whatever comes while it ends is not told
            for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(each, signal.SIG_IGN)
        os.write(1, f"{told(number).name}\\n".encode())
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, AT_ONCE, REPLACED):
        signal.signal(each, hear)
    ready()
    while not {AT_ONCE.name, REPLACED.name} & set(heard):
        os.read(reader, 100)  # not signal.pause: the last signal may come between the look and the pause
    return 0

def fails(number, ready):
    return 3

def slow(number, ready):  # takes half a second to start
    time.sleep(0.5)
    hears(number, ready)

def drains(number, ready):  # ends when it is told to, and tells nothing
    def end(number, frame):
        os._exit(0)
    for each in (signal.SIGTERM, signal.SIGINT, AT_ONCE, REPLACED):
        signal.signal(each, end)
    ready()
    while True:
        signal.pause()

def state(process_id):
    return pathlib.Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]

def fails_unseen(number, ready):  # the supervisor stands still until the last is ready and all others have failed
    if number < workers - 1:
        pathlib.Path(directory, f"{number}.tmp").write_text(str(os.getpid()))
        pathlib.Path(directory, f"{number}.tmp").rename(f"{directory}/{number}")
        while state(os.getppid()) != "T":
            time.sleep(0.01)
        return 3
    os.kill(os.getppid(), signal.SIGSTOP)
    for other in range(number):
        while not pathlib.Path(directory, str(other)).exists():
            time.sleep(0.01)
        while state(pathlib.Path(directory, str(other)).read_text()) != "Z":
            time.sleep(0.01)
    ready()
    os.kill(os.getppid(), signal.SIGCONT)
    time.sleep(60)

kind, workers, directory, order = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]

class Ordered(selectors.DefaultSelector):  # selectors tell what happened, and not in which order
    def select(self, timeout=None):  # the pipe of the signals is the oldest
        return sorted(super().select(timeout), key=lambda event: event[0].fd, reverse=order == "signals last")

if order:
    selectors.DefaultSelector = Ordered
work = {"deaf": deaf, "hears": hears, "fails": fails, "fails_unseen": fails_unseen,
        "slow": slow, "drains": drains}[kind]
sys.exit(Supervisor(workers, work, on_ready=lambda: os.write(1, b"ready\\n")).run())
"""


@contextlib.contextmanager
def supervising(work: str, workers: int = 1, directory: str = "", order: str = "") -> Iterator[subprocess.Popen[str]]:
    """A supervisor, the leader of a process group."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, work, str(workers), directory, order],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def lives(process_id: int) -> bool:
    """Whether a process has not ended."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(parent: int) -> frozenset[int]:
    """The process ids of a process's children."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return frozenset(filter(lives, map(int, listed)))


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("to_the_group", [False, True], ids=["to the parent", "to the group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_ends_by_the_signal_has_not_failed(number: signal.Signals, to_the_group: bool) -> None:
    with supervising("deaf") as process:
        assert next_line(process) == "ready"
        (os.killpg if to_the_group else os.kill)(process.pid, number)
        assert process.wait(60) == 0


def test_the_second_signal_reaches_a_worker_as_at_once() -> None:
    with supervising("hears") as process:
        assert next_line(process) == "ready"
        for number, heard in [(signal.SIGHUP, "SIGHUP"), (signal.SIGTERM, "SIGTERM"), (signal.SIGTERM, "SIGUSR1")]:
            process.send_signal(number)
            assert next_line(process) == heard
        assert process.wait(60) == 0


def test_a_worker_whose_successor_is_ready_is_told_that_it_is_replaced() -> None:
    with supervising("hears") as process:
        assert next_line(process) == "ready"
        process.send_signal(signal.SIGUSR2)
        assert next_line(process) == "SIGUSR2"  # the first, which ends
        process.send_signal(signal.SIGTERM)
        assert next_line(process) == "SIGTERM"  # its successor, as any worker
        process.send_signal(signal.SIGTERM)
        assert next_line(process) == "SIGUSR1"
        assert process.wait(60) == 0


def test_a_reload_that_comes_before_a_worker_is_ready_reaches_it_late() -> None:
    with supervising("slow") as process:
        until(lambda: children(process.pid) or None, "the worker starts")
        process.send_signal(signal.SIGHUP)
        assert {next_line(process), next_line(process)} == {"ready", "SIGHUP"}
        process.send_signal(signal.SIGTERM)
        assert next_line(process) == "SIGTERM"


@pytest.mark.parametrize("workers", [1, 3])
def test_asked_to_replace_twenty_times_in_a_row_it_leaks_no_worker(workers: int) -> None:
    with supervising("drains", workers) as process:
        assert next_line(process) == "ready"
        before = children(process.pid)
        for _ in range(20):
            process.send_signal(signal.SIGUSR2)
            time.sleep(0.005)
        until(lambda: not children(process.pid) & before or None, "all are replaced")
        until(lambda: len(children(process.pid)) == workers or None, "the former ones have ended")
        time.sleep(0.5)
        assert len(children(process.pid)) == workers
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_workers_end_with_their_parent_whatever_ends_it() -> None:
    with supervising("drains", 2) as process:
        assert next_line(process) == "ready"
        orphans = children(process.pid)
        process.kill()
        process.wait(60)
        until(lambda: not any(map(lives, orphans)) or None, "all have ended")


def test_a_signal_that_means_nothing_to_the_parent_does_not_end_it() -> None:
    with supervising("drains") as process:
        assert next_line(process) == "ready"
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_worker_that_cannot_start_is_the_failure_of_all() -> None:
    with supervising("fails") as process:
        assert process.wait(60) == 3


@pytest.mark.parametrize("order", ["signals first", "signals last"])
@pytest.mark.parametrize("workers", [2, 3])
def test_what_is_seen_of_all_workers_at_once_is_the_failure_of_those_that_failed(
    workers: int, order: str, tmp_path: Path
) -> None:
    with supervising("fails_unseen", workers, str(tmp_path), order) as process:
        assert process.wait(60) == 3
        assert next_line(process) == ""  # never ready
