"""A disk that fails: errors injected into one system call after the other, and a file system that fills up.

What is claimed: what was answered 250 is delivered after a restart; what could not be made durable was answered 4yz;
the gateway stays up, and says in its log what happened.
"""

import contextlib
import os
import shutil
import signal
import smtplib
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from tests.durability.killing import is_empty, queue_command
from tests.durability.upstream import CountingUpstream
from tests.support.ports import unclaimed_port
from tests.support.process import GatewayProcess, gateway, until
from tests.support.tools import tool

CALLS: Final = (
    ("fdatasync", "EIO"),  # segments, large contents, and the index
    ("fsync", "EIO"),  # directories
    ("rename", "EIO"),
    ("pwritev2", "EIO"),  # groups of records, on a file system of which one call is enough
    ("pwritev2", "ENOSPC"),
    ("pwrite64", "EIO"),  # segments, and the index
    ("pwrite64", "ENOSPC"),
)
MAILS: Final = 15  # of which a third is large: more than there are threads that write these


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
    """Let the `when`th `call` fail, once, while mails are taken; then restart without the fault."""
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
            outcome.is_damaged = "queued content missing" in again.stderr
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


@dataclass
class Starved:
    """What became of queued mail on a disk without an octet free.

    Attributes:
        accepted: before.
        delivered: while nothing was free, through a restart.
        refused: what mail was answered meanwhile.
        accepted_later: when there was room again.
    """

    accepted: int = 0
    delivered: int = 0
    refused: set[int] = field(default_factory=set)
    accepted_later: int = 0
    log: str = ""

    @property
    def is_right(self) -> bool:
        """Whether all went on."""
        return self.accepted == self.delivered > 0 and self.refused == {452} and self.accepted_later > 0

    def told(self) -> str:
        """One line."""
        return (
            f"{self.accepted} answered 250, {self.delivered} of them delivered with 0 octets free; mail was answered "
            f"{sorted(self.refused)} then, and {self.accepted_later} taken when there was room"
        )


@contextlib.contextmanager
def held_disk(directory: Path, octets: int) -> Iterator[tuple[list[str], Path]]:
    """A small file system that outlives the processes on it.

    Returns:
        The command that runs another one with it at `directory`; where it is seen from here.
    """
    directory.mkdir()
    script = f'mount -t tmpfs -o size={octets} tmpfs "$0" && echo mounted && read end'
    holder = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", script, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"mounted\n"
        under = ["nsenter", "-t", str(holder.pid), "-U", "-m", "--preserve-credentials"]
        yield under, Path(f"/proc/{holder.pid}/root{directory}")
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


class Ballast:
    """Takes every octet that is free, again and again.

    Attributes:
        is_tight: nothing was free when it was looked last.
    """

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._is_over = threading.Event()
        self.is_tight = threading.Event()
        self._thread = threading.Thread(target=self._take, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self.is_tight.wait(30)
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join()
        (self._disk / "ballast").unlink()

    def _take(self) -> None:
        with (self._disk / "ballast").open("wb", buffering=0) as file:
            while not self._is_over.is_set():
                for octets in (1024 * 1024, 4096, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(octets)) == octets:
                            pass
                self.is_tight.set()
                self._is_over.wait(0.001)


def until_taken(upstream: CountingUpstream, mails: Sequence[str], amount: int) -> None:
    """Wait until so many were delivered, or it takes too long."""
    with contextlib.suppress(TimeoutError):
        until(
            lambda: sum(upstream.taken[one] > 0 for one in mails) >= amount or None,
            "deliveries go on",
            timeout_seconds=60,
        )


def starve(
    directory: Path, *, mails: int = 300, octets: int = 80 * 1024 * 1024, deferred: float = 0.3, starts: int = 1
) -> Starved:
    """Queue mail, take all the room there is, deliver, and start again in the midst of it.

    Args:
        starts: how often; each start delivers a part of what was queued.
        deferred: share of the attempts that the upstream defers: results that make no room.
    """
    outcome = Starved()
    directory.mkdir()
    accepted = [str(number) for number in range(mails)]
    with CountingUpstream(1, unwilling=deferred) as upstream, held_disk(directory / "disk", octets) as (under, disk):
        settings = settings_of(directory / "disk" / "spool", upstream.port)
        upstream.is_closed = True
        with gateway(settings, directory, under=under) as running:
            for one in accepted:
                outcome.accepted += send(running.port, one, octets=150_000 if int(one) % 50 == 0 else 2_000) == 250
            until(lambda: (disk / "spool" / "log" / "spare").exists() or None, "what is kept in reserve is there")
            with Ballast(disk):
                upstream.is_closed = False
                until(lambda: len(upstream.taken) > mails // 4 or None, "deliveries go on", timeout_seconds=60)
                outcome.refused.add(send(running.port, "late"))
                running.signal(signal.SIGKILL)
                running.wait()
                outcome.log = running.stderr
                for part in range(1, 1 + starts):
                    with gateway(settings, directory, under=under) as again:
                        until_taken(upstream, accepted, len(accepted) * part // starts)
                        outcome.delivered = sum(upstream.taken[one] > 0 for one in accepted)
                        outcome.refused.add(send(again.port, "late"))
                        again.signal(signal.SIGTERM if part % 2 else signal.SIGKILL)
                        again.wait()
                        outcome.log += again.stderr
        with gateway(settings, directory, under=under) as running:
            outcome.accepted_later = send(running.port, "later") == 250
    return outcome


def _accepted(port: int, one: str) -> int | None:
    code = send(port, one, octets=1000)
    return code if code == 250 else None


def _wait_for(running: GatewayProcess, upstream: CountingUpstream, accepted: list[str]) -> None:
    until(lambda: all(upstream.taken[one] for one in accepted) or None, "everything is delivered", timeout_seconds=60)
    assert running.is_running
