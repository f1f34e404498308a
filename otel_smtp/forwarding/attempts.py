"""The attempts of one mail: along the upstreams that serve it, until one of them gives a usable answer.

* Once the end of the content has been sent (`has_ended_content`) nobody else may be tried: a lost connection means that
  nobody knows whether the mail was delivered, and a second try might deliver it twice.
* Before that, an upstream that gives no usable answer makes way for the next one.
* One connection that dies says little about its upstream. So an upstream that is lost with a kept connection, or in the
  middle of a transaction, or that refuses MAIL for now on a kept one (it may count mails per connection), is tried once
  more on a fresh one, before the next in order, and within the same attempt.

What is done with a connection is not said here: see `delivery`.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic_ns
from typing import Any, Final

from otel_smtp.forwarding.connection import UpstreamConnection
from otel_smtp.forwarding.faults import (
    ConnectFailed,
    ConnectionLost,
    CredentialsRefused,
    NoConnectionFree,
    OutOfStep,
    Paced,
    Spent,
    TimedOut,
    Unsuitable,
    UpstreamFault,
)
from otel_smtp.forwarding.limits import Pace, WaitingMail
from otel_smtp.forwarding.pool import Decision, Ticket
from otel_smtp.forwarding.smarthost import Smarthost, told
from otel_smtp.forwarding.verdicts import asks_for_less
from otel_smtp.observing import DeliveryPhase, DeliveryRecord, Observer, Outcome, TransactionRecord, trace_fields
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail
from otel_smtp.smtp.errors import RemoteProtocolError
from otel_smtp.smtp.extensions import missing_extension
from otel_smtp.smtp.replies import ErrorType, Reply

logger: Final = logging.getLogger("otel_smtp.forwarding.attempts")

_POOL: Final = DeliveryPhase.POOL  # see `smtp.client.answers` for why such names are here


class Attempts(ABC):
    """Carries a piece of work along upstreams.

    A subclass sets `_work`, calls `_proceed`, and has the work done on `_connection`; whatever that raises decides what
    comes next. It ends an attempt by `_end`, and answers by `_answer_for_all` when nobody is left.

    Args:
        record: gets a `DeliveryRecord` for each attempt.
        ended_alone: called when an attempt is over that went on without its client, after `abort`.

    Attributes:
        route: the upstreams that were not tried yet, the preferred one first.
        begins_fresh: the first connection to each upstream is one that was not used before.
        has_ended_content: see above; the subclass says so.
        is_under_way: an attempt has begun and is not over.
        patience_seconds: how long it may wait for the limits of an upstream.
    """

    __slots__ = (
        "_attempt",
        "_connection",
        "_ended_alone",
        "_faults",
        "_first_round_trip",
        "_is_aborted",
        "_is_connected",
        "_is_open",
        "_is_parked",
        "_mail",
        "_observer",
        "_opening",
        "_permission",
        "_put_off",
        "_record",
        "_retries_fresh",
        "_retries_same",
        "_since",
        "_smarthost",
        "_ticket",
        "_tried_again",
        "_was_reused",
        "_work",
        "begins_fresh",
        "has_ended_content",
        "is_under_way",
        "patience_seconds",
        "route",
    )

    _work: Callable[[Any], None]  # takes self: a bound method would keep us alive by a cycle
    # Of the attempt; they are set when it begins, and when it has got its connection.
    _attempt: DeliveryRecord
    _smarthost: Smarthost
    _connection: UpstreamConnection
    _first_round_trip: int
    _was_reused: bool

    def __init__(
        self, mail: Mail, record: TransactionRecord, observer: Observer, ended_alone: Callable[[Any], None]
    ) -> None:
        self._mail = mail
        self._record = record
        self._observer = observer
        self._ended_alone = ended_alone
        self._is_aborted = False
        self.route: Sequence[Smarthost] = ()
        self.begins_fresh = False
        self._faults: list[UpstreamFault] = []
        self._tried_again: frozenset[Smarthost] = frozenset()
        self._put_off: Reply | None = None  # a refusal on a connection that had served before; a fresh one is asked
        self._retries_same = False  # the next connection is one to the same upstream, within the same attempt
        self._retries_fresh = False  # and one that was not used before
        self._since: float | None = None  # its place among those who wait for a connection; None: a new one
        self._ticket: Ticket[UpstreamConnection] | None = None
        self._opening: asyncio.Task[None] | None = None
        self._permission: WaitingMail | None = None  # of the upstream's limits, where it has some
        self.patience_seconds = 0.0
        self.is_under_way = False
        self._is_connected = False
        self._is_parked = False  # the client has nothing to say; the connection may be taken away
        self._is_open = False  # the upstream has answered MAIL with 2yz on this connection
        self.has_ended_content = False

    def is_served_by(self, smarthosts: Sequence[Smarthost]) -> bool:
        """Whether the upstream that has the transaction now, perhaps not the preferred one, is among `smarthosts`."""
        return not self.is_under_way or self._smarthost in smarthosts

    def give_up(self) -> None:
        """End an attempt that goes on without its client: nobody will know what came of it."""
        if self.is_under_way:
            self._attempt.failure = "the gateway ended before the reply came"
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)

    def _stop(self) -> None:
        """Wait for no connection any more."""
        ticket, self._ticket = self._ticket, None
        opening, self._opening = self._opening, None
        if ticket is not None:
            ticket.on_decided = None
            if ticket.decision is Decision.OPEN and opening is not None:
                opening.cancel()
            else:
                self._smarthost.withdraw(ticket)

    @abstractmethod
    def _answer_for_all(self, reply: Reply) -> None:
        """Tell who waits that it came to nothing."""

    # Steps and their faults -------------------------------------------------------------------------------

    def _proceed(self) -> None:
        """Do the work, on the connection at hand, else on the next that is available."""
        try:
            if not self._is_connected:
                if not self._connect():
                    return
            else:
                if self._is_parked:
                    self._is_parked = False
                    self._smarthost.unpark(self._connection)
                if not self._connection.is_alive:
                    self._connection.ensure_alive()
            self._work(self)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Decide what follows from whatever went wrong in a step. Nothing of it reaches those who called us."""
        while True:  # each turn uses up an upstream, a second chance, or the answer
            try:
                if isinstance(error, UpstreamFault):
                    self._fail(error)
                elif isinstance(error, RemoteProtocolError):  # a late reply was there when a command was to be sent
                    self._fail(OutOfStep(str(error)))
                else:
                    self._fail_internally(error)
            except Exception as another:  # noqa: BLE001 - the next attempt failed at once
                error = another
            else:
                return

    def _fail_internally(self, error: Exception) -> None:
        named: dict[str, object] = {}
        if self.is_under_way:
            named = self._named()
            self._attempt.failure = f"internal error: {type(error).__name__}"
        logger.error("delivery attempt failed: internal error", extra=named, exc_info=error)
        if self.has_ended_content:
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)
            self._answer_for_all(replies.INTERNAL_OUTCOME)
        else:
            self._end(Outcome.ABORTED, None, ErrorType.INTERNAL)
            self._answer_for_all(replies.INTERNAL)

    def _fail(self, fault: UpstreamFault) -> None:
        """Decide what follows from an attempt without a usable answer."""
        was_connected = self._is_connected
        if self.has_ended_content:
            # The one case that must never be tried again: it may have been delivered.
            self._attempt.failure = str(fault)
            logger.error("delivery outcome unknown", extra={**self._named(), "fault": str(fault)})
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)
            # The reply says so, too: transaction, log and a later attempt's mark are made of it.
            is_lost = isinstance(fault, ConnectionLost)
            self._answer_for_all(replies.OUTCOME_UNKNOWN if is_lost else replies.GARBLED_OUTCOME)
            return
        if was_connected and isinstance(fault, ConnectionLost) and not isinstance(fault, TimedOut):
            if self._may_try_again and not self._is_aborted:
                self._tried_again |= {self._smarthost}
                self._retries_same = self._retries_fresh = True
                self._put_off = fault.upstream_reply if isinstance(fault, Spent) else None
                self._let_go(answered=False)
                self._next_attempt()
                return
        elif not was_connected and self._put_off is not None and not self._is_aborted:
            # There was no second connection; what it said on the first is its answer.
            self._refused_by(self._put_off)
            return
        if isinstance(fault, CredentialsRefused):
            self._smarthost.credentials_refused(fault)
        self._attempt.failure = str(fault)
        if isinstance(fault, ConnectFailed):
            logger.warning("no connection to the upstream", extra={**self._named(), **told(fault)})
        self._end(Outcome.DEFERRED, fault.upstream_reply, fault.reply.error_type)
        self._faults.append(fault)
        if was_connected and fault.reply is replies.UPSTREAM_PROTOCOL:
            # What it makes of the mail is anybody's guess; the next upstream would be asked behind its back.
            self._answer_for_all(fault.reply)
        elif not self._is_aborted:
            self._next_attempt()

    @property
    def _may_try_again(self) -> bool:
        """Whether the upstream at hand has a second chance for this mail: see the head of the module."""
        return (self._was_reused or self._is_open) and self._smarthost not in self._tried_again

    @abstractmethod
    def _refused_by(self, refusal: Reply) -> None:
        """Take what the upstream at hand said of the mail for its answer."""

    # The way along the upstreams --------------------------------------------------------------------------

    def _next_attempt(self) -> None:
        """Get a connection for the next attempt, or once more for this one, and do the work on it."""
        if self._connect():
            self._work(self)

    def _connect(self) -> bool:
        """Begin the next attempt, or go on with this one.

        Returns:
            Whether there is a connection for it at once. Else the work is done when there is one, or it came to
            nothing.
        """
        is_fresh = False
        if self._retries_same:
            self._retries_same = False
            is_fresh = self._retries_fresh
        elif self.route:
            is_fresh = self.begins_fresh
            smarthost = self._smarthost = self.route[0]
            self.route = self.route[1:]
            record = self._record
            deliveries = record.deliveries
            self._attempt = DeliveryRecord(
                record, smarthost.name, smarthost.endpoint, len(deliveries) + 1, monotonic_ns()
            )
            deliveries.append(self._attempt)
            self.is_under_way = True
            if smarthost.pace is not None and self._must_wait(smarthost.pace):
                return False
        else:
            self._answer_for_all(self._nobody_left())
            return False
        if not is_fresh and (connection := self._smarthost.take(asyncio.get_running_loop().time())) is not None:
            return self._begin(connection, 0)
        self._ask_for_connection(is_fresh=is_fresh)
        return False

    def _ask_for_connection(self, *, is_fresh: bool) -> None:
        asked_ns = monotonic_ns()
        ticket = self._ticket = self._smarthost.ask(fresh=is_fresh, since=self._since)
        ticket.on_decided = partial(self._decided, ticket, asked_ns)
        if ticket.decision is not Decision.WAITING:
            self._take_decision(ticket, 0)

    def _must_wait(self, pace: Pace) -> bool:
        """Ask for leave to send; whether it is still to come.

        Raises:
            Paced: it takes too long.
        """
        pace.begun += 1
        leave = self._permission = pace.ask(
            self._recipients_to_come(), self.patience_seconds, self._leave_decided, with_message=True
        )
        if leave is None:
            pace.begun -= 1
            raise Paced("the limit of a rate is reached")
        return leave.is_waiting

    def _leave_decided(self, is_given: bool) -> None:
        try:
            assert self._permission is not None
            self._note_wait(self._permission)
            if not is_given:
                raise Paced("the limit of a rate is reached")
            self._retries_same = True
            self._retries_fresh = False
            self._next_attempt()
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _note_wait(self, leave: WaitingMail) -> None:
        now_ns = monotonic_ns()
        self._attempt.note_pace(leave.held_by, now_ns, now_ns - int(leave.since * 1e9))

    @abstractmethod
    def _recipients_to_come(self) -> int:
        """How many recipients will be put to the upstream at first."""

    def _decided(self, ticket: Ticket[UpstreamConnection], asked_ns: int) -> None:
        try:
            self._take_decision(ticket, monotonic_ns() - asked_ns)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _take_decision(self, ticket: Ticket[UpstreamConnection], wait_ns: int) -> None:
        self._opening = None
        if ticket.connection is not None:
            self._ticket = ticket.on_decided = None
            if self._begin(ticket.connection, wait_ns):
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
                if self._begin(connection, None):
                    self._work(self)
            elif fault is not None:
                self._fail(fault)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _begin(self, connection: UpstreamConnection, wait_ns: int | None) -> bool:
        """Go on with a connection that has just been got.

        Args:
            wait_ns: for a connection that was used before; None: it was opened for this attempt.

        Returns:
            Whether the work can be done on it. Else the upstream lacks what the mail needs, and was passed by.
        """
        attempt = self._attempt
        if wait_ns is not None:
            attempt.pool_wait_ns = wait_ns
            attempt.is_reused = True
            attempt.phases.append((monotonic_ns(), _POOL, None))
            if connection.opening is not None:
                # Opened before there was a mail for it, to learn what the upstream offers: this mail is its first.
                now_ns = monotonic_ns()
                attempt.phases += [(now_ns, phase, reply) for phase, reply in connection.opening]
                attempt.is_reused = False
                connection.opening = None
        connection.messages += 1
        if connection.messages >= connection.most_messages:
            connection.is_spent = True
        self._connection = connection
        self._is_connected = True
        self._is_open = False
        self._was_reused = wait_ns is not None
        self._first_round_trip = connection.round_trips if wait_ns is not None else 0
        attempt.accepted_count = 0  # who was accepted on a connection before is asked about again
        stream, extensions = connection.stream, connection.protocol.extensions
        attempt.peer = stream.peer
        attempt.tls = stream.tls
        refusal = missing_extension(self._mail, extensions, is_tls=stream.tls is not None)
        # What was declared 8-bit may be 7-bit; where nobody else is left, the content tells.
        if refusal is not None and (
            refusal is not replies.NEEDS_8BITMIME or (self.route and not self._smarthost.settings.reencode_8bit)
        ):
            self._pass_by(refusal)
            return False
        if self._mail.smtputf8 and not extensions.smtputf8 and not self._has_ascii_recipients():
            self._pass_by(replies.UPSTREAM_LACKS_SMTPUTF8)
            return False
        return True

    def _pass_by(self, refusal: Reply) -> None:
        """The upstream at hand lacks what the mail needs: another one may have it, now or when it is well again."""
        fault = Unsuitable("the upstream lacks what the mail needs", refusal)
        self._faults.append(fault)
        self._attempt.failure = str(fault)
        self._end(Outcome.DEFERRED if refusal.is_transient else Outcome.REFUSED, None, refusal.error_type)
        self._next_attempt()

    @abstractmethod
    def _has_ascii_recipients(self) -> bool:
        """Whether those that are put to an upstream at first need no SMTPUTF8."""

    def _nobody_left(self) -> Reply:
        """The reply to the client: rather that it may try again than that it may not."""
        faults = self._faults
        tried = [fault for fault in faults if not isinstance(fault, NoConnectionFree)] or faults
        passing = [fault for fault in reversed(tried) if fault.reply.is_transient]
        if passing:
            # What an upstream said, else what became of one that was reached.
            said = next((fault for fault in passing if fault.upstream_reply is not None), None)
            met = next((fault for fault in passing if fault.reply is not replies.UPSTREAM_UNAVAILABLE), passing[0])
            return (said or met).told
        return tried[0].told if tried else replies.UPSTREAM_UNAVAILABLE

    def _reclaimed(self) -> None:
        """The parked connection is another mail's; the work is begun once more when there is more of it."""
        self._is_connected = self._is_parked = False
        self._retries_same = True
        self._retries_fresh = False
        self._since = self._attempt.begun_ns / 1e9  # of the loop's clock, too

    # The end of an attempt --------------------------------------------------------------------------------

    def _end(
        self, outcome: Outcome, reply: Reply | None, error_type: ErrorType | None, *, answered: bool = False
    ) -> None:
        """The attempt is over: complete its record, and give the connection back. Idempotent.

        Args:
            reply: the upstream's own.
            answered: the upstream is well.
        """
        if not self.is_under_way:
            return
        self.is_under_way = False
        attempt = self._attempt
        is_connected = self._is_connected
        if is_connected:
            connection = self._connection
            attempt.round_trips = connection.round_trips - self._first_round_trip
        attempt.end(outcome, reply, error_type, monotonic_ns())
        if self._permission is not None:
            self._end_leave()
        if is_connected:
            self._let_go(answered=answered)
        if self._record.ended_ns:
            self._observer.delivery_ended(attempt)
        if self._is_aborted:
            self._ended_alone(self)

    def _named(self) -> dict[str, object]:
        """What log lines say of the attempt: whose mail it is, where it is tried, and where its trace has it."""
        record = self._record
        named: dict[str, object] = {"upstream": self._attempt.upstream}
        if record.connection is not None:
            named["connection_id"] = record.connection.info.id
        else:
            named |= {"spool_id": record.spool_id, "attempt": record.attempt}
        return named | trace_fields(self._observer.delivery_carrier(self._attempt))

    def _end_leave(self) -> None:
        pace, leave = self._smarthost.pace, self._permission
        assert pace is not None
        assert leave is not None
        self._permission = None
        pace.begun -= 1
        attempt = self._attempt
        if leave.is_waiting or not attempt.peer:
            pace.withdraw(leave)  # no connection was got, so nothing was said
            return
        if (refusal := _asks_for_less(attempt)) is not None:
            if (seconds := pace.is_too_much(leave)) is not None:
                logger.warning(
                    "upstream asks for less mail; mail waits",
                    extra={**self._named(), "seconds": seconds, "code": refusal.code, "reply": str(refusal)},
                )
        elif attempt.outcome is Outcome.RELAYED:
            pace.got_through()
        pace.landed(leave)

    def _let_go(self, *, answered: bool) -> None:
        connection = self._connection
        self._is_connected = False
        if self._is_parked:
            self._is_parked = False
            self._smarthost.unpark(connection)
        if not connection.is_alive:
            connection.abandon()
        self._smarthost.release(connection, answered=answered)

    def _note_phase(self, phase: DeliveryPhase, reply: Reply | None) -> None:
        self._attempt.phases.append((monotonic_ns(), phase, reply))


def _asks_for_less(attempt: DeliveryRecord) -> Reply | None:
    """What the upstream said of how much it gets, of the message or of a recipient; None: nothing."""
    said = [one.reply for one in attempt.refused if one.reply is not None]
    if attempt.reply is not None:
        said.append(attempt.reply)
    return next((reply for reply in said if asks_for_less(reply)), None)
