"""The forwarders of the queue modes: the spool alone, or the upstream first and the spool after a failure.

Both answer 250 only if the upstream did or the message is durable.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from types import MappingProxyType
from typing import Final, Protocol

from otel_smtp.forwarding.base import (
    LEAST,
    Forwarder,
    MailTransaction,
    MessageAnswered,
    Permanent,
    RecipientsAnswered,
    Relay,
    Transient,
)
from otel_smtp.observing import Observer, TransactionRecord
from otel_smtp.smtp import replies
from otel_smtp.smtp.envelope import Body, Mail, Recipient
from otel_smtp.smtp.extensions import Extensions, of_ascii_content
from otel_smtp.smtp.replies import ErrorType, Reply
from otel_smtp.spool.messages import Kind, Lease, NewMessage, SpoolError, StorageBusy, StorageFull, new_id
from otel_smtp.spool.store import Draft, Pending, Store

logger: Final = logging.getLogger("otel_smtp.spool.forwarders")


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
        return reply_to(error)

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
            refusals: the results of an attempt made a moment ago, by recipient address; the message then waits first.
            is_possible_duplicate: that attempt may have succeeded.
        """
        was_tried = refusals is not None
        content = draft.in_memory
        if mail.smtputf8 and not draft.is_8bit:
            mail = of_ascii_content(mail, chain.from_iterable(deliveries.values()))
        message_id = new_id()
        message = _new_message(
            (
                message_id, mail, deliveries, draft.header_octets, self._max_age_seconds,
                self._observer.carrier(record), Kind.MAIL, is_possible_duplicate,
                self._first_wait_seconds() if was_tried else 0.0,
                int(was_tried),
                {address: str(reply) for address, reply in refusals.items()} if refusals else _NO_REPLIES,
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


def _refusal_for(error: Exception, message_id: str) -> Reply:
    """The reply to a client whose message could not be made durable."""
    if isinstance(error, SpoolError):
        return reply_to(error)
    logger.error("message not queued: internal error", extra={"spool_id": message_id}, exc_info=error)
    return replies.STORAGE_FAILED


def _why(error: Exception) -> str:
    """Why the spool could not accept a message, in words for operators."""
    if isinstance(error, SpoolError):
        return f"spool: {error}"
    return f"internal error: {type(error).__name__}"


def reply_to(error: SpoolError) -> Reply:
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


class SpoolForwarder:
    """Mode `queue`: mail that any upstream can deliver is made durable, then answered."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._known: Extensions | None = None  # the upstream's, when last read, and the offer made from them
        self._offered = Extensions()

    def capabilities(self) -> Extensions:
        """The upstream's known extensions: mail that it would refuse later is better refused now.

        It need not offer DSN: the spool then sends the reports itself (RFC 3461 5.2.2).
        """
        known = self._intake.relay.capabilities()
        if known is not self._known:
            self._known, self._offered = known, replace(known, dsn=True)
        return self._offered

    def begin(self, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """Open a transaction.

        Raises:
            Permanent: no upstream would take it.
            Transient: none would now, or the spool takes nothing now.
        """
        relay = self._intake.relay
        if (refusal := relay.refusal(mail)) is not None:
            raise Transient(refusal) if refusal.is_transient else Permanent(refusal)
        if (refusal := self._intake.refusal(record)) is not None:
            raise Transient(refusal)
        if mail.body is Body.EIGHT_BIT_MIME and not record.is_8bit_offered and relay.capabilities() is not LEAST:
            return _QueuedIf7Bit(self._intake, mail, record)
        return _Queued(self._intake, mail, record)


class _Queued(MailTransaction):
    """A transaction that ends in the spool."""

    __slots__ = ("_answered", "_deliveries", "_draft", "_intake", "_mail", "_record", "_resume", "spool_id")

    def __init__(self, intake: Intake, mail: Mail, record: TransactionRecord) -> None:
        self._intake = intake
        self._mail = mail
        self._record = record
        self._deliveries: dict[str, list[Recipient]] = {}
        self._draft: Draft | None = intake.draft()  # tells the store that a message is on its way
        self._resume: Callable[[], None] | None = None
        self._answered: MessageAnswered | None = None
        self.spool_id: str | None = None

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""
        # Most have one, and a comprehension is a call.
        answered([self._accept(batch[0])] if len(batch) == 1 else [self._accept(recipient) for recipient in batch])

    def _accept(self, recipient: Recipient) -> Reply:
        destination = self._intake.relay.destination(self._mail, recipient)
        if isinstance(destination, Reply):
            return destination
        self._deliveries.setdefault(destination, []).append(recipient)
        return replies.RECIPIENT_OK

    def message(self, header: bytes, body: bytes, answered: MessageAnswered) -> None:
        """See `MailTransaction.message`."""
        assert self._draft is not None
        if self._draft.hold(header, body):
            self.finish(answered)
        else:
            super().message(header, body, answered)

    def content(self, resume: Callable[[], None]) -> None:
        """See `MailTransaction.content`."""
        self._resume = resume

    def write(self, chunk: bytes) -> bool:
        """See `MailTransaction.write`."""
        assert self._draft is not None
        assert self._resume is not None
        return self._draft.write(chunk, self._resume)

    def finish(self, answered: MessageAnswered) -> None:
        """See `MailTransaction.finish`."""
        assert self._draft is not None
        self._answered = answered
        self._intake.submit(self._mail, self._deliveries, self._draft, self._record, self._submitted)
        self._draft = None

    def _submitted(self, answer: str | Reply) -> None:
        if isinstance(answer, str):
            self.spool_id, answer = answer, replies.OK
        answered, self._answered = self._answered, None
        if answered is not None:
            answered(answer, ())

    def abort(self) -> None:
        """See `MailTransaction.abort`."""
        self._answered = None
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.discard()


class _QueuedIf7Bit(_Queued):
    """A transaction that ends in the spool, unless the content is 8-bit, which no upstream takes and the client was not
    offered.
    """

    __slots__ = ()

    def finish(self, answered: MessageAnswered) -> None:
        """See `MailTransaction.finish`."""
        if self._draft is not None and self._draft.is_8bit:
            self.abort()
            answered(replies.NEEDS_8BITMIME, ())
        else:
            super().finish(answered)


class DirectThenQueueForwarder:
    """Mode `direct-then-queue`: the upstream answers the client, but temporary failures are queued."""

    def __init__(self, direct: Forwarder, intake: Intake) -> None:
        self._direct = direct
        self._intake = intake

    def capabilities(self) -> Extensions:
        """The upstream's."""
        return self._direct.capabilities()

    def begin(self, mail: Mail, record: TransactionRecord) -> MailTransaction:
        """Open a transaction; errors as those of the upstream relay."""
        direct: MailTransaction | Reply
        try:
            direct = self._direct.begin(mail, record)
        except Transient as failure:
            if self._intake.refusal() is not None:
                raise
            direct = failure.reply
        return _DirectThenQueued(self._intake, direct, mail, record)


class _DirectThenQueued(MailTransaction):
    """A transaction with the upstream that may fall back to the spool at each step.

    Args:
        direct: the upstream's transaction; or the temporary reason why there is none.
    """

    __slots__ = (
        "_accepted", "_answered", "_deferred", "_direct", "_direct_is_full", "_draft", "_draft_is_full", "_intake",
        "_is_over", "_mail", "_record", "_refusal", "_refusals", "_resume", "spool_id",
    )  # fmt: skip

    def __init__(self, intake: Intake, direct: MailTransaction | Reply, mail: Mail, record: TransactionRecord) -> None:
        self._intake = intake
        self._direct = None if isinstance(direct, Reply) else direct
        self._refusal = direct if isinstance(direct, Reply) else replies.UPSTREAM_UNAVAILABLE
        self._mail = mail
        self._record = record
        self._accepted: list[Recipient] = []  # by the upstream
        self._deferred: list[Recipient] = []
        self._refusals: dict[str, Reply] = {}  # replies to the deferred, by address
        self._draft: Draft | None = None
        self._resume: Callable[[], None] | None = None
        self._answered: MessageAnswered | None = None
        self._direct_is_full = self._draft_is_full = False
        self._is_over = False
        self.spool_id: str | None = None

    def recipients(self, batch: Sequence[Recipient], answered: RecipientsAnswered) -> None:
        """See `MailTransaction.recipients`."""

        def judged(verdicts: Sequence[Reply]) -> None:
            if not self._is_over:
                answered([self._answer(recipient, verdict) for recipient, verdict in zip(batch, verdicts, strict=True)])

        if self._direct is None:
            judged([self._refusal] * len(batch))
        else:
            self._direct.recipients(batch, judged)

    def _answer(self, recipient: Recipient, verdict: Reply) -> Reply:
        if verdict.is_positive:
            self._accepted.append(recipient)
            return verdict
        if not verdict.is_transient or self._intake.refusal() is not None:
            return verdict
        destination = self._intake.relay.destination(self._mail, recipient)
        if isinstance(destination, Reply):
            return destination
        self._deferred.append(recipient)
        self._refusals[recipient.address] = verdict
        return replies.RECIPIENT_OK

    def content(self, resume: Callable[[], None]) -> None:
        """See `MailTransaction.content`."""
        self._resume = resume
        self._draft = self._intake.draft()
        if self._direct is None:
            return
        if self._accepted:
            self._direct.content(self._direct_has_room)
        else:  # all of it goes to the spool
            direct, self._direct = self._direct, None
            direct.abort()

    def write(self, chunk: bytes) -> bool:
        """See `MailTransaction.write`: the slower of the two sets the pace."""
        assert self._draft is not None
        # Set before the call, which may make room before it returns.
        self._draft_is_full = True
        if self._draft.write(chunk, self._draft_has_room):
            self._draft_is_full = False
        if self._direct is not None:
            self._direct_is_full = True
            if self._direct.write(chunk):
                self._direct_is_full = False
        return not (self._draft_is_full or self._direct_is_full)

    def _draft_has_room(self) -> None:
        self._draft_is_full = False
        self._go_on()

    def _direct_has_room(self) -> None:
        self._direct_is_full = False
        self._go_on()

    def _go_on(self) -> None:
        if not (self._draft_is_full or self._direct_is_full or self._is_over):
            assert self._resume is not None
            self._resume()

    def finish(self, answered: MessageAnswered) -> None:
        """See `MailTransaction.finish`."""
        self._answered = answered
        if self._direct is not None:
            self._direct.finish(self._settle)
        else:
            self._queue(self._accepted + self._deferred, None)

    def _settle(self, verdict: Reply, own: Sequence[Reply]) -> None:
        """Make the client's verdict from the upstream's, queueing the remaining recipients.

        If it took the mail for some recipients, the others go to the spool, even permanently refused ones: the client
        gets one reply, and the spool reports failures.
        """
        verdicts = [*own[: len(self._accepted)], *[verdict] * (len(self._accepted) - len(own))]
        if verdict.is_permanent and not any(one.is_positive for one in verdicts):
            # No recipient has it, and the client knows.
            self._answer_message(verdict, () if self._deferred else own)
            return
        left = [(one, reply) for one, reply in zip(self._accepted, verdicts, strict=True) if not reply.is_positive]
        waiting = [*(one for one, _ in left), *self._deferred]
        if not waiting:
            self._answer_message(verdict, own)
            return
        self._refusals.update((one.address, reply) for one, reply in left)
        self._queue(waiting, verdict)

    def _queue(self, waiting: Sequence[Recipient], verdict: Reply | None) -> None:
        assert self._draft is not None

        def submitted(answer: str | Reply) -> None:
            if isinstance(answer, str):
                self.spool_id, answer = answer, replies.OK
            elif verdict is not None and not verdict.is_positive:
                # Recipients that the upstream accepted may get it twice: the client keeps the mail, so none loses it.
                answer = verdict
            self._answer_message(answer)

        self._intake.submit(
            self._mail,
            self._by_destination(waiting),
            self._draft,
            self._record,
            submitted,
            # Recipients that wait for a limit were not attempted.
            refusals=self._refusals
            if any(one is not replies.UPSTREAM_PACED for one in self._refusals.values())
            else None,
            is_possible_duplicate=verdict is not None and verdict.error_type is ErrorType.OUTCOME_UNKNOWN,
        )
        self._draft = None

    def _by_destination(self, recipients: Sequence[Recipient]) -> Mapping[str, Sequence[Recipient]]:
        found: dict[str, list[Recipient]] = {}
        for recipient in recipients:
            destination = self._intake.relay.destination(self._mail, recipient)
            # Recipients accepted a moment ago have a destination; if the routes have changed since, an attempt will
            # report it.
            found.setdefault(destination if isinstance(destination, str) else "", []).append(recipient)
        return found

    def _answer_message(self, reply: Reply, own: Sequence[Reply] = ()) -> None:
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.discard()
        if not self._is_over:
            self._is_over = True
            assert self._answered is not None
            self._answered(reply, own)

    def abort(self) -> None:
        """See `MailTransaction.abort`: the upstream's part continues for the record only, and is not queued."""
        self._is_over = True
        if self._direct is not None:
            self._direct.abort()
        draft, self._draft = self._draft, None
        if draft is not None:
            draft.discard()
