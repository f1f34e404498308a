"""Log lines on their way out: whole, in order, in few writes, and never waited for."""

import asyncio
import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from otel_smtp.telemetry.line_output import PIPE_BUF, DescriptorOutput, StreamOutput, line_output


class Pipe:
    """A pipe whose reader may be slow."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        self.lost: list[int] = []
        self.told = threading.Event()

    def on_lost(self, lines: int) -> None:
        self.lost.append(lines)
        self.told.set()

    def read(self) -> bytes:
        return os.read(self.reader, 1 << 20)

    def read_until(self, end: bytes) -> bytes:
        found = b""
        while not found.endswith(end):
            found += self.read()
        return found


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe()
    yield pipe
    for descriptor in (pipe.reader, pipe.writer):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def output_to(pipe: Pipe, **more: Any) -> DescriptorOutput:
    return DescriptorOutput(pipe.writer, pipe.on_lost, **more)


def test_a_line_is_written_at_once_where_no_loop_runs(pipe: Pipe) -> None:
    output = output_to(pipe)
    output.add("first\n")
    assert pipe.read() == b"first\n"
    output.write("second \u00e9\n")
    assert pipe.read() == "second \u00e9\n".encode()


async def test_lines_of_a_turn_are_one_write_at_its_end(pipe: Pipe) -> None:
    output = output_to(pipe)
    os.set_blocking(pipe.reader, False)
    for number in range(5):
        output.add(f"line {number}\n")
    with pytest.raises(BlockingIOError):
        pipe.read()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert pipe.read() == b"".join(b"line %d\n" % number for number in range(5))


async def test_another_line_is_written_at_once_and_after_those_that_wait(pipe: Pipe) -> None:
    output = output_to(pipe)
    output.add("of a mail\n")
    output.write("another\n")
    assert pipe.read() == b"of a mail\nanother\n"


async def test_several_lines_are_written_at_once_and_after_those_that_wait(pipe: Pipe) -> None:
    output = output_to(pipe)
    output.add("of a span\n")
    output.write_all(["one\n", "two\n"])
    assert pipe.read() == b"of a span\none\ntwo\n"


async def test_under_load_turns_share_a_write(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    output = output_to(pipe)
    writes = 0
    write = os.write

    def counted(descriptor: int, octets: bytes) -> int:
        nonlocal writes
        writes += 1
        return write(descriptor, octets)

    monkeypatch.setattr(os, "write", counted)
    loop = asyncio.get_running_loop()
    ends = loop.time() + 0.05
    lines = 0
    while loop.time() < ends:
        output.add("x\n")
        lines += 1
        await asyncio.sleep(0)
    output.flush()
    assert pipe.read_until(b"x\n").count(b"\n") == lines
    assert writes <= 60, "one in two milliseconds, and some"


@pytest.mark.parametrize("together", [False, True])
async def test_lines_are_never_torn_and_several_fit_into_an_atomic_write(
    together: bool, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = output_to(pipe)
    batches: list[bytes] = []

    def kept(descriptor: int, octets: bytes) -> int:
        batches.append(octets)
        return len(octets)

    monkeypatch.setattr(os, "write", kept)
    lines = [f"{number} {'x' * size}\n" for number, size in enumerate([1000] * 10 + [5000, 10])]
    if together:
        output.write_all(lines)
    else:
        for line in lines:
            output.add(line)
        output.flush()
    assert b"".join(batches).decode() == "".join(lines)
    assert all(batch.endswith(b"\n") for batch in batches)
    assert [len(batch) > PIPE_BUF for batch in batches] == [False, False, False, False, True, False][-len(batches) :]


def test_a_reader_that_has_stopped_costs_lines_and_never_time(pipe: Pipe) -> None:
    output = output_to(pipe, held_octets=100_000)
    line = "x" * 999 + "\n"
    began = time.monotonic()
    for _ in range(1000):
        output.write(line)
    assert time.monotonic() - began < 5, "a write that waits waits for ever"
    found = b""
    while not pipe.lost:
        found += pipe.read()
        output.write("again\n")
        pipe.told.wait(0.01)
    lines = found.decode().splitlines(keepends=True)
    assert {one for one in lines if one != "again\n"} == {line}
    kept = lines.count(line)
    assert 100 <= kept < 1000
    assert pipe.lost[0] >= 1000 - kept - 100, "those that were held are read later"


def test_a_reader_that_is_slow_gets_every_line_in_order(pipe: Pipe) -> None:
    output = output_to(pipe)
    expected = [f"{number} {'x' * 500}\n" for number in range(1000)]
    for line in expected:
        output.write(line)
    output.write("end\n")
    assert pipe.read_until(b"end\n").decode() == "".join(expected) + "end\n"
    output.write("later\n")
    assert pipe.read() == b"later\n"
    assert pipe.lost == []


def test_the_given_descriptor_blocks_as_before(pipe: Pipe) -> None:
    output_to(pipe).write("x\n")
    assert os.get_blocking(pipe.writer)


def test_where_nothing_writes_without_waiting_a_thread_does(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> int:
        raise PermissionError("another user's")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refused)
        output = output_to(pipe)
    for number in range(300):
        output.write(f"{number} {'x' * 500}\n")  # more than the pipe takes
    output.write("end\n")
    assert [int(line.split()[0]) for line in pipe.read_until(b"end\n").splitlines()[:-1]] == [*range(300)]
    output.write("again\n")
    output.flush()
    assert pipe.read() == b"again\n"


def test_a_socket_is_written_to_without_waiting() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        output = DescriptorOutput(ours.fileno(), lambda lines: None)
        for number in range(2000):
            output.write(f"{number} {'x' * 500}\n")
        output.write("end\n")
        found = b""
        while not found.endswith(b"end\n"):
            found += theirs.recv(1 << 16)
        assert found.count(b"\n") == 2001
        output.close()


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    with path.open("a") as stream:
        output = line_output(stream, lambda lines: None)
        output.write("after\n")
        assert path.read_text() == "before\nafter\n"


def test_a_stream_without_a_descriptor_gets_lines_as_they_are() -> None:
    stream = io.StringIO()
    output = line_output(stream, lambda lines: None)
    assert isinstance(output, StreamOutput)
    output.add("one\n")
    output.write("two\n")
    output.flush()
    output.close()
    assert stream.getvalue() == "one\ntwo\n"


def test_a_reader_that_has_gone_costs_lines_which_are_counted(pipe: Pipe) -> None:
    output = output_to(pipe)
    os.close(pipe.reader)
    output.write("lost\n")
    output.write("too\n")
    assert output._lost == 2


def test_the_end_waits_for_a_slow_reader_and_not_for_one_that_has_stopped(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("otel_smtp.telemetry.line_output.FLUSH_SECONDS", 0.05)
    output = output_to(pipe)
    for _ in range(200):
        output.write("x" * 999 + "\n")
    output.flush()  # returns
    monkeypatch.setattr("otel_smtp.telemetry.line_output.FLUSH_SECONDS", 60.0)
    reading = threading.Thread(target=pipe.read_until, args=(b"end\n",))
    reading.start()
    output.write("end\n")
    output.flush()
    assert not output._held
    reading.join()
    output.close()


def test_a_loop_that_has_ended_keeps_no_line(pipe: Pipe) -> None:
    output = output_to(pipe)

    async def add(line: str) -> None:
        output.add(line)
        output.flush()
        output.add(line)

    asyncio.run(add("first\n"))
    asyncio.run(add("second\n"))
    assert pipe.read_until(b"second\n").startswith(b"first\nfirst\nsecond\n")
    output.flush()
    assert not output._lines


def run_python(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


_BEGIN = """
import asyncio, json, logging, os, signal, sys
from otel_smtp.telemetry.logs import set_up_logging
set_up_logging("json", "info", sys.stderr)
[handler] = [one for one in logging.getLogger().handlers if hasattr(one, "take_line")]
async def main():
    handler._output.add('{"event": "waits"}\\n')
    END
"""
ENDS = [
    ("pass", 0),
    ("sys.exit(3)", 3),
    ("raise RuntimeError", 1),
    ("logging.getLogger('otel_smtp.x').critical('dies'); os.kill(os.getpid(), signal.SIGKILL)", -9),
    ("await asyncio.sleep(0); await asyncio.sleep(0); os.kill(os.getpid(), signal.SIGKILL)", -9),
]


@pytest.mark.parametrize(("end", "status"), ENDS)
def test_no_end_of_the_process_loses_a_line_that_waits(end: str, status: int) -> None:
    ended = run_python(_BEGIN.replace("END", end) + "\nasyncio.run(main())\n")
    assert ended.returncode == status, ended.stderr
    assert json.loads(ended.stderr.splitlines()[0]) == {"event": "waits"}


def test_a_child_does_not_write_what_waits_in_its_parent() -> None:
    ended = run_python(
        _BEGIN.replace("END", "os.fork()") + "    handler._output.write(f'{os.getpid()}\\n')\nasyncio.run(main())\n"
    )
    lines = ended.stderr.splitlines()
    assert len(lines) == 3, ended.stderr
    assert lines.count('{"event": "waits"}') == 1
