"""A shared queue under a steady rate while an old transaction in another session keeps vacuum from its work.

What is claimed: mail goes on at that rate, and the gateway raises an alarm. How long claims take is stated.
"""

import asyncio
import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from otel_smtp.smtp import replies
from otel_smtp.spool.messages import End, Verdict
from otel_smtp.spool.postgresql import PostgresqlStore
from otel_smtp.spool.store import Pending
from tests.spool.messages import message, written
from tests.spool.postgresql.schemas import new_place, store
from tests.support.postgresql import Server, connected

TICK_SECONDS: Final = 0.05
TELL_SECONDS: Final = 30.0
BODY: Final = b"\r\n" + (b"x" * 78 + b"\r\n") * 128  # 10 KiB


@dataclass
class Churn:
    """What it came to.

    Attributes:
        first, last: how long claims took in the first and in the last `TELL_SECONDS` with the old transaction, in
            seconds; after: when it had ended and vacuum was done.
        alarms: what the gateway said of vacuum.
    """

    sent: int = 0
    ended: int = 0
    rate: float = 0.0
    dead_rows: int = 0
    first: Sequence[float] = ()
    last: Sequence[float] = ()
    after: Sequence[float] = ()
    alarms: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        """Whether all that is claimed holds."""
        return self.sent == self.ended > 0 and [alarm.rpartition(" ")[2] for alarm in self.alarms] == ["up", "up"]

    def told(self) -> str:
        """One line."""
        return (
            f"{self.sent} sent, {self.ended} ended, {self.rate:.0f}/s; {self.dead_rows} dead rows at the end of the "
            f"old transaction; claims at first {_times(self.first)}, at last {_times(self.last)}, after vacuum "
            f"{_times(self.after)}; alarms: {self.alarms}"
        )


def _times(claims: Sequence[float]) -> str:
    if len(claims) < 2:
        return "-"
    cuts = statistics.quantiles(claims, n=100)
    return f"p50 {cuts[49] * 1000:.1f} ms, p99 {cuts[98] * 1000:.1f} ms"


class _Alarms(logging.Handler):
    def __init__(self, alarms: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._alarms = alarms

    def emit(self, record: logging.LogRecord) -> None:
        self._alarms.append(record.getMessage())


async def churn(seconds: float, rate: float, *, tell: Callable[[str], None] = lambda _: None) -> Churn:
    """Submit, claim and end messages, none of which is leased when it is submitted.

    Args:
        seconds: how long the other transaction lasts.
        rate: messages a second.
    """
    done = Churn()
    alarms = _Alarms(done.alarms)
    logging.getLogger("otel_smtp.spool.postgresql.vacuum").addHandler(alarms)
    server = Server("shared_buffers = 128MB", "max_wal_size = 2GB").start()
    try:
        place = await new_place(server)
        gateway = store(place)
        await gateway.open()
        running = _Running(gateway, rate, done)
        async with connected(place.url) as other:
            async with other.transaction(isolation="repeatable_read"):
                await other.execute("SELECT")  # from here on, all rows that go are kept for it
                began = time.monotonic()
                running.start()
                while (left := began + seconds - time.monotonic()) > 0:
                    await asyncio.sleep(min(left, TELL_SECONDS))
                    done.last = running.take_claims()
                    done.first = done.first or done.last
                    tell(f"{time.monotonic() - began:.0f} s: {done.sent} sent, claims {_times(done.last)}")
                done.rate = done.ended / (time.monotonic() - began)
            done.dead_rows = await _dead_rows(other, place.schema)
            if done.alarms:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(600):
                        while len(done.alarms) < 2:  # noqa: ASYNC110 - autovacuum comes in its own time
                            await asyncio.sleep(1)
            running.take_claims()
            await asyncio.sleep(min(seconds, TELL_SECONDS))
            done.after = running.take_claims()
        await running.stop()
        await gateway.close()
    finally:
        logging.getLogger("otel_smtp.spool.postgresql.vacuum").removeHandler(alarms)
        server.remove()
    return done


async def _dead_rows(connection: Any, schema: str) -> int:
    found: int = await connection.fetchval(
        "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relid = $1::text::regclass", f"{schema}.dlv"
    )
    return found


class _Running:
    """The load."""

    def __init__(self, gateway: PostgresqlStore, rate: float, done: Churn) -> None:
        self._gateway = gateway
        self._rate = rate
        self._done = done
        self._claims: list[float] = []
        self._is_over = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(one) for one in (self._submit(), self._deliver())]

    def take_claims(self) -> list[float]:
        taken, self._claims = self._claims, []
        return taken

    async def stop(self) -> None:
        self._is_over = True
        await asyncio.gather(*self._tasks)

    async def _submit(self) -> None:
        began = time.monotonic()
        submitted: set[Pending[Any]] = set()
        while not self._is_over:
            while self._done.sent < (time.monotonic() - began) * self._rate:
                draft = await written(self._gateway.draft(), b"Subject: churn\r\n", BODY)
                answer = self._gateway.submit(message(), draft, lease=False)
                submitted.add(answer)
                answer.add_done_callback(submitted.discard)
                self._done.sent += 1
                if self._done.sent % 50 == 0:
                    await asyncio.sleep(0)
            await asyncio.sleep(TICK_SECONDS)
        await asyncio.gather(*submitted)

    async def _deliver(self) -> None:
        verdicts = (Verdict(0, End.DELIVERED, replies.OK),)
        while not self._is_over or self._done.ended < self._done.sent:
            began = time.perf_counter()
            found, _ = await self._gateway.claim({"up": 100})
            self._claims.append(time.perf_counter() - began)
            await asyncio.gather(*(self._gateway.finish(lease, verdicts) for lease, _ in found))
            self._done.ended += len(found)
            if len(found) < 100:
                await asyncio.sleep(TICK_SECONDS)
