"""A real PostgreSQL server, started by the tests in a directory of its own, as an ordinary user."""

import atexit
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import asyncpg

from tests.support.ports import unclaimed_port
from tests.support.process import until
from tests.support.tools import missing

_USER: Final = 65534  # nobody: initdb refuses root
OWNER: Final = "owner"


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    path = shutil.which("initdb")
    if path is None:
        missing("initdb is not installed (Debian package postgresql)")
    return Path(path).parent


def _as_nobody() -> dict[str, Any]:
    return {"user": _USER, "group": _USER, "extra_groups": []} if os.geteuid() == 0 else {}


class Server:
    """One server.

    Args:
        settings: lines of its configuration.
        standby_of: it follows that one.
        parent: of its directory; others must be able to enter it.
    """

    def __init__(self, *settings: str, standby_of: "Server | None" = None, parent: Path = Path("/tmp")) -> None:
        self._programs = _programs()
        self.directory = Path(tempfile.mkdtemp(prefix="pg-", dir=parent))
        self.port = unclaimed_port()
        if os.geteuid() == 0:
            os.chown(self.directory, _USER, _USER)
        if standby_of is None:
            # What it makes need not outlast the machine; what the server writes then is synced, as everywhere.
            self._run(
                "initdb", "--pgdata", self.data, "--username", OWNER, "--auth", "trust", "--encoding", "UTF8",
                "--no-sync",
            )  # fmt: skip
        else:
            self._run(
                "pg_basebackup", "--pgdata", self.data, "--host", "127.0.0.1", "--port", str(standby_of.port),
                "--username", OWNER, "--write-recovery-conf", "--checkpoint", "fast", "--wal-method", "stream",
                "--no-sync",
            )  # fmt: skip
        with (self.directory / "data" / "postgresql.conf").open("a") as file:
            file.write(
                f"\nlisten_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = '{self.directory}'\n"
                "shared_buffers = 32MB\nmax_connections = 100\nlog_min_messages = warning\n"
                + "\n".join(settings)
                + "\n"
            )
        if standby_of is None:
            # Everybody may come in, but for one who needs a password.
            rules = self.directory / "data" / "pg_hba.conf"
            rules.write_text("host all locked all scram-sha-256\n" + rules.read_text())
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.remove)

    @property
    def data(self) -> str:
        """Its directory of data."""
        return str(self.directory / "data")

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments], capture_output=True, text=True, check=False, cwd="/",
            **_as_nobody(),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> "Server":
        """Start it, and wait until it answers."""
        log = (self.directory / "log").open("ab")
        self.process = subprocess.Popen(
            [str(self._programs / "postgres"), "-D", self.data], stdout=log, stderr=log, cwd="/", **_as_nobody()
        )
        log.close()
        until(lambda: self._answers() or None, "the server answers", timeout_seconds=60)
        return self

    def _answers(self) -> bool:
        done = subprocess.run(
            [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)], check=False, cwd="/"
        )
        return done.returncode == 0

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """End it: at once, without a checkpoint, unless `how` says otherwise."""
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(how)
            process.wait(60)

    def promote(self) -> None:
        """Make a standby the primary."""
        self._run("pg_ctl", "promote", "--pgdata", self.data, "--wait")

    def remove(self) -> None:
        """End it, and remove its directory."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def url(self, database: str = "postgres", *, user: str = OWNER, **parameters: str) -> str:
        """For `spool.url`."""
        query = "&".join(f"{name}={value}" for name, value in parameters.items())
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}" + (f"?{query}" if query else "")

    def wait_for(self, statement: str) -> None:
        """Wait until a statement gives a row."""
        until(lambda: self.do(statement) or None, statement)

    def run_file(self, path: Path, database: str, *, user: str = OWNER, **environ: str) -> None:
        """Run a file of statements, as psql does."""
        command = [str(self._programs / "psql"), "-qX", "-v", "ON_ERROR_STOP=1", "-f", str(path)]
        done = subprocess.run(
            [*command, self.url(database, user=user)],
            capture_output=True, text=True, check=False, env={**os.environ, **environ},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    def do(self, *statements: str, database: str = "postgres") -> list[Any]:
        """Run statements, outside of any event loop; the rows of the last."""
        done = subprocess.run(
            [
                str(self._programs / "psql"), "-qAtX", "-v", "ON_ERROR_STOP=1", "-F", "\t", self.url(database),
                *(part for statement in statements for part in ("-c", statement)),
            ],
            capture_output=True, text=True, check=False, cwd="/",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [line.split("\t") for line in done.stdout.splitlines()]


_server: Server | None = None


def server() -> Server:
    """The server that the tests of this process share; each test uses a schema of its own."""
    global _server
    if _server is None or _server.process is None:
        _server = Server().start()
    return _server


@contextlib.asynccontextmanager
async def connected(url: str) -> Any:
    """A connection of the test's own."""
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()
