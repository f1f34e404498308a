"""Opening connections to one upstream, and the knowledge of it: its extensions, whether it can be reached.

Connections are opened for mails with a ticket, for probes, and to learn the upstream's extensions before there is any
mail for it.
"""

import asyncio
import contextlib
import logging
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Final

from otel_smtp.forwarding.ceiling import Ceiling
from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.faults import ConnectFailed, CredentialsRefused, NoConnectionFree, UpstreamFault
from otel_smtp.forwarding.opening import NotePhase, open_connection
from otel_smtp.forwarding.pace import Pace
from otel_smtp.forwarding.pool import Pool
from otel_smtp.forwarding.settings import UpstreamSettings
from otel_smtp.forwarding.slots import AnySlots
from otel_smtp.forwarding.snapshots import PoolSnapshot
from otel_smtp.forwarding.tickets import Decision, Ticket
from otel_smtp.forwarding.tls import UpstreamTlsContext
from otel_smtp.net import Sweep
from otel_smtp.observing import DeliveryPhase
from otel_smtp.smtp import replies
from otel_smtp.smtp.extensions import Extensions
from otel_smtp.smtp.replies import Reply
from otel_smtp.smtp.states import TlsMode

logger: Final = logging.getLogger("otel_smtp.forwarding.reaching")

LEARN_AGAIN_SECONDS: Final = 1.0  # after the first failure; doubled after each further one
LEARN_AGAIN_MOST_SECONDS: Final = 60.0
SLOT_SECONDS: Final = 1.0
"""How long clients are promised nothing while its extensions are unknown for lack of a connection slot."""

Opened = Callable[[UpstreamConnection | None, UpstreamFault | None], None]
"""Takes the opened connection, or the fault; neither: the ticket waits again, or was decided otherwise meanwhile. It
must not raise.
"""


class _WaitsAgain(Exception):
    """No connection was opened, without a verdict."""


class Reaching(ABC):
    """One upstream and its connections; see `Smarthost` for arguments and attributes."""

    __slots__ = (
        "__weakref__",
        "_connections",
        "_context",
        "_hostname",
        "_is_swept",
        "_learning",
        "_learnt",
        "_level",
        "_loop",
        "_parted",
        "_pool",
        "_reclaiming",
        "_room_made",
        "_sweep",
        "endpoint",
        "extensions",
        "failed_at",
        "failure",
        "is_unheard",
        "last_fault",
        "name",
        "pace",
        "settings",
        "shown",
        "slots",
        "take",
    )

    def __init__(
        self,
        settings: UpstreamSettings,
        hostname: str,
        sweep: Sweep,
        ceiling: Ceiling | None = None,
        pace: Pace | None = None,
        learnt: Callable[[], None] | None = None,
        slots: AnySlots | None = None,
        room_made: Callable[[], None] = lambda: None,
        shown: Callable[[str], str] = str,
    ) -> None:
        self.settings = settings
        self.name = settings.name
        self.pace = pace
        self.slots = slots
        self.shown = shown
        self._room_made = room_made
        self._learning: asyncio.Future[None] | None = None  # done when there may be a slot for that
        self._parted: asyncio.Event | None = None  # waited for at the end
        self.endpoint = settings.endpoint
        self.extensions: Extensions | None = None
        self.is_unheard = True
        self._learnt = learnt
        self.failed_at: float | None = None
        self.failure: str | None = None
        self.last_fault: UpstreamFault | None = None
        self._hostname = hostname
        self._context = self.tls_context()
        self._pool: Pool[UpstreamConnection] = Pool(settings.limits, ceiling, slots)
        if slots is not None:
            slots.watch(self)
        self.take = self._pool.take
        self._connections: set[UpstreamConnection] = set()  # all that are open
        self._sweep = sweep
        self._is_swept = False
        self._reclaiming: asyncio.TimerHandle | None = None  # while a ticket waits
        self._level = self._pool.ceiling.level  # of which the log has a line
        self._loop: asyncio.AbstractEventLoop | None = None

    def snapshot(self) -> PoolSnapshot:
        """Its pool at this moment."""
        return self._pool.snapshot()

    @property
    def heard_at(self) -> float | None:
        """When it last accepted a connection or answered, by the loop's clock; None: never."""
        return self._pool.heard_at

    @property
    def retry_at(self) -> float | None:
        """When the next attempt is allowed, by the loop's clock; None if it is not in backoff."""
        return self._pool.breaker.retry_at

    @property
    def is_reachable(self) -> bool:
        """Whether the latest news of it is good, or there is none."""
        return self.failed_at is None or (self.heard_at is not None and self.heard_at >= self.failed_at)

    @property
    def most_recipients(self) -> int:
        """How many recipients it takes in one transaction, as far as known."""
        return self.settings.most_recipients(self.extensions)

    @abstractmethod
    def ask(self, *, fresh: bool = False, since: float | None = None) -> Ticket[UpstreamConnection]:
        """Ask for a connection."""

    @abstractmethod
    def withdraw(self, ticket: Ticket[UpstreamConnection]) -> None:
        """The mail that asked is gone."""

    @abstractmethod
    def release(self, connection: UpstreamConnection, *, answered: bool) -> None:
        """Give a connection back."""

    @abstractmethod
    def wanted_slots(self) -> int:
        """See `SlotUser`."""

    @abstractmethod
    def look(self) -> None:
        """See `SlotUser`."""

    @abstractmethod
    def _reclaim_soon(self) -> None:
        """A ticket waits: look soon whether a parked connection can be reclaimed."""

    @abstractmethod
    def _be_swept(self) -> None:
        """Register with the sweep, as something can be late."""

    @abstractmethod
    def _close_what_is_over(self) -> None:
        """Close the connections that the pool has dropped."""

    @abstractmethod
    def _lost(self, connection: UpstreamConnection) -> None:
        """An idle connection died."""

    # Opened for a mail -------------------------------------------------------------------------------------

    def open(self, ticket: Ticket[UpstreamConnection], note: NotePhase, opened: Opened) -> "asyncio.Task[None]":
        """Open a connection for a ticket; until it is open, the task may be cancelled."""
        assert self._loop is not None
        opening = self._loop.create_task(self._open_for(ticket, note, opened))
        # A task cancelled before its first step never runs: only its end is certain.
        opening.add_done_callback(self._opening_ended)
        return opening

    def _opening_ended(self, opening: "asyncio.Task[None]") -> None:
        assert self._loop is not None
        if opening.cancelled():
            self._pool.gave_up(self._loop.time())

    async def _open_for(self, ticket: Ticket[UpstreamConnection], note: NotePhase, opened: Opened) -> None:
        try:
            connection = await self._open(ticket, note)
        except _WaitsAgain:
            opened(None, None)
        except UpstreamFault as fault:
            opened(None, fault)
        except Exception:
            logger.exception(
                "connecting to the upstream failed: internal error", extra={"upstream": self.settings.name}
            )
            opened(None, UpstreamFault("internal error", replies.INTERNAL))
        else:
            opened(connection, None)

    async def _open(self, ticket: Ticket[UpstreamConnection], note: NotePhase) -> UpstreamConnection:
        assert self._loop is not None
        try:
            connection = await open_connection(self.settings, self._context, self._hostname, note)
        except ConnectFailed as fault:
            last = self.last_fault = _alone(fault)
            self._learn(self.extensions)
            if self._pool.failed(ticket, self._loop.time(), last):
                self._reclaim_soon()
                self._tell_ceiling(fault)
                raise _WaitsAgain from None
            self._note(fault)
            raise
        except Exception:
            self._pool.gave_up(self._loop.time())
            raise
        connection.on_lost = self._lost
        self._connections.add(connection)
        self._learn(connection.extensions)
        self._pool.opened(ticket, connection, self._loop.time())
        self._tell_ceiling(None)
        return connection

    def _tell_ceiling(self, fault: UpstreamFault | None) -> None:
        """Log a newly learnt connection cap."""
        level = self._pool.ceiling.level
        if level == self._level:
            return
        is_less, self._level = level < self._level, level
        why = {} if fault is None else self.fault_fields(fault)
        words = {"upstream": self.settings.name, "connections": int(level), **why}
        if is_less:
            logger.warning("upstream connection cap reached; mail waits", extra=words)
        else:
            logger.info("upstream connection cap raised", extra=words)

    # Probes, and learning the extensions --------------------------------------------------------

    async def connect(self, note: NotePhase) -> UpstreamConnection:
        """Open a connection for a probe, not for a mail; give it back by `release`.

        Raises:
            ConnectFailed: an attempt failed.
            NoConnectionFree: no attempt was made.
        """
        if (connection := self.take(asyncio.get_running_loop().time())) is not None:
            return connection
        ticket = self.ask()
        if ticket.decision is not Decision.OPEN:
            self.withdraw(ticket)
            raise self.no_connection(ticket)
        try:
            return await self._open(ticket, note)
        except _WaitsAgain:
            self.withdraw(ticket)
            assert ticket.fault is not None
            raise ticket.fault from None
        except ConnectFailed as fault:
            logger.warning(
                "no connection to the upstream", extra={"upstream": self.settings.name, **self.fault_fields(fault)}
            )
            raise
        except asyncio.CancelledError:
            assert self._loop is not None
            self._pool.gave_up(self._loop.time())
            raise

    async def probe(self) -> None:
        """Connect and send EHLO, if that is allowed now; the connection is kept for the next mail."""
        try:
            connection = await self.connect(_note_nothing)
        except UpstreamFault:
            return  # already noted
        self.release(connection, answered=False)

    async def learn(self) -> None:
        """Connect, again and again, until this or a mail has learnt its extensions; the connection is kept for a mail.

        The breaker does not count it: no mail should wait because the upstream was away before there was any mail.
        """
        wait_seconds = LEARN_AGAIN_SECONDS
        while self.extensions is None:
            try:
                if self.slots is not None and not await self._slot_to_learn(self.slots):
                    return
                connection = await self._open_unasked()
            except ConnectFailed as fault:
                self._learn(None)
                level = logging.WARNING if wait_seconds == LEARN_AGAIN_SECONDS else logging.DEBUG
                extra = {"upstream": self.settings.name}
                logger.log(level, "no connection to the upstream", extra=extra | self.fault_fields(fault))
            except Exception:
                extra = {"upstream": self.settings.name}
                logger.exception("connecting to the upstream failed: internal error", extra=extra)
                return
            else:
                self._keep(connection)
                return
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, LEARN_AGAIN_MOST_SECONDS)

    def _learn(self, extensions: Extensions | None) -> None:
        """Note its extensions; None: it could not be asked."""
        self.extensions = extensions
        self.is_unheard = False
        if self._learnt is not None:
            self._learnt()

    async def _slot_to_learn(self, slots: AnySlots) -> bool:
        """Take a slot; False: the upstream's extensions are known by now."""
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        try:
            while not slots.take(loop.time()):
                self._learning = loop.create_future()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SLOT_SECONDS):
                        await self._learning
                if self.extensions is not None:
                    return False
                if self.is_unheard and loop.time() - asked_at >= SLOT_SECONDS:
                    self._learn(None)
        finally:
            self._learning = None
        return True

    async def _open_unasked(self) -> UpstreamConnection:
        opening: list[tuple[DeliveryPhase, Reply | None]] = []

        def note(phase: DeliveryPhase, reply: Reply | None) -> None:
            opening.append((phase, reply))

        try:
            connection = await open_connection(self.settings, self._context, self._hostname, note)
        except BaseException:
            if self.slots is not None:
                self.slots.give_back(asyncio.get_running_loop().time(), lingers=True)
            raise
        connection.opening = opening
        return connection

    def _keep(self, connection: UpstreamConnection) -> None:
        """Add a connection that no ticket asked for to the pool."""
        loop = self._loop = asyncio.get_running_loop()
        if self.extensions is None:
            self._learn(connection.extensions)
        connection.on_lost = self._lost
        self._connections.add(connection)
        self._be_swept()
        self._pool.add(connection, loop.time())
        self._close_what_is_over()

    # Faults ---------------------------------------------------------------------------------------

    def no_connection(self, ticket: Ticket[UpstreamConnection]) -> UpstreamFault:
        """The fault of a ticket that got no connection: for an upstream in backoff, the fault that caused it."""
        if ticket.decision is Decision.FAILED and ticket.fault is not None:
            return ticket.fault
        last = self.last_fault
        if self.retry_at is not None and last is not None:
            return NoConnectionFree(f"not tried again yet: {last}", last.reply, last.upstream_reply)
        said = ticket.fault.upstream_reply if ticket.fault is not None else None
        return NoConnectionFree("all connections are busy", replies.UPSTREAM_BUSY, said)

    def credentials_refused(self, fault: CredentialsRefused, named: Mapping[str, object]) -> None:
        """It refused a mail for a reason that the operator must mend.

        Args:
            named: the log fields of the mail, and of this upstream.
        """
        assert self._loop is not None
        self._note(fault)
        logger.error("upstream refused our credentials", extra={**named, **self.fault_fields(fault)})

    def fault_fields(self, fault: UpstreamFault) -> dict[str, object]:
        """The log fields of a fault."""
        said = fault.upstream_reply
        return {
            "fault": str(fault),
            "code": said.code if said is not None else None,
            "reply": self.shown(str(said)) if said is not None else None,
        }

    def _note(self, fault: UpstreamFault) -> None:
        assert self._loop is not None
        self.last_fault = _alone(fault)
        self.failed_at, self.failure = self._loop.time(), str(fault.reply.error_type)

    # TLS ---------------------------------------------------------------------------------------------------

    def tls_context(self) -> ssl.SSLContext | None:
        """Make a context from the current content of its TLS files; None for an upstream in the clear.

        Raises:
            OSError: a file cannot be read, or is not usable.
        """
        settings = self.settings
        if settings.tls is TlsMode.OFF:
            return None
        return settings.tls_context or UpstreamTlsContext.create(
            ca_file=settings.ca_file, certificate_file=settings.certificate_file, key_file=settings.key_file
        )

    def secure_by(self, context: ssl.SSLContext | None) -> None:
        """Use this TLS context from the next connection on."""
        self._context = context


def _alone(fault: UpstreamFault) -> UpstreamFault:
    """A fault without its cause and traceback, which would keep frames, and so a mail, alive."""
    return UpstreamFault(str(fault), fault.reply, fault.upstream_reply)


def _note_nothing(phase: DeliveryPhase, reply: Reply | None) -> None:
    """The steps of a probe belong to no delivery."""
