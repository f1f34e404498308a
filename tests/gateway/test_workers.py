"""The supervisor as a process of its own: what its workers' ends mean, and who hears which signal."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent.parent
PROGRAM: Final = """
import os, signal, sys, time
from otel_smtp.gateway.workers import AT_ONCE, REPLACED, Supervisor

def deaf(number, ready):  # has no handlers yet, as while it starts
    ready()
    time.sleep(60)

def hears(number, ready):  # tells what it hears, and ends with the last signal
    heard = []
    told = signal.Signals
    def hear(number, frame):
        heard.append(told(number).name)
        os.write(1, f"{told(number).name}\\n".encode())
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, AT_ONCE, REPLACED):
        signal.signal(each, hear)
    ready()
    while not {AT_ONCE.name, REPLACED.name} & set(heard):
        signal.pause()
    return 0

def fails(number, ready):
    return 3

def parent_waits_for_the_end():  # of a worker, before it looks at the worker's pipe
    os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)

work = {"deaf": deaf, "hears": hears, "fails": fails, "fails at once": fails}[sys.argv[1]]
if sys.argv[1] == "fails at once":
    os.register_at_fork(after_in_parent=parent_waits_for_the_end)
sys.exit(Supervisor(1, work, on_ready=lambda: os.write(1, b"ready\\n")).run())
"""


@contextlib.contextmanager
def supervising(work: str) -> Iterator[subprocess.Popen[str]]:
    """A supervisor of one worker, the leader of a process group."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, work],
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


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("to_the_group", [False, True], ids=["to the parent", "to the group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_ends_by_the_signal_has_not_failed(number: signal.Signals, to_the_group: bool) -> None:
    with supervising("deaf") as process:
        assert next_line(process) == "ready"
        (os.killpg if to_the_group else os.kill)(process.pid, number)
        assert process.wait(15) == 0


def test_the_second_signal_reaches_a_worker_as_at_once() -> None:
    with supervising("hears") as process:
        assert next_line(process) == "ready"
        for number, heard in [(signal.SIGHUP, "SIGHUP"), (signal.SIGTERM, "SIGTERM"), (signal.SIGTERM, "SIGUSR1")]:
            process.send_signal(number)
            assert next_line(process) == heard
        assert process.wait(15) == 0


def test_a_worker_whose_successor_is_ready_is_told_that_it_is_replaced() -> None:
    with supervising("hears") as process:
        assert next_line(process) == "ready"
        process.send_signal(signal.SIGUSR2)
        assert next_line(process) == "SIGUSR2"  # the first, which ends
        process.send_signal(signal.SIGTERM)
        assert next_line(process) == "SIGTERM"  # its successor, as any worker
        process.send_signal(signal.SIGTERM)
        assert next_line(process) == "SIGUSR1"
        assert process.wait(15) == 0


@pytest.mark.parametrize("when", ["fails", "fails at once"])
def test_a_worker_that_cannot_start_is_the_failure_of_all(when: str) -> None:
    with supervising(when) as process:
        assert process.wait(15) == 3
