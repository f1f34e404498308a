"""The attempts of one mail: one upstream after another, until one gives a usable answer.

* Once the end of the content has been sent (`has_ended_content`) no other upstream may be tried: after a lost
  connection it is unknown whether the mail was delivered, and a second attempt might deliver it twice.
* Before that, the next upstream is tried after one that gives no usable answer.
* One connection that dies says little about its upstream. So if a kept connection, or one in the middle of a
  transaction, is lost, or a kept one refuses MAIL temporarily (the upstream may count mails per connection), the same
  upstream is tried once more on a fresh connection, within the same attempt and before the next upstream.

For the use of a connection see `delivery`.
"""

import logging
from abc import abstractmethod
from collections.abc import Sequence
from time import monotonic_ns
from typing import Final

from otel_smtp.forwarding.connecting import Connecting, Retry
from otel_smtp.forwarding.faults import (
    ConnectFailed,
    ConnectionLost,
    CredentialsRefused,
    NoConnectionFree,
    OutOfStep,
    Spent,
    TimedOut,
    Unsuitable,
    UpstreamFault,
)
from otel_smtp.forwarding.smarthost import Smarthost
from otel_smtp.forwarding.verdicts import asks_for_less
from otel_smtp.observing import DeliveryRecord, Outcome, trace_fields
from otel_smtp.smtp import replies
from otel_smtp.smtp.errors import RemoteProtocolError
from otel_smtp.smtp.replies import ErrorType, Reply

logger: Final = logging.getLogger("otel_smtp.forwarding.attempts")


class Attempts(Connecting):
    """Tries a piece of work on one upstream after another.

    A subclass sets `_work` and calls `_proceed`, which does the work on `_connection`; an exception of the work decides
    the next step. `_end` ends an attempt, and `_answer_for_all` is called when no upstream is left.

    Args:
        record: gets a `DeliveryRecord` for each attempt.
        relaying: notified at the end of an attempt that continued without its client, after `abort`.
        route: see below.

    Attributes:
        route: the upstreams not yet tried, the preferred one first.
        begins_fresh: the first connection to each upstream must be unused.
        has_ended_content: see above; set by the subclass.
        is_under_way: an attempt has begun and is not over.
        waits_for_limits: waits for an upstream's limits without bound, as no client waits.
    """

    __slots__ = ()

    def is_served_by(self, smarthosts: Sequence[Smarthost]) -> bool:
        """Whether the transaction's current upstream, perhaps not the preferred one, is among `smarthosts`."""
        return not self.is_under_way or self._smarthost in smarthosts

    def give_up(self) -> None:
        """End an attempt that continues without its client: its outcome stays unknown."""
        if self.is_under_way:
            self._attempt.failure = "the gateway ended before the reply came"
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)

    @abstractmethod
    def _answer_for_all(self, reply: Reply) -> None:
        """Answer the pending question with `reply`: no upstream is left."""

    @abstractmethod
    def _refused_by(self, refusal: Reply) -> None:
        """Use what the current upstream said of the mail as its answer."""

    # Steps and their faults --------------------------------------------------------------------------------

    def _proceed(self) -> None:
        """Do the work on the current connection, or on the next one available."""
        try:
            if not self._is_connected:
                if not self._connect():
                    return
            else:
                connection = self._connection
                connection.parked = None
                if not connection.is_alive:
                    connection.ensure_alive()
            self._work(self)
        except Exception as error:  # noqa: BLE001 - see `_recover`
            self._recover(error)

    def _next_attempt(self) -> None:
        """Get a connection for the next attempt, or another one for this attempt, and do the work on it."""
        if self._connect():
            self._work(self)

    def _recover(self, error: Exception) -> None:
        """Decide what follows from an exception in a step; nothing is raised."""
        while True:  # each iteration uses up an upstream, a second chance, or the answer
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
            # The one case that must never be retried: the mail may have been delivered.
            self._attempt.failure = str(fault)
            logger.error("delivery outcome unknown", extra={**self._named(), "fault": str(fault)})
            self._end(Outcome.UNKNOWN, None, ErrorType.OUTCOME_UNKNOWN)
            # The reply must say so too: transaction, log and a later attempt's mark depend on it.
            is_lost = isinstance(fault, ConnectionLost)
            self._answer_for_all(replies.OUTCOME_UNKNOWN if is_lost else replies.GARBLED_OUTCOME)
            return
        if was_connected and isinstance(fault, ConnectionLost) and not isinstance(fault, TimedOut):
            if self._may_try_again and not self._is_aborted:
                put_off = fault.upstream_reply if isinstance(fault, Spent) else None
                tried_again = self._tried.again | {self._smarthost}
                self._tried = self._tried._replace(again=tried_again, put_off=put_off)
                self._retry = Retry.FRESH
                self._let_go(answered=False)
                self._next_attempt()
                return
        elif not was_connected and self._tried.put_off is not None and not self._is_aborted:
            # There was no second connection; its reply on the first is its answer.
            self._refused_by(self._tried.put_off)
            return
        if isinstance(fault, CredentialsRefused):
            self._smarthost.credentials_refused(fault, self._named())
        self._attempt.failure = str(fault)
        if isinstance(fault, ConnectFailed):
            logger.warning(
                "no connection to the upstream", extra={**self._named(), **self._smarthost.fault_fields(fault)}
            )
        self._end(Outcome.DEFERRED, fault.upstream_reply, fault.reply.error_type)
        self._note_fault(fault)
        if was_connected and fault.reply is replies.UPSTREAM_PROTOCOL:
            # Its outcome is unknown: this upstream may still deliver while the next one is asked.
            self._answer_for_all(fault.quoted_reply)
        elif not self._is_aborted:
            self._next_attempt()

    @property
    def _may_try_again(self) -> bool:
        """Whether the current upstream has a second chance for this mail: see the head of the module."""
        return (self._was_reused or self._is_open) and self._smarthost not in self._tried.again

    def _note_fault(self, fault: UpstreamFault) -> None:
        self._tried = self._tried._replace(faults=(*self._tried.faults, fault))

    def _pass_by(self, refusal: Reply) -> None:
        """The current upstream lacks an extension that the mail needs; another one may offer it, now or after its
        backoff.
        """
        fault = Unsuitable("the upstream lacks what the mail needs", refusal)
        self._note_fault(fault)
        self._attempt.failure = str(fault)
        self._end(Outcome.DEFERRED if refusal.is_transient else Outcome.REFUSED, None, refusal.error_type)
        self._next_attempt()

    def _nobody_left(self) -> None:
        """No upstream is left: answer, preferring a temporary refusal to a permanent one."""
        faults = self._tried.faults
        tried = [fault for fault in faults if not isinstance(fault, NoConnectionFree)] or faults
        passing = [fault for fault in reversed(tried) if fault.reply.is_transient]
        if passing:
            # An upstream's reply, or else the fault of one that was reached.
            said = next((fault for fault in passing if fault.upstream_reply is not None), None)
            met = next((fault for fault in passing if fault.reply is not replies.UPSTREAM_UNAVAILABLE), passing[0])
            self._answer_for_all((said or met).quoted_reply)
        else:
            self._answer_for_all(tried[0].quoted_reply if tried else replies.UPSTREAM_UNAVAILABLE)

    # The end of an attempt ---------------------------------------------------------------------------------

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
            attempt.round_trips = connection.round_trips
        attempt.end(outcome, reply, error_type, monotonic_ns())
        if self._permission is not None:
            self._end_leave()
        if is_connected:
            self._is_connected = False
            if not connection.is_alive:
                connection.abandon()
            self._smarthost.release(connection, answered=answered)
        if self._is_aborted:
            # Observers get a transaction with its attempts; an attempt that outlives it is reported separately.
            if self._record.ended_ns:
                self._relaying.observer.delivery_ended(attempt)
            self._relaying.unwatch(self)

    def _named(self) -> dict[str, object]:
        """The log fields of the attempt: its mail, its upstream, and its span."""
        record = self._record
        named: dict[str, object] = {"upstream": self._attempt.upstream}
        if record.connection is not None:
            named["connection_id"] = record.connection.id
        else:
            named |= {"spool_id": record.spool_id, "attempt": record.attempt}
        return named | trace_fields(self._relaying.observer.delivery_carrier(self._attempt))

    def _end_leave(self) -> None:
        pace, leave = self._smarthost.pace, self._permission
        assert pace is not None
        assert leave is not None
        self._permission = None
        pace.begun -= 1
        attempt = self._attempt
        if leave.is_waiting or not attempt.peer:
            pace.withdraw(leave)  # without a connection, nothing was said
            return
        if (refusal := _asks_for_less(attempt)) is not None:
            if (seconds := pace.is_too_much(leave)) is not None:
                reply = self._smarthost.shown(str(refusal))
                logger.warning(
                    "upstream asks for less mail; mail waits",
                    extra={**self._named(), "seconds": seconds, "code": refusal.code, "reply": reply},
                )
        elif attempt.outcome is Outcome.RELAYED:
            pace.got_through()
        pace.landed(leave)


def _asks_for_less(attempt: DeliveryRecord) -> Reply | None:
    """The upstream's reply, to the message or a recipient, that it gets too much mail; None without one."""
    said = [one.reply for one in attempt.refused if one.reply is not None]
    if attempt.reply is not None:
        said.append(attempt.reply)
    return next((reply for reply in said if asks_for_less(reply)), None)
