"""Other people's programs: found, or the test is skipped for all to see; with CI=true, a missing one is a failure."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import pytest

from tests.support.process import until

# Where each comes from on Debian.
PACKAGES: Final = {
    "curl": "curl",
    "msmtp": "msmtp",
    "node": "nodejs npm",  # npm brings what node is to run
    "npm": "npm",
    "pgbouncer": "pgbouncer",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "smtp-sink": "postfix",
    "smtp-source": "postfix",
    "strace": "strace",
    "swaks": "swaks",
    "systemd-analyze": "systemd",
}


def tool(name: str) -> str:
    """The path of a program.

    A test that needs one that is missing is skipped, or fails where CI=true: there, nothing may go untested unnoticed.
    """
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        packages = PACKAGES[name]
        missing(f"{name} is not installed (Debian package{'s' if ' ' in packages else ''} {packages})")
    return path


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def run(
    name: str, *arguments: str, stdin: bytes = b"", timeout_seconds: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end; what it says is in the result's stdout and stderr."""
    return subprocess.run(
        [tool(name), *arguments], input=stdin, capture_output=True, timeout=timeout_seconds, check=False
    )


@dataclass(frozen=True, slots=True)
class Sink:
    """A running smtp-sink.

    Attributes:
        directory: where each transaction is dumped as a file of its own.
    """

    port: int
    directory: Path

    @property
    def url(self) -> str:
        """For the upstream setting."""
        return f"smtp://127.0.0.1:{self.port}"

    def contents(self) -> list[bytes]:
        """The content of each message so far, without the fields that smtp-sink puts on top.

        It writes a line of X- fields and a Received field of its own first, and ends lines by LF.
        """
        dumps = [path.read_bytes() for path in sorted(self.directory.iterdir())]
        return [re.sub(rb"\A(?:X-[^\n]*\n)*Received:[^\n]*\n(?:[ \t][^\n]*\n)*", b"", dump) for dump in dumps]


@contextlib.contextmanager
def smtp_sink(directory: Path, *options: str) -> Iterator[Sink]:
    """Run Postfix's smtp-sink on a port of the kernel's choice, dumping into a new directory below `directory`.

    Args:
        options: of smtp-sink, as "-q", "data" to hang up at a command.
    """
    dumps = directory / "sink"
    dumps.mkdir()
    command = [tool("smtp-sink")]
    if os.geteuid() == 0:
        # It asks a superuser whom to be; anybody else could not reach pytest's directories, which each run closes to
        # others when it begins.
        command += ["-u", "root"]
    command += ["-d", f"{dumps}/", *options, "127.0.0.1:0", "100"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            yield Sink(until(lambda: _listening_port(process.pid), "smtp-sink listens"), dumps)
        finally:
            process.kill()


def _listening_port(pid: int) -> int | None:
    """The TCP port on which a process listens: smtp-sink is told 0 and does not tell what it got."""
    inodes: set[str] = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = descriptor.readlink().name
            inodes.update(re.findall(r"socket:\[(\d+)\]", target))
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:
            return int(fields[1].partition(":")[2], 16)
    return None


def swaks(port: int, *arguments: str, body: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    """Send one mail by swaks to 127.0.0.1:`port`.

    Args:
        body: the whole message, as `--data` takes it; None: swaks' own.
    """
    options: Sequence[str] = ("--server", f"127.0.0.1:{port}", "--timeout", "30", "--helo", "client.example")
    data = ("--data", "-") if body is not None else ()
    return run("swaks", *options, *data, *arguments, stdin=body or b"")
