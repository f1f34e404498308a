"""nodemailer, the client of most Node.js applications: npm installs it, once, from the registry that it is set to."""

import contextlib
import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.support.tools import missing, tool

# The last version that runs on Node.js 18, which is Debian 12's.
VERSION: Final = "9.1.1"
INSTALL_SECONDS: Final = 90.0
_SCRIPT: Final = Path(__file__).with_name("nodemailer_send.js")


def send(
    options: Mapping[str, Any], sender: str, recipients: Sequence[str], file: Path
) -> subprocess.CompletedProcess[str]:
    """Send one message.

    Args:
        options: for `createTransport`; the path `tls.ca` is replaced by what the file holds.
        file: the message in wire form; nodemailer stuffs its dots.

    Returns:
        How node ended, and what it said: on stdout the accepted and rejected recipients as JSON.
    """
    told = {"options": options, "envelope": {"from": sender, "to": list(recipients)}, "file": str(file)}
    return subprocess.run(
        [tool("node"), str(_SCRIPT)],
        input=json.dumps(told),
        env={**os.environ, "NODE_PATH": str(installed())},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def installed() -> Path:
    """The directory of modules that nodemailer lies in; the test is skipped, or fails in CI, where there is none."""
    home = _own_directory() / f"nodemailer-{VERSION}"
    if not home.is_dir() and (problem := _install(tool("npm"), home)) is not None:
        missing(problem)
    return home / "node_modules"


@functools.cache  # what does not work is tried once
def _install(npm: str, home: Path) -> str | None:
    """Install it at `home`; what keeps it from that."""
    # Whole or not at all: tests run in several processes, and one may be stopped in the middle.
    with tempfile.TemporaryDirectory(dir=home.parent) as directory:
        quietly = ("--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--fetch-retry-mintimeout=1000")
        try:
            done = subprocess.run(
                [npm, "install", *quietly, f"--prefix={directory}/whole", f"nodemailer@{VERSION}"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"npm did not install nodemailer within {INSTALL_SECONDS:.0f} s"
        if done.returncode != 0:
            return f"npm cannot install nodemailer: {done.stderr.strip()[:300]}"
        with contextlib.suppress(OSError):  # another process was quicker
            Path(directory, "whole").rename(home)
    return None


def _own_directory() -> Path:
    """Where what was installed is kept between runs, writable by nobody else: programs are run from it."""
    directory = Path(tempfile.gettempdir()) / f"otel-smtp-tests-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        missing(f"{directory} is not this user's alone")
    return directory
