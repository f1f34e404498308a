"""One upstream: its pool, brought to life with real connections, and what it said of itself last."""

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Final

from otel_smtp.forwarding.connection import UpstreamConnection, open_connection
from otel_smtp.forwarding.faults import ConnectFailed, NoConnectionFree, UpstreamFault
from otel_smtp.forwarding.pool import RECLAIM_AFTER_SECONDS, Decision, Pool, PoolSnapshot, Ticket
from otel_smtp.forwarding.settings import UpstreamSettings
from otel_smtp.forwarding.tls import UpstreamTlsContext
from otel_smtp.observing import DeliveryObserver, DeliveryPhase
from otel_smtp.smtp.client import Extensions
from otel_smtp.smtp.states import TlsMode

logger: Final = logging.getLogger("otel_smtp.forwarding.smarthost")


class Smarthost:
    """One upstream that mail is relayed to.

    Args:
        hostname: what we call ourselves in EHLO.

    Attributes:
        settings: as configured.
        extensions: what its last EHLO offered; None before the first.
        heard_at: when it last was of use, a connection or an answer; the loop's clock; None: never.
        failed_at, failure: when a connection to it last failed, and what became of it, in a word; None: never.

    Raises:
        OSError: a file of its TLS settings cannot be read.
    """

    __slots__ = (
        "_context",
        "_expiry",
        "_hostname",
        "_loop",
        "_pool",
        "_reclaiming",
        "extensions",
        "failed_at",
        "failure",
        "heard_at",
        "settings",
    )

    def __init__(self, settings: UpstreamSettings, hostname: str) -> None:
        self.settings = settings
        self.extensions: Extensions | None = None
        self.heard_at: float | None = None
        self.failed_at: float | None = None
        self.failure: str | None = None
        self._hostname = hostname
        self._context: ssl.SSLContext | None = None
        if settings.tls is not TlsMode.OFF:
            self._context = settings.tls_context or UpstreamTlsContext.create(
                ca_file=settings.ca_file, certificate_file=settings.certificate_file, key_file=settings.key_file
            )
        self._pool: Pool[UpstreamConnection] = Pool(settings.limits)
        self._expiry: asyncio.TimerHandle | None = None
        self._reclaiming: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"<Smarthost {self.settings.name} {self.settings.endpoint} {self._pool!r}>"

    def snapshot(self) -> PoolSnapshot:
        """Its pool at this moment."""
        return self._pool.snapshot()

    @property
    def is_reachable(self) -> bool:
        """Whether the last that is known of it is good, or nothing is known."""
        return self.failed_at is None or (self.heard_at is not None and self.heard_at >= self.failed_at)

    async def look(self) -> None:
        """Connect to it and say EHLO, if it may be asked now; the connection is kept for the next mail."""
        try:
            connection, _ = await self.acquire(DeliveryObserver())
        except UpstreamFault:
            return  # noted where it happened
        self.release(connection, answered=False)

    def concurrency(self) -> int:
        """How many mails may be under way to it now."""
        return self._pool.breaker.concurrency(asyncio.get_running_loop().time())

    async def acquire(self, seen: DeliveryObserver, *, fresh: bool = False) -> tuple[UpstreamConnection, bool]:
        """A connection that can take a mail, and whether it was used before; give it back by `release`.

        Args:
            fresh: none that was used before: those may all be as stale as the one that just died.

        Raises:
            ConnectFailed: one was tried, and did not come about.
            NoConnectionFree: none was tried.
        """
        loop = self._loop = asyncio.get_running_loop()
        asked_at = loop.time()
        ticket = self._pool.ask(asked_at, fresh=fresh)
        self._close_what_is_over()
        if ticket.decision is Decision.WAITING:
            await self._wait(ticket, loop)
        seen.pooled(wait_seconds=loop.time() - asked_at, reused=ticket.decision is Decision.REUSE)
        seen.phase(DeliveryPhase.POOL)
        if ticket.decision is Decision.NONE:
            raise NoConnectionFree("the upstream is being given a rest")
        if ticket.decision is Decision.REUSE:
            assert ticket.connection is not None
            connection, reused = ticket.connection, True
            connection.stream.on_lost = None
        else:
            connection, reused = await self._open(seen, loop), False
        seen.connected(connection.stream.peer, connection.stream.tls)
        connection.messages += 1
        return connection, reused

    def park(self, connection: UpstreamConnection, on_reclaimed: Callable[[], None]) -> None:
        """Leave a connection alone in the middle of a transaction; others may need it more.

        Args:
            on_reclaimed: called when it was given to another mail.
        """
        assert self._loop is not None
        self._pool.park(connection, self._loop.time(), on_reclaimed)

    def unpark(self, connection: UpstreamConnection) -> None:
        """Go on with it."""
        self._pool.unpark(connection)

    def release(self, connection: UpstreamConnection, *, answered: bool) -> None:
        """Give a connection back; it is kept if it is in step, else closed.

        Args:
            answered: it answered what it was asked.
        """
        loop = self._loop
        assert loop is not None
        now = connection.used_at = loop.time()
        if answered:
            self.heard_at = now
            self._pool.answered(now)
        if isinstance(self._context, UpstreamTlsContext) and connection.messages == 1:
            self._context.keep_session(connection.stream.tls_object)
        connection.stream.on_lost = lambda: self._lost(connection)
        self._pool.release(connection, now)
        self._close_what_is_over()
        if self._expiry is None:
            self._expiry = loop.call_later(self.settings.limits.idle_seconds, self._expire)

    def close(self) -> None:
        """Close what is idle, and whatever is in use when it is released. Idempotent."""
        self._pool.close()
        self._close_what_is_over()
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if self._reclaiming is not None:
            self._reclaiming.cancel()
            self._reclaiming = None

    async def _wait(self, ticket: Ticket[UpstreamConnection], loop: asyncio.AbstractEventLoop) -> None:
        decided: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not decided.done():
                decided.set_result(None)

        ticket.on_decided = wake
        if self._reclaiming is None:
            self._reclaiming = loop.call_later(RECLAIM_AFTER_SECONDS, self._reclaim)
        try:
            async with asyncio.timeout(self.settings.timeouts.pool):
                await decided
        except TimeoutError as error:
            self._withdraw(ticket, loop)
            raise NoConnectionFree("all connections to the upstream are busy") from error
        except BaseException:
            self._withdraw(ticket, loop)
            raise

    def _withdraw(self, ticket: Ticket[UpstreamConnection], loop: asyncio.AbstractEventLoop) -> None:
        self._pool.withdraw(ticket, loop.time())
        self._close_what_is_over()

    async def _open(self, seen: DeliveryObserver, loop: asyncio.AbstractEventLoop) -> UpstreamConnection:
        try:
            connection = await open_connection(self.settings, self._context, self._hostname, seen)
        except ConnectFailed as fault:
            self.failed_at, self.failure = loop.time(), str(fault.reply.error_type)
            self._pool.failed(loop.time())
            logger.warning(
                "no connection to the upstream",
                extra={
                    "upstream": self.settings.name,
                    "fault": str(fault),
                    "code": fault.upstream_reply.code if fault.upstream_reply is not None else None,
                },
            )
            raise
        except BaseException:
            self._pool.gave_up(loop.time())
            raise
        self._pool.opened()
        self.heard_at = loop.time()
        self.extensions = connection.extensions
        return connection

    def _lost(self, connection: UpstreamConnection) -> None:
        assert self._loop is not None
        self._pool.lost(connection, self._loop.time())
        self._close_what_is_over()

    def _expire(self) -> None:
        assert self._loop is not None
        again_at = self._pool.expire(self._loop.time())
        self._expiry = None if again_at is None else self._loop.call_at(again_at, self._expire)
        self._close_what_is_over()

    def _reclaim(self) -> None:
        assert self._loop is not None
        again_at = self._pool.reclaim(self._loop.time())
        self._reclaiming = None if again_at is None else self._loop.call_at(again_at, self._reclaim)
        self._close_what_is_over()

    def _close_what_is_over(self) -> None:
        for connection in self._pool.take_closing():
            connection.close()
