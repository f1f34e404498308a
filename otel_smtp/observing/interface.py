"""The one interface of observers, `Observer`. Every hook is defined here alone; `fan_out` reads it here.

A hook either *tells* (it returns None) or *asks* (the first answer that is not empty counts). Hooks are called on the
event loop, so they must not block. If one raises, the exception is logged once and that observer is dropped; mail is
unaffected.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from otel_smtp.observing.records import ConnectionRecord, DeliveryRecord, TransactionRecord
from otel_smtp.observing.values import ConnectionInfo
from otel_smtp.smtp.states import ConnState, Transition


class Observer:
    """Everything that happens in one gateway process. Override the hooks you need; the others cost nothing."""

    def connection_opened(self, connection: ConnectionRecord) -> None:
        """A socket was accepted; none of its states has been recorded yet."""

    def connection_refused(self, reason: str) -> None:
        """A connection was refused at accept; `reason` comes from a closed set (capacity, client_limit, ...)."""

    def conn_state(self, connection: ConnectionRecord, transition: Transition) -> None:
        """The connection entered a state; called before the client can see the reply that goes with it.

        For observers that need each transition at once. All others find them in `ConnectionRecord.transitions`.
        """

    def segment_ended(self, connection: ConnectionRecord) -> None:
        """The connection goes on; its record begins a new segment once all observers have seen this one."""

    def connection_closed(self, connection: ConnectionRecord) -> None:
        """The transport is gone: the last call for this connection. The record holds its last segment."""

    def transaction_ended(self, transaction: TransactionRecord) -> None:
        """A transaction is over; called before the client can see its final reply.

        Its deliveries are in the record. One that is still under way (the client has gone, and the upstream's reply is
        still recorded) is reported later by `delivery_ended`.
        """

    def transactions_settled(self, transactions: Sequence[TransactionRecord]) -> None:
        """Transactions are over, in the order in which they ended: `transaction_ended` for observers without hurry.

        Most are reported a few milliseconds later, in batches: handling several mails in a row costs less than handling
        each amid its other work. All come before their connection's segment ends. A transaction that failed, or has a
        delivery under way, is reported at once.
        """

    def delivery_ended(self, delivery: DeliveryRecord) -> None:
        """An attempt is over whose transaction had already ended: one from the spool, or one whose client has gone.

        For an attempt from the spool, the outcome for each recipient is known by then.
        """

    def deliveries_settled(self, deliveries: Sequence[DeliveryRecord]) -> None:
        """Attempts are over whose transactions had already ended: `delivery_ended` for observers without hurry.

        As `transactions_settled`: successful attempts from the spool come in batches, after the transactions that wait.
        """

    def spool_acted(self, transaction: TransactionRecord) -> None:
        """Something happened to a message in the spool without an attempt: see `TransactionRecord.action`.
        `TransactionRecord.refused` has the recipients that ended by it or now wait for an operator.
        """

    def connection_carrier(self, connection: ConnectionRecord) -> Mapping[str, str]:
        """The trace context of the connection's current segment, as headers; empty without a trace."""
        return {}

    def trace_id(self, transaction: TransactionRecord) -> str | None:
        """The trace id to show to people, 32 hexadecimal digits; asked once the header block has been read, or when
        there will be none. None without a trace.
        """
        return None

    def carrier(self, transaction: TransactionRecord) -> Mapping[str, str]:
        """The transaction's trace context as headers, for the spool, which outlives it; empty without a trace."""
        return {}

    def delivery_carrier(self, delivery: DeliveryRecord) -> Mapping[str, str]:
        """Trace headers for the message that this attempt relays; empty without a trace.

        Asked before the header block has been read, it is for a log line, and in the connection's trace.
        """
        return {}


HOOKS: Final[Mapping[str, bool]] = {
    name: inspect.signature(hook).return_annotation is not None
    for name, hook in vars(Observer).items()
    if not name.startswith("_")
}
"""The hooks by name, and whether each asks."""


class StateCallback(Observer):
    """A user's `conn_state` callback as an observer: called with the connection and each transition."""

    def __init__(self, callback: Callable[[ConnectionInfo, Transition], None]) -> None:
        self._callback = callback
        self._infos: dict[ConnectionRecord, ConnectionInfo] = {}  # a record makes one each time

    def conn_state(self, connection: ConnectionRecord, transition: Transition) -> None:
        info = self._infos.get(connection)
        if info is None:
            info = self._infos[connection] = connection.info
        if transition.state is ConnState.CLOSED:
            del self._infos[connection]
        try:
            self._callback(info, transition)
        except BaseException:
            self._infos.clear()  # it is dropped now, and would not learn of their ends
            raise
