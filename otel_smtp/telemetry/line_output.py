"""The output of log lines: whole lines, in few writes, without ever waiting for their reader.

Theory of operation
-------------------
Lines of mails that were reported together are written together (`write_all`). A line of a span by itself (`add`)
waits for the others of the same turn of the event loop and is written at its end; under load, where one turn follows
the other, for at most `BATCH_SECONDS`. Any other line (`write`) is written at once, after those that wait. So the order
of lines is the order of calls, and a process that is killed loses the lines of mail of its last turn or few
milliseconds, and no other. One that ends by itself, or by an exception, writes everything first.

A write has whole lines, and of several at most `PIPE_BUF` octets, so that lines of processes that share a pipe are
never torn apart (pipe(7): such a write is atomic).

The pipe's reader may be slow, or stopped. The event loop writes without blocking, by a descriptor of its own: whether
a descriptor blocks is a property that all processes that inherited it share, so the given one is never changed. What
finds no room is left to a thread, which waits, as are all lines until it has written what there was. Beyond
`HELD_OCTETS` lines are lost, and counted; a line says so when there is room again. Where the system gives no such
descriptor (another user's pipe, or no /proc), the thread writes everything. A file is written to directly, as ever.
"""

import asyncio
import contextlib
import logging
import os
import select
import socket
import stat
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, TextIO

logger: Final = logging.getLogger("otel_smtp.telemetry.line_output")

PIPE_BUF: Final = 4096  # Linux; POSIX has 512 as the least, and macOS that
BATCH_SECONDS: Final = 0.002
HELD_OCTETS: Final = 1024 * 1024  # some two thousand lines
FLUSH_SECONDS: Final = 1.0  # at the end, for a reader that has stopped

OnLost = Callable[[int], None]
"""Receives the number of lost lines, once there is room again; called by the thread that writes."""


class LineOutput(Protocol):
    """Takes lines, each with its line end."""

    def add(self, line: str) -> None:
        """Write a line soon. On the event loop."""
        ...

    def write(self, line: str) -> None:
        """Write a line at once, after those before it. By any thread."""
        ...

    def write_all(self, lines: Sequence[str]) -> None:
        """Write several at once, likewise, in few writes."""
        ...

    def flush(self) -> None:
        """Write what waits. Blocks for `FLUSH_SECONDS` at most."""
        ...

    def close(self) -> None:
        """Release the output's own resources, without waiting: flush before."""
        ...


def line_output(stream: TextIO, on_lost: OnLost) -> LineOutput:
    """Write lines to `stream`: by its descriptor, if it has one."""
    try:
        descriptor = stream.fileno()
        stream.flush()
    except (OSError, ValueError, AttributeError):  # io.UnsupportedOperation is the first two
        return StreamOutput(stream)
    return DescriptorOutput(descriptor, on_lost, encoding=stream.encoding or "utf-8")


class Console:
    """Standard output for a library's exporter: writing never waits for the reader."""

    def __init__(self) -> None:
        self._output = line_output(sys.stdout, _say_lost_on_console)

    def write(self, text: str) -> None:
        """Write whole lines.

        Raises:
            OSError, ValueError: as `StreamOutput.write` does.
        """
        self._output.write(text)

    def flush(self) -> None:
        """Nothing waits but what has no room."""

    def finish(self) -> None:
        """Write what had no room. Blocks for `FLUSH_SECONDS` at most: not for the event loop."""
        self._output.flush()


def _say_lost_on_console(lines: int) -> None:
    logger.warning("standard output lines lost: reader too slow", extra={"lines": lines})


class StreamOutput:
    """Lines to a stream without a file descriptor, each written at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        """Write a line.

        Raises:
            OSError, ValueError: the stream cannot be written to.
        """
        self._stream.write(line)
        self._stream.flush()

    add = write

    def write_all(self, lines: Sequence[str]) -> None:
        """Write lines; raises as `write` does."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """The stream is its owner's."""


class DescriptorOutput:
    """Lines to a descriptor: see the head of the module.

    Args:
        descriptor: its owner keeps it open.
        held_octets: the most octets that wait for a slow reader.
    """

    def __init__(
        self, descriptor: int, on_lost: OnLost, *, encoding: str = "utf-8", held_octets: int = HELD_OCTETS
    ) -> None:
        self._descriptor = descriptor
        self._on_lost = on_lost
        self._encoding = encoding
        self._held_octets = held_octets
        self._write_now, self._close_own = _never_waiting(descriptor)
        self._begin()
        # The parent writes what waits in it, and its thread is not in the child.
        begin = weakref.WeakMethod(self._begin)
        os.register_at_fork(after_in_child=lambda: (again := begin()) and again())

    def _begin(self) -> None:
        # Reentrant: the garbage collector may run anything meanwhile, and what it runs may log.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._lines: list[bytes] = []  # of the batch that grows
        self._octets = 0
        self._due_in: asyncio.AbstractEventLoop | None = None  # a callback of this loop will write the batch
        self._written_at = 0.0  # by the loop's clock
        self._held: deque[bytes] = deque()  # batches for the thread; the first one stays until it is written
        self._held_size = 0
        self._thread: threading.Thread | None = None
        self._lost = 0

    def add(self, line: str) -> None:
        """Write a line at the end of the loop's turn, or within `BATCH_SECONDS`; at once where no loop runs."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.write(line)
            return
        octets = line.encode(self._encoding, "backslashreplace")
        with self._lock:
            size = len(octets)
            if self._octets + size > PIPE_BUF:
                self._pass_on()
            self._lines.append(octets)
            self._octets += size
        if self._due_in is not loop:
            self._due_in = loop
            left = self._written_at + BATCH_SECONDS - loop.time()
            if 0 < left <= BATCH_SECONDS:
                loop.call_later(left, self._turn_over, loop)
            else:
                loop.call_soon(self._turn_over, loop)

    def write(self, line: str) -> None:
        """Write a line at once, and what waits before it."""
        octets = line.encode(self._encoding, "backslashreplace")
        with self._lock:
            if self._octets + len(octets) > PIPE_BUF:
                self._pass_on()
            self._lines.append(octets)
            self._pass_on()

    def write_all(self, lines: Sequence[str]) -> None:
        """Write lines at once, and what waits before them."""
        encoded = [line.encode(self._encoding, "backslashreplace") for line in lines]
        with self._lock:
            for octets in encoded:
                size = len(octets)
                if self._octets + size > PIPE_BUF:
                    self._pass_on()
                self._lines.append(octets)
                self._octets += size
            self._pass_on()

    def flush(self) -> None:
        """Write waiting lines; gives a stopped reader up after `FLUSH_SECONDS`."""
        ends = time.monotonic() + FLUSH_SECONDS
        with self._lock:
            self._pass_on()
            while self._held and (left := ends - time.monotonic()) > 0:
                self._changed.wait(left)

    def close(self) -> None:
        """Write what there is room for, and close the descriptor that is ours."""
        with self._lock:
            self._pass_on()
            if self._write_now is not None:
                self._write_now = None
                self._close_own()

    def _turn_over(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_in = None
        self._written_at = loop.time()
        with self._lock:
            self._pass_on()

    # Under the lock ----------------------------------------------------------------------------------------------

    def _pass_on(self) -> None:
        """Write the batch, as far as there is room; leave the rest to the thread."""
        lines, self._lines, self._octets = self._lines, [], 0
        if not lines:
            return
        batch = b"".join(lines)
        if not self._held and self._write_now is not None:
            try:
                batch = batch[self._write_now(batch) :]
            except BlockingIOError:
                pass
            except OSError:
                self._lost += batch.count(b"\n")  # a reader that has gone, a full disk: there may be room later
                return
            if not batch:
                if self._lost:
                    self._say_lost()
                return
        if self._held_size + len(batch) > self._held_octets:
            self._lost += batch.count(b"\n")
            return
        self._held.append(batch)
        self._held_size += len(batch)
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_held, name="log-lines", daemon=True)
            self._thread.start()
        else:
            self._changed.notify_all()

    def _say_lost(self) -> None:
        # Not from here: to say it is to write a line.
        lost, self._lost = self._lost, 0
        threading.Thread(target=self._on_lost, args=(lost,), name="log-lines-lost", daemon=True).start()

    # The thread --------------------------------------------------------------------------------------------------

    def _write_held(self) -> None:
        while True:
            with self._lock:
                while not self._held:
                    if self._lost:
                        self._say_lost()
                    if self._write_now is not None:
                        self._thread = None
                        return
                    self._changed.wait()
                batch = self._held[0]
            has_written = self._write_all(batch)
            with self._lock:
                self._held.popleft()
                self._held_size -= len(batch)
                if not has_written:
                    self._lost += batch.count(b"\n")
                self._changed.notify_all()

    def _write_all(self, batch: bytes) -> bool:
        """Write it, however long that takes; False: it cannot be written."""
        while batch:
            try:
                batch = batch[os.write(self._descriptor, batch) :]
            except BlockingIOError:  # another process has made it non-blocking
                select.select((), (self._descriptor,), ())
            except OSError:
                return False
        return True


def _never_waiting(descriptor: int) -> tuple[Callable[[bytes], int] | None, Callable[[], None]]:
    """A function that writes without waiting, and one that closes it; None if there is none."""

    def nothing() -> None:
        pass

    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return lambda octets: os.write(descriptor, octets), nothing
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(mode):
            connected = socket.socket(fileno=os.dup(descriptor))
            return lambda octets: connected.send(octets, socket.MSG_DONTWAIT), connected.close
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            # proc(5): to open this is to open the pipe or the terminal once more, not to duplicate the descriptor.
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            own = os.open(f"/proc/self/fd/{descriptor}", flags)
            return lambda octets: os.write(own, octets), lambda: os.close(own)
    return None, nothing
