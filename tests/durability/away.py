"""The database of a shared queue goes away while mail comes and leaves, stays away, and comes back.

What is claimed: no mail is answered 250 meanwhile, but 451; what is under way goes on, and is recorded later; the
gateways say that they are not ready, hold no more memory for each mail that they refuse, and need no help afterwards.
"""

import asyncio
import contextlib
import json
import smtplib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.durability.sharing import TAKEOVER_SECONDS, queue_command
from tests.end_to_end.test_health import readiness
from tests.spool.postgresql.schemas import new_place
from tests.support.capture import CapturingUpstream
from tests.support.ports import unclaimed_port
from tests.support.postgresql import Server
from tests.support.process import GatewayProcess, gateway, until

LEAST_REFUSED: Final = 200
"""Mails of each gateway."""
FLAT_OCTETS: Final = 4 * 1024 * 1024
"""What a gateway may grow by in the second half, however long that takes; its page's traces are complete by then, or
few."""


@dataclass
class Absence:
    """What became of mail while the database was away.

    Attributes:
        refused: replies to mail that came when the gateways knew of it.
        early: subjects of mail that came before they knew, and the replies.
        grown_octets: of each gateway's memory, in the second half of the time.
        delivered: how often each subject was.
        recorded: recipients that were delivered, as the queue has it.
        back_seconds: from the database's start until mail was taken again.
    """

    refused: Counter[int] = field(default_factory=Counter)
    early: dict[str, int] = field(default_factory=dict)
    grown_octets: list[int] = field(default_factory=list)
    delivered: Counter[str] = field(default_factory=Counter)
    recorded: int = 0
    back_seconds: float = 0.0
    log: str = ""

    @property
    def is_right(self) -> bool:
        """Whether all that is claimed holds."""
        there = {"before", "under way", "again"} | {one for one, code in self.early.items() if code == 250}
        return (
            set(self.refused) == {451}
            and set(self.early.values()) <= {250, 451}
            and self.delivered == Counter(there)
            and self.recorded == len(there)
            and max(self.grown_octets) < FLAT_OCTETS
            and "internal error" not in self.log
        )

    def told(self) -> str:
        """One line."""
        grown = ", ".join(f"{octets / 1024:.0f}" for octets in self.grown_octets)
        return (
            f"refused: {dict(self.refused)}; sent as it went: {self.early}; delivered: {dict(self.delivered)}, "
            f"{self.recorded} recorded; memory grew by {grown} KiB; mail was taken again {self.back_seconds:.1f} s "
            "after the database's start"
        )


def send(port: int, subject: str) -> int:
    """A mail; the code of the reply to it."""
    with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
        client.ehlo()
        code, _ = client.mail("app@example.com")
        if code == 250:
            client.rcpt("user@example.net")
            code, _ = client.data(f"Subject: {subject}\r\n\r\nHello\r\n".encode())
    return code


@contextlib.contextmanager
def _sent_beside(absence: Absence, port: int, subject: str) -> Iterator[None]:
    """A mail that is sent while something else is done; its reply is waited for."""

    def sending() -> None:
        absence.early[subject] = send(port, subject)

    thread = threading.Thread(target=sending)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def go_away(directory: Path, seconds: float, *, tell: Callable[[str], None] = lambda _: None) -> Absence:
    """Take the database away from two gateways.

    Args:
        seconds: for how long mail is sent after the gateways know.
    """
    absence = Absence()
    server = Server().start()
    try:
        place = asyncio.run(new_place(server, takeover_seconds=TAKEOVER_SECONDS))
        statuses = [unclaimed_port(), unclaimed_port()]
        with CapturingUpstream() as upstream, contextlib.ExitStack() as stack:
            running: list[GatewayProcess] = []
            for status in statuses:
                (run := directory / f"gateway{len(running)}").mkdir()
                settings = {
                    "upstream.url": upstream.url,
                    "delivery.mode": "queue",
                    "spool.url": place.url,
                    "spool.schema": place.schema,
                    "spool.takeover_after": f"{TAKEOVER_SECONDS}s",
                    "spool.retry": ["1s"],
                    "status.address": f"127.0.0.1:{status}",
                    "log.level": "warning",
                    # One client's connections, all of which fail.
                    "limits.connections_per_client": 1000,
                }
                running.append(stack.enter_context(gateway(settings, run)))
            assert send(running[0].port, "before") == 250
            upstream.wait_for_messages(1)
            held = upstream.hold("content")
            assert send(running[1].port, "under way") == 250
            assert held.reached.wait(30)
            server.stop()
            with contextlib.ExitStack() as beside:
                for number, one in enumerate(running):
                    beside.enter_context(_sent_beside(absence, one.port, f"early {number}"))
                until(
                    lambda: all(readiness(status)[0] == 503 for status in statuses) or None,
                    "the gateways know that they are not ready",
                    timeout_seconds=60,
                )
                # Its reply comes while there is nowhere to record it, and nobody's lease is sure any more.
                held.release()
                upstream.wait_for_messages(2, 30)
                _refuse(absence, running, seconds, tell)
                assert all(readiness(status)[0] == 503 for status in statuses)
                server.start()
                began = time.monotonic()
                until(lambda: send(running[1].port, "again") == 250 or None, "mail is taken", timeout_seconds=60)
                absence.back_seconds = time.monotonic() - began
            until(lambda: all(readiness(status)[0] == 200 for status in statuses) or None, "all are ready again")
            queue = directory / "gateway0" / "settings.toml"
            until(
                lambda: queue_command(queue, "list", "--json") == "" or None,
                "all has ended",
                timeout_seconds=60,
            )
            absence.recorded = json.loads(queue_command(queue, "counts"))["recipients"]["delivered"]
            for one in running:
                assert one.stop() == 0
                absence.log += one.stderr
            absence.delivered.update(
                message.content.partition(b"Subject: ")[2].partition(b"\r\n")[0].decode()
                for message in upstream.messages
            )
    finally:
        server.remove()
    return absence


def _refuse(absence: Absence, running: list[GatewayProcess], seconds: float, tell: Callable[[str], None]) -> None:
    """Send mail to gateways that cannot take it."""
    began = time.monotonic()
    before: list[int] = []
    sent = 0
    while sent < LEAST_REFUSED or time.monotonic() < began + seconds:
        for one in running:
            absence.refused[send(one.port, "refused")] += 1
        sent += 1
        if not before and sent >= LEAST_REFUSED // 2 and time.monotonic() >= began + seconds / 2:
            before = [one.memory("VmRSS") for one in running]
        if sent % 1000 == 0:
            held = ", ".join(f"{one.memory('VmRSS') / 1048576:.1f}" for one in running)
            tell(f"{sum(absence.refused.values())} refused; resident: {held} MiB")
    absence.grown_octets = [one.memory("VmRSS") - octets for one, octets in zip(running, before, strict=True)]
