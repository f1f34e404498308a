"""nodemailer, the client of most Node.js applications: npm installs it, once, from the registry that it is set to."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.support import installing
from tests.support.tools import missing, tool

# The last version that runs on Node.js 18, which is Debian 12's.
VERSION: Final = "9.1.1"
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
    tool("npm")
    try:
        return installing.installed(f"nodemailer-{VERSION}", _install) / "node_modules"
    except installing.NotInstalledError as problem:
        missing(str(problem))


def _install(home: Path) -> list[str]:
    return [*installing.NPM, f"--prefix={home}", f"nodemailer@{VERSION}"]
