"""One upstream and its pool of real connections; `reaching` opens them."""

import asyncio

from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.pool import RECLAIM_SOONEST_SECONDS
from otel_smtp.forwarding.reaching import Reaching
from otel_smtp.forwarding.tickets import Decision, Ticket
from otel_smtp.forwarding.tls import UpstreamTlsContext


class Smarthost(Reaching):
    """An upstream to which mail is relayed.

    Args:
        hostname: our name in EHLO.
        sweep: calls `check_clock` while anything can be late.
        ceiling: of its connections, shared with other workers; None without any.
        learnt: called when `extensions` or `is_unheard` has changed.
        room_made: called when more mails may be under way.
        shown: makes the upstream's words, which may name people, fit for log lines.

    Attributes:
        settings: as configured. `name`: its name there. `endpoint`: where it is.
        pace: the limits for its mails, if any.
        slots: of its connections, if they need any.
        extensions: what its last EHLO offered; None before the first.
        is_unheard: it is unknown so far both what it offers and whether it can be asked.
        take: `take(now)` takes an idle connection, by the loop's clock; None: see `ask`. `release` gives it back.
            During a pause in a transaction others may get it: see `UpstreamConnection.parked`.
        failed_at, failure: when a connection to it last failed, and how, in a word; None: never.
        last_fault: likewise, with its words.

    Raises:
        OSError: a file of its TLS settings cannot be read.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<Smarthost {self.settings.name} {self.endpoint} {self._pool!r}>"

    def concurrency(self) -> int:
        """How many mails may be under way to it now."""
        most = self._pool.concurrency(asyncio.get_running_loop().time())
        return most if self.pace is None else self.pace.concurrency(most)

    @property
    def is_over(self) -> bool:
        """Whether it has neither connections nor waiters."""
        return self._pool.is_empty

    # Use of connections -----------------------------------------------------------------------------------

    def ask(self, *, fresh: bool = False, since: float | None = None) -> Ticket[UpstreamConnection]:
        """Ask for a connection. A decision to open one is followed by `open`.

        Args:
            fresh: it must be unused: the others may all be as stale as the one that just died.
            since: its place among the waiters is as if it had asked then; None: the last.
        """
        loop = self._loop = asyncio.get_running_loop()
        ticket = self._pool.ask(loop.time(), fresh=fresh, since=since)
        self._close_what_is_over()
        self._be_swept()
        if ticket.decision is Decision.WAITING:
            self._reclaim_soon()
        return ticket

    def _reclaim_soon(self) -> None:
        if self._reclaiming is None:
            assert self._loop is not None
            self._reclaiming = self._loop.call_later(RECLAIM_SOONEST_SECONDS / 2, self._reclaim)

    def _reclaim(self) -> None:
        assert self._loop is not None
        self._reclaiming = None
        goes_on = self._pool.serve(self._loop.time())
        self._close_what_is_over()
        if goes_on:
            self._reclaim_soon()

    def _be_swept(self) -> None:
        if not self._is_swept:
            self._is_swept = True
            self._sweep.add(self.check_clock)

    def withdraw(self, ticket: Ticket[UpstreamConnection]) -> None:
        """The mail that asked is gone."""
        assert self._loop is not None
        self._pool.withdraw(ticket, self._loop.time())
        self._close_what_is_over()

    def release(self, connection: UpstreamConnection, *, answered: bool) -> None:
        """Give a connection back; it is kept if it is in step, otherwise closed.

        Args:
            answered: the upstream has answered all commands.
        """
        assert self._loop is not None
        pool = self._pool
        if connection.messages == 1 and isinstance(self._context, UpstreamTlsContext):
            self._context.keep_session(connection.stream.tls_object)
        pool.release(connection, self._loop.time(), answered=answered)
        if pool.closing:
            self._close_what_is_over()

    # Calls of time and peers --------------------------------------------------------------------------------

    def check_clock(self, now: float) -> None:
        """End exchanges that take too long, and close connections idle for too long."""
        for connection in tuple(self._connections):
            connection.check_deadline(now)
        self._pool.expire(now, most_wait_seconds=self.settings.timeouts.pool)
        self._close_what_is_over()
        if self._pool.is_empty:
            self._is_swept = False
            self._sweep.remove(self.check_clock)

    def retire(self) -> None:
        """Others replace it: close idle connections, and each other connection after its current mail.

        Transactions that have chosen this upstream may still ask for connections, and end here.
        """
        self._pool.retire()
        self._close_what_is_over()

    def close(self) -> None:
        """Close idle connections, and those in use when they are released. Idempotent."""
        if self.pace is not None:
            self.pace.close()
        self._pool.close()
        self._close_what_is_over()

    def _lost(self, connection: UpstreamConnection) -> None:
        assert self._loop is not None
        self._pool.lost(connection, self._loop.time())
        self._close_what_is_over()

    def _close_what_is_over(self) -> None:
        for connection in self._pool.take_closing():
            self._connections.discard(connection)
            if self.slots is None:
                connection.close()
            else:
                connection.part(self._gone)

    # Slots, see `SlotUser` ---------------------------------------------------------------------------------

    def _gone(self, has_noticed: bool) -> None:
        assert self._loop is not None
        self._pool.gone(self._loop.time(), lingers=not has_noticed)
        self._close_what_is_over()
        if self._parted is not None and not self._pool.is_parting:
            self._parted.set()

    def wanted_slots(self) -> int:
        """How many more connections would be opened now."""
        wanted = 0 if self._loop is None else self._pool.wanted_slots(self._loop.time())
        return wanted + int(self._learning is not None)

    def look(self) -> None:
        """There may be slots, or others may wait for them."""
        if self._learning is not None and not self._learning.done():
            self._learning.set_result(None)
        if self._loop is not None:
            self._pool.look_at_slots(self._loop.time())
            self._close_what_is_over()
        self._room_made()

    async def parted(self) -> None:
        """Wait until the upstream has noticed the end of closed connections, and all slots are free."""
        if self.slots is None:
            return
        self._pool.retire()
        self._close_what_is_over()
        if self._pool.is_parting:
            self._parted = asyncio.Event()
            await self._parted.wait()
        await self.slots.wait_reported()
