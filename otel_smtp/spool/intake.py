"""The intake of the spool: makes messages durable, and begins their first attempts.

A client is answered 250 once its message is durable, and 4yz if the spool fails.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Final, Protocol

from otel_smtp.forwarding.base import (
    Relay,
)
from otel_smtp.observing import Observer, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Mail, Recipient
from otel_smtp.smtp.extensions import of_ascii_content
from otel_smtp.smtp.replies import Reply
from otel_smtp.spool.messages import Kind, Lease, NewMessage, SpoolError, StorageBusy, StorageFull, new_id, reply_room
from otel_smtp.spool.store import Draft, Pending, Store

logger: Final = logging.getLogger("otel_smtp.spool.intake")


_new_message: Final = partial(tuple.__new__, NewMessage)  # the constructor of a named tuple is a function in Python
_NO_REPLIES: Final[Mapping[str, str]] = MappingProxyType({})


class DeliveryAgent(Protocol):
    """Attempts deliveries."""

    def reserve(self, destinations: Sequence[str]) -> bool:
        """Whether a new message can be attempted at once; if so, reserves room for it."""
        ...

    def begin(self, destinations: Sequence[str], leases: Sequence[Lease], content: Sequence[bytes] | None) -> None:
        """Attempt `leases`, in the reserved room.

        Args:
            leases: one for each destination; none to free the room.
            content: if in memory; the first chunk is the header block.
        """
        ...

    def wake(self, destinations: Sequence[str]) -> None:
        """A message waits for an attempt."""
        ...


class Intake:
    """The way into the spool, shared by both forwarders.

    Args:
        observer: gives the trace context to store with a message.
        max_age_seconds: after which a message expires.
        first_wait_seconds: gives the wait after an attempt made before the message was queued.
    """

    def __init__(
        self,
        store: Store,
        relay: Relay,
        attempts: DeliveryAgent,
        observer: Observer,
        *,
        max_age_seconds: float,
        first_wait_seconds: Callable[[], float],
    ) -> None:
        self._first_wait_seconds = first_wait_seconds
        self._store = store
        self._attempts = attempts
        self._observer = observer
        self._max_age_seconds = max_age_seconds
        self._durable: deque[tuple[Sequence[str], Sequence[Lease], Sequence[bytes] | None]] = deque()
        self.relay = relay

    def refusal(self, record: TransactionRecord | None = None) -> Reply | None:
        """The refusal of all mail, while the spool accepts none.

        Args:
            record: of the refused transaction.
        """
        error = self._store.refusal()
        if error is None:
            return None
        if record is not None:
            record.failure = _why(error)
        return _reply_to(error)

    def draft(self) -> Draft:
        """A new content."""
        return self._store.draft()

    def submit(
        self,
        mail: Mail,
        deliveries: Mapping[str, Sequence[Recipient]],
        draft: Draft,
        record: TransactionRecord,
        answered: Callable[[str | Reply], None],
        *,
        refusals: Mapping[str, Reply] | None = None,
        is_possible_duplicate: bool = False,
    ) -> None:
        """Make a message durable, and attempt it at once if there is room.

        Args:
            draft: complete; the store owns it from here on.
            record: given the message's id.
            answered: called once with the message's id when it is durable, or with the reply to the client.
            refusals: the results of an attempt made a moment ago, by recipient address; the message then waits first,
                unless one of them is for good.
            is_possible_duplicate: that attempt may have succeeded.
        """
        was_tried = refusals is not None
        # A refusal for good is asked for once more, so that a bounce says what holds, and not after a wait.
        waits = refusals is not None and not any(reply.is_permanent for reply in refusals.values())
        content = draft.in_memory
        if mail.smtputf8 and not draft.is_8bit:
            mail = of_ascii_content(mail, chain.from_iterable(deliveries.values()))
        message_id = new_id()
        message = _new_message(
            (
                message_id, mail, deliveries, draft.header_octets, self._max_age_seconds,
                self._observer.carrier(record), Kind.MAIL, is_possible_duplicate,
                self._first_wait_seconds() if waits else 0.0,
                int(was_tried),
                _texts_of(refusals) if refusals else _NO_REPLIES,
            )
        )  # fmt: skip
        destinations = list(deliveries)
        is_leased = not was_tried and self._attempts.reserve(destinations)

        def submitted(done: "Pending[Sequence[Lease]]") -> None:  # quoted: otherwise evaluated for each message
            leases: Sequence[Lease] = ()
            try:
                leases = done.result()
            except asyncio.CancelledError:
                answer: str | Reply = replies.STORAGE_FAILED
            except Exception as error:  # noqa: BLE001 - it is logged
                answer = _refusal_for(error, message_id)
                record.failure = _why(error)
            else:
                answer = record.spool_id = message_id
            try:
                answered(answer)
            finally:  # a fault on the client's side is no fault of the message
                if is_leased:
                    # First all clients are answered whose messages became durable with this one.
                    if not self._durable:
                        asyncio.get_running_loop().call_soon(self._begin_attempts)
                    self._durable.append((destinations, leases, content))
                elif isinstance(answer, str):
                    self._attempts.wake(destinations)

        try:
            self._store.submit(message, draft, lease=is_leased).add_done_callback(submitted)
        except BaseException:
            if is_leased:
                self._attempts.begin(destinations, (), None)
            raise

    def _begin_attempts(self) -> None:
        """Attempt messages that have become durable; failed ones give their room back."""
        durable = self._durable
        try:
            while durable:
                self._attempts.begin(*durable.popleft())
        finally:
            if durable:
                asyncio.get_running_loop().call_soon(self._begin_attempts)


def _texts_of(refusals: Mapping[str, Reply]) -> Mapping[str, str]:
    room = reply_room(len(refusals))
    return {address: str(reply)[:room] for address, reply in refusals.items()}


def _refusal_for(error: Exception, message_id: str) -> Reply:
    """The reply to a client whose message could not be made durable."""
    if isinstance(error, SpoolError):
        return _reply_to(error)
    logger.error("message not queued: internal error", extra={"spool_id": message_id}, exc_info=error)
    return replies.STORAGE_FAILED


def _why(error: Exception) -> str:
    """Why the spool could not accept a message, in words for operators."""
    if isinstance(error, SpoolError):
        return f"spool: {error}"
    return f"internal error: {type(error).__name__}"


def _reply_to(error: SpoolError) -> Reply:
    """The reply to a client if the spool fails (RFC 3463 3.4: 4.3.1 is a full mail system, 4.3.2 one that accepts no
    mail now).
    """
    match error:
        case StorageFull():
            return replies.STORAGE_FULL
        case StorageBusy():
            return replies.STORAGE_BUSY
        case _:
            return replies.STORAGE_FAILED
