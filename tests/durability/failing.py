"""A disk that fails: errors injected into one system call after the other, and a file system that fills up.

What is claimed: what was answered 250 is delivered after a restart; what could not be made durable was answered 4yz;
the gateway stays up, and says in its log what happened.
"""

import contextlib
import os
import shutil
import smtplib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.durability.killing import is_empty, queue_command
from tests.durability.upstream import CountingUpstream
from tests.support.ports import unclaimed_port
from tests.support.process import GatewayProcess, gateway, until
from tests.support.tools import tool

CALLS: Final = (
    ("fdatasync", "EIO"),  # segments, large contents, and the index
    ("fsync", "EIO"),  # directories
    ("rename", "EIO"),
    ("pwrite64", "EIO"),  # segments, and the index
    ("pwrite64", "ENOSPC"),
)
MAILS: Final = 6


@dataclass
class Outcome:
    """What one fault came to."""

    started: bool = True
    replies: list[int] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    survived: bool = True
    log: str = ""
    lost: set[str] = field(default_factory=set)
    is_damaged: bool = False  # the next start missed something

    def told(self) -> str:
        """One line."""
        if not self.started:
            return "refused to start"
        state = "alive" if self.survived else "DEAD"
        return f"replies {self.replies}, {state}, {len(self.lost)} lost{', DAMAGED' if self.is_damaged else ''}"


def settings_of(spool: Path, upstream_port: int) -> dict[str, Any]:
    """Mode queue, attempts that come again at once."""
    return {
        "upstream.url": f"smtp://127.0.0.1:{upstream_port}",
        "delivery.mode": "queue",
        "spool.directory": str(spool),
        "spool.retry": ["1s"],
        "limits.message_size": "1MiB",
    }


def send(port: int, one: str, *, octets: int = 100) -> int:
    """Send one mail; the code of its last reply."""
    try:
        with smtplib.SMTP("127.0.0.1", port, timeout=20) as session:
            session.ehlo()
            for code, _ in (session.mail("app@example.com"), session.rcpt("user@example.net")):
                if code != 250:
                    return code
            code, _ = session.data(f"X-Id: {one}\r\n\r\n".encode() + (b"x" * 78 + b"\r\n") * (octets // 80))
            return code
    except smtplib.SMTPServerDisconnected:
        return 0


def inject(call: str, error: str, when: int, directory: Path) -> Outcome:
    """Let the `when`th `call` fail, once, while mails are taken; then start anew without the fault."""
    outcome = Outcome()
    directory.mkdir()
    spool = directory / "spool"
    # So that the fault hits mail, not the start.
    with gateway(settings_of(spool, unclaimed_port()), directory) as first:
        first.stop()
    strace = [
        tool("strace"), "-f", "-qq", "-o", os.devnull, "--seccomp-bpf",
        "-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}",
    ]  # fmt: skip
    try:
        with gateway(settings_of(spool, unclaimed_port()), directory, under=strace) as running:
            for number in range(MAILS):
                code = send(running.port, str(number), octets=200_000 if number % 3 == 2 else 100)
                outcome.replies.append(code)
                if code == 250:
                    outcome.accepted.append(str(number))
            outcome.survived = running.is_running
            outcome.log = running.stderr
    except AssertionError:
        outcome.started = False
    _deliver_what_is_left(outcome, spool, directory)
    return outcome


def _deliver_what_is_left(outcome: Outcome, spool: Path, directory: Path) -> None:
    with CountingUpstream(0) as upstream:
        upstream.is_willing = True
        with gateway(settings_of(spool, upstream.port), directory) as again:
            queue_command(spool, "release", "--all")
            until(lambda: is_empty(spool) or None, "everything is delivered", timeout_seconds=60)
            again.stop()
            outcome.is_damaged = "its content is missing" in again.stderr
        outcome.lost = {one for one in outcome.accepted if not upstream.taken[one]}


# A full disk --------------------------------------------------------------------------------------------------


def may_mount() -> bool:
    """Whether this process may make a file system of its own, in a name space of its own."""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
        ).returncode
    )


@contextlib.contextmanager
def small_disk(directory: Path, octets: int) -> Iterator[list[str]]:
    """The command that runs another one with a small file system at `directory`, which is gone with it."""
    directory.mkdir()
    script = f'mount -t tmpfs -o size={octets} tmpfs "$0" && exec "$@"'
    yield ["unshare", "-rm", "--kill-child", "sh", "-c", script, str(directory)]


@dataclass
class FullDisk:
    """What a full disk came to.

    Attributes:
        accepted, refused: before it was full, and when it was.
        accepted_later: after room was made by delivering.
    """

    accepted: int = 0
    refused: int = 0
    refusals: set[int] = field(default_factory=set)
    accepted_later: int = 0
    lost: set[str] = field(default_factory=set)
    log: str = ""

    def told(self) -> str:
        """One line."""
        return (
            f"{self.accepted} answered 250, then {self.refused} refused with {sorted(self.refusals)}; after delivery "
            f"{self.accepted_later} more; {len(self.lost)} lost"
        )


def fill(directory: Path, *, octets: int = 40 * 1024 * 1024) -> FullDisk:
    """Queue mail on a small disk until it is refused, let it be delivered, and queue some more."""
    outcome = FullDisk()
    directory.mkdir()
    with CountingUpstream(0) as upstream, small_disk(directory / "disk", octets) as under:
        upstream.is_closed = True
        accepted: list[str] = []
        with gateway(settings_of(directory / "disk" / "spool", upstream.port), directory, under=under) as running:
            for number in range(1000):
                code = send(running.port, str(number), octets=400_000)
                if code == 250:
                    accepted.append(str(number))
                    outcome.accepted += 1
                    continue
                outcome.refused += 1
                outcome.refusals.add(code)
                if outcome.refused == 5:
                    break
            upstream.is_closed = False
            upstream.is_willing = True
            _wait_for(running, upstream, accepted)
            for number in range(1000, 1003):
                code = until(
                    lambda number=number: _accepted(running.port, str(number)),  # type: ignore[misc]
                    "mail is taken again", timeout_seconds=20,
                )  # fmt: skip
                outcome.accepted_later += code == 250
                accepted.append(str(number))
            _wait_for(running, upstream, accepted)
            outcome.lost = {one for one in accepted if not upstream.taken[one]}
            outcome.log = running.stderr
    return outcome


def _accepted(port: int, one: str) -> int | None:
    code = send(port, one, octets=1000)
    return code if code == 250 else None


def _wait_for(running: GatewayProcess, upstream: CountingUpstream, accepted: list[str]) -> None:
    until(lambda: all(upstream.taken[one] for one in accepted) or None, "everything is delivered", timeout_seconds=60)
    assert running.is_running
