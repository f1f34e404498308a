"""One upstream: its pool, brought to life with real connections. How these come about: see `reaching`."""

import asyncio

from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.pool import RECLAIM_SOONEST_SECONDS
from otel_smtp.forwarding.reaching import Reaching
from otel_smtp.forwarding.tickets import Decision, Ticket
from otel_smtp.forwarding.tls import UpstreamTlsContext


class Smarthost(Reaching):
    """One upstream that mail is relayed to.

    Args:
        hostname: what we call ourselves in EHLO.
        sweep: calls `check_clock` while there is anything that can be late.
        ceiling: of its connections, shared with other workers; None: there are none.
        learnt: called when `extensions` or `is_unheard` has changed.
        room_made: called when more mails may be under way.
        shown: what log lines may show of the upstream's words, which may name people.

    Attributes:
        settings: as configured. `name`: its name there. `endpoint`: where it is.
        pace: the limits that its mails are held to; None: there are none.
        slots: of its connections; None: they need none.
        extensions: what its last EHLO offered; None before the first.
        is_unheard: it is not known yet what it offers, nor that it cannot be asked now.
        take: `take(now)`: a connection that is idle, by the loop's clock; None: see `ask`. It is given back by
            `release`. In the middle of a transaction others may need it more: see `UpstreamConnection.parked`.
        failed_at, failure: when a connection to it last failed, and what became of it, in a word; None: never.
        last_fault: likewise, with what it said.

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
        """Whether it has no connection, and no waiter for one."""
        return self._pool.is_empty

    # Use of connections -----------------------------------------------------------------------------------

    def ask(self, *, fresh: bool = False, since: float | None = None) -> Ticket[UpstreamConnection]:
        """Ask for a connection. A decision to open one is followed by `open`.

        Args:
            fresh: none that was used before: those may all be as stale as the one that just died.
            since: keep the place among the waiters that it had then; None: behind them.
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
        """Give a connection back; it is kept if it is in step, else closed.

        Args:
            answered: it answered what it was asked.
        """
        assert self._loop is not None
        pool = self._pool
        if connection.messages == 1 and isinstance(self._context, UpstreamTlsContext):
            self._context.keep_session(connection.stream.tls_object)
        pool.release(connection, self._loop.time(), answered=answered)
        if pool.closing:
            self._close_what_is_over()

    # What time and peers do --------------------------------------------------------------------------------

    def check_clock(self, now: float) -> None:
        """End what takes too long, and close what has been idle for too long."""
        for connection in tuple(self._connections):
            connection.check_deadline(now)
        self._pool.expire(now, most_wait_seconds=self.settings.timeouts.pool)
        self._close_what_is_over()
        if self._pool.is_empty:
            self._is_swept = False
            self._sweep.remove(self.check_clock)

    def retire(self) -> None:
        """Others take its place: close what is idle, and each connection after the mail that it carries now.

        Transactions that have chosen this upstream may still ask for connections, and come to their end here.
        """
        self._pool.retire()
        self._close_what_is_over()

    def close(self) -> None:
        """Close what is idle, and whatever is in use when it is released. Idempotent."""
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
        """Wait until the upstream has noticed the end of the connections that were closed, and all slots are free."""
        if self.slots is None:
            return
        self._pool.retire()
        self._close_what_is_over()
        if self._pool.is_parting:
            self._parted = asyncio.Event()
            await self._parted.wait()
        await self.slots.told()
