"""The real gateway as a process of its own: started on ports of the kernel's choice, watched, stopped, always reaped.

with gateway({"upstream.url": upstream.url}, tmp_path) as running:
    smtplib.SMTP("127.0.0.1", running.port) ...
    assert running.stop() == 0
"""

import contextlib
import functools
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

ROOT: Final = Path(__file__).resolve().parents[2]
READY_SECONDS: Final = 30.0  # start-up takes half a second; a machine that is shared may take its time
STOP_SECONDS: Final = 30.0
USES_UVLOOP: Final = os.environ.get("OTELSMTP_TEST_LOOP", "uvloop") == "uvloop"  # where a test does not care

T = TypeVar("T")


def until(found: Callable[[], T | None], what: str, *, timeout_seconds: float = 60.0) -> T:
    """What `found` gives, once it gives something: for what happens in another process and tells nobody.

    Raises:
        TimeoutError: it never did.
    """
    deadline = time.monotonic() + timeout_seconds
    while (result := found()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.005)
    return result


def listening_sockets(port: int) -> int:
    """How many sockets listen on a TCP port: one for each process that shares it."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    sockets = [line.split() for line in lines]
    return sum(fields[3] == "0A" and int(fields[1].partition(":")[2], 16) == port for fields in sockets)


def settings_file(settings: Mapping[str, Any], directory: Path) -> Path:
    """Write a settings file.

    Args:
        settings: values by their names in the settings file; "listener.x" and "upstream.x" mean the first of each;
            "upstream", a list of mappings, further ones.
    """
    tables: dict[str, dict[str, Any]] = {}
    further: Sequence[Mapping[str, Any]] = settings.get("upstream", ())
    for name, value in settings.items():
        if name == "upstream":
            continue
        table, _, key = name.rpartition(".")
        tables.setdefault(table, {})[key] = value
    lines = []
    for table, values in sorted(tables.items()):
        if table:
            lines.append(f"[[{table}]]" if table in ("listener", "upstream", "limit", "notify") else f"[{table}]")
        # JSON's texts, numbers, booleans and lists of them are TOML's.
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    for upstream in further:
        lines += ["[[upstream]]", *(f"{key} = {json.dumps(value)}" for key, value in upstream.items())]
    path = directory / "settings.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class GatewayProcess:
    """A running `otel-smtp serve`.

    Attributes:
        ready_line: what it printed when it was ready.
        port: of its first listener.
    """

    def __init__(self, process: subprocess.Popen[bytes], stderr: Path) -> None:
        self._process = process
        self._stderr = stderr
        self.ready_line = self._wait_for_ready_line()
        port = re.search(r"(?:127\.0\.0\.1|\[::1\]):(\d+)", self.ready_line)
        assert port is not None, self.ready_line
        self.port = int(port[1])

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def children(self) -> frozenset[int]:
        """The process ids of its children: its workers."""
        found = set()
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                # pid (command) state ppid ...; the command may hold anything
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self.pid and state != "Z":
                    found.add(int(stat.parent.name))
        return frozenset(found)

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    @property
    def stderr(self) -> str:
        """What it has said on stderr so far: its log."""
        return self._stderr.read_text(encoding="utf-8", errors="replace")

    @property
    def log(self) -> list[dict[str, Any]]:
        """Its log lines that are JSON."""
        lines = (line for line in self.stderr.splitlines() if line.startswith("{"))
        return [json.loads(line) for line in lines]

    def memory(self, name: str) -> int:
        """Octets of memory that it holds (VmRSS), or has ever held (VmHWM)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:"))

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_seconds: float = STOP_SECONDS) -> int:
        """Its exit status, once it has ended.

        Raises:
            AssertionError: it does not end.
        """
        try:
            return self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the gateway does not end\n{self.stderr}") from None

    def stop(self) -> int:
        """SIGTERM: its exit status after the drain."""
        return self.stop_within(STOP_SECONDS)

    def stop_within(self, seconds: float) -> int:
        """SIGTERM: its exit status after a drain that may take `seconds`."""
        self.signal(signal.SIGTERM)
        return self.wait(seconds)

    def _wait_for_ready_line(self) -> str:
        assert self._process.stdout is not None
        held = b""
        deadline = time.monotonic() + READY_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in held:
                if not selector.select(deadline - time.monotonic()):
                    raise AssertionError(f"not ready after {READY_SECONDS} s\n{self.stderr}")
                data = os.read(self._process.stdout.fileno(), 65536)
                if not data:
                    raise AssertionError(f"ended with {self._process.wait()} before it was ready\n{self.stderr}")
                held += data
        return held.partition(b"\n")[0].decode()


DEFAULTS: Final[Mapping[str, Any]] = {
    "hostname": "gateway.example",
    "listener.name": "local",
    "listener.address": ["127.0.0.1:0"],
    "status.address": "off",
    "log.format": "json",
}


def environment(more: Mapping[str, str], directory: Path, *, uses_uvloop: bool) -> dict[str, str]:
    """The environment of a gateway: this one's without what configures telemetry, and `more`."""
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("OTEL", "OTELSMTP", "PYTHONPATH"))
    }
    paths = [str(ROOT)]
    if not uses_uvloop:
        # As on a machine where it is not installed.
        hidden = directory / "without_uvloop"
        hidden.mkdir(exist_ok=True)
        (hidden / "uvloop.py").write_text("raise ImportError('hidden by a test')\n")
        paths.insert(0, str(hidden))
    return {**environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "error", **more}


_REAP: Final = """
left=" "
while read -r what group; do
    case $what in
        begun) left="$left$group " ;;
        ended) left="${left%" $group "*} ${left##*" $group "}" ;;
    esac
done
for group in $left; do kill -s KILL -- "-$group"; done
"""


@functools.cache
def _reaper() -> int:
    """Where a process of our own learns of the groups that end with us, whatever ends us: it reads that end."""
    told, tell = os.pipe()
    os.posix_spawn(
        "/bin/sh", ["sh", "-c", _REAP], os.environ, setsid=True, file_actions=[(os.POSIX_SPAWN_DUP2, told, 0)]
    )
    os.close(told)
    return tell


@contextlib.contextmanager
def outliving_nobody(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Have a process that leads its group killed with all its group: when this is left, or we have died."""
    os.write(_reaper(), f"begun {process.pid}\n".encode())
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.write(_reaper(), f"ended {process.pid}\n".encode())


@contextlib.contextmanager
def gateway(
    settings: Mapping[str, Any],
    directory: Path,
    *,
    environ: Mapping[str, str] | None = None,
    uses_uvloop: bool = USES_UVLOOP,
    file_limit: int | None = None,
    under: Sequence[str] = (),
) -> Iterator[GatewayProcess]:
    """Run a gateway.

    Args:
        settings: as `settings_file` takes them, over `DEFAULTS`.
        directory: for its settings file and its log.
        environ: `OTEL_*` and the like.
        uses_uvloop: False: as where uvloop is not installed.
        file_limit: how many files it may open; None: as many as we.
        under: a command that runs it, as strace with its options.
    """
    path = settings_file({**DEFAULTS, **settings}, directory)
    command = [*under, sys.executable, "-m", "otel_smtp.commands.cli", "serve", "--config", str(path)]
    if file_limit is not None:
        command = ["sh", "-c", f'ulimit -n {file_limit} && exec "$0" "$@"', *command]
    log = directory / "stderr.log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment(environ or {}, directory, uses_uvloop=uses_uvloop),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    assert process.stdout is not None
    with process.stdout, outliving_nobody(process):  # nor its workers: it was started as the leader of a group
        yield GatewayProcess(process, log)
