"""Drives what others can make grow far beyond its bound, in a gateway that has no more memory than deploy/ gives it.

A drive has what it attacks (rows of `otel_smtp.config.bounds.LEDGER`) and how. The attack runs in a process of its own,
so that it takes no time from the honest client that sends mail beside it, and asserts that the bound is kept. Claimed
of every drive:

* the gateway lives, in 384 MiB of address space, which is more than what it may have of memory;
* each mail of the honest client is taken, and 99 of 100 within `P99_SECONDS`;
* what was allocated is given back: afterwards it holds at most `KEPT` more than before.
"""

import contextlib
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trustme

from otel_smtp.server.users import users_line
from tests.support.capture import CapturingUpstream
from tests.support.dialogue import UpstreamScript
from tests.support.honest import HonestClient
from tests.support.process import GatewayProcess, gateway, until

MIB: Final = 1024 * 1024
MEMORY: Final = 384 * MIB  # what deploy/ gives a container
KEPT: Final = 24 * MIB  # of the heap, and what is made once at first use
# Many times what a mail takes, and far below what people notice; an attack that is not bounded makes mail wait for
# seconds.
P99_SECONDS: Final = 1.5
MAILS: Final = 100
ATTACK_SECONDS: Final = 600
# Each thread of the C library's would take 64 MiB of addresses for itself, and use none of them.
ONE_ARENA: Final = {"MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True, slots=True)
class Site:
    """What an attack needs to know.

    Attributes:
        port, status_port: of the gateway; 0: it has no status port.
        directory: where it runs; its log is stderr.log.
    """

    port: int
    status_port: int
    directory: Path

    @property
    def log(self) -> str:
        """What the gateway has logged."""
        return (self.directory / "stderr.log").read_text(encoding="utf-8", errors="replace")


Peer = Callable[[], AbstractContextManager[str]]
"""A server that the gateway talks to: its URL."""


@dataclass(frozen=True, slots=True)
class Drive:
    """How some rows are driven beyond their bounds.

    Attributes:
        rows: by what grows.
        to: how far, in words.
        attack: by another process; it raises `AssertionError` where a bound is not kept.
        settings: of the gateway; "{directory}" and "{peer}" in them are filled in.
        environ: likewise.
        peer: runs beside the gateway: a collector, a receiver; or an upstream, where a setting names it so.
        script: of the upstream.
        head: what honest clients send first.
        mails_per_connection: of the honest client.
        keeps: octets that may be held afterwards, where more than `KEPT`.
        is_log_read: False: it goes to a pipe that nobody reads.
        is_long: takes minutes.
        may_be_refused: the honest client's mail is, too, for now.
    """

    rows: tuple[str, ...]
    to: str
    attack: Callable[[Site], None]
    settings: Mapping[str, Any] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    peer: Peer | None = None
    script: UpstreamScript | None = None
    head: bytes = b""
    mails_per_connection: int = 1_000_000
    keeps: int = KEPT
    is_log_read: bool = True
    is_long: bool = False
    may_be_refused: bool = False

    @property
    def name(self) -> str:
        """That of the attack."""
        return self.attack.__name__


@dataclass(frozen=True, slots=True)
class Driven:
    """What came of a drive; memory in octets."""

    drive: Drive
    before: int
    peak: int
    after: int
    mails: int
    p50_seconds: float
    p99_seconds: float
    seconds: float

    HEADING = (
        "| what grows | driven to | resident before | peak | after | honest mails | p50 | p99 | seconds |\n"
        + "|---" * 9
        + "|"
    )

    def told(self) -> str:
        """A line of the table."""
        memory = " | ".join(f"{octets / MIB:.0f} MiB" for octets in (self.before, self.peak, self.after))
        return (
            f"| {'; '.join(self.drive.rows)} | {self.drive.to} | {memory} | {self.mails} "
            f"| {self.p50_seconds * 1000:.1f} ms | {self.p99_seconds * 1000:.0f} ms | {self.seconds:.0f} |"
        )

    def check(self) -> None:
        """Raise `AssertionError` where a claim does not hold."""
        assert self.peak < MEMORY
        assert self.after - self.before < self.drive.keeps, (
            f"{(self.after - self.before) / MIB:.0f} MiB are not given back"
        )
        assert self.p99_seconds < P99_SECONDS


def run(drive: Drive, directory: Path, *, mails: int = MAILS) -> Driven:
    """Attack until the honest client has sent so many mails.

    Raises:
        AssertionError: the gateway ended, a mail was not taken, or a bound was not kept.
    """
    with _running(drive, directory) as (running, site):
        with HonestClient(
            running.port,
            head=drive.head,
            mails_per_connection=drive.mails_per_connection,
            may_be_refused=drive.may_be_refused,
        ) as honest:
            until(lambda: len(honest.seconds) >= mails or None, "mails in quiet", timeout_seconds=60)
            before = running.memory("VmRSS")
            Path(f"/proc/{running.pid}/clear_refs").write_text("5")  # resets VmHWM
            del honest.seconds[:]
            began = time.monotonic()
            _as_another_process(drive.attack, site)
            while len(honest.seconds) < mails:
                _as_another_process(drive.attack, site)
            seconds = time.monotonic() - began
        assert running.is_running, running.stderr[-2000:]
        p99 = honest.p99(least=mails)
        peak = running.memory("VmHWM")
        with contextlib.suppress(TimeoutError):
            until(lambda: running.memory("VmRSS") - before < drive.keeps or None, "given back")
        after = running.memory("VmRSS")
        taken = sorted(honest.seconds)
        return Driven(drive, before, peak, after, len(taken), taken[len(taken) // 2], p99, seconds)


def prepare(directory: Path) -> None:
    """Write what settings name: users, and a certificate."""
    (directory / "users").write_text(users_line("bob", "right") + "\n", encoding="utf-8")
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(directory / "cert.pem"))


@contextlib.contextmanager
def _running(drive: Drive, directory: Path) -> Iterator[tuple[GatewayProcess, Site]]:
    prepare(directory)
    with ExitStack() as stack:
        upstream = stack.enter_context(CapturingUpstream(drive.script))
        peer = stack.enter_context(drive.peer()) if drive.peer is not None else ""

        def filled(value: Any) -> Any:
            return value.format(directory=directory, peer=peer) if isinstance(value, str) else value

        settings = {"upstream.url": upstream.url, "log.level": "error", "limits.connections": 64, **drive.settings}
        limited = f"ulimit -v {MEMORY // 1024}"
        if not drive.is_log_read:
            os.mkfifo(directory / "unread")
            limited += f" && exec 2<>{directory}/unread"  # which does not wait for a reader
        running = stack.enter_context(
            gateway(
                {name: filled(value) for name, value in settings.items()},
                directory,
                environ={**ONE_ARENA, **{name: filled(value) for name, value in drive.environ.items()}},
                under=["sh", "-c", f'{limited} && exec "$0" "$@"'],
            )
        )
        status = re.search(r"http://127\.0\.0\.1:(\d+);", running.ready_line)
        yield running, Site(running.port, int(status[1]) if status else 0, directory)


def _as_another_process(attack: Callable[[Site], None], site: Site) -> None:
    process = multiprocessing.get_context("fork").Process(target=attack, args=(site,))
    process.start()
    process.join(ATTACK_SECONDS)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, f"{attack.__name__}: {process.exitcode}"
