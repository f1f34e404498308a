"""How an attempt gets a connection: a kept one at once, or one that it requests and waits for, within the limits of the
upstream.

In the common case `_connect` takes an idle connection, and `_begin` continues with it at once. A delivery that waits is
called back by the pool, by the opening of a connection, or by the limits.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial
from time import monotonic_ns
from typing import Any, Final, NamedTuple, Protocol

from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.faults import (
    Paced,
    UpstreamFault,
)
from otel_smtp.forwarding.pace import Pace, WaitingMail
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.forwarding.tickets import Decision, Ticket
from otel_smtp.observing import DeliveryPhase, DeliveryRecord, Observer, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.extensions import missing_extension
from otel_smtp.smtp.replies import Reply

_POOL: Final = DeliveryPhase.POOL  # see `smtp.client.answers` for the reason of these names


class Retry(Enum):
    """The kind of connection on which the same upstream is asked again."""

    ANY = auto()
    FRESH = auto()


class Tried(NamedTuple):
    """The earlier, failed attempts for a mail; most mails have none.

    Attributes:
        faults: of the attempts without a usable answer, in order.
        again: the upstreams that have had their second chance.
        put_off: a refusal on a used connection; a fresh one is asked.
    """

    faults: tuple[UpstreamFault, ...] = ()
    again: frozenset[Smarthost] = frozenset()
    put_off: Reply | None = None


NOTHING_TRIED: Final = Tried()


class Relaying(Protocol):
    """The forwarder of a transaction."""

    @property
    def observer(self) -> Observer:
        """Provides the trace headers of a delivery, and is notified of deliveries that end late."""
        ...

    @property
    def memory_limit_octets(self) -> int:
        """The most memory for one message's body; the rest goes to a temporary file."""
        ...

    @property
    def pace_patience_seconds(self) -> float:
        """How long a client's mail waits for the limits of an upstream."""
        ...

    def watch(self, delivery: Any) -> None:
        """Note a delivery that continues to its end without its client."""
        ...

    def unwatch(self, delivery: Any) -> None:
        """Forget a delivery that has ended."""
        ...


class Connecting(ABC):
    """An attempt and its connection; see `Attempts`, which tries the upstreams, for arguments and attributes.

    `Delivery` sets the initial attributes of all its base classes at once.
    """

    __slots__ = (
        "_attempt",
        "_connection",
        "_is_aborted",
        "_is_connected",
        "_is_open",
        "_is_plain",
        "_mail",
        "_opening",
        "_permission",
        "_record",
        "_relaying",
        "_retry",
        "_since",
        "_smarthost",
        "_ticket",
        "_tried",
        "_was_reused",
        "_work",
        "begins_fresh",
        "has_ended_content",
        "is_under_way",
        "route",
        "waits_for_limits",
    )

    _mail: Mail
    _record: TransactionRecord
    _relaying: Relaying
    route: Sequence[Smarthost]
    _is_plain: bool
    _is_aborted: bool
    begins_fresh: bool
    waits_for_limits: bool
    _tried: "Tried"
    _retry: Retry | None  # the next connection goes to the same upstream, within the same attempt
    _since: float | None  # its place among the waiters for a connection; None: a new one
    _ticket: Ticket[UpstreamConnection] | None
    _permission: WaitingMail | None  # of the upstream's limits, if it has any
    _is_connected: bool
    _is_open: bool  # the upstream has answered MAIL with 2yz on this connection
    is_under_way: bool
    has_ended_content: bool
    _work: Callable[[Any], None]  # takes self: a bound method would form a reference cycle
    _opening: asyncio.Task[None] | None  # set with the ticket
    # Of the attempt; set when it begins, and when it gets its connection.
    _attempt: DeliveryRecord
    _smarthost: Smarthost
    _connection: UpstreamConnection
    _was_reused: bool

    @abstractmethod
    def _recover(self, error: Exception) -> None:
        """Decide what follows from an exception in a step."""

    @abstractmethod
    def _fail(self, fault: UpstreamFault) -> None:
        """Decide what follows from an attempt without a usable answer."""

    @abstractmethod
    def _pass_by(self, refusal: Reply) -> None:
        """The current upstream lacks an extension that the mail needs."""

    @abstractmethod
    def _nobody_left(self) -> None:
        """No upstream is left to be tried."""

    @abstractmethod
    def _recipients_to_come(self) -> int:
        """How many recipients the upstream will be asked about at first."""

    @abstractmethod
    def _has_ascii_recipients(self) -> bool:
        """Whether none of these needs SMTPUTF8."""

    # A connection ------------------------------------------------------------------------------------------

    def _connect(self) -> bool:
        """Begin the next attempt, or go on with this one.

        Returns:
            Whether there is a connection for it at once. Otherwise the work continues when there is one, or has failed.
        """
        now_ns = monotonic_ns()
        route = self.route
        if self._retry is not None:
            smarthost = self._smarthost
            is_fresh = self._retry is Retry.FRESH
            self._retry = None
        elif route:
            smarthost = self._smarthost = route[0]
            self.route = route[1:] if len(route) > 1 else ()
            is_fresh = self.begins_fresh
            record = self._record
            deliveries = record.deliveries
            attempt = DeliveryRecord(record, smarthost.name, smarthost.endpoint, len(deliveries) + 1, now_ns)
            self._attempt = attempt
            deliveries.append(attempt)
            self.is_under_way = True
            if smarthost.pace is not None and self._must_wait(smarthost.pace):
                return False
        else:
            self._nobody_left()
            return False
        # By the loop's clock, as all deadlines, including the age of connections.
        if not is_fresh and (connection := smarthost.take(asyncio.get_running_loop().time())) is not None:
            return self._begin(connection, 0, now_ns)
        self._ask_for_connection(is_fresh=is_fresh)
        return False

    def _begin(self, connection: UpstreamConnection, wait_ns: int | None, now_ns: int) -> bool:
        """Continue with a connection just obtained.

        Args:
            wait_ns: the wait for a used connection; None: it was opened for this attempt.
            now_ns: when it was obtained.

        Returns:
            Whether the work can be done on it. Otherwise the upstream lacks an extension, and was passed by.
        """
        attempt = self._attempt
        if wait_ns is not None:
            self._was_reused = attempt.is_reused = True
            connection.round_trips = 0
            attempt.pool_wait_ns = wait_ns
            attempt.phases.append((now_ns, _POOL, None))
            if connection.opening is not None:
                # Opened before there was any mail, to learn the upstream's extensions: this mail is its first.
                for phase, reply in connection.opening:
                    attempt.phases.append((now_ns, phase, reply))
                attempt.is_reused = False
                connection.opening = None
        else:
            self._was_reused = False
        messages = connection.messages = connection.messages + 1
        if messages >= connection.most_messages:
            connection.is_spent = True
        self._connection = connection
        self._is_connected = True
        self._is_open = False
        attempt.accepted_count = 0  # recipients accepted on an earlier connection are asked about again
        stream, extensions = connection.stream, connection.protocol.extensions
        attempt.peer = stream.peer
        attempt.tls = stream.tls
        declared, size = self._mail.size, extensions.size
        if self._is_plain and (declared is None or not size or declared <= size):
            return True  # like most mail, it needs no extension
        refusal = missing_extension(self._mail, extensions, is_tls=stream.tls is not None)
        # Content declared 8-bit may be 7-bit; if no other upstream is left, the content decides.
        if refusal is not None and (
            refusal is not replies.NEEDS_8BITMIME or (self.route and not self._smarthost.settings.reencode_8bit)
        ):
            self._pass_by(refusal)
            return False
        if self._mail.smtputf8 and not extensions.smtputf8 and not self._has_ascii_recipients():
            self._pass_by(replies.UPSTREAM_LACKS_SMTPUTF8)
            return False
        return True

    def _ask_for_connection(self, *, is_fresh: bool) -> None:
        asked_ns = monotonic_ns()
        self._opening = None
        ticket = self._ticket = self._smarthost.ask(fresh=is_fresh, since=self._since)
        ticket.on_decided = partial(self._decided, ticket, asked_ns)
        if ticket.decision is not Decision.WAITING:
            self._take_decision(ticket, 0)

    def _decided(self, ticket: Ticket[UpstreamConnection], asked_ns: int) -> None:
        try:
            self._take_decision(ticket, monotonic_ns() - asked_ns)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _take_decision(self, ticket: Ticket[UpstreamConnection], wait_ns: int) -> None:
        self._opening = None
        if ticket.connection is not None:
            self._ticket = ticket.on_decided = None
            if self._begin(ticket.connection, wait_ns, monotonic_ns()):
                self._work(self)
            return
        attempt = self._attempt
        attempt.pool_wait_ns = wait_ns
        attempt.is_reused = False
        attempt.phases.append((monotonic_ns(), DeliveryPhase.POOL, None))
        if ticket.decision is not Decision.OPEN:
            self._ticket = ticket.on_decided = None
            raise self._smarthost.no_connection(ticket)
        self._opening = self._smarthost.open(ticket, self._note_phase, self._opened)

    def _opened(self, connection: UpstreamConnection | None, fault: UpstreamFault | None) -> None:
        if connection is None and fault is None:
            return  # see `_decided`
        self._opening = self._ticket = None
        try:
            if connection is not None:
                if self._begin(connection, None, monotonic_ns()):
                    self._work(self)
            elif fault is not None:
                self._fail(fault)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _stop(self) -> None:
        """Stop waiting for a connection."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            opening, self._opening = self._opening, None
            ticket.on_decided = None
            if ticket.decision is Decision.OPEN and opening is not None:
                opening.cancel()
            else:
                self._smarthost.withdraw(ticket)

    # The limits of the upstream ----------------------------------------------------------------------------

    def _must_wait(self, pace: Pace) -> bool:
        """Ask the limits for permission to send; returns whether the mail must wait.

        Raises:
            Paced: it takes too long.
        """
        pace.begun += 1
        leave = self._permission = pace.ask(
            self._recipients_to_come(), self._patience_seconds(), self._leave_decided, with_message=True
        )
        if leave is None:
            pace.begun -= 1
            raise Paced("the limit of a rate is reached")
        return leave.is_waiting

    def _patience_seconds(self) -> float:
        """How long it may wait for the limits of an upstream."""
        return math.inf if self.waits_for_limits else self._relaying.pace_patience_seconds

    def _leave_decided(self, is_given: bool) -> None:
        try:
            assert self._permission is not None
            self._note_wait(self._permission)
            if not is_given:
                raise Paced("the limit of a rate is reached")
            self._retry = Retry.ANY
            if self._connect():
                self._work(self)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _note_wait(self, leave: WaitingMail) -> None:
        now_ns = monotonic_ns()
        self._attempt.note_pace(leave.held_by, now_ns, now_ns - int(leave.since * 1e9))

    # Leaving it --------------------------------------------------------------------------------------------

    def _reclaimed(self) -> None:
        """The parked connection was given to another mail; the work starts again when it has something to send."""
        self._is_connected = False
        self._retry = Retry.ANY
        self._since = self._attempt.begun_ns / 1e9  # of the loop's clock, too

    def _let_go(self, *, answered: bool) -> None:
        connection = self._connection
        self._is_connected = False
        if not connection.is_alive:
            connection.abandon()
        self._smarthost.release(connection, answered=answered)

    def _note_phase(self, phase: DeliveryPhase, reply: Reply | None) -> None:
        self._attempt.phases.append((monotonic_ns(), phase, reply))
