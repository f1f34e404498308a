"""Processes under measurement: started in their own group, weighed by /proc, ended by their id."""

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Child:
    """A process and all that descend from it."""

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        talks: bool = False,
        pipes_log: bool = False,
        directory: Path = ROOT,
    ) -> None:
        """Start it.

        Args:
            environment: added to a bare one: neither the caller's OTEL_* nor OTELSMTP_* variables reach a target.
            log: takes its standard output and error.
            talks: speaks JSON lines over its standard input and output.
            pipes_log: the log goes through a pipe, and only its beginning is kept.
        """
        bare = {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "OTELSMTP_"))}
        sink: IO[bytes] | int = log.open("ab") if log else subprocess.DEVNULL
        self._log_reader = None
        if pipes_log and not isinstance(sink, int):
            self._log_reader = subprocess.Popen(
                ["sh", "-c", "head -c 65536; exec cat >/dev/null"],
                stdin=subprocess.PIPE, stdout=sink, start_new_session=True,
            )  # fmt: skip
            sink.close()
            assert self._log_reader.stdin is not None
            sink = self._log_reader.stdin
        try:
            self._process = subprocess.Popen(
                [str(argument) for argument in arguments],
                cwd=directory,
                env={**bare, "PYTHONPATH": str(ROOT), **(environment or {})},
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else sink,
                stderr=sink if log else None,
                start_new_session=True,
                preexec_fn=_raise_file_limit,
            )
        finally:
            if not isinstance(sink, int):
                sink.close()
        self.pid = self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process at the root still runs."""
        return self._process.poll() is None

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit status, once it has ended by itself.

        Raises:
            subprocess.TimeoutExpired: it does not.
        """
        return self._process.wait(seconds)

    def read(self) -> dict[str, Any]:
        """The next JSON line that it prints."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"process {self.pid} ended with status {self._process.wait()}")
        return dict(json.loads(line))

    def ask(self) -> dict[str, Any]:
        """Send an empty line and read the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        return self.read()

    def tree(self) -> list[int]:
        """Ids of the process and its living descendants."""
        return _tree(self.pid)

    def cpu_seconds(self) -> float:
        """User and system time of the tree, of those included who have ended and been waited for."""
        return cpu_seconds(self.pid)

    def descriptors(self) -> int:
        """Open file descriptors of the process at the root."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def rss_octets(self) -> int:
        """Resident memory of the tree now; pages that processes share count in each."""
        return self._memory("VmRSS")

    def private_octets(self) -> int:
        """Of the resident memory of the tree that which is no file's: pages of programs and libraries come and go with
        what else happens on the machine."""
        return self._memory("RssAnon")

    def peak_rss_octets(self) -> int:
        """The highest resident memory of each process of the tree, added up."""
        return self._memory("VmHWM")

    def forget_peak(self) -> None:
        """Reset the peak to what is resident now (proc(5), clear_refs)."""
        for pid in self.tree():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")

    def _memory(self, key: str) -> int:
        octets = 0
        for pid in self.tree():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
                    if line.startswith(f"{key}:"):
                        octets += int(line.split()[1]) * 1024
        return octets

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process at the root."""
        self._process.send_signal(number)

    def stop(self, *, patience_seconds: float = 10.0) -> None:
        """Ask it to end and wait; after `patience_seconds` its whole group is killed."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        if self.is_alive:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience_seconds)
        # The group is this process's own (start_new_session), so nobody else's is in it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        if self._log_reader is not None:
            self._log_reader.wait()  # its pipe has no writer any more


def python(module: str, *arguments: str, talks: bool = False, log: Path | None = None) -> Child:
    """One of the benchmark's own programs."""
    return Child([sys.executable, "-m", module, *arguments], talks=talks, log=log)


def wait_for_greeting(port: int, child: Child, *, timeout_seconds: float = 30.0) -> None:
    """Return when an SMTP greeting comes from `port`.

    Raises:
        RuntimeError: the process ended, or time was up.
    """
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and child.is_alive:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=timeout_seconds) as connection:
                if connection.recv(512).startswith(b"220"):
                    connection.sendall(b"QUIT\r\n")
                    connection.recv(512)
                    return
        except OSError:
            time.sleep(0.002)  # nothing tells when a foreign program listens but trying
    raise RuntimeError(f"no greeting on port {port}; process {'runs' if child.is_alive else 'ended'}")


def _raise_file_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def cpu_seconds(root: int) -> float:
    """User and system time of a process and its descendants, of those included who have ended and been waited for."""
    # Fields 14 to 17 of proc(5): utime, stime, cutime, cstime.
    stats = (_stat(pid) for pid in _tree(root))
    return sum(sum(map(int, stat[11:15])) for stat in stats if stat is not None) / _TICKS


def _tree(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name, from the state on; None: it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text[text.rfind(")") + 2 :].split()
