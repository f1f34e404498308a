"""Random signals and kills to a supervisor and its workers; at the end there are N workers of one generation.

The real gateway: workers are killed while they start, serve and drain, stopped and continued, asked to replace one
another many times in a row. A worker that was leaked, or one too few, shows at the end, when everything is quiet.
"""

import contextlib
import os
import random
import signal
import smtplib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.durability.upstream import CountingUpstream
from tests.support.process import GatewayProcess, gateway, listening_sockets, until

# A restart waits up to 30 s, and a successor that was stopped is killed after 60 s.
QUIET_SECONDS: Final = 120.0

TO_PARENT: Final = (signal.SIGUSR2, signal.SIGUSR2, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
TO_WORKER: Final = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGSEGV)


@dataclass
class Storm:
    """What the storm came to.

    Attributes:
        workers: children that are left in quiet, of how many asked for.
        listening: sockets that listen on the port.
        is_one_generation: whether none is older than the last SIGUSR2.
        orphans: processes that outlived their parent's kill -9.
        mails: taken by the upstream at the end, of twenty.
    """

    asked: int
    signals: int = 0
    seen: int = 0
    workers: int = 0
    listening: int = 0
    is_one_generation: bool = False
    orphans: int = 0
    mails: int = 0

    @property
    def is_right(self) -> bool:
        """Whether everything is as it was before."""
        return (
            self.workers == self.listening == self.asked
            and self.is_one_generation
            and self.orphans == 0
            and self.mails == 20
        )

    def told(self) -> str:
        """One line."""
        return (
            f"{self.signals} signals, {self.seen} workers seen; at the end {self.workers} of {self.asked}, "
            f"{self.listening} listening, {'one generation' if self.is_one_generation else 'OLD ONES'}, "
            f"{self.mails} of 20 mails, {self.orphans} orphans after kill -9 of the parent"
        )


def storm(
    seconds: float, directory: Path, *, seed: int = 1, workers: int = 3, tell: Callable[[str], None] = lambda _: None
) -> Storm:
    """Signal at random for so long, wait for quiet, and count."""
    chance = random.Random(seed)
    outcome = Storm(workers)
    with CountingUpstream(seed) as upstream:
        upstream.is_willing = True
        settings = {
            "upstream.url": f"smtp://127.0.0.1:{upstream.port}",
            "workers": workers,
            "timeouts.shutdown_grace": "2s",
        }
        with gateway(settings, directory) as running:
            ends = time.monotonic() + seconds
            while time.monotonic() < ends:
                _strike(running, chance, outcome)
                time.sleep(chance.choice((0.0, 0.01, 0.05, 0.2, 0.5)))
                assert running.is_running, running.stderr
            for process_id in running.children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGCONT)
            tell(f"{outcome.signals} signals; waiting for quiet")
            # What stood at the last question is not to be there at the end.
            before = running.children
            running.signal(signal.SIGUSR2)
            with contextlib.suppress(TimeoutError):
                until(
                    lambda: (_is_quiet(running, workers) and not running.children & before) or None,
                    "quiet",
                    timeout_seconds=QUIET_SECONDS,
                )
            time.sleep(1)
            after = running.children
            outcome.workers, outcome.listening = len(after), listening_sockets(running.port)
            outcome.is_one_generation = not after & before
            for number in range(20):
                with contextlib.suppress(OSError, smtplib.SMTPException):
                    _send(running.port, str(number))
            outcome.mails = len(upstream.taken)
            running.signal(signal.SIGKILL)
            running.wait()
            with contextlib.suppress(TimeoutError):
                until(lambda: not any(map(_lives, after)) or None, "all have ended", timeout_seconds=15)
            outcome.orphans = sum(map(_lives, after))
            for process_id in filter(_lives, after):
                os.kill(process_id, signal.SIGKILL)
    return outcome


def _strike(running: GatewayProcess, chance: random.Random, outcome: Storm) -> None:
    outcome.signals += 1
    if chance.random() < 0.5:
        running.signal(chance.choice(TO_PARENT))
        return
    children = sorted(running.children)
    outcome.seen = max(outcome.seen, len(children))
    if not children:
        return
    victim = chance.choice(children)
    with contextlib.suppress(ProcessLookupError):
        if chance.random() < 0.1:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(chance.uniform(0, 0.3))
            os.kill(victim, signal.SIGCONT)
        else:
            os.kill(victim, chance.choice(TO_WORKER))


def _is_quiet(running: GatewayProcess, workers: int) -> bool:
    return len(running.children) == workers == listening_sockets(running.port)


def _lives(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _send(port: int, one: str) -> None:
    with smtplib.SMTP("127.0.0.1", port, timeout=15) as client:
        client.sendmail("a@client.example", ["b@there.example"], f"X-Id: {one}\r\n\r\nHello\r\n")
