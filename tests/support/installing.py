"""Other people's libraries that tests use, installed once, from the registry that their installer is set to."""

import contextlib
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

INSTALL_SECONDS: Final = 90.0
# How npm says what it has to say and nothing else.
# It gives a registry that does not answer up soon, and says nothing that is not about that.
NPM: Final = (
    "npm",
    "install",
    "--ignore-scripts",
    "--no-audit",
    "--no-fund",
    "--loglevel=error",
    "--fetch-retry-mintimeout=1000",
)


class NotInstalledError(Exception):
    """What keeps a library from being installed; the message is for people."""


def installed(name: str, prepare: Callable[[Path], Sequence[str]]) -> Path:
    """The directory in which libraries lie that are kept between runs.

    Args:
        name: of the directory; what other libraries or versions are has another name.
        prepare: writes into a new directory what the installer reads, and returns the installer's command.

    Raises:
        NotInstalledError: they could not be installed.
    """
    home = _own_directory() / name
    if not home.is_dir() and (problem := _install(prepare, home)) is not None:
        raise NotInstalledError(problem)
    return home


@functools.cache  # what does not work is tried once
def _install(prepare: Callable[[Path], Sequence[str]], home: Path) -> str | None:
    """Install at `home`; what keeps it from that."""
    # Whole or not at all: tests run in several processes, and one may be stopped in the middle.
    with tempfile.TemporaryDirectory(dir=home.parent) as directory:
        whole = Path(directory, "whole")
        whole.mkdir()
        command = prepare(whole)
        try:
            done = subprocess.run(
                command,
                cwd=whole,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=INSTALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{command[0]} did not install {home.name} within {INSTALL_SECONDS:.0f} s"
        if done.returncode != 0:
            return f"{command[0]} cannot install {home.name}: {(done.stderr or done.stdout).strip()[-300:]}"
        with contextlib.suppress(OSError):  # another process was quicker
            whole.rename(home)
    return None


def _own_directory() -> Path:
    """Writable by this user only: programs are run from it."""
    directory = Path(tempfile.gettempdir()) / f"otel-smtp-tests-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise NotInstalledError(f"{directory} is not this user's alone")
    return directory
